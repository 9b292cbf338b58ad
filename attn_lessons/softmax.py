r"""Softmax, log-softmax, logsumexp and cross-entropy, forward and backward.

All run along one axis, of length n. The conventions are the same in every function:

- A ``-inf`` entry is masked out: probability 0, gradient 0.
- A row of nothing but ``-inf``, or of length 0, has logsumexp ``-inf``, probabilities 0 (not
  NaN, as in torch) and gradient 0.
- A row that holds NaN gives NaN, and so does one that holds ``+inf``: the limit depends on how
  infinity is reached. Only logsumexp has one there, ``+inf``. Other rows are not touched.
- Finite logits give finite probabilities and gradients, up to the largest float. Nothing warns.
- float32 stays float32, integers become float64, inputs are never written to.
"""

import numpy as np
from jaxtyping import Float, Integer, Real

from attn_lessons._arrays import as_float, check_axis, check_rank, check_same_shape

# Infinities and underflow are answers here. -1e308 - 1e308 overflows to the
# right one, log(0) is the logsumexp of a masked row.
_quiet = np.errstate(all="ignore")


@_quiet
def logsumexp(
    z: Real[np.ndarray, "..."], axis: int = -1, keepdims: bool = False
) -> Float[np.ndarray, "..."]:
    r"""Logarithm of a sum of exponentials, without overflow.

    .. math:: \operatorname{lse}(z) = m + \log \sum_j e^{z_j - m},
              \qquad m = \max_j z_j

    Shapes: ``(..., n, ...)`` to ``(..., ...)``, or ``(..., 1, ...)``
    with ``keepdims``.

    ValueError: ``axis`` does not exist; ``z`` is complex, or a scalar.

    Source: Blanchard, Higham & Higham 2021, eq. (1.1), shifted by the
    maximum.
    """
    z, axis = _rows(z, axis)
    peak = _peak(z, axis)
    lse = peak + np.log(np.exp(z - peak).sum(axis, keepdims=True))
    # z = [inf, 0]: inf - inf made NaN of a sum that is infinite.
    lse = np.where(peak == np.inf, np.inf, lse).astype(z.dtype, copy=False)
    return lse if keepdims else lse.squeeze(axis)


@_quiet
def logsumexp_backward(
    dlse: Real[np.ndarray, "..."],
    z: Real[np.ndarray, "*shape"],
    axis: int = -1,
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient of logsumexp: its derivative is the softmax.

    .. math:: dz_i = p_i \, d\mathrm{lse}

    Shapes: ``dlse`` as logsumexp returned it, with ``keepdims`` or
    without; ``z`` and the result ``(..., n, ...)``.

    ValueError: ``dlse`` fits neither shape; ``axis`` does not exist.
    """
    z, axis = _rows(z, axis)
    dlse = _with_axis("dlse", as_float("dlse", dlse), z, axis)
    return softmax(z, axis) * dlse


@_quiet
def softmax(
    z: Real[np.ndarray, "*shape"],
    axis: int = -1,
) -> Float[np.ndarray, "*shape"]:
    r"""Probabilities proportional to exp z along ``axis``.

    .. math:: p_i = \frac{e^{z_i - m}}{\sum_j e^{z_j - m}},
              \qquad m = \max_j z_j

    Shapes: ``(..., n, ...)`` to the same.

    ValueError: ``axis`` does not exist; ``z`` is complex, or a scalar.

    Source: Blanchard, Higham & Higham 2021, eq. (1.2), shifted by the
    maximum.
    """
    z, axis = _rows(z, axis)
    weights = np.exp(z - _peak(z, axis))
    weights /= _nonzero(weights.sum(axis, keepdims=True))
    return weights


def softmax_jacobian(
    p: Real[np.ndarray, "N"],
) -> Float[np.ndarray, "N N"]:
    r"""Derivatives of every probability by every logit.

    .. math:: J_{ij} = \frac{\partial p_i}{\partial z_j}
              = p_i (\delta_{ij} - p_j)

    Shapes: ``(N,)`` to ``(N, N)``. Symmetric; its rows and columns sum
    to 0.

    ValueError: ``p`` has not one axis.
    """
    p = as_float("p", p)
    check_rank("p", p, "N")
    return np.diag(p) - np.outer(p, p)


@_quiet
def softmax_backward(
    dp: Real[np.ndarray, "*shape"],
    p: Real[np.ndarray, "*shape"],
    axis: int = -1,
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient by the logits, without building the Jacobian.

    .. math:: dz_i = p_i \Bigl( dp_i - \sum_j p_j \, dp_j \Bigr)

    Shapes: ``dp`` and ``p`` (what softmax returned) ``(..., n, ...)``,
    the result the same. Sums to 0 along ``axis``.

    ValueError: ``dp`` and ``p`` differ in shape; ``axis`` does not
    exist.
    """
    p, axis = _rows(p, axis, "p")
    dp = as_float("dp", dp)
    check_same_shape("dp", dp, "p", p)
    return p * (dp - (p * dp).sum(axis, keepdims=True))


@_quiet
def log_softmax(
    z: Real[np.ndarray, "*shape"],
    axis: int = -1,
) -> Float[np.ndarray, "*shape"]:
    r"""Logarithms of probabilities, exact where those underflow.

    .. math:: \log p_i = (z_i - m) - \log \sum_j e^{z_j - m},
              \qquad m = \max_j z_j

    Shapes: ``(..., n, ...)`` to the same. ``-inf`` entries stay
    ``-inf``.

    ValueError: ``axis`` does not exist; ``z`` is complex, or a scalar.

    Source: the logarithm of Blanchard, Higham & Higham 2021, eq. (1.2),
    shifted likewise.
    """
    z, axis = _rows(z, axis)
    # z - logsumexp(z) would round log n away at z = [1e17, 1e17].
    shifted = z - _peak(z, axis)
    total = np.exp(shifted).sum(axis, keepdims=True)
    return shifted - np.log(_nonzero(total))


@_quiet
def log_softmax_backward(
    dlogp: Real[np.ndarray, "*shape"],
    logp: Real[np.ndarray, "*shape"],
    axis: int = -1,
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient by the logits from that by the log-probabilities.

    .. math:: dz_i = d\log p_i - p_i \sum_j d\log p_j

    Shapes: ``dlogp`` and ``logp`` (what log_softmax returned) ``(...,
    n, ...)``, the result the same. Sums to 0 along ``axis``. A ``-inf``
    entry in a row with others passes its own ``dlogp`` on, as in torch:
    its probability is 0, its slope 1.

    ValueError: ``dlogp`` and ``logp`` differ in shape; ``axis`` does
    not exist.
    """
    logp, axis = _rows(logp, axis, "logp")
    dlogp = as_float("dlogp", dlogp)
    check_same_shape("dlogp", dlogp, "logp", logp)
    p = np.exp(logp)
    dz = dlogp - p * dlogp.sum(axis, keepdims=True)
    return np.where(p.any(axis, keepdims=True), dz, 0)


@_quiet
def cross_entropy(
    logits: Real[np.ndarray, "B K"],
    targets: Integer[np.ndarray, "B"],
    label_smoothing: float = 0.0,
    *,
    ignore_index: int | None = None,
) -> tuple[np.floating, Float[np.ndarray, "B K"]]:
    r"""Mean cross-entropy of integer targets, and its gradient.

    .. math:: L = -\frac1B \sum_{b,k} y_{bk} \log p_{bk}, \qquad
              d\mathrm{logits}_{bk} = \frac{p_{bk} - y_{bk}}{B}, \qquad
              y_{bk} = (1 - \varepsilon) [k = t_b] + \frac{\varepsilon}{K}

    Shapes: logits ``(B, K)``, targets ``(B,)`` in 0 … K-1; the loss a
    scalar, dlogits ``(B, K)``.

    Rows whose target is ``ignore_index`` count neither in the loss nor
    in B and get gradient 0; where none counts, the loss is 0 (torch:
    NaN). A ``-inf`` logit that carries target weight makes the loss
    ``inf``; the gradient stays (p - y)/B, finite, as in torch. A row of
    nothing but ``-inf`` makes it ``inf`` too, with gradient 0.

    ValueError: shapes do not match; targets are no integers or out of
    range; ``label_smoothing`` lies outside [0, 1].

    Source: Szegedy et al. 2016, section 7; smoothing spread over all K
    classes, as in torch.
    """
    logits = as_float("logits", logits)
    counted = _counted_rows(logits, targets, ignore_index)
    n = max(int(counted.sum()), 1)
    logp = log_softmax(logits)
    p, y = np.exp(logp), _target_weights(logits, targets, counted, label_smoothing)
    # A masked class without target weight: 0 · -inf is NaN, and costs 0.
    loss = -np.where(y > 0, y * logp, 0).sum() / n
    usable = counted[:, None] & p.any(axis=-1, keepdims=True)
    dlogits = np.where(usable, p - y, 0) / n
    return loss, dlogits


def _rows(z, axis, name="z"):
    z = as_float(name, z)
    return z, check_axis(axis, name, z)


def _peak(z, axis):
    # A masked row has maximum -inf, and -inf - -inf is NaN: subtract 0 there.
    peak = z.max(axis, keepdims=True, initial=-np.inf)
    return np.where(peak == -np.inf, 0, peak)


def _nonzero(total):
    # Only a row without a finite entry sums to 0: divide that one by 1.
    return np.where(total == 0, 1, total)


def _with_axis(name, x, z, axis):
    kept = z.max(axis, keepdims=True, initial=-np.inf).shape
    dropped = np.delete(z.shape, axis)
    if x.shape not in (kept, tuple(dropped.tolist())):
        raise ValueError(
            f"{name}: expected shape {tuple(dropped.tolist())} or {kept}, "
            f"z {z.shape} reduced along axis {axis}; got {x.shape}"
        )
    return x.reshape(kept)


def _counted_rows(logits, targets, ignore_index):
    check_rank("logits", logits, "B K")
    targets = np.asarray(targets)
    batch, classes = logits.shape
    if targets.dtype.kind not in "iu":
        raise ValueError(f"targets: expected integer classes; got dtype {targets.dtype}")
    if targets.shape != (batch,):
        raise ValueError(
            f"targets: expected shape ({batch},) to match logits {logits.shape}; "
            f"got {targets.shape}"
        )
    counted = np.ones(batch, bool) if ignore_index is None else targets != ignore_index
    wrong = counted & ((targets < 0) | (targets >= classes))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"targets: expected classes 0 … {classes - 1} for logits {logits.shape}; "
            f"got {targets[row]} at row {row}"
        )
    return counted


def _target_weights(logits, targets, counted, smoothing):
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1]; got {smoothing!r}")
    y = np.zeros_like(logits)
    y[counted] = smoothing / logits.shape[1]
    y[counted, targets[counted]] += 1 - smoothing
    return y
