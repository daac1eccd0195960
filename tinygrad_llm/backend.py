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
import warnings
from functools import partial

import numpy as np

from .ops import TABLE

# --- namespaces -----------------------------------------------------------------------------------


class Space:
    """The array API of `base` with the op table laid over it: the `xp` that ops are given.

    A name in the table that has a forward is that op (its first output); any other is the base's
    own. The table comes first because some bases export, say, a `softmax` of their own.
    """

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
    """

    __slots__ = ("accepts", "forward", "is_kernel", "op", "saves", "vjp")

    def __init__(self, op, forward, vjp, saves, is_kernel=False, accepts=None):
        self.op, self.forward, self.vjp = op, forward, vjp
        self.saves, self.is_kernel, self.accepts = saves, is_kernel, accepts


class Reading(dict):
    """op -> Implementation, filled in as ops are met."""

    def __init__(self, space, kernels=None):
        self.space = space
        self.kernels = kernels or {}

    def __missing__(self, op):
        kernel = self.kernels.get(op.name)
        if kernel is None:
            vjp = partial(op.vjp, self.space)
            self[op] = Implementation(op, self._forward(op), vjp, op.saves)
        else:
            accepts = getattr(kernel, "accepts", None)
            self[op] = Implementation(op, kernel.forward, kernel.vjp, True, True, accepts)
        return self[op]

    def _forward(self, op):
        if not op.primitive:
            return partial(op.forward, self.space)
        function = getattr(self.space, op.name)
        if op.variadic:
            return lambda *arrays, **attributes: function(arrays, **attributes)
        return function


def _load_kernels(name):
    """name -> kernel, from all modules of a package; nothing if there is no such package."""
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError:
        return {}
    found = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not module.name.rpartition(".")[2].startswith("_"):
            contents = vars(importlib.import_module(module.name))
            found |= {name: contents[name] for name in contents.get("KERNELS", ())}
    unknown = sorted(set(found) - set(TABLE))
    if unknown:
        raise ImportError(f"kernels for ops that do not exist: {', '.join(unknown)}")
    return found


@functools.cache
def gpu_kernels():
    """name -> Triton kernel for the ops that have one. Where they cannot run, nothing, and a
    warning, once, that says why: everything is computed with NumPy then.
    """
    reason = _no_gpu()
    if reason is None:
        return _load_kernels("tinygrad_llm.kernels.gpu")
    warnings.warn(f"no GPU kernels: {reason}; computing with NumPy", stacklevel=2)
    return {}


def _no_gpu():
    try:
        driver = importlib.import_module("tinygrad_llm.kernels.gpu.driver")
    except ModuleNotFoundError as error:
        return str(error)
    return driver.unavailable()


_NUMPY = Space(np)
_NUMPY.matrix_transpose = operator.attrgetter("mT")  # the same, seven times as fast on small arrays
MATHS = Reading(_NUMPY)
CPU = Reading(_NUMPY, _load_kernels("tinygrad_llm.kernels.cpu"))
COMPLEX = Reading(Space(_ComplexNumPy()))


class _Current(threading.local):
    reading = MATHS if os.environ.get("TINYGRAD_LLM_KERNELS") == "off" else CPU


current = _Current()


@contextlib.contextmanager
def using(reading):
    """Ops inside the block run as `reading` says: using(MATHS) switches the kernels off."""
    before, current.reading = current.reading, reading
    try:
        yield
    finally:
        current.reading = before


# --- arrays ---------------------------------------------------------------------------------------


def asarray(data, dtype=None):
    """`data` as a NumPy array: Python floats become float32 and integers int64, as in PyTorch."""
    if dtype is None and not isinstance(data, np.ndarray | np.generic):
        array = np.asarray(data)
        return array.astype(np.float32) if array.dtype == np.float64 else array
    return np.asanyarray(data, dtype=dtype)


def check_device(device):
    """Raises ValueError unless arrays can live on `device`."""
    if device != "cpu":
        raise ValueError(f"device {device!r} is not available; this version computes on 'cpu'")
