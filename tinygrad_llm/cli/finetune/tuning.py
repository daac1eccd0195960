"""What the commands that fine-tune have in common: their options, settings and adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ... import random
from ...checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    WEIGHTS,
    load_model,
    load_tokenizer,
    open_checkpoint,
    save_adapter,
)
from ...device import Device
from ...finetune.training import FineTuning
from ...gpt import GPT, GPTConfig
from ...nn import (
    LoRAConfig,
    Module,
    adapter_names,
    apply_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    trainable,
)
from ...nn.lora import IN_BLOCKS
from ...tokenizer import FILES, TiktokenTokenizer, Tokenizer
from ...train import TrainSettings
from ..log import LOG, free_name
from ..memory import check_memory, training_bytes
from ..options import DATA, MODEL, TRAINING, option
from ..run import PLOT, Run, Saved
from ..screen import Screen

LORA = "LoRA"
ADAPTER = "adapter"  # the directory of the adapter alone, in a run's
ADAPTER_FILES = tuple(f"{ADAPTER}/{name}" for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
EVALUATIONS = 2  # validation losses and checkpoints in an epoch, if nothing is said
LR = 0.1  # by a model's width: 1.3e-4 for GPT-2's 768 channels, 7.8e-4 for 128
LORA_LR = 4  # times as much for adapters, which begin as nothing
LESS = "use --dtype bfloat16, --recompute, --lora, a smaller --batch-size (with --accumulate)"
# What makes a run: with --resume it is as it was.
SHAPE = ["data", "model", "max_length", "dropout", "batch_size", "accumulate", "lr", "min_lr"]
SHAPE += ["warmup", "weight_decay", "eval_interval", "recompute", "seed", "keep", "dtype", "lora"]
SHAPE += ["lora_alpha", "lora_dropout", "lora_target"]

Data = Annotated[Path | None, option("What to learn from.", DATA, metavar="FILE")]
Model = Annotated[
    str | None,
    option(
        "The model to begin with: a directory that `train` has made, or a model's name on Hugging "
        "Face, such as gpt2.",
        MODEL,
        metavar="DIR|NAME",
    ),
]
MaxLength = Annotated[
    int | None,
    option("Most tokens of a text; without: the model's context.", DATA, min=1),
]
DropoutRate = Annotated[
    float, option("Probability of dropout, in training only; below 1.", MODEL, min=0)
]
Epochs = Annotated[int, option("Times that the data is gone through.", TRAINING, min=1)]
BatchSize = Annotated[int, option("Rows that are computed at a time.", TRAINING, min=1)]
LearningRate = Annotated[
    float | None,
    option(
        f"Highest learning rate; without: {LR:g} / width, {LORA_LR} times it with --lora.", TRAINING
    ),
]
Warmup = Annotated[
    int | None,
    option("Steps until the highest learning rate; without: a 10th of them.", TRAINING, min=0),
]
EvalInterval = Annotated[
    int | None,
    option(
        "Steps from one validation loss and checkpoint to the next; without: half an epoch.",
        TRAINING,
        min=1,
    ),
]
Lora = Annotated[
    int | None,
    option(
        "Train adapters of this rank, and nothing else of the model's blocks.",
        LORA,
        "--lora",
        metavar="RANK",
        min=1,
    ),
]
LoraAlpha = Annotated[
    float | None, option("Adapters are scaled by alpha / rank; without: twice the rank.", LORA)
]
LoraDropout = Annotated[float, option("Probability of dropout before an adapter.", LORA, min=0)]
LoraTarget = Annotated[
    list[str] | None,
    option(
        "How the names of layers with adapters end, such as qkv; may be repeated. Without: "
        f"{', '.join(IN_BLOCKS)}.",
        LORA,
        metavar="NAME",
    ),
]


@dataclass
class Tuning(Run):
    """A fine-tuning run."""

    length = "--epochs"
    less = f"{LESS} or --max-length"
    files = (CONFIG, WEIGHTS, LOG, PLOT, *FILES, *ADAPTER_FILES)
    of_the_end: ClassVar[tuple[str, ...]]  # the files that tell of the model after the last step

    def save_adapter(self, model: Module) -> None:
        """The adapter alone, in PEFT's format, if there is one."""
        if adapter_names(model):
            save_adapter(model, self.directory / ADAPTER)

    def say_files(self, screen: Screen, what: str) -> None:
        """Where the results are."""
        screen.say(f"\n{what}: {self.directory}")
        if (self.directory / ADAPTER).exists():
            screen.say(f"the adapter alone, in PEFT's format: {self.directory / ADAPTER}")

    def set_aside(self, screen: Screen) -> None:
        """Where training goes on, renames what tells of the model as it was before."""
        paths = [self.directory / name for name in self.of_the_end]
        for path in paths if not self.trainer.finished else ():
            if path.exists():
                aside = path.rename(free_name(path.with_name(f"{path.name}.aside")))
                screen.say(f"set aside, until you delete it: {aside}")


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for what a new run lacks, and what no data or model is needed to refuse."""
    for name in ("data", "model"):
        if options[name] is None:
            raise ValueError(f"--{name} is missing: a new run needs it, or add --resume to go on")
    for name in ("dropout", "lora_dropout"):
        if not options[name] < 1:  # nan neither
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {options[name]:g} leaves nothing to learn: give below 1")
    if options["lora_alpha"] is not None and not options["lora_alpha"] > 0:
        raise ValueError(
            f"--lora-alpha {options['lora_alpha']:g} lets adapters do nothing: give above 0"
        )
    for name in ("lora_alpha", "lora_target", "lora_dropout"):
        if options[name] and options["lora"] is None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is for adapters: give their rank, too, with --lora")


def open_model(options: dict[str, Any], where: Device) -> tuple[GPT, Tokenizer]:
    """The model to begin with, in NumPy's memory and float32, and its tokenizer."""
    checkpoint = open_checkpoint(options["model"])
    cfg = checkpoint.cfg
    if checkpoint.classes is not None:
        raise ValueError(
            f"--model {options['model']} is a classifier already: give the language model that it "
            "was made from, or add --resume to go on with its run"
        )
    if options["lora"] and options["lora"] > cfg.emb_dim:
        raise ValueError(
            f"--lora {options['lora']} is more than the model's width of {cfg.emb_dim}: a rank "
            "from 4 to 64 is usual"
        )
    check_memory(where, 4 * cfg.num_parameters(), "use a smaller --model")
    gpt = load_model(options["model"], drop_rate=options["dropout"])
    tokenizer = load_tokenizer(options["model"], gpt)
    if isinstance(tokenizer, TiktokenTokenizer):
        tokenizer = tokenizer.to_bpe()  # once, not each time that it is saved
    return gpt, tokenizer


def longest(options: dict[str, Any], cfg: GPTConfig) -> int:
    """The tokens that a row may have. Raises ValueError for more than the model's."""
    asked = options["max_length"] or cfg.context_length
    if asked > cfg.context_length:
        raise ValueError(
            f"--max-length {asked} is more than the model's context of {cfg.context_length} tokens"
        )
    return asked


def add_adapters(model: Module, options: dict[str, Any]) -> None:
    """With --lora: adapters, which alone train then."""
    if options["lora"] is None:
        return
    rank, alpha = options["lora"], options["lora_alpha"]
    alpha = 2 * rank if alpha is None else alpha
    targets = options["lora_target"] or IN_BLOCKS
    apply_lora(model, LoRAConfig(rank, alpha, options["lora_dropout"], targets))


def digests(directory: Path, parts: Sequence[str]) -> dict[str, str]:
    """A SHA-256 of each part of the data, to be known again by."""
    return {name: sha256((directory / name).read_bytes()).hexdigest() for name in parts}


def saved_part(saved: Saved, name: str) -> Path:
    """A part of the data of a run that goes on. Raises ValueError if it is not as it was."""
    path = saved.directory / name
    wrong = None if path.exists() else "is gone"
    if not wrong and digests(saved.directory, [name])[name] != saved.options["parts"][name]:
        wrong = "is not as it was"
    if wrong:
        raise ValueError(
            f"{path}, a part of the data of this run, {wrong}: put it back, or start a new run "
            "with another --out"
        )
    return path


def settings_for(
    options: dict[str, Any],
    cfg: GPTConfig,
    rows: int,
    context: int,
    epochs: int,
    patience: int | None,
) -> TrainSettings:
    """Those of a run on so many rows of data."""

    def or_else(name, default):
        return default if options[name] is None else options[name]

    per_epoch = steps_per_epoch(options, rows)
    lr = or_else("lr", LR / cfg.emb_dim * (LORA_LR if options["lora"] else 1))
    return TrainSettings(
        steps=epochs * per_epoch,
        batch_size=options["batch_size"],
        context=context,
        accumulate=options["accumulate"],
        lr=lr,
        min_lr=or_else("min_lr", lr / 10),
        warmup_steps=or_else("warmup", epochs * per_epoch // 10),
        weight_decay=options["weight_decay"],
        eval_interval=or_else("eval_interval", -(-per_epoch // EVALUATIONS)),  # rounded up
        patience=patience,
        recompute=options["recompute"],
        seed=options["seed"],
        threads=options["threads"],
    )


def steps_per_epoch(options: dict[str, Any], rows: int) -> int:
    """Raises ValueError if there are fewer rows than one step takes."""
    per_step = options["batch_size"] * options["accumulate"]
    if rows < per_step:
        raise ValueError(
            f"there are {rows:,} rows to train on, and a step takes {per_step:,}: give more data, "
            "or a smaller --batch-size or --accumulate"
        )
    return rows // per_step


def more_steps(saved: Saved, epochs: int | None, rows: int) -> int | None:
    """The steps of so many epochs. Raises ValueError if there were more before."""
    if epochs is None:
        return None
    per_epoch = steps_per_epoch(saved.options, rows)
    before = saved.trainer["settings"]["steps"] // per_epoch
    if epochs < before:
        raise ValueError(
            f"--epochs {epochs} is less than the {before} of the run in {saved.directory}: raise it"
        )
    return epochs * per_epoch


def memory_for(
    cfg: GPTConfig, numbers: tuple[int, int], context: int, options: dict[str, Any], where: Device
) -> int:
    """Bytes that training takes. Raises ValueError if they are not there.

    cfg         the model's; a classifier's with its classes as the vocabulary
    numbers     how many numbers train and how many there are
    context     the tokens of the longest row
    """
    needed = training_bytes(replace(cfg, context_length=context), options, where, numbers)
    check_memory(where, needed, f"{LESS} or --max-length")
    return needed


def memory_to_go_on(saved: Saved, where: Device, vocab_size: int | None = None) -> int:
    """The same of a run that was saved, before its model is made; vocab_size: as in memory_for."""
    state = saved.trainer
    cfg = GPTConfig.from_dict(state["config"])
    cfg = replace(cfg, vocab_size=vocab_size or cfg.vocab_size)
    sizes = {name: array.size for name, array in state["model"].items()}
    everything, frozen = sum(sizes.values()), sum(sizes[name] for name in state["frozen"])
    numbers = everything - frozen, everything
    return memory_for(cfg, numbers, state["settings"]["context"], saved.options, where)


def whole(model: Module) -> Module:
    """What to save: the model itself or, if it has an adapter, one with that merged into the
    weights. These are in float32 then, as they are saved; all others are shared.
    """
    if not adapter_names(model):
        return model
    model = model.copy_with({})
    for layer in lora_layers(model).values():
        layer.to(dtype="float32")  # in 16 bits, most of what an adapter adds would be rounded away
    merge_lora(model)
    remove_lora(model)
    return model


def what_trains(model: Module, trainer: FineTuning) -> str:
    """A line for the screen."""
    trained, everything = trainable(model)
    steps, per_step = trainer.settings.steps, "{:,} {}".format(*trainer.per_step)
    share = "all" if trained == everything else f"{trained:,} ({trained / everything:.2%})"
    return (
        f"of {everything:,} parameters {share} train for {steps:,} steps of {per_step}, "
        f"{trainer.batches.batches_per_epoch:,} in an epoch"
    )


def seeded(options: dict[str, Any]) -> None:
    """What is drawn from here on, a new head, adapters and masks, repeats with --seed."""
    random.manual_seed(options["seed"])
