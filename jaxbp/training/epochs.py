"""Epochs in parts: after each part a run can be stored, or stopped, and go on from there.

On arrays, a part is one compiled scan of steps: the whole epoch, or as many steps as lie between
two checkpoints. On batches that come one by one, each step is a part.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxbp.training.averages import over, plus, times
from jaxbp.training.batches import make_part
from jaxbp.training.data import Data, has_state
from jaxbp.training.nonfinite import is_finite, watched
from jaxbp.training.placing import batch_at, layout_of
from jaxbp.training.state import TrainState, shuffle
from jaxbp.training.step import make_step
from jaxbp.types import PyTree


class Progress(NamedTuple):
    """How far an epoch is.

    Attributes:
      steps: the number of steps done.
      examples: the number of examples they had.
      sums: the records of the steps, each times its number of examples, added; None at the start.
      iterator: the state of the iterator that gives the batches, if it has one.
    """

    steps: int = 0
    examples: int = 0
    sums: PyTree | None = None
    iterator: Any = None

    def after(self, steps: int, examples: int, sums: PyTree, iterator: Any = None) -> "Progress":
        """How far the epoch is after some more steps."""
        if self.sums is not None:
            sums = plus(self.sums, sums)
        return Progress(self.steps + steps, self.examples + examples, sums, iterator)

    def record(self) -> PyTree:
        """The mean of the records over the examples."""
        return over(self.sums, self.examples)


class Epochs(Protocol):
    """How the epochs of a run go over its training data."""

    def rest(self, state: TrainState, progress: Progress) -> Iterator[tuple[TrainState, Progress]]:
        """Runs the rest of an epoch; yields the state and the progress after each part."""
        ...

    def sums_like(self, state: TrainState) -> PyTree:
        """The shapes and dtypes of `Progress.sums`."""
        ...


class OnArrays:
    """Epochs over a data set, in shuffled batches; a part has `steps` steps, or all if None."""

    def __init__(self, make: Callable[..., Any], train: Data, batch_size: int, steps: int | None):
        """`make(maker, **options)` calls a maker with the network, the loss and the rest."""
        self._train, self._make = train, make
        self._n = jax.tree.leaves(train)[0].shape[0]
        self._batch_size = batch_size
        self._size = None if steps is None else steps * batch_size
        self._part = make(make_part, batch_size=batch_size)

    def rest(self, state: TrainState, progress: Progress) -> Iterator[tuple[TrainState, Progress]]:
        """Runs the rest of an epoch; yields the state and the progress after each part."""
        if self._size is None:  # the compiled part draws the order itself, which is faster
            yield self._run(state, None, progress)
            return
        order = shuffle(state._replace(step=state.step - progress.steps), self._n)
        while progress.examples < self._n:
            own = order[progress.examples : progress.examples + self._size]
            state, progress = self._run(state, own, progress)
            yield state, progress

    def _run(self, start, indices, progress):
        """The state and the progress after the examples at these indices; None stands for all."""
        n = self._n if indices is None else len(indices)
        state, sums = self._part(start, *self._train, indices)
        if is_finite((sums["loss"], state.params, state.rule_state)):
            return state, progress.after(-(-n // self._batch_size), n, sums)
        # Compiled separately, the steps may round differently and all stay finite. Then their
        # result is good, and training continues from it.
        indices = shuffle(start, n) if indices is None else indices
        *_, last = self._step_by_step(start, indices, progress)
        return last

    def _step_by_step(self, state, indices, progress):
        starts = range(0, len(indices), self._batch_size)
        layout = layout_of(state, self._train)
        batches = (batch_at(self._train, indices[i : i + self._batch_size], layout) for i in starts)
        step = self._make(make_step, donate=False)
        for after, sums, n in watched(step, state, batches, progress.steps + 1):
            progress = progress.after(1, n, sums)
            yield after, progress

    def sums_like(self, state: TrainState) -> PyTree:
        """The shapes and dtypes of `Progress.sums`."""
        own = None if self._size is None else jnp.arange(min(self._size, self._n))
        return self._part.eval_shape(state, *self._train, own)[1]


class OnBatches:
    """Epochs over an iterable of batches; each step is a part.

    `check(i, batch)` returns batch i of an epoch as arrays, or refuses it.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        batches: Iterable[Data],
        check: Callable[[int, Any], Data],
        first: Data,
    ):
        """`make(maker, **options)` calls a maker with the network, the loss and the rest."""
        self._step = make(make_step, donate=False)
        self._batches, self._check, self._first = batches, check, first

    def rest(self, state: TrainState, progress: Progress) -> Iterator[tuple[TrainState, Progress]]:
        """Runs the rest of an epoch; yields the state and the progress after each part."""
        iterator: Any = iter(self._batches)
        if progress.iterator is not None:
            iterator.set_state(progress.iterator)
        elif progress.steps:
            iterator = itertools.islice(iterator, progress.steps, None)

        def checked():
            for i, batch in enumerate(iterator, progress.steps + 1):
                yield self._check(i, batch)

        before = progress.steps
        for after, sums, n in watched(self._step, state, checked(), before + 1):
            position = iterator.get_state() if has_state(iterator) else None
            progress = progress.after(1, n, sums, position)
            yield after, progress
        if progress.steps == 0:
            raise ValueError(
                "fit: train has no more batches. It has to give all of its batches in each epoch."
            )

    def sums_like(self, state: TrainState) -> PyTree:
        """The shapes and dtypes of `Progress.sums`."""
        _, record = self._step.eval_shape(state, *self._first)
        return jax.eval_shape(times, record, 1)
