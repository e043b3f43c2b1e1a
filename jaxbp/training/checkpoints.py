"""Checkpoints of a run: everything that decides its future, stored so that it survives a kill.

Orbax writes a checkpoint to a folder of another name and renames it when it is complete, so that a
kill leaves the checkpoints before it as they were. Beside the arrays, each checkpoint has a
description of the run, and a checksum of every array. A checkpoint that cannot be read, or whose
checksums differ, is passed over.

Arrays are stored whole, on however many devices they are. Only where an array spans processes does
each of them store its part, and read the part that it is to have.
"""

import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.training.processes import happened_anywhere, spans_processes
from jaxbp.types import show_path, show_shape


class Stored(NamedTuple):
    """What a checkpoint has.

    Attributes:
      arrays: arrays by name, as `to_arrays` returns them.
      facts: numbers and strings by name; anything that JSON can hold.
      run: a description of the run, nested dicts of strings and numbers. A run goes on only from
        checkpoints with the same description.
    """

    arrays: Mapping[str, Any]
    facts: Mapping[str, Any]
    run: Mapping[str, Any]


class OtherRunError(ValueError):
    """The checkpoints in a folder are those of another run."""


class Checkpoints:
    """The checkpoints in one folder, numbered in their order.

    Args:
      path: the folder. It is made if it is not there.
      keep: how many of the newest checkpoints are kept.
    """

    def __init__(self, path: Any, keep: int):
        """Opens the folder."""
        ocp = _orbax()
        self.path = Path(path).absolute()
        self._manager = ocp.CheckpointManager(
            self.path,
            item_names=("arrays", "spread", "description"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def save(self, stored: Stored) -> None:
        """Stores a checkpoint, in the background; waits for the one before."""
        args = _orbax().args
        self._manager.wait_until_finished()
        names = list(stored.arrays)
        # Copies: a step may donate the arrays while they are written.
        arrays = {str(i): _copy(stored.arrays[name]) for i, name in enumerate(names)}
        sums = [_checksum(array) for array in arrays.values()]
        description = {
            "arrays": [list(pair) for pair in zip(names, sums, strict=True)],
            "facts": dict(stored.facts),
            "run": dict(stored.run),
        }
        spread = {i: array for i, array in arrays.items() if spans_processes(array)}
        whole = {i: array for i, array in arrays.items() if i not in spread}
        items = {"arrays": args.StandardSave(whole), "description": args.JsonSave(description)}
        if spread:
            items["spread"] = args.StandardSave(spread)
        step = 1 + max(self._manager.all_steps(), default=0)
        self._manager.save(step, args=args.Composite(**items))

    def latest(self, run: Mapping[str, Any], like: Mapping[str, Any]) -> Stored | None:
        """The newest checkpoint that can be read, or None if there is none.

        Args:
          run: the description of the run that goes on.
          like: arrays by name, which lie where those that span processes are to lie.

        Raises:
          OtherRunError: it is a checkpoint of another run; the message names the first difference.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            stored, reason = None, "by another process"
            try:
                stored = self._read(step, run, like)
            except OtherRunError:
                raise
            except Exception as error:
                reason = _first_line(error)
            if not happened_anywhere(stored is None, like):
                return stored
            warnings.warn(
                f"fit: checkpoint {step} in {self.path.name} cannot be read and is removed "
                f"({reason}). The run goes on from the one before, or from the start if there is "
                "none.",
                stacklevel=3,
            )
            self._remove(step)
        return None

    def close(self) -> None:
        """Waits until everything is stored."""
        self._manager.close()

    def _read(self, step, run, like):
        args = _orbax().args
        items = args.Composite(arrays=args.StandardRestore(), description=args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        description, stored = restored["description"], dict(restored["arrays"])
        difference = first_run_difference(description["run"], run)
        if difference is not None:
            raise OtherRunError(
                f"fit: the checkpoints in {self.path.name} are those of another run: "
                f"{difference}. Take another folder, or remove them?"
            )
        names = [name for name, _ in description["arrays"]]
        spread = {str(i): like[name] for i, name in enumerate(names) if str(i) not in stored}
        if spread:
            shapes = jax.tree.map(_shape_and_sharding, spread)
            item = args.Composite(spread=args.StandardRestore(shapes))
            stored |= self._manager.restore(step, args=item)["spread"]
        arrays = {}
        for i, (name, checksum) in enumerate(description["arrays"]):
            arrays[name] = stored[str(i)]
            if _checksum(arrays[name]) != checksum:
                raise ValueError(f"{name} has another checksum than when it was stored")
        return Stored(arrays, description["facts"], description["run"])

    def _remove(self, step: int) -> None:
        try:
            self._manager.delete(step)
        except Exception:  # what is broken may be too broken for orbax
            shutil.rmtree(self.path / str(step), ignore_errors=True)
            self._manager.reload()


def first_run_difference(got: Any, expected: Any, place: str = "") -> str | None:
    """Where two descriptions of runs first differ, in words, or None."""
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in got if key not in expected)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in got:
                return f"they have no {inner}"
            if key not in expected:
                return f"they have {inner}, which this run has not"
            difference = first_run_difference(got[key], expected[key], inner)
            if difference is not None:
                return difference
        return None
    return None if got == expected else f"{place} is {got}, and in this run {expected}"


def outline(tree: Any) -> dict[str, str]:
    """The shapes and dtypes of a tree by path, for the description of a run."""
    return {
        show_path(path): f"{leaf.dtype} {show_shape(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _copy(array: Any) -> Any:
    """An array, whole. If it spans processes, orbax itself copies the parts before it returns."""
    return array if spans_processes(array) else np.array(array)


def _shape_and_sharding(array: Any) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _checksum(array: Any) -> int:
    if isinstance(array, jax.Array):
        return int(_sum_of_words(array))
    array = np.ascontiguousarray(array)
    return zlib.crc32(array.view(np.uint8).data if array.size else b"")


@jax.jit
def _sum_of_words(array: jax.Array) -> jax.Array:
    """A checksum that does not depend on how an array is divided: its words, weighted by place."""
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    size = 8 * min(bits.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(bits, f"uint{size}").astype(jnp.uint32)
    weights = jnp.ones((), jnp.uint32)
    for axis in range(words.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        weights = weights * jnp.uint32(2654435761) + place
    return jnp.sum(words * (2 * weights + 1), dtype=jnp.uint32)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError(
            "fit: checkpoints need orbax. Install jaxbp[checkpoints], or orbax-checkpoint?"
        ) from None
    return ocp
