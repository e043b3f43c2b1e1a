"""Convolutional networks for little memory and few products, from SqueezeNet to EfficientNet.

Group norm stands in the place of batch norm, as in `vision_residual`.
"""

import torch_functions as t
from architecture import Architecture, Tokens
from vision_gated import squeeze_excite, squeeze_excite_torch

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


def inverted_residual(channels, features, activation, gate=None, strides=1):
    """Channels are widened, each is convolved alone, perhaps gated, and they are narrowed again."""
    wide = 2 * channels
    layers = [
        *(conv1(wide), bp.group_norm(1), activation()),
        *(depthwise(wide, strides), bp.group_norm(1), activation()),
        bp.chain() if gate is None else bp.gated(bp.chain(), gate),
        *(conv1(features), bp.group_norm(1)),
    ]
    return bp.residual(*layers) if (strides, channels) == (1, features) else bp.chain(*layers)


def inverted_residual_torch(p, x, activation, gate=None, stride=1):
    widen, norm1, _, convolve, norm2, _, gates, narrow, norm3 = p
    y = activation(t.group_norm(norm1, t.conv(widen, x), 1))
    y = activation(t.group_norm(norm2, depthwise_torch(convolve, y, stride), 1))
    if gate is not None:
        y = y * gate(gates[1], y)[:, None, None, :]
    y = t.group_norm(norm3, t.conv(narrow, y), 1)
    return x + y if x.shape == y.shape else y


def mobilenet_v2():
    """MobileNetV2: inverted residuals, with a linear layer at their narrow end."""
    return bp.chain(
        *(conv1(2), bp.group_norm(1), bp.relu6()),
        inverted_residual(2, 2, bp.relu6),
        inverted_residual(2, 3, bp.relu6, strides=2),
        *(conv1(5), bp.group_norm(1), bp.relu6()),
        *(bp.global_pool(), bp.dense(3)),
    )


def mobilenet_v2_torch(p, x, labels):
    def relu6(x):
        return x.clamp(0, 6)

    stem, norm1, _, block1, block2, last, norm2, _, _, logits = p
    x = relu6(t.group_norm(norm1, t.conv(stem, x), 1))
    x = inverted_residual_torch(block1, x, relu6)
    x = inverted_residual_torch(block2, x, relu6, stride=2)
    x = relu6(t.group_norm(norm2, t.conv(last, x), 1))
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


def mobilenet_v3():
    """MobileNetV3: blocks of V2 with squeeze and excitation, and activations without exponents."""
    gate = squeeze_excite(6, bp.relu, bp.hard_sigmoid)
    return bp.chain(
        *(conv1(3), bp.group_norm(1), bp.hardswish()),
        inverted_residual(3, 3, bp.hardswish, gate),
        inverted_residual(3, 4, bp.relu, strides=2),
        *(bp.global_pool(), bp.dense(5), bp.hardswish(), bp.dense(3)),
    )


def mobilenet_v3_torch(p, x, labels):
    def hard_sigmoid(x):
        return (x / 6 + 1 / 2).clamp(0, 1)

    def hardswish(x):
        return x * hard_sigmoid(x)

    def relu(x):
        return x.relu()

    stem, norm, _, block1, block2, _, hidden, _, logits = p
    x = hardswish(t.group_norm(norm, t.conv(stem, x), 1))
    x = inverted_residual_torch(block1, x, hardswish, squeeze_excite_torch(relu, hard_sigmoid))
    x = inverted_residual_torch(block2, x, relu, stride=2)
    return t.cross_entropy(t.dense(logits, hardswish(t.dense(hidden, x.mean((1, 2))))), labels)


def efficientnet():
    """EfficientNet: inverted residuals with squeeze and excitation, and SiLU throughout."""

    def block(channels, features, strides=1):
        gate = squeeze_excite(2 * channels, bp.silu, bp.sigmoid)
        return inverted_residual(channels, features, bp.silu, gate, strides)

    return bp.chain(
        *(conv1(2), bp.group_norm(1), bp.silu()),
        *(block(2, 3, strides=2), block(3, 3)),
        *(conv1(5), bp.group_norm(1), bp.silu()),
        *(bp.global_pool(), bp.dropout(0.2), bp.dense(3)),
    )


def efficientnet_torch(p, x, labels):
    def silu(x):
        return x * x.sigmoid()

    def block(p, x, stride=1):
        gate = squeeze_excite_torch(silu, lambda x: x.sigmoid())
        return inverted_residual_torch(p, x, silu, gate, stride)

    stem, norm1, _, block1, block2, last, norm2, _, _, _, logits = p
    x = silu(t.group_norm(norm1, t.conv(stem, x), 1))
    x = block(block2, block(block1, x, 2))
    x = silu(t.group_norm(norm2, t.conv(last, x), 1))
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


def shufflenet():
    """ShuffleNet: convolutions in groups, and channels that change their group in between."""

    def shuffle(size, groups):
        return bp.chain(
            bp.reshape(size, size, groups, -1), bp.permute(0, 1, 3, 2), bp.reshape(size, size, -1)
        )

    def branch(channels, features, size, strides):
        return [
            *(conv1(channels, groups=2), bp.group_norm(1), bp.relu(), shuffle(size, 2)),
            *(depthwise(channels, strides), bp.group_norm(1)),
            *(conv1(features, groups=2), bp.group_norm(1)),
        ]

    def unit(channels, size):
        return bp.chain(bp.residual(*branch(channels, channels, size, 1)), bp.relu())

    def halving_unit(channels, features, size):
        """The pooled image keeps its channels, and the branch adds those that are missing."""
        pooled = bp.avg_pool((3, 3), strides=2, padding=AROUND)
        new = bp.chain(*branch(channels, features - channels, size, 2))
        return bp.chain(bp.parallel(pooled, new, combine="concatenate"), bp.relu())

    return bp.chain(
        conv1(4), unit(4, 5), halving_unit(4, 10, 5), unit(10, 3), bp.global_pool(), bp.dense(3)
    )


def shufflenet_torch(p, x, labels):
    from torch.nn.functional import channel_shuffle

    def branch(p, x, stride=1):
        reduce, norm1, _, _, along_positions, norm2, expand, norm3 = p
        x = t.group_norm(norm1, t.conv(reduce, x, groups=2), 1).relu()
        x = t.last(channel_shuffle(t.first(x).contiguous(), 2))
        x = t.group_norm(norm2, depthwise_torch(along_positions, x, stride), 1)
        return t.group_norm(norm3, t.conv(expand, x, groups=2), 1)

    stem, (unit1, _), ((_, halving), _), (unit2, _), _, logits = p
    x = t.conv(stem, x)
    x = (x + branch(unit1, x)).relu()
    x = t.concatenate([t.avg_pool(x, 3, 2, 1), branch(halving, x, 2)]).relu()
    x = (x + branch(unit2, x)).relu()
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
    "MobileNetV2": Architecture(
        "MobileNetV2: Inverted Residuals and Linear Bottlenecks, Sandler, Howard, Zhu, Zhmoginov, "
        "Chen, 2018",
        mobilenet_v2,
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        mobilenet_v2_torch,
    ),
    "MobileNetV3": Architecture(
        "Searching for MobileNetV3, Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Pang, "
        "Vasudevan, Le, Adam, 2019",
        mobilenet_v3,
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        mobilenet_v3_torch,
    ),
    "EfficientNet": Architecture(
        "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, Tan, Le, 2019",
        efficientnet,
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        efficientnet_torch,
    ),
    "ShuffleNet": Architecture(
        "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, "
        "Zhang, Zhou, Lin, Sun, 2018",
        shufflenet,
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        shufflenet_torch,
    ),
}
