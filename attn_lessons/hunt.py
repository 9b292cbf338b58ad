r"""Six blocks, each with one mistake in its backward pass: the bug hunt that ends chapter 7.

Every forward pass is right. Every backward pass takes the gradient of the output and the forward's
arguments, runs the forward again for what it needs, and returns the gradients; one thing in it is
wrong. Which, is for the reader to find, with chapter 2's tools: nothing here says it.

Parameters are a flat dict, and so are their gradients. What belongs to a part of the block has the
part's name in front, then a dot, then the name that the part's function gives it: ``ffn.w1`` is
the ``w1`` of ffn_forward, ``self_attn.wq`` the ``wq`` of multihead_forward, ``norm1.gamma`` the
``gamma`` of a norm. Shapes, masks and dtypes are those functions', and so are the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Real

from attn_lessons.attention import attention_backward, attention_forward
from attn_lessons.feedforward import (
    ffn_backward_cached,
    ffn_forward,
    swiglu_backward_cached,
    swiglu_forward,
)
from attn_lessons.multihead import (
    BIASES,
    WEIGHTS,
    cross_attention_backward,
    cross_attention_forward,
    grouped_kv_forward,
    linear_backward,
    linear_forward,
    merge_heads,
    multihead_backward,
    multihead_backward_cached,
    multihead_forward,
    split_heads,
)
from attn_lessons.normalization import (
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)
from attn_lessons.positions import rope, rope_backward

Params = Mapping[str, Any]
Gradients = dict[str, np.ndarray]

# What DeepNorm multiplies the skip path by in an encoder of 4 layers: (2 · 4)^(1/4).
ALPHA = 8**0.25


# --- names ------------------------------------------------------------------------------------


def part(params: Params, name: str) -> dict[str, Any]:
    r"""The parameters of one part of a block, without the part's name.

    .. math:: \{\, n : p_{\mathrm{name}.n} \,\}

    ValueError: there are none.
    """
    start = f"{name}."
    found = {n.removeprefix(start): p for n, p in params.items() if n.startswith(start)}
    if not found:
        there = ", ".join(sorted({n.split(".")[0] for n in params})) or "nothing"
        raise ValueError(f"params: expected names that start with {start!r}; got {there}")
    return found


def named(name: str, **arrays: Any) -> dict[str, Any]:
    r"""The reverse of part: arrays with the part's name in front.

    .. math:: \{\, \mathrm{name}.n : a_n \,\}
    """
    return {f"{name}.{n}": array for n, array in arrays.items()}


# --- 1: norm after the sum, a weighted skip path ----------------------------------------------


def block_1_forward(
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> Float[np.ndarray, "B N C"]:
    r"""An encoder block as in DeepNet: post-norm, the skip path times α.

    .. math:: a = \operatorname{LN}(\alpha x + \mathrm{attn}(x)), \qquad
              \mathrm{out} = \operatorname{LN}(\alpha a + \mathrm{ffn}(a))

    Parts: self_attn, norm1, ffn, norm2. α is ALPHA.

    Shapes: x and the result ``(B, N, C)``, mask as in multihead.

    Source: Wang et al. 2022 (DeepNet), eq. (4) and figure 2.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    attended, _ = multihead_forward(x, n_heads=n_heads, mask=mask, **own)
    a = layernorm_forward(ALPHA * x + attended, **part(params, "norm1"))
    fed, _ = ffn_forward(a, **ffn)
    return layernorm_forward(ALPHA * a + fed, **part(params, "norm2"))


def block_1_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of block 1, with one mistake.

    Shapes: dout and dx ``(B, N, C)``; returns ``(dx, grads)``.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    gamma1, gamma2 = params["norm1.gamma"], params["norm2.gamma"]
    attended, attn = multihead_forward(x, n_heads=n_heads, mask=mask, **own)
    first = ALPHA * x + attended
    a = layernorm_forward(first, **part(params, "norm1"))
    fed, feed = ffn_forward(a, **ffn)
    second = ALPHA * a + fed

    dsecond, dgamma2, dbeta2 = layernorm_backward(dout, second, gamma2)
    da, dfeed = ffn_backward_cached(dsecond, feed)
    dfirst, dgamma1, dbeta1 = layernorm_backward(da, first, gamma1)
    dx, dattn = multihead_backward_cached(dfirst, attn)
    dx = dx + ALPHA * dfirst

    grads = named("self_attn", **dattn) | named("ffn", **dfeed)
    grads |= named("norm1", gamma=dgamma1, beta=dbeta1)
    grads |= named("norm2", gamma=dgamma2, beta=dbeta2)
    return dx, grads


# --- 2: one layer, applied twice --------------------------------------------------------------


def block_2_forward(
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> Float[np.ndarray, "B N C"]:
    r"""A pre-norm layer applied twice, with the same parameters: ALBERT's.

    .. math:: \mathrm{out} = f(f(x)), \qquad
              a = x + \mathrm{attn}(\operatorname{LN}_1(x)), \quad
              f(x) = a + \mathrm{ffn}(\operatorname{LN}_2(a))

    Parts: norm1, self_attn, norm2, ffn.

    Shapes: x and the result ``(B, N, C)``, mask as in multihead.

    Source: Lan et al. 2020 (ALBERT), section 3.1, with pre-norm layers.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    for _ in range(2):
        normed = layernorm_forward(x, **part(params, "norm1"))
        attended, _ = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
        a = x + attended
        normed = layernorm_forward(a, **part(params, "norm2"))
        x = a + ffn_forward(normed, **ffn)[0]
    return x


def block_2_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of block 2, with one mistake.

    Shapes: dout and dx ``(B, N, C)``; returns ``(dx, grads)``.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    gamma1, gamma2 = params["norm1.gamma"], params["norm2.gamma"]
    steps = []
    for _ in range(2):
        normed = layernorm_forward(x, **part(params, "norm1"))
        attended, attn = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
        a = x + attended
        normed = layernorm_forward(a, **part(params, "norm2"))
        fed, feed = ffn_forward(normed, **ffn)
        steps.append((x, attn, a, feed))
        x = a + fed

    grads: dict[str, np.ndarray] = {}
    dx = dout
    for x, attn, a, feed in reversed(steps):
        dnormed, dfeed = ffn_backward_cached(dx, feed)
        da, dgamma2, dbeta2 = layernorm_backward(dnormed, a, gamma2)
        da = dx + da
        dnormed, dattn = multihead_backward_cached(da, attn)
        dx, dgamma1, dbeta1 = layernorm_backward(dnormed, x, gamma1)
        dx = da + dx
        grads |= named("self_attn", **dattn) | named("ffn", **dfeed)
        grads |= named("norm1", gamma=dgamma1, beta=dbeta1)
        grads |= named("norm2", gamma=dgamma2, beta=dbeta2)
    return dx, grads


# --- 3: fewer key heads than query heads, rotary positions ------------------------------------


def block_3_forward(
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> Float[np.ndarray, "B N C"]:
    r"""A pre-norm block with grouped key heads and rotary positions.

    .. math:: a = x + \mathrm{gqa}(\operatorname{LN}_1(x)), \qquad
              \mathrm{out} = a + \mathrm{ffn}(\operatorname{LN}_2(a))

    Parts: norm1, self_attn, norm2, ffn. How many key heads there are,
    the width of wk says; queries and keys are turned, values are not.

    Shapes: x and the result ``(B, N, C)``, wq ``(C, H d)``, wk and wv
    ``(C, H_kv d)``, mask as in multihead.

    Source: Ainslie et al. 2023, section 2.2; Su et al. 2021, section
    3.2.
    """
    p, positions = part(params, "self_attn"), np.arange(x.shape[1])
    n_kv_heads = n_heads * p["wk"].shape[1] // p["wq"].shape[1]
    normed = layernorm_forward(x, **part(params, "norm1"))
    q = split_heads(linear_forward(normed, p["wq"], p["bq"]), n_heads)
    k = split_heads(linear_forward(normed, p["wk"], p["bk"]), n_kv_heads)
    v = split_heads(linear_forward(normed, p["wv"], p["bv"]), n_kv_heads)
    k = grouped_kv_forward(rope(k, positions), n_heads)
    v = grouped_kv_forward(v, n_heads)
    heads, _ = attention_forward(rope(q, positions), k, v, mask)
    a = x + linear_forward(merge_heads(heads), p["wo"], p["bo"])
    normed = layernorm_forward(a, **part(params, "norm2"))
    return a + ffn_forward(normed, **part(params, "ffn"))[0]


def block_3_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of block 3, with one mistake.

    Shapes: dout and dx ``(B, N, C)``; returns ``(dx, grads)``.
    """
    p, positions = part(params, "self_attn"), np.arange(x.shape[1])
    gamma1, gamma2 = params["norm1.gamma"], params["norm2.gamma"]
    n_kv_heads = n_heads * p["wk"].shape[1] // p["wq"].shape[1]
    normed = layernorm_forward(x, **part(params, "norm1"))
    q = split_heads(linear_forward(normed, p["wq"], p["bq"]), n_heads)
    k = split_heads(linear_forward(normed, p["wk"], p["bk"]), n_kv_heads)
    v = split_heads(linear_forward(normed, p["wv"], p["bv"]), n_kv_heads)
    q, k = rope(q, positions), rope(k, positions)
    k, v = grouped_kv_forward(k, n_heads), grouped_kv_forward(v, n_heads)
    heads, probs = attention_forward(q, k, v, mask)
    merged = merge_heads(heads)
    a = x + linear_forward(merged, p["wo"], p["bo"])
    normed2 = layernorm_forward(a, **part(params, "norm2"))
    _, feed = ffn_forward(normed2, **part(params, "ffn"))

    dnormed2, dfeed = ffn_backward_cached(dout, feed)
    da, dgamma2, dbeta2 = layernorm_backward(dnormed2, a, gamma2)
    da = dout + da
    dmerged, dwo, dbo = linear_backward(da, merged, p["wo"])
    dheads = split_heads(dmerged, n_heads)
    dq, dk, dv = attention_backward(dheads, q, k, v, probs)
    b, _, n, d = dk.shape
    dk = dk.reshape(b, -1, n_kv_heads, n, d).sum(axis=1)
    dv = dv.reshape(b, -1, n_kv_heads, n, d).sum(axis=1)
    dq, dk = rope_backward(dq, positions), rope_backward(dk, positions)
    dx_q, dwq, dbq = linear_backward(merge_heads(dq), normed, p["wq"])
    dx_k, dwk, dbk = linear_backward(merge_heads(dk), normed, p["wk"])
    dx_v, dwv, dbv = linear_backward(merge_heads(dv), normed, p["wv"])
    dx, dgamma1, dbeta1 = layernorm_backward(dx_q + dx_k + dx_v, x, gamma1)

    grads = named("self_attn", wq=dwq, wk=dwk, wv=dwv, wo=dwo)
    grads |= named("self_attn", bq=dbq, bk=dbk, bv=dbv, bo=dbo)
    grads |= named("norm1", gamma=dgamma1, beta=dbeta1)
    grads |= named("norm2", gamma=dgamma2, beta=dbeta2)
    return da + dx, grads | named("ffn", **dfeed)


# --- 4: RMSNorm and a gated feed-forward layer ------------------------------------------------


def block_4_forward(
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> Float[np.ndarray, "B N C"]:
    r"""A pre-norm block with RMSNorm and SwiGLU.

    .. math:: a = x + \mathrm{attn}(\operatorname{RMS}_1(x)), \qquad
              \mathrm{out} = a + \mathrm{swiglu}(\operatorname{RMS}_2(a))

    Parts: norm1, self_attn, norm2, ffn (w_gate, w_up, w_down).

    Shapes: x and the result ``(B, N, C)``, mask as in multihead.

    Source: Touvron et al. 2023 (LLaMA), section 2.2.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    normed = rmsnorm_forward(x, params["norm1.gamma"])
    attended, _ = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
    a = x + attended
    normed = rmsnorm_forward(a, params["norm2.gamma"])
    return a + swiglu_forward(normed, **ffn)[0]


def block_4_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of block 4, with one mistake.

    Shapes: dout and dx ``(B, N, C)``; returns ``(dx, grads)``.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    gamma1, gamma2 = params["norm1.gamma"], params["norm2.gamma"]
    normed1 = rmsnorm_forward(x, gamma1)
    attended, attn = multihead_forward(normed1, n_heads=n_heads, mask=mask, **own)
    a = x + attended
    normed2 = rmsnorm_forward(a, gamma2)
    _, feed = swiglu_forward(normed2, **ffn)

    dnormed2, dfeed = swiglu_backward_cached(dout, feed)
    da, dgamma2 = rmsnorm_backward(dnormed2, a, gamma2)
    da = dout + da
    dnormed1, dattn = multihead_backward_cached(da, attn)
    dx, dgamma1 = rmsnorm_backward(dnormed1, normed1, gamma1)
    dx = da + dx

    grads = named("self_attn", **dattn) | named("ffn", **dfeed)
    grads |= named("norm1", gamma=dgamma1) | named("norm2", gamma=dgamma2)
    return dx, grads


# --- 5: a decoder's block, with a memory ------------------------------------------------------


def block_5_forward(
    x: Real[np.ndarray, "B Nq C"],
    memory: Real[np.ndarray, "B Nk C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    memory_mask: Bool[np.ndarray, "*#memory_mask"] | None = None,
) -> Float[np.ndarray, "B Nq C"]:
    r"""A pre-norm decoder block: itself, the memory, feed-forward.

    .. math:: a = x + \mathrm{attn}(\operatorname{LN}_1(x)), \qquad
              b = a + \mathrm{cross}(\operatorname{LN}_2(a), m), \qquad
              \mathrm{out} = b + \mathrm{ffn}(\operatorname{LN}_3(b))

    Parts: norm1, self_attn, norm2, cross_attn, norm3, ffn. A causal
    mask, where one is wanted, is the caller's to give.

    Shapes: x and the result ``(B, Nq, C)``, memory ``(B, Nk, C)``, mask
    to ``(B, H, Nq, Nq)``, memory_mask to ``(B, H, Nq, Nk)``.

    Source: Vaswani et al. 2017, section 3.1; Xiong et al. 2020, table 1.
    """
    own, cross = part(params, "self_attn"), part(params, "cross_attn")
    normed = layernorm_forward(x, **part(params, "norm1"))
    attended, _ = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
    a = x + attended
    normed = layernorm_forward(a, **part(params, "norm2"))
    read, _ = cross_attention_forward(
        normed,
        memory,
        n_heads=n_heads,
        mask=memory_mask,
        **cross,
    )
    b = a + read
    normed = layernorm_forward(b, **part(params, "norm3"))
    return b + ffn_forward(normed, **part(params, "ffn"))[0]


def block_5_backward(
    dout: Real[np.ndarray, "B Nq C"],
    x: Real[np.ndarray, "B Nq C"],
    memory: Real[np.ndarray, "B Nk C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    memory_mask: Bool[np.ndarray, "*#memory_mask"] | None = None,
) -> tuple[Float[np.ndarray, "B Nq C"], Float[np.ndarray, "B Nk C"], Gradients]:
    r"""Gradients of block 5, with one mistake.

    Shapes: dout and dx ``(B, Nq, C)``, dmemory ``(B, Nk, C)``; returns
    ``(dx, dmemory, grads)``.
    """
    own, cross = part(params, "self_attn"), part(params, "cross_attn")
    gamma1, gamma2, gamma3 = (params[f"norm{i}.gamma"] for i in (1, 2, 3))
    normed1 = layernorm_forward(x, **part(params, "norm1"))
    attended, _ = multihead_forward(normed1, n_heads=n_heads, mask=mask, **own)
    a = x + attended
    normed2 = layernorm_forward(a, **part(params, "norm2"))
    read, _ = cross_attention_forward(
        normed2,
        memory,
        n_heads=n_heads,
        mask=memory_mask,
        **cross,
    )
    b = a + read
    normed3 = layernorm_forward(b, **part(params, "norm3"))
    _, feed = ffn_forward(normed3, **part(params, "ffn"))

    dnormed3, dfeed = ffn_backward_cached(dout, feed)
    db, dgamma3, dbeta3 = layernorm_backward(dnormed3, b, gamma3)
    db = dout + db
    dnormed2, dmemory, dcross = cross_attention_backward(
        db, normed2, memory, n_heads=n_heads, **cross
    )
    da, dgamma2, dbeta2 = layernorm_backward(dnormed2, a, gamma2)
    da = db + da
    dnormed1, dself = multihead_backward(da, normed1, n_heads=n_heads, mask=mask, **own)
    dx, dgamma1, dbeta1 = layernorm_backward(dnormed1, x, gamma1)
    dx = da + dx

    grads = named("self_attn", **dself) | named("cross_attn", **dcross)
    grads |= named("norm1", gamma=dgamma1, beta=dbeta1)
    grads |= named("norm2", gamma=dgamma2, beta=dbeta2)
    grads |= named("norm3", gamma=dgamma3, beta=dbeta3)
    return dx, dmemory, grads | named("ffn", **dfeed)


# --- 6: attention and feed-forward side by side -----------------------------------------------


def block_6_forward(
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> Float[np.ndarray, "B N C"]:
    r"""A parallel block: attention and feed-forward read the same norm.

    .. math:: y = \operatorname{LN}(x), \qquad
              \mathrm{out} = x + \mathrm{attn}(y) + \mathrm{ffn}(y)

    Parts: norm, self_attn, ffn.

    Shapes: x and the result ``(B, N, C)``, mask as in multihead.

    Source: Wang & Komatsuzaki 2021 (GPT-J-6B).
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    normed = layernorm_forward(x, **part(params, "norm"))
    attended, _ = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
    fed, _ = ffn_forward(normed, **ffn)
    return x + attended + fed


def block_6_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of block 6, with one mistake.

    Shapes: dout and dx ``(B, N, C)``; returns ``(dx, grads)``.
    """
    own, ffn = part(params, "self_attn"), part(params, "ffn")
    gamma = params["norm.gamma"]
    dx = np.asarray(dout)
    normed = layernorm_forward(x, **part(params, "norm"))
    _, attn = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
    _, feed = ffn_forward(normed, **ffn)

    dnormed, dattn = multihead_backward_cached(dx, attn)
    dfed, dfeed = ffn_backward_cached(dx, feed)
    dnormed += dfed
    dbranches, dgamma, dbeta = layernorm_backward(dnormed, x, gamma)
    dx += dbranches

    grads = named("self_attn", **dattn) | named("ffn", **dfeed)
    return dx, grads | named("norm", gamma=dgamma, beta=dbeta)


# --- something to try them on -----------------------------------------------------------------

BLOCKS: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {
    1: (block_1_forward, block_1_backward),
    2: (block_2_forward, block_2_backward),
    3: (block_3_forward, block_3_backward),
    4: (block_4_forward, block_4_backward),
    5: (block_5_forward, block_5_backward),
    6: (block_6_forward, block_6_backward),
}

_PARTS = {
    1: ("self_attn", "norm1", "ffn", "norm2"),
    2: ("norm1", "self_attn", "norm2", "ffn"),
    3: ("norm1", "self_attn", "norm2", "ffn"),
    4: ("rms1", "self_attn", "rms2", "swiglu"),
    5: ("norm1", "self_attn", "norm2", "cross_attn", "norm3", "ffn"),
    6: ("norm", "self_attn", "ffn"),
}


def example(number: int, seed: int = 0) -> dict[str, Any]:
    r"""Arguments for the backward pass of block ``number``, by name.

    ``backward(**example(number))`` runs it; the forward pass takes all
    of them but ``dout``. No two lengths that could be mistaken for each
    other are alike, masks are on (causal, with padding), gains are not
    1, biases not 0, and ``dout`` is random.

    Shapes: B 3, N 5 (Nq 5, Nk 7), H 2, C 8, F 11; block 3: H 4, H_kv 2,
    C 24.

    ValueError: there is no such block.
    """
    if number not in BLOCKS:
        raise ValueError(f"number: expected 1 … {len(BLOCKS)}; got {number!r}")
    rng = np.random.default_rng([number, seed])
    n_heads, n_kv_heads, d = (4, 2, 6) if number == 3 else (2, 2, 4)
    b, n, c, n_memory, f = 3, 5, n_heads * d, 7, 11
    params: dict[str, np.ndarray] = {}
    for name in _PARTS[number]:
        params |= _part_of_example(rng, name, c, n_kv_heads * d, f)
    lengths = np.array([n, n - 1, n - 2])
    padding = np.arange(n) < lengths[:, None, None, None]
    arguments: dict[str, Any] = {
        "dout": rng.normal(size=(b, n, c)),
        "x": rng.normal(0.3, 1.5, size=(b, n, c)),
        "params": params,
        "n_heads": n_heads,
        "mask": np.tri(n, dtype=bool) & padding,
    }
    if number == 5:
        arguments["memory"] = rng.normal(size=(b, n_memory, c))
        arguments["memory_mask"] = np.arange(n_memory) < np.array([7, 4, 2])[:, None, None, None]
    return arguments


def _part_of_example(rng: np.random.Generator, name: str, c: int, c_kv: int, f: int) -> Gradients:
    if name.startswith(("norm", "rms")):
        arrays = {"gamma": 1 + 0.4 * rng.normal(size=c), "beta": 0.4 * rng.normal(size=c)}
        if name.startswith("rms"):
            del arrays["beta"]
        return named(name.replace("rms", "norm"), **arrays)
    if name == "ffn":
        shapes: dict[str, tuple[int, ...]] = {"w1": (c, f), "b1": (f,), "w2": (f, c), "b2": (c,)}
    elif name == "swiglu":
        name, shapes = "ffn", {"w_gate": (c, f), "w_up": (c, f), "w_down": (f, c)}
    else:
        wide = {"wq": (c, c), "wk": (c, c_kv), "wv": (c, c_kv), "wo": (c, c)}
        shapes = {**wide, **{b: (wide["w" + b[1]][1],) for b in BIASES}}
        assert tuple(wide) == WEIGHTS
    scale = {n: 0.4 if len(s) == 1 else s[0] ** -0.5 for n, s in shapes.items()}
    return named(name, **{n: scale[n] * rng.normal(size=s) for n, s in shapes.items()})
