"""LoRA: fine-tuning by low-rank updates of frozen weights.

A layer's weight w (out, in) stays as it is and gets an update of rank r, far below both sizes:

    y = x wᵀ + b + s (x Aᵀ) Bᵀ,    A (r, in), B (out, r),    s = alpha / r

Only A and B are trained. B starts at zero, so that at first the model is what it was. Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from .. import precision
from ..device import of
from ..random import Generator, or_default
from ..tensor import Tensor, fused, is_grad_enabled, no_grad
from . import init
from .attention import MultiHeadAttention
from .init import no_init
from .layers import Dropout, Linear, check_numbers, check_probability, check_sizes
from .module import Module, Parameter

IN_BLOCKS = ("qkv", "out_proj", "up", "down")  # the layers of a TransformerBlock


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is like.

    rank        r above
    alpha       the update is scaled by alpha / rank
    dropout     the probability with which, in training, a number that goes into A is zeroed
    targets     which Linear layers: a str is a regular expression for the whole dotted name, ".*"
                being every layer; a list has several for how names end: ["up"] is blocks.0.ff.up
                and the like. Default: the layers of all transformer blocks, not the output head
    split_qkv   whether q, k and v, which are one layer here, get a rank of their own each, as if
                they were three
    rslora      scale by alpha / √rank instead: Kalajdzievski, "A Rank Stabilization Scaling Factor
                for Fine-Tuning with LoRA", 2023

    Raises ValueError for numbers and patterns that are none, TypeError for targets of another kind.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = IN_BLOCKS
    split_qkv: bool = False
    rslora: bool = False

    def __post_init__(self):
        check_sizes("LoRAConfig", rank=self.rank)
        check_numbers("LoRAConfig", alpha=self.alpha)
        check_probability("LoRAConfig", dropout=self.dropout)
        if not math.isfinite(self.alpha):
            raise ValueError(f"LoRAConfig: alpha is a finite number, not {self.alpha}")
        if not isinstance(self.targets, Collection):
            raise TypeError(f"LoRAConfig: targets is a str or a list of them, not {self.targets!r}")
        for pattern in self._patterns():
            try:
                re.compile(pattern)
            except (TypeError, re.error) as error:
                raise ValueError(
                    f"LoRAConfig: {pattern!r} in targets is no regular expression: {error}"
                ) from None

    def matching(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are targets. ValueError for a target that is none of them."""
        names = list(names)
        found = set()
        for pattern in self._patterns():
            whole = pattern if isinstance(self.targets, str) else rf"(.*\.)?({pattern})"
            these = {name for name in names if re.fullmatch(whole, name)}
            if not these:
                raise ValueError(
                    f"LoRA: no Linear layer matches {pattern!r}; there are {_kinds(names)}"
                )
            found |= these
        if not found:
            raise ValueError("LoRA: targets is empty; name a layer, or '.*' for all of them")
        return [name for name in names if name in found]

    def _patterns(self):
        return [self.targets] if isinstance(self.targets, str) else list(self.targets)


class Adapter(Module):
    """The update of one layer's weight: scale B A.

    lora_A      (r, in), uniform in ±1/√in at first, as PyTorch's kaiming_uniform_(a=√5) draws it
    lora_B      (out, r), zeros at first
    parts       None or, of a layer that is several in one, how many outputs each has: then A is
                (r · parts, in), and each part's rows of B are for its own r rows of A
    """

    def __init__(
        self,
        layer: Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        parts: Sequence[int] | None = None,
        generator: Generator | None = None,
        masks: Generator | None = None,
    ):
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.parts = None if parts is None else tuple(parts)
        zeros, dtype = of(layer.weight.data).xp.zeros, layer.weight.dtype
        n = layer.in_features
        self.lora_A = Parameter(zeros((rank * len(self.parts or (1,)), n), dtype))
        self.lora_B = Parameter(zeros((layer.out_features, rank), dtype))
        self.dropout = Dropout(dropout, masks)
        if self.parts is not None:
            mask = np.repeat(np.eye(len(self.parts), dtype=np.float32), self.parts, axis=0)
            self._mask = Tensor(mask[..., None])  # (out, parts, 1): which part an output is of
        # 1/√n, rounded as PyTorch rounds it: the same seed gives the same bits
        bound = math.sqrt(3) * math.sqrt(2 / (1 + math.sqrt(5) ** 2)) / math.sqrt(n)
        init.uniform_(self.lora_A, -bound, bound, generator)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def whole_b(self) -> Tensor:
        """B as one factor of the product: (out, r), or with parts (out, r · parts), zero where an
        output and a row of A are of different parts.
        """
        if self.parts is None:
            return self.lora_B
        self._mask = self._mask.to(self.lora_B.device).to(self.lora_B.dtype)  # once
        return (self.lora_B.unsqueeze(1) * self._mask).flatten(1)

    def delta(self, dtype) -> Tensor:
        """What it adds to the weight, (out, in)."""
        return (self.whole_b().to(dtype) @ self.lora_A.to(dtype)) * self.scale

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}"


class LoRALinear(Linear):
    """A Linear layer, the same Parameters, and adapters of which one or none is active.

    adapters    a Module with an attribute for each, by name
    active      the name of the one that is in use, or None
    merged      whether that one is in the weight, see merge_lora
    """

    def __init__(self, base: Linear):
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.training = base.training
        self.adapters, self.active = Module(), None
        self._before_merge = None  # what holds the weight as it was

    @property
    def merged(self) -> bool:
        return self._before_merge is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training and is_grad_enabled():
            raise RuntimeError(
                f"LoRA: adapter {self.active!r} is merged into the weights, where it cannot be "
                "trained: unmerge_lora(model) first, or use it in eval() or no_grad()"
            )
        if self.active is None or self.merged:
            return F.linear(x, self.weight, self.bias)
        adapter = getattr(self.adapters, self.active)
        scale, drop = adapter.scale, adapter.dropout

        def by_ops(x, weight, A, B, bias):
            h = F.linear(drop(x), A) * scale  # (..., r)
            return F.linear(x, weight, bias) + F.linear(h, B)  # (..., out)

        inputs = x, self.weight, adapter.lora_A, adapter.whole_b(), self.bias
        if self.training and drop.p:
            return by_ops(*inputs)
        return fused("lora", by_ops, *inputs, scale=scale)

    def merge(self) -> None:
        """Adds the active adapter's update to the weight. A weight that is tied to another layer's
        is left to that one: here is a Parameter of its own, then.
        """
        if self.active is None or self.merged:
            return
        before, merged = self.weight, self.weight_with(self.active)
        self._before_merge = SimpleNamespace(weight=before)  # out of sight: it is not saved
        self.weight = Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Puts the weight back, to the bit."""
        if self.merged:
            self.weight, self._before_merge = self._unmerged(), None

    def weight_with(self, name: str) -> Tensor:
        """The weight with the update of one adapter, if there is one of this name, and with no
        other, even if that is merged. The sum is taken in float32 or wider.
        """
        weight, adapter = self._unmerged(), vars(self.adapters).get(name)
        if adapter is None:
            return weight
        wide = np.dtype(np.float32) if precision.is_narrow(weight.data) else weight.dtype
        with no_grad():
            return (weight.to(wide) + adapter.delta(wide)).to(weight.dtype)

    def _unmerged(self):
        """The weight without an update, moved to where the layer may have moved since."""
        if not self.merged:
            return self.weight
        now, before = self.weight, self._before_merge.weight
        before.data = of(now.data).put(before.data).astype(now.dtype, copy=False)
        return before

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.active!r}, merged={self.merged}"


# --- whole models ---------------------------------------------------------------------------------


def apply_lora(
    model: Module, config: LoRAConfig, name: str = "default", generator: Generator | None = None
) -> tuple[int, int]:
    """Puts a new adapter into the model's Linear layers that are its targets, and makes it the
    active one. Everything else is frozen: make the optimizer afterwards, of what requires grad.

    generator   draws A, layer after layer, and the masks of the adapter's dropout if the model has
                no Dropout, whose stream that would be; default: random.default_generator
    Returns (how many numbers train, how many there are). Raises ValueError, before anything is
    changed, if a target matches nothing, the name is in use or none, or an adapter is merged.
    """
    layers = linear_layers(model)
    parts = _parts(model) if config.split_qkv else {}
    options = {"dropout": config.dropout, "rslora": config.rslora}
    chosen = {
        target: {
            "rank": config.rank,
            "alpha": config.alpha,
            "parts": parts.get(id(layers[target])),
            **options,
        }
        for target in config.matching(layers)
    }
    add_adapters(model, chosen, name, generator)
    return trainable(model)


def add_adapters(
    model: Module,
    chosen: dict[str, dict],
    name: str,
    generator: Generator | None = None,
    drawn: bool = True,
) -> dict[str, Adapter]:
    """Adapters of one name for some layers: {dotted name: arguments of Adapter}, which differ from
    layer to layer where a file says so; drawn=False is for those that a file fills. Returns them.
    The rest is as in apply_lora.
    """
    or_default(generator)  # raises TypeError
    _check_name(name)
    _check_unmerged(model)
    if name in adapter_names(model):
        raise ValueError(
            f"LoRA: there is an adapter {name!r} already; give another name, or remove_lora it"
        )
    # Masks come from the stream of the model's other dropout: what saves that one saves these.
    drops = [m for m in model.modules() if isinstance(m, Dropout)]
    masks = drops[0].generator if drops else generator
    layers = linear_layers(model)
    with nullcontext() if drawn else no_init():
        made = {
            target: Adapter(layers[target], **arguments, generator=generator, masks=masks)
            for target, arguments in chosen.items()
        }
    wrapped = {
        id(layers[target]): LoRALinear(layers[target])
        for target in made
        if not isinstance(layers[target], LoRALinear)
    }
    _replace(model, wrapped)
    for target, adapter in made.items():
        layer = wrapped.get(id(layers[target]), layers[target])
        setattr(layer.adapters, name, adapter.train(layer.training))
    model.requires_grad_(False)
    set_adapter(model, name)
    return made


def set_adapter(model: Module, name: str | None) -> None:
    """Makes the adapter of this name the active one, which trains, or with None the model what it
    was. Of the other parameters, those stay frozen that are. ValueError if there is no such
    adapter, or one is merged.
    """
    names = adapter_names(model)
    if name is not None and name not in names:
        known = ", ".join(map(repr, names)) or "none: apply_lora or load_adapter first"
        raise ValueError(f"LoRA: there is no adapter {name!r}; there is {known}")
    _check_unmerged(model)
    for layer in lora_layers(model).values():
        layer.active = name if name in vars(layer.adapters) else None
        for other, adapter in layer.adapters.named_children():
            adapter.requires_grad_(other == name)


def merge_lora(model: Module) -> None:
    """Adds the active adapter to the weights: the model is as fast as it was without. The old
    weights are kept until unmerge_lora or remove_lora; state_dict has the merged ones, so save
    before or after. ValueError if no adapter is active.
    """
    layers = lora_layers(model).values()
    if not any(layer.active for layer in layers):
        raise ValueError("LoRA: no adapter is active, there is nothing to merge: see set_adapter")
    for layer in layers:
        layer.merge()


def unmerge_lora(model: Module) -> None:
    """The weights are again what they were before merge_lora, to the bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model: Module, name: str | None = None) -> None:
    """Forgets one adapter, or all of them. What is merged stays in the weights for good. A layer
    without adapters is a plain Linear again. What is frozen stays so.
    """
    if name is not None and name not in adapter_names(model):
        raise ValueError(f"LoRA: there is no adapter {name!r} to remove")
    plain = {}
    for layer in lora_layers(model).values():
        for other in [n for n, _ in layer.adapters.named_children() if name in (n, None)]:
            delattr(layer.adapters, other)
            if other == layer.active:
                layer.active = layer._before_merge = None
        if not list(layer.adapters.children()):
            plain[id(layer)] = _plain(layer)
    _replace(model, plain)


def trainable(model: Module) -> tuple[int, int]:
    """(how many numbers train, how many there are); shared ones count once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def adapter_names(model: Module) -> list[str]:
    """The names of its adapters, in the order in which they came."""
    layers = lora_layers(model).values()
    return list(dict.fromkeys(n for layer in layers for n, _ in layer.adapters.named_children()))


def lora_layers(model: Module) -> dict[str, LoRALinear]:
    """Its layers with adapters, by dotted name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linear_layers(model: Module) -> dict[str, Linear]:
    """Its layers that can have adapters, by dotted name."""
    modules = model.named_modules()
    return {name: m for name, m in modules if name and type(m) in (Linear, LoRALinear)}


def _parts(model):
    """Of each layer that makes q, k and v, by identity: how many outputs are of each."""
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    return {id(m.qkv): [s.stop - s.start for s in m.parts()] for m in attentions}


def _replace(model, new):
    """Puts other modules where, by identity, those are that have a new one: under every name."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def _plain(layer):
    with no_init():
        linear = Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight, linear.bias, linear.training = layer.weight, layer.bias, layer.training
    return linear


def _check_name(name):
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or hasattr(Module, name):
        raise ValueError(
            f"LoRA: {name!r} is no name for an adapter: expected letters, digits and _, and no "
            "name of a Module's method"
        )


def _check_unmerged(model):
    merged = [layer.active for layer in lora_layers(model).values() if layer.merged]
    if merged:
        raise ValueError(f"LoRA: adapter {merged[0]!r} is merged: unmerge_lora(model) first")


def _kinds(names, most=12):
    """Names in one line, those that differ only in numbers once: blocks.*.ff.up"""
    kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names)) or ["none"]
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" * (len(kinds) > most))
