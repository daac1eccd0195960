"""Spam: the GPT of the default job, fine-tuned on SMS messages by the command that users have.

It learns to write from Python's language reference, and then what spam is: how well, in what time,
and with what memory, training all of it or LoRA's adapters alone. Each run is a process of its own.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from .report import Table, duration

TARGET = 0.95  # of the test texts; the book reaches 95.67 % with GPT-2 124M
KINDS = {"all weights": [], "LoRA": ["--lora", "8"], "last block": ["--layers", "last_block"]}


def pretrain(folder: Path, options: list[str], threads: int) -> float:
    """Makes folder/base; returns the seconds that it took."""
    start = time.monotonic()
    _run("train", *options, "--threads", str(threads), "--out", str(folder / "base"))
    return time.monotonic() - start


def tune(folder: Path, kind: str, data: Path, epochs: int, seed: int, threads: int) -> dict:
    """Fine-tunes folder/base once; returns how good it is, what trains, and what it took."""
    out, start = folder / f"{kind}-{seed}", time.monotonic()
    options = ["--model", str(folder / "base"), "--data", str(data), "--epochs", str(epochs)]
    options += ["--seed", str(seed), "--threads", str(threads), "--out", str(out), *KINDS[kind]]
    said = _run("finetune", "classify", *options)
    seconds = time.monotonic() - start
    scores = json.loads((out / "scores.json").read_text())
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    trains = next(line for line in said.splitlines() if line.startswith("of "))
    return {
        "kind": kind,
        "seed": seed,
        "accuracy": scores["accuracy"],
        "new": scores.get("new", {}).get("accuracy"),
        "words": scores["words"],
        "words_new": scores.get("new", {}).get("words"),
        "seconds": seconds,
        "step_seconds": float(np.median([s["seconds"] for s in steps if "seconds" in s])),
        "peak_bytes": max(step.get("memory", 0) for step in steps),
        "trains": trains,
    }


def table(runs: list[dict], pretraining: float, epochs: int) -> Table:
    """The accuracies, medians over the seeds of times and memory, and what words alone tell."""
    columns = ["", "accuracy, seed by seed", "of new texts", "in all", "a step", "peak memory"]
    rows = []
    for kind in KINDS:
        of_kind = [run for run in runs if run["kind"] == kind]
        shares = [" ".join(_share(run[which]) for run in of_kind) for which in ("accuracy", "new")]
        whole, step, peak = (
            float(np.median([run[name] for run in of_kind]))
            for name in ("seconds", "step_seconds", "peak_bytes")
        )
        took = [f"{whole:.0f} s", duration(step), f"{peak / 2**20:,.0f} MiB"]
        rows.append([kind, *shares, *took])
    words = [_share(runs[0][which]) for which in ("words", "words_new")]
    rows.append(["logistic regression on words", *words, "", "", ""])
    return Table(f"{epochs} epochs, after {pretraining:.0f} s of pretraining", columns, rows)


def read(folder: str | None) -> Path:
    """The data. Raises FileNotFoundError: which file is missing, and how to say where it is."""
    name = "sms-spam-collection.tsv"
    path = Path(folder or "", name)
    if not folder or not path.is_file():
        raise FileNotFoundError(
            f"set the environment variable TINYGRAD_LLM_DATA to the directory that has {name}"
        )
    return path.absolute()


def _share(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2%}"


def _run(*words: str) -> str:
    command = [sys.executable, "-m", "tinygrad_llm", *words, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
