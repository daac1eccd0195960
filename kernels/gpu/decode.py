"""Attention of a few new queries to a cache of keys and values: what generating text consists of.

There is next to nothing to compute, and all of the cache to read: B H_k (d + e) numbers a position,
with two operations for each of them and each query that reads them. So

    heads that share keys are the rows of one tile, and a key is read once for all of them;
    the keys are split into parts, for as many programs as keep the whole GPU reading. A part's
    result is its y and L = log₂ Σ_j 2^S_j, and a second kernel puts the parts together:
    y = Σ_s 2^(L_s) y_s / Σ_s 2^(L_s).

How many parts there are depends on shapes only, and lengths stay on the device: a call can be
captured in a CUDA graph, and gives the same bits every time.
"""

import triton
import triton.language as tl

from . import driver, tuning
from .arguments import inner_contiguous, not_empty, one_of, same, shaped, writable
from .arrays import IDS, array, cdiv, next_power_of_2
from .attention import (
    PRECISIONS,
    _check_shapes,
    _head,
    _load,
    _padded,
    _precision,
    _scale,
    _side_by_side,
    _window,
    _with_strides,
)
from .driver import launch

KERNELS = ()
FUSED = ("decode", "append")
MOST_QUERIES = 16
_MOST_SPLITS = 128
_VARYING = ["splits", "window"]  # not to compile for


@triton.jit(do_not_specialize=_VARYING)
def _decode_part(
    q, at_q, k, at_k, v, at_v, lengths, parts, L, B, H, R, T, n, splits, window, scale,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: one of the parts of the keys of one head, for BM of the R T queries that use them.
    y and L of the part go to parts (splits, B, H, T, e) and L (splits, B, H, T).
    """
    c = scale * 1.4426950408889634  # log₂e
    tiles = tl.cdiv(R * T, BM)
    p, s = tl.program_id(0), tl.program_id(1)
    b, h_k = p // tiles // (H // R), p // tiles % (H // R)
    k, v = _head(k, at_k, b, h_k), _head(v, at_v, b, h_k)
    rows = p % tiles * BM + tl.arange(0, BM)  # row r T + t is query t of head h_k R + r
    h, t, exists = h_k * R + rows // T, rows % T, rows < R * T
    columns = tl.arange(0, BD)[None, :]
    there = q + tl.cast(b, tl.int64) * at_q[0] + (h.to(tl.int64) * at_q[1] + t * at_q[2])[:, None]
    q_i = tl.load(there + columns, mask=exists[:, None] & (columns < D), other=0.0)

    given = tl.load(lengths + b)
    length = tl.minimum(tl.maximum(given, 0), n).to(tl.int32)
    upper = t + length - T + 1  # query t sees keys j < upper, and j ≥ upper - window
    begin = tl.maximum(length - T + 1 - window, 0) // BN * BN if WINDOW else 0
    part = tl.cdiv(tl.cdiv(length - begin, BN), splits) * BN
    start = begin + s * part
    m = tl.full((BM,), -float("inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)  # noqa: E741
    y_i = tl.zeros((BM, BE), tl.float32)
    for j in range(start, tl.minimum(start + part, length), BN):
        k_j = _load(k, at_k[2], j, length, BN, D, BD, True)
        v_j = _load(v, at_v[2], j, length, BN, E, BE, True)
        S = tl.dot(q_i, k_j.T, input_precision=PRECISION)
        keys = (j + tl.arange(0, BN))[None, :]
        seen = keys < upper[:, None]
        if WINDOW:
            seen &= keys >= upper[:, None] - window
        S = tl.where(seen, S, -float("inf"))
        m_new = tl.maximum(m, c * tl.max(S, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen yet
        P = tl.exp2(c * S - shift[:, None])
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(P, 1)  # noqa: E741
        y_i = tl.dot(P.to(v_j.dtype), v_j, y_i * alpha[:, None], input_precision=PRECISION)
        m = m_new
    l_or_1 = tl.where(l == 0, 1.0, l)
    row = ((tl.cast(s, tl.int64) * B + b) * H + h) * T + t
    L_i = m + tl.log2(l_or_1)  # -∞ if no key was seen
    tl.store(L + row, tl.where(given == length, L_i, float("nan")), mask=exists)
    columns = tl.arange(0, BE)[None, :]
    mask = exists[:, None] & (columns < E)
    tl.store(parts + row[:, None] * E + columns, y_i / l_or_1[:, None], mask=mask)


@triton.jit
def _decode_combine(
    parts, L, y, at_y, rows, H, T, splits,
    E: tl.constexpr, BE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y = Σ_s 2^(L_s) y_s / Σ_s 2^(L_s). A program: one query of one head, of `rows`."""
    row = tl.program_id(0)
    b, h, t = row // (H * T), row // T % H, row % T
    s, columns = tl.arange(0, SPLITS), tl.arange(0, BE)
    at = s.to(tl.int64) * rows + row
    L_s = tl.load(L + at, mask=s < splits, other=-float("inf"))
    largest = tl.max(L_s, 0)
    weights = tl.exp2(L_s - tl.where(largest == -float("inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    mask = (s < splits)[:, None] & (columns < E)[None, :]
    y_s = tl.load(parts + at[:, None] * E + columns[None, :], mask=mask, other=0.0)
    mean = tl.sum(weights[:, None] * y_s, 0) / tl.where(total == 0, 1.0, total)
    there = _head(y, at_y, b, h) + tl.cast(t, tl.int64) * at_y[2] + columns
    tl.store(there, mean.to(y.dtype.element_ty), mask=columns < E)


def _default(rows, dtype, width):
    """The configuration for tiles of so many queries and heads of so many columns."""
    BM = min(max(next_power_of_2(rows), 16), 16 if dtype == "float32" else 32)
    BN = (1 << 19) // (BM * _padded(width) * dtype.itemsize**2)  # no more fits into registers
    if BN < 16:  # maxnreg: or the assembler spills some, to fit another block
        return dict(BM=BM, BN=16, num_warps=8, num_stages=2, maxnreg=255)
    return dict(BM=BM, BN=min(BN, 128), num_warps=4, num_stages=2)


def _candidates(default):
    """What a search tries."""
    for BN in (default["BN"] // 2, default["BN"], default["BN"] * 2):
        for num_warps, num_stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3)):
            if BN >= 16:
                yield default | dict(BN=BN, num_warps=num_warps, num_stages=num_stages)


def _splits(programs, n, BN):
    """Parts of the keys: two programs for each multiprocessor, and two blocks for each part."""
    wanted = cdiv(2 * driver.multiprocessors(), programs)
    return max(min(wanted, n // (2 * BN), _MOST_SPLITS), 1)


def _checked(q, k, v, lengths, scale, window, precision):
    """The Arrays, the scale and the window, if they fit. TypeError or ValueError if not."""
    q, k, v = array(q, "q"), array(k, "k"), array(v, "v")
    lengths = array(lengths, "lengths", IDS)
    same("dtype", q=q, k=k, v=v)
    not_empty(q=q, k=k, v=v)
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}; expected (B, H, T, d)")
    _check_shapes(q, k, v)
    inner_contiguous(q=q, k=k, v=v, lengths=lengths)
    shaped(lengths, "lengths", q.shape[:1])
    if q.shape[2] > MOST_QUERIES:
        raise ValueError(
            f"{q.shape[2]} queries of a sequence; expected {MOST_QUERIES} at most: use attention"
        )
    one_of(precision, "precision", PRECISIONS)
    return q, k, v, lengths, _scale(scale, q), _window(window)


class decode:
    """Causal attention of the last T ≤ 16 queries of each sequence to a cache of keys and values.
    The first lengths[b] positions of sequence b are filled, the T queries' own among them.

    q (B, H, T, d), k (B, H_k, n, d), v (B, H_k, n, e), lengths (B,) integers -> y (B, H, T, e).
    Query t sees keys j ≤ t + lengths[b] - T; heads, strides, scale, window and precision are as in
    attention. What lies in the cache beyond lengths[b] is not read. A length that is not in 0..n
    cannot be reported without waiting for the device: it makes y of its sequence NaN. No gradient.
    """

    @staticmethod
    def forward(q, k, v, lengths, *, scale=None, window=None, precision="ieee"):
        q, k, v, lengths, scale, window = _checked(q, k, v, lengths, scale, window, precision)
        (B, H, T, d), (_, H_k, n, e) = q.shape, v.shape
        y, R = _side_by_side(q, e), H // H_k
        precision = _precision(precision, q, max(d, e))
        flags = dict(D=d, E=e, BD=_padded(d), BE=_padded(e), WINDOW=window is not None)

        def run(config):
            programs = B * H_k * cdiv(R * T, config["BM"])
            splits = _splits(programs, n, config["BN"])
            parts = y.empty((splits, B, H, T, e), "float32")
            L = y.empty((splits, B, H, T), "float32")
            launch(
                _decode_part, (programs, splits), *_with_strides(q, k, v), lengths, parts, L,
                B, H, R, T, n, splits, window or 0, scale, PRECISION=precision, **flags, **config,
            )  # fmt: skip
            SPLITS = next_power_of_2(splits)
            launch(
                _decode_combine, (B * H * T,), parts, L, *_with_strides(y), B * H * T, H, T, splits,
                E=e, BE=_padded(e), SPLITS=SPLITS, num_warps=4 if SPLITS * e <= 8192 else 8,
            )  # fmt: skip

        default = _default(R * T, q.dtype, max(d, e))
        key = q.dtype, d, e, B * H_k, R * T, next_power_of_2(n), flags["WINDOW"], precision
        run(tuning.configuration("decode", key, default, lambda: list(_candidates(default)), run))
        return y.data, ()


# --- new keys and values --------------------------------------------------------------------------


@triton.jit
def _append(
    k, at_k, v, at_v, keys, at_keys, values, at_values, lengths, H, T, n,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A program: BT new positions of one head."""
    tiles = tl.cdiv(T, BT)
    p, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BT
    b, h = p // H, p % H
    start = tl.load(lengths + b).to(tl.int64) + i
    k, keys = _head(k, at_k, b, h), _head(keys, at_keys, b, h)
    v, values = _head(v, at_v, b, h), _head(values, at_values, b, h)
    _copy(k, at_k[2], i, T, keys, at_keys[2], start, n, D, BD, BT)
    _copy(v, at_v[2], i, T, values, at_values[2], start, n, E, BE, BT)


@triton.jit
def _copy(
    x, at_x, i, T, y, at_y, j, n, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """y[j : j + BT] = x[i : i + BT], of the rows that exist: T of x, n of y."""
    x_i = _load(x, at_x, i, T, BT, D, BD, True)
    r, c = tl.arange(0, BT)[:, None], tl.arange(0, BD)[None, :]
    exists = (i + r < T) & (j + r >= 0) & (j + r < n) & (c < D)
    tl.store(y + (j + r) * at_y + c, x_i, mask=exists)


class append:
    """keys[b, :, lengths[b] + t] = k[b, :, t] and values likewise: new tokens enter the cache.

    k (B, H_k, T, d), v (B, H_k, T, e), keys (B, H_k, n, d), values (B, H_k, n, e), lengths (B,)
    integers: how much of each sequence's cache is filled -> (keys, values)

    It WRITES TO `keys` and `values`: that is what it is for. Only the last axes have to be
    contiguous: k and v may be views of one (B, T, 3, H, d). `lengths` stays as it is. Positions
    outside of 0..n-1 are not written, and cannot be reported without waiting for the device; decode
    with lengths + T makes such a sequence NaN. No gradient.
    """

    @staticmethod
    def forward(k, v, keys, values, lengths):
        found = k, v, keys, values = [
            array(x, name, ndim=4)
            for name, x in {"k": k, "v": v, "keys": keys, "values": values}.items()
        ]
        lengths = array(lengths, "lengths", IDS)
        given = {"k": k, "v": v, "lengths": lengths}
        same("dtype", k=k, v=v, keys=keys, values=values)
        not_empty(**given, keys=keys, values=values)
        (B, H, T, d), e, n = k.shape, v.shape[3], keys.shape[2]
        shaped(v, "v", (B, H, T, e))
        shaped(keys, "keys", (B, H, n, d))
        shaped(values, "values", (B, H, n, e))
        shaped(lengths, "lengths", (B,))
        inner_contiguous(**given, keys=keys, values=values)
        writable(keys, "keys", **given)
        writable(values, "values", **given, keys=keys)
        BD, BE = next_power_of_2(d), next_power_of_2(e)
        BT = max(min(next_power_of_2(T), 4096 // max(BD, BE)), 1)
        launch(
            _append, (B * H * cdiv(T, BT),), *_with_strides(*found), lengths, H, T, n,
            D=d, E=e, BD=BD, BE=BE, BT=BT, num_warps=4 if BT > 1 else 1,
        )  # fmt: skip
        return (keys.data, values.data), ()
