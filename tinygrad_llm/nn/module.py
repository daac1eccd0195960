"""Module: a tree of layers and their parameters.

A layer is a class with `forward`. Every Parameter and Module among its attributes is part of it, in
the order in which they were first set: there is no other registration.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import DTypeLike

from ..device import Device, of
from ..tensor import Tensor, destinations


class Parameter(Tensor):
    """A Tensor that is trained. As an attribute of a Module, it is one of its parameters."""

    __slots__ = ()

    def __init__(self, data, requires_grad: bool = True, dtype=None):
        super().__init__(data, requires_grad, dtype)


class Buffer(Tensor):
    """A Tensor that is saved with the model but not trained, such as a table of angles."""

    __slots__ = ()

    def __init__(self, data, dtype=None):
        super().__init__(data, False, dtype)


class Module:
    """Base of all layers and models: subclass it, set attributes in __init__, write `forward`.

    Parameters and modules that are shared (the same object under two names) are found once, under
    the name that comes first.
    """

    training = True

    def __call__(self, *args, **keywords):
        return self.forward(*args, **keywords)

    def forward(self, *args, **keywords):
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __setattr__(self, name, value):
        """Raises TypeError for two slips that would leave weights untrained without a word."""
        before, what = vars(self).get(name), f"{type(self).__name__}.{name}"
        if isinstance(before, Parameter) and not isinstance(value, Parameter | None):
            raise TypeError(
                f"{what} is a Parameter and cannot become a {type(value).__name__}; "
                f"wrap it in Parameter(...), or change {name}.data"
            )
        inside = value if isinstance(value, list | tuple) else ()
        if any(isinstance(v, Module | Parameter) for v in inside):
            raise TypeError(
                f"{what} is a {type(value).__name__}, whose parameters would not be found; "
                "use ModuleList, or one attribute for each"
            )
        object.__setattr__(self, name, value)

    # --- what is in it ---

    def named_children(self) -> Iterator[tuple[str, "Module"]]:
        """(name, module) of the modules kept as attributes."""
        return ((name, m) for name, m in vars(self).items() if isinstance(m, Module))

    def children(self) -> Iterator["Module"]:
        """The modules kept as attributes."""
        return (module for _, module in self.named_children())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """(dotted name, module) of this module (named `prefix`) and all below it, each once."""
        return _once(self._named_modules(prefix))

    def modules(self) -> Iterator["Module"]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """(dotted name, Parameter), each once."""
        return _once(self._named_tensors(Parameter, prefix))

    def parameters(self) -> Iterator[Parameter]:
        """The parameters, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Buffer]]:
        """(dotted name, Buffer), each once."""
        return _once(self._named_tensors(Buffer, prefix))

    # Lists, since each step of training asks for them: generators in generators take twice as long.

    def _named_modules(self, prefix):
        """[(dotted name, module)] under every name that it has in the tree."""
        found = [(prefix, self)]
        for name, value in vars(self).items():
            if isinstance(value, Module):
                found += value._named_modules(_join(prefix, name))
        return found

    def _named_tensors(self, kind, prefix=""):
        """[(dotted name, Tensor)] under every name that it has in the tree."""
        found, children = [], []
        for name, value in vars(self).items():
            if isinstance(value, kind):
                found.append((_join(prefix, name), value))
            elif isinstance(value, Module):
                children.append((name, value))
        for name, child in children:
            found += child._named_tensors(kind, _join(prefix, name))
        return found

    # --- the same for all of it ---

    def apply(self, fn: Callable[["Module"], object]) -> "Module":
        """Calls fn(module) on all modules below, then on this one; returns self."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def train(self, mode: bool = True) -> "Module":
        """Sets `.training` everywhere (dropout drops only when it is true); returns self."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self) -> "Module":
        """train(False)"""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "Module":
        """Freezes (False) or unfreezes all parameters; returns self."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        """Forgets all gradients: `.grad` becomes None."""
        for parameter in self.parameters():
            parameter.grad = None

    def to(self, *targets, device: str | None = None, dtype: DTypeLike | None = None) -> "Module":
        """Casts floating-point parameters, gradients and buffers to a dtype, or moves to a device.

        In place: the Parameter objects stay the same, so tied ones stay tied and an optimizer keeps
        them. Do it before the optimizer's first step: its own arrays do not follow. Returns self.
        Raises ValueError for a device that cannot be used, TypeError for what is no floating dtype,
        MemoryError if there is no room.
        """
        for target in destinations(targets, device, dtype):
            if isinstance(target, Device):
                self._changed(target.put)
            elif target.kind in "fcV":
                self._cast(target)
            else:
                raise TypeError(f"parameters are floats, they cannot become {target}")
        return self

    def _cast(self, dtype):
        return self._changed(lambda x: x.astype(dtype, copy=False) if x.dtype.kind in "fcV" else x)

    def _changed(self, change):
        """With change(array) in the place of every array that is saved, and of its gradient."""
        for _, tensor in self._saved():
            for t in (tensor, tensor.grad):
                if t is not None:
                    t.data = change(t.data)
        return self

    @property
    def device(self) -> str:
        """Where the parameters live: "cpu", "cuda:0", ... Raises ValueError if that is on several
        devices; a module without any is on the CPU.
        """
        tensors = self._named_tensors((Parameter, Buffer))
        where = {of(tensor.data).name for _, tensor in tensors} or {"cpu"}
        if len(where) > 1:
            raise ValueError(
                f"{type(self).__name__} has parameters on {' and '.join(sorted(where))}"
            )
        return where.pop()

    def copy_with(self, arrays: dict[str, np.ndarray]) -> "Module":
        """A copy whose parameters and buffers have these arrays, by dotted name, and this module's
        own where there is none: they are shared, and nothing large is copied. It has no gradients.
        """
        copied = {}  # by the identity of what is copied, as copy.deepcopy has it
        for name, tensor in self._saved():
            new = type(tensor)(arrays.get(name, tensor.data))
            copied[id(tensor)] = new.requires_grad_(tensor.requires_grad)
        return copy.deepcopy(self, copied)

    # --- saving and loading ---

    def state_dict(self) -> dict[str, np.ndarray]:
        """Dotted name -> array, parameters before buffers, shared ones once.

        They are the model's own arrays, not copies: save them or copy them before training goes on.
        Those of a GPU are copied into NumPy's memory.
        """
        return {name: of(tensor.data).numpy(tensor.data) for name, tensor in self._saved()}

    def load_state_dict(self, state: dict, strict: bool = True) -> None:
        """Copies arrays (or Tensors) into the parameters and buffers, in place, in their dtype.

        A shared parameter may stand under any of its names. strict=False lets names be missing or
        unexpected. Raises ValueError, before anything is changed, that lists those names, wrong
        shapes, and shared parameters that are given two different values.
        """
        places = dict([*self._named_tensors(Parameter), *self._named_tensors(Buffer)])
        given = {name: np.asarray(_data(state[name])) for name in places if name in state}
        covered = {id(places[name]) for name in given}
        missing = [name for name, tensor in self._saved() if id(tensor) not in covered]
        unexpected = [name for name in state if name not in places]
        problems = []
        if strict and missing:
            problems.append(f"missing {_few(missing)}")
        if strict and unexpected:
            problems.append(f"unexpected {_few(unexpected)}")
        problems += _unfit(places, given)
        if problems:
            raise ValueError(f"load_state_dict: {'; '.join(problems)}")
        for name, array in given.items():
            data = places[name].data
            data[...] = of(data).put(array)

    def _saved(self):
        return [*self.named_parameters(), *self.named_buffers()]

    # --- how it looks ---

    def extra_repr(self) -> str:
        """What stands between the brackets of repr, for a layer without children."""
        return ""

    def __repr__(self):
        children = [f"({name}): {child!r}" for name, child in self.named_children()]
        lines = [line for text in [self.extra_repr(), *children] for line in text.splitlines()]
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        return "\n".join([f"{type(self).__name__}(", *("  " + line for line in lines), ")"])


class ModuleList(Module):
    """Modules in a list, named "0", "1", ...; it has no forward of its own."""

    def __init__(self, modules: Iterable[Module] = ()):
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> "ModuleList":
        """Adds a module at the end, returns the list. Raises TypeError for what is no Module."""
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__} holds Modules, not {type(module).__name__}")
        setattr(self, str(len(self)), module)
        return self

    def __len__(self):
        return sum(1 for _ in self.children())

    def __iter__(self):
        return self.children()

    def __getitem__(self, index):
        """One module, or a plain list of them for a slice."""
        return list(self.children())[index]

    def __setitem__(self, index: int, module: Module):
        """Puts another module in one place."""
        setattr(self, str(range(len(self))[index]), module)


class Sequential(ModuleList):
    """Modules applied one after the other: Sequential(a, b)(x) is b(a(x))."""

    def __init__(self, *modules: Module):
        super().__init__(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


# --- arguments ------------------------------------------------------------------------------------


def _join(prefix, name):
    return f"{prefix}.{name}" if prefix else name


def _once(named):
    """Leaves out what has come before under another name (compared by identity)."""
    seen = set()
    for name, tensor in named:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _data(value):
    return value.detach().numpy() if isinstance(value, Tensor) else of(value).numpy(value)


def _few(names, most=6):
    """Some names in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _unfit(places, given):
    """What is wrong with the given arrays, a list of texts: shapes, and unequal shared values."""
    problems, first = [], {}
    for name, array in given.items():
        tensor = places[name]
        other = first.setdefault(id(tensor), name)
        if array.shape != tensor.shape:
            problems.append(f"{name} has shape {array.shape}, expected {tensor.shape}")
        elif other != name and not np.array_equal(array, given[other]):
            problems.append(f"{other} and {name} differ, but are tied here (untie them)")
    return problems if len(problems) <= 3 else [*problems[:3], f"and {len(problems) - 3} more"]
