"""`tinygrad-llm generate`: continues prompts with a trained model."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from secrets import randbits
from typing import Annotated, Any

import typer

from .. import random
from ..checkpoint import load_model, load_tokenizer, open_checkpoint
from ..data import read_corpus
from ..device import Device
from ..generate import beam_search, stream, stream_text
from ..generate import generate as generate_rows
from ..gpt import GPT
from ..tokenizer import Tokenizer
from ..tokenizer.bpe_files import END_OF_TEXT
from .device import DeviceName, Dtype, DtypeName, Kernels, chosen, enough_memory
from .errors import user_input, utf8_expected
from .memory import check_memory, generation_bytes

LESS = "use --dtype bfloat16, --device cpu, shorter prompts or a smaller --model"
TEMPERATURE, TOP_K = 0.8, 40  # where nothing else is asked for
BATCH = 8  # prompts of a file that are continued side by side

Model = Annotated[
    Path,
    typer.Option(
        metavar="DIR|NAME",
        help="A directory that `train` has made, or a model's name on Hugging Face, such as gpt2.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0: always the likeliest token; higher: more varied.", show_default=f"{TEMPERATURE}"
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="Draw from the k likeliest tokens only.", show_default=f"{TOP_K}"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw from the likeliest tokens that have this probability together."),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Draw from tokens at least this many times as likely as the likeliest."),
]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Above 1, tokens that have come already are less likely."
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Repeats a text exactly; without, each is new.")
]


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from standard input.")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A prompt in each line; prints a line of JSON for each."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to write.")] = 200,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    beams: Annotated[
        int | None,
        typer.Option(min=1, help="Search for a likely text, with this many beams; draw nothing."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the text, before it; may be repeated."),
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop", help="Of a prompt that is too long, let it see the end.")
    ] = False,
    seed: Seed = None,
    device: DeviceName = None,
    dtype: DtypeName = Dtype.float32,
    kernels: Kernels = "auto",
) -> int:
    """Continue a prompt with a trained model."""
    drawing = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with user_input():
        if beams is not None:
            _refuse_drawing(drawing)
        texts = given_texts(prompt, batch, "prompt")
        gpt, where = opened(model, beams or min(BATCH, len(texts)), device, dtype, kernels)
        tokenizer = load_tokenizer(model, gpt)
        options = sampling(tokenizer, **drawing)
        prompts = [_encoded(text, gpt, tokenizer, crop) for text in texts]
        stop = list(stop or ())
        stream_text([], tokenizer, stop)  # refuses an empty one
        if batch is None and beams is None:
            new_ids = stream(gpt, prompts[0], max_tokens, **options)
        elif beams is None:
            rows = _drawn(gpt, prompts, max_tokens, options)
        else:
            rows = _searched(gpt, prompts, max_tokens, beams, options)
    with enough_memory(where, LESS + " or fewer --beams" * bool(beams)):
        if batch is not None:
            for text, ids in zip(texts, rows, strict=True):
                found = "".join(stream_text(ids, tokenizer, stop))
                write(json.dumps({"prompt": text, "text": found}, ensure_ascii=False) + "\n")
            return 0
        write(texts[0])
        try:
            for piece in stream_text(new_ids if beams is None else next(rows), tokenizer, stop):
                write(piece)
        finally:
            write("\n")  # what was written stays, on lines of its own, also after Ctrl-C
    return 0


def opened(
    name: Path, rows: int, device: str | None, dtype: str, kernels: str
) -> tuple[GPT, Device]:
    """The model, where `rows` texts at a time are to be computed, and where that is."""
    where, said = chosen(device, kernels)
    if device is not None:
        print(said, file=sys.stderr)
    cfg = open_checkpoint(name).cfg
    check_memory(where, generation_bytes(cfg, rows, dtype), LESS)
    with enough_memory(where, LESS):
        return load_model(name, dtype).to(where), where


def sampling(tokenizer: Tokenizer, seed: int | None, **options: Any) -> dict[str, Any]:
    """The keywords of generate and stream: what was typed, and else what suits most texts."""
    options = {name: value for name, value in options.items() if value is not None}
    most = min(TOP_K, tokenizer.vocab_size)
    return {
        "temperature": TEMPERATURE,
        "top_k": most,
        **options,
        "generator": random.Generator(randbits(32) if seed is None else seed),
        "stop_id": tokenizer.special_tokens.get(END_OF_TEXT),
        "vocab_size": tokenizer.vocab_size,
    }


def write(text: str) -> None:
    """On standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def utf8(text: str, what: str) -> str:
    """The text, which Python may have read with other bytes in it, hidden as half surrogate pairs.

    Raises ValueError if it has.
    """
    with utf8_expected(what):
        return text.encode("utf-8", "surrogateescape").decode("utf-8")


def _refuse_drawing(drawing: dict[str, Any]) -> None:
    """Raises ValueError for options that a search would not heed."""
    given = [name for name, value in drawing.items() if value is not None]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"--beams searches and draws nothing: leave {option} out")


def given_texts(text: str | None, batch: Path | None, what: str) -> list[str]:
    """The one text on the command line or standard input, or those in the lines of a file."""
    if (text is None) == (batch is None):
        raise ValueError(f"give one {what} (- for standard input) or --batch FILE with some")
    if text == "-":
        sys.stdin.reconfigure(errors="strict")
        with utf8_expected("standard input"):
            return [sys.stdin.read().removesuffix("\n")]
    if batch is None:
        return [utf8(text, f"the {what}")]
    lines = read_corpus(batch).removesuffix("\n").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    if "" in lines:
        number = lines.index("") + 1
        raise ValueError(f"{batch} has no {what} in line {number}: give one in each line")
    return lines


def _encoded(text: str, gpt: GPT, tokenizer: Tokenizer, crop: bool) -> list[int]:
    """The ids of a prompt that the model can see as a whole, or is to see the end of."""
    ids = tokenizer.encode(text, allowed_special="all")
    if not len(ids):
        raise ValueError("the prompt is empty: give some text to continue")
    longest = gpt.cfg.context_length
    if len(ids) > longest and not crop:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens and the model sees {longest:,}: shorten it, or "
            "add --crop to continue from its end"
        )
    return list(ids)


def _drawn(
    gpt: GPT, prompts: list[list[int]], max_tokens: int, options: dict[str, Any]
) -> Iterator[Iterable[int]]:
    """What follows each prompt, a few of them at a time."""
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        rows = generate_rows(gpt, some, max_tokens, **options)
        for ids, row in zip(some, rows, strict=True):
            yield row[len(ids) :].tolist()


def _searched(
    gpt: GPT, prompts: list[list[int]], max_tokens: int, beams: int, options: dict[str, Any]
) -> Iterator[Iterable[int]]:
    """The likeliest continuation of each prompt."""
    for ids in prompts:
        limits = {name: options[name] for name in ("stop_id", "vocab_size")}
        (best,) = beam_search(gpt, ids, max_tokens, beams, **limits)
        yield best.ids[len(ids) :]
