"""Attention by blocks of queries: with a causal mask, each block reads only the keys it can see."""

import functools
import math

import numpy as np

from ._blocks import blocks

KERNELS = ("attention",)

_SAFE = 30  # e^30 is far from overflow, e^-30 from underflow: up to here no maximum is subtracted
_QUERIES = 128  # queries in a block: enough for BLAS, few enough to skip half the keys when causal


class attention:
    """y = (D ⊙ P) v,  P = softmax(scale q kᵀ); the blocks of P are saved."""

    @staticmethod
    def forward(q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        T, S = q.shape[-2], k.shape[-2]
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        # The bound reads all keys again: for one query, as in generation, the maximum is cheaper.
        needs_max = T == 1 or not _largest_score(q, k, scale) <= _SAFE  # it may be NaN
        y = _heads_side_by_side((*q.shape[:-1], v.shape[-1]), q.dtype)
        saved = []
        for i in blocks(T, _QUERIES):
            n = i.stop + S - T if causal else S  # keys that the last query of the block sees
            P = q[..., i, :] @ np.matrix_transpose(k[..., :n, :])  # (..., block, n)
            P *= scale
            if causal:
                P += _hidden(i.stop - i.start, n, P.dtype)
            if needs_max:
                P -= P.max(axis=-1, keepdims=True)
            np.exp(P, out=P)
            P /= (P @ np.ones(n, P.dtype))[..., None]  # Σ as a matrix product: BLAS sums fastest
            np.matmul(_dropped(P, D, i, n), v[..., :n, :], out=y[..., i, :])
            saved.append(P)
        return y, saved

    @staticmethod
    def vjp(g, y, q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None, saved, needs):
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        q_bar, k_bar, v_bar = (_heads_side_by_side(a.shape, a.dtype) for a in (q, k, v))
        g_dot_y = np.vecdot(g, y)[..., None]  # (..., T, 1)
        for i, P in reversed(list(zip(blocks(q.shape[-2], _QUERIES), saved))):
            n = P.shape[-1]
            S_bar = g[..., i, :] @ np.matrix_transpose(v[..., :n, :])  # P̄, before D
            if not isinstance(D, float):
                S_bar *= D[..., i, :n]
            S_bar -= g_dot_y[..., i, :]
            S_bar *= P
            S_bar *= scale
            np.matmul(S_bar, k[..., :n, :], out=q_bar[..., i, :])
            S_bar_t, P_t = np.matrix_transpose(S_bar), np.matrix_transpose(_dropped(P, D, i, n))
            if i.stop == q.shape[-2]:  # visited first: it sees every key
                np.matmul(S_bar_t, q[..., i, :], out=k_bar)
                np.matmul(P_t, g[..., i, :], out=v_bar)
            else:
                k_bar[..., :n, :] += S_bar_t @ q[..., i, :]
                v_bar[..., :n, :] += P_t @ g[..., i, :]
        return q_bar, k_bar, v_bar, None, None, None

    @staticmethod
    def accepts(q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        """No mask but the causal one, no bias, and every query sees a key; batch axes are equal."""
        plain = M is True and isinstance(B, float) and B == 0
        whole = isinstance(D, np.ndarray) and D.shape == (*q.shape[:-1], k.shape[-2])
        keeps = whole or (isinstance(D, float) and D == 1)
        batch = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        dtype = q.dtype == k.dtype == v.dtype and q.dtype.char in "fd"
        some = q.size > 0 and v.size > 0 and (not causal or q.shape[-2] <= k.shape[-2])
        return plain and keeps and batch and dtype and some


def _largest_score(q, k, scale):
    """An upper bound of |scale q·k|, by Cauchy and Schwarz: much cheaper than every row's
    maximum.
    """
    return abs(scale) * math.sqrt(np.vecdot(q, q).max() * np.vecdot(k, k).max())


@functools.lru_cache(64)
def _hidden(queries, keys, dtype):
    """0 where a query sees a key and -inf elsewhere; the last query sees the last key."""
    hidden = np.zeros((queries, keys), dtype)
    hidden[~np.tri(queries, keys, keys - queries, dtype=bool)] = -np.inf
    hidden.flags.writeable = False
    return hidden


def _dropped(P, D, i, n):
    return P if isinstance(D, float) else P * D[..., i, :n]


def _heads_side_by_side(shape, dtype):
    """An empty (B, H, T, D) array that lies in memory as (B, T, H, D): joining heads is a view."""
    if len(shape) != 4:
        return np.empty(shape, dtype)
    b, h, t, d = shape
    return np.empty((b, t, h, d), dtype).transpose(0, 2, 1, 3)
