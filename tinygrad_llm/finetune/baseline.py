"""What words alone tell about a text's class: what a large model is to be better than.

A text is the vector of how often each word occurs in it, and the classes' logits are linear in that
(logistic regression): order does not count, and no word is known that the training texts lack.
"""

from collections import Counter

import numpy as np
import regex

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..nn import Linear
from ..optim import AdamW
from ..random import Generator
from ..tensor import Tensor, no_grad
from .metrics import Scores
from .table import Table

WORD = regex.compile(r"\w+|[^\w\s]")
MOST_WORDS = 10_000  # those that occur in the most texts
MOST_TEXTS = 4096  # in a step, and in memory as vectors


class WordClassifier:
    """Logistic regression on words, their numbers weighed by tf-idf. Trained when it is made.

    A word's weight is its number in the text times (log((1 + N) / (1 + texts that have it)) + 1),
    and each text's vector gets the length 1 (Salton and Buckley, 1988, smoothed). Words and their
    weights are those of the table that it learns from. A step takes every text, or every k-th of
    more than MOST_TEXTS.
    """

    def __init__(self, table: Table, steps: int = 100, lr: float = 0.1):
        N = len(table)
        found = Counter(word for text in table.texts for word in set(_words(text)))
        common = sorted(found, key=lambda word: (-found[word], word))[:MOST_WORDS]
        self.columns = {word: column for column, word in enumerate(common)}
        self.idf = np.array(
            [np.log((1 + N) / (1 + found[word])) + 1 for word in common], np.float32
        )
        self.classes = table.classes
        self.layer = Linear(len(common), len(self.classes), generator=Generator(0))
        optimizer, k = AdamW(self.layer.parameters(), lr=lr), -(-N // MOST_TEXTS)
        weights = [self._weights(text) for text in table.texts]
        for step in range(steps):
            chosen = slice(step % k, None, k)
            if step == 0 or k > 1:
                x = _vectors(weights[chosen], len(common))
            optimizer.zero_grad()
            F.cross_entropy(self.layer(x), table.labels[chosen]).backward()
            optimizer.step()

    def evaluate(self, table: Table) -> Scores:
        """Raises ValueError for a table with other classes than the one that it learned from."""
        if table.classes != self.classes:
            raise ValueError(
                f"the words tell {', '.join(self.classes)} apart, and the table has "
                f"{', '.join(table.classes)}: read it with the same classes"
            )
        predicted = np.empty(len(table), np.int64)
        for start in range(0, len(table), MOST_TEXTS):
            chosen = slice(start, start + MOST_TEXTS)
            weights = [self._weights(text) for text in table.texts[chosen]]
            with no_grad():
                logits = self.layer(_vectors(weights, len(self.columns))).data  # (N, n)
            predicted[chosen] = logits.argmax(axis=-1)
        return Scores.of(table.labels, predicted, self.classes)

    def _weights(self, text):
        """The columns of a text's words and what these hold, both (words,)."""
        numbers = Counter(word for word in _words(text) if word in self.columns)
        columns = np.array([self.columns[word] for word in numbers], np.int64)
        weights = np.array([*numbers.values()], np.float32) * self.idf[columns]
        return columns, weights / max(np.linalg.norm(weights), 1e-12)


def _vectors(texts, width):
    """(N, width) float32"""
    x = np.zeros((len(texts), width), np.float32)
    for row, (columns, weights) in zip(x, texts):
        row[columns] = weights
    return Tensor(x)


def _words(text):
    return WORD.findall(text.lower())
