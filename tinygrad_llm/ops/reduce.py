"""Ops that make many numbers one: sums, means, maxima and the softmax family.

`axis` is None (all of them), an integer or a tuple; `keepdims` keeps each reduced axis with length
1. Inside other ops, keepdims=True is the rule.
"""

import math

from . import op

_AXES = [{}, {"axis": -1}, {"axis": 0, "keepdims": True}, {"axis": (0, -1)}]
_ONE_AXIS = [{}, {"axis": 0}]


def _kept(shape, axis):
    """The shape that a reduction with keepdims=True leaves."""
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    reduced = {i % len(shape) for i in axes}
    return tuple(1 if i in reduced else n for i, n in enumerate(shape))


@op("(m,n)->()", examples=_AXES)
class sum:
    """y = Σ_i x_i

    ∂y/∂x_i = 1, for every i:
    x̄ = g"""

    def vjp(xp, g, y, x, *, axis=None, keepdims=False):
        g = xp.reshape(g, y.shape if keepdims else _kept(x.shape, axis))
        return (xp.broadcast_to(g, x.shape),)


@op("(m,n)->()", examples=_AXES)
class mean:
    """y = 1/n Σ_i x_i

    ∂y/∂x_i = 1/n, for every i:
    x̄ = g / n"""

    def vjp(xp, g, y, x, *, axis=None, keepdims=False):
        n = math.prod(x.shape) / (math.prod(y.shape) or 1)
        g = xp.reshape(g, y.shape if keepdims else _kept(x.shape, axis))
        return (xp.broadcast_to(g / n, x.shape),)


@op("(m,n)->()", examples=_AXES)
class max:
    """y = max_i x_i

    g goes to the largest element, where C is 1; several that are equal get the same share each:
    C = [x = y]
    x̄ = (g / Σ(C)) ⊙ C"""

    def vjp(xp, g, y, x, *, axis=None, keepdims=False):
        shape = _kept(x.shape, axis)
        C = xp.astype(x == xp.reshape(y, shape), x.dtype)
        return (xp.reshape(g, shape) / xp.sum(C, axis=axis, keepdims=True) * C,)


@op("(m,n)->()", examples=_AXES)
class min:
    """y = min_i x_i

    g goes to the smallest element, where C is 1; several that are equal get the same share each:
    C = [x = y]
    x̄ = (g / Σ(C)) ⊙ C"""

    vjp = max.vjp  # the same lines: g goes where x has the value y


@op("(m,n)->()", examples=_AXES)
class logsumexp:
    """y = log Σ_j e^{x_j} = m + log Σ_j e^{x_j - m} for any m; m = max_j x_j never overflows

    ∂y/∂x_i = e^{x_i} / Σ_j e^{x_j} = e^{x_i - y}, which is the softmax:
    x̄ = g ⊙ exp(x - y)"""

    def forward(xp, x, *, axis=-1, keepdims=False):
        m = xp.max(x, axis=axis, keepdims=True)
        m = xp.where(xp.isfinite(m), m, 0.0)  # rows of -inf alone: inf - inf would be NaN
        total = xp.sum(xp.exp(x - m), axis=axis, keepdims=True)
        y = m + xp.log(total)
        return y if keepdims else xp.squeeze(y, axis=axis)

    def vjp(xp, g, y, x, *, axis=-1, keepdims=False):
        shape = _kept(x.shape, axis)
        return (xp.reshape(g, shape) * xp.exp(x - xp.reshape(y, shape)),)


@op("(m,n)->(m,n)", examples=_ONE_AXIS)
class softmax:
    """y_i = e^{x_i} / Σ_j e^{x_j}

    Quotient rule: ∂y_i/∂x_j = y_i (δ_ij - y_j).  Times g_i, summed over i:
    x̄ = y ⊙ (g - Σ(g ⊙ y))"""

    def forward(xp, x, *, axis=-1):
        e = xp.exp(x - xp.max(x, axis=axis, keepdims=True))
        return e / xp.sum(e, axis=axis, keepdims=True)

    def vjp(xp, g, y, x, *, axis=-1):
        return (y * (g - xp.sum(g * y, axis=axis, keepdims=True)),)


@op("(m,n)->(m,n)", examples=_ONE_AXIS)
class log_softmax:
    """y_i = x_i - logsumexp(x)

    ∂y_i/∂x_j = δ_ij - softmax(x)_j, and softmax(x) = e^y:
    x̄ = g - exp(y) ⊙ Σ(g)"""

    def forward(xp, x, *, axis=-1):
        shifted = x - xp.max(x, axis=axis, keepdims=True)
        return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))

    def vjp(xp, g, y, x, *, axis=-1):
        return (g - xp.exp(y) * xp.sum(g, axis=axis, keepdims=True),)
