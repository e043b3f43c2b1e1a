"""Convolutional networks with shortcuts, from ResNet to ConvNeXt.

The published networks normalise by the statistics of the batch, which leaves no gradient of a
single example. Here group norm stands in its place, as in "Group Normalization", Wu, He, 2018.
"""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp

AROUND = ((1, 1), (1, 1))  # one position of padding around the image, for strides too


def conv3(features, strides=1, groups=1):
    return bp.conv(features, (3, 3), strides=strides, padding=AROUND, groups=groups, use_bias=False)


def conv1(features, strides=1):
    return bp.conv(features, (1, 1), strides=strides, use_bias=False)


def resnet():
    """ResNet of basic blocks; the shortcut of the second halves the image by a convolution."""

    def body(features, strides):
        return [
            *(conv3(features, strides), bp.group_norm(2), bp.relu()),
            *(conv3(features), bp.group_norm(2)),
        ]

    def block(features):
        return bp.chain(bp.residual(*body(features, 1)), bp.relu())

    def halving_block(features):
        shortcut = bp.chain(conv1(features, strides=2), bp.group_norm(2))
        return bp.chain(bp.parallel(shortcut, bp.chain(*body(features, 2))), bp.relu())

    stem = bp.chain(conv3(2), bp.group_norm(2), bp.relu())
    return bp.chain(stem, block(2), halving_block(4), bp.global_pool(), bp.dense(3))


def resnet_torch(p, x, labels):
    def body(p, x, stride=1):
        conv1, norm1, _, conv2, norm2 = p
        x = t.group_norm(norm1, t.conv(conv1, x, stride=stride, padding=1), 2).relu()
        return t.group_norm(norm2, t.conv(conv2, x, padding=1), 2)

    stem, block, halving_block, _, logits = p
    x = t.group_norm(stem[1], t.conv(stem[0], x, padding=1), 2).relu()
    x = (x + body(block[0], x)).relu()
    shortcut, halving = halving_block[0]
    skipped = t.group_norm(shortcut[1], t.conv(shortcut[0], x, stride=2), 2)
    x = (skipped + body(halving, x, 2)).relu()
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


def wide_resnet():
    """A wide ResNet: norm and ReLU come before each convolution, with dropout between the two."""

    def before(*layers):
        return bp.group_norm(2), bp.relu(), *layers

    def block(features):
        return bp.residual(*before(conv3(features)), *before(bp.dropout(0.3), conv3(features)))

    def halving_block(features):
        body = bp.chain(conv3(features, strides=2), *before(bp.dropout(0.3), conv3(features)))
        return bp.chain(*before(bp.parallel(conv1(features, strides=2), body)))

    return bp.chain(
        *(conv3(2), halving_block(4), block(4)),
        *(bp.group_norm(2), bp.relu(), bp.global_pool(), bp.dense(3)),
    )


def wide_resnet_torch(p, x, labels):
    def activated(norm, x):
        return t.group_norm(norm, x, 2).relu()

    def block(p, x):
        norm1, _, conv1, norm2, _, _, conv2 = p
        hidden = t.conv(conv1, activated(norm1, x), padding=1)
        return x + t.conv(conv2, activated(norm2, hidden), padding=1)

    def halving_block(p, x):
        norm1, _, (shortcut, (conv1, norm2, _, _, conv2)) = p
        x = activated(norm1, x)
        hidden = activated(norm2, t.conv(conv1, x, stride=2, padding=1))
        return t.conv(shortcut, x, stride=2) + t.conv(conv2, hidden, padding=1)

    stem, halving, same, norm, _, _, logits = p
    x = block(same, halving_block(halving, t.conv(stem, x, padding=1)))
    return t.cross_entropy(t.dense(logits, activated(norm, x).mean((1, 2))), labels)


def resnext():
    """ResNeXt: bottlenecks whose 3 x 3 convolution works on groups of channels."""

    def block(features, hidden, groups):
        return bp.chain(
            bp.residual(
                *(conv1(hidden), bp.group_norm(2), bp.relu()),
                *(conv3(hidden, groups=groups), bp.group_norm(2), bp.relu()),
                *(conv1(features), bp.group_norm(2)),
            ),
            bp.relu(),
        )

    return bp.chain(conv3(4), block(4, 6, 3), block(4, 6, 3), bp.global_pool(), bp.dense(3))


def resnext_torch(p, x, labels):
    def block(p, x):
        reduce, norm1, _, grouped, norm2, _, expand, norm3 = p
        y = t.group_norm(norm1, t.conv(reduce, x), 2).relu()
        y = t.group_norm(norm2, t.conv(grouped, y, padding=1, groups=3), 2).relu()
        return (x + t.group_norm(norm3, t.conv(expand, y), 2)).relu()

    stem, (block1, _), (block2, _), _, logits = p
    x = block(block2, block(block1, t.conv(stem, x, padding=1)))
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


def densenet():
    """DenseNet: every layer sees the outputs of all layers before it in its block."""

    def layer(growth):
        new = bp.chain(
            *(bp.group_norm(1), bp.relu(), conv1(4)),
            *(bp.group_norm(1), bp.relu(), conv3(growth)),
        )
        return bp.parallel(bp.chain(), new, combine="concatenate")

    transition = bp.chain(bp.group_norm(1), bp.relu(), conv1(3), bp.avg_pool((2, 2)))
    return bp.chain(
        *(conv3(2), layer(2), layer(2), transition, layer(2)),
        *(bp.group_norm(1), bp.relu(), bp.global_pool(), bp.dense(3)),
    )


def densenet_torch(p, x, labels):
    def activated(norm, x):
        return t.group_norm(norm, x, 1).relu()

    def layer(p, x):
        _, (norm1, _, bottleneck, norm2, _, grow) = p
        hidden = t.conv(bottleneck, activated(norm1, x))
        return t.concatenate([x, t.conv(grow, activated(norm2, hidden), padding=1)])

    stem, layer1, layer2, (norm, _, halve, _), layer3, last_norm, _, _, logits = p
    x = layer(layer2, layer(layer1, t.conv(stem, x, padding=1)))
    x = layer(layer3, t.avg_pool(t.conv(halve, activated(norm, x)), 2))
    return t.cross_entropy(t.dense(logits, activated(last_norm, x).mean((1, 2))), labels)


def convnext():
    """ConvNeXt: each channel is convolved alone, then each position has a wide MLP."""

    def block(features):
        return bp.residual(
            *(bp.conv(features, (5, 5), groups=features), bp.layer_norm(eps=1e-6)),
            *(bp.dense(4 * features), bp.gelu(approximate=False), bp.dense(features)),
            bp.layer_scale(),
        )

    patches = bp.chain(bp.conv(3, (2, 2), strides=2), bp.layer_norm(eps=1e-6))
    halving = bp.chain(bp.layer_norm(eps=1e-6), bp.conv(5, (2, 2), strides=2))
    return bp.chain(
        *(patches, block(3), halving, block(5)),
        *(bp.global_pool(), bp.layer_norm(eps=1e-6), bp.dense(3)),
    )


def convnext_torch(p, x, labels):
    def layer_norm(p, x):
        return t.layer_norm(p, x, eps=1e-6)

    def block(p, x):
        along_positions, norm, widen, _, narrow, scale = p
        y = layer_norm(norm, t.conv(along_positions, x, padding=2, groups=x.shape[-1]))
        return x + scale["gain"] * t.dense(narrow, t.gelu(t.dense(widen, y)))

    (patches, norm1), block1, (norm2, halve), block2, _, norm3, logits = p
    x = block(block1, layer_norm(norm1, t.conv(patches, x, stride=2)))
    x = block(block2, t.conv(halve, layer_norm(norm2, x), stride=2))
    return t.cross_entropy(t.dense(logits, layer_norm(norm3, x.mean((1, 2)))), labels)


ARCHITECTURES = {
    "ResNet": Architecture(
        "Deep Residual Learning for Image Recognition, He, Zhang, Ren, Sun, 2016",
        resnet,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        resnet_torch,
    ),
    "Wide ResNet": Architecture(
        "Wide Residual Networks, Zagoruyko, Komodakis, 2016; with the order of Identity Mappings "
        "in Deep Residual Networks, He, Zhang, Ren, Sun, 2016",
        wide_resnet,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        wide_resnet_torch,
    ),
    "ResNeXt": Architecture(
        "Aggregated Residual Transformations for Deep Neural Networks, Xie, Girshick, Dollar, Tu, "
        "He, 2017",
        resnext,
        (5, 5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        resnext_torch,
    ),
    "DenseNet": Architecture(
        "Densely Connected Convolutional Networks, Huang, Liu, van der Maaten, Weinberger, 2017",
        densenet,
        (6, 6, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        densenet_torch,
    ),
    "ConvNeXt": Architecture(
        "A ConvNet for the 2020s, Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, 2022",
        convnext,
        (8, 8, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        convnext_torch,
    ),
}
