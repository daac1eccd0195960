"""Checkpoints: models in Hugging Face's layout, and training states for exact resumption."""

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
from .state import TRAINING_STATE, load_training_state, save_training_state

__all__ = [
    "CONFIG",
    "INDEX",
    "TRAINING_STATE",
    "WEIGHTS",
    "Checkpoint",
    "Difference",
    "compare_checkpoints",
    "export_checkpoint",
    "find_model",
    "load_model",
    "load_tokenizer",
    "load_training_state",
    "open_checkpoint",
    "save_model",
    "save_training_state",
]
