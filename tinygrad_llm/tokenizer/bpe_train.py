"""Learning byte-pair merges: join the most frequent pair of neighbours, again and again.

A merge changes only the words that contain its pair, so only their pairs are counted anew.
"""

import heapq
from collections.abc import Callable, Mapping
from itertools import pairwise

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
    pairs = PairCounter(word_counts)
    merges = []
    while len(merges) < n_merges:
        pair = pairs.most_frequent()
        if pair is None:
            break
        pairs.merge(pair)
        merges.append(pair)
        if progress is not None:
            progress(len(merges), n_merges)
    return merges


def merge_pair(parts: list[bytes], pair: Pair) -> list[bytes]:
    """Join every occurrence of `pair` in `parts`, from left to right."""
    left, right = pair
    merged = []
    i = 0
    while i < len(parts):
        if parts[i] == left and parts[i + 1 : i + 2] == [right]:
            merged.append(left + right)
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


class PairCounter:
    """How often each pair of neighbouring tokens occurs in the corpus, kept up to date."""

    def __init__(self, word_counts: Mapping[bytes, int]):
        self.words = [[bytes([byte]) for byte in word] for word in word_counts]
        self.word_counts = list(word_counts.values())
        self.pair_counts: dict[Pair, int] = {}  # in order of first appearance
        self.appearance: dict[Pair, int] = {}  # 0 for the pair that appeared first
        self.words_with: dict[Pair, set[int]] = {}  # may keep words that no longer have the pair
        for number in range(len(self.words)):
            self._add(number)
        self.queue = [self._entry(pair) for pair in self.pair_counts]
        heapq.heapify(self.queue)

    def most_frequent(self) -> Pair | None:
        """The pair with the highest count, the earliest of equals; None if no pair is left."""
        while self.queue:
            entry = heapq.heappop(self.queue)
            pair = entry[-1]
            # A pair has an entry for each count it ever had: only the present one is valid.
            if self.pair_counts[pair] > 0 and entry == self._entry(pair):
                return pair
        return None

    def merge(self, pair: Pair) -> None:
        """Join `pair` in every word that contains it."""
        changed: dict[Pair, None] = {}  # a set that remembers order
        for number in sorted(self.words_with.pop(pair)):
            changed.update(dict.fromkeys(pairwise(self.words[number])))
            self._remove(number)
            self.words[number] = merge_pair(self.words[number], pair)
            self._add(number)
            changed.update(dict.fromkeys(pairwise(self.words[number])))
        for other in changed:
            heapq.heappush(self.queue, self._entry(other))

    def _entry(self, pair: Pair) -> tuple[int, int, Pair]:
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
