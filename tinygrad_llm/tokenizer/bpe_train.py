"""Learning byte-pair merges: join the most frequent pair of neighbours, again and again.

A merge changes only the words that contain its pair, so only their pairs are counted anew.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

Pair = tuple[bytes, bytes]


def learn_merges(
    word_counts: Mapping[bytes, int],
    n_merges: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """The first `n_merges` merges, best first; fewer if every word has become one token.

    Of equally frequent pairs, the one that appeared first wins: words are read in the order of
    `word_counts`, and pairs that a merge creates come after all earlier ones.
    """
    words = [[bytes([byte]) for byte in word] for word in word_counts]
    pairs = PairCounter(words, word_counts.values())
    merges = []
    while len(merges) < n_merges:
        pair = pairs.best()
        if pair is None:
            break
        pairs.merge(pair)
        merges.append(pair)
        if progress is not None:
            progress(len(merges), n_merges)
    return merges


def merge_pair(parts: list, pair: tuple, joined: Any = None) -> list:
    """Put `joined` (left + right) for every occurrence of `pair`, from left to right."""
    left, right = pair
    joined = left + right if joined is None else joined
    merged = []
    i = 0
    while i < len(parts):
        if parts[i] == left and parts[i + 1 : i + 2] == [right]:
            merged.append(joined)
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


class PairCounter:
    """How often each pair of neighbouring tokens occurs in the corpus, kept up to date.

    words: each different word as its tokens, which are lengthened in place.
    word_counts: how often each of them occurs.
    """

    def __init__(self, words: Iterable[list], word_counts: Iterable[int]):
        self.words = list(words)
        self.word_counts = list(word_counts)
        self.pair_counts: dict[tuple, int] = {}  # in order of first appearance
        self.appearance: dict[tuple, int] = {}  # 0 for the pair that appeared first
        self.words_with: dict[tuple, set[int]] = {}  # may keep words that no longer have the pair
        for number in range(len(self.words)):
            self._add(number)
        self.queue = [self._entry(pair) for pair in self.pair_counts]
        heapq.heapify(self.queue)

    def join(self, pair: tuple) -> Any:
        """The token that a pair becomes."""
        left, right = pair
        return left + right

    def best(self) -> tuple | None:
        """The pair with the highest count, the earliest of equals; None if no pair is left."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            pair = entry[-1]
            # A pair has an entry for each count it ever had: only the present one is valid.
            if self.pair_counts[pair] > 0 and entry == self._entry(pair):
                return pair
        return None

    def merge(self, pair: tuple) -> None:
        """Join `pair` in every word that contains it."""
        changed: dict[tuple, None] = {}  # a set that remembers order
        for number in sorted(self.words_with.pop(pair)):
            changed.update(dict.fromkeys(pairwise(self.words[number])))
            self._remove(number)
            self.words[number] = merge_pair(self.words[number], pair, self.join(pair))
            self._add(number)
            changed.update(dict.fromkeys(pairwise(self.words[number])))
        self._queue_again(changed)

    def _queue_again(self, pairs: Iterable[tuple]) -> None:
        for pair in pairs:
            if self.pair_counts[pair] > 0:
                heapq.heappush(self.queue, self._entry(pair))

    def _entry(self, pair: tuple) -> tuple[float, int, tuple]:
        """The place in the queue: high counts first, then early pairs."""
        return -self.pair_counts[pair], self.appearance[pair], pair

    def _add(self, number: int) -> None:
        for pair in pairwise(self.words[number]):
            self.appearance.setdefault(pair, len(self.appearance))
            self.pair_counts[pair] = self.pair_counts.get(pair, 0) + self.word_counts[number]
            self.words_with.setdefault(pair, set()).add(number)

    def _remove(self, number: int) -> None:
        for pair in pairwise(self.words[number]):
            self.pair_counts[pair] -= self.word_counts[number]
