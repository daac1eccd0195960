"""A GPT from first principles: NumPy, mathematics, and nothing hidden."""

import numpy as np

from .tensor import Tensor, grad, is_grad_enabled, no_grad

__version__ = "0.1.0"
__all__ = ["Tensor", "from_numpy", "grad", "is_grad_enabled", "no_grad", "tensor"]


def tensor(data, dtype=None, requires_grad=False, device=None):
    """A Tensor with a copy of `data`; integers become int64, Python floats float32.

    device      where it is to be: "cpu", "cuda", ...; None: where the data is
    """
    copied = Tensor(data, dtype=dtype)
    copied.data = copied.data.copy()
    copied = copied if device is None else copied.to(device)
    return copied.requires_grad_(requires_grad)


def from_numpy(array):
    """A Tensor that shares its memory with the array: what changes in one, changes in both."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy takes a NumPy array, not {type(array).__name__}; use tensor()")
    return Tensor(array)
