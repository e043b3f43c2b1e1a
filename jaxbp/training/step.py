"""The loop: feedforward, compare, spread the error backwards, update; every example once; again.

From the inside outwards, each a pure function that is jit-compiled whole:

  step     one batch: a sweep and an update of the parameters
  epoch    every example once, in batches drawn at random: one `lax.scan` of steps

and, beside them, `evaluate`, which measures and changes nothing. `fit` runs epochs until the model
is good.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbp.readings.sums import mean
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.sweeps.gradients import backprop, value_and_grad


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      params: the parameters.
      opt_state: the state of the optimizer.
      step: how many steps have been made.
      key: from which, together with `step`, every random number is drawn. It stays as it is.
      rule_state: the state of the rule by which the error is carried back.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    rule_state: Any = ()


def init_state(net, optimizer, key, shape, *, rule=exact()):
    """The state before the first step, with parameters drawn by the network's initialisers.

    Args:
      net: a Layer.
      optimizer: an optax optimizer.
      key: a random key.
      shape: that of one example, without N.
      rule: which weights carry the error back. The parameters do not depend on it.
    """
    require_rule("init_state", rule)
    init_key, key = jax.random.split(key)
    params, _ = net.init(init_key, shape)
    # Not by the same key: a rule that draws what the network draws would draw the parameters.
    rule_state = rule.make(jax.random.fold_in(init_key, RULE_STREAM), net, shape)
    # Some optimizers hold an array twice, or the parameters: what is donated must be held once.
    opt_state = jax.tree.map(jnp.copy, optimizer.init(params))
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key, rule_state)


def make_step(
    net,
    loss,
    optimizer,
    *,
    rule=exact(),
    read=None,
    measures=None,
    extra_args=None,
    donate=True,
):
    """A training step: one sweep over one batch and one update by its mean gradient.

    The step is pure and jit-compiled.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: an optax optimizer, also one that asks for `value`, `grad` or `value_fn`.
      rule: which weights carry the error back (see `feedback`); its state is made by `init_state`.
      read: a dict of readings to record beside the loss, answered by the same sweep.
      measures: a dict of what else to record, each a `function(params, inputs, targets, *, key,
        rule_state, rule_key) -> value`, such as `alignment` makes, at the parameters before the
        step. What it has in common with the step, such as the forward pass, is computed once.
      extra_args: what else the optimizer's update asks for, by name: a dict of
        `function(params, inputs, targets, *, key) -> value`, such as `kfac_factors` makes. The key
        is that of the forward pass.
      donate: whether the memory of the state that goes in is used for the one that comes out, after
        which the old one can no longer be read.

    Returns:
      `step(state, inputs, targets) -> (state, record)`; record is a dict of the mean loss,
      `loss`, of a tree for each reading, and of each measure.

    Raises:
      ValueError: `read`, `measures` or `extra_args` is no dict, or a name in it is taken.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> net, optimizer = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2)), optax.sgd(0.1)
      >>> state = bp.init_state(net, optimizer, jax.random.key(0), (3,))
      >>> step = bp.make_step(net, bp.squared_error, optimizer)
      >>> state, record = step(state, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> int(state.step), sorted(record)
      (1, ['loss'])
    """
    _require_names("read", "readings", read, RESERVED)
    _require_names("measures", "measures", measures, RESERVED | set(read or {}))
    _require_names("extra_args", "arguments", extra_args, PASSED)
    optimizer = optax.with_extra_args_support(optimizer)
    sweep = backprop(net, loss, read={"grads": mean, **(read or {})}, rule=rule)
    mean_sweep = value_and_grad(net, loss, rule=rule)

    def step(state, inputs, targets):
        key, (choose_key, update_key) = forward_key(state), rule_keys(state)
        how = {"key": key, "rule_state": state.rule_state, "rule_key": choose_key}
        if read:
            values, record = sweep(state.params, inputs, targets, **how)
            value, grads = jnp.mean(values), record.pop("grads")
        else:  # the mean can then be taken in delta, once for all parameters
            value, grads = mean_sweep(state.params, inputs, targets, **how)
            record = {}
        for name, measure in (measures or {}).items():
            record[name] = measure(state.params, inputs, targets, **how)

        def value_fn(params):  # for optimizers that search along a line
            outputs, _ = net.forward(params, inputs, key=key)
            return jnp.mean(loss(outputs, targets)[0])

        extra = {
            name: function(state.params, inputs, targets, key=key)
            for name, function in (extra_args or {}).items()
        }

        def move(tree):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, tree, value=value, grad=grads, value_fn=value_fn, **extra
            )
            return optax.apply_updates(tree, updates), opt_state

        params, opt_state = move(state.params)
        rule_state = rule.update(
            state.rule_state, params, move=lambda tree: move(tree)[0], key=update_key
        )
        after = TrainState(params, opt_state, state.step + 1, state.key, rule_state)
        return after, {"loss": value, **record}

    return jax.jit(step, donate_argnums=0 if donate else ())


def make_epoch(
    net, loss, optimizer, *, batch_size, rule=exact(), read=None, measures=None, extra_args=None
):
    """An epoch: a step for each batch, over all examples in a random order, as one `lax.scan`.

    If the batch size does not divide N, the last batch is a short one. Pure and jit-compiled.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: an optax optimizer.
      batch_size: examples per step.
      rule: as of `make_step`.
      read: a dict of readings to record beside the loss. Their shapes must not depend on N.
      measures: as of `make_step`. Their shapes must not depend on N.
      extra_args: as of `make_step`.

    Returns:
      `epoch(state, inputs, targets) -> (state, record)`; record is that of the steps, averaged
      over the examples.

    Raises:
      ValueError: a reading's shape depends on the number of examples, or its name is taken.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> net, optimizer = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2)), optax.sgd(0.1)
      >>> state = bp.init_state(net, optimizer, jax.random.key(0), (3,))
      >>> epoch = bp.make_epoch(net, bp.squared_error, optimizer, batch_size=4)
      >>> state, record = epoch(state, jnp.ones((10, 3)), jnp.zeros((10, 2)))
      >>> int(state.step)
      3
    """
    step = make_step(
        net, loss, optimizer, rule=rule, read=read, measures=measures, extra_args=extra_args
    )

    def epoch(state, inputs, targets):
        order = shuffle(state, len(inputs))

        def step_on(state, indices):
            return step(state, *take((inputs, targets), indices))

        return _scan_batches(step_on, state, order, batch_size)

    return jax.jit(epoch)


def evaluate(net, loss, *, metric=None, batch_size=1024):
    """Measures a network without changing it, and without drawing random numbers.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      metric: `metric(outputs, targets) -> [N]`, such as `bp.accuracy`.
      batch_size: how many examples go through the network at a time.

    Returns:
      `function(params, inputs, targets) -> record`, jit-compiled: the mean over the examples of
      the `loss` and, if there is one, of the `metric`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(2)
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> measure = bp.evaluate(net, bp.softmax_cross_entropy, metric=bp.accuracy)
      >>> sorted(measure(params, jnp.ones((10, 3)), jnp.zeros(10, int)))
      ['loss', 'metric']
    """

    def function(params, inputs, targets):
        def measure(carry, indices):
            x, t = take((inputs, targets), indices)
            outputs, _ = net.forward(params, x)
            record = {"loss": jnp.mean(loss(outputs, t)[0])}
            if metric is not None:
                record["metric"] = jnp.mean(metric(outputs, t))
            return carry, record

        return _scan_batches(measure, (), jnp.arange(len(inputs)), batch_size)[1]

    return jax.jit(function)


# What records hold beside the readings, and the reading that is the optimizer's.
RESERVED = {"epoch", "loss", "held_out_loss", "metric", "grads"}


# What the update of an optimizer is given in any case.
PASSED = {"updates", "state", "params", "value", "grad", "value_fn"}


def _require_names(argument, what, functions, reserved):
    if functions is None:
        return
    if not isinstance(functions, dict):
        raise ValueError(
            f"{argument} is {type(functions).__name__}, expected a dict of {what} by name."
        )
    if taken := reserved & set(functions):
        raise ValueError(
            f"{argument} has {what} called {', '.join(sorted(taken))}: names are taken."
        )


# Keys are folded from a key that stays: where a network draws nothing, nothing is computed for it,
# while a key split at every step took a tenth of the time of a small network's epoch.
SHUFFLE_STREAM, RULE_STREAM = 2**31, 2**31 + 1  # which no step reaches


def forward_key(state):
    """The key for the layers that draw in the next step."""
    return jax.random.fold_in(state.key, state.step)


def rule_keys(state):
    """The keys with which the rule chooses and updates in the next step."""
    stream = jax.random.fold_in(state.key, RULE_STREAM)
    return jax.random.split(jax.random.fold_in(stream, state.step))


def shuffle(state, n):
    """The examples of the next epoch in a random order, [N]."""
    stream = jax.random.fold_in(state.key, SHUFFLE_STREAM)
    # One sort by random numbers: jax.random.permutation makes two or more, and sorts are slow.
    return jnp.argsort(jax.random.bits(jax.random.fold_in(stream, state.step), (n,), "uint32"))


def take(data, indices):
    """The examples at `indices` of every array in a tree."""
    return jax.tree.map(lambda array: array[indices], data)


def _scan_batches(function, carry, indices, batch_size):
    """`function(carry, batch of indices) -> (carry, record)` over all, and the mean record."""
    n = len(indices)
    batch_size = min(batch_size, n)
    full = n // batch_size * batch_size
    carry, records = jax.lax.scan(function, carry, indices[:full].reshape(-1, batch_size))
    sums = jax.tree.map(lambda r: batch_size * jnp.sum(r, axis=0), records)
    if full < n:
        carry, record = function(carry, indices[full:])
        for name in record:
            if jax.tree.map(jnp.shape, record[name]) != jax.tree.map(jnp.shape, sums[name]):
                raise ValueError(
                    f"{name} has shapes that depend on the number of examples, which cannot be "
                    "averaged over batches. Average it over the examples?"
                )
        sums = jax.tree.map(lambda s, r: s + (n - full) * r, sums, record)
    return carry, jax.tree.map(lambda s: s / n, sums)
