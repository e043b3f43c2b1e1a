"""Plain functions: every value, gradient and reading against autodiff of the function itself."""

from cases import every
from functions import FUNCTIONS
from opened import assert_opened

# Of operations, of sharing, of loops and of branches, some of each.
SOON = {
    "affine", "power and comparison", "three operands", "standardised convolution",
    "shared and transposed", "routed experts", "heads", "rows, clipped", "columns of a table",
    "mask of a parameter", "own vjp", "inputs in a tree", "stack, checkpoint of turns",
    "loop in a loop", "scanned and outside", "lookup and convolution in time", "carry that grows",
    "mapped", "branches", "infinite where not taken, log", "closed over",
    "blocks almost alike",
}  # fmt: skip


@every("name", {name: name for name in FUNCTIONS}, soon=SOON)
def test_a_function_is_opened(name):
    assert_opened(FUNCTIONS[name]())
