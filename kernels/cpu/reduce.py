"""Softmax, some rows at a time."""

import numpy as np

from ...threads import share
from ._blocks import in_cache, row_by_row

KERNELS = ("softmax",)


class softmax:
    """y = e^x / Σ e^x over the last axis;  x̄ = y ⊙ (g - Σ(g ⊙ y))."""

    @staticmethod
    def forward(x, *, axis=-1):
        n = x.shape[-1]
        rows, y = x.reshape(-1, n), np.empty((x.size // n, n), x.dtype)

        def block(i):
            with row_by_row(len(rows), n):
                softmax_into(y[i], rows[i], is_moderate(rows[i]))

        share(block, in_cache(len(y), n))
        return y.reshape(x.shape), None

    @staticmethod
    def vjp(g, y, x, *, axis=-1, saved, needs):
        n = x.shape[-1]
        g, y, x_bar = g.reshape(-1, n), y.reshape(-1, n), np.empty((x.size // n, n), x.dtype)

        def block(i):
            with row_by_row(len(y), n):
                np.subtract(g[i], np.vecdot(g[i], y[i])[:, None], out=x_bar[i])
                x_bar[i] *= y[i]

        share(block, in_cache(len(y), n))
        return (x_bar.reshape(x.shape),)

    @staticmethod
    def accepts(x, *, axis=-1):
        """Along the last axis, of float32 or float64."""
        last = isinstance(axis, int) and axis in (-1, x.ndim - 1)
        return last and x.ndim > 0 and x.dtype.char in "fd" and x.size > 0


def is_moderate(x):
    """Whether softmax needs no maxima: e^30 is far from overflow and e^-30 from underflow. To find
    each row's maximum costs more than exp, to find that of all is nothing beside it.
    """
    return x.max() <= 30 and x.min() >= -30  # not if they are NaN


def softmax_into(y, x, moderate):
    """y becomes e^x / Σ e^x over the last axis, and may be x itself."""
    np.exp(x if moderate else np.subtract(x, x.max(axis=-1, keepdims=True), out=y), out=y)
    y /= (y @ np.ones(y.shape[-1], y.dtype))[..., None]  # as a product, since BLAS sums fastest
    return y
