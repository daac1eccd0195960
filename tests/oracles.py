"""PyTorch as the oracle: its own function for every op, and how numbers are compared with it."""

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings

from tinygrad_llm import Tensor


def holds(law, *strategies, examples=20):
    """Runs law(*drawn) over drawn examples."""
    settings(max_examples=examples)(given(*strategies)(law))()


def to_torch(a, requires_grad=False):
    """The same numbers as a torch.Tensor, a leaf."""
    return torch.tensor(np.asarray(a)).requires_grad_(requires_grad)


def torch_grad(y, xs, g=None, **keywords):
    """Gradients by PyTorch, zeros where y does not depend on x."""
    found = torch.autograd.grad(y, xs, g, allow_unused=True, **keywords)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(xs, found)]


def numbers(a):
    """A Tensor, a torch.Tensor or an array, as a NumPy array."""
    if isinstance(a, Tensor):
        return a.data
    return a.numpy(force=True) if isinstance(a, torch.Tensor) else np.asarray(a)


def agree(actual, expected, relative=1e-10):
    """Fails unless shapes and dtypes are equal and no element is off by more than `relative` of the
    largest. What cancels to nothing counts as 1e-3."""
    actual, expected = numbers(actual), numbers(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if np.array_equal(actual, expected, equal_nan=True):
        return
    scale = max(np.abs(expected).max(initial=0), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * scale)


# --- PyTorch's own ops ----------------------------------------------------------------------------


def pytorchs_own(op):
    """PyTorch's function that computes what the op computes: the one of the op's name, unless
    PyTorch has another name for it, or other arguments.
    """
    if op.name in _OTHERWISE:
        return _OTHERWISE[op.name]
    for module in (F, torch, torch.special):
        if hasattr(module, op.name):
            return getattr(module, op.name)
    raise LookupError(
        f"PyTorch has no function {op.name!r}: say in {__file__} what to compare with"
    )


def _reduction(function, default=None):
    def run(x, *, axis=default, keepdims=False):
        return function(x, dim=tuple(range(x.ndim)) if axis is None else axis, keepdim=keepdims)

    return run


def _getitem(x, *, key):  # through positions, since torch knows no negative steps
    positions = np.arange(x.numel()).reshape(x.shape)[key]
    return x.reshape(-1)[torch.tensor(positions.copy())]


def _put(x, *, key, shape):
    positions = np.arange(math.prod(shape)).reshape(shape)[key]
    flat = torch.zeros(math.prod(shape), dtype=x.dtype)
    return flat.index_add(0, torch.tensor(positions.ravel()), x.reshape(-1)).reshape(shape)


def _scatter_add(x, t, *, rows):
    zeros = torch.zeros(rows, x.shape[-1], dtype=x.dtype)
    return zeros.index_add(0, t.flatten(), x.flatten(end_dim=-2))


def _scatter(x, t, *, size):
    return torch.zeros(*x.shape[:-1], size, dtype=x.dtype).scatter_add(-1, t, x)


def _gather(x, t):
    lead = torch.broadcast_shapes(x.shape[:-1], t.shape[:-1])
    return torch.gather(x.expand(*lead, -1), -1, t.expand(*lead, -1))


def _attention(q, k, v, M=True, B=0.0, D=None, *, causal=False, scale=None):
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    seen = seen.tril(k.shape[-2] - q.shape[-2]) if causal else seen
    seen = seen & M
    bias = torch.where(seen, torch.as_tensor(B, dtype=q.dtype), -math.inf)
    lead = torch.broadcast_shapes(*[a.shape[:-2] for a in (q, k, v, bias)])
    q, k, v = (a.expand(*lead, *a.shape[-2:]) for a in (q, k, v))
    if D is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.mT) + bias
    return (D * torch.where(seen, scores.clamp(min=-1e300).softmax(-1), 0.0)) @ v


def rope(x, cos, sin, *, interleaved=False):
    """By complex numbers: (a + ib)(cos + i sin)."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    pairs = torch.view_as_real(turned)
    return (pairs if interleaved else pairs.mT).flatten(-2)


_OTHERWISE = {
    "rope": rope,
    "power": torch.pow,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "clip": lambda x, *, low=None, high=None: torch.clamp(x, low, high),
    "dropout": lambda x, keep: torch.mul(x, keep),
    "cast": lambda x, *, dtype: x.to(getattr(torch, dtype)),
    "sum": _reduction(torch.sum),
    "mean": _reduction(torch.mean),
    "max": _reduction(torch.amax),
    "min": _reduction(torch.amin),
    "logsumexp": _reduction(torch.logsumexp, default=-1),
    "softmax": lambda x, *, axis=-1: torch.softmax(x, axis),
    "log_softmax": lambda x, *, axis=-1: torch.log_softmax(x, axis),
    "layer_norm": lambda x, w, b, *, eps=1e-5: F.layer_norm(x, w.shape, w, b, eps),
    "rms_norm": lambda x, w, *, eps=1e-5: F.rms_norm(x, w.shape, w, eps),
    "attention": _attention,
    "permute_dims": lambda x, *, axes: torch.permute(x, axes),
    "matrix_transpose": lambda x: x.mT,
    "expand_dims": torch.unsqueeze,
    "broadcast_to": lambda x, *, shape: torch.broadcast_to(x, shape),
    "tril": lambda x, *, k=0: torch.tril(x, k),
    "triu": lambda x, *, k=0: torch.triu(x, k),
    "concat": lambda *xs, axis=0: torch.concat(xs, axis),
    "stack": lambda *xs, axis=0: torch.stack(xs, axis),
    "embedding": lambda w, t: F.embedding(t, w),
    "getitem": _getitem,
    "put": _put,
    "scatter_add": _scatter_add,
    "gather": _gather,
    "scatter": _scatter,
}
