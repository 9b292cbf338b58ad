"""Attention against torch, finite differences and loops; and the failures of public kernels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attn_lessons.attention import (
    attention_backward,
    attention_forward,
    causal_mask,
    padding_mask,
)


def test_quick():
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, 3, 4, 5)),
        rng.normal(size=(2, 3, 6, 5)),
        rng.normal(size=(2, 3, 6, 7)),
    )
    mask = causal_mask(4, 6) & padding_mask(np.array([6, 3]), 6)
    dout = rng.normal(size=(2, 3, 4, 7))
    t = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*t, attn_mask=torch.tensor(mask))
    want.backward(torch.tensor(dout))
    out, probs = attention_forward(q, k, v, mask)
    np.testing.assert_allclose(out, want.detach().numpy(), rtol=1e-12)
    for got, leaf in zip(attention_backward(dout, q, k, v, probs), t, strict=True):
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-10, atol=1e-13)
