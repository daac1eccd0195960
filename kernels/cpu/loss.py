"""Cross-entropy, some rows at a time: of many logits, no other array is as large."""

import numpy as np

from ...threads import share
from ._blocks import SIZE, blocks, shares
from .linear import empty_like, input_gradient, multiplies, together, weight_gradients

KERNELS = ("cross_entropy",)
FUSED = ("linear_cross_entropy",)

_KEPT = 1 << 22  # logits up to which P is saved: to compute it again takes longer, but no memory

_ROWS = 256  # of logits at a time that are not kept: fewer make slower products


class cross_entropy:
    """y = 1/N Σ_i L_i - x_i[t_i] over the N rows that count,  L = m + log s

    m is a row's largest logit, E = e^{x - m} and s = Σ_j E_j, so that P = softmax(x) = E / s and

        x̄ = g/N (P - onehot(t)), 0 where a row does not count.

    Saved: which rows count, m and s, and P unless it is large.
    """

    @staticmethod
    def forward(x, t, *, ignore_index=-100):
        m, s = np.empty((2, len(x), 1), x.dtype)
        P = np.empty(x.shape, x.dtype) if x.size <= _KEPT else None

        def block(i):
            E = np.empty(x[i].shape, x.dtype) if P is None else P[i]
            _exponentials(x[i], E, m[i], s[i])
            if P is not None:
                E /= s[i]

        share(block, _blocks_of(x))
        rows = np.flatnonzero(t != ignore_index)
        columns = t[rows]
        N = x.dtype.type(len(rows))
        L = m + np.log(s)  # (n, 1)
        return np.sum(L[rows, 0] - x[rows, columns]) / N, (P, m, s, rows, columns, N)

    @staticmethod
    def vjp(g, y, x, t, *, ignore_index=-100, saved, needs):
        P, m, s, rows, columns, N = saved
        share_of_each = g / N
        if P is None:
            x_bar = np.empty(x.shape, x.dtype)

            def block(i):
                E = np.subtract(x[i], m[i], out=x_bar[i])
                np.exp(E, out=E)
                E *= share_of_each / s[i]

            share(block, _blocks_of(x))
        else:
            x_bar = P * share_of_each
        x_bar[rows, columns] -= share_of_each
        if len(rows) < len(t):
            x_bar[t == ignore_index] = 0
        return x_bar, None

    @staticmethod
    def accepts(x, t, *, ignore_index=-100):
        rows = x.ndim == 2 and t.shape == x.shape[:1]
        return rows and x.dtype.char in "fd" and x.size > 0 and bool(np.any(t != ignore_index))


class linear_cross_entropy:
    """y = cross_entropy(h wᵀ, t), with the logits x = h wᵀ in memory once

    h (n, c), w (V, c), t (n,) -> a scalar. The gradient of the logits replaces them in forward:
    saved is X̄ = (P - onehot(t)) / N, and

        h̄ = g X̄ w,   w̄ = X̄ᵀ (g h)

    gradients   False for the loss alone, with the logits of a few rows at a time in memory
    """

    @staticmethod
    def forward(h, w, t, *, ignore_index=-100, gradients=True):
        n, V = len(h), len(w)
        counts = t != ignore_index
        N = h.dtype.type(np.count_nonzero(counts))
        losses = np.empty(n, h.dtype)
        X_bar = np.empty((n, V), h.dtype) if gradients else None

        def some(i):
            x = np.empty((i.stop - i.start, V), h.dtype) if X_bar is None else X_bar[i]
            np.matmul(h[i], w.T, out=x)
            for j in _blocks_of(x):
                _loss_and_gradient(x[j], t[i][j], counts[i][j], N, losses[i][j])

        share(some, shares(n, n * w.size, None if gradients else _ROWS))
        return np.sum(losses, where=counts) / N, X_bar

    @staticmethod
    def vjp(g, y, h, w, t, *, ignore_index=-100, gradients=True, saved, needs):
        h_bar, w_bar = empty_like([h, w], needs[:2])
        together([*input_gradient(saved, w, h_bar), *weight_gradients(saved, h * g, w_bar, None)])
        if h_bar is not None:
            h_bar *= g
        return h_bar, w_bar, None

    @staticmethod
    def accepts(h, w, t, *, ignore_index=-100, gradients=True):
        rows = h.ndim == w.ndim == 2 and t.shape == h.shape[:1]
        return rows and multiplies(h, w) and bool(np.any(t != ignore_index))


def _blocks_of(x):
    return blocks(len(x), max(1, 4 * SIZE // x.shape[1]))


def _exponentials(x, E, m, s):
    """m is the largest of each row of x (n, V), E = e^{x - m}, s = Σ E over the row: all in place,
    m and s (n, 1); E may be x.
    """
    np.max(x, axis=-1, keepdims=True, out=m)
    np.subtract(x, m, out=E)
    np.exp(E, out=E)
    np.sum(E, axis=-1, keepdims=True, out=s)


def _loss_and_gradient(x, t, counts, N, losses):
    """losses become those of the rows of x (n, V), and x the gradient of their sum over N, which is
    0 where a row does not count.
    """
    m, s = np.empty((2, len(x), 1), x.dtype)
    rows = np.flatnonzero(counts)
    chosen = x[rows, t[rows]]
    _exponentials(x, x, m, s)
    losses[rows] = (m + np.log(s))[rows, 0] - chosen
    x /= s * N
    x[rows, t[rows]] -= 1 / N
    x[~counts] = 0
