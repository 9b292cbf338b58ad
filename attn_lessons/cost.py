r"""What attention costs: floating-point operations, bytes kept, bytes moved.

Counts, not measurements: the tests hold them against counted and measured ones. Conventions:

- One multiply-add is two operations, the count in which hardware is sold. Only matrix products
  count; softmax, norms and activations do a few operations per number they read, and what they
  cost is the reading.
- ``causal=True`` halves a product over N × N. Exactly it would be (N + 1) / (2N) of it, which is
  the half for all N that matter, and what published figures use.
- A backward pass is counted alone. Each product y = x w has two, dy wᵀ and xᵀ dy, as large as it.
- Bytes are bytes: an ``itemsize`` of 2 is half precision, 4 float32, 8 float64.
- Batch b, heads h, tokens n, width of a head d; c = h · d and f are the widths of a block.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from attn_lessons._arrays import as_count

LSE_BYTES = 4  # log-sum-exp stays float32 whatever the inputs are
MASK_BYTES = 1  # dropout masks are booleans


# --- floating-point operations ----------------------------------------------------------------


def linear_flops(rows: int, c_in: int, c_out: int, backward: bool = False) -> int:
    r"""Operations of y = x w, or of its backward pass alone.

    .. math:: 2 \, n \, c_{\mathrm{in}} c_{\mathrm{out}}, \qquad
              \text{backward } 4 \, n \, c_{\mathrm{in}} c_{\mathrm{out}}

    Shapes: x ``(rows, c_in)``, w ``(c_in, c_out)``.

    ValueError: a size is no integer, or negative.

    Source: Kaplan et al. 2020, section 2.1.
    """
    rows, c_in, c_out = _sizes(rows=rows, c_in=c_in, c_out=c_out)
    return (4 if backward else 2) * rows * c_in * c_out


def attention_flops(
    b: int,
    h: int,
    n: int,
    d: int,
    causal: bool = False,
    backward: bool = False,
    *,
    recompute: bool = True,
) -> int:
    r"""Operations of attention between q, k, v and out, projections not counted.

    .. math:: \mathrm{forward}\ 4\,b h n^2 d, \qquad
              \mathrm{backward}\ 10\,b h n^2 d, \qquad
              \text{where p was kept } 8\,b h n^2 d

    Forward there are two products over n × n, q kᵀ and p v. Backward
    there are four, pᵀ dout, dout vᵀ, dz k and dzᵀ q; and a kernel that
    has not kept p, as FlashAttention, makes q kᵀ once more: five, 2.5
    times the forward pass. ``recompute=False``: p was kept. Causal
    attention needs half of each.

    Shapes: q, k, v and out ``(b, h, n, d)``.

    ValueError: a size is no integer, or negative.

    Source: Dao 2023, section 4.1; Korthikanti et al. 2022, appendix A.
    """
    b, h, n, d = _sizes(b=b, h=h, n=n, d=d)
    products = (5 if recompute else 4) if backward else 2
    # 2 operations a multiply-add; a causal product makes half of them.
    return products * b * h * n * n * d * (1 if causal else 2)


def block_flops(
    b: int,
    n: int,
    c: int,
    f: int,
    causal: bool = False,
    backward: bool = False,
    *,
    recompute: bool = True,
) -> int:
    r"""Operations of an encoder block: four projections, attention, two layers.

    .. math:: 8\,b n c^2 + 4\,b n^2 c + 4\,b n c f

    forward; backward twice as much, and another 2 b n² c for the logits
    where p was not kept (``recompute``). The number of heads does not
    enter: h heads of width c/h cost as much as one of width c.

    Shapes: x ``(b, n, c)``, hidden ``(b, n, f)``.

    ValueError: as attention_flops.

    Source: Korthikanti et al. 2022, appendix A.
    """
    b, n, c, f = _sizes(b=b, n=n, c=c, f=f)
    projections = 4 * linear_flops(b * n, c, c, backward)
    layers = linear_flops(b * n, c, f, backward) + linear_flops(b * n, f, c, backward)
    return projections + layers + attention_flops(b, 1, n, c, causal, backward, recompute=recompute)


def training_flops_per_token(
    n_params: int, n_layers: int, c: int, n: int, causal: bool = False
) -> int:
    r"""Operations of forward and backward, for one token of a sequence.

    .. math:: 6\,P + 12\,L\,c\,n

    Each of the P parameters in a product is multiplied once forward and
    twice backward, at two operations: 6. Attention without a mask is
    4 n c a token forward, 12 with the backward pass; the 12 is 3 · 4
    and has no causal half in it, which ``causal=True`` takes: 6 L c n.
    P counts the weights that multiply: not an embedding that is only
    looked up.

    Shapes: numbers.

    ValueError: a size is no integer, or negative.

    Source: Chowdhery et al. 2022, appendix B.
    """
    p, layers, c, n = _sizes(n_params=n_params, n_layers=n_layers, c=c, n=n)
    return 6 * p + (6 if causal else 12) * layers * c * n


# --- bytes kept for the backward pass ---------------------------------------------------------


def attention_bytes(b: int, h: int, n: int, d: int, itemsize: int = 4, flash: bool = False) -> int:
    r"""Bytes that attention keeps from the forward pass for the backward pass.

    .. math:: \mathrm{plain}\ e\,b h (3 n d + n^2), \qquad
              \mathrm{flash}\ e\,b h \cdot 4 n d + 4\,b h n

    with e = ``itemsize``. Plain attention keeps q, k, v and the
    probabilities; ``flash=True`` q, k, v, out and the log-sum-exp, a
    float32 per row, from which it makes the probabilities again. No
    dropout; projections' inputs are not attention's.

    Shapes: q, k, v and out ``(b, h, n, d)``.

    ValueError: a size is no integer, or negative; ``itemsize`` < 1.

    Source: Dao et al. 2022, section 3.1 and theorem 1.
    """
    b, h, n, d = _sizes(b=b, h=h, n=n, d=d)
    itemsize = as_count("itemsize", itemsize, 1)
    if flash:
        return b * h * n * (4 * d * itemsize + LSE_BYTES)
    return b * h * n * (3 * d + n) * itemsize


def activation_bytes(
    s: int,
    b: int,
    h: int,
    a: int,
    recompute: Literal["none", "selective", "full"] = "none",
) -> int:
    r"""Bytes one Transformer layer keeps in 16-bit training with dropout.

    .. math:: s b h \Bigl(34 + 5 \frac{a s}{h}\Bigr), \qquad
              \text{selective } 34\,s b h, \qquad
              \text{full } 2\,s b h

    The letters are the paper's: s tokens, batch b, width h, a heads,
    a feed-forward layer of width 4h. It is bytes, not numbers: two for
    a 16-bit number, one for an entry of a dropout mask. Attention has
    11 s b h + 5 a s² b of it, the feed-forward layer 19 s b h, the two
    norms 4 s b h. Selective recomputation gives up what grows with s²;
    FlashAttention does the same and keeps 4 a s b more, its log-sum-exp.
    Full recomputation keeps the layer's input alone. The norms' means
    and deviations, four numbers a token, are not counted.

    Shapes: numbers.

    ValueError: a size is no integer, or negative; ``recompute`` is
    unknown.

    Source: Korthikanti et al. 2022, eqs. (1) and (2) at t = 1, table 2.
    """
    s, b, h, a = _sizes(s=s, b=b, h=h, a=a)
    kept = {"none": 34 * h + 5 * a * s, "selective": 34 * h, "full": 2 * h}
    if recompute not in kept:
        raise ValueError(f"recompute: expected one of {', '.join(kept)}; got {recompute!r}")
    return s * b * kept[recompute]


def block_bytes(
    b: int, n: int, c: int, f: int, h: int, itemsize: int = 8, dropout: bool = False
) -> int:
    r"""Bytes the cache of transformer.encoder_block_forward holds.

    .. math:: e \, b \bigl(n (8c + 2f) + h n^2\bigr)
              + \bigl[\,b (n (2c + f) + h n^2)\,\bigr]_{\mathrm{dropout}}

    with e = ``itemsize``: eight arrays of width c (the input of each
    norm and of each sublayer, q, k, v and the merged heads), the hidden
    layer before and after its activation, the probabilities; with
    dropout four masks. Parameters are not counted: they are kept anyway.

    Shapes: x ``(b, n, c)``, hidden ``(b, n, f)``, probs ``(b, h, n, n)``.

    ValueError: a size is no integer, or negative; ``itemsize`` < 1.
    """
    b, n, c, f, h = _sizes(b=b, n=n, c=c, f=f, h=h)
    numbers = b * n * (8 * c + 2 * f + h * n)
    masks = b * n * (2 * c + f + h * n) if dropout else 0
    return as_count("itemsize", itemsize, 1) * numbers + MASK_BYTES * masks


def kept_bytes(*caches: Any, without: Iterable[Any] = ()) -> int:
    """Bytes of memory that caches hold on to, shared memory counted once.

    Looks into tuples, lists and dicts for arrays. A view keeps the whole array it is a view of;
    two views of one array keep it once. ``without`` are arrays (or caches, or dicts of parameters)
    that would be there anyway.

    >>> x = np.zeros((4, 8))
    >>> kept_bytes((x, x[:, :2], {"xt": x.T})), kept_bytes((x, x + 1), without=[x])
    (256, 256)
    """
    known = {id(owner) for owner in _owners(without)}
    owners = {id(owner): owner for owner in _owners(caches)}
    return sum(owner.nbytes for key, owner in owners.items() if key not in known)


# --- bytes moved, and the time they take ------------------------------------------------------


def attention_traffic(
    b: int, h: int, n: int, d: int, itemsize: int = 4, block: int | None = None
) -> int:
    r"""Bytes that attention's forward pass moves between slow and fast memory.

    .. math:: \mathrm{plain}\ e\,b h (4 n d + 4 n^2), \qquad
              \mathrm{tiled}\ e\,b h \cdot 2 n d\,(1 + t) + 4\,b h n,
              \quad t = \lceil n / B \rceil

    Plain attention reads q and k and writes z, reads z and writes p,
    reads p and v and writes out: the n × n array crosses four times.
    Tiled, a block of B = ``block`` queries stays in fast memory with
    its output while all keys and values stream past, t times in all,
    and the log-sum-exp is written; nothing of size n² moves.

    Shapes: q, k, v and out ``(b, h, n, d)``.

    ValueError: a size is no integer, or negative; ``itemsize`` or
    ``block`` < 1.

    Source: Dao et al. 2022, algorithm 0 and theorem 2; the order of the
    loops is Dao 2023's, algorithm 1.
    """
    b, h, n, d = _sizes(b=b, h=h, n=n, d=d)
    itemsize = as_count("itemsize", itemsize, 1)
    if block is None:
        return itemsize * b * h * n * (4 * d + 4 * n)
    passes = -(-n // as_count("block", block, 1))
    return b * h * n * (2 * d * (1 + passes) * itemsize + LSE_BYTES)


def attainable_flops(flops: float, moved: float, peak: float, bandwidth: float) -> float:
    r"""Operations a second that a machine can reach: its roofline.

    .. math:: \min\Bigl(\mathrm{peak},\;
              \mathrm{bandwidth} \cdot
              \frac{\mathrm{flops}}{\mathrm{moved}}\Bigr)

    Below peak / bandwidth operations a byte, memory sets the pace.

    Shapes: numbers: operations, bytes, operations a second, bytes a
    second.

    ValueError: a number is not positive.

    Source: Williams, Waterman & Patterson 2009, eq. (1).
    """
    given = {"flops": flops, "moved": moved, "peak": peak, "bandwidth": bandwidth}
    for name, x in given.items():
        if not x > 0:
            raise ValueError(f"{name}: expected a number > 0; got {x!r}")
    return float(min(peak, bandwidth * flops / moved))


# --- below ------------------------------------------------------------------------------------


def _sizes(**sizes: int) -> tuple[int, ...]:
    return tuple(as_count(name, n) for name, n in sizes.items())


def _owners(thing: Any) -> list[np.ndarray]:
    """The arrays whose memory the arrays in ``thing`` lie in."""
    if isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        return [thing]
    parts = thing.values() if isinstance(thing, Mapping) else thing
    if not isinstance(parts, Iterable) or isinstance(parts, str):
        return []
    return [owner for part in parts for owner in _owners(part)]
