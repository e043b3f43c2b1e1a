"""Connectionist temporal classification: sequences of labels whose places are not known.

The outputs are logits z_t of C classes at each of T frames, one of them the blank. A path chooses a
class at each frame, with the probability prod_t p_t,c of softmaxes. It spells the labels that are
left when repeated classes are merged and blanks removed. The probability of a sequence of labels is
the sum over all paths that spell it, which the forward-backward algorithm computes.

Source:
  "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural
  Networks", Graves, Fernandez, Gomez, Schmidhuber, 2006.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbp.outputs.arguments import require_array, require_between, require_outputs
from jaxbp.outputs.curvature import DRAW, IS_INDEFINITE, without_factor
from jaxbp.types import Loss, show_shape

__all__ = ["make_ctc"]

# The logarithm of 0: finite, so that it has a derivative, and far below that of any path.
LOG_ZERO = -1e30


class _States(NamedTuple):
    """The states u of a path: the labels with blanks before, between and after, U = 2 S + 1.

    Attributes:
      classes: the class of each state, [N, U].
      skips: whether a path may come from state u - 2, [N, U]: from a label to another one.
      ends: whether a path may end there, [N, U].
    """

    classes: jax.Array
    skips: jax.Array
    ends: jax.Array


def make_ctc(*, blank: int = 0) -> Loss:
    """Connectionist temporal classification: E = -log p(labels), the sum over all alignments.

        a_t(u) = p_t,u sum_(v -> u) a_(t-1)(v)          frames up to t, in state u
        b_t(u) = sum_(u -> v) p_(t+1),v b_(t+1)(v)      frames after t
        E = -log sum_(u at an end) a_T(u)
        delta_tc = p_tc - sum_(u of class c) a_t(u) b_t(u) e^E

    The states u are the labels with blanks between them. They are summed in logarithms. delta is
    the softmax less the probability that the frame stands at the class, given the labels.

        Hessian    has negative eigenvalues, and couples the frames, so it has no factor
        sample     a path from the softmaxes, and the labels that it spells

      too few frames    value inf, delta 0: no path spells the labels. A label takes a frame, and a
                        repeated one a blank before it.
      frames beyond the length of an example    delta 0, whatever they hold

    Outputs are logits z, [N, T, C]. Targets are a pair (labels, lengths): labels are integers
    [N, S], filled up at the right with the blank, and lengths are integers [N], the frames of each
    example, at most T.

    The value is that of `optax.ctc_loss` and of PyTorch's `CTCLoss`. The latter's `mean` divides by
    the number of labels.

    Args:
      blank: the class of the blank.

    Raises:
      ValueError: `blank` is not a class; when called, outputs or targets have the wrong shape or
        dtype. Outside jit also: a label or a length is out of range, or a blank stands before a
        label.
      TypeError: a factor of the Hessian is asked for.

    References:
      "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent
      Neural Networks", Graves, Fernandez, Gomez, Schmidhuber, 2006.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.make_ctc()
      >>> value, delta = loss(jnp.zeros((1, 2, 3)), (jnp.array([[1, 0]]), jnp.array([2])))
      >>> round(float(jnp.exp(-value[0])), 4), delta.shape  # 3 of the 9 paths: 11, 01 and 10
      (0.3333, (1, 2, 3))
    """
    name = "ctc"
    if isinstance(blank, bool) or not isinstance(blank, int) or blank < 0:
        raise ValueError(f"{name}: blank is {blank!r}; it takes a class, an integer from 0.")

    def terms(outputs, targets):
        """The loss of connectionist temporal classification (see `make_ctc`)."""
        z = outputs_of(outputs)
        labels, lengths = targets_of(targets, z)
        states, is_right = _states_of(labels, blank, z.shape[-1])
        log_p = jax.nn.log_softmax(z)
        at_states = jnp.take_along_axis(log_p, states.classes[:, None], axis=-1)
        log_a, log_b, log_total = _forward_backward(
            jnp.maximum(at_states, LOG_ZERO), states, lengths
        )
        exists = log_total > LOG_ZERO / 2
        log_path = log_a + log_b - jnp.where(exists, log_total, 0)[:, None, None]
        share = _by_class(jnp.exp(log_path), states.classes, z)
        counts = exists[:, None] & (jnp.arange(z.shape[1]) < lengths[:, None])
        delta = jnp.where(counts[..., None], jnp.exp(log_p) - share, 0)
        is_right = is_right & (lengths >= 0) & (lengths <= z.shape[1])
        values = jnp.where(is_right, jnp.where(exists, -log_total, jnp.inf), jnp.nan)
        delta = jnp.where(is_right[:, None, None], delta, jnp.nan)
        return values, delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        z = outputs_of(outputs)
        n, t, _ = z.shape
        lengths = jnp.full(n, t) if targets is None else targets_of(targets, z)[1]
        path = jax.random.categorical(key, z)
        before = jnp.pad(path, ((0, 0), (1, 0)), constant_values=blank)[:, :-1]
        spelled = (path != blank) & (path != before) & (jnp.arange(t) < lengths[:, None])
        order = jnp.argsort(~spelled, axis=1, stable=True)
        labels = jnp.take_along_axis(jnp.where(spelled, path, blank), order, axis=1)
        return labels, lengths

    def outputs_of(outputs):
        z = require_outputs(name, outputs)
        if z.ndim != 3:
            raise ValueError(
                f"{name}: outputs has shape {show_shape(z.shape)}, expected [N, T, C]."
            )
        if blank >= z.shape[-1]:
            raise ValueError(
                f"{name}: outputs has shape {show_shape(z.shape)}, of {z.shape[-1]} classes, "
                f"expected more than {blank}, the class of the blank."
            )
        return z

    def targets_of(targets, z):
        if not isinstance(targets, tuple) or len(targets) != 2:
            raise ValueError(
                f"{name}: targets is a {type(targets).__name__}, expected a pair (labels, lengths)."
            )
        labels, lengths = (require_array(name, "targets", part) for part in targets)
        for what, part, ndim in (("labels [N, S]", labels, 2), ("lengths [N]", lengths, 1)):
            if not jnp.issubdtype(part.dtype, jnp.integer) or part.ndim != ndim:
                raise ValueError(
                    f"{name}: targets has {part.dtype} {show_shape(part.shape)}, expected "
                    f"integers: {what}."
                )
        if not labels.shape[0] == lengths.shape[0] == z.shape[0]:
            raise ValueError(
                f"{name}: targets has {labels.shape[0]} sequences of labels and "
                f"{lengths.shape[0]} lengths, expected {z.shape[0]} of each: one per example."
            )
        labels, lengths = (
            part.astype(jnp.int32) if part.dtype.itemsize < 4 else part
            for part in (labels, lengths)
        )
        if not isinstance(labels, Tracer):
            require_between(name, labels, 0, z.shape[-1] - 1, "labels")
            ends = np.asarray(labels) == blank
            if (ends[:, :-1] & ~ends[:, 1:]).any():
                raise ValueError(
                    f"{name}: labels has the blank, {blank}, before another label; it may only "
                    "fill up at the right."
                )
        if not isinstance(lengths, Tracer):
            require_between(name, lengths, 0, z.shape[1], "lengths")
        return labels, lengths

    return Loss(name, terms, sample, without_factor(name, IS_INDEFINITE, DRAW))


def _states_of(labels: jax.Array, blank: int, classes: int) -> tuple[_States, jax.Array]:
    """The states of labels [N, S], and for each example whether its labels are valid."""
    is_blank = labels == blank
    in_range = (labels >= 0) & (labels < classes)
    is_right = jnp.all(in_range, axis=1) & ~jnp.any(is_blank[:, :-1] & ~is_blank[:, 1:], axis=1)
    blanks = jnp.asarray(blank, labels.dtype)  # before, between and behind the labels
    of_states = jax.lax.pad(jnp.where(in_range, labels, blank), blanks, [(0, 0, 0), (1, 1, 1)])
    before = jnp.pad(of_states, ((0, 0), (2, 0)), constant_values=blank)[:, :-2]
    last = 2 * jnp.sum(~is_blank, axis=1, keepdims=True)
    place = jnp.arange(of_states.shape[1])
    skips = (of_states != blank) & (of_states != before) & (place >= 2)
    return _States(of_states, skips, (place == last) | (place == last - 1)), is_right


def _by_class(shares, classes, z):
    """Sums the shares of states [N, T, U] over the states of each class: [N, T, C], like z."""
    t = np.arange(z.shape[1])[:, None]

    def of_one(zeros, classes, shares):
        return zeros.at[t, classes].add(shares)

    return jax.vmap(of_one)(jnp.zeros_like(z), classes, shares)


def _forward_backward(
    log_p: jax.Array, states: _States, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithms of a and b at each frame and state, [N, T, U], and log p(labels), [N].

    Beyond the length of an example, log a stays as it is, and so does log b on the way back.
    """
    frames = jnp.arange(log_p.shape[1])[:, None] < lengths  # [T, N]
    by_frame = jnp.moveaxis(log_p, 1, 0), frames[..., None]

    def forward(log_a, frame):
        log_p, counts = frame
        shifted = _shift(log_a, 1), jnp.where(states.skips, _shift(log_a, 2), LOG_ZERO)
        after = log_p + jax.nn.logsumexp(jnp.stack([log_a, *shifted]), axis=0)
        log_a = jnp.where(counts, jnp.maximum(after, LOG_ZERO), log_a)
        return log_a, log_a

    def backward(log_b, frame):
        log_p, counts = frame
        here = log_p + log_b
        shifted = _shift(here, -1), _shift(jnp.where(states.skips, here, LOG_ZERO), -2)
        before = jax.nn.logsumexp(jnp.stack([here, *shifted]), axis=0)
        return jnp.where(counts, jnp.maximum(before, LOG_ZERO), log_b), log_b

    # A path starts at the first blank or label, as if it came from a blank before.
    first = jnp.arange(log_p.shape[2]) == 0
    start = jnp.where(first, 0, jnp.full_like(log_p[:, 0], LOG_ZERO))
    end = jnp.where(states.ends, jnp.zeros((), log_p.dtype), LOG_ZERO)
    last, log_a = jax.lax.scan(forward, start, by_frame)
    _, log_b = jax.lax.scan(backward, end, by_frame, reverse=True)
    log_total = jax.nn.logsumexp(jnp.where(states.ends, last, LOG_ZERO), axis=1)
    return jnp.moveaxis(log_a, 0, 1), jnp.moveaxis(log_b, 0, 1), log_total


def _shift(x: jax.Array, by: int) -> jax.Array:
    """Moves the states [N, U] by some places; log 0 comes in."""
    u = x.shape[1]
    pads = (by, 0) if by > 0 else (0, -by)
    padded = jnp.pad(x, ((0, 0), pads), constant_values=LOG_ZERO)
    return padded[:, :u] if by > 0 else padded[:, -u:]
