"""Every op of the table, whoever added it: its vjp by complex step, and by PyTorch's autograd run
over the op's own forward. Nobody lists an op here."""

import pytest
from hypothesis import given, settings
from strategies import arguments, call

from tinygrad_llm import backend
from tinygrad_llm.check import gradcheck
from tinygrad_llm.ops import TABLE

OPS = list(TABLE.values())
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
readings = pytest.mark.parametrize("reading", ["MATHS", "CPU"])


@readings
@every_op
def test_vjp_agrees_with_complex_step(op, reading):
    @settings(max_examples=20)
    @given(arguments(op))
    def law(case):
        arrays, attributes = case
        f, xs = call(op, arrays, attributes)
        with backend.using(getattr(backend, reading)):
            error = gradcheck(f, *xs, directions=2)
        assert error < 1e-9

    law()
