"""Where training text comes from: the user's own files, or the text that every Python carries."""

import codecs
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NULS = 0.01  # a larger part of zero bytes than this is no text in UTF-8
# A line that only underlines the heading above it: ****, ====, ----, ~~~~, ^^^^.
UNDERLINE = re.compile(r"^([*=~^-])\1+\n", re.MULTILINE)


def read_corpus(
    paths: str | os.PathLike | Iterable[str | os.PathLike], separator: str = "\n\n"
) -> str:
    """Read one or several UTF-8 text files as one text, in the order given.

    Line ends stay as they are; a byte order mark is dropped. `separator` goes between two files:
    "<|endoftext|>" tells the model that they are unrelated texts.

    Raises FileNotFoundError for a missing file; TypeError for what is no path; ValueError for no
    path, a directory, a file without text, or bytes that are not UTF-8.
    """
    return separator.join("".join(read_blocks(path)) for path in text_files(paths))


def text_files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """One path or several as a list of files that exist. Raises as read_corpus does."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    try:
        paths = [Path(path) for path in paths]
    except TypeError:
        raise TypeError(
            f"paths must be the path of a text file, or several, got {paths!r}"
        ) from None
    if not paths:
        raise ValueError("no corpus: give the path of at least one text file")
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a directory: give the text files inside it")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: check the path of the text file")
    return paths


def read_blocks(path: Path, size: int = 1 << 20) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of `size` bytes: a file may be larger than memory.

    A byte order mark is dropped. Raises ValueError for bytes that are not UTF-8, for UTF-16 (which
    may pass as UTF-8 with zero bytes), and for a file without text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, started, some_text = 0, False, False
    with open(path, "rb") as file:
        while data := file.read(size):
            if offset == 0 and (encoding := _utf16(data)):
                raise ValueError(f"{path} looks like {encoding}: {_to_utf8(path, encoding)}")
            with _utf8_expected(path, offset - len(decoder.getstate()[0])):
                text = decoder.decode(data)
            if not started:
                text, started = text.removeprefix("\ufeff"), bool(text)
            some_text = some_text or bool(text.strip())
            offset += len(data)
            yield text
        with _utf8_expected(path, offset - len(decoder.getstate()[0])):
            decoder.decode(b"", final=True)
    if not some_text:
        raise ValueError(f"{path} is empty, or white space alone: a corpus needs some text")


def _utf16(data: bytes) -> str | None:
    """The name of the encoding if the first bytes of a file are those of UTF-16."""
    if data.startswith(UTF16_MARKS):
        return "UTF-16"
    if data.count(0) <= NULS * len(data):
        return None
    # Without a mark: space and line end, for example, have a zero byte, the more significant one.
    return "UTF-16LE" if data[1::2].count(0) > data[::2].count(0) else "UTF-16BE"


def _to_utf8(path: Path, encoding: str) -> str:
    return (
        "if it is text, convert it first, for example: "
        f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
    )


@contextmanager
def _utf8_expected(path: Path, offset: int) -> Iterator[None]:
    """Says in one line what is wrong with the bytes that are decoded, the first one at `offset`."""
    try:
        yield
    except UnicodeDecodeError as error:
        cut = "the file ends inside a character; if it was cut off, get the whole of it; else, "
        raise ValueError(
            f"{path} is not UTF-8 at byte offset {offset + error.start}: "
            + (cut if error.reason == "unexpected end of data" else "")
            + _to_utf8(path, "LATIN1")
        ) from None


def corpus_hash(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> str:
    """SHA-256 of the content, 64 hexadecimal digits: tells whether a corpus is still the same.

    Of one file it is what `sha256sum` prints; of several, the SHA-256 of their hashes in order,
    each as 32 bytes, so that text cannot move from one file to the next unseen.
    Raises as read_corpus does for no path, a missing file and a directory.
    """
    hashes = []
    for path in text_files(paths):
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256"))
    if len(hashes) == 1:
        return hashes[0].hexdigest()
    return hashlib.sha256(b"".join(each.digest() for each in hashes)).hexdigest()


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
