"""Chapter 2 in many hands."""

import math
from fractions import Fraction

import numpy as np
import torch

from answers import mutating, right, wrong

# ------------------------------------------------------------------------- numerical_gradient


@right("numerical_gradient")
def gradient_copies(f, x, eps=None):
    h = 1e-5 if eps is None else eps
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[i] += h
        below[i] -= h
        gradient[i] = (f(above) - f(below)) / (2 * h)
    return gradient


@right("numerical_gradient")
def gradient_in_place_and_put_back(f, x, eps=1e-6):
    eps = eps or 1e-6
    gradient = np.empty_like(x)
    walk = np.nditer(x, flags=["multi_index"])
    for _ in walk:
        i = walk.multi_index
        saved = x[i].item()
        x[i] = saved + eps
        above = f(x)
        x[i] = saved - eps
        below = f(x)
        x[i] = saved
        gradient[i] = (above - below) / (2 * eps)
    return gradient


@right("numerical_gradient")
def gradient_through_flat(f, x, eps=None):
    h = eps if eps is not None else np.finfo(float).eps ** (1 / 3)
    gradient = np.zeros(x.shape)
    for n in range(x.size):
        moved = x.copy()
        start = moved.flat[n]
        moved.flat[n] = start + h
        gradient.flat[n] = f(moved)
        moved.flat[n] = start - h
        gradient.flat[n] = (gradient.flat[n] - f(moved)) / h / 2
    return gradient


@right("numerical_gradient")
def gradient_unit_vectors(f, x, eps=None):
    h = 1e-4 if eps is None else eps
    units = np.eye(x.size).reshape(x.size, *x.shape)
    slopes = [(f(x + h * e) - f(x - h * e)) / (2 * h) for e in units]
    return np.reshape(slopes, x.shape).tolist()


@right("numerical_gradient")
def gradient_scaled_default(f, x, eps=None):
    gradient = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        h = eps if eps is not None else 1e-6 * max(1.0, abs(float(x[i])))
        e = np.zeros(x.shape)
        e[i] = h
        gradient[i] = (f(x + e) - f(x - e)) / (2 * h)
    return gradient


@right("numerical_gradient")
def gradient_true_distance(f, x, eps=None):
    h = 1e-7 if eps is None else eps
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        above, below = np.array(x), np.array(x)
        above[i] = x[i] + h
        below[i] = x[i] - h
        gradient[i] = (f(above) - f(below)) / (above[i] - below[i])
    return gradient


@right("numerical_gradient")
def gradient_extrapolated_default(f, x, eps=None):
    if eps is not None:
        return gradient_copies(f, x, eps)
    coarse, fine = gradient_copies(f, x, 2e-3), gradient_copies(f, x, 1e-3)
    return (4 * fine - coarse) / 3


@right("numerical_gradient")
def gradient_mean_of_both_sides(f, x, eps=None):
    h = 1e-3 if eps is None else eps
    middle = f(x)
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        e = np.zeros(x.shape)
        e[i] = h
        gradient[i] = ((f(x + e) - middle) / h + (middle - f(x - e)) / h) / 2
    return gradient


@right("numerical_gradient")
def gradient_torch(f, x, eps=None):
    return torch.tensor(gradient_copies(f, x, eps)).requires_grad_()


@mutating("numerical_gradient")
def gradient_put_back_by_adding(f, x, eps=None):
    h = 1e-5 if eps is None else eps
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        x[i] += h
        above = f(x)
        x[i] -= 2 * h
        below = f(x)
        x[i] += h
        gradient[i] = (above - below) / (2 * h)
    return gradient


@mutating("numerical_gradient")
def gradient_returned_in_x(f, x, eps=None):
    x[...] = gradient_copies(f, x, eps)
    return x


@wrong("numerical_gradient")
def gradient_complex_step(f, x, eps=None):
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[i] += 1e-20j
        gradient[i] = f(moved).imag / 1e-20
    return gradient


@wrong("numerical_gradient")
def gradient_wider_step(f, x, eps=None):
    return gradient_copies(f, x, None if eps is None else 2 * eps)


@wrong("numerical_gradient")
def gradient_multiplied(f, x, eps=None):
    h = 1e-5 if eps is None else eps
    return gradient_copies(f, x, eps) * (2 * h)


@wrong("numerical_gradient")
def gradient_first_entry_only(f, x, eps=None):
    gradient = gradient_copies(f, x, eps)
    gradient.flat[1:] = 0
    return gradient


@wrong("numerical_gradient")
def gradient_as_object(f, x, eps=None):
    return gradient_copies(f, x, eps).astype(object)


# ----------------------------------------------------------------------------- relative_error


@right("relative_error")
def relative_error_plain(a, b):
    scale = np.maximum(np.abs(a), np.abs(b))
    return np.max(np.abs(a - b) / np.where(scale == 0, 1, scale))


@right("relative_error")
def relative_error_loops(a, b):
    worst = 0.0
    for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        if math.isnan(x) or math.isnan(y):
            return math.nan
        if x != y:
            worst = max(worst, abs(x - y) / max(abs(x), abs(y)))
    return worst


@right("relative_error")
def relative_error_divide_where(a, b):
    scale = np.maximum(np.abs(a), np.abs(b))
    return np.divide(np.abs(a - b), scale, out=np.zeros(a.shape), where=scale != 0).max()


@right("relative_error")
def relative_error_nan_first(a, b):
    if np.isnan(a).any() or np.isnan(b).any():
        return np.nan
    used = (a != 0) | (b != 0)
    if not used.any():
        return 0
    a, b = a[used], b[used]
    return np.array(np.max(np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))))


@right("relative_error")
def relative_error_torch(a, b):
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    ratio = (a - b).abs() / torch.maximum(a.abs(), b.abs())
    return torch.where((a == 0) & (b == 0), 0.0, ratio).max()


@right("relative_error")
def relative_error_fractions(a, b):
    if np.isnan(a + b).any():
        return np.array(float("nan"))
    pairs = [(Fraction(a[i]), Fraction(b[i])) for i in np.ndindex(a.shape) if a[i] != b[i]]
    return float(max((abs(x - y) / max(abs(x), abs(y)) for x, y in pairs), default=0))


@right("relative_error")
def relative_error_smallest_floor(a, b):
    scale = np.maximum(np.maximum(abs(a), abs(b)), np.finfo(float).tiny)
    return (abs(a - b) / scale).max()


@mutating("relative_error")
def relative_error_subtracts_in_place(a, b):
    scale = np.maximum(np.abs(a), np.abs(b))
    a -= b
    return np.max(np.abs(a) / np.where(scale == 0, 1, scale))


@wrong("relative_error")
def relative_error_squared(a, b):
    return relative_error_plain(a, b) ** 2


@wrong("relative_error")
def relative_error_median(a, b):
    scale = np.maximum(np.abs(a), np.abs(b))
    return np.median(np.abs(a - b) / np.where(scale == 0, 1, scale))


@wrong("relative_error")
def relative_error_sorted(a, b):
    return relative_error_plain(np.sort(a.ravel()), np.sort(b.ravel()))


# -------------------------------------------------------------------------- directional_check


@right("directional_check")
def directional_plain(f, x, grad, v, eps=None):
    h = 1e-5 if eps is None else eps
    measured = (f(x + h * v) - f(x - h * v)) / (2 * h)
    return relative_error_plain(np.sum(grad * v), measured)


@right("directional_check")
def directional_raveled(f, x, grad, v, eps=None):
    h = eps or 1e-6
    measured = (f(x + h * v) - f(x - h * v)) / (2 * h)
    predicted = grad.ravel() @ v.ravel()
    if predicted == measured == 0:
        return 0
    return abs(predicted - measured) / np.maximum(abs(predicted), abs(measured))


@right("directional_check")
def directional_along_a_line(f, x, grad, v, eps=None):
    def g(t):
        return f(x + t * v)

    slope = gradient_copies(g, np.array(0.0), eps)
    return relative_error_divide_where(np.tensordot(grad, v, v.ndim), slope)


@right("directional_check")
def directional_vdot(f, x, grad, v, eps=None):
    h = 1e-4 if eps is None else eps
    measured = (f(x + h * v) - f(x - h * v)) / h / 2
    return np.array(relative_error_loops(np.asarray(np.vdot(grad, v)), np.asarray(measured)))


@right("directional_check")
def directional_einsum(f, x, grad, v, eps=None):
    h = 1e-7 if eps is None else eps
    axes = "abcdef"[: x.ndim]
    predicted = np.einsum(f"{axes},{axes}->", grad, v)
    measured = (f(x + h * v) - f(x - h * v)) / (2 * h)
    return relative_error_nan_first(np.array(predicted), np.array(measured))


@right("directional_check")
def directional_torch(f, x, grad, v, eps=None):
    h = 1e-5 if eps is None else eps
    predicted = (torch.tensor(grad, requires_grad=True) * torch.tensor(v)).sum()
    measured = torch.tensor((f(x + h * v) - f(x - h * v)) / (2 * h))
    error = (predicted - measured).abs() / torch.maximum(predicted.abs(), measured.abs())
    return error if predicted != 0 or measured != 0 else 0.0


@right("directional_check")
def directional_tiny_floor(f, x, grad, v, eps=None):
    h = 1e-5 if eps is None else eps
    above, below = x.copy(), x.copy()
    above += h * v
    below -= h * v
    predicted = sum(a * b for a, b in zip(grad.flat, v.flat, strict=True))
    measured = (f(above) - f(below)) / (2 * h)
    return abs(predicted - measured) / max(abs(predicted), abs(measured), 1e-12)


@mutating("directional_check")
def directional_moves_x(f, x, grad, v, eps=None):
    h = 1e-5 if eps is None else eps
    x += h * v
    above = f(x)
    x -= 2 * h * v
    return relative_error_plain(np.sum(grad * v), (above - f(x)) / (2 * h))


@wrong("directional_check")
def directional_mean(f, x, grad, v, eps=None):
    h = 1e-5 if eps is None else eps
    return relative_error_plain(np.mean(grad * v), (f(x + h * v) - f(x - h * v)) / (2 * h))


@wrong("directional_check")
def directional_whole_gradient(f, x, grad, v, eps=None):
    return relative_error_plain(grad, gradient_copies(f, x, eps))


@wrong("directional_check")
def directional_only_magnitudes(f, x, grad, v, eps=None):
    h = 1e-5 if eps is None else eps
    measured = (f(x + h * v) - f(x - h * v)) / (2 * h)
    return relative_error_plain(np.abs(np.sum(grad * v)), np.abs(measured))


# -------------------------------------------------------------------------------- first_wrong


@right("first_wrong")
def first_wrong_loop(names, got, want, rtol):
    for name, a, b in zip(names, got, want, strict=True):
        if not relative_error_plain(a, b) <= rtol:
            return name
    return None


@right("first_wrong")
def first_wrong_no_return(names, got, want, rtol):
    for i in range(len(names)):
        error = relative_error_loops(got[i], want[i])
        if math.isnan(error) or error > rtol:
            return names[i]


@right("first_wrong")
def first_wrong_next(names, got, want, rtol):
    off = (n for n, a, b in zip(names, got, want, strict=True) if _off(a, b, rtol))
    return next(off, None)


def _off(a, b, rtol):
    return not (np.abs(a - b) <= rtol * np.maximum(np.abs(a), np.abs(b))).all()


@right("first_wrong")
def first_wrong_allclose(names, got, want, rtol):
    for name, a, b in zip(names, got, want, strict=True):
        if not np.allclose(a, b, rtol=rtol, atol=0):
            return np.str_(name)
    return None


@right("first_wrong")
def first_wrong_recursive(names, got, want, rtol):
    if not names:
        return None
    if _off(got[0], want[0], rtol):
        return names[0]
    return first_wrong_recursive(names[1:], got[1:], want[1:], rtol)


@right("first_wrong")
def first_wrong_torch(names, got, want, rtol):
    for name, a, b in zip(names, got, want, strict=True):
        a, b = torch.from_numpy(a.copy()), torch.from_numpy(b.copy())
        if not torch.allclose(a, b, rtol=rtol, atol=0.0):
            return name


@right("first_wrong")
def first_wrong_assertion(names, got, want, rtol):
    for name, a, b in zip(names, got, want, strict=True):
        try:
            np.testing.assert_allclose(a, b, rtol=rtol, equal_nan=False)
        except AssertionError:
            return name
    return None


@mutating("first_wrong")
def first_wrong_pops(names, got, want, rtol):
    while names:
        name = names.pop(0)
        if _off(got.pop(0), want.pop(0), rtol):
            return name
    return None


@wrong("first_wrong")
def first_wrong_second(names, got, want, rtol):
    off = [n for n, a, b in zip(names, got, want, strict=True) if _off(a, b, rtol)]
    return off[1] if len(off) > 1 else (off[0] if off else None)


@wrong("first_wrong")
def first_wrong_by_name(names, got, want, rtol):
    off = [n for n, a, b in zip(names, got, want, strict=True) if _off(a, b, rtol)]
    return min(off, default=None)


@wrong("first_wrong")
def first_wrong_truth(names, got, want, rtol):
    return first_wrong_loop(names, got, want, rtol) is not None


@wrong("first_wrong")
def first_wrong_sums(names, got, want, rtol):
    for name, a, b in zip(names, got, want, strict=True):
        if not relative_error_plain(a.sum(), b.sum()) <= rtol:
            return name
    return None
