"""The machine in words, and the number of threads. NumPy reads that number from the environment
when it is imported, so limit_threads comes first and nothing here imports NumPy at the top.
"""

import contextlib
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def limit_threads(count: int, torch: bool = False) -> None:
    """The same number of threads for NumPy's BLAS, here and in processes that this one starts, and
    for PyTorch, if it is needed here.
    """
    if "numpy" in sys.modules:
        raise RuntimeError("limit_threads comes too late: NumPy is imported already")
    os.environ.update(dict.fromkeys(_VARIABLES, str(count)) | {"MKL_DYNAMIC": "FALSE"})
    if torch:
        import torch

        torch.set_num_threads(count)


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(threads: int) -> dict:
    """What a figure depends on. Nothing that tells whose machine it is: no names, no paths."""
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('name')} {blas.get('version')}",
        "torch": installed("torch"),
        "threads": threads,
        "load_average": _load(),
    }


def sentence(machine: dict) -> str:
    """The description in one line."""
    load = machine["load_average"]
    torch = f", PyTorch {machine['torch']}" if machine["torch"] else ""
    gpu = "".join(f"{machine[key]}, " for key in ("gpu", "gpu_driver") if machine.get(key))
    busy = f"; load average {load:.1f}" if load is not None else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}, NumPy {machine['numpy']} "
        f"({machine['blas']}){torch}, {machine['threads']} thread(s){busy}"
    )


def warning(machine: dict) -> str | None:
    """What to say if other jobs are running: threads then wait for each other."""
    load, cores = machine["load_average"], machine["cores"]
    if machine["threads"] == 1 or load is None or load < 0.5 * cores:
        return None
    return (
        f"The machine was busy when this began (load average {load:.1f}, {cores} cores). That can "
        "slow threads many times over, on either side: run it again, or with --threads 1, which "
        "counts CPU time."
    )


def slug(machine: dict) -> str:
    """The processor's name for a file name, the GPU's if that is what was measured: "AMD EPYC 9654"
    -> "amd-epyc-9654".
    """
    name = machine.get("gpu") or machine["cpu"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def resident(which: str) -> int | None:
    """Bytes of this process that are in memory: "VmRSS" now, "VmHWM" at most so far. Linux only,
    None elsewhere.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def forget_peak() -> None:
    """VmHWM starts again from VmRSS, where the system lets a process say so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory():
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None


def _load():
    """Jobs that wanted a core, on average over the last minute; None where it is not known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
