"""Documents of any length in rows of one length, each as if it were alone in its row.

Without packing, rows are as long as the longest document, and the rest of them is padding. Packed,
several share a row as its segments: attention stays inside each, and positions start again, so
that the loss is that of the documents one by one.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index as as_int

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_llm.data.tokens import as_tokens
from tinygrad_llm.data.windows import at_least_one

IGNORED = -100  # a target that the loss does not count
PADDING = -1  # the segment of what is no document


@dataclass(frozen=True)
class Packed:
    """Rows of one length T: N of them, all arrays (N, T). A dataset for DataLoader.

    inputs, targets     int64; targets are -100 where the row is padded
    segments            int32: the number of the document that a token is of, -1 for padding
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """inputs, targets, segments of one row, each (T,): views, not copies."""
        index = as_int(index)
        return self.inputs[index], self.targets[index], self.segments[index]

    def batch(self, indices: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """inputs, targets, segments of these rows, each (len(indices), T): what GPT.loss takes."""
        return self.inputs[indices], self.targets[indices], self.segments[indices]

    @property
    def fill(self) -> float:
        """The part of all places that holds tokens, not padding."""
        return float((self.segments != PADDING).mean())


def pack(
    documents: Iterable[ArrayLike], max_length: int, split: bool = False, pad_id: int = 0
) -> Packed:
    """Pack documents, each (n,) token ids, into rows of max_length.

    split       False: no document is cut; the longest are placed first, each where the least room
                is left (best fit decreasing: Johnson, "Near-optimal bin packing algorithms", 1973)
                True: one document after the other, no gaps; where a row ends, the document goes on
                in the next as a segment of its own, and has lost the context before
    pad_id      the input where a row is padded, any id of the vocabulary

    A document of n tokens gives n - 1 inputs with their targets, each exactly once; one of fewer
    than 2 tokens gives none. Raises ValueError for max_length below 1, a negative pad_id, no
    document of 2 tokens, and, without split, a document longer than max_length + 1 tokens.
    """
    max_length = at_least_one("max_length", max_length)
    if not isinstance(pad_id, Integral) or pad_id < 0:
        raise ValueError(f"pad_id is an id of the vocabulary, at least 0, not {pad_id!r}")
    documents = [as_tokens(document) for document in documents]
    sizes = [max(len(document) - 1, 0) for document in documents]
    if not any(sizes):
        raise ValueError("nothing to pack: a document needs at least 2 tokens, an input and target")
    starts = np.cumsum([0, *sizes[:-1]]) if split else _best_fit(sizes, max_length)
    end = max(start + size for start, size in zip(starts, sizes))
    shape = (-(-end // max_length), max_length)  # (N, T)
    inputs, targets = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    segments = np.full(shape, PADDING, np.int32)
    for number, (document, start, size) in enumerate(zip(documents, starts, sizes)):
        place = slice(start, start + size)
        inputs.ravel()[place], targets.ravel()[place] = document[:size], document[1:]
        segments.ravel()[place] = number
    return Packed(inputs, targets, segments)


def _best_fit(sizes: Sequence[int], length: int) -> np.ndarray:
    """Where each piece starts, counting through rows of `length`, so that none crosses a row."""
    if max(sizes) > length:
        raise ValueError(
            f"document {int(np.argmax(sizes))} has {max(sizes) + 1} tokens, a row of max_length "
            f"{length} takes {length + 1}: use split=True or a greater max_length"
        )
    rows_with_room = defaultdict(list)  # room -> rows that have so much left
    rooms = []  # those that some row has, sorted
    starts, rows = np.zeros(len(sizes), np.int64), 0
    for number in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = sizes[number]
        best = bisect_left(rooms, size)
        if best == len(rooms):
            row, room, rows = rows, length, rows + 1
        else:
            room = rooms[best]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[best]
        starts[number] = row * length + length - room
        if not rows_with_room[room - size]:
            insort(rooms, room - size)
        rows_with_room[room - size].append(row)
    return starts
