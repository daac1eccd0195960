"""Generation: which token is chosen, when it ends, and that the model is left as it was."""

from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinygrad_llm import Tensor, is_grad_enabled
from tinygrad_llm.checkpoint import save_model
from tinygrad_llm.generate import (
    Sampler,
    StopStrings,
    beam_search,
    generate,
    min_p,
    repetition_penalty,
    stream,
    stream_text,
    temperature,
    top_k,
    top_p,
)
from tinygrad_llm.generate.sampling import probabilities, seen_tokens
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import Module
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import BPETokenizer

seeds = st.integers(0, 2**32 - 1)
CONFIG = GPTConfig(vocab_size=11, context_length=6, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.5)


@pytest.fixture
def model():
    return GPT(CONFIG, Generator(1))


class Fixed(Module):
    """Gives the same logits whatever comes in, and remembers what came in."""

    def __init__(self, logits, context_length=100):
        self.logits = np.asarray(logits, np.float32)
        self.cfg = SimpleNamespace(context_length=context_length, vocab_size=self.logits.size)
        self.seen = []

    def forward(self, ids):
        self.seen.append((np.array(ids), self.training, is_grad_enabled()))
        return Tensor(np.broadcast_to(self.logits, (*ids.shape, self.logits.shape[-1])))


def test_greedy_follows_the_largest_logit(model):
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    model.eval()
    expected = ids
    for _ in range(5):
        logits = model(expected[:, -CONFIG.context_length :]).data
        expected = np.concatenate([expected, logits[:, -1].argmax(-1)[:, None]], axis=1)
    found = generate(model, ids, 5, temperature=0)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_stream_yields_what_generate_appends(model):
    text = generate(model, [1, 2], 9, temperature=0.9, top_k=5, generator=Generator(3))
    ids = stream(model, [1, 2], 9, temperature=0.9, top_k=5, generator=Generator(3))
    assert list(ids) == text[0, 2:].tolist()


def test_stream_computes_a_token_only_when_it_is_asked_for():
    model = Fixed([0, 1])
    ids = stream(model, [0], 5, temperature=0)
    assert model.seen == []
    next(ids)
    assert len(model.seen) == 1


def test_the_same_seed_gives_the_same_text(model):
    first, same, other = (
        generate(model, [1], 20, generator=Generator(seed)).tolist() for seed in (5, 5, 6)
    )
    assert first == same != other


def test_modes_and_gradients_are_as_before(model):
    model.drop_emb.eval()  # one module in another mode than the rest
    modes = [module.training for module in model.modules()]
    ids = stream(model, [1], 3)
    next(ids)
    assert is_grad_enabled()  # while the caller holds a token, too
    list(ids)
    assert [module.training for module in model.modules()] == modes
    spy = Fixed([0, 1])
    generate(spy, [[0]], 1)
    assert [(training, grad) for _, training, grad in spy.seen] == [(False, False)]
    assert spy.training


def test_the_model_sees_its_context_length_only():
    model = Fixed(np.eye(9)[7], context_length=3)
    generate(model, [[1, 2, 3, 4, 5]], 2, temperature=0)
    assert [ids.tolist() for ids, _, _ in model.seen] == [[[3, 4, 5]], [[4, 5, 7]]]


def test_temperature_and_top_k_give_these_frequencies():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    ids = np.zeros((20_000, 1), int)

    def frequencies(**options):
        chosen = generate(Fixed(logits), ids, 1, generator=Generator(0), **options)[:, 1]
        counts = Counter(chosen.tolist())
        return [counts[i] / len(ids) for i in range(4)]

    np.testing.assert_allclose(frequencies(), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=2), [0.625, 0.375, 0, 0], atol=0.015)
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), squares / squares.sum(), atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=4), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(frequencies(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(min_p=0.5), [0.625, 0.375, 0, 0], atol=0.015)
    assert frequencies(temperature=1e-300) == [1, 0, 0, 0]
    assert frequencies(top_k=1, temperature=9.0) == [1, 0, 0, 0]


def test_stop_id_ends_the_text_before_it():
    assert list(stream(Fixed([0, 0, 5]), [0], 9, temperature=0, stop_id=2)) == []
    assert generate(Fixed([0, 0, 5]), [0], 9, temperature=0, stop_id=2).tolist() == [[0]]
    assert list(stream(Fixed([0, 0, 5]), [0], 3, temperature=0, stop_id=1)) == [2, 2, 2]


def test_no_new_tokens_is_fine(model):
    assert generate(model, [1, 2], 0).tolist() == [[1, 2]]
    assert list(stream(model, [1, 2], 0)) == []


@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize(
    ("ids", "options", "error", "says"),
    [
        (
            [[1]],
            {"temperature": -0.1},
            ValueError,
            "temperature must be a number from 0 on, got -0.1",
        ),
        (
            [[1]],
            {"temperature": float("nan")},
            ValueError,
            "temperature must be a number from 0 on, got nan",
        ),
        ([[1]], {"top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ([[1]], {"top_k": 2.0}, ValueError, "top_k must be a positive integer, got 2.0"),
        ([[1]], {"top_k": np.inf}, ValueError, "top_k must be a positive integer, got inf"),
        ([[1]], {"vocab_size": 7.0}, ValueError, "vocab_size must be a positive integer, got 7.0"),
        (
            [[1]],
            {"top_k": 12},
            ValueError,
            "top_k must be at most 11, the number of tokens, got 12",
        ),
        ([[1]], {"top_k": 8, "vocab_size": 7}, ValueError, "top_k must be at most 7"),
        ([[1]], {"vocab_size": 12}, ValueError, "vocab_size 12 is more than the model's 11"),
        ([[1]], {"vocab_size": 0}, ValueError, "vocab_size must be a positive integer, got 0"),
        ([[1]], {"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ([[1]], {"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, got 1.01"),
        ([[1]], {"min_p": -0.1}, ValueError, "min_p must be a number from 0 to 1, got -0.1"),
        ([[1]], {"min_p": float("nan")}, ValueError, "min_p must be a number from 0 to 1, got nan"),
        ([[1]], {"repetition_penalty": 0}, ValueError, "repetition_penalty must be .* above 0"),
        ([[1]], {"stop_id": 11}, ValueError, r"stop_id 11 is no token: ids are 0\.\.10"),
        ([[1]], {"stop_id": [3, -1]}, ValueError, "stop_id -1 is no token"),
        ([[1]], {"stop_id": [1.5]}, ValueError, "stop_id 1.5 is no token"),
        ([[1]], {"max_new_tokens": -1}, ValueError, "must be an integer from 0 on, got -1"),
        ([[1]], {"max_new_tokens": 2.0}, ValueError, "must be an integer from 0 on, got 2.0"),
        *(
            ([[1]], {name: value}, ValueError, f"{name} must be .*, got {value!r}")
            for name, values in {
                "temperature": ["a", None, True, 1j],
                "repetition_penalty": ["a", None, True],
                "top_p": ["x", True],
                "min_p": ["x", True],
                "top_k": ["3", 1.5, True],
                "vocab_size": ["3", True],
                "max_new_tokens": ["3", None, 1.5, True],
            }.items()
            for value in values
        ),
        ([[1]], {"stop_id": True}, ValueError, "stop_id True is no token"),
        ([[1]], {"stop_id": 1.5}, ValueError, "stop_id 1.5 is no token"),
        ([], {}, ValueError, "the prompt is empty"),
        ([[]], {}, ValueError, "the prompt is empty"),
        ([[[1]]], {}, ValueError, r"shape \(T,\) or \(B, T\), not \(1, 1, 1\)"),
        ([[1.5]], {}, TypeError, "ids must be integers, not float64"),
    ],
)
def test_wrong_arguments_are_named_at_once(model, function, ids, options, error, says):
    with pytest.raises(error, match=says) as caught:
        function(model, ids, **{"max_new_tokens": 1, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [generate, stream, beam_search])
@pytest.mark.parametrize("model", [None, Module(), lambda ids: ids])
def test_a_model_that_does_not_say_its_sizes(function, model):
    with pytest.raises(TypeError, match=r"needs cfg\.context_length and cfg\.vocab_size"):
        function(model, [1], 1)


def test_numpys_numbers_are_numbers(model):
    options = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float32(0.5)}
    assert generate(model, [1], np.int64(2), **options, stop_id=np.uint8(3)).shape[0] == 1


def test_ids_outside_the_vocabulary(model):
    with pytest.raises(IndexError, match="11"):
        generate(model, [[11]], 1)


def test_stream_takes_one_prompt(model):
    with pytest.raises(ValueError, match="one prompt, not 2"):
        stream(model, [[1], [2]], 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad):
    with pytest.raises(FloatingPointError, match="nan or infinite"):
        generate(Fixed([0.0, bad]), [[0]], 1)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(temperature):
    model = GPT(GPTConfig(50, 8, 8, 2, 1), Generator(0))
    ids = generate(model, [1], 60, temperature, None, Generator(0), vocab_size=3)
    assert ids.max() < 3


# --- several stop ids, prompts of different lengths -----------------------------------------------


class AddOne(Fixed):
    """After the id n comes n + 1."""

    def __init__(self, vocab_size=9):
        super().__init__(np.zeros(vocab_size))

    def forward(self, ids):
        n = self.cfg.vocab_size
        return Tensor(np.eye(n, dtype=np.float32)[(np.asarray(ids) + 1) % n])


def test_each_row_ends_at_its_own_stop_id():
    """An array's rows are filled up with it; a list's end before it, of one length or not."""
    options = {"temperature": 0, "stop_id": [7, 4]}
    found = generate(AddOne(), np.array([[5], [2], [0]]), 20, **options)
    assert found.tolist() == [[5, 6, 7, 7], [2, 3, 4, 4], [0, 1, 2, 3]]
    for prompts in ([[5], [2], [0]], ([5], np.array([2]), (0,))):
        found = generate(AddOne(), prompts, 20, **options)
        assert isinstance(found, list)
        assert [row.tolist() for row in found] == [[5, 6], [2, 3], [0, 1, 2, 3]]
    assert list(stream(AddOne(), [5], 20, temperature=0, stop_id=(1, 7))) == [6]


def test_prompts_of_different_lengths_are_continued_as_alone():
    model = GPT(CONFIG, Generator(1), init="torch")
    prompts = [[1], [2, 3, 4], [5, 6, 7, 8, 9, 10, 0, 1]]  # the last one exceeds the context
    for new in (0, 1, 9):
        found = generate(model, prompts, new, temperature=0)
        alone = [generate(model, [prompt], new, temperature=0)[0] for prompt in prompts]
        assert [row.tolist() for row in found] == [row.tolist() for row in alone]


@given(stop=st.sets(st.integers(0, 10), max_size=4), penalty=st.sampled_from([1.0, 1.7, 0.6]))
@settings(max_examples=20)
def test_prompts_of_different_lengths_end_as_alone(stop, penalty):
    model = GPT(CONFIG, Generator(1), init="torch")
    prompts = [[1], [2, 3, 4], [0, 6]]
    options = {"temperature": 0, "stop_id": stop, "repetition_penalty": penalty}
    found = generate(model, prompts, 8, **options)
    alone = [[*prompt, *stream(model, prompt, 8, **options)] for prompt in prompts]
    assert [row.tolist() for row in found] == alone


def test_what_is_wrong_with_several_prompts(model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(model, [[1], []], 1)
    with pytest.raises(TypeError, match="ids must be integers, not float64"):
        generate(model, [[1], [1, 0.5]], 1)
    with pytest.raises(ValueError, match="need a model with new_cache"):
        generate(AddOne(), [[1], [1, 2]], 1)


# --- what is done to the logits -------------------------------------------------------------------

BOOK = np.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])  # Raschka, chapter 5
CLOSER, FORWARD, PIZZA, TOWARD = 0, 3, 6, 7


def test_the_books_numbers():
    chances = probabilities(top_k(BOOK, 3))[0]
    np.testing.assert_allclose(
        chances[[CLOSER, FORWARD, TOWARD]], [0.0615, 0.5775, 0.3610], atol=5e-5
    )
    assert np.count_nonzero(chances) == 3
    assert probabilities(temperature(BOOK, 5.0))[0, PIZZA] == pytest.approx(0.0430, abs=5e-5)


def test_the_books_draws():
    """1,000 draws from each temperature, as it prints them."""
    for t, counts in {
        1.0: [73, 0, 0, 582, 2, 0, 0, 343, 0],
        0.1: [0, 0, 0, 985, 0, 0, 0, 15, 0],
        5.0: [165, 75, 42, 239, 71, 46, 32, 227, 103],
    }.items():
        draw = Sampler(t, generator=Generator(123))
        drawn = [draw(BOOK.astype(np.float32), np.zeros((1, 1), int))[0] for _ in range(1000)]
        assert np.bincount(drawn, minlength=9).tolist() == counts


def test_ties_are_kept_in_every_row():
    logits = np.array([[1.0, 3, 3, 3, 2], [5, 4, 3, 2, 1]])
    np.testing.assert_array_equal(np.isfinite(top_k(logits, 2)), [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(np.isfinite(min_p(logits, 1)), [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    even = np.zeros((2, 4))
    np.testing.assert_array_equal(np.isfinite(top_p(even, 0.6)), [[0, 1, 1, 1]] * 2)
    np.testing.assert_array_equal(np.isfinite(top_p(even, 0.5)), [[0, 0, 1, 1]] * 2)
    np.testing.assert_array_equal(np.isfinite(top_p(even, 1e-9)), [[0, 0, 0, 1]] * 2)


some_logits = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-40, 40).map(lambda n: n / 8))
)  # few values: ties are common


@given(some_logits, st.data())
def test_each_function_is_transformers(logits, data):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.generation.logits_process")
    B, V = logits.shape
    t = data.draw(st.floats(0.05, 9))
    k = data.draw(st.integers(1, V))
    p = data.draw(st.floats(0.01, 1, exclude_max=True))
    penalty = data.draw(st.floats(0.1, 3))
    ids = data.draw(arrays(np.int64, (B, 3), elements=st.integers(0, V - 1)))
    x = torch.from_numpy(logits)

    def same(ours, processor):
        expected = processor(torch.from_numpy(ids), x).numpy()
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
        np.testing.assert_allclose(probabilities(ours), probabilities(expected), atol=1e-13)

    same(temperature(logits, t), theirs.TemperatureLogitsWarper(t))
    same(top_k(logits, k), theirs.TopKLogitsWarper(k))
    same(min_p(logits, p), theirs.MinPLogitsWarper(p))
    seen = seen_tokens(ids, None, V)
    ours = repetition_penalty(logits, seen, penalty)
    same(ours, theirs.RepetitionPenaltyLogitsProcessor(penalty))
    # Of tied tokens either may be in the nucleus, so without ties:
    logits = logits + np.arange(V) / 1000
    x = torch.from_numpy(logits)
    same(top_p(logits, p), theirs.TopPLogitsWarper(p))


@given(some_logits.filter(lambda x: x.shape[1] > 1), st.data())
def test_all_together_are_transformers(logits, data):
    """In its order, with the settings of generate."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.generation.logits_process")
    B, V = logits.shape
    logits = logits + np.arange(V) / 1000
    ids = data.draw(arrays(np.int64, (B, 3), elements=st.integers(0, V - 1)))
    options = {
        "repetition_penalty": data.draw(st.floats(0.5, 2)),
        "temperature": data.draw(st.floats(0.1, 4)),
        "top_k": data.draw(st.integers(1, V)),
        "top_p": data.draw(st.floats(0.05, 0.99)),
        "min_p": data.draw(st.floats(0, 0.9)),
    }
    r, t, k, p, m = options.values()
    expected = theirs.LogitsProcessorList([
        theirs.RepetitionPenaltyLogitsProcessor(r), theirs.TemperatureLogitsWarper(t),
        theirs.TopKLogitsWarper(k), theirs.TopPLogitsWarper(p), theirs.MinPLogitsWarper(m),
    ])(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()  # fmt: skip
    found = Sampler(**options).logits(logits, ids)
    np.testing.assert_allclose(probabilities(found), probabilities(expected), atol=1e-13)


@given(some_logits, st.data())
def test_the_nucleus_is_the_smallest_set_that_is_likely_enough(logits, data):
    p = data.draw(st.floats(0.01, 0.99))
    for chances, kept in zip(probabilities(logits), np.isfinite(top_p(logits, p))):
        assert chances[kept].sum() >= p - 1e-12
        assert chances[kept].sum() - chances[kept].min() < p + 1e-12
        assert chances[~kept].max(initial=0) <= chances[kept].min()


def test_the_padding_is_no_text_that_could_be_repeated():
    ids, padding = np.array([[0, 0, 2], [0, 1, 2]]), np.array([2, 0])
    np.testing.assert_array_equal(seen_tokens(ids, padding, 3), [[0, 0, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: temperature(x, 0), "temperature must be above 0"),
        (lambda x: temperature(x, -1), "temperature must be a number from 0 on"),
        (lambda x: top_k(x, 10), "top_k must be at most 9"),
        (lambda x: top_k(x, 0), "top_k must be a positive integer"),
        (lambda x: top_p(x, 0), "top_p must be above 0"),
        (lambda x: min_p(x, 2), "min_p must be a number from 0 to 1"),
        (lambda x: repetition_penalty(x, x > 0, np.nan), "repetition_penalty must be"),
    ],
)
def test_each_function_refuses_what_makes_no_sense(call, says):
    with pytest.raises(ValueError, match=says):
        call(BOOK)


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1, 2])
def pair(request, tmp_path_factory):
    """A random tiny model, ours and as transformers opens it."""
    transformers = pytest.importorskip("transformers")
    cfg = GPTConfig(vocab_size=17, context_length=24, emb_dim=16, n_heads=2, n_layers=2)
    ours = GPT(cfg, Generator(request.param), init="torch").eval()
    directory = tmp_path_factory.mktemp("model")
    save_model(ours, directory)
    return ours, transformers.GPT2LMHeadModel.from_pretrained(directory).eval()


def theirs_of(model, ids, new, **options):
    torch = pytest.importorskip("torch")
    ids = torch.tensor([ids])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, bos_token_id=None,
            return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("stops", [None, [3], [3, 5, 11]])
def test_greedy_is_transformers(pair, penalty, stops):
    ours, theirs = pair
    for prompt in ([1], [4, 8, 2], [7] * 5):
        options = {"repetition_penalty": penalty, "eos_token_id": stops}
        expected = theirs_of(theirs, prompt, 15, **options).sequences[0].tolist()[len(prompt) :]
        found = list(stream(ours, prompt, 15, 0, stop_id=stops, repetition_penalty=penalty))
        if stops and expected[-1] in stops:
            expected = expected[:-1]
        assert found == expected


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("stops", [None, [3], [3, 5, 11]])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_is_transformers(pair, beams, stops, length_penalty, early_stopping):
    if beams == 1:
        length_penalty, early_stopping = 1.0, False
    ours, theirs = pair
    prompt, options = [1, 4], {}
    if beams > 1:
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        options["num_return_sequences"] = beams
    expected = theirs_of(theirs, prompt, 8, num_beams=beams, eos_token_id=stops, **options)
    found = beam_search(
        ours, prompt, 8, beams, beams, length_penalty, early_stopping, stop_id=stops
    )
    texts = []
    for row in expected.sequences[:, 2:].tolist():
        ends = [i for i, token in enumerate(row) if token in (stops or ())]
        texts.append(prompt + row[: ends[0] if ends else 8])
    assert [beam.ids.tolist() for beam in found] == texts
    if beams > 1:
        scores = [beam.score for beam in found]
        np.testing.assert_allclose(scores, expected.sequences_scores, rtol=1e-4)


class Table(Fixed):
    """The logits depend on the last token only: row i of a table (V, V) follows token i."""

    def __init__(self, table):
        super().__init__(table[0])
        self.table = table

    def forward(self, ids):
        return Tensor(self.table[ids])


@given(seed=seeds, beams=st.integers(2, 6), stops=st.integers(1, 5), penalty=st.floats(-1, 4))
def test_as_many_beams_go_on_however_many_texts_end(seed, beams, stops, penalty):
    """Every stop id, 0 to stops - 1, is likelier than any other token."""
    V, new = 8, 4
    table = np.random.default_rng(seed).random((V, V))
    table[:, :stops] += 1
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    kept, done = [(0.0, (7,))], []
    for n in range(1, new + 1):
        longer = [
            (total + log_p[text[-1], token], (*text, token))
            for total, text in kept
            for token in range(V)
        ]
        longer.sort(reverse=True)
        done += [
            (total / n**penalty, text[:-1] if text[-1] < stops else text)
            for total, text in longer[:beams]
            if text[-1] < stops or n == new
        ]
        done = sorted(done, reverse=True)[:beams]
        kept = [(total, text) for total, text in longer if text[-1] >= stops][:beams]
        if len(done) == beams and kept[0][0] / n**penalty <= done[-1][0]:
            break
    found = beam_search(Table(table), [7], new, beams, beams, penalty, stop_id=range(stops))
    assert [tuple(beam.ids) for beam in found] == [text for _, text in done]
    scores = [beam.score for beam in found]
    np.testing.assert_allclose(scores, [score for score, _ in done], rtol=1e-12)


@given(seed=st.integers(0, 999), stop=st.sampled_from([None, 2]), new=st.integers(1, 4))
@settings(max_examples=15)
def test_with_a_beam_for_every_text_the_search_is_exhaustive(seed, stop, new):
    """Also past the context length, which is 3 here."""
    V, prompt = 3, [1, 0]
    model = GPT(GPTConfig(V, 3, 8, 2, 1), Generator(seed), init="torch").eval()
    texts = {}
    for following in product(range(V), repeat=new):
        if stop in following:
            following = following[: following.index(stop) + 1]
        ids, total = list(prompt), 0.0
        for token in following:
            x = model([ids[-3:]]).data[0, -1].astype(float)
            total += x[token] - np.log(np.exp(x).sum())
            ids.append(token)
        text = tuple(ids[:-1] if stop in following else ids)
        texts[text, stop in following] = total / len(following)
    found = beam_search(model, prompt, new, V**new, V**new, stop_id=stop)
    best = sorted(texts.items(), key=lambda item: -item[1])
    assert found[0].score == pytest.approx(best[0][1], abs=1e-5)
    assert found[0].ids.tolist() == list(best[0][0][0])
    if stop is None:
        scores = [beam.score for beam in found]
        np.testing.assert_allclose(scores, [score for _, score in best], atol=1e-5)


def test_beam_search_of_one_beam_is_greedy_and_more_find_likelier_texts(model):
    greedy = generate(model, [1, 2], 9, temperature=0)[0]
    (one,) = beam_search(model, [1, 2], 9, beams=1)
    assert one.ids.tolist() == greedy.tolist()
    found = beam_search(model, [1, 2], 9, beams=6, n_best=6)
    assert found[0].score >= one.score
    assert [beam.score for beam in found] == sorted((b.score for b in found), reverse=True)
    assert len({tuple(beam.ids) for beam in found}) == 6
    assert beam_search(model, [1, 2], 0)[0].ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beams": 0}, "beams must be a positive integer, got 0"),
        ({"beams": 1.5}, "beams must be a positive integer, got 1.5"),
        ({"beams": True}, "beams must be a positive integer, got True"),
        ({"n_best": "1"}, "n_best must be a positive integer, got '1'"),
        ({"length_penalty": "a"}, "length_penalty must be a finite number, got 'a'"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"beams": 2, "n_best": 3}, "n_best must be at most the number of beams, 2, got 3"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer from 0 on"),
        ({"stop_id": 99}, "stop_id 99 is no token"),
    ],
)
def test_beam_search_refuses(model, options, says):
    with pytest.raises(ValueError, match=says):
        beam_search(model, [1], **{"max_new_tokens": 1, **options})
    with pytest.raises(ValueError, match="one prompt, not 2"):
        beam_search(model, [[1], [2]], 1)


# --- text -----------------------------------------------------------------------------------------

letters = st.text("ab\n", max_size=12)


@given(st.lists(letters, max_size=6), st.lists(letters.filter(bool), max_size=3))
@settings(max_examples=300)
def test_text_ends_before_a_stop_string_however_it_is_cut(pieces, stop):
    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    until, shown = StopStrings(stop), ""
    for piece in pieces:
        shown += until.feed(piece)
        assert expected.startswith(shown)  # nothing of a stop string was ever shown
    assert shown + until.finish() == expected
    assert until.stopped == bool(ends)


def test_text_is_kept_back_no_longer_than_needed():
    until = StopStrings(["\nUser:", "END"])
    said = ["Hi", " E", "nd\nUs", "ed", "\n", "User", ":", "more"]
    assert [until.feed(piece) for piece in said] == ["Hi", " ", "End", "\nUsed", "", "", "", ""]
    assert until.stopped and until.finish() == ""


def test_ids_become_text_up_to_a_stop_string():
    tokenizer = BPETokenizer.train("a", 257)
    asked = []

    def ids(text):
        for token_id in tokenizer.encode(text):
            asked.append(token_id)
            yield token_id

    pieces = list(stream_text(ids("größer, ok. no more"), tokenizer, "k."))
    assert "".join(pieces) == "größer, o" and "�" not in "".join(pieces)
    assert len(asked) == len("größer, ok.".encode())  # none after the stop string
    assert "".join(stream_text(ids("größer"), tokenizer)) == "größer"
    assert "".join(stream_text(tokenizer.encode("ö")[:1], tokenizer)) == "�"
    with pytest.raises(ValueError, match="a stop string is empty"):
        stream_text([], tokenizer, ["x", ""])
