"""Networks that write a sequence while they look at another, or at an image."""

import math

import torch_functions as t
from architecture import Among, Architecture, Tokens

import jaxbp as bp


def transformer():
    """The encoder-decoder transformer, with norms after each sum, as first published.

    Inputs are ((target, source), mask): the mask is false at padded positions of the source. Both
    sides have the same table of tokens.
    """

    def masked_transformer(mask):
        feed_forward = bp.residual(bp.dense(6), bp.relu(), bp.dense(4)), bp.layer_norm()
        attention = bp.residual(bp.attention(4, 2, mask=mask))
        encoder = bp.chain(attention, bp.layer_norm(), *feed_forward)
        decoder = bp.chain(
            bp.on(0, bp.residual(bp.attention(4, 2, causal=True)), bp.layer_norm()),
            bp.residual(bp.cross_attention(4, 2, mask=mask), at=0),
            bp.on(0, bp.layer_norm(), *feed_forward),
        )
        return bp.chain(
            bp.shared(bp.embedding(7, 4), bp.scale(2.0), bp.sinusoidal_positions()),
            *(bp.on(1, encoder), bp.stack(decoder, 2), bp.select(0), bp.dense(7)),
        )

    return bp.masked(masked_transformer)


def transformer_torch(p, inputs, following):
    import torch

    def embedded(table, tokens):
        position = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None]
        angles = position / 10000 ** torch.tensor([0.0, 0.5])
        positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        return math.sqrt(4) * t.embedded(table, tokens) + positions

    def feed_forward(p, x):
        (widen, _, narrow), norm = p
        return t.layer_norm(norm, x + t.dense(narrow, t.dense(widen, x).relu()))

    (table, _, _), encoder, decoder, _, logits = p
    (target, source), mask = inputs
    sees = mask[:, None, None, :]
    memory = embedded(table, source)
    attention, norm, *rest = encoder
    memory = t.layer_norm(norm, memory + t.self_attention(attention, memory, 2, sees))
    memory = feed_forward(rest, memory)
    x = embedded(table, target)
    for (attention, norm1), cross, (norm2, *rest) in t.layers(decoder):
        x = t.layer_norm(norm1, x + t.self_attention(attention, x, 2, t.causal(x.shape[1])))
        x = t.layer_norm(norm2, x + t.cross_attention(cross, x, memory, 2, sees))
        x = feed_forward(rest, x)
    return t.cross_entropy(t.dense(logits, x), following)


def translating_lstm():
    """Two LSTMs: the second one starts with the last state of the first, and attends to it.

    Inputs are (target, (source, first state)). Scores are of the form h W m, and the context joins
    the outputs of the decoder.
    """
    encoder = bp.chain(bp.on(0, bp.embedding(7, 3)), bp.stateful(bp.lstm(4)))
    memory, last_state = (bp.chain(bp.select(1), bp.select(k)) for k in (0, 1))
    decoder = bp.chain(bp.fork(bp.select(0), last_state), bp.stateful(bp.lstm(4)), bp.select(0))

    queries = bp.chain(bp.select(0), bp.dense(4, use_bias=False))
    context = bp.chain(
        bp.fork(queries, bp.select(1), bp.select(1)), bp.dot_product_attention(1, scale=1.0)
    )
    return bp.chain(
        *(bp.on(0, bp.embedding(7, 3)), bp.on(1, encoder), bp.fork(decoder, memory)),
        *(bp.fork(context, bp.select(0)), bp.concatenate()),
        *(bp.dense(4, use_bias=False), bp.tanh(), bp.dense(7)),
    )


def translating_lstm_torch(p, inputs, following):
    import torch

    targets, (sources, encoder), ((_, decoder, _), _), (context, _), _, combined, _, logits = p
    target, (source, state) = inputs
    memory, state = t.lstm(encoder, t.embedded(sources, source), state)
    h, _ = t.lstm(decoder, t.embedded(targets, target), state)
    scores = t.dense(context[0][0][1], h) @ memory.mT
    contexts = torch.softmax(scores, -1) @ memory
    return t.cross_entropy(
        t.dense(logits, t.dense(combined, t.concatenate([contexts, h])).tanh()), following
    )


def image_captions():
    """Show and Tell: an LSTM sees the image as if it were the first word, then the words.

    Inputs are (image, words). The first output is thrown away; each of the others predicts a word.
    """
    as_word = bp.conv(3, (3, 3)), bp.relu(), bp.global_pool(), bp.dense(3), bp.reshape(1, 3)
    return bp.chain(
        *(bp.on(0, *as_word), bp.on(1, bp.embedding(7, 3)), bp.concatenate(axis=0)),
        *(bp.recurrent(bp.lstm(4)), bp.take(slice(1, None)), bp.dense(7)),
    )


def image_captions_torch(p, inputs, following):
    (conv, _, _, dense, _), table, _, cell, _, logits = p
    image, words = inputs
    as_word = t.dense(dense, t.conv(conv, image, padding=1).relu().mean((1, 2)))[:, None]
    _, state = t.lstm(cell, as_word)
    h, _ = t.lstm(cell, t.embedded(table, words), state)
    return t.cross_entropy(t.dense(logits, h), following)


ARCHITECTURES = {
    "encoder-decoder": Architecture(
        "Attention Is All You Need, Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, "
        "Polosukhin, 2017",
        transformer,
        ((Tokens(7, (3,)), Tokens(7, (6,))), Among((False, True, True), (6,))),
        bp.softmax_cross_entropy,
        Tokens(7, (3,)),
        transformer_torch,
    ),
    "translating LSTM": Architecture(
        "Effective Approaches to Attention-based Neural Machine Translation, Luong, Pham, Manning, "
        "2015; Sequence to Sequence Learning with Neural Networks, Sutskever, Vinyals, Le, 2014",
        translating_lstm,
        (Tokens(7, (3,)), (Tokens(7, (4,)), ((4,), (4,)))),
        bp.softmax_cross_entropy,
        Tokens(7, (3,)),
        translating_lstm_torch,
    ),
    "Show and Tell": Architecture(
        "Show and Tell: A Neural Image Caption Generator, Vinyals, Toshev, Bengio, Erhan, 2015",
        image_captions,
        ((4, 4, 1), Tokens(7, (4,))),
        bp.softmax_cross_entropy,
        Tokens(7, (4,)),
        image_captions_torch,
    ),
}
