"""Texts for the tests of the tokenizers: real ones, and strategies for any."""

import os
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st


def data_file(name: str) -> Path:
    """A file of TINYGRAD_LLM_DATA; without that folder, the test is skipped."""
    folder = os.environ.get("TINYGRAD_LLM_DATA")
    if not folder:
        pytest.skip("set TINYGRAD_LLM_DATA to the folder with gpt2-bpe/ and the-verdict.txt")
    return Path(folder) / name


def verdict() -> str:
    return data_file("the-verdict.txt").read_text(encoding="utf-8")


@cache
def old_characters() -> str:
    """What libraries with any version of Unicode see alike: characters of 3.2 that have kept their
    category. Of each run of letters that sort together, such as Han, the first hundred."""
    kept = []
    in_category = 0
    for character in map(chr, range(0x30000)):
        category = unicodedata.category(character)
        same = unicodedata.ucd_3_2_0.category(character) == category not in ("Cs", "Cn", "Co")
        in_category = in_category + 1 if category == "Lo" else 0
        if same and in_category <= 100:
            kept.append(character)
    return "".join(kept)


def real_words(text: str) -> st.SearchStrategy[str]:
    """Pieces of a text put together anew."""
    return st.lists(st.sampled_from(sorted(set(text.split(" "))))).map(" ".join)


def old_text() -> st.SearchStrategy[str]:
    return st.text(st.sampled_from(old_characters()))
