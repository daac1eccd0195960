"""A training run: its directory and what is in it, how it begins, is saved, and goes on."""

import contextlib
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import random
from ..checkpoint import (
    CHECKPOINTS,
    CONFIG,
    OLD_STATE,
    WEIGHTS,
    checkpoints,
    load_tokenizer,
    load_training_state,
    save_checkpoint,
    save_model,
    step_of,
)
from ..data import embedded_corpus, open_tokens, read_corpus, train_val_split, write_tokens
from ..device import Device
from ..gpt import GPT, GPTConfig
from ..tokenizer import (
    END_OF_TEXT,
    FILES,
    BPETokenizer,
    TiktokenTokenizer,
    Tokenizer,
    gpt2,
    load,
)
from ..train import Trainer, TrainSettings, versions
from .log import EVENTS, LOG, Log, free_name
from .memory import check_memory, training_bytes
from .screen import Screen, typed

TOKENS = "tokens.npy"  # the encoded text, so that --resume needs no other file
PLOT = "loss.png"
LOCK = ".lock"  # beside the checkpoints: its owner alone writes to the directory
INCOMPLETE = ".incomplete"  # in a directory whose run has no checkpoint yet
RESULTS = (CONFIG, WEIGHTS, LOG, TOKENS, PLOT, *FILES)  # all files that a run writes
VALIDATION_PART = 0.1  # of the text, at its end
LESS = "use --dtype bfloat16, --recompute, a smaller --batch-size (with --accumulate), --context"
EVALUATIONS = 12  # validation losses and checkpoints in a run, if nothing is said


@dataclass
class Run:
    """A training run, the directory it lives in, and the options that it was started with."""

    directory: Path
    trainer: Trainer
    tokenizer: Tokenizer
    options: dict[str, Any]
    prompt: str  # the samples continue it
    log: Log
    lock: BinaryIO
    memory: int  # bytes that it takes, about

    def save(self) -> None:
        """The model, and last the checkpoint: it alone decides where --resume goes on."""
        state = {"trainer": self.trainer.state_dict(), "options": self.options}
        self.log.sync()
        self.save_model()
        save_checkpoint(self.directory, self.trainer.step, state, self.options["keep"])

    def save_model(self) -> None:
        """The model as it is now; with patience, as it was at its best, which checkpoints know."""
        save_model(self.trainer.best_model(), self.directory, self.tokenizer)

    def resume_command(self) -> str:
        return f"{typed()} train --out {shlex.quote(str(self.directory))} --resume{self._device()}"

    def generate_command(self) -> str:
        directory, prompt = shlex.quote(str(self.directory)), shlex.quote(self.prompt)
        return f"{typed()} generate --model {directory}{self._device()} {prompt}"

    def _device(self) -> str:
        """The option for where this run is, unless that is the CPU."""
        where = self.trainer.update.where
        return "" if where.name == "cpu" else f" --device {where.name}"


# --- a new run ------------------------------------------------------------------------------------


def new_run(
    out: Path | None,
    options: dict[str, Any],
    steps: int,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Run:
    """Everything up to the first step. Nothing is written before all input has been checked."""
    _check_free(out or Path("runs"))
    settings = _settings(options, steps, patience)
    tokenizer = _given_tokenizer(options["tokenizer"])
    _check_vocab_size(options["vocab_size"])
    cfg = _gpt_config(options, tokenizer.vocab_size if tokenizer else options["vocab_size"])
    memory = _check_memory(cfg, options, where)
    if prepared := _prepared_tokens(options["data"]):
        if tokenizer is None:
            raise ValueError(
                f"--data {prepared} holds token ids: give the --tokenizer that made them, "
                "a directory or gpt2"
            )
        tokens = open_tokens(prepared)
    else:
        tokenizer, tokens = _encoded_text(options, tokenizer, screen)
    if isinstance(tokenizer, TiktokenTokenizer):
        tokenizer = tokenizer.to_bpe()  # once, not each time that it is saved
    train_tokens, val_tokens = train_val_split(tokens, VALIDATION_PART, settings.context)
    random.manual_seed(options["seed"])  # draws the weights
    model = GPT(_gpt_config(options, tokenizer.vocab_size)).to(where)
    trainer = Trainer(model, train_tokens, val_tokens, settings, options["dtype"])

    existing = _nearest_existing(out / CHECKPOINTS if out else Path("runs"))
    directory = _made_directory(out)
    lock = _locked(directory)
    _check_free(directory)  # another process may have had it in the meantime
    try:
        (directory / INCOMPLETE).touch()
        if not prepared:
            write_tokens(directory / TOKENS, tokens)
        log = Log(directory, -1, tensorboard)
        prompt = _first_words(tokens, tokenizer)
        run = Run(directory, trainer, tokenizer, options, prompt, log, lock, memory)
        run.save()
        (directory / INCOMPLETE).unlink()
    except BaseException:  # a full disk, Ctrl-C: half a run would stand in the way of the next
        _remove_results(directory)
        _remove_directories(directory, existing)
        raise
    screen.say(
        f"{len(tokens):,} tokens; a GPT of {model.num_parameters():,} parameters trains for "
        f"{steps:,} steps of {settings.tokens_per_step:,} tokens"
    )
    return run


def _settings(options: dict[str, Any], steps: int, patience: int | None) -> TrainSettings:
    def or_else(name, default):
        return default if options[name] is None else options[name]

    return TrainSettings(
        steps=steps,
        batch_size=options["batch_size"],
        context=options["context"],
        accumulate=options["accumulate"],
        lr=options["lr"],
        min_lr=or_else("min_lr", options["lr"] / 10),
        warmup_steps=or_else("warmup", steps // 20),
        weight_decay=options["weight_decay"],
        eval_interval=or_else("eval_interval", -(-steps // EVALUATIONS)),  # rounded up
        patience=patience,
        recompute=options["recompute"],
        seed=options["seed"],
        threads=options["threads"],
    )


def _gpt_config(options: dict[str, Any], vocab_size: int) -> GPTConfig:
    if not options["dropout"] < 1:  # nan neither
        raise ValueError(f"--dropout {options['dropout']:g} leaves nothing to learn: give below 1")
    if options["dim"] % options["heads"]:
        raise ValueError(
            f"--heads {options['heads']} does not divide --dim {options['dim']}: "
            "change one, so that all heads get the same number of dimensions"
        )
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=options["context"],
        emb_dim=options["dim"],
        n_heads=options["heads"],
        n_layers=options["layers"],
        drop_rate=options["dropout"],
        qkv_bias=options["size"] is not None,
        tie_weights=options["tie"],
    )


def _given_tokenizer(name: str | None) -> Tokenizer | None:
    if name is None:
        return None
    if Path(name).is_dir():
        return load(name)
    if name == "gpt2":
        return gpt2()
    raise ValueError(
        f"--tokenizer {name} is no directory: give one that holds a tokenizer.json, or gpt2"
    )


def _prepared_tokens(data: list[str]) -> Path | None:
    """The file of token ids, if the data is one. It stays where it is, and is not read whole."""
    ids = [path for path in data if path.endswith(".npy")]
    if ids and len(data) > 1:
        raise ValueError(f"--data {ids[0]} holds token ids: give it alone, without other files")
    return Path(ids[0]) if ids else None


def _encoded_text(
    options: dict[str, Any], tokenizer: Tokenizer | None, screen: Screen
) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer, learned from the text if there is none yet, and the whole text's ids."""
    ends = tokenizer is None or END_OF_TEXT in tokenizer.special_tokens
    between = END_OF_TEXT if ends else "\n\n"
    text = read_corpus(options["data"], between) if options["data"] else embedded_corpus()
    if tokenizer is None:
        vocab_size = options["vocab_size"]
        screen.say(f"learning a vocabulary of {vocab_size:,} tokens from {len(text):,} characters")
        with screen.progress("vocabulary") as show:
            tokenizer = BPETokenizer.train(text, vocab_size, (END_OF_TEXT,), show)
    return tokenizer, tokenizer.encode_array(text, allowed_special="all")


def _first_words(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The beginning of the text's first line: something to start samples with."""
    text = tokenizer.decode(tokens[:100]).replace(END_OF_TEXT, " ").strip()
    line = text.partition("\n")[0].rstrip("\ufffd")  # perhaps its last character was cut
    return " ".join(line.split()[:5])[:60] or "The"


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < 257:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: give 257 or more, "
            "for the 256 bytes and the end-of-text token"
        )


def _check_memory(cfg: GPTConfig, options: dict[str, Any], where: Device) -> int:
    """Bytes that the run takes. Raises ValueError if they are not there."""
    needed = training_bytes(cfg, options, where)
    check_memory(where, needed, f"{LESS}, --dim, --layers or --vocab-size")
    return needed


def _check_free(out: Path) -> None:
    """Raises ValueError if this directory cannot be written, or something in it would be lost."""
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
    ours = [name for name in (*RESULTS, EVENTS, OLD_STATE) if (out / name).exists()]
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
    """A file that this process alone has as long as it is open. The system closes it after a kill.

    Raises ValueError if another process has it. A file system without locks gives it to everyone.
    """
    path = directory / CHECKPOINTS / LOCK
    path.parent.mkdir(exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115  open as long as the run
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"another process trains in {directory}: wait for its end, or stop it first"
        ) from None
    except OSError:  # no locks here
        pass
    return file


def _remove_results(directory: Path) -> None:
    for path in (*checkpoints(directory), *(directory / name for name in RESULTS)):
        path.unlink(missing_ok=True)
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


def resumed_run(
    out: Path | None,
    name: str | None,
    options: dict[str, Any],
    given: set[str],
    steps: int | None,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Run:
    """The run as it was saved, in its newest checkpoint or in the one of that name.

    `given` are the options on the command line: those that shape the run must be as they were.
    """
    _checkpoint(out, name)  # a directory without any is left as it is
    lock = _locked(out)
    path = _checkpoint(out, name)  # of a process that has ended since, perhaps
    state = _whole_state(path)
    if not {"options", "trainer"} <= state.keys():
        raise ValueError(f"{path} was not saved by this command: it cannot go on")
    saved = state["options"]
    saved.setdefault("dtype", "float32")  # which earlier versions did not know
    same = (given & saved.keys()) - {"keep"}
    _check_same_options(out, {name: options[name] for name in same}, saved)
    if "keep" in given:
        saved["keep"] = options["keep"]

    path_of_tokens = _prepared_tokens(saved["data"]) or out / TOKENS
    if not path_of_tokens.exists():
        raise ValueError(
            f"{path_of_tokens}, the encoded text that this run trains on, is gone: put it back, or "
            "start a new run with another --out"
        )
    tokens = open_tokens(path_of_tokens)
    train_tokens, val_tokens = train_val_split(tokens, VALIDATION_PART, saved["context"])
    _check_steps(out, state["trainer"], steps)
    cfg = GPTConfig.from_dict(state["trainer"]["config"])
    memory = _check_memory(cfg, saved, where)
    trainer = Trainer.resume(
        state["trainer"], train_tokens, val_tokens, steps, patience, where.name
    )
    tokenizer = load_tokenizer(out, trainer.model)
    if (before := state["trainer"]["versions"]) != versions():
        screen.say(
            f"saved with {_shown(before)}, goes on with {_shown(versions())}: "
            "its numbers may differ in the last digits"
        )

    _set_later_aside(out, path, screen)
    _remove_strays(out)
    log = Log(out, trainer.step if trainer.evaluations else -1, tensorboard)
    if log.damage:
        screen.say(log.damage)
    prompt = _first_words(tokens, tokenizer)
    run = Run(out, trainer, tokenizer, saved, prompt, log, lock, memory)
    run.save_model()  # that of a later checkpoint may be there, or none
    if trainer.finished:
        screen.say(_was_finished(trainer))
    return run


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
        if value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {_shown(value)} does not fit the run in {out}, which was started with "
                f"{_shown(saved[name])}: leave {flag} out"
            )


def _check_steps(out: Path, state: dict[str, Any], steps: int | None) -> None:
    total = state["settings"]["steps"]
    if steps is not None and steps < total:
        raise ValueError(f"--steps {steps} is less than the {total} of the run in {out}: raise it")


def _was_finished(trainer: Trainer) -> str:
    if trainer.out_of_patience:
        return (
            f"this run has stopped early after {trainer.step} steps already, its validation loss "
            f"was lowest after {trainer.best[0]}: raise --patience to go on"
        )
    return f"this run has done its {trainer.step} steps already: raise --steps to go on"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {what}" for name, what in value.items())
    return (" ".join(value) or "none") if isinstance(value, list) else str(value)


def _set_later_aside(out: Path, path: Path, screen: Screen) -> None:
    """Checkpoints after the one to go on from get another name: they are no longer the newest."""
    for later in checkpoints(out):
        if step_of(later) > step_of(path):
            aside = later.rename(free_name(later.with_name(f"{later.name}.aside")))
            screen.say(f"set aside, until you delete it: {aside}")


def _remove_strays(out: Path) -> None:
    """What a kill has left behind: of the first save, and of a file that was being replaced."""
    (out / INCOMPLETE).unlink(missing_ok=True)
    for name in RESULTS:
        for stray in out.glob(f".{name}.*.tmp"):
            stray.unlink(missing_ok=True)
