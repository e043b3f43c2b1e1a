"""The networks in Equinox, as its own users write them: functions of one example."""

import jax


def perceptron(case, seed):
    """A network of equal hidden layers: its function of parameters and one example, and these."""
    import equinox

    inputs, width, *others, outputs = case.sizes
    if set(others) - {width}:
        raise ValueError(f"the hidden layers of {case} differ; equinox.nn.MLP has equal ones")
    model = equinox.nn.MLP(
        inputs,
        outputs,
        width,
        depth=1 + len(others),
        activation=getattr(jax.nn, case.activation),
        key=jax.random.key(seed),
    )
    params, rest = equinox.partition(model, equinox.is_inexact_array)

    def apply(params, x):
        return equinox.combine(params, rest)(x)

    return apply, params
