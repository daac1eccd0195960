"""One side of a race of training steps. Each lives in a process of its own (worker.py), so that
neither finds there what the other has changed or left: threads, settings of the allocator, memory.
This file and torch_gpt.py import nothing of tinygrad_llm: PyTorch is as its users have it.
"""

import contextlib
import statistics
from collections import defaultdict

from . import machine
from .measure import Method

PHASES = ("gradients", "clip", "optimizer")
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}  # of AdamW
MAX_NORM = 1.0  # of the gradients


class Contestant:
    """Subclasses make a model, an optimizer and one batch, after this class's __init__, and have
    step(): forward, backward, clipping, AdamW; it returns the loss before the update.

    The batch is the same in every step: what a step costs does not depend on what it reads.
    `times` has the seconds of each phase and of each step.
    """

    def __init__(self, method: Method):
        self.method, self.times = method, defaultdict(list)
        machine.forget_peak()
        self._before = machine.resident("VmRSS")

    def losses(self, steps: int) -> list[float]:
        """Of the next steps."""
        return [self.step() for _ in range(steps)]

    def step_seconds(self) -> float:
        """How long a step takes, about."""
        return sum(self.phases().values())

    def begin(self, method: Method) -> None:
        """The race begins: what was timed so far does not count."""
        self.method = method
        self.times.clear()

    def turn(self) -> list[float]:
        return self.method.turn(self.step)

    def phases(self) -> dict[str, float]:
        """Median seconds of each."""
        return {name: statistics.median(self.times[name]) for name in PHASES}

    def peak(self) -> int | None:
        """Bytes that the process has had at most, less what it had before there was a model."""
        return machine.resident("VmHWM") - self._before if self._before else None

    @contextlib.contextmanager
    def phase(self, name: str):
        start = self.method.clock()
        yield
        self.times[name].append(self.method.clock() - start)


def torchs(*arguments) -> Contestant:
    """torch_gpt.Training(*arguments), for whoever has no need of PyTorch in its own process."""
    from .torch_gpt import Training

    return Training(*arguments)
