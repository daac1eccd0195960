"""CUDA graphs: their simulation against the functions that were recorded, and what is called of
CuPy, against a CuPy that only notes it down."""

import contextlib
import copy
import sys
import threading
import types

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import driver, linear, optim, reduce
from tinygrad_llm.kernels.gpu.arrays import CuPyHome, array
from tinygrad_llm.kernels.gpu.graph import Graph, GraphError, Readback, Staging
from tinygrad_llm.kernels.gpu.simulated import DeviceArray, xp

from tinygrad_llm import backend
from tinygrad_llm.check.cases import arguments
from tinygrad_llm.ops import TABLE

simulation = pytest.mark.skipif(not driver.INTERPRETED, reason="simulates the GPU that is here")
BFLOAT16 = ml_dtypes.bfloat16
here = xp if driver.INTERPRETED else pytest.importorskip("cupy")  # where kernels run


def numbers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def on_device(*shape, seed=0, dtype=np.float32):
    return here.asarray(numbers(*shape, seed=seed, dtype=dtype))


# --- the simulated arrays -------------------------------------------------------------------------

RESULTS = {
    "operator": lambda x: x * 2 + 1,
    "numpy_scalar": lambda x: np.float32(2) * x,
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(axis=-1, keepdims=True),
    "var": lambda x: x.var(),
    "max": lambda x: np.max(x),
    "argmax": lambda x: x.argmax(axis=1),
    "any": lambda x: (x > 0).any(),
    "element": lambda x: x[1, 2],
    "part": lambda x: x[:, None, ::2],
    "picked": lambda x: x[x.argmax(axis=1) % 2],
    "matmul": lambda x: x @ x.T,
    "einsum": lambda x: np.einsum("ij,kj->ik", x, x),
    "where": lambda x: np.where(x > 0, x, 0.0),
    "joined": lambda x: np.concatenate([x, x], axis=1),
    "norm": lambda x: np.linalg.norm(x),
    "reduce": lambda x: np.add.reduce(x, axis=None),
    "reshape": lambda x: x.reshape(3, -1).T,
    "bfloat16": lambda x: (x.astype(BFLOAT16) + 1).sum(),
    "sorted": lambda x: np.sort(x, axis=0),
    "rounded": lambda x: np.exp(x).round(2),
}


@simulation
@pytest.mark.parametrize("compute", RESULTS.values(), ids=RESULTS)
def test_results_are_numpys_on_the_device(compute):
    x = numbers(2, 3)
    found = compute(xp.asarray(x))
    assert type(found) is DeviceArray
    assert found.dtype == compute(x).dtype
    np.testing.assert_array_equal(found.get(), compute(x))


CREATED = {
    "zeros": lambda xp: xp.zeros((2, 3), np.float16),
    "full": lambda xp: xp.full(2, 3.5),
    "arange": lambda xp: xp.arange(4),
    "eye": lambda xp: xp.eye(2, dtype=BFLOAT16),
    "number": lambda xp: xp.asarray(3.0),
    "list": lambda xp: xp.array([[1, 2], [3, 4]]),
    "ufunc": lambda xp: xp.sqrt(2.0),
    "stacked": lambda xp: xp.stack([xp.ones(2), xp.zeros(2)]),
    "positional_out": lambda xp: xp.dot(xp.eye(2), xp.ones((2, 2)), xp.empty((2, 2))),
    "outer": lambda xp: xp.multiply.outer(xp.arange(2), xp.arange(3)),
    "random": lambda xp: 0 * xp.random.standard_normal(3),
    "submodule": lambda xp: xp.linalg.inv(2 * xp.eye(2)),
}


@simulation
@pytest.mark.parametrize("create", CREATED.values(), ids=CREATED)
def test_the_namespace_is_numpys_on_the_device(create):
    found, expected = create(xp), create(np)
    assert type(found) is DeviceArray
    assert found.dtype == np.asarray(expected).dtype
    np.testing.assert_array_equal(found.get(), expected)


@simulation
def test_the_namespace_has_dtypes_and_constants_as_they_are():
    assert xp.float32 is np.float32
    assert xp.pi == np.pi
    assert xp.ndarray is DeviceArray
    assert type(xp.asnumpy(xp.ones(2))) is type(xp.asnumpy(np.ones(2))) is np.ndarray
    x = xp.ones(2)
    assert xp.asarray(x) is x
    element = x[0]
    element += 1
    assert x.tolist() == [2, 1]  # a view, as CuPy's
    assert type(copy.deepcopy(x)) is DeviceArray
    host = np.ones(2)
    copied = xp.asarray(host)
    host[0] = 7
    assert copied.tolist() == [1, 1]
    with pytest.raises(ValueError, match="float64"):
        x.set(np.ones(2, np.float32))
    with pytest.raises(TypeError, match="all or none"):
        np.divmod(x, x, out=(x, None))


MIXED = {
    "operator": lambda x, host: x + host,
    "reflected": lambda x, host: host * x,
    "in_place": lambda x, host: x.__iadd__(host),
    "into_the_host": lambda x, host: np.add(x, x, out=host),
    "into_the_host_by_a_function": lambda x, host: np.sum(x, axis=0, out=host[0]),
    "function": lambda x, host: np.concatenate([x, host]),
    "of_the_host": lambda x, host: xp.sum(host),
    "index": lambda x, host: x[np.array([0])],
    "item": lambda x, host: x.__setitem__(slice(None), host),
    "copyto": lambda x, host: np.copyto(x, host),
    "ufunc": lambda x, host: xp.exp(host),
}


@simulation
@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_arrays_of_the_host_and_of_the_device_do_not_mix(mix):
    x, host = on_device(2, 3), numbers(2, 3)
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
        mix(x, host)
    np.testing.assert_array_equal(x.get(), host)


@simulation
def test_kernels_give_what_they_get():
    x = on_device(2, 8)
    y, saved = reduce.softmax.forward(x)
    assert type(y) is DeviceArray
    (x_bar,) = reduce.softmax.vjp(y, y, x, saved=saved, needs=(True,))
    assert type(x_bar) is DeviceArray
    np.testing.assert_array_equal(y.get(), reduce.softmax.forward(x.get())[0])
    with pytest.raises(TypeError, match="arrays of numpy and simulated in one call"):
        linear.matmul.forward(x, numbers(8, 2))


# --- the simulated graph --------------------------------------------------------------------------


def again_and_again(function, *arrays):
    """Graph(function of these DeviceArrays), replayed with other contents, against the function."""
    recorded = Graph(lambda: function(*arrays))
    for seed in range(1, 4):
        contents = [numbers(*x.shape, seed=seed, dtype=x.dtype) for x in arrays]
        for x, content in zip(arrays, contents):
            x.set(content)
        recorded.replay()
        copies = [xp.asarray(content) for content in contents]
        expected = function(*copies)
        for found, value in zip([recorded.result, *arrays], [expected, *copies]):
            np.testing.assert_array_equal(found.get(), value.get())


@simulation
@pytest.mark.parametrize("compute", RESULTS.values(), ids=RESULTS)
def test_a_replay_computes_again(compute):
    again_and_again(compute, on_device(2, 3))


def into_a_part(x, y):
    x[0] += y[1]
    x[:, 1] = 4
    return x.sum(axis=0)


def into_out(x, y):
    z = xp.empty_like(x)
    np.multiply(x, y, out=z)
    np.sum(z, axis=1, out=y[:, 0])
    np.clip(z, 0, 1, z)
    return z


def by_methods(x, y):
    x.fill(2)
    y.sort()
    np.copyto(x, y, where=y > 0)
    np.add.at(x, xp.argmax(y, axis=1) % 2, 1.0)
    return x[y.argmax() % 2]


def through_views(x, y):
    z = (x + y).T
    z[1:] *= 2
    flat = z.reshape(-1)  # copied
    z += 1
    return xp.concatenate([flat, z.ravel()]) + x[..., -1].mean()


def by_what_is_not_there_yet(x, y):
    y, _ = reduce.softmax.forward(y)
    return x[y.astype(np.int64)[0]]


def from_zeros(x, y):
    total = xp.zeros(3, np.float32)
    for row in x:
        total += row
    return total / len(x)


@simulation
@pytest.mark.parametrize(
    "f",
    [into_a_part, into_out, by_methods, through_views, by_what_is_not_there_yet, from_zeros],
)
def test_a_replay_writes_again(f):
    again_and_again(f, on_device(2, 3), on_device(2, 3, seed=9))


STEPS = {
    "add": lambda x, y: x + y,
    "scaled": lambda x, y: 0.5 * x,
    "in_place": lambda x, y: x.__isub__(y),
    "out": lambda x, y: np.maximum(x, y, out=x),
    "row": lambda x, y: x[1],
    "into_row": lambda x, y: x.__setitem__(0, y[-1]) or x,
    "swap": lambda x, y: x[::-1],
    "centred": lambda x, y: x - x.mean(axis=-1, keepdims=True),
    "where": lambda x, y: xp.where(x > y, x, 0.0),
    "half": lambda x, y: x.astype(np.float16).astype(np.float32),
    "copy": lambda x, y: x.copy(),
    "zeros": lambda x, y: xp.zeros_like(x),
    "picked": lambda x, y: x[y.argmax(axis=0)[:2] % 2],
    "broadcast": lambda x, y: xp.broadcast_to(x.sum(), x.shape) + y,
    "softmax": lambda x, y: reduce.softmax.forward(x)[0],
}
programs = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), max_size=8
)


@simulation
@settings(max_examples=40)
@given(programs)
def test_any_program_is_replayed_as_it_runs(program):
    def run(*arrays):
        arrays = list(arrays)
        for step, i, j in program:
            x, y = arrays[i % len(arrays)], arrays[j % len(arrays)]
            z = STEPS[step](x, y)
            arrays.append(z if z.shape == (2, 2) else xp.stack([z, z]))
        return xp.stack(arrays)

    again_and_again(run, on_device(2, 2), on_device(2, 2, seed=9))


@simulation
@pytest.mark.parametrize("op", TABLE.values(), ids=lambda op: op.name)
def test_every_op_can_be_recorded(op):
    """Its own lines, forward and backward, with CuPy's manners."""
    space = backend.Space(xp)

    @settings(max_examples=3)
    @given(arguments(op))
    def holds(case):
        arrays = [xp.asarray(a) if isinstance(a, np.ndarray) else a for a in case[0]]

        def run():
            y = op.forward(space, *arrays, **case[1])
            y, saved = (y[0], {"saved": y[1]}) if op.saves else (y, {})
            return y, *op.vjp(space, xp.ones_like(y), y, *arrays, **saved, **case[1])

        recorded, expected = Graph(run, warmups=1), run()
        recorded.replay()
        for found, value in zip(recorded.result, expected, strict=True):
            assert type(found) is type(value)
            if value is not None:
                np.testing.assert_array_equal(found.get(), value.get())

    with np.errstate(all="ignore"):
        holds()


@simulation
def test_recording_changes_nothing_and_numbers_are_frozen():
    counts, x = [], xp.zeros(3)
    factor = np.array(2.0)

    def step():
        nonlocal x
        counts.append(len(counts))
        x += counts[-1] + 1
        return (x * factor)[::-1]

    before = x
    recorded = Graph(step, warmups=2)
    assert counts == [0, 1, 2]  # twice for real, once to be recorded
    assert before is x
    assert x.tolist() == [3, 3, 3]  # 1 + 2: recording did not add its 3
    factor[...] = 100  # a number of the host, as it was
    for i in range(1, 3):
        recorded.replay()
        assert x.tolist() == [3 + 3 * i] * 3
        assert recorded.result.tolist() == [2 * (3 + 3 * i)] * 3
    assert counts == [0, 1, 2]
    assert recorded.memory == recorded.result.nbytes
    assert Graph(lambda: xp.empty((2, 3))).memory == 48


def test_a_training_step_is_replayed():
    """Linear layer, gradients, clipping, AdamW; what changes comes through Staging."""
    shapes = {"x": ((4, 8), "float32"), "lr": ((), "float32"), "t": ((1,), "int32")}
    batches = [(numbers(4, 8, seed=i), 0.1 / i, np.array([i], np.int32)) for i in range(1, 6)]

    def training():
        w, b = on_device(16, 8, seed=1, dtype=BFLOAT16), here.zeros(16, BFLOAT16)
        optimizer = optim.AdamW([w, b])

        def step(x, lr, t):
            x = x.astype(BFLOAT16)
            y, saved = linear.linear.forward(x, w, b)
            g = (y.astype(np.float32) / y.size).astype(BFLOAT16)
            needs = (False, True, True)
            _, *bars = linear.linear.vjp(g, y, x, w, b, saved=saved, needs=needs)
            norm = optimizer.step(bars, lr, t, max_norm=0.1)
            return (y.astype(np.float32) ** 2).mean() + norm

        return w, step

    w, step = training()
    plain = [
        step(here.asarray(x), here.asarray(np.float32(lr)), here.asarray(t)) for x, lr, t in batches
    ]
    v, step = training()
    staging, readback = Staging(shapes), Readback()
    staging.fill(x=batches[0][0], lr=batches[0][1], t=batches[0][2])
    recorded = Graph(lambda: step(**staging.arrays), warmups=1)
    for (x, lr, t), expected in zip(batches[1:], plain[1:]):
        staging.fill(x=x, lr=lr, t=t)
        recorded.replay()
        readback.start(recorded.result)
        np.testing.assert_array_equal(readback.wait(), expected.get())
    np.testing.assert_array_equal(v.get(), w.get())


WAITING = {
    "item": lambda x: x.item(0),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x.any()),
    "index": lambda x: [1, 2, 3][x.argmax()],
    "get": lambda x: x.get(),
    "asnumpy": lambda x: xp.asnumpy(x),
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array([x, x]),
    "array_equal": lambda x: np.array_equal(x, x),
    "repr": lambda x: repr(x),
    "format": lambda x: f"{x[0]:.1f}",
    "in": lambda x: 1.0 in x,
    "flat": lambda x: next(x.flat),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: np.nonzero(x),
    "where": lambda x: np.where(x > 0),
    "list_index": lambda x: x[[0, 1]],
    "into_a_list": lambda x: x.__setitem__([0, 1], 1.0),
    "upload": lambda x: xp.asarray(np.ones(2)),
    "upload_of_one": lambda x: xp.asarray(np.ones(())),
    "upload_of_a_list": lambda x: xp.array([1, 2]),
    "set": lambda x: x.set(np.ones(3)),
}


@simulation
@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_what_waits_for_the_device_raises_while_recording_and_only_then(wait):
    x = xp.ones(3)
    functions = np.asarray, np.array
    wait(x)
    with pytest.raises(GraphError, match="would wait for the device while a graph is") as caught:
        Graph(lambda: driver.recording() and wait(x))
    assert "\n" not in str(caught.value)
    assert (np.asarray, np.array) == functions
    wait(x)


@simulation
def test_another_thread_may_read_meanwhile():
    read = []

    def function():
        other = threading.Thread(target=lambda: read.append(float(np.asarray(xp.ones(1))[0])))
        other.start()
        other.join()

    Graph(function, warmups=1)
    assert read == [1.0, 1.0]


@simulation
def test_what_is_not_on_the_device_is_no_part_of_it():
    def function():
        host.append(reduce.softmax.forward(numbers(2, 4))[0])
        return xp.ones(1)

    host = []
    Graph(function, warmups=1)
    np.testing.assert_array_equal(host[0], host[1])


@simulation
def test_uploads_by_kernels_are_copied_again():
    like, changing = array(xp.ones(1, np.float32), "like"), np.arange(3)

    def function():
        there = like.upload(changing).data
        there += 1
        return there

    recorded = Graph(function)
    changing[...] = 7  # after the upload
    for _ in range(2):
        recorded.replay()
        assert recorded.result.tolist() == [1, 2, 3]


def test_bad_arguments_are_one_line():
    for wrong, error, match in [
        (lambda: Graph(3), TypeError, "function is a int; expected a function"),
        (lambda: Graph(print, warmups=0), ValueError, "warmups is 0; expected"),
        (lambda: Readback().wait(), RuntimeError, r"start\(array\) first"),
        (lambda: Staging({}, slots=0), ValueError, "slots is 0"),
    ]:
        with pytest.raises(error, match=match) as caught:
            wrong()
        assert "\n" not in str(caught.value)


@simulation
@pytest.mark.parametrize(
    "what, match",
    [
        (lambda: Graph(lambda: None), "a graph is being recorded already"),
        (lambda: Staging({"x": ((), "int32")}).fill(x=1), "Staging.fill while a graph"),
        (lambda: Readback().start(xp.ones(1)), "Readback.start while a graph"),
        (lambda: 1 / 0, "no graph can be made of this function: division by zero"),
    ],
)
def test_what_cannot_be_recorded_says_so(what, match):
    with pytest.raises(GraphError, match=match):
        Graph(lambda: driver.recording() and what())
    assert driver.recording() is None
    Graph(lambda: xp.ones(2))  # nothing is left of the attempt


# --- staging --------------------------------------------------------------------------------------

SHAPES = {"ids": ((2, 3), "int32"), "lr": ((), "float32"), "on": ((), "bool"), "n": ((), "int32")}
IDS = np.arange(6, dtype=np.int32).reshape(2, 3)


@simulation
def test_staging_fills_the_same_arrays():
    staging = Staging({**SHAPES, "h": ((2,), "bfloat16")}, slots=2)
    arrays = dict(staging.arrays)
    assert arrays["ids"].tolist() == [[0] * 3] * 2
    for i in range(5):
        mine = IDS + i
        staging.fill(ids=mine, lr=i / 4, n=np.int64(i), on=True)
        mine[...] = -1
        assert arrays["ids"].tolist() == (IDS + i).tolist()
        assert (arrays["lr"].item(), arrays["n"].item(), arrays["on"].item()) == (i / 4, i, True)
    staging.fill(h=np.ones(2, BFLOAT16))  # some of them
    assert arrays["ids"].tolist() == (IDS + 4).tolist()
    assert all(staging.arrays[name] is arrays[name] for name in arrays)


@simulation
@pytest.mark.parametrize(
    "values, match",
    [
        ({"id": 1}, "'id' is none of the arrays: ids, lr, on, n"),
        ({"ids": IDS[:1]}, r"ids has shape \(1, 3\) and dtype int32; expected \(2, 3\) and int32"),
        ({"ids": IDS.astype(np.int64)}, "dtype int64; expected .* int32"),
        ({"ids": 3}, "ids is a int; expected a NumPy array$"),
        ({"lr": "3"}, "lr is a str; expected a NumPy array or a number"),
        ({"lr": xp.ones((), np.float32)}, "lr is a DeviceArray"),
        ({"n": 2.5}, "n is 2.5; expected a number that int32 can hold"),
        ({"n": 2**31}, "that int32 can hold"),
        ({"n": float("nan")}, "that int32 can hold"),
        ({"on": 2}, "that bool can hold"),
    ],
)
def test_staging_says_what_does_not_fit(values, match):
    staging = Staging(SHAPES)
    with pytest.raises(ValueError, match=match) as caught:
        staging.fill(**{"lr": 1.0, **values})
    assert "\n" not in str(caught.value)
    assert staging.arrays["lr"].item() == 0  # nothing was copied


@simulation
def test_readback_keeps_what_was_there():
    readback, x = Readback(), xp.arange(3)
    readback.start(x)
    x += 1
    first = readback.wait()
    readback.start(x[::2])
    assert (first.tolist(), readback.wait().tolist()) == ([0, 1, 2], [1, 3])
    assert type(first) is np.ndarray


# --- what is called of CuPy -----------------------------------------------------------------------


class FakeCuPy(types.ModuleType):
    """As much of CuPy 14 as graphs use; each call is noted down in `calls`."""

    def __init__(self, broken=()):
        super().__init__("cupy")
        calls, self.calls, cupy = [], [], self
        calls = self.calls
        streams = [None]

        def called(name, result=None):
            calls.append(name)
            if name in broken:
                raise RuntimeError(f"cudaErrorStreamCapture:\n{name} failed")
            return result

        class Event:
            def __init__(self, disable_timing=False):
                self.done = False

            def record(self):
                called("event.record")

            def synchronize(self):
                called("event.synchronize")
                self.done = True

        class Stream:
            def __init__(self, name="stream", non_blocking=True):
                self.name, self.capturing = name, False

            def __enter__(self):
                streams.append(self)

            def __exit__(self, *_):
                streams.pop()

            def record(self):
                return called(f"{self.name}.record", self.name)

            def wait_event(self, event):
                called(f"{self.name}.wait_event {event}")

            def begin_capture(self, mode):
                self.capturing = True
                called(f"begin_capture {mode}")

            def end_capture(self):
                assert self.capturing
                self.capturing = False
                return called("end_capture", captured)

        class MemoryPool:
            malloc = "private"

            def total_bytes(self):
                return 512

        class NDArray:
            def __init__(self, shape, dtype):
                self.shape, self.dtype = tuple(shape), np.dtype(dtype)
                self.host = np.full(shape, 9, dtype)
                calls.append(f"empty from {cupy.allocator}")

            def fill(self, value):
                self.host.fill(value)

            def set(self, pinned):
                assert pinned.base is not None  # alloc_pinned_memory's
                np.copyto(self.host, pinned)
                called(f"set on {streams[-1].name}")

            def get(self, out, blocking):
                np.copyto(out, self.host)
                called(f"get, blocking={blocking}")

        @contextlib.contextmanager
        def using_allocator(malloc):
            cupy.allocator, before = malloc, cupy.allocator
            yield
            cupy.allocator = before

        captured = types.SimpleNamespace(
            launch=lambda: called(f"launch on {streams[-1].name}"),
            upload=lambda: called(f"upload on {streams[-1].name}"),
        )
        streams[0] = Stream("null")
        self.allocator, self.ndarray, self.empty = "default", NDArray, NDArray
        self.cuda = types.SimpleNamespace(
            Event=Event, Stream=Stream, MemoryPool=MemoryPool, using_allocator=using_allocator,
            alloc_pinned_memory=lambda size: called(f"pinned {size}", bytearray(size + 64)),
            get_current_stream=lambda: streams[-1],
            runtime=types.SimpleNamespace(streamCaptureModeRelaxed="relaxed"),
        )  # fmt: skip
        usual = types.SimpleNamespace(free_all_blocks=lambda: called("the usual pool is emptied"))
        self.get_default_memory_pool = lambda: usual


@pytest.fixture
def cupy(monkeypatch):
    """A function that puts a FakeCuPy in CuPy's place."""

    def install(**options):
        fake = FakeCuPy(**options)
        monkeypatch.setitem(sys.modules, "cupy", fake)
        monkeypatch.setattr(driver, "INTERPRETED", False)
        monkeypatch.setattr(driver, "unavailable", lambda: None)
        return fake

    return install


def test_a_capture_in_cupy(cupy):
    fake = cupy()

    def function():
        how = "recorded" if driver.recording() is not None else "run"
        fake.calls.append(f"{how} on {fake.cuda.get_current_stream().name}")
        return fake.empty((2,), np.float32)

    recorded = Graph(function)
    recorded.replay()
    assert fake.calls == [
        "the usual pool is emptied", "null.record", "stream.wait_event null",
        *["run on stream", "empty from private"] * 2,
        "begin_capture relaxed", "recorded on stream", "empty from private", "end_capture",
        "stream.record", "null.wait_event stream", "upload on null", "launch on null",
    ]  # fmt: skip
    assert (type(recorded.result), recorded.memory) == (fake.ndarray, 512)
    assert fake.allocator == "default"


@pytest.mark.parametrize("broken", [["x"], ["x", "end_capture"], ["end_capture"]])
def test_a_capture_that_fails_is_ended(cupy, broken):
    fake = cupy(broken=broken)

    def function():
        if driver.recording() is not None and "x" in broken:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported:\noperation not permitted")

    with pytest.raises(GraphError, match="no graph can be made of this function: cuda") as caught:
        Graph(function)
    assert "\n" not in str(caught.value)
    assert ("not permitted" in str(caught.value)) == ("x" in broken)
    assert fake.calls.count("end_capture") == 1
    assert fake.calls[-1] == "null.wait_event stream"  # whoever goes on without a graph
    assert fake.cuda.get_current_stream().name == "null"
    assert driver.recording() is None


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
def test_no_room_and_interrupts_are_passed_on(cupy, error):
    fake = cupy()

    def function():
        if driver.recording() is not None:
            raise error

    with pytest.raises(type(error)):
        Graph(function)
    assert "end_capture" in fake.calls


def test_uploads_to_cupy_come_from_pinned_memory_that_is_kept(cupy):
    fake, home = cupy(), CuPyHome()
    there = home.upload(np.arange(3), None)
    assert there.host.tolist() == [0, 1, 2]
    assert fake.calls == ["pinned 24", "empty from default", "set on null", "event.record"]
    home.upload(np.arange(4), None)
    assert [pinned.size for _, pinned in home._copies] == [3, 4]
    home._copies[0][0].synchronize()
    home.upload(np.arange(5), None)
    assert [pinned.size for _, pinned in home._copies] == [4, 5]  # the first one was done

    captured = types.SimpleNamespace(pinned=[])
    fake.calls.clear()
    with driver.recording_into(captured):
        home.upload(np.arange(6), None)
    assert "event.record" not in fake.calls  # such an event could not be asked
    assert [pinned.size for pinned in captured.pinned] == [6]


def test_staging_and_readback_with_cupy(cupy):
    fake = cupy()
    staging = Staging(SHAPES, slots=2)
    fake.calls.clear()
    for i in range(3):
        staging.fill(ids=IDS + i, lr=i)
    copies = ["set on null", "set on null", "event.record"]
    assert fake.calls == [*copies, *copies, "event.synchronize", *copies]  # its slot was in use
    assert staging.arrays["ids"].host.tolist() == (IDS + 2).tolist()

    readback = Readback()
    fake.calls.clear()
    for _ in range(2):
        readback.start(staging.arrays["ids"])
    assert readback.wait().tolist() == (IDS + 2).tolist()
    started = ["get, blocking=False", "event.record"]
    assert fake.calls == ["pinned 24", *started, *started, "event.synchronize"]
    readback.start(staging.arrays["ids"])
    fake.calls.clear()
    del readback  # whose memory may then be someone else's
    assert fake.calls == ["event.synchronize"]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(driver, "unavailable", lambda: "CuPy is not installed")
    for make in (lambda: Graph(print), lambda: Staging({}), Readback):
        with pytest.raises(RuntimeError, match="on a GPU: CuPy is not installed"):
            make()
