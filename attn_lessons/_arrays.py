"""Arrays at the door of every function: real numbers, the right shape, an axis that exists.

And two operations below all others: the backward pass of broadcasting, and a weighted sum in which
what has weight 0 takes no part.
"""

import operator
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Shaped


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


def as_bool(name: str, x: Shaped[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
    """Return ``x`` as an array of booleans.

    ValueError: ``x`` holds anything else. A mask of 0 and 1, or of 0 and -inf, would be read the
    wrong way round by one convention or the other.
    """
    x = np.asarray(x)
    if x.dtype != bool:
        raise ValueError(f"{name}: expected booleans; got dtype {x.dtype}")
    return x


def as_count(name: str, n: SupportsIndex, least: int = 0) -> int:
    """Return ``n`` as an int of at least ``least``.

    ValueError: ``n`` is no integer, or smaller.
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise ValueError(f"{name}: expected an integer; got {n!r}") from None
    if count < least:
        raise ValueError(f"{name}: expected at least {least}; got {count}")
    return count


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


def check_shape(
    name: str, x: Shaped[np.ndarray, "..."], wanted: tuple[int | str, ...], why: str = ""
) -> None:
    """ValueError: ``x`` has another shape than ``wanted``, where a string stands for any length.

    ``check_shape("k", k, (2, 3, "Nk", 8), f"to match q {q.shape}")``
    """
    fits = x.ndim == len(wanted) and all(
        isinstance(w, str) or w == n for w, n in zip(wanted, x.shape, strict=True)
    )
    if not fits:
        shape = f"({', '.join(map(str, wanted))}{',' if len(wanted) == 1 else ''})"
        raise ValueError(f"{name}: expected shape {shape}{why and ' ' + why}; got {x.shape}")


def check_broadcasts(
    name: str, x: Shaped[np.ndarray, "..."], shape: tuple[int, ...], axes: str = ""
) -> None:
    """ValueError: ``x`` does not broadcast to ``shape``, whose ``axes`` are named (``"B K"``)."""
    if not _broadcasts(x.shape, shape):
        names = f"({', '.join(axes.split())}) = " if axes else ""
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {names}{shape}; got {x.shape}"
        )


def weighted_sum(
    weights: Float[np.ndarray, "*batch m n"], values: Float[np.ndarray, "*batch n d"]
) -> Float[np.ndarray, "*batch m d"]:
    """``weights @ values``, where a weight of 0 takes nothing: not NaN from 0 · NaN or 0 · inf.

    Rows of ``values`` that are not finite reach only the sums that give them weight.
    """
    with np.errstate(invalid="ignore"):
        total = weights @ values
    # 0 * NaN and 0 * inf are NaN: what is not finite shows in the total, which is shorter than
    # the values where one query reads many.
    if np.isfinite(total).all():
        return total
    finite = np.isfinite(values).all(axis=-1)
    if finite.all():
        return total
    total = weights @ np.where(finite[..., None], values, 0)
    for j in np.flatnonzero(~finite.reshape(-1, finite.shape[-1]).all(axis=0)):
        weight, value = weights[..., j, None], values[..., j, None, :]
        taken = (weight != 0) & ~finite[..., j, None, None]
        total += np.where(taken, weight * value, 0)
    return total


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
