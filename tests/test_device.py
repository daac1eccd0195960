"""Tensors and modules on a device: what an op does there is what it does on the CPU, gradients
cross from one to the other, and what does not fit is one clear line. Without a GPU the device is
"interpret": NumPy in the place of CuPy, and the kernels in Triton's interpreter.
"""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_harness import DEVICE, ON_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_llm as tg
from tinygrad_llm import Tensor, backend, nn, precision
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.check.cases import arguments, cotangent, is_float
from tinygrad_llm.device import CPU, device, of
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.ops import TABLE
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import apply, fused, grad

THERE = device(DEVICE)
CUPY = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
DTYPES = ["float32", "bfloat16", "float16"]
# One rounding of the result, and of a float32 result what sums in another order differ by.
CLOSE = {"float32": 2e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(precision.dtype(dtype))


def close(found, expected, dtype, tolerance=1.0):
    """Arrays of any device; the largest number that is expected sets the scale, or 1: such numbers
    go in, and what they cancel to is as inexact.
    """
    found, expected = (of(a).numpy(a).astype(np.float64) for a in (found, expected))
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    scale = np.nan_to_num(np.abs(expected)).max(initial=1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * CLOSE[dtype] * scale)


def everywhere(op, arrays, attributes, dtype, where, g_dtype):
    """[y, gradients...] of an op on Tensors there, in that dtype; g is rounded to g_dtype."""
    tensors = [Tensor(a, is_float(a)).to(dtype) if is_float(a) else a for a in arrays]
    leaves = [
        t.detach().to(where).requires_grad_() if isinstance(t, Tensor) else t for t in tensors
    ]
    y = apply(op, *leaves, **attributes)
    assert of(y.data) is device(where)
    names = op.arrays * len(leaves) if op.variadic else op.arrays
    has_gradient = [op.domains.get(name) not in ("bool", "constant", "target") for name in names]
    xs = [x for x, has in zip(leaves, has_gradient) if has and isinstance(x, Tensor)]
    if not y.requires_grad:
        return [y.data]
    g = Tensor(cotangent(y.shape)).to(g_dtype).to(y.dtype).to(where)
    found = grad(y, xs, g, allow_unused=True)
    return [y.data, *(d.data for d in found if d is not None)]


@pytest.mark.parametrize("op", TABLE.values(), ids=TABLE)
@settings(max_examples=4)
@given(data=st.data())
def test_an_op_is_on_the_device_what_it_is_on_the_cpu(op, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    arrays, attributes = data.draw(arguments(op))
    if attributes.get("dtype") == "float64":
        attributes = {"dtype": "float32"}
    # The truth is what float32 gives for the rounded numbers.
    narrow = precision.dtype(dtype)
    rounded = [a.astype(narrow).astype(np.float32) if is_float(a) else a for a in arrays]
    expected = everywhere(op, rounded, attributes, "float32", "cpu", dtype)
    found = everywhere(op, rounded, attributes, dtype, DEVICE, dtype)
    for a, b in zip(found, expected, strict=True):
        close(a, b, dtype, tolerance=4)


# --- 16 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_are_float32_and_the_rest_is_rounded_once(dtype, where):
    x = Tensor(normal(6, 5, dtype=dtype)).to(where)
    t = THERE.put(np.arange(6) % 5) if where == DEVICE else np.arange(6) % 5
    assert F.cross_entropy(x, t).dtype == np.float32 == F.mse_loss(x, x).dtype
    wide = x.float()
    for f in (F.softmax, F.gelu, lambda x: x.sum(0), lambda x: x @ x.T, lambda x: (x * x).mean()):
        y = f(x)
        assert y.dtype == x.dtype
        close(y.data, f(wide).data, dtype, tolerance=2)


def test_a_long_sum_of_16_bits_does_not_stop():
    ones = Tensor(np.ones(3000, precision.dtype("bfloat16")))  # 256 + 1 is 256 in bfloat16
    assert float(ones.sum()) == 3008  # 3000, rounded once
    assert float(ones.mean()) == 1


def test_16_and_32_bits_together_give_32():
    assert (Tensor(normal(3)) + Tensor(normal(3, dtype="bfloat16"))).dtype == np.float32
    x = Tensor(normal(3, dtype="bfloat16"), requires_grad=True)
    (x * Tensor(normal(3))).sum().backward()
    assert x.grad.dtype == x.dtype


# --- CuPy -----------------------------------------------------------------------------------------


def calls_of_xp():
    """(name, keywords) of what the ops' lines call, as their sources and their attributes say."""
    for file in Path(inspect.getfile(type(TABLE["add"]))).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("xp."):
                yield node.func.attr, {keyword.arg for keyword in node.keywords}
    for op in TABLE.values():
        if op.primitive:
            yield op.name, set(op.attributes)


@CUPY
def test_cupy_has_the_functions_that_ops_call_with_their_keywords():
    import cupy

    ours, ufuncs = vars(backend._space.__wrapped__(THERE)), []
    for name, keywords in calls_of_xp():
        if name in ours or (name in TABLE and not TABLE[name].primitive):
            continue
        function = getattr(cupy, name)
        if isinstance(function, cupy.ufunc):
            ufuncs.append(name)
            assert not keywords
        elif keywords:
            assert keywords <= set(inspect.signature(function).parameters), name
    assert {"exp", "add"} <= set(ufuncs)


# --- moving ---------------------------------------------------------------------------------------


def test_gradients_move_back_to_where_the_leaf_is():
    x = Tensor(normal(3, 4), requires_grad=True)
    y = (x.to(DEVICE) * 2).softmax(-1)
    assert (x.device, y.device) == ("cpu", THERE.name)
    y.to("cpu")[0, 0].backward()
    expected = Tensor(x.data, requires_grad=True)
    (expected * 2).softmax(-1)[0, 0].backward()
    assert x.grad.device == "cpu"
    np.testing.assert_allclose(x.grad.data, expected.grad.data, rtol=1e-5, atol=1e-7)
    assert x.to("cpu") is x and y.to(DEVICE) is y


def test_second_derivatives_of_what_kernels_computed():
    def penalty(x):
        (g,) = grad(F.gelu(x).softmax(-1)[0].sum() + (x * x).sum(), x, create_graph=True)
        return grad((g * g).sum(), x)[0]

    x = normal(2, 3)
    there = penalty(Tensor(x).to(DEVICE).requires_grad_())
    here = penalty(Tensor(x, requires_grad=True))
    close(there.data, here.data, "float32", tolerance=10)


def test_what_numpy_and_python_see_of_it():
    x = Tensor(normal(2, 3)).to(DEVICE)
    assert type(x.numpy()) is np.ndarray and np.array_equal(x.numpy(), normal(2, 3))
    assert np.array_equal(np.asarray(x), normal(2, 3))
    assert f"device='{THERE.name}'" in repr(x)
    assert x.tolist() == normal(2, 3).tolist() and float(x[0, 0]) == x[0, 0].item()
    assert np.array_equal((x > 0).numpy(), normal(2, 3) > 0)
    ids = np.array([1, 0])
    assert np.array_equal(x[ids].numpy(), normal(2, 3)[ids])
    assert np.array_equal(x[x > 0].numpy(), normal(2, 3)[normal(2, 3) > 0])


def test_a_module_moves_as_a_whole_and_stays_tied():
    model = GPT(GPTConfig(vocab_size=11, context_length=4, emb_dim=8, n_heads=2, n_layers=1))
    before, table = model.state_dict(), model.tok_emb.weight
    assert model.to(DEVICE) is model and model.device == THERE.name
    assert model.out_head.weight is model.tok_emb.weight is table
    assert {p.device for p in model.parameters()} == {THERE.name}
    after = model.to("bfloat16").state_dict()
    assert all(type(a) is np.ndarray for a in after.values())
    assert {a.dtype for a in after.values()} == {precision.dtype("bfloat16")}
    model.to("float32").load_state_dict(before)
    assert all(np.array_equal(a, before[name]) for name, a in model.state_dict().items())
    assert model.to("cpu").device == "cpu"


def test_a_module_on_two_devices_has_none():
    layer = nn.Linear(3, 2)
    layer.bias.data = THERE.put(layer.bias.data)
    with pytest.raises(ValueError, match=f"Linear has parameters on cpu and {THERE.name}"):
        layer.device  # noqa: B018


# --- fused kernels --------------------------------------------------------------------------------

WEIGHTS = [
    normal(*shape, seed=i) for i, shape in enumerate([(2, 3, 4), (8, 4), (8,), (4, 8), (4,)])
]


def mlp(x, up, b, down, c):
    return F.linear(F.gelu(F.linear(x, up, b), "tanh"), down, c)


def attend(qkv):
    q, k, v = (qkv[..., i : i + 4].reshape(2, 3, 2, 2).transpose(1, 2) for i in (0, 4, 8))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(-2)


FUSED = {
    "mlp": (mlp, WEIGHTS, {"activation": "gelu_tanh"}),
    "self_attention": (attend, [normal(2, 3, 12)], {"heads": 2, "causal": True}),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_kernel_is_its_definition_up_to_second_derivatives(name):
    definition, arrays, attributes = FUSED[name]

    def run(function, where):
        leaves = [Tensor(a).to(where).requires_grad_() for a in arrays]
        y = function(*leaves)
        found = grad(y.sum() + (y * y).sum(), leaves, create_graph=True)
        length = sum(((g * g).sum() for g in found), Tensor(0.0).to(where))
        return [y, *found, *grad(length, leaves)]

    backend.refusals.clear()
    there = run(lambda *xs: fused(name, definition, *xs, **attributes), DEVICE)
    assert not [op for op, _ in backend.refusals if op == name]
    for a, b in zip(there, run(definition, "cpu"), strict=True):
        close(a.data, b.data, "float32", tolerance=10)


def test_second_derivatives_where_inputs_depend_on_each_other():
    """The table of tied weights is both in the input and in the weight of the fused loss; the same
    feed-forward network twice has its weights in both.
    """
    cfg = GPTConfig(11, 4, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)
    found, ids = [], np.array([[1, 2, 3, 1]])
    for where in ("cpu", DEVICE):
        model = GPT(cfg, Generator(0)).to(where)
        feed_forward = model.blocks[0].ff
        x = model.hidden_states(ids)
        loss = model.loss(ids, ids + 1) + (feed_forward(feed_forward(x)) ** 2).mean()
        first = grad(loss, list(model.parameters()), create_graph=True)
        length = sum(((g * g).sum() for g in first), Tensor(0.0).to(where))
        found.append([*first, *grad(length, list(model.parameters()))])
    for here, there in zip(*found, strict=True):
        close(there.data, here.data, "float32", tolerance=10)


def test_dropout_on_a_gpu_has_no_second_derivatives():
    x = Tensor(normal(4, 8)).to(DEVICE).requires_grad_()
    y = F.dropout(x, 0.5, generator=Generator(1))
    with pytest.raises(RuntimeError, match="dropout on a GPU has no second derivatives"):
        grad((y * y).sum(), x, create_graph=True)


def test_the_fused_loss_is_that_of_the_logits():
    x, w, t = normal(2, 3, 4), normal(7, 4, seed=1), np.array([[0, 6, -100], [2, 2, 5]])
    found = []
    for where in ("cpu", DEVICE):
        leaves = [Tensor(a).to(where).requires_grad_() for a in (x, w)]
        loss = F.linear_cross_entropy(*leaves, t)
        loss.backward()
        found.append([loss, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        close(b.data, a.data, "float32")
    with pytest.raises(IndexError, match="target 7 is out of range"):
        F.linear_cross_entropy(*leaves, np.array([[0, 7, 1], [1, 1, 1]]))
    with tg.no_grad():
        assert not F.linear_cross_entropy(*leaves, t).requires_grad


def test_dropout_draws_by_itself_and_repeatably():
    x = Tensor(np.ones((40, 50), np.float32)).to(DEVICE).requires_grad_()
    y = F.dropout(x, 0.3, generator=Generator(3))
    y.sum().backward()
    kept = y.detach().numpy()
    assert np.array_equal(x.grad.numpy(), kept)  # the same mask again
    assert 0.65 < (kept > 0).mean() < 0.75 and np.allclose(kept[kept > 0], 1 / 0.7)
    again = F.dropout(x, 0.3, generator=Generator(3)).detach().numpy()
    other = F.dropout(x, 0.3, generator=Generator(4)).detach().numpy()
    assert np.array_equal(again, kept) and not np.array_equal(other, kept)


# --- which code runs ------------------------------------------------------------------------------


def test_what_a_kernel_refuses_the_ops_own_lines_do_and_it_is_counted():
    q = Tensor(normal(1, 2, 3, 4)).to(DEVICE)
    seen = np.tril(np.ones((3, 3), bool))
    backend.refusals.clear()
    y = F.scaled_dot_product_attention(q, q, q, mask=seen)
    (refused,) = backend.refusals
    assert refused[0] == "attention" and "M is an array" in refused[1]
    here = F.scaled_dot_product_attention(*[Tensor(q.numpy())] * 3, mask=seen)
    close(y.data, here.data, "float32")


@pytest.mark.parametrize("choice", ["auto", "off", "off:softmax"])
def test_kernels_are_switched_off_one_by_one(choice):
    ran = []

    def watched(x, *, axis=-1):
        ran.append(axis)
        return softmax.forward(x, axis=axis)

    softmax = backend.CPU.on(THERE).kernels["softmax"]
    reading = backend.reading(choice)
    with backend.using(reading):
        inside = reading.on(THERE)
        if inside[TABLE["softmax"]].is_kernel:
            inside[TABLE["softmax"]].forward = watched
        try:
            y = Tensor(normal(2, 3)).to(DEVICE).softmax(-1)
            has_others = inside[TABLE["layer_norm"]].is_kernel
        finally:
            inside.pop(TABLE["softmax"])
    assert bool(ran) == (choice == "auto") and has_others == (choice != "off")
    close(y.data, Tensor(normal(2, 3)).softmax(-1).data, "float32")


@pytest.mark.parametrize("choice", ["on", "off:", "off:softmax,nonsense", ""])
def test_a_choice_of_kernels_that_is_none(choice):
    with pytest.raises(ValueError, match=r"expected auto, off, or off: and names of ops"):
        backend.reading(choice)


# --- what does not fit ----------------------------------------------------------------------------

HERE_AND_THERE = [
    (lambda a, b: a + b, "add of tensors on cpu and"),
    (lambda a, b: F.linear(a, b), "linear of tensors on cpu and"),
    (lambda a, b: F.embedding(Tensor([0, 1]), b), "embedding of tensors on cpu and"),
    (lambda a, b: F.cross_entropy(b, Tensor([0, 1, 0])), "cross_entropy of tensors on cpu and"),
    (lambda a, b: fused("mlp", mlp, b, a, b, a, b), "mlp of tensors on cpu and"),
]


@pytest.mark.parametrize("call, message", HERE_AND_THERE, ids=lambda x: str(x).split()[0])
def test_tensors_on_two_devices(call, message):
    with pytest.raises(TypeError, match=rf"{message} {THERE.name}: move them to one device"):
        call(Tensor(normal(3, 3)), Tensor(normal(3, 3)).to(DEVICE))


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "tpu", 3, None])
def test_a_name_of_no_device(name):
    with pytest.raises(ValueError, match=r"there is no device .*; expected cpu, cuda"):
        device(name)


def process(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    return done.stdout.strip() or done.stderr


A_DRIVER = "import ctypes, sys; ctypes.CDLL = lambda name: None"  # as if there were one
WITHOUT = [
    (f"{A_DRIVER}; sys.modules['cupy'] = None", "CuPy is not installed: pip install"),
    ("", "there is no NVIDIA driver here|there is no NVIDIA GPU here|CUDA cannot be started"),
]


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
@pytest.mark.parametrize("before, reason", WITHOUT, ids=["no CuPy", "no GPU"])
def test_without_a_gpu(before, reason):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = f"""
from tinygrad_llm import Tensor, device
{before}
where, why = device.automatic()
try:
    Tensor([1.0]).to("cuda:1")
except ValueError as error:
    print(where.name, "|", why, "|", error)
"""
    where, why, error = process(program, **environment).split(" | ")
    assert where == "cpu" and re.match(reason, why) and "\n" not in error
    assert error == f"cuda:1 cannot be used: {why}; without a GPU, use cpu"


def test_arrays_of_the_host_follow_the_tensors():
    x = Tensor(normal(2, 3)).to(DEVICE)
    assert (x * np.ones(3, np.float32)).device == THERE.name
    assert F.where(np.ones((2, 3), bool), x, 0.0).device == THERE.name
    assert F.embedding([[1, 0]], x).device == THERE.name
    assert of(np.ones(2)) is CPU is of(3.0)
