"""Fine-tuning as a whole: it learns, it is stopped and goes on bit for bit, and a state alone makes
the model again, with its head and adapters."""

from dataclasses import replace

import numpy as np
import pytest

from tinygrad_llm import random
from tinygrad_llm.checkpoint import load_training_state, save_training_state
from tinygrad_llm.cli.finetune.tuning import memory_for, memory_to_go_on
from tinygrad_llm.cli.run import Saved
from tinygrad_llm.device import device
from tinygrad_llm.finetune import (
    ClassificationDataset,
    GPTClassifier,
    Instructions,
    Table,
    evaluate,
    get_template,
)
from tinygrad_llm.finetune.training import ClassifierTrainer, InstructionTrainer, held_out_loss
from tinygrad_llm.generate import generate
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import LoRAConfig, apply_lora, set_adapter, trainable
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import END_OF_TEXT, BPETokenizer
from tinygrad_llm.train import TrainSettings

WORDS = "the sea is wide and blue, a stone is grey; trees grow green by the river in spring"
TOKENIZER = BPETokenizer.train(WORDS, 300, (END_OF_TEXT,))
SETTINGS = {"batch_size": 4, "lr": 3e-3, "eval_interval": 2, "threads": 2}
COLOURS = {"blue": "the sea", "grey": "a stone", "green": "trees"}


def make_gpt(dropout=0.0, context=64):
    cfg = GPTConfig(300, context, 16, 2, 2, dropout, tie_weights=True)
    return GPT(cfg, Generator(0))


def texts(n=24, seed=0):
    rng, names = np.random.default_rng(seed), list(COLOURS)
    labels = [names[i % 3] for i in range(n)]
    other = ["is", "wide", "in spring", "by the river"]
    found = [f"{rng.choice(other)} {COLOURS[name]} {rng.choice(other)}" for name in labels]
    return Table.of(found, labels, names)


def entries(n=12):
    names = list(COLOURS.items())
    return [
        {"instruction": f"colour {i}?", "input": names[i % 3][1], "output": names[i % 3][0]}
        for i in range(n)
    ]


def classification(steps, lora=False, dropout=0.1, **settings):
    """Its class, the datasets, and a new trainer."""
    rows = [ClassificationDataset(texts(seed=seed), TOKENIZER, trim=True) for seed in (0, 1)]
    random.manual_seed(0)
    model = GPTClassifier(make_gpt(dropout), texts().classes, "mean", bias=False, max_length=20)
    if lora:
        apply_lora(model, LoRAConfig(2, 4.0, 0.1, split_qkv=True))
        model.head.requires_grad_()
    made = TrainSettings(steps, context=20, **{**SETTINGS, **settings})
    return ClassifierTrainer, rows, lambda dtype=None: ClassifierTrainer(model, *rows, made, dtype)


def instruction(steps, lora=False, packing=False, **settings):
    template = get_template("phi3")
    rows = [Instructions(entries(n), TOKENIZER, template, 64, packing) for n in (12, 5)]
    rows = [each.packed() for each in rows] if packing else rows
    random.manual_seed(0)
    model = make_gpt(0.0 if packing else 0.1)
    if lora:
        apply_lora(model, LoRAConfig(2, 4.0, targets=["qkv"]))
    made = TrainSettings(steps, context=64, **{**SETTINGS, **settings})
    return (
        InstructionTrainer,
        rows,
        lambda dtype=None: InstructionTrainer(model, *rows, made, dtype),
    )


RUNS = {
    "classes": (classification, {"patience": 9}, None),
    "classes, LoRA": (classification, {"lora": True, "patience": 9}, None),
    "classes, LoRA in bfloat16": (classification, {"lora": True}, "bfloat16"),
    "instructions, in pieces": (instruction, {"accumulate": 2}, None),
    "instructions, LoRA": (instruction, {"lora": True, "recompute": True}, None),
    "instructions, packed": (instruction, {"packing": True, "batch_size": 2}, None),
}


def assert_same(a, b, where="state"):
    """Nested dicts and lists of equal arrays and values."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), where
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", RUNS)
def test_what_was_stopped_ends_with_the_same_bits(tmp_path, name):
    make, settings, dtype = RUNS[name]
    kind, rows, new = make(6, **settings)
    straight = new(dtype)
    list(straight.run())
    kind, rows, new = make(6, **settings)
    stopped = new(dtype)
    for report in stopped.run():
        if report.step == 3:  # between two validations, in the middle of an epoch
            break
    save_training_state(tmp_path / "state", stopped.state_dict())
    random.manual_seed(99)  # what another process would not share
    resumed = kind.resume(load_training_state(tmp_path / "state"), *rows)
    assert resumed.step == 3
    list(resumed.run())
    assert_same(resumed.state_dict(), straight.state_dict())
    batch = rows[1].batch([0, 1])
    model, same = resumed.best_model().eval(), straight.best_model().eval()
    assert model.loss(*batch).item() == same.loss(*batch).item()


def test_a_state_has_all_adapters_and_which_one_trains(tmp_path):
    kind, rows, new = instruction(3)
    model = new().model
    apply_lora(model, LoRAConfig(2, 4.0, targets=["up"]), "first")
    apply_lora(model, LoRAConfig(3, 1.0, 0.1, ["blocks.1.*"], True, True), "second")
    set_adapter(model, "first")
    trainer = kind(model, *rows, new().settings)
    next(report for report in trainer.run() if report.step == 2)
    save_training_state(tmp_path / "state", trainer.state_dict())
    resumed = kind.resume(load_training_state(tmp_path / "state"), *rows)
    for each in (trainer, resumed):
        assert len(list(each.run())) == 1
    assert_same(resumed.state_dict(), trainer.state_dict())
    batch = rows[1].batch([0, 1])
    for name in ("first", "second", None):
        losses = []
        for each in (trainer.model.eval(), resumed.model.eval()):
            set_adapter(each, name)
            losses.append(each.loss(*batch).item())
        assert losses[0] == losses[1]


def test_a_state_is_of_its_data():
    kind, rows, new = classification(4)
    state = new().state_dict()
    other = ClassificationDataset(texts(seed=7), TOKENIZER, trim=True)
    with pytest.raises(ValueError, match="other data"):
        kind.resume(state, rows[0], other)
    # How wide rows are padded does not count: a GPU needs all of one width.
    wide = [ClassificationDataset(texts(seed=seed), TOKENIZER, 20) for seed in (0, 1)]
    assert kind.resume(state, *wide).step == 0
    with pytest.raises(ValueError, match="can only be raised"):
        kind.resume(state, *rows, steps=3)
    kind, rows, new = instruction(4)
    state, shorter = new().state_dict(), Instructions(entries(), TOKENIZER, get_template("phi3"), 9)
    with pytest.raises(ValueError, match="other data"):
        kind.resume(state, shorter, rows[1])


def test_data_that_do_not_fit_the_classifier():
    _, rows, new = classification(2)
    model, settings = new().model, new().settings
    table = texts()
    turned = Table.of(table.texts, [table.classes[i] for i in table.labels], table.classes[::-1])
    turned = ClassificationDataset(turned, TOKENIZER)
    for parts in ((rows[0], turned), (turned, rows[1])):
        with pytest.raises(ValueError, match="the model tells blue, grey, green apart"):
            ClassifierTrainer(model, *parts, settings)
    model.position = "last_padded"  # and rows are trimmed
    with pytest.raises(ValueError, match="no trim"):
        ClassifierTrainer(model, *rows, settings)


def test_memory_to_go_on_is_what_a_new_run_takes():
    _, _, new = classification(2, lora=True)
    trainer = new()
    model, where = trainer.model, device("cpu")
    options = {"dtype": "float32", "threads": 2, "recompute": False, "accumulate": 1}
    options["batch_size"] = 4
    saved = Saved(None, None, trainer.state_dict(), options)
    cfg = replace(model.cfg, vocab_size=3)
    expected = memory_for(cfg, trainable(model), 20, options, where)
    assert memory_to_go_on(saved, where, 3) == expected


def test_a_classifier_learns_and_validates_on_everything():
    _, rows, new = classification(180, dropout=0.0, lr=1e-2, eval_interval=60)
    trainer = new()
    reports = [report for report in trainer.run() if report.val_loss is not None]
    loss, scores = evaluate(trainer.model, rows[1])
    assert reports[-1].val_loss == pytest.approx(loss, rel=1e-5)
    assert reports[-1].val_accuracy == scores.accuracy == trainer.scores.accuracy == 1.0
    assert reports[0].val_accuracy < 0.7 and reports[0].val_loss == pytest.approx(
        np.log(3), abs=0.4
    )
    assert [report.epoch for report in reports] == [step / 6 for step in (0, 60, 120, 180)]
    assert trainer.per_step == (4, "texts")


@pytest.mark.parametrize("packing", [False, True])
def test_a_gpt_learns_to_respond(packing):
    _, rows, new = instruction(400, packing=packing, lr=1e-2, eval_interval=400, batch_size=2)
    trainer = new()
    before, after = (report.val_loss for report in trainer.run() if report.val_loss is not None)
    assert after < 0.5 < before
    assert held_out_loss(trainer.model, rows[1], 3) == pytest.approx(after, rel=1e-5)
    template = get_template("phi3")
    for entry in entries(3):
        ids = template.ids(TOKENIZER, [], template.content(entry["instruction"], entry["input"]))
        stop = template.stop_ids(TOKENIZER)
        (row,) = generate(trainer.model, [ids], 12, temperature=0, stop_id=stop)
        assert template.extract(TOKENIZER.decode(row[len(ids) :])) == entry["output"]


def test_rows_of_one_width_have_the_same_loss():
    template, model = get_template("alpaca"), make_gpt(context=256).eval()
    some = entries(6)  # of up to 143 tokens
    narrow, wide = (Instructions(some, TOKENIZER, template, 250, trim=t) for t in (True, False))
    longest = max(map(len, wide.texts))
    for rows in ([0, 1], [5], [2, 3, 4]):
        a, b = narrow.batch(rows), wide.batch(rows)
        assert {x.shape for x in b} == {(len(rows), longest)}
        assert model.loss(*a).item() == pytest.approx(model.loss(*b).item(), rel=1e-5)


def test_of_the_best_weights_only_those_are_kept_that_train():
    _, _, new = classification(2, lora=True, patience=3)
    trainer = new()
    frozen = {n: p.data.copy() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    list(trainer.run())
    best = trainer.best_model()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.best_weights.keys() == trained
    assert all("lora" in name or name == "head.weight" for name in trained)
    weights = dict(best.named_parameters())
    for name, array in (frozen | trainer.best_weights).items():
        np.testing.assert_array_equal(weights[name].data, array)
    for name, parameter in trainer.model.named_parameters():  # one model takes the memory of both
        shared = weights[name].data is parameter.data
        assert shared == (name in frozen) and weights[name].grad is None


def test_too_little_data_for_a_step():
    with pytest.raises(ValueError, match="24 items makes no batch of 32"):
        classification(2, batch_size=16, accumulate=2)[2]()
