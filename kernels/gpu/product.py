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

Activations are those of elementwise.py. Tile sizes that fill the tensor cores: see _configurations.
What limits each shape is its K, as a tile's start and end cost the same however long the loop
between them is.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import triton
import triton.language as tl

from . import driver, tuning
from .arrays import Array, cdiv
from .driver import launch
from .elementwise import ACTIVATIONS
from .matrices import Matrix, rows_merged, two_batch_axes

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


class Ending(NamedTuple):
    """What `_finish` reads: pointers or None, and how far apart the rows are."""

    bias: object = None
    slope: object = None
    residual: object = None
    stride_pre: int = None
    stride_slope: int = None
    stride_residual: int = None
    alpha: float = None


@triton.jit
def _finish(
    u, y, at_y, pre, end, i, j, n, m,
    FUNCTION: tl.constexpr, ACCUMULATE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """From u = A B, a tile in float32, to y = f(α u + bias) + residual (+ y); `pre` gets the
    argument of f, an activation. Or, for a gradient, f is its vjp: y = f(α u, slope).
    """
    H: tl.constexpr = u.shape[0]
    W: tl.constexpr = u.shape[1]
    if end.alpha is not None:
        u *= end.alpha
    if end.bias is not None:
        js = j + tl.arange(0, W)
        u += tl.load(end.bias + js, mask=js < m, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        _store(pre, (0, end.stride_pre, 1), i, j, n, m, u, TMA)
    if end.slope is not None:
        x = _load(end.slope, (0, end.stride_slope, 1), i, j, n, m, H, W, False, False)
        u = FUNCTION(u, x.to(tl.float32))
    elif FUNCTION is not None:
        u = FUNCTION(u)
    if end.residual is not None:
        r = _load(end.residual, (0, end.stride_residual, 1), i, j, n, m, H, W, False, False)
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
    a, b, y, pre, sums, strides_a, strides_b, strides_y, n, m, k, Z, z1, end,
    c, d, strides_c, strides_d, r,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SPLITS: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr, PERSISTENT: tl.constexpr,
    TMA: tl.constexpr, TMA_Y: tl.constexpr, TMA_CD: tl.constexpr,
    A_T: tl.constexpr, B_T: tl.constexpr, C_T: tl.constexpr, D_T: tl.constexpr,
    PRECISION: tl.constexpr, FUNCTION: tl.constexpr,
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
                parts[part], y, at_y, pre, end, i, j + part * (BN // len(parts)), n, m,
                FUNCTION, ACCUMULATE, TMA_Y,
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
    partials, y, pre, stride_z, stride_y, n, m, Z, end,
    FUNCTION: tl.constexpr, ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y = finish(Σ_z partials_z), z from first to last: the same bits each time."""
    tiles_j = tl.cdiv(m, BN)
    i, j = tl.program_id(0) // tiles_j * BM, tl.program_id(0) % tiles_j * BN
    u = tl.zeros((BM, BN), tl.float32)
    start = tl.zeros((), tl.int64)
    for _ in range(Z):
        u += _load(partials, (start, m, 1), i, j, n, m, BM, BN, False, False)
        start += stride_z
    _finish(u, y, (0, stride_y, 1), pre, end, i, j, n, m, FUNCTION, ACCUMULATE, False)


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
_BY_ELEMENT = (  # of unaligned factors: a pointer for each element is in registers
    (64, 64, 32, 8, 3, 1.0),
    (16, 64, 64, 4, 3, 0.3),
)
_MOST_SPLITS = 32
_TRIED = 3  # tile sizes of a search
_SECOND_LAUNCH = 1e7  # takes as long as so many multiplications on one multiprocessor,
_PARTIAL = 6  # and so many, an element of a partial product that is written and read again


@functools.cache
def _configurations(chip, processors, itemsize, precision, factors, aligned, count, n, k, m):
    """Configurations, the best first, for `count` products (n, k) (k, m).

    factors   how they lie in memory: "tma", "aligned" or "odd"
    aligned   whether everything else is
    """
    newer, float32 = {90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}, itemsize == 4
    tma = factors == "tma" and chip in newer and not (float32 and precision == "ieee")
    tiles = newer[chip] if tma else _AMPERE if chip in (80, *newer) else _SMALL
    if float32:
        tiles = _FLOAT32 if precision == "ieee" else _TF32 if tma else _SMALL
    if factors == "odd":
        tiles = _BY_ELEMENT
    persistent, found = tma and aligned, []
    for BM, BN, BK, num_warps, num_stages, speed in tiles:
        BK = 2 * BK // itemsize
        pieces = count * cdiv(n, BM) * cdiv(m, BN), cdiv(k, BK)
        costs = {
            splits: _time(*pieces, BM * BN * BK / speed, splits, processors, n * m)
            for splits in range(1, min(_MOST_SPLITS, pieces[1]) + 1 if count == 1 else 2)
        }
        splits = min(costs, key=costs.get)
        wide = float32 and BN >= 128 and (tma or precision != "tf32")
        halves = BN >= 256 or wide or (BN >= 128 and not aligned)  # what ends a tile needs room
        config = dict(BM=BM, BN=BN, BK=BK, GROUP=8, SPLITS=splits, HALVES=halves, TMA=tma)
        config.update(FLATTEN=persistent, PROGRAMS=int(persistent))
        num_warps = num_warps if aligned or BN < 128 else 8
        # Of small tiles the assembler would spill a few registers, to fit another program.
        most = 255 if factors == "odd" or BM == 16 else None
        config.update(num_warps=num_warps, num_stages=num_stages, maxnreg=most)
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
    """What a search tries: the likeliest tile sizes, with fewer splits, one stage fewer, smaller
    groups.
    """
    for config in found[:_TRIED]:
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

    @property
    def end(self):
        slope, residual = (x and x.array for x in (self.slope, self.residual))
        strides = (x and x.strides[-2] for x in (self.pre, self.slope, self.residual))
        return Ending(self.bias, slope, residual, *strides, self.alpha)

    def largest(self, aligned, tma, several):
        """Elements of the largest tile that leaves registers for this, and for pointers: to each
        element of what is not aligned, and without TMA to a slope and to one of several matrices.
        """
        if not aligned and (self.pre or self.slope or self.residual):
            return 64 * 128
        if not aligned or self.activation == "gelu" or ((self.slope or several) and not tma):
            return 128 * 128
        return 128 * 256

    @property
    def flags(self):
        """Its compile-time constants."""
        f = ACTIVATIONS.get(self.activation)
        f = f and (f.gradient if self.slope else f.value)
        return dict(FUNCTION=f, ACCUMULATE=self.accumulate)


AS_IT_IS = Finish()


def multiply(a, b, y, finish=AS_IT_IS, *, sums=None, more=None, precision="ieee"):
    """y = finish(a b), Matrices of the same batch axes; `finish` needs a batch of one.

    sums        (Array, accumulate): the row sums of a go there, or are added to what is there
    more        (c, d): a b + c d in place of a b
    precision   of float32: "ieee", or on tensor cores "tf32" (10 bits) or "tf32x3" (nearly all)
    """
    if b.array.dtype.itemsize == 2:
        precision = "ieee"  # has no meaning there: one compiled kernel for all
    if not any(b.strides[:-2]) and (merged := rows_merged(a, y)):  # one b for all: one product
        (a, y), b = merged, Matrix(b.array, b.shape[-2:], b.strides[-2:])
    a, b, y = two_batch_axes(a, b, y)
    (*batch, n, k), m, itemsize = a.shape, b.shape[-1], a.array.dtype.itemsize
    factors = "tma" if a.fits_tma() and b.fits_tma() else "aligned"
    others = y, finish.pre, finish.slope, finish.residual, *(more or ())
    aligned = all(x is None or x.aligned for x in others)
    memory = factors if a.aligned and b.aligned else "odd", aligned
    problem = itemsize, precision, *memory, math.prod(batch), n, k, m
    found = _configurations(driver.capability(), driver.multiprocessors(), *problem)
    largest = finish.largest(aligned, found[0]["TMA"], several=math.prod(batch) > 1)
    found = [config for config in found if config["BM"] * config["BN"] <= largest]
    layout = "NT"[a.transposed] + "NT"[b.transposed]
    epilogue = finish.activation, finish.accumulate, bool(sums), bool(more)
    key = (a.array.dtype, precision, layout, *memory, *map(_rounded, problem[4:]), *epilogue)

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
    _launch(a, b, parts, AS_IT_IS, no_sums, None, precision, config)
    add_up(partials, splits, y, finish)
    if sums:
        target = Matrix(sums[0], (1, n), (n, 1))
        add_up(partial_sums, splits, target, Finish(accumulate=sums[1]))


def add_up(partials, count, y, finish):
    """y = finish(the sum of so many matrices), which lie one after the other in float32."""
    (n, m), BM, BN = y.shape[-2:], 8, 128
    launch(
        _reduce, (cdiv(n, BM) * cdiv(m, BN),), partials, y.array, finish.pre and finish.pre.array,
        n * m, y.strides[-2], n, m, count, finish.end, **finish.flags, BM=BM, BN=BN, num_warps=4,
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
        given(finish.pre, tma_y, BM, width), sums and sums[0], a.strides, b.strides, y.strides,
        n, m, k, Z, y.shape[1], finish.end, given(c, tma_cd, BM, BK), given(d, tma_cd, BK, BN),
        c and c.strides, d and d.strides, c and c.shape[1],
        **config, PERSISTENT=bool(programs), TMA=tma, TMA_Y=tma_y, TMA_CD=tma_cd,
        A_T=a.transposed, B_T=b.transposed, C_T=bool(c and c.transposed),
        D_T=bool(d and d.transposed), PRECISION=precision, **finish.flags,
        ACCUMULATE_SUMS=bool(sums and sums[1]),
    )  # fmt: skip
