"""The byte-level BPE tokenizer: nothing is lost, and others who do the same get the same ids.

Others are a naive trainer in this file, tiktoken, and Hugging Face's tokenizers and transformers.
"""

import copy
import json
import os
import pickle
import re
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import data_file, verdict

from tinygrad_llm import Tensor
from tinygrad_llm.data import embedded_corpus
from tinygrad_llm.tokenizer import (
    BPETokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    Tokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
    load,
)
from tinygrad_llm.tokenizer import (
    gpt2 as gpt2_of_tiktoken,
)
from tinygrad_llm.tokenizer.bpe import WORD, _finder
from tinygrad_llm.tokenizer.bpe_files import byte_to_printable, printable
from tinygrad_llm.tokenizer.bpe_train import learn_merges, merge_pair
from tinygrad_llm.tokenizer.tiktoken_bpe import GPT2_WORDS

END = "<|endoftext|>"
CORPUS = embedded_corpus()
TRAINED = BPETokenizer.train(CORPUS, 700, special_tokens=[END, "<|user|>"])

# Any characters, but also many that meet in real text, so that merges happen.
ANY_TEXT = st.text() | st.text(st.sampled_from("aeinst  \n'1é.")) | st.text("ab ", min_size=20)
# Libraries know different Unicode versions: compare on characters that Python already knows.
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "e", "he", " ", "1"]
KNOWN_TEXT = (
    st.text(st.characters(exclude_categories=["Cs", "Cn"]))
    | st.text("aeinst  \n'1é.")
    | st.lists(st.sampled_from(CONTRACTIONS)).map("".join)
)
WITH_SPECIAL = st.lists(KNOWN_TEXT | st.sampled_from([END, "<|user|>"])).map("".join)


@pytest.fixture(scope="module")
def gpt2() -> BPETokenizer:
    return BPETokenizer.from_files(
        data_file("gpt2-bpe/encoder.json"), data_file("gpt2-bpe/vocab.bpe")
    )


# Laws


@given(ANY_TEXT)
def test_any_text_round_trips(text):
    ids = TRAINED.encode_ordinary(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.encode_bytes(text.encode()) == ids


@given(st.binary() | st.text().map(str.encode).map(lambda data: data[1:]))
def test_any_bytes_round_trip(data):
    ids = TRAINED.encode_bytes(data)
    assert TRAINED.decode_bytes(ids) == data
    assert TRAINED.decode(ids) == data.decode("utf-8", "replace")


@given(WITH_SPECIAL)
def test_special_tokens_round_trip(text):
    ids = TRAINED.encode(text, allowed_special="all")
    assert TRAINED.decode(ids) == text
    assert ids.count(TRAINED.end_of_text) == text.count(END)
    assert TRAINED.decode(TRAINED.encode_ordinary(text)) == text


ALL_CHARACTERS = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
FAST = TiktokenTokenizer(TRAINED.to_tiktoken())


@given(ANY_TEXT | WITH_SPECIAL)
def test_our_loop_equals_tiktoken(text):
    ids = TRAINED.encode(text, allowed_special="all")
    array = TRAINED.encode_array(text, allowed_special="all")
    assert array.dtype == np.uint16
    assert array.tolist() == ids


@given(KNOWN_TEXT | WITH_SPECIAL)
def test_through_tiktoken(text):
    ids = TRAINED.encode(text, allowed_special="all")
    assert FAST.encode(text, allowed_special="all") == ids
    assert FAST.encode_array(text, allowed_special="all").tolist() == ids
    assert FAST.encoding.encode(text, allowed_special="all") == ids
    assert FAST.encode_ordinary(text) == TRAINED.encode_ordinary(text)
    assert FAST.decode(ids) == text


def test_characters_that_tiktoken_does_not_know():
    """`regex` may know newer letters: a word with one goes through our own loop."""
    known = set(bytes(_finder(r"\p{L}").encode_ordinary(ALL_CHARACTERS)).decode())
    letters = [c for c in regex.findall(r"\p{L}", ALL_CHARACTERS) if c not in known]
    if not letters:
        pytest.skip("regex and tiktoken know the same letters")
    new = letters[-1]
    trained = BPETokenizer.train(f"a{new}b " * 5, 300)
    ids = [trained.token_to_id(f"a{new}b")]
    assert trained.encode(f"a{new}b") == trained.encode_array(f"a{new}b").tolist() == ids
    assert trained.to_tiktoken().encode(f"a{new}b") != ids
    text = f"é the {new}\n{letters[0]}\u2028" * 3
    assert trained.encode_array(text).tolist() == trained.encode(text)


def test_to_tiktoken_and_back(tmp_path):
    assert same(FAST.to_bpe(), TRAINED)
    FAST.save(tmp_path)
    loaded = TiktokenTokenizer.load(tmp_path)
    assert loaded.special_tokens == TRAINED.special_tokens
    assert loaded.encode(CORPUS[:1000]) == TRAINED.encode(CORPUS[:1000])
    assert FAST.token_to_id(" the") == TRAINED.token_to_id(b" the")
    with pytest.raises(ValueError, match="not made by merges"):
        TiktokenTokenizer(
            tiktoken.Encoding(
                "bad",
                pat_str=".+",
                mergeable_ranks={bytes([i]): i for i in range(256)} | {b"abcd": 256},
                special_tokens={},
            )
        ).to_bpe()


@pytest.mark.parametrize("pattern", [r"[\s\S]", ".+", WORD.pattern + "|x"])
def test_words_that_files_cannot_say(tmp_path, pattern):
    ranks, special = FAST.encoding._mergeable_ranks, FAST.special_tokens
    other = tiktoken.Encoding("my", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    with pytest.raises(ValueError, match="'my' cuts text into other words than GPT-2") as caught:
        TiktokenTokenizer(other).save(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", sorted(GPT2_WORDS))
def test_words_that_files_say(tmp_path_factory, pattern):
    """However they are written."""
    ranks, special = FAST.encoding._mergeable_ranks, FAST.special_tokens
    ours = tiktoken.Encoding("my", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    folder = tmp_path_factory.mktemp("same")
    TiktokenTokenizer(ours).save(folder)
    loaded = load(folder)

    @given(KNOWN_TEXT | st.text(" \n\ta1.é'strevmld"))
    def on_any_text(text):
        assert loaded.encode(text) == ours.encode(text)

    on_any_text()


@pytest.mark.parametrize("text", [" " * 400_000 + "a", "\n" * 1000, "the" * 3000, "é" * 1000])
def test_very_long_words(text):
    ids = TRAINED.encode(text)
    assert TRAINED.encode_array(text).tolist() == ids
    assert TRAINED.decode(ids) == text


@given(st.binary() | ANY_TEXT.map(str.encode))
def test_stream_equals_decode(data):
    ids = TRAINED.encode_bytes(data)
    stream = StreamDecoder(TRAINED)
    pieces = [stream.feed(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(pieces) == TRAINED.decode(ids)
    assert stream.finish() == ""


def test_an_encoding_that_leaves_ids_out():
    """cl100k_base is one: the last id counts, not how many there are."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "holes", pat_str=".+", mergeable_ranks=ranks, special_tokens={END: 259}
    )
    tokenizer = TiktokenTokenizer(encoding)
    assert tokenizer.vocab_size == 260
    assert tokenizer.add_tokens(["<new>"]) == [260]
    assert tokenizer.encode(f"<new>a{END}", allowed_special="all") == [260, 97, 259]
    with pytest.raises(
        IndexError, match=r"id 258 .* has 258 of the ids 0\.\.260, and not this one"
    ):
        tokenizer.decode([258])


def test_stream_waits_for_the_whole_character():
    stream = StreamDecoder(TRAINED)
    ids = TRAINED.encode("é😀")
    assert [stream.feed(token_id) for token_id in ids] == ["", "é", "", "", "", "😀"]
    assert stream.feed(ids[0]) == ""
    assert stream.finish() == "\ufffd"


# Training


def naive_merges(words: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Counts every pair anew for every merge. Dictionaries keep the order of first appearance."""
    spellings = {word: [bytes([byte]) for byte in word] for word in words}
    appeared: dict = {}
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for word, count in words.items():
            for pair in pairwise(spellings[word]):
                appeared.setdefault(pair)
                counts[pair] += count
        if not counts:
            break
        merges.append(max(appeared, key=lambda pair: counts[pair]))  # the first of equals
        spellings = {word: merge_pair(parts, merges[-1]) for word, parts in spellings.items()}
    return merges


@given(st.dictionaries(st.text("abc", min_size=1).map(str.encode), st.integers(1, 5)))
def test_merges_equal_the_naive_trainer(words):
    assert learn_merges(words, 30) == naive_merges(words, 30)


def test_merges_equal_the_naive_trainer_on_real_text():
    words = Counter(word.encode() for word in WORD.findall(CORPUS[:50_000]))
    assert learn_merges(words, 100) == naive_merges(words, 100)


def test_merges_by_hand():
    trained = BPETokenizer.train("low low low lower", 300, special_tokens=[])
    # "lo" and "ow" are equally frequent: "lo" appeared first.
    assert trained.merges[:2] == [(b"l", b"o"), (b"lo", b"w")]
    assert trained.merges[2] == (b" ", b"low")
    assert trained.decode_bytes([256]) == b"lo"


def test_training_stops_when_nothing_is_left_to_merge():
    trained = BPETokenizer.train("abab", 1000)
    assert trained.merges == [(b"a", b"b"), (b"ab", b"ab")]
    assert trained.vocab_size == 256 + 2 + 1
    assert trained.encode("abab") == [257]


def test_progress_counts_merges():
    calls = []
    BPETokenizer.train("abcd", 259, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_special_tokens_are_boundaries_and_not_learned():
    joined = BPETokenizer.train(f"abc{END}abc", 400)
    assert joined.vocab_size == 256 + 2 + 1
    assert joined.encode(f"abc{END}abc", allowed_special="all") == [257, 258, 257]


def test_layout_of_ids():
    assert TRAINED.vocab_size == 700
    assert TRAINED.special_tokens == {END: 698, "<|user|>": 699}
    assert TRAINED.end_of_text == TRAINED.token_to_id(END) == 698
    assert TRAINED.token_to_id("!") == 0
    assert TRAINED.token_to_id(b"\n") == 198
    assert TRAINED.token_to_id(" the") == TRAINED.encode(" the")[0]


def test_printable_table():
    table = byte_to_printable()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
    assert printable(b" the\n") == "ĠtheĊ"


@settings(max_examples=30)
@given(KNOWN_TEXT.filter(bool), KNOWN_TEXT, st.integers(257, 300))
def test_training_on_any_text(text, other, vocab_size):
    trained = BPETokenizer.train(text, vocab_size)
    assert 257 <= trained.vocab_size <= vocab_size
    for each in (text, other):
        ids = trained.encode_ordinary(each)
        assert trained.decode(ids) == each
        assert trained.to_tiktoken().encode_ordinary(each) == ids
        assert trained.encode_array(each, disallowed_special=()).tolist() == ids


def test_copies_and_pickles():
    TRAINED.encode_array("filled caches")
    for other in (copy.deepcopy(TRAINED), pickle.loads(pickle.dumps(TRAINED))):
        assert other.encode("a new phrase") == TRAINED.encode("a new phrase")
        assert other.encode_array("a new phrase").tolist() == TRAINED.encode("a new phrase")


# The book's trainer (its bonus material), and how ours differs


BOOKS_TEXT = "Jack embraced beauty through art and life."
BOOKS_IDS = [74, 361, 310, 109, 98, 420, 397, 100, 300, 428, 116, 121, 519, 699, 299, 808, 534]
BOOKS_SIMPLE_IDS = [
    *[424, 256, 654, 531, 302, 311, 256, 296, 97, 465, 121, 595, 841, 116, 287, 466, 256, 326],
    *[972, 46],
]


def books_merges(words: dict[bytes, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Of equally frequent pairs, the first in the text as it is now; ours: the first there was."""
    spellings = {word: [bytes([byte]) for byte in word] for word in words}
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for word, count in words.items():
            for pair in pairwise(spellings[word]):
                counts[pair] += count
        merges.append(max(counts, key=counts.__getitem__))
        for word, parts in spellings.items():
            if merges[-1][0] in parts:
                spellings[word] = merge_pair(parts, merges[-1])
    return merges


def books_encode(word: bytes, ids: dict[bytes, int]) -> list[int]:
    """The word if it is a token; else neighbours are joined from left to right wherever they make
    a token, again and again. GPT-2, and we, join the pair that was learned first."""
    parts = [word] if word in ids else [bytes([byte]) for byte in word]
    while True:
        joined, i = [], 0
        while i < len(parts):
            step = 2 if i + 1 < len(parts) and parts[i] + parts[i + 1] in ids else 1
            joined.append(b"".join(parts[i : i + step]))
            i += step
        if joined == parts:
            return [ids[part] for part in parts]
        parts = joined


@pytest.mark.parametrize("variant", ["current", "simple"])
def test_the_books_trainer(variant):
    """Its tokens are 256 characters, the space as 256, <|endoftext|> as 257, and 742 merges; its
    words are cut at spaces and lines only. The simple variant cuts nowhere."""
    text = verdict().encode()
    cut = Counter(re.findall(rb" ?[^ \n]+|[ \n]", text))
    words, expected = (cut, BOOKS_IDS) if variant == "current" else ({text: 1}, BOOKS_SIMPLE_IDS)
    merges = books_merges(words, 742)
    ids = {bytes([byte]): byte for byte in range(256)} | {b" ": 256}
    ids |= {left + right: 258 + i for i, (left, right) in enumerate(merges)}
    assert len(ids) + 1 == 256 + 1 + 742
    found = re.findall(rb" ?[^ ]+", BOOKS_TEXT.encode())
    assert [i for word in found for i in books_encode(word, ids)] == expected


def test_ours_on_the_books_text():
    """1,000 tokens are one merge more here, as the space is a byte. Our words are GPT-2's."""
    trained = BPETokenizer.train(verdict(), 1000)
    assert len(trained.merges) == 1000 - 256 - 1
    ids = trained.encode(BOOKS_TEXT)
    assert [trained.decode([i]) for i in ids] == [
        *["J", "ack", " e", "m", "b", "r", "ac", "ed", " be", "a", "ut", "y", " through", " art"],
        *[" and", " life", "."],
    ]


def test_training_on_tiny_shakespeare_takes_seconds():
    text = data_file("tinyshakespeare.txt").read_text(encoding="utf-8")
    start = time.perf_counter()
    trained = BPETokenizer.train(text, 256 + 5000 + 1)
    assert time.perf_counter() - start < 60  # 2 on one quiet core
    assert len(trained.merges) == 5000


def test_playing_is_play_and_ing():
    trained = BPETokenizer.train("play played plays sing singing king ring", 272, [])
    assert [trained.decode([i]) for i in trained.encode("playing")] == ["play", "ing"]


# GPT-2's own vocabulary

KNOWN_IDS = {
    f"Hello, do you like tea? {END} In the sunlit terracesof someunknownPlace.": [
        *[15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114],
        *[1659, 617, 34680, 27271, 13],
    ],
    "Akwirw ier": [33901, 86, 343, 86, 220, 959],
    "Every effort moves you": [6109, 3626, 6100, 345],
    "Every day holds a": [6109, 1110, 6622, 257],
    "Hello, I am": [15496, 11, 314, 716],
    "Do you have time": [5211, 345, 423, 640],
    "This is some text": [1212, 318, 617, 2420],
    "Implementations": [3546, 26908, 602],
    "Hello, world. Is this-- a test?": [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30],
    "asdf asdfasdf a!!, @aba 9asdf90asdfk": [
        *[292, 7568, 355, 7568, 292, 7568, 257, 3228, 11, 2488, 15498, 860, 292, 7568, 3829],
        *[292, 7568, 74],
    ],
    "<|user|>": [27, 91, 7220, 91, 29],
    "\n": [198],
}


# The first 50 ids of the-verdict.txt
VERDICT = [
    *[40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138, 257, 7026, 15632, 438, 2016, 257],
    *[922, 5891, 1576, 438, 568, 340, 373, 645, 1049, 5975, 284, 502, 284, 3285, 326, 11, 287],
    *[262, 6001, 286, 465, 13476, 11, 339, 550, 5710, 465, 12036, 11, 6405, 257, 5527, 27075, 11],
]


@pytest.fixture(scope="module")
def through_tiktoken() -> TiktokenTokenizer:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("set TIKTOKEN_CACHE_DIR to a folder with tiktoken's files of gpt2")
    return gpt2_of_tiktoken()


@pytest.fixture(params=["gpt2", "through_tiktoken"])
def either(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", KNOWN_IDS)
def test_gpt2_known_ids(either, text):
    assert either.encode(text, allowed_special={END}) == KNOWN_IDS[text]
    assert either.decode(KNOWN_IDS[text]) == text


def test_gpt2_reads_the_verdict(either):
    ids = either.encode(verdict())
    assert len(ids) == 5145
    assert ids[:50] == VERDICT
    assert either.decode(ids) == verdict()


@pytest.mark.parametrize(
    "text",
    ["a\nb", "a\n\nb", "\nHello", "Hello\n", "a\r\nb", "Hello \nworld", "  Hello World."],
)
def test_gpt2_white_space(either, text):
    assert either.decode(either.encode(text)) == text


def test_gpt2_special_tokens(either):
    assert either.vocab_size == 50257
    assert either.special_tokens == {END: 50256}
    with pytest.raises(ValueError, match=r"pass allowed_special=\['<\|endoftext\|>'\]"):
        either.encode(f"a{END}b")
    assert either.encode(f"a{END}b", allowed_special="all") == [64, 50256, 65]
    assert 50256 not in either.encode_ordinary(f"a{END}b")
    # Lecture notes once allowed "[EOS]", which is text like any other to GPT-2.
    with pytest.raises(ValueError, match=r"'\[EOS\]' is no special token of this vocabulary"):
        either.encode("text", allowed_special={"[EOS]"})


def test_gpt2_of_tiktoken_is_ours(gpt2, through_tiktoken):
    assert same(through_tiktoken.to_bpe(), gpt2)


def test_gpt2_with_new_tokens(gpt2, through_tiktoken, tmp_path):
    text = f"Sample text with MyNewToken_1 and MyNewToken_2. {END}"
    ids = [36674, 2420, 351, 220, 50257, 290, 220, 50258, 13, 220, 50256]
    for either in (copy.deepcopy(gpt2), TiktokenTokenizer(through_tiktoken.encoding)):
        assert either.add_tokens(["MyNewToken_1", "MyNewToken_2"]) == [50257, 50258]
        assert either.add_tokens([END, "MyNewToken_2"]) == [50256, 50258]  # nothing new
        assert either.vocab_size == 50259
        assert either.encode(text, allowed_special="all") == ids
        assert either.encode_array(text, allowed_special="all").tolist() == ids
        assert either.decode(ids) == text
        with pytest.raises(ValueError, match="MyNewToken_"):
            either.encode(text, allowed_special={END})
        either.save(tmp_path)
        assert load(tmp_path).encode(text, allowed_special="all") == ids


def test_gpt2_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(ConnectionError, match="set TIKTOKEN_CACHE_DIR") as caught:
        gpt2_of_tiktoken()
    assert "\n" not in str(caught.value)


def test_gpt2_equals_tiktoken(gpt2, through_tiktoken):
    theirs = through_tiktoken.encoding
    for text in (CORPUS[:100_000], verdict()):
        ids = gpt2.encode(text)
        assert ids == theirs.encode(text)
        assert gpt2.encode_array(text).tolist() == ids

    @given(KNOWN_TEXT)
    def on_any_text(text):
        assert gpt2.encode_ordinary(text) == theirs.encode_ordinary(text)

    on_any_text()


def test_gpt2_saved_and_loaded(gpt2, tmp_path):
    gpt2.save(tmp_path)
    saved = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert saved == json.loads(data_file("gpt2-bpe/encoder.json").read_text(encoding="utf-8"))
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    assert merges == data_file("gpt2-bpe/vocab.bpe").read_text(encoding="utf-8")
    loaded = BPETokenizer.load(tmp_path)
    text = "Every effort moves you"
    assert loaded.encode(text) == gpt2.encode(text)


# Files, and Hugging Face as the oracle for them


def same(first: BPETokenizer, second: BPETokenizer) -> bool:
    return (
        first.merges == second.merges
        and first.token_ids == second.token_ids
        and first.special_tokens == second.special_tokens
    )


@pytest.mark.parametrize("special_tokens", [[], [END], ["<|user|>", "<|end of turn|>", END]])
@pytest.mark.parametrize("missing", [[], ["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_save_and_load(tmp_path, special_tokens, missing):
    trained = BPETokenizer.train(CORPUS[:20_000], 300, special_tokens)
    trained.save(tmp_path / "new" / "folder")
    for name in missing:
        (tmp_path / "new" / "folder" / name).unlink()
    assert same(BPETokenizer.load(tmp_path / "new" / "folder"), trained)


def test_save_replaces_the_older_files_and_leaves_no_others(tmp_path):
    BPETokenizer.train("an older one", 270).save(tmp_path)
    TRAINED.save(tmp_path)
    assert same(BPETokenizer.load(tmp_path), TRAINED)
    names = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """Our saved directory, opened by transformers in three ways and by tokenizers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("saved")
    TRAINED.save(folder)
    plain = tmp_path_factory.mktemp("without_tokenizer_json")
    shutil.copytree(folder, plain, dirs_exist_ok=True)
    (plain / "tokenizer.json").unlink()
    return {
        "gpt2": transformers.GPT2TokenizerFast.from_pretrained(folder),
        "auto": transformers.AutoTokenizer.from_pretrained(folder),
        "auto, without tokenizer.json": transformers.AutoTokenizer.from_pretrained(plain),
        "tokenizers": tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    }


def test_hugging_face_gets_the_same_ids(hugging_face):
    @given(WITH_SPECIAL)
    def on_any_text(text):
        ids = TRAINED.encode(text, allowed_special="all")
        for name, theirs in hugging_face.items():
            encoded = theirs.encode(text)
            assert (encoded.ids if name == "tokenizers" else encoded) == ids, name
            assert theirs.decode(ids, skip_special_tokens=False) == text, name

    on_any_text()
    for name in ("gpt2", "auto", "auto, without tokenizer.json"):
        assert hugging_face[name].eos_token_id == TRAINED.end_of_text
        assert len(hugging_face[name]) == TRAINED.vocab_size


def test_words_are_gpt2s():
    """Of Hugging Face's cut into words: the ids alone hide one that no merge crosses."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)

    @given(KNOWN_TEXT)
    def on_any_text(text):
        words = [word for word, _ in theirs.pre_tokenize_str(text)]
        assert [printable(word.encode()) for word in WORD.findall(text)] == words

    on_any_text()


def test_we_open_what_hugging_face_saves(hugging_face, tmp_path):
    hugging_face["auto"].save_pretrained(tmp_path)
    assert same(BPETokenizer.load(tmp_path), TRAINED)

    # Training by their library: special tokens come first, and ids are not in the order of ours.
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([CORPUS], 600, special_tokens=["<s>", END], show_progress=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = BPETokenizer.load(tmp_path)
    assert ours.special_tokens == {"<s>": 0, END: 1}
    text = f"<s>{CORPUS[:10_000]} é 😀{END}"
    assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
    assert ours.encode_array(text, allowed_special="all").tolist() == theirs.encode(text).ids


def test_merges_that_tiktoken_would_apply_otherwise(tmp_path):
    """ "abc" is ("a", "bc"), but "ab" comes first: by pairs "abc" stays ["ab", "c"]."""
    tokens = [*byte_to_printable().values(), "ab", "bc", "abc"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b\nb c\na bc\n", encoding="utf-8")
    loaded = BPETokenizer.load(tmp_path)
    assert loaded.encode("abc") == [256, loaded.token_to_id("c")]
    assert loaded.encode_array("abc").tolist() == loaded.encode("abc")
    with pytest.raises(ValueError, match="tiktoken would merge b'abc'"):
        loaded.to_tiktoken()


def test_ids_in_another_order_than_merges(tmp_path):
    tokens = [*byte_to_printable().values(), "abc", "ab"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b\nab c\n", encoding="utf-8")
    loaded = load(tmp_path)
    assert loaded.encode_array("abc ab").tolist() == loaded.encode("abc ab") == [256, 220, 257]
    with pytest.raises(ValueError, match="in the order of the merges"):
        loaded.to_tiktoken()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("text", 256), ValueError, "at least 257"),
        (("text", 257, ["a1", "b1"]), ValueError, "at least 258"),
        (("", 300), ValueError, "empty text"),
        ((END, 300), ValueError, "besides special tokens"),
        ((b"text", 300), TypeError, "must be str"),
        (("half a pair \ud83d", 300), ValueError, "at index 12"),
        (("text", 300.5), TypeError, "vocab_size must be an integer, got 300.5"),
        (("text", "300"), TypeError, "vocab_size must be an integer, got '300'"),
        (("text", 300, END), TypeError, "list"),
        (("text", 300, None), TypeError, "must be a list of texts, got NoneType"),
        (("text", 300, [END, END]), ValueError, "different"),
        (("text", 300, [""]), ValueError, "empty"),
        (("text", 300, ["!"]), ValueError, "choose another"),
    ],
)
def test_bad_training_input(arguments, error, message):
    with pytest.raises(error, match=message):
        BPETokenizer.train(*arguments)


@pytest.mark.parametrize(("text", "merges"), [("  \n", 2), ("\t\t", 1), (" ", 0), ("a", 0)])
def test_white_space_is_text_and_single_bytes_have_no_pairs(text, merges):
    trained = BPETokenizer.train(text, 300)
    assert trained.vocab_size == 256 + merges + 1
    assert trained.decode(trained.encode(text)) == text


def test_special_text_that_is_not_allowed():
    text = f"tea? {END} In <|user|>"
    for encode in (TRAINED.encode, TRAINED.encode_array):
        with pytest.raises(ValueError, match="encode_ordinary"):
            encode(text)
        with pytest.raises(ValueError, match=r"<\|user\|>"):
            encode(text, allowed_special={END})
        mixed = encode(text, allowed_special=END, disallowed_special=())
        assert TRAINED.end_of_text in mixed
        assert TRAINED.token_to_id("<|user|>") not in mixed
        assert TRAINED.decode(mixed) == text
        with pytest.raises(ValueError, match="no special token"):
            encode(text, allowed_special=["<|nobody|>"])


def test_longer_special_tokens_come_first():
    trained = BPETokenizer.train("text", 300, special_tokens=["<a>", "<a>b"])
    assert trained.encode("<a>b<a>", allowed_special="all") == [
        trained.special_tokens["<a>b"],
        trained.special_tokens["<a>"],
    ]


def test_bad_text_and_ids():
    with pytest.raises(TypeError, match="encode_bytes"):
        TRAINED.encode(b"bytes")
    for bad in ("text", 5):
        with pytest.raises(TypeError, match="must be bytes"):
            TRAINED.encode_bytes(bad)
    with pytest.raises(TypeError, match="must be str"):
        TRAINED.token_to_id(5)
    with pytest.raises(ValueError, match="surrogate"):
        TRAINED.encode("\ud83d")
    for bad in (-1, 700):
        with pytest.raises(IndexError, match=r"0\.\.699"):
            TRAINED.decode([0, bad])
        with pytest.raises(IndexError, match=r"0\.\.699"):
            StreamDecoder(TRAINED).feed(bad)
    arrays = [np.zeros((2, 2), int), np.array(5), np.array([1.0]), np.array([True])]
    arrays += [Tensor(np.array([[1]])), Tensor(np.array(1)), Tensor(np.array([1.0]))]
    for bad in (["a"], [1.0], [[1, 2]], "12", 5, 1.0, None, [None], *arrays):
        with pytest.raises(TypeError, match="integers"):
            TRAINED.decode(bad)
    for bad in (None, 5):
        for name in ("allowed_special", "disallowed_special"):
            with pytest.raises(TypeError, match=f'"all" or a list .* {type(bad).__name__}'):
                TRAINED.encode("text", **{name: bad})
    for bad in ([None], [["a"]], [b"a"]):
        with pytest.raises(ValueError, match="is no special token"):
            TRAINED.encode("text", allowed_special=bad)
    for encode in (TRAINED.encode, TRAINED.encode_ordinary, TRAINED.encode_array, FAST.encode):
        for bad in (None, 5, ["a"], b"a"):
            with pytest.raises(TypeError, match=f"must be str, got {type(bad).__name__}"):
                encode(bad)
        with pytest.raises(ValueError, match="surrogate"):
            encode("\ud83d")
    with pytest.raises(ValueError, match="no UTF-8 at byte offset 1: expected whole characters"):
        TRAINED.decode(TRAINED.encode_bytes(b"a\xff"), errors="strict")
    with pytest.raises(ValueError, match="errors must be"):
        TRAINED.decode([1], errors="ignore")
    with pytest.raises(ValueError, match="not one token"):
        TRAINED.token_to_id("a whole sentence")
    with pytest.raises(ValueError, match="not one token"):
        BPETokenizer.train("text", 300, special_tokens=[]).end_of_text  # noqa: B018
    assert TRAINED.decode([]) == ""
    array = np.array(TRAINED.encode("text"), np.uint16)
    for ids in (array, Tensor(array.astype(np.int64)), iter(array), np.array([*array], np.int64)):
        assert TRAINED.decode(ids) == "text"


def test_bad_new_tokens():
    trained = BPETokenizer.train("the the", 260)
    before = trained.vocab_size
    for bad, message in (
        ([""], "none of them empty"),
        (["<a>", "<a>"], "different"),
        (["the"], "'the' is an ordinary token already, with id 257"),
        (["Ġthe"], "looks like an ordinary one"),
        (["\ud83d"], "surrogate pair"),
    ):
        with pytest.raises(ValueError, match=message):
            trained.add_tokens(["<new>", *bad])
    with pytest.raises(TypeError, match="list of texts"):
        trained.add_tokens("<new>")
    for bad in (None, 5):
        with pytest.raises(TypeError, match=f"must be a list of texts, got {type(bad).__name__}"):
            trained.add_tokens(bad)
    assert trained.vocab_size == before  # all or nothing


def test_load_finds_the_type(tmp_path):
    TRAINED.save(tmp_path)
    assert same(load(tmp_path), TRAINED)
    edited(tmp_path / "tokenizer.json", lambda c: c | {"model": {"type": "Morse"}})
    with pytest.raises(
        ValueError, match="type 'Morse': expected BPE, WordPiece, Unigram, WordLevel"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"vocab\.json is missing, and so is tokenizer\.json"):
        load(tmp_path / "nowhere")


KINDS = [BPETokenizer, TiktokenTokenizer, UnigramTokenizer, WordPieceTokenizer, WordTokenizer]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_folder_with_a_tokenizer(kind, tmp_path):
    """Of its own `load`, and of the one that finds the type."""
    file, empty, folder = tmp_path / "file", tmp_path / "empty", tmp_path / "folder"
    file.write_text("{}")
    empty.mkdir()
    (folder / "tokenizer.json").mkdir(parents=True)
    for open_it in (kind.load, load):
        for path, message in (
            (file, f"{file} is a file: expected the folder"),
            (empty, "is missing"),
            (folder, "tokenizer.json cannot be read (Is a directory)"),
        ):
            with pytest.raises(ValueError) as caught:
                open_it(str(path))
            assert message in str(caught.value) and str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def edited(path: Path, edit) -> None:
    """Replace the JSON in a file by what `edit` makes of it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edit(content)), encoding="utf-8")


BAD_VOCABULARIES = {
    "not valid JSON": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "expected one JSON object": lambda path: path.write_text("[1, 2]"),
    "is missing": lambda path: path.unlink(),
    "not UTF-8 at byte offset 1": lambda path: path.write_bytes(b"{\xff}"),
    "each id 0..698 once": lambda path: edited(path, lambda v: {t: i for t, i in v.items() if i}),
    "each id 0..699 once": lambda path: edited(path, lambda v: v | {"!": 1}),
    "whole number": lambda path: edited(path, lambda v: v | {"!": "0"}),
    "stands for no byte": lambda path: edited(path, lambda v: v | {"a b": 700}),
    "1 of 256 bytes": lambda path: edited(
        path, lambda v: {"!!" if t == "!" else t: i for t, i in v.items()}
    ),
}


@pytest.mark.parametrize("message", BAD_VOCABULARIES)
def test_bad_vocab_json(tmp_path, message):
    TRAINED.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    BAD_VOCABULARIES[message](tmp_path / "vocab.json")
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.load(tmp_path)
    assert "vocab.json" in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_MERGES = {
    "is missing": None,
    "no merge makes 442 tokens": lambda lines: [],
    "no merge makes 1 tokens": lambda lines: lines[:-1],
    "expected two tokens": lambda lines: [*lines[:-1], lines[-1] + " x"],
    "merge 443 makes b'!!'": lambda lines: [*lines, "! !"],
    "merge 443 makes .* no earlier": lambda lines: [*lines, lines[1]],
    "merge 443 uses b'zqzq'": lambda lines: [*lines, "zqzq z"],
    "earlier merge makes": lambda lines: [lines[0], *lines[:0:-1]],
    "stands for no byte": lambda lines: [*lines, "\t z"],
}


BYTE_IDS = {bytes([byte]): byte for byte in range(256)}
AB = (b"a", b"b")


@pytest.mark.parametrize(
    ("merges", "token_ids", "special_tokens", "error", "message"),
    [
        ([AB], {b"a": 0, b"b": 1, b"ab": 2}, {}, ValueError, "254 of 256 bytes are missing"),
        ([AB], BYTE_IDS, {}, ValueError, "merge 1 makes b'ab': expected a token of the vocab"),
        ([(b"ab", b"c")], BYTE_IDS | {b"abc": 256}, {}, ValueError, "merge 1 uses b'ab': exp"),
        ([(b"a",)], BYTE_IDS, {}, ValueError, r"merge 1 is \(b'a',\): expected two tokens"),
        ([("a", "b")], BYTE_IDS | {b"ab": 256}, {}, ValueError, "merge 1 uses 'a': expected"),
        ([], BYTE_IDS | {b"ab": 256}, {}, ValueError, "no merge makes 1 tokens, such as b'ab'"),
        ([], BYTE_IDS | {"ab": 256}, {}, TypeError, "tokens must be bytes, got 'ab'"),
        ([], BYTE_IDS, {"Ġ": 256}, ValueError, "'Ġ' looks like an ordinary one"),
    ],
)
def test_parts_that_do_not_fit_together(merges, token_ids, special_tokens, error, message):
    with pytest.raises(error, match=message) as caught:
        BPETokenizer(merges, token_ids, special_tokens)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", BAD_MERGES)
def test_bad_merges_txt(tmp_path, message):
    TRAINED.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.unlink()
    if BAD_MERGES[message]:
        path.write_text("\n".join(BAD_MERGES[message](lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.load(tmp_path)
    assert "merges.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenizers_of_another_kind(tmp_path):
    TRAINED.save(tmp_path)
    edited(tmp_path / "tokenizer.json", lambda content: content | {"pre_tokenizer": None})
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a byte-level BPE"):
        BPETokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    edited(tmp_path / "tokenizer_config.json", lambda c: c | {"tokenizer_class": "BertTokenizer"})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json says .* 'BertTokenizer'"):
        BPETokenizer.load(tmp_path)


def test_files_that_disagree(tmp_path):
    TRAINED.save(tmp_path)
    edited(tmp_path / "vocab.json", lambda vocab: vocab | {"!": 1, '"': 0})
    with pytest.raises(ValueError, match="delete what is out of date"):
        BPETokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        BPETokenizer.load(tmp_path / "nowhere")


SMALL = [
    BPETokenizer.train("some text", 260),
    WordTokenizer.train("some text"),
    WordPieceTokenizer.train("some text", 20),
    UnigramTokenizer.train("some text", 280),
]


# What a JSON file may hold in the place of something else
ANY_JSON = (
    st.none() | st.booleans() | st.integers(-1, 300) | st.integers() | st.floats() | st.text()
    | st.sampled_from([2**64, 10**400, "\ud83d", "\n", "", "some", [], {}, [[]], [["a", 0]]])
)  # fmt: skip


@st.composite
def damaged(draw, original: bytes) -> bytes:
    """A JSON file cut short, without a few bytes, or with a changed or missing key or value."""
    how = draw(st.sampled_from(["cut", "hole", "change", "change", "drop", "rename"]))
    if how in ("cut", "hole"):
        start = draw(st.integers(0, len(original)))
        stop = len(original) if how == "cut" else start + draw(st.integers(1, 20))
        return original[:start] + original[stop:]
    content = where = json.loads(original)
    while True:
        keys = list(where) if isinstance(where, dict) else range(len(where))
        key = draw(st.sampled_from(keys))
        inner = where[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 3)) == 0:
            break
        where = inner
    if how == "change" or isinstance(where, list):
        where[key] = draw(ANY_JSON)
    elif how == "rename":
        where[draw(st.text() | st.sampled_from(["some", "type", "\ud83d"]))] = where.pop(key)
    else:
        del where[key]
    return json.dumps(content).encode()


def parts(tokenizer: Tokenizer) -> dict:
    """All that makes a tokenizer what it is."""
    return {name: part for name, part in vars(tokenizer).items() if not name.startswith("_")}


@pytest.mark.parametrize("small", SMALL, ids=lambda small: type(small).__name__)
def test_a_damaged_tokenizer_json_is_a_value_error(tmp_path, small):
    """Opened if it still makes sense, and then it round-trips; else refused in one line."""
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    for path in tmp_path.iterdir():
        if path != file:
            path.unlink()
    original = file.read_bytes()

    @settings(max_examples=150)
    @given(damaged(original))
    def on_any_damage(content):
        file.write_bytes(content)
        try:
            loaded = load(tmp_path)
        except ValueError as error:
            assert "tokenizer.json" in str(error)
            assert "\n" not in str(error)
            return
        loaded.save(tmp_path / "again")
        assert parts(load(tmp_path / "again")) == parts(loaded)
        ids = loaded.encode_ordinary("some text")
        assert 0 <= min(ids) <= max(ids) < loaded.vocab_size
        assert loaded.vocab_size <= small.vocab_size + 1  # one name may have become two
        if getattr(loaded, "byte_fallback", isinstance(loaded, BPETokenizer)):
            assert loaded.decode(ids) == "some text"

    on_any_damage()


# Vocabularies made by hand: tokens with any ids, of which the last is that of a special token


def of_words(ids: dict) -> WordTokenizer:
    return WordTokenizer(ids, "[UNK]")


def of_word_pieces(ids: dict) -> WordPieceTokenizer:
    return WordPieceTokenizer(*split_off_last(ids))


def of_unigrams(ids: dict) -> UnigramTokenizer:
    token_ids, special_tokens = split_off_last(ids)
    log_probs = {piece: -1.0 - i for i, piece in enumerate(token_ids)}
    return UnigramTokenizer(log_probs, token_ids, special_tokens, byte_fallback=False)


def of_bytes(ids: dict) -> BPETokenizer:
    return BPETokenizer([AB], *split_off_last(ids))


def split_off_last(ids: dict) -> tuple[dict, dict]:
    *ordinary, special = ids.items()
    return dict(ordinary), dict([special])


BY_HAND = {
    of_words: ["a", "b", "ab", "[UNK]"],
    of_word_pieces: ["a", "##b", "b", "[UNK]"],
    of_unigrams: ["a", "b", "▁", "<unk>"],
    of_bytes: [*BYTE_IDS, b"ab", END],
}
by_hand = pytest.mark.parametrize("make", BY_HAND, ids=lambda make: make.__name__)


@by_hand
def test_ids_made_by_hand(make, tmp_path_factory):
    """In memory, any different ids will do; files must have all of them."""

    @settings(max_examples=25)
    @given(st.sets(st.integers(0, 260), max_size=3), st.randoms(use_true_random=False))
    def with_any_holes(holes, random):
        tokens = BY_HAND[make]
        ids = [i for i in range(len(tokens) + len(holes)) if i not in holes][: len(tokens)]
        last, is_whole = ids[-1], ids[-1] == len(tokens) - 1
        random.shuffle(ids)
        tokenizer = make(dict(zip(tokens, ids)))
        assert tokenizer.vocab_size == last + 1
        assert [tokenizer.token_to_id(token) for token in tokens] == ids
        assert tokenizer.add_tokens(["<new>"]) == [last + 1]
        text = "a<new>b ab"
        found = tokenizer.encode(text, allowed_special="all")
        assert "".join(tokenizer.decode(found).split()) == "a<new>bab"
        assert tokenizer.encode_array(text, allowed_special="all").tolist() == found
        folder = tmp_path_factory.mktemp("by_hand")
        if is_whole:
            tokenizer.save(folder)
            assert parts(load(folder)) == parts(tokenizer)
        else:
            with pytest.raises(
                ValueError, match=r"tokenizer\.json: expected each id 0\.\.\d+ once"
            ):
                tokenizer.save(folder)
            assert not list(folder.iterdir())

    with_any_holes()


@by_hand
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("bad", [1, -1, "0", 0.0, True, None])
def test_bad_ids_made_by_hand(make, place, bad):
    tokens = BY_HAND[make]
    ids = list(range(len(tokens)))
    ids[place] = bad
    with pytest.raises(ValueError, match=r"has the id .*: expected a different whole") as caught:
        make(dict(zip(tokens, ids)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokenizer", [*SMALL, FAST], ids=lambda small: type(small).__name__)
def test_one_interface(tokenizer, tmp_path):
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode("some text")
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode() == "some text"
    assert tokenizer.encode_ordinary("some text") == ids
    assert max(ids) < tokenizer.vocab_size
    for name, token_id in tokenizer.special_tokens.items():
        assert tokenizer.token_to_id(name) == token_id
        assert tokenizer.encode(name, allowed_special="all") == [token_id]
        assert tokenizer.decode([token_id]) == name
    tokenizer.save(tmp_path)
    for again in (load(tmp_path), type(tokenizer).load(tmp_path), copy.deepcopy(tokenizer)):
        assert again.encode("some text") == ids
        assert again.special_tokens == tokenizer.special_tokens
    assert {p.name for p in tmp_path.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("tokenizer", [*SMALL, FAST], ids=lambda small: type(small).__name__)
def test_hugging_face_gets_the_same_ids_for_added_tokens(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ours = copy.deepcopy(tokenizer)
    new = ours.add_tokens(["<new>", "<new>er"])
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)

    @settings(max_examples=30)
    @given(
        st.lists(st.sampled_from(["some", " ", "text", "\n", *ours.special_tokens])).map("".join)
    )
    def on_any_text(text):
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == auto.encode(text) == ids

    on_any_text()
    assert theirs.encode("some<new>er<new>").ids[-2:] == new[::-1]
    assert len(auto) == ours.vocab_size
