"""Training on a device: the step that is recorded once and replayed does what the CPU's does, with
16 bits nearly so, and whatever happens in it, a weight is changed rightly or not at all. Without a
GPU the device is "interpret", whose graphs are simulated: replays run none of the step's Python,
and while one is recorded, reading a value on the host raises.
"""

import copy
import functools
import math

import numpy as np
import pytest
from gpu_harness import DEVICE

from tinygrad_llm import backend, precision
from tinygrad_llm.checkpoint import load_training_state, save_training_state
from tinygrad_llm.device import device
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import recompute
from tinygrad_llm.optim import SGD, AdamW, LossScale, clip_grad_norm_
from tinygrad_llm.random import Generator
from tinygrad_llm.step import DeviceStep, HostStep
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train import Trainer, TrainSettings

THERE = device(DEVICE)
TOKENS = np.arange(240) * np.arange(240) % 13  # something to learn


def make_trainer(where=DEVICE, dtype="float32", drop_rate=0.0, layers=1, **settings):
    cfg = GPTConfig(13, 6, emb_dim=8, n_heads=2, n_layers=layers, drop_rate=drop_rate)
    model = GPT(cfg, Generator(0)).to(where)
    chosen = {"steps": 3, "batch_size": 1, "context": 6, "lr": 1e-2, "warmup_steps": 1}
    chosen |= {"eval_interval": 100, "eval_batches": 1, "threads": 1, **settings}
    return Trainer(model, TOKENS[:200], TOKENS[200:], TrainSettings(**chosen), dtype)


@functools.cache
def trained(**settings):
    """After all its steps; not to be trained on."""
    trainer = make_trainer(**settings)
    for _ in range(trainer.settings.steps):
        trainer.training_step()
    return trainer


def weights(trainer):
    return trainer.model.state_dict()


def same(a, b):
    return all(np.array_equal(x, b[name]) for name, x in a.items())


# --- as on the CPU --------------------------------------------------------------------------------


def test_ten_losses_are_those_of_the_cpu():
    backend.refusals.clear()
    there = trained(steps=10, layers=2)
    here = trained(steps=10, layers=2, where="cpu")
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-5)
    assert there.losses[-1] < there.losses[0] - 0.1
    assert math.isclose(there.grad_norm, here.grad_norm, rel_tol=1e-4)
    assert there.update.why_no_graph is None and not backend.refusals
    for name, x in weights(here).items():
        np.testing.assert_allclose(weights(there)[name], x, atol=1e-4)


@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_masters_begin_as_the_weights_were(where):
    trainer = make_trainer(where, "bfloat16", lr=1e-9, min_lr=0.0, weight_decay=0.0)
    trainer.training_step()
    before = make_trainer("cpu").optimizer._parameters()
    for p, s in zip(before, trainer.optimizer.state_dict()["state"], strict=True):
        np.testing.assert_allclose(s["master"], p.data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype, off", [("bfloat16", 0.02), ("float16", 0.004)])
@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_losses_of_16_bits_follow_those_of_32(where, dtype, off):
    narrow, wide = trained(where=where, dtype=dtype), trained(where="cpu")
    np.testing.assert_allclose(narrow.losses, wide.losses, rtol=off)
    assert narrow.losses != wide.losses
    state = narrow.optimizer.state_dict()["state"]
    for p, s in zip(narrow.optimizer._parameters(), state, strict=True):
        assert p.dtype == precision.dtype(dtype) and s["master"].dtype == np.float32
        rounded = s["master"].astype(p.dtype)
        assert np.array_equal(rounded, p.detach().numpy())  # the weights are the masters, rounded
        assert not np.array_equal(rounded.astype(np.float32), s["master"])


def test_accumulating_and_recomputing_change_nothing_but_rounding():
    plain = trained(batch_size=2, steps=2)
    for settings in ({"accumulate": 2}, {"batch_size": 2, "recompute": True}):
        other = trained(steps=2, **settings)
        np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-6)
        assert other.update.why_no_graph is None


def test_targets_that_do_not_count():
    losses = []
    for where in ("cpu", DEVICE):
        step = make_trainer(where, accumulate=2).update
        ids = np.arange(12).reshape(2, 6) % 13
        targets = np.where(np.arange(12).reshape(2, 6) % 5 < 3, -100, ids)
        targets[:1, 1:4] = -100  # the first piece has less to say
        step.start((ids, targets), 1e-2)
        losses.append(step.finish())
        targets[:1] = -100  # and now nothing
        before = targets.copy()
        step.start((ids, targets), 1e-2)
        losses[-1] += step.finish()
        assert np.array_equal(targets, before)
    np.testing.assert_allclose(*losses, rtol=1e-5)


# --- what is recorded -----------------------------------------------------------------------------


def test_a_graph_is_what_its_kernels_are_one_by_one(monkeypatch):
    recorded = trained()
    graphs = backend.kernel_module(THERE, "graph")

    def refuse(function):
        raise graphs.GraphError("no graph can be made of this function: for the test")

    monkeypatch.setattr(graphs, "Graph", refuse)
    eager = trained.__wrapped__()
    assert eager.update.why_no_graph.endswith("for the test")
    assert eager.losses == recorded.losses and same(weights(eager), weights(recorded))


def test_without_kernels_the_ops_lines_do_it():
    with backend.using(backend.MATHS):
        plain = trained.__wrapped__(dtype="bfloat16")
    assert type(plain.update) is HostStep
    np.testing.assert_allclose(plain.losses, trained(where="cpu").losses, rtol=0.02)
    with backend.using(backend.reading("off:attention,self_attention,linear")):
        some = trained.__wrapped__(steps=2)
    assert type(some.update) is DeviceStep
    np.testing.assert_allclose(some.losses, trained(where="cpu").losses[:2], rtol=1e-5)


def test_a_step_of_another_shape_is_recorded_anew():
    step = make_trainer().update
    ids = np.arange(12).reshape(2, 6) % 13
    losses = []
    for rows in (1, 2, 1):
        step.start((ids[:rows], ids[:rows]), 0.0)
        losses.append(step.finish()[0])
    assert losses[0] == losses[2] != losses[1]


def changed(trainer, **options):
    for group in trainer.optimizer.param_groups:
        group.update(options)


CHANGES = {
    "a loaded state": lambda t, saved: t.optimizer.load_state_dict(saved),
    "other memory": lambda t, saved: t.model.to("float64").to("float32"),
    "a frozen table": lambda t, saved: t.model.tok_emb.weight.requires_grad_(False),
    "another decay": lambda t, saved: [
        g.update(weight_decay=0.9) for g in t.optimizer.param_groups
    ],
    "other betas": lambda t, saved: [g.update(betas=(0.5, 0.7)) for g in t.optimizer.param_groups],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_recorded_step_depends_on_may_change(change):
    found = []
    for where in ("cpu", DEVICE):
        trainer = make_trainer(where)
        trainer.training_step()
        saved = copy.deepcopy(trainer.optimizer.state_dict())
        trainer.training_step()
        change(trainer, saved)
        trainer.training_step()
        found.append(weights(trainer))
    for name, x in found[0].items():
        np.testing.assert_allclose(found[1][name], x, rtol=1e-4, atol=2e-5)


def test_recording_a_step_changes_nothing():
    trainer = make_trainer(dtype="float16")
    before, ids = copy.deepcopy(weights(trainer)), TOKENS[:6].reshape(1, 6)
    trainer.update.start((ids, ids), 0.0)  # with a learning rate of 0
    trainer.update.finish()
    state = trainer.state_dict()
    assert same(before, weights(trainer))
    assert state["loss_scale"] == {"scale": 2.0**16, "good": 1, "skipped": 0}
    assert {s["step"] for s in state["optimizer"]["state"]} == {1}


def test_each_step_drops_others_and_a_resumed_run_the_same(tmp_path):
    trainer = make_trainer(drop_rate=0.4, recompute=True)
    ids = TOKENS[:6].reshape(1, 6)
    losses = []
    for _ in range(2):
        trainer.update.start((ids, ids), 0.0)
        losses.append(trainer.update.finish()[0])
    assert len(set(losses)) == 2
    whole = make_trainer(drop_rate=0.4, recompute=True)
    whole.training_step()
    save_training_state(tmp_path / "state.safetensors", whole.state_dict())
    whole.training_step()
    state = load_training_state(tmp_path / "state.safetensors")
    resumed = Trainer.resume(state, TOKENS[:200], TOKENS[200:], device=DEVICE)
    resumed.training_step()
    assert resumed.losses == whole.losses and same(weights(resumed), weights(whole))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_goes_on_from_its_state_on_either_device(dtype):
    whole = make_trainer(dtype=dtype)
    whole.training_step()
    state = copy.deepcopy(whole.state_dict())
    whole.training_step()
    for where in (DEVICE, "cpu"):
        resumed = Trainer.resume(copy.deepcopy(state), TOKENS[:200], TOKENS[200:], device=where)
        resumed.training_step()
        if where == DEVICE:
            assert resumed.losses == whole.losses and same(weights(resumed), weights(whole))
        else:
            np.testing.assert_allclose(resumed.losses, whole.losses, rtol=5e-3)


# --- what is no number ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_a_gradient_that_is_no_number_changes_nothing(where):
    trainer = make_trainer(where)
    trainer.training_step()
    weight = trainer.model.blocks[0].ff.up.weight
    weight.data[0, 0] = math.inf
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(FloatingPointError, match="nan or infinite after 1 steps"):
        trainer.training_step()
    after = trainer.state_dict()
    assert same(before["model"], after["model"]) and trainer.step == 1
    for a, b in zip(before["optimizer"]["state"], after["optimizer"]["state"], strict=True):
        assert same(a, b)


@pytest.mark.parametrize("where", ["cpu", DEVICE])
def test_float16_leaves_out_the_steps_that_overflow(where):
    trainer = make_trainer(where, "float16", steps=6)
    trainer.update.load_state_dict({"loss_scale": {"scale": 2.0**20, "good": 0, "skipped": 0}})
    before, scales = copy.deepcopy(weights(trainer)), []
    for _ in range(6):
        trainer.training_step()
        scales.append(trainer.update.state_dict()["loss_scale"])
        if scales[-1]["skipped"] == len(scales):
            assert same(before, weights(trainer))
    last = scales[-1]
    assert 0 < last["skipped"] < 6 and last["good"] == 6 - last["skipped"]
    assert last["scale"] == 2.0 ** (20 - last["skipped"])
    assert not same(before, weights(trainer))
    trainer.update.load_state_dict({"loss_scale": {"scale": 2.0**-3, "good": 0, "skipped": 0}})
    with pytest.raises(FloatingPointError):  # no scale that small makes sense
        trainer.training_step()


def test_the_scale_is_pytorchs():
    import torch

    ours = LossScale(2.0**4, interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
    leaf = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([leaf], lr=0.0)
    for finite in np.random.default_rng(1).random(40) < 0.8:
        leaf.grad = None
        theirs.scale(leaf * (1.0 if finite else math.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(bool(finite)) == finite
        assert ours.scale == theirs.get_scale()


# --- optimizers without a recorded step -----------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda p: AdamW([{"params": p[:1]}, {"params": p[1:]}], lr=0.1, weight_decay=0.3),
    lambda p: AdamW([{"params": p[:1], "lr": 0.2}, {"params": p[1:]}], lr=0.1),
    lambda p: SGD(p, lr=0.1, momentum=0.9),
], ids=["one kernel", "groups of their own", "SGD"])  # fmt: skip
def test_an_optimizer_moves_what_is_there_as_it_does_here(make):
    found = []
    for where in ("cpu", DEVICE):
        rng = np.random.default_rng(0)
        parameters = [Tensor(rng.standard_normal(s).astype("f")) for s in ((3, 4), (5,))]
        parameters = [p.to(where).requires_grad_() for p in parameters]
        optimizer = make(parameters)
        for step in range(6):
            if step == 4:
                optimizer.param_groups[0]["weight_decay"] = 0.7
            if step == 5:  # with more than one group, one kernel does not do any more
                optimizer.param_groups[0]["lr"] = 0.05
            for p in parameters:
                g = rng.standard_normal(p.shape).astype("f")
                p.grad = Tensor(g).to(where)
            if step == 2:  # goes on from a saved state
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make(parameters)
                optimizer.load_state_dict(saved)
            norm = clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        found.append([norm, *(p.detach().numpy() for p in parameters)])
    for here, there in zip(*found, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)


def test_small_steps_of_16_bits_add_up():
    p = Tensor(np.ones(3, precision.dtype("bfloat16")), requires_grad=True)
    optimizer = SGD([p], lr=1e-3)
    for _ in range(100):  # each is less than half a unit of the last place
        p.grad = Tensor(np.ones(3, np.float32))
        optimizer.step()
    np.testing.assert_allclose(p.data.astype(np.float32), 0.9, rtol=2e-3)


def test_a_step_on_the_device_needs_a_kernel():
    p = Tensor(np.ones(3, np.float32), requires_grad=True)
    with pytest.raises(ValueError, match="no kernel moves these parameters"):
        AdamW([p]).step_on_device([p.data], 0.1)


def test_recomputing_on_the_device():
    x = Tensor(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)).to(DEVICE).requires_grad_()
    recompute(lambda x: x.softmax(-1).tanh(), x)[0, 0].backward()
    found, x.grad = x.grad.numpy(), None
    x.softmax(-1).tanh()[0, 0].backward()
    assert np.array_equal(found, x.grad.numpy())
