"""A GPT learns to write, one character at a time, by explicit backpropagation.

The network reads T characters and predicts the next character at each position. It is a stack of L
equal blocks in one compiled loop. Each block is attention and a feed-forward network, both with a
residual connection. By default the text is the reference on the Python language that comes with
Python; `--text FILE` reads another.

The sweep of each step computes the gradient, and what the figure shows besides the loss:

  the error signal   sqrt(mean_n |delta_n|^2) at the outputs of every block
  the noise scale    tr S / |G|^2, with G the expectation of an example's gradient and S its
                     covariance: the batch size at which noise and signal are equal

An example is a sequence of T characters, and its loss is the sum of its T losses. The noise scale
needs two numbers per parameter, the mean of |g_n|^2 and the squared norm of the mean gradient. For
the gains and biases of the normalisation layers they cost little, and they predict the noise scale
of all parameters up to a factor. Some steps read all parameters for comparison.

`--devices` and `--processes` divide every batch over devices. Each of them has the parameters, and
its share of the optimizer's moments.

The baselines are the frequency of each character (unigrams), and its frequency after the previous
character (bigrams). They are counted on the training text, with one added to each count. Baselines
and network are measured on the validation text, the last tenth, cut into sequences of T. The first
characters of a sequence have little context.

Sources:
  "Language Models are Unsupervised Multitask Learners", Radford et al., 2019: the network.
  "An Empirical Model of Large-Batch Training", McCandlish, Kaplan, Amodei, 2018: the noise scale.
  "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
  Transformers", Gray, Tiwari, Bergsma, Hestness, 2024.
  "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", Rajbhandari, Rasley,
  Ruwase, He, 2020: the optimizer's moments divided over the devices.
"""

import importlib
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxbp as bp
from experiments.common import devices, figures, files
from experiments.common.flags import raise_wrong, too_small, wrong_flags
from experiments.common.resume import NOT_RESUMED, Resumed
from jaxbp.training.nonfinite import is_finite

LOSS = bp.softmax_cross_entropy
HELD_OUT = 0.1  # the share of the text, at its end, for validation
WARM_UP = 0.1  # the share of the steps
WEIGHT_DECAY = 0.1  # of matrices and tables
EVERY = 5  # chunks from one measurement to the next: validation loss, sizes of all parameters
SMOOTHING = 0.7  # the weight of the previous average, per chunk
TOLERANCE = 1e-10  # the largest relative difference that the check allows


@dataclass(frozen=True)
class Config:
    """Trains a GPT on the characters of a text, by default one that comes with Python."""

    text: Path | None = None
    """A text file in UTF-8, instead of the reference on the Python language."""
    blocks: int = 4
    """The number of blocks of attention and feed-forward network."""
    features: int = 128
    """The number of features of the residual stream."""
    heads: int = 4
    """The number of attention heads; features must be a multiple of it."""
    positions: int = 64
    """The sequence length T, in characters."""
    batch_size: int = 16
    """The number of sequences per step, at least 2."""
    steps: int = 1000
    """The number of training steps."""
    chunk: int = 20
    """The number of steps in one compiled loop; the progress bar moves after each loop."""
    learning_rate: float = 3e-3
    """The highest learning rate of AdamW, after the warm-up and before the decay."""
    remat: bool = False
    """Recompute the inside of each block in the backward pass: less memory, more time."""
    check: bool = False
    """First compare the gradient of every parameter with autodiff's, in float64."""
    prompt: str | None = None
    """The text that the sample continues; by default the first T validation characters."""
    length: int = 500
    """The number of characters of the sample."""
    temperature: float = 0.7
    """The temperature of the sample: 0 takes the most probable character, 1 samples the model."""
    quick: bool = False
    """Make only a fifth of the steps."""
    seed: int = 0
    """The seed of the initial weights, the sequences of each step and the sample."""
    out: Path = Path("out")
    """The folder for the figure."""
    resume: bool = False
    """Whether to store what is trained in `out`, and to go on from what is stored there."""
    devices: int = 1
    """The number of devices of each process; a machine without accelerators simulates them."""
    processes: int = 1
    """The number of processes. This machine runs all, on its CPU, if JAX_PROCESS_ID is not set."""


class Sizes(NamedTuple):
    """Squared sizes that are read off one parameter; in a stack, arrays with first axis L.

    Attributes:
      of_examples: mean_n |g_n|^2.
      of_mean: |mean_n g_n|^2.
      of_errors: mean_n |delta_n|^2, over all positions and outputs.
    """

    of_examples: jax.Array
    of_mean: jax.Array
    of_errors: jax.Array


class Noise(NamedTuple):
    """The variance and the squared mean of the examples' gradients.

    Attributes:
      trace: tr S.
      sq_norm: |G|^2.
    """

    trace: float
    sq_norm: float


class Point(NamedTuple):
    """The averages over a chunk of steps.

    Attributes:
      step: the last step of the chunk, counted from 1.
      loss: the training loss, in nats per character.
      errors: the error signal of every block, [L].
      noise: the `Noise` of the normalisation layers.
      whole_noise: the `Noise` of all parameters, or None if they were not read.
      held_out: the validation loss after the last step, or None if it was not measured.
    """

    step: int
    loss: float
    errors: np.ndarray
    noise: Noise
    whole_noise: Noise | None
    held_out: float | None


class Result(NamedTuple):
    """The result of training.

    Attributes:
      points: a `Point` for each chunk of steps.
      losses: the validation losses of unigrams, bigrams and network, in nats per character.
      sample: the text that the network wrote.
      counts: the number of parameters of each part of the network.
      differences: what the check found: for each part, the largest relative difference of the
        gradient from autodiff's. Empty without the check.
    """

    points: list[Point]
    losses: dict[str, float]
    sample: str
    counts: dict[str, int]
    differences: dict[str, float]


def main(config: Config) -> Result:
    """Trains, prints a sample, draws the figure, and returns the `Result`."""
    started = perf_counter()
    if config.quick:
        config = shortened(config)
    require(config)
    text = reference_text() if config.text is None else read_text(config.text)
    characters, tokens = tokenize(text)
    train, held_out = split(tokens, config.positions)
    prompt = text[len(train) :][: config.positions] if config.prompt is None else config.prompt
    require_prompt(prompt, characters)
    mesh = devices.make_data_mesh(config.devices)
    net = make_network(config, len(characters))
    print(
        f"{'the reference on Python' if config.text is None else config.text}: {len(train):,} "
        f"training and {len(held_out):,} validation characters, {len(characters)} different ones\n"
    )
    counts = count_parameters(net, config)
    print_network(counts)
    if mesh.size > 1:
        share = config.batch_size // mesh.size
        print(f"{devices.describe(mesh)}; {share} of the {config.batch_size} sequences each\n")
    differences = {}
    if config.check:
        key = jax.random.key(config.seed)
        differences = check(net, key, config.positions, len(characters))

    losses = baselines(train, *sequences(held_out, config.positions), len(characters))
    stored = NOT_RESUMED
    if jax.process_index() == 0:
        # Where it is computed changes the numbers by rounding only: a run may go on elsewhere.
        flags = asdict(replace(config, devices=1, processes=1))
        stored = Resumed("gpt", flags)
    params, points = learn(net, train, held_out, config, mesh, stored)
    losses["network"] = points[-1].held_out
    print_losses(losses)
    print_noise(points)
    sample = write(net, params, prompt, characters, config)
    print_sample(prompt, sample, config)
    if jax.process_index() == 0:
        figures.save(draw(points, losses, config), config.out / "gpt.png")
        written = {"characters": list(characters), "sample": sample}
        files.save_trained(config.out / "gpt.npz", params, written)
    print(f"done in {perf_counter() - started:.0f} s, compilation included")
    return Result(points, losses, sample, counts, differences)


def shortened(config):
    """Returns the config with a fifth of the steps, rounded down to chunks."""
    chunks = max(config.steps // (5 * max(config.chunk, 1)), 1)
    return replace(config, steps=chunks * config.chunk)


def require(config):
    """Raises if a flag is wrong."""
    wrong = too_small(
        config, blocks=1, features=1, heads=1, positions=1, batch_size=2, steps=1, chunk=1,
        length=0, devices=1, processes=1,
    )  # fmt: skip
    count = config.devices * config.processes
    if count > 0 and config.batch_size % count:
        wrong.append(
            f"batch-size is {config.batch_size}; it takes a multiple of {count}, the number of "
            "devices"
        )
    if config.chunk > 0 and config.steps % config.chunk:
        wrong.append(f"steps is {config.steps}; it takes a multiple of chunk, {config.chunk}")
    if not 0 <= config.temperature < math.inf:
        wrong.append(f"temperature is {config.temperature}; it takes 0 or a positive number")
    wrong += wrong_flags(seed=config.seed, out=config.out, learning_rate=config.learning_rate)
    raise_wrong(wrong)


# The text.


def reference_text():
    """Returns the help topics of Python, one after another.

    Some topics contain paragraphs of others. Each paragraph is kept only once, so that no
    validation text is also training text.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ValueError("this Python has no pydoc_data. Pass a text file by --text.") from None
    paragraphs = (part for topic in topics.values() for part in topic.strip("\n").split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ValueError(f"{path}: {byte} is not UTF-8.") from None


def tokenize(text):
    """Returns the sorted different characters, and the text as indices of them."""
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    return characters, np.array([numbers[character] for character in text], np.int32)


def split(tokens, positions):
    """Splits the text into a training part and, after it, a validation part."""
    cut = len(tokens) - round(HELD_OUT * len(tokens))
    parts = tokens[:cut], tokens[cut:]
    if min(map(len, parts)) <= positions:
        raise ValueError(
            f"positions is {positions}; it takes less than {len(parts[1])}, the number of "
            f"validation characters in a text of {len(tokens)}."
        )
    return parts


def require_prompt(prompt, characters):
    if not prompt:
        raise ValueError("prompt is empty; it takes at least one character.")
    if unknown := sorted(set(prompt) - set(characters)):
        raise ValueError(
            f"prompt has {', '.join(map(repr, unknown))}, which the text does not have."
        )


def windows(tokens, starts, positions):
    """Returns the sequences of T tokens at each start, and of the next tokens, [N, T] each."""
    places = starts[:, None] + np.arange(positions + 1)
    return tokens[places[:, :-1]], tokens[places[:, 1:]]


def sequences(tokens, positions):
    """Returns all sequences of the text, one after another."""
    return windows(tokens, np.arange(0, len(tokens) - positions, positions), positions)


def draw_sequences(rng, tokens, n, positions):
    """Draws n sequences at random starts."""
    return windows(tokens, rng.integers(len(tokens) - positions, size=n), positions)


def baselines(train, inputs, targets, vocabulary):
    """Computes the losses of unigrams and bigrams in nats per character, each count plus one."""
    single = 1.0 + np.bincount(train, minlength=vocabulary)
    double = np.ones((vocabulary, vocabulary))
    np.add.at(double, (train[:-1], train[1:]), 1)
    after = double / np.sum(double, axis=1, keepdims=True)
    return {
        "unigrams": float(-np.mean(np.log(single / np.sum(single))[targets])),
        "bigrams": float(-np.mean(np.log(after[inputs, targets]))),
    }


# The network.


def make_block(config):
    features = config.features
    return bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(features, config.heads, causal=True)),
        bp.residual(bp.layer_norm(), bp.dense(4 * features), bp.gelu(), bp.dense(features)),
    )


def make_network(config, vocabulary):
    block = make_block(config)
    return bp.chain(
        bp.embedding(vocabulary, config.features),
        bp.learned_positions(config.positions),
        bp.stack(bp.remat(block) if config.remat else block, config.blocks),
        bp.layer_norm(),
        bp.dense(vocabulary),
    )


def groups(tree):
    """Groups the parts of a tree that has the structure of the parameters."""
    embedding, positions, stack, last_norm, head = tree
    (norm_1, attention), (norm_2, *feed_forward) = stack.layers
    return {
        "embedding": embedding,
        "positions": positions,
        "attention": attention,
        "feed-forward": feed_forward,
        "normalisation": (norm_1, norm_2, last_norm),
        "head": head,
    }


def count_parameters(net, config):
    """Counts the parameters of each part of the network."""
    params = jax.eval_shape(lambda key: net.init(key, (config.positions,))[0], jax.random.key(0))
    parts = groups(params).items()
    return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in parts}


def print_network(counts):
    print(f"{'part':18}{'parameters':>14}")
    for name, count in counts.items():
        print(f"{name:18}{count:>14,}")
    print(f"{'all':18}{sum(counts.values()):>14,}\n")


def check(net, key, positions, vocabulary):
    """Compares the explicit gradient with autodiff's in float64; raises if they differ.

    Returns the `gradient_errors`.
    """
    errors = gradient_errors(net, key, positions, vocabulary)
    print(f"{'gradient of':18}{'largest relative difference from autodiff':>44}")
    for name, error in errors.items():
        print(f"{name:18}{error:>44.1e}")
    print()
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        raise ValueError(f"the gradient of {', '.join(wrong)} differs from autodiff's.")
    return errors


def gradient_errors(net, key, positions, vocabulary, *, batch_size=3):
    """Computes the largest difference per group, relative to the largest entry of the array."""
    init_key, move_key, token_key = jax.random.split(key, 3)
    with jax.enable_x64(True):
        params, _ = net.init(init_key, (positions,))
        # With gains of 1 and biases of 0, the check would not notice if they were left out.
        moves = jax.tree.map(jnp.asarray, optax.tree.random_like(move_key, params))
        params = jax.tree.map(lambda p, v: p + 0.1 * v, params, moves)
        tokens = jax.random.randint(token_key, (batch_size, positions + 1), 0, vocabulary)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]

        def mean_loss(params):
            outputs, _ = net.forward(params, inputs)
            return jnp.mean(LOSS(outputs, targets)[0])

        _, explicit = jax.jit(bp.value_and_grad(net, LOSS))(params, inputs, targets)
        _, expected = jax.jit(jax.value_and_grad(mean_loss))(params)

        def error(got, want):
            return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))

        errors = groups(jax.tree.map(error, explicit, expected))
    return {name: np.max(jax.tree.leaves(part)) for name, part in errors.items()}


# Training.


def sizes(signal):
    """A reading: computes the `Sizes` of a parameter."""
    deltas = signal.deltas
    return Sizes(
        of_examples=jnp.mean(bp.sq_norms(signal)),
        of_mean=jnp.sum(jnp.square(bp.mean(signal))),
        of_errors=jnp.sum(jnp.square(deltas)) / len(deltas),
    )


def make_stream_sizes(features):
    """Returns a cheaper reading: the `Sizes` of gains and biases as wide as the stream only.

    A reading does not know the place of its signal, so it includes biases of other layers. `groups`
    separates the normalisation layers later.
    """

    def stream_sizes(signal):
        is_vector = isinstance(signal, bp.Scale | bp.Bias)
        return sizes(signal) if is_vector and signal.deltas.shape[-1] == features else ()

    return stream_sizes


def make_optimizer(config):
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, round(WARM_UP * config.steps), config.steps
    )

    def decays(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "weight", params)

    return optax.adamw(schedule, b2=0.99, weight_decay=WEIGHT_DECAY, mask=decays)


def learn(net, train, held_out, config, mesh, stored=NOT_RESUMED):
    """Trains the network; returns the final parameters, and a `Point` for each chunk of steps."""
    n, positions = config.batch_size, config.positions
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(config.seed)

    def make_state():
        return bp.init_state(net, optimizer, jax.random.key(config.seed), (positions,))

    shardings = state_shardings(mesh, jax.eval_shape(make_state))
    state = jax.jit(make_state, out_shardings=shardings)()
    some, all_ = (
        make_chunk(bp.make_step(net, LOSS, optimizer, read={"sizes": read}), shardings)
        for read in (make_stream_sizes(config.features), sizes)
    )
    measure = bp.evaluate(net, LOSS, batch_size=64)
    held_out = sequences(held_out, positions)
    points, chunks = [], config.steps // config.chunk
    done = devices.from_first(stored.load("training"))
    if done is not None:
        state = bp.from_arrays(state, done["state"])
        points, rng.bit_generator.state = done["points"], done["rng"]
    total = config.steps * n * positions
    silent = jax.process_index() > 0
    with tqdm(total=total, unit="token", unit_scale=True, disable=silent) as bar:
        bar.update(len(points) * config.chunk * n * positions)
        for i in range(len(points) + 1, chunks + 1):
            looks = i % EVERY == 0 or i == chunks
            batches = draw_batches(rng, train, config)
            before = state
            state, record = (all_ if looks else some)(before, *divide(mesh, batches))
            record, params = own(record), own(state.params)
            if not is_finite((record["loss"], params)):
                arrays = devices.gathered(bp.to_arrays(before))
                explain(net, optimizer, bp.from_arrays(jax.jit(make_state)(), arrays), batches)
            loss = float(measure(params, *held_out)["loss"]) if looks else None
            points.append(make_point(i * config.chunk, record, loss, config))
            bar.update(config.chunk * n * positions)
            bar.set_postfix(step=points[-1].step, loss=f"{points[-1].loss:.3f}")
            if looks:
                arrays = devices.gathered(bp.to_arrays(state))
                done = {"state": arrays, "points": points, "rng": rng.bit_generator.state}
                stored.save("training", done)
    return own(state.params), points


def make_chunk(step, shardings):
    """Returns `chunk(state, inputs, targets) -> (state, record)`: one compiled loop of steps.

    Inputs and targets are those of a step at each index of the first axis, [K, N, T]. The record is
    the mean of the records of the steps. The state is sharded after each step as it was before.
    """

    def chunk(state, inputs, targets):
        def move(state, batch):
            state, record = step(state, *batch)
            return jax.lax.with_sharding_constraint(state, shardings), record

        state, records = jax.lax.scan(move, state, (inputs, targets))
        return state, jax.tree.map(lambda values: jnp.mean(values, axis=0), records)

    mesh = shardings.step.mesh
    return jax.jit(chunk, out_shardings=(shardings, devices.replicated(mesh)))


def state_shardings(mesh, state):
    """How the state lies on the devices: the optimizer's arrays divided, the others everywhere."""
    everywhere = jax.tree.map(lambda _: devices.replicated(mesh), state)
    moments = jax.tree.map(lambda array: devices.divided(mesh, array), state.opt_state)
    return everywhere._replace(opt_state=moments)


def own(tree):
    """The arrays of a tree on the first device of this process, where every device has them."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def draw_batches(rng, tokens, config):
    """Draws the sequences of a chunk of steps, and their targets, [K, N, T] each."""
    k, n, t = config.chunk, config.batch_size, config.positions
    return tuple(part.reshape(k, n, t) for part in draw_sequences(rng, tokens, k * n, t))


def divide(mesh, batches):
    """Divides every batch over the devices. All processes draw alike, and each keeps its share."""
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    return tuple(
        jax.make_array_from_process_local_data(sharding, part, part.shape) for part in batches
    )


def explain(net, optimizer, state, batches):
    """Raises an error that names the first step with a value that is not finite, and the layer."""
    inputs, targets = batches
    first, last = int(state.step) + 1, int(state.step) + len(inputs)
    where = f"one of steps {first} to {last}: a value is not finite."
    try:  # `fit` repeats the steps and checks each one
        bp.fit(net, LOSS, optimizer, list(zip(inputs, targets, strict=True)), state=state, epochs=1)
    except bp.NonFiniteError as error:
        step = int(error.state.step) + 1
        where = f"step {step}: the first value that is not finite came from {error.place}."
    raise ValueError(f"{where} Try a smaller learning rate.")


def make_point(step, record, held_out, config):
    """Makes the `Point` of a chunk from the record, which holds means over its steps."""
    read = groups(jax.tree.map(np.asarray, record["sizes"]))
    # The delta of the last bias of a block is the delta at the block's outputs.
    errors = np.sqrt(read["feed-forward"][-1]["bias"].of_errors)
    return Point(
        step,
        float(record["loss"]) / config.positions,
        errors,
        noise_in(read["normalisation"], config.batch_size),
        None if held_out is None else noise_in(read, config.batch_size),
        None if held_out is None else held_out / config.positions,
    )


def noise_in(tree, n):
    """Estimates the `Noise` of the parameters in a tree of `Sizes`, unbiased, from n examples."""
    parts = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Sizes))
    of_examples = sum(float(np.sum(part.of_examples)) for part in parts)
    of_mean = sum(float(np.sum(part.of_mean)) for part in parts)
    trace = (of_examples - of_mean) * n / (n - 1)
    return Noise(trace, of_mean - trace / n)


def noise_scales(noises, *, smoothing=0.0):
    """Computes the ratios tr S / |G|^2 of exponential moving averages, [K].

    A ratio is nan if the average of |G|^2 is not positive, that is, hidden by the noise.
    """
    averages = [noises[0]]
    for noise in noises[1:]:
        averages.append(smoothing * np.array(averages[-1]) + (1 - smoothing) * np.array(noise))
    trace, sq_norm = np.array(averages).T
    return trace / np.where(sq_norm > 0, sq_norm, np.nan)


def print_losses(losses):
    print(f"\n{'validation loss':18}{'nats / character':>18}{'bits / character':>18}")
    for name, loss in losses.items():
        print(f"{name:18}{loss:>18.3f}{loss / math.log(2):>18.3f}")


def noise_ratios(points):
    """The ratios of the noise scale of all parameters to the normalisation layers', where known."""
    looks = [point for point in points if point.whole_noise is not None]
    norms = noise_scales([point.noise for point in looks])
    ratios = noise_scales([point.whole_noise for point in looks]) / norms
    return ratios[np.isfinite(ratios)]


def print_noise(points):
    """Prints the median of the `noise_ratios`, and their range."""
    ratios = noise_ratios(points)
    if len(ratios):
        low, median, high = np.quantile(ratios, (0, 0.5, 1))
        print(
            "\ngradient noise scale of all parameters / of the normalisation layers:\n"
            f"{median:.2f} (median of {len(ratios)} chunks of steps; {low:.2f} to {high:.2f})"
        )


# The sample.


def write(net, params, prompt, characters, config):
    """Returns the text that the network writes after the prompt."""
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = jnp.array([numbers[character] for character in prompt], jnp.int32)
    generate = make_generator(net, config.positions, config.length, config.temperature)
    written = generate(params, tokens, jax.random.key(config.seed))
    return "".join(characters[token] for token in np.asarray(written))


def make_generator(net, positions, length, temperature):
    """Returns `generate(params, tokens, key) -> tokens [length]`; each token sees the last T."""

    def draw_next(params, window, end, key):
        # Attention is causal, so the padding after the end has no effect.
        outputs, _ = net.forward(params, window[None])
        scores = outputs[0, end - 1]
        if temperature == 0:
            return jnp.argmax(scores)
        return jax.random.categorical(key, scores / temperature)

    @jax.jit
    def generate(params, tokens, key):
        tokens = tokens[-positions:]

        def step(carry, step_key):
            window, end = carry
            token = draw_next(params, window, end, step_key).astype(window.dtype)
            full = end == positions
            window = jnp.where(full, jnp.roll(window, -1), window)
            end = jnp.where(full, end, end + 1)
            return (window.at[end - 1].set(token), end), token

        window = jnp.zeros(positions, tokens.dtype).at[: len(tokens)].set(tokens)
        start = window, jnp.asarray(len(tokens))
        return jax.lax.scan(step, start, jax.random.split(key, length))[1]

    return generate


def print_sample(prompt, sample, config):
    rule = "-" * 72
    print(
        f"\nprompt of {len(prompt)} characters, and a sample at temperature "
        f"{config.temperature:g}\n{rule}\n{prompt}{sample}\n{rule}"
    )


# The figure.


def draw(points, losses, config):
    """Draws the loss, the error signals of the blocks, and the noise scale."""
    figure = Figure(figsize=(13.5, 4.2))
    curves, errors, noise = figure.subplots(1, 3)
    draw_losses(curves, points, losses)
    draw_errors(errors, points)
    draw_noise(noise, points, config)
    for axes in figure.axes:
        axes.set(xlabel="step", xlim=(0, 1.02 * points[-1].step))
    return figure


def draw_losses(axes, points, losses):
    looks = [point for point in points if point.held_out is not None]
    axes.plot([p.step for p in points], [p.loss for p in points], label="training")
    axes.plot([p.step for p in looks], [p.held_out for p in looks], "o-", ms=4, label="validation")
    for name, style in (("unigrams", ":"), ("bigrams", "--")):
        axes.axhline(losses[name], color=figures.BLACK, linestyle=style, linewidth=1, label=name)
    axes.set(title="Loss", ylabel="nats per character")
    axes.legend()


def draw_errors(axes, points):
    """Draws one curve per block; the first block, next to the inputs, is the darkest."""
    steps, errors = [p.step for p in points], np.array([p.errors for p in points])
    shades = colormaps["viridis"](np.linspace(0, 0.85, errors.shape[1]))
    for depth, (curve, shade) in enumerate(zip(errors.T, shades, strict=True), 1):
        axes.plot(steps, curve, color=shade, label=f"block {depth}")
    axes.set(title="Error signal at each block", ylim=(0, None))
    axes.set_ylabel(r"$|\delta|$ at the outputs, root mean square")
    axes.legend(ncols=math.ceil(len(shades) / 6))


def draw_noise(axes, points, config):
    """Draws the noise scales after the warm-up: before, the gradient is many times larger."""
    points = [point for point in points if point.step > WARM_UP * config.steps]
    looks = [point for point in points if point.whole_noise is not None]
    norms = noise_scales([p.noise for p in points], smoothing=SMOOTHING)
    whole = noise_scales([p.whole_noise for p in looks])
    axes.plot([p.step for p in points], norms, label="from normalisation layers, smoothed")
    label = f"from all parameters, over {config.chunk} steps"
    axes.plot([p.step for p in looks], whole, "o", color=figures.RED, label=label)
    axes.axhline(config.batch_size, color="gray", linestyle=":", label="batch size")
    axes.set(title="Gradient noise scale, estimated in two ways")
    figures.log_where_wide(axes)
    axes.set_ylabel(f"noise scale, sequences of {config.positions} characters")
    axes.legend()


if __name__ == "__main__":
    try:
        config = tyro.cli(Config)
        require(config)
        flags = sys.argv[1:]
        devices.start("experiments.gpt", flags, config.processes, lambda: main(config))
    except (ValueError, OSError) as error:
        raise SystemExit(f"gpt: {error}") from None
