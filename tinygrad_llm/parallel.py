"""One batch on several threads.

A small model is computed by each thread, on some of the rows of the batch, and the gradients are
added up: the threads wait for each other once in a step. A large one is computed by one thread,
whose kernels share out what they do (see threads.py): they wait after each kernel, which is short
beside the kernel's work then, and nobody needs gradients of its own, as large as the weights.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import backend, threads
from .nn import Module
from .optim import share_elements
from .precision import is_narrow
from .tensor import Tensor, leaf_gradients, no_grad
from .threads import check_threads

IGNORED = -100  # a target that does not count
LARGE = 1 << 22  # parameters: from there on, kernels take longer than threads take to wake up

Batch = tuple[NDArray, ...]


class Shards:
    """Shares out the work on a batch among `threads` threads.

    The sums are taken in the same order every time: the same number of threads gives the same bits.
    Rows are shared out unless the model is large, or has dropout, in training, whose masks come
    from one random stream; or there is a single row. A GPU has threads of its own.

    A batch is what model.loss takes, arrays with a row for each example: (ids, targets, ...). A
    mean is over the targets that count, those that are not -100: (B, T) of tokens, (B,) of labels.
    """

    def __init__(self, threads: int):
        check_threads(threads)
        self.threads = threads

    def loss(self, model: Module, *batch: NDArray) -> float:
        """model.loss(*batch) as a number and without a graph. ValueError for no such batch."""
        batch = _checked(batch)

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
        gradients are divided by it: see optim.LossScale. Raises ValueError as loss does.
        """
        batch = _checked(batch)
        if pieces < 1:
            raise ValueError(f"pieces must be at least 1, got {pieces}")

        def shard(batch, weight):
            loss = model.loss(*batch)
            return loss.item() * weight, leaf_gradients(loss, weight * scale)

        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = None  # its memory, before new gradients are made
        total, gradients = 0.0, {}
        for rows, weight in _shares(batch, pieces):
            found = self._each(shard, model, _rows_of(batch, rows), weight)
            total += sum(loss for loss, _ in found)
            for _, of_shard in found:
                self._add(gradients, of_shard)
        for parameter in parameters:
            parameter.grad = gradients.get(id(parameter))
            if scale != 1 and parameter.grad is not None:
                parameter.grad.data /= scale
        return total

    def _add(self, gradients: dict[int, Tensor], more: dict[int, Tensor]) -> None:
        """Adds up gradients by parameter, in the memory of the first ones."""
        pairs = [(gradients[i].data, g.data) for i, g in more.items() if i in gradients]
        share_elements(lambda pair: operator.iadd(*pair), pairs, [a for a, _ in pairs])
        for i, g in more.items():
            if i not in gradients:
                gradients[i] = g.float() if is_narrow(g.data) else g

    def _each(self, shard: Callable, model: Module, batch: Batch, whole: float) -> list[Any]:
        """shard(rows of the batch, weight) for each thread; the weights add up to `whole`."""
        large = sum(p.data.size for p in model.parameters()) > LARGE
        whole_batch = large or (model.training and model.draws_masks()) or model.device != "cpu"
        shares = _shares(batch, 1 if whole_batch else self.threads)
        reading = backend.current.reading  # of this thread: the others follow it

        def some(share):
            rows, weight = share
            with backend.using(reading):
                return shard(_rows_of(batch, rows), whole * weight)

        with threads.team(self.threads), np.errstate(all="ignore"):
            if len(shares) == 1:
                return [shard(batch, whole)]
            return threads.share(some, shares)


def counts(batch: Batch) -> NDArray:
    """How many targets of each row count, (B,)."""
    targets = batch[1]
    return np.sum(targets.reshape(len(targets), -1) != IGNORED, axis=1)


def _checked(batch):
    """As arrays, of which each has as many rows, one or more."""
    batch = tuple(map(np.asarray, batch))
    rows = {len(array) if array.ndim else 0 for array in batch}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(str(array.shape) for array in batch)
        raise ValueError(f"a batch is arrays with as many rows each, one or more, not {shapes}")
    return batch


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
