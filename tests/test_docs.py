"""The examples in README and docs are run, and give what they show."""

import doctest
import linecache
import os
import re
from pathlib import Path

import numpy as np
import pytest

from tinygrad_llm import random
from tinygrad_llm.ops import TABLE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_runs_and_gives_what_the_page_shows(page):
    if "corpus_path(" in page.read_text(encoding="utf-8"):
        for name in ("TINYGRAD_LLM_DATA", "TIKTOKEN_CACHE_DIR"):
            if not os.path.isdir(os.environ.get(name, "")):
                pytest.skip(f"{page.name} reads texts and a vocabulary: {name} must name a folder")
    np.random.seed(0)
    random.manual_seed(0)
    known = set(TABLE)
    try:
        result = doctest.testfile(str(page), module_relative=False, globs=definitions(page))
    finally:
        for name in set(TABLE) - known:
            del TABLE[name]
    assert result.attempted > 0
    assert result.failed == 0


def definitions(page):
    """What a page defines in Python blocks without prompts and complete with their imports."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        if ">>>" not in block and "import" in block:
            name = f"{page}, block {len(linecache.cache)}"  # where inspect finds the source
            linecache.cache[name] = len(block), None, block.splitlines(keepends=True), name
            exec(compile(block, name, "exec"), names)
    return names
