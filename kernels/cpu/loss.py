"""Cross-entropy, some rows at a time: of many logits, no other array is as large."""

import numpy as np

from ._blocks import SIZE, blocks

KERNELS = ("cross_entropy",)

_KEPT = 1 << 22  # logits up to which P is saved: to compute it again takes longer, but no memory


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
        for i, E in _parts(x, P):
            np.max(x[i], axis=-1, keepdims=True, out=m[i])
            np.sum(_exponentials(x[i], m[i], E), axis=-1, keepdims=True, out=s[i])
            if P is not None:
                E /= s[i]
        rows = np.flatnonzero(t != ignore_index)
        columns = t[rows]
        N = x.dtype.type(len(rows))
        L = m + np.log(s)  # (n, 1)
        return np.sum(L[rows, 0] - x[rows, columns]) / N, (P, m, s, rows, columns, N)

    @staticmethod
    def vjp(g, y, x, t, *, ignore_index=-100, saved, needs):
        P, m, s, rows, columns, N = saved
        share = g / N
        if P is None:
            x_bar = np.empty(x.shape, x.dtype)
            for i, E in _parts(x, x_bar):
                np.multiply(_exponentials(x[i], m[i], E), share / s[i], out=E)
        else:
            x_bar = P * share
        x_bar[rows, columns] -= share
        if len(rows) < len(t):
            x_bar[t == ignore_index] = 0
        return x_bar, None

    @staticmethod
    def accepts(x, t, *, ignore_index=-100):
        return x.dtype.char in "fd" and x.size > 0 and bool(np.any(t != ignore_index))


def _parts(x, out):
    """Yields (i, E): slices i of some rows of x, and an array E for as many rows: out[i], or for no
    `out` a buffer that all of them share.
    """
    n, v = x.shape
    size = n if x.size <= _KEPT else max(1, 4 * SIZE // v)
    buffer = np.empty((size, v), x.dtype) if out is None else None
    for i in blocks(n, size):
        yield i, buffer[: i.stop - i.start] if out is None else out[i]


def _exponentials(x, m, E):
    """E = e^{x - m}"""
    np.subtract(x, m, out=E)
    return np.exp(E, out=E)
