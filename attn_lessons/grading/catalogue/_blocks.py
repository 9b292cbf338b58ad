"""Blocks forward in many copies at once, and their gradients by the complex step.

Every array has one axis more in front, one place for each entry of each argument: in each copy one
entry is moved by i h. No backward pass is used, and nothing of the library but Φ and φ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attn_lessons.feedforward import normal_cdf, normal_pdf
from attn_lessons.grading.catalogue._parts import quiet

STEP = 1e-30
NOTHING = 1e-13

Array = np.ndarray
Arrays = Mapping[str, Array]


@quiet
def by_complex_step(
    dout: Array, given: Arrays, forward: Callable[[Arrays], Array]
) -> dict[str, Array]:
    """The gradient of ``sum(dout * forward(given))`` by every entry of every array."""
    arrays = {name: np.asarray(value, float) for name, value in given.items()}
    copies = sum(array.size for array in arrays.values())
    moved, start = {}, 0
    for name, array in arrays.items():
        several = np.repeat(array[None].astype(complex), copies, axis=0)
        own = several[start : start + array.size].reshape(array.size, -1)
        own[np.arange(array.size), np.arange(array.size)] += 1j * STEP
        moved[name], start = several, start + array.size
    slopes = np.einsum("bnc,pbnc->p", dout, forward(moved).imag / STEP)
    ends = np.cumsum([array.size for array in arrays.values()])[:-1]
    found = {
        name: part.reshape(array.shape)
        for (name, array), part in zip(arrays.items(), np.split(slopes, ends), strict=True)
    }
    # What cancels to rounding (a key's bias; all of attention but wv, with one token) is 0.
    most = max(np.abs(g).max() for g in found.values())
    return {name: np.where(np.abs(g).max() > NOTHING * most, g, 0.0) for name, g in found.items()}


def linear(x: Array, w: Array, b: Array | None = None) -> Array:
    # One product a copy: a batch of small ones is slower.
    rows = x.reshape(len(x), -1, x.shape[-1]) @ w
    y = rows if b is None else rows + b[:, None]
    return y.reshape(*x.shape[:-1], -1)


def layer_norm(x: Array, gamma: Array, beta: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    size = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return gamma[:, None, None] * centred / size + beta[:, None, None]


def rms_norm(x: Array, gamma: Array) -> Array:
    return gamma[:, None, None] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)


def gelu(x: Array) -> Array:
    """The step is so small that the value moves by its slope times the step."""
    r = x.real
    return r * normal_cdf(r) + 1j * x.imag * (normal_cdf(r) + r * normal_pdf(r))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def feed_forward(x: Array, w1: Array, b1: Array, w2: Array, b2: Array) -> Array:
    return linear(gelu(linear(x, w1, b1)), w2, b2)


def attention(
    x: Array,
    memory: Array,
    p: Arrays,
    n_heads: int,
    mask: Array | None,
    turned: bool = False,
) -> Array:
    """Heads of x looking at memory; where there are fewer key heads, h looks at h // G."""
    q, k, v = (
        linear(rows, p[f"w{n}"], p[f"b{n}"]) for n, rows in (("q", x), ("k", memory), ("v", memory))
    )
    d = q.shape[-1] // n_heads
    group = q.shape[-1] // k.shape[-1]
    heads = []
    for h in range(n_heads):
        own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        one, keys = q[..., own], k[..., shared]
        if turned:
            one, keys = turn(one), turn(keys)
        logits = one @ keys.swapaxes(-1, -2) / np.sqrt(d)
        heads.append(_weights(logits, mask, h) @ v[..., shared])
    return linear(np.concatenate(heads, axis=-1), p["wo"], p["bo"])


def turn(x: Array) -> Array:
    """Columns 2i and 2i + 1 of row n turned by n / 10000^(2i/d)."""
    n, d = x.shape[-2:]
    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    out[..., 1::2] = x[..., 0::2] * np.sin(angle) + x[..., 1::2] * np.cos(angle)
    return out


def part(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What belongs to ``name``, without it."""
    return {n.removeprefix(f"{name}."): a for n, a in given.items() if n.startswith(f"{name}.")}


def _weights(logits: Array, mask: Array | None, head: int) -> Array:
    """Softmax of one head's logits, ``(P, B, Nq, Nk)``; a row that may see nothing is 0."""
    if mask is None:
        seen = np.ones(logits.shape, bool)
    else:
        four = np.asarray(mask).reshape((1,) * (4 - np.ndim(mask)) + np.shape(mask))
        seen = np.broadcast_to(four[:, head % four.shape[1]], logits.shape)
    # The largest logit is subtracted with its step: beside a probability near 1 nothing cancels.
    top = np.where(seen, logits.real, -np.inf).argmax(axis=-1)[..., None]
    weights = np.where(seen, np.exp(logits - np.take_along_axis(logits, top, axis=-1)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(seen.any(axis=-1, keepdims=True), total, 1)
