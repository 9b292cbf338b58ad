"""Six blocks: forward passes right, backward passes wrong in exactly one way each."""

import inspect
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attn_lessons import hunt
from attn_lessons.gradcheck import check_gradient, directional_check
from attn_lessons.hunt import ALPHA, BLOCKS, example, named, part

NUMBERS = sorted(BLOCKS)
EXACT = 1e-10

NORM1, NORM2 = ("norm1.gamma", "norm1.beta"), ("norm2.gamma", "norm2.beta")
ATTENTION = tuple(f"self_attn.{n}" for n in ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo"))

# What comes back wrong from each block, all else being right. Each mistake is of a kind that has
# been reported in public: a lost skip gradient (entrenar#313), a shared parameter's gradient
# assigned, not added (caffe#3254), heads tiled where they are repeated (onnx#7274, a forward pass),
# a layer's output kept in place of its input (trinity#571), a mask that the backward pass ignores
# (pytorch#27461), and a backward pass that works in place on what it is given (Liger-Kernel#254).
WRONG = {
    1: {"dx", *ATTENTION, *NORM1},
    2: "all but dx",
    3: {"dx", *NORM1, "self_attn.wk", "self_attn.wv", "self_attn.bk", "self_attn.bv"},
    4: {"dx", "norm1.gamma"},
    5: {"dx", "dmemory", *ATTENTION, *NORM1, *NORM2}
    | {f"cross_attn.{n}" for n in ("wq", "wk", "wv", "wo", "bq", "bk")},
    6: set(),
}
# The gradient of a key's bias is 0 on paper, right and wrong alike, where keys are not turned.
NOTHING = {1: {"self_attn.bk"}, 2: {"self_attn.bk"}, 4: {"self_attn.bk"}, 6: {"self_attn.bk"}}
NOTHING |= {3: set(), 5: {"self_attn.bk", "cross_attn.bk"}}


def forward_of(arguments):
    return {name: value for name, value in arguments.items() if name != "dout"}


def by_name(results):
    """dx, dmemory and the parameters' gradients in one dict."""
    dx, *dmemory, grads = results
    return {"dx": dx, **({"dmemory": dmemory[0]} if dmemory else {}), **grads}


def writeable(arguments):
    """A copy of everything: a call may write where it likes."""
    copied = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    return copied | {"params": {n: p.copy() for n, p in arguments["params"].items()}}


# ------------------------------------------------------------------- the same blocks, in torch


def attend(y, memory, p, prefix, h, mask, turn=False):
    def heads(rows, letter):
        z = rows @ p[f"{prefix}.w{letter}"] + p[f"{prefix}.b{letter}"]
        width = p[f"{prefix}.wq"].shape[1] // h
        return z.reshape(*z.shape[:2], -1, width).transpose(1, 2)

    q, k, v = heads(y, "q"), heads(memory, "k"), heads(memory, "v")
    if turn:
        q, k = turned(q), turned(k)
    k, v = (z.repeat_interleave(h // z.shape[1], dim=1) for z in (k, v))
    mask = None if mask is None else torch.tensor(np.array(mask))
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.transpose(1, 2).flatten(2) @ p[f"{prefix}.wo"] + p[f"{prefix}.bo"]


def turned(z):
    """Pairs of columns as complex numbers, turned by multiplication."""
    n, d = z.shape[-2:]
    speed = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * speed
    pairs = torch.view_as_complex(z.reshape(*z.shape[:-1], d // 2, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def layer_norm(y, p, name):
    return F.layer_norm(y, y.shape[-1:], p[f"{name}.gamma"], p[f"{name}.beta"])


def rms_norm(y, p, name):
    return F.rms_norm(y, y.shape[-1:], p[f"{name}.gamma"], eps=1e-5)


def feed(y, p):
    return F.gelu(y @ p["ffn.w1"] + p["ffn.b1"]) @ p["ffn.w2"] + p["ffn.b2"]


def torch_1(x, params, n_heads, mask):
    a = layer_norm(ALPHA * x + attend(x, x, params, "self_attn", n_heads, mask), params, "norm1")
    return layer_norm(ALPHA * a + feed(a, params), params, "norm2")


def torch_2(x, params, n_heads, mask, turn=False, times=2):
    for _ in range(times):
        y = layer_norm(x, params, "norm1")
        x = x + attend(y, y, params, "self_attn", n_heads, mask, turn)
        x = x + feed(layer_norm(x, params, "norm2"), params)
    return x


def torch_3(x, params, n_heads, mask):
    return torch_2(x, params, n_heads, mask, turn=True, times=1)


def torch_4(x, params, n_heads, mask):
    y = rms_norm(x, params, "norm1")
    a = x + attend(y, y, params, "self_attn", n_heads, mask)
    y = rms_norm(a, params, "norm2")
    return a + F.silu(y @ params["ffn.w_gate"]) * (y @ params["ffn.w_up"]) @ params["ffn.w_down"]


def torch_5(x, memory, params, n_heads, mask, memory_mask):
    y = layer_norm(x, params, "norm1")
    a = x + attend(y, y, params, "self_attn", n_heads, mask)
    read = attend(
        layer_norm(a, params, "norm2"), memory, params, "cross_attn", n_heads, memory_mask
    )
    b = a + read
    return b + feed(layer_norm(b, params, "norm3"), params)


def torch_6(x, params, n_heads, mask):
    y = layer_norm(x, params, "norm")
    return x + attend(y, y, params, "self_attn", n_heads, mask) + feed(y, params)


TORCH = {1: torch_1, 2: torch_2, 3: torch_3, 4: torch_4, 5: torch_5, 6: torch_6}


def leaf(value):
    return torch.tensor(np.array(value), requires_grad=True)


def in_torch(number, arguments):
    """The output and, by name, the gradients of everything that has one."""
    given = forward_of(arguments)
    leaves = {n: leaf(given[n]) for n in ("x", "memory") if n in given}
    params = {n: leaf(p) for n, p in given["params"].items()}
    out = TORCH[number](**(given | leaves | {"params": params}))
    out.backward(torch.tensor(np.array(arguments["dout"])))
    grads = {f"d{n}": t.grad.numpy() for n, t in leaves.items()}
    return out.detach().numpy(), grads | {n: p.grad.numpy() for n, p in params.items()}


def errors(got, want):
    """Largest error of each array, relative to its largest entry (or to a speck of the whole)."""
    assert set(got) == set(want)
    whole = max(float(np.abs(w).max(initial=0)) for w in want.values())
    scale = {n: max(float(np.abs(w).max(initial=0)), 1e-4 * whole) for n, w in want.items()}
    return {n: float(np.abs(got[n] - want[n]).max(initial=0)) / scale[n] for n in want}


def wrong_in(number, arguments, rtol=EXACT):
    got = by_name(BLOCKS[number][1](**writeable(arguments)))
    want = in_torch(number, arguments)[1]
    assert all(got[n].shape == want[n].shape for n in want)
    return {n for n, e in errors(got, want).items() if e > rtol}


def expected_wrong(number):
    names = {"dx", *example(number)["params"]} | ({"dmemory"} if number == 5 else set())
    wrong = names - {"dx"} if WRONG[number] == "all but dx" else WRONG[number]
    return wrong - NOTHING[number]


# ------------------------------------------------------------------------------------ the blocks


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("seed", range(3))
def test_forward_agrees_with_torch(number, seed):
    arguments = example(number, seed)
    want, _ = in_torch(number, arguments)
    got = BLOCKS[number][0](**forward_of(arguments))
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= EXACT * np.abs(want).max()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("seed", range(3))
def test_backward_is_wrong_in_the_named_gradients_and_right_in_all_others(number, seed):
    assert wrong_in(number, example(number, seed)) == expected_wrong(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_wrong_is_plainly_wrong(number):
    """No bug hides in the last digits: 1% of the largest entry at the least."""
    assert wrong_in(number, example(number), rtol=1e-2) == expected_wrong(number)


@pytest.mark.parametrize("number", NUMBERS)
def test_arguments_other_than_dout_stay_as_they_were(number):
    arguments = writeable(example(number))
    before = writeable(arguments)
    BLOCKS[number][1](**arguments)
    BLOCKS[number][0](**forward_of(arguments))
    for name in set(arguments) - {"dout", "params", "n_heads"}:
        assert np.array_equal(arguments[name], before[name]), name
    for name, p in before["params"].items():
        assert np.array_equal(arguments["params"][name], p), name
    assert np.array_equal(arguments["dout"], before["dout"]) == (number != 6)


def test_block_6_hands_the_callers_own_array_back():
    arguments = example(6)
    dx, _ = BLOCKS[6][1](**arguments)
    assert dx is arguments["dout"]


# ------------------------------------------------------------------------- what chapter 2 sees


def scalar(number, arguments, name):
    """The weighted sum of the output, as a function of one argument or parameter."""
    dout, given = arguments["dout"].copy(), forward_of(arguments)

    def f(value):
        if name in given:
            changed = given | {name: value}
        else:
            changed = given | {"params": given["params"] | {name: value}}
        return float((BLOCKS[number][0](**changed) * dout).sum())

    return f, given[name] if name in given else given["params"][name]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.usefixtures("unchecked")
def test_finite_differences_see_it(number):
    """Every array along one random direction: two evaluations see what is wrong in it."""
    arguments, rng = example(number), np.random.default_rng(0)
    got = by_name(BLOCKS[number][1](**writeable(arguments)))
    seen = set()
    for returned, gradient in got.items():
        f, at = scalar(number, arguments, returned.removeprefix("d"))
        if directional_check(f, at, gradient, rng.normal(size=at.shape)) > 1e-6:
            seen.add(returned)
    assert seen - NOTHING[number] == expected_wrong(number)


@pytest.mark.usefixtures("unchecked")
def test_block_6_looks_wrong_to_who_measures_with_the_dout_it_was_given():
    arguments = example(6)
    dx, _ = BLOCKS[6][1](**arguments)
    f, at = scalar(6, example(6), "x")
    assert check_gradient(f, at, dx, eps=1e-5).ok
    f, at = scalar(6, arguments, "x")
    assert not check_gradient(f, at, dx, eps=1e-5).ok


def test_block_6_spoils_a_layer_that_uses_the_same_dout_again():
    """y = x + block(x): what the skip path adds is no longer dout."""
    arguments = example(6)
    want = in_torch(6, arguments)[1]["dx"] + arguments["dout"]
    through, _ = BLOCKS[6][1](**arguments)
    assert errors({"dx": through + arguments["dout"]}, {"dx": want})["dx"] > 1e-2


# ------------------------------------------------- inputs too lazy to show it, one for each block


def unit_gains(arguments, names):
    ones = {n: np.ones_like(arguments["params"][n]) for n in names}
    return arguments | {"params": arguments["params"] | ones}


def test_block_1_passes_where_the_loss_is_a_plain_sum():
    """A constant dout has no gradient through the last norm, if its gain is 1: all is 0."""
    arguments = unit_gains(example(1), ["norm2.gamma"])
    assert wrong_in(1, arguments)
    assert not wrong_in(1, arguments | {"dout": np.ones_like(arguments["dout"])})


def test_block_2_passes_where_only_dx_is_looked_at():
    assert "dx" not in wrong_in(2, example(2))


@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_block_3_passes_where_there_is_one_key_head_or_as_many_as_queries(n_kv_heads):
    arguments, rng = example(3), np.random.default_rng(0)
    wide = {n: (24, 6 * n_kv_heads) for n in ("self_attn.wk", "self_attn.wv")}
    wide |= {n: (6 * n_kv_heads,) for n in ("self_attn.bk", "self_attn.bv")}
    replaced = {n: 0.2 * rng.normal(size=shape) for n, shape in wide.items()}
    assert not wrong_in(3, arguments | {"params": arguments["params"] | replaced})


def test_block_4_passes_where_gains_are_1_and_rows_have_unit_size():
    arguments = unit_gains(example(4), ["norm1.gamma"])
    assert wrong_in(4, arguments, rtol=1e-2) == {"dx"}
    x = arguments["x"] / np.sqrt((arguments["x"] ** 2).mean(-1, keepdims=True))
    # eps, once in the forward and once more in the backward pass, is what is left to see.
    assert not wrong_in(4, arguments | {"x": x}, rtol=1e-4)


def test_block_5_passes_where_the_memory_has_no_padding():
    arguments = example(5)
    assert not wrong_in(5, arguments | {"memory_mask": None})
    everything = np.ones_like(arguments["memory_mask"])
    assert not wrong_in(5, arguments | {"memory_mask": everything})


def test_block_6_passes_where_dout_is_a_list():
    arguments = example(6)
    listed = arguments["dout"].tolist()
    before = example(6)["dout"]
    dx, _ = inspect.unwrap(BLOCKS[6][1])(**(arguments | {"dout": listed}))
    assert errors({"dx": dx}, {"dx": in_torch(6, arguments)[1]["dx"]})["dx"] <= EXACT
    assert np.array_equal(listed, before)


# ------------------------------------------------------------------------ what else is promised


@pytest.mark.parametrize("number", NUMBERS)
def test_float32_stays_float32(number):
    arguments = writeable(example(number))
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and value.dtype == np.float64:
            arguments[name] = value.astype(np.float32)
    arguments["params"] = {n: p.astype(np.float32) for n, p in arguments["params"].items()}
    assert BLOCKS[number][0](**forward_of(arguments)).dtype == np.float32
    got = by_name(BLOCKS[number][1](**arguments))
    assert {g.dtype for g in got.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("number", NUMBERS)
def test_examples_have_no_lazy_input(number):
    arguments = example(number)
    b, n, c = arguments["x"].shape
    assert len({b, n, c, arguments["n_heads"], c // arguments["n_heads"]}) == 5
    for name, p in arguments["params"].items():
        assert np.ptp(p) > 0.1, name
        assert np.abs(p - ("gamma" in name)).min() > 0, name
    masks = [m for n, m in arguments.items() if n.endswith("mask")]
    assert len(masks) == (2 if number == 5 else 1)
    assert all(not m.all() and m.any(-1).all() for m in masks)
    assert np.ptp(arguments["dout"]) > 1
    again = example(number)
    assert np.array_equal(arguments["dout"], again["dout"])
    assert not np.array_equal(arguments["dout"], example(number, 1)["dout"])


@pytest.mark.parametrize("number", NUMBERS)
def test_nothing_in_the_source_gives_the_place_away(number):
    for function in BLOCKS[number]:
        source = inspect.getsource(function)
        body = source[source.index('"""', source.index('r"""') + 4) :]
        assert "#" not in body
        assert not re.search(r"bug|wrong|mistake|broken|TODO|fix", body)


def test_there_is_no_other_block():
    with pytest.raises(ValueError, match=r"number: expected 1 … 6; got 7"):
        example(7)


def test_part_and_named_undo_each_other():
    params = {"ffn.w1": 1, "ffn.b1": 2, "norm1.gamma": 3}
    assert part(params, "ffn") == {"w1": 1, "b1": 2}
    assert named("ffn", **part(params, "ffn")) == {"ffn.w1": 1, "ffn.b1": 2}
    with pytest.raises(ValueError, match=r"params: expected names that start with 'norm\.'"):
        part(params, "norm")
    with pytest.raises(ValueError, match=r"got ffn, norm1"):
        part(params, "cross_attn")


def test_numbers_of_the_blocks_stand_in_their_names():
    for number, pair in BLOCKS.items():
        kinds = [getattr(hunt, f"block_{number}_{kind}") for kind in ("forward", "backward")]
        assert list(pair) == kinds
