"""Models of Flax and Equinox with a batch for each, and the same lifted into the library."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import jaxbp as bp
from experiments.bench.networks import convnets, gpts, perceptrons, recurrent
from experiments.bench.networks.convnets import Convnet, Resnet
from experiments.bench.networks.gpts import Gpt
from experiments.bench.networks.perceptrons import Perceptron
from experiments.bench.networks.recurrent import Sequence
from experiments.bench.networks.sides import mean_cross_entropy
from experiments.bench.peers import equinox_networks, flax_networks


class Foreign(NamedTuple):
    """A network in another framework."""

    framework: Literal["Flax", "Equinox"]
    network: Any

    def __str__(self):
        return f"{self.framework}, {NAMES[type(self.network)]}{self.network}"


class Model(NamedTuple):
    """A model and its batch.

    Attributes:
      apply: `apply(params, inputs) -> outputs`, of a batch, or of one example as Equinox has it.
      params: its parameters, as its framework has them.
      inputs: of the batch.
      labels: of the batch.
      own_params: the same parameters as the library's layers have them, where it has the network.
      per_example: whether `apply` takes one example.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: jax.Array
    labels: jax.Array
    own_params: Any = None
    per_example: bool = False

    def mean_loss(self, params, inputs, labels):
        """As one writes it in the framework."""
        apply = jax.vmap(self.apply, (None, 0)) if self.per_example else self.apply
        return mean_cross_entropy(apply(params, inputs), labels)


class Lifted(NamedTuple):
    """A model in the library, its data, and the mean loss for autodiff of the same parameters.

    Attributes:
      net: a Layer.
      data: its parameters, and the batch.
      mean_loss: `mean_loss(params, inputs, labels)`, of the model itself.
    """

    net: bp.Layer
    data: tuple[Any, jax.Array, jax.Array]
    mean_loss: Callable[..., Any]


def make_model(case, seed):
    """The model, with the library's weights where it has the same network."""
    return MAKERS[case.framework, type(case.network)](case.network, seed)


def lift(model):
    """The model as a Layer."""
    net, params = bp.lift(model.apply, model.params, model.inputs, per_example=model.per_example)

    def mean_loss(params, inputs, labels):
        return model.mean_loss(bp.unstacked(params), inputs, labels)

    return Lifted(net, (params, model.inputs, model.labels), mean_loss)


def make_flax(make_network, make_state, chapter, network, seed):
    params, *batch = chapter.make_case(network, seed)
    apply = flax_networks.make_apply(functools.partial(make_network, network))
    return Model(apply, make_state(network, params), *batch, own_params=params)


def make_flax_resnet(network, seed):
    apply = flax_networks.make_apply(functools.partial(flax_networks.resnet, network))
    batch = map(jnp.asarray, convnets.make_images(network, seed))
    return Model(apply, flax_networks.resnet_state(network, seed), *batch)


def make_equinox_perceptron(network, seed):
    apply, params = equinox_networks.perceptron(network, seed)
    batch = map(jnp.asarray, perceptrons.make_data(network.sizes, network.n, seed))
    return Model(apply, params, *batch, per_example=True)


NAMES = {Gpt: "GPT ", Convnet: "convnet ", Resnet: "ResNet ", Sequence: "", Perceptron: "MLP "}
MAKERS = {
    ("Flax", Gpt): functools.partial(make_flax, flax_networks.gpt, flax_networks.gpt_state, gpts),
    ("Flax", Convnet): functools.partial(
        make_flax, flax_networks.convnet, flax_networks.convnet_state, convnets
    ),
    ("Flax", Sequence): functools.partial(
        make_flax, flax_networks.recurrent_net, flax_networks.recurrent_state, recurrent
    ),
    ("Flax", Perceptron): functools.partial(
        make_flax, flax_networks.perceptron, flax_networks.perceptron_state, perceptrons
    ),
    ("Flax", Resnet): make_flax_resnet,
    ("Equinox", Perceptron): make_equinox_perceptron,
}
