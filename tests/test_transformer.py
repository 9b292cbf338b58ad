"""Blocks and whole models against torch's layers, torch autograd and finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generators

from attn_lessons import transformer
from attn_lessons.attention import causal_mask, padding_mask
from attn_lessons.gradcheck import numerical_gradient
from attn_lessons.transformer import (
    Config,
    classifier_backward,
    classifier_forward,
    classifier_loss,
    decoder_block_backward_cached,
    decoder_block_forward,
    embedding_backward,
    embedding_forward,
    encoder_block_backward,
    encoder_block_backward_cached,
    encoder_block_forward,
    from_torch_encoder_layer,
    init_classifier,
    init_encoder_block,
    init_language_model,
    language_model_backward,
    language_model_forward,
    language_model_loss,
    tied_output_backward,
    to_torch_encoder_layer,
)

EXACT = 1e-10
B, N, C, H, D_FF, V = 3, 5, 8, 2, 12, 11
NORMS = ["post", "pre"]


def agree(got, want, rtol=EXACT):
    got = np.asarray(got)
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
    assert got.shape == want.shape
    error = np.abs(got - want).max(initial=0)
    scale = np.abs(want).max(initial=0) or 1.0
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def agree_all(got, want, rtol=EXACT):
    """By name; a gradient that is zero but for rounding (keys' biases) is held to the largest."""
    assert set(got) == set(want)
    largest = max(float(np.abs(np.asarray(w)).max(initial=0)) for w in want.values())
    for name, g in got.items():
        w = np.asarray(want[name])
        assert g.shape == w.shape, name
        scale = max(np.abs(w).max(initial=0), 1e-4 * largest)
        error = np.abs(g - w).max(initial=0)
        assert error <= rtol * scale, f"{name} is off by {error:.3g} of {scale:.3g}"


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def leaf(x):
    return tensor(x, requires_grad=True)


def shaken(rng, params):
    """Gains away from 1 and biases away from 0: else their gradients' paths go unseen."""
    return {name: p + 0.3 * rng.normal(size=p.shape) for name, p in params.items()}


def block(rng, **options):
    return shaken(rng, init_encoder_block(rng, C, D_FF, **options))


# ------------------------------------------------------- the same block, written again in torch


def torch_attention(x, memory, p, prefix, mask, keep, rate):
    def heads(y):
        return y.reshape(*y.shape[:2], H, -1).transpose(1, 2)

    def project(y, letter):
        return y @ p[f"{prefix}.w{letter}"] + p[f"{prefix}.b{letter}"]

    q, k, v = heads(project(x, "q")), heads(project(memory, "k")), heads(project(memory, "v"))
    logits = q @ k.transpose(-1, -2) / (C // H) ** 0.5
    probs = logits.masked_fill(~tensor(mask), -torch.inf).softmax(-1)
    if keep is not None:
        probs = probs * tensor(keep) / (1 - rate)
    return project((probs @ v).transpose(1, 2).flatten(2), "o")


def torch_block(x, p, mask, norm, cache, rate=0.0, memory=None, memory_mask=None):
    """An encoder block, or with ``memory`` a decoder block, on the draws of our cache."""

    def dropped(y, keep):
        return y if keep is None else y * tensor(keep) / (1 - rate)

    def normed(y, i):
        return F.layer_norm(y, (C,), p[f"norm{i}.weight"], p[f"norm{i}.bias"])

    def feed(y):
        inner = cache.branches[-1].inner
        hidden = F.gelu(y @ p["linear1.weight"] + p["linear1.bias"])
        return dropped(hidden, inner.keep) @ p["linear2.weight"] + p["linear2.bias"]

    def attend(y):
        keep = cache.branches[0].inner.keep
        return torch_attention(y, y, p, "self_attn", mask, keep, rate)

    def read(y):
        keep = cache.branches[1].inner.keep
        return torch_attention(y, memory, p, "cross_attn", memory_mask, keep, rate)

    sublayers = [attend, feed] if memory is None else [attend, read, feed]
    for i, (f, branch) in enumerate(zip(sublayers, cache.branches, strict=True), 1):
        if norm == "pre":
            x = x + dropped(f(normed(x, i)), branch.keep)
        else:
            x = normed(x + dropped(f(x), branch.keep), i)
    return x


def gradients_of(p):
    return {name: x.grad.numpy() for name, x in p.items()}


# ------------------------------------------------------------------------------- encoder block


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("norm", NORMS)
def test_encoder_block_is_torchs_arithmetic(norm, rate):
    rng = np.random.default_rng(0)
    params, x, dout = block(rng), rng.normal(size=(B, N, C)), rng.normal(size=(B, N, C))
    mask = padding_mask(np.array([5, 3, 1]), N)
    out, cache = encoder_block_forward(x, params, H, mask, norm, rate=rate, rng=rng)
    dx, grads = encoder_block_backward_cached(dout, cache)
    p, xt = {name: leaf(w) for name, w in params.items()}, leaf(x)
    want = torch_block(xt, p, mask, norm, cache, rate)
    want.backward(tensor(dout))
    agree(out, want)
    agree(dx, xt.grad)
    agree_all(grads, gradients_of(p))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm", NORMS)
def test_encoder_block_is_torchs_layer(norm, activation):
    rng = np.random.default_rng(1)
    layer = torch.nn.TransformerEncoderLayer(
        C, H, D_FF, 0.0, activation, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    params = block(rng)
    layer.load_state_dict({n: tensor(a) for n, a in to_torch_encoder_layer(params).items()})
    x, dout, lengths = rng.normal(size=(B, N, C)), rng.normal(size=(B, N, C)), np.array([5, 2, 4])
    mask, xt = padding_mask(lengths, N), leaf(x)
    # torch's key_padding_mask says which keys are padding: the opposite of ours.
    want = layer(xt, src_key_padding_mask=tensor(~mask[:, 0, 0]))
    want.backward(tensor(dout))
    out, _ = encoder_block_forward(x, params, H, mask, norm, activation=activation)
    dx, grads = encoder_block_backward(dout, x, params, H, mask, norm, activation=activation)
    agree(out, want)
    agree(dx, xt.grad)
    theirs = {name: w.grad.numpy() for name, w in layer.named_parameters()}
    agree_all(to_torch_encoder_layer(grads), theirs)


def test_torchs_names_come_back():
    params = block(np.random.default_rng(2))
    again = from_torch_encoder_layer(to_torch_encoder_layer(params))
    assert set(again) == set(params)
    assert all(np.array_equal(again[n], params[n]) for n in params)


@pytest.mark.parametrize("norm", NORMS)
def test_encoder_block_by_finite_differences(norm):
    rng = np.random.default_rng(3)
    params, x, dout = block(rng), rng.normal(size=(2, 3, C)), rng.normal(size=(2, 3, C))
    dx, grads = encoder_block_backward(dout, x, params, H, None, norm)

    def loss(**changed):
        given_x = changed.pop("x", x)
        out, _ = encoder_block_forward(given_x, params | changed, H, None, norm)
        return float((out * dout).sum())

    agree(dx, numerical_gradient(lambda y: loss(x=y), x), 1e-7)
    for name in ("self_attn.wv", "linear1.weight", "norm1.weight", "norm2.bias", "self_attn.bo"):
        numeric = numerical_gradient(lambda w, name=name: loss(**{name: w}), params[name])
        agree(grads[name], numeric, 1e-7)


# What each forgotten path does to the gradient is seen by the tests above: here it is made so.
def no_skip(dout, cache, backward):
    dx, dgamma, dbeta, others = BRANCH(dout, cache, backward)
    if cache.norm == "pre":
        return dx - dout, dgamma, dbeta, others
    ds = transformer.layernorm_backward(dout, cache.norm_input, cache.gamma, cache.eps)[0]
    return dx - ds, dgamma, dbeta, others


def no_sublayer(dout, cache, backward):
    _, dgamma, dbeta, others = BRANCH(dout, cache, backward)
    if cache.norm == "pre":
        return dout, dgamma, dbeta, others
    ds = transformer.layernorm_backward(dout, cache.norm_input, cache.gamma, cache.eps)[0]
    return ds, dgamma, dbeta, others


def no_norm(dout, cache, backward):
    if cache.norm == "post":
        dinput, *others = backward(dout, cache.inner)
        return dout + dinput, *BRANCH(dout, cache, backward)[1:3], tuple(others)
    dnormed, *others = backward(dout, cache.inner)
    return dout + dnormed, *BRANCH(dout, cache, backward)[1:3], tuple(others)


BRANCH = transformer.branch_backward


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("forgotten", [no_skip, no_sublayer, no_norm])
@pytest.mark.parametrize("norm", NORMS)
def test_any_one_forgotten_path_shows(monkeypatch, norm, forgotten, which):
    """entrenar#313: the second skip's gradient was lost. Each of the six changes dx by percents."""
    rng = np.random.default_rng(4)
    params, x, dout = block(rng), rng.normal(size=(B, N, C)), rng.normal(size=(B, N, C))
    right, _ = encoder_block_backward(dout, x, params, H, None, norm)
    calls = []

    def broken(*arguments):
        calls.append(len(calls))
        function = forgotten if len(calls) - 1 == which else BRANCH
        return function(*arguments)

    monkeypatch.setattr(transformer, "branch_backward", broken)
    wrong, _ = encoder_block_backward(dout, x, params, H, None, norm)
    assert len(calls) == 2
    assert np.abs(wrong - right).max() > 0.05 * np.abs(right).max()


@settings(max_examples=25)
@given(st.data(), generators(), st.sampled_from(NORMS), st.sampled_from([np.float32, np.float64]))
def test_encoder_block_keeps_dtype_and_inputs(data, rng, norm, dtype):
    heads, width = data.draw(st.sampled_from([(1, 3), (2, 2), (3, 1)]))
    b, n, c = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4)), heads * width
    params = {k: w.astype(dtype) for k, w in init_encoder_block(rng, c, 5).items()}
    x, dout = (rng.normal(size=(b, n, c)).astype(dtype) for _ in range(2))
    held = [a.copy() for a in (x, dout, *params.values())]
    out, cache = encoder_block_forward(x, params, heads, causal_mask(n, n), norm)
    dx, grads = encoder_block_backward_cached(dout, cache)
    assert all(a.dtype == dtype for a in (out, dx, *grads.values()))
    assert dx.shape == x.shape
    assert {k: g.shape for k, g in grads.items()} == {k: w.shape for k, w in params.items()}
    now = (x, dout, *params.values())
    assert all(np.array_equal(a, b) for a, b in zip(held, now, strict=True))


def test_a_masked_sequence_leaves_its_batch_alone():
    rng = np.random.default_rng(5)
    params, x, dout = block(rng), rng.normal(size=(2, N, C)), rng.normal(size=(2, N, C))
    mask = padding_mask(np.array([N, 0]), N)
    dx, _ = encoder_block_backward(dout, x, params, H, mask, "pre")
    alone, _ = encoder_block_backward(dout[:1], x[:1], params, H, mask[:1], "pre")
    assert np.isfinite(dx).all()
    agree(dx[:1], alone)


# ------------------------------------------------------------------------------- decoder block


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("norm", NORMS)
def test_decoder_block_is_torchs_arithmetic(norm, rate):
    rng = np.random.default_rng(6)
    params, n_k = block(rng, n_attentions=2), 7
    x, memory = rng.normal(size=(B, N, C)), rng.normal(size=(B, n_k, C))
    dout, padding = rng.normal(size=(B, N, C)), padding_mask(np.array([7, 2, 4]), n_k)
    own = padding_mask(np.array([5, 4, 2]), N)
    out, cache = decoder_block_forward(x, memory, params, H, own, padding, norm, rate=rate, rng=rng)
    dx, dmemory, grads = decoder_block_backward_cached(dout, cache)
    p, xt, mt = {name: leaf(w) for name, w in params.items()}, leaf(x), leaf(memory)
    want = torch_block(xt, p, own & causal_mask(N, N), norm, cache, rate, mt, padding)
    want.backward(tensor(dout))
    agree(out, want)
    agree(dx, xt.grad)
    agree(dmemory, mt.grad)
    agree_all(grads, gradients_of(p))


@pytest.mark.parametrize("norm", NORMS)
def test_decoder_block_is_torchs_layer(norm):
    rng = np.random.default_rng(7)
    layer = torch.nn.TransformerDecoderLayer(
        C, H, D_FF, 0.0, "gelu", batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    params = block(rng, n_attentions=2)
    own = {n: p for n, p in params.items() if not n.startswith("cross_attn.")}
    cross = {n.replace("cross_", "self_"): p for n, p in params.items() if n.startswith("cross")}
    state = to_torch_encoder_layer(own) | {
        name.replace("self_attn", "multihead_attn"): a
        for name, a in to_torch_encoder_layer(own | cross).items()
        if name.startswith("self_attn")
    }
    state |= {name: params[name] for name in ("norm3.weight", "norm3.bias")}
    layer.load_state_dict({n: tensor(a) for n, a in state.items()})
    x, memory, dout = (rng.normal(size=(B, n, C)) for n in (N, 7, N))
    xt, mt = leaf(x), leaf(memory)
    blocked = torch.ones(N, N, dtype=torch.bool).triu(1)
    want = layer(xt, mt, tgt_mask=blocked)
    want.backward(tensor(dout))
    out, cache = decoder_block_forward(x, memory, params, H, norm=norm)
    dx, dmemory, _ = decoder_block_backward_cached(dout, cache)
    agree(out, want)
    agree(dx, xt.grad)
    agree(dmemory, mt.grad)


# ---------------------------------------------------------------------------------- embeddings


def test_repeated_tokens_accumulate():
    rng = np.random.default_rng(8)
    tokens, table = np.array([[2, 2, 0], [2, 1, 1]]), rng.normal(size=(4, 3))
    dout, t = rng.normal(size=(2, 3, 3)), leaf(table)
    F.embedding(tensor(tokens), t).backward(tensor(dout))
    got = embedding_backward(dout, tokens, 4)
    agree(got, t.grad)
    assert not got[3].any()
    agree(embedding_forward(table, tokens), table[tokens])
    t.grad = None
    F.embedding(tensor(tokens), t, padding_idx=2).backward(tensor(dout))
    agree(embedding_backward(dout, tokens, 4, padding=2), t.grad)


def test_tied_output_has_both_contributions():
    rng = np.random.default_rng(9)
    tokens, table = rng.integers(0, V, (B, N)), leaf(rng.normal(size=(V, C)))
    dlogits = rng.normal(size=(B, N, V))
    embedded = F.embedding(tensor(tokens), table)
    embedded.retain_grad()
    hidden = torch.tanh(embedded)
    hidden.retain_grad()
    (hidden @ table.T).backward(tensor(dlogits))
    dhidden, dtable = tied_output_backward(
        dlogits, hidden.detach().numpy(), table.detach().numpy(), embedded.grad.numpy(), tokens
    )
    agree(dhidden, hidden.grad)
    agree(dtable, table.grad)


# ------------------------------------------------------------------------------- whole models


def torch_trunk(x, p, config, mask, cache):
    x = x + p["position.weight"][: x.shape[1]]
    if cache.keep is not None:
        x = x * tensor(cache.keep) / (1 - cache.rate)
    for i, inner in enumerate(cache.blocks):
        part = {n.removeprefix(f"layers.{i}."): w for n, w in p.items()}
        x = torch_block(x, part, mask, config.norm, inner, cache.rate)
    return F.layer_norm(x, (C,), p["norm.weight"], p["norm.bias"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_language_model_is_torchs_arithmetic(norm, tied):
    """Two layers, dropout and masks on: parameter by parameter."""
    rng = np.random.default_rng(10)
    config = Config(2, C, H, D_FF, 9, norm)
    params = shaken(rng, init_language_model(rng, config, V, tied=tied))
    tokens, targets = rng.integers(0, V, (2, B, N))
    targets[0, 3:] = -100
    options = {"label_smoothing": 0.1, "ignore_index": -100, "rate": 0.2}
    loss, grads = language_model_loss(
        tokens, targets, params, config, rng=np.random.default_rng(5), **options
    )
    _, cache = language_model_forward(
        tokens, params, config, rate=0.2, rng=np.random.default_rng(5)
    )
    p = {name: leaf(w) for name, w in params.items()}
    hidden = torch_trunk(
        F.embedding(tensor(tokens), p["embed.weight"]), p, config, causal_mask(N, N), cache
    )
    logits = hidden @ p["embed.weight"].T if tied else hidden @ p["head.weight"] + p["head.bias"]
    want = F.cross_entropy(logits.flatten(0, 1), tensor(targets).flatten(), label_smoothing=0.1)
    want.backward()
    agree(loss, want)
    agree_all(grads, gradients_of(p), 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_classifier_is_torchs_arithmetic(norm):
    rng = np.random.default_rng(11)
    config = Config(2, C, H, D_FF, N, norm)
    params = shaken(rng, init_classifier(rng, config, 4, 6))
    x, targets = rng.normal(size=(B, N, 4)), rng.integers(0, 6, B)
    mask = padding_mask(np.array([5, 1, 3]), N)[:, 0, 0]
    seeds = [np.random.default_rng(6) for _ in range(2)]
    loss, grads = classifier_loss(
        x, targets, params, config, mask, label_smoothing=0.2, rate=0.2, rng=seeds[0]
    )
    _, cache = classifier_forward(x, params, config, mask, rate=0.2, rng=seeds[1])
    p = {name: leaf(w) for name, w in params.items()}
    embedded = tensor(x) @ p["input.weight"] + p["input.bias"]
    hidden = torch_trunk(embedded, p, config, mask[:, None, None, :], cache)
    weights = tensor(mask / mask.sum(1, keepdims=True))
    logits = (weights[..., None] * hidden).sum(1) @ p["head.weight"] + p["head.bias"]
    want = F.cross_entropy(logits, tensor(targets), label_smoothing=0.2)
    want.backward()
    agree(loss, want)
    agree_all(grads, gradients_of(p), 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_language_model_along_a_direction(norm):
    """By finite differences along one direction through all parameters at once."""
    rng = np.random.default_rng(12)
    config = Config(2, C, H, D_FF, N, norm)
    params = shaken(rng, init_language_model(rng, config, V))
    tokens, targets = rng.integers(0, V, (2, B, N))
    along = {name: rng.normal(size=p.shape) for name, p in params.items()}

    def loss(t):
        moved = {name: p + float(t[0]) * along[name] for name, p in params.items()}
        return float(
            language_model_loss(
                tokens, targets, moved, config, rate=0.1, rng=np.random.default_rng(1)
            )[0]
        )

    _, grads = language_model_loss(
        tokens, targets, params, config, rate=0.1, rng=np.random.default_rng(1)
    )
    slope = sum(float((grads[name] * along[name]).sum()) for name in params)
    agree(slope, numerical_gradient(loss, np.zeros(1))[0], 1e-7)


def test_a_language_model_does_not_see_the_future():
    rng = np.random.default_rng(13)
    config = Config(2, C, H, D_FF, N)
    params = shaken(rng, init_language_model(rng, config, V))
    tokens = rng.integers(0, V, (1, N))
    other = tokens.copy()
    other[0, 3:] = (other[0, 3:] + 1) % V
    a, b = (language_model_forward(t, params, config)[0] for t in (tokens, other))
    agree(a[:, :3], b[:, :3])
    assert np.abs(a[:, 3:] - b[:, 3:]).max() > 1e-3


def test_padding_changes_nothing_in_a_classifier():
    rng = np.random.default_rng(14)
    config = Config(2, C, H, D_FF, 9)
    params = shaken(rng, init_classifier(rng, config, 4, 6))
    x, mask = rng.normal(size=(1, 9, 4)), np.arange(9)[None] < 5
    short, _ = classifier_forward(x[:, :5], params, config)
    padded, cache = classifier_forward(x, params, config, mask)
    agree(padded, short)
    grads = classifier_backward(rng.normal(size=(1, 6)), cache)
    assert not grads["position.weight"][5:].any()


def test_the_same_seed_gives_the_same_model_and_the_same_dropout():
    config = Config(1, C, H, D_FF, N)
    first, again = (init_language_model(np.random.default_rng(3), config, V) for _ in range(2))
    assert all(np.array_equal(first[n], again[n]) for n in first)
    tokens = np.random.default_rng(0).integers(0, V, (2, N))
    a, b, c = (
        language_model_forward(tokens, first, config, rate=0.5, rng=np.random.default_rng(s))[0]
        for s in (1, 1, 2)
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_language_model_backward_is_that_of_its_loss():
    rng = np.random.default_rng(15)
    config = Config(1, C, H, D_FF, N)
    params = shaken(rng, init_language_model(rng, config, V))
    logits, cache = language_model_forward(rng.integers(0, V, (2, N)), params, config)
    dlogits = rng.normal(size=logits.shape)
    grads = language_model_backward(dlogits, cache)

    def loss(w):
        changed = params | {"embed.weight": w}
        out, _ = language_model_forward(cache.source, changed, config)
        return float((out * dlogits).sum())

    agree(grads["embed.weight"], numerical_gradient(loss, params["embed.weight"]), 1e-7)


# ----------------------------------------------------------------------------------- bad input

X = np.ones((2, 3, C))
CONFIG = Config(1, C, H, D_FF, 3)
MODEL = init_language_model(np.random.default_rng(0), CONFIG, V)
BLOCK = init_encoder_block(np.random.default_rng(0), C, D_FF)


def without(params, name):
    return {n: p for n, p in params.items() if n != name}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: encoder_block_forward(X, without(BLOCK, "linear1.bias"), H),
            r"params: expected an entry 'linear1.bias'; got ",
        ),
        (
            lambda: encoder_block_forward(X, BLOCK, H, norm="both"),
            r'norm: expected "post" or "pre"; got \'both\'',
        ),
        (
            lambda: encoder_block_forward(X, BLOCK, H, rate=0.1),
            r"rng: expected a generator to draw dropout of rate 0.1; got None",
        ),
        (lambda: encoder_block_forward(X[0], BLOCK, H), r"x: expected shape \(B, N, C\); got \(3"),
        (
            lambda: encoder_block_backward(X[:1], X, BLOCK, H),
            r"dout: expected shape \(2, 3, 8\).*got \(1, 3, 8\)",
        ),
        (
            lambda: embedding_forward(np.ones((4, 2)), np.array([[0.0]])),
            r"tokens: .* dtype float64",
        ),
        (
            lambda: embedding_forward(np.ones((4, 2)), np.array([[0, 4]])),
            r"tokens: expected 0 … 3, rows of the table; got 4 at \(0, 1\)",
        ),
        (
            lambda: embedding_backward(X, np.zeros((2, 2), int), 4),
            r"dout: expected shape \(2, 2, C",
        ),
        (
            lambda: language_model_forward(np.zeros((1, 4), int), MODEL, CONFIG),
            r"N: expected at most max_len = 3 tokens; got 4",
        ),
        (
            lambda: init_language_model(np.random.default_rng(0), CONFIG._replace(n_heads=3), V),
            r"config.n_heads: expected a divisor of d_model = 8; got 3",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
