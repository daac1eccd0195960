"""What each technique of docs/speed.md gains: the same result without it and with it, at the sizes
of GPT-2. It is plain NumPy: without tinygrad_llm, the C library's allocator is as it always is.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import ThreadpoolController

from .measure import Method, Ratio, interleaved
from .report import Table, duration

BLOCK = 1 << 16  # numbers: 256 KB of float32
C = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Size:
    """Tokens N, the channels of a block and of its feed-forward network, tokens of a row, heads and
    their width, rows of logits, the vocabulary, parameters.
    """

    N: int = 1024
    width: int = 768
    inner: int = 3072
    T: int = 1024
    heads: int = 12
    d: int = 64
    rows: int = 128
    V: int = 50257
    P: int = 1 << 23


SIZES = {"gpt2": Size(), "tiny": Size(4, 8, 16, 8, 2, 4, 3, 11, 100)}


@dataclass(frozen=True)
class Pair:
    """Two functions with one result."""

    name: str
    without: Callable[[], np.ndarray]
    with_it: Callable[[], np.ndarray]


def pairs(size: Size, threads: int) -> list[Pair]:
    """Every technique, on random numbers."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    h, x, w = normal(size.N, size.inner), normal(size.N, size.width), normal(size.inner, size.width)
    flat, y, t = h.reshape(-1), np.empty(h.size, np.float32), np.empty(h.size, np.float32)
    q, k, v = normal(3, size.heads, size.T, size.d)
    logits, targets = normal(size.rows, size.V), rng.integers(0, size.V, size.rows)
    ids, table = rng.integers(0, size.V, size.N), np.zeros((size.V, size.width), np.float32)
    p, g = normal(2, size.P)
    state = [(p.copy(), np.zeros_like(p), np.zeros_like(p)) for _ in range(2)]
    pool, blas = ThreadPoolExecutor(threads), ThreadpoolController()
    shares = _cut(size.N, threads)

    def on_each(work, parts=None):
        """work(part) on a thread for each, by default parts of the tokens; BLAS with one thread."""
        with blas.limit(limits=1, user_api="blas"):
            list(pool.map(work, shares if parts is None else parts))

    layer = np.empty_like(h)

    def gelu_of(array, rows):  # in longer calls: see below
        gelu_in_blocks(array[rows].reshape(-1), y.reshape(h.shape)[rows].reshape(-1), 4 * BLOCK)

    def a_layer():
        np.matmul(x, w.T, out=layer)
        return gelu_in_blocks(layer.reshape(-1), y)

    def a_layer_shared_out():
        def work(rows):
            np.matmul(x[rows], w.T, out=layer[rows])
            gelu_of(layer, rows)

        on_each(work)
        return y

    def gelu_shared_out():
        on_each(lambda rows: gelu_of(h, rows))
        return y

    def normalised(rows_at_a_time):
        def work(rows):
            for start in range(rows.start, rows.stop, rows_at_a_time):
                part = slice(start, min(start + rows_at_a_time, rows.stop))
                normalise(x[part], normal_x[part])

        on_each(work)
        return normal_x

    normal_x, w_bars = np.empty_like(x), np.empty((threads, *w.shape), np.float32)
    columns = _cut(size.inner, threads)

    def w_bar_of_rows():
        def work(i):
            np.matmul(h[shares[i]].T, x[shares[i]], out=w_bars[i])

        on_each(work, range(threads))
        return np.sum(w_bars, axis=0)

    def w_bar_by_rows():
        def work(part):
            np.matmul(h[:, part].T, x, out=w_bars[0][part])

        on_each(work, columns)
        return w_bars[0]

    def fresh():
        return [np.add(h, 1) for _ in range(8)][-1]

    kept = [np.empty_like(h) for _ in range(8)]

    def in_kept():
        return [np.add(h, 1, out=a) for a in kept][-1]

    return [
        Pair("x * x * x for x**3", lambda: flat**3, lambda: flat * flat * flat),
        Pair("GELU in place", lambda: gelu(flat), lambda: gelu_in_place(flat, y, t)),
        Pair(
            "and in blocks that stay in the cache",
            lambda: gelu_in_place(flat, y, t),
            lambda: gelu_in_blocks(flat, y),
        ),
        Pair(f"and on {threads} threads", lambda: gelu_in_blocks(flat, y), gelu_shared_out),
        Pair("mean and variance by BLAS", lambda: moments(x), lambda: moments_by_blas(x)),
        Pair("sums of columns by BLAS", lambda: h.sum(0), lambda: np.ones(len(h), h.dtype) @ h),
        Pair(
            "attention: causal skip, 128 queries",
            lambda: attend(q, k, v, size.T),
            lambda: attend(q, k, v, 128),
        ),
        Pair(
            "cross-entropy's gradient in one array",
            lambda: logits_bar(logits, targets),
            lambda: logits_bar_in_place(logits, targets),
        ),
        Pair(
            "a loop over rows for np.add.at",
            lambda: scatter_at(table, ids, x),
            lambda: scatter_rows(table, ids, x),
        ),
        Pair(
            "AdamW in place, in blocks",
            lambda: adamw(*state[0], g),
            lambda: adamw_in_blocks(*state[1], g),
        ),
        Pair("8 arrays kept, not made anew", fresh, in_kept),
        Pair(
            "a layer with GELU, rows shared out",
            a_layer,
            a_layer_shared_out,
        ),
        Pair(
            "a layer's gradient in parts, not twice and added",
            w_bar_of_rows,
            w_bar_by_rows,
        ),
        Pair(
            f"on {threads} threads, longer calls",
            lambda: normalised(32),
            lambda: normalised(size.N),
        ),
        Pair(
            "8 rows: the matrix first",
            lambda: x[:8] @ w.T,
            lambda: (w @ x[:8].T).T,
        ),
    ]


def _cut(n, parts):
    """Slices that cover range(n)."""
    return [slice(*ends) for ends in itertools.pairwise(np.linspace(0, n, parts + 1).astype(int))]


def measure(size: str, method: Method, threads: int) -> tuple[dict, Table]:
    """Seconds and gain of each technique. ValueError if one changes the result."""
    columns = ["technique", "without", "with", "gain"]
    data, table = {}, Table(f"{size}: what a technique gains", columns)
    for pair in pairs(SIZES[size], threads):
        # More than rounding, less than any mistake: float32, and sums in another order.
        a, b = np.array(pair.without()), np.array(pair.with_it())
        if not np.abs(a - b).max() <= 1e-4 * np.abs(a).max():
            raise ValueError(f"{pair.name}: the results differ by {np.abs(a - b).max():.1e}")
        times = interleaved({"without": pair.without, "with": pair.with_it}, method)
        gain = Ratio.of(times["without"], times["with"])
        data[pair.name] = {key: timing.to_dict() for key, timing in times.items()}
        data[pair.name]["gain"] = gain.to_dict()
        cells = [duration(timing.median) for timing in times.values()]
        table.rows.append([pair.name, *cells, str(gain)])
    return data, table


NOTE = (
    "gain: the time without a technique over the time with it, the median over the rounds and, in "
    "parentheses, the quartiles. Each is tried alone, not in a training step. docs/speed.md says "
    "what it is for."
)


# --- without and with -----------------------------------------------------------------------------


def gelu(x):
    return 0.5 * x * (1 + np.tanh(C * (x + 0.044715 * (x * x * x))))


def gelu_in_place(x, y, t):
    np.multiply(x, x, out=t)
    t *= 0.044715 * C
    t += C
    t *= x
    np.tanh(t, out=t)
    np.add(t, 1, out=y)
    y *= 0.5
    y *= x
    return y


def gelu_in_blocks(x, y, block=BLOCK):
    t = np.empty(min(block, len(x)), x.dtype)
    for start in range(0, len(x), block):
        part = slice(start, min(start + block, len(x)))
        gelu_in_place(x[part], y[part], t[: part.stop - start])
    return y


def moments(x):
    return np.stack([x.mean(-1), x.var(-1)])


def moments_by_blas(x):
    n = x.shape[-1]
    mean = x @ np.ones(n, x.dtype) / n
    centred = x - mean[:, None]
    return np.stack([mean, np.vecdot(centred, centred) / n])


def normalise(x, y):
    n = x.shape[-1]
    np.subtract(x, (x @ np.ones(n, x.dtype) / n)[:, None], out=y)
    y *= 1 / np.sqrt(np.vecdot(y, y) / n + 1e-5)[:, None]
    return y


def attend(q, k, v, block):
    """Causal attention (H, T, d); one block: without any skip."""
    T, scale, y = q.shape[1], 1 / math.sqrt(q.shape[2]), np.empty_like(q)
    for start in range(0, T, block):
        n = min(start + block, T)  # keys that the block's last query sees
        P = q[:, start:n] @ k[:, :n].mT
        P *= scale
        P += np.where(np.tri(n - start, n, start, dtype=bool), np.float32(0), np.float32(-np.inf))
        P -= P.max(-1, keepdims=True)
        np.exp(P, out=P)
        P /= P.sum(-1, keepdims=True)
        np.matmul(P, v[:, :n], out=y[:, start:n])
    return y


def logits_bar(x, t):
    e = np.exp(x - x.max(-1, keepdims=True))
    P = e / e.sum(-1, keepdims=True)
    onehot = np.zeros_like(P)
    onehot[np.arange(len(t)), t] = 1
    return (P - onehot) / len(t)


def logits_bar_in_place(x, t):
    P = x - x.max(-1, keepdims=True)  # the step itself need not keep x
    np.exp(P, out=P)
    P *= 1 / (len(t) * P.sum(-1, keepdims=True))
    P[np.arange(len(t)), t] -= 1 / len(t)
    return P


def scatter_at(table, ids, g):
    table[ids] = 0
    np.add.at(table, ids, g)
    return table[ids]


def scatter_rows(table, ids, g):
    table[ids] = 0
    for i, row in zip(ids.tolist(), g):
        table[i] += row
    return table[ids]


LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.99, 1e-8, 0.1


def adamw(p, m, v, g):
    """As the formula stands, though p, m and v stay where they are; the first step's m̂, v̂."""
    m[:] = BETA1 * m + (1 - BETA1) * g
    v[:] = BETA2 * v + (1 - BETA2) * g**2
    m_hat, v_hat = m / (1 - BETA1), v / (1 - BETA2)
    p[:] = (1 - LR * DECAY) * p - LR * m_hat / (np.sqrt(v_hat) + EPS)
    return p


def adamw_in_blocks(p, m, v, g):
    c, work = math.sqrt(1 - BETA2), np.empty(min(BLOCK, len(p)), p.dtype)
    for start in range(0, len(p), BLOCK):
        part = slice(start, start + BLOCK)
        pi, mi, vi, gi = p[part], m[part], v[part], g[part]
        w = work[: len(pi)]
        np.subtract(gi, mi, out=w)
        w *= 1 - BETA1
        mi += w
        np.multiply(gi, gi, out=w)
        w *= 1 - BETA2
        vi *= BETA2
        vi += w
        np.sqrt(vi, out=w)
        w += c * EPS
        np.divide(mi, w, out=w)
        w *= LR * c / (1 - BETA1)
        pi *= 1 - LR * DECAY
        pi -= w
    return p
