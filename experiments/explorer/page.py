"""The page: one file without links, made of the template, the style, the scripts and the runs."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SCRIPTS = (
    "arithmetic.js",
    "arrays.js",
    "drawing.js",
    "perceptron.js",
    "network.js",
    "carriers.js",
    "own.js",
    "start.js",
)
LARGEST = 5_000_000  # bytes


def page(run: dict[str, Any]) -> str:
    """Returns the page that shows a run.

    Args:
      run: for each part, a tree of dicts and lists with numbers, texts and arrays.

    Raises:
      ValueError: the page would be larger than 5 MB.
    """
    filled = {
        "style": read("style.css"),
        "scripts": "\n".join(read(name) for name in SCRIPTS),
        # No "</script>" in a text of the run can end the element that holds it.
        "run": json.dumps(packed(run), allow_nan=False, separators=(",", ":")).replace(
            "<", "\\u003c"
        ),
    }
    text = read("template.html")
    for name, content in filled.items():
        text = text.replace(f"/*{{{name}}}*/", content)
    if (size := len(text.encode())) > LARGEST:
        raise ValueError(
            f"the page would have {size / 1e6:.1f} MB, and the limit is "
            f"{LARGEST / 1e6:.0f} MB. Show a smaller network?"
        )
    return text


def read(name: str) -> str:
    """The text of a file in this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def packed(tree: Any) -> Any:
    """The tree with each array as its shape, its type and its bytes, which keep every digit.

    Arrays are little-endian float64, or uint8 for pictures.
    """
    if isinstance(tree, dict):
        return {name: packed(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [packed(value) for value in tree]
    if hasattr(tree, "shape"):
        array = np.asarray(tree)
        kind = "u8" if array.dtype == np.uint8 else "f64"
        data = np.ascontiguousarray(array, "u1" if kind == "u8" else "<f8").tobytes()
        return {"shape": array.shape, "type": kind, "data": base64.b64encode(data).decode()}
    return tree
