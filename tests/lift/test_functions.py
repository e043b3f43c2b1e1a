"""Plain functions: every value, gradient and reading against autodiff of the function itself."""

from cases import every
from functions import FUNCTIONS
from opened import assert_opened

# These compile the longest, and other tests lift convolutions and tied tables.
LATE = {"convolutions", "tied table", "matrix functions"}


@every("name", {name: name for name in FUNCTIONS}, soon=FUNCTIONS.keys() - LATE)
def test_a_function_is_opened(name):
    assert_opened(FUNCTIONS[name]())
