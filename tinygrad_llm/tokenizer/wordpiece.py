"""WordPiece, BERT's tokenizer: pieces of words, joined where they predict each other.

A word is spelled as pieces, of which all but the first start with "##": play ##ing. Training starts
from characters and joins two pieces where they occur together more often than their own counts let
expect; encoding takes the longest piece that fits, again and again.

Schuster and Nakajima, "Japanese and Korean Voice Search", 2012 (training by likelihood, in the
sense that `learn_pieces` explains); Devlin et al., "BERT", 2018 (the "##" and the longest match).
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import regex

from tinygrad_llm.tokenizer.base import (
    Tokenizer,
    WordIds,
    as_text,
    check_names,
    check_unknown,
    check_vocab_size,
    ordinary_pieces,
)
from tinygrad_llm.tokenizer.bpe_train import PairCounter
from tinygrad_llm.tokenizer.files import (
    all_by_id,
    check_parts,
    named,
    read_tokenizer,
    read_vocab,
    write_tokenizer,
)

PREFIX = "##"  # of a piece that continues a word
UNKNOWN = "[UNK]"
SPECIAL_TOKENS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")  # BERT's; ids come in this order
LONGEST_WORD = 100  # characters; a longer word is unknown

# BERT's words: each sign of punctuation by itself, and what is between them and white space. All of
# ASCII's signs count, so "$" and "+" do, too.
WORD = regex.compile(r"[!-/:-@\[-`{-~\p{P}]|[^\s!-/:-@\[-`{-~\p{P}]+")

# Chinese characters are words of their own.
CHINESE = regex.compile(
    "([\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f])"
)


def normalize(text: str, lowercase: bool = True) -> str:
    """The text as BERT sees it: one kind of space, no control characters, Chinese characters apart.

    With `lowercase`, letters lose their accents, too: "Café" becomes "cafe".
    """
    text = "".join(filter(None, map(_clean, text)))
    text = CHINESE.sub(r" \1 ", text)
    if not lowercase:
        return text
    letters = unicodedata.normalize("NFD", text)  # é is e and an accent, a mark of category Mn
    return "".join(c.lower() for c in letters if unicodedata.category(c) != "Mn")


def _clean(character: str) -> str:
    if character in "\t\n\r" or unicodedata.category(character) in ("Zs", "Zl", "Zp"):
        return " "
    is_control = unicodedata.category(character)[0] == "C" or character == "\ufffd"
    return "" if is_control else character


def split_words(text: str, lowercase: bool = True) -> list[str]:
    """BERT's words of a text."""
    return WORD.findall(normalize(text, lowercase))


def learn_pieces(
    word_counts: Mapping[str, int],
    n_pieces: int,
    min_frequency: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The characters of the words, sorted, and then the joined pieces in the order learned.

    Each step joins the pair with the highest

        count(ab) / (count(a) count(b))

    the pair's frequency over the product of its parts' frequencies; of equal ones, the one that
    appeared first. Pairs rarer than `min_frequency` are left alone. Stops early when no pair is
    left.

    Why this: let each of the text's N pieces have the probability count / N, independently. As two
    pieces, an occurrence of the pair has the probability P(a) P(b) = count(a) count(b) / N²; as one
    it has P(ab) = count(ab) / N. The log likelihood of the text gains

        log P(ab) / (P(a) P(b)) = log N + log score

    for each occurrence, and N is the same for all pairs. So this is the gain per occurrence, not
    that of the whole text, which is count(ab) times as much and prefers frequent pairs.
    """
    words = [[word[0], *(PREFIX + c for c in word[1:])] for word in word_counts]
    pieces = dict.fromkeys(sorted({piece for word in words for piece in word}))
    pairs = _ScoredPairs(words, word_counts.values())
    while len(pieces) < n_pieces:
        pair = pairs.best()
        if pair is None:
            break
        if pairs.pair_counts[pair] < min_frequency:
            continue  # out of the queue for good: merges only make it rarer
        pairs.merge(pair)
        pieces.setdefault(pairs.join(pair))
        if progress is not None:
            progress(len(pieces), n_pieces)
    return list(pieces)


class _ScoredPairs(PairCounter):
    """Pairs in the order of count(ab) / (count(a) count(b))."""

    def __init__(self, words: Iterable[list[str]], word_counts: Iterable[int]):
        self.counts: Counter[str] = Counter()  # of each piece
        self.pairs_of: dict[str, dict[tuple, None]] = {}  # those that a piece is part of
        super().__init__(words, word_counts)

    def join(self, pair: tuple) -> str:
        left, right = pair
        return left + right.removeprefix(PREFIX)

    def merge(self, pair: tuple) -> None:
        super().merge(pair)
        for piece in dict.fromkeys(pair):  # now rarer, which raises the score of its other pairs
            self._queue_again(self.pairs_of[piece])

    def _entry(self, pair: tuple) -> tuple[float, int, tuple]:
        left, right = pair
        score = self.pair_counts[pair] / (self.counts[left] * self.counts[right])
        return -score, self.appearance[pair], pair

    def _add(self, number: int) -> None:
        super()._add(number)
        for piece in self.words[number]:
            self.counts[piece] += self.word_counts[number]
        for pair in pairwise(self.words[number]):
            for piece in pair:
                self.pairs_of.setdefault(piece, {})[pair] = None

    def _remove(self, number: int) -> None:
        super()._remove(number)
        for piece in self.words[number]:
            self.counts[piece] -= self.word_counts[number]


class WordPieceTokenizer(Tokenizer):
    """A WordPiece vocabulary. Make one with `train` or `load`.

    vocab: the id of each ordinary piece. special_tokens: must have "[UNK]", which stands for a word
    that the pieces cannot spell. lowercase: whether case and accents are dropped before.
    """

    def __init__(
        self, vocab: Mapping[str, int], special_tokens: Mapping[str, int], lowercase: bool = True
    ):
        check_unknown(special_tokens, UNKNOWN)
        self.vocab = dict(vocab)
        self.lowercase = lowercase
        self._word_ids = WordIds(self._match)
        self._set_tokens(vocab, special_tokens)

    @classmethod
    def train(
        cls,
        text: str,
        vocab_size: int,
        special_tokens: Iterable[str] = SPECIAL_TOKENS,
        lowercase: bool = True,
        min_frequency: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> "WordPieceTokenizer":
        """Learn a vocabulary of `vocab_size` tokens: special tokens, characters, joined pieces.

        Pairs rarer than `min_frequency` are not joined: the score likes rare pairs, and on a long
        text a higher value makes better pieces. Training stops early when no pair is left.
        `progress(done, total)` is called after each piece.

        Raises TypeError if the text is no str; ValueError for a text without words (empty, or
        nothing but white space, control characters and special tokens), a vocab_size that does not
        hold all characters, or special tokens that cannot be told apart.
        """
        special_tokens = check_names(special_tokens)
        check_unknown(special_tokens, UNKNOWN)
        counts = Counter()
        for piece in ordinary_pieces(special_tokens, text):
            counts.update(split_words(piece, lowercase))
        if not counts:
            raise ValueError(
                "cannot train on an empty text, white space or control characters: give words"
            )
        characters = {(i > 0, c) for word in counts for i, c in enumerate(word)}
        smallest = len(special_tokens) + len(characters)
        why = f"{len(special_tokens)} special tokens and {len(characters)} characters of words"
        room = check_vocab_size(vocab_size, smallest, why) - len(special_tokens)
        pieces = learn_pieces(counts, room, min_frequency, progress)
        special_ids = {name: i for i, name in enumerate(special_tokens)}
        vocab = {piece: i for i, piece in enumerate(pieces, start=len(special_ids))}
        return cls(vocab, special_ids, lowercase)

    @classmethod
    def load(cls, directory: str | Path) -> "WordPieceTokenizer":
        """Open a tokenizer.json that `save` or Hugging Face wrote, such as BERT's.

        Raises ValueError, which names the file and what was expected in it.
        """
        content, path = read_tokenizer(Path(directory), "WordPiece")
        normalizer = content.get("normalizer")
        lowercase = isinstance(normalizer, dict) and normalizer.get("lowercase") is not False
        expected = [("normalizer", _normalizer(lowercase)), ("pre_tokenizer", PRE_TOKENIZER)]
        check_parts(content, path, expected, "as BERT's")
        check_parts(content["model"], path, MODEL.items(), "as BERT's")
        vocab, special_tokens = read_vocab(content, path)
        with named(path):
            return cls(vocab, special_tokens, lowercase)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        Raises ValueError if ids are left out, OSError if it cannot write.
        """
        vocab = all_by_id(self.vocab | self.special_tokens, Path(directory))
        names = {"pad", "unk", "cls", "sep", "mask"}
        config = {f"{name}_token": f"[{name.upper()}]" for name in sorted(names)}
        config = {key: name for key, name in config.items() if name in self.special_tokens}
        write_tokenizer(
            Path(directory),
            model={**MODEL, "vocab": vocab},
            special_tokens=self.special_tokens,
            config={"tokenizer_class": "PreTrainedTokenizerFast", **config},
            normalizer=_normalizer(self.lowercase),
            pre_tokenizer=PRE_TOKENIZER,
            decoder={"type": "WordPiece", "prefix": PREFIX, "cleanup": False},
        )

    def _spaced(self, pieces: Iterator[bytes], first: bool) -> Iterator[bytes]:
        """A space before each piece that begins a word."""
        for piece in pieces:
            if first:
                yield piece
            elif piece.startswith(PREFIX.encode()):
                yield piece.removeprefix(PREFIX.encode())
            else:
                yield b" " + piece
            first = False

    def _ordinary_ids(self, text: str) -> Iterator[int]:
        for word in split_words(text, self.lowercase):
            yield from self._word_ids[word]

    def _match(self, word: str) -> list[int]:
        """The longest piece that fits, again and again; one unknown token if none fits."""
        unknown = [self.special_tokens[UNKNOWN]]
        if len(word) > LONGEST_WORD:
            return unknown
        ids = []
        start = 0
        while start < len(word):
            found = self._longest_piece(word, start)
            if found is None:
                return unknown
            token_id, start = found
            ids.append(token_id)
        return ids

    def _longest_piece(self, word: str, start: int) -> tuple[int, int] | None:
        """(its id, where it ends)"""
        for end in range(len(word), start, -1):
            piece = word[start:end] if start == 0 else PREFIX + word[start:end]
            if piece in self.vocab:
                return self.vocab[piece], end
        return None

    def _ordinary_id(self, token: str | bytes) -> int | None:
        return self.vocab.get(as_text(token))


MODEL = {
    "type": "WordPiece",
    "unk_token": UNKNOWN,
    "continuing_subword_prefix": PREFIX,
    "max_input_chars_per_word": LONGEST_WORD,
}
PRE_TOKENIZER = {"type": "BertPreTokenizer"}


def _normalizer(lowercase: bool) -> dict:
    """What `normalize` does, for Hugging Face; accents go with case."""
    return {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": lowercase,
    }
