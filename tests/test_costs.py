"""What a sweep costs by the compiler's count: FLOP and bytes, never time."""

import itertools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from oracles import value_and_grad_function

import jaxbp as bp
from jaxbp.training.kfac.inverses import natural

pytestmark = [
    pytest.mark.usefixtures("as_shipped"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts by the compiler for CPUs"),
]
SIZES, N = (784, 512, 512, 10), 128


def network(activation=bp.relu):
    hidden = [part for units in SIZES[1:-1] for part in (bp.dense(units), activation())]
    return bp.chain(*hidden, bp.dense(SIZES[-1]))


def cost(function, net):
    """(FLOP, temporary bytes) of the compiled function of (params, inputs, labels)."""
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), SIZES[:1])[0])
    inputs = jax.ShapeDtypeStruct((N, SIZES[0]), jnp.float32)
    labels = jax.ShapeDtypeStruct((N,), jnp.int32)
    compiled = jax.jit(function).lower(params, inputs, labels).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def explicit(net, read=None):
    if read is None:
        return bp.value_and_grad(net, bp.softmax_cross_entropy)
    return bp.backprop(net, bp.softmax_cross_entropy, read=read)


def autodiff(net):
    return value_and_grad_function(net, optax.softmax_cross_entropy_with_integer_labels)


WEIGHTS = [i * o for i, o in itertools.pairwise(SIZES)]
FORWARD = 2 * N * sum(WEIGHTS)
DX = FORWARD - 2 * N * WEIGHTS[0]  # nobody asks for the derivative by the network's input
DW = FORWARD
# What is not a matrix product: activations, the loss, biases and norms, about a hundredth of it.
SMALL = 0.0125 * FORWARD
# Each operand of a norm is read twice: for its largest entry, and for the squares in units of it.
OPERANDS = N * (sum(SIZES[:-1]) + sum(SIZES[1:]))
# XLA's compiler for CPUs forms the squares of a sum of squares up to JAX 0.10.0, not in 0.10.2.
SQUARES = 4 * N * 2 * sum(SIZES) if jax.__version_info__ < (0, 10, 2) else 0


def test_a_gradient_is_its_matrix_products_and_no_more():
    flop, _ = cost(explicit(network()), network())
    assert FORWARD + DX + DW <= flop <= FORWARD + DX + DW + SMALL


@pytest.mark.parametrize(
    "activation",
    [bp.relu, bp.sigmoid, bp.tanh, bp.leaky_relu, bp.elu, bp.softplus, bp.silu, bp.gelu,
     lambda: bp.gelu(approximate=False)],
)  # fmt: skip
def test_explicit_takes_no_more_than_autodiff(activation):
    net = network(activation)
    flop, temporary = cost(explicit(net), net)
    peer_flop, peer_temporary = cost(autodiff(net), net)
    assert flop <= 1.001 * peer_flop
    # Of gelu the compiler holds one [N, O] more: it is a long computation, made in two pieces.
    more = 4 * N * max(SIZES[1:]) if "gelu" in activation().name else 0
    assert temporary <= peer_temporary + more


def test_norms_beside_the_gradient_cost_next_to_nothing():
    net = network()
    plain_flop, plain_bytes = cost(explicit(net), net)
    flop, temporary = cost(explicit(net, {"grads": bp.mean, "norms": bp.sq_norms}), net)
    assert flop <= 1.01 * plain_flop
    # An array of deltas, [N, O], stays until it is read for the second time.
    assert temporary <= 1.1 * plain_bytes + 4 * N * max(SIZES[1:]) + SQUARES


def test_what_is_not_asked_for_is_not_computed():
    net = network()
    flop, _ = cost(explicit(net, bp.sq_norms), net)
    assert FORWARD + DX <= flop <= FORWARD + DX + SMALL + 4 * OPERANDS
    values_alone, _ = cost(lambda *args: explicit(net, bp.mean)(*args)[0], net)
    assert values_alone <= FORWARD + SMALL


def test_norms_never_form_the_gradients_they_are_of():
    net = network()
    _, temporary = cost(explicit(net, bp.sq_norms), net)
    gradients_of_all = 4 * N * sum(WEIGHTS)
    assert temporary < 0.02 * gradients_of_all + SQUARES


def beside(read, error=None):
    """The gradient, and a reading of another error's sweep over the same forward pass."""

    def make(net):
        gradient = explicit(net)
        other = bp.backprop(net, bp.softmax_cross_entropy, read=read, error=error)

        def function(params, inputs, labels):
            _, answer = other(params, inputs, labels, error_key=jax.random.key(0))
            return gradient(params, inputs, labels), answer

        return function

    return make


def gram_and_gradient(net):
    sweep = explicit(net, {"grads": bp.mean, "signals": bp.keep})

    def function(params, inputs, labels):
        values, answers = sweep(params, inputs, labels)
        return values, answers["grads"], bp.gram(answers["signals"])

    return function


def noise_and_gradient(net):
    sweep = explicit(net, {"grads": bp.mean, "signals": bp.keep})

    def function(params, inputs, labels):
        values, answers = sweep(params, inputs, labels)
        return values, answers["grads"], bp.gradient_noise(answers["signals"], answers["grads"])

    return function


def clip(net, sweeps):
    return bp.reweighted(net, bp.softmax_cross_entropy, bp.clip_weights(1.0), sweeps=sweeps)


CLASSES = SIZES[-1]
INPUT_FACTORS = 2 * N * sum((i + 1) ** 2 for i in SIZES[:-1])
DELTA_FACTORS = 2 * N * sum(o * o for o in SIZES[1:])
GRAMS = 2 * N * N * sum(i + o for i, o in itertools.pairwise(SIZES))  # the biases share theirs


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda net: explicit(net, {"grads": bp.mean, "q": bp.second_moment}), DW),
        (lambda net: explicit(net, {"grads": bp.mean, "q": bp.variance}), DW),
        (beside(bp.diagonal, bp.sampled), DX + DW),
        (beside(bp.diagonal, bp.ggn_columns), CLASSES * DX + DW),
        (beside(bp.kronecker, bp.sampled), DX + INPUT_FACTORS + DELTA_FACTORS),
        (beside(bp.kronecker, bp.ggn_columns), CLASSES * (DX + DELTA_FACTORS) + INPUT_FACTORS),
        (gram_and_gradient, GRAMS),
        (noise_and_gradient, FORWARD),
        (lambda net: clip(net, 1), 0),
        (lambda net: clip(net, 2), DX),
    ],
    ids=["second moment", "variance", "GGN diagonal, MC", "GGN diagonal, exact", "KFAC", "KFLR",
         "gram", "noise", "clipped in one sweep", "clipped in two"],
)  # fmt: skip
def test_a_quantity_beside_the_gradient_is_its_matrix_products_and_no_more(make, more):
    net = network()
    flop, _ = cost(make(net), net)
    products = FORWARD + DX + DW + more
    assert products <= flop <= 1.04 * products


def test_two_sweeps_take_no_more_memory_than_the_gradient_and_one_keeps_the_deltas():
    net = network()
    _, plain = cost(explicit(net), net)
    _, one = cost(clip(net, 1), net)
    _, two = cost(clip(net, 2), net)
    deltas = 4 * N * sum(SIZES[1:])
    assert two <= 1.05 * plain + SQUARES
    assert one <= plain + deltas + SQUARES


def test_norms_and_clipped_sums_of_long_sequences_form_the_gradients_once():
    """The sums add up the gradients that the norms are computed from."""
    t, width = 256, 64
    net = bp.chain(*[bp.dense(width)] * 3, bp.flatten(), bp.dense(CLASSES))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), (t, width))[0])
    inputs = jax.ShapeDtypeStruct((N, t, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((N,), jnp.int32)

    def flop(function):
        return jax.jit(function).lower(params, inputs, labels).compile().cost_analysis()["flops"]

    gradient = flop(explicit(net))
    assert flop(explicit(net, {"grads": bp.mean, "norms": bp.sq_norms})) <= 1.02 * gradient
    assert flop(clip(net, 1)) <= 1.02 * gradient


def test_norms_of_kernels_beside_their_sum_need_no_memory():
    """On a CPU the gradient of one example is there at a time."""
    net = bp.chain(bp.conv(32, (3, 3)), bp.relu(), bp.conv(32, (3, 3)), bp.flatten(), bp.dense(2))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), (16, 16, 8))[0])
    inputs = jax.ShapeDtypeStruct((32, 16, 16, 8), jnp.float32)
    labels = jax.ShapeDtypeStruct((32,), jnp.int32)

    def temporary(function):
        compiled = jax.jit(function).lower(params, inputs, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    gradient = temporary(explicit(net))
    patches = 4 * 9 * 16 * 16 * 32  # of one example, in two layouts
    joint = temporary(explicit(net, {"grads": bp.mean, "norms": bp.sq_norms}))
    assert joint <= gradient + 2.1 * patches


def test_health_forms_nothing_and_reads_each_array_a_few_times():
    net = network()
    sweep, watched = explicit(net, {"g": bp.mean}), explicit(net, {"g": bp.mean, "h": bp.health})
    plain, _ = cost(sweep, net)
    flop, temporary = cost(watched, net)
    # The deltas of a weight are those of its bias.
    entries = N * (sum(SIZES[:-1]) + sum(SIZES[1:])) + sum(WEIGHTS) + sum(SIZES[1:])
    assert flop <= plain + 13 * entries
    # The deltas stay until they are read, and nothing else is stored, not even in 8 bits.
    assert temporary <= 4 * N * sum(SIZES[1:]) + sum(WEIGHTS) / 2
    params, _ = net.init(jax.random.key(0), SIZES[:1])
    _, record = jax.eval_shape(watched, params, jnp.zeros((N, SIZES[0])), jnp.zeros(N, jnp.int32))
    # Numbers and an example of a weight's inputs and of the deltas, and numbers of the gradient.
    assert len(jax.tree.leaves(record)) == len(WEIGHTS) * (5 + 3) + len(jax.tree.leaves(params))


def test_a_natural_gradient_is_two_products_with_each_weight():
    params = jax.eval_shape(lambda: network().init(jax.random.key(0), SIZES[:1])[0])
    sizes = [(i + 1, o) for i, o in itertools.pairwise(SIZES)]
    pairs = iter(
        bp.Kronecker(*(jax.ShapeDtypeStruct((k, k), jnp.float32) for k in size)) for size in sizes
    )
    inverses = tuple(next(pairs) if part else () for part in params)
    compiled = jax.jit(natural).lower(inverses, params).compile()
    products = sum(2 * i * o * (i + o) for i, o in sizes)
    assert products <= compiled.cost_analysis()["flops"] <= 1.001 * products


def test_steps_pass_their_inverses_on_where_they_lie():
    """XLA lays the results of both branches out alike, and LAPACK's would be transposed."""
    net, kfac = network(), bp.scale_by_kfac(every=10)
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), SIZES[:1])[0])
    state = jax.eval_shape(kfac.init, params)

    def update(grads, state):
        return kfac.update(grads, state, factors=state.factors)

    compiled = jax.jit(update, donate_argnums=1).lower(params, state).compile().as_text()
    (results,) = re.findall(r"= \((.*)\) conditional\(", compiled)
    layouts = re.findall(r"f32\[\d+,\d+\]\{([\d,]+)\}", results)
    assert len(layouts) == 2 * len(WEIGHTS)
    assert set(layouts) == {"1,0"}  # row by row


def equations(function, *args):
    """The primitives of a program, as it is traced."""
    return [equation.primitive.name for equation in jax.make_jaxpr(function)(*args).jaxpr.eqns]


def test_a_gradient_is_traced_in_fewer_equations_than_by_autodiff():
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(8, 2, causal=True)),
        bp.residual(bp.layer_norm(), bp.dense(16), bp.gelu(), bp.dense(8)),
    )
    net = bp.chain(bp.embedding(5, 8), bp.learned_positions(4), block, bp.layer_norm(), bp.dense(5))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), (4,))[0])
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    ours, theirs = (
        equations(make(net), params, tokens, tokens) for make in (explicit, autodiff_of_sequences)
    )
    assert len(ours) <= 0.85 * len(theirs)
    assert ours.count("dot_general") <= theirs.count("dot_general")


def autodiff_of_sequences(net):
    def values_of(logits, labels):
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels), axis=-1)

    return value_and_grad_function(net, values_of)


def test_a_lifted_product_is_traced_once_for_each_pass():
    sizes = (5, 4, 3, 2)
    params = [(jnp.ones((i, o)), jnp.ones(o)) for i, o in itertools.pairwise(sizes)]

    def model(params, x):
        for weight, bias in params:
            x = jnp.tanh(x @ weight + bias)
        return x

    lifted, params = bp.lift(model, params, jnp.ones((6, 5)))
    batch = jnp.ones((6, 5)), jnp.zeros(6, jnp.int32)
    traced = equations(explicit(lifted), params, *batch)
    layers = len(sizes) - 1
    assert traced.count("dot_general") <= 3 * layers  # forward, dx and dW


def test_equal_blocks_of_a_lifted_model_are_traced_once():
    def model(params, x):
        for weight, bias in params:
            x = jnp.tanh(x @ weight + bias)
        return x

    def traced(blocks):
        """The equations for a number of blocks; those of a program that runs often count once."""
        params = [(jnp.ones((5, 5)), jnp.ones(5))] * blocks
        lifted, params = bp.lift(model, params, jnp.ones((6, 5)))
        batch = jnp.ones((6, 5)), jnp.zeros(6, jnp.int32)
        own, programs = [], {}
        todo = [jax.make_jaxpr(explicit(lifted))(params, *batch).jaxpr]
        while todo:
            program = todo.pop()
            if id(program) not in programs:
                programs[id(program)] = program
                own += [equation.primitive.name for equation in program.eqns]
                called = (equation.params.get("jaxpr") for equation in program.eqns)
                todo += [closed.jaxpr for closed in called if closed is not None]
        return own

    few, many = traced(2), traced(5)
    assert many.count("tanh") == few.count("tanh")
    assert many.count("dot_general") - few.count("dot_general") == 3  # dW of each more block
    assert len(many) - len(few) <= 12 * 3


def test_columns_at_positions_hold_the_inputs_once():
    n, t, i, o, k = 8, 32, 256, 16, 10
    signal = bp.Outer(jnp.zeros((n, t, i)), jnp.zeros((n, t, o)))

    def diagonal(inputs, columns):
        return jax.vmap(
            lambda deltas: bp.diagonal(bp.Outer(inputs, deltas), columns="k"),
            axis_name="k",
            out_axes=None,
        )(columns)

    compiled = jax.jit(diagonal).lower(signal.inputs, jnp.zeros((k, n, t, o))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < signal.inputs.nbytes


def test_the_kernel_forms_no_jacobian():
    net = network()
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), SIZES[:1])[0])
    inputs = jax.ShapeDtypeStruct((N, SIZES[0]), jnp.float32)
    for make, entries in (
        (bp.neural_tangent_kernel, (N * CLASSES) ** 2),
        (bp.neural_tangent_kernel_per_class, N * N * CLASSES),
    ):
        memory = jax.jit(make(net)).lower(params, inputs).compile().memory_analysis()
        jacobian = 4 * N * CLASSES * sum(WEIGHTS)
        assert memory.temp_size_in_bytes < 12 * 4 * entries + 0.01 * jacobian


def test_inference_keeps_no_cache():
    """The derivative that gelu keeps for its way back is not computed where nobody goes back."""
    net = network(bp.gelu)
    both, _ = cost(lambda params, x, _: net.forward(params, x), net)
    outputs, _ = cost(lambda params, x, _: net.forward(params, x)[0], net)
    assert outputs < both


def gpt_in_a_stack(layers=16, units=64):
    """A small transformer, so deep that its parameters outweigh everything that a step computes."""
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(units, 2, causal=True)),
        bp.residual(bp.layer_norm(), bp.dense(4 * units), bp.gelu(), bp.dense(units)),
    )
    return bp.chain(bp.embedding(64, units), bp.stack(bp.remat(block), layers), bp.dense(64))


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_fused_step_never_holds_the_gradients_of_a_stack(max_norm):
    net, optimizer = gpt_in_a_stack(), optax.adam(1e-3)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    state = jax.eval_shape(lambda: bp.init_state(net, optimizer, jax.random.key(0), (8,)))
    params = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))

    def temporary(**options):
        step = bp.make_step(net, bp.softmax_cross_entropy, optimizer, **options)
        return step.lower(state, tokens, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporary() > params
    # With a clip, the operands of all layers stay until the norm is known.
    assert temporary(fused=True, max_norm=max_norm) < (0.5 if max_norm is None else 0.75) * params
