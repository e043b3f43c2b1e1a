"""Costs: which way to compute a reading takes fewer multiplications, decided from static shapes.

The constants were measured on a CPU.
"""

import math


def gram_is_less_work(i, o, *, pairs, rows, products):
    """Whether inner products of gradients [I, O] cost less from Gram matrices of their operands.

    With positions there are two ways to an inner product of gradients sum_t x_t d_t^T:

      Gram matrices   sum_st (x_s . x_t) (d_s . d_t)      pairs (I + O) multiplications
      gradients       form them, and multiply those       (rows + products) I O

    The second also writes what it forms. On a CPU the times were measured to cross where it has
    1.3 to 2 times fewer multiplications (I and O from 64 to 512, T from 2 to 256); hence 3/2.

    Args:
      i: inputs.
      o: outputs.
      pairs: of positions that meet: T^2 for the norm of one example, N T M S for N with M others.
      rows: positions from which gradients are formed: T for one example, N T + M S for N and M.
      products: inner products: 1 for one example, N M for N with M others.
    """
    return pairs * (i + o) < 1.5 * (rows + products) * i * o


def by_place_is_less_work(signal):
    """Whether a kernel's gradients cost less for one of its places after another than by patches.

    There are three ways to the norm of sum_t x_u d_t^T over all K places, of G groups:

      Gram matrices   of the patches [T, K I / G] and of the deltas       (`gram_is_less_work`)
      patches         form the gradients [K I / G, O / G], and square
      places          form those of one place at a time, [I / G, O / G]

    The last two multiply as often, but patches are K times the images, and have to be written.
    Where Gram matrices are not less work, places were measured on a CPU to take 0.3 to 0.9 of the
    time of patches (images of 8 x 8 to 32 x 32 with 3 to 64 inputs, 3 x 3 places), 1.1 for
    sequences and for 7 x 7 places of 3 inputs, and 1.8 for one input, of which a place leaves
    vectors. Where they are, with few positions, places took 1.4 to 6 times as long as they.
    """
    inputs, outputs, geometry = signal.inputs.shape, signal.deltas.shape, signal.geometry
    if geometry.transposed:
        inputs, outputs = outputs, inputs
    t = math.prod(outputs[1:-1])
    i, o = inputs[-1] // geometry.groups, outputs[-1] // geometry.groups
    i *= math.prod(geometry.kernel)
    return inputs[-1] > 1 and not gram_is_less_work(i, o, pairs=t * t, rows=t, products=1)
