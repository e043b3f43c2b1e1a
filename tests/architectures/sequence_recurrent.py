"""Recurrent networks: [N, T, I] or tokens [N, T]."""

import torch_functions as t
from architecture import Among, Architecture, Tokens

import jaxbp as bp


def elman():
    """Elman's network: logistic units that see what they computed one step before."""
    return bp.chain(bp.recurrent(bp.simple_rnn(4, activation="sigmoid")), bp.dense(3))


def elman_torch(p, x, following):
    import torch

    cell, out = p
    h, outputs = x.new_zeros(len(x), 4), []
    for step in x.unbind(1):
        h = (step @ cell["weight"] + h @ cell["recurrent"] + cell["bias"]).sigmoid()
        outputs.append(t.dense(out, h))
    return t.squared_error(torch.stack(outputs, 1), following)


def lstm_classifier():
    """An LSTM that reads a text, whose last output tells the class. Inputs are (tokens, mask)."""

    def masked_lstm(mask):
        lstm = bp.recurrent(bp.lstm(4), mask=mask)
        return bp.chain(bp.embedding(9, 3), lstm, bp.take(-1), bp.dense(3))

    return bp.masked(masked_lstm)


def lstm_classifier_torch(p, inputs, labels):
    """Each text alone, without its padding."""
    import torch

    table, cell, _, logits = p
    tokens, mask = inputs
    texts = [own[is_word] for own, is_word in zip(tokens, mask, strict=True)]
    last = [t.lstm(cell, t.embedded(table, text)[None])[0][0, -1] for text in texts]
    return t.cross_entropy(t.dense(logits, torch.stack(last)), labels)


def gated_recurrent_unit():
    """The GRU as it was first published: the reset comes before the product."""
    gru = bp.recurrent(bp.gru(4, reset="before"))
    return bp.chain(bp.embedding(9, 3), gru, bp.take(-1), bp.dense(3))


def gated_recurrent_unit_torch(p, tokens, labels):
    """With the gates of the paper: its z is the part of the old state."""
    table, cell, _, logits = p
    h = t.embedded(table, tokens).new_zeros(len(tokens), 4)
    of_reset, of_update, of_candidate = cell["weight"].chunk(3, -1)
    reset_of_h, update_of_h = cell["recurrent"].chunk(2, -1)
    bias_r, bias_z, bias_n = cell["bias"].chunk(3)
    for x in t.embedded(table, tokens).unbind(1):
        r = (x @ of_reset + h @ reset_of_h + bias_r).sigmoid()
        z = (x @ of_update + h @ update_of_h + bias_z).sigmoid()
        candidate = (x @ of_candidate + (r * h) @ cell["candidate"] + bias_n).tanh()
        h = z * h + (1 - z) * candidate
    return t.cross_entropy(t.dense(logits, h), labels)


def bidirectional_tagger():
    """A tag for each word, from what stands before it and after it."""
    return bp.chain(bp.embedding(9, 3), bp.bidirectional(bp.lstm(3)), bp.dense(4))


def bidirectional_tagger_torch(p, tokens, tags):
    table, (onwards, back), logits = p
    x = t.embedded(table, tokens)
    y, _ = t.lstm(onwards, x)
    z, _ = t.lstm(back, x.flip(1))
    return t.cross_entropy(t.dense(logits, t.concatenate([y, z.flip(1)])), tags)


def projected_lstm():
    """LSTMP: two LSTMs of many units, whose outputs are projected to fewer."""
    return bp.chain(
        bp.recurrent(bp.lstm(5, projection=3)), bp.recurrent(bp.lstm(4, projection=2)), bp.dense(4)
    )


def projected_lstm_torch(p, x, labels):
    lower, upper, logits = p
    y, _ = t.lstm(upper, t.lstm(lower, x)[0])
    return t.cross_entropy(t.dense(logits, y), labels)


def language_model():
    """A recurrent language model: its state goes on from one piece of the text to the next.

    Inputs are (words, (state,)).
    """
    recurrent = bp.stateful(bp.simple_rnn(4, activation="sigmoid"))
    return bp.chain(bp.on(0, bp.embedding(7, 3)), recurrent, bp.select(0), bp.dense(7))


def language_model_torch(p, inputs, following):
    import torch

    table, cell, _, logits = p
    (words, (h,)), outputs = inputs, []
    for x in t.embedded(table, words).unbind(1):
        h = (x @ cell["weight"] + h @ cell["recurrent"] + cell["bias"]).sigmoid()
        outputs.append(h)
    return t.cross_entropy(t.dense(logits, torch.stack(outputs, 1)), following)


ARCHITECTURES = {
    "Elman network": Architecture(
        "Finding Structure in Time, Elman, 1990",
        elman,
        (5, 2),
        bp.squared_error,
        (5, 3),
        elman_torch,
    ),
    "LSTM classifier": Architecture(
        "Long Short-Term Memory, Hochreiter, Schmidhuber, 1997; Learning to Forget: Continual "
        "Prediction with LSTM, Gers, Schmidhuber, Cummins, 2000",
        lstm_classifier,
        (Tokens(9, (6,)), Among((False, True, True), (6,))),
        bp.softmax_cross_entropy,
        Tokens(3),
        lstm_classifier_torch,
    ),
    "GRU": Architecture(
        "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine "
        "Translation, Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio, 2014",
        gated_recurrent_unit,
        Tokens(9, (5,)),
        bp.softmax_cross_entropy,
        Tokens(3),
        gated_recurrent_unit_torch,
    ),
    "bidirectional tagger": Architecture(
        "Framewise Phoneme Classification with Bidirectional LSTM and Other Neural Network "
        "Architectures, Graves, Schmidhuber, 2005",
        bidirectional_tagger,
        Tokens(9, (5,)),
        bp.softmax_cross_entropy,
        Tokens(4, (5,)),
        bidirectional_tagger_torch,
    ),
    "projected LSTM": Architecture(
        "Long Short-Term Memory Based Recurrent Neural Network Architectures for Large Vocabulary "
        "Speech Recognition, Sak, Senior, Beaufays, 2014",
        projected_lstm,
        (5, 3),
        bp.softmax_cross_entropy,
        Tokens(4, (5,)),
        projected_lstm_torch,
    ),
    "recurrent language model": Architecture(
        "Recurrent Neural Network Based Language Model, Mikolov, Karafiat, Burget, Cernocky, "
        "Khudanpur, 2010",
        language_model,
        (Tokens(7, (5,)), ((4,),)),
        bp.softmax_cross_entropy,
        Tokens(7, (5,)),
        language_model_torch,
    ),
}
