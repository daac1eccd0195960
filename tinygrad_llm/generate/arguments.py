"""What the ways to generate are given, checked at once."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..device import of
from ..tensor import raw


def prompts(ids: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """One prompt (T,) or several (B, T) as (B, T) int64, and None; a list of prompts padded on the
    left, and by how much, (B,). Raises ValueError if one is empty, TypeError for other numbers.
    """
    several = isinstance(ids, list | tuple) and len(ids) and all(np.ndim(row) == 1 for row in ids)
    if several:
        rows = [_integers(np.asarray(row)) for row in ids]
        padding = max(map(len, rows)) - np.array([len(row) for row in rows])
        padded = [np.pad(row, (p, 0)) for row, p in zip(rows, padding, strict=True)]
        return np.stack(padded), padding
    ids = raw(ids)
    ids = of(ids).numpy(ids)
    if ids.ndim not in (1, 2):
        raise ValueError(f"ids must have shape (T,) or (B, T), not {ids.shape}")
    return np.atleast_2d(_integers(ids)), None


def _integers(ids):
    if ids.size == 0:
        raise ValueError("the prompt is empty: generation needs at least one token to start from")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {ids.dtype}: encode the text first")
    return ids.astype(np.int64)


def drawable(model: Any, vocab_size: int | None) -> int:
    """How many tokens there are to choose from. Raises TypeError for a model that does not say."""
    cfg = getattr(model, "cfg", None)
    if not (hasattr(cfg, "vocab_size") and hasattr(cfg, "context_length")):
        raise TypeError(
            f"model, of type {type(model).__name__}, needs cfg.context_length and cfg.vocab_size, "
            "as a GPT has them"
        )
    largest = cfg.vocab_size
    if vocab_size is None:
        return largest
    check(vocab_size=vocab_size)
    if vocab_size > largest:
        raise ValueError(f"vocab_size {vocab_size} is more than the model's {largest}")
    return vocab_size


def stop_ids(stop_id: int | Iterable[int] | None, vocab_size: int) -> np.ndarray:
    """None, one or several as an array. Raises ValueError for one that can never be drawn."""
    given = () if stop_id is None else stop_id
    stops = list(given) if isinstance(given, Iterable) else [given]
    for stop in stops:
        if not (_is_a(Integral, stop) and 0 <= stop < vocab_size):
            raise ValueError(f"stop_id {stop!r} is no token: ids are 0..{vocab_size - 1}")
    return np.array(stops, np.int64)


_RANGES = {
    "max_new_tokens": (Integral, lambda n: n >= 0, "an integer from 0 on"),
    "temperature": (Real, lambda t: 0 <= t < np.inf, "a number from 0 on"),
    "top_k": (Integral, lambda k: k >= 1, "a positive integer"),
    "top_p": (Real, lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "min_p": (Real, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "repetition_penalty": (Real, lambda r: 0 < r < np.inf, "a number above 0"),
    "vocab_size": (Integral, lambda n: n >= 1, "a positive integer"),
    "beams": (Integral, lambda n: n >= 1, "a positive integer"),
    "n_best": (Integral, lambda n: n >= 1, "a positive integer"),
    "length_penalty": (Real, lambda x: -np.inf < x < np.inf, "a finite number"),
}


def check(**numbers: Any) -> None:
    """Raises ValueError for the first of these arguments, by name, that cannot be."""
    for name, value in numbers.items():
        kind, fits, expected = _RANGES[name]
        if not (_is_a(kind, value) and fits(value)):
            raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_a(kind, value):
    return isinstance(value, kind) and not isinstance(value, bool)  # which Python calls Integral
