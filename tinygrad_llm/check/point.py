"""A function at some inputs: what is measured, what backward gives, and how exact both are."""

import math
import warnings
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..tensor import Tensor, grad
from .derivative import (
    FIRST_STEP,
    STEPS,
    central_differences,
    complex_step,
    complex_step_truncation,
    natural_scale,
)
from .rounding import AMPLIFIED, spread

_EPS = np.finfo(np.float64).eps


class GradientError(AssertionError):
    """A gradient is wrong. The message names the input, the element and both values, which are
    attributes, too: input, element, analytic (what backward gives), numeric (what was measured; at
    a kink the slopes on the two sides, as a tuple).
    """

    def __init__(self, message, input, element, analytic, numeric):
        super().__init__(message)
        self.input, self.element = input, element
        self.analytic, self.numeric = analytic, numeric


class MeasurementError(ValueError):
    """The derivative of f cannot be measured at these inputs."""


class Sides(NamedTuple):
    """Both sides of the law for one input."""

    left: float  # ⟨g, J u⟩
    right: float  # ⟨vjp(g), u⟩
    scale: float  # the size of the terms that were added up for them
    bar: float  # the error bar of the left side

    @property
    def gap(self):
        return abs(self.left - self.right)


class Point:
    """f at some inputs. `i` counts the inputs that are differentiated: xs[i] is one of them."""

    def __init__(self, f, inputs, derivative, what="gradient"):
        arrays = [np.asarray(a.data if isinstance(a, Tensor) else a) for a in inputs]
        self.f, self.what = f, what
        self.constants = {i: a for i, a in enumerate(arrays) if a.dtype.kind != "f"}
        self.positions = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"]
        self.xs = [read_only(arrays[i].astype(np.float64)) for i in self.positions]
        if not self.positions:
            kinds = ", ".join(str(a.dtype) for a in arrays) or "none"
            raise TypeError(
                f"no input to differentiate: pass floating-point arrays, not {kinds} (what f "
                "closes over, such as the weights of a model, is not checked)"
            )
        for i, x in zip(self.positions, self.xs):
            if not np.isfinite(x).all():
                raise MeasurementError(f"input {i} holds nan or infinity: there is no derivative")
        self.value = self(self.xs)
        if np.isnan(self.value).any():
            raise MeasurementError("f is nan at these inputs: keep to where it is defined")
        if not np.array_equal(self.value, self(self.xs), equal_nan=True):
            raise ValueError("f gives another result each time; switch dropout off or fix its mask")
        self.by_complex_step = derivative == "complex step" or (
            derivative is None and self._takes_complex_numbers()
        )

    # --- f ---

    def _tensor(self, arrays, requires_grad=False):
        """(f at other values of the inputs, the inputs as Tensors)."""
        tensors = [Tensor(a, requires_grad) for a in arrays]
        arguments = dict(zip(self.positions, tensors)) | {
            i: Tensor(a) for i, a in self.constants.items()
        }
        y = self.f(*[arguments[i] for i in range(len(arguments))])
        if not isinstance(y, Tensor):
            raise TypeError(f"f must return a Tensor, not {type(y).__name__}")
        return y, tensors

    def __call__(self, arrays):
        return self._tensor(arrays)[0].data

    def _takes_complex_numbers(self):
        """Whether a complex step measures f's derivative. It may raise an error; and where f drops
        imaginary parts without a word, differences find another derivative, right beside the
        inputs, off their kinks and ties.
        """
        rng = np.random.default_rng(0)
        us = [natural_scale(x) * rng.standard_normal(x.shape) for x in self.xs]
        near = [x + 1e-3 * natural_scale(x) * rng.uniform(0.5, 1, x.shape) for x in self.xs]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                found = complex_step(self, near, us)
        except Exception:  # f has computed with floats, so this is about complex numbers
            return False
        for steps in (4, STEPS):  # a few, and if they contradict, all
            slope, bar = central_differences(self, near, us, self.rounding_of_value, steps)
            if not norm(found - slope) > 100 * norm(bar) + 1e-6 * norm(slope):
                return True
        return False

    def backward(self, g, xs=None):
        """vjp(g): one array for each differentiated input."""
        y, tensors = self._tensor(self.xs if xs is None else xs, requires_grad=True)
        if not y.requires_grad:
            return [np.zeros(x.shape) for x in self.xs]
        found = grad(y, tensors, g, allow_unused=True)
        return [np.zeros(x.shape) if d is None else d.data for x, d in zip(self.xs, found)]

    # --- directions ---

    def random_cotangent(self, rng):
        """Gaussian numbers; zeros where f is infinite (a mask's -inf, say)."""
        g = np.asarray(rng.standard_normal(self.value.shape))
        return read_only(np.where(np.isfinite(self.value), g, 0.0))

    def random_direction(self, rng, i, relative=False):
        """Gaussian numbers; or, always for differences, relative to the sizes of the elements."""
        u = np.asarray(rng.standard_normal(self.xs[i].shape))
        return u * natural_scale(self.xs[i]) if relative or not self.by_complex_step else u

    def moving(self, i, u):
        """The direction in which only input i moves, along u."""
        return [u if k == i else np.zeros(x.shape) for k, x in enumerate(self.xs)]

    # --- both sides ---

    def derivative(self, i, u, xs=None):
        """(J u, error bar) where only input i moves."""
        xs, us = self.xs if xs is None else xs, self.moving(i, u)
        if self.by_complex_step:
            return complex_step(self, xs, us), 0.0
        return central_differences(self, xs, us, self.rounding_of_value)

    def sides(self, g, gradient, i, u, xs=None):
        """Both sides of the law; `gradient` is what backward gives for input i."""
        slope, bar = self.derivative(i, u, xs)
        left, right = g * slope, gradient * u
        return Sides(float(np.sum(left)), float(np.sum(right)), norm(left, right), norm(g * bar))

    # --- how exact they are ---

    def rounding(self, scale):
        """What rounding in the two sums can amount to."""
        terms = max(self.value.size, *(x.size for x in self.xs))
        return 200 * _EPS * scale * terms**0.25

    @cached_property
    def rounding_of_value(self):
        """What rounding inside f amounts to for each element of its value."""
        return spread(lambda arrays: [self(arrays)], self.xs)[0]

    def size_near(self, g, i, u):
        """How large f's value is, here and a step away."""
        near = [x + FIRST_STEP * d for x, d in zip(self.xs, self.moving(i, u))]
        return max(norm(g * self.value), norm(g * self(near)))

    def noise(self, g, i, u):
        """What rounding inside f and its backward pass amounts to: the error that cannot be helped
        where large terms cancel, so that the derivative is next to nothing.
        """
        left, right = [], []
        for k in (1, 2, 3):  # one common factor keeps ties as ties
            near = [x * (1 + AMPLIFIED * 4 * k * _EPS) for x in self.xs]
            moved = self.sides(g, self.backward(g, near)[i], i, u, near)
            left.append(moved.left)
            right.append(moved.right)
        # From 1 to 2 to 3, not from 0: where x lies on a branch's bound, leaving it is a jump.
        left, right = (float(np.max(np.abs(np.diff(v)))) / AMPLIFIED for v in (left, right))
        relative = largest(u) / (largest(self.xs[i]) or 1.0)  # how far u goes, in sizes of x
        left = max(left, relative * norm(g * self.rounding_of_value))
        if self.by_complex_step:
            truncation = complex_step_truncation(self, self.xs, self.moving(i, u))
            left = max(left, float(np.sum(np.abs(g) * truncation)))

        def disturbed(arrays):
            *xs, g = arrays
            return [np.sum(self.backward(Tensor(g), xs)[i] * u)]

        right = max(right, float(spread(disturbed, [*self.xs, g])[0]))
        # No more than f's own rounding and size explain: a backward pass that computes x + 1e30 -
        # 1e30 is noisy, and wrong.
        size = norm(g * self.derivative(i, u)[0]) + relative * norm(g * self.value)
        return left + min(right, 1000 * left + 1e-8 * size)

    # --- words ---

    def place(self, i, element):
        return f"input {self.positions[i]}, shape {self.xs[i].shape}, at element {element}"

    def error(self, g, gradient, i, element):
        """The GradientError for an element of input i; a MeasurementError if f is to blame."""
        analytic, numeric = float(gradient[element]), self.slope(g, i, element)
        infinite = not math.isfinite(analytic) and not np.isfinite(self.value).all()
        if infinite or not math.isfinite(numeric):
            return MeasurementError(f"f has no finite derivative at {self.place(i, element)}")
        how = "a complex step gives" if self.by_complex_step else "central differences give"
        message = (
            f"wrong {self.what} of {self.place(i, element)}: backward gives {analytic:.12g}, "
            f"{how} {numeric:.12g} (for one random cotangent)"
        )
        return GradientError(message, self.positions[i], element, analytic, numeric)

    def slope(self, g, i, element):
        """⟨g, J e⟩ for the unit vector e of one element."""
        return float(np.sum(g * self.derivative(i, self.unit(i, element))[0]))

    def unit(self, i, element):
        """1 for one element of input i, 0 for the others."""
        u = np.zeros(self.xs[i].shape)
        u[element] = 1.0
        return u


def read_only(a):
    """A function that writes to its arguments is caught in the act."""
    a.flags.writeable = False
    return a


def largest(a):
    """The largest absolute value, 0 if there is none."""
    return float(np.max(np.abs(a), initial=0.0))


def norm(*arrays):
    """The root of the sum of all squares, none of which overflows or vanishes."""
    unit = max(map(largest, arrays)) or 1.0
    return unit * math.sqrt(sum(float(np.sum((a / unit) ** 2)) for a in arrays))
