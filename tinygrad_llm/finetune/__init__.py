"""Fine-tuning: a GPT that can write becomes one that does a task, and how good it is at it.

classification, table, metrics, baseline    texts into classes
instruction, templates                      instructions and responses
matches, judge                              how good responses are: compared, or judged by a model
"""

from .baseline import WordClassifier
from .classification import (
    LAYERS,
    POSITIONS,
    ClassificationDataset,
    GPTClassifier,
    evaluate,
    padding_id,
)
from .instruction import (
    Instructions,
    collate,
    generate_responses,
    mean_loss,
    read_entries,
    split_entries,
    write_entries,
)
from .metrics import Scores, plot_confusion
from .table import Table, read_table, split, undersample
from .templates import (
    TEMPLATES,
    ChatTemplate,
    get_template,
    save_template,
    saved_template,
    template_mismatch,
)

__all__ = [
    "LAYERS",
    "POSITIONS",
    "TEMPLATES",
    "ChatTemplate",
    "ClassificationDataset",
    "GPTClassifier",
    "Instructions",
    "Scores",
    "Table",
    "WordClassifier",
    "collate",
    "evaluate",
    "generate_responses",
    "get_template",
    "mean_loss",
    "padding_id",
    "plot_confusion",
    "read_entries",
    "read_table",
    "save_template",
    "saved_template",
    "split",
    "split_entries",
    "template_mismatch",
    "undersample",
    "write_entries",
]
