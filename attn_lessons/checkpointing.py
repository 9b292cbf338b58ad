r"""Recomputation: keep a few inputs in the forward pass, make the caches again in the backward.

A stack of layers is a sequence of objects that have

- ``forward(x) -> (out, cache)``,
- ``backward(dout, cache) -> (dx, grads)``,

and ``forward`` gives the same when called twice. Dropout does so where a layer draws from a seed of
its own, as TanhLayer, or keeps its mask. Layers that share a generator draw anew on each call: hand
that generator over as ``rng``, and it is wound back before a segment runs again, and forward again
after it.

Whatever is computed a second time is computed by the same operations on the same numbers, so that
the gradients are those of the plain backward pass bit for bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Real

from attn_lessons._arrays import as_count, as_float, check_same_shape, check_shape


class Layer(Protocol):
    """What a stack is made of."""

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        """The output, and what the backward pass reads."""

    def backward(self, dout: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """The gradient by x, and those by the layer's parameters."""


# --- a layer to practise on -------------------------------------------------------------------


class TanhCache(NamedTuple):
    """What a TanhLayer's backward pass reads."""

    x: np.ndarray  # (..., C)
    y: np.ndarray  # (..., C), tanh(x w + b)
    keep: np.ndarray  # (..., C), what dropout kept


class TanhLayer(NamedTuple):
    r"""A residual layer with dropout that can be drawn again.

    .. math:: \mathrm{out} = x + \frac{\mathrm{keep}}{1 - \mathrm{rate}}
              \circ \tanh(x w + b)

    Plain data: a tuple ``(w, b, seed, rate)`` serves as well where a
    stack is asked for. The seed is all that is kept of the mask.
    """

    w: Any  # (C, C)
    b: Any  # (C,)
    seed: int = 0
    rate: float = 0.0

    def keep(self, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
        """Which entries dropout keeps: the same at each call."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate: expected a number in [0, 1); got {self.rate!r}")
        return np.random.default_rng(self.seed).random(shape) >= self.rate

    def forward(
        self, x: Real[np.ndarray, "*batch C"]
    ) -> tuple[Float[np.ndarray, "*batch C"], TanhCache]:
        r"""The layer's output and its cache.

        .. math:: y = \tanh(x w + b), \qquad
                  \mathrm{out} = x + \mathrm{keep} \circ y / (1 - r)

        Shapes: x and out ``(..., C)``, w ``(C, C)``, b ``(C,)``.

        ValueError: shapes do not fit; ``rate`` lies outside [0, 1).
        """
        x, w, b = (as_float(n, a) for n, a in (("x", x), ("w", self.w), ("b", self.b)))
        width = x.shape[-1] if x.ndim else "C"
        check_shape("w", w, (width, width), f"to match x {x.shape}")
        check_shape("b", b, (width,), f"to match x {x.shape}")
        y = np.tanh(x @ w + b)
        keep = self.keep(y.shape)
        return x + np.where(keep, y, 0) * (1 / (1 - self.rate)), TanhCache(x, y, keep)

    def backward(
        self, dout: Real[np.ndarray, "*batch C"], cache: TanhCache
    ) -> tuple[Float[np.ndarray, "*batch C"], dict[str, np.ndarray]]:
        r"""Gradients by x, w and b.

        .. math:: da = \frac{\mathrm{keep}}{1 - r} \circ
                  d\mathrm{out} \circ (1 - y^2), \quad
                  dx = d\mathrm{out} + da\,w^\top, \quad
                  dw = x^\top da, \quad db = \textstyle\sum da

        Shapes: dout and dx ``(..., C)``; the second result a dict with
        w and b.

        ValueError: dout has not x's shape.
        """
        x, y, keep = cache
        dout = as_float("dout", dout)
        check_same_shape("dout", dout, "x", x)
        dy = np.where(keep, dout, 0) * (1 / (1 - self.rate))
        da = dy * (1 - y * y)
        tokens = tuple(range(x.ndim - 1))
        grads = {"w": np.tensordot(x, da, axes=(tokens, tokens)), "b": da.sum(axis=tokens)}
        return dout + da @ np.asarray(self.w).T, grads


# --- all caches kept --------------------------------------------------------------------------


def stack_forward(
    layers: Sequence[Any], x: Real[np.ndarray, "..."]
) -> tuple[Float[np.ndarray, "..."], list[Any]]:
    r"""One layer after the other, every cache kept.

    .. math:: x_{l+1} = f_l(x_l), \qquad l = 0 \dots L-1

    Shapes: as the layers have them; returns ``(out, caches)``.

    ValueError: an entry of ``layers`` is no layer; and as the layers'.
    """
    out, caches = as_float("x", x), []
    for layer in _stack(layers):
        out, cache = layer.forward(out)
        caches.append(cache)
    return out, caches


def stack_backward(
    layers: Sequence[Any], dout: Real[np.ndarray, "..."], caches: Sequence[Any]
) -> tuple[Float[np.ndarray, "..."], list[Any]]:
    r"""The layers in reverse, each with its cache.

    .. math:: dx_l = dx_{l+1} \cdot \frac{\partial f_l}{\partial x_l}

    Shapes: dout as the output, dx as the input; returns ``(dx,
    grads)``, grads one entry a layer, in the layers' order.

    ValueError: there is not one cache a layer; and as the layers'.
    """
    stack = _stack(layers)
    if len(caches) != len(stack):
        raise ValueError(f"caches: expected {len(stack)}, one a layer; got {len(caches)}")
    dx, grads = as_float("dout", dout), []
    for layer, cache in zip(reversed(stack), reversed(caches), strict=True):
        dx, grad = layer.backward(dx, cache)
        grads.append(grad)
    return dx, grads[::-1]


# --- few kept, the rest made again ------------------------------------------------------------


class Kept(NamedTuple):
    """What the forward pass leaves for the backward pass: the start of each segment."""

    inputs: list[np.ndarray]
    """The input of layer 0, ``every``, 2 ``every``, …"""
    states: list[Any]
    """The shared generator's state before each of them; None where there is no generator."""


def checkpointed_forward(
    layers: Sequence[Any],
    x: Real[np.ndarray, "..."],
    every: int,
    *,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "..."], Kept]:
    r"""The output, and the input of each segment of ``every`` layers.

    .. math:: \mathrm{kept} = (x_0, x_k, x_{2k}, \dots), \qquad
              k = \mathrm{every}

    A cache is dropped as soon as its layer is done. ``rng`` is the
    generator that layers share, if they do.

    Shapes: as the layers have them; returns ``(out, kept)``.

    ValueError: ``every`` < 1; an entry of ``layers`` is no layer.

    Source: Chen et al. 2016, algorithm 1.
    """
    every = as_count("every", every, 1)
    out, kept = as_float("x", x), Kept([], [])
    for number, layer in enumerate(_stack(layers)):
        if number % every == 0:
            kept.inputs.append(out)
            # A copy: the generator's own state moves on.
            kept.states.append(None if rng is None else rng.bit_generator.state)
        out, _ = layer.forward(out)
    return out, kept


def checkpointed_backward(
    layers: Sequence[Any],
    x: Real[np.ndarray, "..."],
    dout: Real[np.ndarray, "..."],
    every: int,
    *,
    kept: Kept | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "..."], list[Any]]:
    r"""Gradients, with the caches of one segment at a time.

    From the last segment to the first: run it forward from its kept
    input, now with caches, then backward. Each layer runs forward
    twice in all, and backward once:

    .. math:: 2F + B \quad\text{instead of}\quad F + B

    Without ``kept``, checkpointed_forward is run first. ``rng`` is the
    generator that layers share; it ends where the forward pass left it,
    as if nothing had been drawn a second time.

    Shapes: x and dx as the input, dout as the output; returns ``(dx,
    grads)``, grads one entry a layer, in the layers' order.

    ValueError: ``every`` < 1; an entry of ``layers`` is no layer;
    ``kept`` has not one entry a segment, or was made without the
    generator that is given now, or with one that is not.

    Source: Chen et al. 2016, algorithm 1 and section 4.1.
    """
    stack, every = _stack(layers), as_count("every", every, 1)
    if kept is None:
        _, kept = checkpointed_forward(stack, x, every, rng=rng)
    starts = range(0, len(stack), every)
    _check_kept(kept, starts, rng)
    now: Any = None if rng is None else rng.bit_generator.state
    dx, grads = as_float("dout", dout), list[Any]()
    try:
        for start in reversed(starts):
            segment = stack[start : start + every]
            if rng is not None:
                rng.bit_generator.state = kept.states[start // every]
            # The caches of the segment after this one are free by now.
            _, caches = stack_forward(segment, kept.inputs[start // every])
            dx, grad = stack_backward(segment, dx, caches)
            grads = grad + grads
            del caches
    finally:
        if rng is not None:
            rng.bit_generator.state = now
    return dx, grads


# --- how many to keep -------------------------------------------------------------------------


def checkpoint_memory(n_layers: int, every: int, ratio: float = 1.0) -> float:
    r"""What is kept at the worst moment, in inputs of a layer.

    .. math:: \Bigl\lceil \frac{L}{k} \Bigr\rceil + \rho\,\min(k, L)

    L/k inputs of segments, and the caches of the one segment that is
    run again, each ``ratio`` = ρ times as large as a layer's input.

    Shapes: numbers.

    ValueError: ``n_layers`` or ``every`` < 1; ``ratio`` is not positive.

    Source: Chen et al. 2016, eq. (1).
    """
    n_layers, every = as_count("n_layers", n_layers, 1), as_count("every", every, 1)
    if not 0 < ratio < np.inf:
        raise ValueError(f"ratio: expected a finite number > 0; got {ratio!r}")
    return -(-n_layers // every) + ratio * min(every, n_layers)


def sqrt_schedule(n_layers: int, ratio: float = 1.0) -> int:
    r"""The length of segments that keeps least: about the root of their number.

    .. math:: \operatorname{argmin}_k \Bigl( \Bigl\lceil \frac{L}{k}
              \Bigr\rceil + \rho\, k \Bigr) \approx \sqrt{L / \rho},
              \qquad \text{kept} \approx 2 \sqrt{\rho L}

    Instead of ρ L. Of equally good lengths, the shortest.

    Shapes: numbers.

    ValueError: as checkpoint_memory.

    Source: Chen et al. 2016, section 4.1, "O(√n)".
    """
    n_layers = as_count("n_layers", n_layers, 1)
    return min(range(1, n_layers + 1), key=lambda k: checkpoint_memory(n_layers, k, ratio))


# --- below ------------------------------------------------------------------------------------


def _stack(layers: Sequence[Any]) -> list[Any]:
    return [_layer(number, layer) for number, layer in enumerate(layers)]


def _layer(number: int, layer: Any) -> Any:
    if hasattr(layer, "forward") and hasattr(layer, "backward"):
        return layer
    if isinstance(layer, Mapping) and {"w", "b"} <= set(layer) <= set(TanhLayer._fields):
        return TanhLayer(**dict(layer))
    if isinstance(layer, tuple | list) and 2 <= len(layer) <= 4:
        return TanhLayer(*layer)
    raise ValueError(
        f"layers: expected objects with forward and backward, or (w, b, seed, rate); "
        f"got {type(layer).__name__} at {number}"
    )


def _check_kept(kept: Kept, starts: range, rng: Any) -> None:
    if len(kept.inputs) != len(starts):
        raise ValueError(
            f"kept: expected {len(starts)} inputs, one a segment; got {len(kept.inputs)}"
        )
    drawn = any(state is not None for state in kept.states)
    if starts and drawn != (rng is not None):
        has, got = ("a", "none") if drawn else ("no", "one")
        raise ValueError(f"rng: expected {has} generator, as in the forward pass; got {got}")
