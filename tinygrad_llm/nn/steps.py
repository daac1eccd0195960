"""Attention step by step, as one arrives at it: each class is the one before and one idea more.

    SimpleSelfAttention         scores are dot products of the tokens themselves: nothing is learned
    SelfAttentionV1             queries, keys and values by three matrices
    SelfAttentionV2             the same by Linear layers, whose start is smaller
    CausalAttention             no token sees a later one; dropout
    MultiHeadAttentionWrapper   several of those side by side
    MultiHeadAttention          the same by splitting: one matrix makes the queries of all heads

Each is written out with softmax and products, and draws its first weights in this order, so that a
seed gives the numbers printed in the book that they follow: Raschka, "Build a Large Language Model
(From Scratch)", 2024, chapter 3. nn.MultiHeadAttention is the last one as a model uses it: with one
matrix for queries, keys and values, and one op for all that is between them and out_proj.

Letters in the shapes: T tokens in a sequence, d_in and d_out channels, H heads of D = d_out / H;
... is nothing for one sequence, B for a batch of them. `k.mT` is k with its last two axes
exchanged: kᵀ in each sequence.
"""

import math

import numpy as np

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..random import Generator, or_default
from ..tensor import Tensor
from .attention import check_tokens
from .layers import Dropout, Linear, check_divides, check_sizes
from .module import Module, ModuleList, Parameter


class SimpleSelfAttention(Module):
    """Every token becomes a mean of all of them, weighted by likeness.  (..., T, d) -> the same"""

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("SimpleSelfAttention", x)
        scores = x @ x.mT  # (..., T, T)
        return F.softmax(scores) @ x  # (..., T, d)


class SelfAttentionV1(Module):
    """With matrices (d_in, d_out) to learn, at first uniform in [0, 1).
    (..., T, d_in) -> (..., T, d_out)

    Scores are divided by √d_out: of independent numbers with mean 0 and variance 1, a sum of d_out
    products has that standard deviation, and a softmax of large scores has hardly a gradient.
    """

    def __init__(self, d_in: int, d_out: int, generator: Generator | None = None):
        check_sizes("SelfAttentionV1", d_in=d_in, d_out=d_out)
        generator = or_default(generator)
        self.W_query, self.W_key, self.W_value = (
            Parameter(generator.uniform(0.0, 1.0, (d_in, d_out))) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("SelfAttentionV1", x)
        q, k, v = x @ self.W_query, x @ self.W_key, x @ self.W_value  # 3 of (..., T, d_out)
        scores = q @ k.mT  # (..., T, T)
        weights = F.softmax(scores / math.sqrt(k.shape[-1]))
        return weights @ v  # (..., T, d_out)


class SelfAttentionV2(Module):
    """The matrices as Linear layers, at first ±1/√d_in.  (..., T, d_in) -> (..., T, d_out)"""

    def __init__(
        self, d_in: int, d_out: int, qkv_bias: bool = False, generator: Generator | None = None
    ):
        self.W_query, self.W_key, self.W_value = (
            Linear(d_in, d_out, bias=qkv_bias, generator=generator) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("SelfAttentionV2", x)
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)  # 3 of (..., T, d_out)
        scores = q @ k.mT  # (..., T, T)
        weights = F.softmax(scores / math.sqrt(k.shape[-1]))
        return weights @ v  # (..., T, d_out)


class CausalAttention(Module):
    """A token sees itself and those before it.  (..., T, d_in) -> (..., T, d_out)

    Scores of later tokens become -∞ before the softmax, so their weights are 0 and those that
    remain sum to 1. In training, dropout zeroes some of these.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        generator: Generator | None = None,
    ):
        check_sizes("CausalAttention", context_length=context_length)
        self.W_query, self.W_key, self.W_value = (
            Linear(d_in, d_out, bias=qkv_bias, generator=generator) for _ in range(3)
        )
        self.dropout = Dropout(dropout, generator)
        self.later = np.triu(np.ones((context_length, context_length), bool), k=1)

    def forward(self, x: Tensor) -> Tensor:
        T = check_tokens("CausalAttention", x, len(self.later))
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)  # 3 of (..., T, d_out)
        scores = q @ k.mT / math.sqrt(k.shape[-1])  # (..., T, T)
        scores = F.where(self.later[:T, :T], -math.inf, scores)
        weights = self.dropout(F.softmax(scores))
        return weights @ v  # (..., T, d_out)


class MultiHeadAttentionWrapper(Module):
    """Heads of their own, their results side by side.  (..., T, d_in) -> (..., T, n_heads d_out)"""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        n_heads: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        generator: Generator | None = None,
    ):
        check_sizes("MultiHeadAttentionWrapper", n_heads=n_heads)
        self.heads = ModuleList(
            CausalAttention(d_in, d_out, context_length, dropout, qkv_bias, generator)
            for _ in range(n_heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.concat([head(x) for head in self.heads], axis=-1)


class MultiHeadAttention(Module):
    """All heads at once: queries, keys and values of d_out channels, the first D of them head 0's.
    (..., T, d_in) -> (..., T, d_out)

    At the end, out_proj mixes the heads. Raises ValueError if n_heads does not divide d_out.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        n_heads: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        generator: Generator | None = None,
    ):
        sizes = {"context_length": context_length, "n_heads": n_heads, "d_out": d_out}
        check_sizes("MultiHeadAttention", **sizes)
        check_divides("MultiHeadAttention", n_heads=n_heads, d_out=d_out)
        self.W_query, self.W_key, self.W_value = (
            Linear(d_in, d_out, bias=qkv_bias, generator=generator) for _ in range(3)
        )
        self.out_proj = Linear(d_out, d_out, generator=generator)
        self.dropout = Dropout(dropout, generator)
        self.later = np.triu(np.ones((context_length, context_length), bool), k=1)
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        T = check_tokens("MultiHeadAttention", x, len(self.later))
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)  # 3 of (..., T, d_out)
        q, k, v = (self._split(y) for y in (q, k, v))  # 3 of (..., H, T, D)
        scores = q @ k.mT / math.sqrt(k.shape[-1])  # (..., H, T, T)
        scores = F.where(self.later[:T, :T], -math.inf, scores)
        weights = self.dropout(F.softmax(scores))
        heads = weights @ v  # (..., H, T, D)
        return self.out_proj(heads.transpose(-3, -2).flatten(-2))  # (..., T, d_out)

    def _split(self, y):
        """(..., T, d_out) -> (..., H, T, D)"""
        y = y.reshape(*y.shape[:-1], self.n_heads, -1)  # (..., T, H, D)
        return y.transpose(-3, -2)


# --- three ways to hide what comes later, with the same weights ---------------------------------
# Scores may be integers, too: 1.0 * scores are floats, of the same dtype if they were floats.


def causal_weights_by_renormalising(scores: Tensor) -> Tensor:
    """Softmax over all, zeros for the later ones, rows divided by their sums.  (T, T) -> (T, T)

    For scores so far apart that what remains of a row has vanished, it divides by 0.
    """
    weights = F.softmax(1.0 * scores).tril()
    return weights / weights.sum(axis=-1, keepdims=True)


def causal_weights_by_filling(scores: Tensor) -> Tensor:
    """-∞ where the later ones are, then the softmax. Filled, not added to as a product with -∞:
    0 · -∞ is NaN.  (T, T) -> (T, T)
    """
    later = np.triu(np.ones(scores.shape, bool), k=1)
    return F.softmax(F.where(later, -math.inf, scores))


def causal_weights_by_adding(scores: Tensor) -> Tensor:
    """A bias of 0 and -∞ is added, as attention kernels take it.  (T, T) -> (T, T)"""
    scores = 1.0 * scores
    bias = np.where(np.triu(np.ones(scores.shape, bool), k=1), -math.inf, 0.0)
    return F.softmax(scores + Tensor(bias.astype(scores.dtype)))
