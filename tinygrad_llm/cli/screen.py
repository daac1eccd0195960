"""What the user sees: plain lines, live bars, times, and the program as it was typed."""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..train import Report, Training

PROGRAM = "tinygrad-llm"


class Screen:
    """Standard output: a live bar on a terminal, plain lines elsewhere, one line if quiet."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        plain = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        self.console = Console(quiet=quiet, **plain)  # text by a model may look like markup
        self.live = self.console.is_terminal and not quiet

    def say(self, text: str) -> None:
        """Text that everyone sees, except if quiet."""
        self.console.print(text)

    def line(self, text: str) -> None:
        """A line for where there is no live bar."""
        if not self.live:
            self.say(text)

    def result(self, path: Path) -> None:
        """The only line if quiet."""
        if self.quiet:
            print(path)

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[..., None]]:
        """A bar as long as the block runs; gives show(done, total, text)."""
        columns = TextColumn(name), BarColumn(bar_width=16), TextColumn("{task.description}")
        with Progress(*columns, console=self.console, disable=not self.live) as progress:
            task = progress.add_task("", total=None)

            def show(done: int, total: int, text: str | None = None) -> None:
                text = f"{done:,}/{total:,}" if text is None else text
                progress.update(task, completed=done, total=total, description=text)

            yield show


class Clock:
    """How fast a trainer is, and how long it will take; starts when it is made."""

    def __init__(self, trainer: Training):
        self.trainer, self.first_step = trainer, trainer.step
        self.start = time.monotonic()

    def line(self, report: Report) -> str:
        """step 20/800  loss 3.210  validation 3.402  18,400 tokens/s  2:10 left

        When fine-tuning, also the epoch, and of classes the accuracy on the validation texts.
        """
        s = self.trainer.settings
        parts = [f"step {report.step:,}/{s.steps:,}"]
        if report.epoch is not None:
            parts.append(f"epoch {report.epoch:.1f}")
        if report.loss is not None:
            parts.append(f"loss {report.loss:.3f}")
        parts.append(f"validation {self.trainer.evaluations[-1][1]:.3f}")
        if report.val_accuracy is not None:
            parts.append(f"accuracy {report.val_accuracy:.1%}")
        if done := report.step - self.first_step:
            per_step = (time.monotonic() - self.start) / done
            number, unit = self.trainer.per_step
            parts.append(f"{number / per_step:,.0f} {unit}/s")
            parts.append(f"{_minutes(per_step * (s.steps - report.step))} left")
        return "  ".join(parts)

    def elapsed(self) -> str:
        """Time since the start, as 2:05."""
        return _minutes(time.monotonic() - self.start)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def typed() -> str:
    """The program as the user can type it here: it need not be on the PATH."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return "python -m tinygrad_llm"
    on_path = shutil.which(PROGRAM)
    if on_path and Path(on_path).absolute() == started.absolute():
        return PROGRAM
    return shlex.quote(os.path.relpath(started))


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends what is inside at its next step; a second one, at once. Gives go_on() to call
    after each step, which raises KeyboardInterrupt then. Raised anywhere, it could be lost: Python
    drops exceptions in callbacks, such as those that Hypothesis gives the garbage collector.
    """
    stopped = False
    before = signal.getsignal(signal.SIGINT)

    def stop(*_):
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)

    def go_on():
        if stopped:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield go_on
    finally:
        signal.signal(signal.SIGINT, before)
