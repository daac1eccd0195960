"""Cutting arrays into pieces that stay in the cache while several passes go over them."""

import contextlib
import math

import numpy as np

from ... import threads

SIZE = 1 << 16  # elements: 256 KB of float32, so that three buffers fit in a core's L2 cache
_LONG = 512  # elements of a row that are worth a loop of their own
_WORTH = 1 << 23  # multiplications, from which on a second thread pays: it takes 50 µs to wake up


def flat(x):
    """x as one contiguous axis; a copy only if it is not contiguous."""
    return np.ascontiguousarray(x).reshape(-1)


def blocks(n, size=SIZE):
    """Slices that cover range(n), `size` long each."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def in_cache(n, length=1):
    """Slices that cover range(n) rows of that length, a block each; and if a team will share them
    out, as many for each thread. Where several threads compute, blocks are larger, as calls of
    NumPy should be: see threads.active.
    """
    block = SIZE if threads.active() == 1 else 4 * SIZE
    team, count = threads.size(), n * length // block
    if n * length <= 2 * SIZE:
        return blocks(n, max(1, n))
    count = max(1, count // team) * team
    return blocks(n, -(-n // count))


def shares(n, multiplications, most=None):
    """Slices that cover range(n), one for each thread of the team; a single one where there is too
    little to do. most: no slice is longer.
    """
    parts = max(1, min(n, threads.size() if multiplications > _WORTH else 1))
    rows = max(1, -(-n // parts))
    return blocks(n, min(rows, most or rows))


def stacks(batch, elements):
    """Indices that cut batch axes of these lengths into stacks of matrices that have that many
    elements each, so that a stack stays in the cache.
    """
    most, inner = max(1, 4 * SIZE // elements), math.prod(batch[1:])
    if math.prod(batch) <= most:
        return [()]
    if inner <= most:
        return [(part,) for part in blocks(batch[0], most // inner)]
    return [(i, *rest) for i in range(batch[0]) for rest in stacks(batch[1:], elements)]


def brief(x):
    """A context for many calls on an array like x: if they are short, one thread at a time has it,
    see threads.alone.
    """
    return threads.alone() if x.size <= SIZE else contextlib.nullcontext()


def row_by_row(m, n):
    """A context in which NumPy goes row by row where it pairs (m, n) with (n,) or (m, 1).

    Else it first repeats the smaller array in a buffer of 8192 elements, and that takes longer than
    the arithmetic; only for short rows it is the better way. Numbers are not affected.
    """
    return _smallest_buffer() if n >= _LONG and m * n > SIZE else contextlib.nullcontext()


@contextlib.contextmanager
def _smallest_buffer():
    before = np.setbufsize(16)
    try:
        yield
    finally:
        np.setbufsize(before)


def sum_rows(x):
    """Σ over all axes but the last: (..., n) -> (n,); as a product, since BLAS sums fastest."""
    rows = x.reshape(-1, x.shape[-1])
    return np.ones(len(rows), x.dtype) @ rows
