"""Networks that answer questions about images and about texts."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def visual_question_answering():
    """The product of two vectors, of the image and of the question, tells the answer.

    Inputs are (image, question).
    """
    of_image = bp.conv(3, (3, 3), strides=2), bp.relu(), bp.flatten(), bp.dense(4), bp.tanh()
    of_question = (
        *(bp.embedding(7, 3), bp.recurrent(bp.lstm(4)), bp.take(-1)),
        *(bp.dense(4), bp.tanh()),
    )
    return bp.chain(
        *(bp.on(0, *of_image), bp.on(1, *of_question), bp.multiply()),
        *(bp.dense(5), bp.tanh(), bp.dense(3)),
    )


def visual_question_answering_torch(p, inputs, answers):
    (conv, _, _, seen, _), (table, cell, _, asked, _), _, hidden, _, logits = p
    image, question = inputs
    x = t.dense(seen, t.conv(conv, image, stride=2, padding=1).relu().flatten(1)).tanh()
    outputs, _ = t.lstm(cell, t.embedded(table, question))
    x = x * t.dense(asked, outputs[:, -1]).tanh()
    return t.cross_entropy(t.dense(logits, t.dense(hidden, x).tanh()), answers)


def film():
    """FiLM: the question scales and shifts the channels of the image's network.

    Inputs are (image, question). Group norm stands in the place of batch norm.
    """
    of_question = bp.embedding(7, 3), bp.recurrent(bp.gru(4)), bp.take(-1)

    def modulated(features, *layers):
        """Of the pair (image, question): the layers' channels, scaled and shifted."""
        image = bp.chain(bp.select(0), *layers)
        scale, shift = (bp.chain(bp.select(1), bp.dense(features)) for _ in range(2))
        return bp.chain(bp.fork(bp.gated(image, scale), shift), bp.add())

    normalised = bp.conv(3, (3, 3)), bp.group_norm(1, use_gain=False, use_bias=False)
    block = bp.chain(
        bp.on(0, bp.conv(3, (1, 1)), bp.relu()),
        bp.residual(modulated(3, *normalised), bp.relu(), at=0),
    )
    classifier = bp.conv(4, (1, 1)), bp.relu(), bp.global_pool("max"), bp.dense(5), bp.relu()
    return bp.chain(
        *(bp.on(0, bp.conv(3, (3, 3)), bp.relu()), bp.on(1, *of_question)),
        *(block, block, bp.select(0), *classifier, bp.dense(3)),
    )


def film_torch(p, inputs, answers):
    import torch

    image, words = inputs

    def question_vector(table, cell, words):
        """By PyTorch's own GRU."""
        weights = [cell["weight"].mT, cell["recurrent"].mT, cell["bias"], cell["recurrent_bias"]]
        x, zeros = t.embedded(table, words), image.new_zeros(1, len(words), 4)
        _, last = torch.gru(x, zeros, weights, True, 1, 0.0, False, False, True)
        return last[0]

    def block(p, x, question):
        (pointwise, _), (((((_, conv, _), (_, scale)), (_, shift)), _), _) = p
        x = t.conv(pointwise, x).relu()
        y = t.conv(conv, x, padding=1)
        mean = y.mean((1, 2, 3), keepdim=True)
        y = (y - mean) / (y.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        scale, shift = (t.dense(own, question)[:, None, None, :] for own in (scale, shift))
        return x + (scale * y + shift).relu()

    (stem, _), (table, cell, _), block1, block2, _, conv, _, _, hidden, _, logits = p
    question = question_vector(table, cell, words)
    x = block(block1, t.conv(stem, image, padding=1).relu(), question)
    x = t.conv(conv, block(block2, x, question)).relu().amax((1, 2))
    return t.cross_entropy(t.dense(logits, t.dense(hidden, x).relu()), answers)


def memory_network():
    """An end-to-end memory network: the question looks up sentences, twice, by their vectors.

    Inputs are (question [4], sentences [5, 4]), all of words. A vector of a sentence is the sum of
    those of its words. Each hop has tables of its own.
    """

    def sentences():
        """A table of their own for the keys, and one for the values."""
        words = bp.embedding(9, 3), bp.avg_pool((1, 4)), bp.reshape(5, 3), bp.scale(4.0)
        return bp.chain(bp.select(1), *words)

    def hop():
        looked_up = bp.chain(
            bp.fork(bp.select(0), sentences(), sentences()),
            bp.dot_product_attention(1, scale=1.0),
        )
        return bp.residual(looked_up, at=0)

    question = bp.embedding(9, 3), bp.global_pool(), bp.scale(4.0), bp.reshape(1, 3)
    return bp.chain(
        *(bp.on(0, *question), hop(), hop(), bp.select(0)),
        *(bp.take(0), bp.dense(9, use_bias=False)),
    )


def memory_network_torch(p, inputs, answers):
    import torch

    (table, *_), *hops, _, _, logits = p
    question, sentences = inputs
    u = t.embedded(table, question).sum(1)
    for (_, (_, keys, *_), (_, values, *_)), _ in hops:
        m, c = (t.embedded(own, sentences).sum(2) for own in (keys, values))
        weights = torch.softmax(torch.einsum("nd,nsd->ns", u, m), -1)
        u = u + torch.einsum("ns,nsd->nd", weights, c)
    return t.cross_entropy(t.dense(logits, u), answers)


ARCHITECTURES = {
    "VQA": Architecture(
        "VQA: Visual Question Answering, Antol, Agrawal, Lu, Mitchell, Batra, Zitnick, Parikh, "
        "2015",
        visual_question_answering,
        ((5, 5, 1), Tokens(7, (4,))),
        bp.softmax_cross_entropy,
        Tokens(3),
        visual_question_answering_torch,
    ),
    "FiLM": Architecture(
        "FiLM: Visual Reasoning with a General Conditioning Layer, Perez, Strub, de Vries, "
        "Dumoulin, Courville, 2018",
        film,
        ((4, 4, 1), Tokens(7, (4,))),
        bp.softmax_cross_entropy,
        Tokens(3),
        film_torch,
    ),
    "memory network": Architecture(
        "End-To-End Memory Networks, Sukhbaatar, Szlam, Weston, Fergus, 2015",
        memory_network,
        (Tokens(9, (4,)), Tokens(9, (5, 4))),
        bp.softmax_cross_entropy,
        Tokens(9),
        memory_network_torch,
    ),
}
