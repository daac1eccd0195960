"""`tinygrad-llm data` as users run it: real processes, every wrong input."""

import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from test_cli import ENVIRONMENT, assert_refused, call, on_a_terminal, run, start, wait_for

from tinygrad_llm.data import open_tokens
from tinygrad_llm.tokenizer import (
    BPETokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
    load,
)

END = "<|endoftext|>"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two texts and a tokenizer, and a folder of corpora with a wrong and no other file."""
    folder = tmp_path_factory.mktemp("data")
    text = "to be or not to be, that is the question\n" * 50
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text("Größe 日本語 🙂\n")
    BPETokenizer.train(text, 280).save(folder / "tokenizer")
    (folder / "corpora").mkdir()
    (folder / "corpora" / "the-verdict.txt").write_text("something else")
    return folder


def test_prepare(folder, tmp_path):
    out = tmp_path / "tokens.npy"
    texts = folder / "a.txt", folder / "b.txt"
    done = run("data", "prepare", *texts, "--out", out, "--tokenizer", folder / "tokenizer")
    assert done.returncode == 0 and done.stderr == ""
    tokenizer = BPETokenizer.load(folder / "tokenizer")
    text = END.join(path.read_text() for path in texts)
    tokens = open_tokens(out)
    assert tokens.tolist() == tokenizer.encode(text, allowed_special="all")
    assert f"are {len(tokens):,} tokens, of a vocabulary of 280: {out}" in done.stdout
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in texts]
    both = hashlib.sha256(b"".join(hashes)).hexdigest()
    assert f"SHA-256 of the 2 texts' SHA-256 hashes: {both}" in done.stdout

    quiet = tmp_path / "quiet.npy"
    arguments = ["--out", quiet, "--tokenizer", folder / "tokenizer", "--quiet"]
    done = run("data", "prepare", *texts, *arguments)
    assert (done.stdout, done.stderr) == (f"{quiet}\n", "")
    assert quiet.read_bytes() == out.read_bytes()


TRAINED = {
    "words": lambda text: WordTokenizer.train(text),
    "wordpiece": lambda text: WordPieceTokenizer.train(text, 60),
    "unigram": lambda text: UnigramTokenizer.train(text, 300, prefix_space=True),
}


@pytest.mark.parametrize("train", TRAINED.values(), ids=TRAINED)
def test_prepare_with_every_tokenizer(tmp_path, train):
    """The text is longer than a block, and nearly all places where it might be cut are lines'."""
    text = ("to\nbe\nor\nnot\n" * 25 + "that is") * 4000
    (tmp_path / "a.txt").write_text(text)
    train(text[:1000]).save(tmp_path / "tokenizer")
    arguments = "--out", tmp_path / "t.npy", "--tokenizer", tmp_path / "tokenizer"
    done = run("data", "prepare", tmp_path / "a.txt", *arguments)
    assert done.returncode == 0, done.stderr
    expected = load(tmp_path / "tokenizer").encode_array(text)
    assert np.array_equal(open_tokens(tmp_path / "t.npy"), expected)


def test_prepare_shows_a_bar_on_a_terminal(folder, tmp_path):
    arguments = "--out", tmp_path / "t.npy", "--tokenizer", folder / "tokenizer"
    code, shown = on_a_terminal("data", "prepare", folder / "a.txt", *arguments)
    assert code == 0 and b"encoding" in shown and b"MB" in shown


def test_gpt2s_tokens_of_a_named_corpus(tmp_path):
    if not os.environ.get("TINYGRAD_LLM_DATA") or not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("set TINYGRAD_LLM_DATA (the-verdict.txt) and TIKTOKEN_CACHE_DIR (gpt2)")
    out = tmp_path / "tokens.npy"
    done = run("data", "prepare", "the-verdict", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "encoding 20,479 bytes\nthey are 5,145 tokens" in done.stdout
    assert np.load(out)[:4].tolist() == [40, 367, 2885, 1464]
    done = run("data", "get", "the-verdict")
    assert done.stdout.endswith("the-verdict.txt\n") and done.returncode == 0


def test_list(folder, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "TINYGRAD_LLM_DATA", str(folder / "corpora"))
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(folder / "no cache"))
    done = run("data", "list")
    assert done.returncode == 0 and done.stderr == ""
    for name in ("the-verdict", "tiny-shakespeare", "sms-spam", "instruction-data"):
        assert f"\n{name} " in "\n" + done.stdout
    wrong = folder / "corpora" / "the-verdict.txt"
    assert f" {wrong} is not the file expected: its SHA-256 is" in done.stdout
    assert "data get sms-spam" in done.stdout
    assert len(done.stdout.splitlines()) == 10  # each fact is one line


def test_list_shows_what_is_right(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "TINYGRAD_LLM_DATA", str(tmp_path))
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "no cache"))
    here = os.environ.get("TINYGRAD_LLM_DATA")
    if not here:
        pytest.skip("set TINYGRAD_LLM_DATA (the-verdict.txt)")
    (tmp_path / "the-verdict.txt").write_bytes((Path(here) / "the-verdict.txt").read_bytes())
    (tmp_path / "tinyshakespeare.txt").mkdir()
    done = run("data", "list")
    assert f" {tmp_path / 'the-verdict.txt'}\n" in done.stdout
    assert f" {tmp_path / 'tinyshakespeare.txt'}: Is a directory; give a path" in done.stdout
    monkeypatch.setitem(ENVIRONMENT, "TINYGRAD_LLM_DATA", str(tmp_path / "none"))
    assert_refused(run("data", "list"), "TINYGRAD_LLM_DATA names no folder")
    assert_refused(run("data", "get", "the-verdict"), "TINYGRAD_LLM_DATA names no folder")


def test_bad_input(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "TINYGRAD_LLM_DATA", str(folder / "corpora"))
    out, text = tmp_path / "tokens.npy", folder / "a.txt"
    ours = ["--out", out, "--tokenizer", folder / "tokenizer"]
    assert_refused(call("data", "get", "verdict"), "there is no corpus 'verdict'")
    assert_refused(call("data", "get", "the-verdict"), "is not the file expected")
    assert_refused(call("data"), "see tinygrad-llm data --help")
    assert_refused(call("data", "prepare", text), "see tinygrad-llm data prepare --help")
    assert_refused(call("data", "prepare", tmp_path / "no.txt", *ours), "no.txt does not exist")
    wrong = ["--out", out, "--tokenizer", tmp_path / "none"]
    assert_refused(call("data", "prepare", text, *wrong), "is no directory with a tokenizer")
    wrong[-1] = tmp_path  # without a tokenizer in it
    assert_refused(call("data", "prepare", text, *wrong), "is no directory with a tokenizer")
    wrong[-1] = tmp_path / "words"
    WordTokenizer.train("to be", (), None).save(wrong[-1])
    assert_refused(call("data", "prepare", text, *wrong), "a.txt: 'or' is not in the vocabulary")
    nowhere = ["--out", tmp_path / "no" / "t.npy", "--tokenizer", folder / "tokenizer"]
    assert_refused(call("data", "prepare", text, *nowhere), "there is no folder")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert_refused(call("data", "prepare", tmp_path / "binary", *ours), "looks like UTF-16: if it")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(call("data", "prepare", tmp_path / "pipe", *ours), "is a pipe or device")
    assert_refused(call("data", "prepare", text, "--out", ""), "--out names no file: give the path")
    assert not out.exists()
    out.symlink_to(tmp_path / "nowhere")
    assert_refused(call("data", "prepare", text, *ours), "exists, and would be lost")
    out.unlink()
    out.write_bytes(b"mine")
    assert_refused(call("data", "prepare", text, *ours), "exists, and would be lost")
    assert out.read_bytes() == b"mine"


def test_no_network(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setitem(ENVIRONMENT, name, "http://127.0.0.1:9")
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ENVIRONMENT, "TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setitem(ENVIRONMENT, "TINYGRAD_LLM_DATA", str(tmp_path))
    assert_refused(
        run("data", "get", "sms-spam"), "check the network, or put sms-spam-collection.tsv into"
    )
    (tmp_path / "a.txt").write_text("to be")
    done = run("data", "prepare", tmp_path / "a.txt", "--out", tmp_path / "t.npy")
    assert_refused(done, "no vocabulary of GPT-2: tiktoken could not download it")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing(folder, tmp_path, number):
    text = b"".join(b"to be or not %d\n" % i for i in range(10**6))
    (tmp_path / "a.txt").write_bytes(text)
    arguments = ["--out", tmp_path / "t.npy", "--tokenizer", folder / "tokenizer"]
    process = start("data", "prepare", tmp_path / "a.txt", *arguments)
    wait_for(process, "encoding")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    said = (130, f"stopped; {tmp_path / 't.npy'} was not written\n")
    assert (process.returncode, errors) == (said if number == signal.SIGINT else (-number, ""))
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}
    assert (tmp_path / "a.txt").read_bytes() == text
