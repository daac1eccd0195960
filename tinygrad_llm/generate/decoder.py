"""The logits that follow a text, where only what is new in it is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..device import of
from ..tensor import no_grad


class Decoder:
    """ids (B, T) -> the logits after each row's last token, (B, V).

    Keys and values of what it was given before stay in a KV cache, and the beginning that the ids
    share with that is not computed again: a text that grows costs one token a call.

    The model sees its context length, at most: the last tokens of a longer text. With every further
    token these move by one, and with learned positions no key or value stays what it was. So then
    the cache is filled anew for each token, which is as slow as without one; the logits are always
    those of `model(ids[:, -context_length:])`.

    What is kept belongs to the weights that computed it: after they change, make a new Decoder.

    A model without `new_cache` is called as `model(ids)`, and everything is computed each time.
    """

    def __init__(self, model: Any):
        self.model = model
        self._cache = None
        self._ids = np.empty((0, 0), np.int64)  # those in the cache

    def __call__(self, ids: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
        """padding: (B,), how many of a row's first ids are none, to make rows equally long. What a
        crop cuts off is padding first: each row keeps the tokens that it would keep alone.

        Raises FloatingPointError for logits that are nan or infinite; what the model raises.
        """
        cut = max(ids.shape[1] - self.model.cfg.context_length, 0)
        ids = ids[:, cut:]
        if padding is not None:
            padding = np.maximum(padding - cut, 0) if padding.max() > cut else None
        with evaluating(self.model), np.errstate(all="ignore"):  # what is no number is found below
            logits = self._logits(ids, padding)
            logits = of(logits).numpy(logits)
        if not np.isfinite(logits.max(axis=-1)).all():  # nan wins every maximum
            raise FloatingPointError(
                "the model's logits are nan or infinite: expected finite ones, use another "
                "checkpoint"
            )
        return logits

    def select(self, rows: np.ndarray) -> None:
        """Row b of what is kept becomes what row rows[b] was, as beam search needs it."""
        if self._cache is not None and not np.array_equal(rows, np.arange(len(self._ids))):
            self._cache.select(rows)
            self._ids = self._ids[rows]

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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside: eval mode, so no dropout, and no_grad. Afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _equal(a, b):
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
