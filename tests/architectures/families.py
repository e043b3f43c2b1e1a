"""All architectures, by family and name."""

import vision

FAMILIES = {"vision": vision.ARCHITECTURES}

# One of each kind of structure. The tests of the others are thorough.
DEFAULT = {"LeNet-5", "ResNet", "U-Net"}
