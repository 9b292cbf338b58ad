r"""Scaled dot-product attention, forward and backward, with masks, bias and dropout.

Arrays are ``(B, H, N, d)``: batch, head, token, width. Queries number Nq, keys Nk; v has width
d_v, which may differ from d. The conventions are the same in every function:

- A mask is boolean, True = may attend, and broadcasts to ``(B, H, Nq, Nk)``. A ``-inf`` in the
  bias masks too.
- A fully masked row (or one without keys) gives output 0, probabilities 0, log-sum-exp ``-inf``
  and gradients 0, and does not touch other rows.
- What has probability 0 takes no part: NaN or inf in a masked-out q, k or v does not leak, in
  neither direction. What may be attended to is computed with, NaN and all.
- float32 stays float32, integers become float64, inputs are never written to.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from attn_lessons._arrays import (
    as_bool,
    as_count,
    as_float,
    check_broadcasts,
    check_rank,
    check_shape,
    unbroadcast,
    weighted_sum,
)
from attn_lessons.softmax import logsumexp, softmax, softmax_backward

# A masked-out key may hold anything: inf - inf and 0 * inf are met on
# the way to results that do not depend on it.
_quiet = np.errstate(all="ignore")

AXES = "B H Nq Nk"


# --- masks ------------------------------------------------------------------------------------


def causal_mask(
    n_q: int,
    n_k: int,
    *,
    align: Literal["bottom-right", "top-left"] = "bottom-right",
) -> Bool[np.ndarray, "n_q n_k"]:
    r"""Which keys each query may see when the future is hidden.

    .. math:: \mathrm{mask}_{ij} = [\,j \le i + n_k - n_q\,]

    The last query sees every key, as in decoding with cached keys
    ("bottom-right"). ``align="top-left"`` drops n_k - n_q, so that the
    first query sees key 0 alone: torch's ``is_causal``. Square masks
    are the same.

    Shapes: ``(n_q, n_k)``, True = may attend.

    ValueError: a length is negative or no integer; ``align`` is
    unknown.

    Source: Vaswani et al. 2017, section 3.2.3.
    """
    n_q, n_k = as_count("n_q", n_q), as_count("n_k", n_k)
    offsets = {"bottom-right": n_k - n_q, "top-left": 0}
    if align not in offsets:
        raise ValueError(f'align: expected "bottom-right" or "top-left"; got {align!r}')
    return np.tri(n_q, n_k, offsets[align], dtype=bool)


def padding_mask(
    lengths: Integer[np.ndarray, "B"],
    n_k: int,
) -> Bool[np.ndarray, "B 1 1 n_k"]:
    r"""Which keys are tokens, not padding behind the sequence's end.

    .. math:: \mathrm{mask}_{b,1,1,j} = [\,j < \mathrm{lengths}_b\,]

    Shapes: ``lengths`` ``(B,)`` to ``(B, 1, 1, n_k)``, which broadcasts
    over heads and queries. torch's ``key_padding_mask`` is the opposite:
    True = padding.

    ValueError: ``lengths`` has not one axis, holds no integers, or one
    outside 0 … n_k.
    """
    lengths, n_k = np.asarray(lengths), as_count("n_k", n_k)
    check_rank("lengths", lengths, "B")
    if lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths: expected integers; got dtype {lengths.dtype}")
    wrong = (lengths < 0) | (lengths > n_k)
    if wrong.any():
        b = int(wrong.argmax())
        raise ValueError(f"lengths: expected 0 … {n_k}, n_k; got {lengths[b]} at {b}")
    return np.arange(n_k) < lengths[:, None, None, None]


def dropout_keep(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    rate: float,
) -> Bool[np.ndarray, "..."]:
    r"""Which probabilities dropout keeps, each with chance 1 - rate.

    .. math:: P(\mathrm{keep}_{bhij}) = 1 - \mathrm{rate}

    Draw it once, and hand it to the forward and the backward pass.

    Shapes: ``shape``, usually that of the probabilities.

    ValueError: ``rate`` lies outside [0, 1).
    """
    _check_rate(rate)
    return rng.random(shape) >= rate


# --- forward ----------------------------------------------------------------------------------


@_quiet
def attention_logits(
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B H Nk d"],
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    *,
    bias: Real[np.ndarray, "*#bias"] | None = None,
) -> Float[np.ndarray, "B H Nq Nk"]:
    r"""Scaled dot products, with the bias added and the masked at -inf.

    .. math:: z_{ij} = \frac{q_i \cdot k_j}{\sqrt d} + b_{ij}

    Shapes: q ``(B, H, Nq, d)``, k ``(B, H, Nk, d)``; mask and bias
    broadcast to the result's ``(B, H, Nq, Nk)``.

    ValueError: shapes do not fit; the mask is not boolean.

    Source: Vaswani et al. 2017, eq. (1).
    """
    q, k = _queries_keys(q, k)
    # q is smaller than the logits, and q · k may overflow unscaled.
    logits = (q * _scale(q)) @ k.swapaxes(-1, -2)
    if bias is not None:
        bias = _as_bias(bias, logits.shape)
        logits += bias
        # NaN + -inf is NaN: k is NaN where nothing may attend to it.
        np.copyto(logits, -np.inf, where=bias == -np.inf)
    if mask is not None:
        np.copyto(logits, -np.inf, where=~_as_mask("mask", mask, logits.shape))
    return logits


@_quiet
def attention_forward(
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B H Nk d"],
    v: Real[np.ndarray, "B H Nk d_v"],
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    *,
    bias: Real[np.ndarray, "*#bias"] | None = None,
    keep: Bool[np.ndarray, "*#keep"] | None = None,
    rate: float = 0.0,
    return_lse: bool = False,
) -> tuple[Float[np.ndarray, "B H Nq ..."], ...]:
    r"""Values averaged with weights that queries and keys agree on.

    .. math:: p = \operatorname{softmax}(z), \qquad
              \mathrm{out} = \frac{p \circ \mathrm{keep}}{1 - \mathrm{rate}}
              \, v, \qquad
              \mathrm{lse}_i = \log \sum_j e^{z_{ij}}

    Returns ``(out, probs)``, with ``return_lse`` ``(out, probs, lse)``.
    The probabilities are those before dropout.

    Shapes: q ``(B, H, Nq, d)``, k ``(B, H, Nk, d)``, v ``(B, H, Nk,
    d_v)``; mask, bias and keep broadcast to probs' ``(B, H, Nq, Nk)``;
    out ``(B, H, Nq, d_v)``, lse ``(B, H, Nq)``.

    ValueError: shapes do not fit; mask or keep is not boolean; ``rate``
    lies outside [0, 1), or is given without ``keep``.

    Source: Vaswani et al. 2017, eq. (1); dropout: Srivastava et al.
    2014, section 10, inverted.
    """
    logits = attention_logits(q, k, mask, bias=bias)
    b, h, _, n_k = logits.shape
    v = as_float("v", v)
    check_shape("v", v, (b, h, n_k, "d_v"), f"to match k {np.shape(k)}")
    probs = softmax(logits)
    if np.isnan(probs).any():
        # A NaN in a row made its masked entries NaN too.
        np.copyto(probs, 0, where=logits == -np.inf)
    out = weighted_sum(_dropped(probs, keep, rate), v)
    return (out, probs, logsumexp(logits)) if return_lse else (out, probs)


# --- backward ---------------------------------------------------------------------------------


@_quiet
def attention_backward(
    dout: Real[np.ndarray, "B H Nq d_v"],
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B H Nk d"],
    v: Real[np.ndarray, "B H Nk d_v"],
    probs: Real[np.ndarray, "B H Nq Nk"],
    *,
    dlse: Real[np.ndarray, "B H Nq"] | None = None,
    bias: Real[np.ndarray, "*#bias"] | None = None,
    keep: Bool[np.ndarray, "*#keep"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "..."], ...]:
    r"""Gradients by q, k and v: back through each product in turn.

    .. math:: dv = p^\top d\mathrm{out}, \quad
              dp = d\mathrm{out}\, v^\top, \quad
              dz = p \circ \Bigl(dp - \sum_j p_j\, dp_j\Bigr), \quad
              dq = \frac{dz\, k}{\sqrt d}, \quad
              dk = \frac{dz^\top q}{\sqrt d}

    ``dlse``, the gradient by lse, adds p ∘ dlse to dz. Dropout puts
    p ∘ keep/(1 - rate) for p in dv, and scales dp alike. Masks need no
    mention: there p = 0.

    Returns ``(dq, dk, dv)``; with ``bias``, of which only the shape is
    read, ``(dq, dk, dv, dbias)``: dz summed over what it was broadcast
    along.

    Shapes: as in attention_forward; each gradient as its array.

    ValueError: as there; and where dout, probs or dlse do not fit.

    Source: Dao et al. 2022, appendix B.2.
    """
    dout, q, k, v, probs = _backward_inputs(dout, q, k, v, probs)
    dv = weighted_sum(_dropped(probs, keep, rate).swapaxes(-1, -2), dout)
    dprobs = _dropped(dout @ v.swapaxes(-1, -2), keep, rate)
    dlogits = _logits_backward(dprobs, probs, dlse)
    dq = weighted_sum(dlogits, k) * _scale(q)
    dk = weighted_sum(dlogits.swapaxes(-1, -2), q) * _scale(q)
    if bias is None:
        return dq, dk, dv
    return dq, dk, dv, unbroadcast(dlogits, _as_bias(bias, probs.shape).shape)


def attention_backward_dropout(
    dout: Real[np.ndarray, "B H Nq d_v"],
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B H Nk d"],
    v: Real[np.ndarray, "B H Nk d_v"],
    probs: Real[np.ndarray, "B H Nq Nk"],
    keep: Bool[np.ndarray, "*#keep"],
    rate: float,
) -> tuple[
    Float[np.ndarray, "B H Nq d"],
    Float[np.ndarray, "B H Nk d"],
    Float[np.ndarray, "B H Nk d_v"],
]:
    r"""Gradients by q, k and v where the forward pass dropped weights.

    .. math:: w = \frac{\mathrm{keep}}{1 - \mathrm{rate}}, \quad
              dv = (p \circ w)^\top d\mathrm{out}, \quad
              dp = w \circ (d\mathrm{out}\, v^\top)

    and on as in attention_backward. ``keep`` is the forward's, ``probs``
    are those before dropout.

    Shapes: as in attention_backward; keep broadcasts to ``(B, H, Nq,
    Nk)``.

    ValueError: as there.
    """
    dq, dk, dv = attention_backward(dout, q, k, v, probs, keep=keep, rate=rate)
    return dq, dk, dv


# --- the steps --------------------------------------------------------------------------------


def _scale(q):
    return q.shape[-1] ** -0.5


def _dropped(x, keep, rate):
    _check_rate(rate)
    if keep is None:
        if rate:
            raise ValueError(f"keep: expected the mask that rate={rate} drew; got None")
        return x
    # keep * x would make NaN of a dropped inf.
    return np.where(_as_mask("keep", keep, x.shape), x * (1 / (1 - float(rate))), 0)


def _logits_backward(dprobs, probs, dlse):
    unseen = probs == 0
    # 0 * NaN is NaN: v is NaN where nothing attends to it. dprobs is
    # a fresh array here.
    np.copyto(dprobs, 0, where=unseen)
    dlogits = softmax_backward(dprobs, probs)
    if dlse is not None:
        dlse = as_float("dlse", dlse)
        check_shape("dlse", dlse, probs.shape[:3], f"to match probs {probs.shape}")
        dlogits += probs * dlse[..., None]
    # A NaN in a row of q reaches the keys that row may see, no others.
    np.copyto(dlogits, 0, where=unseen)
    return dlogits


# --- at the door ------------------------------------------------------------------------------


def _queries_keys(q, k):
    q, k = as_float("q", q), as_float("k", k)
    check_rank("q", q, "B H Nq d")
    if q.shape[-1] == 0:
        raise ValueError(f"q: expected a width d of at least 1; got shape {q.shape}")
    b, h, _, d = q.shape
    check_shape("k", k, (b, h, "Nk", d), f"to match q {q.shape}")
    return q, k


def _backward_inputs(dout, q, k, v, probs):
    q, k = _queries_keys(q, k)
    v, probs, dout = as_float("v", v), as_float("probs", probs), as_float("dout", dout)
    b, h, n_q, _ = q.shape
    n_k = k.shape[2]
    check_shape("v", v, (b, h, n_k, "d_v"), f"to match k {k.shape}")
    check_shape("probs", probs, (b, h, n_q, n_k), f"to match q {q.shape} and k {k.shape}")
    check_shape("dout", dout, (b, h, n_q, v.shape[-1]), f"to match q {q.shape} and v {v.shape}")
    return dout, q, k, v, probs


def _as_mask(name: str, mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = as_bool(name, mask)
    check_broadcasts(name, mask, shape, AXES)
    return mask


def _as_bias(bias: Any, shape: tuple[int, ...]) -> np.ndarray:
    bias = as_float("bias", bias)
    check_broadcasts("bias", bias, shape, AXES)
    return bias


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1); got {rate!r}")
