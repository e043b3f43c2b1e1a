"""Networks of a few words, without recurrence or attention."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def probabilistic_language_model():
    """Bengio's language model: the words before, each by its vector, predict the next one.

    The logits are a sum of two paths, one of which has a hidden layer.
    """
    direct = bp.dense(7)
    hidden = bp.chain(bp.dense(4), bp.tanh(), bp.dense(7, use_bias=False))
    return bp.chain(bp.embedding(7, 3), bp.flatten(), bp.parallel(direct, hidden))


def probabilistic_language_model_torch(p, words, following):
    table, _, (direct, (widen, _, logits)) = p
    x = t.embedded(table, words).flatten(1)
    hidden = t.dense(widen, x).tanh()
    return t.cross_entropy(t.dense(direct, x) + t.dense(logits, hidden), following)


def continuous_bag_of_words():
    """CBOW: the mean of the words around a word predicts it. The softmax is over all words."""
    return bp.chain(bp.embedding(7, 3), bp.global_pool(), bp.dense(7, use_bias=False))


def continuous_bag_of_words_torch(p, context, word):
    table, _, logits = p
    return t.cross_entropy(t.dense(logits, t.embedded(table, context).mean(1)), word)


def skip_gram():
    """Skip-gram with negative sampling: does the second word of a pair stand near the first?

    Inputs are (words, candidates), a window of pairs. Targets are 1 for a word of the text, and 0
    for one that was drawn.
    """
    return bp.chain(bp.on(0, bp.embedding(7, 3)), bp.on(1, bp.embedding(7, 3)), bp.inner_product())


def skip_gram_torch(p, inputs, is_near):
    import torch

    words, candidates, _ = p
    x, y = t.embedded(words, inputs[0]), t.embedded(candidates, inputs[1])
    return t.binary_cross_entropy(torch.einsum("nki,nki->nk", x, y)[..., None], is_near)


def text_cnn():
    """TextCNN: convolutions of several widths, the largest value of each channel, and dropout."""

    def features(width):
        return bp.chain(bp.conv(3, (width,), padding="VALID"), bp.relu(), bp.global_pool(how="max"))

    return bp.chain(
        *(bp.embedding(9, 3), bp.parallel(features(2), features(3), combine="concatenate")),
        *(bp.dropout(0.5), bp.dense(2)),
    )


def text_cnn_torch(p, words, labels):
    table, branches, _, logits = p
    x = t.embedded(table, words)
    features = [t.conv(conv, x).relu().amax(1) for conv, _, _ in branches]
    return t.cross_entropy(t.dense(logits, t.concatenate(features)), labels)


def fast_text():
    """fastText: the mean of the vectors of words and of hashed pairs of words.

    Inputs are (words, pairs). Word 0 fills short texts and is not trained.
    """
    return bp.chain(
        *(bp.on(0, bp.embedding(9, 3, padding_row=0)), bp.on(1, bp.embedding(5, 3))),
        *(bp.concatenate(axis=0), bp.global_pool(), bp.dense(4, use_bias=False)),
    )


def fast_text_torch(p, inputs, labels):
    import torch

    words, pairs, _, _, logits = p
    word_vectors = torch.nn.functional.embedding(inputs[0], words["weight"], padding_idx=0)
    x = torch.cat([word_vectors, t.embedded(pairs, inputs[1])], 1).mean(1)
    return t.cross_entropy(t.dense(logits, x), labels)


ARCHITECTURES = {
    "neural probabilistic language model": Architecture(
        "A Neural Probabilistic Language Model, Bengio, Ducharme, Vincent, Jauvin, 2003",
        probabilistic_language_model,
        Tokens(7, (3,)),
        bp.softmax_cross_entropy,
        Tokens(7),
        probabilistic_language_model_torch,
    ),
    "CBOW": Architecture(
        "Efficient Estimation of Word Representations in Vector Space, Mikolov, Chen, Corrado, "
        "Dean, 2013",
        continuous_bag_of_words,
        Tokens(7, (4,)),
        bp.softmax_cross_entropy,
        Tokens(7),
        continuous_bag_of_words_torch,
    ),
    "skip-gram": Architecture(
        "Distributed Representations of Words and Phrases and their Compositionality, Mikolov, "
        "Sutskever, Chen, Corrado, Dean, 2013",
        skip_gram,
        (Tokens(7, (4,)), Tokens(7, (4,))),
        bp.sigmoid_cross_entropy,
        Tokens(2, (4, 1)),
        skip_gram_torch,
    ),
    "TextCNN": Architecture(
        "Convolutional Neural Networks for Sentence Classification, Kim, 2014",
        text_cnn,
        Tokens(9, (5,)),
        bp.softmax_cross_entropy,
        Tokens(2),
        text_cnn_torch,
    ),
    "fastText": Architecture(
        "Bag of Tricks for Efficient Text Classification, Joulin, Grave, Bojanowski, Mikolov, 2017",
        fast_text,
        (Tokens(9, (4,)), Tokens(5, (3,))),
        bp.softmax_cross_entropy,
        Tokens(4),
        fast_text_torch,
    ),
}
