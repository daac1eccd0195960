"""The transformer block of GPT-2: attention, then a feed-forward network, each added to its input.

Letters in the shapes: B sequences in the batch, T tokens in each, C channels, H heads of D = C / H.
"""

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..random import Generator
from ..tensor import Tensor
from .layers import (
    GELU,
    Dropout,
    LayerNorm,
    Linear,
    check_divides,
    check_probability,
    check_sizes,
)
from .module import Module


class MultiHeadAttention(Module):
    """Each token collects from the tokens it may see, in H ways.  (..., T, d_in) -> (..., T, d_out)

    Queries, keys and values come from one matrix, `qkv` (3 d_out, d_in): first the rows that make
    the queries, then keys, then values. causal: a token sees itself and those before it. dropout:
    the probability with which, in training, a weight of the attention is zeroed.
    Raises ValueError if n_heads does not divide d_out, or for more than context_length tokens.
    Vaswani et al., "Attention Is All You Need", 2017.
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
        generator: Generator | None = None,
    ):
        owner = "MultiHeadAttention"
        check_sizes(owner, d_out=d_out, context_length=context_length, n_heads=n_heads)
        check_divides(owner, n_heads=n_heads, d_out=d_out)
        check_probability(owner, dropout=dropout)
        self.d_out, self.n_heads = d_out, n_heads
        self.context_length = context_length
        self.dropout, self.causal, self.generator = dropout, causal, generator
        self.qkv = Linear(d_in, 3 * d_out, bias=qkv_bias, generator=generator)
        self.out_proj = Linear(d_out, d_out, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., T, d_in) -> (..., T, d_out); in a GPT, ... is B."""
        q, k, v = F.split(self.qkv(x), self.d_out, axis=-1)  # 3 of (B, T, C)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)  # 3 of (B, H, T, D)
        longest = self.context_length
        if k.shape[-2] > longest:
            raise ValueError(
                f"MultiHeadAttention: {k.shape[-2]} tokens exceed context_length {longest}; "
                f"keep the last {longest}"
            )
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            generator=self.generator,
        )  # (B, H, T, D)
        y = y.transpose(-3, -2).flatten(-2)  # (B, T, C): the heads side by side
        return self.out_proj(y)  # (B, T, C)

    def _heads(self, x):
        """(B, T, C) -> (B, H, T, D): channels 0..D-1 are head 0, and so on."""
        D = self.d_out // self.n_heads
        x = x.reshape(*x.shape[:-1], self.n_heads, D)  # (B, T, H, D)
        return x.transpose(-3, -2)  # (B, H, T, D)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, causal={self.causal}, dropout={self.dropout}"


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
        h = self.gelu(self.up(x))  # (B, T, 4C)
        return self.down(h)  # (B, T, C)


class TransformerBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).  (B, T, C) -> (B, T, C)

    Normalising before (pre-LN) leaves the sum itself untouched, so that gradients reach the first
    block unscaled.
    """

    def __init__(
        self,
        emb_dim: int,
        n_heads: int,
        context_length: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        generator: Generator | None = None,
    ):
        self.norm1 = LayerNorm(emb_dim)
        self.att = MultiHeadAttention(
            d_in=emb_dim,
            d_out=emb_dim,
            context_length=context_length,
            n_heads=n_heads,
            dropout=dropout,
            qkv_bias=qkv_bias,
            generator=generator,
        )
        self.norm2 = LayerNorm(emb_dim)
        self.ff = FeedForward(emb_dim, generator=generator)
        self.drop = Dropout(dropout, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.drop(self.att(self.norm1(x)))  # (B, T, C)
        return x + self.drop(self.ff(self.norm2(x)))  # (B, T, C)
