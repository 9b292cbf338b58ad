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


@st.composite
def attention_shapes(draw: Any, most: int = 7) -> dict[str, int]:
    """Lengths of B, H, Nq, Nk, d and d_v from 1 to ``most``, no two alike: nothing fits by luck."""
    names = ("B", "H", "Nq", "Nk", "d", "d_v")
    lengths = draw(st.permutations(range(1, max(most, len(names)) + 1)))[: len(names)]
    return dict(zip(names, lengths, strict=True))


@st.composite
def broadcastable(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to ``shape``: lengths of 1, leading axes left out."""
    stretched = tuple(n if draw(st.booleans()) else 1 for n in shape)
    return stretched[draw(st.integers(0, len(shape))) :]


@st.composite
def masks(draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Masks of every broadcastable shape, from all False to all True, in any memory layout."""
    rng, share = draw(generators()), draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    # A scalar comparison gives np.True_, which is no array.
    return draw(strided(np.asarray(rng.random(draw(broadcastable(shape))) < share)))


@st.composite
def attention_inputs(
    draw: Any, dtype: Any = np.float64, scales: tuple[float, ...] = (0.3, 1.0, 5.0), most: int = 7
) -> dict[str, Any]:
    """q, k, v, dout and dlse; a mask, a bias and a dropout mask with its rate, or None."""
    n = draw(attention_shapes(most))
    rng, scale = draw(generators()), draw(st.sampled_from(scales))
    over_keys = (n["B"], n["H"], n["Nq"], n["Nk"])

    def array(*axes: str) -> np.ndarray:
        x = rng.normal(size=tuple(n[a] for a in axes))
        return draw(strided((x * scale).astype(dtype)))

    bias_shape = draw(st.none() | broadcastable(over_keys))
    rate = draw(st.sampled_from([0.0, 0.25, 0.9]))
    return {
        "q": array("B", "H", "Nq", "d"),
        "k": array("B", "H", "Nk", "d"),
        "v": array("B", "H", "Nk", "d_v"),
        "dout": array("B", "H", "Nq", "d_v"),
        "dlse": draw(st.sampled_from([None, array("B", "H", "Nq")])),
        "mask": draw(st.none() | masks(over_keys)),
        "bias": None if bias_shape is None else np.asarray(rng.normal(size=bias_shape), dtype),
        "keep": rng.random(over_keys) >= rate if rate else None,
        "rate": rate,
    }
