"""Normalisations with few passes over the data, some rows at a time."""

import numpy as np

from ...threads import share
from ._blocks import in_cache, mean_last, mean_product, row_by_row, sum_rows

KERNELS = ("layer_norm", "rms_norm")

_NEAR = 4  # times the spread: of a mean up to that, rounding leaves nothing to x - μ in float32


class layer_norm:
    """y = x̂ ⊙ w + b,  x̂ = r c,  c = x - μ,  r = 1/√(mean(c²) + ε)

    Saved: μ and r. With u = g ⊙ w and mean(u ⊙ x̂) = r mean(g ⊙ c ⊙ w), c stands for x̂ in

        x̄ = r (u - (mean(u) + c r mean(u ⊙ x̂)))
        w̄ = Σ r (g ⊙ c),  b̄ = Σ g over the rows

    and each mean and each sum is a product of a matrix and a vector. Where a mean is large beside
    the spread, rounding leaves a mean to x - μ, which is subtracted, too.
    """

    @staticmethod
    def forward(x, w, b, *, eps=1e-5):
        rows, n = x.reshape(-1, x.shape[-1]), x.shape[-1]
        y = np.empty(rows.shape, x.dtype)
        mu, left, r = np.empty((3, len(rows), 1), x.dtype)

        def block(i):
            with row_by_row(len(rows), n):
                c = y[i]
                mu[i] = mean_last(rows[i])
                np.subtract(rows[i], mu[i], out=c)
                r[i], left[i] = _r(c, eps), 0
                if far := not (np.abs(mu[i]) * r[i]).max() <= _NEAR:  # it may be NaN
                    left[i] = mean_last(c)
                    c -= left[i]
                    r[i] = _r(c, eps)
                c *= r[i]
                c *= w
                c += b
            return far

        far = any(share(block, in_cache(len(rows), n)))
        return y.reshape(x.shape), (mu, left if far else None, r)

    @staticmethod
    def vjp(g, y, x, w, b, *, eps=1e-5, saved, needs):
        mu, left, r = saved
        n = x.shape[-1]
        rows, g = x.reshape(-1, n), g.reshape(-1, n)
        x_bar, w_mean = np.empty(rows.shape, x.dtype), w / n

        def block(i):
            with row_by_row(len(rows), n):
                c = rows[i] - mu[i]
                if left is not None:
                    c -= left[i]
                u = np.multiply(g[i], c, out=x_bar[i])  # g ⊙ c, at first
                w_bar = r[i, 0] @ u
                mean_ux = r[i] * (u @ w_mean)[:, None]
                c *= r[i] * mean_ux
                c += (g[i] @ w_mean)[:, None]
                np.multiply(g[i], w, out=u)
                u -= c
                u *= r[i]
            return w_bar, sum_rows(g[i])

        w_bar, b_bar = map(sum, zip(*share(block, in_cache(len(rows), n))))
        return x_bar.reshape(x.shape), w_bar if needs[1] else None, b_bar if needs[2] else None

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


def _r(c, eps):
    return 1 / np.sqrt(mean_product(c, c) + c.dtype.type(eps))


def _same_float(x, *weights):
    """One floating dtype, so that in-place steps keep it; and at least one element."""
    return x.dtype.char in "fd" and x.size > 0 and all(w.dtype == x.dtype for w in weights)
