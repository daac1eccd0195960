"""WordPiece: the score by hand and by a naive trainer, and Hugging Face's ids for what we save."""

import json
import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import old_text, real_words

from tinygrad_llm.data import embedded_corpus
from tinygrad_llm.tokenizer import StreamDecoder, WordPieceTokenizer, load
from tinygrad_llm.tokenizer.wordpiece import SPECIAL_TOKENS, learn_pieces, normalize, split_words

CORPUS = embedded_corpus()[:60_000]
TRAINED = WordPieceTokenizer.train(CORPUS, 600, min_frequency=10)
CASED = WordPieceTokenizer.train(CORPUS, 600, min_frequency=10, lowercase=False)
REAL = real_words(CORPUS[:5000])


def with_pieces(*pieces: str) -> WordPieceTokenizer:
    return WordPieceTokenizer({piece: i for i, piece in enumerate(pieces, 1)}, {"[UNK]": 0})


# Encoding


def pieces_of(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_longest_match_first():
    tokenizer = with_pieces("un", "##happi", "##happiness", "##ness", "happiness")
    assert pieces_of(tokenizer, "unhappiness") == ["un", "##happiness"]
    assert pieces_of(tokenizer, "Happiness unhappi") == ["happiness", "un", "##happi"]
    assert tokenizer.decode(tokenizer.encode("unhappiness happiness")) == "unhappiness happiness"


def test_greedy_may_miss_a_spelling():
    """ "abc" could be "a" and "##bc", but "ab" is longer and leaves "##c", which is no piece."""
    tokenizer = with_pieces("a", "ab", "##bc")
    assert pieces_of(tokenizer, "abc ab") == ["[UNK]", "ab"]


def test_unknown_words_and_long_ones():
    assert pieces_of(with_pieces("a", "##a"), "a b " + "a" * 101) == ["a", "[UNK]", "[UNK]"]
    assert len(with_pieces("a", "##a").encode("a" * 100)) == 100


def test_words():
    assert split_words("It's Café-time, 你好!\x00\u2028$5") == [
        *["it", "'", "s", "cafe", "-", "time", ",", "你", "好", "!", "$", "5"],
    ]
    assert split_words("Café", lowercase=False) == ["Café"]
    assert normalize("a\tb\x07c") == "a bc"


# Training


def test_score_by_hand():
    """Counts: h 15, ##u 36, p 17, b 4, ##g 20, ##n 16, ##s 5; the pair (##g, ##s) scores highest,
    5 / (20 * 5) = 0.05, above (##u, ##g) with 20 / (36 * 20), although that is more frequent."""
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    learned = learn_pieces(words, 10)
    assert learned[:7] == ["##g", "##n", "##s", "##u", "b", "h", "p"]
    assert learned[7:] == ["##gs", "hu", "hugs"]


def test_the_score_is_the_gain_in_likelihood_of_an_occurrence():
    """As `learn_pieces` derives it, but with the likelihood of the whole text added up by pieces;
    the pair with the largest gain for the whole text is another, the most frequent one here."""
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    spelled = [([word[0], *("##" + c for c in word[1:])], n) for word, n in words.items()]
    counts, pairs = Counter(), Counter()
    for pieces, n in spelled:
        counts.update({piece: n for piece in pieces})  # no word has a letter twice
        pairs.update({pair: n for pair in pairwise(pieces)})
    total = sum(counts.values())

    def log_likelihood(joined=None):
        """Of the text, with one pair joined to a piece of its own."""
        result = 0.0
        for pieces, n in spelled:
            result += n * sum(math.log(counts[piece] / total) for piece in pieces)
            if joined in pairwise(pieces):
                result -= n * sum(math.log(counts[piece] / total) for piece in joined)
                result += n * math.log(pairs[joined] / total)
        return result

    gain = {pair: log_likelihood(pair) - log_likelihood() for pair in pairs}
    score = {(a, b): n / (counts[a] * counts[b]) for (a, b), n in pairs.items()}
    for pair, n in pairs.items():
        assert gain[pair] / n == pytest.approx(math.log(total) + math.log(score[pair]))
    assert max(pairs, key=lambda pair: gain[pair] / pairs[pair]) == ("##g", "##s")
    assert learn_pieces(words, 8)[-1] == "##gs"
    assert max(pairs, key=gain.__getitem__) == ("##u", "##g") == max(pairs, key=pairs.__getitem__)


def naive_pieces(word_counts, n_pieces, min_frequency):
    """Counts everything anew for every piece."""
    words = {word: [word[0], *("##" + c for c in word[1:])] for word in word_counts}
    pieces = dict.fromkeys(sorted({piece for word in words.values() for piece in word}))
    appeared: dict = {}
    while len(pieces) < n_pieces:
        counts, pairs = Counter(), Counter()
        for word, count in word_counts.items():
            for piece in words[word]:
                counts[piece] += count
            for pair in pairwise(words[word]):
                appeared.setdefault(pair)
                pairs[pair] += count
        left = [pair for pair in appeared if pairs[pair] >= min_frequency]
        if not left:
            break
        a, b = max(left, key=lambda pair: pairs[pair] / (counts[pair[0]] * counts[pair[1]]))
        pieces.setdefault(a + b[2:])
        for word, parts in words.items():
            joined = []
            for part in parts:
                if joined and (joined[-1], part) == (a, b):
                    joined[-1] = a + b[2:]
                else:
                    joined.append(part)
            words[word] = joined
    return list(pieces)


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 5), max_size=8),
    st.integers(1, 3),
)
def test_pieces_equal_the_naive_trainer(words, min_frequency):
    assert learn_pieces(words, 30, min_frequency) == naive_pieces(words, 30, min_frequency)


def test_pieces_equal_the_naive_trainer_on_real_text():
    words = Counter(split_words(CORPUS[:10_000]))
    assert learn_pieces(words, 150, 2) == naive_pieces(words, 150, 2)


def test_layout_of_ids():
    assert TRAINED.vocab_size == 600
    assert TRAINED.special_tokens == {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    assert TRAINED.token_to_id("!") == 5
    assert TRAINED.token_to_id("[SEP]") == 3
    assert {"a", "##e", "python"} <= TRAINED.vocab.keys()


def test_training_stops_when_no_pair_is_left():
    calls = []
    trained = WordPieceTokenizer.train(
        "ab ab", 100, ["[UNK]"], progress=lambda done, total: calls.append((done, total))
    )
    assert trained.vocab == {"##b": 1, "a": 2, "ab": 3}
    assert calls == [(3, 99)]


# Laws


@given(REAL)
def test_words_round_trip(text):
    ids = TRAINED.encode(text)
    words = split_words(text)
    assert split_words(TRAINED.decode(ids)) == words
    assert TRAINED.encode(TRAINED.decode(ids)) == ids
    assert TRAINED.encode_array(text).tolist() == ids
    stream = StreamDecoder(TRAINED)
    assert "".join(map(stream.feed, ids)) + stream.finish() == TRAINED.decode(ids)


@pytest.mark.parametrize("ours", [TRAINED, CASED], ids=["lowercase", "cased"])
def test_hugging_face_gets_the_same_ids(tmp_path, ours):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (auto.unk_token, auto.mask_token, len(auto)) == ("[UNK]", "[MASK]", 600)

    @given(REAL | old_text() | st.lists(REAL | st.sampled_from(SPECIAL_TOKENS)).map(" ".join))
    def on_any_text(text):
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids
        assert auto.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)

    on_any_text()
    for save in (
        lambda: theirs.save(str(tmp_path / "tokenizer.json")),
        lambda: auto.save_pretrained(tmp_path),
    ):
        save()
        assert same(load(tmp_path), ours)


def test_we_open_what_hugging_face_trains(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.BertWordPieceTokenizer()
    theirs.train_from_iterator([CORPUS], 500, show_progress=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load(tmp_path)
    assert isinstance(ours, WordPieceTokenizer)
    assert ours.encode(CORPUS) == theirs.encode(CORPUS, add_special_tokens=False).ids


def same(first, second):
    return (
        type(first) is type(second)
        and first.vocab == second.vocab
        and first.special_tokens == second.special_tokens
        and first.lowercase == second.lowercase
    )


@pytest.mark.parametrize("lowercase", [False, True])
def test_save_and_load(tmp_path, lowercase):
    trained = WordPieceTokenizer.train("Some TEXT", 40, ["[UNK]", "<user>"], lowercase)
    assert trained.add_tokens(["<bot>", "<user>"]) == [trained.vocab_size - 1, 1]
    trained.save(tmp_path)
    assert same(load(tmp_path), trained)
    assert same(WordPieceTokenizer.load(tmp_path), trained)


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WordPieceTokenizer.train(" ", 10), ValueError, "empty text"),
        (lambda: WordPieceTokenizer.train("  \n", 10), ValueError, "white space"),
        (lambda: WordPieceTokenizer.train("\x00", 10), ValueError, "control characters"),
        (lambda: WordPieceTokenizer.train("[UNK]", 10), ValueError, "empty text"),
        (lambda: WordPieceTokenizer.train("ab", 6), ValueError, "at least 7 (5 special tokens and"),
        (lambda: WordPieceTokenizer.train("ab", 9.0), TypeError, "vocab_size must be an integer"),
        (lambda: WordPieceTokenizer.train("ab", 9, ["[PAD]"]), ValueError, "must have '[UNK]'"),
        (lambda: WordPieceTokenizer.train("ab", 9, ["[UNK]", "##b"]), ValueError, "choose another"),
        (lambda: WordPieceTokenizer.train(b"ab", 9), TypeError, "must be str"),
        (lambda: with_pieces("a", "[UNK]"), ValueError, "'[UNK]' looks like an ordinary one"),
        (lambda: with_pieces("a", "\udc00"), ValueError, "surrogate pair"),
        (lambda: with_pieces("a", 1), TypeError, "must be str, got int"),
        (lambda: TRAINED.encode("a [MASK]"), ValueError, "special token '[MASK]'"),
        (lambda: TRAINED.encode("a", allowed_special=["[EOS]"]), ValueError, "no special token"),
        (lambda: TRAINED.encode("\udc00"), ValueError, "surrogate pair"),
        (lambda: TRAINED.decode([600]), IndexError, "ids are 0..599"),
        (lambda: TRAINED.end_of_text, ValueError, "not one token"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


EDITS = {
    "is of another kind": lambda c: c | {"normalizer": None},
    "pre_tokenizer is of another kind": lambda c: c | {"pre_tokenizer": {"type": "Whitespace"}},
    "must have '[UNK]'": lambda c: c | {"added_tokens": []},
    "each id 0..598 once": lambda c: c["model"]["vocab"].pop("##e") and c,
    "'[CLS]' has two ids, 2 and 3": lambda c: c["added_tokens"][2].update(id=3) or c,
    "half a surrogate": lambda c: c["model"]["vocab"].update({"\ud83d": 600}) or c,
    "each id 0..": lambda c: c["model"]["vocab"].update({"##e": 10**30}) or c,
    "whole number": lambda c: c["model"]["vocab"].update({"##e": "1"}) or c,
    "vocab to map tokens": lambda c: c["model"].update(vocab=[]) or c,
    "continuing_subword_prefix": lambda c: c["model"].update(continuing_subword_prefix="@@") or c,
    "expected WordPiece": lambda c: c["model"].update(type="BPE") or c,
    "type 'unknown'": lambda c: c | {"model": None},
    "added_tokens with a content": lambda c: c | {"added_tokens": [5]},
}


@pytest.mark.parametrize("message", EDITS)
def test_an_edited_file(tmp_path, message):
    TRAINED.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = EDITS[message](json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        WordPieceTokenizer.load(tmp_path)
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
    with pytest.raises(ValueError, match=r"must have '\[UNK\]'"):
        WordPieceTokenizer.train("ab ab", 100, ["[PAD]"], progress=lambda *c: calls.append(c))
    assert not calls
