"""Where training text comes from: the user's own files, or the text that every Python carries."""

import codecs
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# A line that only underlines the heading above it: ****, ====, ----, ~~~~, ^^^^.
UNDERLINE = re.compile(r"^([*=~^-])\1+\n", re.MULTILINE)


def read_corpus(
    paths: str | os.PathLike | Iterable[str | os.PathLike], separator: str = "\n\n"
) -> str:
    """Read one or several UTF-8 text files as one text, in the order given.

    Line ends stay as they are; a byte order mark is dropped. `separator` goes between two files:
    "<|endoftext|>" tells the model that they are unrelated texts.

    Raises FileNotFoundError for a missing file; ValueError for no path, a directory, a file
    without text, or bytes that are not UTF-8.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    texts = [_read_text(Path(path)) for path in paths]
    if not texts:
        raise ValueError("no corpus: give the path of at least one text file")
    return separator.join(texts)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the text files inside it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path of the text file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise ValueError(
            f"{path} is not UTF-8 at byte offset {error.start}: if it is text, convert it first, "
            f"for example: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 "
            f"{shlex.quote(str(path))} > utf8.txt"
        ) from None
    text = text.removeprefix(codecs.BOM_UTF8.decode())
    if not text.strip():
        raise ValueError(f"{path} is empty, or white space alone: a corpus needs some text")
    return text


def embedded_corpus() -> str:
    """Python's language reference as plain text, about 460 KB, available without any download.

    Python's own `help()` reads it from `pydoc_data.topics`. Topics come sorted by name, so one
    Python version always gives the same text; another version has other wording. Some
    topics repeat parts of others, so a validation loss on this text flatters the model.

    Raises FileNotFoundError if this Python was installed without its help texts.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "this Python has no help texts (module pydoc_data.topics): give a text file instead"
        ) from None
    texts = [UNDERLINE.sub("", topics[name]).strip() for name in sorted(topics)]
    return "\n\n".join(texts) + "\n"
