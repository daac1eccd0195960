"""The kernels' benchmark, as far as it goes without a GPU: what is raced computes what PyTorch
computes, the gate finds what it is there to find, and the sums of the race add up.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed, they run from the repository

from benchmarks import machine  # noqa: E402
from benchmarks.kernels import gate, race, workloads  # noqa: E402
from benchmarks.kernels.chips import CHIPS, DEFAULT  # noqa: E402
from benchmarks.kernels.gate import Compiled, judge, sample  # noqa: E402
from benchmarks.kernels.picture import draw  # noqa: E402
from benchmarks.kernels.variants import DTYPES, HEADS, LINEAR, WIDTHS  # noqa: E402
from benchmarks.kernels.workloads import GROUPS, TINY, Input, Workload, catalogue  # noqa: E402
from benchmarks.measure import Timing  # noqa: E402

needs_torch = pytest.mark.skipif(not machine.installed("torch"), reason="compares with PyTorch")
needs_triton = pytest.mark.skipif(not machine.installed("triton"), reason="compiles with Triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs on tensors of the host"
)


class NoGpu:
    """The host in place of a GPU: calls are made, and take as long as the test says."""

    device = "cpu"

    def __init__(self, seconds=lambda call, hold: 1e-3):
        self._seconds, self.tidied = seconds, 0

    @functools.cached_property
    def torch(self):
        import torch

        return torch

    def seconds(self, call, hold):
        call()
        return self._seconds(call, hold)

    def synchronize(self):
        pass

    def tidy(self):
        self.tidied += 1


def run(*arguments, **environment):
    """The command in a process without a GPU."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "kernels", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


# --- the workloads --------------------------------------------------------------------------------


def test_names_are_all_different():
    for sizes in (None, TINY):
        names = [workload.name for workload in catalogue(sizes)]
        assert len(names) == len(set(names))
    assert {workload.group for workload in catalogue()} == set(GROUPS)
    names = [workload.name for workload in gate.covered()]
    assert len(names) == len(set(names))


@needs_torch
@interpreted
@pytest.mark.parametrize("workload", catalogue(TINY), ids=lambda workload: workload.name)
def test_ours_and_every_peer_compute_the_same(workload):
    calls, moved, error, skipped = race.prepare(workload, NoGpu(), without=("torch.compile",))
    assert {"ours", *workload.peers} == set(calls) | set(skipped) and len(calls) > 1
    assert set(skipped) <= {"torch.compile", "cuDNN", "efficient"}  # these need a GPU
    assert moved > 0 and set(error["peers"]) == set(calls) - {"ours"}


@needs_torch
def test_inputs_are_what_they_say():
    import torch

    generator = torch.Generator().manual_seed(0)
    x = Input((300, 40), scale=3.0).tensor(torch, "cpu", generator)
    assert x.dtype == torch.bfloat16 and 2.8 < x.float().std() < 3.2
    t = Input((1000,), "int64", low=3, below=7).tensor(torch, "cpu", generator)
    assert t.dtype == torch.int64 and (t.min(), t.max()) == (3, 6)
    assert Input((3, 5), "float32").bytes == 60


# --- right or wrong -------------------------------------------------------------------------------


@needs_torch
def test_errors_are_counted_in_roundings():
    import torch

    expected = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    off = expected + torch.tensor([[0, 0, 2.0**-8, 0]])
    worst, relative = race.errors(torch, [off], [expected], "bfloat16")
    assert worst == pytest.approx(0.5)  # the unit is a rounding of 1 and one of the row's size
    assert relative == pytest.approx(2.0**-9)
    off[0, 1] = float("nan")
    assert race.errors(torch, [off], [expected], "bfloat16") == (float("inf"), float("inf"))
    nothing = torch.zeros(2, 4)  # a row of zeros is judged by what the others are
    nothing[0] = 1
    worst, _ = race.errors(torch, [nothing + 2.0**-8], [nothing], "bfloat16")
    assert worst == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="shape"):
        race.errors(torch, [expected[0]], [expected], "bfloat16")


def doubling(ours, **peers):
    """A workload that is to double numbers."""
    as_call = lambda f: lambda *a: lambda: (f(*a),)  # noqa: E731
    return Workload(
        "twice",
        (Input((4, 8)),),
        as_call(ours),
        lambda torch, outputs, x: (2 * x,),
        {name: (lambda f: lambda torch, x: as_call(f)(x))(peer) for name, peer in peers.items()},
    )


def broken(x):
    raise RuntimeError("no such device\nand a long story")


@needs_torch
def test_a_failure_is_reported_and_the_rest_goes_on():
    twice, wrong = (lambda x: 2 * x), (lambda x: 2.1 * x)
    found = [
        doubling(twice, eager=twice, other=broken, wrong=wrong),
        doubling(wrong, eager=twice),
        doubling(broken),
        doubling(twice),
    ]
    gpu, said = NoGpu(), []
    method = race.OnDevice(rounds=2, seconds=0, gpu=gpu)
    roofline = {"bandwidth": 1e6, "flops": 1e12}
    results = race.run_all(found, gpu, method, roofline, say=said.append)
    fine, off, raised, alone = results
    assert fine["problem"] is None and set(fine["peers"]) == {"eager"}
    assert fine["skipped"]["other"] == "RuntimeError: no such device"
    assert "computes something else" in fine["skipped"]["wrong"]
    assert fine["bytes"] == 2 * 4 * 8 * 2 and fine["ratio"] == 1.0
    assert fine["roofline"] == pytest.approx(fine["bytes"] / 1e6 / 1e-3)
    assert "wrong numbers" in off["problem"]
    assert raised["problem"] == "RuntimeError: no such device"
    assert alone["best"] is None and alone["ratio"] is None and alone["problem"] is None
    assert gpu.tidied == len(said) == 4
    rows = race.table(results).rows
    assert all(len(row) == len(race.COLUMNS) for row in rows)
    assert [row[1] for row in rows] == ["1 ms", "FAILED", "FAILED", "1 ms"]
    notes = race.notes(results, roofline, 12.0)
    assert any("1 of 1 reach" in note for note in notes)
    assert any(note.startswith("FAILED: twice, twice") for note in notes)
    late = race.run_all(found[:1], gpu, method, roofline, deadline=0, say=said.append)
    assert late[0]["problem"] == "not run: out of time"


@needs_torch
def test_after_a_lost_context_nothing_is_tried():
    class Lost(NoGpu):
        def synchronize(self):
            raise RuntimeError("illegal memory access")

    gpu = Lost()
    method = race.OnDevice(rounds=1, seconds=0, gpu=gpu)
    results = race.run_all([doubling(broken)] * 3, gpu, method, {}, say=lambda name: None)
    assert [r["problem"][:12] for r in results] == ["RuntimeError", "not run: the", "not run: the"]
    assert gpu.tidied == 1


# --- time -----------------------------------------------------------------------------------------


def test_turns_take_the_methods_seconds():
    held = []

    def seconds(call, hold):
        held.append(hold)
        return 0.01

    gpu, calls = NoGpu(seconds), []
    method = race.OnDevice(rounds=1, seconds=0.05, gpu=gpu)
    assert method.turn(lambda: calls.append(1)) == [0.01] * 5
    assert len(calls) == 5 + 5  # five more for what launching takes
    assert all(hold >= 50e-6 for hold in held)
    quick = race.OnDevice(rounds=1, seconds=9.0, gpu=NoGpu())
    assert len(quick.turn(lambda: None)) == 30
    slow = race.OnDevice(rounds=1, seconds=0.0, gpu=NoGpu())
    assert len(slow.turn(lambda: None)) == 3


def test_launching_is_the_median_of_five():
    times = iter([0, 9, 10, 11, 20, 22, 30, 31, 40, 41])  # 9, 1, 2, 1, 1
    assert race.host_seconds(lambda: None, NoGpu(), lambda: next(times)) == 1


def made_up(name="w", group="linear", ours=2e-3, flops=4e12, target=1.0, **peers):
    """A summary of measurements that nobody made."""
    workload = replace(doubling(None), name=name, group=group, flops=flops, target=target)
    times = {"ours": Timing((ours, ours), ours)} | {
        peer: Timing((t, t), t) for peer, t in peers.items()
    }
    hosts = dict.fromkeys(times, 5e-5)
    roofline = {"bandwidth": 4e12, "flops": 8e14}
    error = {"worst": 0.5, "relative": 1e-3, "peers": {}}
    return race.summary(workload, 2e9, roofline, error, times, hosts, {}), roofline


def test_ratio_and_roofline():
    result, _ = made_up(flops=8e11, eager=4e-3, compiled=3e-3)
    assert result["best"] == "compiled" and result["ratio"] == pytest.approx(1.5)
    assert result["peers"]["eager"]["ratio"]["median"] == pytest.approx(2.0)
    assert result["roofline"] == pytest.approx(0.5)  # 1 ms of arithmetic, 0.5 ms of moving
    assert race.speed(result, 2e-3) == "400 TFLOP/s"
    moving, _ = made_up(flops=0, target=2.0, eager=3e-3)
    assert moving["roofline"] == pytest.approx(0.25)
    assert race.speed(moving, 2e-3) == "1.00 TB/s"
    row = race.table([moving]).rows[0]
    assert row[1:] == ["2 ms", "1.00 TB/s", "25%", "50 µs", "eager 3 ms", "1.50 < 2", "0.5"]


def test_the_picture(tmp_path):
    results = [
        made_up("matmul", eager=3e-3)[0],
        made_up("attention", "attention 64", ours=5e-3, flash=4e-3)[0],
        made_up("alone")[0],
        made_up("softmax", "reduce", flops=0, eager=3e-3)[0],
        {"name": "broken", "group": "norm", "problem": "wrong numbers"},
    ]
    _, roofline = made_up()
    for i, some in enumerate((results, [])):
        path = draw(some, roofline, "A GPU", tmp_path / f"{i}.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_the_gpus_tests_are_run_side_by_side(tmp_path):
    (tmp_path / "test_gpu_fine.py").write_text(
        "import os\n"
        "def test_it():\n    assert os.environ.get('TRITON_INTERPRET') is None\n"
        "def test_mutants():\n    assert False\n"
    )
    (tmp_path / "test_gpu_wrong.py").write_text("def test_it():\n    assert False\n")
    found = race.run_tests(sorted(tmp_path.glob("*.py")))
    assert found["test_gpu_fine"]["passed"] and "1 passed" in found["test_gpu_fine"]["said"]
    assert not found["test_gpu_wrong"]["passed"] and "1 failed" in found["test_gpu_wrong"]["said"]
    (tmp_path / "test_gpu_slow.py").write_text("import time\ntime.sleep(60)\n")
    (slow,) = race.run_tests([tmp_path / "test_gpu_slow.py"], seconds=1).values()
    assert slow == {"passed": False, "said": "killed after 1 s"}


def test_results_are_saved_by_gpu(tmp_path):
    description = machine.describe(threads=1) | {"gpu": "NVIDIA H200"}
    result, _ = made_up(eager=3e-3)
    from benchmarks.report import Result

    saved = Result("kernels", {}, {"kernels": [result]}, [race.table([result])])
    names = [path.name for path in saved.save(tmp_path, description)]
    assert names == ["kernels-nvidia-h200.json", "kernels-nvidia-h200.md"]
    assert machine.sentence(description).startswith("NVIDIA H200, ")


# --- the gate -------------------------------------------------------------------------------------


def test_occupancy():
    h100 = CHIPS[90]
    assert h100.occupancy(registers=32, shared=0, warps=4) == 1.0
    assert h100.occupancy(registers=255, shared=0, warps=8) == 8 / 64  # 8192 registers a warp
    assert h100.occupancy(registers=168, shared=0, warps=4) == 12 / 64  # 5376 of 16384 a quarter
    assert h100.occupancy(registers=32, shared=100_000, warps=8) == 16 / 64
    assert h100.occupancy(registers=32, shared=0, warps=1) == 32 / 64  # 32 blocks at most
    assert h100.occupancy(registers=32, shared=h100.block + 1024, warps=4) == 0.0
    assert set(DEFAULT) < set(CHIPS)
    assert all(chip.block + 1024 == chip.shared for chip in CHIPS.values())


def compiled(chip=90, dots=128, descriptors=True, shared=200_000, stack=0, **instructions):
    options = {"shared": shared, "stack": stack, "dots": dots, "descriptors": descriptors}
    return Compiled("_product", chip, "BM=128", False, instructions=instructions, **options)


def test_the_gate_finds_what_is_wrong():
    fine = compiled(HGMMA=4, UTMALDG=2)
    assert judge(fine, native=True, tma=True) == []
    assert judge(compiled(80, HMMA=64, shared=160_000), native=True, tma=True) == []
    assert judge(compiled(100, UTCHMMA=8, UTMALDG=2), native=True, tma=True) == []
    assert judge(compiled(dots=0, descriptors=False), native=True, tma=True) == []
    assert judge(compiled(dots=16, HMMA=4, UTMALDG=2), native=True, tma=True) == []
    wrong = {
        "spills registers: 8 bytes": compiled(HGMMA=4, UTMALDG=2, stack=8),
        "1 LDL, 2 STL": compiled(HGMMA=4, UTMALDG=2, LDL=1, STL=2),
        "240000 bytes of shared memory": compiled(HGMMA=4, UTMALDG=2, shared=240_000),
        "without tensor cores": compiled(UTMALDG=2),
        "no HGMMA": compiled(HMMA=64, UTMALDG=2),
        "no UTCHMMA": compiled(100, HMMA=64, UTMALDG=2),
        "without UTMALDG": compiled(HGMMA=4),
        "no tensor descriptor": compiled(HGMMA=4, descriptors=False),
    }
    for part, kernel in wrong.items():
        (problem,) = judge(kernel, native=True, tma=True)
        assert part in problem
    assert judge(wrong["no HGMMA"], native=False, tma=True) == []
    assert judge(wrong["no tensor descriptor"], native=True, tma=False) == []
    kernel = replace(fine, problems=["spills"], workloads=["matmul"])
    assert gate.failures([fine, kernel]) == ["sm_90 _product [BM=128] spills (in matmul)"]
    (table,) = gate.tables([fine, kernel])
    assert [row[0] for row in table.rows] == ["_product", "FAILED _product"]
    json.dumps(gate.data([kernel]))


def test_candidates_that_are_tried():
    default = {"BM": 128, "GROUP": 8, "num_stages": 3}
    others = [
        *(default | other for other in ({"GROUP": 4}, {"num_stages": 4}, {"num_stages": 2})),
        *(
            {"BM": n, "GROUP": g, "num_stages": s}
            for n in (16, 32, 64)
            for g in (4, 8)
            for s in (2, 3)
        ),
    ]
    assert sample(default, [default, *others], None) == others
    assert sample(default, others, 0) == []
    more_stages = [
        default | {"num_stages": 4},
        *({"BM": bm, "GROUP": 4, "num_stages": 3} for bm in (16, 32, 64)),
    ]
    assert sample(default, others, 9) == more_stages
    assert sample(default, others, 2) == more_stages[::2]
    assert sample({"ROWS": 1}, [{"ROWS": 1}, {"ROWS": 2}], 4) == [{"ROWS": 2}]


def test_the_gate_covers_every_option():
    """What changes a kernel's machine code is in some variant, with each dtype and precision."""
    names = [workload.name for workload in gate.covered()]
    types = {"bfloat16", "float16", "float32", "float32 tf32", "float32 tf32x3"}
    for d in HEADS:
        at = [name for name in names if name.startswith(f"attention of {d} in ")]
        for option in (
            "segments True",
            "window",
            "shared 4",
            "dropout",
            "causal False",
            "word True",
        ):
            assert any(option in name for name in at), f"{option} at {d}"
        for dtype, _, precision in (text.partition(" ") for text in types):
            wanted = f"in {dtype},", f"precision {precision or 'ieee'}"
            assert any(all(words in name for words in wanted) for name in at), f"{wanted} at {d}"
    assert set(HEADS) > {64, 128, 256} and any(d & (d - 1) for d in HEADS)
    layouts = {  # multiples of 16 bytes or not: factors, outputs
        (k % 8 == 0, m % 8 == 0): {text for _, k_, m_, _, text in LINEAR if (k_, m_) == (k, m)}
        for _, k, m, _, _ in LINEAR
    }
    assert set(layouts) == {(True, True), (False, False), (True, False)}
    assert all(
        {"bfloat16"} <= {text for n, k, m, _, text in LINEAR if (k % 8 == 0, m % 8 == 0) == at}
        for at in layouts
    )
    assert {text for *_, text in LINEAR} == types
    assert {activation for *_, activation, _ in LINEAR} == {None, "gelu", "gelu_tanh", "silu"}
    assert max(WIDTHS) > 16384 and set(DTYPES) == {"bfloat16", "float32"}


@needs_triton
def test_candidates_have_the_keys_of_their_default():
    """Or what a search finds would be taken for a table of another version."""
    program = """
import sys
from benchmarks.kernels import gate
from tinygrad_llm.kernels.gpu import driver, tuning

with driver.compiling(90):
    for workload in gate.covered():
        workload.ours(*(x.abstract() for x in workload.inputs))  # imports its module
        for name, module in list(sys.modules.items()):
            if name.startswith("tinygrad_llm.kernels.gpu.") and hasattr(module, "launch"):
                module.launch = lambda *arguments, **options: None  # nothing has to be compiled
        with tuning.recording() as choices:
            workload.ours(*(x.abstract() for x in workload.inputs))()
        for name, key, default, candidates in choices:
            assert all(c.keys() == default.keys() for c in candidates), (workload.name, name)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_variants_take_turns():
    """Each is compiled for one chip; for all of them if one asks for all, or by name."""
    variants = {w.name: w for w in gate.covered(every=False) if not w.raced}

    def times(chips, every):
        tasks = gate.plan(gate.covered(every=False), chips, every)
        found = [name for _, _, names, _ in tasks for name in names]
        return {found.count(name) for name in variants}, len(found)

    raced = len(catalogue())
    assert times((80, 90, 100), False) == ({1}, 3 * raced + len(variants))
    assert times((80, 90, 100), True) == ({3}, 3 * (raced + len(variants)))
    assert times((90,), False) == ({1}, raced + len(variants))
    name, workload = next(iter(variants.items()))
    tasks = gate.plan([workload], (80, 90), every=False, turns=False)
    assert [task[1:3] for task in tasks] == [(90, [name]), (80, [name])]
    assert all(workload.raced for workload in gate.covered(with_variants=False))


@needs_triton
@interpreted
def test_choices_are_recorded():
    from tinygrad_llm.kernels.gpu import tuning

    with tuning.recording() as choices, tuning.using(a={"N": 2}):
        some = lambda: [{"N": 1}, {"N": 4}]  # noqa: E731
        assert tuning.configuration("a", ("float32", 8), {"N": 1}, some) == {"N": 2}
    assert tuning.configuration("a", (), {"N": 3}) == {"N": 3}  # recorded no more
    assert choices == [("a", ("float32", 8), {"N": 1}, [{"N": 1}, {"N": 4}])]


@needs_triton
def test_a_search_that_starts_afresh_forgets(tmp_path, monkeypatch):
    from tinygrad_llm.kernels.gpu import tuning

    monkeypatch.setenv("TINYGRAD_LLM_TUNING", str(tmp_path))
    monkeypatch.setattr(tuning.driver, "device_name", lambda: "A GPU")
    monkeypatch.setattr(tuning, "_tables", {})
    (tmp_path / "a-gpu.json").write_text('{"kernels": {"a": {"": {"config": {"N": 2}, "ms": 1}}}}')
    monkeypatch.setattr(tuning.driver, "INTERPRETED", False)
    assert tuning.configuration("a", (), {"N": 1}) == {"N": 2}
    tuning.start_afresh()
    assert tuning.configuration("a", (), {"N": 1}) == {"N": 1}


@needs_triton
def test_the_gate(tmp_path):
    """It passes what is right and says so; in a process that would otherwise interpret."""
    name = f"softmax {workloads.Sizes().rows}"
    one = ["--compile", "--only", name, "--chip", "90", "--processes", "1"]
    done = run(*one, "--save", "--results", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = tmp_path.glob("kernels-compile-*.json")
    kernels = json.loads(path.read_text(encoding="utf-8"))["results"]["kernels"]
    assert {k["kernel"] for k in kernels} >= {"_softmax_forward", "_softmax_vjp"}
    assert {k["chip"] for k in kernels} == {90}
    assert all(k["registers"] and k["warps"] and 0 < k["occupancy"] <= 1 for k in kernels)
    assert not any(k["problems"] or k["stack"] for k in kernels)
    assert "0 problems" in done.stdout


@needs_triton
def test_the_gate_fails_on_spills(tmp_path):
    """A kernel that keeps far more numbers than there are registers."""
    (tmp_path / "spilling.py").write_text(
        "import triton, triton.language as tl\n"
        "from benchmarks.kernels import gate\n"
        "from benchmarks.kernels.workloads import Input, Workload\n"
        "from tinygrad_llm.kernels.gpu import driver\n"
        "from tinygrad_llm.kernels.gpu.arrays import array\n"
        "@triton.jit\n"
        "def _hoard(x, y, N: tl.constexpr):\n"
        "    i = tl.arange(0, N)\n"
        "    a, b = tl.load(x + i).to(tl.float32), tl.load(y + i).to(tl.float32)\n"
        "    for k in range(9):\n"
        "        a, b = a * b + tl.load(x + k), a + b\n"
        "    tl.store(y + i, (a + b).to(y.dtype.element_ty))\n"
        "def ours(x):\n"
        "    x = array(x, 'x')\n"
        "    return lambda: driver.launch(_hoard, (1,), x, x, N=32768, num_warps=4)\n"
        "workload = Workload('hoard', (Input((32768,)),), ours, None, {})\n"
        "seen = {}\n"
        "gate._compile(workload, 90, driver, seen)\n"
        "def fails(x):\n"
        "    raise ValueError\n"
        "gate._compile(Workload('bad', (Input((4,)),), fails, None, {}), 90, driver, seen)\n"
        "print(*gate.failures(list(seen.values())))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, tmp_path / "spilling.py"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "spills registers" in done.stdout, done.stdout + done.stderr
    assert "does not compile: ValueError:  (in bad)" in done.stdout


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs"),
        (["--compile", "--only", "flux"], "no workload has 'flux' in its name"),
        (["--compile", "--chip", "70"], "'70' is not one of"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
    ],
)
@needs_triton
def test_bad_input_is_one_line(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr and "Traceback" not in done.stderr
    if not arguments:
        assert done.stderr.count("\n") == 1 and "--compile` works without" in done.stderr
