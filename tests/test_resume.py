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
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tinygrad_llm.checkpoint import (
    checkpoints,
    load_training_state,
    save_checkpoint,
    save_training_state,
)
from tinygrad_llm.random import Generator

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

COMMAND = [sys.executable, "-m", "tinygrad_llm", "train"]
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
TINY = "--layers 1 --heads 2 --dim 16 --context 16 --batch-size 2 --vocab-size 300".split()
OPTIONS = [*TINY, "--dropout", "0.2", "--accumulate", "2", "--eval-interval", "8"]
KILLS = 21


def train(*arguments, **options):
    """Runs `tinygrad-llm train` to its end; the result has returncode, stdout and stderr."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, encoding="utf-8",
        timeout=120, **options,
    )  # fmt: skip


def assert_refused(done, *parts):
    """Exit code 2 and one line on stderr with all the parts in it."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def log_of(directory):
    """The log without what differs from run to run."""
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


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
            if "/checkpoints/" in os.readlink(file):
                return True
    return False


def kill_at_random(process, directory, rng, in_a_save):
    """SIGKILL at some moment; returns whether it came in the middle of a save."""
    log, before = directory / "log.jsonl", time.monotonic()
    if rng.random() < 0.2:  # at any time, the start of the process included
        time.sleep(rng.uniform(0, 1))
    else:  # some steps after it has begun to train
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and time.monotonic() < before + 30:
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
    saving = False
    while in_a_save and process.poll() is None and not saving:
        saving = is_saving(process)
    if saving:
        time.sleep(rng.choice([0, 0, 0.0005, 0.002]))  # also just before and after the rename
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return saving


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, text_file):
    options = ["--data", text_file, *OPTIONS, "--steps", 1600, "--quiet"]
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
