"""Traces what is in the registry with arrays that are divided over devices, one for each example.

What is wrong about sharding shows when a program is traced, so nothing is compiled here. It is a
process of its own, since it needs several devices, which are simulated; `test_sharding` starts it:

    XLA_FLAGS=--xla_force_host_platform_device_count=3 \\
        python tests/traces_on_devices.py explicit|shard_map layers|losses|rules [NAME ...]
"""

import sys
import traceback

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbp as bp
from jaxbp.types import is_shape

EXAMPLES, WHOLE = PartitionSpec("data"), PartitionSpec()
READINGS = {
    name: reading for name, reading in cases.READINGS.items() if name not in ("keep", "gram")
}
READINGS["along"] = lambda signal: bp.directional_derivatives(signal, bp.mean(signal))


def trace(mode, function, whole, *divided):
    """Traces `function(whole, *divided)`. N is the first axis of all that is divided."""
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((cases.N,), ("data",), axis_types=(kind,))
    if mode == "explicit":
        with jax.set_mesh(mesh):
            whole = jax.device_put(whole, NamedSharding(mesh, WHOLE))
            divided = jax.device_put(divided, NamedSharding(mesh, EXAMPLES))
            jax.eval_shape(jax.jit(function), whole, *divided)
        return
    mapped = jax.shard_map(
        lambda *batch: jax.tree.map(lambda a: a[None], function(*batch)),
        mesh=mesh,
        in_specs=(WHOLE, *[EXAMPLES] * len(divided)),
        out_specs=EXAMPLES,
    )
    jax.eval_shape(mapped, whole, *divided)


def of_layer(case):
    """The forward and the backward pass of a layer, with all readings."""
    layer, rng = case.make(), np.random.default_rng(0)

    def draw(shape):
        size = (cases.N, *shape)
        return jnp.asarray(
            rng.integers(case.vocabulary, size=size) if case.vocabulary else rng.normal(size=size)
        )

    def read(signal):
        return {name: reading(signal) for name, reading in READINGS.items()}

    def passes(params, x):
        y, cache = layer.forward(params, x, key=jax.random.key(1))
        return y, layer.backward(params, cache, y, read=read)[1]

    params, _ = layer.init(jax.random.key(0), case.shape)
    return passes, params, jax.tree.map(draw, case.shape, is_leaf=is_shape)


def of_loss(case):
    """The value and the delta of a loss, and the errors that it has."""
    errors = [bp.jacobian_rows]
    errors += [bp.ggn_columns] * case.has_factor + [bp.sampled] * case.samples

    def function(_, outputs, targets):
        columns = [error(case.loss, outputs, targets, jax.random.key(0)) for error in errors]
        first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), columns)
        return case.loss(outputs, targets), first

    outputs = case.outputs(jax.random.key(0))
    return function, (), outputs, jax.tree.map(jnp.asarray, case.targets(np.random.default_rng(0)))


def of_rule(name, blocks):
    """A sweep by a rule, the update of its state, and its angles."""
    net = bp.chain(*blocks.parts)
    rule = cases.RULES[name](*blocks.parts)
    params, outputs = net.init(jax.random.key(0), blocks.shape)
    state = rule.make(jax.random.key(1), net, blocks.shape)
    sweep = bp.backprop(net, bp.squared_error, read=READINGS, rule=rule)
    angles = bp.alignment(net, bp.squared_error, rule=rule)

    def function(whole, *batch):
        params, state = whole
        own = {"rule_state": state, "rule_key": jax.random.key(2)}
        values, readings = sweep(params, *batch, **own)
        moved = jax.tree.map(lambda p, g: p - g, params, readings["mean"])

        def move(tree):
            return jax.tree.map(lambda p, g: p - g, tree, readings["mean"])

        after = rule.update(state, moved, move=move, key=jax.random.key(3))
        return values, readings, after, angles(params, *batch, **own)

    shapes = [(cases.N, *shape) for shape in (blocks.shape, outputs)]
    return function, (params, state), *map(jnp.ones, shapes)


KINDS = {
    "layers": {
        name: (of_layer, case)
        for name, case in {**cases.LAYERS, **cases.VARIANTS, **cases.NETWORKS}.items()
    },
    "losses": {name: (of_loss, case) for name, case in cases.LOSSES.items()},
    "rules": {
        f"{rule} of {name}": (of_rule, rule, blocks)
        for rule in cases.RULES
        if rule not in ("rtrl", "snap1", "eprop")
        for name, blocks in cases.BLOCKS.items()
    },
}


def main(mode, kind, *names):
    """Traces all of a kind, or those with these names; returns how many failed."""
    failed = 0
    for name in names or KINDS[kind]:
        make, *of_what = KINDS[kind][name]
        try:
            trace(mode, *make(*of_what))
        except Exception:
            failed += 1
            print(f"{mode}: {name}")
            traceback.print_exc(limit=-4)
    return failed


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", cases.N)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    sys.exit(main(*sys.argv[1:]) > 0)
