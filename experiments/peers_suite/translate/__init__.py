"""PyTorch's modules written with the library: one function for each, in tables by family."""

from experiments.peers_suite.cases import Case
from experiments.peers_suite.translate import (
    attention,
    convolution,
    elementwise,
    linear,
    losses,
    normalisation,
    padding,
    pooling,
    recurrence,
    transformers,
)
from experiments.peers_suite.written import CannotBeWrittenError, Written

FAMILIES = (
    linear,
    elementwise,
    convolution,
    padding,
    pooling,
    normalisation,
    recurrence,
    attention,
    transformers,
    losses,
)
TRANSLATIONS = {cls: write for family in FAMILIES for cls, write in family.TRANSLATIONS.items()}


def translate(case: Case) -> Written:
    """Writes the case with the library; raises `CannotBeWrittenError` with the reason if it cannot.

    A translation sees the module and the inputs of its forward pass. Of their numbers it uses those
    of masks, targets and indices alone.
    """
    write = TRANSLATIONS.get(type(case.module))
    if write is None:
        raise CannotBeWrittenError("it has no translation")
    return write(case.module, *case.args, **case.kwargs)
