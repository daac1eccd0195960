"""The logits that follow a text, where only what is new in it is computed."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..device import of
from ..precision import is_narrow
from .device import NO_NUMBERS, DeviceTexts, evaluating


class Decoder:
    """ids (B, T) -> the logits after each row's last token, (B, V), on the host.

    Keys and values of what it was given before stay in a KV cache, and the beginning that the ids
    share with that is not computed again: a text that grows costs one token a call.

    The model sees its context length, at most: the last tokens of a longer text. With every further
    token these move by one, and with learned positions no key or value stays what it was. So then
    the cache is filled anew for each token, which is as slow as without one; the logits are always
    those of `model(ids[:, -context_length:])`.

    What is kept belongs to the weights that computed it: after they change, make a new Decoder.

    A model without `new_cache` is called as `model(ids)`, and everything is computed each time. A
    GPT on a GPU has a static cache, and the step of one token a row is a CUDA graph: see device.py.

    why_no_graph    why that step is launched kernel by kernel; None if it is not, or not yet known
    """

    def __init__(self, model: Any):
        self.model = model
        static = hasattr(model, "new_static_cache") and model.device != "cpu"
        self._kept = DeviceTexts(model) if static else _Texts(model)

    why_no_graph = property(lambda self: self._kept.why_no_graph)

    def __call__(self, ids: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
        """padding: (B,), how many of a row's first ids are none, to make rows equally long. What a
        crop cuts off is padding first: each row keeps the tokens that it would keep alone.

        Raises FloatingPointError for logits that are nan or infinite; what the model raises.
        """
        ids, padding = self._cropped(ids, padding)
        logits = self._kept.logits(ids, padding)
        logits = of(logits).numpy(logits)
        logits = logits.astype(np.float32) if is_narrow(logits) else logits
        if not np.isfinite(logits.max(axis=-1)).all():  # nan wins every maximum
            raise FloatingPointError(NO_NUMBERS)
        return logits

    def likeliest(
        self, ids: np.ndarray, padding: np.ndarray | None, most: int, vocab_size: int
    ) -> Iterator[np.ndarray]:
        """Yields the likeliest token that follows each row, (B,), then the one after that, and so
        on, at most `most` times: a device that feeds itself. It ends when it can't go on, on the
        CPU at once; the call for ids that have grown by what it gave does.

        vocab_size  only ids below it are chosen
        Raises as the call does.
        """
        ids, padding = self._cropped(ids, padding)
        return self._kept.likeliest(ids, padding, most, vocab_size)

    def select(self, rows: np.ndarray) -> None:
        """Row b of what is kept becomes what row rows[b] was, as beam search needs it."""
        self._kept.select(rows)

    def forget(self) -> None:
        """The next texts are computed from their first token on; a recorded step is kept."""
        self._kept.forget()

    def _cropped(self, ids, padding):
        """The last tokens, as many as the model can see."""
        cut = max(ids.shape[1] - self.model.cfg.context_length, 0)
        if padding is not None:
            padding = np.maximum(padding - cut, 0) if padding.max() > cut else None
        return ids[:, cut:], padding


class _Texts:
    """The texts whose keys and values are in a KVCache."""

    why_no_graph = None

    def __init__(self, model):
        self.model = model
        self._cache = None
        self._ids = np.empty((0, 0), np.int64)  # those in the cache

    def forget(self):
        """As Decoder says."""
        self._ids = self._ids[:, :0]

    def logits(self, ids, padding):
        """(B, V), of each row's last token."""
        with evaluating(self.model), np.errstate(all="ignore"):  # the Decoder looks for nan
            return self._logits(ids, padding)

    def _logits(self, ids, padding):
        if not hasattr(self.model, "new_cache"):
            if padding is not None:
                raise ValueError("prompts of different lengths need a model with new_cache")
            return self.model(ids).data[:, -1]
        known = self._known(ids, padding)
        self._ids = ids[:, :known]  # if what follows is interrupted, nothing else is sure
        x = self.model.hidden_states(ids[:, known:], cache=self._cache)  # (B, T, C)
        logits = self.model.out_head(x[:, -1]).data  # (B, V), of the last token only
        self._ids = ids
        return logits

    def likeliest(self, *_):
        """Nothing: NumPy does not go on while someone else computes."""
        return iter(())

    def select(self, rows):
        if self._cache is not None and not np.array_equal(rows, np.arange(len(self._ids))):
            self._cache.select(rows)
            self._ids = self._ids[rows]

    def _known(self, ids, padding):
        """Makes the cache hold a beginning of the ids, not all of them; returns how long it is."""
        if self._cache is None or len(self._ids) != len(ids):
            self._cache, self._ids = self.model.new_cache(len(ids)), ids[:, :0]
        if not _equal(padding, self._cache.padding):
            self._cache.padding, self._ids = padding, ids[:, :0]
        n = min(self._ids.shape[1], ids.shape[1] - 1)
        same = (self._ids[:, :n] == ids[:, :n]).all(axis=0)  # (n,)
        self._cache.truncate(n if same.all() else int(same.argmin()))
        return self._cache.length


def _equal(a, b):
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
