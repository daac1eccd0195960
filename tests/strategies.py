"""Hypothesis strategies that draw arguments for any op, from its signature and its domains."""

import re

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm.tensor import apply


def core_dimensions(op):
    """The core dimensions of each array, as names: "(n,k),(k)->(n)" gives [["n", "k"], ["k"]]."""
    inputs = op.signature.split("->")[0]
    return [re.findall(r"\w+", core) for core in re.findall(r"\(([^)]*)\)", inputs)]


def values(rng, domain, shape, sizes):
    """An array of the given shape whose elements lie in the domain of an op's argument."""
    if domain is None:
        return rng.standard_normal(shape)
    if domain == "positive":
        return rng.uniform(0.3, 3, shape)
    if domain in ("unit", "target"):
        return rng.uniform(0.05, 0.95, shape)
    if domain == "bool":
        return rng.random(shape) < 0.6
    if domain == "constant":
        return rng.integers(0, 2, shape) * 1.25
    kind, _, size = domain.partition(" ")
    assert kind == "index", domain
    return rng.integers(0, sizes[size], shape)


def differentiable(op, i):
    """Whether the op's i-th array has a gradient."""
    name = op.arrays[0 if op.variadic else i]
    return op.domains.get(name) in (None, "positive", "unit")


def call(op, arrays, attributes):
    """(f, xs): the op as a function of its differentiable arrays alone, for gradcheck."""
    held = {i: a for i, a in enumerate(arrays) if not differentiable(op, i)}
    free = [i for i in range(len(arrays)) if i not in held]

    def f(*xs):
        given = held | dict(zip(free, xs))
        return apply(op, *[given[i] for i in range(len(arrays))], **attributes)

    return f, [arrays[i] for i in free]


@st.composite
def arguments(draw, op):
    """(arrays, attributes) for one call of the op, in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if op.sample:
        shapes, attributes = op.sample(rng)
        sizes = attributes
    else:
        attributes = draw(st.sampled_from(op.examples))
        shapes, sizes = draw(signature_shapes(op))
    names = op.arrays if not op.variadic else op.arrays * len(shapes)
    domains = [op.domains.get(name) for name in names]
    return [values(rng, d, s, sizes) for d, s in zip(domains, shapes)], attributes


@st.composite
def signature_shapes(draw, op, min_side=1):
    """Shapes that fit the op's signature, with batch axes that broadcast; and its core lengths."""
    cores = core_dimensions(op)
    drawn = draw(
        hnp.mutually_broadcastable_shapes(
            signature=op.signature, max_dims=2, min_side=min_side, max_side=4
        )
    )
    shapes = list(drawn.input_shapes)
    for i, (name, core) in enumerate(zip(op.arrays, cores)):
        if name in op.fixed:
            shapes[i] = shapes[i][len(shapes[i]) - len(core) :]
    sizes = {}
    for shape, core in zip(shapes, cores):
        sizes |= dict(zip(core, shape[len(shape) - len(core) :]))
    return shapes, sizes
