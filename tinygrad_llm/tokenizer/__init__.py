"""Tokenizers: text to token ids and back.

All have one interface, `Tokenizer`:

    train(text, vocab_size)     learn a vocabulary (of words: train(text))
    encode(text)                text to ids; allowed_special says which special tokens count
    encode_ordinary(text)       the same with nothing special
    decode(ids)                 ids to text
    vocab_size                  one more than the last id
    special_tokens              their ids by name
    token_to_id(token)          the id of one token
    add_tokens(names)           more special tokens, with ids after the last
    save(directory), load(directory)    files that Hugging Face opens, too

and differ in what a token is:

    WordTokenizer           a word, from a fixed list
    BPETokenizer            bytes, joined as often as they occur together (GPT-2)
    WordPieceTokenizer      characters, joined where they predict each other (BERT)
    UnigramTokenizer        pieces of which the likeliest spelling is chosen (SentencePiece)
    TiktokenTokenizer       BPE by tiktoken: fast; gpt2() is GPT-2's own

`load(directory)` opens whichever was saved there.
"""

from pathlib import Path

from tinygrad_llm.tokenizer.base import END_OF_TEXT, Tokenizer
from tinygrad_llm.tokenizer.bpe import BPETokenizer
from tinygrad_llm.tokenizer.bpe_files import FILES
from tinygrad_llm.tokenizer.files import TOKENIZER, model_type, read_json
from tinygrad_llm.tokenizer.stream import StreamDecoder
from tinygrad_llm.tokenizer.tiktoken_bpe import TiktokenTokenizer, gpt2
from tinygrad_llm.tokenizer.unigram import UnigramTokenizer
from tinygrad_llm.tokenizer.wordpiece import WordPieceTokenizer
from tinygrad_llm.tokenizer.words import WordTokenizer

__all__ = [
    "END_OF_TEXT",
    "FILES",
    "BPETokenizer",
    "StreamDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "UnigramTokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "gpt2",
    "load",
]

TYPES = {
    "BPE": BPETokenizer,
    "WordPiece": WordPieceTokenizer,
    "Unigram": UnigramTokenizer,
    "WordLevel": WordTokenizer,
}


def load(directory: str | Path) -> Tokenizer:
    """Open a tokenizer of any type that `save` wrote, or Hugging Face in the same way.

    Without a tokenizer.json, vocab.json and merges.txt are looked for. Raises ValueError, which
    names the file and what was expected in it.
    """
    path = Path(directory) / TOKENIZER
    kind = model_type(read_json(path)) if path.exists() else "BPE"
    if kind not in TYPES:
        raise ValueError(f"{path} holds a tokenizer of type {kind!r}: expected {', '.join(TYPES)}")
    return TYPES[kind].load(directory)
