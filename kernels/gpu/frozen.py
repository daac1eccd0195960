"""Launches that repeat an earlier one go to its compiled kernel, past Triton's dispatch.

Triton decides at every launch which compiled kernel fits: it binds the arguments to the parameters,
finds what each is specialised on, and looks that up. That takes longer than the launch itself.
Here it decides once. `key` says all that its decision depends on, in less time; under that key
`freeze` keeps what it chose.

Triton's rules (the same from 3.6 to 3.9), for arguments that are no compile-time constants:

    an integer      is a constant if it is 1; else i32, i64 or u64, by its value, and whether it is
                    a multiple of 16
    a pointer       its dtype, and whether the address is a multiple of 16
    a descriptor    its dtype and the shape of its blocks
    a float, a bool, None    its type
    a tuple         what its elements are

A parameter may be exempt (do_not_specialize, an annotation): Triton then looks at less of it. The
key does not: what is equal here is equal there, and a kernel may be kept under several keys.
"""

import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_SIMPLE = int, bool, str, type(None)  # equal, and of one type, is the same for Triton
_BY_TYPE = frozenset((float, bool, type(None)))
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_KNOWN = (3, 6) <= VERSION <= (3, 9)  # whose launchers _launcher can call


class Unusual(Exception):  # noqa: N818  no error
    """This launch is for Triton itself."""


def key(kernel, arguments, options):
    """(key, values, home): all that the choice of a compiled kernel depends on but the device, what
    the launcher takes in place of the arguments, and who owns the arrays among them. Unusual if
    Triton would do more than choose and launch.

    arguments    numbers, None, Arrays, descriptors of Arrays, tuples of these
    options      as Triton takes them: hashable, or the key is not
    """
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    try:
        if (
            type(kernel) is not JITFunction
            or kernel.debug
            or kernel.pre_run_hooks
            or runtime.debug
            or compilation.instrumentation_mode
            or runtime.add_stages_inspection_hook is not None
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
        ):
            raise Unusual
    except AttributeError:  # a hook that is no chain of hooks
        raise Unusual from None
    source = kernel.hash or kernel.cache_key  # which sets it
    constants = options.values()  # may be equal and differ in type: True and 1
    found = [id(kernel), source, len(options), *options, *constants, *map(type, constants)]
    values = []
    home = _classify(arguments, found, values, None)
    return found, values, home


def _classify(arguments, found, values, home):
    """Appends each argument's class to `found`, and to `values` what the launcher takes for it.
    Each class begins with what no other begins with. Gives the owner of the last array; where it
    is not that of the array before, it is part of the class.
    """
    for x in arguments:
        kind = type(x)
        if kind is int:
            found.append(_other(x) if x >> 31 else 1 if x == 1 else 2 if x & 15 else 3)
        elif kind in _BY_TYPE:
            found.append(kind)
        elif isinstance(x, tuple):  # a named one has a type of its own
            found += kind, len(x)
            inner = []
            home = _classify(x, found, inner, home)
            x = tuple(inner)
        else:
            array = x
            if kind is TensorDescriptor:
                array = x.base
                found += kind, tuple(x.block_shape)
            try:
                if array.home is not home:
                    home = array.home
                    found.append(home)
                dtype, address = array.dtype, array.address
            except AttributeError:  # a constant given by its place, or nothing that Triton takes
                raise Unusual from None
            found.append((dtype,) if address & 15 else dtype)
            if array is x:
                x = address  # the launcher asks the driver nothing about a number
        values.append(x)
    return home


def _other(x):
    """The class of an integer that is negative, or that 31 bits are too few for."""
    if -(2**31) <= x < 0:
        return 2 if x & 15 else 3
    if -(2**63) <= x < 2**63:
        return 4 if x & 15 else 5
    if 2**63 <= x < 2**64:
        return 6 if x & 15 else 7
    raise Unusual


class Frozen:
    """A compiled kernel, and all it is launched with but grid, stream and arguments."""

    def __init__(self, kernel, compiled, more):
        self.kept = kernel, compiled  # the kernel's id is part of the key; `compiled` owns the code
        self.launch = _launcher(compiled, more)  # (grid of three, stream, values)
        types = compiled.src.signature.values()
        self.describes = "tensordesc" in str([*types])  # for which Triton needs a driver
        used = kernel.used_global_vals.items()
        self.globals = [(scope, name, scope[name]) for (name, _), (_, scope) in used]

    def holds(self):
        """Whether the kernel's global constants are what they were; Triton refuses, else."""
        return all([scope.get(name) is value for scope, name, value in self.globals])


def freeze(kernel, compiled, arguments, options):
    """What Triton has chosen, as a Frozen; None if its launch needs more than the key says."""
    parameters, given = kernel.params, len(arguments)
    rest = parameters[given:]
    if (
        not _KNOWN
        or type(compiled) is not CompiledKernel
        or any(p.is_constexpr for p in parameters[:given])
        or any(p.name in options and not p.is_constexpr for p in rest)
        or any(type(options[name]) not in _SIMPLE for name in options.keys() - kernel.arg_names)
        or any(p.kind is p.VAR_POSITIONAL for p in kernel.signature.parameters.values())
    ):
        return None
    if compiled.run.global_scratch_size or compiled.run.profile_scratch_size:
        return None  # memory to be allocated for each launch
    return Frozen(kernel, compiled, [options.get(p.name, p.default) for p in rest])


def _launcher(compiled, more):
    """launch(grid, stream, values), by what Triton's own launcher calls."""
    launcher = compiled.run
    launch, function, packed = launcher.launch, compiled.function, compiled.packed_metadata
    fixed = function, launcher.launch_cooperative_grid, launcher.launch_pdl
    no_scratch, no_hooks = (None, None), (None, None, None)  # nor what hooks would be given
    if VERSION == (3, 6):
        fixed += *no_scratch, packed, *no_hooks

        def run(grid, stream, values):
            launch(*grid, stream, *fixed, *values, *more)

    else:
        annotations, signature = launcher.arg_annotations, launcher.kernel_signature
        fixed += packed, *no_hooks, *no_scratch, annotations, signature

        def run(grid, stream, values):
            launch(*grid, stream, *fixed, (*values, *more))

    return run
