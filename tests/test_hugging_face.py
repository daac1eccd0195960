"""Hugging Face both ways: what transformers computes, we compute, from one set of files; models by
name; shards; dtypes; and nothing lost, whenever a save is interrupted."""

import errno
import http.server
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
from test_checkpoint import (
    IDS,
    change_config,
    logits,
    make_model,
    make_theirs,
    same_weights,
    torch_logits,
)

from tinygrad_llm.checkpoint import INDEX, WEIGHTS, find_model, load_tokenizer, open_checkpoint
from tinygrad_llm.checkpoint import shards as shards_
from tinygrad_llm.generate import generate
from tinygrad_llm.gpt import GPT
from tinygrad_llm.tokenizer import BPETokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "to be or not to be, that is the question: whether 'tis nobler in the mind\n" * 3
SIZES = [  # vocab_size, n_positions, n_embd, n_head, n_layer, tied
    (13, 8, 12, 3, 2, True),
    (300, 32, 64, 4, 3, False),
    (1031, 64, 48, 1, 5, True),
    (5, 1024, 128, 8, 1, True),
]


def shards(directory):
    return sorted(path.name for path in directory.glob("*.safetensors"))


def theirs_of(directory):
    """What transformers opens there, with nothing missing and nothing left over."""
    model, info = transformers.GPT2LMHeadModel.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def greedy_of(theirs, ids, n):
    options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0}
    ids = torch.tensor(ids)
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options).numpy()


# --- both directions ------------------------------------------------------------------------------


@pytest.mark.parametrize("V, T, C, H, L, tie", SIZES)
def test_sizes_in_both_directions(tmp_path, V, T, C, H, L, tie):
    theirs = make_theirs(
        transformers,
        **{"vocab_size": V, "n_positions": T, "n_embd": C, "n_head": H, "n_layer": L},
        tie_word_embeddings=tie,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    ours.save_pretrained(tmp_path / "ours")
    again = theirs_of(tmp_path / "ours")
    ids = np.arange(10).reshape(2, 5) * 7 % V
    expected = torch_logits(theirs, ids)
    np.testing.assert_allclose(logits(ours, ids), expected, atol=1e-4)
    np.testing.assert_array_equal(torch_logits(again, ids), expected)
    n = min(T - 5, 12)
    np.testing.assert_array_equal(generate(ours, ids, n, temperature=0), greedy_of(theirs, ids, n))


def test_full_gpt2_in_both_directions(tmp_path):
    """124M parameters; in a process of their own, reading and writing them takes little more memory
    than they are, whatever their dtype."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    program = f"""
import sys
import tinygrad_llm.checkpoint
from tinygrad_llm.gpt import GPT
def megabytes(of):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(of)) / 1024
before = megabytes("VmRSS")
model = GPT.from_pretrained({str(tmp_path / "theirs")!r}, dtype=sys.argv[1])
weights = sum(p.data.nbytes for p in model.parameters()) / 2**20
loading = (megabytes("VmHWM") - before) / weights
model.save_pretrained({str(tmp_path / "ours")!r})
print(loading, (megabytes("VmHWM") - before) / weights)
"""
    for dtype in ("bfloat16", "float16", "float32"):  # the last one stays
        command = [sys.executable, "-c", program, dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loading, saving = map(float, done.stdout.split())
        assert 1 <= loading <= 1.3 and saving <= 1.3
    ids = np.array([[15496, 11, 314, 716]])
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    expected = torch_logits(theirs, ids)
    np.testing.assert_allclose(logits(ours, ids), expected, atol=1e-4)
    del ours
    again = theirs_of(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters()))


def test_text_and_tokenizer_in_both_directions(tmp_path):
    tokenizer = BPETokenizer.train(TEXT, 280)
    model = make_model(vocab_size=tokenizer.vocab_size, context_length=32)
    model.save_pretrained(tmp_path, tokenizer)
    theirs = theirs_of(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = "whether to be"
    ids = tokenizer.encode(prompt)
    assert their_tokenizer(prompt)["input_ids"] == ids
    expected = their_tokenizer.decode(greedy_of(theirs, [ids], 15)[0])
    assert tokenizer.decode(generate(model, [ids], 15, temperature=0)[0].tolist()) == expected

    theirs.save_pretrained(tmp_path / "back")
    their_tokenizer.save_pretrained(tmp_path / "back")
    model = GPT.from_pretrained(tmp_path / "back")
    tokenizer = load_tokenizer(tmp_path / "back", model)
    assert tokenizer.encode(prompt) == ids
    assert tokenizer.decode(generate(model, [ids], 15, temperature=0)[0].tolist()) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_is_what_pytorch_rounds_to(tmp_path, dtype):
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", dtype=dtype)
    whole, half = (theirs_of(tmp_path / name) for name in ("whole", "half"))
    kind = getattr(torch, dtype)
    for a, b in zip(whole.parameters(), half.parameters()):
        assert b.dtype == kind and torch.equal(a.to(kind), b)
    loaded = GPT.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(logits(loaded.eval()), torch_logits(half.float()), atol=1e-4)


def test_the_dtype_of_the_parameters(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    double = GPT.from_pretrained(tmp_path, dtype="float64").eval()
    assert logits(double).dtype == np.float64
    np.testing.assert_allclose(logits(double), logits(model), atol=1e-5)
    half = GPT.from_pretrained(tmp_path, dtype="float16")
    for a, b in zip(half.parameters(), model.parameters()):
        assert a.dtype == np.float16 and np.array_equal(a.data, b.data.astype(np.float16))
    with pytest.raises(TypeError, match="parameters cannot be int8: expected a floating dtype"):
        GPT.from_pretrained(tmp_path, dtype="int8")
    double.save_pretrained(tmp_path / "double", dtype="float64")
    assert same_weights(GPT.from_pretrained(tmp_path / "double"), model)
    with pytest.raises(ValueError, match="cannot be written as int8: expected one of float32"):
        model.save_pretrained(tmp_path / "none", dtype="int8")
    model.tok_emb.weight.data[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"wte.weight has numbers up to 1e\+05, too large"):
        model.save_pretrained(tmp_path, dtype="float16")
    assert same_weights(GPT.from_pretrained(tmp_path), make_model())


# --- shards ---------------------------------------------------------------------------------------


def test_shards_in_both_directions(tmp_path):
    theirs = make_theirs(transformers).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    assert len(shards(tmp_path / "theirs")) > 2 and not (tmp_path / "theirs" / WEIGHTS).exists()
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    np.testing.assert_allclose(logits(ours), torch_logits(theirs), atol=1e-4)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="5KB")
    assert len(shards(tmp_path / "ours")) > 2
    again = theirs_of(tmp_path / "ours")
    np.testing.assert_array_equal(torch_logits(again, IDS), torch_logits(theirs, IDS))
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * ours.num_parameters()
    sizes = [(tmp_path / "ours" / name).stat().st_size for name in shards(tmp_path / "ours")]
    assert max(sizes) < 5000 + 2000  # and a header
    ours.tok_emb.weight.data += 1  # saved over it, the shards have other names
    ours.save_pretrained(tmp_path / "ours", max_shard_size="5KB")
    again = theirs_of(tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again, IDS), logits(ours), atol=1e-4)


@pytest.mark.parametrize("size", ["5KB", 5000, "5000B", "0.005 MB", "4.9KiB"])
def test_sizes_of_shards(tmp_path, size):
    make_model().save_pretrained(tmp_path, max_shard_size=size)
    assert len(shards(tmp_path)) == 4


@pytest.mark.parametrize("size", ["", "5 parsecs", 0, -1, "1e3", "GB"])
def test_no_sizes_of_shards(tmp_path, size):
    with pytest.raises(ValueError, match="expected a size such as 500MB"):
        make_model().save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


# --- saved over another ---------------------------------------------------------------------------

STEPS = ("replace", "unlink", "link", "fsync")  # of the file system, in os
OLD, REFUSED, NEW = range(3)
TOKENIZERS = [BPETokenizer.train(text, 258) for text in ("aaaa", "bbbb")]
SAME, HEADS = {}, {"n_heads": 2}  # weights of the same names and shapes, either way


class Killed(BaseException):
    pass


def patch_steps(patch, before):
    """Calls before(name, arguments) before each of these steps."""

    def watched(name, step):
        def run(*arguments, **options):
            before(name, arguments)
            return step(*arguments, **options)

        return run

    for name in STEPS:
        patch.setattr(os, name, watched(name, getattr(os, name)))


def two_saves(directory, config, tokenizers=(None, None), sizes=(None, None)):
    """Functions that save an old and a new model, and one that says which of them opens."""
    same = {"vocab_size": 258} if tokenizers[0] else {}
    models = make_model(seed=1, **same), make_model(seed=5, **same, **config)

    def save(i):
        return lambda: models[i].save_pretrained(directory, tokenizers[i], max_shard_size=sizes[i])

    def opens():
        try:
            found = GPT.from_pretrained(directory)
        except FileNotFoundError as error:
            assert "has no config.json" in str(error)
            return REFUSED
        (i,) = (i for i in (0, 1) if same_weights(found, models[i]))
        assert found.cfg == models[i].cfg
        if tokenizers[i]:
            assert load_tokenizer(directory, found).token_ids == tokenizers[i].token_ids
        return (OLD, NEW)[i]

    return save(0), save(1), opens


WHOLE, SPLIT = (None, None), ("5KB", "5KB")


@pytest.mark.parametrize(
    "config, tokenizers, sizes",
    [
        *[(SAME, (None, None), sizes) for sizes in product((None, "5KB"), repeat=2)],
        *[(HEADS, (None, None), sizes) for sizes in (WHOLE, SPLIT)],
        *[(SAME, tokenizers, WHOLE) for tokenizers in (TOKENIZERS, TOKENIZERS[:1] * 2)],
    ],
)
def test_a_save_that_is_killed_leaves_the_old_or_the_new(
    tmp_path, monkeypatch, config, tokenizers, sizes
):
    """Dead before any step of the file system: the k-th one and all that follow do not happen.
    Another config or tokenizer makes a directory that is refused, never one that is neither."""
    outcomes = []
    for k in range(200):
        directory = tmp_path / str(k)
        save_old, save_new, opens = two_saves(directory, config, tokenizers, sizes)
        save_old()
        steps = iter(range(k))

        def die(name, arguments, steps=steps):
            if next(steps, None) is None:
                raise Killed

        with monkeypatch.context() as patch, suppress(Killed):
            patch_steps(patch, die)
            save_new()
        outcomes.append(opens())
        if next(steps, None) is not None:  # it had more to come than it needed
            break
        save_new()  # goes on from whatever was left
        assert opens() == NEW
    changes = config is HEADS or tokenizers[0] is not tokenizers[1]
    assert set(outcomes) == ({OLD, REFUSED, NEW} if changes else {OLD, NEW})
    assert outcomes == sorted(outcomes)
    assert (len(shards(directory)) == 1) == (sizes[1] is None)
    assert (directory / INDEX).exists() == (sizes[1] is not None)
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("sizes", [WHOLE, SPLIT])
def test_a_disk_that_is_full_leaves_everything_as_it_was(tmp_path, monkeypatch, sizes):
    """Whichever file or name it has no room for."""
    save_old, save_new, opens = two_saves(tmp_path, HEADS, TOKENIZERS, sizes)
    save_old()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for k in range(100):
        steps = iter(range(k))

        def fill_up(name, arguments, steps=steps):
            takes_room = name == "link" or (
                name == "fsync" and not stat.S_ISDIR(os.fstat(*arguments).st_mode)
            )
            if takes_room and next(steps, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch_steps(patch, fill_up)
            try:
                save_new()
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert k >= 6 and opens() == NEW


@pytest.mark.parametrize("sizes", [(None, None), ("5KB", "5KB"), (None, "5KB")])
def test_a_checkpoint_that_is_open_stays_what_it_was(tmp_path, sizes):
    save_old, save_new, _ = two_saves(tmp_path, SAME, sizes=sizes)
    save_old()
    opened = open_checkpoint(tmp_path)
    before = {name: tensor[:] for name, tensor in opened.tensors.items()}
    save_new()
    for name, tensor in opened.tensors.items():
        np.testing.assert_array_equal(tensor[:], before[name])


@pytest.mark.parametrize("sizes", [("5KB", "5KB"), ("5KB", None), (None, "5KB")])
@pytest.mark.parametrize("times", [1, 2])
def test_saves_between_the_files_of_a_reader(tmp_path, monkeypatch, times, sizes):
    """Once: a shard is gone. Twice: one of the same name is there, of other weights."""
    save_old, save_new, opens = two_saves(tmp_path, HEADS, sizes=sizes)
    for n in range(1, 5):  # before the n-th file with tensors
        save_old()
        saves, reads, read_header = [save_new, save_old][:times], count(1), shards_.read_header

        def read(path, saves=saves, reads=reads, read_header=read_header, n=n):
            if next(reads) == n:
                for save in saves:
                    save()
            return read_header(path)

        with monkeypatch.context() as patch:
            patch.setattr(shards_, "read_header", read)
            assert opens() in (OLD, NEW)


@pytest.mark.parametrize("times", [1, 2])
def test_shards_and_their_index_belong_together(tmp_path, monkeypatch, times):
    """Whatever becomes of config.json."""
    models = [make_model(seed=seed) for seed in (1, 5)]
    for model, name in zip(models, ("old", "new")):
        model.save_pretrained(tmp_path / name)
    old, new = (open_checkpoint(tmp_path / name).tensors for name in ("old", "new"))
    (tmp_path / "shards").mkdir()

    def save(tensors):
        shards_.write_weights(tmp_path / "shards", tensors, np.dtype(np.float32), 5000)

    save(old)
    saves, reads, read_header = [new, old][:times], count(1), shards_.read_header

    def read(path):
        if next(reads) == 2:
            for tensors in saves:
                save(tensors)
        return read_header(path)

    monkeypatch.setattr(shards_, "read_header", read)
    found, expected = shards_.read_weights(tmp_path / "shards"), saves[-1]
    assert next(reads) > 5  # the shard that was opened first has been opened again
    assert all(np.array_equal(found[name][:], expected[name][:]) for name in expected)


def test_models_that_are_read_while_others_are_saved(tmp_path):
    save_old, save_new, opens = two_saves(tmp_path, HEADS, sizes=(None, "5KB"))
    save_old()
    found, stop = [], threading.Event()

    def save_on():
        while not stop.is_set():
            save_new()
            save_old()

    thread = threading.Thread(target=save_on)
    thread.start()
    try:
        while not {OLD, NEW} <= set(found) or len(found) < 60:
            found.append(opens())  # which asserts that it is one of them
    finally:
        stop.set()
        thread.join()


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    make_model().save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    os.truncate(tmp_path / WEIGHTS, 3000)
    with pytest.raises(ValueError, match=f"{WEIGHTS} was cut short while it was read"):
        for tensor in opened.tensors.values():
            tensor[:]


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def add_twice(directory):
    first, second = (directory / name for name in shards(directory)[:2])
    shutil.copy(first, second)


def climb(directory):
    shutil.copytree(directory, directory / "inside")
    outside = "../" + shards(directory)[0]
    change_index(directory / "inside", lambda m: m.update({next(iter(m)): outside}))
    for path in (directory / "inside").iterdir():
        shutil.move(path, directory / path.name)


def absolute(directory):
    change_index(directory, lambda m: m.update({k: str(directory / v) for k, v in m.items()}))


BAD_INDEX = [
    (lambda d: (d / INDEX).unlink(), f"has shards, such as model-00001.*, but no {INDEX}"),
    (lambda d: (d / shards(d)[1]).unlink(), "has no model-00002-of-0000\\d.safetensors, which"),
    (add_twice, "c_attn.weight, .* is in another shard, too"),
    (climb, r"lists '\.\./model-0.*: expected the name of a .safetensors file beside it"),
    (absolute, "expected the name of a .safetensors file beside it"),
    (lambda d: change_index(d, lambda m: m.pop("transformer.ln_f.bias")), "disagree about trans"),
    (lambda d: change_index(d, lambda m: m.update(more=shards(d)[0])), "disagree about more"),
    (lambda d: change_index(d, lambda m: m.update(more=7)), "lists 7: expected the name"),
    (lambda d: change_index(d, lambda m: m.clear()), "has no weight_map"),
    (lambda d: (d / INDEX).write_text("[]"), "has no weight_map"),
    (lambda d: (d / INDEX).write_text("{"), "is no valid JSON"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), "a is there twice"),
    (lambda d: (d / shards(d)[0]).write_bytes(b""), "no whole safetensors file"),
]


@pytest.mark.parametrize("damage, says", BAD_INDEX)
def test_an_index_that_is_wrong(tmp_path, damage, says):
    make_model().save_pretrained(tmp_path, max_shard_size="5KB")
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# --- other formats --------------------------------------------------------------------------------

OTHERS = {
    "pytorch_model.bin": "is a pickle",
    "model.pt": "is a pickle",
    "model.pth": "is a pickle",
    "pytorch_model.bin.index.json": "lists pickles",
    "tf_model.h5": "is no safetensors file",
    "flax_model.msgpack": "is no safetensors file",
    "model-q4.gguf": "is no safetensors file",
}


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused(tmp_path, name, with_config):
    make_model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / name)
    if not with_config:
        (tmp_path / "config.json").unlink()
    for path in (tmp_path, tmp_path / name):
        says = f"{name} {OTHERS[name]}.* use save_pretrained to convert it"
        with pytest.raises(ValueError, match=says):
            GPT.from_pretrained(path)


def test_openais_checkpoint_is_refused_with_its_other_place(tmp_path):
    for name in ("checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.meta"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"TensorFlow checkpoint.* safetensors, named gpt2"):
        GPT.from_pretrained(tmp_path)


def test_a_head_of_its_own_that_the_config_denies(tmp_path):
    """As transformers does: where both are stored, their numbers say whether they are one."""
    model = make_model(tie_weights=False)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    loaded = GPT.from_pretrained(tmp_path).eval()
    assert not loaded.cfg.tie_weights and same_weights(loaded, model)
    np.testing.assert_allclose(torch_logits(theirs_of(tmp_path)), logits(model), atol=1e-4)
    assert not open_checkpoint(tmp_path).config["tie_word_embeddings"]


def test_a_tied_head_that_is_stored_twice(tmp_path):
    model = make_model(tie_weights=False)
    model.out_head.weight.data[...] = model.tok_emb.weight.data
    model.save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    loaded = GPT.from_pretrained(tmp_path).eval()
    assert loaded.out_head.weight is loaded.tok_emb.weight
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_sizes_that_no_file_backs_take_no_memory(tmp_path):
    """A config that lies is found out before anything of its size is made."""
    make_model().save_pretrained(tmp_path)
    for name in ("vocab_size", "n_positions", "n_layer", "n_embd"):
        original = (tmp_path / "config.json").read_text()
        change_config(tmp_path, **{name: 12 * 10**14})
        with pytest.raises(ValueError, match=r"expected \(|n_layer is"):
            open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text(original)


# --- models by name -------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def from_hub(program, **environment):
    """Runs a program where huggingface_hub is not imported yet, and has no cache but the given."""
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", "from tinygrad_llm.gpt import GPT\n" + program],
        env={**clean, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=60,
    )


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "name, repository",
    [("gpt2", "openai-community/gpt2"), ("some-one/a.model", "some-one/a.model")],
)
def test_a_model_in_the_cache_needs_no_network(tmp_path, name, repository):
    folder = tmp_path / "hub" / ("models--" + repository.replace("/", "--"))
    make_model().save_pretrained(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    program = f"GPT.from_pretrained({name!r}).save_pretrained({str(tmp_path / 'copy')!r})"
    done = from_hub(program, HF_HOME=tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    assert same_weights(GPT.from_pretrained(tmp_path / "copy"), make_model())


def test_what_is_not_in_the_cache(tmp_path):
    done = from_hub("GPT.from_pretrained('gpt2-xl')", HF_HOME=tmp_path, HF_HUB_OFFLINE=1)
    assert "FileNotFoundError" in last_line(done) and "check the network" in last_line(done)
    done = from_hub("GPT.from_pretrained('gpt2')", HF_HOME=tmp_path, HF_ENDPOINT="http://[::1]:9")
    assert "FileNotFoundError" in last_line(done) and "check the network" in last_line(done)


def test_names_without_huggingface_hub():
    program = "import sys; sys.modules['huggingface_hub'] = None; GPT.from_pretrained('gpt2')"
    assert "pip install huggingface_hub" in last_line(from_hub(program))


def test_what_is_no_name_is_a_path():
    for path in ("gpt3", "./a/b", "../a", "/a/b", "a/b/c", "~/a", "a/.."):
        assert find_model(path) == Path(path)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            GPT.from_pretrained(path)


def test_a_directory_counts_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("gpt2")
    assert same_weights(GPT.from_pretrained("gpt2"), make_model())


@pytest.fixture
def server(tmp_path):
    """A small Hugging Face: one model, some-one/model, with a pickle among its files."""
    files = tmp_path / "files"
    make_model().save_pretrained(files, BPETokenizer.train("a", 257), max_shard_size="5KB")
    (files / "pytorch_model.bin").write_bytes(b"never asked for")
    (files / "chat_template.jinja").write_text("{{ messages }}")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            names = sorted(path.name for path in files.iterdir())
            tree = [
                {"type": "file", "path": n, "size": (files / n).stat().st_size, "oid": f"{i:040}"}
                for i, n in enumerate(names)
            ]
            found = re.fullmatch(rf"/some-one/model/resolve/{COMMIT}/([\w.-]+)", self.path)
            if found and found[1] in names:
                self.answer(200, (files / found[1]).read_bytes(), names.index(found[1]))
            elif self.path.startswith("/api/models/some-one/model/tree/"):
                self.answer(200, json.dumps(tree).encode())
            elif self.path.startswith("/api/models/some-one/model"):
                siblings = [{"rfilename": name} for name in names]
                about = {"id": "some-one/model", "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps(about).encode())
            else:
                self.answer(404, b"{}", error="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def answer(self, status, body, etag=0, error=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{etag:040}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()


def test_a_model_is_downloaded_once(tmp_path, server):
    address, asked = server
    program = f"GPT.from_pretrained('some-one/model').save_pretrained({str(tmp_path / 'copy')!r})"
    for _ in range(2):
        done = from_hub(program, HF_HOME=tmp_path / "home", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        assert same_weights(GPT.from_pretrained(tmp_path / "copy"), make_model())
    fetched = [path.rpartition("/")[2] for path in asked if "/resolve/" in path]
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert len(set(weights)) == 4 and {"vocab.json", "chat_template.jinja"} <= set(fetched)
    assert not any(name.endswith(".bin") for name in fetched)
    done = from_hub("GPT.from_pretrained('some-one/other')", HF_HOME=tmp_path, HF_ENDPOINT=address)
    assert "no model some-one/other on Hugging Face: check the name" in last_line(done)
