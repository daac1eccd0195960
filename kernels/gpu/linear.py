"""Matrix products, and what surrounds them done while the result is still in registers.

One kernel, `_product`, makes them all: Y = finish(A B), each program a tile of Y at a time, and
`finish` adds a bias, applies an activation, adds a residual, adds to what Y was. Where both need
several programs to a tile, or a sum over a batch, there are partial products in float32, and
`_reduce` adds them up in a fixed order and finishes.

    A        how it lies in memory does not matter, as long as one of its two axes is contiguous:
             a transpose is a view with its strides exchanged, never a copy
    tiles    in groups of GROUP rows of tiles, so that programs at work at the same time share
             what is in the L2 cache
    loads    by Hopper's copy engine (TMA, through descriptors made on the host), where addresses
             and strides are multiples of 16 bytes; else through pointers and masks

Tile sizes that fill the tensor cores: see _defaults; what limits each shape is its K, as a tile's
start and end cost the same however long the loop between them is.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import driver, tuning
from .arrays import Array, array, cdiv, inner_contiguous, not_empty, rows, same, shaped
from .driver import launch

KERNELS = ("matmul", "linear")
FUSED = ("mlp",)
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")
PRECISIONS = ("ieee", "tf32", "tf32x3")

# --- activations ----------------------------------------------------------------------------------


@triton.jit
def _activated(u, ACTIVATION: tl.constexpr):
    """The activation of u, in float32."""
    if ACTIVATION == "gelu":
        u = u * (0.5 + 0.5 * tl.erf(u * 0.7071067811865476))  # u Φ(u), 1/√2
    if ACTIVATION == "gelu_tanh":  # (1 + tanh v) / 2 = σ(2v),  2√(2/π) = 1.5957...
        u = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    if ACTIVATION == "silu":
        u = u * tl.sigmoid(u)
    return u


@triton.jit
def _slope(u, ACTIVATION: tl.constexpr):
    """Its derivative at u."""
    if ACTIVATION == "gelu":  # Φ(u) + u φ(u),  1/√2π = 0.3989...
        density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
        slope = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476) + u * density
    if ACTIVATION == "gelu_tanh":  # σ(2v) + u σ(2v) (1 - σ(2v)) dv/du · 2
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        slope = s + u * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * u * u)
    if ACTIVATION == "silu":
        s = tl.sigmoid(u)
        slope = s + u * s * (1 - s)
    return slope


@triton.jit
def _activation_vjp(
    g, pre, u_bar, stride_g, stride_pre, n, m, ACTIVATION: tl.constexpr, B: tl.constexpr
):
    """ū = g ⊙ activation'(u): a row and B columns for each program."""
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    g_j = tl.load(g + i * stride_g + j, mask=j < m, other=0.0).to(tl.float32)
    u_j = tl.load(pre + i * stride_pre + j, mask=j < m, other=0.0).to(tl.float32)
    u_bar_j = g_j * _slope(u_j, ACTIVATION)
    tl.store(u_bar + i * m + j, u_bar_j.to(u_bar.dtype.element_ty), mask=j < m)


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def _tile(t, tiles_i, tiles_j, GROUP: tl.constexpr):
    """Where the t-th tile lies: down the rows of a group, column by column, then the next group."""
    group, within = t // (GROUP * tiles_j), t % (GROUP * tiles_j)
    height = tl.minimum(tiles_i - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def _elements(x, at, i, j, n, m, H: tl.constexpr, W: tl.constexpr):
    """Pointers to the (H, W) tile at (i, j) of an (n, m) matrix, and which elements exist."""
    i, j = i + tl.arange(0, H), j + tl.arange(0, W)
    inside = (i < n)[:, None] & (j < m)[None, :]
    return x + (at[0] + i.to(tl.int64)[:, None] * at[1] + j.to(tl.int64)[None, :] * at[2]), inside


@triton.jit
def _load(
    x, at, i, j, n, m,
    H: tl.constexpr, W: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The (H, W) tile at (i, j) of an (n, m) matrix; 0 beyond its edges. `x` is a descriptor, or a
    pointer and at = (offset of the first element, row stride, column stride).
    """
    if TMA:
        tile = x.load([j, i]).T if TRANSPOSED else x.load([i, j])
    else:
        pointers, inside = _elements(x, at, i, j, n, m, H, W)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def _store(x, at, i, j, n, m, tile, TMA: tl.constexpr):
    """Writes a tile there, in x's dtype, as far as it exists."""
    if TMA:
        x.store([i, j], tile.to(x.dtype))
    else:
        pointers, inside = _elements(x, at, i, j, n, m, tile.shape[0], tile.shape[1])
        tl.store(pointers, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _multiply(
    u, sums, a, b, at_a, at_b, i, j, first, steps, n, m, k,
    A_T: tl.constexpr, B_T: tl.constexpr, TMA: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """u + A B over the columns of A from `first` on; with SUMS also sums + A 1."""
    for step in range(steps):
        at = first + step * BK
        a_tile = _load(a, at_a, i, at, n, k, u.shape[0], BK, TMA, A_T)
        b_tile = _load(b, at_b, at, j, k, m, BK, u.shape[1], TMA, B_T)
        u = tl.dot(a_tile, b_tile, u, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(a_tile.to(tl.float32), axis=1)
    return u, sums


# --- what is done to a tile at the end ------------------------------------------------------------


@triton.jit
def _finish(
    u, y, at_y, bias, pre, slope, residual, stride_pre, stride_slope, stride_residual, alpha,
    i, j, n, m, ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """From u = A B, a tile in float32, to y = activation(α u + bias) + residual (+ y); `pre` gets
    the argument of the activation. Or, for a gradient, y = α u ⊙ activation'(slope).
    """
    H: tl.constexpr = u.shape[0]
    W: tl.constexpr = u.shape[1]
    if alpha is not None:
        u *= alpha
    if bias is not None:
        js = j + tl.arange(0, W)
        u += tl.load(bias + js, mask=js < m, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        _store(pre, (0, stride_pre, 1), i, j, n, m, u, TMA)
    if slope is not None:
        at = _load(slope, (0, stride_slope, 1), i, j, n, m, H, W, False, False)
        u *= _slope(at.to(tl.float32), ACTIVATION)
    else:
        u = _activated(u, ACTIVATION)
    if residual is not None:
        r = _load(residual, (0, stride_residual, 1), i, j, n, m, H, W, False, False)
        u += r.to(tl.float32)
    if ACCUMULATE:
        u += _load(y, at_y, i, j, n, m, H, W, TMA, False).to(tl.float32)
    _store(y, at_y, i, j, n, m, u, TMA)


@triton.jit
def _halves(u):
    """The left and the right half of a tile."""
    return u.reshape(u.shape[0], 2, u.shape[1] // 2).permute(0, 2, 1).split()


# --- the kernels ----------------------------------------------------------------------------------


@triton.jit
def _product(
    a, b, y, strides_a, strides_b, strides_y, n, m, k, Z, z1,
    bias, pre, slope, residual, stride_pre, stride_slope, stride_residual, alpha, sums,
    c, d, strides_c, strides_d, r,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr, PERSISTENT: tl.constexpr,
    TMA: tl.constexpr, TMA_Y: tl.constexpr, TMA_CD: tl.constexpr,
    A_T: tl.constexpr, B_T: tl.constexpr, C_T: tl.constexpr, D_T: tl.constexpr,
    PRECISION: tl.constexpr, ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr, ACCUMULATE_SUMS: tl.constexpr,
):  # fmt: skip
    """y_z = finish(a_z b_z + c d), of (n, k) (k, m) and (n, r) (r, m); `sums` gets a's row sums.

    z counts the matrices of the batch, (z // z1, z % z1), or with SPLITS > 1 the parts of k, each
    with a y of its own. All programs together go through the tiles of all y_z.
    """
    tiles_i, tiles_j = tl.cdiv(n, BM), tl.cdiv(m, BN)
    steps = tl.cdiv(k, BK * SPLITS)  # the last part may reach beyond k, where there are zeros
    first_tile, tiles = tl.program_id(0), Z * tiles_i * tiles_j
    if not PERSISTENT:  # a tile for each program: a loop of one step is no loop for the compiler
        tiles = first_tile + 1
    stride = tl.num_programs(0) if PERSISTENT else 1
    for t in tl.range(first_tile, tiles, stride, flatten=FLATTEN):
        z = t // (tiles_i * tiles_j)
        i, j = _tile(t % (tiles_i * tiles_j), tiles_i, tiles_j, GROUP)
        i, j = i * BM, j * BN
        at_a, at_b = _matrix_at(strides_a, z, z1), _matrix_at(strides_b, z, z1)
        at_y = _matrix_at(strides_y, z, z1)
        first = z * steps * BK if SPLITS > 1 else 0

        u, row_sums = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32)
        if sums is None or j > 0:
            u, row_sums = _multiply(
                u, row_sums, a, b, at_a, at_b, i, j, first, steps, n, m, k,
                A_T, B_T, TMA, False, PRECISION, BK,
            )  # fmt: skip
        else:  # the first column of tiles sees all of a
            u, row_sums = _multiply(
                u, row_sums, a, b, at_a, at_b, i, j, first, steps, n, m, k,
                A_T, B_T, TMA, True, PRECISION, BK,
            )  # fmt: skip
            _store_sums(sums + z * n, row_sums, i, n, ACCUMULATE_SUMS)
        if c is not None:
            u, row_sums = _multiply(
                u, row_sums, c, d, (0, strides_c[0], strides_c[1]), (0, strides_d[0], strides_d[1]),
                i, j, 0, tl.cdiv(r, BK), n, m, r, C_T, D_T, TMA_CD, False, PRECISION, BK,
            )  # fmt: skip

        parts = _halves(u) if HALVES else (u,)  # in halves, it takes less shared memory
        for part in tl.static_range(len(parts)):
            _finish(
                parts[part], y, at_y, bias, pre, slope, residual,
                stride_pre, stride_slope, stride_residual, alpha,
                i, j + part * (BN // len(parts)), n, m, ACTIVATION, ACCUMULATE, TMA_Y,
            )  # fmt: skip


@triton.jit
def _matrix_at(strides, z, z1):
    """(offset, row stride, column stride) of the z-th matrix."""
    start = (z // z1).to(tl.int64) * strides[0] + (z % z1).to(tl.int64) * strides[1]
    return start, strides[2], strides[3]


@triton.jit
def _store_sums(sums, row_sums, i, n, ACCUMULATE: tl.constexpr):
    i += tl.arange(0, row_sums.shape[0])
    if ACCUMULATE:
        row_sums += tl.load(sums + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(sums + i, row_sums.to(sums.dtype.element_ty), mask=i < n)


@triton.jit
def _reduce(
    partials, y, stride_z, stride_y, n, m, Z,
    bias, pre, slope, residual, stride_pre, stride_slope, stride_residual, alpha,
    ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y = finish(Σ_z partials_z), z from first to last: the same bits each time."""
    i, j = tl.program_id(0) * BM, tl.program_id(1) * BN
    u = tl.zeros((BM, BN), tl.float32)
    start = tl.zeros((), tl.int64)
    for _ in range(Z):
        u += _load(partials, (start, m, 1), i, j, n, m, BM, BN, False, False)
        start += stride_z
    _finish(
        u, y, (0, stride_y, 1), bias, pre, slope, residual,
        stride_pre, stride_slope, stride_residual, alpha,
        i, j, n, m, ACTIVATION, ACCUMULATE, False,
    )  # fmt: skip


# --- matrices in memory ---------------------------------------------------------------------------


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


def _rows_merged(*matrices):
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


def _broadcast(x, batch):
    """The batch, repeated to that shape: strides of 0."""
    missing = len(batch) + 2 - len(x.shape)
    lengths, steps = (1,) * missing + x.shape[:-2], (0,) * missing + x.strides[:-2]
    steps = tuple(0 if length == 1 else step for length, step in zip(lengths, steps))
    return Matrix(x.array, (*batch, *x.shape[-2:]), (*steps, *x.strides[-2:]))


def _batch(a, b):
    """The shape that the batch axes of both broadcast to."""
    try:
        return np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"batch axes {a.shape[:-2]} and {b.shape[:-2]} do not broadcast together"
        ) from None


def _two_batch_axes(*matrices):
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


# --- tile sizes -----------------------------------------------------------------------------------

# (BM, BN, BK, num_warps, num_stages, speed). BK is for elements of 2 bytes; speed, as a share of
# the largest tile's, only ranks them.
_HOPPER = (
    (128, 256, 64, 8, 3, 1.0),
    (128, 128, 64, 8, 4, 0.85),
    (64, 128, 64, 4, 4, 0.6),
    (64, 64, 64, 4, 4, 0.4),
    (16, 64, 128, 4, 3, 0.15),
)
_BLACKWELL = (
    (128, 256, 64, 8, 3, 1.0),
    (128, 128, 64, 8, 4, 0.85),
    (64, 128, 64, 8, 4, 0.6),
    (64, 64, 64, 8, 4, 0.4),
    (16, 64, 128, 4, 3, 0.15),
)
_AMPERE = (
    (128, 256, 32, 8, 3, 1.0),
    (128, 128, 32, 8, 4, 0.9),
    (64, 64, 64, 4, 3, 0.5),
    (16, 64, 128, 4, 3, 0.2),
)
_SMALL = (  # 99 KB of shared memory: 8.6, 8.9, 12.0
    (128, 128, 32, 8, 4, 1.0),
    (64, 64, 64, 4, 3, 0.6),
    (16, 64, 64, 4, 4, 0.2),
)
_TF32 = (  # the same bytes to a tile's operands, but twice as many to its result
    (128, 128, 64, 8, 3, 1.0),
    (64, 128, 64, 4, 3, 0.7),
    (64, 64, 64, 4, 3, 0.5),
    (16, 64, 64, 8, 3, 0.15),
)
_FLOAT32 = (  # multiplied and added one by one, no tensor cores
    (128, 128, 32, 8, 3, 1.0),
    (64, 64, 64, 4, 3, 0.8),
    (16, 64, 64, 4, 3, 0.3),
)
_UNALIGNED = (  # element by element: a pointer for each is in registers
    (64, 64, 32, 4, 3, 1.0),
    (16, 64, 64, 4, 3, 0.3),
)
_MOST_SPLITS = 32
_SECOND_LAUNCH = 1e7  # takes as long as so many multiplications on one multiprocessor,
_PARTIAL = 6  # and so many, an element of a partial product that is written and read again


@functools.cache
def _configurations(chip, processors, itemsize, precision, tma, aligned, count, n, k, m):
    """Configurations, the best first, for `count` products (n, k) (k, m); tma and aligned: how
    the matrices lie in memory.
    """
    newer = {90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}
    tma &= chip in newer
    tiles = newer[chip] if tma else _AMPERE if chip in (80, *newer) else _SMALL
    if itemsize == 4:
        tiles = _FLOAT32 if precision == "ieee" else _TF32 if tma else _SMALL
    if not aligned:
        tiles = _UNALIGNED
    tma &= tiles is not _FLOAT32
    found = []
    for BM, BN, BK, num_warps, num_stages, speed in tiles:
        BK = 2 * BK // itemsize
        pieces = count * cdiv(n, BM) * cdiv(m, BN), cdiv(k, BK)
        costs = {
            splits: _time(*pieces, BM * BN * BK / speed, splits, processors, n * m)
            for splits in range(1, min(_MOST_SPLITS, pieces[1]) + 1 if count == 1 else 2)
        }
        splits = min(costs, key=costs.get)
        wide = itemsize == 4 and BN >= 128 and (tma or precision != "tf32")
        halves = BN >= 256 or wide  # what the epilogue needs does not fit at once
        config = dict(BM=BM, BN=BN, BK=BK, GROUP=8, SPLITS=splits, HALVES=halves, TMA=tma)
        config.update(FLATTEN=tma, PROGRAMS=int(tma), num_warps=num_warps, num_stages=num_stages)
        found.append((costs[splits], config))
    return [config for _, config in sorted(found, key=lambda pair: pair[0])]


def _time(tiles, steps, step, splits, processors, size):
    """How long that many tiles take, each of so many steps that are shared by `splits` programs; in
    multiplications that one multiprocessor does one after the other.
    """
    waves = cdiv(tiles * splits, processors)
    again = _SECOND_LAUNCH + splits * size * _PARTIAL if splits > 1 else 0
    return waves * cdiv(steps, splits) * step + again


def _candidates(found):
    """What a search tries: every tile size, with fewer splits, one stage fewer, smaller groups."""
    for config in found:
        splits, stages = config["SPLITS"], config["num_stages"]
        for pieces in {splits, max(splits // 2, 1), 1}:
            for depth in {stages, max(stages - 1, 2)}:
                for group in (8, 4):
                    yield config | dict(SPLITS=pieces, num_stages=depth, GROUP=group)


def _rounded(size):
    """To three binary digits: sizes so close together share their configuration."""
    unit = 1 << max(size.bit_length() - 3, 0)
    return cdiv(size, unit) * unit


# --- the product ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finish:
    """What becomes of U = A B: y = activation(α u + bias) + residual (+ y), see _finish. Arrays:
    bias (m,), the others (n, m) with contiguous rows.
    """

    bias: Array = None
    activation: str = None
    pre: Matrix = None  # gets α u + bias
    slope: Matrix = None  # in place of an activation: times its derivative there
    residual: Matrix = None
    alpha: float = None
    accumulate: bool = False

    def arguments(self, pre=None):
        """In the kernels' order; `pre` is a descriptor to be used in place of the pointer."""
        by_row = [self.pre, self.slope, self.residual]
        pointers = [x and x.array for x in by_row]
        pointers[0] = pre or pointers[0]
        return self.bias, *pointers, *(x and x.strides[-2] for x in by_row), self.alpha


def multiply(a, b, y, finish=Finish(), *, sums=None, more=None, precision="ieee"):
    """y = finish(a b), Matrices of the same batch axes; `finish` needs a batch of one.

    sums        (Array, accumulate): the row sums of a go there, or are added to what is there
    more        (c, d): a b + c d in place of a b
    precision   of float32: "ieee", or on tensor cores "tf32" (10 bits) or "tf32x3" (nearly all)
    """
    if b.array.dtype.itemsize == 2:
        precision = "ieee"  # has no meaning there: one compiled kernel for all
    if not any(b.strides[:-2]) and (merged := _rows_merged(a, y)):  # one b for all: one product
        (a, y), b = merged, Matrix(b.array, b.shape[-2:], b.strides[-2:])
    a, b, y = _two_batch_axes(a, b, y)
    (*batch, n, k), m, itemsize = a.shape, b.shape[-1], a.array.dtype.itemsize
    matrices = a, b, y, finish.pre, finish.slope, finish.residual, *(more or ())
    aligned = all(x is None or x.aligned for x in matrices)
    memory = a.fits_tma() and b.fits_tma(), aligned
    problem = itemsize, precision, *memory, math.prod(batch), n, k, m
    found = _configurations(driver.capability(), driver.multiprocessors(), *problem)
    if finish.slope or math.prod(batch) > 1:  # no registers for the largest tile without TMA
        found = [config for config in found if config["TMA"] or config["BN"] < 256]
    layout = "NT"[a.transposed] + "NT"[b.transposed]
    epilogue = finish.activation, finish.accumulate, bool(sums), bool(more)
    key = (a.array.dtype, precision, layout, aligned, *map(_rounded, problem[4:]), *epilogue)

    def run(config):  # of a search: y is not to be added to more than once
        spare = sums and (_like(sums[0]), sums[1])
        _run(a, b, _like(y), finish, spare, more, precision, config)

    config = tuning.configuration("product", key, found[0], lambda: list(_candidates(found)), run)
    _run(a, b, y, finish, sums, more, precision, config)


def _like(x):
    """New memory in place of an Array's or a Matrix's."""
    if isinstance(x, Array):
        return x.empty(x.shape)
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.strides))
    return replace(x, array=x.array.empty((size,)))


def _run(a, b, y, finish, sums, more, precision, config):
    """In one piece, or in parts that are then added up."""
    splits, (n, m) = config["SPLITS"], y.shape[-2:]
    if splits == 1 or math.prod(y.shape[:-2]) > 1 or more:
        return _launch(a, b, y, finish, sums, more, precision, config | dict(SPLITS=1))
    partials = y.array.empty((splits, n, m), "float32")
    partial_sums = sums and y.array.empty((splits, 1, n), "float32")
    parts = Matrix(partials, (1, splits, n, m), (0, n * m, m, 1))
    no_sums = partial_sums and (partial_sums, False)
    _launch(a, b, parts, Finish(), no_sums, None, precision, config)
    _add_up(partials, splits, y, finish)
    if sums:
        target = Matrix(sums[0], (1, n), (n, 1))
        _add_up(partial_sums, splits, target, Finish(accumulate=sums[1]))


def _add_up(partials, count, y, finish):
    """y = finish(the sum of so many matrices), which lie one after the other in float32."""
    (n, m), BM, BN = y.shape[-2:], 8, 128
    launch(
        _reduce, (cdiv(n, BM), cdiv(m, BN)),
        partials, y.array, n * m, y.strides[-2], n, m, count, *finish.arguments(),
        ACTIVATION=finish.activation, ACCUMULATE=finish.accumulate, BM=BM, BN=BN, num_warps=4,
    )  # fmt: skip


def _launch(a, b, y, finish, sums, more, precision, config):
    """One launch of _product."""
    config = config.copy()
    use_tma, programs = config.pop("TMA"), config.pop("PROGRAMS")
    BM, BN, BK = config["BM"], config["BN"], config["BK"]
    (n, k), m, Z = a.shape[-2:], b.shape[-1], math.prod(y.shape[:-2])
    tma = use_tma and a.fits_tma() and b.fits_tma()
    tma_y = use_tma and y.fits_tma() and (finish.pre is None or finish.pre.fits_tma())
    tma_y &= not finish.accumulate  # what is read of y would be buffered for every stage
    width = BN // 2 if config["HALVES"] else BN
    c, d = more or (None, None)
    tma_cd = bool(more) and use_tma and c.fits_tma() and d.fits_tma()
    wide = y.array.dtype.itemsize > a.array.dtype.itemsize
    if sums or more or finish.accumulate or wide or finish.activation == "silu":
        # Flattening joins one loop with the loop around it, not two; and it takes the registers
        # and the shared memory that reading y, a y of more bytes, or a division needs.
        config["FLATTEN"] = False

    def given(x, tma, *block):
        return x and (x.descriptor(*block) if tma else x.array)

    tiles = Z * cdiv(n, BM) * cdiv(m, BN)
    grid = min(tiles, programs * driver.multiprocessors()) if programs else tiles
    launch(
        _product, (grid,), given(a, tma, BM, BK), given(b, tma, BK, BN), given(y, tma_y, BM, width),
        a.strides, b.strides, y.strides, n, m, k, Z, y.shape[1],
        *finish.arguments(finish.pre and given(finish.pre, tma_y, BM, width)), sums and sums[0],
        given(c, tma_cd, BM, BK), given(d, tma_cd, BK, BN), c and c.strides, d and d.strides,
        c and c.shape[1],
        **config, PERSISTENT=bool(programs), TMA=tma, TMA_Y=tma_y, TMA_CD=tma_cd,
        A_T=a.transposed, B_T=b.transposed, C_T=bool(c and c.transposed),
        D_T=bool(d and d.transposed), PRECISION=precision, ACTIVATION=finish.activation,
        ACCUMULATE=finish.accumulate, ACCUMULATE_SUMS=bool(sums and sums[1]),
    )  # fmt: skip


# --- the ops --------------------------------------------------------------------------------------


class matmul:
    """y = a b, of the last two axes: (..., n, k) (..., k, m) -> (..., n, m); the others broadcast.

    One of the last two axes of a and of b has to be contiguous; which one does not matter.

    precision    of float32: "ieee", "tf32" or "tf32x3"
    out          an array for y; its last axis is contiguous
    accumulate   y is added to what is in `out`
    """

    @staticmethod
    def forward(a, b, *, precision="ieee", out=None, accumulate=False):
        a, b = _operands(a, b, precision)
        batch = _batch(a, b)
        shape = (*batch, a.shape[-2], b.shape[-1])
        if out is None and accumulate:
            raise ValueError("accumulate adds to `out`, which is not given")
        y = a.array.empty(shape) if out is None else array(out, "out")
        shaped(y, "out", shape)
        to = matrix(y, "out")
        if to.transposed:
            raise ValueError("the last axis of out is not contiguous: make out contiguous first")
        a, b = _broadcast(a, batch), _broadcast(b, batch)
        multiply(a, b, to, Finish(accumulate=accumulate), precision=precision)
        return y.data, ()

    @staticmethod
    def vjp(g, y, a, b, *, saved, needs, precision="ieee", out=None, accumulate=False, into=None):
        """Gradients of a and b, added to those of the tuple `into` that are arrays."""
        a, b = _operands(a, b, precision)
        g = array(g, "g")
        same("dtype", a=a.array, g=g)
        shaped(g, "g", (*_batch(a, b), a.shape[-2], b.shape[-1]))
        g = matrix(g, "g")
        into = targets(into, needs, a=a.array, b=b.array)
        a_bar = b_bar = None
        if needs[0]:  # ā = g bᵀ
            a_bar = _summed(g, b.T, a.array, into[0], precision)
        if needs[1]:  # b̄ = aᵀ g
            b_bar = _summed(a.T, g, b.array, into[1], precision)
        return a_bar, b_bar


def _operands(a, b, precision):
    one_of(precision, "precision", PRECISIONS)
    a, b = array(a, "a"), array(b, "b")
    same("dtype", a=a, b=b)
    a, b = matrix(a, "a"), matrix(b, "b")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"a has {a.shape[-1]} columns and b {b.shape[-2]} rows; expected the same number"
        )
    return a, b


def _summed(p, q, x, into, precision):
    """The gradient of x: p q, added up over the axes along which x was repeated."""
    found, accumulate = (x.empty(x.shape), False) if into is None else (into, True)
    batch = _batch(p, q)
    finish = Finish(accumulate=accumulate)
    p, q = _broadcast(p, batch), _broadcast(q, batch)
    own = (1,) * (len(batch) + 2 - x.ndim) + x.shape[:-2]
    repeated = [i for i, length in enumerate(batch) if own[i] < length]
    if not repeated:
        to = _broadcast(matrix(found, "into"), batch)
        multiply(p, q, to, finish, precision=precision)
    elif math.prod(own) == 1 and (tall := _rows_merged(p.T, q)):  # pᵀ and q one below the other
        to = row_matrix(found, "into")
        multiply(tall[0].T, tall[1], to, finish, precision=precision)
    else:  # each product by itself, then their sum
        order = [*repeated, *(i for i in range(len(batch) + 2) if i not in repeated)]
        shape = (*batch, *x.shape[-2:])
        partials = found.empty([shape[i] for i in order], "float32")
        parts = matrix(partials, "partials").axes(*(order.index(i) for i in range(len(shape))))
        multiply(p, q, parts, precision=precision)
        count = math.prod(batch[i] for i in repeated)
        _add_up(partials, count, row_matrix(found, "into"), finish)
    return found.data


class linear:
    """y = activation(x wᵀ + b) + residual,  w: (out, in), as PyTorch stores it: in one kernel.

    x (..., k), w (m, k), b (m,), residual (..., m) -> (..., m); the rows of x and of residual are
    evenly spaced. Saved: with an activation, its argument u.

    activation   None, "gelu", "gelu_tanh" or "silu"
    precision    of float32: "ieee", "tf32" or "tf32x3"
    """

    @staticmethod
    def forward(x, w, b=None, residual=None, *, activation=None, precision="ieee"):
        x, w, b = _linear_arguments(x, w, b, activation, precision)
        residual = _residual(residual, x, w)
        y = x.empty((*x.shape[:-1], w.shape[0]))
        pre = y.empty(y.shape) if activation else None
        finish = Finish(b, activation, pre and row_matrix(pre, "pre"), residual=residual)
        apply_weight(x, w, y, finish, precision=precision)
        return y.data, (pre.data,) if activation else ()

    @staticmethod
    def vjp(
        g, y, x, w, b=None, residual=None, *, saved, needs, activation=None, precision="ieee",
        into=None,
    ):  # fmt: skip
        """The gradients of as many of x, w, b, residual as `needs` has entries. That of residual is
        g itself; the others are added to the arrays of the tuple `into`, which has as many entries.
        """
        x, w, b = _linear_arguments(x, w, b, activation, precision)
        u_bar = output_gradient(g, x, w)
        x_into, w_into, b_into, _ = targets(into, needs, x=x, w=w, b=b, residual=None)
        if activation and any(needs[:3]):
            u_bar = _activation_gradient(u_bar, array(saved[0], "saved"), activation)
        x_bar = input_gradient(u_bar, w, x, precision, x_into) if needs[0] else None
        w_bar, b_bar = weight_gradients(
            u_bar, x, w, b, precision, needs[1], any(needs[2:3]) and b is not None, w_into, b_into
        )
        return (x_bar, w_bar, b_bar, g if any(needs[3:]) else None)[: len(needs)]


class mlp:
    """y = activation(x upᵀ + b) downᵀ + c (+ residual), in two kernels; for gradients in four.

    x (..., k), up (h, k), b (h,), down (m, h), c (m,), residual (..., m) -> (..., m)
    Saved: u = x upᵀ + b and activation(u). Backward, activation'(u) is applied where ū is made.

    activation   "gelu_tanh", "gelu" or "silu"
    precision    of float32: "ieee", "tf32" or "tf32x3"
    """

    @staticmethod
    def forward(
        x, up, b, down, c, residual=None, *, activation="gelu_tanh", precision="ieee"
    ):  # fmt: skip
        x, up, b, down, c = _mlp_arguments(x, up, b, down, c, activation, precision)
        residual = _residual(residual, x, down)
        u, h = (x.empty((*x.shape[:-1], up.shape[0])) for _ in range(2))
        y = x.empty((*x.shape[:-1], down.shape[0]))
        apply_weight(x, up, h, Finish(b, activation, row_matrix(u, "u")), precision=precision)
        apply_weight(h, down, y, Finish(c, residual=residual), precision=precision)
        return y.data, (u.data, h.data)

    @staticmethod
    def vjp(
        g, y, x, up, b, down, c, residual=None, *, saved, needs, activation="gelu_tanh",
        precision="ieee", into=None,
    ):  # fmt: skip
        """The gradients of as many arguments as `needs` has entries, as linear.vjp gives them."""
        x, up, b, down, c = _mlp_arguments(x, up, b, down, c, activation, precision)
        u, h = array(saved[0], "u"), array(saved[1], "h")
        y_bar = output_gradient(g, x, down)
        x_into, up_into, b_into, down_into, c_into, _ = targets(
            into, needs, x=x, up=up, b=b, down=down, c=c, residual=None
        )
        down_bar, c_bar = weight_gradients(
            y_bar, h, down, c, precision, needs[3], needs[4], down_into, c_into
        )
        x_bar = up_bar = b_bar = None
        if any(needs[:3]):  # ū = (ȳ down) ⊙ activation'(u)
            through = Finish(activation=activation, slope=row_matrix(u, "u"))
            u_bar = array(input_gradient(y_bar, down, u, precision, finish=through), "ū")
            x_bar = input_gradient(u_bar, up, x, precision, x_into) if needs[0] else None
            up_bar, b_bar = weight_gradients(
                u_bar, x, up, b, precision, needs[1], needs[2], up_into, b_into
            )
        given = g if any(needs[5:]) else None
        return (x_bar, up_bar, b_bar, down_bar, c_bar, given)[: len(needs)]


# --- the parts of a layer with a weight -----------------------------------------------------------


def apply_weight(x, w, y, finish, *, more=None, precision="ieee"):
    """y = finish(x wᵀ), rows of Arrays."""
    a, b, to = row_matrix(x, "x"), matrix(w, "w").T, row_matrix(y, "y")
    multiply(a, b, to, finish, more=more, precision=precision)


def input_gradient(u_bar, w, x, precision, into=None, finish=Finish(), more=None):
    """x̄ = finish(ū w), in the shape of x."""
    x_bar = x.empty(x.shape) if into is None else into
    finish = replace(finish, accumulate=into is not None)
    to = row_matrix(x_bar, "x̄")
    multiply(row_matrix(u_bar, "ū"), matrix(w, "w"), to, finish, more=more, precision=precision)
    return x_bar.data


def weight_gradients(
    u_bar, x, w, b, precision, needs_w, needs_b=False, w_into=None, b_into=None
):  # fmt: skip
    """w̄ = ūᵀ x and b̄ = ūᵀ 1, of which one reading of ū gives both."""
    if not (needs_w or needs_b):
        return None, None
    a, x = row_matrix(u_bar, "ū").T, row_matrix(x, "x")
    sums = b_bar = None
    if needs_b:
        b_bar = b.empty(b.shape) if b_into is None else b_into
        sums = (b_bar, b_into is not None)
    if needs_w:
        w_bar = w.empty(w.shape) if w_into is None else w_into
        to = row_matrix(w_bar, "w̄")
    else:  # only the sums are wanted: with one column of x, and what comes out is thrown away
        w_bar, x = None, replace(x, shape=(x.shape[0], 1))
        to = row_matrix(w.empty((w.shape[0], 1)), "w̄")
    accumulate = needs_w and w_into is not None
    multiply(a, x, to, Finish(accumulate=accumulate), sums=sums, precision=precision)
    return w_bar and w_bar.data, b_bar and b_bar.data


def _activation_gradient(g, u, activation):
    """ū = g ⊙ activation'(u)."""
    u_bar, B = g.empty(g.shape), 1024
    (n, stride_g), (_, stride_u), m = rows(g, "g"), rows(u, "u"), g.shape[-1]
    launch(
        _activation_vjp, (n, cdiv(m, B)), g, u, u_bar, stride_g, stride_u, n, m,
        ACTIVATION=activation, B=B, num_warps=4,
    )  # fmt: skip
    return u_bar


# --- what arguments have to be --------------------------------------------------------------------


def one_of(value, name, choices):
    """ValueError unless the attribute is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def weight(w, name, b, b_name, x, k):
    """(w, b) as Arrays, for rows of x with k elements: w (m, k), b (m,) or None."""
    w = array(w, name, ndim=2)
    shaped(w, name, (w.shape[0], k))
    same("dtype", x=x, **{name: w})
    not_empty(x=x, **{name: w})
    matrix(w, name)
    if b is None:
        return w, None
    b = array(b, b_name, ndim=1)
    shaped(b, b_name, w.shape[:1])
    inner_contiguous(**{b_name: b})
    same("dtype", x=x, **{b_name: b})
    return w, b


def _linear_arguments(x, w, b, activation, precision):
    one_of(activation, "activation", ACTIVATIONS)
    one_of(precision, "precision", PRECISIONS)
    x = evenly(x, "x")
    return x, *weight(w, "w", b, "b", x, x.shape[-1])


def _mlp_arguments(x, up, b, down, c, activation, precision):
    one_of(activation, "activation", ACTIVATIONS[1:])
    one_of(precision, "precision", PRECISIONS)
    x = evenly(x, "x")
    up, b = weight(up, "up", b, "b", x, x.shape[-1])
    return x, up, b, *weight(down, "down", c, "c", x, up.shape[0])


def evenly(x, name):
    """x as an Array, its rows evenly spaced."""
    x = array(x, name)
    if x.ndim == 0:
        raise ValueError(f"{name} has no axes; expected at least 1")
    row_matrix(x, name)
    return x


def _residual(residual, x, w):
    """As a Matrix, or None."""
    if residual is None:
        return None
    residual = array(residual, "residual")
    shaped(residual, "residual", (*x.shape[:-1], w.shape[0]))
    same("dtype", x=x, residual=residual)
    return row_matrix(residual, "residual")


def output_gradient(g, x, w):
    """g as an Array, of the shape of x wᵀ."""
    g = array(g, "g")
    same("dtype", x=x, g=g)
    shaped(g, "g", (*x.shape[:-1], w.shape[0]))
    rows(g, "g")
    return g


def targets(into, needs, **arguments):
    """The arrays that gradients are added to: an Array or None for each of the arguments.

    into     None, or a tuple of arrays and None, with one entry for each of `needs`. An array has
             its argument's shape, evenly spaced rows, and any of the dtypes: float32 for gradients
             that add up over many steps.
    """
    found = [None] * len(arguments)
    if into is None:
        return found
    if len(into) != len(needs):
        raise ValueError(f"into has {len(into)} entries; expected {len(needs)}, as needs has")
    for i, (target, (name, x)) in enumerate(zip(into, arguments.items())):
        if target is None:
            continue
        if x is None:
            raise ValueError(f"into has an array for {name}, whose gradient is not made here")
        found[i] = array(target, f"into's {name}")
        shaped(found[i], f"into's {name}", x.shape)
        rows(found[i], f"into's {name}")
    return found
