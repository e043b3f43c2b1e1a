"""How a run of `fit` is stored in checkpoints, and restored from them."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbp.training.arrays import from_arrays, to_arrays
from jaxbp.training.checkpoints import Checkpoints, Stored
from jaxbp.training.epochs import Progress
from jaxbp.training.processes import fetched, of_all_processes, texts_of_all_processes
from jaxbp.training.runs import Best, Run
from jaxbp.training.state import TrainState
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
            "iterator": _encoded(run.progress.iterator, run.state),
        }
        sums = fetched(run.progress.sums)
        tree = _tree(run.state, run.best.params, sums, _columns(run.records))
        self._checkpoints.save(Stored(to_arrays(tree), facts, self._description))

    def restored(self, start: Run, like: Callable[[], tuple[PyTree, PyTree]]) -> Run:
        """The run of the newest checkpoint, or the one that starts here if there is none.

        Args:
          start: the run before its first step.
          like: makes the sums of a progress, and a record without its epoch, as shapes and dtypes.
        """
        stored = None
        if self._checkpoints is not None:
            own = to_arrays(_tree(start.state, start.best.params, None, None))
            stored = self._checkpoints.latest(self._description, own)
        if stored is None:
            return start
        facts, (sums, record) = stored.facts, like()
        n, steps = facts["records"], facts["steps"]
        columns = jax.tree.map(lambda r: jax.ShapeDtypeStruct((n, *r.shape), r.dtype), record)
        tree = _tree(
            start.state, start.best.params, sums if steps else None, columns if n else None
        )
        tree = from_arrays(tree, stored.arrays)
        iterator = _decoded(facts["iterator"], start.state)
        progress = Progress(steps, facts["examples"], tree["sums"], iterator)
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


def _encoded(state: Any, beside: PyTree) -> Any:
    """The state of an iterator, or of one in each process, for JSON; None if it has none."""
    if state is None:
        return None
    if isinstance(state, bytes):
        state = {"bytes": base64.b64encode(state).decode()}
    states = texts_of_all_processes(json.dumps(state), beside)
    return state if len(states) == 1 else {"processes": states}


def _decoded(state: Any, beside: PyTree) -> Any:
    """The inverse of `_encoded`, in each process."""
    if isinstance(state, dict) and set(state) == {"processes"}:
        state = json.loads(_own(state["processes"], beside))
    if isinstance(state, dict) and set(state) == {"bytes"}:
        return base64.b64decode(state["bytes"])
    return state


def _own(states: list[str], beside: PyTree) -> str:
    processes = of_all_processes(np.int32(jax.process_index()), beside).tolist()
    if len(states) != len(processes):
        raise ValueError(
            f"fit: the checkpoint has the states of the iterators of {len(states)} processes, and "
            f"this run has {len(processes)}. Start as many, or train on a data set?"
        )
    return states[processes.index(jax.process_index())]
