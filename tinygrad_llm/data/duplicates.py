"""Finding documents that nearly repeat an earlier one, without comparing every pair.

Two documents are as alike as their sets of shingles (runs of k words) overlap: Jaccard's
J(A, B) = |A ∩ B| / |A ∪ B|.

    MinHash     under a random order of all shingles, A and B have the same first one with
                probability J(A, B). So the part of many orders in which they agree estimates J.
                Broder, "On the resemblance and containment of documents", 1997
    banding     the signature is cut into b bands of r rows; only documents that agree in a whole
                band are compared: with probability 1 - (1 - J^r)^b.
                Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3
"""

import math
import re
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinygrad_llm.data.tokens import as_tokens
from tinygrad_llm.data.windows import at_least_one
from tinygrad_llm.random import Generator

# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces between words.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
CHUNK = 1 << 14  # shingles at a time: a long document needs no more memory
MISSED = 0.01  # of the documents exactly as alike as the threshold, banding misses no more


def shingles(document: str | ArrayLike, k: int = 8) -> np.ndarray:
    """The set of a document's k-shingles as 64-bit hashes, sorted: (n,) uint64.

    document    a text, of which lower-cased words count and nothing between them; or token ids.
                Where a script has no spaces between words, as Chinese, each character is one. In a
                text without words, of emoji say, each character but white space is one
    k           words, or ids, in a shingle; a shorter document is one shingle

    Raises ValueError for k below 1.
    """
    k = at_least_one("k", k)
    if isinstance(document, str):
        words = WORD.findall(document.lower()) or "".join(document.split())
        values = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    else:
        values = as_tokens(document).astype(np.uint64)
    if not len(values):
        return values
    k = min(k, len(values))
    n = len(values) - k + 1
    hashes = np.zeros(n, np.uint64)
    for j in range(k):
        hashes = _mixed(hashes + values[j : j + n])
    return np.unique(hashes)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on all bits of x: SplitMix64, Steele, Lea, Flood, 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class MinHash:
    """Signatures of documents: `permutations` numbers each, of which alike documents share many.

    The j-th number is the smallest of h_j(s) over all shingles s, with h_j(s) = the upper 32 bits
    of a_j s + b_j modulo 2⁶⁴ (multiply-shift: Dietzfelbinger, 1996). `seed` draws a and b.
    """

    def __init__(self, permutations: int = 128, k: int = 8, seed: int = 0):
        self.permutations = at_least_one("permutations", permutations)
        self.k = at_least_one("k", k)
        words = Generator(seed).words(4 * self.permutations).astype(np.uint64).reshape(4, -1, 1)
        self._a = (words[0] << np.uint64(32)) | words[1] | np.uint64(1)  # odd: no two s meet
        self._b = (words[2] << np.uint64(32)) | words[3]

    def signature(self, document: str | ArrayLike) -> np.ndarray:
        """(permutations,) uint32; that of a document without shingles is all 2³² - 1."""
        smallest = np.full(self.permutations, 2**32 - 1, np.uint64)
        hashes = shingles(document, self.k)  # (n,)
        for start in range(0, len(hashes), CHUNK):
            h = self._a * hashes[start : start + CHUNK] + self._b  # (permutations, CHUNK)
            smallest = np.minimum(smallest, (h >> np.uint64(32)).min(axis=1))
        return smallest.astype(np.uint32)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The estimate of J from two signatures; its standard error is √(J (1 - J) / permutations)."""
    return float(np.mean(first == second))


def band_rows(permutations: int, threshold: float) -> int:
    """r: the most rows in a band with which 99% of pairs with J = threshold are compared.

    r divides `permutations`, so that every number is in one band. Powers of two have many such r;
    a prime number has only 1, with which far more pairs are compared, and as few are missed.
    """
    divisors = [r for r in range(1, permutations + 1) if permutations % r == 0]
    found = [r for r in divisors if (1 - threshold**r) ** (permutations // r) <= MISSED]
    return max(found, default=1)


def band_keys(signature: np.ndarray, rows: int) -> list[int]:
    """One 64-bit hash for each band of a signature: of its number, and of what is in it."""
    bands = signature.reshape(-1, rows)  # (b, r)
    keys = _mixed(np.arange(len(bands), dtype=np.uint64))
    for column in bands.T:
        keys = _mixed(keys + column)
    return keys.tolist()


def near_duplicates(
    documents: Iterable[str | ArrayLike],
    threshold: float = 0.8,
    k: int = 8,
    permutations: int = 128,
    seed: int = 0,
) -> np.ndarray:
    """For each document the number of the one that it repeats; its own if it repeats none.

    documents   texts or arrays of token ids, read once, one at a time
    threshold   the estimated J from which on a document repeats an earlier one that was kept

    Returns (N,) int64. Memory for each document that is kept: its signature and one entry of a
    dictionary for each band, together about 4 KB by default (128 numbers in 32 bands).
    Raises TypeError for a single text, ValueError unless 0 < threshold <= 1 and k, permutations
    are at least 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    hasher = MinHash(permutations, k, seed)
    rows = band_rows(hasher.permutations, threshold)
    latest: dict[int, int] = {}  # band -> the last kept document that has it
    before: dict[int, np.ndarray] = {}  # of a kept document: the one before it in each band, or -1
    kept: dict[int, np.ndarray] = {}  # signatures
    repeats = []
    for number, document in enumerate(_several(documents)):
        signature = hasher.signature(document)
        keys = band_keys(signature, rows)
        last = [latest.get(key, -1) for key in keys]
        candidates = set()
        for band, other in enumerate(last):
            while other >= 0:
                candidates.add(other)
                other = before[other][band]
        alike = {other: jaccard(signature, kept[other]) for other in sorted(candidates)}
        best = max(alike, key=alike.get, default=number)
        if alike.get(best, -math.inf) >= threshold:
            repeats.append(best)
            continue
        repeats.append(number)
        kept[number], before[number] = signature, np.array(last)
        latest.update(dict.fromkeys(keys, number))
    return np.array(repeats, np.int64)


def deduplicate(documents: Iterable[Any], threshold: float = 0.8, **options: int) -> list[Any]:
    """The documents without those that nearly repeat an earlier one; see near_duplicates."""
    documents = list(_several(documents))
    repeats = near_duplicates(documents, threshold, **options)
    return [documents[i] for i in np.flatnonzero(repeats == np.arange(len(repeats)))]


def _several(documents: Iterable[Any]) -> Iterable[Any]:
    """The documents. Raises TypeError for a single text, whose characters are no documents."""
    if isinstance(documents, (str, bytes)):
        raise TypeError("documents must be several texts, got a single one: give a list of them")
    return documents
