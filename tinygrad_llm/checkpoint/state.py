"""Training states: all that training needs to go on exactly, the weights included, in one file.

A run's directory has them in `checkpoints/`, as step-00000800.safetensors and so on. Each is
complete in itself, written as a whole (a temporary file, fsync, rename), and holds a SHA-256 of
everything in it. An older one is deleted only when the newer one is safely on the disk.

The file is in the safetensors format: eight bytes with the length of the header, the header in
JSON, the arrays. Arrays are written from where they are and read where the file is mapped, so that
a state never takes its memory twice.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import atomic_write
from .tensors import DTYPE_NAMES, DTYPES, make_header

CHECKPOINTS = "checkpoints"
OLD_STATE = "training_state.safetensors"  # all that earlier versions of the library kept
FORMAT = "tinygrad_llm training state"
NO_DIGEST = "0" * 64  # stands in the header while the digest is computed
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
NAME = re.compile(r"step-(\d{8,})\.safetensors")


# --- a run's checkpoints --------------------------------------------------------------------------


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first: [] if there are none. Other files are passed over."""
    folder = Path(directory) / CHECKPOINTS
    found = [path for path in folder.glob("step-*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number of steps that a checkpoint was saved after."""
    return int(NAME.fullmatch(path.name)[1])


def save_checkpoint(
    directory: str | Path, step: int, state: dict[str, Any], keep: int | None = None
) -> Path:
    """Writes checkpoints/step-<step>.safetensors, then deletes all but the last `keep`, if given.

    Raises OSError if it cannot be written: then all older checkpoints are still there.
    """
    folder = Path(directory) / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08}.safetensors"
    save_training_state(path, state)
    for old in checkpoints(directory)[:-keep] if keep else []:
        old.unlink(missing_ok=True)
    for stray in folder.glob(".step-*.tmp"):  # of a save that was killed
        stray.unlink(missing_ok=True)
    return path


# --- one file -------------------------------------------------------------------------------------


def save_training_state(path: str | Path, state: dict[str, Any]) -> None:
    """Writes nested dicts and lists of arrays, and of what JSON can hold.

    The arrays become tensors, and the tree with their names in their places becomes the metadata.
    Raises TypeError for what neither can hold, OSError if the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_without_arrays(state, "state", arrays))
    metadata = {"sha256": NO_DIGEST, "format": FORMAT, "state": tree}
    header = make_header({name: (a.dtype, a.shape) for name, a in arrays.items()}, metadata)
    digest = hashlib.sha256(header)
    for array in arrays.values():
        digest.update(_bytes(array))
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header.replace(NO_DIGEST.encode(), digest.hexdigest().encode(), 1))
        for array in arrays.values():
            file.write(_bytes(array))


def load_training_state(path: str | Path) -> dict[str, Any]:
    """What save_training_state was given; tuples have become lists, and keys strings.

    The arrays are read-only and stay in the file until they are used.
    Raises FileNotFoundError if there is no such file; ValueError if a byte of it is not as it was
    written, or if something else was written.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a checkpoint of training")
    # An empty file cannot be mapped.
    data = np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, "B")
    end = 8 + int.from_bytes(data[:8].tobytes(), "little")  # of the header
    if not 8 < end <= min(len(data), LONGEST_HEADER):
        raise ValueError(f"{path} is damaged or truncated: its header is incomplete")
    header = data[8:end].tobytes()
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__")
        sha256, kind, tree = metadata["sha256"], metadata["format"], metadata["state"]
        size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError(f"{path} is damaged, or no checkpoint of training") from None
    if kind != FORMAT:
        raise ValueError(f"{path} holds no training state: it was not written by this library")
    if len(data) - end != size:
        raise ValueError(f"{path} is truncated: {len(data) - end} bytes of arrays, not {size}")
    digest = hashlib.sha256(header.replace(str(sha256).encode(), NO_DIGEST.encode(), 1))
    digest.update(data[end:])
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
    try:
        arrays = {name: _array(data[end:], entry) for name, entry in entries.items()}
        return _with_arrays(json.loads(tree), arrays)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} holds no training state, though its SHA-256 is right") from None


def _array(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    return data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array's memory, not a copy (unless it is not contiguous)."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8)


# --- a tree and the arrays in it ------------------------------------------------------------------


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """The tree with {"$tensor": name} for each array, which is put into `arrays`."""
    if isinstance(value, np.ndarray):
        if value.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name} is an array of {value.dtype}, which safetensors cannot hold")
        arrays[name] = value
        return {"$tensor": name}
    if isinstance(value, dict):
        return {key: _without_arrays(v, f"{name}/{key}", arrays) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(v, f"{name}/{i}", arrays) for i, v in enumerate(value)]
    return value


def _with_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict) and "$tensor" in value:
        return arrays[value["$tensor"]]
    if isinstance(value, dict):
        return {key: _with_arrays(v, arrays) for key, v in value.items()}
    return [_with_arrays(v, arrays) for v in value] if isinstance(value, list) else value
