"""A GPU's arrays and its graphs, simulated on NumPy: to prove without a GPU that a computation runs
on one, and can be captured.

`DeviceArray` and `xp` have the manners of CuPy: a result is an array even if it is one number, and
arrays of the host and of the device do not mix. While a `Recording` is in force, as in the capture
of a CUDA graph,

- what is computed is noted down, to be done by each replay, and leaves existing arrays as they are;
- new arrays have their shapes and dtypes, but contents only after a replay;
- what would wait for the device raises: reading a value, copying from pageable memory, a result
  whose shape depends on values.

One thing escapes notice: np.float32(x), where float(x) raises.
"""

import contextlib
import functools
import inspect
import sys
import threading
import types
from functools import partial

import numpy as np

from . import driver


class DeviceArray(np.ndarray):
    """A NumPy array that stands for one on a GPU. `get` and `set` are CuPy's."""

    __array_priority__ = 100

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return _ufunc(ufunc, method, *inputs, **options)

    def __array_function__(self, function, types, arguments, options):
        return _call(function, arguments, options)

    def __getitem__(self, index):
        if any(i.dtype == bool for i in _arrays(index)):
            _refuse("x[mask], whose shape depends on values,")
        _refuse_lists(index)
        x = self.view(np.ndarray)
        return _new(partial(_part, x, _plain(index)), [x])

    def __setitem__(self, index, value):
        _refuse_lists(index)
        _write(partial(self.view(np.ndarray).__setitem__, _plain(index), _plain(value)))

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    @property
    def flat(self):
        _refuse("x.flat")
        return self.view(np.ndarray).flat

    def get(self, *, out=None, blocking=True):
        """A copy on the host, or in `out`, an array of the host."""
        _refuse("x.get()")
        if out is None:
            return np.array(self.view(np.ndarray))
        np.copyto(out, self.view(np.ndarray), casting="no")
        return out

    def set(self, host):
        """Copies an array of the host, of the same shape and dtype, to this one."""
        if host.shape != self.shape or host.dtype != self.dtype:
            raise ValueError(f"{host.dtype} {host.shape} set to {self.dtype} {self.shape}")
        if not isinstance(host, PinnedArray):
            _refuse("x.set(y) from pageable memory")
        _write(partial(np.copyto, self.view(np.ndarray), host.view(np.ndarray)))


class PinnedArray(np.ndarray):
    """Stands for an array in page-locked host memory: copies to the device do not wait."""


def empty_pinned(shape, dtype):
    """A new PinnedArray, as cupyx.empty_pinned gives it."""
    return np.empty(shape, dtype).view(PinnedArray)


# --- recording ------------------------------------------------------------------------------------


class Recording:
    """What a function computes on the device, to be computed again without the function.

    memory   bytes of the arrays that it made
    """

    def __init__(self):
        self.memory, self._calls = 0, []

    def record(self, function):
        """What function() returns: arrays that each replay fills."""
        quiet = np.errstate(all="ignore")  # contents that are not there yet are zeros
        with driver.recording_into(self), _conversions_refused(), quiet:
            return function()

    def replay(self):
        """Everything again, in order, into the same arrays."""
        _write(self._run)

    def _run(self):
        with np.errstate(all="ignore"):
            for call in self._calls:
                call()

    def launch(self, kernel, grid, arguments, options):
        """Notes a Triton launch: driver.launch comes here."""
        self._calls.append(partial(driver.launch, kernel, grid, *arguments, **options))

    def write(self, run):
        """Notes a call that writes to arrays that there are."""
        self._calls.append(run)

    def new(self, run, results):
        """Notes a call, and the arrays that are to hold what it gives."""
        self.memory += sum(there.nbytes for there in results)

        def again():
            for there, found in zip(results, _arrays(_as_arrays(run()))):
                there[...] = found

        self._calls.append(again)


def _refuse(what):
    if driver.recording() is not None:
        raise RuntimeError(f"{what} would wait for the device while a graph is being recorded")


def _refuse_lists(index):
    if any(isinstance(i, list) for i in (index if isinstance(index, tuple) else [index])):
        _refuse("x[list], which copies the list to the device,")


_CONVERSIONS = {
    name: getattr(np, name)
    for name in ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray")
}
_patching = threading.Lock()


@contextlib.contextmanager
def _conversions_refused():
    """NumPy makes a plain array of a DeviceArray without asking it; inside, these functions ask."""

    def refusing(name, function):
        @functools.wraps(function)
        def convert(*arguments, **options):
            if any(isinstance(x, DeviceArray) for x in _arrays(arguments)):
                _refuse(f"numpy.{name}(x)")
            return function(*arguments, **options)

        return convert

    with _patching:
        try:
            for name, function in _CONVERSIONS.items():
                setattr(np, name, refusing(name, function))
            yield
        finally:
            for name, function in _CONVERSIONS.items():
                setattr(np, name, function)


# --- computing ------------------------------------------------------------------------------------


def _new(run, inputs=None):
    """run() on the device; noted down if one of its results is no view of the inputs, which are the
    arguments if nobody says otherwise.
    """
    result = _as_arrays(run())
    if (recording := driver.recording()) is not None:
        if inputs is None:
            inputs = list(_arrays([*run.args, *run.keywords.values()]))
        views = [any(np.may_share_memory(r, x) for x in inputs) for r in _arrays(result)]
        if not all(views):
            result = _each(_writable, result)
            recording.new(run, list(_arrays(result)))
    return _on_device(result)


def _write(run):
    """run(), which writes to arrays that there are: now, or in each replay."""
    if (recording := driver.recording()) is None:
        run()
    else:
        recording.write(run)


def _ufunc(ufunc, method, *inputs, out=None, **options):
    run = partial(getattr(ufunc, method), *_plain(inputs), **_plain(options))
    if method == "at":
        return _write(run)
    if out is None:
        return _new(run)
    if any(x is None for x in out):
        raise TypeError(f"{ufunc.__name__} got some of its outputs; expected all or none")
    _write(partial(run, out=_plain(out)))
    return out[0] if len(out) == 1 else out


def _call(function, arguments, options):
    """function(*arguments, **options) of NumPy, on the device."""
    if function in _DEPENDENT or (function is np.where and len(arguments) == 1):
        _refuse(f"{function.__name__}, whose result depends on values,")
    run = partial(function, *_plain(arguments), **_plain(options))
    if function in _WRITERS:
        return _write(run)
    if (out := _output(function, arguments, options)) is not None:
        _write(run)
        return out
    if function in _EMPTY:
        return _empty(run)
    return _new(run)


def _empty(run):
    result = run()
    if (recording := driver.recording()) is not None:
        result[...] = 0  # as good as anything, and what comes of it may be an index
        recording.memory += result.nbytes
    return _on_device(result)


def _output(function, arguments, options):
    """The argument `out` of a call."""
    position = _position_of_out(function)
    return arguments[position] if position < len(arguments) else options.get("out")


@functools.cache
def _position_of_out(function):
    """Where `out` stands among the arguments; beyond all of them if it has to be named."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C
        parameters = {}
    named_only = "out" not in parameters or parameters["out"].kind is inspect.Parameter.KEYWORD_ONLY
    return sys.maxsize if named_only else list(parameters).index("out")


def _writable(x):
    return x if x.flags.writeable else x.copy()  # a number broadcast


def _part(x, index):
    """x[index]; for one element, an array nevertheless, and a view if NumPy's rules say so."""
    part = x[index]
    if isinstance(part, np.ndarray):
        return part
    return x[(*index, ...) if isinstance(index, tuple) else (index, ...)]


def _plain(x):
    """x with a NumPy view in place of each DeviceArray. TypeError for arrays of the host."""
    if isinstance(x, DeviceArray):
        return x.view(np.ndarray)
    if isinstance(x, np.ndarray):
        if x.ndim:
            raise TypeError(
                f"Unsupported type {type(x)}: an array of the host among arrays of the device; "
                "xp.asarray(x) copies it there"
            )
        return x[()]  # as a number: it may change before a replay
    if type(x) in (list, tuple):
        return type(x)(map(_plain, x))
    return {name: _plain(value) for name, value in x.items()} if type(x) is dict else x


def _arrays(x):
    """The arrays among results or arguments, however nested."""
    if isinstance(x, np.ndarray):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _arrays(part)


def _each(change, x):
    """change(array) for the arrays of a result, in the same list, tuple or named tuple."""
    if isinstance(x, np.ndarray | np.generic):
        return change(x)
    if isinstance(x, list | tuple):
        parts = [_each(change, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


_as_arrays = partial(_each, _CONVERSIONS["asarray"])  # one number is an array, too
_on_device = partial(_each, lambda x: x.view(DeviceArray))


# --- NumPy's functions and methods ----------------------------------------------------------------


def _members(owner, names):
    return {getattr(owner, name) for name in names.split()}


_METHODS = _members(
    np.ndarray,
    "all any argmax argmin argpartition argsort astype byteswap choose clip compress conj "
    "conjugate copy cumprod cumsum diagonal dot fill flatten max mean min nonzero partition prod "
    "put ravel repeat reshape round searchsorted sort squeeze std sum swapaxes take trace "
    "transpose var",
)
_READERS = _members(
    np.ndarray,
    "__array__ __bool__ __complex__ __contains__ __dlpack__ __float__ __format__ __index__ __int__ "
    "__repr__ __str__ dump dumps item tobytes tofile tolist",
)
_EMPTY = _members(np, "empty empty_like")
_WRITERS = _members(np, "copyto fill_diagonal place put put_along_axis putmask")
_WRITERS |= _members(np.ndarray, "fill partition put sort")
_DEPENDENT = _members(np.ndarray, "compress nonzero") | _members(
    np,
    "allclose argwhere array2string array_equal array_equiv array_repr array_str bincount compress "
    "delete extract flatnonzero histogram insert intersect1d nonzero save savetxt savez "
    "savez_compressed setdiff1d setxor1d trim_zeros union1d unique unique_all unique_counts "
    "unique_inverse unique_values",
)


def _computing(function):
    @functools.wraps(function)
    def method(self, *arguments, **options):
        return _call(function, (self, *arguments), options)

    return method


def _reading(function):
    @functools.wraps(function)
    def method(self, *arguments, **options):
        _refuse(f"{function.__name__} of an array")
        return function(self.view(np.ndarray), *arguments, **options)

    return method


for _function in _METHODS:
    setattr(DeviceArray, _function.__name__, _computing(_function))
for _function in _READERS:
    setattr(DeviceArray, _function.__name__, _reading(_function))


# --- the namespace --------------------------------------------------------------------------------


class _Namespace:
    """A module of NumPy on the device: its functions give DeviceArrays."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        value = self._wrapped(name, getattr(self._module, name))
        setattr(self, name, value)  # found once
        return value

    @staticmethod
    def _wrapped(name, value):
        if isinstance(value, types.ModuleType):
            return _Namespace(value)
        if isinstance(value, np.ufunc):
            return _Ufunc(value)
        if name in _CONVERSIONS:
            return partial(_converted, _CONVERSIONS[name])
        if isinstance(value, type) or not callable(value):
            return value  # a dtype or a constant
        return functools.wraps(value)(lambda *args, **options: _call(value, args, options))


class _Ufunc:
    """A ufunc on the device, also of numbers alone; `add.at` and its like are NumPy's."""

    def __init__(self, ufunc):
        self._ufunc = ufunc

    def __call__(self, *arguments, **options):
        if any(isinstance(x, DeviceArray) for x in (*arguments, options.get("out"))):
            return self._ufunc(*arguments, **options)  # which comes to __array_ufunc__
        return _ufunc(self._ufunc, "__call__", *arguments, **options)

    def __getattr__(self, name):
        return getattr(self._ufunc, name)


def _converted(function, x, *arguments, **options):
    """xp.asarray and its like: from the host, a copy on the device."""
    if any(isinstance(part, DeviceArray) for part in _arrays(x)):
        plain = _plain(x)
        same = isinstance(x, DeviceArray) and function(plain, *arguments, **options) is plain
        return x if same else _call(function, (x, *arguments), options)
    if isinstance(x, np.ndarray | list | tuple) and not isinstance(x, PinnedArray):
        _refuse("copying from pageable memory to the device")
    return _new(lambda: np.array(function(x, *arguments, **options)), [])


class _CuPy(_Namespace):
    """NumPy's names, and those of CuPy that have no place there."""

    ndarray = DeviceArray

    @staticmethod
    def asnumpy(x):
        """A copy on the host."""
        return x.get() if isinstance(x, DeviceArray) else np.asarray(x)


xp = _CuPy(np)
