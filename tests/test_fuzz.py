"""Damaged files by the thousand: 10,500 checkpoints and tokenizers, each a little wrong somewhere.

Whatever a file holds, it is opened or refused with one line that names it: no crash, no hang, and
no more memory than the limit that is set here. A file that is opened must then do its work.
"""

import copy
import json
import resource
import struct
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygrad_llm import no_grad
from tinygrad_llm.checkpoint import INDEX, WEIGHTS, load_model, save_model
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import (
    BPETokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
    load,
)

MODEL = GPT(GPTConfig(5, 3, 4, 2, 1, tie_weights=False), Generator(1))
TEXT = "some text"
TOKENIZERS = [
    BPETokenizer.train(TEXT, 260),
    WordTokenizer.train(TEXT),
    WordPieceTokenizer.train(TEXT, 20),
    UnigramTokenizer.train(TEXT, 280),
]
HEADROOM = 2**29  # bytes of address space that opening a file of some kilobytes may take


def fuzzed(files):
    """Settings: so many files, each opened within seconds."""
    return settings(
        max_examples=files,
        deadline=timedelta(seconds=10),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextmanager
def little_memory():
    """Inside, what asks for HEADROOM beyond what the process has (some of which may be free) gets a
    MemoryError. Yields the bytes that it has.
    """
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, before[1]))
    try:
        yield used
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def opens_or_refuses(open_it, directory):
    """What open_it gives, or None if it refuses as it should."""
    try:
        with little_memory():
            return open_it(directory)
    except (ValueError, OSError) as error:
        text = str(error)
        assert str(directory) in text and text.isprintable() and len(text) < 2000, text
        return None


# --- mutations ------------------------------------------------------------------------------------

NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 0.5, 1e300, -0.0]
WORDS = ["", "x", "a\nb", "\x00", "é", "../x", "/etc/hostname", "<|endoftext|>", "a" * 3000]
KINDS = [
    "I32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "BOOL",
    "F8_E4M3",
    "C64",
    "BPE",
    "Unigram",
    "WordPiece",
]
DEEP = json.loads("[" * 500 + "]" * 500)
OTHERS = [None, True, False, [], {}, [[]], [0, 0], [2**62, 2**62], {"a": 1}, float("nan"), DEEP]
ODD = st.sampled_from([*NUMBERS, *WORDS, *KINDS, *OTHERS])


def places(content):
    """(container, key) of everything in a JSON value."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places(content[key])


JSON_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "delete", "shift", "copy", "add"]),
        st.integers(0, 2**16),
        st.integers(0, 2**16),
        ODD,
    ),
    min_size=1,
    max_size=3,
)


def edited(content, edits):
    """A JSON value after edits: a value replaced, deleted, off by some, another's, or added."""
    content = copy.deepcopy(content)
    for kind, here, there, value in edits:
        found = list(places(content))
        if not found:
            break
        container, key = found[here % len(found)]
        if kind == "replace":
            container[key] = copy.deepcopy(value)
        elif kind == "delete":
            del container[key]
        elif kind == "shift" and type(container[key]) is int:
            container[key] += there % 17 - 8
        elif kind == "copy":
            other, name = found[there % len(found)]
            container[key] = copy.deepcopy(other[name])
        elif kind == "add" and isinstance(container, dict):
            container[str(value)[:20]] = copy.deepcopy(container[key])
    return content


BYTE_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def mangled(raw, edits):
    """Bytes after edits: some changed, cut out, put in, or the rest lost."""
    for kind, where, new in edits:
        i, n = int(where * len(raw)), len(new)
        if kind == "flip":
            raw = raw[:i] + bytes(a ^ b for a, b in zip(raw[i:], new)) + raw[i + n :]
        elif kind == "cut":
            raw = raw[:i] + raw[i + n :]
        elif kind == "insert":
            raw = raw[:i] + new + raw[i:]
        else:
            raw = raw[:i]
    return raw


# --- checkpoints ----------------------------------------------------------------------------------


def check_checkpoint(directory):
    model = opens_or_refuses(load_model, directory)
    if model:
        assert model.num_parameters() == model.cfg.num_parameters() < 10_000
        with no_grad(), np.errstate(all="ignore"):
            assert model([[0]]).shape == (1, 1, model.cfg.vocab_size)


@pytest.fixture
def checkpoint(tmp_path):
    save_model(MODEL, tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_model(MODEL, tmp_path, max_shard_size=300)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


def test_weights_with_other_bytes(checkpoint):
    original = (checkpoint / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")

    @fuzzed(1500)
    @given(BYTE_EDITS, st.booleans())
    def on_any(edits, in_header):
        raw = mangled(original[:header], edits) + original[header:]
        (checkpoint / WEIGHTS).write_bytes(raw if in_header else mangled(original, edits))
        check_checkpoint(checkpoint)

    on_any()


def test_weights_with_another_header(checkpoint):
    original = (checkpoint / WEIGHTS).read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, numbers = json.loads(original[8 : 8 + length]), original[8 + length :]
    lengths = st.none() | st.integers(0, 2 * length) | st.sampled_from([2**31, 2**63, 2**64 - 1])

    @fuzzed(2500)
    @given(JSON_EDITS, lengths, st.integers(-8, 8))
    def on_any(edits, said, longer):
        text = json.dumps(edited(header, edits)).encode()
        data = numbers[: len(numbers) + min(longer, 0)] + bytes(max(longer, 0))
        said = struct.pack("<Q", len(text) if said is None else said)
        (checkpoint / WEIGHTS).write_bytes(said + text + data)
        check_checkpoint(checkpoint)

    on_any()


def test_weights_whose_tensors_overlap(checkpoint):
    original = (checkpoint / WEIGHTS).read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, numbers = json.loads(original[8 : 8 + length]), original[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    ends = st.integers(0, len(numbers) + 8)

    @fuzzed(500)
    @given(st.dictionaries(st.sampled_from(names), st.tuples(ends, ends), min_size=1))
    def on_any(offsets):
        moved = {name: {**header[name], "data_offsets": list(at)} for name, at in offsets.items()}
        text = json.dumps(header | moved).encode()
        (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + numbers)
        check_checkpoint(checkpoint)

    on_any()


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_with_other_values(sharded, name):
    content = json.loads((sharded / name).read_text())

    @fuzzed(1000)
    @given(JSON_EDITS)
    def on_any(edits):
        (sharded / name).write_text(json.dumps(edited(content, edits)))
        check_checkpoint(sharded)

    on_any()


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_with_other_bytes(sharded, name):
    original = (sharded / name).read_bytes()

    @fuzzed(500)
    @given(BYTE_EDITS)
    def on_any(edits):
        (sharded / name).write_bytes(mangled(original, edits))
        check_checkpoint(sharded)

    on_any()


# --- tokenizers -----------------------------------------------------------------------------------

of_every_kind = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: type(t).__name__)


def check_tokenizer(directory):
    tokenizer = opens_or_refuses(load, directory)
    if tokenizer is None:
        return
    try:
        with little_memory():
            ids = tokenizer.encode(TEXT)
            tokenizer.decode(ids)
    except ValueError as error:  # a character that is in no token any more
        assert "\n" not in str(error)
    else:
        assert max(ids, default=0) < tokenizer.vocab_size


@of_every_kind
def test_tokenizers_with_other_values(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))

    @fuzzed(450)
    @given(JSON_EDITS)
    def on_any(edits):
        text = json.dumps(edited(content, edits))
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        check_tokenizer(tmp_path)

    on_any()


@of_every_kind
def test_tokenizers_with_other_bytes(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    original = (tmp_path / "tokenizer.json").read_bytes()

    @fuzzed(200)
    @given(BYTE_EDITS)
    def on_any(edits):
        (tmp_path / "tokenizer.json").write_bytes(mangled(original, edits))
        check_tokenizer(tmp_path)

    on_any()


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_gpt2s_two_files(tmp_path, name):
    TOKENIZERS[0].save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    original = (tmp_path / name).read_bytes()

    @fuzzed(200)
    @given(BYTE_EDITS)
    def on_any(edits):
        (tmp_path / name).write_bytes(mangled(original, edits))
        check_tokenizer(tmp_path)

    on_any()


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 5000, "1e999", '"\\ud800"'])
@pytest.mark.parametrize("name", ["config.json", INDEX, WEIGHTS, "tokenizer.json", "vocab.json"])
def test_json_that_is_hard_to_read(sharded, name, text):
    """Nested without end, a number of too many digits, half a character: alone, or as a value."""
    TOKENIZERS[0].save(sharded)
    if name == "vocab.json":
        (sharded / "tokenizer.json").unlink()
    for start, end in ("", ""), ('{"model_type": ', "}"), ('{"model": ', ', "weight_map": {}}'):
        raw = (start + text + end).encode()
        header = struct.pack("<Q", len(raw)) if name == WEIGHTS else b""
        (sharded / name).write_bytes(header + raw)
        open_it = load if name in ("tokenizer.json", "vocab.json") else load_model
        assert opens_or_refuses(open_it, sharded) is None


def test_the_limit_on_memory_is_one():
    with pytest.raises(MemoryError), little_memory() as used:
        np.zeros(used + HEADROOM, np.uint8)


@pytest.mark.parametrize("dtype", ["F\x0032", "F\x7f32", "\x1b[31mF32", "F\n32"])
def test_what_a_header_says_reaches_no_terminal_as_it_is(tmp_path, dtype):
    entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"transformer.wte.weight": entry}).encode()
    save_model(MODEL, tmp_path)
    raw = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / WEIGHTS).write_bytes(raw)
    assert opens_or_refuses(load_model, tmp_path) is None
