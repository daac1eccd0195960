"""The ops as functions on Tensors, under PyTorch's names; here arguments are checked.

`axis` and `keepdims` are the words for PyTorch's `dim` and `keepdim`, as in NumPy and the array
API. Arguments may be Tensors, arrays or numbers. For the maths of each function see `ops/`, or
`tinygrad_llm.ops.TABLE["softmax"].doc`.
"""

import numpy as np

from . import random
from .device import CPU, of
from .ops import TABLE
from .tensor import Tensor, apply, fused, is_grad_enabled, raw

# --- activations ----------------------------------------------------------------------------------


def relu(x):
    """max(x, 0), element by element."""
    return apply(TABLE["relu"], x)


def silu(x):
    """x σ(x), element by element."""
    return apply(TABLE["silu"], x)


def gelu(x, approximate="none"):
    """x Φ(x), element by element; approximate="tanh" is the form that GPT-2 uses."""
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in names:
        raise ValueError(f"approximate is 'none' or 'tanh', not {approximate!r}")
    return apply(TABLE[names[approximate]], x)


def sigmoid(x):
    """1 / (1 + e^-x), element by element."""
    return apply(TABLE["sigmoid"], x)


def tanh(x):
    """Hyperbolic tangent, element by element."""
    return apply(TABLE["tanh"], x)


def softmax(x, axis=-1):
    """e^x / Σ e^x along an axis."""
    return apply(TABLE["softmax"], x, axis=axis)


def log_softmax(x, axis=-1):
    """x - logsumexp(x) along an axis."""
    return apply(TABLE["log_softmax"], x, axis=axis)


def logsumexp(x, axis=-1, keepdims=False):
    """log Σ e^x along an axis, without overflow."""
    return apply(TABLE["logsumexp"], x, axis=axis, keepdims=keepdims)


# --- choosing and joining -------------------------------------------------------------------------


def where(condition, a, b):
    """a where condition is true, else b; all three broadcast."""
    return apply(TABLE["where"], condition, a, b)


def maximum(a, b):
    """The larger of the two, element by element."""
    return apply(TABLE["maximum"], a, b)


def minimum(a, b):
    """The smaller of the two, element by element."""
    return apply(TABLE["minimum"], a, b)


def concat(tensors, axis=0):
    """The tensors one after the other along an axis."""
    return apply(TABLE["concat"], *_some(tensors, "concat"), axis=axis)


def stack(tensors, axis=0):
    """The tensors side by side along a new axis."""
    return apply(TABLE["stack"], *_some(tensors, "stack"), axis=axis)


def split(x, size, axis=0):
    """x in pieces along an axis, each `size` long (the last may be shorter) or as listed."""
    x = _tensor(x)
    if not -x.ndim <= axis < x.ndim:
        raise IndexError(f"split: axis {axis} is out of range for shape {x.shape}")
    length = x.shape[axis]
    if isinstance(size, int):
        if size < 1:
            raise ValueError(f"split needs a size of at least 1, not {size}")
        sizes = [min(size, length - start) for start in range(0, length, size)]
    else:
        sizes = list(size)
    if sum(sizes) != length or min(sizes, default=0) < 0:
        raise ValueError(f"split sizes {sizes} add up to {sum(sizes)}, the axis has {length}")
    ends = np.cumsum(sizes)
    before = (slice(None),) * (axis % x.ndim)
    return tuple(x[(*before, slice(int(e - n), int(e)))] for n, e in zip(sizes, ends, strict=True))


def gather(x, index, axis=-1):
    """y[..., j] = x[..., index[..., j]] along an axis; the other lengths agree."""
    x = _tensor(x)
    index = _integers(index, "gather", x)
    if not -x.ndim <= axis < x.ndim or x.ndim != index.ndim:
        raise ValueError(f"gather: axis {axis} of shapes {x.shape} and {index.shape} does not fit")
    axis = axis % x.ndim
    x, index = _last(x, axis), np.moveaxis(index, axis, -1)
    if x.shape[:-1] != index.shape[:-1]:
        raise ValueError(
            f"gather: shapes {x.shape} and {index.shape} differ before the gathered axis"
        )
    _check_range(index, x.shape[-1], "gather: index")
    y = apply(TABLE["gather"], x, index)
    return _last_back(y, axis)


# --- layers ---------------------------------------------------------------------------------------


def linear(x, weight, bias=None):
    """x weightᵀ + bias.  x (..., in), weight (out, in), bias (out) -> (..., out)."""
    if x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        got = f"x {x.shape}, weight {weight.shape}, bias {None if bias is None else bias.shape}"
        raise ValueError(f"linear: {got} do not fit; expected (..., in), (out, in), (out,)")
    return apply(TABLE["linear"], x, weight, *(() if bias is None else (bias,)))


def embedding(ids, weight):
    """Rows of a table: ids (...) in 0..V-1, weight (V, C) -> (..., C).

    Another id is an IndexError; one that lies on a GPU is not looked at, and its row is NaN.
    """
    ids = _integers(ids, "embedding", weight)
    _check_range(ids, weight.shape[0], "embedding: id")
    return apply(TABLE["embedding"], weight, ids)


def layer_norm(x, weight, bias, eps=1e-5):
    """Zero mean and unit variance over the last axis, times weight (n), plus bias (n)."""
    _same_length("layer_norm", x, weight, bias)
    return apply(TABLE["layer_norm"], x, weight, bias, eps=eps)


def rms_norm(x, weight, eps=1e-5):
    """Unit mean square over the last axis, times weight (n)."""
    _same_length("rms_norm", x, weight)
    return apply(TABLE["rms_norm"], x, weight, eps=eps)


def rope(x, cos, sin, interleaved=False):
    """Rotary positions: x (..., T, d) with each pair of a head's numbers turned; cos, sin (T, d/2).

    Pairs are (k, k + d/2) or, if interleaved, (2k, 2k + 1).
    """
    expected = (*x.shape[-2:-1], x.shape[-1] // 2)
    if x.ndim < 2 or x.shape[-1] % 2 or not cos.shape == sin.shape == expected:
        raise ValueError(
            f"rope: x {x.shape}, cos {cos.shape}, sin {sin.shape} do not fit; expected (..., T, d) "
            "with an even d, (T, d/2), (T, d/2)"
        )
    return apply(TABLE["rope"], x, cos, sin, interleaved=interleaved)


def dropout(x, p=0.5, training=True, generator=None):
    """In training: zeroes each element with probability p, divides the others by 1 - p."""
    x = _tensor(x)
    if not training or p == 0:
        return x

    def masked(x):
        return apply(TABLE["dropout"], x, _keep_mask(x.shape, p, x.dtype, generator))

    if p == 1:
        return masked(x)
    drawn = random.or_default(generator).kernel_seed
    return fused("seeded_dropout", masked, x, drawn=drawn, p=p)


def scaled_dot_product_attention(
    q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, generator=None
):
    """softmax(scale q kᵀ) v, each query over the keys it may see; zeros where it may see none.

    q (..., T, D), k (..., S, D), v (..., S, E) -> (..., T, E); leading axes broadcast.
    mask        booleans that broadcast to (..., T, S), true where a key is seen; or floats, added
                to the scores (they may require a gradient)
    is_causal   query i of T sees keys j <= i + S - T
    scale       1/√D by default
    """
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit; "
            "expected (..., T, D), (..., S, D), (..., S, E)"
        )
    lead = _batch(q, k, v)
    seen, bias = True, 0.0
    if mask is not None:
        mask = mask if isinstance(mask, Tensor) else np.asarray(mask)
        if mask.dtype.kind not in "bf":
            raise TypeError(
                "attention: a mask holds booleans (true: the key is seen) or floats (added to the "
                f"scores), not {mask.dtype}; use mask.astype(bool)"
            )
        _check_mask(mask, (*lead, q.shape[-2], k.shape[-2]))
        seen, bias = (mask, 0.0) if mask.dtype == np.bool else (True, mask)
    keep = 1.0
    if dropout_p:
        keep = _keep_mask((*lead, q.shape[-2], k.shape[-2]), dropout_p, q.dtype, generator)
    arguments = _without_defaults([seen, bias, keep], [True, 0.0, 1.0])
    return apply(TABLE["attention"], q, k, v, *arguments, causal=is_causal, scale=scale)


# --- losses ---------------------------------------------------------------------------------------


def cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    """-log softmax(logits)[target], over the rows whose target is not ignore_index.

    logits (..., V), targets (...) integers; the class axis is the last one. reduction: "mean",
    "sum" or "none" (then shape (...), 0 in ignored rows). IndexError: a target that is neither in
    0..V-1 nor ignore_index; among targets that lie on a GPU, it makes the loss NaN.
    """
    logits = _tensor(logits)
    ids = _integers(targets, "cross_entropy", logits)
    if logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"cross_entropy: logits {logits.shape} need targets of shape {logits.shape[:-1]}, "
            f"not {ids.shape}"
        )
    if of(ids) is CPU:  # on a GPU nobody waits for the answer
        counted = ids != ignore_index
        counts = ids if counted.all() else ids[counted]
        _check_range(counts, logits.shape[-1], "cross_entropy: target")
    if reduction == "mean":
        rows = logits.reshape(-1, logits.shape[-1]) if logits.ndim != 2 else logits
        return apply(TABLE["cross_entropy"], rows, ids.reshape(-1), ignore_index=ignore_index)
    _check_reduction(reduction)
    counted = ids != ignore_index
    chosen = gather(log_softmax(logits), np.where(counted, ids, 0)[..., None]).squeeze(-1)
    losses = where(counted, -chosen, 0.0)
    return losses.sum() if reduction == "sum" else losses


def linear_cross_entropy(x, weight, targets, ignore_index=-100):
    """cross_entropy(linear(x, weight), targets), by kernels with the logits in memory once.

    x (..., C), weight (V, C), targets (...) -> a scalar. IndexError as in cross_entropy.
    """
    x, weight = _tensor(x), _tensor(weight)
    ids = _integers(targets, "linear_cross_entropy", x)
    if x.shape[:-1] != ids.shape:
        raise ValueError(
            f"linear_cross_entropy: x {x.shape} needs targets of shape {x.shape[:-1]}, "
            f"not {ids.shape}"
        )

    def by_ops(x, weight, _):
        return cross_entropy(linear(x, weight), ids.reshape(x.shape[:-1]), ignore_index)

    where = of(x.data)
    if of(ids) is CPU:
        _check_range(ids[ids != ignore_index], weight.shape[0], "linear_cross_entropy: target")
    return fused(
        "linear_cross_entropy",
        by_ops,
        x.reshape(-1, x.shape[-1]),
        weight,
        Tensor(where.put(ids.reshape(-1))),
        ignore_index=ignore_index,
        gradients=is_grad_enabled() and (x.requires_grad or weight.requires_grad),
    )


def nll_loss(log_probabilities, targets, ignore_index=-100):
    """Mean of -log_probabilities[target]; shapes as in cross_entropy."""
    ids = _integers(targets, "nll_loss", log_probabilities)
    counted = ids != ignore_index
    _check_range(ids[counted], log_probabilities.shape[-1], "nll_loss: target")
    chosen = gather(log_probabilities, np.where(counted, ids, 0)[..., None]).squeeze(-1)
    return where(counted, -chosen, 0.0).sum() / int(counted.sum())


def binary_cross_entropy(probabilities, targets):
    """Mean of -(t log p + (1 - t) log(1 - p)), same shapes. The targets get no gradient.

    Raises ValueError for a p or t that is not between 0 and 1.
    """
    p, t = _tensor(probabilities), _tensor(targets)
    _check_unit("binary_cross_entropy: probability", p.data)
    _check_unit("binary_cross_entropy: target", t.data)
    return _pairs("binary_cross_entropy", p, t)


def binary_cross_entropy_with_logits(logits, targets):
    """binary_cross_entropy(sigmoid(logits), targets), without overflow."""
    return _pairs("binary_cross_entropy_with_logits", logits, targets)


def mse_loss(x, target):
    """Mean of (x - target)²; both of the same shape."""
    return _pairs("mse_loss", x, target)


# --- arguments ------------------------------------------------------------------------------------


def _pairs(name, x, target):
    x, target = _tensor(x), _tensor(target)
    if x.shape != target.shape:
        raise ValueError(f"{name}: shapes {x.shape} and {target.shape} differ")
    return apply(TABLE[name], x, target)


def _tensor(x):
    return x if isinstance(x, Tensor) else Tensor(x)


def _batch(q, k, v):
    """The batch axes of q kᵀ."""
    lead = q.shape[:-2]
    if lead == k.shape[:-2] == v.shape[:-2]:
        return lead
    try:
        np.broadcast_shapes(lead, k.shape[:-2], v.shape[:-2])
        return np.broadcast_shapes(lead, k.shape[:-2])
    except ValueError:
        raise ValueError(
            f"attention: batch axes of q {q.shape}, k {k.shape} and v {v.shape} differ"
        ) from None


def _check_mask(mask, scores):
    """Raises ValueError unless the mask broadcasts with scores of that shape."""
    try:
        np.broadcast_shapes(mask.shape, scores)
    except ValueError:
        raise ValueError(
            f"attention: a mask of shape {mask.shape} does not broadcast to the scores' {scores}"
        ) from None


def _some(tensors, name):
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{name} needs at least one tensor")
    return tensors


def _integers(ids, name, x):
    """The array of ids that an op is to have beside the Tensor x: they follow it."""
    ids = raw(ids)
    if of(ids) is not CPU:
        ids = of(x.data).put(ids)
    if ids.size and ids.dtype.kind not in "iu":  # an empty list has no dtype of its own
        raise TypeError(f"{name} takes integers, not {ids.dtype}")
    return ids.astype(np.int64, copy=False)


def _check_range(ids, n, what):
    """Raises IndexError for an id that is not in 0..n-1. Those of a GPU are not waited for."""
    if of(ids) is CPU and ids.size and not (ids.min() >= 0 and ids.max() < n):
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise IndexError(f"{what} {wrong} is out of range; expected 0 to {n - 1}")


def _check_unit(what, x):
    wrong = x[~((x >= 0) & (x <= 1))]  # nan, too
    if wrong.size:
        raise ValueError(f"{what} {wrong[0]} is not between 0 and 1")


def _check_reduction(reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")


def _same_length(name, x, *weights):
    if any(w.shape != x.shape[-1:] for w in weights):
        shapes = ", ".join(str(w.shape) for w in weights)
        raise ValueError(f"{name}: x {x.shape} needs weights of shape {x.shape[-1:]}, not {shapes}")


def _keep_mask(shape, p, dtype, generator):
    """1/(1-p) where an element is kept, 0 where it is dropped; None if all are kept."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability {p} is not between 0 and 1")
    if p == 0:
        return None
    if dtype.kind not in "fcV":  # c: the gradient checker's numbers; V: bfloat16
        raise TypeError(f"dropout is for floating-point tensors, not {dtype}")
    generator = random.or_default(generator)
    kept = generator.bernoulli(1 - p, shape).astype(dtype)
    return kept if p == 1 else kept / dtype.type(1 - p)


def _without_defaults(values, defaults):
    """Values up to the last one that is not its default: fewer arguments, less to compute."""
    n = max((i + 1 for i, (v, d) in enumerate(zip(values, defaults)) if v is not d), default=0)
    return values[:n]


def _last(x, axis):
    """x with an axis moved to the end."""
    return x if axis == x.ndim - 1 else x.permute(*[i for i in range(x.ndim) if i != axis], axis)


def _last_back(x, axis):
    """x with its last axis moved back to where it was."""
    order = list(range(x.ndim - 1))
    order.insert(axis, x.ndim - 1)
    return x if axis == x.ndim - 1 else x.permute(*order)
