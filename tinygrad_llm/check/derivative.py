"""Derivatives without calculus: what backward is compared with.

Both ways take a function of a list of arrays, a point xs and a direction us (a list of arrays,
too), and return J u, the derivative of the function at xs along us.
"""

import numpy as np

from .. import backend

_COMPLEX_STEP = 1e-20  # of an element's own size
FIRST_STEP = 1 / 32  # likewise
STEPS = 12  # each half as long as the one before
_EPS = np.finfo(np.float64).eps


def complex_step(function, xs, us, factor=1):
    """J u from f(x + ihu) = f(x) + ih J u + O(h²): no subtraction, so h can be tiny and the error
    is rounding (Squire & Trapp, 1998). Raises what f raises where it cannot take complex numbers.
    """
    h = factor * _step(xs, us, _COMPLEX_STEP)
    stepped = [np.asarray(x + 1j * (h * u)).view(backend.ComplexStep) for x, u in zip(xs, us)]
    with backend.using(backend.COMPLEX):
        return np.asarray(function(stepped)).imag / h


def complex_step_truncation(function, xs, us):
    """How far J u by a complex step may be off because of O(h²): it matters where J u is exactly
    zero, like the derivative of x³ at 0.
    """
    return np.abs(complex_step(function, xs, us) - complex_step(function, xs, us, factor=2))


def central_differences(function, xs, us, noise=0.0, steps=STEPS):
    """(J u, error bar), both of the function's shape, by Romberg's extrapolation of
    (f(x + hu) - f(x - hu)) / 2h, whose error is a series in h², from some steps h.

    noise   what rounding in the function's value amounts to, where that is more than half a digit
    """
    h = _step(xs, us, FIRST_STEP)
    rows, errors = [], []
    for _ in range(steps):
        after, before = _moved(function, xs, us, h), _moved(function, xs, us, -h)
        rows.append((after - before) / (2 * h))
        errors.append(_rounding(noise, after, before) / h)
        h /= 2
    return _extrapolated(rows, errors, power=2)


def one_sided_differences(function, xs, us, side, noise=0.0):
    """The same from (f(x + hu) - f(x)) / h, a series in h, on one side: side is 1 or -1."""
    h = side * _step(xs, us, FIRST_STEP)
    here = function(xs)
    rows, errors = [], []
    for _ in range(STEPS):
        there = _moved(function, xs, us, h)
        rows.append((there - here) / h)
        errors.append(_rounding(noise, there, here) / abs(h))
        h /= 2
    return _extrapolated(rows, errors, power=1)


def _rounding(noise, *values):
    """What rounding in a difference of two values amounts to."""
    return np.maximum(2 * noise, _EPS * sum(map(np.abs, values)))


def natural_scale(x):
    """How far each element may be moved: its own size, or the array's where it is zero."""
    size = np.abs(x)
    return np.where(size > 0, size, np.max(size, initial=0.0) or 1.0)


def _step(xs, us, fraction):
    """The step in which the element that moves farthest moves by this fraction of its scale."""
    fractions = [np.max(np.abs(u) / natural_scale(x), initial=0.0) for x, u in zip(xs, us)]
    step = fraction / (max(fractions, default=0.0) or 1.0)
    return max(step, 1e-250)  # whatever is smaller has too few digits


def _moved(function, xs, us, h):
    return np.asarray(function([x + h * u for x, u in zip(xs, us)]))


def _extrapolated(rows, roundings, power):
    """(value, error bar) for h -> 0, element by element, when rows[k] belongs to the step h/2^k and
    has an error in h^power, h^(2 power), ... : each column of Romberg's triangle removes one term.

    In each row of the triangle the entry that differs least from its two neighbours is best; its
    error is the larger of these differences, of its distance from the best of the next row, and of
    the rounding in its row. The best row wins (after Ridders, 1982).
    """
    bests, errors, above = [], [], []
    for row, rounding in zip(rows, roundings):
        current, best, error = [row], row, np.full(row.shape, np.inf)
        for j, older in enumerate(above, 1):
            last = current[-1]
            better = last + (last - older) / (2 ** (power * j) - 1)
            change = np.maximum(np.abs(better - last), np.abs(better - older))
            best, error = np.where(change < error, better, best), np.fmin(change, error)
            current.append(better)
        above = current
        bests.append(best)
        errors.append(np.maximum(error, rounding))
    value, bar = rows[-1], np.full(rows[-1].shape, np.inf)
    for best, error, following in zip(bests, errors, bests[1:]):
        error = np.maximum(error, np.abs(best - following))
        value, bar = np.where(error < bar, best, value), np.where(error < bar, error, bar)
    return value, bar
