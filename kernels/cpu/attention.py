"""Attention by blocks of queries: with a causal mask, each block reads only the keys it can see."""

import math

import numpy as np

from ._blocks import blocks

KERNELS = ("attention",)

_QUERIES = 128  # queries in a block: enough for BLAS, few enough to skip half the keys when causal


class attention:
    """y = (D ⊙ P) v,  P = softmax(scale q kᵀ); the blocks of P are saved."""

    @staticmethod
    def forward(q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        T, S = q.shape[-2], k.shape[-2]
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        y = _heads_side_by_side((*q.shape[:-1], v.shape[-1]), q.dtype)
        saved = []
        for i in blocks(T, _QUERIES):
            n = i.stop + S - T if causal else S  # keys that the last query of the block sees
            P = q[..., i, :] @ np.matrix_transpose(k[..., :n, :])  # (..., block, n)
            P *= scale
            if causal:
                hidden = ~np.tri(i.stop - i.start, n, i.start + S - T, dtype=bool)
                np.copyto(P, -np.inf, where=hidden)
            P -= P.max(axis=-1, keepdims=True)
            np.exp(P, out=P)
            P /= P.sum(axis=-1, keepdims=True)
            np.matmul(_dropped(P, D, i, n), v[..., :n, :], out=y[..., i, :])
            saved.append(P)
        return y, saved

    @staticmethod
    def vjp(g, y, q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None, saved, needs):
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        q_bar, k_bar, v_bar = (_heads_side_by_side(a.shape, a.dtype) for a in (q, k, v))
        k_bar[...] = v_bar[...] = 0
        g_dot_y = np.vecdot(g, y)[..., None]  # (..., T, 1)
        for i, P in zip(blocks(q.shape[-2], _QUERIES), saved):
            n = P.shape[-1]
            S_bar = g[..., i, :] @ np.matrix_transpose(v[..., :n, :])  # P̄, before D
            if not isinstance(D, float):
                S_bar *= D[..., i, :n]
            S_bar -= g_dot_y[..., i, :]
            S_bar *= P
            S_bar *= scale
            np.matmul(S_bar, k[..., :n, :], out=q_bar[..., i, :])
            k_bar[..., :n, :] += np.matrix_transpose(S_bar) @ q[..., i, :]
            v_bar[..., :n, :] += np.matrix_transpose(_dropped(P, D, i, n)) @ g[..., i, :]
        return q_bar, k_bar, v_bar, None, None, None

    @staticmethod
    def accepts(q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        """No mask but the causal one, no bias, and every query sees a key; batch axes are equal."""
        plain = M is True and isinstance(B, float) and B == 0
        drops = isinstance(D, np.ndarray) and D.shape == (*q.shape[:-1], k.shape[-2])
        batch = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        dtype = q.dtype == k.dtype == v.dtype and q.dtype.kind == "f"
        some = q.size > 0 and v.size > 0 and (not causal or q.shape[-2] <= k.shape[-2])
        return plain and batch and dtype and some and (drops or D == 1)


def _dropped(P, D, i, n):
    return P if isinstance(D, float) else P * D[..., i, :n]


def _heads_side_by_side(shape, dtype):
    """An empty (B, H, T, D) array that lies in memory as (B, T, H, D): joining heads is a view."""
    if len(shape) != 4:
        return np.empty(shape, dtype)
    b, h, t, d = shape
    return np.empty((b, t, h, d), dtype).transpose(0, 2, 1, 3)
