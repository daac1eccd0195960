"""Near duplicates: estimates against Jaccard's index itself, and what is found among real texts."""

import csv
import os
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinygrad_llm.data import (
    MinHash,
    blocked_by,
    deduplicate,
    jaccard,
    near_duplicates,
    perplexity_outliers,
    shingles,
)
from tinygrad_llm.data.duplicates import MISSED, WORD, band_keys, band_rows
from tinygrad_llm.data.filters import PERSONAL_DATA

WORDS = [f"word{i}" for i in range(500)]


def text_of(rng, n):
    return " ".join(rng.choice(WORDS, n))


def exact_jaccard(first, second, k):
    """By sets of tuples, without any hash."""
    sets = []
    for text in (first, second):
        words = text.lower().split()
        sets.append({tuple(words[i : i + k]) for i in range(len(words) - k + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_shingles():
    assert len(shingles("a b c d a b c", k=3)) == 4  # abc twice
    assert shingles("A  b, c!", k=2).tolist() == shingles("a b c", k=2).tolist()
    assert shingles("a b", k=8).tolist() == shingles("a b", k=2).tolist()  # too short: one
    assert shingles("a b c", 3).tolist() != shingles("c b a", 3).tolist()
    assert len(shingles("", 3)) == len(shingles(" \n", 3)) == 0
    assert len(shingles("日本語の本", 2)) == 4  # characters, where words have no spaces
    assert len(shingles("GPTは本", 1)) == 3
    assert shingles(":) !", 2).tolist() == shingles(":)!", 2).tolist()  # no words: characters
    assert shingles("a :)", 2).tolist() == shingles("a", 2).tolist()
    assert len(shingles(np.arange(100, dtype=np.uint16), 8)) == 93  # token ids
    assert np.all(np.diff(shingles(range(100), 1).astype(object)) > 0)  # sorted, no two equal


@given(common=st.integers(0, 300), own=st.integers(0, 300), seed=st.integers(0, 9))
def test_estimate(common, own, seed):
    rng = np.random.default_rng(seed)
    start = text_of(rng, common + 10)
    first, second = (f"{start} {text_of(rng, own + 10)}" for _ in range(2))
    minhash = MinHash(permutations=512, k=3)
    expected = exact_jaccard(first, second, 3)
    found = jaccard(minhash.signature(first), minhash.signature(second))
    error = np.sqrt(max(expected * (1 - expected), 1e-3) / 512)
    assert abs(found - expected) < 5 * error


def test_estimates_have_no_bias():
    rng = np.random.default_rng(0)
    start = text_of(rng, 100)
    first, second = (f"{start} {text_of(rng, 50)}" for _ in range(2))
    hashers = [MinHash(permutations=128, k=3, seed=seed) for seed in range(100)]
    found = [jaccard(h.signature(first), h.signature(second)) for h in hashers]
    expected = exact_jaccard(first, second, 3)
    one = np.sqrt(expected * (1 - expected) / 128)
    assert np.mean(found) == pytest.approx(expected, abs=4 * one / 10)
    assert np.std(found) == pytest.approx(one, rel=0.3)  # the standard error that is documented


@given(text=st.text(max_size=200), k=st.integers(1, 9))
def test_signature_is_of_the_set(text, k):
    minhash = MinHash(permutations=16, k=k)
    signature = minhash.signature(text)
    assert signature.shape == (16,) and signature.dtype == np.uint32
    assert (signature == MinHash(permutations=16, k=k).signature(text)).all()
    longer = minhash.signature(text + " and some more words to make it longer")
    if WORD.search(text) and len(shingles(text, 1)) >= k:
        assert (longer <= signature).all()  # a greater set has no greater minimum


def test_bands():
    for threshold in (0.3, 0.5, 0.8, 0.95):
        rows = band_rows(128, threshold)
        assert 128 % rows == 0
        assert (1 - threshold**rows) ** (128 // rows) <= MISSED
    assert band_rows(128, 1.0) == 128
    found = [band_rows(128, threshold) for threshold in (0.8, 0.5)]
    assert found == [4, 2]  # bands of twice as many rows would miss 5% and 13%
    assert band_rows(128, 1e-6) == 1
    assert all(n % band_rows(n, threshold) == 0 for n in range(1, 200) for threshold in (0.5, 0.9))


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_keys_of_bands(numbers, rows):
    keys = band_keys(np.array(numbers, np.uint32), rows)
    bands = [(start, *numbers[start : start + rows]) for start in range(0, 12, rows)]
    assert len(keys) == len(set(keys)) == len(bands)  # alike bands differ by their number
    for changed in range(12):
        other = [n + (i == changed) for i, n in enumerate(numbers)]
        same = [
            i for i, key in enumerate(band_keys(np.array(other, np.uint32), rows)) if key == keys[i]
        ]
        assert same == [i for i in range(len(bands)) if i != changed // rows]


def test_near_duplicates_are_found():
    rng = np.random.default_rng(0)
    texts = [text_of(rng, 200) for _ in range(50)]
    changed = texts[7].split()
    changed[100] = "another"
    repeats = near_duplicates([*texts, " ".join(changed), texts[3].upper(), texts[9][:600]])
    assert repeats[:50].tolist() == list(range(50))
    assert repeats[50:].tolist() == [7, 3, 52]
    kept = deduplicate([*texts, " ".join(changed), texts[3].upper()])
    assert kept == texts
    assert deduplicate(text for text in [*texts, texts[0]]) == texts  # read once, too


@pytest.mark.parametrize(
    "texts", [[":)", "!!!", "???", "hello"], ["😀", "🚀", "😀🚀"], ["日本", "本日"], ["ไทย", "ลาว"]]
)
def test_no_text_is_a_copy_for_want_of_words(texts):
    assert deduplicate(texts) == texts
    assert deduplicate([*texts, *texts]) == texts
    assert deduplicate([*texts, "", " "]) == [*texts, ""]


LONG = {
    "Japanese": "吾輩は猫である名前はまだ無いどこで生れたかとんと見当がつかぬ" * 3,
    "Chinese": "学而时习之不亦说乎有朋自远方来不亦乐乎人不知而不愠不亦君子乎" * 3,
    "Thai": "กาลครั้งหนึ่งนานมาแล้วมีชายคนหนึ่งอาศัยอยู่ในป่าใหญ่" * 2,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_texts_without_spaces_are_compared_by_their_characters(text):
    assert near_duplicates([text, text[:-2], text[::-1]], threshold=0.7).tolist() == [0, 0, 2]


def test_all_kept_documents_of_a_band_are_compared():
    """Not only the latest: each band of the last document is in many, that are less like it."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 10**6, 400)
    changed = np.tile(base, (200, 1))
    for row in changed:
        start = rng.integers(0, 400 - 90)
        row[start : start + 90] = rng.integers(0, 10**6, 90)
    repeats = near_duplicates([base, *changed, base], k=3)
    assert repeats.tolist() == [*range(201), 0]


@pytest.mark.parametrize("permutations", [128, 127, 30])  # a power of two, a prime, neither
def test_any_number_of_permutations(permutations):
    """Whatever the bands: of pairs well above the threshold, next to none is missed."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 1000, (40, 300))
    documents = [*ids, *ids[:, :295], *ids[:20, 3:]]
    repeats = near_duplicates(documents, permutations=permutations)
    assert repeats.tolist() == [*range(40), *range(40), *range(20)]


def test_memory_is_what_is_said():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**31, (2000, 20))
    tracemalloc.start()
    assert len(deduplicate(ids)) == 2000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most / 2000 < 5000  # bytes


@given(st.lists(st.sampled_from(["a b c", "A, B, C.", "c b a", "", "...", "d e f g h"])))
def test_exact_repeats_always_go(texts):
    repeats = near_duplicates(texts, threshold=1.0, k=2)
    seen = {}
    for number, text in enumerate(texts):
        key = tuple(shingles(text, 2).tolist())
        assert repeats[number] == seen.setdefault(key, number)


def test_documents_are_read_once_and_one_at_a_time():
    assert near_duplicates(text for text in ("a b c", "a b c", "d")).tolist() == [0, 0, 2]
    assert near_duplicates([]).tolist() == []
    ids = np.arange(1000)
    assert near_duplicates([ids, ids[:990], ids[:300]]).tolist() == [0, 0, 2]


def test_sms_messages():
    folder = os.environ.get("TINYGRAD_LLM_DATA")
    if folder is None:
        pytest.skip("TINYGRAD_LLM_DATA does not name the folder with sms-spam-collection.tsv")
    with open(Path(folder) / "sms-spam-collection.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 5574
    texts = [text for _, text in rows]
    assert len(set(texts)) == 5171  # so many differ in at least one character
    found = near_duplicates(texts, threshold=0.7, k=3)
    kept = np.flatnonzero(found == np.arange(len(texts)))
    assert 4900 < len(kept) < 5171
    sets = [set(shingles(text, 3).tolist()) for text in texts]
    for number in np.flatnonzero(found != np.arange(len(texts))):
        first, second = sets[number], sets[found[number]]
        exact = len(first & second) / len(first | second) if first | second else 1.0
        assert exact > 0.7 - 5 * np.sqrt(0.7 * 0.3 / 128)


def test_perplexity_outliers():
    perplexities = [20.0] * 50 + [21.0] * 50 + [90.0]
    assert np.flatnonzero(perplexity_outliers(perplexities)).tolist() == [100]
    assert not perplexity_outliers([1.0, 1.0]).any()
    assert perplexity_outliers([]).tolist() == []
    one = [0.0] * 10 + [1.0]  # √10 = 3.16 deviations above the mean, the most that 11 numbers allow
    assert np.flatnonzero(perplexity_outliers(one, sigmas=3.1)).tolist() == [10]
    assert not perplexity_outliers(one, sigmas=3.2).any()
    with pytest.raises(ValueError, match="one finite number for each document"):
        perplexity_outliers([1.0, float("inf")])


TELEPHONES = """
020 7946 0018 | +44 20 7946 0018 | +44 (0)20 7946 0018 | (020) 7946 0018
(020) 7946-0018 | 07700 900123 | 01 42 68 53 00 | 01.42.68.53.00 | +33 1 42 68 53 00
030 901820 | 0171-1234567 | +49 30 901820 | +49 (30) 901820 | 555-123-4567
(555) 123-4567 | (555)123-4567 | 555.123.4567 | 212 555 0123 | +1 212 555 0123
+1 (212) 555-0123 | 1-800-555-0199 | +12125550123 | +86 138 0013 8000 | +91 98765 43210
020-7946-0018 | 0800 123 4567 | tel:+44-20-7946-0018
"""

NO_TELEPHONES = """
2024-01-15 | 15-01-2024 | 01-02-2003 | 01.02.2003 | 01.02.2003 10:15
2024-01-15 10:20:30 | 01 02 2003 | 1914-1918 | 1914 1918 | 1914-1918-1939 | 1914 - 1918
978-0-306-40615-7 | 0-306-40615-2 | ISBN 978 0 306 40615 7 | 978-3-16-148410-0
3-16-148410-0 | 9780306406157 | 0306406152 | 1234567890 | 12345678901234
1 234 567 890 | 1,234,567,890 | 5,145 | 100 200 300 | 256 512 1024 2048 | 192.168.0.1
10.1109/5.771073 | 0317-8471 | 3.1415 9265 3589 | 12-05-1908 | 12 May 1908 | 1908.05.12
pp. 120-145 | 12345-6789 | 4111 1111 1111 1111 | 4111-1111-1111-1111 | 1.234.567.890
$12.50 | 1939-45 | (1914) 1918-1920 | (1990) 123 4567 | 2023-2024-2025 | 12:30-13:45
1000 2000 3000 | 1000-2000 | 400-500-600 | 01.02.2003-04.05.2006 | 01.02.2003 500
[12-345-6789]
"""


@pytest.mark.parametrize("texts, names", [(TELEPHONES, ["telephone number"]), (NO_TELEPHONES, [])])
def test_telephone_numbers(texts, names):
    for text in re.split(r" \| |\n", texts.strip()):
        for around in ("{}", "Call {}, please.", "({})"):
            found = blocked_by(around.format(text))
            assert [name for name in found if name != "payment card"] == names, around.format(text)


WORD_SIGNS = st.text("a.-+@_01 ()/", max_size=4)


@given(start=WORD_SIGNS, unit=WORD_SIGNS.filter(len), end=WORD_SIGNS)
@example(start="", unit="a", end="")
@example(start="", unit="-", end="")
@example(start="a@", unit="a", end="")
@example(start="", unit="0", end="")
@example(start="", unit="1 ", end="")
@example(start="+", unit="1-", end="")
@example(start="0", unit="1 1", end="a")
@settings(max_examples=30, deadline=None)
def test_time_grows_with_the_text_not_with_its_square(start, unit, end):
    """Of a long run of anything. 50,000 word characters took 10 s when each could be a start."""
    text = start + unit * (50_000 // len(unit)) + end
    before = time.process_time()
    blocked_by(text, PERSONAL_DATA)
    assert time.process_time() - before < 1  # 0.01 on a quiet core


def test_block_list():
    assert blocked_by("Write to jane.doe+x@example.co.uk!") == ["e-mail address"]
    assert blocked_by("Call 020 7946 0018 or +44 (0)20") == ["telephone number"]
    assert blocked_by("card 4111 1111 1111 1111.") == ["payment card"]
    assert blocked_by("On 12 May 1908 he painted 5,145 pictures for $12.50 @home.") == []
    assert blocked_by("a Secret", {"secrets": r"(?i)secret"}) == ["secrets"]
    assert blocked_by("abc", ["b", "z"]) == ["b"]
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        blocked_by("abc", ["("])
    with pytest.raises(TypeError, match=r"write \['secret'\]"):
        blocked_by("abc", "secret")


def test_bad_input():
    for find in (near_duplicates, deduplicate):
        for single in ("abc", b"abc"):
            with pytest.raises(TypeError, match="got a single one: give a list of them"):
                find(single)
    for threshold in (0, -0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be above 0 and at most 1"):
            near_duplicates(["a"], threshold)
    with pytest.raises(ValueError, match="k must be at least 1"):
        near_duplicates(["a"], k=0)
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        MinHash(permutations=0)
