"""What an op is tried on: arguments that Hypothesis draws from the op's gufunc signature and
domains, and one call of an op with such arguments.
"""

import inspect
import itertools
import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import backend
from ..ops import Op
from ..tensor import Tensor, apply, grad

# --- one call of an op ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """An op, how it is to be run, and what it is given.

    reading     backend.MATHS, backend.CPU, ...; it must be in force (backend.using)
    arrays      NumPy arrays, or a Python number in place of an array that has a default
    """

    op: Op
    reading: backend.Reading
    arrays: tuple
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        shapes = [str(a.shape) if isinstance(a, np.ndarray) else repr(a) for a in self.arrays]
        names = self.op.arrays * len(shapes) if self.op.variadic else self.op.arrays
        given = [f"{name} {shape}" for name, shape in zip(names, shapes)]
        return ", ".join([*given, *(f"{k}={v}" for k, v in self.attributes.items())])

    def on(self, arrays):
        """The same call with other arrays."""
        return replace(self, arrays=tuple(arrays))

    def cast(self, dtype):
        """The same call in another floating-point dtype."""
        return self.on(a.astype(dtype) if is_float(a) else a for a in self.arrays)

    def differentiable(self, i):
        """Whether the i-th array has a gradient; a number in its place has none."""
        name = self.op.arrays[0 if self.op.variadic else i]
        return isinstance(self.arrays[i], np.ndarray) and has_gradient(self.op, name)

    @property
    def free(self):
        """Positions of the arrays that have a gradient."""
        return [i for i in range(len(self.arrays)) if self.differentiable(i)]

    # --- through the engine ---

    def function(self):
        """(f, xs): the op as a function of Tensors of its differentiable arrays alone."""
        free = self.free

        def f(*xs):
            given = dict(enumerate(self.arrays)) | dict(zip(free, xs))
            return apply(self.op, *given.values(), **self.attributes)

        return f, [self.arrays[i] for i in free]

    def taped_results(self, g=None, create_graph=False):
        """[y, gradients of the differentiable arrays...], arrays, as the engine computes them."""
        f, xs = self.function()
        tensors = [Tensor(x, requires_grad=True) for x in xs]
        y = f(*tensors)
        g = cotangent(y.shape).astype(y.dtype) if g is None else g
        found = grad(y, tensors, g, create_graph=create_graph)
        return [y.data, *(d.data for d in found)]

    # --- without the engine ---

    @property
    def implementation(self):
        """What runs the op: a kernel only if it takes these arguments."""
        chosen = self.reading[self.op]
        fits = chosen.accepts is None or chosen.accepts(*self.arrays, **self.attributes)
        return chosen if fits else backend.MATHS[self.op]

    def forward(self):
        """(y, saved)."""
        chosen = self.implementation
        y = chosen.forward(*self.arrays, **self.attributes)
        y, saved = y if chosen.saves else (y, None)
        return y if isinstance(y, np.ndarray) else np.asarray(y), saved

    def vjp(self, g, y, saved, needs=None):
        """The gradients of the differentiable arrays, as they come: some may be of the broadcast
        shape, and a kernel's may be functions that add themselves.
        """
        chosen = self.implementation
        extra = {"saved": saved} if chosen.saves else {}
        if chosen.is_kernel:
            wanted = tuple(i in self.free for i in range(len(self.arrays)))
            extra["needs"] = wanted if needs is None else needs
        found = chosen.vjp(g, y, *self.arrays, **self.attributes, **extra)
        most = len(self.arrays) if self.op.variadic else len(self.op.arrays)
        if not len(self.arrays) <= len(found) <= most:
            raise ValueError(f"vjp returns {len(found)} gradients for {len(self.arrays)} arrays")
        return [found[i] for i in self.free]

    def results(self, g):
        """[y, gradients...], each gradient in the shape of its array."""
        y, saved = self.forward()
        return [y, *self.shaped(self.vjp(g, y, saved))]

    def shaped(self, found):
        """What vjp returned, added up where something was repeated."""
        for i, d in zip(self.free, found):
            if d is None:
                raise ValueError(f"vjp returns None for input {i}, which has a gradient")
        return [settled(d, self.arrays[i]) for i, d in zip(self.free, found)]


def settled(d, a):
    """A gradient of the array a, in the shape of a, and as an array if it is a function."""
    if callable(d):
        return _added(d, a)
    d = d if isinstance(d, np.ndarray) else np.asarray(d)
    if d.shape == a.shape:
        return d
    ones = (1,) * (d.ndim - a.ndim) + a.shape
    repeated = tuple(i for i, (n, m) in enumerate(zip(ones, d.shape)) if n != m)
    return d.sum(axis=repeated, keepdims=True).reshape(a.shape)


def _added(add_to, a):
    """What a gradient that is a function adds to an array."""
    alone, on_top = np.zeros(a.shape, a.dtype), np.ones(a.shape, a.dtype)
    add_to(alone)
    add_to(on_top)
    if not np.allclose(on_top - 1, alone, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ValueError("a gradient that adds itself to an array loses what was there")
    return alone


def has_gradient(op, name):
    """Whether the op's array of this name has a gradient: ids, masks and targets have none."""
    return op.domains.get(name) in (None, "positive", "unit")


def is_float(a):
    """Whether a is an array of floating-point numbers: Python numbers, ids and masks are not."""
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def cotangent(shape, seed=0):
    """A random gradient to start from, which has nothing to do with the inputs."""
    return np.asarray(np.random.default_rng([seed, 7]).standard_normal(shape))


# --- drawing arguments ----------------------------------------------------------------------------


def core_dimensions(op, of="inputs"):
    """The core dimensions of each array, as names: "(n,k),(k)->(n)" gives [["n", "k"], ["k"]]."""
    inputs, output = op.signature.split("->")
    part = inputs if of == "inputs" else output
    return [re.findall(r"\w+", core) for core in re.findall(r"\(([^)]*)\)", part)]


def defaults(op):
    """The default values of the arrays that have one, by position."""
    parameters = list(inspect.signature(op.vjp).parameters.values())[3:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {i: p.default for i, p in enumerate(positional) if p.default is not p.empty}


def without_defaults(op, arrays):
    """The arrays up to the first that has a default."""
    return arrays[: len(arrays) - len(defaults(op))]


@st.composite
def arguments(draw, op, attributes=None, ties=False, far=False, max_side=4):
    """(arrays, attributes) for one call of the op, in float64: a Hypothesis strategy.

    Shapes fit the op's signature, with batch axes that broadcast. Of the arrays that have a
    default, some may be missing, and some may be the default.
    attributes   one of op.examples; None: any of them
    ties         draws equal elements, kinks hit exactly, and indices that come again and again
    far          draws numbers of the order of 10 and 100, too
    max_side     the longest axis
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if op.sample:
        shapes, attributes = op.sample(rng)
        return fill(op, rng, shapes, attributes, attributes, ties, far), attributes
    attributes = draw(st.sampled_from(op.examples)) if attributes is None else attributes
    dims = draw(st.sampled_from([0, 1, *[2] * 6]))  # mostly large, but shrunk to the first
    side = draw(st.sampled_from([*range(1, max_side), *[max_side] * 6]))
    shapes, sizes = _shapes(op, rng, dims, side)
    arrays = fill(op, rng, shapes, sizes, attributes, ties, far)
    optional = defaults(op)
    missing = draw(st.sampled_from([0, 0, 0, *range(len(optional) + 1)]))
    arrays = arrays[: len(arrays) - missing]
    for i in optional.keys() & set(range(len(arrays) - 1)):
        arrays[i] = draw(st.sampled_from([arrays[i], optional[i]]))
    return arrays, attributes


def _shapes(op, rng, dims, max_side):
    """Shapes that fit the op's signature, and the lengths of the core dimensions. Each array has
    the last few of `dims` batch axes, any of them with length 1 in place of its own; weights none.
    """
    cores = core_dimensions(op)
    sizes = _sizes(cores, iter(lambda: int(rng.integers(1, max_side + 1)), None))
    batch = rng.integers(1, max_side + 1, dims)
    alone = len(set(op.arrays) - set(op.fixed)) < 2  # nothing to broadcast with
    shapes = []
    for name, core in zip(op.arrays, cores):
        own = batch if alone else np.where(rng.random(dims) < 0.3, 1, batch)
        missing = dims if name in op.fixed else 0 if alone else rng.choice([0, 0, 0, 1, 2])
        shapes.append((*own[missing:].tolist(), *[sizes[n] for n in core]))
    return shapes, sizes


@st.composite
def unbroadcast_arguments(
    draw, op, attributes=None, ties=False, far=False, max_side=5, batches=((), (1,), (3,), (2, 3))
):
    """The same without broadcasting, as kernels take them: one of the batch shapes for all arrays;
    of the arrays with a default mostly none, or the last one alone, and now and then all.
    """
    if op.sample:
        return draw(arguments(op, attributes, ties, far))
    attributes = draw(st.sampled_from(op.examples)) if attributes is None else attributes
    lengths = sorted(draw(st.lists(st.integers(1, max_side), min_size=4, max_size=4)))
    seed = draw(st.integers(0, 2**32 - 1))
    batch = draw(st.sampled_from(batches))
    arrays = batch_of(op, batch, lengths, seed, attributes, ties, far)
    given = draw(st.sampled_from(["none", "last", "none", "last", "all"]))
    if given == "none":
        arrays = without_defaults(op, arrays)
    elif given == "last":
        arrays = [defaults(op).get(i, a) for i, a in enumerate(arrays[:-1])] + arrays[-1:]
    return arrays, attributes


def batch_of(op, batch, lengths, seed=0, attributes=None, ties=False, far=False):
    """Arrays for one call of the op: core dimensions of the given lengths, in the order in which
    the signature names them, and the same batch axes for all.
    """
    cores = core_dimensions(op)
    sizes = _sizes(cores, lengths)
    shapes = [
        (() if name in op.fixed else batch) + tuple(sizes[n] for n in core)
        for name, core in zip(op.arrays, cores)
    ]
    rng = np.random.default_rng(seed)
    return fill(op, rng, shapes, sizes, attributes or op.examples[0], ties, far)


def _sizes(cores, lengths):
    """The length of each core dimension; a number in a signature is its own."""
    names = dict.fromkeys(itertools.chain(*cores))
    return {name: int(name) if name.isdigit() else n for name, n in zip(names, lengths)}


def fill(op, rng, shapes, sizes, attributes, ties=False, far=False):
    """Arrays of the given shapes for one call of the op, in float64."""
    names = op.arrays if not op.variadic else op.arrays * len(shapes)
    domains = [op.domains.get(name) for name in names]
    arrays = [np.asarray(_values(rng, d, s, sizes, ties)) for d, s in zip(domains, shapes)]
    size = rng.choice([1.0, 1.0, 10.0, 100.0]) if far else 1.0
    arrays = [np.asarray(a * size) if d is None else a for a, d in zip(arrays, domains)]
    if "ignore_index" in op.attributes:  # some targets are ignored, but never all of them
        ignored = rng.random(arrays[1].shape) < 0.3
        ignored[:1] = False
        arrays[1][ignored] = attributes.get("ignore_index", -100)
    return arrays


def _values(rng, domain, shape, sizes, ties):
    """An array of the given shape whose elements lie in the domain of an op's argument; with
    `ties`, small whole numbers and few different indices.
    """
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
    if kind != "index" or size not in sizes:
        raise ValueError(f"unknown domain {domain!r}; @op's docstring lists them")
    return rng.integers(0, min(sizes[size], 2) if ties else sizes[size], shape)
