"""Losses of two or three outputs that belong together, such as the embeddings of two inputs.

    margin_ranking      which of two numbers is the larger
    cosine_embedding    the angle between two vectors
    contrastive         the distance of two vectors
    triplet             an anchor that is nearer to one vector than to another

The outputs of such a network are a tuple of arrays of the same shape, and so is delta: the network
has several outputs, such as one that runs the same layers on two inputs. For two heads of one kind
each with targets of its own, use `joint_loss`.

These losses are the logarithm of no distribution, and their Hessian has negative eigenvalues or is
0: `ggn_columns` and `sampled` refuse them. A loss that compares each example with the others of its
batch, such as InfoNCE or CLIP's, is not per example, and so is none of these.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    require_array,
    require_between,
    require_like,
    require_number,
    require_one_of,
    require_several,
)
from jaxbp.outputs.curvature import (
    IS_INDEFINITE,
    IS_LINEAR,
    MULTIPLY,
    without_factor,
    without_sample,
)
from jaxbp.outputs.margins import SMOOTH, is_short
from jaxbp.types import Loss, length_and_direction, show_shape

__all__ = ["make_contrastive", "make_cosine_embedding", "make_margin_ranking", "make_triplet"]


def make_margin_ranking(*, margin: float = 0.0) -> Loss:
    """The ranking loss: the first of two numbers is the larger one by a margin m, or the smaller.

        E = sum_o g_o,    g = max(0, m - t (a - b))
        dE/da = -t where g > 0, else 0;    dE/db = -dE/da

    Outputs are a tuple (a, b) of arrays [N, ..., O]. Targets t are [N, ..., O]: 1 where a has to be
    the larger one, -1 where b has to be. A target of 0 has no delta.

    Args:
      margin: m.

    Raises:
      ValueError: `margin` is not a number; when called, outputs or targets have the wrong shape or
        dtype. Outside jit also: a target is not from -1 to 1.
      TypeError: a factor of the Hessian or a sample is asked for.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> a, b = jnp.array([[1.0]]), jnp.array([[3.0]])
      >>> value, (da, db) = bp.make_margin_ranking()((a, b), jnp.array([[1]]))
      >>> value.tolist(), da.tolist(), db.tolist()
      ([2.0], [[-1.0]], [[1.0]])
    """
    name = "margin_ranking"
    margin = require_number(name, "margin", margin)

    def terms(outputs, targets):
        """The ranking loss of two numbers (see `make_margin_ranking`)."""
        a, b = require_several(name, outputs, "a, b")
        t = require_between(name, require_like(name, targets, a, "1 or -1 per output"), -1, 1)
        gap = margin - t * (a - b)
        slope = -t * is_short(gap)
        return jax.nn.relu(gap), _deltas(outputs, slope, -slope)

    factor = without_factor(name, IS_LINEAR, SMOOTH)
    return Loss(name, terms, without_sample(name), factor, filler=1)


def make_cosine_embedding(*, margin: float = 0.0) -> Loss:
    """The cosine loss: similar vectors have the same direction, others an angle above a bound.

        E = 1 - cos                where t = 1,     cos = a . b / (|a| |b|)
            max(0, cos - m)        where t = -1
        dcos/da = (b / |b| - cos a / |a|) / |a|, and the same for b

    Outputs are a tuple (a, b) of vectors, [N, ..., O]. Targets t are [N, ...]: 1 for similar ones,
    -1 for others.

      a = 0 or b = 0    cos = 0, and delta 0 of both

    Args:
      margin: m, usually from 0 to 1/2.

    Raises:
      ValueError: `margin` is not a number; when called, outputs or targets have the wrong shape or
        dtype. Outside jit also: a target is not 1 or -1.
      TypeError: a factor of the Hessian or a sample is asked for.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> a, b = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])
      >>> value, (da, db) = bp.make_cosine_embedding()((a, b), jnp.array([1]))
      >>> value.tolist(), float(da[0, 1]), float(db[0, 0])
      ([1.0], -1.0, -0.5)
    """
    name = "cosine_embedding"
    margin = require_number(name, "margin", margin)

    def terms(outputs, targets):
        """The cosine loss of two vectors (see `make_cosine_embedding`)."""
        a, b = require_several(name, outputs, "a, b")
        t = _signs_of(name, targets, a)
        (a_size, a_way), (b_size, b_way) = length_and_direction(a), length_and_direction(b)
        cosine = jnp.sum(a_way * b_way, axis=-1)
        values = jnp.where(t == -1, jax.nn.relu(cosine - margin), t - cosine)
        exist = (a_size[..., 0] > 0) & (b_size[..., 0] > 0)
        slope = jnp.where(exist, jnp.where(t == -1, is_short(cosine - margin), -t), 0 * cosine)
        slope, cosine = slope[..., None], cosine[..., None]
        da = slope * (b_way - cosine * a_way) / jnp.where(a_size == 0, 1, a_size)
        db = slope * (a_way - cosine * b_way) / jnp.where(b_size == 0, 1, b_size)
        return values, _deltas(outputs, da, db)

    factor = without_factor(name, IS_INDEFINITE, MULTIPLY)
    return Loss(name, terms, without_sample(name), factor, filler=1)


def make_contrastive(*, margin: float = 1.0) -> Loss:
    """The contrastive loss: similar vectors are near, others farther apart than a margin m.

        E = d^2 / 2                where t = 1,     d = |a - b|,    dE/da = a - b
            max(0, m - d)^2 / 2    where t = -1,    dE/da = -max(0, m - d) (a - b) / d
        dE/db = -dE/da

    Outputs are a tuple (a, b) of vectors, [N, ..., O]. Targets t are [N, ...]: 1 for similar ones,
    -1 for others.

      a = b, t = -1    value m^2 / 2, delta 0

    Args:
      margin: m, not negative.

    Raises:
      ValueError: `margin` is negative; when called, outputs or targets have the wrong shape or
        dtype. Outside jit also: a target is not 1 or -1.
      TypeError: a factor of the Hessian or a sample is asked for.

    References:
      "Dimensionality Reduction by Learning an Invariant Mapping", Hadsell, Chopra, LeCun, 2006.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> a, b = jnp.array([[0.5, 0.0]]), jnp.array([[0.0, 0.0]])
      >>> value, (da, db) = bp.make_contrastive()((a, b), jnp.array([-1]))
      >>> value.tolist(), float(da[0, 0]), float(db[0, 0])
      ([0.125], -0.5, 0.5)
    """
    name = "contrastive"
    margin = require_number(name, "margin", margin, low=0)

    def terms(outputs, targets):
        """The contrastive loss of two vectors (see `make_contrastive`)."""
        a, b = require_several(name, outputs, "a, b")
        t = _signs_of(name, targets, a)
        size, way = length_and_direction(a - b)
        short = jax.nn.relu(margin - size)
        near = t[..., None] * (a - b)
        da = jnp.where(t[..., None] == -1, -short * way, near)
        values = jnp.where(t == -1, (short / 2 * short)[..., 0], jnp.sum(near / 2 * near, axis=-1))
        return values, _deltas(outputs, da, -da)

    factor = without_factor(name, IS_INDEFINITE, MULTIPLY)
    return Loss(name, terms, without_sample(name), factor, filler=1)


def make_triplet(*, margin: float = 1.0) -> Loss:
    """The triplet loss: an anchor is nearer to a positive vector than to a negative one.

        E = max(0, |a - p| - |a - n| + m)
        dE/da = u - v,    dE/dp = -u,    dE/dn = v    where E > 0, else 0
        u = (a - p) / |a - p|,    v = (a - n) / |a - n|, each 0 for equal vectors

    Outputs are a tuple (a, p, n) of vectors, [N, ..., O]. There is nothing to give as targets: pass
    None.

    Args:
      margin: m.

    Raises:
      ValueError: `margin` is not a number; when called, outputs have the wrong shape or dtype, or
        targets are not None.
      TypeError: a factor of the Hessian or a sample is asked for.

    References:
      "FaceNet: A Unified Embedding for Face Recognition and Clustering", Schroff, Kalenichenko,
      Philbin, 2015, with the distance in place of its square.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> a, p, n = jnp.array([[0.0]]), jnp.array([[3.0]]), jnp.array([[2.5]])
      >>> value, (da, dp, dn) = bp.make_triplet()((a, p, n), None)
      >>> value.tolist(), da.tolist(), dp.tolist(), dn.tolist()
      ([1.5], [[0.0]], [[1.0]], [[-1.0]])
    """
    name = "triplet"
    margin = require_number(name, "margin", margin)

    def terms(outputs, targets):
        """The triplet loss of an anchor and two vectors (see `make_triplet`)."""
        a, p, n = require_several(name, outputs, "anchor, positive, negative")
        if targets is not None:
            raise ValueError(f"{name}: targets is a {type(targets).__name__}, expected None.")
        (near, u), (far, v) = length_and_direction(a - p), length_and_direction(a - n)
        gap = near - far + margin
        u, v = is_short(gap) * u, is_short(gap) * v
        return jax.nn.relu(gap)[..., 0], _deltas(outputs, u - v, -u, v)

    factor = without_factor(name, IS_INDEFINITE, MULTIPLY)
    return Loss(name, terms, without_sample(name), factor)


def _signs_of(name: str, targets: Any, a: jax.Array) -> jax.Array:
    """Targets t [N, ...] of vectors a [N, ..., O], each 1 or -1."""
    targets = require_array(name, "targets", targets)
    if targets.shape != a.shape[:-1]:
        raise ValueError(
            f"{name}: targets has shape {show_shape(targets.shape)}, expected "
            f"{show_shape(a.shape[:-1])}: 1 or -1 per pair of vectors."
        )
    return require_one_of(name, targets.astype(a.dtype), -1, 1)


def _deltas(outputs: Any, *deltas: jax.Array) -> Any:
    """Deltas in the structure and the dtypes of the outputs."""
    own = [d.astype(y.dtype) for d, y in zip(deltas, outputs, strict=True)]
    return jax.tree.structure(outputs).unflatten(own)
