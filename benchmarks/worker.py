"""An object in a process of its own. CuPy and PyTorch keep what memory of the GPU they once got, so
who is measured lives alone: what it holds, and whether it fits, is then nobody else's doing.
"""

import contextlib
import math
import multiprocessing
import signal
import threading
import time


class WorkerError(Exception):
    """What a worker could not do, in one line."""


class OutOfMemoryError(WorkerError):
    """There was no room for it."""


class Worker:
    """factory(*arguments), made and used in a new process, whose methods are called by name.

    deadline    on time.monotonic's clock: whoever works then is ended
    """

    def __init__(self, factory, *arguments, deadline=math.inf):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # No daemon, as torch.compile starts processes, too: whoever makes a worker closes it.
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments))
        with _deaf():
            self._process.start()
        theirs.close()
        self.deadline = deadline

    def call(self, method: str, *arguments, **options):
        """What the method returns. Raises WorkerError for what it raised, OutOfMemoryError if that
        was why; WorkerError, too, for a process that has ended, and at the deadline.
        """
        try:
            self._pipe.send((method, arguments, options))
            left = max(self.deadline - time.monotonic(), 0.1)
            if not self._pipe.poll(None if math.isinf(left) else left):
                self.close(wait=0)
                raise WorkerError("out of time")
            kind, result = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerError("its process has ended") from None
        if kind is not None:
            raise kind(result)
        return result

    def close(self, wait: float = 2) -> None:
        """Ends the process, whatever it does. One that waits for a call ends by itself, and has so
        many seconds for it.
        """
        self._pipe.close()
        self._process.join(wait)
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe, factory, arguments):
    """The other process: makes the object, then does what it is told to until nobody listens."""
    made, why = None, None
    try:
        made = factory(*arguments)
    except Exception as error:
        why = _explained(error)
    while True:
        try:
            method, given, options = pipe.recv()
        except (EOFError, OSError):
            return
        answer = why
        if made is not None:
            try:
                answer = None, getattr(made, method)(*given, **options)
            except Exception as error:
                answer = _explained(error)
        try:
            pipe.send(answer)
        except OSError:  # nobody listens any more
            return


@contextlib.contextmanager
def _deaf():
    """Processes started inside ignore Ctrl-C, which a terminal sends to all: their maker, who hears
    it, ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _explained(error):
    """(the class to raise, its line)."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return OutOfMemoryError, "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return WorkerError, f"{type(error).__name__}: {lines[0][:200]}"
