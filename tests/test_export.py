"""`jax.export`: programs that are stored, loaded and run, also for any number of examples.

Serialized programs name the records that they take and return, so each has to be registered.
"""

import functools
import inspect

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BLOCKS, LAYERS, LOSSES, NETWORKS, READINGS, RULES, SIGNALS, VARIANTS, prepare
from jax import export
from oracles import assert_close, map_operands

import jaxbp as bp

# Records that hold functions, or what a call in Python returns. No program takes or returns them.
NOT_IN_PROGRAMS = {"Cell", "Finding", "Fit", "Inner", "Layer", "Report", "Rotary", "Rule"}
RECORDS = {
    name: record
    for name, record in vars(bp).items()
    if inspect.isclass(record) and hasattr(record, "_fields") and name not in NOT_IN_PROGRAMS
}
PLATFORMS = ("cpu", "cuda", "tpu")
SCOPE = export.SymbolicScope()  # of all symbolic sizes here, so that programs may mix them

# What users of optax register for themselves.
for state in (optax.EmptyState, optax.ScaleByAdamState, optax.TraceState):
    export.register_namedtuple_serialization(state, serialized_name=f"optax.{state.__name__}")


def loaded(function, *args, platforms=None):
    """The program of a function, after it was serialized and loaded."""
    exported = export.export(jax.jit(function), platforms=platforms)(*args)
    return export.deserialize(exported.serialize())


def symbolic(tree, size="b"):
    """Arrays [N, ...] as their shapes and dtypes, for any N."""
    (n,) = export.symbolic_shape(size, scope=SCOPE)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), tree)


def assert_stored(tree):
    """A program that takes and returns a tree can be stored, and says again what it takes."""
    structure = jax.tree.structure(((tree,), {}))
    program = loaded(lambda tree: tree, tree)
    assert program.in_tree == structure
    assert program.out_tree == jax.tree.structure(tree)
    return program


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_of_programs_can_be_stored(name):
    assert_stored(RECORDS[name](*(jnp.zeros(2) for _ in RECORDS[name]._fields)))


def test_a_record_that_is_not_registered_would_be_seen():
    with pytest.raises(ValueError, match="Own"):
        assert_stored(SIGNALS["Own"](np.random.default_rng(0)))


def test_signals_of_every_kind_can_be_stored():
    rng = np.random.default_rng(0)
    signals = {
        kind: make(rng, 2, 3)
        for kind, make in SIGNALS.items()
        if kind not in ("Own", "Through, by pull-back")
    }
    program = assert_stored(signals)
    again = program.out_tree.unflatten(jax.tree.leaves(signals))
    through, conv = again["Through"], again["Conv"]
    assert repr(through.back) == repr(signals["Through"].back)
    assert repr(conv.geometry) == repr(signals["Conv"].geometry)


def of_network(case, key, n=cases.N):
    """The trees of a network that a program may take or return, as shapes and dtypes."""
    layer, params, x, draw_key = prepare(case, key, n)

    def both(params, x):
        y, cache = layer.forward(params, x, key=draw_key)
        return y, cache, layer.backward(params, cache, y)

    return params, x, *jax.eval_shape(both, params, x)


@cases.every("case", {**NETWORKS, **LAYERS, **VARIANTS}, {"transformer"})
def test_parameters_caches_and_signals_can_be_stored(case, key):
    assert_stored(of_network(case, key))


def all_readings(signal):
    return {name: read(signal) for name, read in READINGS.items()}


@cases.every("case", {**NETWORKS, **LAYERS, **VARIANTS}, {"classifier"})
def test_every_layer_and_reading_takes_any_number_of_examples(case, key):
    layer, params, x, draw_key = prepare(case, key)

    def function(params, x):
        y, cache = layer.forward(params, x, key=draw_key)
        return layer.backward(params, cache, y, read=all_readings)

    loaded(function, params, symbolic(x), platforms=PLATFORMS)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [kind for kind in SIGNALS if kind != "Own"])
def test_every_reading_takes_any_number_of_examples(kind):
    rng = np.random.default_rng(0)
    signal = SIGNALS[kind](rng, 2, 3)

    def weighed(signal, weights):
        return [read(signal, weights=weights) for read in (bp.mean, bp.total)]

    def readings(signal):
        return {name: read(signal) for name, read in READINGS.items() if name != "keep"}

    # A table and the way back have no N.
    of_any = map_operands(lambda a: symbolic(a) if a.shape[:1] == (cases.N,) else a, signal)
    jax.jit(readings).trace(of_any)
    jax.jit(weighed).trace(of_any, symbolic(jnp.ones(cases.N)))


@cases.every("case", LOSSES, ())
def test_every_loss_takes_any_number_of_examples(case, key):
    outputs, targets = case.outputs(key), case.targets(np.random.default_rng(0))

    def function(outputs, targets):
        answers = [case.loss(outputs, targets)]
        if case.samples:
            answers.append(case.loss.sample(key, outputs, targets))
        if case.has_factor:
            answers.append(case.loss.hessian_factor(outputs, targets))
        if case.loss.right is not None:
            answers.append(bp.make_accuracy(case.loss)(outputs, targets))
        return answers

    loaded(function, symbolic(outputs), symbolic(targets), platforms=PLATFORMS)


OF_RECURRENT_LAYERS = {"rtrl", "snap1", "eprop"}


def takes_any_number_of_examples(net, shape, rule, key, **options):
    optimizer = optax.sgd(0.1)
    state = bp.init_state(net, optimizer, key, shape, rule=rule)
    step = bp.make_step(net, bp.squared_error, optimizer, rule=rule, donate=False, **options)
    x = jnp.ones((cases.N, *shape))
    targets = jax.eval_shape(net.forward, state.params, x)[0]
    loaded(step, state, symbolic(x), symbolic(targets), platforms=PLATFORMS)


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in OF_RECURRENT_LAYERS])
def test_every_rule_takes_any_number_of_examples(rule, blocks, key):
    rule, net = RULES[rule](*blocks.parts), bp.chain(*blocks.parts)
    measures = {"alignment": bp.alignment(net, bp.squared_error, rule=rule)}
    takes_any_number_of_examples(net, blocks.shape, rule, key, measures=measures)


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}], ids=["plain", "clipped"])
def test_a_fused_step_takes_any_number_of_examples(options, key):
    net = bp.chain(bp.stack(bp.chain(bp.dense(3), bp.tanh()), 2), bp.dense(2))
    takes_any_number_of_examples(net, (3,), bp.exact(), key, fused=True, **options)


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("rule", sorted(OF_RECURRENT_LAYERS))
def test_every_rule_of_recurrent_layers_takes_any_number_of_examples(rule, key):
    net = bp.chain(bp.recurrent(bp.lstm(3)), bp.dense(2))
    takes_any_number_of_examples(net, (4, 2), RULES[rule](), key)


@pytest.mark.thorough
@pytest.mark.parametrize("lean", [False, True])
def test_masks_take_any_number_of_examples(lean, key):
    net = bp.masked(
        lambda mask: bp.chain(
            bp.attention(4, 2, mask=mask, lean=lean), bp.recurrent(bp.gru(2), mask=mask)
        )
    )
    params, _ = net.init(key, ((3, 4), (3,)))

    def function(params, x, mask):
        y, cache = net.forward(params, (x, mask))
        return net.backward(params, cache, y, read=all_readings)

    data = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
    loaded(function, params, *symbolic(data), platforms=PLATFORMS)


def classifier():
    net = bp.chain(
        bp.dense(3), bp.stack(bp.residual(bp.layer_norm(), bp.dense(3), bp.tanh()), 2), bp.dense(2)
    )
    return net, (4,)


def images():
    net = bp.chain(bp.conv(3, (2, 2)), bp.relu(), bp.max_pool((2, 2)), bp.flatten(), bp.dense(2))
    return net, (5, 5, 2)


def language_model():
    block = bp.chain(
        bp.residual(bp.layer_norm(), bp.attention(4, 2, causal=True, lean=True)),
        bp.residual(bp.dense(5), bp.gelu(), bp.dense(4)),
    )
    net = bp.chain(
        bp.dense(4), bp.learned_positions(4), bp.stack(bp.remat(block), 2), bp.take(-1), bp.dense(2)
    )
    return net, (3, 2)


def sequences():
    return bp.chain(bp.recurrent(bp.lstm(3)), bp.take(-1), bp.dense(2)), (3, 2)


def lifted():
    def function(params, x):
        hidden = jnp.tanh(x @ params["in"] + params["bias"])
        return hidden @ (params["out"] / jnp.linalg.norm(params["out"]))

    params = {"in": jnp.ones((4, 3)), "bias": jnp.zeros(3), "out": jnp.ones((3, 2))}
    return bp.lift(function, params, jnp.ones((2, 4)), init=lambda key: params)[0], (4,)


NETS = {net.__name__: net for net in (classifier, images, language_model, sequences, lifted)}


def calls_of(net, key):
    """What users call, of parameters, inputs and labels."""
    loss = bp.softmax_cross_entropy
    read = {name: read for name, read in READINGS.items() if name not in ("keep", "gram")}
    private = bp.private_gradient(net, loss, max_norm=1.0, noise_multiplier=0.5, batch_size=4)
    curvature = bp.backprop(
        net, loss, read={"diagonal": bp.diagonal, "factors": bp.kronecker}, error=bp.ggn_columns
    )
    return {
        "value_and_grad": bp.value_and_grad(net, loss),
        "readings": bp.backprop(net, loss, read=read),
        "curvature": curvature,
        "reweighted": bp.reweighted(net, loss, bp.clip_weights(0.5)),
        "private": lambda *args: private(*args, key=key),
        "accuracy": lambda params, x, labels: bp.accuracy(net.forward(params, x)[0], labels),
    }


def batch(shape, n, key):
    x_key, label_key = jax.random.split(key)
    return jax.random.normal(x_key, (n, *shape)), jax.random.randint(label_key, (n,), 0, 2)


def assert_loaded_computes_the_same(function, params, shape, key):
    program = loaded(function, params, *symbolic(batch(shape, 2, key)), platforms=PLATFORMS)
    for n in (2, 6):
        arguments = params, *batch(shape, n, key)
        assert_close(program.call(*arguments), jax.jit(function)(*arguments))


def test_a_loaded_program_computes_the_same_for_any_number_of_examples(key):
    net = bp.chain(bp.dense(3), bp.tanh(), bp.dense(2))
    params, _ = net.init(key, (4,))
    calls = calls_of(net, key)

    def function(*arguments):
        return calls["value_and_grad"](*arguments), calls["reweighted"](*arguments)

    assert_loaded_computes_the_same(function, params, (4,), key)


@pytest.mark.thorough
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_every_call_of_a_loaded_program_computes_the_same(net, key):
    net, shape = net()
    params, _ = net.init(key, shape)
    calls = calls_of(net, key)

    def function(*arguments):
        return {name: call(*arguments) for name, call in calls.items()}

    assert_loaded_computes_the_same(function, params, shape, key)


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_loaded_steps_train_the_same(net, key):
    """A step by K-FAC, with the state of an optimizer and a key that goes in and comes out."""
    net, shape = net()
    loss = bp.softmax_cross_entropy
    factors = bp.kfac_factors(net, loss)
    like = functools.partial(like_of, factors, batch(shape, 2, key), key)
    optimizer = optax.chain(bp.scale_by_kfac(like, every=2), optax.adam(0.01))
    state = bp.init_state(net, optimizer, key, shape)
    step = bp.make_step(net, loss, optimizer, extra_args={"factors": factors}, donate=False)
    program = loaded(step, state, *symbolic(batch(shape, 2, key)), platforms=PLATFORMS)
    for n in (2, 5):
        (got, record), (want, own) = (
            function(state, *batch(shape, n, key)) for function in (program.call, step)
        )
        assert_close((got._replace(key=()), record), (want._replace(key=()), own))
        state = want


def like_of(factors, data, key, params):
    return factors(params, *data, key=key)


@pytest.mark.thorough
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("size", "constraints"), [("4*b", []), ("b", ["mod(b, 4) == 0"])])
def test_batches_divide_a_symbolic_number_of_examples(size, constraints, key):
    net, shape = classifier()
    state = bp.init_state(net, optax.sgd(0.1), key, shape)
    (n,) = export.symbolic_shape(size, constraints=constraints)
    data = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), batch(shape, 4, key)
    )
    evaluate = bp.evaluate(net, bp.softmax_cross_entropy, metric=bp.accuracy, batch_size=4)
    epoch = bp.make_epoch(net, bp.softmax_cross_entropy, optax.sgd(0.1), batch_size=4)
    own = batch(shape, 8, key)
    assert_close(
        loaded(evaluate, state.params, *data).call(state.params, *own), evaluate(state.params, *own)
    )
    after, record = loaded(epoch, state, *data).call(state, *own)
    want, own_record = epoch(state, *own)
    assert_close((after.params, record), (want.params, own_record))


def test_batches_that_may_not_divide_the_examples_are_refused(key):
    net, shape = classifier()
    state = bp.init_state(net, optax.sgd(0.1), key, shape)
    data = symbolic(batch(shape, 4, key))
    evaluate = bp.evaluate(net, bp.softmax_cross_entropy)
    with pytest.raises(ValueError, match=r"evaluate: the number of examples is b, .*1024\*b"):
        evaluate.trace(state.params, *data)
    epoch = bp.make_epoch(net, bp.softmax_cross_entropy, optax.sgd(0.1), batch_size=4)
    with pytest.raises(ValueError, match=r"make_epoch: the number of examples is b, .*4\*b"):
        epoch.trace(state, *data)


def test_the_noise_of_one_example_is_refused_before_the_program_is_stored(key):
    net, shape = classifier()
    params, _ = net.init(key, shape)
    sweep = bp.backprop(net, bp.softmax_cross_entropy, read={"signals": bp.keep, "grads": bp.mean})

    def function(params, x, labels):
        _, answers = sweep(params, x, labels)
        return bp.gradient_noise(answers["signals"], answers["grads"])

    data = batch(shape, 2, key)
    with pytest.raises(ValueError, match=r'got b. Use the constraint "b >= 2"\?'):
        jax.jit(function).trace(params, *symbolic(data))
    jax.jit(function).trace(params, *symbolic(data, "b + 1"))
