"""Heads, projections and multi-head attention against torch, finite differences and loops."""

import inspect
import itertools
import typing
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, strided
from torch import nn

from attn_lessons import multihead as library
from attn_lessons.attention import causal_mask, dropout_keep, padding_mask
from attn_lessons.gradcheck import numerical_vjp
from attn_lessons.multihead import (
    cross_attention_backward,
    cross_attention_backward_cached,
    cross_attention_forward,
    from_torch_mha,
    fuse_qkv,
    grouped_kv_backward,
    grouped_kv_forward,
    linear_backward,
    linear_forward,
    merge_heads,
    multihead_backward,
    multihead_backward_cached,
    multihead_forward,
    qkv_backward,
    qkv_forward,
    split_heads,
    to_torch_mha,
)

EXACT = 1e-10
INF = np.inf
QKV = ("wq", "wk", "wv", "bq", "bk", "bv")
NAMES = library.WEIGHTS + library.BIASES
LENGTHS = st.integers(1, 7)


def agree(got, want, rtol=EXACT, scale=0.0):
    """An error of at most ``rtol`` of the largest entry wanted, or of ``scale``."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    error, scale = largest(got - want), max(scale, largest(want))
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def agree_by_name(got, want, rtol=EXACT):
    """All gradients agree.

    Those by bk, and with one key all those behind softmax, cancel to 0: the largest gradient says
    how large their terms are.
    """
    assert set(got) == set(want)
    scale = max(largest(g) for g in want.values())
    for name in got:
        agree(got[name], want[name], rtol, scale if largest(want[name]) < 1e-8 * scale else 0.0)


def largest(x):
    return np.abs(x).max(initial=0)


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def parameters(rng, c, m=None, e=None, e_kv=None):
    """Random weights and biases of multi-head attention, by name."""
    m, e = c if m is None else m, c if e is None else e
    e_kv = e if e_kv is None else e_kv
    shapes = ((c, e), (m, e_kv), (m, e_kv), (e, c), (e,), (e_kv,), (e_kv,), (c,))
    return {n: rng.normal(size=s) / s[0] ** 0.5 for n, s in zip(NAMES, shapes, strict=True)}


def plain(x, memory, params, n_heads, mask=None, n_kv_heads=None, bias=None, keep=None, rate=0.0):
    """Multi-head attention in torch's own operations; a masked row gives zeros."""
    n_kv_heads = n_kv_heads or n_heads

    def project(x, name, heads):
        b = params[f"b{name}"]
        y = F.linear(x, params[f"w{name}"].T, b)
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = project(x, "q", n_heads)
    k, v = (
        project(memory, n, n_kv_heads).repeat_interleave(n_heads // n_kv_heads, dim=1) for n in "kv"
    )
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        alive = mask.any(-1, keepdim=True)
        probs = torch.softmax(logits.masked_fill(~mask & alive, -INF), -1) * alive
    else:
        probs = torch.softmax(logits, -1)
    if keep is not None:
        probs = probs * keep / (1 - rate)
    return F.linear((probs @ v).transpose(1, 2).flatten(2), params["wo"].T, params["bo"])


def by_autograd(dout, x, memory, params, n_heads, **options):
    """Output and all gradients by autograd: ``(out, dx, dmemory, grads)``."""
    options = {n: tensor(o) if isinstance(o, np.ndarray) else o for n, o in options.items()}
    leaves = {n: tensor(a, requires_grad=True) for n, a in params.items() if a is not None}
    if options.get("bias") is not None:
        leaves["bias"] = options["bias"] = options["bias"].requires_grad_()
    x = tensor(x, requires_grad=True)
    same = memory is None
    memory = x if same else tensor(memory, requires_grad=True)
    given = dict.fromkeys(NAMES) | {n: leaf for n, leaf in leaves.items() if n != "bias"}
    out = plain(x, memory, given, n_heads, **options)
    out.backward(tensor(dout))
    grads = {n: leaf.grad.numpy() for n, leaf in leaves.items()}
    return out.detach().numpy(), x.grad.numpy(), None if same else memory.grad.numpy(), grads


@st.composite
def problems(draw, cross=False):
    """Arguments of multi-head attention: any shapes, mask, bias, dropout, groups; a seed."""
    rng = draw(generators())
    b, n_q, n_k, c, m, d, group, n_kv_heads = draw(
        st.tuples(*[LENGTHS] * 6, st.integers(1, 3), st.integers(1, 3))
    )
    n_heads = group * n_kv_heads
    if not cross:
        n_k, m = n_q, c
    params = parameters(rng, c, m, n_heads * d, n_kv_heads * d)
    for name in library.BIASES:
        if draw(st.integers(0, 9)) == 0:
            params[name] = None

    def some(shape):
        """A shape that broadcasts to this one."""
        cut = [1 if draw(st.booleans()) else n for n in shape]
        return tuple(cut[draw(st.integers(0, len(cut) - 1)) :])

    full, options = (b, n_heads, n_q, n_k), {"n_kv_heads": n_kv_heads}
    if draw(st.booleans()):
        options["mask"] = rng.random(some(full)) < draw(st.sampled_from([0.3, 0.7]))
    if draw(st.booleans()):
        options["bias"] = rng.normal(size=some(full))
    if draw(st.booleans()):
        options |= {"keep": rng.random(some(full)) < 0.7, "rate": 0.3}
    x, dout = rng.normal(size=(2, b, n_q, c))
    memory = rng.normal(size=(b, n_k, m)) if cross else None
    return dout, x, memory, params, n_heads, options


# --- heads --------------------------------------------------------------------------------------


@given(sizes=st.tuples(*[LENGTHS] * 4), rng=generators(), data=st.data())
def test_split_and_merge_equal_torch_and_undo_each_other(sizes, rng, data):
    b, n, h, d = sizes
    x = data.draw(strided(rng.normal(size=(b, n, h * d))))
    heads = split_heads(x, h)
    want = tensor(x).unflatten(-1, (h, d)).transpose(1, 2)
    np.testing.assert_array_equal(heads, want)
    np.testing.assert_array_equal(merge_heads(data.draw(strided(heads))), x)
    # <split(x), y> = <x, merge(y)>: each is the other's backward pass.
    y = rng.normal(size=heads.shape)
    np.testing.assert_allclose((heads * y).sum(), (x * merge_heads(y)).sum(), atol=1e-12)


def test_a_head_owns_neighbouring_columns_of_every_token():
    x = np.arange(2 * 3 * 6).reshape(2, 3, 6)
    heads = split_heads(x, 2)
    for b, h, n in itertools.product(range(2), range(2), range(3)):
        assert heads[b, h, n].tolist() == x[b, n, 3 * h : 3 * h + 3].tolist()


def test_split_moves_no_number_and_merge_copies():
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    assert np.shares_memory(split_heads(x, 4), x)
    heads = split_heads(x, 4)
    assert np.shares_memory(merge_heads(heads), x), "nothing was moved yet"
    heads = np.ascontiguousarray(heads)
    assert not np.shares_memory(merge_heads(heads), heads)


@given(sizes=st.tuples(LENGTHS, st.integers(1, 4), st.integers(1, 4), LENGTHS, LENGTHS))
def test_grouped_heads_equal_repeat_interleave(sizes):
    b, h_kv, group, n, d = sizes
    rng = np.random.default_rng(sum(sizes))
    k, drep = rng.normal(size=(b, h_kv, n, d)), rng.normal(size=(b, h_kv * group, n, d))
    leaf = tensor(k, requires_grad=True)
    want = leaf.repeat_interleave(group, dim=1)
    want.backward(tensor(drep))
    np.testing.assert_array_equal(grouped_kv_forward(k, h_kv * group), want.detach())
    agree(grouped_kv_backward(drep, h_kv), leaf.grad, 1e-14)


def test_a_query_head_reads_the_key_head_of_its_group():
    rep = grouped_kv_forward(np.arange(3.0).reshape(1, 3, 1, 1), 6)
    assert rep.ravel().tolist() == [0, 0, 1, 1, 2, 2], "a group is neighbouring heads"


# --- projections --------------------------------------------------------------------------------


@given(
    rows=st.lists(LENGTHS, max_size=3),
    widths=st.tuples(LENGTHS, LENGTHS),
    rng=generators(),
    data=st.data(),
)
def test_linear_equals_torch(rows, widths, rng, data):
    c_in, c_out = widths
    x = data.draw(strided(rng.normal(size=(*rows, c_in))))
    w = data.draw(strided(rng.normal(size=(c_in, c_out))))
    dy = data.draw(strided(rng.normal(size=(*rows, c_out))))
    b = rng.normal(size=c_out)
    leaves = [tensor(a, requires_grad=True) for a in (x, w, b)]
    want = F.linear(leaves[0], leaves[1].T, leaves[2])
    want.backward(tensor(dy))
    agree(linear_forward(x, w, b), want.detach())
    agree(linear_forward(x, w) + b, want.detach())
    for got, leaf in zip(linear_backward(dy, x, w), leaves, strict=True):
        agree(got, leaf.grad)


def test_linear_backward_equals_finite_differences():
    rng = np.random.default_rng(1)
    x, w, b, dy = (rng.normal(size=s) for s in ((2, 3, 4), (4, 5), (5,), (2, 3, 5)))
    dx, dw, db = linear_backward(dy, x, w)
    agree(dx, numerical_vjp(lambda x: linear_forward(x, w, b), x, dy), 1e-8)
    agree(dw, numerical_vjp(lambda w: linear_forward(x, w, b), w, dy), 1e-8)
    agree(db, numerical_vjp(lambda b: linear_forward(x, w, b), b, dy), 1e-8)


@given(
    sizes=st.tuples(LENGTHS, LENGTHS, LENGTHS, LENGTHS),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rng=generators(),
)
def test_fused_projections_give_the_numbers_of_separate_ones(sizes, heads, rng):
    b, n, c, d = sizes
    n_kv_heads, n_heads = heads[0], heads[0] * heads[1]
    p = parameters(rng, c, c, n_heads * d, n_kv_heads * d)
    x, w, bias = rng.normal(size=(b, n, c)), *fuse_qkv(*[p[n] for n in QKV])
    fused = qkv_forward(x, w, bias, n_heads, n_kv_heads)
    counts = (n_heads, n_kv_heads, n_kv_heads)
    for got, name, h in zip(fused, "qkv", counts, strict=True):
        want = split_heads(linear_forward(x, p[f"w{name}"], p[f"b{name}"]), h)
        agree(got, want, 1e-14, 1.0)
    d_heads = [rng.normal(size=a.shape) for a in fused]
    dx, dw, db = qkv_backward(*d_heads, x, w)
    parts = [
        linear_backward(merge_heads(g), x, p[f"w{n}"]) for g, n in zip(d_heads, "qkv", strict=True)
    ]
    agree(dx, sum(part[0] for part in parts), 1e-13, 1.0)
    agree(dw, np.concatenate([part[1] for part in parts], axis=1), 1e-13, 1.0)
    agree(db, np.concatenate([part[2] for part in parts]), 1e-13, 1.0)


def test_plain_heads_need_no_count_of_key_heads():
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 18))
    for got, want in zip(qkv_forward(x, w, None, 3), qkv_forward(x, w, None, 3, 3), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [96, 4096])
def test_a_bias_gradient_in_float32_keeps_its_digits_over_many_tokens(n):
    """NumPy adds rows one by one: equal float32 ones drift, by 3e-5 at 4096."""
    dy = np.tile(np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32), (n, 1))
    exact = dy.astype(float).sum(0)
    _, _, db = linear_backward(dy, np.ones((n, 1), np.float32), np.ones((1, 64), np.float32))
    assert db.dtype == np.float32
    agree(db, exact, 2.0**-24)
    assert largest(dy.sum(0) - exact) > 2.0**-22 * largest(exact)


# --- multi-head attention -------------------------------------------------------------------------


@given(problem=problems())
def test_self_attention_equals_autograd(problem):
    dout, x, _, params, n_heads, options = problem
    want, dx_want, _, grads_want = by_autograd(dout, x, None, params, n_heads, **options)
    out, cache = multihead_forward(x, **params, n_heads=n_heads, **options)
    agree(out, want)
    dx, grads = multihead_backward(dout, x, **params, n_heads=n_heads, **options)
    agree_by_name(grads | {"x": dx}, grads_want | {"x": dx_want})
    dx_cached, grads_cached = multihead_backward_cached(dout, cache)
    np.testing.assert_array_equal(dx_cached, dx)
    np.testing.assert_equal(grads_cached, grads)


@given(problem=problems(cross=True))
def test_cross_attention_equals_autograd(problem):
    dout, x, memory, params, n_heads, options = problem
    want, dx_want, dm_want, grads_want = by_autograd(dout, x, memory, params, n_heads, **options)
    out, cache = cross_attention_forward(x, memory, **params, n_heads=n_heads, **options)
    agree(out, want)
    got = cross_attention_backward(dout, x, memory, **params, n_heads=n_heads, **options)
    dx, dmemory, grads = got
    agree_by_name(
        grads | {"x": dx, "memory": dmemory}, grads_want | {"x": dx_want, "memory": dm_want}
    )
    np.testing.assert_equal(cross_attention_backward_cached(dout, cache), got)


@pytest.mark.parametrize("dims", list(itertools.permutations((2, 3, 5)))[:3])
def test_gradients_equal_finite_differences(dims):
    b, n, d = dims
    rng = np.random.default_rng(5)
    params = parameters(rng, 4, 3, 4 * d, 2 * d)
    x, memory = rng.normal(size=(b, n, 4)), rng.normal(size=(b, n + 1, 3))
    options = {
        "n_heads": 4,
        "n_kv_heads": 2,
        "mask": causal_mask(n, n + 1),
        "bias": rng.normal(size=(4, 1, n + 1)),
        "keep": dropout_keep(rng, (b, 4, n, n + 1), 0.2),
        "rate": 0.2,
    }
    dout = rng.normal(size=x.shape)
    inputs = {"x": x, "memory": memory, **params, "bias": options.pop("bias")}
    dx, dmemory, grads = cross_attention_backward(dout, **inputs, **options)
    for name, got in ({"x": dx, "memory": dmemory} | grads).items():

        def output(value, name=name):
            return cross_attention_forward(**inputs | {name: value}, **options)[0]

        sampled = inputs[name]
        if sampled.size > 12:
            # All of the large arrays would take a minute: along twelve directions.
            directions = rng.normal(size=(12, *sampled.shape))
            slopes = numerical_vjp(
                lambda t, to=directions, at=sampled, f=output: f(at + np.tensordot(t, to, 1)),
                np.zeros(12),
                dout,
            )
            agree(np.tensordot(directions, got, got.ndim), slopes, 1e-8, 1e-2)
        else:
            agree(got, numerical_vjp(output, sampled, dout), 1e-8, 1e-2)


def test_every_head_by_itself():
    """The definition, head by head, with no array of four axes."""
    rng = np.random.default_rng(6)
    x, p = rng.normal(size=(2, 5, 12)), parameters(rng, 12)
    out = multihead_forward(x, **p, n_heads=3)[0]
    for b in range(2):
        heads = []
        for h in range(3):
            own = slice(4 * h, 4 * h + 4)
            q, k, v = (x[b] @ p[f"w{n}"][:, own] + p[f"b{n}"][own] for n in "qkv")
            weights = np.exp(q @ k.T / 2)
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        agree(out[b], np.concatenate(heads, axis=1) @ p["wo"] + p["bo"])


@given(rng=generators(), heads=st.permutations(range(3)))
def test_order_of_the_heads_does_not_matter(rng, heads):
    x, p = rng.normal(size=(2, 5, 12)), parameters(rng, 12)
    columns = np.concatenate([np.arange(4) + 4 * h for h in heads])
    q = {n: p[n][..., columns] for n in ("wq", "wk", "wv", "bq", "bk", "bv")}
    permuted = p | q | {"wo": p["wo"][columns]}
    agree(
        multihead_forward(x, **permuted, n_heads=3)[0],
        multihead_forward(x, **p, n_heads=3)[0],
        1e-13,
    )


@given(problem=problems(cross=True))
def test_no_gradient_by_the_bias_of_the_keys(problem):
    """It moves all logits of a row alike, and softmax forgets it."""
    dout, x, memory, params, n_heads, options = problem
    params["bk"] = np.random.default_rng(0).normal(size=params["wk"].shape[1])
    _, _, grads = cross_attention_backward(dout, x, memory, **params, n_heads=n_heads, **options)
    assert largest(grads["bk"]) <= 1e-12 * max(1, largest(grads["wk"]))
    moved = params | {"bk": params["bk"] + 3}
    agree(
        cross_attention_forward(x, memory, **moved, n_heads=n_heads, **options)[0],
        cross_attention_forward(x, memory, **params, n_heads=n_heads, **options)[0],
        1e-12,
    )


def test_the_cached_backward_computes_nothing_again(monkeypatch):
    rng = np.random.default_rng(7)
    x, p = rng.normal(size=(2, 5, 12)), parameters(rng, 12)
    _, cache = multihead_forward(x, **p, n_heads=3)
    want = multihead_backward(x, x, **p, n_heads=3)

    def again(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(library, "attention_forward", again)
    monkeypatch.setattr(library, "linear_forward", again)
    np.testing.assert_equal(multihead_backward_cached(x, cache), want)


def test_the_cache_holds_what_its_documentation_says():
    rng = np.random.default_rng(7)
    x, memory = rng.normal(size=(2, 5, 12)), rng.normal(size=(2, 4, 7))
    p = parameters(rng, 12, 7, 18, 9)
    _, cache = cross_attention_forward(x, memory, **p, n_heads=6, n_kv_heads=3)
    shapes = {n: np.shape(a) for n, a in cache._asdict().items() if isinstance(a, np.ndarray)}
    assert shapes == {
        "x": (2, 5, 12),
        "memory": (2, 4, 7),
        "q": (2, 6, 5, 3),
        "k": (2, 3, 4, 3),
        "v": (2, 3, 4, 3),
        "probs": (2, 6, 5, 4),
        "merged": (2, 5, 18),
    }
    assert list(cache.params) == list(NAMES)
    for field in cache._fields:
        assert field in library.MultiheadCache.__doc__
    agree(cache.probs.sum(-1), np.ones((2, 6, 5)))
    agree(
        cache.merged @ p["wo"] + p["bo"],
        cross_attention_forward(x, memory, **p, n_heads=6, n_kv_heads=3)[0],
    )


def test_key_heads_are_cached_once_not_once_a_query_head():
    """Multi-query attention stores one head of keys, whatever the number of query heads."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(1, 50, 16))
    _, cache = multihead_forward(x, **parameters(rng, 16, 16, 16, 2), n_heads=8, n_kv_heads=1)
    assert cache.k.size == cache.v.size == cache.q.size // 8


def test_biases_may_be_none():
    rng = np.random.default_rng(8)
    x, p = rng.normal(size=(2, 5, 12)), parameters(rng, 12)
    zeros = {n: np.zeros_like(p[n]) for n in library.BIASES}
    none = dict.fromkeys(library.BIASES)
    agree(
        multihead_forward(x, **p | none, n_heads=3)[0],
        multihead_forward(x, **p | zeros, n_heads=3)[0],
        1e-15,
    )
    _, grads = multihead_backward(x, x, **p | none, n_heads=3)
    assert set(grads) == set(library.WEIGHTS)


def test_self_attention_is_cross_attention_to_itself():
    rng = np.random.default_rng(9)
    x, p = rng.normal(size=(2, 5, 12)), parameters(rng, 12)
    dx, grads = multihead_backward(x, x, **p, n_heads=3)
    dx_cross, dmemory, grads_cross = cross_attention_backward(x, x, x, **p, n_heads=3)
    np.testing.assert_array_equal(dx, dx_cross + dmemory)
    np.testing.assert_equal(grads, grads_cross)


# --- torch's module -----------------------------------------------------------------------------


def torch_module(params, n_heads):
    c, m = params["wq"].shape[1], params["wk"].shape[0]
    options = {"kdim": m, "vdim": m} if m != c else {}
    biased = params["bq"] is not None
    module = nn.MultiheadAttention(
        c, n_heads, bias=biased, batch_first=True, dtype=torch.float64, **options
    )
    module.load_state_dict({n: tensor(a) for n, a in to_torch_mha(params).items()})
    return module


def torch_gradients(module):
    return from_torch_mha({n: p.grad for n, p in module.named_parameters()})


def through_module(dout, x, memory, params, n_heads, **masks):
    module = torch_module(params, n_heads)
    x = tensor(x, requires_grad=True)
    memory = x if memory is None else tensor(memory, requires_grad=True)
    out, probs = module(x, memory, memory, average_attn_weights=False, **masks)
    out.backward(tensor(dout))
    grads = {n: g for n, g in torch_gradients(module).items() if g is not None}
    grads |= {"x": x.grad.numpy(), "memory": memory.grad.numpy()}
    return out.detach().numpy(), probs.detach().numpy(), grads


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("m", [12, 7])
def test_equals_nn_multihead_attention(m, biased):
    rng = np.random.default_rng(3)
    x, memory = rng.normal(size=(2, 5, 12)), rng.normal(size=(2, 4, m))
    params, dout = parameters(rng, 12, m), rng.normal(size=x.shape)
    params |= {} if biased else dict.fromkeys(library.BIASES)
    want, probs, grads_want = through_module(dout, x, memory, params, 3)
    out, cache = cross_attention_forward(x, memory, **params, n_heads=3)
    agree(out, want)
    agree(cache.probs, probs)
    dx, dmemory, grads = cross_attention_backward(dout, x, memory, **params, n_heads=3)
    agree_by_name(grads | {"x": dx, "memory": dmemory}, grads_want)


def test_masks_of_nn_multihead_attention_are_the_opposite_of_ours():
    rng = np.random.default_rng(4)
    x, params = rng.normal(size=(3, 5, 12)), parameters(rng, 12)
    dout = rng.normal(size=x.shape)
    ours = padding_mask(np.array([5, 2, 4]), 5)
    causal = causal_mask(5, 5)
    want, probs, grads_want = through_module(
        dout,
        x,
        None,
        params,
        3,
        key_padding_mask=tensor(~ours[:, 0, 0]),
        attn_mask=tensor(~causal),
    )
    both = ours & causal
    out, cache = multihead_forward(x, **params, n_heads=3, mask=both)
    agree(out, want)
    agree(cache.probs, probs)
    dx, grads = multihead_backward(dout, x, **params, n_heads=3, mask=both)
    grads_want.pop("memory")
    agree_by_name(grads | {"x": dx}, grads_want)
    assert largest(multihead_forward(x, **params, n_heads=3, mask=~both)[0] - want) > 0.1


def test_an_additive_mask_of_nn_multihead_attention_is_a_bias():
    rng = np.random.default_rng(4)
    x, params, bias = rng.normal(size=(2, 5, 12)), parameters(rng, 12), rng.normal(size=(5, 5))
    bias[~causal_mask(5, 5)] = -INF
    want, _, grads_want = through_module(x, x, None, params, 3, attn_mask=tensor(bias))
    agree(multihead_forward(x, **params, n_heads=3, bias=bias)[0], want)
    dx, grads = multihead_backward(x, x, **params, n_heads=3, bias=bias)
    assert grads.pop("bias").shape == (5, 5)
    grads_want.pop("memory")
    agree_by_name(grads | {"x": dx}, grads_want)


@given(rng=generators(), sizes=st.tuples(LENGTHS, LENGTHS), biased=st.booleans())
def test_parameters_go_to_torch_and_back(rng, sizes, biased):
    c, m = sizes
    params = parameters(rng, c, m)
    params |= {} if biased else dict.fromkeys(library.BIASES)
    back = from_torch_mha(to_torch_mha(params))
    np.testing.assert_equal(back, params)
    for name, value in back.items():
        assert value is None or not np.shares_memory(value, params[name])


def test_parameters_from_a_module_are_copies():
    module = nn.MultiheadAttention(6, 2)
    ours = from_torch_mha(module.state_dict())
    before = ours["wo"].copy()
    with torch.no_grad():
        module.out_proj.weight.zero_()
    np.testing.assert_array_equal(ours["wo"], before)
    assert ours["wq"].dtype == np.float32


# --- single precision ---------------------------------------------------------------------------

ADVERSARIAL = ["random", "logits of 80", "one key dominating", "all equal"]


def adversarial(kind, rng):
    """x and parameters whose logits are of this kind, in float32."""
    params = parameters(rng, 16)
    x = rng.normal(size=(4, 24, 16))
    if kind == "logits of 80":
        params["wq"] *= 20
    if kind == "one key dominating":
        x[:, 5] *= 30
    if kind == "all equal":
        x[:] = x[:, :1]
    single = {n: a.astype(np.float32) for n, a in params.items()}
    return x.astype(np.float32), single


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_float32_error_is_within_twice_torchs(kind):
    """Against float64 on the same numbers, plus one rounding of the largest entry.

    A single draw compares two random roundings; the root mean square over eight compares methods.
    """
    ours, theirs, floor = {}, {}, {}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, params = adversarial(kind, rng)
        dout = rng.normal(size=x.shape).astype(np.float32)
        wide = {n: a.astype(float) for n, a in params.items()}
        exact_dx, exact = multihead_backward(dout.astype(float), x.astype(float), **wide, n_heads=4)
        exact |= {"x": exact_dx}
        exact["out"], cache = multihead_forward(x.astype(float), **wide, n_heads=4)
        if kind == "logits of 80":
            logits = cache.q @ cache.k.swapaxes(-1, -2) / 2
            assert 60 < largest(logits) < 400
        dx, got = multihead_backward(dout, x, **params, n_heads=4)
        got |= {"x": dx, "out": multihead_forward(x, **params, n_heads=4)[0]}
        out, dx, _, want = by_autograd(dout, x, None, params, 4)
        want |= {"x": dx, "out": out}
        for name in exact:
            assert got[name].dtype == want[name].dtype == np.float32
            for errors, values in ((ours, got), (theirs, want)):
                errors.setdefault(name, []).append(largest(values[name] - exact[name]))
            floor.setdefault(name, []).append(largest(exact[name]) * 2.0**-24)
    for name in ours:
        limit = 2 * rms(theirs[name]) + rms(floor[name])
        assert rms(ours[name]) <= limit, name


def rms(values):
    return float(np.mean(np.square(values)) ** 0.5)


@given(problem=problems(cross=True), data=st.data())
def test_memory_layout_and_dtype_do_not_matter(problem, data):
    dout, x, memory, params, n_heads, options = problem
    plain_values = cross_attention_backward(dout, x, memory, **params, n_heads=n_heads, **options)
    name = data.draw(st.sampled_from(["wq", "wk", "wv", "wo"]))
    laid = params | {name: data.draw(strided(params[name]))}
    dout, x, memory = (data.draw(strided(a)) for a in (dout, x, memory))
    other = cross_attention_backward(dout, x, memory, **laid, n_heads=n_heads, **options)
    agree_by_name(
        other[2] | {"x": other[0], "memory": other[1]},
        plain_values[2] | {"x": plain_values[0], "memory": plain_values[1]},
        1e-12,
    )
    single = {n: a if a is None else a.astype(np.float32) for n, a in params.items()}
    if "bias" in options:
        options["bias"] = options["bias"].astype(np.float32)
    dout, x, memory = (a.astype(np.float32) for a in (dout, x, memory))
    dx, dmemory, grads = cross_attention_backward(
        dout, x, memory, **single, n_heads=n_heads, **options
    )
    assert {a.dtype for a in (dx, dmemory, *grads.values())} == {np.dtype(np.float32)}


# --- masks and what hides behind them -------------------------------------------------------------


def test_a_fully_masked_row_gives_the_output_bias_and_no_gradient():
    rng = np.random.default_rng(10)
    x, p = rng.normal(size=(2, 4, 6)), parameters(rng, 6)
    mask = np.ones((2, 1, 4, 4), bool)
    mask[1, :, 2] = False
    dout = rng.normal(size=x.shape)
    out, _ = multihead_forward(x, **p, n_heads=2, mask=mask)
    agree(out[1, 2], p["bo"], 1e-15)
    unmasked = multihead_forward(x, **p, n_heads=2)[0]
    np.testing.assert_array_equal(np.delete(out[1], 2, 0), np.delete(unmasked[1], 2, 0))
    # As if nothing had come from above there, but for bo.
    dx, grads = multihead_backward(dout, x, **p, n_heads=2, mask=mask)
    silent = dout.copy()
    silent[1, 2] = 0
    dx_silent, grads_silent = multihead_backward(silent, x, **p, n_heads=2)
    agree_by_name(
        {n: g for n, g in grads.items() if n != "bo"} | {"x": dx},
        {n: g for n, g in grads_silent.items() if n != "bo"} | {"x": dx_silent},
        1e-13,
    )


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
def test_padding_of_the_memory_may_hold_anything(bad):
    rng = np.random.default_rng(11)
    x, memory, p = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 5, 6)), parameters(rng, 6)
    mask, dout = padding_mask(np.array([5, 2]), 5), rng.normal(size=x.shape)
    spoiled = memory.copy()
    spoiled[1, 2:] = bad
    arguments = {**p, "n_heads": 2, "mask": mask}
    want = cross_attention_backward(dout, x, memory, **arguments)
    got = cross_attention_backward(dout, x, spoiled, **arguments)
    np.testing.assert_allclose(
        cross_attention_forward(x, spoiled, **arguments)[0],
        cross_attention_forward(x, memory, **arguments)[0],
        rtol=1e-13,
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-11)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-11)
    assert (got[1][1, 2:] == 0).all()
    agree_by_name(got[2], want[2], 1e-12)


@pytest.mark.parametrize("bad", [np.nan, INF])
def test_padding_of_self_attention_may_hold_anything_where_it_neither_asks_nor_answers(bad):
    rng = np.random.default_rng(12)
    x, p = rng.normal(size=(2, 5, 6)), parameters(rng, 6)
    keys = padding_mask(np.array([5, 2]), 5)
    mask = keys & keys.swapaxes(-1, -2)
    dout = rng.normal(size=x.shape)
    dout[1, 2:] = 0
    spoiled = x.copy()
    spoiled[1, 2:] = bad
    got = multihead_backward(dout, spoiled, **p, n_heads=2, mask=mask)
    want = multihead_backward(dout, x, **p, n_heads=2, mask=mask)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-11)
    assert (got[0][1, 2:] == 0).all()
    agree_by_name(got[1], want[1], 1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 0, 6), (0, 0, 6), (1, 1, 6)])
def test_lengths_of_zero_and_one(shape):
    rng = np.random.default_rng(13)
    x, p = rng.normal(size=shape), parameters(rng, 6)
    out, _ = multihead_forward(x, **p, n_heads=2)
    dx, grads = multihead_backward(x, x, **p, n_heads=2)
    assert out.shape == dx.shape == shape
    assert {n: g.shape for n, g in grads.items()} == {n: a.shape for n, a in p.items()}
    if x.size == 0:
        assert not any(g.any() for g in grads.values())
    else:
        v = x @ p["wv"] + p["bv"]
        agree(out, v @ p["wo"] + p["bo"], 1e-13)


def test_without_memory_the_output_is_its_bias():
    rng = np.random.default_rng(13)
    x, p = rng.normal(size=(2, 3, 6)), parameters(rng, 6)
    out, cache = cross_attention_forward(x, np.zeros((2, 0, 6)), **p, n_heads=2)
    agree(out, np.broadcast_to(p["bo"], x.shape), 1e-15)
    dx, dmemory, grads = cross_attention_backward_cached(x, cache)
    assert not dx.any()
    assert dmemory.shape == (2, 0, 6)
    agree(grads["bo"], x.sum((0, 1)))
    assert not any(g.any() for n, g in grads.items() if n != "bo")


# --- failures of public code ----------------------------------------------------------------------


def test_levanter_449_gradients_of_a_group_are_summed():
    """One key head for all query heads: its gradient is that of as many separate copies, added."""
    rng = np.random.default_rng(14)
    x, p, dout = rng.normal(size=(2, 5, 8)), parameters(rng, 8, 8, 8, 2), rng.normal(size=(2, 5, 8))
    _, grads = multihead_backward(dout, x, **p, n_heads=4, n_kv_heads=1)
    copies = p | {n: np.concatenate([p[n]] * 4, axis=-1) for n in ("wk", "wv", "bk", "bv")}
    _, apart = multihead_backward(dout, x, **copies, n_heads=4)
    agree(grads["wk"], sum(np.split(apart["wk"], 4, axis=1)), 1e-13)
    agree(grads["wv"], sum(np.split(apart["wv"], 4, axis=1)), 1e-13)
    agree(grads["bv"], sum(np.split(apart["bv"], 4)), 1e-13)
    assert largest(grads["wk"] - np.split(apart["wk"], 4, axis=1)[-1]) > 0.1


@pytest.mark.parametrize("heads", [(6, 2), (6, 3), (4, 2), (4, 4), (4, 1)])
def test_native_sparse_attention_27_every_query_head_finds_its_key_head(heads):
    """Divided by the wrong count, only square ratios such as 4 heads on 2 come out right."""
    n_heads, n_kv_heads = heads
    k = np.arange(float(n_kv_heads)).reshape(1, n_kv_heads, 1, 1)
    group = n_heads // n_kv_heads
    assert grouped_kv_forward(k, n_heads).ravel().tolist() == [h // group for h in range(n_heads)]
    back = grouped_kv_backward(np.ones((1, n_heads, 1, 1)), n_kv_heads)
    assert back.ravel().tolist() == [group] * n_kv_heads


def test_veomni_162_repeats_heads_and_not_tokens():
    k = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    rep = grouped_kv_forward(k, 6)
    assert rep.shape == (2, 6, 5, 4)
    np.testing.assert_array_equal(rep[:, 1], k[:, 0])
    np.testing.assert_array_equal(rep[:, 5], k[:, 2])


@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_dl4proteins_12_scale_by_the_width_of_a_head(n_heads):
    """1/√C is right only with one head; 1/√H (tt-metal#56789) and 1/√N nowhere."""
    rng = np.random.default_rng(15)
    x, p = rng.normal(size=(1, 2, 8)), parameters(rng, 8)
    _, cache = multihead_forward(x, **p, n_heads=n_heads)
    dots = cache.q @ cache.k.swapaxes(-1, -2)
    # Two keys: the log of the odds is the difference of the logits.
    odds = np.log(cache.probs[..., 0] / cache.probs[..., 1])
    agree(odds, (dots[..., 0] - dots[..., 1]) / (8 / n_heads) ** 0.5, 1e-12)


def test_aidotnet_tensors_234_bias_gradient_over_batch_and_tokens():
    dy = np.random.default_rng(16).normal(size=(3, 4, 5))
    _, _, db = linear_backward(dy, np.ones((3, 4, 2)), np.ones((2, 5)))
    assert db.shape == (5,)
    agree(db, dy.reshape(12, 5).sum(0), 1e-14)


def test_fuxictr_30_a_token_stays_in_its_row():
    """view(B * H, N, d) without a transpose hands a head other tokens' columns."""
    rng = np.random.default_rng(17)
    x, p = rng.normal(size=(2, 6, 8)), parameters(rng, 8)
    out = multihead_forward(x, **p, n_heads=4)[0]
    order = rng.permutation(6)
    agree(multihead_forward(x[:, order], **p, n_heads=4)[0], out[:, order], 1e-12)
    assert largest(split_heads(x, 4) - x.reshape(2, 4, 6, 2)) > 0.1


def test_transformer_from_scratch_4_heads_are_merged_token_by_token():
    """A reshape without its transpose keeps the shape; copy tasks train all the same."""
    rng = np.random.default_rng(17)
    x, p = rng.normal(size=(1, 6, 8)), parameters(rng, 8)
    out = multihead_forward(x, **p, n_heads=4, mask=causal_mask(6, 6))[0]
    later = x.copy()
    later[:, 3:] += 1
    changed = multihead_forward(later, **p, n_heads=4, mask=causal_mask(6, 6))[0]
    np.testing.assert_array_equal(changed[:, :3], out[:, :3])
    assert largest(changed[:, 3:] - out[:, 3:]) > 0.1


def test_attention_keras_36_a_mask_stays_with_its_sentence():
    """Heads before the batch, and the mask repeated the other way: sentences swap masks."""
    rng = np.random.default_rng(18)
    x, p = rng.normal(size=(3, 5, 8)), parameters(rng, 8)
    mask = padding_mask(np.array([1, 3, 5]), 5)
    together = multihead_forward(x, **p, n_heads=4, mask=mask)[0]
    for b, n in enumerate((1, 3, 5)):
        alone = cross_attention_forward(x[b : b + 1], x[b : b + 1, :n], **p, n_heads=4)[0]
        agree(together[b : b + 1], alone, 1e-13)


def test_pytorch_41508_a_fully_padded_sentence_is_no_nan():
    rng = np.random.default_rng(19)
    x, p = rng.normal(size=(2, 3, 6)), parameters(rng, 6)
    mask = padding_mask(np.array([3, 0]), 3)
    module = torch_module(p, 2)
    theirs, _ = module(*[tensor(x)] * 3, key_padding_mask=tensor(~mask[:, 0, 0]))
    assert torch.isnan(theirs[1]).all(), "torch does"
    out, cache = multihead_forward(x, **p, n_heads=2, mask=mask)
    agree(out[0], theirs[0].detach())
    assert np.isfinite(out).all()
    dx, grads = multihead_backward_cached(x, cache)
    assert np.isfinite(dx).all()
    assert all(np.isfinite(g).all() for g in grads.values())


# --- inputs and errors --------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)
    x, memory = rng.normal(size=(2, 3, 4)).astype(dtype), rng.normal(size=(2, 5, 6)).astype(dtype)
    heads = rng.normal(size=(2, 2, 3, 2)).astype(dtype)
    own = {n: a.astype(dtype) for n, a in parameters(rng, 4).items()}
    other = {n: a.astype(dtype) for n, a in parameters(rng, 4, 6).items()}
    fused = fuse_qkv(*[own[n] for n in QKV])
    _, cache = multihead_forward(x, *own.values(), 2)
    _, cross_cache = cross_attention_forward(x, memory, *other.values(), 2)
    return {
        split_heads: (x, 2),
        merge_heads: (heads,),
        grouped_kv_forward: (heads, 4),
        grouped_kv_backward: (heads, 1),
        linear_forward: (x, own["wq"], own["bq"]),
        linear_backward: (x, x, own["wq"]),
        fuse_qkv: tuple(own[n] for n in QKV),
        qkv_forward: (x, *fused, 2),
        qkv_backward: (heads, heads, heads, x, fused[0]),
        cross_attention_forward: (x, memory, *other.values(), 2),
        cross_attention_backward_cached: (x, cross_cache),
        cross_attention_backward: (x, x, memory, *other.values(), 2),
        multihead_forward: (x, *own.values(), 2),
        multihead_backward_cached: (x, cache),
        multihead_backward: (x, x, *own.values(), 2),
        to_torch_mha: (own,),
        from_torch_mha: (to_torch_mha(own),),
    }


def arrays(value):
    """Every array in nested tuples and dicts, but those in a cache."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from arrays(part)
    elif isinstance(value, tuple) and not isinstance(value, library.MultiheadCache):
        for part in value:
            yield from arrays(part)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", calls())
def test_inputs_may_be_read_only_are_not_returned_and_keep_their_dtype(function, dtype):
    arguments = calls(dtype)[function]
    for a in arrays(arguments):
        a.flags.writeable = False
    results = list(arrays(function(*arguments)))
    assert results
    for result in results:
        assert result.dtype == dtype
        shared = any(np.shares_memory(result, a) for a in arrays(arguments))
        assert shared == (function is split_heads), "splitting heads is a view, nothing else"


@pytest.mark.parametrize("function", [split_heads, merge_heads, linear_forward, linear_backward])
def test_integers_become_float64(function):
    whole = tuple(
        np.round(9 * a).astype(int) if isinstance(a, np.ndarray) else a for a in calls()[function]
    )
    floats = tuple(a.astype(float) if isinstance(a, np.ndarray) else a for a in whole)
    for got, want in zip(arrays((function(*whole),)), arrays((function(*floats),)), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    with np.errstate(all="raise"):
        loud = function(*arguments)
        assert np.geterr()["over"] == "raise", "the caller's settings come back"
    for got, want in zip(arrays((loud,)), arrays((quiet,)), strict=True):
        np.testing.assert_array_equal(got, want)


def changed(**changes):
    """Arguments of cross-attention, x (2, 3, 4) and memory (2, 5, 6), one of them changed."""
    rng = np.random.default_rng(1)
    arguments = {"x": np.ones((2, 3, 4)), "memory": np.ones((2, 5, 6)), **parameters(rng, 4, 6)}
    return arguments | {"n_heads": 2} | changes


BAD = [
    (split_heads, (np.zeros((2, 3, 4)), 3), r"n_heads: expected a divisor of C = 4, x \(2, 3, 4\)"),
    (split_heads, (np.zeros((2, 3, 4)), 0), "n_heads: expected at least 1; got 0"),
    (split_heads, (np.zeros((2, 3, 4)), 2.0), "n_heads: expected an integer; got 2.0"),
    (split_heads, (np.zeros((3, 4)), 2), r"x: expected shape \(B, N, C\); got \(3, 4\)"),
    (split_heads, (np.zeros((2, 3, 4), complex), 2), "x: expected real numbers; got dtype complex"),
    (merge_heads, (np.zeros((2, 3, 4)),), r"x: expected shape \(B, H, N, d\); got \(2, 3, 4\)"),
    (grouped_kv_forward, (np.zeros((2, 3, 4, 5)), 4), r"n_heads: expected a multiple of H_kv = 3"),
    (grouped_kv_forward, (np.zeros((2, 0, 4, 5)), 4), r"n_heads: .* H_kv = 0, k \(2, 0, 4, 5\)"),
    (grouped_kv_forward, (np.zeros((2, 3, 4)), 4), r"k: expected shape \(B, H_kv, N, d\); got"),
    (grouped_kv_backward, (np.zeros((2, 6, 4, 5)), 4), r"n_kv_heads: .* H = 6, dk_rep .*; got 4"),
    (grouped_kv_backward, (np.zeros((2, 6, 4)), 2), r"dk_rep: expected shape \(B, H, N, d\); got"),
    (linear_forward, (np.zeros((2, 3)), np.zeros((4, 5))), r"x: .*\(2, 4\) to match w \(4, 5\)"),
    (linear_forward, (np.zeros(()), np.zeros((4, 5))), r"x: expected shape \(4,\) .* got \(\)"),
    (linear_forward, (np.zeros((2, 4)), np.zeros(4)), r"w: expected shape \(C_in, C_out\); got"),
    (linear_forward, (np.zeros((2, 4)), np.zeros((4, 5)), np.zeros(4)), r"b: .*\(5,\) to match w"),
    (linear_backward, (np.zeros((2, 5)), np.zeros((3, 4)), np.zeros((4, 5))), r"dy: .*\(3, 5\) to"),
    (fuse_qkv, (np.zeros((4, 6)), *[np.zeros((5, 6))] * 2, *[np.zeros(6)] * 3), r"wk: .*\(4, E_kv"),
    (
        fuse_qkv,
        (*[np.zeros((4, 6))] * 3, np.zeros(6), np.zeros(5), np.zeros(6)),
        r"bk: .*\(6,\) to",
    ),
    (qkv_forward, (np.zeros((2, 3, 4)), np.zeros((4, 10)), None, 3), r"w_qkv: .* H \+ 2 H_kv = 9"),
    (
        qkv_forward,
        (np.zeros((2, 3, 4)), np.zeros((4, 9)), None, 3, 2),
        "n_kv_heads: .* n_heads = 3",
    ),
    (
        qkv_backward,
        (
            *[np.zeros((2, 2, 3, 2))] * 2,
            np.zeros((2, 1, 3, 2)),
            np.zeros((2, 3, 4)),
            np.ones((4, 10)),
        ),
        r"dv: expected shape \(2, 2, 3, 2\) to match dk",
    ),
    (cross_attention_forward, changed(x=np.ones((3, 4))), r"x: expected shape \(B, Nq, C\); got"),
    (
        cross_attention_forward,
        changed(memory=np.ones((3, 5, 6))),
        r"memory: .*\(2, Nk, M\) to match",
    ),
    (
        cross_attention_forward,
        changed(wq=np.ones((5, 4))),
        r"wq: expected shape \(4, E\) to match x",
    ),
    (
        cross_attention_forward,
        changed(wq=np.ones((4, 5))),
        r"wq: .* n_heads = 2; got shape \(4, 5\)",
    ),
    (
        cross_attention_forward,
        changed(wq=np.ones((4, 0))),
        r"wq: .* n_heads = 2; got shape \(4, 0\)",
    ),
    (
        cross_attention_forward,
        changed(wk=np.ones((4, 4))),
        r"wk: expected shape \(6, 4\) to match memory \(2, 5, 6\) and 2 heads of width 2; got",
    ),
    (cross_attention_forward, changed(n_kv_heads=1), r"wk: .*\(6, 2\) .* 1 heads of width 2; got"),
    (
        cross_attention_forward,
        changed(n_kv_heads=3),
        "n_kv_heads: .* divisor of n_heads = 2; got 3",
    ),
    (
        cross_attention_forward,
        changed(wo=np.ones((4, 5))),
        r"wo: expected shape \(4, 4\); got \(4, 5",
    ),
    (cross_attention_forward, changed(bv=np.ones(5)), r"bv: expected shape \(4,\); got \(5,\)"),
    (cross_attention_forward, changed(wv=None), "wv: expected real numbers; got dtype object"),
    (cross_attention_forward, changed(n_heads=True + 0.5), "n_heads: expected an integer; got 1.5"),
    (cross_attention_forward, changed(mask=np.ones((4, 5), bool)), r"mask: .*\(2, 2, 3, 5\); got"),
    (cross_attention_forward, changed(mask=np.ones((3, 5))), "mask: expected booleans; got dtype"),
    (cross_attention_forward, changed(bias=np.ones((3, 3))), r"bias: .* got \(3, 3\)"),
    (cross_attention_forward, changed(rate=0.5), "keep: expected the mask that rate=0.5 drew"),
    (cross_attention_backward, changed(dout=np.ones((2, 3, 5))), r"dout: .*\(2, 3, 4\) to match"),
    (to_torch_mha, ({"wq": np.ones((2, 2))},), "params: expected wq, wk, .*; got wq"),
    (
        to_torch_mha,
        (parameters(np.random.default_rng(0), 4, 4, 4, 2),),
        r"wq: expected shape \(2, 2\) for nn.MultiheadAttention",
    ),
    (
        to_torch_mha,
        (parameters(np.random.default_rng(0), 4) | {"bk": None},),
        "bk: expected all biases or none; got None beside others",
    ),
    (from_torch_mha, ({"in_proj_weight": np.ones((6, 2))},), "state: expected in_proj_weight, out"),
    (
        from_torch_mha,
        ({"in_proj_weight": np.ones((6, 3)), "out_proj.weight": np.ones((2, 2))},),
        r"in_proj_weight: expected shape \(6, 2\)",
    ),
    (
        from_torch_mha,
        (
            to_torch_mha(parameters(np.random.default_rng(0), 4))
            | {"bias_k": np.ones((1, 1, 4)), "bias_v": np.ones((1, 1, 4))},
        ),
        "state: .*; got .*bias_k, bias_v",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    named = isinstance(arguments, dict)
    call = partial(function, **arguments) if named else partial(function, *arguments)
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        linear_backward(np.zeros((2, 5)), np.zeros((3, 4)), np.zeros((4, 5)))
    with pytest.raises(jaxtyping.TypeCheckError):
        cross_attention_forward(**changed(wo=np.ones((4, 5))))
    with pytest.raises(jaxtyping.TypeCheckError):
        library._cached(*[np.zeros((2, 3))] * 8, None, None, 0.0)


@pytest.mark.parametrize("function", calls())
def test_every_function_states_equation_shapes_and_errors(function):
    doc = inspect.getdoc(function)
    assert ".. math::" in doc
    assert "Shapes:" in doc
    assert "ValueError:" in doc
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_everything_public_is_tried_here():
    public = {
        f
        for n, f in vars(library).items()
        if inspect.isfunction(f) and f.__module__ == library.__name__ and not n.startswith("_")
    }
    assert public == set(calls())
