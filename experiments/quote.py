"""The figures that experiments/README.md quotes: recorded, and written from the record.

Each quote is a paragraph or a table between two markers, and a function that writes it from
recorded numbers. The records are in gallery/quoted.json. A test compares the text with them.

  python -m experiments.quote                    writes all quotes from the records
  python -m experiments.quote curvature memory   runs these experiments with their defaults, records
                                                 what they found, and replaces their pictures

Numbers differ between machines, and times also between runs: a record says when it was made.
"""

import datetime
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

import jaxbp as bp
from experiments import (
    alignment,
    curvature,
    digits,
    ensemble,
    memory,
    multilayer,
    perceptron,
    private,
)
from experiments.common.files import whole
from experiments.common.measuring import cores

FOLDER = Path(__file__).parent
README, GALLERY = FOLDER / "README.md", FOLDER / "gallery"
RECORDS = GALLERY / "quoted.json"
SEEDS = range(5)


class Quote(NamedTuple):
    """A part of the README.

    Attributes:
      measure: `measure(out) -> numbers` runs the experiment; the numbers are for JSON.
      write: `write(numbers) -> text` writes the part.
    """

    measure: Callable[[Path], dict[str, Any]]
    write: Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Config:
    """Writes the figures that experiments/README.md quotes from their records."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The experiments to run first, with their defaults."""
    out: Path = Path("out")
    """The folder for their figures."""


def main(config: Config) -> None:
    """Measures what is asked for, and writes every quote."""
    wrong = [name for name in config.names if name not in QUOTES]
    if wrong:
        raise ValueError(f"names has {', '.join(wrong)}; it takes some of {', '.join(QUOTES)}")
    for name in config.names:
        measured(name, config.out)
    with whole(README) as unfinished:
        unfinished.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(QUOTES)} quotes written to {README}")


def measured(name: str, out: Path) -> None:
    """Runs an experiment, records what it found, and replaces its pictures in the gallery."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    started = time.time()
    numbers = QUOTES[name].measure(out)
    about = {"date": datetime.date.today().isoformat(), "load": round(load), "cores": cores()}
    record({name: {**about, "numbers": numbers}})
    replace_pictures(out, since=started)


def records() -> dict[str, Any]:
    """What was recorded, by the names of the quotes."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}


def record(found: dict[str, Any]) -> None:
    """Adds records to those that are there, or replaces them."""
    text = json.dumps(dict(sorted({**records(), **found}.items())), indent=1)
    with whole(RECORDS) as unfinished:
        unfinished.write_text(f"{text}\n", encoding="utf-8")


def replace_pictures(out: Path, since: float) -> None:
    """Copies the figures that were written since then over those of the gallery."""
    for picture in out.glob("*.png"):
        names = picture.name, picture.name.replace("_digits", "")
        places = [GALLERY / name for name in names if (GALLERY / name).exists()]
        if places and picture.stat().st_mtime >= since:
            shutil.copy(picture, places[0])


def markers(name: str) -> tuple[str, str]:
    """The comments before and after a quote."""
    return f"<!-- quote: {name} -->", f"<!-- end quote: {name} -->"


def written(text: str) -> str:
    """The README with every quote as its record says."""
    found = records()
    for name, quote in QUOTES.items():
        begin, end = markers(name)
        if not text.count(begin) == text.count(end) == 1:
            raise ValueError(f"README.md needs `{begin}` and `{end}` once each")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        part = quote.write(found[name]["numbers"])
        part = part.replace("DATE", found[name]["date"]).replace("LOAD", load_of(found[name]))
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def load_of(found: dict[str, Any]) -> str:
    """How busy the machine was before the experiment, in words."""
    if "load" not in found:
        return "a load that was not recorded"
    return f"a load of {found['load']} on {found['cores']} cores"


def table(*rows: tuple[Any, ...]) -> str:
    """A table of Markdown; the first row is its heading."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# What each experiment found.


def measure_perceptron(out):
    perceptron.main(out=out)
    with jax.enable_x64(True):
        inputs, targets = perceptron.make_points(jax.random.key(0), 80)
        start, optimizer = perceptron.poor_start(), optax.sgd(0.1)
        x, y = perceptron.worst_blue_point(start, inputs, targets)
        after = perceptron.at(perceptron.descend(start, x, y, optimizer, steps=1), -1)
        path = perceptron.descend(start, inputs, targets, optimizer, 500)
        ends = [perceptron.at(path, k) for k in (0, -1)]
        return {
            "distances": [perceptron.distance(params, x) for params in (start, after)],
            "misclassified": [perceptron.misclassified(params, inputs, targets) for params in ends],
        }


def write_perceptron(found):
    first, second = found["distances"]
    before, after = found["misclassified"]
    return (
        f"With `--seed 0`, its distance to the point falls from {first:.2f} to {second:.2f}. The "
        "script prints the gradient\nbeside that of `jax.grad`. Then it trains for 500 steps on "
        f"all 80 points, which takes the misclassified points from {before}\nto {after}, and draws "
        "the path on the error surface."
    )


def measure_multilayer(out):
    multilayer.main(out=out)
    with jax.enable_x64(True):
        inputs, targets = multilayer.moons(0, 120)
        net = bp.chain(bp.dense(4), bp.sigmoid(), bp.dense(1))
        before, _ = net.init(jax.random.key(0), (2,))
        optimizer = optax.sgd(1.0, momentum=0.9)
        after, _ = multilayer.train(net, before, inputs, targets, optimizer, 1000)
        return {
            "accuracies": [multilayer.accuracy(net, p, inputs, targets) for p in (before, after)]
        }


def write_multilayer(found):
    before, after = found["accuracies"]
    return (
        "With `--seed 0`, 1,000 steps change the accuracy on the half-moons from "
        f"{before:.0%} to {after:.0%}."
    )


def measure_digits(out):
    models = ("conv", "mlp")  # the default last: its picture is that of the gallery
    runs = {
        model: [digits.main(digits.Config(model=model, seed=s, out=out)) for s in reversed(SEEDS)]
        for model in models
    }
    return {
        model: {"mean": np.mean(tests), "lowest": min(tests), "highest": max(tests)}
        for model, tests in reversed(runs.items())
    }


def write_digits(found):
    about = {
        "mlp": "`mlp` (the default): dense layers only",
        "conv": "`conv`: two convolutions before the dense layers",
    }
    rows = [
        (about[name], f"{one['mean']:.1%}", f"{100 * one['lowest']:.1f} to {one['highest']:.1%}")
        for name, one in found.items()
    ]
    title = f"test accuracy, mean over `--seed` {SEEDS[0]} to {SEEDS[-1]}"
    return table(("`--model`", title, "lowest to highest"), *rows)


def measure_private(out):
    runs = [private.main(private.Config(seed=seed, out=out)) for seed in reversed(SEEDS)]
    kept, plain = zip(*reversed(runs), strict=True)
    return {"private": np.mean(kept), "not private": np.mean(plain)}


def write_private(found):
    about = {
        "private": "private: clipped gradients with Gaussian noise",
        "not private": "not private: the same network, settings and batches",
    }
    title = f"test accuracy, mean over `--seed` {SEEDS[0]} to {SEEDS[-1]}"
    rows = [(about[name], f"{mean:.1%}") for name, mean in found.items()]
    return table(("training, at epsilon 3 and delta 1e-4", title), *rows)


def measure_curvature(out):
    results = curvature.main(curvature.Config(out=out))
    found = {}
    for name, result in results.items():
        steps = float(np.median(curvature.steps_to(result.losses, 1.5)))
        seconds = steps * float(np.median(result.seconds))
        if math.isfinite(steps):
            found[name] = {"steps": steps, "seconds": seconds}
    return found


def write_curvature(found):
    names = {"KFAC": "KFAC", "SGD": "SGD with momentum", "Adam": "Adam"}
    rows = [
        (names[name], f"{found[name]['steps']:.0f}", f"{found[name]['seconds']:.2f}")
        if name in found
        else (names[name], "never", "never")
        for name in names
    ]
    heads = "optimizer", "steps to the target", "seconds to the target"
    return f"{table(heads, *rows)}\n\nMeasured on DATE, with LOAD."


def measure_alignment(out):
    found = alignment.main(alignment.Config(out=out)).digits
    return {
        name: {
            "mean": float(np.mean(reader.test)),
            "deviation": float(np.std(reader.test, ddof=1)),
            "angle": float(np.mean(reader.angles.delta[:, -1]))
            if "delta" not in alignment.NO_ANGLES.get(name, ())
            else None,
        }
        for name, reader in found.items()
    }


def write_alignment(found):
    def angle(value):
        return "-" if value is None else f"{value:.0f}"

    rows = [
        (
            name,
            f"{100 * one['mean']:.1f} ± {100 * one['deviation']:.1f} %",
            angle(one["angle"]),
        )
        for name, one in found.items()
    ]
    heads = "rule", "test accuracy", "angle of the error to the exact one, degrees"
    return table(heads, *rows)


def measure_ensemble(out):
    ways = ensemble.main(ensemble.Config(out=out))
    return {name: way.seconds.tolist() for name, way in ways.items()}


def write_ensemble(found):
    ratio = np.median(found["one by one"]) / np.median(found["at once"])
    ends = np.divide(found["one by one"], found["at once"])
    return (
        "On two cores, which one network already keeps busy, `vmap` took "
        f"{1 / ratio:.2f} of the time of one network after another\n({1 / max(ends):.2f} to "
        f"{1 / min(ends):.2f} over {len(ends)} rounds, on DATE, with LOAD), compilation aside."
    )


def measure_memory(out):
    known, _ = memory.main(memory.Config(out=out))
    return {
        "delays": memory.Config().delays,
        **{p: {w: np.median(r, axis=1).tolist() for w, r in by.items()} for p, by in known.items()},
    }


def write_memory(found):
    first, *rest = found["delays"]
    heads = [f"{p}, delay {first}" for p in ("copy", "adding")]
    columns = [heads[0], *rest, heads[1], *rest]
    rows = []
    for way, scores in found["copy"].items():
        name = f"{way}, {memory.Config().horizon} steps" if way == memory.CUT else way
        rows.append((name, *(f"{s:z.2f}" for s in (*scores, *found["adding"][way]))))
    return table(("", *columns), *rows) + "\n\nMeasured on DATE."


QUOTES = {
    "perceptron": Quote(measure_perceptron, write_perceptron),
    "multilayer": Quote(measure_multilayer, write_multilayer),
    "digits": Quote(measure_digits, write_digits),
    "private": Quote(measure_private, write_private),
    "curvature": Quote(measure_curvature, write_curvature),
    "alignment": Quote(measure_alignment, write_alignment),
    "ensemble": Quote(measure_ensemble, write_ensemble),
    "memory": Quote(measure_memory, write_memory),
}


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"quote: {error}") from None
