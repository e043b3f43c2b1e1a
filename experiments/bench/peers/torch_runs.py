"""PyTorch: its device, its threads, its memory, and its gradients and training loops.

`torch_device` alone knows where PyTorch runs: on the GPU if JAX does, else on the CPU. There, a run
has one thread or as many as there are cores, whichever is faster.
"""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.bench.loops import OPTIMIZERS
from experiments.bench.machine import on_gpu
from experiments.common.measuring import Program, cores, measure


class TorchDevice(NamedTuple):
    """Where PyTorch runs.

    Attributes:
      name: by which PyTorch calls it.
      threads: the numbers of threads to choose from.
      synchronize: waits until everything that was started there is done.
      peak_bytes: of a run, the largest number of bytes allocated at a time, beyond those allocated
        before it.
    """

    name: str
    threads: tuple[int, ...]
    synchronize: Callable
    peak_bytes: Callable


def torch_device():
    import torch

    if not on_gpu():
        return TorchDevice("cpu", tuple(sorted({1, cores()})), lambda: None, peak_bytes_on_cpu)
    if not torch.cuda.is_available():
        raise RuntimeError("JAX runs on a GPU, which this PyTorch cannot use")
    torch.set_float32_matmul_precision("high")  # TF32, which is JAX's default
    return TorchDevice("cuda", (cores(),), torch.cuda.synchronize, peak_bytes_on_gpu)


def peak_bytes_on_cpu(run):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in allocations))


def peak_bytes_on_gpu(run):
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def to_device(tensor_or_model):
    return tensor_or_model.to(torch_device().name)


def to_tensor(array):
    """A copy of the array, on the device."""
    import torch

    return to_device(torch.tensor(np.asarray(array)))


def make_torch_data(inputs, labels):
    return to_tensor(inputs), to_tensor(labels).long()


def torch_gradient(model, mean_loss, x, t):
    """The program of a model's mean loss and gradient."""

    def run():
        model.zero_grad()
        loss = mean_loss(model(x), t)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    (run,) = at_their_fastest(run)
    model.zero_grad()
    return Program(run, (), None, torch_device().peak_bytes(run), None)


def train_torch(training, start, mean_loss, inputs, labels, seed):
    """A run of all epochs from the model `start` that returns the mean loss of the last."""
    import torch

    _, options = OPTIMIZERS[training.optimizer]
    make_optimizer = getattr(torch.optim, training.optimizer)
    x, t = make_torch_data(inputs, labels)

    def run():
        torch.manual_seed(seed)
        model = copy.deepcopy(start)
        optimizer = make_optimizer(model.parameters(), **options)
        for _ in range(training.epochs):
            total = torch.zeros((), device=x.device)
            for indices in torch.randperm(len(x), device=x.device).split(training.network.n):
                optimizer.zero_grad(set_to_none=True)
                loss = mean_loss(model(x[indices]), t[indices])
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(indices)
        return float(total) / len(x)

    (run,) = at_their_fastest(run)
    return run


def pair_with_gradient(makers, model, x, t):
    """For each maker of a run, a maker of the pair of it and the plain gradient of the model."""
    import torch

    loss_function = torch.nn.CrossEntropyLoss()

    def plain():
        model.zero_grad()
        loss_function(model(x), t).backward()
        return [p.grad for p in model.parameters()]

    return {
        name: lambda make=make: at_their_fastest(make(), plain) for name, make in makers.items()
    }


def at_their_fastest(*runs):
    """The runs with the number of threads that suits them best, each until it is done."""
    import torch

    device = torch_device()

    def run_with(threads, run):
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            # The hooks of the peers are on the first layer too, whose inputs have no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            answer = run()
        device.synchronize()
        return answer

    choices = [
        tuple(functools.partial(run_with, threads, run) for run in runs)
        for threads in device.threads
    ]
    seconds = np.median(measure([run for choice in choices for run in choice], 3), axis=1)
    return choices[int(np.argmin(seconds.reshape(len(choices), -1).sum(axis=1)))]
