"""kernels/gpu/product.py and linear.py, with tiles so small that every product takes several."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, close, device, dtypes, normal, rounded, spaced
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import driver, linear, lora, product, tuning
from triton.tools.tensor_descriptor import TensorDescriptor

from tinygrad_llm import functional as F  # noqa: N812

ACTIVATIONS = {
    None: lambda u: u,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, "tanh"),
    "silu": F.silu,
}
BATCHES = [
    ((), ()),
    ((2,), (2,)),
    ((2, 2), ()),
    ((2, 1), (1, 2)),
    ((), (2,)),
    ((3,), (1,)),
    ((2, 2), (2,)),
    ((2, 2), (2, 1)),
]


# --- what is drawn --------------------------------------------------------------------------------


@contextmanager
def small_tiles(draw, **fixed):
    """Tiles of 16 and 32, in parts or not, on a GPU of two multiprocessors."""
    config = {size: draw(st.sampled_from([32, 16])) for size in ("BM", "BN", "BK")}
    config["GROUP"] = draw(st.sampled_from([2, 1]))
    config["SPLITS"] = draw(st.sampled_from([1, 3]))
    config["HALVES"] = config["BN"] == 32 and draw(st.sampled_from([True, False]))
    config["TMA"] = driver.capability() >= 90 and draw(st.sampled_from([True, False]))
    config["FLATTEN"] = draw(st.booleans())
    config["PROGRAMS"] = draw(st.sampled_from([1, 0]))
    config |= dict(num_warps=4, num_stages=2) | fixed
    with tuning.using(product=config), mock.patch.object(driver, "multiprocessors", lambda: 2):
        yield


def sizes(draw, count):
    """So many lengths of axes: all of them good for descriptors, or none of them for sure."""
    lengths = draw(st.sampled_from([[40, 24, 8], [33, 17, 3, 1]]))
    return [draw(st.sampled_from(lengths)) for _ in range(count)]


def matrices(draw, dtype, *shape):
    """Contiguous along either of the last two axes; rows perhaps further apart."""
    scale = shape[-1] ** -0.5
    if draw(st.booleans()):
        return spaced(draw, rounded(normal(draw, *shape, scale=scale), dtype))
    *batch, n, m = shape
    return spaced(draw, rounded(normal(draw, *batch, m, n, scale=scale), dtype)).swapaxes(-1, -2)


def row_arrays(draw, dtype, *shape):
    return spaced(draw, rounded(normal(draw, *shape), dtype))


# --- checks ---------------------------------------------------------------------------------------


def matmul(gpu, draw):
    dtype, (n, k, m) = draw(dtypes), sizes(draw, 3)
    in_front, in_front_of_b = draw(st.sampled_from(BATCHES))
    a = matrices(draw, dtype, *in_front, n, k)
    b = matrices(draw, dtype, *in_front_of_b, k, m)
    batch = np.broadcast_shapes(in_front, in_front_of_b)
    with small_tiles(draw):
        agrees(gpu.matmul, lambda a, b: a @ b, [a, b], dtype, g=normal(draw, *batch, n, m))


def matmul_adds(gpu, draw):
    """`accumulate` and `into`, on what is there already, in its own dtype."""
    dtype, kept, (n, k, m) = draw(dtypes), draw(dtypes), sizes(draw, 3)
    batch = draw(st.sampled_from([(), (2,)]))
    a, b = matrices(draw, dtype, *batch, n, k), matrices(draw, dtype, k, m)
    g = rounded(normal(draw, *batch, n, m), dtype)
    before = [rounded(normal(draw, *x.shape), kept) for x in (g, a, b)]
    out, *into = [device(x.copy()) for x in before]
    a_there, b_there = device(a), device(b)
    with small_tiles(draw):
        y, saved = gpu.matmul.forward(a_there, b_there, out=out, accumulate=True)
        found = gpu.matmul.vjp(
            device(g), y, a_there, b_there, saved=saved, needs=(True, True), into=tuple(into)
        )
    wide = [x.astype(np.float64) for x in (a, b)]
    expected = harness.truth(lambda a, b: a @ b, wide, dtype, g.astype(np.float64))
    for actual, target, (value, unit), old in zip((y, *found), (out, *into), expected, before):
        assert actual is target
        close(actual, (value + old.astype(np.float64), unit))


def linear_layer(gpu, draw):
    dtype, (n, k, m) = draw(dtypes), sizes(draw, 3)
    batch = draw(st.sampled_from([(n,), (2, n), ()]))
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    arrays = [row_arrays(draw, dtype, *batch, k), matrices(draw, dtype, m, k)]
    arrays += [rounded(normal(draw, m), dtype), row_arrays(draw, dtype, *batch, m)]
    arrays = arrays[: draw(st.sampled_from([4, 3, 2]))]

    def reference(x, w, b=None, residual=None):
        y = ACTIVATIONS[activation](F.linear(x, w, b))
        return y if residual is None else y + residual

    g = normal(draw, *batch, m)
    with small_tiles(draw):
        agrees(gpu.linear, reference, arrays, dtype, g=g, activation=activation)


def linear_adds(gpu, draw):
    """Gradients of w and b are added to float32 arrays, or those of b alone are made."""
    dtype, (n, k, m) = draw(dtypes), sizes(draw, 3)
    x, w, b = row_arrays(draw, dtype, n, k), matrices(draw, dtype, m, k), np.zeros(m)
    b, g = rounded(b, dtype), rounded(normal(draw, n, m), dtype)
    before = [normal(draw, *s).astype(np.float32) for s in ((n, k), (m, k), (m,))]
    given = draw(st.sampled_from([(1, 1, 1), (0, 0, 1), (0, 1, 0)]))
    into = tuple(device(a.copy()) if there else None for a, there in zip(before, given))
    needs = draw(st.sampled_from([(True, True, True), (False, False, True), (False, True, True)]))
    on_device = [device(a) for a in (x, w, b)]
    with small_tiles(draw, SPLITS=draw(st.sampled_from([1, 3]))):
        y, saved = gpu.linear.forward(*on_device)
        found = gpu.linear.vjp(device(g), y, *on_device, saved=saved, needs=needs, into=into)
    wide = [a.astype(np.float64) for a in (x, w, b)]
    _, *expected = harness.truth(F.linear, wide, dtype, g.astype(np.float64))
    for need, actual, target, (value, unit), old in zip(needs, found, into, expected, before):
        if not need:
            assert actual is None
        elif target is None:
            close(actual, (value, unit))
        else:
            assert actual is target
            close(actual, (value + old, unit))


def mlp(gpu, draw):
    dtype, (n, k, hidden, m) = draw(dtypes), sizes(draw, 4)
    activation = draw(st.sampled_from(list(ACTIVATIONS)[1:]))
    arrays = [
        row_arrays(draw, dtype, n, k),
        matrices(draw, dtype, hidden, k),
        rounded(normal(draw, hidden), dtype),
        matrices(draw, dtype, m, hidden),
        rounded(normal(draw, m), dtype),
    ]
    if draw(st.booleans()):
        arrays.append(row_arrays(draw, dtype, n, m))

    def reference(x, up, b, down, c, residual=None):
        y = F.linear(ACTIVATIONS[activation](F.linear(x, up, b)), down, c)
        return y if residual is None else y + residual

    with small_tiles(draw):
        agrees(gpu.mlp, reference, arrays, dtype, g=normal(draw, n, m), activation=activation)


CHECKS = {matmul: 6, matmul_adds: 3, linear_layer: 5, linear_adds: 4, mlp: 2}
# None of them may leave the arrays' memory: the interpreter would write there.
IN_PRODUCT = {
    matmul: [
        Mutant("the last column does not exist", "(j < m)[None", "(j < m - 1)[None"),
        Mutant("the last row does not exist", "(i < n)[:, None]", "(i < n - 1)[:, None]"),
        Mutant("both halves go to the left", "j + part * (BN // len(parts))", "j"),
        Mutant("every group is the first", "return group * GROUP + within", "return within"),
        Mutant("the last group is like all", "tl.minimum(tiles_i - group * GROUP, GROUP)", "GROUP"),
        Mutant("the batch's inner axis is not stepped", "tl.int64) * strides[1]", "tl.int64) * 0"),
        Mutant("the first part is added again and again", "start += stride_z", "start += 0"),
        Mutant("each program has one tile", "tl.num_programs(0) if", "tiles if"),
    ],
    matmul_adds: [
        Mutant("y is not added to but replaced", "u += _load(y, at_y", "u = _load(y, at_y"),
    ],
    linear_layer: [
        Mutant("every part starts at the same k", "z * steps * BK if", "0 * steps * BK if"),
        Mutant("the first columns' bias for all", "js = j + tl.arange", "js = tl.arange"),
        Mutant("the residual replaces what it is added to", "u += r.to", "u = r.to"),
        Mutant("half of u is kept", "1), i, j, n, m, u, TMA)", "1), i, j, n, m, u * 0.5, TMA)"),
        Mutant("the bias gradient is of the last rows only", "sums += tl.sum(", "sums = tl.sum("),
        Mutant("all parts have one bias gradient", "sums + z * n", "sums"),
    ],
    linear_adds: [
        Mutant("the bias gradient is not added", "row_sums += tl.load", "row_sums = tl.load"),
    ],
    mlp: [Mutant("the slope is 1", "FUNCTION(u, x.to(tl.float32))", "u")],
}
IN_LINEAR = {
    linear_layer: [Mutant("the activation's gradient is g", "activation and (", "False and (")],
    mlp: [Mutant("the hidden slope is left out", "precision, finish=through", "precision")],
}
MUTANTS = [
    *((check, replace(m, module=product)) for check, some in IN_PRODUCT.items() for m in some),
    *((check, m) for check, some in IN_LINEAR.items() for m in some),
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, linear, examples=CHECKS[check])


@pytest.mark.parametrize("check, mutant", MUTANTS)
def test_mutants_are_killed(check, mutant, tmp_path):
    assert harness.killed(linear, mutant, [check], tmp_path, examples=40)


# --- what is not a matter of numbers --------------------------------------------------------------


def array(*shape, dtype="float32"):
    return device(np.zeros(shape, harness.NUMPY[dtype]))


def in_place(call):
    return call(array(4, 4))


def overlapping(call):
    there = array(5, 4)
    return call(there[:4], there[1:])


def layer_backward(x=None, w=None, g=None, into=None):
    x, w, g = (array(4, 4) if a is None else a for a in (x, w, g))
    return linear.linear.vjp(g, None, x, w, saved=(), needs=(True, True), into=into)


BAD = [
    (lambda: linear.matmul.forward(array(3, 4), array(5, 6)), ValueError, "4 columns and b 5 rows"),
    (lambda: linear.matmul.forward(array(4), array(4, 6)), ValueError, "at least 2 axes"),
    (lambda: linear.matmul.forward(array(0, 4), array(4, 6)), ValueError, "at least one element"),
    (lambda: linear.matmul.forward(array(2, 3, 4), array(3, 4, 6)), ValueError, "do not broadcast"),
    (lambda: linear.matmul.forward(array(6, 8)[::2, ::2], array(4, 6)), ValueError, "one of them"),
    (
        lambda: linear.matmul.forward(array(3, 4), array(4, 6, dtype="float16")),
        TypeError,
        "float16",
    ),
    (lambda: linear.matmul.forward(array(3, 4), array(4, 6), precision="fp8"), ValueError, "'fp8'"),
    (lambda: linear.matmul.forward(array(3, 4), array(4, 6), accumulate=True), ValueError, "`out`"),
    (
        lambda: linear.matmul.forward(array(3, 4), array(4, 6), out=array(3, 5)),
        ValueError,
        "(3, 6)",
    ),
    (
        lambda: linear.matmul.forward(array(2, 3, 4, 3, 4).swapaxes(0, 2), array(4, 3, 2, 4, 3)),
        ValueError,
        "2 at most",
    ),
    (
        lambda: in_place(lambda x: linear.matmul.forward(x, array(4, 4), out=x)),
        ValueError,
        "with a",
    ),
    (
        lambda: in_place(lambda x: linear.matmul.forward(array(4, 4), x, out=x)),
        ValueError,
        "with b",
    ),
    (
        lambda: in_place(lambda w: layer_backward(w=w, into=(None, w))),
        ValueError,
        "into's w shares memory with w",
    ),
    (
        lambda: in_place(lambda g: layer_backward(g=g, into=(g, None))),
        ValueError,
        "into's x shares memory with g",
    ),
    (
        lambda: overlapping(lambda a, b: layer_backward(into=(a, b))),
        ValueError,
        "into's w shares memory with into's x",
    ),
    (lambda: linear.linear.forward(array(3, 4), array(6, 5)), ValueError, "expected (6, 4)"),
    (
        lambda: linear.linear.forward(array(3, 4), array(6, 4), array(5)),
        ValueError,
        "expected (6,)",
    ),
    (lambda: linear.linear.forward(array(3, 4), array(6, 4, 1)), ValueError, "expected 2 axes"),
    (lambda: linear.linear.forward(array(3, 8)[:, ::2], array(6, 4)), ValueError, "contiguous"),
    (lambda: linear.linear.forward([1.0], array(6, 4)), TypeError, "list"),
    (
        lambda: linear.linear.forward(array(3, 4), array(6, 4), activation="tanh"),
        ValueError,
        "'tanh'",
    ),
    (
        lambda: linear.linear.forward(array(3, 4), array(6, 4), array(6), array(3, 4)),
        ValueError,
        "residual has shape (3, 4)",
    ),
    (
        lambda: linear.linear.vjp(
            array(3, 6),
            None,
            array(3, 4),
            array(6, 4),
            saved=(),
            needs=(True, True),
            into=(None,),
        ),
        ValueError,
        "expected a tuple of 2",
    ),
    (
        lambda: linear.linear.vjp(
            array(3, 5), None, array(3, 4), array(6, 4), saved=(), needs=(True, True)
        ),
        ValueError,
        "g has shape",
    ),
    (
        lambda: linear.mlp.forward(
            *[array(4, 4)] * 2, array(4), array(4, 4), array(4), activation=None
        ),
        ValueError,
        "activation",
    ),
]


@pytest.mark.parametrize("call, error, words", BAD)
def test_bad_arguments_are_refused(call, error, words):
    no_launch = mock.patch.object(product, "launch", side_effect=AssertionError("launched"))
    with no_launch, pytest.raises(error) as raised:
        call()
    assert words in str(raised.value) and "\n" not in str(raised.value)


def descriptors(x, w):
    """Which of x, w and y the kernel gets as descriptors."""
    with mock.patch.object(product, "launch", wraps=product.launch) as launch:
        linear.linear.forward(x, w)
    return [isinstance(x, TensorDescriptor) for x in launch.call_args.args[2:5]]


@pytest.mark.skipif(driver.capability() < 90, reason="no copy engine")
@pytest.mark.parametrize("columns, used", [(40, True), (41, False)])
def test_descriptors_where_the_memory_is_aligned(columns, used):
    assert not any(descriptors(array(16, columns), array(24, columns)))  # no tensor cores
    x, w = array(16, columns, dtype="bfloat16"), array(24, columns, dtype="bfloat16")
    assert descriptors(x, w) == [used] * 3


@pytest.mark.skipif(driver.capability() < 90, reason="no copy engine")
@pytest.mark.parametrize("rank, last, used", [(8, 24, (True, True)), (5, 24, (False, True))])
def test_an_update_and_an_output_have_descriptors_of_their_own(rank, last, used):
    shapes = (16, 40), (last, 40), (rank, 40), (last, rank)
    with mock.patch.object(product, "launch", wraps=product.launch) as launch:
        lora.lora.forward(*(array(*shape, dtype="bfloat16") for shape in shapes))
    _, call = launch.call_args_list  # the second product: x wᵀ + h Bᵀ
    assert call.kwargs["TMA"] and (call.kwargs["TMA_CD"], call.kwargs["TMA_Y"]) == used


@pytest.mark.skipif(driver.capability() < 90, reason="no copy engine")
def test_an_output_that_is_not_aligned_is_written_through_pointers():
    a, b = array(16, 40, dtype="bfloat16"), array(40, 24, dtype="bfloat16")
    with mock.patch.object(product, "launch", wraps=product.launch) as launch:
        linear.matmul.forward(a, b, out=array(16, 25, dtype="bfloat16")[:, 1:])
    assert launch.call_args.kwargs["TMA"] and not launch.call_args.kwargs["TMA_Y"]


def test_few_tiles_are_split():
    def splits(n, k, m):
        return product._configurations(90, 132, 2, "ieee", "tma", True, 1, n, k, m)[0]["SPLITS"]

    assert splits(768, 32768, 768) > 1
    assert splits(8192, 768, 50304) == 1


def test_the_same_bits_each_time():
    x = device(np.random.default_rng(0).standard_normal((33, 40)).astype(np.float32))
    found = product._configurations(80, 2, 4, "ieee", "tma", True, 1, 33, 40, 33)
    with tuning.using(product=found[-1]):
        first, second = (harness.host(linear.matmul.forward(x, x.T)[0]) for _ in range(2))
    assert np.array_equal(first, second)


def test_whole_numbers_are_exact_on_tensor_cores():
    x = np.random.default_rng(0).integers(-8, 8, (33, 40)).astype(np.float32)
    for precision in linear.PRECISIONS:
        y, _ = linear.matmul.forward(device(x), device(x.T), precision=precision)
        assert np.array_equal(harness.host(y), x @ x.T)
