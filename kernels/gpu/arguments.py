"""What kernels demand of their arguments: TypeError or ValueError, in one line, before a launch."""

import numbers

import numpy as np

from . import driver
from .arrays import array


def same(kind, **named):
    """ValueError unless all arrays agree in `kind`: "dtype" or "shape"; TypeError for dtypes."""
    (first, a), *others = named.items()
    for name, b in others:
        if getattr(a, kind) != getattr(b, kind):
            error = TypeError if kind == "dtype" else ValueError
            mine, other = getattr(a, kind), getattr(b, kind)
            raise error(f"{name} has {kind} {other}; expected {mine}, as {first} has")


def shaped(x, name, shape):
    """ValueError unless x has that shape."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name} has shape {x.shape}; expected {tuple(shape)}")


def inner_contiguous(**named):
    """ValueError unless the last axis of each array is contiguous."""
    for name, x in named.items():
        if x.ndim and x.shape[-1] > 1 and x.strides[-1] != 1:
            raise ValueError(
                f"the last axis of {name} has stride {x.strides[-1]}; expected 1: make {name} "
                "contiguous first"
            )


def writable(out, name, **inputs):
    """ValueError unless an array can be written to, each of its elements is in a place of its own,
    and none of them is an input's. Inputs that are None are left out.
    """
    if not out.home.writable(out.data):
        raise ValueError(f"{name} is read-only; expected an array that can be written to")
    reach = 0  # of the axes with smaller steps
    for step, length in sorted(zip(map(abs, out.strides), out.shape)):
        if length > 1 and step <= reach:
            raise ValueError(f"{name} has strides {out.strides}: its own elements may overlap")
        reach += (length - 1) * step
    for other, x in inputs.items():
        if x is not None and not driver.compiles() and _overlap(out, x):
            raise ValueError(f"{name} shares memory with {other}: give it memory of its own")


def _overlap(x, y):
    """Whether two arrays have an element in common. NumPy answers that from addresses and strides,
    without reading; where it would take long, the answer is yes.
    """
    (begin, end), (first, last) = _extent(x), _extent(y)
    if end <= first or last <= begin:
        return False
    try:
        return np.shares_memory(np.asarray(_Place(x)), np.asarray(_Place(y)), max_work=10**4)
    except np.exceptions.TooHardError:
        return True


def _extent(x):
    """The first byte of an array, and the first one after it."""
    steps = [(length - 1) * stride for length, stride in zip(x.shape, x.strides)]
    below, above = sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)
    return x.address + below * x.dtype.itemsize, x.address + (above + 1) * x.dtype.itemsize


class _Place:
    """Where an Array lies, in the form that NumPy takes."""

    def __init__(self, x):
        self.__array_interface__ = {
            "version": 3,
            "data": (x.address, True),
            "shape": x.shape,
            "strides": tuple(stride * x.dtype.itemsize for stride in x.strides),
            "typestr": f"|V{x.dtype.itemsize}",
        }


def not_empty(**named):
    """ValueError if an array has no elements."""
    for name, x in named.items():
        if x.size == 0:
            raise ValueError(f"{name} has shape {x.shape}; expected at least one element")


def rows(x, name):
    """(number of rows, elements from one row to the next) of an array seen as a matrix: all axes
    but the last make up the rows. ValueError unless that works without a copy.
    """
    if x.ndim == 0:
        raise ValueError(f"{name} has shape (); expected at least one axis")
    inner_contiguous(**{name: x})
    count, stride = 1, None
    for length, step in reversed(list(zip(x.shape[:-1], x.strides[:-1]))):
        if length == 1:
            continue
        if stride is None:
            stride = step
        elif step != count * stride:
            raise ValueError(f"the rows of {name} are not evenly spaced: make it contiguous first")
        count *= length
    return count, x.shape[-1] if stride is None else stride


def contiguous(x, name):
    """ValueError unless the elements lie one after the other."""
    step = 1
    for length, stride in zip(reversed(x.shape), reversed(x.strides)):
        if length > 1 and stride != step:
            raise ValueError(f"{name} has strides {x.strides}; expected a contiguous array")
        step *= length


# --- what a backward pass is told -----------------------------------------------------------------


def needed(needs, count):
    """`needs` as `count` booleans: which gradients are wanted. TypeError or ValueError if it is not
    a sequence of 1 to `count` of them; those that it leaves out are not wanted.
    """
    if not isinstance(needs, tuple | list):
        raise TypeError(f"needs is {needs!r}; expected a tuple of up to {count} booleans")
    if not 1 <= len(needs) <= count:
        raise ValueError(f"needs has {len(needs)} entries; expected 1 to {count}")
    return (*map(bool, needs), *(False,) * (count - len(needs)))


def kept(saved, **expected):
    """The arrays in `saved`, as forward returned them.

    expected    for each of them: (shape, dtype)
    """
    if not isinstance(saved, tuple | list) or len(saved) != len(expected):
        raise ValueError(
            f"saved is {_described(saved)}; expected the {len(expected)} arrays that forward "
            "returned for the same attributes"
        )
    found = []
    for x, (name, (shape, dtype)) in zip(saved, expected.items()):
        name = f"saved {name}"
        x = array(x, name, (dtype,))
        shaped(x, name, shape)
        contiguous(x, name)
        found.append(x)
    return found


def _described(saved):
    several = isinstance(saved, tuple | list)
    return f"{len(saved)} arrays" if several else f"of type {type(saved).__name__}"


# --- attributes -----------------------------------------------------------------------------------


def one_of(value, name, choices):
    """ValueError unless the attribute is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def flag(value, name):
    """True or False. TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def integer(value, name, least, most=2**63 - 1, expected=None):
    """A Python integer. TypeError for other numbers, ValueError outside of least..most."""
    expected = expected or f"an integer from {least} to {_power(most)}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; expected {expected}")
    return int(value)


def number(value, name, fits, expected):
    """A float. TypeError for what is no real number, ValueError unless fits(value)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    if not fits(value):
        raise ValueError(f"{name} is {value}; expected {expected}")
    return float(value)


def seed_parts(seed, offset):
    """(word, number), whose sum modulo 2⁶³ is what is drawn with: see elementwise.seed_of.

    seed     an integer from 0 on, or an int64 array on the device with one element: then it is
             the word, which kernels read when they run; otherwise there is none
    offset   an integer from 0 on
    """
    offset = integer(offset, "seed_offset", 0)
    if isinstance(seed, np.generic) or not hasattr(seed, "shape"):
        expected = "an integer from 0 to 2⁶³ - 1, or an int64 array with one element"
        return None, (integer(seed, "seed", 0, expected=expected) + offset) % 2**63
    word = array(seed, "seed", ("int64",))
    if word.size != 1:
        raise ValueError(f"seed has shape {word.shape}; expected one element")
    return word, offset


def _power(n):
    return {2**63 - 1: "2⁶³ - 1", 2**31 - 1: "2³¹ - 1"}.get(n, n)
