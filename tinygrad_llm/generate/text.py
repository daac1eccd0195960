"""Ids as text while they arrive, up to a stop string."""

from collections.abc import Iterable, Iterator

from ..tokenizer import StreamDecoder, Tokenizer


def stream_text(
    ids: Iterable[int], tokenizer: Tokenizer, stop: str | Iterable[str] = ()
) -> Iterator[str]:
    """The text of the ids, piece by piece: one for each id, "" where it completes nothing.

    stop    texts that end it, before the first of them that is complete; no piece shows any of it,
            and no further id is asked for
    Raises ValueError for an empty stop string.
    """
    decoder, until = StreamDecoder(tokenizer), StopStrings(stop)

    def pieces():
        for token_id in ids:
            yield until.feed(decoder.feed(token_id))
            if until.stopped:
                return
        yield until.feed(decoder.finish()) + until.finish()

    return pieces()


class StopStrings:
    """Lets text through up to the first of some strings, which may come in pieces.

    What may be the beginning of a string is kept back until it is known not to be. If two strings
    are complete at the same character, the one that began first counts.
    """

    def __init__(self, stop: str | Iterable[str] = ()):
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        if "" in self.stop:
            raise ValueError("a stop string is empty: give some text, or leave it out")
        self.stopped = False
        self._kept = ""

    def feed(self, text: str) -> str:
        """The text that may be shown now that `text` has come; "" once it has stopped."""
        if self.stopped:
            return ""
        text = self._kept + text
        found = [(text.find(s) + len(s), text.find(s)) for s in self.stop if s in text]
        self.stopped = bool(found)
        end = min(found)[1] if found else len(text) - self._possible(text)
        self._kept = text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was kept back in vain, at the end of the text."""
        kept, self._kept = self._kept, ""
        return "" if self.stopped else kept

    def _possible(self, text):
        """The most characters at the end of the text with which a stop string begins."""
        longest = max(map(len, self.stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self.stop)), 0)
