"""Where the command computes: devices, dtypes and kernels by name, memory, and what is refused."""

import gc
import os
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import a_gpu_is_here
from test_cli import COMMAND, ENVIRONMENT, log_of, losses_of, trainer_of

from tinygrad_llm import backend, cli, device, step
from tinygrad_llm.checkpoint import checkpoints, load_training_state, save_training_state
from tinygrad_llm.cli import memory
from tinygrad_llm.generate import Decoder
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train import Trainer, TrainSettings

TEXT = "to be or not to be, that is the question\n" * 2  # one window of validation text
TINY = "--layers 1 --heads 2 --dim 16 --context 8 --batch-size 2 --vocab-size 257 --steps 2"
interpreted = pytest.mark.skipif(a_gpu_is_here(), reason="interpret needs TRITON_INTERPRET=1")
without_gpu = pytest.mark.skipif(a_gpu_is_here(), reason="there is a GPU here")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command in this process: call(line) -> (exit code, stdout, stderr)."""
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["tinygrad_llm.cli.pretraining"], "SAMPLE_TOKENS", 0)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["tinygrad-llm", *shlex.split(line)])
        with backend.using(backend.current.reading), pytest.raises(SystemExit) as ended:
            cli.main()
        code, found = ended.value.code, capsys.readouterr()
        del ended
        gc.collect()  # the lock of a run that has failed
        return code, found.out, found.err

    return run


def start(line, cwd, **variables):
    """The command in a process of its own, without TRITON_INTERPRET."""
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "TRITON_INTERPRET"}
    paths = [*variables.pop("PYTHONPATH", []), *sys.path[1:]]
    return subprocess.run(
        [*COMMAND, *shlex.split(line)], cwd=cwd, capture_output=True, encoding="utf-8", timeout=60,
        env={**environment, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables},
    )  # fmt: skip


def refused(code, out, err, *parts):
    """Whether a call ended in one line that says so, and wrote nothing."""
    assert (code, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err
    assert all(part in err for part in parts), err
    assert sorted(os.listdir()) == ["text"]
    return True


# --- which device ---------------------------------------------------------------------------------


@without_gpu
def test_without_a_gpu_it_is_the_cpu_and_says_why(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    done = start(f"train --data text {TINY} --out run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\ndevice: cpu (there is no NVIDIA driver here)\n" in done.stdout
    assert "\npeak memory: " in done.stdout and "MiB on cpu\n" in done.stdout
    lines = log_of(tmp_path / "run")
    assert [10 << 20 < line["memory"] < 10 << 30 for line in lines[1:]] == [True, True]


def test_generate_names_the_device_only_if_one_was_typed(call):
    assert call(f"train --data text {TINY} --out run --quiet --device cpu")[0] == 0
    line = "generate --model run to --max-tokens 3 --seed 1 --device cpu"
    code, plain, said = call(line)
    assert (code, said) == (0, "device: cpu\n")
    assert call(line.removesuffix("--device cpu")) == (0, plain, "")
    assert call(line + " --kernels off") == (0, plain, said)
    assert call(line + " --dtype bfloat16")[::2] == (0, said)


@pytest.mark.parametrize("command", ["train --data text", "generate --model run to"])
@pytest.mark.parametrize(
    "options, parts",
    [
        ("--device gpu", ["no device 'gpu'", "expected cpu, cuda"]),
        ("--device cuda:x", ["no device 'cuda:x'"]),
        ("--dtype float64", ["'float64' is not one of 'float32', 'bfloat16', 'float16'"]),
        ("--dtype int8", ["'int8' is not one of"]),
        ("--kernels nonsense", ["'nonsense'; expected auto, off, or off: and names"]),
        ("--kernels off:nothing", ["there is no 'nothing'"]),
    ],
)
def test_names_that_are_none(call, command, options, parts):
    assert refused(*call(f"{command} {options}"), *parts)


@without_gpu
@pytest.mark.parametrize(
    "options, gone, variables, parts",
    [
        ("--device cuda:1", None, {}, ["cuda:1 cannot be used: there is no NVIDIA driver"]),
        ("--device cuda", "cupy", {"LD_LIBRARY_PATH": "."}, ["CuPy is not installed: pip"]),
        ("--device cuda", None, {"LD_LIBRARY_PATH": "."}, ["driver is older", "update it"]),
        (
            "--device cuda",
            None,
            {"TRITON_INTERPRET": "1"},
            ["this process interprets kernels", "start another"],
        ),
        ("--device interpret", "triton", {}, ["interpret cannot be used", "pip install"]),
        (
            "",
            None,
            {"TINYGRAD_LLM_KERNELS": "nonsense"},
            ["TINYGRAD_LLM_KERNELS: kernels is"],
        ),
    ],
)
def test_what_is_missing_for_a_device(tmp_path, options, gone, variables, parts):
    """A library that is none of NVIDIA's stands for the driver of an old one."""
    if "LD_LIBRARY_PATH" in variables:
        pytest.importorskip("cupy")
        (tmp_path / "libcuda.so.1").symlink_to(os.path.realpath(_any_library()))
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{gone!r}] = None")
    line = f"train {TINY} --out run {options}"
    done = start(line, tmp_path, PYTHONPATH=[tmp_path] if gone else [], **variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert all(part in done.stderr for part in parts), done.stderr
    assert not (tmp_path / "run").exists()


def _any_library():
    """The path of a shared library that this process has loaded."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "/libc.so" in line or "/libc-" in line)


def test_a_gpu_that_is_not_there(call, monkeypatch):
    count = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: 2))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=count))
    monkeypatch.setattr(device, "why_no_gpu", lambda: None)
    assert refused(*call("train --device cuda:7"), "no cuda:7; expected cuda:0 to cuda:1")


# --- on a device ----------------------------------------------------------------------------------


def states_of(directory):
    """The training state of the newest checkpoint as a flat list, arrays as bytes."""

    def flat(x):
        if isinstance(x, dict):
            return [(name, flat(value)) for name, value in sorted(x.items())]
        if isinstance(x, list):
            return list(map(flat, x))
        return x.tobytes() if isinstance(x, np.ndarray) else x

    return flat(trainer_of(directory))


@interpreted
def test_training_that_goes_on_is_the_same_bit_for_bit(call, tmp_path, monkeypatch):
    where = device.device("interpret")
    graph = backend.kernel_module(where, "graph").Graph
    monkeypatch.setattr(graph.__init__, "__defaults__", (1,))  # warm-ups: each takes its time
    monkeypatch.setattr(where, "held", lambda: 1000)
    options = "--heads 1 --batch-size 1 --dtype bfloat16 --dropout 0.1 --eval-interval 1 --quiet"
    code, _, err = call(f"train --data text {TINY} {options} --device interpret --out run")
    assert code == 0, err
    shutil.copytree("run", "again")
    again = "train --out again --resume-from step-00000001 --device interpret --quiet"
    assert call(again)[0] == 0
    run, again = tmp_path / "run", tmp_path / "again"
    assert states_of(run) == states_of(again)
    assert all(line["memory"] > 20_000 for line in log_of(run)[1:])  # with what the graph holds
    state = trainer_of(run)["optimizer"]["state"][0]
    assert state["master"].dtype == np.float32 and state["step"] == 2
    shutil.rmtree("again")

    shutil.copytree("run", "again")  # elsewhere it is the same but for rounding
    assert call("train --out again --resume-from step-00000001 --device cpu")[0] == 0
    np.testing.assert_allclose(losses_of(again)[0], losses_of(run)[0], rtol=1e-2)
    other = call("train --out again --resume --dtype float32")
    assert other[0] == 2 and "started with bfloat16: leave --dtype out" in other[2]


@interpreted
@pytest.mark.parametrize("kernels", ["off", "off:mlp,optim"])
def test_kernels_that_are_switched_off(call, tmp_path, kernels):
    options = f"train --data text {TINY} --heads 1 --steps 1 --quiet"
    assert call(f"{options} --out cpu --device cpu")[0] == 0
    code, _, err = call(f"{options} --out run --device interpret --kernels {kernels}")
    assert code == 0, err
    expected, found = losses_of(tmp_path / "cpu")[0], losses_of(tmp_path / "run")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_step_that_is_no_graph_is_said_once(call, monkeypatch):
    monkeypatch.setattr(step.HostStep, "why_no_graph", "something waits")
    code, out, _ = call(f"train --data text {TINY} --out run --device cpu")
    said = "\nsteps are launched kernel by kernel: something waits\n"
    assert code == 0 and out.count(said) == 1


def test_a_run_from_before_there_were_dtypes_goes_on(call, tmp_path):
    assert call(f"train --data text {TINY} --out run --device cpu --quiet")[0] == 0
    path = checkpoints(tmp_path / "run")[-1]
    state = load_training_state(path)
    del state["options"]["dtype"]
    save_training_state(path, state)
    code, _, err = call("train --out run --resume --steps 3 --dtype bfloat16")
    assert code == 2 and "started with float32: leave --dtype out" in err
    assert call("train --out run --resume --steps 3 --dtype float32 --quiet")[0] == 0


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, less",
    [
        ({}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"recompute": True}, {}),
        ({"accumulate": 2, "threads": 2}, {"n_layers": 1, "vocab_size": 4000}),
    ],
)
def test_the_estimate_for_the_cpu_is_what_training_takes(options, less):
    options = {"batch_size": 4, "accumulate": 1, "recompute": False, "threads": 1} | options
    dtype = options.pop("dtype", "float32")
    cfg = GPTConfig(**{"vocab_size": 500, "context_length": 128, "emb_dim": 64, "n_heads": 2,
                       "n_layers": 3, "drop_rate": 0.0, **less})  # fmt: skip
    settings = TrainSettings(steps=2, context=128, eval_batches=1, **options)
    tracemalloc.start()
    model = GPT(cfg, Generator(0)).to(dtype)
    trainer = Trainer(model, np.arange(5000) % 500, np.arange(500), settings)
    for _ in range(2):
        trainer.training_step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = memory.training_bytes(cfg, {**options, "dtype": dtype}, device.CPU)
    assert peak / 1.5 < estimate < 1.15 * peak


@interpreted
@pytest.mark.parametrize("dtype, rate", [("float32", 0.0), ("bfloat16", 0.1)])
def test_the_estimate_for_a_gpu_is_what_a_forward_pass_keeps(dtype, rate):
    B, T, V = 1, 16, 8
    cfg = GPTConfig(V, context_length=T, emb_dim=32, n_heads=2, n_layers=2, drop_rate=rate)
    where = device.device("interpret")
    model = GPT(cfg, Generator(0)).to(where).to(dtype)
    ids = Tensor(where.put(np.arange(B * T).reshape(B, T) % V))
    tracemalloc.start()
    loss = model.loss(ids, ids)
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    found = tracemalloc.take_snapshot().filter_traces([arrays]).statistics("filename")
    tracemalloc.stop()
    kept = sum(each.size for each in found)
    assert loss.item() > 0
    numbers = memory.kept_on_gpu(cfg) * B * T
    assert 0.8 * kept < np.dtype(model.tok_emb.weight.dtype).itemsize * numbers < 1.02 * kept


def test_what_does_not_fit_is_refused_with_both_numbers(call, monkeypatch):
    monkeypatch.setattr(device.CPU, "memory", lambda: {"free": 3 << 20, "total": 1 << 40})
    parts = "this needs about ", " MiB, and cpu has 3.00 MiB that are free: use --dtype bfloat16"
    assert refused(*call("train --data text --device cpu --quiet"), *parts, "--batch-size")


class CUDAError(RuntimeError):
    """As CuPy raises it for what CUDA allocates by itself."""

    status = 2


@pytest.mark.parametrize("error", [MemoryError, CUDAError])
def test_memory_that_runs_out_on_the_way_is_one_line(call, monkeypatch, error):
    start = step.HostStep.start

    def full(self, *inputs):
        if self.optimizer.state[0].get("step") == 1:
            raise error
        start(self, *inputs)

    options = "--eval-interval 1 --device cpu --quiet"
    with monkeypatch.context() as patch:
        patch.setattr(step.HostStep, "start", full)
        code, out, err = call(f"train --data text {TINY} {options} --out run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    for part in ("cpu is out of memory: such a run takes about ", "--batch-size", "is kept"):
        assert part in err
    assert call("train --out run --resume --quiet --device cpu") == (0, "run\n", "")
    assert [line["step"] for line in log_of(Path("run"))] == [0, 1, 2]

    def no_room(*arguments):
        raise error

    monkeypatch.setattr(Decoder, "__call__", no_room)
    code, _, err = call("generate --model run to")
    assert code == 2 and err.startswith("tinygrad-llm: cpu is out of memory: use --dtype bfloat16")
