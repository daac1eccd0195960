"""tiktoken's vocabularies behind the interface of all tokenizers: GPT-2's, or any trained here."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import tiktoken

from tinygrad_llm.tokenizer.base import Tokenizer
from tinygrad_llm.tokenizer.bpe import WORD, BPETokenizer
from tinygrad_llm.tokenizer.bpe_train import Pair

# GPT-2's words as we write them, and as tiktoken does, before version 0.8 and since then: it is
# faster where a run is never given back ("++").
GPT2_WORDS = {
    WORD.pattern,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}


class TiktokenTokenizer(Tokenizer):
    """A tiktoken.Encoding as a tokenizer: the same ids as BPETokenizer, and many times faster."""

    def __init__(self, encoding: tiktoken.Encoding):
        """encoding: from tiktoken.get_encoding, or from BPETokenizer.to_tiktoken."""
        names = encoding.special_tokens_set
        self.encoding = encoding
        self.special_tokens = {name: encoding.encode_single_token(name) for name in sorted(names)}
        self._token_ids = {
            token: encoding.encode_single_token(token) for token in encoding.token_byte_values()
        }
        # Not `_set_tokens`: what tiktoken opens is its own affair, and some of its encodings have
        # two names for one id.
        tokens = {i: token for token, i in self._token_ids.items()}
        tokens |= {i: name.encode() for name, i in self.special_tokens.items()}
        self._tokens = dict(sorted(tokens.items()))

    @classmethod
    def load(cls, directory: str | Path) -> "TiktokenTokenizer":
        """Open what `save` or BPETokenizer.save wrote.

        Raises ValueError, which names the file and what was expected in it, or says why tiktoken
        cannot have this vocabulary.
        """
        return cls(BPETokenizer.load(directory).to_tiktoken())

    def save(self, directory: str | Path) -> None:
        """Write the files of BPETokenizer.save.

        They have no place for a pattern: raises ValueError for an encoding whose words are not
        GPT-2's, such as cl100k_base, because it would be opened with other ids. Otherwise raises as
        `to_bpe` and BPETokenizer.save do.
        """
        if self.encoding._pat_str not in GPT2_WORDS:
            raise ValueError(
                f"the encoding {self.encoding.name!r} cuts text into other words than GPT-2, which "
                "these files cannot say: save one with GPT-2's pattern"
            )
        self.to_bpe().save(directory)

    def to_bpe(self) -> BPETokenizer:
        """The same vocabulary with its merges, readable.

        Our words are GPT-2's: raises ValueError for an encoding that is not a byte-level BPE, and
        of an encoding with other words, such as cl100k_base, it may give other ids.
        """
        return BPETokenizer(merges_of(self._token_ids), self._token_ids, self.special_tokens)

    def _ordinary_ids(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def _ordinary_id(self, token: str | bytes) -> int | None:
        return self._token_ids.get(token if isinstance(token, bytes) else token.encode())


def gpt2() -> TiktokenTokenizer:
    """GPT-2's tokenizer: 256 bytes, 50,000 merges and "<|endoftext|>" are 50,257 tokens.

    tiktoken downloads the vocabulary once and keeps it in the folder TIKTOKEN_CACHE_DIR.

    Raises ConnectionError, which says what to do, if it can neither be found nor downloaded.
    """
    try:
        return TiktokenTokenizer(tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:  # of the network or the disk; a wrong hash
        raise ConnectionError(
            f"no vocabulary of GPT-2: tiktoken could not download it ({type(error).__name__}): "
            "connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that has it, or open "
            "encoder.json and vocab.bpe with BPETokenizer.from_files"
        ) from None


def merges_of(ranks: Mapping[bytes, int]) -> list[Pair]:
    """The merges, best first, that a vocabulary of byte strings and their ranks stands for.

    Merging the bytes of a token best rank first, its own merge is the last one: what it joins are
    its two parts. Raises ValueError if a token cannot be reached by merges.
    """
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [_parts(token, ranks) for token in longer]


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> Pair:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [left + right for left, right in pairwise(parts)]
        rank = [ranks.get(pair, math.inf) for pair in joined]
        best = min(range(len(rank)), key=rank.__getitem__)
        if rank[best] >= ranks[token]:
            raise ValueError(f"token {token!r} is not made by merges of earlier tokens")
        parts[best : best + 2] = [joined[best]]
    return parts[0], parts[1]
