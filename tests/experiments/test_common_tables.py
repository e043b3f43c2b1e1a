"""Tables and figures of the experiments: columns that stay apart, and axes that fit the data."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import digits
from experiments.common import figures, progress, tables


def test_columns_never_touch_and_are_no_wider_than_they_have_to_be():
    rows = [("", "a", "much"), ("a long name of a part", "1,000,000", "2"), ("b", "3", "-4.5")]
    assert tables.aligned(rows).splitlines() == [
        "                               a  much",
        "a long name of a part  1,000,000     2",
        "b                              3  -4.5",
    ]


def test_a_spread_of_negative_numbers_is_readable():
    assert tables.spread([1.0, 2.0, 4.0], ".1f") == "2.0 (1.0-4.0)"
    assert tables.spread(np.float32([-0.001, -0.001]), ".2f") == "0.00 (0.00-0.00)"
    assert tables.spread([-3.0, -2.0, 1.0], ".1f") == "-2.0 (-3.0 to 1.0)"


@pytest.mark.parametrize(("values", "scale"), [([1.0, 9.0], "linear"), ([1.0, 10.0], "log")])
def test_an_axis_is_logarithmic_only_over_a_decade(values, scale):
    axes = Figure().subplots()
    axes.plot([*values, 0.0, np.nan])
    assert figures.log_where_wide(axes) == (scale == "log")
    assert axes.get_yscale() == scale


def test_red_is_red_and_blue_is_blue():
    red, green, blue = (int(figures.RED[i : i + 2], 16) for i in (1, 3, 5))
    assert red > 4 * max(green, blue)


def test_the_title_says_what_the_error_signals_did():
    assert digits.told(3, 3) == "Error signals shrank in all 3 layers"
    assert digits.told(0, 3) == "Error signals did not shrink in any of the 3 layers"
    assert digits.told(1, 3) == "Error signals shrank in 1 of 3 layers, and not in the others"
    assert digits.told(0, 1) == "The error signal did not shrink during training"


def test_a_bar_says_that_it_compiles_also_where_there_is_no_terminal(capsys):
    with progress.Bar("training", 2, "epoch") as bar:
        assert "compiling:   0%" in capsys.readouterr().err
        bar.update()
        bar.update()
    assert "training: 100%" in capsys.readouterr().err
