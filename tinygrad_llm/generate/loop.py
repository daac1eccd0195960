"""The loop of generation, for a batch at once or one prompt token by token."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import random
from .arguments import check, drawable, prompts, stop_ids
from .decoder import Decoder
from .sampling import Sampler, check_top_k


def generate(
    model: Any,
    ids: ArrayLike | Sequence[ArrayLike],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: random.Generator | None = None,
    stop_id: int | Iterable[int] | None = None,
    vocab_size: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    decoder: Decoder | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Continues prompts: an array (B, T) as an array (B, T + n) int64 with n <= max_new_tokens, a
    list of B prompts as a list of B arrays.

    model        a Module, ids (B, T) -> logits (B, T, V); its cfg has context_length and vocab_size
    temperature  divides the logits: low is careful, high is varied, 0 takes the likeliest token
    top_k        only the k likeliest tokens may be drawn, and those equally likely
    top_p        only the likeliest tokens that have this probability together
    min_p        only tokens at least min_p times as likely as the likeliest
    repetition_penalty  above 1, tokens that are in the text already become less likely
    generator    source of randomness; default: the library's own
    stop_id      one id or several that end a row; when every row has ended, n is reached
    vocab_size   only ids below it may be drawn: a model may have more than its tokenizer
    decoder      of this model, from an earlier call: what its texts share with these is not
                 computed again, and on a GPU, for as many rows, nothing is recorded again

    The prompts of a list may have different lengths. Each is continued as it would be alone (but
    with numbers of the same random stream), and each row of the result ends before its stop_id. In
    an array, where rows have one length, the stop_id that ends a row fills the rest of it. A single
    prompt (T,) is an array of one row.

    The model sees at most its context length: the last tokens of a longer text. Its train or eval
    mode is as before afterwards. On a GPU numbers are drawn on the host, from the same stream as on
    the CPU, and the logits of each step are copied there; only where the likeliest token is always
    taken does the device go on without the host.
    Raises ValueError for an empty prompt or an argument out of range; TypeError for ids that are no
    integers, or a model without cfg; IndexError for ids outside the vocabulary; FloatingPointError
    for logits that are nan or infinite.
    """
    texts, padding = prompts(ids)
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, generator, vocab_size)
    stops = _checked(model, max_new_tokens, sampler, stop_id)
    decoder = decoder or Decoder(model)
    columns = list(_continue(decoder, texts, padding, max_new_tokens, sampler, stops))
    T = texts.shape[1]
    texts = np.concatenate([texts, *(column[:, None] for column in columns)], axis=1)
    if padding is None:
        return texts
    return [row[p : T + _length(row[T:], stops)] for row, p in zip(texts, padding, strict=True)]


def stream(
    model: Any,
    ids: ArrayLike,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: random.Generator | None = None,
    stop_id: int | Iterable[int] | None = None,
    vocab_size: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    decoder: Decoder | None = None,
) -> Iterator[int]:
    """Yields the ids that follow one prompt (T,) or (1, T), each as soon as it is chosen.

    Ends before `stop_id`. The other arguments and what is raised are those of `generate`; arguments
    are checked at once, before the first id is asked for.

    decoder     of this model, from an earlier call: the beginning that its text shares with this
                prompt is not computed again
    """
    text, _ = prompts(ids)
    if len(text) != 1:
        raise ValueError(f"stream continues one prompt, not {len(text)}: use generate for several")
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, generator, vocab_size)
    stops = _checked(model, max_new_tokens, sampler, stop_id)
    columns = _continue(decoder or Decoder(model), text, None, max_new_tokens, sampler, stops)
    return (int(column[0]) for column in columns)


def _continue(decoder, ids, padding, max_new_tokens, sampler, stops) -> Iterator[np.ndarray]:
    """The new tokens of all rows (B,), step by step, until every row has stopped."""
    stopped, ahead = np.zeros(len(ids), bool), iter(())
    if sampler.is_greedy:
        tokens = sampler.vocab_size or decoder.model.cfg.vocab_size
        ahead = decoder.likeliest(ids, padding, max_new_tokens, tokens)
    for _ in range(max_new_tokens):
        chosen = next(ahead, None)  # (B,)
        if chosen is None:
            chosen = sampler(decoder(ids, padding), ids, padding)
        chosen[stopped] = ids[stopped, -1]  # the stop id that it ended with
        stopped |= np.isin(chosen, stops)
        if stopped.all():
            return
        ids = np.concatenate([ids, chosen[:, None]], axis=1)
        yield chosen


def _length(new, stops):
    """How many ids come before the first stop id."""
    (found,) = np.isin(new, stops).nonzero()
    return int(found[0]) if len(found) else len(new)


def _checked(model, max_new_tokens, sampler, stop_id):
    """The stop ids as an array, once all arguments are known to fit the model."""
    check(max_new_tokens=max_new_tokens)
    tokens = drawable(model, sampler.vocab_size)
    if sampler.top_k is not None:
        check_top_k(sampler.top_k, tokens)
    return stop_ids(stop_id, tokens)
