"""Layers: parameters with a shape and a start, and one call of a function from functional.py.

Names, defaults and initialisation are PyTorch's. A `generator` draws the first weights (and the
dropout masks); None means tinygrad_llm.random.default_generator.
"""

import math
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..random import Generator, or_default
from ..tensor import Tensor
from . import init
from .module import Module, Parameter


class Linear(Module):
    """y = x weightᵀ + bias.  x (..., in) -> (..., out);  weight (out, in), bias (out).

    Both start uniform in ±1/√in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        generator: Generator | None = None,
    ):
        check_sizes("Linear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = _undrawn(out_features, in_features)
        self.bias = _undrawn(out_features) if bias else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the weights anew, then the bias."""
        reset_linear(self, slice(None), generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Embedding(Module):
    """Rows of a table.  ids (...) integers -> (..., dim);  weight (n, dim), starts N(0, 1)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, generator: Generator | None = None):
        check_sizes("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = _undrawn(num_embeddings, embedding_dim)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the table anew."""
        init.normal_(self.weight, 0.0, 1.0, generator)

    def forward(self, ids: Tensor | ArrayLike) -> Tensor:
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LayerNorm(Module):
    """Zero mean and unit variance over the last axis, then gain and shift.  (..., n) -> (..., n)"""

    def __init__(self, normalized_shape: int, eps: float = 1e-5):
        check_sizes("LayerNorm", normalized_shape=normalized_shape)
        self.eps = eps
        self.weight = Parameter(np.ones(normalized_shape, np.float32))
        self.bias = Parameter(np.zeros(normalized_shape, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(Module):
    """Unit mean square over the last axis, then a gain.  (..., n) -> (..., n)"""

    def __init__(self, normalized_shape: int, eps: float = 1e-5):
        check_sizes("RMSNorm", normalized_shape=normalized_shape)
        self.eps = eps
        self.weight = Parameter(np.ones(normalized_shape, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Dropout(Module):
    """In training, zeroes each element with probability p and divides the others by 1 - p."""

    def __init__(self, p: float = 0.5, generator: Generator | None = None):
        check_probability("Dropout", p=p)
        or_default(generator)  # raises TypeError; None stays None
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class GELU(Module):
    """x Φ(x), or with approximate="tanh" the form that GPT-2 uses."""

    def __init__(self, approximate: str = "none"):
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate is 'none' or 'tanh', not {approximate!r}")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class ReLU(Module):
    """max(x, 0)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SiLU(Module):
    """x σ(x)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(x)


class Sigmoid(Module):
    """σ(x) = 1 / (1 + e^-x)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.sigmoid(x)


class BCELoss(Module):
    """Mean binary cross-entropy of probabilities (...) with targets (...) in [0, 1]: a scalar."""

    def forward(self, probabilities: Tensor, targets: Tensor | ArrayLike) -> Tensor:
        return F.binary_cross_entropy(probabilities, targets)


def reset_linear(layer: Linear, rows: slice, generator: Generator | None = None) -> None:
    """Draws these rows of the weight anew, then these elements of the bias."""
    bound = 1 / math.sqrt(layer.in_features)
    init.uniform_(layer.weight, -bound, bound, generator, rows)
    if layer.bias is not None:
        init.uniform_(layer.bias, -bound, bound, generator, rows)


# --- arguments ------------------------------------------------------------------------------------


def _undrawn(*shape):
    """A parameter that reset_parameters will fill, or whoever says no_init."""
    return Parameter(np.empty(shape, np.float32))


def check_sizes(owner: str, **sizes) -> None:
    """Raises ValueError unless every size is a positive integer."""
    for name, n in sizes.items():
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"{owner}: {name} is a positive integer, not {n!r}")


def check_numbers(owner: str, **numbers) -> None:
    """Raises ValueError unless every one is a real number."""
    for name, x in numbers.items():
        if not isinstance(x, Real):
            raise ValueError(f"{owner}: {name} is a number, not {x!r}")


def check_probability(owner: str, **probabilities) -> None:
    """Raises ValueError unless every probability is a number between 0 and 1."""
    for name, p in probabilities.items():
        if not isinstance(p, int | float | np.number) or not 0 <= p <= 1:
            raise ValueError(f"{owner}: {name} is a number between 0 and 1, not {p!r}")


def check_divides(owner: str, **sizes) -> None:
    """Raises ValueError unless the first size divides the second."""
    (part, n), (whole, m) = sizes.items()
    if m % n:
        raise ValueError(f"{owner}: {part} must divide {whole}, but {m} / {n} leaves {m % n}")
