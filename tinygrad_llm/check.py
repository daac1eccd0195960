"""A gradient checker without a step size to choose, and without tolerances to guess.

For a function y = f(x) and random directions u and g, the law ⟨g, J u⟩ = ⟨vjp(g), u⟩ must hold,
where J is the Jacobian. The left side comes from a complex step: f(x + ihu) = f(x) + ih J u +
O(h²), so the imaginary part over h is J u with no subtraction, and h can be 1e-30. The right side
is what backward computes. Rounding is all that may come between the two, and the tolerance is
computed from it.
"""

import math

import numpy as np

from . import backend
from .tensor import Tensor, grad, no_grad

_H = 1e-30
_EPS = np.finfo(np.float64).eps


class GradientError(AssertionError):
    """A gradient is wrong. The message names the input, the element and both values."""


def gradcheck(f, *inputs, directions=3, seed=0):
    """Checks the gradients of f at the given inputs; returns the largest relative error found,
    not counting directions in which the derivative is nothing but rounding.

    f           a function of Tensors that returns one Tensor, of any shape; ops are all it may use
                on its arguments, and it must give the same result every time (no random dropout)
    inputs      arrays or Tensors: floating-point ones are differentiated, in float64; integers and
                booleans are passed on. To hold a floating-point argument constant, close over it.
    directions  how many random pairs (u, g) to try
    Raises GradientError if a gradient is wrong, ValueError if f is not deterministic, TypeError if
    there is nothing to differentiate.
    """
    with np.errstate(all="ignore"):  # what is not finite is reported below
        return _worst_error(_Point(f, inputs), directions, np.random.default_rng(seed))


def _worst_error(point, directions, rng):
    worst = 0.0
    for _ in range(directions):
        g = rng.standard_normal(point.output_shape)
        us = [rng.standard_normal(x.shape) for x in point.xs]
        left, right, scale = point.sides(g, us)
        gap, tolerance = abs(left - right), point.rounding(scale)
        if gap <= tolerance < math.inf:
            worst = max(worst, gap / scale if gap else 0.0)
            continue
        tolerance += 20 * point.noise(g, us)
        if not gap <= tolerance < math.inf:  # NaN is no number to be trusted, either
            raise GradientError(_explain(point, g, us, tolerance))
    return worst


class _Point:
    """A function at some inputs: its output, and both sides of the law."""

    def __init__(self, f, inputs):
        arrays = [np.asarray(a.data if isinstance(a, Tensor) else a) for a in inputs]
        self.f = f
        self.constants = {i: a for i, a in enumerate(arrays) if a.dtype.kind != "f"}
        self.positions = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"]
        self.xs = [arrays[i].astype(np.float64) for i in self.positions]
        if not self.positions:
            kinds = ", ".join(str(a.dtype) for a in arrays) or "none"
            raise TypeError(f"no input to differentiate: pass floating-point arrays, not {kinds}")
        self.size = max([x.size for x in self.xs], default=1)
        with no_grad():
            first, second = self._call(self.xs).data, self._call(self.xs).data
        if not np.array_equal(first, second, equal_nan=True):
            raise ValueError("f gives another result each time; switch dropout off or fix its mask")
        self.output_shape = first.shape

    def _call(self, arrays, requires_grad=False):
        """f at other values of the inputs; with gradients, (y, the inputs as Tensors)."""
        tensors = [Tensor(a, requires_grad) for a in arrays]
        arguments = dict(zip(self.positions, tensors)) | {
            i: Tensor(a) for i, a in self.constants.items()
        }
        y = self.f(*[arguments[i] for i in range(len(arguments))])
        if not isinstance(y, Tensor):
            raise TypeError(f"f must return a Tensor, not {type(y).__name__}")
        return (y, tensors) if requires_grad else y

    def backward(self, g, xs=None):
        """vjp(g): one array for each differentiated input."""
        y, tensors = self._call(self.xs if xs is None else xs, requires_grad=True)
        if not y.requires_grad:
            return [np.zeros(x.shape) for x in self.xs]
        found = grad(y, tensors, g, allow_unused=True)
        return [np.zeros(x.shape) if d is None else d.data for x, d in zip(self.xs, found)]

    def directional(self, us, xs=None):
        """J u, by a complex step."""
        with backend.using(backend.COMPLEX), no_grad():
            stepped = [
                np.asarray(x + 1j * _H * u).view(backend.ComplexStep)
                for x, u in zip(self.xs if xs is None else xs, us)
            ]
            return np.asarray(self._call(stepped).data).imag / _H

    def sides(self, g, us, xs=None):
        """⟨g, J u⟩, ⟨vjp(g), u⟩, and the size of the terms that were added up for them."""
        left = g * self.directional(us, xs)
        rights = [d * u for d, u in zip(self.backward(g, xs), us)]
        terms = [left, *rights]
        largest = max((float(np.max(np.abs(t))) for t in terms if t.size), default=0.0)
        unit = largest or 1.0  # so that no square overflows or vanishes
        scale = unit * math.sqrt(sum(float(np.sum((t / unit) ** 2)) for t in terms))
        return float(np.sum(left)), sum(float(np.sum(r)) for r in rights), scale

    def rounding(self, scale):
        """What rounding in the two sums can amount to."""
        return 200 * _EPS * scale * self.size**0.25

    def noise(self, g, us):
        """How much both sides move when every input is scaled by a few roundings.

        Where large terms cancel inside f, so that the derivative is next to nothing, this is the
        error that cannot be helped. One common factor keeps ties as ties.
        """
        left, right, _ = self.sides(g, us)
        noise = 0.0
        for k in (1, 2, 3):
            near_left, near_right, _ = self.sides(g, us, [x * (1 + 4 * k * _EPS) for x in self.xs])
            noise = max(noise, abs(near_left - left), abs(near_right - right))
        return noise


def _explain(point, g, us, tolerance):
    """The message: which input, which element, and what it should have been."""
    gradients = point.backward(g)

    def gap(i, mask):
        masked = [u * mask if k == i else np.zeros_like(u) for k, u in enumerate(us)]
        numeric = float(np.sum(g * point.directional(masked)))
        return abs(numeric - float(np.sum(gradients[i] * masked[i])))

    i = max(range(len(us)), key=lambda i: gap(i, np.ones_like(us[i])))
    element = _bisect(lambda mask: gap(i, mask), us[i].shape)
    one = np.zeros(us[i].shape)
    one[element] = 1.0
    directions = [one if k == i else np.zeros_like(u) for k, u in enumerate(us)]
    numeric = float(np.sum(g * point.directional(directions)))
    analytic = float(gradients[i][element])
    return (
        f"wrong gradient of input {point.positions[i]}, shape {us[i].shape}, at element "
        f"{tuple(map(int, element))}: backward gives {analytic:.12g}, a complex step gives "
        f"{numeric:.12g} (for one random cotangent; tolerance {tolerance:.1e})"
    )


def _bisect(gap, shape):
    """The element with a wrong derivative, in about 2 log2(n) evaluations of `gap(mask)`."""
    candidates = np.arange(math.prod(shape))

    def mask(indices):
        m = np.zeros(math.prod(shape))
        m[indices] = 1.0
        return m.reshape(shape)

    while len(candidates) > 1:
        halves = np.array_split(candidates, 2)
        candidates = max(halves, key=lambda half: _order(gap(mask(half))))
    return np.unravel_index(candidates[0], shape)


def _order(gap):
    return math.inf if math.isnan(gap) else gap  # NaN is the worst disagreement
