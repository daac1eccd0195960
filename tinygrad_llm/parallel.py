"""One batch on several threads: each takes some of its rows, and the gradients are added up.

Python runs one thread at a time, but NumPy lets the others go on while it computes. So the whole
step runs in parallel, not only the matrix products that BLAS can share out, and the threads wait
for each other once in a step instead of once in every product. BLAS itself then gets one thread;
where there is nothing to share out, it gets all of them. It never chooses a number by itself, from
the machine or OPENBLAS_NUM_THREADS: other sums of the same numbers would have other last bits.

What comes after, adding up gradients, clipping and the optimizer's step, takes `Shards.map` where a
model is so large that a second thread is of use before the first one is done.
"""

import operator
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from . import backend
from .nn import Module
from .optim import worth_sharing
from .precision import is_narrow
from .tensor import Tensor, leaf_gradients, no_grad

IGNORED = -100  # a target that does not count

Batch = tuple[NDArray, ...]


def default_threads() -> int:
    """As many as this process has cores, up to 4: Python's own work is not shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


def blas() -> str:
    """What multiplies NumPy's matrices, and for which processor: "openblas 0.3.30 Haswell"."""
    found = ThreadpoolController().select(user_api="blas").info()
    names = ("internal_api", "version", "architecture")
    return ", ".join(" ".join(str(one.get(name)) for name in names) for one in found) or "unknown"


class Shards:
    """Shares out the rows of a batch among `threads` threads.

    The sums are taken in the same order every time: the same number of threads gives the same bits.
    A model with dropout, in training, runs on one thread, since its masks come from one random
    stream, and so do a single row, for which BLAS has `threads` then, and a GPU.
    Each further thread holds gradients of its own while it computes, as large as the weights.

    A batch is what model.loss takes, arrays with a row for each example: (ids, targets, ...). A
    mean is over the targets that count, those that are not -100: (B, T) of tokens, (B,) of labels.
    """

    def __init__(self, threads: int):
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self._others = ThreadPoolExecutor(threads - 1, "shard") if threads > 1 else None
        self._blas = ThreadpoolController()

    def limited(self, threads: int) -> AbstractContextManager:
        """In the block BLAS has that many threads, whatever it had before."""
        return self._blas.limit(limits=threads, user_api="blas")

    def map(self, function: Callable, items: Iterable) -> list[Any]:
        """[function(item) for item in items], each by the thread that is free next: a thread that
        the system wakes late then does less. BLAS has one thread meanwhile.
        """
        items = list(items)
        results, places = [None] * len(items), iter(range(len(items)))
        reading = backend.current.reading  # of this thread: the others follow it

        def run():
            with backend.using(reading), np.errstate(all="ignore"):
                for i in places:  # whose next() is one step of Python: no two threads get the same
                    results[i] = function(items[i])

        with self.limited(1):
            others = [self._others.submit(run) for _ in range(min(self.threads, len(items)) - 1)]
            try:
                run()
            finally:
                wait(others)
        for other in others:
            other.result()  # raises what was raised there
        return results

    def loss(self, model: Module, *batch: NDArray) -> float:
        """model.loss(*batch) as a number and without a graph."""

        def shard(batch, weight):
            with no_grad():
                return model.loss(*batch).item() * weight

        return sum(self._each(shard, model, batch, 1.0))

    def backward(
        self, model: Module, *batch: NDArray, pieces: int = 1, scale: float = 1.0
    ) -> float:
        """The same; and .grad of every parameter is its gradient, whatever it was before: in
        float32 for parameters of 16 bits.

        With more `pieces`, the rows take turns: the same mean and gradient, up to rounding, in the
        memory that one piece needs (gradient accumulation). Backward starts from `scale`, and the
        gradients are divided by it: see optim.LossScale.
        """

        def shard(batch, weight):
            loss = model.loss(*batch)
            return loss.item() * weight, leaf_gradients(loss, weight * scale)

        total, gradients = 0.0, {}
        for rows, weight in _shares(batch, pieces):
            found = self._each(shard, model, _rows_of(batch, rows), weight)
            total += sum(loss for loss, _ in found)
            for _, of_shard in found:
                self._add(gradients, of_shard)
        for parameter in model.parameters():
            parameter.grad = gradients.get(id(parameter))
            if scale != 1 and parameter.grad is not None:
                parameter.grad.data /= scale
        return total

    def _add(self, gradients: dict[int, Tensor], more: dict[int, Tensor]) -> None:
        """Adds up gradients by parameter, in the memory of the first ones."""
        pairs = [(gradients[i].data, g.data) for i, g in more.items() if i in gradients]
        each = worth_sharing(self.map, [b for _, b in pairs])
        list(each(lambda pair: operator.iadd(*pair), pairs))
        for i, g in more.items():
            if i not in gradients:
                gradients[i] = g.float() if is_narrow(g.data) else g

    def _each(self, shard: Callable, model: Module, batch: Batch, whole: float) -> list[Any]:
        """shard(rows of the batch, weight) for each thread; the weights add up to `whole`."""
        alone = (model.training and model.draws_masks()) or model.device != "cpu"
        shares = _shares(batch, 1 if alone else self.threads)
        if len(shares) == 1:
            with self.limited(self.threads):
                return [shard(batch, whole)]
        return self.map(lambda share: shard(_rows_of(batch, share[0]), whole * share[1]), shares)


def counts(batch: Batch) -> NDArray:
    """How many targets of each row count, (B,)."""
    targets = batch[1]
    return np.sum(targets.reshape(len(targets), -1) != IGNORED, axis=1)


def _rows_of(batch: Batch, rows: NDArray) -> Batch:
    return tuple(array[rows] for array in batch)


def _shares(batch: Batch, n: int) -> list[tuple[NDArray, float]]:
    """The rows of a batch in n parts, and their shares of the mean over all that count."""
    counted = counts(batch)  # (B,)
    everything = np.arange(len(counted))
    parts = [rows for rows in np.array_split(everything, n) if counted[rows].any()]
    if len(parts) <= 1:
        return [(everything, 1.0)]
    return [(rows, float(counted[rows].sum() / counted.sum())) for rows in parts]
