"""The CPU's kernels for a step of generation: each gives what the ops that it stands for give."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_llm.kernels.cpu._few_rows import FEW, product

from tinygrad_llm import Tensor, backend, no_grad, tensor
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import (
    GELU,
    LayerCache,
    LoRAConfig,
    RotaryEmbedding,
    TransformerBlock,
    apply_lora,
)
from tinygrad_llm.nn.layers import Linear
from tinygrad_llm.random import Generator

C, HEADS, CONTEXT = 12, 3, 9
BLOCK = backend.CPU.fused["block"]
WITHOUT = backend.reading("off:block")


def block(dtype="float64", bias=True, change=None):
    """A block none of whose parameters is 0 or 1."""
    generator = Generator(0)
    made = TransformerBlock(C, HEADS, CONTEXT, 0.5, qkv_bias=bias, generator=generator).eval()
    for parameter in made.parameters():
        parameter.data += generator.normal(0.0, 0.5, parameter.shape).astype(np.float32)
    if change:
        change(made)
    return made.to(dtype)


def steps(model, x, mask=None):
    """What the block makes of x (B, T, C), the first tokens together, the last three one by one;
    and what is in the cache then.
    """
    cache = LayerCache(len(x), model.att.n_kv_heads, CONTEXT, C // HEADS, x.dtype)
    bounds = [0, *range(x.shape[1] - 3, x.shape[1] + 1)]
    y = []
    with no_grad():
        for begin, end in pairwise(bounds):
            seen = None if mask is None else mask[..., :end]
            y.append(model(Tensor(x[:, begin:end]), seen, cache).data)
    assert cache.length == x.shape[1]
    return np.concatenate(y, axis=1), cache.keys[:, :, :end], cache.values[:, :, :end]


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernel's calls."""
    counted, forward = [], BLOCK.forward

    def spy(*arrays, **attributes):
        counted.append(attributes["length"])
        return forward(*arrays, **attributes)

    monkeypatch.setattr(BLOCK, "forward", staticmethod(spy))
    return counted


# --- a block for one further token ----------------------------------------------------------------


@settings(max_examples=40)
@given(
    B=st.integers(1, 3),
    T=st.integers(4, CONTEXT),
    dtype=st.sampled_from(["float32", "float64"]),
    bias=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 1e3]),  # of all channels: what a norm takes away
    padded=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_of_a_block_gives_what_its_ops_give(
    B, T, dtype, bias, size, shift, padded, seed
):
    rng = np.random.default_rng(seed)
    x = (size * rng.standard_normal((B, T, C)) + shift).astype(dtype)
    mask = None
    if padded:
        mask = (np.arange(T) >= rng.integers(0, T - 3, B)[:, None])[:, None, None]
    found = steps(block(dtype, bias), x, mask)
    with backend.using(backend.MATHS):  # in float64, of the same numbers
        expected = steps(block("float64", bias), x.astype(np.float64), mask)
        its_own = steps(block(dtype, bias), x, mask)
    eps = np.finfo(dtype).eps
    if dtype == "float64":  # what is expected is not exact, either
        eps *= 1 + shift / size
    for a, b, c in zip(found, expected, its_own, strict=True):
        assert (a.shape, a.dtype) == (c.shape, c.dtype)
        error, usual = np.abs(a - b).max(), np.abs(c - b).max()
        assert error <= 4 * usual + 64 * eps * np.abs(b).max()


def test_it_is_what_runs_where_a_gpt_grows_by_one_token(calls):
    model, ids = GPT(GPTConfig(13, CONTEXT, C, HEADS, 2), Generator(0)).eval(), np.ones((2, 1), int)
    with no_grad():
        cache = model.new_cache(2, padding=[0, 2])
        model(ids.repeat(4, axis=1), cache=cache)
        assert calls == []
        model(ids, cache=cache)
        assert calls == [4, 4]
        with backend.using(WITHOUT):
            model(ids, cache=cache)
        assert calls == [4, 4]


def test_it_writes_the_new_keys_and_values_and_nothing_else():
    model, rng = block(), np.random.default_rng(0)
    cache = LayerCache(2, HEADS, CONTEXT, C // HEADS, np.float64)
    cache.keys[...], cache.values[...] = rng.standard_normal((2, *cache.keys.shape))
    cache.length, x = 4, rng.standard_normal((2, 1, C))
    keys, values = cache.keys.copy(), cache.values.copy()
    for parameter in model.parameters():
        parameter.data.flags.writeable = False
    x.flags.writeable = False
    with no_grad():
        y = model(Tensor(x), cache=cache)
    assert not np.shares_memory(y.data, x)
    for now, before in ((cache.keys, keys), (cache.values, values)):
        changed = now != before
        assert changed[:, :, 4].all() and not np.delete(changed, 4, axis=2).any()


CHANGES = {
    "adapters": lambda b: apply_lora(b, LoRAConfig(rank=2, alpha=2)),
    "another linear layer": lambda b: setattr(b.ff, "down", type("Half", (Linear,), {})(4 * C, C)),
    "exact gelu": lambda b: setattr(b.ff, "gelu", GELU()),
    "a window": lambda b: setattr(b.att, "window", 3),
    "rope": lambda b: setattr(b.att, "rope", RotaryEmbedding(C // HEADS, CONTEXT)),
    "dropout": lambda b: b.train(),
    "dropout of the attention": lambda b: b.att.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_another_runs_by_its_ops(change, calls):
    model = block(change=CHANGES[change])
    steps(model, np.random.default_rng(0).standard_normal((2, 6, C)))
    assert calls == []


REFUSED = {
    "two tokens": ({"x": np.ones((2, 2, C))}, {}),
    "other rows": ({"x": np.ones((3, 1, C))}, {}),
    "another dtype": ({"x": np.ones((2, 1, C), np.float32)}, {}),
    "a full cache": ({}, {"length": CONTEXT}),
    "a float mask": ({}, {"mask": np.zeros((2, 1, 1, 5))}),
    "a mask of another shape": ({}, {"mask": np.ones((1, 1, 5), bool)}),
    "a token that sees nothing": ({}, {"mask": np.zeros((2, 1, 1, 5), bool)}),
    "no NumPy mask": ({}, {"mask": tensor(np.ones((2, 1, 1, 5), bool))}),
}


@pytest.mark.parametrize("what", [None, *REFUSED])
def test_what_the_kernel_accepts(what):
    arrays, attributes = REFUSED.get(what, ({}, {}))
    shape = 2, HEADS, CONTEXT, C // HEADS
    given = {"x": np.ones((2, 1, C)), "keys": np.ones(shape), "values": np.ones(shape)} | arrays
    layers = [(np.ones((C, C)), None)] * 6
    attributes = {"length": 4, "mask": None, "eps": (1e-5, 1e-5)} | attributes
    assert BLOCK.accepts(*given.values(), *layers, **attributes) == (what is None)


def test_a_cache_for_other_heads_is_refused_as_by_the_ops(calls):
    cache = LayerCache(1, 2 * HEADS, CONTEXT, C // HEADS // 2)
    with no_grad(), pytest.raises(ValueError, match="keys of shape"):
        block("float32")(Tensor(np.ones((1, 1, C), np.float32)), cache=cache)
    assert not calls


def test_where_gradients_are_recorded_it_does_not_run(calls):
    cache = LayerCache(1, HEADS, CONTEXT, C // HEADS)
    with pytest.raises(RuntimeError, match="no_grad"):
        block("float32")(Tensor(np.ones((1, 1, C), np.float32)), cache=cache)
    assert calls == []


# --- a few rows times a matrix --------------------------------------------------------------------


@settings(max_examples=60)
@given(
    n=st.one_of(st.integers(1, 20), st.integers(FEW - 1, FEW + 1)),
    m=st.integers(1, 70),
    k=st.integers(1, 70),
    dtype=st.sampled_from(["float32", "float64"]),
    spread=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_product_of_few_rows_is_a_product(n, m, k, dtype, spread, seed):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((n, k)).astype(dtype), rng.standard_normal((m, k)).astype(dtype)
    if spread:  # in memory
        x, w = np.repeat(x, 2, axis=1)[:, ::2], np.asfortranarray(w)
    x.flags.writeable = w.flags.writeable = False
    y = np.full((n, m), np.nan, dtype)
    product(x, w, y)
    bound = math.sqrt(k) * 4 * np.finfo(dtype).eps * (np.abs(x) @ np.abs(w).T)
    assert (np.abs(y - x.astype(np.float64) @ w.T.astype(np.float64)) <= bound).all()
