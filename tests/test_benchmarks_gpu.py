"""Training and generation on a GPU, measured where there is none: tiny models in the interpreter,
PyTorch on the CPU beside them, and sums that add up. No figure here says how fast anything is.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed, they run from the repository

from benchmarks import generate_gpu, gpu, machine, train_gpu  # noqa: E402
from benchmarks.__main__ import app  # noqa: E402
from benchmarks.measure import Timing  # noqa: E402
from benchmarks.worker import OutOfMemoryError, Worker, WorkerError  # noqa: E402
from tinygrad_llm import backend  # noqa: E402

needs_torch = pytest.mark.skipif(not machine.installed("torch"), reason="compares with PyTorch")
interpreted = pytest.mark.skipif(
    not machine.installed("triton") or os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs in Triton's interpreter",
)
# Kernels have tests of their own, and the interpreter takes its time.
MATHS = "off:" + ",".join([*backend.TABLE, *backend.FUSED])


class Here:
    """A Worker in this process."""

    def __init__(self, factory, *arguments, deadline=math.inf):
        self.made = factory(*arguments)

    def call(self, method, *arguments, **options):
        try:
            return getattr(self.made, method)(*arguments, **options)
        except MemoryError as error:
            raise OutOfMemoryError("out of memory") from error

    def close(self):
        pass


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs a command in this process: (what it says, what it saves)."""
    monkeypatch.setattr(machine, "limit_threads", lambda count: None)  # too late for that
    for module in (train_gpu, generate_gpu):
        monkeypatch.setattr(module, "Worker", Here)

    def run(*arguments):
        with backend.using(backend.reading(MATHS)):
            done = CliRunner().invoke(app, [*arguments, "--save", "--results", str(tmp_path)])
        assert done.exit_code == 0, done.output
        (path,) = tmp_path.glob("*.json")
        markdown = path.with_suffix(".md").read_text(encoding="utf-8")
        return markdown, json.loads(path.read_text(encoding="utf-8"))

    return run


TRAIN = ["train", "--device", "interpret", "--model", "tiny", "--vocab", "17", "--rounds", "1"]
TRAIN += ["--batch", "2", "--steps", "1", "--check", "2"]


@needs_torch
@interpreted
def test_training(command):
    markdown, saved = command(*TRAIN)
    assert saved["command"] == "train" and saved["machine"]["gpu"] == "interpreter, no GPU"
    results = saved["results"]
    losses, float32 = results["losses"], results["float32"]
    assert set(losses["curves"]) == {"ours", "PyTorch eager", "PyTorch float32"}
    assert all(len(curve) == 2 for curve in losses["curves"].values()) and losses["agree"]
    assert 1e-6 < losses["from float32"]["ours"] < 1e-3  # 16 bits, but the same training
    assert len(float32["cpu"]) == len(float32["gpu"]) == 1 and float32["relative"] < 1e-5
    race, launched = results["races"]
    assert set(launched["results"]) == {"ours", "ours, launched"}
    assert launched["results"]["ours, launched"]["no graph"] and launched["problems"] == {}
    ours, eager = race["results"]["ours"], race["results"]["PyTorch eager"]
    median = ours["seconds"]["median"]
    assert ours["tokens_per_second"] == pytest.approx(2 * 8 / median)
    assert eager["ratio"]["median"] == pytest.approx(eager["seconds"]["median"] / median)
    assert "no graph" not in ours  # and its memory nobody knows
    assert "| PyTorch eager |" in markdown and "the target is 520,000" in markdown


@needs_torch
@interpreted
@pytest.mark.skipif(not machine.installed("transformers"), reason="a peer")
def test_generation(command):
    small = ["--size", "tiny", "--batch", "2", "--prompt", "3", "--new", "3", "--rounds", "1"]
    markdown, saved = command("generate", "--device", "interpret", *small, "--bandwidth", "4.8")
    tasks = saved["results"]["tasks"]
    assert [task["dtype"] for task in tasks] == ["float32", "bfloat16"]
    for task in tasks:
        assert set(task["results"]) == {"ours", *generate_gpu.PEERS} and task["problems"] == {}
    float32, bfloat16 = tasks
    assert float32["alike"] == dict.fromkeys(generate_gpu.PEERS, 2)
    assert float32["bytes"] == 2 * bfloat16["bytes"]
    # 97 tokens, 16 wide, 2 layers of 12 C² + 13 C, the last norm; 2 rows of 4.5 tokens in the cache
    weights = 97 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16
    assert bfloat16["bytes"] == 2 * (weights + 2 * 2 * 16 * 2 * 4.5)
    assert "| transformers |" in markdown and "2 of 2" in markdown


@needs_torch
def test_no_gpu_is_one_line(monkeypatch):
    if machine.installed("torch") and gpu.why_not("cuda") is None:
        pytest.skip("there is one")
    monkeypatch.setattr(machine, "limit_threads", lambda count: None)
    for name in ("train", "generate"):
        done = CliRunner().invoke(app, [name, "--device", "cuda"])
        assert done.exit_code == 2
        assert done.output.startswith("error: cuda cannot be used: ")
        assert done.output.count("\n") == 1


# --- what they are made of ------------------------------------------------------------------------


class Job:
    """What a worker is told to do in a test."""

    def __init__(self, start):
        self.value = 100 // start

    def add(self, x, more=0):
        self.value += x + more
        return self.value

    def fill(self, why):
        raise why

    def sleep(self):
        time.sleep(60)

    def leave(self):
        os._exit(3)

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGINT)
        return "still here"


def test_a_worker_keeps_its_object_in_another_process():
    with contextlib.closing(Worker(Job, 10)) as worker:
        assert [worker.call("add", 1), worker.call("add", 2, more=3)] == [11, 16]
        with pytest.raises(OutOfMemoryError, match=r"^out of memory$"):
            worker.call("fill", RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
        with pytest.raises(OutOfMemoryError):
            worker.call("fill", MemoryError("cuda:0 has no room for 8 bytes"))
        with pytest.raises(WorkerError, match=r"^KeyError: 'x'$"):
            worker.call("fill", KeyError("x"))
        assert worker.call("add", 0) == 16  # and lives on
        for method in ("leave", "add"):
            with pytest.raises(WorkerError, match="its process has ended"):
                worker.call(method)


def test_a_worker_leaves_ctrl_c_to_its_maker():
    with contextlib.closing(Worker(Job, 1)) as worker:
        assert worker.call("interrupt") == "still here"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_worker_that_cannot_begin_says_why():
    broken = pytest.raises(WorkerError, match="ZeroDivisionError")
    with contextlib.closing(Worker(Job, 0)) as worker, broken:
        worker.call("add", 1)


def test_a_worker_is_ended_at_the_deadline():
    with contextlib.closing(Worker(Job, 1, deadline=time.monotonic())) as worker:
        with pytest.raises(WorkerError, match="out of time"):
            worker.call("sleep")
        assert not worker._process.is_alive()
        with pytest.raises(WorkerError, match="its process has ended"):
            worker.call("add", 1)


def test_whoever_fails_leaves_the_others_to_it():
    log, times = [], iter([3.0, 4.0, 5.0])

    def ours():
        log.append("ours")
        return {"seconds": [next(times)], "memory": 7}

    def full():
        log.append("full")
        raise OutOfMemoryError("out of memory")

    done, last, problems = gpu.take_turns({"ours": ours, "full": full}, rounds=3)
    assert log == ["ours", "full", "ours", "ours"]
    assert done == {"ours": Timing((3.0, 4.0, 5.0), 3.0)} and last["ours"]["memory"] == 7
    assert problems == {"full": "out of memory"} and gpu.ratios(done) == {}


class Fakes(train_gpu.Arena):
    """Contestants of known speed and size, on a GPU of 100 bytes."""

    def __init__(self):
        self.times = {"ours": 1.0, "PyTorch eager": 2.0, "torch.compile": 1.5}
        self.sizes = {"ours": 1, "PyTorch eager": 5, "torch.compile": 3}
        self.config, self.deadline, self.compiled = train_gpu.config("tiny", 17), math.inf, True
        self.asked, self.dropped = [], []

    def __getitem__(self, name):
        return SimpleNamespace(call=partial(self.turn, name))

    def drop(self, name):
        self.dropped.append(name)

    def turn(self, name, method, batch, steps, seconds=1.0, graph=True):
        self.asked.append((name if graph else "launched", batch))
        memory = batch * self.sizes.get(name, 1)
        if memory > 100:
            raise OutOfMemoryError("out of memory")
        return {"seconds": [self.times.get(name, 1.2) * batch], "memory": memory}


def test_batches_grow_until_they_do_not_fit():
    arena = Fakes()
    race = {"rounds": 2, "steps": 5, "seconds": 1.0, "say": lambda line: None}
    races = train_gpu.race_all(arena, [64, 16, 32], **race)
    races += train_gpu.race_extras(arena, races, **race)
    assert [race["batch"] for race in races] == [16, 32, 64, 16, 16, 64]
    assert races[1]["problems"] == {"PyTorch eager": "out of memory"}
    assert races[2]["problems"] == {"torch.compile": "out of memory"}
    assert ("PyTorch eager", 64) not in arena.asked and arena.asked.count(("ours", 32)) == 2
    assert arena.dropped[:2] == ["PyTorch eager", "torch.compile"]
    extras = [list(race["results"])[1] for race in races[3:]]
    assert extras == ["ours, launched", *(f"torch.compile {m}" for m in train_gpu.EXTRA_MODES)]
    ratios = [r["results"][name]["ratio"]["median"] for r, name in zip(races[3:], extras)]
    assert ratios == pytest.approx([1.0, 1.2, 1.2])
    (first, *_), h200 = train_gpu.tables(races, 1e12, gpu.Ceilings.of("NVIDIA H200")), 989
    assert first.rows[0][2:4] == ["8", f"{8 / h200:.1%}"]  # 16 rows of 8 tokens in 16 s
    said = " ".join(train_gpu._reached(races))
    assert "Batch 32: 1.50 times torch.compile" in said and "no more memory" in said


def test_what_makes_figures_worthless_is_said():
    fine = {"losses": {"agree": True}, "float32": {"agree": True}, "races": []}
    assert train_gpu.failures(fine) == []
    late = {"problems": {"ours": "out of time"}, "batch": 8}
    broken = {"problems": {"ours": "ValueError: x"}, "batch": 16}
    bad = {"losses": {"agree": False}, "float32": {"problem": "KeyError: 'x'"}}
    assert train_gpu.failures(bad | {"races": [late, broken]}) == [
        "our losses beside PyTorch's: too far apart",
        "our float32 beside the CPU's losses: KeyError: 'x'",
        "ours at batch 16: ValueError: x",
    ]
    task = {"task": "T", "dtype": "float32", "batch": 64, "problems": {}, "alike": {"a": 61}}
    assert generate_gpu.failures([task]) == []
    assert generate_gpu.failures([task | {"alike": {"a": 60}}]) == [
        "T: a's text is ours in 60 of 64 rows only"
    ]
    assert generate_gpu.failures([task | {"dtype": "bfloat16", "alike": {"a": 1}}]) == []


def test_model_flops_of_gpt2():
    """nanoGPT's count, and what 520,000 tokens/s are of an H200."""
    flops = train_gpu.flops_per_token(train_gpu.config("gpt2", 50257))
    assert flops == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    h200 = gpu.Ceilings.of("NVIDIA H200")
    assert flops * 520_000 / h200.flops == pytest.approx(0.4496, abs=1e-4)
    assert gpu.Ceilings.of("GeForce 256") == gpu.Ceilings(None, None)
    assert gpu.Ceilings.of("GeForce 256", teraflops=2, terabytes=0.5).bandwidth == 5e11


def test_losses_that_are_no_numbers_are_infinitely_far():
    assert gpu.largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    for losses in ([math.nan, 2.0], [1.0, math.nan], [1.0, math.inf]):
        assert gpu.largest_difference(losses, [1.0, 2.0]) == math.inf


def test_a_step_by_kernel():
    def event(name, start, microseconds, kind="kernel"):
        return {"name": name, "ts": start, "dur": microseconds, "cat": kind}

    trace = [
        event("host", 0, 900, "cpu_op"),
        event("matmul", 150, 60),
        event("copy", 100, 20, "gpu_memcpy"),
        event("matmul", 110, 20),  # overlaps the copy
        event("add", 230, 20),
    ]
    found = train_gpu.by_kernel(trace, steps=2)
    names = [(row["name"], row["calls"]) for row in found["kernels"]]
    assert names == [("matmul", 1.0), ("copy", 0.5), ("add", 0.5)]
    assert [row["share"] for row in found["kernels"]] == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert found["span"] == pytest.approx(75e-6)
    assert found["idle"] == pytest.approx(20e-6)  # (130 to 150 and 210 to 230) / 2
    table = train_gpu.profile_table("ours", found | {"batch": 8}, most=1)
    assert [row[:2] for row in table.rows] == [["matmul", "1"], ["2 others", "1"]]


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_a_profile_without_kernels_says_so():
    import torch

    x = torch.ones(8, 8)
    with pytest.raises(ValueError, match="the profiler saw no kernels"):
        train_gpu.traced(lambda: x @ x, lambda: None, 1)


def test_profiles_of_what_fits():
    arena = Fakes()
    found = train_gpu.profile(arena, [16, 64], 5, say=lambda line: None)
    assert [(name, found[name]["batch"]) for name in found] == [("ours", 64), ("torch.compile", 16)]


@needs_torch
def test_a_static_cache_writes_what_the_whole_model_does():
    import torch

    from benchmarks.torch_gpt import Greedy, TorchGPT
    from tinygrad_llm.gpt import GPTConfig

    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=41, context_length=12, emb_dim=16, n_heads=2, n_layers=2)
    model = TorchGPT(cfg)
    ids = text = torch.randint(41, (3, 4))
    for _ in range(6):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    loop = Greedy(model, 3, 12, mode=None)
    for _ in range(2):  # also over what an earlier text has left
        assert torch.equal(loop.generate(ids, 6), text)
