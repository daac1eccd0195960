"""Fine-tuning a model: what train.Training does, epoch after epoch, on labelled texts or entries.

Its states hold how the model is built, its head and its adapters, so that they alone make it again.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import random
from ..data import EpochBatches, Packed
from ..gpt import GPT, GPTConfig
from ..nn import Module, adapter_names, lora_layers, no_init, set_adapter
from ..nn.lora import add_adapters
from ..train import Training, TrainSettings, restore_model, settings_to_go_on
from .classification import ClassificationDataset, GPTClassifier, check_fit, evaluate
from .instruction import Instructions, mean_loss
from .metrics import Scores

Dataset = ClassificationDataset | Instructions | Packed


class FineTuning(Training):
    """Trains on `train`, in a new order in each epoch, and validates on all of `validation`.

    Raises ValueError if `train` is too small for one step.
    """

    def __init__(
        self,
        model: Module,
        body: GPT,
        train: Dataset,
        validation: Dataset,
        settings: TrainSettings,
        dtype: DTypeLike | None,
    ):
        rows = settings.batch_size * settings.accumulate
        batches = EpochBatches(train, rows, random.Generator(settings.seed))
        dropout = random.or_default(body.drop_emb.generator)
        super().__init__(model, batches, dropout, settings, dtype)
        self.validation, self.fingerprint = validation, _fingerprint(train, validation)

    @property
    def per_step(self) -> tuple[int, str]:
        rows = self.settings.batch_size * self.settings.accumulate
        return rows, "rows" if isinstance(self.validation, Packed) else "texts"

    def details(self, evaluated: bool) -> dict[str, float]:
        return {"epoch": self.step / self.batches.batches_per_epoch}

    def state_dict(self) -> dict[str, Any]:
        adapters = _adapters(self.model)
        return {**super().state_dict(), "adapters": adapters, "fingerprint": self.fingerprint}

    @classmethod
    def resume(
        cls,
        state: dict[str, Any],
        train: Dataset,
        validation: Dataset,
        steps: int | None = None,
        patience: int | None = None,
        device: str = "cpu",
    ) -> "FineTuning":
        """The trainer whose state_dict() this was, to be given the same data: as Trainer.resume,
        whose words on steps, patience, device and errors are true here, too.
        """
        settings = settings_to_go_on(state, steps, patience)
        with no_init():
            model = cls._built(state)
            for name, layers in state["adapters"]["layers"].items():
                add_adapters(model, layers, name, drawn=False)
            if state["adapters"]["layers"]:
                set_adapter(model, state["adapters"]["active"])
        restore_model(model, state)
        trainer = cls(model.to(device), train, validation, settings)
        if trainer.fingerprint != state["fingerprint"]:
            raise ValueError("this run was trained on other data: give it the same to go on")
        trainer.go_on(state, settings.patience)
        return trainer

    @staticmethod
    def _built(state: dict[str, Any]) -> Module:
        """A model like the one of the state, without its adapters and weights."""
        return GPT(GPTConfig.from_dict(state["config"]))


class ClassifierTrainer(FineTuning):
    """Trains what of the classifier is not frozen. `scores` are those of the last validation.

    Raises ValueError for data that do not fit the model, as `evaluate` does.
    """

    def __init__(
        self,
        model: GPTClassifier,
        train: ClassificationDataset,
        validation: ClassificationDataset,
        settings: TrainSettings,
        dtype: DTypeLike | None = None,
    ):
        for dataset in (train, validation):
            check_fit(model, dataset)
        super().__init__(model, model.body, train, validation, settings, dtype)
        self.scores: Scores | None = None

    def validation_loss(self) -> float:
        loss, self.scores = evaluate(self.model, self.validation, self.settings.batch_size)
        return loss

    def details(self, evaluated: bool) -> dict[str, float]:
        accuracy = {"val_accuracy": self.scores.accuracy} if evaluated else {}
        return {**super().details(evaluated), **accuracy}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "classifier": self.model.arguments}

    @staticmethod
    def _built(state: dict[str, Any]) -> GPTClassifier:
        return GPTClassifier(FineTuning._built(state), **state["classifier"])


class InstructionTrainer(FineTuning):
    """Trains what of a GPT is not frozen on instructions and responses."""

    def __init__(
        self,
        model: GPT,
        train: Instructions | Packed,
        validation: Instructions | Packed,
        settings: TrainSettings,
        dtype: DTypeLike | None = None,
    ):
        super().__init__(model, model, train, validation, settings, dtype)

    def validation_loss(self) -> float:
        return held_out_loss(self.model, self.validation, self.settings.batch_size)


def held_out_loss(model: GPT, dataset: Instructions | Packed, batch_size: int) -> float:
    """The loss per target that counts, in nats, over all of a data set; errors as mean_loss."""
    starts = range(0, len(dataset), batch_size)
    rows = (np.arange(start, min(start + batch_size, len(dataset))) for start in starts)
    return mean_loss(model, map(dataset.batch, rows))


def _fingerprint(*datasets: Dataset) -> str:
    """A SHA-256 of all that is learned from, but for padding, which may differ between devices."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for array in _content(dataset):
            digest.update(f"{array.shape}".encode() + array.astype("<i8").tobytes())
    return digest.hexdigest()


def _content(dataset: Dataset) -> list[np.ndarray]:
    if isinstance(dataset, Packed):
        return [dataset.inputs, dataset.targets, dataset.segments]
    if isinstance(dataset, Instructions):
        rest = dataset.max_length, dataset.response_only  # texts are cut as they are drawn
        return [*dataset.texts, dataset.prompt_lengths, np.array(rest)]
    return [*dataset.rows, dataset.labels]


def _adapters(model: Module) -> dict[str, Any]:
    """{"layers": {adapter: {layer: what add_adapters takes}}, "active": the one in use}"""
    found: dict[str, dict] = {name: {} for name in adapter_names(model)}
    active = None
    for layer_name, layer in lora_layers(model).items():
        active = layer.active or active
        for name, adapter in layer.adapters.named_children():
            found[name][layer_name] = {
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "dropout": adapter.dropout.p,
                "rslora": adapter.rslora,
                "parts": adapter.parts,
            }
    return {"layers": found, "active": active}
