"""Token sequences: checking them, splitting off a validation part, keeping them in a file.

A file of tokens is memory-mapped: a corpus larger than memory can be trained on.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_llm.data.files import atomic_write

TOKEN_DTYPES = (np.dtype(np.uint16), np.dtype(np.uint32))


def as_tokens(tokens: ArrayLike) -> np.ndarray:
    """The ids as a one-dimensional integer array; arrays, memory-mapped too, are not copied.

    Raises TypeError for anything but integers, ValueError for another number of dimensions.
    """
    if isinstance(tokens, str | bytes):
        raise TypeError("tokens must be integer ids, got a text: give tokenizer.encode(text)")
    array = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens must be one sequence of ids, got an array of shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"tokens must be integer ids, got {array.dtype}: encode the text first")
    return array


def train_val_split(
    tokens: ArrayLike, val_fraction: float = 0.1, context: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one token sequence into a training part and the validation part at its end.

    The cut is at int((1 - val_fraction) * len(tokens)). Validation text is one contiguous tail:
    random windows would overlap with training windows.

    Raises ValueError unless 0 < val_fraction < 1 and each part holds a window of `context` inputs
    and their targets, that is context + 1 tokens.
    """
    tokens = as_tokens(tokens)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    cut = int((1 - val_fraction) * len(tokens))
    train, val = tokens[:cut], tokens[cut:]
    for name, part in (("training", train), ("validation", val)):
        if len(part) < context + 1:
            raise ValueError(
                f"the {name} part has {len(part)} of {len(tokens)} tokens, but one window needs "
                f"{context + 1}: use a longer text or a shorter context"
            )
    return train, val


def write_tokens(path: str | Path, ids: ArrayLike) -> None:
    """Write token ids to a `.npy` file, as uint16 if all fit and as uint32 otherwise.

    Raises TypeError for anything but integers, ValueError for no ids or ids outside 0..2**32-1.
    """
    ids = as_tokens(ids)
    if not ids.size:
        raise ValueError("no token ids to write: encode some text first")
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest > np.iinfo(np.uint32).max:
        raise ValueError(f"token ids must lie in 0..2**32-1, got {smallest}..{largest}")
    fits = largest <= np.iinfo(np.uint16).max
    with atomic_write(path) as file:
        np.save(file, ids.astype(np.uint16 if fits else np.uint32, copy=False))


def open_tokens(path: str | Path) -> np.ndarray:
    """Memory-map a file of `write_tokens`, read-only: (N,) uint16 or uint32.

    Raises FileNotFoundError for a missing file, ValueError for anything that is no token file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}, the file of encoded text, does not exist")
    expected = "expected a one-dimensional .npy file of uint16 or uint32, as write_tokens makes it"
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise ValueError(f"{path} is not a token file, or is truncated: {expected}") from None
    if not isinstance(tokens, np.ndarray):  # an .npz archive
        tokens.close()
        raise ValueError(f"{path} is an archive of arrays: {expected}")
    if tokens.ndim != 1 or tokens.dtype not in TOKEN_DTYPES:
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}: {expected}")
    return tokens
