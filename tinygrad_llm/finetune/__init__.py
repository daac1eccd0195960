"""Fine-tuning: a GPT that can write becomes one that does a task."""

from .baseline import WordClassifier
from .classification import (
    LAYERS,
    POSITIONS,
    ClassificationDataset,
    EpochBatches,
    GPTClassifier,
    evaluate,
    padding_id,
)
from .metrics import Scores, plot_confusion
from .table import Table, read_table, split, undersample

__all__ = [
    "LAYERS",
    "POSITIONS",
    "ClassificationDataset",
    "EpochBatches",
    "GPTClassifier",
    "Scores",
    "Table",
    "WordClassifier",
    "evaluate",
    "padding_id",
    "plot_confusion",
    "read_table",
    "split",
    "undersample",
]
