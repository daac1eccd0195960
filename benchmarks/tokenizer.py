"""Training a BPE vocabulary, and encoding through our tokenizers against calling tiktoken itself,
on whole texts and line by line. All are asked for the same ids first.
"""

import os
from collections.abc import Callable

from tinygrad_llm.data import corpus_path, embedded_corpus, read_corpus
from tinygrad_llm.tokenizer import END_OF_TEXT, BPETokenizer, TiktokenTokenizer, gpt2

from .machine import installed
from .measure import Method, Ratio, interleaved
from .report import Table, duration

TINY_SHAKESPEARE = "tiny-shakespeare"
COLUMNS = ["ours", "peer", "ratio", "best"]
NOTE = (
    "ratio: the peer's time / ours, above 1 ours is faster; the median over the rounds and, in "
    "parentheses, the quartiles. best: the same of the fastest tenth of the calls. The peer of "
    "training is Hugging Face's tokenizers, that of encoding tiktoken's own Encoding with the same "
    "vocabulary: encode, or encode_to_numpy for encode_array. Lines are those that are not empty, "
    "one call each. BPETokenizer.encode is our own loop in Python; it knows the words already that "
    "it met in the warm-up."
)


def read_corpora(skipped: list[str]) -> dict[str, str]:
    """The texts by name; why one is left out is added to `skipped`."""
    texts = {"embedded": embedded_corpus()}
    try:
        texts[TINY_SHAKESPEARE] = read_corpus(corpus_path(TINY_SHAKESPEARE))
    except (ValueError, OSError) as error:  # ConnectionError is an OSError
        skipped.append(f"Without {TINY_SHAKESPEARE}: {error}.")
    return texts


def read_gpt2(skipped: list[str]) -> TiktokenTokenizer | None:
    """GPT-2's tokenizer, or None; then why is added to `skipped`."""
    try:
        return gpt2()
    except ConnectionError as error:
        skipped.append(f"Without gpt2: {error}.")
        return None


def measure_training(text: str, merges: int, method: Method) -> tuple[dict, list[str]]:
    """The numbers, and the cells of a row: ours, the peer, their ratio."""
    calls = {"ours": lambda: train(text, merges)}
    if installed("tokenizers"):
        calls["tokenizers"] = lambda: _train_peer(text, merges)
    data, cells = _measured(calls, 1, method)
    learned = len(train(text, merges).merges)
    return {"merges": learned, **data}, [f"{learned:,}", *cells]


def train(text: str, merges: int) -> BPETokenizer:
    """256 bytes, as many merges if the text has them, and one special token."""
    return BPETokenizer.train(text, 256 + merges + 1, [END_OF_TEXT])


def _train_peer(text, merges):
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as ours
    settings = {"min_frequency": 1, "special_tokens": [END_OF_TEXT], "show_progress": False}
    tokenizers.ByteLevelBPETokenizer().train_from_iterator([text], 256 + merges + 1, **settings)


def measure_encoding(
    text: str, vocabularies: dict[str, TiktokenTokenizer], method: Method
) -> tuple[dict, list[list[str]]]:
    """The numbers by vocabulary, call and text, and the rows: a whole text, and its lines.

    Raises ValueError if ours and tiktoken's ids differ.
    """
    data, rows = {}, []
    parts = {"whole": [text], "lines": [line for line in text.splitlines() if line]}
    for name, fast in vocabularies.items():
        theirs, to_array = fast.encoding.encode, fast.encoding.encode_to_numpy
        pairs = {"TiktokenTokenizer.encode": (fast.encode, theirs)}
        if name != "gpt2":
            bpe = fast.to_bpe()
            pairs["BPETokenizer.encode_array"] = bpe.encode_array, to_array
            pairs["BPETokenizer.encode"] = bpe.encode, theirs
        for call, (encode, peer) in pairs.items():
            for part, texts in parts.items():
                if any(list(encode(t)) != list(peer(t)) for t in texts):
                    raise ValueError(f"{call} and tiktoken give other ids with {name}, {part}")
                calls = {"ours": _over(encode, texts), "tiktoken": _over(peer, texts)}
                numbers, cells = _measured(calls, len(texts), method)
                data.setdefault(name, {}).setdefault(call, {})[part] = numbers
                rows.append([f"{name}, {call}", part, *cells])
    return data, rows


def _over(encode: Callable, texts: list[str]) -> Callable[[], None]:
    """A call for each text. The loop is the same for both sides."""

    def run():
        for text in texts:
            encode(text)

    return run


def _measured(calls, parts, method):
    """Numbers and cells of "ours" and its peer, if there is one, per part of the work."""
    times = {name: t.per(parts) for name, t in interleaved(calls, method).items()}
    data = {name: timing.to_dict() for name, timing in times.items()}
    ours, *peers = times.values()
    if not peers:
        return data, [duration(ours.median), "-", "-", "-"]
    ratio = Ratio.of(peers[0], ours)
    cells = [duration(ours.median), duration(peers[0].median), str(ratio), f"{ratio.best:.2f}"]
    return data | {"ratio": ratio.to_dict()}, cells


def measure(
    texts: dict[str, str],
    merges: int,
    known: TiktokenTokenizer | None,
    method: Method,
    say: Callable[[str], None],
) -> tuple[dict, list[Table]]:
    """All of it for each text; `known` is GPT-2's tokenizer. Raises as measure_encoding does."""
    training = Table("Training a byte-level BPE", ["corpus", "characters", "merges", *COLUMNS])
    data, tables = {}, [training]
    for name, text in texts.items():
        say(f"training on {name}")
        numbers, cells = measure_training(text, merges, method)
        training.rows.append([name, f"{len(text):,}", *cells])
        say(f"encoding {name}")
        vocabularies = {"trained": TiktokenTokenizer(train(text, merges).to_tiktoken())}
        vocabularies |= {"gpt2": known} if known else {}
        encoding, rows = measure_encoding(text, vocabularies, method)
        columns = ["vocabulary, call", "text", *COLUMNS]
        tables.append(Table(f"Encoding {name}, time per text", columns, rows))
        data[name] = {"characters": len(text), "training": numbers, "encoding": encoding}
    return data, tables
