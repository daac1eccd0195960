"""The kernels of kernels/gpu/elementwise.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, device, dtypes, host, normal, rounded, spaced
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import arguments, elementwise, tuning

from tinygrad_llm import functional as F  # noqa: N812

shapes = st.sampled_from([(1,), (3, 5), (2, 3, 33), (3, 64), (2, 70)])
FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, "tanh"),
}
NAMES = "activation", "activation vjp", "silu_multiply", "silu_multiply vjp", "dropout"


def small(draw):
    """Blocks that make several programs, and more than one in a row."""
    block = {"BLOCK": draw(st.sampled_from([16, 32, 128])), "num_warps": 1}
    return tuning.using(**dict.fromkeys(NAMES, block))


def activations(gpu, draw):
    dtype, shape, name = draw(dtypes), draw(shapes), draw(st.sampled_from(sorted(FUNCTIONS)))
    x = spaced(draw, rounded(normal(draw, *shape, scale=draw(st.sampled_from([1, 3]))), dtype))
    with small(draw):
        agrees(getattr(gpu, name), FUNCTIONS[name], [x], dtype, g=normal(draw, *shape), draw=draw)


def silu_multiply(gpu, draw):
    dtype, shape = draw(dtypes), draw(shapes)
    a, b = (spaced(draw, rounded(normal(draw, *shape, scale=2), dtype)) for _ in "ab")
    reference = lambda a, b: F.silu(a) * b  # noqa: E731
    with small(draw):
        agrees(gpu.silu_multiply, reference, [a, b], dtype, g=normal(draw, *shape), draw=draw)


def gelu_tail(gpu, draw):
    """Φ(x) far below 0 is right in each digit, where (1 + erf)/2 has none that is."""
    x = rounded(-6 * np.random.default_rng(draw(st.integers(0, 99))).random((2, 40)), "float32")
    y, _ = gpu.gelu.forward(device(x))
    expected = F.gelu(x.astype(np.float64)).data
    np.testing.assert_allclose(host(y), expected, rtol=4e-6, atol=1e-30)


def far_away(gpu, draw):
    """Numbers far from 0, where exponentials overflow, infinite ones, and NaN."""
    x = np.array([-np.inf, -300, -88, -30, -0.0, 0, 30, 88, 300, np.inf, np.nan], np.float32)
    ends = {"relu": 0, "silu": np.nan, "gelu": np.nan, "gelu_tanh": np.nan}  # -inf · 0, as the op
    with small(draw):
        for name, end in ends.items():
            y, saved = getattr(gpu, name).forward(device(x))
            np.testing.assert_allclose(host(y)[[0, -2, -1]], [end, np.inf, np.nan])
            np.testing.assert_allclose(host(y)[1:-2], np.maximum(x[1:-2], 0), atol=1e-11)
            x_bar = getattr(gpu, name).vjp(
                device(np.ones_like(x)), y, device(x), saved=saved, needs=(True,)
            )[0]
            np.testing.assert_allclose(host(x_bar)[1:4], 0, atol=1e-11)
            np.testing.assert_allclose(host(x_bar)[6:9], 1, rtol=1e-6)


# --- dropout --------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., 2011): counter (..., 4) and key (2,), words of 32 bits."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k_0, k_1, low = int(key[0]), int(key[1]), np.uint64(2**32 - 1)
    for _ in range(10):
        p_0, p_1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (p_1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k_0),
            p_1 & low,
            (p_0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k_1),
            p_0 & low,
        ]
        k_0, k_1 = (k_0 + 0x9E3779B9) % 2**32, (k_1 + 0xBB67AE85) % 2**32
    return np.stack(c, axis=-1)


def test_philox_is_the_published_one():
    """The known answers that come with the authors' own implementation."""
    pi = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], np.uint64)
    assert [hex(w) for w in philox(np.zeros(4, np.uint64), (0, 0))] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip
    assert [hex(w) for w in philox(pi, (0xA4093822, 0x299F31D0))] == [
        "0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1",
    ]  # fmt: skip


def kept(n, p, seed):
    """What seeded_dropout keeps of n elements, by NumPy."""
    k = np.arange(-(-n // 4))
    counter = np.stack([k % 2**32, k >> 32, 0 * k, 0 * k], axis=-1)
    bits = philox(counter, (seed % 2**32, seed >> 32)).reshape(-1)[:n]
    u = np.where(bits < 2**31, bits, 2**32 - 1 - bits) / 2**31
    return u >= p


def seeded_dropout(gpu, draw):
    dtype, shape = draw(dtypes), draw(shapes)
    p, seed = draw(st.sampled_from([0.1, 0.5, 0.75])), draw(st.integers(0, 2**63 - 1))
    options = {"seed": seed, "seed_offset": draw(st.sampled_from([0, 5, 2**62 + 3]))}
    if draw(st.booleans()):  # a word on the device, of any sign
        seed = draw(st.integers(-(2**63), 2**63 - 1))
        options["seed"] = device(np.full(draw(st.sampled_from([(), 1])), seed, np.int64))
    drawn = (seed + options["seed_offset"]) % 2**63
    keep = kept(np.prod(shape), p, drawn).reshape(shape) / (1 - p)
    x, g = rounded(normal(draw, *shape), dtype), normal(draw, *shape)
    reference = lambda x: F.where(keep > 0, x * (1 / (1 - p)), 0.0)  # noqa: E731
    with small(draw):
        agrees(gpu.seeded_dropout, reference, [x], dtype, g=g, p=p, **options)


def test_dropout_keeps_about_as_many_as_it_says_and_all_of_them_with_p_0():
    x = device(np.ones((50, 100), np.float32))
    for p in (0.0, 0.1, 0.9):
        y = host(elementwise.seeded_dropout.forward(x, p=p, seed=7)[0])
        assert abs((y > 0).mean() - (1 - p)) < 0.02
        np.testing.assert_allclose(y[y > 0], 1 / (1 - p), rtol=1e-6)
        assert np.array_equal(y.reshape(-1) > 0, kept(5000, p, 7))


CHECKS = [activations, silu_multiply, gelu_tail, far_away, seeded_dropout]
MUTANTS = {
    activations: [
        Mutant("0.0447", "0.044715 * (x * x))  # √(2/π)", "0.0447 * (x * x))  # √(2/π)"),
        Mutant(
            "√(2/π) is left out",
            "u = x * 0.7978845608028654 * (1 + 0.044715 * (x * x))  #",
            "u = x * (1 + 0.044715 * (x * x))  #",
        ),
        Mutant("no factor 3 in du", "1 + 3 * 0.044715", "1 + 0.044715"),
        Mutant("(1 - t²) without its 2", "(2 * s * (1 - s)) * du", "(s * (1 - s)) * du"),
        Mutant("a digit of P", "0.152649282", "0.152469282"),
        Mutant("Φ(-|x|) for Φ(x)", "tl.where(x < 0, tail, 1 - tail), e", "tail, e"),
        Mutant("φ without 2π", "* 0.3989422804014327", "* 1.0"),
        Mutant("relu hands g on everywhere", "tl.where(x <= 0, 0.0, g)", "g"),
        Mutant("silu's slope is σ", "s + x * s * (1 - s)", "s"),
        Mutant(
            "one element of a block is left out",
            "VALUE(x_j).to(y.dtype.element_ty), mask=j < n",
            "VALUE(x_j).to(y.dtype.element_ty), mask=j < n - 1",
        ),
        Mutant(
            "rows of g have x's stride",
            "g + i * stride_g + j, mask=j < n).to(tl.float32)\n    x_j",
            "g + i * stride_x + j, mask=j < n).to(tl.float32)\n    x_j",
        ),
        Mutant(
            "rows lie as if contiguous",
            "x + i * stride_x + j, mask=j < n).to(tl.float32)\n    tl.store(y + i * n + j, VALUE",
            "x + i * n + j, mask=j < n).to(tl.float32)\n    tl.store(y + i * n + j, VALUE",
        ),
    ],
    silu_multiply: [
        Mutant("ā without b", "_silu_vjp(g_j * b_j, a_j)", "_silu_vjp(g_j, a_j)"),
        Mutant("b̄ is g a", "b_bar_j = g_j * _silu(a_j)", "b_bar_j = g_j * a_j"),
        Mutant("the gate is b", "_silu(a_j) * b_j)", "_silu(b_j) * a_j)"),
    ],
    gelu_tail: [
        Mutant("the difference of two large numbers", "x < 0, tail,", "x < 0, 1.0 - (1.0 - tail),"),
    ],
    far_away: [
        Mutant("NaN becomes 0", "tl.where(x <= 0, 0.0, x)", "tl.where(x > 0, x, 0.0)"),
        Mutant(
            "tanh of exponentials",
            "return x * tl.sigmoid(2 * u)  #",
            "return x * tl.exp(2 * u) / (1 + tl.exp(2 * u))  #",
        ),
    ],
    seeded_dropout: [
        Mutant(
            "another seed in backward",
            '_dropped(g, "g", p, seed, seed_offset)',
            '_dropped(g, "g", p, seed, seed_offset ^ 1)',
        ),
        Mutant("no scale", "x_j * scale", "x_j"),
        Mutant("p is what is kept", "u >= p", "u < p"),
        Mutant("words in another order", "(tl.interleave(u_0, u_2)", "(tl.interleave(u_0, u_1)"),
        Mutant("blocks overlap", "block * (BLOCK // 4)", "block * (BLOCK // 8)"),
        Mutant(
            "a word on the device without the offset", "(tl.load(word) + seed)", "tl.load(word)"
        ),
        Mutant("a word on the device not modulo 2⁶³", " & 0x7FFFFFFFFFFFFFFF", ""),
        Mutant("a seed without the offset", "+ offset) % 2**63", ") % 2**63", arguments),
        Mutant("half of the seed", "tl.rand4x(seed,", "tl.rand4x(seed & 65535,"),
    ],
}
PLANTED = [
    pytest.param(check, mutant, id=mutant.name) for check in MUTANTS for mutant in MUTANTS[check]
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows, as with the ops


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, elementwise, examples=25)


@pytest.mark.parametrize("check, mutant", PLANTED)
def test_mutants_are_killed(check, mutant, tmp_path):
    assert harness.killed(elementwise, mutant, [check], tmp_path, examples=60)


def test_without_needs_nothing_is_computed():
    x = device(np.ones((3, 8), np.float32))
    for needs in [(True, False), (False, True), (False, False)]:
        found = elementwise.silu_multiply.vjp(x, x, x, x, saved=(), needs=needs)
        assert tuple(bar is not None for bar in found) == needs
    assert elementwise.gelu.vjp(x, x, x, saved=(), needs=(False,)) == (None,)


X = np.ones((3, 8), np.float32)
WRONG = [
    (lambda x: elementwise.gelu.forward(x.astype(np.int32)), TypeError, "x has dtype int32"),
    (lambda x: elementwise.gelu.forward(x.T), ValueError, "last axis of x has stride 8"),
    (lambda x: elementwise.gelu.forward(np.asarray(x[0, 0, ...])), ValueError, "x has shape ()"),
    (lambda x: elementwise.gelu.forward(x[:0]), ValueError, "at least one element"),
    (
        lambda x: elementwise.silu.vjp(x[:2], x, x, saved=(), needs=(True,)),
        ValueError,
        "g has shape (2, 8)",
    ),
    (lambda x: elementwise.silu_multiply.forward(x, x[:2]), ValueError, "b has shape (2, 8)"),
    (
        lambda x: elementwise.silu_multiply.forward(x, x.astype(np.float16)),
        TypeError,
        "b has dtype float16",
    ),
    (lambda x: elementwise.seeded_dropout.forward(x, p=1.0, seed=0), ValueError, "p is 1.0"),
    (lambda x: elementwise.seeded_dropout.forward(x, p=-0.1, seed=0), ValueError, "p is -0.1"),
    (lambda x: elementwise.seeded_dropout.forward(x, p=0.1, seed=-1), ValueError, "seed is -1"),
    (lambda x: elementwise.seeded_dropout.forward(x, p=0.1, seed=0.5), TypeError, "seed is 0.5"),
    (lambda x: elementwise.seeded_dropout.forward(x, p=0.1, seed=None), TypeError, "seed is None"),
    (
        lambda x: elementwise.seeded_dropout.forward(x, p=0.1, seed=x),
        TypeError,
        "seed has dtype float32; expected int64",
    ),
    (
        lambda x: elementwise.seeded_dropout.forward(x, p=0.1, seed=x.astype(np.int64)),
        ValueError,
        "seed has shape (3, 8); expected one element",
    ),
    (
        lambda x: elementwise.seeded_dropout.forward(x, p=0.1, seed=0, seed_offset=-1),
        ValueError,
        "seed_offset is -1",
    ),
    (
        lambda x: elementwise.seeded_dropout.forward(x[:, :4], p=0.1, seed=0),
        ValueError,
        "make it contiguous",
    ),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error) as raised:
        call(device(X))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
