"""The loop against torch's, step by step; runs that stop and go on; what is said of bad ones."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attn_lessons.optim import warmup_cosine
from attn_lessons.training import (
    Record,
    accumulate_gradients,
    divergence,
    load_params,
    load_state,
    norm_by_layer,
    save_params,
    save_state,
    train,
    train_start,
    train_step,
)

X = np.random.default_rng(0).normal(size=(200, 5))
Y = np.tanh(X @ np.random.default_rng(1).normal(size=(5, 2)))


def parameters():
    rng = np.random.default_rng(2)
    return {"w": rng.normal(size=(5, 2)), "b": np.zeros(2)}


def loss(params, rng):
    """Least squares on a drawn batch of 16, with dropout on the input."""
    rows = rng.integers(0, len(X), 16)
    x = X[rows] * (rng.random((16, 5)) < 0.9)
    off = x @ params["w"] + params["b"] - Y[rows]
    return (off**2).sum() / 16, {"w": 2 * x.T @ off / 16, "b": 2 * off.sum(axis=0) / 16}


def schedule(step):
    return warmup_cosine(step, 0.05, 5, 60)


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[n], b[n]) for n in a)


def test_a_run_is_torchs_run():
    """Same batches, AdamW with two groups, clipping, schedule: 60 steps, loss by loss."""
    state = train_start(parameters(), 7)
    rng = np.random.default_rng(7)
    state, records = train(state, loss, 60, schedule, max_norm=0.5, weight_decay=0.1)
    p = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in parameters().items()}
    optimizer = torch.optim.AdamW(
        [{"params": [p["w"]], "weight_decay": 0.1}, {"params": [p["b"]], "weight_decay": 0.0}]
    )
    for record in records:
        for group in optimizer.param_groups:
            group["lr"] = schedule(record.step)
        rows = rng.integers(0, len(X), 16)
        x = torch.tensor(X[rows] * (rng.random((16, 5)) < 0.9))
        value = F.mse_loss(x @ p["w"] + p["b"], torch.tensor(Y[rows]), reduction="sum") / 16
        optimizer.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(p.values(), 0.5)
        optimizer.step()
        assert record.loss == pytest.approx(value.item(), rel=1e-12)
        assert record.norm == pytest.approx(norm.item(), rel=1e-12)
    for name, want in p.items():
        assert np.abs(state.params[name] - want.detach().numpy()).max() < 1e-12
    assert records[-1].loss < 0.2 * records[0].loss


def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path):
    whole, records = train(train_start(parameters(), 3), loss, 40, schedule)
    file = tmp_path / "run.safetensors"
    half, first = train(train_start(parameters(), 3), loss, 17, schedule, checkpoint=file, every=5)
    again, second = train(load_state(file), loss, 40, schedule)
    assert half.step == 17
    assert first + second == records
    assert same(again.params, whole.params)
    assert same(again.adam.m, whole.adam.m)
    assert same(again.adam.v, whole.adam.v)
    assert again.rng.bit_generator.state == whole.rng.bit_generator.state


def test_a_save_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    state, _ = train(train_start(parameters(), 3), loss, 3, schedule)
    save_state(file, state)
    before = file.read_bytes()

    def full(self, data):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(file), "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        save_state(file, train_step(state, loss, 0.1)[0])
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_parameters_come_back(tmp_path):
    rng = np.random.default_rng(4)
    params = {
        "turned": rng.normal(size=(3, 4)).T,
        "single": rng.normal(size=(2, 3)).astype(np.float32)[:, ::2],
        "scalar": np.array(1.5),
        "none": np.zeros((0, 3)),
    }
    save_params(tmp_path / "p.safetensors", params)
    back = load_params(tmp_path / "p.safetensors")
    assert same(back, params)
    assert {n: a.dtype for n, a in back.items()} == {n: a.dtype for n, a in params.items()}
    assert {n: a.shape for n, a in back.items()} == {n: a.shape for n, a in params.items()}


def test_other_files_are_told_from_states(tmp_path):
    (tmp_path / "text").write_text("not a tensor in it")
    with pytest.raises(ValueError, match=r"path: expected a safetensors file; got .*text"):
        load_params(tmp_path / "text")
    save_params(tmp_path / "p", {"w": np.zeros(2)})
    with pytest.raises(ValueError, match=r"path: expected a training state .*, with 1 arrays"):
        load_state(tmp_path / "p")


def test_accumulated_batches_are_one_large_batch():
    def fixed(params, rng):
        rows = rng.permutation(8)[:4]
        off = X[rows] @ params["w"] + params["b"] - Y[rows]
        return (off**2).sum() / 4, {"w": 2 * X[rows].T @ off / 4, "b": 2 * off.sum(axis=0) / 4}

    def both(params, rng):
        rows = np.concatenate([rng.permutation(8)[:4], rng.permutation(8)[:4]])
        off = X[rows] @ params["w"] + params["b"] - Y[rows]
        return (off**2).sum() / 8, {"w": 2 * X[rows].T @ off / 8, "b": 2 * off.sum(axis=0) / 8}

    a, one = train_step(train_start(parameters(), 1), fixed, 0.1, accumulate=2)
    b, two = train_step(train_start(parameters(), 1), both, 0.1)
    assert one.loss == pytest.approx(two.loss, rel=1e-13)
    assert one.norm == pytest.approx(two.norm, rel=1e-13)
    assert np.abs(a.params["w"] - b.params["w"]).max() < 1e-13


def least_squares(params, x, y):
    off = x @ params["w"] + params["b"] - y
    return (off**2).sum() / len(x), {
        "w": 2 * x.T @ off / len(x),
        "b": 2 * off.sum(axis=0) / len(x),
    }


def test_unequal_pieces_are_one_large_batch():
    cuts = [0, 3, 3, 20, 21, 60]
    pieces = [(X[a:b], Y[a:b]) for a, b in pairwise(cuts)]
    with np.errstate(invalid="ignore"):
        losses, grads = zip(*(least_squares(parameters(), *p) for p in pieces), strict=True)
    assert np.isnan(losses[1]), "a mean over nothing"
    sizes = [len(x) for x, _ in pieces]
    value, mean = accumulate_gradients(losses, grads, sizes)
    want, dwant = least_squares(parameters(), X[:60], Y[:60])
    assert value == pytest.approx(want, rel=1e-13)
    assert all(np.abs(mean[n] - dwant[n]).max() < 1e-13 for n in dwant)
    full = [i for i, n in enumerate(sizes) if n]
    means = np.mean([grads[i]["b"] for i in full], axis=0)
    assert np.abs(means - dwant["b"]).max() > 1e-2, "the mean of means is another"


def test_pieces_without_anything_are_nothing():
    bad = {"w": np.full((2, 3), np.nan, np.float32)}
    value, grads = accumulate_gradients([np.nan], [bad], [0])
    assert value == 0
    assert np.array_equal(grads["w"], np.zeros((2, 3)))
    assert grads["w"].dtype == np.float32
    assert np.isnan(bad["w"]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (([], [], []), "losses: expected as many .* got 0, 0 and 0"),
        (([1.0], [{}], [1, 2]), "got 1, 1 and 2"),
        (([1.0], [{}], [-1]), "sizes: expected"),
        (([1.0, 2.0], [{"a": np.ones(1)}, {"b": np.ones(1)}], [1, 1]), "grads: expected the names"),
    ],
)
def test_pieces_that_do_not_fit(call, words):
    with pytest.raises(ValueError, match=words):
        accumulate_gradients(*call)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_without_a_finite_gradient_is_skipped_and_told(bad):
    """Lightning#9330: a skipped step counts as tried, not as taken; nothing else moves."""

    def broken(params, rng):
        value, grads = loss(params, rng)
        grads["b"][0] = bad
        return value, grads

    start = train_start(parameters(), 5)
    state, record = train_step(start, broken, 0.1)
    assert record.skipped
    assert not math.isfinite(record.norm)
    assert (state.step, state.adam.step) == (1, 0)
    assert same(state.params, parameters())
    state, record = train_step(state, loss, 0.1)
    assert not record.skipped
    assert (state.step, state.adam.step) == (2, 1)


def test_the_state_passed_in_stays():
    start = train_start(parameters(), 5)
    train_step(start, loss, 0.1)
    assert same(start.params, parameters())
    assert not any(m.any() for m in start.adam.m.values())


def test_norms_by_layer_add_up_to_the_whole():
    rng = np.random.default_rng(6)
    grads = {
        "embed.weight": rng.normal(size=(4, 3)),
        "layers.0.self_attn.wq": rng.normal(size=(3, 3)),
        "layers.0.norm1.bias": rng.normal(size=3),
        "layers.10.norm1.bias": rng.normal(size=3),
    }
    norms = norm_by_layer(grads)
    assert list(norms) == ["embed", "layers.0", "layers.10"]
    total = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    assert math.sqrt(sum(n**2 for n in norms.values())) == pytest.approx(total, rel=1e-14)
    _, record = train_step(train_start(parameters(), 0), loss, 0.1, by_layer=True)
    assert record.norm == pytest.approx(math.hypot(*record.norms.values()), rel=1e-14)


def test_progress_sees_every_step():
    seen = []

    def progress(numbers):
        for number in numbers:
            seen.append(number)
            yield number

    _, records = train(train_start(parameters(), 0), loss, 6, schedule, progress=progress)
    assert seen == [r.step for r in records] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------ divergence


def run(losses, norms=None, skipped=()):
    norms = [1.0] * len(losses) if norms is None else norms
    return [
        Record(i + 1, value, 0.1, norm, {}, i in skipped)
        for i, (value, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def test_a_run_that_goes_well_is_left_alone():
    rng = np.random.default_rng(0)
    falling = np.exp(-np.arange(300) / 100) * rng.uniform(0.8, 1.2, 300)
    records = run(falling, rng.uniform(0.3, 3, 300))
    assert all(divergence(records[:n]) is None for n in range(301))


def test_noise_around_a_small_loss_is_no_divergence():
    """A classifier that has learnt its digits: most batches cost nothing, some cost a lot."""
    rng = np.random.default_rng(1)
    trend = 2.3 * np.exp(-np.arange(400) / 40) + 0.02
    losses, norms = trend * rng.lognormal(0, 0.7, 400), trend * rng.lognormal(0, 0.7, 400)
    norms[300] = 40 * np.median(norms[250:300])
    assert norms[300] < norms[:300].max()
    records = run(losses, norms)
    assert all(divergence(records[:n]) is None for n in range(401))
    assert any(divergence(records[:n], share=0) for n in range(401))
    # What counts is how much is lost of what was learnt, from wherever the loss began.
    lost = run([2.3] * 10 + [0.02] * 20 + [0.6] * 10)
    assert divergence(lost[:35]) is None
    assert divergence(lost) == (
        "step 40: the loss, 0.6 over ten steps, is 30 times its lowest, 0.02 at step 20"
    )


def test_what_is_seen_is_said():
    assert divergence(run([2.0, np.nan])) == "step 2: the loss is nan"
    three = run([1.0] * 5, [1, 1, np.inf, np.inf, np.inf], {2, 3, 4})
    assert divergence(three[:4]) is None
    assert divergence(three) == (
        "step 5: the gradient is inf, the third in a row that is not finite"
    )
    spike = run([1.0] * 21, [0.5] * 20 + [50])
    assert divergence(spike[:20]) is None
    assert divergence(spike) == (
        "step 21: the gradient's norm is 50, 100 times the median of the 20 steps before, 0.5"
    )
    rising = run([3.0] * 10 + [1.0] * 20 + [9.0] * 5)
    assert divergence(rising[:30]) is None
    assert divergence(rising) == (
        "step 35: the loss, 5 over ten steps, is 5 times its lowest, 1 at step 20"
    )


def test_the_loop_ends_where_divergence_is_seen():
    """Least squares at a rate that is far too large, unclipped: the loss rises until it is seen."""

    def plain(params, rng):
        off = X @ params["w"] + params["b"] - Y
        return (off**2).sum(), {"w": 2e3 * X.T @ off, "b": off.sum(axis=0)}

    state, records = train(
        train_start(parameters(), 0), plain, 500, lambda t: t / 10, max_norm=None
    )
    assert len(records) < 500
    assert state.step == records[-1].step
    assert divergence(records) is not None
    assert divergence(records[:-1]) is None
    _, all_of_them = train(
        train_start(parameters(), 0), plain, 60, lambda t: t / 10, stop_on_divergence=False
    )
    assert len(all_of_them) == 60


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda s: train_step(s, loss, 0.1, accumulate=0),
            r"accumulate: expected at least 1; got 0",
        ),
        (lambda s: train(s, loss, 3, schedule, every=0), r"every: expected at least 1; got 0"),
        (lambda s: train_step(s, loss, -1.0), r"lr: expected a finite number >= 0; got -1.0"),
        (
            lambda s: train_step(s, lambda p, r: (1.0, {"w": p["w"]}), 0.1),
            r"grads: expected the names of params; got them without b",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(train_start(parameters(), 0))
