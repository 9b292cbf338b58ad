r"""Attention in tiles: partial softmaxes, merged, forward and backward, in NumPy.

Queries and keys are cut into blocks, and one block of logits exists at a time. What is kept for
the backward pass is the output and one number a row, the log-sum-exp. The conventions are
attention's, and besides:

- q is ``(B, H, Nq, d)``, k ``(B, Hkv, Nk, d)``, v ``(B, Hkv, Nk, d_v)``. Hkv divides H, and
  neighbouring heads of q share one of k and v (grouped heads).
- ``causal`` is aligned bottom-right: query i sees the keys j ≤ i + Nk - Nq. ``lengths`` holds how
  many keys of each batch entry are tokens; the rest is padding. The two are taken together:
  padding does not move the diagonal.
- A query that sees no key has output 0, log-sum-exp ``-inf`` and gradient 0. Keys that a query
  does not see may hold anything, NaN too.
- The last blocks may be shorter than the others, in both directions.
- Sums are taken in the inputs' own precision. float16 is computed in float32 and rounded at the
  end; its log-sum-exp stays float32.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Real

from attn_lessons._arrays import as_count, as_float, check_rank, check_shape, weighted_sum
from attn_lessons.attention import padding_mask

# A tile of 512 x 512 in float32 is 1 MiB, which the processor keeps in
# its cache; larger and smaller ones were slower, forward and backward.
BLOCK = 512

# Hidden keys may hold anything: inf - inf and 0 * inf are met on the way.
_quiet = np.errstate(all="ignore")


# --- merging ----------------------------------------------------------------------------------


@_quiet
def merge_softmax_blocks(
    m1: Real[np.ndarray, "*rows"],
    l1: Real[np.ndarray, "*rows"],
    o1: Real[np.ndarray, "*rows d_v"],
    m2: Real[np.ndarray, "*rows"],
    l2: Real[np.ndarray, "*rows"],
    o2: Real[np.ndarray, "*rows d_v"],
) -> tuple[
    Float[np.ndarray, "*rows"],
    Float[np.ndarray, "*rows"],
    Float[np.ndarray, "*rows d_v"],
]:
    r"""Two softmaxes over different keys, made one over all of them.

    .. math:: m = \max(m_1, m_2), \qquad
              l = e^{m_1 - m} l_1 + e^{m_2 - m} l_2, \qquad
              o = e^{m_1 - m} o_1 + e^{m_2 - m} o_2

    A part is the maximum m of its logits z, the sum l of :math:`e^{z - m}`
    and the sum o of :math:`e^{z - m} v`, not yet divided by l. Without
    keys it is ``(-inf, 0, 0)``. Output: o / l; log-sum-exp: m + log l.

    Shapes: m and l ``(...)``, o ``(..., d_v)``; the results the same.

    ValueError: the shapes do not fit.

    Source: Milakov & Gimelshein 2018, section 3.1; Dao 2023, section
    3.1.1, where the factor of o is printed inverted
    (flash-attention#991).
    """
    m1, l1, o1 = _part("1", m1, l1, o1)
    m2, l2, o2 = _part("2", m2, l2, o2)
    check_shape("m2", m2, m1.shape, "to match m1")
    check_shape("o2", o2, o1.shape, "to match o1")
    m = np.maximum(m1, m2)
    first, second = np.exp(m1 - _guarded(m)), np.exp(m2 - _guarded(m))
    total = first * l1 + second * l2
    return m, total, first[..., None] * o1 + second[..., None] * o2


# --- forward ----------------------------------------------------------------------------------


@_quiet
def flash_forward(
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B Hkv Nk d"],
    v: Real[np.ndarray, "B Hkv Nk d_v"],
    block: int,
    causal: bool = False,
    *,
    lengths: Integer[np.ndarray, "B"] | None = None,
) -> tuple[Float[np.ndarray, "B H Nq d_v"], Float[np.ndarray, "B H Nq"]]:
    r"""Attention as a merge over blocks of keys; ``(out, lse)``.

    .. math:: (m, l, o) \leftarrow
              \operatorname{merge}\bigl((m, l, o),\,
              \operatorname{part}(q_i k_j^\top / \sqrt d,\; v_j)\bigr),
              \qquad \mathrm{out}_i = o / l, \qquad
              \mathrm{lse}_i = m + \log l

    for each block j of ``block`` keys that the block i of ``block``
    queries may see.

    Shapes: q ``(B, H, Nq, d)``, k ``(B, Hkv, Nk, d)``, v ``(B, Hkv, Nk,
    d_v)``, lengths ``(B,)``; out ``(B, H, Nq, d_v)``, lse ``(B, H, Nq)``.

    ValueError: shapes do not fit; Hkv does not divide H; ``block`` is no
    positive integer; a length lies outside 0 … Nk.

    Source: Dao et al. 2022, algorithm 1; Dao 2023, algorithm 1.
    """
    q, k, v = checked(q, k, v)
    tiles = Tiles(q, k, block, causal, lengths)
    dtype = np.result_type(q, k, v)
    # Each row of both is written once, so what was there does not matter.
    out = np.empty((*q.shape[:3], v.shape[-1]), dtype)
    lse = np.empty(q.shape[:3], _wide(dtype))
    for head, kv in tiles.heads():
        for rows in tiles.blocks_of_queries():
            q_i = _tile(q[head][rows], dtype) * _scale(q)
            m, total, o = _no_keys(len(q_i), v.shape[-1], dtype)
            for keys, hidden in tiles.blocks_of_keys(head[0], rows):
                k_j, v_j = _tile(k[kv][keys], dtype), _tile(v[kv][keys], dtype)
                part = _softmax_part(_logits(q_i, k_j, hidden), v_j, hidden)
                m, total, o = merge_softmax_blocks(m, total, o, *part)
            # A row that saw no key has total 0.
            out[head][rows] = o / np.where(total == 0, 1, total)[:, None]
            # m = inf: the total is NaN, the limit of the logarithm is not.
            lse[head][rows] = np.where(m == np.inf, m, m + np.log(total))
    return out, lse


def flash_attention(
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B Hkv Nk d"],
    v: Real[np.ndarray, "B Hkv Nk d_v"],
    causal: bool = False,
    *,
    lengths: Integer[np.ndarray, "B"] | None = None,
    block: int = BLOCK,
) -> Float[np.ndarray, "B H Nq d_v"]:
    r"""Attention's output, in memory that does not grow with Nq · Nk.

    .. math:: \mathrm{out} = \operatorname{softmax}(q k^\top / \sqrt d)\, v

    Shapes and ValueError: as in flash_forward.

    Source: Dao et al. 2022, algorithm 1.
    """
    return flash_forward(q, k, v, block, causal, lengths=lengths)[0]


# --- backward ---------------------------------------------------------------------------------


@_quiet
def flash_backward(
    dout: Real[np.ndarray, "B H Nq d_v"],
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B Hkv Nk d"],
    v: Real[np.ndarray, "B Hkv Nk d_v"],
    out: Real[np.ndarray, "B H Nq d_v"],
    lse: Real[np.ndarray, "B H Nq"],
    block: int,
    causal: bool = False,
    *,
    lengths: Integer[np.ndarray, "B"] | None = None,
    dlse: Real[np.ndarray, "B H Nq"] | None = None,
) -> tuple[
    Float[np.ndarray, "B H Nq d"],
    Float[np.ndarray, "B Hkv Nk d"],
    Float[np.ndarray, "B Hkv Nk d_v"],
]:
    r"""Gradients by q, k and v, from probabilities made again tile by tile.

    .. math:: p = e^{z - \mathrm{lse}}, \quad
              \delta_i = \sum_c d\mathrm{out}_{ic}\, \mathrm{out}_{ic}
                       = \sum_j p_{ij}\, dp_{ij}, \quad
              dz = p \circ (dp - \delta)

    and the sums over blocks of attention_backward's dv = pᵀ dout,
    dq = dz k / √d and dk = dzᵀ q / √d. δ needs the whole row, which no
    tile has, but out does. ``dlse``, the gradient by lse, is taken from
    δ. Heads of q that share one of k add up in its gradient.

    Shapes: as in flash_forward; dout as out, dlse as lse, each gradient
    as its array.

    ValueError: as there; and where dout, out, lse or dlse do not fit.

    Source: Dao et al. 2022, algorithm 4 and eq. (4); Dao 2023,
    algorithm 2.
    """
    q, k, v = checked(q, k, v)
    dout, out, lse = _outputs(q, v, dout, out, lse)
    tiles = Tiles(q, k, block, causal, lengths)
    dtype = np.result_type(dout, q, k, v)
    delta = np.einsum("bhnc,bhnc->bhn", dout, out, dtype=_wide(dtype))
    if dlse is not None:
        dlse = as_float("dlse", dlse)
        check_shape("dlse", dlse, lse.shape, "to match lse")
        delta = delta - dlse
    # Keys that no query sees keep these zeros, and so do such queries.
    dq, dk, dv = (np.zeros(x.shape, _wide(dtype)) for x in (q, k, v))
    for head, kv in tiles.heads():
        for rows in tiles.blocks_of_queries():
            q_i, dout_i = _tile(q[head][rows], dtype) * _scale(q), _tile(dout[head][rows], dtype)
            lse_i, delta_i = lse[head][rows, None], delta[head][rows, None]
            for keys, hidden in tiles.blocks_of_keys(head[0], rows):
                k_j, v_j = _tile(k[kv][keys], dtype), _tile(v[kv][keys], dtype)
                product = np.matmul if hidden is None else weighted_sum
                p = _weights(_logits(q_i, k_j, hidden), lse_i, hidden)
                dv[kv][keys] += product(p.T, dout_i)
                dz = dout_i @ v_j.T
                dz -= delta_i
                dz *= p
                _hide(dz, hidden, 0)
                dq[head][rows] += product(dz, k_j)
                dk[kv][keys] += product(dz.T, q_i)  # q_i is scaled already
    dq *= _scale(q)
    dq, dk, dv = (x.astype(dtype, copy=False) for x in (dq, dk, dv))
    return dq, dk, dv


# --- one tile ---------------------------------------------------------------------------------


def _logits(q_i, k_j, hidden):
    z = q_i @ k_j.T
    _hide(z, hidden, -np.inf)
    return z


def _weights(z, peak, hidden):
    """exp(z - peak), in z's own memory."""
    z -= _guarded(peak)
    np.exp(z, out=z)
    # A query of NaN has a peak of NaN, and -inf - NaN is NaN: its hidden keys are cleared again.
    _hide(z, hidden, 0)
    return z


def _softmax_part(z, v_j, hidden):
    m = z.max(axis=-1)
    p = _weights(z, m[:, None], hidden)
    o = p @ v_j if hidden is None else weighted_sum(p, v_j)
    return m, p.sum(axis=-1), o


def _guarded(peak):
    # A row without keys has the maximum -inf, and -inf - -inf is NaN: subtract 0 there.
    return np.where(peak == -np.inf, 0, peak).astype(peak.dtype, copy=False)


def _hide(x, hidden, value):
    if hidden is not None:
        np.copyto(x, value, where=hidden)


def _no_keys(n, d_v, dtype):
    wide = _wide(dtype)
    return np.full(n, -np.inf, wide), np.zeros(n, wide), np.zeros((n, d_v), wide)


def _tile(x, dtype):
    # Of any strides, 0 too: BLAS wants rows that lie side by side.
    return np.ascontiguousarray(x, _wide(dtype))


def _wide(dtype):
    return np.promote_types(dtype, np.float32)


def _scale(q):
    return q.shape[-1] ** -0.5


# --- what sees what ---------------------------------------------------------------------------


class Tiles:
    """Which tiles there are, and what of each is hidden: all backends cut alike."""

    def __init__(self, q: Any, k: Any, block: int, causal: bool, lengths: Any) -> None:
        (self.n_batch, self.n_heads, self.n_q, _), self.n_k = q.shape, k.shape[2]
        self.group = self.n_heads // k.shape[1] if k.shape[1] else 1
        self.block, self.causal = as_count("block", block, least=1), causal
        if lengths is None:
            lengths = np.full(self.n_batch, self.n_k)
        self.lengths = np.asarray(lengths)
        check_shape("lengths", self.lengths, (self.n_batch,), f"to match q {q.shape}")
        padding_mask(self.lengths, self.n_k)  # names a length that is none

    def heads(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Each head of q, by its place, with the head of k and v it reads."""
        for b, h in np.ndindex(self.n_batch, self.n_heads):
            yield (b, h), (b, h // self.group)

    def blocks_of_queries(self) -> Iterator[slice]:
        for start in range(0, self.n_q, self.block):
            yield slice(start, min(start + self.block, self.n_q))

    def blocks_of_keys(self, b: int, rows: slice) -> Iterator[tuple[slice, Any]]:
        """The blocks that any row of ``rows`` sees, with what is hidden of them, or None."""
        for keys, diagonal in self.diagonals(b, rows):
            shape = rows.stop - rows.start, keys.stop - keys.start
            yield keys, None if diagonal is None else ~np.tri(*shape, diagonal, dtype=bool)

    def diagonals(self, b: int, rows: slice) -> Iterator[tuple[slice, int | None]]:
        """The same blocks, with the diagonal that cuts them, or None: row i sees j ≤ i + it."""
        length, offset = int(self.lengths[b]), self.n_k - self.n_q
        end = min(length, rows.stop + offset) if self.causal else length
        for start in range(0, end, self.block):
            keys = slice(start, min(start + self.block, end))
            # Later rows see more: what the first one sees, all do.
            whole = not self.causal or keys.stop <= rows.start + 1 + offset
            yield keys, None if whole else rows.start + offset - start


# --- at the door ------------------------------------------------------------------------------


def _part(which: str, m: Any, total: Any, o: Any) -> tuple[Any, Any, Any]:
    m, total, o = as_float("m" + which, m), as_float("l" + which, total), as_float("o" + which, o)
    check_shape("l" + which, total, m.shape, "to match m" + which)
    check_shape("o" + which, o, (*m.shape, "d_v"), "to match m" + which)
    return m, total, o


def checked(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    q, k, v = as_float("q", q), as_float("k", k), as_float("v", v)
    check_rank("q", q, "B H Nq d")
    b, h, _, d = q.shape
    if d == 0:
        raise ValueError(f"q: expected a width d of at least 1; got shape {q.shape}")
    check_shape("k", k, (b, "Hkv", "Nk", d), f"to match q {q.shape}")
    check_shape("v", v, (b, *k.shape[1:3], "d_v"), f"to match k {k.shape}")
    n_kv = k.shape[1]
    if h % n_kv if n_kv else h:
        raise ValueError(f"k: expected a number of heads that divides {h}, those of q; got {n_kv}")
    return q, k, v


def _outputs(q: Any, v: Any, dout: Any, out: Any, lse: Any) -> tuple[Any, Any, Any]:
    dout, out, lse = as_float("dout", dout), as_float("out", out), as_float("lse", lse)
    wanted = (*q.shape[:3], v.shape[-1])
    for name, x in (("dout", dout), ("out", out)):
        check_shape(name, x, wanted, f"to match q {q.shape} and v {v.shape}")
    check_shape("lse", lse, wanted[:3], f"to match q {q.shape}")
    return dout, out, lse
