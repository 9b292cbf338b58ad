"""Optimizer steps, clipping and schedules against torch, and against sums done by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, generators, shapes, strided

from attn_lessons.optim import (
    AdamState,
    adam_start,
    adam_step,
    adamw_step,
    adamw_update,
    clip_by_global_norm,
    decay_names,
    global_norm,
    sgd_step,
    warmup_cosine,
    warmup_inverse_sqrt,
)

EXACT = 1e-12


def agree(got, want, rtol=EXACT):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale = np.abs(want).max(initial=0) or 1.0
    assert np.abs(got - want).max(initial=0) <= rtol * scale


def tensor(x):
    return torch.tensor(np.array(x, order="C"))


def gradients(rng, shape, steps):
    """Gradients whose scale changes over five orders, so that the moments matter."""
    return [rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3) for _ in range(steps)]


def under_torch(make, x, grads):
    """The parameter after each step of a torch optimizer."""
    p = torch.nn.Parameter(tensor(x))
    optimizer, path = make([p]), []
    for g in grads:
        p.grad = tensor(g)
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return path


def adam_path(step_function, x, grads, *settings_):
    m = v = np.zeros_like(x)
    path = []
    for t, g in enumerate(grads, 1):
        x, m, v = step_function(x, g, m, v, t, *settings_)
        path.append(x)
    return path


# ------------------------------------------------------------------------- steps against torch


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("function", "optimizer"), [(adam_step, torch.optim.Adam), (adamw_step, torch.optim.AdamW)]
)
def test_adam_and_adamw_are_torchs(function, optimizer, decay, steps):
    rng = np.random.default_rng(0)
    x, grads = rng.normal(size=(3, 5)), gradients(rng, (3, 5), steps)
    lr, betas, eps = 3e-3, (0.8, 0.95), 1e-7
    want = under_torch(
        lambda p: optimizer(p, lr=lr, betas=betas, eps=eps, weight_decay=decay), x, grads
    )
    got = adam_path(function, x, grads, lr, betas, eps, decay)
    for a, b in zip(got, want, strict=True):
        agree(a, b)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_torchs(momentum, decay, nesterov):
    rng = np.random.default_rng(1)
    x, grads = rng.normal(size=(4, 2)), gradients(rng, (4, 2), 50)
    options = {"momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
    want = under_torch(lambda p: torch.optim.SGD(p, lr=0.01, **options), x, grads)
    velocity = np.zeros_like(x)
    for g, after in zip(grads, want, strict=True):
        x, velocity = sgd_step(x, g, velocity, 0.01, momentum, decay, nesterov=nesterov)
        agree(x, after)


# ------------------------------------------------------------------------- steps by their numbers


def test_the_first_step_of_adam_is_the_sign():
    x, g = np.zeros(3), np.array([1e-3, -2.0, 5e4])
    x, m, v = adam_step(x, g, np.zeros(3), np.zeros(3), 1, 0.1, eps=0.0)
    agree(x, -0.1 * np.sign(g))
    agree(m, 0.1 * g)
    agree(v, 1e-3 * g * g)


def test_without_bias_correction_the_first_step_would_be_another():
    """mlx#1640: left out, the first step is (1 - b1)/sqrt(1 - b2) = 3.16 times as long."""
    x, _, _ = adamw_step(np.zeros(1), np.ones(1), np.zeros(1), np.zeros(1), 1, 1.0, eps=0.0)
    agree(x, [-1.0])


def test_eps_stands_outside_the_root_after_the_correction():
    """The three places at t = 1 and g = 1e-8: 0.5, 0.031 and 1e-4 of the learning rate."""
    x, _, _ = adam_step(np.zeros(1), np.full(1, 1e-8), np.zeros(1), np.zeros(1), 1, 1.0)
    agree(x, [-0.5])


def test_decay_bypasses_the_moments():
    """A gradient of 0: AdamW shrinks by lr·λ, Adam with L2 takes a full step of lr."""
    given_ = (np.ones(1), np.zeros(1), np.zeros(1), np.zeros(1), 1, 0.01, (0.9, 0.999), 1e-8, 0.1)
    x, m, v = adamw_step(*given_)
    agree(x, [0.999])
    assert not m.any()
    assert not v.any()
    agree(adam_step(*given_)[0], [0.99], 1e-8)


def test_decay_is_of_the_parameter_that_came_in():
    """transformers#14539: decaying the updated weight loses lr²·λ times the step."""
    x, _, _ = adamw_step(np.ones(1), np.ones(1), np.zeros(1), np.zeros(1), 1, 0.5, eps=0.0)
    agree(x, [1 - 0.5 * 0.01 - 0.5])


def test_the_step_counts():
    """A step off by one gives another correction: 1 - b^2 for 1 - b."""
    rng = np.random.default_rng(2)
    x, g, m, v = rng.normal(size=(4, 6))
    v = v * v
    first, second = (adam_step(x, g, m, v, t, 0.1)[0] for t in (1, 2))
    assert np.abs(first - second).min() > 1e-4


def test_a_parameter_without_gradient_stays_even_with_eps_0():
    x, _, _ = adamw_step(
        np.ones(2), np.zeros(2), np.zeros(2), np.zeros(2), 1, 0.1, (0.9, 0.999), 0.0, 0.0
    )
    assert np.array_equal(x, np.ones(2))


@settings(max_examples=60, deadline=None)
@given(st.data(), generators(), shapes(1, 3), DTYPES)
def test_steps_keep_dtype_shape_and_inputs(data, rng, shape, dtype):
    drawn = [np.asarray(rng.normal(size=shape), dtype) for _ in range(4)]
    drawn[3] = np.asarray(np.square(drawn[3]))
    arrays = [data.draw(strided(x)) for x in drawn]
    before = [x.copy() for x in arrays]
    x, g, m, v = arrays
    for results in (
        adam_step(x, g, m, v, 3, 0.1, weight_decay=0.1),
        adamw_step(x, g, m, v, 3, 0.1),
        sgd_step(x, g, m, 0.1, 0.9, 0.1, nesterov=True),
    ):
        for result in results:
            assert np.asarray(result).dtype == dtype
            assert np.shape(result) == shape
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
    wide = [a.astype(np.float64) for a in before]
    agree(
        adamw_step(*arrays, 3, 0.1)[0],
        adamw_step(*wide, 3, 0.1)[0],
        2e-6 if dtype == np.float32 else EXACT,
    )


@pytest.mark.usefixtures("unchecked")
def test_a_scalar_parameter_steps_like_an_entry():
    """A learned temperature has shape (); what comes back are NumPy scalars."""
    entry = adamw_step(np.ones(1), np.full(1, 0.3), np.zeros(1), np.zeros(1), 1, 0.1)
    alone = adamw_step(np.array(1.0), np.array(0.3), np.array(0.0), np.array(0.0), 1, 0.1)
    assert [float(x) for x in alone] == [float(x[0]) for x in entry]


# ----------------------------------------------------------------------------- a whole model


def model(rng):
    return {
        "embed.weight": rng.normal(size=(7, 4)),
        "layers.0.linear1.weight": rng.normal(size=(5, 4)),
        "layers.0.linear1.bias": rng.normal(size=5),
        "layers.0.norm1.weight": rng.normal(size=4),
        "position.weight": rng.normal(size=(6, 4)),
    }


def test_only_projections_decay():
    assert decay_names(model(np.random.default_rng(0))) == ("layers.0.linear1.weight",)


@pytest.mark.parametrize("steps", [1, 100])
def test_a_models_update_is_torchs_with_two_groups(steps):
    rng = np.random.default_rng(3)
    params = model(rng)
    torchs = {name: torch.nn.Parameter(tensor(p)) for name, p in params.items()}
    chosen = decay_names(params)
    groups = [
        {"params": [torchs[n] for n in params if n in chosen], "weight_decay": 0.3},
        {"params": [torchs[n] for n in params if n not in chosen], "weight_decay": 0.0},
    ]
    optimizer, state = torch.optim.AdamW(groups, lr=0.02), adam_start(params)
    for _ in range(steps):
        grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
        for name, p in torchs.items():
            p.grad = tensor(grads[name])
        optimizer.step()
        params, state = adamw_update(params, grads, state, 0.02, weight_decay=0.3)
    assert state.step == steps
    for name, p in torchs.items():
        agree(params[name], p.detach().numpy())


def test_an_update_leaves_what_it_was_given():
    rng = np.random.default_rng(4)
    params, grads = model(rng), model(rng)
    state = adam_start(params)
    before = {name: p.copy() for name, p in params.items()}
    adamw_update(params, grads, state, 0.1)
    assert all(np.array_equal(params[n], before[n]) for n in params)
    assert not any(m.any() for m in state.m.values())


def test_names_have_to_match():
    rng = np.random.default_rng(5)
    params, grads = model(rng), model(rng)
    state = adam_start(params)
    with pytest.raises(ValueError, match=r"decayed: expected names of parameters; got head"):
        adamw_update(params, grads, state, 0.1, decayed=["head"])
    with pytest.raises(ValueError, match=r"state.m: expected the names of params; got them with"):
        adamw_update(params, grads, AdamState(0, {**state.m, "x": np.zeros(1)}, dict(state.v)), 0.1)
    del grads["embed.weight"]
    with pytest.raises(ValueError, match=r"grads: expected .* got them without embed.weight"):
        adamw_update(params, grads, state, 0.1)


# -------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3, 0.0])
@settings(max_examples=40, deadline=None)
@given(rng=generators(), shape=shapes(1, 3), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_clipping_is_torchs(rng, shape, scale, max_norm):
    grads = {name: rng.normal(size=shape) * scale for name in "abc"}
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in grads]
    for p, g in zip(params, grads.values(), strict=True):
        p.grad = tensor(g)
    want = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    agree(norm, want.numpy())
    for p, g in zip(params, clipped.values(), strict=True):
        agree(g, p.grad.numpy())


def test_one_factor_for_all():
    clipped, norm = clip_by_global_norm({"a": np.array([3.0]), "b": np.array([[4.0]])}, 1.0)
    assert norm == 5.0
    agree(clipped["a"], [0.6], 1e-6)
    agree(clipped["b"], [[0.8]], 1e-6)


def test_short_gradients_are_not_lengthened():
    grads = {"a": np.array([3e-3, 4e-3])}
    assert np.array_equal(clip_by_global_norm(grads, 1.0)[0]["a"], grads["a"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_reported(bad):
    """pytorch#46849: scaled by c/inf = 0, an infinite entry would become NaN, the others 0."""
    grads = {"a": np.array([1.0, bad]), "b": np.array([2.0])}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert math.isnan(norm) if np.isnan(bad) else norm == np.inf
    assert all(np.array_equal(clipped[n], grads[n], equal_nan=True) for n in grads)


def test_nan_wins_over_inf():
    assert math.isnan(global_norm({"a": np.array([np.inf]), "b": np.array([np.nan])}))


def test_the_squares_of_large_and_small_gradients_neither_overflow_nor_vanish():
    for scale in (1e30, 1e-30):
        grads = {"a": np.array([3 * scale], np.float32), "b": np.array([4 * scale], np.float32)}
        agree(global_norm(grads), 5 * scale, 1e-6)
    agree(global_norm({"a": np.array([3e300, 4e300])}), 5e300)


def test_no_gradients_have_norm_0():
    assert global_norm({}) == 0.0
    assert global_norm({"a": np.zeros((0, 3))}) == 0.0
    assert clip_by_global_norm({"a": np.zeros(2)}, 1.0)[1] == 0.0


@given(generators(), DTYPES)
def test_clipping_keeps_dtype_and_inputs(rng, dtype):
    grads = {"a": rng.normal(size=(3, 2)).astype(dtype)}
    before = grads["a"].copy()
    clipped, norm = clip_by_global_norm(grads, 0.1)
    assert clipped["a"].dtype == dtype
    assert isinstance(norm, float)
    assert np.array_equal(grads["a"], before)
    assert clipped["a"] is not grads["a"]


# -------------------------------------------------------------------------------- schedules


def test_inverse_sqrt_is_the_papers():
    for t in range(1, 9000, 7):
        want = 512**-0.5 * min(t**-0.5, t * 4000**-1.5)
        agree(warmup_inverse_sqrt(t, 512, 4000), want)
    assert warmup_inverse_sqrt(0, 512, 4000) == 0.0
    agree(warmup_inverse_sqrt(4000, 512, 4000), (512 * 4000) ** -0.5)


@pytest.mark.parametrize("floor", [0.0, 0.02])
@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_is_torchs(warmup, floor):
    peak, total = 0.3, 23
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, floor)
    for t in range(warmup, total + 1):
        agree(warmup_cosine(t, peak, warmup, total, floor), cosine.get_last_lr()[0], 1e-12)
        optimizer.step()
        cosine.step()
    for t in range(warmup):
        agree(warmup_cosine(t, peak, warmup, total, floor), peak * t / warmup)
    assert warmup_cosine(total + 9, peak, warmup, total, floor) == floor


def test_the_warm_up_is_torchs_linear():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    linear = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 6))
    for t in range(7):
        agree(warmup_cosine(t, 0.3, 6, 20), linear.get_last_lr()[0])
        optimizer.step()
        linear.step()


@given(
    st.integers(0, 50),
    st.integers(0, 60),
    st.floats(1e-6, 10),
    st.floats(0, 1),
    st.integers(1, 512),
)
def test_schedules_rise_then_fall_without_a_jump(warmup, more, peak, share, d_model):
    total = warmup + more
    rates = [warmup_cosine(t, peak, warmup, total, share * peak) for t in range(total + 3)]
    assert max(rates) == pytest.approx(peak)
    assert rates.index(max(rates)) == warmup
    assert all(a <= b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    if warmup:
        falls = [warmup_inverse_sqrt(t, d_model, warmup) for t in range(total + 3)]
        assert falls.index(max(falls)) == warmup
        agree(max(falls), (d_model * warmup) ** -0.5)


# -------------------------------------------------------------------------------- bad input

X = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: adamw_step(X, X[0], X, X, 1, 0.1), r"grad: expected shape \(2, 3\).*got \(3,\)"),
        (lambda: adam_step(X, X, X[:1], X, 1, 0.1), r"m: expected shape \(2, 3\).*got \(1, 3\)"),
        (lambda: adam_step(X, X, X, X, 0, 0.1), r"step: expected at least 1; got 0"),
        (lambda: adam_step(X, X, X, X, 1.5, 0.1), r"step: expected an integer; got 1.5"),
        (lambda: adam_step(X, X, X, X, 1, -0.1), r"lr: expected a finite number >= 0; got -0.1"),
        (lambda: adam_step(X, X, X, X, 1, 0.1, (1.0, 0.9)), r"betas\[0\]: .*\[0, 1\); got 1.0"),
        (lambda: adam_step(X, X, X, X, 1, 0.1, (0.9, 2)), r"betas\[1\]: .* got 2"),
        (lambda: adamw_step(X, X, X, X, 1, 0.1, eps=np.nan), r"eps: expected a finite .* got nan"),
        (lambda: adamw_step(X, X, X, X, 1, 0.1, weight_decay=-1), r"weight_decay: .* got -1"),
        (lambda: sgd_step(X, X, X, 0.1, momentum=1.0), r"momentum: .* got 1.0"),
        (
            lambda: sgd_step(X, X, X * 1j, 0.1),
            r"velocity: expected real numbers; got dtype complex",
        ),
        (lambda: clip_by_global_norm({"a": X}, -1.0), r"max_norm: expected a number >= 0; got -1"),
        (lambda: clip_by_global_norm({"a": X}, np.nan), r"max_norm: .* got nan"),
        (lambda: clip_by_global_norm({"a": X * 1j}, 1.0), r"a: expected real numbers"),
        (lambda: warmup_inverse_sqrt(-1, 8, 4), r"step: expected at least 0; got -1"),
        (lambda: warmup_inverse_sqrt(1, 8, 0), r"warmup: expected at least 1; got 0"),
        (lambda: warmup_inverse_sqrt(1, 8.0, 4), r"d_model: expected an integer; got 8.0"),
        (lambda: warmup_cosine(1, 0.1, 5, 4), r"total: expected at least warmup, 5; got 4"),
        (lambda: warmup_cosine(1, -0.1, 5, 9), r"peak: expected a finite .* got -0.1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
