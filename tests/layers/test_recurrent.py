"""Recurrent layers: step by step by definition, ragged sequences, cut and recomputed ways back."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every, late, normal
from oracles import (
    assert_close,
    layer_vjp,
    ravel_examples,
    recurrent_outputs,
    recurrent_outputs_and_state,
)
from sequences import CELLS, INPUTS, LENGTHS, PADDED, H, N, T, every_cell, problem

import jaxbp as bp

KEY = jax.random.key(0)
HOLES = np.array([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)


@functools.partial(jax.jit, static_argnums=0)
def sweep(layer, params, x, dy):
    """(outputs, dx, gradients), in one program."""
    y, cache = layer.forward(params, x)
    return y, *layer.backward(params, cache, dy, read=bp.total)


def by_definition(kind, params, x, dy, **how):
    def forward(params, x, *, key=None):
        return recurrent_outputs(kind, params, x, **how), None

    reference = bp.Layer("by definition", None, forward, None)
    y, _ = jax.jit(forward)(params, x)
    return y, *layer_vjp(reference, params, x, dy)


@every_cell
@pytest.mark.parametrize(
    "how",
    [
        {},
        late({"mask": HOLES, "reverse": True}),
        late({"horizon": 1}),
        {"horizon": 4, "mask": PADDED, "reverse": True},
    ],
    ids=["whole", "masked and backwards", "cut each time", "cut, masked and backwards"],
)
def test_outputs_and_derivatives_are_those_of_the_definition(kind, how, key):
    layer = bp.recurrent(CELLS[kind](H), learn_initial=True, **how)
    params, x, dy = problem(layer, key)
    x = x if "mask" not in how else jnp.where(how["mask"][..., None], x, 0)
    got, want = sweep(layer, params, x, dy), by_definition(kind, params, x, dy, **how)
    assert_close(got, want)


@every_cell
@pytest.mark.parametrize("segment", [2, 3])
def test_segments_change_no_number(kind, segment, key):
    how = {"learn_initial": True, "horizon": 4, "mask": PADDED, "reverse": segment == 2}
    whole = bp.recurrent(CELLS[kind](H), **how)
    params, x, dy = problem(whole, key)
    in_segments = bp.recurrent(CELLS[kind](H), segment=segment, **how)
    assert_close(sweep(in_segments, params, x, dy), sweep(whole, params, x, dy))


# Forms of the cells: their formulas in the oracle, the cell, and arguments of the layer.
FORMS = {
    "gru, reset before": ("gru", bp.gru(H, reset="before"), {}),
    "lstm, projected": ("lstm", bp.lstm(H, projection=2), {}),
    "relu": ("relu", bp.simple_rnn(H, activation="relu"), {}),
    "sigmoid": ("sigmoid", bp.simple_rnn(H, activation="sigmoid"), {}),
    "gru without biases": ("gru", bp.gru(H), {"use_bias": False}),
}


@every("form", FORMS, soon={"gru, reset before", "lstm, projected"})
@pytest.mark.parametrize(
    "how",
    [
        {"horizon": 4, "mask": PADDED, "reverse": True, "learn_initial": True},
        pytest.param({}, marks=pytest.mark.thorough),
        pytest.param({"mask": HOLES, "learn_initial": True}, marks=pytest.mark.thorough),
    ],
    ids=["cut, masked and backwards", "whole", "masked"],
)
def test_every_form_of_a_cell_is_that_of_its_definition(form, how, key):
    """With segments too."""
    kind, cell, arguments = form
    layer = bp.recurrent(cell, **arguments, **how)
    params, x, dy = problem(layer, key)
    mask = how.get("mask", np.ones((N, T), bool))
    x = jnp.where(mask[..., None], x, 0)
    how = {k: v for k, v in how.items() if k != "learn_initial"}
    got, want = sweep(layer, params, x, dy), by_definition(kind, params, x, dy, **how)
    assert_close(got, want)
    learn = "initial" in params
    in_segments = bp.recurrent(cell, segment=3, learn_initial=learn, **arguments, **how)
    assert_close(sweep(in_segments, params, x, dy), got)


def test_a_cell_without_biases_has_none(key):
    params, _ = bp.bidirectional(bp.gru(H), use_bias=False).init(key, (T, INPUTS))
    assert [sorted(p) for p in params] == [["recurrent", "weight"]] * 2


def test_sizes_of_a_projection(key):
    params, out_shape = bp.recurrent(bp.lstm(4, projection=3), learn_initial=True).init(key, (T, 2))
    sizes = {leaf: p.shape for leaf, p in params.items() if leaf != "initial"}
    assert sizes == {"weight": (2, 16), "recurrent": (3, 16), "bias": (16,), "projection": (4, 3)}
    assert [part.shape for part in params["initial"]] == [(3,), (4,)]
    assert out_shape == (T, 3)


@every("form", {**FORMS, "lstm": ("lstm", bp.lstm(H), {})}, soon={"lstm, projected"})
@pytest.mark.parametrize(
    "how",
    [{"mask": PADDED, "segment": 3}, pytest.param({"reverse": True}, marks=pytest.mark.thorough)],
    ids=["masked and in segments", "backwards"],
)
def test_states_that_come_in_and_go_out_have_derivatives(form, how, key):
    kind, cell, arguments = form
    layer = bp.stateful(cell, **arguments, **how)
    params, x, dy, state, dstate = stream(layer, cell, key)
    y, cache = layer.forward(params, (x, state))
    how = {k: v for k, v in how.items() if k != "segment"}

    def values(params, x, state, own):
        y, last = recurrent_outputs_and_state(kind, params, x, state, **how)
        pairs = zip(jax.tree.leaves((y, last)), jax.tree.leaves((dy, dstate)), strict=True)
        return sum(jnp.einsum("n...,n...,n->n", a, b, own) for a, b in pairs)

    x = jnp.where(PADDED[..., None], x, 0) if "mask" in how else x
    assert_close(y, jax.jit(lambda: recurrent_outputs_and_state(kind, params, x, state, **how))())
    dx, grads = jax.jit(functools.partial(layer.backward, read=bp.per_example))(
        params, cache, (dy, dstate)
    )
    want_x, want_state = jax.jit(jax.grad(lambda *a: jnp.sum(values(*a)), (1, 2)))(
        params, x, state, jnp.ones(N)
    )
    assert_close(dx, (want_x, want_state))
    assert_close(grads, jax.jit(jax.jacrev(values))(params, x, state, jnp.ones(N)))
    norms = layer.backward(params, cache, (dy, dstate), read=bp.sq_norms)[1]
    whole = np.sum(ravel_examples(grads) ** 2, axis=1)
    assert_close(sum(jax.tree.leaves(norms)), whole)


def streamed():
    return STATEFUL.init(KEY, ((5, 3), ((2,), (2,))))[0]


def stream(layer, cell, key):
    """Parameters away from zero, a sequence, a state, and the errors at the outputs of both."""
    shapes = ((T, INPUTS), tuple((size,) for size in cell.sizes))
    keys = jax.random.split(key, 5)
    params, _ = layer.init(keys[0], shapes)
    params = jax.tree.map(lambda p: p + 0.5 * normal(keys[1], p.shape), params)
    x, dy = (normal(keys[2], (N, T, size)) for size in (INPUTS, cell.sizes[0]))
    state, dstate = (tuple(normal(k, (N, size)) for size in cell.sizes) for k in keys[3:])
    return params, x, dy, state, dstate


def test_a_stream_in_two_parts_is_the_whole(key):
    """Outputs and gradients, if the error goes on from part to part; and cut, if it does not."""
    cell = bp.lstm(H)
    layer = bp.stateful(cell)
    params, x, dy, state, dlast = stream(layer, cell, key)

    @functools.partial(jax.jit, static_argnames=("layer", "cut"))
    def in_parts(layer, at, cut=False):
        parts, caches, now = [], [], state
        for part in at:
            (y, now), cache = layer.forward(params, (x[:, part], now))
            parts.append(y)
            caches.append(cache)
        dnow, grads, dxs = dlast, [], []
        for part, cache in zip(at[::-1], caches[::-1], strict=True):
            (dx, dnow), own = layer.backward(params, cache, (dy[:, part], dnow), read=bp.total)
            dnow = jax.tree.map(jnp.zeros_like, dnow) if cut else dnow
            grads.append(own)
            dxs.append(dx)
        summed = jax.tree.map(lambda *g: sum(g), *grads)
        return jnp.concatenate(parts, 1), now, jnp.concatenate(dxs[::-1], 1), dnow, summed

    def at(*borders):
        return [np.arange(a, b) for a, b in itertools.pairwise(borders)]

    assert_close(in_parts(layer, at(0, 2, T)), in_parts(layer, at(0, T)))
    cut, whole = (
        in_parts(layer, at(0, 3, T), cut=True),
        in_parts(bp.stateful(cell, horizon=3), at(0, T)),
    )
    assert_close((*cut[:3], cut[4]), (*whole[:3], whole[4]))


def test_rtrl_of_a_stream_has_the_derivatives_of_both_states(key):
    cell = bp.lstm(2)
    layer = bp.stateful(cell, mask=PADDED)
    params, x, dy, state, dlast = stream(layer, cell, key)

    @functools.partial(jax.jit, static_argnums=0)
    def backward(rule, params):
        _, cache = layer.forward(params, (x, state))
        return layer.backward(rule.choose((), params), cache, (dy, dlast), read=bp.per_example)

    assert_close(backward(bp.rtrl(), params), backward(bp.exact(), params))


@pytest.mark.parametrize("rule", [bp.rtrl, bp.snap1, bp.eprop])
def test_credit_forward_in_time_refuses_cells_that_are_not_elementwise(rule, key):
    for cell, leaf in (
        (bp.gru(2, reset="before"), "candidate"),
        (bp.lstm(3, projection=2), "proj"),
    ):
        params, _ = bp.recurrent(cell).init(key, (T, INPUTS))
        with pytest.raises(ValueError, match=f"{rule.__name__}: a recurrent layer has a.*{leaf}"):
            rule().choose((), params)


@every_cell
def test_a_horizon_beyond_the_sequence_is_none(kind, key):
    layer = bp.recurrent(CELLS[kind](H))
    params, x, dy = problem(layer, key)
    want = sweep(layer, params, x, dy)
    assert_close(sweep(bp.recurrent(CELLS[kind](H), horizon=T), params, x, dy), want)
    short = sweep(bp.recurrent(CELLS[kind](H), horizon=3), params, x, dy)
    assert_close(short[0], want[0])
    assert not np.allclose(short[2]["weight"], want[2]["weight"], rtol=1e-3)


def error_signals(layer, key):
    """The largest delta of each step, with an error at the last one alone."""
    params, x, dy = problem(layer, key)
    _, cache = layer.forward(params, x)
    dy = jnp.where((jnp.arange(T) == T - 1)[:, None], dy, 0)
    _, signals = layer.backward(params, cache, dy)
    return np.abs(signals["bias"].deltas).max(axis=(0, 2)) > 0


def test_no_error_crosses_a_border_of_the_horizon(key):
    reached = error_signals(bp.recurrent(bp.lstm(H), horizon=4), key)
    assert reached.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("kind", [late("lstm"), "gru"])
def test_sequences_that_are_padded_are_as_they_are_alone(kind, key):
    """Whatever their padding holds; the last output is that of the last step."""
    net = bp.masked(lambda mask: bp.chain(bp.bidirectional(CELLS[kind](H), mask=mask), bp.dense(2)))
    init_key, x_key, dy_key = jax.random.split(key, 3)
    params, _ = net.init(init_key, ((T, INPUTS), (T,)))
    x = normal(x_key, (N, T, INPUTS))
    dy = jnp.where(PADDED[..., None], normal(dy_key, (N, T, 2)), 0)

    @jax.jit
    def run(x, mask, dy):
        y, cache = net.forward(params, (x, mask))
        return y, *net.backward(params, cache, dy, read=bp.per_example)

    y, dx, grads = run(jnp.where(PADDED[..., None], x, jnp.nan), jnp.asarray(PADDED), dy)
    assert bool(jnp.all(dx[~PADDED] == 0))
    for n in (0, 2):
        length, own = LENGTHS[n], slice(n, n + 1)
        alone = run(x[own, :length], jnp.ones((1, length), bool), dy[own, :length])
        assert_close((y[own, :length], dx[own, :length]), alone[:2])
        assert_close(jax.tree.map(lambda g, own=own: g[own], grads), alone[2])


@every_cell
def test_the_last_output_is_the_state_after_the_last_step(kind, key):
    layer = bp.recurrent(CELLS[kind](H), mask=PADDED)
    params, x, _ = problem(layer, key)
    y, _ = layer.forward(params, x)
    for n, length in enumerate(LENGTHS):
        assert bool(jnp.all(y[n, length - 1 :] == y[n, length - 1]))


def test_both_directions_are_one_and_the_same_turned_round(key):
    layer = bp.bidirectional(bp.gru(H), learn_initial=True)
    assert layer.name == "bidirectional(gru(3))"
    params, x, dy = problem(layer, key)
    y, dx, grads = sweep(layer, params, x, dy)
    one = bp.recurrent(bp.gru(H), learn_initial=True)
    ahead = sweep(one, params[0], x, dy[..., :H])
    back = sweep(one, params[1], x[:, ::-1], dy[:, ::-1, H:])
    assert_close(y, jnp.concatenate([ahead[0], back[0][:, ::-1]], axis=-1))
    assert_close(dx, ahead[1] + back[1][:, ::-1])
    assert_close(grads, (ahead[2], back[2]))


def test_what_is_learned_begins_as_it_should(key):
    params, _ = bp.recurrent(bp.lstm(4), learn_initial=True).init(key, (T, INPUTS))
    assert params["bias"].tolist() == [0] * 4 + [1] * 4 + [0] * 8
    other, _ = bp.recurrent(bp.lstm(1, forget_bias=2.5)).init(key, (T, INPUTS))
    assert other["bias"].tolist() == [0, 2.5, 0, 0]
    for gate in jnp.split(params["recurrent"], 4, axis=1):
        assert_close(gate.T @ gate, jnp.eye(4))
    first, second, *_ = jnp.split(params["recurrent"], 4, axis=1)
    assert not np.allclose(first, second)
    assert_close(params["initial"], (jnp.zeros(4), jnp.zeros(4)))


@every_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "back"])
def test_outputs_and_gradients_are_those_of_pytorch(kind, reverse, key):
    torch = pytest.importorskip("torch")
    layer = bp.recurrent(CELLS[kind](H), reverse=reverse)
    params, x, dy = problem(layer, key)
    y, dx, grads = sweep(layer, params, x, dy)
    make = {"simple_rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
    model = make(INPUTS, H, batch_first=True, dtype=torch.float64)

    def as_theirs(tree):
        """Weights [G H, INPUTS], and two biases of which we have one, but in the gru."""
        zeros = jnp.zeros_like(tree["bias"])
        return [
            torch.tensor(np.asarray(array))
            for array in (tree["weight"].T, tree["recurrent"].T, tree["bias"],
                          tree.get("recurrent_bias", zeros))
        ]  # fmt: skip

    with torch.no_grad():
        for own, ours in zip(model.parameters(), as_theirs(params), strict=True):
            own.copy_(ours)
    turn = np.s_[:, ::-1] if reverse else np.s_[:]
    their_x = torch.tensor(np.asarray(x)[turn].copy(), requires_grad=True)
    their_y, _ = model(their_x)
    their_y.backward(torch.tensor(np.asarray(dy)[turn].copy()))
    assert_close(y, jnp.asarray(their_y.detach().numpy()[turn]))
    assert_close(dx, jnp.asarray(their_x.grad.numpy()[turn]))
    theirs = dict(zip(("weight", "recurrent", "bias", "recurrent_bias"), model.parameters(),
                      strict=True))  # fmt: skip
    for leaf, own in grads.items():
        assert_close(own, jnp.asarray(theirs[leaf].grad.numpy().T))


def temporary_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("kind", "part"), [("lstm", 0.7), ("gru", 0.7)])
def test_a_gradient_takes_less_memory_than_that_of_autodiff(kind, part):
    cell = CELLS[kind](32)
    layer = bp.recurrent(cell, dtype=jnp.float32)
    shapes = jax.eval_shape(lambda key: layer.init(key, (64, 32))[0], jax.random.key(0))
    x = dy = jnp.zeros((8, 64, 32), jnp.float32)

    def explicit(params, x, dy):
        _, cache = layer.forward(params, x)
        return layer.backward(params, cache, dy, read=bp.total)[1]

    def plain(params, x, dy):
        drives = jnp.moveaxis(x @ params["weight"] + params["bias"], 1, 0)

        def step(state, drive):
            echo = state[0] @ params["recurrent"]
            state, _ = cell.forward(drive, echo + params.get("recurrent_bias", 0), state)
            return state, state[0]

        start = (jnp.zeros((8, 32), jnp.float32),) * cell.parts
        _, y = jax.lax.scan(step, start, drives)
        return jnp.sum(jnp.moveaxis(y, 0, 1) * dy)

    ours, theirs = (
        temporary_bytes(function, shapes, x, dy) for function in (explicit, jax.grad(plain))
    )
    assert ours < part * theirs


@pytest.mark.parametrize(("layers", "part"), [(1, 0.8), (6, 0.6)])
def test_segments_take_less_memory(layers, part):
    """Of the deltas of one layer, which are there in any case, and of what each layer keeps."""

    def bytes_of(segment):
        layer = bp.recurrent(bp.lstm(16), segment=segment, dtype=jnp.float32)
        net = bp.stack(layer, layers) if layers > 1 else layer
        params = jax.eval_shape(lambda key: net.init(key, (64, 16))[0], KEY)

        def function(params, x):
            y, cache = net.forward(params, x)
            return net.backward(params, cache, y, read=bp.total)

        return temporary_bytes(function, params, jnp.zeros((4, 64, 16), jnp.float32))

    assert bytes_of(8) < part * bytes_of(None)


LSTM = bp.recurrent(bp.lstm(2))
STATEFUL = bp.stateful(bp.lstm(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bp.lstm(0), ValueError, "lstm: features is 0; it takes a positive integer"),
        (lambda: bp.gru(2.0), ValueError, "gru: features is 2.0; it takes a positive integer"),
        (
            lambda: bp.simple_rnn(2, activation="gelu"),
            ValueError,
            "simple_rnn: activation is 'gelu'; it takes 'tanh', 'relu' or 'sigmoid'",
        ),
        (
            lambda: bp.gru(2, reset=True),
            ValueError,
            "gru: reset is True; it takes 'after' or 'before'",
        ),
        (
            lambda: bp.lstm(2, projection=0),
            ValueError,
            "lstm: projection is 0; it takes a positive integer",
        ),
        (
            lambda: bp.stateful(bp.lstm(2), segment=0),
            ValueError,
            "stateful: segment is 0; it takes a positive integer",
        ),
        (
            lambda: bp.stateful(bp.lstm(2)).init(KEY, (5, 3)),
            bp.LayerError,
            r"^stateful\(lstm\(2\)\) got a shape that does not fit; it takes a pair",
        ),
        (
            lambda: bp.stateful(bp.lstm(2)).init(KEY, ((5, 3), ((2,),))),
            bp.LayerError,
            r"got a state of shape \(\(2,\),\); it takes \(\(2,\), \(2,\)\)",
        ),
        (
            lambda: STATEFUL.forward(streamed(), jnp.ones((4, 5, 3))),
            bp.LayerError,
            "got inputs that do not fit; it takes a pair",
        ),
        (
            lambda: STATEFUL.forward(streamed(), (jnp.ones((4, 5, 3)), (jnp.ones((1, 2)),) * 2)),
            bp.LayerError,
            r"got a state that does not fit; .* it takes a tuple of 2, \[4, 2\], \[4, 2\]",
        ),
        (
            lambda: STATEFUL.forward(
                streamed(), (jnp.ones((4, 5, 3)), (jnp.ones((4, 2), jnp.float32),) * 2)
            ),
            bp.LayerError,
            "got a state of dtype float32",
        ),
        (
            lambda: STATEFUL.backward(
                streamed(),
                STATEFUL.forward(streamed(), (jnp.ones((4, 5, 3)), (jnp.ones((4, 2)),) * 2))[1],
                (jnp.ones((4, 5, 2)), jnp.ones((4, 2))),
            ),
            bp.LayerError,
            "got a dy of the last state that does not fit",
        ),
        (lambda: bp.simple_rnn(-1), ValueError, "simple_rnn: features is -1; it takes a positive"),
        (
            lambda: bp.recurrent(bp.lstm),
            TypeError,
            r"recurrent: cell is .*; it takes a Cell, such as .* Call it: lstm\(\.\.\.\)\?",
        ),
        (lambda: bp.bidirectional(64), TypeError, "recurrent: cell is 64; it takes a Cell"),
        (
            lambda: bp.recurrent(bp.lstm(2), horizon=0),
            ValueError,
            "recurrent: horizon is 0; it takes a positive integer",
        ),
        (
            lambda: bp.recurrent(bp.lstm(2), segment=1.5),
            ValueError,
            "recurrent: segment is 1.5; it takes a positive integer",
        ),
        (
            lambda: bp.recurrent(bp.lstm(2), mask=[True]),
            ValueError,
            r"recurrent: mask is of type list and shape \[1\]; it takes an array of booleans",
        ),
        (
            lambda: LSTM.init(KEY, (5,)),
            bp.LayerError,
            r"recurrent\(lstm\(2\)\) got inputs of shape \[N, 5\]; it takes \[N, T, I\]\.",
        ),
        (
            lambda: bp.recurrent(bp.lstm(2), segment=2).init(KEY, (5, 3)),
            bp.LayerError,
            "got inputs of 5 steps, not a multiple of segment = 2",
        ),
        (
            lambda: bp.recurrent(bp.lstm(2), mask=np.ones(4, bool)).init(KEY, (5, 3)),
            bp.LayerError,
            r"has a mask of shape \[4\]; inputs of shape \[N, 5, 3\] take \[5\] or \[N, 5\]",
        ),
        (
            lambda: LSTM.forward(LSTM.init(KEY, (5, 3))[0], jnp.ones((4, 5, 2))),
            bp.LayerError,
            r"got inputs of shape \[4, 5, 2\]; its weight takes \[N, T, 3\]",
        ),
        (
            lambda: LSTM.forward(LSTM.init(KEY, (5, 3))[0], jnp.ones((4, 5, 3), int)),
            bp.LayerError,
            "got inputs of dtype int64; it takes floating-point numbers",
        ),
        (
            lambda: LSTM.forward(bp.recurrent(bp.gru(2)).init(KEY, (5, 3))[0], jnp.ones((4, 5, 3))),
            bp.LayerError,
            "got parameters that are not its own: a dict of .*; it takes a dict of weight and",
        ),
        (
            lambda: LSTM.forward(
                bp.recurrent(bp.lstm(1)).init(KEY, (5, 3))[0], jnp.ones((4, 5, 3))
            ),
            bp.LayerError,
            r"got a weight of shape \[3, 4\]; it takes \[I, 8\]",
        ),
        (
            lambda: LSTM.backward(
                LSTM.init(KEY, (5, 3))[0],
                LSTM.forward(LSTM.init(KEY, (5, 3))[0], jnp.ones((4, 5, 3)))[1],
                jnp.ones((4, 5, 1)),
            ),
            bp.LayerError,
            r"got a dy of shape \[4, 5, 1\]; its outputs are \[4, 5, 2\]",
        ),
        (
            lambda: bp.bidirectional(bp.lstm(2)).init(KEY, (5,)),
            bp.LayerError,
            r"^parallel: branch 1 \(recurrent\(lstm\(2\)\)\) got inputs of shape \[N, 5\]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_segment_runs_again_behind_a_barrier(key):
    """Otherwise XLA runs the steps of all segments first, and keeps what each needs."""
    layer = bp.recurrent(bp.gru(2), segment=2)
    params, _ = layer.init(key, (4, 3))
    y, cache = layer.forward(params, jnp.ones((1, 4, 3)))
    program = jax.make_jaxpr(layer.backward)(params, cache, y).jaxpr
    loops = [e.params["jaxpr"].jaxpr for e in program.eqns if e.primitive.name == "scan"]
    inside = [e.primitive.name for loop in loops for e in loop.eqns]
    # Before the steps, which are loops inside the loop over the segments.
    assert inside.index("optimization_barrier") < inside.index("scan")
