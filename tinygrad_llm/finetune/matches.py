"""How alike an expected and a found text are, from 0 to 1, and how alike two lists of scores are.

For answers that have one right form, exact matches count; for others, these say how much is shared:

token_f1         words, in any order      SQuAD: Rajpurkar et al. 2016, arXiv:1606.05250
rouge_l          words, in order          Lin 2004, "ROUGE: a package for automatic evaluation ..."
edit_similarity  characters, in order     Levenshtein 1966

None of them knows what a text means. Whether one ranks answers as people or a better judge do, a
correlation says.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def normalize(
    text: str, *, fold_case: bool = True, punctuation: bool = True, articles: bool = True
) -> str:
    """One form for what looks alike: Unicode's NFKC, single spaces, and none at the ends.

    fold_case    no difference between upper and lower case
    punctuation  False: without it, and without ASCII's symbols
    articles     False: without the words a, an and the, in this case
    """
    text = unicodedata.normalize("NFKC", text)
    if fold_case:
        text = unicodedata.normalize("NFKC", text.casefold())
    if not punctuation:
        text = "".join(c for c in text if not _is_punctuation(c))
    if not articles:
        text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def exact_match(expected: str, found: str, **options: bool) -> float:
    """1 if the texts are equal once normalized, with the options of `normalize`; else 0."""
    return float(normalize(expected, **options) == normalize(found, **options))


def token_f1(expected: str, found: str) -> float:
    """The harmonic mean of precision and recall of the words, counted as often as they occur.

    SQuAD's rule: case, punctuation and articles do not count.
    """
    words = [normalize(t, punctuation=False, articles=False).split() for t in (expected, found)]
    common = Counter(words[0]) & Counter(words[1])
    return _f1(common.total(), *map(len, words))


def rouge_l(expected: str, found: str) -> float:
    """The F1 score of ROUGE-L: of the words in the longest common subsequence.

    Words are runs of letters and digits, of any script; case does not count.
    """
    words = [re.findall(r"[^\W_]+", normalize(text)) for text in (expected, found)]
    ids = {word: i for i, word in enumerate({*words[0], *words[1]})}
    a, b = (np.array([ids[word] for word in text], dtype=np.int64) for text in words)
    return _f1(_longest_common_subsequence(a, b), len(a), len(b))


def edit_similarity(expected: str, found: str) -> float:
    """1 - d / n: d insertions, deletions and substitutions of characters turn one of the normalized
    texts into the other, and n is the length of the longer one.
    """
    texts = [normalize(text).encode("utf-32-le", "surrogatepass") for text in (expected, found)]
    a, b = (np.frombuffer(text, np.uint32) for text in texts)
    longer = max(len(a), len(b))
    return 1 - _edit_distance(a, b) / longer if longer else 1.0


MEASURES = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
}


class Matches(NamedTuple):
    """What a measure gives for a list of texts."""

    mean: float
    values: np.ndarray  # (N,) float64: of each entry


def matches(
    pairs: Iterable[tuple[str, str]],
    measures: Mapping[str, Callable[[str, str], float]] = MEASURES,
) -> dict[str, Matches]:
    """Each measure of each pair (expected, found), and their means.

    Raises ValueError if there are no pairs, TypeError if one is not two texts.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("there is nothing to compare: give pairs (expected, found)")
    for i, pair in enumerate(pairs):
        texts = isinstance(pair, tuple | list) and [type(text) for text in pair] == [str, str]
        if not texts:
            raise TypeError(f"pairs[{i}] is {pair!r:.80}: expected two texts, (expected, found)")
    found = {}
    for name, measure in measures.items():
        values = np.array([measure(*pair) for pair in pairs], dtype=np.float64)
        found[name] = Matches(float(values.mean()), values)
    return found


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Σ (x - mean x)(y - mean y) / √(Σ (x - mean x)² Σ (y - mean y)²): do they lie on a line?

    This and the other correlations are from -1 to 1, and nan if all of x or all of y are equal.
    They raise ValueError unless x and y are two lists of N ≥ 2 finite numbers.
    """
    x, y = _paired(x, y)
    if (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    x, y = (v / np.abs(v).max() for v in (x, y))  # so that no square overflows or underflows
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of the ranks, where equal values share the mean of theirs: do they rise
    together?
    """
    return pearson(*map(_ranks, _paired(x, y)))


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b, (P - Q) / √((P + Q + X)(P + Q + Y)): of two entries, do both agree which one
    is better?

    Of all pairs of entries, P have the same order in x and y, and Q the opposite one; X are equal
    in x only, and Y in y only. Time O(N²), memory O(N).
    """
    x, y = _paired(x, y)
    agreement = in_x = in_y = 0  # P - Q, P + Q + Y, P + Q + X
    for i in range(1, len(x)):
        dx = (x[i] > x[:i]).astype(np.int64) - (x[i] < x[:i])
        dy = (y[i] > y[:i]).astype(np.int64) - (y[i] < y[:i])
        agreement += int(dx @ dy)
        in_x += int(dx @ dx)
        in_y += int(dy @ dy)
    return agreement / (in_x * in_y) ** 0.5 if in_x and in_y else float("nan")


def _is_punctuation(c: str) -> bool:
    return unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"  # ASCII's symbols


def _f1(common: int, expected: int, found: int) -> float:
    """2 P R / (P + R) for P = common / found, R = common / expected. Of no words at all, 1."""
    return 2 * common / (expected + found) if expected + found else 1.0


def _longest_common_subsequence(a: np.ndarray, b: np.ndarray) -> int:
    """Its length. L_ij, that of a[:i] and b[:j], is L_(i-1)(j-1) + 1 where a_i = b_j, and else the
    larger of L_(i-1)j and L_i(j-1). The latter makes row i rise: a running maximum.
    """
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for item in a:
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + (b == item)))
    return int(row[-1])


def _edit_distance(a: np.ndarray, b: np.ndarray) -> int:
    """D_ij of a[:i] and b[:j] is the smallest of D_(i-1)j + 1, D_(i-1)(j-1) + (a_i ≠ b_j) and
    D_i(j-1) + 1. The last makes D_ij - j fall: a running minimum.
    """
    j = np.arange(len(b) + 1)
    row = j
    for item in a:
        best = row + 1
        best[1:] = np.minimum(best[1:], row[:-1] + (b != item))
        row = np.minimum.accumulate(best - j) + j
    return int(row[-1])


def _paired(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"a correlation needs two lists with the same number of scores, at least two: "
            f"these have the shapes {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("some scores are nan or infinite: leave these entries out of both lists")
    return x, y


def _ranks(x: np.ndarray) -> np.ndarray:
    """Of each value, 1 for the smallest; the mean of theirs for equal ones."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
