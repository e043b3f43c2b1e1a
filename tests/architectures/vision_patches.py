"""Networks of patches: ConvMixer, and transformers of images."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def convmixer():
    """ConvMixer: patches, then convolutions that mix positions and channels in turn."""

    def activated(convolution):
        return convolution, bp.gelu(approximate=False), bp.group_norm(1)

    along_positions = bp.residual(*activated(bp.conv(4, (3, 3), groups=4)))
    along_channels = bp.chain(*activated(bp.conv(4, (1, 1))))
    patches = bp.chain(*activated(bp.conv(4, (2, 2), strides=2)))
    return bp.chain(patches, along_positions, along_channels, bp.global_pool(), bp.dense(3))


def convmixer_torch(p, x, labels):
    def activated(p, x, **options):
        convolution, _, norm = p
        return t.group_norm(norm, t.gelu(t.conv(convolution, x, **options)), 1)

    patches, along_positions, along_channels, _, logits = p
    x = activated(patches, x, stride=2)
    x = x + activated(along_positions, x, padding=1, groups=4)
    x = activated(along_channels, x)
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


ARCHITECTURES = {
    "ConvMixer": Architecture(
        "Patches Are All You Need?, Trockman, Kolter, 2022",
        convmixer,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        convmixer_torch,
    ),
}
