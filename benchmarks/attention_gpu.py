"""The Triton kernels on whatever CUDA card is present: errors first, then times, then memory.

Run as ``python benchmarks/attention_gpu.py`` on a machine with a card. It compares output and
gradients with float64 over the shapes of the field's protocol, and stops where an error is more
than twice that of plain torch in the same format. Then it times forward and forward + backward with
CUDA events, interleaved with ``scaled_dot_product_attention`` held to its FlashAttention and its
cuDNN backend, and reports the median over rounds of the ratio of their time to ours (2 = ours is
twice as fast), TFLOP/s, share of the card's peak, and peak memory beyond the inputs. The result is
``results/<card>.json``. ``--quick`` takes two lengths and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = tuple[torch.Tensor, ...]
Attend = Callable[..., torch.Tensor]

# Dense peak of the tensor cores in 16-bit formats, TFLOP/s, from the makers' data sheets. A card
# that is not here gets no share of peak.
PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "L4": 121}

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
TOKENS, WIDTH = 16384, 2048
ERROR_LENGTHS = [(1, 239), (3, 799), (127, 513), (1023, 1024)]
ERROR_LENGTHS += [(n_k, n_q) for n_q, n_k in ERROR_LENGTHS]
ERROR_WIDTHS = [32, 59, 64, 111, 128]
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WARM_UP, ROUNDS = 3, 20


# --- arithmetic that needs no card ----------------------------------------------------------------


def flops(b: int, h: int, n: int, d: int, causal: bool, backward: bool) -> float:
    """Multiplications and additions: 4·N²·d a head, half if causal; backward adds 2.5 times that.

    2.5 and not 2: the logits are computed again. One convention for all sides, that of the
    FlashAttention papers, although our two kernels compute the logits twice.
    """
    forward = 4 * b * h * n * n * d * (0.5 if causal else 1)
    return forward * (3.5 if backward else 1)


def peak_of(card: str) -> float | None:
    return next((tflops for name, tflops in PEAK.items() if name in card.replace("-", " ")), None)


def slug(card: str) -> str:
    """A card's name as that of a file: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def shape_of(n: int, d: int) -> tuple[int, int, int, int]:
    """(B, H, N, d) at which tokens times batch and heads times width stay the same."""
    return TOKENS // n, WIDTH // d, n, d


def summary(rounds: list[dict[str, float]], work: float, peak: float | None) -> dict[str, Any]:
    """Medians of rounds in milliseconds: times, TFLOP/s, and the others' time over ours."""
    names = list(rounds[0])
    median = {n: statistics.median(r[n] for r in rounds) for n in names}
    rates = {n: work / (median[n] * 1e-3) / 1e12 for n in names}
    result: dict[str, Any] = {
        "milliseconds": {n: round(t, 4) for n, t in median.items()},
        "tflops": {n: round(rate, 1) for n, rate in rates.items()},
        "over_triton": {
            n: round(statistics.median(r[n] / r["triton"] for r in rounds), 3)
            for n in names
            if n != "triton"
        },
    }
    if peak is not None:
        result["share_of_peak"] = {n: round(rate / peak, 3) for n, rate in rates.items()}
    return result


# --- errors ---------------------------------------------------------------------------------------


def weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """Probabilities, every step in the inputs' format; rows without a key are 0."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if not causal:
        return torch.softmax(logits, -1)
    n_q, n_k = logits.shape[-2:]
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
    alive = seen.any(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(~seen & alive, -torch.inf), -1) * alive


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return weights(q, k, causal) @ v


def floors(inputs: Tensors, dout: torch.Tensor, causal: bool) -> list[float]:
    """What float32's roundings on the way may do to out, dq, dk and dv, at the worst entry.

    Twice plain's error leaves no room for them where plain's happens to be small. With one key dq
    is 0, the difference of two equal sums, which plain takes in the same order and tiles do not.
    And tiles make a weight again from its logit and the row's log-sum-exp, while plain divides by
    the sum of the same rounded exponentials.

    With u the unit rounding, d products added one by one are off by u √(d/6) times the terms'
    length, in standard deviations: each partial sum is rounded, up or down. Of a hundred thousand
    entries the worst lies 4.8 of them out: 2 u √d times the length. An exponent has two logits in
    it, its own and that in the log-sum-exp, which may be summed in different orders, and the
    roundings of both results. Independent errors add in quadrature. Nothing is fitted: beyond
    twice plain's error the torch and NumPy tiles need up to 0.36 of this, the kernels in the
    interpreter up to 0.78.
    """
    q, k, v, up = (x.float() for x in (*inputs, dout))
    scale, u = q.shape[-1] ** -0.5, torch.finfo(torch.float32).eps / 2
    dot = (2 * u) ** 2 * q.shape[-1]  # times the squared length: a dot product's squared error
    p, dp, z = weights(q, k, causal), up @ v.mT, scale * (q @ k.mT)
    delta = (p * dp).sum(-1, keepdim=True)
    # From the likeliest key, whose p has all its digits: z - log p.
    largest, at = p.max(-1, keepdim=True)
    lse = z.gather(-1, at) - largest.clamp_min(u).log()
    logit = dot * scale**2 * (q.square() @ k.square().mT)
    exponent = 2 * logit + (u * z).square() + (u * lse).square()
    p_off = p.square() * exponent
    dp_off = dot * (up.square() @ v.square().mT + (up * (p @ v)).square().sum(-1, keepdim=True))
    dz_off = p_off * (dp - delta).square() + p.square() * dp_off
    squared = (
        p_off @ v.square(),
        scale**2 * (dz_off @ k.square()),
        scale**2 * (dz_off.mT @ q.square()),
        p_off.mT @ up.square(),
    )
    return [x.max().sqrt().item() for x in squared]


def with_gradients(attend: Attend, inputs: Tensors, dout: torch.Tensor, causal: bool) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, causal)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def errors(
    attend: Attend, n_q: int, n_k: int, d: int, dtype: torch.dtype, scale: float, causal: bool,
    device: str = "cuda",
) -> dict[str, Any]:  # fmt: skip
    """Largest errors of ours and of plain torch against float64, and whether ours are allowed."""
    generator = torch.Generator(device).manual_seed(n_q * 1000 + n_k + d)

    def drawn(n: int) -> torch.Tensor:
        return torch.randn(1, 2, n, d, generator=generator, device=device)

    inputs = tuple((scale * drawn(n)).to(dtype) for n in (n_q, n_k, n_k))
    dout = drawn(n_q).to(dtype)
    exact = with_gradients(plain, tuple(x.double() for x in inputs), dout.double(), causal)
    ours = with_gradients(attend, inputs, dout, causal)
    theirs = with_gradients(plain, inputs, dout, causal)
    found: dict[str, Any] = {}
    names, sums = ("out", "dq", "dk", "dv"), floors(inputs, dout, causal)
    for name, want, a, b, floor in zip(names, exact, ours, theirs, sums, strict=True):
        off, plain_off = ((x.double() - want).abs().max().item() for x in (a, b))
        # And the result's own rounding.
        floor += torch.finfo(dtype).eps / 2 * want.abs().max().item()
        allowed = off <= 2 * plain_off + floor  # False where off is NaN
        found[name] = {"ours": off, "plain": plain_off, "allowed": allowed}
    return found


def all_errors(attend: Attend) -> list[dict[str, Any]]:
    rows = []
    for name, dtype in FORMATS.items():
        for n_q, n_k in ERROR_LENGTHS:
            for d in ERROR_WIDTHS:
                for scale, causal in ((1, False), (1, True), (3, False), (3, True)):
                    found = errors(attend, n_q, n_k, d, dtype, scale, causal)
                    case = {"dtype": name, "Nq": n_q, "Nk": n_k, "d": d, "scale": scale}
                    rows.append(case | {"causal": causal, "errors": found})
    return rows


def refused(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if not all(e["allowed"] for e in row["errors"].values())]


def worst(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By format and by what is returned: the largest error of ours and of plain torch."""
    return {
        dtype: {
            name: {
                side: max(r["errors"][name][side] for r in rows if r["dtype"] == dtype)
                for side in ("ours", "plain")
            }
            for name in ("out", "dq", "dk", "dv")
        }
        for dtype in {row["dtype"]: None for row in rows}
    }


# --- times and memory -----------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attend


def milliseconds(step: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def step_of(
    attend: Attend, leaves: Tensors, dout: torch.Tensor, causal: bool, backward: bool
) -> Any:
    def step() -> None:
        if backward:
            torch.autograd.grad(attend(*leaves, causal), leaves, dout)
        else:
            with torch.no_grad():
                attend(*leaves, causal)

    return step


def memory(step: Callable[[], Any]) -> float:
    """MiB at the peak of a step, beyond what is held before it."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)


def compared(
    sides: dict[str, Attend], shape: tuple[int, ...], dtype: str, causal: bool, backward: bool,
    peak: float | None,
) -> dict[str, Any]:  # fmt: skip
    leaves = tuple(
        torch.randn(shape, device="cuda", dtype=FORMATS[dtype]).requires_grad_() for _ in range(3)
    )
    dout, steps, missing = torch.randn_like(leaves[0]), {}, {}
    for name, attend in sides.items():
        steps[name] = step_of(attend, leaves, dout, causal, backward)
        try:
            for _ in range(WARM_UP):
                steps[name]()
            torch.cuda.synchronize()
        except RuntimeError as error:
            if name == "triton":
                raise
            # A backend may lack a card, a format or a width; its place stays empty.
            del steps[name]
            missing[name] = str(error).splitlines()[0]
    rounds = []
    for turn in range(ROUNDS):
        # Another one goes first each time.
        order = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
        rounds.append({name: milliseconds(steps[name]) for name in order})
    case = {"shape": dict(zip("BHNd", shape, strict=True)), "dtype": dtype, "causal": causal}
    case |= {"pass": "forward + backward" if backward else "forward", "missing": missing}
    case["peak_mib"] = {name: memory(step) for name, step in steps.items()}
    b, h, n, d = shape
    return case | summary(rounds, flops(b, h, n, d, causal, backward), peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two lengths, nothing written")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA card: nothing measured, nothing written")
    from attn_lessons.flash import triton_kernel

    card = torch.cuda.get_device_name()
    rows = all_errors(triton_kernel.flash_attention)
    wrong = refused(rows)
    print(f"{card}: {len(rows)} cases, {len(wrong)} with an error over twice plain torch's")
    if wrong:
        raise SystemExit(json.dumps(wrong[:5], indent=2))
    sides = {
        "triton": triton_kernel.flash_attention,
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    runs = [
        compared(sides, shape_of(n, d), dtype, causal, backward, peak_of(card))
        for dtype in ("bfloat16", "float16")
        for d in (64, 128)
        for causal in (False, True)
        for backward in (False, True)
        for n in (LENGTHS[1:3] if quick else LENGTHS)
    ]
    result = {"errors": worst(rows), "cases": len(rows), "runs": runs}
    if quick:
        print(json.dumps(result, indent=2))
        return
    properties = torch.cuda.get_device_properties(0)
    where = machine.machine() | {
        "card": card,
        "card_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "peak_tflops": peak_of(card),
    }
    machine.write(slug(card), result, "attn-lessons", "torch", "triton", where=where)


def driver() -> str | None:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return None


if __name__ == "__main__":
    main()
