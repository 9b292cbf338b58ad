r"""LayerNorm, RMSNorm, residual connections and dropout, forward and backward.

What surrounds attention and the feed-forward layer in a block. The conventions are the same in
every function:

- A norm runs over the trailing axes of x that gamma has: one axis of length C, as a rule. What
  lies along them is one row; rows know nothing of each other.
- Sums over a row are taken in float64 whatever the dtype, and rounded once, at the end. float32
  stays float32, integers become float64, inputs are never written to.
- NaN or inf in a row makes that row NaN, and no other. Its part in dgamma and dbeta is NaN too.
- A constant row is normalised to exactly 0 (with ``eps = 0``, to NaN: it is 0/0).
- Axes of length 0 are fine everywhere.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped

from attn_lessons._arrays import (
    as_bool,
    as_count,
    as_float,
    check_broadcasts,
    check_same_shape,
    unbroadcast,
)

# A constant row without eps is 0/0, and a large float64 may not fit
# the float16 it came from: both are answers, and no reason to warn.
_quiet = np.errstate(all="ignore")


# --- LayerNorm --------------------------------------------------------------------------------


@_quiet
def layernorm_statistics(
    x: Real[np.ndarray, "*shape"],
    n_axes: int = 1,
    eps: float = 1e-5,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "..."]]:
    r"""Each row at mean 0 and variance 1, and the factor that did it.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad
              r = \frac{1}{\sqrt{\frac1n \sum_i (x_i - \mu)^2 + \varepsilon}},
              \qquad \hat x_i = r \, (x_i - \mu)

    The variance is the biased one (1/n), taken of centred numbers: the
    mean of the squares minus the square of the mean loses all digits
    of 40000, 40001, 40002, 40003 in float32.

    Shapes: ``x`` any; xhat as x; r as x with the last ``n_axes`` axes
    of length 1.

    ValueError: x has fewer than ``n_axes`` axes; ``n_axes`` is not a
    positive integer; ``eps`` is negative or not finite.

    Source: Ba, Kiros & Hinton 2016, eq. (3); eps as in torch.
    """
    x, n_axes = as_float("x", x), as_count("n_axes", n_axes, least=1)
    axes = _trailing(x, n_axes)
    _check_eps(eps)
    # A shift changes no variance. By a number of its own row, it makes
    # a constant row exactly 0, and takes 1e8 off 1e8 + x unrounded.
    centred = np.subtract(x, _first(x, axes), dtype=_wide(x))
    centred -= _mean(centred, axes)
    rstd = (_mean(centred**2, axes) + eps) ** -0.5
    xhat = centred * rstd
    return xhat.astype(x.dtype, copy=False), rstd.astype(x.dtype, copy=False)


@_quiet
def layernorm_forward(
    x: Real[np.ndarray, "*shape"],
    gamma: Real[np.ndarray, "*D"],
    beta: Real[np.ndarray, "*D"],
    eps: float = 1e-5,
) -> Float[np.ndarray, "*shape"]:
    r"""Normalise each row, then scale and shift each of its entries.

    .. math:: y = \gamma \circ \hat x + \beta

    Shapes: ``x`` ``(..., *D)``, gamma and beta ``(*D,)``, the result as
    x. D is ``(C,)`` as a rule; any trailing shape will do.

    ValueError: gamma has not the shape of x's trailing axes, or beta
    not that of gamma; ``eps`` is negative or not finite.

    Source: Ba, Kiros & Hinton 2016, eq. (4), with its f the identity.
    """
    (x, gamma, beta), dtype = _widened(x=x, gamma=gamma, beta=beta)
    _check_trailing("gamma", gamma, x)
    check_same_shape("beta", beta, "gamma", gamma)
    xhat, _ = layernorm_statistics(x, gamma.ndim, eps)
    return (gamma * xhat + beta).astype(dtype, copy=False)


@_quiet
def layernorm_backward(
    dy: Real[np.ndarray, "*shape"],
    x: Real[np.ndarray, "*shape"],
    gamma: Real[np.ndarray, "*D"],
    eps: float = 1e-5,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*D"], Float[np.ndarray, "*D"]]:
    r"""Gradients by the input, the scale and the shift.

    .. math:: d\hat x = \gamma \circ dy, \qquad
              dx_i = r \Bigl( d\hat x_i - \frac1n \sum_j d\hat x_j
                     - \hat x_i \, \frac1n \sum_j \hat x_j \, d\hat x_j \Bigr)

    .. math:: d\gamma = \sum_{\mathrm{rows}} dy \circ \hat x, \qquad
              d\beta = \sum_{\mathrm{rows}} dy

    A row of dx sums to 0. The two means are the two ways in which an
    entry moves all others: through the row's mean and its variance.

    Shapes: dy and x ``(..., *D)``, gamma ``(*D,)``; dx as x, dgamma and
    dbeta as gamma.

    ValueError: dy has not x's shape, gamma not that of x's trailing
    axes; ``eps`` is negative or not finite.

    Source: the derivative of Ba, Kiros & Hinton 2016, eqs. (3), (4).
    """
    (dy, x, gamma), dtype = _widened(dy=dy, x=x, gamma=gamma)
    axes = _check_trailing("gamma", gamma, x)
    check_same_shape("dy", dy, "x", x)
    xhat, rstd = layernorm_statistics(x, gamma.ndim, eps)
    dxhat = gamma * dy
    along = _mean(xhat * dxhat, axes)
    dx = rstd * (dxhat - _mean(dxhat, axes) - xhat * along)
    dgamma = unbroadcast(dy * xhat, gamma.shape)
    dbeta = unbroadcast(dy, gamma.shape)
    return _rounded(dtype, dx, dgamma, dbeta)


# --- RMSNorm ----------------------------------------------------------------------------------


@_quiet
def rmsnorm_forward(
    x: Real[np.ndarray, "*shape"],
    gamma: Real[np.ndarray, "*D"],
    eps: float = 1e-5,
) -> Float[np.ndarray, "*shape"]:
    r"""Divide each row by its root mean square, then scale its entries.

    .. math:: y = \gamma \circ r x, \qquad
              r = \frac{1}{\sqrt{\frac1n \sum_i x_i^2 + \varepsilon}}

    LayerNorm without the mean and without the shift. Of a row whose
    mean is 0, both make the same.

    Shapes: ``x`` ``(..., *D)``, gamma ``(*D,)``, the result as x.

    ValueError: gamma has not the shape of x's trailing axes; ``eps`` is
    negative or not finite.

    Source: Zhang & Sennrich 2019, eq. (4); eps as in torch.
    """
    (x, gamma), dtype = _widened(x=x, gamma=gamma)
    axes = _check_trailing("gamma", gamma, x)
    rrms = _reciprocal_rms(x, axes, eps)
    return (gamma * (x * rrms)).astype(dtype, copy=False)


@_quiet
def rmsnorm_backward(
    dy: Real[np.ndarray, "*shape"],
    x: Real[np.ndarray, "*shape"],
    gamma: Real[np.ndarray, "*D"],
    eps: float = 1e-5,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*D"]]:
    r"""Gradients by the input and the scale.

    .. math:: \hat x = r x, \qquad d\hat x = \gamma \circ dy, \qquad
              dx_i = r \Bigl( d\hat x_i
                     - \hat x_i \, \frac1n \sum_j \hat x_j \, d\hat x_j \Bigr),
              \qquad d\gamma = \sum_{\mathrm{rows}} dy \circ \hat x

    LayerNorm's without the first mean: nothing was centred.

    Shapes: dy and x ``(..., *D)``, gamma ``(*D,)``; dx as x, dgamma as
    gamma.

    ValueError: dy has not x's shape, gamma not that of x's trailing
    axes; ``eps`` is negative or not finite.

    Source: the derivative of Zhang & Sennrich 2019, eq. (4).
    """
    (dy, x, gamma), dtype = _widened(dy=dy, x=x, gamma=gamma)
    axes = _check_trailing("gamma", gamma, x)
    check_same_shape("dy", dy, "x", x)
    rrms = _reciprocal_rms(x, axes, eps)
    xhat, dxhat = x * rrms, gamma * dy
    dx = rrms * (dxhat - xhat * _mean(xhat * dxhat, axes))
    dgamma = unbroadcast(dy * xhat, gamma.shape)
    return _rounded(dtype, dx, dgamma)


# --- the residual connection ------------------------------------------------------------------


@_quiet
def residual_forward(
    x: Real[np.ndarray, "*shape"],
    sublayer: Callable[..., Any],
) -> Float[np.ndarray, "*shape"]:
    r"""A sublayer's output added to its input.

    .. math:: y = x + f(x)

    Shapes: ``x`` and ``sublayer(x)`` the same, any; the result too.

    ValueError: ``sublayer(x)`` has another shape.

    Source: He et al. 2016 (deep residual learning), eq. (1).
    """
    x = as_float("x", x)
    return x + _branch("sublayer", sublayer, "x", x)


@_quiet
def residual_backward(
    dout: Real[np.ndarray, "*shape"],
    sublayer_backward: Callable[..., Any],
) -> Float[np.ndarray, "*shape"]:
    r"""The gradient of both ways to the output: past f, and through it.

    .. math:: dx = d\mathrm{out} + J_f^\top \, d\mathrm{out}

    ``sublayer_backward`` takes dout to the gradient by f's input, and
    must not write to it. Where it returns next to nothing, dout still
    arrives whole.

    Shapes: ``dout`` and ``sublayer_backward(dout)`` the same, any; the
    result too.

    ValueError: ``sublayer_backward(dout)`` has another shape.

    Source: He et al. 2016 (identity mappings), eq. (5).
    """
    dout = as_float("dout", dout)
    return dout + _branch("sublayer_backward", sublayer_backward, "dout", dout)


# --- dropout ----------------------------------------------------------------------------------


@_quiet
def dropout_forward(
    x: Real[np.ndarray, "*shape"],
    keep: Bool[np.ndarray, "*#shape"],
    rate: float,
) -> Float[np.ndarray, "*shape"]:
    r"""Zeros where nothing is kept, the rest scaled up to make up for it.

    .. math:: y = \frac{\mathrm{keep} \circ x}{1 - \mathrm{rate}}

    So the expected y is x, and at test time nothing is to be done
    ("inverted" dropout). ``keep`` is drawn with chance 1 - rate of True
    (:func:`attn_lessons.attention.dropout_keep`) and used again in the
    backward pass. What is dropped may be NaN.

    Shapes: ``x`` any, ``keep`` broadcasts to it; the result as x.

    ValueError: ``keep`` is not boolean or does not broadcast; ``rate``
    lies outside [0, 1).

    Source: Srivastava et al. 2014, section 4; scaled as in section 10.
    """
    return _dropped("x", x, keep, rate)


@_quiet
def dropout_backward(
    dout: Real[np.ndarray, "*shape"],
    keep: Bool[np.ndarray, "*#shape"],
    rate: float,
) -> Float[np.ndarray, "*shape"]:
    r"""The gradient, through the entries that were kept alone.

    .. math:: dx = \frac{\mathrm{keep} \circ d\mathrm{out}}{1 - \mathrm{rate}}

    Shapes: ``dout`` any, ``keep`` the one of the forward pass; the
    result as dout.

    ValueError: ``keep`` is not boolean or does not broadcast; ``rate``
    lies outside [0, 1).
    """
    return _dropped("dout", dout, keep, rate)


# --- rows -------------------------------------------------------------------------------------


def _trailing(x, n_axes):
    if n_axes > x.ndim:
        raise ValueError(f"x: expected at least {_count(n_axes)}; got shape {x.shape}")
    return tuple(range(x.ndim - n_axes, x.ndim))


def _first(x, axes):
    """The first entry of each row, its axes kept."""
    return x[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))]


def _mean(x, axes):
    # Of no numbers it is 0: there is no row to be wrong about.
    n = max(int(np.prod([x.shape[axis] for axis in axes])), 1)
    return x.sum(axis=axes, keepdims=True) / n


def _reciprocal_rms(x, axes, eps):
    _check_eps(eps)
    return (_mean(x**2, axes) + eps) ** -0.5


# --- at the door and on the way out -----------------------------------------------------------


def _wide(x):
    # The square of 300 does not fit float16, that of 2e19 not float32.
    return np.result_type(x, np.float64)


def _widened(**arrays):
    """The arguments in float64, and the dtype to round the results to."""
    narrow = [as_float(name, array) for name, array in arrays.items()]
    dtype = np.result_type(*narrow)
    return [array.astype(_wide(array), copy=False) for array in narrow], dtype


def _rounded(dtype, *results):
    return tuple(result.astype(dtype, copy=False) for result in results)


def _check_trailing(name, gamma, x):
    """The axes of x that gamma has; ValueError where they differ in length."""
    if not 1 <= gamma.ndim <= x.ndim:
        raise ValueError(
            f"{name}: expected the shape of trailing axes of x {x.shape}; got {gamma.shape}"
        )
    wanted = x.shape[x.ndim - gamma.ndim :]
    if gamma.shape != wanted:
        raise ValueError(
            f"{name}: expected shape {wanted}, that of the last {_count(gamma.ndim)} of x "
            f"{x.shape}; got {gamma.shape}"
        )
    return _trailing(x, gamma.ndim)


def _count(n):
    return "1 axis" if n == 1 else f"{n} axes"


def _check_eps(eps):
    if not 0 <= eps < np.inf:
        raise ValueError(f"eps: expected a finite number of at least 0; got {eps!r}")


def _branch(name, function: Callable[..., Any], argument, x: Shaped[np.ndarray, "..."]):
    out = as_float(f"{name}({argument})", function(x))
    check_same_shape(f"{name}({argument})", out, argument, x)
    return out


def _dropped(name, x, keep, rate):
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1); got {rate!r}")
    x, keep = as_float(name, x), as_bool("keep", keep)
    check_broadcasts("keep", keep, x.shape)
    # Not keep * x: 0 * NaN would let through what was dropped.
    return np.where(keep, x / (1 - rate), 0)
