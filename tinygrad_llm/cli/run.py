"""A run of a training command: its directory, how it begins, is saved, and goes on.

A subclass of Run for each command says what it trains, and on what.
"""

import contextlib
import os
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from ..checkpoint import (
    CHECKPOINTS,
    OLD_STATE,
    checkpoints,
    load_training_state,
    save_checkpoint,
    step_of,
)
from ..data.files import lock
from ..tokenizer import Tokenizer
from ..train import Training, versions
from .log import EVENTS, Log, free_name
from .screen import Screen, typed

PLOT = "loss.png"
LOCK = ".lock"  # beside the checkpoints: its owner alone writes to the directory
INCOMPLETE = ".incomplete"  # in a directory whose run has no checkpoint yet


@dataclass
class Run(ABC):
    """A run, the directory it lives in, and the options that it was started with."""

    command: ClassVar[str]  # how its subclass is called
    results: ClassVar[tuple[str, ...]]  # the files that it writes, besides checkpoints
    length: ClassVar[str]  # the option that makes it longer
    less: ClassVar[str]  # what makes it take less memory
    loss_of: ClassVar[str]  # what a loss is the mean of: token or text

    directory: Path
    lock: BinaryIO
    log: Log
    trainer: Training
    tokenizer: Tokenizer
    options: dict[str, Any]
    memory: int  # bytes that it takes, about

    @abstractmethod
    def save_model(self) -> None:
        """The model as it is now; with patience, as it was at its best, which checkpoints know."""

    @abstractmethod
    def sample(self) -> str | None:
        """What shows how good the model is by now, if anything does."""

    @abstractmethod
    def finish(self, screen: Screen) -> None:
        """What is done, and said, after the last step."""

    def save(self) -> None:
        """The model, and last the checkpoint: it alone decides where --resume goes on."""
        state = {
            "command": self.command,
            "trainer": self.trainer.state_dict(),
            "options": self.options,
        }
        self.log.sync()
        self.save_model()
        save_checkpoint(self.directory, self.trainer.step, state, self.options["keep"])

    def resume_command(self) -> str:
        words = [*self.command.split(), "--out", str(self.directory), "--resume"]
        return self.command_line(*words)

    def command_line(self, *words: str) -> str:
        """How it can be typed here, for the device where this run is."""
        where = self.trainer.update.where.name
        on = [] if where == "cpu" else ["--device", where]
        return f"{typed()} {shlex.join([*words, *on])}"


# --- a new run ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(kind: type[Run], out: Path | None) -> Iterator[tuple[Path, BinaryIO]]:
    """A directory for a new run, and its lock. Inside, the run is written up to its first
    checkpoint; if that does not succeed, nothing of it stays.
    """
    existing = _nearest_existing(out / CHECKPOINTS if out else Path("runs"))
    directory = _made_directory(out)
    held = _locked(directory)
    check_free(kind, directory)  # another process may have had it in the meantime
    if (directory / INCOMPLETE).exists():  # of a run that was killed: its adapter, say, is not ours
        _remove_results(kind, directory)
    try:
        (directory / INCOMPLETE).touch()
        yield directory, held
        (directory / INCOMPLETE).unlink()
    except BaseException:  # a full disk, Ctrl-C: half a run would stand in the way of the next
        _remove_results(kind, directory)
        _remove_directories(directory, existing)
        raise


def check_free(kind: type[Run], out: Path | None) -> None:
    """Raises ValueError if this directory cannot be written, or something in it would be lost."""
    out = out or Path("runs")
    existing = _nearest_existing(out)
    if not existing.is_dir():
        raise ValueError(f"--out {out} cannot be made: {existing} is a file, choose another place")
    if not os.access(existing, os.W_OK):
        raise ValueError(
            f"--out {out} cannot be made: {existing} is read-only, choose another place"
        )
    if checkpoints(out):
        raise ValueError(
            f"--out {out} already holds a training run: add --resume to go on with it, "
            "or choose another directory"
        )
    if (out / INCOMPLETE).exists():  # a run that was killed before it had a checkpoint
        return
    ours = [name for name in (*kind.results, EVENTS, OLD_STATE) if (out / name).exists()]
    if ours:
        raise ValueError(f"--out {out} has a {ours[0]}, which would be lost: choose another place")


def _nearest_existing(path: Path) -> Path:
    """The path, or else the nearest directory above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _made_directory(out: Path | None) -> Path:
    """Makes the directory; by default the first free one of runs/1, runs/2, ..."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    number = 1
    while True:
        try:
            (out := Path("runs", str(number))).mkdir(parents=True)
            return out
        except FileExistsError:
            number += 1


def _locked(directory: Path) -> BinaryIO:
    """A lock on the directory that this process alone has. Raises ValueError if another has it."""
    path = directory / CHECKPOINTS / LOCK
    path.parent.mkdir(exist_ok=True)
    try:
        return lock(path)
    except BlockingIOError:
        raise ValueError(
            f"another process trains in {directory}: wait for its end, or stop it first"
        ) from None


def _remove_results(kind: type[Run], directory: Path) -> None:
    ours = [directory / name for name in kind.results]
    for path in (*checkpoints(directory), *ours):
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in ours} - {directory}:
        with contextlib.suppress(OSError):  # there is none, or something else is in it
            folder.rmdir()
    shutil.rmtree(directory / EVENTS, ignore_errors=True)
    (directory / INCOMPLETE).unlink(missing_ok=True)


def _remove_directories(directory: Path, existing: Path) -> None:
    """The run's directories below `existing`, which this process has made, if they are empty."""
    checkpoints = directory.absolute() / CHECKPOINTS
    made = [p for p in (checkpoints, *checkpoints.parents) if existing.absolute() in p.parents]
    with contextlib.suppress(OSError):  # something else is in it
        if made:
            (checkpoints / LOCK).unlink()
        for path in made:
            path.rmdir()


# --- a run that goes on ---------------------------------------------------------------------------


@dataclass
class Saved:
    """What a run has left behind, to go on with."""

    path: Path  # of the checkpoint
    lock: BinaryIO
    trainer: dict[str, Any]  # its state
    options: dict[str, Any]  # that it was started with

    @property
    def directory(self) -> Path:
        return self.path.parent.parent

    def go_on(self, kind: type[Run], trainer: Training, tensorboard: bool, screen: Screen) -> Log:
        """Makes the directory that of this checkpoint, when all has been checked; gives its log."""
        if (before := self.trainer["versions"]) != versions():
            screen.say(
                f"saved with {_shown(before)}, goes on with {_shown(versions())}: "
                "its numbers may differ in the last digits"
            )
        _set_later_aside(self.directory, self.path, screen)
        _remove_strays(kind, self.directory)
        log = Log(self.directory, trainer.step if trainer.evaluations else -1, tensorboard)
        if log.damage:
            screen.say(log.damage)
        if trainer.finished:
            screen.say(_was_finished(trainer, kind.length))
        return log


def open_saved(
    kind: type[Run], out: Path | None, name: str | None, options: dict[str, Any], given: set[str]
) -> Saved:
    """The run as it was saved, in its newest checkpoint or in the one of that name.

    `given` are the options on the command line: those that shape the run must be as they were.
    """
    _checkpoint(out, name)  # a directory without any is left as it is
    held = _locked(out)
    path = _checkpoint(out, name)  # of a process that has ended since, perhaps
    state = _whole_state(path)
    if not {"options", "trainer"} <= state.keys():
        raise ValueError(f"{path} was not saved by this command: it cannot go on")
    if (other := state.get("command", "train")) != kind.command:
        raise ValueError(f"the run in {out} is one of {other}: go on with {other} --resume")
    saved = state["options"]
    saved.setdefault("dtype", "float32")  # which earlier versions did not know
    same = (given & saved.keys()) - {"keep"}
    _check_same_options(out, {name: options[name] for name in same}, saved)
    if "keep" in given:
        saved["keep"] = options["keep"]
    return Saved(path, held, state["trainer"], saved)


def _checkpoint(out: Path | None, name: str | None) -> Path:
    """The checkpoint to go on from: the newest, or the one of that name."""
    if out is None:
        raise ValueError("--resume needs --out DIR, the directory of the run to go on with")
    if not out.is_dir():
        raise ValueError(f"--out {out} is no directory: --resume needs that of an earlier run")
    found = checkpoints(out)
    if not found and (out / OLD_STATE).exists():
        raise ValueError(
            f"{out / OLD_STATE} was saved by an earlier version, and this one cannot go on with "
            "it: its model can still be used; start a new run with another --out"
        )
    if not found and (out / INCOMPLETE).exists():
        raise ValueError(
            f"the run in {out} was stopped before its first checkpoint: start it again, "
            "with the same options and without --resume"
        )
    if not found:
        raise ValueError(f"{out} has no {CHECKPOINTS}: --resume needs the directory of a run")
    if name is None:
        return found[-1]
    named = [path for path in found if path.stem == name.removesuffix(".safetensors")]
    if not named:
        there = ", ".join(path.stem for path in found)
        raise ValueError(f"--resume-from {name} is no checkpoint in {out}: there are {there}")
    return named[0]


def _whole_state(path: Path) -> dict[str, Any]:
    """What is in the checkpoint. Raises ValueError that says from which one to go on instead."""
    try:
        return load_training_state(path)
    except ValueError as error:
        older = [p for p in checkpoints(path.parent.parent) if step_of(p) < step_of(path)]
        for before in reversed(older):
            if _is_whole(before):
                raise ValueError(
                    f"{error}; to go on from the one before: --resume-from {before.stem}"
                ) from None
        raise ValueError(
            f"{error}; there is no whole one before it: start a new run with another --out"
        ) from None


def _is_whole(path: Path) -> bool:
    try:
        return bool(load_training_state(path))
    except ValueError:
        return False


def _check_same_options(out: Path, given: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in given.items():
        if value == saved[name]:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flag = f"--{flag}" if value else f"--no-{flag}"
            raise ValueError(
                f"{flag} does not fit the run in {out}, which was started without it: leave it out"
            )
        raise ValueError(
            f"--{flag} {_shown(value)} does not fit the run in {out}, which was started with "
            f"{_shown(saved[name])}: leave --{flag} out"
        )


def _was_finished(trainer: Training, length: str) -> str:
    if trainer.out_of_patience:
        return (
            f"this run has stopped early after {trainer.step} steps already, its validation loss "
            f"was lowest after {trainer.best[0]}: raise --patience to go on"
        )
    return f"this run has done its {trainer.step} steps already: raise {length} to go on"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {what}" for name, what in value.items())
    if value is None:
        return "its default"
    return (" ".join(value) or "none") if isinstance(value, list) else str(value)


def _set_later_aside(out: Path, path: Path, screen: Screen) -> None:
    """Checkpoints after the one to go on from get another name: they are no longer the newest."""
    for later in checkpoints(out):
        if step_of(later) > step_of(path):
            aside = later.rename(free_name(later.with_name(f"{later.name}.aside")))
            screen.say(f"set aside, until you delete it: {aside}")


def _remove_strays(kind: type[Run], out: Path) -> None:
    """What a kill has left behind: of the first save, and of a file that was being replaced."""
    (out / INCOMPLETE).unlink(missing_ok=True)
    for path in (out / name for name in kind.results):
        for stray in path.parent.glob(f".{path.name}.*.tmp"):
            stray.unlink(missing_ok=True)
