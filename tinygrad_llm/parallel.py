"""One batch on several threads: each takes some of its rows, and the gradients are added up.

Python runs one thread at a time, but NumPy lets the others go on while it computes. So the whole
step runs in parallel, not only the matrix products that BLAS can share out, and the threads wait
for each other once in a step instead of once in every product. BLAS itself then gets one thread.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from . import backend
from .gpt import GPT
from .tensor import Tensor, leaf_gradients, no_grad

IGNORED = -100  # a target that does not count


def default_threads() -> int:
    """As many as this process has cores, up to 4: Python's own work is not shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


class Shards:
    """Shares out the rows of a batch among `threads` threads.

    The sums are taken in the same order every time: the same number of threads gives the same bits.
    A model with dropout, in training, runs on one thread: its masks come from one random stream.
    Each further thread holds gradients of its own while it computes, as large as the weights.
    """

    def __init__(self, threads: int):
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "shard") if threads > 1 else None
        self._blas = ThreadpoolController()

    def loss(self, model: GPT, ids: NDArray, targets: NDArray) -> float:
        """model.loss(ids, targets), both (B, T), as a number and without a graph."""

        def shard(ids, targets, weight):
            with no_grad():
                return model.loss(ids, targets).item() * weight

        return sum(self._each(shard, model, ids, targets))

    def backward(self, model: GPT, ids: NDArray, targets: NDArray) -> float:
        """The same; and .grad of every parameter is its gradient, whatever it was before."""

        def shard(ids, targets, weight):
            loss = model.loss(ids, targets)
            return loss.item() * weight, leaf_gradients(loss, weight)

        losses, gradients = zip(*self._each(shard, model, ids, targets))
        for parameter in model.parameters():
            parameter.grad = _sum([found.get(id(parameter)) for found in gradients])
        return sum(losses)

    def _each(self, shard: Callable, model: GPT, ids: NDArray, targets: NDArray) -> list[Any]:
        """shard(ids, targets, weight) for each thread's rows; weights are shares of the mean."""
        draws_masks = model.training and model.cfg.drop_rate > 0
        if self._pool is None or draws_masks or len(ids) == 1:
            return [shard(ids, targets, 1.0)]
        counted = np.sum(targets != IGNORED)
        rows = [r for r in np.array_split(np.arange(len(ids)), self.threads) if r.size]
        rows = [r for r in rows if np.any(targets[r] != IGNORED)]
        if not rows:
            return [shard(ids, targets, 1.0)]
        reading = backend.current.reading  # of this thread: the others follow it

        def run(r):
            with backend.using(reading), np.errstate(all="ignore"):
                weight = np.sum(targets[r] != IGNORED) / counted
                return shard(ids[r], targets[r], float(weight))

        with self._blas.limit(limits=1, user_api="blas"):
            return list(self._pool.map(run, rows))


def _sum(gradients: list[Tensor | None]) -> Tensor | None:
    """The sum of one parameter's gradients from all shards, in the first one's memory."""
    total, *others = [g for g in gradients if g is not None] or [None]
    for gradient in others:
        total.data += gradient.data
    return total
