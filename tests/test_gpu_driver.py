"""What every kernel of kernels/gpu stands on: launching without PyTorch, arrays of any library,
the mended interpreter, tables of tile sizes."""

import collections
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_harness as harness
import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_harness import ON_GPU, Mutant
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import driver, frozen, linear, norm, optim, tuning
from tinygrad_llm.kernels.gpu import reduce as kernels
from tinygrad_llm.kernels.gpu.arrays import Abstract, AbstractHome, Array, array
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

BFLOAT16 = ml_dtypes.bfloat16
interpreter_only = pytest.mark.skipif(ON_GPU, reason="about Triton's interpreter")


def process(program, **environment):
    """The program's standard output, as words. PyTorch may be installed: it is not to be loaded."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=inherited | environment,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


# --- without PyTorch ------------------------------------------------------------------------------

SOFTMAX = """
import sys
import numpy as np
from tinygrad_llm.kernels.gpu import driver, reduce
from tinygrad_llm.kernels.gpu.arrays import Abstract
"""


def test_the_interpreter_runs_without_pytorch():
    words = process(
        SOFTMAX + "y, _ = reduce.softmax.forward(np.zeros((2, 5), np.float32))\n"
        "print(y[1, 4], 'torch' in sys.modules)",
        TRITON_INTERPRET="1",
    )
    assert words == ["0.2", "False"]


@pytest.mark.parametrize("chip", [80, 90, 100])
def test_kernels_compile_without_pytorch_and_without_a_gpu(chip):
    words = process(
        SOFTMAX + f"with driver.compiling({chip}) as compiled:\n"
        "    y, _ = reduce.softmax.forward(Abstract((64, 768), 'bfloat16'))\n"
        "[(kernel, grid, options, binary)] = compiled\n"
        "print(y.shape, y.dtype, binary.metadata.target.arch, 'torch' in sys.modules)\n"
        "assert len(binary.asm['cubin']) > 1000\n"
    )
    assert words == ["(64,", "768)", "bfloat16", str(chip), "False"]


def test_other_peoples_kernels_keep_their_driver():
    words = process(
        SOFTMAX + "from triton.runtime import driver as tritons\n"
        "tritons.set_active('theirs')\n"
        "with driver.compiling(90):\n"
        "    reduce.softmax.forward(Abstract((2, 8), 'float32'))\n"
        "print(tritons.active)"
    )
    assert words == ["theirs"]


class FakeGPU:
    """What the driver asks of CuPy or PyTorch."""

    def __init__(self, capability=90, name="NVIDIA H200", times=()):
        self._capability, self._name, self._times = capability, name, iter(times)

    def capability(self, device=None):
        return self._capability

    def device(self):
        return 3

    def stream(self, device):
        return 1000 + device

    def multiprocessors(self):
        return 132

    def name(self):
        return self._name

    def milliseconds(self, run):
        run()
        return next(self._times)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(...) makes the driver believe in a FakeGPU."""

    def install(**facts):
        monkeypatch.setattr(driver, "INTERPRETED", False)
        monkeypatch.setattr(driver, "_device_library", lambda: FakeGPU(**facts))

    return install


def test_the_driver_asks_who_owns_the_arrays(gpu):
    gpu()
    ours = driver._driver()
    assert ours.get_current_device() == 3 and ours.get_current_stream(3) == 1003
    target = ours.get_current_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)
    assert ours.get_device_capability(3) == (9, 0) and driver.multiprocessors() == 132


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    """The environment of a process whose libcuda is fake_cuda.c."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, as Triton does to launch")
    folder = tmp_path_factory.mktemp("cuda")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).with_name("fake_cuda.c"), folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-w", "-I", headers, "-o", library, source]
    subprocess.run(command, check=True)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


LAUNCH = """
import sys
from tinygrad_llm.kernels.gpu import driver, reduce
from tinygrad_llm.kernels.gpu.arrays import Abstract, AbstractHome, Array

class Library:
    device = staticmethod(lambda: 3)
    def stream(self, device): return 1000 + device
    def capability(self, device=None): return 90
    def multiprocessors(self): return 132
    def name(self): return "NVIDIA H200"

class Home(AbstractHome):
    def describe(self, x): return (0x1000, *super().describe(x)[1:])

driver._device_library = Library
def on_gpu(*shape): return Array(Abstract(shape, "bfloat16"), Home())
"""


def test_a_launch_reaches_the_gpus_driver_without_pytorch(fake_cuda):
    program = LAUNCH + "reduce.softmax.forward(on_gpu(4, 64))\nprint('torch' in sys.modules)"
    words = " ".join(process(program, **fake_cuda))
    launch = r"launch 1x1x1 of \d+ threads on stream 1003, first pointer 1000"
    assert re.fullmatch(rf"load _softmax_forward {launch} False", words)


def test_descriptors_and_strides_reach_the_gpus_driver(fake_cuda):
    program = LAUNCH + "from tinygrad_llm.kernels.gpu import attention, linear\n"
    program += "linear.matmul.forward(on_gpu(4096, 768), on_gpu(768, 3072))\n"
    program += "x, w, b = on_gpu(4096, 768), on_gpu(768, 768), on_gpu(768)\n"
    program += "linear.linear.forward(x, w, b, x, activation='silu')\n"
    program += "q = on_gpu(2, 12, 1024, 64)\nattention.attention.forward(q, q, q, causal=True)\n"
    words = " ".join(process(program + "print('torch' in sys.modules)", **fake_cuda))
    assert "load _product descriptor 0x1000 of 4096 x 768 in boxes of 128 x 64" in words
    assert "descriptor 0x1000 of 768 x 3072 in boxes of 64 x" in words
    assert re.search(r"launch 132x1x1 of 256 threads on stream 1003", words)
    assert words.count("load _product") == 2
    assert re.search(r"load _attention_forward launch 192x1x1 of 128 threads", words)
    assert words.endswith("False")


# --- launches that repeat an earlier one ----------------------------------------------------------

HOMES = [type("Ours", (AbstractHome,), {})() for _ in range(2)]
EDGES = [0, 1, 16, 2**31, 2**40, 2**63, 2**64]
INTEGERS = st.sampled_from([s * e + d for e in EDGES for s in (1, -1) for d in (-16, -1, 0, 1, 8)])
CONSTANTS = [0, 1, True, False, 1.0, None, 16, "1", (1,), (True,), tl.float32, "float32"]


Two = collections.namedtuple("Two", "a b")


def pointer(home, dtype, address):
    x = Array(Abstract((64, 64), dtype), HOMES[home])
    x.address = address
    return x


POINTERS = st.builds(
    pointer, st.integers(0, 1), st.sampled_from(["float32", "bfloat16", "int32", "int64"]),
    st.sampled_from([0, 1, 2, 8, 16, 24, 2**31, 2**40, 2**64 - 16]),
)  # fmt: skip
DESCRIPTORS = st.builds(
    lambda x, block: TensorDescriptor(x, [64] * len(block), [64, 64, 1][-len(block) :], block),
    POINTERS.filter(lambda x: x.address % 16 == 0),
    st.lists(st.sampled_from([1, 16, 32]), min_size=1, max_size=3),
)
SCALARS = st.sampled_from([None, True, False, 0.5, -1.5, 1.0, 1, 3, 16])
TUPLES = st.recursive(
    st.sampled_from([3, 0.5]), lambda x: st.lists(x, max_size=2).map(tuple), max_leaves=3
)
MIXED = st.one_of(INTEGERS, POINTERS, DESCRIPTORS, st.lists(POINTERS | SCALARS).map(tuple))
KINDS = INTEGERS, POINTERS, DESCRIPTORS, SCALARS, TUPLES, MIXED
POOLS = [st.lists(x, min_size=6, max_size=6) for x in KINDS]


def _of_integers(x: tl.int64, y, N: tl.constexpr, M: tl.constexpr = 1):
    pass


def _of_floats(x: tl.float32, y, N: tl.constexpr, M: tl.constexpr = 1):
    pass


def _of_anything(x, y, N: tl.constexpr, M: tl.constexpr = 1):
    pass


SPECIALIZED = [
    JITFunction(_of_integers),
    JITFunction(_of_floats),
    JITFunction(_of_anything),
    JITFunction(_of_anything, do_not_specialize=["x"]),
    JITFunction(_of_anything, do_not_specialize_on_alignment=["x"]),
]


@functools.cache
def _binder(kernel):
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def tritons_key(kernel, arguments, options):
    """What Triton looks a compiled kernel up by; what it says if it refuses."""
    try:
        _, specialization, more = _binder(kernel)(*arguments, **options)
    except (OverflowError, TypeError) as error:
        return str(error)
    return tuple(specialization), str(more)


def launches_of_the_same_key_are_specialized_alike(frozen, draw):
    """All pairs of some arguments, with some constants: what shares a key shares Triton's."""
    kernel = draw(st.sampled_from(SPECIALIZED))
    pool = draw(draw(st.sampled_from(POOLS)))
    constants = draw(st.lists(st.sampled_from(CONSTANTS), min_size=2, max_size=3))
    options = [{"N": c} for c in constants] + [{"N": 16, "num_warps": w} for w in (4, 4.0, 1, True)]
    options += [{"N": 16, "M": c} for c in (1, *constants)]
    chosen = {}
    for arguments in itertools.product(pool, repeat=2):
        for constant in options if arguments[0] is arguments[1] else options[:1]:
            with contextlib.suppress(frozen.Unusual):
                key, _, _ = frozen.key(kernel, arguments, constant)
                theirs = tritons_key(kernel, arguments, constant)
                assert chosen.setdefault(tuple(key), theirs) == theirs


ALIKE = launches_of_the_same_key_are_specialized_alike
MUTANTS = [
    Mutant("1 is no constant", "1 if x == 1 else 2 if x & 15", "2 if x & 15"),
    Mutant("multiples of 8", "1 if x == 1 else 2 if x & 15", "1 if x == 1 else 2 if x & 7"),
    Mutant("64 bits are like 32", "if x >> 31 else", "if x >> 63 else"),
    Mutant("negative 64 bits are like 32", "-(2**31) <= x < 0", "x < 0"),
    Mutant(
        "64 bits without a sign are like 63", "return 6 if x & 15 else 7", "return 4 + (not x & 15)"
    ),
    Mutant("all pointers are aligned", "(dtype,) if address & 15 else dtype", "dtype"),
    Mutant("any dtype", "(dtype,) if address & 15 else dtype", "address & 15 == 0"),
    Mutant("a bool is like a float", "found.append(kind)", "found.append(float)"),
    Mutant("tuples are flat", "found += kind, len(x)", "pass"),
    Mutant("tuples have no end", "found += kind, len(x)", "found.append(kind)"),
    Mutant("blocks of any shape", "found += kind, tuple(x.block_shape)", "found.append(kind)"),
    Mutant("a constant's type", ", *map(type, constants)]", "]"),
    Mutant("a constant's name", "*options, *constants", "*constants"),
]


def test_launches_of_the_same_key_are_specialized_alike():
    harness.run(ALIKE, frozen, examples=100)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_of_the_key_are_killed(mutant, tmp_path):
    assert harness.killed(frozen, mutant, [ALIKE], tmp_path, examples=200)


@pytest.mark.parametrize(
    "x, y, same",
    [
        (768, 1536, True),
        (-7, 2**31 - 1, True),
        (2**31, 2**40 + 16, True),
        (0.5, float("nan"), True),
        (pointer(0, "float32", 0), pointer(0, "float32", 2**40), True),
        (768, 767, False),
        (1, 2, False),
        (1, True, False),
        (1, 1.0, False),
        (16, 2**31, False),
        (-(2**31), -(2**31) - 16, False),
        (2**63 - 1, 2**63 + 1, False),
        ((2, 3), (2, (3,)), False),
        ((2, 3), Two(2, 3), False),
        (Two(2, 3), Two(18, -5), True),
        ((), None, False),
        (pointer(0, "float32", 16), pointer(0, "float32", 24), False),
        (pointer(0, "float32", 16), pointer(0, "int32", 16), False),
        (pointer(0, "float32", 16), pointer(1, "float32", 16), False),
    ],
)
def test_what_a_key_says_of_an_argument(x, y, same):
    kernel = SPECIALIZED[2]
    (first, _, _), (second, _, _) = (frozen.key(kernel, (2, a), {"N": 1}) for a in (x, y))
    assert (first == second) == same


REPEATED = """
import collections
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)

@triton.jit(do_not_specialize=["seed"])
def numbers(
    x, y, n, far, seed, scale, flag, some, nothing, N: tl.constexpr, LAST: tl.constexpr = 7
):
    tl.store(x, n + seed + FACTOR)

@triton.jit
def tiles(a, b, n, N: tl.constexpr):
    b.store([0, 0], a.load([0, 0]))

@triton.jit
def scratch(x, n, N: tl.constexpr):
    made = tl.make_tensor_descriptor(x, [n, n], [n, 1], [N, N])
    made.store([0, 0], tl.zeros((N, N), tl.bfloat16))
"""

REPEATING = (
    LAUNCH
    + """
import os
import repeated
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

HOME, Pair = Home(), repeated.collections.namedtuple("Pair", "a b")
Library.now = 3
Library.device = staticmethod(lambda: Library.now)
by_triton = []
run = triton.runtime.jit.JITFunction.run
def counted(self, *arguments, **more):
    by_triton.append(self)
    return run(self, *arguments, **more)
triton.runtime.jit.JITFunction.run = counted

def at(address, dtype="bfloat16"):
    x = Array(Abstract((64, 64), dtype), HOME)
    x.address = address
    return x

def tile(address, *block, rows=64):
    return TensorDescriptor(at(address), [rows, 64], [64, 1], list(block))

def numbers(*arguments, grid=(1,), **options):
    driver.launch(repeated.numbers, grid, *arguments, **{"N": 16, **options})

def tiles(*arguments):
    driver.launch(repeated.tiles, (3,), *arguments, N=1)

def usual(x=0x1000, y=0x2002, n=768, far=2**40, seed=12345, **options):
    some = (3, None, at(0x30), 1, 0.25)
    numbers(at(x), at(y), n, far, seed, 0.5, True, some, None, **options)

def times(*calls):
    del by_triton[:]
    for call in calls:
        call()
    return len(by_triton)
"""
)


@pytest.fixture(scope="module")
def repeating(fake_cuda, tmp_path_factory):
    """repeating(program, **environment): its words, with kernels to launch."""
    folder = tmp_path_factory.mktemp("repeated")
    (folder / "repeated.py").write_text(REPEATED)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return lambda program, **more: process(
        REPEATING + program, **fake_cuda, **{"PYTHONPATH": path, **more}
    )


SAME = """
cases = {
    "8,8,4,8,4,4,1,4,8,4,8,8": [
        lambda: usual(),
        lambda: usual(x=0x7000, n=1536, far=-(2**33), seed=99),
        lambda: usual(y=0x2004, grid=(5, 4, 3), num_warps=8),
        lambda: usual(num_warps=8, num_ctas=2, maxnreg=64, grid=(6,)),
        lambda: usual(LAST=8, grid=(2, 9)),
        lambda: usual(n=-7, seed=-1),
    ],
    "8,8,8,4,4,1,4,8,4,8,8": [lambda: usual(n=1), lambda: usual(n=1, seed=1)],
    "8,8,8,8,8,4,1,4,8,4,8,8": [
        lambda: usual(n=2**63, seed=2**31),
        lambda: usual(n=2**63, seed=2**40 + 1),
    ],
    "8,8,1,4,4,4,4,1,8,8": [
        lambda: numbers(at(16), at(0, "float32"), True, 5, 6, 7.5, 8, (False, 1), None),
        lambda: numbers(at(16), at(0, "float32"), True, 5, 6, 7.5, 7, Pair(False, 1), None),
        lambda: numbers(at(16), at(0, "float32"), True, 5, 6, 7.5, 9, Pair(True, 1), None),
    ],
    "128,4,4,8,8,128,4,4,8,8,4,8,8": [
        lambda: tiles(tile(0x100, 16, 16), tile(0x200, 16, 16), 9),
        lambda: tiles(tile(0x300, 16, 16), tile(0x200, 16, 16), 9),
        lambda: tiles(tile(0x300, 16, 16, rows=32), tile(0x500, 16, 16), 10),
        lambda: tiles(tile(0x100, 32, 16), tile(0x200, 32, 16), 9),
    ],
}

def everything():
    print("|")
    for sizes, calls in cases.items():
        os.environ["FAKE_CUDA_SIZES"] = sizes
        for call in calls:
            call()
    print("|", flush=True)

driver.FROZEN = False
everything()
everything()
driver.FROZEN = True
everything()
everything()
print(times(everything), len(driver._frozen))
"""


def test_a_repeated_launch_tells_the_gpu_the_same_as_tritons_own(repeating):
    """Function, grid, threads, stream, shared memory and every byte of every parameter."""
    *_, count, kept = words = repeating(SAME)
    _, _, _, by_triton, _, first, _, again, _, _, _ = " ".join(words[:-2]).split("|")
    assert by_triton == first == again
    assert (count, kept) == ("0", "13")
    said = by_triton.split("launch ")[1:]
    assert len(said) == 17 == len(set(said))
    assert (
        "0070000000000000 0220000000000000 00060000 00000000feffffff 63000000 0000003f" in said[1]
    )
    assert said[2].startswith("5x4x3 of 256 threads on stream 1003, first pointer 1000 ")


def test_a_launch_is_repeated_on_the_device_and_the_stream_that_are_current(repeating):
    program = "print(times(usual, usual))\nLibrary.now = 2\nprint(times(usual, usual))\n"
    program += "Library.stream = lambda self, device: 77\nprint(times(usual))\n"
    program += "Library.now = 3\nprint(times(usual))"
    words = " ".join(repeating(program))
    streams = re.findall(r"stream (\d+)|(load)", words)
    assert [a or b for a, b in streams] == [
        "load",
        "1003",
        "1003",
        "load",
        "1002",
        "1002",
        "77",
        "77",
    ]
    assert re.findall(r"1000 (\d)", words) == ["1", "1", "0", "0"]


def test_repeated_launches_can_be_left_to_triton(repeating):
    words = repeating("print(times(usual, usual, usual))", TINYGRAD_LLM_FROZEN="0")
    assert words[-1] == "3"


UNUSUAL = """
seen, runtime = [], triton.knobs.runtime

def count(name, *calls):
    calls *= 4 // len(calls)
    print("|", name, times(*calls), len(seen), flush=True)
    del seen[:]

def positional(N):
    driver.launch(repeated.tiles, (3,), tile(0x100, 16, 16), tile(0x200, 16, 16), 9, N)

def named():
    driver.launch(repeated.tiles, (3,), tile(0x100, 16, 16), tile(0x200, 16, 16), n=9, N=16)

def refused(call):
    try:
        call()
    except (RuntimeError, TypeError) as error:
        seen.append(error)

usual()
count("nothing", usual)
count("a constant by its place", lambda: positional(16), lambda: positional(32))
count("an argument by its name", named)
count("a grid that is computed", lambda: usual(grid=lambda bound: (bound["N"],)))
triton.set_allocator(lambda size, align, stream: seen.append(size) or at(0))
count("memory", lambda: driver.launch(repeated.scratch, (1,), at(0), 64, N=16))
runtime.launch_enter_hook.add(seen.append)
count("a hook of launches", usual)
runtime.launch_enter_hook.remove(seen.append)
runtime.launch_exit_hook, chain = seen.append, runtime.launch_exit_hook
count("a hook that is no chain", usual)
runtime.launch_exit_hook = chain
repeated.numbers.add_pre_run_hook(lambda *_, **__: seen.append(1))
count("a hook of the kernel", usual)
repeated.numbers.pre_run_hooks.clear()
runtime.debug = True
count("debugging", usual)
runtime.debug = False
x = Array(Abstract((4,), "bfloat16"), type("Other", (Home,), dict(module="other"))())
two = lambda: numbers(at(0), x, 1, 1, 1, 1.0, True, None, None)
count("arrays of two libraries", lambda: refused(two))
driver._MOST_FROZEN = 3
driver._frozen.clear()
for n in (2, 16, 1, 2**40, 2**41 + 1):
    usual(n=n)
print("| kept", len(driver._frozen), len(seen))
usual()
repeated.FACTOR = triton.language.constexpr(3)
count("a global constant that changed", lambda: refused(usual))
"""


def test_an_unusual_launch_is_left_to_triton(repeating):
    """What was launched by Triton, of four launches, and what was seen meanwhile."""
    said = " ".join(repeating(UNUSUAL))
    found = re.findall(r"\| ([a-z ]+) (\d) (\d)", said)
    assert {name: (int(launched), int(seen)) for name, launched, seen in found} == {
        "nothing": (0, 0),
        "a constant by its place": (4, 0),
        "an argument by its name": (4, 0),
        "a grid that is computed": (4, 0),
        "memory": (4, 4),
        "a hook of launches": (4, 4),
        "a hook that is no chain": (4, 4),
        "a hook of the kernel": (4, 4),
        "debugging": (4, 0),
        "arrays of two libraries": (0, 4),
        "kept": (2, 0),
        "a global constant that changed": (4, 4),
    }


SMALLEST = """
from tinygrad_llm.kernels.gpu import attention, driver, elementwise, linear, loss, norm, position
from tinygrad_llm.kernels.gpu import reduce, shape
from tinygrad_llm.kernels.gpu.arrays import Abstract

def run(kernel, *arrays, g=None, **attributes):
    y, saved = kernel.forward(*arrays, **attributes)
    needs = tuple(a.dtype == "bfloat16" for a in arrays)
    kernel.vjp(y if g is None else g, y, *arrays, saved=saved, needs=needs, **attributes)

def one(axes, dtype="bfloat16"):
    return Abstract((1,) * axes, dtype)

with driver.compiling(90) as compiled:
    run(linear.matmul, one(2), one(2))
    run(linear.linear, one(2), one(2), one(1))
    run(attention.attention, one(4), one(4), one(4), causal=True)
    run(norm.layer_norm, one(2), one(1), one(1))
    run(norm.rms_norm, one(2), one(1))
    run(reduce.softmax, one(2))
    run(elementwise.gelu_tanh, one(2))
    run(loss.cross_entropy, one(2), one(1, "int64"), g=1)
    for axes in (0, 1, 2):
        run(shape.embedding, one(2), one(axes, "int64"))
print(len(compiled))
"""


def test_the_smallest_arrays_compile():
    """A stride or a length of 1 is a constant to Triton's compiler, and not to the interpreter."""
    assert int(process(SMALLEST)[0]) > 20


def test_a_gpu_that_is_too_old_is_refused(gpu):
    gpu(capability=75)
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5; the kernels need 8\.0"):
        driver.launch(_dot, (1,))


@interpreter_only
def test_an_array_on_another_gpu_is_refused(gpu):
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    Elsewhere.__module__ = "torch"
    gpu()
    with pytest.raises(ValueError, match="x is on GPU 1, but the current one is 3"):
        kernels.softmax.forward(torch.zeros(2, 3).as_subclass(Elsewhere))


# --- arrays ---------------------------------------------------------------------------------------


@interpreter_only
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch_tensors_come_back_as_pytorch_tensors(dtype):
    x = torch.randn(3, 7).to(getattr(torch, dtype))
    y, saved = kernels.softmax.forward(x)
    assert isinstance(y, torch.Tensor) and y.dtype == x.dtype
    torch.testing.assert_close(y, torch.softmax(x, -1))
    (x_bar,) = kernels.softmax.vjp(y, y, x, saved=saved, needs=(True,))
    assert isinstance(x_bar, torch.Tensor) and x_bar.shape == x.shape


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_any_array_of_a_gpu_library_will_do():
    import cupy

    class Foreign:
        def __init__(self, x):
            self.__cuda_array_interface__ = x.__cuda_array_interface__

    x = cupy.random.standard_normal((3, 7)).astype("float32")
    expected, _ = kernels.softmax.forward(x)
    for foreign in (Foreign(x), torch.from_dlpack(x)):
        y, _ = kernels.softmax.forward(foreign)
        assert cupy.array_equal(cupy.asarray(y), expected)


class OnTheHost:
    def __dlpack__(self, **_):
        return np.zeros((2, 3), np.float32).__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


@pytest.mark.parametrize(
    "x, message",
    [
        ([1.0, 2.0], "x is a list; expected an array of NumPy or PyTorch on the host"),
        (np.zeros((2, 3), np.int32), "x has dtype int32; expected float32, float16 or bfloat16"),
        (np.zeros((2, 3), np.complex64), "x has dtype complex64; expected float32, float16 or"),
        (Abstract((2, 3), "float32"), r"Abstract arrays are for driver.compiling\(\)"),
        (np.ma.array([[1.0]], mask=[[1]]), "x is a masked array; expected a plain one"),
        (np.zeros((2, 3), np.dtype(np.float32).newbyteorder()), "x has dtype >f4; expected"),
    ],
)
@interpreter_only
def test_what_is_no_array_for_a_kernel(x, message):
    with pytest.raises(TypeError, match=message):
        kernels.softmax.forward(x)


RECORDS = np.zeros(3, dtype=[("id", "<i2"), ("v", "<f4", (2,))])


@pytest.mark.parametrize(
    "x, message",
    [
        (RECORDS["v"], "x has strides of .* bytes, which is no whole number of elements"),
        (torch.empty(2, 3, device="meta"), r"x has a Tensor \(torch.strided, meta\) without"),
        (torch.ones(2, 3).to_sparse(), "x has a Tensor .* without numbers in memory"),
        (torch.complex(torch.ones(2), torch.ones(2)).conj().imag, "without numbers in memory"),
    ],
)
@interpreter_only
def test_what_has_no_elements_to_point_to(x, message):
    with pytest.raises(ValueError, match=message):
        kernels.softmax.forward(x)


class Sub(np.ndarray):
    pass


@interpreter_only
@pytest.mark.parametrize("x", [OnTheHost(), np.zeros((2, 3), np.float32).view(Sub)])
def test_any_array_of_the_host_will_do_in_the_interpreter(x):
    y, _ = kernels.softmax.forward(x)
    np.testing.assert_allclose(y, np.full((2, 3), 1 / 3), rtol=1e-6)


def test_numpy_arrays_and_tensors_of_the_host_need_the_interpreter():
    program = SOFTMAX + "import torch\nfor x in (np.zeros((2, 3), 'f4'), torch.zeros(2, 3)):\n"
    program += "    try:\n        reduce.softmax.forward(x)\n"
    program += "    except TypeError as error:\n        print(error, end=' | ')"
    said = " ".join(process(program))
    assert "x is a NumPy array: the GPU's kernels take CuPy arrays or PyTorch tensors" in said
    assert "x is on cpu; move it to the GPU with .cuda()" in said


def test_no_room_on_the_device_is_a_memory_error():
    class OutOfMemoryError(Exception):
        pass

    class Full:
        def describe(self, x):
            return 0, "float32", x.shape, (1,)

        def empty(self, shape, dtype, like):
            raise OutOfMemoryError("of 80 GiB ...")

    with pytest.raises(MemoryError, match=r"no room for 4\.00 GiB \(shape \(1024, 1048576\), flo"):
        Array(Abstract((3,), "float32"), Full()).empty((1024, 1 << 20), "float32")


@interpreter_only
def test_arrays_of_two_libraries_are_refused():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(TypeError, match="arrays of numpy and torch in one call"):
        norm.rms_norm.forward(x, torch.ones(3))
    with pytest.raises(TypeError, match="arrays of numpy and torch in one call"):
        optim.global_norm([x, torch.ones(3)])
    for more in ((torch.ones(2), None), (None, torch.ones(2, 2))):
        with pytest.raises(TypeError, match="arrays of numpy and torch in one call"):
            linear.linear.forward(x, x[:2], *more)


# --- the interpreter ------------------------------------------------------------------------------


@triton.jit
def _every_way(x, y, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i, mask=i < n, other=0.0)
    b = tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + 0 * n + i, a + b, mask=i < n)
    tl.store(out + 1 * n + i, a * b, mask=i < n)
    tl.store(out + 2 * n + i, (a.to(tl.float32) * 3.1).to(tl.bfloat16), mask=i < n)
    tl.store(out + 3 * n + i, tl.where(a > b, a, b), mask=i < n)
    tl.store(out + 4 * n + i, -a, mask=i < n)


@triton.jit
def _dot(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def bfloat16(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(BFLOAT16)


@interpreter_only
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_bfloat16_is_computed_as_the_hardware_does(seed):
    """Exact sums and products, rounded to nearest, ties to even. In Triton's own interpreter these
    are sums and products of the bits, read as integers."""
    x, y = bfloat16(50, seed=seed), bfloat16(50, seed=seed + 1)
    out = np.zeros((5, 50), BFLOAT16)
    driver.launch(_every_way, (1,), *(array(a, "a") for a in (x, y, out)), 50, N=64)
    wide_x, wide_y = x.astype(np.float32), y.astype(np.float32)
    exact = [wide_x + wide_y, wide_x * wide_y, wide_x * np.float32(3.1), np.maximum(x, y), -x]
    assert np.array_equal(out, np.array(exact).astype(BFLOAT16))


@interpreter_only
def test_float32_is_rounded_to_bfloat16_not_cut_off():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)

    @triton.jit
    def _cast(x, y, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))

    y = np.zeros(x.shape, BFLOAT16)
    driver.launch(_cast, (1,), array(x, "x"), array(y, "y"), N=x.size)
    assert np.array_equal(y, x.astype(BFLOAT16))
    cut_off = (x.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
    assert np.sum(y != cut_off) > 1000


@interpreter_only
def test_a_dot_of_bfloat16_is_summed_in_float32():
    a, b, c = bfloat16(32, 32), bfloat16(32, 32, seed=1), np.zeros((32, 32), np.float32)
    driver.launch(_dot, (1,), *(array(m, "m") for m in (a, b, c)), N=32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = 32 * 2**-24 * (np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)))
    assert np.all(np.abs(c - exact) <= bound)


@interpreter_only
def test_a_loop_bound_may_be_read_from_memory():
    @triton.jit
    def _count(n, out):
        total = 0
        for _ in range(tl.load(n)):
            total += 2
        tl.store(out, total)

    out = np.zeros(1, np.int32)
    ids = ("int32",)
    driver.launch(_count, (1,), array(np.array([21], np.int32), "n", ids), array(out, "o", ids))
    assert out[0] == 42


# --- tables of tile sizes -------------------------------------------------------------------------

DEFAULT = {"N": 16, "num_warps": 4}
CANDIDATES = [{"N": 32, "num_warps": 4}, {"N": 64, "num_warps": 8}, {"N": 128, "num_warps": 8}]


@pytest.fixture
def tables(gpu, monkeypatch, tmp_path):
    """Tables in a folder of the test's own; tables(times...) is the GPU's clock."""
    monkeypatch.setenv("TINYGRAD_LLM_TUNING", str(tmp_path / "own"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_searching", False)

    def install(*times):
        monkeypatch.setattr(tuning, "_tables", {})
        gpu(times=times)
        clock = FakeGPU(times=times)
        monkeypatch.setattr(driver, "_device_library", lambda: clock)

    install()
    return install


def test_a_configuration_of_another_version_is_not_used(tables):
    write(tuning.path(), {"N": 64, "num_warps": 4, "MAGIC": 1})
    tables()
    assert chosen() == DEFAULT


def chosen(run=None, key=("bfloat16", 4096)):
    return tuning.configuration("softmax", key, DEFAULT, lambda: CANDIDATES, run)


def write(file, config):
    file.parent.mkdir(exist_ok=True)
    entry = {"bfloat16 4096": {"config": config, "ms": 1.0}}
    file.write_text(json.dumps({"device": "d", "triton": "t", "kernels": {"softmax": entry}}))


def test_the_default_then_the_shipped_table_then_the_users_then_force(tables, tmp_path):
    assert chosen() == DEFAULT
    write(tmp_path / "shipped" / "nvidia-h200.json", CANDIDATES[0])
    tables()
    assert chosen() == CANDIDATES[0] and chosen(key=("float16", 1)) == DEFAULT
    write(tuning.path(), CANDIDATES[1])
    tables()
    assert chosen() == CANDIDATES[1]
    with tuning.using(softmax=CANDIDATES[2]):
        assert chosen() == CANDIDATES[2]
    assert chosen() == CANDIDATES[1]


def test_a_search_keeps_the_fastest_for_the_next_process(tables):
    tried = []
    tables(*[3.0, 1.0, 2.0] * 7)
    with tuning.searching():
        assert chosen(run=tried.append) == CANDIDATES[1]
    assert [tried.count(c) for c in CANDIDATES] == [8, 8, 8]  # once to compile, seven times timed
    tables()  # a new process
    assert chosen() == CANDIDATES[1]
    table = json.loads(tuning.path().read_text())
    assert table["device"] == "NVIDIA H200" and table["triton"] == triton.__version__
    entry = table["kernels"]["softmax"]["bfloat16 4096"]
    assert entry == {"config": CANDIDATES[1], "ms": 1.0}


@pytest.mark.parametrize(
    "error",
    [
        triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_a_candidate_that_does_not_fit_is_left_out(tables, error):
    def run(candidate):
        if candidate == CANDIDATES[1] or unlucky:
            raise error

    unlucky = False
    tables(*[3.0, 2.0] * 7)
    with tuning.searching():
        assert chosen(run=run) == CANDIDATES[2]
        unlucky = True
        with pytest.raises(RuntimeError, match="none of the candidates runs on this GPU: "):
            chosen(run=run, key=("float32", 1))


def test_a_search_that_is_interrupted_leaves_the_table_as_it_was(tables):
    write(tuning.path(), CANDIDATES[0])
    before = tuning.path().read_bytes()

    def run(candidate):
        raise KeyboardInterrupt

    tables()
    with tuning.searching(), contextlib.suppress(KeyboardInterrupt):
        chosen(run=run, key=("float32", 1))
    assert tuning.path().read_bytes() == before and len(list(tuning.path().parent.iterdir())) == 1


def test_a_table_that_cannot_be_written_is_a_warning(tables, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYGRAD_LLM_TUNING", str(tmp_path / "file" / "folder"))
    tables(*[1.0, 2.0, 3.0] * 7)
    with tuning.searching(), pytest.warns(UserWarning, match="cannot be written .* TINYGRAD_LLM_T"):
        assert chosen(run=lambda _: None) == CANDIDATES[0]
    assert chosen() == CANDIDATES[0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"kernels": []}', '{"kernels": {"product": {"k": {}}}}',
     '{"kernels": {"product": {"k": {"config": {"BM": "x"}}}}}'],
)  # fmt: skip
def test_a_damaged_table_is_named(tables, text):
    tuning.path().parent.mkdir()
    tuning.path().write_text(text)
    with pytest.raises(ValueError, match=r"nvidia-h200\.json is not a table .*: delete it"):
        chosen()


@interpreter_only
def test_the_interpreter_takes_the_default():
    with tuning.searching():
        assert chosen(run=None) == DEFAULT
