"""Linear and bilinear maps, and lookups in a table."""

import jax.numpy as jnp
from torch import nn

import jaxbp as bp
from experiments.peers_suite.written import Written, examples, to_array


def dense_params(params):
    """Those of `bp.dense`: PyTorch's weight is [O, I]."""
    return params | {"weight": params["weight"].T}


def linear(module, input):
    layout = examples(input, 1)
    layer = bp.dense(module.out_features, use_bias=module.bias is not None)
    return Written(layer, layout.into, layout.back, dense_params)


def bilinear(module, first, second):
    """PyTorch's weight is [O, I, J]."""
    layout = examples(first, 1)
    layer = bp.bilinear(module.out_features, use_bias=module.bias is not None)

    def inputs(*pair):
        return tuple(map(layout.into, pair))

    def params(params):
        return params | {"weight": jnp.moveaxis(params["weight"], 0, -1)}

    return Written(layer, inputs, layout.back, params)


def embedding(module, tokens):
    layer = bp.embedding(module.num_embeddings, module.embedding_dim)
    return Written(layer, lambda: to_array(tokens), lambda y: y, lambda params: params)


TRANSLATIONS = {nn.Linear: linear, nn.Bilinear: bilinear, nn.Embedding: embedding}
