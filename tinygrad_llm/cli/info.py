"""`tinygrad-llm info`: what a GPT consists of and the memory that it takes, without loading it."""

import json
from collections import Counter
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..checkpoint import Checkpoint, compare_checkpoints, open_checkpoint
from ..gpt import SIZES, GPTConfig
from .errors import UserError, user_input
from .memory import in_bytes, kept_numbers

Size = StrEnum("Size", list(SIZES))
STATE = 4 * 4  # bytes that training keeps for a parameter: itself, its gradient, AdamW's two means


def info(
    size: Annotated[
        Size | None, typer.Option(help="One of OpenAI's sizes; gpt2 if nothing is said.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A checkpoint, or the name of one on Hugging Face."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Another: what differs. Exit code 1 if anything does."),
    ] = None,
    qkv_bias: Annotated[
        bool, typer.Option(help="With biases on q, k and v, as OpenAI's weights have them.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences of full length, for the memory of training.")
    ] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    """What a GPT's parameters are, and the memory that they take; or how two checkpoints differ."""
    if size and model:
        raise UserError("--size names a model to come, --model one that is there: give one of them")
    if compare and not model:
        raise UserError("--compare says how a checkpoint differs from another: give --model, too")
    with user_input():
        checkpoint = open_checkpoint(model) if model else None
        if compare:
            return _compare(checkpoint, open_checkpoint(compare), as_json)
    cfg = checkpoint.cfg if model else GPTConfig.from_name(size or Size.gpt2, qkv_bias=qkv_bias)
    found = {**counted(cfg), "memory": memory(cfg, batch_size)}
    if checkpoint:
        found["stored"] = stored(checkpoint)
        if checkpoint.classes is not None:
            found["classes"] = list(checkpoint.classes)
    if as_json:
        print(json.dumps({"config": cfg.to_dict(), **found}, indent=1))
    else:
        _show(cfg, found, model or size or Size.gpt2)
    return 0


def counted(cfg: GPTConfig) -> dict:
    """Parameters by part, and in all: with a head of its own, and with the table as the head."""
    either = {"untied": replace(cfg, tie_weights=False), "tied": replace(cfg, tie_weights=True)}
    totals = {name: cfg.num_parameters() for name, cfg in either.items()}
    return {"parts": cfg.parameter_counts(), **totals}


def memory(cfg: GPTConfig, batch_size: int) -> dict:
    """Bytes in float32: of the weights, of what training adds and of what generation adds."""
    n, T, token = cfg.num_parameters(), cfg.context_length, 2 * 4 * cfg.n_layers * cfg.emb_dim
    training = {
        "batch_size": batch_size,
        "parameters": STATE * n,
        "activations": 4 * kept_numbers(cfg) * batch_size * T,
    }
    generation = {"weights": 4 * n, "cache_per_token": token, "cache_full_context": token * T}
    return {"training": training, "generation": generation}


def stored(checkpoint: Checkpoint) -> dict:
    """The checkpoint's files with their sizes, and how many tensors have which dtype."""
    tensors = checkpoint.tensors.values()
    files = {path.name: path.stat().st_size for path in sorted({t.path for t in tensors})}
    return {
        "files": files,
        "tensors": len(tensors),
        "dtypes": dict(Counter(str(tensor.dtype) for tensor in tensors)),
    }


def _show(cfg, found, name):
    table = Table(title=f"{name}: {', '.join(f'{k} {v}' for k, v in cfg.to_dict().items())}")
    for column in ("part", "parameters", "in float32"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rows = list(found["parts"].items())
    rows += [("all, with a head of its own", found["untied"])]
    rows += [("all, with the token table as the head", found["tied"])]
    for part, n in rows:
        table.add_row(part, f"{n:,}", in_bytes(4 * n))
    console = Console(highlight=False)
    console.print(table)
    training, generation = found["memory"]["training"], found["memory"]["generation"]
    lines = [
        f"Training keeps {STATE} bytes for each parameter (itself, its gradient, AdamW's two "
        f"means): {in_bytes(training['parameters'])}, and {in_bytes(training['activations'])} "
        f"for the backward pass of a batch of {training['batch_size']} x {cfg.context_length}.",
        f"Generation takes {in_bytes(generation['weights'])}, and for each sequence a cache of "
        f"{in_bytes(generation['cache_per_token'])} a token: "
        f"{in_bytes(generation['cache_full_context'])} for {cfg.context_length}.",
    ]
    if "classes" in found:
        classes = found["classes"]
        head = f"a head of {len(classes):,} x {cfg.emb_dim:,} numbers in the table's place"
        lines[1:] = [f"It tells {', '.join(classes)} apart, by {head}; it does not write."]
    if "stored" in found:
        files = found["stored"]["files"]
        dtypes = " and ".join(f"{n} in {dtype}" for dtype, n in found["stored"]["dtypes"].items())
        some = next(iter(files)) if len(files) == 1 else f"{len(files)} shards"
        lines += [f"On disk: {in_bytes(sum(files.values()))} in {some}, {dtypes} tensors."]
    for text in lines:
        console.print(text, soft_wrap=True, markup=False)


def _compare(a, b, as_json):
    """Says how they differ: 0 if not at all, else 1."""
    settings, tensors = compare_checkpoints(a, b)
    if as_json:
        tensors = {name: asdict(difference) for name, difference in tensors.items()}
        print(json.dumps({"config": settings, "tensors": tensors}, indent=1))
        return int(bool(settings or tensors))
    console = Console(highlight=False)
    for name, (ours, theirs) in settings.items():
        console.print(f"{name}: {ours} and {theirs}", soft_wrap=True, markup=False)
    if not settings:
        console.print("The configurations are equal.")
    if not tensors:
        console.print(f"All {len(a.tensors)} tensors are equal.")
        return int(bool(settings))
    console.print(f"{len(tensors)} of {len(a.tensors)} tensors differ:")
    table = Table()
    for column in ("tensor", "largest |a - b|", "over largest |a|"):
        table.add_column(column, justify="left" if column == "tensor" else "right")
    for name, difference in tensors.items():
        if difference.largest is None:
            a_and_b = (f"shape {shape}" if shape else "missing" for shape in difference.shapes)
            console.print(f"{name}: {' and '.join(a_and_b)}", soft_wrap=True, markup=False)
        else:
            table.add_row(name, f"{difference.largest:.3g}", f"{difference.relative:.3g}")
    if table.rows:
        console.print(table)
    return 1
