"""A checkpoint's copy in another dtype or other shards, from file to file: no model is made."""

from pathlib import Path

from numpy.typing import DTypeLike

from ..data.files import atomic_write, together
from .hub import TOKENIZER_FILES, as_path
from .hugging_face import folder_for_new, open_checkpoint, weights_dtype, write_config
from .shards import size_in_bytes, write_weights
from .tensors import OpenFile


def export_checkpoint(
    name_or_dir: str | Path,
    directory: str | Path,
    dtype: DTypeLike = "float32",
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a checkpoint into a new directory, with the tokenizer's files, if there are any.

    All of config.json is kept but the dtype. All files come, or none. Raises ValueError if
    the directory exists and is not empty, if the source is no GPT-2 or the arguments are not as in
    `save_model`, OSError if the files cannot be written.
    """
    dtype, limit = weights_dtype(dtype), size_in_bytes(max_shard_size)
    source, directory = open_checkpoint(name_or_dir), as_path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists, and would be overwritten: choose another place")
    with folder_for_new(directory), together():
        write_weights(directory, source.tensors, dtype, limit)
        for name in TOKENIZER_FILES:
            if (source.directory / name).exists():
                with atomic_write(directory / name) as file:
                    file.write(OpenFile(source.directory / name).readall())
        write_config(directory, source.config, dtype)
