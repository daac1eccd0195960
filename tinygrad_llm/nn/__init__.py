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
from .lora import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    apply_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    set_adapter,
    trainable,
    unmerge_lora,
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
    "LoRAConfig",
    "LoRALinear",
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
    "adapter_names",
    "apply_lora",
    "init",
    "lora_layers",
    "merge_lora",
    "no_init",
    "recompute",
    "remove_lora",
    "segment_mask",
    "segment_positions",
    "set_adapter",
    "sinusoidal_positions",
    "trainable",
    "unmerge_lora",
]
