"""A run's record: log.jsonl with a line for every step, and TensorBoard's events made from it."""

import json
import os
import shutil
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

from ..data.files import atomic_write
from ..train import Report

LOG = "log.jsonl"
EVENTS = "tensorboard"
SCALARS = {  # what TensorBoard calls the numbers of a step
    "loss": "loss/training",
    "val_loss": "loss/validation",
    "val_accuracy": "accuracy/validation",
    "perplexity": "perplexity",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}


class Log:
    """log.jsonl: a JSON object for every step, in a line that is written as soon as it is done.

    Its names are those of a Report; what a step did not compute is left out.
    """

    def __init__(self, directory: Path, last_step: int, tensorboard: bool = False):
        """Goes on after `last_step`: what stands there of later steps is dropped.

        `damage` says in a line what is missing before, and where the file is as it was; or is None.
        Raises OSError if it cannot be written, ValueError as summary_writer does.
        """
        self.path = directory / LOG
        writer = summary_writer() if tensorboard else None
        lines, unreadable = self._read()
        before = [line for line in lines if line["step"] <= last_step]
        missing = last_step + 1 - len({line["step"] for line in before})
        self.damage = self._damage(unreadable, missing) if unreadable or missing else None
        with atomic_write(self.path) as file:
            file.writelines(_encoded(line) for line in before)
        self._file = open(self.path, "ab")  # noqa: SIM115  open as long as the run
        self._events = None
        if writer is not None:
            shutil.rmtree(directory / EVENTS, ignore_errors=True)  # all of it is in the log
            self._events = writer(str(directory / EVENTS))
            for line in before:
                self._add_events(line)

    def add(self, report: Report) -> None:
        """Writes the line of a step. Raises OSError if it cannot be written."""
        line = {**asdict(report), "perplexity": report.perplexity}
        del line["best"]
        line = {name: value for name, value in line.items() if value is not None}
        self._file.write(_encoded(line))
        self._file.flush()
        if self._events is not None:
            self._add_events(line)

    def sync(self) -> None:
        """Writes it through to the disk: a checkpoint never knows more steps than the log."""
        os.fsync(self._file.fileno())

    def reports(self) -> list[Report]:
        """All steps so far."""
        names = {field.name for field in fields(Report)}
        lines, _ = self._read()
        return [Report(**{k: v for k, v in line.items() if k in names}) for line in lines]

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The lines, and how many cannot be read, but for the last one: a kill may have cut it."""
        content = self.path.read_bytes() if self.path.exists() else b""
        found = [_decoded(line) for line in content.splitlines()]
        if found and found[-1] is None:
            found.pop()
        return [line for line in found if line is not None], found.count(None)

    def _damage(self, unreadable: int, missing: int) -> str:
        """Keeps a copy of a log with unreadable lines, which the new one leaves out."""
        said = f"{self.path} lacks {missing} of the steps so far"
        if not unreadable:
            return said
        kept = free_name(self.path.with_name(f"{LOG}.damaged"))
        shutil.copyfile(self.path, kept)
        return f"{said}: {unreadable} of its lines cannot be read; as it was, it is in {kept}"

    def _add_events(self, line: dict[str, Any]) -> None:
        for name, tag in SCALARS.items():
            if name in line:
                self._events.add_scalar(tag, line[name], line["step"])


def free_name(path: Path) -> Path:
    """The path, with its last suffix once more for as long as there is such a file."""
    while path.exists():
        path = path.with_name(path.name + path.suffix)
    return path


def _decoded(line: bytes) -> dict[str, Any] | None:
    """The numbers in a line; None if it cannot be read."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(found, dict) and all(isinstance(v, int | float) for v in found.values())
    return found if numbers and "step" in found else None


def _encoded(line: dict[str, Any]) -> bytes:
    finite = {k: v for k, v in line.items() if isfinite(v)}  # JSON has no infinity
    return json.dumps(finite).encode() + b"\n"


def summary_writer() -> type:
    """What writes TensorBoard's events. Raises ValueError if there is no such package."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the package tensorboardX: pip install tensorboardX, or leave it "
            f"out; {LOG} has the same numbers"
        ) from None
    return SummaryWriter
