"""Networks of rows of numbers."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def perceptron():
    """A multilayer perceptron with logistic units."""
    return bp.chain(bp.dense(5), bp.sigmoid(), bp.dense(4), bp.sigmoid(), bp.dense(3))


def perceptron_torch(p, x, labels):
    hidden1, _, hidden2, _, logits = p
    x = t.dense(hidden2, t.dense(hidden1, x).sigmoid()).sigmoid()
    return t.cross_entropy(t.dense(logits, x), labels)


def self_normalising_network():
    """SNN: with SELU the activations keep mean 0 and variance 1, without a norm."""
    return bp.chain(
        *(bp.dense(5), bp.selu(), bp.dense(4), bp.selu(), bp.dense(4), bp.selu(), bp.dense(3))
    )


def self_normalising_network_torch(p, x, labels):
    from torch.nn.functional import selu

    *hidden, logits = filter(len, p)
    for own in hidden:
        x = selu(t.dense(own, x))
    return t.cross_entropy(t.dense(logits, x), labels)


def highway_network():
    """Highway layers: a gate T chooses between a layer and its inputs, y = x + T (H(x) - x)."""

    def highway():
        change = bp.chain(bp.fork(bp.chain(bp.dense(4), bp.tanh()), bp.chain()), bp.subtract())
        return bp.residual(bp.gated(change, bp.chain(bp.dense(4), bp.sigmoid())))

    return bp.chain(bp.dense(4), bp.tanh(), highway(), highway(), bp.dense(3))


def highway_network_torch(p, x, labels):
    embed, _, *highways, logits = p
    x = t.dense(embed, x).tanh()
    for (((layer, _), _), _), (gate, _) in highways:
        gated = t.dense(gate, x).sigmoid()
        x = gated * t.dense(layer, x).tanh() + (1 - gated) * x
    return t.cross_entropy(t.dense(logits, x), labels)


def deep_and_cross():
    """Deep & Cross (version 2): x0 (W x + b) + x, layer after layer, beside an ordinary network.

    The cross layers pass on the pair (x0, x).
    """
    factor = bp.chain(bp.select(1), bp.dense(4))
    cross = bp.residual(bp.fork(bp.select(0), factor), bp.multiply(), at=1)
    crossed = bp.chain(bp.fork(bp.chain(), bp.chain()), cross, cross, bp.select(1))
    deep = bp.chain(bp.dense(5), bp.relu(), bp.dense(3), bp.relu())
    return bp.chain(bp.parallel(crossed, deep, combine="concatenate"), bp.dense(1))


def deep_and_cross_torch(p, x0, is_clicked):
    ((_, *crosses, _), (deep1, _, deep2, _)), logit = p
    x = x0
    for (_, (_, factor)), _ in crosses:
        x = x0 * t.dense(factor, x) + x
    deep = t.dense(deep2, t.dense(deep1, x0).relu()).relu()
    return t.binary_cross_entropy(t.dense(logit, t.concatenate([x, deep])), is_clicked)


def gated_residual_network():
    """GRN: a gate says how much a network with a context adds. Inputs are (x, context)."""
    joint = bp.parallel(bp.dense(5), bp.dense(5, use_bias=False))
    grn = bp.residual(joint, bp.elu(), bp.dense(4), bp.dense(8), bp.glu(), at=0)
    return bp.chain(grn, bp.select(0), bp.layer_norm(), bp.dense(1))


def gated_residual_network_torch(p, inputs, targets):
    import torch

    ((of_x, of_context), _, hidden, gated, _), _, norm, out = p
    x, context = inputs
    y = torch.nn.functional.elu(t.dense(of_x, x) + t.dense(of_context, context))
    values, gate = t.dense(gated, t.dense(hidden, y)).chunk(2, -1)
    return t.squared_error(t.dense(out, t.layer_norm(norm, x + gate.sigmoid() * values)), targets)


ARCHITECTURES = {
    "multilayer perceptron": Architecture(
        "Learning Representations by Back-propagating Errors, Rumelhart, Hinton, Williams, 1986",
        perceptron,
        (4,),
        bp.softmax_cross_entropy,
        Tokens(3),
        perceptron_torch,
    ),
    "SNN": Architecture(
        "Self-Normalizing Neural Networks, Klambauer, Unterthiner, Mayr, Hochreiter, 2017",
        self_normalising_network,
        (4,),
        bp.softmax_cross_entropy,
        Tokens(3),
        self_normalising_network_torch,
    ),
    "highway network": Architecture(
        "Training Very Deep Networks, Srivastava, Greff, Schmidhuber, 2015",
        highway_network,
        (5,),
        bp.softmax_cross_entropy,
        Tokens(3),
        highway_network_torch,
    ),
    "Deep & Cross": Architecture(
        "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to "
        "Rank Systems, Wang, Shivanna, Cheng, Jain, Lin, Hong, Chi, 2021",
        deep_and_cross,
        (4,),
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        deep_and_cross_torch,
    ),
    "gated residual network": Architecture(
        "Temporal Fusion Transformers for Interpretable Multi-horizon Time Series Forecasting, "
        "Lim, Arik, Loeff, Pfister, 2021",
        gated_residual_network,
        ((4,), (2,)),
        bp.squared_error,
        (1,),
        gated_residual_network_torch,
    ),
}
