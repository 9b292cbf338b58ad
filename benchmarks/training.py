"""What training with hand-written gradients reaches, and what makes it fail.

Six parts, each stored as soon as it is done:

- digits: a classifier of scikit-learn's digits, several seeds;
- curves: a character language model beside the same model under torch autograd, step by step;
- optimizers: Adam and SGD on a language model, each with its best of six learning rates;
- warmup: post-norm and pre-norm, with and without warm-up, over depths and learning rates;
- decay: AdamW against L2 in Adam, over decay and learning rate;
- divergence: runs whose learning rate grows until they break.

Gradients are those of ``attn_lessons``; torch is there to be compared with. One BLAS thread: two
of them wait for each other on a machine that has other work. Run as ``python
benchmarks/training.py``, with names of parts for only those; ``--quick`` runs a little of each
and writes nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import machine
import numpy as np
import torch
import twin

from attn_lessons.datasets import batches, characters, digits_sequences, topics_text
from attn_lessons.optim import (
    adam_start,
    adam_step,
    adamw_update,
    clip_by_global_norm,
    decay_names,
    sgd_step,
    warmup_cosine,
)
from attn_lessons.training import Record, divergence, norm_by_layer, train, train_start
from attn_lessons.transformer import (
    Config,
    classifier_forward,
    classifier_loss,
    init_classifier,
    init_language_model,
    language_model_loss,
)

NAME = "training"
Params = dict[str, np.ndarray]
Result = dict[str, Any]
Schedule = Callable[[int], float]


def rounded(x: float, digits: int = 4) -> float | None:
    """To some digits; None where JSON has no number for it."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def cast(params: Params, dtype: str) -> Params:
    return {name: p.astype(dtype) for name, p in params.items()}


def thinned(values: Sequence[float], every: int) -> list[float | None]:
    """Means over ``every`` steps, the last of which may be fewer."""
    return [rounded(float(np.mean(values[i : i + every]))) for i in range(0, len(values), every)]


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# --- digits -----------------------------------------------------------------------------------


def digits_run(seed: int, epochs: int, every: int = 90) -> Result:
    """One classifier: two blocks of width 48, AdamW, dropout, label smoothing."""
    x, y, x_test, y_test = digits_sequences(seed)
    x, x_test = x.astype("float32"), x_test.astype("float32")
    config = Config(n_layers=2, d_model=48, n_heads=4, d_ff=192, max_len=8)
    params = cast(init_classifier(np.random.default_rng(seed), config, 8, 10), "float32")
    steps = epochs * len(x) // 32

    def loss(params: Any, rng: np.random.Generator) -> Any:
        rows = rng.integers(0, len(x), 32)
        return classifier_loss(
            x[rows], y[rows], params, config, label_smoothing=0.1, rate=0.1, rng=rng
        )

    def schedule(step: int) -> float:
        return warmup_cosine(step, 3e-3, steps // 10, steps)

    def accuracy(params: Any, x: np.ndarray, y: np.ndarray) -> float:
        logits, _ = classifier_forward(x, params, config)
        return float((logits.argmax(axis=1) == y).mean())

    state, seconds = train_start(params, seed), 0.0
    losses: list[float] = []
    tested: list[list[float]] = []
    while state.step < steps:
        begun = time.perf_counter()
        until = min(state.step + every, steps)
        state, records = train(state, loss, until, schedule, weight_decay=0.05)
        seconds += time.perf_counter() - begun
        losses += [r.loss for r in records]
        tested.append([state.step, round(accuracy(state.params, x_test, y_test), 4)])
        assert state.step == until, divergence(records)
    return {
        "seed": seed,
        "test_accuracy": tested[-1][1],
        "train_accuracy": round(accuracy(state.params, x, y), 4),
        "seconds": round(seconds, 1),
        "steps": steps,
        "loss_every": every,
        "loss": thinned(losses, every),
        "accuracy_at_step": tested,
    }


def digits(quick: bool) -> Result:
    runs = []
    for seed in range(1 if quick else 6):
        runs.append(digits_run(seed, 2 if quick else 30))
        note(f"digits {seed}: {runs[-1]['test_accuracy']:.2%} in {runs[-1]['seconds']} s")
    return {
        "model": "2 pre-norm blocks, width 48, 4 heads, 192 hidden units, float32",
        "training": "AdamW 3e-3 with warm-up and cosine, decay 0.05, dropout 0.1, "
        "label smoothing 0.1, batches of 32, 30 times the 1437 images; tested on 360 others",
        "accuracy": {
            "least": min(r["test_accuracy"] for r in runs),
            "median": statistics.median(r["test_accuracy"] for r in runs),
            "most": max(r["test_accuracy"] for r in runs),
        },
        "seconds_most": max(r["seconds"] for r in runs),
        "runs": runs,
    }


# --- a language model -------------------------------------------------------------------------


@functools.cache
def text() -> tuple[str, np.ndarray, np.ndarray]:
    """The vocabulary; nine tenths of the text to learn from; the rest to be tested on."""
    vocabulary, tokens = characters(topics_text())
    cut = 9 * len(tokens) // 10
    return vocabulary, tokens[:cut], tokens[cut:]


def language_model(config: Config, seed: int, dtype: str) -> Params:
    return cast(init_language_model(np.random.default_rng(seed), config, len(text()[0])), dtype)


def loss_on_text(config: Config, size: int) -> Callable[..., Any]:
    def loss(params: Any, rng: np.random.Generator) -> Any:
        inputs, targets = batches(text()[1], config.max_len, size, rng)
        return language_model_loss(inputs, targets, params, config)

    return loss


def loss_on_rest(params: Any, config: Config, pieces: int = 100) -> float:
    """Mean loss on pieces of the last tenth, the same ones for every model of a length."""
    rng = np.random.default_rng(0)
    draws = [batches(text()[2], config.max_len, 10, rng) for _ in range(pieces // 10)]
    return float(np.mean([float(language_model_loss(*d, params, config)[0]) for d in draws]))


def curves(quick: bool) -> Result:
    """Ours and torch's in turn, a step each: the same start, batches, schedule, clipping, decay."""
    steps, size, seed = (20 if quick else 1200), 16, 0
    config = Config(n_layers=2, d_model=64, n_heads=4, d_ff=256, max_len=64)
    params = language_model(config, seed, "float64")

    def schedule(step: int) -> float:
        return warmup_cosine(step, 3e-3, min(50, steps // 2), steps)

    drawn = np.random.default_rng(seed)
    theirs, their_step = twin.stepper(
        params,
        config,
        lambda: batches(text()[1], config.max_len, size, drawn),
        schedule,
        weight_decay=0.1,
        max_norm=1.0,
    )
    state, loss = train_start(params, seed), loss_on_text(config, size)
    records: list[Record] = []
    other: list[float] = []
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        state, taken = train(state, loss, step, schedule, weight_decay=0.1, max_norm=1.0)
        middle = time.perf_counter()
        other.append(their_step())
        seconds["ours"].append(middle - begun)
        seconds["torch"].append(time.perf_counter() - middle)
        records += taken
        if step % 100 == 0:
            note(f"curves {step}: {taken[0].loss:.4f} ours, {other[-1]:.4f} torch's")
    ours = [r.loss for r in records]
    gaps = np.abs(np.subtract(ours, other))
    theirs_again = params | {
        "embed.weight": theirs.embed.detach().numpy(),
        "position.weight": theirs.position.detach().numpy(),
    }
    off = {n: np.abs(state.params[n] - theirs_again[n]).max() for n in theirs_again}
    return {
        "model": "2 pre-norm blocks, width 64, 4 heads, 256 hidden units, context 64, tied "
        f"output, {sum(p.size for p in params.values())} parameters, float64",
        "training": "AdamW 3e-3 with warm-up and cosine, decay 0.1 on projections, clipped to 1, "
        "batches of 16, no dropout",
        "text": {
            "characters": len(text()[1]) + len(text()[2]),
            "vocabulary": len(text()[0]),
            "tested_on": len(text()[2]),
        },
        "steps": steps,
        "difference": {
            "first_100": rounded(float(gaps[:100].max()), 2),
            "all": rounded(float(gaps.max()), 2),
            "at_step": [[s, rounded(float(gaps[:s].max()), 2)] for s in (1, 10, 100, 300, 1000)],
            "embedding_at_the_end": rounded(float(off["embed.weight"]), 2),
        },
        "first_100": {"ours": [round(x, 10) for x in ours[:100]]},
        "loss_every": 20,
        "loss": {"ours": thinned(ours, 20), "torch": thinned(other, 20)},
        "norm": thinned([r.norm for r in records], 20),
        "final": {
            "train": rounded(float(np.mean(ours[-50:]))),
            "rest": rounded(loss_on_rest(state.params, config)),
        },
        "seconds": {side: round(sum(each), 1) for side, each in seconds.items()},
        "ours_over_torch": round(
            statistics.median(np.divide(seconds["ours"], seconds["torch"]).tolist()), 2
        ),
        "sample": sample(state.params, config, 300 if not quick else 20),
    }


def sample(params: Any, config: Config, n: int) -> str:
    """What the model writes after a line's end, a character at a time."""
    from attn_lessons.softmax import softmax
    from attn_lessons.transformer import language_model_forward

    vocabulary, rng = text()[0], np.random.default_rng(0)
    tokens = [vocabulary.index("\n")]
    for _ in range(n):
        logits, _ = language_model_forward(np.array([tokens[-config.max_len :]]), params, config)
        tokens.append(int(rng.choice(len(vocabulary), p=softmax(logits[0, -1] / 0.8))))
    return "".join(vocabulary[i] for i in tokens[1:])


# --- Adam and SGD -----------------------------------------------------------------------------

SMALL = Config(n_layers=2, d_model=32, n_heads=4, d_ff=128, max_len=32)


def descended(config: Config, method: str, lr: float, steps: int, seed: int = 0) -> Result:
    """A small language model by one optimizer; every method sees the same batches."""
    params = language_model(config, seed, "float32")
    loss, rng = loss_on_text(config, 16), np.random.default_rng(seed)
    adam = adam_start(params)
    velocity = {name: np.zeros_like(p) for name, p in params.items()}
    losses = []
    for step in range(1, steps + 1):
        value, grads = loss(params, rng)
        losses.append(float(value))
        if not math.isfinite(losses[-1]):
            break
        if method.endswith("clipped"):
            grads, _ = clip_by_global_norm(grads, 1.0)
        rate = warmup_cosine(step, lr, steps // 10, steps)
        if method.startswith("Adam"):
            params, adam = adamw_update(params, grads, adam, rate, weight_decay=0.0)
            continue
        for name, grad in grads.items():
            params[name], velocity[name] = sgd_step(
                params[name], grad, velocity[name], rate, momentum=0.9
            )
    return {
        "lr": lr,
        "last": rounded(float(np.mean(losses[-20:]))),
        "rest": rounded(loss_on_rest(params, config)) if len(losses) == steps else None,
        "loss_every": 10,
        "loss": thinned(losses, 10),
    }


RATES = {
    "Adam": (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 3e-2),
    "SGD with momentum": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "SGD with momentum, clipped": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}


SETTINGS = {
    "pre-norm, 2 blocks": (SMALL, tuple(RATES)),
    "post-norm, 4 blocks": (
        SMALL._replace(norm="post", n_layers=4),
        ("Adam", "SGD with momentum, clipped"),
    ),
}


def optimizers(quick: bool) -> Result:
    steps = 20 if quick else 500
    settings: Result = {}
    for setting, (config, methods) in SETTINGS.items():
        found = {}
        for method in methods:
            rates = RATES[method][2:3] if quick else RATES[method]
            runs = [descended(config, method, lr, steps) for lr in rates]
            best = min(runs, key=lambda r: math.inf if r["rest"] is None else r["rest"])
            note(f"{setting}, {method}: {best['rest']} at {best['lr']}")
            found[method] = {"best_lr": best["lr"], "best_rest": best["rest"], "runs": runs}
        settings[setting] = found
    return {
        "model": "width 32, context 32, float32",
        "training": f"{steps} steps of 16 pieces, warm-up over a tenth, then cosine; no decay",
        "settings": settings,
    }


# --- warm-up ----------------------------------------------------------------------------------

WARMUP = 100


def warmed(norm: Any, depth: int, lr: float, warmup: int, steps: int, seed: int) -> Result:
    """A small language model at a constant rate, behind a linear warm-up or none."""
    config = SMALL._replace(norm=norm, n_layers=depth)
    params = language_model(config, seed, "float32")
    _, records = train(
        train_start(params, seed),
        loss_on_text(config, 8),
        steps,
        lambda step: lr * min(1.0, step / warmup) if warmup else lr,
        weight_decay=0.0,
        max_norm=None,
        stop_on_divergence=False,
    )
    losses = [r.loss for r in records]
    return {
        "norm": norm,
        "depth": depth,
        "lr": lr,
        "warmup": warmup,
        "seed": seed,
        "last": rounded(float(np.mean(losses[-20:]))),
        "loss_every": 10,
        "loss": thinned(losses, 10),
        "longest_gradient": rounded(max(r.norm for r in records), 3),
    }


def unigram_entropy() -> float:
    """The loss of a model that knows how often each character comes, and nothing else."""
    share = np.bincount(text()[1]) / len(text()[1])
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def norms_at_start(norm: Any, depth: int, draws: int = 4) -> dict[str, float | None]:
    """Length of each layer's gradient before the first step, a mean over starts and batches."""
    config = SMALL._replace(norm=norm, n_layers=depth)
    found: dict[str, list[float]] = {}
    for seed in range(draws):
        params = language_model(config, seed, "float64")
        _, grads = loss_on_text(config, 8)(params, np.random.default_rng(seed))
        for layer, length in norm_by_layer(grads).items():
            found.setdefault(layer, []).append(length)
    return {layer: rounded(float(np.mean(each)), 3) for layer, each in sorted(found.items())}


def warmup(quick: bool) -> Result:
    depths, rates, steps = (2, 4, 6), (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), 250
    if quick:
        depths, rates, steps = (2,), (1e-3,), 10
    runs = []
    for depth in depths:
        for norm in ("post", "pre"):
            for lr in rates:
                for seed in range(1):
                    pair = [warmed(norm, depth, lr, w, steps, seed) for w in (0, WARMUP)]
                    runs += pair
                    note(
                        f"{norm}, {depth} deep, {lr}: {pair[0]['last']} without warm-up, "
                        f"{pair[1]['last']} with"
                    )
    return {
        "model": "pre-norm or post-norm blocks, width 32, context 32, float32",
        "training": f"Adam, {steps} steps of 8 pieces at a constant rate behind a linear warm-up "
        f"of {WARMUP} steps or none; not clipped",
        "unigram_entropy": rounded(unigram_entropy()),
        "runs": runs,
        "norms_at_start": {norm: norms_at_start(norm, max(depths)) for norm in ("post", "pre")},
    }


# --- decay ------------------------------------------------------------------------------------

FEW = 200


def decayed(method: str, lr: float, decay: float, steps: int, seed: int) -> tuple[float, float]:
    """Loss and error on the digits that were not learnt from, after learning from 200.

    ``decay`` is L2's coefficient, or for AdamW the share of a weight that a step takes away while
    the rate is at its peak: learning rate times ``weight_decay``.
    """
    every = digits_sequences(0)
    x = np.concatenate([every.x_train, every.x_test]).astype("float32")
    y = np.concatenate([every.y_train, every.y_test])
    config = Config(n_layers=1, d_model=32, n_heads=4, d_ff=128, max_len=8)
    params = cast(init_classifier(np.random.default_rng(seed), config, 8, 10), "float32")
    adam, rng, chosen = adam_start(params), np.random.default_rng(seed), decay_names(params)
    for step in range(1, steps + 1):
        rows = rng.integers(0, FEW, 32)
        _, grads = classifier_loss(x[rows], y[rows], params, config)
        rate = warmup_cosine(step, lr, steps // 10, steps)
        if method == "AdamW":
            params, adam = adamw_update(
                params, grads, adam, rate, weight_decay=decay / lr, decayed=chosen
            )
            continue
        stepped = {
            n: adam_step(
                p,
                grads[n],
                adam.m[n],
                adam.v[n],
                step,
                rate,
                weight_decay=decay if n in chosen else 0.0,
            )
            for n, p in params.items()
        }
        params, m, v = ({n: each[i] for n, each in stepped.items()} for i in range(3))
        adam = adam._replace(step=step, m=m, v=v)
    logits, _ = classifier_forward(x[FEW:], params, config)
    loss, _ = classifier_loss(x[FEW:], y[FEW:], params, config)
    return float(loss), float((logits.argmax(axis=1) != y[FEW:]).mean())


GRID = {
    "AdamW": (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "L2 in Adam": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1),
}


def decay(quick: bool) -> Result:
    steps, seeds = (10, 1) if quick else (300, 2)
    rates = (1e-3,) if quick else (3e-4, 1e-3, 3e-3, 1e-2)
    methods = {}
    for method, decays in GRID.items():
        table = []
        for lr in rates:
            for share in decays[:2] if quick else decays:
                found = [decayed(method, lr, share, steps, seed) for seed in range(seeds)]
                loss, error = np.mean(found, axis=0)
                table.append(
                    {"lr": lr, "decay": share, "loss": rounded(loss), "error": rounded(error)}
                )
            best = min((row for row in table if row["lr"] == lr), key=lambda row: row["loss"])
            note(f"{method} at {lr}: {best['loss']} at decay {best['decay']}")
        best_at = {
            str(lr): min((r for r in table if r["lr"] == lr), key=lambda r: r["loss"])
            for lr in rates
        }
        methods[method] = {"best_at_rate": best_at, "table": table}
    return {
        "model": "1 pre-norm block, width 32, float32, on digits",
        "training": f"{steps} steps of 32 from {FEW} images, warm-up and cosine; tested on the "
        f"other {1797 - FEW}; means of {seeds} seeds",
        "decay": "AdamW: learning rate times weight_decay, the share that a step takes at the "
        "peak; L2 in Adam: the coefficient in the gradient",
        "methods": methods,
    }


# --- divergence -------------------------------------------------------------------------------


def broken(norm: Any, seed: int, depth: int, schedule: Schedule, steps: int) -> Result:
    """A language model at rates that are too high, and what is to be seen of it step by step."""
    config = SMALL._replace(norm=norm, n_layers=depth)
    _, records = train(
        train_start(language_model(config, seed, "float32"), seed),
        loss_on_text(config, 8),
        steps,
        schedule,
        weight_decay=0.0,
        max_norm=None,
        stop_on_divergence=False,
        by_layer=True,
    )
    seen = next((n for n in range(1, steps + 1) if divergence(records[:n])), None)
    losses = np.array([r.loss for r in records])
    norms = np.array([r.norm for r in records])
    first = first_over(norms)
    return {
        "norm": norm,
        "depth": depth,
        "seed": seed,
        "says": divergence(records[:seen]) if seen else None,
        "said_at_step": seen,
        "norm_first_over": first,
        "loss_first_over": first_over(losses),
        "loss_first_above_start": next(
            (i + 1 for i in range(20, steps) if losses[i] > losses[0]), None
        ),
        "last": rounded(float(losses[-20:].mean())),
        "grown_by_layer": grown(records, first) if first else {},
        "loss": [rounded(x) for x in losses],
        "norm_of_gradient": [rounded(x, 3) for x in norms],
    }


def first_over(values: np.ndarray, times: float = 3.0, window: int = 50) -> int | None:
    """The first step that is over three times the median of the 50 before it."""
    for i in range(20, len(values)):
        if not values[i] <= times * np.median(values[max(0, i - window) : i]):
            return i + 1
    return None


def grown(records: Sequence[Record], step: int, window: int = 50) -> dict[str, float | None]:
    """Each layer's gradient at a step, over its median of the 50 steps before."""
    before = records[max(0, step - 1 - window) : step - 1]
    return {
        layer: rounded(length / float(np.median([r.norms[layer] for r in before])), 3)
        for layer, length in sorted(records[step - 1].norms.items())
    }


GROWTH, WARMED_TO = 1.02, 1e-2


def diverged(quick: bool) -> Result:
    growing, fixed = [], []
    for seed in range(1 if quick else 3):
        for norm in ("post", "pre"):
            growing.append(broken(norm, seed, 4, lambda t: 1e-3 * GROWTH**t, 30 if quick else 340))
        fixed.append(
            broken("post", seed, 6, lambda t: WARMED_TO * min(1, t / 100), 30 if quick else 200)
        )
        for run in (*growing[-2:], fixed[-1]):
            note(
                f"{run['norm']} {seed}: gradient at {run['norm_first_over']}, loss at "
                f"{run['loss_first_over']}, said: {run['says']}"
            )
    return {
        "model": "blocks of width 32, context 32, float32; Adam, not clipped, batches of 8",
        "growing_rate": f"4 blocks; the rate is 0.001 times {GROWTH} to the power of the step",
        "fixed_rate": f"6 blocks; the rate rises to {WARMED_TO} over 100 steps and stays",
        "first_over": "the first step over 3 times the median of the 50 steps before",
        "unigram_entropy": rounded(unigram_entropy()),
        "growing": growing,
        "fixed": fixed,
    }


# --- all of it --------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Result]] = {
    "digits": digits,
    "curves": curves,
    "optimizers": optimizers,
    "warmup": warmup,
    "decay": decay,
    "divergence": diverged,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    machine.run_parts(NAME, PARTS, ("attn-lessons", "numpy", "scikit-learn", "torch"), __doc__)
