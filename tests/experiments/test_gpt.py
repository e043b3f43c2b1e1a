"""The GPT, in small: text and baselines, what is read off, what it writes, wrong flags."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbp as bp
from experiments import gpt

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
TINY = {"blocks": 2, "features": 16, "heads": 2, "positions": 8, "batch_size": 4}
VOCABULARY = 7


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def tiny():
    """A small network, its parameters and its config, for all tests that only look at them."""
    config = gpt.Config(**TINY)
    with jax.enable_x64(False):
        net = gpt.make_network(config, VOCABULARY)
        params, _ = net.init(jax.random.key(1), (config.positions,))
    # The scores then differ as much as a trained network's.
    return net, jax.tree.map(lambda p: 3 * p, params), config


# The text.


def test_the_text_that_comes_with_python_is_long_and_has_no_paragraph_twice():
    text = gpt.reference_text()
    paragraphs = text.split("\n\n")
    assert len(text) > 300_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert 80 < len(set(text)) < 200


def test_tokens_are_numbers_of_the_sorted_characters():
    characters, tokens = gpt.tokenize("banana \u00e9")
    assert characters == [" ", "a", "b", "n", "\u00e9"]
    assert tokens.tolist() == [2, 1, 3, 1, 3, 1, 0, 4]
    assert tokens.dtype == np.int32


def test_the_end_is_held_out():
    train, held_out = gpt.split(np.arange(50), 4)
    assert train.tolist() == list(range(45))
    assert held_out.tolist() == [45, 46, 47, 48, 49]
    with pytest.raises(ValueError, match="positions is 5; it takes less than 5, the number"):
        gpt.split(np.arange(50), 5)


def test_windows_lie_inside_the_text_and_reach_both_of_its_ends():
    tokens = np.arange(10, 22)
    inputs, targets = gpt.draw_sequences(np.random.default_rng(0), tokens, 300, 4)
    assert inputs.shape == targets.shape == (300, 4)
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)
    assert (inputs.min(), targets.max()) == (10, 21)


@pytest.mark.parametrize(("length", "count"), [(12, 2), (13, 3), (14, 3)])
def test_sequences_cover_the_text_once(length, count):
    inputs, targets = gpt.sequences(np.arange(length), 4)
    assert inputs.ravel().tolist() == list(range(4 * count))
    np.testing.assert_array_equal(targets, inputs + 1)


def test_baselines_are_counted_by_hand():
    # The training text is abab: a and b twice each, ab twice and ba once, and no c.
    train = np.array([0, 1, 0, 1])
    losses = gpt.baselines(train, np.array([[0, 1, 2]]), np.array([[1, 1, 0]]), 3)
    assert losses["unigrams"] == pytest.approx(-math.log(3 / 7 * 3 / 7 * 3 / 7) / 3)
    # After a, b has 2 + 1 of 2 + 3; after b, b has 0 + 1 of 1 + 3; after c, each has 1 of 3.
    assert losses["bigrams"] == pytest.approx(-math.log(3 / 5 * 1 / 4 * 1 / 3) / 3)


# What the sweep answers.


def gradients_one_by_one(net, params, inputs, targets):
    """The gradient of every example, each from a sweep over this example only: a list of trees."""
    sweep = jax.jit(bp.value_and_grad(net, gpt.LOSS))
    return [sweep(params, x[None], t[None])[1] for x, t in zip(inputs, targets, strict=True)]


def noise_by_formula(gradients):
    """tr S as the unbiased variance of all entries, and |G|^2 from it."""
    flat = np.array([np.concatenate([g.ravel() for g in jax.tree.leaves(t)]) for t in gradients])
    trace = np.sum(np.var(flat.astype(float), axis=0, ddof=1))
    return trace, np.sum(np.mean(flat.astype(float), axis=0) ** 2) - trace / len(flat)


@pytest.mark.parametrize("read", [gpt.make_stream_sizes(TINY["features"]), gpt.sizes])
def test_noise_and_error_signals_are_those_of_each_example(tiny, read):
    net, params, config = tiny
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(4, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    values, answer = jax.jit(bp.backprop(net, gpt.LOSS, read=read))(params, inputs, targets)
    record = {"sizes": answer, "loss": jnp.mean(values)}
    everything = read is gpt.sizes
    point = gpt.make_point(20, record, 16.0 if everything else None, config)

    gradients = gradients_one_by_one(net, params, inputs, targets)
    norms = [gpt.groups(tree)["normalisation"] for tree in gradients]
    np.testing.assert_allclose(point.noise, noise_by_formula(norms), rtol=1e-4)
    if everything:
        np.testing.assert_allclose(point.whole_noise, noise_by_formula(gradients), rtol=1e-4)
        assert point.held_out == 2.0
    else:
        assert point.whole_noise is None
    assert point.loss == pytest.approx(float(jnp.mean(values)) / 8)
    np.testing.assert_allclose(point.errors, errors_by_autodiff(tiny, inputs, targets), rtol=1e-4)


def errors_by_autodiff(tiny, inputs, targets):
    """The root mean square over examples of |dE_n/dy| at the outputs y of every block."""
    _, params, config = tiny
    embedding, positions, stack, norm, head = params
    block = gpt.make_block(config)

    def loss(moves):
        x = embedding["weight"][inputs] + positions["weight"]
        for depth, move in enumerate(moves):
            own = jax.tree.map(lambda leaf, depth=depth: leaf[depth], stack.layers)
            x = block.forward(own, x)[0] + move
        logits = bp.layer_norm().forward(norm, x)[0] @ head["weight"] + head["bias"]
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    moves = jnp.zeros((config.blocks, *inputs.shape, config.features))
    deltas = np.asarray(jax.jit(jax.grad(loss))(moves))
    return np.sqrt(np.mean(np.sum(deltas**2, axis=(2, 3)), axis=1))


def test_noise_scales_are_ratios_of_averages_that_forget():
    noises = [gpt.Noise(4.0, 1.0), gpt.Noise(8.0, 3.0), gpt.Noise(8.0, -9.0)]
    np.testing.assert_allclose(gpt.noise_scales(noises), [4.0, 8.0 / 3.0, np.nan])
    # 0.75 of the previous average, and 0.25 of the new value.
    expected = [4.0, 5.0 / 1.5, (0.75 * 5 + 0.25 * 8) / (0.75 * 1.5 - 0.25 * 9)]
    expected[2] = np.nan  # 5.75 / -1.125
    np.testing.assert_allclose(gpt.noise_scales(noises, smoothing=0.75), expected)


def test_the_ratio_of_the_noise_scales_is_printed(capsys):
    def point(noise, whole):
        return gpt.Point(20, 1.0, np.ones(2), noise, whole, None)

    gpt.print_noise(
        [
            point(gpt.Noise(4.0, 1.0), gpt.Noise(6.0, 1.0)),
            point(gpt.Noise(4.0, 1.0), None),
            point(gpt.Noise(4.0, 2.0), gpt.Noise(9.0, 1.0)),
            point(gpt.Noise(4.0, -1.0), gpt.Noise(9.0, 1.0)),
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "layers: 3.00 (median of 2 chunks of steps; 1.50 to 4.50)" in printed


def test_matrices_and_tables_decay_and_vectors_do_not(tiny):
    _, params, config = tiny
    optimizer = gpt.make_optimizer(replace(config, steps=20, learning_rate=0.5))

    @jax.jit
    def three_steps(params):  # the first has a learning rate of 0, and all gradients are 0
        state = optimizer.init(params)
        for _ in range(3):
            still = jax.tree.map(jnp.zeros_like, params)
            updates, state = optimizer.update(still, state, params)
            params = optax.apply_updates(params, updates)
        return params

    def compare(path, old, new):
        ratio = (1 - 0.1 * 0.25) * (1 - 0.1 * 0.5) if path[-1].key == "weight" else 1.0
        np.testing.assert_allclose(new, ratio * old, rtol=1e-5)

    jax.tree.map_with_path(compare, params, three_steps(params))


# It learns.


def test_the_second_half_of_a_copy_is_learnt():
    """Each sequence is six random characters twice: only attention can predict the second half."""
    half, n, steps = 6, 32, 200
    config = gpt.Config(
        blocks=2, features=32, heads=2, positions=2 * half - 1, batch_size=n, steps=steps,
        learning_rate=1e-2,
    )  # fmt: skip
    loss = bp.weighted(gpt.LOSS)

    def draw(seed, count):
        first = np.random.default_rng(seed).integers(8, size=(count, half))
        tokens = np.concatenate([first, first], axis=1)
        weights = np.broadcast_to(np.arange(2 * half - 1) >= half - 1, (count, 2 * half - 1))
        return tokens[:, :-1], (tokens[:, 1:], weights)

    net, optimizer = gpt.make_network(config, 8), gpt.make_optimizer(config)
    epoch = bp.make_epoch(net, loss, optimizer, batch_size=n)
    state = bp.init_state(net, optimizer, jax.random.key(0), (2 * half - 1,))
    state, _ = epoch(state, *draw(0, n * steps))
    learnt = bp.evaluate(net, loss)(state.params, *draw(99, 100))["loss"] / half
    # With 20 seeds, the highest loss was 0.002; guessing has log 8 = 2.08.
    assert float(learnt) < 0.02


# What it writes.


def write_by_hand(net, params, tokens, positions, length):
    """Always the most probable token, predicted from the last T tokens."""
    tokens, forward = list(tokens), jax.jit(net.forward)
    for _ in range(length):
        outputs, _ = forward(params, jnp.array([tokens[-positions:]]))
        tokens.append(int(jnp.argmax(outputs[0, -1])))
    return tokens[-length:]


@pytest.mark.parametrize("prompt", [6, 8, 11])
def test_the_most_probable_is_written_as_by_hand(tiny, prompt):
    net, params, config = tiny
    tokens = np.random.default_rng(prompt).integers(VOCABULARY, size=prompt)
    generate = gpt.make_generator(net, config.positions, 12, 0)
    written = generate(params, jnp.asarray(tokens), jax.random.key(0))
    assert written.tolist() == write_by_hand(net, params, tokens, config.positions, 12)
    assert len(set(written.tolist())) > 1
    again = generate(params, jnp.asarray(tokens), jax.random.key(1))
    np.testing.assert_array_equal(written, again)


def test_the_temperature_flattens_what_is_drawn(tiny):
    net, params, config = tiny
    outputs, _ = net.forward(params, jnp.array([[3, 1, 4]]))

    def draw_many(temperature):
        generate = gpt.make_generator(net, config.positions, 1, temperature)
        keys = jax.random.split(jax.random.key(0), 4000)
        drawn = jax.vmap(lambda key: generate(params, jnp.array([3, 1, 4]), key)[0])(keys)
        return np.bincount(drawn, minlength=VOCABULARY) / 4000

    for temperature in (0.5, 2.0):
        expected = jax.nn.softmax(outputs[0, -1] / temperature)
        # Four standard deviations of a frequency at most.
        np.testing.assert_allclose(draw_many(temperature), expected, atol=4 * 0.5 / 4000**0.5)


# The command.


SMALL = {**TINY, "steps": 300, "chunk": 10, "length": 30, "learning_rate": 3e-2}


def write_text(folder):
    path = folder / "text.txt"
    path.write_text("the cat sat on the mat, and the rat ran. " * 20, encoding="utf-8")
    return path


def test_it_learns_writes_and_draws(tmp_path, capsys):
    config = gpt.Config(
        **SMALL, text=write_text(tmp_path), quick=True, check=True, prompt="the ",
        out=tmp_path / "out",
    )  # fmt: skip
    result = gpt.main(config)
    printed = capsys.readouterr().out
    assert "text.txt: 738 training and 82 validation characters, 14 different ones" in printed
    assert "largest relative difference from autodiff" in printed
    assert result.counts.keys() == result.differences.keys()
    assert f"all               {sum(result.counts.values()):>14,}" in printed
    assert 0 < max(result.differences.values()) < gpt.TOLERANCE
    assert result.losses["network"] < result.losses["unigrams"]
    assert f"network           {result.losses['network']:>18.3f}" in printed
    assert len(result.sample) == 30
    assert set(result.sample) <= set("the cat sat on the mat, and the rat ran. ")
    assert f"the {result.sample}\n" in printed
    assert [point.step for point in result.points] == [10, 20, 30, 40, 50, 60]
    assert [point.held_out is None for point in result.points] == [True] * 4 + [False] * 2
    assert files_in(tmp_path) == ["gpt.npz", "gpt.png", "text.txt"]
    assert (tmp_path / "out" / "gpt.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("steps", "chunk", "expected"), [(1400, 20, 280), (12, 2, 2), (3, 3, 3)])
def test_quick_is_a_fifth_of_the_steps(steps, chunk, expected):
    config = gpt.shortened(gpt.Config(steps=steps, chunk=chunk))
    assert (config.steps, config.chunk) == (expected, chunk)


def test_recomputed_blocks_have_the_same_gradient(tiny):
    net, params, config = tiny
    other = gpt.make_network(replace(config, remat=True), VOCABULARY)
    assert "remat" in other.name
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(4, 9))
    grads = [
        bp.value_and_grad(n, gpt.LOSS)(params, tokens[:, :-1], tokens[:, 1:])[1]
        for n in (net, other)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


def test_a_wrong_derivative_stops_the_check(tmp_path, monkeypatch, capsys):
    right = bp.gelu()

    def backward(params, cache, dy, **how):
        dx, readings = right.backward(params, cache, dy, **how)
        return dx * (1 + 1e-8), readings

    monkeypatch.setattr(gpt.bp, "gelu", lambda: right._replace(backward=backward))
    config = gpt.Config(**SMALL, text=write_text(tmp_path), check=True, out=tmp_path / "out")
    with pytest.raises(ValueError, match="the gradient of embedding, positions, attention, feed-"):
        gpt.main(config)
    assert "network" not in capsys.readouterr().out
    assert files_in(tmp_path) == ["text.txt"]


def test_a_step_that_is_not_finite_is_named(tmp_path, monkeypatch):
    # The third chunk begins after eight steps: its first step is huge, and its second overflows.
    rates = optax.piecewise_constant_schedule(1e-3, {8: 1e30})
    monkeypatch.setattr(gpt, "make_optimizer", lambda config: optax.sgd(rates))
    config = gpt.Config(
        **{**SMALL, "steps": 12, "chunk": 4}, text=write_text(tmp_path), out=tmp_path / "out"
    )
    with pytest.raises(ValueError, match="step 10: the first value that is not finite came"):
        gpt.main(config)
    assert files_in(tmp_path) == ["text.txt"]


def test_where_no_step_goes_wrong_again_those_of_the_chunk_are_named(monkeypatch):
    monkeypatch.setattr(gpt.bp, "fit", lambda *args, **how: None)
    state = bp.TrainState((), (), jnp.asarray(40), None)
    batches = np.zeros((3, 4, 8)), np.zeros((3, 4, 8))
    with pytest.raises(ValueError, match="one of steps 41 to 43: a value is not finite"):
        gpt.explain(None, None, state, batches)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": 0, "features": -1}, "blocks is 0; it takes at least 1; features is -1; it"),
        ({"batch_size": 1}, "batch-size is 1; it takes at least 2"),
        ({"positions": 0}, "positions is 0; it takes at least 1"),
        ({"chunk": 0}, "chunk is 0; it takes at least 1"),
        ({"chunk": 0, "quick": True}, "chunk is 0; it takes at least 1"),
        ({"steps": 30}, "steps is 30; it takes a multiple of chunk, 20"),
        ({"length": -1}, "length is -1; it takes at least 0"),
        ({"temperature": -0.5}, "temperature is -0.5; it takes 0 or a positive number"),
        ({"temperature": math.nan}, "temperature is nan; it takes 0 or a positive number"),
        ({"learning_rate": 0.0}, "learning-rate is 0.0; it takes a number in"),
        ({"seed": -1}, "seed is -1; it takes an integer"),
        ({"heads": 3}, "heads"),
        ({"devices": 0, "processes": 0}, "devices is 0; it takes at least 1; processes is 0; it"),
        ({"batch_size": 6, "devices": 4}, "batch-size is 6; it takes a multiple of 4, the number"),
        (
            {"batch_size": 6, "devices": 2, "processes": 2},
            "batch-size is 6; it takes a multiple of",
        ),
        ({"devices": 16}, "devices is 16; this process has"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a \u2603"}, "prompt has '\u2603', which the text does not have"),
        ({"positions": 82}, "positions is 82; it takes less than 82, the number"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(wrong, message, tmp_path, capsys):
    jax.devices()  # jax has started, so it does not simulate more
    path = write_text(tmp_path)
    with pytest.raises(ValueError, match=message):
        gpt.main(gpt.Config(**{"text": path, **wrong, "out": tmp_path / "out"}))
    assert files_in(tmp_path) == ["text.txt"]
    assert capsys.readouterr().out == ""


def test_a_text_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"text\.txt: byte 0xe9 at 3 is not UTF-8"):
        gpt.main(gpt.Config(text=path))
    with pytest.raises(FileNotFoundError):
        gpt.main(gpt.Config(text=tmp_path / "none.txt"))
