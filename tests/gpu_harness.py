"""How the kernels of kernels/gpu are tested: against the maths of the ops in float64, on a GPU if
there is one and in Triton's interpreter if not, and once more with mistakes planted in them.

A *check* is a function check(gpu, draw): it draws arguments with Hypothesis and compares kernels of
the module `gpu` with their reference. Each test module lists its checks and its mutants.
"""

import contextlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend
from tinygrad_llm.check.rounding import spread
from tinygrad_llm.tensor import grad

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"  # conftest.py decides
DEVICE = "cuda" if ON_GPU else "interpret"  # where Tensors are to be
EPS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])


# --- arrays ---------------------------------------------------------------------------------------


def rounded(x, dtype):
    """float64 numbers as that dtype holds them, in NumPy."""
    return np.asarray(x, np.float64).astype(NUMPY[dtype])


def device(x):
    """The array where the kernels are: as it is for the interpreter, a CuPy array on a GPU."""
    if not ON_GPU:
        return x
    import cupy

    owner = x
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    there = cupy.asarray(owner)  # the same gaps, strides and alignment: a view of a copy of it all
    assert there.strides == owner.strides
    start = there.data + (x.ctypes.data - owner.ctypes.data)
    return cupy.ndarray(x.shape, there.dtype, start, x.strides)


def host(x):
    """A kernel's array as NumPy."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def normal(draw, *shape, scale=1.0):
    """Normal numbers in float64, from a seed that Hypothesis draws."""
    return scale * np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal(shape)


def spaced(draw, x):
    """The same numbers in rows that lie further apart, or as they are."""
    gap = draw(st.sampled_from([0, 0, 8, 3]))
    wide = np.full((*x.shape[:-1], x.shape[-1] + gap), 77, x.dtype)  # what is read by mistake shows
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


# --- comparing ------------------------------------------------------------------------------------


def truth(reference, arrays, dtype, g=None):
    """[(value, unit)] in float64 for reference(*Tensors) -> Tensor, and then, if g is given, for
    the gradient of each input (None for inputs of integers). A unit is the error that cannot be
    helped: what each element is off by if every intermediate result is rounded to `dtype`.
    """
    floats = [np.issubdtype(a.dtype, np.floating) or a.dtype == NUMPY["bfloat16"] for a in arrays]
    wide = [a.astype(np.float64) if f else a for a, f in zip(arrays, floats)]
    where = [i for i, is_float in enumerate(floats) if is_float]

    def compute(arrays):
        *arrays, g_here = arrays  # disturbed as well: b̄ = Σ g is rounded too
        inputs = [Tensor(a, requires_grad=f) for a, f in zip(arrays, floats)]
        y = reference(*inputs)
        if g is None:
            return [y.data]
        found = grad(y, [inputs[i] for i in where], Tensor(g_here), allow_unused=True)
        return [y.data, *(np.zeros(()) if d is None else d.data for d in found)]

    wide.append(g)
    with backend.using(backend.MATHS):
        values = compute(wide)
    units = [u * EPS[dtype] / np.finfo(np.float64).eps for u in spread(compute, wide)]
    pairs = list(zip(values, units))
    if g is None:
        return pairs
    gradients = dict(zip(where, pairs[1:]))
    return [pairs[0], *(gradients.get(i) for i in range(len(arrays)))]


def close(actual, expected, limit=4.0):
    """Fails if an element is off by more than `limit` units, and one rounding when it is stored."""
    actual, (value, unit) = host(actual), expected
    assert actual.shape == value.shape, f"shape {actual.shape}, expected {value.shape}"
    error = np.abs(actual.astype(np.float64) - value)
    tiny = float(np.finfo(np.float32).tiny)
    allowed = unit + EPS[actual.dtype.name] * np.abs(value) + _typical(unit) + tiny
    worst = np.nan_to_num(error / allowed, nan=np.inf).max(initial=0.0)
    assert worst <= limit, f"off by {worst:.3g} units, {limit:g} are allowed"


def _typical(unit):
    """The units' root mean square: an element with a lucky unit of 0 is not judged by it alone."""
    return np.sqrt(np.mean(unit**2)) if unit.size else 0.0


def agrees(kernel, reference, arrays, dtype, *, g, draw=None, limit=4.0, **attributes):
    """kernel.forward and kernel.vjp against reference(*Tensors): values, dtypes, gradients. With
    `draw`, g may have rows that lie apart, too.
    """
    on_device = [device(a) for a in arrays]
    before = [host(a).copy() for a in on_device]
    y, saved = kernel.forward(*on_device, **attributes)
    g = rounded(g, host(y).dtype.name)
    g = g if draw is None else spaced(draw, g)
    value, *gradients = truth(reference, arrays, dtype, g.astype(np.float64))
    close(y, value, limit)
    needs = tuple(e is not None for e in gradients)
    found = kernel.vjp(device(g), y, *on_device, saved=saved, needs=needs, **attributes)
    assert len(found) == len(arrays)
    for a, actual, expected in zip(arrays, found, gradients):
        if expected is None:
            assert actual is None
            continue
        assert host(actual).dtype == a.dtype
        close(actual, expected, limit)
    for a, b in zip(on_device, before):
        assert np.array_equal(host(a), b, equal_nan=True), "an input was written to"


# --- running checks, and planting mistakes --------------------------------------------------------


def run(check, gpu, examples, shrink=True):
    """The check on so many drawn arguments."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    chosen = settings(
        max_examples=examples,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
    )

    @chosen
    @given(st.data())
    def holds(data):
        check(gpu, data.draw)

    holds()


@dataclass(frozen=True)
class Mutant:
    """A mistake: `old` in a kernel's file becomes `new`. It has to occur exactly once."""

    name: str
    old: str
    new: str
    module: ModuleType = None  # whose file, if not that of the module under test

    def __str__(self):
        return self.name


@contextlib.contextmanager
def planted(module, mutant, folder):
    """The module, imported again with the mistake in its file or in that of a module it uses."""
    culprit = mutant.module or module
    text = Path(culprit.__file__).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.old!r} is there {text.count(mutant.old)} times"
    file = Path(folder) / "mutant.py"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    with mock.patch.dict(sys.modules):
        wrong = _imported(culprit, file)
        if culprit is not module:
            sys.modules[culprit.__name__] = wrong
            wrong = _imported(module, module.__file__)
        yield wrong


def _imported(module, file):
    """Another copy of the module, from that file."""
    name = f"{module.__package__}.mutant_of_{module.__name__.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, file)
    copy = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def killed(module, mutant, checks, folder, examples=12):
    """Whether one of the checks finds the mistake: by a wrong number, not by code that fails."""
    with planted(module, mutant, folder) as wrong:
        for check in checks:
            try:
                run(check, wrong, examples, shrink=False)
            except AssertionError:
                return True
    return False
