"""The numbers that the book prints come out where PyTorch cannot be imported; errors in notes on it
are not repeated. Those on the pages in docs/ are computed by tests/test_docs.py, so, too.

The others are computed in a process of its own; what fails there is shown here. By hand, one:
python -m pytest -n 0 tests/known_answers.py -k layer_norm
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # now "import torch" raises ModuleNotFoundError
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
ANSWERS = [
    "known_answers.py",  # chapters 0 and 3 to 6
    "test_words.py::test_first_steps",  # chapter 1
    "test_words.py::test_punctuation",
    "test_words.py::test_vocabulary_of_the_verdict",
    "test_words.py::test_without_unknown_token",
    "test_words.py::test_with_unknown_token",
    "test_words.py::test_toy_vocabulary_of_the_notes",
    "test_tokenizer.py::test_gpt2_known_ids",
    "test_tokenizer.py::test_gpt2_reads_the_verdict",
    "test_tokenizer.py::test_gpt2_white_space",
    "test_tokenizer.py::test_gpt2_special_tokens",
    "test_data.py::test_verdict_tokens",  # chapter 2
    "test_data.py::test_verdict_first_batches",
    "test_data.py::test_verdict_printed_batch",
    "test_data.py::test_lorem_example",
    "test_data_mixture.py::test_formula",
]


def test_the_books_numbers_without_pytorch():
    options = ["-n", "0", "-q", "-rs", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        *options,
        *(f"tests/{test}" for test in ANSWERS),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    if reasons := set(re.findall(r"^SKIPPED \[\d+\] \S+ (.+)", done.stdout, re.M)):
        pytest.skip("; ".join(["all others pass", *sorted(reasons)]))


UNTRUE = [  # or never confirmed
    r"billions of (embedding )?dimensions|dimensions? .{0,40}\bbillions?\b",  # GPT-3 has 12,288
    r"Llama.?2.{0,200}\b0\.7\b|\b0\.7\b.{0,200}Llama.?2",
    r"PackedBatch",
    r"Deduplicate Everything",
]


@pytest.mark.parametrize("claim", UNTRUE)
def test_errors_of_the_notes_are_not_repeated(claim):
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(claim, text, re.S | re.I), page.name
