"""The checker is checked: planted bugs are caught and named, and what is right is never accused."""

import re
from functools import partial

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, no_grad
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.check import GradientError, MeasurementError, gradcheck
from tinygrad_llm.check.derivative import central_differences, one_sided_differences
from tinygrad_llm.check.rounding import spread
from tinygrad_llm.ops import TABLE, op
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import apply

# --- planting bugs --------------------------------------------------------------------------------


@pytest.fixture
def define():
    """define(forward, vjp, signature): an op of one's own, as a function of Tensors."""
    known = set(TABLE)

    def new(forward, vjp, signature="()->()", **options):
        body = {"__doc__": "y = f(x)", "forward": forward, "vjp": vjp}
        cls = type(f"own_op_{len(TABLE)}", (), body)
        return partial(apply, op(signature, **options)(cls))

    yield new
    for name in set(TABLE) - known:
        del TABLE[name]


@pytest.fixture
def plant(define):
    """plant(name, vjp): the op of that name with another vjp, as a function of Tensors."""

    def wrong(name, vjp):
        right = TABLE[name]
        return define(right.forward, vjp, right.signature, fixed=" ".join(right.fixed))

    return wrong


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


@pytest.mark.parametrize("bug", [b for k, b in BUGS.items() if "1,000,000" not in k])
def test_a_planted_bug_is_caught_by_differences_too(plant, bug):
    name, vjp, inputs, attributes, accused = bug
    wrong = plant(name, vjp)
    with pytest.raises(GradientError, match=f"gradient of input {accused}, .*central differences"):
        gradcheck(lambda *xs: wrong(*xs, **attributes), *inputs, derivative="differences")


def test_the_error_says_all_that_its_message_says(plant):
    wrong = plant("power", square_without(4))
    with pytest.raises(GradientError) as error:
        gradcheck(lambda n, x: wrong(x, exponent=2), np.array(3), normal(7))
    assert (error.value.input, error.value.element, error.value.analytic) == (1, (4,), 0)
    assert f"a complex step gives {error.value.numeric:.12g} " in str(error.value)


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


# --- attempts to get by ---------------------------------------------------------------------------


def test_a_backward_pass_that_is_all_rounding_excuses_nothing(define):
    def noisy(large):
        return lambda xp, g, y, x: ((g * y + large) - large,)

    for large in (1e12, 1e17, 1e30):
        with pytest.raises(GradientError):
            gradcheck(define(lambda xp, x: xp.exp(x), noisy(large)), normal(3, 4))


def test_a_large_input_hides_no_small_one(define):
    zero = define(lambda xp, x: x * 1.0, lambda xp, g, y, x: (0 * g,))
    with pytest.raises(GradientError, match="gradient of input 1,"):
        gradcheck(lambda a, b: 1 / a + zero(b), normal(3) * 1e-8, normal(3, seed=1))
    with pytest.raises(GradientError, match="gradient of input 1,"):
        gradcheck(lambda a, b: a * 1e9 + zero(b) * 1e-3, normal(3), normal(3, seed=1))


def test_a_tiny_element_hides_no_other(define):
    def vjp(xp, g, y, x):
        return (g / x * xp.where(x > 0.5, 2.0, 1.0),)

    with pytest.raises(GradientError, match=r"at element \((1|2),\)"):
        gradcheck(define(lambda xp, x: xp.log(x), vjp), np.array([1e-16, 1.0, 2.0]))


def test_an_input_on_the_bound_of_a_branch_hides_no_error_elsewhere(define):
    def vjp(xp, g, y, x):
        return (g * xp.cos(x) * (1 + 1e-8),)

    wrong = define(lambda xp, x: xp.sin(x), vjp)
    with pytest.raises(GradientError, match="gradient of input 0,"):
        gradcheck(lambda a, b: wrong(a) + F.relu(b - 1) * 10, normal(3), np.ones(3))


@pytest.mark.parametrize("f", [lambda x: (x * x).sqrt(), lambda x: (x * x).sum(-1).sqrt()])
def test_nan_from_backward_is_an_error_at_once(f):
    with pytest.raises(GradientError, match=r"at element \(0, 0\): backward gives nan"):
        gradcheck(f, np.array([[0.0, 0.0], [1.0, 2.0]]))


@pytest.mark.parametrize("x", [[1.0, -1.0], [1.0, np.nan], [np.inf, 1.0], [0.0, 1.0]])
def test_where_f_is_not_defined_nothing_is_measured(x):
    with pytest.raises(MeasurementError, match=r"nan|infinity|no finite derivative"):
        gradcheck(lambda x: x.log(), x)


def test_infinite_constants_are_no_trouble():
    gradcheck(lambda x: x * x + np.array([0, 0, -np.inf]), normal(3))


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
    "cancels between branches": lambda x: F.relu(F.layer_norm(F.relu(x), np.ones(4), np.zeros(4))),
    "two columns": lambda x: F.relu(F.layer_norm(F.relu(x[:, :2]), np.ones(2), np.zeros(2))),
    "Σ softmax between branches": lambda x: F.relu(F.softmax(F.relu(x))).sum(),
    "Σ of some rows": lambda x: F.softmax(F.relu(x))[1:].sum(),
}


@pytest.mark.parametrize("f", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_never_accused(f):
    for seed in range(300):
        gradcheck(f, normal(3, 4, seed=seed), seed=seed, directions=1)


BUT_ROUNDING = ["cancelling", "mean of a normalised row", "two columns"]


@pytest.mark.parametrize("f", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_not_accused_by_differences_or_to_second_order_either(f):
    for seed in range(40):
        x = normal(3, 4, seed=seed)
        gradcheck(f, x, seed=seed, directions=1, order=2)
        try:
            gradcheck(f, x, seed=seed, directions=1, derivative="differences")
        except ValueError as error:
            assert "cannot be measured" in str(error)
            assert any(f is RIGHT[name] for name in BUT_ROUNDING)


@pytest.mark.parametrize("scale", [1e-70, 1e-7, 1.0, 1e7, 1e70])
@pytest.mark.parametrize("f", [lambda x: (1 / x).sum(), lambda x: x * x, lambda x: x.abs().sqrt()])
def test_the_size_of_the_inputs_does_not_matter(plant, f, scale):
    x = np.abs(normal(6)) + 0.5
    wrong = plant("multiply", lambda xp, g, y, a, b: (g * b * (1 + 1e-7), g * a))
    for derivative in (None, "differences"):
        assert gradcheck(f, x * scale, derivative=derivative) < 1e-11
        with pytest.raises(GradientError):
            gradcheck(lambda x: wrong(f(x), x), x * scale, derivative=derivative)


# --- differences ----------------------------------------------------------------------------------

SMOOTH = {  # a function of one array, its derivative
    "sin": (np.sin, np.cos),
    "exp": (np.exp, np.exp),
    "x^5": (lambda x: x**5, lambda x: 5 * x**4),
    "1 / x": (lambda x: 1 / x, lambda x: -1 / x**2),
    "sin 100 x": (lambda x: np.sin(100 * x), lambda x: 100 * np.cos(100 * x)),
    "1e6 + x": (lambda x: 1e6 + x, np.ones_like),
    "tanh 3 x": (lambda x: np.tanh(3 * x), lambda x: 3 / np.cosh(3 * x) ** 2),
}


@pytest.mark.parametrize("f, slope", SMOOTH.values(), ids=SMOOTH)
def test_the_error_bar_of_differences_covers_their_error(f, slope):
    for seed in range(20):
        x = normal(500, seed=seed)
        exact = slope(x) * x
        ways = [central_differences, *(partial(one_sided_differences, side=s) for s in (1, -1))]
        for differences, limit in zip(ways, (1e-9, 1e-5, 1e-5)):
            noise = spread(lambda arrays: [f(arrays[0])], [x])[0]
            found, bar = differences(lambda xs: f(xs[0]), [x], [x], noise=noise)
            assert (np.abs(found - exact) <= 10 * bar).all()
            assert np.median(bar / (np.abs(exact) + np.abs(f(x)))) < limit


def test_what_takes_no_complex_numbers_is_measured_by_differences(define):
    right = define(lambda xp, x: np.abs(x), lambda xp, g, y, x: (g * np.sign(x),))
    wrong = define(lambda xp, x: np.abs(x), lambda xp, g, y, x: (g * np.sign(x) * (1 + 1e-9),))
    assert gradcheck(right, normal(3, 4)) < 1e-11
    with pytest.raises(GradientError, match="central differences give"):
        gradcheck(wrong, normal(3, 4))
    with pytest.raises(TypeError, match="complex"):
        gradcheck(right, normal(3, 4), derivative="complex step")


@pytest.mark.parametrize("factor", [1, 1 + 1e-9, 0])
def test_what_drops_imaginary_parts_without_a_word_is_measured_by_differences(define, factor):
    def forward(xp, x):
        return np.linalg.norm(np.asarray(x), axis=-1)

    def vjp(xp, g, y, x):
        return (factor * g[..., None] * x / y[..., None],)

    norm = define(forward, vjp, "(n)->()")
    if factor == 1:
        assert gradcheck(norm, normal(3, 4)) < 1e-11
    else:
        with pytest.raises(GradientError, match="central differences give"):
            gradcheck(norm, normal(3, 4))


def test_what_cannot_be_measured_is_a_value_error_not_a_pass(define):
    rough = define(lambda xp, x: np.round(np.real(x) * 1e4), lambda xp, g, y, x: (0 * g,))
    with pytest.raises(ValueError, match="cannot be measured here"):
        gradcheck(rough, normal(3, 4), derivative="differences")


# --- second derivatives ---------------------------------------------------------------------------


def test_a_bug_in_second_derivatives_alone_is_seen_by_order_2_alone(define):
    def vjp(xp, g, y, x):
        return (g * xp.cos(x.detach() if isinstance(x, Tensor) else x),)

    wrong = define(lambda xp, x: xp.sin(x), vjp)
    gradcheck(wrong, normal(3))
    with pytest.raises(GradientError, match=r"wrong second derivative of input 0, shape \(3,\)"):
        gradcheck(wrong, normal(3), order=2)


def test_second_derivatives_by_the_cotangent_are_checked_too(define):
    def vjp(xp, g, y, x):
        return (xp.exp(x) * (g.detach() if isinstance(g, Tensor) else g),)

    wrong = define(lambda xp, x: xp.exp(x), vjp)
    with pytest.raises(GradientError, match="wrong second derivative of input 1,"):
        gradcheck(wrong, normal(3), order=2)


def test_order_2_takes_integers_and_what_f_does_not_depend_on():
    ids = np.array([1, 0, 1])
    gradcheck(lambda t, w: F.embedding(t, w) ** 3, ids, normal(2, 3), order=2)
    gradcheck(lambda a, b: a.exp() + 0 * b, normal(3), normal(3), order=2)
    gradcheck(lambda a, b: a.exp(), normal(3), normal(2), order=2)
    gradcheck(lambda a: Tensor(np.ones(2)), normal(2), order=2)


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


def relu_forward(xp, x):
    return xp.where(x <= 0, 0, x)


def relu_vjp(at_zero):
    return lambda xp, g, y, x: (xp.where(x < 0, 0.0, xp.where(x == 0, at_zero * g, g)),)


@pytest.mark.parametrize("at_zero, is_right", [(0, True), (0.3, True), (1, True), (1.01, False),
                                               (-0.01, False), (2, False)])  # fmt: skip
def test_any_slope_between_those_of_the_two_sides_of_a_kink_is_right(define, at_zero, is_right):
    relu = define(relu_forward, relu_vjp(at_zero))
    x = normal(3, 4)
    x[0, :2] = x[2, 3] = 0
    for seed in range(5):
        if is_right:
            assert gradcheck(relu, x, seed=seed) < 1e-11
        else:
            with pytest.raises(GradientError, match=r"at element \(0, 0\), a kink: .* two sides"):
                gradcheck(relu, x, seed=seed)
        if at_zero != 0:  # the branch that forward takes
            with pytest.raises(GradientError, match="a complex step gives 0 "):
                gradcheck(relu, x, seed=seed, subgradients=False)


def test_a_kink_hides_no_bug_in_another_element(define):
    def vjp(xp, g, y, x):
        return (relu_vjp(1)(xp, g, y, x)[0] * xp.where(x == x.max(), 1 + 1e-9, 1.0),)

    x = normal(20)
    x[3] = x[11] = 0
    with pytest.raises(GradientError, match=rf"at element \({np.argmax(x)},\): backward"):
        gradcheck(define(relu_forward, vjp), x)


@pytest.mark.parametrize("shares, is_right", [((1, 0), True), ((0.5, 0.5), True), ((0, 0), False),
                                              ((1, 1), False)])  # fmt: skip
def test_the_shares_of_equal_numbers_in_a_maximum_must_add_up_to_one(define, shares, is_right):
    def vjp(xp, g, y, a, b):
        first, second = (xp.where(a == b, share * g, 0.0) for share in shares)
        return xp.where(a > b, g, first), xp.where(a < b, g, second)

    maximum = define(lambda xp, a, b: xp.maximum(a, b), vjp, "(),()->()")
    a = normal(4)
    for seed in range(5):
        if is_right:
            gradcheck(maximum, a, a.copy(), seed=seed)
        else:
            with pytest.raises(GradientError, match="a kink"):
                gradcheck(maximum, a, a.copy(), seed=seed)


def test_kinks_of_other_elements_are_none_of_ours(define):
    """Their slopes, added up with signs, lie between no two slopes of the sum."""
    relu = define(relu_forward, relu_vjp(0.3))
    x, weights = normal(6), np.array([1, 1, 1, -1, 1, 1])
    x[[0, 3]] = 0
    for seed in range(5):
        gradcheck(lambda x: (relu(x) * weights).sum(), x, seed=seed)


def test_a_kink_excuses_only_the_outputs_that_have_it(define):
    def vjp(xp, g, y, x):
        return (3 * g * xp.where(x == 0, 1.05, 1.0),)

    relu, line = define(relu_forward, relu_vjp(0.5)), define(lambda xp, x: 3 * x, vjp)
    x = normal(6)
    x[2] = 0
    for seed in range(20):
        with pytest.raises(GradientError, match=r"at element \(2,\)"):
            gradcheck(lambda x: F.concat([relu(x), line(x)]), x, seed=seed)


def test_of_several_kinks_the_wrong_one_is_named(define):
    def vjp(xp, g, y, x):
        at_zero = xp.where(xp.arange(6) == 3, 2.0, 0.3)
        return (xp.where(x < 0, 0.0, xp.where(x == 0, at_zero * g, g)),)

    x = normal(6)
    x[[0, 3]] = 0
    with pytest.raises(GradientError, match=r"at element \(3,\), a kink") as error:
        gradcheck(define(relu_forward, vjp), x)
    assert len(error.value.numeric) == 2


def test_too_many_kinks_are_a_value_error(define):
    relu = define(relu_forward, relu_vjp(1))
    with pytest.raises(ValueError, match=r"more than 32 elements .* lie on kinks"):
        gradcheck(relu, np.zeros((10, 10)))


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


@pytest.mark.parametrize(
    "options", [{"order": 3}, {"order": 0}, {"derivative": "symbolic"}, {"directions": 0}]
)
def test_unknown_options_are_value_errors(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        gradcheck(lambda x: x, normal(3), **options)


def test_integers_alone_cannot_be_checked():
    with pytest.raises(TypeError, match="floating-point"):
        gradcheck(lambda x: x * x, np.array([1, 2]))
