"""Chapter 12 in many hands."""

import math

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from answers import mutating, right, wrong

# ---------------------------------------------------------------------------- attention_flops


@right("attention_flops")
def flops_plain(b, h, n, d, causal=False, backward=False):
    flops = 4 * b * h * n**2 * d
    if backward:
        flops = flops * 5 // 2
    return flops // 2 if causal else flops


@right("attention_flops")
def flops_as_float(b, h, n, d, causal=False, backward=False, recompute=True):
    factor = (2.5 if recompute else 2.0) if backward else 1.0
    return factor * 4.0 * b * h * n * n * d * (0.5 if causal else 1.0)


@right("attention_flops")
def flops_by_products(b, h, n, d, causal=False, backward=False):
    def product(rows, inner, columns):
        return 2 * rows * inner * columns

    logits, values = product(n, d, n), product(n, n, d)
    total = logits + values
    if backward:
        total = logits + values + logits + values + values
    return sum(total for _ in range(b) for _ in range(h)) >> bool(causal)


@right("attention_flops")
def flops_numpy(b, h, n, d, causal=False, backward=False):
    counts = np.array([5 if backward else 2, 2 - causal, b, h, n, n, d], dtype=np.int64)
    return np.prod(counts)


@right("attention_flops")
def flops_of_macs(b, h, n, d, causal=False, backward=False):
    macs = b * h * n * (n * d)
    return {False: 2, True: 5}[backward] * macs * 2 / (2 if causal else 1)


@right("attention_flops")
def flops_counted_by_torch(b, h, n, d, causal=False, backward=False):
    """Products of arrays without contents, counted as they are made."""
    wide, square = (torch.empty(b * h, *s, device="meta") for s in ((n, d), (n, n)))
    with FlopCounterMode(display=False) as counter:
        wide @ wide.mT
        if not backward:
            square @ wide
        else:
            square.mT @ wide
            wide @ wide.mT
            square @ wide
            square.mT @ wide
    return counter.get_total_flops() // (1 + causal)


@wrong("attention_flops")
def flops_of_a_product_too_many(b, h, n, d, causal=False, backward=False):
    return flops_plain(b, h, n, d, causal, backward) + 2 * b * h * n * n * d


@wrong("attention_flops")
def flops_in_billions(b, h, n, d, causal=False, backward=False):
    return flops_plain(b, h, n, d, causal, backward) / 1e9


# ---------------------------------------------------------------------------- attention_bytes


@right("attention_bytes")
def bytes_plain(b, h, n, d, itemsize=4, flash=False):
    if flash:
        return b * h * (4 * n * d * itemsize + 4 * n)
    return b * h * (3 * n * d + n * n) * itemsize


@right("attention_bytes")
def bytes_of_arrays(b, h, n, d, itemsize=4, flash=False):
    kept = {name: ((b, h, n, d), itemsize) for name in "qkv"}
    if flash:
        kept |= {"out": ((b, h, n, d), itemsize), "lse": ((b, h, n), 4)}
    else:
        kept |= {"p": ((b, h, n, n), itemsize)}
    return sum(math.prod(shape) * size for shape, size in kept.values())


@right("attention_bytes")
def bytes_as_float(b, h, n, d, itemsize=4, flash=False):
    rows = float(b * h * n)
    return rows * (4 * d * itemsize + 4.0) if flash else rows * itemsize * (3 * d + n)


@right("attention_bytes")
def bytes_numpy(b, h, n, d, itemsize=4, flash=False):
    wide, square, row = np.int64([b * h * n * d, b * h * n * n, b * h * n])
    counts = np.array([3 + flash, not flash, flash])
    return np.dot(counts, np.array([wide * itemsize, square * itemsize, 4 * row]))


@right("attention_bytes")
def bytes_of_virtual_arrays(b, h, n, d, itemsize=4, flash=False):
    """nbytes of arrays of stride 0, which take no room."""
    one = np.empty((), dtype=f"f{itemsize}")
    kept = [np.broadcast_to(one, (b, h, n, d))] * (4 if flash else 3)
    kept += [
        np.broadcast_to(np.float32(0), (b, h, n)) if flash else np.broadcast_to(one, (b, h, n, n))
    ]
    return sum(a.nbytes for a in kept)


@right("attention_bytes")
def bytes_torch(b, h, n, d, itemsize=4, flash=False):
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    kept = [torch.empty(b, h, n, d, dtype=dtype, device="meta") for _ in range(3)]
    if flash:
        kept += [torch.empty_like(kept[0]), torch.empty(b, h, n, device="meta")]
    else:
        kept += [torch.empty(b, h, n, n, dtype=dtype, device="meta")]
    return sum(t.numel() * t.element_size() for t in kept)


@wrong("attention_bytes")
def bytes_with_gradients(b, h, n, d, itemsize=4, flash=False):
    return 2 * bytes_plain(b, h, n, d, itemsize, flash)


@wrong("attention_bytes")
def bytes_of_two_of_three(b, h, n, d, itemsize=4, flash=False):
    return bytes_plain(b, h, n, d, itemsize, flash) - b * h * n * d * itemsize


# ---------------------------------------------------------------------- checkpointed_backward


def drop(layer, shape):
    _, _, seed, rate = layer
    return np.random.default_rng(seed).random(shape) >= rate


def forward(layer, x):
    w, b, _, rate = layer
    y = np.tanh(x @ w + b)
    keep = drop(layer, x.shape)
    return x + keep * y / (1 - rate), (x, y, keep)


def backward(layer, d, cache):
    w, _, _, rate = layer
    x, y, keep = cache
    da = d * keep / (1 - rate) * (1 - y**2)
    rows = x.reshape(-1, x.shape[-1]), da.reshape(-1, x.shape[-1])
    return d + da @ w.T, {"w": rows[0].T @ rows[1], "b": rows[1].sum(axis=0)}


@right("checkpointed_backward")
def checkpoint_plain(layers, x, dout, every):
    kept = []
    for i, layer in enumerate(layers):
        if i % every == 0:
            kept.append(x)
        x, _ = forward(layer, x)
    grads = [None] * len(layers)
    for number in reversed(range(len(kept))):
        start, h, caches = number * every, kept[number], []
        for layer in layers[start : start + every]:
            h, cache = forward(layer, h)
            caches.append(cache)
        for i in reversed(range(len(caches))):
            dout, grads[start + i] = backward(layers[start + i], dout, caches[i])
    return dout, grads


@right("checkpointed_backward")
def checkpoint_all_kept(layers, x, dout, every):
    """Nothing recomputed: no check of values can tell."""
    caches, grads = [], []
    for layer in layers:
        x, cache = forward(layer, x)
        caches.append(cache)
    for layer, cache in zip(layers[::-1], caches[::-1], strict=True):
        dout, g = backward(layer, dout, cache)
        grads.insert(0, g)
    return dout, grads


@right("checkpointed_backward")
def checkpoint_recursive(layers, x, dout, every):
    """The first segment kept, the rest seen to by the function itself."""
    head, tail = layers[:every], layers[every:]
    h, caches = x, []
    for layer in head:
        h, cache = forward(layer, h)
        caches.append(cache)
    rest = []
    if tail:
        dout, rest = checkpoint_recursive(tail, h, dout, every)
    own = []
    for layer, cache in zip(reversed(head), reversed(caches), strict=True):
        dout, g = backward(layer, dout, cache)
        own = [g, *own]
    return [dout, [*own, *rest]]


@right("checkpointed_backward")
def checkpoint_torch(layers, x, dout, every):
    """torch.utils.checkpoint over segments, masks made by NumPy."""
    params = [[torch.tensor(a, requires_grad=True) for a in layer[:2]] for layer in layers]
    h = first = torch.tensor(x, requires_grad=True)

    def segment(start):
        def run(h):
            for (w, b), layer in zip(
                params[start : start + every], layers[start : start + every], strict=True
            ):
                keep = torch.tensor(drop(layer, x.shape)).to(h.dtype)
                h = h + keep * torch.tanh(h @ w + b) / (1 - layer[3])
            return h

        return run

    for start in range(0, len(layers), every):
        h = checkpoint(segment(start), h, use_reentrant=False)
    h.backward(torch.tensor(dout))
    return first.grad, [{"w": w.grad, "b": b.grad} for w, b in params]


@right("checkpointed_backward")
def checkpoint_einsum(layers, x, dout, every):
    """Deltas carried with the skip path apart; sech² in place of 1 - y²."""
    starts, h = {}, np.asarray(x, float)
    for i, (w, b, _, rate) in enumerate(layers):
        if i % every == 0:
            starts[i] = h
        h = h + drop(layers[i], x.shape) * np.tanh(np.einsum("...i,ij->...j", h, w) + b) / (
            1 - rate
        )
    d, grads = np.array(dout, dtype=float), {}
    for start, h in sorted(starts.items(), reverse=True):
        inputs = []
        for i in range(start, min(start + every, len(layers))):
            inputs.append(h)
            h, _ = forward(layers[i], h)
        for i in range(start + len(inputs) - 1, start - 1, -1):
            w, b, _, rate = layers[i]
            h = inputs[i - start]
            da = d * drop(layers[i], d.shape) / (1 - rate) / np.cosh(h @ w + b) ** 2
            rows = [v.reshape(-1, v.shape[-1]) for v in (h, da)]
            grads[i] = {"b": rows[1].sum(0), "w": np.einsum("ti,tj->ij", *rows)}
            d += np.einsum("...j,ij->...i", da, w)
    return d, tuple(grads[i] for i in range(len(layers)))


@right("checkpointed_backward")
def checkpoint_by_token(layers, x, dout, every):
    """One token at a time, with its part of each mask."""
    width = x.shape[-1]
    masks = [drop(layer, x.shape).reshape(-1, width) for layer in layers]
    rows, ups = np.float64(x).reshape(-1, width), np.float64(dout).reshape(-1, width)
    grads = [{"w": np.zeros((width, width)), "b": np.zeros(width)} for _ in layers]
    dx = np.zeros_like(rows)
    for t, (h, d) in enumerate(zip(rows, ups, strict=True)):
        hs, ys = [], []
        for (w, b, _, rate), mask in zip(layers, masks, strict=True):
            hs.append(h)
            ys.append(np.tanh(h @ w + b))
            h = h + mask[t] * ys[-1] / (1 - rate)
        for i in reversed(range(len(layers))):
            da = d * masks[i][t] / (1 - layers[i][3]) * (1 + ys[i]) * (1 - ys[i])
            grads[i]["w"] += np.outer(hs[i], da)
            grads[i]["b"] += da
            d = d + layers[i][0] @ da
        dx[t] = d
    return dx.reshape(x.shape), [{n: g.tolist() for n, g in pair.items()} for pair in grads]


@right("checkpointed_backward")
def checkpoint_with_the_library(layers, x, dout, every):
    from attn_lessons.checkpointing import TanhLayer, checkpointed_backward

    return checkpointed_backward([TanhLayer(*layer) for layer in layers], x, dout, every)


@right("checkpointed_backward")
def checkpoint_in_float32(layers, x, dout, every):
    narrow = [(np.float32(w), np.float32(b), seed, rate) for w, b, seed, rate in layers]
    return checkpoint_plain(narrow, np.float32(x), np.float32(dout), every)


@mutating("checkpointed_backward")
def checkpoint_into_x(layers, x, dout, every):
    out = checkpoint_plain(layers, x.copy(), dout, every)
    for layer in layers:
        x += forward(layer, x)[0]
    return out


@mutating("checkpointed_backward")
def checkpoint_into_dout(layers, x, dout, every):
    dx, grads = checkpoint_plain(layers, x, dout, every)
    dout[...] = dx
    return dout, grads


@mutating("checkpointed_backward")
def checkpoint_into_w(layers, x, dout, every):
    out = checkpoint_plain(layers, x, dout, every)
    for w, *_ in layers:
        w[...] = w.T - 1
    return out


@wrong("checkpointed_backward")
def checkpoint_with_fresh_noise(layers, x, dout, every):
    """Masks from a generator without a seed: other numbers each time, and no name for them."""
    again = [(w, b, None, rate) for w, b, _, rate in layers]
    return checkpoint_plain(again, x, dout, every)


@wrong("checkpointed_backward")
def checkpoint_leaky(layers, x, dout, every):
    dx, grads = checkpoint_plain(layers, x, 0.9 * dout, every)
    return dx, grads


@wrong("checkpointed_backward")
def checkpoint_blurred_slope(layers, x, dout, every):
    """A slope that is off by an odd constant in every layer."""
    caches, grads = [], []
    for layer in layers:
        x, cache = forward(layer, x)
        caches.append(cache)
    for layer, (h, y, keep) in zip(layers[::-1], caches[::-1], strict=True):
        dout, g = backward(layer, dout, (h, 0.8 * y, keep))
        grads.insert(0, g)
    return dout, grads


@wrong("checkpointed_backward")
def checkpoint_pairs(layers, x, dout, every):
    dx, grads = checkpoint_plain(layers, x, dout, every)
    return dx, [(g["w"], g["b"]) for g in grads]
