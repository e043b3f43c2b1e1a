"""What per-example and curvature quantities cost in other libraries, on top of a plain gradient.

  BackPACK      norms, second moment, variance, KFAC and the diagonal of the GGN, in PyTorch
  Opacus        the sum of clipped gradients, in PyTorch
  jax_privacy   the same in JAX
  vmap(grad)    the gradients of all examples, and what follows from them, in JAX

Each is written as its own users write it. From the parameters of a relu network by `make_net`, or
of one by another `make_model`, the inputs [N, ...] and the labels [N], it has for every quantity a
maker of a pair of runs: the gradient
with the quantity, and the gradient of the mean loss as one writes it without that library.
Privacy's noise is left out. BackPACK's quantities are of the terms of the mean loss, E_n / N, and
stay so.

A pair of PyTorch's has one thread or as many as there are cores, whichever is faster for the two.
"""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.trainers import mean_cross_entropy, plain_mean_loss
from experiments.common.measuring import Program, compile_program, cores, measure

MAX_NORM = 1.0  # to which the gradient of an example is clipped


def make_torch_data(inputs, labels):
    import torch

    return torch.tensor(np.asarray(inputs)), torch.tensor(np.asarray(labels)).long()


def make_torch_model(params):
    """The network in PyTorch, whose weights are [O, I]."""
    import torch

    layers = []
    for dense in params[::2]:
        layer = torch.nn.Linear(*dense["weight"].shape)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.asarray(dense["weight"].T)))
            layer.bias.copy_(torch.tensor(np.asarray(dense["bias"])))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def backpack_runs(params, inputs, labels, make_model=make_torch_model):
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
    return pair_torch_runs(makers, make_model(params), x, t)


def opacus_runs(params, inputs, labels, make_model=make_torch_model):
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
    return pair_torch_runs(makers, make_model(params), x, t)


def jax_privacy_runs(params, inputs, labels):
    import jax_privacy

    mean_loss = plain_mean_loss()

    def make_pair(**options):
        options |= {"l2_clip_norm": MAX_NORM, "batch_argnums": (1, 2), "return_values": True}
        clipped = jax_privacy.clipped_grad(mean_loss, **options)
        return compile_program(clipped, *data).run, compile_program(plain, *data).run

    data, plain = (params, jnp.asarray(inputs), jnp.asarray(labels)), jax.value_and_grad(mean_loss)
    return {
        "clipped sum": make_pair,
        # The batched products of rank one, which are slow on a CPU, are not there.
        "clipped sum, one by one": functools.partial(make_pair, microbatch_size=1),
    }


def vmap_runs(params, inputs, labels):
    data = params, jnp.asarray(inputs), jnp.asarray(labels)
    plain = jax.value_and_grad(plain_mean_loss())

    def make_pair(summarize):
        function = from_all_gradients(summarize, plain_mean_loss())
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
    """The mean loss, and what a function makes of the gradients of all examples, [N, ...]."""
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


def pair_torch_runs(makers, model, x, t):
    """Makers of pairs: of each run with that of the plain gradient of the model."""
    import torch

    loss_function = torch.nn.CrossEntropyLoss()

    def plain():
        model.zero_grad()
        loss_function(model(x), t).backward()
        return [p.grad for p in model.parameters()]

    return {
        name: lambda make=make: at_their_fastest(make(), plain) for name, make in makers.items()
    }


def flax_mean_loss_of(make_model):
    """The mean loss of a network in Flax, as a function of its state, inputs and labels."""
    from flax import nnx

    graph = nnx.graphdef(nnx.eval_shape(make_model))

    def mean_loss(state, inputs, labels):
        return mean_cross_entropy(nnx.merge(graph, state)(inputs), labels)

    return mean_loss


def flax_state_of(make_model, weights):
    """The state of a network in Flax that has these weights, by name."""
    from flax import nnx

    state = nnx.state(nnx.eval_shape(make_model), nnx.Param)
    nnx.replace_by_pure_dict(state, weights)
    return state


def torch_gradient(model, mean_loss, x, t):
    """The program of a model's mean loss and gradient."""

    def run():
        model.zero_grad()
        loss = mean_loss(model(x), t)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    (run,) = at_their_fastest(run)
    model.zero_grad()
    return Program(run, (), None, torch_peak_bytes(run), None)


def torch_peak_bytes(run):
    """The most that PyTorch had allocated at a time in a run, beyond what there was before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in allocations))


def at_their_fastest(*runs):
    """The runs with one thread or as many as there are cores, and without PyTorch's warning."""
    import torch

    def run_with(threads, run):
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            # The hooks of the peers are on the first layer too, whose inputs have no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            return run()

    choices = [
        tuple(functools.partial(run_with, threads, run) for run in runs)
        for threads in sorted({1, cores()})
    ]
    seconds = np.median(measure([run for choice in choices for run in choice], 3), axis=1)
    return choices[int(np.argmin(seconds.reshape(len(choices), -1).sum(axis=1)))]


# Who makes the runs of a peer.
PEERS = {
    "BackPACK": backpack_runs,
    "Opacus": opacus_runs,
    "jax_privacy": jax_privacy_runs,
    "vmap(grad)": vmap_runs,
}
# Which of them hold the gradients of all examples at a time.
FORM_ALL_GRADIENTS = {
    ("Opacus", "clipped sum, hooks"),
    ("jax_privacy", "clipped sum"),
    ("vmap(grad)", "norms"),
    ("vmap(grad)", "clipped sum"),
    ("vmap(grad)", "second moment"),
}
