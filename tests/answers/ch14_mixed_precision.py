"""Chapter 14 in many hands."""

import math
import struct

import numpy as np
import torch

from answers import mutating, right, wrong

# ------------------------------------------------------------------------------ round_to_bf16


@right("round_to_bf16")
def bf16_bits(x):
    single = x.astype(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(single), np.nan, rounded.view(np.float32))


@right("round_to_bf16")
def bf16_bits_in_int64(x):
    """Wide integers: no carry is ever lost, and NaN is set aside by its pattern."""
    bits = np.float32(x).view(np.uint32).astype(np.int64)
    upper, lower = bits >> 16, bits & 0xFFFF
    up = (lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1))
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    out = ((upper + up) << 16).astype(np.uint32).view(np.float32).astype(x.dtype)
    return np.where(nan, x, out)


@right("round_to_bf16")
def bf16_torch(x):
    return torch.tensor(x).to(torch.bfloat16)


@right("round_to_bf16")
def bf16_torch_and_back(x):
    t = torch.from_numpy(np.array(x))
    return t.bfloat16().to(t.dtype).numpy()


@right("round_to_bf16")
def bf16_frexp(x):
    wide = x.astype(np.float64)
    mantissa, exponent = np.frexp(wide)
    shift = np.minimum(8, exponent + 133)  # digits left where the numbers are subnormal
    y = np.ldexp(np.round(np.ldexp(mantissa, shift)), exponent - shift)
    y = np.where(np.abs(y) >= 2.0**128, np.sign(y) * np.inf, y)
    return np.where(np.isfinite(wide), y, wide)


@right("round_to_bf16")
def bf16_logarithms(x):
    wide = x.astype(np.float64)
    usual = (wide != 0) & np.isfinite(wide)
    exponent = np.floor(np.log2(np.abs(np.where(usual, wide, 1.0))))
    gap = 2.0 ** (np.maximum(exponent, -126) - 7)
    y = np.rint(wide / gap) * gap
    y[np.abs(y) > 3.3895314e38] *= np.inf
    return np.where(usual, y, wide)


@right("round_to_bf16")
def bf16_struct(x):
    out = np.empty(x.shape)
    for at in np.ndindex(x.shape):
        value = float(x[at])
        if math.isnan(value):
            out[at] = value
            continue
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        rest = bits & 0xFFFF
        bits -= rest
        if rest > 0x8000 or (rest == 0x8000 and bits & 0x10000):
            bits += 0x10000
        (out[at],) = struct.unpack("<f", struct.pack("<I", bits))
    return out


@right("round_to_bf16")
def bf16_halves_of_a_word(x):
    """The two uint16 of every float32."""
    single = np.ascontiguousarray(x, dtype="<f4")
    words = single.view("<u2").reshape(*x.shape, 2).copy()
    low, high = words[..., 0].copy(), words[..., 1].copy()
    high += ((low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))).astype(np.uint16)
    words[..., 0], words[..., 1] = 0, high
    out = words.view("<f4")[..., 0]
    out[np.isnan(single)] = np.nan
    return out


@right("round_to_bf16")
def bf16_by_two_neighbours(x):
    """Cut off, and the next one after it; the nearer is taken."""
    single = np.asarray(x, np.float32)
    bits = single.view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    high = np.where(np.isfinite(single), low + np.uint32(0x10000), low).astype(np.uint32)
    lower, upper = (b.view(np.float32).astype(np.float64) for b in (low, high))
    upper = np.where(np.isfinite(single), upper.clip(-(2.0**128), 2.0**128), upper)
    down, up = np.abs(single - lower), np.abs(upper - single)
    even = (low >> np.uint32(16)) % 2 == 0
    y = np.where((down < up) | ((down == up) & even), lower, upper)
    y = np.where(np.abs(y) == 2.0**128, np.sign(y) * np.inf, y)
    return np.where(np.isnan(single) | np.isinf(single), single, y)


@mutating("round_to_bf16")
def bf16_in_place(x):
    x[...] = bf16_bits(x)
    return x


@wrong("round_to_bf16")
def bf16_stochastic(x):
    bits = x.astype(np.float32).view(np.uint32)
    noise = np.random.default_rng(0).integers(0, 1 << 16, x.shape, np.uint32)
    cut = ((bits + noise) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), x, cut)


@wrong("round_to_bf16")
def bf16_lower_half(x):
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF)).view(np.float32)


@wrong("round_to_bf16")
def bf16_decimal(x):
    return np.array([float(f"{v:.2e}") for v in x.ravel()]).reshape(x.shape)


# ------------------------------------------------------------------------ mixed_precision_dot


def nearest(x, format):
    if format == "float32":
        return np.float32(x)
    return np.float16(x) if format == "float16" else np.float32(bf16_bits(np.asarray(x)))


@right("mixed_precision_dot")
def dot_plain(a, b, accumulate="float32"):
    a, b = a.astype(np.float16).astype(float), b.astype(np.float16).astype(float)
    total = np.zeros(a.shape[:-1])
    for i in range(a.shape[-1]):
        total = nearest(total + a[..., i] * b[..., i], accumulate).astype(float)
    return total


@right("mixed_precision_dot")
def dot_in_float32(a, b, accumulate="float32"):
    """Everything in float32, and rounded from there."""
    a, b = (np.asarray(np.asarray(x, np.float16), np.float32) for x in (a, b))
    total = np.zeros(a.shape[:-1], np.float32)
    for p in np.moveaxis(a * b, -1, 0):
        total = nearest(total + p, accumulate).astype(np.float32)
    return total


@right("mixed_precision_dot")
def dot_torch(a, b, accumulate="float32"):
    dtype = getattr(torch, accumulate)
    a, b = (torch.tensor(x).half().float() for x in (a, b))
    total = torch.zeros(a.shape[:-1], dtype=dtype)
    for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True):
        total = (total.float() + x * y).to(dtype)
    return total


@right("mixed_precision_dot")
def dot_loops(a, b, accumulate="float32"):
    def step(s, x, y):
        s = float(s) + float(np.float16(x)) * float(np.float16(y))
        if accumulate != "bfloat16":
            return np.dtype(accumulate).type(s)
        return bf16_torch(np.array([s]))[0].item()

    def one(row, column):
        s = 0.0
        for x, y in zip(row, column, strict=True):
            s = step(s, x, y)
        return float(s)

    if a.ndim == 1:
        return one(a, b)
    rows = [one(a[at], b[at]) for at in np.ndindex(a.shape[:-1])]
    return np.reshape(rows, a.shape[:-1]).tolist()


@right("mixed_precision_dot")
def dot_accumulated(a, b, accumulate="float32"):
    """np.add.accumulate adds up in turn; of its sums the last is wanted."""
    p = a.astype(np.float16).astype(np.float32) * b.astype(np.float16).astype(np.float32)
    if accumulate == "float32":
        return np.add.accumulate(p, axis=-1, dtype=np.float32)[..., -1]
    s = nearest(p[..., 0], accumulate)
    for i in range(1, p.shape[-1]):
        s = nearest(s.astype(np.float64) + p[..., i], accumulate)
    return s


@right("mixed_precision_dot")
def dot_with_the_library(a, b, accumulate="float32"):
    from attn_lessons.precision import round_to, round_to_fp16

    total = np.zeros(a.shape[:-1])
    for x, y in zip(*(np.moveaxis(round_to_fp16(v), -1, 0) for v in (a, b)), strict=True):
        total = round_to(total + x * y, accumulate)
    return total


@right("mixed_precision_dot")
def dot_scalars_of_numpy(a, b, accumulate="float32"):
    """Scalars of the accumulator's own type, which NumPy's promotion widens and this narrows."""
    out = np.empty(a.shape[:-1], np.float32)
    for at in np.ndindex(out.shape):
        s = np.float16(0) if accumulate == "float16" else np.float32(0)
        for x, y in zip(np.float16(a[at]), np.float16(b[at]), strict=True):
            s = s + np.float32(x) * np.float32(y)
            s = np.float16(s) if accumulate == "float16" else s
            if accumulate == "bfloat16":
                s = bf16_bits(np.array([s]))[0].astype(np.float32)
        out[at] = s
    return out


@mutating("mixed_precision_dot")
def dot_rounds_its_input(a, b, accumulate="float32"):
    out = dot_plain(a, b, accumulate)
    a[...] = a.astype(np.float16)
    b[...] = 0
    return out


@wrong("mixed_precision_dot")
def dot_kahan(a, b, accumulate="float32"):
    """With what each sum lost carried along: better than what is asked for."""
    p = a.astype(np.float16).astype(float) * b.astype(np.float16).astype(float)
    total, lost = np.zeros(p.shape[:-1]), np.zeros(p.shape[:-1])
    for i in range(p.shape[-1]):
        term = p[..., i] - lost
        new = nearest(total + term, accumulate).astype(float)
        total, lost = new, (new - total) - term
    return total


@wrong("mixed_precision_dot")
def dot_over_the_batch(a, b, accumulate="float32"):
    return dot_plain(np.moveaxis(a, 0, -1), np.moveaxis(b, 0, -1), accumulate)


@wrong("mixed_precision_dot")
def dot_scaled(a, b, accumulate="float32"):
    return dot_plain(a, b, accumulate) / a.shape[-1]


# ---------------------------------------------------------------------------- loss_scale_step


@right("loss_scale_step")
def scale_plain(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    if found_inf:
        return scale * backoff, 0
    good_steps += 1
    if good_steps < interval:
        return scale, good_steps
    grown = scale * growth
    return (grown if grown < 2.0**128 else scale), 0


@right("loss_scale_step")
def scale_in_float32(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    scale = np.float32(scale)
    if found_inf:
        return scale * np.float32(backoff), np.int32(0)
    if good_steps + 1 == interval:
        grown = scale * np.float32(growth)
        return np.where(np.isfinite(grown), grown, scale), 0
    return scale, np.int64(good_steps + 1)


@right("loss_scale_step")
def scale_torch(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    """The kernel behind GradScaler."""
    held = torch.tensor([scale], dtype=torch.float32)
    tracker = torch.tensor([good_steps], dtype=torch.int32)
    found = torch.tensor([float(found_inf)])
    torch._amp_update_scale_(held, tracker, found, growth, backoff, interval)
    return held[0], tracker[0]


@right("loss_scale_step")
def scale_modulo(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    count = 0 if found_inf else (good_steps + 1) % interval
    factor = backoff if found_inf else growth if count == 0 else 1.0
    new = scale * factor
    return [new if np.isfinite(np.float32(new)) else scale, float(count)]


@right("loss_scale_step")
def scale_one_line(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    most = float(np.finfo(np.float32).max)
    return (
        (backoff * scale, 0)
        if found_inf
        else (scale, good_steps + 1)
        if good_steps + 1 != interval
        else (growth * scale if growth * scale <= most else scale, 0)
    )


@right("loss_scale_step")
def scale_match(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    match bool(found_inf), interval - good_steps - 1:
        case True, _:
            scale, good_steps = scale * backoff, 0
        case False, 0:
            scale = scale if scale * growth > 3.4028235e38 else scale * growth
            good_steps = 0
        case _:
            good_steps = good_steps + 1
    return np.float64(scale), good_steps


@wrong("loss_scale_step")
def scale_squared(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    return scale_plain(scale, good_steps, found_inf, growth**2, backoff, interval)


@wrong("loss_scale_step")
def scale_only(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    return scale_plain(scale, good_steps, found_inf, growth, backoff, interval)[0]


@wrong("loss_scale_step")
def scale_counts_down(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    scale, count = scale_plain(scale, good_steps, found_inf, growth, backoff, interval)
    return scale, interval - count


# -------------------------------------------------------------------------- unscale_then_clip


@right("unscale_then_clip")
def unscale_plain(grads, scale, max_norm):
    grads = {n: g.astype(np.float64) / scale for n, g in grads.items()}
    found_inf = any(not np.isfinite(g).all() for g in grads.values())
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    if not found_inf and norm > max_norm:
        grads = {n: g * max_norm / norm for n, g in grads.items()}
    return grads, norm, found_inf


@right("unscale_then_clip")
def unscale_in_torch(grads, scale, max_norm):
    held = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads.values()]
    for p, g in zip(held, grads.values(), strict=True):
        p.grad = torch.tensor(g, dtype=torch.float64) / scale
    found = torch.stack([(~torch.isfinite(p.grad)).any() for p in held]).any()
    norm = torch.nn.utils.get_total_norm([p.grad for p in held])
    if not found:
        norm = torch.nn.utils.clip_grad_norm_(held, max_norm)
    return {n: p.grad for n, p in zip(grads, held, strict=True)}, norm, found


@right("unscale_then_clip")
def unscale_flat(grads, scale, max_norm):
    flat = np.concatenate([np.float64(g).ravel() for g in grads.values()]) * (1 / scale)
    norm, found = np.linalg.norm(flat), np.bool_(not np.isfinite(flat).all())
    factor = 1.0 if found else min(1.0, max_norm / (norm + 1e-6))
    out, at = {}, 0
    for n, g in grads.items():
        out[n] = (factor * flat[at : at + g.size]).reshape(g.shape)
        at += g.size
    return out, norm, found


@right("unscale_then_clip")
def unscale_with_a_longer_limit(grads, scale, max_norm):
    """Clipped while scaled, but to a limit that is scaled too: the same."""
    wide = {n: np.asarray(g, np.float64) for n, g in grads.items()}
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in wide.values()))
    limit = scale * max_norm
    factor = limit / norm if math.isfinite(norm) and norm > limit else 1.0
    return {n: factor * g / scale for n, g in wide.items()}, norm / scale, not math.isfinite(norm)


@right("unscale_then_clip")
def unscale_loops(grads, scale, max_norm):
    plain = {n: [float(x) / scale for x in g.ravel()] for n, g in grads.items()}
    found_inf, total = False, 0.0
    for values in plain.values():
        for x in values:
            found_inf = found_inf or math.isnan(x) or math.isinf(x)
            total += x * x
    norm = total**0.5
    factor = max_norm / norm if not found_inf and norm > max_norm else 1.0
    shaped = {
        n: np.reshape([factor * x for x in values], grads[n].shape).tolist()
        for n, values in plain.items()
    }
    return shaped, norm, found_inf


@right("unscale_then_clip")
def unscale_largest_first(grads, scale, max_norm):
    plain = {n: np.divide(g, scale, dtype=np.float64) for n, g in grads.items()}
    peak = max(float(np.abs(g).max()) for g in plain.values())  # max of NaN and others is either
    if any(np.isnan(g).any() for g in plain.values()):
        return plain, math.nan, True
    if peak == 0 or peak == math.inf:
        return plain, peak, peak == math.inf
    norm = peak * sum(float(np.square(g / peak).sum()) for g in plain.values()) ** 0.5
    for g in plain.values():
        g *= min(1.0, max_norm / norm)
    return plain, norm, False


@right("unscale_then_clip")
def unscale_in_float32_at_least(grads, scale, max_norm):
    wide = {n: g if g.dtype == np.float64 else g.astype(np.float32) for n, g in grads.items()}
    plain = {n: g / scale for n, g in wide.items()}
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in plain.values()))
    if np.isfinite(norm):
        plain = {n: g / max(1.0, norm / max_norm) for n, g in plain.items()}
    return plain, norm, ~np.isfinite(norm)


@mutating("unscale_then_clip")
def unscale_in_place(grads, scale, max_norm):
    out = unscale_plain(grads, scale, max_norm)
    for g in grads.values():
        g /= scale + 1
    return out


@wrong("unscale_then_clip")
def unscale_by_the_root(grads, scale, max_norm):
    return unscale_plain(grads, scale**0.5, max_norm)


@wrong("unscale_then_clip")
def unscale_without_the_flag(grads, scale, max_norm):
    return unscale_plain(grads, scale, max_norm)[:2]


@wrong("unscale_then_clip")
def unscale_to_half_the_length(grads, scale, max_norm):
    return unscale_plain(grads, scale, max_norm / 2)
