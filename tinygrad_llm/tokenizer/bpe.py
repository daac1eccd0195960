"""Byte-level byte-pair encoding (BPE), GPT-2's tokenizer: training, encoding, decoding.

Text is split into words, a word is its UTF-8 bytes, and learned merges join neighbouring bytes
into longer tokens. Every byte is a token of its own, so nothing is ever unknown.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken

from tinygrad_llm.tokenizer.base import (
    END_OF_TEXT,
    Tokenizer,
    WordIds,
    check_names,
    check_vocab_size,
    ordinary_pieces,
)
from tinygrad_llm.tokenizer.bpe_files import (
    byte_to_printable,
    check_bytes,
    check_merges,
    printable_to_byte,
    read_directory,
    read_vocab_and_merges,
    write_directory,
)
from tinygrad_llm.tokenizer.bpe_train import Pair, learn_merges, merge_pair

# GPT-2's words: English contractions, letters, digits, other signs, each with the space before it;
# of a run of white space, the last character is left for the next word. Merges stay inside words.
# What counts as a letter follows the Unicode version of `regex`: for characters that are newer than
# tiktoken or Hugging Face know, their words, and so their ids, may differ from ours.
WORD = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)

SINGLE_BYTES = [bytes([byte]) for byte in byte_to_printable()]  # in the order of GPT-2's ids
BYTES_AS_TEXT = ("utf-8", "surrogateescape")  # a stand-in character for each byte that is no UTF-8


class BPETokenizer(Tokenizer):
    """A byte-level BPE vocabulary. Make one with `train`, `load` or `from_files`.

    merges: pairs of byte strings in the order learned; an earlier merge is applied first.
    token_ids: the id of each single byte and of each merged token.
    special_tokens: the ids of texts that stand for one token and are never split or merged.
    """

    def __init__(
        self,
        merges: Iterable[Pair],
        token_ids: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
    ):
        """Raises ValueError for what does not fit together, TypeError for a token not in bytes."""
        self.merges = list(merges)
        self.token_ids = dict(token_ids)
        self._set_tokens(token_ids, special_tokens)
        check_bytes(token_ids)
        check_merges(self.merges, token_ids)
        _check_spelling(special_tokens, token_ids)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._word_ids = WordIds(self._merge_word)

    @classmethod
    def train(
        cls,
        text: str,
        vocab_size: int,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        progress: Callable[[int, int], None] | None = None,
    ) -> "BPETokenizer":
        """Learn a vocabulary of `vocab_size` tokens: 256 bytes, merges, special tokens last.

        Each merge joins the most frequent pair of neighbouring tokens; of equally frequent pairs,
        the one that appeared first. When every word is one token, training stops early and the
        vocabulary stays smaller: of "a" or " ", it is the bytes alone. White space is text like any
        other. Special tokens in the text are boundaries and are not learned from.
        `progress(done, total)` is called after each merge.

        Raises TypeError if the text is no str; ValueError for an empty text (or nothing but special
        tokens), a vocab_size below 256 + the number of special tokens, or special tokens that
        cannot be told apart.
        """
        special_tokens = check_names(special_tokens)
        smallest = 256 + len(special_tokens)
        why = f"256 bytes and {len(special_tokens)} special tokens"
        vocab_size = check_vocab_size(vocab_size, smallest, why)
        words = Counter()
        for piece in ordinary_pieces(special_tokens, text):
            words.update(match.group() for match in WORD.finditer(piece))
        if not words:
            raise ValueError("cannot train on an empty text: give some besides special tokens")
        word_counts = {word.encode(): count for word, count in words.items()}
        merges = learn_merges(word_counts, vocab_size - smallest, progress)

        tokens = SINGLE_BYTES + [left + right for left, right in merges]
        token_ids = {token: i for i, token in enumerate(tokens)}
        special_ids = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        return cls(merges, token_ids, special_ids)

    @classmethod
    def load(cls, directory: str | Path) -> "BPETokenizer":
        """Open a tokenizer that `save` or Hugging Face's `save_pretrained` wrote.

        Reads tokenizer.json, or vocab.json and merges.txt; if all are there, they must agree.
        Raises ValueError, which names the file and what was expected in it.
        """
        return cls(*read_directory(Path(directory)))

    @classmethod
    def from_files(
        cls,
        vocab_file: str | Path,
        merges_file: str | Path,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
    ) -> "BPETokenizer":
        """Open GPT-2's pair of files under any names: OpenAI's are encoder.json and vocab.bpe.

        Raises ValueError, which names the file and what was expected in it.
        """
        names = dict.fromkeys(check_names(special_tokens))  # their ids are in the vocabulary file
        return cls(*read_vocab_and_merges(Path(vocab_file), Path(merges_file), names))

    def save(self, directory: str | Path) -> None:
        """Write the files of Hugging Face: vocab.json, merges.txt, tokenizer.json and its config.

        Makes the directory if needed and replaces each file as a whole. Raises ValueError if ids
        are left out, OSError if it cannot write.
        """
        write_directory(Path(directory), (self.merges, self.token_ids, self.special_tokens))

    def encode_array(
        self,
        text: str,
        allowed_special: str | Iterable[str] = (),
        disallowed_special: str | Iterable[str] = "all",
    ) -> np.ndarray:
        """The ids of `encode` for a long text: (N,) uint16, or uint32 if uint16 is too small.

        tiktoken does the work, with the same result as our own loop. It is faster, above all
        for very long words, where our loop takes up to (length of the word)**2 steps.
        """
        ids = self._ids(text, allowed_special, disallowed_special, self._fast_ids)
        return np.fromiter(ids, self._id_dtype, len(ids))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Any bytes to ids: decode_bytes(encode_bytes(data)) is data again.

        UTF-8 gets the ids of its text, as in `encode_ordinary`; other bytes count as signs.
        Raises TypeError for anything but bytes.
        """
        if not isinstance(data, bytes | bytearray):
            raise TypeError(f"data must be bytes, got {type(data).__name__}: encode takes text")
        return list(self._ordinary_ids(data.decode(*BYTES_AS_TEXT)))

    def to_tiktoken(self, name: str = "bpe") -> tiktoken.Encoding:
        """The same vocabulary in tiktoken, special tokens included.

        tiktoken looks for a merge by the bytes that it gives, we look for its two parts. This is
        the same if each token's own bytes are merged to that token; and ids must be in the order
        of the merges, because tiktoken has one number for both. Training ensures it; a hand-made
        merges.txt may not. Raises ValueError if tiktoken would merge differently.
        """
        ids = [self.token_ids[left + right] for left, right in self.merges]
        if ids != sorted(ids):
            raise ValueError("tiktoken needs ids in the order of the merges: these are not")
        for left, right in self.merges:
            if len(self._merge(left + right)) > 1:
                raise ValueError(
                    f"tiktoken would merge {left + right!r} to one token, these merges do not"
                )
        return tiktoken.Encoding(
            name,
            pat_str=WORD.pattern,
            mergeable_ranks=self.token_ids,
            special_tokens=dict(self.special_tokens),
        )

    def _bytes_of(self, token: bytes) -> bytes:
        if not isinstance(token, bytes):
            raise TypeError(f"tokens must be bytes, got {token!r}: encode text first")
        return token

    def _check_new(self, name: str) -> None:
        super()._check_new(name)
        _check_spelling([name], self.token_ids)

    def _ordinary_id(self, token: str | bytes) -> int | None:
        return self.token_ids.get(token if isinstance(token, bytes) else token.encode())

    def _ordinary_ids(self, text: str) -> Iterator[int]:
        for match in WORD.finditer(text):
            yield from self._word_ids[match.group()]

    def _fast_ids(self, text: str) -> Iterable[int]:
        """The same by tiktoken, which cuts the text into words, too."""
        if self._tiktoken is None:
            return self._ordinary_ids(text)
        if not _words_are_alike(text):  # only some are, then
            return (i for match in WORD.finditer(text) for i in self._fast_word(match.group()))
        return self._tiktoken.encode_ordinary(text)

    def _fast_word(self, word: str) -> list[int]:
        alike = _words_are_alike(word)
        return self._tiktoken.encode_ordinary(word) if alike else self._word_ids[word]

    def _merge_word(self, word: str) -> list[int]:
        return self._merge(word.encode(*BYTES_AS_TEXT))

    def _merge(self, word: bytes) -> list[int]:
        """BPE itself: join the pair that was learned first, until no learned pair is left."""
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, math.inf))
            if pair not in self._ranks:
                break
            parts = merge_pair(parts, pair)
        return [self.token_ids[part] for part in parts]

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding | None:
        try:
            return self.to_tiktoken()
        except ValueError:
            return None


def _check_spelling(special_tokens: Iterable[str], tokens: Collection[bytes]) -> None:
    """In vocab.json, a special token and an ordinary one must not look the same."""
    table = printable_to_byte()
    for name in special_tokens:
        if table.keys() >= set(name) and bytes(map(table.get, name)) in tokens:
            raise ValueError(f"special token {name!r} looks like an ordinary one: choose another")


def _words_are_alike(text: str) -> bool:
    """Whether tiktoken cuts this text into the same words as `regex` does.

    They may know different versions of Unicode, so they are asked about each character.
    """
    if text.isascii():
        return True
    characters = "".join(set(text))
    return all(
        bytes(_finder(kind).encode_ordinary(characters)).decode()
        == "".join(regex.findall(kind, characters))
        for kind in (r"\p{L}", r"\p{N}", r"\s")
    )


@cache
def _finder(pattern: str) -> tiktoken.Encoding:
    """The bytes of what matches the pattern in tiktoken; it leaves out what does not."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
