"""Temperature mixture: the formula, the shares that are drawn, resuming."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import random
from tinygrad_llm.data import MixedBatches, mixture_probabilities, open_tokens, write_tokens


def test_formula():
    p = mixture_probabilities([900, 90, 10], alpha=0.7)
    powers = [900**0.7, 90**0.7, 10**0.7]
    assert p == pytest.approx([w / sum(powers) for w in powers], rel=1e-14)
    assert mixture_probabilities([1, 3], alpha=1).tolist() == [0.25, 0.75]


@given(
    weights=st.lists(st.floats(1e-3, 1e300), min_size=1, max_size=6),
    alpha=st.floats(0.01, 1),
)
def test_laws(weights, alpha):
    p = mixture_probabilities(weights, alpha)
    assert p.sum() == pytest.approx(1)
    assert np.all(np.diff(p[np.argsort(weights, kind="stable")]) >= 0)  # never the other way round
    share = np.array(weights) / np.max(weights)
    share /= share.sum()
    assert p.min() >= share.min() * (1 - 1e-12)  # the smallest corpus gains
    if alpha == 1:
        assert p == pytest.approx(share)


def test_shares_and_windows():
    small, large = np.arange(0, 200), np.arange(10_000, 30_000)
    batches = MixedBatches([small, large], 4000, 8, random.Generator(1), alpha=0.5)
    x, y = next(batches)
    assert x.shape == y.shape == (4000, 8) and x.dtype == y.dtype == np.int64
    assert (y == x + 1).all()  # no window crosses from one corpus to the other
    assert ((x[:, 0] >= 10_000) == batches.sources).all()
    p = batches.probabilities
    assert p == pytest.approx([1 / 11, 10 / 11])
    assert batches.sources.mean() == pytest.approx(p[1], abs=4 * np.sqrt(p[0] * p[1] / 4000))
    starts = set(x[batches.sources == 0, 0].tolist())
    assert min(starts) == 0 and max(starts) == 191 and len(starts) > 150
    starts = x[batches.sources == 1, 0]
    assert starts.min() < 10_100 and starts.max() > 29_900  # the large one as a whole, too


def test_given_weights():
    batches = MixedBatches([range(10), range(10)], 50, 4, random.Generator(0), 1, weights=[0, 2])
    next(batches)
    assert batches.sources.tolist() == [1] * 50


@given(seed=st.integers(0, 99))
def test_it_goes_on_bit_for_bit(seed):
    corpora = [np.arange(50), np.arange(100, 400)]
    generator = random.Generator(seed)
    batches = MixedBatches(corpora, 5, 6, generator)
    next(batches)
    state = generator.get_state()
    expected = next(batches)
    resumed = random.Generator(0)
    resumed.set_state(state)
    again = next(MixedBatches(corpora, 5, 6, resumed))
    assert all((a == b).all() for a, b in zip(expected, again, strict=True))


def test_token_files_and_numpy_generators(tmp_path):
    write_tokens(tmp_path / "a.npy", range(100))
    batches = MixedBatches([open_tokens(tmp_path / "a.npy")], 2, 3, np.random.default_rng(0))
    x, y = next(batches)
    assert (y == x + 1).all()
    assert isinstance(batches.corpora[0], np.memmap)


def test_bad_input():
    for alpha in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="alpha must be above 0 and at most 1"):
            mixture_probabilities([1, 2], alpha)
    for weights in ([], [0, 0], [1, -1], [1, float("nan")], [[1]]):
        with pytest.raises(ValueError, match="weights must be one number"):
            mixture_probabilities(weights)
    rng = random.Generator(0)
    with pytest.raises(TypeError, match="or one of NumPy's, or None for the default one, not 7"):
        MixedBatches([range(9)], 1, 5, 7)
    with pytest.raises(ValueError, match="no corpus to mix"):
        MixedBatches([], 1, 1, rng)
    with pytest.raises(ValueError, match="need 6 tokens, but there are only 5"):
        MixedBatches([range(10), range(5)], 1, 5, rng)
    with pytest.raises(ValueError, match="3 weights for 2 corpora"):
        MixedBatches([range(9), range(9)], 1, 5, rng, weights=[1, 1, 1])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        MixedBatches([range(9)], 0, 5, rng)
