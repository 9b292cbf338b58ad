"""Positions against torch, the papers' numbers, fifty digits and finite differences."""

import inspect
import typing

import jaxtyping
import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generators, strided

from attn_lessons import positions as library
from attn_lessons.gradcheck import numerical_gradient, numerical_vjp
from attn_lessons.positions import (
    alibi_bias,
    alibi_bias_backward,
    alibi_slopes,
    learned_positions_backward,
    learned_positions_forward,
    rope,
    rope_backward,
    rope_permutation,
    sinusoidal_positions,
)

EXACT = 1e-10
LAYOUTS = ("interleaved", "half")
SIDES = st.integers(1, 7)


def agree(got, want, rtol=EXACT):
    """An error of at most ``rtol`` of the largest entry wanted."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale, error = np.abs(want).max(initial=0), np.abs(got - want).max(initial=0)
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


# --- sinusoidal -----------------------------------------------------------------------------


def test_sinusoidal_at_positions_that_a_pencil_reaches():
    # d = 4: wavelengths 2π and 2π · 100.
    want = [
        [0, 1, 0, 1],
        [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)],
        [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)],
    ]
    np.testing.assert_allclose(sinusoidal_positions(3, 4), want, rtol=1e-15)
    table = sinusoidal_positions(51, 512)
    # Vaswani et al.: PE(50, 2i) at d = 512; i = 1 has 10000^(2/512), not 10000^(4/512).
    assert table[50, 2] == pytest.approx(np.sin(50 / 10000 ** (2 / 512)), abs=1e-13)
    assert table[50, 511] == pytest.approx(np.cos(50 / 10000 ** (510 / 512)), abs=1e-13)


@given(n=st.integers(0, 9), d=st.integers(1, 9), base=st.sampled_from([10000.0, 2.0, 500.0]))
def test_sinusoidal_equals_fifty_digits(n, d, base):
    got = sinusoidal_positions(n, d, base=base)
    assert got.shape == (n, d)
    assert got.dtype == np.float64
    with mpmath.workdps(50):
        for p, j in np.ndindex(n, d):
            angle = p / mpmath.mpf(base) ** (mpmath.mpf(2 * (j // 2)) / d)
            want = mpmath.cos(angle) if j % 2 else mpmath.sin(angle)
            assert abs(got[p, j] - want) <= 3e-16 * max(1, p)


@given(n=SIDES, d=SIDES)
def test_sinusoidal_equals_torch(n, d):
    half = torch.arange(0, d, 2, dtype=torch.float64)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * torch.exp(-half * np.log(1e4) / d)
    want = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :d]
    agree(sinusoidal_positions(n, d), want.numpy(), 1e-13)


# --- rotary ---------------------------------------------------------------------------------


def torch_rope(x, positions, base=10000.0, layout="interleaved", dtype=torch.complex128):
    """Pairs as complex numbers, times e^(i p θ): no cosine, no matrix."""
    d = x.shape[-1]
    pairs = x.unflatten(-1, (d // 2, 2) if layout == "interleaved" else (2, d // 2))
    pairs = pairs if layout == "interleaved" else pairs.transpose(-1, -2)
    theta = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = tensor(positions, dtype=torch.float64)[..., None] * theta
    turn = torch.polar(torch.ones_like(angles), angles).to(dtype)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned if layout == "interleaved" else turned.transpose(-1, -2)).flatten(-2)


@st.composite
def rotary(draw, dtype=np.float64, most=1e5):
    """An x of 1 to 4 axes in any memory layout, and positions that broadcast to its rows."""
    rng = draw(generators())
    rows = tuple(draw(st.lists(SIDES, min_size=0, max_size=3)))
    x = rng.normal(size=(*rows, 2 * draw(SIDES))).astype(dtype)
    kept = rows[draw(st.integers(0, len(rows))) :]
    shape = tuple(1 if draw(st.booleans()) else n for n in kept)
    scale = draw(st.sampled_from([1.0, 10.0, most]))
    positions = rng.uniform(-scale, scale, shape)
    if draw(st.booleans()):
        positions = np.round(positions).astype(draw(st.sampled_from([np.int64, np.int32])))
    return draw(strided(x)), positions


@pytest.mark.parametrize("layout", LAYOUTS)
@given(drawn=rotary(), base=st.sampled_from([10000.0, 500000.0, 2.0]))
def test_rope_and_its_gradient_equal_torch(layout, drawn, base):
    x, positions = drawn
    leaf = tensor(x, requires_grad=True)
    want = torch_rope(leaf, positions, base, layout)
    agree(rope(x, positions, base, layout=layout), want.detach().numpy())
    dy = np.random.default_rng(x.size).normal(size=x.shape)
    want.backward(tensor(dy))
    agree(rope_backward(dy, positions, base, layout=layout), leaf.grad.numpy())


def test_rope_at_positions_that_a_pencil_reaches():
    # d = 2: one pair, θ = 1. d = 4: θ = 1 and 1/100 (RoFormer, eq. 13 and 15).
    np.testing.assert_allclose(rope(np.array([[1.0, 0.0]]), 1), [[np.cos(1), np.sin(1)]])
    np.testing.assert_allclose(rope(np.array([[0.0, 1.0]]), 1), [[-np.sin(1), np.cos(1)]])
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    want = [
        np.cos(2) - 2 * np.sin(2),
        np.sin(2) + 2 * np.cos(2),
        3 * np.cos(0.02) - 4 * np.sin(0.02),
        3 * np.sin(0.02) + 4 * np.cos(0.02),
    ]
    np.testing.assert_allclose(rope(x, np.array([2])), [want], rtol=1e-14)
    want = [
        np.cos(2) - 3 * np.sin(2),
        2 * np.cos(0.02) - 4 * np.sin(0.02),
        np.sin(2) + 3 * np.cos(2),
        2 * np.sin(0.02) + 4 * np.cos(0.02),
    ]
    np.testing.assert_allclose(rope(x, np.array([2]), layout="half"), [want], rtol=1e-14)


def test_rope_is_the_matrix_of_equation_15():
    rng, d, p = np.random.default_rng(0), 6, 3
    matrix = np.zeros((d, d))
    for i in range(d // 2):
        angle = p * 10000 ** (-2 * i / d)
        block = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    x, dy = rng.normal(size=(2, 5, d))
    agree(rope(x, p), x @ matrix.T, 1e-14)
    agree(rope_backward(dy, p), dy @ matrix, 1e-14)


def test_rope_is_equation_34_of_the_paper():
    """x ∘ cos + (-x₂, x₁, -x₄, x₃ …) ∘ sin, every angle twice."""
    x, positions = np.random.default_rng(1).normal(size=(3, 7, 8)), np.arange(7)
    angles = np.repeat(positions[:, None] * 10000 ** (-np.arange(0, 8, 2) / 8), 2, axis=1)
    crossed = np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    agree(rope(x, positions), x * np.cos(angles) + crossed * np.sin(angles), 1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15)
@given(drawn=rotary(most=30.0))
def test_rope_backward_equals_finite_differences(layout, drawn):
    x, positions = drawn
    dy = np.random.default_rng(x.size).normal(size=x.shape)
    want = numerical_vjp(lambda x: rope(x, positions, layout=layout), x, dy)
    agree(rope_backward(dy, positions, layout=layout), want, 1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(drawn=rotary())
def test_rope_turns_and_its_gradient_turns_back(layout, drawn):
    x, positions = drawn
    y = rope(x, positions, layout=layout)
    agree(rope_backward(y, positions, layout=layout), x, 1e-14)
    agree(rope(rope_backward(x, positions, layout=layout), positions, layout=layout), x, 1e-14)
    agree(rope(y, -positions, layout=layout), x, 1e-14)
    agree(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), 1e-14)


@given(drawn=rotary(), rng=generators())
def test_rope_is_linear_and_its_backward_is_its_transpose(drawn, rng):
    x, positions = drawn
    z = rng.normal(size=x.shape)
    agree(rope(2 * x - z, positions), 2 * rope(x, positions) - rope(z, positions), 1e-14)
    inner = np.sum(rope(x, positions) * z), np.sum(x * rope_backward(z, positions))
    assert inner[0] == pytest.approx(inner[1], abs=1e-12 * x.size)


def rotary_logits(q, k, shift, q_layout="interleaved", k_layout="interleaved"):
    rows = shift + np.arange(len(q))
    return rope(q, rows, layout=q_layout) @ rope(k, rows, layout=k_layout).T


@pytest.mark.parametrize("layout", LAYOUTS)
@given(rng=generators(), d=SIDES, shift=st.sampled_from([-1000.0, -2.5, 1.0, 4096.0]))
def test_logits_depend_on_differences_of_positions_only(layout, rng, d, shift):
    q, k = rng.normal(size=(2, 5, 2 * d))
    near, far = (rotary_logits(q, k, s, layout, layout) for s in (0, shift))
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-11 * d)


def test_mixed_layouts_lose_the_invariance():
    """transformers#25199: weights of one layout, rotation of the other."""
    q, k = np.random.default_rng(0).normal(size=(2, 5, 8))
    near, far = (rotary_logits(q, k, s, "interleaved", "half") for s in (0, 7))
    assert np.abs(far - near).max() > 1
    # Each layout alone is invariant, so invariance does not tell which one was built.
    half = rotary_logits(q, k, 0, "half", "half")
    np.testing.assert_allclose(rotary_logits(q, k, 7, "half", "half"), half, atol=1e-12)
    assert np.abs(half - rotary_logits(q, k, 0)).max() > 1


@given(drawn=rotary())
def test_the_permutation_leads_from_one_layout_to_the_other(drawn):
    x, positions = drawn
    order = rope_permutation(x.shape[-1])
    there = rope(x[..., order], positions, layout="half")
    np.testing.assert_allclose(there, rope(x, positions)[..., order], rtol=0, atol=1e-14)
    back = rope(x[..., np.argsort(order)], positions)
    np.testing.assert_allclose(
        back, rope(x, positions, layout="half")[..., np.argsort(order)], atol=1e-14
    )


def test_permuted_weights_give_the_same_logits():
    rng, heads, d, rows = np.random.default_rng(2), 3, 8, np.arange(6)
    x = rng.normal(size=(6, 10))
    wq, wk = rng.normal(size=(2, heads, 10, d))
    order = rope_permutation(d)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert rope_permutation(2).tolist() == [0, 1]
    assert rope_permutation(0).shape == (0,)
    plain = rope(x @ wq, rows) @ rope(x @ wk, rows).swapaxes(-1, -2)
    q, k = (rope(x @ w[..., order], rows, layout="half") for w in (wq, wk))
    agree(q @ k.swapaxes(-1, -2), plain, 1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_memory_layout_and_dtype_of_x_do_not_matter(dtype, data):
    x, positions = data.draw(rotary(dtype))
    plain = rope(np.ascontiguousarray(x), positions)
    assert plain.dtype == dtype
    np.testing.assert_array_equal(rope(x, positions), plain)
    exact = rope(x.astype(float), positions)
    np.testing.assert_allclose(plain, exact, atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1.0, 80.0, 1e30])
@pytest.mark.parametrize("start", [0, 100_000, 10_000_000])
@pytest.mark.parametrize("function", [rope, rope_backward])
def test_float32_is_as_exact_as_torchs_at_every_position(function, start, size):
    """gpt-neox#1003, transformers#25681 and #29285: angles in the tokens' dtype are wrong."""
    rng, positions = np.random.default_rng(3), start + np.arange(300)
    x = (rng.normal(size=(4, 300, 64)) * size).astype(np.float32)
    x[0] = x[0, 0, 0]
    x[1, :, 1:] *= 1e-4
    turns = positions if function is rope else -positions
    exact = torch_rope(tensor(x.astype(float)), turns).numpy()
    ours = np.abs(function(x, positions) - exact).max()
    theirs = torch_rope(tensor(x), turns, dtype=torch.complex64).numpy()
    theirs = np.abs(theirs - exact).max()
    assert ours <= 2 * theirs
    assert ours <= 2e-7 * np.abs(x).max() * 2
    # The same rotation with its angles in float32.
    theta = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)
    angles = turns.astype(np.float32)[:, None] * theta
    narrow = x[..., ::2] * np.cos(angles) - x[..., 1::2] * np.sin(angles)
    if start:
        assert np.abs(narrow - exact[..., ::2]).max() > 1000 * ours


@given(rng=generators(), p=st.sampled_from([1, 12345, 100_000, 10**7, -99_999, 0.5, 123456.75]))
def test_large_positions_equal_fifty_digits(rng, p):
    x = rng.normal(size=(1, 8))
    with mpmath.workdps(50):
        for i in range(4):
            angle = mpmath.mpf(p) * mpmath.mpf(10000) ** (mpmath.mpf(-2 * i) / 8)
            turn = mpmath.expj(angle) * mpmath.mpc(x[0, 2 * i], x[0, 2 * i + 1])
            got = rope(x, p)[0, 2 * i : 2 * i + 2]
            # p θ has one rounding for θ and one for the product.
            assert abs(mpmath.mpc(*got) - turn) <= 1e-15 * max(1, abs(float(angle))) * 4


def test_positions_of_every_integer_dtype_and_none_at_all():
    x = np.random.default_rng(4).normal(size=(2, 3, 4))
    want = rope(x, np.arange(3.0))
    for kind in (np.int8, np.uint8, np.int32, np.int64, np.uint64, np.float32):
        np.testing.assert_array_equal(rope(x, np.arange(3).astype(kind)), want)
    np.testing.assert_array_equal(rope(x, 2), rope(x, np.full(3, 2)))
    np.testing.assert_array_equal(rope(x, 0), x)
    for shape in ((0, 4), (2, 0, 4), (0, 3, 4), (3, 0)):
        got = rope(np.zeros(shape), np.zeros(shape[-2]))
        assert got.shape == rope_backward(np.zeros(shape), np.zeros(shape[-2])).shape == shape


def test_sequences_of_a_batch_may_stand_at_their_own_positions():
    """Left-padded or packed sequences: one row of positions for each."""
    x = np.random.default_rng(5).normal(size=(2, 3, 4, 6))
    positions = np.array([[0, 1, 2, 3], [-2, -1, 0, 1]])
    got = rope(x, positions[:, None, :])
    for b in range(2):
        np.testing.assert_array_equal(got[b], rope(x[b], positions[b]))


def test_one_step_of_decoding_is_the_last_row_of_the_whole():
    x = np.random.default_rng(6).normal(size=(2, 3, 9, 8))
    np.testing.assert_array_equal(rope(x, np.arange(9))[..., 8:, :], rope(x[..., 8:, :], 8))


def test_what_is_not_finite_stays_in_its_pair():
    x = np.random.default_rng(7).normal(size=(3, 6))
    spoiled = x.copy()
    spoiled[0, 2], spoiled[1, 4] = np.nan, np.inf
    got, want = rope(spoiled, np.arange(3)), rope(x, np.arange(3))
    touched = np.zeros((3, 6), bool)
    touched[0, 2:4] = touched[1, 4:] = True
    np.testing.assert_array_equal(got[~touched], want[~touched])
    assert not np.isfinite(got[touched]).any()


# --- learned --------------------------------------------------------------------------------


@st.composite
def looked_up(draw, dtype=np.float64):
    """A table, positions of 0 to 3 axes with repeats, and an upstream gradient."""
    rng, n, width = draw(generators()), draw(SIDES), draw(SIDES)
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    positions = rng.integers(0, n, shape)
    dout = rng.normal(size=(*shape, width)).astype(dtype)
    return rng.normal(size=(n, width)).astype(dtype), positions, draw(strided(dout))


@given(drawn=looked_up())
def test_learned_positions_equal_torch(drawn):
    table, positions, dout = drawn
    leaf = tensor(table, requires_grad=True)
    want = F.embedding(tensor(positions, dtype=torch.int64), leaf)
    got = learned_positions_forward(table, positions)
    np.testing.assert_array_equal(got, want.detach().numpy())
    want.backward(tensor(dout))
    agree(learned_positions_backward(dout, positions, len(table)), leaf.grad.numpy(), 1e-13)


@settings(max_examples=15)
@given(drawn=looked_up())
def test_learned_gradient_equals_finite_differences(drawn):
    table, positions, dout = drawn
    want = numerical_vjp(lambda e: learned_positions_forward(e, positions), table, dout)
    agree(learned_positions_backward(dout, positions, len(table)), want, 1e-8)


@given(rng=generators(), b=SIDES, h=SIDES, n=SIDES, c=SIDES)
def test_positions_that_a_batch_shares_collect_from_all_of_it(rng, b, h, n, c):
    dout, positions = rng.normal(size=(b, h, n, c)), rng.permutation(n + 2)[:n]
    leaf = torch.zeros(n + 2, c, dtype=torch.float64, requires_grad=True)
    (torch.zeros(b, h, n, c) + F.embedding(tensor(positions), leaf)).backward(tensor(dout))
    got = learned_positions_backward(dout, positions, n + 2)
    agree(got, leaf.grad.numpy(), 1e-13)
    assert (got[np.setdiff1d(np.arange(n + 2), positions)] == 0).all(), "rows not used"
    agree(got.sum(0), dout.sum((0, 1, 2)), 1e-12)


def test_repeated_positions_add_up():
    dout = np.arange(8.0).reshape(4, 2)
    got = learned_positions_backward(dout, np.array([1, 1, 0, 1]), 3)
    assert got.tolist() == [[4, 5], [8, 11], [0, 0]]


def test_float32_sums_of_many_are_no_further_off_than_torchs():
    rng = np.random.default_rng(8)
    for dout in (rng.normal(size=(100_000, 3)), np.full((100_000, 3), 0.1)):
        dout = dout.astype(np.float32)
        positions = np.arange(100_000) % 2
        exact = learned_positions_backward(dout.astype(float), positions, 2)
        got = learned_positions_backward(dout, positions, 2)
        assert got.dtype == np.float32
        leaf = torch.zeros(2, 3, requires_grad=True)
        F.embedding(tensor(positions), leaf).backward(tensor(dout))
        ours, theirs = np.abs(got - exact).max(), np.abs(leaf.grad.numpy() - exact).max()
        assert ours <= theirs
        assert ours <= np.spacing(np.abs(exact).max().astype(np.float32))


def test_nan_upstream_reaches_its_row_only():
    dout = np.ones((3, 2))
    dout[1] = np.nan
    got = learned_positions_backward(dout, np.array([0, 1, 2]), 3)
    assert np.isnan(got[1]).all()
    assert (got[[0, 2]] == 1).all()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_row_numbers_of_every_integer_dtype(kind):
    table, positions = np.arange(6.0).reshape(3, 2), np.array([2, 0, 2])
    np.testing.assert_array_equal(
        learned_positions_forward(table, positions.astype(kind)), table[positions]
    )
    got = learned_positions_backward(np.ones((3, 2)), positions.astype(kind), 3)
    assert got.tolist() == [[1, 1], [0, 0], [2, 2]]


# --- ALiBi ----------------------------------------------------------------------------------


def test_slopes_are_the_papers():
    # Section 3: 8 heads have 1/2, 1/4 … 1/256; 16 heads the geometric means in between as well.
    np.testing.assert_array_equal(alibi_slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(16), 2.0 ** -np.arange(0.5, 8.5, 0.5), rtol=1e-15)
    np.testing.assert_array_equal(alibi_slopes(1), [2.0**-8])
    np.testing.assert_array_equal(alibi_slopes(4), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])


def test_slopes_of_other_counts_are_those_of_the_published_code():
    # What Press et al.'s get_slopes returns, run for 3, 6 and 12 heads.
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    np.testing.assert_allclose(alibi_slopes(6), [0.25, 0.0625, 2.0**-6, 2.0**-8, 0.5, 0.125])
    want = [*(0.5 ** np.arange(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), want, rtol=1e-15)


@given(n=st.integers(1, 130))
def test_slopes_are_distinct_and_below_one(n):
    slopes = alibi_slopes(n)
    assert slopes.shape == (n,)
    assert len(set(slopes.tolist())) == n
    assert (slopes < 1).all()
    # aprender#2143: 2^(-8(h-1)/H) starts at 1.
    assert slopes.min() >= 2.0**-8


def test_the_bias_by_hand():
    got = alibi_bias(2, 3, 3)
    np.testing.assert_array_equal(got[0], -np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]]) / 16)
    np.testing.assert_array_equal(got[1], got[0] / 16)
    assert not np.signbit(got[got == 0]).any()


@given(h=st.integers(1, 9), n_q=st.integers(0, 7), n_k=st.integers(0, 7))
def test_the_bias_is_aligned_as_the_causal_mask(h, n_q, n_k):
    got = alibi_bias(h, n_q, n_k)
    assert got.shape == (h, n_q, n_k)
    whole = alibi_bias(h, max(n_q, n_k), max(n_q, n_k))
    start = max(n_q, n_k) - n_q, max(n_q, n_k) - n_k
    np.testing.assert_array_equal(got, whole[:, start[0] :, start[1] :])
    for head, i, j in np.ndindex(got.shape):
        assert got[head, i, j] == -alibi_slopes(h)[head] * abs(i + n_k - n_q - j)


def test_under_a_causal_mask_it_is_the_published_codes_row_of_key_positions():
    """Their code adds slope · j: each row differs by a constant, which softmax does not see."""
    n, slopes = 6, alibi_slopes(4)[:, None, None]
    logits = np.random.default_rng(9).normal(size=(4, n, n))
    causal = np.tri(n, dtype=bool)
    ours, theirs = logits + alibi_bias(4, n, n), logits + slopes * np.arange(n)
    probs = [F.softmax(tensor(np.where(causal, z, -np.inf)), -1).numpy() for z in (ours, theirs)]
    agree(probs[0], probs[1], 1e-14)


@given(rng=generators(), h=SIDES, n_q=SIDES, n_k=SIDES)
def test_the_slopes_gradient_equals_torch_and_finite_differences(rng, h, n_q, n_k):
    dbias = rng.normal(size=(h, n_q, n_k))
    far = np.abs(np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k))
    slopes = tensor(alibi_slopes(h), requires_grad=True)
    bias = -slopes[:, None, None] * tensor(far)
    np.testing.assert_array_equal(bias.detach().numpy(), alibi_bias(h, n_q, n_k))
    bias.backward(tensor(dbias))
    got = alibi_bias_backward(dbias)
    np.testing.assert_allclose(got, slopes.grad.numpy(), rtol=0, atol=1e-12)
    want = numerical_gradient(lambda m: -np.sum(m[:, None, None] * far * dbias), alibi_slopes(h))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * max(1, np.abs(want).max()))


# --- inputs and errors ------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 4)).astype(dtype)
    rows = np.array([4, 0, 4])
    return {
        sinusoidal_positions: (3, 4),
        learned_positions_forward: (rng.normal(size=(5, 4)).astype(dtype), rows),
        learned_positions_backward: (x, rows, 5),
        rope: (x, rows),
        rope_backward: (x, rows),
        rope_permutation: (4,),
        alibi_slopes: (3,),
        alibi_bias: (3, 2, 4),
        alibi_bias_backward: (x,),
    }


WITH_ARRAYS = [f for f, arguments in calls().items() if isinstance(arguments[0], np.ndarray)]


@pytest.mark.parametrize("function", WITH_ARRAYS)
def test_inputs_may_be_read_only_and_are_never_returned(function):
    arguments = calls()[function]
    for a in arguments:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False
    out = function(*arguments)
    assert not any(np.shares_memory(out, a) for a in arguments if isinstance(a, np.ndarray))
    assert out.flags.writeable


@pytest.mark.parametrize("function", WITH_ARRAYS)
def test_float32_stays_and_integers_become_float64(function):
    assert function(*calls(np.float32)[function]).dtype == np.float32
    first, *rest = calls()[function]
    whole = np.round(first * 4).astype(int)
    got = function(whole, *rest)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, function(whole.astype(float), *rest))


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(function(*arguments), quiet)


X = np.zeros((2, 3, 4))
BAD = [
    (sinusoidal_positions, (-1, 4), "n: expected at least 0; got -1"),
    (sinusoidal_positions, (3, 0), "d: expected at least 1; got 0"),
    (sinusoidal_positions, (3.0, 4), r"n: expected an integer; got 3\.0"),
    (learned_positions_forward, (np.zeros(3), np.array([0])), r"table: expected .*\(n, C\); got"),
    (learned_positions_forward, (X[0], np.array([0, 3])), "positions: expected 0 … 2 .* got 3"),
    (learned_positions_forward, (X[0], np.array([-1])), "positions: .* of 3 rows; got -1"),
    (learned_positions_forward, (X[0], np.array([1.0])), "positions: .*integers; got .*float64"),
    (learned_positions_forward, (X[0], np.array([True])), "positions: .*integers; got .*bool"),
    (learned_positions_backward, (X, np.arange(2), 9), r"positions: .*\(2, 3\); got \(2,\)"),
    (learned_positions_backward, (X, np.arange(3), 2), "positions: expected 0 … 1 .* got 2"),
    (learned_positions_backward, (X, np.arange(3), -1), "n: expected at least 0; got -1"),
    (learned_positions_backward, (np.array(1.0), np.array(0), 3), "dout: expected at least one"),
    (learned_positions_backward, (X.astype(complex), np.arange(3), 3), "dout: .*complex128"),
    (rope, (X[..., :3], np.arange(3)), r"x: expected an even last axis.*; got \(2, 3, 3\)"),
    (rope, (X, np.arange(2)), r"positions: expected a shape that .*\(2, 3\); got \(2,\)"),
    (rope, (X[0], np.zeros((2, 3))), r"positions: .*\(3,\); got \(2, 3\)"),
    (rope, (X, np.array([0, np.nan, 1])), "positions: expected finite numbers"),
    (rope, (X, np.array([0, np.inf, 1])), "positions: expected finite numbers"),
    (rope, (X, np.array(["a"])), "positions: expected real numbers; got dtype <U1"),
    (rope, (X, np.arange(3), 0.0), r"base: expected a positive number; got 0\.0"),
    (rope, (X, np.arange(3), -1e4), "base: expected a positive number; got -10000"),
    (rope, (X, np.arange(3), np.nan), "base: expected a positive number; got nan"),
    (rope, (np.array(1.0), np.array(0)), "x: expected at least one axis; got a scalar"),
    (rope, (X.astype(complex), np.arange(3)), "x: expected real numbers; got dtype complex128"),
    (rope_backward, (X[..., :3], np.arange(3)), "dy: expected an even last axis"),
    (rope_backward, (X, np.arange(4)), r"positions: .*\(2, 3\); got \(4,\)"),
    (rope_permutation, (5,), "d: expected an even number; got 5"),
    (rope_permutation, (-2,), "d: expected at least 0; got -2"),
    (alibi_slopes, (0,), "n_heads: expected at least 1; got 0"),
    (alibi_slopes, (2.5,), r"n_heads: expected an integer; got 2\.5"),
    (alibi_bias, (0, 2, 2), "n_heads: expected at least 1; got 0"),
    (alibi_bias, (2, -1, 2), "n_q: expected at least 0; got -1"),
    (alibi_bias, (2, 1, "3"), "n_k: expected an integer; got '3'"),
    (alibi_bias_backward, (X[0],), r"dbias: expected shape \(H, Nq, Nk\); got \(3, 4\)"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_unknown_keywords_are_named():
    for function in (rope, rope_backward):
        with pytest.raises(ValueError, match='layout: expected "interleaved" or "half"; got'):
            function(X, np.arange(3), layout="pairs")
    with pytest.raises(ValueError, match="base: expected a positive number; got inf"):
        sinusoidal_positions(3, 4, base=np.inf)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        rope(X, np.arange(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        learned_positions_backward(X, np.arange(3.0), 3)


@pytest.mark.parametrize("function", calls())
def test_every_function_states_equation_shapes_and_errors(function):
    doc = inspect.getdoc(function)
    assert ".. math::" in doc
    assert "Shapes:" in doc
    assert "ValueError:" in doc
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_the_source_fits_on_a_page():
    lines = inspect.getsource(library).splitlines()
    assert max(map(len, lines)) <= 100
    public = {n for n, f in vars(library).items() if inspect.isfunction(f) and n[0] != "_"}
    ours = {n for n in public if getattr(library, n).__module__ == library.__name__}
    assert ours == {f.__name__ for f in calls()}


# --- against the whole of attention -----------------------------------------------------------


def test_a_bag_of_tokens_without_positions_and_a_sequence_with_them():
    """Attention is equivariant to the order of its tokens; each encoding ends that."""
    rng, n, d = np.random.default_rng(10), 5, 8
    x, order = rng.normal(size=(1, 1, n, d)), rng.permutation(n)
    rows = np.arange(n)

    def attend(x, turn=lambda x: x, bias=None):
        bias = None if bias is None else tensor(bias)
        q = k = tensor(turn(x))
        return F.scaled_dot_product_attention(q, k, tensor(x), attn_mask=bias).numpy()

    agree(attend(x[..., order, :]), attend(x)[..., order, :], 1e-14)
    added = sinusoidal_positions(n, d)
    ways = {
        "sinusoidal": lambda x: attend(x + added),
        "rotary": lambda x: attend(x, turn=lambda x: rope(x, rows)),
        "ALiBi": lambda x: attend(x, bias=alibi_bias(8, n, n)[None, :1]),
    }
    for name, way in ways.items():
        assert np.abs(way(x[..., order, :]) - way(x)[..., order, :]).max() > 1e-2, name


def test_sums_of_sinusoids_depend_on_the_difference_of_positions_only():
    """PE(p)·PE(p + 5) is the same for every p; with the exponent misread it is not."""
    table = sinusoidal_positions(200, 64)
    inner = np.einsum("pd,pd->p", table[:-5], table[5:])
    assert np.ptp(inner) < 1e-12
    # The published formula read with 2i as the column's number, doubled once more.
    exponents = 2 * np.arange(64) / 64
    angles = np.arange(200)[:, None] / 10000**exponents
    misread = np.where(np.arange(64) % 2, np.cos(angles), np.sin(angles))
    inner = np.einsum("pd,pd->p", misread[:-5], misread[5:])
    assert np.ptp(inner) > 3


def test_sinusoids_at_a_shifted_position_are_rotary():
    """Vaswani et al.: PE(p + k) is a linear function of PE(p); it is rope's rotation, mirrored."""
    table = sinusoidal_positions(60, 16)
    # Pairs are (sin, cos), so the rotation by k turns the other way.
    agree(rope(table[:50], -7.0), table[7:57], 1e-13)
