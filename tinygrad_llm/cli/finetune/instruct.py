"""`tinygrad-llm finetune instruct`: instructions with responses, and a model that follows them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from ...checkpoint import save_model
from ...data import Packed
from ...data.files import atomic_write, together
from ...device import Device
from ...finetune import (
    TEMPLATES,
    ChatTemplate,
    Instructions,
    generate_responses,
    get_template,
    read_entries,
    save_template,
    split_entries,
    write_entries,
)
from ...finetune.instruction import RESPONSE, Entry
from ...finetune.matches import matches
from ...finetune.training import InstructionTrainer, held_out_loss
from ...generate import generate
from ...gpt import GPT
from ...nn import trainable
from ...threads import default_threads
from ...tokenizer import Tokenizer, load
from ..device import DeviceName, Dtype, DtypeName, Kernels
from ..launch import given_options, launch
from ..log import Log
from ..options import (
    DATA,
    RUN,
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
from ..run import Saved, check_free, new_directory, open_saved
from ..screen import Screen, aligned, typed
from . import tuning
from .tuning import (
    BatchSize,
    Data,
    DropoutRate,
    Epochs,
    EvalInterval,
    LearningRate,
    Lora,
    LoraAlpha,
    LoraDropout,
    LoraTarget,
    MaxLength,
    Model,
    Tuning,
    Warmup,
)

PARTS = ("train.json", "test.json", "validation.json")  # so that --resume needs no other file
RESPONSES = "responses.json"
SCORES = "scores.json"
SAMPLE_TOKENS = 60
SHAPE = [*tuning.SHAPE, "template", "response_only", "packing", "too_long", "max_new_tokens"]
Rows = Instructions | Packed
Template = StrEnum("Template", list(TEMPLATES))
TooLong = StrEnum("TooLong", ["truncate", "drop", "refuse"])


def instruct(
    ctx: typer.Context,
    data: Data = None,
    max_length: MaxLength = None,
    too_long: Annotated[
        TooLong,
        option(
            "What becomes of longer entries than --max-length. With --response-only, one whose "
            "prompt alone is as long cannot be truncated.",
            DATA,
        ),
    ] = TooLong.truncate,
    template: Annotated[
        Template, option("The prompt style: how an entry becomes one text.", DATA)
    ] = Template.alpaca,
    model: Model = None,
    dropout: DropoutRate = 0.0,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = 0.0,
    lora_target: LoraTarget = None,
    response_only: Annotated[
        bool, option("The loss counts the responses only.", TRAINING, "--response-only")
    ] = False,
    packing: Annotated[
        bool,
        option("Several entries in a row: less padding to compute.", TRAINING, "--packing"),
    ] = False,
    epochs: Epochs = 2,
    batch_size: BatchSize = 8,
    accumulate: Accumulate = 1,
    lr: LearningRate = None,
    min_lr: MinLR = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = 0.1,
    eval_interval: EvalInterval = None,
    patience: Patience = None,
    recompute: Recompute = False,
    seed: Seed = 0,
    threads: Threads = None,
    max_new_tokens: Annotated[
        int, option("Most tokens of a response to a test entry; 0: none.", RUN, min=0)
    ] = 256,
    out: Out = None,
    resume: Annotated[bool, resume_option("--epochs")] = False,
    resume_from: ResumeFrom = None,
    keep: Keep = 3,
    tensorboard: Tensorboard = False,
    device: DeviceName = None,
    dtype: DtypeName = Dtype.float32,
    kernels: Kernels = "auto",
    quiet: Quiet = False,
) -> int:
    """Teach a trained model to follow instructions: a list of entries in a .json file, or one in
    each line of a .jsonl file, with an instruction, an input, which may be empty, and an output.

    The first 85 % are learned from, the next 10 % get responses at the end, and the last 5 % choose
    when to stop. Ctrl-C stops after the current step, saves, and says how to go on.
    """
    screen, given = Screen(quiet), given_options(ctx)
    options = {name: ctx.params[name] for name in SHAPE}
    options["data"] = None if data is None else str(data.absolute())
    options["threads"] = threads or default_threads()
    going_on = resume or resume_from is not None

    def opened(where: Device) -> Instruction:
        if going_on:
            more = epochs if "epochs" in given else None
            saved = open_saved(Instruction, out, resume_from, options, given)
            return _resumed(saved, more, patience, tensorboard, where, screen)
        return _new(out, options, epochs, patience, tensorboard, where, screen)

    return launch(opened, going_on, tensorboard, device, kernels, screen)


@dataclass
class Instruction(Tuning):
    """A GPT that learns to follow instructions."""

    command = "finetune instruct"
    of_the_end = (RESPONSES, SCORES)
    results = (*Tuning.files, *PARTS, *of_the_end)
    loss_of = "token"

    template: ChatTemplate
    test: Sequence[Entry]
    test_rows: Rows  # the same, to compute a loss of
    example: Entry  # the samples are responses to it

    def save_model(self) -> None:
        best = self.trainer.best_model()
        if not best.tok_emb.weight.requires_grad:  # else its files could not hold all that trains
            self.save_adapter(best)
        with together():
            save_model(tuning.whole(best), self.directory, self.tokenizer)
            save_template(self.directory, self.template)

    def sample(self) -> str | None:
        model = self.trainer.model
        ids = self._prompt(self.example)
        room = min(SAMPLE_TOKENS, model.cfg.context_length - len(ids))
        if room < 1:
            return None
        stop_id, n = self.template.stop_ids(self.tokenizer), self.tokenizer.vocab_size
        (row,) = generate(model, [ids], room, temperature=0, stop_id=stop_id, vocab_size=n)
        asked = self.template.content(self.example["instruction"], self.example["input"])
        said = self.template.extract(self.tokenizer.decode(row[len(ids) :])) or "(nothing)"
        return f"asked\n\n{indent(asked, '    ')}\n\nit responds\n\n{indent(said, '    ')}"

    def finish(self, screen: Screen) -> None:
        """Tests it, on entries that nothing was chosen by."""
        where = self.trainer.update.where  # the best one of a GPU comes from NumPy's memory
        model = self.trainer.best_model().to(where)
        loss = held_out_loss(model, self.test_rows, self.options["batch_size"])
        screen.say(f"loss on the entries to test with: {loss:.3f}")
        found = {"loss": loss}
        if self.options["max_new_tokens"]:
            found |= self._respond(model, screen)
        with atomic_write(self.directory / SCORES) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())
        self.say_files(screen, "model, tokenizer and prompt template")
        screen.say(f"\ntry next: {self.command_line('chat', '--model', str(self.directory))}")

    def _respond(self, model: GPT, screen: Screen) -> dict[str, float]:
        """Writes responses to the entries that leave room for one; says how alike they are to those
        expected, and returns it.
        """
        longest, fit = model.cfg.context_length, []
        for number, entry in enumerate(self.test, start=1):
            if len(self._prompt(entry)) < longest:
                fit.append(entry)
            else:
                screen.say(f"{PARTS[1]}, entry {number} fills the context: it gets no response")
        if not fit:
            return {}
        path, most = self.directory / RESPONSES, self.options["max_new_tokens"]
        with screen.progress("responses") as show:
            entries = generate_responses(
                model, self.tokenizer, fit, self.template, path, most, progress=show
            )
        found = matches((entry["output"], entry[RESPONSE]) for entry in entries)
        rows = [(name.replace("_", " "), f"{match.mean:.2%}") for name, match in found.items()]
        title = f"{len(fit):,} responses as expected", ""
        screen.say(f"\n{aligned([title, *rows])}\n")
        screen.say(f"responses: {path}; a model scores them: {typed()} judge --help")
        return {name: match.mean for name, match in found.items()}

    def _prompt(self, entry: Entry) -> list[int]:
        asked = self.template.content(entry["instruction"], entry["input"])
        return self.template.ids(self.tokenizer, [], asked)


def _new(
    out: Path | None,
    options: dict[str, Any],
    epochs: int,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Instruction:
    """Everything up to the first step. Nothing is written before all input has been checked."""
    check_free(Instruction, out)
    tuning.check_options(options)
    entries = read_entries(options["data"])
    try:
        parts = split_entries(entries)
    except ValueError as error:
        raise ValueError(f"{options['data']}: {error}; give 20 or more") from None
    template = get_template(options["template"])
    gpt, tokenizer = tuning.open_model(options, where)
    tuning.seeded(options)
    new_words = not set(template.special_tokens) <= set(tokenizer.special_tokens)
    template.add_tokens(tokenizer, gpt)
    options["max_length"] = tuning.longest(options, gpt.cfg)
    (train, test, validation), n_too_long, lost = _rows(parts, tokenizer, template, options, where)
    tuning.add_adapters(gpt, options)
    if new_words:  # their vectors are to be learned, also beside adapters
        gpt.tok_emb.requires_grad_()
        gpt.out_head.requires_grad_()
    context = max(map(_longest, (train, validation)))
    settings = tuning.settings_for(options, gpt.cfg, len(train), context, epochs, patience)
    memory = tuning.memory_for(gpt.cfg, trainable(gpt), context, options, where)
    trainer = InstructionTrainer(gpt.to(where), train, validation, settings, options["dtype"])
    with new_directory(Instruction, out) as (directory, lock):
        for name, entries in zip(PARTS, parts):
            write_entries(directory / name, entries)
        options["parts"] = tuning.digests(directory, PARTS)
        log = Log(directory, -1, tensorboard)
        asking = template, parts[1], test, parts[2][0]
        run = Instruction(directory, lock, log, trainer, tokenizer, options, memory, *asking)
        run.save()
    sizes = "{:,} to train, {:,} to test and {:,} to validate with".format(*map(len, parts))
    screen.say(f"{sum(map(len, parts)):,} entries: {sizes}")
    if n_too_long:
        done = {"truncate": "cut", "drop": "left out"}[options["too_long"]]
        longest = options["max_length"]
        screen.say(f"{n_too_long:,} of them have more than {longest:,} tokens: they are {done}")
    if lost:
        screen.say(
            f"in {lost:,} of them nothing of the response is left: choose a model with a longer "
            "--context, or --too-long drop"
        )
    screen.say(tuning.what_trains(gpt, trainer))
    if new_words and options["lora"]:
        screen.say(
            "the template has special tokens that are new to the model: the whole table of tokens "
            "trains, too, and the adapter is not written alone"
        )
    return run


def _resumed(
    saved: Saved,
    epochs: int | None,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Instruction:
    """The run as it was saved, on the parts of the data that lie beside it."""
    directory, options = saved.directory, saved.options
    parts = [read_entries(tuning.saved_part(saved, name)) for name in PARTS]
    template, tokenizer = get_template(options["template"]), load(directory)
    (train, test, validation), *_ = _rows(parts, tokenizer, template, options, where)
    steps = tuning.more_steps(saved, epochs, len(train))
    memory = tuning.memory_to_go_on(saved, where)
    state = saved.trainer
    trainer = InstructionTrainer.resume(state, train, validation, steps, patience, where.name)
    log = saved.go_on(Instruction, trainer, tensorboard, screen)
    asking = template, parts[1], test, parts[2][0]
    run = Instruction(directory, saved.lock, log, trainer, tokenizer, options, memory, *asking)
    run.set_aside(screen)
    run.save_model()  # that of a later checkpoint may be there, or none
    return run


def _rows(
    parts: Sequence[Sequence[Entry]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: dict[str, Any],
    where: Device,
) -> tuple[list[Rows], int, int]:
    """The parts as datasets; how many entries in them are too long, and of how many only the prompt
    is left. Errors name entries by their place in the whole file.
    """
    found, first, n_too_long, lost = [], 1, 0, 0
    settings = [options[name] for name in ("max_length", "response_only", "too_long")]
    settings.append(where.name == "cpu")
    for entries in parts:
        try:
            rows = Instructions(entries, tokenizer, template, *settings, first)
        except ValueError as error:
            raise ValueError(f"{options['data']}: {error}") from None
        found.append(rows.packed() if options["packing"] else rows)
        first, n_too_long = first + len(entries), n_too_long + rows.n_too_long
        lost += int((rows.prompt_lengths >= rows.max_length).sum())
    return found, n_too_long, lost


def _longest(rows: Rows) -> int:
    """Tokens of the longest row."""
    return rows.inputs.shape[1] if isinstance(rows, Packed) else rows.longest
