"""Text from a GPT, one token at a time: the last logits, a choice among them, and round again.

`generate` continues a batch of prompts, `stream` yields the tokens of one prompt as they come.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import random
from .tensor import Tensor, no_grad


def generate(
    model: Any,
    ids: ArrayLike,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: random.Generator | None = None,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Continues each row of `ids` (B, T): returns (B, T + n) int64 with n <= max_new_tokens.

    temperature  divides the logits: low is careful, high is varied, 0 takes the likeliest token
    top_k        only the k likeliest tokens may be drawn
    generator    source of randomness; default: the library's own
    stop_id      ends a row and fills the rest of it; when it has ended every row, n is reached
    vocab_size   only ids below it may be drawn: a model may have more than its tokenizer

    The model sees at most its context length: the last tokens of a longer text. Its train or eval
    mode is as before afterwards.
    Raises ValueError for an empty prompt or an argument out of range; TypeError for ids that are no
    integers; IndexError for ids outside the vocabulary; FloatingPointError for logits that are nan
    or infinite.
    """
    ids = _prompts(ids)
    chooser = _Chooser(temperature, top_k, generator, vocab_size)
    columns = list(_continue(model, ids, _count(max_new_tokens), chooser, stop_id))
    return np.concatenate([ids, *(column[:, None] for column in columns)], axis=1)


def stream(
    model: Any,
    ids: ArrayLike,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: random.Generator | None = None,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yields the ids that follow one prompt (T,) or (1, T), each as soon as it is chosen.

    Ends before `stop_id`. The other arguments and what is raised are those of `generate`; arguments
    are checked at once, before the first id is asked for.
    """
    ids = _prompts(ids)
    if len(ids) != 1:
        raise ValueError(f"stream continues one prompt, not {len(ids)}: use generate for a batch")
    chooser = _Chooser(temperature, top_k, generator, vocab_size)
    columns = _continue(model, ids, _count(max_new_tokens), chooser, stop_id)
    return (int(column[0]) for column in columns)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside: eval mode, so no dropout, and no_grad. Afterwards each module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _continue(
    model: Any, ids: np.ndarray, max_new_tokens: int, chooser: "_Chooser", stop_id: int | None
) -> Iterator[np.ndarray]:
    """The new tokens of all rows (B,), step by step, until every row has stopped."""
    stopped = np.zeros(len(ids), dtype=bool)
    for _ in range(max_new_tokens):
        chosen = chooser(_last_logits(model, ids))  # (B,)
        if stop_id is not None:
            chosen[stopped] = stop_id
            stopped |= chosen == stop_id
            if stopped.all():
                return
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
        yield chosen


def _last_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """The logits after the last token: ids (B, T) -> (B, V). Everything before is computed anew."""
    with evaluating(model), np.errstate(all="ignore"):  # what is no number is looked for below
        logits = model(ids[:, -model.cfg.context_length :]).data[:, -1]
    if not np.isfinite(logits.max(axis=-1)).all():  # nan wins every maximum
        raise FloatingPointError(
            "the model's logits are nan or infinite: expected finite ones, use another checkpoint"
        )
    return logits


class _Chooser:
    """Draws a token for each row of logits (B, V), as `generate` describes: (B,) int64."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        generator: random.Generator | None,
        vocab_size: int | None,
    ):
        if not (temperature >= 0 and np.isfinite(temperature)):
            raise ValueError(f"temperature must be a number from 0 on, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}: None leaves it out")
        self.temperature, self.top_k, self.vocab_size = temperature, top_k, vocab_size
        self.generator = generator or random.default_generator

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        logits = logits[:, : self.vocab_size]
        if self.temperature == 0:
            return logits.argmax(axis=-1)
        logits = logits.astype(np.float64)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            weakest = np.partition(logits, -self.top_k, axis=-1)[:, -self.top_k, None]  # (B, 1)
            logits[logits < weakest] = -np.inf
        logits -= logits.max(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):  # a tiny temperature: -inf is what is meant
            weights = np.exp(logits / self.temperature)
        return self.generator.multinomial(weights / weights.sum(axis=-1, keepdims=True))


def _prompts(ids: ArrayLike) -> np.ndarray:
    """One prompt or a batch of them as (B, T) int64."""
    ids = ids.data if isinstance(ids, Tensor) else np.asarray(ids)
    if ids.ndim not in (1, 2):
        raise ValueError(f"ids must have shape (T,) or (B, T), not {ids.shape}")
    if ids.size == 0:
        raise ValueError("the prompt is empty: generation needs at least one token to start from")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {ids.dtype}: encode the text first")
    return np.atleast_2d(ids).astype(np.int64)


def _count(max_new_tokens: int) -> int:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    return max_new_tokens
