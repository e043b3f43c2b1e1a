"""Direct feedback: the error goes from the outputs of a chain directly to each of its parts.

Backpropagation carries the error from part to part, and each part waits for the one after it. With
direct feedback every part has its own matrix from the outputs to itself. So a backward pass needs
no matrix product between parts, and could visit all parts at once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.combinators.compose import Direct, chain
from jaxbp.rules.feedback import FEEDBACK_STREAM, exact, wrong_state
from jaxbp.types import Layer, PyTree, Rule, Shape, exportable, is_shape, show_shapes, split_keys

__all__ = ["DirectState", "direct_feedback"]


@exportable
class DirectState(NamedTuple):
    """The state of `direct_feedback`.

    Attributes:
      matrices: the matrix B of each block but the last.
      blocks: the state of the rule inside each block.
    """

    matrices: tuple[jax.Array, ...]
    blocks: tuple[PyTree, ...]


def direct_feedback(
    *blocks: Layer, scale: float = 1.0, rules: Sequence[Rule] | None = None
) -> Rule:
    """Direct feedback alignment: the error at a chain's outputs goes directly to each block.

        dy_i = delta B_i,   B_i [C, O_i] fixed and random;   the last block gets delta

    The network is `chain(*blocks)`. Inside a block, which may be a network, the error is carried
    back exactly, or by another rule. No block waits for another. Only the dx of the first block is
    used: it is the dx of the chain, for the error that the first block got. A single block is also
    the last, and gets delta.

    Blocks whose outputs have the positions of the chain's outputs use one matrix at all positions.
    For other blocks B maps all outputs of the chain to all outputs of the block.

    Args:
      *blocks: the parts of the chain, each with its nonlinearity: `chain(dense(64), tanh())`.
      scale: the entries of B are standard normal numbers times `scale / sqrt(O_i)`.
      rules: a rule for each block; None means `exact()` for all. For a block that is itself a
        chain, the rule may be another `direct_feedback`.

    Raises:
      TypeError: a block is not a Layer.
      ValueError: there are no blocks, or there is not one rule for each; on `make`, the network is
        not the chain of the blocks; on `choose`, the state belongs to another rule or network.

    References:
      "Direct Feedback Alignment Provides Learning in Deep Neural Networks", Nøkland, 2016.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> hidden = [bp.chain(bp.dense(8), bp.tanh()) for _ in range(3)]
      >>> net, rule = bp.chain(*hidden, bp.dense(2)), bp.direct_feedback(*hidden, bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> rule_state = rule.make(jax.random.key(1), net, (3,))
      >>> [matrix.shape for matrix in rule_state.matrices]
      [(2, 8), (2, 8), (2, 8)]
      >>> grads = bp.value_and_grad(net, bp.squared_error, rule=rule)
      >>> value, _ = grads(params, jnp.ones((5, 3)), jnp.zeros((5, 2)), rule_state=rule_state)
    """
    chained = chain(*blocks)
    if not blocks:
        raise ValueError("direct_feedback: takes the blocks of a chain; got none.")
    inner_rules = [exact() for _ in blocks] if rules is None else list(rules)
    if len(inner_rules) != len(blocks) or not all(isinstance(rule, Rule) for rule in inner_rules):
        raise ValueError(
            f"direct_feedback: got {len(inner_rules)} rules for {len(blocks)} blocks; it takes a "
            "Rule for each."
        )
    name = "direct_feedback"

    def make(key, net, shape):
        if _parameters(net, key, shape) != _parameters(chained, key, shape):
            raise ValueError(
                f"{name}: the network is not the chain of the blocks: {net.name} has other "
                f"parameters than {chained.name}."
            )
        init_key, key, block_key = jax.random.split(jax.random.fold_in(key, FEEDBACK_STREAM), 3)
        states, shapes, dtypes = [], [], []
        for i, (block, rule) in enumerate(zip(blocks, inner_rules, strict=True)):
            states.append(rule.make(jax.random.fold_in(block_key, i), block, shape))
            params, shape = block.init(init_key, shape)
            if not is_shape(shape):
                raise ValueError(
                    f"{name}: block {i + 1} has several outputs, {show_shapes(shape)}; each block "
                    "takes one matrix, to one array."
                )
            shapes.append(shape)
            dtypes += [leaf.dtype for leaf in jax.tree.leaves(params)]
        dtype = jnp.result_type(*dtypes) if dtypes else float
        draw = initializers.variance_scaling(1.0, "fan_out", "normal", dtype=dtype)
        sizes = [_direct_sizes(shapes[-1], shape) for shape in shapes[:-1]]
        keys = jax.random.split(key, len(blocks))
        matrices = [jnp.asarray(scale, dtype) * matrix for matrix in map(draw, keys, sizes)]
        return DirectState(tuple(matrices), tuple(states))

    def of_blocks(state, params, key):
        """The rule, state, parameters and key of each block."""
        if not isinstance(state, DirectState):
            raise wrong_state(name, f"it is {type(state).__name__}, not DirectState")
        if not isinstance(params, tuple) or len(params) != len(blocks):
            raise wrong_state(name, f"the parameters are not of a chain of {len(blocks)} blocks")
        return zip(inner_rules, state.blocks, params, split_keys(key, len(blocks)), strict=True)

    def choose(state, params, *, key=None):
        parts = [
            rule.choose(own, part, key=part_key)
            for rule, own, part, part_key in of_blocks(state, params, key)
        ]
        return Direct(tuple(parts), state.matrices)

    def update(state, params, *, move, key=None):
        def move_at(i):
            return lambda tree: move((*params[:i], tree, *params[i + 1 :]))[i]

        states = [
            rule.update(own, part, move=move_at(i), key=part_key)
            for i, (rule, own, part, part_key) in enumerate(of_blocks(state, params, key))
        ]
        return state._replace(blocks=tuple(states))

    return Rule(name, make, choose, update)


def _parameters(net: Layer, key: jax.Array, shape: Shape) -> PyTree:
    """The tree of the shapes and dtypes of a network's parameters, to compare networks by."""
    params = jax.eval_shape(lambda key: net.init(key, shape)[0], key)
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)


def _direct_sizes(outputs: Shape, shape: Shape) -> tuple[int, int]:
    """The shape of the matrix from a chain's outputs to a part's, for the shapes of both."""
    if outputs[:-1] == shape[:-1]:
        return outputs[-1], shape[-1]
    return math.prod(outputs), math.prod(shape)
