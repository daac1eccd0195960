"""The keys and values that attention has computed, kept for the tokens that follow."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..device import device as device_named
from ..device import of
from ..tensor import Tensor, is_grad_enabled
from .layers import check_sizes


class LayerCache:
    """Of one attention layer: keys and values (B, H, context_length, D), of which the first
    `length` tokens are filled; H counts the heads of keys, which are fewer than those of queries in
    grouped-query attention.
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        context_length: int,
        head_dim: int,
        dtype: DTypeLike = np.float32,
        device: str = "cpu",
    ):
        sizes = {"n_heads": n_heads, "context_length": context_length, "head_dim": head_dim}
        check_sizes("KVCache", batch=batch, **sizes)
        shape = batch, n_heads, context_length, head_dim
        empty = device_named(device).xp.empty
        self.keys, self.values = empty(shape, dtype), empty(shape, dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens (B, H, T, D); returns views of all so far, (B, H, length, D).

        Raises ValueError for other shapes and for more than context_length tokens, RuntimeError
        where gradients would be recorded.
        """
        if is_grad_enabled() and k.requires_grad:
            raise RuntimeError("a KVCache keeps no gradients: use it inside no_grad()")
        B, H, longest, D = self.keys.shape
        end = self.length + k.shape[-2]
        if k.shape != (B, H, end - self.length, D):
            raise ValueError(
                f"KVCache: keys of shape {k.shape} do not fit; expected {B, H, 'T', D}"
            )
        if end > longest:
            raise ValueError(overflow(f"KVCache: {k.shape[-2]} tokens", self.length, longest))
        self.keys[:, :, self.length : end] = k.data
        self.values[:, :, self.length : end] = v.data
        self.length = end
        return Tensor(self.keys[:, :, :end]), Tensor(self.values[:, :, :end])

    def select(self, rows: np.ndarray) -> None:
        """Row b becomes what row rows[b] was; there may be more or fewer rows than before."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            filled = old[of(old).put(rows), :, : self.length]  # a copy
            if len(rows) != len(old):
                setattr(self, name, of(old).xp.empty((len(rows), *old.shape[1:]), old.dtype))
            getattr(self, name)[:, :, : self.length] = filled


class KVCache:
    """Of a whole model: a token's keys and values are computed once, and read by all that follow.

    layers      a LayerCache for each attention, from the first to the last
    padding     (B,) how many of a row's first tokens are none, where rows of different lengths end
                together: no token sees them, and positions are counted after them
    length      tokens in it, padding included

    A model reads its place from it and adds to it: `model(ids, cache=cache)` gives the logits of
    `ids` as they follow the tokens in the cache. A call that fails or is interrupted adds none.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_heads: int,
        context_length: int,
        head_dim: int,
        dtype: DTypeLike = np.float32,
        padding: ArrayLike | None = None,
        device: str = "cpu",
    ):
        check_sizes("KVCache", n_layers=n_layers)
        sizes = batch, n_heads, context_length, head_dim
        self.layers = [LayerCache(*sizes, dtype, device) for _ in range(n_layers)]
        self.length = 0
        self.padding = None if padding is None else np.asarray(padding)
        if self.padding is not None and self.padding.shape != (batch,):
            raise ValueError(
                f"KVCache: padding has shape {self.padding.shape}, expected ({batch},)"
            )

    def commit(self) -> None:
        """Counts the tokens that the layers were given: the call that gave them has succeeded."""
        self.length = self.layers[-1].length

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens, and any that were never committed."""
        self.length = min(self.length, length)
        for layer in self.layers:
            layer.length = self.length

    def select(self, rows: ArrayLike) -> None:
        """Row b becomes what row rows[b] was, as beam search needs it."""
        rows = np.asarray(rows)
        for layer in self.layers:
            layer.select(rows)
        self.padding = None if self.padding is None else self.padding[rows]

    def positions(self, T: int) -> np.ndarray:
        """Of the next T tokens: (T,), or with padding (B, T), where it counts as 0."""
        places = np.arange(self.length, self.length + T)
        return places if self.padding is None else np.maximum(places - self.padding[:, None], 0)

    def mask(self, T: int) -> np.ndarray | None:
        """Which keys may be seen once T more tokens are in it: (B, 1, 1, S) booleans, None for all.

        The padding itself sees nothing.
        """
        if self.padding is None:
            return None
        seen = np.arange(self.length + T) >= self.padding[:, None]  # (B, S)
        return seen[:, None, None]


def overflow(what: str, length: int, context_length: int) -> str:
    """What to say of tokens that do not fit after the `length` in a cache."""
    if not length:
        return f"{what} exceed context_length {context_length}; keep the last {context_length}"
    return (
        f"{what} after the {length} in the cache exceed context_length {context_length}; "
        "fill a new cache with the last ones"
    )
