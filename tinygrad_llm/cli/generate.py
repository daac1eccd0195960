"""`tinygrad-llm generate`: continues a prompt with a trained model."""

import sys
from pathlib import Path
from secrets import randbits
from typing import Annotated

import typer

from .. import random
from ..checkpoint import load_model, load_tokenizer
from ..generate import stream
from ..tokenizer import StreamDecoder
from ..tokenizer.bpe_files import END_OF_TEXT
from .errors import user_input


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Annotated[Path, typer.Option(metavar="DIR", help="A directory that `train` has made.")],
    max_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to write.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; higher: more varied.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw from the k likeliest tokens only.")] = 40,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeats a text exactly; without, each is new.")
    ] = None,
) -> int:
    """Continue a prompt with a trained model."""
    with user_input():
        gpt = load_model(model)
        tokenizer = load_tokenizer(model, gpt)
        ids = tokenizer.encode(prompt, allowed_special="all")
        generator = random.Generator(randbits(32) if seed is None else seed)
        stop_id = tokenizer.special_tokens.get(END_OF_TEXT)
        new_ids = stream(
            gpt, ids, max_tokens, temperature, top_k, generator, stop_id, tokenizer.vocab_size
        )
    decoder = StreamDecoder(tokenizer)
    _write(prompt)
    for token_id in new_ids:
        _write(decoder.feed(token_id))
    _write(decoder.finish() + "\n")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
