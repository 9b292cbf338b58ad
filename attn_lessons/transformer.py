r"""Transformer blocks and whole models: forward, backward, loss.

Parameters are a flat dict from name to array, and so are their gradients. Weights stand on the
right, ``y = x @ w + b``, the transpose of what torch stores. A block's names are

- ``self_attn.wq`` … ``.wo`` ``(C, C)``, ``self_attn.bq`` … ``.bo`` ``(C,)``: as in multihead;
- in a decoder block ``cross_attn.`` likewise;
- ``linear1.weight`` ``(C, F)``, ``linear1.bias``, ``linear2.weight`` ``(F, C)``, ``linear2.bias``:
  the feed-forward layer;
- ``norm1.weight``, ``norm1.bias`` … ``(C,)``: the norm of each branch, in their order.

A model's are those of its blocks with ``layers.0.``, ``layers.1.``, … in front, and

- ``embed.weight`` ``(V, C)`` token embeddings, or ``input.weight`` ``(F_in, C)``, ``input.bias``;
- ``position.weight`` ``(N_max, C)`` learned positions;
- ``norm.weight``, ``norm.bias`` the final norm;
- ``head.weight`` ``(C, K)``, ``head.bias`` the output; a language model with tied weights has no
  head: its output matrix is the transposed embedding.

Masks, dtypes and errors are those of attention and multihead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from attn_lessons._arrays import as_count, as_float, check_rank, check_shape
from attn_lessons.attention import causal_mask, dropout_keep
from attn_lessons.feedforward import ffn_backward_cached, ffn_forward
from attn_lessons.multihead import (
    BIASES,
    WEIGHTS,
    cross_attention_backward_cached,
    cross_attention_forward,
    from_torch_mha,
    linear_backward,
    linear_forward,
    multihead_backward_cached,
    multihead_forward,
    to_torch_mha,
)
from attn_lessons.normalization import (
    dropout_backward,
    dropout_forward,
    layernorm_backward,
    layernorm_forward,
)
from attn_lessons.positions import learned_positions_backward, learned_positions_forward
from attn_lessons.softmax import cross_entropy

Params = Mapping[str, Any]
Gradients = dict[str, np.ndarray]
Norm = Literal["post", "pre"]

ATTENTION = WEIGHTS + BIASES
FEED_FORWARD = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")


# --- one branch: a sublayer, its residual connection and its norm -----------------------------


class BranchCache(NamedTuple):
    """What a branch's backward pass reads.

    - inner: the cache of the sublayer.
    - norm_input ``(B, N, C)``: x, or in a post-norm block the sum.
    - gamma ``(C,)``, eps: the norm's.
    - keep ``(B, N, C)`` or None, rate: the dropout after the sublayer.
    - norm: "post" or "pre".
    """

    inner: Any
    norm_input: Float[np.ndarray, "B N C"]
    gamma: Float[np.ndarray, C]
    eps: float
    keep: Bool[np.ndarray, "B N C"] | None
    rate: float
    norm: str


def branch_forward(
    x: Real[np.ndarray, "B N C"],
    sublayer: Callable[[np.ndarray], tuple[np.ndarray, Any]],
    gamma: Real[np.ndarray, C],
    beta: Real[np.ndarray, C],
    norm: Norm = "post",
    *,
    eps: float = 1e-5,
    keep: Bool[np.ndarray, "B N C"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "B N C"], BranchCache]:
    r"""A sublayer beside a skip path, normalised after or before.

    .. math:: \mathrm{post:}\; \operatorname{LN}(x + D(f(x))),
              \qquad
              \mathrm{pre:}\; x + D(f(\operatorname{LN}(x)))

    ``sublayer`` is f: it returns its output and its cache. D is dropout.

    Shapes: x and the result ``(B, N, C)``; returns ``(out, cache)``.

    ValueError: ``norm`` is unknown; shapes do not fit.

    Source: Vaswani et al. 2017, section 3.1 (post); Xiong et al. 2020,
    table 1 (both).
    """
    x = as_float("x", x)
    _check_norm(norm)
    normed = layernorm_forward(x, gamma, beta, eps) if norm == "pre" else x
    inner, cache = sublayer(normed)
    total = x + _maybe_dropped(inner, keep, rate)
    out = layernorm_forward(total, gamma, beta, eps) if norm == "post" else total
    norm_input = x if norm == "pre" else total
    return out, BranchCache(cache, norm_input, as_float("gamma", gamma), eps, keep, rate, norm)


def branch_backward(
    dout: Real[np.ndarray, "B N C"],
    cache: BranchCache,
    sublayer_backward: Callable[[np.ndarray, Any], tuple[Any, ...]],
) -> tuple[Float[np.ndarray, "B N C"], Float[np.ndarray, C], Float[np.ndarray, C], tuple[Any, ...]]:
    r"""Gradients of a branch: through the sublayer, and past it.

    .. math:: \mathrm{post:}\; ds = d\operatorname{LN}(d\mathrm{out}),
              \quad dx = ds + df(D\,ds)

    .. math:: \mathrm{pre:}\; dx = d\mathrm{out}
              + d\operatorname{LN}(df(D\,d\mathrm{out}))

    ``sublayer_backward(dy, cache)`` returns f's gradients, that by its
    input first. Returns ``(dx, dgamma, dbeta, others)``, others being
    what it returned besides.

    Shapes: dout and dx ``(B, N, C)``, dgamma and dbeta ``(C,)``.

    Source: the derivative of branch_forward's equation.
    """
    inner, norm_input, gamma, eps, keep, rate, norm = cache
    dout = as_float("dout", dout)
    check_shape("dout", dout, norm_input.shape, "to match the output")
    if norm == "post":
        dtotal, dgamma, dbeta = layernorm_backward(dout, norm_input, gamma, eps)
        dinput, *others = sublayer_backward(_maybe_dropped_backward(dtotal, keep, rate), inner)
        return dtotal + dinput, dgamma, dbeta, tuple(others)
    dnormed, *others = sublayer_backward(_maybe_dropped_backward(dout, keep, rate), inner)
    dx, dgamma, dbeta = layernorm_backward(dnormed, norm_input, gamma, eps)
    return dout + dx, dgamma, dbeta, tuple(others)


# --- blocks -----------------------------------------------------------------------------------


class BlockCache(NamedTuple):
    """The branches of a block in their order: attention(s), then feed-forward."""

    branches: tuple[BranchCache, ...]


def encoder_block_forward(
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    norm: Norm = "post",
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "B N C"], BlockCache]:
    r"""Self-attention, then a feed-forward layer, each with skip and norm.

    .. math:: a = \operatorname{branch}(x, \mathrm{attn}), \qquad
              \mathrm{out} = \operatorname{branch}(a, \mathrm{ffn})

    With ``rate`` > 0, ``rng`` draws what dropout keeps in the four
    places of torch's layer: the probabilities, the output of each
    sublayer, and the hidden activations. The cache has the draws.

    Shapes: x and the result ``(B, N, C)``, mask as in multihead;
    returns ``(out, cache)``.

    ValueError: a name is missing; shapes do not fit; ``norm`` is
    unknown; ``rate`` is given without ``rng``.

    Source: Vaswani et al. 2017, section 3.1 and figure 1.
    """
    x = _batch_of_tokens("x", x)
    draw = _drawer(rate, rng)

    def attend(y: np.ndarray) -> tuple[np.ndarray, Any]:
        keep = draw((x.shape[0], n_heads, x.shape[1], x.shape[1]))
        weights = _take(params, "self_attn", ATTENTION)
        return multihead_forward(y, n_heads=n_heads, mask=mask, keep=keep, rate=rate, **weights)

    def feed(y: np.ndarray) -> tuple[np.ndarray, Any]:
        return _feed_forward(y, params, activation, draw, rate)

    options: Any = {"eps": eps, "rate": rate}
    a, first = branch_forward(
        x, attend, *_pair(params, "norm1"), norm, keep=draw(x.shape), **options
    )
    out, second = branch_forward(
        a, feed, *_pair(params, "norm2"), norm, keep=draw(x.shape), **options
    )
    return out, BlockCache((first, second))


def encoder_block_backward_cached(
    dout: Real[np.ndarray, "B N C"], cache: BlockCache
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients by x and every parameter: the branches in reverse.

    Shapes: dout and dx ``(B, N, C)``; returns ``(dx, grads)``, grads
    with the names of the parameters.
    """
    first, second = cache.branches
    da, *norm2, (dffn,) = branch_backward(dout, second, ffn_backward_cached)
    dx, *norm1, (dattn,) = branch_backward(da, first, multihead_backward_cached)
    grads = _named("self_attn.", dattn) | _feed_forward_names(dffn)
    return dx, grads | _norm_names(1, norm1) | _norm_names(2, norm2)


def encoder_block_backward(
    dout: Real[np.ndarray, "B N C"],
    x: Real[np.ndarray, "B N C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    norm: Norm = "post",
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
) -> tuple[Float[np.ndarray, "B N C"], Gradients]:
    r"""Gradients of an encoder block from its arguments alone, no dropout.

    .. math:: (dx, d\theta) = d\mathrm{out} \cdot
              \frac{\partial\,\mathrm{out}}{\partial (x, \theta)}

    Shapes, errors: as in encoder_block_forward.
    """
    options: Any = {"activation": activation, "eps": eps}
    _, cache = encoder_block_forward(x, params, n_heads, mask, norm, **options)
    return encoder_block_backward_cached(dout, cache)


def decoder_block_forward(
    x: Real[np.ndarray, "B Nq C"],
    memory: Real[np.ndarray, "B Nk C"],
    params: Params,
    n_heads: int,
    mask: Bool[np.ndarray, "*#mask"] | None = None,
    memory_mask: Bool[np.ndarray, "*#memory_mask"] | None = None,
    norm: Norm = "post",
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "B Nq C"], BlockCache]:
    r"""Causal self-attention, attention to a memory, feed-forward.

    The self-attention is causal whatever ``mask`` says; mask (padding,
    say) takes away from it.

    Shapes: x and the result ``(B, Nq, C)``, memory ``(B, Nk, C)``,
    mask to ``(B, H, Nq, Nq)``, memory_mask to ``(B, H, Nq, Nk)``;
    returns ``(out, cache)``.

    ValueError: as in encoder_block_forward.

    Source: Vaswani et al. 2017, section 3.1 and figure 1.
    """
    x, memory = _batch_of_tokens("x", x), _batch_of_tokens("memory", memory)
    draw = _drawer(rate, rng)
    b, n_q, _ = x.shape
    causal = causal_mask(n_q, n_q) if mask is None else causal_mask(n_q, n_q) & mask

    def attend(y: np.ndarray) -> tuple[np.ndarray, Any]:
        keep = draw((b, n_heads, n_q, n_q))
        weights = _take(params, "self_attn", ATTENTION)
        return multihead_forward(y, n_heads=n_heads, mask=causal, keep=keep, rate=rate, **weights)

    def read(y: np.ndarray) -> tuple[np.ndarray, Any]:
        keep = draw((b, n_heads, n_q, memory.shape[1]))
        weights = _take(params, "cross_attn", ATTENTION)
        return cross_attention_forward(
            y, memory, n_heads=n_heads, mask=memory_mask, keep=keep, rate=rate, **weights
        )

    def feed(y: np.ndarray) -> tuple[np.ndarray, Any]:
        return _feed_forward(y, params, activation, draw, rate)

    branches = []
    for number, sublayer in enumerate((attend, read, feed), 1):
        gamma, beta = _pair(params, f"norm{number}")
        x, cache = branch_forward(
            x, sublayer, gamma, beta, norm, eps=eps, keep=draw(x.shape), rate=rate
        )
        branches.append(cache)
    return x, BlockCache(tuple(branches))


def decoder_block_backward_cached(
    dout: Real[np.ndarray, "B Nq C"], cache: BlockCache
) -> tuple[Float[np.ndarray, "B Nq C"], Float[np.ndarray, "B Nk C"], Gradients]:
    r"""Gradients by x, the memory and every parameter.

    Shapes: dout and dx ``(B, Nq, C)``, dmemory ``(B, Nk, C)``; returns
    ``(dx, dmemory, grads)``.
    """
    first, second, third = cache.branches
    db, *norm3, (dffn,) = branch_backward(dout, third, ffn_backward_cached)
    da, *norm2, (dmemory, dcross) = branch_backward(db, second, cross_attention_backward_cached)
    dx, *norm1, (dself,) = branch_backward(da, first, multihead_backward_cached)
    grads = _named("self_attn.", dself) | _named("cross_attn.", dcross) | _feed_forward_names(dffn)
    norms = _norm_names(1, norm1) | _norm_names(2, norm2) | _norm_names(3, norm3)
    return dx, dmemory, grads | norms


# --- embeddings -------------------------------------------------------------------------------


def embedding_forward(
    table: Real[np.ndarray, "V C"], tokens: Integer[np.ndarray, "B N"]
) -> Float[np.ndarray, "B N C"]:
    r"""One row of the table for each token.

    .. math:: x_{bn} = E_{t_{bn}}

    Shapes: table ``(V, C)``, tokens ``(B, N)`` in 0 … V-1; the result
    ``(B, N, C)``.

    ValueError: tokens are no integers, or out of range.
    """
    table = as_float("table", table)
    check_rank("table", table, "V C")
    return table[_tokens(tokens, len(table))]


def embedding_backward(
    dout: Real[np.ndarray, "B N C"],
    tokens: Integer[np.ndarray, "B N"],
    vocab: int,
    *,
    padding: int | None = None,
) -> Float[np.ndarray, "V C"]:
    r"""Gradient by the table: a token's row collects all its places.

    .. math:: dE_v = \sum_{b,n} [\,t_{bn} = v\,]\, d\mathrm{out}_{bn}

    The row of the token ``padding`` stays 0, as torch's
    ``padding_idx`` has it.

    Shapes: dout ``(B, N, C)``, tokens ``(B, N)`` to ``(vocab, C)``.

    ValueError: dout does not match tokens; tokens are no integers or
    not in 0 … vocab-1.
    """
    dout, vocab = as_float("dout", dout), as_count("vocab", vocab, 1)
    tokens = _tokens(tokens, vocab)
    check_shape("dout", dout, (*tokens.shape, "C"), f"to match tokens {tokens.shape}")
    dtable = learned_positions_backward(dout, tokens, vocab)
    if padding is not None:
        dtable[padding] = 0
    return dtable


def tied_output_backward(
    dlogits: Real[np.ndarray, "B N V"],
    hidden: Real[np.ndarray, "B N C"],
    table: Real[np.ndarray, "V C"],
    dembedded: Real[np.ndarray, "B N C"],
    tokens: Integer[np.ndarray, "B N"],
) -> tuple[Float[np.ndarray, "B N C"], Float[np.ndarray, "V C"]]:
    r"""Gradients where the embedding is the output matrix as well.

    .. math:: \mathrm{logits} = h E^\top, \quad x_{bn} = E_{t_{bn}}
              \;\Rightarrow\;
              dh = d\mathrm{logits}\, E, \quad
              dE_v = \sum_{b,n} d\mathrm{logits}_{bnv}\, h_{bn}
              + \sum_{b,n} [\,t_{bn} = v\,]\, dx_{bn}

    ``dembedded`` is dx, which is known only once the backward pass has
    come down to the embedding. Returns ``(dhidden, dtable)``.

    Shapes: dlogits ``(B, N, V)``, hidden, dembedded and dhidden
    ``(B, N, C)``, tokens ``(B, N)``, table and dtable ``(V, C)``.

    ValueError: shapes do not fit; tokens are out of range.

    Source: Press & Wolf 2017, section 2; Inan et al. 2017.
    """
    table = as_float("table", table)
    check_rank("table", table, "V C")
    dhidden, dout_matrix, _ = linear_backward(dlogits, hidden, table.T)
    return dhidden, dout_matrix.T + embedding_backward(dembedded, tokens, len(table))


# --- models -----------------------------------------------------------------------------------


class Config(NamedTuple):
    """The sizes of a model and the choices that its parameters do not show."""

    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    max_len: int
    norm: Norm = "pre"
    activation: str = "gelu"
    eps: float = 1e-5


class ModelCache(NamedTuple):
    """What a model's backward pass reads.

    - source: the tokens ``(B, N)``, or the features ``(B, N, F_in)``.
    - blocks: one cache a layer.
    - keep, rate: the dropout on the embedded input.
    - final_input, hidden ``(B, N, C)``: before and after the final norm.
    - mask: which tokens count in a classifier's mean, or None.
    - params, config: as given.
    """

    source: Any
    blocks: tuple[BlockCache, ...]
    keep: Any
    rate: float
    final_input: Float[np.ndarray, "B N C"]
    hidden: Float[np.ndarray, "B N C"]
    mask: Any
    params: Params
    config: Config


def language_model_forward(
    tokens: Integer[np.ndarray, "B N"],
    params: Params,
    config: Config,
    *,
    rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "B N V"], ModelCache]:
    r"""Logits of the next token at every place of a sequence.

    .. math:: h = \operatorname{LN}(\operatorname{blocks}(E_t + P)),
              \qquad \mathrm{logits} = h E^\top
              \;\mathrm{or}\; h W + b

    The blocks are encoder blocks under a causal mask. The output is
    tied where there is no ``head.weight``.

    Shapes: tokens ``(B, N)``, the logits ``(B, N, V)``; returns
    ``(logits, cache)``.

    ValueError: a name is missing; N is more than ``max_len``; tokens
    are out of range.

    Source: Radford et al. 2018, eq. (2).
    """
    x = embedding_forward(params["embed.weight"], tokens)
    mask = causal_mask(x.shape[1], x.shape[1])
    cache = _trunk_forward(tokens, x, params, config, mask, None, rate, rng)
    if _is_tied(params):
        return linear_forward(cache.hidden, as_float("embed", params["embed.weight"]).T), cache
    return linear_forward(cache.hidden, *_pair(params, "head")), cache


def language_model_backward(dlogits: Real[np.ndarray, "B N V"], cache: ModelCache) -> Gradients:
    r"""Gradients of a language model by every parameter.

    Shapes: dlogits ``(B, N, V)``; each gradient as its parameter.
    """
    params, tokens = cache.params, cache.source
    table = as_float("embed.weight", params["embed.weight"])
    if not _is_tied(params):
        dhidden, dw, db = linear_backward(dlogits, cache.hidden, params["head.weight"])
        dx, grads = _trunk_backward(dhidden, cache)
        dtable = embedding_backward(dx, tokens, len(table))
        return grads | {"embed.weight": dtable, "head.weight": dw, "head.bias": db}
    dx, grads = _trunk_backward(linear_backward(dlogits, cache.hidden, table.T)[0], cache)
    _, dtable = tied_output_backward(dlogits, cache.hidden, table, dx, tokens)
    return grads | {"embed.weight": dtable}


def language_model_loss(
    tokens: Integer[np.ndarray, "B N"],
    targets: Integer[np.ndarray, "B N"],
    params: Params,
    config: Config,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[np.floating, Gradients]:
    r"""Mean cross-entropy over all tokens, and its gradients.

    Shapes: tokens and targets ``(B, N)``; returns ``(loss, grads)``.

    ValueError: as language_model_forward and cross_entropy.
    """
    logits, cache = language_model_forward(tokens, params, config, rate=rate, rng=rng)
    targets = np.asarray(targets)
    check_shape("targets", targets, logits.shape[:2], f"to match tokens {logits.shape[:2]}")
    loss, dlogits = cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        label_smoothing,
        ignore_index=ignore_index,
    )
    return loss, language_model_backward(dlogits.reshape(logits.shape), cache)


def classifier_forward(
    x: Real[np.ndarray, "B N F_in"],
    params: Params,
    config: Config,
    mask: Bool[np.ndarray, "B N"] | None = None,
    *,
    rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[Float[np.ndarray, "B K"], ModelCache]:
    r"""Class logits of a sequence of features.

    .. math:: h = \operatorname{LN}(\operatorname{blocks}(xW_i + b_i + P)),
              \qquad \mathrm{logits} =
              \Bigl(\frac1n \sum_n h_n\Bigr) W + b

    Shapes: x ``(B, N, F_in)``, the logits ``(B, K)``; mask ``(B, N)``,
    True = a token, to be attended to and counted in the mean; returns
    ``(logits, cache)``.

    ValueError: a name is missing; N is more than ``max_len``; shapes do
    not fit.
    """
    x = _batch_of_tokens("x", x)
    embedded = linear_forward(x, *_pair(params, "input"))
    keys = None if mask is None else np.asarray(mask)[:, None, None, :]
    cache = _trunk_forward(x, embedded, params, config, keys, mask, rate, rng)
    pooled = (_token_weights(cache)[:, None, :] @ cache.hidden)[:, 0]
    return linear_forward(pooled, *_pair(params, "head")), cache


def classifier_backward(dlogits: Real[np.ndarray, "B K"], cache: ModelCache) -> Gradients:
    r"""Gradients of a classifier by every parameter.

    Shapes: dlogits ``(B, K)``; each gradient as its parameter.
    """
    weights = _token_weights(cache)
    pooled = (weights[:, None, :] @ cache.hidden)[:, 0]
    dpooled, dw, db = linear_backward(dlogits, pooled, cache.params["head.weight"])
    dx, grads = _trunk_backward(weights[..., None] * dpooled[:, None, :], cache)
    _, dw_in, db_in = linear_backward(dx, cache.source, cache.params["input.weight"])
    ends = {"input.weight": dw_in, "input.bias": db_in, "head.weight": dw, "head.bias": db}
    return grads | ends


def classifier_loss(
    x: Real[np.ndarray, "B N F_in"],
    targets: Integer[np.ndarray, B],
    params: Params,
    config: Config,
    mask: Bool[np.ndarray, "B N"] | None = None,
    *,
    label_smoothing: float = 0.0,
    rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> tuple[np.floating, Gradients]:
    r"""Mean cross-entropy over the batch, and its gradients.

    Shapes: x ``(B, N, F_in)``, targets ``(B,)``; returns ``(loss,
    grads)``.

    ValueError: as classifier_forward and cross_entropy.
    """
    logits, cache = classifier_forward(x, params, config, mask, rate=rate, rng=rng)
    loss, dlogits = cross_entropy(logits, targets, label_smoothing)
    return loss, classifier_backward(dlogits, cache)


def _trunk_forward(source, x, params, config, attention_mask, token_mask, rate, rng):
    """Positions, dropout, blocks and final norm: what both models share."""
    config = _checked_config(config)
    if x.shape[1] > config.max_len:
        raise ValueError(f"N: expected at most max_len = {config.max_len} tokens; got {x.shape[1]}")
    table = as_float("position.weight", params["position.weight"])
    keep = _drawer(rate, rng)(x.shape)
    h = _maybe_dropped(x + learned_positions_forward(table, np.arange(x.shape[1])), keep, rate)
    blocks = []
    for i in range(config.n_layers):
        h, block = encoder_block_forward(
            h,
            _prefixed(params, f"layers.{i}."),
            config.n_heads,
            attention_mask,
            config.norm,
            activation=config.activation,
            eps=config.eps,
            rate=rate,
            rng=rng,
        )
        blocks.append(block)
    hidden = layernorm_forward(h, *_pair(params, "norm"), config.eps)
    return ModelCache(source, tuple(blocks), keep, rate, h, hidden, token_mask, params, config)


def _trunk_backward(dhidden, cache):
    """Gradient by the embedded input, and those of positions, blocks and final norm."""
    gamma = as_float("norm.weight", cache.params["norm.weight"])
    dx, dgamma, dbeta = layernorm_backward(dhidden, cache.final_input, gamma, cache.config.eps)
    grads = {"norm.weight": dgamma, "norm.bias": dbeta}
    for i in reversed(range(len(cache.blocks))):
        dx, block = encoder_block_backward_cached(dx, cache.blocks[i])
        grads |= _named(f"layers.{i}.", block)
    dx = _maybe_dropped_backward(dx, cache.keep, cache.rate)
    rows = len(cache.params["position.weight"])
    positions = np.arange(dx.shape[1])
    grads["position.weight"] = learned_positions_backward(dx, positions, rows)
    return dx, grads


def _token_weights(cache):
    """(B, N): the share of each token in the mean; a sequence without tokens has none."""
    shape, dtype = cache.hidden.shape[:2], cache.hidden.dtype
    counted = np.ones(shape, bool) if cache.mask is None else np.asarray(cache.mask)
    return counted / np.maximum(counted.sum(axis=1, keepdims=True), 1).astype(dtype)


# --- parameters -------------------------------------------------------------------------------


def init_encoder_block(
    rng: np.random.Generator, d_model: int, d_ff: int, *, n_attentions: int = 1
) -> dict[str, np.ndarray]:
    r"""Parameters of a new block: Xavier-uniform weights, biases 0, gains 1.

    .. math:: w \sim U(-a, a), \qquad a = \sqrt{6 / (C_{in} + C_{out})}

    ``n_attentions=2`` adds the cross-attention and the third norm of a
    decoder block.

    Shapes: as in the module's docstring, C = ``d_model``, F = ``d_ff``.

    ValueError: a size is less than 1.

    Source: Glorot & Bengio 2010, eq. (16).
    """
    c, f = as_count("d_model", d_model, 1), as_count("d_ff", d_ff, 1)
    params: dict[str, np.ndarray] = {}
    for attention in ("self_attn", "cross_attn")[:n_attentions]:
        params |= {f"{attention}.{name}": _xavier(rng, c, c) for name in WEIGHTS}
        params |= {f"{attention}.{name}": np.zeros(c) for name in BIASES}
    params |= {"linear1.weight": _xavier(rng, c, f), "linear1.bias": np.zeros(f)}
    params |= {"linear2.weight": _xavier(rng, f, c), "linear2.bias": np.zeros(c)}
    for number in range(1, n_attentions + 2):
        params |= {f"norm{number}.weight": np.ones(c), f"norm{number}.bias": np.zeros(c)}
    return params


def init_language_model(
    rng: np.random.Generator, config: Config, vocab: int, *, tied: bool = True
) -> dict[str, np.ndarray]:
    r"""Parameters of a new language model; embeddings are N(0, 0.02²).

    Shapes: as in the module's docstring, V = ``vocab``.

    ValueError: a size is less than 1; ``n_heads`` does not divide
    ``d_model``.

    Source: the embeddings' scale: Radford et al. 2018, section 4.1.
    """
    config, vocab = _checked_config(config), as_count("vocab", vocab, 1)
    params = {"embed.weight": 0.02 * rng.normal(size=(vocab, config.d_model))}
    params |= _init_trunk(rng, config)
    if not tied:
        params |= {"head.weight": _xavier(rng, config.d_model, vocab)}
        params |= {"head.bias": np.zeros(vocab)}
    return params


def init_classifier(
    rng: np.random.Generator, config: Config, n_features: int, n_classes: int
) -> dict[str, np.ndarray]:
    r"""Parameters of a new classifier of sequences of features.

    Shapes: as in the module's docstring, F_in = ``n_features``, K =
    ``n_classes``.

    ValueError: as init_language_model.
    """
    config = _checked_config(config)
    n_features = as_count("n_features", n_features, 1)
    n_classes = as_count("n_classes", n_classes, 1)
    params = {"input.weight": _xavier(rng, n_features, config.d_model)}
    params |= {"input.bias": np.zeros(config.d_model)} | _init_trunk(rng, config)
    params |= {"head.weight": _xavier(rng, config.d_model, n_classes)}
    return params | {"head.bias": np.zeros(n_classes)}


def _init_trunk(rng, config):
    params = {"position.weight": 0.02 * rng.normal(size=(config.max_len, config.d_model))}
    for i in range(config.n_layers):
        params |= _named(f"layers.{i}.", init_encoder_block(rng, config.d_model, config.d_ff))
    return params | {"norm.weight": np.ones(config.d_model), "norm.bias": np.zeros(config.d_model)}


def _xavier(rng, n_in, n_out):
    bound = (6 / (n_in + n_out)) ** 0.5
    return rng.uniform(-bound, bound, (n_in, n_out))


def to_torch_encoder_layer(params: Params) -> dict[str, np.ndarray]:
    r"""An encoder block's parameters in nn.TransformerEncoderLayer's state_dict.

    .. math:: \mathrm{linear1.weight}_{torch} = \mathrm{linear1.weight}^\top

    and self_attn as in to_torch_mha; norms have the same names.

    ValueError: a name is missing; and as to_torch_mha.
    """
    attention = to_torch_mha(_take(params, "self_attn", ATTENTION))
    state = _named("self_attn.", attention)
    for name in (*FEED_FORWARD, "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        state[name] = as_float(name, _entry(params, name)).T.copy()
    return state


def from_torch_encoder_layer(state: Params) -> dict[str, np.ndarray]:
    r"""An encoder block's parameters from nn.TransformerEncoderLayer's state_dict.

    The arrays are copies.

    ValueError: a name is missing; and as from_torch_mha.
    """
    arrays = {name: np.asarray(value) for name, value in state.items()}
    params = _named("self_attn.", from_torch_mha(_prefixed(arrays, "self_attn.")))
    for name in (*FEED_FORWARD, "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        params[name] = as_float(name, _entry(arrays, name)).T.copy()
    return params


# --- the pieces -------------------------------------------------------------------------------


def _feed_forward(y, params, activation, draw, rate):
    w1, b1, w2, b2 = (_entry(params, name) for name in FEED_FORWARD)
    keep = draw((*y.shape[:-1], np.shape(w1)[1]))
    return ffn_forward(y, w1, b1, w2, b2, activation=activation, keep=keep, rate=rate)


def _feed_forward_names(grads):
    return dict(zip(FEED_FORWARD, (grads[name] for name in ("w1", "b1", "w2", "b2")), strict=True))


def _pair(params: Params, prefix: str) -> tuple[Any, Any]:
    return _entry(params, f"{prefix}.weight"), _entry(params, f"{prefix}.bias")


def _norm_names(number, gradients):
    return dict(zip((f"norm{number}.weight", f"norm{number}.bias"), gradients, strict=True))


def _named(prefix: str, arrays: Params) -> dict[str, Any]:
    return {prefix + name: array for name, array in arrays.items()}


def _prefixed(params: Params, prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}


def _take(params: Params, prefix: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: _entry(params, f"{prefix}.{name}") for name in names}


def _entry(params: Params, name: str) -> Any:
    if name not in params:
        raise ValueError(f"params: expected an entry {name!r}; got {_listed(params)}")
    return params[name]


def _listed(params: Params) -> str:
    names = sorted(params)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more or "none"


def _is_tied(params: Params) -> bool:
    return "head.weight" not in params


def _drawer(rate: float, rng: np.random.Generator | None) -> Callable[[tuple[int, ...]], Any]:
    """A function that draws a dropout mask, or None where nothing is dropped."""
    if rate == 0:
        return lambda shape: None
    if rng is None:
        raise ValueError(f"rng: expected a generator to draw dropout of rate {rate}; got None")
    return lambda shape: dropout_keep(rng, shape, rate)


def _maybe_dropped(x, keep, rate):
    return x if keep is None else dropout_forward(x, keep, rate)


def _maybe_dropped_backward(dx, keep, rate):
    return dx if keep is None else dropout_backward(dx, keep, rate)


def _check_norm(norm: str) -> None:
    if norm not in ("post", "pre"):
        raise ValueError(f'norm: expected "post" or "pre"; got {norm!r}')


def _checked_config(config: Config) -> Config:
    for name in ("n_layers", "d_model", "n_heads", "d_ff", "max_len"):
        as_count(f"config.{name}", getattr(config, name), 0 if name == "n_layers" else 1)
    if config.d_model % config.n_heads:
        raise ValueError(
            f"config.n_heads: expected a divisor of d_model = {config.d_model}; "
            f"got {config.n_heads}"
        )
    _check_norm(config.norm)
    return config


def _batch_of_tokens(name: str, x: Any) -> np.ndarray:
    x = as_float(name, x)
    check_rank(name, x, "B N C")
    return x


def _tokens(tokens: Any, vocab: int) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected integers; got dtype {tokens.dtype}")
    wrong = (tokens < 0) | (tokens >= vocab)
    if wrong.any():
        where = np.unravel_index(int(wrong.argmax()), tokens.shape)
        at = tuple(int(i) for i in where)
        raise ValueError(
            f"tokens: expected 0 … {vocab - 1}, rows of the table; got {tokens[where]} at {at}"
        )
    return tokens
