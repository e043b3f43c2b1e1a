"""Convolutions of every geometry: against autodiff, and as structured signals."""

import jax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from opened import Model, assert_opened, normal

import jaxbp as bp

pads = st.one_of(
    st.sampled_from(["SAME", "VALID"]), st.tuples(st.integers(0, 2), st.integers(0, 2))
)


def opened_as_convolution(function, params, x):
    net, _ = assert_opened(Model(function, params, x))
    rows = bp.uses(net)
    assert [use.signal for use in rows] == ["Conv"]
    assert rows[0].bytes_per_example == 0


@pytest.mark.thorough
@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=pads,
    flipped=st.booleans(),
)
def test_transposed_convolutions(size, kernel, stride, dilation, padding, flipped):
    padding = padding if isinstance(padding, str) else [padding]

    def f(p, x):
        numbers = ("NHC", "HIO", "NHC")
        return lax.conv_transpose(
            x, p, (stride,), padding, (dilation,), numbers, transpose_kernel=flipped
        )

    x = normal(0, 2, size, 2)
    p = normal(1, kernel, 3, 2) if flipped else normal(1, kernel, 2, 3)
    assume(jax.eval_shape(f, p, x).shape[1] > 0)
    assume(bool(f(p, x).any()))  # some window sees an input
    net, _ = assert_opened(Model(f, p, x))
    (use,) = bp.uses(net)
    # Outputs that no window covers are between strides, or in the padding.
    covers = dilation * (kernel - 1)
    beyond = not isinstance(padding, str) and max(padding[0]) > covers
    if not beyond and stride <= covers + 1:
        assert (use.signal, use.bytes_per_example) == ("Conv", 0)


@pytest.mark.thorough
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(3, 5), st.integers(3, 5)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 1), st.integers(1, 2)),
    padding=pads,
    groups=st.sampled_from([1, 2, 4]),
    layout=st.sampled_from(["NHWC", "NCHW", "CWNH"]),
    kernel_layout=st.sampled_from(["HWIO", "OIHW", "IWHO"]),
)
def test_convolutions(sizes, kernel, strides, dilation, padding, groups, layout, kernel_layout):
    padding = padding if isinstance(padding, str) else [padding, padding[::-1]]
    shape = dict(zip("HWIO", (*kernel, 4 // groups, 4), strict=True))

    def f(p, x):
        x = x.transpose(*("NHWC".index(a) for a in layout))
        y = lax.conv_general_dilated(
            x,
            p,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(layout, kernel_layout, layout),
            feature_group_count=groups,
        )
        return y.transpose(*(layout.index(a) for a in "NHWC"))

    x, p = normal(0, 2, *sizes, 4), normal(1, *(shape[a] for a in kernel_layout))
    assume(min(jax.eval_shape(f, p, x).shape) > 0)
    opened_as_convolution(f, p, x)


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [((2, 1), "SAME", (1, 1)), ((1, 2), "VALID", (1, 2)), ((2, 3), ((1, 2), (0, 1)), (1, 1))],
)
def test_transposed_convolutions_of_two_axes(strides, padding, dilation):
    def f(p, x):
        return lax.conv_transpose(x, p, strides, padding, dilation, ("NHWC", "HWIO", "NHWC"))

    opened_as_convolution(f, normal(1, 3, 3, 2, 3), normal(0, 2, 3, 2, 2))


@pytest.mark.parametrize(
    "how",
    [
        {"lhs_dilation": (2,), "window_strides": (2,)},
        {"window_strides": (1,), "padding": [(-1, 0)]},
        {"window_strides": (1,), "lhs_dilation": (3,), "padding": [(4, 0)]},
    ],
    ids=["dilated on both sides", "cropped", "padded beyond the kernel"],
)
def test_convolutions_of_no_such_kind_are_formed(how):
    def f(p, x):
        how_ = {"padding": [(1, 1)], **how}
        return lax.conv_general_dilated(x, p, dimension_numbers=("NHC", "HIO", "NHC"), **how_)

    net, _ = assert_opened(Model(f, normal(1, 3, 2, 3), normal(0, 2, 5, 2)))
    assert bp.uses(net)[0].bytes_per_example > 0
