"""Per-example and curvature quantities in other libraries, beside their own plain gradient.

  BackPACK      norms, second moment, variance, KFAC and the diagonal of the GGN, in PyTorch
  Opacus        the sum of clipped gradients, in PyTorch
  jax_privacy   the same in JAX
  vmap(grad)    the gradients of all examples, and what follows from them, in JAX

Each is written as its own users write it. `runs(params, inputs, labels)` takes the parameters of a
relu network (or, in PyTorch, of the network that `make_model` makes of them), inputs [N, ...] and
labels [N], and returns for each quantity a maker of two runs: the gradient with the quantity, and
the plain gradient of the mean loss in the same framework.

The noise of differential privacy is left out. BackPACK's quantities are of the terms of the mean
loss, E_n / N.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.bench.networks.perceptrons import plain_mean_loss
from experiments.bench.peers import torch_networks
from experiments.bench.peers.torch_runs import make_torch_data, pair_with_gradient
from experiments.bench.quantities import MAX_NORM
from experiments.common.measuring import compile_program


def backpack_runs(params, inputs, labels, make_model=torch_networks.perceptron):
    import torch
    from backpack import backpack, extend, extensions

    quantities = {
        "norms": extensions.BatchL2Grad(),
        "second moment": extensions.SumGradSquared(),
        "variance": extensions.Variance(),
        "KFAC (MC 1)": extensions.KFAC(mc_samples=1),
        "GGN diagonal (MC 1)": extensions.DiagGGNMC(mc_samples=1),
        "GGN diagonal (exact)": extensions.DiagGGNExact(),
    }
    x, t = make_torch_data(inputs, labels)

    def make_run(extension):
        model = extend(make_model(params))
        loss_function = extend(torch.nn.CrossEntropyLoss())

        def run():
            model.zero_grad()
            loss = loss_function(model(x), t)
            with backpack(extension):
                loss.backward()
            return [(p.grad, getattr(p, extension.savefield)) for p in model.parameters()]

        return run

    makers = {name: functools.partial(make_run, e) for name, e in quantities.items()}
    return pair_with_gradient(makers, make_model(params), x, t)


def opacus_runs(params, inputs, labels, make_model=torch_networks.perceptron):
    import torch
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    x, t = make_torch_data(inputs, labels)
    loss_function = torch.nn.CrossEntropyLoss()

    def wrap_optimizer(make, model):
        optimizer = torch.optim.SGD(model.parameters())
        options = {"max_grad_norm": MAX_NORM, "expected_batch_size": len(x)}
        return make(optimizer, noise_multiplier=0.0, **options)

    def make_hooks():
        model = GradSampleModule(make_model(params))
        optimizer = wrap_optimizer(DPOptimizer, model)

        def run():
            optimizer.zero_grad()
            loss_function(model(x), t).backward()
            optimizer.clip_and_accumulate()
            return [p.summed_grad for p in model.parameters()]

        return run

    def make_ghost():
        model = make_model(params)
        model = GradSampleModuleFastGradientClipping(model, max_grad_norm=MAX_NORM)
        optimizer = wrap_optimizer(DPOptimizerFastGradientClipping, model)
        clipped_loss = DPLossFastGradientClipping(model, optimizer, loss_function)

        def run():
            optimizer.zero_grad()
            clipped_loss(model(x), t).backward()  # two backward passes
            return [p.grad for p in model.parameters()]

        return run

    makers = {"clipped sum, hooks": make_hooks, "clipped sum, ghost": make_ghost}
    return pair_with_gradient(makers, make_model(params), x, t)


def jax_privacy_runs(params, inputs, labels):
    import jax_privacy

    mean_loss, data = plain_mean_loss(), (params, jnp.asarray(inputs), jnp.asarray(labels))

    def make_pair(**options):
        options |= {"l2_clip_norm": MAX_NORM, "batch_argnums": (1, 2), "return_values": True}
        clipped = jax_privacy.clipped_grad(mean_loss, **options)
        return compile_program(clipped, *data).run, compile_program(plain, *data).run

    plain = jax.value_and_grad(mean_loss)
    return {
        "clipped sum": make_pair,
        # Without the batched products of rank one, which are slow on a CPU.
        "clipped sum, one by one": functools.partial(make_pair, microbatch_size=1),
    }


def vmap_runs(params, inputs, labels):
    mean_loss, data = plain_mean_loss(), (params, jnp.asarray(inputs), jnp.asarray(labels))
    plain = jax.value_and_grad(mean_loss)

    def make_pair(summarize):
        function = from_all_gradients(summarize, mean_loss)
        return compile_program(function, *data).run, compile_program(plain, *data).run

    def clipped_sum(grads):
        weights = jnp.minimum(1, MAX_NORM / example_norms(grads))
        return (jax.tree.map(lambda g: jnp.einsum("n,n...->...", weights, g), grads),)

    quantities = {
        "norms": mean_and_norms,
        "clipped sum": clipped_sum,
        "second moment": lambda grads: (mean(grads), mean(jax.tree.map(jnp.square, grads))),
    }
    return {name: functools.partial(make_pair, how) for name, how in quantities.items()}


def from_all_gradients(summarize, mean_loss):
    """The mean loss, and `summarize(gradients)` of the gradients of all examples, [N, ...]."""
    gradient = jax.value_and_grad(mean_loss)

    def function(params, inputs, labels):
        ones = inputs[:, None], labels[:, None]  # batches of one
        values, grads = jax.vmap(gradient, in_axes=(None, 0, 0))(params, *ones)
        return jnp.mean(values), *summarize(grads)

    return function


def mean_and_norms(grads):
    return mean(grads), example_norms(grads)


def mean(grads):
    return jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)


def example_norms(grads):
    return jax.vmap(optax.tree.norm)(grads)


# Who makes the runs of each peer.
PEERS = {
    "BackPACK": backpack_runs,
    "Opacus": opacus_runs,
    "jax_privacy": jax_privacy_runs,
    "vmap(grad)": vmap_runs,
}
# The quantities for which the gradients of all examples are in memory at the same time.
FORM_ALL_GRADIENTS = {
    ("Opacus", "clipped sum, hooks"),
    ("jax_privacy", "clipped sum"),
    ("vmap(grad)", "norms"),
    ("vmap(grad)", "clipped sum"),
    ("vmap(grad)", "second moment"),
}
