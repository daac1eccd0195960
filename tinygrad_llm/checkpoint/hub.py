"""Models by name: from Hugging Face, once, then from its cache on this machine."""

import os
import re
from pathlib import Path

from ..gpt import SIZES
from .tensors import line, shown

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
OWNER = "openai-community"  # of OpenAI's models, which have short names here
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",  # how a conversation becomes one text
]
FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]


def find_model(name_or_dir: str | Path) -> Path:
    """The directory itself or, of a model's name such as gpt2 or owner/name, a copy of its files.

    The copy is in huggingface_hub's cache, as HF_HOME says; HF_HUB_OFFLINE=1 keeps to that. Raises
    FileNotFoundError if there is no such model or it cannot be downloaded. What neither exists nor
    can be a name, such as runs/7 where there is a folder runs, is given back: whoever opens it
    knows what to say.
    """
    path, name = as_path(name_or_dir), str(name_or_dir)
    a_name = name in SIZES or (NAME.fullmatch(name) and not path.parent.is_dir())
    if path.exists() or not a_name:
        return path
    return _downloaded(f"{OWNER}/{name}" if name in SIZES else name, name)


def as_path(directory: str | Path) -> Path:
    """Raises TypeError for what is neither a text nor a path."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"expected a directory, as a str or Path, not {shown(directory)}")
    return Path(directory)


def _downloaded(repository, name):
    here = f"there is no directory {name}, and"
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{here} to download a model of this name: pip install huggingface_hub"
        ) from None
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=FILES))
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{here} no model {repository} on Hugging Face: check the name"
        ) from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{here} {repository} is not in Hugging Face's cache and cannot be downloaded: check "
            "the network, or give a directory"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{here} {repository} cannot be downloaded: {line(error)}"
        ) from None
