"""Convolutional networks for little memory and few products, from SqueezeNet to EfficientNet.

Group norm stands in the place of batch norm, as in `vision_residual`.
"""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp

AROUND = ((1, 1), (1, 1))  # one position of padding around the image, for strides too


def conv1(features, groups=1):
    return bp.conv(features, (1, 1), groups=groups, use_bias=False)


def depthwise(channels, strides=1):
    """Each channel has a 3 x 3 kernel of its own."""
    return bp.conv(
        channels, (3, 3), strides=strides, padding=AROUND, groups=channels, use_bias=False
    )


def depthwise_torch(p, x, stride=1):
    return t.conv(p, x, stride=stride, padding=1, groups=x.shape[-1])


def squeezenet():
    """SqueezeNet: fire modules squeeze the channels before they expand them in two branches."""

    def unit(features, size):
        return bp.chain(bp.conv(features, (size, size)), bp.relu())

    def fire(squeezed, expanded):
        branches = bp.parallel(unit(expanded, 1), unit(expanded, 3), combine="concatenate")
        return bp.chain(unit(squeezed, 1), branches)

    return bp.chain(
        *(unit(3, 3), bp.max_pool((2, 2)), fire(3, 2), bp.residual(fire(3, 2))),
        *(bp.dropout(0.5), unit(3, 1), bp.global_pool()),
    )


def squeezenet_torch(p, x, labels):
    def unit(p, x):
        return t.conv(p[0], x, padding=p[0]["weight"].shape[0] // 2).relu()

    def fire(p, x):
        squeeze, branches = p
        x = unit(squeeze, x)
        return t.concatenate([unit(branch, x) for branch in branches])

    stem, _, fire1, fire2, _, classes, _ = p
    x = fire(fire1, t.max_pool(unit(stem, x), 2))
    return t.cross_entropy(unit(classes, x + fire(fire2, x)).mean((1, 2)), labels)


def mobilenet():
    """MobileNet: convolutions that are split into one along positions and one along channels."""

    def separable(channels, features, strides=1):
        return bp.chain(
            *(depthwise(channels, strides), bp.group_norm(1), bp.relu()),
            *(conv1(features), bp.group_norm(1), bp.relu()),
        )

    stem = bp.chain(conv1(3), bp.group_norm(1), bp.relu())
    return bp.chain(
        *(stem, separable(3, 4), separable(4, 5, strides=2)), *(bp.global_pool(), bp.dense(3))
    )


def mobilenet_torch(p, x, labels):
    def separable(p, x, stride=1):
        along_positions, norm1, _, along_channels, norm2, _ = p
        x = t.group_norm(norm1, depthwise_torch(along_positions, x, stride), 1).relu()
        return t.group_norm(norm2, t.conv(along_channels, x), 1).relu()

    (stem, norm, _), block1, block2, _, logits = p
    x = t.group_norm(norm, t.conv(stem, x), 1).relu()
    x = separable(block2, separable(block1, x), stride=2)
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


ARCHITECTURES = {
    "SqueezeNet": Architecture(
        "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5MB model size, "
        "Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer, 2016",
        squeezenet,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        squeezenet_torch,
    ),
    "MobileNet": Architecture(
        "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, "
        "Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam, 2017",
        mobilenet,
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        mobilenet_torch,
    ),
}
