"""Corpora, token files, windows and batches: everything between a text and the model's input."""

from tinygrad_llm.data.corpus import corpus_hash, embedded_corpus, read_blocks, read_corpus
from tinygrad_llm.data.duplicates import MinHash, deduplicate, jaccard, near_duplicates, shingles
from tinygrad_llm.data.filters import PERSONAL_DATA, blocked_by, perplexity_outliers
from tinygrad_llm.data.loader import DataLoader, EpochBatches, create_dataloader
from tinygrad_llm.data.mixture import MixedBatches, mixture_probabilities
from tinygrad_llm.data.named import corpus_path
from tinygrad_llm.data.packing import Packed, pack
from tinygrad_llm.data.streaming import encode_files
from tinygrad_llm.data.tokens import open_tokens, train_val_split, write_tokens
from tinygrad_llm.data.windows import RandomBatches, Windows

__all__ = [
    "PERSONAL_DATA",
    "DataLoader",
    "EpochBatches",
    "MinHash",
    "MixedBatches",
    "Packed",
    "RandomBatches",
    "Windows",
    "blocked_by",
    "corpus_hash",
    "corpus_path",
    "create_dataloader",
    "deduplicate",
    "embedded_corpus",
    "encode_files",
    "jaccard",
    "mixture_probabilities",
    "near_duplicates",
    "open_tokens",
    "pack",
    "perplexity_outliers",
    "read_blocks",
    "read_corpus",
    "shingles",
    "train_val_split",
    "write_tokens",
]
