"""How a run of `fit` is stored in checkpoints, and restored from them."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbp.training.arrays import from_arrays, to_arrays
from jaxbp.training.checkpoints import Checkpoints, Stored
from jaxbp.training.epochs import Progress
from jaxbp.training.runs import Best, Run
from jaxbp.training.step import TrainState
from jaxbp.types import PyTree


class Storage:
    """Where a run is stored: in the checkpoints of a folder, or nowhere if `path` is None."""

    def __init__(self, path: Any, keep: int, describe: Callable[[], Mapping[str, Any]]):
        """`describe()` says which run it is; a run is never restored from those of another."""
        self._checkpoints = None if path is None else Checkpoints(path, keep)
        self._description = {} if path is None else describe()
        self._last: Run | None = None

    def __enter__(self) -> "Storage":
        """Nothing to do; `Checkpoints` are open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until everything is stored."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def save(self, run: Run) -> None:
        """Stores a run, unless that is the last thing it did."""
        if self._checkpoints is None or run is self._last:
            return
        self._last = run
        facts = {
            "records": len(run.records),
            "best_epoch": run.best.epoch,
            "best_value": run.best.value,
            "steps": run.progress.steps,
            "examples": run.progress.examples,
            "iterator": _encoded(run.progress.iterator),
        }
        tree = _tree(run.state, run.best.params, run.progress.sums, _columns(run.records))
        self._checkpoints.save(Stored(to_arrays(tree), facts, self._description))

    def restored(self, start: Run, like: Callable[[], tuple[PyTree, PyTree]]) -> Run:
        """The run of the newest checkpoint, or the one that starts here if there is none.

        Args:
          start: the run before its first step.
          like: makes the sums of a progress, and a record without its epoch, as shapes and dtypes.
        """
        stored = None
        if self._checkpoints is not None:
            stored = self._checkpoints.latest(self._description)
        if stored is None:
            return start
        facts, (sums, record) = stored.facts, like()
        n, steps = facts["records"], facts["steps"]
        columns = jax.tree.map(lambda r: jax.ShapeDtypeStruct((n, *r.shape), r.dtype), record)
        tree = _tree(
            start.state, start.best.params, sums if steps else None, columns if n else None
        )
        tree = from_arrays(tree, stored.arrays)
        progress = Progress(steps, facts["examples"], tree["sums"], _decoded(facts["iterator"]))
        best = Best(facts["best_epoch"], facts["best_value"], tree["best"])
        run = Run(tree["state"], best, _records(tree["records"], n), progress)
        self._last = run
        return run


def _tree(state: TrainState, best: PyTree, sums: PyTree, columns: PyTree) -> dict[str, Any]:
    return {"state": state, "best": best, "sums": sums, "records": columns}


def _columns(records: list[dict[str, Any]]) -> PyTree:
    """The records as one tree of arrays [number of records, ...], without their epochs, or None."""
    if not records:
        return None
    rows = [{name: value for name, value in r.items() if name != "epoch"} for r in records]
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def _records(columns: PyTree, n: int) -> list[dict[str, Any]]:
    """The inverse of `_columns`."""
    rows = (jax.tree.map(lambda column, i=i: np.asarray(column[i]), columns) for i in range(n))
    return [{"epoch": i, **row} for i, row in enumerate(rows, 1)]


def _encoded(state: Any) -> Any:
    """The state of an iterator, which is bytes or what JSON can hold, for JSON."""
    return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _decoded(state: Any) -> Any:
    if isinstance(state, dict) and set(state) == {"bytes"}:
        return base64.b64decode(state["bytes"])
    return state
