"""Going through a dataset once per epoch, in order or shuffled, as PyTorch's DataLoader does.

The same seed gives the same order as in PyTorch: the random numbers are drawn in its order, those
that only its worker processes would need included.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_llm import random
from tinygrad_llm.data.windows import Windows, at_least_one


class DataLoader:
    """Goes through a dataset once per `for` loop, in batches.

    dataset     has a length, and either batch(indices), as Windows has, or dataset[i]; then a batch
                is collate_fn(items), by default the items stacked: tuples (x, y) give (X, Y)
    shuffle     draws a new order for each loop
    drop_last   leaves out a last batch that is not full
    generator   a random.Generator; by default random.default_generator, which random.manual_seed
                seeds

    As in PyTorch, every loop draws from the generator, without shuffle too. Raises ValueError for
    batch_size below 1 or if there would be no batch at all, TypeError for another generator.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: random.Generator | None = None,
        collate_fn: Callable[[list], Any] | None = None,
    ):
        random.or_default(generator)  # raises TypeError; None stays None
        self.dataset = dataset
        self.batch_size = at_least_one("batch_size", batch_size)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = generator
        self.collate_fn = collate_fn
        if len(self) == 0:
            raise ValueError(
                f"a dataset of {len(dataset)} items makes no batch of {batch_size}: use a larger "
                "dataset (a longer text), a smaller batch_size or drop_last=False"
                if len(dataset)
                else "the dataset is empty: expected at least one item"
            )

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[Any]:
        generator = random.or_default(self.generator)
        generator.words(2)  # a seed for worker processes: PyTorch draws it, with workers or without
        return self._batches(generator)

    def _batches(self, generator: random.Generator) -> Iterator[Any]:
        order = self._order(generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._batch(order[start : start + self.batch_size])
        if self.shuffle and self.generator is not None:
            generator.permutation(len(order))  # PyTorch draws the next order, and takes none of it

    def _order(self, generator: random.Generator) -> np.ndarray:
        size = len(self.dataset)
        if not self.shuffle:
            return np.arange(size)
        if self.generator is None:
            _, seed = generator.words(2)  # 64 bits, of which a Mersenne Twister takes the lower 32
            generator = random.Generator(int(seed))
        return generator.permutation(size)

    def _batch(self, indices: np.ndarray) -> Any:
        if self.collate_fn is None and hasattr(self.dataset, "batch"):
            return self.dataset.batch(indices)
        return (self.collate_fn or stack)([self.dataset[i] for i in indices.tolist()])


def stack(items: Sequence[Any]) -> np.ndarray | tuple[np.ndarray, ...]:
    """Items of one shape as one array with a new first axis; tuples part by part."""
    if isinstance(items[0], tuple):
        return tuple(np.stack(part) for part in zip(*items, strict=True))
    return np.stack(items)


def create_dataloader(
    tokens: ArrayLike,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    generator: random.Generator | None = None,
) -> DataLoader:
    """Batches (x, y), each (batch_size, max_length) int64, of sliding windows over tokens (N,).

    The defaults are the book's. Raises ValueError for a number below 1, a text shorter than one
    window, and windows too few for one batch.
    """
    windows = Windows(tokens, max_length, stride)
    return DataLoader(windows, batch_size, shuffle, drop_last, generator)


class EpochBatches:
    """Endless batches of a dataset, each of its items once in every epoch, in a new order.

    The dataset is one for DataLoader, in whose order the items come, which is PyTorch's. `epoch`
    is the one that the last batch was of, from 0; each has `batches_per_epoch`. A `state_dict`
    (JSON can hold it) continues exactly, with the same dataset and batch_size. The generator is
    for it alone.
    Raises as DataLoader does.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        generator: random.Generator,
        shuffle: bool = True,
        drop_last: bool = True,
    ):
        if not isinstance(generator, random.Generator):
            raise TypeError(f"generator is a tinygrad_llm.random.Generator, not {generator!r}")
        self.loader = DataLoader(dataset, batch_size, shuffle, drop_last, generator)
        self.batches_per_epoch = len(self.loader)
        self.epoch = 0
        self._begin(0)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._drawn == self.batches_per_epoch:
            next(self._batches, None)  # what DataLoader draws at an epoch's end
            self.epoch += 1
            self._begin(0)
        self._drawn += 1
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Where it is: the generator as it was when the epoch began, and batches drawn since."""
        return {
            "epoch": self.epoch,
            "generator": self._before,
            "drawn": self._drawn,
            "size": [len(self.loader.dataset), self.loader.batch_size],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where state_dict() was called. Raises ValueError for another dataset's."""
        size = [len(self.loader.dataset), self.loader.batch_size]
        if list(state["size"]) != size:
            raise ValueError(
                "this state is of {} items in batches of {}, here are {} in batches of {}: give "
                "it the same ones to go on".format(*state["size"], *size)
            )
        self.loader.generator.set_state(state["generator"])
        self.epoch = state["epoch"]
        self._begin(state["drawn"])

    def _begin(self, drawn):
        """A new epoch, of which so many batches have been drawn."""
        self._before, self._drawn = self.loader.generator.get_state(), drawn
        self._batches = iter(self.loader)
        next(islice(self._batches, drawn, drawn), None)  # passes over them
