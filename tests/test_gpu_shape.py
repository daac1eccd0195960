"""The kernels of kernels/gpu/shape.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, device, dtypes, host, normal, rounded, spaced
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import shape, tuning

from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.ops import TABLE
from tinygrad_llm.tensor import apply

widths = st.sampled_from([1, 8, 13, 16, 24])


def small_tiles(draw):
    """Several tiles to a row, several pieces to sort."""
    rows = st.sampled_from([1, 2, 4])
    tile = {"BLOCK": draw(st.sampled_from([8, 16])), "num_warps": 4}
    return tuning.using(
        sort={"PIECE": draw(st.sampled_from([8, 16])), "STEP": 4, "num_warps": 4},
        embedding={**tile, "ROWS": draw(rows)},
        scatter_add={**tile, "ROWS": draw(rows)},
    )


def positions(draw, low, high):
    """Ids from low to high - 1, of which some come often: of up to three axes, and perhaps part of
    an array with longer rows.
    """
    axes = draw(st.sampled_from([(), (1,), (17,), (3, 7), (2, 2, 5)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    t = rng.integers(low, high, axes)
    if axes:
        t[rng.random(axes) < draw(st.sampled_from([0, 0.5, 0.95]))] = high - 1
        t = spaced(draw, t)
    return t.astype(draw(st.sampled_from(["int32", "int64"])), order="K", copy=False)


def embedding(gpu, draw):
    dtype, v, c = draw(dtypes), draw(st.sampled_from([1, 2, 7])), draw(widths)
    w, t = spaced(draw, rounded(normal(draw, v, c), dtype)), positions(draw, 0, v)
    with small_tiles(draw):
        reference = lambda w, t: F.embedding(t, w)  # noqa: E731
        agrees(gpu.embedding, reference, [w, t], dtype, g=normal(draw, *t.shape, c))


def scatter_add(gpu, draw):
    dtype, rows, c = draw(dtypes), draw(st.sampled_from([1, 2, 7])), draw(widths)
    t = positions(draw, -1, rows + 2)  # ids out of range add nothing, there as here
    x = rounded(normal(draw, *t.shape, c), dtype)
    x = spaced(draw, x) if t.ndim < 2 else x
    add = lambda x, t: apply(TABLE["scatter_add"], x, t, rows=rows)  # noqa: E731
    with small_tiles(draw):
        y, saved = gpu.scatter_add.forward(device(x), device(t), rows=rows)
        (expected,) = harness.truth(add, [x, t], dtype)
        harness.close(y, expected)
        inside = rounded(normal(draw, rows, c), dtype)
        x_bar, none = gpu.scatter_add.vjp(
            device(inside), y, device(x), device(t), rows=rows, saved=saved, needs=(True, False)
        )
    assert none is None
    there = (t >= 0) & (t < rows)
    assert np.array_equal(host(x_bar)[there], inside[t[there]])


def long_runs(gpu, draw):
    """One id has several whole chunks of positions."""
    n, c = draw(st.integers(100, 130)), draw(st.sampled_from([3, 16]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    t = np.where(rng.random(n) < 0.1, rng.integers(0, 5, n), 3)
    x = rounded(normal(draw, n, c), "float32")
    add = lambda x, t: apply(TABLE["scatter_add"], x, t, rows=5)  # noqa: E731
    tile = {"BLOCK": 16, "ROWS": 8, "num_warps": 4}
    with tuning.using(sort={"PIECE": 32, "STEP": 16, "num_warps": 4}, scatter_add=tile):
        y, _ = gpu.scatter_add.forward(device(x), device(t), rows=5)
    harness.close(y, harness.truth(add, [x, t], "float32")[0])


CHECKS = [embedding, scatter_add, long_runs]
MUTANTS = [
    Mutant(
        "the gap between the rows of ids is read",
        "tl.load(t + i // per_row * stride_t + i % per_row, mask=i < n, other=0)",
        "tl.load(t + i, mask=i < n, other=0)",
    ),
    Mutant(
        "the gap between the rows of ids is sorted",
        "at = i.to(tl.int64) // per_row * stride_t + i % per_row",
        "at = i",
    ),
    Mutant(
        "the last column is not looked up",
        "mask=inside & (j < c), other=float",
        "mask=inside & (j < c - 1), other=float",
    ),
    Mutant("rows of the table lie c apart", "(t_i * stride_w)", "(t_i * c)"),
    Mutant("the last pieces are not merged", "while length < n:", "while 2 * length < n:"),
    Mutant("only the last rows count", "total += tl.sum(x_i", "total = tl.sum(x_i"),
    Mutant("rows of x lie c apart", "x + (i * stride)[:, None]", "x + (i * c)[:, None]"),
    Mutant("the last row of a run is left out", "k < end)[:, None]", "k < end - 1)[:, None]"),
    Mutant(
        "the last whole chunk is left out",
        "for _ in range(first, last):",
        "for _ in range(first, last - 1):",
    ),
    Mutant(
        "a run within a chunk counts twice",
        "tl.maximum(first, last) * CHUNK)",
        "last * CHUNK)",
    ),
    Mutant("the second chunk is the first", "        sums_j += c\n", ""),
    Mutant(
        "ids out of range are the last row",
        "(i < n), t_i, v)",
        "(i < n), t_i, v - (i < n).to(tl.int64))",
    ),
    Mutant(
        "the last column is not added up",
        "total.to(y.dtype.element_ty), mask=j < c)",
        "total.to(y.dtype.element_ty), mask=j < c - 1)",
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, shape, examples=15)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    assert harness.killed(shape, mutant, CHECKS, tmp_path)


# --- at the edges ---------------------------------------------------------------------------------


def test_the_sizes_that_are_shipped():
    rng = np.random.default_rng(0)
    t = np.where(rng.random(1100) < 0.5, 3, rng.integers(0, 50, 1100))
    x = rng.integers(-8, 9, (1100, 3)).astype(np.float32)  # their sums are exact
    expected = np.zeros((50, 3), np.float32)
    np.add.at(expected, t, x)
    found, _ = shape.scatter_add.forward(device(x), device(t), rows=50)
    assert np.array_equal(host(found), expected)


def test_an_id_that_is_no_row_gives_nan_and_gets_no_gradient():
    w, t = device(np.ones((2, 3), np.float32)), device(np.array([0, 2, -1, 2**33, 1]))
    y, saved = shape.embedding.forward(w, t)
    assert np.isnan(host(y)[1:4]).all()
    assert np.array_equal(host(y)[[0, 4]], np.ones((2, 3)))
    g = device(np.ones((5, 3), np.float32))
    w_bar, _ = shape.embedding.vjp(g, y, w, t, saved=saved, needs=(True, False))
    assert np.array_equal(host(w_bar), np.ones((2, 3)))


def test_the_same_call_gives_the_same_bits():
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((200, 5)).astype(np.float32), rng.integers(0, 4, 200)
    first, second = (
        host(shape.scatter_add.forward(device(x), device(t), rows=4)[0]) for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_gradients_that_are_not_needed():
    w, t = device(np.ones((2, 3), np.float32)), device(np.zeros(1, np.int64))
    g = device(np.ones((1, 3), np.float32))
    found = shape.embedding.vjp(g, None, w, t, saved=(), needs=(False, False))
    assert found == (None, None)
    found = shape.scatter_add.vjp(w, None, g, t, rows=2, saved=(), needs=(False, False))
    assert found == (None, None)


W, T, X = np.ones((4, 3), np.float32), np.zeros(2, np.int64), np.ones((2, 3), np.float32)
look_up, add_up = shape.embedding.forward, shape.scatter_add.forward


def vjp(g, w, t):
    return shape.embedding.vjp(g, None, w, t, saved=(), needs=(True, False))


BAD = [
    (lambda f: f(look_up, W.astype(int), T), TypeError, "w has dtype int64; expected float32"),
    (lambda f: f(look_up, W, T.astype(np.float32)), TypeError, "t has dtype float32; expected int"),
    (lambda f: f(look_up, W[0], T), ValueError, "w has shape (3,); expected 2 axes"),
    (lambda f: f(look_up, W[:0], T), ValueError, "w has shape (0, 3); expected at least one"),
    (lambda f: f(look_up, W, T[:0]), ValueError, "t has shape (0,); expected at least one"),
    (lambda f: f(look_up, W.T, T), ValueError, "the last axis of w has stride 3; expected 1"),
    (lambda f: f(look_up, W, np.zeros(4, int)[::2]), ValueError, "the last axis of t has stride 2"),
    (lambda f: f(look_up, W, np.zeros((3, 4, 2), int)[:, :3]), ValueError, "not evenly spaced"),
    (lambda f: f(add_up, X, T[:1], rows=4), ValueError, "x has shape (2, 3); expected (1,) and"),
    (lambda f: f(add_up, X, T, rows=0), ValueError, "rows is 0; expected an integer from 1"),
    (lambda f: f(add_up, X[:, ::2], T, rows=4), ValueError, "the last axis of x has stride 2"),
    (lambda f: f(vjp, X.astype(np.float16), W, T), TypeError, "g has dtype float16; expected fl"),
    (lambda f: f(vjp, X[:, :2].copy(), W, T), ValueError, "g has shape (2, 2); expected (..., 3)"),
    (lambda f: f(vjp, X[:1], W, T), ValueError, "g has shape (1, 3); expected (2,) and an axis"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_refused_in_one_line(call, error, message):
    with pytest.raises(error) as found:
        call(lambda f, *arrays, **attributes: f(*map(device, arrays), **attributes))
    assert message in str(found.value)
    assert "\n" not in str(found.value)
