"""What every kernel says to arguments that cannot be right: one line, before any launch."""

import inspect

import numpy as np
import pytest
from gpu_harness import ON_GPU, device, host
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import (
    attention,
    elementwise,
    linear,
    lora,
    loss,
    norm,
    optim,
    position,
    reduce,
    shape,
)
from tinygrad_llm.kernels.gpu.arguments import rows, writable
from tinygrad_llm.kernels.gpu.arrays import array

interpreter_only = pytest.mark.skipif(ON_GPU, reason="about arrays of NumPy")

rng = np.random.default_rng(0)


def normal(*sizes):
    return rng.standard_normal(sizes).astype(np.float32)


def ids(*sizes):
    return rng.integers(0, 5, sizes)


# kernel -> its arrays for n rows, and attributes
CALLS = {
    linear.matmul: lambda n: ([normal(n, 5), normal(5, 6)], {}),
    linear.linear: lambda n: (
        [normal(n, 5), normal(6, 5), normal(6), normal(n, 6)],
        {"activation": "gelu"},
    ),
    linear.mlp: lambda n: ([normal(n, 5), normal(7, 5), normal(7), normal(6, 7), normal(6)], {}),
    lora.lora: lambda n: ([normal(n, 5), normal(6, 5), normal(2, 5), normal(6, 2)], {"scale": 2.0}),
    attention.attention: lambda n: ([normal(1, 2, n, 16) for _ in range(3)], {"causal": True}),
    norm.layer_norm: lambda n: ([normal(n, 5), normal(5), normal(5)], {}),
    norm.rms_norm: lambda n: ([normal(n, 5), normal(5)], {}),
    norm.add_layer_norm: lambda n: ([normal(n, 5), normal(n, 5), normal(5), normal(5)], {}),
    norm.add_rms_norm: lambda n: ([normal(n, 5), normal(n, 5), normal(5)], {}),
    reduce.softmax: lambda n: ([normal(n, 5)], {}),
    reduce.log_softmax: lambda n: ([normal(n, 5)], {}),
    reduce.logsumexp: lambda n: ([normal(n, 5)], {}),
    elementwise.gelu: lambda n: ([normal(n, 5)], {}),
    elementwise.silu_multiply: lambda n: ([normal(n, 5), normal(n, 5)], {}),
    elementwise.seeded_dropout: lambda n: ([normal(n, 5)], {"p": 0.5, "seed": 1}),
    position.rope: lambda n: ([normal(1, 2, n, 8), normal(n, 4), normal(n, 4)], {}),
    loss.cross_entropy: lambda n: ([normal(n, 5), ids(n)], {}),
    loss.linear_cross_entropy: lambda n: ([normal(n, 4), normal(5, 4), ids(n)], {}),
    shape.embedding: lambda n: ([normal(5, 4), ids(n)], {}),
    shape.scatter_add: lambda n: ([normal(n, 4), ids(n)], {"rows": 5}),
}
KEEPS = [  # something for backward whose shape depends on the rows
    linear.linear,
    linear.mlp,
    lora.lora,
    attention.attention,
    norm.layer_norm,
    norm.rms_norm,
    norm.add_layer_norm,
    norm.add_rms_norm,
    reduce.logsumexp,
    loss.cross_entropy,
    loss.linear_cross_entropy,
]


def forward(kernel, n=4):
    """(g, y, arrays, attributes, saved)"""
    arrays, attributes = CALLS[kernel](n)
    arrays = [device(x) for x in arrays]
    y, saved = kernel.forward(*arrays, **attributes)
    g = 1.0 if kernel in (loss.cross_entropy, loss.linear_cross_entropy) else y
    return g, y, arrays, attributes, saved


def one_line(found):
    message = str(found.value)
    assert message and "\n" not in message and "expected" in message, message


@pytest.mark.parametrize("kernel", CALLS)
def test_as_many_gradients_as_needs_asks_for(kernel):
    g, y, arrays, attributes, saved = forward(kernel)
    every = kernel.vjp(g, y, *arrays, saved=saved, needs=(True,) * len(arrays), **attributes)
    assert len(every) == len(arrays)
    (first,) = kernel.vjp(g, y, *arrays, saved=saved, needs=(True,), **attributes)
    assert np.array_equal(host(first), host(every[0]))
    assert kernel.vjp(g, y, *arrays, saved=saved, needs=(False,), **attributes) == (None,)


@pytest.mark.parametrize("kernel", CALLS)
@pytest.mark.parametrize("needs", [None, 3, True, "x", (), (True,) * 9])
def test_needs_is_a_tuple_of_booleans(kernel, needs):
    g, y, arrays, attributes, saved = forward(kernel)
    with pytest.raises((TypeError, ValueError), match=r"^needs ") as found:
        kernel.vjp(g, y, *arrays, saved=saved, needs=needs, **attributes)
    one_line(found)


@pytest.mark.parametrize("kernel", KEEPS)
def test_saved_is_what_forward_saved(kernel):
    """Not nothing, not half of it, and not that of a smaller batch."""
    g, y, arrays, attributes, saved = forward(kernel)
    *_, smaller = forward(kernel, n=3)
    doubled = tuple(None if x is None else host(x).repeat(2, -1)[..., ::2] for x in saved)
    for wrong in (None, (), saved[1:], (*saved, saved[0]), smaller):
        with pytest.raises((TypeError, ValueError), match=r"saved|forward") as found:
            kernel.vjp(g, y, *arrays, saved=wrong, needs=(True,), **attributes)
        assert "\n" not in str(found.value)
    if not ON_GPU and host(saved[0]).size > 1:  # and not with gaps in it
        with pytest.raises(ValueError, match=r"expected a contiguous array"):
            kernel.vjp(g, y, *arrays, saved=doubled, needs=(True,), **attributes)


OPTIONS = [
    (kernel, name)
    for kernel in CALLS
    for name, value in inspect.signature(kernel.forward).parameters.items()
    if value.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("out", "attributes")
] + [
    (attention.attention, name)
    for name in ("causal", "scale", "window", "dropout", "seed", "precision")
]


@pytest.mark.parametrize("kernel, option", OPTIONS)
@pytest.mark.parametrize("value", ["no", [1], np.ones(3), 1.5j, object()], ids=type)
def test_options_of_a_wrong_type_are_named(kernel, option, value):
    arrays, attributes = CALLS[kernel](4)
    with pytest.raises((TypeError, ValueError), match=rf"^{option} ") as found:
        kernel.forward(*map(device, arrays), **{**attributes, option: value})
    one_line(found)


@pytest.mark.parametrize(
    "kernel, option, value",
    [
        (attention.attention, "window", np.int64(3)),
        (attention.attention, "window", 10**12),
        (attention.attention, "seed", np.int64(3)),
        (attention.attention, "scale", np.float32(0.5)),
        (attention.attention, "causal", np.bool_(True)),
        (loss.cross_entropy, "ignore_index", np.int64(0)),
        (loss.linear_cross_entropy, "chunk", np.int64(3)),
        (shape.scatter_add, "rows", np.int64(5)),
        (elementwise.seeded_dropout, "seed", np.int64(5)),
        (norm.layer_norm, "eps", np.float32(1e-5)),
        (lora.lora, "scale", np.float32(0.5)),
    ],
)
def test_numbers_of_numpy_are_numbers(kernel, option, value):
    arrays, attributes = CALLS[kernel](4)
    arrays = [device(x) for x in arrays]
    same = value.item() if isinstance(value, np.generic) else value
    found, _ = kernel.forward(*arrays, **{**attributes, option: value})
    expected, _ = kernel.forward(*arrays, **{**attributes, option: same})
    assert np.array_equal(host(found), host(expected))


@pytest.mark.parametrize(
    "options",
    [{"betas": 1}, {"betas": (0.9,)}, {"betas": ("a", "b")}, {"eps": "x"}, {"weight_decay": "x"}],
)
def test_options_of_adamw(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))) as found:
        optim.AdamW([device(normal(3))], **options)
    one_line(found)


def test_parameters_that_share_memory_are_refused():
    p = device(normal(6))
    for parameters in ([p, p], [p[:4], p[3:]], [p[3:], p[:4]]):
        with pytest.raises(ValueError, match="two parameters share memory"):
            optim.AdamW(parameters)
    optim.AdamW(x for x in (p[3:], p[:3]))
    with pytest.raises(TypeError, match=r"parameters\[0\] is a NoneType"):
        optim.AdamW([None, p])
    with pytest.raises(TypeError, match="expected a list of arrays"):
        optim.AdamW(p)


# --- memory ---------------------------------------------------------------------------------------


@interpreter_only
@given(st.data())
@settings(max_examples=60)
def test_rows_are_where_numpy_has_them(data):
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    gaps = [data.draw(st.integers(0, 1)) for _ in shape]
    base = np.arange(np.prod([n + g for n, g in zip(shape, gaps)]), dtype=np.float32)
    x = base.reshape([n + g for n, g in zip(shape, gaps)])
    x = x[tuple(slice(n) for n in shape)].transpose(order)
    try:
        count, stride = rows(array(x, "x"), "x")
    except ValueError as error:
        assert "make" in str(error) and "contiguous" in str(error)
        return
    first = [int(x.reshape(-1, x.shape[-1])[i, 0]) for i in range(count)]
    assert count == x.size // x.shape[-1]
    assert first == [i * stride for i in range(count)]


@interpreter_only
@given(st.data())
@settings(max_examples=200)
def test_memory_that_is_written_to_is_nobody_elses(data):
    base = np.zeros(60, np.float32)

    def view(name):
        shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        strides = [data.draw(st.sampled_from([-4, -1, 0, 1, 2, 3, 4, 9])) for _ in shape]
        there = np.lib.stride_tricks.as_strided(base[30:], shape, [4 * s for s in strides])
        return there, array(there, name)

    (there, out), (other, x) = view("out"), view("x")
    addresses = np.unique(there.ctypes.data + np.indices(there.shape).T @ there.strides)
    try:
        writable(out, "out", x=x, nothing=None)
    except ValueError as error:
        shares = "out shares memory with x" in str(error)
        assert shares == np.shares_memory(there, other) or "elements may overlap" in str(error)
        return
    assert len(addresses) == there.size and not np.shares_memory(there, other)


@interpreter_only
def test_memory_that_is_read_only_is_not_written_to():
    x = np.ones((4, 4), np.float32)
    frozen = x.copy()
    frozen.flags.writeable = False
    for call in (
        lambda: linear.matmul.forward(x, x, out=frozen),
        lambda: loss.cross_entropy.forward(frozen, np.zeros(4, np.int64), in_place=True),
        lambda: optim.AdamW([frozen]),
    ):
        with pytest.raises(ValueError, match="is read-only"):
            call()
