"""How good predicted classes are: accuracy, precision, recall, F1, and who is taken for whom.

The definitions are scikit-learn's, with its zero_division=0: a quotient 0/0 is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..data.files import atomic_write


@dataclass(frozen=True, eq=False)
class Scores:
    """What n classes' predictions are worth; arrays are (n,) float64, in the order of the classes.

    classes     their names
    confusion   (n, n) int64: how many texts of class i (row) were said to be of class j (column)
    """

    classes: tuple[str, ...]
    confusion: np.ndarray

    @classmethod
    def of(cls, labels: ArrayLike, predicted: ArrayLike, classes: Sequence[str]) -> "Scores":
        """From labels and predictions, (N,) integers of 0..n-1. Raises ValueError for others."""
        labels, predicted, n = np.asarray(labels), np.asarray(predicted), len(classes)
        fit = labels.shape == predicted.shape and labels.ndim == 1
        for numbers in (labels, predicted):
            fit = fit and (numbers.size == 0 or numbers.dtype.kind in "iu")
            fit = fit and bool(((numbers >= 0) & (numbers < n)).all())
        if not fit:
            raise ValueError(
                f"scores take as many labels as predictions, (N,) integers of 0..{n - 1}; got "
                f"{labels.dtype} {labels.shape} and {predicted.dtype} {predicted.shape}"
            )
        pairs = n * labels.astype(np.int64) + predicted.astype(np.int64)
        return cls(tuple(classes), np.bincount(pairs, minlength=n * n).reshape(n, n))

    @property
    def support(self) -> np.ndarray:
        """(n,) int64: the texts of each class."""
        return self.confusion.sum(axis=1)

    @property
    def accuracy(self) -> float:
        """The share of all texts whose class was found."""
        return float(_ratio(np.trace(self.confusion), self.confusion.sum()))

    @property
    def precision(self) -> np.ndarray:
        """Of the texts said to be of a class, the share that is."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:
        """Of the texts of a class, the share that was found."""
        return _ratio(np.diag(self.confusion), self.support)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of the two, 2 p r / (p + r) = 2 found / (said + all)."""
        return _ratio(2 * np.diag(self.confusion), self.confusion.sum(axis=0) + self.support)

    def report(self) -> list[tuple[str, float, float, float, int]]:
        """(class, precision, recall, F1, support) of each, then the "macro average": the mean over
        all classes, each counting alike; its support is that of all.
        """
        measures = self.precision, self.recall, self.f1
        rows = zip(self.classes, *(values.tolist() for values in (*measures, self.support)))
        means = (float(values.mean()) for values in measures)
        return [*rows, ("macro average", *means, int(self.support.sum()))]


def plot_confusion(path: str | Path, scores: Scores) -> None:
    """Draws the confusion matrix into a PNG file: shares of each row as grey and, of up to 40
    classes, their names and numbers of texts.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    n = len(scores.classes)
    shares = _ratio(scores.confusion, scores.support[:, None])
    named = n <= 40  # more would be unreadable, and take minutes
    size = 3 + 0.6 * n if named else 8
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {scores.accuracy:.2%}")
    names = [name if len(name) <= 20 else name[:19] + "…" for name in scores.classes]
    names = [name.replace("$", r"\$") for name in names]  # which would begin a formula
    if named:
        axes.set_xticks(range(n), names, rotation=90 if n > 4 else 0)
        axes.set_yticks(range(n), names)
    for i, j in np.ndindex(n, n) if named else ():
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, f"{scores.confusion[i, j]:,}", ha="center", va="center", color=color)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _ratio(a, b):
    """a / b, and 0 for 0 / 0."""
    return np.divide(
        a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=b != 0
    )
