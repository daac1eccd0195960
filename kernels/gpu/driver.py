"""Runs Triton kernels, versions 3.6 to 3.9, without PyTorch in the process.

Triton asks a *driver* which device it is on, which stream to launch on and what chip to compile
for. Its own driver asks PyTorch (up to 3.7 always; from 3.8 on only if it is there, and else takes
the default stream). Ours asks the library that owns the arrays. Three situations:

    a GPU                    kernels run on the current stream of CuPy or PyTorch
    TRITON_INTERPRET=1       they run in Triton's interpreter, on NumPy arrays: see interpreter.py
    inside compiling(arch)   they are compiled for that chip, on any machine, and not run
"""

import contextlib
import functools
import os
import sys
import threading

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as _triton_driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import frozen, interpreter

INTERPRETED = triton.knobs.runtime.interpret
FROZEN = os.environ.get("TINYGRAD_LLM_FROZEN") != "0"  # whether launches may pass Triton by
OLDEST = 80  # compute capability 8.0: bfloat16 and asynchronous copies
MULTIPROCESSORS = {
    80: 108,
    86: 84,
    89: 128,
    90: 132,
    100: 148,
    103: 160,
    120: 170,
}  # largest chip's
_FLUSH = 256 << 20  # bytes: more than any L2 cache, so that writing them empties it
_FLUSHES = 8  # keep the GPU busy for half a millisecond, in which the host gets ahead of it
_MOST_FROZEN = 4096
_frozen = {}  # key of a launch: its Frozen


class _State(threading.local):
    chip = None  # what to compile for inside compiling()
    compiled = None  # what has been compiled there
    home = None  # whose arrays the kernel is about to get
    recording = None  # the graph that what is launched becomes a part of


_state = _State()


def _prepare():
    """Once, when this module is imported: nothing of it needs a GPU."""
    _keep_torch_out()
    if INTERPRETED:
        interpreter.repair()


# --- launching ------------------------------------------------------------------------------------


def launch(kernel, grid, *arguments, **options):
    """kernel[grid](*arguments, **options). Arguments are Arrays, all of one library, descriptors of
    them, numbers, and tuples of all these; options are compile-time constants, num_warps,
    num_stages and maxnreg.
    """
    if INTERPRETED:
        follow(arguments)
        if _state.recording is not None and _state.home == "simulated":
            _state.recording.launch(kernel, grid, arguments, options)
            return
        with np.errstate(all="ignore"):  # NumPy warns of what a GPU does without a word
            kernel[grid](*arguments, **options)
    elif _state.chip is not None:
        _compile(kernel, grid, arguments, options)
    else:
        _launch(kernel, grid, arguments, options)


def _compile(kernel, grid, arguments, options):
    options.setdefault("enable_fp_fusion", True)  # Triton 3.9 warns if nobody says
    with _driver_installed():
        compiled = kernel.warmup(*arguments, grid=grid, **options)
    _state.compiled.append((kernel, grid, options, compiled))


def _launch(kernel, grid, arguments, options):
    """Past Triton's dispatch if an earlier launch was like this one: see frozen.py."""
    key = again = None
    if FROZEN and type(grid) is tuple and grid:
        try:
            key, values, home = frozen.key(kernel, arguments, options)
            if home is not None:
                _state.home = home.module
            library = _device_library()
            key.append(device := library.device())
            again = _frozen.get(key := tuple(key))
        except (frozen.Unusual, TypeError):  # TypeError: a constant that has no hash
            key = None
    if again is None or not again.holds():
        compiled = _launch_by_triton(kernel, grid, arguments, options)
        if key is not None and (launch := frozen.freeze(kernel, compiled, arguments, options)):
            _remember(key, launch)
        return
    grid, stream = (*grid, 1, 1)[:3], library.stream(device)
    if again.describes:
        with _driver_installed():
            again.launch(grid, stream, values)
    else:
        again.launch(grid, stream, values)


def _launch_by_triton(kernel, grid, arguments, options):
    """Gives the compiled kernel that was launched."""
    follow(arguments)
    capability()  # refuses a GPU that is too old
    options.setdefault("enable_fp_fusion", True)  # Triton 3.9 warns if nobody says
    if _state.home == "torch":
        return kernel[grid](*arguments, **options)  # Triton's own driver asks PyTorch
    with _driver_installed():
        return kernel[grid](*arguments, **options)


def _remember(key, launch):
    if len(_frozen) >= _MOST_FROZEN:
        _frozen.clear()
    _frozen[key] = launch


def follow(arguments):
    """Launches go where the arrays among these are. TypeError if that is in two libraries."""
    libraries = set(_libraries_of(arguments))
    if len(libraries) > 1:
        raise TypeError(
            f"arrays of {' and '.join(sorted(libraries))} in one call; expected one library's: "
            "torch.as_tensor(x) and cupy.asarray(x) convert without a copy"
        )
    for library in libraries:
        _state.home = library


def _libraries_of(arguments):
    for x in arguments:
        if isinstance(x, tuple):
            yield from _libraries_of(x)
        elif hasattr(x, "home"):
            yield x.home.module
        elif isinstance(x, TensorDescriptor):
            yield x.base.home.module


def recording():
    """The graph that is being recorded in this thread: see graph.py; None if none is."""
    return _state.recording


@contextlib.contextmanager
def recording_into(graph):
    """Inside, this graph is being recorded; one at a time."""
    _state.recording = graph
    try:
        yield
    finally:
        _state.recording = None


@contextlib.contextmanager
def compiling(capability):
    """Inside, kernels are compiled for a chip of that compute capability (90 is Hopper) and not
    run; arrays are arrays.Abstract. Gives the list that fills with what is compiled, as tuples
    (kernel, grid, options, triton's CompiledKernel).
    """
    if INTERPRETED:
        raise RuntimeError("the interpreter cannot compile: start again without TRITON_INTERPRET")
    _known(capability, "capability")
    before = _state.chip, _state.compiled
    _state.chip, _state.compiled = capability, []
    try:
        yield _state.compiled
    finally:
        _state.chip, _state.compiled = before


def capability():
    """The compute capability to choose a configuration for: 90 is Hopper."""
    if _state.chip is not None:
        return _state.chip
    if INTERPRETED:
        return _pretended()
    return _checked(_device_library().capability())


def _known(capability, name):
    """ValueError unless it is the compute capability of a chip that kernels can be compiled for."""
    if isinstance(capability, bool) or capability not in MULTIPROCESSORS:
        raise ValueError(
            f"{name} is {capability!r}; expected one of {', '.join(map(str, MULTIPROCESSORS))}"
        )
    return capability


@functools.cache
def _pretended():
    """What the interpreter takes the chip for."""
    name = "TINYGRAD_LLM_CAPABILITY"
    found = os.environ.get(name, "90")
    return _known(int(found) if found.isdecimal() else found, name)


def compiles():
    """Whether kernels are compiled here, not run: inside compiling()."""
    return _state.chip is not None


def use(home):
    """Launches follow the library that owns these arrays."""
    _state.home = home.module


def device():
    """The number of the GPU that is current."""
    return _device_library().device()


def multiprocessors():
    """How many multiprocessors (SMs) the GPU has: the size of a persistent grid."""
    if _state.chip is not None or INTERPRETED:
        return MULTIPROCESSORS[capability()]
    return _device_library().multiprocessors()


def unavailable():
    """Why no kernel can run here, in a few words; None if they can."""
    if INTERPRETED:
        return None
    try:
        import cupy
    except ModuleNotFoundError:
        return "CuPy is not installed"
    try:
        cupy.cuda.runtime.getDeviceCount()
        capability()
    except Exception as error:  # CuPy's own class, which exists only where CuPy does
        return f"no GPU can be used ({error})"
    return None


def device_name():
    """The GPU's name, such as NVIDIA H200."""
    return _device_library().name()


def milliseconds(run):
    """How long the GPU works on run(), by its own clock, with a cold L2 cache."""
    return _device_library().milliseconds(run)


def _checked(found):
    if found < OLDEST:
        raise RuntimeError(
            f"this GPU has compute capability {found // 10}.{found % 10}; the kernels need "
            f"{OLDEST // 10}.{OLDEST % 10} (Ampere) or newer"
        )
    return found


# --- who knows the device -------------------------------------------------------------------------


class _CuPy:
    def __init__(self):
        import cupy

        self.empty = cupy.empty
        self.cuda = cupy.cuda
        self.device = cupy.cuda.runtime.getDevice
        self.set_device = cupy.cuda.runtime.setDevice
        self._properties = functools.cache(cupy.cuda.runtime.getDeviceProperties)

    def stream(self, device):
        return self.cuda.get_current_stream().ptr

    def capability(self, device=None):
        found = self._properties(self.device() if device is None else device)
        return found["major"] * 10 + found["minor"]

    def multiprocessors(self):
        return self._properties(self.device())["multiProcessorCount"]

    def name(self):
        return self._properties(self.device())["name"].decode()

    @functools.cached_property
    def _flushes(self):
        return self.empty(_FLUSH, "int8")

    def milliseconds(self, run):
        start, end = self.cuda.Event(), self.cuda.Event()
        for _ in range(_FLUSHES):
            self._flushes.fill(0)
        start.record()
        run()
        end.record()
        end.synchronize()
        return self.cuda.get_elapsed_time(start, end)


class _Torch:
    def __init__(self):
        self.torch = sys.modules["torch"]
        self.cuda = self.torch.cuda
        self.device, self.set_device = self.cuda.current_device, self.cuda.set_device
        self._properties = functools.cache(self.cuda.get_device_properties)
        if raw := getattr(self.torch._C, "_cuda_getCurrentRawStream", None):
            self.stream = raw  # what Triton's own driver calls: no Stream object is made

    def stream(self, device):
        return self.cuda.current_stream(device).cuda_stream

    def capability(self, device=None):
        found = self._properties(self.device() if device is None else device)
        return found.major * 10 + found.minor

    def multiprocessors(self):
        return self._properties(self.device()).multi_processor_count

    def name(self):
        return self._properties(self.device()).name

    @functools.cached_property
    def _flushes(self):
        return self.torch.empty(_FLUSH, dtype=self.torch.int8, device="cuda")

    def milliseconds(self, run):
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            self._flushes.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


_libraries = {}


def _device_library():
    name = "torch" if _state.home == "torch" else "cupy"
    if name not in _libraries:
        _libraries[name] = _Torch() if name == "torch" else _CuPy()
    return _libraries[name]


# --- the driver -----------------------------------------------------------------------------------


class _driver_installed:
    """Inside, ours is Triton's driver. Other people's kernels go on with theirs. contextlib's way
    to write this takes twice as long.
    """

    def __enter__(self):
        self.before = _triton_driver._active  # not .active, which would look for PyTorch
        _triton_driver.set_active(_driver())

    def __exit__(self, *_):
        _triton_driver.set_active(self.before)


def _keep_torch_out():
    """The first call of Triton 3.6 and 3.7 imports PyTorch if it is installed, which takes seconds
    and is of no use unless the caller has imported it.
    """
    if "torch" in sys.modules or frozen.VERSION >= (3, 8):
        return
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl

    sys.modules["torch"] = None
    try:
        native_specialize_impl(CUDABackend, 1, False, True, True)
    finally:
        del sys.modules["torch"]


@functools.cache
def _driver():
    """The only instance; nothing of it needs a GPU before the first launch."""
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        """Triton's own driver, less PyTorch."""

        def __init__(self):
            pass  # theirs asks PyTorch, and needs libcuda

        @functools.cached_property
        def utils(self):  # compiles C, and needs libcuda
            return nvidia.CudaUtils()

        @property
        def launcher_cls(self):
            self.utils  # noqa: B018  3.6's launchers find the type of a descriptor there
            return nvidia.CudaLauncher

        @staticmethod
        def is_active():
            return True

        def get_current_device(self):
            return -_state.chip if _state.chip is not None else _device_library().device()

        def set_current_device(self, device):
            _device_library().set_device(device)

        def get_current_stream(self, device):
            return 0 if _state.chip is not None else _device_library().stream(device)

        def get_device_capability(self, device):
            return divmod(_device_library().capability(device), 10)

        def get_current_target(self):
            return GPUTarget("cuda", capability(), 32)

        def get_active_torch_device(self):
            raise RuntimeError("the kernels run without PyTorch")

    return Driver()


_prepare()
