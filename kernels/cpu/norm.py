"""Normalisations with few passes over the data, some rows at a time."""

import numpy as np

from ...threads import share
from ._blocks import brief, in_cache, row_by_row, sum_rows

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
        y, ones = np.empty(rows.shape, x.dtype), np.ones(n, x.dtype)
        mu, left, r = np.zeros((3, len(rows), 1), x.dtype)

        def block(i):
            with brief(rows[i]), row_by_row(len(rows), n):
                xi, c, mui, ri = rows[i], y[i], mu[i], r[i]
                _into_mean(mui, xi, ones)
                np.subtract(xi, mui, out=c)
                _into_r(ri, c, eps)
                if far := not np.abs(mui * ri).max() <= _NEAR:  # it may be NaN
                    _into_mean(left[i], c, ones)
                    c -= left[i]
                    _into_r(ri, c, eps)
                c *= ri
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
            with brief(rows[i]), row_by_row(len(rows), n):
                gi, ri, c = g[i], r[i], rows[i] - mu[i]
                if left is not None:
                    c -= left[i]
                u = np.multiply(gi, c, out=x_bar[i])  # g ⊙ c, at first
                w_bar = ri[:, 0] @ u if needs[1] else 0
                c *= ri * ri * (u @ w_mean)[:, None]
                c += (gi @ w_mean)[:, None]
                np.multiply(gi, w, out=u)
                u -= c
                u *= ri
            return w_bar, sum_rows(gi) if needs[2] else 0

        w_bar, b_bar = map(sum, zip(*share(block, in_cache(len(rows), n))))
        return x_bar.reshape(x.shape), w_bar if needs[1] else None, b_bar if needs[2] else None

    @staticmethod
    def accepts(x, w, b, *, eps=1e-5):
        return _are_rows(x, w, b)


class rms_norm:
    """y = x̂ ⊙ w,  x̂ = r x,  r = 1/√(mean(x²) + ε)

    Saved: r. With u = g ⊙ w and mean(u ⊙ x̂) = r mean(g ⊙ x ⊙ w),

        x̄ = r (u - x r mean(u ⊙ x̂)),   w̄ = Σ r (g ⊙ x) over the rows
    """

    @staticmethod
    def forward(x, w, *, eps=1e-5):
        rows, n = x.reshape(-1, x.shape[-1]), x.shape[-1]
        y, r = np.empty(rows.shape, x.dtype), np.empty((len(rows), 1), x.dtype)

        def block(i):
            with brief(rows[i]), row_by_row(len(rows), n):
                _into_r(r[i], rows[i], eps)
                np.multiply(rows[i], r[i], out=y[i])
                y[i] *= w

        share(block, in_cache(len(rows), n))
        return y.reshape(x.shape), r

    @staticmethod
    def vjp(g, y, x, w, *, eps=1e-5, saved, needs):
        r, n = saved, x.shape[-1]
        rows, g = x.reshape(-1, n), g.reshape(-1, n)
        x_bar, w_mean = np.empty(rows.shape, x.dtype), w / n

        def block(i):
            with brief(rows[i]), row_by_row(len(rows), n):
                gi, ri = g[i], r[i]
                u = np.multiply(gi, rows[i], out=x_bar[i])  # g ⊙ x, at first
                w_bar = ri[:, 0] @ u if needs[1] else 0
                c = rows[i] * (ri * ri * (u @ w_mean)[:, None])
                np.multiply(gi, w, out=u)
                u -= c
                u *= ri
            return w_bar

        w_bar = sum(share(block, in_cache(len(rows), n)))
        return x_bar.reshape(x.shape), w_bar if needs[1] else None

    @staticmethod
    def accepts(x, w, *, eps=1e-5):
        return _are_rows(x, w)


def _into_mean(mu, x, ones):
    """mu (n, 1) becomes the mean of each row of x (n, m), by BLAS."""
    np.matmul(x, ones, out=mu[:, 0])
    mu /= x.shape[1]


def _into_r(r, c, eps):
    """r (n, 1) becomes 1/√(mean(c²) + ε) of each row of c (n, m)."""
    np.vecdot(c, c, out=r[:, 0])
    r /= c.shape[1]
    r += eps
    np.sqrt(r, out=r)
    np.divide(1, r, out=r)


def _are_rows(x, *weights):
    """At least one element, and weights for one row; one floating dtype, so that in-place steps
    keep it.
    """
    row, dtype = x.shape[-1:], x.dtype
    some = x.size > 0 and x.dtype.char in "fd"
    return some and all(w.shape == row and w.dtype == dtype for w in weights)
