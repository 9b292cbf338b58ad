"""Chapter 5 in many hands."""

import cmath
import math

import numpy as np
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong

# ----------------------------------------------------------------------- sinusoidal_positions


@right("sinusoidal_positions")
def sinusoidal_slices(n, d):
    table = np.zeros((n, d))
    angles = np.arange(n)[:, None] / 10000 ** (np.arange(0, d, 2) / d)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles)[:, : d // 2]
    return table


@right("sinusoidal_positions")
def sinusoidal_loops(n, d):
    table = [[0.0] * d for _ in range(n)]
    for p in range(n):
        for j in range(d):
            angle = p / 10000 ** ((j - j % 2) / d)
            table[p][j] = math.cos(angle) if j % 2 else math.sin(angle)
    return table if n else np.zeros((0, d))


@right("sinusoidal_positions")
def sinusoidal_where(n, d):
    j = np.arange(d)
    angles = np.arange(n)[:, None] * np.exp(-math.log(10000) * (j // 2 * 2) / d)
    return np.where(j % 2 == 0, np.sin(angles), np.cos(angles))


@right("sinusoidal_positions")
def sinusoidal_phase(n, d):
    j = np.arange(d)
    return np.sin(np.outer(np.arange(n), 1e4 ** (-(j // 2) * 2 / d)) + np.pi / 2 * (j % 2))


@right("sinusoidal_positions")
def sinusoidal_torch(n, d):
    table = torch.zeros(n, d)
    position = torch.arange(0, n).unsqueeze(1).float()
    div_term = torch.exp(torch.arange(0, d, 2).float() * -(math.log(10000.0) / d))
    table[:, 0::2] = torch.sin(position * div_term)
    table[:, 1::2] = torch.cos(position * div_term)[:, : d // 2]
    return table


@right("sinusoidal_positions")
def sinusoidal_stacked(n, d):
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    return np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(n, d + d % 2)[:, :d]


@right("sinusoidal_positions")
def sinusoidal_complex(n, d):
    turn = np.exp(1j * np.outer(np.arange(n), 10000.0 ** (-np.arange(0, d, 2) / d)))
    return np.dstack([turn.imag, turn.real]).reshape(n, -1)[:, :d] if n else np.zeros((n, d))


@right("sinusoidal_positions")
def sinusoidal_float32(n, d):
    return sinusoidal_slices(n, d).astype(np.float32)


@wrong("sinusoidal_positions")
def sinusoidal_base_1000(n, d):
    angles = np.arange(n)[:, None] / 1000 ** (np.arange(d) // 2 * 2 / d)
    return np.where(np.arange(d) % 2, np.cos(angles), np.sin(angles))


@wrong("sinusoidal_positions")
def sinusoidal_in_turns(n, d):
    angles = 2 * np.pi * np.arange(n)[:, None] / 10000 ** (np.arange(d) // 2 * 2 / d)
    return np.where(np.arange(d) % 2, np.cos(angles), np.sin(angles))


@wrong("sinusoidal_positions")
def sinusoidal_transposed(n, d):
    return sinusoidal_slices(n, d).T


# ----------------------------------------------------------------- learned_positions_backward


@right("learned_positions_backward")
def learned_add_at(dout, positions, n):
    dtable = np.zeros((n, dout.shape[-1]))
    np.add.at(dtable, np.broadcast_to(positions, dout.shape[:-1]), dout)
    return dtable


@right("learned_positions_backward")
def learned_loops(dout, positions, n):
    dtable = [[0.0] * dout.shape[-1] for _ in range(n)]
    where = np.broadcast_to(positions, dout.shape[:-1])
    for place in np.ndindex(where.shape):
        for c in range(dout.shape[-1]):
            dtable[where[place]][c] += dout[place][c]
    return dtable


@right("learned_positions_backward")
def learned_one_hot(dout, positions, n):
    one_hot = np.eye(n)[np.broadcast_to(positions, dout.shape[:-1])]
    return one_hot.reshape(-1, n).T @ dout.reshape(-1, dout.shape[-1])


@right("learned_positions_backward")
def learned_einsum(dout, positions, n):
    one_hot = np.broadcast_to(positions, dout.shape[:-1])[..., None] == np.arange(n)
    return np.einsum("tn,tc->nc", one_hot.reshape(-1, n), dout.reshape(-1, dout.shape[-1]))


@right("learned_positions_backward")
def learned_bincount(dout, positions, n):
    where = np.broadcast_to(positions, dout.shape[:-1]).ravel()
    columns = [np.bincount(where, dout[..., c].ravel(), n) for c in range(dout.shape[-1])]
    return np.stack(columns, axis=1)


@right("learned_positions_backward")
def learned_torch(dout, positions, n):
    table = torch.zeros(n, dout.shape[-1], dtype=torch.float64, requires_grad=True)
    where = torch.tensor(np.broadcast_to(positions, dout.shape[:-1]).copy())
    F.embedding(where, table).backward(torch.tensor(dout, dtype=torch.float64))
    return table.grad


@right("learned_positions_backward")
def learned_index_add(dout, positions, n):
    where = torch.tensor(np.broadcast_to(positions, dout.shape[:-1]).ravel())
    rows = torch.tensor(dout.reshape(-1, dout.shape[-1]))
    return torch.zeros(n, rows.shape[1], dtype=rows.dtype).index_add_(0, where, rows)


@right("learned_positions_backward")
def learned_masked_sums(dout, positions, n):
    where = np.broadcast_to(positions, dout.shape[:-1])
    return [dout[where == row].sum(axis=0) for row in range(n)]


@right("learned_positions_backward")
def learned_batch_first(dout, positions, n):
    dout = dout.sum(axis=tuple(range(dout.ndim - 1 - positions.ndim)))
    dtable = np.zeros((n, dout.shape[-1]), dtype=np.float32)
    np.add.at(dtable, positions, dout)
    return dtable


@mutating("learned_positions_backward")
def learned_shifts_positions(dout, positions, n):
    positions += 1
    padded = learned_add_at(dout, positions, n + 1)
    return padded[1:]


@mutating("learned_positions_backward")
def learned_clears_dout(dout, positions, n):
    dtable = learned_add_at(dout, positions, n)
    dout[:] = 0
    return dtable


@wrong("learned_positions_backward")
def learned_largest(dout, positions, n):
    dtable = np.zeros((n, dout.shape[-1]))
    np.maximum.at(dtable, np.broadcast_to(positions, dout.shape[:-1]), dout)
    return dtable


@wrong("learned_positions_backward")
def learned_root_of_counts(dout, positions, n):
    counts = np.bincount(np.broadcast_to(positions, dout.shape[:-1]).ravel(), minlength=n)
    return learned_add_at(dout, positions, n) / np.sqrt(np.maximum(counts, 1))[:, None]


@wrong("learned_positions_backward")
def learned_padding_dropped(dout, positions, n):
    dtable = learned_add_at(dout, positions, n)
    dtable[0] = 0
    return dtable


# ---------------------------------------------------------------------------------------- rope


@right("rope")
def rope_slices(x, positions, base=10000.0):
    theta = base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = positions[..., None] * theta
    cos, sin = np.cos(angles), np.sin(angles)
    y = np.empty_like(x)
    y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return y


@right("rope")
def rope_complex(x, positions, base=10000.0):
    theta = base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None] * theta)
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


@right("rope")
def rope_complex_view(x, positions, base=10000.0):
    pairs = np.ascontiguousarray(x, dtype=float).view(complex)
    theta = base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    return (pairs * np.exp(1j * positions[..., None] * theta)).view(float)


@right("rope")
def rope_loops(x, positions, base=10000.0):
    d = x.shape[-1]
    where = np.broadcast_to(positions, x.shape[:-1])
    y = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        for i in range(d // 2):
            turn = cmath.exp(1j * float(where[place]) * base ** (-2 * i / d))
            z = complex(x[place][2 * i], x[place][2 * i + 1]) * turn
            y[place][2 * i], y[place][2 * i + 1] = z.real, z.imag
    return y.tolist()


@right("rope")
def rope_torch(x, positions, base=10000.0):
    x, positions = torch.tensor(x), torch.tensor(positions)
    d = x.shape[-1]
    theta = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = positions.double()[..., None] * theta
    turn = torch.polar(torch.ones_like(angles), angles)
    z = torch.view_as_complex(x.double().contiguous().view(*x.shape[:-1], d // 2, 2))
    return torch.view_as_real(z * turn).flatten(-2)


@right("rope")
def rope_torch_back_to_its_dtype(x, positions, base=10000.0):
    t = torch.tensor(x, requires_grad=True)
    angles = torch.tensor(positions).double().unsqueeze(-1) / base ** (
        torch.arange(0, t.shape[-1], 2).double() / t.shape[-1]
    )
    cos, sin = (f(angles).repeat_interleave(2, dim=-1).to(t.dtype) for f in (torch.cos, torch.sin))
    crossed = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
    return t * cos + crossed * sin


@right("rope")
def rope_equation_34(x, positions, base=10000.0):
    d = x.shape[-1]
    angles = np.repeat(positions[..., None] * base ** (-2 * np.arange(d // 2) / d), 2, axis=-1)
    crossed = np.empty(x.shape)
    crossed[..., ::2], crossed[..., 1::2] = -x[..., 1::2], x[..., ::2]
    return x * np.cos(angles) + crossed * np.sin(angles)


@right("rope")
def rope_einsum(x, positions, base=10000.0):
    d = x.shape[-1]
    angles = np.asarray(positions)[..., None] * base ** (-np.arange(0, d, 2) / d)
    matrices = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    pairs = x.reshape(*x.shape[:-1], d // 2, 2)
    return np.einsum("rc...,...c->...r", matrices, pairs).reshape(x.shape)


@right("rope")
def rope_through_halves(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    angles = positions[..., None] * np.exp(-np.log(base) * np.arange(half) / half)
    a, b = x[..., ::2], x[..., 1::2]
    y = np.concatenate([a * np.cos(angles) - b * np.sin(angles)] * 2, axis=-1)
    y[..., half:] = a * np.sin(angles) + b * np.cos(angles)
    return y.reshape(*x.shape[:-1], 2, half).swapaxes(-1, -2).reshape(x.shape)


@right("rope")
def rope_own_buffer(x, positions, base=10000.0):
    angles = positions[..., None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    y = np.array(x, dtype=float)
    first = y[..., 0::2].copy()
    y[..., 0::2] *= np.cos(angles)
    y[..., 0::2] -= y[..., 1::2] * np.sin(angles)
    y[..., 1::2] *= np.cos(angles)
    y[..., 1::2] += first * np.sin(angles)
    return y


@right("rope")
def rope_rounded(x, positions, base=10000.0):
    return rope_slices(x.astype(float), positions, base).astype(np.float32)


@right("rope")
def rope_angles_modulo_a_turn(x, positions, base=10000.0):
    angles = positions[..., None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = np.remainder(angles, 2 * np.pi)
    a, b = x[..., ::2], x[..., 1::2]
    y = [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)]
    return np.moveaxis(np.array(y), 0, -1).reshape(x.shape)


@mutating("rope")
def rope_in_place(x, positions, base=10000.0):
    x[:] = rope_slices(x, positions, base)
    return x


@wrong("rope")
def rope_by_norm(x, positions, base=10000.0):
    y = rope_slices(x, positions, base)
    return y / np.linalg.norm(x, axis=-1, keepdims=True)


@wrong("rope")
def rope_half_of_the_columns(x, positions, base=10000.0):
    y, half = rope_slices(x, positions, base), x.shape[-1] // 2
    return np.concatenate([y[..., :half], x[..., half:]], axis=-1)


@wrong("rope")
def rope_in_degrees(x, positions, base=10000.0):
    return rope_slices(x, positions * np.pi / 180, base)


# ------------------------------------------------------------------------------- rope_backward


@right("rope_backward")
def back_through_rope(dy, positions, base=10000.0):
    return rope_slices(dy, -positions, base)


@right("rope_backward")
def back_slices(dy, positions, base=10000.0):
    angles = positions[..., None] / base ** (np.arange(0, dy.shape[-1], 2) / dy.shape[-1])
    cos, sin = np.cos(angles), np.sin(angles)
    dx = np.zeros_like(dy)
    dx[..., 0::2] = dy[..., 0::2] * cos + dy[..., 1::2] * sin
    dx[..., 1::2] = dy[..., 1::2] * cos - dy[..., 0::2] * sin
    return dx


@right("rope_backward")
def back_conjugate(dy, positions, base=10000.0):
    theta = base ** (-np.arange(0, dy.shape[-1], 2) / dy.shape[-1])
    z = (dy[..., 0::2] + 1j * dy[..., 1::2]) * np.exp(-1j * positions[..., None] * theta)
    return np.stack([z.real, z.imag], axis=-1).reshape(dy.shape)


@right("rope_backward")
def back_autograd(dy, positions, base=10000.0):
    x = torch.zeros(dy.shape, dtype=torch.float64, requires_grad=True)
    d = x.shape[-1]
    theta = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.tensor(positions).double()[..., None] * theta
    a, b = x[..., 0::2], x[..., 1::2]
    y = torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)
    y.flatten(-2).backward(torch.tensor(dy, dtype=torch.float64))
    return x.grad


@right("rope_backward")
def back_matrices(dy, positions, base=10000.0):
    d = dy.shape[-1]
    where = np.broadcast_to(positions, dy.shape[:-1])
    dx = np.zeros(dy.shape)
    for place in np.ndindex(where.shape):
        matrix = np.zeros((d, d))
        for i in range(d // 2):
            angle = where[place] * base ** (-2 * i / d)
            c, s = math.cos(angle), math.sin(angle)
            matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
        dx[place] = matrix.T @ dy[place]
    return dx


@right("rope_backward")
def back_loops(dy, positions, base=10000.0):
    return rope_loops(dy, -positions, base)


@right("rope_backward")
def back_equation_34_transposed(dy, positions, base=10000.0):
    d = dy.shape[-1]
    angles = np.repeat(positions[..., None] * base ** (-2 * np.arange(d // 2) / d), 2, axis=-1)
    turned = dy * np.sin(angles)
    crossed = np.stack([turned[..., 1::2], -turned[..., 0::2]], axis=-1).reshape(dy.shape)
    return dy * np.cos(angles) + crossed


@right("rope_backward")
def back_rounded(dy, positions, base=10000.0):
    return np.float32(rope_complex(dy, -positions, base))


@mutating("rope_backward")
def back_in_place(dy, positions, base=10000.0):
    dy[...] = back_slices(dy, positions, base)
    return dy


@mutating("rope_backward")
def back_positions_negated(dy, positions, base=10000.0):
    positions *= -1
    return rope_slices(dy, positions, base)


@wrong("rope_backward")
def back_halved(dy, positions, base=10000.0):
    return back_slices(dy, positions, base) / 2


@wrong("rope_backward")
def back_twice(dy, positions, base=10000.0):
    return back_slices(dy, 2 * positions, base)


@wrong("rope_backward")
def back_summed_over_rows(dy, positions, base=10000.0):
    dx = back_slices(dy, positions, base)
    return np.broadcast_to(dx.sum(axis=-2, keepdims=True), dx.shape)


# ---------------------------------------------------------------------------- rope_permutation


@right("rope_permutation")
def permutation_ranges(d):
    return np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])


@right("rope_permutation")
def permutation_lists(d):
    return list(range(0, d, 2)) + list(range(1, d, 2))


@right("rope_permutation")
def permutation_reshape(d):
    return np.arange(d).reshape(d // 2, 2).T.flatten()


@right("rope_permutation")
def permutation_fortran(d):
    return np.arange(d).reshape(2, d // 2, order="F").ravel()


@right("rope_permutation")
def permutation_torch(d):
    return torch.arange(d).view(-1, 2).t().reshape(-1)


@right("rope_permutation")
def permutation_arithmetic(d):
    j = np.arange(d)
    return 2 * (j % (d // 2)) + j // (d // 2)


@right("rope_permutation")
def permutation_inverse_of_the_inverse(d):
    return np.argsort([j // 2 + (j % 2) * (d // 2) for j in range(d)])


@right("rope_permutation")
def permutation_r(d):
    return np.r_[0:d:2, 1:d:2].astype(np.int32)


@wrong("rope_permutation")
def permutation_from_one(d):
    return permutation_ranges(d) + 1


@wrong("rope_permutation")
def permutation_evens_only(d):
    return np.arange(0, d, 2)


@wrong("rope_permutation")
def permutation_mirrored(d):
    return permutation_ranges(d)[::-1]


# -------------------------------------------------------------------------------- alibi_slopes


@right("alibi_slopes")
def slopes_recursive(n_heads):
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return (
        slopes if power == n_heads else slopes + slopes_recursive(2 * power)[::2][: n_heads - power]
    )


@right("alibi_slopes")
def slopes_two_ranges(n_heads):
    power = 1
    while 2 * power <= n_heads:
        power *= 2
    h = np.arange(1, power + 1)
    extra = np.arange(1, 2 * (n_heads - power), 2)
    return np.concatenate([2.0 ** (-8 * h / power), 2.0 ** (-4 * extra / power)])


@right("alibi_slopes")
def slopes_as_powers_of_a_ratio(n_heads):
    power = 2 ** (int(n_heads).bit_length() - 1)
    ratio, between = 2 ** (-8 / power), 2 ** (-4 / power)
    return np.append(ratio ** np.arange(1, power + 1), between ** np.arange(1, 2 * power, 2))[
        :n_heads
    ]


@right("alibi_slopes")
def slopes_torch(n_heads):
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = torch.pow(2 ** (-8.0 / power), torch.arange(1, 1 + power))
    if power < n_heads:
        extra = torch.pow(2 ** (-4.0 / power), torch.arange(1, 1 + 2 * (n_heads - power), 2))
        slopes = torch.cat([slopes, extra])
    return slopes


@right("alibi_slopes")
def slopes_float32(n_heads):
    return slopes_two_ranges(n_heads).astype(np.float32)


@right("alibi_slopes")
def slopes_exp2(n_heads):
    power = int(2 ** np.floor(np.log2(n_heads)))
    exponents = [8 * h / power for h in range(1, power + 1)]
    exponents += [8 * (h + 0.5) / power for h in range(n_heads - power)]
    return np.exp2(-np.array(exponents))


@wrong("alibi_slopes")
def slopes_of_sixteen(n_heads):
    return 2.0 ** (-16 * np.arange(1, n_heads + 1) / n_heads)


@wrong("alibi_slopes")
def slopes_normalised(n_heads):
    slopes = slopes_two_ranges(n_heads)
    return slopes / slopes.sum()


@wrong("alibi_slopes")
def slopes_repeated(n_heads):
    power = 2 ** math.floor(math.log2(n_heads))
    return np.resize(2.0 ** (-8 * np.arange(1, power + 1) / power), n_heads)


# ---------------------------------------------------------------------------------- alibi_bias


@right("alibi_bias")
def bias_plain(n_heads, n_q, n_k):
    distance = np.abs(np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k)[None, :])
    return -slopes_two_ranges(n_heads)[:, None, None] * distance


@right("alibi_bias")
def bias_loops(n_heads, n_q, n_k):
    slopes = slopes_recursive(n_heads)
    return [
        [[-slopes[h] * abs(i + n_k - n_q - j) for j in range(n_k)] for i in range(n_q)]
        for h in range(n_heads)
    ]


@right("alibi_bias")
def bias_einsum(n_heads, n_q, n_k):
    distance = np.abs(np.subtract.outer(np.arange(n_k - n_q, n_k), np.arange(n_k)))
    return np.einsum("h,ij->hij", -slopes_two_ranges(n_heads), distance)


@right("alibi_bias")
def bias_torch(n_heads, n_q, n_k):
    slopes = slopes_torch(n_heads).view(-1, 1, 1)
    queries = torch.arange(n_k - n_q, n_k).unsqueeze(1)
    return -(slopes * (queries - torch.arange(n_k)).abs())


@right("alibi_bias")
def bias_cut_from_a_square(n_heads, n_q, n_k):
    n = max(n_q, n_k)
    place = np.arange(n)
    square = -np.abs(place[:, None] - place)
    return slopes_two_ranges(n_heads).reshape(-1, 1, 1) * square[n - n_q :, n - n_k :]


@right("alibi_bias")
def bias_both_triangles(n_heads, n_q, n_k):
    offset = np.arange(n_q)[:, None] + (n_k - n_q) - np.arange(n_k)
    distance = np.maximum(offset, 0) + np.maximum(-offset, 0)
    return np.multiply.outer(slopes_two_ranges(n_heads), -distance).astype(np.float32)


@wrong("alibi_bias")
def bias_squared(n_heads, n_q, n_k):
    distance = np.abs(np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k))
    return -slopes_two_ranges(n_heads)[:, None, None] * distance**2


@wrong("alibi_bias")
def bias_of_logarithms(n_heads, n_q, n_k):
    distance = np.abs(np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k))
    return -slopes_two_ranges(n_heads)[:, None, None] * np.log1p(distance)


@wrong("alibi_bias")
def bias_heads_last(n_heads, n_q, n_k):
    return np.moveaxis(bias_plain(n_heads, n_q, n_k), 0, -1)
