"""Unigram: the sums over all spellings by listing them, and Hugging Face's ids for what we save."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import real_words

from tinygrad_llm.data import embedded_corpus
from tinygrad_llm.tokenizer import StreamDecoder, UnigramTokenizer, load
from tinygrad_llm.tokenizer.unigram import (
    BYTES,
    SPECIAL_TOKENS,
    Lattice,
    expectation_maximization,
    learn_pieces,
    log_sum_exp,
    losses,
    seed_pieces,
)

CORPUS = embedded_corpus()[:30_000]
TRAINED = UnigramTokenizer.train(CORPUS, 700)
WITH_UNKNOWN = UnigramTokenizer.train(CORPUS, 450, byte_fallback=False, prefix_space=True)

REAL = real_words(CORPUS[:5000])
ANY_TEXT = REAL | st.text() | st.text("aeinst  \n'1é▁.")
WORDS = st.text("abc", min_size=1, max_size=7)
# Probabilities of pieces: all characters, so that each word has a spelling, and longer ones.
PIECES = st.dictionaries(
    st.text("abc", min_size=1, max_size=4), st.floats(0.01, 1), max_size=12
).map(lambda p: {x: math.log(q) for x, q in ({"a": 0.3, "b": 0.2, "c": 0.1} | p).items()})


def with_pieces(**log_probs: float) -> UnigramTokenizer:
    ids = {piece: i for i, piece in enumerate(log_probs, 1)}
    return UnigramTokenizer(log_probs, ids, {"<unk>": 0}, byte_fallback=False)


def pieces_of(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


# The maths


def spellings(word, log_probs):
    """Every way to write the word in pieces, and its log probability."""
    if not word:
        return [([], 0.0)]
    return [
        ([word[:end], *rest], log_probs[word[:end]] + log_prob)
        for end in range(1, len(word) + 1)
        if word[:end] in log_probs
        for rest, log_prob in spellings(word[end:], log_probs)
    ]


@given(WORDS, PIECES)
def test_forward_and_backward_sum_over_all_spellings(word, log_probs):
    lattice = Lattice(word, log_probs, 4)
    alpha, beta = lattice.forward(), lattice.backward()
    for i in range(len(word) + 1):
        prefix = log_sum_exp([p for _, p in spellings(word[:i], log_probs)])
        suffix = log_sum_exp([p for _, p in spellings(word[i:], log_probs)])
        assert math.isclose(alpha[i], prefix, rel_tol=1e-12, abs_tol=1e-12)
        assert math.isclose(beta[i], suffix, rel_tol=1e-12, abs_tol=1e-12)


@given(WORDS, PIECES)
def test_expected_counts_are_averages_over_all_spellings(word, log_probs):
    lattice = Lattice(word, log_probs, 4)
    uses, log_prob = lattice.expected_counts()
    every = spellings(word, log_probs)
    assert math.isclose(log_prob, log_sum_exp([p for _, p in every]), abs_tol=1e-12)
    expected = Counter()
    for pieces, p in every:
        for piece in pieces:
            expected[piece] += math.exp(p - log_prob)
    found = Counter()
    for (start, end, _), used in zip(lattice.edges, uses):
        found[word[start:end]] += used
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[x], expected[x], rel_tol=1e-9) for x in found)


@given(WORDS, PIECES)
def test_viterbi_finds_the_likeliest_spelling(word, log_probs):
    path, log_prob = Lattice(word, log_probs, 4).best()
    every = {tuple(pieces): p for pieces, p in spellings(word, log_probs)}
    assert math.isclose(log_prob, max(every.values()), abs_tol=1e-12)
    assert math.isclose(log_prob, every[tuple(word[i:j] for i, j in path)], abs_tol=1e-12)


def test_a_word_without_spelling():
    lattice = Lattice("ab", {"a": -1.0}, 1)
    assert lattice.best() == ([], -math.inf)
    assert lattice.forward() == [0.0, -1.0, -math.inf]
    assert lattice.backward() == [-math.inf, -math.inf, 0.0]


@given(st.dictionaries(WORDS, st.integers(1, 5), min_size=1), PIECES)
def test_likelihood_never_falls(words, log_probs):
    total = log_sum_exp(list(log_probs.values()))
    log_probs = {x: p - total for x, p in log_probs.items()}
    likelihoods = []
    for _ in range(4):
        log_probs, likelihood = expectation_maximization(words, log_probs)
        likelihoods.append(likelihood)
    for before, after in zip(likelihoods, likelihoods[1:]):  # noqa: RUF007 (two by two)
        assert after >= before - 1e-6 * abs(before)


def test_one_step_by_hand():
    """ "ab" is ab with 0.5, or a·b with 0.5 · 0.2 = 0.1: in five of six cases it is one piece."""
    log_probs = {"a": math.log(0.5), "b": math.log(0.2), "ab": math.log(0.5)}
    new, likelihood = expectation_maximization({"ab": 6}, log_probs)
    assert math.isclose(likelihood, 6 * math.log(0.6))
    probs = {x: math.exp(p) for x, p in new.items()}
    assert probs == pytest.approx({"a": 1 / 7, "b": 1 / 7, "ab": 5 / 7})
    # Without "ab", it would be a·b.
    assert losses(log_probs) == pytest.approx({"ab": 0.5 * math.log(0.5 / 0.1)})


def test_seeds():
    seeds = seed_pieces({"abab": 2, "x": 1}, 2)
    assert list(seeds) == ["a", "b", "x", "ab", "abab"]  # 4 · 2 and 2 · 4, above "aba" with 2 · 3
    assert math.isclose(sum(map(math.exp, seeds.values())), 1)


def test_the_most_useful_pieces_stay():
    stems = ["play", "walk", "jump", "cook", "help", "talk"]
    words = {stem + ending: 5 for stem in stems for ending in ["", "ing", "ed"]}
    characters = {character for word in words for character in word}
    pieces = learn_pieces(words, len(characters) + 8)
    assert len(pieces) == len(characters) + 8
    assert {*stems, *characters} <= pieces.keys()


# Encoding


def test_the_likeliest_spelling():
    pieces = {"international": -9.0, "ization": -8.0, "inter": -7.0, "nationalization": -12.0}
    tokenizer = with_pieces(**pieces)
    assert pieces_of(tokenizer, "internationalization") == ["international", "ization"]


def test_equal_spellings(tmp_path):
    """Of a·aa and aa·a, that with the longer last piece; Hugging Face takes it, too."""
    tokenizer = with_pieces(a=-2.0, aa=-2.0)
    assert pieces_of(tokenizer, "aaa") == ["a", "aa"]
    tokenizer.save(tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("aaa").ids == tokenizer.encode("aaa")


def test_unknown_characters():
    tokenizer = with_pieces(a=-1.0, bc=-2.0)
    assert pieces_of(tokenizer, "axya") == ["a", "<unk>", "a"]  # a run of them is one
    assert tokenizer.encode("x x") == [0, 0]  # but not across a space, which begins what follows
    assert UnigramTokenizer.train("abc", 300).encode("é") == [3 + 0xC3, 3 + 0xA9]


def test_spaces():
    tokenizer = with_pieces(a=-1.0, **{"▁a": -1.5, "▁": -3.0})
    assert pieces_of(tokenizer, "a a  a") == ["a", " a", " ", " a"]
    assert tokenizer.token_to_id(" a") == tokenizer.token_to_id("▁a") == 2
    assert WITH_UNKNOWN.encode("the") == WITH_UNKNOWN.encode(" the")
    assert WITH_UNKNOWN.decode(WITH_UNKNOWN.encode("the end")) == "the end"


def test_layout_of_ids():
    assert TRAINED.vocab_size == 700
    assert TRAINED.special_tokens == {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    assert TRAINED.decode_bytes([3 + 0xFF]) == b"\xff"
    assert TRAINED.token_to_id("<0x41>") == 3 + 0x41
    learned = [p for x, p in TRAINED.pieces.items() if x not in BYTES]
    assert learned == sorted(learned, reverse=True)
    assert math.isclose(sum(map(math.exp, learned)), 1, rel_tol=1e-3)
    assert {"▁the", "▁of"} <= TRAINED.pieces.keys()
    assert not any("\n" in x and len(x) > 1 for x in TRAINED.pieces)


def test_progress_ends_when_enough_pieces_are_dropped():
    calls = []
    UnigramTokenizer.train(
        CORPUS[:3000], 400, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] > 0


# Laws


@given(ANY_TEXT.filter(lambda text: "▁" not in text))
def test_any_text_round_trips(text):
    ids = TRAINED.encode_ordinary(text)
    assert TRAINED.decode(ids, errors="strict") == text
    stream = StreamDecoder(TRAINED)
    assert "".join([*map(stream.feed, ids), stream.finish()]) == text


@given(REAL)
def test_the_added_space_is_taken_away_once(text):
    ids = WITH_UNKNOWN.encode(text)
    stream = StreamDecoder(WITH_UNKNOWN)
    decoded = WITH_UNKNOWN.decode(ids)
    assert decoded == text.removeprefix(" ")
    assert "".join(map(stream.feed, ids)) + stream.finish() == decoded


@pytest.mark.parametrize("text", ["<0x41>", "<unk>", "a<0xZZ>", "▁"])
def test_text_that_looks_like_pieces(text):
    assert TRAINED.decode(TRAINED.encode_ordinary(text)) == text.replace("▁", " ")


def test_what_hugging_face_reads_otherwise(tmp_path):
    """A text that spells a byte's piece is that byte to their library: the exception that `save`
    and chapter 1 name."""
    tokenizers = pytest.importorskip("tokenizers")
    TRAINED.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.decode(theirs.encode("<0x41>").ids) == "A"
    assert TRAINED.decode(TRAINED.encode("<0x41>")) == "<0x41>"


@pytest.mark.parametrize("text", ["  \n", " ", "\n", "a"])
def test_white_space_is_text(text):
    trained = UnigramTokenizer.train(text, 300)
    assert trained.vocab_size == len(SPECIAL_TOKENS) + 256 + len(set(text))
    assert trained.decode(trained.encode(text)) == text
    assert max(trained.encode(text)) >= len(SPECIAL_TOKENS) + 256 - 1  # pieces, not bytes


def test_very_long_words():
    for text in ("x" * 20_000, " " * 20_000, "the" * 5000):
        assert TRAINED.decode(TRAINED.encode(text)) == text
    assert UnigramTokenizer.train("=" * 3000, 270).decode([269]) != ""


@pytest.mark.parametrize("ours", [TRAINED, WITH_UNKNOWN], ids=["bytes", "unknown"])
def test_hugging_face_gets_the_same_ids(tmp_path, ours):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (auto.unk_token, auto.eos_token, len(auto)) == ("<unk>", "</s>", ours.vocab_size)

    @given(ANY_TEXT | st.lists(REAL | st.sampled_from(SPECIAL_TOKENS)).map("".join))
    def on_any_text(text):
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids
        assert auto.encode(text) == ids
        if ours is TRAINED:
            assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)

    on_any_text()
    assert theirs.encode(CORPUS).ids == ours.encode(CORPUS)
    for save in (
        lambda: theirs.save(str(tmp_path / "tokenizer.json")),
        lambda: auto.save_pretrained(tmp_path),
    ):
        save()
        assert same(load(tmp_path), ours)


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_we_open_what_hugging_face_trains(tmp_path, scheme):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator(CORPUS.splitlines(), trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)
    assert isinstance(ours, UnigramTokenizer)
    for line in CORPUS.splitlines():
        assert ours.encode(line) == theirs.encode(line).ids


def same(first, second):
    return all(
        getattr(first, name) == getattr(second, name)
        for name in ("pieces", "token_ids", "special_tokens", "byte_fallback", "prefix_space")
    )


def test_save_and_load(tmp_path):
    trained = UnigramTokenizer.train("to be or not to be", 290, ["<s>", "<unk>"])
    assert trained.add_tokens(["<user>", "<s>"]) == [trained.vocab_size - 1, 0]
    trained.save(tmp_path)
    loaded = load(tmp_path)
    assert same(loaded, trained)
    text = "<s>to be é<user>"
    ids = loaded.encode(text, allowed_special="all")
    assert ids == trained.encode(text, allowed_special="all")
    assert loaded.decode(ids) == text
    tokenizers = pytest.importorskip("tokenizers")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UnigramTokenizer.train("", 300), ValueError, "empty text"),
        (lambda: UnigramTokenizer.train("<s>", 300), ValueError, "besides special tokens"),
        (lambda: UnigramTokenizer.train("ab", 260), ValueError, "at least 261 (259 special"),
        (lambda: UnigramTokenizer.train("ab", 300.0), TypeError, "vocab_size must be an integer"),
        (lambda: UnigramTokenizer.train("ab", 300, ["<s>"]), ValueError, "must have '<unk>'"),
        (lambda: UnigramTokenizer.train("ab", 300, ["<unk>", "<0x00>"]), ValueError, "byte"),
        (lambda: UnigramTokenizer.train(None, 300), TypeError, "must be str"),
        (lambda: with_pieces(), ValueError, "at least one piece"),
        (lambda: with_pieces(a=math.nan), ValueError, "'a' has the log probability nan: expected"),
        (lambda: with_pieces(a=-math.inf), ValueError, "'a' has the log probability -inf"),
        (lambda: with_pieces(a="-1"), ValueError, "'a' has the log probability '-1'"),
        (lambda: with_pieces(a=-1, **{"": -1}), ValueError, "'' has the log probability -1"),
        (lambda: with_pieces(a=-1, **{"<unk>": -1}), ValueError, "'<unk>' looks like an ordinary"),
        (lambda: with_pieces(a=-1, **{"\udc00": -1}), ValueError, "surrogate pair"),
        (lambda: TRAINED.encode("a </s>"), ValueError, "special token '</s>'"),
        (lambda: TRAINED.encode("a", allowed_special=["[EOS]"]), ValueError, "no special token"),
        (lambda: TRAINED.encode("\udc00"), ValueError, "surrogate pair"),
        (lambda: TRAINED.decode([700]), IndexError, "ids are 0..699"),
        (lambda: TRAINED.decode([3 + 0xFF], "strict"), ValueError, "no UTF-8 at byte offset 0"),
        (lambda: TRAINED.add_tokens([" the"]), ValueError, "ordinary token already"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_vocab(content, edit):
    edit(content["model"]["vocab"])
    return content


EDITS = {
    "normalizer is of another kind": lambda c: c | {"normalizer": {"type": "NFKC"}},
    "pre_tokenizer is of another kind": lambda c: c | {"pre_tokenizer": None},
    "each with its log probability": lambda c: edit_vocab(c, lambda v: v.append(["x"])),
    "expected a vocab of different pieces": lambda c: edit_vocab(c, lambda v: v.append(v[-1])),
    "different pieces, each": lambda c: edit_vocab(c, lambda v: v.append(["zqz", math.nan])),
    "each id 0..": lambda c: c | {"added_tokens": [{"content": "new", "id": 800}]},
    "has two ids": lambda c: c | {"added_tokens": [{"content": "<unk>", "id": 1}]},
    "each with its log prob": lambda c: edit_vocab(c, lambda v: v.__setitem__(0, ["<unk>", "0"])),
    "pieces, each with its log": lambda c: edit_vocab(c, lambda v: v[-1].__setitem__(1, -1e300)),
    "a vocab of different pieces, each": lambda c: c["model"].update(vocab={"a1": 1}) or c,
    "different pieces": lambda c: c["model"].update(vocab=[]) or c,
    "unk_id is 7: expected the id of '<unk>'": lambda c: c["model"].update(unk_id=7) or c,
    "byte_fallback to be true": lambda c: c["model"].update(byte_fallback="yes") or c,
    "must have '<unk>'": lambda c: edit_vocab(c, lambda v: v.__setitem__(0, ["zqz", 0.0])),
    "no '<0x02>'": lambda c: edit_vocab(c, lambda v: v.__setitem__(5, ["zqz", 0.0])),
    "expected Unigram": lambda c: c["model"].update(type="WordLevel") or c,
}


@pytest.mark.parametrize("message", EDITS)
def test_an_edited_file(tmp_path, message):
    TRAINED.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if message.startswith("must have"):
        content["added_tokens"] = content["added_tokens"][1:]
    path.write_text(json.dumps(EDITS[message](content)), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        UnigramTokenizer.load(tmp_path)
    assert message in str(caught.value) and "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_file_cut_short(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("cut")
    TRAINED.save(folder)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not"):
        load(folder)


def test_training_says_at_once_that_the_unknown_token_is_missing():
    calls = []
    with pytest.raises(ValueError, match="must have '<unk>'"):
        UnigramTokenizer.train("ab ab", 300, ["<s>"], progress=lambda *c: calls.append(c))
    assert not calls
