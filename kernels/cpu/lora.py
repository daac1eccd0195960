"""A linear layer with a low-rank update: both products into one array.

As separate ops, the layer's own output and the update's would be kept until backward, each as large
as their sum.
"""

import numpy as np

from ...threads import share
from ._blocks import SIZE, blocks, shares
from .linear import affine, empty_like, multiplies, together, weight_gradients

KERNELS = ()
FUSED = ("lora",)


class lora:
    """y = x wᵀ + scale (x Aᵀ) Bᵀ + b

    x (..., k), w (m, k), A (r, k), B (m, r), b (m,) -> (..., m). Saved: h = scale x Aᵀ.
    With h̄ = scale g B:

        x̄ = g w + h̄ A,   w̄ = gᵀ x,   Ā = h̄ᵀ x,   B̄ = gᵀ h,   b̄ = Σ g over the rows
    """

    @staticmethod
    def forward(x, w, A, B, b=None, *, scale=1.0):
        rows = x.reshape(-1, x.shape[-1])  # (N, k)
        h, y = np.empty((len(rows), len(A)), x.dtype), np.empty((len(rows), len(w)), x.dtype)

        def some(i):
            np.matmul(rows[i], A.T, out=h[i])
            h[i] *= scale
            affine(rows[i], w, b, y[i])
            _add_product(y[i], h[i], B.T)

        share(some, shares(len(rows), w.size * len(rows)))
        return y.reshape(*x.shape[:-1], len(w)), h

    @staticmethod
    def vjp(g, y, x, w, A, B, b=None, *, saved, needs, scale=1.0):
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])  # (N, k), (N, m)
        x_bar, w_bar, A_bar, B_bar, b_bar = empty_like([rows, w, A, B, b], needs)
        h_bar = np.empty(saved.shape, x.dtype)

        def some(i):
            np.matmul(g[i], B, out=h_bar[i])
            h_bar[i] *= scale
            if x_bar is not None:
                np.matmul(g[i], w, out=x_bar[i])
                _add_product(x_bar[i], h_bar[i], A)

        if needs[0] or needs[2]:
            share(some, shares(len(rows), w.size * len(rows)))
        of_w = weight_gradients(g, rows, w_bar, b_bar)
        of_A = weight_gradients(h_bar, rows, A_bar, None)
        together([*of_w, *of_A, *weight_gradients(g, saved, B_bar, None)])
        x_bar = x_bar if x_bar is None else x_bar.reshape(x.shape)
        return x_bar, w_bar, A_bar, B_bar, b_bar

    @staticmethod
    def accepts(x, *others, scale=1.0):
        """As for `linear`."""
        return multiplies(x, *others)


def _add_product(y, a, b):
    """y += a b, some rows at a time: the product is never there as a whole."""
    for part in blocks(len(y), max(1, SIZE // y.shape[1])):
        y[part] += a[part] @ b
