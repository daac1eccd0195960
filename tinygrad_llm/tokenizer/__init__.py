"""Tokenizers: text to token ids and back."""

from tinygrad_llm.tokenizer.bpe import BPETokenizer
from tinygrad_llm.tokenizer.bpe_files import FILES
from tinygrad_llm.tokenizer.stream import StreamDecoder

__all__ = ["FILES", "BPETokenizer", "StreamDecoder"]
