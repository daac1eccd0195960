"""Attention by blocks of queries: with a causal mask, each block reads only the keys it can see."""

import functools
import math

import numpy as np

from ._blocks import blocks, is_moderate, softmax_into, stacks

KERNELS = ("attention",)

_QUERIES = 32  # in a block, at least: few, since with a causal mask a block skips what it hides
_KEPT = 256  # queries up to which P is saved: for more, it would outweigh what else a layer saves


class attention:
    """y = (D ⊙ P) v,  P = softmax(scale q kᵀ), one block of queries after the other.

    Saved: the blocks of P. Of long sequences nothing: P is computed again, so that there never is
    an array of T × T.
    """

    @staticmethod
    def forward(q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        y = _heads_side_by_side((*q.shape[:-1], v.shape[-1]), q.dtype)
        saved, kept = [], q.shape[-2] <= _KEPT
        for h, parts in _plan(q, k, causal):
            k_t = _transposed(k[h], q)
            for i, n in parts:
                P = _probabilities(q[h][..., i, :], k_t[..., :n], scale, causal)
                np.matmul(_dropped(P, D, h, i, n), v[h][..., :n, :], out=y[h][..., i, :])
                if kept:
                    saved.append(P)
        return y, saved

    @staticmethod
    def vjp(g, y, q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None, saved, needs):
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        q_bar, k_bar, v_bar = (_heads_side_by_side(a.shape, a.dtype) for a in (q, k, v))
        g_dot_y = np.vecdot(g, y)[..., None]  # (..., T, 1)
        of_heads = iter(saved)
        for h, parts in _plan(q, k, causal):
            v_t = _transposed(v[h], q)
            k_t = None if saved else _transposed(k[h], q)
            kept = [next(of_heads, None) for _ in parts]
            for (i, n), P in reversed([*zip(parts, kept)]):
                qi, gi = q[h][..., i, :], g[h][..., i, :]
                if P is None:
                    P = _probabilities(qi, k_t[..., :n], scale, causal)
                S_bar = gi @ v_t[..., :n]  # P̄, before D: (..., block, n)
                if not isinstance(D, float):
                    S_bar *= D[h][..., i, :n]
                S_bar -= g_dot_y[h][..., i, :]
                S_bar *= P
                S_bar *= scale
                np.matmul(S_bar, k[h][..., :n, :], out=q_bar[h][..., i, :])
                S_bar_t, P_t = map(np.matrix_transpose, (S_bar, _dropped(P, D, h, i, n)))
                if i.stop == q.shape[-2]:  # visited first: it sees every key
                    np.matmul(S_bar_t, qi, out=k_bar[h])
                    np.matmul(P_t, gi, out=v_bar[h])
                else:
                    k_bar[h][..., :n, :] += S_bar_t @ qi
                    v_bar[h][..., :n, :] += P_t @ gi
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


def _plan(q, k, causal):
    """[(h, [(i, n), ...]), ...]: indices h of some heads, for whom a block's scores fit into the
    cache, and blocks i of queries with the number n of keys that the last query of each sees.
    """
    T, S = q.shape[-2], k.shape[-2]
    size = max(_QUERIES, T // 8) if causal else 128
    parts = [(i, i.stop + S - T if causal else S) for i in blocks(T, size)]
    return [(h, parts) for h in stacks(q.shape[:-2], min(T, size) * S)]


def _probabilities(q, k_t, scale, causal):
    """softmax(scale q kᵀ): (..., block, n). If causal, the last query sees the last key, and each
    query before it one key less.
    """
    P = q @ k_t
    P *= scale
    moderate = is_moderate(P)  # before anything is hidden
    block, n = P.shape[-2:]
    if causal:
        P[..., n - block :] += _hidden(block, P.dtype)
    return softmax_into(P, P, moderate)


@functools.lru_cache(64)
def _hidden(n, dtype):
    """(n, n): -inf above the diagonal, else 0."""
    hidden = np.zeros((n, n), dtype)
    hidden[~np.tri(n, dtype=bool)] = -np.inf
    hidden.flags.writeable = False
    return hidden


def _transposed(a, q):
    """aᵀ: (..., d, n). Small products with it are up to twice as fast if it lies in memory so, too,
    which pays for a copy unless the queries are few.
    """
    a_t = np.matrix_transpose(a)
    return np.ascontiguousarray(a_t) if q.shape[-2] >= _QUERIES else a_t


def _dropped(P, D, h, i, n):
    return P if isinstance(D, float) else P * D[h][..., i, :n]


def _heads_side_by_side(shape, dtype):
    """An empty (B, H, T, D) array that lies in memory as (B, T, H, D): joining heads is a view."""
    if len(shape) != 4:
        return np.empty(shape, dtype)
    b, h, t, d = shape
    return np.empty((b, t, h, d), dtype).transpose(0, 2, 1, 3)
