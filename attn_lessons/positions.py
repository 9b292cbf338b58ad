r"""Where a token stands: sinusoidal, learned, rotary and ALiBi positions, and their gradients.

Attention treats its keys as a set, so their order has to be told to it. The four ways differ in
where they enter: sinusoidal and learned positions are added to the tokens, rotary ones turn the
queries and keys, ALiBi is added to the logits.

- Positions are counted from 0. Rotary ones may also be negative or lie between integers: a logit
  depends only on the difference of its two.
- Angles are computed in float64 and rounded once, as cosine and sine. In float32 those of
  positions past 100000 are off by up to 0.009.
- NaN and infinities in a token stay in its own row, in rotary ones in their own pair.
- float32 stays float32, integers become float64, inputs are never written to.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Integer, Real

from attn_lessons._arrays import as_count, as_float, check_broadcasts, check_rank

Layout = Literal["interleaved", "half"]
# One for each row, one for all, or a shape that broadcasts to the rows'.
Places = Real[np.ndarray, "*#rows"] | float | int | np.generic
RowNumbers = Integer[np.ndarray, "*#rows"] | int | np.integer

# inf · sin 0 is NaN, and 1e308 · cos + 1e308 · sin overflows: answers here.
_quiet = np.errstate(invalid="ignore", over="ignore")


def sinusoidal_positions(n: int, d: int, *, base: float = 10000.0) -> Float[np.ndarray, "n d"]:
    r"""Sines and cosines of each position, at wavelengths that grow.

    .. math:: \mathrm{PE}_{p,2i} = \sin \frac{p}{b^{2i/d}}, \qquad
              \mathrm{PE}_{p,2i+1} = \cos \frac{p}{b^{2i/d}}

    Shapes: ``(n, d)``, for p = 0 … n-1. With odd ``d`` the last column
    is a sine without its cosine.

    ValueError: ``n`` or ``d`` is no integer, ``n`` < 0, ``d`` < 1;
    ``base`` is not positive.

    Source: Vaswani et al. 2017, section 3.5.
    """
    n, d = as_count("n", n), as_count("d", d, least=1)
    angles = np.outer(np.arange(n), _frequencies(d, base))
    columns = np.empty((n, d))
    columns[:, 0::2] = np.sin(angles)
    columns[:, 1::2] = np.cos(angles[:, : d // 2])
    return columns


def learned_positions_forward(
    table: Real[np.ndarray, "n C"], positions: RowNumbers
) -> Float[np.ndarray, "*#rows C"]:
    r"""The row of a table of parameters for each position.

    .. math:: e_{t} = E_{p_t}

    Shapes: table ``(n, C)``, positions of any shape ``(...)`` in
    0 … n-1, the result ``(..., C)``.

    ValueError: ``table`` has not two axes; ``positions`` are no
    integers or out of range. A negative one is no row from the end.

    Source: Gehring et al. 2017, section 3.1.
    """
    table = as_float("table", table)
    check_rank("table", table, "n C")
    return table[_row_numbers(positions, len(table))]


def learned_positions_backward(
    dout: Real[np.ndarray, "*rows C"],
    positions: RowNumbers,
    n: int,
) -> Float[np.ndarray, "n C"]:
    r"""Gradient of the table: a row collects from everywhere it was used.

    .. math:: dE_{j} = \sum_{t \,:\, p_t = j} de_t

    Shapes: dout ``(..., C)``; positions ``(...)``, or broadcastable to
    it, as ``(N,)`` is to a batch ``(B, N)`` that shares them; the
    result ``(n, C)``. Rows of positions that were not used are 0.

    ValueError: ``positions`` are no integers, out of range, or do not
    broadcast to dout's leading axes; ``dout`` is a scalar.
    """
    dout, n = as_float("dout", dout), as_count("n", n)
    positions = _row_numbers(positions, n)
    _check_rows("positions", positions, "dout", dout)
    at = np.broadcast_to(positions, dout.shape[:-1]).reshape(-1)
    # Rows of one position side by side: add.at takes seven times as long.
    order = np.argsort(at, kind="stable")
    used, first = np.unique(at[order], return_index=True)
    rows = dout.reshape(len(at), dout.shape[-1])[order]
    dtable = np.zeros((n, dout.shape[-1]), dout.dtype)
    # In float64: 1e5 times 0.1 comes out 1.4 short in float32.
    wide = np.promote_types(dout.dtype, np.float64)
    if len(used):
        dtable[used] = np.add.reduceat(rows, first, axis=0, dtype=wide)
    return dtable


@_quiet
def rope(
    x: Real[np.ndarray, "*rows d"],
    positions: Places,
    base: float = 10000.0,
    *,
    layout: Layout = "interleaved",
) -> Float[np.ndarray, "*rows d"]:
    r"""Rotary positions: pair i of a row at p is turned by p θ_i.

    .. math:: \begin{pmatrix} y_{2i} \\ y_{2i+1} \end{pmatrix} =
              \begin{pmatrix} \cos p\theta_i & -\sin p\theta_i \\
              \sin p\theta_i & \cos p\theta_i \end{pmatrix}
              \begin{pmatrix} x_{2i} \\ x_{2i+1} \end{pmatrix},
              \qquad \theta_i = b^{-2i/d}

    Shapes: x ``(..., N, d)``, d even; positions ``(N,)``, a number, or
    what broadcasts to x's ``(..., N)``; the result as x. Pairs are
    columns ``(2i, 2i+1)``, with ``layout="half"`` ``(i, i + d/2)``:
    rope_permutation turns one into the other.

    ValueError: ``d`` is odd; ``positions`` do not broadcast or are not
    finite; ``base`` is not positive; ``layout`` is neither.

    Source: Su et al. 2021 (RoFormer), eq. (15) and (34).
    """
    x = as_float("x", x)
    return _turned(x, _angles("x", x, positions, base), layout)


@_quiet
def rope_backward(
    dy: Real[np.ndarray, "*rows d"],
    positions: Places,
    base: float = 10000.0,
    *,
    layout: Layout = "interleaved",
) -> Float[np.ndarray, "*rows d"]:
    r"""Gradient by x: a rotation's transpose turns back.

    .. math:: \begin{pmatrix} dx_{2i} \\ dx_{2i+1} \end{pmatrix} =
              \begin{pmatrix} \cos p\theta_i & \sin p\theta_i \\
              -\sin p\theta_i & \cos p\theta_i \end{pmatrix}
              \begin{pmatrix} dy_{2i} \\ dy_{2i+1} \end{pmatrix}

    Shapes: dy ``(..., N, d)``, the rest as in rope, the result as dy.

    ValueError: as rope.
    """
    dy = as_float("dy", dy)
    return _turned(dy, -_angles("dy", dy, positions, base), layout)


def rope_permutation(d: int) -> Integer[np.ndarray, "d"]:
    r"""Columns of the interleaved layout in the half-split one's order.

    .. math:: \pi = (0, 2, \dots, d-2,\; 1, 3, \dots, d-1), \qquad
              \mathrm{rope}_{\mathrm{half}}(x_{\pi}) =
              \mathrm{rope}(x)_{\pi}

    Shapes: ``(d,)``. Weights trained in the interleaved layout serve
    the half-split one as ``wq[:, π]`` and ``wk[:, π]``, head by head;
    ``np.argsort(π)`` leads back. Values need none.

    ValueError: ``d`` is no integer, negative or odd.
    """
    d = as_count("d", d)
    if d % 2:
        raise ValueError(f"d: expected an even number; got {d}")
    return np.arange(d).reshape(-1, 2).T.reshape(-1)


def alibi_slopes(n_heads: int) -> Float[np.ndarray, "H"]:
    r"""How steeply each head's logits fall with distance.

    .. math:: m_h = 2^{-8h/H}, \qquad h = 1 \dots H

    for a power of two H. Otherwise, with K the power of two below: the
    slopes of K heads, then those of 2K heads with odd h, up to H.

    Shapes: ``(n_heads,)``.

    ValueError: ``n_heads`` is no integer, or smaller than 1.

    Source: Press et al. 2022, section 3; the other head counts as in
    their published code.
    """
    n_heads = as_count("n_heads", n_heads, least=1)
    power = 1 << (n_heads.bit_length() - 1)
    whole = np.arange(1, power + 1)
    # Odd h of 2K heads: h / 2K = 1/2K, 3/2K … lie between the slopes of K.
    between = np.arange(n_heads - power) + 0.5
    return 2.0 ** (-8 * np.concatenate([whole, between]) / power)


def alibi_bias(n_heads: int, n_q: int, n_k: int) -> Float[np.ndarray, "H Nq Nk"]:
    r"""What ALiBi adds to the logits: minus slope times distance.

    .. math:: b_{hij} = -m_h \,\lvert i + (N_k - N_q) - j \rvert

    Shapes: ``(n_heads, n_q, n_k)``. Aligned bottom-right, as
    causal_mask is: the last query stands at the last key. A key after
    the query is as far as one before it; a causal mask rules it out.

    ValueError: a count is no integer, or too small.

    Source: Press et al. 2022, section 3; both sides as in
    FlashAttention's ``alibi_slopes``.
    """
    return alibi_slopes(n_heads)[:, None, None] * -_distances(n_q, n_k)


def alibi_bias_backward(
    dbias: Real[np.ndarray, "H Nq Nk"],
) -> Float[np.ndarray, "H"]:
    r"""Gradient by the slopes, for a model that learns them.

    .. math:: dm_h = -\sum_{ij} \lvert i + (N_k - N_q) - j \rvert
              \, db_{hij}

    Shapes: dbias ``(H, Nq, Nk)`` to ``(H,)``.

    ValueError: ``dbias`` has not three axes.
    """
    dbias = as_float("dbias", dbias)
    check_rank("dbias", dbias, "H Nq Nk")
    distances = _distances(*dbias.shape[1:]).astype(dbias.dtype)
    return -(distances * dbias).sum(axis=(1, 2))


def _frequencies(d, base):
    if not 0 < base < np.inf:
        raise ValueError(f"base: expected a positive number; got {base!r}")
    return float(base) ** (-np.arange(0, d, 2) / d)


def _row_numbers(positions, n):
    positions = np.asarray(positions)
    if positions.dtype.kind not in "iu":
        raise ValueError(f"positions: expected integers; got dtype {positions.dtype}")
    # NumPy reads -1 as the last row: a gradient that lands there is lost.
    wrong = (positions < 0) | (positions >= n)
    if wrong.any():
        raise ValueError(
            f"positions: expected 0 … {n - 1} for a table of {n} rows; got {positions[wrong][0]}"
        )
    return positions


def _check_rows(name, positions, other, x):
    if x.ndim == 0:
        raise ValueError(f"{other}: expected at least one axis; got a scalar, shape ()")
    check_broadcasts(name, positions, x.shape[:-1], f"{other}'s leading axes")


def _angles(name, x, positions, base):
    positions = as_float("positions", np.asarray(positions)).astype(np.float64)
    _check_rows("positions", positions, name, x)
    if x.shape[-1] % 2:
        raise ValueError(f"{name}: expected an even last axis, d = 2, 4, …; got {x.shape}")
    if not np.isfinite(positions).all():
        raise ValueError("positions: expected finite numbers; got NaN or an infinity")
    return positions[..., None] * _frequencies(x.shape[-1], base)


def _turned(x, angles, layout):
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = _pairs(x.shape[-1], layout)
    a, b = x[..., first], x[..., second]
    y = np.empty(x.shape, x.dtype)
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


def _pairs(d, layout):
    if layout == "interleaved":
        return slice(0, None, 2), slice(1, None, 2)
    if layout == "half":
        return slice(0, d // 2), slice(d // 2, None)
    raise ValueError(f'layout: expected "interleaved" or "half"; got {layout!r}')


def _distances(n_q, n_k):
    n_q, n_k = as_count("n_q", n_q), as_count("n_k", n_k)
    queries = np.arange(n_q)[:, None] + (n_k - n_q)
    return np.abs(queries - np.arange(n_k))
