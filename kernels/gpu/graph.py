"""CUDA graphs: what a function does on the GPU, recorded once and from then on launched as a whole.

    staging = Staging({"ids": ((16, 1024), "int32"), "lr": ((), "float32")})
    graph = Graph(lambda: step(**staging.arrays))     # runs it twice, then records it
    readback = Readback()
    for ids, lr in batches:
        staging.fill(ids=ids, lr=lr)
        graph.replay()
        readback.start(graph.result)
    loss = readback.wait()                            # the only line that waits for the GPU

A training step is a thousand launches, and Python takes longer for each than the GPU for many of
them. A graph is one launch. What it does is frozen: the same kernels with the same addresses and
the same Python numbers. What changes from one replay to the next has to be in the arrays that it
reads. In the interpreter graphs are simulated: see simulated.py.
"""

import contextlib
import gc
import math
import numbers
import sys

import numpy as np

from . import driver, simulated
from .arguments import integer
from .arrays import home


class GraphError(RuntimeError):
    """Of this function no graph can be made: the message says why."""


class Graph:
    """What function() does on the device, to be done again by `replay`.

    function   without arguments. It computes with CuPy and the kernels of kernels/gpu, on the
               current stream, but not with CUDA's libraries (CuPy refuses cuBLAS in a capture); it
               must not read a value of the device, copy from ordinary memory of the host (uploads
               by kernels are fine) or decide anything by what changes
    warmups    how often it runs for real before it is recorded: at least once, as kernels are
               compiled, tuned and loaded on the way. Recording itself changes no array

    result     what the recorded call returned: its arrays are filled by each replay
    memory     bytes of the device that the graph holds

    Arrays that function() makes lie in a memory pool of the graph's own, so that nobody else gets
    the memory of its temporaries. Those that it finds have to stay where they are: the graph keeps
    `function` alive, and with it what that refers to. GraphError if it cannot be recorded; what a
    warm-up raises is passed on, and so is MemoryError.
    """

    def __init__(self, function, warmups=2):
        if not callable(function):
            raise TypeError(f"function is a {type(function).__name__}; expected a function")
        integer(warmups, "warmups", 1)
        if driver.recording() is not None:
            raise GraphError("a graph is being recorded already: record one after the other")
        self.function = function
        self._captured = _Simulated() if home().module == "simulated" else _Captured()
        self.result = self._captured.record(function, warmups)

    memory = property(lambda self: self._captured.memory)

    def replay(self):
        """Everything again, on the current stream. The host does not wait for it."""
        self._captured.replay()


@contextlib.contextmanager
def _explained():
    """What goes wrong inside is a GraphError of one line."""
    try:
        yield
    except (GraphError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise GraphError(
            f"no graph can be made of this function: {why} (while it is recorded, nothing may "
            "read the device's values, copy from pageable memory or wait)"
        ) from error


class _Simulated:
    """With DeviceArrays."""

    def record(self, function, warmups):
        for _ in range(warmups):
            function()
        self._recording = simulated.Recording()
        with _explained():
            return self._recording.record(function)

    memory = property(lambda self: self._recording.memory)

    def replay(self):
        self._recording.replay()


class _Captured:
    """With CuPy. Everything happens on a stream of its own: the null stream cannot be captured."""

    def __init__(self):
        self.pinned = []  # what copies in the graph read: CuPyHome puts it here
        self._cuda = sys.modules["cupy"].cuda
        self._pool = self._cuda.MemoryPool()
        self._stream = self._cuda.Stream(non_blocking=True)

    def record(self, function, warmups):
        # Memory that nobody uses: the pool of the graph cannot take it from the usual one.
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        current, stream = self._cuda.get_current_stream(), self._stream
        stream.wait_event(current.record())
        try:
            with self._cuda.using_allocator(self._pool.malloc), stream:
                for _ in range(warmups):
                    function()
                gc.collect()  # so that the capture need not free what the warm-ups left behind
                with _explained():
                    result = self._capture(function)
        finally:
            current.wait_event(stream.record())  # whatever comes next reads what the warm-ups wrote
        self._graph.upload()
        return result

    def _capture(self, function):
        # In relaxed mode, as the pool and pinned memory may have to grow, which calls cudaMalloc.
        self._stream.begin_capture(self._cuda.runtime.streamCaptureModeRelaxed)
        try:
            with driver.recording_into(self):
                result = function()
        except BaseException:
            with contextlib.suppress(Exception):  # it may be broken already: the stream is not
                self._stream.end_capture()
            raise
        self._graph = self._stream.end_capture()
        return result

    @property
    def memory(self):
        return self._pool.total_bytes()

    def replay(self):
        self._graph.launch()


# --- from the host and back -----------------------------------------------------------------------


class Staging:
    """Arrays on the device that stay where they are, and are filled without waiting.

    shapes   {name: (shape, dtype)}: {"ids": ((16, 1024), "int32"), "lr": ((), "float32")}
    slots    how many fillings may be under way before one has to wait for an earlier one

    arrays   {name: array on the device}, of zeros at first: for the function that is recorded
    """

    def __init__(self, shapes, slots=3):
        integer(slots, "slots", 1)
        self._home, self._next = home(), 0
        self.arrays = {name: self._home.empty(*kind) for name, kind in shapes.items()}
        for there in self.arrays.values():
            self._home.fill_zero(there)
        self._slots = [
            {name: self._home.empty_pinned(*kind) for name, kind in shapes.items()}
            for _ in range(slots)
        ]
        self._events = [None] * slots

    def fill(self, **values):
        """Copies NumPy arrays, or numbers for arrays without axes, to the device, on the current
        stream: first to pinned memory, so that the caller may go on and change them.

        ValueError, before anything is copied, for another name, shape or dtype.
        """
        _outside_of_a_recording("Staging.fill")
        found = {name: self._checked(name, value) for name, value in values.items()}
        slot, self._next = self._next, (self._next + 1) % len(self._slots)
        _wait_for(self._events[slot])
        for name, value in found.items():
            pinned = self._slots[slot][name]
            pinned[...] = value
            self.arrays[name].set(pinned)
        self._events[slot] = self._home.event()

    def _checked(self, name, value):
        if name not in self.arrays:
            raise ValueError(f"{name!r} is none of the arrays: {', '.join(self.arrays)}")
        there = self.arrays[name]
        if isinstance(value, numbers.Real) and not there.shape:
            return _number(value, name, there.dtype)
        if type(value) is not np.ndarray:
            number = " or a number" if not there.shape else ""
            raise ValueError(f"{name} is a {type(value).__name__}; expected a NumPy array{number}")
        if value.shape != there.shape or value.dtype != there.dtype:
            raise ValueError(
                f"{name} has shape {value.shape} and dtype {value.dtype}; expected {there.shape} "
                f"and {there.dtype}"
            )
        return value


def _number(value, name, dtype):
    """The number as that dtype; ValueError if an integer dtype does not have it."""
    if dtype.kind in "biu":
        fits = value in (0, 1) if dtype.kind == "b" else _in_range(value, np.iinfo(dtype))
        if not fits:
            raise ValueError(f"{name} is {value}; expected a number that {dtype} can hold")
    return np.array(value).astype(dtype)


def _in_range(value, limits):
    return math.isfinite(value) and value == int(value) and limits.min <= value <= limits.max


class Readback:
    """Copies of small arrays to the host, which are waited for only when they are needed."""

    def __init__(self):
        self._home, self._pinned, self._event = home(), None, None

    def start(self, array):
        """Copies the array to pinned memory, on the current stream, without waiting. Its contents
        then may change: the copy comes first. What was started before is given up.
        """
        _outside_of_a_recording("Readback.start")
        if self._pinned is None or (self._pinned.shape, self._pinned.dtype) != (
            array.shape, array.dtype,
        ):  # fmt: skip
            _wait_for(self._event)  # whose memory is about to be someone else's
            self._pinned = self._home.empty_pinned(array.shape, array.dtype)
        array.get(out=self._pinned, blocking=False)
        self._event = self._home.event()

    def wait(self):
        """The array as NumPy, when it is there. RuntimeError if none was started."""
        if self._pinned is None:
            raise RuntimeError("there is nothing to wait for: start(array) first")
        _wait_for(self._event)
        return np.array(self._pinned)

    def __del__(self):
        with contextlib.suppress(Exception):  # when Python ends, CUDA may have ended before
            _wait_for(self._event)  # or the copy would come into memory that is someone else's


def _wait_for(event):
    if event is not None:
        event.synchronize()


def _outside_of_a_recording(what):
    if driver.recording() is not None:
        raise RuntimeError(f"{what} while a graph is being recorded: call it between replays")
