"""Turning ids into text while they arrive, as in chat: a character is shown once it is complete.

One character can be several bytes, and these can belong to several tokens.
"""

import codecs

from tinygrad_llm.tokenizer.base import Tokenizer


class StreamDecoder:
    """Decodes one id at a time. All texts together are `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is still incomplete.

        Raises TypeError or IndexError for what is no id of the vocabulary.
        """
        data = self.tokenizer.decode_bytes([token_id], first=self._first)
        self._first = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The end of the text: U+FFFD if a character stayed incomplete. Then it can start anew."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._first = True
        return text
