"""`tinygrad-llm train`: vocabulary, model, samples and loss plot from a text; --resume goes on."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from .. import backend, random
from ..generate import generate
from ..gpt import SIZES
from ..parallel import default_threads
from ..tokenizer import END_OF_TEXT
from ..train import Trainer, plot_training
from .device import DeviceName, Dtype, DtypeName, Kernels, chosen, enough_memory
from .errors import user_input
from .log import LOG, summary_writer
from .memory import in_bytes
from .run import LESS, PLOT, Run, new_run, resumed_run
from .screen import Clock, Screen

SAMPLE_EVERY = 3  # evaluations
SAMPLE_TOKENS = 80
Size = StrEnum("Size", list(SIZES))
DATA, MODEL, TRAINING, RUN = "Data", "Model", "Training", "The run and its directory"
# What makes a run: with --resume it is as it was.
SHAPE = ["tokenizer", "vocab_size", "size", "context", "layers", "heads", "dim", "dropout", "tie"]
SHAPE += ["batch_size", "accumulate", "lr", "min_lr", "warmup", "weight_decay", "eval_interval"]
SHAPE += ["recompute", "seed", "keep", "dtype"]


def option(help: str, panel: str, *names: str, **checks: Any) -> Any:
    """An option of the command, in one of the groups of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **checks)


def train(
    ctx: typer.Context,
    data: Annotated[
        list[Path] | None,
        option(
            "Text files in UTF-8 to train on, or one .npy of `data prepare`. "
            "Without: Python's own language reference.",
            DATA,
            metavar="FILE...",
        ),
    ] = None,
    more_data: Annotated[  # --data a b c: an option takes one value, so b and c are arguments
        list[Path] | None, typer.Argument(metavar="FILE", hidden=True)
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "Encode with a saved tokenizer, or with GPT-2's. Without: learn a vocabulary.",
            DATA,
            metavar="DIR|gpt2",
        ),
    ] = None,
    vocab_size: Annotated[
        int, option("Most tokens in the vocabulary that is learned, 257 or more.", DATA)
    ] = 2048,
    size: Annotated[
        Size | None, option("One of OpenAI's, for --layers, --heads and --dim.", MODEL)
    ] = None,
    context: Annotated[int, option("Tokens that the model looks back on.", MODEL, min=1)] = 128,
    layers: Annotated[int, option("Transformer blocks.", MODEL, min=1)] = 4,
    heads: Annotated[int, option("Attention heads; must divide --dim.", MODEL, min=1)] = 4,
    dim: Annotated[int, option("Numbers that stand for one token.", MODEL, min=1)] = 128,
    dropout: Annotated[
        float, option("Probability of dropout, in training only; below 1.", MODEL, min=0)
    ] = 0.0,
    tie: Annotated[
        bool,
        option(
            "Whether the output head is the table of token embeddings.", MODEL, "--tie/--no-tie"
        ),
    ] = True,
    steps: Annotated[int, option("Updates of the weights.", TRAINING, min=1)] = 800,
    batch_size: Annotated[
        int, option("Windows of text that are computed at a time.", TRAINING, min=1)
    ] = 16,
    accumulate: Annotated[
        int,
        option("Batches in one step: a large batch in the memory of a small one.", TRAINING, min=1),
    ] = 1,
    lr: Annotated[float, option("Highest learning rate.", TRAINING)] = 3e-3,
    min_lr: Annotated[
        float | None, option("Learning rate at the end; without: a tenth of --lr.", TRAINING)
    ] = None,
    warmup: Annotated[
        int | None,
        option("Steps until the highest learning rate; without: a 20th of them.", TRAINING, min=0),
    ] = None,
    weight_decay: Annotated[
        float, option("Pull of the matrices towards zero.", TRAINING, min=0)
    ] = 0.1,
    eval_interval: Annotated[
        int | None,
        option(
            "Steps from one validation loss and checkpoint to the next; without: a 12th of them.",
            TRAINING,
            min=1,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        option(
            "Stop after so many validation losses in a row that are no better than the best; "
            "the model that is saved is the best one. First given with --resume, it counts from "
            "there on.",
            TRAINING,
            min=1,
        ),
    ] = None,
    recompute: Annotated[
        bool,
        option(
            "Save memory: compute activations twice instead of keeping them.",
            TRAINING,
            "--recompute",
        ),
    ] = False,
    seed: Annotated[
        int, option("Repeats a run exactly, with the same --threads.", TRAINING, min=0)
    ] = 0,
    threads: Annotated[
        int | None,
        option("Share out each step; without: one for each core, up to 4.", TRAINING, min=1),
    ] = None,
    out: Annotated[
        Path | None,
        option("Where the results go. Without: runs/1, runs/2, ...", RUN, metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool,
        option(
            "Go on with the run in --out; --steps may be raised. Of a run that is done, it writes "
            "what is missing.",
            RUN,
            "--resume",
        ),
    ] = False,
    resume_from: Annotated[
        str | None,
        option(
            "Go on from an earlier checkpoint than the newest; later ones are renamed, and stay.",
            RUN,
            metavar="step-00000600",
        ),
    ] = None,
    keep: Annotated[int, option("Checkpoints that are kept, the last ones.", RUN, min=1)] = 3,
    tensorboard: Annotated[
        bool,
        option("Write TensorBoard's events too, with tensorboardX.", RUN, "--tensorboard"),
    ] = False,
    device: DeviceName = None,
    dtype: DtypeName = Dtype.float32,
    kernels: Kernels = "auto",
    quiet: Annotated[
        bool, option("Print errors and the directory of the results only.", RUN, "--quiet")
    ] = False,
) -> int:
    """Train a small GPT on a text, from nothing: vocabulary, model, samples, loss plot.

    Ctrl-C stops after the current step, saves, and says how to go on.
    """
    screen, given = Screen(quiet), _given_options(ctx)
    options = {name: ctx.params[name] for name in SHAPE}
    options["data"] = [str(path.absolute()) for path in [*(data or []), *(more_data or [])]]
    options["threads"] = threads or default_threads()
    going_on, run = resume or resume_from is not None, None
    try:
        with user_input(saved=going_on):
            if tensorboard:
                summary_writer()  # before anything else: is there one?
            _use_size(options, given)
            where, said = chosen(device, kernels)
            if going_on:
                more = steps if "steps" in given else None
                run = resumed_run(
                    out, resume_from, options, given, more, patience, tensorboard, where, screen
                )
            else:
                if tokenizer and "vocab_size" in given:
                    raise ValueError(
                        "--vocab-size is of a vocabulary to learn, --tokenizer has one"
                    )
                run = new_run(out, options, steps, patience, tensorboard, where, screen)
        screen.say(said)
        return _train(run, screen)
    except KeyboardInterrupt:  # before the first step, or the second one after it
        return _say_stopped(run, going_on)


def _given_options(ctx: typer.Context) -> set[str]:
    """Names of the options on the command line, as opposed to defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source.name == "COMMANDLINE"}
    return given | {"data"} if "more_data" in given else given


def _use_size(options: dict[str, Any], given: set[str]) -> None:
    """--size stands for three other options."""
    if options["size"] is None:
        return
    sizes = SIZES[options["size"]]
    sizes = {"layers": sizes["n_layers"], "heads": sizes["n_heads"], "dim": sizes["emb_dim"]}
    for name in sizes.keys() & given:
        raise ValueError(f"--size says what --{name} is: give one of them")
    options.update(sizes)


def _say_what_is_slow(trainer: Trainer, screen: Screen) -> None:
    """What keeps a GPU from its best, after the first step, if anything does."""
    if trainer.update.why_no_graph:
        screen.say(f"steps are launched kernel by kernel: {trainer.update.why_no_graph}")
    for op, why in backend.refusals:
        screen.say(f"{op}: no kernel takes it ({why}); its own lines run in its place")


def _train(run: Run, screen: Screen) -> int:
    """Trains to the end or to Ctrl-C; returns the exit code."""
    trainer, steps = run.trainer, run.trainer.settings.steps
    clock, said = Clock(trainer), False
    less = f"such a run takes about {in_bytes(run.memory)}; in a new one, {LESS} or --dim"
    memory = enough_memory(trainer.update.where, f"{less}; what was saved is kept")
    with memory, StopSignal() as stop, screen.progress("training") as show:
        for report in trainer.run():
            if report.step and not said:
                _say_what_is_slow(trainer, screen)
                said = True
            with user_input():
                run.log.add(report)
            line = clock.line(report)
            show(report.step, steps, line)
            stopping = stop.received
            if report.val_loss is not None or stopping:
                with user_input():
                    run.save()
            if report.val_loss is not None:
                screen.line(line)
                if not screen.quiet and _sample_is_due(trainer):
                    screen.say(f"\nafter step {report.step} it writes:\n\n{_sample(run)}\n")
            if stopping:
                break
        with user_input():
            plot_training(run.directory / PLOT, run.log.reports())
            run.log.close()
    if not trainer.finished:
        return _say_interrupted(run)
    _say_done(run, clock, screen)
    return 0


def _sample_is_due(trainer: Trainer) -> bool:
    """With every third validation loss, and at the end."""
    often = trainer.step > 0 and trainer.step % (SAMPLE_EVERY * trainer.settings.eval_interval) == 0
    return often or trainer.finished


def _sample(run: Run) -> str:
    """A short text by the model as it is now, drawn without touching the randomness of training."""
    ids = run.tokenizer.encode_ordinary(run.prompt)
    generator = random.Generator(run.trainer.settings.seed)
    stop_id = run.tokenizer.special_tokens.get(END_OF_TEXT)
    model, vocab_size = run.trainer.model, run.tokenizer.vocab_size
    ids = generate(model, [ids], SAMPLE_TOKENS, 0.7, 40, generator, stop_id, vocab_size)
    return indent(run.tokenizer.decode(ids[0]).strip(), "    ")


def _say_done(run: Run, clock: Clock, screen: Screen) -> None:
    trainer = run.trainer
    step, val_loss = trainer.evaluations[-1]
    done = "stopped early" if trainer.out_of_patience else "done"
    screen.say(f"{done}: validation loss {val_loss:.3f} after {step:,} steps, {clock.elapsed()}")
    if (memory := trainer.update.memory()) is not None:
        screen.say(f"peak memory: {in_bytes(memory)} on {trainer.model.device}")
    best, lowest = trainer.best
    if trainer.settings.patience is not None and best != step:
        screen.say(f"the model is that of step {best:,}, with the lowest: {lowest:.3f}")
    screen.say(f"model and tokenizer: {run.directory}")
    screen.say(f"every step: {run.directory / LOG}")
    screen.say(f"loss plot: {run.directory / PLOT}")
    screen.say(f"\ntry next: {run.generate_command()}")
    screen.result(run.directory)


def _say_interrupted(run: Run) -> int:
    done = f"stopped after {run.trainer.step} steps and saved"
    print(f"{done}; go on with: {run.resume_command()}", file=sys.stderr)
    return 130


def _say_stopped(run: Run | None, going_on: bool) -> int:
    done = (
        "stopped, what was saved before is kept" if going_on else "stopped, nothing was saved yet"
    )
    if run:
        done = f"stopped at once; go on from the last checkpoint with: {run.resume_command()}"
    print(done, file=sys.stderr)
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
