"""Chapter 12: operations and bytes of attention, and a backward pass that recomputes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attn_lessons import checkpointing, cost
from attn_lessons.grading.catalogue._parts import named, right_factor, scattered
from attn_lessons.grading.exercise import Case, Exercise, Intermediate

CHAPTER = "ch12_memory"
SHAPES = f"{CHAPTER}.html#ch12-shapes"
FLOPS = f"{CHAPTER}.html#ch12-flops"
KEPT = f"{CHAPTER}.html#ch12-kept"
CHECKPOINT = f"{CHAPTER}.html#ch12-checkpoint"
DROPOUT = f"{CHAPTER}.html#ch12-dropout"

Array = np.ndarray
Answer = Callable[..., Any]
Rng = np.random.Generator
Plain = tuple[Array, Array, int, float]  # w, b, seed, rate


def _any(rng: Rng, *choices: int) -> int:
    return int(rng.choice(choices))


# --- attention_flops ----------------------------------------------------------------------------


def _flops_cases(rng: Rng) -> list[Case]:
    b, h, n, d = (_any(rng, *some) for some in ((2, 3), (5, 7), (100, 300, 600), (32, 48, 80)))
    sizes = (b, h, n, d)
    return [
        Case("one token", (1, 1, 1, d), hint="Two dot products of width d, of d multiply-adds."),
        Case("one head", (1, 1, n, d), hint="Two products over n × n: q kᵀ and p v."),
        Case("several heads", (1, h, n, d), hint="The width of a head is d: every head costs it."),
        Case("a batch", (*sizes, False, False), hint="Every sequence costs the same."),
        Case(
            "twice as long",
            (b, h, 2 * n, d),
            hint="Twice the tokens, four times the operations.",
        ),
        Case("causal", (*sizes, True), hint="Half of each product."),
        Case(
            "backward",
            (*sizes, False, True),
            hint="The backward pass alone: dv, dp, dq, dk, and the logits once more.",
        ),
        Case("backward and causal", (*sizes, True, True), hint="Half of each of the five."),
        Case(
            "a large model",
            (_any(rng, 3, 5), 40, _any(rng, 4096, 8192, 16384), 128, True, True),
            hint="Python's integers have room for it.",
        ),
        Case("no tokens", (b, h, 0, d, True), hint="Nothing to do."),
    ]


def _flops_by_products(
    b: int, h: int, n: int, d: int, causal: bool = False, backward: bool = False
) -> int:
    """The products written down as (rows, summed over, columns)."""
    forward = [(n, d, n), (n, n, d)]  # q kᵀ, p v
    # q kᵀ again, pᵀ dout, dout vᵀ, dz k, dzᵀ q
    back = [(n, d, n), (n, n, d), (n, d, n), (n, n, d), (n, n, d)]
    adds = sum(math.prod(product) for product in (back if backward else forward))
    operations = sum(2 * adds for _ in range(b * h))
    return operations // 2 if causal else operations


def _flops_with(
    forward: float = 2,
    back: float = 5,
    one: Callable[..., float] = lambda b, h, n, d: 2 * b * h * n * n * d,
    part: Callable[..., float] = lambda n, causal, backward: 0.5 if causal else 1,
    besides: Callable[..., float] = lambda b, h, n, d, backward: 0,
) -> Answer:
    """Products times what one costs, with a factor replaced."""

    def answer(b, h, n, d, causal=False, backward=False):
        count = (back if backward else forward) * one(b, h, n, d) * part(n, causal, backward)
        return count + besides(b, h, n, d, backward)

    return answer


def _softmax(each: int) -> Answer:
    return _flops_with(besides=lambda b, h, n, d, backward: each * b * h * n * n)


ATTENTION_FLOPS = Exercise(
    id="attention_flops",
    chapter=CHAPTER,
    title="Operations of attention",
    points=1,
    returns=("flops",),
    reference=cost.attention_flops,
    oracle=_flops_by_products,
    cases=_flops_cases,
    mistakes=(
        *named(
            "multiply-add counted once",
            "A multiply-add is two operations, one multiplication and one addition: so hardware is "
            "sold, and so are n × d by d × n products 2 n² d.",
            FLOPS,
            _flops_with(one=lambda b, h, n, d: b * h * n * n * d),
        ),
        *named(
            "backward counted as forward",
            "Each of the two products of the forward pass has two in the backward pass, one for "
            "each factor, and the logits are made again: 2.5 times the forward pass.",
            FLOPS,
            _flops_with(back=2),
            _flops_with(back=3),
        ),
        *named(
            "recomputation not counted",
            "p was not kept, so q kᵀ is made once more: five products, 2.5 times the forward pass. "
            "Four, twice the forward pass, are those of a backward pass that kept p.",
            FLOPS,
            _flops_with(back=4),
        ),
        *named(
            "three times the forward pass",
            "Six products are the forward pass and a backward pass that kept p, or a backward pass "
            "that makes p v again too. The backward pass alone has five: the output is there.",
            FLOPS,
            _flops_with(back=6),
        ),
        *named(
            "forward added to backward",
            "With backward=True the backward pass alone is asked for.",
            FLOPS,
            _flops_with(back=7),
        ),
        *named(
            "one product forward",
            "Forward there are two: q kᵀ and p v.",
            FLOPS,
            _flops_with(forward=1),
        ),
        *named(
            "causal not halved",
            "Under a causal mask half of each product is never needed.",
            FLOPS,
            _flops_with(part=lambda n, causal, backward: 1),
        ),
        *named(
            "causal halved forward only",
            "The masked half of p is 0, and so is that of dz: each product of the backward pass is "
            "halved as well.",
            FLOPS,
            _flops_with(part=lambda n, causal, backward: 0.5 if causal and not backward else 1),
        ),
        *named(
            "diagonal counted",
            "(n + 1)/(2n) of the entries are on or below the diagonal, and that is exact; asked "
            "for is the half, which published figures use.",
            FLOPS,
            _flops_with(part=lambda n, causal, backward: (n + 1) / (2 * n) if causal and n else 1),
            _flops_with(
                one=lambda b, h, n, d: 2 * b * h * n * d,
                part=lambda n, causal, backward: (n + 1) / 2 if causal else n,
            ),
        ),
        *named(
            "half below the diagonal",
            "n(n - 1)/2 entries are strictly below the diagonal, and every token sees itself too. "
            "Asked for is the half.",
            FLOPS,
            _flops_with(part=lambda n, causal, backward: (n - 1) / (2 * n) if causal and n else 1),
        ),
        *named(
            "causal a quarter",
            "Half of each product is left, not half of the rows and half of the columns.",
            FLOPS,
            _flops_with(part=lambda n, causal, backward: 0.25 if causal else 1),
        ),
        *named(
            "heads forgotten",
            "d is the width of one head, not of the model, and there are h of them.",
            SHAPES,
            _flops_with(one=lambda b, h, n, d: 2 * b * n * n * d),
            _flops_with(one=lambda b, h, n, d: 2 * b * h * n * n * (d // h)),
        ),
        *named(
            "heads counted twice",
            "d is the width of one head already: h heads of width d cost h n² d, not h n² (h d).",
            SHAPES,
            _flops_with(one=lambda b, h, n, d: 2 * b * h * n * n * h * d),
        ),
        *named(
            "batch forgotten",
            "There are b sequences, and each has its own products.",
            SHAPES,
            _flops_with(one=lambda b, h, n, d: 2 * h * n * n * d),
        ),
        *named(
            "linear in the tokens",
            "Each of n queries meets each of n keys: n² d.",
            FLOPS,
            _flops_with(one=lambda b, h, n, d: 2 * b * h * n * d),
        ),
        *named(
            "width squared instead of tokens",
            "n d² is a projection's share. Between q, k and v it is n² d.",
            FLOPS,
            _flops_with(one=lambda b, h, n, d: 2 * b * h * n * d * d),
        ),
        *named(
            "width forgotten",
            "Each entry of q kᵀ is a sum of d products.",
            FLOPS,
            _flops_with(one=lambda b, h, n, d: 2 * b * h * n * n),
        ),
        *named(
            "projections counted",
            "The four projections, 8 n c² forward, are not attention's: what is asked for lies "
            "between q, k, v and out.",
            FLOPS,
            _flops_with(
                besides=lambda b, h, n, d, backward: (16 if backward else 8) * b * n * (h * d) ** 2
            ),
            _flops_with(besides=lambda b, h, n, d, backward: 8 * b * n * (h * d) ** 2),
        ),
        *named(
            "softmax counted",
            "Only products count. The softmax does a few operations for each number it reads, and "
            "what it costs is the reading.",
            FLOPS,
            *(_softmax(each) for each in (1, 2, 3, 4, 5)),
        ),
    ),
)


# --- attention_bytes ----------------------------------------------------------------------------


def _bytes_cases(rng: Rng) -> list[Case]:
    b, h, n, d = (_any(rng, *some) for some in ((2, 3), (5, 7), (100, 300, 600), (32, 48, 80)))
    sizes = (b, h, n, d)
    return [
        Case("one token", (1, 1, 1, d), hint="q, k, v of width d, and one probability."),
        Case("one head", (1, 1, n, d), hint="q, k, v, and the n × n probabilities; float32."),
        Case("several heads", (1, h, n, d), hint="Each head has an n × n array of its own."),
        Case("a batch", sizes, hint="Each sequence keeps its own."),
        Case("half precision", (*sizes, 2), hint="A number of 16 bit has two bytes."),
        Case("double precision", (*sizes, 8, False), hint="A float64 has eight."),
        Case(
            "flash with one head",
            (1, 1, n, d, 4, True),
            hint="q, k, v, out, and one number a row.",
        ),
        Case("flash", (*sizes, 4, True), hint="Nothing of size n² is left."),
        Case(
            "flash in half precision",
            (*sizes, 2, True),
            hint="The log-sum-exp stays float32: four bytes a row.",
        ),
        Case(
            "flash in double precision",
            (*sizes, 8, True),
            hint="Here too a row's log-sum-exp is counted with four bytes.",
        ),
        Case(
            "a long sequence",
            (1, 32, _any(rng, 16384, 32768, 65536), 128, 2),
            hint="Gigabytes, nearly all of them n².",
        ),
        Case(
            "a long sequence with flash",
            (1, 32, _any(rng, 16384, 32768, 65536), 128, 2, True),
            hint="A thousandth of it.",
        ),
        Case("no tokens", (b, h, 0, d), hint="Nothing is kept."),
    ]


def _bytes_by_arrays(b: int, h: int, n: int, d: int, itemsize: int = 4, flash: bool = False) -> int:
    """The arrays that are kept, each with the bytes of one of its numbers."""
    wide, row, square = (b, h, n, d), (b, h, n, 1), (b, h, n, n)
    kept = [(wide, itemsize) for _ in ("q", "k", "v")]
    kept += [(wide, itemsize), (row, 4)] if flash else [(square, itemsize)]
    return sum(math.prod(shape) * size for shape, size in kept)


def _bytes_with(
    wide: int = 3,
    square: float = 1,
    flash_wide: int = 4,
    row: Callable[[int, int], float] = lambda e, d: 4,
    size: Callable[[int], float] = lambda e: e,
    heads: Callable[..., float] = lambda b, h: b * h,
    ones: float = 0,
    tiled: bool = True,
) -> Answer:
    """Arrays of width d, n × n arrays, a row's number; with a count replaced."""

    def answer(b, h, n, d, itemsize=4, flash=False):
        e, each = size(itemsize), heads(b, h)
        if flash and tiled:
            return each * n * (flash_wide * d * e + row(itemsize, d))
        return each * n * (wide * d * e + square * n * e + ones * n)

    return answer


def _one_square(b, h, n, d, itemsize=4, flash=False):
    """Right, but for an n × n array that all heads share."""
    if flash:
        return cost.attention_bytes(b, h, n, d, itemsize, True)
    return itemsize * b * (3 * h * n * d + n * n)


def _flash_keeps_both(b, h, n, d, itemsize=4, flash=False):
    plain = cost.attention_bytes(b, h, n, d, itemsize)
    return plain + 4 * b * h * n if flash else plain


def _only_squares(b, h, n, d, itemsize=4, flash=False):
    if flash:
        return cost.attention_bytes(b, h, n, d, itemsize, True)
    return itemsize * b * h * n * n


ATTENTION_BYTES = Exercise(
    id="attention_bytes",
    chapter=CHAPTER,
    title="Bytes that attention keeps",
    points=1,
    returns=("bytes",),
    reference=cost.attention_bytes,
    oracle=_bytes_by_arrays,
    cases=_bytes_cases,
    mistakes=(
        *named(
            "probabilities forgotten",
            "dv = pᵀ dout and the softmax's gradient read p: plain attention keeps its n × n.",
            KEPT,
            _bytes_with(square=0),
        ),
        *named(
            "q, k and v forgotten",
            "dq, dk and dp read k, q and v: they are kept beside the probabilities.",
            KEPT,
            _only_squares,
        ),
        *named(
            "logits kept too",
            "The softmax's gradient needs p alone: of the two n × n arrays only the probabilities "
            "are kept.",
            KEPT,
            _bytes_with(square=2),
        ),
        *named(
            "output kept too",
            "The plain backward pass does not read out: it has p, and rowsum(p ∘ dp) is made of "
            "that. It is flash that keeps the output.",
            KEPT,
            _bytes_with(wide=4),
        ),
        *named(
            "dropout mask counted",
            "There is no dropout here; with it, another byte for each of the n × n entries.",
            KEPT,
            _bytes_with(ones=1),
        ),
        *named(
            "flash not used",
            "With flash=True no n × n array is kept: the probabilities are made again.",
            KEPT,
            _bytes_with(tiled=False),
        ),
        *named(
            "flash keeps the probabilities",
            "The log-sum-exp stands in for the probabilities; it does not come on top of them.",
            KEPT,
            _flash_keeps_both,
        ),
        *named(
            "output forgotten",
            "With flash the output is kept too: without p, rowsum(p ∘ dp) is made as "
            "rowsum(out ∘ dout).",
            KEPT,
            _bytes_with(flash_wide=3),
        ),
        *named(
            "log-sum-exp forgotten",
            "Each row keeps one number more, with which its probabilities can be made again.",
            KEPT,
            _bytes_with(row=lambda e, d: 0),
        ),
        *named(
            "log-sum-exp in the inputs' precision",
            "The log-sum-exp stays float32 whatever the inputs are: four bytes a row.",
            KEPT,
            _bytes_with(row=lambda e, d: e),
        ),
        *named(
            "maximum and sum kept",
            "log-sum-exp is both in one: max + log(sum). One number a row, not two.",
            KEPT,
            _bytes_with(row=lambda e, d: 8),
            _bytes_with(row=lambda e, d: 2 * e),
        ),
        *named(
            "log-sum-exp as wide as a head",
            "The log-sum-exp is one number a row, not one for each of d columns.",
            KEPT,
            _bytes_with(row=lambda e, d: 4 * d),
            _bytes_with(flash_wide=5, row=lambda e, d: 0),
        ),
        *named(
            "numbers counted, not bytes",
            "Every number takes itemsize bytes.",
            SHAPES,
            _bytes_with(size=lambda e: 1),
            _bytes_with(size=lambda e: 1, row=lambda e, d: 1),
        ),
        *named(
            "bits for bytes",
            "itemsize is in bytes, and bytes are asked for.",
            SHAPES,
            _bytes_with(size=lambda e: 8 * e),
            _bytes_with(size=lambda e: 8 * e, row=lambda e, d: 32),
            _bytes_with(size=lambda e: e / 8, row=lambda e, d: 0.5),
        ),
        *named(
            "itemsize not used",
            "itemsize is an argument; 4 is its default only.",
            SHAPES,
            _bytes_with(size=lambda e: 4),
            _bytes_with(size=lambda e: 2),
        ),
        *named(
            "one n × n array for all heads",
            "Each head has probabilities of its own: h arrays of n × n.",
            SHAPES,
            _one_square,
        ),
        *named(
            "heads forgotten",
            "d is the width of one head, and there are h of them.",
            SHAPES,
            _bytes_with(heads=lambda b, h: b),
        ),
        *named(
            "batch forgotten",
            "There are b sequences, and each keeps its own.",
            SHAPES,
            _bytes_with(heads=lambda b, h: h),
        ),
        *named(
            "half of the probabilities",
            "Nothing was said of a mask; and plain attention keeps the zeros of a causal one too.",
            KEPT,
            _bytes_with(square=0.5),
        ),
    ),
)


# --- checkpointed_backward ----------------------------------------------------------------------


def _layers(
    rng: Rng, depth: int, width: int, rates: Sequence[float] = (0.0,), dtype: type = np.float64
) -> list[Plain]:
    """A stack of (w, b, seed, rate); of the rates each in turn."""
    seeds = rng.choice(10_000, depth, replace=False)
    return [
        (
            (rng.normal(size=(width, width)) / width**0.5).astype(dtype),
            rng.normal(scale=0.5, size=width).astype(dtype),
            int(seeds[i]),
            float(rates[i % len(rates)]),
        )
        for i in range(depth)
    ]


def _checkpoint_cases(rng: Rng) -> list[Case]:
    def call(
        shape: tuple[int, ...],
        depth: int,
        every: int,
        *rates: float,
        dtype: type = np.float64,
        change: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Any, ...]:
        layers = _layers(rng, depth, shape[-1], rates or (0.0,), dtype)
        x, dout = rng.normal(size=(2, *shape)).astype(dtype)
        return [(change(w), b, s, r) for w, b, s, r in layers], change(x), change(dout), every

    def narrow() -> tuple[Any, ...]:
        """One column, and no tanh near ±1: a gradient of one number has to keep its digits."""
        layers, x, dout, every = call((5, 1), 3, 2)
        mild = [(0.3 * np.tanh(w) + 0.4, 0.3 * np.tanh(b), s, r) for w, b, s, r in layers]
        return mild, np.tanh(x), dout, every

    return [
        Case("one layer", call((3, 5), 1, 1), hint="L = 1: its input is x itself."),
        Case(
            "dropout in one layer",
            call((3, 5), 1, 1, 0.4),
            hint="The mask is default_rng(seed).random(x.shape) >= rate.",
        ),
        Case("one segment", call((3, 5), 2, 2), hint="Two layers, both in one segment."),
        Case(
            "dropout in every layer",
            call((2, 3, 7), 4, 2, 0.3, 0.5),
            hint="Each layer has its own seed. The second forward pass drops what the first did.",
        ),
        Case("segments of one layer", call((3, 4), 3, 1), hint="Every layer's input is kept."),
        Case(
            "two segments",
            call((2, 3, 7), 4, 2),
            hint="Layers 0 and 1, then 2 and 3; backward the other way round.",
        ),
        Case(
            "a short last segment",
            call((3, 5), 5, 2),
            hint="Segments of 2, 2 and 1 layers.",
        ),
        Case(
            "a segment longer than the stack",
            call((2, 4), 3, 7),
            hint="L = 3, every = 7: one segment of three layers.",
        ),
        Case("one token", call((1, 4), 4, 3), hint="x has shape (1, 4)."),
        Case("width 1", narrow(), hint="w has shape (1, 1)."),
        Case(
            "several axes",
            call((2, 1, 2, 5), 3, 2),
            hint="dw and db add up over all axes but the last.",
        ),
        Case(
            "dropout and a short last segment",
            call((3, 5), 5, 3, 0.25, 0.0, 0.5),
            hint="Segments of 3 and 2 layers, one rate in three being 0.",
        ),
        Case(
            "not contiguous in memory",
            call((2, 3, 6), 3, 2, change=scattered),
            hint="The same kind of numbers in another memory order.",
        ),
        Case(
            "float32 input with dropout",
            call((3, 4), 3, 2, 0.4, dtype=np.float32),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _checkpoint_by_complex_step(
    layers: Sequence[Plain], x: Array, dout: Array, every: int
) -> tuple[Array, list[dict[str, Array]]]:
    """Every entry of every argument moved by a small imaginary number, all of them at once."""
    x, dout = np.asarray(x, float), np.asarray(dout, float)
    moved = [x, *(np.asarray(a, float) for w, b, _, _ in layers for a in (w, b))]
    count, step = sum(a.size for a in moved), 1e-30
    copies, at = [], 0
    for a in moved:
        many = np.broadcast_to(a.astype(complex), (count, *a.shape)).copy()
        flat = many.reshape(count, a.size)
        flat[at + np.arange(a.size), np.arange(a.size)] += 1j * step
        copies.append(many)
        at += a.size
    # One copy of the whole stack a row; tokens in a row of their own.
    out, width = copies[0].reshape(count, -1, x.shape[-1]), x.shape[-1]
    for number, (_, _, seed, rate) in enumerate(layers):
        w, b = copies[1 + 2 * number], copies[2 + 2 * number]
        draw = np.random.default_rng(seed).random(x.shape).reshape(-1, width)
        out = out + np.tanh(out @ w + b[:, None]) * (draw >= rate) / (1 - rate)
    slopes = (out.reshape(count, -1) @ dout.ravel()).imag / step
    parts = np.split(slopes, np.cumsum([a.size for a in moved])[:-1])
    dx, *rest = (part.reshape(a.shape) for part, a in zip(parts, moved, strict=True))
    return dx, [{"w": w, "b": b} for w, b in zip(rest[::2], rest[1::2], strict=True)]


class _Stack:
    """A right checkpointed backward pass, line by line; a mistake overrides a line."""

    def keep(self, layers, i, shape, when):
        """What dropout keeps in layer i; when is 0 forward, 1 again, 2 in the backward pass."""
        return np.random.default_rng(layers[i][2]).random(shape) >= layers[i][3]

    def scale(self, rate, when):
        return 1 / (1 - rate)

    def out(self, x, dropped, keep, scale, when):
        return x + dropped

    def slope(self, a, y, dropped):
        return 1 - y * y

    def dy(self, dout, keep, scale):
        return np.where(keep, dout, 0) * scale

    def dw(self, x, da):
        return np.tensordot(x, da, axes=(tuple(range(x.ndim - 1)),) * 2)

    def db(self, da, dout):
        return da.sum(axis=tuple(range(da.ndim - 1)))

    def dx(self, dout, dy, da, w):
        return dout + da @ w.T

    def segments(self, n, every):
        return [(s, min(s + every, n)) for s in range(0, n, every)]

    def start(self, kept, number, x, out):
        return kept[number]

    def order(self, segments):
        return list(enumerate(segments))[::-1]

    def within(self, start, end):
        return range(start, end)[::-1]

    def given(self, dout, dx):
        return dx

    def returned(self, grads, segments):
        return [grads[i] for i in sorted(grads)]


def _stack_with(**lines: Callable[..., Any]) -> Answer:
    parts: Any = _Stack()
    for name, line in lines.items():
        setattr(parts, name, line)

    def forward(layers, i, x, when):
        w, b, _, rate = layers[i]
        a = x @ w + b
        y = np.tanh(a)
        keep, scale = parts.keep(layers, i, y.shape, when), parts.scale(rate, when)
        dropped = np.where(keep, y, 0) * scale
        return parts.out(x, dropped, keep, scale, when), (x, a, y, dropped)

    def answer(layers, x, dout, every):
        segments = parts.segments(len(layers), every)
        kept, h = [], x
        for i in range(len(layers)):
            if any(i == start for start, _ in segments):
                kept.append(h)
            h, _ = forward(layers, i, h, 0)
        dx, grads = dout, {}
        for number, (start, end) in parts.order(segments):
            again, caches = parts.start(kept, number, x, h), {}
            for i in range(start, end):
                again, caches[i] = forward(layers, i, again, 1)
            d = parts.given(dout, dx)
            for i in parts.within(start, end):
                w, _, _, rate = layers[i]
                inputs, a, y, dropped = caches[i]
                keep = parts.keep(layers, i, y.shape, 2)
                dy = parts.dy(d, keep, parts.scale(rate, 2))
                da = dy * parts.slope(a, y, dropped)
                grads[i] = {"w": parts.dw(inputs, da), "b": parts.db(da, d)}
                d = parts.dx(d, dy, da, w)
            dx = d
        return dx, parts.returned(grads, segments)

    return answer


def _drawn(times: Sequence[int]) -> Callable[..., Array]:
    """Masks that a layer's generator goes on drawing: which of them, forward, again, backward."""

    def keep(layers, i, shape, when):
        rng = np.random.default_rng(layers[i][2])
        draws = [rng.random(shape) for _ in range(times[when])]
        return draws[-1] >= layers[i][3]

    return keep


def _one_generator(layers, i, shape, when):
    """Of the first layer's generator the draw with the layer's number."""
    rng = np.random.default_rng(layers[0][2])
    return [rng.random(shape) for _ in range(i + 1)][-1] >= layers[i][3]


def _drawn_otherwise(draw: Callable[..., Array]) -> Callable[..., Array]:
    return lambda layers, i, shape, when: draw(layers[i][2], shape, layers[i][3])


def _all_kept_again(layers, i, shape, when):
    if when == 0:
        return _Stack().keep(layers, i, shape, when)
    return np.ones(shape, bool)


def _whole_segments(n, every):
    return [(s * every, (s + 1) * every) for s in range(n // every)]


def _overlapping(n, every):
    return [(s, min(s + every + 1, n)) for s in range(0, n, every)]


def _zeros_where_missing(layers, x, dout, every):
    """Gradients made of zeros beforehand, and filled in for whole segments only."""
    dx, grads = _stack_with(segments=_whole_segments)(layers, x, dout, every)
    rest = [{"w": np.zeros_like(w), "b": np.zeros_like(b)} for w, b, _, _ in layers[len(grads) :]]
    return dx, grads + rest


def _after(layers, x, dout, every):
    """The stack's last segment alone: its dx, and nobody goes on from there."""
    return _stack_with(order=lambda segments: list(enumerate(segments))[-1:])(
        layers, x, dout, every
    )


def _first_axis_only(da, dout):
    return da.sum(axis=0)


CHECKPOINT_MISTAKES = (
    *named(
        "dropout not replayed",
        "The second forward pass has to drop what the first one did: a mask drawn anew is another "
        "network's. Make the generator again from the layer's seed, each time.",
        DROPOUT,
        _stack_with(keep=_drawn((1, 2, 2))),
        _stack_with(keep=_drawn((1, 2, 3))),
        _stack_with(keep=_drawn((1, 1, 2))),
    ),
    *named(
        "recomputed without dropout",
        "Nothing is dropped the second time, as in evaluation: the caches are those of another "
        "network than the one whose output was seen.",
        DROPOUT,
        _stack_with(keep=_all_kept_again, scale=lambda rate, when: 1 if when else 1 / (1 - rate)),
        _stack_with(keep=_all_kept_again),
    ),
    *named(
        "dropout forgotten",
        "A layer with rate > 0 drops entries of tanh(xw + b), forward and backward.",
        DROPOUT,
        _stack_with(
            keep=lambda layers, i, shape, when: np.ones(shape, bool), scale=lambda rate, when: 1
        ),
    ),
    *named(
        "mask not applied in the backward pass",
        "What was dropped had no say in the output and gets no gradient.",
        DROPOUT,
        _stack_with(dy=lambda dout, keep, scale: dout * scale),
        _stack_with(dy=lambda dout, keep, scale: dout),
    ),
    *named(
        "1/(1-rate) forgotten",
        "What is kept is divided by 1 - rate, forward, when recomputed, and in its gradient.",
        DROPOUT,
        _stack_with(scale=lambda rate, when: 1),
        _stack_with(scale=lambda rate, when: 1 if when == 2 else 1 / (1 - rate)),
        _stack_with(scale=lambda rate, when: 1 / (1 - rate) if when == 2 else 1),
    ),
    *named(
        "multiplied by 1-rate",
        "What is kept is divided by 1 - rate, so that the mean stays.",
        DROPOUT,
        _stack_with(scale=lambda rate, when: 1 - rate),
    ),
    *named(
        "kept and dropped exchanged",
        "An entry is kept where the random number is at least rate: 1 - rate of them.",
        DROPOUT,
        _stack_with(keep=_drawn_otherwise(lambda s, z, r: np.random.default_rng(s).random(z) < r)),
        _stack_with(
            keep=_drawn_otherwise(
                lambda s, z, r: (np.random.default_rng(s).random(z) < r) | (r == 0)
            )
        ),
    ),
    *named(
        "mask drawn in another way",
        "As good a mask, but not this layer's: it keeps an entry where "
        "np.random.default_rng(seed).random(x.shape) >= rate.",
        DROPOUT,
        _stack_with(
            keep=_drawn_otherwise(lambda s, z, r: np.random.default_rng(s).random(z) < 1 - r)
        ),
        _stack_with(
            keep=_drawn_otherwise(lambda s, z, r: np.random.RandomState(s).random_sample(z) >= r)
        ),
        _stack_with(
            keep=_drawn_otherwise(
                lambda s, z, r: np.random.default_rng(s).random(z, dtype=np.float32) >= r
            )
        ),
        _stack_with(
            keep=_drawn_otherwise(
                lambda s, z, r: np.random.default_rng(s).binomial(1, 1 - r, z) == 1
            )
        ),
    ),
    *named(
        "one mask for all tokens",
        "The mask has x's shape: each token drops its own entries.",
        DROPOUT,
        _stack_with(
            keep=_drawn_otherwise(
                lambda s, z, r: np.broadcast_to(np.random.default_rng(s).random(z[-1]) >= r, z)
            )
        ),
    ),
    *named(
        "one seed for all layers",
        "Each layer draws from its own seed, the third entry of its tuple.",
        DROPOUT,
        _stack_with(
            keep=lambda layers, i, shape, when: (
                np.random.default_rng(layers[0][2]).random(shape) >= layers[i][3]
            )
        ),
        _stack_with(keep=_one_generator),
    ),
    *named(
        "segments run from x",
        "A segment is run again from its own input, which the forward pass kept: that of its first "
        "layer.",
        CHECKPOINT,
        _stack_with(start=lambda kept, number, x, out: x),
    ),
    *named(
        "segment run from its output",
        "A segment is run again from the input of its first layer, not from what comes after its "
        "last.",
        CHECKPOINT,
        _stack_with(start=lambda kept, number, x, out: [*kept[1:], out][number]),
    ),
    *named(
        "segment run from the one before it",
        "The input kept for segment i belongs to segment i: count both from the same end.",
        CHECKPOINT,
        _stack_with(start=lambda kept, number, x, out: kept[max(number - 1, 0)]),
        _stack_with(start=lambda kept, number, x, out: kept[::-1][number]),
    ),
    *named(
        "segments in forward order",
        "The gradient comes from the output: the last segment is run first.",
        CHECKPOINT,
        _stack_with(order=lambda segments: list(enumerate(segments))),
    ),
    *named(
        "layers of a segment in forward order",
        "Within a segment too the backward pass goes from the last layer to the first.",
        CHECKPOINT,
        _stack_with(within=range),
    ),
    *named(
        "dout given to every segment",
        "The upstream gradient of a segment is the dx of the one behind it; only the last gets "
        "dout.",
        CHECKPOINT,
        _stack_with(given=lambda dout, dx: dout),
    ),
    *named(
        "only the last segment",
        "All segments are run, from the last to the first, and each leaves its layers' gradients.",
        CHECKPOINT,
        _after,
    ),
    *named(
        "short last segment left out",
        "L need not be a multiple of every: the last segment is as short as it comes.",
        CHECKPOINT,
        _stack_with(segments=_whole_segments),
        _zeros_where_missing,
    ),
    *named(
        "segments overlap",
        "Segment i has layers i·every to (i + 1)·every - 1: the next one is not part of it.",
        CHECKPOINT,
        _stack_with(segments=_overlapping),
    ),
    *named(
        "gradients in the order of the backward pass",
        "grads stand in the layers' order, layer 0 first; the backward pass meets them the other "
        "way round.",
        CHECKPOINT,
        _stack_with(returned=lambda grads, segments: list(grads.values())),
    ),
    *named(
        "segments' gradients in reverse",
        "grads stand in the layers' order: a segment's come before those that are there already.",
        CHECKPOINT,
        _stack_with(
            returned=lambda grads, segments: [
                grads[i] for start, end in segments[::-1] for i in range(start, end)
            ]
        ),
    ),
    *named(
        "skip path dropped in the backward pass",
        "out = x + …: dx is dout itself, and what comes through tanh on top.",
        CHECKPOINT,
        _stack_with(dx=lambda dout, dy, da, w: da @ w.T),
    ),
    *named(
        "skip path dropped in the forward pass",
        "The layer is residual: out = x + keep ∘ tanh(xw + b)/(1 - rate).",
        CHECKPOINT,
        _stack_with(out=lambda x, dropped, keep, scale, when: dropped),
        _stack_with(out=lambda x, dropped, keep, scale, when: dropped if when else x + dropped),
        _stack_with(
            out=lambda x, dropped, keep, scale, when: dropped, dx=lambda dout, dy, da, w: da @ w.T
        ),
    ),
    *named(
        "dropout on the skip path too",
        "What is dropped is tanh's output; x goes past it.",
        DROPOUT,
        _stack_with(dx=lambda dout, dy, da, w: dy + da @ w.T),
        _stack_with(
            out=lambda x, dropped, keep, scale, when: np.where(keep, x, 0) * scale + dropped,
            dx=lambda dout, dy, da, w: dy + da @ w.T,
        ),
    ),
    *named(
        "tanh′ of the input",
        "tanh′(a) = 1 - tanh²(a): with y = tanh(a) it is 1 - y², not 1 - a².",
        CHECKPOINT,
        _stack_with(slope=lambda a, y, dropped: 1 - a * a),
        _stack_with(slope=lambda a, y, dropped: 1 - np.tanh(y) ** 2),
    ),
    *named(
        "tanh′ after dropout",
        "1 - y² takes y as tanh gave it, before dropout and before the division by 1 - rate.",
        DROPOUT,
        _stack_with(slope=lambda a, y, dropped: 1 - dropped * dropped),
    ),
    *named(
        "1 + y²",
        "tanh′ = 1 - y²: it is 1 at 0 and falls to both sides.",
        CHECKPOINT,
        _stack_with(slope=lambda a, y, dropped: 1 + y * y),
    ),
    *named(
        "tanh′ forgotten",
        "Between y and xw + b lies tanh, whose derivative is 1 - y².",
        CHECKPOINT,
        _stack_with(slope=lambda a, y, dropped: 1.0),
    ),
    *named(
        "w not transposed",
        "dx = dout + da wᵀ. w is square, so that no shape tells.",
        CHECKPOINT,
        _stack_with(dx=lambda dout, dy, da, w: dout + da @ w),
    ),
    *named(
        "dw transposed",
        "dw = xᵀ da. w is square, so that no shape tells.",
        CHECKPOINT,
        _stack_with(dw=lambda x, da: _Stack().dw(da, x)),
    ),
    *named(
        "dw and db averaged",
        "Gradients of parameters add up over the tokens.",
        CHECKPOINT,
        _stack_with(
            dw=lambda x, da: _Stack().dw(x, da) / (x.size / x.shape[-1]),
            db=lambda da, dout: da.mean(axis=tuple(range(da.ndim - 1))),
        ),
        _stack_with(db=lambda da, dout: da.mean(axis=tuple(range(da.ndim - 1)))),
        _stack_with(dw=lambda x, da: _Stack().dw(x, da) / (x.size / x.shape[-1])),
    ),
    *named(
        "db summed over the first axis only",
        "b is added at every position of every sequence: db adds up over all axes but the last.",
        CHECKPOINT,
        _stack_with(db=_first_axis_only),
    ),
    *named(
        "db from dout",
        "b stands inside tanh: its gradient is that of xw + b, da, added up.",
        CHECKPOINT,
        _stack_with(db=lambda da, dout: _Stack().db(dout, dout)),
    ),
)


def _on_the_way(layers: Sequence[Plain], x: Array, dout: Array) -> list[tuple[Array, Array]]:
    """Each layer's input and the gradient by its xw + b, tokens as rows."""
    width, stack = x.shape[-1], [checkpointing.TanhLayer(*layer) for layer in layers]
    _, caches = checkpointing.stack_forward(stack, np.asarray(x, float))
    d, found = np.asarray(dout, float), []
    for layer, cache in zip(stack[::-1], caches[::-1], strict=True):
        da = np.where(cache.keep, d, 0) / (1 - layer.rate) * (1 - cache.y**2)
        found.append((cache.x.reshape(-1, width), da.reshape(-1, width)))
        d, _ = layer.backward(d, cache)
    return found[::-1]


MOST_LAYERS = 5


def _gradient_inside(layer: int) -> Intermediate:
    """The gradient by xw + b of a layer, solved from its dw; of no rows where there is none."""

    def there(given: dict[str, Any]) -> tuple[Array, Array]:
        found = _on_the_way(given["layers"], given["x"], given["dout"])
        return found[layer] if layer < len(found) else (np.zeros((0, 1)), np.zeros((0, 1)))

    return Intermediate(
        f"da of layer {layer}",
        lambda **given: there(given)[1],
        {f"grads[{layer}]['w']": lambda dw, **given: right_factor(there(given)[0].T, dw)},
    )


CHECKPOINTED_BACKWARD = Exercise(
    id="checkpointed_backward",
    chapter=CHAPTER,
    title="A backward pass that recomputes",
    points=4,
    returns=("dx", "grads"),
    reference=checkpointing.checkpointed_backward,
    oracle=_checkpoint_by_complex_step,
    cases=_checkpoint_cases,
    tokens=("dx",),
    intermediates=tuple(_gradient_inside(layer) for layer in reversed(range(MOST_LAYERS))),
    mistakes=CHECKPOINT_MISTAKES,
)

EXERCISES = (ATTENTION_FLOPS, ATTENTION_BYTES, CHECKPOINTED_BACKWARD)
