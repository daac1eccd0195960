"""The kernels of kernels/gpu/position.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, device, dtypes, host, normal, rounded
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import position, tuning

from tinygrad_llm import functional as F  # noqa: N812

shapes = st.sampled_from([(1, 1, 1, 2), (2, 3, 5, 8), (1, 5, 4, 12), (3, 2, 7, 16)])


def tables(times, d, base=10000.0):
    """cos and sin of t · base^(-2k/d), (times, d/2) in float32."""
    angle = np.arange(times)[:, None] * base ** (-2 * np.arange(d // 2) / d)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def turned(x, cos, sin, start, interleaved):
    """The maths, of Tensors and constants."""
    T, d = x.shape[2:]
    cos, sin = (a.astype(np.float64)[start : start + T] for a in (cos, sin))
    k = np.arange(d).reshape(-1, 2).T if interleaved else np.arange(d).reshape(2, -1)
    x_1, x_2 = x[..., k[0]], x[..., k[1]]
    y = F.concat([x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin], axis=-1)
    return y[..., np.argsort(np.concatenate([k[0], k[1]]))]


def heads(draw, x):
    """The same numbers as they are, or as a view of (B, T, H, d), or with gaps."""
    way = draw(st.sampled_from(["as it is", "times first", "gaps"]))
    if way == "times first":
        return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
    if way == "gaps":
        wide = np.full((*x.shape[:2], x.shape[2] + 1, x.shape[3] + 3), 77, x.dtype)
        wide[:, :, : x.shape[2], : x.shape[3]] = x
        return wide[:, :, : x.shape[2], : x.shape[3]]
    return x


class Constants:
    """rope with cos and sin as constants, as harness.agrees takes it; g has strides, too."""

    def __init__(self, kernel, cos, sin, draw):
        self.kernel, self.constants, self.draw = kernel, (device(cos), device(sin)), draw

    def forward(self, x, **attributes):
        return self.kernel.forward(x, *self.constants, **attributes)

    def vjp(self, g, y, x, *, needs, **rest):
        g = device(heads(self.draw, host(g)))
        needs = *needs, True, True
        x_bar, *nothing = self.kernel.vjp(g, y, x, *self.constants, needs=needs, **rest)
        assert nothing == [None, None]
        return (x_bar,)


def rope(gpu, draw):
    dtype, shape = draw(dtypes), draw(shapes)
    start, interleaved = draw(st.sampled_from([0, 1, 3])), draw(st.booleans())
    cos, sin = tables(start + shape[2] + draw(st.sampled_from([0, 4])), shape[3])
    gap = draw(st.sampled_from([0, 5]))
    cos = np.pad(cos, ((0, 0), (0, gap)), constant_values=77)[:, : shape[3] // 2]
    x, g = heads(draw, rounded(normal(draw, *shape), dtype)), normal(draw, *shape)
    D = 1 << (shape[3] - 1).bit_length()
    tile = {"HEADS": draw(st.sampled_from([1, 2, 4])), "TIMES": draw(st.sampled_from([1, 2, 4]))}
    reference = lambda x: turned(x, cos, sin, start, interleaved)  # noqa: E731
    with tuning.using(rope={**tile, "D": D, "num_warps": 1}):
        kernel = Constants(gpu.rope, cos, sin, draw)
        agrees(kernel, reference, [x], dtype, g=g, start=start, interleaved=interleaved)


CHECKS = [rope]
MUTANTS = [
    Mutant("backwards is forwards", "s = -s", "s = s"),
    Mutant(
        "x_1 twice",
        "y_2 = x_1 * c - x_2 * s, x_2 * c + x_1 * s",
        "y_2 = x_1 * c - x_2 * s, x_2 * c + x_2 * s",
    ),
    Mutant("the sign of the sine", "tl.join(x_1 * c - x_2 * s", "tl.join(x_1 * c + x_2 * s"),
    Mutant("start is ignored for sin", "sin + (start + t)", "sin + (0 * start + t)"),
    Mutant("start is added twice", "cos + (start + t)", "cos + (2 * start + t)"),
    Mutant("the sine's rows have the cosine's stride", "* stride_sin + k", "* stride_cos + k"),
    Mutant(
        "heads and times are swapped",
        "h.to(tl.int64) * stride_xh + t.to(tl.int64) * stride_xt",
        "h.to(tl.int64) * stride_xt + t.to(tl.int64) * stride_xh",
    ),
    Mutant("every sequence is the first", "b = (p // spans // groups)", "b = (p * 0)"),
    Mutant("pairs are neighbours", "tl.load(x + d // 2 + k", "tl.load(x + 1 + k"),
    Mutant(
        "the last pair is not written",
        "y_2.to(y.dtype.element_ty), mask=inside",
        "y_2.to(y.dtype.element_ty), mask=inside & (k < d // 2 - 1)",
    ),
    Mutant("interleaved is ignored", '"INTERLEAVED": interleaved', '"INTERLEAVED": False'),
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, position, examples=30)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    assert harness.killed(position, mutant, CHECKS, tmp_path, examples=40)


def test_scores_depend_on_the_distance_alone():
    """The point of it: q at t · k at s is a function of t - s."""
    rng = np.random.default_rng(0)
    q, k = (np.tile(rng.standard_normal(16).astype(np.float32), (1, 1, 6, 1)) for _ in "qk")
    cos, sin = (device(a) for a in tables(20, 16))
    for start in (0, 9):
        turned_q, turned_k = (
            host(position.rope.forward(device(a), cos, sin, start=start)[0])[0, 0] for a in (q, k)
        )
        S = turned_q @ turned_k.T
        for distance in range(-5, 6):
            line = np.diagonal(S, distance)
            assert np.abs(line - line[0]).max() < 1e-4


def test_without_needs_nothing_is_computed():
    x = device(X)
    cos, sin = (device(a) for a in tables(4, 8))
    found = position.rope.vjp(x, x, x, cos, sin, saved=(), needs=(False, False, False))
    assert found == (None, None, None)


X = np.ones((2, 3, 4, 8), np.float32)
WRONG = [
    (
        lambda x, c: position.rope.forward(x[0], c, c),
        ValueError,
        "x has shape (3, 4, 8); expected 4 axes",
    ),
    (
        lambda x, c: position.rope.forward(x[..., :7], c, c),
        ValueError,
        "x has 7 numbers for each head",
    ),
    (
        lambda x, c: position.rope.forward(x[..., ::2], c, c),
        ValueError,
        "last axis of x has stride 2",
    ),
    (lambda x, c: position.rope.forward(x[:, :0], c, c), ValueError, "at least one element"),
    (
        lambda x, c: position.rope.forward(x, c, c, start=1),
        ValueError,
        "cos has 4 rows; expected at least 5",
    ),
    (lambda x, c: position.rope.forward(x, c, c, start=-1), ValueError, "start is -1"),
    (
        lambda x, c: position.rope.forward(x, c[:, :3], c),
        ValueError,
        "cos has shape (4, 3); expected (4, 4)",
    ),
    (
        lambda x, c: position.rope.forward(x, c, c[:3]),
        ValueError,
        "sin has shape (3, 4); expected (4, 4)",
    ),
    (
        lambda x, c: position.rope.forward(x, c.astype(np.float16), c),
        TypeError,
        "cos has dtype float16; expected float32",
    ),
    (
        lambda x, c: position.rope.forward(x.astype(np.float64), c, c),
        TypeError,
        "x has dtype float64",
    ),
    (
        lambda x, c: position.rope.vjp(x[:1], x, x, c, c, saved=(), needs=(True,) * 3),
        ValueError,
        "g has shape (1, 3, 4, 8)",
    ),
]


@pytest.mark.parametrize("call, error, message", WRONG)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error) as raised:
        call(device(X), device(tables(4, 8)[0]))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
