"""All architectures, by family and name."""

import generative
import vision

FAMILIES = {"vision": vision.ARCHITECTURES, "generative": generative.ARCHITECTURES}

# One of each kind of structure. The tests of the others are thorough.
DEFAULT = {"LeNet-5", "ResNet", "U-Net", "ViT", "MLP-Mixer"}
