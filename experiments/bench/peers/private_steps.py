"""Private gradients: each example's gradient clipped, their sum with Gaussian noise, over N.

Each function returns the program of one library, as its own users write it.
"""

import functools

import jax

import jaxbp as bp
from experiments.bench.networks.convnets import Convnet
from experiments.bench.networks.sides import LOSS
from experiments.bench.peers import torch_networks
from experiments.bench.peers.torch_runs import at_their_fastest, make_torch_data, torch_device
from experiments.bench.quantities import MAX_NORM
from experiments.common.measuring import Program, compile_program

NOISE_MULTIPLIER = 1.1


def ours(net, data, sweeps):
    """The library's, of a network that may be lifted."""
    _, inputs, _ = data
    private = bp.private_gradient(
        net,
        LOSS,
        max_norm=MAX_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        batch_size=len(inputs),
        sweeps=sweeps,
    )

    def function(params, inputs, labels, key):
        return private(params, inputs, labels, key=key).grads

    return compile_program(function, *data, jax.random.key(0))


def jax_privacy(mean_loss, data, **options):
    """jax_privacy's, of the mean loss of the same parameters."""
    import jax_privacy

    _, inputs, _ = data
    n = len(inputs)
    clipped = jax_privacy.clipped_grad(
        mean_loss, l2_clip_norm=MAX_NORM, normalize_by=n, batch_argnums=(1, 2), **options
    )
    deviation = NOISE_MULTIPLIER * clipped.sensitivity()

    def function(params, inputs, labels, key):
        noise = jax_privacy.noise_addition.gaussian_privatizer(stddev=deviation, prng_key=key)
        grads, _ = noise.update(clipped(params, inputs, labels), noise.init(params))
        return grads

    return compile_program(function, *data, jax.random.key(0))


def opacus(network, params, images, labels):
    """Opacus's by ghost clipping, of the same convolutional network in PyTorch."""
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    x, t = make_torch_data(torch_networks.channels_first(images), labels)
    model = torch_networks.convnet(network, params)
    model = GradSampleModuleFastGradientClipping(model, max_grad_norm=MAX_NORM)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters()),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_NORM,
        expected_batch_size=len(x),
    )
    mean_loss = DPLossFastGradientClipping(model, optimizer, torch.nn.CrossEntropyLoss())

    def step():
        optimizer.zero_grad()
        mean_loss(model(x), t).backward()  # two backward passes
        optimizer.pre_step()
        return [p.grad for p in model.parameters()]

    (run,) = at_their_fastest(step)
    optimizer.zero_grad(set_to_none=True)
    return Program(run, (), None, torch_device().peak_bytes(run), None)


def find_peers(case, model, lifted):
    """A maker of each peer's program: those in PyTorch where it has the same network."""
    peers = {
        "jax_privacy": functools.partial(jax_privacy, lifted.mean_loss, lifted.data),
        "jax_privacy, one by one": functools.partial(
            jax_privacy, lifted.mean_loss, lifted.data, microbatch_size=1
        ),
    }
    if isinstance(case.network, Convnet):
        data = model.own_params, model.inputs, model.labels
        peers["Opacus, ghost"] = functools.partial(opacus, case.network, *data)
    return peers
