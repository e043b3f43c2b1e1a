"""Runs that survive: a stopped run goes on, and ends as if it had never been stopped."""

import io
import os
import pickle
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from resumable import Resumable, StopError

import jaxbp as bp

X = np.random.default_rng(0).normal(size=(44, 2))
LABELS = (X[:, 0] > X[:, 1]).astype(int)
NET = bp.chain(bp.dense(3), bp.tanh(), bp.dropout(0.1), bp.dense(2))
BATCHES = [(X[i : i + 11], LABELS[i : i + 11]) for i in range(0, 44, 11)]


pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax relies on it


def run(path, *, train=(X, LABELS), epochs=4, optimizer=None, net=NET, seed=1, **options):
    options = {"held_out": (X[:10], LABELS[:10]), "batch_size": 16, **options}
    return bp.fit(
        net,
        bp.softmax_cross_entropy,
        optimizer or optax.adam(0.03),
        train,
        key=jax.random.key(seed),
        metric=bp.accuracy,
        epochs=epochs,
        checkpoints=path,
        rule=bp.kolen_pollack(),
        read={"norms": bp.second_moment},
        **options,
    )


def stop_after(epoch, then):
    return lambda state, record: then() if record["epoch"] == epoch else None


def give_up():
    raise StopError


def assert_same(got, want):
    assert got.reason == want.reason
    for a, b in ((got.params, want.params), (got.state, want.state), (got.records, want.records)):
        arrays, others = (bp.to_arrays(tree) for tree in (a, b))
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), np.asarray(others[name]), err_msg=name)
            assert np.asarray(array).dtype == np.asarray(others[name]).dtype


@pytest.mark.parametrize(
    ("train", "every"),
    [
        pytest.param((X, LABELS), (1, "epochs"), id="arrays, epochs"),
        pytest.param((X, LABELS), (2, "steps"), id="arrays, steps", marks=pytest.mark.thorough),
        pytest.param(BATCHES, (1, "epochs"), id="batches, epochs", marks=pytest.mark.thorough),
        pytest.param(BATCHES, (2, "steps"), id="batches, steps", marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path, train, every):
    options = {"train": train, "checkpoint_every": every}
    undisturbed = run(tmp_path / "undisturbed", **options)
    with pytest.raises(StopError) as stopped:
        run(tmp_path / "stopped", callback=stop_after(2, give_up), **options)
    assert len(stopped.value.records) == 2
    assert int(stopped.value.state.step) == int(undisturbed.state.step) // 2
    assert_same(run(tmp_path / "stopped", **options), undisturbed)
    # What is done is not done again.
    assert_same(run(tmp_path / "stopped", callback=stop_after(4, give_up), **options), undisturbed)


def test_checkpoints_change_no_number(tmp_path):
    assert_same(run(tmp_path), run(None))


def test_a_run_goes_on_inside_an_epoch(tmp_path):
    """A kill after the first checkpoint within the second epoch."""
    options = {"checkpoint_every": (1, "steps"), "keep_checkpoints": 100}
    undisturbed = run(tmp_path / "undisturbed", **options)
    assert_same(run(tmp_path / "other", **options), undisturbed)
    inside = sorted((tmp_path / "other").iterdir(), key=lambda p: int(p.name))
    assert len(inside) > 4 * 3  # three steps an epoch, and the end of each
    for newer in inside[5:]:  # the fifth has one step of the second epoch
        for path in sorted(newer.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        newer.rmdir()
    assert_same(run(tmp_path / "other", **options), undisturbed)


def test_patience_counts_on(tmp_path):
    options = {"patience": 3, "epochs": 50, "optimizer": optax.sgd(0.0)}
    undisturbed = run(tmp_path / "undisturbed", **options)
    assert undisturbed.stopped_by == "patience"
    with pytest.raises(StopError):
        run(tmp_path / "stopped", callback=stop_after(2, give_up), **options)
    assert_same(run(tmp_path / "stopped", **options), undisturbed)


def test_more_epochs_go_on_from_the_end(tmp_path):
    run(tmp_path, epochs=2)
    assert_same(run(tmp_path, epochs=4), run(None, epochs=4))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_stores(tmp_path, number):
    undisturbed = run(None, train=BATCHES)
    handler = signal.getsignal(number)

    def kill():
        os.kill(os.getpid(), number)

    options = {"checkpoint_every": (100, "epochs")}
    with pytest.raises(bp.Interrupted, match="goes on from its checkpoint") as interrupted:
        run(tmp_path, train=BATCHES, callback=stop_after(2, kill), **options)
    assert interrupted.value.epoch == 3
    assert len(interrupted.value.records) == 2
    assert signal.getsignal(number) is handler
    assert_same(run(tmp_path, train=BATCHES, **options), undisturbed)


def test_an_interrupt_without_checkpoints_carries_the_state():
    with pytest.raises(bp.Interrupted, match=r"in this error's `state`") as interrupted:
        run(None, callback=stop_after(1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    state = interrupted.value.state
    assert int(state.step) == 3


def test_runs_in_another_thread_need_no_signals():
    done = []
    thread = threading.Thread(target=lambda: done.append(run(None, epochs=1)))
    thread.start()
    thread.join()
    assert done[0].stopped_by == "epochs"


def test_the_state_of_an_iterator_is_restored(tmp_path):
    options = {"checkpoint_every": (1, "steps"), "epochs": 2}
    undisturbed = run(None, train=Resumable(BATCHES), epochs=2)
    with pytest.raises(StopError):  # one batch is drawn to look at it
        run(tmp_path, train=Resumable(BATCHES, stop_after=4), **options)
    batches = Resumable(BATCHES)
    assert_same(run(tmp_path, train=batches, **options), undisturbed)
    assert batches.drawn == [1, 4, 1, 2, 3, 4]


def damage(folder, how):
    """Damages the newest checkpoint."""
    newest = max(folder.iterdir(), key=lambda p: int(p.name))
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 100]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        if how == "truncated":
            content = content[: len(content) // 2]
        elif how == "changed":
            content[len(content) // 2] ^= 0xFF
        else:
            content = b""
        file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        *(pytest.param(how, marks=pytest.mark.thorough) for how in ("changed", "emptied")),
    ],
)
def test_a_broken_checkpoint_is_passed_over(tmp_path, how):
    undisturbed = run(tmp_path)
    damage(tmp_path, how)
    with pytest.warns(UserWarning, match=r"checkpoint 4 .* cannot be read"):
        again = run(tmp_path)
    assert_same(again, undisturbed)
    assert_same(run(tmp_path), undisturbed)


OTHERS = {
    "network.name": {"net": bp.chain(bp.dense(4), bp.dense(2))},
    "optimizer": {"optimizer": optax.sgd(0.1)},
    "batch_size": {"batch_size": 8},
    "start.key": {"seed": 2},
    "train": {"train": (X[:20], LABELS[:20])},
    "held_out": {"held_out": None},
    "checkpoint_every": {"checkpoint_every": (3, "steps")},
}


def test_checkpoints_of_another_run_are_refused(tmp_path):
    run(tmp_path, epochs=1)
    for what, other in OTHERS.items():
        with pytest.raises(ValueError, match=f"those of another run: .*{what}"):
            run(tmp_path, epochs=1, **other)


@pytest.mark.parametrize("every", [2, (0, "epochs"), (1, "days"), ("epochs", 1)])
def test_wrong_frequencies_are_refused(tmp_path, every):
    with pytest.raises(ValueError, match="checkpoint_every"):
        run(tmp_path, checkpoint_every=every)


def test_keeping_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints"):
        run(tmp_path, keep_checkpoints=0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_state_is_stored_by_numpy_and_pickle(dtype):
    net = bp.stack(bp.dense(3, dtype=dtype), 2)
    state = bp.init_state(net, optax.adam(0.1), jax.random.key(3), (3,))
    file = io.BytesIO()
    np.savez(file, **bp.to_arrays(state))
    file.seek(0)
    like = bp.init_state(net, optax.adam(0.1), jax.random.key(4), (3,))
    loaded = bp.from_arrays(like, np.load(file))
    pickled = bp.from_arrays(like, pickle.loads(pickle.dumps(bp.to_arrays(state))))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for restored in (loaded, pickled):
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            assert got.dtype == want.dtype
            assert bool(jnp.all(got == want))


def test_arrays_that_do_not_fit_are_refused():
    like = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    arrays = bp.to_arrays(like)
    with pytest.raises(ValueError, match="no array b"):
        bp.from_arrays(like, {"a": arrays["a"]})
    with pytest.raises(ValueError, match="an array c, which the tree has not"):
        bp.from_arrays(like, {**arrays, "c": arrays["a"]})
    with pytest.raises(ValueError, match=r"b is float64 \[2\], expected float64 \[3\]"):
        bp.from_arrays(like, {**arrays, "b": arrays["a"]})
    with pytest.raises(ValueError, match=r"b is float32 \[3\], expected float64 \[3\]"):
        bp.from_arrays(like, {**arrays, "b": jnp.zeros(3, "float32")})
    with pytest.raises(ValueError, match=r"two arrays of the tree have the path a\.b"):
        bp.to_arrays({"a": {"b": jnp.zeros(1)}, "a.b": jnp.zeros(1)})
