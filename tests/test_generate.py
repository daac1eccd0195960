"""Generation: which token is chosen, when it ends, and that the model is left as it was."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tinygrad_llm import Tensor, is_grad_enabled
from tinygrad_llm.generate import generate, stream
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import Module
from tinygrad_llm.random import Generator

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
    text = generate(model, [[1, 2]], 9, temperature=0.9, top_k=5, generator=Generator(3))
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
        generate(model, [[1]], 20, generator=Generator(seed)).tolist() for seed in (5, 5, 6)
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
    assert generate(Fixed([0, 0, 5]), [[0]], 9, temperature=0, stop_id=2).tolist() == [[0]]
    assert list(stream(Fixed([0, 0, 5]), [0], 3, temperature=0, stop_id=1)) == [2, 2, 2]


def test_a_row_that_has_stopped_is_filled_up():
    class AddOne(Fixed):
        def forward(self, ids):
            return Tensor(np.eye(9, dtype=np.float32)[(ids + 1) % 9])

    found = generate(AddOne(np.zeros(9)), [[5], [2]], 20, temperature=0, stop_id=7)
    assert found.tolist() == [[5, 6, 7, 7, 7], [2, 3, 4, 5, 6]]


def test_no_new_tokens_is_fine(model):
    assert generate(model, [[1, 2]], 0).tolist() == [[1, 2]]
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
        ([[1]], {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        (
            [[1]],
            {"top_k": 12},
            ValueError,
            "top_k must be at most 11, the number of tokens, got 12",
        ),
        ([[1]], {"top_k": 8, "vocab_size": 7}, ValueError, "top_k must be at most 7"),
        ([[1]], {"vocab_size": 12}, ValueError, "vocab_size 12 is more than the model's 11"),
        ([[1]], {"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ([[1]], {"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ([[1]], {"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, got 1.01"),
        ([[1]], {"min_p": -0.1}, ValueError, "min_p must be a number from 0 to 1, got -0.1"),
        ([[1]], {"min_p": float("nan")}, ValueError, "min_p must be a number from 0 to 1, got nan"),
        ([[1]], {"repetition_penalty": 0}, ValueError, "repetition_penalty must be .* above 0"),
        ([[1]], {"stop_id": 11}, ValueError, r"stop_id 11 is no token: ids are 0\.\.10"),
        ([[1]], {"stop_id": [3, -1]}, ValueError, "stop_id -1 is no token"),
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens must be 0 or more, got -1"),
        ([[]], {}, ValueError, "the prompt is empty"),
        ([[[1]]], {}, ValueError, r"shape \(T,\) or \(B, T\), not \(1, 1, 1\)"),
        ([[1.5]], {}, TypeError, "ids must be integers, not float64"),
    ],
)
def test_wrong_arguments_are_named_at_once(model, function, ids, options, error, says):
    with pytest.raises(error, match=says) as caught:
        function(model, ids, **{"max_new_tokens": 1, **options})
    assert "\n" not in str(caught.value)


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
    ids = generate(model, [[1]], 60, temperature, None, Generator(0), vocab_size=3)
    assert ids.max() < 3
