"""Attention, forward and backward, in NumPy: against torch autograd on the same shapes.

Two peers: the definition written in torch's operations, with autograd going back through it, and
``scaled_dot_product_attention``, which never stores the Nq x Nk weights. Each round times all three
once, in turn and from the same inputs; what is reported is the median over rounds of the ratio of
our time to theirs (2 = twice as long). Before anything is timed, the gradients are compared. Run
as ``python benchmarks/attention.py``; ``--quick`` prints a few small ones and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F

from attn_lessons.attention import attention_backward, attention_forward, causal_mask

# (B, H, N, d): short and many, the usual, long and few.
SHAPES = [(8, 8, 64, 64), (4, 8, 256, 64), (1, 8, 512, 64), (1, 8, 1024, 64), (1, 4, 2048, 64)]
QUICK = [(2, 4, 64, 32), (1, 4, 256, 64)]
SECONDS = 4.0  # a shape, all three together

Arrays = tuple[np.ndarray, ...]
Step = Callable[[], Arrays]


def by_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, causal: bool) -> Step:
    mask = causal_mask(q.shape[2], k.shape[2]) if causal else None

    def step() -> Arrays:
        _, probs = attention_forward(q, k, v, mask)
        return attention_backward(dout, q, k, v, probs)

    return step


def by_autograd(attend: Callable[..., torch.Tensor]) -> Callable[..., Step]:
    def prepared(
        q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, causal: bool
    ) -> Step:
        leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
        upstream, hidden = torch.tensor(dout), None
        if causal:
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)

        def step() -> Arrays:
            out = attend(*leaves, hidden)
            return tuple(g.numpy() for g in torch.autograd.grad(out, leaves, upstream))

        return step

    return prepared


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.softmax(logits, -1) @ v


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=hidden is not None)


SIDES = {"numpy": by_numpy, "autograd": by_autograd(plain), "sdpa": by_autograd(fused)}


def timed(step: Step) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def compared(shape: tuple[int, ...], dtype: str, causal: bool, seconds: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=shape).astype(dtype) for _ in range(4))
    steps = {name: make(q, k, v, dout, causal) for name, make in SIDES.items()}
    _assert_alike({name: step() for name, step in steps.items()}, dtype)
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        # Another one goes first each time: none always meets a warm cache.
        names = list(steps)[len(rounds) % 3 :] + list(steps)[: len(rounds) % 3]
        rounds.append({name: timed(steps[name]) for name in names})
    return {
        "shape": dict(zip("BHNd", shape, strict=True)),
        "dtype": dtype,
        "causal": causal,
        "rounds": len(rounds),
        "seconds": {n: float(f"{statistics.median(r[n] for r in rounds):.3g}") for n in steps},
        "numpy_over": {
            peer: round(statistics.median(r["numpy"] / r[peer] for r in rounds), 2)
            for peer in ("autograd", "sdpa")
        },
    }


def _assert_alike(gradients: dict[str, Arrays], dtype: str) -> None:
    limit = 1e-10 if dtype == "float64" else 1e-4
    for name, grads in gradients.items():
        for got, want in zip(grads, gradients["autograd"], strict=True):
            off = np.abs(got - want).max() / np.abs(want).max()
            assert off <= limit, f"{name} is {off:.1g} off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    quick = parser.parse_args().quick
    where = machine.machine() | {"torch_threads": torch.get_num_threads()}
    runs = [
        compared(shape, dtype, causal, 0.5 if quick else SECONDS)
        for dtype in ("float32", "float64")
        for causal in (False, True)
        for shape in (QUICK if quick else SHAPES)
    ]
    if quick:
        print(json.dumps(runs, indent=2))
    else:
        result = {"measured": "forward and backward", "runs": runs}
        machine.write("attention", result, "attn-lessons", "numpy", "torch", where=where)


if __name__ == "__main__":
    main()
