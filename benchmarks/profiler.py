"""Where the time of a training step goes, op by op: a Reading whose Implementations look at the
clock before and after. The engine knows nothing of it.
"""

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable

from tinygrad_llm import backend


class Profile:
    """Seconds and calls of each op, forward and backward: (op name, "forward" or "backward") -> ...

    with backend.using(profile.reading()):
        ...

    Where threads share a step out, these are the means of what each of them took.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._found = {}  # thread -> (seconds, calls): each writes to its own

    @property
    def seconds(self) -> dict[tuple[str, str], float]:
        return self._mean(0)

    @property
    def calls(self) -> dict[tuple[str, str], float]:
        return self._mean(1)

    def reading(self, of: backend.Reading = backend.CPU) -> backend.Reading:
        """The same code as `of`, timed."""
        return _Timed(of, self)

    def clear(self) -> None:
        """Starts again from zero."""
        self._found.clear()

    def timed(self, function, name: str, direction: str):
        """The function, its time and calls counted here."""

        def run(*args, **keywords):
            start = self.clock()
            result = function(*args, **keywords)
            taken = self.clock() - start
            seconds, calls = self._found.setdefault(threading.get_ident(), (Counter(), Counter()))
            seconds[name, direction] += taken
            calls[name, direction] += 1
            return result

        return run

    def _mean(self, which):
        total = Counter()
        for found in self._found.values():
            total.update(found[which])
        return {key: value / len(self._found) for key, value in total.items()}


class _Timed(backend.Reading):
    def __init__(self, of, profile):
        fused = {name: _timed_kernel(kernel, name, profile) for name, kernel in of.fused.items()}
        super().__init__(of.space, of.kernels, of.off, fused=fused)
        self.of, self.profile = of, profile

    def __missing__(self, op):
        implementation = copy.copy(self.of[op])
        implementation.forward = self.profile.timed(implementation.forward, op.name, "forward")
        implementation.vjp = self.profile.timed(implementation.vjp, op.name, "backward")
        self[op] = implementation
        return implementation


def _timed_kernel(kernel, name, profile):
    """A kernel for several ops, timed under its name."""
    methods = {"forward": "forward", "vjp": "backward"}
    found = {
        m: profile.timed(getattr(kernel, m), name, d)
        for m, d in methods.items()
        if hasattr(kernel, m)
    }
    return type(name, (kernel,), {m: staticmethod(f) for m, f in found.items()})
