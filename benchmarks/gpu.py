"""What both benchmarks of whole models on a GPU share: the chips' data sheets, what can be measured
here, and taking turns.
"""

import math
from dataclasses import dataclass

from . import machine
from .measure import Ratio, Timing
from .worker import OutOfMemoryError, WorkerError

# By data sheet: bfloat16 operations (not sparse) and bytes of memory, each per second.
CHIPS = {
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA B200": (2250e12, 8.0e12),
}
MEMORY = 2**30


@dataclass(frozen=True)
class Ceilings:
    """What the GPU can do at most, per second; None where nobody knows."""

    flops: float | None
    bandwidth: float | None

    @classmethod
    def of(cls, gpu: str, teraflops: float | None = None, terabytes: float | None = None):
        """Of the GPU of that name, unless it is said."""
        flops, bandwidth = CHIPS.get(gpu, (None, None))
        return cls(
            teraflops * 1e12 if teraflops else flops, terabytes * 1e12 if terabytes else bandwidth
        )


def why_not(device: str) -> str | None:
    """Why this cannot be measured here, in one line; None if it can."""
    if not machine.installed("torch"):
        return "this needs PyTorch to compare with: pip install -e '.[test]'"
    from tinygrad_llm import device as devices

    try:
        devices.device(device)
    except ValueError as error:
        return str(error)
    if device == "interpret":
        return None
    import torch

    return None if torch.cuda.is_available() else "PyTorch finds no GPU: install it with CUDA"


def versions() -> dict:
    """What the figures depend on besides the GPU."""
    names = ("torch", "triton", "cupy-cuda13x", "transformers")
    return {name: machine.installed(name) or "none" for name in names}


def about(device) -> dict:
    """The GPU and its driver, for a machine's description; `device` is ours."""
    if device.name == "interpret":
        return {"gpu": "interpreter, no GPU"}
    from tinygrad_llm.kernels.gpu import driver

    api = device.xp.cuda.runtime.driverGetVersion()  # 13000: CUDA 13.0
    return {
        "gpu": driver.device_name(),
        "gpu_memory_gib": round(device.memory()["total"] / MEMORY),
        "gpu_driver": f"CUDA {api // 1000}.{api % 1000 // 10}",
    }


def give_back(device) -> None:
    """Our free memory, back to the GPU."""
    if device.name.startswith("cuda"):
        device.xp.get_default_memory_pool().free_all_blocks()


def take_turns(calls: dict, rounds: int) -> tuple[dict, dict, dict]:
    """Turns of A, B, C, A, B, C, ...: (name -> Timing, name -> what the last turn gave, name -> why
    there is none).

    calls   name -> a function that warms up, measures, and returns {"seconds": durations, ...}
    """
    turns, last, problems = {name: [] for name in calls}, {}, {}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in problems:
                continue
            try:
                last[name] = call()
                turns[name].append(last[name]["seconds"])
            except OutOfMemoryError:
                problems[name] = "out of memory"
            except WorkerError as error:
                problems[name] = str(error)
    done = {name: Timing.of(those) for name, those in turns.items() if name not in problems}
    return done, {name: last[name] for name in done}, problems


def ratios(times: dict[str, Timing]) -> dict[str, Ratio]:
    """Of each of the others to ours, if ours is there."""
    if "ours" not in times:
        return {}
    return {name: Ratio.of(t, times["ours"]) for name, t in times.items() if name != "ours"}


def blocks(run, synchronize, seconds: float, clock) -> list[float]:
    """Durations of run() and waiting for the device, until `seconds` have passed: at least one."""
    durations, end = [], clock() + seconds
    synchronize()
    while not durations or clock() < end:
        start = clock()
        run()
        synchronize()
        durations.append(clock() - start)
    return durations


def largest_difference(losses, others) -> float:
    """Relative, of two lists; infinite for NaN."""
    if len(losses) != len(others):
        raise ValueError(f"{len(losses)} losses and {len(others)}")
    found = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def gib(count: float) -> str:
    return f"{count / MEMORY:.2f} GiB"
