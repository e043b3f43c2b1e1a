"""How cost grows: the stored record against formulas, the README's tables, and the command."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import scaling

GALLERY = Path(scaling.__file__).parent / "gallery"
README = (GALLERY.parent / "README.md").read_text(encoding="utf-8")
CONFIG = scaling.Config()


@pytest.fixture(scope="module")
def costs():
    return scaling.read_record(GALLERY / "scaling.json")


def perceptron_sizes(case):
    """The inputs and outputs of each dense layer."""
    return [(case.width, case.width)] * case.layers + [(case.width, scaling.CLASSES)]


def of_call(costs, call, parameters, network="MLP"):
    return {
        case: cost
        for case, cost in costs.items()
        if case[:3] == (network, call, parameters) and case.devices > 1
    }


def ring(case, entries):
    """Bytes that each device sends to sum or to gather so many float32, of one pass of a ring."""
    return 4 * entries * (case.devices - 1) / case.devices


def test_the_record_has_every_program(costs):
    assert list(costs) == scaling.cases(CONFIG)


def test_the_readme_has_the_tables_of_the_record(costs):
    assert scaling.table(costs, CONFIG) in README
    assert scaling.growth_table(costs, CONFIG) in README


def test_gradients_are_summed_over_devices_once(costs):
    for case, cost in of_call(costs, "gradient", "replicated").items():
        parameters = sum((i + 1) * o for i, o in perceptron_sizes(case))
        assert cost.wire == pytest.approx(2 * ring(case, parameters + 1))  # and the loss
        divided = costs[case._replace(parameters="FSDP")]
        assert divided.wire == pytest.approx(cost.wire + ring(case, parameters))
        clipped = costs[case._replace(call="clipped sum")]
        assert clipped.wire == pytest.approx(2 * ring(case, parameters))
        assert [*cost.collectives] == [*clipped.collectives] == ["all-reduce"]
        assert cost.collectives["all-reduce"][0] == clipped.collectives["all-reduce"][0] == 1


@pytest.mark.parametrize("network", scaling.NETWORKS)
def test_norms_send_nothing(costs, network):
    assert all(
        not cost.collectives for cost in of_call(costs, "norms", "replicated", network).values()
    )
    divided = of_call(costs, "norms", "FSDP", network)
    assert all([*cost.collectives] == ["all-gather"] for cost in divided.values())


def test_factors_are_summed_over_devices_once(costs):
    for case, cost in of_call(costs, "factors", "replicated").items():
        # Of a layer and its bias: the products of inputs, a column of ones among them, and deltas.
        entries = sum((i + 1) ** 2 + o * o for i, o in perceptron_sizes(case))
        assert cost.wire == pytest.approx(2 * ring(case, entries), rel=0.06)
        assert cost.collectives["all-reduce"][0] == 1


def test_a_device_computes_its_share(costs):
    for case, cost in of_call(costs, "gradient", "replicated").items():
        weights = sum(i * o for i, o in perceptron_sizes(case))
        first = case.width**2  # nobody asks for the derivative by the network's inputs
        assert cost.flop == 2 * case.n // case.devices * (3 * weights - first)
    for network in scaling.NETWORKS:
        for case, cost in of_call(costs, "norms", "replicated", network).items():
            whole = costs[case._replace(devices=1, n=128, layers=4, width=128)]
            if case[3:6] == (128, 4, 128):
                assert cost.flop == pytest.approx(whole.flop / case.devices, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"devices": ()}, r"devices is \(\); it takes powers of two"),
        ({"devices": (1, 3)}, r"devices is \(1, 3\); it takes powers of two"),
        ({"n": 32}, "n is 32; it takes a multiple of 64"),
        (
            {"layers": 3, "width": 12},
            "layers is 3; it takes a multiple of 2; width is 12; it takes",
        ),
        ({"n": 0}, "n is 0; it takes at least 1"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scaling.main(scaling.Config(**flags, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
@pytest.mark.usefixtures("as_shipped")
def test_it_compiles_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "CALLS", {"norms": scaling.CALLS["norms"]})
    config = scaling.Config(devices=(1,), n=4, layers=2, width=8, out=tmp_path / "out")
    costs = scaling.main(config)
    assert len(costs) == 2 * 2 * 7
    assert scaling.read_record(tmp_path / "out" / "scaling.json") == costs
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert scaling.table(costs, config) in capsys.readouterr().out


@pytest.mark.thorough
def test_the_compiler_still_says_so():
    cases = [
        scaling.Case("MLP", call, parameters, 16, 2, 16, 8)
        for call, parameters in itertools.product(("gradient", "norms"), ("replicated", "FSDP"))
    ]
    code = (
        "from experiments.scaling import *\ndevices.make_data_mesh(8)\n"
        f"for case in {[tuple(case) for case in cases]}: print(measure(Case(*case)).wire)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters = sum((i + 1) * o for i, o in perceptron_sizes(cases[0]))
    summed, gathered = 2 * ring(cases[0], parameters + 1), ring(cases[0], parameters)
    expected = [summed, summed + gathered, 0, gathered]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected)
