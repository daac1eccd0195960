"""Normalisations with few passes over the data; x̂ and r are saved."""

import numpy as np

from ._blocks import mean_last, mean_product, sum_rows

KERNELS = ("layer_norm", "rms_norm")

_CENTRED = 1e-6  # a mean of x̂ up to this is zero, as float32 goes


class layer_norm:
    """y = x̂ ⊙ w + b,  x̂ = (x - μ) ⊙ r,  r = 1/√(var + ε)."""

    @staticmethod
    def forward(x, w, b, *, eps=1e-5):
        x_hat = x - mean_last(x)
        r = 1 / np.sqrt(mean_product(x_hat, x_hat) + x.dtype.type(eps))  # (..., 1)
        left = mean_last(x_hat)  # by rounding, of a mean that is large beside the spread
        if np.abs(left * r).max() > _CENTRED:
            x_hat -= left
            r = 1 / np.sqrt(mean_product(x_hat, x_hat) + x.dtype.type(eps))
        x_hat *= r
        y = x_hat * w
        y += b
        return y, (x_hat, r)

    @staticmethod
    def vjp(g, y, x, w, b, *, eps=1e-5, saved, needs):
        x_hat, r = saved
        u = g * w
        mean_u, mean_ux = mean_last(u), mean_product(u, x_hat)
        u -= mean_u
        buffer = x_hat * mean_ux
        u -= buffer
        u *= r
        w_bar = sum_rows(np.multiply(g, x_hat, out=buffer)) if needs[1] else None
        return u, w_bar, sum_rows(g) if needs[2] else None

    @staticmethod
    def accepts(x, w, b, *, eps=1e-5):
        return _same_float(x, w, b)


class rms_norm:
    """y = x̂ ⊙ w,  x̂ = x ⊙ r,  r = 1/√(mean(x²) + ε)."""

    @staticmethod
    def forward(x, w, *, eps=1e-5):
        r = 1 / np.sqrt(mean_product(x, x) + x.dtype.type(eps))  # (..., 1)
        x_hat = x * r
        return x_hat * w, (x_hat, r)

    @staticmethod
    def vjp(g, y, x, w, *, eps=1e-5, saved, needs):
        x_hat, r = saved
        u = g * w
        u -= x_hat * mean_product(u, x_hat)
        u *= r
        return u, sum_rows(g * x_hat) if needs[1] else None

    @staticmethod
    def accepts(x, w, *, eps=1e-5):
        return _same_float(x, w)


def _same_float(x, *weights):
    """One floating dtype, so that in-place steps keep it; and at least one element."""
    return x.dtype.char in "fd" and x.size > 0 and all(w.dtype == x.dtype for w in weights)
