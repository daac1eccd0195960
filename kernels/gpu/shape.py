"""Rows of a table: looking them up, and adding up what belongs to each.

The adjoint adds up rows that have the same id. Atomic additions would do it in whatever order the
programs happen to run, with other bits each time. Here the ids are sorted first, with their
positions, so that the rows of one id are a run of positions:

    keys      id · 2³² + position: all different, so any sort gives one and the same order
    sort      pieces of 512 by counting smaller keys, then merged two by two, each key finding its
              place by binary search in the other piece: log2(n / 512) short launches
    starts    where each id's run begins, by binary search; an id that does not occur has length 0
    sums      of whole CHUNKs of positions with one id, then per id of these and of what is left at
              both ends: an id that has most of the positions does not keep one program busy alone
"""

import triton
import triton.language as tl

from . import tuning
from .arguments import inner_contiguous, integer, needed, not_empty, rows, shaped
from .arrays import IDS, array, cdiv, next_power_of_2
from .driver import launch

KERNELS = ("embedding", "scatter_add")

_CHUNK = 32  # positions that are added up ahead, where they all have one id
_PIECE = 512  # keys that one program sorts

# --- rows -----------------------------------------------------------------------------------------


@triton.jit
def _embedding(
    w, t, y, stride_w, stride_t, n, per_row, v, c, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y_i = w[t_i], ROWS rows and BLOCK columns for each program; NaN where t_i is no row of w."""
    tiles = tl.cdiv(c, BLOCK)
    i = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    t_i = tl.load(t + i // per_row * stride_t + i % per_row, mask=i < n, other=0).to(tl.int64)
    inside = ((i < n) & (t_i >= 0) & (t_i < v))[:, None]
    y_ij = tl.load(w + (t_i * stride_w)[:, None] + j, mask=inside & (j < c), other=float("nan"))
    tl.store(y + (i * c)[:, None] + j, y_ij, mask=(i < n)[:, None] & (j < c))


# --- sorting --------------------------------------------------------------------------------------


@triton.jit
def _sort_pieces(t, keys, stride_t, n, per_row, v, PIECE: tl.constexpr, STEP: tl.constexpr):
    """The keys of PIECE positions in order; ids that are no row count as v and come last."""
    first = tl.program_id(0) * PIECE
    i = first + tl.arange(0, PIECE)
    key_i = _key(t, i, stride_t, n, per_row, v)
    rank = tl.zeros((PIECE,), tl.int32)
    for step in range(0, PIECE, STEP):
        key_j = _key(t, first + step + tl.arange(0, STEP), stride_t, n, per_row, v)
        rank += tl.sum((key_j[None, :] < key_i[:, None]).to(tl.int32), axis=1)
    tl.store(keys + first + rank, key_i, mask=i < n)


@triton.jit
def _key(t, i, stride_t, n, per_row, v):
    """id · 2³² + i; positions from n on come after all others."""
    at = i.to(tl.int64) // per_row * stride_t + i % per_row
    t_i = tl.load(t + at, mask=i < n, other=0).to(tl.int64)
    t_i = tl.where((t_i >= 0) & (t_i < v) & (i < n), t_i, v)
    return t_i * 4294967296 + i


@triton.jit(do_not_specialize=["steps"])
def _merge(keys, merged, n, length, steps, BLOCK: tl.constexpr):
    """Each pair of sorted pieces of that length becomes one: a key goes to where it is in its own
    piece plus how many of the other piece are smaller.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + i, mask=i < n, other=0)
    piece = i // length
    other = tl.minimum((piece ^ 1) * length, n)  # where the other piece begins, or the end
    smaller = _search(keys, key, other, tl.minimum(other + length, n), steps) - other
    place = (piece & ~1) * length + i % length + smaller
    tl.store(merged + place, key, mask=i < n)


@triton.jit
def _search(keys, key, low, high, steps):
    """The first position in low..high whose key is not below `key`; high if there is none."""
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(keys + middle, mask=low < high, other=0) < key
        low, high = tl.where(below & (low < high), middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["steps"])
def _starts(keys, starts, n, v, steps, BLOCK: tl.constexpr):
    """starts[id] for id = 0..v: where its run begins in the sorted keys."""
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)
    start = _search(keys, ids.to(tl.int64) * 4294967296, low, low + n, steps)
    tl.store(starts + ids, start, mask=ids <= v)


# --- adding up ------------------------------------------------------------------------------------


@triton.jit
def _add(total, x, keys, stride, begin, end, j, c, ROWS: tl.constexpr):
    """total + the rows of x at the sorted positions begin..end, ROWS at a time."""
    for first in range(begin, end, ROWS):
        k = first + tl.arange(0, ROWS)
        i = tl.load(keys + k, mask=k < end, other=0) & 4294967295
        inside = (k < end)[:, None] & (j < c)[None, :]
        x_i = tl.load(x + (i * stride)[:, None] + j[None, :], mask=inside, other=0.0)
        total += tl.sum(x_i.to(tl.float32), axis=0)
    return total


@triton.jit
def _chunk_sums(
    x, keys, sums, stride, n, c, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of each whole chunk of positions with a single id, in float32; others are left."""
    chunk = tl.program_id(0)
    begin, end = chunk * CHUNK, chunk * CHUNK + CHUNK
    if (tl.load(keys + begin) >> 32) == (tl.load(keys + end - 1) >> 32):
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        total = _add(total, x, keys, stride, begin, end, j, c, ROWS)
        tl.store(sums + chunk.to(tl.int64) * c + j, total, mask=j < c)


@triton.jit
def _scatter_add(
    x, keys, starts, sums, y, stride, c,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_v = Σ_i [t_i = v] x_i, a row and BLOCK columns for each program."""
    v, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(starts + v), tl.load(starts + v + 1)
    first, last = tl.cdiv(begin, CHUNK), end // CHUNK  # whole chunks
    total = tl.zeros((BLOCK,), tl.float32)
    total = _add(total, x, keys, stride, begin, tl.minimum(first * CHUNK, end), j, c, ROWS)
    sums_j = sums + first.to(tl.int64) * c + j
    for _ in range(first, last):
        total += tl.load(sums_j, mask=j < c, other=0.0)
        sums_j += c
    begin = tl.maximum(begin, tl.maximum(first, last) * CHUNK)
    total = _add(total, x, keys, stride, begin, end, j, c, ROWS)
    tl.store(y + v * c + j, total.to(y.dtype.element_ty), mask=j < c)


# --- the ops --------------------------------------------------------------------------------------


class embedding:
    """y_i = w[t_i]: row t_i of the table

    w (v, c) float32, float16 or bfloat16, its rows evenly spaced; t int32 or int64 of any shape,
    its rows too. An id that is no row of w cannot be reported without waiting for the device: its
    y_i is NaN, and it adds nothing to w̄. Negative ids do not count from the end.

    w̄ = scatter_add(g, t)
    """

    @staticmethod
    def forward(w, t):
        w, t = array(w, "w", ndim=2), array(t, "t", IDS)
        not_empty(w=w, t=t)
        (v, c), stride, ids = w.shape, rows(w, "w")[1], _ids(t)
        y, n = w.empty((*t.shape, c)), t.size

        def run(conf):
            grid = (cdiv(n, conf["ROWS"]) * cdiv(c, conf["BLOCK"]),)
            launch(_embedding, grid, w, t, y, stride, ids[0], n, ids[1], v, c, **conf)

        run(_tiles("embedding", w, 2048, run))
        return y.data, ()

    @staticmethod
    def vjp(g, y, w, t, *, saved, needs):
        w = array(w, "w", ndim=2)
        g = array(g, "g", (w.dtype,))
        if g.shape[-1:] != w.shape[1:]:
            raise ValueError(f"g has shape {g.shape}; expected (..., {w.shape[1]}), as w has")
        w_bar = _sums(g, "g", t, w.shape[0]).data if needed(needs, 2)[0] else None
        return (w_bar, None)[: len(needs)]


class scatter_add:
    """y_v = Σ_i [t_i = v] x_i, in float32 and always in the same order

    x (*t.shape, c) float32, float16 or bfloat16, its rows evenly spaced; t int32 or int64, its rows
    too, fewer than 2³⁰ of them. Ids outside 0..rows - 1 add nothing, as in the op.

    x̄ = embedding(g, t)
    """

    @staticmethod
    def forward(x, t, *, rows):
        return _sums(array(x, "x"), "x", t, rows).data, ()

    @staticmethod
    def vjp(g, y, x, t, *, rows, saved, needs):
        x, rows = array(x, "x"), integer(rows, "rows", 1, 2**31 - 1)
        g = array(g, "g", (x.dtype,), ndim=2)
        shaped(g, "g", (rows, x.shape[-1]))
        x_bar = embedding.forward(g, t)[0] if needed(needs, 2)[0] else None
        return (x_bar, None)[: len(needs)]


# --- what they share ------------------------------------------------------------------------------


def _sums(x, name, t, count):
    """scatter_add(x, t) with so many rows; `name` is what the caller calls x."""
    t = array(t, "t", IDS)
    not_empty(**{name: x, "t": t})
    if x.shape[:-1] != t.shape:
        raise ValueError(f"{name} has shape {x.shape}; expected {t.shape} and an axis, as t has")
    count = integer(count, "rows", 1, 2**31 - 1)
    if t.size >= 2**30:
        raise ValueError(f"t has {t.size} ids; expected fewer than 2³⁰")
    stride, n, c = rows(x, name)[1], t.size, x.shape[-1]
    keys = _sorted_keys(t, count)
    starts = t.empty((count + 1,), "int32")
    sums, y = x.empty((max(n // _CHUNK, 1), c), "float32"), x.empty((count, c))
    grid, steps = (cdiv(count + 1, 256),), n.bit_length()
    launch(_starts, grid, keys, starts, n, count, steps, BLOCK=256, num_warps=4)

    def run(conf):
        conf, tiles = {"CHUNK": _CHUNK, **conf}, cdiv(c, conf["BLOCK"])
        if n >= _CHUNK:
            launch(_chunk_sums, (n // _CHUNK, tiles), x, keys, sums, stride, n, c, **conf)
        launch(_scatter_add, (count, tiles), x, keys, starts, sums, y, stride, c, **conf)

    run(_tiles("scatter_add", x, 4096, run))
    return y


def _ids(t):
    """(from one row of t to the next, ids in a row)."""
    if t.ndim == 0:
        return 1, 1
    inner_contiguous(t=t)
    return rows(t, "t")[1], t.shape[-1]


def _sorted_keys(t, v):
    """The keys of all positions, in order."""
    n, (stride, per_row) = t.size, _ids(t)
    c = tuning.configuration("sort", (), {"PIECE": _PIECE, "STEP": 32, "num_warps": 8})
    keys, merged, length = t.empty((n,), "int64"), t.empty((n,), "int64"), c["PIECE"]
    launch(_sort_pieces, (cdiv(n, length),), t, keys, stride, n, per_row, v, **c)
    while length < n:
        grid, steps = (cdiv(n, 256),), length.bit_length()
        launch(_merge, grid, keys, merged, n, length, steps, BLOCK=256, num_warps=4)
        keys, merged, length = merged, keys, 2 * length
    return keys


def _tiles(kernel, x, elements, run):
    """About that many elements at a time, of as few rows as it takes."""
    c = x.shape[-1]
    block = min(1024, next_power_of_2(c))
    default = {"ROWS": max(1, min(elements // block, 32)), "BLOCK": block, "num_warps": 4}
    narrow = {"ROWS": default["ROWS"] * 2, "BLOCK": max(1, block // 2), "num_warps": 4}
    light = {**default, "num_warps": 2}
    key = x.dtype, next_power_of_2(c)
    return tuning.configuration(kernel, key, default, lambda: [default, narrow, light], run)
