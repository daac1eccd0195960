"""nanoGPT's setting for a CPU on tiny Shakespeare, characters as tokens: does the model learn as
well as it should? nanoGPT reports a validation loss of 1.88 after 2,000 steps.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator
from tinygrad_llm.train import Trainer, TrainSettings, evaluate

from .measure import Spread
from .report import Table, duration

TARGET = 1.90  # nats for a character
CONTEXT, BATCH = 64, 12


def characters(text: str) -> tuple[np.ndarray, int]:
    """The text as ids of its characters, (N,), and how many different ones there are."""
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    return np.array([number[c] for c in text], np.int64), len(alphabet)


def settings(steps: int, seed: int, threads: int) -> TrainSettings:
    """nanoGPT's schedule: up to 1e-3 in 100 steps, then a cosine down to a tenth of it."""
    return TrainSettings(
        steps=steps,
        batch_size=BATCH,
        context=CONTEXT,
        lr=1e-3,
        min_lr=1e-4,
        warmup_steps=min(100, steps),
        weight_decay=0.1,
        grad_clip=1.0,
        eval_interval=steps,
        eval_batches=1,
        seed=seed,
        threads=threads,
    )


def measure_seed(
    text: str,
    steps: int,
    seed: int,
    eval_batches: int,
    threads: int,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> dict:
    """Trains once, on 90 % of the text; returns both losses and the times of the steps."""
    tokens, vocab_size = characters(text)
    split = int(0.9 * len(tokens))
    names = {"emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0, "qkv_bias": True}
    model = GPT(GPTConfig(vocab_size, CONTEXT, **names), generator=Generator(seed))
    trainer = Trainer(model, tokens[:split], tokens[split:], settings(steps, seed, threads))
    seconds = []
    for step in range(1, steps + 1):
        start = clock()
        loss = trainer.training_step()
        seconds.append(clock() - start)
        if step % max(1, steps // 10) == 0:
            say(f"seed {seed}, step {step}: loss {loss:.3f}")
    return {
        "seed": seed,
        "validation_loss": evaluate(model, tokens[split:], CONTEXT, BATCH, eval_batches),
        "training_loss": float(np.mean(trainer.losses[-100:])),
        "step_seconds": vars(Spread.of(seconds)),
    }


def table(runs: list[dict], steps: int) -> Table:
    """One row for each seed."""
    columns = ["seed", "validation loss", "training loss", "step, median", "quartiles"]
    rows = []
    for run in runs:
        s = Spread(**run["step_seconds"])
        losses = [f"{run['validation_loss']:.4f}", f"{run['training_loss']:.4f}"]
        quartiles = f"{duration(s.low)} - {duration(s.high)}"
        rows.append([str(run["seed"]), *losses, duration(s.median), quartiles])
    return Table(f"tiny Shakespeare, {steps} steps of nanoGPT's CPU setting", columns, rows)


def read(folder: str | None) -> str:
    """The text. Raises FileNotFoundError: which file is missing, and how to say where it is."""
    if not folder:
        raise FileNotFoundError(
            "the environment variable TINYGRAD_LLM_DATA is not set: "
            "set it to the directory that has tinyshakespeare.txt"
        )
    path = Path(folder) / "tinyshakespeare.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: set TINYGRAD_LLM_DATA to the directory that has it"
        )
    return path.read_text(encoding="utf-8")
