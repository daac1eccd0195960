"""GPT-2, whole: the sizes by name, the model, and how its weights start.

Letters in shapes: B sequences, T tokens in each, C channels (emb_dim), V token ids (vocab_size).
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import functional as F  # noqa: N812 (PyTorch's name for it)
from .device import CPU, of
from .nn import (
    Dropout,
    Embedding,
    KVCache,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Parameter,
    StaticCache,
    TransformerBlock,
    no_init,
    recompute,
    segment_positions,
)
from .nn.cache import overflow
from .nn.init import constant_, normal_
from .nn.layers import check_divides, check_probability, check_sizes
from .random import Generator
from .tensor import Tensor, raw

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

SIZES = {
    "gpt2": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}


@dataclass(frozen=True)
class GPTConfig:
    """The numbers that define a GPT; by default the smallest GPT-2, without biases on q, k, v.

    vocab_size      different token ids
    context_length  most tokens in a sequence
    emb_dim         channels that a token has between the blocks
    n_heads         heads of the attention; must divide emb_dim
    n_layers        transformer blocks
    drop_rate       probability of dropout, in training only; separately, if given:
    drop_rate_emb, drop_rate_attn, drop_rate_shortcut
                    of the embeddings, the attention's weights, what a block adds
    qkv_bias        whether q, k and v have biases; OpenAI's GPT-2 has them
    tie_weights     whether the output head is the table of token embeddings, as in GPT-2
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = True
    drop_rate_emb: float | None = None
    drop_rate_attn: float | None = None
    drop_rate_shortcut: float | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
        check_sizes("GPTConfig", **{name: getattr(self, name) for name in sizes})
        check_divides("GPTConfig", n_heads=self.n_heads, emb_dim=self.emb_dim)
        rates = "drop_rate", "drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut"
        given = {name: getattr(self, name) for name in rates if getattr(self, name) is not None}
        check_probability("GPTConfig", **{"drop_rate": self.drop_rate, **given})
        for name in ("qkv_bias", "tie_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"GPTConfig: {name} is True or False, not {getattr(self, name)!r}")

    @classmethod
    def from_name(cls, name: str, **overrides) -> "GPTConfig":
        """One of OpenAI's sizes, some values replaced by `overrides`.

        gpt2 (124M), gpt2-medium (355M), gpt2-large (774M), gpt2-xl (1.6B). Raises ValueError.
        """
        if name not in SIZES:
            raise ValueError(f"there is no size {name!r}; expected one of {', '.join(SIZES)}")
        return cls.from_dict({**SIZES[name], "qkv_bias": True, **overrides})

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """From a dictionary like the book's GPT_CONFIG_124M. Raises ValueError: unknown names."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"GPTConfig: unknown {unknown}; expected some of {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict:
        """Name -> value, as JSON can hold it; options that are not in use are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def dropout(self, where: str) -> float:
        """The probability for "emb", "attn" or "shortcut"."""
        rate = getattr(self, f"drop_rate_{where}")
        return self.drop_rate if rate is None else rate

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers each part trains, from the shapes alone: nothing is allocated. With
        tie_weights the output head is the table of tokens, and adds nothing.
        """
        V, C, layers = self.vocab_size, self.emb_dim, self.n_layers
        return {
            "token embeddings": V * C,
            "position embeddings": self.context_length * C,
            "attention: q, k, v": layers * (3 * C * C + (3 * C if self.qkv_bias else 0)),
            "attention: output": layers * (C * C + C),
            "feed-forward: up": layers * (4 * C * C + 4 * C),
            "feed-forward: down": layers * (4 * C * C + C),
            "norms": (2 * layers + 1) * 2 * C,
            "output head": 0 if self.tie_weights else V * C,
        }

    def num_parameters(self) -> int:
        """How many numbers the model trains."""
        return sum(self.parameter_counts().values())


class GPT(Module):
    """Token ids in, logits of the next token out.  ids (B, T) integers -> (B, T, V) float32

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).
    generator   draws the weights and the dropout masks; default: random.default_generator
    init        "gpt2": as init_weights says; "torch": each layer as PyTorch starts it, from the
                first to the last, which gives the numbers of the book that this follows

    With tie_weights, "torch" draws the table and no head. PyTorch code that makes both and then
    ties them draws both, so what it draws next comes from further on in the stream; and where it
    is the table that is replaced, tokens start uniform in ±1/√C, as a head does.

    Weights that are about to be loaded need not be drawn: `with nn.no_init(): model = GPT(cfg)`.
    `model.recompute = True` saves memory in training: each block runs through nn.recompute.
    """

    recompute = False

    def __init__(self, cfg: GPTConfig, generator: Generator | None = None, init: str = "gpt2"):
        if not isinstance(cfg, GPTConfig):
            raise TypeError(
                f"GPT takes a GPTConfig, not a {type(cfg).__name__}: GPTConfig.from_dict"
            )
        if init not in ("gpt2", "torch"):
            raise ValueError(f"GPT: init is 'gpt2' or 'torch', not {init!r}")
        self.cfg = cfg
        with no_init():  # drawn below, all at once
            self.tok_emb = Embedding(cfg.vocab_size, cfg.emb_dim)
            self.pos_emb = Embedding(cfg.context_length, cfg.emb_dim)
            self.drop_emb = Dropout(cfg.dropout("emb"), generator)
            self.blocks = ModuleList(
                TransformerBlock(
                    emb_dim=cfg.emb_dim,
                    n_heads=cfg.n_heads,
                    context_length=cfg.context_length,
                    dropout=cfg.dropout("shortcut"),
                    dropout_attn=cfg.dropout("attn"),
                    qkv_bias=cfg.qkv_bias,
                    generator=generator,
                )
                for _ in range(cfg.n_layers)
            )
            self.final_norm = LayerNorm(cfg.emb_dim)
            self.out_head = Linear(cfg.emb_dim, cfg.vocab_size, bias=False)
        if cfg.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        if init == "gpt2":
            self.init_weights(generator)
        else:
            self.reset_parameters(generator)

    def init_weights(self, generator: Generator | None = None) -> None:
        """GPT-2's start: matrices N(0, 0.02), biases 0, gains 1.

        Each block adds two terms to the residual stream. Independent terms add their variances, so
        the matrices that write into it are scaled by 1/√(2 n_layers): its size does not grow with
        depth.
        """
        writes_residual = ("att.out_proj.weight", "ff.down.weight")
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                constant_(parameter, 0.0)
            elif parameter.ndim == 1:  # the gain of a norm
                constant_(parameter, 1.0)
            elif name.endswith(writes_residual):
                normal_(parameter, 0.0, 0.02 / math.sqrt(2 * self.cfg.n_layers), generator)
            else:
                normal_(parameter, 0.0, 0.02, generator)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """PyTorch's start: matrices uniform in ±1/√in, tables N(0, 1), norms that only normalise; a
        head that is tied to its table stays so, and is not drawn.
        """
        for module in self.modules():
            if isinstance(module, LayerNorm):
                constant_(module.weight, 1.0)
                constant_(module.bias, 0.0)
        tied = self.cfg.tie_weights
        layers = [self.tok_emb, self.pos_emb]
        for block in self.blocks:
            layers += [block.att, block.ff.up, block.ff.down]
        for layer in layers if tied else [*layers, self.out_head]:
            layer.reset_parameters(generator)

    def forward(
        self,
        ids: Tensor | ArrayLike,
        segments: Tensor | ArrayLike | None = None,
        cache: KVCache | StaticCache | None = None,
    ) -> Tensor:
        """Logits of the token that follows each of the given ones.

        ids         (B, T) integers, a Tensor or an array -> (B, T, V)
        segments    (B, T) integers, for rows packed with several documents: a token sees its own
                    document only, and positions start again at 0 in each
        cache       of new_cache or new_static_cache: the ids follow the tokens in it, and are added
                    to it
        Raises ValueError for other shapes or more than context_length tokens, IndexError for ids
        that are not in the vocabulary, TypeError for ids that are no integers.
        """
        logits = self.out_head(self._hidden_states(ids, segments, cache))  # (B, T, V)
        if cache is not None:
            cache.commit()
        return logits

    def hidden_states(
        self,
        ids: Tensor | ArrayLike,
        segments: Tensor | ArrayLike | None = None,
        cache: KVCache | StaticCache | None = None,
    ) -> Tensor:
        """What the output head reads, (B, T, C); the arguments are those of forward."""
        x = self._hidden_states(ids, segments, cache)  # (B, T, C)
        if cache is not None:
            cache.commit()
        return x

    def _hidden_states(self, ids, segments, cache):
        """Those; what is added to the cache counts once the caller commits it."""
        where = of(self.tok_emb.weight.data)
        where.make_current()
        if cache is None:
            ids = self._checked(ids)  # (B, T)
            positions, mask = where.xp.arange(ids.shape[1]), None  # (T,)
        else:
            cache.truncate(cache.length)  # without what an interrupted call may have added
            ids = self._checked(ids, cache.length)
            positions, mask = cache.positions(ids.shape[1]), cache.mask(ids.shape[1])
        if segments is not None:
            if cache is not None:
                raise ValueError("GPT: segments and a cache exclude each other; leave one out")
            segments = self._checked_segments(segments, ids.shape)  # (B, T)
            positions = segment_positions(segments)  # (B, T)
            segments = where.put(segments)
        x = self.tok_emb(ids) + self.pos_emb(positions)  # (B, T, C) + (T, C)
        x = self.drop_emb(x)  # (B, T, C)
        layers = [None] * len(self.blocks) if cache is None else cache.layers
        for block, layer in zip(self.blocks, layers, strict=True):
            if self.recompute and cache is None:
                generator = self.drop_emb.generator
                x = recompute(block, x, mask, layer, segments, generator=generator)  # (B, T, C)
            else:
                x = block(x, mask, layer, segments)  # (B, T, C)
        return self.final_norm(x)  # (B, T, C)

    def new_cache(self, batch: int = 1, padding: ArrayLike | None = None) -> KVCache:
        """An empty cache for `batch` rows, for forward inside no_grad().

        padding     (B,) how many of each row's first tokens are none; default: no padding
        """
        return KVCache(*self._cache_sizes(batch), padding, self.device)

    def new_static_cache(self, batch: int = 1) -> StaticCache:
        """An empty cache for `batch` rows whose arrays stay where they are: for forward inside
        no_grad(), and for steps of one token a row that are recorded as a CUDA graph.
        """
        return StaticCache(*self._cache_sizes(batch), self.device)

    def _cache_sizes(self, batch):
        C, H = self.cfg.emb_dim, self.cfg.n_heads
        sizes = self.cfg.n_layers, batch, H, self.cfg.context_length, C // H
        return *sizes, self.tok_emb.weight.dtype

    def loss(
        self,
        ids: Tensor | ArrayLike,
        targets: Tensor | ArrayLike,
        segments: Tensor | ArrayLike | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the targets, a scalar in nats.

        ids, targets    (B, T) integers; targets[b, t] follows ids[b, t], and -100 is not counted
        segments        as in forward
        """
        x = self.hidden_states(ids, segments)  # (B, T, C)
        if type(self.out_head) is not Linear or self.out_head.bias is not None:
            return F.cross_entropy(self.out_head(x), targets)  # ()
        return F.linear_cross_entropy(x, self.out_head.weight, targets)  # ()

    def resize_token_embeddings(self, vocab_size: int, generator: Generator | None = None) -> None:
        """Rows for new tokens: tok_emb and out_head grow to `vocab_size`, the old rows stay.

        The logits of the old ids are unchanged. New rows start as N(0, 0.02), as GPT-2's did, with
        init="torch", too; they are new parameters, so make the optimizer afterwards. Raises
        ValueError for fewer rows than there are: a token would be lost.
        """
        old = self.cfg.vocab_size
        check_sizes("resize_token_embeddings", vocab_size=vocab_size)
        if vocab_size < old:
            raise ValueError(
                f"resize_token_embeddings: cannot shrink from {old} to {vocab_size} tokens; "
                "make a smaller model instead"
            )
        if vocab_size == old:
            return
        if type(self.out_head) is not Linear:
            raise ValueError("resize_token_embeddings: out_head has adapters; remove_lora first")
        tied = self.out_head.weight is self.tok_emb.weight  # no longer, if an adapter was merged
        for layer in (self.tok_emb, self.out_head):
            weight = layer.weight  # (old, C)
            where = of(weight.data)
            rows = Parameter(where.xp.zeros((vocab_size - old, weight.shape[1]), weight.dtype))
            normal_(rows, 0.0, 0.02, generator)
            grown = np.concatenate([weight.data, rows.data])  # (vocab_size, C)
            layer.weight = Parameter(grown, weight.requires_grad)
            if tied:
                self.out_head.weight = layer.weight
                break
        self.tok_emb.num_embeddings = self.out_head.out_features = vocab_size
        self.cfg = replace(self.cfg, vocab_size=vocab_size)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, dtype: DTypeLike = "float32") -> "GPT":
        """A GPT-2 with its weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl or owner/name, from
        Hugging Face, or a directory that `save_pretrained` wrote, ours or transformers'.

        dtype       of the parameters, whatever the files have
        Pickles are refused. Raises FileNotFoundError, ValueError and, for arguments that are no
        path or no floating dtype, TypeError; see checkpoint.load_model.
        """
        from .checkpoint import load_model  # which imports this module

        return load_model(name_or_dir, dtype)

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: "Tokenizer | None" = None,
        dtype: DTypeLike = "float32",
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes what `from_pretrained` opens, and transformers' GPT2LMHeadModel does; see
        checkpoint.save_model. max_shard_size: 10**9, "1GB".
        """
        from .checkpoint import save_model  # which imports this module

        save_model(self, directory, tokenizer, dtype, max_shard_size)

    def draws_masks(self) -> bool:
        """Whether dropout, in training, draws from a random stream: that of an adapter, too."""
        rates = [m.p for m in self.modules() if isinstance(m, Dropout)]
        return any(rates) or self.cfg.dropout("attn") > 0

    def num_parameters(self) -> int:
        """How many numbers are trained, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _checked(self, ids, start=0):
        """The ids as an array (B, T) that this model can take after `start` others."""
        ids = raw(ids)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(
                f"GPT: ids have shape {ids.shape}, expected (B, T) with B, T >= 1; "
                "one sequence of tokens is ids[None]"
            )
        if ids.dtype.kind not in "iu":
            raise TypeError(f"GPT: ids are integers, not {ids.dtype}; encode the text first")
        longest = self.cfg.context_length
        if start + ids.shape[1] > longest:
            raise ValueError(overflow(f"GPT: ids of shape {ids.shape}", start, longest))
        vocab_size = self.cfg.vocab_size
        if of(ids) is CPU and not (ids.min() >= 0 and ids.max() < vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise IndexError(
                f"GPT: id {wrong} is not in 0..{vocab_size - 1}; use the tokenizer that fits "
                f"vocab_size {vocab_size}"
            )
        return ids

    def _checked_segments(self, segments, shape):
        """The segments as an array of the ids' shape."""
        segments = raw(segments)
        segments = of(segments).numpy(segments)
        if segments.shape != shape or segments.dtype.kind not in "iu":
            raise ValueError(
                f"GPT: segments are {segments.dtype} of shape {segments.shape}; "
                f"expected integers of shape {shape}"
            )
        return segments
