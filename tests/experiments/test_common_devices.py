"""Several devices and processes: where arrays lie, and how processes start and end."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from experiments.common import devices


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()),
        ((3,), P()),
        ((8,), P("data")),
        ((3, 8), P(None, "data")),
        ((4, 8), P(None, "data")),
        ((8, 8), P("data")),
        ((16, 4, 18), P("data")),
        ((0, 3), P()),
    ],
)
def test_the_longest_axis_that_the_devices_divide_is_divided(shape, spec):
    mesh = AbstractMesh((4,), ("data",))
    assert devices.divided(mesh, jax.ShapeDtypeStruct(shape, "float32")).spec == spec


def test_more_devices_than_there_are_are_refused():
    jax.devices()  # jax has started
    with pytest.raises(ValueError, match=r"devices is 99; this process has \d of the kind"):
        devices.make_data_mesh(99)
    assert devices.make_data_mesh(1).shape == {"data": 1}


def test_one_process_is_this_one():
    ran = []
    devices.start("no.module", [], 1, lambda: ran.append(1))
    assert ran == [1]


def test_the_environment_of_a_process_is_whole(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="takes all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"):
        devices.start("no.module", [], 2, lambda: None)


@pytest.fixture
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("handlers")
def test_every_process_learns_which_it_is(tmp_path):
    names = ", ".join(repr(name) for name in devices.VARIABLES)
    code = (
        f"import os; place, count, index = (os.environ[name] for name in ({names},));"
        "open(index, 'w').write(place + ' ' + count)"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"]
    assert devices.run_together(command, 3) == 0
    written = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert sorted(written) == ["0", "1", "2"]
    ((address, count),) = {tuple(words) for words in written.values()}
    assert count == "3"
    assert address.startswith("127.0.0.1:")


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("failing", "shown"), [(0, ""), (1, "broken\n")])
def test_where_one_process_fails_all_end(failing, shown, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", printed)
    monkeypatch.setattr(devices, "GRACE", 0.3)
    code = (
        f"import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '{failing}':\n"
        f"    sys.exit({'3' if failing == 0 else repr('broken')})\ntime.sleep(60)"
    )
    started = time.monotonic()
    status = devices.run_together([sys.executable, "-S", "-c", code], 2)
    assert status == (3 if failing == 0 else 1)
    assert printed.getvalue() == shown
    assert time.monotonic() - started < 50


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("last", [0, 1])
def test_an_error_of_all_processes_is_printed_once_whoever_fails_first(last, monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", printed)
    monkeypatch.setattr(devices, "GRACE", 0.3)
    code = (
        "import os, sys, time; index = os.environ['JAX_PROCESS_ID'];"
        "sys.stderr.write('only ' + index + '\\nall\\n'); sys.stderr.flush();"
        f"time.sleep(60 * (index == '{last}')); sys.exit(1)"
    )
    assert devices.run_together([sys.executable, "-S", "-c", code], 2) == 1
    assert printed.getvalue().count("all\n") == 1


def test_processes_end_at_the_latest_by_a_kill(monkeypatch):
    monkeypatch.setattr(devices, "GRACE", 0.3)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-S", "-c", f"{code}; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        devices.end([process])
        assert process.wait() == -signal.SIGKILL


def test_a_value_of_the_only_process_is_everyones():
    value = {"a": 1}
    assert devices.from_first(value) is value


@pytest.mark.thorough
def test_the_recipe_of_the_readme_runs_on_eight_devices(tmp_path):
    readme = Path(devices.__file__).parent.parent / "README.md"
    section = readme.read_text(encoding="utf-8").split("\n## Several devices and hosts\n")[1]
    recipe = tmp_path / "recipe.md"
    recipe.write_text(section.split("\n### ")[0], encoding="utf-8")
    code = (
        "import doctest, sys, jax; jax.config.update('jax_num_cpu_devices', 8);"
        "print(doctest.testfile(sys.argv[1], module_relative=False), jax.device_count())"
    )
    command = [sys.executable, "-c", code, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TestResults(failed=0, attempted=7) 8\n"
