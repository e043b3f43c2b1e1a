"""All architectures, by family and name."""

import generative
import language
import multi_input
import sequence
import tabular
import vision

FAMILIES = {
    "vision": vision.ARCHITECTURES,
    "language": language.ARCHITECTURES,
    "sequence": sequence.ARCHITECTURES,
    "tabular": tabular.ARCHITECTURES,
    "generative": generative.ARCHITECTURES,
    "multi_input": multi_input.ARCHITECTURES,
}

# One of each kind of structure. The tests of the others are thorough.
DEFAULT = {"LeNet-5", "U-Net", "ViT", "Llama", "siamese"}
