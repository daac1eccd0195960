"""`tinygrad-llm info`: what a GPT consists of, and the memory that it takes."""

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..checkpoint import load_model
from ..gpt import SIZES, GPTConfig
from .errors import UserError, user_input

Size = StrEnum("Size", list(SIZES))
MIB = 2**20
STATE = 4 * 4  # bytes that training keeps for a parameter: itself, its gradient, AdamW's two means


def info(
    size: Annotated[
        Size | None, typer.Option(help="One of OpenAI's sizes; gpt2 if nothing is said.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory that `train` has made.")
    ] = None,
    qkv_bias: Annotated[
        bool, typer.Option(help="With biases on q, k and v, as OpenAI's weights have them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> int:
    """What a GPT's parameters are, and the memory that they take."""
    if size and model:
        raise UserError("--size names a model to come, --model one that is there: give one of them")
    if model:
        with user_input():
            cfg = load_model(model).cfg
    else:
        cfg = GPTConfig.from_name(size or Size.gpt2, qkv_bias=qkv_bias)
    counts = counted(cfg)
    if as_json:
        print(json.dumps({"config": cfg.to_dict(), **counts}, indent=1))
    else:
        _show(cfg, counts, model or size or Size.gpt2)
    return 0


def counted(cfg: GPTConfig) -> dict:
    """Parameters by part, and in all: with a head of its own, and with the table as the head."""
    either = {"untied": replace(cfg, tie_weights=False), "tied": replace(cfg, tie_weights=True)}
    totals = {name: cfg.num_parameters() for name, cfg in either.items()}
    return {"parts": cfg.parameter_counts(), **totals}


def _show(cfg, counts, name):
    table = Table(title=f"{name}: {', '.join(f'{k} {v}' for k, v in cfg.to_dict().items())}")
    for column in ("part", "parameters", "MiB in float32"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rows = list(counts["parts"].items())
    rows += [("all, with a head of its own", counts["untied"])]
    rows += [("all, with the token table as the head", counts["tied"])]
    for part, n in rows:
        table.add_row(part, f"{n:,}", f"{4 * n / MIB:.2f}")
    console = Console(highlight=False)
    console.print(table)
    n = counts["tied" if cfg.tie_weights else "untied"]
    console.print(
        f"Training keeps {STATE} bytes for each parameter (itself, its gradient, AdamW's two "
        f"means): {n * STATE / 2**30:.2f} GiB, and what a batch needs.",
        soft_wrap=True,
    )
