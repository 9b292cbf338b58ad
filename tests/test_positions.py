"""Positions against torch, the papers' numbers, fifty digits and finite differences."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, strided

from attn_lessons.positions import (
    rope,
    rope_backward,
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
