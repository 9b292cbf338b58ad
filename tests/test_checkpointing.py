"""Recomputation against the plain backward pass bit for bit, and its memory counted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, generators, strided
from torch.utils.checkpoint import checkpoint

from attn_lessons.checkpointing import (
    Kept,
    TanhLayer,
    checkpoint_memory,
    checkpointed_backward,
    checkpointed_forward,
    sqrt_schedule,
    stack_backward,
    stack_forward,
)
from attn_lessons.cost import kept_bytes
from attn_lessons.gradcheck import numerical_vjp
from attn_lessons.transformer import (
    encoder_block_backward_cached,
    encoder_block_forward,
    init_encoder_block,
)


def stack(rng, depth, width, rate=0.3, dtype=np.float64):
    return [
        TanhLayer(
            (rng.normal(size=(width, width)) / width**0.5).astype(dtype),
            rng.normal(size=width).astype(dtype),
            int(rng.integers(2**31)),
            rate,
        )
        for _ in range(depth)
    ]


def plainly(layers, x, dout):
    _, caches = stack_forward(layers, x)
    return stack_backward(layers, dout, caches)


def same(got, want):
    (dx, grads), (dx2, grads2) = got, want
    assert np.array_equal(dx, dx2)
    assert len(grads) == len(grads2)
    for a, b in zip(grads, grads2, strict=True):
        assert set(a) == set(b)
        assert all(np.array_equal(a[n], b[n]) for n in a)


class Block:
    """An encoder block whose dropout draws from a seed, or from a generator others draw from."""

    def __init__(self, params, seed=None, rng=None, rate=0.2):
        self.params, self.seed, self.rng, self.rate = params, seed, rng, rate

    def forward(self, x):
        rng = self.rng or np.random.default_rng(self.seed)
        return encoder_block_forward(x, self.params, 2, rate=self.rate, rng=rng)

    def backward(self, dout, cache):
        return encoder_block_backward_cached(dout, cache)


@given(st.data(), generators(), st.integers(0, 7), st.integers(1, 9), DTYPES)
def test_gradients_are_the_plain_ones_bit_for_bit(data, rng, depth, every, dtype):
    layers = stack(rng, depth, 5, dtype=dtype)
    x, dout = (data.draw(strided(rng.normal(size=(2, 3, 5)).astype(dtype))) for _ in range(2))
    before = x.copy(), dout.copy()
    got = checkpointed_backward(layers, x, dout, every)
    same(got, plainly(layers, x, dout))
    out, kept = checkpointed_forward(layers, x, every)
    assert np.array_equal(out, stack_forward(layers, x)[0])
    same(checkpointed_backward(layers, x, dout, every, kept=kept), got)
    assert got[0].dtype == dtype
    assert all(g.dtype == dtype for grad in got[1] for g in grad.values())
    assert np.array_equal(x, before[0])
    assert np.array_equal(dout, before[1])


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_encoder_blocks_with_dropout_from_a_seed(every):
    rng = np.random.default_rng(0)
    layers = [Block(init_encoder_block(rng, 6, 8), seed) for seed in range(5)]
    x, dout = rng.normal(size=(2, 2, 4, 6))
    same(checkpointed_backward(layers, x, dout, every), plainly(layers, x, dout))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_shared_generator_is_wound_back_and_forward_again(every):
    """The gradients are those of the plain pass, and so is what is drawn next."""
    params = [init_encoder_block(np.random.default_rng(i), 6, 8) for i in range(5)]
    x, dout = np.random.default_rng(9).normal(size=(2, 2, 4, 6))
    rng = np.random.default_rng(1)
    want = plainly([Block(p, rng=rng) for p in params], x, dout)
    after = rng.random()
    rng = np.random.default_rng(1)
    got = checkpointed_backward([Block(p, rng=rng) for p in params], x, dout, every, rng=rng)
    same(got, want)
    assert rng.random() == after


def test_pytorch_190758_recomputing_with_new_dropout_gives_other_gradients():
    """The forward pass was that of another network: off by as much as the gradient is long."""
    params = [init_encoder_block(np.random.default_rng(i), 6, 8) for i in range(4)]
    x, dout = np.random.default_rng(9).normal(size=(2, 2, 4, 6))
    rng = np.random.default_rng(1)
    layers = [Block(p, rng=rng) for p in params]
    want, _ = plainly(layers, x, dout)
    rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
    got, _ = checkpointed_backward(layers, x, dout, 2)  # nobody winds the generator back
    assert np.linalg.norm(got - want) > 0.2 * np.linalg.norm(want)


def test_the_generator_is_put_back_when_a_layer_fails():
    class Broken(Block):
        def backward(self, dout, cache):
            raise RuntimeError("no gradient")

    rng = np.random.default_rng(1)
    layers = [Broken(init_encoder_block(rng, 6, 8), rng=rng)]
    x = rng.normal(size=(2, 4, 6))
    _, kept = checkpointed_forward(layers, x, 1, rng=rng)
    state = rng.bit_generator.state
    with pytest.raises(RuntimeError, match="no gradient"):
        checkpointed_backward(layers, x, x, 1, kept=kept, rng=rng)
    assert rng.bit_generator.state == state


# ----------------------------------------------------------------------------- against autograd


def torchs_layer(x, layer, w, b):
    y = torch.tanh(x @ w + b)
    keep = torch.from_numpy(layer.keep(tuple(y.shape)))
    return x + torch.where(keep, y, 0) / (1 - layer.rate)


@given(generators(), st.integers(1, 5), st.integers(1, 5))
def test_gradients_are_autograds(rng, depth, every):
    layers = stack(rng, depth, 4)
    x, dout = rng.normal(size=(2, 2, 3, 4))
    leaf = torch.tensor(x, requires_grad=True)
    weights = [[torch.tensor(a, requires_grad=True) for a in (n.w, n.b)] for n in layers]
    out = leaf
    for layer, pair in zip(layers, weights, strict=True):
        out = checkpoint(torchs_layer, out, layer, *pair, use_reentrant=False)
    out.backward(torch.tensor(dout))
    dx, grads = checkpointed_backward(layers, x, dout, every)
    np.testing.assert_allclose(dx, leaf.grad.numpy(), rtol=1e-10, atol=1e-12)
    for grad, (w, b) in zip(grads, weights, strict=True):
        np.testing.assert_allclose(grad["w"], w.grad.numpy(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(grad["b"], b.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_gradients_are_finite_differences():
    rng = np.random.default_rng(3)
    layers = stack(rng, 3, 4)
    x, dout = rng.normal(size=(2, 2, 3, 4))
    dx, grads = checkpointed_backward(layers, x, dout, 2)
    want = numerical_vjp(lambda z: stack_forward(layers, z)[0], x, dout)
    np.testing.assert_allclose(dx, want, atol=1e-8)

    def through(w):
        return stack_forward([layers[0], layers[1]._replace(w=w), layers[2]], x)[0]

    want = numerical_vjp(through, layers[1].w, dout)
    np.testing.assert_allclose(grads[1]["w"], want, atol=1e-8)


# --------------------------------------------------------------------------------- how much kept


def test_each_layer_runs_forward_twice_and_backward_once():
    calls = []

    class Counted(Block):
        def forward(self, x):
            calls.append("forward")
            return super().forward(x)

        def backward(self, dout, cache):
            calls.append("backward")
            return super().backward(dout, cache)

    rng = np.random.default_rng(0)
    layers = [Counted(init_encoder_block(rng, 6, 8), s) for s in range(6)]
    x = rng.normal(size=(2, 4, 6))
    checkpointed_backward(layers, x, x, 2)
    assert calls.count("forward") == 12
    assert calls.count("backward") == 6


@pytest.mark.parametrize("every", [1, 3, 4, 16])
def test_what_is_kept_is_what_is_counted(every):
    """Bytes of arrays alive at the worst moment: inputs of segments, and one segment's caches."""
    rng = np.random.default_rng(0)
    layers = stack(rng, 16, 8, rate=0.0)
    x = rng.normal(size=(4, 8))
    parameters = [(n.w, n.b) for n in layers]
    _, kept = checkpointed_forward(layers, x, every)
    assert kept_bytes(kept) == x.nbytes * math.ceil(16 / every)
    _, caches = stack_forward(layers[:every], kept.inputs[0])
    layer = x.nbytes * 2 + x.size  # x, y, and a mask of booleans
    assert kept_bytes(caches, without=parameters) == layer * every
    ratio = layer / x.nbytes
    # The segment's first input is kept already.
    worst = kept_bytes(kept, caches, without=parameters)
    assert worst == x.nbytes * (checkpoint_memory(16, every, ratio) - 1)


@pytest.mark.parametrize(("n", "every"), [(1, 1), (4, 2), (16, 4), (100, 10), (10000, 100)])
def test_the_root(n, every):
    assert sqrt_schedule(n) == every
    assert checkpoint_memory(n, every) == 2 * n**0.5


@given(st.integers(1, 200), st.sampled_from([0.5, 1.0, 16.0]))
def test_the_schedule_keeps_least(n, ratio):
    best = sqrt_schedule(n, ratio)
    least = checkpoint_memory(n, best, ratio)
    assert all(least <= checkpoint_memory(n, k, ratio) for k in range(1, n + 2))
    # ratio * k runs over whole layers: no further from the root than one of them.
    assert least <= 2 * (ratio * n) ** 0.5 + max(ratio, 1) + 1


def test_caches_of_one_segment_are_alive_at_a_time():
    """Counted as they come and go: never more than ``every`` beyond the one being made."""
    import weakref

    alive, most = weakref.WeakSet(), []

    class Cache:
        pass

    class Watched:
        def forward(self, x):
            cache = Cache()
            alive.add(cache)
            most.append(len(alive))
            return x + 1, cache

        def backward(self, dout, cache):
            return dout, {}

    x = np.zeros(2)
    checkpointed_backward([Watched() for _ in range(9)], x, x, 3)
    assert max(most[:9]) <= 2  # forward: each dropped as the next is made
    assert max(most) <= 4
    stack_forward([Watched() for _ in range(9)], x)
    assert max(most) == 9


# --------------------------------------------------------------------------------- plain data


def test_plain_tuples_and_dicts_are_layers():
    rng = np.random.default_rng(0)
    layers = stack(rng, 3, 4)
    x, dout = rng.normal(size=(2, 3, 4))
    want = plainly(layers, x, dout)
    same(checkpointed_backward([tuple(n) for n in layers], x, dout, 2), want)
    same(checkpointed_backward([n._asdict() for n in layers], x, dout, 2), want)


def test_a_layers_dropout_is_the_same_at_each_call():
    layer = TanhLayer(np.eye(4), np.ones(4), seed=3, rate=0.5)
    x = np.zeros((50, 4))
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert np.array_equal(first, second)
    assert set(np.unique(first)) == {0, 2 * np.tanh(1.0)}
    assert not np.array_equal(first, layer._replace(seed=4).forward(x)[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x: checkpointed_forward(n, x, 0), "every: expected at least 1; got 0"),
        (lambda n, x: checkpointed_backward(n, x, x, 1.5), "every: expected an integer; got 1.5"),
        (lambda n, x: stack_forward([abs], x), "layers: expected objects with forward.*at 0"),
        (lambda n, x: stack_backward(n, x, []), "caches: expected 2, one a layer; got 0"),
        (lambda n, x: stack_forward(n, x[:, :2]), r"w: expected shape \(2, 2\) to match x \(3, 2"),
        (lambda n, x: checkpointed_backward(n, x, x[:2], 1), "dout: expected shape"),
        (lambda n, x: stack_forward([n[0]._replace(rate=1.0)], x), "rate: expected a number in"),
        (
            lambda n, x: checkpointed_backward(n, x, x, 1, kept=Kept([x], [None])),
            "kept: expected 2 inputs, one a segment; got 1",
        ),
        (
            lambda n, x: checkpointed_backward(
                n, x, x, 2, kept=Kept([x], [None]), rng=np.random.default_rng(0)
            ),
            "rng: expected no generator, as in the forward pass; got one",
        ),
        (
            lambda n, x: checkpointed_backward(n, x, x, 2, kept=Kept([x], [{}])),
            "rng: expected a generator, as in the forward pass; got none",
        ),
        (lambda n, x: sqrt_schedule(0), "n_layers: expected at least 1; got 0"),
        (lambda n, x: checkpoint_memory(3, 1, 0.0), "ratio: expected a finite number > 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        call(stack(rng, 2, 4), rng.normal(size=(3, 4)))
