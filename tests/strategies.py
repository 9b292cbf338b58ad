"""Arrays of every kind a caller may hold: rank, dtype, strides, masked and huge entries."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = st.sampled_from([np.float64, np.float32])


def shapes(min_dims: int = 1, max_dims: int = 4, min_side: int = 1, max_side: int = 6) -> Any:
    return hnp.array_shapes(
        min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side
    )


def generators() -> Any:
    """NumPy generators, which print as their seed."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def strided(draw: Any, x: np.ndarray) -> np.ndarray:
    """The numbers of ``x``, laid out in memory in some other way: permuted, reversed, spaced."""
    if x.ndim == 0:
        return x
    order = draw(st.permutations(range(x.ndim)))
    laid = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    for axis in range(x.ndim):
        if draw(st.booleans()):
            laid = np.flip(np.ascontiguousarray(np.flip(laid, axis)), axis)
    if draw(st.booleans()):
        spaced = np.full((*x.shape[:-1], 2 * x.shape[-1]), 7, x.dtype)
        spaced[..., ::2] = laid
        laid = spaced[..., ::2]
    assert np.array_equal(laid, x, equal_nan=True)
    return laid


@st.composite
def logits(
    draw: Any,
    shape: Any = None,
    dtype: Any = None,
    scales: tuple[float, ...] = (1.0, 30.0, 1e4),
    masked: bool = True,
) -> np.ndarray:
    """Logits of one scale, up to half of them ``-inf``, whole rows too."""
    rng = draw(generators())
    shape = draw(shapes()) if shape is None else draw(shape)
    z = rng.normal(size=shape) * draw(st.sampled_from(scales))
    if masked and draw(st.booleans()):
        z[rng.random(shape) < draw(st.sampled_from([0.1, 0.5]))] = -np.inf
    if masked and draw(st.booleans()):
        z[0] = -np.inf
    return draw(strided(z.astype(draw(DTYPES) if dtype is None else dtype)))


@st.composite
def with_axis(draw: Any, arrays: Any) -> tuple[np.ndarray, int]:
    """An array and one of its axes, counted from either end."""
    x = draw(arrays)
    return x, draw(st.integers(-x.ndim, x.ndim - 1))
