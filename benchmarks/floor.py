"""The floor under a training step: what its arithmetic takes at the speed of a large matrix
product, and its bytes at the speed of a large copy, both measured in the same run.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from tinygrad_llm.gpt import GPTConfig

from .measure import Method

SIDE = 2048  # of the matrices of the product
COPIED = 1 << 27  # bytes: with the copy, more than caches hold


class Ceilings:
    """What this machine can do at best with so many threads, in turns as everything else."""

    def __init__(self, threads: int, method: Method):
        rng = np.random.default_rng(0)
        self.method = replace(method, seconds=0.25, warm=False)
        self.a, self.b = rng.standard_normal((2, SIDE, SIDE), np.float32)
        self.product = np.empty_like(self.a)
        self.source = np.ones(COPIED // 4, np.float32)
        self.target = np.ones_like(self.source)
        self.pool = ThreadPoolExecutor(threads)
        ends = np.linspace(0, len(self.source), threads + 1).astype(int)
        self.pieces = [slice(start, end) for start, end in itertools.pairwise(ends)]

    def multiply(self) -> None:
        np.matmul(self.a, self.b, out=self.product)

    def copy(self) -> None:
        list(self.pool.map(self._copy, self.pieces))

    def _copy(self, piece):
        np.copyto(self.target[piece], self.source[piece])

    def turn(self, what: str) -> list[float]:
        return self.method.turn(getattr(self, what))

    def work(self) -> dict[str, int]:
        """Floating-point operations of multiply(), bytes that copy() reads and writes."""
        return {"multiply": 2 * self.a.size * len(self.a), "copy": 2 * self.source.nbytes}


def work(cfg: GPTConfig, batch: int, length: int) -> dict[str, tuple[int, int]]:
    """Part of a training step -> (operations of its matrix products, bytes of float32 that it reads
    and writes at least). Of products only operations are counted, of all else only bytes.

    A product y = x wᵀ of N tokens takes 2 N operations a weight, its gradients twice that.
    Causal attention has two products for each pair of a query and a key that it sees (q kᵀ, P v),
    and four in backward. Bytes are those of each array that comes in or goes out, once.
    """
    V, C, L = cfg.vocab_size, cfg.emb_dim, cfg.n_layers
    N, P = batch * length, cfg.num_parameters()
    pairs = batch * length * (length + 1) // 2
    x = 4 * N * C  # bytes of what goes from layer to layer, (B, T, C)
    return {
        "matrix products": (6 * N * (12 * L * C * C + V * C), 0),
        "attention": (12 * pairs * C * L, 0),
        "GELU": (0, L * 5 * 4 * x),  # 4 C wide; forward x, y; backward x, g, x̄
        "norms": (0, (2 * L + 1) * 5 * x),  # the same
        "cross-entropy": (0, 2 * 4 * N * V),  # the logits read, and their gradient written
        "clipping": (0, 4 * P),  # the gradient read for its length
        "AdamW": (0, 7 * 4 * P),  # p, m, v read and written, g read
        # Residuals: forward x, y, x + y; backward two gradients, their sum. Embedding: forward two
        # rows, their sum; backward g, and the table's rows read and written.
        "all else": (0, (2 * L + 1) * 6 * x),
    }


# An op's part of the step, or the parts that a kernel for several ops computes together. What is
# not here is of "all else".
_PARTS = {
    "linear": {"matrix products"},
    "attention": {"attention"},
    "gelu_tanh": {"GELU"},
    "layer_norm": {"norms"},
    "cross_entropy": {"cross-entropy"},
    "clip": {"clipping"},
    "optimizer": {"AdamW"},
    "mlp": {"matrix products", "GELU"},
    "self_attention": {"attention"},
    "linear_cross_entropy": {"matrix products", "cross-entropy"},
}


def phases(seconds: dict[str, float], counted: dict, speed: dict[str, float]) -> list[dict]:
    """Rows {"name", "floor", "ours", "flops", "bytes"}, seconds by part of the step, longest first.

    seconds     op, or what is no op -> its time
    counted     what work() returns
    speed       operations and bytes a second: {"multiply": ..., "copy": ...}

    Where a kernel computes several parts together, so does a row.
    """
    parts = {op: _PARTS.get(op, {"all else"}) for op in seconds}
    groups = [{part} for part in counted]
    for together in parts.values():
        joined = [group for group in groups if group & together]
        groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    rows = []
    for group in groups:
        names = [part for part in counted if part in group]
        flops, moved = (sum(counted[part][i] for part in names) for i in (0, 1))
        floor = flops / speed["multiply"] + moved / speed["copy"]
        ours = sum(s for op, s in seconds.items() if parts[op] & group)
        row = {"name": " + ".join(names), "floor": floor, "ours": ours}
        rows.append({**row, "flops": flops, "bytes": moved})
    return sorted(rows, key=lambda row: -row["ours"])
