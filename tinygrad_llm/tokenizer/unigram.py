"""Unigram, SentencePiece's language model over pieces: of all spellings of a word, the likeliest.

Each piece has a probability, a spelling has the product of its pieces', and the pieces are chosen
so that the text becomes likely: start with too many, fit their probabilities by EM, drop the least
useful, again and again. Nothing is cut beforehand but at spaces, which are written "▁".

Kudo, "Subword Regularization", 2018, section 3; Kudo and Richardson, "SentencePiece", 2018.
"""

import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import regex

from tinygrad_llm.data.streaming import BEFORE_SPACE
from tinygrad_llm.tokenizer.base import (
    Tokenizer,
    WordIds,
    as_text,
    check_names,
    check_unknown,
    check_vocab_size,
    ordinary_pieces,
)
from tinygrad_llm.tokenizer.files import (
    all_by_id,
    check_ids,
    check_parts,
    named,
    read_special_tokens,
    read_tokenizer,
    write_tokenizer,
)

SPACE = "▁"  # U+2581, how a piece spells a space
UNKNOWN = "<unk>"
SPECIAL_TOKENS = (UNKNOWN, "<s>", "</s>")  # SentencePiece's; ids come in this order
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the pieces that stand for single bytes

LONGEST_PIECE = 16  # characters
SEEDS_PER_PIECE = 10  # how many times too many pieces training starts with
EM_STEPS = 2  # between two rounds of pruning
KEPT = 0.75  # the part of the pieces that a round keeps
RAREST = 1e-12  # a piece's smallest probability while it is fitted: log 0 is no number
UNKNOWN_PENALTY = 10.0  # nats that an unknown character costs more than the rarest piece
LARGEST = 1e9  # the size of a log probability in a file: sums of them must stay exact
DIGITS = 6  # of a log probability: short decimals are read alike by every library

CHUNK = regex.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")  # a space begins what follows it
LINE = regex.compile(r"\n|[^\n]+")  # pieces are not learned across lines


def log_sum_exp(terms: list[float]) -> float:
    """log Σ e^term, without overflow."""
    largest = max(terms, default=-math.inf)
    if largest == -math.inf:
        return largest
    return largest + math.log(sum(math.exp(term - largest) for term in terms))


class Lattice:
    """All spellings of one word: an edge (start, end, log p) for each piece in it.

    The edges come in the order of their start, then of their end.
    """

    def __init__(self, word: str, log_probs: Mapping[str, float], longest: int):
        self.length = len(word)
        self.edges = [
            (start, end, log_probs[word[start:end]])
            for start in range(len(word))
            for end in range(start + 1, min(start + longest, len(word)) + 1)
            if word[start:end] in log_probs
        ]

    def forward(self) -> list[float]:
        """α_j = log Σ p over the spellings of word[:j]:  α_j = log Σ_(i→j) e^(α_i + log p)"""
        into: list[list[float]] = [[] for _ in range(self.length + 1)]
        into[0] = [0.0]
        alpha = []
        edges = iter([*self.edges, (self.length, None, None)])
        start, end, log_prob = next(edges)
        for position in range(self.length + 1):
            alpha.append(log_sum_exp(into[position]))
            while start == position and end is not None:
                into[end].append(alpha[start] + log_prob)
                start, end, log_prob = next(edges)
        return alpha

    def backward(self) -> list[float]:
        """β_i = log Σ p over the spellings of word[i:]:  β_i = log Σ_(i→j) e^(log p + β_j)"""
        out: list[list[float]] = [[] for _ in range(self.length + 1)]
        out[self.length] = [0.0]
        beta = [-math.inf] * self.length + [0.0]
        for start, end, log_prob in reversed(self.edges):
            if beta[end] == -math.inf:
                beta[end] = log_sum_exp(out[end])
            out[start].append(log_prob + beta[end])
        beta[0] = log_sum_exp(out[0])
        return beta

    def expected_counts(self) -> tuple[list[float], float]:
        """How often each edge is used on average over all spellings, and the word's log p.

        P(edge i→j) = e^(α_i + log p + β_j - α_n)
        """
        alpha, beta = self.forward(), self.backward()
        total = alpha[-1]
        return [math.exp(alpha[i] + p + beta[j] - total) for i, j, p in self.edges], total

    def best(self) -> tuple[list[tuple[int, int]], float]:
        """Viterbi's spelling: the pieces (start, end) with the highest Σ log p, and that sum.

        Of equal ones, that with the longer last piece. No pieces and -inf if there is none.
        """
        score = [0.0] + [-math.inf] * self.length
        came_from = [0] * (self.length + 1)
        for start, end, log_prob in self.edges:
            if score[start] + log_prob > score[end]:
                score[end] = score[start] + log_prob
                came_from[end] = start
        if score[-1] == -math.inf:
            return [], -math.inf
        path = []
        end = self.length
        while end > 0:
            path.append((came_from[end], end))
            end = came_from[end]
        return path[::-1], score[-1]


def expectation_maximization(
    word_counts: Mapping[str, int], log_probs: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """One step of EM: the pieces' new log probabilities, and the text's log likelihood before.

    E: c(x) = Σ_words count(word) E[uses of x in its spelling].   M: p(x) = c(x) / Σ c
    The likelihood never falls from step to step (Dempster, Laird and Rubin, 1977).
    """
    expected = dict.fromkeys(log_probs, 0.0)
    likelihood = 0.0
    longest = max(map(len, log_probs))
    for word, count in word_counts.items():
        lattice = Lattice(word, log_probs, longest)
        uses, log_prob = lattice.expected_counts()
        likelihood += count * log_prob
        for (start, end, _), used in zip(lattice.edges, uses):
            expected[word[start:end]] += count * used
    total = sum(expected.values())
    return {x: math.log(max(c / total, RAREST)) for x, c in expected.items()}, likelihood


def losses(log_probs: Mapping[str, float]) -> dict[str, float]:
    """How much likelihood is lost without each piece of two or more characters.

    In nats per piece of text. Where x was used, its best spelling by other pieces takes its place;
    p(x) is how often that is, as the expected counts of EM say:
    loss(x) = p(x) (log p(x) - Σ log p(pieces of x))
    """
    result = {}
    for piece, log_prob in log_probs.items():
        if len(piece) > 1:
            _, without = Lattice(piece, log_probs, len(piece) - 1).best()
            result[piece] = math.exp(log_prob) * (log_prob - without)
    return result


def seed_pieces(word_counts: Mapping[str, int], size: int) -> dict[str, float]:
    """All characters, and the `size` substrings with the highest count · length: log probabilities.

    A substring that occurs once is no piece, nor is one with a space inside or a line's end.
    """
    counts = Counter()
    for word, count in word_counts.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
                counts[word[start:end]] += count
    longer = [x for x, count in counts.items() if len(x) > 1 and count > 1]
    longer.sort(key=lambda x: (-counts[x] * len(x), x))
    kept = sorted(x for x in counts if len(x) == 1) + longer[:size]
    total = sum(counts[x] for x in kept)
    return {x: math.log(counts[x] / total) for x in kept}


def learn_pieces(
    word_counts: Mapping[str, int],
    n_pieces: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """At most `n_pieces` pieces with log probabilities, likeliest first. Characters always stay."""
    log_probs = seed_pieces(word_counts, SEEDS_PER_PIECE * n_pieces)
    n_seeds = len(log_probs)
    while True:
        for _ in range(EM_STEPS):
            log_probs, _ = expectation_maximization(word_counts, log_probs)
        if progress is not None:
            progress(n_seeds - len(log_probs), max(n_seeds - n_pieces, 0))
        if len(log_probs) <= n_pieces:
            break
        log_probs = _pruned(log_probs, n_pieces)
    rounded = {x: round(log_prob, DIGITS) for x, log_prob in log_probs.items()}
    return dict(sorted(rounded.items(), key=lambda item: (-item[1], item[0])))


def _pruned(log_probs: Mapping[str, float], n_pieces: int) -> dict[str, float]:
    """The pieces without those that are missed least."""
    loss = losses(log_probs)
    n_characters = len(log_probs) - len(loss)
    n_kept = max(int(KEPT * len(log_probs)), n_pieces) - n_characters
    kept = set(sorted(loss, key=lambda x: (-loss[x], x))[:n_kept])
    return {x: log_prob for x, log_prob in log_probs.items() if x in kept or x not in loss}


class UnigramTokenizer(Tokenizer):
    """A Unigram vocabulary. Make one with `train` or `load`.

    pieces: the log probability of each piece; ids follow those of the special tokens.
    special_tokens: must have "<unk>", which stands for characters that no piece has.
    byte_fallback: whether such characters are spelled in bytes instead; then nothing is lost,
    except that "▁" (U+2581) comes back as a space.
    prefix_space: whether a text that does not begin with a space gets one, so that its first word
    is spelled as elsewhere; decoding takes one away.
    """

    word_end = BEFORE_SPACE  # pieces go on across the ends of lines

    def __init__(
        self,
        pieces: Mapping[str, float],
        token_ids: Mapping[str, int],
        special_tokens: Mapping[str, int],
        byte_fallback: bool = True,
        prefix_space: bool = False,
    ):
        """token_ids: the id of each piece. Raises ValueError for what does not fit together."""
        _check(pieces, token_ids, special_tokens, byte_fallback)
        self.pieces = pieces = {x: float(p) for x, p in pieces.items()}
        self.token_ids = dict(token_ids)
        self.byte_fallback, self.prefix_space = byte_fallback, prefix_space
        self._set_tokens(token_ids, special_tokens)
        # Pieces for bytes are not for text that spells them out: "<0x41>" is six characters.
        self._log_probs = {x: p for x, p in pieces.items() if not byte_fallback or x not in BYTES}
        self._longest = max(map(len, self._log_probs))
        self._unknown = min(min(pieces.values()), 0.0) - UNKNOWN_PENALTY  # 0.0 is that of <unk>
        self._chunk_ids = WordIds(self._viterbi)

    @classmethod
    def train(
        cls,
        text: str,
        vocab_size: int,
        special_tokens: Iterable[str] = SPECIAL_TOKENS,
        byte_fallback: bool = True,
        prefix_space: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "UnigramTokenizer":
        """Learn a vocabulary of `vocab_size` tokens: special tokens, 256 bytes, learned pieces.

        All characters of the text are pieces. Of a short text, there may be fewer pieces than asked
        for. `progress(done, total)` is called after each round with the number of dropped pieces.
        White space is text like any other.

        Raises TypeError if the text is no str; ValueError for an empty text (or nothing but special
        tokens), a vocab_size that does not hold all characters, or special tokens that cannot be
        told apart or lack "<unk>".
        """
        special_tokens = check_names(special_tokens)
        check_unknown(special_tokens, UNKNOWN)
        fixed = special_tokens + (BYTES if byte_fallback else [])
        counts = Counter()
        for piece in ordinary_pieces(special_tokens, text):
            for chunk in _chunks(piece, prefix_space):
                counts.update(LINE.findall(chunk))
        if not counts:
            raise ValueError("cannot train on an empty text: give some besides special tokens")
        n_characters = len({character for chunk in counts for character in chunk})
        why = f"{len(fixed)} special tokens and bytes, {n_characters} characters of the text"
        vocab_size = check_vocab_size(vocab_size, len(fixed) + n_characters, why)
        learned = learn_pieces(counts, vocab_size - len(fixed), progress)
        for name in learned.keys() & set(fixed):
            raise ValueError(f"special token {name!r} looks like an ordinary one: choose another")
        pieces = {x: 0.0 for x in fixed if x not in special_tokens} | learned
        token_ids = {x: i for i, x in enumerate(pieces, start=len(special_tokens))}
        special_ids = {name: i for i, name in enumerate(special_tokens)}
        return cls(pieces, token_ids, special_ids, byte_fallback, prefix_space)

    @classmethod
    def load(cls, directory: str | Path) -> "UnigramTokenizer":
        """Open a tokenizer.json that `save` or Hugging Face wrote.

        Raises ValueError, which names the file and what was expected in it.
        """
        content, path = read_tokenizer(Path(directory), "Unigram")
        pre_tokenizer = content.get("pre_tokenizer")
        scheme = pre_tokenizer.get("prepend_scheme") if isinstance(pre_tokenizer, dict) else None
        expected = [("normalizer", None), ("pre_tokenizer", _metaspace(scheme == "always"))]
        check_parts(content, path, expected, "that only writes spaces as ▁")
        pieces = _read_pieces(content["model"], path)
        token_ids = {x: i for i, x in enumerate(pieces)}
        special_tokens = read_special_tokens(content, token_ids, path)
        check_ids(token_ids | special_tokens, path)
        unk_id = content["model"].get("unk_id")
        if unk_id not in (None, special_tokens.get(UNKNOWN, unk_id)):
            raise ValueError(f"{path}: unk_id is {unk_id!r}: expected the id of {UNKNOWN!r}")
        byte_fallback = content["model"].get("byte_fallback", False)  # older files leave it out
        if not isinstance(byte_fallback, bool):
            raise ValueError(f"{path}: expected byte_fallback to be true or false")
        ordinary = {x: p for x, p in pieces.items() if x not in special_tokens}
        ordinary_ids = {x: token_ids[x] for x in ordinary}
        with named(path):
            return cls(ordinary, ordinary_ids, special_tokens, byte_fallback, scheme == "always")

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        Hugging Face gets the same ids, except for a text that spells a byte's piece, "<0x41>".
        Raises ValueError if ids are left out, OSError if it cannot write.
        """
        # The ids of the file's vocab are places in a list; what was added later stands beside it.
        tokens = all_by_id(self.token_ids | self.special_tokens, Path(directory))
        n_listed = max(max(self.token_ids.values()), self.special_tokens[UNKNOWN]) + 1
        vocab = [[name, self.pieces.get(name, 0.0)] for name in tokens][:n_listed]
        unk_id = self.special_tokens[UNKNOWN]
        space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
        names = {"unk_token": UNKNOWN, "bos_token": "<s>", "eos_token": "</s>"}
        config = {key: name for key, name in names.items() if name in self.special_tokens}
        write_tokenizer(
            Path(directory),
            model={
                "type": "Unigram",
                "unk_id": unk_id,
                "vocab": vocab,
                "byte_fallback": self.byte_fallback,
            },
            special_tokens=self.special_tokens,
            config={"tokenizer_class": "PreTrainedTokenizerFast", **config},
            pre_tokenizer=_metaspace(self.prefix_space),
            decoder={
                "type": "Sequence",
                "decoders": decoders + ([strip] if self.prefix_space else []),
            },
        )

    def _spaced(self, pieces: Iterator[bytes], first: bool) -> Iterator[bytes]:
        """All pieces as they are, but for the space that encoding put before the text."""
        for piece in pieces:
            yield piece.removeprefix(b" ") if first and self.prefix_space else piece
            first = False

    def _ordinary_ids(self, text: str) -> Iterator[int]:
        for chunk in _chunks(text, self.prefix_space):
            yield from self._chunk_ids[chunk]

    def _viterbi(self, chunk: str) -> list[int]:
        """The likeliest spelling; neighbouring characters that no piece has are one unknown."""
        unknown = dict.fromkeys(set(chunk) - self._log_probs.keys(), self._unknown)
        log_probs = ChainMap(self._log_probs, unknown) if unknown else self._log_probs
        path, _ = Lattice(chunk, log_probs, self._longest).best()
        ids = []
        run = ""  # of unknown characters
        for piece in [chunk[start:end] for start, end in path]:
            if piece in unknown:
                run += piece
            else:
                ids += self._unknown_ids(run)
                ids.append(self.token_ids[piece])
                run = ""
        return ids + self._unknown_ids(run)

    def _unknown_ids(self, characters: str) -> list[int]:
        if not self.byte_fallback:
            return [self.special_tokens[UNKNOWN]] if characters else []
        return [self.token_ids[BYTES[byte]] for byte in characters.encode()]

    def _bytes_of(self, piece: str) -> bytes:
        if self.byte_fallback and piece in BYTES:
            return bytes([BYTES.index(piece)])
        return super()._bytes_of(piece).replace(SPACE.encode(), b" ")

    def _ordinary_id(self, token: str | bytes) -> int | None:
        return self.token_ids.get(as_text(token).replace(" ", SPACE))


def _chunks(text: str, prefix_space: bool) -> list[str]:
    """The text cut before each space, and with "▁" for it."""
    text = text.replace(" ", SPACE)
    if prefix_space and text and not text.startswith(SPACE):
        text = SPACE + text
    return CHUNK.findall(text)


def _check(
    pieces: Mapping[str, float],
    token_ids: Mapping[str, int],
    special_tokens: Mapping[str, int],
    byte_fallback: bool,
) -> None:
    check_unknown(special_tokens, UNKNOWN)
    if pieces.keys() != token_ids.keys():
        raise ValueError("expected an id for each piece and a log probability for each id")
    for piece, log_prob in pieces.items():
        if not piece or not _is_log_prob(log_prob):
            raise ValueError(
                f"piece {piece!r} has the log probability {log_prob!r}: expected a text that is "
                "not empty, and a finite number"
            )
    missing = [name for name in BYTES if name not in pieces] if byte_fallback else []
    if missing:
        raise ValueError(f"byte_fallback needs a piece for each of 256 bytes: no {missing[0]!r}")
    if not pieces.keys() - set(BYTES if byte_fallback else []):
        raise ValueError("expected at least one piece that is no byte")


def _is_log_prob(value: Any) -> bool:
    return isinstance(value, Real) and abs(value) < LARGEST


def _metaspace(prefix_space: bool) -> dict:
    return {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "always" if prefix_space else "never",
        "split": True,
    }


def _read_pieces(model: dict, path: Path) -> dict[str, float]:
    """The log probability of each piece, in the order of ids."""
    vocab = model.get("vocab")
    try:
        pieces = {piece: log_prob for piece, log_prob in vocab}
    except (TypeError, ValueError):
        pieces = {}
    if (
        not isinstance(vocab, list)
        or not 0 < len(pieces) == len(vocab)
        or not all(isinstance(piece, str) and piece for piece in pieces)
        or not all(map(_is_log_prob, pieces.values()))
    ):
        raise ValueError(
            f"{path}: expected a vocab of different pieces, each with its log probability"
        )
    return {piece: float(log_prob) for piece, log_prob in pieces.items()}
