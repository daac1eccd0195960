"""The laws that every op obeys, whoever wrote it.

A law is a function of one Call of an op. It returns the relative error that it found (0 where
things must be exactly equal), or None where it has nothing to say, and raises LawError if the error
is more than rounding. No law knows any op by name.
"""

import functools
import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from .. import backend
from ..ops import Op
from ..tensor import Tensor
from .cases import (
    Call,
    arguments,
    batch_of,
    core_dimensions,
    cotangent,
    is_float,
    settled,
    unbroadcast_arguments,
    without_defaults,
)
from .gradient import gradcheck
from .point import MeasurementError, largest
from .rounding import spread
from .trial import Law, LawError, Trial

LAWS = []  # in the order of their definition: derivatives first, kernels last


def _drawn(**options):
    """Arguments for an op's own lines, and for a kernel what kernels take."""

    def cases(op, reading, attributes):
        draw = unbroadcast_arguments if _has_kernel(op, reading) else arguments
        return draw(op, attributes, **options)

    return cases


def _has_kernel(op, reading):
    return op.name in reading.kernels


def _law(cases=_drawn(), applies=lambda op, reading: True):  # noqa: B008
    def register(check):
        LAWS.append(Law(check, cases, applies))
        return check

    return register


def laws(op, reading=None, **options):
    """All that an op must obey, as a list of Trials, ready for pytest:

        @pytest.mark.parametrize("law", laws(softplus), ids=str)
        def test_softplus(law):
            law()

    reading   backend.MATHS or another one; None: the op's own lines, and its kernel if it has one
    options   examples=16, the number of arguments to draw; seed=0; shrink=True
    """
    if not isinstance(op, Op):
        raise TypeError(f"an op is what @op makes of a class, not {op!r}; see ops.TABLE")
    kernels = [backend.CPU] if op.name in backend.CPU.kernels else []
    readings = [backend.MATHS, *kernels] if reading is None else [reading]
    return [
        Trial(law, op, reading, **options)
        for reading in readings
        for law in LAWS
        if law.applies(op, reading)
    ]


# --- comparing ------------------------------------------------------------------------------------


def _error(found, expected, what, scale=None, noise=None):
    """The largest difference in units of the largest element (or of `scale`).

    noise   a function that measures what rounding amounts to where large terms cancel; it is only
            asked when the difference is more than rounding in the result alone
    """
    found, expected = np.asarray(found), np.asarray(expected)
    _same_kind(found, expected, what)
    gap = np.array(np.abs(found - expected))
    gap[(found == expected) | (np.isnan(found) & np.isnan(expected))] = 0
    if not gap.any():
        return 0.0
    gap[np.isnan(gap)] = np.inf
    finite = np.abs(expected[np.isfinite(expected)])
    scale = largest(finite) if scale is None else scale
    worst = np.unravel_index(np.argmax(gap), gap.shape)
    tolerance = 200 * np.finfo(found.dtype).eps * scale * gap.size**0.25
    if gap[worst] > tolerance and not (noise and gap[worst] <= 20 * noise()):
        raise LawError(
            f"{what}, element {tuple(map(int, worst))}: {found[worst]:.12g}, "
            f"expected {expected[worst]:.12g}"
        )
    return float(gap[worst] / scale) if gap[worst] <= tolerance else 0.0


def _same_kind(found, expected, what):
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise LawError(
            f"{what}: shape {found.shape} of {found.dtype}, "
            f"expected {expected.shape} of {expected.dtype}"
        )


def _identical(found, expected, what):
    """The same bits (but -0 is 0, and every NaN is NaN)."""
    found, expected = np.asarray(found), np.asarray(expected)
    _same_kind(found, expected, what)
    different = (found != expected) & ~((found != found) & (expected != expected))
    if different.any():
        i = tuple(map(int, np.argwhere(different)[0]))
        raise LawError(f"{what}, element {i}: {found[i]!r}, expected {expected[i]!r}")


def _worst_error(call, found, expected, noise, scales=None):
    """The worst error of [y, gradients...]; noise() tells what rounding amounts to in each."""
    worst, noise = 0.0, functools.cache(noise)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        scale = None if scales is None else scales[i]
        worst = max(worst, _error(f, e, _name(call, i), scale, lambda i=i: noise()[i]))
    return worst


def _noise(compute, call, g):
    """What rounding inside compute(call, g) amounts to, for each of its arrays."""
    maths = replace(call, reading=backend.MATHS)
    found = spread(lambda arrays: compute(maths.on(arrays[:-1]), arrays[-1]), [*call.arrays, g])
    return [largest(s) for s in found]


def _rounded(a, factor=1.0):
    """Numbers that float32 can hold, in float64."""
    return np.asarray(a * factor).astype(np.float32).astype(np.float64) if is_float(a) else a


def _name(call, i):
    """The i-th of [y, gradients...] in words."""
    if i == 0:
        return "the output"
    position = call.free[i - 1]
    name = call.op.arrays[0 if call.op.variadic else position]
    return f"the gradient of input {position} ({name})"


# --- derivatives ----------------------------------------------------------------------------------


@_law(cases=_drawn(far=True))
def derivative(call):
    """⟨g, J u⟩ = ⟨vjp(g), u⟩: what forward's Jacobian J does, vjp does transposed."""
    return _gradcheck(call)


@_law(cases=_drawn(ties=True))
def ties(call):
    """The same at equal elements, exactly on kinks, and with indices that repeat."""
    return _gradcheck(call)


@_law()
def second(call):
    """The same for vjp itself, as a function of the inputs and of g: second derivatives."""
    return _gradcheck(call, order=2, directions=1)


def _gradcheck(call, **options):
    f, xs = call.function()
    try:
        return gradcheck(f, *xs, subgradients=False, **options)
    except MeasurementError:
        return None


@_law()
def linear(call):
    """vjp(a g + b h) = a vjp(g) + b vjp(h)."""
    shape = call.forward()[0].shape
    g, h, a, b = cotangent(shape, 1), cotangent(shape, 2), 1.7e6, -0.6
    y, *by_g = call.results(g)
    _, *by_h = call.results(h)
    expected = [y, *(a * x + b * z for x, z in zip(by_g, by_h, strict=True))]
    scales = [largest(y), *(largest(x) + largest(z) for x, z in zip(by_g, by_h))]
    found = call.results(a * g + b * h)
    noise = lambda: _noise(Call.results, call, a * g + b * h)  # noqa: E731
    return _worst_error(call, found, expected, noise, scales)


@_law()
def zero(call):
    """vjp(0) = 0, exactly."""
    _, *gradients = call.results(np.zeros(call.forward()[0].shape))
    for i, d in enumerate(gradients, 1):
        _identical(d, np.zeros(d.shape), _name(call, i))
    return 0.0


# --- shapes and layouts ---------------------------------------------------------------------------


def _has_batches(op, reading):
    return bool(op.signature and set(op.arrays) - set(op.fixed))


@_law(cases=lambda op, _, attributes: arguments(op, attributes), applies=_has_batches)
def broadcast(call):
    """Arrays that are repeated on purpose give what broadcasting gives; the gradients add up."""
    repeated = call.on(_repeated(call))
    g = cotangent(repeated.forward()[0].shape)
    y, *gradients = repeated.taped_results(g)
    summed = [settled(d, call.arrays[i]) for i, d in zip(call.free, gradients, strict=True)]
    return _worst_error(
        call,
        call.taped_results(g),
        [y, *summed],
        lambda: _noise(Call.taped_results, call, g),
        [largest(y), *map(largest, gradients)],
    )


def _repeated(call):
    """The arrays with all their batch axes written out."""
    cores = core_dimensions(call.op)
    shapes = {
        i: (a.shape[: a.ndim - len(core)], a.shape[a.ndim - len(core) :])
        for i, (a, core, name) in enumerate(zip(call.arrays, cores, call.op.arrays))
        if isinstance(a, np.ndarray) and name not in call.op.fixed
    }
    batch = np.broadcast_shapes(*[batch for batch, _ in shapes.values()])
    return [
        np.array(np.broadcast_to(a, batch + shapes[i][1])) if i in shapes else a
        for i, a in enumerate(call.arrays)
    ]


def _single_rows(op, reading, attributes):
    return unbroadcast_arguments(op, attributes, batches=((1,), (1, 2)))


@_law(applies=lambda op, _: op.signature and not {"axis", "keepdims"} & set(op.attributes))
def shape(call):
    """The output has the shape that the op's signature says."""
    cores, (outer,) = core_dimensions(call.op), core_dimensions(call.op, "output")
    sizes, batches = {}, []
    for a, core, name in zip(call.arrays, cores, call.op.arrays):
        if isinstance(a, np.ndarray):
            sizes |= dict(zip(core, a.shape[a.ndim - len(core) :]))
            batches.append(() if name in call.op.fixed else a.shape[: a.ndim - len(core)])
    wanted = np.broadcast_shapes(*batches) + tuple(sizes[name] for name in outer)
    found = call.forward()[0].shape
    if found != wanted:
        raise LawError(f"{call.op.signature}: the output has shape {found}, expected {wanted}")
    return 0.0


@_law(cases=_single_rows, applies=_has_batches)
def empty(call):
    """An empty batch gives an empty result, and zeros for the weights' gradients."""
    one, _ = call.forward()
    if one.shape[:1] != (1,) or not _counts_axes_from_the_end(call.attributes):
        return None  # it is about an axis of the batch itself: there need be no result
    none = call.on(_no_rows(call))
    y, *gradients = none.taped_results()
    _identical(y, one[:0], "the output")
    for i, d in enumerate(gradients, 1):
        _identical(d, np.zeros_like(none.arrays[none.free[i - 1]]), _name(none, i))
    return 0.0


def _counts_axes_from_the_end(attributes):
    axis = attributes.get("axis", -1)
    axes = axis if isinstance(axis, tuple) else (axis,)
    return all(a is not None and a < 0 for a in axes)


def _no_rows(call):
    """The arrays with none of the one row that their batches have."""
    fixed = [name in call.op.fixed for name in call.op.arrays]
    return [
        a[:0] if isinstance(a, np.ndarray) and not fixed[i] else a
        for i, a in enumerate(call.arrays)
    ]


@_law()
def layout(call):
    """Gaps between elements, reversed axes and Fortran order change nothing."""
    g = cotangent(call.forward()[0].shape)
    found = call.on(map(_spread_out, call.arrays)).results(_spread_out(g))
    noise = lambda: _noise(Call.results, call, g)  # noqa: E731
    return _worst_error(call, found, call.results(g), noise)


def _spread_out(a):
    """The same numbers, in reverse and with gaps between them."""
    if not isinstance(a, np.ndarray) or not a.ndim:
        return a
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype, order="F")[..., ::-2]
    wide[...] = a
    return wide


# --- numbers --------------------------------------------------------------------------------------


@_law(cases=_drawn(max_side=8))
def magnitudes(call):
    """In float32, from 1e-20 to 1e4: finite wherever the maths in float64 is finite and fits."""
    rng = np.random.default_rng(0)
    domains = [call.op.domains.get(name) for name in call.op.arrays * len(call.arrays)]
    for _ in range(4):
        arrays = [
            _with_magnitudes(rng, a, domain) if is_float(a) else a
            for a, domain in zip(call.arrays, domains)
        ]
        small = call.on(arrays).cast(np.float32)
        exact = replace(small, reading=backend.MATHS).cast(np.float64)
        g = cotangent(exact.forward()[0].shape).astype(np.float32)
        wanted = exact.results(g.astype(np.float64))
        found = small.results(g.astype(small.forward()[0].dtype))
        _finite_where_it_can_be(call, found, wanted)
    return 0.0


def _finite_where_it_can_be(call, found, wanted):
    limit = float(np.finfo(np.float32).max) / 4
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        lost = ~np.isfinite(f) & (np.abs(w) < limit)
        if lost.any():
            at, what = tuple(map(int, np.argwhere(lost)[0])), _name(call, i)
            raise LawError(f"{what}, element {at}: {f[at]} in float32, {w[at]:.6g} in float64")


def _with_magnitudes(rng, a, domain):
    """Numbers of very different size, in the domain."""
    if domain == "positive":
        return 10.0 ** rng.uniform(-4, 4, a.shape)
    if domain in ("unit", "target"):
        return np.clip(a, 1e-6, 1 - 1e-6)
    if domain is None:
        exponents = rng.uniform(rng.choice([-20.0, 0.0, 1.0], a.shape), 4)
        return rng.choice([-1.0, 0.0, 1.0], a.shape, p=[0.45, 0.1, 0.45]) * 10.0**exponents
    return a


@_law()
def dtype(call):
    """float32 in, float32 out, forward and backward, and about the numbers of float64."""
    for wanted in (np.float32, np.float64):
        same = call.cast(wanted)
        kept = same.forward()[0].dtype
        if "dtype" not in call.attributes and kept != wanted:
            raise LawError(f"forward of {wanted.__name__} gives {kept}")
        _, *gradients = same.results(cotangent(same.forward()[0].shape).astype(kept))
        for i, d in enumerate(gradients, 1):
            if d.dtype != kept:
                raise LawError(f"{_name(call, i)} is of {d.dtype}, for g of {kept}")
        _, *gradients = same.taped_results()
        for i, d in enumerate(gradients, 1):
            if d.dtype != wanted:
                raise LawError(f"{_name(call, i)} arrives in {d.dtype}, for {wanted.__name__}")
    return 0.0 if "dtype" in call.attributes else _rough_error(call)


def _rough_error(call):
    """The error of float32, where rounding is as much larger as its ε is."""
    call = call.on(map(_rounded, call.arrays))
    g = _rounded(cotangent(call.forward()[0].shape))
    found, exact = _in_float32(call, g), [np.float32(a) for a in call.results(g)]
    ratio = np.finfo(np.float32).eps / np.finfo(np.float64).eps
    return _worst_error(
        call, found, exact, lambda: [n * ratio for n in _noise(Call.results, call, g)]
    )


# --- memory ---------------------------------------------------------------------------------------


@_law()
def pure(call):
    """Inputs, g and what forward saved are never written to; the same call gives the same again."""
    arrays = [np.array(a) if isinstance(a, np.ndarray) else a for a in call.arrays]
    call = call.on(arrays)
    y, saved = call.forward()
    y, g = np.array(y), cotangent(y.shape)
    given = [*arrays, y, g, *_arrays_in(saved)]
    before = [np.array(a) for a in given]
    for a in [*arrays, y, g]:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False
    first = [np.array(d) for d in call.shaped(call.vjp(g, y, saved))]
    for a, b in zip(given, before, strict=True):
        _identical(a, b, "something that vjp was given and wrote to")
    for i, d in enumerate(call.shaped(call.vjp(g, y, saved)), 1):
        _identical(d, first[i - 1], f"{_name(call, i)}, computed a second time")
    again = call.forward()[0]
    _identical(again, y, "the output, computed a second time")
    call.on(a * 0.5 if is_float(a) else a for a in arrays).forward()
    _identical(again, y, "the output, after forward has computed something else")
    return 0.0


def _arrays_in(saved):
    """The arrays that forward saved."""
    parts = saved if isinstance(saved, tuple | list) else [saved]
    return [a for a in parts if isinstance(a, np.ndarray)]


@_law()
def sharing(call):
    """vjp may return g itself or a view of it: sums of gradients elsewhere are not corrupted."""
    f, xs = call.function()
    shape = call.forward()[0].shape
    g, k = cotangent(shape, 1), cotangent(shape, 2)
    hs = [cotangent(x.shape, 3) for x in xs]
    leaves = [Tensor(x, requires_grad=True) for x in xs]
    mates = [Tensor(np.zeros(x.shape), requires_grad=True) for x in (*xs, g)]
    inputs = [leaf * 1.0 for leaf in leaves]

    def others():
        """More terms for the same gradients: an addition gives one array to both of its sides."""
        sums = [((x + mate) * h).sum() for x, mate, h in zip(inputs, mates, hs)]
        return sum(sums, (mates[-1] * k).sum())

    older, y = others(), f(*inputs)
    (older + ((mates[-1] + y) * g).sum() + others()).backward()
    alone = call.results(g)
    expected = [alone[0], *(d + 2 * h for d, h in zip(alone[1:], hs, strict=True))]
    noise = lambda: _noise(Call.results, call, g)  # noqa: E731
    found = [y.data, *(leaf.grad.data for leaf in leaves)]
    worst = _worst_error(call, found, expected, noise)
    for mate, wanted in zip(mates, [*(2 * h for h in hs), g + 2 * k], strict=True):
        what = "the gradient of a Tensor that was added to an input or to the output"
        worst = max(worst, _error(mate.grad.data, wanted, what))
    _no_memory_in_common([g, *call.taped_results(g)[1:]])
    return worst


def _no_memory_in_common(arrays):
    for i, j in itertools.combinations(range(len(arrays)), 2):
        if np.shares_memory(arrays[i], arrays[j]):
            raise LawError("what grad returns shares memory with g, or among itself")


@_law()
def tape(call):
    """Recorded for second derivatives, with `saved` computed again, vjp gives the same numbers."""
    g = cotangent(call.forward()[0].shape)
    found, expected = call.taped_results(g, create_graph=True), call.taped_results(g)
    return _worst_error(call, found, expected, lambda: _noise(Call.taped_results, call, g))


# --- kernels --------------------------------------------------------------------------------------


_UNITS = 32


@_law(cases=_drawn(max_side=12), applies=_has_kernel)
def kernel(call):
    """In float32 the kernel is about as exact as the op's own lines can be."""
    if not call.cast(np.float32).implementation.is_kernel:
        return None  # left to the maths
    exact, units, found = inexactness(call)
    worst = 0.0
    for i, (e, u, f) in enumerate(zip(exact, units, found, strict=True)):
        gap = np.abs(f - e)
        if not (gap <= _UNITS * u).all():  # NaN is no less wrong
            at = tuple(map(int, np.unravel_index(np.argmax(gap / u), gap.shape)))
            raise LawError(
                f"{_name(call, i)}, element {at}: {f[at]:.9g} in float32, exactly {e[at]:.9g}"
            )
        scale, noise = largest(e), largest(u)
        if scale > 1e5 * noise:  # else large terms cancel, and the relative error says nothing
            worst = max(worst, float(gap.max() / scale))
    return worst


def inexactness(call):
    """(exact, units, found), each a list of y and the gradients: the op's own lines in float64,
    what rounding in float32 amounts to for each element, and the kernel in float32.

    The unit is the error of the op's own lines in float32 when all that goes in moves by a
    rounding: what cannot be helped.
    """
    rng = np.random.default_rng(0)

    def moved(a):
        return _rounded(a, rng.choice([1 - 2.0**-23, 1 + 2.0**-23], np.shape(a)))

    maths = Call(call.op, backend.MATHS, tuple(map(_rounded, call.arrays)), call.attributes)
    g = _rounded(cotangent(maths.forward()[0].shape))
    exact = maths.results(g)
    units = [np.abs(e) * 2.0**-24 + np.finfo(np.float32).tiny for e in exact]
    for _ in range(8):
        near = _in_float32(maths.on(map(moved, maths.arrays)), moved(g))
        units = [np.maximum(u, np.abs(n - e)) for u, n, e in zip(units, near, exact)]
    return exact, units, _in_float32(call.on(maths.arrays), g)


def _in_float32(call, g):
    return call.cast(np.float32).results(g.astype(np.float32))


def _large(op, reading, attributes):
    """Core axes, or the batch where there are none, longer than a block of any kernel."""
    sizes = [(500, 40, 600, 36), (30, 40, 50, 36)]
    batch = (2,) if op.signature.strip("()->,") else (140_000,)
    return st.sampled_from(sizes).map(
        lambda lengths: (
            without_defaults(op, batch_of(op, batch, lengths, attributes=attributes)),
            attributes,
        )
    )


@_law(cases=_large, applies=lambda op, reading: _has_kernel(op, reading) and op.signature)
def large(call):
    """The same on arrays longer than its blocks, and in float64, too."""
    g = cotangent(call.forward()[0].shape)
    maths = replace(call, reading=backend.MATHS)
    noise = lambda: _noise(Call.results, call, g)  # noqa: E731
    return _worst(kernel(call), _worst_error(call, call.results(g), maths.results(g), noise))


def _worst(*errors):
    return max((error for error in errors if error is not None), default=None)


@_law(applies=_has_kernel)
def fresh(call):
    """A kernel's gradients share no memory with anything; asked for singly, they are the same."""
    if not call.implementation.is_kernel:
        return None  # left to the maths
    y, saved = call.forward()
    g = cotangent(y.shape)
    given = [g, y, *call.arrays, *_arrays_in(saved)]
    found = call.vjp(g, y, saved)
    for i, (position, d) in enumerate(zip(call.free, found), 1):
        for other in [*given, *found[: i - 1]]:
            arrays = isinstance(other, np.ndarray) and isinstance(d, np.ndarray)
            if arrays and np.shares_memory(d, other):
                raise LawError(f"{_name(call, i)} shares memory with something else")
        needs = tuple(j == position for j in range(len(call.arrays)))
        alone = call.vjp(g, y, saved, needs)[i - 1]
        x = call.arrays[position]
        _identical(settled(alone, x), settled(d, x), f"{_name(call, i)}, asked for alone")
    return 0.0
