"""Activation recomputation: the same bits in the gradients, less memory, and clear refusals."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend, grad, no_grad, random
from tinygrad_llm.functional import dropout
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import Linear, Parameter, recompute
from tinygrad_llm.parallel import Shards


def small_model(recomputed, **changes):
    values = {"vocab_size": 11, "context_length": 6, "emb_dim": 8, "n_heads": 2, "n_layers": 3}
    random.manual_seed(1)
    model = GPT(GPTConfig(**{**values, "drop_rate": 0.2, **changes}))
    model.recompute = recomputed
    return model


def batch(rows=4, T=6, vocab_size=11):
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab_size, (rows, T)), rng.integers(0, vocab_size, (rows, T))


def bits_of_gradients(model):
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: None if g is None else g.data.tobytes() for name, g in grads.items()}


@settings(max_examples=20)
@given(
    rate=st.sampled_from([0.0, 0.3]),
    tied=st.booleans(),
    threads=st.integers(1, 3),
    pieces=st.integers(1, 3),
    frozen=st.booleans(),
    kernels=st.booleans(),
)
def test_the_bits_are_those_without(rate, tied, threads, pieces, frozen, kernels):
    found = []
    for recomputed in (False, True):
        model = small_model(recomputed, drop_rate=rate, tie_weights=tied)
        model.blocks[1].requires_grad_(not frozen)
        with backend.using(backend.CPU if kernels else backend.MATHS):
            loss = Shards(threads).backward(model, *batch(), pieces=pieces)
        after = random.default_generator.get_state()  # dropout goes on with the same stream
        found.append((loss, bits_of_gradients(model), after))
    assert found[0] == found[1]


def test_packed_rows_and_a_generator_of_the_models_own():
    ids, targets = batch()
    segments = np.array([[0, 0, 0, 1, 1, 1]] * 4)
    found = []
    for recomputed in (False, True):
        model = GPT(GPTConfig(11, 6, 8, 2, 2, drop_rate=0.3), generator=random.Generator(5))
        model.recompute = recomputed
        model.loss(ids, targets, segments).backward()
        found.append((bits_of_gradients(model), model.drop_emb.generator.get_state()))
    assert found[0] == found[1]


def peak_memory(recomputed):
    """Bytes that a loss and its gradient take at most, beyond what was there before."""
    sizes = {"emb_dim": 32, "context_length": 64, "n_layers": 12, "vocab_size": 16}
    model = small_model(recomputed, **sizes)
    ids, targets = batch(8, 64, 16)
    gc.collect()
    tracemalloc.start()
    try:
        model.loss(ids, targets).backward()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_it_takes_less_memory():
    assert peak_memory(True) < 0.3 * peak_memory(False)


def test_what_is_kept_is_freed_by_backward():
    class Input:  # a dictionary or a Tensor cannot be watched as simply
        alive = 0

        def __init__(self):
            Input.alive += 1

        def __del__(self):
            Input.alive -= 1

    x = Tensor([1.0], requires_grad=True)
    y = recompute(lambda x, _: x * 2, x, Input())
    assert Input.alive == 1
    y.backward()
    assert Input.alive == 0
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        y.backward()


def test_inputs_parameters_and_constants():
    layer = Linear(3, 2)
    x = Tensor(np.ones((4, 3), np.float32), requires_grad=True)
    unused = Tensor([1.0], requires_grad=True)

    def function(x, factor, again, unused):
        return layer(x * factor + again)

    expected = grad(function(x, 2.0, x, unused).sum(), [x, layer.weight])
    found = grad(recompute(function, x, 2.0, x, unused).sum(), [x, layer.weight])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    y = recompute(function, x, 2.0, x, unused).sum()
    y.backward(retain_graph=True)
    y.backward()  # a graph that is kept works twice
    np.testing.assert_array_equal(x.grad.data, 2 * expected[0].data)
    assert unused.grad is None


def test_one_inside_another():
    layers = [Linear(3, 3) for _ in range(4)]
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)

    def two(a, b):
        return lambda x: dropout(b(a(x).tanh()), 0.5)

    def all_of_them(x, run):
        return run(two(*layers[2:]), run(two(*layers[:2]), x))

    found = []
    for run in (lambda f, x: f(x), recompute):
        random.manual_seed(0)
        y = recompute(lambda x, run=run: all_of_them(x, run), x)
        found.append([g.data.tobytes() for g in grad(y.sum(), [x, layers[0].weight])])
    random.manual_seed(0)
    plain = grad(all_of_them(x, lambda f, x: f(x)).sum(), [x, layers[0].weight])
    assert found[0] == found[1] == [g.data.tobytes() for g in plain]


def test_nothing_is_kept_where_nothing_is_recorded():
    calls = []
    weight = Parameter([2.0])

    def function(x):
        calls.append(x)
        return x * weight

    x = Tensor([1.0])
    with no_grad():
        assert recompute(function, x).is_leaf
    assert calls == [x]
    weight.requires_grad_(False)
    assert recompute(function, x).is_leaf  # nothing needs a gradient


def test_what_is_no_number_is_the_same_again():
    x = Tensor([1.0, np.nan, np.inf], requires_grad=True)
    recompute(lambda x: x * 2, x).sum().backward()
    np.testing.assert_array_equal(x.grad.data, [2, 2, 2])


def test_what_it_cannot_do():
    x = Tensor([1.0], requires_grad=True)
    doubled = x * 2
    with pytest.raises(ValueError, match="give it as an input"):
        recompute(lambda y: y * doubled, x)
    with pytest.raises(TypeError, match="returned a tuple, not a Tensor"):
        recompute(lambda y: (y, y), x)
    generator = random.Generator(3)
    y = recompute(lambda x: dropout(x, 0.5, generator=generator), Tensor(np.ones(99), True))
    with pytest.raises(RuntimeError, match="did not return the same again; name the generator"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        recompute(lambda y: y * y, x).backward(create_graph=True)
