"""What the tape itself costs for each op: long chains of ops on arrays so small that NumPy's own
work is a fraction of the time, and that fraction is measured and taken off.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinygrad_llm import Tensor

from .measure import Method, Ratio, interleaved
from .report import Table, duration

SIDE = 8  # arrays are 8x8
TARGET = 4e-6  # seconds for an op, forward plus backward


@dataclass(frozen=True)
class Link:
    """One op of a chain h ← op(h, w), and the NumPy calls that it comes down to.

    trains      whether w wants a gradient, too
    numpy       forward: (h, w) -> y
    backward    (g, y, h, w) -> what each input gets
    """

    name: str
    op: Callable
    trains: bool
    numpy: Callable
    backward: Callable


LINKS = (
    Link("h + w", lambda h, w: h + w, False, np.add, lambda g, y, h, w: (g, g)),
    Link("h * w", lambda h, w: h * w, False, np.multiply, lambda g, y, h, w: (g * w, g * h)),
    Link(
        "tanh(h)",
        lambda h, w: h.tanh(),
        False,
        lambda h, w: np.tanh(h),
        lambda g, y, h, w: (g * (1 - y * y), None),
    ),
    Link("h @ w", lambda h, w: h @ w, True, np.matmul, lambda g, y, h, w: (g @ w.T, h.T @ g)),
)


def measure_tape(method: Method, length: int) -> tuple[dict, Table]:
    """Times chains of `length` ops; returns the numbers and the table."""
    columns = ["forward + backward", "ours", "NumPy in it", "tape", "at best"]
    columns += ["PyTorch", "ratio", "best"]
    table = Table(f"An op on 8x8 arrays, in a chain of {length}", columns)
    data = {}
    for link in LINKS:
        times = interleaved(_alternatives(link, length), method)
        times = {name: timing.per(length) for name, timing in times.items()}
        tape = times["ours"].minus(times["numpy"])
        ratio = Ratio.of(times["torch"], times["ours"])
        data[link.name] = {name: timing.to_dict() for name, timing in times.items()}
        data[link.name] |= {"tape": tape.to_dict(), "ratio": ratio.to_dict()}
        seconds = [times["ours"].median, times["numpy"].median, tape.median, tape.best]
        cells = [duration(s) for s in (*seconds, times["torch"].median)]
        table.rows.append([link.name, *cells, str(ratio), f"{ratio.best:.2f}"])
    return data, table


def note(data: dict) -> str:
    """How the tape's cost compares with its target, in a sentence."""
    costs = [op["tape"]["seconds"] for op in data.values()]
    median, best = (sum(cost[key] for cost in costs) / len(costs) for key in ("median", "best"))
    return (
        f"The tape's own cost is {duration(median)} for an op, forward plus backward, the mean of "
        f"these ({duration(best)} at best); the target is {duration(TARGET)}."
    )


def _alternatives(link, length):
    import torch

    x, w = np.random.default_rng(0).standard_normal((2, SIDE, SIDE)).astype(np.float32)
    w = np.linalg.qr(w)[0] if link.name == "h @ w" else np.sign(w)  # long products stay in range
    h_torch = torch.tensor(x, requires_grad=True)
    w_torch = torch.tensor(w, requires_grad=link.trains)
    return {
        "ours": _chain(link, length, Tensor(x, True), Tensor(w, link.trains), np.ones_like(x)),
        "numpy": lambda: _numpy_chain(link, length, x, w),
        "torch": _chain(link, length, h_torch, w_torch, torch.ones(SIDE, SIDE)),
    }


def _chain(link, length, x, w, gradient):
    """The chain on our Tensors or on PyTorch's: both have the same face."""

    def run():
        x.grad = w.grad = None
        h = x
        for _ in range(length):
            h = link.op(h, w)
        h.backward(gradient)

    return run


def _numpy_chain(link, length, x, w):
    """The same numbers without a tape: outputs in a list, then backwards through it."""
    hs, total = [x], None
    for _ in range(length):
        hs.append(link.numpy(hs[-1], w))
    g = np.ones_like(x)
    while len(hs) > 1:
        y = hs.pop()
        g, w_bar = link.backward(g, y, hs[-1], w)
        if link.trains:
            total = w_bar if total is None else np.add(total, w_bar, out=total)
    return g, total
