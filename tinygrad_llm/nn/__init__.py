"""Modules: parameters, layers and the transformer block. No calculus: that is in `ops/`."""

from . import init
from .attention import FeedForward, MultiHeadAttention, TransformerBlock
from .cache import KVCache, LayerCache, StaticCache
from .init import no_init
from .layers import (
    GELU,
    BCELoss,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    ReLU,
    RMSNorm,
    Sigmoid,
    SiLU,
    Tanh,
)
from .module import Buffer, Module, ModuleList, Parameter, Sequential
from .position import (
    RelativePositionBias,
    RotaryEmbedding,
    Yarn,
    segment_mask,
    segment_positions,
    sinusoidal_positions,
)
from .recompute import recompute

__all__ = [
    "GELU",
    "BCELoss",
    "Buffer",
    "Dropout",
    "Embedding",
    "FeedForward",
    "KVCache",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleList",
    "MultiHeadAttention",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "RelativePositionBias",
    "RotaryEmbedding",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "StaticCache",
    "Tanh",
    "TransformerBlock",
    "Yarn",
    "init",
    "no_init",
    "recompute",
    "segment_mask",
    "segment_positions",
    "sinusoidal_positions",
]
