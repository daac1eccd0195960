"""Where the time of a training step goes, op by op: a Reading whose Implementations look at the
clock before and after. The engine knows nothing of it.
"""

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable

from tinygrad_llm import backend


class Profile:
    """Seconds and calls of each op, forward and backward.

    with backend.using(profile.reading()):
        ...
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.seconds = defaultdict(float)  # (op name, "forward" or "backward") -> seconds
        self.calls = Counter()

    def reading(self, of: backend.Reading = backend.CPU) -> backend.Reading:
        """The same code as `of`, timed."""
        return _Timed(of, self)

    def clear(self) -> None:
        """Starts again from zero."""
        self.seconds.clear()
        self.calls.clear()

    def timed(self, function, name: str, direction: str):
        """The function, its time and calls counted here."""

        def run(*args, **keywords):
            start = self.clock()
            result = function(*args, **keywords)
            self.seconds[name, direction] += self.clock() - start
            self.calls[name, direction] += 1
            return result

        return run


class _Timed(backend.Reading):
    def __init__(self, of, profile):
        super().__init__(of.space, of.kernels)
        self.of, self.profile = of, profile
        self.fused = {name: self._timed(kernel, name) for name, kernel in of.fused.items()}

    def __missing__(self, op):
        self[op] = self._timed(copy.copy(self.of[op]), op.name)
        return self[op]

    def _timed(self, kernel, name):
        """The Implementation, or a subclass of the fused kernel, with its functions timed."""
        timed = type(kernel.__name__, (kernel,), {}) if isinstance(kernel, type) else kernel
        for function, direction in (("forward", "forward"), ("vjp", "backward")):
            timed_function = self.profile.timed(getattr(kernel, function), name, direction)
            setattr(timed, function, timed_function)
        return timed
