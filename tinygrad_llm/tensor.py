"""Tensors and the tape: reverse-mode automatic differentiation.

Every op on Tensors makes a new Tensor that remembers its op and its inputs. `backward` walks from
the result to the inputs, youngest first, and hands each op's vjp the gradient that has arrived. No
op is named here: what an op does is in `ops/`, and how it runs is in `backend.py`.
"""

import contextlib
import heapq
import itertools
import threading
from functools import cache, partial
from types import SimpleNamespace

import numpy as np

from . import backend, precision
from .device import CPU, Device, is_device, of
from .device import device as named
from .ops import TABLE

_age = itertools.count().__next__  # Tensors are numbered as they are made
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_NUMBERS, _NUMPYS = (int, float, bool), np.ndarray


class _Recording(threading.local):
    on = True


_recording = _Recording()


def no_grad():
    """Nothing is recorded inside: results do not require grad, and no memory is kept for them."""
    return _recorded(False)


def enable_grad():
    """Inside, results are recorded again, also within `no_grad()`."""
    return _recorded(True)


@contextlib.contextmanager
def _recorded(on):
    before, _recording.on = _recording.on, on
    try:
        yield
    finally:
        _recording.on = before


def is_grad_enabled():
    """True unless inside `no_grad()`."""
    return _recording.on


class Tensor:
    """An array that remembers how it was made.

    data            array: of float32 from Python floats, of int64 from integers; NumPy's, or on a
                    GPU CuPy's
    requires_grad   whether gradients are wanted; only floating-point tensors can have them
    grad            None, or after backward() the sum of the gradients that reached this leaf
    """

    __slots__ = (
        "__weakref__",
        "_age",
        "_node",
        "_retains_grad",
        "data",
        "grad",
        "requires_grad",
    )  # fmt: skip
    __array_ufunc__ = None  # so that `array * tensor` asks the Tensor

    def __init__(self, data, requires_grad=False, dtype=None):
        data = data.data if isinstance(data, Tensor) else data
        array = backend.asarray(data, dtype)
        if array.dtype.kind not in "biufcV":
            raise TypeError(
                f"a Tensor holds numbers, not {array.dtype} (from {type(data).__name__})"
            )
        _fill(self, array, False, None)
        self.requires_grad_(requires_grad)

    # --- what it is ---

    shape = property(lambda self: self.data.shape, doc="Lengths of the axes, a tuple.")
    dtype = property(lambda self: self.data.dtype, doc="NumPy dtype of the elements.")
    ndim = property(lambda self: self.data.ndim, doc="Number of axes.")
    device = property(lambda self: of(self.data).name, doc='Where the data lives: "cpu", "cuda:0".')
    is_leaf = property(lambda self: self._node is None, doc="Not made by a recorded op.")

    def numel(self):
        """Number of elements."""
        return self.data.size

    def size(self, axis=None):
        """The shape, or the length of one axis."""
        return self.shape if axis is None else self.shape[axis]

    def numpy(self):
        """The data itself, not a copy; of a GPU, a copy. RuntimeError if it requires grad: detach()
        first.
        """
        if self.requires_grad:
            raise RuntimeError("numpy() of a Tensor that requires grad; use .detach().numpy()")
        return of(self.data).numpy(self.data)

    def item(self):
        """The only element as a Python number. Raises ValueError if there are more."""
        if self.data.size != 1:
            raise ValueError(
                f"item() needs exactly one element, this Tensor has shape {self.shape}"
            )
        return self.data.item()

    def tolist(self):
        """The data as nested Python lists."""
        return self.data.tolist()

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __len__(self):
        if not self.shape:
            raise TypeError("len() of a Tensor without axes")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __bool__(self):
        if self.data.size != 1:
            raise ValueError(
                f"a Tensor of shape {self.shape} is neither true nor false; use .any() or .all()"
            )
        return bool(self.data)

    __hash__ = object.__hash__  # by identity: == compares elements

    def __repr__(self):
        numbers, where = self.detach().numpy(), of(self.data)
        numbers = numbers.astype(np.float32) if precision.is_narrow(numbers) else numbers
        text = np.array2string(numbers, separator=", ", precision=4, prefix="tensor(")
        default = self.dtype in (np.float32, np.int64, np.bool)
        dtype = "" if default else f", dtype={self.dtype}"
        dtype += "" if where is CPU else f", device={where.name!r}"
        made_by = "" if self.is_leaf else f", op={self._node[0].op.name}"
        return f"tensor({text}{dtype}{made_by}{', requires_grad=True' * self.requires_grad})"

    # --- gradients ---

    def requires_grad_(self, requires_grad=True):
        """Switches recording on or off for this leaf, and returns it."""
        checked = isinstance(self.data, backend.ComplexStep)  # stands for a real number
        if requires_grad and not checked and self.data.dtype.kind not in "fV":  # V: bfloat16
            raise TypeError(f"only floating-point tensors have gradients, not {self.dtype}")
        if not requires_grad and not self.is_leaf:
            raise RuntimeError("only a leaf can stop requiring grad; use .detach()")
        self.requires_grad = bool(requires_grad)
        return self

    def retain_grad(self):
        """Keeps the gradient of this intermediate result in .grad, too; a leaf has it anyway."""
        self._retains_grad = not self.is_leaf
        return self

    def detach(self):
        """The same data, outside the graph."""
        return _fill(Tensor.__new__(Tensor), self.data, False, None)

    def backward(self, gradient=None, retain_graph=None, create_graph=False):
        """Adds d(self)/d(leaf) to the .grad of every leaf that requires one.

        gradient        what arrives here, in this Tensor's shape; 1 for a single number
        retain_graph    keep what the graph holds, for another backward; default: create_graph
        create_graph    record the backward pass itself, for higher derivatives
        """
        _walk(self, gradient, _add_to_grad, None, create_graph, retain_graph)

    # --- the same data, moved ---

    def to(self, *targets, device=None, dtype=None):
        """In another dtype, on another device ("cpu", "cuda", "cuda:1", ...), or both. The gradient
        flows back. What is so already is returned as it is. Raises ValueError for a device that
        cannot be used, TypeError for no dtype.
        """
        x = self
        for target in destinations(targets, device, dtype):
            if isinstance(target, Device):
                x = _moved(x, target)
            elif target != x.dtype:
                x = apply(TABLE["cast"], x, dtype=target.name)
        return x

    def cpu(self):
        """On the CPU."""
        return self.to("cpu")

    def cuda(self):
        """On the current GPU."""
        return self.to("cuda")

    def float(self):
        """As float32."""
        return self.to(np.float32)

    def bfloat16(self):
        """As bfloat16."""
        return self.to("bfloat16")

    def half(self):
        """As float16."""
        return self.to(np.float16)

    def double(self):
        """As float64."""
        return self.to(np.float64)

    def long(self):
        """As int64."""
        return self.to(np.int64)

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("only a leaf can be copied deeply; use .detach() or .clone()")
        copied = _fill(type(self).__new__(type(self)), self.data.copy(), self.requires_grad, None)
        copied.grad = None if self.grad is None else Tensor(self.grad.data.copy())
        return copied

    def clone(self):
        """A copy, connected to this Tensor in the graph."""
        return self + 0 if self.requires_grad else Tensor(self.data.copy())

    def reshape(self, *shape):
        """Another shape with the same elements in the same order; one length may be -1."""
        return apply(TABLE["reshape"], self, shape=_flat(shape))

    view = reshape

    def flatten(self, start=0, end=-1):
        """Axes start to end as one."""
        start, end = (_axis(a, max(self.ndim, 1)) for a in (start, end))
        return self.reshape(*self.shape[:start], -1, *self.shape[end + 1 :])

    def permute(self, *axes):
        """The axes in another order."""
        return apply(
            TABLE["permute_dims"], self, axes=tuple(_axis(a, self.ndim) for a in _flat(axes))
        )

    def transpose(self, axis0, axis1):
        """Two axes exchanged."""
        axes = list(range(self.ndim))
        axis0, axis1 = _axis(axis0, self.ndim), _axis(axis1, self.ndim)
        axes[axis0], axes[axis1] = axis1, axis0
        return self.permute(axes)

    @property
    def mT(self):  # noqa: N802
        """The last two axes exchanged."""
        return apply(TABLE["matrix_transpose"], self)

    @property
    def T(self):  # noqa: N802
        """All axes in reverse order."""
        return self.permute(tuple(reversed(range(self.ndim))))

    def unsqueeze(self, axis):
        """With a new axis of length 1."""
        return apply(TABLE["expand_dims"], self, axis=axis)

    def squeeze(self, axis=None):
        """Without an axis of length 1, or without all of them."""
        if axis is None:
            axis = tuple(i for i, n in enumerate(self.shape) if n == 1)
        return apply(TABLE["squeeze"], self, axis=axis)

    def expand(self, *shape):
        """Repeated along axes of length 1 and new axes in front; -1 keeps a length."""
        shape = _flat(shape)
        if len(shape) < self.ndim:
            raise ValueError(f"expand of shape {self.shape} to {shape}: too few axes")
        old = (None,) * (len(shape) - self.ndim) + self.shape
        wanted = tuple(o if n == -1 else n for n, o in zip(shape, old))
        return apply(TABLE["broadcast_to"], self, shape=wanted)

    def __getitem__(self, key):
        return _getitem(self, key)

    def __setitem__(self, key, value):
        raise TypeError(
            "Tensors are not assigned to, since the graph remembers them; "
            "use where() or masked_fill(), or change .data of a leaf inside no_grad()"
        )

    def masked_fill(self, mask, value):
        """`value` where mask is true, this Tensor elsewhere."""
        return apply(TABLE["where"], mask, value, self)

    def clip(self, low=None, high=None):
        """No less than low and no more than high; None sets no bound."""
        return apply(TABLE["clip"], self, low=low, high=high)

    clamp = clip

    def softmax(self, axis=-1):
        """e^x / Σ e^x along an axis."""
        return apply(TABLE["softmax"], self, axis=axis)

    def var(self, axis=None, keepdims=False, correction=1):
        """Variance; correction=1 divides by n - 1, correction=0 by n."""
        centred = self - self.mean(axis, keepdims=True)
        total = (centred * centred).sum(axis, keepdims=keepdims)
        return total / (self.numel() / max(total.numel(), 1) - correction)

    # --- without gradients ---

    def argmax(self, axis=None, keepdims=False):
        """Index of the largest element (the first of equals), int64."""
        return Tensor(np.argmax(self.data, axis=axis, keepdims=keepdims))

    def all(self):
        """Whether every element is true (not zero)."""
        return Tensor(self.data.all())

    def any(self):
        """Whether some element is true (not zero)."""
        return Tensor(self.data.any())

    def __invert__(self):
        return Tensor(~self.data)


def _fill(tensor, data, requires_grad, node):
    """Sets every field. node: None for a leaf, else (implementation, inputs, attributes, saved)."""
    tensor.data = data
    tensor.requires_grad = requires_grad
    tensor.grad = None
    tensor._age = _age()
    tensor._node = node
    tensor._retains_grad = False
    return tensor


def destinations(targets, device, dtype):
    """What `to` was asked for: Devices and NumPy dtypes."""
    for target in (*targets, *([] if device is None else [named(device)])):
        yield named(target) if is_device(target) else precision.dtype(target)
    if dtype is not None:
        yield precision.dtype(dtype)


def _flat(arguments):
    """(2, 3) from both f(2, 3) and f((2, 3))."""
    single = len(arguments) == 1 and isinstance(arguments[0], tuple | list)
    return tuple(arguments[0] if single else arguments)


def _axis(axis, ndim):
    """An axis counted from the front."""
    if not -ndim <= axis < ndim:
        raise IndexError(f"axis {axis} is out of range for {ndim} axes")
    return axis % ndim


# --- applying an op -------------------------------------------------------------------------------


def apply(op, *args, **attributes):
    """Runs an op on Tensors, arrays and numbers, and records it if a gradient may be wanted.

    The Tensors live on one device (else TypeError), and arrays are taken there.
    """
    arrays, recorded, usual, where = [], False, True, CPU
    reading = backend.current.reading
    for a in args:
        if isinstance(a, Tensor):
            arrays.append(data := a.data)
            recorded = recorded or a.requires_grad
            if data.dtype is not _FLOAT32 or type(data) is not _NUMPYS:
                usual = False
        else:
            arrays.append(_constant(a))
    if not usual:
        where, arrays = _together(op.name, args, arrays)
        reading = reading.on(where, any(map(precision.is_narrow, arrays)))
    implementation = reading[op]
    if implementation.accepts is not None and not implementation.accepts(*arrays, **attributes):
        implementation = backend.MATHS[op]
    try:
        y = implementation.forward(*arrays, **attributes)
    except (TypeError, ValueError, IndexError) as error:
        implementation, y = _in_its_place(implementation, arrays, attributes, error)
    saved = None
    if implementation.saves:
        y, saved = y
    if where is not CPU:
        y = where.own(y)
    elif not isinstance(y, np.ndarray):
        y = np.asarray(y)
    if y.dtype == _FLOAT64 and not _may_be_float64(arrays, attributes):
        y = y.astype(np.float32)
    node = None
    if recorded and _recording.on and y.dtype.kind in "fVc":
        inputs = [a if isinstance(a, Tensor) else c for a, c in zip(args, arrays)]
        node = implementation, inputs, attributes, saved
    return _fill(Tensor.__new__(Tensor), y, node is not None, node)


def _in_its_place(implementation, arrays, attributes, error):
    """(what runs the op where a GPU kernel has refused its arguments, its result). The refusal is
    counted. Raises the error if there is nothing else to try.
    """
    op, instead = implementation.op, implementation.fallback
    if instead is not None and not isinstance(error, IndexError):
        backend.refusals[op.name, str(error)] += 1
        try:
            return instead, instead.forward(*arrays, **attributes)
        except (ValueError, IndexError) as its_own:
            error = its_own
    if isinstance(error, TypeError):
        raise error
    raise type(error)(_does_not_fit(op, arrays, attributes, error)) from None


def _together(name, args, arrays):
    """(the device of the Tensors among args, all arrays there). TypeError if they have two."""
    where = {of(a.data) for a in args if isinstance(a, Tensor)}
    if len(where) != 1:
        names = " and ".join(sorted(each.name for each in where))
        raise TypeError(f"{name} of tensors on {names}: move them to one device with .to(...)")
    (where,) = where
    where.make_current()
    return where, [where.put(a) if hasattr(a, "dtype") else a for a in arrays]


def fused(name, definition, *inputs, drawn=None, **attributes):
    """definition(*inputs), a composition of ops on Tensors (or None), by one kernel of that name if
    the device of the inputs has one that takes them. No other Tensor may require a gradient in it.

    attributes  what the kernel is given beside the arrays
    drawn       a function that gives more of them, from a random stream that the definition, too,
                would draw from: it is called for the kernel only
    """
    tensors, reading = [x for x in inputs if x is not None], backend.current.reading
    if type(tensors[0].data) is _NUMPYS and name not in reading.fused:
        return definition(*inputs)
    where, _ = _together(name, tensors, ())
    kernel = reading.on(where).fused.get(name)
    arrays = [None if x is None else x.data for x in inputs]
    if kernel is None or not getattr(kernel, "accepts", _anything)(*arrays, **attributes):
        return definition(*inputs)
    attributes |= drawn() if drawn else {}
    try:
        y, saved = kernel.forward(*arrays, **attributes)
    except (TypeError, ValueError) as error:
        backend.refusals[name, str(error)] += 1
        return definition(*inputs)
    recorded = _recording.on and any(x.requires_grad for x in tensors)
    once_more = _not_twice if drawn else partial(_vjp_of_definition, definition)
    op = SimpleNamespace(name=name, saves=False, vjp=once_more)
    vjp = kernel.vjp if where is CPU else backend.with_plain_gradient(kernel.vjp)
    implementation = backend.Implementation(op, None, vjp, saves=True, is_kernel=True)
    node = (implementation, inputs, attributes, saved) if recorded else None
    return _fill(Tensor.__new__(Tensor), where.own(y), recorded, node)


def _anything(*arrays, **attributes):
    """What a kernel accepts that does not say so."""
    return True


def _vjp_of_definition(definition, xp, g, y, *inputs, **attributes):
    """The gradients of a fused kernel on the tape: those of the ops that it stands for. Each input
    is given another name there, since one of them may be made of another, or be the same twice.
    """
    aliases = [_alias(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    xs = [a for a, x in zip(aliases, inputs) if a is not x]
    found = dict(zip(map(id, xs), grad(definition(*aliases), xs, g, create_graph=True)))
    return tuple(found.get(id(a)) for a in aliases)


def _not_twice(xp, g, y, *inputs, **attributes):
    raise RuntimeError(
        "dropout on a GPU has no second derivatives (create_graph), since its kernel draws the "
        "mask: differentiate on the CPU, or without dropout"
    )


def _alias(x):
    """The same Tensor under another name: x in all but identity."""
    return _fill(Tensor.__new__(Tensor), x.data, True, (_TO, [x], {}, None))


def _moved(x, where):
    """x on that device; the gradient moves back."""
    if of(x.data) is where:
        return x
    data = where.put(x.data)
    if not (x.requires_grad and _recording.on):
        return _fill(Tensor.__new__(Tensor), data, False, None)
    return _fill(Tensor.__new__(Tensor), data, True, (_TO, [x], {}, None))


_TO = backend.Implementation(
    SimpleNamespace(name="to", saves=False, vjp=lambda xp, g, y, x: (g.to(x.device),)),
    None,
    lambda g, y, x: (of(x).put(g),),
    saves=False,
)


def raw(x):
    """The array of a Tensor, an array of any device, or what NumPy makes an array of."""
    return x.data if isinstance(x, Tensor) else x if hasattr(x, "dtype") else np.asarray(x)


def _may_be_float64(arrays, attributes):
    """As in PyTorch, float64 comes from float64 or from a cast: 1/2 of integers is float32."""
    asked = attributes.get("dtype") == "float64"
    return asked or any(hasattr(a, "dtype") and a.dtype == _FLOAT64 for a in arrays)


def _constant(a):
    """What an op gets for an argument that is no Tensor: a Python number, or an array."""
    if type(a) in _NUMBERS or isinstance(a, np.ndarray):
        return a
    if isinstance(a, float):
        return float(a)  # np.float64 is one: it must not promote float32, any more than 2.0 does
    return backend.asarray(a)


def _does_not_fit(op, arrays, attributes, error):
    shapes = ", ".join(str(a.shape) if isinstance(a, np.ndarray) else repr(a) for a in arrays)
    given = "".join(f", {k}={v}" for k, v in attributes.items())
    expected = f"; expected {op.signature}" if op.signature else ""
    return f"{op.name} of shapes {shapes}{given}{expected}: {str(error).strip()}"


# --- the backward walk ----------------------------------------------------------------------------


def grad(y, xs, gradient=None, retain_graph=None, create_graph=False, allow_unused=False):
    """dy/dx for each x in xs, as a tuple of Tensors; no leaf's .grad is touched.

    y         a single number, or any shape with `gradient` of the same shape (what arrives at y)
    xs        a Tensor, or several
    Raises RuntimeError if y does not depend on some x, unless allow_unused (then that one is None).
    """
    xs = [xs] if isinstance(xs, Tensor) else list(xs)
    found = {}
    only = _between(y, xs)

    def collect(tensor, gradient, owned):
        found[id(tensor)] = gradient if owned or create_graph else gradient.copy()

    _walk(y, gradient, collect, only, create_graph, retain_graph)
    if not allow_unused and any(id(x) not in found for x in xs):
        missing = [i for i, x in enumerate(xs) if id(x) not in found]
        raise RuntimeError(
            f"y does not depend on input {missing[0]} (or it does not require grad); "
            "allow_unused=True gives None for it"
        )
    gradients = [found.get(id(x)) for x in xs]
    return tuple(g if g is None or isinstance(g, Tensor) else Tensor(g) for g in gradients)


def leaf_gradients(y, gradient=None):
    """dy/d(leaf) for every leaf that requires one: {id(leaf): Tensor}; .grad is not touched."""
    found = {}

    def collect(leaf, gradient, owned):
        data = gradient if owned else gradient.copy()
        found[id(leaf)] = _fill(Tensor.__new__(Tensor), data, False, None)

    _walk(y, gradient, collect, None, False, False)
    return found


def result_of(implementation, data, inputs, saved):
    """A Tensor with this data whose gradient implementation.vjp hands on to the inputs."""
    return _fill(Tensor.__new__(Tensor), data, True, (implementation, inputs, {}, saved))


def outer_tensors(y, mark):
    """The Tensors older than `mark`, a Tensor, that y was made of and that require a gradient."""
    found, seen, stack = [], {id(y)}, [y]
    while stack:
        tensor = stack.pop()
        if tensor._age < mark._age:
            found.append(tensor)
            continue
        for x in (tensor._node and tensor._node[1]) or ():
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in seen:
                seen.add(id(x))
                stack.append(x)
    return found


def _between(y, xs):
    """The ids of the Tensors on some way from the xs to y, and which of them are xs."""
    wanted = {id(x) for x in xs}
    reaches = {}
    stack = [(y, False)]
    while stack:
        tensor, inputs_are_known = stack.pop()
        node = tensor._node
        if node is not None and node[1] is None and id(tensor) not in wanted:
            raise RuntimeError(_freed(node[0].op))
        inputs = (node and node[1]) or ()
        parents = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        if inputs_are_known:
            reaches[id(tensor)] = id(tensor) in wanted or any(reaches[id(t)] for t in parents)
        elif id(tensor) not in reaches:
            reaches[id(tensor)] = False
            stack.append((tensor, True))
            stack.extend((t, False) for t in parents if id(t) not in reaches)
    return wanted, {i for i, found in reaches.items() if found}


def _add_to_grad(tensor, gradient, owned):
    """Adds to .grad; copies what someone else may hold, so that .grad is nobody's alias."""
    if isinstance(gradient, Tensor):  # a recorded backward pass
        tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad + gradient
    elif tensor.grad is None:
        tensor.grad = Tensor(gradient if owned else gradient.copy())
    elif tensor.grad.requires_grad:
        tensor.grad = tensor.grad + gradient
    else:
        tensor.grad.data += gradient


def _walk(root, gradient, keep, only, create_graph, retain_graph):
    """The chain rule, from `root` to its leaves, youngest Tensor first.

    A Tensor's inputs are older than itself, so when its turn comes, all that it contributes to has
    been visited and its gradient is complete. `keep(tensor, gradient, owned)` takes what is asked
    for: the leaves' gradients, or with `only` = (ids wanted, ids on the way), theirs.
    """
    gradient = _seed(root, gradient, create_graph)
    retain_graph = create_graph if retain_graph is None else retain_graph
    vjp = _vjp_on_the_tape if create_graph else _vjp
    arrived = {id(root): gradient}  # id -> gradient so far
    owned = set()  # ids whose gradient nobody else holds, so that it may be added to in place
    queue = [(-root._age, root)]
    with contextlib.nullcontext() if create_graph else no_grad():
        while queue:
            tensor = heapq.heappop(queue)[1]
            i = id(tensor)
            gradient = arrived.pop(i)
            node = tensor._node
            if tensor._retains_grad:
                _add_to_grad(tensor, gradient, i in owned)
                owned.discard(i)
            if node is None if only is None else i in only[0]:
                keep(tensor, gradient, i in owned)
            owned.discard(i)
            if node is None:
                continue
            if only is not None and i in only[0] and _is_end(node, only[1]):
                continue
            if node[1] is None:
                raise RuntimeError(_freed(node[0].op))
            fresh = node[0].is_kernel and not create_graph
            for x, g in zip(node[1], vjp(tensor, node, gradient, only)):
                if g is None or not isinstance(x, Tensor) or not x.requires_grad:
                    continue
                j = id(x)
                if only is not None and j not in only[1]:
                    continue
                if j not in arrived:
                    heapq.heappush(queue, (-x._age, x))
                if fresh and callable(g):
                    if j not in owned:
                        arrived[j] = _own(arrived.get(j), x.data)
                        owned.add(j)
                    g(arrived[j])
                    continue
                if g.shape != x.data.shape or g.dtype != x.data.dtype:
                    g = _fit(g, x)
                if j not in arrived:
                    arrived[j] = g
                    if fresh:
                        owned.add(j)  # otherwise it is borrowed: perhaps a view of another's array
                elif j in owned:
                    arrived[j] += g
                elif fresh:
                    g += arrived[j]
                    arrived[j] = g
                    owned.add(j)
                else:
                    arrived[j] = arrived[j] + g
                    if not isinstance(arrived[j], Tensor):
                        owned.add(j)
            if not retain_graph:
                tensor._node = node[0], None, None, None


def _is_end(node, on_the_way):
    """Whether nothing that is asked for lies behind this node."""
    return not any(id(x) in on_the_way for x in node[1] or ())


def _own(gradient, data):
    """A gradient that may be added to in place: a copy of the one so far, or zeros."""
    return np.zeros_like(data) if gradient is None else gradient.copy()


def _seed(root, gradient, create_graph):
    if not root.requires_grad:
        raise RuntimeError("backward from a Tensor that does not require grad: nothing to do")
    if gradient is None:
        if root.data.size != 1:
            raise ValueError(
                f"backward from shape {root.shape} needs `gradient` of that shape; "
                "without it only a single number can start"
            )
        gradient = np.ones_like(root.data)
    array = raw(gradient)
    array = of(root.data).put(array)
    if array.shape != root.shape:
        raise ValueError(f"gradient has shape {array.shape}, expected {root.shape}")
    array = array.astype(root.dtype, copy=False)
    if create_graph:
        return gradient if isinstance(gradient, Tensor) else Tensor(array)
    return array


def _freed(op):
    return (
        f"the graph behind this {op.name} was freed by an earlier backward; "
        "pass retain_graph=True to the earlier one"
    )


def _vjp(tensor, node, gradient, only):
    """The gradients of the op that made `tensor`, one for each input: arrays."""
    implementation, inputs, attributes, saved = node
    if type(tensor.data) is not _NUMPYS:
        of(tensor.data).make_current()
    arrays = [x.data if isinstance(x, Tensor) else x for x in inputs]
    if implementation.saves:
        attributes = {**attributes, "saved": saved}
    if implementation.is_kernel:  # which always saves: attributes are a copy here
        attributes["needs"] = tuple(
            isinstance(x, Tensor) and x.requires_grad and (only is None or id(x) in only[1])
            for x in inputs
        )
    return _as_many(implementation.vjp(gradient, tensor.data, *arrays, **attributes), node)


def _vjp_on_the_tape(tensor, node, gradient, only):
    """The same vjp, read by the tape itself: Tensors, which can be differentiated again.

    What forward saved was computed off the tape, so forward is read again here.
    """
    implementation, inputs, attributes, _ = node
    op, xp = implementation.op, _tape_of(tensor)
    if op.saves:
        attributes = {**attributes, "saved": op.forward(xp, *inputs, **attributes)[1]}
    return _as_many(op.vjp(xp, gradient, tensor, *inputs, **attributes), node)


def _as_many(gradients, node):
    """What a vjp returned, if it is a tuple: the commonest mistake is a bare gradient."""
    if type(gradients) is tuple:
        return gradients
    name, n = node[0].op.name, len(node[1])
    kind = type(gradients).__name__
    raise TypeError(f"vjp of {name} must return a tuple of {n}, one gradient each, not {kind}")


def _fit(g, x):
    """The gradient g in x's shape and dtype: broadcasting is undone here, for every op."""
    if g.shape != x.shape:
        g = g.astype(np.float32) if precision.is_narrow(g) and not isinstance(g, Tensor) else g
        g = _sum_down(tape if isinstance(g, Tensor) else np, g, x.shape)
    if g.dtype != x.dtype:
        g = g.to(x.dtype) if isinstance(g, Tensor) else g.astype(x.dtype)
    return g


def _sum_down(xp, g, shape):
    """Sums g over the axes along which something of `shape` was repeated."""
    new = len(g.shape) - len(shape)
    repeated = tuple(range(new)) + tuple(
        i + new for i, n in enumerate(shape) if n == 1 and g.shape[i + new] != 1
    )
    return xp.reshape(xp.sum(g, axis=repeated, keepdims=True), shape)


# --- Tensors as an array namespace ----------------------------------------------------------------


_MAY_DETACH = {"argmax", "argsort", "isfinite", "isnan", "zeros_like", "ones_like"}


class Tape:
    """The `xp` whose arrays are Tensors: an op's own lines, recorded.

    A name in the op table applies that op. Anything else is NumPy's on the raw data, or that of the
    device, and refuses a Tensor that requires grad, because the gradient would be lost silently; a
    few functions whose derivative is zero or meaningless everywhere may pass.
    """

    base = np

    def __getattr__(self, name):
        value = self._applied(TABLE[name]) if name in TABLE else self._detached(name)
        setattr(self, name, value)
        return value

    @staticmethod
    def _applied(op):
        def run(*args, **keywords):
            arrays, attributes = op.bind(args, keywords)
            return apply(op, *arrays, **attributes)

        return run

    def _detached(self, name):
        function = getattr(self.base, name)
        if isinstance(function, type) or not callable(function):
            return function  # a dtype or a constant

        def run(*args, **keywords):
            needs_grad = any(isinstance(a, Tensor) and a.requires_grad for a in args)
            if needs_grad and name not in _MAY_DETACH:
                raise TypeError(f"xp.{name} is no op: it would lose the gradient of its argument")
            raw = [a.data if isinstance(a, Tensor) else a for a in args]
            result = function(*raw, **keywords)
            return Tensor(result) if hasattr(result, "dtype") else result

        return run


tape = Tape()


@cache
def _tape_on(where):
    return type("Tape", (Tape,), {"base": where.xp})()


def _tape_of(tensor):
    """The tape whose other arrays are where this Tensor's are."""
    where = of(tensor.data)
    return tape if where is CPU else _tape_on(where)


# --- indexing and operators -----------------------------------------------------------------------


def _getitem(x, key):
    """Slices and integers are the op getitem; arrays and masks are looked up like words."""
    key = key if isinstance(key, tuple) else (key,)
    key = tuple(k.data if isinstance(k, Tensor) else k for k in key)
    key = tuple(np.asarray(k, None if k else np.int64) if isinstance(k, list) else k for k in key)
    key = tuple(backend.beside(x.data, k) for k in key)
    key = tuple(int(k) if _is_integers(k) and k.ndim == 0 else k for k in key)
    if len(key) == 1 and x.ndim > 1 and _is_integers(key[0]):
        return _rows(x, key[0])
    if not any(hasattr(k, "dtype") for k in key):
        return apply(TABLE["getitem"], x, key=key)
    places = of(x.data).xp.arange(x.numel()).reshape(x.shape)
    positions = places[key]  # of the chosen elements, row-major
    rows = apply(TABLE["embedding"], x.reshape(-1, 1), positions)
    return rows.reshape(positions.shape)


def _is_integers(k):
    return hasattr(k, "dtype") and k.dtype.kind in "iu"


def _rows(x, positions):
    """x[positions] for an array of integers: rows of a table, as in an embedding."""
    n = len(x)
    if positions.size and not (-n <= positions.min() and positions.max() < n):
        raise IndexError(f"an index is out of range for axis 0 of shape {x.shape}")
    rows = apply(
        TABLE["embedding"], x.flatten(1), np.where(positions < 0, positions + n, positions)
    )
    return rows.reshape(positions.shape + x.shape[1:])


def _binary(name):
    op = TABLE[name]
    return (lambda self, other: apply(op, self, other)), (
        lambda self, other: apply(op, other, self)
    )


for _symbol, _name in (
    ("add", "add"), ("sub", "subtract"), ("mul", "multiply"), ("truediv", "divide"), ("pow", "pow"),
):  # fmt: skip
    _forward, _reflected = _binary(_name)
    setattr(Tensor, f"__{_symbol}__", _forward)
    setattr(Tensor, f"__r{_symbol}__", _reflected)


_MATMUL = TABLE["matmul"]


def _power(self, exponent):
    if isinstance(exponent, int | float):
        return apply(TABLE["power"], self, exponent=exponent)
    return apply(TABLE["pow"], self, exponent)


def _matmul(a, b):
    """a @ b; one axis alone is a row on the left and a column on the right, as in NumPy."""
    if isinstance(b, Tensor) and a.ndim > 1 and b.ndim > 1:
        return apply(_MATMUL, a, b)
    there = of((a if isinstance(a, Tensor) else b).data)  # where arrays follow
    a, b = (t if isinstance(t, Tensor) else _moved(Tensor(t), there) for t in (a, b))
    if not a.ndim or not b.ndim:
        raise ValueError(
            f"matmul of shapes {a.shape} and {b.shape}: both need an axis; use * instead"
        )
    rows, columns = a.ndim == 1, b.ndim == 1
    y = apply(_MATMUL, a.unsqueeze(0) if rows else a, b.unsqueeze(1) if columns else b)
    if rows:
        y = y.squeeze(-2)
    return y.squeeze(-1) if columns else y


Tensor.__pow__ = Tensor.pow = _power
Tensor.__matmul__ = Tensor.matmul = _matmul
Tensor.__rmatmul__ = lambda self, other: _matmul(other, self)
Tensor.__neg__ = lambda self: apply(TABLE["negative"], self)
Tensor.__abs__ = lambda self: apply(TABLE["abs"], self)


def _in_place(symbol, operator):
    """x += y and so on: in no_grad() a leaf's data changes; elsewhere x names a new Tensor."""

    def change(self, other):
        if not (self.is_leaf and self.requires_grad):
            return operator(self, other)
        if _recording.on:
            raise TypeError(
                f"{symbol} on a leaf that requires grad, which the graph remembers: "
                "do it inside no_grad(), or make a new Tensor"
            )
        self.data[...] = operator(self, other).data
        return self

    return change


for _symbol in ("add", "sub", "mul", "truediv"):
    _operator = getattr(Tensor, f"__{_symbol}__")
    setattr(Tensor, f"__i{_symbol}__", _in_place(f"in-place {_symbol}", _operator))


def _compare(symbol):
    def compare(self, other):
        other = other.data if isinstance(other, Tensor) else backend.beside(self.data, other)
        return Tensor(getattr(self.data, symbol)(other))

    return compare


for _symbol in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "rand", "ror", "rxor"):
    setattr(Tensor, f"__{_symbol}__", _compare(f"__{_symbol}__"))


def _method(name):
    op = TABLE[name]

    def method(self, *args, **keywords):
        arrays, attributes = op.bind((self, *args), keywords)
        return apply(op, *arrays, **attributes)

    method.__name__, method.__doc__ = name, op.doc
    return method


for _name in (
    "exp", "log", "sqrt", "sin", "cos", "tanh", "sigmoid", "relu", "abs", "sum", "mean", "max",
    "min", "logsumexp", "log_softmax", "tril", "triu",
):  # fmt: skip
    setattr(Tensor, _name, _method(_name))
