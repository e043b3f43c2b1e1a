"""Networks of rows with categories: users, items, words, each with a vector of its own."""

import torch_functions as t
from architecture import Architecture, Tokens

import jaxbp as bp


def wide_and_deep():
    """Wide & Deep: a linear model of crossed features, plus a network of vectors and numbers."""
    wide = bp.chain(bp.select("crossed"), bp.dense(1))
    categories = bp.chain(bp.select("categories"), bp.embedding(6, 2), bp.flatten())
    deep = bp.chain(
        *(bp.fork(categories, bp.select("numbers")), bp.concatenate()),
        *(bp.dense(5), bp.relu(), bp.dense(3), bp.relu(), bp.dense(1, use_bias=False)),
    )
    return bp.chain(bp.fork(wide, deep), bp.add())


def wide_and_deep_torch(p, inputs, is_clicked):
    ((_, wide), (((_, table, _), _), _, deep1, _, deep2, _, out)), _ = p
    vectors = t.embedded(table, inputs["categories"]).flatten(1)
    x = t.concatenate([vectors, inputs["numbers"]])
    deep = t.dense(out, t.dense(deep2, t.dense(deep1, x).relu()).relu())
    return t.binary_cross_entropy(t.dense(wide, inputs["crossed"]) + deep, is_clicked)


def factorisation_machine():
    """The second order, sum over i < j of <v_i, v_j> = (|sum_i v_i|^2 - sum_i |v_i|^2) / 2."""

    def squared_length(*layers):
        return bp.chain(*layers, bp.fork(bp.chain(), bp.chain()), bp.inner_product())

    total = bp.global_pool(), bp.scale(3.0)  # of three fields
    return bp.chain(
        bp.fork(squared_length(*total), squared_length(bp.flatten())),
        *(bp.subtract(), bp.scale(0.5)),
    )


def deep_fm():
    """DeepFM: a factorisation machine and a network, which share the vectors of the categories."""
    first_order = bp.chain(bp.embedding(9, 1), bp.global_pool(), bp.scale(3.0))
    deep = bp.chain(bp.flatten(), bp.dense(5), bp.relu(), bp.dense(1))
    higher_orders = bp.chain(bp.embedding(9, 4), bp.fork(factorisation_machine(), deep), bp.add())
    return bp.chain(bp.fork(first_order, higher_orders), bp.add())


def deep_fm_torch(p, categories, is_clicked):
    ((weights, _, _), (table, (_, (_, hidden, _, out)), _)), _ = p
    v = t.embedded(table, categories)
    logit = t.embedded(weights, categories).sum(1) + t.dense(
        out, t.dense(hidden, v.flatten(1)).relu()
    )
    for i in range(3):
        for j in range(i):
            logit = logit + (v[:, i] * v[:, j]).sum(-1, keepdim=True)
    return t.binary_cross_entropy(logit, is_clicked)


def neural_collaborative_filtering():
    """NeuMF: a product of two vectors, beside a network of two others. Inputs are (user, item)."""

    def vectors(*layers):
        return bp.chain(bp.on(0, bp.embedding(5, 3)), bp.on(1, bp.embedding(6, 3)), *layers)

    factors = vectors(bp.multiply())
    perceptron = vectors(bp.concatenate(), bp.dense(5), bp.relu(), bp.dense(4), bp.relu())
    return bp.chain(bp.fork(factors, perceptron), bp.concatenate(), bp.dense(1))


def neural_collaborative_filtering_torch(p, inputs, is_liked):
    ((users1, items1, _), (users2, items2, _, hidden1, _, hidden2, _)), _, logit = p
    user, item = inputs
    factors = t.embedded(users1, user) * t.embedded(items1, item)
    x = t.concatenate([t.embedded(users2, user), t.embedded(items2, item)])
    x = t.dense(hidden2, t.dense(hidden1, x).relu()).relu()
    return t.binary_cross_entropy(t.dense(logit, t.concatenate([factors, x])), is_liked)


def deep_learning_recommendation_model():
    """DLRM: the inner products of all pairs of vectors, one of which comes from the numbers.

    Inputs are {"categories", "numbers"}.
    """

    def product(i, j):
        return bp.chain(bp.fork(bp.take(i), bp.take(j)), bp.inner_product())

    below = bp.chain(bp.select("numbers"), bp.dense(5), bp.relu(), bp.dense(3), bp.relu())
    as_position = bp.chain(below, bp.reshape(1, 3))
    categories = bp.chain(bp.select("categories"), bp.embedding(9, 3))
    products = [product(i, j) for i in range(3) for j in range(i)]
    return bp.chain(
        *(bp.fork(as_position, categories), bp.concatenate(axis=0)),
        bp.parallel(bp.take(0), *products, combine="concatenate"),
        *(bp.dense(4), bp.relu(), bp.dense(1)),
    )


def deep_learning_recommendation_model_torch(p, inputs, is_clicked):
    import torch

    (((_, below1, _, below2, _), _), (_, table)), _, _, above, _, logit = p
    x = t.dense(below2, t.dense(below1, inputs["numbers"]).relu()).relu()
    vectors = torch.cat([x[:, None], t.embedded(table, inputs["categories"])], 1)
    i, j = torch.tril_indices(3, 3, -1)
    x = t.concatenate([x, (vectors @ vectors.mT)[:, i, j]])
    return t.binary_cross_entropy(t.dense(logit, t.dense(above, x).relu()), is_clicked)


def feature_tokenizer_transformer():
    """FT-Transformer: every feature becomes a vector, and a transformer sees them as a sequence.

    A convolution of one group for each number maps it by a weight and a bias of its own. Inputs
    are {"categories", "numbers"}.
    """
    numbers = bp.chain(
        *(bp.select("numbers"), bp.reshape(1, 2), bp.conv(8, (1,), groups=2), bp.reshape(2, 4))
    )
    categories = bp.chain(bp.select("categories"), bp.embedding(9, 4), bp.learned_positions(2))
    reglu = bp.chain(bp.gated(bp.dense(5), bp.chain(bp.dense(5), bp.relu())), bp.dense(4))
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(4, 2)), bp.residual(bp.layer_norm(), reglu)
    )
    return bp.chain(
        *(bp.fork(numbers, categories), bp.concatenate(axis=0), bp.prepend(), block),
        *(bp.take(0), bp.layer_norm(), bp.relu(), bp.dense(1)),
    )


def feature_tokenizer_transformer_torch(p, inputs, targets):
    import torch

    ((_, _, maps, _), (_, table, biases)), _, token, block, _, norm, _, out = p
    (norm1, attention), (norm2, ((values, (gate, _)), narrow)) = block
    numbers = inputs["numbers"][..., None] * maps["weight"].view(2, 4) + maps["bias"].view(2, 4)
    categories = t.embedded(table, inputs["categories"]) + biases["weight"]
    x = t.prepended(token["weight"], torch.cat([numbers, categories], 1))
    x = x + t.self_attention(attention, t.layer_norm(norm1, x), 2)
    y = t.layer_norm(norm2, x)
    x = x + t.dense(narrow, t.dense(values, y) * t.dense(gate, y).relu())
    return t.squared_error(t.dense(out, t.layer_norm(norm, x[:, 0]).relu()), targets)


ARCHITECTURES = {
    "Wide & Deep": Architecture(
        "Wide & Deep Learning for Recommender Systems, Cheng, Koc, Harmsen, Shaked, Chandra, "
        "Aradhye, Anderson, Corrado, Chai, Ispir, Anil, Haque, Hong, Jain, Liu, Shah, 2016",
        wide_and_deep,
        {"crossed": (5,), "categories": Tokens(6, (2,)), "numbers": (2,)},
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        wide_and_deep_torch,
    ),
    "DeepFM": Architecture(
        "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, Guo, Tang, Ye, "
        "Li, He, 2017",
        deep_fm,
        Tokens(9, (3,)),
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        deep_fm_torch,
    ),
    "NeuMF": Architecture(
        "Neural Collaborative Filtering, He, Liao, Zhang, Nie, Hu, Chua, 2017",
        neural_collaborative_filtering,
        (Tokens(5), Tokens(6)),
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        neural_collaborative_filtering_torch,
    ),
    "DLRM": Architecture(
        "Deep Learning Recommendation Model for Personalization and Recommendation Systems, "
        "Naumov et al., 2019",
        deep_learning_recommendation_model,
        {"categories": Tokens(9, (2,)), "numbers": (4,)},
        bp.sigmoid_cross_entropy,
        Tokens(2, (1,)),
        deep_learning_recommendation_model_torch,
    ),
    "FT-Transformer": Architecture(
        "Revisiting Deep Learning Models for Tabular Data, Gorishniy, Rubachev, Khrulkov, "
        "Babenko, 2021",
        feature_tokenizer_transformer,
        {"categories": Tokens(9, (2,)), "numbers": (2,)},
        bp.squared_error,
        (1,),
        feature_tokenizer_transformer_torch,
    ),
}
