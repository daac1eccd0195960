"""The kernels of kernels/gpu/attention.py and kernels/gpu/decode.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, close, device, dtypes, host, normal, rounded, spaced, truth
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import attention, decode, tuning

from tinygrad_llm.ops import TABLE
from tinygrad_llm.tensor import apply

TILES = [(16, 16), (32, 16), (16, 32)]


# --- the reference --------------------------------------------------------------------------------


def reference(M, D, causal, scale):
    """The op on Tensors: heads that share keys are a fifth axis, along which k and v broadcast."""

    def y(q, k, v):
        B, H, T, d = q.shape
        heads = k.shape[1]
        q = q.reshape(B, heads, H // heads, T, d)
        k, v = (x.reshape(B, heads, 1, *x.shape[2:]) for x in (k, v))
        fit = [x.reshape(B, heads, -1, *x.shape[2:]) if np.ndim(x) == 4 else x for x in (M, D)]
        y = apply(TABLE["attention"], q, k, v, fit[0], 0.0, fit[1], causal=causal, scale=scale)
        return y.reshape(B, H, T, v.shape[-1])

    return y


def mask(T, n, window, segments, heads):
    """M for the op: True, or booleans."""
    M = True if window is None else ~np.tri(T, n, n - T - window, dtype=bool)
    if segments is not None:
        same = segments[:, None, :, None] == segments[:, None, None, :]
        M = np.repeat(M & same, heads, axis=1)
    return M


def heads_side_by_side(draw, x):
    """(B, H, T, d) as it is, as a view of (B, T, H, d), or of a part of (B, T, 3, H, d)."""
    layout = draw(st.sampled_from(["plain", "side by side", "fused"]))
    if layout == "plain":
        return x
    x = x.transpose(0, 2, 1, 3)
    if layout == "side by side":
        return np.ascontiguousarray(x).transpose(0, 2, 1, 3)
    fused = np.full((*x.shape[:2], 3, *x.shape[2:]), 77, x.dtype)
    fused[:, :, 1] = x
    return fused[:, :, 1].transpose(0, 2, 1, 3)


# --- checks ---------------------------------------------------------------------------------------


def agrees(gpu, draw, B, H, H_k, T, n, *, d=20, e=20, scale=None, **attributes):
    """Forward and backward for one drawn call, with small tiles."""
    dtype, size = draw(dtypes), draw(st.sampled_from([1, 3]))
    shapes = ((B, H, T, d), (B, H_k, n, d), (B, H_k, n, e))
    arrays = [rounded(normal(draw, *s, scale=size), dtype) for s in shapes]
    arrays = [device(heads_side_by_side(draw, x)) for x in arrays]
    p, segments, D = attributes.get("dropout", 0.0), attributes.get("segments"), 1.0
    if p:
        keep = attention.attention.keep(*arrays[:2], dropout=p, seed=attributes["seed"])
        D = host(keep) / (1 - p)
    M = mask(T, n, attributes.get("window"), segments, H)
    if segments is not None:
        attributes["segments"] = device(segments)
    names = ("attention_forward", "attention_vjp_keys", "attention_vjp_queries")
    tiles = {
        name: dict(BT=BT, BN=BN, num_warps=4, num_stages=1)
        for name, (BT, BN) in zip(names, draw(st.permutations(TILES)))
    }
    gpu.L2 = draw(st.sampled_from([1, 10_000, 16 << 20]))
    with tuning.using(**tiles):
        y, saved = gpu.attention.forward(*arrays, scale=scale, **attributes)
        g = device(rounded(normal(draw, B, H, T, e), dtype))
        found = gpu.attention.vjp(
            g, y, *arrays, saved=saved, needs=(True,) * 3, scale=scale, **attributes
        )
    expected = truth(
        reference(M, D, attributes.get("causal", False), scale),
        [host(x) for x in arrays], dtype, host(g).astype(np.float64),
    )  # fmt: skip
    assert len(found) == 3
    for actual, pair in zip((y, *found), expected):
        assert host(actual).dtype.name == dtype
        close(actual, pair)


def plain(gpu, draw):
    causal = draw(st.booleans())
    B, H, H_k = draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 1), (1, 2, 1)]))
    T, n = draw(st.sampled_from([(1, 1), (33, 33), (32, 32), (17, 40), (40, 17), (1, 37), (20, 1)]))
    d, e = draw(st.sampled_from([(16, 16), (20, 24), (32, 16)]))
    scale = draw(st.sampled_from([None, 0.3]))
    agrees(gpu, draw, B, H, H_k, T, n, d=d, e=e, scale=scale, causal=causal)


def shared_heads(gpu, draw):
    T, n = draw(st.sampled_from([(18, 18), (20, 33)]))
    B, H, H_k = draw(st.sampled_from([(1, 4, 2), (2, 3, 1)]))
    agrees(gpu, draw, B, H, H_k, T, n, causal=draw(st.booleans()))


def windowed(gpu, draw):
    T, n = draw(st.sampled_from([(40, 40), (33, 45), (34, 20)]))
    window = draw(st.sampled_from([1, 7, 16, 17, 40, 99]))
    agrees(gpu, draw, 1, 1, 1, T, n, causal=True, window=window)


def packed(gpu, draw):
    B, T = draw(st.sampled_from([(1, 40), (2, 18)]))
    ids = np.random.default_rng(draw(st.integers(0, 99))).integers(-1, 3, (B, T))
    ids = np.sort(ids, axis=1) if draw(st.booleans()) else ids
    attributes = dict(causal=True, window=20) if draw(st.booleans()) else {}
    agrees(gpu, draw, B, 1, 1, T, T, segments=ids.astype(np.int32), **attributes)


def dropped(gpu, draw):
    B, H, H_k = draw(st.sampled_from([(1, 2, 2), (1, 2, 1), (2, 1, 1)]))
    T, n = draw(st.sampled_from([(20, 20), (17, 40)]))
    p, seed = draw(st.sampled_from([0.1, 0.5])), draw(st.integers(0, 2**63 - 1))
    agrees(gpu, draw, B, H, H_k, T, n, causal=draw(st.booleans()), dropout=p, seed=seed)


def seeds(gpu, draw):
    """A word on the device and an offset draw what their sum does, modulo 2⁶³."""
    word, offset = draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 2**63 - 1))
    q, g = (device(normal(draw, 1, 1, 5, 16).astype(np.float32)) for _ in "qg")
    there = {"seed": device(np.full(1, word, np.int64)), "seed_offset": offset}
    found = []
    for chosen in (there, {"seed": (word + offset) % 2**63}):
        y, saved = gpu.attention.forward(q, q, q, dropout=0.5, **chosen)
        bars = gpu.attention.vjp(
            g, y, q, q, q, saved=saved, needs=(True,) * 3, dropout=0.5, **chosen
        )
        keep = gpu.attention.keep(q, q, dropout=0.5, **chosen)
        found.append([host(x).copy() for x in (y, *bars, keep)])
    for a, b in zip(*found):
        assert np.array_equal(a, b)


def self_attended(gpu, draw):
    """The same bits as attention's of views."""
    dtype, (H, H_k) = draw(dtypes), draw(st.sampled_from([(2, None), (4, 2), (3, 1)]))
    H_k, kv_heads, (batch, T, d) = (
        H_k or H,
        H_k,
        draw(st.sampled_from([((2,), 18, 16), ((), 5, 20)])),
    )
    m = (H + 2 * H_k) * d
    qkv = spaced(draw, rounded(normal(draw, *batch, T, m), dtype))
    g = device(spaced(draw, rounded(normal(draw, *batch, T, H * d), dtype)))
    views = [
        device(np.moveaxis(part.reshape(*batch, T, -1, d), -2, -3))
        for part in np.split(qkv, [H * d, (H + H_k) * d], axis=-1)
    ]
    options = draw(st.sampled_from([
        {}, {"causal": False, "scale": 0.3}, {"window": 3, "precision": "tf32"},
        {"dropout": 0.5, "seed": 3, "seed_offset": 4},
        {"segments": device(np.arange(T) // 4 + np.zeros((*batch, 1), int))},
    ]))  # fmt: skip
    heads = {"heads": H, "kv_heads": kv_heads, **options}
    there = device(qkv)
    y, saved = gpu.self_attention.forward(there, **heads)
    assert host(y).shape == (*batch, T, H * d) and host(y).dtype == qkv.dtype
    assert y.flags.c_contiguous and y.base is None, "y is a copy, or a view"
    (bar,) = gpu.self_attention.vjp(g, y, there, saved=saved, needs=(True,), **heads)
    options = {"causal": True, **options}
    z, saved = attention.attention.forward(*views, **options)
    joined = lambda x: np.moveaxis(host(x), -3, -2).reshape(*batch, T, -1)  # noqa: E731
    assert np.array_equal(host(y), joined(z))
    g = device(np.moveaxis(host(g).reshape(*batch, T, H, d), -2, -3))
    bars = attention.attention.vjp(g, z, *views, saved=saved, needs=(True,) * 3, **options)
    assert np.array_equal(host(bar), np.concatenate([joined(x) for x in bars], -1))


def decoded(gpu, draw):
    """decode against attention's op: each sequence by itself, with the filled part of the cache."""
    dtype = draw(dtypes)
    H, H_k, T = draw(st.sampled_from([(1, 1, 1), (4, 2, 1), (4, 2, 2), (9, 1, 2)]))
    B, n, d, e = 2, draw(st.sampled_from([5, 66, 70])), 20, 24
    window = draw(st.sampled_from([None, 1, 9, 40]))
    q, k, v = (
        rounded(normal(draw, *s), dtype) for s in ((B, H, T, d), (B, H_k, n, d), (B, H_k, n, e))
    )
    lengths = np.array([draw(st.integers(0, n)), n], np.int32)
    for x in (k, v):
        x[0, :, lengths[0] :] = np.nan  # not to be read
    config = dict(BM=16, BN=draw(st.sampled_from([16, 32])), num_warps=4, num_stages=1)
    with tuning.using(decode=config):
        y, _ = gpu.decode.forward(*map(device, (q, k, v, lengths)), window=window)
    assert host(y).dtype.name == dtype
    for b, length in enumerate(lengths):
        if length == 0:
            assert not host(y)[b].any()
            continue
        arrays = [q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length]]
        f = reference(mask(T, length, window, None, H), 1.0, True, None)
        (pair,) = truth(f, arrays, dtype)
        close(host(y)[b : b + 1], pair)


def appended(gpu, draw):
    """append beside a loop, caches and new tokens lying anyhow; then decode with what is there."""
    dtype, B, H, d, e = draw(dtypes), 3, draw(st.sampled_from([1, 2])), 20, 16
    T, n = draw(st.sampled_from([1, 3, 40])), draw(st.sampled_from([5, 45]))
    around = T + 2  # positions before and after the caches, which nobody may write to
    k, v, *wholes = (
        heads_side_by_side(draw, rounded(normal(draw, B, H, length, width), dtype))
        for length in (T, n + 2 * around)
        for width in (d, e)
    )
    lengths = np.array([draw(st.integers(-T - 1, n + 1)), 0, n - 1], draw(st.sampled_from("il")))
    expected = [x.copy() for x in wholes]
    for b, t in np.ndindex(B, T):
        if 0 <= (at := lengths[b] + t) < n:
            for x, new in zip(expected, (k, v)):
                x[b, :, around + at] = new[b, :, t]
    k, v, lengths, *wholes = map(device, (k, v, lengths, *wholes))
    keys, values = (x[:, :, around:-around] for x in wholes)
    found, saved = gpu.append.forward(k, v, keys, values, lengths)
    assert found[0] is keys and found[1] is values and saved == ()
    for x, right in zip(wholes, expected):
        assert np.array_equal(host(x), right)
    if T == 1:
        q = device(rounded(normal(draw, B, 2 * H, 1, d), dtype))
        right = (device(x[:, :, around:-around].copy()) for x in expected)
        y, _ = gpu.decode.forward(q, keys, values, lengths + 1)
        z, _ = decode.decode.forward(q, *right, lengths + 1)
        assert np.array_equal(host(y), host(z), equal_nan=True)


CHECKS = {
    plain: 10,
    shared_heads: 2,
    windowed: 4,
    packed: 4,
    dropped: 3,
    seeds: 3,
    self_attended: 5,
}


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, attention, examples=CHECKS[check])


def test_decode_agrees_with_the_maths():
    harness.run(decoded, decode, examples=12)


def test_append_agrees_with_a_loop():
    harness.run(appended, decode, examples=15)


def test_lengths_that_no_cache_has_give_nan():
    q, k = device(np.ones((5, 2, 1, 16), np.float32)), device(np.ones((5, 2, 6, 16), np.float32))
    for dtype, outside in ((np.int32, [7, 2**31 - 1, -1]), (np.int64, [7, 2**32 + 1, -(2**40)])):
        y, _ = decode.decode.forward(q, k, k, device(np.array([0, *outside, 6], dtype)))
        y = host(y)[:, 0, 0, 0]
        assert y[0] == 0 and np.isnan(y[1:4]).all() and y[4] == 1


# --- planted mistakes -----------------------------------------------------------------------------

MUTANTS = {
    plain: [
        Mutant("q̄ without scale", "q_bar_i * scale", "q_bar_i"),
        Mutant("k̄ without scale", "k_bar_j * scale", "k_bar_j"),
        Mutant("causal off by one", "seen &= j < i + upper", "seen &= j <= i + upper"),
        Mutant("causal aligned at the start", "n - T + 1 if", "1 if"),
        Mutant("keys beyond the last one", "(j < n) & (i >= 0)", "(j >= 0) & (i >= 0)"),
        Mutant(
            "no mask in k̄ and v̄",
            "                    P = tl.where(seen, P, 0.0)",
            "                    P = tl.where(seen, P, P)",
        ),
        Mutant("no mask in q̄", "WINDOW)\n                P = tl.where(seen", "WINDOW)\n#"),
        Mutant("no Δ in q̄", "(P_bar - delta_i)", "P_bar"),
        Mutant("no Δ in k̄", "(P_bar - delta_i[None, :])", "P_bar"),
        Mutant("l is not rescaled", "l * alpha + tl.sum(P, 1)", "l + tl.sum(P, 1)"),
        Mutant("y is not rescaled", "y_i * alpha[:, None]", "y_i"),
        Mutant("L in the wrong base", "m + tl.log2(", "m + tl.log("),
        Mutant("a row too few", "ty), mask=(i + r < n)", "ty), mask=(i + r < n - 1)"),
        Mutant("the last, cut block skipped", "tl.maximum(begin, end), last", "end, end"),
        Mutant("a cut block taken for whole", "(a + upper, n), 0) // B", "(a + upper, n), 0) // 8"),
    ],
    shared_heads: [
        Mutant(
            "heads of keys taken in turns",
            "y, at_y, b, h)\n    k, v = _head(k, at_k, b, h // R)",
            "y, at_y, b, h)\n    k, v = _head(k, at_k, b, h % (H // R))",
        ),
        Mutant("a head of queries forgotten", "tl.range(R, ", "tl.range(R - 1, "),
    ],
    windowed: [
        Mutant("window off by one", "seen &= j >= i + lower", "seen &= j > i + lower"),
        Mutant("whole too early", "lower, 0) + B - 1) // B", "lower, 0)) // B"),
        Mutant("the band of keys as that of queries", "1 - upper, 1 - lower", "lower, upper"),
    ],
    packed: [
        Mutant("segments ignored", "seen &= ids_i == ids_j", "pass"),
        Mutant("only the first segment of a block", "(found <= largest)", "(found <= smallest)"),
    ],
    self_attended: [
        Mutant(
            "values are keys", "_heads(qkv, H_k, D, (H + H_k) * D)", "_heads(qkv, H_k, D, H * D)"
        ),
        Mutant(
            "keys begin a head late", "_heads(qkv, H_k, D, H * D)", "_heads(qkv, H_k, D, H * D + D)"
        ),
        Mutant("rows lie as if contiguous", "(*steps, D, step, 1)", "(*steps, D, x.shape[-1], 1)"),
        Mutant(
            "not causal by default",
            "kv_heads=None, causal=True, **",
            "kv_heads=None, causal=False, **",
        ),
    ],
    seeds: [
        Mutant(
            "what is kept without the word", "head, seed_of(word, seed), thr", "head, seed, thr"
        ),
        Mutant("no word is handed on", "self.word if self.dropout", "None if self.dropout"),
    ],
    dropped: [
        Mutant(
            "another seed in q̄",
            "seed, threshold, BT, BN)\n                P_bar",
            "seed + 1, threshold, BT, BN)\n                P_bar",
        ),
        Mutant("another head in k̄", "b * H + h, seed", "b * H + h_k, seed"),
        Mutant("v̄ without 1 / (1 - p)", "v_bar_j * keep_scale", "v_bar_j"),
        Mutant("y without 1 / (1 - p)", "(keep_scale / tl", "(1.0 / tl"),
        Mutant(
            "softmax of what is kept",
            "l * alpha + tl.sum(P, 1)",
            "l * alpha + tl.sum(tl.where(_kept(i, j, head, seed, threshold, BT, BN), P, 0.0), 1)",
        ),
    ],
}
APPEND_MUTANTS = [
    Mutant("a position late", ".to(tl.int64) + i", ".to(tl.int64) + i + 1"),
    Mutant("before the cache", " & (j + r >= 0)", ""),
    Mutant("beyond the cache", " & (j + r < n)", ""),
    Mutant("more than is new", "(i + r < T) & (j", "(i + r < T + 1) & (j"),
    Mutant(
        "the cache lies as k does",
        "tl.store(y + (j + r) * at_y + c",
        "tl.store(y + (j + r) * at_x + c",
    ),
    Mutant(
        "values take k's head",
        "v, values = _head(v, at_v, b, h)",
        "v, values = _head(v, at_v, b, 0)",
    ),
]
DECODE_MUTANTS = [
    Mutant("a key too many", "upper = t + length - T + 1", "upper = t + length - T + 2"),
    Mutant("heads of a group overlap", "h_k * R + rows // T", "h_k + rows // T"),
    Mutant("window off by one", "keys >= upper", "keys > upper"),
    Mutant("parts that begin a block late", "+ s * part", "+ s * part + BN"),
    Mutant(
        "parts too short", "tl.cdiv(length - begin, BN), splits", "(length - begin) // BN, splits"
    ),
    Mutant("parts are not weighted", "weights[:, None] * y_s", "(weights[:, None] > 0) * y_s"),
    Mutant("a part's L without its sum", "m + tl.log2(l_or_1)", "m"),
    Mutant("all of the cache is read", "j, length, BN, E", "j, n, BN, E"),
    Mutant("the window's first block skipped", "window, 0) // BN", "window + BN, 0) // BN"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mistake may well overflow
@pytest.mark.parametrize("mutant", [m for found in MUTANTS.values() for m in found], ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    check = next(check for check in MUTANTS if mutant in MUTANTS[check])
    assert harness.killed(attention, mutant, [check], tmp_path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutant", DECODE_MUTANTS, ids=str)
def test_mutants_of_decode_are_killed(mutant, tmp_path):
    assert harness.killed(decode, mutant, [decoded], tmp_path)


@pytest.mark.parametrize("mutant", APPEND_MUTANTS, ids=str)
def test_mutants_of_append_are_killed(mutant, tmp_path):
    assert harness.killed(decode, mutant, [appended], tmp_path)


# --- the rest -------------------------------------------------------------------------------------


def zeros(*shape, dtype="float32"):
    return device(rounded(np.zeros(shape), dtype))


def philox(key, counter, rounds):
    """Philox-4x32 (Salmon et al., 2011) of one counter of four words, in Python's integers."""
    word = 2**32 - 1
    key = [key & word, key >> 32]
    for _ in range(rounds):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        left, right = b >> 32 ^ counter[1] ^ key[0], a >> 32 ^ counter[3] ^ key[1]
        counter = [left, b & word, right, a & word]
        key = [key[0] + 0x9E3779B9 & word, key[1] + 0xBB67AE85 & word]
    return counter


def test_what_is_kept_is_a_function_of_seed_head_query_and_key():
    seed, p, T, n = 2**40 + 17, 0.3, 5, 10
    kept = host(
        attention.attention.keep(zeros(1, 2, T, 8), zeros(1, 2, n, 8), dropout=p, seed=seed)
    )
    for h, i, j in np.ndindex(2, T, n):
        assert kept[0, h, i, j] == (philox(seed, [i, j // 4, h, 0], 7)[j % 4] >= round(p * 2**32))


def test_as_many_are_kept_as_dropout_says():
    q = zeros(1, 1, 100, 8)
    for p in (0.0, 0.1, 0.75):
        kept = host(attention.attention.keep(q, q, dropout=p, seed=3))
        assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / kept.size) ** 0.5 + 1e-9


def test_gradients_go_where_they_are_wanted():
    """Into views of the gradient of a fused (B, T, 3, H, d); those not needed stay as they are."""
    rng = np.random.default_rng(0)
    B, T, H, d = 1, 18, 2, 16
    qkv = device(rng.standard_normal((B, T, 3, H, d)).astype(np.float32))
    q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    y, saved = attention.attention.forward(q, k, v, causal=True)
    assert y.transpose(0, 2, 1, 3).reshape(B, T, H * d).base is not None, "joining heads copies"
    call = dict(saved=saved, causal=True)
    expected = attention.attention.vjp(y, y, q, k, v, needs=(True,) * 3, **call)
    qkv_bar = device(np.full_like(host(qkv), 77))
    out = [qkv_bar[:, :, i].transpose(0, 2, 1, 3) for i in range(3)]
    attention.attention.vjp(y, y, q, k, v, needs=(True,) * 3, out=out, **call)
    for a, b in zip(out, expected):
        assert np.array_equal(host(a), host(b))
    qkv_bar.fill(77)
    bars = attention.attention.vjp(y, y, q, k, v, needs=(False, True, False), out=out, **call)
    assert bars[0] is bars[2] is None and np.array_equal(host(bars[1]), host(expected[1]))
    assert (host(qkv_bar[:, :, ::2]) == 77).all()


def test_axes_that_are_missing_are_one():
    rng = np.random.default_rng(0)
    q, k, v = (device(rng.standard_normal((2, 20, 16)).astype(np.float32)) for _ in range(3))
    whole, _ = attention.attention.forward(q[None], k[None], v[None])
    y, saved = attention.attention.forward(q, k, v)
    bars = attention.attention.vjp(y, y, q, k, v, saved=saved, needs=(True,) * 3)
    assert [host(x).shape for x in bars[:3]] == [(2, 20, 16)] * 3
    assert np.array_equal(host(y), host(whole)[0])
    assert np.array_equal(host(attention.attention.forward(q[1], k[1], v[1])[0]), host(y)[1])


def test_wide_heads():
    """80 is no power of two, and 256 the widest."""
    rng = np.random.default_rng(0)
    for d in (80, 256):
        arrays = [rng.standard_normal((1, 1, 5, d)).astype(np.float32) for _ in range(3)]
        y, saved = attention.attention.forward(*map(device, arrays))
        g = rng.standard_normal((1, 1, 5, d)).astype(np.float32)
        needs = (True,) * 3
        found = attention.attention.vjp(
            device(g), y, *map(device, arrays), saved=saved, needs=needs
        )
        expected = truth(reference(True, 1.0, False, None), arrays, "float32", g.astype(np.float64))
        for actual, pair in zip((y, *found), expected):
            close(actual, pair)


def forward(q=(1, 2, 5, 16), k=(1, 2, 5, 16), v=None, M=True, B=0.0, D=1.0, **attributes):
    q, k, v = (zeros(*x) if isinstance(x, tuple) else x for x in (q, k, k if v is None else v))
    return attention.attention.forward(q, k, v, M, B, D, **attributes)


def decode_forward(q=(1, 2, 1, 16), k=(1, 2, 5, 16), lengths=(5,), dtype=np.int32, **attributes):
    q, k, lengths = zeros(*q), zeros(*k), device(np.array(lengths, dtype))
    return decode.decode.forward(q, k, k, lengths, **attributes)


def self_attend(qkv=(2, 5, 96), heads=2, **options):
    qkv = zeros(*qkv) if isinstance(qkv, tuple) else qkv
    return attention.self_attention.forward(qkv, heads=heads, **options)


def self_backward(g=(5, 32), y=(5, 32), L=(2, 5)):
    options = {"heads": 2, "saved": (zeros(*L),), "needs": (True,)}
    return attention.self_attention.vjp(zeros(*g), zeros(*y), zeros(5, 96), **options)


def append(
    k=(2, 1, 3, 16), v=(2, 1, 3, 8), keys=(2, 1, 9, 16), values=(2, 1, 9, 8), lengths=(0, 0)
):
    keys, values = (zeros(*x) if isinstance(x, tuple) else x for x in (keys, values))
    lengths = device(np.array(lengths))
    return decode.append.forward(zeros(*k), zeros(*v), keys, values, lengths)


def backward(g=(1, 2, 5, 16), L=(1, 2, 5), out=(None, None, None), dtype="float32"):
    x, saved = zeros(1, 2, 5, 16), (zeros(*L),)
    g = zeros(*g, dtype=dtype)
    return attention.attention.vjp(g, x, x, x, x, saved=saved, needs=(1, 1, 1), out=out)


ids = np.zeros((1, 5))
BAD = [
    (lambda: forward(q=np.zeros((1, 2, 5, 16))), TypeError, "q has dtype float64"),
    (lambda: forward(k=zeros(1, 2, 5, 16, dtype="float16")), TypeError, "k has dtype float16"),
    (lambda: forward(segments=ids), TypeError, "segments has dtype float64"),
    (lambda: forward(segments=ids.astype(int)[:, :4]), ValueError, "segments has shape (1, 4)"),
    (lambda: forward(q=(1, 2, 4, 16), segments=ids.astype(int)), ValueError, "as many keys as"),
    (lambda: forward(q=(16,), k=(16,)), ValueError, "have 1, 1, 1 axes"),
    (lambda: forward(q=(2, 5, 16)), ValueError, "have 3, 4, 4 axes"),
    (lambda: forward(q=(1, 2, 5, 8)), ValueError, "do not fit"),
    (lambda: forward(v=(1, 2, 6, 16)), ValueError, "do not fit"),
    (lambda: forward(q=(2, 2, 5, 16)), ValueError, "do not fit"),
    (lambda: forward(q=(1, 3, 5, 16)), ValueError, "3 heads of queries cannot share 2"),
    (lambda: forward(q=(1, 2, 5, 257), k=(1, 2, 5, 257)), ValueError, "expected 256 at most"),
    (lambda: forward(q=(1, 2, 0, 16)), ValueError, "at least one element"),
    (lambda: forward(q=zeros(1, 2, 5, 32)[..., ::2]), ValueError, "the last axis of q"),
    (lambda: forward(M=ids > 0), ValueError, "causal, window or segments"),
    (lambda: forward(B=ids), ValueError, "B is an array"),
    (lambda: forward(D=ids), ValueError, "dropout=p"),
    (lambda: forward(dropout=1.0), ValueError, "dropout is 1.0"),
    (lambda: forward(dropout=-0.1), ValueError, "dropout is -0.1"),
    (lambda: forward(dropout=0.1, seed=-1), ValueError, "seed is -1"),
    (lambda: forward(dropout=0.1, seed=ids), TypeError, "seed has dtype float64; expected int64"),
    (lambda: forward(seed=ids.astype(int)), ValueError, "seed has shape (1, 5); expected one"),
    (lambda: forward(seed_offset=-1), ValueError, "seed_offset is -1"),
    (lambda: forward(seed_offset=device(np.zeros(1, int))), TypeError, "seed_offset is"),
    (lambda: self_attend(heads=0), ValueError, "heads is 0"),
    (lambda: self_attend(heads=2, kv_heads=3), ValueError, "2 heads of queries cannot share 3"),
    (lambda: self_attend(heads=5), ValueError, "qkv has shape (2, 5, 96); expected (B, T, n D) or"),
    (lambda: self_attend(qkv=(96,)), ValueError, "qkv has shape (96,)"),
    (lambda: self_attend(qkv=(2, 0, 96)), ValueError, "at least one element"),
    (lambda: self_attend(qkv=zeros(5, 192)[:, ::2]), ValueError, "the last axis of qkv"),
    (lambda: self_attend(qkv=np.zeros((5, 96))), TypeError, "qkv has dtype float64"),
    (lambda: self_attend(qkv=(5, 3 * 257), heads=1), ValueError, "expected 256 at most"),
    (lambda: self_attend(causal=1), TypeError, "causal is 1"),
    (lambda: self_attend(segments=np.zeros((2, 4), int)), ValueError, "segments has shape (2, 4)"),
    (lambda: self_backward(g=(5, 31)), ValueError, "g has shape (5, 31); expected (5, 32)"),
    (lambda: self_backward(y=(1, 5, 32)), ValueError, "y has shape (1, 5, 32)"),
    (lambda: self_backward(L=(5, 2)), ValueError, "saved L has shape (5, 2)"),
    (lambda: append(k=(2, 3, 16)), ValueError, "k has shape (2, 3, 16); expected 4 axes"),
    (lambda: append(v=(2, 1, 4, 8)), ValueError, "v has shape (2, 1, 4, 8); expected (2, 1, 3, 8)"),
    (lambda: append(keys=(2, 1, 9, 8)), ValueError, "keys has shape (2, 1, 9, 8); expected"),
    (lambda: append(values=(2, 1, 8, 8)), ValueError, "values has shape (2, 1, 8, 8); expected"),
    (lambda: append(lengths=(0,)), ValueError, "lengths has shape (1,); expected (2,)"),
    (lambda: append(lengths=(0.0, 0.0)), TypeError, "lengths has dtype float64"),
    (
        lambda: append(values=zeros(2, 1, 9, 8, dtype="float16")),
        TypeError,
        "values has dtype float1",
    ),
    (
        lambda: append(keys=(kv := zeros(2, 1, 9, 16)), values=kv[..., :8]),
        ValueError,
        "values shares memory with keys",
    ),
    (lambda: forward(scale=0.0), ValueError, "scale is 0.0"),
    (lambda: forward(window=3), ValueError, "window is 3 and causal is False"),
    (lambda: forward(window=0, causal=True), ValueError, "window is 0"),
    (lambda: forward(precision="bf16"), ValueError, "precision is 'bf16'"),
    (lambda: backward(g=(1, 2, 5, 8)), ValueError, "g has shape (1, 2, 5, 8)"),
    (lambda: backward(dtype="float16"), TypeError, "g has dtype float16"),
    (lambda: backward(L=(1, 2, 4)), ValueError, "saved L has shape"),
    (lambda: backward(out=(zeros(5, 16), None, None)), ValueError, "out for q has shape"),
    (lambda: backward(out=(same := zeros(1, 2, 5, 16), same, None)), ValueError, "with out for q"),
    (lambda: decode_forward(q=(2, 1, 16), k=(2, 5, 16)), ValueError, "expected (B, H, T, d)"),
    (lambda: decode_forward(lengths=(5, 5)), ValueError, "lengths has shape (2,)"),
    (lambda: decode_forward(dtype=np.float32), TypeError, "lengths has dtype float32"),
    (lambda: decode_forward(q=(1, 2, 17, 16)), ValueError, "use attention"),
    (lambda: decode_forward(window=0), ValueError, "window is 0"),
    (lambda: decode_forward(scale=-1.0), ValueError, "scale is -1.0"),
    (lambda: decode_forward(precision=""), ValueError, "precision is ''"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for *_, message in BAD])
def test_what_cannot_be_done_is_said(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value)
