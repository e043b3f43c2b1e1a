"""The GPT on several devices and processes: the numbers of one device, and the moments divided."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import gpt
from experiments.common.resume import Resumed

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
SMALL = {
    "blocks": 1, "features": 8, "heads": 2, "positions": 8, "batch_size": 8, "steps": 20,
    "chunk": 2, "length": 3, "learning_rate": 0.03,
}  # fmt: skip

PROGRAM = ["-m", "experiments.gpt"]
# What a shell starts in the background ignores interrupts, and so does all that this starts.
HEEDFUL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("experiments.gpt", run_name="__main__", alter_sys=True)
"""
ON_EIGHT = """
import jax, tyro
from experiments import gpt

seen = []
make_chunk = gpt.make_chunk

def watched(step, shardings):
    chunk = make_chunk(step, shardings)
    def watching(state, *batch):
        after = chunk(state, *batch)
        seen.extend([state, after[0]])
        return after
    return watching

gpt.make_chunk = watched
gpt.main(tyro.cli(gpt.Config))
for state in seen:
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    for leaf in moments:
        (local,) = {shard.data.size for shard in leaf.addressable_shards}
        shares = 8 if any(n % 8 == 0 for n in leaf.shape) else 1
        assert shares * local == leaf.size, leaf.shape
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
"""


def config(folder, text, **others):
    return {**SMALL, "text": text, "resume": True, "out": folder, **others}


class Stored(pickle.Unpickler):
    """Reads what the command has stored, where the experiment is the main module."""

    def find_class(self, module, name):
        return super().find_class("experiments.gpt" if module == "__main__" else module, name)


def trained(folder):
    """The last state and the points of a run."""
    with (folder / "resume" / "gpt" / "training.pickle").open("rb") as file:
        return Stored(file).load()


def run(program, flags):
    """Runs `python` with a program and the flags of the GPT, without the flags of the tests."""
    return subprocess.run(
        [sys.executable, *program, *words(flags)], env=environment(), capture_output=True, text=True
    )


def environment():
    """That of this process, with the compiled programs that it keeps."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **kept}


def words(flags):
    flags = dict(flags)
    resume = ["--resume"] if flags.pop("resume") else []
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items())
    return [word for pair in pairs for word in pair] + resume


def without_noise(name, array):
    """The array without the bias of the keys: its gradient is zero, so AdamW scales up rounding."""
    return array[:, [*range(8), *range(16, 24)]] if name.endswith("layers.0.1.0.bias") else array


def compare(got, expected):
    for name, array in expected["state"].items():
        arrays = (without_noise(name, own) for own in (got["state"][name], array))
        np.testing.assert_allclose(*arrays, rtol=2e-3, atol=2e-4, err_msg=name)
    assert len(got["points"]) == len(expected["points"]) == 10
    for point, other in zip(got["points"], expected["points"], strict=True):
        assert point.step == other.step
        np.testing.assert_allclose(point.loss, other.loss, rtol=1e-4)
        np.testing.assert_allclose(point.errors, other.errors, rtol=1e-3)
        np.testing.assert_allclose(point.held_out or 0, other.held_out or 0, rtol=1e-4)
    assert got["rng"] == expected["rng"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The text, the folder of a run on one device, and that of one that was stopped halfway."""
    folder = tmp_path_factory.mktemp("gpt")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat, and the rat ran. " * 20, encoding="utf-8")
    whole, stopped = folder / "whole", folder / "stopped"

    def save(self, name, value):
        original(self, name, value)
        if name == "training" and not stopped.exists():
            shutil.copytree(whole, stopped)

    original = Resumed.save
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Resumed, "save", save)
        gpt.main(gpt.Config(**config(whole, text)))
    return text, whole, stopped


def test_eight_devices_train_as_one_with_the_moments_divided(runs, tmp_path):
    text, whole, _ = runs
    done = run(["-c", ON_EIGHT], config(tmp_path, text, devices=8))
    assert done.returncode == 0, done.stderr
    assert "8 devices, simulated on the CPU; 1 of the 8 sequences each" in done.stdout
    compare(trained(tmp_path), trained(whole))


def test_eight_devices_go_on_from_what_one_has_stored(runs, tmp_path):
    text, whole, stopped = runs
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert len(trained(tmp_path)["points"]) == 5
    done = run(["-c", ON_EIGHT], config(tmp_path, text, devices=8))
    assert done.returncode == 0, done.stderr
    compare(trained(tmp_path), trained(whole))


def test_two_processes_go_on_too_and_one_of_them_speaks(runs, tmp_path):
    text, whole, stopped = runs
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    done = run(PROGRAM, config(tmp_path, text, devices=2, processes=2))
    assert done.returncode == 0, done.stderr
    assert "4 devices of 2 processes, simulated on the CPU; 2 of the 8" in done.stdout
    assert done.stdout.count("validation loss") == done.stdout.count("done in") == 1
    assert "Gloo" not in done.stdout
    compare(trained(tmp_path), trained(whole))


def test_an_error_of_all_processes_is_printed_once(runs, tmp_path):
    text, _, _ = runs
    done = run(PROGRAM, config(tmp_path, text, processes=2, prompt="%"))
    assert done.returncode == 1
    assert done.stderr.count("prompt has '%', which the text does not have") == 1
    assert done.stdout == ""


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks Linux for the processes")
def test_an_interrupt_ends_every_process(runs, tmp_path):
    text, _, _ = runs
    flags = config(tmp_path, text, processes=2, steps=100_000)
    command = [sys.executable, "-c", HEEDFUL, *words(flags)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = subprocess.Popen(command, env=environment(), **silent)
    stored = tmp_path / "resume" / "gpt" / "training.pickle"
    until = time.monotonic() + 300
    try:
        while not stored.exists() and start.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        children = Path(f"/proc/{start.pid}/task/{start.pid}/children").read_text().split()
        assert len(children) == 2
        start.send_signal(signal.SIGINT)
        assert start.wait(300) == 128 + signal.SIGINT
    finally:
        start.terminate()
        start.wait()
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
    assert len(trained(tmp_path)["points"]) >= 5
