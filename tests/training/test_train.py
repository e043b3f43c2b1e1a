"""The loop: a step is a sweep and an update, an epoch is its steps, and neither traces twice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import assert_close

import jaxbp as bp
from jaxbp.training.placing import batch_at
from jaxbp.training.state import forward_key, shuffle

pytestmark = pytest.mark.usefixtures("standard_promotion")

NET = bp.chain(bp.dense(5), bp.tanh(), bp.dropout(0.2), bp.dense(2))


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(23, 3))
    return jnp.asarray(x), jnp.asarray(np.stack([x[:, 0] * x[:, 1], np.sin(x[:, 2])], axis=1))


def copy(tree):
    return jax.tree.map(lambda a: a.copy(), tree)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01),
    "a schedule": optax.adamw(optax.cosine_decay_schedule(0.01, 10)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "accumulated": optax.MultiSteps(optax.sgd(0.1), 2),
    "lbfgs": optax.lbfgs(),
    "reduced on a plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optax_optimizer_lowers_the_loss(optimizer, data, key):
    net = bp.chain(bp.dense(5), bp.tanh(), bp.dense(2))
    state = bp.init_state(net, optimizer, key, (3,))
    step = bp.make_step(net, bp.squared_error, optimizer)
    losses = []
    for _ in range(20):
        state, record = step(state, *data)
        losses.append(float(record["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.step) == 20


def test_a_step_is_the_mean_gradient_and_the_optimizers_update(data, key):
    optimizer = optax.adam(0.01)
    state = bp.init_state(NET, optimizer, key, (3,))
    draw_key = forward_key(state)
    value, grads = bp.value_and_grad(NET, bp.squared_error)(state.params, *data, key=draw_key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    want = bp.TrainState(
        optax.apply_updates(state.params, updates), opt_state, state.step + 1, None
    )
    got, record = bp.make_step(NET, bp.squared_error, optimizer, donate=False)(state, *data)
    assert_close(got._replace(key=None), want)
    assert got.key == state.key
    assert_close(record, {"loss": value})


def test_a_step_draws_anew_each_time(data, key):
    """The learning rate is zero: only the dropped units can make the losses differ."""
    optimizer = optax.sgd(0.0)
    state = bp.init_state(NET, optimizer, key, (3,))
    step = bp.make_step(NET, bp.squared_error, optimizer)
    state, first = step(state, *data)
    state, second = step(state, *data)
    assert float(first["loss"]) != float(second["loss"])


def test_a_step_donates_its_state_unless_told_not_to(data, key):
    state = bp.init_state(NET, optax.sgd(0.1), key, (3,))
    make = lambda donate: bp.make_step(NET, bp.squared_error, optax.sgd(0.1), donate=donate)  # noqa: E731
    make(False)(state, *data)
    assert not state.params[0]["weight"].is_deleted()
    make(True)(state, *data)
    assert state.params[0]["weight"].is_deleted()


def test_a_state_that_was_donated_is_refused(data, key):
    optimizer = optax.sgd(0.1)
    state = bp.init_state(NET, optimizer, key, (3,))
    step = bp.make_step(NET, bp.squared_error, optimizer)
    epoch = bp.make_epoch(NET, bp.squared_error, optimizer, batch_size=9)
    after, _ = step(state, *data)
    for name, function in (("make_step", step), ("make_epoch", epoch)):
        with pytest.raises(ValueError, match=rf"^{name}: the state was already given to a step"):
            function(state, *data)
    step(after, *data)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda y, t: jnp.mean(y - t), r"shape \[\], expected \[23\]: one number for each"),
        (lambda y, t: y - t, r"shape \[23, 2\], expected \[23\]: .* Average the rest"),
        (lambda y, t: jnp.mean(y - t, axis=0), r"shape \[2\], expected \[23\]"),
    ],
)
def test_a_metric_is_one_number_for_each_example(metric, message, data, key):
    params, _ = NET.init(key, (3,))
    measure = bp.evaluate(NET, bp.squared_error, metric=metric)
    with pytest.raises(ValueError, match=f"^evaluate: the metric returned an array of {message}"):
        measure(params, *data)


LOSS, SGD = bp.squared_error, optax.sgd(0.1)


def make_step(**options):
    return bp.make_step(NET, LOSS, SGD, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_step(measures={"a": 3}), r"make_step: measures\['a'\] is 3; it takes"),
        (lambda: make_step(read={"a": None}), r"make_step: read\['a'\] is None; it takes"),
        (lambda: make_step(extra_args=[]), r"make_step: extra_args is list, expected a dict"),
        (lambda: make_step(rule="exact"), r"make_step: rule is str, expected a Rule"),
        (lambda: make_step()(3, 0, 0), r"make_step: state is not a TrainState, which init_"),
        (lambda: bp.make_step(NET, LOSS, 0.1), r"make_step: optimizer is 0\.1; it takes one"),
        (lambda: bp.init_state(NET, 0.1, 0, (3,)), r"init_state: optimizer is 0\.1; it takes"),
        (lambda: bp.init_state(NET, SGD, 0, (3,)), r"init_state: key is 0; it takes one key"),
        (lambda: bp.init_state("net", SGD, 0, (3,)), r"init_state: net is 'net'; it takes"),
        (lambda: bp.evaluate(NET, LOSS, metric=3), r"evaluate: metric is 3; it takes a func"),
        (lambda: bp.evaluate(NET, LOSS, batch_size=0), r"evaluate: batch_size is 0; it takes"),
        (lambda: bp.evaluate(NET, LOSS, batch_size=True), r"evaluate: batch_size is True; it"),
        (lambda: bp.evaluate(NET, LOSS, batch_size=2.0), r"evaluate: batch_size is 2\.0; it"),
        (lambda: bp.make_epoch(NET, LOSS, SGD, batch_size=0), r"make_epoch: batch_size is 0;"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        make()


def test_a_step_records_readings_of_the_same_sweep(data, key):
    optimizer = optax.sgd(0.1)
    state = bp.init_state(NET, optimizer, key, (3,))
    sweep = bp.backprop(NET, bp.squared_error, read=bp.sq_norms)
    _, want = sweep(state.params, *data, key=forward_key(state))
    step = bp.make_step(NET, bp.squared_error, optimizer, read={"norms": bp.sq_norms})
    assert_close(step(state, *data)[1]["norms"], want)


def error_size(signal):
    return jnp.sqrt(jnp.mean(signal.deltas**2))


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_an_epoch_is_its_steps_the_short_last_one_too(batch_size, data, key):
    optimizer = optax.adam(0.01)
    make = {"read": {"size": error_size}}
    state = bp.init_state(NET, optimizer, key, (3,))
    epoch = bp.make_epoch(NET, bp.squared_error, optimizer, batch_size=batch_size, **make)
    got, record = epoch(state, *data)

    step = bp.make_step(NET, bp.squared_error, optimizer, donate=False, **make)
    order = shuffle(state, 23)
    assert sorted(np.asarray(order)) == list(range(23))
    losses, sizes, counts = [], [], []
    for i in range(0, 23, batch_size):
        batch = batch_at(data, order[i : i + batch_size])
        state, one = step(state, *batch)
        losses.append(one["loss"])
        sizes.append(one["size"][0]["weight"])
        counts.append(len(batch[0]))
    assert_close(got._replace(key=None), state._replace(key=None))
    assert int(got.step) == -(-23 // batch_size)
    assert_close(record["loss"], jnp.average(jnp.array(losses), weights=jnp.array(counts)))
    want = jnp.average(jnp.array(sizes), weights=jnp.array(counts))
    assert_close(record["size"][0]["weight"], want)


def test_epochs_are_shuffled_each_in_its_own_order(data, key):
    state = bp.init_state(NET, optax.sgd(0.1), key, (3,))
    first, second = shuffle(state, 23), shuffle(state._replace(step=state.step + 5), 23)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(23))


def test_a_reading_that_cannot_be_averaged_is_refused(data, key):
    state = bp.init_state(NET, optax.sgd(0.1), key, (3,))
    read = {"norms": bp.sq_norms}
    epoch = bp.make_epoch(NET, bp.squared_error, optax.sgd(0.1), batch_size=5, read=read)
    with pytest.raises(ValueError, match=r"norms has shapes that depend on the number of examples"):
        epoch(state, *data)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ({"grads": bp.total, "loss": bp.mean}, "readings called grads, loss: names are taken"),
        (bp.sq_norms, "read is function, expected a dict of readings by name"),
    ],
)
def test_readings_that_would_be_lost_are_refused(read, message):
    with pytest.raises(ValueError, match=message):
        bp.make_step(NET, bp.squared_error, optax.sgd(0.1), read=read)


def test_the_last_step_of_an_epoch_is_traced_once_more_and_nothing_again(data, key):
    chex.clear_trace_counter()
    forward = chex.assert_max_traces(NET.forward, n=2)  # the full batches, and the short one
    net = NET._replace(forward=forward)
    state = bp.init_state(net, optax.sgd(0.1), key, (3,))
    epoch = bp.make_epoch(net, bp.squared_error, optax.sgd(0.1), batch_size=5)
    for _ in range(3):
        state, _ = epoch(state, *data)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 1000])
def test_evaluation_is_the_mean_over_all_examples_without_drawing(batch_size, data, key):
    params, _ = NET.init(key, (3,))
    outputs, _ = NET.forward(params, data[0])

    def close(outputs, targets):
        return jnp.mean(jnp.abs(outputs - targets) < 0.5, axis=1)

    got = bp.evaluate(NET, bp.squared_error, metric=close, batch_size=batch_size)(params, *data)
    want = {
        "loss": jnp.mean(bp.squared_error(outputs, data[1])[0]),
        "metric": jnp.mean(close(outputs, data[1])),
    }
    assert_close(got, want)
    assert set(bp.evaluate(NET, bp.squared_error)(params, *data)) == {"loss"}


def test_a_step_can_be_lowered_and_compiled(data, key):
    state = bp.init_state(NET, SGD, key, (3,))
    compiled = make_step(donate=False).lower(state, *data).compile()
    assert_close(compiled(state, *data)[1], make_step(donate=False)(state, *data)[1])
