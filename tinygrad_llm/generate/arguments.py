"""What the ways to generate are given, checked at once."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..tensor import Tensor


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
    ids = ids.data if isinstance(ids, Tensor) else np.asarray(ids)
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
    """How many tokens there are to choose from."""
    largest = model.cfg.vocab_size
    if vocab_size is not None and vocab_size > largest:
        raise ValueError(f"vocab_size {vocab_size} is more than the model's {largest}")
    return largest if vocab_size is None else vocab_size


def stop_ids(stop_id: int | Iterable[int] | None, vocab_size: int) -> np.ndarray:
    """None, one or several as an array. Raises ValueError for one that can never be drawn."""
    if stop_id is None:
        stops = []
    else:
        stops = [stop_id] if isinstance(stop_id, int | np.integer) else list(stop_id)
    for stop in stops:
        if not (isinstance(stop, int | np.integer) and 0 <= stop < vocab_size):
            raise ValueError(f"stop_id {stop!r} is no token: ids are 0..{vocab_size - 1}")
    return np.array(stops, np.int64)


def check_count(max_new_tokens: int) -> None:
    """Raises ValueError for a number of tokens that cannot be."""
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer from 0 on, got {max_new_tokens}")
