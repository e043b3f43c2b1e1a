"""Plain functions: every value, gradient and reading against autodiff of the function itself."""

import pytest
from functions import FUNCTIONS
from opened import assert_opened


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_opened(name):
    assert_opened(FUNCTIONS[name]())
