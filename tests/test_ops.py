"""Ops compared with others: PyTorch's own functions, PyTorch's autograd over our lines, the strict
array API, and their kernels. What every op obeys by itself is in test_laws.py. Nobody lists an op
here: where PyTorch has a function of the op's name, that is the oracle.
"""

import inspect
import math
from dataclasses import replace

import array_api_compat.torch
import array_api_strict
import numpy as np
import pytest
from hypothesis import assume
from oracles import agree, holds, numbers, pytorchs_own, to_torch, torch_grad
from tinygrad_llm.kernels.cpu import _blocks
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinygrad_llm import Tensor, backend, functional, grad, threads
from tinygrad_llm.check.cases import (
    Call,
    arguments,
    batch_of,
    cotangent,
    settled,
    without_defaults,
)
from tinygrad_llm.check.lawbook import inexactness
from tinygrad_llm.ops import TABLE
from tinygrad_llm.tensor import apply

OPS = list(TABLE.values())
READINGS = {"MATHS": backend.MATHS, "CPU": backend.CPU}
KERNELS = [op for op in OPS if op.name in backend.CPU.kernels]
BOTH = [("MATHS", op) for op in OPS] + [("CPU", op) for op in KERNELS]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_op_and_kernel = pytest.mark.parametrize(
    "reading, op", [pytest.param(READINGS[r], op, id=f"{op.name}-{r}") for r, op in BOTH]
)
every_kernel = pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
readings = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)

TORCH = backend.Space(array_api_compat.torch)
STRICT = backend.Space(array_api_strict)


def test_every_op_has_an_oracle():
    assert all(callable(pytorchs_own(op)) for op in OPS)


# --- the three ways to a gradient -----------------------------------------------------------------


def called(op, case, reading=backend.MATHS):
    """The op's call with a drawn case."""
    return Call(op, reading, tuple(case[0]), case[1])


def ours(call, create_graph=False):
    """(y, differentiable inputs, cotangent, gradients) from the engine."""
    f, xs = call.function()
    free = [Tensor(x, requires_grad=True) for x in xs]
    with backend.using(call.reading):
        y = f(*free)
        g = Tensor(cotangent(y.shape), requires_grad=create_graph)
        return y, free, g, grad(y, free, g, create_graph=create_graph)


def theirs(function, call, create_graph=False):
    """The same from PyTorch, for a function of torch.Tensors."""
    free = call.free
    tensors = [
        to_torch(a, i in free) if isinstance(a, np.ndarray) else a
        for i, a in enumerate(call.arrays)
    ]
    xs = [tensors[i] for i in free]
    y = function(*tensors, **call.attributes)
    g = to_torch(cotangent(y.shape), requires_grad=create_graph)
    return y, xs, g, torch_grad(y, xs, g, create_graph=create_graph)


def our_lines_in_torch(op):
    """The op's own forward, computed by PyTorch."""

    def run(*tensors, **attributes):
        y = op.forward(TORCH, *tensors, **attributes)
        return y[0] if op.saves else y

    return run


def torch_can(attributes):
    """torch has no negative steps in slices."""
    keys = attributes.get("key", ())
    return not any(isinstance(k, slice) and (k.step or 1) < 0 for k in keys)


@pytest.mark.parametrize("ties", [False, True], ids=["smooth", "ties"])
@every_op_and_kernel
def test_value_and_gradient_agree_with_pytorchs_own_op(op, reading, ties):
    def law(case):
        call = called(op, case, reading)
        y, _, _, gradients = ours(call)
        expected, _, _, expected_gradients = theirs(pytorchs_own(op), call)
        agree(y, expected)
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            agree(actual, expected)

    holds(law, arguments(op, ties=ties), examples=15)


@every_op
def test_vjp_agrees_with_pytorchs_autograd_over_the_ops_own_lines(op):
    def law(case):
        assume(torch_can(case[1]))
        call = called(op, case)
        y, _, _, gradients = ours(call)
        expected, _, _, expected_gradients = theirs(our_lines_in_torch(op), call)
        agree(y, expected)
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            agree(actual, expected)

    holds(law, arguments(op), examples=12)


@every_op_and_kernel
def test_second_derivatives_agree_with_pytorchs_double_backward(op, reading):
    """Of s = Σ_i ⟨x̄_i, v_i⟩, by every input and by the cotangent: Hessian-vector products."""

    def law(case):
        call = called(op, case, reading)
        _, xs, g, first = ours(call, create_graph=True)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            _, txs, tg, tfirst = theirs(pytorchs_own(op), call, create_graph=True)
        weights = [cotangent(x.shape, seed=i) for i, x in enumerate(xs)]
        with backend.using(reading):
            s = sum((d * v).sum() for d, v in zip(first, weights))
            second = grad(s, [*xs, g], allow_unused=True)
        nothing = sum((0 * x).sum() for x in [*txs, tg])  # where s is constant, zeros and no error
        s = sum((d * to_torch(v)).sum() for d, v in zip(tfirst, weights)) + nothing
        for x, actual, wanted in zip([*xs, g], second, torch_grad(s, [*txs, tg]), strict=True):
            agree(np.zeros(x.shape) if actual is None else actual, wanted)

    holds(law, arguments(op), examples=8)


# --- the array API standard -----------------------------------------------------------------------


def standard(attributes):
    """Keys as the array API wants them: an ellipsis for the axes that are not named, and no new
    axes where something is put."""
    if "key" not in attributes:
        return attributes
    key = tuple(k for k in attributes["key"] if k is not None)
    return attributes | {"key": key if ... in key else (*key, ...)}


@every_op
def test_forward_and_vjp_keep_to_the_array_api_standard(op):
    def law(case):
        call = called(op, (case[0], standard(case[1])))
        strict = [
            array_api_strict.asarray(a) if isinstance(a, np.ndarray) else a for a in call.arrays
        ]
        y, saved = call.forward()
        reading = backend.Reading(STRICT)
        strict_y = reading[op].forward(*strict, **call.attributes)
        strict_y, extra = (strict_y[0], {"saved": strict_y[1]}) if op.saves else (strict_y, {})
        np.testing.assert_allclose(np.asarray(strict_y), y, rtol=1e-12, atol=1e-14)
        g = cotangent(y.shape)
        expected = call.shaped(call.vjp(g, y, saved))
        found = reading[op].vjp(
            array_api_strict.asarray(g), strict_y, *strict, **call.attributes, **extra
        )
        for i, wanted in zip(call.free, expected, strict=True):
            actual = settled(np.asarray(found[i]), call.arrays[i])
            np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-14)

    holds(law, arguments(op), examples=10)


# --- large numbers --------------------------------------------------------------------------------

FAR = np.array([-1e4, -88.0, -30.0, 0.0, 30.0, 88.0, 1e4])
NEVER_OVERFLOWS = {
    "softmax": [FAR],
    "log_softmax": [FAR],
    "logsumexp": [FAR],
    "sigmoid": [FAR],
    "silu": [FAR],
    "tanh": [FAR],
    "erfc": [FAR],
    "gelu": [FAR],
    "gelu_tanh": [FAR],
    "cross_entropy": [np.stack([FAR, -FAR, FAR]), np.array([0, 6, -100])],
    "binary_cross_entropy_with_logits": [FAR, np.linspace(0, 1, 7)],
    "attention": [FAR.reshape(7, 1), FAR.reshape(7, 1), FAR.reshape(7, 1)],
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@readings
@pytest.mark.parametrize("name", NEVER_OVERFLOWS)
def test_large_numbers_are_no_trouble_where_the_maths_has_none(name, reading, dtype):
    op = TABLE[name]
    arrays = [a.astype(dtype) if a.dtype.kind == "f" else a for a in NEVER_OVERFLOWS[name]]
    call = Call(op, reading, tuple(arrays))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, _, _, gradients = ours(call)
    expected, _, _, expected_gradients = theirs(pytorchs_own(op), call)
    precision = 1e-10 if dtype == np.float64 else 1e-5
    for actual, wanted in [(y, expected), *zip(gradients, expected_gradients, strict=True)]:
        assert np.isfinite(numbers(actual)).all()
        agree(actual, wanted, precision)


@readings
def test_erfc_has_a_small_relative_error_far_out(reading):
    x = np.linspace(-6, 26, 5000)
    exact = np.array([math.erfc(a) for a in x])
    found, _ = Call(TABLE["erfc"], reading, (x,)).forward()
    bound = (4 + x * x) * np.finfo(np.float64).eps  # e^(-x²) multiplies the rounding of x² by x²
    assert np.all(np.abs(found - exact) <= bound * exact)


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in KERNELS if op.signature], ids=lambda op: op.name)
def test_a_kernel_is_as_exact_on_arrays_larger_than_its_blocks(op):
    batch = (2,) if op.signature.strip("()->,") else (3, 11_000)
    calls = [
        Call(op, backend.CPU, tuple(without_defaults(op, arrays)), attributes)
        for attributes in op.examples
        for arrays in [batch_of(op, batch, (257, 40, 300, 20), attributes=attributes)]
    ]
    taken = [call for call in calls if call.cast(np.float32).implementation.is_kernel]
    assert len(taken) == len(calls) or ("axis" in op.attributes and taken)  # of the last axis alone
    for call in taken:
        for exact, unit, found in zip(*inexactness(call), strict=True):
            assert (np.abs(found - exact) <= 32 * unit).all()


MANY_ROWS = {  # batch, core
    "layer_norm": ((700,), (257,)),
    "cross_entropy": ((), (70, 9000)),
    "softmax": ((3,), (700, 80)),
}


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("name", MANY_ROWS)
def test_a_kernel_is_as_exact_on_more_rows_than_go_into_a_block(name, team, monkeypatch):
    batch, lengths = MANY_ROWS[name]
    kernel = inspect.getmodule(backend.CPU.kernels[name])
    monkeypatch.setattr(kernel, "_KEPT", 0, raising=False)  # what is large is computed again
    monkeypatch.setattr(_blocks, "SIZE", 1 << 14)
    call = Call(TABLE[name], backend.CPU, tuple(batch_of(TABLE[name], batch, lengths)))
    assert call.arrays[0].size > 8 * _blocks.SIZE
    with threads.team(team):
        compared = [*zip(*inexactness(call), strict=True)]
    for exact, unit, found in compared:
        assert (np.abs(found - exact) <= 32 * unit).all()


@pytest.mark.parametrize("scale", [1.5, 30])
@pytest.mark.parametrize("op", [op for op in KERNELS if op.signature], ids=lambda op: op.name)
def test_a_kernel_is_as_good_as_the_maths_in_float16_which_overflows_early(op, scale):
    arrays = tuple(without_defaults(op, batch_of(op, (2,), (300, 1, 300, 3))))
    found = []
    for reading in READINGS.values():
        call = Call(op, reading, arrays)
        call = call.on(a * scale if a.dtype.kind == "f" else a for a in arrays).cast(np.float16)
        with np.errstate(all="ignore"):
            y, saved = call.forward()
            g = cotangent(y.shape).astype(np.float16)
            found.append([y, *call.shaped(call.vjp(g, y, saved))])
    for maths, kernel in zip(*found, strict=True):
        assert kernel.dtype == np.float16
        assert (np.isfinite(kernel) | ~np.isfinite(maths)).all()
    maths, kernel = (np.float64(y) for y, *_ in found)
    same = np.abs(kernel - maths) <= 0.05 * np.nanmax(np.abs(maths))
    assert (same | ~np.isfinite(maths)).all()


@every_kernel
def test_a_kernel_takes_integers_or_leaves_them_to_the_maths(op):
    def law(case):
        arrays, attributes = case
        arrays = [
            a.astype(int) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a
            for a in arrays
        ]
        results = []
        for reading in READINGS.values():
            with backend.using(reading):
                results.append(apply(op, *arrays, **attributes))
        agree(*results, 1e-6)

    holds(law, arguments(op, ties=True), examples=10)


# --- hard numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
@pytest.mark.parametrize("mask", [None, np.ones((3, 3), bool)], ids=["causal", "mask"])
def test_attention_hands_nan_on(reading, mask):
    q = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    q[1, 2] = np.nan
    with backend.using(getattr(backend, reading)), np.errstate(all="ignore"):
        y = functional.scaled_dot_product_attention(q, q, q, mask=mask, is_causal=mask is None)
    assert np.isnan(y.data[1]).all()


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
@pytest.mark.parametrize("n", [5, 96, 768, 1600])
def test_layer_norm_of_a_large_mean_and_a_small_spread(reading, n):
    rng = np.random.default_rng(n)
    x = (1e4 + rng.standard_normal((6, n))).astype(np.float32)
    exact = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
    with backend.using(getattr(backend, reading)):
        found = functional.layer_norm(Tensor(x), ones, zeros).data
        constant = functional.layer_norm(Tensor(np.full((2, n), 1e5, np.float32)), ones, zeros).data
    limit = 5e-3 if reading == "MATHS" else 1e-5  # the kernel centres twice
    assert np.abs(found - exact).max() < limit
    assert np.abs(constant).max() == 0


@pytest.mark.parametrize("n", [5, 96, 768])
def test_the_gradients_of_layer_norm_of_a_large_mean_and_a_small_spread(n):
    rng = np.random.default_rng(n)
    x, w, b = (1e4 + rng.standard_normal((6, n)), rng.standard_normal(n), np.zeros(n))
    call = Call(TABLE["layer_norm"], backend.CPU, (x.astype(np.float32), *np.float32([w, b])))
    g = rng.standard_normal((6, n)).astype(np.float32)
    exact = replace(call, reading=backend.MATHS).cast(np.float64).results(g.astype(np.float64))
    for f, e in zip(call.results(g), exact, strict=True):
        np.testing.assert_allclose(f, e, atol=2e-5 * np.abs(e).max())


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
def test_attention_where_the_norms_of_queries_and_keys_overflow(reading):
    q, k = np.full((2, 1), 1e-25, np.float32), np.array([[1e30], [-1e30]], np.float32)
    with backend.using(getattr(backend, reading)), np.errstate(all="ignore"):
        y = functional.scaled_dot_product_attention(q, k, np.ones((2, 1), np.float32))
    np.testing.assert_allclose(y.data, 1)


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
def test_gelu_far_out_is_a_straight_line(reading):
    x = Tensor(np.array([-1e14, 1e14], np.float32), requires_grad=True)
    with backend.using(getattr(backend, reading)), np.errstate(all="ignore"):
        functional.gelu(x, approximate="tanh").sum().backward()
    assert x.grad.tolist() == [0, 1]
