"""The gradient check finds every mistake that is planted, and says which parameter it is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LAYERS, VARIANTS, every, make_inputs

import jaxbp as bp
from jaxbp.check.trees import normal_like


def dense_with(dx=lambda dx: dx, weight=lambda s: s, bias=lambda s: s):
    """`dense(3)` with a mistake planted in its backward."""
    good = bp.dense(3)

    def backward(params, x, dy, *, read=bp.keep):
        return dx(dy @ params["weight"].T), {
            "weight": read(weight(bp.Outer(x, dy))),
            "bias": read(bias(bp.Bias(dy))),
        }

    return good._replace(backward=backward)


MISTAKES = {
    "a sign in dx": (dense_with(dx=lambda dx: -dx), {"inputs"}),
    "a thousandth in dx": (dense_with(dx=lambda dx: 1.001 * dx), {"inputs"}),
    "a tiny factor in dx": (dense_with(dx=lambda dx: (1 + 1e-8) * dx), {"inputs"}),
    "a weight's operand": (
        dense_with(weight=lambda s: s._replace(inputs=s.inputs + 0.1)),
        {"params.1.weight"},
    ),
    "a bias doubled": (
        dense_with(bias=lambda s: bp.Bias(2 * s.deltas)),
        {"params.1.bias"},
    ),
    "one example left out": (
        dense_with(bias=lambda s: bp.Bias(s.deltas.at[0].set(0))),
        {"params.1.bias"},
    ),
    "not a number": (dense_with(dx=lambda dx: dx * jnp.nan), {"inputs"}),
}


@pytest.mark.parametrize(("layer", "wrong"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_planted_mistake_is_found_and_its_place_said(layer, wrong, key):
    net = bp.chain(bp.flatten(), layer, bp.tanh())
    report = bp.check(net, key, (2, 2))
    assert not report.ok
    by_autodiff = {f.what for f in report.findings if f.witness == "autodiff" and not f.ok}
    assert by_autodiff == wrong
    with pytest.raises(AssertionError, match=rf"WRONG +{wrong.pop()} +autodiff"):
        report.raise_if_wrong()


def test_a_layer_that_takes_tokens_is_checked_on_those_that_it_is_given(key):
    good = bp.embedding(4, 3)

    def backward(params, x, dy, *, read=bp.keep):
        return good.backward(params, x, dy.at[0].set(0), read=read)

    tokens = jax.random.randint(key, (3, 5), 0, 4)
    assert bp.check(bp.chain(good, bp.tanh()), key, (5,), inputs=tokens).ok
    wrong = bp.check(good._replace(backward=backward), key, (5,), inputs=tokens)
    assert {f.what for f in wrong.findings if not f.ok} == {"params.weight", "all together"}


@pytest.mark.parametrize("name", ["a sign in dx", "a weight's operand", "a bias doubled"])
def test_each_witness_finds_it_on_its_own(name, key):
    report = bp.check(bp.chain(bp.flatten(), MISTAKES[name][0]), key, (2, 2))
    for witness in ("autodiff", "finite differences", "adjoint identity"):
        assert any(not f.ok for f in report.findings if f.witness == witness)


def test_a_loss_with_a_wrong_delta_is_found(key):
    good = bp.squared_error
    bad = bp.Loss(
        "bad", lambda y, t: (good.terms(y, t)[0], t - y), good.sample, good.hessian_factor
    )
    assert bp.check(good, key, (2, 3)).ok
    assert not bp.check(bad, key, (2, 3)).ok


def layer_of(forward, backward, params=None, out_shape=lambda shape: (3,)):
    """A layer of one's own on [N, 4] with the parameters of `dense(3)`, or others."""

    def init(key, shape):
        own = bp.dense(3).init(key, shape)[0] if params is None else params
        return own, out_shape(shape)

    return bp.Layer("mine", init, forward, backward)


def affine(params, x, *, key=None):
    return x @ params["weight"] + params["bias"], x


def signals_of(x, dy):
    return {"weight": bp.Outer(x, dy), "bias": bp.Bias(dy)}


def backward_with(readings, dx=lambda p, x, dy: dy @ p["weight"].T):
    """The backward of `affine` with other readings or another dx."""

    def backward(params, x, dy, *, read=bp.keep):
        return dx(params, x, dy), readings(x, dy, read)

    return backward


def read_well(x, dy, read):
    return {name: read(signal) for name, signal in signals_of(x, dy).items()}


def centred(params, x, *, key=None):
    """Batch normalisation without its scale: every example sees the batch."""
    return affine(params, x - jnp.mean(x, axis=0))


def of_positions(params, x, *, key=None):
    return jnp.tanh(x) @ params["weight"] + params["bias"], jnp.tanh(x)


def noisy(params, x, *, key=None):
    """A layer that draws by itself, and not by the key."""
    y, cache = affine(params, x)
    return y + np.random.default_rng().normal(), cache


def masks(key, x):
    return jnp.ones_like(x) if key is None else jax.random.normal(key, x.shape)


def dropped(params, x, *, key=None):
    """Dropout whose backward always has another mask than without a key."""
    mask = masks(key, x)
    return x * mask, mask if key is not None else 2 * mask


def twice(params, x, *, key=None):
    h = x @ params["weight"]
    return h @ params["weight"], (x, h)


def backward_twice(join):
    def backward(params, cache, dy, *, read=bp.keep):
        x, h = cache
        dh = dy @ params["weight"].T
        uses = bp.Outer(x, dh), bp.Outer(h, dy)
        return dh @ params["weight"].T, {"weight": join(read, uses)}

    return backward


def square():
    return {"weight": jnp.ones((4, 4))}


def stay(shape):
    return shape


W, B = r"params\.weight", r"params\.bias"
BROKEN = {
    "gradients instead of readings": (
        layer_of(
            affine, backward_with(lambda x, dy, read: {"weight": x.T @ dy, "bias": dy.sum(0)})
        ),
        rf"{W} +readings\n +backward returned an array of shape \[4, 3\] .* did not call read",
    ),
    "signals whatever is read": (
        layer_of(affine, backward_with(lambda x, dy, read: signals_of(x, dy))),
        rf"{B} +readings\n +backward returned the signal Bias\(\[3, 3\]\) and did not call read",
    ),
    "no readings": (
        layer_of(affine, backward_with(lambda x, dy, read: ())),
        rf"{W} +structure\n +backward returned nothing for it",
    ),
    "None for readings": (
        layer_of(affine, backward_with(lambda x, dy, read: None)),
        rf"{B} +structure\n +backward returned nothing for it",
    ),
    "a bias that is dropped": (
        layer_of(affine, backward_with(lambda x, dy, read: {"weight": read(bp.Outer(x, dy))})),
        rf"{B} +structure\n +backward returned nothing for it",
    ),
    "a parameter that is not there": (
        layer_of(
            affine,
            backward_with(lambda x, dy, read: read_well(x, dy, read) | {"gain": read(bp.Bias(dy))}),
        ),
        r"params\.gain +structure\n +backward returned .*; there is no such leaf",
    ),
    "signals that are swapped": (
        layer_of(
            affine,
            backward_with(
                lambda x, dy, read: {"weight": read(bp.Bias(dy)), "bias": read(bp.Outer(x, dy))}
            ),
        ),
        rf"{W} +shape\n +its derivative is an array of shape \[3\] .*; it takes .* \[4, 3\]",
    ),
    "the wrong operand": (
        layer_of(
            lambda p, x, *, key=None: (x @ p["weight"], (x, x @ p["weight"])),
            lambda p, cache, dy, *, read=bp.keep: (
                dy @ p["weight"].T,
                {"weight": read(bp.Outer(cache[1], dy))},
            ),
            square(),
            stay,
        ),
        rf"{W} +autodiff +\d",
    ),
    "a delta that is scaled": (
        layer_of(affine, backward_with(lambda x, dy, read: read_well(x, dy / 3, read))),
        rf"{B} +autodiff +\d",
    ),
    "examples that are exchanged": (
        layer_of(affine, backward_with(lambda x, dy, read: read_well(x[::-1], dy[::-1], read))),
        rf"{W} +readings .*\n +not those of each example: per_example .*, sq_norms",
    ),
    "a position that is forgotten": (
        layer_of(
            of_positions,
            lambda p, h, dy, *, read=bp.keep: (
                (1 - h * h) * (dy @ p["weight"].T),
                {"weight": read(bp.Outer(h[:, 1:], dy[:, 1:])), "bias": read(bp.Bias(dy))},
            ),
            out_shape=lambda shape: (*shape[:-1], 3),
        ),
        rf"{W} +autodiff +\d",
    ),
    "examples that see each other": (
        layer_of(
            centred,
            backward_with(read_well, lambda p, x, dy: (dy - jnp.mean(dy, axis=0)) @ p["weight"].T),
        ),
        r"outputs +other examples .*\n +the outputs of an example change with other examples",
    ),
    "a wrong out_shape": (
        layer_of(affine, backward_with(read_well), out_shape=lambda shape: (4,)),
        r"outputs +out_shape\n +the outputs have shape \(3, 3\); .* promised \(3, 4\)",
    ),
    "randomness of its own": (layer_of(noisy, backward_with(read_well)), r"outputs +jit +\d"),
    "a mask without a key": (
        layer_of(dropped, lambda p, mask, dy, *, read=bp.keep: (mask * dy, ()), (), stay),
        r"all together +without a key +\d",
    ),
    "dx of another shape": (
        layer_of(affine, backward_with(read_well, lambda p, x, dy: dy)),
        r"inputs +shape\n +its derivative is an array of shape \[3, 3\] .* takes .* \[3, 4\]",
    ),
    "dx of another dtype": (
        layer_of(
            affine, backward_with(read_well, lambda p, x, dy: (dy @ p["weight"].T).astype("f4"))
        ),
        r"inputs +shape\n +its derivative is .* float32; it takes .* float64",
    ),
    "a tree for dx": (
        layer_of(affine, backward_with(read_well, lambda p, x, dy: (dy @ p["weight"].T, None))),
        r"inputs\.0 +structure\n",
    ),
    "readings that are added": (
        layer_of(
            twice, backward_twice(lambda read, uses: read(uses[0]) + read(uses[1])), square(), stay
        ),
        rf"{W} +readings\n +backward added two readings.* into one Sum",
    ),
    "readings that are computed with": (
        layer_of(
            affine,
            backward_with(
                lambda x, dy, read: jax.tree.map(
                    lambda s: 2 * read(s),
                    signals_of(x, dy / 2),
                    is_leaf=lambda n: isinstance(n, bp.Outer | bp.Bias),
                )
            ),
        ),
        r"params +readings\n +backward failed with a reading that returns a tree",
    ),
    "what is no signal": (
        layer_of(
            affine,
            backward_with(
                lambda x, dy, read: {"weight": read(x.T @ dy), "bias": read(bp.Bias(dy))}
            ),
        ),
        rf"{W} +readings\n +backward called read with an array of shape \[4, 3\] .* takes the",
    ),
    "another default than keep": (
        layer_of(
            affine,
            lambda p, x, dy, *, read=bp.total: (dy @ p["weight"].T, read_well(x, dy, read)),
        ),
        rf"{W} +readings\n +without read, backward returned an array .* default of read is keep",
    ),
    "weights from the cache": (
        layer_of(
            lambda p, x, *, key=None: (affine(p, x)[0], (x, p["weight"])),
            lambda p, cache, dy, *, read=bp.keep: (
                dy @ cache[1].T,
                read_well(cache[0], dy, read),
            ),
        ),
        r"inputs +another tree\n +dx is the same whatever tree",
    ),
    "deltas that are clipped": (
        layer_of(
            affine,
            lambda p, x, dy, *, read=bp.keep: (
                jnp.clip(dy, -50, 50) @ p["weight"].T,
                read_well(x, dy, read),
            ),
        ),
        r"all together +linear in dy +\d",
    ),
    "an init without its key": (
        layer_of(affine, backward_with(read_well))._replace(
            init=lambda key, shape: (
                {
                    "weight": jnp.asarray(np.random.default_rng().normal(size=(4, 3))),
                    "bias": jnp.zeros(3),
                },
                (3,),
            )
        ),
        r"params +same key +\d",
    ),
}


@pytest.mark.parametrize(("layer", "row"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_contract_is_named_with_its_place(layer, row, key):
    shape = (2, 4) if layer.forward is of_positions else (4,)
    report = bp.check(layer, key, shape)
    assert not report.ok
    with pytest.raises(AssertionError, match=row):
        report.raise_if_wrong()


def test_the_same_layer_without_a_mistake_is_right(key):
    bp.check(layer_of(affine, backward_with(read_well)), key, (4,)).raise_if_wrong()
    joined = backward_twice(lambda read, uses: read(bp.Sum(uses)))
    bp.check(layer_of(twice, joined, square(), stay), key, (4,)).raise_if_wrong()


def test_a_map_that_positions_do_not_share_is_told_the_way_out(key):
    """A gain for each pixel [H, C], read as if the pixels shared it."""

    def gains(signal_of):
        return layer_of(
            lambda p, x, *, key=None: (x * p, x),
            lambda p, x, dy, *, read=bp.keep: (dy * p, read(signal_of(bp.Scale(x, dy)))),
            jnp.ones((2, 4)),
            stay,
        )

    row = r"params +shape\n +.*\[4\] .*it takes .*\[2, 4\].* pass its signal to unshared"
    with pytest.raises(AssertionError, match=row):
        bp.check(gains(lambda signal: signal), key, (2, 4)).raise_if_wrong()
    bp.check(gains(bp.unshared), key, (2, 4)).raise_if_wrong()


def test_trees_of_inputs_with_integers_and_masks(key):
    pair = bp.function(lambda inputs: inputs["a"] * inputs["n"] + jnp.sum(inputs["b"]))
    net = bp.chain(pair, bp.dense(2))
    inputs = {"a": jnp.ones((3, 4)), "b": jnp.ones((3, 2)), "n": jnp.arange(12).reshape(3, 4)}
    with jax.numpy_dtype_promotion("standard"):
        shapes = {name: array.shape[1:] for name, array in inputs.items()}
        report = bp.check(net, key, shapes, inputs=inputs).raise_if_wrong()
    assert {"inputs.a", "inputs.b"} <= {f.what for f in report.findings}

    masked = bp.masked(lambda mask: bp.recurrent(bp.simple_rnn(2), mask=mask))
    mask = jnp.arange(3) < jnp.array([[1], [3]])
    inputs = jax.random.normal(key, (2, 3, 4)), mask
    bp.check(masked, key, ((3, 4), (3,)), inputs=inputs).raise_if_wrong()


def test_inputs_of_different_n_are_refused(key):
    inputs = jnp.ones((3, 4)), jnp.ones((2, 3), bool)
    masked = bp.masked(lambda mask: bp.recurrent(bp.simple_rnn(2), mask=mask))
    with pytest.raises(ValueError, match=r"check: inputs.0 has 3 examples .* inputs.1 has 2"):
        bp.check(masked, key, ((3, 4), (3,)), inputs=inputs)


def bad_loss(terms):
    return bp.Loss("bad", terms, bp.squared_error.sample, bp.squared_error.hessian_factor)


def means(y, t):
    value = jnp.mean((y - t) ** 2 / 2, axis=0, keepdims=True) + 0 * y
    return value, (y - t) / len(y)


@pytest.mark.parametrize(
    ("terms", "row"),
    [
        (
            lambda y, t: (jnp.sum((y - t) ** 2) / 2 + jnp.zeros(1), y - t),
            r"values +shape\n .* \[1\]",
        ),
        (means, r"outputs +other examples +\d"),
        (lambda y, t: ((y - t) ** 2 / 2, (y - t)[:, :1]), r"outputs +shape\n .* \[3, 1\]"),
    ],
    ids=["one value", "examples that see each other", "delta of another shape"],
)
def test_a_loss_with_a_broken_contract_is_named(terms, row, key):
    with pytest.raises(AssertionError, match=row):
        bp.check(bad_loss(terms), key, (2,)).raise_if_wrong()


def test_a_joint_loss_of_a_tree_of_outputs(key):
    loss = bp.joint_loss(
        {"a": bp.squared_error, "b": bp.softmax_cross_entropy}, {"a": 2.0, "b": 0.5}
    )
    report = bp.check(
        loss,
        key,
        {"a": (2,), "b": (3,)},
        targets={"a": jnp.ones((3, 2)), "b": jnp.array([0, 2, 1])},
    )
    assert report.raise_if_wrong().largest_error < 1e-12


def test_the_report_prints_a_row_for_each_comparison(key):
    report = bp.check(bp.dense(3), key, (4,))
    lines = str(report).splitlines()
    assert lines[0] == "dense(3): right"
    assert len(lines) == 1 + 3 * 2 + 2 + 7
    assert "ok inputs autodiff" in [" ".join(line.split()[:3]) for line in lines]
    assert report.raise_if_wrong() is report
    assert report.largest_error == max(f.error for f in report.findings if f.witness == "autodiff")


def test_the_check_leaves_no_trace_in_the_configuration(key):
    with jax.enable_x64(False):
        assert bp.check(bp.dense(3), jax.random.key(0), (4,)).ok
        assert jnp.ones(()).dtype == jnp.float32


def test_a_layer_in_32_bits_is_checked_in_64(key):
    assert bp.check(bp.dense(3, dtype=jnp.float32), key, (4,)).largest_error < 1e-14


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(4))
def test_the_kinks_of_a_wide_network_are_no_mistakes(seed):
    net = bp.chain(bp.dense(512), bp.relu(), bp.dropout(0.4), bp.dense(256), bp.relu(), bp.dense(9))
    bp.check(net, jax.random.key(seed), (64,)).raise_if_wrong()


def test_what_is_not_a_layer_is_refused(key):
    with pytest.raises(TypeError, match="check: takes a Layer or a Loss; got function"):
        bp.check(bp.relu, key, (4,))


# A padding row is never trained: its gradient is zero, and not the derivative.
CASES = {name: case for name, case in (LAYERS | VARIANTS).items() if "padding row" not in name}


@every(
    "case",
    CASES,
    soon={"stack of what has no parameters", "embedding of single tokens", "select"},
)
def test_every_layer_keeps_the_whole_contract(case, key):
    tokens = None if case.vocabulary is None else make_inputs(case, key)
    bp.check(case.make(), key, case.shape, inputs=tokens).raise_if_wrong()


def test_what_is_drawn_for_arrays_of_one_shape_differs(key):
    """Else the check would not tell one parameter from another."""
    first, second = normal_like((jnp.zeros(3), jnp.zeros(3)), key)
    assert not np.any(first == second)
