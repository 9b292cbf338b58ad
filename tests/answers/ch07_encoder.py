"""Chapter 7 in many hands."""

import numpy as np
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong
from attn_lessons import hunt
from attn_lessons.feedforward import ffn_backward, ffn_backward_cached, ffn_forward
from attn_lessons.multihead import (
    multihead_backward,
    multihead_backward_cached,
    multihead_forward,
)
from attn_lessons.normalization import layernorm_backward, layernorm_forward
from attn_lessons.transformer import (
    encoder_block_backward_cached,
    encoder_block_forward,
    from_torch_encoder_layer,
    to_torch_encoder_layer,
)

ATTENTION = ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo")
FFN = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")


def leaf(a):
    return torch.tensor(np.array(a, order="C"), requires_grad=True)


# ------------------------------------------------------------------------ encoder_block_backward


@right("encoder_block_backward")
def block_of_earlier_exercises(dout, x, params, n_heads, mask=None, norm="post"):
    own = [params[f"self_attn.{n}"] for n in ATTENTION]
    ffn = [params[n] for n in FFN]
    g1, b1 = params["norm1.weight"], params["norm1.bias"]
    g2, b2 = params["norm2.weight"], params["norm2.bias"]
    if norm == "post":
        s1 = x + multihead_forward(x, *own, n_heads, mask)[0]
        a = layernorm_forward(s1, g1, b1)
        s2 = a + ffn_forward(a, *ffn)[0]
        ds2, dg2, db2 = layernorm_backward(dout, s2, g2)
        da, gf = ffn_backward(ds2, a, *ffn)
        ds1, dg1, db1 = layernorm_backward(da + ds2, s1, g1)
        dx, ga = multihead_backward(ds1, x, *own, n_heads, mask)
        dx = dx + ds1
    else:
        y = layernorm_forward(x, g1, b1)
        a = x + multihead_forward(y, *own, n_heads, mask)[0]
        z = layernorm_forward(a, g2, b2)
        dz, gf = ffn_backward(dout, z, *ffn)
        da, dg2, db2 = layernorm_backward(dz, a, g2)
        da = da + dout
        dy, ga = multihead_backward(da, y, *own, n_heads, mask)
        dx, dg1, db1 = layernorm_backward(dy, x, g1)
        dx = dx + da
    grads = {f"self_attn.{n}": ga[n] for n in ATTENTION}
    grads |= dict(zip(FFN, (gf["w1"], gf["b1"], gf["w2"], gf["b2"]), strict=True))
    grads |= {"norm1.weight": dg1, "norm1.bias": db1, "norm2.weight": dg2, "norm2.bias": db2}
    return dx, grads


@right("encoder_block_backward")
def block_cached(dout, x, params, n_heads, mask=None, norm="post"):
    _, cache = encoder_block_forward(x, params, n_heads, mask, norm)
    return encoder_block_backward_cached(dout, cache)


def torch_attention(y, memory, p, h, mask, turned=False):
    """A query that may see nothing gets 0, as in the book."""
    d = p["wq"].shape[1] // h
    q, k, v = (
        (rows @ p[f"w{n}"] + p[f"b{n}"]).unflatten(-1, (-1, d)).transpose(1, 2)
        for n, rows in (("q", y), ("k", memory), ("v", memory))
    )
    if turned:
        q, k = torch_turned(q), torch_turned(k)
    k, v = (z.repeat_interleave(h // z.shape[1], dim=1) for z in (k, v))
    logits = q @ k.mT / d**0.5
    if mask is not None:
        seen = torch.tensor(np.array(mask)).expand(logits.shape)
        logits = logits.masked_fill(~seen, -torch.inf)
        logits = torch.where(seen.any(-1, keepdim=True), logits, 0)
        probs = torch.where(seen, logits.softmax(-1), 0)
    else:
        probs = logits.softmax(-1)
    return (probs @ v).transpose(1, 2).flatten(2) @ p["wo"] + p["bo"]


def torch_turned(z):
    n, d = z.shape[-2:]
    angle = torch.arange(n, dtype=z.dtype)[:, None] * 10000.0 ** (
        -torch.arange(0, d, 2, dtype=z.dtype) / d
    )
    one, two = z[..., 0::2], z[..., 1::2]
    pairs = (one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos())
    return torch.stack(pairs, dim=-1).flatten(-2)


def torch_norm(y, gamma, beta):
    return F.layer_norm(y, y.shape[-1:], gamma, beta)


def torch_feed(y, w1, b1, w2, b2):
    return F.gelu(y @ w1 + b1) @ w2 + b2


@right("encoder_block_backward")
def block_autograd(dout, x, params, n_heads, mask=None, norm="post"):
    p, h = {n: leaf(a) for n, a in params.items()}, leaf(x)
    own = {n: p[f"self_attn.{n}"] for n in ATTENTION}
    first, second = ((p[f"norm{i}.weight"], p[f"norm{i}.bias"]) for i in (1, 2))
    if norm == "pre":
        y = torch_norm(h, *first)
        a = h + torch_attention(y, y, own, n_heads, mask)
        out = a + torch_feed(torch_norm(a, *second), *(p[n] for n in FFN))
    else:
        a = torch_norm(h + torch_attention(h, h, own, n_heads, mask), *first)
        out = torch_norm(a + torch_feed(a, *(p[n] for n in FFN)), *second)
    out.backward(torch.tensor(np.array(dout, order="C")))
    return h.grad, {n: t.grad for n, t in p.items()}


@right("encoder_block_backward")
def block_by_torchs_own_layer(dout, x, params, n_heads, mask=None, norm="post"):
    """nn.TransformerEncoderLayer; where a query sees nothing, the first right answer."""
    b, n, c = x.shape
    if mask is not None and not np.broadcast_to(mask, (b, n_heads, n, n)).any(-1).all():
        return block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    layer = torch.nn.TransformerEncoderLayer(
        c,
        n_heads,
        params["linear1.bias"].size,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=norm == "pre",
        dtype=torch.float64,
    )
    state = {n: torch.tensor(a) for n, a in to_torch_encoder_layer(params).items()}
    layer.load_state_dict(state)
    given = leaf(x)
    hidden = None
    if mask is not None:
        seen = np.broadcast_to(mask, (b, n_heads, n, n)).reshape(-1, n, n)
        hidden = torch.tensor(~seen)
    layer(given, src_mask=hidden).backward(torch.tensor(np.array(dout, order="C")))
    grads = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    return given.grad, from_torch_encoder_layer(grads)


@right("encoder_block_backward")
def block_in_other_order(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = block_autograd(dout, x, params, n_heads, mask, norm)
    return [dx.tolist(), {n: grads[n].numpy().tolist() for n in sorted(grads, reverse=True)}]


@right("encoder_block_backward")
def block_in_place_on_own_arrays(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = np.zeros(x.shape), {n: np.zeros(p.shape) for n, p in params.items()}
    for b in range(len(x)):
        seen = mask
        if mask is not None and np.ndim(mask) == 4 and len(mask) > 1:
            seen = mask[b : b + 1]
        one = block_of_earlier_exercises(dout[b : b + 1], x[b : b + 1], params, n_heads, seen, norm)
        dx[b] += one[0][0]
        for n, g in one[1].items():
            grads[n] += g
    return dx, grads


@right("encoder_block_backward")
def block_float32(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    return dx.astype(np.float32), {n: g.astype(np.float32) for n, g in grads.items()}


@mutating("encoder_block_backward")
def block_writes_to_x(dout, x, params, n_heads, mask=None, norm="post"):
    found = block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    x += 1
    return found


@mutating("encoder_block_backward")
def block_writes_to_params(dout, x, params, n_heads, mask=None, norm="post"):
    found = block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    params["norm1.weight"] *= 2
    return found


@mutating("encoder_block_backward")
def block_writes_to_dout(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    dout[...] = dx
    return dout, grads


@wrong("encoder_block_backward")
def block_scales_the_attention(dout, x, params, n_heads, mask=None, norm="post"):
    """An odd factor on what reaches the attention."""
    half = {**params, "self_attn.wo": 0.9 * params["self_attn.wo"]}
    return block_of_earlier_exercises(dout, x, half, n_heads, mask, norm)


@wrong("encoder_block_backward")
def block_without_names(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    return dx, {n.split(".")[-1]: g for n, g in grads.items()}


@wrong("encoder_block_backward")
def block_leaves_the_norms_out(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)
    return dx, {n: g for n, g in grads.items() if not n.startswith("norm")}


@wrong("encoder_block_backward")
def block_knows_no_mask(dout, x, params, n_heads, mask, norm):
    return block_of_earlier_exercises(dout, x, params, n_heads, mask, norm)


# ------------------------------------------------------------------------------------ embeddings


@right("embedding_backward")
def embedding_added_at(dout, tokens, vocab):
    table = np.zeros((vocab, dout.shape[-1]))
    np.add.at(table, tokens, dout)
    return table


@right("embedding_backward")
def embedding_loops(dout, tokens, vocab):
    table = np.zeros((vocab, dout.shape[-1]))
    for b, sentence in enumerate(tokens):
        for n, token in enumerate(sentence):
            table[token] += dout[b, n]
    return table


@right("embedding_backward")
def embedding_by_product(dout, tokens, vocab):
    return np.einsum("bnv,bnc->vc", np.eye(vocab)[tokens], dout)


@right("embedding_backward")
def embedding_torch(dout, tokens, vocab):
    table = torch.zeros(vocab, dout.shape[-1], dtype=torch.float64, requires_grad=True)
    looked_up = F.embedding(torch.tensor(np.array(tokens)), table)
    looked_up.backward(torch.tensor(np.array(dout, dtype=float)))
    return table.grad


@right("embedding_backward")
def embedding_index_add(dout, tokens, vocab):
    rows = torch.tensor(np.array(dout, dtype=float)).flatten(0, 1)
    table = torch.zeros(vocab, rows.shape[1], dtype=rows.dtype)
    return table.index_add(0, torch.tensor(np.array(tokens)).flatten(), rows)


@right("embedding_backward")
def embedding_bincount(dout, tokens, vocab):
    flat = np.ravel(tokens)
    columns = [np.bincount(flat, dout[..., c].ravel(), vocab) for c in range(dout.shape[-1])]
    return np.stack(columns, axis=1).tolist()


@right("embedding_backward")
def embedding_token_by_token(dout, tokens, vocab):
    return [dout[tokens == v].sum(axis=0) for v in range(vocab)]


@mutating("embedding_backward")
def embedding_clears_dout(dout, tokens, vocab):
    table = embedding_added_at(dout, tokens, vocab)
    dout[:] = 0
    return table


@mutating("embedding_backward")
def embedding_shifts_tokens(dout, tokens, vocab):
    table = embedding_added_at(dout, tokens, vocab)
    tokens += 1
    return table


@wrong("embedding_backward")
def embedding_upside_down(dout, tokens, vocab):
    return embedding_added_at(dout, tokens, vocab)[::-1]


@wrong("embedding_backward")
def embedding_of_width_vocab(dout, tokens, vocab):
    return np.zeros((vocab, vocab))


@wrong("embedding_backward")
def embedding_absolute(dout, tokens, vocab):
    return embedding_added_at(abs(dout), tokens, vocab)


@right("padded_embedding_backward")
def padded_cleared(dout, tokens, vocab, padding):
    table = embedding_added_at(dout, tokens, vocab)
    table[padding] = 0
    return table


@right("padded_embedding_backward")
def padded_torch(dout, tokens, vocab, padding):
    table = torch.zeros(vocab, dout.shape[-1], dtype=torch.float64, requires_grad=True)
    looked_up = F.embedding(torch.tensor(np.array(tokens)), table, padding_idx=padding)
    looked_up.backward(torch.tensor(np.array(dout, dtype=float)))
    return table.grad


@right("padded_embedding_backward")
def padded_silenced(dout, tokens, vocab, padding):
    return embedding_added_at(np.where((tokens == padding)[..., None], 0, dout), tokens, vocab)


@right("padded_embedding_backward")
def padded_loops(dout, tokens, vocab, padding):
    table = np.zeros((vocab, dout.shape[-1]))
    for place in np.ndindex(tokens.shape):
        if tokens[place] != padding:
            table[tokens[place]] += dout[place]
    return table


@right("padded_embedding_backward")
def padded_product(dout, tokens, vocab, padding):
    hot = np.eye(vocab)[tokens]
    hot[..., padding] = 0
    return np.einsum("bnv,bnc->vc", hot, dout)


@right("padded_embedding_backward")
def padded_selected(dout, tokens, vocab, padding):
    table = np.zeros((vocab, dout.shape[-1]))
    real = tokens != padding
    np.add.at(table, tokens[real], dout[real])
    return table.tolist()


@mutating("padded_embedding_backward")
def padded_silences_dout(dout, tokens, vocab, padding):
    dout[tokens == padding] = 0
    tokens += 0
    table = embedding_added_at(dout, tokens, vocab)
    dout[:] = 7
    return table


@mutating("padded_embedding_backward")
def padded_shifts_tokens(dout, tokens, vocab, padding):
    table = padded_cleared(dout, tokens, vocab, padding)
    tokens += 1
    return table


@wrong("padded_embedding_backward")
def padded_doubled(dout, tokens, vocab, padding):
    return 2 * padded_cleared(dout, tokens, vocab, padding)


@wrong("padded_embedding_backward")
def padded_two_rows(dout, tokens, vocab, padding):
    table = padded_cleared(dout, tokens, vocab, padding)
    table[(padding + 1) % vocab] = 0
    return table


@wrong("padded_embedding_backward")
def padded_subtracted(dout, tokens, vocab, padding):
    table = embedding_added_at(dout, tokens, vocab)
    return table - table[padding]


# ---------------------------------------------------------------------------------- tied weights


@right("tied_output_backward")
def tied_plain(dlogits, hidden, table, dembedded, tokens):
    dtable = np.einsum("bnv,bnc->vc", dlogits, hidden).astype(float)
    np.add.at(dtable, tokens, dembedded)
    return dlogits @ table, dtable


@right("tied_output_backward")
def tied_products(dlogits, hidden, table, dembedded, tokens):
    hot = np.eye(len(table))[tokens].reshape(-1, len(table))
    of_output = dlogits.reshape(-1, len(table)).T @ hidden.reshape(-1, table.shape[1])
    return dlogits @ table, of_output + hot.T @ dembedded.reshape(-1, table.shape[1])


@right("tied_output_backward")
def tied_tensordot(dlogits, hidden, table, dembedded, tokens):
    dtable = np.tensordot(dlogits, hidden, axes=((0, 1), (0, 1))) + 0.0
    for v in range(len(table)):
        dtable[v] += dembedded[tokens == v].sum(axis=0)
    return np.einsum("bnv,vc->bnc", dlogits, table), dtable


@right("tied_output_backward")
def tied_autograd(dlogits, hidden, table, dembedded, tokens):
    """One graph in which the table is used twice, its middle cut out."""
    table, hidden = (leaf(np.asarray(a, float)) for a in (table, hidden))
    embedded = F.embedding(torch.tensor(np.array(tokens)), table)
    logits = hidden @ table.T
    upstream = [torch.tensor(np.array(a, dtype=float)) for a in (dembedded, dlogits)]
    torch.autograd.backward([embedded, logits], upstream)
    return hidden.grad, table.grad


@right("tied_output_backward")
def tied_embedding_first(dlogits, hidden, table, dembedded, tokens):
    dtable = np.zeros(table.shape)
    np.add.at(dtable, tokens, dembedded)
    dtable += dlogits.reshape(-1, len(table)).T @ hidden.reshape(-1, table.shape[1])
    return [dlogits @ table, dtable]


@right("tied_output_backward")
def tied_lists(dlogits, hidden, table, dembedded, tokens):
    dhidden, dtable = tied_plain(dlogits, hidden, table, dembedded, tokens)
    return dhidden.tolist(), dtable.tolist()


@mutating("tied_output_backward")
def tied_clears_hidden(dlogits, hidden, table, dembedded, tokens):
    found = tied_plain(dlogits, hidden, table, dembedded, tokens)
    hidden[:] = 0
    return found


@mutating("tied_output_backward")
def tied_trains_the_table(dlogits, hidden, table, dembedded, tokens):
    dhidden, dtable = tied_plain(dlogits, hidden, table, dembedded, tokens)
    table -= 0.1 * dtable.astype(table.dtype)
    return dhidden, dtable


@wrong("tied_output_backward")
def tied_embedding_doubled(dlogits, hidden, table, dembedded, tokens):
    return tied_plain(dlogits, hidden, table, 2 * dembedded, tokens)


@wrong("tied_output_backward")
def tied_scaled(dlogits, hidden, table, dembedded, tokens):
    dhidden, dtable = tied_plain(dlogits, hidden, table, dembedded, tokens)
    return dhidden * hidden.shape[-1] ** -0.5, dtable


@wrong("tied_output_backward")
def tied_exchanged(dlogits, hidden, table, dembedded, tokens):
    return tied_plain(dlogits, hidden, table, dembedded, tokens)[::-1]


# ---------------------------------------------------------------------------------- the bug hunt


def of(p, name):
    return {n.removeprefix(f"{name}."): a for n, a in p.items() if n.startswith(f"{name}.")}


def torch_block_1(x, p, h, mask):
    a = torch_norm(
        hunt.ALPHA * x + torch_attention(x, x, of(p, "self_attn"), h, mask), **of(p, "norm1")
    )
    return torch_norm(hunt.ALPHA * a + torch_feed(a, **of(p, "ffn")), **of(p, "norm2"))


def torch_block_2(x, p, h, mask, times=2, turned=False):
    for _ in range(times):
        y = torch_norm(x, **of(p, "norm1"))
        x = x + torch_attention(y, y, of(p, "self_attn"), h, mask, turned)
        x = x + torch_feed(torch_norm(x, **of(p, "norm2")), **of(p, "ffn"))
    return x


def torch_block_3(x, p, h, mask):
    return torch_block_2(x, p, h, mask, times=1, turned=True)


def torch_block_4(x, p, h, mask):
    y = F.rms_norm(x, x.shape[-1:], p["norm1.gamma"], 1e-5)
    a = x + torch_attention(y, y, of(p, "self_attn"), h, mask)
    y = F.rms_norm(a, x.shape[-1:], p["norm2.gamma"], 1e-5)
    return a + (F.silu(y @ p["ffn.w_gate"]) * (y @ p["ffn.w_up"])) @ p["ffn.w_down"]


def torch_block_5(x, memory, p, h, mask, memory_mask):
    y = torch_norm(x, **of(p, "norm1"))
    a = x + torch_attention(y, y, of(p, "self_attn"), h, mask)
    y = torch_norm(a, **of(p, "norm2"))
    b = a + torch_attention(y, memory, of(p, "cross_attn"), h, memory_mask)
    return b + torch_feed(torch_norm(b, **of(p, "norm3")), **of(p, "ffn"))


def torch_block_6(x, p, h, mask):
    y = torch_norm(x, **of(p, "norm"))
    return x + torch_attention(y, y, of(p, "self_attn"), h, mask) + torch_feed(y, **of(p, "ffn"))


TORCH = (torch_block_1, torch_block_2, torch_block_3, torch_block_4, torch_block_5, torch_block_6)


def by_autograd(number, dout, x, *rest):
    *memory, params, h = rest[: 3 if number == 5 else 2]
    masks = rest[3 if number == 5 else 2 :]
    inputs, p = [leaf(a) for a in (x, *memory)], {n: leaf(a) for n, a in params.items()}
    out = TORCH[number - 1](*inputs, p, h, *masks)
    out.backward(torch.tensor(np.array(dout, order="C")))
    return (*(t.grad for t in inputs), {n: t.grad for n, t in p.items()})


def enter_hunt(number):
    """Right answers, and answers that write where they should not, for one block."""

    def autograd(dout, x, *rest):
        return by_autograd(number, dout, x, *rest)

    def as_lists(dout, x, *rest):
        *dxs, grads = by_autograd(number, dout, x, *rest)
        return [*(d.numpy() for d in dxs), {n: g.tolist() for n, g in grads.items()}]

    def other_order(dout, x, *rest):
        *dxs, grads = by_autograd(number, dout, x, *rest)
        return (*dxs, {n: grads[n] for n in sorted(grads)})

    def in_single(dout, x, *rest):
        *dxs, grads = by_autograd(number, dout, x, *rest)
        return (*(d.float() for d in dxs), {n: g.float() for n, g in grads.items()})

    def sentence_by_sentence(dout, x, *rest):
        parts = []
        for b in range(len(x)):
            own = [
                a[b : b + 1] if isinstance(a, np.ndarray) and len(a) == len(x) else a for a in rest
            ]
            parts.append(by_autograd(number, dout[b : b + 1], x[b : b + 1], *own))
        *dxs, grads = zip(*parts, strict=True)
        total = {n: sum(g[n].numpy() for g in grads) for n in grads[0]}
        return (*(np.concatenate([d.numpy() for d in ds]) for ds in dxs), total)

    def in_two_halves(dout, x, *rest):
        """A gradient is linear in dout."""
        parts = [by_autograd(number, d, x, *rest) for d in (0.25 * dout, 0.75 * dout)]
        *dxs, grads = zip(*parts, strict=True)
        return (*(a + b for a, b in dxs), {n: grads[0][n] + grads[1][n] for n in grads[0]})

    def writes_to_x(dout, x, *rest):
        found = by_autograd(number, dout, x, *rest)
        x *= 2
        return found

    def writes_to_params(dout, x, *rest):
        found = by_autograd(number, dout, x, *rest)
        next(p for p in rest if isinstance(p, dict)).popitem()
        return found

    def half_of_dx(dout, x, *rest):
        dx, *others = by_autograd(number, dout, x, *rest)
        return (0.5 * dx, *others)

    def last_gradient_twice(dout, x, *rest):
        *dxs, grads = by_autograd(number, dout, x, *rest)
        name = list(grads)[-1]
        return (*dxs, grads | {name: 2 * grads[name]})

    for answer in (
        autograd,
        as_lists,
        other_order,
        in_single,
        sentence_by_sentence,
        in_two_halves,
    ):
        right(f"hunt_{number}")(answer)
    for answer in (writes_to_x, writes_to_params):
        mutating(f"hunt_{number}")(answer)
    for answer in (half_of_dx, last_gradient_twice):
        wrong(f"hunt_{number}")(answer)


for number in range(1, 7):
    enter_hunt(number)


@right("hunt_6")
def hunt_6_on_a_copy(dout, x, params, n_heads, mask=None):
    dx = np.array(dout)
    y = layernorm_forward(x, **of(params, "norm"))
    _, attn = multihead_forward(y, n_heads=n_heads, mask=mask, **of(params, "self_attn"))
    _, feed = ffn_forward(y, **of(params, "ffn"))
    dy, dattn = multihead_backward_cached(dx, attn)
    dfed, dfeed = ffn_backward_cached(dx, feed)
    dy += dfed
    below, dgamma, dbeta = layernorm_backward(dy, x, params["norm.gamma"])
    dx += below
    grads = hunt.named("self_attn", **dattn) | hunt.named("ffn", **dfeed)
    return dx, grads | hunt.named("norm", gamma=dgamma, beta=dbeta)
