"""Tokenizers: text to token ids and back."""

from tinygrad_llm.tokenizer.bpe import BPETokenizer
from tinygrad_llm.tokenizer.stream import StreamDecoder

__all__ = ["BPETokenizer", "StreamDecoder"]
