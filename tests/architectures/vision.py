"""Networks of images: [N, H, W, C]."""

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
}
