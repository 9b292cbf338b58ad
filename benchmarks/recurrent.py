"""How far back an RNN, an LSTM and attention learn to look, and the LSTM's time beside torch's.

Two tasks whose answer lies ``lag`` steps back. *Adding*: two of ``lag`` numbers are marked, one in
each half, and their sum is asked for (Hochreiter & Schmidhuber 1997, experiment 4, in the form of
Le et al. 2015); to answer 1 always costs 1/6 of mean squared error. *Copying*: symbols, then
``lag`` blanks, then the same symbols in the same order (Arjovsky et al. 2016, section 5.1, with
fewer symbols); to guess is right once in eight.

All models have about the same number of weights but for attention's positions, and all are trained
by ``attn_lessons.training`` with the same number of updates, each kind at the best of three
learning rates on a seed of its own. Every run is reported with its seed, the update at which it was
first right, and its time, on a clock and of one processor; the lags of 200 and more are run with
one seed. Beside the runs: the norms of the state's Jacobian by lag before and after training, and
of the loss's gradient by each input before it.

Run as ``python benchmarks/recurrent.py``; ``--times`` measures the LSTM's time alone, with one
thread on either side, and puts it into the results; ``--quick`` prints a short run and writes
nothing.
Finished runs are kept in ``results/recurrent.partial.jsonl`` until all are there, so an interrupted
one goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import machine
import numpy as np
from threadpoolctl import threadpool_limits

from attn_lessons.recurrent import (
    gradient_norm_by_lag,
    init_lstm,
    init_rnn,
    lstm_backward_cached,
    lstm_forward,
    lstm_gradient_norm_by_lag,
    rnn_backward_cached,
    rnn_forward,
    to_torch_lstm,
)
from attn_lessons.softmax import cross_entropy
from attn_lessons.training import train, train_start
from attn_lessons.transformer import (
    Config,
    classifier_backward,
    classifier_forward,
    init_classifier,
    init_language_model,
    language_model_backward,
    language_model_forward,
)

Array = np.ndarray
Params = Mapping[str, Array]
Grads = dict[str, Array]

LAGS = (10, 30, 100, 200, 500)
SEEDS = {10: (0, 1), 30: (0, 1), 100: (0, 1), 200: (0,), 500: (0,)}
UPDATES = 500
EVERY = 50  # updates between two looks at held-out sequences
BATCH = 32
HELD_OUT = 256
SYMBOLS, COPIED = 8, 2
ADDING_SOLVED, COPY_SOLVED = 0.01, 0.99
WIDTHS = {"rnn": 64, "lstm": 32}
# Tried at one lag with a seed that no run has, by the first model of each kind.
RATES, RATE_LAG, RATE_SEED, RATE_UPDATES = (1e-3, 3e-3, 1e-2), 30, 5, UPDATES
MODELS = {
    "RNN": ("rnn", {}),
    "LSTM, forget bias 1": ("lstm", {"forget_bias": 1.0}),
    "LSTM, forget bias 0": ("lstm", {"forget_bias": 0.0}),
    "attention": ("attention", {}),
}


# --- tasks ------------------------------------------------------------------------------------


def adding(rng: np.random.Generator, batch: int, lag: int) -> tuple[Array, Array]:
    """x ``(B, lag, 2)``: numbers and marks; their marked sum ``(B, 1)``."""
    x = np.zeros((batch, lag, 2), np.float32)
    x[..., 0] = rng.random((batch, lag))
    rows, half = np.arange(batch), lag // 2
    for low, high in ((0, half), (half, lag)):
        x[rows, rng.integers(low, high, batch), 1] = 1
    return x, (x[..., 0] * x[..., 1]).sum(axis=1, keepdims=True)


def copying(rng: np.random.Generator, batch: int, lag: int) -> tuple[Array, Array]:
    """tokens ``(B, COPIED + lag + COPIED)`` and the symbols to be told at its last places."""
    symbols = rng.integers(0, SYMBOLS, (batch, COPIED))
    tokens = np.full((batch, 2 * COPIED + lag), SYMBOLS)  # the blank
    tokens[:, :COPIED] = symbols
    tokens[:, -COPIED] = SYMBOLS + 1  # now
    return tokens, symbols


def squared_error(out: Array, target: Array) -> tuple[float, Array]:
    gap = out - target
    return float((gap**2).mean()), (2 / len(out) * gap).astype(out.dtype)


def symbols_error(logits: Array, symbols: Array) -> tuple[float, Array]:
    """Mean cross-entropy of the places where a symbol is asked for; 0 gradient elsewhere."""
    asked = logits[:, -COPIED:]
    loss, dasked = cross_entropy(asked.reshape(-1, asked.shape[-1]), symbols.reshape(-1))
    dlogits = np.zeros_like(logits)
    dlogits[:, -COPIED:] = dasked.reshape(asked.shape)
    return float(loss), dlogits


class Task(NamedTuple):
    draw: Callable[[np.random.Generator, int, int], tuple[Array, Array]]
    loss: Callable[[Array, Array], tuple[float, Array]]
    score: Callable[[Array, Array], float]
    solved: Callable[[float], bool]


TASKS = {
    "adding": Task(
        adding,
        squared_error,
        lambda out, target: squared_error(out, target)[0],
        lambda score: score < ADDING_SOLVED,
    ),
    "copying": Task(
        copying,
        symbols_error,
        lambda out, symbols: float((out[:, -COPIED:].argmax(-1) == symbols).mean()),
        lambda score: score > COPY_SOLVED,
    ),
}


# --- models -----------------------------------------------------------------------------------


class Model(NamedTuple):
    """Parameters to start from, and a forward and a backward pass through a cache."""

    params: Params
    forward: Callable[[Params, Array], tuple[Array, Any]]
    backward: Callable[[Array, Any], Grads]


def one_hot(x: Array) -> Array:
    return x if x.ndim == 3 else np.eye(SYMBOLS + 2, dtype=np.float32)[x]


def recurrent(kind: str, task: str, lag: int, rng: np.random.Generator, **options: Any) -> Model:
    """One recurrent layer and a linear read-out: of the last state, or of every one."""
    width, d_in = WIDTHS[kind], 2 if task == "adding" else SYMBOLS + 2
    d_out = 1 if task == "adding" else SYMBOLS
    params = init_rnn(rng, d_in, width) if kind == "rnn" else init_lstm(rng, d_in, width, **options)
    params |= {"out.weight": rng.normal(size=(width, d_out)) * width**-0.5}
    params |= {"out.bias": np.zeros(d_out)}

    def forward(params: Params, x: Array) -> tuple[Array, Any]:
        x = one_hot(x)
        zero = np.zeros((len(x), width), x.dtype)
        weights = [params[n] for n in ("wx", "wh", "b")]
        if kind == "rnn":
            h_all, cache = rnn_forward(x, zero, *weights)
        else:
            h_all, _, cache = lstm_forward(x, zero, zero, *weights)
        read = h_all[:, -1] if task == "adding" else h_all
        return read @ params["out.weight"] + params["out.bias"], (cache, read, params)

    def backward(dout: Array, kept: Any) -> Grads:
        cache, read, params = kept
        rows, drows = (a.reshape(-1, a.shape[-1]) for a in (read, dout))
        dread = dout @ params["out.weight"].T
        dh_all = dread if dread.ndim == 3 else np.zeros_like(cache.h_all)
        dh_all[:, -1] = dread if dread.ndim == 2 else dread[:, -1]
        back = rnn_backward_cached if kind == "rnn" else lstm_backward_cached
        dx, *_, grads = back(dh_all, cache)
        ends = {"out.weight": rows.T @ drows, "out.bias": drows.sum(axis=0), "by input": dx}
        return grads | ends

    return Model(params, forward, backward)


def attention(task: str, lag: int, rng: np.random.Generator) -> Model:
    """One pre-norm block with four heads: over all tokens for the sum, causal for the copy."""
    length = lag if task == "adding" else lag + 2 * COPIED
    config = Config(n_layers=1, d_model=24, n_heads=4, d_ff=48, max_len=length)
    if task == "adding":
        params = init_classifier(rng, config, 2, 1)
        return Model(
            params,
            lambda params, x: classifier_forward(x, params, config),
            classifier_backward,
        )
    params = init_language_model(rng, config, SYMBOLS + 2, tied=False)
    return Model(
        params,
        lambda params, x: language_model_forward(x, params, config),
        language_model_backward,
    )


def made(name: str, task: str, lag: int, rng: np.random.Generator) -> Model:
    kind, options = MODELS[name]
    make = attention if kind == "attention" else partial(recurrent, kind)
    model = make(task, lag, rng, **options)
    return model._replace(params={n: p.astype(np.float32) for n, p in model.params.items()})


# --- a run ------------------------------------------------------------------------------------


def run(
    name: str, task_name: str, lag: int, seed: int, rate: float, updates: int = UPDATES
) -> dict[str, Any]:
    """Train one model on one task at one lag; what it reached, when, and in what time."""
    task = TASKS[task_name]
    rng = np.random.default_rng([seed, lag])
    model = made(name, task_name, lag, rng)
    held_out = task.draw(np.random.default_rng([99, lag]), HELD_OUT, lag)

    def loss(params: Params, rng: np.random.Generator) -> tuple[float, Grads]:
        x, target = task.draw(rng, BATCH, lag)
        out, cache = model.forward(params, x)
        value, dout = task.loss(out, target)
        grads = model.backward(dout, cache)
        grads.pop("by input", None)
        return value, {n: grads[n] for n in params}

    def score(params: Params) -> float:
        pieces = [slice(i, i + BATCH) for i in range(0, HELD_OUT, BATCH)]
        x, target = held_out
        return statistics.fmean(
            task.score(model.forward(params, x[p])[0], target[p]) for p in pieces
        )

    state, curve, solved = train_start(model.params, seed), [], None
    begun, busy = time.perf_counter(), time.process_time()
    while state.step < updates:
        state, _ = train(
            state,
            loss,
            min(updates, state.step + EVERY),
            lambda step: rate,
            weight_decay=0.0,
            stop_on_divergence=False,
        )
        curve.append(float(f"{score(state.params):.3g}"))
        if task.solved(curve[-1]):
            solved = state.step
            break
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    return {
        "task": task_name,
        "lag": lag,
        "model": name,
        "seed": seed,
        "learning_rate": rate,
        "weights": int(sum(p.size for p in model.params.values())),
        "updates": state.step,
        "solved_at": solved,
        "score": curve[-1],
        "best": (min if task_name == "adding" else max)(curve),
        "curve": curve,
        "seconds": round(seconds, 1),
        "processor_seconds": round(busy, 1),
        "state_norm": None
        if MODELS[name][0] == "attention"
        else {
            "before": state_norms(model, model.params, held_out[0]),
            "after": state_norms(model, state.params, held_out[0]),
        },
        "input_norm_before": input_norms(name, model, task, held_out),
    }


ROWS = 4  # sequences over which norms are averaged, geometrically


def by_lag(norms: Array) -> dict[str, float]:
    """A geometric mean over rows at some lags: 1e-300 and 1 have a middle."""
    norms = np.asarray(norms, float)
    lags = sorted({n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200, 499) if n < norms.shape[1]})
    means = np.exp(np.log(np.maximum(norms, 1e-300)).mean(axis=0))
    return {str(n): float(f"{means[n]:.3g}") for n in lags}


def state_norms(model: Model, params: Params, x: Array) -> dict[str, Any]:
    wide = {n: np.asarray(p, float) for n, p in params.items()}
    _, (cache, _, _) = model.forward(wide, one_hot(x[:ROWS]).astype(float))
    if "out.weight" in params and params["wx"].shape[1] == params["wh"].shape[0]:
        return {"state": by_lag(gradient_norm_by_lag(cache.wh, cache.h_all))}
    return {n: by_lag(v) for n, v in lstm_gradient_norm_by_lag(cache)._asdict().items()}


def input_norms(name: str, model: Model, task: Task, held_out: tuple[Array, Array]) -> Any:
    """Length of the gradient of the last output's loss by each input, as a share of the largest.

    Of attention, by the embedded input, which is what its position's gradient is.
    """
    rows = []
    for row in range(ROWS):
        x, target = (a[row : row + 1] for a in held_out)
        out, cache = model.forward(model.params, x)
        _, dout = task.loss(out, target)
        grads = model.backward(dout, cache)
        by = grads["by input"][0] if "by input" in grads else grads["position.weight"]
        norms = np.linalg.norm(np.asarray(by, float), axis=-1)[::-1]
        rows.append(norms / norms.max())
    return by_lag(np.array(rows))


# --- time ---------------------------------------------------------------------------------------

# (B, T, D, H): small, middling, wide, long.
SHAPES = [(32, 50, 16, 32), (32, 100, 64, 128), (64, 50, 128, 256), (16, 400, 64, 128)]
SECONDS = 4.0


def compared(shape: tuple[int, ...], dtype: str, seconds: float) -> dict[str, Any]:
    """Forward and backward of one LSTM layer, ours and nn.LSTM's, in turn, on one thread each.

    With more, whoever shares the machine decides: threads that wait for each other spin.
    """
    import torch

    one_thread()
    torch.set_num_threads(1)
    b, t, d, h = shape
    rng = np.random.default_rng(0)
    x, dh_all = (rng.normal(size=(b, t, n)).astype(dtype) for n in (d, h))
    zero = np.zeros((b, h), dtype)
    params = {n: p.astype(dtype) for n, p in init_lstm(rng, d, h).items()}
    layer = torch.nn.LSTM(d, h, batch_first=True).to(torch.tensor(x).dtype)
    layer.load_state_dict({n: torch.tensor(p) for n, p in to_torch_lstm(params).items()})
    leaf, upstream = torch.tensor(x, requires_grad=True), torch.tensor(dh_all)
    weights = list(layer.parameters())

    def ours() -> tuple[Array, ...]:
        _, _, cache = lstm_forward(x, zero, zero, **params)
        dx, _, _, grads = lstm_backward_cached(dh_all, cache)
        return dx, grads["wx"].T, grads["wh"].T, grads["b"]

    def theirs() -> tuple[Array, ...]:
        out, _ = layer(leaf)
        grads = torch.autograd.grad(out, [leaf, *weights], upstream)
        return tuple(g.numpy() for g in grads[:4])

    limit = 1e-10 if dtype == "float64" else 1e-4
    for got, want in zip(ours(), theirs(), strict=True):
        off = np.abs(got - want).max() / np.abs(want).max()
        assert off <= limit, f"{off:.1g} off"
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 7 or time.perf_counter() < end:
        sides = {"numpy": ours, "torch": theirs}
        order = list(sides) if len(rounds) % 2 else list(sides)[::-1]
        rounds.append({name: timed(sides[name]) for name in order})
    return {
        "shape": dict(zip("BTDH", shape, strict=True)),
        "dtype": dtype,
        "threads": 1,
        "rounds": len(rounds),
        "seconds": {
            side: float(f"{statistics.median(r[side] for r in rounds):.3g}")
            for side in ("numpy", "torch")
        },
        "numpy_over_torch": round(statistics.median(r["numpy"] / r["torch"] for r in rounds), 2),
    }


def times() -> list[dict[str, Any]]:
    load = machine.machine()["load_before"]
    runs = [compared(s, dtype, SECONDS) for dtype in ("float32", "float64") for s in SHAPES]
    print(*runs, sep="\n", flush=True)
    return [run | {"load_before": load} for run in runs]


def timed(step: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


# --- all of it ----------------------------------------------------------------------------------


def one_thread() -> None:
    threadpool_limits(1)


Job = tuple[str, str, int, int, float, int]  # the arguments of run


def all_runs(jobs: list[Job]) -> list[dict[str, Any]]:
    """Every run, two at a time, those of an interrupted call read back."""
    partial_file = machine.RESULTS / "recurrent.partial.jsonl"
    lines = partial_file.read_text().splitlines() if partial_file.exists() else []
    done = {tuple(job): result for job, result in map(json.loads, lines)}
    left = sorted((job for job in jobs if job not in done), key=lambda job: -job[2])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=one_thread) as pool:
        started = {pool.submit(run, *job): job for job in left}
        for future in as_completed(started):
            job, result = started[future], future.result()
            done[job] = result
            with partial_file.open("a") as file:
                file.write(json.dumps([job, result]) + "\n")
            print(*job, result["solved_at"], result["score"], result["seconds"], flush=True)
    return [done[job] for job in jobs]


def best_rates() -> tuple[dict[tuple[str, str], float], list[dict[str, Any]]]:
    """The learning rate of each kind on each task, and all that were tried."""
    first = {kind: name for name, (kind, _) in reversed(MODELS.items())}
    tried = all_runs(
        [
            (name, task, RATE_LAG, RATE_SEED, rate, RATE_UPDATES)
            for task in TASKS
            for name in first.values()
            for rate in RATES
        ]
    )
    kept = ("task", "model", "learning_rate", "solved_at", "score", "seconds")
    best: dict[tuple[str, str], Any] = {}
    for result in tried:
        place = MODELS[result["model"]][0], result["task"]
        sign = 1 if result["task"] == "adding" else -1
        rank = result["solved_at"] or RATE_UPDATES + 1, sign * result["score"]
        best[place] = min(
            best.get(place, (rank, result["learning_rate"])), (rank, result["learning_rate"])
        )
    rates = {place: rate for place, (_, rate) in best.items()}
    return rates, [{name: result[name] for name in kept} for result in tried]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short runs, nothing written")
    parser.add_argument("--times", action="store_true", help="only the LSTM beside torch's")
    chosen = parser.parse_args()
    if chosen.times:
        path = machine.RESULTS / "recurrent.json"
        result = json.loads(path.read_text(encoding="utf-8")) | {"lstm_forward_backward": times()}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return
    if chosen.quick:
        for name in MODELS:
            print(json.dumps(run(name, "adding", 10, 0, 3e-3, updates=100)))
        print(json.dumps(compared(SHAPES[0], "float32", 0.5)))
        return
    where, begun = machine.machine(), time.perf_counter()
    timings = times()
    rates, tried = best_rates()
    runs = all_runs(
        [
            (name, task, lag, seed, rates[kind, task], UPDATES)
            for task in TASKS
            for lag in LAGS
            for name, (kind, _) in MODELS.items()
            for seed in SEEDS[lag]
        ]
    )
    settings = {
        "updates": UPDATES,
        "batch": BATCH,
        "held_out": HELD_OUT,
        "widths": WIDTHS,
        "solved": {"adding": f"mse < {ADDING_SOLVED}", "copying": f"right > {COPY_SOLVED}"},
        "guessing": {"adding": round(1 / 6, 4), "copying": 1 / SYMBOLS},
        "symbols": SYMBOLS,
        "copied": COPIED,
        "seconds_in_all": round(time.perf_counter() - begun),
    }
    result = {
        "settings": settings,
        "runs": runs,
        "rates_tried": {"lag": RATE_LAG, "updates": RATE_UPDATES, "runs": tried},
        "lstm_forward_backward": timings,
    }
    packages = ("attn-lessons", "numpy", "torch")
    machine.write("recurrent", result, *packages, where=where | {"threads_a_run": 1})
    (machine.RESULTS / "recurrent.partial.jsonl").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
