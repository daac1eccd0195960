"""Attention by blocks of queries: with a causal mask, each block reads only the keys it can see."""

import functools
import math

import numpy as np

from ...threads import share
from ._blocks import blocks, is_moderate, stacks

KERNELS = ("attention",)

_QUERIES = 32  # in a block, at least: few, since with a causal mask a block skips what it hides
_MOST = 128  # at most: products with more rows are no faster
_KEPT = 128  # queries up to which E is saved: for more, it would outweigh what else a layer saves


class attention:
    """y = (D ⊙ P) v,  P = softmax(S),  S = scale q kᵀ, one block of queries after the other

    P = E / s, with E = e^{S - m} and its rows' sums s; m is 0, or where scores are beyond ±10, a
    row's maximum. T × d numbers are divided by s in the place of T × T:

        y = ((D ⊙ E) v) / s
        S̄ = E ⊙ (D ⊙ ((g / s) vᵀ) - (g · y) / s)
        q̄ = scale S̄ k,  k̄ = S̄ᵀ (scale q),  v̄ = (D ⊙ E)ᵀ (g / s)

    Saved: m, s, and the blocks of E. Of long sequences E is computed again, so that there never is
    an array of T × T.
    """

    @staticmethod
    def forward(q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        y = _heads_side_by_side((*q.shape[:-1], v.shape[-1]), q.dtype)
        heads, parts = _plan(q, k, causal)
        kept = q.shape[-2] <= _KEPT

        def some(h):
            k_t, saved = _transposed(k[h], q), []
            for i, n in parts:
                E = (q[h][..., i, :] * scale) @ k_t[..., :n]  # S at first: (..., block, n)
                moderate = is_moderate(E, 10)  # before anything is hidden
                _hide(E, causal)
                m = None if moderate else E.max(axis=-1, keepdims=True)
                _exponentials(E, m)
                s = (E @ np.ones(n, E.dtype))[..., None]  # as a product, since BLAS sums fastest
                yi = y[h][..., i, :]
                np.matmul(_dropped(E, D, h, i, n), v[h][..., :n, :], out=yi)
                yi /= s
                saved.append((m, s, E if kept else None))
            return saved

        return y, share(some, heads)

    @staticmethod
    def vjp(
        g, y, q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None, saved, needs, into=None
    ):  # fmt: skip
        """into: arrays for q̄, k̄ and v̄."""
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        bars = [_heads_side_by_side(a.shape, a.dtype) for a in (q, k, v)] if into is None else into
        q_bar, k_bar, v_bar = bars
        heads, parts = _plan(q, k, causal)

        def some(h_and_saved):
            h, saved = h_and_saved
            v_t = _transposed(v[h], q)
            k_t = _transposed(k[h], q) if saved[0][-1] is None else None
            for (i, n), (m, s, E) in reversed([*zip(parts, saved)]):
                qi, gi = q[h][..., i, :] * scale, g[h][..., i, :] / s
                if E is None:
                    E = _hide(qi @ k_t[..., :n], causal)
                    _exponentials(E, m)
                S_bar = gi @ v_t[..., :n]  # (..., block, n)
                if not isinstance(D, float):
                    S_bar *= D[h][..., i, :n]
                S_bar -= np.vecdot(gi, y[h][..., i, :])[..., None]
                S_bar *= E
                np.matmul(S_bar, k[h][..., :n, :], out=q_bar[h][..., i, :])
                q_bar[h][..., i, :] *= scale
                S_bar_t, E_t = map(np.matrix_transpose, (S_bar, _dropped(E, D, h, i, n)))
                if i.stop == q.shape[-2]:  # visited first: it sees every key
                    np.matmul(S_bar_t, qi, out=k_bar[h])
                    np.matmul(E_t, gi, out=v_bar[h])
                else:
                    k_bar[h][..., :n, :] += S_bar_t @ qi
                    v_bar[h][..., :n, :] += E_t @ gi

        share(some, zip(heads, saved))
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
    """([h, ...], [(i, n), ...]): indices h of some heads, for whom a block's scores fit into the
    cache, and blocks i of queries with the number n of keys that the last query of each sees.
    """
    T, S = q.shape[-2], k.shape[-2]
    size = min(max(_QUERIES, T // 4), _MOST) if causal else _MOST
    parts = [(i, i.stop + S - T if causal else S) for i in blocks(T, size)]
    return stacks(q.shape[:-2], min(T, size) * S), parts


def _hide(S, causal):
    """S (..., block, n), and if causal, -inf in it where a key follows a query: the last query sees
    the last key, and each query before it one key less.
    """
    block, n = S.shape[-2:]
    if causal:  # not by adding -inf, which would make nan of inf: nobody is to see that, either
        np.copyto(S[..., n - block :], -np.inf, where=_hidden(block))
    return S


def _exponentials(S, m):
    """S becomes e^{S - m}."""
    if m is not None:
        S -= m
    np.exp(S, out=S)


@functools.lru_cache(64)
def _hidden(n):
    """(n, n): True above the diagonal."""
    hidden = ~np.tri(n, dtype=bool)
    hidden.flags.writeable = False
    return hidden


def _transposed(a, q):
    """aᵀ: (..., d, n). Small products with it are up to twice as fast if it lies in memory so, too,
    which pays for a copy unless the queries are few.
    """
    a_t = np.matrix_transpose(a)
    return np.ascontiguousarray(a_t) if q.shape[-2] >= _QUERIES else a_t


def _dropped(E, D, h, i, n):
    return E if isinstance(D, float) else E * D[h][..., i, :n]


def _heads_side_by_side(shape, dtype):
    """An empty (B, H, T, D) array that lies in memory as (B, T, H, D): joining heads is a view."""
    if len(shape) != 4:
        return np.empty(shape, dtype)
    b, h, t, d = shape
    return np.empty((b, t, h, d), dtype).transpose(0, 2, 1, 3)
