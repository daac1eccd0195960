"""Arrays seen as matrices and as batches of matrices: by their strides, never by a copy."""

import math
from dataclasses import dataclass

import numpy as np
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import not_empty, rows
from .arrays import Array


@dataclass(frozen=True)
class Matrix:
    """An Array seen as a matrix or, with more axes in front, a batch of them."""

    array: Array
    shape: tuple
    strides: tuple  # in elements

    @property
    def T(self):  # noqa: N802
        """The transpose: the same memory."""
        *batch, n, m = range(len(self.shape))
        return self.axes(*batch, m, n)

    def axes(self, *order):
        """The same memory, its axes in another order."""
        shape, strides = ([x[i] for i in order] for x in (self.shape, self.strides))
        return Matrix(self.array, tuple(shape), tuple(strides))

    @property
    def transposed(self):
        """Whether it is the columns that are contiguous."""
        return self.strides[-1] != 1

    def fits_tma(self):
        """Whether the copy engine takes it: one matrix, everything at multiples of 16 bytes."""
        return math.prod(self.shape[:-2]) == 1 and min(self.strides[-2:]) == 1 and self.aligned

    @property
    def aligned(self):
        """Whether each row, or each column, begins at a multiple of 16 bytes."""
        step = max(self.strides[-2:]) * self.array.dtype.itemsize
        return self.array.address % 16 == 0 and step % 16 == 0

    def descriptor(self, rows, columns):
        """For tiles of that size; of the transpose, if that is how the memory lies."""
        if self.transposed:
            return self.T.descriptor(columns, rows)
        shape, strides = list(self.shape[-2:]), list(self.strides[-2:])
        return TensorDescriptor(self.array, shape, strides, [rows, columns])


def matrix(x, name):
    """The last two axes of an Array. ValueError unless one of the two is contiguous."""
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {x.shape}; expected at least 2 axes")
    not_empty(**{name: x})
    *outer, n, m = x.strides
    if x.shape[-1] == 1:  # the stride of an axis of length 1 is never used
        m = 1
    elif x.shape[-2] == 1 and m != 1:
        n = 1
    if 1 not in (n, m):
        raise ValueError(
            f"the last axes of {name} have strides {(n, m)}; expected one of them to be 1: make "
            f"{name} contiguous first"
        )
    return Matrix(x, x.shape, (*outer, n, m))


def row_matrix(x, name):
    """All axes but the last as the rows of one matrix. ValueError unless that works in place."""
    not_empty(**{name: x})
    count, stride = rows(x, name)
    return Matrix(x, (count, x.shape[-1]), (stride, 1))


def _merged(shape, *strides):
    """[(length, strides)]: neighbouring axes made one wherever all arrays step through both evenly;
    axes of length 1 left out.
    """
    axes = []
    for length, *steps in zip(shape, *strides):
        if length == 1:
            continue
        if axes and axes[-1][1] == [length * step for step in steps]:
            axes[-1] = (axes[-1][0] * length, steps)
        else:
            axes.append((length, steps))
    return axes


def rows_merged(*matrices):
    """Batches of the same shape as one matrix each, their rows one below the other; None if the
    rows are not evenly spaced.
    """
    axes = _merged(matrices[0].shape[:-1], *(x.strides[:-1] for x in matrices))
    if len(axes) > 1:
        return None
    n, strides = axes[0] if axes else (1, [x.shape[-1] for x in matrices])
    return [
        Matrix(x.array, (n, x.shape[-1]), (s, x.strides[-1])) for x, s in zip(matrices, strides)
    ]


def broadcast(x, batch):
    """The batch, repeated to that shape: strides of 0."""
    missing = len(batch) + 2 - len(x.shape)
    lengths, steps = (1,) * missing + x.shape[:-2], (0,) * missing + x.strides[:-2]
    steps = tuple(0 if length == 1 else step for length, step in zip(lengths, steps))
    return Matrix(x.array, (*batch, *x.shape[-2:]), (*steps, *x.strides[-2:]))


def batch_of(a, b):
    """The shape that the batch axes of both broadcast to."""
    try:
        return np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"batch axes {a.shape[:-2]} and {b.shape[:-2]} do not broadcast together"
        ) from None


def two_batch_axes(*matrices):
    """The same with exactly two axes in front. ValueError if they need more."""
    axes = _merged(matrices[0].shape[:-2], *(x.strides[:-2] for x in matrices))
    if len(axes) > 2:
        raise ValueError(
            f"batch axes {matrices[0].shape[:-2]} are spread over memory in {len(axes)} different "
            "ways; expected 2 at most: make the arrays contiguous first"
        )
    axes = [(1, [0] * len(matrices))] * (2 - len(axes)) + axes
    lengths = tuple(length for length, _ in axes)
    strides = zip(*(steps for _, steps in axes))
    return [
        Matrix(x.array, lengths + x.shape[-2:], steps + x.strides[-2:])
        for x, steps in zip(matrices, strides)
    ]
