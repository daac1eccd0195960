"""Ops that act on each element by itself: one read of what is needed, one write.

Arrays that are all C-contiguous are one long row. Otherwise their rows may lie apart, evenly, as in
a[:, :n] of a wider matrix; this is as fast if the rows have a thousand elements or more.
"""

import triton
import triton.language as tl

from .arguments import needed, not_empty, number, rows, same, seed_parts
from .arrays import array, cdiv, next_power_of_2
from .driver import launch
from .tuning import configuration

KERNELS = ("relu", "silu", "gelu", "gelu_tanh")
FUSED = ("silu_multiply", "seeded_dropout")


# --- functions of one element, and their vjp ------------------------------------------------------


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # not x > 0: NaN must stay NaN


@triton.jit
def _relu_vjp(g, x):
    return tl.where(x <= 0, 0.0, g)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _silu_vjp(g, x):
    s = tl.sigmoid(x)
    return g * (s + x * s * (1 - s))


@triton.jit
def _normal(x):
    """Φ(x), with a small relative error however far x is below 0, and e^(-x²/2).

    Φ(-|x|) = t P(t) e^(-x²/2),  t = 1/(1 + 0.26 |x|). P is a least-squares fit at Chebyshev points
    of |x| < 14.5, beyond which float32 has no such small numbers; its relative error is 3e-8.
    """
    e = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.26 * tl.abs(x))
    P = 0.0307312265 * t - 0.153805976
    P = P * t + 0.253247371
    P = P * t - 0.152649282
    P = P * t + 0.16190548
    P = P * t + 0.050712977
    P = P * t + 0.103086953
    P = P * t + 0.103012101
    P = P * t + 0.103759143
    tail = t * P * e
    return tl.where(x < 0, tail, 1 - tail), e


@triton.jit
def _gelu(x):
    Phi, _ = _normal(x)
    return x * Phi


@triton.jit
def _gelu_vjp(g, x):
    Phi, e = _normal(x)
    phi = e * 0.3989422804014327  # 1/√(2π)
    return g * (Phi + x * phi)


@triton.jit
def _gelu_tanh(x):
    u = x * 0.7978845608028654 * (1 + 0.044715 * (x * x))  # √(2/π)
    return x * tl.sigmoid(2 * u)  # (1 + tanh u)/2 = σ(2u)


@triton.jit
def _gelu_tanh_vjp(g, x):
    u = x * 0.7978845608028654 * (1 + 0.044715 * (x * x))
    du = 0.7978845608028654 * (1 + 3 * 0.044715 * (x * x))
    s = tl.sigmoid(2 * u)  # t = 2s - 1, so (1 - t²)/2 = 2s (1 - s)
    return g * (s + x * (2 * s * (1 - s)) * du)


# --- over arrays ----------------------------------------------------------------------------------


@triton.jit
def _places(blocks, BLOCK: tl.constexpr):
    """This program's row, and its columns: one of the row's `blocks`."""
    p = tl.program_id(0)
    return (p // blocks).to(tl.int64), (p % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward(x, y, stride_x, n, blocks, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    i, j = _places(blocks, BLOCK)
    x_j = tl.load(x + i * stride_x + j, mask=j < n).to(tl.float32)
    tl.store(y + i * n + j, VALUE(x_j).to(y.dtype.element_ty), mask=j < n)


@triton.jit
def _vjp(
    g, x, x_bar, stride_g, stride_x, n, blocks, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i, j = _places(blocks, BLOCK)
    g_j = tl.load(g + i * stride_g + j, mask=j < n).to(tl.float32)
    x_j = tl.load(x + i * stride_x + j, mask=j < n).to(tl.float32)
    tl.store(x_bar + i * n + j, GRADIENT(g_j, x_j).to(x_bar.dtype.element_ty), mask=j < n)


class _Activation:
    """y = f(x), element by element, x of any shape with rows that are evenly spaced. y and x̄ are
    C-contiguous, x̄ has the dtype of x. Nothing is saved.
    """

    @classmethod
    def forward(cls, x):
        x = array(x, "x")
        count, n, strides = _as_rows(x=x)
        y = x.empty(x.shape)
        _launch("activation", _forward, (x, y), strides, count, n, VALUE=cls.value)
        return y.data, ()

    @classmethod
    def vjp(cls, g, y, x, *, saved, needs):
        if needed(needs, 1) == (False,):
            return (None,)
        g, x = array(g, "g"), array(x, "x")
        count, n, strides = _as_rows(x=x, g=g)
        x_bar = x.empty(x.shape)
        arrays, strides = (g, x, x_bar), reversed(strides)
        _launch("activation vjp", _vjp, arrays, strides, count, n, GRADIENT=cls.gradient)
        return (x_bar.data,)


class relu(_Activation):
    """y = x if x > 0 else 0

    x̄ = where(x ≤ 0, 0, g)"""

    value, gradient = _relu, _relu_vjp


class silu(_Activation):
    """y = x σ(x)

    s = σ(x)
    x̄ = g ⊙ (s + y ⊙ (1 - s))"""

    value, gradient = _silu, _silu_vjp


class gelu(_Activation):
    """y = x Φ(x),  Φ the normal distribution function

    φ = exp(-x² / 2) / √(2π)
    x̄ = g ⊙ (Φ + x ⊙ φ)"""

    value, gradient = _gelu, _gelu_vjp


class gelu_tanh(_Activation):
    """y = x/2 (1 + tanh u),  u = √(2/π) (x + 0.044715 x³)

    t = tanh(u)
    du = √(2 / π) (1 + 3 · 0.044715 x²)
    x̄ = g ⊙ (1 + t + x ⊙ (1 - t²) ⊙ du) / 2"""

    value, gradient = _gelu_tanh, _gelu_tanh_vjp


ACTIVATIONS = {f.__name__: f for f in (relu, silu, gelu, gelu_tanh)}

# --- SwiGLU's product -----------------------------------------------------------------------------


@triton.jit
def _silu_multiply_forward(a, b, y, stride_a, stride_b, n, blocks, BLOCK: tl.constexpr):
    i, j = _places(blocks, BLOCK)
    a_j = tl.load(a + i * stride_a + j, mask=j < n).to(tl.float32)
    b_j = tl.load(b + i * stride_b + j, mask=j < n).to(tl.float32)
    tl.store(y + i * n + j, (_silu(a_j) * b_j).to(y.dtype.element_ty), mask=j < n)


@triton.jit
def _silu_multiply_vjp(
    g, a, b, a_bar, b_bar, stride_g, stride_a, stride_b, n, blocks, BLOCK: tl.constexpr
):
    i, j = _places(blocks, BLOCK)
    g_j = tl.load(g + i * stride_g + j, mask=j < n).to(tl.float32)
    a_j = tl.load(a + i * stride_a + j, mask=j < n).to(tl.float32)
    if a_bar is not None:
        b_j = tl.load(b + i * stride_b + j, mask=j < n).to(tl.float32)
        a_bar_j = _silu_vjp(g_j * b_j, a_j)
        tl.store(a_bar + i * n + j, a_bar_j.to(a_bar.dtype.element_ty), mask=j < n)
    if b_bar is not None:
        b_bar_j = g_j * _silu(a_j)
        tl.store(b_bar + i * n + j, b_bar_j.to(b_bar.dtype.element_ty), mask=j < n)


class silu_multiply:
    """y = a σ(a) ⊙ b: a gated feed-forward's product (SwiGLU: Shazeer, 2020)

        s = σ(a)
        ā = g ⊙ b ⊙ (s + a s ⊙ (1 - s))
        b̄ = g ⊙ a s

    a and b have the same shape and dtype, and rows that are evenly spaced: they may be the halves
    of one matrix. y, ā and b̄ are C-contiguous. Nothing is saved.
    """

    @staticmethod
    def forward(a, b):
        a, b = array(a, "a"), array(b, "b")
        same("dtype", a=a, b=b)
        count, n, strides = _as_rows(a=a, b=b)
        y = a.empty(a.shape)
        _launch("silu_multiply", _silu_multiply_forward, (a, b, y), strides, count, n)
        return y.data, ()

    @staticmethod
    def vjp(g, y, a, b, *, saved, needs):
        g, a, b = array(g, "g"), array(a, "a"), array(b, "b")
        same("dtype", a=a, b=b)
        count, n, (stride_a, stride_b, stride_g) = _as_rows(a=a, b=b, g=g)
        a_bar, b_bar = (a.empty(a.shape) if need else None for need in needed(needs, 2))
        if a_bar or b_bar:
            arrays, strides = (g, a, b, a_bar, b_bar), (stride_g, stride_a, stride_b)
            _launch("silu_multiply vjp", _silu_multiply_vjp, arrays, strides, count, n)
        return tuple(None if bar is None else bar.data for bar in (a_bar, b_bar))[: len(needs)]


# --- dropout --------------------------------------------------------------------------------------


@triton.jit
def seed_of(word, seed):
    """What is drawn with: the number, or its sum with a word on the device, modulo 2⁶³."""
    if word is not None:
        seed = (tl.load(word) + seed) & 0x7FFFFFFFFFFFFFFF
    return seed


@triton.jit(do_not_specialize=["seed"])
def _dropout(x, y, n, p, scale, word, seed, BLOCK: tl.constexpr):
    """One Philox counter gives the numbers of four elements."""
    seed = seed_of(word, seed)
    block = tl.program_id(0).to(tl.int64)
    u_0, u_1, u_2, u_3 = tl.rand4x(seed, block * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    u = tl.interleave(tl.interleave(u_0, u_2), tl.interleave(u_1, u_3))
    j = block * BLOCK + tl.arange(0, BLOCK)
    x_j = tl.load(x + j, mask=j < n).to(tl.float32)
    y_j = tl.where(u >= p, x_j * scale, 0.0)
    tl.store(y + j, y_j.to(y.dtype.element_ty), mask=j < n)


class seeded_dropout:
    """y = keep ⊙ x,  keep = 1/(1-p) with probability 1-p, else 0: dropout that draws `keep` itself

        x̄ = keep ⊙ g

    keep is a function of the seed and of an element's place k in row-major order, whatever the
    chip: it is not 0 where u ≥ p, and u in [0, 1) is made, as by tl.rand, of word k mod 4 of
    Philox4x32-10 (Salmon et al., 2011) with counter k div 4 and the seed as its key. vjp draws it
    anew, so nothing is saved. x and g are C-contiguous.

    seed          0 to 2⁶³ - 1, or an int64 array on the device with one element, which is read when
                  the kernel runs: a CUDA graph that is replayed draws anew if the word has changed
    seed_offset   is added to it, modulo 2⁶³: places in a network that share a word have each their
                  own
    """

    @staticmethod
    def forward(x, *, p, seed, seed_offset=0):
        return _dropped(x, "x", p, seed, seed_offset), ()

    @staticmethod
    def vjp(g, y, x, *, p, seed, seed_offset=0, saved, needs):
        if needed(needs, 1) == (False,):
            return (None,)
        return (_dropped(g, "g", p, seed, seed_offset),)


def _dropped(x, name, p, seed, seed_offset):
    x = array(x, name)
    count, n, _ = _as_rows(**{name: x})
    if count > 1:
        raise ValueError(f"{name} has rows that lie apart: make it contiguous first")
    p = number(p, "p", lambda p: 0 <= p < 1, "a probability in [0, 1)")
    word, seed = seed_parts(seed, seed_offset)
    y = x.empty(x.shape)

    def run(config):
        grid = (cdiv(n, config["BLOCK"]),)
        launch(_dropout, grid, x, y, n, p, 1 / (1 - p), word, seed, **config)

    run(configuration("dropout", (x.dtype,), _blocks(x.dtype)[0], lambda: _blocks(x.dtype), run))
    return y.data


# --- launching ------------------------------------------------------------------------------------


def _as_rows(**named):
    """(rows, columns, strides of the rows) of arrays of the same shape: one row if all of them are
    contiguous.
    """
    not_empty(**named)
    same("shape", **named)
    counts, strides = zip(*(rows(x, name) for name, x in named.items()))
    count, n = counts[0], next(iter(named.values())).shape[-1]
    if all(stride == n for stride in strides):
        return 1, count * n, [count * n] * len(strides)
    return count, n, strides


def _blocks(dtype):
    """32 bytes of each array for each thread, or as much again, or half of it."""
    usual = 4096 // dtype.itemsize
    return [{"BLOCK": usual * k // 2, "num_warps": 4} for k in (2, 1, 4)]


def _launch(name, kernel, arrays, strides, count, n, **constants):
    """kernel(*arrays, *strides, n, blocks): each row in blocks, one for each program."""

    def run(config):
        config = {**config, "BLOCK": min(config["BLOCK"], next_power_of_2(n))}
        blocks = cdiv(n, config["BLOCK"])
        launch(kernel, (count * blocks,), *arrays, *strides, n, blocks, **constants, **config)

    dtype = arrays[0].dtype
    run(configuration(name, (dtype,), _blocks(dtype)[0], lambda: _blocks(dtype), run))
