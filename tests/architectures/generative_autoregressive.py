"""Networks that predict each sample of a sound, or each pixel of an image, from those before it."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def wavenet():
    """WaveNet: causal convolutions with growing gaps, whose gated outputs are all added up."""

    def causal(features, dilation):
        """Sees its own sample and the one `dilation` before."""
        return bp.conv(features, (2,), dilation=dilation, padding=((dilation, 0),))

    def unit(dilation):
        candidate = bp.chain(causal(3, dilation), bp.tanh())
        return bp.gated(candidate, bp.chain(causal(3, dilation), bp.sigmoid()))

    def layers(dilation, *larger):
        """The sum of the skips of this layer and of all later ones."""
        skip = bp.conv(2, (1,))
        if not larger:
            return bp.chain(unit(dilation), skip)
        rest = bp.chain(bp.residual(bp.select(1), bp.conv(3, (1,)), at=0), bp.select(0))
        return bp.chain(
            bp.fork(bp.chain(), unit(dilation)),
            bp.fork(bp.chain(bp.select(1), skip), bp.chain(rest, layers(*larger))),
            bp.add(),
        )

    shifted = bp.pad(((1, -1),))  # a sample is predicted from those before it, without itself
    return bp.chain(
        *(shifted, causal(3, 1), layers(1, 2, 4)),
        *(bp.relu(), bp.conv(4, (1,)), bp.relu(), bp.conv(3, (1,))),
    )


def wavenet_torch(p, x, labels):
    from torch.nn.functional import pad

    def causal(p, x, dilation):
        return t.conv(p, pad(x, (0, 0, dilation, 0)), dilation=dilation)

    def unit(p, x, dilation):
        (candidate, _), (gate, _) = p
        return causal(candidate, x, dilation).tanh() * causal(gate, x, dilation).sigmoid()

    _, stem, layers, _, hidden, _, logits = p
    x = causal(stem, pad(x[:, :-1], (0, 0, 1, 0)), 1)
    skips = 0
    for dilation in (1, 2):
        (_, own), ((_, skip), (((_, out), _), later)), _ = layers
        gated = unit(own, x, dilation)
        skips = skips + t.conv(skip, gated)
        x, layers = x + t.conv(out, gated), later
    own, skip = layers
    skips = skips + t.conv(skip, unit(own, x, 4))
    return t.cross_entropy(t.conv(logits, t.conv(hidden, skips.relu()).relu()), labels)


def pixelcnn():
    """The gated PixelCNN: one stack sees the rows above a pixel, the other those left of it too.

    Both are ordinary convolutions whose padding lies on one side. The first of each stack is
    shifted, so that no pixel sees itself.
    """

    def of_rows(features):
        """Sees its own row and the one above."""
        return bp.conv(features, (2, 3), padding=((1, 0), (1, 1)))

    def of_columns(features):
        """Sees its own pixel and the one on the left."""
        return bp.conv(features, (1, 2), padding=((0, 0), (1, 0)))

    def gated(make):
        return bp.gated(bp.chain(make(), bp.tanh()), bp.chain(make(), bp.sigmoid()))

    def rows(features):
        """Of the pair (rows, columns): the rows do not see the columns."""
        return bp.chain(bp.select(0), gated(lambda: of_rows(features)))

    def columns(features):
        """Of the same pair: the columns see both."""

        def scores():
            from_rows = bp.chain(bp.select(0), bp.conv(features, (1, 1)))
            own = bp.chain(bp.select(1), of_columns(features))
            return bp.chain(bp.fork(from_rows, own), bp.add())

        added = bp.residual(gated(scores), bp.conv(features, (1, 1)), at=1)
        return bp.chain(added, bp.select(1))

    above = bp.chain(bp.pad(((1, -1), (0, 0))), of_rows(3))
    left = bp.chain(bp.pad(((0, 0), (1, -1))), of_columns(3))
    return bp.chain(
        *(bp.fork(above, left), bp.fork(rows(3), columns(3)), columns(3)),
        *(bp.relu(), bp.conv(4, (1, 1)), bp.relu(), bp.conv(3, (1, 1))),
    )


def pixelcnn_torch(p, x, labels):
    """By kernels of odd sizes, whose last rows or columns a mask sets to zero, as in the paper."""
    from torch.nn.functional import pad

    def masked(p, x, rows=0, columns=0):
        weight = pad(p["weight"], (0, 0, 0, 0, 0, columns, 0, rows))
        return t.conv({**p, "weight": weight}, x, padding="same")

    def gated(candidate, gate):
        return candidate.tanh() * gate.sigmoid()

    def gated_rows(p, rows):
        _, ((candidate, _), (gate, _)) = p
        return gated(*(masked(weight, rows, rows=1) for weight in (candidate, gate)))

    def gated_columns(p, rows, columns):
        def scores(p):
            ((_, from_rows), (_, own)), _ = p[0]
            return t.conv(from_rows, rows) + masked(own, columns, columns=1)

        (both, out), _ = p
        return columns + t.conv(out, gated(*map(scores, both)))

    ((_, above), (_, left)), (rows1, columns1), columns2, _, hidden, _, logits = p
    rows, columns = masked(above, x, rows=3), masked(left, x, columns=3)
    rows, columns = gated_rows(rows1, rows), gated_columns(columns1, rows, columns)
    columns = gated_columns(columns2, rows, columns)
    return t.cross_entropy(t.conv(logits, t.conv(hidden, columns.relu()).relu()), labels)


ARCHITECTURES = {
    "WaveNet": Architecture(
        "WaveNet: A Generative Model for Raw Audio, van den Oord, Dieleman, Zen, Simonyan, "
        "Vinyals, Graves, Kalchbrenner, Senior, Kavukcuoglu, 2016",
        wavenet,
        (8, 1),
        bp.softmax_cross_entropy,
        Tokens(3, (8,)),
        wavenet_torch,
    ),
    "PixelCNN": Architecture(
        "Conditional Image Generation with PixelCNN Decoders, van den Oord, Kalchbrenner, "
        "Vinyals, Espeholt, Graves, Kavukcuoglu, 2016",
        pixelcnn,
        (4, 4, 1),
        bp.softmax_cross_entropy,
        Tokens(3, (4, 4)),
        pixelcnn_torch,
    ),
}
