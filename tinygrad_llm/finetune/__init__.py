"""Fine-tuning: a trained model learns one task more."""

from .instruction import (
    EpochBatches,
    Instructions,
    collate,
    generate_responses,
    mean_loss,
    read_entries,
    split_entries,
    write_entries,
)
from .templates import (
    TEMPLATES,
    ChatTemplate,
    get_template,
    save_template,
    saved_template,
    template_mismatch,
)

__all__ = [
    "TEMPLATES",
    "ChatTemplate",
    "EpochBatches",
    "Instructions",
    "collate",
    "generate_responses",
    "get_template",
    "mean_loss",
    "read_entries",
    "save_template",
    "saved_template",
    "split_entries",
    "template_mismatch",
    "write_entries",
]
