"""What the library is compared with: automatic differentiation, and formulas written the slow way.

Autodiff appears in the tests here and nowhere else. Tolerances are here too.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

import jaxbp as bp
from jaxbp.signals.stacked import stack_axes

# How far two ways to compute the same may be apart, relative to the largest value, by dtype.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def assert_close(got, want):
    """Trees of the same structure, shapes and dtypes, and equal within their dtype's tolerance."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        tolerance = TOLERANCE.get(str(a.dtype), 0)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * (scale or 1), err_msg=jax.tree_util.keystr(path)
        )


def in_dtype(tree, dtype):
    """A tree with its floating-point arrays in another dtype."""

    def cast(a):
        if not is_float(a):
            return a
        known = not isinstance(a, jax.core.Tracer)
        return jnp.asarray(np.asarray(a).astype(dtype)) if known else a.astype(dtype)

    return map_operands(cast, tree)


def map_operands(function, tree):
    """A tree with a function applied to every array, but not to the way back of a `Through`."""

    def visit(node):
        if isinstance(node, bp.Through):
            return node._replace(signal=map_operands(function, node.signal))
        return function(node)

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, bp.Through))


def deltas_of(signal):
    """The deltas of a signal, of all of its uses."""
    if isinstance(signal, bp.Through):
        return deltas_of(signal.signal)
    return tuple(map(deltas_of, signal.signals)) if isinstance(signal, bp.Sum) else signal.deltas


def with_deltas(signal, deltas):
    """A signal with other deltas."""
    if isinstance(signal, bp.Through):
        return signal._replace(signal=with_deltas(signal.signal, deltas))
    if isinstance(signal, bp.Sum):
        return bp.Sum(tuple(map(with_deltas, signal.signals, deltas)))
    return signal._replace(deltas=deltas)


def operands_of(signal):
    """What of a signal has a derivative: the deltas of all of its uses, and its own inputs."""
    return deltas_of(signal), getattr(signal, "inputs", ())


def with_operands(signal, operands):
    """A signal with other operands, as `operands_of` gives them."""
    deltas, inputs = operands
    signal = with_deltas(signal, deltas)
    return signal._replace(inputs=inputs) if hasattr(signal, "inputs") else signal


def is_float(tree):
    """Whether an array is of floats, or each array of a tree."""
    return all(jnp.issubdtype(array.dtype, jnp.floating) for array in jax.tree.leaves(tree))


def dot(tree, other):
    """The inner product of two trees of arrays."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other)))


def by_example(tree):
    """Answers [N, ...] for each example, in stacks [L, N, ...], all with N first."""
    return jax.tree.map(lambda a, axes: np.moveaxis(a, axes, 0), tree, stack_axes(tree))


# A layer, or a network, is a tuple of functions, by which its compiled oracle is found again.
of_layer = functools.partial(jax.jit, static_argnums=0)
of_layer_and_loss = functools.partial(jax.jit, static_argnums=(0, 1))


def function_of(layer, x, key=None):
    """The layer as a function of what has a derivative: (parameters, x), or parameters alone."""
    if is_float(x):
        return lambda p, x: layer.forward(p, x, key=key)[0], (x,)
    return lambda p: layer.forward(p, x, key=key)[0], ()


@of_layer
def layer_vjp(layer, params, x, dy, key=None):
    """(dx, gradients) of the layer for the cotangent dy; dx is None for integers."""
    function, inputs = function_of(layer, x, key)
    grads, *dx = jax.vjp(function, params, *inputs)[1](dy)
    return dx[0] if dx else None, grads


def slope(function, x):
    """The derivative of an elementwise function."""
    return jax.grad(lambda x: jnp.sum(function(x)))(x)


@of_layer
def layer_jvp(layer, params, x, params_dot, x_dot, key=None):
    """J v of the layer."""
    function, inputs = function_of(layer, x, key)
    _, y_dot = jax.jvp(function, (params, *inputs), (params_dot, *([x_dot] if inputs else [])))
    return y_dot


def check_layer_by_finite_differences(layer, params, x, key=None):
    function, inputs = function_of(layer, x, key)
    check_grads(jax.jit(function), (params, *inputs), order=1, modes=["rev"])


@of_layer
def loss_delta(loss, outputs, targets):
    """The derivative of the sum of the examples' values."""
    return jax.grad(lambda y: jnp.sum(loss(y, targets)[0]))(outputs)


@of_layer
def loss_hessian(loss, outputs, targets):
    """The Hessian of one position's loss with respect to its outputs: outputs [O]."""
    return jax.hessian(lambda y: jnp.sum(loss(y[None], targets)[0]))(outputs)


def squared(outputs, targets):
    """The squared error of each example, not by the library's loss."""
    return jnp.sum((outputs - targets) ** 2 / 2, axis=range(1, outputs.ndim))


@of_layer_and_loss
def value_and_grad(net, values_of, params, x, targets, key=None):
    """The mean of `values_of(outputs, targets)` [N] and its gradient."""

    def objective(params):
        return jnp.mean(values_of(net.forward(params, x, key=key)[0], targets))

    return jax.value_and_grad(objective)(params)


def value_and_grad_function(net, values_of):
    """What a user of autodiff would compile."""

    def objective(params, x, targets):
        return jnp.mean(values_of(net.forward(params, x)[0], targets))

    return jax.value_and_grad(objective)


@of_layer_and_loss
def per_example_grads(net, values_of, params, x, targets, key=None):
    """The gradient of each example's own value, [N, ...]: a Jacobian, row by row."""

    def values(params):
        return values_of(net.forward(params, x, key=key)[0], targets)

    return jax.jacrev(values)(params)


@of_layer
def layer_per_example_grads(layer, params, x, dy, key=None):
    """The gradient of <y_n, dy_n> for each example, [N, ...]."""

    def values(params):
        return jax.vmap(dot)(layer.forward(params, x, key=key)[0], dy)

    if not jax.tree.leaves(params):
        return params  # jacrev wants at least one
    return jax.jacrev(values)(params)


def seen_by(geometry, counts, sizes):
    """Every t, k and the u that the window at t sees at its place k, if it is one of S."""
    for t in np.ndindex(*counts):
        for k in np.ndindex(*geometry.kernel):
            axes = zip(t, k, geometry.strides, geometry.dilation, geometry.padding, strict=True)
            u = tuple(s * t + d * k - before for t, k, s, d, (before, _) in axes)
            if all(0 <= at < size for at, size in zip(u, sizes, strict=True)):
                yield t, k, u


def images_of(signal):
    """The inputs and the deltas of a convolution's signal as [N, T, *S, C], and their sizes."""
    rank = len(signal.geometry.kernel)
    arrays = [np.asarray(a) for a in (signal.inputs, signal.deltas)]
    images = [a.reshape(len(a), -1, *a.shape[-1 - rank :]) for a in arrays]
    return *images, *(a.shape[2:-1] for a in images)


def convolution_gradients(signal):
    """Those of a kernel by their definition, one pair of an input and an output at a time."""
    geometry = signal.geometry
    inputs, deltas, sizes, out_sizes = images_of(signal)
    n, _, *_, i = inputs.shape
    o, groups = deltas.shape[-1], geometry.groups
    kernel = np.zeros((n, *geometry.kernel, i // groups, o))
    pair = (sizes, out_sizes) if geometry.transposed else (out_sizes, sizes)
    for t, k, u in seen_by(geometry, *pair):
        inputs_at, deltas_at = (t, u) if geometry.transposed else (u, t)
        x, d = inputs[(..., *inputs_at, slice(None))], deltas[(..., *deltas_at, slice(None))]
        for out in range(o):
            first = out // (o // groups) * (i // groups)
            seen = x[..., first : first + i // groups]
            kernel[(slice(None), *k, slice(None), out)] += np.sum(seen * d[..., out, None], axis=1)
    return kernel


def convolution_operands(signal):
    """For each group, what each output is made of [N, T, K I / G], and the deltas at it."""
    geometry = signal.geometry
    inputs, deltas, sizes, out_sizes = images_of(signal)
    rows = np.zeros((*inputs.shape[:2], *out_sizes, *geometry.kernel, inputs.shape[-1]))
    pair = (sizes, out_sizes) if geometry.transposed else (out_sizes, sizes)
    for t, k, u in seen_by(geometry, *pair):
        inputs_at, outputs_at = (t, u) if geometry.transposed else (u, t)
        rows[(..., *outputs_at, *k, slice(None))] = inputs[(..., *inputs_at, slice(None))]
    n, images = inputs.shape[:2]
    for x, d in zip(
        np.split(rows, geometry.groups, axis=-1), np.split(deltas, geometry.groups, axis=-1),
        strict=True,
    ):  # fmt: skip
        t = images * int(np.prod(out_sizes))
        yield x.reshape(n, t, -1), d.reshape(n, t, -1)


def signal_gradients(signal):
    """The gradient of each example by its definition: a loop over examples and positions."""
    if isinstance(signal, bp.Through):
        one_by_one = jax.jit(lambda rows: jax.lax.map(signal.back, rows))
        return one_by_one(signal_gradients(signal.signal))
    if isinstance(signal, bp.Sum):
        return sum(map(signal_gradients, signal.signals))
    if isinstance(signal, bp.Conv):
        return jnp.asarray(convolution_gradients(signal))
    deltas = np.asarray(signal.deltas)
    rows = []
    for n in range(len(deltas)):
        places = [(n, *t) for t in np.ndindex(deltas.shape[1:-1])]
        if isinstance(signal, bp.Bias):
            rows.append(sum(deltas[p] for p in places))
        elif isinstance(signal, bp.Lookup):
            table = np.zeros((len(signal.table), deltas.shape[-1]))
            for p in places:
                table[int(signal.indices[p])] += deltas[p]
            rows.append(table)
        elif isinstance(signal, bp.Scale):
            rows.append(sum(np.asarray(signal.inputs)[p] * deltas[p] for p in places))
        else:
            rows.append(sum(np.outer(np.asarray(signal.inputs)[p], deltas[p]) for p in places))
    return jnp.asarray(np.stack(rows))


@jax.custom_vjp
def _carried(x, weight, feedback):
    """x W, whose derivative goes back by B."""
    del feedback
    return x @ weight


def _carried_forward(x, weight, feedback):
    return x @ weight, (x, feedback)


def _carried_backward(kept, dy):
    x, feedback = kept
    return dy @ feedback.T, jnp.einsum("...i,...o->io", x, dy), jnp.zeros_like(feedback)


_carried.defvjp(_carried_forward, _carried_backward)


@jax.custom_vjp
def _leap(y, tap, matrix):
    """Both as they are; the derivative of y is that of the tap by B, and y's own is dropped."""
    del matrix
    return y, tap


def _leap_forward(y, tap, matrix):
    return (y, tap), (y, matrix)


def _leap_backward(kept, derivatives):
    y, matrix = kept
    _, error = derivatives
    if y.shape[:-1] == error.shape[:-1]:
        return jnp.einsum("...c,co->...o", error, matrix), error, jnp.zeros_like(matrix)
    dy = error.reshape(len(error), -1) @ matrix
    return dy.reshape(y.shape), error, jnp.zeros_like(matrix)


_leap.defvjp(_leap_forward, _leap_backward)


def forward_by_rule(blocks, params, tree, x):
    """The outputs of a chain of blocks, in which autodiff carries the error by another tree."""
    direct = isinstance(tree, bp.Direct)
    trees = tree.parts if direct else tree
    # Zeros that are added to the outputs, and so have the error at the outputs for a derivative.
    tap = jnp.zeros(jax.eval_shape(bp.chain(*blocks.parts).forward, params, x)[0].shape)
    for i, layers in enumerate(blocks.layers):
        for layer, own, carrier in zip(layers, params[i], trees[i], strict=True):
            if own:
                x = _carried(x, own["weight"], carrier["weight"]) + own.get("bias", 0.0)
            else:
                x, _ = layer.forward(own, x)
        if direct and i < len(blocks.layers) - 1:
            x, tap = _leap(x, tap, tree.matrices[i])
    return x + tap


def per_example_grads_by_rule(blocks, values_of, params, tree, x, targets):
    """The gradients of each example's own value, [N, ...], as a rule has them."""

    def values(params):
        return values_of(forward_by_rule(blocks, params, tree, x), targets)

    return jax.jit(jax.jacrev(values))(params)


def angle(a, b):
    """Between two arrays, in degrees."""
    a, b = np.ravel(a), np.ravel(b)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@of_layer
def jacobian(net, params, x, key=None):
    """The derivative of every output of every example by all parameters, [N, K, P]."""
    flat, unravel = ravel_pytree(params)

    def outputs(flat):
        return net.forward(unravel(flat), x, key=key)[0].reshape(len(x), -1)

    return jax.jacrev(outputs)(flat)


@of_layer
def output_hessians(loss, outputs, targets):
    """The Hessian of each example's loss by all of its outputs, [N, K, K]."""

    def hessian(y, t):
        def value(flat):
            return loss(flat.reshape(y.shape)[None], jax.tree.map(lambda a: a[None], t))[0][0]

        return jax.hessian(value)(y.ravel())

    return jax.vmap(hessian)(outputs, targets)


@of_layer_and_loss
def gauss_newton(net, loss, params, x, targets, key=None):
    """The Gauss-Newton matrix of each example's loss by all parameters, J^T H J, [N, P, P]."""
    rows = jacobian(net, params, x, key)
    outputs, _ = net.forward(params, x, key=key)
    return jnp.einsum("nkp,nkl,nlq->npq", rows, output_hessians(loss, outputs, targets), rows)


@of_layer_and_loss
def hessian(net, loss, params, x, targets, key=None):
    """The Hessian of the mean loss by all parameters, [P, P]."""
    flat, unravel = ravel_pytree(params)

    def objective(flat):
        return jnp.mean(loss(net.forward(unravel(flat), x, key=key)[0], targets)[0])

    return jax.hessian(objective)(flat)


def ravel(tree):
    """All leaves in one vector, of NumPy."""
    return ravel_examples(tree, axes=0)


def ravel_examples(tree, axes=1):
    """The leaves [N, ...] as one matrix [N, P] of NumPy, in the order of `ravel`."""
    rows = [np.reshape(leaf, (*np.shape(leaf)[:axes], -1)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(rows, axis=-1)


def recurrent_step(kind, params, x, state, heard=None):
    """A step of a recurrent cell for one example, gate by gate: x [I], a state of vectors [H].

    What comes back through the recurrent weights is `heard`, the outputs before if it is None.
    """
    outputs = state[0] if heard is None else heard
    h = len(state[-1])
    own = slice(None), *[slice(k * h, (k + 1) * h) for k in range(4)]

    def drive(gate):
        a = x @ params["weight"][:, own[gate]]
        return a + params["bias"][own[gate]] if "bias" in params else a

    def echo(gate):
        e = outputs @ params["recurrent"][:, own[gate]]
        return e + params["recurrent_bias"][own[gate]] if "recurrent_bias" in params else e

    if kind == "simple_rnn":
        return (jnp.tanh(drive(1) + echo(1)),)
    if kind == "relu":
        return (jnp.maximum(drive(1) + echo(1), 0),)
    if kind == "sigmoid":
        return (1 / (1 + jnp.exp(-drive(1) - echo(1))),)
    if kind == "lstm":
        i, f, o = (jax.nn.sigmoid(drive(gate) + echo(gate)) for gate in (1, 2, 4))
        memory = f * state[1] + i * jnp.tanh(drive(3) + echo(3))
        h = o * jnp.tanh(memory)
        return h @ params["projection"] if "projection" in params else h, memory
    r, z = (jax.nn.sigmoid(drive(gate) + echo(gate)) for gate in (1, 2))
    if "candidate" in params:
        new = jnp.tanh(drive(3) + (r * outputs) @ params["candidate"])
        return ((1 - z) * new + z * state[0],)
    return ((1 - z) * jnp.tanh(drive(3) + r * echo(3)) + z * state[0],)


def _first_state(kind, params):
    """That which is learned, or zero."""
    h = jnp.zeros(len(params["recurrent"]))
    memory = jnp.zeros(params["weight"].shape[1] // 4)
    return params.get("initial", (h, memory) if kind == "lstm" else (h,))


def recurrent_outputs(kind, params, x, *, mask=None, horizon=None, reverse=False):
    """The outputs of a recurrent layer, step by step; autodiff of them is cut at every horizon."""
    return recurrent_outputs_and_state(kind, params, x, None, mask, horizon, reverse)[0]


def recurrent_outputs_and_state(
    kind, params, x, first=None, mask=None, horizon=None, reverse=False
):
    """The same and the last state, from a first one [N, ...]."""
    t = x.shape[1]
    mask = jnp.ones(x.shape[:2], bool) if mask is None else jnp.broadcast_to(mask, x.shape[:2])

    def one(x, mask, first):
        state, outputs = _first_state(kind, params) if first is None else first, [None] * t
        for passed, now in enumerate(reversed(range(t)) if reverse else range(t)):
            if horizon and passed and passed % horizon == 0:
                state = jax.lax.stop_gradient(state)
            after = recurrent_step(kind, params, x[now], state)
            state = tuple(jnp.where(mask[now], a, b) for a, b in zip(after, state, strict=True))
            outputs[now] = state[0]
        return jnp.stack(outputs), state

    return jax.vmap(one)(x, mask, first)


def credit_by_definition(kind, rule, params, x, dy):
    """The gradients of each example, [N, ...], by influences that are carried forward in time.

    rtrl     M_t = D_t M_(t-1) + I_t, of the whole state by all parameters
    snap1    the same, with M_t set to zero where the state and the parameter are of two units
    eprop    D_t of the state at what was heard before, without the way through U
    """
    flat, unravel = ravel_pytree(params)
    first = jax.jacobian(lambda p: ravel_pytree(_first_state(kind, unravel(p)))[0])(flat)
    _, as_state = ravel_pytree(_first_state(kind, params))
    h = len(params["recurrent"])
    of_unit = [
        jnp.broadcast_to(jnp.arange(p.shape[-1]) % h, p.shape) for p in jax.tree.leaves(params)
    ]
    units = jnp.concatenate([u.ravel() for u in of_unit])
    units_of_state = jnp.arange(len(first)) % h

    def step(p, x, state, heard):
        return ravel_pytree(recurrent_step(kind, unravel(p), x, as_state(state), heard))[0]

    def one(x, dy):
        state, influence, gradient = ravel_pytree(_first_state(kind, params))[0], first, 0
        for now in range(len(x)):
            heard = as_state(state)[0]
            here = jax.jacobian(step)(flat, x[now], state, heard)
            transition = jax.jacobian(step, 2)(flat, x[now], state, heard)
            if rule != "eprop":
                through = jax.jacobian(step, 3)(flat, x[now], state, heard)
                transition = transition.at[:, : len(heard)].add(through)
            influence = transition @ influence + here
            if rule == "snap1":
                influence = jnp.where(units_of_state[:, None] == units, influence, 0)
            gradient = gradient + dy[now] @ influence[: len(heard)]
            state = step(flat, x[now], state, heard)
        return gradient

    return jax.vmap(unravel)(jax.jit(jax.vmap(one))(x, dy))
