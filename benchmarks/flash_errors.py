"""How far attention in tiles is from exact attention, beside plain torch, in three formats.

Run as ``python benchmarks/flash_errors.py``. It follows the protocol of the field's own tests:
|ours - exact| is held beside |plain - exact|, where *plain* is the definition, step by step in the
same format through autograd, and *exact* the same in float64 on the same rounded inputs. It does so
for out, dq, dk and dv, for the torch tiles, and for the Triton kernels in Triton's interpreter on
the CPU, there without the largest shapes. A case is allowed where ours is at most twice plain's
error plus a floor (``attention_gpu.floors``); the run fails if one is not. Besides the worst errors
it stores how the errors of single entries are spread, one histogram a format.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

# Read where the kernels are decorated: before anything imports them.
os.environ["TRITON_INTERPRET"] = "1"

import attention_gpu
import machine
import numpy as np
import torch

NAMES = ("out", "dq", "dk", "dv")
HEADS = 2
SCALES = (1, 3)
# The interpreter needs minutes for the two shapes of a thousand queries and keys.
INTERPRETED_UP_TO = 127 * 513
# Of an entry's error over the array's largest entry, as powers of 10.
EDGES = np.arange(-10, 0.25, 0.25)


def cases(largest: int) -> Iterator[dict[str, Any]]:
    for name in attention_gpu.FORMATS:
        for n_q, n_k in attention_gpu.ERROR_LENGTHS:
            for d in attention_gpu.ERROR_WIDTHS:
                for scale in SCALES:
                    for causal in (False, True):
                        if n_q * n_k <= largest:
                            yield {
                                "format": name,
                                "Nq": n_q,
                                "Nk": n_k,
                                "d": d,
                                "scale": scale,
                                "causal": causal,
                            }


def arrays(case: dict[str, Any]) -> tuple[attention_gpu.Tensors, torch.Tensor]:
    """The same numbers for every format, before they are rounded to it."""
    n_q, n_k, d = case["Nq"], case["Nk"], case["d"]
    generator = torch.Generator().manual_seed(n_q * 1000 + n_k + d)
    dtype = attention_gpu.FORMATS[case["format"]]

    def drawn(n: int) -> torch.Tensor:
        return torch.randn(1, HEADS, n, d, generator=generator)

    inputs = tuple((case["scale"] * drawn(n)).to(dtype) for n in (n_q, n_k, n_k))
    return inputs, drawn(n_q).to(dtype)


def compared(attend: attention_gpu.Attend, case: dict[str, Any]) -> dict[str, Any]:
    """Errors of ours and of plain torch by what is returned, and how they are spread."""
    inputs, dout = arrays(case)
    causal = case["causal"]
    exact = attention_gpu.with_gradients(
        attention_gpu.plain, tuple(x.double() for x in inputs), dout.double(), causal
    )
    sides = {
        "ours": attention_gpu.with_gradients(attend, inputs, dout, causal),
        "plain": attention_gpu.with_gradients(attention_gpu.plain, inputs, dout, causal),
    }
    floors = attention_gpu.floors(inputs, dout, causal)
    found: dict[str, Any] = {}
    for i, name in enumerate(NAMES):
        size = exact[i].abs().max().item()
        errors = {side: (got[i].double() - exact[i]).abs() for side, got in sides.items()}
        worst = {side: e.max().item() for side, e in errors.items()}
        # The result's own rounding comes on top of the terms'.
        floor = floors[i] + torch.finfo(inputs[0].dtype).eps / 2 * size
        found[name] = worst | {
            "allowed": worst["ours"] <= 2 * worst["plain"] + floor,
            "spread": {side: spread(e, size) for side, e in errors.items()},
        }
    return found


def spread(errors: torch.Tensor, size: float) -> np.ndarray:
    """Share of the entries in each bin; the first one is for entries without any error."""
    relative = errors.numpy().ravel() / (size or 1.0)
    exact = relative == 0
    powers = np.log10(relative[~exact]).clip(EDGES[0], EDGES[-1])
    counts = np.histogram(powers, EDGES)[0]
    return np.concatenate([[exact.sum()], counts]) / relative.size


def summed_up(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """By format and by what is returned."""
    found: dict[str, Any] = {}
    for dtype in attention_gpu.FORMATS:
        found[dtype] = {}
        for name in NAMES:
            here = [(case, row[name]) for case, row in rows if case["format"] == dtype]
            ratios = [e["ours"] / e["plain"] for _, e in here if e["plain"] > 0]
            found[dtype][name] = {
                "cases": len(here),
                "allowed": sum(e["allowed"] for _, e in here),
                "median_ratio": round(statistics.median(ratios), 4),
                "worst_ratio": round(max(ratios), 4),
                "ours_no_larger": sum(e["ours"] <= e["plain"] for _, e in here),
                "worst": {
                    f"x{scale}": {
                        side: max(e[side] for case, e in here if case["scale"] == scale)
                        for side in ("ours", "plain")
                    }
                    for scale in SCALES
                },
                "spread": {
                    # A case counts as one, however many entries it has.
                    side: [
                        round(float(x), 5)
                        for x in np.mean([e["spread"][side] for _, e in here], axis=0)
                    ]
                    for side in ("ours", "plain")
                },
            }
    return found


def refused(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    return [
        f"{case}: {name} off by {e['ours']:.3g}, plain torch by {e['plain']:.3g}"
        for case, row in rows
        for name, e in row.items()
        if not e["allowed"]
    ]


def main() -> None:
    from attn_lessons.flash import torch_tiles, triton_kernel

    torch.set_num_threads(1)
    where = machine.machine() | {"threads": 1}
    largest = {"torch": 1024 * 1024, "triton": INTERPRETED_UP_TO}
    modules = {"torch": torch_tiles, "triton": triton_kernel}
    result: dict[str, Any] = {
        "protocol": {
            "lengths": attention_gpu.ERROR_LENGTHS,
            "widths": attention_gpu.ERROR_WIDTHS,
            "scales": SCALES,
            "heads": HEADS,
            "causal": [False, True],
        },
        "edges": EDGES.tolist(),
        "backends": {},
    }
    for backend, module in modules.items():
        start = time.perf_counter()
        rows = []
        for case in cases(largest[backend]):
            rows.append((case, compared(module.flash_attention, case)))
        wrong = refused(rows)
        seconds = time.perf_counter() - start
        print(f"{backend}: {len(rows)} cases in {seconds:.0f} s, {len(wrong)} not allowed")
        if wrong:
            raise SystemExit("\n".join(wrong[:10]))
        result["backends"][backend] = {
            "cases": len(rows),
            "products_up_to": largest[backend],
            "interpreter": backend == "triton",
            "formats": summed_up(rows),
        }
    machine.write("flash_errors", result, "numpy", "torch", "triton", where=where)


if __name__ == "__main__":
    main()
