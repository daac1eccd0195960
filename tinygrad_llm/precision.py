"""Computing with 16 bits: which ops may, and what the others do instead.

Weights and activations of bfloat16 or float16 take half the memory of float32, and matrix products
of them are many times as fast on a GPU. What they cannot do is add up: bfloat16 holds three digits,
and float16 nothing above 65504. So

    ops that only move numbers, or      work on the 16 bits
    round once anyway: NATIVE
    losses: LOSSES                      compute in float32, and their result is float32
    all others                          compute in float32 and round once, at the end

A kernel that takes 16 bits keeps these rules inside: its products and sums are float32. And an
optimizer keeps a float32 copy of every 16-bit parameter, since most steps are smaller than half a
unit of its last place: see optim.py. Micikevicius et al., "Mixed Precision Training", 2018.
"""

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
NARROW = (DTYPES["bfloat16"], DTYPES["float16"])
NATIVE = frozenset({
    "reshape", "permute_dims", "matrix_transpose", "expand_dims", "squeeze", "broadcast_to",
    "getitem", "put", "concat", "stack", "cast", "add", "subtract", "multiply", "negative",
})  # fmt: skip
LOSSES = frozenset({
    "cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss",
})  # fmt: skip


def dtype(name):
    """The NumPy dtype of that name. Raises TypeError."""
    try:
        if name is not None:  # which NumPy takes for float64
            return DTYPES.get(name) or np.dtype(name)
    except TypeError:
        pass
    raise TypeError(
        f"there is no dtype or device {name!r}; expected float32, bfloat16, float16, ... or cpu, "
        "cuda, cuda:1, ..."
    )


def is_narrow(x):
    """Whether it is an array of 16-bit floating-point numbers."""
    return hasattr(x, "dtype") and x.dtype in NARROW


def in_float32(forward, vjp, saves, name):
    """An op's two functions for arrays some of which are narrow: computed as the table says."""
    if name in NATIVE:
        return forward, vjp

    def wide_forward(*arrays, **attributes):
        y = forward(*map(_wide, arrays), **attributes)
        if name in LOSSES:
            return y
        narrow = _narrowest(arrays)
        return (_as(y[0], narrow), y[1]) if saves else _as(y, narrow)

    def wide_vjp(g, y, *arrays, **attributes):  # the engine rounds the gradients
        return vjp(_wide(g), _wide(y), *map(_wide, arrays), **attributes)

    return wide_forward, wide_vjp


def _wide(x):
    return x.astype(np.float32) if is_narrow(x) else x


def _as(y, dtype):
    """A floating-point result in that dtype; None leaves it as it is."""
    is_float = dtype is not None and y.dtype in (np.float32, np.float64)
    return y.astype(dtype) if is_float else y


def _narrowest(arrays):
    """The dtype of the result: that of the arrays if all are narrow, and None, for float32, if some
    floating-point array is not.
    """
    floats = {a.dtype for a in arrays if hasattr(a, "dtype") and a.dtype.kind in "fV"}
    return floats.pop() if len(floats) == 1 else None
