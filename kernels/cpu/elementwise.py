"""Activations in place, block by block: each block is read from memory once and written once. The
threads of the team share the blocks out.
"""

import math

import numpy as np

from ...threads import share
from ._blocks import flat, in_cache

KERNELS = ("gelu_tanh",)

_C = math.sqrt(2 / math.pi)


class gelu_tanh:
    """y = x/2 (1 + t),  t = tanh(√(2/π) (x + 0.044715 x³)); t is saved."""

    @staticmethod
    def forward(x):
        x_, y, t = flat(x), np.empty(x.size, x.dtype), np.empty(x.size, x.dtype)

        def block(i):
            xi, yi, ti = x_[i], y[i], t[i]
            np.multiply(xi, xi, out=ti)
            ti *= 0.044715 * _C
            ti += _C
            ti *= xi
            np.tanh(ti, out=ti)
            np.add(ti, 1, out=yi)
            yi *= 0.5
            yi *= xi

        share(block, in_cache(x.size))
        return y.reshape(x.shape), t

    @staticmethod
    def vjp(g, y, x, *, saved, needs):
        x_, g_, t, x_bar = flat(x), flat(g), saved, np.empty(x.size, x.dtype)

        def block(i):
            xi, ti, d = x_[i], t[i], x_bar[i]
            np.multiply(xi, xi, out=d)  # x ⊙ (1 - t²) ⊙ du, du = √(2/π) (1 + 3 · 0.044715 x²)
            d *= 3 * 0.044715 * _C
            d += _C
            s = ti * ti
            np.subtract(1, s, out=s)
            d *= s  # before x: where x³ would overflow, this is 0
            d *= xi
            d += ti
            d += 1
            d *= 0.5
            d *= g_[i]

        share(block, in_cache(x.size))
        return (x_bar.reshape(x.shape),)

    @staticmethod
    def accepts(x):
        return x.dtype.char in "fd"


def gelu_and_slope(x, y):
    """y = gelu_tanh(x), and x becomes the derivative; both contiguous, of one shape.

    y = x σ,  y' = σ + 2 u' y (1 - σ),  with σ = (1 + tanh u)/2,  u = √(2/π) (x + 0.044715 x³)
    """
    x, y = x.reshape(-1), y.reshape(-1)
    parts = in_cache(len(x))
    buffers = np.empty((2, max(i.stop - i.start for i in parts)), x.dtype)
    for i in parts:
        xi, yi = x[i], y[i]
        s, du = buffers[:, : len(xi)]
        np.multiply(xi, xi, out=du)
        np.multiply(du, 0.044715 * _C, out=s)
        s += _C
        s *= xi
        np.tanh(s, out=s)
        s *= 0.5
        s += 0.5
        np.multiply(xi, s, out=yi)
        du *= 6 * 0.044715 * _C  # 2 u'
        du += 2 * _C
        np.subtract(1, s, out=xi)
        xi *= yi  # before 2 u': where that is large, this is 0
        xi *= du
        xi += s
