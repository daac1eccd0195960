"""Hypothesis strategies that draw arguments for any op, from its signature and its domains; and
how the tests call an op and compare numbers."""

import inspect
import itertools
import re

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, backend
from tinygrad_llm.tensor import apply

# --- drawing arguments ----------------------------------------------------------------------------


def core_dimensions(op):
    """The core dimensions of each array, as names: "(n,k),(k)->(n)" gives [["n", "k"], ["k"]]."""
    inputs = op.signature.split("->")[0]
    return [re.findall(r"\w+", core) for core in re.findall(r"\(([^)]*)\)", inputs)]


def values(rng, domain, shape, sizes, ties=False):
    """An array of the given shape whose elements lie in the domain of an op's argument; with
    `ties`, small whole numbers: equal elements, and kinks hit exactly."""
    if domain is None:
        return rng.integers(-1, 2, shape) * 1.0 if ties else rng.standard_normal(shape)
    if domain == "positive":
        return rng.integers(1, 3, shape) * 1.0 if ties else rng.uniform(0.3, 3, shape)
    if domain in ("unit", "target"):
        return rng.uniform(0.05, 0.95, shape)
    if domain == "bool":
        return rng.random(shape) < 0.6
    if domain == "constant":
        return rng.integers(0, 2, shape) * 1.25
    kind, _, size = domain.partition(" ")
    assert kind == "index", domain
    return rng.integers(0, sizes[size], shape)


def differentiable(op, i, a=None):
    """Whether the op's i-th array has a gradient; a number in its place has none."""
    name = op.arrays[0 if op.variadic else i]
    return not isinstance(a, int | float) and op.domains.get(name) in (None, "positive", "unit")


def fill(op, rng, shapes, sizes, attributes, ties=False):
    """Arrays of the given shapes for one call of the op, in float64."""
    names = op.arrays if not op.variadic else op.arrays * len(shapes)
    domains = [op.domains.get(name) for name in names]
    arrays = [np.asarray(values(rng, d, s, sizes, ties)) for d, s in zip(domains, shapes)]
    if "ignore_index" in op.attributes:  # some targets are ignored, but never all of them
        ignored = rng.random(arrays[1].shape) < 0.3
        ignored[:1] = False
        arrays[1][ignored] = attributes.get("ignore_index", -100)
    return arrays


@st.composite
def arguments(draw, op, ties=False, max_side=4):
    """(arrays, attributes) for one call of the op, in float64. Of the arrays that have a default,
    some may be missing, and some may be the default."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if op.sample:
        shapes, attributes = op.sample(rng)
        return fill(op, rng, shapes, attributes, attributes, ties), attributes
    attributes = draw(st.sampled_from(op.examples))
    shapes, sizes = draw(signature_shapes(op, max_side=max_side))
    arrays = fill(op, rng, shapes, sizes, attributes, ties)
    optional = defaults(op)
    arrays = arrays[: len(arrays) - draw(st.integers(0, len(optional)))]
    for i in optional.keys() & set(range(len(arrays) - 1)):
        arrays[i] = draw(st.sampled_from([arrays[i], optional[i]]))
    return arrays, attributes


def defaults(op):
    """The default values of the arrays that have one, by position."""
    parameters = list(inspect.signature(op.vjp).parameters.values())[3:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {i: p.default for i, p in enumerate(positional) if p.default is not p.empty}


@st.composite
def signature_shapes(draw, op, min_side=1, max_side=4):
    """Shapes that fit the op's signature, with batch axes that broadcast; and its core lengths."""
    drawn = draw(
        hnp.mutually_broadcastable_shapes(
            signature=op.signature, max_dims=2, min_side=min_side, max_side=max_side
        )
    )
    return without_batch(op, list(drawn.input_shapes))


def without_batch(op, shapes):
    """The shapes, with weights freed of batch axes; and the lengths of the core dimensions."""
    sizes = {}
    for i, (name, core) in enumerate(zip(op.arrays, core_dimensions(op))):
        own = shapes[i][len(shapes[i]) - len(core) :]
        shapes[i] = own if name in op.fixed else shapes[i]
        sizes |= dict(zip(core, own))
    return shapes, sizes


def batch_of(op, batch, lengths, seed=0):
    """Arrays for one call of the op: core dimensions of the given lengths, in the order in which
    the signature names them, and the same batch axes for all."""
    cores = core_dimensions(op)
    size = dict(zip(dict.fromkeys(itertools.chain(*cores)), lengths))
    shapes, sizes = without_batch(op, [batch + tuple(size[n] for n in core) for core in cores])
    return fill(op, np.random.default_rng(seed), shapes, sizes, op.examples[0])


@st.composite
def for_kernels(draw, op, max_side=5):
    """(arrays, attributes) as kernels take them: without broadcasting, and of the arrays with a
    default none, or the last one alone."""
    if op.sample:
        return draw(arguments(op))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    lengths = sorted(draw(st.lists(st.integers(1, max_side), min_size=4, max_size=4)))
    arrays = batch_of(op, batch, lengths, draw(st.integers(0, 2**32 - 1)))
    optional = defaults(op)
    if draw(st.booleans()):
        arrays = arrays[: len(arrays) - len(optional)]
    for i in optional.keys() & set(range(len(arrays) - 1)):
        arrays[i] = optional[i]
    return arrays, draw(st.sampled_from(op.examples))


def holds(law, *strategies, examples=20):
    """Runs law(*drawn) over drawn examples."""
    settings(max_examples=examples)(given(*strategies)(law))()


# --- calling an op --------------------------------------------------------------------------------


def call(op, arrays, attributes):
    """(f, xs): the op as a function of its differentiable arrays alone, for gradcheck."""
    held = {i: a for i, a in enumerate(arrays) if not differentiable(op, i, a)}
    free = [i for i in range(len(arrays)) if i not in held]

    def f(*xs):
        given_arrays = held | dict(zip(free, xs))
        return apply(op, *[given_arrays[i] for i in range(len(arrays))], **attributes)

    return f, [arrays[i] for i in free]


def forward(reading, op, arrays, attributes):
    """(y, saved) of the bare implementation, without the tape."""
    y = reading[op].forward(*arrays, **attributes)
    return y if reading[op].saves else (y, None)


def vjp(reading, op, g, y, saved, arrays, attributes, needs=None):
    """The gradients of the bare implementation, one for each array; in its shape, if of NumPy."""
    extra = {"saved": saved} if reading[op].saves else {}
    if op.name in reading.kernels:
        wanted = tuple(differentiable(op, i, a) for i, a in enumerate(arrays))
        extra["needs"] = wanted if needs is None else needs
    found = reading[op].vjp(g, y, *arrays, **attributes, **extra)
    return [
        without_broadcasting(added_up(d, a), a.shape)
        if isinstance(a, np.ndarray) and d is not None
        else d
        for d, a in zip(found, arrays)
    ]


def added_up(d, a):
    """A gradient that a kernel gives as a function which adds it in place, as an array."""
    if not callable(d):
        return d
    total = np.zeros(a.shape, a.dtype)
    d(total)
    return total


def without_broadcasting(d, shape):
    """d, summed over the axes along which something of the given shape was repeated."""
    if d.shape == shape:
        return d
    ones = (1,) * (d.ndim - len(shape)) + shape
    repeated = tuple(i for i, (n, m) in enumerate(zip(ones, d.shape)) if n != m)
    return d.sum(axis=repeated, keepdims=True).reshape(shape)


def implementation(reading, op, arrays, attributes):
    """The reading, or MATHS where the reading's kernel does not take these arguments."""
    accepts = reading[op].accepts
    fits = accepts is None or accepts(*arrays, **attributes)
    return reading if fits else backend.MATHS


def as32(arrays):
    """The arrays, with float32 in place of float64."""
    return [a.astype(np.float32) if is_float64(a) else a for a in arrays]


def is_float64(a):
    """Whether a is an array of float64: numbers, integers and masks are not."""
    return isinstance(a, np.ndarray) and a.dtype == np.float64


def cotangent(shape, seed=0):
    """A random gradient to start from, which has nothing to do with the inputs."""
    return np.random.default_rng([seed, 7]).standard_normal(shape)


# --- PyTorch --------------------------------------------------------------------------------------


def to_torch(a, requires_grad=False):
    """The same numbers as a torch.Tensor, a leaf."""
    return torch.tensor(np.asarray(a)).requires_grad_(requires_grad)


def torch_grad(y, xs, g=None, **keywords):
    """Gradients by PyTorch, zeros where y does not depend on x."""
    found = torch.autograd.grad(y, xs, g, allow_unused=True, **keywords)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(xs, found)]


def numbers(a):
    """A Tensor, a torch.Tensor or an array, as a NumPy array."""
    if isinstance(a, Tensor):
        return a.data
    return a.numpy(force=True) if isinstance(a, torch.Tensor) else np.asarray(a)


def agree(actual, expected, relative=1e-10):
    """Fails unless shapes and dtypes are equal and no element is off by more than `relative` of the
    largest. What cancels to nothing counts as 1e-3."""
    actual, expected = numbers(actual), numbers(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if np.array_equal(actual, expected, equal_nan=True):
        return
    scale = max(np.abs(expected).max(initial=0), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * scale)
