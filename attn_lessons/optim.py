r"""Optimizers, clipping and learning-rate schedules as pure functions of their inputs.

The conventions are the same in every function:

- Nothing is written to: a step takes parameters and moments and returns new ones.
- Steps count from 1: the first update is ``step=1``. Schedules return 0 at ``step=0``.
- Weight decay is the coefficient that the framework calls ``weight_decay``; a step's decay is that
  times the learning rate.
- float32 stays float32, and the scalars are Python floats, which do not lift it.
- Groups of parameters are dicts from name to array; a gradient's dict has the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real

from attn_lessons._arrays import as_count, as_float, check_same_shape

Arrays = Mapping[str, np.ndarray]

# torch's clip_grad_norm_ adds this to the norm; so a clipped gradient is a
# millionth (at norm 1) shorter than max_norm.
CLIP_EPS = 1e-6

_quiet = np.errstate(all="ignore")


def sgd_step(
    param: Real[np.ndarray, "*shape"],
    grad: Real[np.ndarray, "*shape"],
    velocity: Real[np.ndarray, "*shape"],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = False,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    r"""One step of stochastic gradient descent with momentum.

    .. math:: g = \nabla L + \lambda\theta, \qquad u \leftarrow \mu u + g,
              \qquad \theta \leftarrow \theta - \eta\,u

    with ``nesterov`` :math:`\theta \leftarrow \theta - \eta (g + \mu u)`.

    Shapes: all arrays as ``param``; returns ``(param, velocity)``. Zeros
    are the velocity before the first step.

    ValueError: shapes differ; ``momentum`` outside [0, 1); ``lr`` or
    ``weight_decay`` negative or not finite.

    Source: Sutskever et al. 2013, eqs. (1)–(2), with the learning rate
    outside the velocity, as in torch.
    """
    param, grad, velocity = _alike(param, grad=grad, velocity=velocity)
    lr, decay = _amount("lr", lr), _amount("weight_decay", weight_decay)
    mu = _fraction("momentum", momentum)
    g = grad + decay * param
    velocity = mu * velocity + g
    return param - lr * (g + mu * velocity if nesterov else velocity), velocity


def adam_step(
    param: Real[np.ndarray, "*shape"],
    grad: Real[np.ndarray, "*shape"],
    m: Real[np.ndarray, "*shape"],
    v: Real[np.ndarray, "*shape"],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    r"""One step of Adam; ``weight_decay`` is an L2 penalty in the gradient.

    .. math:: g = \nabla L + \lambda\theta, \quad
              m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
              v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
              \theta \leftarrow \theta - \eta\,
              \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    Shapes: all arrays as ``param``; returns ``(param, m, v)``. Zeros are
    the moments before ``step=1``.

    ValueError: shapes differ; ``step`` < 1; a beta outside [0, 1);
    ``lr``, ``eps`` or ``weight_decay`` negative or not finite.

    Source: Kingma & Ba 2015, algorithm 1.
    """
    param, grad, m, v = _alike(param, grad=grad, m=m, v=v)
    decay = _amount("weight_decay", weight_decay)
    m, v, change = _adam(grad + decay * param, m, v, step, betas, eps)
    return param - _amount("lr", lr) * change, m, v


def adamw_step(
    param: Real[np.ndarray, "*shape"],
    grad: Real[np.ndarray, "*shape"],
    m: Real[np.ndarray, "*shape"],
    v: Real[np.ndarray, "*shape"],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    r"""One step of AdamW: the decay bypasses the moments.

    .. math:: \theta \leftarrow (1 - \eta\lambda)\,\theta - \eta\,
              \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    with Adam's m and v of the gradient alone. The decay is of the
    parameter as it came in.

    Shapes, errors: as in adam_step.

    Source: Loshchilov & Hutter 2019, algorithm 2; as in torch, the
    decay is decoupled from the gradient but not from ``lr``.
    """
    param, grad, m, v = _alike(param, grad=grad, m=m, v=v)
    lr, decay = _amount("lr", lr), _amount("weight_decay", weight_decay)
    m, v, change = _adam(grad, m, v, step, betas, eps)
    return (1 - lr * decay) * param - lr * change, m, v


class AdamState(NamedTuple):
    """What Adam and AdamW remember between steps."""

    step: int
    """How many steps were taken."""
    m: dict[str, np.ndarray]
    """Running mean of each gradient, by parameter name."""
    v: dict[str, np.ndarray]
    """Running mean of its square."""


def adam_start(params: Arrays) -> AdamState:
    """The state before the first step: moments of zero."""
    zeros = {name: np.zeros_like(as_float(name, p)) for name, p in params.items()}
    return AdamState(0, zeros, {name: z.copy() for name, z in zeros.items()})


def adamw_update(
    params: Arrays,
    grads: Arrays,
    state: AdamState,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decayed: Iterable[str] | None = None,
) -> tuple[dict[str, np.ndarray], AdamState]:
    """One AdamW step of a whole model: new parameters and state.

    ``decayed`` names the parameters that decay, those of decay_names when None; the others take the
    same step with ``weight_decay`` 0.

    ValueError: ``grads`` or ``state`` have other names than ``params``; ``decayed`` names a
    parameter that does not exist; and adamw_step's errors.
    """
    _same_names("grads", grads, params)
    _same_names("state.m", state.m, params)
    _same_names("state.v", state.v, params)
    chosen = set(decay_names(params) if decayed is None else decayed)
    if unknown := sorted(chosen - set(params)):
        raise ValueError(f"decayed: expected names of parameters; got {', '.join(unknown)}")
    step = state.step + 1
    stepped = {
        name: adamw_step(
            param,
            grads[name],
            state.m[name],
            state.v[name],
            step,
            lr,
            betas,
            eps,
            weight_decay if name in chosen else 0.0,
        )
        for name, param in params.items()
    }
    new, m, v = ({name: each[i] for name, each in stepped.items()} for i in range(3))
    return new, AdamState(step, m, v)


def decay_names(params: Arrays) -> tuple[str, ...]:
    """The parameters that weight decay is meant for: the matrices of projections.

    Biases and the gains of norms have one axis; embeddings, whose rows are looked up and not
    multiplied by, have ``embed`` or ``position`` in their names.
    """
    return tuple(
        name
        for name, param in params.items()
        if np.ndim(param) >= 2 and not ("embed" in name or "position" in name)
    )


@_quiet
def global_norm(grads: Arrays) -> float:
    r"""Euclidean length of all gradients taken as one vector.

    .. math:: \|g\| = s \sqrt{\sum_i (g_i / s)^2}, \qquad s = \max_i |g_i|

    The largest entry goes out of the sum first, because squares of 1e20
    overflow in float32. NaN where an entry is NaN, inf where one is
    infinite.
    """
    arrays = [np.asarray(as_float(name, g), np.float64) for name, g in grads.items()]
    peak = float(max((np.abs(g).max(initial=0) for g in arrays), default=0.0))
    if any(np.isnan(g).any() for g in arrays):
        return math.nan
    if peak == 0 or math.isinf(peak):
        return peak
    return peak * math.sqrt(sum(float(np.square(g / peak).sum()) for g in arrays))


def clip_by_global_norm(
    grads: Mapping[str, np.ndarray], max_norm: float
) -> tuple[dict[str, np.ndarray], float]:
    r"""Gradients shortened together to a common length, and the length they had.

    .. math:: g \leftarrow g \cdot \min\Bigl(1,
              \frac{c}{\|g\| + 10^{-6}}\Bigr)

    One factor for all, so the direction is kept. Where the norm is inf
    or NaN no factor is right (inf · 0 is NaN): the gradients come back
    as they are, and the norm says that this step is to be skipped.

    Shapes: each gradient keeps its own; returns ``(grads, norm)``.

    ValueError: ``max_norm`` is negative or not a number.

    Source: Pascanu et al. 2013, algorithm 1; the 1e-6 is torch's.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected a number >= 0; got {max_norm!r}")
    norm = global_norm(grads)
    factor = min(1.0, float(max_norm) / (norm + CLIP_EPS)) if math.isfinite(norm) else 1.0
    return {name: as_float(name, g) * factor for name, g in grads.items()}, norm


def warmup_inverse_sqrt(step: int, d_model: int, warmup: int) -> float:
    r"""The Transformer's learning rate: linear up, then 1/√step.

    .. math:: \eta_t = d^{-1/2} \min(t^{-1/2},\; t \cdot w^{-3/2})

    The peak, at ``step == warmup``, is (d·w)^-1/2.

    ValueError: ``step`` < 0, ``d_model`` or ``warmup`` < 1, or no integers.

    Source: Vaswani et al. 2017, eq. (3).
    """
    step, warmup = as_count("step", step), as_count("warmup", warmup, 1)
    peak = (as_count("d_model", d_model, 1) * warmup) ** -0.5
    return peak * min(step / warmup, (warmup / step) ** 0.5 if step else 0.0)


def warmup_cosine(step: int, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    r"""Linear up to ``peak``, half a cosine down to ``floor``.

    .. math:: \eta_t = \begin{cases} p\,t/w & t < w \\
              f + \tfrac12 (p - f) \Bigl(1 + \cos \pi
              \frac{t - w}{T - w}\Bigr) & w \le t \le T \\
              f & t > T \end{cases}

    ``warmup=0`` begins at the peak.

    ValueError: ``step`` or ``warmup`` < 0 or no integer; ``total`` <
    ``warmup``; ``peak`` or ``floor`` negative or not finite.

    Source: Loshchilov & Hutter 2017, eq. (5), one cycle, after a warm-up.
    """
    step, warmup = as_count("step", step), as_count("warmup", warmup)
    peak, floor = _amount("peak", peak), _amount("floor", floor)
    if as_count("total", total) < warmup:
        raise ValueError(f"total: expected at least warmup, {warmup}; got {total}")
    if step < warmup:
        return peak * step / warmup
    if step >= total:
        return floor if total > warmup or step > total else peak
    return floor + (peak - floor) / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@_quiet
def _adam(grad, m, v, step, betas, eps):
    """New moments, and the change of the parameter per unit of learning rate."""
    step, eps = as_count("step", step, 1), _amount("eps", eps)
    first, second = betas
    first, second = _fraction("betas[0]", first), _fraction("betas[1]", second)
    m = first * m + (1 - first) * grad
    v = second * v + (1 - second) * grad * grad
    # 1 - 0.999**1 of the gradient's square is in v: divided out before the
    # root, as in the paper. With eps inside the root, g = 1e-8 would hardly move.
    root = np.sqrt(v) / (1 - second**step) ** 0.5
    change = m / (1 - first**step) / (root + eps)
    # eps = 0 and a gradient that was always 0: 0/0 stands for no change.
    return m, v, np.where((m == 0) & (root == 0), 0, change).astype(m.dtype, copy=False)


def _alike(param, **others):
    param = as_float("param", param)
    arrays = {name: as_float(name, x) for name, x in others.items()}
    for name, x in arrays.items():
        check_same_shape(name, x, "param", param)
    return (param, *arrays.values())


def _same_names(what, got, params):
    missing, extra = sorted(set(params) - set(got)), sorted(set(got) - set(params))
    if missing or extra:
        parts = [f"without {', '.join(missing)}"] * bool(missing)
        parts += [f"with {', '.join(extra)} besides"] * bool(extra)
        raise ValueError(f"{what}: expected the names of params; got them {' and '.join(parts)}")


def _amount(name: str, x: float) -> float:
    if not 0 <= x < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0; got {x!r}")
    return float(x)


def _fraction(name: str, x: float) -> float:
    if not 0 <= x < 1:
        raise ValueError(f"{name}: expected a number in [0, 1); got {x!r}")
    return float(x)
