"""Files that are written completely or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.typing import ArrayLike

import jaxbp as bp
from jaxbp.types import PyTree


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames it to `path` if the block raises no error."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_trained(path: Path, params: PyTree, predictions: Mapping[str, ArrayLike]) -> None:
    """Saves parameters and predictions as an .npz file and prints its path.

    Args:
      path: the file.
      params: a tree of parameters. Their names in the file begin with `params/`.
      predictions: arrays by their names, such as the predictions of the test set.
    """
    arrays = {f"params/{name}": array for name, array in bp.to_arrays(params).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **jax.tree.map(np.asarray, {**arrays, **predictions}))
    print(f"parameters and predictions saved as {path}")


def load_params(path: Path, like: PyTree) -> PyTree:
    """The parameters that `save_trained` saved, as a tree like `like`."""
    with np.load(path) as file:
        start = "params/"
        arrays = {name.removeprefix(start): file[name] for name in file if start in name}
    return bp.from_arrays(like, arrays)
