"""Until the model is good: each reason to stop, what is given back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from oracles import assert_close

import jaxbp as bp

pytestmark = pytest.mark.usefixtures("standard_promotion")

NET = bp.chain(bp.dense(8), bp.tanh(), bp.dense(2))
LOSS = bp.softmax_cross_entropy
ADAM = optax.adam(0.03)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(90, 2)))
        return x, (x[:, 0] > x[:, 1]).astype(jnp.int32)


def fit(data, **options):
    return bp.fit(
        NET, LOSS, options.pop("optimizer", ADAM), data, **{"key": jax.random.key(0), **options}
    )


def test_it_stops_when_the_metric_is_good(data):
    run = fit(data, metric=bp.accuracy, target=0.95, epochs=200)
    assert run.stopped_by == "target"
    assert run.reason.startswith(
        f"target: accuracy {float(run.records[-1]['metric']):.4g} is as good"
    )
    outputs, _ = NET.forward(run.params, data[0])
    assert float(jnp.mean(bp.accuracy(outputs, data[1]))) >= 0.95
    assert all(record["metric"] < 0.95 for record in run.records[:-1])


def test_it_stops_when_the_loss_is_good(data):
    run = fit(data, target=0.3, epochs=200)
    assert run.stopped_by == "target"
    assert run.records[-1]["loss"] <= 0.3
    assert all(record["loss"] > 0.3 for record in run.records[:-1])


def test_it_stops_when_patience_is_at_its_end_and_gives_back_the_best(data):
    """Random labels: what is learnt of them does not help on others."""
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(2, size=90))
    params_of = {}

    def watch(state, record):
        params_of[record["epoch"]] = state.params

    held_out = data[0][60:], labels[60:]
    run = fit((data[0][:60], labels[:60]), held_out=held_out, patience=3, callback=watch)
    assert run.stopped_by == "patience"
    losses = [float(record["held_out_loss"]) for record in run.records]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 3
    assert f"for 3 epochs; the best is {losses[best - 1]:.4g}, of epoch {best}" in run.reason
    assert_close(run.params, params_of[best])
    assert_close(run.state.params, params_of[best + 3])
    measured = bp.evaluate(NET, LOSS)(run.params, *held_out)["loss"]
    np.testing.assert_allclose(measured, min(losses), rtol=1e-12)


def test_with_a_metric_the_best_is_that_of_the_highest():
    """The network's one parameter counts its steps, and its output is a script of metrics."""
    script = jnp.array([0.0, 0.2, 0.8, 0.8, 0.5, 0.1])

    def forward(params, x, *, key=None):
        del key
        return jnp.broadcast_to(script[params.astype(int)], (len(x), 1)), ()

    def backward(params, cache, dy, *, read=bp.keep):
        del params, cache
        return dy, read(bp.Bias(dy))

    def loss(outputs, targets):
        del targets
        return outputs[:, 0], jnp.ones_like(outputs)

    def measure(outputs, targets):
        del targets
        return outputs[:, 0]

    net = bp.Layer("scripted", lambda key, shape: (jnp.zeros(1), (1,)), forward, backward)
    data = jnp.zeros((4, 1)), jnp.zeros((4, 1))
    run = bp.fit(
        net, loss, optax.sgd(-1.0), data,
        key=jax.random.key(0), held_out=data, metric=measure, epochs=5, patience=3,
    )  # fmt: skip
    assert [float(record["metric"]) for record in run.records] == [0.2, 0.8, 0.8, 0.5, 0.1]
    assert float(run.params[0]) == 2  # the first of the two that are best
    assert float(run.state.params[0]) == 5
    assert (
        run.reason
        == "patience: held-out measure has not improved for 3 epochs; the best is 0.8, of epoch 2"
    )


def test_it_stops_after_so_many_epochs(data):
    run = fit(data, epochs=3)
    assert (run.stopped_by, len(run.records)) == ("epochs", 3)
    assert run.reason == f"epochs: all 3 epochs are done, loss {run.records[-1]['loss']:.4g}"
    assert int(run.state.step) == 3 * 2
    assert_close(run.params, run.state.params)


def test_two_runs_that_follow_each_other_are_one(data):
    whole = fit(data, epochs=4)
    half = fit(data, epochs=2)
    rest = fit(data, key=None, state=half.state, epochs=2)
    assert_close(rest.params, whole.params)
    losses = [
        [r["loss"] for r in records] for records in (half.records + rest.records, whole.records)
    ]
    assert_close(*map(jnp.array, losses))


def test_a_run_after_a_fit_goes_on_counting(data):
    seen, shared = [], {"held_out": data, "metric": bp.accuracy, "patience": 9}
    whole = fit(data, epochs=4, **shared)
    half = fit(data, epochs=2, **shared)
    rest = fit(
        data,
        key=None,
        state=half,
        epochs=4,
        callback=lambda _, r: seen.append(r["epoch"]),
        **shared,
    )
    assert seen == [3, 4]
    assert rest.records == whole.records
    assert_close((rest.params, rest.state.params), (whole.params, whole.state.params))
    assert rest.reason == whole.reason
    done = fit(data, key=None, state=rest, epochs=4, **shared)
    assert (done.records, int(done.state.step)) == (rest.records, int(rest.state.step))
    with pytest.raises(
        ValueError, match=r"whose records have epoch, .*metric.*, and this run records"
    ):
        fit(data, key=None, state=half, epochs=4)


def test_the_same_key_gives_the_same_run_and_another_another(data):
    assert_close(fit(data, epochs=2).params, fit(data, epochs=2).params)
    other = fit(data, epochs=2, key=jax.random.key(1))
    assert not np.allclose(other.params[0]["weight"], fit(data, epochs=2).params[0]["weight"])


def test_records_hold_what_was_asked_for_and_the_callback_sees_them(data):
    def error_size(signal):
        return jnp.sqrt(jnp.mean(signal.deltas**2))

    seen = []
    run = fit(
        data,
        epochs=2,
        held_out=data,
        metric=bp.accuracy,
        read={"error_size": error_size},
        callback=lambda state, record: seen.append((int(state.step), record)),
    )
    assert [step for step, _ in seen] == [2, 4]
    assert [record for _, record in seen] == run.records
    assert set(run.records[0]) == {"epoch", "loss", "held_out_loss", "metric", "error_size"}
    assert [record["epoch"] for record in run.records] == [1, 2]
    assert run.records[0]["error_size"][2]["bias"] > 0
    measured = bp.evaluate(NET, LOSS)(run.params, *data)["loss"]
    assert run.records[0]["held_out_loss"] >= float(measured)


def test_records_are_written_as_json(data):
    run = fit(data, epochs=1, read={"health": bp.health, "mean": bp.mean})
    (record,) = json.loads(json.dumps(run.records, default=np.ndarray.tolist))
    assert (record["epoch"], record["loss"]) == (1, run.records[0]["loss"])
    assert record["mean"][0]["bias"] == run.records[0]["mean"][0]["bias"].tolist()
    assert isinstance(run.records[0]["health"][0]["weight"].inputs.rms, float)
    assert json.dumps(fit(data, epochs=1, held_out=data, metric=bp.accuracy).records)


class Batches:
    """Batches in a fixed order, made anew for each epoch."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __iter__(self):
        for i in range(0, len(self.data[0]), self.size):
            yield tuple(np.asarray(a[i : i + self.size]) for a in self.data)


@pytest.mark.parametrize("make", [list, lambda b: b], ids=["list", "object"])
def test_batches_from_an_iterable_are_steps_in_its_order(make, data, key):
    run = fit(make(Batches(data, 40)), epochs=2, held_out=data)
    state = bp.init_state(NET, ADAM, jax.random.key(0), (2,))
    step = bp.make_step(NET, LOSS, ADAM)
    for _ in range(2):
        losses = []
        for batch in Batches(data, 40):
            state, record = step(state, *batch)
            losses.append(float(record["loss"]) * len(batch[0]))
    assert_close(run.state.params, state.params)
    np.testing.assert_allclose(run.records[-1]["loss"], sum(losses) / 90, rtol=1e-12)


def test_a_generator_is_good_for_one_epoch(data):
    run = fit(iter(Batches(data, 40)), epochs=1)
    assert int(run.state.step) == 3
    with pytest.raises(
        ValueError, match=r"generator, which gives its batches only once, for 2 epochs"
    ):
        fit(iter(Batches(data, 40)), epochs=2)


def test_batches_that_come_only_once_are_missed_in_words(data):
    class Once:
        def __init__(self):
            self.batches = iter(Batches(data, 40))

        def __iter__(self):
            yield from self.batches

    with pytest.raises(ValueError, match=r"train has no more batches\. It has to give all"):
        fit(Once(), epochs=2)


def test_a_network_is_traced_once_however_many_epochs(data):
    def shapes_traced(epochs):
        shapes = []

        def forward(params, x, *, key=None):
            shapes.append(x.shape)
            return NET.forward(params, x, key=key)

        net = NET._replace(forward=forward)
        bp.fit(net, LOSS, ADAM, data, key=jax.random.key(0), epochs=epochs)
        return shapes

    # Once to look at the data, once for the full batches, once for the short one.
    assert shapes_traced(2) == shapes_traced(7) == [(90, 2), (64, 2), (26, 2)]


def exploding(at, name="boom"):
    """The identity, but forward or backward gives infinity once what comes in is large."""

    def forward(params, x, *, key=None):
        del params, key
        return (
            jnp.where(jnp.abs(x) > 50, jnp.exp(1e3 * jnp.abs(x)), x) if at == "forward" else x
        ), x

    def backward(params, x, dy, *, read=bp.keep):
        del params, read
        return (
            jnp.where(jnp.abs(x) > 50, jnp.exp(1e3 * jnp.abs(x)), dy) if at == "backward" else dy
        ), ()

    return bp.Layer(name, lambda key, shape: ((), shape), forward, backward)


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("batched", [False, True], ids=["arrays", "batches"])
class TestNonFinite:
    def run(self, net, optimizer, data, batched, **options):
        train = list(Batches(data, 16)) if batched else data
        with pytest.raises(bp.NonFiniteError) as caught:
            bp.fit(
                net, bp.squared_error, optimizer, train,
                key=jax.random.key(0), batch_size=16, epochs=9, **options,
            )  # fmt: skip
        return caught.value

    @pytest.mark.parametrize(
        ("at", "place"),
        [
            ("forward", "the forward pass, chain: part 2: chain: part 1 (boom)"),
            ("backward", "the backward pass, chain: part 2: chain: part 1 (boom)"),
        ],
    )
    def test_it_says_where_and_gives_back_the_last_good_state(self, at, place, batched, key):
        net = bp.chain(bp.dense(1), bp.chain(exploding(at), bp.relu()), bp.dense(1))
        x = normal(key, (80, 3)).at[70].set(1e3)
        seen = []
        error = self.run(
            net, optax.sgd(1e-3), (x, x[:, :1]), batched, callback=lambda s, r: seen.append(r)
        )
        assert error.place == place
        assert error.epoch == 1
        assert str(error).startswith(f"fit: epoch 1, step {error.step}: the first value")
        assert int(error.state.step) == error.step - 1
        assert error.records == seen == []
        assert all(bool(jnp.all(jnp.isfinite(p))) for p in jax.tree.leaves(error.state.params))
        if batched:
            assert error.step == 70 // 16 + 1

    def test_a_learning_rate_far_too_large(self, batched, data):
        net = bp.chain(bp.dense(4), bp.dense(1))
        x = data[0]
        error = self.run(net, optax.sgd(1e60), (x, x[:, :1]), batched)
        assert "part" in error.place
        assert error.state.step < 5
        assert bool(jnp.all(jnp.isfinite(error.state.params[0]["weight"])))

    def test_the_loss_itself(self, batched, data):
        def loss(outputs, targets):
            infinite = outputs[:, 0] / jnp.where(targets[:, 0] > 1, 0.0, 1.0)
            return infinite, jnp.ones_like(outputs)

        net = bp.chain(bp.dense(1))
        x, t = data[0], data[0][:, :1]
        with pytest.raises(bp.NonFiniteError, match="came from the loss"):
            bp.fit(
                net, loss, optax.sgd(1e-3), list(Batches((x, t), 16)) if batched else (x, t),
                key=jax.random.key(0), batch_size=16,
            )  # fmt: skip

    def test_the_optimizer(self, batched, data):
        def update(updates, state, params=None):
            del params
            count = state + 1
            scale = jnp.where(count == 8, jnp.inf, 1e-3)
            return jax.tree.map(lambda u: -scale.astype(u.dtype) * u, updates), count

        optimizer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
        error = self.run(bp.chain(bp.dense(1)), optimizer, (data[0], data[0][:, :1]), batched)
        assert error.place == "the update of the parameters"
        # 90 examples in batches of 16 are 6 steps an epoch: the 8th is the 2nd of the second.
        assert (error.epoch, error.step, int(error.state.step)) == (2, 2, 7)
        assert len(error.records) == 1


POOLED = bp.chain(bp.max_pool((3,), strides=(1,), padding="SAME"), bp.dense(1))
MASKED_ATTENTION = bp.chain(bp.attention(2, 1, causal=True), bp.dense(1))


@pytest.mark.filterwarnings("ignore:.*encountered")
@pytest.mark.parametrize("net", [POOLED, MASKED_ATTENTION], ids=["max_pool", "causal attention"])
@pytest.mark.parametrize(
    "fault", ["loss", *(pytest.param(f, marks=pytest.mark.thorough) for f in ("layer", "weight"))]
)
def test_an_infinity_by_design_is_not_blamed(net, fault, key):
    """The padding of a maximum and a causal mask are infinite; what is at fault is elsewhere."""

    def overflowing(outputs, targets):
        value, delta = bp.squared_error(outputs, targets)
        return value * (1e308 * jnp.max(targets)) * 1e308, delta

    x, targets = normal(key, (4, 3, 2)), jnp.ones((4, 3, 1))
    if fault == "layer":
        net = bp.chain(exploding("forward"), net)
        x = x.at[0].set(1e3)
    state = bp.init_state(net, ADAM, key, (3, 2))
    if fault == "weight":
        weight = state.params[1]["weight"].at[0].set(jnp.nan)
        state = state._replace(params=(state.params[0], {**state.params[1], "weight": weight}))
    loss = overflowing if fault == "loss" else bp.squared_error
    places = {
        "loss": "the loss",
        "layer": "the forward pass, chain: part 1 (boom)",
        "weight": "the parameters before the step, 1.weight",
    }
    with pytest.raises(bp.NonFiniteError) as caught:
        bp.fit(net, loss, ADAM, (x, targets), state=state)
    assert caught.value.place == places[fault]


def test_a_measure_that_is_not_finite_is_no_measure(data):
    def broken(outputs, targets):
        del targets
        return outputs[:, 0] / 0

    with pytest.raises(
        bp.NonFiniteError, match=r"fit: epoch 1: .* came from the broken\."
    ) as caught:
        fit(data, metric=broken, epochs=3)
    assert caught.value.step is None
    assert int(caught.value.state.step) == 2


def nan_at_3(x):
    return x.at[3, 1].set(jnp.nan)


X, T = np.zeros((9, 2)), np.zeros(9, int)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((X, T[:4]), {}, r"fit: train: inputs has 9 examples .* and targets has 4 \(shape \[4\]\)"),
        ((X[:0], T[:0]), {}, r"fit: train: inputs has shape \[0, 2\]: no examples"),
        (
            (X * np.nan, T),
            {},
            r"fit: train has inputs that are infinite or not a number.*example 0",
        ),
        (
            (X, T + 2),
            {},
            r"fit: train: softmax_cross_entropy: labels go from 2 to 2, expected 0 to 1",
        ),
        (
            (X.astype(int), T),
            {},
            r"fit: train: chain: part 1 \(dense\(8\)\) got inputs of dtype int",
        ),
        (
            (X, T),
            {"held_out": (X[:, :1], T)},
            r"fit: held_out: chain: part 1 \(dense\(8\)\) got inputs",
        ),
        ((X, T), {"held_out": X}, r"fit: held_out is ndarray, expected a pair of arrays"),
        ((X, T), {"epochs": 0, "batch_size": 1.5}, r"epochs is 0, expected.*; batch_size is 1\.5"),
        ((X, T), {"patience": 3}, r"patience needs held_out data"),
        (
            (X, T),
            {"patience": 0, "held_out": (X, T)},
            r"patience is 0, expected a positive integer",
        ),
        ((X, T), {"target": float("nan")}, r"target is nan, expected a finite number"),
        ((X, T), {"key": None}, r"expected a key for a new state or a state to continue from"),
        ((X, T), {"optimizer": 0.1}, r"optimizer is float, expected one of optax"),
        (3, {}, r"train is int, expected a pair of arrays \(inputs, targets\) or an iterable"),
        ([], {}, r"train has no batches"),
        ([X], {}, r"batch 1 is ndarray, expected a pair"),
        ([(X, T), (X, T + 5)], {}, r"fit: batch 2: softmax_cross_entropy: labels go from 5 to 5"),
        ([(X, T), (X + np.inf, T)], {}, r"fit: batch 2 has inputs that are infinite"),
        ((X, X[:2]), {}, r"fit: train: inputs has 9 examples .* and targets has 2"),
        ([(X, X), T], {}, r"train is a list, so its entries are batches, and batch 2 is ndarray"),
        ("images", {}, r"train is str, expected a pair"),
        ((X.astype(str), T), {}, r"fit: train: inputs is an array of dtype <U32; it takes numbers"),
        ((X, T), {"batch_size": True}, r"batch_size is True, expected a positive integer"),
        ((X, T), {"epochs": np.float64(3)}, r"epochs is .*3\.0.*, expected a positive integer"),
        ((X, T), {"metric": "accuracy"}, r"metric is 'accuracy', expected a function"),
        ((X, T), {"callback": 3}, r"callback is 3, expected a function"),
        ((X, T), {"target": "good"}, r"target is 'good', expected a finite number"),
        ((X, T), {"key": 3}, r"key is 3; it takes one key"),
        ((X, T), {"metric": lambda y, t: jnp.mean(y)}, r"metric returned .* \[\], expected \[9\]"),
        ([(X, T)], {"metric": bp.accuracy}, r"a metric needs held_out data where train comes in"),
    ],
)
def test_what_is_wrong_is_said(data, options, message):
    with pytest.raises(ValueError, match=message):
        fit(data, **options)


def test_parameters_of_another_network_are_refused(data):
    other = bp.chain(bp.dense(3))
    state = bp.init_state(other, ADAM, jax.random.key(0), (2,))
    with pytest.raises(ValueError, match=r"state\.params is that of another network: 0\.bias"):
        fit(data, key=None, state=state)


def test_a_network_that_is_not_one_is_refused(data):
    with pytest.raises(ValueError, match="net is list, expected a Layer"):
        bp.fit([bp.dense(2)], LOSS, ADAM, data, key=jax.random.key(0))


def test_the_first_bad_example_is_named(data):
    with pytest.raises(ValueError, match="the first in example 3"):
        fit((nan_at_3(data[0]), data[1]))


def test_a_loss_that_averages_is_refused(data):
    def mean_loss(outputs, targets):
        value, delta = LOSS(outputs, targets)
        return jnp.mean(value), delta

    with pytest.raises(ValueError, match=r"fit: train: the loss returned a value of shape \[\]"):
        bp.fit(NET, mean_loss, ADAM, data, key=jax.random.key(0))


MASKED = bp.masked(lambda mask: bp.chain(bp.recurrent(bp.gru(2), mask=mask), bp.dense(1)))


def test_inputs_may_be_a_tree(key):
    """As a data set, as batches, and for validation: all train as the same steps by hand."""
    x = normal(key, (9, 4, 2))
    mask = jnp.arange(4) < 1 + jnp.arange(9)[:, None] % 4
    data = (x, mask), jnp.ones((9, 4, 1))
    options = {"key": key, "epochs": 2, "held_out": data}
    run = bp.fit(MASKED, bp.squared_error, ADAM, data, batch_size=9, **options)
    batches = bp.fit(MASKED, bp.squared_error, ADAM, [data], **options)
    assert_close(run.params, batches.params)
    state = bp.init_state(MASKED, ADAM, key, ((4, 2), (4,)))
    step = bp.make_step(MASKED, bp.squared_error, ADAM)
    for _ in range(2):
        state, _ = step(state, *data)
    assert_close(run.state.params, state.params)
    want = jnp.mean(bp.squared_error(MASKED.forward(run.params, data[0])[0], data[1])[0])
    assert_close(jnp.array(run.records[-1]["held_out_loss"]), want)


@pytest.mark.parametrize("batched", [False, True], ids=["data_set", "batches"])
def test_an_epoch_goes_through_all_examples_of_a_tree(batched, key):
    """Of a pair of inputs there are as many examples as in each of the two."""
    data = (jnp.ones((9, 4, 2)), jnp.ones((9, 4), bool)), jnp.ones((9, 4, 1))
    train = [data, data] if batched else data
    run = bp.fit(MASKED, bp.squared_error, ADAM, train, key=key, epochs=1, batch_size=4)
    assert int(run.state.step) == (2 if batched else 3)


def test_targets_without_weight_need_not_be_finite(data):
    """A nan that the loss gives no weight is left out, and one that counts is refused."""
    x, loss = data[0], bp.weighted(bp.squared_error)
    targets, weights = x.at[3, 1].set(jnp.nan), jnp.ones(90).at[3].set(0)
    net = bp.dense(2)
    run = bp.fit(net, loss, ADAM, (x, (targets, weights)), key=jax.random.key(0), epochs=1)
    assert bool(jnp.all(jnp.isfinite(run.params["weight"])))
    with pytest.raises(ValueError, match=r"targets that are infinite .* the first in example 3"):
        bp.fit(net, loss, ADAM, (x, (targets, weights + 1)), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": optax.sgd(0.1)}, r"opt_state is that of another optimizer: it has 0\.count"),
        ({"optimizer": optax.adamw(0.1, mu_dtype=jnp.float32)}, r"0\.mu\.0\.bias has float64 .*"),
        ({"rule": bp.random_feedback()}, r"rule_state is that of another rule: it has no 0"),
        ({"state": 3}, r"fit: state is not a TrainState"),
    ],
)
def test_the_state_of_another_run_is_refused(change, message, data):
    state = bp.init_state(NET, ADAM, jax.random.key(0), (2,))
    with pytest.raises((ValueError, TypeError), match=message):
        fit(data, key=None, **{"state": state, **change})


def test_a_state_in_another_dtype_goes_on(data):
    """Parameters that were converted, with an optimizer state that is made for them."""
    state = bp.init_state(NET, ADAM, jax.random.key(0), (2,))
    params = jax.tree.map(lambda p: p.astype(jnp.float32), state.params)
    state = state._replace(params=params, opt_state=ADAM.init(params))
    data = data[0].astype(jnp.float32), data[1]
    run = fit(data, key=None, state=state, epochs=np.int64(1), batch_size=np.int32(50))
    assert run.params[0]["weight"].dtype == jnp.float32
