"""Words and punctuation as tokens: the simplest tokenizer, and why better ones were invented.

Its vocabulary is the sorted list of the words of one text. Any other word is an error or, with an
unknown token, lost. Raschka, "Build a Large Language Model (From Scratch)", sections 2.2 to 2.4.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tinygrad_llm.tokenizer.base import (
    END_OF_TEXT,
    Tokenizer,
    as_text,
    check_names,
    ordinary_pieces,
)
from tinygrad_llm.tokenizer.files import (
    all_by_id,
    check_parts,
    named,
    read_tokenizer,
    read_vocab,
    write_tokenizer,
)

UNKNOWN = "<|unk|>"

# Where to cut, in three steps: at white space; at commas and full stops, too; at all punctuation.
# The group makes re.split keep what it cuts at.
AT_SPACE = re.compile(r"(\s)")
AT_COMMAS = re.compile(r"([,.]|\s)")
AT_PUNCTUATION = re.compile(r"""([,.:;?_!"()']|--|\s)""")

NO_SPACE_BEFORE = tuple(bytes([sign]) for sign in b""",.:;?!"()'""")

# The same cuts for Hugging Face: punctuation is a word, white space is dropped. Python counts four
# control characters as white space that Unicode does not.
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"""[,.:;?_!"()']|--"""},
            "behavior": "Isolated",
            "invert": False,
        },
        {
            "type": "Split",
            "pattern": {"Regex": r"[\s\x1c-\x1f]+"},
            "behavior": "Removed",
            "invert": False,
        },
    ],
}


def split_words(text: str, at: re.Pattern = AT_PUNCTUATION) -> list[str]:
    """The words and punctuation of a text, without white space and empty strings."""
    return [word for word in at.split(text) if word.strip()]


def build_vocabulary(words: Iterable[str], special_tokens: Iterable[str] = ()) -> dict[str, int]:
    """Word -> id: the different words in sorted order, then the special tokens."""
    return {word: i for i, word in enumerate([*sorted(set(words)), *special_tokens])}


class WordTokenizer(Tokenizer):
    """Words and punctuation from a fixed vocabulary: the book's SimpleTokenizerV1 and V2.

    vocab: word -> id. unk_token: the word of the vocabulary that stands for all others (V2); with
    None, another word is an error (V1). special_tokens: the words of the vocabulary that are never
    split. As in the book, `encode` takes them from the text without being asked to.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        unk_token: str | None = None,
        special_tokens: Iterable[str] | None = None,
    ):
        """By default the special tokens are those of "<|endoftext|>" and unk_token in `vocab`.

        Raises ValueError for an empty vocabulary, ids that are negative or not unique, and for
        tokens that are not in the vocabulary.
        """
        if not vocab:
            raise ValueError("the vocabulary is empty: expected at least one word")
        if special_tokens is None:
            special_tokens = [name for name in (END_OF_TEXT, unk_token) if name in vocab]
        special_tokens = check_names(special_tokens)
        for name in [*special_tokens, *([] if unk_token is None else [unk_token])]:
            if name not in vocab:
                raise ValueError(f"{name!r} is not in the vocabulary: add it, or leave it out")
        self.vocab = {word: i for word, i in vocab.items() if word not in special_tokens}
        self.unk_token = unk_token
        self._set_tokens(self.vocab, {name: vocab[name] for name in special_tokens})

    @classmethod
    def train(
        cls,
        text: str,
        special_tokens: Iterable[str] = (END_OF_TEXT, UNKNOWN),
        unk_token: str | None = UNKNOWN,
    ) -> "WordTokenizer":
        """The vocabulary of a text, special tokens last. Without any: the book's V1.

        Raises TypeError if the text is no str; ValueError for a text without words: empty, or
        nothing but white space and special tokens.
        """
        special_tokens = check_names(special_tokens)
        words = [w for piece in ordinary_pieces(special_tokens, text) for w in split_words(piece)]
        if not words:
            raise ValueError("cannot train on an empty text or white space: give some with words")
        return cls(build_vocabulary(words, special_tokens), unk_token, special_tokens)

    @classmethod
    def load(cls, directory: str | Path) -> "WordTokenizer":
        """Open the tokenizer.json that `save` wrote.

        Raises ValueError, which names the file and what was expected in it.
        """
        content, path = read_tokenizer(Path(directory), "WordLevel")
        check_parts(content, path, [("normalizer", None)], "that changes no text: null")
        check_parts(content, path, [("pre_tokenizer", PRE_TOKENIZER)], "that cuts words as we do")
        ordinary, special_tokens = read_vocab(content, path)
        vocab = ordinary | special_tokens
        unk_token = content["model"].get("unk_token")
        if not isinstance(unk_token, str):
            raise ValueError(f"{path}: expected the name of the model's unk_token")
        if unk_token == UNKNOWN and UNKNOWN not in vocab:
            unk_token = None  # as `save` writes it
        with named(path):
            return cls(vocab, unk_token, special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Hugging Face opens.

        Its `decode` leaves the space before punctuation. Raises ValueError if ids are left out,
        OSError if it cannot write.
        """
        unknown = self.unk_token or UNKNOWN  # the file must name one; it need not exist
        vocab = all_by_id(self.vocab | self.special_tokens, Path(directory))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": self.unk_token}
        config["eos_token"] = END_OF_TEXT if END_OF_TEXT in vocab else None
        write_tokenizer(
            Path(directory),
            model={"type": "WordLevel", "vocab": vocab, "unk_token": unknown},
            special_tokens=self.special_tokens,
            config=config,
            pre_tokenizer=PRE_TOKENIZER,
        )

    def encode(
        self,
        text: str,
        allowed_special: str | Iterable[str] = "all",
        disallowed_special: str | Iterable[str] = "all",
    ) -> list[int]:
        """Text to ids; special tokens are allowed unless you say otherwise.

        Raises KeyError for a word that is not in the vocabulary, if there is no unknown token;
        otherwise as Tokenizer.encode does.
        """
        return super().encode(text, allowed_special, disallowed_special)

    def _spaced(self, pieces: Iterator[bytes], first: bool) -> Iterator[bytes]:
        """A space before each but the first; none before punctuation. The text's own are lost."""
        for piece in pieces:
            yield piece if first or piece.startswith(NO_SPACE_BEFORE) else b" " + piece
            first = False

    def _ordinary_ids(self, text: str) -> list[int]:
        return [self._word_id(word) for word in split_words(text)]

    def _word_id(self, word: str) -> int:
        if word in self.vocab:
            return self.vocab[word]
        if self.unk_token is None:
            raise KeyError(
                f"{word!r} is not in the vocabulary of {len(self._tokens)} words: "
                "train on a text that has it, or with an unk_token"
            )
        return self.token_to_id(self.unk_token)

    def _ordinary_id(self, token: str | bytes) -> int | None:
        return self.vocab.get(as_text(token))
