"""The kernels of kernels/gpu/loss.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, close, device, dtypes, host, normal, rounded, spaced, truth
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from tinygrad_llm.kernels.gpu import loss, tuning

from tinygrad_llm import functional as F  # noqa: N812

ids = st.sampled_from(["int32", "int64"])
scales = st.sampled_from([1, 30])


def small_tiles(draw):
    """Several tiles to a row, and several rows to a program."""
    tile = {"BLOCK": draw(st.sampled_from([16, 32])), "num_warps": 4}
    forward, vjp = ({**tile, "ROWS": draw(st.sampled_from([1, 2]))} for _ in range(2))
    return tuning.using(cross_entropy_forward=forward, cross_entropy_vjp=vjp)


def targets(draw, n, v, ignore_index):
    """Of n rows, of which at least one counts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    t = rng.integers(0, v, n)
    t[rng.random(n) < draw(st.sampled_from([0, 0.5]))] = ignore_index
    t[draw(st.integers(0, n - 1))] = (ignore_index + 1) % v
    return t.astype(draw(ids))


def size(draw):
    return draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 13, 16, 32, 50, 64]))


# --- against the maths ----------------------------------------------------------------------------


def cross_entropy(gpu, draw):
    dtype, (n, v) = draw(dtypes), size(draw)
    v, ignore_index = max(v, 2), draw(st.sampled_from([-100, 1]))
    x = spaced(draw, rounded(normal(draw, n, v, scale=draw(scales)), dtype))
    t = targets(draw, n, v, ignore_index)
    reference = lambda x, t: F.cross_entropy(x, t, ignore_index)  # noqa: E731
    with small_tiles(draw):
        agrees(
            gpu.cross_entropy, reference, [x, t], dtype, g=normal(draw), ignore_index=ignore_index
        )


def cross_entropy_in_place(gpu, draw):
    dtype, (n, v) = draw(st.sampled_from(["float32", "bfloat16"])), size(draw)
    x = spaced(draw, rounded(normal(draw, n, v, scale=draw(scales)), dtype))
    t = targets(draw, n, v, -100)
    g = draw(st.sampled_from([1, 1.0, np.ones((), np.float32), 2.5, np.full((), 2.5, np.float32)]))
    there, width = device(x.base.copy()), v
    x_there, t = there[:, :width], device(t)
    y, x_bar, _ = truth(F.cross_entropy, [x, host(t)], dtype, np.asarray(g, np.float64))
    with small_tiles(draw):
        found, saved = gpu.cross_entropy.forward(x_there, t, in_place=True)
        close(found, y)
        g = g if isinstance(g, int | float) else device(g)
        options = {"in_place": True, "saved": saved, "needs": (True, False)}
        found, none = gpu.cross_entropy.vjp(g, found, x_there, t, **options)
    close(found, x_bar)
    assert none is None
    assert np.shares_memory(found, x_there) if not harness.ON_GPU else found.data == x_there.data
    assert np.array_equal(host(there)[:, v:], x.base[:, v:]), "written beyond the rows"


def linear_cross_entropy(gpu, draw):
    dtype, (n, v), c = draw(dtypes), size(draw), draw(st.sampled_from([8, 13]))
    h, w = rounded(normal(draw, n, c), dtype), rounded(normal(draw, v, c), dtype)
    t = targets(draw, n, v, -100)
    reference = lambda h, w, t: F.cross_entropy(h @ w.mT, t)  # noqa: E731
    with small_tiles(draw):
        chunk = draw(st.sampled_from([None, 1, 3]))
        agrees(gpu.linear_cross_entropy, reference, [h, w, t], dtype, g=normal(draw), chunk=chunk)


CHECKS = [cross_entropy, cross_entropy_in_place, linear_cross_entropy]
MUTANTS = [
    Mutant("the sum is not rescaled to the new maximum", "s * tl.exp(m - M)[:, None]", "s"),
    Mutant(
        "the last column is not summed",
        "K_i[:, None] & (whole + j < v), m, s",
        "K_i[:, None] & (whole + j < v - 1), m, s",
    ),
    Mutant(
        "the last column's gradient is not written",
        "_write_gradient(x_j, x_bar_j, there & (j < v),",
        "_write_gradient(x_j, x_bar_j, there & (j < v - 1),",
    ),
    Mutant(
        "in place, the tail is not written",
        "x_j, mask = x_i + whole + j, there & (whole + j < v)",
        "x_j, mask = x_i + whole + j, there & (j < 0)",
    ),
    Mutant("the target is not subtracted", "K_i[:, None], P - H, 0.0", "K_i[:, None], P, 0.0"),
    Mutant("ignored rows have a gradient", "tl.where(K_i[:, None], P - H, 0.0)", "(P - H)"),
    Mutant("ignored rows have a loss", "tl.where(K_i, L_i - x_t, 0.0)", "L_i - x_t"),
    Mutant(
        "all rows count", "((i < n) & (t_i != ignore_index)).to(tl.int32)", "(i < n).to(tl.int32)"
    ),
    Mutant(
        "rows that do not exist count",
        "((i < n) & (t_i != ignore_index)).to(tl.int32)",
        "(t_i != ignore_index).to(tl.int32)",
    ),
    Mutant("g is forgotten", "tl.load(g) / tl.load(N), (i < n)", "1 / tl.load(N), (i < n)"),
    Mutant("in place, not divided by N", "else 1.0 / tl.load(N)", "else 1.0"),
    Mutant("in place, g is forgotten", ".to(tl.float32) * factor", ".to(tl.float32)"),
    Mutant("rows lie v apart", "x_i, j = x + (i * stride)[:", "x_i, j = x + (i * v)[:"),
]
MUTANTS_OF_CHUNKS = [
    Mutant("the last chunk's gradient of w", "accumulate=start > 0", "accumulate=False"),
    Mutant("not divided by N", "(tl.load(N) * UNIT)", "UNIT"),
    Mutant("float16's factor stays in", "(tl.load(N) * UNIT)", "tl.load(N)"),
    Mutant("the first chunk's targets", "X, t[part],", "X, t,"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, loss, examples=20)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    assert harness.killed(loss, mutant, CHECKS, tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS_OF_CHUNKS, ids=str)
def test_mutants_of_chunks_are_killed(mutant, tmp_path):
    assert harness.killed(loss, mutant, [linear_cross_entropy], tmp_path)


# --- at the edges ---------------------------------------------------------------------------------


def both(x, t, **attributes):
    """(loss, gradient) in NumPy."""
    x, t = device(np.asarray(x, np.float32)), device(np.asarray(t))
    y, saved = loss.cross_entropy.forward(x, t, **attributes)
    x_bar, _ = loss.cross_entropy.vjp(1.0, y, x, t, saved=saved, needs=(True, False), **attributes)
    return host(y), host(x_bar)


def test_the_loss_is_float32():
    x, t = device(rounded(np.ones((2, 3)), "bfloat16")), device(np.zeros(2, np.int64))
    assert host(loss.cross_entropy.forward(x, t)[0]).dtype == np.float32


@pytest.mark.parametrize("in_place", [False, True])
def test_no_row_counts(in_place):
    with np.errstate(all="ignore"):  # 0 / 0, as in the op
        y, x_bar = both(np.ones((2, 3)), [-100, -100], in_place=in_place)
    assert np.isnan(y)
    assert np.isnan(x_bar).all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("target", [3, -1, 2**40])
def test_a_target_out_of_range_makes_the_loss_nan(target, in_place):
    y, x_bar = both(np.ones((2, 3)), [0, target], in_place=in_place)
    assert np.isnan(y)
    assert np.isfinite(x_bar[0]).all()
    assert np.isnan(x_bar[1]).all()


def test_logits_of_minus_infinity_have_no_gradient():
    x = np.full((1, 40), -np.inf)
    x[0, [20, 39]] = 1
    tile = {"ROWS": 1, "BLOCK": 16, "num_warps": 4}
    with tuning.using(cross_entropy_forward=tile, cross_entropy_vjp=tile):
        y, x_bar = both(x, [39])
    assert np.isclose(y, np.log(2))
    assert np.allclose(x_bar[0, [20, 39]], [0.5, -0.5])
    assert np.count_nonzero(x_bar) == 2


def test_the_loss_alone():
    h, w = rounded(np.eye(3), "float32"), rounded(np.ones((5, 3)), "float32")
    arguments = device(h), device(w), device(np.zeros(3, np.int32))
    y, saved = loss.linear_cross_entropy.forward(*arguments, gradients=False)
    assert np.isclose(host(y), np.log(5))
    with pytest.raises(ValueError, match="gradients=False"):
        loss.linear_cross_entropy.vjp(
            1.0, y, *arguments, gradients=False, saved=saved, needs=(True, True, False)
        )


def test_gradients_that_are_not_needed():
    x, t = device(rounded(np.ones((2, 3)), "float32")), device(np.zeros(2, np.int32))
    y, saved = loss.cross_entropy.forward(x, t)
    assert loss.cross_entropy.vjp(1.0, y, x, t, saved=saved, needs=(False, False)) == (None, None)
    y, saved = loss.linear_cross_entropy.forward(x, x, t)
    found = loss.linear_cross_entropy.vjp(1.0, y, x, x, t, saved=saved, needs=(False, True, False))
    assert [f is None for f in found] == [True, False, True]


def test_float16_keeps_small_gradients_for_a_large_g():
    """Rows that are nearly sure, columns that are never likely, and a loss scale as g."""
    h, w = np.zeros((4, 16)), 0.1 * np.random.default_rng(0).standard_normal((60, 16))
    h[:, :4], w[:4] = 4 * np.eye(4), 4 * np.eye(4, 16)  # targets' logits 16: the others' P 1e-7
    h, w = rounded(h, "float16"), rounded(w, "float16")
    t, g = np.arange(4), np.full((), 2.0**24, np.float32)
    y, saved = loss.linear_cross_entropy.forward(device(h), device(w), device(t))
    found = loss.linear_cross_entropy.vjp(
        device(g), y, device(h), device(w), device(t), saved=saved, needs=(True, True, False)
    )
    h, w = h.astype(np.float64), w.astype(np.float64)
    e = np.exp(h @ w.T)
    X_bar = (e / e.sum(1, keepdims=True) - np.eye(4, 60)) * g / 4
    h_bar, w_bar = (host(x).astype(np.float64) for x in found[:2])
    for actual, value in ((h_bar[:, 4:], X_bar @ w[:, 4:]), (w_bar[4:], X_bar.T[4:] @ h)):
        error = np.abs(actual - value)  # of what the others' P make
        assert (error < 0.02 * np.abs(value).max(1, keepdims=True)).all()


def test_chunks_are_of_equal_size_and_not_too_short():
    assert loss._chunk(65536, 50304, 2) == 9472  # 7 chunks of under 1 GiB
    assert loss._chunk(65536, 262144, 4) == 2048
    assert loss._chunk(100, 50304, 2) == 128


X, T = np.ones((2, 3), np.float32), np.zeros(2, np.int64)
BAD = [
    (lambda f: f(X.astype(np.float64), T), TypeError, "x has dtype float64"),
    (lambda f: f(X, T.astype(np.float32)), TypeError, "t has dtype float32"),
    (lambda f: f(X[0], T), ValueError, "x has shape (3,); expected 2 axes"),
    (lambda f: f(X, T[:1]), ValueError, "t has shape (1,); expected (2,)"),
    (lambda f: f(X[:0], T[:0]), ValueError, "expected at least one element"),
    (lambda f: f(X.T, np.zeros(3, np.int64)), ValueError, "the last axis of x has stride 3"),
    (lambda f: f(X, np.zeros(4, np.int64)[::2]), ValueError, "the last axis of t has stride 2"),
    (lambda f: f(X.astype(np.float16), T, in_place=True), TypeError, "float32 or bfloat16"),
    (
        lambda f: f(as_strided(X.copy(), (2, 3), (4, 4)), T, in_place=True),
        ValueError,
        "may overlap",
    ),
]
BAD_FUSED = [
    (lambda f: f(X, X.astype(np.float16), T), TypeError, "w has dtype float16; expected float32"),
    (lambda f: f(X, X[:, :2].copy(), T), ValueError, "w has shape (2, 2); expected (2, 3)"),
    (lambda f: f(X, X, T[:1]), ValueError, "t has shape (1,); expected (2,)"),
    (lambda f: f(X, X, T, chunk=0), ValueError, "chunk is 0"),
    (lambda f: f(X.T, np.ones((3, 2), np.float32), np.zeros(3, np.int32)), ValueError, "h has st"),
    (lambda f: f(X, X[:0], T), ValueError, "w has shape (0, 3); expected at least one element"),
]
CASES = [
    *((loss.cross_entropy, *case) for case in BAD),
    *((loss.linear_cross_entropy, *case) for case in BAD_FUSED),
]


@pytest.mark.parametrize("kernel, call, error, message", CASES)
def test_bad_input_is_refused_in_one_line(kernel, call, error, message):
    with pytest.raises(error) as found:
        call(lambda *arrays, **attributes: kernel.forward(*map(device, arrays), **attributes))
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_gradient_that_is_no_number_is_refused():
    x, t = device(X.copy()), device(T)
    y, saved = loss.cross_entropy.forward(x, t)
    with pytest.raises(ValueError, match="g has shape"):
        loss.cross_entropy.vjp(x, y, x, t, saved=saved, needs=(True, False))
