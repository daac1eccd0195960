"""Checkpoints: models in Hugging Face's layout, and training states for exact resumption."""

from .hugging_face import CONFIG, WEIGHTS, load_model, load_tokenizer, save_model
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
    "CHECKPOINTS",
    "CONFIG",
    "OLD_STATE",
    "WEIGHTS",
    "checkpoints",
    "load_model",
    "load_tokenizer",
    "load_training_state",
    "save_checkpoint",
    "save_model",
    "save_training_state",
    "step_of",
]
