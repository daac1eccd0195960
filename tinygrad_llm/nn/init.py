"""How weights start: filled in place, from a generator of tinygrad_llm.random."""

import contextlib
import threading
from collections.abc import Iterator

from .. import random
from ..device import of
from ..tensor import Tensor


class _Skipping(threading.local):
    on = False


_skipping = _Skipping()


@contextlib.contextmanager
def no_init() -> Iterator[None]:
    """Layers made inside draw no weights: for a model that is about to be loaded.

    What would have been drawn is whatever the memory holds, as with NumPy's empty: this costs
    nothing until it is written to.
    """
    before, _skipping.on = _skipping.on, True
    try:
        yield
    finally:
        _skipping.on = before


def uniform_(
    parameter: Tensor,
    low: float,
    high: float,
    generator: random.Generator | None = None,
    rows: slice = slice(None),
) -> None:
    """Uniform numbers in [low, high), in all rows or in these."""
    generator = random.or_default(generator)
    if not _skipping.on:
        part = parameter.data[rows]
        part[...] = of(part).put(generator.uniform(low, high, part.shape))


def normal_(
    parameter: Tensor, mean: float, std: float, generator: random.Generator | None = None
) -> None:
    """Normal numbers."""
    generator = random.or_default(generator)
    if not _skipping.on:
        numbers = generator.normal(mean, std, parameter.shape)
        parameter.data[...] = of(parameter.data).put(numbers)


def constant_(parameter: Tensor, value: float) -> None:
    """The same number everywhere."""
    parameter.data[...] = value
