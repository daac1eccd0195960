"""Byte-level byte-pair encoding (BPE), GPT-2's tokenizer: training, encoding, decoding.

Text is split into words, a word is its UTF-8 bytes, and learned merges join neighbouring bytes
into longer tokens. Every byte is a token of its own, so nothing is ever unknown.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from operator import index as as_int
from pathlib import Path

import numpy as np
import regex
import tiktoken

from tinygrad_llm.tokenizer.bpe_files import (
    END_OF_TEXT,
    byte_to_printable,
    printable,
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
CACHED_WORDS = 2**20  # remember no more words than this: memory stays bounded


class BPETokenizer:
    """A byte-level BPE vocabulary. Make one with `train`, `load` or `from_files`.

    merges: pairs of byte strings in the order learned; an earlier merge is applied first.
    token_ids: the id of each single byte and of each merged token.
    special_tokens: the ids of texts that stand for one token and are never split or merged.
    """

    def __init__(
        self, merges: list[Pair], token_ids: dict[bytes, int], special_tokens: dict[str, int]
    ):
        self.merges = list(merges)
        self.token_ids = dict(token_ids)
        self.special_tokens = dict(special_tokens)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._tokens_by_rank = SINGLE_BYTES + [left + right for left, right in self.merges]
        tokens = {i: token for token, i in self.token_ids.items()}
        tokens |= {i: name.encode() for name, i in self.special_tokens.items()}
        self._tokens = [tokens[i] for i in range(len(tokens))]
        self._word_ids = _WordIds(self._merge_word)

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
        vocabulary stays smaller. `progress(done, total)` is called after each merge. Special
        tokens in the text are boundaries and are not learned from.

        Raises TypeError if the text is no str; ValueError for a text without words, a vocab_size
        below 256 + the number of special tokens, or special tokens that cannot be told apart.
        """
        special_tokens = _check_names(special_tokens)
        smallest = 256 + len(special_tokens)
        if as_int(vocab_size) < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {len(special_tokens)} "
                f"special tokens), got {vocab_size}"
            )
        words = Counter()
        for piece, is_special in _split_at(special_tokens, _check_text(text)):
            if not is_special:
                words.update(match.group() for match in WORD.finditer(piece))
        if not words:
            raise ValueError("cannot train on an empty text: give some text to count pairs in")
        word_counts = {word.encode(): count for word, count in words.items()}
        merges = learn_merges(word_counts, vocab_size - smallest, progress)

        tokens = SINGLE_BYTES + [left + right for left, right in merges]
        token_ids = {token: i for i, token in enumerate(tokens)}
        for name in {printable(token) for token in tokens} & set(special_tokens):
            raise ValueError(f"special token {name!r} looks like an ordinary one: choose another")
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
        names = dict.fromkeys(_check_names(special_tokens))  # their ids are in the vocabulary file
        return cls(*read_vocab_and_merges(Path(vocab_file), Path(merges_file), names))

    def save(self, directory: str | Path) -> None:
        """Write the files of Hugging Face: vocab.json, merges.txt, tokenizer.json and its config.

        Makes the directory if needed and replaces each file as a whole. Raises OSError if it
        cannot write.
        """
        write_directory(Path(directory), (self.merges, self.token_ids, self.special_tokens))

    @property
    def vocab_size(self) -> int:
        """The number of tokens: ids are 0..vocab_size-1."""
        return len(self._tokens)

    @property
    def end_of_text(self) -> int:
        """The id of "<|endoftext|>". Raises ValueError if the vocabulary has no such token."""
        return self.token_to_id(END_OF_TEXT)

    def token_to_id(self, token: str | bytes) -> int:
        """The id of one token, given as text (" the", "<|endoftext|>") or as bytes.

        Raises ValueError if this text is not one token.
        """
        if token in self.special_tokens:
            return self.special_tokens[token]
        data = token if isinstance(token, bytes) else _check_text(token).encode()
        if data not in self.token_ids:
            raise ValueError(f"{token!r} is not one token of this vocabulary: use encode")
        return self.token_ids[data]

    def encode(
        self,
        text: str,
        allowed_special: str | Iterable[str] = (),
        disallowed_special: str | Iterable[str] = "all",
    ) -> list[int]:
        """Text to ids. decode(encode(text)) is text again.

        A special token in the text becomes its id if it is in `allowed_special`; otherwise, if it
        is in `disallowed_special`, the text is refused, so that a user's input cannot smuggle one
        in; otherwise it is text like any other. Both take "all" or several names.

        Raises TypeError if the text is no str, ValueError for a special token that is not allowed
        and for half a surrogate pair, which is no character.
        """
        return list(self._ids(text, allowed_special, disallowed_special, self._word_ids))

    def encode_ordinary(self, text: str) -> list[int]:
        """Text to ids, with special tokens in it treated as text like any other."""
        return self.encode(text, disallowed_special=())

    def encode_array(
        self,
        text: str,
        allowed_special: str | Iterable[str] = (),
        disallowed_special: str | Iterable[str] = "all",
    ) -> np.ndarray:
        """The ids of `encode` for a long text: (N,) uint16, or uint32 if uint16 is too small.

        tiktoken merges each new word, with the same result as our own loop. It is faster, above all
        for very long words, where our loop takes up to (length of the word)**2 steps.
        """
        word_ids = _WordIds(self._merge_word if self._tiktoken is None else self._tiktoken_word)
        ids = self._ids(text, allowed_special, disallowed_special, word_ids)
        return np.fromiter(ids, dtype=np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Any bytes to ids: decode_bytes(encode_bytes(data)) is data again.

        UTF-8 gets the ids of its text, as in `encode_ordinary`; other bytes count as signs.
        Raises TypeError for anything but bytes.
        """
        if not isinstance(data, bytes | bytearray):
            raise TypeError(f"data must be bytes, got {type(data).__name__}: encode takes text")
        return list(self._ordinary_ids(data.decode(*BYTES_AS_TEXT), self._word_ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD, the replacement character.

        Raises TypeError for anything but integers, IndexError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to the bytes they stand for. Raises as `decode` does."""
        if isinstance(ids, np.ndarray):
            ids = ids.tolist()  # Python's integers are faster to loop over
        if not isinstance(ids, Iterable):
            raise TypeError(f"ids must be a sequence of integers, got {type(ids).__name__}")
        return b"".join(map(self._token, ids))

    def _token(self, token_id: int) -> bytes:
        try:
            token_id = as_int(token_id)
        except TypeError:
            raise TypeError(
                f"token ids must be integers, got {type(token_id).__name__}: "
                "decode one sequence at a time"
            ) from None
        if not 0 <= token_id < len(self._tokens):
            raise IndexError(
                f"token id {token_id} is outside this vocabulary: ids are 0..{self.vocab_size - 1}"
            )
        return self._tokens[token_id]

    def _ids(
        self,
        text: str,
        allowed_special: str | Iterable[str],
        disallowed_special: str | Iterable[str],
        word_ids: "_WordIds",
    ) -> Iterator[int]:
        _check_text(text)
        allowed = self._special_names(allowed_special)
        for name in self._special_names(disallowed_special) - allowed:
            if name in text:
                raise ValueError(
                    f"the text contains the special token {name!r}: to encode it as one token, "
                    f"pass allowed_special=[{name!r}]; as ordinary text, use encode_ordinary"
                )
        for piece, is_special in _split_at(allowed, text):
            if is_special:
                yield self.special_tokens[piece]
            else:
                yield from self._ordinary_ids(piece, word_ids)

    def _special_names(self, names: str | Iterable[str]) -> set[str]:
        if names == "all":
            return set(self.special_tokens)
        names = {names} if isinstance(names, str) else set(names)
        unknown = sorted(names - self.special_tokens.keys())
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is no special token of this vocabulary: "
                f"it has {list(self.special_tokens)}"
            )
        return names

    def _ordinary_ids(self, text: str, word_ids: "_WordIds") -> Iterator[int]:
        for match in WORD.finditer(text):
            yield from word_ids[match.group()]

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

    def _tiktoken_word(self, word: str) -> list[int]:
        ranks = self._tiktoken.encode_ordinary(word)
        return [self.token_ids[self._tokens_by_rank[rank]] for rank in ranks]

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding | None:
        """Our merges in tiktoken, or None if it would merge differently.

        tiktoken looks for a merge by the bytes that it gives, we look for its two parts. This is
        the same if each token's own bytes are merged to that token. Training ensures it; a
        hand-made merges.txt may not.
        """
        for left, right in self.merges:
            if len(self._merge(left + right)) > 1:
                return None
        return tiktoken.Encoding(
            "bpe",
            pat_str=r"(?s).+",  # it gets one word at a time: we split the text
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens_by_rank)},
            special_tokens={},
        )


class _WordIds(dict):
    """The ids of each word met so far: most words of a text have been seen before."""

    def __init__(self, encode_word: Callable[[str], list[int]]):
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode_word(word)
        if len(self) < CACHED_WORDS:
            self[word] = ids
        return ids


def _check_names(special_tokens: Iterable[str]) -> list[str]:
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens must be a list of texts: write [{special_tokens!r}]")
    names = list(special_tokens)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"special tokens must be different texts, none of them empty, got {names}")
    return names


def _check_text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text must be str, got {type(text).__name__}: encode_bytes takes bytes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair, which is no character, at index {error.start}"
        ) from None
    return text


def _split_at(special_tokens: Iterable[str], text: str) -> Iterator[tuple[str, bool]]:
    """Cut the text around special tokens: (piece, whether it is one). Longer names come first."""
    names = sorted(special_tokens, key=len, reverse=True)
    if not names:
        yield text, False
        return
    pieces = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text)
    for number, piece in enumerate(pieces):
        yield piece, number % 2 == 1  # the group in the pattern keeps what it splits at
