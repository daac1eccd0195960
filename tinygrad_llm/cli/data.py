"""`tinygrad-llm data`: corpora by name, and text files of any size as files of token ids."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tiktoken
import typer

from ..data import corpus_hash, corpus_path, encode_files
from ..data.corpus import text_files
from ..data.named import FOLDER, SOURCES, find_corpus
from ..tokenizer import BPETokenizer
from ..tokenizer.bpe_files import END_OF_TEXT
from .errors import user_input
from .screen import Screen

data = typer.Typer(help="Download corpora, and turn texts of any size into token ids.")
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and the file's path only.")]


@data.command("list")
def list_corpora() -> int:
    """List the corpora that have a name, and where they are on this machine."""
    screen = Screen(quiet=False)
    for name, source in SOURCES.items():
        path = find_corpus(name)
        screen.say(f"{name:<17} {source.about}")
        screen.say(f"{'':<17} {path or f'not here yet; to download it: data get {name}'}")
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
        encode, vocab_size, special_tokens = _tokenizer(tokenizer)
        try:
            screen.say(f"encoding {sum(path.stat().st_size for path in paths):,} bytes")
            with screen.progress("encoding") as show:
                count = encode_files(
                    paths,
                    out,
                    encode,
                    vocab_size,
                    separator=END_OF_TEXT if END_OF_TEXT in special_tokens else "\n\n",
                    special_tokens=special_tokens,
                    progress=lambda done, total: show(done, total, f"{done / 1e6:,.1f} MB"),
                )
        except KeyboardInterrupt:
            print(f"stopped; {out} was not written", file=sys.stderr)
            return 130
        screen.say(f"they are {count:,} tokens, of a vocabulary of {vocab_size:,}: {out}")
        screen.say(f"SHA-256 of the text: {corpus_hash(paths)}")
    screen.result(out)
    return 0


def _found(file: Path) -> Path:
    """The file itself, or the corpus of that name."""
    return corpus_path(str(file)) if str(file) in SOURCES and not file.exists() else file


def _check_free(out: Path) -> None:
    if out.exists():
        raise ValueError(f"--out {out} exists, and would be lost: choose another place")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: {out.parent} is read-only, choose another place")


def _tokenizer(directory: Path | None) -> tuple[Callable[[str], Any], int, list[str]]:
    """How to encode a text with its special tokens, the number of ids, the special tokens."""
    if directory is None:
        gpt2 = _gpt2()
        return lambda text: gpt2.encode(text, allowed_special="all"), gpt2.n_vocab, [END_OF_TEXT]
    if not directory.is_dir():
        raise ValueError(f"--tokenizer {directory} is no directory: give one with a tokenizer.json")
    ours = BPETokenizer.load(directory)
    names = list(ours.special_tokens)
    return lambda text: ours.encode_array(text, allowed_special="all"), ours.vocab_size, names


def _gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # of the network
        raise ValueError(
            f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): check the network, "
            "let TIKTOKEN_CACHE_DIR name a folder that has it, or give --tokenizer DIR"
        ) from None
