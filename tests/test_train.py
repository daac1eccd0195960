"""Training: it learns, it goes on bit for bit after an interruption, and it says when it fails."""

import copy
import math

import numpy as np
import pytest

from tinygrad_llm import random
from tinygrad_llm.checkpoint import load_training_state, save_training_state
from tinygrad_llm.functional import cross_entropy
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.train import Report, Trainer, TrainSettings, evaluate, plot_losses

TOKENS = np.tile(np.arange(10), 60)  # easy to learn: the next number
CONFIG = GPTConfig(
    vocab_size=12, context_length=8, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.1
)
SETTINGS = TrainSettings(
    steps=20, batch_size=4, context=8, lr=1e-2, warmup_steps=2, eval_interval=5, eval_batches=2
)


def make_trainer(settings=SETTINGS, seed=0):
    random.manual_seed(seed)  # dropout draws from the library's generator
    return Trainer(GPT(CONFIG), TOKENS[:500], TOKENS[500:], settings)


def test_it_learns():
    trainer = make_trainer()
    reports = list(trainer.run())
    assert [report.step for report in reports] == list(range(21))
    evaluated = [report.step for report in reports if report.val_loss is not None]
    assert evaluated == [0, 5, 10, 15, 20] == [step for step, _ in trainer.evaluations]
    assert reports[0] == Report(0, None, trainer.evaluations[0][1])
    assert [report.loss for report in reports[1:]] == trainer.losses
    assert abs(reports[0].val_loss - math.log(12)) < 0.1  # at first, all tokens are as likely
    assert reports[-1].val_loss < 0.6 * reports[0].val_loss


def test_the_learning_rate_rises_and_falls():
    trainer = make_trainer()
    rates = [trainer.learning_rate()]
    for _ in trainer.run():
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[2] == pytest.approx(SETTINGS.lr / 2)  # of the first of two warm-up steps
    assert max(rates) == pytest.approx(SETTINGS.lr) == rates[3]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(SETTINGS.min_lr)


@pytest.mark.parametrize("stop", [0, 1, 7, 10])
def test_resumed_training_is_the_same_bit_for_bit(tmp_path, stop):
    straight = make_trainer()
    list(straight.run())

    first = make_trainer()
    next(report for report in first.run() if report.step == stop)
    save_training_state(tmp_path, first.state_dict())
    random.manual_seed(99)  # as in a new process: nothing is left of the old state
    second = Trainer.resume(load_training_state(tmp_path), TOKENS[:500], TOKENS[500:])
    assert second.step == stop
    list(second.run())

    assert second.losses == straight.losses
    assert second.evaluations == straight.evaluations
    ours, theirs = second.model.state_dict(), straight.model.state_dict()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (trainer.optimizer.state_dict()["state"] for trainer in (second, straight))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_steps_may_be_raised_but_not_lowered():
    trainer = make_trainer()
    list(trainer.run())
    state = copy.deepcopy(trainer.state_dict())
    longer = Trainer.resume(state, TOKENS[:500], TOKENS[500:], steps=24)
    assert [report.step for report in longer.run()] == [21, 22, 23, 24]
    with pytest.raises(ValueError, match="can only be raised"):
        Trainer.resume(state, TOKENS[:500], TOKENS[500:], steps=19)
    with pytest.raises(ValueError, match="500 tokens, not on 499"):
        Trainer.resume(state, TOKENS[:499], TOKENS[500:])
    with pytest.raises(ValueError, match="another version"):
        Trainer.resume({**state, "version": 0}, TOKENS[:500], TOKENS[500:])


def test_validation_leaves_no_trace():
    often, never = (
        make_trainer(TrainSettings(steps=10, batch_size=4, context=8, eval_interval=interval))
        for interval in (1, 100)
    )
    random.manual_seed(3)
    list(often.run())
    random.manual_seed(3)
    list(never.run())
    assert often.losses == never.losses  # dropout and batches drew the same numbers
    assert often.model.training


def test_evaluate_is_the_mean_over_all_windows():
    random.manual_seed(0)
    model = GPT(CONFIG)
    tokens = np.arange(45) % 12
    starts = range(0, 37, 8)  # five windows of 8 and their targets
    x = np.stack([tokens[i : i + 8] for i in starts])
    y = np.stack([tokens[i + 1 : i + 9] for i in starts])
    model.eval()
    expected = cross_entropy(model(x), y).item()
    model.train()
    assert evaluate(model, tokens, 8, batch_size=2) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, tokens, 8, batch_size=9) == pytest.approx(expected, rel=1e-6)
    assert model.training
    few = evaluate(model, tokens, 8, batch_size=2, max_batches=1)  # windows 0 and 2
    model.eval()
    assert few == pytest.approx(cross_entropy(model(x[[0, 2]]), y[[0, 2]]).item(), rel=1e-6)


def test_a_loss_that_is_no_number_stops_before_the_weights_change():
    trainer = make_trainer()
    trainer.training_step()
    trainer.model.final_norm.weight.data[0] = np.inf
    before = {name: array.copy() for name, array in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"after 1 steps: .*below 0.01"):
        trainer.training_step()
    after = trainer.model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(FloatingPointError):
        trainer._validate()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("batch_size", -2, "batch_size must be at least 1, got -2"),
        ("context", 0, "context must be at least 1"),
        ("lr", 0.0, "lr must be a number above 0"),
        ("lr", math.nan, "lr must be a number above 0, got nan"),
        ("lr", math.inf, "lr must be a number above 0, got inf"),
        ("grad_clip", -1.0, "grad_clip must be a number above 0"),
        ("weight_decay", -1.0, "weight_decay must be a number from 0 on"),
        ("warmup_steps", 21, r"warmup_steps must be 0 to steps \(20\), got 21"),
    ],
)
def test_settings_out_of_range(name, value, says):
    with pytest.raises(ValueError, match=says):
        TrainSettings(**{"steps": 20, "batch_size": 1, "context": 8, name: value})


def test_what_does_not_fit_the_model():
    model = GPT(CONFIG)
    settings = TrainSettings(steps=1, batch_size=1, context=9)
    with pytest.raises(ValueError, match="context 9 is longer than the model's context_length 8"):
        Trainer(model, TOKENS, TOKENS, settings)
    with pytest.raises(IndexError, match=r"token id 12 .* vocabulary of 12"):
        Trainer(model, TOKENS, TOKENS + 3, SETTINGS)
    with pytest.raises(IndexError, match="token id -1"):
        Trainer(model, TOKENS - 1, TOKENS, SETTINGS)
    with pytest.raises(ValueError, match="need 9 tokens"):
        Trainer(model, TOKENS, TOKENS[:8], SETTINGS)


def test_the_plot_is_a_png(tmp_path):
    plot_losses(tmp_path / "loss.png", [3.0, 2.5, 2.2], [(0, 3.1), (3, 2.3)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
