"""Corpora, token files, windows and batches: the numbers of the book, the laws, bad input."""

import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import random
from tinygrad_llm.checkpoint import save_checkpoint
from tinygrad_llm.data import (
    DataLoader,
    RandomBatches,
    Windows,
    embedded_corpus,
    files,
    open_tokens,
    read_corpus,
    train_val_split,
    write_tokens,
)

# Corpora


def test_embedded_corpus():
    text = embedded_corpus()
    assert text == embedded_corpus()
    assert 400_000 < len(text) < 700_000
    assert text.startswith('The "assert" statement\n\n')
    assert "****" not in text.splitlines()
    assert not text.startswith("\n") and text.endswith(".\n")


def test_read_corpus_keeps_the_text(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes("Zoë\r\n".encode())
    second.write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    assert read_corpus(first) == read_corpus(str(first)) == read_corpus([first]) == "Zoë\r\n"
    assert read_corpus([second, first]) == "with a byte order mark\n\nZoë\r\n"
    assert read_corpus([first, first], separator="<|endoftext|>") == "Zoë\r\n<|endoftext|>Zoë\r\n"


def test_read_corpus_bad_input(tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(FileNotFoundError, match=r"text\.txt does not exist"):
        read_corpus(path)
    with pytest.raises(ValueError, match="is a directory"):
        read_corpus(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        read_corpus([])
    for nothing in (b"", b" \n", b"\xef\xbb\xbf"):
        path.write_bytes(nothing)
        with pytest.raises(ValueError, match=r"text\.txt is empty"):
            read_corpus(path)
    for nothing in (None, 3):
        with pytest.raises(TypeError, match=f"path of a text file, or several, got .*{nothing}"):
            read_corpus(nothing)
    path.write_bytes("naïve Zoë".encode()[:-1])
    with pytest.raises(ValueError, match=r"offset 9: the file ends inside a character; if it was"):
        read_corpus(path)
    path.write_bytes("Zoë or not".encode("latin-1"))
    with pytest.raises(ValueError, match=r"byte offset 2: if it is text, convert it first"):
        read_corpus(path)
    path.write_bytes("Zoë".encode("latin-1"))  # could be either
    with pytest.raises(ValueError, match=r"byte offset 2: .* iconv -f LATIN1 -t UTF-8"):
        read_corpus(path)


@pytest.mark.parametrize("text", ["to be, or not", "быть или не быть", "生存 还是\n毁灭", "naïve"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE"])
def test_utf16_is_told_by_its_name(tmp_path, text, encoding):
    path = tmp_path / "text.txt"
    path.write_bytes((text * 100).encode(encoding))  # that of "UTF-16" begins with its mark
    with pytest.raises(ValueError, match=f"txt looks like {encoding}: .* iconv -f {encoding} -t"):
        read_corpus(path)


def test_a_stray_zero_byte_is_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"to be or not to be\n" * 10 + b"\0")
    assert read_corpus(path).endswith("\n\0")


# Files as a whole or not at all


@pytest.mark.parametrize("without_name", [files._without_name, lambda folder: None])
def test_atomic_write(tmp_path, monkeypatch, without_name):
    monkeypatch.setattr(files, "_without_name", without_name)  # not every system has such files
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.write_bytes(b"")
    for content in (b"first", b"second"):
        with files.atomic_write(path) as file:
            file.write(content[:2])
            assert not path.exists() or path.read_bytes() == b"first"
            file.write(content[2:])
        assert path.read_bytes() == content
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as file:
        file.write(b"third")
        raise ZeroDivisionError
    assert path.read_bytes() == b"second"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "plain"]
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "no" / "file"):
        pass
    nowhere = tmp_path / "no" / "file"
    with pytest.raises(
        FileNotFoundError, match=f"^{nowhere} cannot .* no folder {nowhere.parent}$"
    ):
        write_tokens(nowhere, [1])
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder: give the path of a fil"):
        write_tokens(tmp_path, [1])
    if os.path.isdir("/proc/self"):  # where nobody can make files
        with pytest.raises(OSError) as error, files.atomic_write("/proc/file"):
            pass
        assert error.value.filename == "/proc/file"  # the user's name, not that of our own file
    longest = tmp_path / ("日" * 85)  # 255 bytes
    with files.atomic_write(longest) as file:
        file.write(b"first")
    assert longest.read_bytes() == b"first"


def watch(monkeypatch):
    """The steps that decide what a power cut leaves, as they are made, in a list."""
    made = []

    def watched(name, step, describe):
        def run(*arguments, **options):
            made.append((name, describe(*arguments)))
            return step(*arguments, **options)

        monkeypatch.setattr(os, name, run)

    kind = {True: "folder", False: "file"}
    watched("fsync", os.fsync, lambda fd: kind[stat.S_ISDIR(os.fstat(fd).st_mode)])
    watched("replace", os.replace, lambda old, new: os.path.basename(new))
    watched("unlink", os.unlink, os.path.basename)
    return made


def without_temporary(made):
    return [(name, what) for name, what in made if not what.endswith(".tmp")]


ONE = [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]


@pytest.mark.parametrize("without_name", [files._without_name, lambda folder: None])
def test_bytes_are_on_the_disk_before_names_and_names_before_the_end(
    tmp_path, monkeypatch, without_name
):
    monkeypatch.setattr(files, "_without_name", without_name)
    made = watch(monkeypatch)
    write_tokens(tmp_path / "file", [1])
    assert without_temporary(made) == ONE
    made.clear()
    with files.together():
        for name in ("a", "b"):
            with files.atomic_write(tmp_path / name) as file:
                file.write(b"new")
        files.remove(tmp_path / "file")
        assert not (tmp_path / "a").exists() and (tmp_path / "file").exists()
    assert without_temporary(made) == [
        *[("fsync", "file")] * 2,
        *[("replace", "a"), ("fsync", "folder"), ("replace", "b"), ("fsync", "folder")],
        *[("unlink", "file"), ("fsync", "folder")],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_older_checkpoints_go_when_the_newer_one_is_on_the_disk(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    made = watch(monkeypatch)
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    name = "step-{:08}.safetensors".format
    assert without_temporary(made) == [
        *[("fsync", "file"), ("replace", name(3)), ("fsync", "folder")],
        *[("unlink", name(1)), ("unlink", name(2))],
    ]


def test_a_file_that_is_begun_holds_no_other_up(tmp_path):
    with files.atomic_write(tmp_path / "a"):
        write_tokens(tmp_path / "b", [1])
        assert (tmp_path / "b").exists() and not (tmp_path / "a").exists()


def test_files_that_come_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), files.together():
        with files.atomic_write(tmp_path / "a") as file:
            file.write(b"new")
        files.remove(tmp_path / "a")
        raise ZeroDivisionError
    with files.together():
        with suppress(ZeroDivisionError), files.atomic_write(tmp_path / "a") as file:
            raise ZeroDivisionError  # which leaves out this file alone
        with files.together(), files.atomic_write(tmp_path / "b") as file:
            file.write(b"new")
        assert not (tmp_path / "b").exists()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"old",
        "b": b"new",
    }


# Token files


@given(ids=st.lists(st.integers(0, 2**16 + 9) | st.integers(0, 2**32 - 1), min_size=1))
def test_token_file_round_trips(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    write_tokens(path, ids)
    tokens = open_tokens(path)
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable
    assert tokens.dtype == (np.uint16 if max(ids) < 2**16 else np.uint32)
    assert tokens.tolist() == ids
    assert [file.name for file in path.parent.iterdir()] == ["tokens.npy"]


def test_write_tokens_bad_input(tmp_path):
    path = tmp_path / "tokens.npy"
    write_tokens(path, [1, 2, 3])
    for bad, message in (([], "no token ids"), ([-1], "-1"), ([2**32], str(2**32))):
        with pytest.raises(ValueError, match=message):
            write_tokens(path, bad)
    with pytest.raises(TypeError, match="float64"):
        write_tokens(path, [0.5])
    with pytest.raises(TypeError, match="<U4"):
        write_tokens(path, ["text"])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        write_tokens(path, [[1, 2]])
    with pytest.raises(FileNotFoundError):
        write_tokens(tmp_path / "nowhere" / "tokens.npy", [1])
    assert open_tokens(path).tolist() == [1, 2, 3]  # a failed write changes nothing


def test_open_tokens_bad_input(tmp_path):
    path = tmp_path / "tokens.npy"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_tokens(path)
    write_tokens(path, range(1000))
    whole = path.read_bytes()
    for content in (b"", b"just text", whole[:50], whole[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokens\.npy is not a token file, or is truncated"):
            open_tokens(path)
    for array in (np.zeros(3), np.zeros((2, 2), np.uint16), np.zeros(3, np.int64)):
        np.save(path, array)
        with pytest.raises(ValueError, match="expected a one-dimensional"):
            open_tokens(path)
    np.savez(tmp_path / "archive.npz", tokens=np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match="archive of arrays"):
        open_tokens(tmp_path / "archive.npz")
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a token file"):
        open_tokens(path)
    with pytest.raises(ValueError, match="not a token file"):
        open_tokens(tmp_path)


@given(size=st.integers(2, 500), fraction=st.floats(0.01, 0.99), context=st.integers(1, 20))
def test_split_cuts_once(size, fraction, context):
    tokens = np.arange(size)
    try:
        train, val = train_val_split(tokens, fraction, context)
    except ValueError as error:
        assert f"one window needs {context + 1}" in str(error)
        val_size = size - int((1 - fraction) * size)
        assert min(val_size, size - val_size) < context + 1
    else:
        assert np.concatenate([train, val]).tolist() == tokens.tolist()
        assert abs(len(val) - fraction * size) <= 1
        assert min(len(train), len(val)) >= context + 1


def test_split_of_a_token_file_stays_in_the_file(tmp_path):
    write_tokens(tmp_path / "tokens.npy", range(100))
    train, val = train_val_split(open_tokens(tmp_path / "tokens.npy"))
    assert isinstance(train, np.memmap)
    assert (len(train), len(val)) == (90, 10)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_bad_fraction(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        train_val_split(range(10), fraction)


# Windows


@given(st.data())
def test_windows_are_shifted_by_one(data):
    max_length = data.draw(st.integers(1, 20))
    stride = data.draw(st.integers(1, 25))
    size = data.draw(st.integers(max_length + 1, 200))
    tokens = np.random.default_rng(0).integers(0, 2**16, size, dtype=np.uint16)
    windows = Windows(tokens, max_length, stride)
    starts = range(0, size - max_length, stride)
    assert len(windows) == len(starts)
    for start, (x, y) in zip(starts, windows, strict=True):
        assert x.dtype == y.dtype == np.int64
        assert x.tolist() == tokens[start : start + max_length].tolist()
        assert y.tolist() == tokens[start + 1 : start + 1 + max_length].tolist()
    indices = data.draw(st.lists(st.integers(-len(windows), len(windows) - 1)))
    x, y = windows.batch(indices)
    assert x.shape == y.shape == (len(indices), max_length)
    for row, index in enumerate(indices):
        assert x[row].tolist() == windows[index][0].tolist()
        assert y[row].tolist() == windows[index][1].tolist()


def test_batches_are_copies():
    tokens = np.arange(10)
    x, y = Windows(tokens, 4, 4).batch([0])
    x[:] = -1
    assert tokens.tolist() == list(range(10))
    assert y.tolist() == [[1, 2, 3, 4]]


def test_windows_bad_input():
    for max_length, stride, message in ((0, 1, "max_length"), (1, 0, "stride"), (1, -2, "stride")):
        with pytest.raises(ValueError, match=f"{message} must be at least 1"):
            Windows(range(10), max_length, stride)
    with pytest.raises(ValueError, match="need 11 tokens, but there are only 10"):
        Windows(range(10), 10, 1)
    with pytest.raises(TypeError, match=r"max_length must be an integer, got 2\.0"):
        Windows(range(10), 2.0, 1)
    for text in ("abcd", b"abcd"):
        with pytest.raises(TypeError, match=r"got a text: give tokenizer\.encode\(text\)"):
            Windows(text, 2, 1)
    with pytest.raises(TypeError, match="encode the text first"):
        Windows(list("text"), 1, 1)
    windows = Windows(range(10), 4, 1)
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"no window {index}: there are 6"):
            windows[index]
        with pytest.raises(IndexError, match=f"no window {index}: there are 6"):
            windows.batch([0, index])


# Batches


@given(
    context=st.integers(1, 10),
    extra=st.integers(1, 30),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_random_batches(context, extra, batch_size, seed):
    tokens = np.arange(context + extra, dtype=np.uint16)
    first = RandomBatches(tokens, batch_size, context, np.random.default_rng(seed))
    again = RandomBatches(tokens, batch_size, context, np.random.default_rng(seed))
    for (x, y), (x_again, y_again), _ in zip(first, again, range(3)):
        assert x.shape == y.shape == (batch_size, context)
        assert x.dtype == y.dtype == np.int64
        assert (y == x + 1).all()  # the tokens count up
        assert (x == x_again).all() and (y == y_again).all()


def test_random_batches_reach_every_start():
    x, _ = next(RandomBatches(range(7), 200, 4, np.random.default_rng(0)))
    assert set(x[:, 0].tolist()) == {0, 1, 2}


def test_batches_bad_input():
    rng = np.random.default_rng(0)
    for wrong in (7, "0", np.random.RandomState):
        with pytest.raises(
            TypeError, match=r"is a tinygrad_llm\.random\.Generator or one of NumPy"
        ):
            RandomBatches(range(10), 1, 1, wrong)
    assert RandomBatches(range(10), 1, 1, None).rng is random.default_generator
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        RandomBatches(range(10), 0, 1, rng)
    with pytest.raises(ValueError, match="context must be at least 1"):
        RandomBatches(range(10), 1, 0, rng)
    with pytest.raises(ValueError, match="need 11 tokens, but there are only 10"):
        RandomBatches(range(10), 1, 10, rng)


# The book's numbers: "The Verdict" in GPT-2's tokens

FIRST_50 = [
    *[40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138, 257, 7026, 15632, 438, 2016, 257],
    *[922, 5891, 1576, 438, 568, 340, 373, 645, 1049, 5975, 284, 502, 284, 3285, 326, 11],
    *[287, 262, 6001, 286, 465, 13476, 11, 339, 550, 5710, 465, 12036, 11, 6405, 257, 5527],
    *[27075, 11],
]


@pytest.fixture(scope="module")
def verdict() -> np.ndarray:
    folder = os.environ.get("TINYGRAD_LLM_DATA")
    if not folder or not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("set TINYGRAD_LLM_DATA (the-verdict.txt) and TIKTOKEN_CACHE_DIR (gpt2)")
    text = read_corpus(Path(folder) / "the-verdict.txt")
    return np.array(tiktoken.get_encoding("gpt2").encode(text))


def test_verdict_tokens(verdict):
    assert len(verdict) == 5145
    assert verdict[:50].tolist() == FIRST_50
    x, y = Windows(verdict[50:], 4, 1)[0]
    assert x.tolist() == [290, 4920, 2241, 287]
    assert y.tolist() == [4920, 2241, 287, 257]
    decode = tiktoken.get_encoding("gpt2").decode
    assert (decode(x), decode(y[-1:])) == (" and established himself in", " a")


@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (2, 2), (8, 2)])
def test_verdict_first_batches(verdict, max_length, stride):
    x, y = next(iter(DataLoader(Windows(verdict, max_length, stride), batch_size=8)))
    starts = [i * stride for i in range(8)]
    assert x.tolist() == [FIRST_50[start : start + max_length] for start in starts]
    assert y.tolist() == [FIRST_50[start + 1 : start + 1 + max_length] for start in starts]


def test_verdict_printed_batch(verdict):
    x, y = next(iter(DataLoader(Windows(verdict, max_length=4, stride=4), batch_size=8)))
    assert x.tolist() == [
        [40, 367, 2885, 1464],
        [1807, 3619, 402, 271],
        [10899, 2138, 257, 7026],
        [15632, 438, 2016, 257],
        [922, 5891, 1576, 438],
        [568, 340, 373, 645],
        [1049, 5975, 284, 502],
        [284, 3285, 326, 11],
    ]
    assert y[0].tolist() == [367, 2885, 1464, 1807]


def test_lorem_example():
    words = ["Lorem", "ipsum", "dolor", "sit", "amet,", "consectetur", "adipiscing", "elit"]
    assert len(Windows(range(len(words)), max_length=4, stride=1)) == 4
    # Stride 2 gives two windows: a third would have no target for its last input.
    assert [x.tolist() for x, _ in Windows(range(8), 4, 2)] == [[0, 1, 2, 3], [2, 3, 4, 5]]
