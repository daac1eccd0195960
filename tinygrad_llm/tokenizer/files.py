"""Hugging Face's tokenizer.json and tokenizer_config.json: what all tokenizers have in common."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinygrad_llm.data.files import atomic_write

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"


def write_json(path: Path, content: Any) -> None:
    """Replace a file by this content."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())


def write_tokenizer(
    directory: Path,
    model: dict[str, Any],
    special_tokens: Mapping[str, int],
    config: dict[str, Any],
    normalizer: dict | None = None,
    pre_tokenizer: dict | None = None,
    decoder: dict | None = None,
) -> None:
    """Write tokenizer.json, the whole tokenizer in one, and tokenizer_config.json.

    `config` names the class that `transformers` uses, and what each special token is for.
    """
    added = [_added_token(name, i) for name, i in by_id(special_tokens).items()]
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    write_json(directory / TOKENIZER, content)
    listed = {
        str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
    }
    config = {"clean_up_tokenization_spaces": False, **config, "added_tokens_decoder": listed}
    write_json(directory / CONFIG, config)


def by_id(vocab: Mapping[str, int]) -> dict[str, int]:
    """The same tokens, in the order of their ids."""
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def all_by_id(vocab: Mapping[str, int], directory: Path) -> dict[str, int]:
    """A whole vocabulary in the order of its ids, to be saved in this folder.

    Raises ValueError if ids are left out: in a file, this means that tokens were lost.
    """
    check_ids(vocab, directory / TOKENIZER)
    return by_id(vocab)


def _added_token(name: str, token_id: int) -> dict[str, Any]:
    """How Hugging Face describes a special token: found in the raw text, exactly as written."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **plain, "special": True}


def read_special_tokens(
    content: dict[str, Any], vocab: Mapping[str, int], path: Path
) -> dict[str, int]:
    """The special tokens of a tokenizer.json, whose model has the ids of `vocab`.

    Raises ValueError, which names the file and what was expected in it.
    """
    try:
        found = {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError):
        found = {"": 0}
    if not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{path}: expected added_tokens with a content and an id each")
    for name, i in found.items():
        if vocab.get(name, i) != i:
            ids = f"{vocab[name]!r} and {i!r}"
            raise ValueError(f"{path}: {name!r} has two ids, {ids}: expected one")
    return found


def read_vocab(content: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The ordinary and the special tokens of a tokenizer.json whose model has a vocab by name.

    Raises ValueError, which names the file and what was expected in it.
    """
    vocab = content["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError(f"{path}: expected the model's vocab to map tokens to ids")
    special_tokens = read_special_tokens(content, vocab, path)
    check_ids(vocab | special_tokens, path)
    return {name: i for name, i in vocab.items() if name not in special_tokens}, special_tokens


def check_ids(vocab: Mapping[str, int], file: Path) -> None:
    """Raises ValueError, which names the file, unless tokens are texts and have ids 0, 1, ..."""
    if not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError(f"{file}: expected a whole number as the id of each token")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(
            f"{file}: expected each id 0..{len(vocab) - 1} once, for its {len(vocab)} tokens"
        )
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError:  # JSON can spell it
        raise ValueError(
            f"{file}: a token has half a surrogate pair: expected whole characters"
        ) from None


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Errors about what a file holds say which file it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_directory(path: Path) -> None:
    """Raises ValueError for a file: all that a tokenizer saves is in one folder."""
    if path.is_file():
        raise ValueError(f"{path} is a file: expected the folder that a tokenizer was saved in")


def read_tokenizer(directory: Path, kind: str) -> tuple[dict[str, Any], Path]:
    """The content of a tokenizer.json and its path, which has a model of this type.

    Raises ValueError, which names the file and what was expected in it.
    """
    check_directory(directory)
    path = directory / TOKENIZER
    content = read_json(path)
    found = model_type(content)
    if found != kind:
        raise ValueError(f"{path} holds a tokenizer of type {found!r}: expected {kind}")
    return content, path


def model_type(content: dict[str, Any]) -> str:
    """ "BPE", "WordPiece", "Unigram", "WordLevel" or, of a damaged file, anything."""
    model = content.get("model")
    return str(model.get("type", "BPE")) if isinstance(model, dict) else "unknown"


def check_parts(
    content: dict[str, Any], path: Path, expected: Iterable[tuple[str, Any]], like: str
) -> None:
    """Raises ValueError, which names the file, if a part of it is not as expected."""
    for part, value in expected:
        if not _has(content.get(part), value):
            raise ValueError(f"{path}: its {part} is of another kind: expected one {like}")


def _has(found: Any, expected: Any) -> bool:
    """Whether all that is expected was found; a library may write more keys than we do."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(_has(found.get(k), v) for k, v in expected.items())
    if isinstance(expected, list):
        same_length = isinstance(found, list) and len(found) == len(expected)
        return same_length and all(map(_has, found, expected))
    return found == expected and type(found) is type(expected)


def read_text(path: Path, expected: str) -> str:
    """The text of a file. Raises ValueError if it is missing, no file, or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: expected {expected}") from None
    except OSError as error:  # a folder, or not allowed
        raise ValueError(f"{path} cannot be read ({error.strerror}): expected {expected}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte offset {error.start}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it is missing, damaged or something else."""
    expected = "one JSON object"
    text = read_text(path, expected)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}): expected {expected}"
        ) from None
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        raise ValueError(
            f"{path} is not JSON that Python can read (a number or the nesting has no end): "
            f"expected {expected}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}: expected {expected}")
    return content
