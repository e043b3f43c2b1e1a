"""Recurrent networks, which return their last states besides, and single steps of their cells.

The library's layer of one direction is `stateful`: from (x, state) to (y, state). A network here
takes (x, s_1, s_2, ...) with a state for each layer and direction, and returns (y, s_1, s_2, ...).
"""

import jax
import jax.numpy as jnp
from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import Written, examples, sequences


def network(module, x, hx=None):
    """Layers of one or two directions. States begin at zero if they are not given."""
    cell, batched = _cell(module), x.ndim == 3
    directions = 2 if module.bidirectional else 1
    n = module.num_layers * directions
    layout = sequences(x, batch_first=module.batch_first)
    layer = bp.chain(
        *(
            part
            for first in range(0, n, directions)
            for part in _level(cell, module.bias, range(first, first + directions), n)
        )
    )

    def inputs(x, *parts):
        x = layout.into(x)
        if not parts:
            parts = [jnp.zeros((n, len(x), size)) for size in cell.sizes]
        elif not batched:
            parts = [part[:, None] for part in parts]
        return x, *zip(*parts, strict=True)

    def outputs(y):
        y, *states = y
        parts = [jnp.stack(part) for part in zip(*states, strict=True)]
        return layout.back(y), parts if batched else [part[:, 0] for part in parts]

    def params(params):
        suffixes = [
            f"_l{level}{suffix}"
            for level in range(module.num_layers)
            for suffix in ("", "_reverse")[:directions]
        ]
        state = tuple((size,) for size in cell.sizes)
        shapes = (1, module.input_size), *[state] * n
        return _filled(layer, shapes, [_cell_params(module, params, end) for end in suffixes])

    return Written(layer, inputs, outputs, params)


def single_step(module, x, hx):
    """A cell is a sequence of one step."""
    del hx
    layout = examples(x, 1)
    layer = bp.stateful(_cell(module), use_bias=module.bias)

    def inputs(x, *parts):
        return layout.into(x)[:, None], tuple(map(layout.into, parts))

    def outputs(y):
        _, state = y
        return [layout.back(part) for part in state]

    return Written(layer, inputs, outputs, lambda params: _cell_params(module, params, ""))


def _level(cell, use_bias, own, n):
    """The parts of a chain that run the layers of these states on (x, s_1, ..., s_n)."""
    others = [k for k in range(n) if k not in own]
    runs = [
        bp.chain(
            bp.fork(bp.select(0), bp.select(1 + k)),
            bp.stateful(cell, reverse=k > own[0], use_bias=use_bias),
        )
        for k in own
    ]
    # Outputs are (y, state) of each direction, and then the states of the other layers.
    place = {k: _at(i, 1) for i, k in enumerate(own)}
    place |= {k: bp.select(i) for i, k in enumerate(others, len(own))}
    y = [_at(i, 0) for i in range(len(own))]
    joined = y[0] if len(y) == 1 else bp.chain(bp.fork(*y), bp.concatenate())
    return (
        bp.fork(*runs, *(bp.select(1 + k) for k in others)),
        bp.fork(joined, *(place[k] for k in range(n))),
    )


def _at(*places):
    """An entry of an entry."""
    return bp.chain(*map(bp.select, places))


def _cell(module):
    size = module.hidden_size
    match module:
        case nn.LSTM() | nn.LSTMCell():
            return bp.lstm(size, projection=getattr(module, "proj_size", 0) or None)
        case nn.GRU() | nn.GRUCell():
            return bp.gru(size)
        case nn.RNN() | nn.RNNCell():
            return bp.simple_rnn(size, activation=module.nonlinearity)


def _cell_params(module, params, suffix):
    """Those of one layer and direction. The library has the sum of two biases that are added."""
    found = {
        "weight": params[f"weight_ih{suffix}"].T,
        "recurrent": params[f"weight_hh{suffix}"].T,
    }
    if module.bias:
        bias, recurrent_bias = params[f"bias_ih{suffix}"], params[f"bias_hh{suffix}"]
        if isinstance(module, nn.GRU | nn.GRUCell):
            found |= {"bias": bias, "recurrent_bias": recurrent_bias}
        else:
            found["bias"] = bias + recurrent_bias
    if f"weight_hr{suffix}" in params:
        found["projection"] = params[f"weight_hr{suffix}"].T
    return found


def _filled(layer, shapes, dicts):
    """The parameters of a network whose parts with parameters have these, in order."""
    like = jax.eval_shape(lambda: layer.init(jax.random.key(0), shapes)[0])
    structure = jax.tree.structure(like, is_leaf=lambda node: isinstance(node, dict))
    return structure.unflatten(dicts)


TRANSLATIONS = {
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), network),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), single_step),
}
