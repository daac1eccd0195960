"""Cross-entropy of logits, and of logits that never exist as a whole.

A row of logits is too long for the registers (50257 float32 are 200 KB), so a program goes through
it tile by tile and keeps a running maximum and sum; where it then writes the gradient, it goes back
through the same tiles while they are still in the cache.

    once    logits are read once for the loss; in place, their gradient replaces them at once
    tiles   whole ones are read without a mask: a vocabulary that is no multiple of 16, such as
            50257, would otherwise be read element by element. Rows have to begin at multiples of
            16 bytes for that too: pad them to 50304 and pass logits[:, :50257]
    sync    never: how many rows count, and whether a target is in range, is decided on the device
"""

import numbers

import numpy as np
import triton
import triton.language as tl

from . import driver, tuning
from .arguments import (
    flag,
    inner_contiguous,
    integer,
    kept,
    needed,
    not_empty,
    rows,
    same,
    shaped,
    writable,
)
from .arrays import IDS, array, cdiv, next_power_of_2
from .driver import launch
from .linear import matmul

KERNELS = ("cross_entropy",)
FUSED = ("linear_cross_entropy",)

_CHUNK_BYTES = 1 << 30  # logits that exist at a time in linear_cross_entropy
_CHUNK_ROWS = 2048  # fewer rows would leave the matrix products short of work

# --- logits, a row or a few of them for each program ----------------------------------------------


@triton.jit
def _rows(t, i, n, v, ignore_index):
    """(t_i, K_i, inside_i): the targets, whether the row counts, whether the target is a column."""
    t_i = tl.load(t + i, mask=i < n, other=0)
    K_i = (i < n) & (t_i != ignore_index)
    inside_i = (t_i >= 0) & (t_i < v)
    return tl.where(inside_i, t_i, -1).to(tl.int32), K_i, inside_i


@triton.jit
def _with_tile(x, mask, m, s):
    """The running maximum m of each row and s with Σ s = Σ_j e^{x_j - m}, after one more tile."""
    x_j = tl.load(x, mask=mask, other=-float("inf")).to(tl.float32)
    M = tl.maximum(m, tl.max(x_j, axis=1))
    return M, s * tl.exp(m - M)[:, None] + tl.exp(x_j - M[:, None])


@triton.jit
def _write_gradient(x, x_bar, mask, j, t_i, K_i, L_i, scale):
    """x̄ = scale ⊙ where(K, P - H, 0) for a tile of columns j."""
    x_j = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    P = tl.exp(x_j - L_i[:, None])
    H = (j == t_i[:, None]).to(tl.float32)
    x_bar_j = tl.where(K_i[:, None], P - H, 0.0) * scale
    tl.store(x_bar, x_bar_j.to(x_bar.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy_forward(
    x, t, losses, L, N, stride, n, v, ignore_index,
    IN_PLACE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each row and its L_i; IN_PLACE x becomes x̄ = (P - H) / N instead of L (if N
    is None, UNIT (P - H)).
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t_i, K_i, inside_i = _rows(t, i, n, v, ignore_index)
    x_t = tl.load(x + i * stride + t_i, mask=K_i & inside_i, other=0.0).to(tl.float32)
    x_i, j = x + (i * stride)[:, None], tl.arange(0, BLOCK)[None, :]
    whole = v // BLOCK * BLOCK

    m = tl.full((ROWS,), -3.4028234663852886e38, tl.float32)  # not -inf: -inf - -inf is NaN
    s = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, whole, BLOCK):
        m, s = _with_tile(x_i + start + j, K_i[:, None], m, s)
    if whole < v:
        m, s = _with_tile(x_i + whole + j, K_i[:, None] & (whole + j < v), m, s)
    sum_i = tl.where(K_i, tl.sum(s, axis=1), 1.0)  # rows that do not count were not read
    L_i = tl.where(K_i & inside_i, m + tl.log(sum_i), float("nan"))
    tl.store(losses + i, tl.where(K_i, L_i - x_t, 0.0), mask=i < n)

    if IN_PLACE:  # from the last tile to the first: what was read last is still nearby
        scale = UNIT if N is None else 1.0 / tl.load(N)
        there = (i < n)[:, None]
        if whole < v:
            x_j, mask = x_i + whole + j, there & (whole + j < v)
            _write_gradient(x_j, x_j, mask, whole + j, t_i, K_i, L_i, scale)
        for done in range(0, whole, BLOCK):
            start = whole - BLOCK - done
            x_j = x_i + start + j
            _write_gradient(x_j, x_j, there, start + j, t_i, K_i, L_i, scale)
    else:
        tl.store(L + i, L_i, mask=i < n)


@triton.jit
def _cross_entropy_vjp(
    g, x, t, L, N, x_bar, stride, stride_x_bar, n, v, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x̄ = (g / N) ⊙ where(K, P - H, 0), a tile of ROWS rows and BLOCK columns for each program."""
    tiles = tl.cdiv(v, BLOCK)
    i = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(0) % tiles * BLOCK
    j = start + tl.arange(0, BLOCK)[None, :]
    t_i, K_i, _ = _rows(t, i, n, v, ignore_index)
    L_i = tl.load(L + i, mask=i < n, other=0.0)
    scale, there = tl.load(g) / tl.load(N), (i < n)[:, None]
    x_j, x_bar_j = x + (i * stride)[:, None] + j, x_bar + (i * stride_x_bar)[:, None] + j
    if start + BLOCK <= v:
        _write_gradient(x_j, x_bar_j, there, j, t_i, K_i, L_i, scale)
    else:
        _write_gradient(x_j, x_bar_j, there & (j < v), j, t_i, K_i, L_i, scale)


# --- numbers on the device ------------------------------------------------------------------------


@triton.jit
def _count(t, N, n, ignore_index, BLOCK: tl.constexpr):
    """N: how many rows count. One program: a few hundred KB at most, and the same sum each time."""
    K = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t_i = tl.load(t + i, mask=i < n, other=0)
        K += ((i < n) & (t_i != ignore_index)).to(tl.int32)
    tl.store(N, tl.sum(K).to(tl.float32))


@triton.jit
def _mean(losses, N, y, n, BLOCK: tl.constexpr):
    """y = Σ_i losses_i / N, which is NaN if no row counts: 0 / 0."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(losses + i, mask=i < n, other=0.0)
    tl.store(y, tl.sum(total) / tl.load(N))


@triton.jit
def _multiply_in_place(x, g, stride, n, v, BLOCK: tl.constexpr):
    """x ← g x, by a grid of programs that are gone at once if g is 1."""
    factor, tiles = tl.load(g), tl.cdiv(v, BLOCK)
    if factor != 1.0:
        for tile in range(tl.program_id(0), n * tiles, tl.num_programs(0)):
            j = tile % tiles * BLOCK + tl.arange(0, BLOCK)
            x_j = x + (tile // tiles).to(tl.int64) * stride + j
            scaled = tl.load(x_j, mask=j < v, other=0.0).to(tl.float32) * factor
            tl.store(x_j, scaled.to(x.dtype.element_ty), mask=j < v)


@triton.jit
def _multiplied(x, y, g, N, size, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = g / (N UNIT) x, in y's dtype."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x_i = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32)
    y_i = x_i * (tl.load(g) / (tl.load(N) * UNIT))
    tl.store(y + i, y_i.to(y.dtype.element_ty), mask=i < size)


# --- the losses -----------------------------------------------------------------------------------


class cross_entropy:
    """y = -1/N Σ_i log softmax(x_i)[t_i]  over the N rows with t_i ≠ ignore_index

    x (n, v) float32, float16 or bfloat16, its rows evenly spaced; t (n,) int32 or int64. The loss
    is float32 whatever x is: bfloat16 would leave three digits of it. If no row counts it is NaN,
    as the op's. A target that is neither a column nor ignore_index cannot be reported without
    waiting for the device: it makes the loss and its row of x̄ NaN.

    in_place    forward overwrites x with its gradient, for a g of 1; vjp returns that same array,
                multiplied if g is anything else. It saves the time and the memory of a second
                array of the logits' size. TypeError for float16, in which (P - H) / N underflows.
                vjp may then be called once
    saved       (L, N), float32; in place (N,)

    Where v is no multiple of 8, x̄ is the left part of a wider array, so that its rows begin at
    multiples of 16 bytes, as matrix products want it.
    """

    @staticmethod
    def forward(x, t, *, ignore_index=-100, in_place=False):
        x, t, _, ignore_index, in_place = _logits(x, t, ignore_index, in_place)
        (n, v), N = x.shape, _rows_that_count(t, ignore_index)
        losses = x.empty((n,), "float32")
        L = losses if in_place else x.empty((n,), "float32")

        def run(c, x=x):
            grid = (cdiv(n, c["ROWS"]),)
            launch(
                _cross_entropy_forward, grid, x, t, losses, L, N, rows(x, "x")[1], n, v,
                ignore_index, IN_PLACE=in_place, UNIT=1.0, **c,
            )  # fmt: skip

        run(_tiles("cross_entropy_forward", x, in_place, lambda c: run(c, x.empty(x.shape))))
        saved = (N.data,) if in_place else (L.data, N.data)
        return _mean_over(losses, N).data, saved

    @staticmethod
    def vjp(g, y, x, t, *, ignore_index=-100, in_place=False, saved, needs):
        x, t, stride, ignore_index, in_place = _logits(x, t, ignore_index, in_place)
        if in_place:
            (N,), L = kept(saved, N=((), "float32")), None
        else:
            L, N = kept(saved, L=(x.shape[:1], "float32"), N=((), "float32"))
        if not needed(needs, 2)[0]:
            return (None, None)[: len(needs)]
        if in_place:
            if not (isinstance(g, numbers.Real) and g == 1):
                _scale_rows(x, _factor(g, x), stride)
            return (x.data, None)[: len(needs)]
        g, (n, v) = _factor(g, x), x.shape
        x_bar = x.empty((n, _width(v)))

        def run(c):
            grid = (cdiv(n, c["ROWS"]) * cdiv(v, c["BLOCK"]),)
            strides = stride, x_bar.shape[1]
            launch(
                _cross_entropy_vjp, grid, g, x, t, L, N, x_bar, *strides, n, v, ignore_index, **c
            )

        run(_tiles("cross_entropy_vjp", x, False, run))
        x_bar = x_bar if x_bar.shape == x.shape else x_bar[:, :v]
        return (x_bar.data, None)[: len(needs)]


class linear_cross_entropy:
    """y = cross_entropy(h wᵀ, t), with never more than a chunk of rows of the logits in memory

    h (n, c) and w (v, c) of one dtype, t (n,) int32 or int64; what the loss is, and what becomes of
    targets out of range, as in cross_entropy. Of each chunk X = h wᵀ the gradient X̄ = P - H
    replaces X at once, and is used up by the time of the next one:

        h̄ = X̄ w        w̄ = Σ_chunks X̄ᵀ h, in float32

    so vjp has only to multiply by g / N. Wijmans et al., "Cut Your Losses", 2025, go further.
    Where X is float16, X̄ is 2¹⁵ (P - H), which cannot overflow and keeps what is above 2⁻³⁹ of
    P; its sums are float32, and vjp divides by 2¹⁵. So a large g, a loss scale, loses nothing more.

    chunk       rows of logits at a time; None for about 1 GiB of them, but never under 2048 rows:
                shorter matrix products leave most of the GPU idle
    gradients   False for the loss alone, in a third of the time; vjp is then a ValueError
    saved       (N h̄, N w̄ in float32, N); of float16 both are float32 and times 2¹⁵
    """

    @staticmethod
    def forward(h, w, t, *, ignore_index=-100, chunk=None, gradients=True):
        h, w, t, ignore_index = _hidden(h, w, t, ignore_index, chunk, gradients)
        (n, c), v = h.shape, w.shape[0]
        step = min(n, _chunk(n, v, h.dtype.itemsize) if chunk is None else chunk)
        N, losses = _rows_that_count(t, ignore_index), h.empty((n,), "float32")
        L = losses if gradients else h.empty((n,), "float32")
        unit, h_dtype = _in_chunks(h.dtype)
        h_bar = h.empty((n, c), h_dtype) if gradients else None
        w_bar = h.empty((v, c), "float32") if gradients else None
        width = _width(v)
        buffer, w_T = h.empty((step, width)), w.swapaxes(0, 1)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            X = buffer[: part.stop - start, :v]
            matmul.forward(h[part], w_T, out=X)
            c_rows = _tiles("cross_entropy_forward", X, gradients)
            launch(
                _cross_entropy_forward, (cdiv(X.shape[0], c_rows["ROWS"]),),
                X, t[part], losses[part], L[part], None, width, X.shape[0], v, ignore_index,
                IN_PLACE=gradients, UNIT=unit, **c_rows,
            )  # fmt: skip
            if gradients:
                matmul.forward(X, w, out=h_bar[part])
                matmul.forward(X.swapaxes(0, 1), h[part], out=w_bar, accumulate=start > 0)
        sums = (h_bar.data, w_bar.data) if gradients else (None, None)
        return _mean_over(losses, N).data, (*sums, N.data)

    @staticmethod
    def vjp(g, y, h, w, t, *, ignore_index=-100, chunk=None, gradients=True, saved, needs):
        h, w, t, _ = _hidden(h, w, t, ignore_index, chunk, gradients)
        without = isinstance(saved, tuple | list) and len(saved) == 3 and saved[0] is None
        if not gradients or without:
            raise ValueError("forward was called with gradients=False; there is none to give")
        unit, h_dtype = _in_chunks(h.dtype)
        h_bar, w_bar, N = kept(
            saved, h=(h.shape, h_dtype), w=(w.shape, "float32"), N=((), "float32")
        )
        g, wanted = _factor(g, h), needed(needs, 3)
        found = [
            _times(x, g, N, unit, h.dtype).data if need else None
            for x, need in zip((h_bar, w_bar), wanted)
        ]
        return (*found, None)[: len(needs)]


# --- what they share ------------------------------------------------------------------------------


def _logits(x, t, ignore_index, in_place):
    """(x, t, elements from one row of x to the next, ignore_index, in_place)."""
    in_place = flag(in_place, "in_place")
    x, t = array(x, "x", ndim=2), array(t, "t", IDS, ndim=1)
    not_empty(x=x)
    shaped(t, "t", x.shape[:1])
    inner_contiguous(t=t)
    if in_place and x.dtype == "float16":
        raise TypeError("x has dtype float16; in_place=True takes float32 or bfloat16")
    stride = rows(x, "x")[1]
    if in_place:
        writable(x, "x", t=t)
    return x, t, stride, _ignored(ignore_index), in_place


def _ignored(ignore_index):
    return integer(ignore_index, "ignore_index", -(2**63), expected="an integer of 64 bits")


def _hidden(h, w, t, ignore_index, chunk, gradients):
    h, w, t = array(h, "h", ndim=2), array(w, "w", ndim=2), array(t, "t", IDS, ndim=1)
    same("dtype", h=h, w=w)
    not_empty(h=h, w=w)
    shaped(w, "w", (w.shape[0], h.shape[1]))
    shaped(t, "t", h.shape[:1])
    inner_contiguous(h=h, w=w, t=t)
    if chunk is not None:
        integer(chunk, "chunk", 1, expected="at least 1 row, or None")
    flag(gradients, "gradients")
    return h, w, t, _ignored(ignore_index)


def _factor(g, like):
    """The gradient of the loss as an array on the device, from there or from a Python number."""
    if isinstance(g, numbers.Real):
        return like.upload(np.full((), g, np.float32))
    g = array(g, "g", ("float32",))
    shaped(g, "g", ())
    return g


def _width(v):
    """Columns to allocate for v of them: rows that begin at multiples of 16 bytes."""
    return v if v % 8 == 0 else cdiv(v, 64) * 64


def _chunk(n, v, itemsize):
    """Rows at a time: equal chunks, of a multiple of 128 rows."""
    most = max(_CHUNK_ROWS, _CHUNK_BYTES // (v * itemsize))
    return cdiv(cdiv(n, cdiv(n, most)), 128) * 128


def _tiles(kernel, x, in_place, run=None):
    """A row for each program and a few tiles to the row; short rows several at a time."""
    v = x.shape[-1]
    block = min(8192, next_power_of_2(v))
    default = _tile(max(1, 1024 // block), block, 8 if block >= 4096 else 4)

    def candidates():
        pairs = [(4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)]
        return [default, *(_tile(1, b, warps) for b, warps in pairs if b < 2 * v)]

    key = x.dtype, next_power_of_2(v), "in place" if in_place else "apart"
    return tuning.configuration(kernel, key, default, candidates, run)


def _tile(rows, block, warps):
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def _rows_that_count(t, ignore_index):
    N = t.empty((), "float32")
    launch(_count, (1,), t, N, t.size, ignore_index, BLOCK=_block(t.size), num_warps=16)
    return N


def _mean_over(losses, N):
    y, n = losses.empty(()), losses.size
    launch(_mean, (1,), losses, N, y, n, BLOCK=_block(n), num_warps=16)
    return y


def _block(n):
    return min(8192, next_power_of_2(n))


def _scale_rows(x, g, stride):
    """x ← g x."""
    grid = (4 * driver.multiprocessors(),)
    launch(_multiply_in_place, grid, x, g, stride, *x.shape, BLOCK=_block(x.shape[1]), num_warps=8)


def _in_chunks(dtype):
    """(what P - H is multiplied by, the dtype of N h̄): for float16 all of its range is used, up to
    32768, and what small rows add up to stays float32 until g is known.
    """
    return (2.0**15, "float32") if dtype == "float16" else (1.0, dtype)


def _times(x, g, N, unit, dtype):
    """g / (N unit) x, in that dtype."""
    y, block = x.empty(x.shape, dtype), 2048
    grid = (cdiv(x.size, block),)
    launch(_multiplied, grid, x, y, g, N, x.size, UNIT=unit, BLOCK=block, num_warps=4)
    return y
