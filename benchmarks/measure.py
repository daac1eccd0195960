"""Timing alternatives side by side: they take turns, so that whatever else the machine does meets
all of them alike. Standard library only.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Method:
    """How time is taken.

    rounds      turns that each alternative gets
    seconds     how long a turn lasts, about
    pause       seconds of rest before a turn
    clock       the time in seconds
    warm        whether a turn begins with a call that does not count
    """

    rounds: int
    seconds: float = 0.03
    pause: float = 0.0
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    warm: bool = True

    @classmethod
    def for_threads(cls, threads: int, rounds: int, seconds: float = 0.03) -> "Method":
        """One thread: CPU time, in which other jobs on the machine do not count. More: time on the
        wall, and a rest, since after its last product a BLAS keeps its other threads busy for so
        long, waiting for the next one, and would slow whoever comes then.
        """
        if threads == 1:
            return cls(rounds, seconds, clock=time.process_time)
        return cls(rounds, seconds, pause=0.1)

    def turn(self, call: Callable[[], object]) -> list[float]:
        """Durations of calls for the method's seconds, at least one."""
        if self.warm:
            call()
        durations, end = [], self.clock() + self.seconds
        while not durations or self.clock() < end:
            start = self.clock()
            call()
            durations.append(self.clock() - start)
        return durations


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers: median, and the quartiles between which half of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers) -> "Spread":
        numbers = list(numbers)
        if len(numbers) == 1:
            return cls(*numbers * 3)
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Seconds that one call takes.

    rounds      the median of the calls in each round
    best        what the fastest tenth of all calls takes at most: a machine at rest
    """

    rounds: tuple[float, ...]
    best: float

    @classmethod
    def of(cls, turns) -> "Timing":
        """From the durations of the calls in each turn."""
        calls = sorted(duration for turn in turns for duration in turn)
        return cls(tuple(map(statistics.median, turns)), calls[len(calls) // 10])

    @property
    def spread(self) -> Spread:
        return Spread.of(self.rounds)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def minus(self, other: "Timing") -> "Timing":
        """What this one takes more than the other, round by round."""
        rounds = tuple(a - b for a, b in zip(self.rounds, other.rounds, strict=True))
        return Timing(rounds, self.best - other.best)

    def per(self, count: int) -> "Timing":
        """The time of one part, if a call does `count` of them."""
        return Timing(tuple(seconds / count for seconds in self.rounds), self.best / count)

    def to_dict(self) -> dict:
        s = self.spread
        seconds = {"median": s.median, "low": s.low, "high": s.high, "best": self.best}
        return {"seconds": seconds, "rounds": list(self.rounds)}


@dataclass(frozen=True)
class Ratio:
    """How many times longer the peer takes: above 1, ours is faster.

    rounds      peer / ours in the same round, when the machine was equally busy
    best        the peer's best / our best, what a machine at rest would show
    """

    rounds: Spread
    best: float

    @classmethod
    def of(cls, peer: Timing, ours: Timing) -> "Ratio":
        pairs = zip(peer.rounds, ours.rounds, strict=True)
        return cls(Spread.of(p / o for p, o in pairs), peer.best / ours.best)

    def to_dict(self) -> dict:
        s = self.rounds
        return {"median": s.median, "low": s.low, "high": s.high, "best": self.best}

    def __str__(self):
        s = self.rounds
        return f"{s.median:.2f} ({s.low:.2f}-{s.high:.2f})"


def interleaved(alternatives: dict[str, Callable[[], object]], method: Method) -> dict[str, Timing]:
    """The time of a call of each alternative, measured in turns: A, B, C, A, B, C, ...

    A turn is a pause, one call that does not count (it wakes threads and fills caches), and then
    calls for the method's seconds, at least one; their median is the round's number. The first
    round is a warm-up and does not count either.
    """
    turns = {name: partial(method.turn, call) for name, call in alternatives.items()}
    return taking_turns(turns, method)


def taking_turns(turns: dict[str, Callable[[], list[float]]], method: Method) -> dict[str, Timing]:
    """The same for alternatives that time a turn of theirs themselves, perhaps in other
    processes: each gives the durations of its calls.
    """
    found = {name: [] for name in turns}
    for _ in range(method.rounds + 1):
        for name, turn in turns.items():
            method.sleep(method.pause)
            found[name].append(turn())
    return {name: Timing.of(those[1:]) for name, those in found.items()}
