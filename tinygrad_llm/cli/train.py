"""`tinygrad-llm train`: vocabulary, model, samples and loss plot from a text; --resume goes on."""

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import numpy as np
import typer

from .. import random
from ..checkpoint import (
    CONFIG,
    TRAINING_STATE,
    WEIGHTS,
    load_tokenizer,
    load_training_state,
    save_model,
    save_training_state,
)
from ..data import embedded_corpus, open_tokens, read_corpus, train_val_split, write_tokens
from ..generate import generate
from ..gpt import GPT, GPTConfig
from ..parallel import default_threads
from ..tokenizer import FILES, BPETokenizer
from ..tokenizer.bpe_files import END_OF_TEXT
from ..train import Trainer, TrainSettings, plot_losses
from .errors import user_input
from .screen import Clock, Screen, typed

TOKENS = "tokens.npy"  # the encoded text, so that --resume needs no other file
PLOT = "loss.png"
RESULTS = (TRAINING_STATE, CONFIG, WEIGHTS, TOKENS, PLOT, *FILES)  # all that a run writes
VALIDATION_PART = 0.1  # of the text, at its end
EVALUATIONS = 12  # validation losses and checkpoints in a run
SAMPLE_EVERY = 3  # evaluations
SAMPLE_TOKENS = 80


def train(
    ctx: typer.Context,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE...",
            help="Text files in UTF-8 to train on. Without: Python's own language reference.",
        ),
    ] = None,
    more_data: Annotated[  # --data a b c: an option takes one value, so b and c are arguments
        list[Path] | None, typer.Argument(metavar="FILE", hidden=True)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the results go. Without: runs/1, runs/2, ..."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 800,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of text in one step.")] = 16,
    context: Annotated[int, typer.Option(min=1, help="Tokens that the model looks back on.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads; must divide --dim.")] = 4,
    dim: Annotated[int, typer.Option(min=1, help="Numbers that stand for one token.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Annotated[
        int, typer.Option(min=0, help="Repeats a run exactly, with the same --threads.")
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Share out each step; without: one for each core, up to 4."),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="Most tokens in the vocabulary, 257 or more.")
    ] = 2048,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; --steps may be raised.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print errors and the directory of the results only.")
    ] = False,
) -> int:
    """Train a small GPT on a text, from nothing: vocabulary, model, samples, loss plot.

    Ctrl-C stops after the current step, saves, and says how to go on.
    """
    screen = Screen(quiet)
    options = {
        "data": [str(path.absolute()) for path in [*(data or []), *(more_data or [])]],
        "batch_size": batch_size,
        "context": context,
        "layers": layers,
        "heads": heads,
        "dim": dim,
        "lr": lr,
        "seed": seed,
        "threads": threads or default_threads(),
        "vocab_size": vocab_size,
    }
    with user_input():
        if resume:
            given = _given_options(ctx)
            run = _resumed_run(out, options, given, steps if "steps" in given else None)
        else:
            run = _new_run(out, options, steps, screen)
    return _train(run, screen)


def _given_options(ctx: typer.Context) -> set[str]:
    """Names of the options on the command line, as opposed to defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source.name == "COMMANDLINE"}
    return given | {"data"} if "more_data" in given else given


@dataclass
class Run:
    """A training run, the directory it lives in, and the options that it was started with."""

    directory: Path
    trainer: Trainer
    tokenizer: BPETokenizer
    options: dict[str, Any]
    prompt: str  # the samples continue it

    def save(self) -> None:
        """The training state first: it alone decides where --resume goes on."""
        state = {"trainer": self.trainer.state_dict(), "options": self.options}
        with user_input():
            save_training_state(self.directory, state)
            save_model(self.trainer.model, self.directory, self.tokenizer)

    def resume_command(self) -> str:
        return f"{typed()} train --out {shlex.quote(str(self.directory))} --resume"

    def generate_command(self) -> str:
        directory, prompt = shlex.quote(str(self.directory)), shlex.quote(self.prompt)
        return f"{typed()} generate --model {directory} {prompt}"


def _new_run(out: Path | None, options: dict[str, Any], steps: int, screen: Screen) -> Run:
    """Everything up to the first step. Nothing is written before all input has been checked."""
    _check_free(out or Path("runs"))
    _check_vocab_size(options["vocab_size"])
    settings = _settings(options, steps)
    _check_memory(options, options["vocab_size"])
    text = read_corpus(options["data"], END_OF_TEXT) if options["data"] else embedded_corpus()
    tokenizer = _train_tokenizer(text, options["vocab_size"], screen)
    tokens = tokenizer.encode_array(text, allowed_special="all")
    train_tokens, val_tokens = train_val_split(tokens, VALIDATION_PART, settings.context)
    random.manual_seed(options["seed"])  # draws the weights
    model = GPT(_gpt_config(options, tokenizer.vocab_size))
    trainer = Trainer(model, train_tokens, val_tokens, settings)

    directory = _made_directory(out)
    run = Run(directory, trainer, tokenizer, options, _first_words(tokens, tokenizer))
    try:
        write_tokens(directory / TOKENS, tokens)
        run.save()
    except BaseException:  # a full disk, Ctrl-C: half a run would stand in the way of the next
        for name in RESULTS:
            (directory / name).unlink(missing_ok=True)
        raise
    screen.say(
        f"{len(text):,} characters are {len(tokens):,} tokens; "
        f"a GPT of {model.num_parameters():,} parameters trains for {steps:,} steps"
    )
    return run


def _settings(options: dict[str, Any], steps: int) -> TrainSettings:
    return TrainSettings(
        steps=steps,
        batch_size=options["batch_size"],
        context=options["context"],
        lr=options["lr"],
        min_lr=options["lr"] / 10,
        warmup_steps=steps // 20,
        eval_interval=-(-steps // EVALUATIONS),  # rounded up
        seed=options["seed"],
        threads=options["threads"],
    )


def _gpt_config(options: dict[str, Any], vocab_size: int) -> GPTConfig:
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
        drop_rate=0.0,
    )


def _train_tokenizer(text: str, vocab_size: int, screen: Screen) -> BPETokenizer:
    screen.say(f"learning a vocabulary of {vocab_size:,} tokens from {len(text):,} characters")
    with screen.progress("vocabulary") as show:
        return BPETokenizer.train(text, vocab_size, (END_OF_TEXT,), show)


def _first_words(tokens: np.ndarray, tokenizer: BPETokenizer) -> str:
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


def _check_memory(options: dict[str, Any], vocab_size: int) -> None:
    """Raises ValueError for a model or batch that this machine certainly cannot hold."""
    cfg = _gpt_config(options, vocab_size)
    weights = 4 * cfg.num_parameters()  # bytes; also their gradients and AdamW's two moments
    per_token = 4 * (16 * cfg.emb_dim * cfg.n_layers + 2 * vocab_size)  # what backward needs
    needed = 4 * weights + options["batch_size"] * options["context"] * per_token
    if not hasattr(os, "sysconf"):  # Windows
        return
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ValueError(
            f"this needs at least {needed / 2**30:,.0f} GiB, the machine has "
            f"{available / 2**30:,.0f}: use a smaller --batch-size, --context, --dim, --layers or "
            "--vocab-size"
        )


def _check_free(out: Path) -> None:
    """Raises ValueError if this directory cannot be written, or something in it would be lost."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {out} cannot be made: {existing} is a file, choose another place")
    if not os.access(existing, os.W_OK):
        raise ValueError(
            f"--out {out} cannot be made: {existing} is read-only, choose another place"
        )
    if (out / TRAINING_STATE).exists():
        raise ValueError(
            f"--out {out} already holds a training run: add --resume to go on with it, "
            "or choose another directory"
        )
    ours = [name for name in RESULTS if (out / name).exists()]
    if ours:
        raise ValueError(f"--out {out} has a {ours[0]}, which would be lost: choose another place")


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


def _resumed_run(
    out: Path | None, options: dict[str, Any], given: set[str], steps: int | None
) -> Run:
    """The run as it was saved. `given` are the options on the command line."""
    if out is None:
        raise ValueError("--resume needs --out DIR, the directory of the run to go on with")
    if not out.is_dir():
        raise ValueError(f"--out {out} is no directory: --resume needs that of an earlier run")
    state = load_training_state(out)
    if "options" not in state:
        raise ValueError(f"{out / TRAINING_STATE} was not saved by this command: it cannot go on")
    saved = state["options"]
    _check_same_options(out, {name: options[name] for name in given & saved.keys()}, saved)
    _check_steps_left(out, state["trainer"], steps)

    tokens = open_tokens(out / TOKENS)
    train_tokens, val_tokens = train_val_split(tokens, VALIDATION_PART, saved["context"])
    trainer = Trainer.resume(state["trainer"], train_tokens, val_tokens, steps)
    tokenizer = load_tokenizer(out, trainer.model)
    return Run(out, trainer, tokenizer, saved, _first_words(tokens, tokenizer))


def _check_same_options(out: Path, given: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in given.items():
        if value != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {_shown(value)} does not fit the run in {out}, which was started with "
                f"{_shown(saved[name])}: leave {flag} out"
            )


def _check_steps_left(out: Path, state: dict[str, Any], steps: int | None) -> None:
    done, total = state["step"], state["settings"]["steps"]
    if steps is not None and steps < total:
        raise ValueError(f"--steps {steps} is less than the {total} of the run in {out}: raise it")
    if done == (steps or total):
        raise ValueError(f"the run in {out} has done its {done} steps: raise --steps to go on")


def _shown(value: Any) -> str:
    return (" ".join(value) or "none") if isinstance(value, list) else str(value)


def _train(run: Run, screen: Screen) -> int:
    """Trains to the end or to Ctrl-C; returns the exit code."""
    trainer, steps = run.trainer, run.trainer.settings.steps
    clock = Clock(trainer)
    with StopSignal() as stop, screen.progress("training") as show:
        for report in trainer.run():
            line = clock.line(report)
            show(report.step, steps, line)
            if report.val_loss is not None:
                run.save()
                screen.line(line)
                if _sample_is_due(trainer):
                    screen.say(f"\nafter step {report.step} it writes:\n\n{_sample(run)}\n")
            if stop.received:
                break
        if trainer.step < steps:
            run.save()
    if trainer.step < steps:
        return _say_interrupted(run)
    with user_input():
        plot_losses(run.directory / PLOT, trainer.losses, trainer.evaluations)
    _say_done(run, clock, screen)
    return 0


def _sample_is_due(trainer: Trainer) -> bool:
    """With every third validation loss, and at the end."""
    s = trainer.settings
    often = trainer.step > 0 and trainer.step % (SAMPLE_EVERY * s.eval_interval) == 0
    return often or trainer.step == s.steps


def _sample(run: Run) -> str:
    """A short text by the model as it is now, drawn without touching the randomness of training."""
    ids = run.tokenizer.encode_ordinary(run.prompt)
    generator = random.Generator(run.trainer.settings.seed)
    stop_id = run.tokenizer.end_of_text
    model, vocab_size = run.trainer.model, run.tokenizer.vocab_size
    ids = generate(model, [ids], SAMPLE_TOKENS, 0.7, 40, generator, stop_id, vocab_size)
    return indent(run.tokenizer.decode(ids[0]).strip(), "    ")


def _say_done(run: Run, clock: Clock, screen: Screen) -> None:
    step, val_loss = run.trainer.evaluations[-1]
    screen.say(f"done: validation loss {val_loss:.3f} after {step:,} steps, {clock.elapsed()}")
    screen.say(f"model and tokenizer: {run.directory}")
    screen.say(f"loss plot: {run.directory / PLOT}")
    screen.say(f"\ntry next: {run.generate_command()}")
    screen.result(run.directory)


def _say_interrupted(run: Run) -> int:
    done = f"stopped after {run.trainer.step} steps and saved"
    print(f"{done}; go on with: {run.resume_command()}", file=sys.stderr)
    return 130


class StopSignal:
    """In the block, the first Ctrl-C or SIGTERM only sets `received`; a second one interrupts."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True
