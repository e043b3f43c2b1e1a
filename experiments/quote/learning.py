"""What the experiments found that show how a network learns."""

import jax
import numpy as np
import optax

import jaxbp as bp
from experiments import alignment, digits, gpt, memory, multilayer, perceptron
from experiments.explorer import __main__ as explorer
from experiments.quote.text import SEEDS, Quote, table


def measure_explorer(out):
    return {"bytes": explorer.main(explorer.Config(out=out)).stat().st_size}


def write_explorer(found):
    return f"The page is one file of {found['bytes'] / 1e6:.1f} MB, without links."


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
    "explorer": Quote(measure_explorer, {"explorer": write_explorer}),
    "perceptron": Quote(measure_perceptron, {"perceptron": write_perceptron}),
    "multilayer": Quote(measure_multilayer, {"multilayer": write_multilayer}),
    "digits": Quote(measure_digits, {"digits": write_digits}),
    "alignment": Quote(
        measure_alignment,
        {
            "alignment linear": write_alignment_linear,
            "alignment": write_alignment,
            "alignment later": write_alignment_later,
        },
    ),
    "gpt": Quote(measure_gpt, {"gpt": write_gpt, "gpt noise": write_gpt_noise}),
    "memory": Quote(measure_memory, {"memory": write_memory}),
}
