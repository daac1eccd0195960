"""Byte-level BPE vocabularies in the files of GPT-2 and Hugging Face.

vocab.json maps each token to its id, merges.txt has one merge a line in the order learned. Both
are text, so each byte is written as one printable character: a space is 'Ġ', a newline 'Ċ'.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tinygrad_llm.data.files import atomic_write
from tinygrad_llm.tokenizer.base import END_OF_TEXT
from tinygrad_llm.tokenizer.bpe_train import Pair
from tinygrad_llm.tokenizer.files import (
    CONFIG,
    TOKENIZER,
    all_by_id,
    check_directory,
    check_ids,
    named,
    read_json,
    read_special_tokens,
    read_text,
    write_json,
    write_tokenizer,
)

HEADER = "#version: 0.2"  # the first line of merges.txt

# What makes a BPETokenizer: its merges, the ids of ordinary tokens, the ids of special tokens.
Vocabulary = tuple[list[Pair], dict[bytes, int], dict[str, int]]


@cache
def byte_to_printable() -> dict[int, str]:
    """GPT-2's table of a printable character for each byte, in the order of GPT-2's ids.

    Bytes that Latin-1 shows as a visible character keep it; the others take the characters from
    U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(0x100 + len(table) - len(visible))
    return table


def printable(token: bytes) -> str:
    """A token as vocab.json and merges.txt spell it."""
    table = byte_to_printable()
    return "".join(table[byte] for byte in token)


@cache
def printable_to_byte() -> dict[str, int]:
    return {character: byte for byte, character in byte_to_printable().items()}


FILES = ("vocab.json", "merges.txt", TOKENIZER, CONFIG)


def write_directory(directory: Path, vocabulary: Vocabulary) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json."""
    merges, token_ids, special_tokens = vocabulary
    spelled = {printable(token): i for token, i in token_ids.items()}
    vocab = all_by_id(spelled | special_tokens, directory)
    pairs = [[printable(left), printable(right)] for left, right in merges]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,  # GPT-2's regular expression
    }
    write_tokenizer(
        directory,
        model={"type": "BPE", "vocab": vocab, "merges": pairs},
        special_tokens=special_tokens,
        config=_config(special_tokens),
        pre_tokenizer=byte_level,
        decoder=byte_level,
    )
    write_json(directory / "vocab.json", vocab)
    lines = [HEADER, *map(" ".join, pairs)]
    with atomic_write(directory / "merges.txt") as file:
        file.write("".join(line + "\n" for line in lines).encode())


def _config(special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Names the class that `transformers` uses, and what the special token is for."""
    end = END_OF_TEXT if END_OF_TEXT in special_tokens else None
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
    }


def read_directory(directory: Path) -> Vocabulary:
    """Read tokenizer.json, or vocab.json and merges.txt, and check that they agree if all exist.

    Raises ValueError, which names the file and what was expected in it.
    """
    check_directory(directory)
    vocab_file, merges_file = directory / "vocab.json", directory / "merges.txt"
    tokenizer_file = directory / TOKENIZER
    if not tokenizer_file.exists():
        if not vocab_file.exists():
            raise ValueError(
                f"{vocab_file} is missing, and so is {TOKENIZER}: expected one of them"
            )
        special_tokens = _special_tokens_of_config(directory / CONFIG)
        return read_vocab_and_merges(vocab_file, merges_file, special_tokens)

    vocabulary = _read_tokenizer_json(tokenizer_file)
    if vocab_file.exists() or merges_file.exists():
        _, _, special_tokens = vocabulary
        if read_vocab_and_merges(vocab_file, merges_file, special_tokens) != vocabulary:
            raise ValueError(
                f"{tokenizer_file} differs from vocab.json and merges.txt beside it: "
                "expected the same vocabulary in both, so delete what is out of date"
            )
    return vocabulary


def read_vocab_and_merges(
    vocab_file: Path, merges_file: Path, special_tokens: Mapping[str, int | None]
) -> Vocabulary:
    """Read GPT-2's two files. `special_tokens` maps names to ids, or to None: as in the vocabulary.

    Raises ValueError, which names the file and what was expected in it.
    """
    vocab = read_json(vocab_file)
    lines = read_text(merges_file, "one merge a line").splitlines()
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.split(" ") for line in lines if line]
    return _checked(vocab, merges, special_tokens, vocab_file, merges_file)


def _read_tokenizer_json(path: Path) -> Vocabulary:
    content = read_json(path)
    try:
        model, splitter = content["model"], content["pre_tokenizer"]
        is_gpt2 = (
            model.get("type", "BPE") == "BPE"  # older files leave it out
            and splitter["type"] == "ByteLevel"
            and splitter.get("use_regex", True)
            and not splitter["add_prefix_space"]
            and not content.get("normalizer")
            and isinstance(model["vocab"], dict)
        )
        vocab = model["vocab"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [[str(part) for part in pair] for pair in merges]
    except (AttributeError, KeyError, TypeError, ValueError):
        is_gpt2 = False
    if not is_gpt2:
        raise ValueError(f"{path}: expected a byte-level BPE that splits words as GPT-2 does")
    special_tokens = read_special_tokens(content, vocab, path)
    return _checked(vocab, merges, special_tokens, path, path)


def _special_tokens_of_config(path: Path) -> dict[str, int | None]:
    """The special tokens that tokenizer_config.json lists; without a list, GPT-2's only one."""
    config = read_json(path) if path.exists() else {}
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        raise ValueError(f"{path} says tokenizer_class {kind!r}: expected GPT2Tokenizer")
    if "added_tokens_decoder" not in config:
        return {END_OF_TEXT: None}
    try:
        listed = config["added_tokens_decoder"].items()
        return {token["content"]: int(token_id) for token_id, token in listed}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path}: expected added_tokens_decoder to map ids to tokens") from None


def _checked(
    vocab: dict[str, int],
    merges: list[list[str]],
    special_tokens: Mapping[str, int | None],
    vocab_file: Path,
    merges_file: Path,
) -> Vocabulary:
    """The vocabulary in bytes, after checking that its parts fit together."""
    vocab = vocab | {name: i for name, i in special_tokens.items() if i is not None}
    check_ids(vocab, vocab_file)
    special_ids = {name: vocab[name] for name in special_tokens if name in vocab}
    ordinary = [name for name in vocab if name not in special_ids]
    token_ids = {_spelled(name, vocab_file): vocab[name] for name in ordinary}
    with named(vocab_file):
        check_bytes(token_ids)
    pairs = [tuple(_spelled(part, merges_file) for part in merge) for merge in merges]
    with named(merges_file):
        check_merges(pairs, token_ids)
    return pairs, token_ids, special_ids


def check_bytes(token_ids: Mapping[bytes, int]) -> None:
    """Raises ValueError unless each byte is a token: then there is no unknown text."""
    missing = [byte for byte in range(256) if bytes([byte]) not in token_ids]
    if missing:
        raise ValueError(f"{len(missing)} of 256 bytes are missing: expected them all")


def check_merges(merges: Iterable[Pair], token_ids: Mapping[bytes, int]) -> None:
    """Raises ValueError unless each merge joins tokens that exist by then, and makes a new one.

    All tokens but the bytes are made by merges.
    """
    made = {bytes([byte]) for byte in range(256)}
    for number, merge in enumerate(merges, start=1):
        if len(merge) != 2:
            raise ValueError(f"merge {number} is {merge!r}: expected two tokens")
        for part in merge:
            if part not in made:
                raise ValueError(
                    f"merge {number} uses {part!r}: expected a byte or what an earlier merge makes"
                )
        left, right = merge
        token = left + right
        if token not in token_ids or token in made:
            raise ValueError(
                f"merge {number} makes {token!r}: "
                "expected a token of the vocabulary that no earlier merge makes"
            )
        made.add(token)
    if len(made) < len(token_ids):
        without = [token for token in token_ids if token not in made]
        raise ValueError(
            f"no merge makes {len(without)} tokens, such as {without[0]!r}: "
            "expected one for each token that is no byte and no special token"
        )


def _spelled(name: str, file: Path) -> bytes:
    """The bytes of a token as files spell it."""
    try:
        return bytes(printable_to_byte()[character] for character in name)
    except KeyError as error:
        raise ValueError(
            f"{file}: token {name!r} has the character {error.args[0]!r}, which stands for no byte"
        ) from None
