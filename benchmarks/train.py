"""Whole training steps, ours and PyTorch's, of the same model from the same weights: first that
they compute the same, then how long they take and where ours spends the time.
"""

import inspect
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from tinygrad_llm import backend, cli
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW, clip_grad_norm_
from tinygrad_llm.parallel import Shards
from tinygrad_llm.random import Generator

from .measure import Method, Ratio, Spread, Timing, interleaved
from .profiler import Profile
from .report import Table, duration
from .torch_gpt import same_model

TOLERANCE = 1e-4  # for ten losses of ours and PyTorch's, relative
LONGEST_TURN = 1.0  # seconds, so that a busy machine does not make it endless
PHASES = ("gradients", "clip", "optimizer")
PARTS = ("forward", "backward", *PHASES)  # of an op, and of what is no op
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


@dataclass(frozen=True)
class Setting:
    """A model and how much it sees in a step."""

    cfg: GPTConfig
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.cfg.context_length

    def __str__(self):
        c = self.cfg
        return (
            f"vocabulary {c.vocab_size}, context {c.context_length}, {c.emb_dim} wide, "
            f"{c.n_heads} heads, {c.n_layers} layers, batch {self.batch}"
        )


def _setting(vocab, context, dim, heads, layers, batch):
    names = {"vocab_size": vocab, "context_length": context, "emb_dim": dim}
    names |= {"n_heads": heads, "n_layers": layers, "drop_rate": 0.0}
    return Setting(GPTConfig(**names), batch)


def _default_job():
    """What `tinygrad-llm train` trains if it is not told otherwise."""
    options = {name: p.default for name, p in inspect.signature(cli.train).parameters.items()}
    names = ("vocab_size", "context", "dim", "heads", "layers", "batch_size")
    return _setting(*(options[name] for name in names))


SETTINGS = {
    "tiny": lambda: _setting(65, 8, 16, 2, 2, batch=4),  # to see that everything runs
    "nanogpt-cpu": lambda: _setting(65, 64, 128, 4, 4, batch=12),
    "default-job": _default_job,
}


# --- the two trainings ----------------------------------------------------------------------------


class Training:
    """A model and the `update` of its optimizer; `step()` is what is timed. `times` has the seconds
    of each phase.

    `gradients()` runs forward and backward on the same batch every time, which is enough: what a
    step costs does not depend on what it reads.
    """

    def __init__(self, model, update, clip, gradients, clock):
        self.model, self.update, self.clip, self.clock = model, update, clip, clock
        self.parameters = list(model.parameters())
        self.gradients = gradients
        self.times = defaultdict(list)

    def step(self) -> float:
        """Forward and backward, clipping, AdamW; returns the loss before it."""
        times = [self.clock()]
        loss = self.gradients()
        times.append(self.clock())
        self.clip(self.parameters, 1.0)
        times.append(self.clock())
        self.update()
        times.append(self.clock())
        for phase, start, end in zip(PHASES, times, times[1:]):
            self.times[phase].append(end - start)
        return loss


def trainings(setting: Setting, threads: int, clock) -> tuple[Training, Training]:
    """Ours and PyTorch's, ready to start from the same weights on the same tokens."""
    rng = np.random.default_rng(0)
    shape = (setting.batch, setting.cfg.context_length)
    ids, targets = rng.integers(0, setting.cfg.vocab_size, (2, *shape))
    model = GPT(setting.cfg, generator=Generator(0))
    peer = same_model(model)
    optimizer = torch.optim.AdamW(peer.parameters(), fused=True, **OPTIONS)
    batch = torch.from_numpy(ids), torch.from_numpy(targets)
    shards = Shards(threads)

    def peers_gradients():
        optimizer.zero_grad()
        loss = peer.loss(*batch)
        loss.backward()
        return loss.item()

    def our_gradients():
        return shards.backward(model, ids, targets)

    def our_clip(parameters, max_norm):
        with shards.limited(1):  # as in step.HostStep
            return clip_grad_norm_(parameters, max_norm, shards.map)

    ours = partial(AdamW(model.parameters(), **OPTIONS).step, shards.map)
    return (
        Training(model, ours, our_clip, our_gradients, clock),
        Training(peer, optimizer.step, torch.nn.utils.clip_grad_norm_, peers_gradients, clock),
    )


def compare_losses(ours: Training, peer: Training, steps: int) -> dict:
    """The losses of the first steps; ValueError if they differ by more than TOLERANCE."""
    mine = [ours.step() for _ in range(steps)]
    theirs = [peer.step() for _ in range(steps)]
    absolute = max(abs(a - b) for a, b in zip(mine, theirs))
    relative = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs))
    if not relative <= TOLERANCE:
        raise ValueError(f"the losses differ by {relative:.1e} (relative): {mine} and {theirs}")
    return {"ours": mine, "torch": theirs, "absolute": absolute, "relative": relative}


# --- measuring ------------------------------------------------------------------------------------


def measure_setting(
    name: str, method: Method, steps: int, check: int, threads: int
) -> tuple[dict, list[Table], str]:
    """One setting: numbers, tables, and a sentence on how the losses agree."""
    setting = SETTINGS[name]()
    ours, peer = trainings(setting, threads, method.clock)
    losses = compare_losses(ours, peer, check)
    step = sum(Spread.of(ours.times[phase]).median for phase in PHASES)
    seconds = min(steps * step, LONGEST_TURN)
    ours.times.clear()
    peer.times.clear()
    times = interleaved({"ours": ours.step, "torch": peer.step}, replace(method, seconds=seconds))
    ratio = Ratio.of(times["torch"], times["ours"])
    phases = {p: (Spread.of(ours.times[p]).median, Spread.of(peer.times[p]).median) for p in PHASES}
    split = _split_by_op(trainings(setting, 1, method.clock)[0], steps)
    data = {
        "model": str(setting),
        "parameters": ours.model.num_parameters(),
        "losses": losses,
        **{which: _with_tokens(timing, setting.tokens) for which, timing in times.items()},
        "ratio": ratio.to_dict(),
        "phases": {phase: {"ours": a, "torch": b} for phase, (a, b) in phases.items()},
        "ops": split,
    }
    tables = [
        _speed_table(name, setting, times, ratio),
        _phase_table(name, phases),
        _op_table(name, split),
    ]
    agreement = (
        f"{name}: {check} losses agree with PyTorch's to {losses['absolute']:.1e} absolute, "
        f"{losses['relative']:.1e} relative (from {losses['ours'][0]:.4f} to "
        f"{losses['ours'][-1]:.4f}); at most {TOLERANCE:g} is allowed."
    )
    return data, tables, agreement


def _with_tokens(timing: Timing, tokens: int) -> dict:
    return {**timing.to_dict(), "tokens_per_second": tokens / timing.median}


def _split_by_op(training: Training, steps: int) -> list[dict]:
    """Our step's time by op, then what is no op: medians over the steps, longest first.

    The whole batch runs on one thread of ours here, with as many as BLAS may have: the clock of an
    op means nothing while another op runs beside it.
    """
    profile, cells, calls = Profile(training.clock), defaultdict(list), {}
    with backend.using(profile.reading()):
        for _ in range(steps):
            profile.clear()
            training.step()
            calls = dict(profile.calls)
            for name, seconds in _one_step(profile, training).items():
                cells[name].append(seconds)
    median = {cell: Spread.of(seconds).median for cell, seconds in cells.items()}
    total = sum(median.values())
    rows = []
    for name in dict.fromkeys(name for name, _ in median):
        parts = {part: median[name, part] for part in PARTS if (name, part) in median}
        share = sum(parts.values()) / total
        rows.append({"name": name, "calls": calls.get((name, "forward"), 1), **parts})
        rows[-1]["share"] = share
    return sorted(rows, key=lambda row: -row["share"])


def _one_step(profile, training):
    """(name, phase) -> seconds, for the step that was just done."""
    cells = dict(profile.seconds)
    for phase in PHASES:
        cells[phase, phase] = training.times[phase][-1]
    in_ops = sum(profile.seconds.values())
    cells["tape, modules, checks", "gradients"] = cells.pop(("gradients", "gradients")) - in_ops
    return cells


# --- tables ---------------------------------------------------------------------------------------


def _speed_table(name, setting, times, ratio):
    columns = ["a training step", "median", "quartiles", "best", "tokens/s"]
    table = Table(f"{name}: {setting}", columns)
    for which, timing in times.items():
        s = timing.spread
        quartiles = f"{duration(s.low)} - {duration(s.high)}"
        rate = f"{setting.tokens / s.median:,.0f}"
        label = {"ours": "ours", "torch": "PyTorch eager"}[which]
        table.rows.append([label, duration(s.median), quartiles, duration(timing.best), rate])
    s = ratio.rounds
    table.rows.append(
        ["ratio", f"{s.median:.2f}", f"{s.low:.2f} - {s.high:.2f}", f"{ratio.best:.2f}", ""]
    )
    return table


def _phase_table(name, phases):
    table = Table(f"{name}: by phase, medians", ["phase", "ours", "PyTorch", "ratio", "ours loses"])
    for phase, (a, b) in phases.items():
        table.rows.append([phase, duration(a), duration(b), f"{b / a:.2f}", duration(a - b)])
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
