"""Activation recomputation: memory for time. What backward needs is not kept, but computed again.

A network of n blocks keeps the activations of all of them for backward. Recomputed, it keeps the
input of each block, and the activations of one block at a time; the price is a second forward pass.
Chen, Xu, Zhang & Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from .. import backend, random
from ..device import CPU, of
from ..tensor import (
    Tensor,
    enable_grad,
    is_grad_enabled,
    leaf_gradients,
    outer_tensors,
    result_of,
)


def recompute(function: Callable, *inputs, generator: random.Generator | None = None) -> Tensor:
    """function(*inputs), a Tensor, without its graph: backward runs the function once more.

    The gradients are the same, bit for bit.
    inputs      what the function is given, Tensors or anything else. Other Tensors that it uses
                may be parameters, and whatever needs no gradient
    generator   what the function draws from (dropout); default: random.default_generator. The
                second time it draws the same numbers, and then goes on where it was

    The function must do the same both times. Raises TypeError if it does not return a Tensor,
    ValueError if it uses the result of an op outside that needs a gradient and is no input;
    RuntimeError in backward if it has not done the same (which on a GPU goes
    unnoticed), or if that pass is itself recorded (create_graph).
    """
    if not is_grad_enabled():
        return function(*inputs)
    call = _Call(function, inputs, random.or_default(generator))
    mark = Tensor(0)
    y = function(*_cut_off(inputs))
    if not isinstance(y, Tensor):
        raise TypeError(f"recompute: the function returned a {type(y).__name__}, not a Tensor")
    if not y.requires_grad:
        return y
    call.parameters = outer_tensors(y, mark)
    if not all(parameter.is_leaf for parameter in call.parameters):
        raise ValueError(
            "recompute: the function uses a Tensor made outside of it by an op; give it as an input"
        )
    if call.generator.get_state() == call.state:
        call.state = None  # nothing was drawn
    return result_of(_RECOMPUTED, y.data, [*_tensors(inputs), *call.parameters], call)


class _Call:
    """What it takes to run the function again as it ran first."""

    def __init__(self, function: Callable, inputs: tuple, generator: random.Generator):
        self.function, self.inputs, self.generator = function, inputs, generator
        self.state, self.reading = generator.get_state(), backend.current.reading
        self.seeds = random.kernel_seeds_now()
        self.parameters: list[Tensor] = []

    def gradients(self, gradient, first, needs: tuple[bool, ...]) -> tuple:
        """Of the Tensors among the inputs, then of the parameters; None where there is none.

        first       what the function returned the first time, an array
        """
        inputs = _cut_off(self.inputs)
        seeds = random.kernel_seeds_from(*self.seeds)
        with enable_grad(), backend.using(self.reading), self._same_draws(), seeds:
            y = self.function(*inputs)
        if not _same(y.data, first):
            raise RuntimeError(
                "recompute: the function did not return the same again; name the generator that it "
                "draws from, and change nothing that it uses before backward"
            )
        found = leaf_gradients(y, gradient)
        wanted = [found.get(id(x)) for x in [*_tensors(inputs), *self.parameters]]
        return tuple(g.data if g is not None and need else None for g, need in zip(wanted, needs))

    @contextmanager
    def _same_draws(self):
        if self.state is None:
            yield
            return
        now = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            yield
        finally:
            self.generator.set_state(now)


def _same(a, b):
    """Whether two arrays are equal. On a GPU nobody waits for the answer, so it is yes."""
    if of(a) is not CPU or np.array_equal(a, b):  # the faster comparison
        return True
    return np.array_equal(a, b, equal_nan=True)


def _cut_off(inputs):
    """The inputs with leaves in the place of Tensors."""
    return [
        x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
    ]


def _tensors(inputs):
    return [x for x in inputs if isinstance(x, Tensor)]


def _vjp(gradient, y, *arrays, saved, needs):
    return saved.gradients(gradient, y, needs)


def _vjp_on_the_tape(*_, **__):
    raise RuntimeError(
        "recompute: the backward pass cannot be recorded (create_graph); call the function itself"
    )


# To the tape it is a kernel: its gradients are its own arrays, and it is told which are needed.
_OP = SimpleNamespace(name="recompute", saves=False, vjp=_vjp_on_the_tape)
_RECOMPUTED = backend.Implementation(_OP, None, _vjp, saves=True, is_kernel=True)
