"""The softmax family by rows. A row that fits is kept in registers and read once; a wider one is
read twice, in pieces.
"""

import triton
import triton.language as tl

from .arguments import flag, integer, kept, needed, not_empty, rows, shaped
from .arrays import array, cdiv, next_power_of_2
from .driver import launch
from .tuning import configuration

KERNELS = ("softmax", "log_softmax", "logsumexp")


# --- tiles of rows --------------------------------------------------------------------------------


def tile(n, arrays=1):
    """The tile that a program keeps in registers of `arrays` arrays with rows of n elements: 32 of
    its elements for each thread. It is several rows high if they are short, and one piece of a row,
    N < n, if they do not fit.
    """
    each, N = 32 // arrays, next_power_of_2(n)
    if 1024 * each < N:  # 32 warps are all there can be
        return {"ROWS": 1, "N": 8192, "num_warps": 16}
    return {"ROWS": max(1, 128 * each // N), "N": N, "num_warps": max(4, N // (32 * each))}


def tiles(n, arrays=1):
    """What a search may try: larger and smaller programs, and pieces instead of whole rows."""
    first = tile(n, arrays)
    found = [first]
    if first["ROWS"] > 1:
        found += [{**first, "ROWS": 2 * first["ROWS"]}]
        found += [{**first, "ROWS": first["ROWS"] // 2, "num_warps": 2}]
        found += [{**first, "ROWS": max(1, first["ROWS"] // 4), "num_warps": 1}]
    if first["num_warps"] < 32:
        found += [{**first, "num_warps": 2 * first["num_warps"]}]
    return found + [
        {"ROWS": 1, "N": N, "num_warps": N // 512} for N in (4096, 8192, 16384) if n > N
    ]


@triton.jit
def places(count, n, ROWS: tl.constexpr, N: tl.constexpr):
    """This program's rows i (ROWS, 1) and columns j (1, N), and which places of the tile exist."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, N)[None, :]
    return i, j, (i < count) & (j < n)


# --- maximum and sum ------------------------------------------------------------------------------


@triton.jit
def _finite(m):
    """m, or 0 where m is infinite: for e^(x - m) where inf - inf would be NaN."""
    return tl.where(tl.abs(m) < float("inf"), m, 0.0)


@triton.jit
def _lanes(x, n, N: tl.constexpr):
    """For each of N lanes the maximum m of x_j, x_{j+N}, x_{j+2N}, ... and total = Σ e^(x - m).

    A larger x makes the sum so far smaller, and counts 1 itself: one exponential for each x.
    """
    j = tl.arange(0, N)
    m = tl.full([N], -float("inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    for start in range(0, n, N):
        x_j = _piece(x, start + j, n, "evict_last")
        d = tl.where(x_j == m, 0.0, x_j - m)  # inf - inf would be NaN
        e = tl.exp(-tl.abs(d))
        total = tl.where(d > 0, total * e + 1.0, total + e)
        m = tl.maximum(m, x_j)
    return m, total


@triton.jit
def _piece(x, j, n, KEEP: tl.constexpr):
    """x_j as float32; -inf, of which e^x is 0, beyond the end. KEEP: whether L2 should keep it."""
    x_j = tl.load(x + j, mask=j < n, other=-float("inf"), eviction_policy=KEEP)
    return x_j.to(tl.float32)


# --- softmax and log_softmax ----------------------------------------------------------------------


@triton.jit
def _softmax_forward(
    x, y, stride_x, count, n, LOG: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr
):
    i, j, inside = places(count, n, ROWS, N)
    x_ij = tl.load(x + i * stride_x + j, mask=inside, other=-float("inf")).to(tl.float32)
    shifted = x_ij - tl.max(x_ij, axis=1, keep_dims=True)
    e = tl.exp(shifted)
    total = tl.sum(e, axis=1, keep_dims=True)
    y_ij = shifted - tl.log(total) if LOG else e * (1 / total)
    tl.store(y + i * n + j, y_ij.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_forward_wide(x, y, stride_x, n, LOG: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    x += i * stride_x
    y += i * n
    m_lane, total_lane = _lanes(x, n, N)
    m = tl.max(m_lane, axis=0)
    total = tl.sum(total_lane * tl.exp(m_lane - m), axis=0)
    for start in range(0, n, N):
        j = start + tl.arange(0, N)
        shifted = _piece(x, j, n, "evict_first") - m
        y_j = shifted - tl.log(total) if LOG else tl.exp(shifted) * (1 / total)
        tl.store(y + j, y_j.to(y.dtype.element_ty), mask=j < n)


@triton.jit
def _weight(g_ij, y_ij, LOG: tl.constexpr):
    """What of g is summed over the row."""
    return g_ij if LOG else g_ij * y_ij


@triton.jit
def _slope(g_ij, y_ij, total, LOG: tl.constexpr):
    """x̄, with the row's sum of the weights."""
    return g_ij - tl.exp(y_ij) * total if LOG else y_ij * (g_ij - total)


@triton.jit
def _softmax_vjp(
    g, y, x_bar, stride_g, stride_y, count, n,
    LOG: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i, j, inside = places(count, n, ROWS, N)
    g_ij = tl.load(g + i * stride_g + j, mask=inside, other=0.0).to(tl.float32)
    y_ij = tl.load(y + i * stride_y + j, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(_weight(g_ij, y_ij, LOG), axis=1, keep_dims=True)
    x_bar_ij = _slope(g_ij, y_ij, total, LOG).to(x_bar.dtype.element_ty)
    tl.store(x_bar + i * n + j, x_bar_ij, mask=inside)


@triton.jit
def _softmax_vjp_wide(
    g, y, x_bar, stride_g, stride_y, n, LOG: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    g += i * stride_g
    y += i * stride_y
    x_bar += i * n
    total_lane = tl.zeros([N], tl.float32)
    for start in range(0, n, N):
        j = start + tl.arange(0, N)
        g_j = tl.load(g + j, mask=j < n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y_j = tl.load(y + j, mask=j < n, other=0.0, eviction_policy="evict_last").to(tl.float32)
        total_lane += _weight(g_j, y_j, LOG)
    total = tl.sum(total_lane, axis=0)
    for start in range(0, n, N):
        j = start + tl.arange(0, N)
        g_j = tl.load(g + j, mask=j < n, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y_j = tl.load(y + j, mask=j < n, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x_bar_j = _slope(g_j, y_j, total, LOG)
        tl.store(x_bar + j, x_bar_j.to(x_bar.dtype.element_ty), mask=j < n)


class softmax:
    """y_i = e^{x_i} / Σ_j e^{x_j} along the last axis

        x̄ = y ⊙ (g - Σ(g ⊙ y))

    x (..., n) with rows that are evenly spaced; y and x̄ are C-contiguous. Nothing is saved.
    """

    @staticmethod
    def forward(x, *, axis=-1):
        return _forward(x, axis, LOG=False)

    @staticmethod
    def vjp(g, y, x, *, axis=-1, saved, needs):
        return _vjp(g, y, axis, needs, LOG=False)


class log_softmax:
    """y_i = x_i - log Σ_j e^{x_j} along the last axis

        x̄ = g - exp(y) ⊙ Σ(g)

    x (..., n) with rows that are evenly spaced; y and x̄ are C-contiguous. Nothing is saved.
    """

    @staticmethod
    def forward(x, *, axis=-1):
        return _forward(x, axis, LOG=True)

    @staticmethod
    def vjp(g, y, x, *, axis=-1, saved, needs):
        return _vjp(g, y, axis, needs, LOG=True)


def _forward(x, axis, LOG):
    x, count, stride, n = _rows_along(x, "x", axis)
    y = x.empty(x.shape)

    def run(config):
        warps = config["num_warps"]
        if config["N"] < n:
            arguments = x, y, stride, n
            launch(
                _softmax_forward_wide, (count,), *arguments, LOG=LOG, N=config["N"], num_warps=warps
            )
        else:
            grid = (cdiv(count, config["ROWS"]),)
            launch(_softmax_forward, grid, x, y, stride, count, n, LOG=LOG, **config)

    key = x.dtype, next_power_of_2(n)
    run(configuration("softmax", key, tile(n), lambda: tiles(n), run))
    return y.data, ()


def _vjp(g, y, axis, needs, LOG):
    if needed(needs, 1) == (False,):
        return (None,)
    y, count, stride_y, n = _rows_along(y, "y", axis)
    g = array(g, "g")
    shaped(g, "g", y.shape)
    _, stride_g = rows(g, "g")
    x_bar = y.empty(y.shape)

    def run(config):
        warps = config["num_warps"]
        if config["N"] < n:
            arguments = g, y, x_bar, stride_g, stride_y, n
            launch(_softmax_vjp_wide, (count,), *arguments, LOG=LOG, N=config["N"], num_warps=warps)
        else:
            grid = (cdiv(count, config["ROWS"]),)
            arguments = g, y, x_bar, stride_g, stride_y, count, n
            launch(_softmax_vjp, grid, *arguments, LOG=LOG, **config)

    key = y.dtype, next_power_of_2(n)
    run(configuration("softmax vjp", key, tile(n, 2), lambda: tiles(n, 2), run))
    return (x_bar.data,)


def _rows_along(x, name, axis):
    """(Array, number of rows, stride, row length) for an op along the last axis."""
    x = array(x, name)
    not_empty(**{name: x})
    count, stride = rows(x, name)
    if integer(axis, "axis", -x.ndim, x.ndim - 1) not in (-1, x.ndim - 1):
        raise ValueError(
            f"axis is {axis!r}; expected -1, the last axis: move the axis there and make it "
            "contiguous"
        )
    return x, count, stride, x.shape[-1]


# --- logsumexp ------------------------------------------------------------------------------------


@triton.jit
def _logsumexp_forward(x, y, exact, stride_x, count, n, ROWS: tl.constexpr, N: tl.constexpr):
    i, j, inside = places(count, n, ROWS, N)
    x_ij = tl.load(x + i * stride_x + j, mask=inside, other=-float("inf")).to(tl.float32)
    m = _finite(tl.max(x_ij, axis=1, keep_dims=True))
    y_i = m + tl.log(tl.sum(tl.exp(x_ij - m), axis=1, keep_dims=True))
    tl.store(y + i, y_i.to(y.dtype.element_ty), mask=i < count)
    tl.store(exact + i, y_i, mask=i < count)


@triton.jit
def _logsumexp_forward_wide(x, y, exact, stride_x, n, N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    m_lane, total_lane = _lanes(x + i * stride_x, n, N)
    m = _finite(tl.max(m_lane, axis=0))
    y_i = m + tl.log(tl.sum(total_lane * tl.exp(m_lane - m), axis=0))
    tl.store(y + i, y_i.to(y.dtype.element_ty))
    tl.store(exact + i, y_i)


@triton.jit
def _logsumexp_vjp(
    g, x, exact, x_bar, stride_g, stride_x, count, n, ROWS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    i, j, _ = places(count, n, ROWS, N)
    j += tl.program_id(1) * N  # the columns do not depend on each other: wide rows are split
    inside = (i < count) & (j < n)
    g_i = tl.load(g + i * stride_g, mask=i < count, other=0.0).to(tl.float32)
    y_i = tl.load(exact + i, mask=i < count, other=0.0)
    x_ij = tl.load(x + i * stride_x + j, mask=inside, other=-float("inf")).to(tl.float32)
    x_bar_ij = g_i * tl.exp(x_ij - y_i)
    tl.store(x_bar + i * n + j, x_bar_ij.to(x_bar.dtype.element_ty), mask=inside)


class logsumexp:
    """y = log Σ_j e^{x_j} along the last axis

        x̄ = g ⊙ exp(x - y)

    x (..., n) with rows that are evenly spaced; y (...) or, with keepdims, (..., 1). Saved: y in
    float32, since e^(x - y) has the absolute error of y as its relative one.
    """

    @staticmethod
    def forward(x, *, axis=-1, keepdims=False):
        x, count, stride, n = _rows_along(x, "x", axis)
        y = x.empty((*x.shape[:-1], 1) if flag(keepdims, "keepdims") else x.shape[:-1])
        exact = x.empty((count,), "float32")

        def run(config):
            warps = config["num_warps"]
            if config["N"] < n:
                arguments = x, y, exact, stride, n
                launch(
                    _logsumexp_forward_wide, (count,), *arguments, N=config["N"], num_warps=warps
                )
            else:
                grid = (cdiv(count, config["ROWS"]),)
                launch(_logsumexp_forward, grid, x, y, exact, stride, count, n, **config)

        key = x.dtype, next_power_of_2(n)
        run(configuration("logsumexp", key, tile(n), lambda: tiles(n), run))
        return y.data, (exact.data,)

    @staticmethod
    def vjp(g, y, x, *, axis=-1, keepdims=False, saved, needs):
        if needed(needs, 1) == (False,):
            return (None,)
        x, count, stride, n = _rows_along(x, "x", axis)
        g = array(g, "g")
        shaped(g, "g", (*x.shape[:-1], 1) if flag(keepdims, "keepdims") else x.shape[:-1])
        (exact,) = kept(saved, y=((count,), "float32"))
        _, stride_g = rows(g if keepdims else g.view((*g.shape, 1), (*g.strides, 1)), "g")
        x_bar = x.empty(x.shape)

        def run(config):
            grid = cdiv(count, config["ROWS"]), cdiv(n, config["N"])
            arguments = g, x, exact, x_bar, stride_g, stride, count, n
            launch(_logsumexp_vjp, grid, *arguments, **config)

        key = x.dtype, next_power_of_2(n)
        default = tile(min(n, 4096))
        run(configuration("logsumexp vjp", key, default, lambda: tiles(min(n, 4096)), run))
        return (x_bar.data,)
