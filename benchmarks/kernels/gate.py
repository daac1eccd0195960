"""The compile gate: every workload with every configuration that a search may try, and the variants
that are not raced, compiled for several chips on a machine without a GPU. What is demanded of the
machine code:

- no spills: a stack of 0 bytes, no loads from local memory and no stores to it;
- shared memory within the chip's limit;
- a product of 16-bit numbers runs on tensor cores, and where the workload claims it, on the newest
  of the chip's ways to (HGMMA on Hopper);
- a tensor descriptor is read by the copy engine (UTMALDG) from Hopper on, and there is one where
  the workload claims it.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..report import Table
from .chips import CHIPS
from .variants import variants
from .workloads import catalogue

INSTRUCTIONS = (
    "HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL",
)  # fmt: skip
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:f16|bf16)>")
_ROWS = 64  # of a product: with fewer, Hopper and Blackwell use the older tensor instructions
_ORDER = ("GROUP", "SPLITS", "PROGRAMS", "num_stages")  # the largest of these are tried
_SAMPLE = 2  # candidates of a choice, unless all are asked for
TUNED_FIRST = 90  # the chip whose candidates are compiled unless all chips' are asked for


@dataclass
class Compiled:
    """One kernel in one configuration for one chip.

    kernel          the name of the jitted function
    configuration   its compile-time constants and launch options, as text
    candidate       whether a search would try it (if not, it is what runs by default)
    registers, stack, shared, warps    per thread; bytes per thread; bytes per block; per block
    occupancy       the share of the multiprocessor's warps that fit
    instructions    how many of each of INSTRUCTIONS are in the machine code
    dots            rows of the largest matrix of 16-bit numbers it multiplies, 0 if it does not
    descriptors     whether it loads through tensor descriptors
    workloads       where it was met
    hash            Triton's, of source, configuration and chip
    problems        what is wrong with it
    """

    kernel: str
    chip: int
    configuration: str
    candidate: bool
    registers: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    occupancy: float = 0.0
    instructions: dict = field(default_factory=dict)
    dots: int = 0
    descriptors: bool = False
    hash: str = ""
    workloads: list = field(default_factory=list)
    problems: list = field(default_factory=list)


def judge(found: Compiled, native: bool, tma: bool) -> list[str]:
    """What is wrong with a kernel.

    native  whether the workload claims the chip's newest tensor cores
    tma     whether it claims the copy engine
    """
    chip, has = CHIPS[found.chip], found.instructions
    problems = []
    if found.stack or has.get("LDL") or has.get("STL"):
        problems.append(
            f"spills registers: {found.stack} bytes of stack, {has.get('LDL', 0)} LDL, "
            f"{has.get('STL', 0)} STL"
        )
    if found.shared > chip.block:
        problems.append(f"asks for {found.shared} bytes of shared memory; {chip.block} are there")
    if found.dots and not any(has.get(name) for name in _MATRIX):
        problems.append("multiplies 16-bit matrices without tensor cores")
    elif found.dots >= _ROWS and native and not any(has.get(name) for name in chip.matrix):
        problems.append(f"claims tensor cores, but there is no {' or '.join(chip.matrix)}")
    if found.chip >= 90 and found.descriptors and not has.get("UTMALDG"):
        problems.append("loads through tensor descriptors without UTMALDG")
    if chip.tma and found.dots and tma and not found.descriptors:
        problems.append("claims TMA, but loads through no tensor descriptor")
    return problems


# --- inspecting one kernel ------------------------------------------------------------------------


def inspect(kernel, options, compiled, chip: int, candidate: bool) -> Compiled:
    """What Triton's CompiledKernel is made of."""
    resources, code = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "STACK"))
    shared, warps = compiled.metadata.shared, _warps(compiled)
    counts = Counter(re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", code))
    intermediate = compiled.asm["ttir"]
    return Compiled(
        kernel.__name__,
        chip,
        _text(options),
        candidate,
        registers,
        stack,
        shared,
        warps,
        CHIPS[chip].occupancy(registers, shared, warps),
        dict(counts),
        max(map(int, _DOT.findall(intermediate)), default=0),
        "tt.descriptor_load" in intermediate,
        compiled.hash,
    )


def _disassemble(cubin):
    """(the linker's resource report, the machine code), by the tools in Triton's package."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run(
            [tool, "-res-usage", "-sass", file], capture_output=True, text=True, check=True
        )
    resources, _, code = done.stdout.partition("code for sm_")
    return resources, code


def _warps(compiled):
    """Warps of a block, with those that Triton adds when it specialises warps."""
    found = re.search(r'"ttg\.total-num-warps" = (\d+)', compiled.asm["ttgir"])
    return int(found[1]) if found else compiled.metadata.num_warps


def _text(options, without=("enable_fp_fusion",)):
    """Flags by their names where they are set, everything else with its value."""
    return " ".join(
        name if value is True else f"{name}={getattr(value, '__name__', value)}"
        for name, value in options.items()
        if name not in without and value is not False and value is not None
    )


# --- compiling ------------------------------------------------------------------------------------


def covered(with_variants: bool = True, every: bool = True) -> list:
    """All that the gate compiles: what is raced, and the variants."""
    return catalogue() + (variants(every) if with_variants else [])


def compile_group(names, chip: int, candidates: int | None) -> list[Compiled]:
    """The workloads of these names for a chip: with the default configurations and, if they are
    raced, with so many of the candidates (None: all), each in its turn.
    """
    from tinygrad_llm.kernels.gpu import driver, tuning

    seen = {}  # hash of a compiled kernel -> Compiled
    tried = set()
    for workload in covered():
        if workload.name not in names:
            continue
        with tuning.recording() as choices:
            _compile(workload, chip, driver, seen)
        for name, _, default, others in choices if workload.raced else ():
            for other in sample(default, others, candidates):
                if candidates is not None and (name, _text(other)) in tried:
                    continue  # with another epilogue, say
                tried.add((name, _text(other)))
                with tuning.using(**{name: other}):
                    _compile(workload, chip, driver, seen, candidate=other)
    return list(seen.values())


def sample(default, candidates, count: int | None) -> list:
    """So many of the candidates, from all over the list; None: all of them. Of two that differ in
    the order of tiles or the number of stages only, the one with more stages, which needs more
    shared memory; the default is left out.
    """
    candidates = [candidate for candidate in candidates if candidate != default]
    if count is None:
        return candidates
    found = {_text(default, without=_ORDER): default}
    for candidate in candidates:
        rest = _text(candidate, without=_ORDER)
        other = found.setdefault(rest, candidate)
        if candidate.get("num_stages", 0) > other.get("num_stages", 0):
            found[rest] = candidate
    different = [candidate for candidate in found.values() if candidate != default]
    count = min(count, len(different))
    return [different[i * len(different) // count] for i in range(count)]


def _compile(workload, chip, driver, seen, candidate=None):
    """One workload, with a candidate's configuration if one is given: new kernels are inspected,
    those met before are judged by this workload, too.
    """
    is_candidate, failed = candidate is not None, None
    with driver.compiling(chip) as done, _quiet():
        try:
            workload.ours(*(x.abstract() for x in workload.inputs))()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            failed = f"does not compile: {type(error).__name__}: {reason}"
    if failed:
        text = _text(candidate or {})
        found = Compiled(workload.group, chip, text, is_candidate, problems=[failed])
        found.workloads.append(workload.name)
        seen[workload.name, text, failed] = found
    for kernel, _, options, compiled in done:
        if compiled.hash not in seen:
            seen[compiled.hash] = inspect(kernel, options, compiled, chip, is_candidate)
        problems = judge(seen[compiled.hash], workload.tensor_cores, workload.tma)
        _add(seen[compiled.hash], is_candidate, [workload.name], problems)


def _add(found, candidate, workloads, problems):
    """Another place where it is met."""
    found.candidate = found.candidate and candidate
    found.workloads += [name for name in workloads if name not in found.workloads]
    found.problems += [problem for problem in problems if problem not in found.problems]


@contextlib.contextmanager
def _quiet():
    """Triton's compiler writes pages to standard error, from C++, when it fails."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _leave_interrupts_alone():
    """Ctrl-C is for the process that waits: it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _task(arguments):
    """In a process of its own: what it compiled, and whether it stayed without PyTorch."""
    group, chip, names, candidates = arguments
    compiled = compile_group(names, chip, candidates)
    if "torch" in sys.modules:
        raise RuntimeError("the kernels' process has imported PyTorch")
    return group, chip, compiled


def plan(workloads, chips, every: bool, turns: bool = True) -> list[tuple]:
    """(group, chip, names of its workloads, number of candidates): what is compiled by one process,
    the chip with candidates first. With turns, and unless it is every candidate that is wanted,
    variants take turns: each is compiled for one of the chips.
    """
    groups, tasks = {}, []
    for workload in workloads:
        groups.setdefault(workload.group, []).append(workload)
    for turn, chip in enumerate(sorted(chips, key=lambda chip: chip != TUNED_FIRST)):
        candidates = None if every else _SAMPLE * (chip == TUNED_FIRST)
        for group, members in groups.items():
            if turns and not every and not members[0].raced:
                members = members[turn :: len(chips)]
            if members:
                tasks.append((group, chip, [workload.name for workload in members], candidates))
    return tasks


def compile_all(tasks, processes: int = 2, say=print) -> list[Compiled]:
    """What `plan` says. TRITON_INTERPRET must not be set."""
    found, context = {}, multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(tasks)), _leave_interrupts_alone) as pool:
        for group, chip, compiled in pool.imap_unordered(_task, tasks):
            say(f"sm_{chip} {group}: {len(compiled)} kernels")
            for c in compiled:  # other groups may have met it, too
                key = c.chip, c.hash or (c.workloads[0], c.configuration)
                _add(found.setdefault(key, c), c.candidate, c.workloads, c.problems)
    return sorted(found.values(), key=lambda c: (c.chip, c.kernel, c.candidate, c.configuration))


# --- reporting ------------------------------------------------------------------------------------


def tables(found: list[Compiled]) -> list[Table]:
    """A table for each chip: what runs by default, line by line, and candidates."""
    columns = [
        "kernel", "of", "registers", "shared KiB", "warps", "occupancy", "code", "configuration",
    ]  # fmt: skip
    result = []
    for chip in sorted({c.chip for c in found}):
        rows = [_row(c) for c in found if c.chip == chip]
        result.append(Table(f"sm_{chip} ({CHIPS[chip].name})", columns, rows))
    return result


def _row(c):
    code = " ".join(
        f"{name} {c.instructions[name]}" for name in INSTRUCTIONS if c.instructions.get(name)
    )
    return [
        ("FAILED " if c.problems else "") + ("candidate " if c.candidate else "") + c.kernel,
        "".join(c.workloads[:1]),
        str(c.registers),
        f"{c.shared / 1024:.0f}",
        str(c.warps),
        f"{c.occupancy:.0%}",
        code,
        _short(c.configuration),
    ]


def _short(configuration):
    """Less what is usual, or has a column of its own."""
    usual = ("PRECISION=ieee", "SPLITS=1", "num_warps=")
    return " ".join(part for part in configuration.split() if not part.startswith(usual))


def failures(found: list[Compiled]) -> list[str]:
    """A line for each problem."""
    return [
        f"sm_{c.chip} {c.kernel} [{c.configuration}] {problem} (in {c.workloads[0]})"
        for c in found
        for problem in c.problems
    ]


def data(found: list[Compiled]) -> list[dict]:
    return [asdict(c) for c in found]
