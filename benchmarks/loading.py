"""A model from its files: how long that takes beside reading the same bytes, and how much memory.

Each turn is a process of its own, as a model is loaded once in a process: all memory comes fresh
from the system, for either side. What they import is imported before the clock starts.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tinygrad_llm.gpt import GPT, GPTConfig

from .measure import Ratio, Timing
from .report import Table, duration

TARGET, MEMORY = 1.5, 1.3  # times the reading of the bytes; times the float32 weights

TURN = """
import sys, time
from pathlib import Path
import numpy as np
import tinygrad_llm.checkpoint
from tinygrad_llm.gpt import GPT

def memory(of):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(of))

folder, out, clock = sys.argv[1], sys.argv[2], getattr(time, sys.argv[3])
before, start = memory("VmRSS"), clock()
ACTION
print(clock() - start, memory("VmHWM") - before)
"""
READ = 'x = [path.read_bytes() for path in Path(folder).glob("*.safetensors")]'
LOAD = "x = GPT.from_pretrained(folder)"
SAVE = """x = GPT.from_pretrained(folder)
start = clock()
x.save_pretrained(out)"""
ACTIONS = {"read": READ, "load": LOAD, "save": SAVE}


def measure_size(size: str, rounds: int, threads: int) -> tuple[dict, Table, str]:
    """Times and peak memory of each action in turns, with float32 and with bfloat16 in the file."""
    clock = "process_time" if threads == 1 else "perf_counter"
    cfg = GPTConfig.from_name(size)
    weights = 4 * cfg.num_parameters()
    data, columns = {}, ["file", "reading its bytes", "from_pretrained", "ratio", "memory"]
    table = Table(f"{size}, {weights / 1e6:.0f} MB in float32", [*columns, "save_pretrained"])
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(cfg)
        for dtype in ("float32", "bfloat16"):
            model.save_pretrained(Path(folder) / dtype, dtype=dtype)
        del model
        for dtype in ("float32", "bfloat16"):
            found = _turns(Path(folder) / dtype, Path(folder) / "out", clock, rounds)
            times = {name: Timing(tuple(t for t, _ in f), min(f)[0]) for name, f in found.items()}
            peak = {name: max(m for _, m in f) / weights for name, f in found.items()}
            ratio = Ratio.of(times["load"], times["read"])
            data[dtype] = {name: timing.to_dict() for name, timing in times.items()}
            data[dtype] |= {"ratio": ratio.to_dict(), "peak memory over weights": peak}
            seconds = [duration(times[name].median) for name in ("read", "load", "save")]
            cells = [*seconds[:2], str(ratio), f"{peak['load']:.2f}", seconds[2]]
            table.rows.append([dtype, *cells])
    return data, table, _note(data)


def _turns(folder, out, clock, rounds):
    """(seconds, bytes of peak memory) of each action, round by round; the first does not count."""
    found = {name: [] for name in ACTIONS}
    for _ in range(rounds + 1):
        for name, action in ACTIONS.items():
            command = [sys.executable, "-c", TURN.replace("ACTION", action), folder, out, clock]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, memory = done.stdout.split()
            found[name].append((float(seconds), int(memory)))
    return {name: those[1:] for name, those in found.items()}


def _note(data):
    ratio, half = (data[dtype]["ratio"]["median"] for dtype in ("float32", "bfloat16"))
    peak = data["float32"]["peak memory over weights"]
    return (
        f"ratio: from_pretrained over reading the same file's bytes into memory, here {ratio:.2f} "
        f"for float32, where the target is {TARGET}; {half:.2f} for bfloat16, whose file has half "
        "the bytes of what is made of it. memory: what the process has more at its peak, over "
        f"the weights in float32: {peak['load']:.2f}, and {peak['save']:.2f} when it also saves; "
        f"the target is {MEMORY}."
    )
