"""Preparing a corpus block by block: the same ids, little memory, all of the file or none of it."""

import os
import signal
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data import (
    corpus_hash,
    encode_files,
    open_tokens,
    read_blocks,
    read_corpus,
    streaming,
)
from tinygrad_llm.tokenizer import BPETokenizer, UnigramTokenizer, WordTokenizer
from tinygrad_llm.tokenizer.bpe import WORD
from tinygrad_llm.tokenizer.unigram import BYTES

END = "<|endoftext|>"
SPACED = "<|two words\nand lines|>"
TEXT = "Größe 日本語 🙂🙃 naïve café's; it's 1 of 22 \n\n  to be,\r\nor not \tto be. x_ y\n" * 40
TOKENIZER = BPETokenizer.train(TEXT, 330, (END, SPACED))


def encode(text):
    return TOKENIZER.encode_array(text, allowed_special="all")


def prepare(paths, out, **options):
    options = {"special_tokens": TOKENIZER.special_tokens, **options}
    return encode_files(paths, out, encode, TOKENIZER.vocab_size, **options)


SIGNS = [*"abA19 _.;/'\n\t\r日🙂é²\u00a0\u2003\x1c\u0301", "  ", " \n", "\n\n", ";\n/"]
pieces = st.sampled_from([*SIGNS, "word ", " word", "'s", END, SPACED])


@given(
    texts=st.lists(st.lists(pieces, max_size=60).map("".join), min_size=1, max_size=3),
    block=st.integers(1, 40),
    separator=st.sampled_from(["\n\n", END, ""]),
)
def test_ids_are_those_of_the_whole_text(tmp_path_factory, texts, block, separator):
    folder = tmp_path_factory.mktemp("corpus")
    paths = [folder / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_bytes(("x" + text).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", block)
        count = prepare(paths, folder / "tokens.npy", separator=separator)
    expected = encode(read_corpus(paths, separator))
    assert open_tokens(folder / "tokens.npy").tolist() == expected.tolist()
    assert count == len(expected)
    assert sorted(path.name for path in folder.iterdir())[-1] == "tokens.npy"
    assert len(list(folder.iterdir())) == len(texts) + 1


SPLITTERS = {
    "gpt2": WORD,
    "gpt4": regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "o200k": regex.compile(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "words": regex.compile(r"\w+|[^\w\s]"),
}


@pytest.mark.parametrize("splitter", SPLITTERS.values(), ids=SPLITTERS)
@given(text=st.lists(pieces, max_size=60).map("".join), block=st.integers(1, 40))
def test_no_word_of_any_tokenizer_is_cut(tmp_path_factory, splitter, text, block):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_bytes(("x" + text).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", block)
        blocks = [text for text, *_ in streaming._blocks([path], "", [], streaming.WORD_END)]
    assert "".join(blocks) == "x" + text
    words = [word for block in blocks for word in splitter.findall(block)]
    assert words == splitter.findall("x" + text)


def test_o200ks_ids_of_comments(tmp_path, monkeypatch):
    """Its words go on from the end of a line to the "/" of the next."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"\n/": 256, b";\n/": 257}
    o200k = tiktoken.Encoding(
        "o200k", pat_str=SPLITTERS["o200k"].pattern, mergeable_ranks=ranks, special_tokens={}
    )
    text = "x = 1;\n// c\ny = 2;\n// d\n"
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(streaming, "BLOCK", 8)
    encode_files(tmp_path / "a.txt", tmp_path / "t.npy", o200k.encode, o200k.n_vocab)
    expected = o200k.encode(text)
    assert expected.count(257) == 2
    assert open_tokens(tmp_path / "t.npy").tolist() == expected


@pytest.mark.parametrize("prefix_space", [False, True])
@pytest.mark.parametrize("byte_fallback", [False, True])
@given(text=st.lists(pieces, max_size=60).map("".join), block=st.integers(1, 40))
def test_ids_of_unigram(tmp_path_factory, prefix_space, byte_fallback, text, block):
    """Its words go on across lines: here with pieces, and with unknown signs that are one token."""
    log_probs = {x: -2.0 - i for i, x in enumerate("ab19▁_.")}
    log_probs |= {"▁a": -1.5, "a\nb": -3.0, "\n\n": -4.0, "b\n": -3.5, "▁▁": -2.5}
    log_probs |= dict.fromkeys(BYTES if byte_fallback else [], -9.0)
    ids = {x: i for i, x in enumerate(log_probs, start=3)}
    special = {"<unk>": 0, END: 1, SPACED: 2}
    unigram = UnigramTokenizer(log_probs, ids, special, byte_fallback, prefix_space)
    encode = partial(unigram.encode, allowed_special="all")
    path, out = (tmp_path_factory.mktemp("corpus") / name for name in ("a.txt", "t.npy"))
    path.write_bytes(("x" + text).encode())
    options = {"special_tokens": special, "word_end": streaming.BEFORE_SPACE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK", block)
        encode_files(path, out, encode, unigram.vocab_size, **options)
    assert open_tokens(out).tolist() == encode("x" + text)


def test_gpt2s_ids_of_tiny_shakespeare(tmp_path, monkeypatch):
    folder = os.environ.get("TINYGRAD_LLM_DATA")
    if not folder or not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("set TINYGRAD_LLM_DATA (tinyshakespeare.txt) and TIKTOKEN_CACHE_DIR (gpt2)")
    gpt2 = tiktoken.get_encoding("gpt2")
    path = Path(folder) / "tinyshakespeare.txt"
    monkeypatch.setattr(streaming, "BLOCK", 10_007)
    calls = []
    count = encode_files(
        path, tmp_path / "t.npy", gpt2.encode, gpt2.n_vocab, progress=lambda *c: calls.append(c)
    )
    tokens = open_tokens(tmp_path / "t.npy")
    assert count == len(tokens) == 338_025 and tokens.dtype == np.uint16
    assert tokens.tolist() == gpt2.encode(read_corpus(path))
    size = path.stat().st_size
    assert len(calls) > 100 and calls == sorted(calls) and calls[-1] == (size, size)


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    (tmp_path / "a.txt").write_text("some words")
    encode_files(tmp_path / "a.txt", tmp_path / "t.npy", lambda _: [vocab_size - 1], vocab_size)
    assert open_tokens(tmp_path / "t.npy").dtype == dtype


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 1 << 14)
    most = []
    for size in (200_000, 3_200_000):
        (tmp_path / "a.txt").write_bytes(b"to be or not to be\n" * (size // 19))
        tracemalloc.start()
        encode_files(tmp_path / "a.txt", tmp_path / "t.npy", lambda t: list(t.encode()), 256)
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] < 1.2 * most[0]


SLOW = """
import sys, time
from tinygrad_llm.data import encode_files, streaming
streaming.BLOCK = 1 << 10
def encode(text):
    time.sleep(0.01)
    return list(text.encode())
def progress(done, total):
    print(done, flush=True)
encode_files(sys.argv[1], sys.argv[2], encode, 256, progress=progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("before", [None, b"an earlier file"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_nothing_of_its_own(tmp_path, number, before):
    text, out = tmp_path / "a.txt", tmp_path / "tokens.npy"
    text.write_bytes(b"to be or not to be\n" * 50_000)
    if before:
        out.write_bytes(before)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, text, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(5):  # it has written some
        assert int(process.stdout.readline()) < text.stat().st_size
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert (out.read_bytes() if out.exists() else None) == before
    assert {path.name for path in tmp_path.iterdir()} - {"tokens.npy"} == {"a.txt"}


def test_a_failure_leaves_what_was_there(tmp_path):
    text, out = tmp_path / "a.txt", tmp_path / "tokens.npy"
    text.write_text("to be or not to be")
    prepare(text, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"a\.txt: token ids are 0..9, but vocab_size is 9: give"):
        encode_files(text, out, lambda _: [0, 9], 9)
    with pytest.raises(ValueError, match="gives no tokens"):
        encode_files(text, out, lambda _: [], 9)
    with pytest.raises(TypeError, match="encode the text first"):
        encode_files(text, out, lambda text: list(text), 9)
    (tmp_path / "b.txt").write_bytes(b"good words " * 10 + b"\xff")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 at byte offset 110: .* LATIN1"):
        prepare([text, tmp_path / "b.txt"], out)
    (tmp_path / "c.txt").write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"c\.txt is empty, or white space alone"):
        prepare(tmp_path / "c.txt", out)
    words = WordTokenizer.train("to be or not", (), None)  # has no unknown token
    (tmp_path / "e.txt").write_bytes(b"to bee")
    with pytest.raises(ValueError, match=r"^reading .*e\.txt: 'bee' is not in the vocabulary"):
        encode_files([text, tmp_path / "e.txt"], out, words.encode, words.vocab_size)
    with pytest.raises(ValueError, match=r"tokens\.npy is one of the texts, and would be lost"):
        prepare([text, out], out)
    assert out.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"d\.txt does not exist"):
        prepare([text, tmp_path / "d.txt"], out)
    with pytest.raises(ValueError, match="at least one"):
        prepare([], out)
    with pytest.raises(FileNotFoundError):
        prepare(text, tmp_path / "nowhere" / "tokens.npy")


# Reading in blocks


no_zeros = st.text(st.characters(exclude_characters="\0", codec="utf-8"))  # they are UTF-16's


@given(text=no_zeros, mark=st.booleans(), size=st.integers(1, 9))
def test_blocks_are_the_text(tmp_path_factory, text, mark, size):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + ("x" + text).encode())
    assert "".join(read_blocks(path, size)) == "x" + text


@given(data=st.binary(min_size=1, max_size=30).filter(all), size=st.integers(1, 9))
def test_the_place_of_a_wrong_byte(tmp_path_factory, data, size):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"x" + data)
    try:
        (b"x" + data).decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"not UTF-8 at byte offset {error.start}:"):
            list(read_blocks(path, size))
    else:
        assert "".join(read_blocks(path, size)).encode() == b"x" + data


# Hash


def test_corpus_hash(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"abc")
    second.write_bytes(b"")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert corpus_hash(first) == corpus_hash([first]) == known
    both = corpus_hash([first, second])
    first.write_bytes(b"ab")
    second.write_bytes(b"c")
    assert len({known, both, corpus_hash([first, second]), corpus_hash([second, first])}) == 4
    with pytest.raises(FileNotFoundError, match=r"c\.txt does not exist"):
        corpus_hash(tmp_path / "c.txt")
    with pytest.raises(ValueError, match="is a directory"):
        corpus_hash(tmp_path)
    folder = os.environ.get("TINYGRAD_LLM_DATA")
    if folder:
        hashed = corpus_hash(Path(folder) / "the-verdict.txt")
        assert hashed.startswith("b41e41a68f0398a3")
