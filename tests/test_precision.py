"""Rounding against torch bit by bit, sums against exact fractions, scaling against GradScaler."""

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, generators, shapes, strided

from attn_lessons import precision as library
from attn_lessons.optim import clip_by_global_norm
from attn_lessons.precision import (
    FORMATS,
    LossScaler,
    accumulate_in,
    loss_scale_step,
    mixed_precision_dot,
    mixed_precision_loss,
    mixed_precision_step,
    round_to,
    round_to_bf16,
    round_to_fp16,
    share_below,
    spacing,
    unscale,
    unscale_then_clip,
)
from attn_lessons.training import train, train_start

HALF = {
    "float16": (round_to_fp16, torch.float16),
    "bfloat16": (round_to_bf16, torch.bfloat16),
}
both = pytest.mark.parametrize("name", HALF)


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def torchs(x, name):
    return torch.from_numpy(np.array(x, np.float32)).to(HALF[name][1]).float().numpy()


def same_bits(got, want):
    """Equal in every bit, the sign of 0 too; NaN where there is NaN."""
    assert got.dtype == want.dtype == np.float32
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    wrong = ~nan & (bits(got) != bits(want))
    assert not wrong.any(), f"{got[wrong][:3]}, torch has {want[wrong][:3]}"


def halves(name):
    """All 65536 numbers of a format, as float32."""
    patterns = np.arange(65536, dtype=np.uint16)
    return torch.from_numpy(patterns.view(np.int16)).view(HALF[name][1]).float().numpy()


# ------------------------------------------------------------------------------------- rounding


@both
def test_rounding_is_torchs_on_every_exponent(name):
    """All signs and exponents of float32 with 2048 fractions each, those at ties above all."""
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 3]
    for bit in range(1, 23):  # at, under and over each power of two, the ties of 8 and 11 digits
        edges += [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]
        edges += [(3 << bit) % (1 << 23), ((3 << bit) + 1) % (1 << 23)]
    edges += [(1 << 23) - 1, (1 << 23) - 2]
    fractions = np.unique(np.r_[edges, rng.integers(0, 1 << 23, 2048 - len(edges))])
    heads = np.arange(512, dtype=np.uint32) << 23  # sign and exponent, inf and NaN included
    x = (heads[:, None] | fractions.astype(np.uint32)).view(np.float32).ravel()
    same_bits(HALF[name][0](x), torchs(x, name))


@both
def test_every_number_and_every_midpoint_of_the_format_round_as_torchs(name):
    x = halves(name)
    finite = np.sort(x[np.isfinite(x)]).astype(np.float64)
    middle = (finite[1:] + finite[:-1]) / 2
    near = np.float32(np.r_[finite, middle])
    x = np.r_[x, near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, -np.inf)]
    x = x.astype(np.float32)
    same_bits(HALF[name][0](x), torchs(x, name))


@both
def test_the_formats_own_numbers_stay(name):
    x = halves(name)
    same_bits(HALF[name][0](x), x)
    finite = np.abs(x[np.isfinite(x)])
    assert finite.max() == FORMATS[name].largest
    assert finite[finite > 0].min() == FORMATS[name].smallest


@both
def test_overflow_begins_half_a_gap_above_the_largest(name):
    largest = FORMATS[name].largest
    edge = largest + float(spacing(np.array(largest), name)) / 2
    below = np.nextafter(edge, 0)
    got = HALF[name][0](np.array([below, edge, -below, -edge, np.inf, -np.inf]))
    assert got.tolist() == [largest, np.inf, -largest, -np.inf, np.inf, -np.inf]


@both
def test_the_smallest_ties_go_to_zero_with_their_sign(name):
    tiny = FORMATS[name].smallest
    x = np.array([tiny / 2, -tiny / 2, np.nextafter(tiny / 2, 1), 1.5 * tiny, -0.0])
    got = HALF[name][0](x)
    assert got.tolist() == [0, 0, tiny, 2 * tiny, 0]
    assert np.signbit(got).tolist() == [False, True, False, False, True]


@both
def test_every_nan_stays_nan(name):
    """Adding half a gap to the bits turns the NaN 0x7fffffff into -0: its exponent overflows."""
    patterns = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF], np.uint32)
    x = patterns.view(np.float32)
    assert np.isnan(HALF[name][0](x)).all()
    assert np.isnan(torchs(x, name)).all()
    carried = patterns + np.uint32(0x7FFF) + ((patterns >> 16) & 1)
    assert (carried & np.uint32(0xFFFF0000)).view(np.float32)[0] == 0


def test_float16_is_numpys_from_either_width():
    rng = np.random.default_rng(1)
    x = rng.normal(size=20000) * 2.0 ** rng.integers(-30, 18, 20000)
    with np.errstate(over="ignore"):
        for dtype in (np.float64, np.float32):
            want = x.astype(dtype).astype(np.float16).astype(dtype)
            assert np.array_equal(round_to_fp16(x.astype(dtype)), want)


def test_float32_is_numpys():
    rng = np.random.default_rng(2)
    x = rng.normal(size=20000) * 2.0 ** rng.integers(-160, 130, 20000)
    with np.errstate(over="ignore"):
        assert np.array_equal(round_to(x, "float32"), x.astype(np.float32).astype(np.float64))


@both
def test_float64_rounds_once_where_torch_rounds_twice(name):
    """1 + half a gap + a little: float32 drops the little, and the tie goes to 1."""
    gap = float(spacing(np.ones(()), name))
    x = np.array([1 + gap / 2 + 2.0**-40])
    assert HALF[name][0](x)[0] == 1 + gap
    assert torch.from_numpy(x).to(HALF[name][1]).item() == 1


def test_cutting_bits_off_is_not_rounding():
    """Truncation errs by up to a gap, always towards 0; rounding by half, and to either side."""
    x = np.random.default_rng(3).uniform(1, 2, 10000).astype(np.float32)
    cut = (bits(x) & np.uint32(0xFFFF0000)).view(np.float32)
    gap = spacing(x, "bfloat16")
    assert np.abs(round_to_bf16(x) - x).max() <= gap[0] / 2 < np.abs(cut - x).max()
    assert ((cut - x) / gap).mean() == pytest.approx(-0.5, abs=0.02)
    assert ((round_to_bf16(x) - x) / gap).mean() == pytest.approx(0, abs=0.02)


@both
@given(st.data(), generators(), shapes(1, 4), DTYPES)
def test_rounding_of_any_layout(name, data, rng, shape, dtype):
    x = np.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-9, 6), dtype)
    x = data.draw(strided(x))
    before = x.copy()
    got = HALF[name][0](x)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert np.array_equal(x, before)
    assert np.array_equal(HALF[name][0](got), got)
    assert (np.abs(got - x) <= spacing(x, name) / 2)[np.isfinite(got)].all()
    assert np.array_equal(HALF[name][0](-x), -got)
    order = np.argsort(x, axis=None)
    assert (np.diff(got.ravel()[order].clip(-1e30, 1e30)) >= 0).all()


@both
def test_spacing_is_the_distance_to_the_next_number(name):
    x = halves(name)
    x = np.sort(x[np.isfinite(x) & (x >= 0) & ~np.signbit(x)])
    assert np.array_equal(spacing(x[:-1], name), np.diff(x))
    assert np.isnan(spacing(np.array([np.inf, np.nan]), name)).all()


def test_integers_become_float64():
    got = round_to_fp16(np.array([2049, 65519, 65520]))
    assert got.dtype == np.float64
    assert got.tolist() == [2048, 65504, np.inf]


# --------------------------------------------------------------------------------- accumulators


def rounded(x: Fraction, name: str) -> Fraction:
    """The nearest number of a format in exact arithmetic, for numbers within its range."""
    kind = FORMATS[name]
    if x == 0:
        return x
    exponent = math.frexp(float(x))[1] - 1
    gap = Fraction(2) ** (max(exponent, kind.least) - kind.digits + 1)
    return round(x / gap) * gap  # round of a Fraction takes ties to even


@pytest.mark.parametrize("name", FORMATS)
@given(rng=generators(), n=st.integers(0, 30))
def test_the_dot_product_rounds_once_a_term(name, rng, n):
    a, b = rng.normal(size=(2, n)) * 10.0 ** rng.integers(-3, 2, (2, n))
    want = Fraction(0)
    for x, y in zip(round_to_fp16(a), round_to_fp16(b), strict=True):
        want = rounded(want + Fraction(float(x)) * Fraction(float(y)), name)
    got = mixed_precision_dot(a, b, name)
    assert got.shape == ()
    assert Fraction(float(got)) == want


def test_a_sum_that_float64_cannot_hold_is_still_rounded_once():
    """1 + 2**-11 + 2**-60 lies above a tie; rounded to float64 first, it lies on it."""
    terms = np.array([2.0**-11 + 2.0**-60, 1.0])
    assert accumulate_in(terms[:1], "float32") == 2.0**-11
    exact = np.array([1.0, 2.0**-11 + 2.0**-60])
    assert exact.sum() == 1 + 2.0**-11
    assert accumulate_in(exact, "float16") == 1 + 2.0**-10
    assert accumulate_in(-exact, "float16") == -1 - 2.0**-10


@pytest.mark.parametrize(("name", "stop"), [("bfloat16", 256), ("float16", 2048)])
def test_ones_stop_adding_up(name, stop):
    """In the format itself, in torch as here; a float32 sum goes on."""
    ones = np.ones(stop + 200)
    assert accumulate_in(ones, name) == stop
    total = torch.zeros((), dtype=HALF[name][1])
    for _ in ones:
        total = total + 1
    assert total.item() == stop
    assert mixed_precision_dot(ones, ones, name) == stop
    assert mixed_precision_dot(ones, ones) == stop + 200


def test_a_float16_accumulator_overflows_where_a_float32_one_does_not():
    a = np.full(100, 30.0)
    assert mixed_precision_dot(a, a, "float16") == np.inf
    assert mixed_precision_dot(a, a) == 90000


def test_errors_of_three_accumulators():
    """4096 products of one sign, as long as a row of a large model's matrices."""
    rng = np.random.default_rng(4)
    a, b = round_to_fp16(rng.random((2, 50, 4096)))
    exact = (a * b).sum(axis=-1)
    error = {
        name: float(np.abs(mixed_precision_dot(a, b, name) / exact - 1).max()) for name in FORMATS
    }
    assert error["float32"] < 5e-6
    assert error["float16"] > 0.05
    assert error["bfloat16"] > 0.7  # it stands still at 256, of 1024


def test_inputs_of_a_dot_product_are_rounded_first():
    assert mixed_precision_dot(np.array([1 + 2.0**-12]), np.ones(1)) == 1
    assert np.isnan(mixed_precision_dot(np.array([1e-8]), np.array([1e8])))  # 0 times inf


@given(st.data(), generators(), shapes(1, 3), DTYPES)
def test_dot_products_keep_dtype_shape_and_inputs(data, rng, shape, dtype):
    a, b = (data.draw(strided(rng.normal(size=shape).astype(dtype))) for _ in range(2))
    before = a.copy(), b.copy()
    got = mixed_precision_dot(a, b)
    assert got.dtype == dtype
    assert got.shape == shape[:-1]
    assert np.array_equal(a, before[0])
    assert np.array_equal(b, before[1])
    slack = 2.0**-9 * (np.abs(a) * np.abs(b)).sum(axis=-1) + 1e-6
    assert (np.abs(got - (a * b).sum(axis=-1)) <= slack).all()


# --------------------------------------------------------------------------------- loss scaling


def scaler_of_torch(scale, growth, backoff, interval):
    return torch.amp.GradScaler(
        "cpu",
        init_scale=scale,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=interval,
    )


@given(
    events=st.lists(st.booleans(), max_size=40),
    rule=st.tuples(
        st.sampled_from([2.0, 1.5, 3.0]),
        st.sampled_from([0.5, 0.3, 0.9]),
        st.integers(1, 4),
    ),
    scale=st.sampled_from([65536.0, 1.0, 2.0**126]),
)
def test_the_scale_moves_as_gradscalers(events, rule, scale):
    theirs, ours = scaler_of_torch(scale, *rule), (scale, 0)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    theirs.scale(torch.zeros(()))
    for found_inf in events:
        p.grad = torch.tensor([1.0, math.inf if found_inf else 1.0])
        theirs.step(optimizer)
        theirs.update()
        ours = loss_scale_step(*ours, found_inf, *rule)
        state = theirs.state_dict()
        assert ours == (state["scale"], state["_growth_tracker"])


def test_the_default_rule_is_gradscalers():
    theirs = torch.amp.GradScaler("cpu").state_dict()
    ours = inspect.signature(loss_scale_step).parameters
    assert ours["growth"].default == theirs["growth_factor"]
    assert ours["backoff"].default == theirs["backoff_factor"]
    assert ours["interval"].default == theirs["growth_interval"]
    assert LossScaler().scale == theirs["scale"]


def test_the_scale_grows_again_after_an_interval():
    scaler = LossScaler(1024.0, interval=3)
    path = [scaler.update(found_inf) for found_inf in [False, True, *[False] * 7]]
    assert path == [1024, 512, 512, 512, 1024, 1024, 1024, 2048, 2048]
    assert scaler.good_steps == 1


def test_a_scale_that_would_overflow_stays():
    assert loss_scale_step(2.0**127, 4, False, interval=5) == (2.0**127, 0)


def test_a_static_scale_hears_and_stays():
    scaler = LossScaler(8.0, interval=1, dynamic=False)
    assert [scaler.update(f) for f in (True, False, True)] == [8, 8, 8]


@given(
    rng=generators(),
    scale=st.sampled_from([1.0, 3.0, 1000.0, 65536.0, 0.1]),
    bad=st.sampled_from([None, math.inf, -math.inf, math.nan]),
)
def test_unscaling_is_gradscalers_bit_for_bit(rng, scale, bad):
    x = (rng.normal(size=(3, 5)) * scale).astype(np.float32)
    if bad is not None:
        x[1, 2] = bad
    theirs = scaler_of_torch(scale, 2.0, 0.5, 2000)
    p = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.SGD([p], lr=1.0)
    theirs.scale(torch.zeros(()))
    p.grad = torch.from_numpy(x.copy())
    theirs.unscale_(optimizer)
    grads, found_inf = unscale({"w": x}, scale)
    same_bits(grads["w"], p.grad.numpy())
    theirs.step(optimizer)
    assert found_inf == (bad is not None) == (not p.detach().numpy().any())


@given(rng=generators(), scale=st.sampled_from([1.0, 1024.0, 65536.0]))
def test_unscale_then_clip_is_torchs(rng, scale):
    raw = {n: rng.normal(size=s).astype(np.float32) for n, s in (("w", (4, 3)), ("b", (3,)))}
    theirs = scaler_of_torch(scale, 2.0, 0.5, 2000)
    p = {n: torch.nn.Parameter(torch.zeros(g.shape)) for n, g in raw.items()}
    optimizer = torch.optim.SGD(p.values(), lr=1.0)
    theirs.scale(torch.zeros(()))
    for n, g in raw.items():
        p[n].grad = torch.from_numpy(g * np.float32(scale))
    theirs.unscale_(optimizer)
    want = torch.nn.utils.clip_grad_norm_(p.values(), 1.0).item()
    grads, norm, found_inf = unscale_then_clip(
        {n: g * np.float32(scale) for n, g in raw.items()}, scale, 1.0
    )
    assert not found_inf
    assert norm == pytest.approx(want, rel=1e-6)
    for n in raw:
        np.testing.assert_allclose(grads[n], p[n].grad.numpy(), rtol=1e-6)
        assert grads[n].dtype == np.float32


def test_examples_1196_clipping_before_unscaling_shrinks_the_step_by_the_scale():
    """pytorch/examples#1196: a gradient of length 0.5 needs no clipping to 1 at all."""
    scale, g = 65536.0, {"w": np.array([0.3, -0.4])}
    scaled = {"w": g["w"] * scale}
    right, norm, _ = unscale_then_clip(scaled, scale, 1.0)
    assert norm == pytest.approx(0.5)
    assert np.array_equal(right["w"], g["w"])
    wrong = unscale(clip_by_global_norm(scaled, 1.0)[0], scale)[0]["w"]
    assert np.linalg.norm(wrong) == pytest.approx(1 / scale, rel=1e-6)


def test_what_is_not_finite_is_found_and_not_clipped():
    for bad in (math.inf, -math.inf, math.nan):
        g = {"w": np.array([8.0, 2.0]), "b": np.array([bad])}
        grads, norm, found_inf = unscale_then_clip(g, 2.0, 1.0)
        assert found_inf
        assert not math.isfinite(norm)
        assert grads["w"].tolist() == [4, 1]


def test_float16_gradients_are_unscaled_in_float32():
    g = np.array([2.0**-24, 60000.0], np.float16)
    grads, _ = unscale({"w": g}, 65536.0)
    assert grads["w"].dtype == np.float32
    assert grads["w"].tolist() == [2.0**-40, float(g[1]) / 65536]


def test_a_gradient_that_unscaling_makes_infinite_is_found():
    """A scale below 1: GradScaler looks before it multiplies, and would take the step."""
    grads, found_inf = unscale({"w": np.array([3e38], np.float32)}, 0.125)
    assert found_inf
    assert grads["w"][0] == np.inf


def test_the_share_below_the_range():
    g = np.array([0.0, 2.0**-26, -(2.0**-25), 2.0**-25 * 1.01, 1e-3])
    assert share_below(g) == 0.5
    assert share_below(g, scale=4.0) == 0
    assert share_below({"a": g, "b": np.ones(4)}) == 0.25
    assert share_below(g, "bfloat16") == 0
    assert share_below(np.zeros(3)) == 0
    rng = np.random.default_rng(5)
    many = rng.normal(size=100000) * 1e-7
    kept = torch.from_numpy(many.astype(np.float32)).half()
    assert share_below(many) == pytest.approx((kept == 0).float().mean().item(), abs=1e-4)


# -------------------------------------------------------------------------------- training runs

# Small targets and a mean over many of them: gradients by the outputs are 2 · 5e-4 / 65536 at most.
RNG = np.random.default_rng(6)
X = RNG.normal(size=(1024, 8))
Y = 5e-4 * np.tanh(X @ RNG.normal(size=(8, 64)) / 8**0.5)
START = {"w1": RNG.normal(size=(8, 32)) / 8**0.5, "w2": np.zeros((32, 64))}


def network(weights, scale, r=round_to_fp16):
    """Loss and gradients of a network of two layers, each result rounded by ``r``."""
    x, w1, w2 = r(X), weights["w1"], weights["w2"]
    hidden = r(np.tanh(r(x @ w1)))
    off = hidden @ w2 - Y  # the loss stays in full precision
    dout = r(scale * 2 * off / off.size)
    dhidden = r(dout @ w2.T)
    da = r(dhidden * r(1 - hidden * hidden))
    return (off**2).mean(), {"w1": r(x.T @ da), "w2": r(hidden.T @ dout)}


def rate(name, t):
    return {"w1": 1e-2, "w2": 2e-5}[name] * 0.96**t


def descend(scaler, steps=100):
    """Steps of the gradient's sign, whose length does not depend on the gradient's."""
    master, log = START, []

    def update(w, g):
        return {n: w[n] - rate(n, len(log)) * np.sign(g[n]) for n in w}

    for _ in range(steps):
        master, step = mixed_precision_step(master, network, update, scaler)
        log.append(step)
    return log


def test_fp16_fails_without_scaling_and_trains_with_it():
    """Every gradient by an output is 0 in fp16; scaled by 2**16, one in 65536 is."""
    dout = 2 * (0 - Y) / Y.size
    assert share_below(dout) == 1
    assert share_below(dout, scale=2.0**16) < 1e-4
    without = descend(LossScaler(1.0, dynamic=False), 20)
    static = descend(LossScaler(2.0**16, dynamic=False))
    assert {step.loss for step in without} == {static[0].loss}
    assert static[-1].loss < 0.1 * static[0].loss


def test_a_dynamic_scale_finds_its_size():
    """Started far too high it falls with each skipped step, and then the run trains."""
    scaler = LossScaler(2.0**40, interval=30)
    log = descend(scaler)
    skipped = [step.skipped for step in log]
    down = skipped.index(False)
    assert down > 2
    assert [step.scale for step in log[: down + 1]] == [2.0 ** (40 - i) for i in range(down + 1)]
    assert all(step.loss == log[0].loss for step in log[: down + 1])
    assert log[-1].loss < 0.1 * log[0].loss
    assert len({step.scale for step in log[down:]}) > 1


def test_bfloat16_needs_no_scale():
    def loss(weights, scale):
        return network(weights, scale, round_to_bf16)

    w, step = mixed_precision_step(START, loss, lambda w, g: g, LossScaler(1.0), format="bfloat16")
    assert step.lost == 0
    assert share_below(2 * (0 - Y) / Y.size, "bfloat16") == 0
    want = network(START, 1.0, lambda x: x)[1]
    assert np.abs(w["w2"] - want["w2"]).max() < 0.02 * np.abs(want["w2"]).max()


@pytest.mark.parametrize(("scale", "trains"), [(1.0, False), (2.0**16, True)])
def test_the_same_run_in_torchs_own_float16(scale, trains):
    """Real half precision and GradScaler in place of ours: fails and trains alike."""
    master = {n: torch.nn.Parameter(torch.tensor(w, dtype=torch.float32)) for n, w in START.items()}
    x, y = torch.tensor(X).half(), torch.tensor(Y).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    losses = []
    for t in range(100):
        half = {n: p.detach().half().requires_grad_() for n, p in master.items()}
        out = torch.tanh(x @ half["w1"]) @ half["w2"]
        loss = (out.float() - y).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        with torch.no_grad():
            for n, p in master.items():
                p -= rate(n, t) * torch.sign(half[n].grad.float())
    assert (losses[-1] < 0.1 * losses[0]) == trains
    assert trains or losses[-1] == losses[0]


def test_the_emulated_gradients_are_torchs_half_precision_ones():
    """One backward pass: within fp16's own error of each other, entry by entry on the largest."""
    scale = 2.0**16
    weights = {"w1": round_to_fp16(START["w1"]), "w2": round_to_fp16(np.full((32, 64), 1e-3))}
    _, ours = network(weights, scale)
    half = {n: torch.tensor(w).half().requires_grad_() for n, w in weights.items()}
    out = torch.tanh(torch.tensor(X).half() @ half["w1"]) @ half["w2"]
    (scale * (out.double() - torch.tensor(Y)).square().mean()).backward()
    for n, g in ours.items():
        theirs = half[n].grad.double().numpy()
        assert np.abs(g - theirs).max() <= 0.02 * np.abs(theirs).max()


def test_a_skipped_step_changes_nothing_but_the_scale():
    def loss(weights, scale):
        return 1.0, {"w": np.array([1e3 * scale])}  # 6.6e7 does not fit float16

    def never(master, grads):
        raise AssertionError("a step was taken on inf")

    scaler, master = LossScaler(65536.0), {"w": np.array([0.1])}
    after, step = mixed_precision_step(master, loss, never, scaler)
    assert step.skipped
    assert after["w"] is master["w"]
    assert scaler.scale == 32768


def test_lvsm_19_a_step_that_the_loop_skips_needs_update_too():
    """LVSM#19: the loop left out step and update; torch refuses the next unscale_. Ours is told."""
    weight = torch.nn.Parameter(torch.tensor([0.1]))
    optimizer, theirs = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)

    def unscaled():
        optimizer.zero_grad()
        theirs.scale(weight.sum()).backward()
        theirs.unscale_(optimizer)

    unscaled()
    with pytest.raises(RuntimeError, match="already been called"):
        unscaled()
    theirs.update()
    unscaled()

    def loss(weights, scale):
        return 1.0, {"w": np.array([1e3 * scale])}

    scaler, master, seen = LossScaler(65536.0), {"w": np.array([0.1])}, []
    for _ in range(12):
        master, step = mixed_precision_step(master, loss, lambda w, g: dict(w), scaler)
        seen.append(step.skipped)
    assert seen == [True] * 10 + [False] * 2
    assert 1e3 * scaler.scale < FORMATS["float16"].largest


def test_master_weights_keep_what_half_precision_weights_lose():
    """A step of a quarter of a gap: lost each time in bf16, whole after four in the master."""

    def loss(weights, scale):
        return 0.0, {"w": scale * np.ones(1)}

    step_size = float(spacing(np.ones(()), "bfloat16")) / 4

    def update(w, g):
        return {"w": w["w"] + step_size * g["w"]}

    master, alone = {"w": np.ones(1, np.float32)}, np.ones(1, np.float32)
    for _ in range(100):
        master, _ = mixed_precision_step(master, loss, update, LossScaler(1.0), format="bfloat16")
        alone = round_to_bf16(alone + step_size)
    assert alone == 1
    assert master["w"] == 1 + 100 * step_size
    assert round_to_bf16(master["w"]) > 1.1


def test_the_loop_of_training_runs_in_half_precision():
    """Gradients come back unscaled and are clipped by the loop; inf is skipped by it."""
    scaler = LossScaler(2.0**40, interval=1000)
    loss = mixed_precision_loss(lambda w, rng, scale: network(w, scale), scaler)
    _, records = train(
        train_start(START, 0), loss, 120, lambda step: 3e-4, stop_on_divergence=False
    )
    skipped = sum(record.skipped for record in records)
    assert records[0].skipped
    assert scaler.scale == 2.0 ** (40 - skipped)
    assert records[-1].loss < 0.2 * records[0].loss
    taken = [record.norm for record in records if not record.skipped]
    assert 0 < max(taken) < 1e-3  # of the loss, not of the scaled one


def test_a_second_moment_in_bfloat16_stalls_and_in_float32_does_not():
    """v moves by (1 - 0.999)(g² - v), an eighth of a gap of bf16's 8 digits: it stands still."""
    v = low = 1.0
    for _ in range(2000):
        v = 0.999 * v + 0.001 * 4.0
        low = float(round_to_bf16(np.array(low + 0.001 * (4.0 - low))))
    assert low == 1
    assert v > 3.5


# --------------------------------------------------------------------------------------- errors


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: round_to(np.ones(2), "half"), "format: expected one of float16, bfloat16"),
        (lambda: round_to_bf16(np.ones(2, complex)), "x: expected real numbers; got dtype complex"),
        (lambda: mixed_precision_dot(np.ones(2), np.ones(3)), r"b: expected shape \(2,\)"),
        (lambda: mixed_precision_dot(np.ones(2), np.ones(2), "fp16"), "accumulate: expected one"),
        (lambda: accumulate_in(np.ones(()), "float16"), r"terms: expected shape \(..., n\)"),
        (lambda: loss_scale_step(0.0, 0, False), "scale: expected a number > 0"),
        (lambda: loss_scale_step(1e39, 0, False), "scale: expected a number > 0 that float32 has"),
        (lambda: loss_scale_step(1.0, -1, False), "good_steps: expected at least 0; got -1"),
        (lambda: loss_scale_step(1.0, 0, False, growth=1.0), "growth: expected a finite number"),
        (lambda: loss_scale_step(1.0, 0, False, backoff=1.0), "backoff: expected a number in"),
        (lambda: loss_scale_step(1.0, 0, False, interval=0), "interval: expected at least 1"),
        (lambda: LossScaler(math.nan), "scale: expected a number > 0"),
        (lambda: unscale({"w": np.ones(1)}, -1.0), "scale: expected a number > 0"),
        (lambda: unscale_then_clip({"w": np.ones(1)}, 1.0, -1.0), "max_norm: expected"),
        (lambda: share_below(np.ones(1), "float8"), "format: expected one of"),
        (lambda: mixed_precision_loss(network, LossScaler(), format="x"), "format: expected"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_function_states_equation_shapes_and_errors():
    public = [f for n, f in vars(library).items() if inspect.isfunction(f) and n[0] != "_"]
    for f in public:
        if f.__module__ != library.__name__ or f is mixed_precision_loss:
            continue
        doc = inspect.getdoc(f)
        assert "ValueError:" in doc
        assert ".. math::" in doc
        assert "Shapes:" in doc or f is loss_scale_step
