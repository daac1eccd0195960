"""The tape behaves as PyTorch's: dtypes, accumulation, graphs that are freed or kept, higher
derivatives, indexing, operators. PyTorch is the oracle wherever it has the same notion."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import agree, to_torch

import tinygrad_llm as tg
from tinygrad_llm import Tensor, grad, no_grad
from tinygrad_llm.ops import TABLE
from tinygrad_llm.ops import op as register
from tinygrad_llm.tensor import apply, tape


def leaf(*shape, seed=0):
    """A float64 leaf of random numbers."""
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def both(*shape, seed=0):
    """The same leaf twice: ours and PyTorch's."""
    ours = leaf(*shape, seed=seed)
    return ours, to_torch(ours.data, requires_grad=True)


# --- random programs ------------------------------------------------------------------------------

# Functions that read the same on a Tensor and on a torch.Tensor. All values broadcast with (3, 4).
UNARY = [
    lambda a: a.tanh(),
    lambda a: a.sigmoid(),
    lambda a: a.relu(),
    lambda a: -a,
    lambda a: a.tanh().exp(),
    lambda a: (a * a + 1).log(),
    lambda a: (a * a + 1).sqrt(),
    lambda a: (a * a + 0.5) ** -0.5,
    lambda a: 2 - a,
    lambda a: a.sum(),
    lambda a: a.sum(-1, keepdims=True) if a.ndim else a,
    lambda a: a.mean(0, keepdims=True) if a.ndim else a,
    lambda a: a.reshape(-1).reshape(a.shape),
    lambda a: a[..., :1] if a.ndim else a,
    lambda a: a[None][0],
    lambda a: a.abs().detach() * a,
    lambda a: a.softmax(-1) if a.ndim else a,
]
BINARY = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b.tanh(),
    lambda a, b: a / (b * b + 1),
    lambda a, b: a.tanh() * a + b * a,
    lambda a, b: (
        (a.tanh() + b.tanh()) @ (a.tanh() + b.tanh()).mT @ (a + b).tanh()
        if (a + b).ndim == 2
        else a + b
    ),
]
SHAPES = [(3, 4), (1, 4), (3, 1), (4,), (1,), ()]


@st.composite
def programs(draw):
    """(leaves, steps): each step is (function, indices of earlier values)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    steps = []
    for n in range(len(shapes), len(shapes) + draw(st.integers(1, 12))):
        f, arity = draw(st.sampled_from([(f, 1) for f in UNARY] + [(f, 2) for f in BINARY]))
        steps.append((f, [draw(st.integers(0, n - 1)) for _ in range(arity)]))
    return [rng.standard_normal(s) for s in shapes], steps


def run(leaves, steps):
    """The sum of the last three values, so that the graph has several ends."""
    values = list(leaves)
    for f, inputs in steps:
        values.append(f(*[values[i] for i in inputs]))
    return sum(v.sum() for v in values[-3:])


@settings(max_examples=250)
@given(programs())
def test_a_random_program_has_pytorchs_gradients(program):
    arrays, steps = program
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [to_torch(a, requires_grad=True) for a in arrays]
    y, expected = run(ours, steps), run(theirs, steps)
    agree(y, expected)
    y.backward()
    expected.backward()
    for x, t in zip(ours, theirs):
        assert (x.grad is None) == (t.grad is None)
        if x.grad is not None:
            agree(x.grad, t.grad)


@settings(max_examples=60)
@given(programs())
def test_grad_with_create_graph_gives_what_backward_gives(program):
    arrays, steps = program
    first = [Tensor(a, requires_grad=True) for a in arrays]
    second = [Tensor(a, requires_grad=True) for a in arrays]
    run(first, steps).backward()
    found = grad(run(second, steps), second, create_graph=True, allow_unused=True)
    for x, d in zip(first, found):
        assert (x.grad is None) == (d is None)
        if d is not None:
            agree(d, x.grad)


# --- accumulation ---------------------------------------------------------------------------------


def test_leaf_gradients_accumulate_over_backward_calls():
    x, t = both(3)
    for _ in range(3):
        (x * x).sum().backward()
        (t * t).sum().backward()
    agree(x.grad, t.grad)


def test_backward_through_a_kept_graph_adds_the_same_again():
    x, t = both(3)
    for a in (x, t):
        y = (a * a).exp().sum()
        y.backward(retain_graph=True)
        y.backward()
    agree(x.grad, t.grad)


def test_a_tensor_used_many_times_gets_every_contribution():
    x, t = both(4)
    y, u = x, t
    for _ in range(50):
        y, u = y * x + x, u * t + t
    y.sum().backward()
    u.sum().backward()
    agree(x.grad, t.grad)


def test_gradients_have_the_dtype_and_shape_of_their_leaf():
    x = Tensor(np.ones((3, 1), np.float32), requires_grad=True)
    y = Tensor(np.ones((2, 1, 4)), requires_grad=True)
    (x * y).sum().backward()
    assert (x.grad.dtype, x.grad.shape) == (np.float32, (3, 1))
    assert (y.grad.dtype, y.grad.shape) == (np.float64, (2, 1, 4))


BROADCAST = [((3, 4), (4,)), ((3, 1), (1, 4)), ((), (2, 3)), ((1,), (5,)), ((0, 3), (3,)),
             ((2, 1, 1), (1, 3, 1)), ((0, 1), (1, 3))]  # fmt: skip


@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_broadcasting_is_undone(shapes):
    pairs = [both(*s, seed=i) for i, s in enumerate(shapes)]
    (a, b), (t, u) = zip(*pairs)
    (a * b + b / (a * a + 1)).sum().backward()
    (t * u + u / (t * t + 1)).sum().backward()
    agree(a.grad, t.grad)
    agree(b.grad, u.grad)


ALIASING = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "reshape": lambda a, b: a.reshape(4) + b.reshape(4),
    "transpose": lambda a, b: a.T + b.T,
    "slices": lambda a, b: a[:1] + b[1:],
    "sum": lambda a, b: a.sum() + b.sum(),
    "expand": lambda a, b: a.expand(3, 2, 2) + b,
    "twice": lambda a, b: a + a + b,
    "mixed": lambda a, b: (a + b) * 1.0 + a,
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("f", ALIASING.values(), ids=ALIASING)
def test_no_grad_shares_memory_with_another_or_with_what_was_given(f, create_graph):
    a, b = leaf(2, 2, seed=1), leaf(2, 2, seed=2)
    y = f(a, b)
    g = Tensor(np.ones(y.shape))
    y.backward(g, create_graph=create_graph)
    expected = b.grad.data.copy()
    for other in (a.data, b.data, g.data, y.data, b.grad.data):
        assert not np.shares_memory(a.grad.data, other)
    a.grad.data[...] = 77.0  # writes to every element, so that sharing would show
    np.testing.assert_array_equal(b.grad.data, expected)
    np.testing.assert_array_equal(g.data, np.ones(y.shape))


@pytest.mark.parametrize("create_graph", [False, True])
def test_accumulating_into_one_leaf_changes_no_other_gradient(create_graph):
    a, b = leaf(3, seed=1), leaf(3, seed=2)
    g = Tensor(np.ones(3))
    (a + b).backward(g, create_graph=create_graph)
    (a * 2).sum().backward()
    agree(a.grad, np.full(3, 3.0))
    agree(b.grad, np.ones(3))
    agree(g, np.ones(3))


def test_arrays_that_cannot_be_written_to_are_no_trouble():
    x = np.arange(6.0).reshape(2, 3)
    g = np.ones((2, 3))
    x.flags.writeable = g.flags.writeable = False
    a = Tensor(x, requires_grad=True)
    y = a + a * a + a
    y.backward(g, retain_graph=True)
    y.backward(g)
    agree(a.grad, 2 * (2 + 2 * x))


def test_a_retained_gradient_is_its_own():
    a = leaf(3)
    h = a * 2
    h.retain_grad()
    (h + 1).sum().backward()
    h.grad.data[...] = 7.0
    agree(a.grad, np.full(3, 2.0))


def test_clearing_grad_starts_again():
    x = leaf(3)
    x.sum().backward()
    x.grad = None
    (2 * x).sum().backward()
    agree(x.grad, np.full(3, 2.0))


# --- graphs: long, freed, kept, partial -----------------------------------------------------------


def chain(x, n):
    for _ in range(n):
        x = x + 1.0
    return x


@pytest.mark.parametrize("walked", [True, False])
def test_a_chain_of_100_000_ops_runs_backward_and_is_freed_in_3_seconds(walked):
    start = time.process_time()
    x = Tensor(np.ones(1), requires_grad=True)
    y = chain(x, 100_000)
    if walked:
        y.backward()
        agree(x.grad, np.ones(1))
    del y
    gc.collect()
    assert time.process_time() - start < 3


def test_grad_walks_a_chain_of_100_000_ops():
    x = Tensor(np.ones(1), requires_grad=True)
    agree(grad(chain(x, 100_000), x)[0], np.ones(1))


def test_backward_through_a_freed_graph_says_so():
    x = leaf(3)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"freed.*retain_graph=True") as error:
        y.backward()
    assert "\n" not in str(error.value)


def test_backward_frees_what_the_graph_holds():
    x = leaf(3)
    h = x * x
    y = h.sum()
    held = weakref.ref(h)
    del h
    assert held() is not None
    y.backward()
    gc.collect()
    assert held() is None


def test_a_shared_part_of_a_freed_graph_is_freed_for_all():
    x = leaf(3)
    h = x * x
    h.sum().backward()
    with pytest.raises(RuntimeError, match="freed"):
        (h * 2).sum().backward()


def test_backward_needs_something_to_do():
    with pytest.raises(RuntimeError, match="does not require grad"):
        Tensor([1.0]).sum().backward()


def test_backward_of_many_numbers_needs_a_gradient_of_that_shape():
    y = leaf(2, 3) * 2
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        y.backward()
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        y.backward(np.ones(3))


@pytest.mark.parametrize("make", [np.array, Tensor, list, np.float32, np.int64])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_takes_a_gradient_of_any_number_type(make, create_graph):
    x = leaf(2, 3)
    (x * 3).backward(make([[2.0] * 3] * 2), create_graph=create_graph)
    agree(x.grad, np.full((2, 3), 6.0))


def test_grad_leaves_every_leafs_grad_untouched():
    x, w = leaf(3, seed=1), leaf(3, seed=2)
    w.grad = before = Tensor(np.ones(3))
    grad((x * w).sum(), x)
    assert x.grad is None
    assert w.grad is before
    agree(before, np.ones(3))


def test_grad_of_something_unused_is_an_error_or_none():
    x, other = leaf(3, seed=1), leaf(3, seed=2)
    with pytest.raises(RuntimeError, match=r"input 1.*allow_unused"):
        grad((x * x).sum(), [x, other], retain_graph=True)
    d, nothing = grad((x * x).sum(), [x, other], allow_unused=True)
    agree(d, 2 * x.data)
    assert nothing is None


def test_grad_reaches_intermediate_results_and_the_result_itself():
    x, t = both(3)
    h, u = x * x, t * t
    y, v = (h * x).sum(), (u * t).sum()
    ours = grad(y, [h, x, y])
    for d, e in zip(ours, torch.autograd.grad(v, [u, t, v])):
        agree(d, e)


@pytest.fixture
def counted():
    """A function whose backward counts its calls in `counted.calls`."""

    @register("()->()")
    class counted:  # noqa: N801
        """y = 2 x,  x̄ = 2 g"""

        def forward(xp, x):  # noqa: N805
            return 2 * x

        def vjp(xp, g, y, x):  # noqa: N805
            function.calls += 1
            return (2 * g,)

    def function(x):
        return apply(counted, x)

    function.calls = 0
    yield function
    del TABLE["counted"]


@pytest.mark.parametrize("create_graph", [False, True])
def test_grad_walks_only_what_lies_between(counted, create_graph):
    x, w = leaf(3, seed=1), leaf(3, seed=2)
    h = counted(x)
    y = (h * counted(w)).sum()
    grad(y, h, create_graph=create_graph, retain_graph=True)
    assert counted.calls == 0
    grad(y, x, create_graph=create_graph)
    assert counted.calls == 1


def test_what_lies_behind_an_intermediate_target_stays_usable():
    x, t = both(3)
    h, u = x * x, t * t
    grad((h * 2).sum(), h)
    torch.autograd.grad((u * 2).sum(), u)
    h.sum().backward()
    u.sum().backward()
    agree(x.grad, t.grad)


def test_each_node_is_walked_once_however_often_it_is_used(counted):
    x = leaf(3)
    h = counted(x)
    (h * h + h).sum().backward()
    assert counted.calls == 1


# --- higher derivatives ---------------------------------------------------------------------------

SMOOTH = {
    "x^4": lambda x: x**4,
    "tanh": lambda x: x.tanh(),
    "exp x²": lambda x: (x * x * 0.3).exp(),
    "x σ(x)": lambda x: x * x.sigmoid(),
    "1/(1 + x²)": lambda x: 1 / (1 + x * x),
    "softmax": lambda x: x.softmax(-1) * x,
    "norm": lambda x: (x * x).sum().sqrt() * x,
    "x xᵀ x": lambda x: x @ x.mT @ x,
    "picked": lambda x: x[0, ::-1] ** 3 if isinstance(x, Tensor) else x[0].flip(0) ** 3,
}


@pytest.mark.parametrize("f", SMOOTH.values(), ids=SMOOTH)
def test_third_derivatives_agree_with_pytorchs(f):
    x, t = both(2, 3)
    y, u = f(x).sum(), f(t).sum()
    for _ in range(3):
        (d,) = grad(y, x, create_graph=True)
        (e,) = torch.autograd.grad(u, t, create_graph=True)
        agree(d, e)
        y, u = (d * d).sum(), (e * e).sum()


def test_a_gradient_penalty_trains_through_backward():
    (x, t), (w, v) = both(4, 3, seed=1), both(3, 3, seed=2)
    for a, b, g in ((x, w, grad), (t, v, torch.autograd.grad)):
        (d,) = g((a @ b).tanh().sum(), a, create_graph=True)
        ((d * d).sum() - 1).backward()
    agree(w.grad, v.grad)
    agree(x.grad, t.grad)


def test_a_recorded_gradient_depends_on_the_cotangent_too():
    x, g = leaf(3, seed=1), leaf(3, seed=2)
    (d,) = grad(x * x, x, g, create_graph=True)
    agree(grad(d.sum(), g)[0], 2 * x.data)


def test_backward_with_create_graph_leaves_a_grad_that_can_be_differentiated():
    x, t = both(3)
    for a in (x, t):
        (a**3).sum().backward(create_graph=True)
    first, second = x.grad, t.grad
    x.grad = t.grad = None
    first.sum().backward()
    second.sum().backward()
    agree(x.grad, t.grad)


def test_without_create_graph_gradients_are_constants():
    x = leaf(3)
    (d,) = grad((x**3).sum(), x)
    assert not d.requires_grad
    assert d.is_leaf


def test_reading_an_op_on_the_tape_never_loses_a_gradient_silently():
    x = leaf(3)
    with pytest.raises(TypeError, match=r"floor.*lose the gradient"):
        tape.floor(x)
    assert tape.tanh(x).requires_grad
    assert not tape.floor(x.detach()).requires_grad
    assert not tape.isfinite(x).requires_grad


# --- recording ------------------------------------------------------------------------------------


def test_no_grad_records_nothing_and_restores_what_was():
    x = leaf(3)
    with no_grad():
        assert not tg.is_grad_enabled()
        y = x * 2
        with no_grad():
            pass
        assert not (x + y).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert tg.is_grad_enabled()
    assert y.is_leaf
    assert (x * 2).requires_grad


def test_no_grad_decorates_functions():
    x = leaf(3)

    @no_grad()
    def f():
        return x * 2

    assert not f().requires_grad
    assert not f().requires_grad  # also the second time
    assert tg.is_grad_enabled()


def test_no_grad_in_one_thread_does_not_reach_another():
    x, seen = leaf(3), []
    inside, done = threading.Event(), threading.Event()

    def other():
        with no_grad():
            inside.set()
            done.wait(5)
            seen.append((x * 2).requires_grad)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(5)
    seen.append((x * 2).requires_grad)
    done.set()
    thread.join()
    assert seen == [True, False]


def test_threads_build_and_walk_their_own_graphs():
    found = [None] * 8

    def work(i):
        x = Tensor(np.full(3, float(i)), requires_grad=True)
        for _ in range(50):
            x.grad = None
            (x * x * x).sum().backward()
        found[i] = x.grad.data

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, d in enumerate(found):
        agree(d, np.full(3, 3.0 * i * i))


def test_detach_shares_data_and_stops_gradients():
    x = leaf(3)
    d = (x * 2).detach()
    assert not d.requires_grad
    assert d.is_leaf
    assert np.shares_memory(x.detach().data, x.data)
    (d * x).sum().backward()
    agree(x.grad, 2 * x.data)


def test_only_floating_point_tensors_require_grad():
    for data in ([1, 2], [True]):
        with pytest.raises(TypeError, match="floating-point"):
            Tensor(data, requires_grad=True)
    x = leaf(3)
    assert not (x > 0).requires_grad
    assert not x.long().requires_grad
    assert not x.argmax().requires_grad


def test_only_leaves_can_stop_requiring_grad():
    x = leaf(3)
    with pytest.raises(RuntimeError, match="leaf"):
        (x * 2).requires_grad_(False)
    assert not x.requires_grad_(False).requires_grad


def test_retain_grad_keeps_what_reaches_an_intermediate_result():
    kept = []
    for a in both(3):
        h = a * a
        h.retain_grad()
        (h * h).sum().backward()
        kept.append(h.grad)
    agree(*kept)


# --- dtypes ---------------------------------------------------------------------------------------

INT, F32, F64, BOOL = [1, 2], np.float32([1, 2]), np.float64([1, 2]), [True, False]


@pytest.mark.parametrize("data", [1, [1, 2], 1.5, [1.5], [[1, 2.5]], True, [True], [], F32, F64,
                                  np.int32([1]), np.float16([1]), np.zeros((0, 2))])  # fmt: skip
def test_data_gets_pytorchs_dtype(data):
    expected = torch.tensor(data).numpy()
    for made in (Tensor(data), tg.tensor(data)):
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(made.data, expected)


DTYPES = {
    "int / int": (lambda a, b: a / b, INT, INT),
    "int + int": (lambda a, b: a + b, INT, INT),
    "int * float": (lambda a, b: a * 2.5, INT, INT),
    "int ** 2": (lambda a, b: a**2, INT, INT),
    "int ** 0.5": (lambda a, b: a**0.5, INT, INT),
    "2.0 ** int": (lambda a, b: 2.0**a, INT, INT),
    "int * float32": (lambda a, b: a * b, INT, F32),
    "int * float64": (lambda a, b: a * b, INT, F64),
    "float32 * float64": (lambda a, b: a * b, F32, F64),
    "float32 * 2": (lambda a, b: a * 2, F32, F32),
    "float32 * 2.0": (lambda a, b: a * 2.0, F32, F32),
    "float64 * 2.0": (lambda a, b: a * 2.0, F64, F64),
    "float32 ** 2.0": (lambda a, b: a**2.0, F32, F32),
    "1 / float32": (lambda a, b: 1 / a, F32, F32),
    "bool * float32": (lambda a, b: a * b, BOOL, F32),
    "bool + bool -> int": (lambda a, b: a.sum() + b.sum(), BOOL, BOOL),
    "sum of int": (lambda a, b: a.sum(), INT, INT),
    "exp of int": (lambda a, b: a.exp(), INT, INT),
    "tanh of int": (lambda a, b: a.tanh(), INT, INT),
    "relu of int": (lambda a, b: a.relu(), INT, INT),
    "abs of int": (lambda a, b: abs(a), INT, INT),
    "-int": (lambda a, b: -a, INT, INT),
    "max of int": (lambda a, b: a.max(), INT, INT),
    "mean of float32": (lambda a, b: a.mean(), F32, F32),
    "comparison": (lambda a, b: a > b, INT, F32),
    "argmax": (lambda a, b: a.argmax(), F32, F32),
    "index": (lambda a, b: a[0], INT, INT),
    "index by array": (lambda a, b: a[[1, 0]], INT, INT),
    "int.float()": (lambda a, b: a.float(), INT, INT),
    "float64.float()": (lambda a, b: a.float(), F64, F64),
    "int.double()": (lambda a, b: a.double(), INT, INT),
    "float32.long()": (lambda a, b: a.long(), F32, F32),
    "int @ int": (lambda a, b: a @ b, INT, INT),
}


@pytest.mark.parametrize("f, a, b", DTYPES.values(), ids=DTYPES)
def test_results_have_pytorchs_dtype(f, a, b):
    agree(f(Tensor(a), Tensor(b)), f(torch.tensor(a), torch.tensor(b)), 1e-6)


@pytest.mark.parametrize(
    "scalar", [np.float64(2), np.float32(2), np.int64(2), np.bool(True), 2, True]
)
def test_a_scalar_on_either_side_does_not_promote_float32(scalar):
    x = Tensor(np.float32([1, 2]), requires_grad=True)
    for y in (x * scalar, scalar * x, x + scalar, scalar - x, x / scalar, scalar / x, x**scalar):
        assert isinstance(y, Tensor)
        assert y.dtype == np.float32
        assert grad(y.sum(), x)[0].dtype == np.float32


def test_casts_carry_gradients_in_the_leafs_dtype():
    x = Tensor(np.float32([1, 2]), requires_grad=True)
    (x.double() ** 2).sum().backward()
    agree(x.grad, np.float32([2, 4]))
    (d,) = grad((x.double() ** 3).sum(), x, create_graph=True)
    agree(grad(d.sum(), x)[0], np.float32([6, 12]))


# --- indexing -------------------------------------------------------------------------------------

I = np.array([[0, -1], [1, 0]])  # noqa: E741
MASK = np.arange(24).reshape(2, 3, 4) % 3 == 0
KEYS = {
    "0": 0,
    "-1": -1,
    "1, 2, 3": (1, 2, 3),
    ":": np.s_[:],
    "1:": np.s_[1:],
    "5:": np.s_[5:],
    "..., 0": np.s_[..., 0],
    "...": ...,
    "None": None,
    "0, None, ..., None, 1:3": np.s_[0, None, ..., None, 1:3],
    "::2, ::2": np.s_[::2, ::2],
    "empty": np.s_[1:1],
    "()": (),
    "list": [1, 0, 1],
    "empty list": [],
    "np.int64": np.int64(1),
    "array": np.array([0, 0, 1]),
    "array 2-d": I,
    "int32 array": I.astype(np.int32),
    "negative duplicates": np.array([-1, 1, -1, 0]),
    "two arrays": (I, I),
    "arrays that broadcast": (np.array([[0], [1]]), np.array([0, 2])),
    ":, array": (slice(None), np.array([2, 0, 2])),
    "array, :, array": (np.array([0, 1, 1]), slice(None), np.array([1, 2, 1])),
    "array, None": (np.array([0, 1, 1]), None),
    "..., array": (..., np.array([3, 3])),
    "arange, arange": (np.arange(2), np.arange(2)),
    "mask": MASK,
    "mask of rows": np.array([True, False]),
    "mask of two axes": MASK[..., 0],
    ":, mask": (slice(None), np.array([True, False, True])),
    "mask, int": (np.array([True, True]), 1),
    "mask of nothing": np.zeros((2, 3), bool),
    "Tensor": Tensor([1, 0, 1]),
    "Tensor 0-d": Tensor(1),
    "Tensor mask": Tensor(MASK),
    "slice, Tensor": (slice(None), Tensor([[2, 0], [1, 1]])),
}


def for_torch(key):
    if isinstance(key, tuple):
        return tuple(map(for_torch, key))
    key = key.data if isinstance(key, Tensor) else key
    return torch.tensor(key) if isinstance(key, np.ndarray) else key


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_indexing_agrees_with_pytorchs(key):
    x, t = both(2, 3, 4)
    y, u = x[key], t[for_torch(key)]
    agree(y, u)
    g = np.random.default_rng(1).standard_normal(y.shape)
    (y * y * g).sum().backward()
    (u * u * to_torch(g)).sum().backward()
    agree(x.grad, t.grad)


BACKWARDS = [np.s_[::-1], np.s_[:, ::-2], np.s_[..., 2::-1, 0], np.s_[-1:-3:-1]]


@pytest.mark.parametrize("key", BACKWARDS, ids=str)
def test_negative_steps_agree_with_numpys(key):
    x = leaf(2, 3, 4)
    y = x[key]
    agree(y, x.data[key])
    g = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(g)
    expected = np.zeros(x.shape)
    expected[key] = g
    agree(x.grad, expected)


def test_indexing_has_second_derivatives():
    x, t = both(4, 3)
    for a, g, key in ((x, grad, np.array([0, 2, 0])), (t, torch.autograd.grad, [0, 2, 0])):
        (d,) = g((a[key] ** 3 * a[1:, None][0]).sum(), a, create_graph=True)
        (d**2).sum().backward()
    agree(x.grad, t.grad)


BAD_KEYS = [2, -3, (0, 3), (0, 0, 0, 0), np.array([0, 5]), np.s_[:, 7], np.zeros((2, 2), bool),
            "name", 1.5, np.array([0.5])]  # fmt: skip


@pytest.mark.parametrize("key", BAD_KEYS, ids=str)
def test_a_bad_index_is_an_index_error_in_one_line(key):
    with pytest.raises(IndexError) as error:
        leaf(2, 3, 4)[key]
    assert "\n" not in str(error.value)


def test_a_tensor_cannot_be_assigned_to():
    with pytest.raises(TypeError, match="where"):
        leaf(3)[0] = 1.0


# --- shapes ---------------------------------------------------------------------------------------

VIEWS = {
    "reshape": lambda a: a.reshape(4, 6),
    "reshape tuple": lambda a: a.reshape((4, 6)),
    "reshape -1": lambda a: a.reshape(3, -1),
    "view": lambda a: a.view(-1),
    "flatten": lambda a: a.flatten(),
    "flatten 1": lambda a: a.flatten(1),
    "flatten 0, 1": lambda a: a.flatten(0, 1),
    "flatten -2, -1": lambda a: a.flatten(-2, -1),
    "permute": lambda a: a.permute(2, 0, 1),
    "permute negative": lambda a: a.permute(-1, 0, 1),
    "permute tuple": lambda a: a.permute((1, 0, 2)),
    "transpose": lambda a: a.transpose(0, 2),
    "transpose negative": lambda a: a.transpose(-1, -2),
    "mT": lambda a: a.mT,
    "T": lambda a: a[0].T,
    "unsqueeze": lambda a: a.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda a: a[:1, :, :1].squeeze(),
    "squeeze one": lambda a: a[:1, :, :1].squeeze(0),
    "squeeze last": lambda a: a[:1, :, :1].squeeze(-1),
    "expand": lambda a: a[:1].expand(5, 3, 4),
    "expand -1": lambda a: a[:, :1].expand(-1, 7, -1),
    "expand in front": lambda a: a[0].expand(2, 2, 3, 4),
    "clone": lambda a: a.clone(),
}


@pytest.mark.parametrize("f", VIEWS.values(), ids=VIEWS)
def test_views_agree_with_pytorchs(f):
    x, t = both(2, 3, 4)
    y, u = f(x), f(t)
    agree(y, u)
    (y * y * y).sum().backward()
    (u * u * u).sum().backward()
    agree(x.grad, t.grad)


def test_a_clone_is_a_copy():
    for x in (leaf(3), leaf(3).detach(), Tensor([1, 2]), Tensor([True])):
        y = x.clone()
        assert not np.shares_memory(x.data, y.data)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(x.data, y.data)


REDUCTIONS = {
    "sum": lambda a: a.sum(),
    "sum 0": lambda a: a.sum(0),
    "sum -1": lambda a: a.sum(-1),
    "sum pair": lambda a: a.sum((0, 2)),
    "sum keep": lambda a: a.sum((0, 1), keepdims=True),
    "mean": lambda a: a.mean(),
    "mean 1": lambda a: a.mean(1, keepdims=True),
    "mean pair": lambda a: a.mean((1, -1)),
    "logsumexp": lambda a: a.logsumexp(-1),
    "softmax": lambda a: a.softmax(1),
    "log_softmax": lambda a: a.log_softmax(0),
    "var": lambda a: a.var(),
    "var 1": lambda a: a.var(1),
    "var keep": lambda a: a.var(-1, keepdims=True),
    "tril": lambda a: a.tril(),
    "triu 1": lambda a: a.triu(1),
    "clip": lambda a: a.clip(-0.5, 0.5),
    "clamp min": lambda a: a.clamp(0.1),
}


@pytest.mark.parametrize("f", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions_agree_with_pytorchs(f):
    x, t = both(2, 3, 4)
    y, u = f(x), f(t)
    agree(y, u)
    (y * y).sum().backward()
    (u * u).sum().backward()
    agree(x.grad, t.grad)


@pytest.mark.parametrize("correction", [0, 1, 2])
def test_var_takes_pytorchs_correction(correction):
    x, t = both(4, 5)
    agree(x.var(0, correction=correction), t.var(0, correction=correction))


MATMULS = [((3,), (3,)), ((3,), (3, 4)), ((2, 3), (3,)), ((2, 3), (3, 4)), ((5, 2, 3), (3,)),
           ((3,), (5, 3, 4)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)), ((5, 1, 2, 3), (6, 3, 4)),
           ((2, 0), (0, 3)), ((0, 2), (2, 3)), ((1, 1), (1, 1))]  # fmt: skip


@pytest.mark.parametrize("shapes", MATMULS, ids=str)
def test_matmul_agrees_with_pytorchs(shapes):
    (a, t), (b, u) = (both(*s, seed=i) for i, s in enumerate(shapes))
    y, v = a @ b, t @ u
    agree(y, v)
    (y * y).sum().backward()
    (v * v).sum().backward()
    agree(a.grad, t.grad)
    agree(b.grad, u.grad)


# --- operators ------------------------------------------------------------------------------------

OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
    "@": lambda a, b: a @ b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
ARRAY = np.abs(np.random.default_rng(5).standard_normal((3, 3))) + 0.5


OTHERS = {"int": 2, "float": 2.5, "array": ARRAY}
CASES = [(s, o) for s in OPERATORS for o in OTHERS if s != "@" or o == "array"]


@pytest.mark.parametrize("symbol, kind", CASES)
def test_operators_take_numbers_and_arrays_on_both_sides(symbol, kind):
    f, other = OPERATORS[symbol], OTHERS[kind]
    x = Tensor(ARRAY + 1, requires_grad=True)
    t = to_torch(x.data, requires_grad=True)
    other_torch = to_torch(other) if other is ARRAY else other
    for y, u in ((f(x, other), f(t, other_torch)), (f(other, x), f(other_torch, t))):
        assert isinstance(y, Tensor)
        agree(y, u)
        if u.requires_grad:
            agree(grad(y.sum(), x)[0], torch.autograd.grad(u.sum(), t)[0])


@pytest.mark.parametrize("symbol", ["&", "|", "^"])
def test_logic_agrees_with_numpys(symbol):
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    f = eval(f"lambda a, b: a {symbol} b")
    agree(f(Tensor(a), Tensor(b)), f(a, b))
    agree(f(Tensor(a), b), f(a, b))
    agree(f(a, Tensor(b)), f(a, b))
    agree(f(Tensor(a), True), f(a, True))
    agree(~Tensor(a), ~a)


def test_a_power_of_negative_numbers_gives_no_warning():
    x = Tensor([-2.0, 3.0], requires_grad=True)
    with np.errstate(all="raise"):
        (x ** np.array([2, 3])).sum().backward()
    agree(x.grad, np.float32([-4, 27]))


@pytest.mark.parametrize("exponent", [2, 3, 1, 0, -1, 0.5, 2.0])
def test_powers_at_zero_and_elsewhere_agree_with_pytorchs(exponent):
    x = Tensor(np.array([0.0, 1.0, 2.0]), requires_grad=True)
    t = to_torch(x.data, requires_grad=True)
    with np.errstate(divide="ignore"):
        (x**exponent).sum().backward()
    (t**exponent).sum().backward()
    np.testing.assert_allclose(x.grad.data, t.grad.numpy())


def test_masked_fill_agrees_with_pytorchs():
    x, t = both(3, 4)
    mask = x.data > 0
    for m in (mask, Tensor(mask)):
        agree(x.masked_fill(m, -np.inf), t.masked_fill(to_torch(mask), -np.inf))
    agree(grad(x.masked_fill(mask, 0.0).sum(), x)[0], ~mask * 1.0)


# --- Python's protocols ---------------------------------------------------------------------------


def test_len_and_iteration_go_over_the_first_axis():
    x = leaf(3, 2)
    assert len(x) == 3
    rows = list(x)
    assert [r.shape for r in rows] == [(2,)] * 3
    sum((r * r).sum() for r in rows).backward()
    agree(x.grad, 2 * x.data)
    for f in (len, list, iter):
        with pytest.raises(TypeError):
            f(Tensor(1.0))


def test_one_element_becomes_a_python_number():
    for x in (Tensor(2.5), Tensor([[2.5]]), leaf(1) * 0 + 2.5):
        assert x.item() == float(x) == 2.5
        assert type(x.item()) is float
        assert int(x) == 2
        assert bool(x)
    assert type(Tensor(3).item()) is int
    for f in (Tensor.item, float, int, bool):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            f(leaf(2, 3))


def test_a_tensor_converts_to_an_array():
    x = leaf(2, 3)
    np.testing.assert_array_equal(np.asarray(x.detach()), x.data)
    np.testing.assert_array_equal(x.tolist(), x.data)
    assert x.detach().numpy() is x.data
    for convert in (Tensor.numpy, np.asarray, lambda x: Tensor([x])):
        with pytest.raises(RuntimeError, match="detach"):
            convert(x)


def test_grad_through_a_freed_graph_says_so():
    x = leaf(2)
    h = x * 2
    h.sum().backward()
    for y in (h * 3, h * 3 + x):
        with pytest.raises(RuntimeError, match="freed"):
            grad(y.sum(), x, allow_unused=True)
    assert grad((h * 3).sum(), h)[0].tolist() == [3, 3]  # what made h is not needed


def test_in_place_operators_change_a_leaf_only_without_recording():
    x, alias = leaf(3), None
    alias, before = x, x.data.copy()
    with no_grad():
        x -= 0.5 * Tensor(np.ones(3))
        x *= 2
    assert x is alias and x.requires_grad and x.is_leaf
    np.testing.assert_allclose(x.data, (before - 0.5) * 2)
    with pytest.raises(TypeError, match="no_grad"):
        x += 1
    total = Tensor(0.0)
    total += (x * x).sum()  # a sum of losses
    total.backward()
    np.testing.assert_allclose(x.grad.data, 2 * x.data)


def test_only_integers_are_indices():
    x = leaf(4, 3)
    np.testing.assert_array_equal(x[np.array(-1)].data, x.data[-1])
    np.testing.assert_array_equal(x[np.array([[-1, 0], [2, -4]])].data, x.data[[[-1, 0], [2, -4]]])
    for wrong in (Tensor(1.7), np.array([4]), np.array([-5])):
        with pytest.raises(IndexError):
            x[wrong]


def test_a_leaf_that_retains_its_gradient_is_left_alone_by_grad():
    x = leaf(3).retain_grad()
    grad((x * x).sum(), x)
    assert x.grad is None


def test_complex_numbers_have_no_gradient():
    with pytest.raises(TypeError, match="floating-point"):
        Tensor(np.ones(2, complex), requires_grad=True)


def test_tensor_copies_and_the_class_does_not():
    a = np.ones(3)
    assert np.shares_memory(Tensor(a).data, a)
    assert not np.shares_memory(tg.tensor(a).data, a)


def test_tensors_hash_by_identity():
    x, y = leaf(3), leaf(3)
    assert len({x, y, x}) == 2


@pytest.mark.parametrize("data, text", [([1.0, 2.0], "tensor([1., 2.])"), ([1], "tensor([1])"),
                                        (np.float64([1]), "dtype=float64")])  # fmt: skip
def test_repr_shows_data_and_unusual_dtypes(data, text):
    assert text in repr(Tensor(data))
    assert "requires_grad=True" in repr(leaf(1))
    assert "op=multiply" in repr(leaf(1) * 2)


# --- errors ---------------------------------------------------------------------------------------

MISFITS = {
    "+": lambda: leaf(2, 3) + leaf(4),
    "*": lambda: leaf(2, 3) * np.ones(4),
    "array *": lambda: np.ones(4) * leaf(2, 3),
    "@": lambda: leaf(2, 3) @ leaf(4, 2),
    "@ 1-d": lambda: leaf(2, 3) @ leaf(4),
    "@ number": lambda: leaf(2, 3) @ Tensor(4.0),
    "reshape": lambda: leaf(2, 3).reshape(4, 2),
    "reshape -1": lambda: leaf(2, 3).reshape(4, -1),
    "expand": lambda: leaf(2, 3).expand(4, 3),
    "expand fewer": lambda: leaf(2, 3).expand(3),
    "squeeze": lambda: leaf(2, 3).squeeze(0),
    "permute twice": lambda: leaf(2, 3).permute(0, 0),
    "permute few": lambda: leaf(2, 3).permute(0),
    "sum axis": lambda: leaf(2, 3).sum(2),
    "softmax axis": lambda: leaf(2, 3).softmax(5),
    "masked_fill": lambda: leaf(2, 3).masked_fill(np.ones(4, bool), 0.0),
    "bool": lambda: bool(leaf(2, 3)),
    "comparison": lambda: leaf(2, 3) < leaf(4),
    "backward": lambda: leaf(2, 3).backward(np.ones(4)),
}


@pytest.mark.parametrize("f", MISFITS.values(), ids=MISFITS)
def test_shapes_that_do_not_fit_are_a_value_error_with_the_shapes_in_one_line(f):
    with pytest.raises(ValueError, match=r"\(?2, ?3\)?") as error:
        f()
    assert "\n" not in str(error.value)


AXES = {
    "permute": lambda: leaf(2, 3).permute(0, 3),
    "transpose": lambda: leaf(2, 3).transpose(0, 2),
    "unsqueeze": lambda: leaf(2, 3).unsqueeze(4),
    "flatten": lambda: leaf(2, 3).flatten(3),
    "mean": lambda: leaf(2, 3).mean(-3),
    "max": lambda: leaf(2, 3).max(2),
    "argmax": lambda: leaf(2, 3).argmax(2),
}


@pytest.mark.parametrize("f", AXES.values(), ids=AXES)
def test_an_axis_that_does_not_exist_is_an_error(f):
    with pytest.raises((ValueError, IndexError)):
        f()


@pytest.mark.parametrize("data", ["text", None, [None], object(), ["a", "b"], {"a": 1}])
def test_what_holds_no_numbers_is_a_type_error(data):
    with pytest.raises(TypeError):
        Tensor(data)


def test_a_ragged_list_is_a_value_error():
    with pytest.raises(ValueError):
        Tensor([[1, 2], [3]])


def test_devices():
    x = leaf(2)
    assert x.device == "cpu"
    assert x.to("cpu") is x
    with pytest.raises(ValueError, match="cuda"):
        x.to("cuda")
