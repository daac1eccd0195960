"""From one long token sequence to batches: windows of inputs, and targets shifted by one.

`Windows` are numbered, for a DataLoader to go through; `RandomBatches` draws forever.
"""

from collections.abc import Iterator
from operator import index as as_int
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_llm.data.tokens import as_tokens
from tinygrad_llm.random import or_default

Batch = tuple[np.ndarray, np.ndarray]


def at_least_one(name: str, value: int) -> int:
    """The value as an int. Raises ValueError if it is below 1, TypeError if it is no integer."""
    try:
        value = as_int(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """The windows that begin at `starts`: inputs and targets, both (B, length) int64."""
    positions = starts[:, None] + np.arange(length)  # (B, length)
    return tokens[positions].astype(np.int64), tokens[positions + 1].astype(np.int64)


def need_one_window(tokens: np.ndarray, length: int) -> None:
    """Raises ValueError for a text without one window of `length` inputs and their targets."""
    if len(tokens) < length + 1:
        raise ValueError(
            f"a window of {length} tokens and its targets need {length + 1} tokens, "
            f"but there are only {len(tokens)}: use a longer text or shorter windows"
        )


class Windows:
    """Sliding windows over `tokens` (N,): window i starts at token i * stride.

    An item is (x, y), each (max_length,) int64, where y is x one token later. Starts are
    range(0, N - max_length, stride). A stride below max_length makes windows overlap.

    Raises ValueError for max_length or stride below 1 and for a text shorter than one window.
    """

    def __init__(self, tokens: ArrayLike, max_length: int, stride: int):
        self.tokens = as_tokens(tokens)
        self.max_length = at_least_one("max_length", max_length)
        self.stride = at_least_one("stride", stride)
        need_one_window(self.tokens, self.max_length)

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.max_length, self.stride))

    def __getitem__(self, index: int) -> Batch:
        x, y = self.batch([as_int(index)])
        return x[0], y[0]

    def batch(self, indices: ArrayLike) -> Batch:
        """Several windows at once: x and y, each (len(indices), max_length) int64.

        A negative index counts from the end. Raises IndexError for a window that does not exist.
        """
        indices = as_tokens(indices).astype(np.int64)
        outside = (indices < -len(self)) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"there is no window {indices[outside][0]}: there are {len(self)}")
        return gather(self.tokens, indices % len(self) * self.stride, self.max_length)


class RandomBatches:
    """Endless batches of windows that start anywhere in `tokens` (N,), drawn with repetition.

    Each step gives (x, y), each (batch_size, context) int64. `rng` is anything with
    `integers(low, high, size)`, high excluded, such as `np.random.default_rng(seed)`. The same
    state of `rng` gives the same batches. None is random.default_generator.

    Raises TypeError for another rng, ValueError for batch_size or context below 1 and for a text
    shorter than one window.
    """

    def __init__(self, tokens: ArrayLike, batch_size: int, context: int, rng: Any):
        self.tokens = as_tokens(tokens)
        self.batch_size = at_least_one("batch_size", batch_size)
        self.context = at_least_one("context", context)
        self.rng = or_default(rng, integers_only=True)
        need_one_window(self.tokens, self.context)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        end = len(self.tokens) - self.context  # the last start is end - 1: its target exists
        starts = np.asarray(self.rng.integers(0, end, self.batch_size))
        return gather(self.tokens, starts, self.context)

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as JSON can hold it; the rng is a tinygrad_llm.random.Generator."""
        return {"generator": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where state_dict() was called, with the same tokens and sizes."""
        self.rng.set_state(state["generator"])
