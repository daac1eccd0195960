"""Matrix products with what surrounds them done in place, shared out among the threads of the team.

BLAS could use several threads for each product, too; but what lies between two products it leaves
to one, and its threads, awake for the next product, are in the way there.
"""

from functools import partial

import numpy as np

from ...threads import share
from ._blocks import shares
from ._few_rows import product
from .elementwise import gelu_and_slope

KERNELS = ("linear",)
FUSED = ("mlp",)


class linear:
    """y = x wᵀ + b: one matrix product over all rows of the batch, the bias added in place."""

    @staticmethod
    def forward(x, w, b=None):
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        y = np.empty((len(rows), len(w)), x.dtype)  # (N, out)
        share(lambda i: affine(rows[i], w, b, y[i]), shares(len(rows), w.size * len(rows)))
        return y.reshape(*x.shape[:-1], len(w)), None

    @staticmethod
    def vjp(g, y, x, w, b=None, *, saved, needs):
        g, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, out), (N, in)
        x_bar, w_bar, b_bar = empty_like([rows, w, b], (*needs, False)[:3])
        together([*input_gradient(g, w, x_bar), *weight_gradients(g, rows, w_bar, b_bar)])
        return x_bar if x_bar is None else x_bar.reshape(x.shape), w_bar, b_bar

    @staticmethod
    def accepts(x, w, b=None):
        """Something to multiply, of one dtype throughout, so that in-place sums do not lose
        digits.
        """
        return is_layer(w, b) and multiplies(x, w, b)


class mlp:
    """y = h downᵀ + c,  h = gelu(a),  a = x upᵀ + b, with the tanh form of GELU

    x (..., k), up (m, k), b (m,), down (n, m), c (n,) -> (..., n). Saved: h, and gelu'(a) in the
    place of a, so that backward makes ā = (g down) ⊙ gelu'(a) by one multiplication.
    """

    @staticmethod
    def forward(x, up, b, down, c, *, activation="gelu_tanh"):
        rows, shape = x.reshape(-1, x.shape[-1]), (x.size // x.shape[-1], len(up))
        h, slope = np.empty(shape, x.dtype), np.empty(shape, x.dtype)
        y = np.empty((len(rows), len(down)), x.dtype)

        def some(i):
            affine(rows[i], up, b, slope[i])
            gelu_and_slope(slope[i], h[i])
            affine(h[i], down, c, y[i])

        share(some, shares(len(rows), 2 * up.size * len(rows)))
        return y.reshape(*x.shape[:-1], len(down)), (h, slope)

    @staticmethod
    def vjp(g, y, x, up, b, down, c, *, saved, needs, activation="gelu_tanh"):
        h, slope = saved
        g, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        x_bar, up_bar, b_bar, down_bar, c_bar = empty_like([rows, up, b, down, c], needs)
        a_bar = np.empty(h.shape, h.dtype)

        def some(i):
            np.matmul(g[i], down, out=a_bar[i])
            a_bar[i] *= slope[i]
            if x_bar is not None:
                np.matmul(a_bar[i], up, out=x_bar[i])

        if any(needs[:3]):
            share(some, shares(len(rows), 2 * up.size * len(rows)))
        of_down = weight_gradients(g, h, down_bar, c_bar)
        together([*of_down, *weight_gradients(a_bar, rows, up_bar, b_bar)])
        x_bar = x_bar if x_bar is None else x_bar.reshape(x.shape)
        return x_bar, up_bar, b_bar, down_bar, c_bar

    @staticmethod
    def accepts(x, up, b, down, c, *, activation="gelu_tanh"):
        layers = is_layer(up, b) and is_layer(down, c)
        return activation == "gelu_tanh" and layers and multiplies(x, up, b, down, c)


def multiplies(x, *others):
    """Whether there is something to multiply, and all have one dtype, of 32 bits or more."""
    same = all(a is None or getattr(a, "dtype", None) == x.dtype for a in others)
    return same and x.dtype.char in "fd" and x.ndim > 0 and x.size > 0 and others[0].size > 0


def is_layer(w, b):
    """Whether these are a weight (m, k) and a bias (m,) or None."""
    return w.ndim == 2 and (b is None or getattr(b, "shape", None) == w.shape[:1])


def affine(x, w, b, y):
    """y = x wᵀ + b, for some rows."""
    product(x, w, y)
    if b is not None:
        y += b


def empty_like(arrays, needs):
    """An array for the gradient of each that needs one, else None."""
    return [np.empty_like(a) if need else None for a, need in zip(arrays, needs, strict=True)]


def input_gradient(g, w, x_bar):
    """What computes x_bar = g w, unless that is None: functions, for each thread one."""
    if x_bar is None:
        return []
    return [partial(np.matmul, g[i], w, x_bar[i]) for i in shares(len(g), w.size * len(g))]


def weight_gradients(g, x, w_bar, b_bar):
    """What computes w_bar = gᵀ x and b_bar = Σ g over the rows, unless they are None."""
    ones = np.ones(len(g), g.dtype)  # a sum as a product, since BLAS sums fastest

    def some(j):
        if w_bar is not None:
            np.matmul(g[:, j].T, x, out=w_bar[j])
        if b_bar is not None:
            np.matmul(ones, g[:, j], out=b_bar[j])

    if w_bar is None and b_bar is None:
        return []
    return [partial(some, j) for j in shares(g.shape[1], g.size * x.shape[1])]


def together(functions):
    """Calls them, each by the thread that is free next."""
    share(lambda function: function(), functions)
