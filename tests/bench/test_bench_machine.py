"""What the benchmark chooses on a GPU, by fakes: no test needs one."""

import sys
import types

import jax
import numpy as np
import pytest

from experiments.bench import machine, runner, tables
from experiments.bench.machine import Peak
from experiments.bench.peers import torch_runs
from experiments.bench.tables import Row, Table

ALL_TABLES = [
    pytest.param(table, id=f"{section}, {name}")
    for section, of_section in runner.SECTIONS.items()
    for name, table in of_section.items()
]


@pytest.fixture
def make_gpu(monkeypatch):
    """A function that lets JAX appear to run on a GPU of this name."""

    def make(kind):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        device = types.SimpleNamespace(platform="gpu", device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    return make


@pytest.mark.parametrize("table", ALL_TABLES)
def test_every_table_has_cases_for_a_gpu_and_for_a_cpu(table, make_gpu):
    assert table.choose_cases(quick=False) == table.cases
    assert table.choose_cases(quick=True) == table.cases[:1]
    make_gpu("NVIDIA H200")
    assert table.choose_cases(quick=False) == table.gpu_cases
    assert table.choose_cases(quick=True) == table.gpu_cases[:1]
    assert 1 <= len(table.gpu_cases) <= len(table.cases)
    for case in table.cases + table.gpu_cases:
        assert type(case) is type(table.cases[0])


def test_a_gpu_has_larger_products_fewer_long_rounds_and_more_memory(make_gpu):
    on_cpu = machine.gemm_side(), machine.long_rounds(15), machine.per_example_limit()
    make_gpu("NVIDIA H200")
    on_gpu = machine.gemm_side(), machine.long_rounds(15), machine.per_example_limit()
    assert on_cpu == (1024, 5, 512 * 1024**2)
    assert on_gpu == (8192, 3, 16 * 1024**3)
    assert machine.long_rounds(1) == 1


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", Peak(494.7e12, 989.4e12)),
        ("NVIDIA H200", Peak(494.7e12, 989.4e12)),
        ("NVIDIA A100-SXM4-80GB", Peak(156e12, 312e12)),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("another chip", None),
    ],
)
def test_the_peak_is_that_of_the_chip(kind, peak, make_gpu):
    make_gpu(kind)
    assert machine.find_peak() == peak
    shares = machine.peak_shares(494.7e9, np.array([2e-3, 1e-3, 4e-3]), np.array([4e-3]))
    assert (shares is None) == (peak is None)
    if peak == Peak(494.7e12, 989.4e12):
        np.testing.assert_allclose(shares, [0.5, 0.25])


def test_a_cpu_has_no_peak():
    assert machine.find_peak() is None
    assert machine.peak_shares(1e9, np.array([1.0])) is None


def show(products):
    table = Table("title", "explicit / peer", None, (), ())
    row = Row("case", "peer", "<= 1.00")
    seconds = np.array([2e-3] * 3), np.array([4e-3] * 3)
    return tables.to_markdown(
        table, [tables.fill(row, seconds[0] / seconds[1], *seconds, products=products)]
    )


def test_the_share_of_the_peak_is_shown_where_it_is_known(make_gpu):
    assert "of the TF32 peak" not in show(494.7e9)
    make_gpu("another chip")
    assert "of the TF32 peak" not in show(494.7e9)
    make_gpu("NVIDIA H200")
    assert "of the TF32 peak" not in show(None)
    shown = show(494.7e9)
    assert "| of the TF32 peak |" in shown
    assert "| 50% / 25% |" in shown


def test_the_machine_is_described_with_its_precision_and_peak(make_gpu):
    assert not {"precision", "peak"} & set(machine.describe_machine())
    make_gpu("another chip")
    described = machine.describe_machine()
    assert described["machine"].endswith("jax on gpu (another chip)")
    assert "TF32" in described["precision"]
    assert "peak" not in described
    make_gpu("NVIDIA H200")
    assert machine.describe_machine()["peak"].startswith("494.7 TFLOP/s dense in TF32")


def fake_torch(monkeypatch, *, cuda):
    """A PyTorch that only records what is asked of its GPU."""
    done = []
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            is_available=lambda: cuda, synchronize=lambda: done.append("synchronize")
        ),
        set_float32_matmul_precision=done.append,
        set_num_threads=lambda threads: None,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torch_runs, "cores", lambda: 4)
    return done


def test_pytorch_runs_where_jax_runs(make_gpu, monkeypatch):
    done = fake_torch(monkeypatch, cuda=True)
    device = torch_runs.torch_device()
    assert (device.name, device.threads) == ("cpu", (1, 4))
    device.synchronize()
    assert done == []
    make_gpu("NVIDIA H200")
    device = torch_runs.torch_device()
    assert (device.name, device.threads) == ("cuda", (4,))
    assert done == ["high"]  # TF32, as JAX has it
    assert device.peak_bytes is torch_runs.peak_bytes_on_gpu


def test_every_run_of_pytorch_waits_for_the_gpu(make_gpu, monkeypatch):
    done = fake_torch(monkeypatch, cuda=True)
    make_gpu("NVIDIA H200")
    monkeypatch.setattr(torch_runs, "measure", lambda runs, repeats: np.ones((len(runs), repeats)))
    (run,) = torch_runs.at_their_fastest(lambda: done.append("run") or "answer")
    done.clear()
    assert run() == "answer"
    assert done == ["run", "synchronize"]


def test_a_pytorch_without_a_gpu_is_not_compared_with_jax_on_one(make_gpu, monkeypatch):
    fake_torch(monkeypatch, cuda=False)
    make_gpu("NVIDIA H200")
    with pytest.raises(RuntimeError, match="JAX runs on a GPU, which this PyTorch cannot use"):
        torch_runs.torch_device()


def test_the_memory_of_a_gpu_is_the_most_beyond_what_was_there(monkeypatch):
    done = []
    cuda = types.SimpleNamespace(
        memory_allocated=lambda: 100,
        reset_peak_memory_stats=lambda: done.append("reset"),
        max_memory_allocated=lambda: 350,
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert torch_runs.peak_bytes_on_gpu(lambda: done.append("run")) == 250
    assert done == ["reset", "run"]
