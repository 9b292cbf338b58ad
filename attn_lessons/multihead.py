r"""Multi-head attention, forward and backward: self, cross, grouped and multi-query.

Tokens are rows: x is ``(B, N, C)``, batch, token, width. Heads are ``(B, H, N, d)``, with
E = H · d columns between them; mostly E = C. Weights stand on the right, ``y = x @ w + b``, so that
wq is ``(C, E)``: the transpose of what torch stores. The conventions are attention's, and besides:

- Head h owns the d columns from h · d on.
- A bias may be None: nothing is added, and no gradient comes back for it.
- A token without gradient takes no part in the gradients of the weights: NaN in padding that is
  masked out does not leak. In self-attention padding asks as well as it answers: mask its rows too.
- Gradients of parameters come as a dict with the parameters' names.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real

from attn_lessons._arrays import as_count, as_float, check_rank, check_shape
from attn_lessons.attention import attention_backward, attention_forward

WEIGHTS = ("wq", "wk", "wv", "wo")
BIASES = ("bq", "bk", "bv", "bo")

# Masked-out tokens may hold NaN or inf: 0 * inf is met on the way.
_quiet = np.errstate(all="ignore")

_TORCH_PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

Weights = Mapping[str, Any]
Gradients = dict[str, np.ndarray]


# --- heads ------------------------------------------------------------------------------------


def split_heads(
    x: Real[np.ndarray, "B N C"],
    n_heads: int,
) -> Float[np.ndarray, "B H N d"]:
    r"""Hand every head its own d of the C columns.

    .. math:: \mathrm{heads}_{bhni} = x_{bn,\,hd+i}, \qquad d = C / H

    The result is a view of x: no number moves. Its own backward pass
    is merge_heads.

    Shapes: ``(B, N, C)`` to ``(B, H, N, d)``.

    ValueError: x has not three axes; ``n_heads`` does not divide C.

    Source: Vaswani et al. 2017, section 3.2.2.
    """
    x, n_heads = as_float("x", x), as_count("n_heads", n_heads, 1)
    check_rank("x", x, "B N C")
    b, n, c = x.shape
    if c % n_heads:
        raise ValueError(f"n_heads: expected a divisor of C = {c}, x {x.shape}; got {n_heads}")
    return x.reshape(b, n, n_heads, c // n_heads).swapaxes(1, 2)


def merge_heads(
    x: Real[np.ndarray, "B H N d"],
) -> Float[np.ndarray, "B N C"]:
    r"""Put the heads' columns side by side again.

    .. math:: \mathrm{merged}_{bn,\,hd+i} = x_{bhni}, \qquad C = Hd

    Products leave the heads one behind the other, a token's columns
    N · d apart, so this one copies. Its own backward pass is
    split_heads.

    Shapes: ``(B, H, N, d)`` to ``(B, N, C)``.

    ValueError: x has not four axes.

    Source: Vaswani et al. 2017, section 3.2.2, "Concat".
    """
    x = as_float("x", x)
    check_rank("x", x, "B H N d")
    b, h, n, d = x.shape
    return x.swapaxes(1, 2).reshape(b, n, h * d)


def grouped_kv_forward(
    k: Real[np.ndarray, "B H_kv N d"],
    n_heads: int,
) -> Float[np.ndarray, "B H N d"]:
    r"""Repeat every key (or value) head for its group of query heads.

    .. math:: \mathrm{rep}_{bhni} = k_{b\lfloor h/G \rfloor ni},
              \qquad G = H / H_{kv}

    Shapes: ``(B, H_kv, N, d)`` to ``(B, H, N, d)``. H_kv = 1 is
    multi-query attention, H_kv = H the plain one.

    ValueError: k has not four axes; ``n_heads`` is no multiple of H_kv.

    Source: Ainslie et al. 2023, section 2.2; H_kv = 1: Shazeer 2019.
    """
    k, n_heads = as_float("k", k), as_count("n_heads", n_heads, 1)
    check_rank("k", k, "B H_kv N d")
    h_kv = k.shape[1]
    if h_kv == 0 or n_heads % h_kv:
        raise ValueError(
            f"n_heads: expected a multiple of H_kv = {h_kv}, k {k.shape}; got {n_heads}"
        )
    return np.repeat(k, n_heads // h_kv, axis=1)


@_quiet
def grouped_kv_backward(
    dk_rep: Real[np.ndarray, "B H N d"],
    n_kv_heads: int,
) -> Float[np.ndarray, "B H_kv N d"]:
    r"""Sum what came back to a key head's copies.

    .. math:: dk_{bgni} = \sum_{h=gG}^{gG+G-1} d\mathrm{rep}_{bhni}

    Shapes: ``(B, H, N, d)`` to ``(B, H_kv, N, d)``.

    ValueError: dk_rep has not four axes; ``n_kv_heads`` does not divide
    H.
    """
    dk_rep, n_kv_heads = as_float("dk_rep", dk_rep), as_count("n_kv_heads", n_kv_heads, 1)
    check_rank("dk_rep", dk_rep, "B H N d")
    b, h, n, d = dk_rep.shape
    if h % n_kv_heads:
        raise ValueError(
            f"n_kv_heads: expected a divisor of H = {h}, dk_rep {dk_rep.shape}; got {n_kv_heads}"
        )
    return dk_rep.reshape(b, n_kv_heads, h // n_kv_heads, n, d).sum(axis=2)


# --- projections ------------------------------------------------------------------------------


@_quiet
def linear_forward(
    x: Real[np.ndarray, "*rows C_in"],
    w: Real[np.ndarray, "C_in C_out"],
    b: Real[np.ndarray, "C_out"] | None = None,
) -> Float[np.ndarray, "*rows C_out"]:
    r"""The same weights for every token, in one matrix product.

    .. math:: y = x w + b

    Shapes: x ``(..., C_in)``, w ``(C_in, C_out)``, b ``(C_out,)``; the
    result ``(..., C_out)``.

    ValueError: shapes do not fit.
    """
    x, w = _linear_inputs(x, w)
    y = (_rows(x) @ w).reshape(*x.shape[:-1], w.shape[1])
    if b is None:
        return y
    b = as_float("b", b)
    check_shape("b", b, (w.shape[1],), f"to match w {w.shape}")
    return y + b


@_quiet
def linear_backward(
    dy: Real[np.ndarray, "*rows C_out"],
    x: Real[np.ndarray, "*rows C_in"],
    w: Real[np.ndarray, "C_in C_out"],
) -> tuple[
    Float[np.ndarray, "*rows C_in"],
    Float[np.ndarray, "C_in C_out"],
    Float[np.ndarray, "C_out"],
]:
    r"""Gradients by x, w and b: all tokens of all batches add up.

    .. math:: dx = dy\, w^\top, \qquad
              dw = \sum_{b,n} x_{bn}^\top\, dy_{bn}, \qquad
              db = \sum_{b,n} dy_{bn}

    Returns ``(dx, dw, db)``. A token whose dy is 0 takes no part in dw,
    whatever x holds there.

    Shapes: dy ``(..., C_out)``, x ``(..., C_in)``, w ``(C_in, C_out)``;
    each gradient as its array, db ``(C_out,)``.

    ValueError: shapes do not fit.
    """
    x, w = _linear_inputs(x, w)
    dy = as_float("dy", dy)
    why = f"to match x {x.shape} and w {w.shape}"
    check_shape("dy", dy, (*x.shape[:-1], w.shape[1]), why)
    x_rows, dy_rows = _rows(x), _rows(dy)
    dx = (dy_rows @ w.T).reshape(x.shape)
    dw = _taking_part(x_rows, dy_rows).T @ dy_rows
    # Added one by one in float32, 4096 equal rows lose two more digits.
    db = dy_rows.sum(axis=0, dtype=np.promote_types(dy.dtype, np.float64))
    return dx, dw, db.astype(dy.dtype, copy=False)


def fuse_qkv(
    wq: Real[np.ndarray, "C E"],
    wk: Real[np.ndarray, "C E_kv"],
    wv: Real[np.ndarray, "C E_kv"],
    bq: Real[np.ndarray, "E"],
    bk: Real[np.ndarray, "E_kv"],
    bv: Real[np.ndarray, "E_kv"],
) -> tuple[Float[np.ndarray, "C E_qkv"], Float[np.ndarray, "E_qkv"]]:
    r"""Three projections as one: the columns side by side.

    .. math:: w_{qkv} = [\,w_q \mid w_k \mid w_v\,], \qquad
              b_{qkv} = [\,b_q \mid b_k \mid b_v\,]

    Returns ``(w_qkv, b_qkv)``.

    Shapes: wq ``(C, E)``, wk and wv ``(C, E_kv)``, biases as long as
    their weights are wide; ``(C, E + 2 E_kv)`` and ``(E + 2 E_kv,)``.

    ValueError: shapes do not fit.
    """
    wq = as_float("wq", wq)
    check_rank("wq", wq, "C E")
    wk = _checked("wk", wk, (wq.shape[0], "E_kv"), f"to match wq {wq.shape}")
    wv = _checked("wv", wv, wk.shape, f"to match wk {wk.shape}")
    biases = [
        _checked(name, b, (w.shape[1],), f"to match {of} {w.shape}")
        for name, b, of, w in (("bq", bq, "wq", wq), ("bk", bk, "wk", wk), ("bv", bv, "wv", wv))
    ]
    return np.concatenate([wq, wk, wv], axis=1), np.concatenate(biases)


def qkv_forward(
    x: Real[np.ndarray, "B N C"],
    w_qkv: Real[np.ndarray, "C E_qkv"],
    b_qkv: Real[np.ndarray, "E_qkv"] | None,
    n_heads: int,
    n_kv_heads: int | None = None,
) -> tuple[
    Float[np.ndarray, "B H N d"],
    Float[np.ndarray, "B H_kv N d"],
    Float[np.ndarray, "B H_kv N d"],
]:
    r"""Queries, keys and values from one matrix product.

    .. math:: [\,q \mid k \mid v\,] = x\, w_{qkv} + b_{qkv}

    The numbers are those of three products; x is read once.

    Shapes: x ``(B, N, C)``, w_qkv ``(C, (H + 2 H_kv) d)``; q ``(B, H,
    N, d)``, k and v ``(B, H_kv, N, d)``. H_kv is H unless said.

    ValueError: shapes do not fit; the width of w_qkv is no multiple of
    H + 2 H_kv.
    """
    n_heads, n_kv_heads = _head_counts(n_heads, n_kv_heads)
    qkv = linear_forward(x, w_qkv, b_qkv)
    check_rank("x", qkv, "B N C")
    width, parts = qkv.shape[-1], n_heads + 2 * n_kv_heads
    if width % parts:
        raise ValueError(
            f"w_qkv: expected a width that is a multiple of H + 2 H_kv = {parts}; "
            f"got shape {np.shape(w_qkv)}"
        )
    d = width // parts
    q, k, v = np.split(qkv, [n_heads * d, (n_heads + n_kv_heads) * d], axis=-1)
    return split_heads(q, n_heads), split_heads(k, n_kv_heads), split_heads(v, n_kv_heads)


def qkv_backward(
    dq: Real[np.ndarray, "B H N d"],
    dk: Real[np.ndarray, "B H_kv N d"],
    dv: Real[np.ndarray, "B H_kv N d"],
    x: Real[np.ndarray, "B N C"],
    w_qkv: Real[np.ndarray, "C E_qkv"],
) -> tuple[
    Float[np.ndarray, "B N C"],
    Float[np.ndarray, "C E_qkv"],
    Float[np.ndarray, "E_qkv"],
]:
    r"""Gradients of the fused projection: x's three paths in one product.

    .. math:: dx = [\,dq \mid dk \mid dv\,]\, w_{qkv}^\top

    Returns ``(dx, dw_qkv, db_qkv)``. The sum over the three paths is
    the product's inner sum.

    Shapes: as in qkv_forward; each gradient as its array.

    ValueError: shapes do not fit.
    """
    check_shape("dv", np.asarray(dv), np.shape(dk), f"to match dk {np.shape(dk)}")
    dqkv = np.concatenate([merge_heads(dq), merge_heads(dk), merge_heads(dv)], axis=-1)
    return linear_backward(dqkv, x, w_qkv)


# --- multi-head attention ---------------------------------------------------------------------


class MultiheadCache(NamedTuple):
    """What the backward pass reads.

    - x ``(B, Nq, C)``: what the queries were made of.
    - memory ``(B, Nk, M)``: what keys and values were made of; x itself
      in self-attention.
    - params: the weights, and the biases or None, by name.
    - q ``(B, H, Nq, d)``, k and v ``(B, H_kv, Nk, d)``, not repeated.
    - probs ``(B, H, Nq, Nk)``: before dropout.
    - merged ``(B, Nq, E)``: the heads side by side, wo's input.
    - bias, keep, rate: as given.
    """

    x: Float[np.ndarray, "B Nq C"]
    memory: Float[np.ndarray, "B Nk M"]
    params: Weights
    q: Float[np.ndarray, "B H Nq d"]
    k: Float[np.ndarray, "B H_kv Nk d"]
    v: Float[np.ndarray, "B H_kv Nk d"]
    probs: Float[np.ndarray, "B H Nq Nk"]
    merged: Float[np.ndarray, "B Nq E"]
    bias: Real[np.ndarray, "*#bias"] | None
    keep: Bool[np.ndarray, "*#keep"] | None
    rate: float


def cross_attention_forward(
    x: Real[np.ndarray, "B Nq C"],
    memory: Real[np.ndarray, "B Nk M"],
    wq: Real[np.ndarray, "C E"],
    wk: Real[np.ndarray, "M E_kv"],
    wv: Real[np.ndarray, "M E_kv"],
    wo: Real[np.ndarray, "E C"],
    bq: Real[np.ndarray, "E"] | None,
    bk: Real[np.ndarray, "E_kv"] | None,
    bv: Real[np.ndarray, "E_kv"] | None,
    bo: Real[np.ndarray, "C"] | None,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    *,
    n_kv_heads: int | None = None,
    bias: Real[np.ndarray, "*#bias"] | None = None,
    keep: Bool[np.ndarray, "*#keep"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "B Nq C"], MultiheadCache]:
    r"""Attention in H heads, from the tokens of x to those of memory.

    .. math:: q = x w_q + b_q, \quad k = m w_k + b_k, \quad
              v = m w_v + b_v, \qquad
              \mathrm{out} = \mathrm{Concat}(\mathrm{head}_1, \dots,
              \mathrm{head}_H)\, w_o + b_o

    with head_h the attention of head h's own columns of q, k and v,
    scaled by 1/√d, not 1/√C. Returns ``(out, cache)``.

    Shapes: x and out ``(B, Nq, C)``, memory ``(B, Nk, M)``; wq ``(C,
    E)``, wk and wv ``(M, E_kv)``, wo ``(E, C)``; E = H · d and E_kv =
    H_kv · d. mask, bias and keep broadcast to ``(B, H, Nq, Nk)``.

    ValueError: shapes do not fit; ``n_heads`` does not divide E, or
    ``n_kv_heads`` not n_heads; and as attention_forward.

    Source: Vaswani et al. 2017, section 3.2.2; H_kv < H: Ainslie et al.
    2023.
    """
    n_heads, n_kv_heads = _head_counts(n_heads, n_kv_heads)
    x, memory = as_float("x", x), as_float("memory", memory)
    given = (wq, wk, wv, wo, bq, bk, bv, bo)
    params = _as_params(given, x, memory, n_heads, n_kv_heads)
    wq, wk, wv, wo, bq, bk, bv, bo = params.values()

    q = split_heads(linear_forward(x, wq, bq), n_heads)
    k = split_heads(linear_forward(memory, wk, bk), n_kv_heads)
    v = split_heads(linear_forward(memory, wv, bv), n_kv_heads)
    k_rep = grouped_kv_forward(k, n_heads)
    v_rep = grouped_kv_forward(v, n_heads)
    options: Any = {"bias": bias, "keep": keep, "rate": rate}
    heads, probs = attention_forward(q, k_rep, v_rep, mask, **options)
    merged = merge_heads(heads)
    out = linear_forward(merged, wo, bo)
    cache = _cached(x, memory, params, q, k, v, probs, merged, **options)
    return out, cache


@_quiet
def cross_attention_backward_cached(
    dout: Real[np.ndarray, "B Nq C"],
    cache: MultiheadCache,
) -> tuple[Float[np.ndarray, "B Nq C"], Float[np.ndarray, "B Nk M"], Gradients]:
    r"""Gradients by x, memory and every parameter, the forward reversed.

    .. math:: dx = dq\, w_q^\top, \qquad
              d\mathrm{memory} = dk\, w_k^\top + dv\, w_v^\top

    with dq, dk, dv the heads' gradients side by side. Returns ``(dx,
    dmemory, grads)``, grads keyed wq wk wv wo bq bk bv bo, without the
    biases that are None, and with "bias" where one was given. That of
    bk is 0: it moves all logits of a row alike, and softmax forgets it.

    Shapes: dout ``(B, Nq, C)``; each gradient as its array.

    ValueError: dout does not fit.
    """
    x, memory, p, q, k, v, probs, merged, bias, keep, rate = cache
    n_heads, n_kv_heads = q.shape[1], k.shape[1]
    dout = _checked("dout", dout, x.shape, "to match the output")

    dmerged, dwo, dbo = linear_backward(dout, merged, p["wo"])
    dheads = split_heads(dmerged, n_heads)
    k_rep = grouped_kv_forward(k, n_heads)
    v_rep = grouped_kv_forward(v, n_heads)
    dq, dk_rep, dv_rep, *dbias = attention_backward(
        dheads, q, k_rep, v_rep, probs, bias=bias, keep=keep, rate=rate
    )
    dk = grouped_kv_backward(dk_rep, n_kv_heads)
    dv = grouped_kv_backward(dv_rep, n_kv_heads)
    dx, dwq, dbq = linear_backward(merge_heads(dq), x, p["wq"])
    dmemory_k, dwk, dbk = linear_backward(merge_heads(dk), memory, p["wk"])
    dmemory_v, dwv, dbv = linear_backward(merge_heads(dv), memory, p["wv"])

    every = (dwq, dwk, dwv, dwo, dbq, dbk, dbv, dbo)
    grads = {n: g for n, g in zip(p, every, strict=True) if p[n] is not None}
    if dbias:
        grads["bias"] = dbias[0]
    return dx, dmemory_k + dmemory_v, grads


def cross_attention_backward(
    dout: Real[np.ndarray, "B Nq C"],
    x: Real[np.ndarray, "B Nq C"],
    memory: Real[np.ndarray, "B Nk M"],
    wq: Real[np.ndarray, "C E"],
    wk: Real[np.ndarray, "M E_kv"],
    wv: Real[np.ndarray, "M E_kv"],
    wo: Real[np.ndarray, "E C"],
    bq: Real[np.ndarray, "E"] | None,
    bk: Real[np.ndarray, "E_kv"] | None,
    bv: Real[np.ndarray, "E_kv"] | None,
    bo: Real[np.ndarray, "C"] | None,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    *,
    n_kv_heads: int | None = None,
    bias: Real[np.ndarray, "*#bias"] | None = None,
    keep: Bool[np.ndarray, "*#keep"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "B Nq C"], Float[np.ndarray, "B Nk M"], Gradients]:
    r"""Gradients of cross-attention from its arguments alone.

    .. math:: (dx, d\mathrm{memory}, d\theta) = d\mathrm{out} \cdot
              \frac{\partial\,\mathrm{out}}
              {\partial (x, \mathrm{memory}, \theta)}

    The forward pass, then cross_attention_backward_cached.

    Shapes: dout ``(B, Nq, C)``, all else as in cross_attention_forward;
    each gradient as its array.

    ValueError: as there; and where dout does not fit.
    """
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    options: Any = {"n_kv_heads": n_kv_heads, "bias": bias, "keep": keep, "rate": rate}
    _, cache = cross_attention_forward(x, memory, *params, n_heads, mask, **options)
    return cross_attention_backward_cached(dout, cache)


def multihead_forward(
    x: Real[np.ndarray, "B N C"],
    wq: Real[np.ndarray, "C E"],
    wk: Real[np.ndarray, "C E_kv"],
    wv: Real[np.ndarray, "C E_kv"],
    wo: Real[np.ndarray, "E C"],
    bq: Real[np.ndarray, "E"] | None,
    bk: Real[np.ndarray, "E_kv"] | None,
    bv: Real[np.ndarray, "E_kv"] | None,
    bo: Real[np.ndarray, "C"] | None,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    *,
    n_kv_heads: int | None = None,
    bias: Real[np.ndarray, "*#bias"] | None = None,
    keep: Bool[np.ndarray, "*#keep"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "B N C"], MultiheadCache]:
    r"""Self-attention in H heads: the tokens of x attend to each other.

    .. math:: \mathrm{out} = \mathrm{cross}(x, x)

    Returns ``(out, cache)``.

    Shapes: as in cross_attention_forward with memory x: Nq = Nk = N and
    M = C.

    ValueError: as there.

    Source: Vaswani et al. 2017, sections 3.2.2 and 3.2.3.
    """
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    options: Any = {"n_kv_heads": n_kv_heads, "bias": bias, "keep": keep, "rate": rate}
    return cross_attention_forward(x, x, *params, n_heads, mask, **options)


@_quiet
def multihead_backward_cached(
    dout: Real[np.ndarray, "B N C"],
    cache: MultiheadCache,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients by x, whose three paths add up, and every parameter.

    .. math:: dx = dq\, w_q^\top + dk\, w_k^\top + dv\, w_v^\top

    Returns ``(dx, grads)``.

    Shapes: dout and dx ``(B, N, C)``; grads as in
    cross_attention_backward_cached.

    ValueError: dout does not fit.
    """
    dx_as_queries, dx_as_memory, grads = cross_attention_backward_cached(dout, cache)
    return dx_as_queries + dx_as_memory, grads


def multihead_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    wq: Real[np.ndarray, "C E"],
    wk: Real[np.ndarray, "C E_kv"],
    wv: Real[np.ndarray, "C E_kv"],
    wo: Real[np.ndarray, "E C"],
    bq: Real[np.ndarray, "E"] | None,
    bk: Real[np.ndarray, "E_kv"] | None,
    bv: Real[np.ndarray, "E_kv"] | None,
    bo: Real[np.ndarray, "C"] | None,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    *,
    n_kv_heads: int | None = None,
    bias: Real[np.ndarray, "*#bias"] | None = None,
    keep: Bool[np.ndarray, "*#keep"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of self-attention from its arguments alone.

    .. math:: (dx, d\theta) = d\mathrm{out} \cdot
              \frac{\partial\,\mathrm{out}}{\partial (x, \theta)}

    The forward pass, then multihead_backward_cached.

    Shapes: dout ``(B, N, C)``, all else as in multihead_forward; each
    gradient as its array.

    ValueError: as there; and where dout does not fit.
    """
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    options: Any = {"n_kv_heads": n_kv_heads, "bias": bias, "keep": keep, "rate": rate}
    _, cache = multihead_forward(x, *params, n_heads, mask, **options)
    return multihead_backward_cached(dout, cache)


# --- torch's layout ---------------------------------------------------------------------------


def to_torch_mha(params: Weights) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Parameters as nn.MultiheadAttention's state_dict holds them.

    .. math:: \mathrm{in\_proj\_weight} =
              [\,w_q \mid w_k \mid w_v\,]^\top, \qquad
              \mathrm{out\_proj.weight} = w_o^\top

    torch multiplies by the transpose. Its masks are the opposite of
    ours, too: True = may not attend.

    Shapes: params wq ``(C, C)``, wk and wv ``(M, C)``, wo ``(C, C)``,
    bq … bo ``(C,)`` or None; in_proj_weight ``(3C, C)``, or where
    M ≠ C q_proj_weight, k_proj_weight and v_proj_weight.

    ValueError: a name is missing or unknown; a shape torch has no place
    for (grouped heads, say); some biases are None and others not.
    """
    p = _torch_params(params)
    wq, wk, wv, wo, bq, bk, bv, bo = (p[name] for name in WEIGHTS + BIASES)
    if wk.shape == wq.shape:
        state = {"in_proj_weight": np.concatenate([wq.T, wk.T, wv.T])}
    else:
        state = dict(zip(_TORCH_PARTS, (wq.T.copy(), wk.T.copy(), wv.T.copy()), strict=True))
    state["out_proj.weight"] = wo.T.copy()
    if bq is not None:
        state |= {"in_proj_bias": np.concatenate([bq, bk, bv]), "out_proj.bias": bo.copy()}
    return state


def from_torch_mha(state: Weights) -> dict[str, Any]:
    r"""Our parameters from nn.MultiheadAttention's state_dict.

    .. math:: [\,w_q \mid w_k \mid w_v\,] =
              \mathrm{in\_proj\_weight}^\top, \qquad
              w_o = \mathrm{out\_proj.weight}^\top

    The arrays are copies. Without biases in the state, ours are None.

    Shapes: as in to_torch_mha, the other way.

    ValueError: a name is missing, or unknown (bias_k, bias_v); shapes
    do not fit.
    """
    state = {name: as_float(name, np.asarray(value)) for name, value in state.items()}
    together, biased = "in_proj_weight" in state, "in_proj_bias" in state
    names = ("in_proj_weight",) if together else _TORCH_PARTS
    biases = ("in_proj_bias", "out_proj.bias") if biased else ()
    _check_names("state", state, (*names, "out_proj.weight", *biases))
    check_rank("out_proj.weight", state["out_proj.weight"], "C C")
    c = state["out_proj.weight"].shape[0]
    for name, shape in _torch_shapes(c).items():
        if name in state:
            check_shape(name, state[name], shape, "for nn.MultiheadAttention")
    weights = np.split(state["in_proj_weight"], 3) if together else [state[n] for n in names]
    found = [w.T.copy() for w in (*weights, state["out_proj.weight"])]
    if biased:
        found += [b.copy() for b in np.split(state["in_proj_bias"], 3)]
        found += [state["out_proj.bias"].copy()]
    return dict.fromkeys(WEIGHTS + BIASES) | dict(zip(WEIGHTS + BIASES, found, strict=False))


# --- the steps --------------------------------------------------------------------------------


def _rows(x):
    # -1 cannot be worked out beside a length of 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _taking_part(x, dy):
    """``x``, but 0 in rows without gradient: 0 * NaN is NaN."""
    if np.isfinite(x).all():
        return x
    return np.where(dy.any(axis=-1, keepdims=True), x, 0)


def _cached(
    x: Float[np.ndarray, "B Nq C"],
    memory: Float[np.ndarray, "B Nk M"],
    params: Weights,
    q: Float[np.ndarray, "B H Nq d"],
    k: Float[np.ndarray, "B H_kv Nk d"],
    v: Float[np.ndarray, "B H_kv Nk d"],
    probs: Float[np.ndarray, "B H Nq Nk"],
    merged: Float[np.ndarray, "B Nq E"],
    bias: Real[np.ndarray, "*#bias"] | None,
    keep: Bool[np.ndarray, "*#keep"] | None,
    rate: float,
) -> MultiheadCache:
    # jaxtyping checks a function's arguments, not a NamedTuple's fields.
    return MultiheadCache(x, memory, params, q, k, v, probs, merged, bias, keep, rate)


# --- at the door ------------------------------------------------------------------------------


def _checked(name: str, x: Any, wanted: tuple[int | str, ...], why: str = "") -> np.ndarray:
    x = as_float(name, x)
    check_shape(name, x, wanted, why)
    return x


def _linear_inputs(x: Any, w: Any) -> tuple[np.ndarray, np.ndarray]:
    x, w = as_float("x", x), as_float("w", w)
    check_rank("w", w, "C_in C_out")
    check_shape("x", x, (*x.shape[:-1], w.shape[0]), f"to match w {w.shape}")
    return x, w


def _head_counts(n_heads: int, n_kv_heads: int | None) -> tuple[int, int]:
    n_heads = as_count("n_heads", n_heads, 1)
    n_kv_heads = n_heads if n_kv_heads is None else as_count("n_kv_heads", n_kv_heads, 1)
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: expected a divisor of n_heads = {n_heads}; got {n_kv_heads}")
    return n_heads, n_kv_heads


def _as_params(
    given: tuple[Any, ...], x: np.ndarray, memory: np.ndarray, n_heads: int, n_kv_heads: int
) -> dict[str, Any]:
    """The parameters as floats by name, after a look at every shape."""
    check_rank("x", x, "B Nq C")
    check_shape("memory", memory, (x.shape[0], "Nk", "M"), f"to match x {x.shape}")
    c, m = x.shape[-1], memory.shape[-1]
    wq = _checked("wq", given[0], (c, "E"), f"to match x {x.shape}")
    e = wq.shape[1]
    if e % n_heads or e == 0:
        raise ValueError(
            f"wq: expected a width that is a multiple of n_heads = {n_heads}; got shape {wq.shape}"
        )
    e_kv = e // n_heads * n_kv_heads
    why = f"to match memory {memory.shape} and {n_kv_heads} heads of width {e // n_heads}"
    shapes: dict[str, tuple[int, ...]] = {"wk": (m, e_kv), "wv": (m, e_kv), "wo": (e, c)}
    shapes |= {"bq": (e,), "bk": (e_kv,), "bv": (e_kv,), "bo": (c,)}
    params = dict(zip(WEIGHTS + BIASES, given, strict=True)) | {"wq": wq}
    for name, shape in shapes.items():
        if name in WEIGHTS or params[name] is not None:
            reason = why if name in ("wk", "wv") else ""
            params[name] = _checked(name, params[name], shape, reason)
    return params


def _torch_params(params: Weights) -> dict[str, Any]:
    _check_names("params", params, WEIGHTS + BIASES)
    none = [name for name in BIASES if params[name] is None]
    if none and len(none) < len(BIASES):
        raise ValueError(f"{none[0]}: expected all biases or none; got None beside others")
    p: dict[str, Any] = {n: v if v is None else as_float(n, v) for n, v in params.items()}
    check_rank("wk", p["wk"], "M C")
    m, c = p["wk"].shape
    shapes: dict[str, tuple[int | str, ...]] = {"wq": (c, c), "wv": (m, c), "wo": (c, c)}
    shapes |= {name: (c,) for name in BIASES if not none}
    for name, shape in shapes.items():
        check_shape(name, p[name], shape, f"for nn.MultiheadAttention, wk {p['wk'].shape}")
    return p


def _torch_shapes(c: int) -> dict[str, tuple[int | str, ...]]:
    return {
        "in_proj_weight": (3 * c, c),
        "q_proj_weight": (c, c),
        "k_proj_weight": (c, "M"),
        "v_proj_weight": (c, "M"),
        "out_proj.weight": (c, c),
        "in_proj_bias": (3 * c,),
        "out_proj.bias": (c,),
    }


def _check_names(name: str, found: Weights, wanted: tuple[str, ...]) -> None:
    if set(found) != set(wanted):
        raise ValueError(f"{name}: expected {', '.join(wanted)}; got {', '.join(found)}")
