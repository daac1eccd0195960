"""`tinygrad-llm finetune classify`: labelled texts, and a model that tells their classes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.files import atomic_write
from ...device import Device
from ...finetune import (
    LAYERS,
    POSITIONS,
    ClassificationDataset,
    GPTClassifier,
    Scores,
    Table,
    WordClassifier,
    evaluate,
    padding_id,
    plot_confusion,
    read_table,
    split,
    undersample,
    write_entries,
)
from ...finetune.training import ClassifierTrainer
from ...nn import lora_layers, trainable
from ...threads import default_threads
from ...tokenizer import Tokenizer, load
from ..device import DeviceName, Dtype, DtypeName, Kernels
from ..launch import given_options, launch
from ..log import Log
from ..options import (
    DATA,
    MODEL,
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
from ..screen import Screen, aligned
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

PARTS = ("train.jsonl", "validation.jsonl", "test.jsonl")  # so that --resume needs no other file
CONFUSION = "confusion.png"
SCORES = "scores.json"
SHAPE = [*tuning.SHAPE, "text_column", "label_column", "header", "quotes", "encoding", "balance"]
SHAPE += ["position", "layers"]
Layers = StrEnum("Layers", list(LAYERS))
Position = StrEnum("Position", list(POSITIONS))


def classify(
    ctx: typer.Context,
    data: Data = None,
    text_column: Annotated[
        str | None,
        option("Name of the column with the texts, or its number from 0 on.", DATA, metavar="NAME"),
    ] = None,
    label_column: Annotated[
        str | None,
        option("Name of the column with the classes, or its number.", DATA, metavar="NAME"),
    ] = None,
    header: Annotated[
        bool | None,
        option("Whether the first row names the columns.", DATA, "--header/--no-header"),
    ] = None,
    quotes: Annotated[
        bool, option('Whether "..." is one field of a row.', DATA, "--quotes/--no-quotes")
    ] = True,
    encoding: Annotated[str, option("Of the file.", DATA)] = "utf-8",
    balance: Annotated[
        bool,
        option(
            "Whether to take as many texts of each class as the smallest one has.",
            DATA,
            "--balance/--no-balance",
        ),
    ] = True,
    max_length: MaxLength = None,
    model: Model = None,
    position: Annotated[
        Position,
        option(
            "Where the head reads: at a text's last token, its first, the mean of all, or the end "
            "of the row, padding or not.",
            MODEL,
        ),
    ] = Position.last,
    layers: Annotated[
        Layers, option("What trains: these layers, and the new head.", MODEL)
    ] = Layers.all,
    dropout: DropoutRate = 0.0,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = 0.0,
    lora_target: LoraTarget = None,
    epochs: Epochs = 5,
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
    """Teach a trained model to classify texts: rows of a .tsv, .csv or .jsonl file, with labels.

    70 % of them are learned from, 10 % choose when to stop, and 20 % say how good it is. Ctrl-C
    stops after the current step, saves, and says how to go on.
    """
    screen, given = Screen(quiet), given_options(ctx)
    options = {name: ctx.params[name] for name in SHAPE}
    options["data"] = None if data is None else str(data.absolute())
    options["threads"] = threads or default_threads()
    going_on = resume or resume_from is not None

    def opened(where: Device) -> Classification:
        if going_on:
            more = epochs if "epochs" in given else None
            saved = open_saved(Classification, out, resume_from, options, given)
            return _resumed(saved, more, patience, tensorboard, where, screen)
        return _new(out, options, epochs, patience, tensorboard, where, screen)

    return launch(opened, going_on, tensorboard, device, kernels, screen)


@dataclass
class Classification(Tuning):
    """A GPT that learns to tell classes apart."""

    command = "finetune classify"
    of_the_end = (CONFUSION, SCORES)
    results = (*Tuning.files, *PARTS, *of_the_end)
    loss_of = "text"

    tables: tuple[Table, Table, Table]

    def save_model(self) -> None:
        best = self.trainer.best_model()
        self.save_adapter(best)
        tuning.whole(best).save_pretrained(self.directory, self.tokenizer)

    def sample(self) -> None:
        return None

    def finish(self, screen: Screen) -> None:
        """Tests it, on texts that nothing was chosen by."""
        test = self.tables[2]
        found, scores = self._test()
        with atomic_write(self.directory / SCORES) as file:
            file.write((json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
        plot_confusion(self.directory / CONFUSION, scores)
        screen.say(f"\non the {len(test):,} texts to test with:\n\n{_shown(scores)}\n")
        line = "accuracy {accuracy:.2%}; of logistic regression on words {words:.2%}".format
        screen.say(line(**found))
        if "new" in found:
            n = found["new"]["texts"]
            screen.say(f"on the {n:,} that are not also to train with: {line(**found['new'])}")
        elif found["known"]:
            screen.say("all of these texts are also to train with: they say nothing of new ones")
        self.say_files(screen, "model and tokenizer")
        if self.options["position"] != "last":
            screen.say(
                "transformers opens it, but reads at the last token, where this head does not: "
                "use it with this library"
            )
        screen.say(f"beside them: {SCORES}, {CONFUSION} and the data, {', '.join(PARTS)}")
        text = " ".join(test.texts[0].split()[:12]).lstrip("-")  # it would look like an option
        line = self.command_line("classify", "--model", str(self.directory), text)
        screen.say(f"\ntry next: {line}")

    def _test(self) -> tuple[dict[str, Any], Scores]:
        """What goes into scores.json, beside what words alone tell; and the scores."""
        train, _, test = self.tables
        where = self.trainer.update.where  # the best model of a GPU comes from NumPy's memory
        model, words = self.trainer.best_model().to(where), WordClassifier(train)
        built = model.arguments

        def tested(table):
            data = _dataset(table, self.tokenizer, built, where)
            return *evaluate(model, data, self.options["batch_size"]), words.evaluate(table)

        loss, scores, word_scores = tested(test)
        learned = set(train.texts)
        new = [row for row, text in enumerate(test.texts) if text not in learned]
        known = len(test) - len(new)
        found = {"loss": loss, **_as_json(scores), "words": word_scores.accuracy, "known": known}
        if 0 < len(new) < len(test):  # the data has some texts several times
            _, ours, theirs = tested(test.take(new))
            accuracies = {"accuracy": ours.accuracy, "words": theirs.accuracy}
            found["new"] = {"texts": len(new), **accuracies}
        return found, scores


def _new(
    out: Path | None,
    options: dict[str, Any],
    epochs: int,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Classification:
    """Everything up to the first step. Nothing is written before all input has been checked."""
    check_free(Classification, out)
    tuning.check_options(options)
    if options["lora"] and options["layers"] != "all":
        raise ValueError("--lora trains adapters and the head: leave --layers out")
    tables = _parts(options, screen)
    gpt, tokenizer = tuning.open_model(options, where)
    longest = tuning.longest(options, gpt.cfg)
    train = ClassificationDataset(tables[0], tokenizer, context_length=longest)
    tuning.seeded(options)
    # Without a bias, as transformers has the head: so it can be saved as it is.
    model = GPTClassifier(
        gpt,
        train.classes,
        options["position"],
        bias=False,
        pad_id=padding_id(tokenizer),
        max_length=train.max_length,
    ).train_only(options["layers"])
    tuning.add_adapters(model, options)
    if set(lora_layers(model)) == {"head"}:
        raise ValueError(
            "--lora-target head: the head trains as a whole; name layers of the blocks"
        )
    model.head.requires_grad_()
    settings = tuning.settings_for(options, gpt.cfg, len(train), train.max_length, epochs, patience)
    cfg = replace(gpt.cfg, vocab_size=len(train.classes))
    memory = tuning.memory_for(cfg, trainable(model), settings.context, options, where)
    data = (_dataset(table, tokenizer, model.arguments, where) for table in tables[:2])
    trainer = ClassifierTrainer(model.to(where), *data, settings, options["dtype"])
    with new_directory(Classification, out) as (directory, lock):
        for name, table in zip(PARTS, tables):
            write_entries(directory / name, _rows(table))
        options["parts"] = tuning.digests(directory, PARTS)
        log = Log(directory, -1, tensorboard)
        run = Classification(directory, lock, log, trainer, tokenizer, options, memory, tables)
        run.save()
    n = train.truncated
    cut = f"; longer texts are cut: {n:,} of those to train with" if n else ""
    screen.say(f"rows have {train.max_length:,} tokens{cut}")
    screen.say(tuning.what_trains(model, trainer))
    return run


def _resumed(
    saved: Saved,
    epochs: int | None,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Classification:
    """The run as it was saved, on the parts of the data that lie beside it."""
    directory, state = saved.directory, saved.trainer
    classes = state["classifier"]["classes"]
    paths = [tuning.saved_part(saved, name) for name in PARTS]
    tables = tuple(read_table(path, classes=classes) for path in paths)
    tokenizer = load(directory)
    data = [_dataset(table, tokenizer, state["classifier"], where) for table in tables[:2]]
    steps = tuning.more_steps(saved, epochs, len(data[0]))
    memory = tuning.memory_to_go_on(saved, where, len(classes))
    trainer = ClassifierTrainer.resume(state, *data, steps, patience, where.name)
    log = saved.go_on(Classification, trainer, tensorboard, screen)
    run = Classification(
        directory, saved.lock, log, trainer, tokenizer, saved.options, memory, tables
    )
    run.set_aside(screen)
    run.save_model()  # that of a later checkpoint may be there, or none
    return run


# --- the data -------------------------------------------------------------------------------------


def _parts(options: dict[str, Any], screen: Screen) -> tuple[Table, Table, Table]:
    """The texts to train, to validate and to test with."""
    columns = (_column(options[name]) for name in ("text_column", "label_column"))
    header, quotes, encoding = (options[name] for name in ("header", "quotes", "encoding"))
    table = read_table(options["data"], *columns, header, quotes=quotes, encoding=encoding)
    counts = ", ".join(f"{name} {n:,}" for name, n in table.counts().items())
    screen.say(f"{len(table):,} texts: {counts}")
    everything = table
    if options["balance"]:
        table = undersample(table)
    try:
        parts = split(table)
    except ValueError:
        fewest = min(everything.counts(), key=everything.counts().get)
        raise ValueError(
            f"{options['data']}: {len(table):,} rows, taken from {len(everything):,}, are too few "
            f"to train, validate and test with: give more of class {fewest!r}, or --no-balance"
        ) from None
    for name, count in parts[0].counts().items():
        if not count:
            raise ValueError(
                f"{options['data']}: no text of class {name!r} is left to train with, after "
                "some are kept to validate and test: give more texts of it"
            )
    taken = ", of each class as many as of the smallest" * options["balance"]
    sizes = "{:,} to train, {:,} to validate and {:,} to test with".format(*map(len, parts))
    screen.say(f"{len(table):,} of them{taken}: {sizes}")
    return parts


def _column(asked: str | None) -> str | int | None:
    return int(asked) if asked and asked.isdecimal() else asked


def _rows(table: Table) -> Iterator[dict[str, str]]:
    for text, label in zip(table.texts, table.labels.tolist()):
        yield {"text": text, "label": table.classes[label]}


def _dataset(
    table: Table, tokenizer: Tokenizer, built: dict[str, Any], where: Device
) -> ClassificationDataset:
    """The rows of a table, for a classifier that is built like this. On a CPU, batches are no wider
    than they need to be; a GPU records its steps for one width.
    """
    trim = where.name == "cpu" and built["position"] != "last_padded"
    return ClassificationDataset(table, tokenizer, built["max_length"], built["pad_id"], trim=trim)


# --- scores ---------------------------------------------------------------------------------------


def _as_json(scores: Scores) -> dict[str, Any]:
    *classes, _ = scores.report()
    measures = ("precision", "recall", "f1", "texts")
    return {
        "accuracy": scores.accuracy,
        "classes": {name: dict(zip(measures, numbers)) for name, *numbers in classes},
        "confusion": scores.confusion.tolist(),
    }


def _shown(scores: Scores) -> str:
    """Tables for the screen: measures of each class, and who was taken for whom."""
    measures = [("", "precision", "recall", "F1", "texts")]
    for name, *shares, support in scores.report():
        measures.append((name, *(f"{share:.2%}" for share in shares), f"{support:,}"))
    confusion = [("true \\ predicted", *scores.classes)]
    for name, row in zip(scores.classes, scores.confusion.tolist()):
        confusion.append((name, *(f"{n:,}" for n in row)))
    return f"{aligned(measures)}\n\n{aligned(confusion)}"
