"""Which token comes next: what is done to the logits, and the draw.

Each function takes logits (B, V) and returns new ones, -inf where a token may not be drawn. They
are applied in this order, which is transformers':

    repetition_penalty    Keskar et al., "CTRL", 2019, section 4.1
    temperature
    top_k                 Fan et al., "Hierarchical Neural Story Generation", 2018
    top_p                 Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020
    min_p                 Nguyen et al., "Turning Up the Heat", 2024
"""

from dataclasses import dataclass

import numpy as np

from .. import random
from .arguments import check


def repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Positive logits of tokens that are in the text are divided by `penalty`, negative ones
    multiplied: above 1, both become less likely.

    seen    (B, V) booleans: which tokens are in each row's text
    """
    check(repetition_penalty=penalty)
    penalised = np.where(logits < 0, logits * penalty, logits / penalty)
    return np.where(seen, penalised, logits)


def temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Divided by `temperature`: below 1, likely tokens become likelier still.

    The largest logit is subtracted first: probabilities stay as they are, and nothing overflows.
    """
    if temperature == 0:
        raise ValueError("temperature must be above 0 to divide by; for 0, take the argmax")
    check(temperature=temperature)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is what is meant
        return (logits - logits.max(axis=-1, keepdims=True)) / temperature


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The k largest logits of each row, and those that equal the smallest of these."""
    check_top_k(k, logits.shape[-1])
    weakest = np.partition(logits, -k, axis=-1)[:, -k, None]  # (B, 1)
    return np.where(logits < weakest, -np.inf, logits)


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens of each row, as few as have a probability of p together: the nucleus."""
    check(top_p=p)
    nucleus = np.zeros(logits.shape, bool)
    for chances, inside in zip(probabilities(logits), nucleus, strict=True):
        # Of V tokens, those below (1 - p) / V have less than 1 - p together: none need be sorted.
        likely = chances >= (1 - p) / len(chances)
        (order,) = likely.nonzero()
        order = order[chances[order].argsort(kind="stable")]  # from the least likely on
        below = chances[~likely].sum() + chances[order].cumsum()  # it and all less likely still
        inside[order[below > 1 - p]] = inside[order[-1]] = True
    return np.where(nucleus, logits, -np.inf)


def min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """The tokens at least p times as likely as their row's likeliest."""
    check(min_p=p)
    chances = probabilities(logits)
    return np.where(chances < p * chances.max(axis=-1, keepdims=True), -np.inf, logits)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax(logits), in the dtype of the logits."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class Sampler:
    """Draws a token for each row: the functions above that are asked for, then the draw.

    temperature 0 takes the likeliest token; None leaves top_k, top_p or min_p out.
    generator   source of randomness; default: the library's own
    vocab_size  only ids below it may be drawn

    Raises, when it is made, ValueError for a value out of range, TypeError for another generator.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generator: random.Generator | None = None
    vocab_size: int | None = None

    def __post_init__(self):
        check(temperature=self.temperature, repetition_penalty=self.repetition_penalty)
        for name in ("top_k", "top_p", "min_p", "vocab_size"):
            if getattr(self, name) is not None:
                check(**{name: getattr(self, name)})
        random.or_default(self.generator)

    is_greedy = property(
        lambda self: self.temperature == 0 and self.repetition_penalty == 1,
        doc="Whether it takes the likeliest token, whatever came before.",
    )

    def __call__(
        self, logits: np.ndarray, ids: np.ndarray, padding: np.ndarray | None = None
    ) -> np.ndarray:
        """logits (B, V) after the texts ids (B, T), whose first padding (B,) are none -> (B,)"""
        logits = self.logits(logits, ids, padding)
        if self.temperature == 0:
            return logits.argmax(axis=-1)
        return random.or_default(self.generator).multinomial(probabilities(logits))

    def logits(
        self, logits: np.ndarray, ids: np.ndarray, padding: np.ndarray | None = None
    ) -> np.ndarray:
        """What is drawn from: the softmax of these."""
        logits = logits[:, : self.vocab_size]
        if self.repetition_penalty != 1:
            seen = seen_tokens(ids, padding, logits.shape[-1])
            logits = repetition_penalty(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits
        logits = temperature(logits.astype(np.float64), self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        return logits


def seen_tokens(ids: np.ndarray, padding: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """Which tokens are in each row of ids (B, T), without its padding: (B, vocab_size) booleans."""
    seen = np.zeros((len(ids), vocab_size), bool)
    for b, row in enumerate(ids):
        row = row if padding is None else row[padding[b] :]
        seen[b, row[row < vocab_size]] = True
    return seen


def check_top_k(k: int, tokens: int) -> None:
    """Raises ValueError unless that many tokens can be chosen."""
    check(top_k=k)
    if k > tokens:
        raise ValueError(f"top_k must be at most {tokens}, the number of tokens, got {k}")
