"""The calls, each as a function of parameters and a batch.

Each entry of `CALLS` makes a function `call(params, inputs, targets) -> tree of arrays` for a
network and a loss, or returns None where the call does not apply to the network.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp
from experiments.modes.networks import Subject
from jaxbp.sharding import varying_with

KEY = 3  # of the layers that draw


def _sweep(read, **options):
    """A call of `backprop` with this reading, or these readings."""

    def make(subject: Subject):
        sweep = bp.backprop(subject.net, subject.loss, read=read, **options)

        def call(params, inputs, targets):
            keys = {"error_key": jax.random.key(4)} if "error" in options else {}
            return sweep(params, inputs, targets, key=jax.random.key(KEY), **keys)

        return call

    return make


def _simple(maker, **options):
    """A call of `maker(net, loss, ...)`, which returns a function of the batch."""

    def make(subject: Subject):
        function = maker(subject.net, subject.loss, **options)
        return lambda *batch: function(*batch, key=jax.random.key(KEY))

    return make


def _by_rule(rule):
    """A gradient by another rule, with the state that it has at the start."""

    def make(subject: Subject):
        shape = subject.inputs.shape[1:]
        state = rule.make(jax.random.key(5), subject.net, shape)
        sweep = bp.value_and_grad(subject.net, subject.loss, rule=rule)

        def call(params, inputs, targets):
            keys = {"key": jax.random.key(KEY), "rule_key": jax.random.key(6)}
            return sweep(params, inputs, targets, rule_state=state, **keys)

        return call

    return make


def _signals(function):
    """A function of the signals and the mean gradient."""

    def make(subject: Subject):
        sweep = bp.backprop(subject.net, subject.loss, read={"grads": bp.mean, "all": bp.keep})

        def call(params, inputs, targets):
            _, answers = sweep(params, inputs, targets)
            return function(answers["all"], answers["grads"])

        return call

    return make


def _product(maker):
    """A curvature-vector product, with the parameters as the vector."""

    def make(subject: Subject):
        product = maker(subject.net, subject.loss)
        return lambda params, inputs, targets: product(params, inputs, targets, params)

    return make


def _kernel(subject: Subject):
    kernel = bp.neural_tangent_kernel(subject.net)
    return lambda params, inputs, targets: kernel(params, inputs)


def _as_function(subject: Subject):
    call, make_slots = bp.as_function(subject.net, read=bp.sq_norms)

    def value(params, slots, inputs, targets):
        return jnp.mean(subject.loss(call(params, inputs, slots), targets)[0])

    def both(params, inputs, targets):
        params = varying_with(inputs, params)  # for the gradient on a device's share alone
        slots = make_slots(params, inputs)
        return jax.grad(value, argnums=(0, 1))(params, slots, inputs, targets)

    return both


def _alignment(subject: Subject):
    rule = bp.sign_symmetric()
    measure = bp.alignment(subject.net, subject.loss, rule=rule)
    state = rule.make(jax.random.key(5), subject.net, subject.inputs.shape[1:])
    return functools.partial(measure, rule_state=state)


def _steps(optimizer, make_arguments=lambda subject: None, **options):
    """Two training steps on the same batch: their parameters and their records."""

    def make(subject: Subject):
        how = {"extra_args": make_arguments(subject), "donate": False, **options}
        step = bp.make_step(subject.net, subject.loss, optimizer, **how)

        def call(params, inputs, targets):
            start = bp.TrainState(
                params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(KEY)
            )
            state, first = step(start, inputs, targets)
            state, second = step(state, inputs, targets)
            return state.params, first, second

        return call

    return make


def _kfac(subject: Subject):
    factors = bp.kfac_factors(subject.net, subject.loss)
    batch = subject.params, subject.inputs, subject.targets
    like = jax.eval_shape(functools.partial(factors, key=jax.random.key(0)), *batch)
    optimizer = optax.chain(bp.scale_by_kfac(like, every=1), optax.scale(-0.1))
    return _steps(optimizer, lambda subject: {"factors": factors})(subject)


CALLS: dict[str, Callable[[Subject], Callable]] = {
    "value_and_grad": _simple(bp.value_and_grad),
    "backprop, mean": _sweep(bp.mean),
    "backprop, total": _sweep(bp.total),
    "backprop, per_example": _sweep(bp.per_example),
    "backprop, sq_norms": _sweep(bp.sq_norms),
    "backprop, second_moment": _sweep(bp.second_moment),
    "backprop, variance": _sweep(bp.variance),
    "backprop, kronecker": _sweep(bp.kronecker),
    "backprop, several readings": _sweep({"grads": bp.mean, "norms": bp.sq_norms}),
    "diagonal of the GGN": _sweep(bp.diagonal, error=bp.ggn_columns),
    "diagonal of each example": _sweep(bp.per_example_diagonal, error=bp.ggn_columns),
    "factors of the Fisher": _sweep(bp.kronecker, error=functools.partial(bp.sampled, draws=2)),
    "norms of Jacobian rows": _sweep(bp.sq_norms, error=bp.jacobian_rows),
    "reweighted": _simple(bp.reweighted, weigh=bp.clip_weights(0.1)),
    "reweighted, two sweeps": _simple(bp.reweighted, weigh=bp.clip_weights(0.1), sweeps=2),
    "reweighted, per layer": _simple(bp.reweighted, weigh=bp.clip_weights(0.1), per_layer=True),
    "private_gradient": _simple(
        bp.private_gradient, max_norm=0.1, noise_multiplier=1.0, batch_size=16
    ),
    "gradient_noise": _signals(bp.gradient_noise),
    "directional_derivatives": _signals(bp.directional_derivatives),
    "gram": _signals(lambda signals, grads: bp.gram(signals)),
    "neural_tangent_kernel": _kernel,
    "hessian_vector_product": _product(bp.hessian_vector_product),
    "gauss_newton_vector_product": _product(bp.gauss_newton_vector_product),
    "random_feedback": _by_rule(bp.random_feedback()),
    "sign_symmetric": _by_rule(bp.sign_symmetric("batchwise")),
    "weight_mirror": _by_rule(bp.weight_mirror()),
    "alignment": _alignment,
    "as_function under jax.grad": _as_function,
    # Some gradients are zero but for rounding, such as those of the biases of attention keys. Adam
    # would make steps of full size of them, were it not for eps.
    "make_step, Adam": _steps(optax.adam(0.1, eps=1e-3)),
    "make_step, fused": _steps(optax.adam(0.1, eps=1e-3), fused=True),
    "make_step, fused with a clip": _steps(optax.sgd(0.1, 0.9), fused=True, max_norm=0.1),
    "make_step, KFAC": _kfac,
}
