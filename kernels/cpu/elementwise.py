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
    """y = gelu_tanh(x), and x becomes the derivative; both contiguous, of one shape."""
    x, y = x.reshape(-1), y.reshape(-1)
    parts = in_cache(len(x))
    s, q = np.empty((2, max(i.stop - i.start for i in parts)), x.dtype)
    for i in parts:
        xi, t = x[i], y[i]
        si, qi = s[: len(xi)], q[: len(xi)]
        np.multiply(xi, xi, out=si)
        np.multiply(si, 0.044715 * _C, out=t)
        t += _C
        t *= xi
        np.tanh(t, out=t)
        si *= 3 * 0.044715 * _C  # du, as above
        si += _C
        np.multiply(t, t, out=qi)
        np.subtract(1, qi, out=qi)
        si *= qi
        si *= xi
        t += 1
        si += t
        t *= 0.5
        t *= xi
        np.multiply(si, 0.5, out=xi)
