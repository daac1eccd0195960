"""The kernels of kernels/gpu/reduce.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, device, dtypes, host, normal, rounded, spaced
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import reduce, tuning

from tinygrad_llm import backend
from tinygrad_llm import functional as F  # noqa: N812

shapes = st.sampled_from([(1, 1), (3, 5), (2, 3, 33), (7, 40), (4, 70)])


def small(draw, n):
    """Tiles that make several programs; rows in registers, or in pieces."""
    N = draw(st.sampled_from([1 << (n - 1).bit_length(), 16]))
    tile = {"ROWS": draw(st.sampled_from([1, 2, 4])), "N": N, "num_warps": 1}
    names = "softmax", "softmax vjp", "logsumexp", "logsumexp vjp"
    return tuning.using(**dict.fromkeys(names, tile))


def numbers(draw):
    """dtype, x and g: ordinary numbers, large ones, and some that are -inf."""
    dtype, shape = draw(dtypes), draw(shapes)
    x = normal(draw, *shape, scale=draw(st.sampled_from([1, 30])))
    x += draw(st.sampled_from([0, 1000]))
    return dtype, spaced(draw, rounded(x, dtype)), normal(draw, *shape)


def softmax(gpu, draw):
    dtype, x, g = numbers(draw)
    axis = draw(st.sampled_from([-1, x.ndim - 1]))
    with small(draw, x.shape[-1]):
        agrees(gpu.softmax, F.softmax, [x], dtype, g=g, draw=draw, axis=axis)


def log_softmax(gpu, draw):
    dtype, x, g = numbers(draw)
    with small(draw, x.shape[-1]):
        agrees(gpu.log_softmax, F.log_softmax, [x], dtype, g=g, draw=draw)


def logsumexp(gpu, draw):
    dtype, x, g = numbers(draw)
    keepdims = draw(st.booleans())
    g = g[..., :1] if keepdims else g[..., 0]
    with small(draw, x.shape[-1]):
        reference = lambda x: F.logsumexp(x, keepdims=keepdims)  # noqa: E731
        agrees(
            gpu.logsumexp,
            reference,
            [x],
            dtype,
            g=g,
            draw=draw if keepdims else None,
            keepdims=keepdims,
        )


def infinities(gpu, draw):
    """-inf, inf and NaN give what the op gives."""
    kinds = st.sampled_from([0.0, 1.0, 200.0, -np.inf, -np.inf, -np.inf])
    rare = st.sampled_from([1.0, 1.0, 1.0, np.inf, np.nan])
    n = draw(st.sampled_from([1, 3, 20, 40]))
    x = np.array([[draw(kinds) for _ in range(n)] for _ in range(3)] + [[-np.inf] * n])
    x[0, draw(st.integers(0, n - 1))] = draw(rare)
    x = x.astype(np.float32)
    for name in ("softmax", "log_softmax", "logsumexp"):
        with backend.using(backend.MATHS), np.errstate(all="ignore"), small(draw, n):
            expected = getattr(F, name)(x).data
            found, _ = getattr(gpu, name).forward(device(x))
            np.testing.assert_allclose(host(found), expected, rtol=1e-6, atol=1e-37)


CHECKS = [softmax, log_softmax, logsumexp, infinities]
MUTANTS = {
    softmax: [
        Mutant(
            "the sum has one term too few",
            "total = tl.sum(e, axis=1",
            "total = tl.sum(tl.where(j > 0, e, 0.0), axis=1",
        ),
        Mutant(
            "the maximum is not subtracted", "x_ij - tl.max(x_ij, axis=1, keep_dims=True)", "x_ij"
        ),
        Mutant(
            "the last column is not written",
            "tl.store(x_bar + i * n + j, x_bar_ij, mask=inside)",
            "tl.store(x_bar + i * n + j, x_bar_ij, mask=inside & (j < n - 1))",
        ),
        Mutant("an earlier sum is not made smaller", "total * e + 1.0", "total + 1.0"),
        Mutant("the new maximum is not counted", "total * e + 1.0", "total * e"),
        Mutant(
            "lanes have one maximum",
            "total_lane * tl.exp(m_lane - m), axis=0)\n    for",
            "total_lane, axis=0)\n    for",
        ),
        Mutant(
            "pieces are put side by side",
            'start + j, n, "evict_last"',
            'start // 2 + j, n, "evict_last"',
        ),
        Mutant("the sum is of the last piece", "total_lane += _weight", "total_lane = _weight"),
        Mutant("rows of g have y's stride", "g += i * stride_g", "g += i * stride_y"),
    ],
    log_softmax: [
        Mutant(
            "the weights are softmax's", "return g_ij if LOG else", "return g_ij * y_ij if LOG else"
        ),
        Mutant("y for e^y", "g_ij - tl.exp(y_ij) * total if LOG", "g_ij - y_ij * total if LOG"),
        Mutant(
            "no logarithm",
            "shifted - tl.log(total) if LOG else tl.exp",
            "shifted - total if LOG else tl.exp",
        ),
    ],
    logsumexp: [
        Mutant(
            "the maximum is not added again",
            "y_i = m + tl.log(tl.sum(tl.exp",
            "y_i = tl.log(tl.sum(tl.exp",
        ),
        Mutant("only the first piece", "j += tl.program_id(1) * N", "j += 0"),
        Mutant(
            "the rounded y is saved",
            "y_i, mask=i < count)\n\n",
            "y_i.to(y.dtype.element_ty).to(tl.float16), mask=i < count)\n\n",
        ),
        Mutant(
            "g is of the next row", "g + i * stride_g, mask", "g + (i + 1) % count * stride_g, mask"
        ),
    ],
    infinities: [
        Mutant("inf is finite", 'tl.abs(m) < float("inf")', 'm < float("inf")'),
        Mutant("-inf - -inf", "tl.where(x_j == m, 0.0, x_j - m)", "x_j - m"),
        Mutant(
            "logsumexp of -inf in pieces",
            "m = _finite(tl.max(m_lane, axis=0))",
            "m = tl.max(m_lane, axis=0)",
        ),
    ],
}
PLANTED = [
    pytest.param(check, mutant, id=mutant.name) for check in MUTANTS for mutant in MUTANTS[check]
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # inf - inf, as with the ops


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, reduce, examples=20)


@pytest.mark.parametrize("check, mutant", PLANTED)
def test_mutants_are_killed(check, mutant, tmp_path):
    assert harness.killed(reduce, mutant, [check], tmp_path, examples=40)


@pytest.mark.parametrize("arrays", [1, 2])
@pytest.mark.parametrize("n", [1, 50, 64, 768, 4096, 16384, 16385, 32768, 32769, 50257])
def test_a_tile_is_what_a_multiprocessor_holds(n, arrays):
    for tile in [reduce.tile(n, arrays), *reduce.tiles(n, arrays)]:
        each = tile["ROWS"] * tile["N"] / (32 * tile["num_warps"])
        assert tile["num_warps"] in (1, 2, 4, 8, 16, 32)
        assert each <= 64 // arrays, tile
        assert tile["N"] >= n or tile["ROWS"] == 1


def test_a_row_that_is_wider_than_the_registers():
    x = np.random.default_rng(0).standard_normal((2, 33000)).astype(np.float32)
    y, saved = reduce.log_softmax.forward(device(x))
    shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert saved == ()
    np.testing.assert_allclose(host(y), expected, rtol=1e-6)


X = np.ones((3, 8), np.float32)
WRONG = [
    (lambda x: reduce.softmax.forward(x, axis=0), ValueError, "axis is 0; expected -1"),
    (lambda x: reduce.logsumexp.forward(x, axis=None), TypeError, "axis is None"),
    (lambda x: reduce.softmax.forward(x.astype(np.int64)), TypeError, "x has dtype int64"),
    (lambda x: reduce.log_softmax.forward(x[:, ::2]), ValueError, "last axis of x has stride 2"),
    (lambda x: reduce.softmax.forward(x[:, :0]), ValueError, "at least one element"),
    (
        lambda x: reduce.softmax.vjp(x[:2], x, x, saved=(), needs=(True,)),
        ValueError,
        "g has shape (2, 8)",
    ),
    (
        lambda x: reduce.logsumexp.vjp(x, x, x, saved=(x[0],), needs=(True,)),
        ValueError,
        "g has shape (3, 8); expected (3,)",
    ),
    (
        lambda x: reduce.logsumexp.vjp(x[:, 0], x, x, saved=(x[0],), needs=(True,)),
        ValueError,
        "saved y has shape (8,)",
    ),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error) as raised:
        call(device(X))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
