"""All heads of a layer of attention: what lies between the product that makes queries, keys and
values and the one that mixes what the heads have collected.

As separate ops, each of q, k and v would be cut out, and their gradients added into zeros.
"""

import numpy as np

from .attention import attention

KERNELS = ()
FUSED = ("self_attention",)


class self_attention:
    """qkv (..., T, 3 H D) -> (..., T, H D): q of all heads beside k and v; y of head 0, 1, ..."""

    @staticmethod
    def forward(qkv, *, heads, causal, **_):
        y, saved = attention.forward(*_parts(qkv, heads), causal=causal)  # (..., H, T, D)
        return y.swapaxes(-3, -2).reshape(*qkv.shape[:-1], -1), saved

    @staticmethod
    def vjp(g, y, qkv, *, heads, causal, saved, needs, **_):
        qkv_bar = np.empty(qkv.shape, qkv.dtype)
        g, y = _by_head(g, heads), _by_head(y, heads)
        q, k, v = _parts(qkv, heads)
        into, needs = _parts(qkv_bar, heads), (True, True, True)
        attention.vjp(g, y, q, k, v, causal=causal, saved=saved, needs=needs, into=into)
        return (qkv_bar,)

    @staticmethod
    def accepts(qkv, *, heads, kv_heads, causal, window, segments, dropout):
        """As many heads of keys as of queries, no mask but the causal one; see `attention`."""
        plain = kv_heads == heads and window is segments is None and not dropout
        return plain and qkv.dtype.char in "fd" and qkv.size > 0


def _by_head(x, heads):
    """(..., T, heads D) -> (..., heads, T, D): a view."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-3, -2)


def _parts(qkv, heads):
    """q, k and v: views of (..., H, T, D)."""
    by_head = _by_head(qkv, 3 * heads)
    return [by_head[..., i * heads : (i + 1) * heads, :, :] for i in range(3)]
