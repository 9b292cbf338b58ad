"""Heads, projections and multi-head attention against torch, finite differences and loops."""

import numpy as np
import pytest
import torch
from torch import nn

from attn_lessons import multihead as library
from attn_lessons.multihead import (
    cross_attention_backward,
    cross_attention_forward,
    from_torch_mha,
    multihead_backward,
    multihead_forward,
    to_torch_mha,
)

EXACT = 1e-10
NAMES = library.WEIGHTS + library.BIASES


def agree(got, want, rtol=EXACT, scale=0.0):
    """An error of at most ``rtol`` of the largest entry wanted, or of ``scale``."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    error = np.abs(got - want).max(initial=0)
    scale = max(scale, np.abs(want).max(initial=0))
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def parameters(rng, c, m=None, e=None, e_kv=None):
    """Random weights and biases of multi-head attention, by name."""
    m, e = c if m is None else m, c if e is None else e
    e_kv = e if e_kv is None else e_kv
    shapes = ((c, e), (m, e_kv), (m, e_kv), (e, c), (e,), (e_kv,), (e_kv,), (c,))
    return {n: rng.normal(size=s) / s[0] ** 0.5 for n, s in zip(NAMES, shapes, strict=True)}


def torch_module(params, n_heads):
    c, m = params["wq"].shape[1], params["wk"].shape[0]
    options = {"kdim": m, "vdim": m} if m != c else {}
    module = nn.MultiheadAttention(
        c,
        n_heads,
        bias=params["bq"] is not None,
        batch_first=True,
        dtype=torch.float64,
        **options,
    )
    module.load_state_dict({n: tensor(a) for n, a in to_torch_mha(params).items()})
    return module


def torch_gradients(module):
    return from_torch_mha({n: p.grad for n, p in module.named_parameters()})


def agree_by_name(got, want, rtol=EXACT):
    """All gradients agree; bk's cancels to 0, so bq's says how large its terms are."""
    assert set(got) == set(want)
    for name in got:
        agree(got[name], want[name], rtol, largest(want["bq"]) if name == "bk" else 0.0)


def largest(x):
    return np.abs(x).max(initial=0)


@pytest.mark.parametrize("m", [12, 7])
def test_equals_nn_multihead_attention(m):
    rng = np.random.default_rng(3)
    x, memory = rng.normal(size=(2, 5, 12)), rng.normal(size=(2, 4, m))
    params, dout = parameters(rng, 12, m), rng.normal(size=x.shape)
    module = torch_module(params, 3)
    leaves = [tensor(a, requires_grad=True) for a in (x, memory)]
    want, probs = module(*leaves, leaves[1], average_attn_weights=False)
    want.backward(tensor(dout))
    out, cache = cross_attention_forward(x, memory, **params, n_heads=3)
    agree(out, want.detach())
    agree(cache.probs, probs.detach())
    dx, dmemory, grads = cross_attention_backward(dout, x, memory, **params, n_heads=3)
    agree(dx, leaves[0].grad)
    agree(dmemory, leaves[1].grad)
    agree_by_name(grads, torch_gradients(module))


def test_self_attention_equals_nn_multihead_attention():
    rng = np.random.default_rng(4)
    x, params = rng.normal(size=(2, 5, 12)), parameters(rng, 12)
    dout = rng.normal(size=x.shape)
    module, leaf = torch_module(params, 3), tensor(x, requires_grad=True)
    want, _ = module(leaf, leaf, leaf)
    want.backward(tensor(dout))
    agree(multihead_forward(x, **params, n_heads=3)[0], want.detach())
    dx, grads = multihead_backward(dout, x, **params, n_heads=3)
    agree(dx, leaf.grad)
    agree_by_name(grads, torch_gradients(module))
