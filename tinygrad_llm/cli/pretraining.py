"""What `tinygrad-llm train` trains: a new GPT, on a text."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np

from .. import random
from ..checkpoint import CONFIG, WEIGHTS, load_tokenizer, save_model
from ..data import embedded_corpus, open_tokens, read_corpus, train_val_split, write_tokens
from ..device import Device
from ..generate import generate
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
from ..train import Trainer, TrainSettings
from .log import LOG, Log
from .memory import check_memory, training_bytes
from .run import PLOT, Run, check_free, new_directory, open_saved
from .screen import Screen

TOKENS = "tokens.npy"  # the encoded text, so that --resume needs no other file
VALIDATION_PART = 0.1  # of the text, at its end
LESS = "use --dtype bfloat16, --recompute, a smaller --batch-size (with --accumulate), --context"
EVALUATIONS = 12  # validation losses and checkpoints in a run, if nothing is said
SAMPLE_TOKENS = 80


@dataclass
class Pretraining(Run):
    """A GPT that learns to write from a text."""

    command = "train"
    results = (CONFIG, WEIGHTS, LOG, TOKENS, PLOT, *FILES)
    length = "--steps"
    less = f"{LESS} or --dim"
    loss_of = "token"

    prompt: str  # the samples continue it

    def save_model(self) -> None:
        save_model(self.trainer.best_model(), self.directory, self.tokenizer)

    def sample(self) -> str:
        """A short text, drawn without touching the randomness of training."""
        ids = self.tokenizer.encode_ordinary(self.prompt)
        generator = random.Generator(self.trainer.settings.seed)
        stop_id = self.tokenizer.special_tokens.get(END_OF_TEXT)
        model, vocab_size = self.trainer.model, self.tokenizer.vocab_size
        ids = generate(model, [ids], SAMPLE_TOKENS, 0.7, 40, generator, stop_id, vocab_size)
        text = indent(self.tokenizer.decode(ids[0]).strip(), "    ")
        return f"after step {self.trainer.step} it writes:\n\n{text}"

    def finish(self, screen: Screen) -> None:
        screen.say(f"model and tokenizer: {self.directory}")
        screen.say(f"every step: {self.directory / LOG}")
        screen.say(f"loss plot: {self.directory / PLOT}")
        line = self.command_line("generate", "--model", str(self.directory), self.prompt)
        screen.say(f"\ntry next: {line}")


# --- a new run ------------------------------------------------------------------------------------


def new_run(
    out: Path | None,
    options: dict[str, Any],
    steps: int,
    patience: int | None,
    tensorboard: bool,
    where: Device,
    screen: Screen,
) -> Pretraining:
    """Everything up to the first step. Nothing is written before all input has been checked."""
    check_free(Pretraining, out)
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

    with new_directory(Pretraining, out) as (directory, lock):
        if not prepared:
            write_tokens(directory / TOKENS, tokens)
        log, prompt = Log(directory, -1, tensorboard), _first_words(tokens, tokenizer)
        run = Pretraining(directory, lock, log, trainer, tokenizer, options, memory, prompt)
        run.save()
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
) -> Pretraining:
    """The run as it was saved, in its newest checkpoint or in the one of that name."""
    saved = open_saved(Pretraining, out, name, options, given)
    path_of_tokens = _prepared_tokens(saved.options["data"]) or out / TOKENS
    if not path_of_tokens.exists():
        raise ValueError(
            f"{path_of_tokens}, the encoded text that this run trains on, is gone: put it back, or "
            "start a new run with another --out"
        )
    tokens = open_tokens(path_of_tokens)
    parts = train_val_split(tokens, VALIDATION_PART, saved.options["context"])
    _check_steps(out, saved.trainer, steps)
    cfg = GPTConfig.from_dict(saved.trainer["config"])
    memory = _check_memory(cfg, saved.options, where)
    trainer = Trainer.resume(saved.trainer, *parts, steps, patience, where.name)
    tokenizer = load_tokenizer(out, trainer.model)
    log, prompt = (
        saved.go_on(Pretraining, trainer, tensorboard, screen),
        _first_words(tokens, tokenizer),
    )
    run = Pretraining(out, saved.lock, log, trainer, tokenizer, saved.options, memory, prompt)
    run.save_model()  # that of a later checkpoint may be there, or none
    return run


def _check_steps(out: Path, state: dict[str, Any], steps: int | None) -> None:
    total = state["settings"]["steps"]
    if steps is not None and steps < total:
        raise ValueError(f"--steps {steps} is less than the {total} of the run in {out}: raise it")
