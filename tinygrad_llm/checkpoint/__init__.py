"""Checkpoints: models in Hugging Face's layout, adapters in PEFT's, and training states for exact
resumption.
"""

from .adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, save_adapter
from .compare import Difference, compare_checkpoints
from .export import export_checkpoint
from .hub import find_model
from .hugging_face import (
    CONFIG,
    Checkpoint,
    load_model,
    load_tokenizer,
    open_checkpoint,
    save_model,
)
from .shards import INDEX, WEIGHTS
from .state import (
    CHECKPOINTS,
    OLD_STATE,
    checkpoints,
    load_training_state,
    save_checkpoint,
    save_training_state,
    step_of,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CHECKPOINTS",
    "CONFIG",
    "INDEX",
    "OLD_STATE",
    "WEIGHTS",
    "Checkpoint",
    "Difference",
    "checkpoints",
    "compare_checkpoints",
    "export_checkpoint",
    "find_model",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "load_training_state",
    "open_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "save_model",
    "save_training_state",
    "step_of",
]
