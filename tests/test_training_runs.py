"""Runs on real data: beside torch step by step, and what the stored results have to hold."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_transformer import D_FF, C, H, leaf, tensor, torch_trunk
from threadpoolctl import threadpool_limits

from attn_lessons.attention import causal_mask
from attn_lessons.datasets import batches, characters, digits_sequences, topics_text
from attn_lessons.optim import decay_names, warmup_cosine
from attn_lessons.softmax import cross_entropy
from attn_lessons.training import divergence, train, train_start
from attn_lessons.transformer import (
    Config,
    classifier_forward,
    classifier_loss,
    init_classifier,
    init_language_model,
    language_model_forward,
    language_model_loss,
)

# Hundreds of steps: shapes are checked at run time in the other tests.
pytestmark = pytest.mark.usefixtures("unchecked")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
VOCABULARY, TOKENS = characters(topics_text())
CLOSE = 1e-6


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on two busy cores wait for each other, ten times as long as one works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, "blas"):
        yield
    torch.set_num_threads(before)


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------- beside torch


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_hundred_steps_of_a_language_model_are_torchs(norm):
    """The model of torch's own layers, torch.optim.AdamW, clip_grad_norm_: loss by loss."""
    config = Config(2, 16, 4, 32, 16, norm)
    params = init_language_model(np.random.default_rng(0), config, len(VOCABULARY))
    drawn = np.random.default_rng(1)

    def schedule(step):
        return warmup_cosine(step, 1e-2, 20, 100)

    def loss(params, rng):
        return language_model_loss(*batches(TOKENS, 16, 4, rng), params, config)

    _, step = benchmark("twin").stepper(
        params,
        config,
        lambda: batches(TOKENS, 16, 4, drawn),
        schedule,
        weight_decay=0.1,
        max_norm=0.5,
    )
    _, records = train(train_start(params, 1), loss, 100, schedule, weight_decay=0.1, max_norm=0.5)
    assert len(records) == 100
    assert any(r.norm > 0.5 for r in records), "clipping is at work"
    theirs = [step() for _ in records]
    assert max(abs(r.loss - other) for r, other in zip(records, theirs, strict=True)) <= CLOSE
    assert records[-1].loss < records[0].loss - 1


def test_with_dropout_a_run_is_torchs_by_the_same_draws():
    """What dropout keeps is drawn by our generator; autograd and AdamW do the rest, 25 steps."""
    config = Config(2, C, H, D_FF, 9, "pre")
    start = init_language_model(np.random.default_rng(2), config, len(VOCABULARY))

    def loss(params, rng):
        return language_model_loss(*batches(TOKENS, 9, 4, rng), params, config, rate=0.2, rng=rng)

    _, records = train(train_start(start, 3), loss, 25, lambda t: 5e-3, weight_decay=0.1)
    rng = np.random.default_rng(3)
    p = {name: leaf(w) for name, w in start.items()}
    decayed = decay_names(start)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p[n] for n in decayed], "weight_decay": 0.1},
            {"params": [w for n, w in p.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=5e-3,
    )
    gaps = []
    for record in records:
        inputs, targets = batches(TOKENS, 9, 4, rng)
        now = {name: w.detach().numpy() for name, w in p.items()}
        _, draws = language_model_forward(inputs, now, config, rate=0.2, rng=rng)
        table = p["embed.weight"]
        hidden = torch_trunk(
            F.embedding(tensor(inputs), table), p, config, causal_mask(9, 9), draws
        )
        value = F.cross_entropy((hidden @ table.T).flatten(0, 1), tensor(targets).flatten())
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        gaps.append(abs(record.loss - value.item()))
    assert max(gaps) <= CLOSE


def test_pytorch_73205_padding_does_not_dilute_smoothing():
    """Ignored targets count in neither part: as if their rows were not there."""
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.normal(size=(12, 7)), rng.integers(0, 7, 12)
    kept = rng.permutation(12) < 5
    padded = np.where(kept, targets, -100)
    loss, dlogits = cross_entropy(logits, padded, 0.2, ignore_index=-100)
    alone, dalone = cross_entropy(logits[kept], targets[kept], 0.2)
    assert loss == pytest.approx(alone, rel=1e-14)
    np.testing.assert_allclose(dlogits[kept], dalone, rtol=1e-13)
    assert not dlogits[~kept].any()
    # The report's wrong value: the uniform part summed over all rows, over the kept ones' number.
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    one_hot = -logp[np.arange(12), targets][kept].sum()
    diluted = (0.8 * one_hot + 0.2 * -logp.mean(axis=1).sum()) / kept.sum()
    assert abs(diluted - loss) > 0.1


# ------------------------------------------------------------------------------------- real data


def test_digits_are_learnt_by_hand_written_gradients():
    """300 small steps; the whole run, to 97 %, is in the stored results."""
    x, y, x_test, y_test = digits_sequences(0)
    config = Config(1, 32, 4, 128, 8)
    params = init_classifier(np.random.default_rng(0), config, 8, 10)
    params = {name: p.astype("float32") for name, p in params.items()}

    def loss(params, rng):
        rows = rng.integers(0, len(x), 32)
        return classifier_loss(
            x[rows].astype("float32"), y[rows], params, config, label_smoothing=0.1
        )

    state, records = train(
        train_start(params, 0), loss, 300, lambda t: warmup_cosine(t, 5e-3, 30, 300)
    )
    assert len(records) == 300, divergence(records)
    assert {p.dtype for p in state.params.values()} == {np.dtype("float32")}
    logits, _ = classifier_forward(x_test.astype("float32"), state.params, config)
    assert (logits.argmax(axis=1) == y_test).mean() >= 0.95


def test_post_norm_wants_a_warm_up():
    """A rate at which two post-norm layers learn, unless the first step already has it."""
    config = Config(2, 32, 4, 128, 32, "post")
    params = init_language_model(np.random.default_rng(0), config, len(VOCABULARY))
    params = {name: p.astype("float32") for name, p in params.items()}

    def loss(params, rng):
        return language_model_loss(*batches(TOKENS, 32, 8, rng), params, config)

    last = {}
    for warmup in (0, 100):
        _, records = train(
            train_start(params, 0),
            loss,
            200,
            lambda t, warmup=warmup: 1.2e-2 * min(1.0, t / warmup) if warmup else 1.2e-2,
            weight_decay=0.0,
            max_norm=None,
            stop_on_divergence=False,
        )
        last[warmup] = np.mean([r.loss for r in records[-20:]])
    share = np.bincount(TOKENS) / len(TOKENS)
    frequencies_alone = -(share * np.log(share)).sum()
    assert last[0] > frequencies_alone - 0.25
    assert last[100] < frequencies_alone - 0.4


# -------------------------------------------------------------------------- what was measured


@pytest.fixture(scope="module")
def stored():
    return json.loads((BENCHMARKS / "results" / "training.json").read_text(encoding="utf-8"))


def test_stored_digits_reach_97_percent_within_a_minute(stored):
    runs = stored["digits"]["runs"]
    assert len(runs) >= 5
    assert min(run["test_accuracy"] for run in runs) >= 0.97
    assert max(run["seconds"] for run in runs) <= 60
    assert stored["machine"]["cores"] == 2


def test_stored_curves_are_torchs(stored):
    curves = stored["curves"]
    assert curves["difference"]["first_100"] <= CLOSE
    assert len(curves["first_100"]["ours"]) == 100
    assert curves["steps"] >= 1000
    assert curves["final"]["rest"] < 2
    ends = [curves["loss"][side][-1] for side in ("ours", "torch")]
    assert math.isclose(*ends, rel_tol=0.01)


def test_stored_optimizers_had_a_grid_wide_enough(stored):
    for methods in stored["optimizers"]["settings"].values():
        for method in methods.values():
            rates = [run["lr"] for run in method["runs"]]
            assert len(rates) == 6
            # The best rate has a worse one on either side.
            assert min(rates) < method["best_lr"] < max(rates)
            reached = [run["rest"] for run in method["runs"] if run["rest"] is not None]
            assert method["best_rest"] == min(reached)


def test_stored_adam_is_not_behind_sgd(stored):
    for methods in stored["optimizers"]["settings"].values():
        best = {name: method["best_rest"] for name, method in methods.items()}
        assert best["Adam"] == min(best.values())


def test_stored_post_norm_stalls_where_warm_up_trains(stored):
    part = stored["warmup"]
    last = {(r["norm"], r["depth"], r["lr"], r["warmup"]): r["last"] for r in part["runs"]}
    entropy = part["unigram_entropy"]
    rescued = [
        (norm, depth, lr)
        for norm, depth, lr, warmup in last
        if warmup == 0
        and last[norm, depth, lr, 0] > entropy - 0.1
        and last[norm, depth, lr, 100] < entropy - 0.3
    ]
    assert {depth for _, depth, _ in rescued} >= {2, 4, 6}
    assert {norm for norm, _, _ in rescued} == {"post"}


def test_stored_runs_break_after_their_gradient_did(stored):
    part = stored["divergence"]
    assert len(part["growing"]) == 6
    for run in part["growing"]:
        assert run["says"].startswith(f"step {run['said_at_step']}: ")
        assert run["norm_first_over"] < run["loss_first_over"]
