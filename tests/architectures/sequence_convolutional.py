"""Networks of signals and speech, with convolutions over time."""

import torch_functions as t
from architecture import Among, Architecture, Tokens

import jaxbp as bp


def temporal_convolutional_network():
    """TCN: residual blocks of causal convolutions, whose gaps double.

    The weight norm and the dropout of the paper are left out.
    """

    def block(features, dilation, shortcut):
        def causal():
            padding = ((2 * dilation, 0),)
            return bp.conv(features, (3,), dilation=dilation, padding=padding), bp.relu()

        body = bp.chain(*causal(), *causal())
        return bp.chain(bp.parallel(body, shortcut), bp.relu())

    return bp.chain(
        *(block(4, 1, bp.conv(4, (1,))), block(4, 2, bp.chain())),
        *(bp.take(-1), bp.dense(3)),
    )


def temporal_convolutional_network_torch(p, x, labels):
    from torch.nn.functional import pad

    def block(p, x, dilation):
        ((conv1, _, conv2, _), shortcut), _ = p
        y = x
        for own in (conv1, conv2):
            y = t.conv(own, pad(y, (0, 0, 2 * dilation, 0)), dilation=dilation).relu()
        return (y + (t.conv(shortcut, x) if shortcut else x)).relu()

    block1, block2, _, logits = p
    x = block(block2, block(block1, x, 1), 2)
    return t.cross_entropy(t.dense(logits, x[:, -1]), labels)


def deep_speech():
    """Deep Speech: clipped layers see a few frames each, and a recurrence in both directions.

    The two directions are added. The last class of the outputs is the blank of CTC.
    """

    def clipped():
        return bp.hard_tanh(0, 20)

    onwards = bp.recurrent(bp.simple_rnn(4, activation="relu"))
    back = bp.recurrent(bp.simple_rnn(4, activation="relu"), reverse=True)
    return bp.chain(
        *(bp.conv(4, (3,)), clipped(), bp.dense(4), clipped(), bp.dense(3), clipped()),
        *(bp.parallel(onwards, back), bp.dense(4), clipped(), bp.dense(4)),
    )


def deep_speech_torch(p, x, targets):
    import torch

    def clipped(x):
        return x.clamp(0, 20)

    def recurrent(p, x):
        h, outputs = x.new_zeros(len(x), 4), []
        for step in x.unbind(1):
            h = (step @ p["weight"] + h @ p["recurrent"] + p["bias"]).relu()
            outputs.append(h)
        return torch.stack(outputs, 1)

    conv, dense1, dense2, (onwards, back), dense3, logits = filter(len, p)
    x = clipped(t.conv(conv, x, padding=1))
    x = clipped(t.dense(dense2, clipped(t.dense(dense1, x))))
    x = recurrent(onwards, x) + recurrent(back, x.flip(1)).flip(1)
    logits = t.dense(logits, clipped(t.dense(dense3, x)))
    labels, lengths = targets
    of_labels = torch.full_like(lengths, labels.shape[1])
    log_p = logits.log_softmax(-1).transpose(0, 1)
    return torch.nn.functional.ctc_loss(
        log_p, labels, lengths, of_labels, blank=3, reduction="none"
    )


def conformer():
    """A Conformer block: half a feed-forward network, attention, a convolution, the other half.

    Group norm of each example stands in the place of batch norm. Positions are rotary, in the
    place of the relative ones of Transformer-XL.
    """

    def half_feed_forward():
        mlp = bp.layer_norm(), bp.dense(6), bp.silu(), bp.dense(4)
        return bp.residual(*mlp, bp.scale(0.5))

    attention = bp.residual(bp.layer_norm(), bp.attention(4, 2, rotary=True))
    convolution = bp.residual(
        *(bp.layer_norm(), bp.dense(8), bp.glu()),
        *(bp.conv(4, (3,), groups=4, use_bias=False), bp.group_norm(4), bp.silu(), bp.dense(4)),
    )
    return bp.chain(
        *(half_feed_forward(), attention, convolution, half_feed_forward(), bp.layer_norm()),
        bp.dense(3),
    )


def conformer_torch(p, x, labels):
    import torch
    from torch.nn.functional import glu, silu

    def half_feed_forward(p, x):
        norm, widen, _, narrow, _ = p
        return x + t.dense(narrow, silu(t.dense(widen, t.layer_norm(norm, x)))) / 2

    def rotated(heads):
        """By angles 0, 1, 2, ...: there is one pair of values in each head."""
        angle = torch.arange(x.shape[1], dtype=x.dtype)
        a, b = heads.unbind(-1)
        return torch.stack(
            [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1
        )

    feed1, (norm1, attention), convolution, feed2, norm2, logits = p
    x = half_feed_forward(feed1, x)
    joint, _, out = attention
    q, k, v = (t.heads(a, 2) for a in t.dense(joint, t.layer_norm(norm1, x)).chunk(3, -1))
    x = x + t.dense(out, t.joined(t.attend(rotated(q), rotated(k), v)))
    norm, pointwise1, _, depthwise, norm_of_channels, _, pointwise2 = convolution
    y = glu(t.dense(pointwise1, t.layer_norm(norm, x)))
    y = silu(t.group_norm(norm_of_channels, t.conv(depthwise, y, padding=1, groups=4), 4))
    x = half_feed_forward(feed2, x + t.dense(pointwise2, y))
    return t.cross_entropy(t.dense(logits, t.layer_norm(norm2, x)), labels)


ARCHITECTURES = {
    "TCN": Architecture(
        "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence "
        "Modeling, Bai, Kolter, Koltun, 2018",
        temporal_convolutional_network,
        (7, 2),
        bp.softmax_cross_entropy,
        Tokens(3),
        temporal_convolutional_network_torch,
    ),
    "Deep Speech": Architecture(
        "Deep Speech: Scaling up end-to-end speech recognition, Hannun, Case, Casper, Catanzaro, "
        "Diamos, Elsen, Prenger, Satheesh, Sengupta, Coates, Ng, 2014; Connectionist Temporal "
        "Classification, Graves, Fernandez, Gomez, Schmidhuber, 2006",
        deep_speech,
        (6, 2),
        bp.make_ctc(blank=3),
        (Tokens(3, (2,)), Among((4, 6))),
        deep_speech_torch,
    ),
    "Conformer": Architecture(
        "Conformer: Convolution-augmented Transformer for Speech Recognition, Gulati, Qin, Chiu, "
        "Parmar, Zhang, Yu, Han, Wang, Zhang, Wu, Pang, 2020",
        conformer,
        (5, 4),
        bp.softmax_cross_entropy,
        Tokens(3, (5,)),
        conformer_torch,
    ),
}
