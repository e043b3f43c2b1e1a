"""The figures that experiments/README.md quotes: recorded, and written from the record.

Each quote is a paragraph or a table between two markers, and a function that writes it from the
recorded numbers of an experiment. The records are in gallery/quoted.json. A test compares the text
with them.

  python -m experiments.quote                    writes all quotes from the records
  python -m experiments.quote curvature memory   runs these experiments, records what they found,
                                                 and replaces their pictures

Numbers differ between machines, and times also between runs: a record says when it was made.
"""

import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
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
    gpt,
    memory,
    mislabeled,
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
OTHERS = "others"  # a folder for runs whose pictures are not in the gallery
WIDTH = 120  # of the README's lines


class Quote(NamedTuple):
    """What the README says of an experiment.

    Attributes:
      measure: `measure(out) -> numbers` runs the experiment; the numbers are for JSON.
      parts: by the name in the part's markers, `write(numbers) -> text`. In the text, DATE and LOAD
        stand for when the numbers were recorded and how busy the machine was.
    """

    measure: Callable[[Path], dict[str, Any]]
    parts: dict[str, Callable[[dict[str, Any]], str]]


@dataclass(frozen=True)
class Config:
    """Writes the figures that experiments/README.md quotes from their records."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The experiments to run first."""
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
    print(f"{sum(len(quote.parts) for quote in QUOTES.values())} quotes written to {README}")


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
        for part, write in quote.parts.items():
            begin, end = markers(part)
            if not text.count(begin) == text.count(end) == 1:
                raise ValueError(f"README.md needs `{begin}` and `{end}` once each")
            before, rest = text.split(begin)
            _, after = rest.split(end)
            own = write(found[name]["numbers"])
            own = own.replace("DATE", found[name]["date"]).replace("LOAD", load_of(found[name]))
            text = f"{before}{begin}\n{wrapped(own)}\n{end}{after}"
    return text


def load_of(found: dict[str, Any]) -> str:
    """How busy the machine was before the experiment, in words."""
    if "load" not in found:
        return "a load that was not recorded"
    return f"a load of {found['load']} on {found['cores']} cores"


def wrapped(text: str) -> str:
    """The text with its paragraphs, but not its tables, in lines of the README's width."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part.startswith("|") else folded(part) for part in parts)


def folded(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(*rows: tuple[Any, ...]) -> str:
    """A table of Markdown; the first row is its heading."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# How long each command takes.

QUESTIONS = {
    "explorer": "What does the backward pass look like, step by step, in a page that one can "
    "touch?",
    "perceptron": "How does one gradient step move the line of a single sigmoid unit?",
    "multilayer": "How do hidden units combine to a boundary that bends?",
    "digits": "Does a network trained by explicit backpropagation read handwritten digits?",
    "mislabeled": "Which training labels are wrong?",
    "private": "How much accuracy does differential privacy cost?",
    "curvature": "How many steps does KFAC save over Adam and SGD?",
    "alignment": "Do networks learn when other weights than their own carry the error back?",
    "ensemble": "Is it faster to train many networks by one `vmap`?",
    "gpt": "Does a small GPT learn to write, and what does one sweep say about its training?",
    "memory": "Which ways of assigning credit through time bridge which delay?",
    "scaling": "How does the cost of a sweep grow with the batch, the network and the devices?",
}


def measure_times(out):
    seconds = {}
    for name in QUESTIONS:
        started = time.perf_counter()
        command = [sys.executable, "-m", f"experiments.{name}", "--out", str(out / OTHERS)]
        subprocess.run(command, check=True)
        seconds[name] = time.perf_counter() - started
    return seconds


def write_times(found):
    places = {"scaling": "several-devices-and-hosts"}
    rows = [
        (f"[{name}](#{places.get(name, name)})", question, f"{found[name]:.0f} s")
        for name, question in QUESTIONS.items()
    ]
    return (
        f"{table(('experiment', 'question', 'time'), *rows)}\n\nA time is that of the whole "
        "command with its defaults, compilation included. Measured on DATE, with LOAD."
    )


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
        "script prints the gradient beside that of `jax.grad`. Then it trains for 500 steps on "
        f"all 80 points, which takes the misclassified points from {before} to {after}, and draws "
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


def measure_mislabeled(out):
    models = {"flax": out / OTHERS, "jaxbp": out}  # the default last: its picture is the gallery's
    found, first = {}, {}
    for model, folder in models.items():
        seeds = reversed(SEEDS) if model == "jaxbp" else (SEEDS[0],)
        for seed in seeds:
            config = mislabeled.Config(model=model, seed=seed, out=folder)
            ranking = mislabeled.main(config)
            flipped = ranking.given != ranking.original
            top = mislabeled.order(ranking.scores[config.rank_by])[: config.suspects]
            first[model, seed] = int(np.sum(flipped[top]))
            found[model] = {
                name: mislabeled.quality(scores, flipped)._asdict()
                for name, scores in ranking.scores.items()
            }
    return {
        "examples": len(flipped),
        "flipped": int(np.sum(flipped)),
        "suspects": mislabeled.Config().suspects,
        "first": [first["jaxbp", seed] for seed in SEEDS],
        "first, flax": first["flax", SEEDS[0]],
        "scores": found["jaxbp"],
        "scores, flax": found["flax"],
    }


def write_mislabeled(found):
    about = {
        "self-influence": "self-influence (TracIn)",
        "held-out": "held-out: influence on the validation examples (TracIn)",
        "grand": "grand: norm of the gradient, early in training",
        "el2n": "el2n: norm of delta, early in training",
    }
    count, flipped = found["suspects"], found["flipped"]
    chance = flipped / found["examples"]
    heads = (
        "score",
        f"precision at {(flipped + 1) // 2}",
        f"precision at {flipped}",
        "average precision",
    )
    rows = [
        (about[name], f"{one['half']:.1%}", f"{one['whole']:.1%}", f"{one['average']:.3f}")
        for name, one in found["scores"].items()
    ]
    return (
        f"The script flips {chance:.0%} of the training labels of the digits, {flipped} labels, "
        "and ranks all training examples by four scores. By the norm of delta early in training "
        f"(EL2N), {found['first'][0]} of the first {count} suspects are flipped labels "
        f"({min(found['first'])} to {max(found['first'])} over {len(found['first'])} seeds). By "
        f"chance it would be {chance * count:.0f}. All four scores, with `--seed 0`:\n\n"
        + table(heads, *rows, ("chance", f"{chance:.1%}", f"{chance:.1%}", f"{chance:.3f}"))
    )


def write_mislabeled_flax(found):
    *most, last = (f"{one['average']:.3f}" for one in found["scores, flax"].values())
    return (
        f"With `--seed 0`, {found['first, flax']} of the first {found['suspects']} suspects by "
        f"`el2n` are flipped labels, and the average precisions are {', '.join(most)} and {last}, "
        "in the order of the table."
    )


def measure_private(out):
    lifted = private.main(private.Config(model="flax", out=out / OTHERS))
    runs = [private.main(private.Config(seed=seed, out=out)) for seed in reversed(SEEDS)]
    kept, plain = zip(*reversed(runs), strict=True)
    return {
        "private": np.mean(kept),
        "not private": np.mean(plain),
        "with seed 0": {"jaxbp": runs[-1], "flax": lifted},
    }


def write_private(found):
    about = {
        "private": "private: clipped gradients with Gaussian noise",
        "not private": "not private: the same network, settings and batches",
    }
    title = f"test accuracy, mean over `--seed` {SEEDS[0]} to {SEEDS[-1]}"
    rows = [(text, f"{found[name]:.1%}") for name, text in about.items()]
    return table(("training, at epsilon 3 and delta 1e-4", title), *rows)


def write_private_flax(found):
    about = {
        "jaxbp": "`jaxbp` (the default): the library's layers",
        "flax": "`flax`: Flax, lifted",
    }
    rows = [
        (text, *(f"{accuracy:.1%}" for accuracy in found["with seed 0"][name]))
        for name, text in about.items()
    ]
    return table(("network", "private", "not private"), *rows)


def measure_curvature(out):
    return descents(curvature.Config(out=out))


def measure_curvature_others(out):
    return {
        task: descents(curvature.Config(task=task, steps=300, out=out / OTHERS))
        for task in ("flax", "gpt")
    }


def descents(config):
    """The median steps to the target, None if never, and the seconds of a step, by optimizer."""
    target = curvature.make_problem(config).target
    found = {}
    for name, result in curvature.main(config).items():
        steps = float(np.median(curvature.steps_to(result.losses, target)))
        found[name] = {
            "steps": steps if math.isfinite(steps) else None,
            "seconds": float(np.median(result.seconds)),
        }
    return found


OPTIMIZERS = {"KFAC": "KFAC", "SGD": "SGD with momentum", "Adam": "Adam"}


def steps_and_seconds(one):
    """The steps to the target and the seconds to it, in words."""
    if one["steps"] is None:
        return "never", "never"
    return f"{one['steps']:.0f}", f"{one['steps'] * one['seconds']:.2f}"


def write_curvature(found):
    rows = [(text, *steps_and_seconds(found[name])) for name, text in OPTIMIZERS.items()]
    heads = "optimizer", "steps to the target", "seconds to the target"
    return f"{table(heads, *rows)}\n\nMeasured on DATE, with LOAD."


def write_curvature_others(found):
    about = {
        "flax": "Flax classifier 64-64-32-10, lifted; 0.001 nats per image",
        "gpt": "GPT, 2 blocks of 32 features; 3 nats per sequence",
    }
    rows = []
    for task, network in about.items():
        for name, text in OPTIMIZERS.items():
            one = found[task][name]
            steps, seconds = steps_and_seconds(one)
            first = network if name == next(iter(OPTIMIZERS)) else ""
            rows.append((first, text, steps, f"{1e3 * one['seconds']:.1f}", seconds))
    heads = "network", "optimizer", "steps to the target", "ms a step", "seconds to the target"
    ratios = [found[task]["KFAC"]["seconds"] / found[task]["Adam"]["seconds"] for task in about]
    return (
        f"A step of KFAC took {ratios[0]:.1f} times as long as one of Adam on the classifier, and "
        f"{ratios[1]:.1f} times on the GPT:\n\n{table(heads, *rows)}\n\nMeasured on DATE, with "
        "LOAD."
    )


def measure_alignment(out):
    linear, found = alignment.main(alignment.Config(out=out))
    later = alignment.learn_digits(alignment.Config(epochs=100))
    return {
        "linear": [float(np.median(linear[alignment.RANDOM].angles[:, i])) for i in (0, -1)],
        "digits": {
            name: {
                "mean": float(np.mean(reader.test)),
                "deviation": float(np.std(reader.test, ddof=1)),
                "angle": float(np.mean(reader.angles.delta[:, -1]))
                if "delta" not in alignment.NO_ANGLES.get(name, ())
                else None,
            }
            for name, reader in found.items()
        },
        "after 100 epochs": {name: float(np.mean(reader.test)) for name, reader in later.items()},
    }


def write_alignment_linear(found):
    first, final = found["linear"]
    return (
        "They do. In the first task, the one of Lillicrap et al. (2016), a linear network learns a "
        "linear map by feedback alignment. Fixed random matrices carry the error back. The angle "
        f"between this error and the exact error falls from {first:.0f} to {final:.0f} degrees "
        "during training (medians of five draws)."
    )


def write_alignment(found):
    def angle(value):
        return "-" if value is None else f"{value:.0f}"

    rows = [
        (
            name,
            f"{100 * one['mean']:.1f} ± {100 * one['deviation']:.1f} %",
            angle(one["angle"]),
        )
        for name, one in found["digits"].items()
    ]
    heads = "rule", "test accuracy", "angle of the error to the exact one, degrees"
    return table(heads, *rows)


def write_alignment_later(found):
    *means, control = found["after 100 epochs"].values()
    return (
        "The rules differ mainly in how fast they learn: after 100 epochs, all but the last are "
        f"between {100 * min(means):.1f} and {100 * max(means):.1f} %, and the last is at "
        f"{100 * control:.1f} %."
    )


def measure_ensemble(out):
    default = ensemble.Config().width
    found = {}
    for width in (8, default):  # the default last: its picture is that of the gallery
        folder = out if width == default else out / OTHERS
        ways = ensemble.main(ensemble.Config(width=width, out=folder))
        found[str(width)] = {name: way.seconds.tolist() for name, way in ways.items()}
    return found


def write_ensemble(found):
    rows = []
    for width, ways in found.items():
        ratio = np.median(ways["at once"]) / np.median(ways["one by one"])
        each = np.divide(ways["at once"], ways["one by one"])
        rows.append((width, f"{ratio:.2f}", f"{min(each):.2f} to {max(each):.2f}"))
    heads = (
        "units of the first layer, twice those of the second",
        "time of `vmap` / time one by one",
        f"lowest to highest of {len(each)} rounds",
    )
    return f"{table(heads, *rows)}\n\nWithout compilation, on DATE, with LOAD."


def measure_gpt(out):
    result = gpt.main(gpt.Config(check=True, out=out))
    ratios = gpt.noise_ratios(result.points)
    return {
        "parameters": sum(result.counts.values()),
        "losses": result.losses,
        "noise": {
            "count": len(ratios),
            **dict(
                zip(("lowest", "median", "highest"), np.quantile(ratios, (0, 0.5, 1)), strict=True)
            ),
        },
        "difference": float(max(result.differences.values())),
    }


def write_gpt(found):
    config = gpt.Config()
    about = {"unigrams": "unigrams", "bigrams": "bigrams", "network": "the GPT"}
    rows = [(text, f"{found['losses'][name]:.2f}") for name, text in about.items()]
    return (
        f"It has {found['parameters']:,} parameters and trains for {config.steps:,} steps of "
        f"{config.batch_size} sequences of {config.positions} characters. Its loss on the "
        f"validation text:\n\n{table(('model', 'nats per character'), *rows)}\n\nMeasured on DATE, "
        "with one seed. The learning rate was the better of two, chosen on the same validation "
        "text."
    )


def write_gpt_noise(found):
    noise = found["noise"]
    return (
        f"The noise scale of all parameters was {noise['median']:.1f} times as large (the median "
        f"of {noise['count']} measurements during training, from {noise['lowest']:.1f} to "
        f"{noise['highest']:.1f}).\n\n`--check` first compares the gradient of every parameter "
        "with autodiff's in float64. The largest relative difference was "
        f"{found['difference']:.0e}."
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
    "times": Quote(measure_times, {"times": write_times}),
    "perceptron": Quote(measure_perceptron, {"perceptron": write_perceptron}),
    "multilayer": Quote(measure_multilayer, {"multilayer": write_multilayer}),
    "digits": Quote(measure_digits, {"digits": write_digits}),
    "mislabeled": Quote(
        measure_mislabeled,
        {"mislabeled": write_mislabeled, "mislabeled flax": write_mislabeled_flax},
    ),
    "private": Quote(
        measure_private, {"private": write_private, "private flax": write_private_flax}
    ),
    "curvature": Quote(measure_curvature, {"curvature": write_curvature}),
    "curvature-others": Quote(
        measure_curvature_others, {"curvature others": write_curvature_others}
    ),
    "alignment": Quote(
        measure_alignment,
        {
            "alignment linear": write_alignment_linear,
            "alignment": write_alignment,
            "alignment later": write_alignment_later,
        },
    ),
    "ensemble": Quote(measure_ensemble, {"ensemble": write_ensemble}),
    "gpt": Quote(measure_gpt, {"gpt": write_gpt, "gpt noise": write_gpt_noise}),
    "memory": Quote(measure_memory, {"memory": write_memory}),
}


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"quote: {error}") from None
