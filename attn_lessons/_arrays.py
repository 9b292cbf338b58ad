"""Arrays at the door of every function: real numbers, the right shape, an axis that exists."""

import operator

import numpy as np
from jaxtyping import Float, Shaped


def as_float(name: str, x: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return ``x`` as floating point: float dtypes kept, integers and booleans to float64.

    Never copies a floating array, so the caller must not write to the result.
    ValueError: ``x`` holds complex numbers, strings or objects.
    """
    x = np.asarray(x)
    if x.dtype.kind == "f":
        return x
    if x.dtype.kind in "iub":
        return x.astype(np.float64)
    raise ValueError(f"{name}: expected real numbers; got dtype {x.dtype}")


def check_axis(axis: int, name: str, x: Shaped[np.ndarray, "..."]) -> int:
    """Return ``axis`` as an int that exists in ``x``.

    ValueError: ``axis`` is no integer or lies outside ``-x.ndim … x.ndim - 1``.
    """
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis; got a scalar, shape ()")
    try:
        index = operator.index(axis)
    except TypeError:
        raise ValueError(f"axis: expected one integer; got {axis!r}") from None
    if not -x.ndim <= index < x.ndim:
        allowed = f"{-x.ndim} … {x.ndim - 1}"
        raise ValueError(f"axis: expected {allowed} for {name} of shape {x.shape}; got {axis}")
    return index


def check_same_shape(
    name: str, x: Shaped[np.ndarray, "..."], other: str, y: Shaped[np.ndarray, "..."]
) -> None:
    """ValueError: ``x`` has another shape than ``y``."""
    if x.shape != y.shape:
        raise ValueError(f"{name}: expected shape {y.shape} to match {other}; got {x.shape}")


def check_rank(name: str, x: Shaped[np.ndarray, "..."], axes: str) -> None:
    """ValueError: ``x`` has not one axis for each name in ``axes`` (``"B K"``)."""
    wanted = axes.split()
    if x.ndim != len(wanted):
        shape = f"({', '.join(wanted)}{',' if len(wanted) == 1 else ''})"
        raise ValueError(f"{name}: expected shape {shape}; got {x.shape}")


def unbroadcast(grad: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Sum ``grad`` back to ``shape``: the backward pass of broadcasting.

    An entry that broadcasting used many times collects the gradients of all its uses.
    ValueError: ``shape`` does not broadcast to ``grad.shape``.
    """
    if not _broadcasts(shape, grad.shape):
        raise ValueError(f"shape: expected one that broadcasts to {grad.shape}; got {shape}")
    grad = np.sum(grad, axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1)
    return np.asarray(grad.sum(axis=stretched, keepdims=True))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))
