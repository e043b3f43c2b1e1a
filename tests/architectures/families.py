"""All architectures, by family and name."""

import generative
import language
import vision

FAMILIES = {
    "vision": vision.ARCHITECTURES,
    "language": language.ARCHITECTURES,
    "generative": generative.ARCHITECTURES,
}

# One of each kind of structure. The tests of the others are thorough.
DEFAULT = {
    *("LeNet-5", "ResNet", "U-Net", "ViT", "MLP-Mixer"),
    *("GPT-2", "Llama", "Mixtral"),
}
