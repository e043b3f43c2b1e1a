"""Convolutional networks without shortcuts, from LeNet to GoogLeNet."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def lenet():
    """LeNet-5: two convolutions with pooling, then three dense layers."""
    return bp.chain(
        bp.conv(2, (3, 3)), bp.tanh(), bp.avg_pool((2, 2)),
        bp.conv(3, (3, 3), padding="VALID"), bp.tanh(), bp.avg_pool((2, 2)),
        bp.flatten(), bp.dense(5), bp.tanh(), bp.dense(4), bp.tanh(), bp.dense(3),
    )  # fmt: skip


def lenet_torch(p, x, labels):
    x = t.avg_pool(t.conv(p[0], x, padding=1).tanh(), 2)
    x = t.avg_pool(t.conv(p[3], x).tanh(), 2).flatten(1)
    x = t.dense(p[9], t.dense(p[7], x).tanh()).tanh()
    return t.cross_entropy(t.dense(p[11], x), labels)


def alexnet():
    """AlexNet: grouped convolutions, normalised over neighbouring channels, and three dense layers.

    The two groups of channels were on two GPUs.
    """

    def normalised():
        return bp.local_response_norm(5, alpha=0.5, beta=0.75, k=2)

    def pool():
        return bp.max_pool((3, 3), strides=2)

    return bp.chain(
        *(bp.conv(4, (3, 3), strides=2, padding="VALID"), bp.relu(), normalised(), pool()),
        *(bp.conv(6, (5, 5), groups=2), bp.relu(), normalised(), pool()),
        *(bp.conv(5, (3, 3)), bp.relu()),
        *(bp.conv(4, (3, 3)), bp.relu()),
        *(bp.conv(4, (3, 3), groups=2), bp.relu(), pool(), bp.flatten()),
        *(bp.dropout(0.5), bp.dense(5), bp.relu()),
        *(bp.dropout(0.5), bp.dense(4), bp.relu(), bp.dense(3)),
    )


def alexnet_torch(p, x, labels):
    import torch

    def normalised(x):
        squares = torch.nn.functional.pad(x * x, (2, 2))
        around = sum(squares[..., c : c + x.shape[-1]] for c in range(5))
        return x / (2 + 0.5 / 5 * around) ** 0.75

    conv1, conv2, conv3, conv4, conv5, dense1, dense2, logits = filter(len, p)
    x = t.max_pool(normalised(t.conv(conv1, x, stride=2).relu()), 3, 2)
    x = t.max_pool(normalised(t.conv(conv2, x, padding=2, groups=2).relu()), 3, 2)
    x = t.conv(conv4, t.conv(conv3, x, padding=1).relu(), padding=1).relu()
    x = t.max_pool(t.conv(conv5, x, padding=1, groups=2).relu(), 3, 2).flatten(1)
    x = t.dense(dense2, t.dense(dense1, x).relu()).relu()
    return t.cross_entropy(t.dense(logits, x), labels)


def vgg():
    """VGG: stages of 3 x 3 convolutions, each followed by pooling, then dense layers."""

    def stage(convolutions, features):
        layers = [bp.conv(features, (3, 3)), bp.relu()] * convolutions
        return bp.chain(*layers, bp.max_pool((2, 2)))

    classifier = [bp.dense(5), bp.relu(), bp.dropout(0.5), bp.dense(3)]
    return bp.chain(stage(1, 2), stage(2, 3), stage(2, 4), bp.flatten(), *classifier)


def vgg_torch(p, x, labels):
    for stage in p[:3]:
        for convolution in filter(len, stage):
            x = t.conv(convolution, x, padding=1).relu()
        x = t.max_pool(x, 2)
    hidden, _, _, logits = p[4:]
    return t.cross_entropy(t.dense(logits, t.dense(hidden, x.flatten(1)).relu()), labels)


def network_in_network():
    """Network in Network: a small MLP at each position, and the mean of each class's map."""

    def mlp_conv(size, hidden, features):
        return bp.chain(
            *(bp.conv(hidden, (size, size)), bp.relu()),
            *(bp.conv(hidden, (1, 1)), bp.relu()),
            *(bp.conv(features, (1, 1)), bp.relu()),
        )

    return bp.chain(
        mlp_conv(5, 4, 4),
        bp.max_pool((3, 3), strides=2),
        bp.dropout(0.5),
        mlp_conv(3, 5, 3),
        bp.global_pool(),
    )


def network_in_network_torch(p, x, labels):
    def mlp_conv(p, x, padding):
        x = t.conv(p[0], x, padding=padding).relu()
        return t.conv(p[4], t.conv(p[2], x).relu()).relu()

    x = t.max_pool(mlp_conv(p[0], x, 2), 3, 2)
    return t.cross_entropy(mlp_conv(p[3], x, 1).mean((1, 2)), labels)


def googlenet():
    """GoogLeNet: inception modules, four branches of different reach side by side."""

    def unit(features, size):
        return [bp.conv(features, (size, size)), bp.relu()]

    def inception(one, three, five, pool):
        """Features of each branch, with those of its reducing convolution before."""
        return bp.parallel(
            bp.chain(*unit(one, 1)),
            bp.chain(*unit(three[0], 1), *unit(three[1], 3)),
            bp.chain(*unit(five[0], 1), *unit(five[1], 5)),
            bp.chain(bp.max_pool((3, 3), strides=1, padding="SAME"), *unit(pool, 1)),
            combine="concatenate",
        )

    return bp.chain(
        *unit(3, 3),
        bp.max_pool((2, 2)),
        inception(2, (2, 3), (2, 2), 1),
        inception(2, (3, 2), (2, 2), 2),
        bp.global_pool(),
        bp.dropout(0.4),
        bp.dense(3),
    )


def googlenet_torch(p, x, labels):
    def inception(p, x):
        one, (three_in, _, three, _), (five_in, _, five, _), (_, pool, _) = p
        branches = [
            t.conv(one[0], x),
            t.conv(three, t.conv(three_in, x).relu(), padding=1),
            t.conv(five, t.conv(five_in, x).relu(), padding=2),
            t.conv(pool, t.max_pool(x, 3, 1, 1)),
        ]
        return t.concatenate(branches).relu()

    stem, _, _, first, second, _, _, logits = p
    x = t.max_pool(t.conv(stem, x, padding=1).relu(), 2)
    x = inception(second, inception(first, x))
    return t.cross_entropy(t.dense(logits, x.mean((1, 2))), labels)


ARCHITECTURES = {
    "LeNet-5": Architecture(
        "Gradient-Based Learning Applied to Document Recognition, LeCun, Bottou, Bengio, Haffner, "
        "1998",
        lenet,
        (12, 12, 1),
        bp.softmax_cross_entropy,
        Tokens(3),
        lenet_torch,
    ),
    "AlexNet": Architecture(
        "ImageNet Classification with Deep Convolutional Neural Networks, Krizhevsky, Sutskever, "
        "Hinton, 2012",
        alexnet,
        (31, 31, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        alexnet_torch,
    ),
    "VGG": Architecture(
        "Very Deep Convolutional Networks for Large-Scale Image Recognition, Simonyan, Zisserman, "
        "2015",
        vgg,
        (8, 8, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        vgg_torch,
    ),
    "Network in Network": Architecture(
        "Network In Network, Lin, Chen, Yan, 2014",
        network_in_network,
        (9, 9, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        network_in_network_torch,
    ),
    "GoogLeNet": Architecture(
        "Going Deeper with Convolutions, Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, "
        "Vanhoucke, Rabinovich, 2015",
        googlenet,
        (8, 8, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        googlenet_torch,
    ),
}
