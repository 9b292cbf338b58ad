"""Where memory and time go: this processor's roofline, attention's peak memory, recomputation.

All in float32 on one core. Measured are

- ``roofline``: the operations a second of a large product and the bytes a second of long arrays
  that are read and written, which make the roof; and what the library's pieces reach under it:
  operations and bytes are counted (attn_lessons.cost), seconds measured. Softmax and the sum of two
  arrays have no product in them: five operations and one for each number;
- ``backward``: the time of a backward pass over its forward pass, where the count of operations
  says 2, or 2.5 with the logits made again;
- ``peak``: peak memory of causal attention over n, forward alone and with the backward pass: all at
  once, in chunks of queries whose probabilities are made again, and in tiles;
- ``depth``: a stack of 64 tanh layers whose cache is its output, with an input kept every so many
  layers: peak memory and time beside the plain backward pass (Chen et al. 2016);
- ``blocks``: the same for encoder blocks with dropout from a seed, whose cache is many times their
  input.

Times are processor seconds, where ``user`` stands without the system's share, which is the handing
out of fresh memory; sides take turns and the median over rounds is given, for a ratio the
median of the rounds' ratios. The roof is the best of the rounds, since others' work can only lower
it. Peak memory is a fresh process's (peak.py); what is returned is part of it, and given beside.

Run as ``python benchmarks/memory.py`` (some minutes); ``--quick`` prints small sizes, writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import machine
import numpy as np
from peak import apart, peak, warm_blas
from threadpoolctl import threadpool_limits

from attn_lessons import cost, streaming
from attn_lessons.attention import attention_backward, attention_forward, causal_mask
from attn_lessons.checkpointing import (
    checkpointed_backward,
    sqrt_schedule,
    stack_backward,
    stack_forward,
)
from attn_lessons.flash import numpy_tiles
from attn_lessons.multihead import linear_backward, linear_forward
from attn_lessons.softmax import softmax
from attn_lessons.transformer import (
    encoder_block_backward_cached,
    encoder_block_forward,
    init_encoder_block,
)

Step = Callable[[], Any]

D = 64
CHUNK = 256
FITTED = 3  # points, the largest n, to which a slope is fitted
ITEMSIZE = 4
USER = "user "

SIZES = {
    "attention": 4096,
    "product": 2048,
    "array": 64 * 2**20,  # bytes: several would not fit any cache here
    "peak": (256, 512, 1024, 2048, 4096, 8192),
    "depth": 64,
    "tokens": 8192,
    "every": (1, 2, 4, 8, 16, 32, 64),
    "blocks": 16,
    "batch": 4,
    "blocks_every": (1, 2, 4, 8, 16),
    "seconds": 55.0,
}
QUICK = {
    "attention": 512,
    "product": 256,
    "array": 2**20,
    "peak": (256, 512, 1024),
    "depth": 16,
    "tokens": 256,
    "every": (1, 4, 16),
    "blocks": 4,
    "batch": 1,
    "blocks_every": (1, 2, 4),
    "seconds": 0.2,
}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


# --- time ----------------------------------------------------------------------------------------


def rounds(steps: dict[str, Step], seconds: float) -> list[dict[str, float]]:
    """Processor seconds of each step, in turn, at least three times; another first each time."""
    for step in steps.values():
        step()
    names, found = list(steps), list[dict[str, float]]()
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        turn, taken = len(found) % len(names), dict[str, float]()
        for name in [*names[turn:], *names[:turn]]:
            taken[name], taken[USER + name] = timed(steps[name])
        found.append(taken)
    return found


def timed(step: Step) -> tuple[float, float]:
    """Processor seconds, and those of them outside the system."""
    begun = time.process_time()
    user = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    step()
    user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - user
    return time.process_time() - begun, user


def median(found: list[dict[str, float]], name: str, over: str | None = None) -> float:
    each = [r[name] / (r[over] if over else 1) for r in found]
    return float(f"{statistics.median(each):.4g}")


def slope(points: dict[str, int]) -> float:
    """The exponent of n over the last few lengths."""
    ends = sorted(map(int, points))[-FITTED:]
    line = np.polyfit(np.log(ends), np.log([points[str(n)] for n in ends]), 1)
    return round(float(line[0]), 2)


# --- the roofline --------------------------------------------------------------------------------


class Piece(NamedTuple):
    step: Step
    flops: int
    moved: int


def pieces(size: dict[str, Any]) -> dict[str, Piece]:
    rng, n, m = np.random.default_rng(0), size["attention"], size["product"]
    q, k, v = (normal(rng, 1, 1, n, D) for _ in range(3))
    square, other = normal(rng, m, m), normal(rng, m, m)
    x, w = normal(rng, n, 512), normal(rng, 512, 512)
    z = normal(rng, n, n)
    matrices, row = [normal(rng, n, n) for _ in range(2)], normal(rng, 1, n)
    count = size["array"] // ITEMSIZE
    one, two, three = (normal(rng, count) for _ in range(3))
    block = numpy_tiles.BLOCK
    attention = cost.attention_flops(1, 1, n, D)
    return {
        "product": Piece(lambda: square @ other, 2 * m**3, ITEMSIZE * 3 * m * m),
        "copy": Piece(lambda: np.copyto(two, one), 0, 2 * size["array"]),
        "read": Piece(lambda: one @ two, 2 * count, 2 * size["array"]),
        "add": Piece(lambda: np.add(one, two, out=three), count, 3 * size["array"]),
        "naive": Piece(
            lambda: attention_forward(q, k, v), attention, cost.attention_traffic(1, 1, n, D)
        ),
        "tiles": Piece(
            lambda: numpy_tiles.flash_forward(q, k, v, block),
            attention,
            cost.attention_traffic(1, 1, n, D, block=block),
        ),
        "projection": Piece(
            lambda: x @ w, cost.linear_flops(n, 512, 512), ITEMSIZE * (2 * x.size + w.size)
        ),
        "softmax": Piece(lambda: softmax(z), 5 * z.size, 2 * z.nbytes),
        "one_token": Piece(
            lambda: [row @ matrix for matrix in matrices],
            2 * cost.linear_flops(1, n, n),
            2 * matrices[0].nbytes + 4 * row.nbytes,
        ),
    }


ROOF = ("copy", "read", "add")


def roofline(size: dict[str, Any]) -> dict[str, Any]:
    found = pieces(size)
    times = rounds({name: piece.step for name, piece in found.items()}, size["seconds"])
    best = {name: min(r[name] for r in times) for name in found}
    peak_flops = found["product"].flops / best["product"]
    bandwidth = max(found[name].moved / best[name] for name in ROOF)
    table = {}
    for name, piece in found.items():
        seconds = median(times, name)
        row: dict[str, Any] = {"flops": piece.flops, "bytes": piece.moved, "seconds": seconds}
        if piece.flops:
            roof = cost.attainable_flops(piece.flops, piece.moved, peak_flops, bandwidth)
            row["flops_per_s"] = float(f"{piece.flops / seconds:.4g}")
            row["share_of_roof"] = round(piece.flops / seconds / roof, 3)
        table[name] = row
    return {
        "n": size["attention"],
        "d": D,
        "block": numpy_tiles.BLOCK,
        "rounds": len(times),
        "peak_flops_per_s": float(f"{peak_flops:.4g}"),
        "bytes_per_s": float(f"{bandwidth:.4g}"),
        "pieces": table,
    }


def backward(size: dict[str, Any]) -> dict[str, Any]:
    rng, n = np.random.default_rng(0), size["attention"] // 2
    q, k, v, dout = (normal(rng, 1, 1, n, D) for _ in range(4))
    x, w, dy = normal(rng, n, 512), normal(rng, 512, 512), normal(rng, n, 512)
    bias = np.zeros(512, np.float32)
    _, probs = attention_forward(q, k, v)
    block = numpy_tiles.BLOCK
    out, lse = numpy_tiles.flash_forward(q, k, v, block)
    steps: dict[str, Step] = {
        "linear": lambda: linear_forward(x, w, bias),
        "linear_backward": lambda: linear_backward(dy, x, w),
        "naive": lambda: attention_forward(q, k, v),
        "naive_backward": lambda: attention_backward(dout, q, k, v, probs),
        "tiles": lambda: numpy_tiles.flash_forward(q, k, v, block),
        "tiles_backward": lambda: numpy_tiles.flash_backward(dout, q, k, v, out, lse, block),
    }
    times = rounds(steps, size["seconds"] / 4)
    ratio = {n: median(times, f"{n}_backward", n) for n in ("linear", "naive", "tiles")}
    counted = {"linear": 2.0, "naive": 2.0, "tiles": 2.5}
    return {"n": n, "d": D, "rounds": len(times), "counted": counted, "seconds_ratio": ratio}


# --- peak memory of attention --------------------------------------------------------------------


def attended(kind: str, n: int) -> Callable[[], tuple[np.ndarray, ...]]:
    rng, (way, what) = np.random.default_rng(0), kind.split("-")
    q, k, v, dout = (normal(rng, 1, 1, n, D) for _ in range(4))

    def naive() -> tuple[np.ndarray, ...]:
        out, probs = attention_forward(q, k, v, causal_mask(n, n))
        return (out, *attention_backward(dout, q, k, v, probs)) if what == "train" else (out,)

    def chunks() -> tuple[np.ndarray, ...]:
        out = streaming.chunked_causal_attention(q, k, v, CHUNK)
        if what == "forward":
            return (out,)
        return (out, *streaming.chunked_causal_attention_backward(dout, q, k, v, CHUNK))

    def tiles() -> tuple[np.ndarray, ...]:
        out, lse = numpy_tiles.flash_forward(q, k, v, numpy_tiles.BLOCK, True)
        if what == "forward":
            return out, lse
        back = numpy_tiles.flash_backward(dout, q, k, v, out, lse, numpy_tiles.BLOCK, True)
        return (out, lse, *back)

    return {"naive": naive, "chunks": chunks, "tiles": tiles}[way]


KINDS = ("naive-forward", "naive-train", "chunks-train", "tiles-train")


def peaks(lengths: Iterable[int]) -> dict[str, Any]:
    found = {kind: {str(n): apart(__file__, "attend", kind, n) for n in lengths} for kind in KINDS}
    bytes_: dict[str, dict[str, int]] = {
        kind: {n: each["peak"] for n, each in of.items()} for kind, of in found.items()
    }
    return {
        "layer": {"heads": 1, "d": D, "chunk": CHUNK, "block": numpy_tiles.BLOCK, "causal": True},
        "slopes_of_the_last": FITTED,
        "peak_bytes": bytes_,
        "returned_bytes": {k: {n: e["returned"] for n, e in of.items()} for k, of in found.items()},
        "slope": {kind: slope(of) for kind, of in bytes_.items()},
    }


# --- recomputation over depth --------------------------------------------------------------------


class Tanh(NamedTuple):
    """y = tanh(x w): what it keeps is its input and output, and the next one's input is that."""

    w: np.ndarray

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        y = np.tanh(x @ self.w)
        return y, (x, y)

    def backward(self, dout: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        x, y = cache
        da = dout * (1 - y * y)
        return da @ self.w.T, x.T @ da


class Block(NamedTuple):
    """An encoder block whose dropout draws from a seed of its own."""

    params: dict[str, np.ndarray]
    seed: int

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Any]:
        draws = np.random.default_rng(self.seed)
        return encoder_block_forward(x, self.params, HEADS, norm="pre", rate=0.1, rng=draws)

    def backward(self, dout: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        return encoder_block_backward_cached(dout, cache)


WIDTH = 64
BLOCK_N, BLOCK_C, BLOCK_F, HEADS = 256, 128, 512, 4
PLAIN = 0  # in place of ``every``: all caches kept


def stacked(kind: str, depth: int, rows: int) -> tuple[list[Any], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    if kind == "depth":
        layers: list[Any] = [
            Tanh(normal(rng, WIDTH, WIDTH) * np.float32(WIDTH**-0.5)) for _ in range(depth)
        ]
        return layers, normal(rng, rows, WIDTH), normal(rng, rows, WIDTH)
    layers = [
        Block({n: p.astype(np.float32) for n, p in params.items()}, seed)
        for seed, params in enumerate(
            init_encoder_block(rng, BLOCK_C, BLOCK_F) for _ in range(depth)
        )
    ]
    return layers, normal(rng, rows, BLOCK_N, BLOCK_C), normal(rng, rows, BLOCK_N, BLOCK_C)


def trained(kind: str, every: int, depth: int, rows: int) -> Step:
    layers, x, dout = stacked(kind, depth, rows)

    def step() -> Any:
        if every != PLAIN:
            return checkpointed_backward(layers, x, dout, every)
        _, caches = stack_forward(layers, x)
        return stack_backward(layers, dout, caches)

    return step


def recomputed(kind: str, depth: int, rows: int, every: Iterable[int], seconds: float) -> Any:
    lengths = [PLAIN, *every]
    layers, x, _ = stacked(kind, depth, rows)
    memory = {e: apart(__file__, kind, e, depth, rows) for e in lengths}
    steps = {str(e): trained(kind, e, depth, rows) for e in lengths}
    steps["forward"] = lambda: [stack_forward(layers[:1], x) for _ in range(depth)]
    times = rounds(steps, seconds)
    _, cache = layers[0].forward(x)
    own = [layers[0]] if kind == "depth" else [layers[0].params]
    ratio = cost.kept_bytes(cache, without=[*own, x]) / x.nbytes
    names = {str(e): "plain" if e == PLAIN else str(e) for e in lengths}
    return {
        "layers": depth,
        "input_bytes": x.nbytes,
        "cache_over_input": round(ratio, 3),
        "rounds": len(times),
        "sqrt_schedule": sqrt_schedule(depth, ratio),
        "peak_bytes": {names[str(e)]: of["peak"] for e, of in memory.items()},
        "returned_bytes": memory[PLAIN]["returned"],
        "seconds": {name: median(times, e) for e, name in names.items()},
        "over_plain": {n: median(times, e, str(PLAIN)) for e, n in names.items()},
        "user_over_plain": {
            n: median(times, USER + e, USER + str(PLAIN)) for e, n in names.items()
        },
        "forward_over_plain": median(times, "forward", str(PLAIN)),
    }


# --- this file again, in a process of its own ----------------------------------------------------


def in_here(mode: str, *arguments: str) -> dict[str, int]:
    warm_blas()
    if mode == "attend":
        kind, n = arguments
        attended(kind, 16)()
        most, returned = peak(attended(kind, int(n)))
        return {"peak": most, "returned": cost.kept_bytes(returned)}
    every, depth, rows = map(int, arguments)
    trained(mode, every, 2, 1)()
    most, returned = peak(trained(mode, every, depth, rows))
    return {"peak": most, "returned": cost.kept_bytes(returned)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--in-here", nargs="+", metavar="ARGUMENT", help="one peak")
    given = parser.parse_args()
    with threadpool_limits(1):
        if given.in_here:
            print(json.dumps(in_here(*given.in_here)))
            return
        size: dict[str, Any] = QUICK if given.quick else SIZES
        where = machine.machine() | {"threads": 1}
        begun = time.perf_counter()
        result: dict[str, Any] = {
            "dtype": "float32",
            "roofline": roofline(size),
            "backward": backward(size),
            "peak": peaks(size["peak"]),
            "depth": recomputed(
                "depth", size["depth"], size["tokens"], size["every"], size["seconds"]
            ),
            "blocks": recomputed(
                "blocks", size["blocks"], size["batch"], size["blocks_every"], size["seconds"]
            ),
        }
        result = {"took_s": round(time.perf_counter() - begun)} | result
    where["load_after"] = round(os.getloadavg()[0], 2)
    if given.quick:
        print(json.dumps(result, indent=2))
    else:
        machine.write("memory", result, "attn-lessons", "numpy", "threadpoolctl", where=where)


if __name__ == "__main__":
    main()
