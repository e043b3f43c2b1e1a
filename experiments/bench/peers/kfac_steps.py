"""Steps of KFAC, by the library and by kfac-jax, on the same model from the same parameters.

Both draw one label from the model for each example, average the factors over steps, and invert them
in every `EVERY`-th step. A run is `EVERY` steps, and so has one inversion. The library can also
compute the factors only in the steps that invert them.
"""

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp
from experiments.bench.networks.sides import LOSS, mean_cross_entropy

EVERY, DAMPING, DECAY = 10, 1e-2, 0.95
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
SGD = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def make_run(net, data, optimizer=SGD, **options):
    """A run of the library's steps that returns the last loss."""
    params, *batch = data
    # A step donates its state, in which an array must occur only once.
    params, opt_state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
    state = bp.TrainState(params, opt_state, jnp.zeros((), jnp.int32), jax.random.key(0))
    step = bp.make_step(net, LOSS, optimizer, **options)

    def run():
        nonlocal state
        for _ in range(EVERY):
            state, record = step(state, *batch)
        return jax.block_until_ready((state, record))[1]["loss"]

    return run


def ours(net, data, *, factors_every=1):
    """A run of the library's steps, with the factors of every so many batches."""
    _, *batch = data
    factors_of = bp.kfac_factors(net, LOSS)

    def like(params):
        return factors_of(params, *batch, key=jax.random.key(0))

    kfac = bp.scale_by_kfac(
        like, damping=DAMPING, decay=DECAY, every=EVERY, factors_every=factors_every
    )
    extra_args = {"factors": bp.deferred(factors_of)}
    return make_run(net, data, optax.chain(kfac, SGD), extra_args=extra_args)


def plain(net, data, optimizer=SGD):
    """The same steps without curvature, by default by SGD with momentum."""
    return make_run(net, data, optimizer)


def kfac_jax(model):
    """A run of kfac-jax's steps of a model that takes a batch; returns the last loss."""
    import kfac_jax

    batch = model.inputs, model.labels

    def mean_loss(params, batch):
        inputs, labels = batch
        logits = model.apply(params, inputs)
        kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
        return mean_cross_entropy(logits, labels)

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(mean_loss),
        l2_reg=0.0,
        curvature_ema=DECAY,
        inverse_update_period=EVERY,
        num_burnin_steps=0,
    )
    key, params = jax.random.key(0), jax.tree.map(jnp.copy, model.params)
    state = optimizer.init(params, key, batch)
    settings = {
        "learning_rate": jnp.asarray(LEARNING_RATE),
        "momentum": jnp.asarray(MOMENTUM),
        "damping": jnp.asarray(DAMPING),
    }
    step = 0

    def run():
        nonlocal params, state, key, step
        for _ in range(EVERY):
            key, own = jax.random.split(key)
            params, state, record = optimizer.step(
                params, state, own, batch=batch, global_step_int=step, **settings
            )
            step += 1
        return jax.block_until_ready((params, state, record))[2]["loss"]

    return run
