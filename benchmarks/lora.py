"""LoRA against training all weights: the same steps, what they take, and how much memory.

Times are taken in turns in one process. Memory is the peak of a process of its own for each, since
what one has once got from the system, the other would find there.
"""

import subprocess
import sys

import numpy as np

from tinygrad_llm import nn
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW, clip_grad_norm_, decay_groups
from tinygrad_llm.parallel import Shards
from tinygrad_llm.random import Generator

from .measure import Method, Ratio, interleaved
from .report import Table, duration

KINDS = {"full": "all weights", "lora": "LoRA"}
SETTINGS = {  # vocabulary, context, width, heads, layers, batch
    "tiny": (65, 8, 16, 2, 2, 4),  # to see that everything runs
    "small": (2048, 128, 128, 4, 4, 16),
    "gpt2": (50257, 256, 768, 12, 12, 2),
}
MEMORY = """
import sys
from benchmarks import machine
name, kind, rank, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
machine.limit_threads(threads)
from benchmarks.lora import Training

before = machine.resident("VmRSS")
training = Training(name, kind, rank, threads)
for _ in range(3):
    training.step()
print(machine.resident("VmHWM") - before)
"""


class Training:
    """A model, its optimizer and one batch; `step()` is what is timed."""

    def __init__(self, name: str, kind: str, rank: int, threads: int):
        vocab, context, dim, heads, layers, batch = SETTINGS[name]
        sizes = {"vocab_size": vocab, "context_length": context, "emb_dim": dim}
        cfg = GPTConfig(**sizes, n_heads=heads, n_layers=layers, drop_rate=0.0, qkv_bias=True)
        self.model, self.tokens = GPT(cfg, Generator(0)), batch * context
        if kind == "lora":
            nn.apply_lora(self.model, nn.LoRAConfig(rank, 2 * rank), generator=Generator(1))
        self.optimizer = AdamW(decay_groups(self.model, 0.1), lr=1e-4)
        self.shards, ids = Shards(threads), np.random.default_rng(0)
        self.batch = ids.integers(0, vocab, (2, batch, context))

    def step(self) -> float:
        """Forward, backward, clipping, AdamW; returns the loss before it."""
        loss = self.shards.backward(self.model, *self.batch)
        clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        return loss


def measure_setting(name: str, rank: int, method: Method, threads: int) -> tuple[dict, Table]:
    """Trained numbers, times and peak memory of both, and their ratios. ValueError if a loss does
    not fall.
    """
    peaks = {kind: _peak(name, kind, rank, threads) for kind in KINDS}
    trainings = {kind: Training(name, kind, rank, threads) for kind in KINDS}
    counts = {kind: nn.trainable(training.model) for kind, training in trainings.items()}
    for kind, training in trainings.items():
        losses = [training.step() for _ in range(3)]
        if not losses[-1] < losses[0]:
            raise ValueError(f"{name}, {kind}: the loss does not fall: {losses}")
    times = interleaved({kind: training.step for kind, training in trainings.items()}, method)
    ratio = Ratio.of(times["full"], times["lora"])
    memory = peaks["full"] / peaks["lora"]
    share = counts["lora"][0] / counts["full"][0]
    vocab, context, dim, heads, layers, batch = SETTINGS[name]
    data = {
        "trained": {kind: count[0] for kind, count in counts.items()},
        "share": share,
        "peak_bytes": peaks,
        "memory_ratio": memory,
        **{kind: timing.to_dict() for kind, timing in times.items()},
        "ratio": ratio.to_dict(),
    }
    title = (
        f"{name}: vocabulary {vocab}, context {context}, {dim} wide, {heads} heads, "
        f"{layers} layers, batch {batch}; rank {rank}"
    )
    table = Table(title, ["a training step of", "numbers that train", "median", "peak memory"])
    for kind, label in KINDS.items():
        cells = [f"{counts[kind][0]:,}", duration(times[kind].median)]
        table.rows.append([label, *cells, f"{peaks[kind] / 2**20:,.0f} MiB"])
    table.rows.append(
        ["ratio, all weights / LoRA", f"{1 / share:.0f}", str(ratio), f"{memory:.2f}"]
    )
    return data, table


def _peak(name, kind, rank, threads):
    """Bytes that a process of its own has more at its peak than before it made the model."""
    command = [sys.executable, "-c", MEMORY, name, kind, str(rank), str(threads)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


NOTE = (
    "ratio: what training all weights takes, over what LoRA takes: above 1, LoRA takes less. LoRA "
    "is on the four layers of each block; the rest is frozen. Time: the median over the rounds "
    "and, in parentheses, the quartiles."
)
