"""Whole training steps, ours and PyTorch's, of the same model from the same weights: first that
they compute the same, then how long they take, in what memory, and where ours spends the time.
"""

import contextlib
import inspect
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinygrad_llm import backend, cli
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW
from tinygrad_llm.parallel import Shards
from tinygrad_llm.random import Generator
from tinygrad_llm.step import make_step

from . import floor
from .contestant import MAX_NORM, OPTIONS, PHASES, Contestant, torchs
from .measure import Method, Ratio, Spread, Timing, taking_turns
from .profiler import Profile
from .report import Table, duration
from .worker import Worker, WorkerError

TOLERANCE = 1e-4  # for the losses of ours and PyTorch's, relative
LONGEST_TURN = 1.0  # seconds, so that a busy machine does not make it endless
PARTS = ("forward", "backward", *PHASES)  # of an op, and of what is no op
NAMES = {"ours": "ours", "torch": "PyTorch eager", "compiled": "torch.compile"}


@dataclass(frozen=True)
class Setting:
    """A model and what it sees in a step: `batch` rows of `length` tokens."""

    cfg: GPTConfig
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self):
        c = self.cfg
        return (
            f"vocabulary {c.vocab_size}, context {self.length}, {c.emb_dim} wide, "
            f"{c.n_heads} heads, {c.n_layers} layers, batch {self.batch}"
        )


def _setting(vocab, context, dim, heads, layers, batch):
    names = {"vocab_size": vocab, "context_length": context, "emb_dim": dim}
    names |= {"n_heads": heads, "n_layers": layers, "drop_rate": 0.0}
    return Setting(GPTConfig(**names), batch, context)


def _default_job():
    """What `tinygrad-llm train` trains if it is not told otherwise."""
    options = {name: p.default for name, p in inspect.signature(cli.train).parameters.items()}
    names = ("vocab_size", "context", "dim", "heads", "layers", "batch_size")
    return _setting(*(options[name] for name in names))


def _gpt2(batch):
    """GPT-2 124M on GPT2_TOKENS tokens, in so many rows."""
    return Setting(GPTConfig.from_name("gpt2", drop_rate=0.0), batch, GPT2_TOKENS // batch)


SETTINGS = {
    "tiny": lambda: _setting(65, 8, 16, 2, 2, batch=4),  # to see that everything runs
    "nanogpt-cpu": lambda: _setting(65, 64, 128, 4, 4, batch=12),
    "default-job": _default_job,
}


class Amount(NamedTuple):
    """How much is measured: rounds; steps in a turn, about; steps whose losses must agree first."""

    rounds: int = 9
    steps: int = 10
    check: int = 10


GPT2_TOKENS, GPT2_ROWS = 1024, (4, 1)  # of a step; rows that share them
GPT2_AMOUNT = Amount(rounds=5, steps=1, check=2)  # a step takes seconds


def settings(models: list[str], rows: list[int] | None) -> dict[str, tuple[Setting, Amount]]:
    """By name; of gpt2 one for each number of rows. ValueError for one that leaves a rest."""
    found = {}
    for model in models:
        if model != "gpt2":
            found[model] = SETTINGS[model](), Amount()
            continue
        for batch in rows or GPT2_ROWS:
            if GPT2_TOKENS % batch:
                raise ValueError(
                    f"--batch divides {GPT2_TOKENS} tokens among rows of one length: choose a "
                    f"power of 2, not {batch}"
                )
            found[f"gpt2, {batch} x {GPT2_TOKENS // batch}"] = _gpt2(batch), GPT2_AMOUNT
    return found


# --- who is measured ------------------------------------------------------------------------------


class Training(Contestant):
    """Ours: the Trainer's step."""

    def __init__(self, setting: Setting, threads: int, method: Method):
        super().__init__(method)
        self.batch, shards = _batch(setting), Shards(threads)
        self.model = GPT(setting.cfg, Generator(0))
        optimizer = AdamW(self.model.parameters(), **OPTIONS)
        settings = {"accumulate": 1, "max_norm": MAX_NORM, "generator": Generator(0)}
        self.made = make_step(self.model, optimizer, **settings, shards=shards)
        shards.backward = self._timed(shards.backward, "gradients")
        optimizer.step = self._timed(optimizer.step, "optimizer")

    def save(self, path: str) -> None:
        """The weights, for the others."""
        from safetensors.numpy import save_file

        save_file(self.model.state_dict(), path)

    def step(self) -> float:
        start = self.method.clock()
        self.made.start(self.batch, OPTIONS["lr"])
        loss, _ = self.made.finish()
        taken = self.method.clock() - start
        self.times["clip"].append(
            taken - sum(self.times[p][-1] for p in ("gradients", "optimizer"))
        )
        return loss

    def profile(self, steps: int) -> list[dict]:
        """The step's time by op, then what is no op: medians over the steps, longest first. Of an
        op it is the mean of what it takes in each thread, while others run beside it.
        """
        profile, cells, calls = Profile(self.method.clock), defaultdict(list), {}
        with backend.using(profile.reading()):
            for _ in range(steps):
                profile.clear()
                self.step()
                calls = profile.calls
                for cell, seconds in self._last_step(profile.seconds).items():
                    cells[cell].append(seconds)
        median = {cell: Spread.of(seconds).median for cell, seconds in cells.items()}
        total = sum(median.values())
        rows = []
        for name in dict.fromkeys(name for name, _ in median):
            parts = {part: median[name, part] for part in PARTS if (name, part) in median}
            row = {"name": name, "calls": round(calls.get((name, "forward"), 1)), **parts}
            rows.append({**row, "share": sum(parts.values()) / total})
        return sorted(rows, key=lambda row: -row["share"])

    def _last_step(self, in_ops):
        """(name, part) -> seconds."""
        phases = {phase: self.times[phase][-1] for phase in PHASES}
        rest = phases.pop("gradients") - sum(in_ops.values())
        cells = {(phase, phase): seconds for phase, seconds in phases.items()}
        return {**in_ops, **cells, ("tape, modules, waiting", "gradients"): rest}

    def _timed(self, function, phase):
        def run(*args, **keywords):
            with self.phase(phase):
                return function(*args, **keywords)

        return run


def _batch(setting):
    shape = 2, setting.batch, setting.length
    return tuple(np.random.default_rng(0).integers(0, setting.cfg.vocab_size, shape))


@contextlib.contextmanager
def field(setting: Setting, threads: int, method: Method, compiled: bool):
    """Yields the workers by name, each in its process; they are ended afterwards."""
    cfg, batch = setting.cfg.to_dict(), _batch(setting)
    workers = {"ours": Worker(Training, setting, threads, method)}
    for name in ("torch", "compiled")[: 1 + compiled]:
        workers[name] = Worker(torchs, cfg, batch, name == "compiled", threads, method)
    workers["machine"] = Worker(floor.Ceilings, threads, method)
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def first_losses(workers: dict[str, Worker], steps: int) -> tuple[dict, str | None]:
    """The losses of each, from our first weights on, and why there are none of torch.compile: it is
    left out where it cannot work. Raises WorkerError if one of the others fails.
    """
    losses, why = {}, None
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.safetensors")
        workers["ours"].call("save", path)
        for name in [name for name in NAMES if name in workers]:
            try:
                if name != "ours":
                    workers[name].call("load", path)
                losses[name] = workers[name].call("losses", steps)
            except WorkerError as error:
                if name != "compiled":
                    raise
                workers.pop(name).close()
                why = str(error)
    return losses, why


def compare_losses(losses: dict[str, list[float]]) -> dict:
    """How the losses of each differ from PyTorch eager's; ValueError if by more than TOLERANCE."""
    theirs, found = losses["torch"], {**losses}
    found["absolute"] = max(abs(a - b) for mine in losses.values() for a, b in zip(mine, theirs))
    found["relative"] = 0.0
    for name, mine in losses.items():
        relative = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs))
        if not relative <= TOLERANCE:
            raise ValueError(
                f"the losses of {NAMES[name]} differ from PyTorch eager's by {relative:.1e} "
                f"(relative): {mine} and {theirs}"
            )
        found["relative"] = max(found["relative"], relative)
    return found


# --- measuring ------------------------------------------------------------------------------------


def measure_setting(
    name: str, setting: Setting, amount: Amount, threads: int, compiled: bool
) -> tuple[dict, list[Table], list[str]]:
    """One setting: numbers, tables, and sentences. Raises ValueError if the losses differ,
    WorkerError if somebody's process cannot do it.
    """
    method = Method.for_threads(threads, amount.rounds)
    with field(setting, threads, method, compiled) as workers:
        losses, why = first_losses(workers, amount.check)
        losses = compare_losses(losses)
        racers = {key: workers[key] for key in NAMES if key in workers}
        step = workers["ours"].call("step_seconds")
        seconds = min(amount.steps * step, LONGEST_TURN)
        method = replace(method, seconds=seconds, warm=step < LONGEST_TURN)
        for worker in racers.values():
            worker.call("begin", method)
        turns = {key: partial(worker.call, "turn") for key, worker in racers.items()}
        turns |= {w: partial(workers["machine"].call, "turn", w) for w in ("multiply", "copy")}
        times = taking_turns(turns, method)
        each = workers["machine"].call("work")
        speed = {what: much / times.pop(what).best for what, much in each.items()}
        found = {key: worker.call("phases") for key, worker in racers.items()}
        peaks = {key: worker.call("peak") for key, worker in racers.items()}
        ops = workers["ours"].call("profile", max(2, amount.steps))
    in_ops = {row["name"]: sum(row[part] for part in PARTS if part in row) for row in ops}
    counted = floor.work(setting.cfg, setting.batch, setting.length)
    ratios = {k: Ratio.of(timing, times["ours"]) for k, timing in times.items() if k != "ours"}
    data = {
        "model": str(setting),
        "parameters": setting.cfg.num_parameters(),
        "amount": amount._asdict(),
        "losses": losses,
        **{which: _with_tokens(timing, setting.tokens) for which, timing in times.items()},
        "ratios": {key: ratio.to_dict() for key, ratio in ratios.items()},
        "peak_bytes": peaks,
        "phases": {phase: {k: of[phase] for k, of in found.items()} for phase in PHASES},
        "ops": ops,
        "machine": speed,
        "floor": floor.phases(in_ops, counted, speed),
        "without": why,
    }
    tables = [
        _speed_table(name, setting, times, ratios, peaks),
        _phase_table(name, data["phases"]),
        _floor_table(name, data),
        _op_table(name, ops),
    ]
    return data, tables, _notes(name, data, amount)


def _with_tokens(timing: Timing, tokens: int) -> dict:
    return {**timing.to_dict(), "tokens_per_second": tokens / timing.median}


def _notes(name, data, amount):
    losses, speed = data["losses"], data["machine"]
    notes = [
        f"{name}: {amount.check} losses agree with PyTorch's to {losses['absolute']:.1e} absolute, "
        f"{losses['relative']:.1e} relative (from {losses['ours'][0]:.4f} to "
        f"{losses['ours'][-1]:.4f}); at most {TOLERANCE:g} is allowed. The floor: a product at "
        f"{speed['multiply'] / 1e9:.0f} GFLOP/s, a copy at {speed['copy'] / 1e9:.1f} GB/s."
    ]
    if data["without"]:
        notes.append(f"{name}: without torch.compile, which cannot work here: {data['without']}")
    return notes


# --- tables ---------------------------------------------------------------------------------------


def _speed_table(name, setting, times, ratios, peaks):
    columns = ["a training step", "median", "quartiles", "best", "tokens/s", "peak memory"]
    table = Table(f"{name}: {setting}", columns)
    for which, timing in times.items():
        s = timing.spread
        quartiles = f"{duration(s.low)} - {duration(s.high)}"
        cells = [quartiles, duration(timing.best), f"{setting.tokens / s.median:,.0f}"]
        memory = "?" if peaks[which] is None else f"{peaks[which] / 2**20:,.0f} MiB"
        table.rows.append([NAMES[which], duration(s.median), *cells, memory])
    for which, ratio in ratios.items():
        s = ratio.rounds
        cells = [f"{s.median:.2f}", f"{s.low:.2f} - {s.high:.2f}", f"{ratio.best:.2f}", ""]
        memory = f"{peaks[which] / peaks['ours']:.2f}" if peaks["ours"] else "?"
        table.rows.append([f"ratio: {NAMES[which]} / ours", *cells, memory])
    return table


def _phase_table(name, phases):
    peers = [key for key in NAMES if key in phases["clip"] and key != "ours"]
    columns = ["phase", "ours"]
    columns += [c for key in peers for c in (NAMES[key], "ratio")]
    table = Table(f"{name}: by phase, medians", columns)
    for phase, found in phases.items():
        cells = [c for k in peers for c in (duration(found[k]), f"{found[k] / found['ours']:.2f}")]
        table.rows.append([phase, duration(found["ours"]), *cells])
    return table


def _floor_table(name, data):
    columns = ["ours against the floor", "floor", "ours", "floor / ours", "share of the step"]
    table = Table(f"{name}: what the machine allows, and what the step takes", columns)
    step = data["ours"]["seconds"]["median"]
    total = sum(row["ours"] for row in data["floor"])
    for row in data["floor"]:
        cells = [duration(row["floor"]), duration(row["ours"])]
        of = f"{row['floor'] / row['ours']:.0%}" if row["ours"] else ""
        table.rows.append([row["name"], *cells, of, f"{row['ours'] / total:.1%}"])
    least = sum(row["floor"] for row in data["floor"])
    table.rows.append(["a step", duration(least), duration(step), f"{least / step:.0%}", ""])
    return table


def _op_table(name, split):
    columns = ["ours, by op", "calls", "forward", "backward", "together", "share"]
    table = Table(f"{name}: by op, medians of a step under the profiler", columns)
    for row in split:
        parts = [row[part] for part in PARTS if part in row]
        directions = [duration(row[p]) if p in row else "" for p in ("forward", "backward")]
        cells = [str(row["calls"]), *directions, duration(sum(parts)), f"{row['share']:.1%}"]
        table.rows.append([row["name"], *cells])
    return table
