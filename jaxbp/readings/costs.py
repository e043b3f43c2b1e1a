"""Costs: chooses the cheaper of several ways to compute a norm or an inner product of gradients.

`mean`, `sq_norms`, `per_example` and `gram` call these functions. Their results depend only on
shapes, so the choice is made when the code is traced. The constants were measured on a CPU.
"""

import math
from typing import Any

from jax import export

from jaxbp.signals.conv_products import suits_blocks
from jaxbp.signals.kinds import Conv, Outer


def gram_is_less_work(i: int, o: int, *, pairs: int, rows: int, products: int) -> bool:
    """Whether inner products of gradients cost less from Gram matrices than from the gradients.

    For gradients [I, O] of the form sum_t x_t d_t^T, the number of multiplications is

        Gram matrices   sum_st (x_s . x_t) (d_s . d_t)            pairs (I + O)
        gradients       form the gradients and multiply them      (rows + products) I O

    Forming gradients also writes them to memory. Measured on a CPU, both ways take the same time
    where the second has 1.3 to 2 times fewer multiplications (I and O from 64 to 512, T from 2 to
    256). The factor 3/2 stands for that.

    Args:
      i: I, the number of inputs.
      o: O, the number of outputs.
      pairs: the number of pairs of positions: T^2 for the norm of one example, N T M S for N
        examples with T positions and M others with S.
      rows: the number of positions from which gradients are formed: T for one example, N T + M S
        for N and M examples.
      products: the number of inner products: 1 for one example, N M for N and M examples.
    """
    return pairs * (i + o) < 1.5 * (rows + products) * i * o


def by_place_is_less_work(signal: Conv) -> bool:
    """Whether to compute a kernel's per-example gradients one place of the kernel at a time.

    There are three ways to compute the norm of an example's gradient, for a kernel with K places
    and G groups:

        Gram matrices   of the patches [T, K I / G] and of the deltas        (`gram_is_less_work`)
        patches         form the patches, and from them the gradient [K I / G, O / G]
        places          form the gradient of one place at a time, [I / G, O / G]

    Patches and places take the same number of multiplications, but patches have to be written to
    memory and are K times as large as the images. So the result is true where Gram matrices are not
    less work and there is more than one input channel. Time of places, measured on a CPU:

        against patches, 8 x 8 to 32 x 32 images, 3 to 64 inputs, kernel of 3 x 3     0.3 to 0.9
        against patches, sequences, or a kernel of 7 x 7 on 3 inputs                  1.1
        against patches, one input, where a place leaves only vectors to multiply     1.8
        against Gram matrices, where those are less work (few positions)              1.4 to 6
    """
    seen = signal.deltas if signal.geometry.transposed else signal.inputs
    return seen.shape[-1] > 1 and forming_is_less_work(signal)


def forming_is_less_work(signal: Outer | Conv, *, with_sum: bool = False) -> bool:
    """Whether the norms of examples cost less from their gradients than from Gram matrices.

    Args:
      signal: the operands of a matrix or a kernel.
      with_sum: whether the sum of the gradients, weighted or not, is needed too. It is an addition
        for each entry if the gradients are formed, and a product over all positions if not.
    """
    inputs, outputs, groups, places = signal.inputs.shape, signal.deltas.shape, 1, 1
    if isinstance(signal, Conv):
        groups, places = signal.geometry.groups, math.prod(signal.geometry.kernel)
        if signal.geometry.transposed:
            inputs, outputs = outputs, inputs
    t = math.prod(outputs[1:-1])
    i, o = places * inputs[-1] // groups, outputs[-1] // groups
    if t == 1:
        return False
    if with_sum:
        return t * t * (i + o) + t * i * o > 1.5 * (t + 1) * i * o
    return not gram_is_less_work(i, o, pairs=t * t, rows=t, products=1)


def one_by_one_is_less_work(signal: Conv) -> bool:
    """Whether a CPU forms the gradients of a kernel one example after another.

    All places of the kernel are then one product of matrices, as in a `block_gradient`. XLA's CPU
    compiler runs it on all cores, and the gradient is summed and measured while it is in the cache.
    Time against places, on 2 cores: 0.75 for 16 x 16 images of 64 channels to 64 outputs, 0.81 for
    14 x 14 of 16 to 32, and 1.07 for 32 x 32 of 3 to 64 (JAX 0.10.2).
    """
    return forming_is_less_work(signal) and suits_blocks(signal.inputs, signal.geometry)


def likely_size(size: Any) -> int:
    """A size by which to choose; a symbolic one of `jax.export` is taken for a large batch."""
    return 1024 if export.is_symbolic_dim(size) else size
