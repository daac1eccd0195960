"""Exact resume: a run that is killed again and again ends with the bits of one that never was."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tinygrad_llm.checkpoint import (
    checkpoints,
    load_model,
    load_training_state,
    save_checkpoint,
    save_training_state,
    step_of,
)
from tinygrad_llm.cli import run as run_module
from tinygrad_llm.cli.log import Log
from tinygrad_llm.cli.pretraining import new_run, resumed_run
from tinygrad_llm.cli.screen import Screen
from tinygrad_llm.data import train_val_split
from tinygrad_llm.device import CPU
from tinygrad_llm.random import Generator
from tinygrad_llm.train import Report, evaluate

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

COMMAND = [sys.executable, "-m", "tinygrad_llm", "train"]
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
TINY = ["--layers", "1", "--heads", "2", "--dim", "16", "--context", "16"]
TINY += ["--batch-size", "2", "--vocab-size", "300"]
OPTIONS = [*TINY, "--dropout", "0.2", "--accumulate", "2", "--eval-interval", "8"]
KILLS = 21


def train(*arguments, **options):
    """Runs `tinygrad-llm train` to its end; the result has returncode, stdout and stderr."""
    options = {"env": ENVIRONMENT, "encoding": "utf-8", "timeout": 120, **options}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, **options)


def assert_refused(done, *parts):
    """Exit code 2 and one line on stderr with all the parts in it."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def log_of(directory):
    """The log without what differs from run to run."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    varies = ("seconds", "memory")
    return [{k: v for k, v in json.loads(line).items() if k not in varies} for line in lines]


def files_of(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def assert_same_run(directory, other):
    """Weights, optimizer, random states, schedule, log: every bit."""
    assert log_of(directory) == log_of(other)
    a, b = files_of(directory), files_of(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name] and name.suffix == ".safetensors"] == []
    assert len(checkpoints(directory)) == 3


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("to be or not to be, that is the question.\n" * 100)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A finished run of 40 steps, saved after 24, 32 and 40."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    done = train("--data", text_file, "--out", directory, *OPTIONS, "--steps", 40)
    assert done.returncode == 0, done.stderr
    return directory


def copied(directory, to):
    for name, content in files_of(directory).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


# --- kill -9 --------------------------------------------------------------------------------------


def is_saving(process):
    """Whether a checkpoint is open that has no name yet: the process is in the middle of a save."""
    with contextlib.suppress(OSError):
        for file in Path("/proc", str(process.pid), "fd").iterdir():
            path = os.readlink(file)
            if "/checkpoints/" in path and not path.endswith(".lock"):
                return True
    return False


def kill_at_random(process, directory, rng, in_a_save):
    """SIGKILL at some moment; returns whether it came in the middle of a save."""
    if rng.random() < 0.2:  # at any time, the start of the process included
        time.sleep(rng.uniform(0, 0.6))
    else:  # some steps after it has begun to train: further than it was before
        log, saved = directory / "log.jsonl", checkpoints(directory)
        wanted = (step_of(saved[-1]) if saved else 0) + rng.randint(10, 30)
        while process.poll() is None and (not log.exists() or lines_in(log) < wanted):
            time.sleep(0.005)
    saving = False
    while in_a_save and process.poll() is None and not saving:
        saving = is_saving(process)
    if saving:
        time.sleep(rng.choice([0, 0, 0.0005, 0.002]))  # also just before and after the rename
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return saving


def lines_in(path):
    return path.read_bytes().count(b"\n")


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, text_file):
    options = ["--data", text_file, *OPTIONS, "--steps", 1200, "--quiet"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with subprocess.Popen([*COMMAND, *map(str, options), "--out", straight], env=ENVIRONMENT) as p:
        rng, kills, in_saves = random.Random(0), 0, 0
        while kills < KILLS:
            resumed = ["--resume"] if checkpoints(killed) else options
            command = [*COMMAND, *map(str, resumed), "--out", str(killed)]
            process = subprocess.Popen(
                command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            in_saves += kill_at_random(process, killed, rng, in_a_save=kills % 2)
            assert process.returncode == -signal.SIGKILL, "it ended by itself: more steps"
            kills += 1
    assert p.returncode == 0
    done = train("--out", killed, "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    assert_same_run(killed, straight)
    if Path("/proc/self/fd").exists():
        assert in_saves >= KILLS // 3


# --- what a kill leaves behind --------------------------------------------------------------------


def test_stray_files_do_not_confuse_it(tmp_path, trained):
    run = copied(trained, tmp_path / "run")
    (run / "checkpoints" / ".step-00000048.safetensors.77.tmp").write_bytes(b"half of it")
    (run / "checkpoints" / "step-99999999.safetensors.part").write_bytes(b"x")
    (run / "checkpoints" / "notes.txt").write_bytes(b"mine")
    (run / ".model.safetensors.77.tmp").write_bytes(b"half of it")
    with open(run / "log.jsonl", "ab") as file:
        file.write(b'{"step": 41, "loss": 1.0}\n{"step": 42, "lo')  # not saved, and cut
    assert train("--out", run, "--resume", "--steps", 48, "--quiet").returncode == 0
    assert [line["step"] for line in log_of(run)] == list(range(49))
    assert not list(run.rglob("*.tmp"))
    assert (run / "checkpoints" / "notes.txt").read_bytes() == b"mine"
    assert (run / "checkpoints" / "step-99999999.safetensors.part").exists()


def test_killed_before_its_first_checkpoint_it_can_start_again(tmp_path, text_file):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".incomplete", "config.json", "tokens.npy"):
        (run / name).write_bytes(b"")
    assert_refused(train("--out", run, "--resume"), "before its first checkpoint", "start it again")
    done = train("--data", text_file, "--out", run, *TINY, "--steps", 2, "--quiet")
    assert done.returncode == 0, done.stderr
    assert not (run / ".incomplete").exists() and len(checkpoints(run)) == 3


def test_a_run_of_an_earlier_version(tmp_path):
    (tmp_path / "training_state.safetensors").write_bytes(b"old")
    said = ["training_state.safetensors", "earlier version", "start a new run"]
    assert_refused(train("--out", tmp_path, "--resume"), *said)
    assert_refused(train("--out", tmp_path, *TINY), "training_state.safetensors", "would be lost")
    assert (tmp_path / "training_state.safetensors").read_bytes() == b"old"


# --- damaged checkpoints --------------------------------------------------------------------------


def truncated(content):
    return content[: len(content) // 2]


def edited(content):
    place = len(content) * 3 // 4
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def edited_header(content):
    return content.replace(b'\\"lr\\": 0.003', b'\\"lr\\": 0.004', 1)


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [truncated, edited, edited_header, emptied])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, trained, damage):
    run = copied(trained, tmp_path / "run")
    _, before, newest = checkpoints(run)
    assert damage(newest.read_bytes()) != newest.read_bytes()
    newest.write_bytes(damage(newest.read_bytes()))
    kept = files_of(run)
    refused = train("--out", run, "--resume", "--steps", 48)
    assert_refused(refused, str(newest), f"--resume-from {before.stem}")
    assert "damaged" in refused.stderr or "truncated" in refused.stderr
    assert files_of(run) == kept


def test_going_on_from_the_last_whole_checkpoint(tmp_path, trained):
    run = copied(trained, tmp_path / "run")
    older, before, newest = checkpoints(run)
    newest.write_bytes(truncated(newest.read_bytes()))
    kept = files_of(run)
    before_content = before.read_bytes()
    before.write_bytes(edited(before_content))
    refused = train("--out", run, "--resume", "--steps", 48)
    assert_refused(refused, str(newest), f"--resume-from {older.stem}")
    older_content = older.read_bytes()
    older.write_bytes(b"")
    assert_refused(train("--out", run, "--resume"), str(newest), "start a new run")
    older.write_bytes(older_content)
    before.write_bytes(before_content)
    assert files_of(run) == kept  # none of the refusals has changed anything

    done = train("--out", run, "--resume-from", before.stem, "--quiet")
    assert done.returncode == 0, done.stderr
    aside = newest.with_name(newest.name + ".aside")
    assert aside.read_bytes() == kept[newest.relative_to(run)]
    aside.unlink()
    assert_same_run(run, trained)


def test_a_checkpoint_that_is_not_there(tmp_path, trained):
    refused = train("--out", trained, "--resume-from", "step-00000001")
    assert_refused(
        refused, "step-00000001", "there are step-00000024, step-00000032, step-00000040"
    )
    assert_refused(train("--out", tmp_path, "--resume"), "has no checkpoints")


# --- patience -------------------------------------------------------------------------------------


DIVERGES = [*TINY, "--lr", 0.5, "--warmup", 2, "--eval-interval", 1, "--keep", 9]


def loss_of_the_model(directory):
    tokens = np.load(directory / "tokens.npy")
    _, held_out = train_val_split(tokens, 0.1, 16)
    return pytest.approx(evaluate(load_model(directory), held_out, 16, 2, 10), rel=1e-5)


def evaluations_of(directory):
    return {line["step"]: line["val_loss"] for line in log_of(directory) if "val_loss" in line}


def test_patience_given_later_ends_with_the_model_that_it_names(tmp_path, text_file):
    run = tmp_path / "run"
    done = train("--data", text_file, "--out", run, *DIVERGES, "--steps", 8)
    assert done.returncode == 0, done.stderr
    losses = evaluations_of(run)
    assert losses[1] < losses[2] < losses[3]  # and the model of step 1 is not kept
    later = ["--resume-from", "step-00000003", "--steps", 60, "--patience", 3]
    done = train("--out", run, *later)
    assert done.returncode == 0, done.stderr
    losses = evaluations_of(run)
    best = min((step for step in losses if step >= 3), key=losses.get)
    assert best < max(losses) == best + 3
    assert f"the model is that of step {best}, with the lowest: {losses[best]:.3f}" in done.stdout
    assert losses[best] == loss_of_the_model(run)


def test_the_model_of_an_abandoned_branch_does_not_stay(tmp_path, text_file):
    run = tmp_path / "run"
    options = ["--data", text_file, "--out", run, *DIVERGES, "--patience", 4]
    assert train(*options, "--steps", 60, "--quiet").returncode == 0
    losses = evaluations_of(run)
    best = min(losses, key=losses.get)
    assert losses[best] == loss_of_the_model(run)
    *_, older, newer = [path for path in checkpoints(run) if step_of(path) <= best]
    resumed = resumed_run(run, older.stem, {}, set(), None, None, False, CPU, Screen(True))
    step, lowest = resumed.trainer.best  # it has not made a step yet: it may be killed now
    assert step < best and lowest == losses[step] == loss_of_the_model(run)
    resumed.log.close()
    resumed.lock.close()
    assert train("--out", run, "--resume", "--quiet").returncode == 0
    done = train("--out", run, "--resume-from", older.stem)
    assert f"set aside, until you delete it: {newer}.aside.aside\n" in done.stdout
    assert losses[best] == loss_of_the_model(run)


# --- another process, another machine -------------------------------------------------------------


def test_one_process_at_a_time(tmp_path, trained):
    run = copied(trained, tmp_path / "run")
    command = [*COMMAND, "--out", str(run), "--resume", "--steps", "100000", "--quiet"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE) as first:
        try:
            while first.poll() is None and lines_in(run / "log.jsonl") < 50:
                time.sleep(0.01)
            refused = train("--out", run, "--resume", "--steps", 100_000)
            assert_refused(refused, f"another process trains in {run}")
            refused = train("--out", run, *TINY)
            assert_refused(refused, f"{run} already holds a training run")
        finally:
            first.kill()
    steps = [line["step"] for line in log_of(copied(run, tmp_path / "whole_lines"))[:-1]]
    assert steps == list(range(len(steps)))
    assert train("--out", run, "--resume", "--steps", 1).returncode == 2
    resumed_run(
        run, None, {}, set(), 100_000, None, False, CPU, Screen(True)
    ).log.close()  # no lock


def test_two_that_start_at_once(tmp_path, text_file):
    command = [*COMMAND, "--data", text_file, "--out", tmp_path / "run", *TINY, "--steps", 2]
    both = [
        subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8",
        )
        for _ in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert len(log_of(tmp_path / "run")) == 3 and len(checkpoints(tmp_path / "run")) == 3


def test_a_run_that_came_in_between_is_not_written_over(tmp_path, trained, monkeypatch):
    options = load_training_state(checkpoints(trained)[-1])["options"]

    def made(out):
        copied(trained, out)
        return out

    monkeypatch.setattr(run_module, "_made_directory", made)
    with pytest.raises(ValueError, match="already holds a training run"):
        new_run(tmp_path / "run", options, 2, None, False, CPU, Screen(True))
    assert files_of(tmp_path / "run") == files_of(trained)


def test_going_on_with_another_number_of_blas_threads(tmp_path, text_file):
    wide = ["--layers", 1, "--heads", 2, "--dim", 150, "--context", 64, "--batch-size", 3]
    wide += ["--vocab-size", 300, "--dropout", 0.1, "--threads", 2, "--eval-interval", 2]
    options = ["--data", text_file, "--out", tmp_path / "straight", *wide, "--steps", 4]
    assert train(*options, "--warmup", 1, "--quiet").returncode == 0
    copied(tmp_path / "straight", tmp_path / "changed")
    for name, number in (("straight", "1"), ("changed", "2")):
        environment = {**ENVIRONMENT, "OPENBLAS_NUM_THREADS": number}
        done = train("--out", tmp_path / name, "--resume", "--steps", 8, env=environment)
        assert done.returncode == 0, done.stderr
        assert "may differ" not in done.stdout
    assert_same_run(tmp_path / "straight", tmp_path / "changed")


def test_a_run_of_another_processor_is_said(tmp_path, trained):
    run = copied(trained, tmp_path / "run")
    state = load_training_state(checkpoints(run)[-1])
    state["trainer"]["versions"]["BLAS"] = "openblas 0.1 Z80"
    save_checkpoint(run, 40, state, 3)
    done = train("--out", run, "--resume", "--steps", 41)
    assert done.returncode == 0 and done.stdout.count("openblas 0.1 Z80, goes on with") == 1


# --- a damaged log --------------------------------------------------------------------------------


def test_a_damaged_log_keeps_its_readable_lines_and_is_kept(tmp_path, trained):
    run = copied(trained, tmp_path / "run")
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    broken = b"".join([*lines[:20], lines[20][:9] + b"\n", b"[" * 100_000 + b"\n", *lines[22:]])
    (run / "log.jsonl").write_bytes(broken)
    done = train("--out", run, "--resume", "--steps", 41)
    assert done.returncode == 0, done.stderr
    kept = run / "log.jsonl.damaged"
    said = f"{run / 'log.jsonl'} lacks 2 of the steps so far: 2 of its lines cannot be read; "
    assert done.stdout.count(f"{said}as it was, it is in {kept}\n") == 1
    assert kept.read_bytes() == broken
    assert [line["step"] for line in log_of(run)] == [*range(20), *range(22, 42)]

    (run / "log.jsonl").write_bytes(broken)
    Log(run, 41).close()
    assert kept.read_bytes() == (run / "log.jsonl.damaged.damaged").read_bytes() == broken


@pytest.mark.parametrize("lines", [0, 30])
def test_a_log_that_is_gone_or_cut_is_said(tmp_path, trained, lines):
    run = copied(trained, tmp_path / "run")
    log = run / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:lines])[:-5])
    if not lines:
        log.unlink()
    kept = max(lines - 1, 0)
    found = Log(run, 40)
    found.close()
    assert found.damage == f"{log} lacks {41 - kept} of the steps so far"
    assert [line["step"] for line in log_of(run)] == list(range(kept))
    assert not list(run.glob("*.damaged"))


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    synced = []
    log = Log(tmp_path, -1)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    log.add(Report(1, loss=2.0))
    log.sync()
    log.close()
    assert synced == [(tmp_path / "log.jsonl").stat().st_ino]


# --- a full disk ----------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path, trained):
    run = copied(trained, tmp_path / "run")
    before = files_of(run)
    size = checkpoints(run)[-1].stat().st_size

    def limit():  # what is written beyond it fails, as on a full disk; a checkpoint does not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    full = train("--out", run, "--resume", "--steps", 60, preexec_fn=limit)
    assert_refused(full, "No space left", "what was saved before is kept")
    after = files_of(run)
    kept = [name for name in before if name.parent.name == "checkpoints"]
    assert kept and all(after[name] == before[name] for name in kept)
    assert not list(run.rglob("*.tmp"))

    other = copied(trained, tmp_path / "other")
    for directory in (run, other):  # now there is space
        done = train("--out", directory, "--resume", "--steps", 60, "--quiet")
        assert done.returncode == 0, done.stderr
    assert_same_run(run, other)


def test_a_disk_that_is_full_from_the_start(tmp_path, text_file):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    full = train(
        "--data", text_file, "--out", tmp_path / "a" / "run", *TINY, "--steps", 2, preexec_fn=limit
    )
    assert_refused(full, "nothing was saved yet", "run the same command again")
    assert list(tmp_path.iterdir()) == []
    done = train("--data", text_file, "--out", tmp_path / "run", *TINY, "--steps", 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("function", ["fsync", "replace", "link"])
def test_a_save_that_fails_keeps_all_checkpoints(tmp_path, monkeypatch, function):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": np.ones(10)}, keep=1)
    before = files_of(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    if function == "link" and not hasattr(os, "O_TMPFILE"):
        pytest.skip("files have names from the start here")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    assert files_of(tmp_path) == before


# --- the file -------------------------------------------------------------------------------------


def some_state():
    return {
        "weights": {
            "a.b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "empty": np.zeros((0, 2)),
            "number": np.array(3.5),
            "half": np.float16([1, 2, 3]),
            "flags": np.array([True, False, True]),
        },
        "optimizer": [{"step": 3, "m": np.float64([1e-300, np.pi])}, {}],
        "random": Generator(1).get_state(),
        "rate": 0.1 + 0.2,
        "text": "„$tensor“",
        "nothing": None,
    }


def test_a_training_state_comes_back_exactly(tmp_path):
    state, path = some_state(), tmp_path / "state.safetensors"
    save_training_state(path, state)
    loaded = load_training_state(path)
    assert loaded.keys() == state.keys()
    for name in ("random", "rate", "text", "nothing"):
        assert loaded[name] == state[name]
    for name, array in state["weights"].items():
        np.testing.assert_array_equal(loaded["weights"][name], array)
        assert loaded["weights"][name].dtype == array.dtype
    assert loaded["optimizer"][0]["step"] == 3 and loaded["optimizer"][1] == {}
    np.testing.assert_array_equal(loaded["optimizer"][0]["m"], state["optimizer"][0]["m"])
    theirs = safetensors.numpy.load_file(path)  # the library of that name opens it, too
    np.testing.assert_array_equal(theirs["state/weights/a.b"], state["weights"]["a.b"])
    with pytest.raises(TypeError, match="state/x is an array of complex128"):
        save_training_state(path, {"x": np.zeros(1, complex)})


def test_a_changed_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "state.safetensors"
    save_training_state(path, some_state())
    content = path.read_bytes()
    for place in [*range(200), *range(200, len(content), 15)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|truncated|no training state"):
            load_training_state(path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            load_training_state(path)
    safetensors.numpy.save_file({"x": np.ones(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint of training"):
        load_training_state(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_training_state(tmp_path / "none")


def test_saving_and_loading_do_not_take_the_memory_twice(tmp_path):
    state = {"x": [np.ones(1 << 18, np.float32) for _ in range(16)]}  # 16 MiB
    path = tmp_path / "state.safetensors"
    tracemalloc.start()
    try:
        save_training_state(path, state)
        loaded = load_training_state(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20
    np.testing.assert_array_equal(loaded["x"][7], state["x"][7])


def test_the_last_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 100_000_000, 6):  # as after going on from an earlier one
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-00000006.safetensors",
        "step-100000000.safetensors",
    ]
    assert checkpoints(tmp_path / "none") == []
