"""The race on a GPU: each workload's numbers first, then its time, against PyTorch's ways to do the
same on the same tensors.

Before a call is timed, the L2 cache is overwritten and the GPU is kept waiting until the whole call
is queued, so that CUDA's events see the device's time alone; what launching costs the host is
measured apart.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import machine
from ..measure import Method, Ratio, interleaved
from ..report import Table, duration
from .workloads import Workload

EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LIMIT = 4.0  # units by which an output may be off, if PyTorch's own is no worse
UNLIKE = 0.05  # a peer whose relative error is beyond this computes something else
TESTS = Path(__file__).parents[2] / "tests"


# --- time -----------------------------------------------------------------------------------------


class Gpu:
    """The device through PyTorch. The tests have another, which is none."""

    device = "cuda"
    _CYCLES = 1.5e9  # a second of the GPU's clock, about

    def __init__(self, torch):
        self.torch = torch
        properties = torch.cuda.get_device_properties(0)
        self.name, self.memory = properties.name, properties.total_memory
        torch._functorch.config.donated_buffer = False  # a graph may be walked back several times
        self._flushes = torch.empty(256 << 20, dtype=torch.int8, device=self.device)

    def seconds(self, call, hold):
        """The device's time for a call with a cold L2 cache, all of it queued within `hold`."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushes.zero_()
        self.torch.cuda._sleep(int(hold * self._CYCLES))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def synchronize(self):
        self.torch.cuda.synchronize()

    def tidy(self):
        """Gives memory back and forgets what torch.compile has seen."""
        self.torch._dynamo.reset()
        self.torch.cuda.empty_cache()


def host_seconds(call, gpu, clock=time.perf_counter) -> float:
    """What it takes the host to launch a call: the median of five on an idle GPU."""
    durations = []
    for _ in range(5):
        gpu.synchronize()
        start = clock()
        call()
        durations.append(clock() - start)
    gpu.synchronize()
    return statistics.median(durations)


@dataclass(frozen=True)
class OnDevice(Method):
    """Turns by the device's own clock: calls for the method's seconds, 3 to 30 of them."""

    gpu: object = None

    def turn(self, call):
        hold = 2 * host_seconds(call, self.gpu, self.clock) + 50e-6
        durations = []
        while len(durations) < 3 or (sum(durations) < self.seconds and len(durations) < 30):
            durations.append(self.gpu.seconds(call, hold))
        return durations


def measure_roofline(gpu, method) -> dict:
    """The two ceilings: bytes per second of a large copy (read and written), operations per second
    of PyTorch's matrix product of 8192 x 8192 bfloat16.
    """
    torch, n = gpu.torch, 8192
    size = min(4 << 30, gpu.memory // 8) // 2
    drawn = [torch.randn(n, n, device=gpu.device).to(torch.bfloat16) for _ in range(2)]
    source = torch.ones(size, dtype=torch.bfloat16, device=gpu.device)
    target = torch.empty_like(source)
    times = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: drawn[0] @ drawn[1]}, method
    )
    return {
        "bandwidth": 2 * 2 * size / times["copy"].median,
        "flops": 2 * n**3 / times["matmul"].median,
    }


# --- numbers --------------------------------------------------------------------------------------


def errors(torch, outputs, expected, dtype: str) -> tuple[float, float]:
    """(worst, relative), infinite for NaN: the largest error of an element, in units, which are the
    dtype's rounding of a number of its size and of its row's typical size; and the largest
    ‖output - expected‖ / ‖expected‖.
    """
    worst = relative = 0.0
    for y, t in zip(outputs, expected, strict=True):
        if y.shape != t.shape:
            raise ValueError(f"an output has shape {tuple(y.shape)}, expected {tuple(t.shape)}")
        off = (y.to(t.dtype) - t).abs_()
        off = torch.nan_to_num_(off, nan=float("inf"), posinf=float("inf"))
        squares = t.square()  # a row's own size, or all rows': the first query's gradient is 0
        typical = squares.mean(-1, keepdim=True).maximum(squares.mean()).sqrt()
        unit = (t.abs() + typical).mul_(EPS[dtype]).add_(torch.finfo(torch.float32).tiny)
        worst = max(worst, (off / unit).max().item())
        relative = max(relative, (off.norm() / t.norm().clamp(min=1e-30)).item())
    return worst, relative


def compare(workload: Workload, torch, outputs, tensors) -> tuple[float, float]:
    """The outputs of one alternative against the truth, in float32 for 16-bit numbers and in
    float64 for float32.
    """
    wide = torch.float64 if workload.dtype == "float32" else torch.float32
    part = workload.part
    inputs = [part(x).to(wide) if x.is_floating_point() else part(x) for x in tensors]
    outputs = [part(y) for y in outputs]
    with _exact(torch):
        expected = workload.truth(torch, outputs, *inputs)
    return errors(torch, outputs, expected, workload.dtype)


class _exact:  # noqa: N801
    """float32 products of PyTorch in float32, not in tf32."""

    def __init__(self, torch):
        self.torch = torch

    def __enter__(self):
        self.before = self.torch.get_float32_matmul_precision()
        self.torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_):
        self.torch.set_float32_matmul_precision(self.before)


# --- one workload ---------------------------------------------------------------------------------


def run_one(workload: Workload, gpu, method, roofline: dict, without=()) -> dict:
    """Everything about a workload: see `summary`. Raises ValueError if ours is wrong."""
    calls, moved, error, skipped = prepare(workload, gpu, without)
    hosts = {name: host_seconds(call, gpu) for name, call in calls.items()}
    times = interleaved(calls, method)
    return summary(workload, moved, roofline, error, times, hosts, skipped)


def prepare(workload: Workload, gpu, without=()) -> tuple:
    """(the calls to be timed, bytes that have to be moved, errors, reasons why a peer is missing).
    ValueError if ours is off by more than LIMIT units and more than twice as much as any peer.

    without   peers to leave out
    """
    torch = gpu.torch
    generator = torch.Generator(device=gpu.device).manual_seed(0)
    tensors = [x.tensor(torch, gpu.device, generator) for x in workload.inputs]
    ours = workload.ours(*tensors)
    outputs = ours()
    written = sum(y.numel() * y.element_size() for y in outputs)
    moved = workload.bytes or sum(x.bytes for x in workload.inputs) + written
    worst, relative = compare(workload, torch, outputs, tensors)
    peers, off, skipped = prepare_peers(workload, gpu, tensors, without)
    allowed = max(LIMIT, 2 * min(off.values(), default=0.0))
    if not worst <= allowed:
        raise ValueError(f"wrong numbers: off by {worst:.3g} units, {allowed:.3g} are allowed")
    error = {"worst": worst, "relative": relative, "peers": off}
    return {"ours": ours} | peers, moved, error, skipped


def prepare_peers(workload, gpu, tensors, without=()):
    """(calls by name, their errors in units, reasons of those that cannot take part)."""
    calls, off, skipped = {}, {}, {}
    for name, prepare in workload.peers.items():
        if name in without:
            skipped[name] = "left out"
            continue
        try:
            call = prepare(gpu.torch, *tensors)
            units, relative = compare(workload, gpu.torch, call(), tensors)
            gpu.synchronize()
        except Exception as error:
            skipped[name] = _line(error)
            continue
        if not relative <= UNLIKE:
            skipped[name] = f"computes something else: relative error {relative:.3g}"
            continue
        calls[name], off[name] = call, units
    return calls, off, skipped


def summary(workload, moved, roofline, error, times, hosts, skipped) -> dict:
    """What is kept of a race; seconds, bytes and operations."""
    ours = times["ours"]
    peers = {name: t for name, t in times.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name].median, default=None)
    floor = max(workload.flops / roofline["flops"], moved / roofline["bandwidth"])
    return {
        "name": workload.name,
        "group": workload.group,
        "dtype": workload.dtype,
        "flops": workload.flops,
        "bytes": moved,
        "error": error,
        "ours": ours.to_dict() | {"host": hosts["ours"]},
        "peers": {
            name: t.to_dict() | {"host": hosts[name], "ratio": Ratio.of(t, ours).to_dict()}
            for name, t in peers.items()
        },
        "skipped": skipped,
        "best": best,
        "ratio": Ratio.of(peers[best], ours).rounds.median if best else None,
        "target": workload.target,
        "roofline": floor / ours.median,
        "problem": None,
    }


# --- all of them ----------------------------------------------------------------------------------


def run_all(workloads, gpu, method, roofline, deadline=float("inf"), say=print, without=()):
    """A dict for each workload. One that fails has a "problem" and not much else; what does not
    begin before the deadline, on time.monotonic's clock, counts as failed, too.
    """
    results, lost = [], None
    for workload in workloads:
        if lost or time.monotonic() > deadline:
            results.append(_failed(workload, lost or "not run: out of time"))
            continue
        say(workload.name)
        try:
            results.append(run_one(workload, gpu, method, roofline, without))
        except Exception as error:
            results.append(_failed(workload, _line(error)))
            lost = _lost(gpu)
        gpu.tidy()
    return results


def _failed(workload, problem):
    return {"name": workload.name, "group": workload.group, "problem": problem}


def _lost(gpu):
    """A reason to stop: after a bad memory access a process can use the GPU no more."""
    try:
        gpu.synchronize()
    except Exception as error:
        return f"not run: the GPU's context is lost ({_line(error)})"


def _line(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def tune(workloads, gpu, say: Callable[[str], None], afresh: bool, ship: bool):
    """Searches the configurations of all workloads, those that are known, too, if it is to begin
    afresh. They go to the user's table and, if asked for, to the one shipped with the kernels.
    """
    from tinygrad_llm.kernels.gpu import tuning

    if afresh:
        tuning.start_afresh()
    for workload in workloads:
        say(f"searching for {workload.name}")
        generator = gpu.torch.Generator(device=gpu.device).manual_seed(0)
        tensors = [x.tensor(gpu.torch, gpu.device, generator) for x in workload.inputs]
        with tuning.searching():
            workload.ours(*tensors)()
        gpu.tidy()
    if ship:
        tuning.SHIPPED.mkdir(exist_ok=True)
        shutil.copy(tuning.path(), tuning.SHIPPED / tuning.path().name)


def versions() -> dict:
    """What the race depends on besides the GPU."""
    return {name: machine.installed(name) for name in ("torch", "triton", "cupy-cuda13x")}


def run_tests(files=None, seconds=240) -> dict:
    """The GPU's tests, each file in a process of its own and all at once, less the mutants: whether
    a test finds planted mistakes does not depend on the device. {file: the last line of pytest}.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not mutant", "-o", "addopts="]
    options = {"env": environment, "text": True, "cwd": TESTS.parent}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = {
        file: subprocess.Popen([*command, str(file)], **options)
        for file in (files or sorted(TESTS.glob("test_gpu_*.py")))
    }
    deadline, found = time.monotonic() + seconds, {}
    for file, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            output = f"killed after {seconds} s"
        lines = output.strip().splitlines() or ["no output"]
        found[Path(file).stem] = {"passed": process.returncode == 0, "said": lines[-1].strip("= ")}
    return found


# --- reporting ------------------------------------------------------------------------------------

COLUMNS = ["workload", "ours", "speed", "of roofline", "host", "PyTorch's best", "ratio", "units"]


def table(results) -> Table:
    """A line for each workload."""
    return Table("Kernels", COLUMNS, [_row(result) for result in results])


def _row(result):
    if result["problem"]:
        return [result["name"], "FAILED", result["problem"][:60], *[""] * (len(COLUMNS) - 3)]
    ours = result["ours"]["seconds"]["median"]
    best = result["best"]
    theirs = result["peers"][best]["seconds"]["median"] if best else None
    missed = best and result["ratio"] < result["target"]
    return [
        result["name"],
        duration(ours),
        speed(result, ours),
        f"{result['roofline']:.0%}",
        duration(result["ours"]["host"]),
        f"{best} {duration(theirs)}" if best else "none",
        f"{result['ratio']:.2f}{' < ' + format(result['target'], 'g') if missed else ''}"
        if best
        else "",
        f"{result['error']['worst']:.2g}",
    ]


def speed(result, seconds: float) -> str:
    """What limits it, per second."""
    if result["flops"]:
        return f"{result['flops'] / seconds / 1e12:.0f} TFLOP/s"
    return f"{result['bytes'] / seconds / 1e12:.2f} TB/s"


def notes(results, roofline: dict, seconds: float) -> list[str]:
    failed = [result["name"] for result in results if result["problem"]]
    raced = [r for r in results if not r["problem"] and r["best"]]
    reached = sum(r["ratio"] >= r["target"] for r in raced)
    lines = [
        f"Measured roofline: {roofline['bandwidth'] / 1e12:.2f} TB/s copying, "
        f"{roofline['flops'] / 1e12:.0f} TFLOP/s in PyTorch's bfloat16 matmul of 8192³.",
        "ratio: the best PyTorch's time / ours, device time, above 1 ours is faster; "
        "`<` and the target where it is missed. host: what launching it takes. units: the largest "
        "error, in roundings of the dtype.",
        f"{reached} of {len(raced)} reach their target. The whole took {seconds:.0f} s.",
    ]
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}.")
    reasons = {f"{name} ({reason})" for r in raced for name, reason in r["skipped"].items()}
    if reasons:
        lines.append("Not raced somewhere: " + "; ".join(sorted(reasons)) + ".")
    return lines
