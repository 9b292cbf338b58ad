"""Test functions that travel as plain data: a kind, and the arrays it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Params = Mapping[str, np.ndarray]


def _linear(x: np.ndarray, p: Params) -> Any:
    """Sum of ``slope * x``, plus ``offset``."""
    return p["offset"] + np.sum(p["slope"] * x)


def _quadratic(x: np.ndarray, p: Params) -> Any:
    """``x' A x / 2 + b' x`` with x read as one long vector; A need not be symmetric."""
    flat = x.reshape(-1)
    return flat @ (p["matrix"] @ flat) / 2 + p["slope"].reshape(-1) @ flat


def _cubic(x: np.ndarray, p: Params) -> Any:
    """Sum of ``slope * u + curve * u**2 / 2 + third * u**3 / 6`` with ``u = x - centre``."""
    u = x - p["centre"]
    return np.sum(u * (p["slope"] + u * (p["curve"] / 2 + u * p["third"] / 6)))


def _sine(x: np.ndarray, p: Params) -> Any:
    """Sum of ``height * sin(x + phase)``, plus ``offset``."""
    return p["offset"] + np.sum(p["height"] * np.sin(x + p["phase"]))


def _corner(x: np.ndarray, p: Params) -> Any:
    """Sum of ``slope * u + bend * |u|`` with ``u = x - centre``: a corner in every entry."""
    u = x - p["centre"]
    return np.sum(p["slope"] * u + p["bend"] * u * np.sign(u.real))


def _logsumexp(x: np.ndarray, p: Params) -> Any:
    """``log sum exp(weight * x)``: every entry's slope depends on all entries."""
    return np.log(np.sum(np.exp(p["weight"] * x)))


def _layer(dout: np.ndarray, p: Params) -> Any:
    """A sublayer's backward pass, ``(slope * dout) @ matrix``: an array of the argument's shape."""
    return (p["slope"] * dout) @ p["matrix"]


KINDS: Mapping[str, Callable[[np.ndarray, Params], Any]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "cubic": _cubic,
    "sine": _sine,
    "corner": _corner,
    "logsumexp": _logsumexp,
    "layer": _layer,
}

# Which parameter of a kind has the argument's shape.
SHAPED_LIKE: Mapping[str, str] = {
    "linear": "slope",
    "quadratic": "slope",
    "cubic": "slope",
    "sine": "height",
    "corner": "slope",
    "logsumexp": "weight",
    "layer": "slope",
}


@dataclass(frozen=True, eq=False)
class Probe:
    """A function of one array, for gradients to be taken of, or one that takes a gradient back.

    ``kind`` is a key of ``KINDS``; ``params`` holds the arrays that this kind reads, one of them
    with the shape that the argument must have. Real, extended-precision and complex arguments are
    all taken, and the value has their precision. It is a number, but for "layer".
    """

    kind: str
    params: Params

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {self.kind!r}")
        params = {name: np.array(value) for name, value in self.params.items()}
        for value in params.values():
            value.flags.writeable = False
        object.__setattr__(self, "params", params)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the argument."""
        return np.shape(self.params[SHAPED_LIKE[self.kind]])

    def __call__(self, x: Any) -> Any:
        # One memory order for all, so that sums round the same however x lies in memory.
        x = np.asarray(x, order="C")
        if x.shape != self.shape:
            raise ValueError(f"it takes an array of shape {self.shape}; it was given {x.shape}")
        return KINDS[self.kind](x, self.params)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Probe)
            and self.kind == other.kind
            and self.params.keys() == other.params.keys()
            and all(np.array_equal(v, other.params[k]) for k, v in self.params.items())
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        return self  # nothing in it can be written to

    def __hash__(self) -> int:
        return hash((self.kind, self.shape))

    def __repr__(self) -> str:
        return f"Probe({self.kind!r}, shape={self.shape})"
