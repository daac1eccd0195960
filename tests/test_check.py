"""The checker is checked: planted bugs are caught and named, and what is right is never accused."""

import re

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, no_grad
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.check import GradientError, gradcheck
from tinygrad_llm.ops import TABLE, op
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import apply

# --- planting bugs --------------------------------------------------------------------------------


@pytest.fixture
def plant():
    """plant(name, vjp): the op of that name with another vjp, as a function of Tensors."""
    planted = []

    def wrong(name, vjp):
        right = TABLE[name]
        body = {"__doc__": right.doc, "forward": right.forward, "vjp": vjp}
        planted.append(f"wrong_{name}_{len(planted)}")
        wrong_op = op(right.signature, fixed=" ".join(right.fixed))(type(planted[-1], (), body))
        return lambda *arrays, **attributes: apply(wrong_op, *arrays, **attributes)

    yield wrong
    for name in planted:
        del TABLE[name]


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def zero(gradient, key):
    """The gradient with some elements set to 0."""
    gradient = np.array(gradient)
    gradient[key] = 0
    return gradient


def softmax_returns_0(xp, g, y, x, *, axis=-1):
    return (0 * g,)


def softmax_without_the_sum(xp, g, y, x, *, axis=-1):
    return (g * y,)


def layer_norm_terms(without):
    """layer_norm's vjp without its mean term, or without its x̂ term."""

    def vjp(xp, g, y, x, w, b, *, eps=1e-5, saved):
        mu, r = saved
        x_hat = (x - mu) * r
        u = g * w
        mean = xp.mean(u, axis=-1, keepdims=True)
        along = x_hat * xp.mean(u * x_hat, axis=-1, keepdims=True)
        kept = {"mean": u - along, "x_hat": u - mean}[without]
        return r * kept, g * x_hat, g

    return vjp


def embedding_assigns(xp, g, y, w, t):
    w_bar = np.zeros(w.shape)
    w_bar[t] = g
    return w_bar, None


def bias_is_averaged(xp, g, y, x, w, b):
    right = TABLE["linear"].vjp(xp, g, y, x, w, b)
    return (*right[:2], right[2] / len(x))


def matmul_transposed(xp, g, y, a, b):
    return g @ xp.matrix_transpose(b), xp.matrix_transpose(g) @ a


def gelu_with(constant):
    def vjp(xp, g, y, x):
        c = np.sqrt(2 / np.pi)
        t = xp.tanh(c * (x + constant * x**3))
        return (g * ((1 + t) + x * (1 - t * t) * c * (1 + 3 * constant * x * x)) / 2,)

    return vjp


def last_17_columns_missing(xp, g, y, x, t, *, ignore_index=-100, saved):
    right, _ = TABLE["cross_entropy"].vjp(xp, g, y, x, t, ignore_index=ignore_index, saved=saved)
    return zero(right, np.s_[:, -17:]), None


def square_without(key):
    def vjp(xp, g, y, x, *, exponent):
        return (zero(2 * g * x, key),)

    return vjp


def constant(value):
    """A gradient that is the same number everywhere but for one element, which is right."""

    def vjp(xp, g, y, x):
        return (np.where(np.arange(x.size) == 3, value, -g * np.sin(x)),)

    return vjp


IDS = np.array([1, 1, 0, 3, 1])
BUGS = {  # name of the op, wrong vjp, inputs, attributes, the input that is accused
    "softmax returns 0": ("softmax", softmax_returns_0, [normal(4, 5)], {}, 0),
    "softmax without the sum": ("softmax", softmax_without_the_sum, [normal(4, 5)], {}, 0),
    "layer_norm without the mean": ("layer_norm", layer_norm_terms("mean"),
                                    [normal(4, 5), normal(5), normal(5, seed=1)], {}, 0),
    "layer_norm without x̂": ("layer_norm", layer_norm_terms("x_hat"),
                             [normal(4, 5), normal(5), normal(5, seed=1)], {}, 0),
    "layer_norm without the mean, wide": ("layer_norm", layer_norm_terms("mean"),
                                          [normal(4, 2048), normal(2048), normal(2048)], {}, 0),
    "embedding assigns": ("embedding", embedding_assigns, [normal(4, 3), IDS], {}, 0),
    "bias is averaged": ("linear", bias_is_averaged, [normal(6, 3), normal(2, 3), normal(2)],
                         {}, 2),
    "matmul's b̄ transposed": ("matmul", matmul_transposed, [normal(4, 4), normal(4, 4, seed=1)],
                              {}, 1),
    "gelu 0.0447": ("gelu_tanh", gelu_with(0.0447), [normal(40)], {}, 0),
    "gelu 0.0415": ("gelu_tanh", gelu_with(0.0415), [normal(40)], {}, 0),
    "cross_entropy's last 17 columns": ("cross_entropy", last_17_columns_missing,
                                        [normal(32, 2048), np.arange(32) * 60], {}, 0),
    "x², 1 element of 10,000": ("power", square_without(37), [normal(10_000)], {"exponent": 2}, 0),
    "x², 1 element of 1,000,000": ("power", square_without(123_456), [normal(1_000_000)],
                                   {"exponent": 2}, 0),
    "x², everything": ("power", square_without(np.s_[:]), [normal(10_000)], {"exponent": 2}, 0),
    "infinity": ("cos", constant(np.inf), [normal(8)], {}, 0),
    "NaN": ("cos", constant(np.nan), [normal(8)], {}, 0),
}  # fmt: skip


def test_the_planting_itself_is_innocent(plant):
    for name, _, inputs, attributes, _ in BUGS.values():
        right = plant(name, TABLE[name].vjp)
        gradcheck(lambda *xs, f=right, a=attributes: f(*xs, **a), *inputs, directions=1)


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught_and_its_input_named(plant, bug):
    name, vjp, inputs, attributes, accused = bug
    wrong = plant(name, vjp)
    with pytest.raises(GradientError, match=f"gradient of input {accused}, shape") as error:
        gradcheck(lambda *xs: wrong(*xs, **attributes), *inputs)
    assert re.search(r"at element \(.*\): backward gives .* complex step gives", str(error.value))
    assert "\n" not in str(error.value)


SMALL = {k: b for k, b in BUGS.items() if sum(x.size for x in b[2]) < 1000}
LOSSES = {
    "scaled by 1e-7": lambda y, w: y * 1e-7,
    "scaled by 1e7": lambda y, w: y * 1e7,
    "scaled by 1e200": lambda y, w: y * 1e200,
    "a weighted sum scaled by 1e-7": lambda y, w: (y * w).sum() * 1e-7,
    "deep inside": lambda y, w: ((y * w).tanh() + y).sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("bug", SMALL.values(), ids=SMALL)
def test_a_planted_bug_is_caught_at_any_scale_and_with_any_seed(plant, bug, loss):
    name, vjp, inputs, attributes, accused = bug
    wrong = plant(name, vjp)
    with no_grad():
        weights = normal(*wrong(*inputs, **attributes).shape, seed=9)
    for seed in range(8):
        with pytest.raises(GradientError, match=f"gradient of input {accused}, shape"):
            gradcheck(lambda *xs: loss(wrong(*xs, **attributes), weights), *inputs, seed=seed)


def test_a_backward_of_zero_is_caught_when_the_loss_is_a_plain_sum_scaled_by_a_ten_millionth(plant):
    wrong = plant("power", square_without(np.s_[:]))
    for seed in range(20):
        with pytest.raises(GradientError):
            gradcheck(lambda x: wrong(x, exponent=2).sum() * 1e-7, normal(50), seed=seed)


def test_the_smallest_constant_bug_is_caught_with_every_seed(plant):
    wrong = plant("gelu_tanh", gelu_with(0.0447))
    for seed in range(100):
        with pytest.raises(GradientError):
            gradcheck(wrong, normal(40, seed=seed), seed=seed)


@pytest.mark.parametrize("shape, element", [((10_000,), (37,)), ((7, 11, 13), (3, 0, 12)),
                                            ((1, 1), (0, 0)), ((), ())])  # fmt: skip
def test_the_wrong_element_is_named_with_both_values(plant, shape, element):
    wrong = plant("power", square_without(element))
    a, x = normal(), np.asarray(normal(*shape)) + 3
    for seed in range(5):
        with pytest.raises(GradientError) as error:
            gradcheck(lambda a, b: a * b + wrong(b, exponent=2), a, x, seed=seed)
        message = str(error.value)
        assert f"input 1, shape {shape}, at element {element}:" in message
        backward, numeric = map(float, re.findall(r"gives (-?[\d.e+-]+)", message))
        np.testing.assert_allclose(numeric / backward, (a + 2 * x[element]) / a)


def test_an_input_whose_gradient_is_lost_is_named():
    with pytest.raises(GradientError, match=r"input 1, .*backward gives 0,"):
        gradcheck(lambda a, b: a * b.detach(), normal(3), normal(3, seed=1))
    with pytest.raises(GradientError, match=r"input 0, .*backward gives 0,"):
        gradcheck(lambda a: a.detach() * 2, normal(3))


def test_positions_count_the_integers_too(plant):
    wrong = plant("embedding", embedding_assigns)
    with pytest.raises(GradientError, match="input 2,"):
        gradcheck(lambda t, m, w: F.where(m, wrong(w, t), 0.0), IDS, np.array(True), normal(4, 3))


# --- false alarms ---------------------------------------------------------------------------------


def deep(x):
    for _ in range(12):
        x = (x @ x.mT @ x * 0.1).tanh() + x
    return x


def cancelling(x):
    """Large terms whose difference is next to nothing."""
    return (x + 1e6) - x * 1.0 - F.log_softmax(x).exp().sum(-1, keepdims=True) * 1e6


RIGHT = {
    "x²": lambda x: x**2,
    "a constant": lambda x: x * 0 + 1,
    "Σ softmax": lambda x: F.softmax(x).sum(),
    "Σ softmax scaled": lambda x: F.softmax(x).sum() * 1e-7,
    "Σ log_softmax": lambda x: F.log_softmax(x).sum(),
    "mean of a normalised row": lambda x: F.layer_norm(x, np.ones(4), np.zeros(4)).sum(),
    "normalised": lambda x: F.layer_norm(x, np.ones(4), np.zeros(4)) ** 2,
    "1e-7 x³": lambda x: x**3 * 1e-7,
    "1e7 x³": lambda x: x**3 * 1e7,
    "1e-200 x³": lambda x: x**3 * 1e-200,
    "1e200 x³": lambda x: x**3 * 1e200,
    "deep": deep,
    "cancelling": cancelling,
    "relu": lambda x: F.relu(x) * 3,
    "extrema": lambda x: x.max(-1) + x.min(0).sum() + F.maximum(x, 0.1).sum(),
    "exp of large": lambda x: (x * 20).exp(),
    "gelu": F.gelu,
    "indexing": lambda x: x[[0, 0, 2]] * x[:, ::-1][1, :1],
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "cross_entropy": lambda x: F.cross_entropy(x, [0, 3, -100]),
    "zeros": lambda x: (x - x) * x,
}


@pytest.mark.parametrize("f", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_never_accused(f):
    for seed in range(300):
        gradcheck(f, normal(3, 4, seed=seed), seed=seed, directions=1)


KINKED = {
    "relu": F.relu,
    "abs": abs,
    "maximum": lambda x: F.maximum(x, 0.0),
    "clip": lambda x: x.clip(0.0, 1.0),
}


@pytest.mark.parametrize("x", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("f", KINKED.values(), ids=KINKED)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_kinks_follow_the_branch_that_was_taken(f, x, shape):
    for seed in range(5):  # both signs of the direction
        gradcheck(f, np.full(shape, x), seed=seed)


def test_a_right_gradient_has_a_small_reported_error():
    assert 0 <= gradcheck(lambda a, b: a @ b, normal(3, 4), normal(4, 2)) < 1e-13
    assert gradcheck(lambda x: x * 1.0, normal(3)) < 1e-15


# --- what may be passed ---------------------------------------------------------------------------


def test_integers_and_booleans_are_passed_on_unchanged():
    seen = []

    def f(t, m, w):
        seen.append((t.dtype, m.dtype))
        assert isinstance(t, Tensor)
        return F.where(m, F.embedding(t, w), 0.0)

    gradcheck(f, np.array([1, 0, 1]), np.array([[True], [False], [True]]), normal(2, 3))
    assert set(seen) == {(np.dtype(np.int64), np.dtype(bool))}


@pytest.mark.parametrize("make", [Tensor, np.array, list, np.float32, lambda a: Tensor(a, True)])
def test_inputs_of_any_kind_are_checked_in_float64(make):
    def f(x):
        assert x.dtype in (np.float64, np.complex128)
        return x * x

    assert gradcheck(f, make([0.3, 0.7])) < 1e-13


def test_inputs_are_left_alone():
    x = Tensor(normal(3), requires_grad=True)
    before = x.data.copy()
    gradcheck(lambda x: x * x, x)
    assert x.grad is None
    np.testing.assert_array_equal(x.data, before)
    readonly = normal(3)
    readonly.flags.writeable = False
    gradcheck(lambda x: x * x, readonly)


def test_empty_inputs_are_right():
    assert gradcheck(lambda x: x * 2, np.zeros((0, 3))) == 0


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
def test_the_reading_in_force_is_the_one_checked(reading, monkeypatch):
    used = []
    chosen = getattr(backend, reading)
    right = chosen[TABLE["tanh"]].vjp
    monkeypatch.setattr(
        chosen[TABLE["tanh"]], "vjp", lambda *a, **k: used.append(1) or right(*a, **k)
    )
    with backend.using(chosen):
        gradcheck(lambda x: x.tanh(), normal(3))
        assert backend.current.reading is chosen
    assert used


def test_a_function_that_gives_something_else_each_time_is_a_value_error():
    generator = Generator(0)
    with pytest.raises(ValueError, match="another result each time"):
        gradcheck(lambda x: F.dropout(x, 0.5, generator=generator), normal(20))
    gradcheck(lambda x: F.dropout(x, 0.5, generator=Generator(0)), normal(20))


@pytest.mark.parametrize("value", [None, 1.0, np.ones(3), (Tensor(1.0), Tensor(2.0))])
def test_a_function_that_returns_no_tensor_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"must return a Tensor, not {type(value).__name__}"):
        gradcheck(lambda x: value, normal(3))


def test_what_has_no_complex_derivative_is_refused_not_passed():
    with pytest.raises(TypeError, match="complex"), backend.using(backend.COMPLEX):
        np.abs(np.ones(1, complex).view(backend.ComplexStep))


def test_integers_alone_cannot_be_checked():
    with pytest.raises(TypeError, match="floating-point"):
        gradcheck(lambda x: x * x, np.array([1, 2]))
