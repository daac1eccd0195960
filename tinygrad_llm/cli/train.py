"""`tinygrad-llm train`: vocabulary, model, samples and loss plot from a text; --resume goes on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..device import Device
from ..gpt import SIZES
from ..threads import default_threads
from .device import DeviceName, Dtype, DtypeName, Kernels
from .launch import given_options, launch
from .options import (
    DATA,
    MODEL,
    TRAINING,
    Accumulate,
    Keep,
    MinLR,
    Out,
    Patience,
    Quiet,
    Recompute,
    ResumeFrom,
    Seed,
    Tensorboard,
    Threads,
    WeightDecay,
    option,
    resume_option,
)
from .pretraining import Pretraining, new_run, resumed_run
from .screen import Screen

Size = StrEnum("Size", list(SIZES))
# What makes a run: with --resume it is as it was.
SHAPE = ["tokenizer", "vocab_size", "size", "context", "layers", "heads", "dim", "dropout", "tie"]
SHAPE += ["batch_size", "accumulate", "lr", "min_lr", "warmup", "weight_decay", "eval_interval"]
SHAPE += ["recompute", "seed", "keep", "dtype"]


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
    accumulate: Accumulate = 1,
    lr: Annotated[float, option("Highest learning rate.", TRAINING)] = 3e-3,
    min_lr: MinLR = None,
    warmup: Annotated[
        int | None,
        option("Steps until the highest learning rate; without: a 20th of them.", TRAINING, min=0),
    ] = None,
    weight_decay: WeightDecay = 0.1,
    eval_interval: Annotated[
        int | None,
        option(
            "Steps from one validation loss and checkpoint to the next; without: a 12th of them.",
            TRAINING,
            min=1,
        ),
    ] = None,
    patience: Patience = None,
    recompute: Recompute = False,
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    resume: Annotated[bool, resume_option("--steps")] = False,
    resume_from: ResumeFrom = None,
    keep: Keep = 3,
    tensorboard: Tensorboard = False,
    device: DeviceName = None,
    dtype: DtypeName = Dtype.float32,
    kernels: Kernels = "auto",
    quiet: Quiet = False,
) -> int:
    """Train a small GPT on a text, from nothing: vocabulary, model, samples, loss plot.

    Ctrl-C stops after the current step, saves, and says how to go on.
    """
    screen, given = Screen(quiet), given_options(ctx)
    given |= {"data"} if "more_data" in given else set()
    options = {name: ctx.params[name] for name in SHAPE}
    options["data"] = [str(path.absolute()) for path in [*(data or []), *(more_data or [])]]
    options["threads"] = threads or default_threads()
    going_on = resume or resume_from is not None

    def opened(where: Device) -> Pretraining:
        _use_size(options, given)
        if going_on:
            more = steps if "steps" in given else None
            return resumed_run(
                out, resume_from, options, given, more, patience, tensorboard, where, screen
            )
        if tokenizer and "vocab_size" in given:
            raise ValueError("--vocab-size is of a vocabulary to learn, --tokenizer has one")
        return new_run(out, options, steps, patience, tensorboard, where, screen)

    return launch(opened, going_on, tensorboard, device, kernels, screen)


def _use_size(options: dict[str, Any], given: set[str]) -> None:
    """--size stands for three other options."""
    if options["size"] is None:
        return
    sizes = SIZES[options["size"]]
    sizes = {"layers": sizes["n_layers"], "heads": sizes["n_heads"], "dim": sizes["emb_dim"]}
    for name in sizes.keys() & given:
        raise ValueError(f"--size says what --{name} is: give one of them")
    options.update(sizes)
