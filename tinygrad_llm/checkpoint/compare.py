"""Two checkpoints side by side: which settings and which numbers differ, and by how much."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .hugging_face import Checkpoint
from .tensors import StoredTensor, pieces


@dataclass(frozen=True)
class Difference:
    """How far two tensors are apart.

    shapes      (of A, of B), of which one is None where the tensor is missing
    largest     the largest |a - b|, in float32; NaN where one of them is NaN, None if the shapes
                differ
    relative    the same over the largest |a|
    """

    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    largest: float | None = None
    relative: float | None = None


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """({setting: (in A, in B)}, {tensor: Difference}), of what differs only: both empty if nothing.

    Settings are those of GPTConfig. Numbers are compared as float32, whatever dtypes they are
    stored in, a piece of each file at a time.
    """
    ours, theirs = vars(a.cfg), vars(b.cfg)
    settings = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    tensors = {}
    for name in [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]:
        if difference := _difference(a.tensors.get(name), b.tensors.get(name)):
            tensors[name] = difference
    return settings, tensors


def _difference(a: StoredTensor | None, b: StoredTensor | None) -> Difference | None:
    shapes = a and a.shape, b and b.shape
    if shapes[0] != shapes[1]:
        return Difference(shapes)
    largest = scale = 0.0
    for rows in pieces(a):
        x, y = (np.asarray(tensor[rows], np.float32) for tensor in (a, b))
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf, which are the same
            apart = np.where(same, 0, np.abs(x - y)).max()
        largest = np.maximum(largest, apart)  # which is NaN if one of them is
        scale = np.fmax.reduce(np.abs(x), axis=None, initial=scale)
    if largest == 0:
        return None
    return Difference(shapes, float(largest), float(largest / scale) if scale else math.inf)
