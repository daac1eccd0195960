"""Texts on a GPU: a static cache, and the step by which they grow, recorded as a CUDA graph.

One token a row is so little work that launching its hundred kernels one by one takes longer than
running them. So the step is recorded once for a batch size. It reads the last token and the length
of each row from the device, leaves the likeliest next token and the new length there, and so can be
launched again before anyone has seen what it chose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import backend
from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..device import device
from ..nn.cache import FEW_QUERIES
from ..precision import is_narrow
from ..tensor import Tensor, no_grad

NO_NUMBERS = "the model's logits are nan or infinite: expected finite ones, use another checkpoint"
_RUNS = 3  # of a step that is recorded: two for real, and the recording


class DeviceTexts:
    """The texts whose keys and values are in a StaticCache; row b's begin at position 0.

    As Decoder says. The sampler's draws are the host's, from the random stream that the CPU would
    use, so with a temperature every step waits for its logits.
    """

    def __init__(self, model: Any):
        self.model, self.where = model, device(model.device)
        self.where.make_current()
        self._graphs = backend.kernel_module(self.where, "graph")
        self.why_no_graph = None if self._graphs else "kernels are switched off"
        self._limit = self.where.xp.zeros(1, np.int64)  # of the ids that a step chooses from
        self._step = None
        self._texts = []  # an array of ids for each row: what is surely in the cache
        self._turn = 0  # counts whoever changes it

    def logits(self, ids: np.ndarray, padding: np.ndarray | None) -> Any:
        """(B, V) on the device, of each row's last token."""
        return self._feed(_unpadded(ids, padding))

    def likeliest(
        self, ids: np.ndarray, padding: np.ndarray | None, most: int, vocab_size: int
    ) -> Iterator[np.ndarray]:
        """As Decoder says: until the context is full, or someone else uses the Decoder. The next
        step is launched before its token is read.
        """
        if self._graphs is None:
            return
        texts = _unpadded(ids, padding)
        most = min(most, 1 + self.model.cfg.context_length - max(map(len, texts)))
        self._limit.fill(vocab_size)
        self._feed(texts)
        step, turn = self._step, self._turn
        now, ahead = self._graphs.Readback(), self._graphs.Readback()
        now.start(step.ids)
        for left in reversed(range(most)):
            if left:
                self._next()
                ahead.start(step.ids)
            chosen = now.wait()
            if (chosen < 0).any():
                raise FloatingPointError(NO_NUMBERS)
            if left:  # it has been fed
                self._texts = [np.append(text, i) for text, i in zip(self._texts, chosen)]
            yield chosen
            if self._turn != turn:
                return
            now, ahead = ahead, now

    def forget(self) -> None:
        """As Decoder says."""
        self._turn += 1
        self._texts = [text[:0] for text in self._texts]

    def select(self, rows: np.ndarray) -> None:
        """As Decoder says: in place if there are as many rows, so that the graph stays valid."""
        if self._step is None or np.array_equal(rows, np.arange(len(self._texts))):
            return
        self._turn += 1
        texts, self._texts = self._texts, []
        cache = self._step.cache
        cache.select(rows)
        if len(rows) != len(texts):
            self._begin(cache)
        self._texts = [texts[row] for row in rows]

    def _feed(self, texts):
        """The logits after each text, (B, V); what is in the cache already is not computed."""
        self.where.make_current()
        self._turn += 1
        if len(texts) != len(self._texts):
            self._begin(self.model.new_static_cache(len(texts)))
            self._texts = [text[:0] for text in texts]
        counts = self._known(texts)
        new = [text[n:] for text, n in zip(texts, counts)]
        self._texts = [text[:n] for text, n in zip(texts, counts)]  # if this is interrupted
        self._step.cache.keep(counts)
        last = np.array([text[-1] for text in texts])
        exist = (last >= 0) & (last < self.model.cfg.vocab_size)
        if max(map(len, new)) == 1 and exist.all():
            self._step.ids[...] = self.where.put(last)
            logits = self._next()
        else:
            logits = self._step.fill(new)  # which says so if an id does not exist
        self._texts = texts
        return logits

    def _known(self, texts):
        """(B,): how many tokens of each text need not be computed; its last one has to be."""
        sizes = np.array([len(text) for text in texts])
        counts = np.minimum([_shared(*two) for two in zip(texts, self._texts)], sizes - 1)
        if (sizes - counts).max() > FEW_QUERIES:
            counts[:] = counts.min()  # many queries see many keys fast if all rows begin at once
        room = self.model.cfg.context_length - (sizes - counts).max()
        return np.minimum(counts, room)  # all rows are given as many as the one with the most

    def _begin(self, cache):
        self._step, self._graph = _Step(self.model, self.where, cache, self._limit), None

    def _next(self):
        """A step: its logits (B, V). It is recorded first if the texts can grow enough."""
        self.where.make_current()
        room = self.model.cfg.context_length - self._step.cache.length
        if self._graph is None and self.why_no_graph is None and room >= _RUNS:
            self._record()
        if self._graph is None:
            return self._step()
        self._graph.replay()
        self._step.cache.replayed(1)
        return self._graph.result

    def _record(self):
        step = self._step
        before, counts = step.ids.copy(), step.cache.counts
        try:
            self._graph = self._graphs.Graph(step, warmups=_RUNS - 1)
        except self._graphs.GraphError as error:
            self.why_no_graph = str(error)
        step.ids[...] = before
        step.cache.keep(counts)


class _Step:
    """One more token for each row, from arrays on the device that stay where they are.

    cache   the StaticCache
    ids     (B,) int64: each row's last token, then the likeliest next one, or -1 if the logits are
            no numbers
    limit   (1,) int64: only ids below it are chosen
    """

    def __init__(self, model, where, cache, limit):
        self.model, self.where, self.cache, self.limit = model, where, cache, limit
        self.ids = where.xp.zeros(len(cache.counts), np.int64)
        self._weights = [p.data for p in model.parameters()]  # a graph needs their memory

    def __call__(self):
        """The logits after self.ids, (B, V)."""
        with evaluating(self.model), np.errstate(all="ignore"):
            x = self.model.hidden_states(Tensor(self.ids[:, None]), cache=self.cache)  # (B, 1, C)
            return self._logits(x[:, -1])

    def fill(self, texts):
        """The logits (B, V) after rows of new ids, of which some may be longer than others."""
        sizes = np.array([len(text) for text in texts])
        counts = self.cache.counts + sizes
        ids = np.zeros((len(texts), sizes.max()), np.int64)
        for row, text in zip(ids, texts):
            row[: len(text)] = text
        with evaluating(self.model), np.errstate(all="ignore"):
            x = self.model.hidden_states(ids, cache=self.cache)  # (B, T, C)
            last = np.arange(len(ids)) * ids.shape[1] + sizes - 1  # rows of (B T, C)
            logits = self._logits(F.embedding(last, x.flatten(0, 1)))
        self.cache.keep(counts)
        return logits

    def _logits(self, x):
        """x (B, C) -> (B, V); the likeliest tokens become self.ids."""
        xp, logits = self.where.xp, self.model.out_head(x).data
        wide = logits.astype(np.float32) if is_narrow(logits) else logits
        finite = xp.isfinite(xp.max(wide, axis=-1))  # nan wins every maximum
        allowed = xp.where(xp.arange(wide.shape[-1]) < self.limit, wide, -np.inf)
        self.ids[...] = xp.where(finite, xp.argmax(allowed, axis=-1), -1)
        return logits


def _unpadded(ids, padding):
    """Each row's ids."""
    padding = np.zeros(len(ids), int) if padding is None else padding
    return [np.array(row[p:]) for row, p in zip(ids, padding)]


def _shared(a, b):
    """With how many equal ids both begin."""
    n = min(len(a), len(b))
    same = a[:n] == b[:n]
    return n if same.all() else int(same.argmin())


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
