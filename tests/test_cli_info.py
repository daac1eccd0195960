"""`tinygrad-llm info`, as users run it."""

import json

import pytest
from test_cli import run

from tinygrad_llm.checkpoint import save_model
from tinygrad_llm.gpt import GPT, GPTConfig


def test_the_parameters_of_a_size():
    found = json.loads(run("info", "--size", "gpt2-xl", "--json").stdout)
    assert (found["untied"], found["tied"]) == (1_637_792_000, 1_557_380_800)
    assert sum(found["parts"].values()) == found["tied"] and found["config"]["n_layers"] == 48
    table = run("info", "--size", "gpt2-xl").stdout
    assert "1,637,792,000" in table and "6247.68" in table


@pytest.mark.parametrize("tie", [True, False])
def test_the_parameters_of_a_saved_model(tmp_path, tie):
    model = GPT(GPTConfig(11, 8, 8, 2, 1, tie_weights=tie))
    save_model(model, tmp_path)
    found = json.loads(run("info", "--model", tmp_path, "--json").stdout)
    assert found["tied" if tie else "untied"] == model.num_parameters()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--size", "foo"), "'foo' is not one of"),
        (("--model", "/nonexistent"), "does not exist: expected a checkpoint directory"),
        (("--size", "gpt2", "--model", "x"), "give one of them"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = run("info", *arguments)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
