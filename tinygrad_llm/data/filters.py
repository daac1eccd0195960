"""Which documents to leave out: those that a model finds too odd, and those with private data."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

# A telephone number as people write it, not as dates, years, ISBN and long numbers are written: it
# begins with +, (, 0 or a North American area code, and stands alone, not in a row of numbers.
TELEPHONE = (
    r"(?<!\w)(?<!\d[ .,/:-])(?:"
    r"\+[1-9](?:(?:[ .-]?\(|\)[ .-]?|[ .-])?\d){7,14}"  # +44 (0)20 7946 0018; E.164: up to 15
    r"|(?:1[ .-])?(?:\([2-9]\d\d\)[ .-]?\d{3}[ .-]|[2-9]\d\d([ .-])\d{3}\1)\d{4}"  # (555) 123-4567
    r"|\(0[1-9]\d{0,3}\) ?\d{3,4}[ .-]?\d{3,4}"  # (020) 7946 0018
    # 01 42 68 53 00: 9 to 12 digits, more than a date's 8
    r"|(?=0(?:[ .-]?\d){8,11}(?![ .-]?\d))0[1-9]\d{0,3}([ .-])\d{2,8}(?:\2\d{2,6})*"
    r")(?!\w)(?![ .,/:-]\d)"
)

# What personal data looks like: a start, to be extended for the corpus at hand.
PERSONAL_DATA = {
    # Only from where such characters begin: else a run of n of them is read n times.
    "e-mail address": r"(?<![\w.+-])[\w.+-]+@[\w-]+(\.[\w-]+)+",
    "telephone number": TELEPHONE,
    "payment card": r"(?<!\d)\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?!\d)",
}


def perplexity_outliers(perplexities: ArrayLike, sigmas: float = 3.0) -> np.ndarray:
    """True for the documents whose perplexity is above µ + sigmas σ: (N,) -> (N,) booleans.

    µ and σ are the mean and standard deviation of all N: σ² is the mean of (p - µ)². Among N
    numbers none lies more than √(N - 1) deviations above the mean (Samuelson, 1968): with fewer
    than 10, three are never exceeded.
    Raises ValueError for a nan or infinite perplexity, and for another shape.
    """
    p = np.asarray(perplexities, np.float64)
    if p.ndim != 1 or not np.isfinite(p).all():
        raise ValueError("perplexities must be one finite number for each document")
    return p > p.mean() + sigmas * p.std() if p.size else np.zeros(0, bool)


def blocked_by(
    document: str, patterns: Mapping[str, str] | Sequence[str] = PERSONAL_DATA
) -> list[str]:
    """The names of the patterns that occur in the text: none for a document to keep.

    patterns    regular expressions by name, or a plain list of them, each its own name

    Raises ValueError for a pattern that is no regular expression, TypeError for a single one.
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns must be several: write [{patterns!r}]")
    named = patterns if isinstance(patterns, Mapping) else dict(zip(patterns, patterns))
    try:
        return [name for name, pattern in named.items() if re.search(pattern, document)]
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is no regular expression: {error}") from None
