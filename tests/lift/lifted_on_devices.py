"""Compares lifted models on 8 devices with one device; `test_lift_on_devices` starts it.

It is a process of its own, since it needs several devices, which are simulated:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=.:tests \\
        python tests/lift/lifted_on_devices.py NAME...
"""

import re
import sys
import traceback

import chex
import jax
import jax.numpy as jnp
import numpy as np
from functions import FUNCTIONS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from libraries import LIBRARIES
from opened import N

import jaxbp as bp
from experiments.common.programs import COLLECTIVES

DEVICES = 8
READINGS = {
    "mean": bp.mean,
    "sq_norms": bp.sq_norms,
    "variance": bp.variance,
    "kronecker": bp.kronecker,
    "per_example": bp.per_example,
}
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
# Not nnx attention: it has a softmax in 32 bits, whose rounding is all there is of the gradient of
# its keys' bias, which is zero.
MODELS = FUNCTIONS | {
    name: case.make for name, case in LIBRARIES.items() if name != "nnx attention"
}
COLLECTIVE = re.compile(rf"= .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(")
WHOLE = ("matrix functions", "solve by example", "routed experts", "convolutions")
KEY = jax.random.key(3)


def widened(x):
    """A batch of two examples for each device, no two of them the same."""

    def more(a):
        parts = [jnp.roll(a, i, 0) for i in range(2 * DEVICES // N)]
        if jnp.issubdtype(a.dtype, jnp.floating):
            parts = [part * (1 + 0.1 * i) for i, part in enumerate(parts)]
        return jnp.concatenate(parts)

    return jax.tree.map(more, x)


def passes_of(net, draws):
    """All readings of a backward pass, and the clipped gradient."""

    def loss(y, targets):
        terms = [
            jnp.square(a - t) for a, t in zip(*map(jax.tree.leaves, (y, targets)), strict=True)
        ]
        return sum(jnp.sum(term.reshape(term.shape[0], -1), axis=1) for term in terms)

    def passes(params, x, targets):
        key = {"key": KEY} if draws else {}
        sweep = bp.backprop(net, bp.loss_of(loss), read=READINGS)
        clipped = bp.reweighted(net, bp.loss_of(loss), bp.clip_weights(0.1))
        return {
            "backprop": sweep(params, x, targets, **key),
            "reweighted": clipped(params, x, targets, **key),
        }

    return passes


def assert_equal(got, want):
    """Equal up to rounding, relative to the largest entry of an array."""

    def close(a, b):
        scale = np.max(np.abs(b), initial=0, where=np.isfinite(b)) or 1
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, **TOLERANCE)

    chex.assert_trees_all_equal_structs(got, want)
    jax.tree.map(close, jax.device_get(got), jax.device_get(want))


def on_mesh(name, kind, passes, params, *batch):
    """The automatic or the explicit mode: the same numbers, and nothing is gathered."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(passes).lower(params, *batch).compile()
        got = compiled(params, *batch)
        if kind == AxisType.Explicit:
            shapes = jax.eval_shape(passes, params, *batch)
            assert shapes["backprop"][0].sharding.spec[0] == "data"
            for own in map(shapes["backprop"][1].get, ("sq_norms", "per_example")):
                for leaf in jax.tree.leaves(own):
                    assert "data" in leaf.sharding.spec, leaf
    # XLA gathers what it cannot divide, such as solvers, also of a batch, matrices that examples
    # choose, and some convolutions in groups.
    gathered = set(COLLECTIVE.findall(compiled.as_text())) - {"all-reduce"}
    assert not gathered or name in WHOLE, gathered
    return got


def in_shares(passes, params, *batch):
    """`shard_map`: what each device computes of its share, stacked."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda *args: jax.tree.map(lambda a: a[None], passes(*args)),
        mesh=mesh,
        in_specs=(P(), *[P("data")] * len(batch)),
        out_specs=P("data"),
    )
    return jax.jit(mapped)(params, *batch)


def by_share(passes, params, *batch):
    """The same calls on one device, share by share."""
    passes = jax.jit(passes)
    parts = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), batch)
    shares = [passes(params, *jax.tree.map(lambda a, i=i: a[i], parts)) for i in range(DEVICES)]
    return jax.tree.map(lambda *a: np.stack(a), *jax.device_get(shares))


def check(name):
    """One model in three modes."""
    model = MODELS[name]()
    net, params = model.lift()
    x = widened(model.inputs)
    y, _ = net.forward(params, x)
    given = (params, x, jax.tree.map(jnp.cos, y))
    passes = passes_of(net, model.options.get("draws", False))
    want = jax.jit(passes)(*given)
    modes = {
        "automatic": lambda: assert_equal(on_mesh(name, AxisType.Auto, passes, *given), want),
        "explicit": lambda: assert_equal(on_mesh(name, AxisType.Explicit, passes, *given), want),
        "shard_map": lambda: assert_equal(in_shares(passes, *given), by_share(passes, *given)),
    }
    wrong = []
    for mode, run in modes.items():
        try:
            run()
        except Exception:
            wrong.append(f"{name}, {mode}: {traceback.format_exc()}")
    return wrong


def main(*names):
    """Prints what is wrong, and exits with an error if there is anything."""
    wrong = [fault for name in names or MODELS for fault in check(name)]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*sys.argv[1:])
