"""LoRA adapters as a directory that Hugging Face's PEFT opens too, and back.

adapter_config.json says what they are like, adapter_model.safetensors has A and B of each layer, by
transformers' names for GPT-2's layers. Nothing of the model itself is in it.

GPT-2 has one layer for q, k and v. Where they have adapters of their own here, PEFT gets one with
the same product: their A's one below the other, and each one's B in its own rows and columns. The
weights' header says which layers that are, so that we read three again.

A classifier is a module with a GPT without head as `body` and a Linear layer as `head`, such as
finetune.GPTClassifier. Its head is new and small, and belongs to the adapter: it is saved whole.
"""

import json
import math
import re
import sys
from collections import Counter
from itertools import accumulate, pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..data.files import Removal, atomic_write, together
from ..device import of
from ..gpt import GPT
from ..nn import Linear, LoRALinear, Module, adapter_names, lora_layers, trainable
from ..nn.lora import Adapter, add_adapters, linear_layers
from ..random import Generator
from ..tensor import no_grad
from .hub import as_path
from .hugging_face import OUR_KEY, SCORE, folder_for_new, hugging_face_name, weights_dtype
from .shards import other_file
from .tensors import (
    WEIGHT_DTYPES,
    StoredTensor,
    few,
    line,
    read_header,
    read_json,
    read_tensor,
    shown,
    while_unreplaced,
    write_tensors,
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the names of the model's layers
TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
# PEFT adds these of the model's own, if the head is a target or words were added.
OWN_TENSOR = re.compile(rf"{re.escape(PREFIX)}(lm_head|transformer\.wte)(\.base_layer)?\.weight")
HEADS = ("score", "classifier")  # what PEFT's modules_to_save calls a classifier's head
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the model
UNSUPPORTED = {  # PEFT's settings with which the numbers mean something else, and what they do
    "use_dora": "DoRA",
    "lora_bias": "biases in B",
    "trainable_token_indices": "rows of the embeddings",
    "target_parameters": "adapters of parameters",
    "layer_replication": "layers that come twice",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


# --- writing --------------------------------------------------------------------------------------


def save_adapter(
    model: Module, directory: str | Path, name: str = "default", dtype: DTypeLike = "float32"
) -> None:
    """Writes one adapter: `peft.PeftModel.from_pretrained(model, directory)` opens it, where model
    is transformers' GPT2LMHeadModel with the same weights, or GPT2ForSequenceClassification.

    The directory is made if needed; other files in it stay. dtype is float32, float16, bfloat16 or
    float64. A classifier's head is in the file as it is now; if it has an update of this adapter,
    with that in it. The layers of what is neither GPT nor classifier have their own names in the
    files. Raises ValueError if there is no such adapter, if there is what the files cannot hold
    (other weights that train, a head's bias), and as save_model does: what was there is there
    still.
    """
    dtype, directory = weights_dtype(dtype), as_path(directory)
    layers = {n: vars(layer.adapters).get(name) for n, layer in lora_layers(model).items()}
    adapters = {_their_name(model, n): adapter for n, adapter in layers.items() if adapter}
    if not adapters:
        known = few(map(repr, adapter_names(model))) or "none"
        raise ValueError(f"the model has no adapter {name!r} to save; there is {known}")
    _check_nothing_is_lost(model)
    tensors = {}
    if _is_classifier(model):
        tensors[PREFIX + SCORE] = _whole_head(model.head, name)
        adapters.pop("score", None)
        if not adapters:
            raise ValueError(
                f"adapter {name!r} is the head's alone, and a classifier's head is saved whole: "
                "give other layers adapters, too, or save the whole model after merge_lora and "
                "remove_lora"
            )
    config = _config_of(model, adapters)
    for layer, adapter in adapters.items():
        with no_grad():
            factors = {"A": adapter.lora_A.data, "B": adapter.whole_b().data}
        for factor, array in factors.items():
            tensors[f"{PREFIX}{layer}.lora_{factor}.weight"] = of(array).numpy(array)
    parts = {layer: adapter.parts for layer, adapter in adapters.items() if adapter.parts}
    ours = ({"parts": parts} if parts else {}) | _meaning(model)
    metadata = {"format": "pt"} | ({OUR_KEY: json.dumps(ours)} if ours else {})
    with folder_for_new(directory), together() as changes:
        with atomic_write(directory / ADAPTER_WEIGHTS) as file:
            write_tensors(file, tensors, dtype, metadata)
        with atomic_write(directory / ADAPTER_CONFIG) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        if changes[-1].is_new():  # then no one finds these weights with the old one
            changes.insert(0, Removal(directory / ADAPTER_CONFIG))


def _config_of(model, adapters):
    """adapter_config.json: rank and alpha that most layers have, and the others by name."""
    ranks, alphas = {}, {}
    for layer, adapter in adapters.items():
        n = len(adapter.parts or (1,))
        alpha = float(adapter.alpha * (math.sqrt(n) if adapter.rslora else n))
        alphas[layer] = int(alpha) if alpha.is_integer() else alpha
        ranks[layer] = int(n * adapter.rank)
    r, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    some = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {layer: n for layer, n in ranks.items() if n != r},
        "alpha_pattern": {layer: a for layer, a in alphas.items() if a != alpha},
        "lora_dropout": float(some.dropout.p),
        "use_rslora": some.rslora,
        "use_dora": False,
        "bias": "none",
        # of transformers' Conv1D; PEFT knows that its Linear layers are not
        "fan_in_fan_out": _gpt_of(model) is not None,
        "target_modules": sorted(adapters),
        "modules_to_save": ["score"] if _is_classifier(model) else None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _task(model):
    """PEFT's word for what the model does."""
    if _is_classifier(model):
        return "SEQ_CLS"
    head = model.out_head if isinstance(model, GPT) else None
    writes_text = head is not None and head.out_features == model.cfg.vocab_size
    return "CAUSAL_LM" if writes_text else None


def _their_name(model, layer):
    """blocks.0.att.qkv -> transformer.h.0.attn.c_attn, in a GPT or a classifier's body, and head ->
    score; of other layers as it is.
    """
    try:
        return layer if _gpt_of(model) is None else hugging_face_name(f"{layer}.")[:-1]
    except (KeyError, ValueError):  # a layer that someone has added
        return layer


def _is_classifier(model):
    body, head = getattr(model, "body", None), getattr(model, "head", None)
    return isinstance(body, GPT) and body.out_head is None and isinstance(head, Linear)


def _gpt_of(model):
    """The model, or a classifier's body; None of anything else."""
    if _is_classifier(model):
        return model.body
    return model if isinstance(model, GPT) else None


def _meaning(model):
    """What a classifier's logits are of, and where it reads: for the header."""
    if not _is_classifier(model):
        return {}
    classes, position = getattr(model, "classes", ()), getattr(model, "position", None)
    return {"classes": list(classes), "position": position}


def _whole_head(head, name):
    """A classifier's weight, as an array in NumPy's memory. ValueError if it has a bias."""
    _check_no_bias(head)
    weight = head.weight_with(name) if isinstance(head, LoRALinear) else head.weight
    return of(weight.data).numpy(weight.data)


def _check_no_bias(head):
    if head.bias is not None:
        raise ValueError(
            "the classifier's head has a bias, and an adapter's files have no place for one, as "
            "transformers' head has none: make the classifier with bias=False"
        )


def _check_nothing_is_lost(model):
    """That nothing trains but adapters and a classifier's head."""
    held = [m for m in model.modules() if isinstance(m, Adapter)]
    held += [model.head] if _is_classifier(model) else []
    ids = {id(parameter) for module in held for parameter in module.parameters()}
    more = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if more:
        raise ValueError(
            f"beside the adapters there trains {few(more, 3)}, which their files cannot hold: "
            "freeze it if it is as it was, or save the whole model after merge_lora and remove_lora"
        )


# --- reading --------------------------------------------------------------------------------------


def load_adapter(
    model: Module,
    directory: str | Path,
    name: str = "default",
    generator: Generator | None = None,
) -> tuple[int, int]:
    """Adds the adapter that save_adapter or PEFT wrote, under this name, and makes it the active
    one; everything else is frozen. Training may go on with it. A classifier gets the head in the
    files, too, in the place of its own, and that trains.

    generator   for the masks of its dropout, if the model has no other dropout
    Returns (how many numbers train, how many there are). Raises FileNotFoundError if a file is
    missing; ValueError if one is damaged, of another model, or with settings that are not
    supported, and as nn.apply_lora. Then nothing of the model is changed.
    """
    directory = as_path(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        error = ValueError if directory.exists() else FileNotFoundError
        raise error(f"{directory} {problem}: expected the directory of an adapter")
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no {ADAPTER_CONFIG}: expected an adapter, as save_adapter or PEFT "
            "writes it"
        )
    config, (stored, metadata) = while_unreplaced(
        path, lambda _: (_read_config(path, model), _read_weights(directory))
    )
    try:
        head = _stored_head(model, config, stored)
        pairs = _pairs(model, stored)
        parts = _our_part(metadata, model)
        chosen = {ours: _arguments(config, theirs, *ab) for ours, (theirs, *ab) in pairs.items()}
        factors = {}
        for ours, (theirs, a, b) in pairs.items():
            dtype = linear_layers(model)[ours].weight.dtype
            whole_b = read_tensor(b, dtype)
            if theirs in parts:
                chosen[ours], whole_b = _split(chosen[ours], whole_b, parts[theirs], theirs)
            factors[ours] = read_tensor(a, dtype), whole_b
        head = None if head is None else read_tensor(head, model.head.weight.dtype)
    except ValueError as error:
        raise ValueError(f"{directory}: {line(error)}") from None
    for ours, adapter in add_adapters(model, chosen, name, generator, drawn=False).items():
        for parameter, array in zip((adapter.lora_A, adapter.lora_B), factors[ours]):
            parameter.data = of(parameter.data).put(array)
    if head is not None:
        weight = model.head.weight.requires_grad_()
        weight.data = of(weight.data).put(head)
    return trainable(model)


def _read_config(path, model):
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}: expected an object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {shown(config.get('peft_type'))}: expected 'LORA'")
    for setting, what in UNSUPPORTED.items():
        if config.get(setting):
            found = shown(config[setting])
            raise ValueError(f"{path} has {setting} {found} ({what}), which is not supported")
    if (whole := config.get("modules_to_save")) and not (
        _is_classifier(model) and isinstance(whole, list) and all(name in HEADS for name in whole)
    ):
        raise ValueError(
            f"{path} has modules_to_save {shown(whole)} (whole layers beside the adapters): "
            "supported is a classifier's head, 'score', for a GPTClassifier"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{path} has bias {shown(config['bias'])}: supported is 'none', adapters alone"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASES):
        raise ValueError(
            f"{path} has init_lora_weights {shown(start)}, which has changed the model's own "
            "weights: convert it to a plain LoRA with PEFT's save_pretrained"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(setting) or {}, dict):
            found = shown(config[setting])
            raise ValueError(f"{path} has {setting} {found}: expected an object")
    return config


def _read_weights(directory):
    path = directory / ADAPTER_WEIGHTS
    if not path.exists():
        pickled = directory / "adapter_model.bin"
        if pickled.exists():
            raise ValueError(
                f"{directory} has no {ADAPTER_WEIGHTS}, and {other_file(str(pickled))}"
            )
        raise FileNotFoundError(f"{directory} has no {ADAPTER_WEIGHTS}: the adapter is incomplete")
    return read_header(path)


def _stored_head(model, config, stored):
    """A classifier's head, taken out of what is stored; None if there is none."""
    if not _is_classifier(model):
        return None
    key = PREFIX + SCORE
    head = stored.pop(key, None)
    if head is None:
        if config.get("modules_to_save"):
            raise ValueError(f"{key} is not there, the classifier's head: the file is incomplete")
        return None
    _check_no_bias(model.head)
    expected = model.head.weight.shape
    if head.kind not in WEIGHT_DTYPES or head.shape != expected:
        what = f"{shown(head.kind)} of shape {shown(head.shape)}"
        raise ValueError(
            f"{key} is {what}, and this classifier's head has {expected}: classes, channels"
        )
    if others := adapter_names(model):
        raise ValueError(
            f"the classifier's head would be replaced, which its adapter {others[0]!r} needs: "
            "remove_lora first, or load it into another classifier"
        )
    return head


def _pairs(model, stored):
    """Our name of each layer -> (theirs, A, B), where the shapes are those of the model."""
    layers, gpt = linear_layers(model), _gpt_of(model)
    ours_of = {_their_name(model, name): name for name in layers}
    found = {}
    for key, tensor in stored.items():
        if gpt is not None and (own := OWN_TENSOR.fullmatch(key)):
            _check_same(gpt.out_head if own[1] == "lm_head" else gpt.tok_emb, key, tensor)
            continue
        match = TENSOR.fullmatch(key)
        if not match:
            raise ValueError(f"unexpected {few([key])}: expected A and B of LoRA alone")
        name, factor = match.groups()
        if gpt is not None and name.startswith("h."):  # GPT2Model leaves the prefix out
            name = f"transformer.{name}"
        if tensor.kind not in WEIGHT_DTYPES or len(tensor.shape) != 2:
            what = f"{shown(tensor.kind)} of shape {shown(tensor.shape)}"
            raise ValueError(f"{few([key])} is {what}: expected a matrix of floats")
        if factor in found.setdefault(name, {}):
            raise ValueError(f"{few([key])} is there twice, with and without its prefix")
        found[name][factor] = tensor
    if not found:
        raise ValueError("there are no LoRA weights in it")
    if unknown := [name for name in found if name not in ours_of]:
        raise ValueError(
            f"this adapter is for another model: {few(unknown, 3)} is no layer of this one, "
            f"which has {few(ours_of, 3)}"
        )
    pairs = {}
    for name, factors in found.items():
        if len(factors) < 2:
            raise ValueError(f"{name} has A or B alone: the file is incomplete")
        layer, (a, b) = layers[ours_of[name]], (factors["A"], factors["B"])
        if (a.shape[1], b.shape[0]) != (layer.in_features, layer.out_features):
            raise ValueError(
                f"this adapter is for another model: {name} has {a.shape[1]} inputs and "
                f"{b.shape[0]} outputs in it, here {layer.in_features} and {layer.out_features}"
            )
        pairs[ours_of[name]] = name, a, b
    return pairs


def _check_same(layer, key, tensor):
    """That a tensor of the model itself, beside the adapter, is the one that the model has; a
    classifier has no lm_head.
    """
    weight = None if layer is None else layer.weight.data
    if weight is None or tensor.kind not in WEIGHT_DTYPES or tensor.shape != weight.shape:
        same = False
    else:
        same = np.array_equal(read_tensor(tensor, weight.dtype), of(weight).numpy(weight))
    if not same:
        raise ValueError(
            f"{few([key])} is not what this model has there: the adapter is for another model, or "
            "trained together with that layer, which is not supported"
        )


def _arguments(config: dict[str, Any], name: str, a: StoredTensor, b: StoredTensor):
    """Those of nn.lora.Adapter for one layer. ValueError if the numbers do not fit together."""
    r = _for_layer(config, "rank_pattern", name, config.get("r"))
    alpha = _for_layer(config, "alpha_pattern", name, config.get("lora_alpha"))
    if not a.shape[0] == b.shape[1] == r or r == 0:
        raise ValueError(
            f"{name} has an A of rank {a.shape[0]} and a B of rank {b.shape[1]}; "
            f"{ADAPTER_CONFIG} says {shown(r)}"
        )
    dropout = config.get("lora_dropout", 0.0)
    for setting, number in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        usable = isinstance(number, Real) and abs(number) <= sys.float_info.max
        if not usable or (setting == "lora_dropout" and not 0 <= number <= 1):
            raise ValueError(f"{ADAPTER_CONFIG} has {setting} {shown(number)}: expected a number")
    rslora = bool(config.get("use_rslora"))
    return {"rank": a.shape[0], "alpha": alpha, "dropout": dropout, "rslora": rslora}


def _for_layer(config, setting, name, default):
    """What a pattern says of this layer; patterns are regular expressions for how names end."""
    for pattern, value in (config.get(setting) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except re.error as error:
            raise ValueError(f"{setting} has {shown(pattern)}, no pattern: {error}") from None
    return default


def _our_part(metadata, model):
    """What save_adapter wrote for us alone, {layer: outputs of each part}. ValueError if the rest
    of it says that it is a classifier's whose logits mean something else.
    """
    try:
        ours = json.loads(metadata.get(OUR_KEY, "{}"))
        parts = {name: [int(n) for n in sizes] for name, sizes in ours.get("parts", {}).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"the header of {ADAPTER_WEIGHTS} is damaged: {OUR_KEY} in it") from None
    for what, here in _meaning(model).items():
        if ours.get(what, here) != here:
            raise ValueError(
                f"this adapter is for a classifier with {what} {shown(ours[what])}, not "
                f"{shown(here)}"
            )
    return parts


def _split(arguments, whole_b, parts, name):
    """The arguments of an adapter with parts, and its B (out, r), from the whole one's."""
    n = len(parts)
    rank, rest = divmod(arguments["rank"], max(n, 1))
    if sum(parts) != len(whole_b) or rest or min(parts) < 1:
        raise ValueError(f"{name} has parts {shown(parts)}, which do not fit its shape")
    b, outside = np.zeros((len(whole_b), rank), whole_b.dtype), whole_b.copy()
    for i, (start, end) in enumerate(pairwise(accumulate(parts, initial=0))):
        block = slice(start, end), slice(i * rank, (i + 1) * rank)
        b[block[0]] = whole_b[block]
        outside[block] = 0
    if outside.any():
        raise ValueError(f"{name} has numbers outside of its parts {shown(parts)}: it is damaged")
    alpha = arguments["alpha"] / (math.sqrt(n) if arguments["rslora"] else n)
    return {**arguments, "rank": rank, "alpha": alpha, "parts": parts}, b
