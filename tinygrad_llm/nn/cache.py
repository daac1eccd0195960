"""The keys and values that attention has computed, kept for the tokens that follow."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..backend import run_fused
from ..device import device as device_named
from ..device import of
from ..tensor import Tensor, is_grad_enabled
from .layers import check_sizes

FEW_QUERIES = 16  # of a row: those that the kernel `decode` takes


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
        where = device_named(device)
        where.make_current()
        empty = where.xp.empty
        self.keys, self.values = empty(shape, dtype), empty(shape, dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens (B, H, T, D); returns views of all so far, (B, H, length, D).

        Raises ValueError for other shapes and for more than context_length tokens, RuntimeError
        where gradients would be recorded.
        """
        _check("KVCache", k, self.keys, self.length)
        end = self.length + k.shape[-2]
        self.keys[:, :, self.length : end] = k.data
        self.values[:, :, self.length : end] = v.data
        self.length = end
        return Tensor(self.keys[:, :, :end]), Tensor(self.values[:, :, :end])

    def select(self, rows: np.ndarray) -> None:
        """Row b becomes what row rows[b] was; there may be more or fewer rows than before."""
        _select(self, rows, self.length)


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


# --- for a step that is recorded ------------------------------------------------------------------


class StaticCache:
    """A KVCache whose arrays stay where they are, and whose rows have lengths of their own.

    Each row begins at position 0. What a call depends on, the lengths, lies on the device, so that
    a call with one token a row can be recorded as a CUDA graph. It is used as a KVCache is:
    `model(ids, cache=cache)` adds T tokens to each row. Of a row that has fewer, what follows
    them in `ids` is anything: `keep` takes it away again, and nothing before has seen it.

    layers      a StaticLayerCache for each attention, from the first to the last
    lengths     (B,) int64, an array on the device: the tokens in each row
    counts      (B,) int64 on the host: the same
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_heads: int,
        context_length: int,
        head_dim: int,
        dtype: DTypeLike = np.float32,
        device: str = "cpu",
    ):
        sizes = {"n_heads": n_heads, "context_length": context_length, "head_dim": head_dim}
        check_sizes("StaticCache", n_layers=n_layers, batch=batch, **sizes)
        where = device_named(device)
        where.make_current()
        self._rows = _Rows(where.xp, batch)
        shape = batch, n_heads, context_length, head_dim
        self.layers = [StaticLayerCache(self._rows, shape, dtype) for _ in range(n_layers)]

    lengths = property(lambda self: self._rows.lengths)
    counts = property(lambda self: self._rows.counts)
    length = property(lambda self: int(self.counts.max()), doc="Tokens in the longest row.")

    def keep(self, counts: ArrayLike) -> None:
        """Row b has its first counts[b] tokens, and no others. Waits for the device."""
        self._rows.counts = np.array(counts, np.int64)
        self.lengths[...] = of(self.lengths).put(self._rows.counts)

    def commit(self) -> None:
        """Counts the tokens that the layers were given: the call that gave them has succeeded."""
        self.replayed(self._rows.new)
        self.lengths[...] = self._rows.ends

    def replayed(self, T: int) -> None:
        """Counts T tokens more a row on the host: a recorded call has added them on the device."""
        self._rows.counts = self._rows.counts + T

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens of the rows that have more."""
        if length < self.length:
            self.keep(np.minimum(self.counts, length))

    def select(self, rows: ArrayLike) -> None:
        """Row b becomes what row rows[b] was, in place if there are as many rows as before."""
        rows = np.asarray(rows)
        counts, longest = self.counts[rows], self.length
        if len(rows) != len(self.counts):
            self._rows.resize(len(rows))
        for layer in self.layers:
            _select(layer, rows, longest)
        self.keep(counts)

    def positions(self, T: int) -> np.ndarray:
        """Of the next T tokens, which the layers are about to be given: (B, T), on the device."""
        rows, xp = self._rows, of(self.lengths).xp
        rows.new = T
        xp.add(rows.lengths, T, out=rows.ends)
        return rows.lengths[:, None] + xp.arange(T)

    def mask(self, T: int) -> None:
        """None: a row has no padding in front."""


class _Rows:
    """What the layers of a StaticCache share: how far its rows are filled, before the `new` tokens
    of the present call and after them.
    """

    def __init__(self, xp, batch):
        self._xp = xp
        self.resize(batch)

    def resize(self, batch):
        self.lengths, self.ends = (self._xp.zeros(batch, np.int64) for _ in range(2))
        self.counts, self.new = np.zeros(batch, np.int64), 0


class StaticLayerCache:
    """Of one attention layer: keys and values (B, H, context_length, D), of which a row's first
    tokens are filled, as its StaticCache says.
    """

    def __init__(self, rows: _Rows, shape: tuple[int, ...], dtype: DTypeLike):
        self._rows = rows
        empty = of(rows.lengths).xp.empty
        self.keys, self.values = empty(shape, dtype), empty(shape, dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Adds T tokens to each row, k and v (B, H, T, D), and lets their queries (B, R H, T, D)
        see them and all before: causal attention, (B, R H, T, D). window: as in MultiHeadAttention.

        Raises as LayerCache.append does.
        """
        rows, T = self._rows, k.shape[-2]
        _check("StaticCache", k, self.keys, int(rows.counts.max()))
        run_fused("append", _append, k.data, v.data, self.keys, self.values, rows.lengths)
        arrays = q.data, self.keys, self.values, rows.ends
        if T <= FEW_QUERIES:
            return Tensor(run_fused("decode", _decode, *arrays, window=window))
        S, R = int(rows.counts[0]) + T, q.shape[1] // k.shape[1]
        if (rows.counts != S - T).any() or window is not None:
            return Tensor(_decode(*arrays, window=window))
        k, v = (Tensor(_repeated(x[:, :, :S], R)) for x in (self.keys, self.values))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _append(k, v, keys, values, lengths):
    """What the kernel of that name does: keys[b, :, lengths[b] + t] = k[b, :, t]; and values."""
    (B, _, T, _), xp = k.shape, of(keys).xp
    b, places = xp.arange(B)[:, None], lengths[:, None] + xp.arange(T)
    keys[b, :, places], values[b, :, places] = k.swapaxes(1, 2), v.swapaxes(1, 2)  # (B, T, H, D)


def _decode(q, keys, values, lengths, window=None):
    """What the kernel of that name does: the last T of each row's lengths[b] tokens see those
    before them.  q (B, R H, T, D), keys and values (B, H, n, D) -> (B, R H, T, D)
    """
    T, n, xp = q.shape[-2], keys.shape[-2], of(q).xp
    end = (lengths[:, None] - T + 1 + xp.arange(T))[:, None, :, None]  # (B, 1, T, 1)
    j = xp.arange(n)
    seen = j < end if window is None else (j < end) & (j >= end - window)
    filled = (j < lengths[:, None])[:, None, :, None]  # what lies beyond may be nan
    zero = xp.zeros((), np.float32)  # CuPy's where knows no bfloat16
    keys, values = (
        _repeated(xp.where(filled, x, zero).astype(x.dtype), q.shape[1] // x.shape[1])
        for x in (keys, values)
    )
    tensors = map(Tensor, (q, keys, values, seen))
    return F.scaled_dot_product_attention(*tensors).data


def _select(layer, rows, length):
    """Row b of a layer's keys and values becomes what row rows[b] was, up to position `length`: in
    place if there are as many rows as before.
    """
    for name in ("keys", "values"):
        old = getattr(layer, name)
        filled = old[of(old).put(rows), :, :length]  # a copy
        if len(rows) != len(old):
            setattr(layer, name, of(old).xp.empty((len(rows), *old.shape[1:]), old.dtype))
        getattr(layer, name)[:, :, :length] = filled


def _repeated(x, R):
    """Keys or values (B, H, n, D) for R H heads of queries, of which R share one."""
    return of(x).xp.repeat(x, R, axis=1) if R > 1 else x


# --- what does not fit ----------------------------------------------------------------------------


def _check(owner, k, keys, length):
    """Raises unless the new keys k fit into `keys` after the first `length`."""
    if is_grad_enabled() and k.requires_grad:
        raise RuntimeError(f"a {owner} keeps no gradients: use it inside no_grad()")
    B, H, longest, D = keys.shape
    T = k.shape[-2]
    if k.shape != (B, H, T, D):
        raise ValueError(f"{owner}: keys of shape {k.shape} do not fit; expected {B, H, 'T', D}")
    if length + T > longest:
        raise ValueError(overflow(f"{owner}: {T} tokens", length, longest))


def overflow(what: str, length: int, context_length: int) -> str:
    """What to say of tokens that do not fit after the `length` in a cache."""
    if not length:
        return f"{what} exceed context_length {context_length}; keep the last {context_length}"
    return (
        f"{what} after the {length} in the cache exceed context_length {context_length}; "
        "fill a new cache with the last ones"
    )
