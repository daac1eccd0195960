"""The transformer block of GPT-2: attention, then a feed-forward network, each added to its input.

Letters in the shapes: B sequences in the batch, T tokens in each, C channels, H heads of D = C / H.
"""

import math
from itertools import pairwise

import numpy as np

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..backend import fused_kernel
from ..device import of
from ..random import Generator, or_default
from ..tensor import Tensor, fused, is_grad_enabled
from .cache import LayerCache, StaticLayerCache
from .init import no_init
from .layers import (
    GELU,
    Dropout,
    LayerNorm,
    Linear,
    check_divides,
    check_probability,
    check_sizes,
    reset_linear,
)
from .module import Module
from .position import RotaryEmbedding, segment_mask


class MultiHeadAttention(Module):
    """Each token collects from the tokens it may see, in H ways.  (..., T, d_in) -> (..., T, d_out)

    Queries, keys and values come from one matrix, `qkv`: first the rows that make the queries
    (d_out of them), then keys, then values.

    causal      a token sees itself and those before it
    dropout     the probability with which, in training, a weight of the attention is zeroed
    n_kv_heads  fewer heads of keys and values than of queries: H / n_kv_heads heads share one
                (grouped-query attention: Ainslie et al., 2023); H by default
    window      with causal: a token sees itself and the window - 1 before it (Beltagy et al., 2020)
    rope        a RotaryEmbedding of width d_out / H for as many positions, which turns queries
                and keys
    Raises ValueError if n_heads does not divide d_out, or n_kv_heads n_heads, or for more than
    context_length tokens. Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        n_heads: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        causal: bool = True,
        n_kv_heads: int | None = None,
        window: int | None = None,
        rope: RotaryEmbedding | None = None,
        generator: Generator | None = None,
    ):
        owner = "MultiHeadAttention"
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        window = context_length if window is None else window
        sizes = {"d_out": d_out, "context_length": context_length, "window": window}
        check_sizes(owner, **sizes, n_heads=n_heads, n_kv_heads=n_kv_heads)
        check_divides(owner, n_heads=n_heads, d_out=d_out)
        check_divides(owner, n_kv_heads=n_kv_heads, n_heads=n_heads)
        check_probability(owner, dropout=dropout)
        if window < context_length and not causal:
            raise ValueError(f"{owner}: a window needs causal=True")
        if rope is not None:
            _check_rope(owner, rope, d_out // n_heads, context_length)
        self.d_out, self.n_heads, self.n_kv_heads = d_out, n_heads, n_kv_heads
        self.head_dim = d_out // n_heads
        self.context_length, self.window, self.rope = context_length, window, rope
        self.dropout, self.causal, self.generator = dropout, causal, generator
        rows = (n_heads + 2 * n_kv_heads) * self.head_dim
        with no_init():  # reset_parameters draws them
            self.qkv = Linear(d_in, rows, bias=qkv_bias)
            self.out_proj = Linear(d_out, d_out)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the weights anew, in the order of three layers for q, k and v, each with its bias,
        and one for the output.
        """
        for part in self.parts():
            reset_linear(self.qkv, part, generator)
        self.out_proj.reset_parameters(generator)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | np.ndarray | None = None,
        cache: LayerCache | StaticLayerCache | None = None,
        segments: np.ndarray | None = None,
    ) -> Tensor:
        """x (..., T, d_in) -> (..., T, d_out); in a GPT, ... is B.

        mask        booleans that broadcast to (..., H, T, S): which keys may be seen, besides
                    causal; or floats that are added to the scores, such as a RelativePositionBias
        cache       keys and values of the tokens before these, x being (B, T, d_in); those of these
                    are added. The S keys are all of them; without a cache, S = T
        segments    (B, T) integers, an array where x is: a token sees its own segment only; instead
                    of a mask
        """
        check_tokens("MultiHeadAttention", x, self.context_length)
        if cache is not None and not self.causal:
            raise ValueError("MultiHeadAttention: a cache needs causal=True")
        qkv = self.qkv(x)  # (B, T, C + 2 C / R) for R heads of queries that share one of keys
        if mask is None and cache is None and self.rope is None:
            dropout = self.dropout if self.training else 0.0
            y = fused(
                "self_attention",
                lambda qkv: self._attend(qkv, None, None, segments),
                qkv,
                drawn=or_default(self.generator).kernel_seed if dropout else None,
                heads=self.n_heads,
                kv_heads=self.n_kv_heads,
                causal=self.causal,
                window=self.window if self.window < x.shape[-2] else None,
                segments=segments,
                dropout=dropout,
            )
        else:
            y = self._attend(qkv, mask, cache, segments)
        return self.out_proj(y)  # (B, T, C)

    def _attend(self, qkv, mask, cache, segments):
        """What each token collects: (B, T, C + 2 C / R) -> (B, T, C), the heads side by side."""
        q, k, v = (self._heads(qkv[..., part]) for part in self.parts())  # (B, H, T, D)
        if isinstance(cache, StaticLayerCache):
            self._check_static(mask, segments)
            y = cache.attend(q, k, v, self.window if self.window < self.context_length else None)
            return y.transpose(-3, -2).flatten(-2)  # (B, T, C)
        T, start = qkv.shape[-2], 0 if cache is None else cache.length
        if segments is not None:
            mask = segment_mask(of(segments).numpy(segments))  # (B, 1, T, T)
        if self.rope is not None:
            q, k = self.rope(q, start), self.rope(k, start)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H / R, S, D)
        if self.n_kv_heads < self.n_heads:  # (B, H / R, R, T, D) and (B, H / R, 1, T, D)
            q = q.reshape(*q.shape[:-3], self.n_kv_heads, -1, *q.shape[-2:])
            k, v = k.unsqueeze(-3), v.unsqueeze(-3)
            mask = self._grouped(mask)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask=self._windowed(mask, T, start + T),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and T > 1,  # a single query, the last, sees every key
            generator=self.generator,
        )  # (B, H, T, D)
        y = y.reshape(*qkv.shape[:-2], self.n_heads, T, self.head_dim)
        return y.transpose(-3, -2).flatten(-2)  # (B, T, C)

    def _check_static(self, mask, segments):
        if mask is not None or segments is not None or self.rope is not None:
            raise ValueError(
                "MultiHeadAttention: a StaticCache goes without masks, segments and rope; use a "
                "KVCache"
            )

    def parts(self) -> list[slice]:
        """Which channels of qkv are queries, keys and values."""
        queries, keys = self.d_out, self.n_kv_heads * self.head_dim
        bounds = 0, queries, queries + keys, queries + 2 * keys
        return [slice(begin, end) for begin, end in pairwise(bounds)]

    def _heads(self, x):
        """(B, T, C) -> (B, H, T, D): channels 0..D-1 are head 0, and so on."""
        x = x.reshape(*x.shape[:-1], -1, self.head_dim)  # (B, T, H, D)
        return x.transpose(-3, -2)  # (B, H, T, D)

    def _grouped(self, mask):
        """A mask for heads (H / R, R) in place of H."""
        if mask is None or mask.ndim < 3:
            return mask
        H, shape = mask.shape[-3], mask.shape
        groups = (1, 1) if H == 1 else (self.n_kv_heads, H // self.n_kv_heads)
        return mask.reshape(*shape[:-3], *groups, *shape[-2:])

    def _windowed(self, mask, T, S):
        """`mask`, less the keys that are too far back."""
        if self.window >= S:
            return mask
        near = np.triu(np.ones((T, S), bool), k=S - T + 1 - self.window)
        if mask is None:
            return near
        return F.where(near, mask, False if mask.dtype == np.bool else -math.inf)

    def extra_repr(self) -> str:
        shown = f"n_heads={self.n_heads}, causal={self.causal}, dropout={self.dropout}"
        if self.n_kv_heads < self.n_heads:
            shown += f", n_kv_heads={self.n_kv_heads}"
        return shown if self.window == self.context_length else f"{shown}, window={self.window}"


def check_tokens(owner: str, x: Tensor, longest: float = math.inf) -> int:
    """How many tokens x has. Raises ValueError unless it is (..., T, d_in), with T <= longest,
    TypeError for a list.
    """
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(f"{owner}: x is a Tensor, not {type(x).__name__}: make one with tensor(x)")
    if x.ndim < 2:
        raise ValueError(f"{owner}: x has shape {x.shape}, expected (..., T, d_in)")
    T = x.shape[-2]
    if longest < T:
        raise ValueError(
            f"{owner}: {T} tokens exceed context_length {longest}; keep the last {longest}"
        )
    return T


def _check_rope(owner, rope, head_dim, context_length):
    if not isinstance(rope, RotaryEmbedding):
        raise TypeError(f"{owner}: rope is a RotaryEmbedding, not a {type(rope).__name__}")
    if rope.dim != head_dim or rope.context_length < context_length:
        raise ValueError(
            f"{owner}: rope has dim {rope.dim} and context_length {rope.context_length}; "
            f"expected {head_dim}, which is d_out / n_heads, and at least {context_length}"
        )


class FeedForward(Module):
    """Each token on its own through a wider layer: down(gelu(up(x))).  (B, T, C) -> (B, T, C)"""

    def __init__(
        self, emb_dim: int, hidden_dim: int | None = None, generator: Generator | None = None
    ):
        hidden_dim = 4 * emb_dim if hidden_dim is None else hidden_dim
        self.up = Linear(emb_dim, hidden_dim, generator=generator)
        self.gelu = GELU("tanh")
        self.down = Linear(hidden_dim, emb_dim, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_plain():
            return self._forward(x)
        weights = self.up.weight, self.up.bias, self.down.weight, self.down.bias
        return fused("mlp", _mlp, x, *weights, activation="gelu_tanh")

    def is_plain(self) -> bool:
        """Whether it computes what it was made for: nothing else has been put in."""
        plain = type(self.up) is type(self.down) is Linear and type(self.gelu) is GELU
        return plain and self.gelu.approximate == "tanh"

    def _forward(self, x):
        h = self.gelu(self.up(x))  # (B, T, 4C)
        return self.down(h)  # (B, T, C)


def _mlp(x, up, b, down, c):
    """What a FeedForward computes."""
    h = F.gelu(F.linear(x, up, b), "tanh")  # (B, T, 4C)
    return F.linear(h, down, c)  # (B, T, C)


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).  (B, T, C) -> (B, T, C)

    Normalising before (pre-LN) leaves the sum itself untouched, so that gradients reach the first
    block unscaled. In training, dropout zeroes elements of what is added, with probability
    `dropout`, and weights of the attention, with probability `dropout_attn` (`dropout` by default).
    """

    def __init__(
        self,
        emb_dim: int,
        n_heads: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        dropout_attn: float | None = None,
        generator: Generator | None = None,
    ):
        self.norm1 = LayerNorm(emb_dim)
        self.att = MultiHeadAttention(
            d_in=emb_dim,
            d_out=emb_dim,
            context_length=context_length,
            n_heads=n_heads,
            dropout=dropout if dropout_attn is None else dropout_attn,
            qkv_bias=qkv_bias,
            generator=generator,
        )
        self.norm2 = LayerNorm(emb_dim)
        self.ff = FeedForward(emb_dim, generator=generator)
        self.drop = Dropout(dropout, generator)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | np.ndarray | None = None,
        cache: LayerCache | StaticLayerCache | None = None,
        segments: np.ndarray | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); the others as in MultiHeadAttention."""
        if type(cache) is LayerCache and x.shape[-2] == 1 and segments is None:
            y = self._next(x, mask, cache)
            if y is not None:
                return y
        x = x + self.drop(self.att(self.norm1(x), mask, cache, segments))  # (B, T, C)
        return x + self.drop(self.ff(self.norm2(x)))  # (B, T, C)

    def _next(self, x, mask, cache):
        """The same for one further token of each row, (B, 1, C), by the kernel of a whole block;
        None where there is none that takes it, or where other layers have been put in.
        """
        kernel, att, ff = fused_kernel("block", x.data), self.att, self.ff
        if kernel is None or is_grad_enabled() or not self._is_plain(cache.length + 1):
            return None
        if cache.keys.shape[1] != att.n_heads:  # append says so
            return None
        layers = self.norm1, att.qkv, att.out_proj, self.norm2, ff.up, ff.down
        weights = [(a.weight.data, None if a.bias is None else a.bias.data) for a in layers]
        given = x.data, cache.keys, cache.values, *weights
        eps = self.norm1.eps, self.norm2.eps
        attributes = {"length": cache.length, "mask": mask, "eps": eps}
        if not kernel.accepts(*given, **attributes):
            return None
        y, _ = kernel.forward(*given, **attributes)
        cache.length += 1
        return Tensor(y)

    def _is_plain(self, S):
        """Whether each part is as GPT-2 has it, none drops anything, and all S tokens are seen."""
        att, ff = self.att, self.ff
        return (
            type(att) is MultiHeadAttention
            and type(ff) is FeedForward
            and ff.is_plain()
            and type(self.norm1) is type(self.norm2) is LayerNorm
            and type(att.qkv) is type(att.out_proj) is Linear
            and att.rope is None
            and att.causal
            and att.n_kv_heads == att.n_heads
            and att.window >= S
            and not (att.training and att.dropout)
            and not (self.drop.training and self.drop.p)
        )
