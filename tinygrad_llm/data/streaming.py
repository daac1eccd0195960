"""Text files larger than memory to a file of token ids, a block at a time.

The ids are those of the whole text: blocks end where no token can reach across.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import ArrayLike

from tinygrad_llm.data.corpus import read_blocks, text_files
from tinygrad_llm.data.files import atomic_write
from tinygrad_llm.data.tokens import as_tokens

# Where the words of most tokenizers end: behind a letter or digit that a space or line end follows,
# and between two lines that are not empty, unless the second begins with the "/" of a comment: in
# o200k, GPT-4o's, a word of signs takes in line ends and "/" behind it.
WORD_END = re.compile(r"[^\W_](?=[ \n])|\S\n(?=[^\s/])")
# Where those of a Unigram tokenizer end: only a space begins a new one, they go on across lines.
BEFORE_SPACE = re.compile(r"[^\W_](?= )")
BLOCK = 1 << 20  # bytes read at a time
NEAR = 1 << 12  # characters: where the last such place usually is


def encode_files(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    out: str | Path,
    encode: Callable[[str], ArrayLike],
    vocab_size: int,
    separator: str = "\n\n",
    special_tokens: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
    word_end: re.Pattern = WORD_END,
) -> int:
    """Encode UTF-8 text files, as one text, into a `.npy` file of token ids; returns their number.

    encode          text -> ids 0..vocab_size-1, by a tokenizer whose words end at the latest where
                    WORD_END finds it (GPT-2's, GPT-4's, GPT-4o's, words, WordPiece), or where
                    word_end does. Then the ids are those of encode(read_corpus(paths, separator))
    separator       goes between two files
    special_tokens  texts that stand for one token and are never cut
    progress        progress(done, total) is called after each block, in bytes
    word_end        where the text may be cut: the tokenizer's own word_end

    The file opens with open_tokens: uint16 if vocab_size fits, else uint32. It appears when it is
    complete; a run that fails or is killed leaves what was there. Memory does not grow with
    the text, only with the longest stretch that has no end of a word as word_end finds it.

    Raises FileNotFoundError, TypeError and ValueError for paths as read_corpus does; ValueError,
    which names the file, for what `encode` refuses and for ids outside of the vocabulary;
    ValueError if `out` is one of the texts, OSError if it cannot be written.
    """
    files = text_files(paths)
    if Path(out).exists() and any(file.samefile(out) for file in files):
        raise ValueError(f"{out} is one of the texts, and would be lost: give another place")
    total = sum(file.stat().st_size for file in files)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    count = 0
    with atomic_write(out) as tokens:
        _write_header(tokens, dtype, count)
        for text, done, file in _blocks(files, separator, special_tokens, word_end):
            try:
                ids = _checked(encode(text), vocab_size)
            except (KeyError, ValueError) as error:  # a KeyError is a word that has no id
                reason = error.args[0] if isinstance(error, KeyError) else error
                raise ValueError(f"reading {file}: {reason}") from error
            tokens.write(ids.astype(dtype, copy=False).tobytes())
            count += len(ids)
            if progress is not None:
                progress(done, total)
        if not count:
            raise ValueError(f"{files[0]} gives no tokens: a corpus needs some text")
        tokens.seek(0)
        _write_header(tokens, dtype, count)  # as long as before: NumPy leaves room for any count
    return count


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    write_array_header_1_0(file, header)


def _checked(ids: ArrayLike, vocab_size: int) -> np.ndarray:
    ids = as_tokens(ids)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"token ids are {ids.min()}..{ids.max()}, but vocab_size is {vocab_size}: "
            "give the size of the tokenizer that encodes"
        )
    return ids


def _blocks(
    files: list[Path], separator: str, special_tokens: Iterable[str], word_end: re.Pattern
) -> Iterator[tuple[str, int, Path]]:
    """The whole text in pieces that can be encoded one by one; the bytes read, and from where."""
    uncut = [name for name in special_tokens if re.search(r"\s", name)]
    rest, done = "", 0
    for number, path in enumerate(files):
        rest += separator if number else ""
        for text in read_blocks(path, BLOCK):
            done += len(text.encode())
            rest += text
            if cut := _last_cut(rest, uncut, word_end):
                yield rest[:cut], done, path
                rest = rest[cut:]
    if rest:
        yield rest, done, path


def _last_cut(text: str, uncut: list[str], word_end: re.Pattern) -> int:
    """The last place where the text can be cut, 0 if there is none."""
    # One of `uncut` may begin near the end, and go on in the next block.
    end = max(0, len(text) - max(map(len, uncut), default=0))
    for start in (max(0, end - NEAR), 0):
        for match in reversed(list(word_end.finditer(text, start, end))):
            cut = match.end()
            if not any(n in text[max(0, cut - len(n) + 1) : cut + len(n) - 1] for n in uncut):
                return cut
    return 0
