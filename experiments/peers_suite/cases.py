"""The cases of PyTorch's own tests of its modules, from `torch.testing._internal.common_modules`.

A case is a module by its constructor's arguments, and the inputs of its forward pass. Modules are
in evaluation mode and in float64. Their parameters and running statistics are drawn: a gain of 1 or
a bias of 0 would hide mistakes.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.testing._internal.common_modules import module_db


class Case(NamedTuple):
    """One case.

    Attributes:
      name: the module's name, such as `Conv2d`.
      number: the place of the case among those of its module, from 0.
      note: PyTorch's description of the case, often empty.
      module: the module.
      args: the inputs of its forward pass by position, a tuple of trees of tensors.
      kwargs: those by name.
    """

    name: str
    number: int
    note: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        """How messages name the case, such as `Conv2d 3 (no_batch_dim)`."""
        return f"{self.name} {self.number}{f' ({self.note})' if self.note else ''}"


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """PyTorch warns about some of its own cases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def names() -> list[str]:
    """The names of all modules, in PyTorch's order. A lazy module has its eager form's name."""
    return list(dict.fromkeys(_name(info.module_cls) for info in module_db))


def load(name: str, seed: int = 0) -> list[Case]:
    """The cases of the modules of this name, drawn from the seed."""
    torch.manual_seed(seed)
    with without_warnings():
        drawn = [
            (info.module_cls, each)
            for info in module_db
            if _name(info.module_cls) == name
            for each in info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=False
            )
        ]
        return [_case(name, number, make, each) for number, (make, each) in enumerate(drawn)]


def tensors(case: Case) -> list[torch.Tensor]:
    """The inputs of a case that have a derivative, in order."""
    leaves = jax.tree.leaves((case.args, case.kwargs))
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


def _case(name, number, make, drawn) -> Case:
    made, given = drawn.constructor_input, drawn.forward_input
    # A tensor that was computed from another one, or is given twice, becomes an input of its own.
    args, kwargs = jax.tree.map(_own, (given.args, given.kwargs))
    module = make(*made.args, **made.kwargs).to(torch.float64).eval()
    _let_targets_be_data(module, args, kwargs)
    with torch.no_grad():
        if issubclass(make, LazyModuleMixin):
            module(*args, **kwargs)  # from now on it has its parameters
        for parameter in module.parameters():
            parameter.normal_()
        for buffer_name, buffer in module.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_()
            elif buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return Case(name, number, drawn.desc, module, args, kwargs)


def _let_targets_be_data(module, args, kwargs):
    """Targets of a loss have no derivative."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    for name, x in given.items():
        if name in ("target", "targets"):
            x.requires_grad_(False)


def _name(module_class):
    return module_class.__name__.removeprefix("Lazy")


def _own(x):
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad)
