"""Attention in tiles on this processor: time beside naive NumPy and torch's kernel, and memory.

``speed``: one head of width 64, float32, 1k to 16k tokens. Each round times all four once, in turn
and from the same inputs: naive NumPy (attention.py, which makes the N x N array), tiles in NumPy,
tiles in torch, and torch's ``scaled_dot_product_attention``, which on a processor is a tiled kernel
of its own. Reported are medians over rounds of the ratio of the others' time to ours: 2 = we are
twice as fast. All have one thread, and what is counted is that thread's processor time, so that
other work on the machine is not in it. Results are compared before anything is timed.

``memory``: peak resident memory of forward and backward in a fresh process, less inputs, outputs,
gradients and log-sum-exp: what the method itself needs. Both tiled versions have to stay below
16 MiB at every length to 32k, and not to grow with it; where they do not, the report says so and
the script ends with 1, once the result is written.

Run as ``python benchmarks/flash.py speed memory``; each part keeps the other's numbers.
``--quick`` is small and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
from peak import apart, peak, warm_blas
from threadpoolctl import threadpool_limits

from attn_lessons.attention import attention_backward, attention_forward, causal_mask
from attn_lessons.flash import numpy_tiles, torch_tiles

D = 64
LENGTHS = [1024, 2048, 4096, 8192, 16384]
FAR = [*LENGTHS, 32768]
NAIVE_FITS = 16384  # 2.3 GiB there, 9 GiB at twice as many
SECONDS = 12.0  # for a length, at least; and at least three rounds
MOST_MIB = 16.0
# Of what is left over once inputs and results are taken away. N x N would be 4 MiB at the first
# 1024 tokens and 128 MiB for every 1024 more at 32k.
MOST_MIB_PER_1K = 0.1
TOLERANCE = 2e-4

Arrays = tuple[np.ndarray, ...]
Step = Callable[[], Any]


# --- the four ------------------------------------------------------------------------------------


def naive(q: Any, k: Any, v: Any, dout: Any, causal: bool, backward: bool) -> Step:
    mask = causal_mask(q.shape[2], k.shape[2]) if causal else None

    def step() -> Arrays:
        out, probs = attention_forward(q, k, v, mask)
        return (out, *attention_backward(dout, q, k, v, probs)) if backward else (out,)

    return step


def tiles_numpy(q: Any, k: Any, v: Any, dout: Any, causal: bool, backward: bool) -> Step:
    block = numpy_tiles.BLOCK

    def step() -> Arrays:
        out, lse = numpy_tiles.flash_forward(q, k, v, block, causal)
        if not backward:
            return (out,)
        return (out, *numpy_tiles.flash_backward(dout, q, k, v, out, lse, block, causal))

    return step


def by_torch(attend: Callable[..., torch.Tensor]) -> Callable[..., Step]:
    def prepared(q: Any, k: Any, v: Any, dout: Any, causal: bool, backward: bool) -> Step:
        leaves = [torch.tensor(x, requires_grad=backward) for x in (q, k, v)]
        upstream = torch.tensor(dout)

        def step() -> Arrays:
            out = attend(*leaves, causal)
            grads = torch.autograd.grad(out, leaves, upstream) if backward else ()
            return tuple(x.detach().numpy() for x in (out, *grads))

        return step

    return prepared


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


SIDES = {
    "naive": naive,
    "numpy": tiles_numpy,
    "torch": by_torch(torch_tiles.flash_attention),
    "sdpa": by_torch(sdpa),
}
AGAINST = [("numpy", "naive"), ("numpy", "sdpa"), ("torch", "sdpa"), ("torch", "naive")]


def inputs(n: int) -> Arrays:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((1, 1, n, D), dtype=np.float32) for _ in range(4))


# --- speed ---------------------------------------------------------------------------------------


def speed(quick: bool) -> dict[str, Any]:
    rows = []
    torch.set_num_threads(1)
    for n in [256, 512] if quick else LENGTHS:
        for causal in (False, True):
            for backward in (False, True):
                with threadpool_limits(1):
                    found = compared(n, causal, backward, 1.0 if quick else SECONDS)
                for row in found:
                    print(row, file=sys.stderr, flush=True)
                rows += found
    return {"speed": rows, "threads": 1}


def compared(n: int, causal: bool, backward: bool, seconds: float) -> list[dict[str, Any]]:
    steps = {name: make(*inputs(n), causal, backward) for name, make in SIDES.items()}
    assert_alike({name: step() for name, step in steps.items()})
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        # Another one goes first each time: none always meets a warm cache.
        turn = len(rounds) % len(steps)
        names = [*list(steps)[turn:], *list(steps)[:turn]]
        rounds.append({name: timed(steps[name]) for name in names})
    what = {"n": n, "d": D, "causal": causal, "rounds": len(rounds)}
    what["what"] = "forward_backward" if backward else "forward"
    return [
        what
        | {
            "backend": ours,
            "against": theirs,
            "ratio": round(statistics.median(r[theirs] / r[ours] for r in rounds), 3),
            "ours_s": float(f"{statistics.median(r[ours] for r in rounds):.3g}"),
            "theirs_s": float(f"{statistics.median(r[theirs] for r in rounds):.3g}"),
        }
        for ours, theirs in AGAINST
    ]


def assert_alike(results: dict[str, Arrays]) -> None:
    for name, arrays in results.items():
        for got, want in zip(arrays, results["naive"], strict=True):
            off = np.abs(got - want).max() / np.abs(want).max()
            assert off <= TOLERANCE, f"{name} is {off:.1g} off"


def timed(step: Step) -> float:
    begun = time.process_time()
    step()
    return time.process_time() - begun


# --- memory --------------------------------------------------------------------------------------


def memory(quick: bool) -> dict[str, Any]:
    lengths = [512, 1024] if quick else FAR
    rows = []
    for backend in ("naive", "numpy", "torch"):
        for n in lengths:
            if backend == "naive" and n > NAIVE_FITS:
                continue
            rows.append({"n": n, "backend": backend, "what": "forward_backward"})
            rows[-1]["peak_mib"] = round(apart(__file__, backend, n) / 2**20, 2)
            print(rows[-1], file=sys.stderr, flush=True)
    slope = {}
    for backend in ("numpy", "torch"):
        at = {r["n"] / 1024: r["peak_mib"] for r in rows if r["backend"] == backend}
        # Below a few tiles a length is what a tile is cut to.
        far = {n: mib for n, mib in at.items() if n >= min(4, max(at) / 2)}
        line = np.polyfit(list(far), list(far.values()), 1)
        slope[backend] = {"from_n": int(1024 * min(far)), "mib_per_1k_tokens": round(line[0], 4)}
    return {"memory": rows, "slope": slope}


def in_here(backend: str, n: int) -> int:
    """Bytes beyond inputs, output, gradients and log-sum-exp."""
    warm_blas()
    make = SIDES[backend]
    make(*inputs(64), False, True)()
    q, k, v, dout = inputs(n)
    step = make(q, k, v, dout, False, True)
    reached, results = peak(step)
    lse = 4 * n
    return reached - sum(x.nbytes for x in results) - lse


def complaints(found: dict[str, Any]) -> list[str]:
    """What of the targets is missed, in words."""
    missed = [
        f"{row['backend']}: {row['peak_mib']} MiB at {row['n']}, more than {MOST_MIB}"
        for row in found["memory"]
        if row["backend"] != "naive" and row["peak_mib"] > MOST_MIB
    ]
    missed += [
        f"{backend}: memory grows by {slope['mib_per_1k_tokens']} MiB for 1k tokens"
        for backend, slope in found["slope"].items()
        if abs(slope["mib_per_1k_tokens"]) > MOST_MIB_PER_1K
    ]
    return missed


PARTS = {"speed": speed, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all when none")
    parser.add_argument("--quick", action="store_true", help="small, nothing written")
    parser.add_argument("--in-here", nargs=2, metavar=("BACKEND", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_here:
        backend, n = options.in_here
        print(in_here(backend, int(n)))
        return 0
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}")
    missed: list[str] = []
    for name in options.parts or PARTS:
        where = machine.machine()
        part = PARTS[name](options.quick)
        part[f"{name}_load_before"] = where["load_before"]
        if name == "memory" and not options.quick:
            missed = complaints(part)
        if options.quick:
            print(json.dumps(part, indent=2))
            continue
        stored = machine.RESULTS / "flash.json"
        kept = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
        machine.write("flash", kept | part, "attn-lessons", "numpy", "torch", where=where)
    for line in missed:
        print(f"Target missed. {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
