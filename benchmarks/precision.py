"""What half precision does to training, with the rounding done by hand.

Six parts, each stored as soon as it is done:

- gradients: a histogram of gradients by exponent while a model trains in float32, and the share
  that fp16 would turn into 0 at several loss scales;
- formats: the same model in float32, bf16 and fp16: unscaled, scaled statically and dynamically;
- scales: fp16 at static scales from 1 to 2^40, to see which of them train;
- master: weights kept in bf16 or fp16 alone, and with float32 master weights, at several rates;
- torch: the same model of torch's own layers under autocast, in real fp16 and bf16;
- speed: products in float32, bf16 and fp16 on this processor.

The model is the character language model of ``attn_lessons.transformer``, taken apart so that every
array it would keep in memory can be rounded: ``loss_rounded`` with no rounding is compared with
``language_model_loss`` before anything is measured. What is inside an operation (a product's sum,
softmax, the norms' statistics, the loss) is float32; what it returns is rounded.

A batch is half a million tokens, cut into 1024 micro-batches of 512, as models of some size are
trained: each micro-batch's loss is divided by 1024 before its backward pass. Of the 1024 one is
computed, and its gradient counts 1024 times in float32, so that the optimizer sees what it would
have seen, up to noise, and the half-precision backward pass sees gradients of the true size.

One BLAS thread. Run as ``python benchmarks/precision.py``, with names of parts for only those;
``--quick`` runs a little of each and writes nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import machine
import numpy as np
import torch
import torch.nn.functional as F
import twin

from attn_lessons.attention import causal_mask
from attn_lessons.datasets import batches, characters, topics_text
from attn_lessons.feedforward import gelu, gelu_backward
from attn_lessons.multihead import linear_backward, linear_forward, merge_heads, split_heads
from attn_lessons.normalization import layernorm_backward, layernorm_forward
from attn_lessons.optim import warmup_cosine
from attn_lessons.precision import (
    FORMATS,
    LossScaler,
    mixed_precision_loss,
    round_to,
    share_below,
)
from attn_lessons.softmax import cross_entropy, softmax, softmax_backward
from attn_lessons.training import Record, train, train_start, train_step
from attn_lessons.transformer import Config, init_language_model, language_model_loss

NAME = "precision"
Params = Mapping[str, np.ndarray]
Result = dict[str, Any]
Round = Callable[[np.ndarray], np.ndarray]
Seen = Callable[[str, np.ndarray], None]

CONFIG = Config(n_layers=2, d_model=32, n_heads=4, d_ff=128, max_len=32)
SIZE, MICRO = 16, 1024  # sequences of a micro-batch; micro-batches of a batch
STEPS, PEAK = 300, 3e-3


def rounded(x: float, digits: int = 4) -> float | None:
    """To some digits; None where JSON has no number for it."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def rounding(format: str) -> Round:
    return (lambda x: x) if format == "float32" else (lambda x: round_to(x, format))


# --- the model, taken apart -------------------------------------------------------------------


def loss_rounded(
    tokens: np.ndarray,
    targets: np.ndarray,
    p: Params,
    config: Config,
    r: Round,
    scale: float = 1.0,
    seen: Seen | None = None,
) -> tuple[Any, dict[str, np.ndarray]]:
    """``language_model_loss``, pre-norm and tied, with every stored array rounded by ``r``.

    The gradients are those of ``scale`` times the loss. ``seen`` is told every activation gradient
    before it is rounded.
    """

    def stored(name: str, x: np.ndarray) -> np.ndarray:
        if seen is not None:
            seen(name, x)
        return r(x)

    heads, n, eps = config.n_heads, tokens.shape[1], config.eps
    width, mask = (config.d_model // config.n_heads) ** -0.5, causal_mask(n, n)
    x, layers = r(p["embed.weight"][tokens] + p["position.weight"][:n]), []
    for i in range(config.n_layers):
        start = f"layers.{i}."
        w = {name.removeprefix(start): a for name, a in p.items() if name.startswith(start)}
        normed = r(layernorm_forward(x, w["norm1.weight"], w["norm1.bias"], eps))
        q, k, v = (
            split_heads(
                r(linear_forward(normed, w[f"self_attn.w{s}"], w[f"self_attn.b{s}"])), heads
            )
            for s in "qkv"
        )
        logits = np.where(mask, r(width * (q @ k.swapaxes(-1, -2))), -np.inf)
        probs = r(softmax(logits))
        merged = merge_heads(r(probs @ v))
        middle = r(x + r(linear_forward(merged, w["self_attn.wo"], w["self_attn.bo"])))
        normed2 = r(layernorm_forward(middle, w["norm2.weight"], w["norm2.bias"], eps))
        before = r(linear_forward(normed2, w["linear1.weight"], w["linear1.bias"]))
        active = r(gelu(before))
        layers.append((w, x, normed, q, k, v, probs, merged, middle, normed2, before, active))
        x = r(middle + r(linear_forward(active, w["linear2.weight"], w["linear2.bias"])))
    hidden = r(layernorm_forward(x, p["norm.weight"], p["norm.bias"], eps))
    table = p["embed.weight"]
    scores = r(linear_forward(hidden, table.T))
    loss, dscores = cross_entropy(scores.reshape(-1, len(table)), targets.reshape(-1))
    dscores = stored("logits", (scale * dscores).reshape(scores.shape))

    grads: dict[str, np.ndarray] = {}
    dhidden, dtable, _ = linear_backward(dscores, hidden, table.T)
    dx, grads["norm.weight"], grads["norm.bias"] = layernorm_backward(
        stored("hidden", dhidden), x, p["norm.weight"], eps
    )
    dx = stored("residual", dx)
    for i in reversed(range(config.n_layers)):
        w, x, normed, q, k, v, probs, merged, middle, normed2, before, active = layers[i]
        g: dict[str, np.ndarray] = {}
        dactive, g["linear2.weight"], g["linear2.bias"] = linear_backward(
            dx, active, w["linear2.weight"]
        )
        dbefore = stored("feed-forward", gelu_backward(stored("feed-forward", dactive), before))
        dnormed, g["linear1.weight"], g["linear1.bias"] = linear_backward(
            dbefore, normed2, w["linear1.weight"]
        )
        dbranch, g["norm2.weight"], g["norm2.bias"] = layernorm_backward(
            stored("norm", dnormed), middle, w["norm2.weight"], eps
        )
        dmiddle = stored("residual", dx + stored("norm", dbranch))
        dmerged, g["self_attn.wo"], g["self_attn.bo"] = linear_backward(
            dmiddle, merged, w["self_attn.wo"]
        )
        dout = split_heads(stored("heads", dmerged), heads)
        dv = stored("q, k, v", probs.swapaxes(-1, -2) @ dout)
        dprobs = stored("probabilities", dout @ v.swapaxes(-1, -2))
        dlogits = stored("attention logits", softmax_backward(dprobs, probs))
        dq = stored("q, k, v", width * (dlogits @ k))
        dk = stored("q, k, v", width * (dlogits.swapaxes(-1, -2) @ q))
        dnormed = np.zeros_like(normed)
        for s, grad in zip("qkv", (dq, dk, dv), strict=True):
            part, g[f"self_attn.w{s}"], g[f"self_attn.b{s}"] = linear_backward(
                merge_heads(grad), normed, w[f"self_attn.w{s}"]
            )
            dnormed = dnormed + part
        dbranch, g["norm1.weight"], g["norm1.bias"] = layernorm_backward(
            stored("norm", dnormed), x, w["norm1.weight"], eps
        )
        dx = stored("residual", dmiddle + stored("norm", dbranch))
        grads |= {f"layers.{i}.{name}": a for name, a in g.items()}
    grads["position.weight"] = np.zeros_like(p["position.weight"])
    grads["position.weight"][:n] = dx.sum(axis=0)
    grads["embed.weight"] = np.ascontiguousarray(dtable.T)
    np.add.at(grads["embed.weight"], tokens, dx)
    return loss, grads


@functools.cache
def text() -> tuple[str, np.ndarray]:
    """The vocabulary, and nine tenths of the text."""
    vocabulary, tokens = characters(topics_text())
    return vocabulary, tokens[: 9 * len(tokens) // 10]


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return batches(text()[1], CONFIG.max_len, SIZE, rng)


def new_model(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    params = init_language_model(np.random.default_rng(seed), CONFIG, len(text()[0]))
    return {name: p.astype(dtype) for name, p in params.items()}


def check() -> float:
    """The model taken apart is the library's: largest difference over the largest gradient."""
    params, rng = new_model(0, "float64"), np.random.default_rng(1)
    params = {n: p + 0.1 * rng.normal(size=p.shape) for n, p in params.items()}
    tokens, targets = drawn(rng)
    loss, got = loss_rounded(tokens, targets, params, CONFIG, lambda x: x)
    want_loss, want = language_model_loss(tokens, targets, params, CONFIG)
    assert set(got) == set(want)
    # By all gradients: that of the keys' bias is 0 but for rounding.
    size = max(float(np.abs(g).max()) for g in want.values())
    off = max(float(np.abs(got[n] - g).max()) for n, g in want.items()) / size
    assert abs(loss - want_loss) < 1e-12 * want_loss, (loss, want_loss)
    assert off < 1e-11, off
    return off


def schedule(step: int, peak: float = PEAK, steps: int = STEPS) -> float:
    return warmup_cosine(step, peak, max(steps // 10, 1), steps)


def constant(_: int, rate: float) -> float:
    return rate


def about() -> Result:
    params = new_model(0)
    return {
        "model": "2 pre-norm blocks, width 32, 4 heads, 128 hidden units, context 32, tied "
        f"output, {sum(p.size for p in params.values())} parameters",
        "batch": f"{MICRO} micro-batches of {SIZE} x {CONFIG.max_len} tokens, "
        f"{MICRO * SIZE * CONFIG.max_len} in all, one of them computed",
        "micro_batches": MICRO,
        "tokens": MICRO * SIZE * CONFIG.max_len,
        "training": f"AdamW {PEAK} with warm-up and cosine, {STEPS} steps, no decay, clipped to 1",
        "off_the_library": rounded(check(), 2),
    }


# --- gradients by size ------------------------------------------------------------------------

LOWEST, HIGHEST = -70, 0


def exponents(x: np.ndarray) -> np.ndarray:
    """How many entries have each exponent from LOWEST to HIGHEST; zeros are not among them."""
    power = np.frexp(x[x != 0])[1] - 1
    return np.bincount(np.clip(power, LOWEST, HIGHEST) - LOWEST, minlength=HIGHEST - LOWEST + 1)


def gradients(quick: bool) -> Result:
    """Gradients of a float32 run, every 50th step, as a micro-batch's backward pass has them."""
    steps, every = (4, 2) if quick else (STEPS, 50)
    scales = [0, 3, 6, 9, 12, 15, 18, 21, 24]
    kinds: dict[str, dict[str, Any]] = {}
    largest = 0.0

    def count(kind: str, x: np.ndarray) -> None:
        nonlocal largest
        largest = max(largest, float(np.abs(x).max()))
        one = kinds.setdefault(
            kind, {"entries": 0, "zeros": 0, "lost": dict.fromkeys(map(str, scales), 0)}
        )
        one["entries"] += x.size
        one["zeros"] += int((x == 0).sum())
        one["exponents"] = one.get("exponents", 0) + exponents(x)
        nonzero = x.size - int((x == 0).sum())
        for s in scales:
            one["lost"][str(s)] += round(share_below(x, "float16", 2.0**s) * nonzero)

    calls = itertools.count()

    def loss(params: Any, rng: np.random.Generator) -> Any:
        watch = count if next(calls) % every == 0 else None
        value, grads = loss_rounded(*drawn(rng), params, CONFIG, lambda x: x, 1 / MICRO, watch)
        if watch is not None:
            for grad in grads.values():
                watch("weights", grad)
        return value, {n: MICRO * g for n, g in grads.items()}

    train(train_start(new_model(0), 0), loss, steps, schedule, weight_decay=0.0)
    total: dict[str, Any] = {
        "entries": 0,
        "zeros": 0,
        "exponents": 0,
        "lost": dict.fromkeys(map(str, scales), 0),
    }
    for kind, one in kinds.items():
        if kind != "weights":
            total["entries"] += one["entries"]
            total["zeros"] += one["zeros"]
            total["exponents"] = total["exponents"] + one["exponents"]
            for s, lost in one["lost"].items():
                total["lost"][s] += lost
    found: Result = {}
    for kind, one in {"activations": total, **kinds}.items():
        nonzero = one["entries"] - one["zeros"]
        found[kind] = {
            "entries": one["entries"],
            "share_zero": rounded(one["zeros"] / one["entries"]),
            "share_of_the_others_lost": {
                s: rounded(lost / nonzero) for s, lost in one["lost"].items()
            },
        }
        if kind in ("activations", "weights"):
            found[kind]["counts"] = one["exponents"].tolist()
    note(f"gradients: lost {found['activations']['share_of_the_others_lost']}")
    return about() | {
        "seed": 0,
        "steps_looked_at": list(range(1, steps + 1, every)),
        "exponents_from": LOWEST,
        "log2_of_scales": scales,
        "largest": rounded(largest),
        "largest_scale_that_fits": rounded(math.log2(FORMATS["float16"].largest / largest)),
        "kinds": found,
    }


# --- runs -------------------------------------------------------------------------------------


def mixed_run(
    format: str, scaler: LossScaler, seed: int, steps: int, peak: float = PEAK
) -> tuple[list[Record], list[float], list[float]]:
    """A run with float32 master weights: records, the scale of each step, the share it lost."""
    r, scales, lost = rounding(format), [], []

    def half(weights: Any, rng: np.random.Generator, scale: float) -> Any:
        tokens, targets = drawn(rng)
        scales.append(scale)
        entries = [0, 0]

        def count(_: str, x: np.ndarray) -> None:
            nonzero = int(np.count_nonzero(x))
            entries[0] += round(share_below(x, "float16") * nonzero)
            entries[1] += nonzero

        watch = count if format == "float16" and len(scales) % 10 == 1 else None
        # A scale that is too high makes inf, and inf - inf NaN: that is what is looked for.
        with np.errstate(over="ignore", invalid="ignore"):
            found = loss_rounded(tokens, targets, weights, CONFIG, r, scale / MICRO, watch)
        if watch is not None:
            lost.append(entries[0] / entries[1])
        return found

    one = mixed_precision_loss(half, scaler, format=format)  # type: ignore[arg-type]

    def loss(master: Any, rng: np.random.Generator) -> Any:
        value, grads = one(master, rng)
        return value, {n: MICRO * g for n, g in grads.items()}

    _, records = train(
        train_start(new_model(seed), seed),
        loss,
        steps,
        lambda step: schedule(step, peak, steps),
        weight_decay=0.0,
        stop_on_divergence=False,
    )
    return records, scales, lost


def summary(records: Sequence[Record], every: int = 10) -> Result:
    losses = [r.loss for r in records]
    return {
        "last": rounded(float(np.mean(losses[-20:])), 6),
        "skipped": sum(r.skipped for r in records),
        "loss_every": every,
        "loss": [
            rounded(float(np.mean(losses[i : i + every]))) for i in range(0, len(losses), every)
        ],
    }


STATIC = 2.0**13
RUNS: dict[str, tuple[str, Callable[[], LossScaler]]] = {
    "float32": ("float32", lambda: LossScaler(1.0, dynamic=False)),
    "bf16": ("bfloat16", lambda: LossScaler(1.0, dynamic=False)),
    "fp16": ("float16", lambda: LossScaler(1.0, dynamic=False)),
    "fp16, static": ("float16", lambda: LossScaler(STATIC, dynamic=False)),
    "fp16, dynamic": ("float16", lambda: LossScaler(2.0**16, interval=20)),
    "fp16, dynamic from 2^40": ("float16", lambda: LossScaler(2.0**40, interval=20)),
}


def formats(quick: bool) -> Result:
    steps, seeds = (4, 1) if quick else (STEPS, 3)
    runs: dict[str, list[Result]] = {name: [] for name in RUNS}
    for seed in range(seeds):
        for name, (format, scaler) in RUNS.items():
            records, scales, lost = mixed_run(format, scaler(), seed, steps)
            one: Result = {"seed": seed} | summary(records)
            if lost:
                one["share_lost"] = rounded(float(np.mean(lost)))
            if "dynamic" in name and seed == 0:
                one["log2_scale"] = [int(math.log2(s)) for s in scales]
                one["skipped_at"] = [r.step for r in records if r.skipped]
            runs[name].append(one)
            note(f"{name}, seed {seed}: {one['last']}, {one['skipped']} skipped")
    return about() | {
        "static_scale": STATIC,
        "interval": 20,
        "unigram_entropy": rounded(unigram_entropy()),
        "median_last": {
            name: rounded(statistics.median(r["last"] for r in each), 6)
            for name, each in runs.items()
        },
        "runs": runs,
    }


def unigram_entropy() -> float:
    """The loss of a model that knows how often each character comes, and nothing else."""
    share = np.bincount(text()[1]) / len(text()[1])
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def scales(quick: bool) -> Result:
    steps, powers = (4, (0, 13)) if quick else (150, range(0, 41, 4))
    table = []
    for power in powers:
        records, _, lost = mixed_run("float16", LossScaler(2.0**power, dynamic=False), 0, steps)
        one = summary(records)
        row = {"log2_scale": power, "last": one["last"], "skipped": one["skipped"]}
        table.append(row | {"share_lost": rounded(float(np.mean(lost)))})
        note(f"scale 2^{power}: {table[-1]}")
    records, _, _ = mixed_run("float32", LossScaler(1.0, dynamic=False), 0, steps)
    return {
        "seed": 0,
        "steps": steps,
        "float32": summary(records)["last"],
        "table": table,
    }


# --- master weights ---------------------------------------------------------------------------


def weights_run(
    format: str,
    master: bool,
    start: Params,
    rate: Callable[[int], float],
    steps: int,
    seed: int,
) -> tuple[Result, dict[str, np.ndarray]]:
    """A run whose weights live in ``format``, with or without float32 ones behind them."""
    r, tried, lost = rounding(format), 0, 0
    scaler = LossScaler(STATIC if format == "float16" else 1.0, dynamic=False)

    def half(weights: Any, rng: np.random.Generator, scale: float) -> Any:
        return loss_rounded(*drawn(rng), weights, CONFIG, r, scale / MICRO)

    one = mixed_precision_loss(half, scaler, format=format)  # type: ignore[arg-type]

    def loss(weights: Any, rng: np.random.Generator) -> Any:
        value, grads = one(weights, rng)
        return value, {n: MICRO * g for n, g in grads.items()}

    state = train_start(start if master else {n: r(p) for n, p in start.items()}, seed)
    records = []
    for step in range(1, steps + 1):
        before = state.params
        state, record = train_step(state, loss, rate(step), weight_decay=0.0, max_norm=1.0)
        records.append(record)
        if not master:
            wanted = state.params
            state = state._replace(params={n: r(p) for n, p in wanted.items()})
            for n, p in before.items():
                asked = wanted[n] != p
                tried += int(asked.sum())
                lost += int((asked & (state.params[n] == p)).sum())
    result: Result = {"format": format, "master": master} | summary(records)
    if not master:
        result["share_of_updates_lost"] = rounded(lost / max(tried, 1))
    return result, state.params


def master(quick: bool) -> Result:
    """From new weights at three peak rates; then on from trained ones at three constant rates."""
    steps = 4 if quick else STEPS
    kinds = [("float32", True), ("bfloat16", True), ("bfloat16", False)]
    new, learnt = [], new_model(0)
    for peak in (3e-3, 1e-3, 3e-4):
        for format, kept in (*kinds, ("float16", True), ("float16", False)):
            run, params = weights_run(
                format,
                kept,
                new_model(0),
                functools.partial(schedule, peak=peak, steps=steps),
                steps,
                0,
            )
            if format == "float32" and peak == PEAK:
                learnt = params
            new.append({"peak": peak} | run)
            note(f"{format} up to {peak}, master {kept}: {run['last']}")
    on = []
    for rate in (3e-4, 1e-4, 3e-5):
        for format, kept in kinds:
            run, _ = weights_run(
                format, kept, learnt, functools.partial(constant, rate=rate), steps, 1
            )
            on.append({"rate": rate} | run)
            note(f"{format} on at {rate}, master {kept}: {run['last']}")
    return {"seed": 0, "steps": steps, "runs": new, "continued": on, "continued_seed": 1}


# --- torch ------------------------------------------------------------------------------------


def torch_run(dtype: torch.dtype, scale: float, steps: int, seed: int) -> Result:
    """The twin under autocast; GradScaler with a scale of 1 that never grows scales nothing."""
    model: Any = twin.Twin(new_model(seed), CONFIG)
    optimizer = twin.optimizer_of(model, 0.0)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=scale, growth_interval=20 if scale > 1 else 10**9
    )
    rng, losses, skipped, path = np.random.default_rng(seed), [], 0, []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, PEAK, steps)
        inputs, targets = (torch.from_numpy(a) for a in drawn(rng))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        scaler.scale(loss / MICRO).backward()
        scaler.unscale_(optimizer)
        for p in model.parameters():
            p.grad *= MICRO
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        path.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < path[-1]
        losses.append(loss.item())
    return {
        "seed": seed,
        "last": rounded(float(np.mean(losses[-20:])), 6),
        "skipped": skipped,
        "scale_at_the_end": scaler.get_scale(),
        "loss_every": 10,
        "loss": [rounded(float(np.mean(losses[i : i + 10]))) for i in range(0, len(losses), 10)],
    }


def torch_runs(quick: bool) -> Result:
    steps, seeds = (4, 1) if quick else (STEPS, 3)
    runs: dict[str, list[Result]] = {}
    for seed in range(seeds):
        for name, dtype, scale in (
            ("float32", torch.float32, 1.0),
            ("bf16", torch.bfloat16, 1.0),
            ("fp16", torch.float16, 1.0),
            ("fp16, dynamic", torch.float16, 2.0**16),
        ):
            begun = time.perf_counter()
            runs.setdefault(name, []).append(torch_run(dtype, scale, steps, seed))
            took = time.perf_counter() - begun
            note(f"torch {name}, seed {seed}: {runs[name][-1]['last']} in {took:.0f} s")
    return {
        "steps": steps,
        "median_last": {
            name: rounded(statistics.median(r["last"] for r in each), 6)
            for name, each in runs.items()
        },
        "runs": runs,
    }


def speed(quick: bool) -> Result:
    """Square products, all formats in turn, medians of ratios to float32."""
    rounds, found = (1 if quick else 15), {}
    for n in (256, 512):
        pair = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
        operands = {
            name: pair.to(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")
        }
        seconds: dict[str, list[float]] = {name: [] for name in operands}
        for _ in range(rounds):
            for name, (a, b) in operands.items():
                begun = time.perf_counter()
                a @ b
                seconds[name].append(time.perf_counter() - begun)
        found[str(n)] = {
            name: {
                "gflops": rounded(2e-9 * n**3 / statistics.median(each), 3),
                "times_float32": rounded(
                    statistics.median(np.divide(each, seconds["float32"]).tolist()), 3
                ),
            }
            for name, each in seconds.items()
        }
    flags = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        pass
    wanted = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
    return {"products": found, "instructions": [f for f in wanted if f in flags.split()]}


# --- all of it --------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Result]] = {
    "gradients": gradients,
    "formats": formats,
    "scales": scales,
    "master": master,
    "torch": torch_runs,
    "speed": speed,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    machine.run_parts(NAME, PARTS, ("attn-lessons", "numpy", "torch"), __doc__)
