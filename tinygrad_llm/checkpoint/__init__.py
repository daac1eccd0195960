"""Checkpoints: models in Hugging Face's layout, and training states for exact resumption."""

from .hugging_face import CONFIG, WEIGHTS, load_model, load_tokenizer, save_model
from .state import TRAINING_STATE, load_training_state, save_training_state

__all__ = [
    "CONFIG",
    "TRAINING_STATE",
    "WEIGHTS",
    "load_model",
    "load_tokenizer",
    "load_training_state",
    "save_model",
    "save_training_state",
]
