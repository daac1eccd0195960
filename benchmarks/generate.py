"""Generation with a cache of keys and values, ours and transformers', from the same weights: first
that both write the same text, then how fast, and how near the reading of the weights is to what the
machine's memory allows.
"""

import os
import tempfile
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinygrad_llm.checkpoint import save_model
from tinygrad_llm.generate import generate
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator

from .measure import Method, Ratio, Timing, interleaved
from .report import Table, duration

SIZES = {
    "tiny": {"vocab_size": 97, "emb_dim": 16, "n_heads": 2, "n_layers": 2},  # that it runs
    "gpt2": {},
}
PARTS = (
    "ours",
    "transformers",
    "ours, 1 token",
    "transformers, 1 token",
    "the head's product",
    "reading",
)
READ = 1 << 26  # numbers of float32 that "reading" goes over: more than caches hold


@dataclass(frozen=True)
class Task:
    """So many prompts of so many tokens, and how many tokens each gets."""

    batch: int
    prompt: int
    new: int

    def __str__(self):
        return f"batch {self.batch}, {self.prompt} + {self.new} tokens"


def config(size: str) -> GPTConfig:
    return GPTConfig.from_name("gpt2", **SIZES[size])


def models(size: str, generator: Generator):
    """Ours with random weights, and the same as transformers opens it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    ours = GPT(config(size), generator).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        return ours, GPT2LMHeadModel.from_pretrained(folder).eval()


def measure_task(ours: GPT, peer, task: Task, method: Method) -> tuple[dict, list[Table]]:
    """Numbers and tables. Raises ValueError if the two texts differ."""
    V, rng = ours.cfg.vocab_size, np.random.default_rng(0)
    ids = rng.integers(0, V, (task.batch, task.prompt))
    tensor = torch.from_numpy(ids)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    options |= {"attention_mask": torch.ones_like(tensor), "use_cache": True}

    def mine(new=task.new):
        return generate(ours, ids, new, temperature=0)

    def theirs(new=task.new):
        with torch.inference_mode():
            return peer.generate(tensor, max_new_tokens=new, **options).numpy()

    if not np.array_equal(mine(), theirs()):
        raise ValueError(f"{task}: ours and transformers' greedy texts differ")
    head = ours.out_head.weight.data
    x = rng.standard_normal((task.batch, head.shape[1]), np.float32)
    many = np.ones(READ, np.float32)
    calls = (
        mine,
        theirs,
        lambda: mine(1),
        lambda: theirs(1),
        lambda: head @ x.T,  # the faster order for a few rows
        lambda: many @ many,
    )
    times = interleaved(dict(zip(PARTS, calls, strict=True)), replace(method, seconds=0.0))
    data = {"task": str(task), **{name: times[name].to_dict() for name in PARTS}}
    data["ratio"] = (ratio := Ratio.of(times["transformers"], times["ours"])).to_dict()
    read = 4 * (ours.num_parameters() - ours.pos_emb.weight.numel())  # bytes of weights, each token
    rows = [_row(name, times[name], times[f"{name}, 1 token"], task, read) for name in PARTS[:2]]
    speeds = {p: n / times[p].median for p, n in zip(PARTS[4:], (head.nbytes, many.nbytes))}
    for row in rows:
        row["share_of_bandwidth"] = row["bytes_per_second"] / max(speeds.values())
    data["decoding"] = {row["name"]: row for row in rows}
    data["bandwidth"] = speeds
    return data, [_table(task, rows, ratio, speeds)]


def _row(name: str, whole: Timing, first: Timing, task: Task, read: int) -> dict:
    """What one of the two does in a second."""
    step = whole.minus(first).per(task.new - 1).median
    return {
        "name": name,
        "seconds": whole.median,
        "tokens_per_second": task.batch * task.new / whole.median,
        "prefill_seconds": first.median,
        "step_seconds": step,
        "bytes_per_second": read / step,
    }


def _table(task, rows, ratio, speeds):
    columns = ["greedy, float32", "all", "tokens/s", "first token", "each further step"]
    table = Table(str(task), [*columns, "weights", "of the bound"])
    for row in rows:
        times = [duration(row[key]) for key in ("prefill_seconds", "step_seconds")]
        speed = f"{row['bytes_per_second'] / 1e9:.1f} GB/s"
        rate, share = f"{row['tokens_per_second']:.1f}", f"{row['share_of_bandwidth']:.0%}"
        table.rows.append([row["name"], duration(row["seconds"]), rate, *times, speed, share])
    for name, speed in speeds.items():
        table.rows.append([f"{name} alone", "", "", "", "", f"{speed / 1e9:.1f} GB/s", ""])
    table.rows.append(["ratio", str(ratio), "", "", "", "", ""])
    return table
