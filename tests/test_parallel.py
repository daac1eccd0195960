"""A batch shared out among threads gives the loss and the gradients of the whole batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from tinygrad_llm import backend, optim, parallel, random, threads
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.parallel import Shards


def small_model(**changes):
    values = {"vocab_size": 11, "context_length": 6, "emb_dim": 8, "n_heads": 2, "n_layers": 2}
    model = GPT(GPTConfig(**{**values, "drop_rate": 0.0, **changes}), random.Generator(1))
    return model.to(np.float64)


def gradients(model):
    return {name: p.grad.data.copy() for name, p in model.named_parameters() if p.grad is not None}


def whole_batch(model, ids, targets):
    """Loss and gradients without any sharing."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = model.loss(ids, targets)
    loss.backward()
    return loss.item(), gradients(model)


def batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 11, (rows, 6)), rng.integers(0, 11, (rows, 6))


@settings(max_examples=15)
@given(st.integers(1, 7), st.integers(1, 5), st.floats(0, 0.95), st.integers(0, 99))
def test_shards_give_the_loss_and_gradients_of_the_whole_batch(rows, threads, ignored, seed):
    model = small_model()
    ids, targets = batch(rows, seed)
    targets[np.random.default_rng(seed).random(targets.shape) < ignored] = -100
    targets[-1, -1] = 3  # one counts
    loss, expected = whole_batch(model, ids, targets)
    shards = Shards(threads)
    assert shards.backward(model, ids, targets) == pytest.approx(loss, rel=1e-12)
    assert shards.loss(model, ids, targets) == pytest.approx(loss, rel=1e-12)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-13, err_msg=name)


def test_the_same_number_of_threads_gives_the_same_bits():
    ids, targets = batch(6)
    runs = []
    for _ in range(5):
        model = small_model().to(np.float32)
        runs.append((Shards(3).backward(model, ids, targets), gradients(model)))
    for loss, found in runs[1:]:
        assert loss == runs[0][0]
        assert all(np.array_equal(found[name], runs[0][1][name]) for name in found)


def test_dropout_draws_its_masks_in_order():
    ids, targets = batch(6)
    losses = []
    for n in (1, 3):
        model = small_model(drop_rate=0.3)
        losses.append(Shards(n).backward(model, ids, targets))
    assert losses[0] == losses[1]


@settings(max_examples=15)
@given(st.integers(1, 7), st.integers(1, 9), st.floats(0, 0.95), st.integers(0, 99))
def test_pieces_give_the_loss_and_gradients_of_the_whole_batch(rows, pieces, ignored, seed):
    model = small_model()
    ids, targets = batch(rows, seed)
    targets[np.random.default_rng(seed).random(targets.shape) < ignored] = -100
    targets[-1, -1] = 3  # one counts
    loss, expected = whole_batch(model, ids, targets)
    assert Shards(2).backward(model, ids, targets, pieces=pieces) == pytest.approx(loss, rel=1e-12)
    found = gradients(model)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("where", ["emb", "attn", "shortcut"])
def test_dropout_of_any_kind_runs_on_one_thread(where):
    losses = []
    for n in (1, 3):
        model = small_model(**{f"drop_rate_{where}": 0.3})
        losses.append(Shards(n).backward(model, *batch(6)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("rows", "rate", "large", "team"),
    [(4, 0.0, False, 1), (4, 0.3, False, 2), (1, 0.0, False, 2), (4, 0.0, True, 2)],
)
def test_kernels_have_the_threads_where_rows_are_not_shared_out(
    rows, rate, large, team, monkeypatch
):
    seen = set()

    class Watched(GPT):
        def loss(self, ids, targets):
            (blas,) = {b["num_threads"] for b in threadpool_info() if b["user_api"] == "blas"}
            seen.add((blas, threads.size(), len(ids)))
            return super().loss(ids, targets)

    model = Watched(small_model(drop_rate=rate).cfg)
    if large:
        monkeypatch.setattr(parallel, "LARGE", 0)
    for before in (1, 2):
        with threadpool_limits(before, "blas"):
            Shards(2).backward(model, *batch(rows))
    assert seen == {(1, team, rows if team == 2 else rows // 2)}


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_large_model_has_the_gradients_of_a_small_one(pieces, monkeypatch):
    ids, targets = batch(4)
    model = small_model()
    loss, expected = whole_batch(model, ids, targets)
    monkeypatch.setattr(parallel, "LARGE", 0)
    monkeypatch.setattr(optim, "_WORTH_SHARING", 0)
    assert Shards(2).backward(model, ids, targets, pieces=pieces) == pytest.approx(loss, rel=1e-12)
    found = gradients(model)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-13, err_msg=name)


def test_frozen_parameters_get_no_gradient():
    model = small_model()
    model.blocks[0].requires_grad_(False)
    Shards(2).backward(model, *batch(4))
    assert all(p.grad is None for p in model.blocks[0].parameters())
    assert all(p.grad is not None for p in model.blocks[1].parameters())


def test_threads_follow_the_reading_of_the_caller():
    used = backend.Reading(backend.Space(np))
    with backend.using(used):
        Shards(2).backward(small_model(), *batch(4))
    assert used, "the threads ran in another reading"


def test_a_batch_without_targets_has_no_mean():
    ids, targets = batch(4)
    with np.errstate(all="ignore"):
        assert np.isnan(Shards(2).backward(small_model(), ids, np.full_like(targets, -100)))


def test_at_least_one_thread():
    for n in (0, -1, 1.5, "two", True, None):
        with pytest.raises(
            ValueError, match=f"threads must be a whole number, at least 1, got {n!r}"
        ):
            Shards(n)


def test_what_is_no_batch():
    model, (ids, targets) = small_model(), batch(4)
    for wrong in ([ids, targets[:3]], [ids[:0], targets[:0]], [ids, 3]):
        with pytest.raises(ValueError, match="arrays with as many rows each, one or more, not"):
            Shards(2).backward(model, *wrong)
        with pytest.raises(ValueError, match="arrays with as many rows"):
            Shards(2).loss(model, *wrong)
    with pytest.raises(ValueError, match="pieces must be at least 1, got 0"):
        Shards(2).backward(model, ids, targets, pieces=0)
    expected = Shards(2).loss(model, ids, targets)
    assert Shards(2).loss(model, ids.tolist(), targets.tolist()) == expected
