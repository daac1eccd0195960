"""Training states: all that training needs to go on exactly, the weights included, in one file.

The file is replaced as a whole: a temporary file beside it, fsync, rename. A kill between it and
the model's files leaves them whole, if of different steps; neither is read for the other's purpose,
so generation and resumption still work.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..data.files import atomic_write
from .tensors import read_tensors

TRAINING_STATE = "training_state.safetensors"


def save_training_state(directory: str | Path, state: dict[str, Any]) -> None:
    """Writes training_state.safetensors: nested dicts and lists of arrays and of what JSON holds.

    The arrays become tensors, and the tree with their names in their places becomes the metadata.
    """
    arrays = {}

    def without_arrays(value, name):
        if isinstance(value, np.ndarray):
            arrays[name] = np.ascontiguousarray(value)
            return {"$tensor": name}
        if isinstance(value, dict):
            return {key: without_arrays(v, f"{name}/{key}") for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [without_arrays(v, f"{name}/{i}") for i, v in enumerate(value)]
        return value

    tree = json.dumps(without_arrays(state, "state"))
    with atomic_write(Path(directory) / TRAINING_STATE) as file:
        file.write(safetensors.numpy.save(arrays, {"state": tree}))


def load_training_state(directory: str | Path) -> dict[str, Any]:
    """What save_training_state was given; tuples have become lists, and keys strings.

    Raises FileNotFoundError if there is none, ValueError if it is damaged.
    """
    path = Path(directory) / TRAINING_STATE
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no {TRAINING_STATE}: expected a directory that training was saved in"
        )
    arrays, metadata = read_tensors(path)

    def with_arrays(value):
        if isinstance(value, dict) and "$tensor" in value:
            return arrays[value["$tensor"]]
        if isinstance(value, dict):
            return {key: with_arrays(v) for key, v in value.items()}
        return [with_arrays(v) for v in value] if isinstance(value, list) else value

    try:
        return with_arrays(json.loads(metadata["state"]))
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} holds no training state: it was not written by this library"
        ) from None
