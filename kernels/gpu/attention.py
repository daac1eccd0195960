"""Attention that never writes down the scores: tiles of S and P live in registers and are gone.

S = scale q kᵀ has T·n entries and y only T·e, so the kernels go through the keys a block at a time
(FlashAttention-2: Dao, 2023, arXiv 2307.08691). For a block of queries they keep

    m   the largest score so far,  l = Σ_j e^(S_j - m),  y = Σ_j e^(S_j - m) v_j

and when a larger score turns up, both sums are multiplied by e^(old m - new m). At the end y / l is
the op's y, and L = m + log l is saved: backward has P = e^(S - L) at once.

    base 2       e^(S - m) = 2^(c q·k - m), c = scale log₂e: the chip's exponential is a power of
                 two, and its argument one multiply-add. m and L are in base 2 everywhere.
    which keys   query i sees the band i + lower ≤ j < i + upper: so are causal and window. Blocks
                 outside of it are not visited, and only blocks that an edge cuts are masked: up to
                 three loops, over blocks cut at the left, whole blocks, blocks cut at the right.
    no key       L = +∞, and P = 2^(S - L) = 0 in backward with nothing to check.
    gradients    a kernel for k̄ and v̄, each program a block of keys, and one for q̄, each program a
                 block of queries. Both compute P anew, so there are 7 products of matrices where 5
                 would do; in return no two programs add to the same sum: no atomics.
    order        programs start with the blocks that have most to do, for a few heads at a time,
                 whose keys and values stay in the L2 cache.
"""

import math
import numbers
from dataclasses import dataclass

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
    number,
    one_of,
    same,
    seed_parts,
    shaped,
    writable,
)
from .arrays import IDS, Array, array, cdiv, next_power_of_2
from .driver import launch
from .elementwise import seed_of

KERNELS = ("attention",)
FUSED = ("self_attention",)
PRECISIONS = ("ieee", "tf32", "tf32x3")
WIDEST = 256  # d and e: more does not fit into registers
L2 = 16 << 20  # bytes that programs at work at the same time should share
_FAR = 1 << 30  # the edge of a band that has none
_WHOLE = tl.constexpr(1)  # the second of three parts: blocks that no edge cuts
_VARYING = ["heads", "together", "lower", "upper", "seed", "threshold"]  # not to compile for

# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def _place(tiles, heads, together):
    """(tile, head) of this program: the first tile of `together` heads, their second tile, ..."""
    p = tl.program_id(0)
    group, within = p // (together * tiles), p % (together * tiles)
    width = tl.minimum(heads - group * together, together)
    return within // width, group * together + within % width


@triton.jit
def _head(x, at, b, h):
    """Where head h of sequence b begins; at = strides of sequences, heads and rows."""
    return x + tl.cast(b, tl.int64) * at[0] + tl.cast(h, tl.int64) * at[1]


@triton.jit
def _load(
    x, step, i, n, B: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """B rows of D columns from row i on, `step` elements apart; zeros where there are none. Unless
    CUT, all B exist of the n rows.
    """
    r, c = tl.arange(0, B)[:, None], tl.arange(0, BD)[None, :]
    there = x + tl.cast(i, tl.int64) * step + (r * step + c)
    if CUT:
        tile = tl.load(there, mask=(i + r < n) & (c < D), other=0.0)
    elif D < BD:
        tile = tl.load(there, mask=c < D, other=0.0)
    else:
        tile = tl.load(there)
    return tile


@triton.jit
def _store(x, step, i, n, tile, D: tl.constexpr):
    """Writes a tile to the rows from i on, in x's dtype, as far as they exist."""
    r, c = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    there = x + tl.cast(i, tl.int64) * step + (r * step + c)
    tl.store(there, tile.to(x.dtype.element_ty), mask=(i + r < n) & (c < D))


# --- which keys a query sees ----------------------------------------------------------------------


@triton.jit
def _visits(a, n, lower, upper, A: tl.constexpr, B: tl.constexpr):
    """Row x sees columns x + lower ≤ j < x + upper, of n. For A rows from `a` on and blocks of B
    columns: first ≤ begin ≤ end ≤ last, the edges of three parts. No row sees a column outside of
    first:last; each row sees all of begin:end, which consists of whole blocks.
    """
    first = tl.maximum(a + lower, 0) // B * B
    last = tl.maximum(tl.minimum(a + A - 1 + upper, n), first)
    begin = (tl.maximum(a + A - 1 + lower, 0) + B - 1) // B * B
    begin = tl.minimum(begin, last)
    end = tl.maximum(tl.minimum(a + upper, n), 0) // B * B
    return first, begin, tl.maximum(begin, end), last


@triton.jit
def _ids(segments, step, i, n, B: tl.constexpr):
    """The segments of B rows from row i on; of the last row where there are no more."""
    return tl.load(segments + tl.minimum(i + tl.arange(0, B), n - 1) * step)


@triton.jit
def _narrowed(ids, segments, step, n, first, last, B: tl.constexpr):
    """first:last less the columns before and after all whose segments lie between the smallest and
    the largest of `ids`: where documents follow each other, the other ones are not visited.
    """
    smallest, largest = tl.min(ids), tl.max(ids)
    low, high = last, first
    for j in range(first, last, 1024):
        columns, found = j + tl.arange(0, 1024), _ids(segments, step, j, n, 1024)
        hit = (found >= smallest) & (found <= largest) & (columns < last)
        low = tl.minimum(low, tl.min(tl.where(hit, columns, last)))
        high = tl.maximum(high, tl.max(tl.where(hit, columns + 1, first)))
    return low // B * B, high


@triton.jit
def _seen(i, j, n, lower, upper, ids_i, ids_j, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which of the queries i see which of the keys j, of n; ids are their segments or None."""
    seen = (j < n) & (i >= 0)
    if CAUSAL:
        seen &= j < i + upper
    if WINDOW:
        seen &= j >= i + lower
    if ids_i is not None:
        seen &= ids_i == ids_j
    return seen


# --- dropout --------------------------------------------------------------------------------------


@triton.jit
def _kept(i, j, head, seed, threshold, BT: tl.constexpr, BN: tl.constexpr):
    """Which entries of the tile of P at (i, j) are kept: depends on the seed, the head, the query
    and the key, and not on the tiles. Philox (Salmon et al., 2011) with 7 rounds makes four words
    of each (query, key // 4, head), one for each of four keys. A word below p 2³² is dropped.
    """
    queries = i + tl.arange(0, BT)[:, None]
    fours = j // 4 + tl.arange(0, BN // 4)[None, :]
    a, b, c, d = tl.philox(seed, queries, fours, head, head * 0, 7)
    least = tl.cast(threshold, tl.uint32)
    evens, odds = tl.interleave(a >= least, c >= least), tl.interleave(b >= least, d >= least)
    return tl.interleave(evens, odds)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _attention_keep(keep, T, n, word, seed, threshold, BT: tl.constexpr, BN: tl.constexpr):
    """A program: a tile of the mask of one head, as 0 and 1."""
    i, j, head = tl.program_id(1) * BT, tl.program_id(2) * BN, tl.program_id(0)
    kept = _kept(i, j, head, seed_of(word, seed), threshold, BT, BN)
    rows, columns = i + tl.arange(0, BT)[:, None], j + tl.arange(0, BN)[None, :]
    there = keep + (tl.cast(head, tl.int64) * T + rows) * n + columns
    tl.store(there, kept.to(tl.int8), mask=(rows < T) & (columns < n))


# --- forward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def _attention_forward(
    q, at_q, k, at_k, v, at_v, segments, at_s, y, at_y, L,
    H, R, T, n, heads, together, lower, upper, scale, keep_scale, word, seed, threshold,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program: BT queries of one head."""
    SEGMENTS: tl.constexpr = segments is not None
    if DROPOUT:
        seed = seed_of(word, seed)
    c = scale * 1.4426950408889634  # log₂e
    tiles = tl.cdiv(T, BT)
    tile, head = _place(tiles, heads, together)
    i, b, h = (tiles - 1 - tile) * BT, head // H, head % H
    q, y = _head(q, at_q, b, h), _head(y, at_y, b, h)
    k, v = _head(k, at_k, b, h // R), _head(v, at_v, b, h // R)
    q_i = _load(q, at_q[2], i, T, BT, D, BD, True)
    rows = i + tl.arange(0, BT)
    m = tl.full((BT,), -float("inf"), tl.float32)
    l = tl.zeros((BT,), tl.float32)  # noqa: E741
    y_i = tl.zeros((BT, BE), tl.float32)
    edges = _visits(i, n, lower, upper, BT, BN)
    ids_i = None
    if SEGMENTS:
        segments += tl.cast(b, tl.int64) * at_s[0]
        ids_i = _ids(segments, at_s[1], i, T, BT)
        edges = _narrowed(ids_i, segments, at_s[1], n, edges[0], edges[3], BN)
        ids_i = ids_i[:, None]
    for PART in tl.static_range(0 if WINDOW or SEGMENTS else 1, 1 if SEGMENTS else 3):
        for j in range(edges[PART], edges[PART + 1], BN):
            k_j = _load(k, at_k[2], j, n, BN, D, BD, PART != _WHOLE)
            S = tl.dot(q_i, k_j.T, input_precision=PRECISION)
            if PART != _WHOLE:
                columns = (j + tl.arange(0, BN))[None, :]
                ids_j = _ids(segments, at_s[1], j, n, BN)[None, :] if SEGMENTS else None
                seen = _seen(rows[:, None], columns, n, lower, upper, ids_i, ids_j, CAUSAL, WINDOW)
                S = tl.where(seen, S, -float("inf"))
            m_new = tl.maximum(m, c * tl.max(S, 1))
            shift = m_new
            if PART != _WHOLE:  # no key seen yet: m is -∞, and -∞ - -∞ would be NaN
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            P = tl.exp2(c * S - shift[:, None])
            alpha = tl.exp2(m - shift)
            l = l * alpha + tl.sum(P, 1)  # noqa: E741
            if DROPOUT:
                P = tl.where(_kept(i, j, head, seed, threshold, BT, BN), P, 0.0)
            v_j = _load(v, at_v[2], j, n, BN, E, BE, PART != _WHOLE)
            y_i = tl.dot(P.to(v_j.dtype), v_j, y_i * alpha[:, None], input_precision=PRECISION)
            m = m_new
    none = l == 0
    _store(y, at_y[2], i, T, y_i * (keep_scale / tl.where(none, 1.0, l))[:, None], E)
    L_i = tl.where(none, float("inf"), m + tl.log2(tl.where(none, 1.0, l)))
    tl.store(L + tl.cast(head, tl.int64) * T + rows, L_i, mask=rows < T)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _attention_delta(
    g, at_g, y, at_y, delta, H, T, heads, E: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Δ = Σ(g ⊙ y), which is Σ_j P̄_ij P_ij. A program: BT queries of one head."""
    tile, head = _place(tl.cdiv(T, BT), heads, 1)
    i, b, h = tile * BT, head // H, head % H
    g_i = _load(_head(g, at_g, b, h), at_g[2], i, T, BT, E, BE, True).to(tl.float32)
    y_i = _load(_head(y, at_y, b, h), at_y[2], i, T, BT, E, BE, True).to(tl.float32)
    rows = i + tl.arange(0, BT)
    there = delta + tl.cast(head, tl.int64) * T + rows
    tl.store(there, tl.sum(g_i * y_i, 1), mask=rows < T)


@triton.jit(do_not_specialize=_VARYING)
def _attention_vjp_keys(
    g, at_g, q, at_q, k, at_k, v, at_v, segments, at_s, L, delta, k_bar, at_k_bar, v_bar, at_v_bar,
    H, R, T, n, heads, together, lower, upper, scale, keep_scale, word, seed, threshold,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """k̄ = scale S̄ᵀ q,  v̄ = (D ⊙ P)ᵀ g. A program: BN keys, and the R heads of queries that use
    them. Tiles are of Sᵀ and Pᵀ, so that what was computed is a left factor without a transpose.
    """
    SEGMENTS: tl.constexpr = segments is not None
    if DROPOUT:
        seed = seed_of(word, seed)
    c = scale * 1.4426950408889634  # log₂e
    tile, head = _place(tl.cdiv(n, BN), heads, together)
    j, b, h_k = tile * BN, head // (H // R), head % (H // R)
    k_j = _load(_head(k, at_k, b, h_k), at_k[2], j, n, BN, D, BD, True)
    v_j = _load(_head(v, at_v, b, h_k), at_v[2], j, n, BN, E, BE, True)
    columns = (j + tl.arange(0, BN))[:, None]
    k_bar_j = tl.zeros((BN, BD), tl.float32)
    v_bar_j = tl.zeros((BN, BE), tl.float32)
    edges = _visits(
        j, T, 1 - upper, 1 - lower, BN, BT
    )  # key j is seen by j - upper < i ≤ j - lower
    ids_j = None
    if SEGMENTS:
        segments += tl.cast(b, tl.int64) * at_s[0]
        ids_j = _ids(segments, at_s[1], j, n, BN)
        edges = _narrowed(ids_j, segments, at_s[1], T, edges[0], edges[3], BT)
        ids_j = ids_j[:, None]
    for r in tl.range(R, disable_licm=True):  # what it would hoist has no registers
        h = h_k * R + r
        q_r, g_r = _head(q, at_q, b, h), _head(g, at_g, b, h)
        row = tl.cast(b * H + h, tl.int64) * T
        for PART in tl.static_range(0 if CAUSAL or SEGMENTS else 1, 1 if SEGMENTS else 3):
            for i in range(edges[PART], edges[PART + 1], BT):
                q_i = _load(q_r, at_q[2], i, T, BT, D, BD, PART != _WHOLE)
                g_i = _load(g_r, at_g[2], i, T, BT, E, BE, PART != _WHOLE)
                rows = i + tl.arange(0, BT)
                S = tl.dot(k_j, q_i.T, input_precision=PRECISION)
                L_i = tl.load(L + row + rows, mask=rows < T, other=float("inf"))
                P = tl.exp2(c * S - L_i[None, :])
                if PART != _WHOLE:
                    ids_i = _ids(segments, at_s[1], i, T, BT)[None, :] if SEGMENTS else None
                    seen = _seen(
                        rows[None, :], columns, n, lower, upper, ids_i, ids_j, CAUSAL, WINDOW
                    )
                    P = tl.where(seen, P, 0.0)
                P_kept = P
                if DROPOUT:
                    kept = tl.trans(_kept(i, j, b * H + h, seed, threshold, BT, BN))
                    P_kept = tl.where(kept, P, 0.0)
                v_bar_j = tl.dot(P_kept.to(g_i.dtype), g_i, v_bar_j, input_precision=PRECISION)
                P_bar = tl.dot(v_j, g_i.T, input_precision=PRECISION)
                if DROPOUT:
                    P_bar = tl.where(kept, P_bar * keep_scale, 0.0)
                delta_i = tl.load(delta + row + rows, mask=rows < T, other=0.0)
                S_bar = P * (P_bar - delta_i[None, :])
                k_bar_j = tl.dot(S_bar.to(q_i.dtype), q_i, k_bar_j, input_precision=PRECISION)
    _store(_head(k_bar, at_k_bar, b, h_k), at_k_bar[2], j, n, k_bar_j * scale, D)
    _store(_head(v_bar, at_v_bar, b, h_k), at_v_bar[2], j, n, v_bar_j * keep_scale, E)


@triton.jit(do_not_specialize=_VARYING)
def _attention_vjp_queries(
    g, at_g, q, at_q, k, at_k, v, at_v, segments, at_s, L, delta, q_bar, at_q_bar,
    H, R, T, n, heads, together, lower, upper, scale, keep_scale, word, seed, threshold,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q̄ = scale S̄ k. A program: BT queries of one head."""
    SEGMENTS: tl.constexpr = segments is not None
    if DROPOUT:
        seed = seed_of(word, seed)
    c = scale * 1.4426950408889634  # log₂e
    tiles = tl.cdiv(T, BT)
    tile, head = _place(tiles, heads, together)
    i, b, h = (tiles - 1 - tile) * BT, head // H, head % H
    k, v = _head(k, at_k, b, h // R), _head(v, at_v, b, h // R)
    q_i = _load(_head(q, at_q, b, h), at_q[2], i, T, BT, D, BD, True)
    g_i = _load(_head(g, at_g, b, h), at_g[2], i, T, BT, E, BE, True)
    rows = i + tl.arange(0, BT)
    row = tl.cast(head, tl.int64) * T + rows
    L_i = tl.load(L + row, mask=rows < T, other=float("inf"))[:, None]
    delta_i = tl.load(delta + row, mask=rows < T, other=0.0)[:, None]
    q_bar_i = tl.zeros((BT, BD), tl.float32)
    edges = _visits(i, n, lower, upper, BT, BN)
    ids_i = None
    if SEGMENTS:
        segments += tl.cast(b, tl.int64) * at_s[0]
        ids_i = _ids(segments, at_s[1], i, T, BT)
        edges = _narrowed(ids_i, segments, at_s[1], n, edges[0], edges[3], BN)
        ids_i = ids_i[:, None]
    for PART in tl.static_range(0 if WINDOW or SEGMENTS else 1, 1 if SEGMENTS else 3):
        for j in range(edges[PART], edges[PART + 1], BN):
            k_j = _load(k, at_k[2], j, n, BN, D, BD, PART != _WHOLE)
            v_j = _load(v, at_v[2], j, n, BN, E, BE, PART != _WHOLE)
            S = tl.dot(q_i, k_j.T, input_precision=PRECISION)
            P = tl.exp2(c * S - L_i)
            if PART != _WHOLE:
                columns = (j + tl.arange(0, BN))[None, :]
                ids_j = _ids(segments, at_s[1], j, n, BN)[None, :] if SEGMENTS else None
                seen = _seen(rows[:, None], columns, n, lower, upper, ids_i, ids_j, CAUSAL, WINDOW)
                P = tl.where(seen, P, 0.0)
            P_bar = tl.dot(g_i, v_j.T, input_precision=PRECISION)
            if DROPOUT:
                kept = _kept(i, j, head, seed, threshold, BT, BN)
                P_bar = tl.where(kept, P_bar * keep_scale, 0.0)
            S_bar = P * (P_bar - delta_i)
            q_bar_i = tl.dot(S_bar.to(k_j.dtype), k_j, q_bar_i, input_precision=PRECISION)
    _store(_head(q_bar, at_q_bar, b, h), at_q_bar[2], i, T, q_bar_i * scale, D)


# --- tile sizes -----------------------------------------------------------------------------------


# (BT, BN, num_warps, num_stages) that leave no register in memory, by the width of the heads.
_HOPPER = {
    "attention_forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    "attention_vjp_keys": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 1)},
    "attention_vjp_queries": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
}
_HOPPER_MORE = {
    "attention_forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 1)},
    "attention_vjp_keys": {64: (64, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    "attention_vjp_queries": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
}
_BLACKWELL = _HOPPER | {
    "attention_vjp_keys": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 32, 8, 1)},
}
_AMPERE = {  # and what has no more shared memory than 99 KB: 8.6, 8.9, 12.0
    "attention_forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 1)},
    "attention_vjp_keys": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    "attention_vjp_queries": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
}
_BLACKWELL_MORE = _AMPERE | {
    "attention_vjp_keys": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "attention_vjp_queries": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
}
_DROPOUT_FORWARD = {64: (128, 32, 8, 3), 128: (128, 32, 8, 3), 256: (32, 16, 8, 1)}
_HOPPER_DROPOUT = _AMPERE | {
    "attention_forward": _DROPOUT_FORWARD,
    "attention_vjp_keys": {64: (32, 128, 8, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 1)},
}
_BLACKWELL_DROPOUT = _BLACKWELL_MORE | {"attention_forward": _DROPOUT_FORWARD}
_AMPERE_DROPOUT = {
    "attention_forward": {64: (128, 32, 8, 3), 128: (64, 32, 8, 3), 256: (32, 32, 8, 1)},
    "attention_vjp_keys": {64: (32, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 32, 8, 1)},
    "attention_vjp_queries": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 1)},
}
_AMPERE_MORE = _AMPERE | {
    "attention_forward": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
}
_TABLES = {  # plain; with more than the diagonal to keep in registers; and the words of Philox
    90: (_HOPPER, _HOPPER_MORE, _HOPPER_DROPOUT),
    100: (_BLACKWELL, _BLACKWELL_MORE, _BLACKWELL_DROPOUT),
    103: (_BLACKWELL, _BLACKWELL_MORE, _BLACKWELL_DROPOUT),
}
_OLDER = (_AMPERE, _AMPERE_MORE, _AMPERE_DROPOUT)
_FLOAT32 = {
    "ieee": {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "tf32": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "tf32x3": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
}


def _configuration(BT, BN, num_warps, num_stages):
    return dict(BT=BT, BN=BN, num_warps=num_warps, num_stages=num_stages)


def _default(kernel, chip, dtype, precision, width, more, dropout):
    """The configuration for heads of so many columns. more: a window, segments or shared heads."""
    tiles = _TABLES.get(chip, _OLDER)[2 if dropout else 1 if more else 0]
    width = max(_padded(width), 64)
    tile = _FLOAT32[precision][width] if dtype == "float32" else tiles[kernel][width]
    found = _configuration(*tile)
    if dtype == "float32" or more or dropout:  # or the assembler spills some, to fit another block
        found["maxnreg"] = 255
    return found


# What a search tries, for 16-bit numbers; the last is the widest head that leaves no register in
# memory.
_TRIED = {
    "attention_forward": (
        (64, 64, 4, 2, 128), (64, 64, 4, 3, 128), (64, 128, 8, 2, 128), (128, 32, 8, 3, 128),
        (128, 64, 4, 3, 64), (128, 64, 8, 2, 128), (128, 64, 8, 3, 128), (128, 128, 8, 2, 128),
        (128, 128, 8, 3, 128),
    ),
    "attention_vjp_keys": (
        (32, 64, 8, 2, 128), (32, 128, 8, 1, 128), (32, 128, 8, 2, 128), (64, 64, 4, 2, 64),
        (64, 64, 8, 2, 128), (64, 128, 8, 1, 64), (64, 128, 8, 2, 64),
    ),
    "attention_vjp_queries": (
        (64, 64, 4, 2, 128), (64, 64, 8, 1, 128), (64, 64, 8, 2, 128), (64, 128, 8, 2, 64),
        (128, 32, 8, 2, 128), (128, 64, 8, 1, 128), (128, 64, 8, 2, 128),
    ),
}  # fmt: skip


def _candidates(kernel, width, default):
    """The default, then others."""
    others = [
        default | _configuration(*tile) for *tile, widest in _TRIED[kernel] if width <= widest
    ]
    return [default, *(x for x in others if x != default)]


# --- the op ---------------------------------------------------------------------------------------


def _with_strides(*arrays):
    """Each array, and how far apart its sequences, heads and rows are; 0 for axes it lacks."""
    return [x for a in arrays for x in (a, (0, 0, *a.strides)[-4:-1])]


def _side_by_side(x, width):
    """An empty array (..., H, T, width) for x (..., H, T, d), which lies in memory as
    (..., T, H, width): joining heads is a view.
    """
    *batch, T, _ = x.shape
    if not batch:
        return x.empty((T, width))
    *batch, H = batch
    return x.empty((*batch, T, H, width)).swapaxes(-2, -3)


@dataclass(frozen=True)
class _Call:
    """Arguments that have been found to fit."""

    q: Array
    k: Array
    v: Array
    segments: Array | None
    causal: bool
    scale: float
    window: int | None
    dropout: float
    word: Array | None
    seed: int
    precision: str

    @property
    def sizes(self):
        """B, H, H_k, T, n, d, e."""
        B, H, T, d = (1, 1, *self.q.shape)[-4:]
        H_k, n, e = (1, *self.v.shape)[-3:]
        return B, H, H_k, T, n, d, e

    @property
    def band(self):
        """(lower, upper): query i sees the keys i + lower ≤ j < i + upper."""
        _, _, _, T, n, _, _ = self.sizes
        lower = -_FAR if self.window is None else n - T - self.window + 1
        return lower, n - T + 1 if self.causal else _FAR

    @property
    def operands(self):
        """q, k, v and segments, each with its strides."""
        at_s = None if self.segments is None else (0, *self.segments.strides)[-2:]
        return *_with_strides(self.q, self.k, self.v), self.segments, at_s

    def forward(self, y):
        """Writes y, and returns L."""
        L = y.empty(y.shape[:-1], "float32")
        self.launch(_attention_forward, "BT", *self.operands, *_with_strides(y), L)
        return L

    def vjp(self, g, y, L, bars, wanted=(True, True, True)):
        """Writes the gradients of q, k and v."""
        (q_bar, *bars), delta = bars, _delta(self, g, y)
        given = *_with_strides(g), *self.operands, L, delta
        if wanted[0]:
            self.launch(_attention_vjp_queries, "BT", *given, *_with_strides(q_bar))
        if wanted[1] or wanted[2]:
            self.launch(_attention_vjp_keys, "BN", *given, *_with_strides(*bars))

    def launch(self, kernel, along, *arguments):
        """A program for each tile of each head: along "BT" of queries, along "BN" of keys."""
        B, H, H_k, T, n, d, e = self.sizes
        R, q = H // H_k, self.q
        shared = (d + e) * q.dtype.itemsize  # bytes of a row of k and v, or of q and g
        if along == "BT":
            heads, length, shared = B * H, T, max(n * shared // R, 1)
        else:
            heads, length, shared = B * H_k, n, T * shared * R
        together = min(max(L2 // shared, 1), heads)
        numbers = H, R, T, n, heads, together, *self.band, self.scale
        word = self.word if self.dropout else None
        randomness = 1 / (1 - self.dropout), word, self.seed, _threshold(self.dropout)
        precision = _precision(self.precision, q, max(d, e))
        flags = dict(
            D=d, E=e, BD=_padded(d), BE=_padded(e), CAUSAL=self.causal, PRECISION=precision,
            WINDOW=self.window is not None, DROPOUT=self.dropout > 0,
        )  # fmt: skip

        def run(config):
            grid = (cdiv(length, config[along]) * heads,)
            launch(kernel, grid, *arguments, *numbers, *randomness, **flags, **config)

        name = kernel.__name__.lstrip("_")
        more = flags["WINDOW"] or self.segments is not None or (along == "BN" and R > 1)
        traits = q.dtype, precision, max(d, e), more, flags["DROPOUT"]
        default = _default(name, driver.capability(), *traits)
        sizes = [next_power_of_2(x) for x in (T, n, heads)]
        key = q.dtype, *flags.values(), self.segments is not None, R, *sizes
        run(
            tuning.configuration(
                name, key, default, lambda: _candidates(name, max(d, e), default), run
            )
        )


def _precision(precision, q, width):
    """The one that is computed with; 16-bit numbers have but one."""
    if q.dtype.itemsize == 2 or (precision == "tf32x3" and width > 128):
        return "ieee"  # three parts of each number leave no registers for wider heads
    return precision


def _threshold(p):
    """The share p of 2³² words is below it."""
    return min(round(p * 2**32), 2**32 - 1)


def _padded(width):
    """A power of two that tl.dot takes."""
    return max(next_power_of_2(width), 16)


def _checked(
    q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None, window=None, segments=None,
    dropout=0.0, seed=0, seed_offset=0, precision="ieee",
):  # fmt: skip
    """The call, if it can be done. TypeError or ValueError if not."""
    _refuse_masks(M, B, D)
    q, k, v = array(q, "q"), array(k, "k"), array(v, "v")
    same("dtype", q=q, k=k, v=v)
    not_empty(q=q, k=k, v=v)
    _check_shapes(q, k, v)
    inner_contiguous(q=q, k=k, v=v)
    if segments is not None:
        segments = array(segments, "segments", IDS)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(
                f"segments need as many keys as queries, not {k.shape[-2]} and {q.shape[-2]}"
            )
        shaped(segments, "segments", (*q.shape[:-3], q.shape[-2]))
    causal, window, scale = flag(causal, "causal"), _window(window), _scale(scale, q)
    if window is not None and not causal:
        raise ValueError(
            f"window is {window} and causal is False; expected a window with causal=True"
        )
    one_of(precision, "precision", PRECISIONS)
    dropout = _probability(dropout), *seed_parts(seed, seed_offset)
    return _Call(q, k, v, segments, causal, scale, window, *dropout, precision)


def _window(window):
    """A longer one than any sequence is as good as the longest."""
    if window is None:
        return None
    return min(integer(window, "window", 1, expected="None or a number of keys from 1 on"), _FAR)


def _scale(scale, q):
    if scale is None:
        return 1 / math.sqrt(q.shape[-1])
    expected = "a positive number: for others scale q first"
    return number(scale, "scale", lambda scale: 0 < scale < math.inf, expected)


def _probability(dropout):
    return number(dropout, "dropout", lambda p: 0 <= p < 1, "a probability in [0, 1)")


def _refuse_masks(M, B, D):
    """The op's optional arguments, but for their defaults."""
    instead = {
        "M": (M, True, "causal, window or segments say which keys a query sees"),
        "B": (B, 0, "use the op for a bias on the scores"),
        "D": (D, 1, "dropout=p, seed=s makes the mask where it is used"),
    }
    for name, (x, default, advice) in instead.items():
        if not (isinstance(x, numbers.Number | np.bool_) and x == default):
            what = "an array" if hasattr(x, "shape") else repr(x)
            raise ValueError(
                f"{name} is {what}; expected {default}, as no kernel reads it: {advice}"
            )


def _check_shapes(q, k, v):
    """ValueError unless q (..., H, T, d), k (..., H_k, n, d), v (..., H_k, n, e) go together."""
    if not 2 <= q.ndim <= 4 or not q.ndim == k.ndim == v.ndim:
        raise ValueError(
            f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes; expected (B, H, T, d), (H, T, d) or "
            "(T, d) for all"
        )
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit; expected (B, H, T, d), "
            "(B, H_k, n, d), (B, H_k, n, e)"
        )
    if q.ndim > 2 and q.shape[-3] % k.shape[-3]:
        raise ValueError(
            f"{q.shape[-3]} heads of queries cannot share {k.shape[-3]} heads of keys; expected a "
            "multiple"
        )
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        raise ValueError(
            f"heads are {q.shape[-1]} and {v.shape[-1]} wide; expected {WIDEST} at most: use more "
            "heads or the op"
        )


class attention:
    """y = (D ⊙ P) v,  P = softmax(scale q kᵀ) over the keys that a query sees.

    q (B, H, T, d), k (B, H_k, n, d), v (B, H_k, n, e) -> y (B, H, T, e); B, or B and H, may be
    missing in all of them. H is a multiple of H_k: heads h R to h R + R - 1 of q use head h of k
    and v, R = H / H_k. d and e are at most 256, and best powers of two. Only the last axis has to
    be contiguous: q, k and v may be views of one (B, T, 3, H, d). y and the gradients lie in memory
    as (B, T, H, e). Saved: L (B, H, T) in float32, see above.

    causal      query i sees keys j ≤ i + n - T
    scale       > 0; 1/√d by default
    window      with causal: a query sees the last `window` of those keys
    segments    integers (B, T), n = T: a query sees keys of its own segment only. Documents one
                after the other cost no more than each by itself
    dropout     p: entries of P are dropped with that probability, the others divided by 1 - p
    seed        which ones: 0 to 2⁶³ - 1, or an int64 array on the device with one element, to which
                seed_offset is added: as in seeded_dropout
    precision   of float32: "ieee", or on tensor cores "tf32" (10 bits) or "tf32x3" (nearly all);
                the latter is computed as "ieee" for heads wider than 128

    A query that sees no key gets zeros. M, B and D stay at the op's defaults.
    """

    @staticmethod
    def forward(q, k, v, M=True, B=0.0, D=1.0, **attributes):
        call = _checked(q, k, v, M, B, D, **attributes)
        y = _side_by_side(call.q, call.v.shape[-1])
        return y.data, (call.forward(y).data,)

    @staticmethod
    def vjp(
        g, y, q, k, v, M=True, B=0.0, D=1.0, *, saved, needs, out=(None, None, None), **attributes
    ):  # fmt: skip
        """Gradients of q, k and v, written to the arrays `out` where given: views of the gradient
        of one (B, T, 3, H, d), say.
        """
        wanted, call = needed(needs, 6), _checked(q, k, v, M, B, D, **attributes)
        g, y = array(g, "g"), array(y, "y")
        same("dtype", q=call.q, g=g, y=y)
        shaped(g, "g", (*call.q.shape[:-1], call.v.shape[-1]))
        shaped(y, "y", g.shape)
        (L,) = kept(saved, L=(g.shape[:-1], "float32"))
        inner_contiguous(g=g, y=y)
        bars = _targets(out, wanted, call, g, y)
        call.vjp(g, y, L, bars, wanted)
        bars = [x.data if need else None for x, need in zip(bars, wanted)]
        return (*bars, None, None, None)[: len(needs)]

    @staticmethod
    def keep(q, k, *, dropout, seed, seed_offset=0):
        """What dropout keeps of P (B, H, T, n): 1, or 0 with probability p, int8. D is that divided
        by 1 - p.
        """
        q, k = array(q, "q"), array(k, "k")
        not_empty(q=q, k=k)
        _check_shapes(q, k, k)
        threshold, (word, seed) = _threshold(_probability(dropout)), seed_parts(seed, seed_offset)
        T, n, heads, BT, BN = q.shape[-2], k.shape[-2], math.prod(q.shape[:-2]), 32, 128
        keep = q.empty((*q.shape[:-1], n), "int8")
        grid = (heads, cdiv(T, BT), cdiv(n, BN))
        launch(_attention_keep, grid, keep, T, n, word, seed, threshold, BT=BT, BN=BN)
        return keep.data


def _targets(out, needs, call, g, y):
    """Where the gradients of q, k and v go."""
    if not isinstance(out, tuple | list) or len(out) != 3:
        raise ValueError(f"out is {out!r}; expected three arrays or None: for q, k and v")
    taken, found = {"q": call.q, "k": call.k, "v": call.v, "g": g, "y": y}, []
    for name, to, need in zip("qkv", out, needs):
        x = taken[name]
        if to is None or not need:
            found.append(_side_by_side(x, x.shape[-1]))
            continue
        name = f"out for {name}"
        to = array(to, name, (x.dtype,))
        shaped(to, name, x.shape)
        inner_contiguous(**{name: to})
        writable(to, name, **taken)
        taken[name] = to
        found.append(to)
    return found


def _delta(call, g, y):
    """Δ (B, H, T) in float32."""
    B, H, _, T, _, _, e = call.sizes
    delta, BT = y.empty(y.shape[:-1], "float32"), 32
    launch(
        _attention_delta, (cdiv(T, BT) * B * H,), *_with_strides(g, y), delta, H, T, B * H,
        E=e, BE=_padded(e), BT=BT, num_warps=4,
    )  # fmt: skip
    return delta


# --- for a layer that makes queries, keys and values at once --------------------------------------


class self_attention:
    """attention of the queries, keys and values that lie side by side in qkv, causal by default.

    qkv (B, T, (H + 2 H_k) D) -> y (B, T, H D); B may be missing. A row of qkv is what one linear
    layer makes of a token: H heads of queries, then H_k of keys, then H_k of values, D wide each; a
    row of y is what the next one takes, its H heads. Nothing is copied: the kernels read views of
    qkv and write y, which is C-contiguous, and q̄, k̄ and v̄ into the one array that is returned.
    The last axis of qkv and g has to be contiguous. Saved: L, as in attention.

    heads, kv_heads    H and H_k, of which H is a multiple; H_k = H by default
    causal, scale, window, segments, dropout, seed, seed_offset, precision    as in attention
    """

    @staticmethod
    def forward(qkv, *, heads, kv_heads=None, causal=True, **attributes):
        qkv, parts = _parts(qkv, heads, kv_heads)
        call = _checked(*parts, causal=causal, **attributes)
        y, (H, _, D) = qkv.empty(_joined(call)), call.q.shape[-3:]
        return y.data, (call.forward(_heads(y, H, D)).data,)

    @staticmethod
    def vjp(g, y, qkv, *, heads, kv_heads=None, causal=True, saved, needs, **attributes):
        if needed(needs, 1) == (False,):
            return (None,)
        qkv, parts = _parts(qkv, heads, kv_heads)
        call = _checked(*parts, causal=causal, **attributes)
        g, y, (H, _, D) = array(g, "g"), array(y, "y"), call.q.shape[-3:]
        same("dtype", qkv=qkv, g=g, y=y)
        for name, x in (("g", g), ("y", y)):
            shaped(x, name, _joined(call))
            inner_contiguous(**{name: x})
        (L,) = kept(saved, L=(call.q.shape[:-1], "float32"))
        qkv_bar = qkv.empty(qkv.shape)
        _, bars = _parts(qkv_bar, heads, kv_heads)
        call.vjp(_heads(g, H, D), _heads(y, H, D), L, bars)
        return (qkv_bar.data,)


def _parts(qkv, heads, kv_heads):
    """qkv as an Array, and its queries, keys and values (..., H or H_k, T, D): views."""
    H = integer(heads, "heads", 1)
    H_k = H if kv_heads is None else integer(kv_heads, "kv_heads", 1)
    if H % H_k:
        raise ValueError(f"{H} heads of queries cannot share {H_k} of keys; expected a multiple")
    qkv = array(qkv, "qkv")
    not_empty(qkv=qkv)
    inner_contiguous(qkv=qkv)
    if qkv.ndim not in (2, 3) or qkv.shape[-1] % (H + 2 * H_k):
        raise ValueError(
            f"qkv has shape {qkv.shape}; expected (B, T, n D) or (T, n D) with n = {H + 2 * H_k}: "
            f"{H} heads of queries, {H_k} of keys and {H_k} of values"
        )
    D = qkv.shape[-1] // (H + 2 * H_k)
    return qkv, (
        _heads(qkv, H, D), _heads(qkv, H_k, D, H * D), _heads(qkv, H_k, D, (H + H_k) * D)
    )  # fmt: skip


def _heads(x, H, D, start=0):
    """The columns of x (..., T, m) from `start` on as heads (..., H, T, D): a view."""
    *batch, T, _ = x.shape
    *steps, step, _ = x.strides
    return x.view((*batch, H, T, D), (*steps, D, step, 1), start)


def _joined(call):
    """The shape of y with its heads side by side."""
    *batch, H, T, D = call.q.shape
    return (*batch, T, H * D)
