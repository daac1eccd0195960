"""`tinygrad-llm export`, as users run it."""

import json

import numpy as np
import pytest
import safetensors.numpy
from test_checkpoint import make_model
from test_cli import call, files_of, run

from tinygrad_llm.checkpoint import load_model, load_tokenizer
from tinygrad_llm.tokenizer import BPETokenizer

TOKENIZER = BPETokenizer.train("to be or not to be", 260)


@pytest.fixture
def source(tmp_path):
    make_model(vocab_size=260, qkv_bias=False).save_pretrained(tmp_path / "source", TOKENIZER)
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "source"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_and_shards(tmp_path, source, dtype):
    before = files_of(source)
    half, whole = tmp_path / "half", tmp_path / "deep" / "whole"
    done = run("export", source, half, "--dtype", dtype, "--max-shard-size", "5 KB")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{half}\n", "")
    assert files_of(source) == before
    assert len(list(half.glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((half / "config.json").read_text())["dtype"] == dtype
    assert run("export", half, whole).returncode == 0
    stored = safetensors.numpy.load_file(whole / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float32)}

    original, model = load_model(source), load_model(whole)
    assert model.cfg == original.cfg
    largest = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]  # half a unit in the last place
    for a, b in zip(original.parameters(), model.parameters()):
        np.testing.assert_allclose(b.data, a.data, rtol=largest, atol=1e-7)
    assert load_tokenizer(whole, model).encode("to be") == TOKENIZER.encode("to be")
    names = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    names |= {"chat_template.jinja"}
    assert names <= files_of(half).keys()
    assert all(files_of(half)[name] == before[name] for name in names)


def test_what_the_config_says_is_kept(tmp_path, source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"task_specific_params": {"n": 1}}))
    assert run("export", source, tmp_path / "copy").returncode == 0
    found = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert found == config | {"task_specific_params": {"n": 1}}


def test_numbers_that_float16_has_not(tmp_path, source):
    model = load_model(source)
    model.tok_emb.weight.data[0, 0] = -1e6
    model.save_pretrained(source)
    done = run("export", source, tmp_path / "half", "--dtype", "float16")
    assert done.returncode == 2 and "choose bfloat16 or float32" in done.stderr
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("none", "new"), "does not exist: expected a checkpoint directory"),
        (("source", "source"), "source exists, and would be overwritten"),
        (("source", "source/config.json"), "config.json exists, and would be overwritten"),
        (("source", "source/config.json/x"), "Not a directory"),
        (("source", "new", "--max-shard-size", "5 parsecs"), "a size such as 500MB or 2GB"),
        (("source", "new", "--dtype", "int8"), "'int8' is not one of"),
    ],
)
def test_bad_input_is_one_line(tmp_path, source, arguments, words):
    before = files_of(source)
    paths, options = arguments[:2], arguments[2:]
    done = call("export", *(tmp_path / path for path in paths), *options)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert files_of(source) == before and not (tmp_path / "new").exists()
