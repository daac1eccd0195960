"""tinygrad_llm.random against PyTorch's stream on a CPU; what MKL draws otherwise there, against
the numbers that the book prints.
"""

import json
import time
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import Tensor, random
from tinygrad_llm.random import Generator

SEEDS = st.integers(0, 2**40)
OURS = {
    "uniform": lambda g, n: g.uniform(-0.3, 0.7, (n,)),
    "uniform 64": lambda g, n: g.uniform(0.0, 1.0, (n,), np.float64),
    "normal": lambda g, n: g.normal(0.0, 1.0, (n,)),
    "shifted": lambda g, n: g.normal(0.1, 0.02, (n,)),
    "normal 64": lambda g, n: g.normal(1.0, 2.0, (n,), np.float64),
    "permutation": lambda g, n: g.permutation(n),
    "integers": lambda g, n: g.integers(-5, 1000, (n,)),
    "large integers": lambda g, n: g.integers(0, 1 << 40, (n,)),
    "of one word": lambda g, n: g.integers(0, (1 << 28) - 1, (n,)),
    "of two words": lambda g, n: g.integers(0, 1 << 28, (n,)),
}
THEIRS = {
    "uniform": lambda g, n: torch.empty(n).uniform_(-0.3, 0.7, generator=g),
    "uniform 64": lambda g, n: torch.rand(n, generator=g, dtype=torch.float64),
    "normal": lambda g, n: torch.randn(n, generator=g),
    "shifted": lambda g, n: torch.empty(n).normal_(0.1, 0.02, generator=g),
    "normal 64": lambda g, n: torch.empty(n, dtype=torch.float64).normal_(1.0, 2.0, generator=g),
    "permutation": lambda g, n: torch.randperm(n, generator=g),
    "integers": lambda g, n: torch.randint(-5, 1000, (n,), generator=g),
    "large integers": lambda g, n: torch.randint(0, 1 << 40, (n,), generator=g),
    "of one word": lambda g, n: torch.randint(0, (1 << 28) - 1, (n,), generator=g),
    "of two words": lambda g, n: torch.randint(0, 1 << 28, (n,), generator=g),
}


@given(SEEDS, st.lists(st.tuples(st.sampled_from(list(OURS)), st.integers(1, 70)), max_size=6))
@settings(max_examples=150)
def test_the_stream_is_pytorchs(seed, calls):
    """Whatever is asked for, one after the other; the functions log and cos may differ in a bit."""
    ours, theirs = Generator(seed), torch.Generator().manual_seed(seed)
    for name, n in calls:
        found, expected = OURS[name](ours, n), THEIRS[name](theirs, n).numpy()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        if name == "uniform" or found.dtype == np.int64 or (name == "shifted" and n < 16):
            assert np.array_equal(found, expected)
        else:
            tolerance = 1e-6 if found.dtype == np.float32 else 1e-14
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@given(SEEDS, st.integers(0, 30), st.sampled_from(list(OURS)))
@settings(max_examples=50)
def test_a_state_goes_on_exactly(seed, n, name):
    """Through JSON, as a checkpoint keeps it, in the middle of a pair of normal numbers, too."""
    g = Generator(seed)
    g.normal(0.0, 1.0, (n,))
    state = json.loads(json.dumps(g.get_state()))
    after = OURS[name](g, 21)
    other = Generator()
    other.set_state(state)
    assert np.array_equal(OURS[name](other, 21), after)


def test_uniform_numbers_reach_the_upper_end_only_by_rounding():
    g = Generator()
    g.words = lambda n: np.full(n, 2**32 - 1, np.uint32)  # the greatest u
    assert random.rand(1, generator=g).item() == 1 - 2**-24
    assert g.uniform(1.0, 2.0, 1) == 2 and g.uniform(0.5, 1.0, 1) == 1
    assert g.uniform(-1.0, 0.0, 1) == -(2.0**-24)


STATE = Generator().get_state()


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"generator": "PCG64"},
        {**STATE, "key": "00"},
        {**STATE, "key": 3},
        {**STATE, "pos": 625},
        {**STATE, "pos": 3.7},
        {**STATE, "spare": "x"},
        {**STATE, "spare": np.nan},
    ],
)
def test_what_is_no_state(state):
    g = Generator(5)
    before = g.get_state()
    with pytest.raises(ValueError, match="no state of a random generator") as found:
        g.set_state(state)
    assert "\n" not in str(found.value) and g.get_state() == before


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True])
def test_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="a seed is a non-negative integer"):
        Generator(seed)


def test_multinomial_draws_with_the_probabilities():
    p = np.array([[0.1, 0.0, 0.9], [0.5, 0.5, 0.0]])
    drawn = Generator(0).multinomial(np.broadcast_to(p[:, None], (2, 4000, 3)))
    for row, expected in zip(drawn, p):
        np.testing.assert_allclose(np.bincount(row, minlength=3) / 4000, expected, atol=0.03)


def test_without_replacement_the_first_win_the_race():
    """The first index is the one that is drawn alone, the next are drawn among those left."""
    p = np.array([0.1, 0.0, 0.6, 0.3])
    rows = np.broadcast_to(p, (20_000, 4))
    drawn = random.multinomial(rows, 3, generator=Generator(2)).data
    assert drawn.shape == (20_000, 3) and drawn.dtype == np.int64
    assert np.array_equal(drawn[:, 0], Generator(2).multinomial(rows))
    assert np.array_equal(drawn[:, :1], random.multinomial(rows, 1, generator=Generator(2)).data)
    for i, j, k in permutations((0, 2, 3)):
        share = (drawn == (i, j, k)).all(axis=1).mean()
        assert share == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.015)


@given(
    SEEDS,
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=40).filter(lambda p: sum(p) > 1e-3),
    st.integers(2, 9),
    st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=100)
def test_with_replacement_the_indices_are_pytorchs(seed, p, k, dtype):
    p = np.array([p, p[::-1]], dtype)
    ours, theirs = Generator(seed), torch.Generator().manual_seed(seed)
    drawn = random.multinomial(p, k, replacement=True, generator=ours)
    expected = torch.multinomial(torch.tensor(p), k, replacement=True, generator=theirs)
    assert drawn.dtype == np.int64 and np.array_equal(drawn.data, expected.numpy())


NAMES = {np.float32: torch.float32, np.float64: torch.float64}
PYTORCHS = {
    "rand": lambda m, t, g: m.rand(2, 3, generator=g, dtype=t),
    "rand of a tuple": lambda m, t, g: m.rand((2, 3), generator=g, dtype=t),
    "rand of a list": lambda m, t, g: m.rand([4], generator=g, dtype=t),
    "rand of one": lambda m, t, g: m.rand((), generator=g, dtype=t),
    "randn": lambda m, t, g: m.randn((3, 7), generator=g, dtype=t),
    "normal": lambda m, t, g: m.normal(0.5, 2.0, (3,), generator=g, dtype=t),
    "randint": lambda m, t, g: m.randint(2, 9, (2, 3), generator=g),
    "randint from 0": lambda m, t, g: m.randint(9, (2, 3), generator=g),
    "randperm": lambda m, t, g: m.randperm(9, generator=g),
}


@pytest.mark.parametrize("name", PYTORCHS)
@pytest.mark.parametrize("dtype", NAMES)
def test_functions_take_what_pytorchs_take(name, dtype):
    call, generator = PYTORCHS[name], torch.Generator().manual_seed(3)
    expected = call(torch, NAMES[dtype], generator).numpy()
    found = call(random, dtype, Generator(3)).data
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_functions_draw_from_the_default_generator():
    before = random.default_generator.get_state()
    try:
        random.manual_seed(3)
        found = [
            random.uniform(-1, 2, 5),
            random.normal(0, 1, 5),
            random.bernoulli([0.3] * 5),
            random.multinomial([0.3] * 5, 2),
        ]
    finally:
        random.default_generator.set_state(before)
    g = Generator(3)
    expected = [
        g.uniform(-1, 2, (5,)),
        g.normal(0, 1, (5,)),
        g.uniform(0, 1, (5,)) < np.float32(0.3),
        g.multinomial(np.full(5, 0.3, np.float32), 2),
    ]
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.data, b)
    assert random.rand(2, requires_grad=True, generator=g).requires_grad


@given(SEEDS, st.lists(st.floats(0, 1, width=32), max_size=40), st.sampled_from(list(NAMES)))
def test_bernoulli_of_many_is_pytorchs(seed, p, dtype):
    p = np.array(p, dtype)
    expected = torch.bernoulli(torch.tensor(p), generator=torch.Generator().manual_seed(seed))
    found = random.bernoulli(p, generator=Generator(seed))
    assert found.dtype == dtype and np.array_equal(found.data, expected.numpy())


@given(st.floats(0, 1))
def test_bernoulli(p):
    kept = Generator(1).bernoulli(p, (100, 100))
    assert kept.dtype == bool and abs(kept.mean() - p) < 0.03


@pytest.mark.parametrize(
    "p", [[0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0], [1, 2], 0.5, [[0.5], [0.0]]]
)
def test_what_is_no_probabilities(p):
    with pytest.raises(ValueError, match="multinomial draws with floats of 0 and more"):
        Generator().multinomial(np.array(p))


def test_nothing_and_one_in_random_order():
    assert Generator().permutation(0).tolist() == [] and Generator().permutation(1).tolist() == [0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Generator().integers(3, 3, 1), ValueError, "no integer from 3 to below 3"),
        (lambda: random.randint(0, 2.5, (3,)), TypeError, "cannot be interpreted as an integer"),
        (lambda: random.randint(1, 10), TypeError, r"the size is a tuple, such as \(3,\), not 10"),
        (lambda: random.randint(1, 10, 5), TypeError, r"the size is a tuple, .* not 5"),
        (lambda: random.normal(Tensor([0.0, 1.0]), 1, 2), TypeError, "mean is one number, .* Tens"),
        (lambda: random.normal(0, np.ones(2), 2), TypeError, "std is one number, .* not ndarray"),
        (lambda: random.uniform("a", 1, 2), TypeError, "low is one number, .* not str"),
        (lambda: random.randperm(-1), ValueError, "integers of 0 and more, not -1"),
        (lambda: random.rand(2.0), ValueError, "a shape is made of integers .* not 2.0"),
        (lambda: random.randn((2, -1)), ValueError, r"integers of 0 and more, not \(2, -1\)"),
        (lambda: random.rand(2, dtype=np.float16), TypeError, "float32 or float64, not float16"),
        (lambda: random.uniform(1, 0, 3), ValueError, "no uniform numbers .* from 1.0 to below 0"),
        (lambda: random.uniform(-3e38, 3e38, 3), ValueError, "no uniform numbers of float32"),
        (lambda: random.normal(0, -1, 5), ValueError, "0 or more, not -1"),
        (lambda: random.normal(0, np.nan, 5), ValueError, "0 or more, not nan"),
        (lambda: random.bernoulli([0.5, 1.5]), ValueError, "between 0 and 1, not 1.5"),
        (lambda: random.bernoulli([1]), TypeError, "float32 or float64, not int64"),
        (lambda: Generator().bernoulli(np.nan, 3), ValueError, "between 0 and 1, not nan"),
        (lambda: random.multinomial([1.0, 0.0], 2), ValueError, "2 samples without replacement"),
        (lambda: random.multinomial([0.5, 0.5], 0), ValueError, "num_samples is 1 or more, not 0"),
    ],
)
def test_what_cannot_be_drawn(call, error, message):
    before = random.default_generator.get_state()
    with pytest.raises(error, match=message) as found:
        call()
    assert "\n" not in str(found.value) and random.default_generator.get_state() == before


def test_initialising_gpt2_takes_seconds():
    start = time.perf_counter()
    for _ in range(3):
        Generator().normal(0.0, 0.02, (54_000, 768))  # 124 million in all
    assert time.perf_counter() - start < 30  # 5 on one quiet core
