"""Where arrays live: in NumPy's memory, or on a GPU as CuPy's arrays.

    cpu         NumPy
    cuda:0      CuPy on the first GPU, with the Triton kernels; "cuda" is the current one
    interpret   NumPy in the place of CuPy, and the same kernels in Triton's interpreter: slow, and
                for finding out on any machine what a program does on a GPU

A device is asked for by its name; an array is asked for its device by `of`.
"""

import ctypes
import functools
import importlib
import os
import re
import sys

import numpy as np

try:
    import resource
except ImportError:  # Windows
    resource = None

NAMES = "cpu, cuda, cuda:0, cuda:1, ... or interpret"


class Device:
    """One place for arrays.

    name    as above
    title   that, and of a GPU what it is: "cuda:0, NVIDIA H200"
    xp      the namespace of its arrays, like NumPy's
    """

    kernels = ""  # the package with its kernels

    def __init__(self, name, xp):
        self.name, self.title, self.xp = name, name, xp

    def __repr__(self):
        return f"<device {self.name}>"

    def put(self, x):
        """The array here: itself, or a copy if it is elsewhere. MemoryError if there is no room."""
        return x if of(x) is self else self._from_host(of(x).numpy(x))

    def numpy(self, x):
        """The array in NumPy's memory: itself, or a copy that waits for the device."""
        return x

    def own(self, x):
        """What a function of `xp` gave, as an array with any number of axes."""
        return self.xp.asarray(x)

    def make_current(self):
        """What runs next, runs here."""

    def synchronize(self):
        """Waits until all that was asked for is done."""

    def held(self):
        """Bytes of it that this process has held at most so far; None if nobody knows."""

    def memory(self):
        """Bytes: {"free": nobody's, "total": of the device}, without what nobody knows."""
        return {}

    def _from_host(self, x):
        return x


class _Host(Device):
    def held(self):
        try:  # Linux; what getrusage says there may be of the process that has started this one
            with open("/proc/self/status") as status:
                return 1024 * next(int(line.split()[1]) for line in status if "VmHWM" in line)
        except (OSError, StopIteration):
            pass
        if resource is None:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def memory(self):
        if not hasattr(os, "sysconf"):  # on Windows
            return {}
        return {"total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


class _Interpreted(Device):
    kernels = "tinygrad_llm.kernels.gpu"

    def memory(self):
        return CPU.memory()

    def _from_host(self, x):
        return self.xp.asarray(x)

    def numpy(self, x):
        return self.xp.asnumpy(x)


class _Cuda(Device):
    kernels = "tinygrad_llm.kernels.gpu"

    def __init__(self, number, cupy):
        super().__init__(f"cuda:{number}", cupy)
        self._device = cupy.cuda.Device(number)
        self._pool = cupy.get_default_memory_pool()
        what = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
        self.title = f"{self.name}, {what}"

    def make_current(self):
        self._device.use()

    def _from_host(self, x):
        with self._device:
            try:
                return self.xp.asarray(x)
            except self.xp.cuda.memory.OutOfMemoryError as error:
                raise MemoryError(f"{self.name} has no room for {x.nbytes:,} bytes") from error

    def numpy(self, x):
        return x.get()

    def synchronize(self):
        self._device.synchronize()

    def held(self):
        return self._pool.total_bytes()

    def memory(self):
        with self._device:
            free, total = self._device.mem_info
            return {"free": free, "total": total}


CPU = _Host("cpu", np)


# --- by name --------------------------------------------------------------------------------------


def device(name):
    """The device of that name; a Device is itself. Raises ValueError, in one line, for a name that
    is none, and for a device that cannot be used here: it says why.
    """
    if isinstance(name, Device):
        return name
    if name == "cpu":
        return CPU
    if name == "interpret":
        return _interpreted()
    if not isinstance(name, str) or not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"there is no device {name!r}; expected {NAMES}")
    reason = why_no_gpu()
    if reason is not None:
        raise ValueError(f"{name} cannot be used: {reason}; without a GPU, use cpu")
    cupy, number = sys.modules["cupy"], name.partition(":")[2]
    count = cupy.cuda.runtime.getDeviceCount()
    if number and int(number) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0, the only GPU here"
        raise ValueError(f"there is no {name}; expected {there}")
    return _cuda(int(number) if number else cupy.cuda.runtime.getDevice())


def is_device(name):
    """Whether this is meant as a device, and not as a dtype."""
    return isinstance(name, Device) or (
        isinstance(name, str) and name.partition(":")[0] in ("cpu", "cuda", "interpret", "gpu")
    )


def automatic():
    """(a GPU if one can be used and else the CPU, why it is the CPU or None)."""
    reason = why_no_gpu()
    return (device("cuda"), None) if reason is None else (CPU, reason)


@functools.cache
def why_no_gpu():
    """Why no GPU can be used, in a few words, and what helps if anything does; None if one can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return (
            "this process interprets kernels (TRITON_INTERPRET=1, or the device interpret was used "
            "in it): start another one, without"
        )
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver here"
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        wrong = "is not installed" if error.name == "cupy" else f"cannot be imported ({error})"
        return f"CuPy {wrong}: pip install 'tinygrad_llm[gpu]'"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own class, which exists only where CuPy does
        return _REASONS.get(getattr(error, "status", None), f"CUDA says {error}")
    try:
        driver = importlib.import_module("tinygrad_llm.kernels.gpu.driver")
    except ModuleNotFoundError as error:
        return str(error)
    return driver.unavailable()


_REASONS = {  # by CUDA's error codes
    100: "there is no NVIDIA GPU here",
    35: "the NVIDIA driver is older than this CuPy needs: update it, or install a CuPy for an "
    "older CUDA",
    3: "CUDA cannot be started, perhaps for want of a GPU or a driver: run nvidia-smi to see",
}


@functools.cache
def _cuda(number):
    cupy = sys.modules["cupy"]
    found = _Cuda(number, cupy)
    _HOMES[cupy.ndarray] = _home_of_cupys
    return found


@functools.cache
def _interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        if sys.modules.get("triton") is not None:
            raise ValueError(
                "interpret needs TRITON_INTERPRET=1 in the environment before Triton is imported"
            )
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        simulated = importlib.import_module("tinygrad_llm.kernels.gpu.simulated")
    except ModuleNotFoundError as error:
        raise ValueError(f"interpret cannot be used: {error}") from None
    found = _Interpreted("interpret", simulated.xp)
    _HOMES[simulated.DeviceArray] = lambda x: found
    return found


# --- of an array ----------------------------------------------------------------------------------


def of(x):
    """The device that the array lives on; the CPU for numbers and for what else NumPy takes."""
    home = _HOMES.get(type(x))
    if home is not None:
        return home(x)
    if type(x).__module__.partition(".")[0] == "cupy" and hasattr(x, "device"):
        return _home_of_cupys(x)
    return CPU


def _home_of_cupys(x):
    return _cuda(x.device.id)


_HOMES = {np.ndarray: lambda x: CPU}
