"""tiktoken's vocabularies behind the interface of all tokenizers: GPT-2's, or any trained here."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import tiktoken

from tinygrad_llm.tokenizer.base import Tokenizer
from tinygrad_llm.tokenizer.bpe import BPETokenizer
from tinygrad_llm.tokenizer.bpe_train import Pair


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
        self._tokens = {i: token for token, i in self._token_ids.items()}
        self._tokens |= {i: name.encode() for name, i in self.special_tokens.items()}

    @classmethod
    def load(cls, directory: str | Path) -> "TiktokenTokenizer":
        """Open what `save` or BPETokenizer.save wrote.

        Raises ValueError, which names the file and what was expected in it, or says why tiktoken
        cannot have this vocabulary.
        """
        return cls(BPETokenizer.load(directory).to_tiktoken())

    def save(self, directory: str | Path) -> None:
        """Write the files of BPETokenizer.save. Raises as `to_bpe` does, or OSError."""
        self.to_bpe().save(directory)

    def to_bpe(self) -> BPETokenizer:
        """The same vocabulary with its merges, readable.

        Our words are GPT-2's: raises ValueError for an encoding that is not a byte-level BPE, and
        of an encoding with other words, such as cl100k_base, it may give other ids.
        """
        return BPETokenizer(merges_of(self._token_ids), self._token_ids, self.special_tokens)

    @property
    def vocab_size(self) -> int:
        """One more than the last id: cl100k_base, for one, leaves some ids out."""
        return max(self.encoding.n_vocab, 1 + max(self.special_tokens.values(), default=0))

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
