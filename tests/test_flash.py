"""Tiled attention, all three backends, against one oracle; and what public kernels got wrong.

The oracle is attention.py in float64. The Triton kernels run in Triton's interpreter, on the CPU,
and are compiled for GPUs that need not be there.
"""

import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import tracemalloc
import typing
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generators, strided

from attn_lessons.attention import (
    attention_backward,
    attention_forward,
    causal_mask,
    padding_mask,
)
from attn_lessons.flash import numpy_tiles, torch_tiles
from attn_lessons.flash.numpy_tiles import flash_backward, flash_forward, merge_softmax_blocks
from attn_lessons.gradcheck import numerical_vjp

# In the interpreter: conftest.py says so before anything imports triton.
triton_kernel = pytest.importorskip("attn_lessons.flash.triton_kernel")

EXACT = 1e-10
INF, NAN = np.inf, np.nan
NAMES = ("out", "lse", "dq", "dk", "dv")
ROOT = Path(__file__).resolve().parent.parent


# --- the oracle and the three ---------------------------------------------------------------------


def oracle(case):
    """attention.py in float64, with k and v repeated for the heads that share them."""
    q, k, v, dout = (np.asarray(case[n], np.float64) for n in ("q", "k", "v", "dout"))
    group, (n_q, n_k) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    mask = np.ones((1, 1, n_q, n_k), bool)
    if case.get("causal"):
        mask = mask & causal_mask(n_q, n_k)
    if case.get("lengths") is not None:
        mask = mask & padding_mask(case["lengths"], n_k)
    k_rep, v_rep = k.repeat(group, 1), v.repeat(group, 1)
    out, probs, lse = attention_forward(q, k_rep, v_rep, mask, return_lse=True)
    dlse = case.get("dlse")
    dlse = None if dlse is None else np.asarray(dlse, np.float64)
    grads = attention_backward(dout, q, k_rep, v_rep, probs, dlse=dlse)
    dk, dv = (g.reshape(len(k), k.shape[1], group, *g.shape[2:]).sum(2) for g in grads[1:])
    return [out, lse, grads[0], dk, dv]


def by_numpy(case, block=3, dtype=None):
    arrays = [np.asarray(case[n], dtype) for n in ("dout", "q", "k", "v")]
    options = {"causal": bool(case.get("causal")), "lengths": case.get("lengths")}
    out, lse = flash_forward(*arrays[1:], block, **options)
    grads = flash_backward(*arrays, out, lse, block, dlse=case.get("dlse"), **options)
    return [out, lse, *grads]


def by_torch_like(module, dtype, **fixed):
    def run(case, **options):
        q, k, v = (tensor(case[n], dtype).requires_grad_() for n in "qkv")
        options = {"causal": bool(case.get("causal")), "lengths": case.get("lengths")} | options
        out, lse = module.flash_attention(q, k, v, return_lse=True, **(fixed | options))
        roots, upstream = [out], [tensor(case["dout"], out.dtype)]
        if case.get("dlse") is not None:
            roots, upstream = [out, lse], [*upstream, tensor(case["dlse"], lse.dtype)]
        grads = torch.autograd.grad(roots, [q, k, v], upstream)
        return [x.detach().to(torch.float64).numpy() for x in (out, lse, *grads)]

    return run


def tensor(x, dtype=torch.float64):
    return torch.tensor(np.array(x, np.float64, order="C")).to(dtype)


by_torch = by_torch_like(torch_tiles, torch.float64, block=3)
by_triton = by_torch_like(triton_kernel, torch.float32, block=16)
BACKENDS = {"numpy": (by_numpy, EXACT), "torch": (by_torch, EXACT), "triton": (by_triton, 2e-5)}
each_backend = pytest.mark.parametrize(("run", "rtol"), BACKENDS.values(), ids=BACKENDS)


def agree(got, want, rtol=EXACT, what=""):
    """Same infinities, and an error of at most ``rtol`` of the largest entry wanted, or of 0.1."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape, what
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), what
    scale = np.abs(want[finite]).max(initial=0)
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    # Gradients that cancel to 0 leave the rounding of their terms.
    assert error <= rtol * max(scale, 0.1), f"{what} off by {error:.3g} of {scale:.3g}"


def all_agree(got, want, rtol=EXACT):
    for name, a, b in zip(NAMES, got, want, strict=True):
        agree(a, b, rtol, name)


def drawn_case(rng, b, h, h_kv, n_q, n_k, d, d_v, **rest):
    def array(*shape):
        return rng.normal(size=shape)

    return {
        "q": array(b, h, n_q, d),
        "k": array(b, h_kv, n_k, d),
        "v": array(b, h_kv, n_k, d_v),
        "dout": array(b, h, n_q, d_v),
        "causal": False,
        "lengths": None,
    } | rest


@st.composite
def drawn(draw):
    # Few heads, each of its own: what is tiled are queries and keys. No two lengths alike.
    b, h_kv = draw(st.sampled_from([(1, 2), (2, 1), (1, 1)]))
    n_q, n_k, d, d_v = draw(st.permutations(range(1, 9)))[:4]
    rng, group = draw(generators()), draw(st.integers(1, 3))
    case = drawn_case(rng, b, h_kv * group, h_kv, n_q, n_k, d, d_v)
    scale = draw(st.sampled_from([0.3, 1.0, 5.0]))
    for name in ("q", "k", "v", "dout"):
        case[name] = draw(strided(case[name] * scale))
    case["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        case["lengths"] = rng.integers(0, n_k + 1, b)
    if draw(st.booleans()):
        case["dlse"] = rng.normal(size=case["q"].shape[:3])
    return case


# --- equal to the oracle --------------------------------------------------------------------------


@given(case=drawn(), block=st.integers(1, 8))
def test_numpy_tiles_equal_the_oracle(case, block):
    all_agree(by_numpy(case, block), oracle(case))


@given(case=drawn(), block=st.integers(1, 8))
def test_torch_tiles_equal_the_oracle(case, block):
    all_agree(by_torch(case, block=block), oracle(case))


@settings(max_examples=12)
@given(case=drawn())
def test_the_kernels_equal_the_oracle(case):
    all_agree(by_triton(case), oracle(case), 2e-5)


# (heads, heads of k, Nq, Nk, d, d_v, lengths): each loop of the kernels is entered and skipped.
BRANCHES = [
    (2, 1, 1, 37, 59, 8, None),
    (4, 2, 40, 33, 16, 16, (33, 9)),
    (2, 2, 33, 70, 24, 40, (0, 70)),
    (1, 1, 64, 64, 111, 20, (48, 64)),
    (2, 1, 50, 20, 32, 32, None),
    (1, 1, 17, 16, 200, 256, (1, 16)),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", BRANCHES, ids=str)
def test_every_branch_of_the_kernels(shape, causal):
    *sizes, lengths = shape
    rng = np.random.default_rng(sum(sizes))
    case = drawn_case(rng, 2, *sizes, causal=causal)
    case["lengths"] = None if lengths is None else np.array(lengths)
    case["dlse"] = rng.normal(size=case["q"].shape[:3])
    all_agree(by_triton(case), oracle(case), 2e-5)


@pytest.mark.usefixtures("unchecked")  # a thousand calls: half of the time went to their shapes
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_finite_differences(causal):
    case = drawn_case(np.random.default_rng(3), 1, 2, 1, 4, 3, 2, 5, causal=causal)
    grads = dict(zip("qkv", by_numpy(case, 2)[2:], strict=True))
    for name in "qkv":

        def out(x, name=name):
            changed = case | {name: x}
            return flash_forward(changed["q"], changed["k"], changed["v"], 2, causal)[0]

        agree(grads[name], numerical_vjp(out, case[name], case["dout"]), 1e-8, name)


def test_torchs_own_gradcheck():
    rng = np.random.default_rng(4)
    q, k, v = (tensor(rng.normal(size=(1, 2, n, 3))).requires_grad_() for n in (4, 5, 5))

    def both(q, k, v):
        return torch_tiles.flash_attention(q, k, v, True, return_lse=True, block=2)

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_torchs_own_kernel_agrees():
    case = drawn_case(np.random.default_rng(5), 2, 3, 3, 9, 9, 8, 8, causal=True)
    q, k, v = (tensor(case[n]) for n in "qkv")
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    agree(flash_forward(case["q"], case["k"], case["v"], 4, True)[0], want.numpy())


@settings(max_examples=15)
@given(case=drawn())
def test_the_block_only_regroups_the_sums(case):
    whole = by_numpy(case, 100)
    for block in (1, 2, 5):
        all_agree(by_numpy(case, block), whole, 1e-12)


# --- merging --------------------------------------------------------------------------------------


def part(z, v):
    m = z.max(-1, initial=-INF)
    p = np.exp(z - np.where(m == -INF, 0, m)[..., None])
    return m, p.sum(-1), p @ v


@given(rng=generators(), cut=st.integers(0, 6), scale=st.sampled_from([1.0, 30.0, 700.0]))
def test_merged_parts_are_the_whole(rng, cut, scale):
    z, v = rng.normal(size=(2, 3, 6)) * scale, rng.normal(size=(2, 6, 4))
    z[rng.random(z.shape) < 0.3] = -INF
    first, second = part(z[..., :cut], v[:, :cut]), part(z[..., cut:], v[:, cut:])
    for got, want in zip(merge_softmax_blocks(*first, *second), part(z, v), strict=True):
        agree(got, want, 1e-13)


@given(rng=generators())
def test_merging_does_not_depend_on_order_or_grouping(rng):
    a, b, c = (part(rng.normal(size=(5, 3)) * 9, rng.normal(size=(3, 2))) for _ in range(3))
    left = merge_softmax_blocks(*merge_softmax_blocks(*a, *b), *c)
    for other in (
        merge_softmax_blocks(*a, *merge_softmax_blocks(*b, *c)),
        merge_softmax_blocks(*c, *merge_softmax_blocks(*b, *a)),
    ):
        for got, want in zip(other, left, strict=True):
            agree(got, want, 1e-13)


def test_two_parts_without_keys_stay_without():
    nothing = (np.full(3, -INF), np.zeros(3), np.zeros((3, 2)))
    for got, want in zip(merge_softmax_blocks(*nothing, *nothing), nothing, strict=True):
        np.testing.assert_array_equal(got, want)


# --- corner cases ---------------------------------------------------------------------------------


@each_backend
def test_rows_that_see_nothing_are_zero_and_take_nothing(run, rtol):
    lengths = np.array([0, 3])
    case = drawn_case(np.random.default_rng(6), 2, 2, 1, 9, 5, 4, 4, causal=True, lengths=lengths)
    out, lse, dq, dk, dv = got = run(case)
    all_agree(got, oracle(case), rtol)
    assert (out[0] == 0).all()
    assert (lse[0] == -INF).all()
    assert (out[1, :, :4] == 0).all(), "9 queries over 5 keys: the first 4 come before any key"
    assert (dq[1, :, :4] == 0).all()
    for grad in (dk, dv):
        assert not grad[0].any()
        assert not grad[1, :, 3:].any()


@each_backend
def test_padding_may_hold_anything(run, rtol):
    lengths = np.array([2, 0])
    case = drawn_case(np.random.default_rng(7), 2, 2, 2, 3, 20, 4, 4, lengths=lengths)
    want = run(case)
    for name in "kv":
        case[name][0, :, 2:], case[name][1] = NAN, INF
    for got, clean in zip(run(case), want, strict=True):
        np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("run", [by_numpy, by_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("bad", [NAN, INF, 1e308])
def test_the_future_may_hold_anything(run, bad):
    """A key of NaN in the same block: those before it do not notice, those behind it do."""
    case = drawn_case(np.random.default_rng(8), 1, 1, 1, 6, 6, 3, 3, causal=True)
    case["dout"][:, :, 4:] = 0
    want = run(case)
    case["k"][:, :, 4], case["v"][:, :, 4] = bad, bad
    got = run(case)
    for name, a, b in zip(NAMES[:3], got, want, strict=False):
        np.testing.assert_array_equal(a[:, :, :4], b[:, :, :4], name)
    if np.isnan(bad):
        assert np.isnan(got[0][:, :, 4:]).all()


@each_backend
def test_an_upstream_gradient_of_stride_zero(run, rtol):
    case = drawn_case(np.random.default_rng(9), 2, 2, 2, 5, 7, 4, 4)
    case["dout"] = np.broadcast_to(2.0, case["dout"].shape)
    all_agree(run(case), oracle(case), rtol)


@pytest.mark.parametrize("module", [torch_tiles, triton_kernel])
def test_gradients_of_a_sum_and_of_a_transpose(module):
    rng = np.random.default_rng(10)
    q, k, v = (tensor(rng.normal(size=(2, 3, 5, 4)), torch.float32) for _ in range(3))
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
    weight = tensor(rng.normal(size=(3, 2, 5, 4)), torch.float32).permute(1, 2, 0, 3)
    for loss in (lambda o: o.sum(), lambda o: (o * weight).sum()):
        got = torch.autograd.grad(loss(module.flash_attention(q, k, v)), (q, k, v))
        plain = torch.softmax(q @ k.mT / 2, -1) @ v
        for a, b in zip(got, torch.autograd.grad(loss(plain), (q, k, v)), strict=True):
            agree(a.numpy(), b.numpy(), 1e-5)


@pytest.mark.parametrize("module", [torch_tiles, triton_kernel])
def test_a_loss_of_the_log_sum_exp_alone(module):
    rng = np.random.default_rng(11)
    q, k, v = (tensor(rng.normal(size=(1, 2, 4, 4)), torch.float32) for _ in range(3))
    q.requires_grad_()
    lse = module.flash_attention(q, k, v, return_lse=True)[1]
    (got,) = torch.autograd.grad(lse.sum(), q)
    want = torch.softmax(q @ k.mT / 2, -1) @ k / 2
    agree(got.numpy(), want.detach().numpy(), 1e-5)


@pytest.mark.parametrize("axis", ["B", "H", "Nq", "Nk", "d_v"])
@pytest.mark.parametrize("run", [by_numpy, by_torch, by_triton])
def test_an_axis_of_length_zero(run, axis):
    n = {"B": 2, "H": 2, "Nq": 3, "Nk": 4, "d_v": 5} | {axis: 0}
    rng = np.random.default_rng(12)
    case = drawn_case(rng, n["B"], n["H"], n["H"], n["Nq"], n["Nk"], 6, n["d_v"])
    got = run(case)
    shapes = [case["dout"].shape, case["q"].shape[:3], *(case[x].shape for x in "qkv")]
    assert [x.shape for x in got] == shapes
    if axis == "Nk":
        assert (got[0] == 0).all()
        assert (got[1] == -INF).all()


# --- memory and repetition ------------------------------------------------------------------------


def test_numpys_memory_may_have_been_poisoned(monkeypatch):
    lengths = np.array([4, 0])
    case = drawn_case(np.random.default_rng(13), 2, 2, 1, 7, 5, 3, 3, causal=True, lengths=lengths)
    want = by_numpy(case)
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, NAN, dtype))
    for got, clean in zip(by_numpy(case), want, strict=True):
        np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("run", [by_torch, by_triton], ids=["torch", "triton"])
def test_torchs_memory_may_have_been_poisoned(run):
    lengths = np.array([4, 0])
    case = drawn_case(np.random.default_rng(13), 2, 2, 1, 7, 5, 3, 3, causal=True, lengths=lengths)
    want = run(case)
    # Deterministic torch fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for got, clean in zip(poisoned, want, strict=True):
        np.testing.assert_array_equal(got, clean)


@each_backend
def test_two_runs_agree_bit_for_bit(run, rtol):
    case = drawn_case(np.random.default_rng(14), 1, 2, 1, 35, 50, 8, 8, causal=True)
    for first, second in zip(run(case), run(case), strict=True):
        assert first.tobytes() == second.tobytes()


@pytest.mark.usefixtures("unchecked")
def test_memory_does_not_grow_with_the_length():
    """Traced bytes beyond inputs, outputs and gradients: a few tiles, at 256 keys and at 1024."""
    block, beyond = 32, []
    for n in (256, 1024):
        case = drawn_case(np.random.default_rng(15), 1, 1, 1, n, n, 8, 8, causal=True)
        tracemalloc.start()
        results = by_numpy(case, block)
        peak = tracemalloc.get_traced_memory()[1] - sum(x.nbytes for x in results)
        tracemalloc.stop()
        beyond.append(peak)
    assert beyond[1] < 8 * block * block * 8
    # What does grow is delta, one number a query.
    assert beyond[1] - beyond[0] < 16 * (1024 - 256)


def test_no_tensor_of_torch_is_as_large_as_the_logits():
    n, largest = 256, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            found = result if isinstance(result, (tuple, list)) else [result]
            sizes = [x.numel() for x in found if isinstance(x, torch.Tensor)]
            largest = max([largest, *sizes])
            return result

    q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3))
    with Watch():
        torch_tiles.flash_attention(q, k, v, block=32).sum().backward()
    assert 32 * 32 <= largest < n * n / 8


# --- dtypes and accuracy --------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("attention_gpu")


@given(case=drawn())
def test_float32_stays_float32(case):
    case = case | {n: case[n].astype(np.float32) for n in ("q", "k", "v", "dout")}
    if case.get("dlse") is not None:
        case["dlse"] = case["dlse"].astype(np.float32)
    got = by_numpy(case)
    assert {x.dtype for x in got} == {np.dtype(np.float32)}


def test_float16_is_computed_in_float32():
    case = drawn_case(np.random.default_rng(16), 1, 1, 1, 30, 40, 8, 8)
    case = case | {n: case[n].astype(np.float16) for n in ("q", "k", "v", "dout")}
    got, want = by_numpy(case, 7), oracle(case)
    assert [x.dtype.itemsize for x in got] == [2, 4, 2, 2, 2]
    agree(got[0], want[0], 1e-3)
    agree(got[1], want[1], 1e-6)


def test_integers_become_float64():
    q = np.arange(24).reshape(1, 2, 3, 4) % 5
    out, lse = flash_forward(q, q, q, 2)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_array_equal(out, flash_forward(q.astype(float), q, q, 2)[0])


def within_twice_plain(gpu, case, dtype, run):
    """The benchmark's protocol, on the CPU: at most twice plain torch's error, and a floor.

    Plain torch is asked only where the floor alone is passed: in 16 bit tiles round once, at the
    end, and plain's products in float16 took most of these tests' time.
    """
    rounded = case | {n: tensor(case[n], dtype).double().numpy() for n in ("q", "k", "v", "dout")}
    inputs, dout = tuple(tensor(case[n], dtype) for n in "qkv"), tensor(case["dout"], dtype)
    got, want = run(rounded), oracle(rounded)
    floors, theirs = gpu.floors(inputs, dout, case["causal"]), None
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        at = (0, 2, 3, 4)[i]
        error = np.abs(got[at] - want[at]).max()
        floor = floors[i] + torch.finfo(dtype).eps / 2 * np.abs(want[at]).max()
        if error <= floor:
            continue
        theirs = theirs or gpu.with_gradients(gpu.plain, inputs, dout, case["causal"])
        plain = np.abs(theirs[i].double().numpy() - want[at]).max()
        assert error <= 2 * plain + floor, f"{name}: {error:.3g}, {plain:.3g}, {floor:.3g}"


@pytest.mark.parametrize("d", [32, 128])
def test_the_floor_is_needed_and_not_far_above_what_is(gpu, d):
    """239 queries over one key: dq and dk are 0, and plain torch's are. The tiles' are rounding."""
    shares = []
    for seed in range(5):
        case = drawn_case(np.random.default_rng([seed, d]), 1, 1, 1, 239, 1, d, d)
        q, k, v, dout = (tensor(case[n], torch.float32) for n in ("q", "k", "v", "dout"))
        floors = gpu.floors((q, k, v), dout, False)
        got = by_torch_like(torch_tiles, torch.float32, block=256)(case)
        assert gpu.with_gradients(gpu.plain, (q, k, v), dout, False)[2].abs().max() == 0
        shares += [np.abs(got[3]).max() / floors[2], np.abs(got[2]).max() / floors[1]]
    assert 0.1 < max(shares) < 1, shares


LENGTHS = [(1, 239), (3, 799), (127, 513), (1023, 1024)]
LENGTHS += [(n_k, n_q) for n_q, n_k in LENGTHS]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("d", [32, 59, 64, 111, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_torch_tiles_err_at_most_twice_as_much_as_plain_torch(gpu, lengths, d):
    for dtype in TYPES:
        for scale, causal in ((1, False), (3, True)):
            rng = np.random.default_rng([*lengths, d])
            case = drawn_case(rng, 1, 1, 1, *lengths, d, d, causal=causal)
            case |= {n: scale * case[n] for n in "qkv"}
            within_twice_plain(gpu, case, dtype, by_torch_like(torch_tiles, dtype, block=256))


@pytest.mark.parametrize("d", [32, 59, 64, 111, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_numpy_tiles_err_at_most_twice_as_much_as_plain_torch(gpu, lengths, d):
    for scale, causal in ((1, True), (3, False)):
        rng = np.random.default_rng([*lengths, d])
        case = drawn_case(rng, 1, 1, 1, *lengths, d, d, causal=causal)
        case |= {n: scale * case[n] for n in "qkv"}
        within_twice_plain(gpu, case, torch.float32, lambda c: by_numpy(c, 256, np.float32))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", [32, 59])
@pytest.mark.parametrize("lengths", [(1, 65), (33, 47), (47, 33)], ids=str)
def test_the_kernels_err_at_most_twice_as_much_as_plain_torch(gpu, lengths, d, dtype):
    for scale, causal in ((1, False), (3, True)):
        rng = np.random.default_rng([*lengths, d])
        case = drawn_case(rng, 1, 1, 1, *lengths, d, d, causal=causal)
        case |= {n: scale * case[n] for n in "qkv"}
        within_twice_plain(gpu, case, dtype, by_torch_like(triton_kernel, dtype, block=32))


# --- what public kernels got wrong ----------------------------------------------------------------


def test_991_the_printed_rescaling_is_inverted():
    """flash-attention#991: O times the inverse of e^(m_old - m_new), as printed, is NaN at once."""
    rng = np.random.default_rng(17)
    z, v = rng.normal(size=(4, 12)) * 3, rng.normal(size=(12, 5))
    want = part(z, v)[2] / part(z, v)[1][:, None]

    def tiled(power, m):
        o, total = np.zeros((4, 5)), np.zeros(4)
        for j in range(0, 12, 4):
            m_old, m = m, np.maximum(m, z[:, j : j + 4].max(1))
            p = np.exp(z[:, j : j + 4] - m[:, None])
            total = np.exp(m_old - m) * total + p.sum(1)
            o = np.exp(m_old - m)[:, None] ** power * o + p @ v[j : j + 4]
        return o / total[:, None]

    agree(tiled(1, np.full(4, -INF)), want, 1e-14)
    with np.errstate(all="ignore"):
        assert np.isnan(tiled(-1, np.full(4, -INF))).all()
    assert np.abs(tiled(-1, np.full(4, -1.0)) - want).max() > 0.1, "finite start: finite and wrong"
    merged = part(z[:, :4], v[:4])
    for j in (4, 8):
        merged = merge_softmax_blocks(*merged, *part(z[:, j : j + 4], v[j : j + 4]))
    agree(merged[2] / merged[1][:, None], want, 1e-14)


@pytest.mark.parametrize("module", [torch_tiles, triton_kernel])
def test_334_one_token_with_large_inputs_has_a_finite_dq(module):
    """flash-attention#334: one query, one key, entries of 3 in fp16, and dQ was NaN. It is 0."""
    rng = np.random.default_rng(352)
    for scale in (3, 30):
        q, k, v = (tensor(rng.normal(size=(1, 1, 1, 16)) * scale, torch.float16) for _ in range(3))
        q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        out = module.flash_attention(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert torch.equal(out, v)
        assert [g.abs().max().item() for g in grads] == [0, 0, 1]


@each_backend
def test_443_many_queries_over_few_keys_have_no_nan(run, rtol):
    """flash-attention#443: 76, 34 and 146 queries over one key each, causal, and dQ was NaN."""
    for n_q in (76, 34, 146):
        case = drawn_case(np.random.default_rng(n_q), 1, 1, 1, n_q, 1, 32, 32, causal=True)
        case |= {n: 3 * case[n] for n in "qkv"} | {"dout": np.ones((1, 1, n_q, 32))}
        got = run(case)
        assert (got[0][:, :, :-1] == 0).all(), "only the last query sees the key"
        agree(got[0][:, :, -1:], case["v"], rtol)
        all_agree(got, oracle(case), rtol)


def test_4174_the_backward_pass_without_the_causal_mask():
    """triton#4174: the tutorial's backward kernels mask always, whatever the forward pass did."""
    case = drawn_case(np.random.default_rng(18), 1, 1, 1, 40, 40, 16, 16)
    got, want = by_triton(case), oracle(case)
    all_agree(got, want, 2e-5)
    masked = oracle(case | {"causal": True})
    assert np.abs(masked[2] - want[2]).max() > 0.1, "the two differ by far more than any tolerance"


def test_11584_the_interpreter_multiplies_bit_patterns_of_bfloat16():
    """triton#11584. The day this fails, the detour over float32 can go."""
    script = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl
@triton.jit
def product(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))
a, b = torch.randint(-2, 3, (2, 16, 16))
for dtype in (torch.float16, torch.bfloat16):
    c = torch.zeros(16, 16)
    product[(1,)](a.to(dtype), b.to(dtype), c, N=16)
    print((c - (a @ b)).abs().max().item())
"""
    half, brain = map(float, run_script(script).split())
    assert half == 0
    assert brain > 1e6
    case = drawn_case(np.random.default_rng(19), 1, 1, 1, 20, 20, 16, 16)
    all_agree(by_torch_like(triton_kernel, torch.bfloat16)(case), oracle(case), 3e-2)


def test_5895_the_precision_of_float32_products_is_named():
    """triton#5895: tl.dot of float32 is TF32 on a GPU where nothing is said, exact here."""
    source = inspect.getsource(triton_kernel)
    calls = [line for line in source.splitlines() if "tl.dot(" in line]
    assert len(calls) == 9
    assert all("input_precision=PRECISION" in line for line in calls)
    assert inspect.signature(triton_kernel.flash_attention).parameters["precision"].default == (
        "ieee"
    )


COMPILE = """
import triton, warnings
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attn_lessons.flash import triton_kernel as tk
warnings.simplefilter("ignore")
POINTERS = {"kept": "*fp32", "lse": "*fp32", "delta": "*fp32", "lengths": "*i32"}
POINTERS |= dict.fromkeys("q k v out dout dk_out dv_out dq_out".split(), "*bf16")
for name, kernel in (("forward", tk._forward), ("keys", tk._backward_keys),
                     ("queries", tk._backward_queries)):
    fixed = dict(D=59, DV=64, BD=64, BDV=64, CAUSAL=True, PRECISION="ieee", KEEP=True)
    fixed |= tk.blocks(name, 64, 2)
    fixed = {n: v for n, v in fixed.items() if n in kernel.arg_names}
    kinds = POINTERS | dict.fromkeys(fixed, "constexpr") | {"scale": "fp32", "d_scale": "fp32"}
    signature = {n: kinds.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    for card in (80, 90):
        made = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 8})
        print(name, card, len(made.asm["cubin"]), made.metadata.shared)
"""


def test_the_kernels_compile_for_two_gpus(monkeypatch):
    """To machine code, with the compiler that triton carries: no card is needed for that."""
    monkeypatch.delenv("TRITON_INTERPRET")
    lines = [line.split() for line in run_script(COMPILE).splitlines()]
    names = [(name, card) for name, card, *_ in lines]
    assert names == [(n, c) for n in ("forward", "keys", "queries") for c in ("80", "90")]
    for _, _, size, shared in lines:
        assert int(size) > 10_000
        # What a block of threads may have on an A100.
        assert int(shared) <= 163 * 1024


def run_script(script):
    """Output of a script of its own: triton reads the source of its kernels from a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "script.py"
        file.write_text(script, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": folder}
        ran = subprocess.run(
            [sys.executable, str(file)], env=environment, capture_output=True, text=True
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


# --- the benchmark, as far as it goes without a card ----------------------------------------------


def test_the_benchmarks_arithmetic(gpu):
    assert gpu.flops(1, 1, 1024, 64, False, False) == 4 * 1024**2 * 64
    assert gpu.flops(2, 3, 8, 4, True, True) == 2 * 3 * 7 * 8**2 * 4
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.peak_of("NVIDIA H100 80GB HBM3") == 989
    assert gpu.peak_of("NVIDIA H100 PCIe") == 756
    assert gpu.peak_of("NVIDIA A100-SXM4-80GB") == 312
    assert gpu.peak_of("Some other card") is None
    for n in gpu.LENGTHS:
        for d in (64, 128):
            b, h, *_ = gpu.shape_of(n, d)
            assert (b * n, h * d) == (16384, 2048)


def test_the_benchmark_reports_medians_of_ratios(gpu):
    rounds = [{"triton": t, "flash": f} for t, f in ((1.0, 2.0), (2.0, 2.0), (4.0, 12.0))]
    got = gpu.summary(rounds, 2e12, 100)
    assert got["milliseconds"] == {"triton": 2, "flash": 2}
    assert got["over_triton"] == {"flash": 2}, "median of 2, 1 and 3: not the ratio of medians"
    assert got["tflops"] == {"triton": 1000, "flash": 1000}
    assert got["share_of_peak"] == {"triton": 10, "flash": 10}
    assert "share_of_peak" not in gpu.summary(rounds, 2e12, None)


def test_the_benchmarks_errors_refuse_a_kernel_that_is_wrong(gpu):
    for dtype in gpu.FORMATS.values():
        for causal, n_q, n_k in ((False, 20, 30), (True, 30, 20), (True, 20, 30)):
            sizes = (n_q, n_k, 16, dtype, 3, causal, "cpu")
            good = {"dtype": "x", "errors": gpu.errors(torch_tiles.flash_attention, *sizes)}
            bad = {"errors": gpu.errors(lambda q, k, v, c: 1.1 * gpu.plain(q, k, v, c), *sizes)}
            nan = {"errors": gpu.errors(lambda q, k, v, c: NAN * gpu.plain(q, k, v, c), *sizes)}
            assert gpu.refused([good, bad, nan]) == [bad, nan]
            assert gpu.worst([good])["x"]["out"]["ours"] == good["errors"]["out"]["ours"]


def test_the_benchmark_measures_nothing_without_a_card(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["attention_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA card"):
        gpu.main()


# --- inputs and errors ----------------------------------------------------------------------------


@given(case=drawn())
def test_inputs_may_be_read_only_and_are_never_returned(case):
    arrays = [x for x in case.values() if isinstance(x, np.ndarray)]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    for result in by_numpy(case):
        assert not any(np.shares_memory(result, x) for x in arrays)
    for x, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, old)


def test_nothing_depends_on_the_callers_error_state():
    lengths = np.array([5, 0])
    case = drawn_case(np.random.default_rng(20), 2, 1, 1, 7, 5, 3, 3, causal=True, lengths=lengths)
    case["k"][0, 0, 2] = INF
    quiet = by_numpy(case)
    with np.errstate(all="raise"):
        loud = by_numpy(case)
    np.testing.assert_equal(loud, quiet)


def zeros(*shape):
    return np.zeros(shape)


Q, K, V = zeros(2, 6, 4, 5), zeros(2, 3, 7, 5), zeros(2, 3, 7, 8)
OUT, LSE = zeros(2, 6, 4, 8), zeros(2, 6, 4)
M, L, ACC = zeros(3), zeros(3), zeros(3, 2)
BAD = [
    (flash_forward, (zeros(6, 4, 5), K, V, 2), {}, r"q: expected shape \(B, H, Nq, d\); got \(6"),
    (flash_forward, (Q[..., :0], K[..., :0], V, 2), {}, "q: expected a width d of at least 1"),
    (flash_forward, (Q, zeros(2, 3, 7, 4), V, 2), {}, r"k: .*\(2, Hkv, Nk, 5\) to match q .*7, 4"),
    (flash_forward, (Q, K[:, [0, 0, 1, 1]], V, 2), {}, r"v: expected shape \(2, 4, 7, d_v\)"),
    (flash_forward, (Q[:, :5], K, V, 2), {}, "k: expected a number of heads that divides 5.*got 3"),
    (flash_forward, (Q, K, zeros(2, 3, 6, 8), 2), {}, r"v: .*\(2, 3, 7, d_v\) to match k .*6, 8"),
    (flash_forward, (Q.astype(complex), K, V, 2), {}, "q: expected real numbers; got dtype comp"),
    (flash_forward, (Q, K, V, 0), {}, "block: expected at least 1; got 0"),
    (flash_forward, (Q, K, V, 2.0), {}, "block: expected an integer; got 2.0"),
    (flash_forward, (Q, K, V, 2), {"lengths": np.array([7])}, r"lengths: .*\(2,\) .*got \(1,\)"),
    (flash_forward, (Q, K, V, 2), {"lengths": np.array([7, 8])}, "lengths: .*0 … 7, n_k; got 8"),
    (flash_forward, (Q, K, V, 2), {"lengths": np.array([1.0, 2])}, "lengths: expected integers"),
    (flash_backward, (OUT[..., 1:], Q, K, V, OUT, LSE, 2), {}, r"dout: .*\(2, 6, 4, 8\) to match"),
    (flash_backward, (OUT, Q, K, V, OUT[:, 1:], LSE, 2), {}, r"out: .*got \(2, 5, 4, 8\)"),
    (flash_backward, (OUT, Q, K, V, OUT, LSE[..., 1:], 2), {}, r"lse: .*got \(2, 6, 3\)"),
    (flash_backward, (OUT, Q, K, V, OUT, LSE, 2), {"dlse": LSE[1:]}, r"dlse: .*to match lse; got"),
    (merge_softmax_blocks, (M, L[1:], ACC, M, L, ACC), {}, r"l1: .*\(3,\) to match m1; got \(2,\)"),
    (merge_softmax_blocks, (M, L, ACC, M, L, M), {}, r"o2: .*\(3, d_v\) to match m2; got \(3,\)"),
    (merge_softmax_blocks, (M, L, ACC, M[1:], L[1:], ACC[1:]), {}, r"m2: .*\(3,\) to match m1"),
    (merge_softmax_blocks, (M, L, ACC, M, L, ACC[:, 1:]), {}, r"o2: .*\(3, 2\) to match o1"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "options", "message"), BAD)
def test_bad_input_is_named(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


BOTH = [torch_tiles, triton_kernel]
T = [tensor(x, torch.float32) for x in (Q, K, V)]
BAD_TENSORS = [
    (BOTH, (T[0].int(), *T[1:]), {}, "q: expected floating point; got dtype torch.int32"),
    (BOTH, (T[0], T[1].half(), T[2]), {}, "k: expected torch.float32 on cpu to match q; got torch"),
    (BOTH, (T[0][:, :5], *T[1:]), {}, "k: expected a number of heads that divides 5"),
    (BOTH, (T[0], T[1][..., 1:], T[2]), {}, r"k: .*got \(2, 3, 7, 4\)"),
    (BOTH, tuple(T), {"lengths": [8, 0]}, "lengths: .*got 8 at 0"),
    (BOTH[:1], tuple(T), {"block": 0}, "block: expected at least 1; got 0"),
    (BOTH[1:], tuple(T), {"block": 8}, "block: expected a power of 2, at least 16; got 8"),
    (BOTH[1:], tuple(T), {"block": 48}, "block: expected a power of 2"),
    (BOTH[1:], tuple(T), {"precision": "fp8"}, "precision: expected one of ieee, tf32.*'fp8'"),
    (BOTH[1:], tuple(x.double() for x in T), {}, "q: expected float16, bfloat16 or float32"),
    (BOTH[1:], (torch.zeros(1, 1, 2, 257),) * 3, {}, "q: expected a width of at most 256; got 257"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("modules", "arguments", "options", "message"), BAD_TENSORS)
def test_bad_tensors_are_named(modules, arguments, options, message):
    for module in modules:
        with pytest.raises(ValueError, match=message):
            module.flash_attention(*arguments, **options)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        flash_forward(Q, zeros(2, 3, 7, 4), V, 2)
    with pytest.raises(jaxtyping.TypeCheckError):
        merge_softmax_blocks(M, L[1:], ACC, M, L, ACC)


def test_every_function_states_equation_shapes_and_errors():
    functions = [flash_forward, flash_backward, merge_softmax_blocks, numpy_tiles.flash_attention]
    for function in functions:
        hints = typing.get_type_hints(function)
        assert set(hints) == {*inspect.signature(function).parameters, "return"}
    for function in [*functions, *(m.flash_attention for m in BOTH)]:
        doc = inspect.getdoc(function)
        for wanted in (".. math::", "Shapes", "ValueError", "Source:"):
            assert wanted in doc, function.__name__


def test_the_three_take_the_same_first_arguments():
    first = [
        list(inspect.signature(m.flash_attention).parameters)[:5] for m in (numpy_tiles, *BOTH)
    ]
    assert first == [["q", "k", "v", "causal", "lengths"]] * 3
