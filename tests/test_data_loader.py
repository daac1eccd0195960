"""DataLoader: the order of PyTorch's for the same seed, and what a batch is made of."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import random
from tinygrad_llm.data import DataLoader, Windows, create_dataloader


def order_of(loader):
    """The items in a loop over the loader, batch by batch."""
    return [batch.tolist() for batch in loader]


def test_appendix_a_toy():
    loader = DataLoader(range(5), batch_size=2, shuffle=True)
    random.manual_seed(123)
    assert order_of(loader) == [[3, 1], [0, 2], [4]]
    loader = DataLoader(range(5), batch_size=2, shuffle=True, drop_last=True)
    random.manual_seed(123)
    assert order_of(loader) == [[3, 1], [0, 2]]


@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    own_generator=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_order_and_stream_are_pytorchs(size, batch_size, shuffle, drop_last, own_generator, seed):
    if drop_last and size < batch_size:
        return
    ours = random.Generator(seed) if own_generator else None
    theirs = torch.Generator().manual_seed(seed) if own_generator else None
    random.manual_seed(seed)
    torch.manual_seed(seed)
    loader = DataLoader(range(size), batch_size, shuffle, drop_last, ours)
    oracle = torch.utils.data.DataLoader(
        range(size), batch_size, shuffle, drop_last=drop_last, generator=theirs
    )
    for _ in range(3):  # epochs
        assert order_of(loader) == order_of(oracle)
        assert next(iter(loader)).tolist() == next(iter(oracle)).tolist()  # a loop left early
    left = random.default_generator if ours is None else ours
    assert left.uniform(0, 1, 4).tolist() == torch.rand(4, generator=theirs).tolist()


@given(
    size=st.integers(2, 60),
    batch_size=st.integers(1, 10),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_loader_gives_each_window_once(size, batch_size, shuffle, drop_last):
    windows = Windows(range(size), 1, 1)  # window i is just [i]
    if drop_last and len(windows) < batch_size:
        with pytest.raises(ValueError, match="makes no batch"):
            DataLoader(windows, batch_size, shuffle, drop_last)
        return
    loader = DataLoader(windows, batch_size, shuffle, drop_last)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = np.concatenate([x[:, 0] for x, _ in batches]).tolist()
    if drop_last:
        assert all(len(x) == batch_size for x, _ in batches)
        assert len(windows) - len(seen) < batch_size
    else:
        assert len(seen) == len(windows)
    if not shuffle:
        assert seen == list(range(len(seen)))
    assert len(set(seen)) == len(seen)


def test_loader_shuffles_anew_each_time():
    loader = DataLoader(Windows(range(100), 1, 1), 99, shuffle=True)
    first, second = next(iter(loader))[0], next(iter(loader))[0]
    assert first.tolist() != second.tolist()


def test_a_saved_generator_repeats_the_order():
    generator = random.Generator(5)
    loader = DataLoader(range(50), 8, shuffle=True, generator=generator)
    order_of(loader)
    state = generator.get_state()
    second = order_of(loader)
    generator.set_state(state)
    assert order_of(loader) == second


def test_items_are_stacked_or_collated():
    features = np.arange(10.0).reshape(5, 2)
    items = [(row, i % 2) for i, row in enumerate(features)]
    x, y = next(iter(DataLoader(items, 3)))
    assert x.tolist() == features[:3].tolist() and y.tolist() == [0, 1, 0]
    loader = DataLoader(["a", "bc", "d"], 2, collate_fn="".join)
    assert list(loader) == ["abc", "d"]


def test_create_dataloader_has_the_books_defaults():
    tokens = np.arange(2000)
    loader = create_dataloader(tokens)
    windows = len(range(0, 2000 - 256, 128))
    assert len(loader) == windows // 4
    x, y = next(iter(loader))
    assert x.shape == y.shape == (4, 256)
    assert (y == x + 1).all() and (x[:, 0] % 128 == 0).all()
    random.manual_seed(123)
    first = next(iter(loader))[0][:, 0] // 128
    torch.manual_seed(123)
    oracle = torch.utils.data.DataLoader(range(windows), 4, shuffle=True, drop_last=True)
    assert first.tolist() == next(iter(oracle)).tolist()


def test_bad_input():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        DataLoader(Windows(range(10), 1, 1), 0)
    with pytest.raises(ValueError, match="of 1 items makes no batch of 4: use a larger"):
        create_dataloader(range(257))
    with pytest.raises(ValueError, match="the dataset is empty: expected at least one item"):
        DataLoader([])
    with pytest.raises(ValueError, match="need 257 tokens, but there are only 256: use a longer"):
        create_dataloader(range(256))
    with pytest.raises(TypeError, match=r"got a text: give tokenizer\.encode"):
        create_dataloader("the text")
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 2\.5"):
        create_dataloader(range(1000), batch_size=2.5)
    for wrong in (0, 5, np.random.default_rng(0)):
        with pytest.raises(TypeError, match=r"is a tinygrad_llm\.random\.Generator, or None"):
            create_dataloader(range(1000), generator=wrong)
    for name in ("batch_size", "max_length", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            create_dataloader(range(1000), **{name: 0})
