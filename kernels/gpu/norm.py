"""Normalisations by rows, alone and with the addition of a residual before them. A row that fits is
kept in registers and read once; a wider one is read twice, in pieces.

layer_norm and rms_norm are the same kernels: CENTRED says whether the mean is subtracted.
"""

import math

import triton
import triton.language as tl

from . import driver
from .arguments import inner_contiguous, kept, needed, not_empty, number, rows, same, shaped
from .arrays import array, cdiv, next_power_of_2
from .driver import launch
from .reduce import places, tile, tiles
from .tuning import configuration

KERNELS = ("layer_norm", "rms_norm")
FUSED = ("add_layer_norm", "add_rms_norm")

_WIDEST = 16384  # columns that forward keeps in registers
_WIDEST_VJP = 8192  # ... and vjp, which also keeps the sums for w̄ and b̄ there
_PIECE = 1024  # columns that a program sums up over the rows if they are wider


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _summed(x, residual, at_x, at_residual, inside):
    """x + residual as s holds it: what is normalised is what the next block reads."""
    x_ij = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        x_ij += tl.load(residual + at_residual, mask=inside, other=0.0).to(tl.float32)
        x_ij = x_ij.to(x.dtype.element_ty).to(tl.float32)
    return x_ij


@triton.jit
def _scaled(x_hat, w, b, j, n):
    """y = x̂ ⊙ w + b."""
    y = x_hat * tl.load(w + j, mask=j < n, other=0.0).to(tl.float32)
    return y if b is None else y + tl.load(b + j, mask=j < n, other=0.0).to(tl.float32)


@triton.jit
def _norm_forward(
    x, residual, w, b, s, y, stats, stride_x, stride_residual, count, n, eps,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y, s and stats (3, rows): r, and μ as the sum of mu and the rest."""
    i, j, inside = places(count, n, ROWS, N)
    x_ij = _summed(x, residual, i * stride_x + j, i * stride_residual + j, inside)
    if s is not None:
        tl.store(s + i * n + j, x_ij.to(s.dtype.element_ty), mask=inside)
    if CENTRED:
        mu = tl.sum(x_ij, axis=1, keep_dims=True) / n
        x_ij = tl.where(inside, x_ij - mu, 0.0)
        rest = tl.sum(x_ij, axis=1, keep_dims=True) / n  # rounding, of a mean beside a small spread
        x_ij = tl.where(inside, x_ij - rest, 0.0)
        tl.store(stats + count + i, mu, mask=i < count)
        tl.store(stats + count + count + i, rest, mask=i < count)
    r = 1 / tl.sqrt(tl.sum(x_ij * x_ij, axis=1, keep_dims=True) / n + eps)
    tl.store(stats + i, r, mask=i < count)
    y_ij = _scaled(x_ij * r, w, b, j, n)
    tl.store(y + i * n + j, y_ij.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_forward_wide(
    x, residual, w, b, s, y, stats, stride_x, stride_residual, count, n, eps,
    CENTRED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    # The mean of the first piece is subtracted before squaring. If that piece is the part f of the
    # row, (μ - mu)² is no more than var (1 - f)/f, so little cancels in var = mean(d²) - rest².
    mu = 0.0
    if CENTRED:
        first = _summed(x, residual, i * stride_x + lane, i * stride_residual + lane, lane < n)
        mu = tl.sum(first, axis=0) / N
    sum_d = tl.zeros([N], tl.float32)
    sum_dd = tl.zeros([N], tl.float32)
    for start in range(0, n, N):
        j = start + lane
        x_j = _summed(x, residual, i * stride_x + j, i * stride_residual + j, j < n)
        if s is not None:
            tl.store(s + i * n + j, x_j.to(s.dtype.element_ty), mask=j < n)
        d = tl.where(j < n, x_j - mu, 0.0)
        sum_d += d
        sum_dd += d * d
    var = tl.sum(sum_dd, axis=0) / n
    rest = 0.0
    if CENTRED:
        rest = tl.sum(sum_d, axis=0) / n
        var = tl.maximum(var - rest * rest, 0.0)
        tl.store(stats + count + i, mu)
        tl.store(stats + count + count + i, rest)
    r = 1 / tl.sqrt(var + eps)
    tl.store(stats + i, r)
    for start in range(0, n, N):
        j = start + lane
        x_j = _summed(x, residual, i * stride_x + j, i * stride_residual + j, j < n)
        y_j = _scaled((x_j - mu - rest) * r, w, b, j, n)
        tl.store(y + i * n + j, y_j.to(y.dtype.element_ty), mask=j < n)


# --- vjp ------------------------------------------------------------------------------------------


@triton.jit
def _normalised(x_ij, stats, i, count, CENTRED: tl.constexpr):
    """(x̂, r) of the rows i, from what forward saved: r, and μ as mu + rest."""
    r = tl.load(stats + i, mask=i < count, other=0.0)
    if CENTRED:
        x_ij -= tl.load(stats + count + i, mask=i < count, other=0.0)
        x_ij -= tl.load(stats + count + count + i, mask=i < count, other=0.0)
    return x_ij * r, r


@triton.jit
def _norm_vjp(
    s_bar, g, x, w, stats, x_bar, parts, stride_s_bar, stride_g, stride_x, count, n,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every P-th tile of rows, P programs; each leaves its own sums for w̄ and b̄ in `parts`."""
    p, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    j = tl.arange(0, N)[None, :]
    w_j = tl.load(w + j, mask=j < n, other=0.0).to(tl.float32)
    w_bar = tl.zeros([N], tl.float32)
    b_bar = tl.zeros([N], tl.float32)
    for first in tl.range(p * ROWS, count, P * ROWS, num_stages=STAGES):
        i = first + tl.arange(0, ROWS)[:, None]
        inside = (i < count) & (j < n)
        x_ij = tl.load(x + i * stride_x + j, mask=inside, other=0.0).to(tl.float32)
        g_ij = tl.load(g + i * stride_g + j, mask=inside, other=0.0).to(tl.float32)
        x_hat, r = _normalised(x_ij, stats, i, count, CENTRED)
        if parts is not None:
            w_bar += tl.sum(g_ij * x_hat, axis=0)
            if CENTRED:
                b_bar += tl.sum(g_ij, axis=0)
        if x_bar is not None:
            u = g_ij * w_j
            d = u - x_hat * (tl.sum(u * x_hat, axis=1, keep_dims=True) / n)
            if CENTRED:
                d -= tl.sum(u, axis=1, keep_dims=True) / n
            x_bar_ij = r * d
            if s_bar is not None:
                at = i * stride_s_bar + j
                x_bar_ij += tl.load(s_bar + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_bar + i * n + j, x_bar_ij.to(x_bar.dtype.element_ty), mask=inside)
    if parts is not None:
        lane = tl.arange(0, N)
        tl.store(parts + p * n + lane, w_bar, mask=lane < n)
        if CENTRED:
            tl.store(parts + (P + p) * n + lane, b_bar, mask=lane < n)


@triton.jit
def _norm_vjp_wide(
    s_bar, g, x, w, stats, x_bar, stride_s_bar, stride_g, stride_x, count, n,
    CENTRED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """x̄ of one row: its means first, then its pieces again."""
    i = tl.program_id(0).to(tl.int64)
    sum_u = tl.zeros([N], tl.float32)
    sum_ux = tl.zeros([N], tl.float32)
    for start in range(0, n, N):
        j = start + tl.arange(0, N)
        x_j = tl.load(x + i * stride_x + j, mask=j < n, other=0.0).to(tl.float32)
        g_j = tl.load(g + i * stride_g + j, mask=j < n, other=0.0).to(tl.float32)
        x_hat, r = _normalised(x_j, stats, i, count, CENTRED)
        u = g_j * tl.load(w + j, mask=j < n, other=0.0).to(tl.float32)
        sum_u += u
        sum_ux += u * x_hat
    mean_u = tl.sum(sum_u, axis=0) / n if CENTRED else 0.0
    mean_ux = tl.sum(sum_ux, axis=0) / n
    for start in range(0, n, N):
        j = start + tl.arange(0, N)
        x_j = tl.load(x + i * stride_x + j, mask=j < n, other=0.0).to(tl.float32)
        g_j = tl.load(g + i * stride_g + j, mask=j < n, other=0.0).to(tl.float32)
        x_hat, r = _normalised(x_j, stats, i, count, CENTRED)
        u = g_j * tl.load(w + j, mask=j < n, other=0.0).to(tl.float32)
        x_bar_j = r * (u - mean_u - x_hat * mean_ux)
        if s_bar is not None:
            at = i * stride_s_bar + j
            x_bar_j += tl.load(s_bar + at, mask=j < n, other=0.0).to(tl.float32)
        tl.store(x_bar + i * n + j, x_bar_j.to(x_bar.dtype.element_ty), mask=j < n)


@triton.jit
def _norm_parts(
    g, x, stats, parts, stride_g, stride_x, count, n,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N columns of every P-th tile of rows, for w̄ and b̄ of rows that are wide."""
    p, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    j = tl.program_id(1) * N + tl.arange(0, N)
    w_bar = tl.zeros([N], tl.float32)
    b_bar = tl.zeros([N], tl.float32)
    for first in range(p * ROWS, count, P * ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        inside = (i < count) & (j < n)[None, :]
        x_ij = tl.load(x + i * stride_x + j[None, :], mask=inside, other=0.0).to(tl.float32)
        g_ij = tl.load(g + i * stride_g + j[None, :], mask=inside, other=0.0).to(tl.float32)
        x_hat, _ = _normalised(x_ij, stats, i, count, CENTRED)
        w_bar += tl.sum(g_ij * x_hat, axis=0)
        b_bar += tl.sum(g_ij, axis=0)
    tl.store(parts + p * n + j, w_bar, mask=j < n)
    if CENTRED:
        tl.store(parts + (P + p) * n + j, b_bar, mask=j < n)


@triton.jit
def _norm_total(parts, w_bar, b_bar, P, n, ROWS: tl.constexpr, N: tl.constexpr):
    """w̄ and b̄ from `parts` (2, P, n): the sums over P, always in the same order."""
    j = tl.program_id(0) * N + tl.arange(0, N)
    if w_bar is not None:
        w_bar_j = _column_sums(parts, 0, P, n, j, ROWS, N)
        tl.store(w_bar + j, w_bar_j.to(w_bar.dtype.element_ty), mask=j < n)
    if b_bar is not None:
        b_bar_j = _column_sums(parts, P, P, n, j, ROWS, N)
        tl.store(b_bar + j, b_bar_j.to(b_bar.dtype.element_ty), mask=j < n)


@triton.jit
def _column_sums(parts, start, P, n, j, ROWS: tl.constexpr, N: tl.constexpr):
    total = tl.zeros([ROWS, N], tl.float32)
    for first in range(0, P, ROWS):
        p = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (p < P) & (j < n)[None, :]
        total += tl.load(parts + (start + p) * n + j[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


# --- the kernels ----------------------------------------------------------------------------------


class layer_norm:
    """y = x̂ ⊙ w + b,  x̂ = (x - μ) ⊙ r,  r = 1/√(var + ε)

        u = g ⊙ w
        x̄ = r ⊙ (u - mean(u) - x̂ ⊙ mean(u ⊙ x̂))
        w̄ = Σ(g ⊙ x̂),  b̄ = Σ(g)  over the rows

    x (..., n) with rows that are evenly spaced, w and b (n,) of any of the dtypes; y and x̄ are
    C-contiguous. Saved: (3, rows) in float32, r and μ, which is the sum of two.
    """

    @staticmethod
    def forward(x, w, b, *, eps=1e-5):
        _, y, saved = _forward(x, None, w, b, eps, CENTRED=True)
        return y, saved

    @staticmethod
    def vjp(g, y, x, w, b, *, eps=1e-5, saved, needs):
        bars = _vjp(None, g, x, w, b, saved, needed(needs, 3), CENTRED=True)
        return bars[: len(needs)]


class rms_norm:
    """y = x̂ ⊙ w,  x̂ = x ⊙ r,  r = 1/√(mean(x²) + ε)

        u = g ⊙ w
        x̄ = r ⊙ (u - x̂ ⊙ mean(u ⊙ x̂))
        w̄ = Σ(g ⊙ x̂)  over the rows

    x (..., n) with rows that are evenly spaced, w (n,) of any of the dtypes; y and x̄ are
    C-contiguous. Saved: r (1, rows) in float32.
    """

    @staticmethod
    def forward(x, w, *, eps=1e-5):
        _, y, saved = _forward(x, None, w, None, eps, CENTRED=False)
        return y, saved

    @staticmethod
    def vjp(g, y, x, w, *, eps=1e-5, saved, needs):
        bars = _vjp(None, g, x, w, None, saved, needed(needs, 2), CENTRED=False)
        return bars[: len(needs)]


class add_layer_norm:
    """s = x + residual,  y = layer_norm(s, w, b): a block's residual and the next one's norm

        s̄' = s̄ + r ⊙ (u - mean(u) - ŝ ⊙ mean(u ⊙ ŝ)),  u = g ⊙ w
        x̄ = the residual's gradient = s̄'

    What comes out is the pair (s, y), and what goes in backwards the pair (s̄, g); s̄ may be None,
    where nothing else reads s. The two gradients s̄' are the same array. Shapes as in layer_norm;
    x and residual have the same dtype. Saved: s, and what layer_norm saves.
    """

    @staticmethod
    def forward(x, residual, w, b, *, eps=1e-5):
        s, y, saved = _forward(x, residual, w, b, eps, CENTRED=True)
        return (s, y), (s, *saved)

    @staticmethod
    def vjp(g, y, x, residual, w, b, *, eps=1e-5, saved, needs):
        return _add_vjp(g, x, w, b, saved, needs, CENTRED=True)


class add_rms_norm:
    """s = x + residual,  y = rms_norm(s, w): a block's residual and the next one's norm

        s̄' = s̄ + r ⊙ (u - ŝ ⊙ mean(u ⊙ ŝ)),  u = g ⊙ w
        x̄ = the residual's gradient = s̄'

    Pairs and shapes as in add_layer_norm. Saved: s, and what rms_norm saves.
    """

    @staticmethod
    def forward(x, residual, w, *, eps=1e-5):
        s, y, saved = _forward(x, residual, w, None, eps, CENTRED=False)
        return (s, y), (s, *saved)

    @staticmethod
    def vjp(g, y, x, residual, w, *, eps=1e-5, saved, needs):
        return _add_vjp(g, x, w, None, saved, needs, CENTRED=False)


def _forward(x, residual, w, b, eps, CENTRED):
    """(s or None, y, saved)."""
    x, w = array(x, "x"), array(w, "w")
    n = _checked(x, w, eps)
    count, stride_x = rows(x, "x")
    stride_residual = 0
    if residual is not None:
        residual = array(residual, "residual")
        same("shape", x=x, residual=residual)
        same("dtype", x=x, residual=residual)
        _, stride_residual = rows(residual, "residual")
    if b is not None:
        b = array(b, "b")
        same("shape", w=w, b=b)
        inner_contiguous(b=b)
    s = None if residual is None else x.empty(x.shape)
    y, stats = x.empty(x.shape), x.empty((3 if CENTRED else 1, count), "float32")

    def run(config):
        arguments = (
            x, residual, w, b, s, y, stats, stride_x, stride_residual, count, n, float(eps)
        )  # fmt: skip
        options = {"CENTRED": CENTRED, **config}
        if config["N"] < n:
            del options["ROWS"]
            launch(_norm_forward_wide, (count,), *arguments, **options)
        else:
            launch(_norm_forward, (cdiv(count, config["ROWS"]),), *arguments, **options)

    key = x.dtype, next_power_of_2(n), "add" if residual is not None else "alone"
    arrays = 1 if residual is None else 2
    run(configuration("norm", key, _tile(n, arrays), lambda: tiles(n, arrays), run))
    return None if s is None else s.data, y.data, (stats.data,)


def _add_vjp(g, x, w, b, saved, needs, CENTRED):
    """x̄, the residual's gradient, w̄ and, for a norm that has it, b̄."""
    if not isinstance(g, tuple | list) or len(g) != 2:
        raise ValueError(f"g is a {type(g).__name__}; expected a pair: the gradients of s and y")
    s_bar, g = g
    needs_x, needs_residual, *others = needed(needs, 4 if CENTRED else 3)
    wanted = needs_x or needs_residual, *others
    s_bar, *bars = _vjp(s_bar, g, x, w, b, saved, wanted, CENTRED, ADD=True)
    return (s_bar if needs_x else None, s_bar if needs_residual else None, *bars)[: len(needs)]


def _vjp(s_bar, g, x, w, b, saved, needs, CENTRED, ADD=False):
    """x̄, w̄ and, if CENTRED, b̄; None where it is not needed. With ADD, what was normalised is not x
    but s, which was saved, and s̄ is added to x̄.
    """
    x, w, g = array(x, "x"), array(w, "w"), array(g, "g")
    n = _checked(x, w)
    same("shape", x=x, g=g)
    (count, stride_x), (_, stride_g) = rows(x, "x"), rows(g, "g")
    stats = (3 if CENTRED else 1, count), "float32"
    if ADD:
        x, stats = kept(saved, s=(x.shape, x.dtype), stats=stats)
        stride_x = n
    else:
        (stats,) = kept(saved, stats=stats)
    stride_s_bar = 0
    if s_bar is not None:
        s_bar = array(s_bar, "the gradient of s")
        shaped(s_bar, "the gradient of s", x.shape)
        _, stride_s_bar = rows(s_bar, "the gradient of s")
    x_bar = x.empty(x.shape) if needs[0] else None
    w_bar = w.empty(w.shape) if needs[1] else None
    b_bar = w.empty(w.shape, array(b, "b").dtype) if CENTRED and needs[2] else None
    strides = stride_s_bar, stride_g, stride_x

    def run(config):
        """x̄, and the programs' sums for w̄ and b̄; then the sums' sum."""
        N, sums = config["N"], w_bar is not None or b_bar is not None
        blocks = cdiv(n, min(N, _PIECE)) if n > N else 1  # programs side by side
        P = max(1, driver.multiprocessors() * config["PROGRAMS"] // blocks)
        P = min(P, cdiv(count, config["ROWS"]))
        parts = x.empty((2 if CENTRED else 1, P, n), "float32") if sums else None
        warps = {"num_warps": config["num_warps"]}
        if n <= N:
            options = {"CENTRED": CENTRED, "ROWS": config["ROWS"], "N": N, **warps}
            arguments = s_bar, g, x, w, stats, x_bar, parts, *strides, count, n
            launch(_norm_vjp, (P,), *arguments, STAGES=config["STAGES"], **options)
        elif x_bar is not None:
            arguments = s_bar, g, x, w, stats, x_bar, *strides, count, n
            launch(_norm_vjp_wide, (count,), *arguments, CENTRED=CENTRED, N=N, **warps)
        if n > N and sums:
            options = {"CENTRED": CENTRED, "ROWS": config["ROWS"], "N": min(N, _PIECE)}
            arguments = g, x, stats, parts, stride_g, stride_x, count, n
            launch(_norm_parts, (P, blocks), *arguments, num_warps=8, **options)
        if sums:
            ROWS, N = (256, 16) if n < 4096 else (64, 64)
            grid, options = (cdiv(n, N),), {"ROWS": ROWS, "N": N, "num_warps": 8}
            launch(_norm_total, grid, parts, w_bar, b_bar, P, n, **options)

    key = x.dtype, next_power_of_2(n), "add" if s_bar is not None else "alone"
    run(configuration("norm vjp", key, _tile_vjp(n), lambda: _tiles_vjp(n), run))
    bars = (x_bar, w_bar, b_bar) if CENTRED else (x_bar, w_bar)
    return tuple(None if a is None else a.data for a in bars)


def _checked(x, w, eps=0.0):
    """n, if x (..., n), w (n,) and eps are what a norm takes."""
    not_empty(x=x)
    if x.ndim == 0:
        raise ValueError("x has shape (); expected at least one axis")
    inner_contiguous(x=x)
    shaped(w, "w", x.shape[-1:])
    inner_contiguous(w=w)
    number(eps, "eps", lambda eps: 0 <= eps < math.inf, "a number that is not negative")
    return x.shape[-1]


# --- tiles ----------------------------------------------------------------------------------------


def _tile(n, arrays):
    return tile(n, arrays) if n <= _WIDEST else {"ROWS": 1, "N": 4096, "num_warps": 16}


def _tile_vjp(n):
    """As many programs as a multiprocessor can hold at once, each with 16 numbers of x and of g for
    each thread. In pieces: x̄ by rows, the sums by columns in blocks of 2 rows.
    """
    if n > _WIDEST_VJP:
        return {"ROWS": 2, "N": 8192, "num_warps": 16, "PROGRAMS": 8, "STAGES": 1}
    found = tile(n, 2)
    stages = 3 if found["N"] <= 4096 else 2  # of shared memory: rows that are read ahead
    return {**found, "PROGRAMS": 16 // found["num_warps"], "STAGES": stages}


def _tiles_vjp(n):
    first = _tile_vjp(n)
    shapes = [first, {**first, "ROWS": 2 * first["ROWS"]}]
    if n <= _WIDEST_VJP:
        shapes += [{**first, "num_warps": 2 * first["num_warps"]}]
    if first["ROWS"] > 1:
        shapes += [{**first, "ROWS": first["ROWS"] // 2, "num_warps": 2}]
    return [
        {**shape, "PROGRAMS": programs, "STAGES": stages}
        for shape in shapes
        for programs in (1, 2, 4, 8)
        for stages in (1, 2, 3)
        if programs * shape["num_warps"] <= 64
        and (stages < 3 or shape["ROWS"] <= first["ROWS"])  # or registers are spilled
    ]
