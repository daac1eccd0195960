"""`tinygrad-llm classify`: the probability of each class of a text, by a classifier."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import load_tokenizer, open_checkpoint
from ..finetune import GPTClassifier
from ..tokenizer import Tokenizer
from .device import DeviceName, Dtype, DtypeName, Kernels, chosen, enough_memory
from .errors import user_input
from .generate import given_texts, write
from .memory import check_memory, generation_bytes

BATCH = 32  # texts of a file that are computed side by side
LESS = "use --dtype bfloat16 or --device cpu"


def classify(
    model: Annotated[
        Path,
        typer.Option(
            metavar="DIR|NAME",
            help="A directory that `finetune classify` has made, or a classifier's name on Hugging "
            "Face.",
        ),
    ],
    text: Annotated[
        str | None, typer.Argument(help="The text to classify; - reads it from standard input.")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text in each line; prints a line of JSON for each."),
    ] = None,
    device: DeviceName = None,
    dtype: DtypeName = Dtype.float32,
    kernels: Kernels = "auto",
) -> int:
    """Print the probability of each class of a text, the likeliest first."""
    with user_input():
        texts = given_texts(text, batch, "text")
        where, _ = chosen(device, kernels)
        needed = generation_bytes(open_checkpoint(model).cfg, min(BATCH, len(texts)), dtype)
        check_memory(where, needed, LESS)
        with enough_memory(where, LESS):
            classifier = GPTClassifier.from_pretrained(model, dtype).to(where)
        tokenizer = load_tokenizer(model, classifier)
        cut = sum(_is_cut(*each, classifier, tokenizer) for each in enumerate(texts, start=1))
    if cut:
        most = f"the first {classifier.max_length:,} tokens count"
        print(f"{cut:,} of {len(texts):,} texts are longer: of them {most}", file=sys.stderr)
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        with user_input(), enough_memory(where, LESS):
            found = classifier.probabilities(some, tokenizer, BATCH)
        for each, row in zip(some, found.tolist(), strict=True):
            ranked = sorted(zip(classifier.classes, row), key=lambda pair: -pair[1])
            write(_as_json(each, ranked) if batch else _as_table(ranked))
    return 0


def _is_cut(number: int, text: str, classifier: GPTClassifier, tokenizer: Tokenizer) -> bool:
    """Whether some of the text does not count. Raises ValueError if there is none."""
    if not text.strip():
        raise ValueError(f"text {number} is empty: give some words to classify")
    return len(tokenizer.encode_ordinary(text)) > classifier.max_length


def _as_table(ranked: list[tuple[str, float]]) -> str:
    width = max(len(name) for name, _ in ranked)
    return "".join(f"{name.ljust(width)}  {share:.4f}\n" for name, share in ranked)


def _as_json(text: str, ranked: list[tuple[str, float]]) -> str:
    found = {"text": text, "class": ranked[0][0], "probabilities": dict(ranked)}
    return json.dumps(found, ensure_ascii=False) + "\n"
