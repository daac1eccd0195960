"""Arrays as a kernel sees them, whoever owns the memory.

A kernel takes CuPy arrays, PyTorch tensors, anything with `__cuda_array_interface__` or DLPack, and
in the interpreter NumPy arrays. What it returns is of the kind that it was given, or CuPy's for
other libraries. PyTorch is never imported: whoever passes a tensor has done that.
"""

import copy
import math
import sys
import threading

import numpy as np

from . import driver, simulated


class DType(str):
    """A dtype's name, with what Triton asks of a dtype."""

    __slots__ = ("is_floating_point", "itemsize")

    def __new__(cls, name, itemsize, is_floating_point):
        self = super().__new__(cls, name)
        self.itemsize, self.is_floating_point = itemsize, is_floating_point
        return self


DTYPES = {
    name: DType(name, size, "float" in name)
    for name, size in {
        "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
        "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    }.items()
}  # fmt: skip
FLOATS = ("float32", "float16", "bfloat16")
IDS = ("int32", "int64")


class Array:
    """A view of somebody's array, and a pointer argument of a kernel.

    data       the owner's own object
    home       which library owns it: see NumPyHome and its siblings
    dtype      its name, as a DType
    shape, strides   in elements
    """

    __slots__ = ("address", "data", "dtype", "home", "shape", "strides")

    def __init__(self, data, home):
        self.data, self.home = data, home
        self.address, self.dtype, self.shape, self.strides = home.describe(data)

    def data_ptr(self):
        return self.address

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return math.prod(self.shape)

    def empty(self, shape, dtype=None):
        """A new C-contiguous array at the same home; MemoryError if there is no room for it."""
        dtype = self.dtype if dtype is None else DTYPES[dtype]
        try:
            return Array(self.home.empty(tuple(shape), dtype, self.data), self.home)
        except Exception as error:
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError"):
                raise
            size = math.prod(shape) * dtype.itemsize / 2**30
            raise MemoryError(
                f"no room for {size:.2f} GiB (shape {tuple(shape)}, {dtype}) on the device: free "
                "memory or use smaller arrays"
            ) from None

    def zeros(self, shape, dtype=None):
        """The same, filled with zeros."""
        array = self.empty(shape, dtype)
        array.home.fill_zero(array.data)
        return array

    def __getitem__(self, part):
        """A view of a part: slices only."""
        return Array(self.data[part], self.home)

    def view(self, shape, strides, start=0):
        """The same memory as another shape and strides say, from its element `start` on: a pointer
        to launch with, whose `data` stays the whole array.
        """
        view = copy.copy(self)
        view.shape, view.strides = tuple(shape), tuple(strides)
        view.address += start * self.dtype.itemsize
        return view

    def upload(self, x):
        """A NumPy array as a new one at the same home."""
        return Array(self.home.upload(x, self.data), self.home)

    def swapaxes(self, i, j):
        """A view with two axes exchanged."""
        return Array(self.data.swapaxes(i, j), self.home)

    def numpy(self):
        """A copy on the host, for what has to be known before a launch."""
        return self.home.numpy(self.data)


# --- who owns the memory --------------------------------------------------------------------------


class NumPyHome:
    """Memory of the host: for Triton's interpreter only."""

    module = "numpy"

    def device(self, x):
        """The number of the GPU that has the array; None if no GPU has."""
        return None

    def describe(self, x):
        """(address, dtype, shape, strides). KeyError or ValueError for what kernels cannot read."""
        if not x.dtype.isnative:
            raise KeyError(x.dtype)
        return x.ctypes.data, DTYPES[x.dtype.name], x.shape, _in_elements(x)

    def writable(self, x):
        return x.flags.writeable

    def empty(self, shape, dtype, like):
        return np.empty(shape, _numpy_dtype(dtype))

    def fill_zero(self, x):
        x[...] = 0

    def upload(self, x, like):
        return x.copy()

    def numpy(self, x):
        return x


class SimulatedHome(NumPyHome):
    """Memory of the host that stands for a GPU's: see simulated.py."""

    module = "simulated"

    def empty(self, shape, dtype, like=None):
        return simulated.xp.empty(shape, _numpy_dtype(dtype))

    def empty_pinned(self, shape, dtype):
        return simulated.empty_pinned(shape, _numpy_dtype(dtype))

    def event(self):
        return None  # its copies are done at once

    def fill_zero(self, x):
        x.fill(0)

    def upload(self, x, like):
        pinned = simulated.empty_pinned(x.shape, x.dtype)
        pinned[...] = x
        return simulated.xp.asarray(pinned)

    def numpy(self, x):
        return x.get()


class CuPyHome:
    """CuPy's memory pool, on its current stream."""

    module = "cupy"

    def __init__(self):
        self._copies = []  # [(event, pinned memory)] of those that may be under way
        self._lock = threading.Lock()

    def device(self, x):
        return x.device.id

    def describe(self, x):
        return x.data.ptr, DTYPES[x.dtype.name], x.shape, _in_elements(x)

    def writable(self, x):
        return True

    def empty(self, shape, dtype, like=None):
        return sys.modules["cupy"].empty(shape, _numpy_dtype(dtype))

    def empty_pinned(self, shape, dtype):
        """A NumPy array in page-locked memory: the device copies from there and to there by itself,
        while the host goes on.
        """
        dtype = _numpy_dtype(dtype)
        memory = sys.modules["cupy"].cuda.alloc_pinned_memory(math.prod(shape) * dtype.itemsize)
        return np.ndarray(shape, dtype, buffer=memory)

    def event(self):
        """Happens when what is on the current stream so far is done."""
        event = sys.modules["cupy"].cuda.Event(disable_timing=True)
        event.record()
        return event

    def fill_zero(self, x):
        x.fill(0)

    def upload(self, x, like):
        pinned = self.empty_pinned(x.shape, x.dtype)
        pinned[...] = x
        there = sys.modules["cupy"].empty(x.shape, x.dtype)
        there.set(pinned)
        self._keep(pinned)
        return there

    def _keep(self, pinned):
        """Until it is copied; in a graph, which copies it each time, as long as there is the graph.
        CuPy would give the memory to the next who asks.
        """
        if (graph := driver.recording()) is not None:
            graph.pinned.append(pinned)
            return
        with self._lock:
            self._copies = [(e, kept) for e, kept in self._copies if not e.done]
            self._copies.append((self.event(), pinned))

    def numpy(self, x):
        return x.get()


class TorchHome:
    """PyTorch's tensors, on its current stream."""

    module = "torch"

    def device(self, x):
        return x.device.index

    def describe(self, x):
        try:
            plain = not (x.is_meta or x.is_sparse or x.is_nested or x.is_neg() or x.is_conj())
            address = x.data_ptr() if plain else 0
        except RuntimeError:  # sparse in another way, inside vmap, fake, ...
            address = 0
        if address == 0 and x.numel():
            raise ValueError(
                f"a {type(x).__name__} ({x.layout}, {x.device}) without numbers in memory"
            )
        return address, DTYPES[str(x.dtype).rpartition(".")[2]], tuple(x.shape), x.stride()

    def writable(self, x):
        return True

    def empty(self, shape, dtype, like):
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))

    def fill_zero(self, x):
        x.zero_()

    def upload(self, x, like):
        return sys.modules["torch"].from_numpy(x).to(like.device)

    def numpy(self, x):
        return x.detach().cpu().numpy()


class AbstractHome:
    """No memory at all: for compiling without a GPU."""

    module = "abstract"

    def device(self, x):
        return None

    def describe(self, x):
        strides = x.strides or tuple(math.prod(x.shape[i + 1 :]) for i in range(len(x.shape)))
        return 0, DTYPES[x.dtype], x.shape, strides

    def writable(self, x):
        return True

    def empty(self, shape, dtype, like):
        return Abstract(shape, dtype)

    def fill_zero(self, x):
        pass

    def upload(self, x, like):
        return Abstract(x.shape, x.dtype)


class Abstract:
    """Shape and dtype of an array that does not exist: see driver.compiling."""

    def __init__(self, shape, dtype, strides=None):
        self.shape, self.dtype, self.strides = tuple(shape), str(dtype), strides

    def __getitem__(self, part):
        strides = _ABSTRACT.describe(self)[3]
        shape = np.broadcast_to(0, self.shape)[part].shape
        return Abstract(shape, self.dtype, strides[-len(shape) :])

    def swapaxes(self, i, j):
        shape, strides = list(self.shape), list(_ABSTRACT.describe(self)[3])
        for x in (shape, strides):
            x[i], x[j] = x[j], x[i]
        return Abstract(shape, self.dtype, tuple(strides))


_HOMES = {home.module: home() for home in (NumPyHome, SimulatedHome, CuPyHome, TorchHome)}
_ABSTRACT = AbstractHome()


def _in_elements(x):
    """The strides of an array of NumPy or CuPy."""
    if any(stride % x.itemsize for stride in x.strides):
        raise ValueError(f"strides of {x.strides} bytes, which is no whole number of elements")
    return tuple(stride // x.itemsize for stride in x.strides)


def home():
    """Whose arrays are used where the caller brings none. RuntimeError if no kernel can run."""
    if (why := driver.unavailable()) is not None:
        raise RuntimeError(f"no arrays can be made on a GPU: {why}")
    return _HOMES["simulated" if driver.INTERPRETED else "cupy"]


def _numpy_dtype(dtype):
    if isinstance(dtype, str) and dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return np.dtype(dtype)


def array(x, name, dtypes=FLOATS, ndim=None):
    """`x` as an Array. TypeError or ValueError, in one line, if no kernel can take it.

    name     what the caller calls it, for messages
    dtypes   the dtypes that will do
    ndim     the number of axes, if it matters
    """
    if isinstance(x, Array):
        return x
    x, home = _at_home(x, name)
    driver.use(home)
    if (device := home.device(x)) is not None and device != driver.device():
        raise ValueError(
            f"{name} is on GPU {device}, but the current one is {driver.device()}: make that one "
            "current first"
        )
    try:
        found = Array(x, home)
    except KeyError:
        raise TypeError(f"{name} has dtype {x.dtype}; expected {_either(dtypes)}") from None
    except ValueError as error:
        raise ValueError(f"{name} has {error}: expected plain, strided numbers") from None
    if found.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {found.dtype}; expected {_either(dtypes)}")
    if ndim is not None and found.ndim != ndim:
        raise ValueError(f"{name} has shape {found.shape}; expected {ndim} axes")
    return found


def _at_home(x, name):
    """(x or a view of it, its home)."""
    if isinstance(x, np.ndarray):
        if not driver.INTERPRETED:
            raise TypeError(
                f"{name} is a NumPy array: the GPU's kernels take CuPy arrays or PyTorch tensors; "
                "NumPy arrays are for TRITON_INTERPRET=1"
            )
        if isinstance(x, simulated.DeviceArray):
            return x, _HOMES["simulated"]
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array; expected a plain one: use {name}.filled(0)")
        return x if type(x) is np.ndarray else x.view(np.ndarray), _HOMES["numpy"]
    if isinstance(x, Abstract):
        if not driver.compiles():
            raise TypeError(f"{name} has no memory: Abstract arrays are for driver.compiling()")
        return x, _ABSTRACT
    if (torch := sys.modules.get("torch")) and isinstance(x, torch.Tensor):
        if not driver.INTERPRETED and x.device.type != "cuda":
            raise TypeError(f"{name} is on {x.device}; move it to the GPU with .cuda()")
        return x, _HOMES["torch"]
    if (cupy := sys.modules.get("cupy")) and isinstance(x, cupy.ndarray):
        return x, _HOMES["cupy"]
    if driver.INTERPRETED:
        return _as_numpy(x, name), _HOMES["numpy"]
    return _as_cupy(x, name), _HOMES["cupy"]


def _as_numpy(x, name):
    """A view of an array of another library, for the interpreter."""
    try:
        return np.from_dlpack(x)
    except Exception as error:  # no such protocol, memory of a GPU, a dtype that NumPy lacks
        raise TypeError(
            f"{name} is a {type(x).__name__}; expected an array of NumPy or PyTorch on the host "
            f"({error})"
        ) from None


def _as_cupy(x, name):
    """A view of an array of another library, through the protocols that GPU libraries share."""
    if not (hasattr(x, "__cuda_array_interface__") or hasattr(x, "__dlpack__")):
        raise TypeError(f"{name} is a {type(x).__name__}; expected an array of CuPy or PyTorch")
    try:
        import cupy
    except ModuleNotFoundError:
        raise TypeError(
            f"{name} is a {type(x).__name__}, which CuPy has to read: install it"
        ) from None
    try:
        return cupy.asarray(x) if hasattr(x, "__cuda_array_interface__") else cupy.from_dlpack(x)
    except Exception as error:  # memory of the host, a dtype that CuPy lacks, no GPU
        raise TypeError(f"{name} cannot be read by CuPy: {error}") from error


# --- sizes ----------------------------------------------------------------------------------------
# Triton has both, made for kernels, too: a call from Python takes microseconds.


def cdiv(n, size):
    """How many pieces of that size n elements take."""
    return -(-n // size)


def next_power_of_2(n):
    """The smallest power of two that is at least n, n ≥ 1."""
    return 1 << (n - 1).bit_length()


def _either(names):
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
