"""Tensors in safetensors files, the one format that this library reads and writes."""

from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Raises ValueError if it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): cut short?") from None
    except TypeError as error:  # a dtype that neither NumPy nor ml_dtypes has
        raise ValueError(f"{path}: {error}; expected float32, float16 or bfloat16") from None
