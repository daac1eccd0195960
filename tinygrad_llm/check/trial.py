"""A law tried on an op: Hypothesis draws the calls, and shrinks the one that breaks it."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis.strategies import SearchStrategy

from .. import backend
from ..ops import Op
from .cases import Call

_FEWEST = 8  # examples for each of the op's example attributes


class LawError(AssertionError):
    """An op breaks a law. The message names the op, the law, the element and the arguments.

    cause   what was raised, if it was something else than the law
    """

    cause = None


@dataclass(frozen=True)
class Law:
    """A law: check(call) -> relative error, or None if it has nothing to say about this call.

    cases     (op, reading, attributes) -> a strategy for the arguments that it is tried on
    applies   (op, reading) -> whether it says anything about this op
    """

    check: Callable[[Call], float | None]
    cases: Callable[[Op, backend.Reading, dict], SearchStrategy]
    applies: Callable[[Op, backend.Reading], bool]

    name = property(lambda self: self.check.__name__)
    statement = property(lambda self: self.check.__doc__)


@dataclass(frozen=True)
class Trial:
    """One law for one op in one reading: trial() returns the worst relative error over the drawn
    examples, or raises LawError with the smallest failing example that Hypothesis finds. Each of
    the op's example attributes gets its turn.
    """

    law: Law
    op: Op
    reading: backend.Reading
    examples: int = 16
    seed: int = 0
    shrink: bool = True

    def __post_init__(self):
        if self.examples < 1:
            raise ValueError(f"examples is 1 or more, not {self.examples!r}")

    def __str__(self):
        return f"{self.op.name}-{self.law.name}{'-kernel' * self.on_kernel}"

    @property
    def on_kernel(self):
        """Whether it is the op's kernel that is tried, not its maths."""
        return self.op.name in self.reading.kernels

    def __call__(self):
        errors, call = [], None

        def holds(case):
            nonlocal call
            call = Call(self.op, self.reading, tuple(case[0]), case[1])
            with backend.using(self.reading), np.errstate(all="ignore"):
                error = self.law.check(call)
            if error is not None:
                errors.append(error)

        try:
            for i, attributes in enumerate(self.op.examples):
                given = hypothesis.given(self.law.cases(self.op, self.reading, attributes))
                seed = hypothesis.seed(self.seed + 1_000_003 * i)  # other arrays for each
                self._settings(seed(given(holds)))()
        except Exception as error:  # whatever an op raises on arguments of its signature is wrong
            where = "kernel of " if self.on_kernel else ""
            broken = LawError(
                f"{where}{self.op.name} breaks the law '{self.law.name}': {self._said(error)} "
                f"[tried with {call}]"
            )
            broken.cause = None if isinstance(error, AssertionError) else error
            raise broken from None
        if not errors:
            raise LawError(f"{self} was never tried: the law had nothing to say of any example")
        return max(errors)

    def _said(self, error):
        """What is wrong; and where in the op's file, if the op itself failed."""
        if isinstance(error, AssertionError):
            return str(error)
        file = self.op.vjp.__code__.co_filename
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        place = f"{Path(file).name}, line {lines[-1]}: " if lines else ""
        return f"{place}{type(error).__name__}: {error}"

    @property
    def _settings(self):
        fewest = min(_FEWEST, self.examples)
        return hypothesis.settings(
            max_examples=max(self.examples // len(self.op.examples), fewest),
            phases=[Phase.generate, Phase.shrink] if self.shrink else [Phase.generate],
            derandomize=False,  # the seed decides
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
