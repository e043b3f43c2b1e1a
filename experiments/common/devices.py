"""Several devices and processes: one program over all of them, simulated where there are too few.

`start` runs a program in this process, or in several processes of this machine that
`jax.distributed` joins over the loopback interface; these compute on the CPU. On several hosts,
start the program on each and say by the three variables in `VARIABLES` which process it is.

A machine without an accelerator simulates as many devices as a program asks for.
"""

import codecs
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import IO, Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
GRACE = 5.0  # seconds that a process has to end after a signal


# Processes.


def start(module: str, flags: Sequence[str], processes: int, main: Callable[[], object]) -> None:
    """Runs a program in so many processes; each has its own devices.

    Args:
      module: what `python -m` takes.
      flags: its flags.
      processes: the number of processes. If it is 1, this process is the program.
      main: the program.

    Raises:
      SystemExit: a process failed; the others were ended.
    """
    if processes == 1:
        main()
    elif VARIABLES[-1] in os.environ:
        join()
        main()
    else:
        command = [sys.executable, "-m", module, *flags]
        raise SystemExit(run_together(command, processes))


def join() -> None:
    """Joins the other processes, as the environment says, and leaves the output to process 0."""
    address, count, index = (os.environ.get(name) for name in VARIABLES)
    if None in (address, count, index):
        raise ValueError(f"the environment takes all of {', '.join(VARIABLES)}, or none.")
    # The compiled programs talk by gloo, which writes to the standard output by itself.
    ours = os.dup(1) if index == "0" else os.open(os.devnull, os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index))


def run_together(command: list[str], count: int) -> int:
    """Runs processes of one program on this machine until all are done or one has failed.

    Process 0 writes to the terminal, errors of the others are printed only if they failed first. An
    error that process 0 has printed too is not repeated.

    Returns:
      The exit status of the first that failed, or 0; after Ctrl-C that of an interrupt.
    """
    with socket.socket() as free, ExitStack() as files:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        processes, errors = [], []
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        columns, lines = shutil.get_terminal_size()
        try:
            for index in range(count):
                values = (address, str(count), str(index))
                # Each process would take all accelerators, and none sees the terminal.
                environment = {"COLUMNS": str(columns), "LINES": str(lines), **os.environ}
                environment |= {"JAX_PLATFORMS": "cpu", **dict(zip(VARIABLES, values, strict=True))}
                errors.append(files.enter_context(tempfile.TemporaryFile()))
                processes.append(subprocess.Popen(command, env=environment, stderr=errors[-1]))
            return wait(processes, errors)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            end(processes)


def wait(processes: list[subprocess.Popen], errors: list[IO[bytes]]) -> int:
    """Waits for all processes, or for the first that fails; returns its exit status, or 0.

    What process 0 writes to its file of errors is printed meanwhile.
    """
    printed, decoder = b"", codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        states = [process.poll() for process in processes]
        while news := written(errors[0], len(printed)):
            printed += news
            sys.stderr.write(decoder.decode(news))
            sys.stderr.flush()
        if all(state == 0 for state in states):
            return 0
        if failed := [index for index, state in enumerate(states) if state]:
            said = printed.splitlines()
            lines = written(errors[failed[0]]).splitlines(keepends=True)
            others = b"".join(line for line in lines if line.rstrip() not in said)
            sys.stderr.write(others.decode(errors="replace"))
            return states[failed[0]] if states[failed[0]] > 0 else 1
        time.sleep(0.05)


def written(file: IO[bytes], start: int = 0) -> bytes:
    """What a process has written to a file from a position on; where it writes does not change."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size - start, start)


def end(processes: list[subprocess.Popen]) -> None:
    """Ends the processes that still run: politely at first."""
    for ask in (signal.SIGINT, signal.SIGKILL):
        until = time.monotonic() + GRACE
        for process in processes:
            if process.poll() is None:
                process.send_signal(ask)
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.05)


def from_first(value: Any) -> Any:
    """What process 0 passes, on every process; anything that pickle knows."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data))))
    mine = data if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())


# Devices.


def make_data_mesh(devices: int) -> Mesh:
    """A mesh with one axis, "data", of so many devices of each process.

    Raises:
      ValueError: this process has fewer, and they are not simulated.
    """
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        pass  # jax has started already, perhaps with enough of them
    ours = jax.local_devices()
    if len(ours) < devices:
        kind = ours[0].platform
        raise ValueError(
            f"devices is {devices}; this process has {len(ours)} of the kind {kind}. "
            + (
                "Start a new process, which can simulate them?"
                if kind == "cpu"
                else "Take at most that many, or simulate them with JAX_PLATFORMS=cpu?"
            )
        )
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    chosen = [device for own in by_process.values() for device in own[:devices]]
    # The compiler divides the work: a step then needs no word about devices.
    return jax.make_mesh((len(chosen),), ("data",), (AxisType.Auto,), devices=chosen)


def describe(mesh: Mesh) -> str:
    """How many devices of which kind, in words."""
    count, device = mesh.size, mesh.devices.flat[0]
    processes = jax.process_count()
    simulated = ", simulated on the CPU" if device.platform == "cpu" and count > processes else ""
    within = f" of {processes} processes" if processes > 1 else ""
    return f"{count} devices{within}{simulated or f' ({device.device_kind})'}"


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh, array: Any) -> NamedSharding:
    """The sharding of a parameter or a moment: its longest axis that the devices divide equally."""
    lengths = [n if n % mesh.size == 0 else 0 for n in array.shape]
    if not any(lengths):
        return replicated(mesh)
    axis = int(np.argmax(lengths))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def gathered(tree: Tree) -> Tree:
    """The arrays of a tree, whole, as arrays of NumPy on every process."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(np.asarray, whole)
