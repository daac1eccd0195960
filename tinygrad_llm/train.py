"""Training a GPT: the loop, the validation loss, and a state from which it goes on bit for bit.

`Trainer.training_step` is all of it in ten lines; the rest is measuring, checking and remembering.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import __version__, precision, random
from .data import RandomBatches, Windows
from .data.files import atomic_write
from .device import of
from .generate import evaluating
from .gpt import GPT, GPTConfig
from .nn import Module, no_init
from .optim import AdamW, decay_groups, warmup_cosine
from .parallel import Batch, Shards
from .step import make_step
from .threads import blas, default_threads

STATE_VERSION = 3  # of Trainer.state_dict


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises ValueError for a number out of range.

    steps           updates of the weights, in all
    batch_size      windows of text that are computed at a time
    accumulate      such batches in one step: their gradient is that of one large batch
    context         tokens in one window
    lr              learning rate at its highest
    min_lr          learning rate at the end of the cosine
    warmup_steps    steps in which the learning rate rises to its highest
    weight_decay    pull of the matrices and tables towards zero (AdamW); vectors feel none
    grad_clip       greatest length of the gradient, all parameters together
    eval_interval   steps from one validation loss to the next
    eval_batches    batches of validation text, at most, for one validation loss
    patience        validation losses in a row that may be no better than the best before training
                    stops, its weights kept beside the last ones; None: it never does
    recompute       compute activations again in backward instead of keeping them
    seed            of the order in which windows are drawn
    threads         that share out each step; the same number repeats a run bit for bit
    """

    steps: int
    batch_size: int
    context: int
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_interval: int = 100
    eval_batches: int = 10
    patience: int | None = None
    recompute: bool = False
    seed: int = 0
    threads: int = field(default_factory=default_threads)

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "context",
            "accumulate",
            "eval_interval",
            "eval_batches",
            "patience",
            "threads",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("min_lr", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be at most lr ({self.lr:g}), got {self.min_lr:g}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps must be 0 to steps ({self.steps}), got {self.warmup_steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update of the weights has learned from."""
        return self.batch_size * self.accumulate * self.context


@dataclass(frozen=True)
class Report:
    """What is known after a step; None where it was not computed.

    loss            of the step's batches before its update: mean per token, in nats
    val_loss        of the validation text, after the update
    learning_rate   that the step was taken with
    grad_norm       length of the gradient before it was clipped
    tokens          of the text that training has seen so far
    epoch           how often fine-tuning has been through its data so far
    val_accuracy    share of the validation texts whose class was found, where classes are learned
    seconds         that the step took
    memory          bytes of the device that this process has held at most so far
    best            whether val_loss is below all earlier ones that count
    """

    step: int
    loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    epoch: float | None = None
    val_accuracy: float | None = None
    seconds: float | None = None
    memory: int | None = None
    best: bool = False

    @property
    def perplexity(self) -> float | None:
        """e^val_loss: how many equally likely tokens would leave as much doubt; not of classes."""
        of_tokens = self.val_loss is not None and self.val_accuracy is None
        return perplexity(self.val_loss) if of_tokens else None


def perplexity(loss: float) -> float:
    """e^loss, infinite where a float ends."""
    return math.exp(loss) if loss < 709 else math.inf


class Training(ABC):
    """Trains `model` on `batches`; a subclass says what they are, and how the model is validated.

    model       has loss(*batch), cfg, recompute and draws_masks(), as a GPT has
    batches     endless: arrays for model.loss, with accumulate * batch_size rows. Its state_dict()
                and load_state_dict() repeat them
    dropout     what the model's masks are drawn from
    dtype       what the weights are cast to, such as "bfloat16"; AdamW keeps them in float32

    `step` counts the updates done. `losses` has the training loss of each, `evaluations` the pairs
    (step, validation loss), `grad_norm` the length of the last gradient before it was clipped.
    With patience, validation losses count from the step on at which it was first given, and
    `best_weights` is a copy of what trains when it was lowest; without, it is None.
    """

    def __init__(
        self,
        model: Module,
        batches: Iterator[Batch],
        dropout: random.Generator,
        settings: TrainSettings,
        dtype: DTypeLike | None = None,
    ):
        self.model, self.settings, self.batches = model, settings, batches
        self.dropout = dropout
        model.recompute = settings.recompute
        groups = decay_groups(model, settings.weight_decay)
        self.optimizer = AdamW(groups, lr=settings.lr, betas=(0.9, 0.99))
        if dtype is not None and precision.dtype(dtype).name not in precision.DTYPES:
            raise ValueError(f"models train in {', '.join(precision.DTYPES)}, not in {dtype!r}")
        if dtype is not None and precision.dtype(dtype) in precision.NARROW:
            self.optimizer.keep_masters()
            model.to(dtype)
        self.shards = Shards(settings.threads)
        self.update = make_step(
            model,
            self.optimizer,
            accumulate=settings.accumulate,
            max_norm=settings.grad_clip,
            generator=self.dropout,
            shards=self.shards,
        )
        self._ahead = self._before = None  # a batch, and the state before it was drawn
        self.step, self.grad_norm = 0, math.nan
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.counts_from = 0
        self.best_weights: dict[str, np.ndarray] | None = None

    def run(self) -> Iterator[Report]:
        """Trains until `finished` and yields a Report after each step, and before the first.

        Between two reports all is in order: the caller may save the state, or leave the loop. The
        model has its last weights, also when patience has ended the run: see `best_model`.
        Raises FloatingPointError for a loss or gradient that is nan or infinite, before the update.
        """
        if not self.evaluations:
            yield self._report(evaluate=True)
        while not self.finished:
            measured = {"learning_rate": self.learning_rate()}
            start = time.perf_counter()
            measured["loss"] = self.training_step()
            measured["seconds"] = time.perf_counter() - start
            last = self.step == self.settings.steps
            due = last or self.step % self.settings.eval_interval == 0
            measured |= {"grad_norm": self.grad_norm, "memory": self.update.memory()}
            yield self._report(due, **measured)

    def training_step(self) -> float:
        """One update of the weights; returns the loss before it."""
        batch, self._ahead = self._ahead or next(self.batches), None
        self.update.start(batch, self.learning_rate())
        if self.model.device != "cpu":  # which goes on meanwhile
            self._before, self._ahead = self.batches.state_dict(), next(self.batches)
        loss, self.grad_norm = self.update.finish()
        self._check_update(loss)
        self.step += 1
        self.losses.append(loss)
        return loss

    @property
    def best(self) -> tuple[int, float]:
        """Step and value of the lowest validation loss that counts, the first one of equals."""
        return min(self._counted(), key=lambda evaluation: evaluation[1])

    def best_model(self) -> Module:
        """With patience, a copy of the model as it was at its `best`, in NumPy's memory; what is
        frozen is not copied there. Without, the model itself.
        """
        if self.best_weights is None:
            return self.model
        return self.model.copy_with(self.model.state_dict() | _copied(self.best_weights))

    @property
    def out_of_patience(self) -> bool:
        """Whether `patience` validation losses in a row were no better than the best."""
        counted = self._counted()
        if self.settings.patience is None or not counted:
            return False
        return len(counted) - 1 - counted.index(self.best) >= self.settings.patience

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience has ended."""
        return self.step >= self.settings.steps or self.out_of_patience

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        s = self.settings
        return warmup_cosine(self.step + 1, s.steps, s.warmup_steps, s.lr, minimum=s.min_lr)

    def _counted(self) -> list[tuple[int, float]]:
        return [evaluation for evaluation in self.evaluations if evaluation[0] >= self.counts_from]

    def _report(self, evaluate: bool, **measured: float) -> Report:
        val_loss = self._validate() if evaluate else None
        best = evaluate and self.best[0] == self.step
        if best:
            self._keep_weights()
        measured |= self.details(evaluate)
        return Report(self.step, val_loss=val_loss, best=best, **measured)

    def _keep_weights(self) -> None:
        if self.settings.patience is not None:
            trained = ((n, p.data) for n, p in self.model.named_parameters() if p.requires_grad)
            self.best_weights = {name: np.array(of(a).numpy(a)) for name, a in trained}

    @abstractmethod
    def validation_loss(self) -> float:
        """Of the model as it is, without dropout."""

    @property
    @abstractmethod
    def per_step(self) -> tuple[int, str]:
        """What one step learns from, such as 2048, "tokens"."""

    @abstractmethod
    def details(self, evaluated: bool) -> dict[str, float]:
        """What else a Report says of this step, after a validation loss or without one."""

    def _validate(self) -> float:
        with np.errstate(all="ignore"):
            loss = self.validation_loss()
        self._check_finite(loss)
        self.evaluations.append((self.step, loss))
        return loss

    def _check_update(self, loss: float) -> None:
        """Raises FloatingPointError if the update has found no numbers, and so was none."""
        if self.update.loss_scale is None:
            self._check_finite(loss, self.grad_norm)
        else:  # float16 may leave a step out now and then
            self._check_finite(loss if self.update.scale >= 1 else math.nan)

    def _check_finite(self, *numbers: float) -> None:
        if not all(map(math.isfinite, numbers)):
            raise FloatingPointError(
                f"the loss or its gradient is nan or infinite after {self.step} steps: start again "
                f"in another directory with lr, the learning rate, below {self.settings.lr:g}; "
                "what was saved is kept"
            )

    # --- saving and going on ---

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, the model included: what save_training_state takes.

        The arrays are the model's and optimizer's own: save or copy them before the next step.
        """
        return {
            "version": STATE_VERSION,
            "versions": versions(),
            "config": self.model.cfg.to_dict(),
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "frozen": [n for n, p in self.model.named_parameters() if not p.requires_grad],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "batches": self._before if self._ahead else self.batches.state_dict(),
            **self.update.state_dict(),
            "dropout": self.dropout.get_state(),
            "losses": np.array(self.losses, np.float64),
            "evaluations": np.array(self.evaluations, np.float64).reshape(-1, 2),
            "counts_from": self.counts_from,
            "best_weights": self.best_weights,
        }

    def go_on(self, state: dict[str, Any], patience: int | None) -> None:
        """Takes over everything of a state but the model, which has its weights already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.update.load_state_dict({"loss_scale": None, **state})
        self.batches.load_state_dict(state["batches"])
        self.dropout.set_state(state["dropout"])
        self.step = state["step"]
        self.losses = state["losses"].tolist()
        self.evaluations = [(int(step), loss) for step, loss in state["evaluations"].tolist()]
        self.counts_from = state["counts_from"]
        if state["best_weights"] is not None:
            self.best_weights = _copied(state["best_weights"])
        elif patience is not None and self.evaluations:  # it is new
            self.counts_from = self.step
            if self.evaluations[-1][0] == self.step:
                self._keep_weights()


def settings_to_go_on(
    state: dict[str, Any], steps: int | None, patience: int | None
) -> TrainSettings:
    """Those of a state, with other steps and patience if given. ValueError for fewer steps than
    before, or a state of another version.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            "this training state is of another version of the library, and cannot go on with "
            "this one: its model can still be used; start a new run"
        )
    settings = TrainSettings(**state["settings"])
    steps = settings.steps if steps is None else steps
    patience = settings.patience if patience is None else patience
    if steps < settings.steps:
        raise ValueError(f"steps is {steps}, but it was {settings.steps}: it can only be raised")
    return replace(settings, steps=steps, patience=patience)


def restore_model(model: Module, state: dict[str, Any]) -> None:
    """Copies a state's weights, in their dtypes, into a model of the same build; what was frozen is
    frozen again. Raises ValueError if they do not fit.
    """
    weights = state["model"]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in weights:
            tensor.data = np.empty(tensor.shape, weights[name].dtype)
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in state["frozen"])


class Trainer(Training):
    """Trains a GPT on windows drawn from `train_tokens` (N,), validates on `val_tokens` (M,).

    Raises ValueError if the context is longer than the model's or a text shorter than one window,
    IndexError for token ids that the model does not have.
    """

    def __init__(
        self,
        model: GPT,
        train_tokens: ArrayLike,
        val_tokens: ArrayLike,
        settings: TrainSettings,
        dtype: DTypeLike | None = None,
    ):
        _check_fit(model, settings, train_tokens, val_tokens)
        rows, windows = settings.batch_size * settings.accumulate, random.Generator(settings.seed)
        batches = RandomBatches(train_tokens, rows, settings.context, windows)
        dropout = random.or_default(model.drop_emb.generator)
        super().__init__(model, batches, dropout, settings, dtype)
        self.val_tokens = val_tokens
        self.fingerprint = _fingerprint(train_tokens, val_tokens)

    def validation_loss(self) -> float:
        s = self.settings
        sizes = s.context, s.batch_size, s.eval_batches
        return evaluate(self.model, self.val_tokens, *sizes, self.shards)

    @property
    def per_step(self) -> tuple[int, str]:
        return self.settings.tokens_per_step, "tokens"

    def details(self, evaluated: bool) -> dict[str, float]:
        return {"tokens": self.step * self.settings.tokens_per_step}

    def state_dict(self) -> dict[str, Any]:
        of_text = {"n_tokens": len(self.batches.tokens), "fingerprint": self.fingerprint}
        return {**super().state_dict(), **of_text}

    @classmethod
    def resume(
        cls,
        state: dict[str, Any],
        train_tokens: ArrayLike,
        val_tokens: ArrayLike,
        steps: int | None = None,
        patience: int | None = None,
        device: str = "cpu",
    ) -> "Trainer":
        """The trainer whose state_dict() this was, to be given the same tokens.

        With more `steps` it goes on for longer, on the learning rates of the longer schedule, and
        with another `patience` it stops at another time; otherwise every number is what it would
        have been without the interruption. A patience that it did not have before counts from here
        on: the weights of earlier validation losses are gone. It may go on on another device, whose
        sums have other last digits.
        Raises ValueError for fewer steps than before, other tokens, or a state that does not fit.
        """
        settings = settings_to_go_on(state, steps, patience)
        if len(train_tokens) != state["n_tokens"]:
            raise ValueError(
                f"this run was trained on {state['n_tokens']} tokens, not on {len(train_tokens)}: "
                "give it the same ones to go on"
            )
        with no_init():
            model = GPT(GPTConfig.from_dict(state["config"]))
        restore_model(model, state)
        trainer = cls(model.to(device), train_tokens, val_tokens, settings)
        if trainer.fingerprint != state["fingerprint"]:
            raise ValueError(
                "this run was trained on other tokens, as many as these: give it the same ones"
            )
        windows = {"generator": state["windows"]} if "windows" in state else state["batches"]
        trainer.go_on({**state, "batches": windows}, settings.patience)
        return trainer


def evaluate(
    model: GPT,
    tokens: ArrayLike,
    context: int,
    batch_size: int,
    max_batches: int | None = None,
    shards: Shards | None = None,
) -> float:
    """Mean loss per token, in nats, over windows of `tokens` (N,) that do not overlap.

    With max_batches, over that many batches of windows spread evenly: the same ones every time.
    Without dropout and gradients; the model's mode is as before afterwards.
    Raises ValueError for a text shorter than one window.
    """
    windows = Windows(tokens, context, stride=context)
    count = len(windows) if max_batches is None else min(len(windows), max_batches * batch_size)
    chosen = np.arange(count) * len(windows) // count
    shards, total = shards or Shards(default_threads()), 0.0
    with evaluating(model):
        for start in range(0, count, batch_size):
            ids, targets = windows.batch(chosen[start : start + batch_size])  # each (B, T)
            total += shards.loss(model, ids, targets) * len(ids)
    return total / count


def plot_training(path: str | Path, reports: Sequence[Report], of: str = "token") -> None:
    """Draws losses and learning rate against the step into a PNG file.

    of      what the losses are the mean of: "token", which has a perplexity, too, or "text"
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import LogLocator

    steps = [r for r in reports if r.loss is not None]
    evaluations = [r for r in reports if r.val_loss is not None]
    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    x, losses = [r.step for r in steps], [r.loss for r in steps]
    above.plot(x, losses, color="0.75", linewidth=1, label="training")
    x, losses = [r.step for r in evaluations], [r.val_loss for r in evaluations]
    above.plot(x, losses, marker="o", markersize=3, label="validation")
    above.set(ylabel=f"loss per {of} (nats)")
    above.legend()
    if of == "token":
        right = above.secondary_yaxis("right", functions=(_perplexities, _losses))
        right.set(ylabel="perplexity")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:,g}")
    below.plot([r.step for r in steps], [r.learning_rate for r in steps])
    below.set(xlabel="step", ylabel="learning rate")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _perplexities(losses):
    return np.exp(np.minimum(losses, 700.0))


def _losses(perplexities):
    return np.log(np.maximum(perplexities, 1e-300))


def versions() -> dict[str, str]:
    """Of what may change a result in its last bits."""
    return {"tinygrad_llm": __version__, "numpy": np.__version__, "BLAS": blas()}


def _copied(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in weights.items()}


def _fingerprint(*texts: ArrayLike) -> str:
    """A SHA-256 of the tokens; of long texts, of 64 pieces spread over them."""
    digest = hashlib.sha256()
    for tokens in map(np.asarray, texts):
        starts = np.unique(np.linspace(0, max(0, len(tokens) - 2**16), 64).astype(int))
        for start in starts.tolist():
            digest.update(tokens[start : start + 2**16].astype("<u4").tobytes())
    return digest.hexdigest()


def _check_fit(model: GPT, settings: TrainSettings, *texts: ArrayLike) -> None:
    if settings.context > model.cfg.context_length:
        raise ValueError(
            f"context {settings.context} is longer than the model's context_length "
            f"{model.cfg.context_length}: use a shorter one"
        )
    for tokens in texts:
        Windows(tokens, settings.context, stride=settings.context)  # raises if there is none
        smallest, largest = int(np.min(tokens)), int(np.max(tokens))
        if smallest < 0 or largest >= model.cfg.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise IndexError(
                f"token id {wrong} is not in the model's vocabulary of {model.cfg.vocab_size}: "
                "encode the text with the tokenizer that belongs to the model"
            )
