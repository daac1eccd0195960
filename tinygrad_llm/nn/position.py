"""Where a token stands: learned and sinusoidal positions, relative biases, rotary embeddings.

Attention sees a set of tokens, in no order. Position can be added to the embeddings (absolute), to
the scores as a function of the distance (relative), or turned into q and k, so that their product
depends on the distance alone (rotary).
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..tensor import Tensor
from .layers import check_numbers, check_sizes
from .module import Module, Parameter


def sinusoidal_positions(context_length: int, dim: int, base: float = 10000.0) -> Tensor:
    """A fixed table of positions, (context_length, dim) float32: sin and cos of
    pos / base^(2k/dim) in columns 2k and 2k + 1. Vaswani et al., 2017, section 3.5.
    """
    check_sizes("sinusoidal_positions", context_length=context_length, dim=dim)
    check_numbers("sinusoidal_positions", base=base)
    angles = np.arange(context_length)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    table = np.empty((context_length, dim), np.float32)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles[:, : dim // 2])
    return Tensor(table)


class RelativePositionBias(Module):
    """A number for each head and distance, added to the scores.  (T, S) -> (H, T, S)

    Distances of `max_distance` and more share one number, those of keys ahead too: weight
    (2 max_distance + 1, H), row max_distance is that of the token itself. Starts at zero. Shaw et
    al., "Self-Attention with Relative Position Representations", 2018; as a bias: Raffel et al.
    (T5), 2020.
    """

    def __init__(self, max_distance: int, n_heads: int):
        check_sizes("RelativePositionBias", max_distance=max_distance, n_heads=n_heads)
        self.max_distance = max_distance
        self.weight = Parameter(np.zeros((2 * max_distance + 1, n_heads), np.float32))

    def forward(self, queries: int, keys: int) -> Tensor:
        """For the last `queries` of `keys` tokens; as a `mask` of scaled_dot_product_attention.
        ValueError for more queries than keys.
        """
        check_sizes("RelativePositionBias", queries=queries, keys=keys)
        if queries > keys:
            raise ValueError(
                f"RelativePositionBias: {queries} queries are not the last of {keys} keys"
            )
        i, j = np.arange(keys - queries, keys)[:, None], np.arange(keys)
        distance = np.clip(j - i, -self.max_distance, self.max_distance) + self.max_distance
        return F.embedding(distance, self.weight).permute(2, 0, 1)  # (T, S, H) -> (H, T, S)

    def extra_repr(self) -> str:
        return f"max_distance={self.max_distance}, n_heads={self.weight.shape[1]}"


class RotaryEmbedding:
    """The angles of rotary position embeddings: pair k of a head turns by pos · base^(-2k/dim).

    Su et al., "RoFormer", 2021. For contexts longer than in training:

    scale       positions are divided by it: position interpolation (Chen et al., 2023); 2048 to
                8192 tokens is scale 4
    yarn        interpolates only pairs that turn slowly (Peng et al., "YaRN", 2023): a Yarn

    interleaved which numbers are a pair: (2k, 2k + 1), or without (k, k + dim/2)
    cos, sin    (context_length, dim / 2) float32 Tensors
    """

    def __init__(
        self,
        dim: int,
        context_length: int,
        base: float = 10000.0,
        scale: float = 1.0,
        yarn: "Yarn | None" = None,
        interleaved: bool = False,
    ):
        check_sizes("RotaryEmbedding", dim=dim, context_length=context_length)
        check_numbers("RotaryEmbedding", base=base, scale=scale)
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; expected an even number")
        if not (0 < scale < math.inf and 0 < base < math.inf):
            raise ValueError(
                f"RotaryEmbedding: scale {scale} and base {base} must be above 0, and finite"
            )
        if yarn is not None and not isinstance(yarn, Yarn):
            raise TypeError(f"RotaryEmbedding: yarn is a Yarn(factor, original), not {yarn!r}")
        if yarn is not None and scale != 1:
            raise ValueError("RotaryEmbedding: scale and yarn both stretch; give one of them")
        self.dim, self.context_length, self.interleaved = dim, context_length, interleaved
        speeds = base ** (-np.arange(0, dim, 2) / dim) / scale  # radians a position
        length = 1.0
        if yarn is not None:
            speeds, length = yarn.stretch(speeds, base, dim), yarn.length
        angles = np.arange(context_length)[:, None] * speeds
        self.cos = Tensor((np.cos(angles) * length).astype(np.float32))
        self.sin = Tensor((np.sin(angles) * length).astype(np.float32))

    def __call__(self, x: Tensor, start: int = 0) -> Tensor:
        """x (..., T, dim), the first at position `start`, turned. Raises ValueError beyond
        context_length.
        """
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"RotaryEmbedding: x has shape {x.shape}, expected (..., T, {self.dim})"
            )
        end = start + x.shape[-2]
        if start < 0:
            raise ValueError(f"RotaryEmbedding: start is {start}; expected a position, 0 or more")
        if end > self.context_length:
            raise ValueError(
                f"RotaryEmbedding: positions {start} to {end - 1} exceed context_length "
                f"{self.context_length}"
            )
        self.cos, self.sin = self.cos.to(x.device), self.sin.to(x.device)  # once
        return F.rope(x, self.cos[start:end], self.sin[start:end], self.interleaved)


class Yarn:
    """How YaRN stretches `original` positions by `factor` (Peng et al., 2023).

    A pair that turns more than `fast` times over the original context keeps its speed, since what
    it tells is local; one that turns less than `slow` times is interpolated; between them, a linear
    ramp. q and k get longer by `length` = 0.1 ln factor + 1, which sharpens the softmax.
    """

    def __init__(self, factor: float, original: int, fast: float = 32.0, slow: float = 1.0):
        check_sizes("Yarn", original=original)
        check_numbers("Yarn", factor=factor, fast=fast, slow=slow)
        if not 1 <= factor < math.inf or not math.inf > fast > slow > 0:
            raise ValueError(
                f"Yarn: factor {factor}, fast {fast}, slow {slow}; expected finite numbers, "
                "factor >= 1 and fast > slow > 0"
            )
        self.factor, self.original, self.fast, self.slow = factor, original, fast, slow
        self.length = 0.1 * math.log(factor) + 1

    def stretch(self, speeds: np.ndarray, base: float, dim: int) -> np.ndarray:
        """Radians a position of each pair, (dim / 2), stretched. ValueError: base not above 1."""
        if not base > 1:
            raise ValueError(f"Yarn: base is {base}; expected one above 1, so that pairs slow down")
        low, high = (self._pair(turns, base, dim) for turns in (self.fast, self.slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = (np.arange(dim // 2) - low) / max(high - low, 1e-3)
        ramp = np.clip(ramp, 0, 1)  # 0: as it was, 1: interpolated
        turns = self.original * speeds / (2 * math.pi)
        ramp[turns < self.slow] = 1  # pair 0, too, where even that is slow
        return speeds * (1 - ramp) + speeds / self.factor * ramp

    def _pair(self, turns, base, dim):
        """Which pair, as a real number, turns so many times over the original context."""
        return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))


# --- layouts --------------------------------------------------------------------------------------


def interleaved_from_halves(weight: Tensor | ArrayLike, head_dim: int) -> np.ndarray:
    """Rows of q's or k's weight, or elements of its bias, reordered: a RotaryEmbedding with
    interleaved=True then gives the scores that one without gave before.
    (H head_dim, ...) -> the same shape

    An array, of a Tensor's data too: write layer.weight.data[:] = interleaved_from_halves(...).
    """
    weight = Tensor(weight).data
    return _reordered(weight, (2, _half(weight, head_dim)))


def halves_from_interleaved(weight: Tensor | ArrayLike, head_dim: int) -> np.ndarray:
    """The way back."""
    weight = Tensor(weight).data
    return _reordered(weight, (_half(weight, head_dim), 2))


def _half(weight, head_dim):
    check_sizes("RotaryEmbedding", head_dim=head_dim)
    if head_dim % 2 or weight.shape[0] % head_dim:
        raise ValueError(
            f"weight has {weight.shape[0]} rows; expected a multiple of head_dim {head_dim}, which "
            "is even"
        )
    return head_dim // 2


def _reordered(weight, pair):
    heads = weight.reshape(-1, *pair, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def segment_positions(segments: ArrayLike) -> np.ndarray:
    """Each token's place in its segment.  segments (B, T) integers -> (B, T): 0, 1, ...

    A segment is a run of equal numbers; where the number changes, the next one begins.
    """
    segments = np.asarray(segments)
    T = np.arange(segments.shape[1])
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return T - np.maximum.accumulate(np.where(begins, T, 0), axis=1)


def segment_mask(segments: ArrayLike) -> np.ndarray:
    """Which pairs of tokens share a segment.  segments (B, T) integers -> (B, 1, T, T) booleans

    The mask of functional.scaled_dot_product_attention for all heads, beside is_causal.
    """
    positions = segment_positions(segments)
    starts = np.arange(positions.shape[1]) - positions  # (B, T): where each one's segment begins
    return (starts[:, :, None] == starts[:, None, :])[:, None]
