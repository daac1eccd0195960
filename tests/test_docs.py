"""The examples in README and docs are run, and give what they show."""

import doctest
import linecache
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tinygrad_llm import random
from tinygrad_llm.ops import TABLE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = {"corpus_path(": "TINYGRAD_LLM_DATA", "gpt2()": "TIKTOKEN_CACHE_DIR"}  # where files are


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_runs_and_gives_what_the_page_shows(page, monkeypatch):
    """Without the files that it reads, a page is run up to where it needs them; a chapter, as if
    there were no PyTorch.
    """
    known = set(TABLE)
    if page.name.startswith("ch"):
        monkeypatch.setitem(sys.modules, "torch", None)  # "import torch": ModuleNotFoundError
    monkeypatch.chdir(ROOT)  # a page reads files of the repository by their names in it
    text = page.read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(text, definitions(page), page.name, str(page), 0)
    assert test.examples
    lacking = [missing(example.source) for example in test.examples]
    end = next((i for i, name in enumerate(lacking) if name), len(lacking))
    del test.examples[end:]
    np.random.seed(0)
    random.manual_seed(0)
    try:
        result = doctest.DocTestRunner().run(test)
    finally:
        for name in set(TABLE) - known:
            del TABLE[name]
    assert result.failed == 0
    if end < len(lacking):
        pytest.skip(f"{page.name} from example {end + 1} on: {lacking[end]} must name a folder")


def missing(source):
    """The variable that does not name the folder in which the example reads, if there is one."""
    for call, name in FOLDERS.items():
        if call in source and not os.path.isdir(os.environ.get(name, "")):
            return name


def definitions(page):
    """What a page defines in Python blocks without prompts and complete with their imports."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        if ">>>" not in block and "import" in block:
            name = f"{page}, block {len(linecache.cache)}"  # where inspect finds the source
            linecache.cache[name] = len(block), None, block.splitlines(keepends=True), name
            exec(compile(block, name, "exec"), names)
    return names
