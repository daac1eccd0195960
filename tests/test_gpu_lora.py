"""The kernels of kernels/gpu/lora.py."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import Mutant, agrees, close, device, dtypes, normal, rounded
from hypothesis import strategies as st
from test_gpu_linear import array, matrices, row_arrays, sizes, small_tiles
from tinygrad_llm.kernels.gpu import lora

from tinygrad_llm import functional as F  # noqa: N812

MATHS = lambda x, w, A, B, b=None, scale=1.0: (  # noqa: E731
    F.linear(x, w, b) + F.linear(F.linear(x, A), B) * scale
)


def drawn(draw, dtype, rank):
    (n, k, m), scale = sizes(draw, 3), draw(st.sampled_from([0.5, 2.0]))
    arrays = [
        row_arrays(draw, dtype, n, k),
        matrices(draw, dtype, m, k),
        matrices(draw, dtype, rank, k),
        matrices(draw, dtype, m, rank),
        rounded(normal(draw, m), dtype),
    ]
    return arrays, scale, normal(draw, n, m)


def whole(gpu, draw):
    dtype, rank = draw(dtypes), draw(st.sampled_from([8, 3, 24, 40]))
    arrays, scale, g = drawn(draw, dtype, rank)
    arrays = arrays[: draw(st.sampled_from([5, 4]))]
    reference = lambda *arrays: MATHS(*arrays, scale=scale)  # noqa: E731
    with small_tiles(draw):
        agrees(gpu.lora, reference, arrays, dtype, g=g, scale=scale)


def frozen(gpu, draw):
    """Gradients of A and B alone, added to float32 arrays; w and x get none."""
    arrays, scale, g = drawn(draw, "float32", 8)
    before = [normal(draw, *arrays[i].shape).astype(np.float32) for i in (2, 3)]
    into = (None, None, *(device(x.copy()) for x in before), None)
    on_device, needs = [device(x) for x in arrays], (False, False, True, True, False)
    g = g.astype(np.float32)
    with small_tiles(draw):
        y, saved = gpu.lora.forward(*on_device, scale=scale)
        found = gpu.lora.vjp(
            device(g), y, *on_device, saved=saved, needs=needs, scale=scale, into=into
        )
    reference = lambda *arrays: MATHS(*arrays, scale=scale)  # noqa: E731
    _, *expected = harness.truth(reference, arrays, "float32", g.astype(np.float64))
    assert [x is not None for x in found] == list(needs)
    for i in (2, 3):
        value, unit = expected[i]
        assert found[i] is into[i]
        close(found[i], (value + before[i - 2], unit))


CHECKS = {whole: 5, frozen: 3}  # and how often
MUTANTS = {  # which check is to find them
    whole: [
        Mutant("no scale forward", "A, h, Finish(alpha=scale)", "A, h, Finish()"),
        Mutant("no scale backward", "precision, finish=Finish(alpha=scale)", "precision"),
        Mutant("no update forward", "y, Finish(b), more=more", "y, Finish(b)"),
        Mutant("no update backward", "precision, x_into, more=more", "precision, x_into"),
        Mutant("the bias is left out", "y, Finish(b)", "y, Finish()"),
    ],
    frozen: [Mutant("B's gradient is not added", "needs_B, w_into=B_into", "needs_B")],
}


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, lora, examples=CHECKS[check])


@pytest.mark.parametrize("check, mutant", [(check, m) for check in MUTANTS for m in MUTANTS[check]])
def test_mutants_are_killed(check, mutant, tmp_path):
    assert harness.killed(lora, mutant, [check], tmp_path)


BAD = [
    (lambda: lora.lora.forward(array(3, 4), array(6, 4), array(2, 5), array(6, 2)), "A has shape"),
    (lambda: lora.lora.forward(array(3, 4), array(6, 4), array(2, 4), array(6, 3)), "B has shape"),
    (lambda: lora.lora.forward(array(3, 4), array(6, 4), array(2, 4), array(5, 2)), "B has shape"),
    (lambda: lora.lora.forward(array(3, 4), array(6, 4), array(0, 4), array(6, 0)), "at least one"),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
