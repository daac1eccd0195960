"""Checkpoints: transformers computes the same from them, and whatever breaks one is noticed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tinygrad_llm import no_grad
from tinygrad_llm.checkpoint import (
    load_model,
    load_tokenizer,
    save_model,
)
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import (
    BPETokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
)

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def make_model(seed=0, **changes):
    sizes = {"vocab_size": 13, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2}
    model = GPT(GPTConfig(**{**sizes, "drop_rate": 0.1, **changes}), Generator(seed))
    generator = Generator(seed + 1)
    for parameter in model.parameters():  # no zeros and ones that would hide a mix-up
        parameter.data += generator.normal(0, 0.1, parameter.shape)
    return model.eval()


def logits(model, ids=IDS):
    with no_grad():
        return model(ids).data


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def change_config(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def change_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


# --- our own round trip ---------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_what_is_saved_comes_back(tmp_path, tie_weights, qkv_bias):
    model = make_model(tie_weights=tie_weights, qkv_bias=qkv_bias)
    save_model(model, tmp_path / "new" / "directory")
    loaded = load_model(tmp_path / "new" / "directory")
    assert loaded.cfg == model.cfg
    assert same_weights(loaded, model)
    stored = safetensors.numpy.load_file(tmp_path / "new" / "directory" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tie_weights)


def test_the_tokenizer_is_saved_beside_the_model(tmp_path):
    tokenizer = BPETokenizer.train("to be or not to be", 260)
    model = make_model(vocab_size=tokenizer.vocab_size)
    save_model(model, tmp_path, tokenizer)
    assert load_tokenizer(tmp_path, model).encode("to be") == tokenizer.encode("to be")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == tokenizer.end_of_text
    with pytest.raises(ValueError, match=r"tokenizer .* has \d+ tokens, the model only 13"):
        load_tokenizer(tmp_path, make_model())
    with pytest.raises(ValueError, match=r"vocab\.json is missing"):
        load_tokenizer(tmp_path / "none", model)


def test_saving_leaves_only_whole_files(tmp_path):
    save_model(make_model(), tmp_path)
    save_model(make_model(seed=5), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert same_weights(load_model(tmp_path), make_model(seed=5))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch, function):
    save_model(make_model(), tmp_path)

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(make_model(seed=5), tmp_path)
    assert same_weights(load_model(tmp_path), make_model())
    assert len(os.listdir(tmp_path)) == 2


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def torch_logits(model, ids=IDS):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def make_theirs(transformers, **changes):
    import torch

    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 12, "n_head": 3, "n_layer": 2}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**{**sizes, **special, **changes})
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_transformers_opens_ours(tmp_path, transformers, tie_weights, qkv_bias):
    model = make_model(tie_weights=tie_weights, qkv_bias=qkv_bias)
    save_model(model, tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(torch_logits(theirs), logits(model), atol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_we_open_what_transformers_saves(tmp_path, transformers, tie):
    theirs = make_theirs(transformers, tie_word_embeddings=tie, resid_pdrop=0.2)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path).eval()
    assert model.cfg.qkv_bias and model.cfg.tie_weights == tie and model.cfg.drop_rate == 0.2
    np.testing.assert_allclose(logits(model), torch_logits(theirs), atol=1e-4)


def test_names_without_prefix_and_stored_masks(tmp_path, transformers):
    theirs = make_theirs(transformers)
    theirs.save_pretrained(tmp_path)
    theirs.transformer.save_pretrained(tmp_path)  # GPT2Model: "wte.weight", ...

    def add_masks(tensors):
        assert "wte.weight" in tensors
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)

    change_weights(tmp_path, add_masks)
    np.testing.assert_allclose(logits(load_model(tmp_path).eval()), torch_logits(theirs), atol=1e-4)


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path, transformers):
    save_model(make_model(qkv_bias=False), tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    theirs.transformer.h[1].attn.c_attn.bias.data += 0.5
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path).eval()
    assert model.cfg.qkv_bias
    np.testing.assert_allclose(logits(model), torch_logits(theirs), atol=1e-4)


def test_half_precision_becomes_float32(tmp_path, transformers):
    import torch

    theirs = make_theirs(transformers)
    theirs.to(torch.float16).save_pretrained(tmp_path)
    model = load_model(tmp_path).eval()
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logits(model), torch_logits(theirs.float()), atol=1e-4)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path).eval()
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logits(model), torch_logits(theirs.float()), atol=1e-4)


# --- what is wrong is said in one line ------------------------------------------------------------


def truncate(directory, size=200):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def change_header(directory, **changes):
    """Changes what the file's header says of transformer.ln_f.bias."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:length])
    header["transformer.ln_f.bias"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[length:])


def replace_by(make, name="model.safetensors"):
    """Damage: something else, that make(path) puts there, under the name of a file."""

    def damage(directory):
        (directory / name).unlink()
        make(directory / name)

    return damage


def append(directory):
    with open(directory / "model.safetensors", "ab") as file:
        file.write(b"more")


def to_pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


BROKEN = [
    (lambda d: (d / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
    (to_pickle, ValueError, "pytorch_model.bin is a pickle"),
    (truncate, ValueError, "no whole safetensors file"),
    (lambda d: truncate(d, 0), ValueError, "no whole safetensors file"),
    (lambda d: truncate(d, -1), ValueError, "no whole safetensors file"),
    (append, ValueError, "it is cut short or damaged, get it again"),
    (lambda d: change_header(d, dtype="F99"), ValueError, "F99.*damaged, get it again"),
    (lambda d: change_header(d, shape=[-12]), ValueError, "-12.*damaged, get it again"),
    (replace_by(Path.mkdir), ValueError, "model.safetensors is no regular file"),
    (replace_by(os.mkfifo), ValueError, "model.safetensors is no regular file"),
    (replace_by(os.mkfifo, "config.json"), ValueError, "config.json is no regular file"),
    (replace_by(lambda p: p.symlink_to(os.devnull)), ValueError, "is no regular file"),
    (lambda d: change_config(d, quantization_config={}), ValueError, "quantized weights are not"),
    (lambda d: (d / "config.json").write_text("{"), ValueError, "no valid JSON"),
    (lambda d: (d / "config.json").write_bytes(b"\xff"), ValueError, "no valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), ValueError, "holds a JSON list"),
    (lambda d: change_config(d, model_type="llama"), ValueError, "'llama': expected 'gpt2'"),
    (lambda d: change_config(d, n_embd="gone"), ValueError, "has n_embd None: expected an integer"),
    (lambda d: change_config(d, n_embd="12"), ValueError, "has n_embd .12.: expected an integer"),
    (lambda d: change_config(d, activation_function="relu"), ValueError, "is 'gelu_new'"),
    (lambda d: change_config(d, n_inner=5), ValueError, "n_inner 5"),
    (lambda d: change_config(d, n_head=5), ValueError, "n_heads must divide emb_dim"),
    (lambda d: change_config(d, n_layer=3), ValueError, r"missing transformer\.h\.2\."),
    (lambda d: change_config(d, n_layer=1), ValueError, r"unexpected transformer\.h\.1\."),
    (lambda d: change_config(d, n_positions=9), ValueError, r"\(8, 12\), expected \(9, 12\)"),
    (lambda d: change_weights(d, lambda t: t.pop("transformer.ln_f.bias")), ValueError, "missing"),
    (
        lambda d: change_weights(d, lambda t: t.update({"foo.bar": np.zeros(1)})),
        ValueError,
        "unexpected foo.bar$",
    ),
]


@pytest.mark.parametrize(("damage", "error", "says"), BROKEN)
def test_broken_checkpoints(tmp_path, damage, error, says):
    save_model(make_model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=says) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "file")
    for place in (5, None):
        with pytest.raises(TypeError, match=f"expected a directory, as a str or Path, not {place}"):
            load_model(place)
        with pytest.raises(TypeError, match=f"expected a directory, as a str or Path, not {place}"):
            save_model(make_model(), place)
    with pytest.raises(NotADirectoryError, match="file is a file: give a directory"):
        save_model(make_model(), tmp_path / "file")


@pytest.mark.parametrize("dtype", ["nonsense", "int32"])
def test_no_dtypes_of_parameters(tmp_path, dtype):
    with pytest.raises(TypeError, match=f"cannot be {dtype}: expected a floating .* float32, flo"):
        load_model(tmp_path, dtype)


def test_what_torch_saved_under_our_name(tmp_path):
    torch = pytest.importorskip("torch")
    save_model(make_model(), tmp_path)
    for new in (True, False):
        weights, path = {"a": torch.ones(1000)}, tmp_path / "model.safetensors"
        torch.save(weights, path, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=r"is a pickle, .* rename it to pytorch_model.bin"):
            load_model(tmp_path)


def test_a_failure_leaves_no_folder(tmp_path):
    model = make_model()
    model.tok_emb.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="too large for float16"):
        save_model(model, tmp_path / "deep" / "model", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_separate_dropout_rates_are_kept(tmp_path):
    rates = {"drop_rate_emb": 0.0, "drop_rate_attn": 0.3, "drop_rate_shortcut": 0.2}
    cfg = GPTConfig(11, 8, 8, 2, 1, drop_rate=0.1, **rates)
    save_model(GPT(cfg), tmp_path)
    found = load_model(tmp_path).cfg
    for where in ("emb", "attn", "shortcut"):
        assert found.dropout(where) == cfg.dropout(where)


@pytest.mark.parametrize("kind", [WordTokenizer, WordPieceTokenizer, UnigramTokenizer])
def test_every_tokenizer_is_found_beside_its_model(tmp_path, kind):
    text = "a rose is a rose is a rose\n" * 20
    tokenizer = kind.train(text) if kind is WordTokenizer else kind.train(text, 300)
    model = GPT(GPTConfig(max(tokenizer.vocab_size, 2), 8, 8, 2, 1))
    save_model(model, tmp_path, tokenizer)
    found = load_tokenizer(tmp_path, load_model(tmp_path))
    assert type(found) is kind and found.encode("a rose is") == tokenizer.encode("a rose is")
