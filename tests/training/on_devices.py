"""What test_devices.py runs in processes of their own: training on 8 devices, and in 2 processes.

python on_devices.py devices CHECK...
python on_devices.py processes PORT PROCESS FOLDER
"""

import os
import re
import signal
import sys
import tempfile
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from resumable import Resumable, StopError

import jaxbp as bp
from jaxbp.training.processes import fetched

X = np.random.default_rng(0).normal(size=(40, 4))
LABELS = (X[:, 0] > X[:, 1]).astype(np.int32)
NET = bp.chain(bp.dense(16), bp.tanh(), bp.dropout(0.1), bp.dense(2))
OPTIMIZER = optax.adam(0.03)
ROWS = PartitionSpec("data")


def run(data, *, after_epoch_1=None, **options):
    def callback(state, record):
        if after_epoch_1 is not None and record["epoch"] == 1:
            after_epoch_1()

    return bp.fit(
        *(NET, bp.softmax_cross_entropy, OPTIMIZER, data),
        **(options if "state" in options else {"key": jax.random.key(1), **options}),
        held_out=data,
        metric=bp.accuracy,
        epochs=3,
        batch_size=16,
        rule=bp.kolen_pollack(),
        read={"moments": bp.second_moment},
        callback=callback,
    )


def stop():
    raise StopError


def stopped_and_resumed(data, folder, **options):
    with pytest.raises(StopError):
        run(data, after_epoch_1=stop, checkpoints=folder, **options)
    return run(data, checkpoints=folder, **options)


def new_state(optimizer=OPTIMIZER):
    return bp.init_state(NET, optimizer, jax.random.key(1), (4,), rule=bp.kolen_pollack())


def divided(tree, mesh):
    """A tree whose arrays are each divided along the last axis, if the devices divide that.

    The weight [16, 2] is not: the compiler would divide it after an epoch, if nothing kept it.
    """

    def place(array):
        names = [None] * array.ndim
        if array.ndim and array.shape[-1] % mesh.size == 0:
            names[-1] = "data"
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.jit(lambda a: a, out_shardings=sharding)(array)

    return jax.tree.map(place, tree)


def arrays(tree):
    return {name: fetched(array) for name, array in bp.to_arrays(tree).items()}


def assert_close(got, want, tolerance=1e-12):
    got, want = arrays(got), arrays(want)
    assert got.keys() == want.keys()
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], tolerance, tolerance, err_msg=name)


def assert_runs_close(got, want, tolerance=1e-12):
    assert got.reason == want.reason
    assert_close((got.params, got.state, got.records), (want.params, want.state, want.records))


def assert_divided_alike(got, want):
    for name, array in bp.to_arrays(want).items():
        other = bp.to_arrays(got)[name].sharding
        assert other.is_equivalent_to(array.sharding, array.ndim), f"{name}: {other}"


def collectives(compiled):
    """The kinds and the shapes of what the devices exchange."""
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\S+|\([^()]*\)) ({names})(?:-start)?\(", compiled.as_text())
    return [(kind, sorted(re.findall(r"\w+\[[\d,]*\]", shapes))) for shapes, kind in found]


# On 8 devices


def meshes():
    """Eight devices in the automatic and in the explicit mode."""
    return [
        jax.make_mesh((8,), ("data",), axis_types=(kind,))
        for kind in (AxisType.Auto, AxisType.Explicit)
    ]


def on(mesh, data=(X, LABELS)):
    return jax.device_put(data, NamedSharding(mesh, ROWS))


def one_epoch_of(size, data):
    """The state after two epochs and the record of the second; a third is not traced."""
    traces = []

    def loss(outputs, labels):
        traces.append(outputs)
        return bp.softmax_cross_entropy(outputs, labels)

    epoch = bp.make_epoch(NET, loss, OPTIMIZER, batch_size=size, rule=bp.kolen_pollack())
    state, _ = epoch(new_state(), *data)
    result = epoch(state, *data)
    before = len(traces)
    epoch(result[0], *data)
    assert len(traces) == before
    return result


def epochs_are_those_of_one_device():
    """Batches of 16 are divided by 8 devices, and those of 12 are not."""
    for size in 16, 12:
        want = one_epoch_of(size, (X, LABELS))
        for mesh in meshes():
            assert_close(one_epoch_of(size, on(mesh)), want)


def runs_are_those_of_one_device():
    want = run((X, LABELS))
    for mesh in meshes():
        assert_runs_close(run(on(mesh)), want)


def so_they_are_under_a_set_mesh():
    want = run((X, LABELS))
    for mesh in meshes():
        with jax.set_mesh(mesh):
            assert_runs_close(run(on(mesh)), want)


def runs_go_on_from_checkpoints():
    for mesh in meshes():
        want = run(on(mesh))
        with tempfile.TemporaryDirectory() as folder:
            got = stopped_and_resumed(on(mesh), folder)
        assert_runs_close(got, want, 0)
        assert_divided_alike(got.state, want.state)


def parameters_stay_divided():
    want = run((X, LABELS))
    step = bp.make_step(NET, bp.softmax_cross_entropy, OPTIMIZER, rule=bp.kolen_pollack())
    for mesh in meshes():
        state = divided(new_state(), mesh)
        got = run(on(mesh), state=state)
        assert_runs_close(got, want)
        assert_divided_alike(got.state, state)
        after, _ = step(divided(new_state(), mesh), *on(mesh))
        assert_divided_alike(after, state)


def each_device_computes_its_share():
    """FLOP fall with the devices; they exchange rows of the batch and the gradients, once each."""
    net = bp.chain(bp.dense(128), bp.tanh(), bp.dense(10))
    x, labels = jnp.ones((128, 96)), jnp.zeros(128, int)
    state = bp.init_state(net, optax.sgd(0.1), jax.random.key(0), (96,))
    epoch: Any = bp.make_epoch(net, bp.softmax_cross_entropy, optax.sgd(0.1), batch_size=64)
    evaluation: Any = bp.evaluate(net, bp.softmax_cross_entropy, batch_size=64)
    want = epoch.lower(state, x, labels).compile().cost_analysis()["flops"]
    gradients = sorted(["f64[96,128]", "f64[128]", "f64[128,10]", "f64[10]", "f64[]"])
    rows = [("all-reduce", ["f64[64,96]"]), ("all-reduce", ["s64[64]"])]
    for mesh in meshes():
        data = on(mesh, (x, labels))
        compiled = epoch.lower(state, *data).compile()
        assert compiled.cost_analysis()["flops"] < 1.2 * want / 8
        assert sorted(collectives(compiled)) == sorted([*rows, ("all-reduce", gradients)])
        compiled = evaluation.lower(state.params, *data).compile()
        assert sorted(collectives(compiled)) == sorted([*rows, ("all-reduce", ["f64[]"])])


def bad_values_are_found():
    at_33 = np.arange(40) == 33
    for what, bad in {
        "inputs": (np.where(at_33[:, None], np.nan, X), LABELS),
        "labels": (X, np.where(at_33, 7, LABELS)),
    }.items():
        for mesh in meshes():
            with pytest.raises(ValueError, match=rf"fit: train.* {what} .*\b33\b"):
                run(on(mesh, bad))


def epochs_inside_shard_map():
    """Each device trains on its own part; with a mean of the gradients, all train one network."""
    mesh, _ = meshes()
    shared = optax.stateless(lambda updates, params: jax.lax.pmean(updates, "data"))
    for optimizer in OPTIMIZER, optax.chain(shared, OPTIMIZER):
        epoch = bp.make_epoch(NET, bp.softmax_cross_entropy, optimizer, batch_size=2)
        state = bp.init_state(NET, optimizer, jax.random.key(1), (4,))

        @jax.jit
        @jax.shard_map(mesh=mesh, in_specs=(PartitionSpec(), ROWS, ROWS), out_specs=ROWS)
        def of_each(state, x, labels, epoch=epoch):
            return jax.tree.map(lambda a: a[None], epoch(state, x, labels)[0].params)

        params = arrays(of_each(state, *on(mesh)))
        first, last = ({name: array[i] for name, array in params.items()} for i in (0, 7))
        if optimizer is OPTIMIZER:
            assert_close(first, epoch(state, X[:5], LABELS[:5])[0].params)
        else:
            assert_close(first, last)


# In 2 processes


def iterators_go_on_in_each_process(data, process, folder):
    def train(batches, **options):
        key = jax.random.key(1)
        return bp.fit(
            NET, bp.softmax_cross_entropy, OPTIMIZER, batches, key=key, epochs=2, **options
        )

    label = process * b" of process 1"  # of a length of its own
    stored = {"checkpoints": folder, "checkpoint_every": (1, "steps")}
    with pytest.raises(StopError):  # one batch is drawn to look at it
        train(Resumable([data] * 3, label, stop_after=3), **stored)
    batches = Resumable([data] * 3, label)
    assert_runs_close(train(batches, **stored), train(Resumable([data] * 3)), 0)
    assert batches.restored == [bytes([2]) + label]


def in_processes(port, process, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    want = run((X, LABELS))  # alone
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    own = slice(20 * process, 20 * process + 20)
    data = tuple(
        jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), array[own])
        for array in (X, LABELS)
    )
    got = run(data)
    assert_runs_close(got, want)
    resumed = stopped_and_resumed(data, f"{folder}/replicated")
    assert_runs_close(resumed, got, 0)

    state = divided(new_state(), mesh)
    resumed = stopped_and_resumed(data, f"{folder}/divided", state=state)
    assert_runs_close(resumed, want)
    assert_divided_alike(resumed.state, state)

    iterators_go_on_in_each_process(data, process, f"{folder}/iterators")

    def interrupt_one():
        if process == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(bp.Interrupted) as interrupted:
        run(data, after_epoch_1=interrupt_one)
    assert len(interrupted.value.records) == 1
    jax.distributed.shutdown()


if __name__ == "__main__":
    warnings.simplefilter("error")
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1] == "devices":
        for check in sys.argv[2:]:
            globals()[check]()
    else:
        in_processes(sys.argv[2], int(sys.argv[3]), sys.argv[4])
