"""Which arrays, and which code for an op: everything that depends on where the numbers live.

A *reading* maps each op to the functions that run it. `MATHS` reads the op's own lines with NumPy,
`CPU` puts a kernel of the same name from `kernels/cpu/` in their place where there is one,
`COMPLEX` reads them on complex numbers for the gradient checker. One reading is in force at a time.
"""

import contextlib
import functools
import importlib
import operator
import os
import pkgutil
import threading
from collections import Counter
from functools import partial

import numpy as np

from . import precision
from .device import CPU as HOST
from .device import of
from .ops import TABLE

# --- namespaces -----------------------------------------------------------------------------------


class Space:
    """The array API of `base` with the op table laid over it: the `xp` that ops are given.

    A name in the table that has a forward is that op (its first output); any other is the base's
    own. The table comes first because some bases export, say, a `softmax` of their own.
    """

    bfloat16 = precision.DTYPES["bfloat16"]  # which no base has

    def __init__(self, base):
        self.base = base

    def __getattr__(self, name):
        value = self._from_table(TABLE[name]) if name in TABLE else getattr(self.base, name)
        setattr(self, name, value)  # found once
        return value

    def _from_table(self, op):
        if op.primitive:
            return getattr(self.base, op.name)

        def run(*args, **keywords):
            arrays, attributes = op.bind(args, keywords)
            y = op.forward(self, *arrays, **attributes)
            return y[0] if op.saves else y

        return run


_COMPARISONS = {np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal}
_EXTREMA = {np.maximum: np.max, np.minimum: np.min}
_NOT_ANALYTIC = {np.absolute, np.conjugate, np.sign, np.floor, np.ceil, np.rint, np.trunc}


class ComplexStep(np.ndarray):
    """Complex numbers x + ih that stand for the real x: comparisons and maxima look at x alone.

    Where several elements share the maximum, the result is their mean, so that its imaginary part
    is the mean of theirs: the convention that the gradients of max, min and maximum follow.
    """

    def __array_ufunc__(self, ufunc, method, *inputs, **keywords):
        arrays = [np.asarray(a) for a in inputs]
        if ufunc in _NOT_ANALYTIC:
            raise TypeError(
                f"{ufunc.__name__} has no complex derivative; write it with where and comparisons"
            )
        if ufunc in _COMPARISONS:
            return ufunc(*[a.real for a in arrays])
        if ufunc in _EXTREMA:
            if method == "__call__":
                arrays = [np.stack(np.broadcast_arrays(*arrays))]
                keywords = {"axis": 0}
            return self._extremum(_EXTREMA[ufunc], arrays[0], **keywords)
        if "out" in keywords:  # np.mean divides in place
            keywords["out"] = tuple(np.asarray(o) for o in keywords["out"])
        return _complex(getattr(ufunc, method)(*arrays, **keywords))

    @staticmethod
    def _extremum(function, x, axis=None, keepdims=False, **_):
        chosen = x.real == function(x.real, axis=axis, keepdims=True)
        steps = np.sum(np.where(chosen, x.imag, 0), axis=axis, keepdims=keepdims)
        count = np.sum(chosen, axis=axis, keepdims=keepdims)
        return _complex(function(x.real, axis=axis, keepdims=keepdims) + 1j * steps / count)


def _complex(value):
    """Arrays of complex numbers (and only those) as ComplexStep."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "c":
        return np.asarray(value).view(ComplexStep)
    return value


class _ComplexNumPy:
    """NumPy for complex steps: what is real stays real, floats become complex, nothing drops h."""

    def __getattr__(self, name):
        if name in ("real", "imag", "conj", "var", "std", "vecdot"):
            raise TypeError(f"xp.{name} has no complex derivative; write it with +, * and mean")
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function  # a dtype or a constant
        return lambda *args, **keywords: _complex(function(*args, **keywords))

    @staticmethod
    def astype(x, dtype):
        keeps = x.dtype.kind == "c" and np.issubdtype(dtype, np.floating)
        return x if keeps else _complex(np.astype(x, dtype))


# --- readings -------------------------------------------------------------------------------------


class Implementation:
    """How one op runs: forward(*arrays, **attributes) and vjp(g, y, *arrays, **attributes).

    saves       forward returns (y, saved), and vjp takes `saved`
    is_kernel   it keeps the rules of kernels/cpu/__init__.py: vjp takes `needs`, and so on
    accepts     None, or a function of forward's arguments: whether the kernel can do this case
    fallback    what runs the op where forward refuses its arguments, or None: see GPU kernels
    """

    __slots__ = ("accepts", "fallback", "forward", "is_kernel", "op", "saves", "vjp")

    def __init__(self, op, forward, vjp, saves, is_kernel=False, accepts=None, fallback=None):
        self.op, self.forward, self.vjp = op, forward, vjp
        self.saves, self.is_kernel = saves, is_kernel
        self.accepts, self.fallback = accepts, fallback


class Reading(dict):
    """op -> Implementation, filled in as ops are met.

    space       the `xp` of the ops' own lines
    kernels     name -> kernel that takes the place of these lines
    off         names of the kernels that are switched off, on every device; None: all are
    narrow      whether it is for arrays of 16 bits: see precision.py
    fused       name -> kernel that takes the place of several ops: see tensor.fused
    """

    def __init__(self, space, kernels=None, off=None, narrow=False, fused=None):
        self.space, self.narrow = space, narrow
        self.kernels = kernels or {}
        self.off = frozenset() if off is None and kernels else off
        self.fused, self._elsewhere = fused or {}, {}

    def __missing__(self, op):
        kernel = self.kernels.get(op.name)
        self[op] = self._maths(op) if kernel is None else self._kernel(op, kernel)
        return self[op]

    def on(self, device, narrow=False):
        """What this reading is for the arrays of a device, perhaps of 16 bits."""
        found = self._elsewhere.get((device, narrow))
        if found is None:
            found = self._elsewhere[device, narrow] = self._made_for(device, narrow)
        return found

    def _made_for(self, device, narrow):
        if device is HOST and not (narrow and self.space is _NUMPY):
            return self
        if device is HOST:  # where no kernel takes 16 bits
            return Reading(_NUMPY, {}, self.off, narrow=True)
        found = Reading(_space(device), self._allowed(device), self.off, narrow)
        found.fused = self._allowed(device, "FUSED")
        return found

    def _allowed(self, device, which="KERNELS"):
        if self.off is None:
            return {}
        kernels = _load_kernels(device.kernels, which)
        return {name: kernel for name, kernel in kernels.items() if name not in self.off}

    def _kernel(self, op, kernel):
        accepts, vjp, fallback = getattr(kernel, "accepts", None), kernel.vjp, None
        if self.space is not _NUMPY:
            vjp, fallback = with_plain_gradient(vjp), self._maths(op)
        return Implementation(op, kernel.forward, vjp, True, True, accepts, fallback)

    def _maths(self, op):
        forward, vjp = self._forward(op), partial(op.vjp, self.space)
        if self.narrow:
            forward, vjp = precision.in_float32(forward, vjp, op.saves, op.name)
        return Implementation(op, forward, vjp, op.saves)

    def _forward(self, op):
        if not op.primitive:
            return partial(op.forward, self.space)
        function = getattr(self.space, op.name)
        if op.variadic:
            return lambda *arrays, **attributes: function(arrays, **attributes)
        return function


def with_plain_gradient(vjp):
    """A GPU kernel's vjp that takes any gradient: what is spread out in memory is copied first."""

    def plain_vjp(g, *rest, **keywords):
        try:
            return vjp(g, *rest, **keywords)
        except (TypeError, ValueError):  # before anything was launched
            if g.flags.c_contiguous:
                raise
        return vjp(g.copy(), *rest, **keywords)

    return plain_vjp


@functools.cache
def _load_kernels(package, which="KERNELS"):
    """name -> kernel, from all modules of a package; nothing if there is no such package.

    which   "KERNELS", which stand for an op, or "FUSED", for several: see tensor.fused
    """
    try:
        package = importlib.import_module(package)
    except ModuleNotFoundError:
        return {}
    found = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not module.name.rpartition(".")[2].startswith("_"):
            contents = vars(importlib.import_module(module.name))
            found |= {name: contents[name] for name in contents.get(which, ())}
    unknown = sorted(set(found) - set(TABLE))
    if unknown and which == "KERNELS":
        raise ImportError(f"kernels for ops that do not exist: {', '.join(unknown)}")
    return found


def run_fused(name, definition, *arrays, **attributes):
    """What the fused kernel of that name makes of arrays of one device, without gradients; where
    there is none, or where it refuses them, which is counted, definition(*arrays, **attributes).
    """
    kernel = fused_kernel(name, arrays[0])
    if kernel is not None:
        try:
            return kernel.forward(*arrays, **attributes)[0]
        except (TypeError, ValueError) as error:  # before anything was launched
            refusals[name, str(error)] += 1
    return definition(*arrays, **attributes)


def fused_kernel(name, array):
    """The fused kernel of that name for an array of its device, or None."""
    return current.reading.on(of(array)).fused.get(name)


def kernel_module(device, name):
    """The module of a device's kernels that has those of no op, such as "optim"; None where there
    is none, or where kernels are switched off.
    """
    if not device.kernels or current.reading.off is None or name in current.reading.off:
        return None
    try:
        return importlib.import_module(f"{device.kernels}.{name}")
    except ModuleNotFoundError:
        return None


@functools.cache
def _space(device):
    """The namespace of a device with the op table laid over it."""
    space = Space(device.xp)
    if device is HOST:  # the same, seven times as fast on small arrays
        space.matrix_transpose = operator.attrgetter("mT")
    else:  # CuPy's calls the shape `newshape`
        space.reshape = lambda x, shape: x.reshape(shape)
    return space


# --- which one is in force ------------------------------------------------------------------------


_NUMPY = _space(HOST)
MATHS = Reading(_NUMPY)
_CPU_KERNELS = "tinygrad_llm.kernels.cpu"
CPU = Reading(_NUMPY, _load_kernels(_CPU_KERNELS), fused=_load_kernels(_CPU_KERNELS, "FUSED"))
COMPLEX = Reading(Space(_ComplexNumPy()))


def reading(choice):
    """The reading of that name: "auto", with all kernels; "off", without; "off:softmax,linear",
    without these, on whatever device. Raises ValueError.
    """
    if choice == "auto":
        return CPU
    if choice == "off":
        return MATHS
    off = frozenset(choice.removeprefix("off:").split(",")) if choice.startswith("off:") else {""}
    known = {*TABLE, *FUSED, "optim"}
    if unknown := sorted(off - known):
        raise ValueError(
            f"kernels is {choice!r}; expected auto, off, or off: and names of ops, such as "
            "off:softmax,linear" + (f": there is no {unknown[0]!r}" if unknown[0] else "")
        )
    kernels, fused = (
        {name: kernel for name, kernel in those.items() if name not in off}
        for those in (CPU.kernels, CPU.fused)
    )
    return Reading(_NUMPY, kernels, off, fused=fused)


FUSED = (
    "mlp",
    "self_attention",
    "seeded_dropout",
    "linear_cross_entropy",
    "append",
    "block",
    "decode",
    "lora",
)  # kernels for several ops: tensor.fused, run_fused


class _Current(threading.local):
    @functools.cached_property
    def reading(self):
        try:
            return reading(os.environ.get("TINYGRAD_LLM_KERNELS") or "auto")
        except ValueError as error:
            raise ValueError(f"TINYGRAD_LLM_KERNELS: {error}") from None


current = _Current()
refusals = Counter()  # (op, why) -> how often a GPU kernel left a call to the op's own lines


@contextlib.contextmanager
def using(how):
    """Ops inside the block run as a Reading says, or one of that name: using("off") switches the
    kernels off. TypeError for anything else, ValueError for names that reading() does not know.
    """
    how = reading(how) if isinstance(how, str) else how
    if not isinstance(how, Reading):
        raise TypeError(f"using takes a Reading, or its name, such as 'off', not {how!r}")
    before, current.reading = current.reading, how
    try:
        yield
    finally:
        current.reading = before


# --- arrays ---------------------------------------------------------------------------------------


def asarray(data, dtype=None):
    """`data` as an array of the device that it is on, NumPy's for what is on none: Python floats
    become float32 and integers int64, as in PyTorch.
    """
    if of(data) is not HOST:
        return data if dtype is None else data.astype(dtype, copy=False)
    if dtype is None and not isinstance(data, np.ndarray | np.generic):
        array = np.asarray(data)
        return array.astype(np.float32) if array.dtype == np.float64 else array
    return np.asanyarray(data, dtype=dtype)


def beside(x, a):
    """The array or number `a` where the array x lives."""
    return of(x).put(a) if isinstance(a, np.ndarray) else a
