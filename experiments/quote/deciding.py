"""What the experiments found that use a reading of the sweep, or lay it out in another way."""

import math

import numpy as np

from experiments import curvature, ensemble, mislabeled, private
from experiments.quote.text import OTHERS, SEEDS, Quote, table


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


QUOTES = {
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
    "ensemble": Quote(measure_ensemble, {"ensemble": write_ensemble}),
}
