"""Beam search: likely continuations, by keeping the best few of each length."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .arguments import check, drawable, prompts, stop_ids
from .decoder import Decoder


class Beam(NamedTuple):
    """A text that beam search has found.

    ids     the prompt and what follows, before the stop id: (T + n,) int64
    score   log p of what follows, stop id included, over its length to the power length_penalty
    """

    ids: np.ndarray
    score: float


def beam_search(
    model: Any,
    ids: ArrayLike,
    max_new_tokens: int,
    beams: int = 4,
    n_best: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    stop_id: int | Iterable[int] | None = None,
    vocab_size: int | None = None,
) -> list[Beam]:
    """The `n_best` continuations of one prompt (T,) or (1, T), the best first.

    Of all continuations of the texts that are kept, the `beams` with the highest log p are kept in
    turn; one among them that ends with a stop id is done. With as many beams as there are texts,
    that is an exhaustive search.

    length_penalty  the power of the length by which a score is divided: above 0, longer texts are
                    preferred, since log p is negative
    early_stopping  ends as soon as `beams` texts are done; otherwise, when at its present length
                    none of the others would beat the worst of them. This, and all else, is as in
                    transformers
    Raises as generate does.
    """
    ids, _ = prompts(ids)
    if len(ids) != 1:
        raise ValueError(f"beam_search continues one prompt, not {len(ids)}: call it for each")
    check(max_new_tokens=max_new_tokens, beams=beams, n_best=n_best, length_penalty=length_penalty)
    if n_best > beams:
        raise ValueError(f"n_best must be at most the number of beams, {beams}, got {n_best}")
    tokens = drawable(model, vocab_size)
    stops = stop_ids(stop_id, tokens)
    decoder, T = Decoder(model), ids.shape[1]
    scores, done = np.zeros(1), []  # log p of the texts that are kept, the rows of ids
    for n in range(1, max_new_tokens + 1):
        totals = scores[:, None] + _log_softmax(decoder(ids)[:, :tokens])  # (beams, V)
        # Each text ends with each stop id at most once: `beams` of these go on, if there are any.
        best = _largest(totals.ravel(), beams * (1 + len(stops)))
        rows, chosen = np.divmod(best, tokens)
        ends = np.isin(chosen, stops)
        longer = np.concatenate([ids[rows], chosen[:, None]], axis=1)
        final = np.ones_like(ends) if n == max_new_tokens else ends
        for i in final[:beams].nonzero()[0]:
            text = longer[i, : T + n - 1] if ends[i] else longer[i]
            done.append(Beam(text, float(totals.flat[best[i]] / n**length_penalty)))
        done = sorted(done, key=lambda beam: -beam.score)[:beams]
        on = (~final).nonzero()[0][:beams]
        if not len(on):
            break
        ids, scores = longer[on], totals.flat[best[on]]
        decoder.select(rows[on])
        could_win = len(done) < beams or scores[0] / n**length_penalty > done[-1].score
        if not could_win or (early_stopping and len(done) == beams):
            break
    return done[:n_best] if max_new_tokens else [Beam(ids[0], 0.0)]


def _largest(x, n):
    """The indices of the n largest, in order; of all, if there are fewer."""
    n = min(n, len(x))
    best = np.argpartition(x, len(x) - n)[len(x) - n :]
    return best[np.argsort(-x[best], kind="stable")]


def _log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
