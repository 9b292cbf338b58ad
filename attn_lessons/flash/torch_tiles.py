r"""Attention in tiles in torch, with a backward pass of its own: no Nq x Nk tensor, ever.

The algorithm and the conventions of numpy_tiles: grouped heads, ``causal`` aligned bottom-right,
``lengths``, rows that see no key. Here autograd knows it as one operation, so it may stand in a
model. float16 and bfloat16 are computed in float32 and rounded at the end; their log-sum-exp stays
float32, and so does the copy of the output that is kept for the backward pass. Exponentials are
powers of 2: the logits carry a factor of log2 e (torch's exp2 takes a third of exp's time). A
second derivative is not provided.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_lessons.flash.numpy_tiles import Tiles, checked

# Larger ones are no faster, and waste more along the diagonal of causal attention.
BLOCK = 320

INF = float("inf")
LOG2E, LN2 = math.log2(math.e), math.log(2)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    *,
    lengths: Any = None,
    return_lse: bool = False,
    block: int = BLOCK,
) -> Any:
    r"""Attention that keeps its output and one number a row for the backward pass.

    .. math:: \mathrm{out} = \operatorname{softmax}(q k^\top / \sqrt d)\, v,
              \qquad \mathrm{lse}_i = \log \sum_j e^{z_{ij}}

    Returns ``out``, with ``return_lse`` ``(out, lse)``. Gradients flow
    from both.

    Shapes: q ``(B, H, Nq, d)``, k ``(B, Hkv, Nk, d)``, v ``(B, Hkv, Nk,
    d_v)``, lengths ``(B,)``; out ``(B, H, Nq, d_v)``, lse ``(B, H, Nq)``.

    ValueError: shapes do not fit; Hkv does not divide H; dtypes or
    devices differ, or are no floating point; ``block`` is no positive
    integer; a length lies outside 0 … Nk.

    Source: Dao et al. 2022, algorithms 1 and 4; Dao 2023.
    """
    tiles = tiles_of(q, k, v, block, causal, lengths)
    out, lse = _FlashAttention.apply(q, k, v, tiles)
    return (out, lse) if return_lse else out


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        kept, lse2 = _forward(q, k, v, tiles)
        # The row sums of dout ∘ out cancel against single products, so out is kept unrounded:
        # from one rounded to bfloat16, dk of 3 queries over 799 keys was 3 times as far off.
        ctx.save_for_backward(q, k, v, kept, lse2)
        ctx.tiles = tiles
        ctx.set_materialize_grads(False)
        return kept.to(q.dtype), lse2 * LN2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, kept, lse2 = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(kept)
        return *_backward(dout, dlse, q, k, v, kept, lse2, ctx.tiles), None


# --- the two passes ---------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The output, not rounded yet, and the log-sum-exp in powers of 2."""
    wide = _wide(q.dtype)
    out = q.new_empty((*q.shape[:3], v.shape[-1]), dtype=wide)
    lse2 = q.new_empty(q.shape[:3], dtype=wide)
    for head, kv in tiles.heads():
        for rows in tiles.blocks_of_queries():
            q_i = q[head][rows].to(wide) * (_scale(q) * LOG2E)
            m = q_i.new_full((len(q_i), 1), -INF)
            total, o = torch.zeros_like(m), q_i.new_zeros(len(q_i), v.shape[-1])
            for keys, diagonal in tiles.diagonals(head[0], rows):
                z = _logits(q_i, k[kv][keys].to(wide), diagonal)
                m_old, m = m, torch.maximum(m, z.amax(-1, keepdim=True))
                p = _weights(z, m, diagonal)
                # What came before was measured from the old maximum.
                factor = torch.exp2(m_old - _guarded(m, 0))
                total = factor * total + p.sum(-1, keepdim=True)
                o = _add_product(o.mul_(factor), p, v[kv][keys].to(wide), diagonal)
            # A row that saw no key has total 0.
            out[head][rows] = o / torch.where(total == 0, 1, total)
            # m = inf: the total is NaN, the limit of the logarithm is not.
            lse2[head][rows] = torch.where(m == INF, m, m + total.log2())[:, 0]
    return out, lse2


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse2: Tensor,
    tiles: Tiles,
) -> tuple[Tensor, ...]:
    wide = _wide(q.dtype)
    # Keys that no query sees keep these zeros, and so do such queries.
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for head, kv in tiles.heads():
        for rows in tiles.blocks_of_queries():
            q_i = q[head][rows].to(wide) * (_scale(q) * LOG2E)
            dout_i = dout[head][rows].to(wide)
            delta_i = (dout_i * out[head][rows]).sum(-1, keepdim=True)
            if dlse is not None:
                delta_i -= dlse[head][rows, None]
            lse2_i = lse2[head][rows, None]
            for keys, diagonal in tiles.diagonals(head[0], rows):
                k_j, v_j = k[kv][keys].to(wide), v[kv][keys].to(wide)
                p = _weights(_logits(q_i, k_j, diagonal), lse2_i, diagonal)
                _add_product(dv[kv][keys], p.T, dout_i, diagonal)
                dz = _cleared((dout_i @ v_j.T).sub_(delta_i).mul_(p), diagonal)
                _add_product(dq[head][rows], dz, k_j, diagonal)
                _add_product(dk[kv][keys], dz.T, q_i, diagonal)  # q_i is scaled already
    dq *= _scale(q)
    dk *= LN2  # and had log2 e in it
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# --- one tile ---------------------------------------------------------------------------------


def _logits(q_i: Tensor, k_j: Tensor, diagonal: int | None) -> Tensor:
    z = q_i @ k_j.T
    if diagonal is not None:
        _cleared(z, diagonal).add_(torch.full_like(z, -INF).triu_(diagonal + 1))
    return z


def _weights(z: Tensor, peak: Tensor, diagonal: int | None) -> Tensor:
    """2 to the power of z - peak, in z's own memory."""
    z.sub_(_guarded(peak, 0)).exp2_()
    # A query of NaN has a peak of NaN, and -inf - NaN is NaN: its hidden keys are cleared again.
    return _cleared(z, diagonal)


def _guarded(peak: Tensor, instead: float) -> Tensor:
    # A row without keys has the maximum -inf, and -inf - -inf is NaN: subtract 0 there.
    return torch.where(peak == -INF, instead, peak)


def _cleared(x: Tensor, diagonal: int | None) -> Tensor:
    """0 for what is hidden, whatever was there: a product with a mask would keep NaN."""
    return x if diagonal is None else x.tril_(diagonal)


def _add_product(into: Tensor, weights: Tensor, values: Tensor, diagonal: int | None) -> Tensor:
    """Add ``weights @ values``; where keys are hidden, a weight of 0 takes nothing, not 0 · NaN."""
    # A sum that is finite has nothing in it that is not.
    if diagonal is None or values.sum().isfinite():
        return into.addmm_(weights, values)
    finite = values.isfinite().all(-1)
    into.addmm_(weights, values.where(finite[:, None], 0))
    for j in (~finite).nonzero()[:, 0].tolist():
        weight = weights[:, j, None]
        into += torch.where(weight != 0, weight * values[j], 0)
    return into


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


# --- at the door ------------------------------------------------------------------------------


def tiles_of(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool, lengths: Any) -> Tiles:
    """The tiles of these tensors, once they are found to fit; numpy_tiles' errors where not."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floating point; got dtype {x.dtype}")
        if (x.dtype, x.device) != (q.dtype, q.device):
            found = f"{x.dtype} on {x.device}"
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} to match q; got {found}")
    # Arrays of the same shapes that take no memory.
    shapes = (np.broadcast_to(0.0, tuple(x.shape)) for x in (q, k, v))
    like_q, like_k, _ = checked(*shapes)
    if isinstance(lengths, Tensor):
        lengths = lengths.cpu().numpy()
    return Tiles(like_q, like_k, block, causal, lengths)
