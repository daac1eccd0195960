"""Laws of all ops of the table, whoever added them. Nobody lists an op here, but for PyTorch's own
function in ORACLE: the oracle of its forward values."""

import math

import array_api_compat.torch
import array_api_strict
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume
from strategies import (
    agree,
    arguments,
    as32,
    batch_of,
    call,
    cotangent,
    defaults,
    differentiable,
    for_kernels,
    forward,
    holds,
    implementation,
    is_float64,
    numbers,
    to_torch,
    torch_grad,
    vjp,
    without_broadcasting,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinygrad_llm import Tensor, backend, functional, grad
from tinygrad_llm.check import gradcheck
from tinygrad_llm.ops import TABLE
from tinygrad_llm.tensor import apply

OPS = list(TABLE.values())
READINGS = {"MATHS": backend.MATHS, "CPU": backend.CPU}
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
readings = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
KERNELS = [op for op in OPS if op.name in backend.CPU.kernels]
every_kernel = pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)

TORCH = backend.Space(array_api_compat.torch)
STRICT = backend.Space(array_api_strict)


# --- PyTorch's own ops ----------------------------------------------------------------------------


def _reduction(function, default=None):
    def run(x, *, axis=default, keepdims=False):
        return function(x, dim=tuple(range(x.ndim)) if axis is None else axis, keepdim=keepdims)

    return run


def _getitem(x, *, key):  # through positions, since torch knows no negative steps
    positions = np.arange(x.numel()).reshape(x.shape)[key]
    return x.reshape(-1)[torch.tensor(positions.copy())]


def _put(x, *, key, shape):
    positions = np.arange(math.prod(shape)).reshape(shape)[key]
    flat = torch.zeros(math.prod(shape), dtype=x.dtype)
    return flat.index_add(0, torch.tensor(positions.ravel()), x.reshape(-1)).reshape(shape)


def _scatter_add(x, t, *, rows):
    zeros = torch.zeros(rows, x.shape[-1], dtype=x.dtype)
    return zeros.index_add(0, t.flatten(), x.flatten(end_dim=-2))


def _gather(x, t):
    lead = torch.broadcast_shapes(x.shape[:-1], t.shape[:-1])
    return torch.gather(x.expand(*lead, -1), -1, t.expand(*lead, -1))


def _attention(q, k, v, M=True, B=0.0, D=None, *, causal=False, scale=None):
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    seen = seen.tril(k.shape[-2] - q.shape[-2]) if causal else seen
    seen = seen & M
    bias = torch.where(seen, torch.as_tensor(B, dtype=q.dtype), -math.inf)
    lead = torch.broadcast_shapes(*[a.shape[:-2] for a in (q, k, v, bias)])
    q, k, v = (a.expand(*lead, *a.shape[-2:]) for a in (q, k, v))
    if D is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.mT) + bias
    return (D * torch.where(seen, scores.clamp(min=-1e300).softmax(-1), 0.0)) @ v


ORACLE = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "negative": torch.neg,
    "power": torch.pow,
    "pow": torch.pow,
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "erfc": torch.special.erfc,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "where": torch.where,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "abs": torch.abs,
    "clip": lambda x, *, low=None, high=None: torch.clamp(x, low, high),
    "dropout": lambda x, keep: torch.mul(x, keep),
    "cast": lambda x, *, dtype: x.to(getattr(torch, dtype)),
    "sum": _reduction(torch.sum),
    "mean": _reduction(torch.mean),
    "max": _reduction(torch.amax),
    "min": _reduction(torch.amin),
    "logsumexp": _reduction(torch.logsumexp, default=-1),
    "softmax": lambda x, *, axis=-1: torch.softmax(x, axis),
    "log_softmax": lambda x, *, axis=-1: torch.log_softmax(x, axis),
    "matmul": torch.matmul,
    "linear": F.linear,
    "layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
    "rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, eps=1e-5),
    "attention": _attention,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "mse_loss": F.mse_loss,
    "reshape": torch.reshape,
    "permute_dims": lambda x, *, axes: torch.permute(x, axes),
    "matrix_transpose": lambda x: x.mT,
    "expand_dims": lambda x, *, axis: torch.unsqueeze(x, axis),
    "squeeze": lambda x, *, axis: torch.squeeze(x, axis),
    "broadcast_to": lambda x, *, shape: torch.broadcast_to(x, shape),
    "tril": lambda x, *, k=0: torch.tril(x, k),
    "triu": lambda x, *, k=0: torch.triu(x, k),
    "getitem": _getitem,
    "put": _put,
    "concat": lambda *xs, axis=0: torch.cat(xs, axis),
    "stack": lambda *xs, axis=0: torch.stack(xs, axis),
    "embedding": lambda w, t: F.embedding(t, w),
    "scatter_add": _scatter_add,
    "gather": _gather,
    "scatter": lambda x, t, *, size: torch.zeros(*x.shape[:-1], size, dtype=x.dtype).scatter_add(
        -1, t, x
    ),
}


def test_every_op_has_an_oracle():
    missing = sorted(set(TABLE) - set(ORACLE))
    assert not missing, f"name PyTorch's function for {missing} in ORACLE, tests/test_ops.py"
    assert set(ORACLE) <= set(TABLE)


# --- the three ways to a gradient -----------------------------------------------------------------


def ours(op, arrays, attributes, reading, create_graph=False):
    """(y, differentiable inputs, cotangent, gradients) from the engine."""
    tensors = [
        Tensor(a, differentiable(op, i)) if isinstance(a, np.ndarray) else a
        for i, a in enumerate(arrays)
    ]
    free = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    with backend.using(reading):
        y = apply(op, *tensors, **attributes)
        g = Tensor(cotangent(y.shape), requires_grad=create_graph)
        return y, free, g, grad(y, free, g, create_graph=create_graph)


def theirs(function, op, arrays, attributes, create_graph=False):
    """The same from PyTorch, for a function of torch.Tensors."""
    tensors = [
        to_torch(a, differentiable(op, i)) if isinstance(a, np.ndarray) else a
        for i, a in enumerate(arrays)
    ]
    free = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    y = function(*tensors, **attributes)
    g = to_torch(cotangent(y.shape), requires_grad=create_graph)
    return y, free, g, torch_grad(y, free, g, create_graph=create_graph)


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
@readings
@every_op
def test_vjp_agrees_with_complex_step(op, reading, ties):
    def law(case):
        f, xs = call(op, *case)
        with backend.using(reading):
            gradcheck(f, *xs, directions=2)

    holds(law, arguments(op, ties=ties), examples=12)


@pytest.mark.parametrize("ties", [False, True], ids=["smooth", "ties"])
@readings
@every_op
def test_value_and_gradient_agree_with_pytorchs_own_op(op, reading, ties):
    def law(case):
        y, _, _, gradients = ours(op, *case, reading)
        expected, _, _, expected_gradients = theirs(ORACLE[op.name], op, *case)
        agree(y, expected)
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            agree(actual, expected)

    holds(law, arguments(op, ties=ties), examples=15)


@every_op
def test_vjp_agrees_with_pytorchs_autograd_over_the_ops_own_lines(op):
    def law(case):
        assume(torch_can(case[1]))
        y, _, _, gradients = ours(op, *case, backend.MATHS)
        expected, _, _, expected_gradients = theirs(our_lines_in_torch(op), op, *case)
        agree(y, expected)
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            agree(actual, expected)

    holds(law, arguments(op), examples=12)


@readings
@every_op
def test_second_derivatives_agree_with_pytorchs_double_backward(op, reading):
    """Of s = Σ_i ⟨x̄_i, v_i⟩, by every input and by the cotangent."""

    def law(case):
        _, xs, g, first = ours(op, *case, reading, create_graph=True)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            _, txs, tg, tfirst = theirs(ORACLE[op.name], op, *case, create_graph=True)
        weights = [cotangent(x.shape, seed=i) for i, x in enumerate(xs)]
        with backend.using(reading):
            s = sum((d * v).sum() for d, v in zip(first, weights))
            second = grad(s, [*xs, g], allow_unused=True)
        nothing = sum((0 * x).sum() for x in [*txs, tg])  # where s is constant, zeros and no error
        s = sum((d * to_torch(v)).sum() for d, v in zip(tfirst, weights)) + nothing
        for x, actual, wanted in zip([*xs, g], second, torch_grad(s, [*txs, tg]), strict=True):
            agree(np.zeros(x.shape) if actual is None else actual, wanted)

    holds(law, arguments(op), examples=8)


# --- other arrays ---------------------------------------------------------------------------------


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
        arrays, attributes = case[0], standard(case[1])
        strict = [array_api_strict.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays]
        y, saved = forward(backend.MATHS, op, arrays, attributes)
        reading = backend.Reading(STRICT)
        strict_y, strict_saved = forward(reading, op, strict, attributes)
        np.testing.assert_allclose(np.asarray(strict_y), y, rtol=1e-12, atol=1e-14)
        g = cotangent(y.shape)
        expected = vjp(backend.MATHS, op, g, y, saved, arrays, attributes)
        strict_g = array_api_strict.asarray(g)
        found = vjp(reading, op, strict_g, strict_y, strict_saved, strict, attributes)
        for actual, wanted in zip(found, expected, strict=True):
            assert (actual is None) == (wanted is None)
            if wanted is not None:
                actual = without_broadcasting(np.asarray(actual), wanted.shape)
                np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-14)

    holds(law, arguments(op), examples=10)


@readings
@every_op
def test_float32_in_means_float32_out(op, reading):
    def law(case):
        arrays, attributes = as32(case[0]), case[1]
        chosen = implementation(reading, op, arrays, attributes)
        y, saved = forward(chosen, op, arrays, attributes)
        assert y.dtype == attributes.get("dtype", np.float32)
        g = cotangent(y.shape).astype(y.dtype)
        for d in vjp(chosen, op, g, y, saved, arrays, attributes):
            assert d is None or d.dtype == y.dtype

    holds(law, arguments(op), examples=10)


@readings
@every_op
def test_nothing_given_is_written_to_and_a_second_vjp_gives_the_same(op, reading):
    def law(case):
        arrays, attributes = case
        for a in arrays:
            if isinstance(a, np.ndarray):
                a.flags.writeable = False
        chosen = implementation(reading, op, arrays, attributes)
        y, saved = forward(chosen, op, arrays, attributes)
        y = np.array(y)
        y.flags.writeable = False
        g = cotangent(y.shape)
        g.flags.writeable = False
        first = [np.copy(d) for d in vjp(chosen, op, g, y, saved, arrays, attributes)]
        second = [np.copy(d) for d in vjp(chosen, op, g, y, saved, arrays, attributes)]
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)

    holds(law, arguments(op), examples=10)


@readings
@every_op
def test_memory_layout_does_not_matter(op, reading):
    def spread(a):
        """The same numbers, in reverse and with gaps between them."""
        if not isinstance(a, np.ndarray) or not a.ndim:
            return a
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype, order="F")[..., ::-2]
        wide[...] = a
        return wide

    def law(case):
        arrays, attributes = case
        chosen = implementation(reading, op, arrays, attributes)
        y, saved = forward(chosen, op, arrays, attributes)
        g = cotangent(y.shape)
        apart = [spread(a) for a in arrays]
        y2, saved2 = forward(chosen, op, apart, attributes)
        agree(y2, y)
        expected = vjp(chosen, op, g, y, saved, arrays, attributes)
        found = vjp(chosen, op, spread(g), y2, saved2, apart, attributes)
        for actual, wanted in zip(found, expected, strict=True):
            if wanted is not None:
                agree(actual, wanted)

    holds(law, arguments(op), examples=8)


@readings
@every_op
def test_gradients_have_the_shapes_of_the_inputs_however_these_were_broadcast(op, reading):
    def law(case):
        _, xs, _, gradients = ours(op, *case, reading)
        assert [d.shape for d in gradients] == [x.shape for x in xs]

    holds(law, arguments(op), examples=8)


@readings
@pytest.mark.parametrize(
    "op", [o for o in OPS if set(o.arrays) - set(o.fixed) and o.signature], ids=lambda op: op.name
)
def test_an_empty_batch_gives_empty_results_and_zero_gradients(op, reading):
    arrays = batch_of(op, (0,), (3, 2, 4, 5))
    attributes = {"axis": -1} if "axis" in op.attributes else op.examples[0]
    y, xs, _, gradients = ours(op, arrays, attributes, reading)
    assert not y.numel()
    for x, d in zip(xs, gradients, strict=True):
        agree(d, np.zeros(x.shape))


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
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, _, _, gradients = ours(op, arrays, {}, reading)
    expected, _, _, expected_gradients = theirs(ORACLE[name], op, arrays, {})
    precision = 1e-10 if dtype == np.float64 else 1e-5
    for actual, wanted in [(y, expected), *zip(gradients, expected_gradients, strict=True)]:
        assert np.isfinite(numbers(actual)).all()
        agree(actual, wanted, precision)


@readings
def test_erfc_has_a_small_relative_error_far_out(reading):
    x = np.linspace(-6, 26, 5000)
    exact = np.array([math.erfc(a) for a in x])
    found, _ = forward(reading, TABLE["erfc"], [x], {})
    bound = (4 + x * x) * np.finfo(np.float64).eps  # e^(-x²) multiplies the rounding of x² by x²
    assert np.all(np.abs(found - exact) <= bound * exact)


# --- kernels --------------------------------------------------------------------------------------


def in_float32(reading, op, arrays, attributes, g):
    """[y, gradients...], all computed in float32; gradients only of what is an array."""
    arrays = as32(arrays)
    y, saved = forward(reading, op, arrays, attributes)
    found = vjp(reading, op, g.astype(np.float32), y, saved, arrays, attributes)
    return [y, *gradients_of(op, arrays, found)]


def gradients_of(op, arrays, found):
    return [d for i, (a, d) in enumerate(zip(arrays, found)) if differentiable(op, i, a)]


def inexactness(op, arrays, attributes):
    """The kernel's largest error in float32. The unit is, element by element, the error of the
    op's own lines in float32 when all that goes in moves by a rounding: what cannot be helped."""
    rng = np.random.default_rng(0)

    def float32_values(a, factor=1.0):
        return np.float64(np.float32(a * factor)) if is_float64(a) else a

    def moved(a):
        return float32_values(a, rng.choice([1 - 2.0**-23, 1 + 2.0**-23], np.shape(a)))

    arrays = [float32_values(a) for a in arrays]
    y, saved = forward(backend.MATHS, op, arrays, attributes)
    g = float32_values(cotangent(np.shape(y)))
    gradients = vjp(backend.MATHS, op, g, y, saved, arrays, attributes)
    exact = [y, *gradients_of(op, arrays, gradients)]
    units = [np.abs(e) * 2.0**-24 + np.finfo(np.float32).tiny for e in exact]
    for _ in range(8):
        near = in_float32(backend.MATHS, op, [moved(a) for a in arrays], attributes, moved(g))
        units = [np.maximum(u, np.abs(n - e)) for u, n, e in zip(units, near, exact)]
    found = in_float32(backend.CPU, op, arrays, attributes, g)
    return max(
        (np.abs(f - e) / u).max(initial=0) for f, e, u in zip(found, exact, units, strict=True)
    )


@every_kernel
def test_a_kernel_is_about_as_exact_as_the_maths_in_float32(op):
    def law(case):
        arrays, attributes = case
        assume(implementation(backend.CPU, op, as32(arrays), attributes) is backend.CPU)
        assert inexactness(op, arrays, attributes) < 32

    holds(law, for_kernels(op, max_side=12), examples=25)


@pytest.mark.parametrize("op", [op for op in KERNELS if op.signature], ids=lambda op: op.name)
def test_a_kernel_is_as_exact_on_arrays_larger_than_its_blocks(op):
    batch = (2,) if op.signature.strip("()->,") else (3, 11_000)
    arrays = batch_of(op, batch, (257, 40, 300, 20))
    arrays = arrays[: len(arrays) - len(defaults(op))]
    for attributes in op.examples:
        assert implementation(backend.CPU, op, as32(arrays), attributes) is backend.CPU
        assert inexactness(op, arrays, attributes) < 32


@pytest.mark.parametrize("scale", [1.5, 30])
@pytest.mark.parametrize("op", [op for op in KERNELS if op.signature], ids=lambda op: op.name)
def test_a_kernel_is_as_good_as_the_maths_in_float16_which_overflows_early(op, scale):
    arrays = batch_of(op, (2,), (300, 1, 300, 3))
    arrays = [(a * scale).astype(np.float16) if is_float64(a) else a for a in arrays]
    arrays = arrays[: len(arrays) - len(defaults(op))]
    found = []
    for reading in READINGS.values():
        with np.errstate(all="ignore"):
            chosen = implementation(reading, op, arrays, {})
            y, saved = forward(chosen, op, arrays, {})
            g = cotangent(np.shape(y)).astype(np.float16)
            gradients = vjp(chosen, op, g, y, saved, arrays, {})
        found.append([y, *gradients_of(op, arrays, gradients)])
    for maths, kernel in zip(*found, strict=True):
        assert kernel.dtype == np.float16
        assert (np.isfinite(kernel) | ~np.isfinite(maths)).all()
    maths, kernel = (np.float64(y) for y, *_ in found)
    same = np.abs(kernel - maths) <= 0.05 * np.nanmax(np.abs(maths))
    assert (same | ~np.isfinite(maths)).all()


@every_kernel
def test_a_kernel_gives_the_same_gradients_when_only_some_are_needed(op):
    def law(case):
        arrays, attributes = case
        assume(implementation(backend.CPU, op, arrays, attributes) is backend.CPU)
        y, saved = forward(backend.CPU, op, arrays, attributes)
        g = cotangent(y.shape)
        everything = vjp(backend.CPU, op, g, y, saved, arrays, attributes)
        for i, wanted in enumerate(everything):
            if wanted is not None:
                needs = tuple(j == i for j in range(len(arrays)))
                found = vjp(backend.CPU, op, g, y, saved, arrays, attributes, needs)
                np.testing.assert_array_equal(found[i], wanted)

    holds(law, for_kernels(op), examples=10)


@every_kernel
def test_a_kernels_gradients_share_no_memory_with_what_it_was_given(op):
    def law(case):
        arrays, attributes = case
        assume(implementation(backend.CPU, op, arrays, attributes) is backend.CPU)
        y, saved = forward(backend.CPU, op, arrays, attributes)
        y, g = np.asarray(y), cotangent(np.shape(y))
        given = [g, y, *arrays, *(saved if isinstance(saved, tuple | list) else [saved])]
        found = vjp(backend.CPU, op, g, y, saved, arrays, attributes)
        found = [d for d in found if d is not None]
        for i, d in enumerate(found):
            for other in [*given, *found[:i]]:
                assert not isinstance(other, np.ndarray) or not np.shares_memory(d, other)

    holds(law, for_kernels(op), examples=8)


@every_kernel
def test_a_kernel_takes_integers_or_leaves_them_to_the_maths(op):
    def law(case):
        arrays, attributes = case
        arrays = [a.astype(int) if is_float64(a) else a for a in arrays]
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


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
def test_attention_where_the_bound_of_the_scores_is_no_number(reading):
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
