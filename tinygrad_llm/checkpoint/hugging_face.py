"""A model as a directory that Hugging Face's transformers opens too, and back.

config.json and model.safetensors are in the layout of transformers' GPT-2, with the tokenizer's
files beside them. Each file is replaced as a whole: a temporary file, fsync, rename. Nothing is
ever pickled.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..data.files import atomic_write
from ..gpt import GPT, GPTConfig
from ..nn import no_init
from ..tokenizer import Tokenizer, load
from .tensors import read_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

OUR_KEY = "tinygrad_llm"  # in config.json: what transformers has no word for
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# Our names for modules, and GPT-2's. Its linear layers ("Conv1D") keep their weights as (in, out).
NAMES = {
    "tok_emb": "transformer.wte",
    "pos_emb": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "out_head": "lm_head",
}
BLOCK_NAMES = {
    "norm1": "ln_1",
    "att.qkv": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "norm2": "ln_2",
    "ff.up": "mlp.c_fc",
    "ff.down": "mlp.c_proj",
}
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")  # older checkpoints store the causal mask


# --- models ---------------------------------------------------------------------------------------


def save_model(model: GPT, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes config.json, model.safetensors and, if given, the tokenizer's files.

    `transformers.GPT2LMHeadModel.from_pretrained(directory)` opens it. The directory is made if
    needed; other files in it stay as they are. Raises OSError if it cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory)
    with atomic_write(directory / WEIGHTS) as file:
        file.write(safetensors.numpy.save(_to_hugging_face(model), {"format": "pt"}))
    config = _config_to_hugging_face(model.cfg, tokenizer)
    with atomic_write(directory / CONFIG) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def load_model(directory: str | Path) -> GPT:
    """Opens a GPT-2 that `save_model` or transformers' `save_pretrained` wrote, in float32.

    Raises FileNotFoundError if the directory, its config.json or its model.safetensors is missing,
    ValueError if it holds another kind of model, or tensors that are damaged or do not fit.
    """
    directory = Path(directory)
    _must_exist(directory)
    config = _read_config(directory / CONFIG)
    tensors, _ = read_tensors(_weights_file(directory))
    tensors = _with_full_names(tensors)
    try:
        with no_init():
            model = GPT(_config_from_hugging_face(config, tensors))
        model.load_state_dict(_from_hugging_face(model, tensors))
    except ValueError as error:
        raise ValueError(f"{directory}: {CONFIG} and {WEIGHTS} make no model: {error}") from None
    return model


def load_tokenizer(directory: str | Path, model: GPT) -> Tokenizer:
    """The tokenizer saved beside a model.

    Raises ValueError if its files are missing or damaged, or if it has ids that the model has not.
    """
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
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file: expected a checkpoint directory")
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(
            f"{directory} has no {CONFIG}: expected a checkpoint directory, as training makes it"
        )


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS
    pickles = [found.name for pattern in PICKLES for found in directory.glob(pattern)]
    if not path.exists() and pickles:
        raise ValueError(
            f"{directory} has no {WEIGHTS}, and {pickles[0]} is a pickle, which can run any code "
            "when opened: load it with transformers and use save_pretrained to convert it"
        )
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no {WEIGHTS}: the checkpoint is incomplete")
    return path


# --- config.json ----------------------------------------------------------------------------------


def _config_to_hugging_face(cfg: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    end_of_text = None if tokenizer is None else tokenizer.special_tokens.get("<|endoftext|>")
    return {
        "architectures": ["GPT2LMHeadModel"],
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
        "dtype": "float32",
        "torch_dtype": "float32",
        OUR_KEY: {"qkv_bias": cfg.qkv_bias},
    }


def _read_config(path: Path) -> dict[str, Any]:
    """config.json with GPT-2's defaults filled in, checked to be a model that our GPT can be."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UTF-8 or JSON
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is of model_type {kind!r}: expected 'gpt2'")
    for name in ("vocab_size", "n_embd", "n_head", "n_layer"):
        if type(config.get(name)) is not int:
            raise ValueError(f"{path} has {name} {config.get(name)!r}: expected an integer")
    if not isinstance(config.get(OUR_KEY, {}), dict):
        raise ValueError(f"{path} has {OUR_KEY} {config[OUR_KEY]!r}: expected an object")
    for name, expected in _expected_settings(config).items():
        if config.get(name, expected[0]) not in expected:
            raise ValueError(f"{path} has {name} {config[name]!r}: supported is {expected[0]!r}")
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


def _config_from_hugging_face(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> GPTConfig:
    """Raises ValueError for numbers that make no GPT."""
    had_bias = config.get(OUR_KEY, {}).get("qkv_bias", True)
    # Saved without these biases, they are zeros, unless another program has trained them since.
    biases = (tensor for name, tensor in tensors.items() if name.endswith("attn.c_attn.bias"))
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
        qkv_bias=had_bias or any(bias.any() for bias in biases),
        tie_weights=config.get("tie_word_embeddings", True),
    )


# --- names and tensors ----------------------------------------------------------------------------


def _hugging_face_name(name: str) -> str:
    """blocks.0.att.qkv.weight -> transformer.h.0.attn.c_attn.weight"""
    module, _, kind = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, number, module = module.split(".", 2)
    return f"transformer.h.{number}.{BLOCK_NAMES[module]}.{kind}"


def _oriented(name: str, array: np.ndarray) -> np.ndarray:
    """From our orientation to GPT-2's, or back: linear weights are transposed."""
    return array.T if TRANSPOSED.search(name) else array


def _to_hugging_face(model: GPT) -> dict[str, np.ndarray]:
    """GPT-2's tensors by name, contiguous, as safetensors needs them; a tied head comes once."""
    tensors = {}
    for name, array in model.state_dict().items():
        name = _hugging_face_name(name)
        tensors[name] = np.ascontiguousarray(_oriented(name, array))
    if not model.cfg.qkv_bias:  # GPT-2 always has these
        for i in range(model.cfg.n_layers):
            bias = np.zeros(3 * model.cfg.emb_dim, np.float32)
            tensors[f"transformer.h.{i}.attn.c_attn.bias"] = bias
    return tensors


def _with_full_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As GPT2LMHeadModel names them: GPT2Model leaves the prefix out, and masks are no weights."""
    full = {}
    for name, array in tensors.items():
        if not name.startswith(("transformer.", "lm_head.")):
            name = "transformer." + name
        if not MASKS.search(name):
            full[name] = array
    return full


def _from_hugging_face(model: GPT, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our state_dict. Names that the model does not have stay as they are, to be refused."""
    tensors = dict(tensors)
    if model.cfg.tie_weights:
        tensors.pop("lm_head.weight", None)
    if not model.cfg.qkv_bias:
        tensors = {n: t for n, t in tensors.items() if not n.endswith("attn.c_attn.bias")}
    ours = {_hugging_face_name(name): name for name in model.state_dict()}
    return {ours.get(name, name): _oriented(name, array) for name, array in tensors.items()}
