r"""Attention in tiles as a GPU kernel: forward, and backward in two kernels, in Triton.

The algorithm and the conventions of numpy_tiles, one block of queries (or of keys) a program:

- ``_forward`` merges the blocks of keys for one block of queries, and stores out and lse; where a
  gradient will be asked for, out in float32 too.
- ``_delta`` takes the row sums of dout ∘ out, which both backward kernels read.
- ``_backward_keys`` owns a block of keys and goes over queries: dk and dv. ``_backward_queries``
  owns a block of queries and goes over keys: dq. So each entry has one writer, sums keep their
  order, and two runs agree bit for bit, at the price of computing the logits once more.

Exponentials are powers of 2, which the hardware has: the logits carry a factor of log2 e. Products
take the inputs' format and add up in float32; the weights are rounded to that format first. Keys
behind ``lengths`` are never read; a NaN in a key that only *some* queries of a block see, under
``causal``, reaches the others of the block, as 0 · NaN.

Without a GPU the kernels run under Triton's interpreter, on CPU tensors, where
``TRITON_INTERPRET=1`` is set before this module is imported. bfloat16 is computed in float32 there:
the interpreter multiplies its bit patterns (triton#11584).
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_lessons.flash.torch_tiles import tiles_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEST = 256
# Kernels read no other globals than such constants.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PRECISIONS = ("ieee", "tf32", "tf32x3")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    *,
    lengths: Any = None,
    return_lse: bool = False,
    precision: str = "ieee",
    block: int | None = None,
) -> Any:
    r"""Attention that never leaves the chip with an Nq x Nk array.

    .. math:: \mathrm{out} = \operatorname{softmax}(q k^\top / \sqrt d)\, v,
              \qquad \mathrm{lse}_i = \log \sum_j e^{z_{ij}}

    Returns ``out``, with ``return_lse`` ``(out, lse)``; gradients flow
    from both. ``precision`` is that of products of float32 on a GPU:
    "tf32" is several times as fast as "ieee" and keeps 10 bits of each
    factor, "tf32x3" lies between (triton#5895). ``block`` replaces the
    table of block lengths; a power of 2, at least 16.

    Shapes: q ``(B, H, Nq, d)``, k ``(B, Hkv, Nk, d)``, v ``(B, Hkv, Nk,
    d_v)``, lengths ``(B,)``; out ``(B, H, Nq, d_v)``, lse ``(B, H, Nq)``.
    Widths up to 256, powers of 2 or not.

    ValueError: as torch_tiles; a width over 256; a dtype other than
    float16, bfloat16 and float32; an unknown precision; a CPU tensor
    without the interpreter.

    Source: Dao 2023, algorithms 1 and 2.
    """
    tiles = tiles_of(q, k, v, block or 1, causal, lengths)
    _check(q, v, precision, block)
    lengths = torch.as_tensor(tiles.lengths, dtype=torch.int32, device=q.device)
    # Inside the function gradients are off: asked here.
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, lse = _FlashAttention.apply(q, k, v, lengths, bool(causal), precision, block, keep)
    return (out, lse) if return_lse else out


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, lengths: Any, *options: Any) -> Any:
        causal, precision, block, keep = options
        out, kept, lse = forward(q, k, v, lengths, causal, precision, block, keep=keep)
        ctx.save_for_backward(q, k, v, kept, lse, lengths)
        ctx.options = causal, precision, block
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        q, k, v, kept, lse, lengths = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(kept, dtype=q.dtype)
        grads = backward(dout, dlse, q, k, v, kept, lse, lengths, *ctx.options)
        return *grads, None, None, None, None, None


# --- what every kernel does -------------------------------------------------------------------


@triton.jit
def _load(x, rows, n_rows, stride, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, as wide as BD; what lies outside it is 0."""
    columns = tl.arange(0, BD)
    at = x + rows[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(at, mask=(rows[:, None] < n_rows) & (columns[None, :] < D), other=0.0)
    if D < BD:
        return tl.load(at, mask=columns[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def _store(x, rows, n_rows, values, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    at = x + rows[:, None] * D + columns[None, :]
    inside = (rows[:, None] < n_rows) & (columns[None, :] < D)
    tl.store(at, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _visible(rows, keys, length, shift, CAUSAL: tl.constexpr):
    """Whether the query of a row may see a key; both broadcast."""
    if CAUSAL:
        return (keys < length) & (keys <= rows + shift)
    return (keys < length) & (rows >= 0)


@triton.jit
def _key_range(first, n_q, length, shift, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys that all queries of a block see, in whole blocks, and that any of them sees."""
    whole, some = length, length
    if CAUSAL:
        whole = tl.maximum(tl.minimum(length, first + 1 + shift), 0)
        some = tl.maximum(tl.minimum(length, tl.minimum(first + BM, n_q) + shift), 0)
    return whole // BN * BN, some


# --- forward ----------------------------------------------------------------------------------


@triton.jit
def _merge_keys(
    q_i, k, v, m, total, o, rows, start, stop, length, shift, scale, k_row, v_row,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for j in range(start, stop, BN):
        keys = j + tl.arange(0, BN)
        k_j = _load(k, keys, length, k_row, D, BD, MASKED)
        z = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION) * scale
        if MASKED:
            seen = _visible(rows[:, None], keys[None, :], length, shift, CAUSAL)
            z = tl.where(seen, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        # A row without keys so far: -inf - -inf is NaN, so subtract 0 there.
        peak = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(z - peak[:, None])
        # What came before was measured from the old maximum.
        factor = tl.exp2(m - peak)
        total = total * factor + tl.sum(p, 1)
        v_j = _load(v, keys, length, v_row, DV, BDV, MASKED)
        o = tl.dot(p.to(v_j.dtype), v_j, o * factor[:, None], input_precision=PRECISION)
        m = m_new
    return m, total, o


@triton.jit
def _forward(
    q, k, v, out, kept, lse, lengths, heads, group, n_q, n_k, scale,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    first, bh = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    rows, length, shift = first + tl.arange(0, BM), tl.load(lengths + b), n_k - n_q
    q_i = _load(q + b * q_b + h * q_h, rows, n_q, q_row, D, BD, True)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BDV], tl.float32)
    whole, some = _key_range(first, n_q, length, shift, BM, BN, CAUSAL)
    m, total, o = _merge_keys(
        q_i, k, v, m, total, o, rows, 0, whole, length, shift, scale, k_row, v_row,
        D, DV, BD, BDV, BN, CAUSAL, PRECISION, False,
    )  # fmt: skip
    m, total, o = _merge_keys(
        q_i, k, v, m, total, o, rows, whole, some, length, shift, scale, k_row, v_row,
        D, DV, BD, BDV, BN, CAUSAL, PRECISION, True,
    )  # fmt: skip
    # A row that saw no key has total 0, and m = -inf is its lse.
    total = tl.where(total == 0.0, 1.0, total)
    o = o / total[:, None]
    _store(out + bh * n_q * DV, rows, n_q, o, DV, BDV)
    if KEEP:
        _store(kept + bh * n_q * DV, rows, n_q, o, DV, BDV)
    tl.store(lse + bh * n_q + rows, (m + tl.log2(total)) * LN2, mask=rows < n_q)


# --- backward ---------------------------------------------------------------------------------


@triton.jit
def _delta(
    out, dout, delta, heads, n_q, dout_b, dout_h, dout_row,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Row sums of dout ∘ out, the same as those of p ∘ dp over all keys."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    o = _load(out + bh * n_q * DV, rows, n_q, DV, DV, BDV, True)
    do = _load(dout + b * dout_b + h * dout_h, rows, n_q, dout_row, DV, BDV, True)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + bh * n_q + rows, sums, mask=rows < n_q)


@triton.jit
def _load_lse(lse, rows, n_q):
    """lse in powers of 2. Where there is no key or no query it is +inf: exp2(z - inf) = 0."""
    value = tl.load(lse + rows, mask=rows < n_q, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value) * LOG2E


@triton.jit
def _gather_queries(
    dk, dv, k_j, v_j, q, dout, lse, delta, keys, start, stop, n_q, length, shift, scale,
    q_row, dout_row,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for i in range(start, stop, BM):
        rows = i + tl.arange(0, BM)
        q_i = _load(q, rows, n_q, q_row, D, BD, MASKED)
        do = _load(dout, rows, n_q, dout_row, DV, BDV, MASKED)
        # Transposed, keys by queries: what dk and dv multiply from the left.
        z = tl.dot(k_j, tl.trans(q_i), input_precision=PRECISION) * scale
        p = tl.exp2(z - _load_lse(lse, rows, n_q)[None, :])
        if MASKED:
            # z of a hidden key may lie far above lse: exp2 overflowed.
            seen = _visible(rows[None, :], keys[:, None], length, shift, CAUSAL)
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v_j, tl.trans(do), input_precision=PRECISION)
        dz = p * (dp - tl.load(delta + rows, mask=rows < n_q, other=0.0)[None, :])
        dk = tl.dot(dz.to(q_i.dtype), q_i, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    q, k, v, dout, lse, delta, dk_out, dv_out, lengths, heads, group, n_q, n_k, scale, d_scale,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, dout_b, dout_h, dout_row,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, bh = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    b, h_kv = bh // (heads // group), bh % (heads // group)
    keys, length, shift = first + tl.arange(0, BN), tl.load(lengths + b), n_k - n_q
    k_j = _load(k + b * k_b + h_kv * k_h, keys, length, k_row, D, BD, True)
    v_j = _load(v + b * v_b + h_kv * v_h, keys, length, v_row, DV, BDV, True)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    # Queries from ``start`` on see some of these keys, from ``whole`` on all of them; the last
    # block of queries may be short.
    start, whole = 0, 0
    if CAUSAL:
        start = tl.maximum(first - shift, 0) // BM * BM
        whole = tl.cdiv(tl.maximum(first + BN - 1 - shift, 0), BM) * BM
    whole = tl.where(first + BN > length, tl.cdiv(n_q, BM) * BM, whole)
    start = tl.where(first >= length, n_q, start)
    whole = tl.maximum(whole, start)
    short = tl.maximum(n_q // BM * BM, whole)
    for g in range(group):
        h = h_kv * group + g
        q_h_at, dout_h_at = q + b * q_b + h * q_h, dout + b * dout_b + h * dout_h
        at = (b * heads + h) * n_q
        dk, dv = _gather_queries(
            dk, dv, k_j, v_j, q_h_at, dout_h_at, lse + at, delta + at, keys,
            start, tl.minimum(whole, n_q), n_q, length, shift, scale, q_row, dout_row,
            D, DV, BD, BDV, BM, CAUSAL, PRECISION, True,
        )  # fmt: skip
        dk, dv = _gather_queries(
            dk, dv, k_j, v_j, q_h_at, dout_h_at, lse + at, delta + at, keys,
            whole, short, n_q, length, shift, scale, q_row, dout_row,
            D, DV, BD, BDV, BM, CAUSAL, PRECISION, False,
        )  # fmt: skip
        dk, dv = _gather_queries(
            dk, dv, k_j, v_j, q_h_at, dout_h_at, lse + at, delta + at, keys,
            short, n_q, n_q, length, shift, scale, q_row, dout_row,
            D, DV, BD, BDV, BM, CAUSAL, PRECISION, True,
        )  # fmt: skip
    _store(dk_out + bh * n_k * D, keys, n_k, dk * d_scale, D, BD)
    _store(dv_out + bh * n_k * DV, keys, n_k, dv, DV, BDV)


@triton.jit
def _gather_keys(
    dq, q_i, do, lse_i, delta_i, k, v, rows, start, stop, length, shift, scale, k_row, v_row,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for j in range(start, stop, BN):
        keys = j + tl.arange(0, BN)
        k_j = _load(k, keys, length, k_row, D, BD, MASKED)
        v_j = _load(v, keys, length, v_row, DV, BDV, MASKED)
        z = tl.dot(q_i, tl.trans(k_j), input_precision=PRECISION) * scale
        p = tl.exp2(z - lse_i[:, None])
        if MASKED:
            # z of a hidden key may lie far above lse: exp2 overflowed.
            seen = _visible(rows[:, None], keys[None, :], length, shift, CAUSAL)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(v_j), input_precision=PRECISION)
        dz = p * (dp - delta_i[:, None])
        dq = tl.dot(dz.to(k_j.dtype), k_j, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_queries(
    q, k, v, dout, lse, delta, dq_out, lengths, heads, group, n_q, n_k, scale, d_scale,
    q_b, q_h, q_row, k_b, k_h, k_row, v_b, v_h, v_row, dout_b, dout_h, dout_row,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, bh = tl.program_id(0) * BM, tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    k += b * k_b + h // group * k_h
    v += b * v_b + h // group * v_h
    rows, length, shift = first + tl.arange(0, BM), tl.load(lengths + b), n_k - n_q
    q_i = _load(q + b * q_b + h * q_h, rows, n_q, q_row, D, BD, True)
    do = _load(dout + b * dout_b + h * dout_h, rows, n_q, dout_row, DV, BDV, True)
    lse_i = _load_lse(lse + bh * n_q, rows, n_q)
    delta_i = tl.load(delta + bh * n_q + rows, mask=rows < n_q, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    whole, some = _key_range(first, n_q, length, shift, BM, BN, CAUSAL)
    dq = _gather_keys(
        dq, q_i, do, lse_i, delta_i, k, v, rows, 0, whole, length, shift, scale, k_row, v_row,
        D, DV, BD, BDV, BN, CAUSAL, PRECISION, False,
    )  # fmt: skip
    dq = _gather_keys(
        dq, q_i, do, lse_i, delta_i, k, v, rows, whole, some, length, shift, scale, k_row, v_row,
        D, DV, BD, BDV, BN, CAUSAL, PRECISION, True,
    )  # fmt: skip
    _store(dq_out + bh * n_q * D, rows, n_q, dq * d_scale, D, BD)


# --- launching --------------------------------------------------------------------------------


def blocks(kernel: str, width: int, itemsize: int) -> dict[str, int]:
    """Block lengths, warps and stages of a kernel, by the wider of the heads' widths.

    One entry a case and no search at run time: a search may choose otherwise the next time, and
    the sums would round otherwise.
    """
    small = width <= 64 and itemsize == 2
    middle = width <= 128 and itemsize == 2
    if kernel == "forward":
        found = (128, 128, 4, 3) if small else (128, 64, 8, 3) if middle else (64, 32, 4, 2)
    elif kernel == "keys":  # BN is the block it owns
        found = (64, 128, 8, 3) if small else (64, 64, 8, 2) if middle else (32, 32, 4, 1)
    else:
        found = (128, 64, 8, 3) if small else (64, 64, 8, 2) if middle else (32, 32, 4, 1)
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), found, strict=True))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    causal: bool,
    precision: str,
    block: int | None,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel: ``(out, kept, lse)``.

    kept is out and lse the log-sum-exp, both in float32, for the backward pass: the row sums of
    dout ∘ out cancel against single products, and a rounded out would leave its error there.
    Without ``keep`` kept is out as it is.
    """
    dtype, (q, k, v) = q.dtype, _ready(q, k, v)
    shape = (*q.shape[:3], v.shape[-1])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
    options = _options("forward", q, k, v, causal, precision, block)
    grid = (triton.cdiv(q.shape[2], options["BM"]), q.shape[0] * q.shape[1])
    keep = keep and out.dtype != torch.float32
    kept = torch.empty(shape, dtype=torch.float32, device=q.device) if keep else out
    if out.numel() or lse.numel():
        _forward[grid](
            q, k, v, out, kept, lse, lengths, *_sizes(q, k), _scale(q) * LOG2E.value,
            *_strides(q, k, v), **options, KEEP=keep,
        )  # fmt: skip
    return out.to(dtype), kept, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    lse: Tensor,
    lengths: Tensor,
    causal: bool,
    precision: str,
    block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels: ``(dq, dk, dv)``."""
    dtype, (q, k, v, dout) = q.dtype, _ready(q, k, v, dout)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    n_bh = q.shape[0] * q.shape[1]
    if not n_bh or not q.shape[2] or not k.shape[2]:
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)
    width = triton.next_power_of_2(max(v.shape[-1], 16))
    delta = torch.empty_like(lse)
    _delta[triton.cdiv(q.shape[2], 64), n_bh](
        kept, dout, delta, q.shape[1], q.shape[2], *_strides(dout),
        DV=v.shape[-1], BDV=width, BM=64,
    )  # fmt: skip
    if dlse is not None:
        delta -= dlse
    scales, strides = (_scale(q) * LOG2E.value, _scale(q)), _strides(q, k, v, dout)
    options = _options("keys", q, k, v, causal, precision, block)
    grid = (triton.cdiv(k.shape[2], options["BN"]), k.shape[0] * k.shape[1])
    _backward_keys[grid](
        q, k, v, dout, lse, delta, dk, dv, lengths, *_sizes(q, k), *scales, *strides, **options
    )
    options = _options("queries", q, k, v, causal, precision, block)
    grid = (triton.cdiv(q.shape[2], options["BM"]), n_bh)
    _backward_queries[grid](
        q, k, v, dout, lse, delta, dq, lengths, *_sizes(q, k), *scales, *strides, **options
    )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _ready(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Entries of a row side by side, any other strides; bfloat16 as the interpreter needs it."""
    if INTERPRETED and tensors[0].dtype == torch.bfloat16:
        tensors = tuple(x.float() for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _options(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, precision: str, block: int | None
) -> dict[str, Any]:
    d, d_v = q.shape[-1], v.shape[-1]
    # tl.dot multiplies blocks whose sides are powers of 2, from 16 on.
    padded = {"BD": triton.next_power_of_2(max(d, 16)), "BDV": triton.next_power_of_2(max(d_v, 16))}
    chosen = blocks(kernel, max(padded.values()), q.element_size())
    if block is not None:
        chosen |= {"BM": block, "BN": block}
    return {"D": d, "DV": d_v, "CAUSAL": causal, "PRECISION": precision} | padded | chosen


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2]


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in range(3)]


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


# --- at the door ------------------------------------------------------------------------------


def _check(q: Tensor, v: Tensor, precision: str, block: int | None) -> None:
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > WIDEST:
            raise ValueError(f"{name}: expected a width of at most {WIDEST}; got {x.shape[-1]}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q: expected float16, bfloat16 or float32; got {q.dtype}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    if block is not None and (block < 16 or block & (block - 1)):
        raise ValueError(f"block: expected a power of 2, at least 16; got {block}")
    if not INTERPRETED and not q.is_cuda:
        raise ValueError(
            f"q: expected a tensor on a GPU; got one on {q.device}. "
            "For the CPU set TRITON_INTERPRET=1 before this module is imported"
        )
