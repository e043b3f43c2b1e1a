"""Losses. PyTorch reduces to one number; the library has the terms of every example.

`mean`, `sum` and `none` are functions of the terms, and so are constant factors. The axis of
classes is the second in PyTorch and the last in the library. A target is data and has no
derivative, so only the gradients of outputs are compared.
"""

import functools
import itertools

import jax.numpy as jnp
from torch import nn

import jaxbp as bp
from experiments.peers_suite.translate.linear import dense_params
from experiments.peers_suite.written import (
    CannotBeWrittenError,
    Written,
    channels_last,
    examples,
    to_array,
    under,
)

# The loss of each output by itself, and the factor by which PyTorch's is larger.
ELEMENTWISE = {
    nn.BCELoss: lambda _: (bp.binary_cross_entropy, 1),
    nn.BCEWithLogitsLoss: lambda _: (bp.sigmoid_cross_entropy, 1),
    nn.HingeEmbeddingLoss: lambda module: (bp.make_hinge_embedding(margin=module.margin), 1),
    nn.HuberLoss: lambda module: (bp.make_huber(module.delta), 1),
    nn.L1Loss: lambda _: (bp.absolute_error, 1),
    nn.MSELoss: lambda _: (bp.squared_error, 2),
    nn.PoissonNLLLoss: lambda module: (_poisson(module), 1),
    nn.SmoothL1Loss: lambda module: (bp.make_huber(module.beta), 1 / module.beta),
    nn.SoftMarginLoss: lambda _: (bp.sigmoid_cross_entropy, 1),
}


def elementwise(module, outputs, targets):
    """A term for each output; what PyTorch calls a weight is one of terms."""
    loss, factor = ELEMENTWISE[type(module)](module)
    targets = to_array(targets)
    if isinstance(module, nn.SoftMarginLoss):
        targets = (targets + 1) / 2  # 0 and 1 in place of -1 and 1
    if getattr(module, "weight", None) is not None:
        factor = factor * to_array(module.weight)

    def into(x):
        return x.reshape(len(x) if x.ndim else 1, -1)

    def value(terms):
        return reduce(module, factor * terms.reshape(outputs.shape))

    return _written(loss, into, into(targets), value)


def kl_divergence(module, outputs, targets):
    """PyTorch has a term for each class: here each is a distribution over one class."""
    targets = to_array(targets)
    probabilities = jnp.exp(targets) if module.log_target else targets
    if not jnp.all(probabilities >= 0):
        raise CannotBeWrittenError("targets that are negative or nan are no probabilities")
    loss = bp.make_kl_divergence(log_outputs=True, log_targets=module.log_target)

    def into(x):
        return x.reshape(len(x) if x.ndim else 1, -1, 1)

    def value(terms):
        return reduce(module, terms.reshape(outputs.shape))

    return _written(loss, into, into(targets), value)


def gaussian_nll(module, means, targets, variances):
    """PyTorch takes variances, the library their logarithms: the network computes these."""
    if module.full:
        raise CannotBeWrittenError("gaussian_nll leaves out the constant")
    log = bp.elementwise(jnp.log, lambda v: 1 / v, name="log")
    layer = bp.chain(bp.on(1, log), bp.concatenate())

    def inputs(means, variances):
        return means[..., None], jnp.broadcast_to(variances, means.shape)[..., None]

    def value(terms):
        return reduce(module, terms)

    targets = to_array(targets)[..., None]
    return Written(layer, inputs, value, lambda _: ((), ()), bp.gaussian_nll, targets)


def cross_entropy(module, logits, targets):
    layout = channels_last(logits, max(logits.ndim - 2, 0))
    loss, targets, value = _of_classes(_softmax(module), module, targets, logits.ndim > 1)
    return _written(loss, layout.into, targets, value)


def nll(module, outputs, targets):
    layout = channels_last(outputs, outputs.ndim - 2)
    made = bp.make_nll(class_weights=_class_weights(module))
    loss, targets, value = _of_classes(made, module, targets, outputs.ndim > 1)
    return _written(loss, layout.into, targets, value)


def linear_cross_entropy(module, x, targets):
    """A dense layer for all classes at all positions, and then the cross-entropy."""
    layout, sizes = examples(x, 1), module.out_features
    features, use_bias = module.linear.out_features, module.linear.bias is not None
    layer = bp.chain(
        bp.dense(features, use_bias=use_bias),
        bp.reshape(module.num_classes, *sizes),
        bp.permute(*range(1, 1 + len(sizes)), 0),
    )
    loss, targets, value = _of_classes(_softmax(module), module, targets, x.ndim > 1)

    def params(params):
        return dense_params(under(params, "linear")), (), ()

    return Written(layer, layout.into, value, params, loss, targets)


def multi_margin(module, outputs, targets):
    """PyTorch divides by the number of classes."""
    loss = bp.make_multi_margin(
        power=module.p, margin=module.margin, class_weights=_class_weights(module)
    )

    def value(terms):
        return reduce(module, terms / outputs.shape[-1])

    return _written(loss, lambda x: x, to_array(targets), value)


def multi_label_margin(module, outputs, targets):
    """PyTorch lists the labels, up to a -1; the library counts each."""
    layout, n_classes = examples(outputs, 1), outputs.shape[-1]
    labels = layout.into(to_array(targets))
    listed = jnp.cumprod(labels >= 0, axis=-1)[..., None]
    counts = jnp.sum(listed * (labels[..., None] == jnp.arange(n_classes)), axis=-2)

    def value(terms):
        return reduce(module, layout.back(terms) / n_classes)

    return _written(bp.multi_label_margin, layout.into, counts, value)


def multi_label_soft_margin(module, outputs, targets):
    """The mean over the classes; what PyTorch calls a weight is one of terms."""
    weight = 1 if module.weight is None else to_array(module.weight)

    def value(terms):
        return reduce(module, jnp.mean(weight * terms, axis=-1))

    targets = to_array(targets).astype(float)
    return _written(bp.sigmoid_cross_entropy, lambda x: x, targets, value)


def margin_ranking(module, first, second, targets):
    del first, second
    loss = bp.make_margin_ranking(margin=module.margin)

    def inputs(*pair):
        return tuple(x[:, None] for x in pair)

    def value(terms):
        return reduce(module, terms[:, 0])

    return _written(loss, inputs, to_array(targets)[:, None], value)


def cosine_embedding(module, first, second, targets):
    del first, second
    loss = bp.make_cosine_embedding(margin=module.margin)
    return _written(loss, lambda *pair: pair, to_array(targets), functools.partial(reduce, module))


def ctc(module, outputs, targets, input_lengths, target_lengths):
    """[T, N, C] in PyTorch; labels side by side or one after another, with lengths of their own."""
    lengths = jnp.asarray(target_lengths)
    labels = _filled_up(to_array(targets), lengths, module.blank)

    def inputs(outputs):
        return jnp.swapaxes(outputs, 0, 1)

    def value(terms):
        return reduce(module, terms / lengths if module.reduction == "mean" else terms)

    loss = bp.make_ctc(blank=module.blank)
    return _written(loss, inputs, (labels, jnp.asarray(input_lengths)), value)


def reduce(module, terms, count=None):
    """What PyTorch makes of terms; `count` is what a mean divides by, if not their number."""
    match module.reduction:
        case "none":
            return terms
        case "sum":
            return jnp.sum(terms)
        case "mean":
            return jnp.sum(terms) / (terms.size if count is None else count)
        case "batchmean":
            return jnp.sum(terms) / (len(terms) if terms.ndim else 1)


def _written(loss, inputs, targets, value):
    """A loss on the inputs themselves."""
    return Written(bp.chain(), inputs, value, loss=loss, targets=targets)


def _poisson(module):
    if not module.log_input:
        raise CannotBeWrittenError("poisson_nll adds no eps to the rate in its logarithm")
    return bp.make_poisson_nll(full=module.full)


def _softmax(module):
    return bp.make_softmax_cross_entropy(
        class_weights=_class_weights(module), label_smoothing=module.label_smoothing
    )


def _class_weights(module):
    """The weights of classes, or None."""
    if module.weight is None:
        return None
    weights = to_array(module.weight)
    if jnp.any(weights < 0):
        raise CannotBeWrittenError("a class has a negative weight, which would reward mistakes")
    return weights


def _of_classes(loss, module, targets, batched):
    """The loss at labels or at probabilities, its targets, and PyTorch's value of its terms.

    A mean divides by the sum of the labels' weights, and of probabilities by the number of terms.
    """
    targets = to_array(targets)
    targets = targets if batched else targets[None]
    weight, count = 1, None
    if jnp.issubdtype(targets.dtype, jnp.integer):
        weights = 1 if module.weight is None else to_array(module.weight)[targets]
        if module.ignore_index is not None:
            loss = bp.ignoring(loss, module.ignore_index)
            weights = jnp.where(targets == module.ignore_index, 0, weights)
        count = jnp.sum(jnp.broadcast_to(weights, targets.shape))
        if module.reduction == "mean" and count == 0:
            raise CannotBeWrittenError("every label is ignored, and a mean of no terms is nan")
    else:
        targets = jnp.moveaxis(targets, 1, -1)
        totals = jnp.sum(targets, axis=-1)
        if not jnp.allclose(totals, 1):
            # PyTorch takes any numbers: a distribution times their sum, the weight of the term.
            if module.label_smoothing:
                raise CannotBeWrittenError("targets that do not sum to 1 are not smoothed")
            targets, weight = targets / totals[..., None], totals

    def value(terms):
        terms = weight * terms
        return reduce(module, terms if batched else terms[0], count)

    return loss, targets, value


def _filled_up(labels, lengths, blank):
    """Labels [N, S] with the blank behind the last one, from such or from all in one row."""
    if labels.ndim == 1:
        ends = [0, *jnp.cumsum(lengths).tolist()]
        rows = [labels[start:end] for start, end in itertools.pairwise(ends)]
        longest = max(map(len, rows))
        labels = jnp.stack([jnp.pad(row, (0, longest - len(row))) for row in rows])
    return jnp.where(jnp.arange(labels.shape[1]) < lengths[:, None], labels, blank)


TRANSLATIONS = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    nn.CTCLoss: ctc,
    nn.CosineEmbeddingLoss: cosine_embedding,
    nn.CrossEntropyLoss: cross_entropy,
    nn.GaussianNLLLoss: gaussian_nll,
    nn.KLDivLoss: kl_divergence,
    nn.LinearCrossEntropyLoss: linear_cross_entropy,
    nn.MarginRankingLoss: margin_ranking,
    nn.MultiLabelMarginLoss: multi_label_margin,
    nn.MultiLabelSoftMarginLoss: multi_label_soft_margin,
    nn.MultiMarginLoss: multi_margin,
    nn.NLLLoss: nll,
}
