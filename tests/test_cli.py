"""The command as users run it: real processes, real runs, interruptions, every wrong input."""

import contextlib
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy

from tinygrad_llm import backend, cli
from tinygrad_llm.checkpoint import checkpoints, load_model, load_tokenizer, load_training_state
from tinygrad_llm.data import train_val_split
from tinygrad_llm.generate import beam_search, stream, stream_text
from tinygrad_llm.ops import TABLE
from tinygrad_llm.random import Generator
from tinygrad_llm.train import evaluate

COMMAND = [sys.executable, "-m", "tinygrad_llm"]
# One thread: processes that run at the same time do not slow each other down.
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
TINY = shlex.split("--layers 1 --heads 2 --dim 16 --context 16 --batch-size 4 --vocab-size 300")
STEPS = ["--steps", "24"]
RESULTS = {
    "config.json",
    "log.jsonl",
    "loss.png",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokens.npy",
    "vocab.json",
}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")


def run(*arguments, cwd=None, **options):
    """Runs the command to its end; the result has returncode, stdout and stderr."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        **options,
    )


def call(*arguments, cwd="."):
    """As run, but in this process, as if it had just begun: for what is refused at once, where half
    a second to start a process would be most of the time.
    """
    arguments = [cli.PROGRAM, *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.dict(os.environ, ENVIRONMENT),
        mock.patch.dict(TABLE),
        backend.using(backend.current.reading),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    written = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, *written)


def on_a_terminal(*arguments, cwd=None):
    """Runs the command on a terminal of its own: (exit code, all the bytes that it showed)."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdout=end,
        stderr=end,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            shown += (piece := os.read(terminal, 65536))
        except OSError:  # the process has closed its side
            break
        if not piece:
            break
    return process.wait(), shown


def start(*arguments, cwd=None):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def wait_for(process, text):
    """Reads its lines until one begins with `text`."""
    for line in process.stdout:
        if line.startswith(text):
            return
    pytest.fail(f"the process ended without {text!r}: {process.stderr.read()}")


def files_of(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def trainer_of(directory):
    """The training state in the newest checkpoint."""
    return load_training_state(checkpoints(directory)[-1])["trainer"]


def losses_of(directory):
    trainer = trainer_of(directory)
    return trainer["losses"].tolist(), trainer["evaluations"].tolist()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A text with characters of one to four bytes."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("Größe 日本語 🙂🙃 naïve café; to be or not to be.\n" * 120, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A finished run on the text file, and what it printed."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    done = run("train", "--data", text_file, "--out", directory, *TINY, *STEPS)
    assert done.returncode == 0, done.stderr
    return directory, done


# --- train ----------------------------------------------------------------------------------------


def test_without_arguments_it_trains_on_the_embedded_text(tmp_path):
    done = run("train", *TINY, *STEPS, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    directory = tmp_path / "runs" / "1"
    assert set(files_of(directory)) == RESULTS
    for part in ("step 24/24", "validation", "tokens/s", "left", "runs/1/loss.png"):
        assert part in done.stdout
    assert done.stdout.count(" it writes:\n") == 4
    command = re.search("try next: .*tinygrad.llm (generate .*)", done.stdout)[1]
    again = run(*shlex.split(command), "--max-tokens", 3, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.startswith('The "assert" statement')

    second = run("train", *TINY, "--steps", 1, "--quiet", cwd=tmp_path)
    assert (second.stdout, second.stderr) == ("runs/2\n", "")
    assert set(files_of(tmp_path / "runs" / "2")) == RESULTS


def test_the_loss_falls_on_real_text(tmp_path):
    folder = os.environ.get("TINYGRAD_LLM_DATA")
    if folder is None:
        pytest.skip("TINYGRAD_LLM_DATA does not name the folder with the-verdict.txt")
    text = Path(folder).resolve() / "the-verdict.txt"
    small = ["--layers", 2, "--heads", 2, "--dim", 32, "--context", 32, "--vocab-size", 400]
    done = run("train", "--data", text, *small, "--steps", 150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, evaluations = losses_of(tmp_path / "runs" / "1")
    assert evaluations[0][1] == pytest.approx(np.log(400), abs=0.1)
    assert evaluations[-1][1] < 5
    assert "after step 150 it writes:\n\n    I HAD always thought Jack" in done.stdout


def test_several_files_and_the_same_seed(tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text("Another text, quite short.\n" * 40)
    options = ["--data", text_file, other, *TINY, "--steps", "5", "--quiet"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("train", *options, "--seed", seed, "--out", tmp_path / name).returncode == 0
    a, b, c = (files_of(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a == b != c
    tokens = np.load(tmp_path / "a" / "tokens.npy")
    end_of_text = 299
    assert (tokens == end_of_text).sum() == 1  # between the two files


def test_the_live_bar_on_a_terminal(tmp_path, text_file):
    code, shown = on_a_terminal("train", "--data", text_file, *TINY, *STEPS, cwd=tmp_path)
    assert code == 0
    for part in ("vocabulary", "training", "step 24/24", "tokens/s", "0:00 left", "━"):
        assert part.encode() in shown


def log_of(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_every_step_is_in_the_log(trained):
    directory, _ = trained
    lines = log_of(directory)
    assert [line["step"] for line in lines] == list(range(25))
    losses, evaluations = losses_of(directory)
    assert [line["loss"] for line in lines[1:]] == losses
    evaluated = [[line["step"], line["val_loss"]] for line in lines if "val_loss" in line]
    assert evaluated == evaluations and len(evaluations) == 13
    names = {"step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}
    assert all(names <= line.keys() for line in lines[1:])
    assert lines[-1]["perplexity"] == pytest.approx(np.exp(lines[-1]["val_loss"]))
    assert lines[-1]["tokens"] == 24 * 4 * 16


def test_a_tokens_file_with_its_tokenizer(tmp_path, trained, text_file):
    directory, _ = trained
    ids = tmp_path / "ids.npy"
    assert run("data", "prepare", text_file, "--out", ids, "--tokenizer", directory).returncode == 0
    shape = [*TINY[:-2], "--steps", 5, "--quiet"]  # no --vocab-size
    for name, data in (("text", text_file), ("ids", ids)):
        options = ["--data", data, "--tokenizer", directory, *shape, "--out", tmp_path / name]
        done = run("train", *options)
        assert done.returncode == 0, done.stderr
    text, ids_only = files_of(tmp_path / "text"), files_of(tmp_path / "ids")
    assert text["model.safetensors"] == ids_only["model.safetensors"]
    assert set(text) - set(ids_only) == {"tokens.npy"}  # the file stays where it is
    resumed = ["train", "--out", tmp_path / "ids", "--resume", "--steps", 6, "--quiet"]
    assert run(*resumed).returncode == 0
    np.save(ids, np.load(ids)[::-1])
    assert_refused(run(*resumed[:-2], 7), "trained on other tokens")
    ids.unlink()
    assert_refused(run(*resumed[:-2], 7), "ids.npy", "is gone: put it back")


def test_the_options_reach_the_run(tmp_path, text_file):
    options = "--dropout 0.1 --no-tie --accumulate 2 --min-lr 1e-5 --warmup 3 --weight-decay 0.2"
    options += " --recompute --eval-interval 2 --keep 2 --patience 7"
    arguments = ["--data", text_file, *TINY, *shlex.split(options), "--steps", 8, "--quiet"]
    directory = tmp_path / "run"
    done = run("train", *arguments, "--out", directory)
    assert done.returncode == 0, done.stderr
    assert [path.stem for path in checkpoints(directory)] == ["step-00000006", "step-00000008"]
    trainer = trainer_of(directory)
    settings, config = trainer["settings"], trainer["config"]
    assert config["drop_rate"] == 0.1 and config["tie_weights"] is False
    expected = {"accumulate": 2, "min_lr": 1e-5, "warmup_steps": 3, "weight_decay": 0.2}
    expected |= {"recompute": True, "eval_interval": 2, "patience": 7}
    assert {name: settings[name] for name in expected} == expected
    assert [group["weight_decay"] for group in trainer["optimizer"]["param_groups"]] == [0.2, 0]
    rates = [line["learning_rate"] for line in log_of(directory)[1:]]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3]) and rates[-1] == pytest.approx(1e-5)


def test_early_stopping_keeps_the_best_model(tmp_path, text_file):
    shape = ["--data", text_file, *TINY, "--lr", 0.5, "--eval-interval", 1, "--patience", 3]
    done = run("train", *shape, "--steps", 200, "--out", tmp_path / "run")  # too fast: it diverges
    assert done.returncode == 0, done.stderr
    losses = [line["val_loss"] for line in log_of(tmp_path / "run")]
    best = int(np.argmin(losses))
    assert len(losses) == best + 4 < 201
    assert f"stopped early: validation loss {losses[-1]:.3f} after {best + 3} steps" in done.stdout
    assert f"the model is that of step {best}, with the lowest: {losses[best]:.3f}" in done.stdout
    tokens = np.load(tmp_path / "run" / "tokens.npy")
    model = load_model(tmp_path / "run")
    _, held_out = train_val_split(tokens, 0.1, 16)
    assert evaluate(model, held_out, 16, 4, 10) == pytest.approx(losses[best], rel=1e-5)
    again = run("train", "--out", tmp_path / "run", "--resume")
    assert again.returncode == 0
    assert "has stopped early" in again.stdout
    assert f"lowest after {best}: raise --patience" in again.stdout
    more = run("train", "--out", tmp_path / "run", "--resume", "--patience", 4, "--quiet")
    assert more.returncode == 0 and len(log_of(tmp_path / "run")) >= len(losses) + 1


def test_tensorboard_without_its_package(tmp_path):
    (tmp_path / "tensorboardX.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [*COMMAND, "train", "--tensorboard"], cwd=tmp_path, capture_output=True, encoding="utf-8",
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]])},
    )  # fmt: skip
    assert_refused(done, "--tensorboard needs the package tensorboardX", "log.jsonl")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] in ([], ["__pycache__"])


def test_tensorboard_events_are_those_of_the_log(tmp_path, text_file):
    pytest.importorskip("tensorboardX")
    options = ["--data", text_file, *TINY, "--tensorboard", "--quiet"]
    assert run("train", *options, "--steps", 6, "--out", tmp_path / "run").returncode == 0
    resumed = run("train", "--out", tmp_path / "run", "--resume", "--steps", 9, "--tensorboard")
    assert resumed.returncode == 0, resumed.stderr
    found = scalars(tmp_path / "run" / "tensorboard")
    lines = log_of(tmp_path / "run")
    assert [step for step, _ in found["loss/training"]] == list(range(1, 10))
    for tag, name in (("loss/training", "loss"), ("perplexity", "perplexity")):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert found[tag] == expected


def scalars(folder):
    """tag -> (step, value) pairs, of files of events: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("events.*"):
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            place += 16 + size
    return found


# --- stopping and going on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text_file):
    """A run of 120 steps without an interruption."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    done = run("train", "--data", text_file, "--out", directory, *TINY, "--steps", 120)
    assert done.returncode == 0, done.stderr
    return directory


def assert_same_run(a, b):
    assert losses_of(a) == losses_of(b)
    a, b = files_of(a), files_of(b)
    assert set(a) == set(b) == RESULTS
    assert a["model.safetensors"] == b["model.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path, text_file, straight, number
):
    options = ["--data", text_file, *TINY, "--steps", 120, "--out", "stopped"]
    process = start("train", *options, cwd=tmp_path)
    wait_for(process, "step 10/120")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    step = trainer_of(tmp_path / "stopped")["step"]
    assert 10 <= step < 120
    said = f"stopped after {step} steps and saved; go on with: .*tinygrad.llm (.*)\n"
    command = re.fullmatch(said, errors)[1]
    assert command == "train --out stopped --resume"
    assert (tmp_path / "stopped" / "loss.png").exists()

    resumed = run(*shlex.split(command), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "stopped", straight)


def test_a_second_ctrl_c_says_how_to_go_on(tmp_path, text_file):
    slow = ["--accumulate", 100_000]  # a step that does not end before the second
    process = start("train", "--data", text_file, *TINY, *slow, "--out", "run", cwd=tmp_path)
    wait_for(process, "step 0/")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # two at once are one
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = "stopped at once; go on from the last checkpoint with: .*tinygrad.llm (.*)\n"
    assert re.fullmatch(said, errors)[1] == "train --out run --resume"
    assert trainer_of(tmp_path / "run")["step"] == 0


def test_ctrl_c_while_the_vocabulary_is_learned(tmp_path):
    process = start("train", "--vocab-size", 20_000, "--out", "run", cwd=tmp_path)
    wait_for(process, "learning a vocabulary")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped, nothing was saved yet\n")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_a_checkpoint_that_goes_on(tmp_path, text_file, straight):
    options = ["--data", text_file, *TINY, "--steps", 120, "--out", "killed"]
    process = start("train", *options, cwd=tmp_path)
    wait_for(process, "step 20/120")
    process.kill()
    process.communicate()
    directory = tmp_path / "killed"
    load_model(directory)
    assert trainer_of(directory)["step"] >= 10
    assert run("generate", "--model", directory, "to", "--max-tokens", 2).returncode == 0

    resumed = run("train", "--out", directory, "--resume")
    assert resumed.returncode == 0 and "step 120/120" in resumed.stdout
    for half_written in directory.glob(".*.tmp"):  # what the kill may have left
        half_written.unlink()
    assert_same_run(directory, straight)


def test_more_steps_for_a_finished_run(tmp_path, trained):
    directory, _ = trained
    before = losses_of(directory)
    (directory / "loss.png").unlink()  # as after a kill just before it is drawn
    again = run("train", "--out", directory, "--resume")
    assert again.returncode == 0 and again.stderr == ""
    assert "has done its 24 steps already: raise --steps" in again.stdout
    assert set(files_of(directory)) == RESULTS
    fewer = run("train", "--out", directory, "--resume", "--steps", 23)
    assert_refused(fewer, "--steps 23 is less than the 24")
    other = run("train", "--out", directory, "--resume", "--steps", 26, "--lr", 1, "--dim", 16)
    assert_refused(other, "--lr 1.0 does not fit", "started with 0.003: leave --lr out")
    data = run("train", "--out", directory, "--resume", "--steps", 26, "--data", "x.txt")
    assert_refused(data, "x.txt does not fit")
    assert losses_of(directory) == before
    more = run("train", "--out", directory, "--resume", "--steps", 26, "--quiet")
    assert (more.returncode, more.stdout, more.stderr) == (0, f"{directory}\n", "")
    losses, _ = losses_of(directory)
    assert len(losses) == 26 and losses[:24] == before[0]


# --- generate -------------------------------------------------------------------------------------


def test_generate_repeats_with_a_seed_and_is_new_without(trained):
    directory, _ = trained
    options = ["generate", "--model", directory, "to be", "--max-tokens", 30, "--temperature", 1.5]
    first, same = (run(*options, "--seed", 7).stdout for _ in range(2))
    assert first == same and first.startswith("to be")
    assert len({first, run(*options).stdout, run(*options).stdout}) == 3
    greedy = {run(*options[:-1], 0).stdout for _ in range(2)}
    assert len(greedy) == 1


def test_tokens_come_as_whole_characters(trained):
    directory, _ = trained
    process = subprocess.Popen(
        [*COMMAND, "generate", "--model", directory, "日本", "--temperature", "9", "--seed", "1"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    pieces = list(iter(lambda: os.read(process.stdout.fileno(), 65536), b""))
    assert process.wait() == 0
    assert len(pieces) > 10  # they did not come all at once
    assert "".join(piece.decode("utf-8") for piece in pieces).startswith("日本")


def test_a_pipe_that_is_closed_early(trained):
    directory, _ = trained
    process = start("generate", "--model", directory, "to", "--max-tokens", 300)
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait()


def test_standard_input_options_and_stop_strings(trained):
    """What the command shows is what the library gives."""
    directory, _ = trained
    gpt = load_model(directory)
    tokenizer = load_tokenizer(directory, gpt)
    prompt = "to be"
    options = {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "temperature": 1.5}
    typed = [part for n, v in options.items() for part in ("--" + n.replace("_", "-"), v)]
    typed += ["--model", directory, "--max-tokens", 30, "--top-k", 20, "--seed", 7]
    options |= {"top_k": 20, "generator": Generator(7), "vocab_size": tokenizer.vocab_size}
    ids = list(stream(gpt, tokenizer.encode(prompt), 30, **options, stop_id=tokenizer.end_of_text))
    text = prompt + "".join(stream_text(ids, tokenizer))
    done = run("generate", "-", *typed, input=prompt + "\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, text + "\n", "")
    middle = len(text) // 2
    stop = text[middle : middle + 5]  # of several tokens, most likely
    done = run("generate", prompt, *typed, "--stop", "nowhere!", "--stop", stop)
    assert done.stdout == prompt + text[len(prompt) :].split(stop)[0] + "\n"


def test_prompts_of_a_file_and_beams(tmp_path, trained):
    directory, _ = trained
    gpt = load_model(directory)
    tokenizer = load_tokenizer(directory, gpt)
    prompts = ["to be", "日本", "Größe or not to be", "one\x0cline\u2028\x85", *"abcdefg"]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(prompts).encode() + b"\n")
    typed = ["generate", "--model", directory, "--max-tokens", 8]
    options = {"stop_id": tokenizer.end_of_text, "vocab_size": tokenizer.vocab_size}

    def lines(*more):
        done = run(*typed, "--batch", "prompts.txt", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]
        assert [line["prompt"] for line in found] == prompts
        return [line["text"] for line in found]

    each = [tokenizer.encode(prompt) for prompt in prompts]
    greedy = [list(stream(gpt, ids, 8, 0, **options)) for ids in each]
    assert lines("--temperature", 0) == [tokenizer.decode(new) for new in greedy]
    best = [beam_search(gpt, ids, 8, 3, **options)[0].ids[len(ids) :] for ids in each]
    texts = [tokenizer.decode(new) for new in best]
    assert lines("--beams", 3) == texts
    assert run(*typed, "to be", "--beams", 3).stdout == f"to be{texts[0]}\n"


def test_a_prompt_longer_than_the_context(trained):
    directory, _ = trained  # its context is 16
    typed = ["generate", "--model", directory, "--max-tokens", 4, "--temperature", 0]
    prompt = "Another naïve café, or not; " * 4
    assert_refused(run(*typed, prompt), "the model sees 16", "add --crop")
    done = run(*typed, prompt, "--crop")
    assert done.returncode == 0 and done.stdout.startswith(prompt)


def test_ctrl_c_keeps_what_was_written(trained):
    directory, _ = trained
    process = start("generate", "--model", directory, "to be", "--max-tokens", 10**6)
    shown = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert (shown + rest).startswith("to be") and rest.endswith("\n")


# --- what is wrong is said in one line ------------------------------------------------------------


def assert_refused(done, *parts):
    """Exit code 2 and one line on stderr with all the parts in it."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith("tinygrad-llm: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--data missing.txt", ["missing.txt does not exist", "check the path"]),
        ("--data empty.txt", ["empty.txt is empty"]),
        ("--data short.txt", ["one window needs 129", "use a longer text"]),
        ("--data latin1.txt", ["latin1.txt is not UTF-8 at byte offset 2", "convert it"]),
        ("--data .", ["is a directory"]),
        ("--vocab-size 256", ["--vocab-size 256 is too small: give 257 or more"]),
        ("--vocab-size -1", ["--vocab-size -1 is too small"]),
        ("--heads 3", ["--heads 3 does not divide --dim 128"]),
        ("--steps 0", ["--steps", "1"]),
        ("--batch-size -4", ["--batch-size", "1"]),
        ("--seed -1", ["--seed", "0"]),
        ("--lr 0", ["lr must be a number above 0, got 0"]),
        ("--lr nan", ["lr must be a number above 0, got nan"]),
        ("--lr fast", ["--lr", "number"]),
        ("--speed 3", ["--speed", "train --help"]),
        ("--min-lr 1", ["min_lr must be at most lr"]),
        ("--warmup 900", ["warmup_steps must be 0 to steps"]),
        ("--dropout 1", ["--dropout 1 leaves nothing to learn: give below 1"]),
        ("--dropout nan", ["--dropout"]),
        ("--dropout -1", ["--dropout"]),
        ("--weight-decay -1", ["--weight-decay"]),
        ("--size gpt9", ["--size", "gpt2-xl"]),
        ("--size gpt2 --dim 64", ["--size says what --dim is: give one of them"]),
        ("--tokenizer none", ["--tokenizer none is no directory", "gpt2"]),
        ("--tokenizer .", ["vocab.json"]),
        ("--tokenizer . --vocab-size 300", ["--vocab-size is of a vocabulary to learn"]),
        ("--data ids.npy", ["ids.npy holds token ids: give the --tokenizer"]),
        ("--data ids.npy short.txt", ["ids.npy holds token ids: give it alone"]),
        ("--resume", ["--resume needs --out DIR"]),
        ("--resume-from step-00000001", ["--resume needs --out DIR"]),
        ("--resume --out none", ["none is no directory"]),
        ("--resume --out .", ["has no checkpoints"]),
        ("--out short.txt", ["short.txt is a file"]),
        ("--out short.txt/below", ["short.txt is a file"]),
        ("--out other-model", ["has a config.json, which would be lost"]),
        ("--out /proc/none", ["/proc/none"]),
    ],
)
def test_training_refuses(tmp_path, arguments, parts):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin1.txt").write_bytes("Größe".encode("latin-1"))
    np.save(tmp_path / "ids.npy", np.arange(300, dtype=np.uint16))
    (tmp_path / "other-model").mkdir()
    (tmp_path / "other-model" / "config.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = call("train", *shlex.split(arguments), cwd=tmp_path)
    assert_refused(done, *parts)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "other-model" / "config.json").read_text() == "mine"


def test_an_existing_run_is_not_overwritten(trained, text_file):
    directory, _ = trained
    before = files_of(directory)
    done = run("train", "--data", text_file, "--out", directory, *TINY, *STEPS)
    assert_refused(done, "already holds a training run: add --resume")
    assert files_of(directory) == before


def test_a_read_only_directory(tmp_path, text_file):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    done = run("train", "--data", text_file, "--out", folder / "run", *TINY)
    assert_refused(done, "locked is read-only")


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path, text_file):
    directory = tmp_path / "run"
    done = run("train", "--data", text_file, "--out", directory, *TINY, *STEPS, "--lr", "1e30")
    assert_refused(done, "nan or infinite", "learning rate", "what was saved is kept")
    weights = load_model(directory).state_dict().values()
    assert all(np.isfinite(array).all() for array in weights)
    assert np.isfinite(losses_of(directory)[1]).all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--model none x", ["none does not exist"]),
        ("--model . x", ["has no config.json"]),
        ("--model RUN ''", ["the prompt is empty"]),
        ("--model RUN x --temperature -1", ["temperature must be a number from 0 on, got -1"]),
        ("--model RUN x --top-k 0", ["--top-k"]),
        ("--model RUN x --top-k 999", ["top_k must be at most", "the number of tokens"]),
        ("--model RUN x --top-p 0", ["top_p must be above 0 and at most 1, got 0"]),
        ("--model RUN x --min-p 1.5", ["min_p must be a number from 0 to 1, got 1.5"]),
        ("--model RUN x --repetition-penalty 0", ["repetition_penalty must be a number above 0"]),
        ("--model RUN x --stop ''", ["a stop string is empty"]),
        ("--model RUN x --beams 0", ["--beams"]),
        ("--model RUN x --beams 2 --top-k 5", ["--beams searches", "leave --top-k out"]),
        ("--model RUN x --batch y", ["one prompt", "or --batch FILE"]),
        ("--model RUN --batch missing.txt", ["missing.txt"]),
        ("--model RUN --batch gaps.txt", ["gaps.txt has no prompt in line 2"]),
        ("--model RUN --batch latin1.txt", ["latin1.txt is not UTF-8 at byte offset 2"]),
        ("--model RUN x --max-tokens -5", ["--max-tokens"]),
        ("--model RUN", ["prompt"]),
        ("x", ["--model"]),
        ("--model RUN x --loud", ["--loud", "generate --help"]),
    ],
)
def test_generating_refuses(tmp_path, trained, arguments, parts):
    directory, _ = trained
    (tmp_path / "gaps.txt").write_text("one\n\nthree\n")
    (tmp_path / "latin1.txt").write_bytes("Größe".encode("latin-1"))
    arguments = [str(directory) if a == "RUN" else a for a in shlex.split(arguments)]
    assert_refused(call("generate", *arguments, cwd=tmp_path), *parts)


@pytest.mark.parametrize("prompt", ["-", b"caf\xe9"])
def test_a_prompt_that_is_not_utf_8(trained, prompt):
    directory, _ = trained
    done = subprocess.run(
        [*COMMAND, "generate", "--model", directory, prompt], input=b"\r\ncaf\xe9 creme\n",
        env=ENVIRONMENT, capture_output=True, timeout=60,
    )  # fmt: skip
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    what = "standard input is not UTF-8 at byte offset 5" if prompt == "-" else "at byte offset 3"
    assert_refused(done, what, "iconv -f LATIN1 -t UTF-8")


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json", "config.json"])
def test_generating_from_damaged_files(tmp_path, trained, name):
    directory, _ = trained
    for file, content in files_of(directory).items():
        (tmp_path / file).write_bytes(content[: len(content) // 2] if file == name else content)
    assert_refused(call("generate", "--model", tmp_path, "x"), name)


@pytest.mark.parametrize("name", ["tokens.npy", "merges.txt"])
def test_resuming_from_damaged_files(tmp_path, trained, name):
    directory, _ = trained
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    content = (directory / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    before = files_of(tmp_path)
    done = run("train", "--out", tmp_path, "--resume", "--steps", 99)
    assert_refused(done, name)
    assert files_of(tmp_path) == before


def test_resuming_without_the_encoded_text(tmp_path, trained):
    directory, _ = trained
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokens.npy").unlink()
    done = run("train", "--out", tmp_path, "--resume", "--steps", 99)
    assert_refused(done, "tokens.npy", "is gone: put it back, or start a new run with another")


def test_weights_that_are_no_numbers(tmp_path, trained):
    directory, _ = trained
    for file, content in files_of(directory).items():
        (tmp_path / file).write_bytes(content)
    path = tmp_path / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    tensors["transformer.ln_f.weight"] = np.full_like(tensors["transformer.ln_f.weight"], np.inf)
    safetensors.numpy.save_file(tensors, path)
    assert_refused(run("generate", "--model", tmp_path, "x"), "nan or infinite")


def test_help_explains_every_option():
    text = run("train", "--help").stdout
    options = "data out steps batch-size context layers heads dim lr seed vocab-size resume quiet "
    options += (
        "tokenizer size dropout accumulate min-lr warmup weight-decay eval-interval patience "
    )
    options += "recompute threads resume-from keep tensorboard"
    for option in options.split():
        assert re.search(rf"--{option}\b.*\w+ \w+", text), option
    assert run().stdout == run("--help").stdout != ""
    assert_refused(run("dance"), "dance", "--help")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_foreign_tokenizer_in_the_directory_is_not_overwritten(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    assert_refused(run("train", *TINY, *STEPS, "--out", "mine", cwd=tmp_path), name, "lost")
    assert (tmp_path / "mine" / name).read_text() == "precious"


@pytest.mark.parametrize("option", ["--batch-size", "--layers", "--dim"])
def test_what_cannot_fit_into_memory_is_refused_at_once(tmp_path, option):
    done = run("train", option, 100_000_000, cwd=tmp_path)
    assert_refused(done, "GiB", "smaller")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_standard_output_that_is_full_is_one_line(trained):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "generate", "--model", str(trained[0]), "hello"],
            env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=60,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr
