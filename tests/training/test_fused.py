"""The update inside the sweep: the numbers of an ordinary step, and what is refused."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import late

import jaxbp as bp

pytestmark = pytest.mark.usefixtures("standard_promotion")  # of optax

BLOCK = bp.residual(bp.layer_norm(), bp.dense(6), bp.tanh(), bp.dense(4))
RNG = np.random.default_rng(1)
DATA = RNG.normal(size=(5, 3, 4)), np.array([0, 1, 2, 1, 0])
# Examples so few that the operands of a wide block take less memory than its gradients.
FEW = RNG.normal(size=(2, 4)), np.array([1, 2])
WIDE = bp.residual(bp.dense(12), bp.tanh(), bp.dense(4))


def network(*middle):
    """A network with what is given between its first layer and its head."""
    return bp.chain(bp.dense(4), *middle, bp.dense(3))


def on_sequences(*middle):
    return bp.chain(network(*middle), bp.global_pool())


NETWORKS = {
    "chain": on_sequences(BLOCK),
    "stack": on_sequences(bp.stack(BLOCK, 3)),
    "stack of remat": on_sequences(bp.stack(bp.remat(BLOCK), 3)),
    "two stacks": on_sequences(bp.stack(BLOCK, 2), bp.tanh(), bp.stack(bp.remat(BLOCK), 3)),
    "stack in a stack": on_sequences(bp.stack(bp.stack(BLOCK, 2), 2)),
    "stack in a residual": on_sequences(bp.residual(bp.stack(BLOCK, 2))),
    "repeated stack": on_sequences(bp.repeat(bp.stack(BLOCK, 2), 2)),
    "cast stack": on_sequences(bp.cast(bp.stack(BLOCK, 2), jnp.float64)),
    "stack of cast": on_sequences(bp.stack(bp.cast(BLOCK, jnp.float32), 2)),
    "alone": bp.chain(bp.stack(BLOCK, 2), bp.global_pool()),
}


def decayed(params):
    """Which parameters decay: matrices, also those of a stack."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(optax.exponential_decay(0.1, 1, 0.9)),
    "adamw": optax.adamw(0.1, weight_decay=0.1, mask=decayed),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True),
    "amsgrad": optax.amsgrad(0.1),
    "clip": optax.chain(optax.clip(0.01), optax.adadelta(0.5)),
    "plateau": optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, accumulation_size=1)
    ),
    "by label": optax.partition(
        {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params),
    ),
}


def states(net, optimizer, data=DATA, steps=3, peer=None, rule=None, **options):
    """The state and the records after some fused steps, and after those of an ordinary step."""
    peer, rule = peer or optimizer, rule or bp.exact()
    shape = data[0].shape[1:]
    both = []
    read = {name: options[name] for name in ("read", "measures") if name in options}
    for own, how in ((optimizer, {"fused": True, **options}), (peer, read)):
        state = bp.init_state(net, own, jax.random.key(0), shape, rule=rule)
        step = bp.make_step(net, bp.softmax_cross_entropy, own, rule=rule, donate=False, **how)
        records = []
        for _ in range(steps):
            state, record = step(state, *data)
            records.append(record)
        both.append((state, records))
    return both


def assert_alike(one, other, bound=1e-10):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(
        *(map(jnp.asarray, jax.tree.leaves(tree)) for tree in (one, other)), strict=True
    ):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
        assert jnp.allclose(a, b, rtol=bound, atol=bound)


def mostly_thorough(names, *default):
    """The names, of which all but some are for the thorough suite."""
    return [
        name if name in default else pytest.param(name, marks=pytest.mark.thorough)
        for name in names
    ]


@pytest.mark.parametrize("name", mostly_thorough(NETWORKS, "stack of remat", "repeated stack"))
def test_a_fused_step_computes_what_an_ordinary_one_does(name):
    bound = 1e-5 if name == "stack of cast" else 1e-10
    fused, ordinary = states(NETWORKS[name], OPTIMIZERS["momentum"])
    assert_alike(fused, ordinary, bound)


@pytest.mark.parametrize("name", mostly_thorough(OPTIMIZERS, "adamw"))
def test_optimizers_that_work_leaf_by_leaf(name):
    fused, ordinary = states(NETWORKS["two stacks"], OPTIMIZERS[name])
    assert_alike(fused, ordinary)


@pytest.mark.parametrize("data", ["few examples", "many examples"])
@pytest.mark.parametrize("max_norm", [1e-2, late(1e3)])
@pytest.mark.parametrize("scaled", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_a_clip_by_the_exact_norm(data, max_norm, scaled):
    clip = optax.chain(optax.clip_by_global_norm(max_norm), optax.trace(0.9), optax.scale(-0.1))
    own = optax.chain(optax.trace(0.9), optax.scale(-0.1))
    few = data == "few examples"
    net = network(bp.stack(bp.remat(WIDE), 3)) if few else NETWORKS["two stacks"]
    read: dict[str, Any] = {} if scaled else {"read": {"norms": bp.sq_norms}}
    fused, ordinary = states(net, own, FEW if few else DATA, peer=clip, max_norm=max_norm, **read)
    assert_alike(fused[0].params, ordinary[0].params)
    assert_alike(fused[1], ordinary[1])


def test_what_is_clipped_keeps_its_dtype(key):
    seen = set()

    def update(updates, state, params=None):
        del params
        seen.update(leaf.dtype for leaf in jax.tree.leaves(updates))
        return jax.tree.map(lambda g: -g / 8, updates), state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    net = bp.chain(bp.dense(4, dtype=jnp.bfloat16), bp.tanh(), bp.dense(3, dtype=jnp.bfloat16))
    state = bp.init_state(net, optimizer, key, (5,))
    step = bp.make_step(net, bp.squared_error, optimizer, fused=True, max_norm=0.1)
    step(state, jnp.ones((2, 5), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16))
    assert seen == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.thorough
def test_a_summary_of_each_layer_is_recorded():
    fused, ordinary = states(NETWORKS["stack"], optax.sgd(0.1), read={"health": bp.health})
    assert_alike(fused, ordinary)


def test_readings_and_measures_are_recorded_as_in_an_ordinary_step():
    net = NETWORKS["two stacks"]
    fused, ordinary = states(
        net,
        OPTIMIZERS["adam"],
        read={"squares": bp.sq_norms},
        measures={"largest": lambda params, *_, **__: jnp.max(params[0][0]["weight"])},
    )
    assert_alike(fused, ordinary)


DIRECT = bp.chain(bp.dense(4), bp.tanh()), bp.stack(BLOCK, 2), bp.dense(3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("net", "rule"),
    [
        (network(bp.stack(BLOCK, 2)), bp.random_feedback()),
        (network(bp.stack(BLOCK, 2)), bp.sign_symmetric()),
        (bp.chain(*DIRECT), bp.direct_feedback(*DIRECT)),
    ],
    ids=["random", "signs", "direct"],
)
def test_rules_whose_state_does_not_follow_the_gradients(net, rule):
    data = DATA[0][:, 0], DATA[1]
    fused, ordinary = states(net, OPTIMIZERS["adam"], data, rule=rule)
    assert_alike(fused, ordinary)


@pytest.mark.thorough
def test_a_frozen_part_and_a_frozen_stack():
    net = NETWORKS["two stacks"]
    params, _ = net.init(jax.random.key(0), (3, 4))
    for fixed in ("0.1.", "0.1.layers.1.weight"):
        frozen, _ = bp.freeze(net, params, lambda path, leaf, fixed=fixed: path.startswith(fixed))
        fused, ordinary = states(frozen, OPTIMIZERS["adam"])
        assert_alike(fused, ordinary)


def test_epochs_and_runs():
    net, optimizer = NETWORKS["two stacks"], OPTIMIZERS["adam"]
    runs = [
        bp.fit(
            net, bp.softmax_cross_entropy, optimizer, DATA, key=jax.random.key(0), epochs=2,
            batch_size=2, fused=fused,
        )
        for fused in (True, False)
    ]  # fmt: skip
    assert_alike(runs[0].state, runs[1].state)
    assert_alike(runs[0].records, runs[1].records)
    state = bp.init_state(net, optimizer, jax.random.key(0), (3, 4))
    fused, ordinary = (
        bp.make_epoch(net, bp.softmax_cross_entropy, optimizer, batch_size=2, fused=fused)
        for fused in (True, False)
    )
    assert_alike(fused(state, *DATA), ordinary(state, *DATA))


def by_size(params):
    return jax.tree.map(lambda leaf: leaf.size > 30, params)


REFUSED = {
    "a global norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "max_norm"),
    "a norm of each array": (optax.lamb(0.1), "mixes the layers of its stack"),
    "noise": (optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)), "mixes"),
    "factors of second moments": (
        optax.adafactor(0.1, min_dim_size_to_factor=2), "mixes the layers of its stack"
    ),
    "a decision by size": (optax.adamw(0.1, weight_decay=0.1, mask=by_size), "size of an array"),
    "accumulation": (optax.MultiSteps(optax.sgd(0.1), 2), "depends on the gradients of others"),
    "all or nothing": (optax.apply_if_finite(optax.sgd(0.1), 3), "depends on the gradients of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_need_all_gradients_are_refused(name):
    optimizer, words = REFUSED[name]
    net = NETWORKS["two stacks"]
    state = bp.init_state(net, optimizer, jax.random.key(0), (3, 4))
    step = bp.make_step(net, bp.softmax_cross_entropy, optimizer, fused=True, donate=False)
    with pytest.raises(ValueError, match=words):
        step(state, *DATA)


def test_norms_of_arrays_outside_of_stacks_are_no_obstacle():
    fused, ordinary = states(NETWORKS["chain"], optax.lamb(0.1))
    assert_alike(fused, ordinary)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fused": 1}, "fused is 1"),
        ({"fused": True, "extra_args": {"a": lambda *_, **__: 0}}, "extra_args"),
        ({"max_norm": 1.0}, "clip_by_global_norm"),
        ({"fused": True, "max_norm": 0.0}, "max_norm is 0.0"),
        ({"fused": True, "max_norm": "a"}, "max_norm is a"),
    ],
)
def test_wrong_options(options, words):
    for make in (bp.make_step, lambda *a, **o: bp.make_epoch(*a, batch_size=2, **o)):
        with pytest.raises(ValueError, match=words):
            make(NETWORKS["chain"], bp.softmax_cross_entropy, optax.sgd(0.1), **options)


def test_a_rule_that_follows_the_gradients_is_refused():
    net, rule = NETWORKS["stack"], bp.kolen_pollack()
    state = bp.init_state(net, optax.sgd(0.1), jax.random.key(0), (3, 4), rule=rule)
    step = bp.make_step(net, bp.softmax_cross_entropy, optax.sgd(0.1), rule=rule, fused=True)
    with pytest.raises(ValueError, match="updates its state by the gradients"):
        step(state, *DATA)
