"""Corpora, token files, windows and batches: everything between a text and the model's input."""

from tinygrad_llm.data.corpus import embedded_corpus, read_corpus
from tinygrad_llm.data.tokens import open_tokens, train_val_split, write_tokens
from tinygrad_llm.data.windows import DataLoader, RandomBatches, Windows

__all__ = [
    "DataLoader",
    "RandomBatches",
    "Windows",
    "embedded_corpus",
    "open_tokens",
    "read_corpus",
    "train_val_split",
    "write_tokens",
]
