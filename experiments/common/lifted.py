"""The network of `digits` in Flax, lifted: a Layer like the one that the library's layers form."""

from typing import Any

import jax
import numpy as np

import jaxbp as bp
from experiments import digits
from experiments.common.data import Dataset


def make_network(model: str, config: digits.Config, dataset: Dataset) -> bp.Layer:
    """Makes the classifier of `digits` with dense layers, from the library's layers or in Flax.

    Both have the same architecture and draw their weights from the same distributions, but not the
    same weights.

    Args:
      model: `jaxbp` for the library's layers; `flax` for `flax.linen`, lifted by `bp.lift`.
      config: hidden units, activation and dropout.
      dataset: the data, for the shape of the inputs and the number of classes.

    Raises:
      ValueError: `model` is `flax` and Flax is not installed, or a setting is out of range.
    """
    classes = len(dataset.class_names)
    _, net = digits.make_network(config, classes)  # refuses wrong settings for either model
    return net if model == "jaxbp" else _lift_flax(config, dataset.train[0][:2], classes)


def _lift_flax(config: digits.Config, inputs: np.ndarray, classes: int) -> bp.Layer:
    try:
        from flax import linen
    except ModuleNotFoundError as error:
        raise ValueError(
            "model is 'flax', and the package flax is not installed: pip install flax."
        ) from error

    class Mlp(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
            for units in config.hidden:
                x = getattr(jax.nn, config.activation)(linen.Dense(units)(x))
                x = linen.Dropout(config.dropout, deterministic=not train)(x)
            return linen.Dense(classes)(x)

    mlp = Mlp()

    def init(key: jax.Array) -> Any:
        return mlp.init(key, inputs, train=False)["params"]

    def apply(params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        rngs = None if key is None else {"dropout": key}
        return mlp.apply({"params": params}, x, train=key is not None, rngs=rngs)

    params = init(jax.random.key(config.seed))
    net, _ = bp.lift(apply, params, inputs, init=init, draws=config.dropout > 0, name="flax")
    return net
