"""What test_sharded_parameters.py runs in a process with 8 devices: parameters that are divided.

XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=tests \\
    python on_meshes.py CHECK:MODE...
"""

import collections
import contextlib
import functools
import itertools
import re
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbp as bp
from jaxbp.signals.stacked import stack_axes
from jaxbp.training.kfac import inverses
from jaxbp.types import is_shape

KEY = jax.random.key(1)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
LOSS = bp.softmax_cross_entropy
N, CLASSES = 64, 8  # the compiler gathers the examples of a smaller batch, not the weights


def make_mesh(kind, *sizes, names=("data", "model")):
    devices = jax.devices()[: int(np.prod(sizes))]
    kinds = (KINDS[kind],) * len(sizes)
    return jax.make_mesh(sizes, names[: len(sizes)], axis_types=kinds, devices=devices)


def place(mesh, spec, tree):
    """A tree on a mesh, all of it with one spec; arrays, or only their shapes."""

    def placed(leaf):
        sharding = NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(placed, tree)


def divide(mesh, params):
    """Each parameter with its largest axis divided over "data", if it can be; no axis of stacks."""

    def spec(leaf, axes):
        divisible = [i for i in range(axes, leaf.ndim) if leaf.shape[i] % mesh.shape["data"] == 0]
        largest = max(divisible, key=lambda i: leaf.shape[i], default=None)
        return P(*("data" if i == largest else None for i in range(leaf.ndim)))

    return jax.tree.map(
        lambda leaf, axes: place(mesh, spec(leaf, axes), leaf), params, stack_axes(params)
    )


def context(mesh):
    """The mesh has to be set in the explicit mode alone."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def assert_divided_as(params, tree):
    for param, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True):
        assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), (
            leaf.sharding,
            leaf.shape,
        )


def collectives(compiled):
    """How many collectives a program has of each kind."""
    pattern = r"= (\S.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("
    return collections.Counter(name for _, name in re.findall(pattern, compiled.as_text()))


def deep(width, layers):
    block = bp.residual(bp.dense(2 * width), bp.tanh(), bp.dense(width))
    return bp.chain(
        bp.dense(width), bp.stack(bp.remat(block), layers), bp.layer_norm(), bp.dense(CLASSES)
    )


def problem(net, width, n=N):
    params, _ = net.init(jax.random.key(0), (width,))
    x = jax.random.normal(jax.random.key(1), (n, width))
    return params, x, jnp.arange(n) % CLASSES


def gradients_are_divided_as_their_parameters(kind):
    net = deep(16, 2)
    sweep = bp.backprop(net, LOSS, read={"mean": bp.mean, "norms": bp.sq_norms})

    def call(params, x, labels):
        readings = sweep(params, x, labels)[1]
        return readings.pop("norms"), readings

    assert_divided(kind, net, call)


def readings_are_divided_as_their_parameters(kind):
    net = deep(16, 2)
    sweep = bp.backprop(net, LOSS, read={"squares": bp.second_moment, "norms": bp.sq_norms})
    diagonal = bp.backprop(net, LOSS, read=bp.diagonal, error=bp.ggn_columns)
    clipped = bp.reweighted(net, LOSS, bp.clip_weights(1.0), sweeps=2)
    private = bp.private_gradient(net, LOSS, max_norm=1.0, noise_multiplier=0.5, batch_size=N)
    product = bp.hessian_vector_product(net, LOSS)

    def call(params, x, labels):
        readings = sweep(params, x, labels)[1]
        return readings.pop("norms"), {
            "gradient": bp.value_and_grad(net, LOSS)(params, x, labels)[1],
            "two sweeps": clipped(params, x, labels).grads,
            "private": private(params, x, labels, key=KEY).grads,
            "diagonal": diagonal(params, x, labels)[1],
            "product": product(params, x, labels, params),
            **readings,
        }

    assert_divided(kind, net, call)


def assert_divided(kind, net, call):
    """`call` returns norms, divided by examples, and a dict of trees, divided as parameters are."""
    mesh, call = make_mesh(kind, 8), jax.jit(call)
    params, x, labels = problem(net, 16)
    divided = divide(mesh, params)
    with context(mesh):
        got = call(divided, *place(mesh, P("data"), (x, labels)))
    assert_close(got, call(params, x, labels))
    norms, trees = got
    for tree in trees.values():
        assert_divided_as(divided, tree)
    for leaf in jax.tree.leaves(norms):
        by_examples = NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "data"))
        assert leaf.sharding.is_equivalent_to(by_examples, leaf.ndim), leaf.sharding


def memory_falls_with_the_devices(kind):
    """The bytes of each device, temporary ones and those of the results."""
    width, net = 32, deep(32, 8)
    calls = (
        bp.value_and_grad(net, LOSS),
        bp.backprop(net, LOSS, read={"mean": bp.mean, "squares": bp.second_moment}),
        bp.reweighted(net, LOSS, bp.clip_weights(1.0), sweeps=2),
    )
    for call in calls:
        temporary, results = [], []
        for devices in (1, 2, 4, 8):
            mesh = make_mesh(kind, devices)
            params, x, labels = jax.eval_shape(lambda: problem(net, width, 256))
            arrays = divide(mesh, params), *place(mesh, P("data"), (x, labels))
            with context(mesh):
                memory = jax.jit(call).lower(*arrays).compile().memory_analysis()
            temporary.append(memory.temp_size_in_bytes)
            results.append(memory.output_size_in_bytes)
        for more, less in itertools.pairwise(temporary):
            assert less < 0.8 * more, temporary
        for more, less in itertools.pairwise(results):
            assert less < 0.6 * more, results


COLUMN = {"weight": P(None, "model"), "bias": P("model")}
ROW = {"weight": P("model", None), "bias": P()}


def blocks_of_two_matrices_take_two_sums(kind):
    """As by hand: the outputs, and dx, are each summed once over the devices of a block."""
    width = 8
    heads = bp.cross_attention(width, 4)
    for layer, specs, twice in (
        (bp.chain(bp.dense(4 * width), bp.tanh(), bp.dense(width)), (COLUMN, (), ROW), False),
        (heads, {"query": COLUMN, "key": COLUMN, "value": COLUMN, "out": ROW}, True),
    ):
        x, dy = jax.random.normal(jax.random.key(1), (2, 8, 3, width))

        def inputs(x, twice=twice):
            return (x, x) if twice else x

        def forward(params, x, layer=layer, inputs=inputs):
            return layer.forward(params, inputs(x))[0]

        def backward(params, x, dy, read=bp.total, layer=layer, inputs=inputs):
            _, cache = layer.forward(params, inputs(x))
            dx, readings = layer.backward(params, cache, dy, read=read)
            return sum(dx) if isinstance(dx, tuple) else dx, readings

        norms = functools.partial(backward, read=bp.sq_norms)
        shape = jax.tree.map(lambda x: x.shape[1:], inputs(x))
        params, _ = layer.init(jax.random.key(0), shape)
        want = forward(params, x), backward(params, x, dy), norms(params, x, dy)
        for names in (("model",), ("data", "model")):
            mesh = make_mesh(kind, *((4,) if len(names) == 1 else (2, 4)), names=names)
            divided = jax.tree.map(lambda p, spec, mesh=mesh: place(mesh, spec, p), params, specs)
            rows = place(mesh, P("data") if "data" in names else P(), (x, dy))
            with context(mesh):
                first = jax.jit(forward).lower(divided, rows[0]).compile()
                second = jax.jit(backward).lower(divided, *rows).compile()
                got = (
                    first(divided, rows[0]),
                    second(divided, *rows),
                    jax.jit(norms)(divided, *rows),
                )
            assert_close(got, want)
            assert_divided_as(divided, got[1][1])
            # Forward the outputs. Backward dx, and over "data" the gradients.
            assert collectives(first) == {"all-reduce": 1}
            assert collectives(second) == {"all-reduce": len(names)}


def kfac_shares_the_inversion(kind):
    mesh, net = make_mesh(kind, 8), deep(8, 3)
    factors_of, key = bp.kfac_factors(net, LOSS), jax.random.key(3)
    params, x, labels = problem(net, 8)
    counts = collections.Counter()

    def count(device, size):
        counts[int(device), int(size)] += 1

    def counted(matrix, plain=inverses._inverse):
        if jax.sharding.get_abstract_mesh().manual_axes:
            device = jax.lax.axis_index("data")
            jax.debug.callback(count, device, len(matrix))
        return plain(matrix)

    inverses._inverse = counted
    kfac = bp.scale_by_kfac(lambda params: factors_of(params, x, labels, key=key), damping=0.1)

    @jax.jit
    def step(params, state, x, labels):
        factors = factors_of(params, x, labels, key=key)
        grads = bp.value_and_grad(net, LOSS)(params, x, labels)[1]
        updates, state = kfac.update(grads, state, params, factors=factors)
        return updates, state

    want = step(params, kfac.init(params), x, labels)
    divided = divide(mesh, params)
    for own in (divided, place(mesh, P(), params)):
        counts.clear()
        with context(mesh):
            got = step(own, kfac.init(own), *place(mesh, P("data"), (x, labels)))
        jax.effects_barrier()
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)
        assert_divided_as(own, got[0])
        work = collections.Counter()
        for (device, size), times in counts.items():
            work[device] += times * size**3
        assert sum(counts.values()) == 2 * (2 + 3 * 2 + 1), counts  # the bias of the norm too
        assert len(work) == 8
        assert max(work.values()) < 0.3 * sum(work.values()), work


def every_layer_takes_divided_parameters(kind):
    wrong = []
    for devices in (2, 3, 5):
        mesh = make_mesh(kind, devices)
        for name, case in {**cases.LAYERS, **cases.NETWORKS}.items():
            layer, shape = case.make(), case.shape
            params = jax.eval_shape(lambda layer=layer, s=shape: layer.init(KEY, s)[0])
            dtype, n = jnp.int32 if case.vocabulary else float, 2 * devices
            x = jax.tree.map(
                lambda s, n=n, dtype=dtype: jax.ShapeDtypeStruct((n, *s), dtype),
                shape,
                is_leaf=is_shape,
            )

            def read(signal):
                return bp.mean(signal), bp.sq_norms(signal)

            def call(params, x, layer=layer, read=read):
                y, cache = layer.forward(params, x, key=KEY)
                return layer.backward(params, cache, y, read=read)

            with context(mesh):
                try:
                    jax.jit(call).trace(divide(mesh, params), place(mesh, P("data"), x))
                except Exception as error:
                    wrong.append((name, devices, str(error)[:200]))
    assert not wrong, wrong


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for argument in sys.argv[1:]:
        check, kind = argument.split(":")
        globals()[check](kind)
        print(argument, "passed", flush=True)
