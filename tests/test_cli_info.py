"""`tinygrad-llm info`, as users run it."""

import json
import tracemalloc

import numpy as np
import pytest
from test_cli import call, run
from tinygrad_llm.kernels.cpu import attention

from tinygrad_llm.checkpoint import save_model
from tinygrad_llm.cli import memory
from tinygrad_llm.cli.info import in_bytes, kept_numbers
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator


def test_the_parameters_of_a_size():
    found = json.loads(run("info", "--size", "gpt2-xl", "--json").stdout)
    assert (found["untied"], found["tied"]) == (1_637_792_000, 1_557_380_800)
    assert sum(found["parts"].values()) == found["tied"] and found["config"]["n_layers"] == 48
    table = run("info", "--size", "gpt2-xl").stdout
    assert "1,637,792,000" in table and "6.10 GiB" in table


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model(tmp_path, tie):
    model = GPT(GPTConfig(11, 8, 8, 2, 1, tie_weights=tie))
    save_model(model, tmp_path, dtype="bfloat16")
    found = json.loads(run("info", "--model", tmp_path, "--batch-size", 3, "--json").stdout)
    n = model.num_parameters()
    assert found["tied" if tie else "untied"] == n
    size = (tmp_path / "model.safetensors").stat().st_size
    assert found["stored"] == {
        "files": {"model.safetensors": size},
        "tensors": 16 + (not tie),
        "dtypes": {"bfloat16": 16 + (not tie)},
    }
    memory = found["memory"]
    assert memory["training"]["batch_size"] == 3 and memory["training"]["parameters"] == 16 * n
    assert memory["generation"]["weights"] == 4 * n
    assert memory["generation"]["cache_per_token"] == 2 * 1 * 8 * 4  # k and v, layers, width
    assert memory["generation"]["cache_full_context"] == 8 * memory["generation"]["cache_per_token"]


def test_a_model_is_not_loaded(tmp_path):
    """Its tensors are not read: the numbers of a sparse file of 5 GB would take a while."""
    save_model(GPT(GPTConfig(1, 8, 8, 2, 1)), tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:length])
    rows = 4 * 5 * 10**9 // (4 * 8 * 4)
    for entry in header.values():
        if "shape" in entry and entry["shape"] == [1, 8]:
            entry["shape"][0] = rows
            grown = 32 * (rows - 1)
            entry["data_offsets"][1] += grown
        elif "shape" in entry:
            entry["data_offsets"] = [offset + grown for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + len(raw) - length + grown)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": rows}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = run("info", "--model", tmp_path)
    assert found.returncode == 0 and f"{8 * rows:,}" in found.stdout


def test_what_attention_keeps_is_known_here():
    assert (memory.QUERIES, memory.SHORT) == (attention._QUERIES, attention._KEPT)


@pytest.mark.parametrize(
    "B, T, C, H, L, V, rates",
    [
        (4, 128, 64, 2, 2, 500, (0, 0, 0)),
        (4, 128, 64, 2, 2, 500, (0.1, 0.1, 0.1)),
        (2, 384, 64, 4, 2, 50, (0, 0, 0)),
        (2, 384, 64, 4, 1, 50, (0, 0.1, 0)),
        (2, 128, 96, 3, 4, 5000, (0, 0, 0.1)),
    ],
)
def test_what_a_forward_pass_keeps(B, T, C, H, L, V, rates):
    """The estimate of the activations is what NumPy's allocations amount to."""
    names = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")
    cfg = GPTConfig(V, T, C, H, L, **dict(zip(names, rates)))
    model = GPT(cfg, Generator(1))
    ids = np.arange(B * T).reshape(B, T) % V
    tracemalloc.start()
    loss = model.loss(ids, ids)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert loss.item() > 0
    assert 4 * B * T * kept_numbers(cfg) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (2**30 - 2**20, "1023.00 MiB"),
        (5 * 2**40, "5120.00 GiB"),
    ],
)
def test_units(n, text):
    assert in_bytes(n) == text


# --- two checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """Two directories of the same weights, one in shards, and the model."""
    model = GPT(GPTConfig(11, 8, 8, 2, 1), Generator(3))
    save_model(model, tmp_path / "a")
    save_model(model, tmp_path / "b", max_shard_size="1KB")
    return tmp_path / "a", tmp_path / "b", model


def test_equal_ones(pair):
    done = run("info", "--model", pair[0], "--compare", pair[1])
    assert done.returncode == 0
    assert done.stdout == "The configurations are equal.\nAll 16 tensors are equal.\n"
    as_json = run("info", "--model", pair[0], "--compare", pair[1], "--json")
    assert as_json.returncode == 0 and json.loads(as_json.stdout) == {"config": {}, "tensors": {}}


def test_different_numbers(pair):
    first, second, model = pair
    weight = model.blocks[0].ff.up.weight.data
    largest = float(np.abs(weight).max())
    weight[3, 5] += 0.5
    model.final_norm.bias.data[1] = np.nan
    save_model(model, second)
    done = run("info", "--model", first, "--compare", second, "--json")
    found = json.loads(done.stdout)["tensors"]
    assert done.returncode == 1
    assert set(found) == {"transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.bias"}
    changed = found["transformer.h.0.mlp.c_fc.weight"]
    assert changed["largest"] == pytest.approx(0.5, rel=1e-6)
    assert changed["relative"] == pytest.approx(0.5 / largest, rel=1e-6)
    assert np.isnan(found["transformer.ln_f.bias"]["largest"])
    table = run("info", "--model", first, "--compare", second)
    assert table.returncode == 1 and "2 of 16 tensors differ" in table.stdout
    assert "h.0.mlp.c_fc.weight" in table.stdout and "nan" in table.stdout


def test_different_models(pair, tmp_path):
    save_model(GPT(GPTConfig(12, 8, 8, 4, 2)), tmp_path / "c")
    done = run("info", "--model", pair[0], "--compare", tmp_path / "c", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["config"] == {"vocab_size": [11, 12], "n_heads": [2, 4], "n_layers": [1, 2]}
    assert found["tensors"]["transformer.wte.weight"]["shapes"] == [[11, 8], [12, 8]]
    assert found["tensors"]["transformer.h.1.ln_1.bias"]["shapes"] == [None, [8]]
    table = run("info", "--model", pair[0], "--compare", tmp_path / "c").stdout
    assert "vocab_size: 11 and 12\n" in table
    assert "transformer.wte.weight: shape (11, 8) and shape (12, 8)\n" in table
    assert "transformer.h.1.ln_1.bias: missing and shape (8,)\n" in table


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--size", "foo"), "'foo' is not one of"),
        (("--model", "/nonexistent"), "does not exist: expected a checkpoint directory"),
        (("--size", "gpt2", "--model", "x"), "give one of them"),
        (("--compare", "x"), "give --model, too"),
        (("--batch-size", "0"), "batch-size"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = call("info", *arguments)
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
