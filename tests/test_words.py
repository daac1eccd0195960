"""The word tokenizer: the book's own ids, and Hugging Face's for what we save."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import old_text, verdict

from tinygrad_llm.tokenizer import StreamDecoder, WordTokenizer, load
from tinygrad_llm.tokenizer.words import AT_COMMAS, AT_SPACE, build_vocabulary, split_words

END, UNKNOWN = "<|endoftext|>", "<|unk|>"
TEXT = 'Hello, world. Is this-- a test? It\'s (really) "one": yes; no_no!'
TOKENIZER = WordTokenizer.train(TEXT)
ANY_WORDS = st.lists(st.sampled_from([*split_words(TEXT), " ", "\n", "--", "\x1c"])).map("".join)

# The book's numbers (sections 2.2 to 2.4)


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        (
            "Hello, world. This, is a test.",
            AT_SPACE,
            ["Hello,", "world.", "This,", "is", "a", "test."],
        ),
        (
            "Hello, world. This, is a test.",
            AT_COMMAS,
            ["Hello", ",", "world", ".", "This", ",", "is", "a", "test", "."],
        ),
    ],
)
def test_first_steps(text, at, words):
    assert split_words(text, at) == words


def test_punctuation():
    words = split_words("Hello, world. Is this-- a test?")
    assert words == ["Hello", ",", "world", ".", "Is", "this", "--", "a", "test", "?"]
    # Lecture notes once left "amet," whole although they said that punctuation is split off.
    assert split_words("dolor sit amet, elit") == ["dolor", "sit", "amet", ",", "elit"]


def test_vocabulary_of_the_verdict():
    text = verdict()
    words = split_words(text)
    assert (len(text), len(words), len(set(words))) == (20479, 4690, 1130)
    assert words[:8] == ["I", "HAD", "always", "thought", "Jack", "Gisburn", "rather", "a"]
    vocab = build_vocabulary(words)
    assert (vocab["!"], vocab["HAD"], vocab["Hermia"]) == (0, 44, 50)


def test_without_unknown_token():
    tokenizer = WordTokenizer.train(verdict(), special_tokens=(), unk_token=None)
    assert tokenizer.vocab_size == 1130
    text = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    ids = [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == (
        '" It\' s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    )
    with pytest.raises(KeyError, match="'Hello' is not in the vocabulary of 1130 words"):
        tokenizer.encode("Hello, do you like tea?")


def test_with_unknown_token():
    tokenizer = WordTokenizer.train(verdict())
    assert tokenizer.vocab_size == 1132
    assert tokenizer.special_tokens == {END: 1130, UNKNOWN: 1131}
    assert tokenizer.end_of_text == 1130
    text = f"Hello, do you like tea? {END} In the sunlit terraces of the palace."
    ids = [1131, 5, 355, 1126, 628, 975, 10, 1130, 55, 988, 956, 984, 722, 988, 1131, 7]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == (
        f"{UNKNOWN}, do you like tea? {END} In the sunlit terraces of the {UNKNOWN}."
    )


def test_toy_vocabulary_of_the_notes():
    vocab = {"Hello": 64, ",": 455, "world": 78, "!": 467}
    assert WordTokenizer(vocab).encode("Hello, world!") == [64, 455, 78, 467]
    with pytest.raises(KeyError, match="'Bye'"):
        WordTokenizer(vocab).encode("Bye, world!")
    tokenizer = WordTokenizer(vocab | {"[UNK]": 987}, unk_token="[UNK]")
    assert tokenizer.encode("Bye, world!") == [987, 455, 78, 467]
    assert tokenizer.decode([987, 455, 78, 467]) == "[UNK], world!"
    assert tokenizer.vocab_size == 988  # an embedding needs a row for id 987
    with pytest.raises(IndexError, match=r"65 is outside .* has 5 of the ids 0\.\.987, and not"):
        tokenizer.decode([65])


# Laws


@given(st.lists(st.sampled_from(split_words(TEXT))).map(" ".join))
def test_words_round_trip(text):
    words = split_words(text)
    ids = TOKENIZER.encode(text)
    assert [TOKENIZER.decode([i]) for i in ids] == words
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids
    assert TOKENIZER.encode_array(text).tolist() == ids
    stream = StreamDecoder(TOKENIZER)
    assert "".join(map(stream.feed, ids)) + stream.finish() == TOKENIZER.decode(ids)


def test_hugging_face_gets_the_same_ids(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == TOKENIZER.vocab_size

    @given(ANY_WORDS | old_text() | st.lists(ANY_WORDS | st.sampled_from([END])).map("".join))
    def on_any_text(text):
        ids = TOKENIZER.encode(text)
        assert theirs.encode(text).ids == ids
        assert auto.encode(text) == ids

    on_any_text()
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert same(load(tmp_path), TOKENIZER)


def same(first, second):
    return (
        type(first) is type(second)
        and first.vocab == second.vocab
        and first.special_tokens == second.special_tokens
        and first.unk_token == second.unk_token
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        TOKENIZER,
        WordTokenizer.train(TEXT, (), None),
        WordTokenizer({"a": 1, "[UNK]": 0}, "[UNK]"),
        WordTokenizer({"a": 1, "b": 0}, "b", []),
        WordTokenizer.train(TEXT, ["[EOS]"], None),
    ],
)
def test_save_and_load(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "new")
    assert same(WordTokenizer.load(tmp_path / "new"), tokenizer)
    assert same(load(tmp_path / "new"), tokenizer)


def test_ids_with_holes_stay_in_memory(tmp_path):
    """In a file, a hole is damage: a word that was lost."""
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected each id 0\.\.1 once"):
        WordTokenizer({"a": 7, "[UNK]": 3}, "[UNK]").save(tmp_path)
    assert not list(tmp_path.iterdir())


def vocab(content):
    return content["model"]["vocab"]


EDITS = {
    "vocabulary is empty": lambda c: c["model"].update(vocab={}) or c | {"added_tokens": []},
    "expected each id 0..24 once, for its 25 tokens": lambda c: vocab(c).pop("test") and c,
    "expected each id 0..25 once": lambda c: vocab(c).update(test=2**40) or c,
    "each id 0..25 once, for its 26": lambda c: vocab(c).update(test=-1) or c,
    "each id 0..25 once, for": lambda c: vocab(c).update(test=0) or c,
    "a whole number": lambda c: vocab(c).update(test=1.0) or c,
    "whole number as the id": lambda c: vocab(c).update(test=True) or c,
    "whole number as the id of each token": lambda c: vocab(c).update(test="1") or c,
    "expected the model's vocab to map": lambda c: c["model"].update(vocab=[["a", 0]]) or c,
    "half a surrogate": lambda c: vocab(c).update({"\ud83d": 26}) or c,
    "has two ids, 25 and 5": lambda c: c["added_tokens"][1].update(id=5) or c,
    "added_tokens with a content": lambda c: c.pop("added_tokens") and c,
    "added_tokens with a": lambda c: c | {"added_tokens": {}.get("none")},
    "added_tokens with": lambda c: c["added_tokens"][0].update(content="") or c,
    "'[UNK]' is not in the vocab": lambda c: c["model"].update(unk_token="[UNK]") or c,
    "the name of the model's unk_token": lambda c: c["model"].update(unk_token=None) or c,
    "name of the model's unk_token": lambda c: c["model"].pop("unk_token") and c,
    "expected WordLevel": lambda c: c["model"].update(type="BPE") or c,
    "type 'unknown'": lambda c: c | {"model": []},
    "pre_tokenizer is of another kind": lambda c: c | {"pre_tokenizer": None},
    "normalizer is of another kind": lambda c: c | {"normalizer": {"type": "NFC"}},
    "holds a JSON list: expected one JSON object": lambda c: [c],
    "holds a JSON NoneType": lambda c: None,
}


@pytest.mark.parametrize("message", EDITS)
def test_an_edited_file(tmp_path, message):
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = EDITS[message](json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        WordTokenizer.load(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGE = {
    "is not valid JSON (line 1": b"words",
    "is not valid JSON (line 2": b'{"model":\n',
    "is not UTF-8 at byte offset 2": b'{"\xff": 1}',
    "the nesting has no end": b"[" * 100_000,
    "a number or": b'{"model": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_file_that_is_no_json(tmp_path, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(DAMAGE[message])
    for open_it in (WordTokenizer.load, load):
        with pytest.raises(ValueError) as caught:
            open_it(tmp_path)
        assert message in str(caught.value) and str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_file_cut_short(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("cut")
    TOKENIZER.save(folder)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: min(length, path.stat().st_size - 1)])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not"):
        load(folder)


def test_more_tokens(tmp_path):
    tokenizer = WordTokenizer.train("a b")
    assert tokenizer.add_tokens(["<user>", END, "<bot>"]) == [4, 2, 5]
    assert tokenizer.encode("a<user>b<bot>") == [0, 4, 1, 5]
    assert tokenizer.decode([0, 4]) == "a <user>"
    tokenizer.save(tmp_path)
    assert same(load(tmp_path), tokenizer)
    with pytest.raises(ValueError, match="'b' is an ordinary token already, with id 1"):
        tokenizer.add_tokens(["b"])


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WordTokenizer.train(" \n"), ValueError, "empty text"),
        (lambda: WordTokenizer.train(""), ValueError, "empty text"),
        (lambda: WordTokenizer.train(f"{END} {UNKNOWN}"), ValueError, "white space"),
        (lambda: WordTokenizer.train(b"a"), TypeError, "must be str, got bytes"),
        (lambda: WordTokenizer.train("a", END), TypeError, "list of texts"),
        (lambda: WordTokenizer.train("a", [END]), ValueError, "'<|unk|>' is not in the vocab"),
        (lambda: WordTokenizer({}), ValueError, "vocabulary is empty"),
        (lambda: WordTokenizer({"a": 0, "b": 0}), ValueError, "different whole number"),
        (lambda: WordTokenizer({"a": -1}), ValueError, "different whole number"),
        (lambda: WordTokenizer({1: 1}), TypeError, "must be str"),
        (lambda: WordTokenizer({"a": 0}, unk_token="b"), ValueError, "'b' is not in the vocab"),
        (lambda: TOKENIZER.encode("a\ud83d"), ValueError, "surrogate pair"),
        (lambda: TOKENIZER.encode(END, allowed_special=()), ValueError, "special token"),
        (lambda: TOKENIZER.encode("a", allowed_special={"[EOS]"}), ValueError, "no special token"),
        (lambda: TOKENIZER.token_to_id("absent"), ValueError, "not one token"),
        (lambda: TOKENIZER.decode([TOKENIZER.vocab_size]), IndexError, "outside this vocabulary"),
        (lambda: TOKENIZER.decode(["a"]), TypeError, "integers"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_from_numpy():
    ids = np.array(TOKENIZER.encode("Hello, world."))
    assert TOKENIZER.decode(ids) == "Hello, world."
    assert TOKENIZER.token_to_id(b"Hello") == ids[0]
