"""Several threads for NumPy: BLAS has them for its products, or a team has them for pieces of work.

Python runs one thread at a time, but NumPy lets the others go on while it computes. So a kernel can
`share` its blocks out among a team. BLAS itself has one thread then: after a product its own
threads stay awake for a while, in the way of the team's; and with a number that the machine or
OPENBLAS_NUM_THREADS chooses, other sums of the same numbers would have other last bits.
"""

import contextlib
import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController


class _Here(threading.local):
    team = 1  # threads that share() has, when called in this thread
    active = 1  # threads that compute at the same time, this one among them


_here = _Here()
_alone = threading.Lock()


def default_threads() -> int:
    """As many as this process has cores, up to 4: Python's own work is not shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


def blas() -> str:
    """What multiplies NumPy's matrices, and for which processor: "openblas 0.3.30 Haswell"."""
    found = _libraries().select(user_api="blas").info()
    names = ("internal_api", "version", "architecture")
    return ", ".join(" ".join(str(one.get(name)) for name in names) for one in found) or "unknown"


@contextlib.contextmanager
def team(n: int) -> Iterator[None]:
    """In the block, share() has n threads, this one among them, and BLAS has one.

    BLAS belongs to the whole process, and its threads to the Python thread that was first to set
    their number: so let one Python thread open teams. Raises ValueError unless n is 1 or more.
    """
    check_threads(n)
    with _libraries().limit(limits=1, user_api="blas"), _counting(n, n):
        yield


def check_threads(n: int) -> None:
    """Raises ValueError unless n is a number of threads."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"threads must be a whole number, at least 1, got {n!r}")


def size() -> int:
    """How many threads share() has here: 1 outside of team(), and in what is being shared out."""
    return _here.team


def active() -> int:
    """How many threads compute at the same time, this one among them. Each call of NumPy ends with
    a wait for Python, which another one has: so where there are several, calls should be long.
    """
    return _here.active


def alone() -> AbstractContextManager:
    """In the block, of the threads that compute at the same time only this one is in such a block:
    for a kernel made of many calls so short that they would wait for Python longer than they take.
    Meanwhile the others compute something longer. Nothing in the block may share() or wait.
    """
    return _alone if _here.active > 1 else contextlib.nullcontext()


def share(function: Callable, items: Iterable) -> list[Any]:
    """[function(item) for item in items], each by the thread of the team that is free next: one
    that the system wakes late then does less.

    What an item gives must not depend on who computes it, nor when: then it is the same every time.
    NumPy's settings (np.errstate) are those of the caller. What one raises is raised here, once the
    others have stopped; items that nobody has begun are left.
    """
    items = list(items)
    n = min(_here.team, len(items))
    if n <= 1:
        return [function(item) for item in items]
    results, places = [None] * len(items), iter(range(len(items)))

    def run():
        with _counting(1, n):
            try:
                for i in places:  # whose next() is one step of Python: no two get the same
                    results[i] = function(items[i])
            except BaseException:
                deque(places, 0)  # takes what is left, so that nobody begins it
                raise

    others = [_pool(n - 1).submit(contextvars.copy_context().run, run) for _ in range(n - 1)]
    try:
        run()
    finally:  # a thread that has not begun yet has nothing left to do, and may never come
        others = [other for other in others if not other.cancel()]
        wait(others)
    for other in others:
        other.result()  # raises what was raised there
    return results


@contextlib.contextmanager
def _counting(team, active):
    before = _here.team, _here.active
    _here.team, _here.active = team, active
    try:
        yield
    finally:
        _here.team, _here.active = before


@functools.cache
def _libraries():
    return ThreadpoolController()


@functools.cache
def _pool(n):
    return ThreadPoolExecutor(n, "team")


def _forget_others():
    global _alone
    _alone = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):  # a forked child has this thread only
    os.register_at_fork(after_in_child=_forget_others)
