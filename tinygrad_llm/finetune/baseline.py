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


class WordClassifier:
    """Logistic regression on words, their numbers weighed by tf-idf. Trained when it is made.

    A word's weight is its number in the text times log((1 + N) / (1 + texts that have it)) + 1, and
    each text's vector gets the length 1 (Salton and Buckley, 1988, smoothed).
    The vectors of all texts are in memory together, 4 bytes a word: 40 KB a text at most.
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
        x, optimizer = Tensor(self._vectors(table.texts)), AdamW(self.layer.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(self.layer(x), table.labels).backward()
            optimizer.step()

    def evaluate(self, table: Table) -> Scores:
        """Of a table that has the same classes."""
        with no_grad():
            logits = self.layer(Tensor(self._vectors(table.texts))).data  # (N, n)
        return Scores.of(table.labels, logits.argmax(axis=-1), self.classes)

    def _vectors(self, texts):
        """(N, words) float32"""
        x = np.zeros((len(texts), len(self.columns)), np.float32)
        for row, text in zip(x, texts):
            for word, number in Counter(_words(text)).items():
                if word in self.columns:
                    row[self.columns[word]] = number
        x *= self.idf
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _words(text):
    return WORD.findall(text.lower())
