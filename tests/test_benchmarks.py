"""The benchmarks run, at settings that take seconds: well-formed results, and sums that add up."""

import ast
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed, they run from the repository

from benchmarks import floor, loading, machine, techniques, train  # noqa: E402
from benchmarks.contestant import Contestant  # noqa: E402
from benchmarks.measure import Method, Ratio, Spread, Timing, interleaved  # noqa: E402
from benchmarks.profiler import Profile  # noqa: E402
from benchmarks.report import Result, Table, duration  # noqa: E402
from benchmarks.shakespeare import read  # noqa: E402
from benchmarks.tokenizer import measure_encoding  # noqa: E402
from benchmarks.worker import WorkerError  # noqa: E402
from tinygrad_llm import backend, nn, tensor  # noqa: E402
from tinygrad_llm.gpt import SIZES  # noqa: E402
from tinygrad_llm.random import Generator  # noqa: E402
from tinygrad_llm.tokenizer import BPETokenizer, TiktokenTokenizer  # noqa: E402

needs_torch = pytest.mark.skipif(not machine.installed("torch"), reason="compares with PyTorch")


NOWHERE = dict.fromkeys(
    ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9"
)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


def saved(folder, command):
    """The JSON that a command has saved; its Markdown must be there, too."""
    (path,) = folder.glob(f"{command}-*.json")
    assert path.with_suffix(".md").read_text(encoding="utf-8").startswith("## python -m benchmarks")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["command"] == command
    assert content["machine"]["cores"] >= 1 and content["machine"]["threads"] == 1
    return content["results"]


def below(content, key):
    """Every value of a key, at any depth."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == key:
                yield value
            yield from below(value, key)


# --- the commands ---------------------------------------------------------------------------------


@needs_torch
def test_ops(tmp_path):
    small = [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--seconds",
        "0",
        "--length",
        "20",
        "--threads",
        "1",
    ]
    done = run("ops", *small, "--save", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = saved(tmp_path, "ops")
    assert set(results) == {"tape", "tiny"}
    ratios = list(below(results, "ratio"))
    assert len(ratios) == len(results["tape"]) + 2 * len(results["tiny"])
    assert all(value > 0 for ratio in ratios for value in ratio.values())
    for tape in results["tape"].values():
        assert tape["ours"]["seconds"]["median"] > 0


@needs_torch
def test_train(tmp_path):
    small = ["--model", "tiny", "--rounds", "1", "--steps", "2", "--threads", "1", "--no-compile"]
    done = run("train", *small, "--save", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = saved(tmp_path, "train")["tiny"]
    losses = result["losses"]
    assert len(losses["ours"]) == len(losses["torch"]) == 10
    assert losses["ours"] == pytest.approx(losses["torch"], rel=1e-4)
    assert losses["ours"][-1] < losses["ours"][0]
    assert set(result["ratios"]) == {"torch"}
    assert all(value > 0 for value in result["ratios"]["torch"].values())
    assert result["ours"]["tokens_per_second"] > 0
    assert all(phase[who] > 0 for phase in result["phases"].values() for who in ("ours", "torch"))
    assert sys.platform != "linux" or all(0 < n < 2**30 for n in result["peak_bytes"].values())
    ops = {row["name"]: row for row in result["ops"]}
    assert {"linear", "mlp", "self_attention", "layer_norm", "optimizer"} <= set(ops)
    assert sum(row["share"] for row in ops.values()) == pytest.approx(1)
    assert ops["self_attention"]["calls"] == 2 and ops["self_attention"]["backward"] > 0
    # The phases are these ops again, and none of their time is lost.
    in_ops = sum(row.get(part, 0) for row in ops.values() for part in train.PARTS)
    assert sum(row["ours"] for row in result["floor"]) == pytest.approx(in_ops)
    assert all(row["floor"] > 0 and row["ours"] > 0 for row in result["floor"])
    (picture,) = tmp_path.glob("train-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 60_000


def test_gpt2s_rows_share_its_tokens():
    found = train.settings(["tiny", "gpt2"], None)
    assert list(found) == ["tiny", "gpt2, 4 x 256", "gpt2, 1 x 1024"]
    assert [setting.tokens for setting, _ in found.values()] == [32, 1024, 1024]
    with pytest.raises(ValueError, match="a power of 2, not 3"):
        train.settings(["gpt2"], [3])


def test_techniques(monkeypatch):
    """What is timed must be the same work, also when threads share it out."""
    for threads in (1, 2):
        data, table = techniques.measure("tiny", Method(rounds=1, seconds=0.0), threads)
        assert len(table.rows) == len(data) == 15
        assert all(found["gain"]["median"] > 0 for found in data.values())
    monkeypatch.setattr(techniques, "moments_by_blas", lambda x: 1.001 * techniques.moments(x))
    with pytest.raises(ValueError, match="mean and variance by BLAS: the results differ"):
        techniques.measure("tiny", Method(rounds=1, seconds=0.0), 1)


@needs_torch
def test_generate(tmp_path):
    small = ["--size", "tiny", "--batch", "2", "--prompt", "5", "--new", "4", "--rounds", "1"]
    done = run("generate", *small, "--threads", "1", "--save", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = saved(tmp_path, "generate")["batch 2"]
    assert all(value > 0 for value in result["ratio"].values())
    assert set(result["decoding"]) == {"ours", "transformers"}
    ours = result["decoding"]["ours"]
    assert ours["tokens_per_second"] == pytest.approx(2 * 4 / ours["seconds"])
    bound = max(result["bandwidth"].values())
    assert ours["share_of_bandwidth"] == pytest.approx(ours["bytes_per_second"] / bound)


@pytest.mark.parametrize(
    "command, kernels, expected",
    [
        ("generate --size tiny --prompt 1000 --new 25", "auto", "exceed tiny's context of 1024"),
        ("generate --size tiny", "bogus", "TINYGRAD_LLM_KERNELS: kernels is 'bogus'"),
        ("train --model tiny", "bogus", "TINYGRAD_LLM_KERNELS: kernels is 'bogus'"),
    ],
)
def test_bad_input_is_one_line(command, kernels, expected, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LLM_KERNELS", kernels)
    done = run(*command.split())
    assert done.returncode == 2
    assert expected in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lora(tmp_path):
    small = ["--model", "tiny", "--rounds", "2", "--rank", "2", "--threads", "1"]
    done = run("lora", *small, "--save", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = saved(tmp_path, "lora")["tiny"]
    trained = result["trained"]
    assert 0 < trained["lora"] < trained["full"]
    assert result["share"] == pytest.approx(trained["lora"] / trained["full"])
    assert all(value > 0 for value in [*result["ratio"].values(), *result["peak_bytes"].values()])


def test_shakespeare(tmp_path):
    text = "To be, or not to be, that is the question.\n" * 60
    (tmp_path / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
    small = ["--steps", "3", "--eval-batches", "1", "--threads", "1"]
    done = run(
        "shakespeare", *small, "--save", "--results", str(tmp_path), TINYGRAD_LLM_DATA=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    (one,) = saved(tmp_path, "shakespeare")["runs"]
    assert one["seed"] == 0 and 0 < one["validation_loss"] < 4
    assert one["step_seconds"]["median"] > 0


def test_spam(tmp_path):
    rows = [f"ham\tsee you at {n}\nspam\twin {n} pounds now\n" for n in range(12)]
    (tmp_path / "sms-spam-collection.tsv").write_text("".join(rows), encoding="utf-8")
    small = ["--steps", "1", "--epochs", "1", "--seeds", "1", "--threads", "1"]
    done = run(
        "spam", *small, "--save", "--results", str(tmp_path), TINYGRAD_LLM_DATA=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    runs = saved(tmp_path, "spam")["runs"]
    assert [run["kind"] for run in runs] == ["all weights", "LoRA", "last block"]
    assert all(0 <= run["accuracy"] <= 1 and run["step_seconds"] > 0 for run in runs)
    done = run("spam", TINYGRAD_LLM_DATA="")
    assert done.returncode == 2 and "sms-spam-collection.tsv" in done.stderr


def test_shakespeare_without_its_text(tmp_path):
    done = run("shakespeare", TINYGRAD_LLM_DATA="")
    assert done.returncode == 2
    assert "TINYGRAD_LLM_DATA" in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="TINYGRAD_LLM_DATA"):
        read(str(tmp_path))


@pytest.mark.skipif(
    not all(os.environ.get(name) for name in ("TINYGRAD_LLM_DATA", "TIKTOKEN_CACHE_DIR")),
    reason="set TINYGRAD_LLM_DATA (the-verdict.txt) and TIKTOKEN_CACHE_DIR (gpt2)",
)
def test_verdict(tmp_path):
    small = ["--size", "tiny", "--epochs", "1", "--threads", "1"]
    done = run("verdict", *small, "--save", "--results", str(tmp_path))
    assert done.returncode == 1  # a tiny model, once through the text, learns little
    assert done.stderr.endswith("error: the losses are not as low as they should be\n")
    results = saved(tmp_path, "verdict")
    assert [(at["step"], at["tokens"]) for at in results["log"]] == [(0, 512), (5, 6 * 512)]
    first, last = results["log"]
    assert 10.5 < last["train_loss"] < first["train_loss"] < 11.5 and not results["reached"]
    (sample,) = results["samples"]
    assert sample.startswith("Every effort moves you") and results["step_seconds"]["median"] > 0


def test_verdict_without_its_text(tmp_path):
    names = ["TINYGRAD_LLM_DATA", "TIKTOKEN_CACHE_DIR", "XDG_CACHE_HOME"]
    done = run("verdict", **NOWHERE, **dict.fromkeys(names, str(tmp_path)))
    assert done.returncode == 2
    assert "GPT-2" in done.stderr and done.stderr.count("\n") == 1


def test_load_of_an_unknown_size():
    done = run("load", "--size", "gpt3")
    assert done.returncode == 2
    assert "no size gpt3; choose one of gpt2, " in done.stderr and done.stderr.count("\n") == 1


def test_load(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", {"emb_dim": 64, "n_layers": 2, "n_heads": 2})
    data, table, note = loading.measure_size("tiny", rounds=2, threads=1)
    assert [row[0] for row in table.rows] == ["float32", "bfloat16"] == list(data)
    for found in data.values():
        assert all(found[name]["seconds"]["best"] > 0 for name in ("read", "load", "save"))
        assert found["ratio"]["median"] > 0
        assert found["peak memory over weights"]["load"] > 0.5  # a part may have been free before
    assert "the target is 1.5" in note and "the target is 1.3" in note


def test_tokenizer_without_what_it_would_download(tmp_path):
    small = ["--merges", "20", "--characters", "2000", "--rounds", "2", "--threads", "1"]
    empty = str(tmp_path / "empty")
    done = run(
        "tokenizer",
        *small,
        *["--save", "--results", str(tmp_path)],
        **NOWHERE,
        **dict.fromkeys(["TINYGRAD_LLM_DATA", "TIKTOKEN_CACHE_DIR", "XDG_CACHE_HOME"], empty),
    )
    assert done.returncode == 0, done.stderr
    (markdown,) = tmp_path.glob("tokenizer-*.md")
    for name in ("gpt2", "tiny-shakespeare"):
        assert f"Without {name}: " in markdown.read_text(encoding="utf-8")
    results = saved(tmp_path, "tokenizer")
    assert set(results) == {"embedded"}
    training, encoding = results["embedded"]["training"], results["embedded"]["encoding"]
    assert training["merges"] == 20 and training["ours"]["seconds"]["median"] > 0
    calls = {"TiktokenTokenizer.encode", "BPETokenizer.encode", "BPETokenizer.encode_array"}
    assert set(encoding) == {"trained"} and set(encoding["trained"]) == calls
    for call in encoding["trained"].values():
        assert set(call) == {"whole", "lines"}
        # A line is a part of the text: it takes less.
        for who in ("ours", "tiktoken"):
            assert 0 < call["lines"][who]["seconds"]["best"] < call["whole"][who]["seconds"]["best"]
    ratios = list(below(encoding, "ratio"))
    assert len(ratios) == 6 and all(value > 0 for ratio in ratios for value in ratio.values())


def test_tokenizer_refuses_other_ids():
    """What is timed must be the same work."""
    tokenizer = TiktokenTokenizer(BPETokenizer.train("to be or not to be", 270).to_tiktoken())
    tokenizer.encode = lambda text: [0]
    with pytest.raises(ValueError, match="other ids with trained, whole"):
        measure_encoding("to be", {"trained": tokenizer}, Method(rounds=1, seconds=0))


@needs_torch
def test_gradcheck(tmp_path):
    small = ["--op", "relu", "--op", "gelu_tanh", "--cases", "4", "--threads", "1"]
    done = run("gradcheck", *small, "--save", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = saved(tmp_path, "gradcheck")
    bugs = {f"{bug['where']}: {bug['bug']}": bug for bug in results["bugs"]}
    last_digits = bugs["gelu_tanh.vjp: 0.0447 for 0.044715"]["found"]
    assert last_digits == {
        "PyTorch slow": False, "PyTorch fast": False, "our gradcheck": True, "all laws": True,
    }  # fmt: skip
    assert bugs["gelu_tanh.vjp: tanh is not squared"]["found"].keys() == last_digits.keys()
    assert all(bugs["gelu_tanh.vjp: tanh is not squared"]["found"].values())
    assert bugs["relu.vjp: the kink counts as positive"]["law"] == "ties"
    relu, gelu_tanh = results["false_alarms"]
    assert relu["PyTorch slow"]["smooth"] == 0 < relu["PyTorch slow"]["ties"]
    assert relu["our gradcheck"] == gelu_tanh["PyTorch fast"] == {"smooth": 0, "ties": 0}
    assert relu["all laws"] == []
    assert all(seconds > 0 for seconds in results["seconds"].values())
    assert all(row["found"]["our gradcheck"] for row in results["large arrays"])
    assert results["large arrays"][0]["found"]["PyTorch slow"] is None  # too big


@needs_torch
def test_gradcheck_of_an_unknown_op():
    done = run("gradcheck", "--op", "gellu")
    assert done.returncode == 2
    assert "no op named gellu" in done.stderr and done.stderr.count("\n") == 1


# --- what they are made of ------------------------------------------------------------------------


class Clock:
    """Time that passes only when a call or a pause says so."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.log.append("pause")

    def job(self, name, *durations):
        """A call that takes the durations in turn, then the last one for ever."""
        left = list(durations)

        def call():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def timed(clock, calls, rounds, seconds):
    return interleaved(calls, Method(rounds, seconds, 1.0, clock, clock.sleep))


def test_long_calls_need_no_warm_up():
    clock = Clock()
    method = Method(1, 0.0, 1.0, clock, clock.sleep, warm=False)
    times = interleaved({"a": clock.job("a", 9.0, 2.0)}, method)
    assert clock.log == ["pause", "a"] * 2 and times["a"] == Timing((2.0,), 2.0)


def test_alternatives_take_turns():
    clock = Clock()
    times = timed(clock, {"a": clock.job("a", 2.0), "b": clock.job("b", 3.0)}, 2, seconds=0.5)
    assert clock.log == ["pause", "a", "a", "pause", "b", "b"] * 3  # the first round is a warm-up
    assert times["a"] == Timing((2.0, 2.0), 2.0) and times["b"] == Timing((3.0, 3.0), 3.0)


def test_what_comes_first_does_not_count():
    clock = Clock()
    first_round, second_round = [90.0, 80.0], [70.0, 1.0, 5.0, 3.0]
    times = timed(clock, {"a": clock.job("a", *first_round, *second_round)}, 1, seconds=8.0)
    assert times["a"] == Timing((3.0,), 1.0)  # the median and the best of 1, 5, 3


def test_spread_and_ratio():
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(median=3, low=2, high=4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    ours, peer = Timing((1.0, 2.0, 4.0), best=0.5), Timing((3.0, 4.0, 4.0), best=1.5)
    ratio = Ratio.of(peer, ours)  # 3, 2 and 1: the peer takes longer, ours is faster
    assert ratio.rounds == Spread(2.0, 1.5, 2.5) and ratio.best == 3.0
    assert str(ratio) == "2.00 (1.50-2.50)"


def test_differences_and_parts():
    chain, numpy = Timing((10.0, 14.0), best=9.0), Timing((4.0, 6.0), best=3.0)
    assert chain.minus(numpy) == Timing((6.0, 8.0), 6.0)
    assert chain.per(2) == Timing((5.0, 7.0), 4.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_came_and_went():
    first = Contestant(Method(rounds=1))
    with mmap.mmap(-1, 64 << 20) as memory:
        memory[::4096] = bytes(len(memory) // 4096)  # every page is touched
    assert 60 << 20 < first.peak() < 200 << 20
    assert Contestant(Method(rounds=1)).peak() < 30 << 20  # that is forgotten now


def test_pytorchs_process_has_nothing_of_ours():
    """Whose kernels change the allocator."""
    for name in ("contestant", "torch_gpt", "worker", "measure", "machine"):
        tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
        for node in [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]:
            assert "tinygrad_llm" not in ast.unparse(node)


class Mute:
    """A worker that cannot do one thing."""

    def __init__(self, cannot):
        self.cannot, self.closed = cannot, False

    def call(self, method, *arguments):
        if method == self.cannot:
            raise WorkerError("InvalidCxxCompiler: No working C++ compiler found")
        return [2.0]

    def close(self):
        self.closed = True


@pytest.mark.parametrize("cannot", ["load", "losses"])
def test_where_torch_compile_cannot_work_the_others_race(cannot):
    workers = {"ours": Mute(None), "torch": Mute(None), "compiled": (compiled := Mute(cannot))}
    losses, why = train.first_losses(workers, 1)
    assert losses == {"ours": [2.0], "torch": [2.0]} and "C++ compiler" in why
    assert set(workers) == set(losses) and compiled.closed
    with pytest.raises(WorkerError, match="compiler"):
        train.first_losses({"ours": Mute(None), "torch": Mute(cannot)}, 1)


def test_losses_that_differ_are_refused():
    same = [4.0, 3.0]
    assert train.compare_losses({"ours": [4.0, 3.0001], "torch": same})["relative"] < 1e-4
    for name in ("ours", "compiled"):
        with pytest.raises(ValueError, match=r"differ from PyTorch eager's by 3\.3e-03"):
            train.compare_losses({"ours": same, "torch": same, name: [4.0, 3.01]})


def test_the_floor_of_gpt2_by_hand():
    """The count that docs/speed.md makes, and PaLM's for the products."""
    cfg = train.settings(["gpt2"], [4])["gpt2, 4 x 256"][0].cfg
    work = floor.work(cfg, 4, 256)
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert work["matrix products"] == (6 * 1024 * matrices, 0)
    assert work["attention"][0] == 6 * 2 * 4 * sum(range(1, 257)) * 768 * 12
    assert work["AdamW"][1] == 28 * 124_439_808
    one = floor.work(cfg, 1, 1024)  # as many tokens: all but attention stays
    assert one.pop("attention") > work.pop("attention") and one == work


def test_phases_are_those_of_the_kernels():
    """Each op belongs to its part; where a kernel computes two parts, so does a row."""
    counted = {"matrix products": (100, 0), "GELU": (0, 10), "AdamW": (0, 20), "all else": (0, 4)}
    speed = {"multiply": 50.0, "copy": 2.0}

    def rows(**seconds):
        return {r["name"]: (r["floor"], r["ours"]) for r in floor.phases(seconds, counted, speed)}

    apart = rows(linear=3.0, gelu_tanh=6.0, optimizer=11.0, reshape=1.0, waiting=1.5)
    assert apart == {
        "AdamW": (10.0, 11.0), "GELU": (5.0, 6.0), "matrix products": (2.0, 3.0),
        "all else": (2.0, 2.5),
    }  # fmt: skip
    assert list(apart) == ["AdamW", "GELU", "matrix products", "all else"]  # longest first
    fused = rows(linear=3.0, mlp=5.0, optimizer=11.0)
    assert fused["matrix products + GELU"] == (7.0, 8.0) and len(fused) == 3


def test_a_profile_is_the_mean_over_the_threads():
    clock = Clock()
    profile = Profile(clock)
    job = profile.timed(clock.job("a", 3.0, 1.0), "add", "forward")
    job()
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert profile.seconds == {("add", "forward"): 2.0} and profile.calls["add", "forward"] == 1


def test_a_profile_times_kernels_for_several_ops():
    profile = Profile()
    layers = nn.ModuleList([nn.Linear(4, 3, generator=Generator(0))])
    nn.apply_lora(layers, nn.LoRAConfig(2, 4, targets="0"), generator=Generator(1))
    with backend.using(profile.reading()):
        layers[0](tensor(np.ones((2, 4), np.float32))).sum().backward()
    calls = profile.calls
    assert calls["lora", "forward"] == calls["lora", "backward"] == 1 and profile.seconds


def test_durations_have_units():
    seconds = (2.5e-6, 1.234e-4, 0.0567, 0.2, 12.34)
    assert [duration(s) for s in seconds] == ["2.5 µs", "123 µs", "56.7 ms", "200 ms", "12.3 s"]


def test_results_are_saved_by_cpu(tmp_path):
    description = machine.describe(threads=2) | {"cpu": "ACME (R) Fast-9 CPU @ 3.00GHz"}
    table = Table("T", ["op", "ours"], [["add", "1 µs"]])
    paths = Result("ops", {"rounds": 5}, {"x": 1.5}, [table], ["A note."]).save(
        tmp_path, description
    )
    assert [p.name for p in paths] == [
        "ops-acme-r-fast-9-cpu-3-00ghz-2-threads.json",
        "ops-acme-r-fast-9-cpu-3-00ghz-2-threads.md",
    ]
    assert json.loads(paths[0].read_text())["results"] == {"x": 1.5}
    assert "| add | 1 µs |" in paths[1].read_text(encoding="utf-8")


def test_a_busy_machine_is_told():
    busy = {"cores": 2, "threads": 2, "load_average": 3.0}
    assert "busy" in machine.warning(busy)
    for calm in ({"load_average": 0.3}, {"load_average": None}, {"threads": 1}):
        assert machine.warning(busy | calm) is None
