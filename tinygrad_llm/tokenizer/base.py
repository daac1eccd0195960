"""What every tokenizer here can do, and how all of them treat special tokens and bad input."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import index as as_int
from pathlib import Path

import numpy as np
import regex

from tinygrad_llm.data.streaming import WORD_END

END_OF_TEXT = "<|endoftext|>"
CACHED_WORDS = 2**20  # remember no more words than this: memory stays bounded


class Tokenizer(ABC):
    """Text to ids and back: the interface of all tokenizers.

    special_tokens: the ids of texts that stand for one token and are never split or merged.

    A subclass says how it encodes text without special tokens (`_ordinary_ids`), where spaces go
    between tokens (`_spaced`), which ordinary tokens it has (`_ordinary_id`, and `_set_tokens` for
    their ids), and what its files hold. The ids of a vocabulary made by hand may leave some out; in
    a file, a hole is damage, so `save` refuses them.
    """

    word_end = WORD_END  # where a text may be cut in two without changing its ids
    special_tokens: dict[str, int]
    _tokens: dict[int, bytes]  # id -> what it decodes to, of special tokens, too; the last id last

    @classmethod
    @abstractmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Open what `save` wrote. Raises ValueError, which names the file and what is wrong."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write files that Hugging Face's `tokenizers` and `transformers` open, too.

        Makes the directory if needed and replaces each file as a whole. Raises ValueError unless
        each id from 0 to the last is a token's, so that a damaged file can be told; OSError if it
        cannot write.
        """

    @abstractmethod
    def _ordinary_ids(self, text: str) -> Iterable[int]:
        """The ids of text in which nothing is special."""

    @abstractmethod
    def _ordinary_id(self, token: str | bytes) -> int | None:
        """The id of an ordinary token, or None if there is no such token."""

    def _set_tokens(
        self, ordinary: Mapping[str | bytes, int], special_tokens: Mapping[str, int]
    ) -> None:
        """Keep the special tokens, and what each id decodes to.

        Raises TypeError for a token of another type, ValueError unless each has an id of its own.
        """
        check_names(special_tokens)
        for name in special_tokens.keys() & ordinary.keys():
            raise ValueError(f"special token {name!r} looks like an ordinary one: choose another")
        used = set()
        for token, token_id in [*ordinary.items(), *special_tokens.items()]:
            if type(token_id) is not int or token_id < 0 or token_id in used:
                raise ValueError(
                    f"token {token!r} has the id {token_id!r}: expected a different whole number "
                    "from 0 on for each token"
                )
            used.add(token_id)
        self.special_tokens = dict(special_tokens)
        tokens = {i: self._bytes_of(token) for token, i in ordinary.items()}
        tokens |= {i: name.encode() for name, i in special_tokens.items()}
        self._tokens = dict(sorted(tokens.items()))

    def _bytes_of(self, token: str | bytes) -> bytes:
        """What an ordinary token decodes to. Raises TypeError or ValueError if it is no token."""
        return check_text(token).encode()

    @property
    def vocab_size(self) -> int:
        """One more than the last id: the rows that an embedding needs. Ids may leave some out."""
        return next(reversed(self._tokens)) + 1

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
        token_id = self._ordinary_id(token if isinstance(token, bytes) else check_text(token))
        if token_id is None:
            raise ValueError(f"{token!r} is not one token of this vocabulary: use encode")
        return token_id

    def add_tokens(self, tokens: Iterable[str]) -> list[int]:
        """Add special tokens after the last id, and return the ids of all `tokens`.

        Those that are special tokens already keep their id. A model needs a row for each new id:
        `model.resize_token_embeddings(tokenizer.vocab_size)`.

        Raises ValueError for an empty text, equal ones, and what is an ordinary token already.
        """
        names = check_names(tokens)
        new = [name for name in names if name not in self.special_tokens]
        for name in new:
            self._check_new(name)
        for token_id, name in enumerate(new, start=self.vocab_size):
            self.special_tokens[name] = token_id
            self._tokens[token_id] = name.encode()
        return [self.special_tokens[name] for name in names]

    def _check_new(self, name: str) -> None:
        """Raises ValueError if this text cannot become a special token."""
        token_id = self._ordinary_id(name)
        if token_id is not None:
            raise ValueError(
                f"{name!r} is an ordinary token already, with id {token_id}: add another text"
            )

    def encode(
        self,
        text: str,
        allowed_special: str | Iterable[str] = (),
        disallowed_special: str | Iterable[str] = "all",
    ) -> list[int]:
        """Text to ids.

        A special token in the text becomes its id if it is in `allowed_special`; otherwise, if it
        is in `disallowed_special`, the text is refused, so that a user's input cannot smuggle one
        in; otherwise it is text like any other. Both take "all" or several names.

        Raises TypeError if the text is no str; ValueError for a special token that is not allowed,
        for a name that is no special token, and for half a surrogate pair, which is no character.
        """
        return self._ids(text, allowed_special, disallowed_special, self._ordinary_ids)

    def encode_ordinary(self, text: str) -> list[int]:
        """Text to ids, with special tokens in it treated as text like any other."""
        return list(self._ordinary_ids(check_text(text)))

    def encode_array(
        self,
        text: str,
        allowed_special: str | Iterable[str] = (),
        disallowed_special: str | Iterable[str] = "all",
    ) -> np.ndarray:
        """The ids of `encode` for a long text: (N,) uint16, or uint32 if uint16 is too small."""
        ids = self.encode(text, allowed_special, disallowed_special)
        return np.fromiter(ids, self._id_dtype, len(ids))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Ids to text. Bytes that are no UTF-8 become U+FFFD, the replacement character.

        With errors="strict" they raise ValueError, which says where they are. Raises TypeError for
        anything but integers, IndexError for an id outside the vocabulary.
        """
        if errors not in ("replace", "strict"):
            raise ValueError(f'errors must be "replace" or "strict", got {errors!r}')
        data = self.decode_bytes(ids)
        try:
            return data.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the ids stand for bytes that are no UTF-8 at byte offset {error.start}: "
                'expected whole characters; errors="replace" shows U+FFFD instead'
            ) from None

    def decode_bytes(self, ids: Iterable[int], first: bool = True) -> bytes:
        """Ids to the bytes of their text. Raises as `decode` does.

        first: whether the text begins here; a word that follows others has a space before it.
        """
        return b"".join(self._spaced(self._pieces(ids), first))

    def _spaced(self, pieces: Iterator[bytes], first: bool) -> Iterator[bytes]:
        """The pieces as they stand in a text: nothing to do if they bring their own spaces."""
        return pieces

    @property
    def _id_dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def _pieces(self, ids: Iterable[int]) -> Iterator[bytes]:
        """The bytes of each token."""
        if hasattr(ids, "__array__"):  # of NumPy, a Tensor, PyTorch
            ids = np.asarray(ids)
            if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
                raise TypeError(
                    f"token ids must be one sequence of integers, got {ids.dtype} of shape "
                    f"{ids.shape}: decode one sequence at a time"
                )
            ids = ids.tolist()  # Python's integers are faster to loop over
        if not isinstance(ids, Iterable):
            raise TypeError(
                f"token ids must be a sequence of integers, got {type(ids).__name__}: "
                "put a single id in a list"
            )
        return map(self._token, ids)

    def _token(self, token_id: int) -> bytes:
        try:
            token_id = as_int(token_id)
        except TypeError:
            raise TypeError(
                f"token ids must be integers, got {type(token_id).__name__}: "
                "decode one sequence at a time"
            ) from None
        if token_id not in self._tokens:
            last = self.vocab_size - 1
            which = f"ids are 0..{last}"
            if len(self._tokens) <= last:
                which = f"it has {len(self._tokens)} of the ids 0..{last}, and not this one"
            raise IndexError(f"token id {token_id} is outside this vocabulary: {which}")
        return self._tokens[token_id]

    def _ids(
        self,
        text: str,
        allowed_special: str | Iterable[str],
        disallowed_special: str | Iterable[str],
        ordinary_ids: Callable[[str], Iterable[int]],
    ) -> list[int]:
        """The ids of a text, with `ordinary_ids` for what is between the special tokens."""
        check_text(text)
        allowed = self._special_names(allowed_special)
        for name in self._special_names(disallowed_special):
            if name in text and name not in allowed:
                raise ValueError(
                    f"the text contains the special token {name!r}: to encode it as one token, "
                    f"pass allowed_special=[{name!r}]; as ordinary text, use encode_ordinary"
                )
        found = [name for name in allowed if name in text]
        if not found:  # most texts have none: no need to cut
            return list(ordinary_ids(text))
        ids: list[int] = []
        for piece, is_special in split_at(found, text):
            if is_special:
                ids.append(self.special_tokens[piece])
            else:
                ids.extend(ordinary_ids(piece))
        return ids

    def _special_names(self, names: str | Iterable[str]) -> Collection[str]:
        if isinstance(names, str):
            if names == "all":
                return self.special_tokens
            names = [names]
        if not isinstance(names, Iterable):
            raise TypeError(
                f'special tokens must be "all" or a list of texts, got {type(names).__name__}: '
                "for none, write []"
            )
        names = list(names)
        for name in names:
            if not isinstance(name, str) or name not in self.special_tokens:
                raise ValueError(
                    f"{name!r} is no special token of this vocabulary: "
                    f"it has {list(self.special_tokens)}"
                )
        return names


def check_names(special_tokens: Iterable[str]) -> list[str]:
    """The special tokens as a list. Raises TypeError for no list, ValueError for bad names."""
    if isinstance(special_tokens, str):
        raise TypeError(f"special tokens must be a list of texts: write [{special_tokens!r}]")
    if not isinstance(special_tokens, Iterable):
        raise TypeError(
            f"special tokens must be a list of texts, got {type(special_tokens).__name__}: "
            "for none, write []"
        )
    names = list(special_tokens)
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"special tokens must be different texts, none of them empty, got {names}")
    return [check_text(name) for name in names]


def check_unknown(special_tokens: Iterable[str], unknown: str) -> None:
    """Raises ValueError unless the token that stands for unknown text is among the special ones."""
    if unknown not in special_tokens:
        raise ValueError(f"special_tokens must have {unknown!r}, got {list(special_tokens)}")


def check_text(text: str) -> str:
    """The text itself. Raises TypeError if it is no str, ValueError for half a surrogate pair."""
    if not isinstance(text, str):
        hint = ": decode bytes first, or give them to encode_bytes of a BPE tokenizer"
        is_bytes = isinstance(text, bytes | bytearray)
        raise TypeError(f"text must be str, got {type(text).__name__}{hint if is_bytes else ''}")
    try:
        text.isascii() or text.encode()  # of most texts, the first takes no time
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair, which is no character, at index {error.start}"
        ) from None
    return text


def as_text(token: str | bytes) -> str:
    """The text of a token that may be given in bytes, whatever they are."""
    return token.decode("utf-8", "surrogateescape") if isinstance(token, bytes) else token


def check_vocab_size(vocab_size: int, smallest: int, why: str) -> int:
    """The vocab_size as an int. Raises TypeError if it is none, ValueError if it is too small."""
    try:
        size = as_int(vocab_size)
    except TypeError:
        raise TypeError(f"vocab_size must be an integer, got {vocab_size!r}") from None
    if size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} ({why}), got {size}")
    return size


def split_at(special_tokens: Iterable[str], text: str) -> Iterator[tuple[str, bool]]:
    """Cut the text around special tokens: (piece, whether it is one). Longer names come first."""
    names = sorted(special_tokens, key=len, reverse=True)
    if not names:
        yield text, False
        return
    pieces = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text)
    for number, piece in enumerate(pieces):
        yield piece, number % 2 == 1  # the group in the pattern keeps what it splits at


def ordinary_pieces(special_tokens: Iterable[str], text: str) -> Iterator[str]:
    """What is between the special tokens of a text to train on."""
    for piece, is_special in split_at(special_tokens, check_text(text)):
        if not is_special:
            yield piece


class WordIds(dict):
    """The ids of each word met so far: most words of a text have been seen before."""

    def __init__(self, encode_word: Callable[[str], list[int]]):
        super().__init__()
        self.encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode_word(word)
        if len(self) < CACHED_WORDS:
            self[word] = ids
        return ids
