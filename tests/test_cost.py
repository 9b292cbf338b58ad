"""Operations against torch's counter, bytes kept against what autograd and our caches keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from attn_lessons.attention import attention_forward
from attn_lessons.cost import (
    activation_bytes,
    attainable_flops,
    attention_bytes,
    attention_flops,
    attention_traffic,
    block_bytes,
    block_flops,
    kept_bytes,
    linear_flops,
    training_flops_per_token,
)
from attn_lessons.transformer import encoder_block_forward, init_encoder_block

SIZES = st.integers(1, 9)


def counted(run):
    with FlopCounterMode(display=False) as counter:
        out = run()
    return out, counter.get_total_flops()


def saved(run, without=()):
    """Bytes of the memory that autograd keeps for a backward pass, each storage once."""
    storages, alive = {}, []

    def pack(t):
        alive.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    for t in without:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values()), out


def leaves(b, h, n, d, dtype=torch.float32):
    rng = np.random.default_rng(0)
    return [
        torch.tensor(rng.normal(size=(b, h, n, d)), dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]


def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


# ----------------------------------------------------------------------------------- operations


@given(b=SIZES, h=SIZES, n=SIZES, d=SIZES)
def test_attention_forward_and_backward_are_torchs_count(b, h, n, d):
    q, k, v = leaves(b, h, n, d)
    out, forward = counted(lambda: plain(q, k, v))
    _, backward = counted(lambda: out.backward(torch.ones_like(out)))
    assert forward == attention_flops(b, h, n, d)
    assert backward == attention_flops(b, h, n, d, backward=True, recompute=False)


def test_torch_counts_five_products_in_flash_attentions_backward_pass():
    """Forward 2, backward 5: the logits are made again. torch's counter has it so for SDPA."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    shape = (2, 3, 64, 16)
    assert sdpa_flop_count(shape, shape, shape) == attention_flops(*shape)
    again = attention_flops(*shape, backward=True)
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == again
    assert again / attention_flops(*shape) == 2.5


@given(rows=SIZES, c_in=SIZES, c_out=SIZES)
def test_a_linear_layer_is_torchs_count(rows, c_in, c_out):
    x = torch.ones(rows, c_in, requires_grad=True)
    w = torch.ones(c_in, c_out, requires_grad=True)
    y, forward = counted(lambda: x @ w)
    _, backward = counted(lambda: y.backward(torch.ones_like(y)))
    assert forward == linear_flops(rows, c_in, c_out)
    assert backward == linear_flops(rows, c_in, c_out, backward=True)


@pytest.mark.parametrize(("b", "n", "c", "f", "h"), [(2, 7, 12, 20, 3), (1, 16, 8, 32, 2)])
def test_a_block_is_torchs_count(b, n, c, f, h):
    layer = torch.nn.TransformerEncoderLayer(c, h, f, 0.0, batch_first=True)
    x = torch.randn(b, n, c, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y, forward = counted(lambda: layer(x))
        _, backward = counted(lambda: y.backward(torch.ones_like(y)))
    assert forward == block_flops(b, n, c, f)
    assert backward == block_flops(b, n, c, f, backward=True, recompute=False)


def test_causal_products_are_half_and_the_exact_count_comes_close():
    b, h, n, d = 1, 2, 512, 8
    half = attention_flops(b, h, n, d, causal=True)
    exact = sum(4 * d * (i + 1) for i in range(n)) * b * h
    assert half * 2 == attention_flops(b, h, n, d)
    assert exact / half == pytest.approx(1 + 1 / n)


@pytest.mark.parametrize(("causal", "recompute", "per"), [(0, 0, 12), (1, 0, 6), (1, 1, 7)])
def test_twelve_six_and_seven(causal, recompute, per):
    """torchtitan#280: n² d a head, forward and backward; 7 with a mask and recomputation."""
    shape = (2, 3, 100, 16)
    total = attention_flops(*shape, bool(causal)) + attention_flops(
        *shape, bool(causal), True, recompute=bool(recompute)
    )
    assert total == per * 2 * 3 * 100**2 * 16


@given(layers=SIZES, n=SIZES, c=SIZES, causal=st.booleans())
def test_operations_of_a_token_are_those_of_its_blocks(layers, n, c, causal):
    """nanoGPT#456: the 12 is 3 · 4 and unmasked, not 6 · 2 with a causal half in it."""
    sizes = 1, n, c, 4 * c, causal
    blocks = block_flops(*sizes) + block_flops(*sizes, True, recompute=False)
    weights = layers * (4 * c * c + 8 * c * c)
    assert layers * blocks == n * training_flops_per_token(weights, layers, c, n, causal)


# ----------------------------------------------------------------------------------- bytes kept


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.float64, 8)])
def test_plain_attention_keeps_what_autograd_keeps(dtype, itemsize):
    shape = (2, 3, 40, 8)
    kept, _ = saved(lambda: plain(*leaves(*shape, dtype)))
    assert kept == attention_bytes(*shape, itemsize)


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_flash_attention_keeps_what_sdpa_keeps(dtype, itemsize):
    shape = (2, 3, 96, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        kept, _ = saved(lambda: F.scaled_dot_product_attention(*leaves(*shape, dtype)))
    assert kept == attention_bytes(*shape, itemsize, flash=True)


def test_our_attention_keeps_as_much():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 3, 40, 8)).astype(np.float32)
    q, k, v = q.copy(), k.copy(), v.copy()
    _, probs = attention_forward(q, k, v)
    assert kept_bytes((q, k, v, probs)) == attention_bytes(2, 3, 40, 8, 4)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_blocks_cache_holds_what_is_said(norm, rate):
    b, n, c, f, h = 2, 11, 12, 40, 3
    rng = np.random.default_rng(0)
    params = init_encoder_block(rng, c, f)
    x = rng.normal(size=(b, n, c))
    _, cache = encoder_block_forward(x, params, h, norm=norm, rate=rate, rng=rng)
    assert kept_bytes(cache, without=[params]) == block_bytes(b, n, c, f, h, dropout=rate > 0)


@pytest.mark.parametrize(("s", "b", "h", "a"), [(64, 2, 96, 4), (32, 3, 64, 8)])
def test_korthikantis_formula_is_what_autograd_keeps(s, b, h, a):
    """A pre-norm layer in bf16 with three dropouts; over is what the norms keep a token."""
    kept, _ = saved(*paper_layer(s, b, h, a))
    norms = 4 * 2 * s * b  # a mean and a deviation, two bytes each, for each of two norms
    assert kept == activation_bytes(s, b, h, a) + norms
    assert kept / activation_bytes(s, b, h, a) < 1.004


def paper_layer(s, b, h, a):
    torch.manual_seed(0)

    def linear(c_in, c_out):
        return torch.nn.Linear(c_in, c_out, dtype=torch.bfloat16)

    q, k, v, o = (linear(h, h) for _ in range(4))
    up, down = linear(h, 4 * h), linear(4 * h, h)
    norms = [torch.nn.LayerNorm(h, dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True)

    def dropped(t):
        return torch.native_dropout(t, 0.1, True)[0]  # F.dropout's CPU mask is not of booleans

    def heads(t):
        return t.view(b, s, a, h // a).transpose(1, 2)

    def run():
        y = norms[0](x)
        z = heads(q(y)) @ heads(k(y)).transpose(-1, -2) * (h // a) ** -0.5
        mixed = dropped(torch.softmax(z, -1)) @ heads(v(y))
        r = x + dropped(o(mixed.transpose(1, 2).reshape(b, s, h)))
        return r + dropped(down(F.gelu(up(norms[1](r)))))

    return run, [p for m in (q, k, v, o, up, down, *norms) for p in m.parameters()]


def test_the_papers_share_of_the_square():
    """GPT-3: 5as/h = 80, so that 70 % of the layer's bytes go with selective recomputation."""
    gpt3 = {"s": 2048, "b": 1, "h": 12288, "a": 96}
    whole, part = activation_bytes(**gpt3), activation_bytes(**gpt3, recompute="selective")
    assert 1 - part / whole == pytest.approx(80 / 114)
    assert activation_bytes(**gpt3, recompute="full") == 2 * 2048 * 12288


def test_memory_shared_is_counted_once():
    x = np.zeros((4, 8))
    assert kept_bytes({"a": x, "b": [x.T, x[1:]]}, None, 3, "text") == 256
    assert kept_bytes((x, x.copy()), without=[{"x": x[0]}]) == 256
    assert kept_bytes(()) == 0


# ---------------------------------------------------------------------------- bytes moved, time


def test_traffic_of_plain_attention_is_that_of_its_three_steps():
    b, h, n, d, e = 2, 3, 50, 8, 4
    steps = [(2 * n * d, n * n), (n * n, n * n), (n * n + n * d, n * d)]
    want = e * b * h * sum(read + written for read, written in steps)
    assert attention_traffic(b, h, n, d, e) == want


@given(n=st.integers(1, 60), block=st.integers(1, 70))
def test_traffic_of_tiles_is_that_of_a_walk_over_them(n, block):
    d, moved = 8, 0
    for start in range(0, n, block):
        rows = min(block, n - start)
        moved += rows * d * 4  # q in
        for other in range(0, n, block):
            moved += 2 * min(block, n - other) * d * 4  # k and v in
        moved += rows * d * 4 + rows * 4  # out and log-sum-exp
    assert attention_traffic(1, 1, n, d, 4, block) == moved


def test_the_roofline():
    assert attainable_flops(10, 1, 100, 5) == 50
    assert attainable_flops(1000, 1, 100, 5) == 100


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_flops(1, 1, -2, 1), "n: expected at least 0; got -2"),
        (lambda: attention_flops(1, 1.5, 2, 1), "h: expected an integer; got 1.5"),
        (lambda: linear_flops(1, 1, -1), "c_out: expected at least 0"),
        (lambda: block_flops(1, 1, 1, -1), "f: expected at least 0"),
        (lambda: training_flops_per_token(-1, 1, 1, 1), "n_params: expected at least 0"),
        (lambda: attention_bytes(1, 1, 1, 1, 0), "itemsize: expected at least 1; got 0"),
        (lambda: attention_traffic(1, 1, 1, 1, 4, 0), "block: expected at least 1; got 0"),
        (lambda: block_bytes(1, 1, 1, 1, 1, 0), "itemsize: expected at least 1"),
        (lambda: activation_bytes(1, 1, 1, 1, "some"), "recompute: expected one of none"),
        (lambda: attainable_flops(1, 0, 1, 1), "moved: expected a number > 0; got 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
