"""Several corpora in one training run, the small ones more often than their size would have it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_llm.data.tokens import as_tokens
from tinygrad_llm.data.windows import Batch, at_least_one, gather, need_one_window
from tinygrad_llm.random import or_default


def mixture_probabilities(weights: ArrayLike, alpha: float = 0.7) -> np.ndarray:
    """p_i = w_i^α / Σ_j w_j^α: how often to draw from corpus i, (n,) float64.

    weights (n,) are the corpora's sizes, in tokens say. With α = 1 every token is as likely as
    every other; towards 0 every corpus is.
    Conneau and Lample, "Cross-lingual Language Model Pretraining", 2019, section 3.1.

    Raises ValueError unless 0 < alpha <= 1 and the weights are finite, not negative, not all 0.
    """
    w = np.asarray(weights, np.float64)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
    if w.ndim != 1 or not np.isfinite(w).all() or (w < 0).any() or not (w > 0).any():
        raise ValueError(f"weights must be one number from 0 on per corpus, not all 0: got {w}")
    powers = (w / w.max()) ** alpha
    return powers / powers.sum()


class MixedBatches:
    """Endless batches of windows out of several corpora, each row's corpus drawn with p_i.

    corpora     arrays of token ids, (N_i,) each; memory-mapped ones stay in their files
    alpha       of mixture_probabilities
    weights     of mixture_probabilities; by default the corpora's numbers of tokens
    rng         anything with integers(low, high, size), high excluded; None is
                random.default_generator

    Each step gives (x, y), each (batch_size, context) int64; `sources` (batch_size,) says which
    corpus each row of the last batch came from. The same state of `rng` gives the same batches.
    Raises ValueError for no corpus, one shorter than a window, or numbers out of range, TypeError
    for another rng.
    """

    def __init__(
        self,
        corpora: Sequence[ArrayLike],
        batch_size: int,
        context: int,
        rng: Any,
        alpha: float = 0.7,
        weights: ArrayLike | None = None,
    ):
        self.corpora = [as_tokens(tokens) for tokens in corpora]
        if not self.corpora:
            raise ValueError("no corpus to mix: give at least one array of tokens")
        self.batch_size = at_least_one("batch_size", batch_size)
        self.context = at_least_one("context", context)
        self.rng = or_default(rng, integers_only=True)
        for tokens in self.corpora:
            need_one_window(tokens, self.context)
        sizes = [len(tokens) for tokens in self.corpora]
        self.probabilities = mixture_probabilities(sizes if weights is None else weights, alpha)
        if len(self.probabilities) != len(sizes):
            raise ValueError(f"{len(self.probabilities)} weights for {len(sizes)} corpora")
        self.sources = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        ends = np.array([len(tokens) - self.context for tokens in self.corpora])
        edges = np.cumsum(self.probabilities)
        edges /= edges[-1]  # rounding may leave the last one below 1
        self.sources = np.searchsorted(edges, self._uniform(), side="right")  # (B,)
        starts = (self._uniform() * ends[self.sources]).astype(np.int64)  # (B,)
        x = np.empty((self.batch_size, self.context), np.int64)
        y = np.empty_like(x)
        for source in np.unique(self.sources):
            rows = self.sources == source
            x[rows], y[rows] = gather(self.corpora[source], starts[rows], self.context)
        return x, y

    def _uniform(self) -> np.ndarray:
        """Numbers in [0, 1) with 53 bits: enough to tell apart the windows of any corpus."""
        return np.asarray(self.rng.integers(0, 2**53, self.batch_size)) * 2.0**-53
