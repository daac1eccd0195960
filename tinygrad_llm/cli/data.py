"""`tinygrad-llm data`: corpora by name, and text files of any size as files of token ids."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..data import corpus_hash, corpus_path, encode_files
from ..data.corpus import text_files
from ..data.named import FOLDER, SOURCES, checked, find_corpus
from ..tokenizer import END_OF_TEXT, Tokenizer, gpt2, load
from .errors import described, user_input
from .screen import Screen, typed

data = typer.Typer(help="Download corpora, and turn texts of any size into token ids.")
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and the file's path only.")]


@data.command("list")
def list_corpora() -> int:
    """List the corpora that have a name, and where they are on this machine."""
    screen = Screen(quiet=False)
    with user_input():
        places = [_place(name) for name in SOURCES]
    for (name, source), place in zip(SOURCES.items(), places):
        screen.say(f"{name:<17} {source.about}")
        screen.say(f"{'':<17} {place}")
    screen.say(f"\nThe folder that {FOLDER} names is looked in first.")
    return 0


@data.command("get")
def get(
    name: Annotated[str, typer.Argument(help="One of the names that `data list` shows.")],
) -> int:
    """Print the path of a corpus; download it first, if it is not here yet."""
    with user_input():
        print(corpus_path(name))
    return 0


@data.command("prepare")
def prepare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Text files in UTF-8, or corpus names.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file of token ids to write.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A saved tokenizer, or a run; without: GPT-2's."),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Encode texts, also larger than memory, into one file of token ids, for numpy.load.

    Between two texts goes <|endoftext|>. The file appears when it is complete.
    """
    screen = Screen(quiet)
    with user_input():
        _check_free(out)
        paths = text_files([_found(file) for file in files])
        encoder = _opened(tokenizer)
        special_tokens = encoder.special_tokens
        try:
            screen.say(f"encoding {sum(path.stat().st_size for path in paths):,} bytes")
            with screen.progress("encoding") as show:
                count = encode_files(
                    paths,
                    out,
                    partial(encoder.encode_array, allowed_special="all"),
                    encoder.vocab_size,
                    separator=END_OF_TEXT if END_OF_TEXT in special_tokens else "\n\n",
                    special_tokens=special_tokens,
                    progress=lambda done, total: show(done, total, f"{done / 1e6:,.1f} MB"),
                    word_end=encoder.word_end,
                )
        except KeyboardInterrupt:
            print(f"stopped; {out} was not written", file=sys.stderr)
            return 130
        screen.say(f"they are {count:,} tokens, of a vocabulary of {encoder.vocab_size:,}: {out}")
        hashed = "the text" if len(paths) == 1 else f"the {len(paths)} texts' SHA-256 hashes"
        screen.say(f"SHA-256 of {hashed}: {corpus_hash(paths)}")
    screen.result(out)
    return 0


def _place(name: str) -> str:
    """Where a corpus is on this machine, or what is wrong with it, or how to get it."""
    path = find_corpus(name)
    if path is None:
        return f"not here yet; to download it: {typed()} data get {name}"
    try:
        return str(checked(path, SOURCES[name]))
    except (ValueError, OSError) as error:
        return described(error)


def _found(file: Path) -> Path:
    """The file itself, or the corpus of that name."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(f"{file} is a pipe or device, which cannot be read twice: save it first")
    return corpus_path(str(file)) if str(file) in SOURCES and not file.exists() else file


def _check_free(out: Path) -> None:
    if not out.name:
        raise ValueError("--out names no file: give the path of the file of token ids to write")
    if os.path.lexists(out):
        raise ValueError(f"--out {out} exists, and would be lost: choose another place")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: {out.parent} is read-only, choose another place")


def _opened(directory: Path | None) -> Tokenizer:
    """The tokenizer in a directory; without one, GPT-2's."""
    if directory is None:
        return gpt2()
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"--tokenizer {directory} is no directory with a tokenizer: expected a tokenizer.json "
            "in it, or vocab.json and merges.txt"
        )
    return load(directory)
