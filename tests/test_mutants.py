"""The laws are tested: every planted mistake is found, right code is never accused, and what no law
can find is named."""

import contextlib
import copy
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tinygrad_llm import Tensor, backend
from tinygrad_llm.check import LAWS
from tinygrad_llm.check.mutants import MUTANTS, Generic, Mutant, forgotten, mutants, verdict
from tinygrad_llm.ops import TABLE, op

ENGINE = inspect.getmodule(Tensor)
FUNCTIONS = {mutant.where: mutant for mutant in MUTANTS}  # one mutant for each function


def of_a_kernel(mutant):
    return mutant.where.startswith("kernel ")


# --- every mistake is found -----------------------------------------------------------------------


def test_every_planted_bug_is_killed():
    """By the command itself, in a process of its own; with half as many examples as it has unless
    told, so that none is found by luck alone.
    """
    program = Path(sys.executable).with_name("tinygrad-llm")
    command = [program, "check", "--mutants", "--examples", "8"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    n = len(mutants())
    assert n >= 600 and f"\n{n} of {n} planted bugs killed: " in run.stdout
    assert "SURVIVED" not in run.stdout


def test_mistakes_in_an_op_of_your_own_are_found():
    @op("(),()->()", b="positive")
    class hypotenuse:  # noqa: N801
        """y = √(a² + b²)"""

        def forward(xp, a, b):  # noqa: N805
            return xp.sqrt(a * a + b * b)

        def vjp(xp, g, y, a, b):  # noqa: N805
            return g * a / y, g * b / y

    try:
        found = mutants(["hypotenuse"])
        assert len(found) == 13 and all(isinstance(m, Generic) for m in found)
        assert all(verdict(mutant).law for mutant in found)
    finally:
        del TABLE["hypotenuse"]


def test_each_op_each_kernel_and_the_engine_have_mistakes_made_by_hand():
    kernels = {m.subject for m in MUTANTS if of_a_kernel(m)}
    assert set(TABLE) - {m.subject for m in MUTANTS if not of_a_kernel(m)} == set()
    assert set(backend.CPU.kernels) - kernels == set()
    assert sum(m.subject == "engine" for m in MUTANTS) >= 10
    assert len({str(m) for m in MUTANTS}) == len(MUTANTS) >= 120


def test_the_law_that_found_it_is_named():
    (mutant,) = [m for m in MUTANTS if str(m) == "relu.vjp: the kink counts as positive"]
    found = verdict(mutant)
    assert found.mutant is mutant and found.law == "ties" and found.seconds > 0
    assert found.reason.startswith("relu breaks the law 'ties': wrong gradient of input 0")
    assert {verdict(m).law for m in mutants(["silu"])} <= {law.name for law in LAWS}


def test_mutants_of_some_ops():
    chosen = mutants(["softmax", "linear"])
    assert {m.subject for m in chosen} == {"softmax", "linear"}
    assert any(of_a_kernel(m) for m in chosen) and any(isinstance(m, Generic) for m in chosen)
    assert {m.subject for m in mutants()} == {*TABLE, "engine"}
    with pytest.raises(ValueError, match="no op named softmacs"):
        mutants(["softmacs"])


# --- the planting ---------------------------------------------------------------------------------


def innocent(where):
    """A mutant that is none: the same text again."""
    return Mutant("nothing is wrong", where, FUNCTIONS[where].old, FUNCTIONS[where].old)


ENGINES = [where for where, mutant in FUNCTIONS.items() if mutant.subject == "engine"]


@pytest.mark.parametrize("where", [where for where in FUNCTIONS if where not in ENGINES])
def test_planting_is_innocent(where):
    found = verdict(innocent(where), examples=1)
    assert found.law is None, found.reason


def test_planting_is_innocent_in_all_of_the_engine_at_once():
    """Each of its functions is tried on all of its ops, which takes seconds."""
    first, *others = map(innocent, ENGINES)
    with contextlib.ExitStack() as planted:
        for mutant in others:
            planted.enter_context(mutant.planted())
        found = verdict(first, examples=1)
    assert found.law is None, found.reason


def state():
    """All that a mutant might change for good: (what can be compared, functions and their code)."""
    scopes = [vars(ENGINE), vars(ENGINE.Tape), *map(vars, (backend, backend.ComplexStep))]
    functions = [getattr(f, "__func__", f) for scope in scopes for f in scope.values()]
    ops = [dict(vars(op)) for op in TABLE.values()]
    kernels = [dict(vars(kernel)) for kernel in backend.CPU.kernels.values()]
    readings = [(list(r), r.kernels.copy()) for r in (backend.MATHS, backend.CPU, backend.COMPLEX)]
    codes = [getattr(f, "__code__", None) for f in functions]
    return dict(TABLE), ops, kernels, readings, list(map(id, functions)), codes


@pytest.mark.parametrize("where", ["softmax.vjp", "sum._kept", "kernel attention._hide",
                                   "kernel linear.weight_gradients", "tensor._walk",
                                   "backend.ComplexStep._extremum"])  # fmt: skip
def test_everything_is_as_before_afterwards(where):
    verdict(FUNCTIONS[where])  # readings are filled in as ops are met
    before = state()
    verdict(FUNCTIONS[where])
    with contextlib.suppress(KeyError), FUNCTIONS[where].planted():
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("old, times", [("g - sum", 0), ("y", 2)])
def test_a_text_that_is_not_there_once_is_a_value_error(old, times):
    mutant = Mutant("some", "exp.vjp", old, "x")
    with pytest.raises(ValueError, match=rf"'exp.vjp: some' expects '{old}' .* {times} times"):
        verdict(mutant)


@pytest.mark.parametrize("new", ["g * z", "g * y.upside_down", "g * z)\n    z = (1"])
def test_a_mutant_that_does_not_even_run_is_a_value_error(new):
    with pytest.raises(ValueError, match=r"'exp\.vjp: a typo' does not run"):
        verdict(Mutant("a typo", "exp.vjp", "g * y", new))


def test_a_traceback_shows_the_mutants_own_lines():
    mutant = Mutant("a typo", "exp.vjp", "g * y", "g * z")
    with mutant.planted() as [(wrong, _)], pytest.raises(NameError) as error:
        wrong.vjp(np, 1.0, 1.0, 0.0)
    assert str(error.traceback[-1].statement).strip() == "return (g * z,)"


# --- what no law can find -------------------------------------------------------------------------


@dataclass(frozen=True)
class Consistent:
    """A wrong forward, and a vjp that is right for it: (function, old, new) for each change."""

    name: str
    changes: tuple

    @contextlib.contextmanager
    def planted(self):
        op = copy.copy(TABLE[self.name])
        for function, old, new in self.changes:
            change = Mutant("consistent", f"{op.name}.{function}", old, new)
            setattr(op, function, change.rewritten(getattr(op, function)))
        with forgotten(op):
            yield [(op, backend.MATHS)]


def normal(*shape):
    return np.random.default_rng([*shape]).standard_normal(shape)


T = np.array([0, 3, 1])
UNSEEN = {  # what is wrong: (the mutant, arrays, attributes, PyTorch's own function)
    "gelu_tanh with 0.0447": (
        Consistent(
            "gelu_tanh",
            (
                ("forward", "0.044715", "0.0447"),
                ("vjp", "(x + 0.044715", "(x + 0.0447"),
                ("vjp", "3 * 0.044715", "3 * 0.0447"),
            ),
        ),
        [normal(9)], {}, lambda x: F.gelu(x, approximate="tanh"),
    ),
    "silu is x σ(1.7 x)": (
        Consistent(
            "silu",
            (
                ("forward", "sigmoid(x)", "sigmoid(1.7 * x)"),
                ("vjp", "sigmoid(x)", "sigmoid(1.7 * x)"),
                ("vjp", "y * (1 - s)", "1.7 * y * (1 - s)"),
            ),
        ),
        [normal(9)], {}, F.silu,
    ),
    "relu leaks": (
        Consistent(
            "relu", (("forward", "0, x", "0.01 * x, x"), ("vjp", "0.0, g", "0.01 * g, g"))
        ),
        [normal(9)], {}, F.relu,
    ),
    "erfc is 1 too small for x < 0": (
        Consistent("erfc", (("forward", "2 - tail", "1 - tail"),)),
        [normal(9)], {}, torch.special.erfc,
    ),
    "layer_norm with ten times ε": (
        Consistent("layer_norm", (("forward", "+ eps", "+ 10 * eps"),)),
        [normal(3, 4), normal(4), normal(4)], {}, lambda x, w, b: F.layer_norm(x, (4,), w, b),
    ),
    "attention sees one key of the future": (
        Consistent("attention", (("forward", "k=n - T", "k=n - T + 1"),)),
        [normal(5, 4)] * 3, {"causal": True},
        lambda *qkv, causal: F.scaled_dot_product_attention(*qkv, is_causal=causal),
    ),
    "attention is scaled by 1/d": (
        Consistent(
            "attention",
            tuple((f, "1 / math.sqrt(q.shape[-1])", "1 / q.shape[-1]") for f in ("forward", "vjp")),
        ),
        [normal(5, 4)] * 3, {}, F.scaled_dot_product_attention,
    ),
    "cross_entropy is a sum": (
        Consistent("cross_entropy", (("forward", "0.0)) / N", "0.0))"), ("vjp", "g / N", "g"))),
        [normal(3, 4), T], {}, F.cross_entropy,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant, arrays, attributes, pytorchs", UNSEEN.values(), ids=UNSEEN)
def test_a_wrong_forward_with_a_vjp_that_fits_is_only_found_by_comparison(
    mutant, arrays, attributes, pytorchs
):
    found = verdict(mutant)
    assert found.law is None, found.reason

    def value(op):
        y = op.forward(backend.MATHS.space, *arrays, **attributes)
        return y[0] if op.saves else y

    expected = pytorchs(*map(torch.tensor, arrays), **attributes).numpy()
    np.testing.assert_allclose(value(TABLE[mutant.name]), expected, rtol=1e-12)
    with mutant.planted() as [(wrong, _)]:
        assert np.abs(value(wrong) - expected).max() > 1e-7
