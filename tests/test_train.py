"""Training: it learns, it goes on bit for bit after an interruption, and it says when it fails."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from tinygrad_llm import random, step
from tinygrad_llm.checkpoint import load_training_state, save_training_state
from tinygrad_llm.functional import cross_entropy
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.optim import clip_grad_norm_
from tinygrad_llm.train import Report, Trainer, TrainSettings, evaluate, plot_training

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
    assert reports[0] == Report(0, val_loss=trainer.evaluations[0][1], tokens=0, best=True)
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
    save_training_state(tmp_path / "state", first.state_dict())
    random.manual_seed(99)  # as in a new process: nothing is left of the old state
    second = Trainer.resume(load_training_state(tmp_path / "state"), TOKENS[:500], TOKENS[500:])
    assert second.step == stop
    list(second.run())

    assert second.losses == straight.losses
    assert second.evaluations == straight.evaluations
    ours, theirs = second.model.state_dict(), straight.model.state_dict()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (trainer.optimizer.state_dict()["state"] for trainer in (second, straight))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["exp_avg_sq"], b["exp_avg_sq"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_and_frozen_parameters_come_back(tmp_path, dtype, frozen):
    trainers = []
    for stop in (20, 7):
        random.manual_seed(0)
        model = GPT(CONFIG).to(dtype)
        model.blocks[0].att.requires_grad_(not frozen)
        trainers.append(Trainer(model, TOKENS[:500], TOKENS[500:], SETTINGS))
        next(report for report in trainers[-1].run() if report.step == stop)
    straight, first = trainers
    save_training_state(tmp_path / "state", first.state_dict())
    second = Trainer.resume(load_training_state(tmp_path / "state"), TOKENS[:500], TOKENS[500:])
    list(second.run())
    assert second.losses == straight.losses
    ours, theirs = dict(second.model.named_parameters()), dict(straight.model.named_parameters())
    for name, parameter in theirs.items():
        assert ours[name].data.dtype == dtype
        assert ours[name].requires_grad == parameter.requires_grad
        np.testing.assert_array_equal(ours[name].data, parameter.data)
    assert {a["exp_avg"].dtype for a in second.optimizer.state} == {np.dtype(dtype)}


@pytest.mark.parametrize(
    ("rate", "threads", "rows"), [(0.0, 1, 8), (0.1, 2, 8), (0.0, 2, 8), (0.0, 2, 1)]
)
def test_the_bits_are_the_same_whatever_blas_has_been_told(rate, threads, rows):
    tokens = np.random.default_rng(0).integers(0, 500, 5000)
    settings = TrainSettings(4, rows, 64, eval_interval=4, eval_batches=2, threads=threads)
    runs = []
    for number in (1, 2):
        random.manual_seed(0)
        model = GPT(GPTConfig(500, 64, 128, 4, 1, drop_rate=rate))
        trainer = Trainer(model, tokens[:4500], tokens[4500:], settings)
        with threadpool_limits(number, "blas"):
            list(trainer.run())
        weights = {name: array.tobytes() for name, array in model.state_dict().items()}
        runs.append((trainer.losses, trainer.evaluations, weights))
    assert runs[0] == runs[1]


def test_the_length_of_the_gradient_is_taken_with_one_thread_of_blas(monkeypatch):
    seen = []

    def watched(*arguments):
        seen.extend(blas["num_threads"] for blas in threadpool_info() if blas["user_api"] == "blas")
        return clip_grad_norm_(*arguments)

    monkeypatch.setattr(step, "clip_grad_norm_", watched)
    for before in (1, 2):
        with threadpool_limits(before, "blas"):
            make_trainer(replace(SETTINGS, threads=2)).training_step()
    assert set(seen) == {1}, "its last bits would differ with the number of threads"


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
    with pytest.raises(ValueError, match="trained on other tokens, as many as these"):
        Trainer.resume(state, TOKENS[1:501], TOKENS[500:])


def test_every_step_is_reported():
    reports = list(make_trainer(replace(SETTINGS, accumulate=3)).run())
    assert [report.tokens for report in reports] == [step * 3 * 4 * 8 for step in range(21)]
    for report in reports[1:]:
        assert report.learning_rate > 0 and report.grad_norm > 0 and report.seconds > 0
    val_losses = [report.val_loss for report in reports if report.val_loss is not None]
    bests = [report.best for report in reports if report.val_loss is not None]
    assert bests == [loss == min(val_losses[: i + 1]) for i, loss in enumerate(val_losses)]
    assert reports[-1].perplexity == pytest.approx(math.exp(val_losses[-1]))
    assert reports[1].perplexity is None


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_accumulated_batches_are_one_large_batch(threads):
    runs = []
    for rows, accumulate in ((8, 1), (2, 4), (1, 8)):
        settings = replace(SETTINGS, batch_size=rows, accumulate=accumulate, threads=threads)
        random.manual_seed(0)
        model = GPT(replace(CONFIG, drop_rate=0.0)).to(np.float64)
        trainer = Trainer(model, TOKENS[:500], TOKENS[500:], settings)
        list(trainer.run())
        runs.append((trainer.losses, model.state_dict()))
    for losses, weights in runs[1:]:
        np.testing.assert_allclose(losses, runs[0][0], rtol=1e-10)
        for name, array in weights.items():
            np.testing.assert_allclose(array, runs[0][1][name], rtol=1e-6, atol=1e-9)


def test_an_accumulated_gradient_holds_one_piece_at_a_time():
    seen = []

    class Watched(GPT):
        def loss(self, ids, targets):
            seen.append(ids.shape)
            return super().loss(ids, targets)

    random.manual_seed(0)
    settings = replace(SETTINGS, batch_size=2, accumulate=3, threads=1)
    Trainer(Watched(CONFIG), TOKENS[:500], TOKENS[500:], settings).training_step()
    assert seen == [(2, 8)] * 3


# --- what a setting reaches -----------------------------------------------------------------------


def test_recomputed_training_is_the_same_bit_for_bit():
    plain = make_trainer()
    list(plain.run())
    recomputed = make_trainer(replace(SETTINGS, recompute=True))
    list(recomputed.run())
    assert recomputed.model.recompute and not plain.model.recompute
    assert plain.losses == recomputed.losses and plain.evaluations == recomputed.evaluations


def test_matrices_and_tables_decay_and_tied_weights_once():
    trainer = make_trainer()
    decayed, others = trainer.optimizer.param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert decayed["weight_decay"] == SETTINGS.weight_decay and others["weight_decay"] == 0
    assert "tok_emb.weight" in {names[id(p)] for p in decayed["params"]}
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in others["params"])
    both = [id(p) for p in (*decayed["params"], *others["params"])]
    assert len(both) == len(set(both)) == len(names)
    assert trainer.model.out_head.weight is trainer.model.tok_emb.weight
    total = sum(p.numel() for p in (*decayed["params"], *others["params"]))
    assert total == trainer.model.num_parameters()


# --- early stopping -------------------------------------------------------------------------------


def impatient(losses, patience, steps=40):
    """A trainer whose validation losses are given."""
    trainer = make_trainer(replace(SETTINGS, steps=steps, eval_interval=2, patience=patience))
    left = iter(losses)

    def validate():
        trainer.evaluations.append((trainer.step, next(left)))
        return trainer.evaluations[-1][1]

    trainer._validate = validate
    return trainer


@pytest.mark.parametrize(
    ("losses", "patience", "stops", "best"),
    [
        ([5, 4, 3, 3.5, 3.2, 9, 9], 2, 8, 4),
        ([5, 4, 3, 3, 2, 3, 3, 3], 2, 12, 8),  # an equal loss is no better
        ([5, 5], 1, 2, 0),
        ([5, 4, 6, 3, 6, 2, 6, 1], 2, 14, 14),  # the last step comes first
    ],
)
def test_training_stops_when_validation_no_longer_improves(losses, patience, stops, best):
    trainer = impatient(losses, patience, steps=14)
    reports = list(trainer.run())
    assert reports[-1].step == stops == trainer.step
    assert trainer.best[0] == best == max(r.step for r in reports if r.best)
    assert trainer.out_of_patience == (best < stops)
    assert trainer.finished
    state = copy.deepcopy(trainer.state_dict())
    same = Trainer.resume(state, TOKENS[:500], TOKENS[500:])
    assert same.finished and not list(same.run())
    longer = Trainer.resume(state, TOKENS[:500], TOKENS[500:], steps=20, patience=9)
    assert not longer.finished and next(longer.run()).step == stops + 1


def test_the_state_of_an_earlier_version_goes_on():
    straight = make_trainer()
    list(straight.run())
    first = make_trainer()
    next(report for report in first.run() if report.step == 7)
    state = first.state_dict()
    state["windows"] = state.pop("batches")["generator"]  # all that it said of its batches
    second = Trainer.resume(state, TOKENS[:500], TOKENS[500:])
    list(second.run())
    assert second.losses == straight.losses and second.evaluations == straight.evaluations


def loss_of(model):
    return evaluate(model, TOKENS[500:], SETTINGS.context, SETTINGS.batch_size, 2)


def test_patience_keeps_the_best_weights_and_so_does_a_state():
    too_fast = {"lr": 0.2, "min_lr": 0.2, "warmup_steps": 10}
    settings = replace(SETTINGS, steps=60, eval_interval=1, patience=4, **too_fast)
    trainer = make_trainer(settings)
    states = {r.step: copy.deepcopy(trainer.state_dict()) for r in trainer.run()}
    best, lowest = trainer.best
    assert 0 < best == trainer.step - 4
    assert loss_of(trainer.best_model()) == lowest < loss_of(trainer.model)
    for step_ in (best - 1, best, best + 2):  # from before, at, and after the best
        resumed = Trainer.resume(states[step_], TOKENS[:500], TOKENS[500:])
        assert loss_of(resumed.best_model()) == resumed.best[1]
        list(resumed.run())
        assert resumed.best == trainer.best and loss_of(resumed.best_model()) == lowest


@pytest.mark.parametrize("stop", [3, 10])
def test_patience_counts_from_the_step_on_where_it_is_given(stop):
    trainer = make_trainer(replace(SETTINGS, steps=14, eval_interval=2))
    next(report for report in trainer.run() if report.step == stop)
    assert trainer.best_weights is None and trainer.best_model() is trainer.model
    trainer.evaluations[1] = (2, 0.0)  # the lowest: its weights are gone
    state = copy.deepcopy(trainer.state_dict())
    resumed = Trainer.resume(state, TOKENS[:500], TOKENS[500:], steps=40, patience=1)
    for report in resumed.run():
        if report.val_loss is not None:
            assert loss_of(resumed.best_model()) == resumed.best[1]
    assert resumed.best[0] >= stop
    state = copy.deepcopy(resumed.state_dict())
    again = Trainer.resume(state, TOKENS[:500], TOKENS[500:])
    assert again.best == resumed.best and loss_of(again.best_model()) == again.best[1]


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
        ("min_lr", 1e-2, r"min_lr must be at most lr \(0.001\), got 0.01"),
        ("accumulate", 0, "accumulate must be at least 1, got 0"),
        ("patience", 0, "patience must be at least 1, got 0"),
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
    reports = [
        Report(0, val_loss=3.1),
        Report(1, 3.0, learning_rate=0.1),
        Report(2, 2.5, 2.3, 0.05),
    ]
    for some in (reports, reports[:1], reports[1:2], []):
        plot_training(tmp_path / "loss.png", some)
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
