"""The ops of a GPT, one by one, at the shapes of a small model and of GPT-2, forward alone and
forward plus backward: ours with kernels, ours as plain maths, and PyTorch eager.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as TF  # noqa: N812

import tinygrad_llm.functional as F  # noqa: N812 (PyTorch's name for it)
from tinygrad_llm import Tensor, backend, no_grad

from .measure import Method, Ratio, Timing, interleaved
from .report import Table, duration


@dataclass(frozen=True)
class Size:
    """B sequences of T tokens, C channels in H heads, V token ids."""

    B: int
    T: int
    C: int
    H: int
    V: int

    def __str__(self):
        return f"B {self.B}, T {self.T}, C {self.C}, H {self.H}, V {self.V}"


SIZES = {
    "tiny": Size(B=2, T=8, C=16, H=2, V=11),  # to see that everything runs
    "small": Size(B=12, T=64, C=128, H=4, V=65),  # nanoGPT's setting for a CPU
    "gpt2": Size(B=1, T=512, C=768, H=12, V=50257),
}


@dataclass(frozen=True)
class Case:
    """An op with its inputs: `ours` and `peer` take them as Tensors of their own kind.

    shapes      of the floating-point inputs, which all get gradients
    ids         how many of what integers come after those: (shape, highest + 1), or None
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable
    peer: Callable
    ids: tuple[tuple[int, ...], int] | None = None

    def inputs(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape).astype(np.float32) for shape in self.shapes]
        return arrays if self.ids is None else [*arrays, rng.integers(0, self.ids[1], self.ids[0])]


def cases(s: Size) -> list[Case]:
    """What a GPT of this size computes, in the order of its forward pass."""
    B, T, C, H, V = s.B, s.T, s.C, s.H, s.V
    D, x = C // H, (B, T, C)
    return [
        Case(
            "embedding",
            ((V, C),),
            lambda w, ids: F.embedding(ids, w),
            lambda w, ids: TF.embedding(ids, w),
            ids=((B, T), V),
        ),
        Case("add", (x, x), lambda a, b: a + b, lambda a, b: a + b),
        Case("layer_norm", (x, (C,), (C,)), F.layer_norm, _torch_layer_norm),
        Case("linear C to 3C", (x, (3 * C, C), (3 * C,)), F.linear, TF.linear),
        Case("linear C to C", (x, (C, C), (C,)), F.linear, TF.linear),
        Case("softmax", ((B, H, T, T),), F.softmax, lambda x: TF.softmax(x, dim=-1)),
        Case(
            "attention, causal",
            ((B, H, T, D),) * 3,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
        Case("qkv to heads to y", ((B, T, 3 * C),), _our_heads(s), _torch_heads(s)),
        Case("linear C to 4C", (x, (4 * C, C), (4 * C,)), F.linear, TF.linear),
        Case(
            "gelu_tanh",
            ((B, T, 4 * C),),
            lambda x: F.gelu(x, "tanh"),
            lambda x: TF.gelu(x, approximate="tanh"),
        ),
        Case("linear 4C to C", ((B, T, 4 * C), (C, 4 * C), (C,)), F.linear, TF.linear),
        Case("linear C to V", (x, (V, C)), F.linear, TF.linear),
        Case("cross_entropy", ((B * T, V),), F.cross_entropy, TF.cross_entropy, ids=((B * T,), V)),
    ]


def _torch_layer_norm(x, w, b):
    return TF.layer_norm(x, w.shape, w, b)


def _our_heads(s):
    """Attention as the model calls it: q, k and v are cut out of one array, y is put together."""

    def run(qkv):
        q, k, v = F.split(qkv, s.C, axis=-1)
        q, k, v = (a.reshape(s.B, s.T, s.H, -1).transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(s.B, s.T, s.C)

    return run


def _torch_heads(s):
    def run(qkv):
        q, k, v = qkv.split(s.C, dim=-1)
        q, k, v = (a.view(s.B, s.T, s.H, -1).transpose(1, 2) for a in (q, k, v))
        y = TF.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(s.B, s.T, s.C)

    return run


# --- one case in three readings -------------------------------------------------------------------


class Calls:
    """One case made ready: `forward()` and `both()`, forward plus backward, are what is timed."""

    def __init__(self, function, tensors, no_grad, array):
        self.function, self.tensors, self.no_grad = function, tensors, no_grad
        shape = tuple(self.forward().shape)
        gradient = np.random.default_rng(1).standard_normal(shape, np.float32)
        self.gradient = array(gradient if shape else np.ones((), np.float32))

    def forward(self):
        with self.no_grad():
            return self.function(*self.tensors)

    def both(self):
        for tensor in self.tensors:
            tensor.grad = None
        y = self.function(*self.tensors)
        y.backward(self.gradient)
        return y

    def values(self) -> list[np.ndarray]:
        """The result and the gradients, to be compared."""
        arrays = [self.both().detach(), *(t.grad for t in self.tensors if t.requires_grad)]
        return [np.asarray(a) for a in arrays]


def _of_ours(case):
    arrays = case.inputs()
    tensors = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    return Calls(case.ours, tensors, no_grad, np.asarray)


def _of_torch(case):
    tensors = [torch.from_numpy(a) for a in case.inputs()]
    for t in tensors:
        t.requires_grad_(t.is_floating_point())
    return Calls(case.peer, tensors, torch.no_grad, torch.from_numpy)


def _as_maths(call):
    def run():
        with backend.using(backend.MATHS):
            call()

    return run


def check_equal(case: str, ours: list[np.ndarray], peer: list[np.ndarray]) -> float:
    """The largest difference relative to an array's largest element; ValueError above 1e-3."""
    error = max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
        for a, b in zip(ours, peer, strict=True)
    )
    if not error < 1e-3:
        raise ValueError(f"{case}: ours and PyTorch differ by {error:.1e}; nothing to compare")
    return error


def measure_case(case: Case, method: Method) -> dict[str, dict[str, Timing]]:
    """Timings by "forward" and "forward + backward", then by "ours", "maths" and "torch"."""
    ours, peer = _of_ours(case), _of_torch(case)
    check_equal(case.name, ours.values(), peer.values())
    calls = {"forward": (ours.forward, peer.forward), "forward + backward": (ours.both, peer.both)}
    return {
        what: interleaved({"ours": mine, "maths": _as_maths(mine), "torch": theirs}, method)
        for what, (mine, theirs) in calls.items()
    }


def measure_size(name: str, method: Method) -> tuple[dict, list[Table]]:
    """All cases of a size; returns the numbers and two tables."""
    size, data, tables = SIZES[name], {}, {}
    for case in cases(size):
        for what, times in measure_case(case, method).items():
            ratio = Ratio.of(times["torch"], times["ours"])
            kernels = Ratio.of(times["maths"], times["ours"])
            data.setdefault(case.name, {})[what] = {
                **{which: timing.to_dict() for which, timing in times.items()},
                "ratio": ratio.to_dict(),
                "ratio_to_maths": kernels.to_dict(),
            }
            table = tables.setdefault(what, _table(name, size, what))
            cells = [duration(times[which].median) for which in ("ours", "maths", "torch")]
            table.rows.append([case.name, *cells, str(ratio), f"{ratio.best:.2f}"])
    return data, list(tables.values())


def _table(name, size, what):
    columns = ["op", "ours", "plain maths", "PyTorch", "ratio", "best"]
    return Table(f"{name} ({size}), {what}", columns)
