"""Mends Triton's interpreter (TRITON_INTERPRET=1), versions 3.6 to 3.9, for arrays that are not
PyTorch's and for bfloat16.

The interpreter keeps bfloat16 as uint16 and computes on those integers: sums, products and tl.dot
are silently wrong, and float32 is truncated, not rounded. Here bfloat16 is NumPy's extension type
of `ml_dtypes`, which computes as the hardware does: in float32, rounded to nearest, ties to even.
"""

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter as theirs

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def repair():
    """Once in a process that interprets; importing `kernels.gpu` does it."""
    numpy_dtype = theirs._get_np_dtype
    builder = theirs.InterpreterBuilder
    dot = builder.create_dot
    patch_tensor = theirs._patch_lang_tensor

    def with_bfloat16(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return _BFLOAT16 if element == tl.bfloat16 else numpy_dtype(dtype)

    def cast(self, source, dtype, rounding_mode=None):
        data = source.data.astype(theirs._get_np_dtype(dtype))
        return theirs.TensorHandle(data, dtype.scalar)

    def dot_in_float32(self, a, b, *rest):
        return dot(self, _widened(a), _widened(b), *rest)

    def index_too(tensor, *scope):
        patch_tensor(tensor, *scope)  # NumPy 2.4 makes no number of an array of shape (1,)
        number = lambda self: int(self.handle.data.item())  # noqa: E731
        scope[0].set_attr(tensor, "__index__", number) if scope else None

    theirs._patch_lang = _once_for_each_launch(theirs._patch_lang)
    theirs._get_np_dtype = with_bfloat16
    theirs._interpreter = _Memory(theirs._interpreter)
    theirs._patch_lang_tensor = index_too
    builder.cast_impl = cast
    builder.create_fp_to_fp = cast
    builder.create_dot = dot_in_float32
    theirs.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    theirs.GridExecutor._restore_args_dev = lambda self, *args: None


def _once_for_each_launch(patch):
    """A launch puts the interpreter's functions into triton.language; so does, again, each call of
    one jit function by another, which takes longer than the call. Here only the launch does.
    """
    patched = set()

    def patch_once(fn):
        modules = {id(m) for m in fn.__globals__.values() if m is tl or m is tl.core}
        if modules <= patched:
            return theirs._LangPatchScope()  # with nothing to restore
        scope = patch(fn)
        patched.update(modules)
        restore = scope.restore

        def restored():
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    return patch_once


def _widened(handle):
    if handle.data.dtype != _BFLOAT16:
        return handle
    return theirs.TensorHandle(handle.data.astype(np.float32), tl.float32)


class _Memory:
    """Triton's C++ part, which loads and stores; it knows NumPy's own dtypes only."""

    def __init__(self, native):
        self._native = native

    def __getattr__(self, name):
        return getattr(self._native, name)

    def load(self, addresses, mask, other, dtype):
        if dtype != _BFLOAT16:
            return self._native.load(addresses, mask, other, dtype)
        bits = other.view(np.uint16)
        return self._native.load(addresses, mask, bits, bits.dtype).view(_BFLOAT16)

    def store(self, addresses, values, mask):
        values = values.view(np.uint16) if values.dtype == _BFLOAT16 else values
        return self._native.store(addresses, values, mask)
