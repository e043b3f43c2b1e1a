"""A run of `fit` and its goal: how far it is, its best epoch so far, and when it stops."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbp.training.batches import evaluate
from jaxbp.training.epochs import Progress
from jaxbp.training.processes import fetched
from jaxbp.training.state import TrainState
from jaxbp.types import Params


class Best(NamedTuple):
    """The epoch with the best measure so far."""

    epoch: int
    value: float
    params: Params


class Run(NamedTuple):
    """Everything that decides the future of a run.

    Attributes:
      state: the last state.
      best: the best epoch so far.
      records: the records of the epochs that are done.
      progress: how far the current epoch is.
    """

    state: TrainState
    best: Best
    records: list[dict[str, Any]] = []  # noqa: RUF012 -- never changed, only replaced
    progress: Progress = Progress()

    @property
    def epochs(self) -> int:
        """The number of epochs that are done."""
        return len(self.records)

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 1."""
        return self.epochs + 1

    @property
    def plain_records(self) -> list[dict[str, Any]]:
        """The records as `fit` hands them out."""
        return [plain(record) for record in self.records]

    def after_epoch(self, record: Mapping[str, Any], goal: "Goal") -> "Run":
        """The run at the start of the next epoch."""
        record = {"epoch": self.epoch, **fetched(dict(record))}
        value, best = float(record[goal.entry]), self.best
        if goal.is_better(value, best.value):
            best = Best(self.epoch, value, self.state.params)
        return Run(self.state, best, [*self.records, record])


def after_fit(
    start: Run, params: Params, records: list[dict[str, Any]], like: Mapping[str, Any], goal: "Goal"
) -> Run:
    """The run that goes on from the state of `start`, after an earlier run of `fit`.

    Args:
      start: the run at its start.
      params: those of the earlier run's best epoch.
      records: the plain records of the earlier run.
      like: a record without its epoch, as shapes and dtypes.
      goal: that of both runs.
    """
    try:
        rows = [
            {"epoch": i, **jax.tree.map(lambda own, x: np.asarray(x, own.dtype), like, rest)}
            for i, record in enumerate(records, 1)
            for rest in [{name: value for name, value in record.items() if name != "epoch"}]
        ]
    except ValueError:
        raise ValueError(
            f"fit: state is a Fit whose records have {', '.join(records[-1])}, and this run "
            f"records epoch, {', '.join(like)}. Record the same, or pass its state, run.state?"
        ) from None
    best = start.best
    for row in rows:
        if goal.is_better(float(row[goal.entry]), best.value):
            best = Best(row["epoch"], float(row[goal.entry]), params)
    return start._replace(best=best, records=rows)


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with Python's numbers in place of arrays without axes."""

    def to_number(x):
        return np.asarray(x).item() if np.ndim(x) == 0 else x

    return {name: jax.tree.map(to_number, value) for name, value in record.items()}


class Goal(NamedTuple):
    """When to stop.

    Attributes:
      name: the measure in messages.
      entry: the measure in records.
      sign: 1 if a higher measure is better, -1 if a lower one is.
      target: as in `fit`.
      patience: as in `fit`.
      epochs: as in `fit`.
    """

    name: str
    entry: str
    sign: int
    target: float | None
    patience: int | None
    epochs: int

    def is_better(self, value: float, other: float) -> bool:
        """Whether one measure is strictly better than another."""
        return self.sign * value > self.sign * other

    def reason_to_stop(self, run: Run) -> tuple[str, str] | None:
        """What stops a run here, and a sentence about it; None to continue."""
        if not run.records or run.progress.steps:
            return None  # before or inside an epoch
        value, best = float(run.records[-1][self.entry]), run.best
        if self.target is not None and not self.is_better(self.target, value):
            return (
                "target",
                f"{self.name} {value:.4g} is as good as {self.target:.4g} after {run.epochs} "
                "epochs",
            )
        if self.patience is not None and run.epochs - best.epoch >= self.patience:
            return (
                "patience",
                f"{self.name} has not improved for {self.patience} epochs; the best is "
                f"{best.value:.4g}, of epoch {best.epoch}",
            )
        if run.epochs >= self.epochs:
            return "epochs", f"all {run.epochs} epochs are done, {self.name} {value:.4g}"
        return None


def make_goal(metric, held_out, target, patience, epochs) -> Goal:
    """The goal of a run of `fit` with these arguments."""
    name = ("loss" if metric is None else getattr(metric, "__name__", "metric")).replace("_", " ")
    name = name if held_out is None else f"held-out {name}"
    entry = "metric" if metric is not None else "loss" if held_out is None else "held_out_loss"
    return Goal(name, entry, -1 if metric is None else 1, target, patience, epochs)


def make_measure(net, loss, metric, held_out, train):
    """`measure(params)`: what is measured after an epoch, a dict of `held_out_loss`, `metric`."""
    if held_out is None and metric is None:
        return lambda params: {}
    evaluation = evaluate(net, loss, metric=metric)

    def measure(params):
        means = evaluation(params, *(train if held_out is None else held_out))
        measured = {} if held_out is None else {"held_out_loss": means["loss"]}
        if metric is not None:
            measured["metric"] = means["metric"]
        return measured

    return measure
