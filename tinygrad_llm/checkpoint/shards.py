"""The weights of a checkpoint directory: model.safetensors, or shards of it with an index.

What is written replaces what was there in one step, so that a reader, and whoever comes after a
crash, finds all of the old weights or all of the new ones, never some of each:

- New shards get names that no file has yet. Then comes the index, then the old weights go.
- As in transformers, model.safetensors counts if both it and an index are there. So a single file
  replaces shards when it appears, and shards replace a single file when it is removed.
- A reader that finds another index after it has opened the shards begins again: names of shards
  come back in time. What it has opened stays readable, whatever becomes of the names.
"""

import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import numpy as np

from ..data.files import atomic_write, remove, together
from .tensors import (
    CONVERT,
    PICKLE,
    StoredTensor,
    few,
    read_header,
    read_json,
    shown,
    while_unreplaced,
    write_tensors,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-v\d+)?-\d{5}-of-\d{5}\.safetensors")  # as we and transformers name them
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
OTHER_FORMATS = {  # by the ends of files' names, the longer one first
    (".bin.index.json",): "lists pickles, which can run any code when opened",
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): PICKLE,
    (".h5", ".msgpack", ".gguf"): "is no safetensors file",  # TensorFlow's, Flax's, llama.cpp's
}

Tensors = Mapping[str, StoredTensor | np.ndarray]


# --- reading --------------------------------------------------------------------------------------


def read_weights(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of model.safetensors or of its shards, by name; no number is read.

    Raises FileNotFoundError if there are no weights or a shard is missing, ValueError if a file is
    damaged, the index and the shards disagree, or the weights are of another format.
    """
    for name in (WEIGHTS, INDEX, WEIGHTS):  # which may have replaced the shards meanwhile
        path = directory / name
        try:
            return _read_shards(path) if name == INDEX else read_header(path)[0]
        except FileNotFoundError:
            if path.exists():  # and a shard is missing
                raise
    names = sorted(path.name for path in directory.iterdir())
    if shards := [name for name in names if SHARD.fullmatch(name)]:
        raise FileNotFoundError(
            f"{directory} has shards, such as {shards[0]}, but no {INDEX}: get it, too"
        )
    if complaint := other_format(directory):
        raise ValueError(complaint)
    raise FileNotFoundError(f"{directory} has no {WEIGHTS}: the checkpoint is incomplete")


def _read_shards(index):
    return while_unreplaced(index, _read_listed)


def _read_listed(index):
    directory = Path(index.name).parent
    places = _places(directory / INDEX)
    tensors = {}
    for shard in sorted(set(places.values())):
        if not (directory / shard).exists():
            raise FileNotFoundError(f"{directory} has no {shard}, which {INDEX} lists")
        found, _ = read_header(directory / shard)
        listed = {name for name, place in places.items() if place == shard}
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{directory / shard}: {few(sorted(twice))} is in another shard, too")
        if found.keys() != listed:
            odd = few(sorted(found.keys() ^ listed))
            raise ValueError(f"{directory / shard} and {INDEX} disagree about {odd}")
        tensors |= found
    return tensors


def _places(index):
    """Which tensor is in which file of the same directory, as an index says."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map: expected one from tensors to files")
    for shard in places.values():
        plain = isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", shard)
        if not plain:
            raise ValueError(
                f"{index} lists {shown(shard)}: expected the name of a .safetensors file beside it"
            )
    return places


def other_format(directory: Path) -> str | None:
    """What to say of a directory whose weights are of a format that is not read; None of others."""
    names = sorted(path.name for path in directory.iterdir())
    if any(name.startswith("model.ckpt.") for name in names):
        return (
            f"{directory} holds OpenAI's TensorFlow checkpoint, which only TensorFlow reads: "
            "Hugging Face has the same weights as safetensors, named gpt2, gpt2-medium, gpt2-large "
            "and gpt2-xl"
        )
    if "adapter_config.json" in names:
        return (
            f"{directory} holds a LoRA adapter, and no model: load_adapter adds it to the one that "
            "it was trained on; the directory of the run has both as one model"
        )
    complaints = filter(None, map(other_file, names))
    return next((f"{directory} has no {WEIGHTS}, and {text}" for text in complaints), None)


def other_file(name: str) -> str | None:
    """Why a file of weights in another format is refused, and what to do; None of other files."""
    for ends, what in OTHER_FORMATS.items():
        if name.endswith(ends):
            return f"{name} {what}: {CONVERT}"
    return None


# --- writing --------------------------------------------------------------------------------------


def write_weights(
    directory: Path, tensors: Tensors, dtype: np.dtype, limit: int | None = None
) -> None:
    """Replaces the directory's weights by these, in one file or in shards of at most `limit` bytes
    (a larger tensor has one of its own).

    Raises ValueError for numbers too large for the dtype, OSError if they cannot be written; the
    old weights stay then.
    """
    shards = [dict(tensors)] if limit is None else _split(tensors, dtype, limit)
    old = sorted(path.name for path in directory.iterdir() if SHARD.fullmatch(path.name))
    with together():
        if len(shards) == 1:
            new = [WEIGHTS]
            _write(directory / WEIGHTS, shards[0], dtype)
        else:
            new = [*_free_names(directory, len(shards)), INDEX]
            for name, shard in zip(new, shards):
                _write(directory / name, shard, dtype)
            _write_index(directory / INDEX, dict(zip(new, shards)), dtype)
        stale = [name for name in [WEIGHTS, INDEX, *old] if name not in new]
        remove(*(directory / name for name in stale))  # first what decides which weights count


def size_in_bytes(size: int | str | None) -> int | None:
    """1000, "500MB", "2 GiB" -> bytes; None, which is no limit, stays so. Raises ValueError."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(size).strip().lower())
    if not match or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise ValueError(f"max_shard_size {size!r}: expected a size such as 500MB or 2GB")
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def _split(tensors: Tensors, dtype, limit):
    """The tensors in their order, in groups of at most `limit` bytes."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        nbytes = int(np.prod(tensor.shape)) * dtype.itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards


def _free_names(directory, n):
    """transformers' names for n shards or, where there are shards, the same with a number."""
    for i in count(1):
        stem = "model" if i == 1 else f"model-v{i}"
        if not any(directory.glob(f"{stem}-[0-9]*")):
            return [f"{stem}-{k:05}-of-{n:05}.safetensors" for k in range(1, n + 1)]


def _write(path, tensors, dtype):
    with atomic_write(path) as file:
        write_tensors(file, tensors, dtype, {"format": "pt"})


def _write_index(path, shards, dtype):
    names = {name: file for file, shard in shards.items() for name in shard}
    sizes = [int(np.prod(t.shape)) * dtype.itemsize for s in shards.values() for t in s.values()]
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": names}
    with atomic_write(path) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())
