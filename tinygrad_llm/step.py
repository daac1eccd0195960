"""One update of the weights: forward, backward, clipping, AdamW. On the CPU one after the other; on
a GPU recorded once, as a CUDA graph, and launched as a whole from then on.

What changes from step to step lies in arrays on the device, which are filled before a launch: token
ids, the learning rate, the seed of dropout. What the host wants to know, the loss and the length of
the gradient, is copied back while it does something else.
"""

import math

import numpy as np

from . import backend, random, threads
from .device import device
from .nn import Module
from .optim import AdamW, LossScale, clip_grad_norm_, kernels_for
from .parallel import Batch, Shards, counts
from .precision import is_narrow
from .tensor import Tensor, leaf_gradients


def make_step(model: Module, optimizer: AdamW, **settings) -> "HostStep | DeviceStep":
    """The step for where the model is: on a GPU whose kernels are switched off, as on the CPU.
    settings: what HostStep takes.
    """
    kind = HostStep if kernels_for(list(model.parameters())) is None else DeviceStep
    return kind(model, optimizer, **settings)


class _Step:
    """What both kinds have.

    accumulate      pieces of the batch that take turns, and whose gradients are added up
    max_norm        greatest length of the gradient
    loss_scale      for weights of float16, else None
    generator       draws the dropout masks
    shards          the CPU's threads
    graph           whether a GPU's step may be recorded

    After a step, `scale` is what its loss was multiplied by, if there is a loss_scale.
    """

    why_no_graph = None  # why a GPU's steps are launched kernel by kernel, if they are

    def __init__(
        self,
        model: Module,
        optimizer: AdamW,
        *,
        accumulate: int,
        max_norm: float,
        generator: random.Generator,
        shards: Shards,
        graph: bool = True,
    ):
        self.model, self.optimizer = model, optimizer
        self.accumulate, self.max_norm = accumulate, max_norm
        self.generator, self.shards = generator, shards
        self.wants_graph, self.where = graph, device(model.device)
        float16 = any(p.dtype == np.float16 for p in model.parameters())
        self.loss_scale = LossScale() if float16 else None

    def memory(self) -> int | None:
        """Bytes of the device that this process has held at most so far; None if nobody knows."""
        return self.where.held()

    def state_dict(self) -> dict:
        """What a restart needs beside the model and the optimizer."""
        return {"loss_scale": self.loss_scale and self.loss_scale.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continues where state_dict() was called."""
        if self.loss_scale is not None and state["loss_scale"] is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])


class HostStep(_Step):
    """On the CPU, with several threads; or on a GPU whose kernels are switched off."""

    def start(self, batch: Batch, lr: float) -> None:
        """Does it all, unless the loss or the gradient is not finite: then no weight is changed.

        batch   arrays of integers with accumulate * B rows, for model.loss: (ids, targets, ...)
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        with np.errstate(all="ignore"), threads.team(self.shards.threads):
            loss = self.shards.backward(self.model, *batch, pieces=self.accumulate, scale=scale)
            norm = clip_grad_norm_(parameters, self.max_norm)
            finite = math.isfinite(norm) and math.isfinite(loss)
            if self.loss_scale.update(finite) if self.loss_scale else finite:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step()
        self._found, self.scale = (loss, norm), scale

    def finish(self) -> tuple[float, float]:
        """(the loss before the update, the length of the gradient before it was clipped)."""
        return self._found


class DeviceStep(_Step):
    """On a GPU. If no graph can be made, `why_no_graph` says why, and kernels are launched singly.

    A recorded step knows arrays by their addresses. It is recorded anew where the batch has another
    shape, a parameter has other memory or is frozen, a module goes from training to evaluation, the
    optimizer has another state or other options than the learning rate, or kernels are switched on
    or off.
    """

    def __init__(self, model, optimizer, **settings):
        super().__init__(model, optimizer, **settings)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._drops = model.draws_masks()
        self._graphs = backend.kernel_module(self.where, "graph")
        self._graph = self._recorded = self.why_no_graph = None
        self._scale = None  # that of the loss, on the device
        self.where.make_current()
        if self.loss_scale is not None:
            kernels = backend.kernel_module(self.where, "optim")
            interval = self.loss_scale.interval
            self._scale = kernels.LossScale(self._parameters[0].data, interval=interval)
            self._set_scale(self.loss_scale.state_dict())

    def start(self, batch: Batch, lr: float) -> None:
        """Launches the step, and does not wait for it. As in HostStep, no weight is changed if the
        loss or the gradient is not finite.
        """
        counted = counts(batch).reshape(self.accumulate, -1).sum(axis=1)
        pieces = [np.array(a.reshape(self.accumulate, -1, *a.shape[1:]), np.int64) for a in batch]
        inputs = {
            **{f"batch[{i}]": piece for i, piece in enumerate(pieces)},
            "weights": (counted / max(counted.sum(), 1)).astype(np.float32),
            "lr": float(lr),
            "word": int(self.generator.integers(0, 2**62, ())) if self._drops else 0,
        }
        if self.model.device != self.where.name:
            raise ValueError(
                f"the model has moved from {self.where.name} to {self.model.device}: make a new "
                "Trainer, which moves its optimizer's arrays, too (Trainer.resume)"
            )
        # A piece in which nothing counts weighs nothing; but its mean has to be a number.
        targets = pieces[1].reshape(self.accumulate, -1)
        targets[counted == 0, 0] = 0
        self.where.make_current()
        if self._recorded != (found := self._traits([a.shape for a in batch])):
            self._record(inputs)
            self._recorded = found
        self._staging.fill(**inputs)
        if self._graph is None:
            results = self._compute()
        else:
            self._graph.replay()
            results = self._graph.result
        self._readback.start(results)

    def finish(self) -> tuple[float, float]:
        """As in HostStep; waits until the step is done."""
        loss, norm, self.scale = self._readback.wait().tolist()
        return loss, norm

    def _traits(self, shapes):
        """What a recorded step depends on, as something to compare."""
        model = self.model
        arrays = [(id(p.data), p.requires_grad) for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        reading = backend.current.reading
        return shapes, self.optimizer.device_kernel(), arrays, modes, model.recompute, reading

    def _record(self, inputs):
        """Makes the graph for inputs of these shapes, or says why there is none."""
        shapes = {name: (np.shape(x), _dtype(x)) for name, x in inputs.items()}
        self._graph = None  # whose memory the next one may need
        self._staging = self._graphs.Staging(shapes)
        self._readback = self._graphs.Readback()
        # Recording runs the step a few times before. A gradient that is no number changes nothing.
        nothing = np.full(self.accumulate, np.nan, np.float32)
        self._staging.fill(**{**inputs, "weights": nothing})
        before, stream = self._get_scale(), self.generator.get_state()
        self.why_no_graph = None
        try:
            if not self.wants_graph:
                raise self._graphs.GraphError("none was asked for")
            self._graph = self._graphs.Graph(self._compute)
        except self._graphs.GraphError as error:
            self.why_no_graph = str(error)
        self._set_scale(before)
        self.generator.set_state(stream)  # where the host draws masks

    def _compute(self):
        """The step, of what is in the staging's arrays: [loss, length of the gradient, scale]."""
        a, totals, loss = self._staging.arrays, {}, 0.0
        scale = a["lr"] if self._scale is None else self._scale.scale.copy()
        with random.kernel_seeds_from(a["word"]):
            for i in range(self.accumulate):
                one = self.model.loss(*(Tensor(x[i]) for name, x in a.items() if "batch" in name))
                weight = a["weights"][i]
                scaled = weight if self._scale is None else weight * scale
                _add(totals, leaf_gradients(one, Tensor(scaled)), self.accumulate > 1)
                loss = loss + one.data * weight
        gradients = [totals.get(id(p)) for p in self._parameters]
        norm = self.optimizer.step_on_device(
            gradients, a["lr"], self.max_norm, self._scale, guarded=True
        )
        return self.where.xp.stack([loss, norm, scale])

    def memory(self) -> int | None:
        held = super().memory()  # without the pool of the graph
        return held if None in (held, self._graph) else held + self._graph.memory

    def state_dict(self) -> dict:
        if self._scale is not None:
            self.loss_scale.load_state_dict(self._get_scale())
        return super().state_dict()

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self._scale is not None:
            self._set_scale(self.loss_scale.state_dict())

    def _get_scale(self):
        return {name: getattr(self._scale, name).item() for name in _SCALE if self._scale}

    def _set_scale(self, state):
        for name, value in state.items():
            getattr(self._scale, name)[...] = value


_SCALE = ("scale", "good", "skipped")  # the state of a LossScale, on the host and on the device


def _dtype(x):
    """What a staged input is on the device."""
    return x.dtype if isinstance(x, np.ndarray) else np.int64 if type(x) is int else np.float32


def _add(totals, found, more):
    """Adds gradients up, by parameter; in float32 if there will be more of them."""
    for i, gradient in found.items():
        g = gradient.data.astype(np.float32) if more and is_narrow(gradient.data) else gradient.data
        if i in totals:
            totals[i] += g
        else:
            totals[i] = g
