"""The CPU's kernels for several ops in one, against the ops that they stand for in float64: to its
last digits, and to those of float32, whatever the team of threads.
"""

import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from tinygrad_llm.kernels.cpu import _blocks, attention, loss

from tinygrad_llm import backend, nn, threads
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.check.mutants import Mutant
from tinygrad_llm.nn import FeedForward, MultiHeadAttention
from tinygrad_llm.nn.attention import _mlp as by_ops
from tinygrad_llm.ops import TABLE
from tinygrad_llm.tensor import Tensor, apply, fused, grad, no_grad

lengths = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
teams = st.sampled_from([1, 2, 3])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Everything is shared out, and nothing is done in one piece: as with large arrays."""
    monkeypatch.setattr(_blocks, "_WORTH", 0)
    monkeypatch.setattr(_blocks, "SIZE", 4)
    monkeypatch.setattr(loss, "_ROWS", 3)
    monkeypatch.setattr(loss, "SIZE", 8)
    monkeypatch.setattr(attention, "_QUERIES", 2)


def computed(function, tensors, reading, team, dtype):
    """(y, the gradients of y ⊙ g for a certain g), with the tensors in that dtype."""
    xs = [Tensor(x.data.astype(dtype), requires_grad=x.requires_grad) for x in tensors]
    with backend.using(reading), threads.team(team):
        y = function(*xs)
        g = np.cos(1 + np.arange(y.data.size)).reshape(y.shape).astype(dtype)
        wanted = [x for x in xs if x.requires_grad]
        first, again = (grad(y, wanted, Tensor(g), retain_graph=True) for _ in range(2))
        assert all(np.array_equal(a.data, b.data, equal_nan=True) for a, b in zip(first, again))
        return [y.data, *(each.data for each in first)]


def watched(name):
    """A reading in which calls of a kernel's functions are counted, and the counter."""
    kernel, calls = backend.CPU.fused[name], Counter()

    def counted(function, which):
        def run(*args, **keywords):
            calls[which] += 1
            return function(*args, **keywords)

        return staticmethod(run)

    both = {which: counted(getattr(kernel, which), which) for which in ("forward", "vjp")}
    fused = {**backend.CPU.fused, name: type(name, (kernel,), both)}
    return backend.Reading(backend.CPU.space, backend.CPU.kernels, fused=fused), calls


def check(name, function, *arrays, frozen=(), team):
    """`function` by the kernel of that name, and by ops."""
    reading, calls = watched(name)
    tensors = [Tensor(a, requires_grad=i not in frozen) for i, a in enumerate(arrays)]
    assume(any(x.requires_grad for x in tensors))
    exact = computed(function, tensors, backend.MATHS, 1, np.float64)
    for dtype, digits in ((np.float64, 1e-12), (np.float32, 1e-4)):
        before = [x.data.copy() for x in tensors]
        found = computed(function, tensors, reading, team, dtype)
        assert all(map(np.array_equal, before, (x.data for x in tensors)))
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == dtype
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=digits, atol=digits * (np.abs(b).max() + 0.02))
    assert calls == {"forward": 2, "vjp": 4}, f"no kernel: {backend.refusals}"


def normal(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


def mlp(x, up, b, down, c):
    return fused("mlp", by_ops, x, up, b, down, c, activation="gelu_tanh")


OF_MLP = lengths, lengths, lengths, lengths, st.sets(st.integers(0, 4)), teams, seeds


@settings(max_examples=60, deadline=None)
@given(*OF_MLP)
def test_mlp(rows, k, m, n, frozen, team, seed):
    arrays = normal(seed, (2, rows, k), (m, k), (m,), (n, m), (n,))

    check("mlp", mlp, *arrays, frozen=frozen, team=team)


class Doubled(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_feed_forward_runs_as_one_kernel_unless_something_else_was_put_in():
    reading, calls = watched("mlp")
    x = Tensor(np.ones((2, 3, 4), np.float32))
    with backend.using(reading):
        FeedForward(4)(x)
        assert calls["forward"] == 1
        for name, other in [
            ("gelu", Doubled("tanh")), ("gelu", nn.SiLU()), ("gelu", nn.GELU()),
            ("up", nn.Sequential(nn.Linear(4, 16))),
        ]:  # fmt: skip
            layer = FeedForward(4)
            setattr(layer, name, other)
            expected = layer.down(layer.gelu(layer.up(x)))
            assert np.array_equal(layer(x).data, expected.data)
        FeedForward(4).to("bfloat16")(x.bfloat16())
        assert calls["forward"] == 1


OF_HEAD = lengths, lengths, st.integers(1, 12), st.sets(st.integers(0, 1)), st.data(), teams, seeds


@settings(max_examples=60, deadline=None)
@given(*OF_HEAD)
def test_linear_cross_entropy(n, c, V, frozen, data, team, seed):
    targets = np.array(data.draw(st.lists(st.integers(-1, V - 1), min_size=n, max_size=n)))
    assume((targets >= 0).any())

    def head(h, w):
        return F.linear_cross_entropy(h, w, targets, ignore_index=-1)

    h, w = normal(seed, (n, c), (V, c))
    check("linear_cross_entropy", head, 5 * h, w, frozen=frozen, team=team)
    with no_grad(), threads.team(team):  # without gradients, other arrays
        alone, together = (head(Tensor(h), Tensor(w)).item() for _ in range(2))
        with backend.using(backend.MATHS):
            assert alone == together == pytest.approx(head(Tensor(h), Tensor(w)).item(), rel=1e-12)


def test_the_logits_are_in_memory_once_and_without_gradients_only_some(monkeypatch):
    monkeypatch.setattr(loss, "_ROWS", 64)
    n, c, V = 512, 4, 3000
    h, w = (Tensor(a.astype(np.float32), True) for a in normal(0, (n, c), (V, c)))
    targets, logits = np.arange(n), 4 * n * V

    def peak(function):
        function()
        tracemalloc.start()
        function()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    def without():
        with no_grad():
            F.linear_cross_entropy(h, w, targets)

    assert logits < peak(lambda: F.linear_cross_entropy(h, w, targets).backward()) < 1.2 * logits
    assert peak(without) < 0.2 * logits


def test_targets_are_checked_and_none_that_counts_gives_nan():
    h, w = (Tensor(a.astype(np.float32)) for a in normal(0, (3, 4), (5, 4)))
    with pytest.raises(IndexError, match="linear_cross_entropy: target"):
        F.linear_cross_entropy(h, w, np.array([0, 5, 1]))
    with np.errstate(all="ignore"):
        assert np.isnan(F.linear_cross_entropy(h, w, np.full(3, -100)).item())


OF_ATTENTION = lengths, st.integers(1, 40), st.sampled_from([1, 2, 4]), st.booleans(), teams, seeds


@settings(max_examples=60, deadline=None)
@given(*OF_ATTENTION)
def test_self_attention(batch, T, heads, causal, team, seed):
    C = 4 * heads

    def attend(qkv):
        layer = MultiHeadAttention(C, C, T, n_heads=heads, causal=causal)
        layer.qkv, layer.out_proj = (lambda x: x), (lambda y: y)
        return layer(qkv)

    (qkv,) = normal(seed, (batch, T, 3 * C))
    check("self_attention", attend, qkv, team=team)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([127, 128, 129, 300]), teams, seeds)
def test_self_attention_of_long_sequences_keeps_no_probabilities(T, team, seed):
    attend = MultiHeadAttention(4, 4, T, n_heads=1)
    attend.qkv, attend.out_proj = (lambda x: x), (lambda y: y)
    (qkv,) = normal(seed, (1, T, 12))
    check("self_attention", attend, qkv, team=team)
    kernel = backend.CPU.fused["self_attention"]
    _, saved = kernel.forward(qkv, heads=1, causal=True)
    kept = [E for of_heads in saved for _, _, E in of_heads if E is not None]
    assert bool(kept) == (T <= attention._KEPT)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30])
def test_a_key_that_a_query_may_not_see_changes_nothing(number):
    T, hidden = 50, 37
    (qkv,) = normal(2, (1, T, 3, 4))
    qkv = qkv.astype(np.float32)
    kernel = backend.CPU.fused["self_attention"]

    def attended():
        return kernel.forward(qkv.reshape(1, T, 12), heads=1, causal=True)[0][:, :hidden]

    before = attended()
    qkv[:, hidden:, 1] = number
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(attended(), before, rtol=1e-5, atol=1e-6)


def test_a_head_takes_arrays_as_its_parts_do():
    h, w = (a.astype(np.float32) for a in normal(0, (3, 4), (5, 4)))
    expected = F.cross_entropy(F.linear(h, w), np.arange(3))
    assert F.linear_cross_entropy(h, w, np.arange(3)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("bias", [(1,), (2, 5), ()])
def test_a_bias_of_another_shape_is_left_to_the_op(bias):
    x, w, b = (Tensor(a, True) for a in normal(0, (2, 4), (5, 4), bias))
    found = []
    for reading in (backend.MATHS, backend.CPU):
        with backend.using(reading):
            y = apply(TABLE["linear"], x, w, b)
            found.append([y.data, *(each.data for each in grad((y * y).sum(), [x, w, b]))])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "linear_cross_entropy"])
def test_the_same_team_gives_the_same_bits(name):
    x, w, v = normal(1, (50, 30), (40, 30), (30, 40))

    def run(x, w, v):
        if name == "mlp":
            return mlp(x, w, Tensor(np.zeros(40)), v, Tensor(np.zeros(30)))
        return F.linear_cross_entropy(x, w, np.arange(50) % 40) + 0 * v.sum()

    tensors = [Tensor(a, requires_grad=True) for a in (x, w, v)]
    first, *more = (computed(run, tensors, backend.CPU, 3, np.float32) for _ in range(5))
    for again in more:
        assert all(map(np.array_equal, first, again))


# --- planted bugs ---------------------------------------------------------------------------------

PLANTED = [
    Mutant("the slope is overwritten", "mlp.vjp", "a_bar[i] *= slope[i]",
           "a_bar[i] = np.multiply(slope[i], a_bar[i], out=slope[i])"),
    Mutant("the slope is forgotten", "mlp.vjp", "a_bar[i] *= slope[i]", "pass"),
    Mutant("ū and d̄own are exchanged", "mlp.vjp", "weight_gradients(g, h, down_bar",
           "weight_gradients(g, a_bar, down_bar"),
    Mutant("only the first block", "mlp.gelu_and_slope", "for i in parts:", "for i in parts[:1]:"),
    Mutant("X̄ is overwritten", "linear_cross_entropy.vjp", "h * g, w_bar",
           "h * np.multiply(g, saved, out=saved).dtype.type(g), w_bar"),
    Mutant("h̄ is not scaled", "linear_cross_entropy.vjp", "h_bar *= g", "pass"),
    Mutant("ignored rows count", "linear_cross_entropy._loss_and_gradient", "x[~counts] = 0",
           "pass"),
    Mutant("only a block of each thread's rows", "linear_cross_entropy.forward",
           "in _blocks_of(x)", "in _blocks_of(x)[:1]"),
    Mutant("q̄ and k̄ are exchanged", "self_attention.vjp", "_parts(qkv_bar, heads)",
           "[_parts(qkv_bar, heads)[i] for i in (1, 0, 2)]"),
    Mutant("heads are not put side by side", "self_attention.forward", "swapaxes(-3, -2)",
           "swapaxes(-2, -2)"),
]  # fmt: skip
PROPERTIES = {
    "mlp": (test_mlp, OF_MLP),
    "linear_cross_entropy": (test_linear_cross_entropy, OF_HEAD),
    "self_attention": (test_self_attention, OF_ATTENTION),
}


@pytest.mark.parametrize("mutant", PLANTED, ids=str)
def test_a_planted_bug_is_found(mutant, monkeypatch):
    name, _, function = mutant.where.partition(".")
    kernel = backend.CPU.fused[name]
    if hasattr(kernel, function):
        monkeypatch.setattr(
            kernel, function, staticmethod(mutant.rewritten(getattr(kernel, function)))
        )
    else:
        module = sys.modules[kernel.__module__]
        monkeypatch.setattr(module, function, mutant.rewritten(getattr(module, function)))
    test, strategies = PROPERTIES[name]
    found = given(*strategies)(test.hypothesis.inner_test)
    with pytest.raises(AssertionError):  # the first example that shows it will do
        settings(phases=[Phase.generate], deadline=None, database=None)(found)()
