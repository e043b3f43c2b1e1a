"""Networks of sets [N, T, I], whose outputs do not depend on the order."""

import torch_functions as t
from architecture import Among, Architecture, Tokens

import jaxbp as bp


def deep_sets():
    """Deep Sets: a network of each element, the sum of those that are there, and a network of it.

    Inputs are (elements, which of them are there): 1 or 0 for each of four elements.
    """
    return bp.chain(
        *(bp.on(0, bp.dense(5), bp.tanh(), bp.dense(4)), bp.multiply()),
        *(bp.global_pool(), bp.scale(4.0), bp.dense(5), bp.tanh(), bp.dense(1)),
    )


def deep_sets_torch(p, inputs, targets):
    """Set by set, of its own elements alone."""
    import torch

    (hidden1, _, out1), _, _, _, hidden2, _, out2 = p
    sets = [elements[is_there[:, 0] == 1] for elements, is_there in zip(*inputs, strict=True)]
    sums = torch.stack([t.dense(out1, t.dense(hidden1, x).tanh()).sum(0) for x in sets])
    return t.squared_error(t.dense(out2, t.dense(hidden2, sums).tanh()), targets)


def point_net():
    """PointNet without its transforms: the largest value of each channel over all points.

    Both the points and the whole are classified: outputs are (logits of the set, of each point).
    """
    points = bp.chain(bp.dense(4), bp.relu())
    whole = bp.chain(bp.dense(5), bp.relu(), bp.global_pool("max"))
    of_set = bp.chain(bp.select(1), bp.dense(4), bp.relu(), bp.dense(3))
    from_point = bp.chain(bp.select(0), bp.dense(4, use_bias=False))
    from_whole = bp.chain(bp.select(1), bp.dense(4))
    of_point = bp.chain(bp.fork(from_point, from_whole), bp.add(), bp.relu(), bp.dense(2))
    return bp.chain(points, bp.fork(bp.chain(), whole), bp.fork(of_set, of_point))


def point_net_torch(p, x, labels):
    """As in the paper, the points' network sees the concatenation of the point and the whole."""
    import torch

    (points, _), (_, (widen, _, _)), (of_set, of_point) = p
    (_, set_hidden, _, set_logits), (((_, from_point), (_, from_whole)), _, _, point_logits) = (
        of_set,
        of_point,
    )
    x = t.dense(points, x).relu()
    whole = t.dense(widen, x).relu().amax(1)
    of_set = t.dense(set_logits, t.dense(set_hidden, whole).relu())
    joint = t.concatenate([x, whole[:, None].expand(-1, x.shape[1], -1)])
    weight = torch.cat([from_point["weight"], from_whole["weight"]])
    hidden = (joint @ weight + from_whole["bias"]).relu()
    return t.cross_entropy(of_set, labels[0]) + t.cross_entropy(
        t.dense(point_logits, hidden), labels[1]
    )


def attention_block():
    """Of the pair (x, y): x attends to y, and a network of each element follows."""
    return bp.chain(
        *(bp.residual(bp.cross_attention(4, 2), at=0), bp.select(0), bp.layer_norm()),
        *(bp.residual(bp.dense(4), bp.relu()), bp.layer_norm()),
    )


def attention_block_torch(p, x, y):
    attention, _, norm1, (dense, _), norm2 = p
    x = t.layer_norm(norm1, x + t.cross_attention(attention, x, y, 2))
    return t.layer_norm(norm2, x + t.dense(dense, x).relu())


def learned(count):
    """Learned vectors instead of the elements, [N, count, O]."""
    return bp.chain(bp.prepend(count), bp.take(slice(0, count)))


def set_transformer():
    """Set Transformer: few learned points see the set, the set sees them, and a seed sees all."""
    induced = bp.chain(bp.fork(learned(2), bp.chain()), attention_block())
    induced_attention = bp.chain(bp.fork(bp.chain(), induced), attention_block())
    pooling = bp.chain(bp.fork(learned(1), bp.chain()), attention_block())
    return bp.chain(bp.dense(4), induced_attention, pooling, bp.take(0), bp.dense(3))


def set_transformer_torch(p, x, labels):
    embed, ((_, ((points, _), block1)), block2), ((seed, _), block3), _, logits = p
    x = t.dense(embed, x)
    points, seed = (own[0]["weight"].expand(len(x), -1, -1) for own in (points, seed))
    x = attention_block_torch(block2, x, attention_block_torch(block1, points, x))
    return t.cross_entropy(t.dense(logits, attention_block_torch(block3, seed, x)[:, 0]), labels)


def perceiver():
    """Perceiver: a learned array looks at the inputs again and again, with the same weights.

    The blocks pass on the pair (array, inputs).
    """
    norms = bp.on(0, bp.layer_norm()), bp.on(1, bp.layer_norm())
    cross_attention = bp.residual(*norms, bp.cross_attention(4, 1), at=0)
    mlp = bp.residual(bp.layer_norm(), bp.dense(5), bp.gelu(approximate=False), bp.dense(4))
    self_attention = bp.residual(bp.layer_norm(), bp.attention(4, 2))
    block = bp.chain(cross_attention, bp.on(0, mlp, self_attention, mlp))
    return bp.chain(
        *(bp.dense(4), bp.learned_positions(5), bp.fork(learned(2), bp.chain())),
        *(bp.repeat(block, 2), bp.select(0), bp.global_pool(), bp.dense(3)),
    )


def perceiver_torch(p, x, labels):
    def mlp(p, x):
        norm, widen, _, narrow = p
        return x + t.dense(narrow, t.gelu(t.dense(widen, t.layer_norm(norm, x))))

    embed, positions, ((array, _), _), block, _, _, logits = p
    (norm1, norm2, cross), (mlp1, (norm3, attention), mlp2) = block
    x = t.dense(embed, x) + positions["weight"]
    z = array["weight"].expand(len(x), -1, -1)
    for _ in range(2):
        z = z + t.cross_attention(cross, t.layer_norm(norm1, z), t.layer_norm(norm2, x), 1)
        z = mlp(mlp1, z)
        z = mlp(mlp2, z + t.self_attention(attention, t.layer_norm(norm3, z), 2))
    return t.cross_entropy(t.dense(logits, z.mean(1)), labels)


ARCHITECTURES = {
    "Deep Sets": Architecture(
        "Deep Sets, Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola, 2017",
        deep_sets,
        ((4, 2), Among((0.0, 1.0), (4, 1))),
        bp.squared_error,
        (1,),
        deep_sets_torch,
    ),
    "PointNet": Architecture(
        "PointNet: Deep Learning on Point Sets for 3D Classification and Segmentation, Qi, Su, Mo, "
        "Guibas, 2017",
        point_net,
        (5, 3),
        bp.joint_loss((bp.softmax_cross_entropy, bp.softmax_cross_entropy)),
        (Tokens(3), Tokens(2, (5,))),
        point_net_torch,
    ),
    "Set Transformer": Architecture(
        "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks, "
        "Lee, Lee, Kim, Kosiorek, Choi, Teh, 2019",
        set_transformer,
        (5, 2),
        bp.softmax_cross_entropy,
        Tokens(3),
        set_transformer_torch,
    ),
    "Perceiver": Architecture(
        "Perceiver: General Perception with Iterative Attention, Jaegle, Gimeno, Brock, Zisserman, "
        "Vinyals, Carreira, 2021",
        perceiver,
        (5, 3),
        bp.softmax_cross_entropy,
        Tokens(3),
        perceiver_torch,
    ),
}
