"""The kernels of kernels/gpu/norm.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, device, dtypes, host, normal, rounded, spaced
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import norm, tuning

from tinygrad_llm import functional as F  # noqa: N812

shapes = st.sampled_from([(1, 1), (3, 5), (2, 2, 33), (5, 40), (3, 70)])
EPS = st.sampled_from([1e-5, 0.1])


def small(draw, n, N=None):
    """Tiles that make several programs and iterations; rows in registers, or in pieces of N."""
    N = N or draw(st.sampled_from([1 << (n - 1).bit_length(), 16]))
    tile = {"ROWS": draw(st.sampled_from([1, 2, 4])), "N": N, "num_warps": 1}
    programs = draw(st.sampled_from([0, 1]))  # 0: a single one that takes all rows in turns
    return tuning.using(**{"norm": tile, "norm vjp": {**tile, "PROGRAMS": programs, "STAGES": 2}})


def arguments(draw, how_many, dtype=None, shape=None):
    """dtype, x, [w, b] and g, of shapes that are drawn."""
    dtype, shape = dtype or draw(dtypes), shape or draw(shapes)
    n, weights = shape[-1], draw(st.sampled_from([dtype, "float32"]))
    scale, mean = draw(st.sampled_from([(1, 0), (30, 0), (1, 5)]))
    x = spaced(draw, rounded(mean + normal(draw, *shape, scale=scale), dtype))
    w = [rounded(1 + normal(draw, n, scale=0.3), weights) for _ in range(how_many)]
    return dtype, x, w, normal(draw, *shape)


def layer_norm(gpu, draw):
    dtype, x, w, g = arguments(draw, 2)
    eps = draw(EPS)
    with small(draw, x.shape[-1]):
        reference = lambda x, w, b: F.layer_norm(x, w, b, eps)  # noqa: E731
        agrees(gpu.layer_norm, reference, [x, *w], dtype, g=g, draw=draw, eps=eps)


def rms_norm(gpu, draw):
    dtype, x, w, g = arguments(draw, 1)
    eps = draw(EPS)
    with small(draw, x.shape[-1]):
        reference = lambda x, w: F.rms_norm(x, w, eps)  # noqa: E731
        agrees(gpu.rms_norm, reference, [x, *w], dtype, g=g, draw=draw, eps=eps)


class Joined:
    """The fused kernels with s and y side by side in one array, as harness.agrees takes them."""

    def __init__(self, kernel, with_s=True):
        self.kernel, self.with_s = kernel, with_s

    def forward(self, *arrays, **attributes):
        (s, y), saved = self.kernel.forward(*arrays, **attributes)
        assert saved[0] is s
        return np.concatenate([host(s), host(y)], axis=-1), saved

    def vjp(self, g, y, *arrays, **rest):
        n = g.shape[-1] // 2
        s_bar, g = g[..., :n], g[..., n:]  # rows that lie apart
        return self.kernel.vjp((s_bar if self.with_s else None, g), None, *arrays, **rest)


def add_norm(gpu, draw, kernel, function, how_many, N=None, **fixed):
    dtype, x, w, g = arguments(draw, how_many, **fixed)
    residual = spaced(draw, rounded(normal(draw, *x.shape), dtype))
    s_bar, eps = normal(draw, *x.shape), draw(EPS)
    with_s = draw(st.booleans())

    def reference(x, residual, *w):
        s = x + residual
        return F.concat([s, function(s, *w, eps)], axis=-1)

    g = np.concatenate([s_bar if with_s else 0 * s_bar, g], axis=-1)
    with small(draw, x.shape[-1], N):
        agrees(Joined(kernel, with_s), reference, [x, residual, *w], dtype, g=g, eps=eps)


def add_layer_norm(gpu, draw):
    add_norm(gpu, draw, gpu.add_layer_norm, F.layer_norm, 2)


def add_rms_norm(gpu, draw):
    add_norm(gpu, draw, gpu.add_rms_norm, F.rms_norm, 1)


def in_pieces(gpu, draw):
    """Rows of three pieces, in float32, where a small mistake shows."""
    fixed = {"N": 16, "dtype": "float32", "shape": (5, 40)}
    add_norm(gpu, draw, gpu.add_layer_norm, F.layer_norm, 2, **fixed)


def large_mean(gpu, draw):
    """A mean of 10⁴ beside a spread of 1: only float64, or centring twice, is right to 10⁻⁵."""
    n, seed = draw(st.sampled_from([5, 33, 70])), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    x = (1e4 + rng.standard_normal((3, n))).astype(np.float32)
    x_hat = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    r = 1 / np.sqrt((x_hat**2).mean(-1, keepdims=True) + 1e-5)
    x_hat *= r
    w, b, g = np.ones(n, np.float32), np.zeros(n, np.float32), np.ones((3, n), np.float32)
    g[:, 0] = 3
    x_bar = r * (g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True))
    arrays = [device(a) for a in (x, w, b)]
    with small(draw, n):
        y, saved = gpu.layer_norm.forward(*arrays)
        found = gpu.layer_norm.vjp(device(g), y, *arrays, saved=saved, needs=(True,) * 3)
    assert np.abs(host(y) - x_hat).max() < 1e-5
    assert np.abs(host(found[0]) - x_bar).max() < 1e-5
    assert np.abs(host(found[1]) - (g * x_hat).sum(0)).max() < 1e-4


CHECKS = [layer_norm, rms_norm, add_layer_norm, add_rms_norm, in_pieces, large_mean]
MUTANTS = {
    layer_norm: [
        Mutant("no ε", "keep_dims=True) / n + eps)", "keep_dims=True) / n)"),
        Mutant("padding is centred too", "tl.where(inside, x_ij - mu, 0.0)", "x_ij - mu"),
        Mutant(
            "1/std is saved squared",
            "tl.store(stats + i, r, mask=i < count)",
            "tl.store(stats + i, r * r, mask=i < count)",
        ),
        Mutant("no mean of u", "d -= tl.sum(u, axis=1, keep_dims=True) / n", "d -= 0.0"),
        Mutant(
            "w̄ is of the last tile",
            "w_bar += tl.sum(g_ij * x_hat, axis=0)\n            if",
            "w_bar = tl.sum(g_ij * x_hat, axis=0)\n            if",
        ),
        Mutant(
            "b̄ is a sum of u",
            "b_bar += tl.sum(g_ij, axis=0)\n        if",
            "b_bar += tl.sum(g_ij * w_j, axis=0)\n        if",
        ),
        Mutant(
            "a program takes every other tile", "P * ROWS, num_stages", "2 * P * ROWS, num_stages"
        ),
        Mutant("b̄ is w̄", "_column_sums(parts, P, P,", "_column_sums(parts, 0, P,"),
        Mutant("a program's sums are left out", "(p < P) & (j < n)", "(p < P - 1) & (j < n)"),
        Mutant(
            "the last column is not written",
            "y_ij.to(y.dtype.element_ty), mask=inside",
            "y_ij.to(y.dtype.element_ty), mask=inside & (j < n - 1)",
        ),
    ],
    rms_norm: [
        Mutant(
            "rms_norm is centred",
            "w, None, eps, CENTRED=False)\n        return y",
            "w, None, eps, CENTRED=True)\n        return y",
        ),
    ],
    add_layer_norm: [
        Mutant(
            "the residual has x's stride",
            "i * stride_residual + j, inside",
            "i * stride_x + j, inside",
        ),
        Mutant(
            "the residual is not added", "x_ij += tl.load(residual", "x_ij += 0 * tl.load(residual"
        ),
        Mutant("s̄ is forgotten", "x_bar_ij += tl.load", "x_bar_ij += 0 * tl.load"),
        Mutant(
            "s̄ is scaled",
            "at, mask=inside, other=0.0).to(tl.float32)\n            tl",
            "at, mask=inside, other=0.0).to(tl.float32) * r\n            tl",
        ),
    ],
    in_pieces: [
        Mutant("no ε in pieces", "var + eps", "var"),
        Mutant(
            "n - 1 in the variance",
            "tl.sum(sum_dd, axis=0) / n",
            "tl.sum(sum_dd, axis=0) / (n - 1)",
        ),
        Mutant("no mean of u x̂ in pieces", "x_hat * mean_ux)", "mean_ux)"),
        Mutant("s̄ is forgotten in pieces", "x_bar_j += tl.load", "x_bar_j += 0 * tl.load"),
        Mutant(
            "s ends with the first piece",
            "x_j.to(s.dtype.element_ty), mask=j < n",
            "x_j.to(s.dtype.element_ty), mask=j < N",
        ),
        Mutant(
            "the columns of later blocks",
            "tl.program_id(1) * N + tl.arange(0, N)\n    w_bar",
            "tl.arange(0, N)\n    w_bar",
        ),
    ],
    large_mean: [
        Mutant("centred once", "x_ij - rest, 0.0)", "x_ij, 0.0)"),
        Mutant(
            "the mean's rest is lost",
            "x_ij -= tl.load(stats + count + count",
            "x_ij -= 0 * tl.load(stats + count + count",
        ),
        Mutant(
            "no shift in pieces",
            "mu = tl.sum(first, axis=0) / N",
            "mu = 0.0 * tl.sum(first, axis=0)",
        ),
    ],
}
PLANTED = [
    pytest.param(check, mutant, id=mutant.name) for check in MUTANTS for mutant in MUTANTS[check]
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, norm, examples=12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # some mutants divide by 0
@pytest.mark.parametrize("check, mutant", PLANTED)
def test_mutants_are_killed(check, mutant, tmp_path):
    assert harness.killed(norm, mutant, [check], tmp_path, examples=40)


def test_without_needs_nothing_is_computed():
    x, w = device(np.ones((3, 8), np.float32)), device(np.ones(8, np.float32))
    y, saved = norm.layer_norm.forward(x, w, w)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]:
        found = norm.layer_norm.vjp(x, y, x, w, w, saved=saved, needs=needs)
        assert tuple(bar is not None for bar in found) == needs
    pair, saved = norm.add_rms_norm.forward(x, x, w)
    found = norm.add_rms_norm.vjp((None, x), pair, x, x, w, saved=saved, needs=(True, False, False))
    assert [bar is not None for bar in found] == [True, False, False]


def test_the_same_call_gives_the_same_bits():
    rng = np.random.default_rng(0)
    x, g = (device(rng.standard_normal((40, 33)).astype(np.float32)) for _ in "xg")
    w = device(rng.standard_normal(33).astype(np.float32))
    y, saved = norm.rms_norm.forward(x, w)
    runs = [norm.rms_norm.vjp(g, y, x, w, saved=saved, needs=(True, True)) for _ in range(2)]
    for first, second in zip(*runs):
        assert np.array_equal(host(first), host(second))


X, W = np.ones((3, 8), np.float32), np.ones(8, np.float32)
WRONG = [
    (
        lambda x, w: norm.layer_norm.forward(x.astype(np.int32), w, w),
        TypeError,
        "x has dtype int32",
    ),
    (
        lambda x, w: norm.layer_norm.forward(x, w[:4], w),
        ValueError,
        "w has shape (4,); expected (8,)",
    ),
    (lambda x, w: norm.layer_norm.forward(x, w, w[:4]), ValueError, "b has shape (4,)"),
    (
        lambda x, w: norm.rms_norm.forward(x[:, ::2], w[:4]),
        ValueError,
        "last axis of x has stride 2",
    ),
    (
        lambda x, w: norm.rms_norm.forward(x[:, :4], w[::2]),
        ValueError,
        "last axis of w has stride 2",
    ),
    (lambda x, w: norm.rms_norm.forward(x[:0], w), ValueError, "at least one element"),
    (lambda x, w: norm.rms_norm.forward(x, w, eps=-1), ValueError, "eps is -1"),
    (lambda x, w: norm.rms_norm.forward(x, w, eps=float("nan")), ValueError, "eps is nan"),
    (lambda x, w: norm.add_rms_norm.forward(x, x[:2], w), ValueError, "residual has shape (2, 8)"),
    (
        lambda x, w: norm.add_rms_norm.forward(x, x.astype(np.float16), w),
        TypeError,
        "residual has dtype float16",
    ),
    (
        lambda x, w: norm.rms_norm.vjp(x[:2], x, x, w, saved=(x[:1],), needs=(True, True)),
        ValueError,
        "g has shape (2, 8)",
    ),
    (
        lambda x, w: norm.rms_norm.vjp(x, x, x, w, saved=(x,), needs=(True, True)),
        ValueError,
        "saved stats has shape",
    ),
    (lambda x, w: norm.rms_norm.forward(x.tolist(), w), TypeError, "x is a list"),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error) as raised:
        call(device(X), device(W))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
