"""A GPT that says of which class a text is: its body, with a small head in the large one's place.

The body makes a vector of each token, out of that token and those before it. So the last one has
seen all of the text: the head reads there. What stands behind it, padding, no earlier token sees;
texts of different lengths share a batch, and each gets the logits that it would get alone.

Letters in shapes: B texts, T tokens in each, C channels (emb_dim), n classes.
"""

import copy
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import functional as F  # noqa: N812 (PyTorch's name for it)
from ..checkpoint import open_checkpoint
from ..checkpoint.hugging_face import (
    CLASSIFIER,
    OUR_KEY,
    SCORE,
    config_to_hugging_face,
    parameter_dtype,
    read_parameters,
    to_hugging_face,
    write_model,
)
from ..checkpoint.tensors import shown
from ..data.windows import at_least_one
from ..device import of
from ..generate import evaluating
from ..gpt import GPT, GPTConfig
from ..nn import Dropout, Linear, Module, lora_layers, no_init
from ..random import Generator
from ..tensor import Tensor, raw
from ..tokenizer import END_OF_TEXT, Tokenizer
from .metrics import Scores
from .table import Table, check_classes

POSITIONS = ("last", "first", "mean", "last_padded")
LAYERS = ("head", "last_block", "last_two", "all")

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


# --- the model ------------------------------------------------------------------------------------


class GPTClassifier(Module):
    """Token ids in, one logit for each class out.  ids (B, T), lengths (B,) -> (B, n)

    gpt         its weights become the body's: they are shared, not copied. Its head is not used
    classes     two names or more; their places are the labels
    position    where the head reads: at the "last" token, at the "first" (which has seen no other),
                the "mean" over all; at "last_padded", the end of the row, padding or not: all rows
                then have max_length tokens. The first three do not depend on padding
    bias        whether the head has one; transformers' has none, see save_pretrained
    pad_id      the id that rows are padded with, by default the last one: GPT-2's "<|endoftext|>"
    max_length  tokens of a text that count, by default all that the body can take
    generator   draws the head's first weights, uniform in ±1/√C as Linear's are

    At first all layers train: see `train_only`. Raises ValueError for another position, classes
    that are none, a pad_id or max_length that the body cannot take.
    """

    def __init__(
        self,
        gpt: GPT,
        classes: Sequence[str],
        position: str = "last",
        bias: bool = True,
        pad_id: int | None = None,
        max_length: int | None = None,
        generator: Generator | None = None,
    ):
        self.classes = check_classes(classes)
        if position not in POSITIONS:
            raise ValueError(f"position is one of {', '.join(POSITIONS)}, not {position!r}")
        self.position = position
        self.pad_id = gpt.cfg.vocab_size - 1 if pad_id is None else pad_id
        if not isinstance(self.pad_id, Integral) or not 0 <= self.pad_id < gpt.cfg.vocab_size:
            raise ValueError(
                f"pad_id {pad_id!r} is not in 0..{gpt.cfg.vocab_size - 1}, the vocabulary"
            )
        longest = gpt.cfg.context_length
        self.max_length = at_least_one("max_length", longest if max_length is None else max_length)
        if self.max_length > longest:
            raise ValueError(f"max_length {max_length} is more than the context_length {longest}")
        self.body = copy.copy(gpt)
        self.body.out_head = None
        self.head = Linear(gpt.cfg.emb_dim, len(self.classes), bias, generator)

    @property
    def cfg(self) -> GPTConfig:
        """The body's sizes."""
        return self.body.cfg

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords that make another one like it of another GPT."""
        return {
            "classes": self.classes,
            "position": self.position,
            "bias": self.head.bias is not None,
            "pad_id": self.pad_id,
            "max_length": self.max_length,
        }

    @property
    def recompute(self) -> bool:
        """As of a GPT: whether each block runs through nn.recompute."""
        return self.body.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.body.recompute = value

    def forward(self, ids: Tensor | ArrayLike, lengths: Tensor | ArrayLike | None = None) -> Tensor:
        """Logits of the classes, (B, n).

        ids         (B, T) integers, each row a text and then padding
        lengths     (B,) integers, 1..T: the tokens of each text; None: all rows are full
        Raises ValueError for other shapes and lengths, and what GPT.forward raises.
        """
        x = self.body.hidden_states(ids)  # (B, T, C)
        return self.head(self._read(x, lengths))  # (B, n)

    def _read(self, x, lengths):
        """What the head sees of x (B, T, C): (B, C)."""
        if self.position == "first":
            return x[:, 0]
        if self.position == "last_padded":
            return x[:, -1]
        B, T, _ = x.shape
        lengths = np.full(B, T) if lengths is None else raw(lengths)
        where, on_host = of(x.data), of(lengths).name == "cpu"
        fit = lengths.shape == (B,) and lengths.dtype.kind in "iu"
        if not fit or (on_host and not ((lengths >= 1) & (lengths <= T)).all()):
            raise ValueError(
                f"lengths are {B} integers, each of 1..{T}, not {shown(lengths.tolist())}"
            )
        t, n = where.xp.arange(T), where.put(lengths)[:, None]
        weights = t == n - 1 if self.position == "last" else (t < n) / n  # (B, T)
        weights = Tensor(weights.astype(x.dtype)).reshape(B, 1, T)
        return (weights @ x).reshape(B, -1)  # (B, 1, T) (B, T, C)

    def loss(
        self,
        ids: Tensor | ArrayLike,
        labels: Tensor | ArrayLike,
        lengths: Tensor | ArrayLike | None = None,
    ) -> Tensor:
        """Mean cross-entropy of labels (B,), a scalar in nats; ids and lengths are forward's."""
        return F.cross_entropy(self(ids, lengths), labels)  # ()

    def train_only(self, layers: str) -> "GPTClassifier":
        """Freezes all but some layers; returns self.

        layers      "head"; "last_block": also the last block and the norm after it; "last_two": the
                    last two blocks; "all". The head is always among them. (apply_lora freezes all
                    but its adapters: there it is head.requires_grad_() afterwards.)
        """
        if layers not in LAYERS:
            raise ValueError(f"layers are one of {', '.join(LAYERS)}, not {layers!r}")
        self.requires_grad_(layers == "all")
        self.head.requires_grad_()
        if layers in ("last_block", "last_two"):
            blocks = list(self.body.blocks)
            for module in (*blocks[-1 if layers == "last_block" else -2 :], self.body.final_norm):
                module.requires_grad_()
        return self

    def draws_masks(self) -> bool:
        """Whether dropout, in training, draws from a random stream: that of an adapter, too."""
        rates = [module.p for module in self.modules() if isinstance(module, Dropout)]
        return any(rates) or self.body.draws_masks()

    def num_parameters(self) -> int:
        """How many numbers the body and the head have, trained or not."""
        return sum(parameter.numel() for parameter in self.parameters())

    # --- texts ---

    def probabilities(
        self, texts: Sequence[str], tokenizer: Tokenizer, batch_size: int = 32
    ) -> np.ndarray:
        """(N, n) float32: of each text, the probability of each class.

        Texts of about the same length share a batch; of longer ones than max_length, the rest does
        not count. Without dropout and gradients. Raises ValueError for a text without tokens.
        """
        places = [f"text {i}" for i in range(1, len(texts) + 1)]
        rows = encode_texts(texts, places, tokenizer)
        return F.softmax(Tensor(self._logits(rows, batch_size))).data

    def predict(
        self, texts: Sequence[str], tokenizer: Tokenizer, batch_size: int = 32
    ) -> list[str]:
        """The likeliest class of each text; the arguments are those of `probabilities`."""
        best = self.probabilities(texts, tokenizer, batch_size).argmax(axis=-1)
        return [self.classes[i] for i in best.tolist()]

    def _logits(self, rows, batch_size):
        """(N, n) float32 in NumPy's memory, of N rows of ids of any length, which are cut."""
        logits = np.empty((len(rows), len(self.classes)), np.float32)
        order = np.argsort([len(row) for row in rows], kind="stable")
        with evaluating(self):
            for start in range(0, len(rows), at_least_one("batch_size", batch_size)):
                chosen = order[start : start + batch_size]
                some = [rows[i][: self.max_length] for i in chosen]
                width = self.max_length if self.position == "last_padded" else None
                found = self(*padded(some, self.pad_id, width)).data
                logits[chosen] = of(found).numpy(found)
        return logits

    # --- files ---

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: Tokenizer | None = None,
        dtype: DTypeLike = "float32",
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes what `from_pretrained` opens, and GPT2ForSequenceClassification of transformers.

        The head there has no bias. Ours, W y + b, reads the output y of the final norm, which has a
        bias, too: with some d more in that, so that W d = b, no other b is needed. The file has it
        there, and gives the same logits up to rounding. transformers reads at the last token that
        is not the padding id. So its logits are ours for the position "last", unless a text ends
        with that id, and others for other positions, which only our `from_pretrained` knows.

        Arguments and errors are those of checkpoint.save_model. ValueError if there is no such d.
        """
        config = config_to_hugging_face(self.cfg, tokenizer)
        config |= {
            "architectures": [CLASSIFIER],
            "id2label": {str(i): name for i, name in enumerate(self.classes)},
            "label2id": {name: i for i, name in enumerate(self.classes)},
            "problem_type": "single_label_classification",
            "pad_token_id": self.pad_id,
            OUR_KEY: {
                **config[OUR_KEY],
                "position": self.position,
                "max_length": self.max_length,
            },
        }
        if lora_layers(self):
            raise ValueError(
                "the classifier has LoRA adapters, which its own files cannot hold: save_adapter "
                "them, or merge_lora and remove_lora before it is saved"
            )
        tensors = to_hugging_face(self.body)
        head = self.head.state_dict()
        tensors[SCORE] = head["weight"]
        if "bias" in head:
            norm = "transformer.ln_f.bias"
            tensors[norm] = tensors[norm] + _shift(head["weight"], head["bias"])
        write_model(directory, tensors, config, tokenizer, dtype, max_shard_size)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, dtype: DTypeLike = "float32"
    ) -> "GPTClassifier":
        """A classifier of `save_pretrained`, ours or transformers' (which reads at the last token);
        its head has no bias.

        Raises as GPT.from_pretrained does; ValueError for a language model.
        """
        dtype, checkpoint = parameter_dtype(dtype), open_checkpoint(name_or_dir)
        if checkpoint.classes is None:
            raise ValueError(
                f"{checkpoint.directory} holds a language model, and no classifier: fine-tune it "
                "first (`tinygrad-llm finetune classify`, or GPTClassifier in Python)"
            )
        ours = checkpoint.config.get(OUR_KEY, {})
        try:
            with no_init():
                model = cls(
                    GPT(checkpoint.cfg),
                    checkpoint.classes,
                    ours.get("position", "last"),
                    bias=False,
                    pad_id=checkpoint.config.get("pad_token_id"),
                    max_length=ours.get("max_length"),
                )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{checkpoint.directory}: config.json: {error}") from None
        read_parameters(model, checkpoint, dtype)
        return model


def _shift(weight, bias):
    """The shortest d with W d = b, in float32. weight (n, C), bias (n,) -> (C,)"""
    weight, bias = weight.astype(np.float64), bias.astype(np.float64)
    shift = np.linalg.lstsq(weight, bias)[0].astype(np.float32)
    if not np.allclose(weight @ shift, bias, rtol=1e-4, atol=1e-4):
        raise ValueError(
            "the head's bias cannot be written: its rows depend on each other; use bias=False"
        )
    return shift


# --- the data -------------------------------------------------------------------------------------


class ClassificationDataset:
    """Labelled texts as rows of ids, for DataLoader and EpochBatches.

    max_length      of all rows: longer texts are cut, shorter ones padded. For validation and test,
                    that of the training rows. None: that of the longest text
    context_length  no row is longer than this, such as a model's context
    pad_id          default: padding_id(tokenizer)
    trim            pad a batch only to its own longest text: less to compute, but shapes change
    Raises ValueError, which names file and line, for a text without tokens.
    """

    def __init__(
        self,
        table: Table,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        pad_id: int | None = None,
        context_length: int | None = None,
        trim: bool = False,
    ):
        rows = encode_texts(table.texts, table.places, tokenizer)
        longest = max(map(len, rows), default=1)
        self.max_length = at_least_one("max_length", longest if max_length is None else max_length)
        if context_length is not None:
            self.max_length = min(self.max_length, at_least_one("context_length", context_length))
        self.pad_id = padding_id(tokenizer) if pad_id is None else pad_id
        self.classes, self.labels, self.trim = table.classes, table.labels, trim
        self.rows = [row[: self.max_length] for row in rows]
        self.truncated = sum(len(row) > self.max_length for row in rows)  # texts that were cut

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: ArrayLike) -> Batch:
        """ids (B, T), labels (B,), lengths (B,) of these texts, all int64: what the loss takes."""
        indices = np.asarray(indices)
        rows = [self.rows[i] for i in indices.tolist()]
        ids, lengths = padded(rows, self.pad_id, None if self.trim else self.max_length)
        return ids, self.labels[indices], lengths


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that rows are padded with: that of "<|endoftext|>", or the last one."""
    return tokenizer.special_tokens.get(END_OF_TEXT, tokenizer.vocab_size - 1)


def encode_texts(
    texts: Sequence[str], places: Sequence[str], tokenizer: Tokenizer
) -> list[np.ndarray]:
    """The ids of each text, (T,) int64, nothing in it special.

    Raises ValueError for a text without any, with its place; TypeError for what is no text.
    """
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, not a text: put it in a list")
    rows = []
    for text, place in zip(texts, places, strict=True):
        try:
            row = tokenizer.encode_ordinary(text)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{place}: {error}") from None
        if len(row) == 0:
            raise ValueError(f"{place}: {shown(text)} has no tokens: leave it out")
        rows.append(np.asarray(row, np.int64))
    return rows


def padded(
    rows: Sequence[np.ndarray], pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """ids (B, length) and lengths (B,), int64, of B rows; by default as long as the longest."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.full((len(rows), lengths.max() if length is None else length), pad_id, np.int64)
    for line, row in zip(ids, rows):
        line[: len(row)] = row
    return ids, lengths


# --- how well it does -----------------------------------------------------------------------------


def evaluate(
    model: GPTClassifier, dataset: ClassificationDataset, batch_size: int = 32
) -> tuple[float, Scores]:
    """(mean loss of a text in nats, scores), without dropout and gradients.

    Raises ValueError for a data set with other classes than the model's and, if the model reads at
    the end of the row, with rows of another length than its max_length.
    """
    check_fit(model, dataset)
    logits = model._logits(dataset.rows, batch_size)
    loss = F.cross_entropy(Tensor(logits), dataset.labels).item()
    return loss, Scores.of(dataset.labels, logits.argmax(axis=-1), model.classes)


def check_fit(model: GPTClassifier, dataset: ClassificationDataset) -> None:
    """Raises ValueError as `evaluate` says."""
    if dataset.classes != model.classes:
        raise ValueError(
            f"the model tells {', '.join(model.classes)} apart, and the data has "
            f"{', '.join(dataset.classes)}: read the table with classes=model.classes"
        )
    if model.position == "last_padded" and (dataset.trim or dataset.max_length != model.max_length):
        raise ValueError(
            f"the position last_padded reads at the end of rows of {model.max_length} tokens, the "
            f"model's max_length; the data has rows of {dataset.max_length}: give both the same "
            "max_length, and no trim"
        )
