"""The kernels of kernels/gpu/reduce.py."""

import gpu_harness as harness
import pytest
from gpu_harness import Mutant, agrees, dtypes, normal, rounded, spaced
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import reduce

from tinygrad_llm import functional as F  # noqa: N812


def softmax(gpu, draw):
    dtype, shape = draw(dtypes), draw(st.sampled_from([(1, 1), (3, 5), (2, 3, 33), (40, 70)]))
    x = spaced(draw, rounded(normal(draw, *shape, scale=draw(st.sampled_from([1, 30]))), dtype))
    agrees(gpu.softmax, F.softmax, [x], dtype, g=normal(draw, *shape))


CHECKS = [softmax]
MUTANTS = [
    Mutant("the sum has one term too few", "tl.sum(e, axis=0)", "tl.sum(tl.where(j > 0, e, 0))"),
    Mutant("the maximum is not subtracted", "x_j - tl.max(x_j, axis=0)", "x_j"),
    Mutant(
        "the last column is not written",
        "x_bar_j.to(x_bar.dtype.element_ty), mask=j < n",
        "x_bar_j.to(x_bar.dtype.element_ty), mask=j < n - 1",
    ),
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_maths(check):
    harness.run(check, reduce, examples=25)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    assert harness.killed(reduce, mutant, CHECKS, tmp_path)
