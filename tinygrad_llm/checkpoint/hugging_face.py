"""A model as a directory that Hugging Face's transformers opens too, and back.

config.json and the weights are in the layout of transformers' GPT-2, with the tokenizer's files
beside them. Nothing is ever pickled. A classifier has another head than a language model; what it
does with it is told in finetune/classification.py.

A directory is replaced as a whole, though it is several files. All new ones are complete on the
disk before the first takes an old one's place. The old config.json goes first, if it or the
tokenizer changes, and the new one comes last: in between, there is no model that could be opened.
So who finds the same config.json before and after the weights has what belongs together.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..data.files import Removal, atomic_write, together
from ..gpt import GPT, GPTConfig
from ..nn import Module, lora_layers, no_init
from ..tokenizer import Tokenizer, load
from .hub import as_path, find_model
from .shards import (
    Tensors,
    other_file,
    other_format,
    read_weights,
    size_in_bytes,
    write_weights,
)
from .tensors import (
    WEIGHT_DTYPES,
    StoredTensor,
    few,
    line,
    pieces,
    read_json,
    read_tensor,
    shown,
    while_unreplaced,
)

CONFIG = "config.json"
KNOWN_DTYPES = ", ".join(map(str, WEIGHT_DTYPES.values()))

OUR_KEY = "tinygrad_llm"  # in config.json: what transformers has no word for

# Our names for modules, and GPT-2's. Its linear layers ("Conv1D") keep their weights as (in, out).
NAMES = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "out_head": "lm_head",
    "head": "score",  # of a classifier, whose GPT is its "body"
}
BLOCK_NAMES = {
    "norm1": "ln_1",
    "att.qkv": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "norm2": "ln_2",
    "ff.up": "mlp.c_fc",
    "ff.down": "mlp.c_proj",
}
TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"
SCORE = "score.weight"
LANGUAGE_MODEL, CLASSIFIER = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")  # older checkpoints store the causal mask


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A directory that holds a GPT-2, looked through without reading its numbers.

    config      config.json, with GPT-2's defaults where it says nothing
    cfg         the same as ours
    tensors     what it has of every weight, by transformers' names, in the model's order
    classes     of a classifier, the names of what it tells apart; None of a language model
    """

    directory: Path
    config: dict[str, Any]
    cfg: GPTConfig
    tensors: dict[str, StoredTensor]
    classes: tuple[str, ...] | None = None


def open_checkpoint(name_or_dir: str | Path) -> Checkpoint:
    """Looks through a directory that `save_model` or transformers' `save_pretrained` wrote, or a
    model of Hugging Face, which is downloaded unless it is in its cache.

    Whatever is wrong with the files is found here, before memory is taken. Raises FileNotFoundError
    if one is missing, ValueError if they hold another kind of model, or tensors that are damaged or
    do not fit.
    """
    directory = find_model(name_or_dir)
    _must_exist(directory)
    path = directory / CONFIG
    try:
        config, stored = while_unreplaced(
            path, lambda _: (_read_config(path), read_weights(directory))
        )
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        if complaint := other_format(directory):
            raise ValueError(complaint) from None
        raise FileNotFoundError(
            f"{directory} has no {CONFIG}: expected a checkpoint directory, as training makes it"
        ) from None
    stored = _with_full_names(directory, stored)
    try:
        cfg, classes = _config_from_hugging_face(config), _classes(config)
        tied = cfg.tie_weights and HEAD not in stored
        tensors = _fitting(replace(cfg, tie_weights=tied), classes, stored)
    except ValueError as error:
        text = f"{directory}: {CONFIG} and the weights make no model: {line(error)}"
        raise ValueError(text) from None
    if cfg.tie_weights and not tied and _same(tensors[HEAD], tensors[TABLE]):
        del tensors[HEAD]
    elif cfg.tie_weights and not tied:  # transformers, too, believes the numbers
        cfg, config = replace(cfg, tie_weights=False), {**config, "tie_word_embeddings": False}
    if not cfg.qkv_bias and _has_qkv_bias(tensors):
        cfg = replace(cfg, qkv_bias=True)
    return Checkpoint(directory, config, cfg, tensors, classes)


def load_model(
    name_or_dir: str | Path, dtype: DTypeLike = "float32", drop_rate: float | None = None
) -> GPT:
    """Opens a GPT-2, as `open_checkpoint` finds it, with parameters of this dtype.

    drop_rate   of all its dropout; None: as the model was trained with
    Numbers go from the file straight into the parameters. Raises as open_checkpoint, ValueError for
    a classifier, and TypeError for what is no floating dtype.
    """
    dtype = parameter_dtype(dtype)
    checkpoint = open_checkpoint(name_or_dir)
    if checkpoint.classes is not None:
        raise ValueError(
            f"{checkpoint.directory} holds a classifier, and no language model: open it with "
            "`tinygrad-llm classify`, or GPTClassifier.from_pretrained"
        )
    cfg = checkpoint.cfg
    if drop_rate is not None:
        own = {"drop_rate_emb": None, "drop_rate_attn": None, "drop_rate_shortcut": None}
        cfg = replace(cfg, drop_rate=drop_rate, **own)
    with no_init():
        model = GPT(cfg)
    read_parameters(model, checkpoint, dtype)
    return model


def parameter_dtype(dtype: DTypeLike) -> np.dtype:
    """Raises TypeError for what is no floating dtype; None is float32."""
    try:
        dtype = np.dtype("float32" if dtype is None else dtype)
        Module().to(dtype)
    except TypeError:
        raise TypeError(
            f"parameters cannot be {dtype}: expected a floating dtype such as {KNOWN_DTYPES}"
        ) from None
    return dtype


def read_parameters(model: Module, checkpoint: Checkpoint, dtype: np.dtype) -> None:
    """Fills the parameters of a GPT, or of a GPTClassifier, with the checkpoint's numbers."""
    for name, parameter in model.named_parameters():
        name = hugging_face_name(name)
        transposed = bool(TRANSPOSED.search(name))
        parameter.data = read_tensor(checkpoint.tensors[name], dtype, transposed)


def save_model(
    model: GPT,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: DTypeLike = "float32",
    max_shard_size: int | str | None = None,
) -> None:
    """Writes config.json, the weights and, if given, the tokenizer's files.

    `transformers.GPT2LMHeadModel.from_pretrained(directory)` opens it. The directory is made if
    needed; other files in it stay as they are. dtype is float32, float16, bfloat16 or float64.
    With a max_shard_size, such as 10**9 or "1GB", weights that are larger come in several files.
    Raises ValueError for arguments that are none of these and for numbers that a float16 cannot
    hold, OSError if the files cannot be written: what was there is there still. Where a process
    dies, there is the old, the new, or a directory without config.json, which does not open.
    """
    cfg = model.cfg
    if model.out_head.weight is not model.tok_emb.weight:  # an adapter has been merged into one
        cfg = replace(cfg, tie_weights=False)
    config = config_to_hugging_face(cfg, tokenizer)
    write_model(directory, to_hugging_face(model), config, tokenizer, dtype, max_shard_size)


def write_model(
    directory: str | Path,
    tensors: Tensors,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    dtype: DTypeLike,
    max_shard_size: int | str | None,
) -> None:
    """Replaces a directory as a whole; arguments and errors are save_model's."""
    dtype, limit = weights_dtype(dtype), size_in_bytes(max_shard_size)
    directory = as_path(directory)
    with folder_for_new(directory), together() as changes:
        write_weights(directory, tensors, dtype, limit)
        n = len(changes)
        if tokenizer is not None:
            tokenizer.save(directory)
        write_config(directory, config, dtype)
        if any(file.is_new() for file in changes[n:]):
            changes.insert(0, Removal(directory / CONFIG))


@contextmanager
def folder_for_new(directory: Path) -> Iterator[None]:
    """The folder exists inside. On an error, those that were made for it are deleted again."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: give a directory")
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not empty: someone else's files are there by now
                folder.rmdir()
        raise


def weights_dtype(dtype: DTypeLike) -> np.dtype:
    """One of the dtypes that weights are written in. Raises ValueError."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in WEIGHT_DTYPES.values():
        raise ValueError(f"weights cannot be written as {dtype}: expected one of {KNOWN_DTYPES}")
    return found


def write_config(directory: Path, config: dict[str, Any], dtype: np.dtype) -> None:
    """Replaces config.json, with the dtype that the weights beside it have."""
    config = {**config, "dtype": str(dtype), "torch_dtype": str(dtype)}
    with atomic_write(directory / CONFIG) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def load_tokenizer(name_or_dir: str | Path, model: GPT) -> Tokenizer:
    """The tokenizer saved beside a model.

    Raises ValueError if its files are missing or damaged, or if it has ids that the model has not.
    """
    directory = find_model(name_or_dir)
    tokenizer = load(directory)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model only "
            f"{model.cfg.vocab_size}: these files are of different models"
        )
    return tokenizer


def _must_exist(directory: Path) -> None:
    if not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist: expected a checkpoint directory")
    if directory.is_file() and (complaint := other_file(str(directory))):
        raise ValueError(complaint)
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file: expected a checkpoint directory")


# --- config.json ----------------------------------------------------------------------------------


def config_to_hugging_face(cfg: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json of a language model."""
    end_of_text = None if tokenizer is None else tokenizer.special_tokens.get("<|endoftext|>")
    return {
        "architectures": [LANGUAGE_MODEL],
        "model_type": "gpt2",
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context_length,
        "n_embd": cfg.emb_dim,
        "n_head": cfg.n_heads,
        "n_layer": cfg.n_layers,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": cfg.dropout("emb"),
        "attn_pdrop": cfg.dropout("attn"),
        "resid_pdrop": cfg.dropout("shortcut"),
        "tie_word_embeddings": cfg.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        OUR_KEY: {"qkv_bias": cfg.qkv_bias},
    }


def _read_config(path: Path) -> dict[str, Any]:
    """config.json with GPT-2's defaults filled in, checked to be a model that our GPT can be."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}: expected an object")
    if config.get("model_type") != "gpt2":
        kind = shown(config.get("model_type"))
        raise ValueError(f"{path} is of model_type {kind}: expected 'gpt2'")
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{path} has a quantization_config, and quantized weights are not read: get the model "
            f"with weights in one of {KNOWN_DTYPES}"
        )
    for name in ("vocab_size", "n_embd", "n_head", "n_layer"):
        if type(config.get(name)) is not int:
            found = shown(config.get(name))
            raise ValueError(f"{path} has {name} {found}: expected an integer")
    ours = config.get(OUR_KEY, {})
    if not isinstance(ours, dict):
        raise ValueError(f"{path} has {OUR_KEY} {shown(ours)}: expected an object")
    for name, expected in _expected_settings(config).items():
        if config.get(name, expected[0]) not in expected:
            found = shown(config[name])
            raise ValueError(f"{path} has {name} {found}: supported is {expected[0]!r}")
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    return {"n_positions": config.get("n_ctx", 1024), **rates, **config}


def _expected_settings(config: dict[str, Any]) -> dict[str, list]:
    """The settings of GPT2Config with which it is our model; the first of each is the default."""
    return {
        "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
        "layer_norm_epsilon": [1e-5],
        "n_inner": [None, 4 * config["n_embd"]],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False],
    }


def _config_from_hugging_face(config: dict[str, Any]) -> GPTConfig:
    """Raises ValueError for numbers that make no GPT."""
    drop_rate = config["resid_pdrop"]
    rates = {"drop_rate_emb": config["embd_pdrop"], "drop_rate_attn": config["attn_pdrop"]}
    return GPTConfig(
        vocab_size=config["vocab_size"],
        context_length=config["n_positions"],
        emb_dim=config["n_embd"],
        n_heads=config["n_head"],
        n_layers=config["n_layer"],
        drop_rate=drop_rate,
        **{name: rate for name, rate in rates.items() if rate != drop_rate},
        qkv_bias=config.get(OUR_KEY, {}).get("qkv_bias", True),
        tie_weights=config.get("tie_word_embeddings", True),
    )


def _classes(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of a classifier's classes; None for a language model. Raises ValueError."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or CLASSIFIER not in architectures:
        return None
    kind = config.get("problem_type")
    if kind not in (None, "single_label_classification"):
        raise ValueError(
            f"problem_type is {shown(kind)}: supported is 'single_label_classification'"
        )
    n = config.get("num_labels", 2)
    names = config.get("id2label")
    if names is None and type(n) is int and 2 <= n < 10**6:  # transformers leaves these out
        return tuple(f"LABEL_{i}" for i in range(n))
    numbers = map(str, range(len(names))) if isinstance(names, dict) else ()
    classes = tuple(names.get(number) for number in numbers)
    named = len(classes) > 1 and all(isinstance(name, str) for name in classes)
    if not named or len(set(classes)) < len(classes):
        raise ValueError(
            f"id2label is {shown(names)}: expected two classes or more, another name for each of "
            "0, 1 ..."
        )
    return classes


def _has_qkv_bias(tensors: dict[str, StoredTensor]) -> bool:
    """Saved of a model without these biases they are zeros, unless another program trained them."""
    return any(t[:].any() for name, t in tensors.items() if name.endswith("attn.c_attn.bias"))


# --- names and tensors ----------------------------------------------------------------------------


def hugging_face_name(name: str) -> str:
    """blocks.0.att.qkv.weight -> transformer.h.0.attn.c_attn.weight, also of a classifier's body"""
    module, _, kind = name.removeprefix("body.").rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, number, module = module.split(".", 2)
    return f"transformer.h.{number}.{BLOCK_NAMES[module]}.{kind}"


def to_hugging_face(model: GPT) -> Tensors:
    """GPT-2's tensors by name, as views; a tied head comes once."""
    if lora_layers(model):
        raise ValueError(
            "the model has LoRA adapters, which its own files cannot hold: save_adapter them, or "
            "merge_lora and remove_lora before the model is saved"
        )
    tensors = {}
    for name, array in model.state_dict().items():
        name = hugging_face_name(name)
        tensors[name] = array.T if TRANSPOSED.search(name) else array
    if not model.cfg.qkv_bias:  # GPT-2 always has these
        for i in range(model.cfg.n_layers):
            bias = np.zeros(3 * model.cfg.emb_dim, np.float32)
            tensors[f"transformer.h.{i}.attn.c_attn.bias"] = bias
    return tensors


def _shapes(
    cfg: GPTConfig, classes: tuple[str, ...] | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that transformers saves of such a model, and its shape."""
    C = cfg.emb_dim
    block = {
        "ln_1": (C,),
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }
    yield TABLE, (cfg.vocab_size, C)
    yield "transformer.wpe.weight", (cfg.context_length, C)
    for i in range(cfg.n_layers):
        for name, shape in block.items():
            yield f"transformer.h.{i}.{name}.weight", shape
            yield f"transformer.h.{i}.{name}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (C,)
    yield "transformer.ln_f.bias", (C,)
    if classes is not None:
        yield SCORE, (len(classes), C)
    elif not cfg.tie_weights:
        yield HEAD, (cfg.vocab_size, C)


def _with_full_names(directory: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """As models with a head name them: GPT2Model leaves the prefix out; masks are no weights."""
    full = {}
    for name, tensor in tensors.items():
        if not name.startswith(("transformer.", "lm_head.", "score.")):
            name = "transformer." + name
        if name in full:
            raise ValueError(f"{directory} has {few([name])} twice, with and without its prefix")
        if not MASKS.search(name):
            full[name] = tensor
    return full


def _fitting(
    cfg: GPTConfig, classes: tuple[str, ...] | None, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The model's tensors, in its order. Raises ValueError if they are not just these."""
    if cfg.n_layers > len(stored):  # and not a list of millions of missing names
        raise ValueError(f"n_layer is {cfg.n_layers}, with {len(stored)} tensors in all")
    shapes = dict(_shapes(cfg, classes))
    problems = []
    if missing := [name for name in shapes if name not in stored]:
        problems.append(f"missing {few(missing)}")
    if unexpected := [name for name in stored if name not in shapes]:
        problems.append(f"unexpected {few(stored[name].name for name in unexpected)}")
    for name in shapes:
        if name in stored:
            problems += _unfit(shapes[name], stored[name])
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError("; ".join(problems[:3]) + more)
    return {name: stored[name] for name in shapes}


def _unfit(shape, tensor):
    """What is wrong with a tensor: a list of one text, or of none."""
    if tensor.kind not in WEIGHT_DTYPES:
        kind = shown(tensor.kind)
        return [f"{few([tensor.name])} has dtype {kind}, expected one of {KNOWN_DTYPES}"]
    if tensor.shape != shape:
        return [f"{few([tensor.name])} has shape {shown(tensor.shape)}, expected {shape}"]
    return []


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of one shape are equal to the bit."""
    return a.kind == b.kind and all(
        np.array_equal(a[rows].view(np.uint8), b[rows].view(np.uint8)) for rows in pieces(a)
    )
