"""A transformer block for one further token of each row: what takes a step of generation on the CPU
apart from the products with its weights is many calls on small arrays, here as few as there can be.
"""

import math

import numpy as np

from ._few_rows import product
from .elementwise import gelu_tanh

KERNELS = ()
FUSED = ("block",)


class block:
    """h = x + W_o attention(W_qkv norm1(x)),  y = h + W_down gelu(W_up norm2(h))

    x (B, 1, C) -> (B, 1, C). keys, values (B, H, n, D): of each head, the first `length` are those
    of the tokens before; the new token's are written behind them. There is no vjp: a cache keeps no
    gradients.

    norm1, norm2            gain and shift of a layer norm, (C,) and (C,)
    qkv, out, up, down      weight and bias, or None, of a linear layer
    mask                    (B, 1, 1, length + 1) booleans: which keys are seen; None: all
    eps                     of both norms
    """

    @staticmethod
    def forward(x, keys, values, norm1, qkv, out, norm2, up, down, *, length, mask, eps):
        rows = x[:, 0]  # (B, C)
        heads = _linear(_norm(rows, *norm1, eps[0]), *qkv)  # (B, 3 C)
        heads = heads.reshape(len(rows), 3, *keys.shape[1::2])  # (B, 3, H, D)
        keys[:, :, length], values[:, :, length] = heads[:, 1], heads[:, 2]
        seen = slice(length + 1)
        y = _attention(heads[:, 0], keys[:, :, seen], values[:, :, seen], mask)  # (B, H, D)
        h = _linear(y.reshape(rows.shape), *out)
        h += rows
        hidden = _linear(_norm(h, *norm2, eps[1]), *up)  # (B, 4 C)
        h += _linear(gelu_tanh.forward(hidden)[0], *down)
        return h[:, None], None

    @staticmethod
    def accepts(x, keys, values, *layers, length, mask, eps):
        """One token a row, as many rows as are in the cache and room for them; float32 or float64
        throughout; each token sees itself.
        """
        B, H, n, D = keys.shape
        shapes = x.shape == (B, 1, H * D) and values.shape == keys.shape and length < n
        same = all(a is None or a.dtype == x.dtype for layer in layers for a in layer)
        same = same and x.dtype.char in "fd" and keys.dtype == values.dtype == x.dtype
        return shapes and same and (mask is None or _sees_itself(mask, (B, 1, 1, length + 1)))


def _sees_itself(mask, shape):
    """Whether it is booleans of that shape, and each token may see the last key, its own."""
    plain = isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == shape
    return plain and bool(mask[..., -1].all())


def _linear(x, w, b):
    y = np.empty((len(x), len(w)), x.dtype)
    product(x, w, y)
    if b is not None:
        y += b
    return y


def _norm(x, w, b, eps):
    """Layer norm of rows (B, C). What rounding leaves of a mean is subtracted, too."""
    n = x.shape[1]
    ones = np.full(n, 1 / n, x.dtype)
    c = x - (x @ ones)[:, None]
    c -= (c @ ones)[:, None]
    c *= (1 / np.sqrt(np.vecdot(c, c) / n + x.dtype.type(eps)))[:, None]
    c *= w
    c += b
    return c


def _attention(q, k, v, mask):
    """q (B, H, D), k and v (B, H, n, D) -> (B, H, D)"""
    q = q * q.dtype.type(1 / math.sqrt(q.shape[-1]))
    S = q[:, :, None] @ np.matrix_transpose(k)  # (B, H, 1, n)
    if mask is not None:
        np.copyto(S, -np.inf, where=~mask)
    S -= S.max(axis=-1, keepdims=True)
    P = np.exp(S, out=S)
    y = P @ v  # (B, H, 1, D)
    y /= P.sum(axis=-1, keepdims=True)
    return y[:, :, 0]
