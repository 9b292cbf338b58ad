"""What a sequence costs as it grows: latency a token, memory, and table 1 of Vaswani et al. 2017.

Five layers of the library on the same tokens, all in float32 on one core: a tanh RNN, an LSTM,
causal attention as the full pass has it, causal attention in chunks, and attention to a window. In
chapter 10's words they are streamed (one token in, one out, the past in a state) or trained
(forward and backward over the whole sequence). Measured are

- ``latency``: seconds for the token that comes after n others: with a key/value cache, in place or
  copied, with a ring buffer, with an LSTM's state, and with all n tokens computed again;
- ``complexity``: seconds and peak memory over n, streamed and trained, with slopes of straight
  lines through their logarithms: the exponent of n;
- ``sequential``: a forward pass over the same number of tokens, cut into ever longer sequences:
  where the work is the same, what grows with their length is what cannot run side by side;
- ``path``: layers, or steps, until the first token's gradient from the last one's output is not 0;
- ``prefill``: a prompt in chunks: time and peak memory by the chunk's size;
- ``torch``: a decoding step of the library beside one with torch's own attention.

Times are processor seconds of the one thread that works, so that a busy machine's waiting is not in
them. A round times every layer at every length once; what is reported is the median over rounds,
for a slope the median of the rounds' slopes. For training the exponents are given also without the
system's share of the seconds, which is the handing out of fresh memory for large arrays. Peak
memory is a fresh process's: its high water mark, reset before the call, minus what was resident
then; inputs and weights are not in it, outputs and gradients are. Run as
``python benchmarks/streaming.py`` (some minutes); ``--quick`` prints small sizes, writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import machine
import numpy as np
from peak import apart as fresh
from peak import peak, warm_blas
from threadpoolctl import threadpool_limits

from attn_lessons import recurrent, streaming
from attn_lessons.attention import causal_mask
from attn_lessons.multihead import (
    linear_backward,
    linear_forward,
    merge_heads,
    multihead_backward_cached,
    multihead_forward,
    split_heads,
)

Step = Callable[[], Any]

WIDE, WIDE_HEADS = 256, 4  # the layer whose latency is measured
WIDTH = 64  # that of the table, with one head: n is larger than it where the lines are fitted
WINDOW, CHUNK = 128, 128
FITTED = 3  # points, the largest n, to which a slope is fitted
TOKENS = 4096  # of the sequential part, whatever their arrangement

LENGTHS = {
    "latency": (64, 256, 1024, 4096, 16384),
    "again": (64, 256, 1024, 2048),
    "complexity": (256, 512, 1024, 2048, 4096),
    "stream": (1024, 4096, 16384, 65536),
    "sequential": (16, 64, 256, 1024, 4096),
    "path": (16, 32, 64, 128, 256),
    "prefill": (16, 64, 256, 1024, 4096),
}
QUICK = {
    "latency": (64, 256),
    "again": (64, 256),
    "complexity": (128, 256, 512),
    "stream": (256, 1024),
    "sequential": (64, 256),
    "path": (16, 32),
    "prefill": (64, 256),
}


# --- the layers ----------------------------------------------------------------------------------


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def attention_weights(rng: np.random.Generator, c: int) -> dict[str, np.ndarray]:
    weights = {n: normal(rng, c, c) * np.float32(c**-0.5) for n in ("wq", "wk", "wv", "wo")}
    return weights | {n: np.zeros(c, np.float32) for n in ("bq", "bk", "bv", "bo")}


def recurrent_weights(rng: np.random.Generator, kind: str, c: int) -> dict[str, np.ndarray]:
    init = {"rnn": recurrent.init_rnn, "lstm": recurrent.init_lstm}[kind]
    return {n: p.astype(np.float32) for n, p in init(rng, c, c).items()}


def trained(kind: str, b: int, n: int, c: int = WIDTH, heads: int = 1) -> Step:
    """Forward and backward pass of one layer over (B, N, C)."""
    rng = np.random.default_rng(0)
    x, dout = normal(rng, b, n, c), normal(rng, b, n, c)
    h0 = np.zeros((b, c), np.float32)
    if kind == "rnn":
        p = recurrent_weights(rng, kind, c)

        def step() -> Any:
            _, cache = recurrent.rnn_forward(x, h0, **p)
            return recurrent.rnn_backward_cached(dout, cache)

    elif kind == "lstm":
        p = recurrent_weights(rng, kind, c)

        def step() -> Any:
            *_, cache = recurrent.lstm_forward(x, h0, h0, **p)
            return recurrent.lstm_backward_cached(dout, cache)

    elif kind == "attention":
        p = attention_weights(rng, c)

        def step() -> Any:
            _, cache = multihead_forward(x, **p, n_heads=heads, mask=causal_mask(n, n))
            return multihead_backward_cached(dout, cache)

    else:
        p, window = attention_weights(rng, c), WINDOW if kind == "window" else None

        def step() -> Any:
            return in_chunks(x, dout, p, heads, window)

    return step


def in_chunks(
    x: np.ndarray, dout: np.ndarray, p: Mapping[str, np.ndarray], heads: int, window: int | None
) -> Any:
    """A layer of chunked attention, forward and backward: probabilities are made twice."""
    qkv = [split_heads(linear_forward(x, p[f"w{n}"], p[f"b{n}"]), heads) for n in "qkv"]
    merged = merge_heads(streaming.chunked_causal_attention(*qkv, CHUNK, window=window))
    linear_forward(merged, p["wo"], p["bo"])
    dmerged, *grads = linear_backward(dout, merged, p["wo"])
    dheads = split_heads(dmerged, heads)
    back = streaming.chunked_causal_attention_backward(dheads, *qkv, CHUNK, window=window)
    through = [
        linear_backward(merge_heads(g), x, p[f"w{n}"]) for g, n in zip(back, "qkv", strict=True)
    ]
    return sum(dx for dx, *_ in through), grads, through


def forward(kind: str, b: int, n: int) -> Step:
    rng = np.random.default_rng(0)
    x, h0 = normal(rng, b, n, WIDTH), np.zeros((b, WIDTH), np.float32)
    if kind in ("rnn", "lstm"):
        p = recurrent_weights(rng, kind, WIDTH)
        run, states = {"rnn": (recurrent.rnn_forward, 1), "lstm": (recurrent.lstm_forward, 2)}[kind]
        return lambda: run(x, *[h0] * states, **p)
    p, window = attention_weights(rng, WIDTH), WINDOW if kind == "window" else None

    def step() -> Any:
        qkv = [split_heads(linear_forward(x, p[f"w{n}"], p[f"b{n}"]), 1) for n in "qkv"]
        heads = streaming.chunked_causal_attention(*qkv, min(CHUNK, n), window=window)
        return linear_forward(merge_heads(heads), p["wo"], p["bo"])

    return step


def filled(n: int, capacity: int, c: int, heads: int) -> streaming.KVCache:
    """A cache that n tokens went into."""
    rng, shape = np.random.default_rng(1), (1, heads, capacity, c // heads)
    return streaming.KVCache(normal(rng, *shape), normal(rng, *shape), n)


def streamed(kind: str, n: int, c: int = WIDTH, heads: int = 1) -> Step:
    """The step of one layer for the token that n others came before, time and again."""
    rng = np.random.default_rng(0)
    x, h = normal(rng, 1, 1, c), normal(rng, 1, c)
    if kind == "rnn":
        p = recurrent_weights(rng, kind, c)
        return lambda: recurrent.rnn_step_forward(x[0], h, **p)
    if kind == "lstm":
        p = recurrent_weights(rng, kind, c)
        return lambda: recurrent.lstm_step_forward(x[0], h, h, **p)
    p = attention_weights(rng, c)
    if kind == "again":
        x = normal(rng, 1, n + 1, c)
        return lambda: multihead_forward(x, **p, n_heads=heads, mask=causal_mask(n + 1, n + 1))
    cache = filled(n, WINDOW if kind == "window" else n + 1, c, heads)
    written = kind != "copied"
    return lambda: streaming.multihead_step(x, **p, n_heads=heads, cache=cache, in_place=written)


# --- time ----------------------------------------------------------------------------------------


Cell = tuple[str, int]  # a kind of layer, a length


class Times:
    """Processor seconds of every cell, round by round."""

    def __init__(self, steps: Mapping[Cell, Step], seconds: float, least: int = 5) -> None:
        calls = {cell: _calls(step) for cell, step in steps.items()}
        self.rounds: list[dict[Cell, float]] = []
        self.cells = list(steps)
        self.user = dict.fromkeys(steps, 0.0)
        end = time.perf_counter() + seconds
        while len(self.rounds) < least or time.perf_counter() < end:
            taken = {}
            for cell, step in steps.items():
                begun = resource.getrusage(resource.RUSAGE_SELF).ru_utime
                taken[cell] = timed(step, calls[cell])
                spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - begun
                self.user[cell] += spent / calls[cell]
            self.rounds.append(taken)

    def table(self) -> dict[str, dict[str, float]]:
        """Medians over the rounds, by kind and length."""
        found: dict[str, dict[str, float]] = {kind: {} for kind, _ in self.cells}
        for kind, n in self.cells:
            median = statistics.median(each[kind, n] for each in self.rounds)
            found[kind][str(n)] = float(f"{median:.4g}")
        return found

    def slopes(self) -> dict[str, float]:
        """By kind, the median over the rounds of the exponent of n."""
        found: dict[str, float] = {}
        for kind in dict.fromkeys(kind for kind, _ in self.cells):
            ends = sorted(n for of, n in self.cells if of == kind)[-FITTED:]
            each = [slope({n: times[kind, n] for n in ends}) for times in self.rounds]
            found[kind] = round(statistics.median(each), 2)
        return found

    def user_slopes(self) -> dict[str, float]:
        """The same without the system's share: what it takes to hand out fresh pages."""
        table: dict[str, dict[str, float]] = {}
        for (kind, n), seconds in self.user.items():
            table.setdefault(kind, {})[str(n)] = seconds
        return slopes(table)

    def system_share(self) -> dict[str, float]:
        """By kind, the system's part of all seconds at the largest length."""
        found: dict[str, float] = {}
        for kind in dict.fromkeys(kind for kind, _ in self.cells):
            cell = kind, max(n for of, n in self.cells if of == kind)
            total = sum(each[cell] for each in self.rounds)
            found[kind] = round(max(1 - self.user[cell] / total, 0.0), 2)
        return found


def timed(step: Step, calls: int) -> float:
    begun = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - begun) / calls


def _calls(step: Step) -> int:
    """How many calls take some 10 ms."""
    step()
    return max(1, min(200, int(0.01 / max(timed(step, 1), 1e-6))))


def slope(points: Mapping[int, float]) -> float:
    """The exponent of n: a straight line through the logarithms."""
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def slopes(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of each kind's last few lengths."""
    last = {kind: sorted(of, key=int)[-FITTED:] for kind, of in table.items()}
    return {k: round(slope({int(n): table[k][n] for n in ends}), 2) for k, ends in last.items()}


# --- memory: this file again, in a process of its own --------------------------------------------


def prepared(kind: str) -> Callable[[int], tuple[np.ndarray, ...]]:
    """A function that streams n tokens from an empty state and returns the last state."""
    rng = np.random.default_rng(0)
    xs = normal(rng, 16, 1, WIDTH)
    if kind in ("rnn", "lstm"):
        weights, n_states = recurrent_weights(rng, kind, WIDTH), 1 if kind == "rnn" else 2
        step = {"rnn": recurrent.rnn_step_forward, "lstm": recurrent.lstm_step_forward}[kind]

        def run(n: int) -> tuple[np.ndarray, ...]:
            states: Any = (np.zeros((1, WIDTH), np.float32),) * n_states
            for t in range(n):
                after = step(xs[t % 16], *states, **weights)
                states = after if isinstance(after, tuple) else (after,)
            return states

        return run
    weights = attention_weights(rng, WIDTH)

    def attend(n: int) -> tuple[np.ndarray, ...]:
        capacity = WINDOW if kind == "window" else n
        cache: Any = streaming.kv_cache_start(1, 1, capacity, WIDTH, dtype=np.float32)
        for t in range(n):
            x = xs[None, t % 16]
            _, cache = streaming.multihead_step(x, **weights, n_heads=1, cache=cache, in_place=True)
        return cache.k, cache.v

    return attend


def in_here(mode: str, kind: str, n: int) -> dict[str, int]:
    warm_blas()
    if mode == "stream":
        run = prepared(kind)
        run(8)
        reached, state = peak(lambda: run(n))
        return {"peak": reached, "state": sum(a.nbytes for a in state)}
    if mode == "prefill":
        prefilled(64, 16)()
        return {"peak": peak(prefilled(PROMPT, n))[0]}
    trained(kind, 1, 8)()
    return {"peak": peak(trained(kind, 1, n))[0]}


def apart(mode: str, kind: str, n: int) -> dict[str, int]:
    found: dict[str, int] = fresh(__file__, mode, kind, n)
    return found


# --- what is measured ----------------------------------------------------------------------------


def latency(lengths: Iterable[int], again: Iterable[int], seconds: float) -> dict[str, Any]:
    lengths = sorted({*lengths, *again})
    kinds = {"cache": "cache", "copied": "copied", "ring": "window", "lstm": "lstm"}
    steps = {
        (name, n): streamed(kind, n, WIDE, WIDE_HEADS)
        for name, kind in kinds.items()
        for n in lengths
    }
    steps |= {("again", n): streamed("again", n, WIDE, WIDE_HEADS) for n in again}
    times = Times(steps, seconds)
    d = WIDE // WIDE_HEADS
    cache = {str(n): streaming.kv_cache_bytes(1, WIDE_HEADS, d, n, 4) for n in lengths}
    ring = {
        str(n): streaming.kv_cache_bytes(1, WIDE_HEADS, d, n, 4, window=WINDOW) for n in lengths
    }
    return {
        "layer": {"C": WIDE, "heads": WIDE_HEADS, "window": WINDOW, "dtype": "float32"},
        "rounds": len(times.rounds),
        "seconds": times.table(),
        "slope": times.slopes(),
        "state_bytes": {"cache": cache, "ring": ring, "lstm": dict.fromkeys(cache, 2 * WIDE * 4)},
    }


STREAMED = {"rnn": "rnn", "lstm": "lstm", "attention": "cache", "window": "window"}
TRAINED = ("rnn", "lstm", "attention", "chunks", "window")


def complexity(lengths: Iterable[int], long: Iterable[int], seconds: float) -> dict[str, Any]:
    """Trained, and in memory, up to ``lengths``; a step's time is after ``long`` pasts."""
    lengths = tuple(lengths)
    train = Times({(k, n): trained(k, 1, n) for k in TRAINED for n in lengths}, 2 * seconds)
    stream = Times({(k, n): streamed(how, n) for k, how in STREAMED.items() for n in long}, seconds)
    own = {k: {str(n): apart("stream", how, n) for n in lengths} for k, how in STREAMED.items()}
    peaks, states = (
        {k: {n: found[what] for n, found in of.items()} for k, of in own.items()}
        for what in ("peak", "state")
    )
    trained_in = {k: {str(n): apart("train", k, n)["peak"] for n in lengths} for k in TRAINED}
    return {
        "layer": {"C": WIDTH, "heads": 1, "window": WINDOW, "chunk": CHUNK, "dtype": "float32"},
        "slopes_of_the_last": FITTED,
        "stream": {
            "rounds": len(stream.rounds),
            "seconds_for_the_token_after_n": stream.table(),
            "slope_of_seconds": stream.slopes(),
            "peak_bytes": peaks,
            "state_bytes": states,
            "slope_of_state_bytes": slopes(states),
        },
        "train": {
            "rounds": len(train.rounds),
            "seconds": train.table(),
            "slope_of_seconds": train.slopes(),
            "slope_of_user_seconds": train.user_slopes(),
            "system_share_at_the_largest": train.system_share(),
            "peak_bytes": trained_in,
            "slope_of_peak_bytes": slopes(trained_in),
        },
    }


def sequential(lengths: Iterable[int], seconds: float) -> dict[str, Any]:
    """The same tokens as B sequences of n: B · n stays."""
    kinds = ("rnn", "lstm", "chunks", "window")
    steps = {(k, n): forward(k, TOKENS // n, n) for k in kinds for n in lengths}
    times = Times(steps, seconds)
    return {
        "tokens": TOKENS,
        "rounds": len(times.rounds),
        "seconds": times.table(),
        "slope": times.slopes(),
    }


def path(lengths: Iterable[int], window: int = 8) -> dict[str, Any]:
    """How many layers or steps the gradient needs from the last output to the first input."""
    found: dict[int, dict[str, int]] = {}
    for n in lengths:
        rng = np.random.default_rng(n)
        x, counts = rng.normal(size=(1, 1, n, 8)), {}
        for kind, width in (("attention", None), ("window", window)):
            gradient, layers = np.zeros(x.shape), 0
            gradient[0, 0, -1] = 1
            while not gradient[0, 0, 0].any():
                back = streaming.chunked_causal_attention_backward(
                    gradient, x, x, x, n, window=width
                )
                gradient, layers = sum(back), layers + 1
            counts[kind] = layers
        p = recurrent.init_rnn(rng, 8, 8)
        h, dh, steps = np.zeros((1, 8)), np.ones((1, 8)), 0
        dx = np.zeros((n, 1, 8))
        while not dx[0].any():
            t = n - 1 - steps
            dx[t], dh, _ = recurrent.rnn_step_backward(dh, x[0, :, t], h, **p)
            steps += 1
        counts["rnn"] = steps
        found[n] = counts
    hops = {kind: {str(n): of[kind] for n, of in found.items()} for kind in counts}
    expected = {str(n): math.ceil((n - 1) / (window - 1)) for n in found}
    return {"window": window, "hops": hops, "ceil((n-1)/(window-1))": expected}


PROMPT = 4096


def prefilled(n: int, chunk: int) -> Step:
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, WIDE_HEADS, n, WIDE // WIDE_HEADS) for _ in range(3))
    cache = streaming.kv_cache_start(1, WIDE_HEADS, n, WIDE // WIDE_HEADS, dtype=np.float32)
    cache.k.fill(0), cache.v.fill(0)  # resident before anything is measured
    return lambda: streaming.prefill(q, k, v, cache, chunk, in_place=True)


def prefill(chunks: Iterable[int], seconds: float) -> dict[str, Any]:
    chunks = tuple(chunks)
    times = Times({("prefill", c): prefilled(PROMPT, c) for c in chunks}, seconds)
    peaks = {str(c): apart("prefill", "-", c)["peak"] for c in chunks}
    return {"tokens": PROMPT, "seconds": times.table()["prefill"], "peak_bytes": peaks}


def torch_beside(lengths: Iterable[int], seconds: float) -> dict[str, Any]:
    """kv_cache_step in place, and torch's attention over a cache written to in the same way."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    steps: dict[Cell, Step] = {}
    for n in lengths:
        cache = filled(n, n + 1, WIDE, WIDE_HEADS)
        one = [
            normal(np.random.default_rng(i), 1, WIDE_HEADS, 1, cache.k.shape[-1]) for i in (1, 2, 3)
        ]
        kept, new = [torch.tensor(x) for x in cache[:2]], [torch.tensor(x) for x in one]

        def by_torch(kept: Any = kept, new: Any = new, n: int = n) -> torch.Tensor:
            for old, x in zip(kept, new[1:], strict=True):
                old[:, :, n] = x[:, :, 0]
            return F.scaled_dot_product_attention(new[0], *kept)

        def by_numpy(cache: Any = cache, one: Any = one) -> np.ndarray:
            return streaming.kv_cache_step(*one, cache, in_place=True)[0]

        off = np.abs(by_numpy() - by_torch().numpy()).max()
        assert off < 1e-5, f"{off:.1g} off"
        steps |= {("numpy", n): by_numpy, ("torch", n): by_torch}
    with torch.inference_mode():
        times = Times(steps, seconds, 7)
    ratio = {
        str(n): round(statistics.median(t["numpy", n] / t["torch", n] for t in times.rounds), 2)
        for n in lengths
    }
    return {"rounds": len(times.rounds), "seconds": times.table(), "numpy_over_torch": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--in-here", nargs=3, metavar=("MODE", "KIND", "N"), help="one peak")
    given = parser.parse_args()
    with threadpool_limits(1):
        if given.in_here:
            mode, kind, n = given.in_here
            print(json.dumps(in_here(mode, kind, int(n))))
            return
        sizes, seconds = (QUICK, 0.1) if given.quick else (LENGTHS, 20.0)
        where = machine.machine() | {"threads": 1}
        begun = time.perf_counter()
        result: dict[str, Any] = {
            "latency": latency(sizes["latency"], sizes["again"], seconds),
            "complexity": complexity(sizes["complexity"], sizes["stream"], seconds),
            "sequential": sequential(sizes["sequential"], seconds),
            "path": path(sizes["path"]),
            "prefill": prefill(sizes["prefill"], seconds),
            "torch": torch_beside(sizes["latency"], seconds),
        }
        result = {"took_s": round(time.perf_counter() - begun)} | result
    where["load_after"] = round(os.getloadavg()[0], 2)
    if given.quick:
        print(json.dumps(result, indent=2))
    else:
        packages = ("attn-lessons", "numpy", "threadpoolctl", "torch")
        machine.write("streaming", result, *packages, where=where)


if __name__ == "__main__":
    main()
