"""Kinks, where the slopes on the two sides differ: relu at 0, the maximum of equal numbers.

There is no derivative there, and backward may give any value between the slopes. Along a direction
that moves one element alone this is an interval. Elements that share a kink (the equal numbers of a
maximum) are tried together, too: all of them moving up moves the maximum up, so their shares must
add up to one.
"""

import numpy as np

from .derivative import natural_scale, one_sided_differences
from .point import GradientError, norm

MOST_KINKS = 32  # elements of one input
_COTANGENTS = 6


def has_kink(point, i, element):
    """Whether f has different slopes on the two sides of this element."""
    left, right, bar = _slopes(point, point.moving(i, point.unit(i, element)))
    return norm(right - left) > 100 * norm(bar)


def check_kinks(point, held, rng):
    """Raises GradientError unless backward lies between the slopes at all the elements held."""
    elements = [(i, tuple(map(int, e))) for i, h in enumerate(held) for e in np.argwhere(h)]
    alone = {at: _slopes(point, point.moving(at[0], point.unit(*at))) for at in elements}
    for _ in range(_COTANGENTS if elements else 0):
        g = point.random_cotangent(rng)
        gradients = point.backward(g)
        for (i, element), slopes in alone.items():
            left, right, bar = slopes
            smooth = np.abs(right - left) <= 100 * bar
            if smooth.any():  # outputs that have no kink here have no choice, either
                part = np.where(smooth, g, 0.0)
                value = point.backward(part)[i][element]
                _demand(point, part, value, slopes, (i, element))
            _demand(point, g, gradients[i][element], slopes, (i, element))
        if len(elements) > 1:
            _check_together(point, g, gradients, held, alone, rng)


def _check_together(point, g, gradients, held, alone, rng):
    """The same for a direction that moves all of them, if they share kinks: if the slope is not the
    sum of each element's own, which have been checked.
    """
    us = [
        np.where(h, natural_scale(x) * rng.standard_normal(x.shape), 0.0)
        for h, x in zip(held, point.xs)
    ]
    slopes = left, right, bar = _slopes(point, us)
    for (i, element), own in alone.items():
        u, (own_left, own_right, own_bar) = us[i][element], own
        left = left - u * (own_left if u > 0 else own_right)
        right = right - u * (own_right if u > 0 else own_left)
        bar = bar + np.abs(u) * own_bar
    if norm(left, right) > 100 * norm(bar):
        value = sum(float(np.sum(d * u)) for d, u in zip(gradients, us))
        _demand(point, g, value, slopes, next(iter(alone)))


def _slopes(point, us):
    """(slope on the left, slope on the right, error bar) along us, for each element of y."""
    noise = point.rounding_of_value
    left, left_bar = one_sided_differences(point, point.xs, us, -1, noise)
    right, right_bar = one_sided_differences(point, point.xs, us, 1, noise)
    return left, right, left_bar + right_bar


def _demand(point, g, value, slopes, place):
    """`value` must be ⟨g, s⟩ for some slopes s, one for each output, between left and right."""
    left, right, bar = (g * a for a in slopes)
    lowest, highest = float(np.sum(np.minimum(left, right))), float(np.sum(np.maximum(left, right)))
    slack = 10 * norm(bar) + point.rounding(norm(left, right))
    if not lowest - slack <= value <= highest + slack:
        i, element = place
        message = (
            f"wrong {point.what} of {point.place(i, element)}, a kink: backward gives "
            f"{value:.12g}, the slopes on the two sides are {lowest:.12g} and {highest:.12g} (for "
            "one random cotangent)"
        )
        raise GradientError(message, point.positions[i], element, value, (lowest, highest))
