"""The commands that fine-tune, as users run them: results, files, wrong input, going on."""

import json
import shlex
import signal
import subprocess

import numpy as np
import pytest
import test_cli
from test_cli import COMMAND, ENVIRONMENT, assert_refused, files_of
from test_finetune_training import COLOURS, entries, texts

from tinygrad_llm.checkpoint import (
    load_adapter,
    load_model,
    load_tokenizer,
    save_model,
)
from tinygrad_llm.cli.finetune.classify import Classification
from tinygrad_llm.cli.run import new_directory
from tinygrad_llm.finetune import GPTClassifier, read_entries, saved_template
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import END_OF_TEXT, BPETokenizer

TEXT = " ".join([*COLOURS, *COLOURS.values(), "is wide in spring by the river colour 12?"])
QUICK = ["--batch-size", "4", "--threads", "1", "--device", "cpu", "--epochs", "2"]


def call(line, *more):
    return test_cli.call(*shlex.split(line), *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learned nothing, and data."""
    path = tmp_path_factory.mktemp("finetune")
    tokenizer = BPETokenizer.train(TEXT, 300, (END_OF_TEXT,))
    cfg = GPTConfig(300, 256, 16, 2, 1, drop_rate=0.1, tie_weights=True)
    save_model(GPT(cfg, Generator(0)), path / "base", tokenizer)
    table = texts(60)
    rows = zip((table.classes[i] for i in table.labels), table.texts)
    (path / "colours.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    (path / "entries.json").write_text(json.dumps(entries(24)))
    return path


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def ok(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- classes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(folder):
    """A directory that `finetune classify` has made."""
    line = "finetune classify --data colours.tsv --model base --out classes --lr 0.01"
    done = subprocess.run(
        [*COMMAND, *shlex.split(line), *QUICK, "--position", "mean", "--epochs", "8"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    return folder / "classes", ok(done)


def test_a_classifier_from_the_command_line(classifier):
    directory, said = classifier
    assert "60 texts: blue 20, green 20, grey 20" in said
    assert "42 to train, 6 to validate and 12 to test with" in said
    assert "steps of 4 texts, 10 in an epoch" in said
    found = json.loads((directory / "scores.json").read_text())
    confusion = np.array(found["confusion"])
    assert confusion.sum() == 12 and found["accuracy"] == np.trace(confusion) / 12 > 0.8
    assert [row["texts"] for row in found["classes"].values()] == confusion.sum(axis=1).tolist()
    assert f"accuracy {found['accuracy']:.2%}" in said
    assert f"regression on words {found['words']:.2%}" in said
    lines = [(directory / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    new = [line for line in lines[1] if line not in lines[0]]
    assert 0 < len(new) == found["new"]["texts"] < 12
    assert f"on the {len(new)} that are not also to train with: accuracy" in said
    assert (directory / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")

    model = GPTClassifier.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model)
    rows = [json.loads(line) for line in (directory / "test.jsonl").read_text().splitlines()]
    predicted = model.predict([row["text"] for row in rows], tokenizer)
    assert (
        np.mean([row["label"] == name for row, name in zip(rows, predicted)]) == found["accuracy"]
    )

    text = rows[0]["text"]
    (expected,) = model.probabilities([text], tokenizer).tolist()
    shown = dict(line.split() for line in ok(call("classify --model classes", text)).splitlines())
    assert list(shown.values()) == sorted(shown.values(), reverse=True)
    assert {name: float(share) for name, share in shown.items()} == pytest.approx(
        dict(zip(model.classes, expected)), abs=1e-4
    )


def test_many_texts_are_classified_as_each_alone(classifier, folder):
    lines = ["the sea is wide", "a stone", "trees " * 50]
    (folder / "some.txt").write_text("\n".join(lines) + "\n")
    found = [
        json.loads(x)
        for x in ok(call("classify --model classes --batch some.txt")).split("\n")[:-1]
    ]
    assert [row["text"] for row in found] == lines
    for row in found:
        shares = row["probabilities"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(shares, key=shares.get)
        first = ok(call("classify --model classes", row["text"])).split()
        assert first[0] == row["class"] and float(first[1]) == pytest.approx(
            shares[first[0]], abs=1e-4
        )


def test_a_run_that_is_done_writes_what_is_missing_and_can_be_made_longer(classifier):
    directory, _ = classifier
    (directory / "scores.json").unlink()
    weights = (directory / "model.safetensors").read_bytes()
    said = ok(call("finetune classify --out classes --resume --device cpu"))
    assert "has done its 80 steps already: raise --epochs" in said
    assert (directory / "scores.json").exists()
    assert (directory / "model.safetensors").read_bytes() == weights
    assert_refused(
        call("finetune classify --out classes --resume --epochs 7"), "--epochs 7 is less than the 8"
    )
    scores = (directory / "scores.json").read_bytes()
    said = ok(call("finetune classify --out classes --resume --epochs 9 --device cpu"))
    assert "step 90/90" in said and (directory / "scores.json").exists()
    assert (directory / "scores.json.aside").read_bytes() == scores  # of the model before


def test_adapters_of_a_classifier(folder):
    ok(
        call(
            "finetune classify --data colours.tsv --model base --out low --lora 2",
            *["--lora-dropout", "0.1", *QUICK],
        )
    )
    model = GPTClassifier.from_pretrained("low")
    base = load_model("base")
    assert not np.array_equal(
        model.body.blocks[0].att.qkv.weight.data, base.blocks[0].att.qkv.weight.data
    )
    np.testing.assert_array_equal(model.body.tok_emb.weight.data, base.tok_emb.weight.data)
    config = json.loads((folder / "low" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4


# --- instructions ---------------------------------------------------------------------------------


def test_instructions_from_the_command_line(folder):
    line = "finetune instruct --data entries.json --model base --out told --max-new-tokens 4"
    line = f"{line} --response-only --packing --template chatml"
    said = ok(call(line, *QUICK, "--batch-size", "2"))
    assert "24 entries: 20 to train, 2 to test and 2 to validate with" in said
    assert "loss on the entries to test with" in said and "rouge l" in said
    told = folder / "told"
    assert saved_template(told).name == "chatml"
    responses = read_entries(told / "responses.json")
    assert [entry["instruction"] for entry in responses] == ["colour 20?", "colour 21?"]
    assert all(isinstance(entry["model_response"], str) for entry in responses)
    model = load_model(told)
    tokenizer = load_tokenizer(told, model)
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.special_tokens)

    marked = [{**entry, "model_response": "mine"} for entry in responses]
    (told / "responses.json").write_text(json.dumps(marked))  # what is there is not asked again
    ok(call("finetune instruct --out told --resume --device cpu"))
    assert read_entries(told / "responses.json") == marked
    said = ok(call("finetune instruct --out told --resume --epochs 3 --device cpu"))
    assert "set aside" in said and read_entries(told / "responses.json.aside") == marked
    assert read_entries(told / "responses.json") != marked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_alone_makes_the_same_model(folder, dtype):
    """To the last digits: what is merged is not rounded to 16 bits."""
    line = f"finetune instruct --data entries.json --model base --out {dtype} --dtype {dtype}"
    ok(call(f"{line} --lora 2 --max-new-tokens 0", *QUICK))
    base, whole = load_model("base").to(dtype).to(np.float32), load_model(dtype)
    load_adapter(base, folder / dtype / "adapter")
    # Memory is asked for by the longest row, not by all that the model could take.
    assert 50 < test_cli.trainer_of(dtype)["settings"]["context"] < base.cfg.context_length
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(base.eval()(ids).data, whole.eval()(ids).data, atol=1e-5)


def test_new_words_are_learned_beside_adapters(folder):
    line = (
        "finetune instruct --data entries.json --model base --out words --lora 2 --max-new-tokens 0"
    )
    said = ok(call(f"{line} --template chatml", *QUICK))
    assert "special tokens that are new" in said and "the adapter is not written alone" in said
    assert not (folder / "words" / "adapter").exists()  # which would not hold them
    before, after = (load_model(name).tok_emb.weight.data for name in ("base", "words"))
    assert len(after) > len(before) and not np.array_equal(after[: len(before)], before)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "finetune classify --data colours.tsv --lora 2 --dropout 0.1 --patience 99 --epochs 8",
        "finetune instruct --data entries.json --packing --max-new-tokens 2 --epochs 16",
    ],
    ids=["classify", "instruct"],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, folder, line):
    command = f"{line} --model {folder / 'base'} --batch-size 2 --threads 1 --device cpu"
    command += " --eval-interval 7"
    ok(call(command, "--out", tmp_path / "straight"))
    options = [*COMMAND, *shlex.split(command), "--out", tmp_path / "killed"]
    with subprocess.Popen(options, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "killed" / "log.jsonl"
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 9):
            pass
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended by itself: more epochs"
    results = {"scores.json", "confusion.png", "responses.json"}
    assert not results & {path.name for path in (tmp_path / "killed").iterdir()}
    for path in list((tmp_path / "killed").rglob("*config.json")):  # also that of the adapter
        path.with_name(f".{path.name}.1.tmp").touch()
    name = " ".join(line.split()[:2])
    ok(call(f"{name} --resume --device cpu", "--out", tmp_path / "killed", *line.split()[-2:]))
    straight, killed = (files_of(tmp_path / which) for which in ("straight", "killed"))
    for which in (straight, killed):
        steps = map(json.loads, which.pop("log.jsonl").splitlines())
        which["steps"] = [
            {k: v for k, v in s.items() if k not in ("seconds", "memory")} for s in steps
        ]
    assert killed == straight
    if "--lora" in line:
        straight, killed = (
            files_of(tmp_path / f"{which}/adapter") for which in ("straight", "killed")
        )
        assert killed == straight


def test_nothing_stays_of_a_run_that_could_not_begin(tmp_path):
    """Its adapter included; nor of one that was killed before its first checkpoint."""
    out = tmp_path / "runs" / "1"

    def begin(adapter):
        with new_directory(Classification, out) as (directory, held):
            held.close()
            if adapter:
                (directory / "adapter").mkdir(exist_ok=True)
                (directory / "adapter" / "adapter_config.json").write_text("{}")
            raise KeyboardInterrupt

    for adapter in (True, False):
        with pytest.raises(KeyboardInterrupt):
            begin(adapter)
        assert list(tmp_path.iterdir()) == []
    (out / "adapter").mkdir(parents=True)
    for name in (".incomplete", "adapter/adapter_config.json"):
        (out / name).touch()
    with new_directory(Classification, out) as (_, held):
        assert not (out / "adapter").exists()
    held.close()


def test_other_commands_do_not_go_on_with_it(classifier):
    for name in ("train", "finetune instruct"):
        assert_refused(
            call(f"{name} --out classes --resume"),
            "is one of finetune classify: go on with finetune classify --resume",
        )
    done = call("finetune classify --out classes --resume --lora 8")
    assert_refused(done, "--lora 8 does not fit the run in classes", "leave --lora out")
    done = call("finetune classify --out classes --resume --no-balance")
    assert_refused(done, "--no-balance does not fit the run in classes", "leave it out")


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("classify --model base", ["--data is missing"]),
        ("classify --data colours.tsv", ["--model is missing"]),
        ("classify --data none.tsv --model base", ["none.tsv does not exist"]),
        ("classify --data colours.tsv --model none", ["none does not exist"]),
        ("classify --data one.tsv --model base", ["all labels are 'a'", "two classes"]),
        ("classify --data empty.tsv --model base", ["empty.tsv, line 2: the text is empty"]),
        ("classify --data torn.csv --model base", ["torn.csv, line 3", "number of fields is 3"]),
        ("classify --data rare.tsv --model base", ["3 rows, taken from 12", "of class"]),
        ("classify --data colours.tsv --model base --batch-size 64", ["42 rows", "64"]),
        ("classify --data colours.tsv --model base --max-length 999", ["--max-length 999", "256"]),
        ("classify --data colours.tsv --model base --lora 2 --layers head", ["leave --layers out"]),
        ("classify --data colours.tsv --model base --lora-alpha 2", ["--lora-alpha", "--lora"]),
        ("classify --data colours.tsv --model base --lora 17", ["--lora 17", "width of 16"]),
        ("classify --data colours.tsv --model base --lora 2 --lora-alpha 0", ["--lora-alpha 0"]),
        ("classify --data colours.tsv --model base --lora-target qkv", ["--lora-target", "--lora"]),
        ("classify --data colours.tsv --model base --lora 2 --lora-target no", ["matches 'no'"]),
        ("classify --data colours.tsv --model base --dropout 1", ["--dropout 1"]),
        ("classify --data colours.tsv --model base --text-column 7", ["there is no column 7"]),
        ("classify --data colours.tsv --model base --position middle", ["middle"]),
        ("classify --resume", ["--resume needs --out"]),
        ("classify --resume --out base", ["--resume needs the directory of a run"]),
        ("classify --data colours.tsv --model base --out base", ["would be lost"]),
        ("instruct --data colours.tsv --model base", ["colours.tsv is not valid JSON"]),
        ("instruct --data few.json --model base", ["2 entries make parts"]),
        ("instruct --data bad.json --model base", ["bad.json, entry 2 has no 'output'"]),
        ("instruct --data long.json --model base --too-long refuse", ["entry 23", "leave such"]),
        ("instruct --data long.json --model base --response-only", ["entry 23", "prompt"]),
        ("instruct --data entries.json --model base --template llama", ["llama"]),
    ],
)  # fmt: skip
def test_wrong_input(folder, arguments, parts):
    files = {
        "one.tsv": "a\tx\na\ty\n",
        "empty.tsv": "a\tx\nb\t \n",
        "torn.csv": "label,text\na,x\na,b,c\n",
        "rare.tsv": "a\tx\nb\ty\na\tz\n" + "c\tw\n" * 9,
        "few.json": json.dumps(entries(2)),
        "bad.json": json.dumps([entries(1)[0], {"instruction": "x"}]),
        "long.json": json.dumps([*entries(22), {**entries(1)[0], "instruction": "sea " * 300}]),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    before = sorted(folder.rglob("*"))
    out = "" if "--out" in arguments or "--resume" in arguments else "--out new"
    assert_refused(call(f"finetune {arguments} {out}"), *parts)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--model base hello", ["base holds a language model"]),
        ("--model none hello", ["none does not exist"]),
        ("--model classes", ["give one text"]),
        ("--model classes ' '", ["text 1 is empty"]),
        ("--model classes --batch gap.txt", ["gap.txt has no text in line 2"]),
    ],
)
def test_wrong_texts_to_classify(classifier, folder, arguments, parts):
    (folder / "gap.txt").write_text("a\n\nb\n")
    assert_refused(call(f"classify {arguments}"), *parts)


def test_what_a_user_is_told(classifier, folder):
    done = call("classify --model classes", "trees " * 50)
    assert "1 of 1 texts are longer" in done.stderr and ok(done)
    told = ok(call("info --model classes"))
    assert "blue, green, grey apart, by a head of 3 x 16" in told
    assert json.loads(ok(call("info --model classes --json")))["classes"] == sorted(COLOURS)


def test_the_parts_of_the_data_stay_as_they_were(folder):
    ok(call("finetune classify --data colours.tsv --model base --out parts", *QUICK))
    for name in ("train", "test"):
        path = folder / "parts" / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(before.replace("spring", "autumn"))
        done = call("finetune classify --out parts --resume --device cpu")
        assert_refused(done, f"{name}.jsonl", "is not as it was: put it back")
        path.unlink()
        done = call("finetune classify --out parts --resume --device cpu")
        assert_refused(done, f"{name}.jsonl", "is gone")
        path.write_text(before)
    ok(call("finetune classify --out parts --resume --device cpu"))
