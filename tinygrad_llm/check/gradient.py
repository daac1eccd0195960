"""gradcheck: the gradients of any function of Tensors, against derivatives without calculus.

For y = f(x) and random directions u and g, the law ⟨g, J u⟩ = ⟨vjp(g), u⟩ must hold, where J is
the Jacobian. The left side is measured (derivative.py), the right side is what backward computes.
Rounding, and the error bar of the measurement, are all that may come between the two: the
tolerance is computed from them (point.py). docs/gradient-checking.md explains the method.
"""

import math

import numpy as np

from ..functional import concat
from ..tensor import grad
from .kinks import MOST_KINKS, check_kinks, has_kink
from .point import MeasurementError, Point


def gradcheck(f, *inputs, order=1, directions=3, seed=0, derivative=None, subgradients=True):
    """Checks the gradients of f at the given inputs; returns the largest relative error found,
    not counting directions in which the derivative is nothing but rounding.

    f             a function of Tensors that returns one Tensor, of any shape, and the same one
                  every time (no random dropout); a cast to float32 inside shows as an error
    inputs        arrays or Tensors: floating-point ones are differentiated, in float64; integers
                  and booleans are passed on. To hold a floating-point argument constant, close
                  over it.
    order         2 checks the second derivatives, too: the gradients as functions of the inputs
                  and of the cotangent (in messages, the input after the last)
    directions    how many random pairs (u, g) to try
    seed          of these pairs
    derivative    "complex step": exact to rounding, for functions made of ops and analytic NumPy;
                  "differences": Romberg's, with an error bar, for any function; None: the first,
                  and the second where f cannot take complex numbers
    subgradients  at a kink, where the slopes on the two sides differ (relu at 0, max of equal
                  numbers): accept any value between them. False demands, where a complex step
                  can tell, the slope of the branch that forward takes, and the mean of the
                  branches at a tie of maxima.
    Raises GradientError if a gradient is wrong; ValueError if f is not deterministic, and
    MeasurementError (a ValueError, too) if it is not smooth enough to be measured; TypeError if
    there is nothing to differentiate.
    """
    if derivative not in (None, "complex step", "differences"):
        raise ValueError(f"derivative is 'complex step', 'differences' or None, not {derivative!r}")
    if order not in (1, 2):
        raise ValueError(f"order is 1 or 2, not {order!r}; check the gradient of a gradient by 2")
    if directions < 1:
        raise ValueError(f"directions is 1 or more, not {directions!r}: none would check nothing")
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):  # what is not finite is reported below
        point = Point(f, inputs, derivative)
        worst = _check(point, directions, rng, subgradients)
        if order == 2:
            g = point.random_cotangent(rng)
            point = Point(backward_of(f), (*inputs, g), derivative, "second derivative")
            worst = max(worst, _check(point, directions, rng, subgradients))
    return worst


def backward_of(f):
    """(x..., g) -> all of f's gradients in one vector: a function of Tensors that can be checked in
    its turn, which checks the second derivatives of f.
    """

    def backward(*inputs):
        xs = [x if x.requires_grad or not _is_float(x.data) else _leaf(x) for x in inputs]
        y, g = f(*xs[:-1]), xs[-1]
        wanted = [x for x in xs[:-1] if x.requires_grad]
        if not y.requires_grad:
            return concat([x * 0 for x in _flat(wanted)])
        found = grad(y, wanted, g, create_graph=True, allow_unused=True)
        return concat(_flat([x * 0 if d is None else d for x, d in zip(wanted, found)]))

    return backward


def _leaf(x):
    return x.detach().requires_grad_()


def _flat(tensors):
    return [t.reshape(-1) for t in tensors]


def _is_float(array):
    return array.dtype.kind in "fc"


# --- the law, direction by direction --------------------------------------------------------------


def _check(point, directions, rng, subgradients):
    """The worst relative error over some random directions; GradientError if the law fails."""
    subgradients = subgradients or not point.by_complex_step  # only complex steps know the branch
    held = [np.zeros(x.shape, bool) for x in point.xs]  # elements that lie on a kink
    worst = 0.0
    for k in range(directions):
        g = point.random_cotangent(rng)
        gradients = point.backward(g)
        for i, gradient in enumerate(gradients):  # one by one: a large input must not hide a small
            if not np.isfinite(gradient).all():
                element = tuple(map(int, np.argwhere(~np.isfinite(gradient))[0]))
                raise point.error(g, gradient, i, element)
            u = point.random_direction(rng, i, relative=k % 2 == 1)
            while (error := _relative_error(point, g, gradient, i, ~held[i] * u)) is None:
                element = _wrong_element(point, g, gradient, i, ~held[i] * u)
                known = held[i][element]
                if known or not (subgradients and has_kink(point, i, element)):
                    raise point.error(g, gradient, i, element)
                held[i][element] = True
                if np.count_nonzero(held[i]) > MOST_KINKS:
                    raise MeasurementError(
                        f"more than {MOST_KINKS} elements of an input lie on kinks of f, too many "
                        f"to tell right from wrong, the last one {point.place(i, element)}; "
                        "move the inputs off the kinks"
                    )
            worst = max(worst, error)
    check_kinks(point, held, rng)
    return worst


def _relative_error(point, g, gradient, i, u):
    """How far the two sides of the law are apart; None if farther than rounding explains."""
    sides = point.sides(g, gradient, i, u)
    tolerance = point.rounding(sides.scale) + 10 * sides.bar
    if 10 * sides.bar > 1e-3 * sides.scale + 1e-8 * point.size_near(g, i, u):
        raise MeasurementError(
            f"f cannot be measured here: central differences leave an error of {sides.bar:.1e}; f "
            "jumps, is noisy, or gives nothing but rounding near these inputs: try other ones"
        )
    if sides.gap <= tolerance < math.inf:
        return sides.gap / sides.scale if sides.scale > 10 * sides.bar else 0.0
    tolerance += 20 * point.noise(g, i, u)
    return 0.0 if sides.gap <= tolerance < math.inf else None  # NaN is not to be trusted either


def _wrong_element(point, g, gradient, i, u):
    """The element of input i with the wrong derivative, in about 2 log2(n) evaluations: always on
    with the half of the elements where the sides are farther apart.
    """
    candidates = np.arange(u.size)

    def gap(indices):
        part = np.zeros(u.size)
        part[indices] = u.reshape(-1)[indices]
        gap = point.sides(g, gradient, i, part.reshape(u.shape)).gap
        return math.inf if math.isnan(gap) else gap  # NaN is the worst disagreement

    while len(candidates) > 1:
        candidates = max(np.array_split(candidates, 2), key=gap)
    return tuple(map(int, np.unravel_index(candidates[0], u.shape)))
