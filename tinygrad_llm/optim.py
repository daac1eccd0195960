"""Optimizers, gradient clipping and the learning-rate schedule: what happens after backward().

An optimizer changes `parameter.data` in place. Its own arrays, in float32 or wider, are kept by
position: a restart must list the parameters in the same order.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from . import backend, threads
from .device import CPU, of
from .nn import Module
from .precision import DTYPES, is_narrow
from .tensor import Tensor

_BLOCK = 1 << 17  # elements at a time: in cache, and enough that threads seldom wait for Python
_SMALL = 1 << 12  # arrays up to this size are updated together: calls would cost more than copies
_WORTH_SHARING = 1 << 22  # elements: with fewer, a thread is done before another has woken up
_PASSES = 13  # of AdamW over each element


class Optimizer(ABC):
    """Base class: groups of parameters, each with its own options; subclasses write `_update`.

    params      Parameters, or dictionaries {"params": [...], option: value}, whose options replace
                the defaults for these parameters
    defaults    options such as lr, for whoever does not set their own

    `param_groups` is the list of those dictionaries; a schedule sets group["lr"] before a step.
    Raises ValueError for an option out of range, no parameters, or one that comes twice.
    """

    def __init__(self, params: Iterable, defaults: dict):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [
            {**defaults, **group, "params": _parameters(group["params"])} for group in groups
        ]
        everything = self._parameters()
        if not everything:
            raise ValueError(f"{type(self).__name__} has no parameters to train")
        if len({id(p) for p in everything}) < len(everything):
            raise ValueError(f"{type(self).__name__}: a parameter comes twice; list it once")
        for group in self.param_groups:
            self._check(group, set(defaults))
        self.state = [{} for _ in everything]  # of each parameter: its arrays and number of steps

    def zero_grad(self) -> None:
        """Forgets all gradients: `.grad` becomes None."""
        for parameter in self._parameters():
            parameter.grad = None

    def step(self) -> None:
        """Moves every parameter that has a gradient; the others are left alone."""
        moved, states = [], iter(self.state)
        for group in self.param_groups:
            for parameter, state in zip(group["params"], states):
                if parameter.grad is not None:
                    _check_together(parameter, state)
                    moved.append((parameter, state, group))
        moves = []
        for parameter, state, group in moved:
            state["step"] = state.get("step", 0) + 1
            moves.append((_wide_data(parameter, state), parameter.grad.data, state, group))
        self._update(moves)
        for (parameter, _, _), (p, *_) in zip(moved, moves):
            if p is not parameter.data:
                parameter.data[...] = p.astype(parameter.dtype)

    def state_dict(self) -> dict:
        """What a restart needs: {"state": [...], "param_groups": [...]}.

        state           of each parameter, in order: {"step": int, name: array, ...}; {} before its
                        first step. The arrays are the optimizer's own; those of a GPU are copies.
        param_groups    the options of each group; "params" are positions in that order
        """
        positions = iter(range(len(self.state)))
        groups = [
            {**group, "params": [next(positions) for _ in group["params"]]}
            for group in self.param_groups
        ]
        states = [
            {**state, **{name: of(a).numpy(a) for name, a in _arrays(state)}}
            for state in self.state
        ]
        return {"state": states, "param_groups": groups}

    def keep_masters(self) -> None:
        """Makes float32 copies of the parameters as they are now: to be called before they are cast
        to 16 bits, so that nothing is lost. Otherwise the first step copies what it finds.
        """
        for parameter, state in zip(self._parameters(), self.state, strict=True):
            state["master"] = parameter.data.astype(np.float32)

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues exactly where state_dict() was called: copies the arrays, takes the options.

        Raises ValueError, before anything is changed, if groups, options or shapes differ.
        """
        states, groups = state_dict["state"], state_dict["param_groups"]
        self._check_saved(states, groups)
        self.state = [
            {**state, **{name: of(p.data).put(a.copy()) for name, a in _arrays(state)}}
            for p, state in zip(self._parameters(), states, strict=True)
        ]
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({**saved, "params": group["params"]})

    @abstractmethod
    def _update(self, moves):
        """For each (p, g, state, group) changes the array p in place, float32 or wider, given its
        gradient g, which may be narrower; keeps its own arrays in `state`.
        """

    def _check_saved(self, states, groups):
        owner = f"{type(self).__name__}.load_state_dict"
        saved, here = [
            [(len(group["params"]), sorted(set(group) - {"params"})) for group in some]
            for some in (groups, self.param_groups)
        ]
        if saved != here or len(states) != len(self.state):
            raise ValueError(
                f"{owner}: saved groups (parameters, options) {saved}, here {here}; "
                "build the same optimizer first"
            )
        for i, (parameter, state) in enumerate(zip(self._parameters(), states, strict=True)):
            for name, array in _arrays(state):
                if array.shape != parameter.shape:
                    raise ValueError(
                        f"{owner}: {name} of parameter {i} has shape {array.shape}, "
                        f"expected {parameter.shape}"
                    )

    def _parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check(self, group, known):
        unknown = set(group) - known - {"params"}
        if unknown:
            raise ValueError(f"{type(self).__name__}: unknown options {sorted(unknown)}")
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{type(self).__name__}: {name} is 0 or more, not {group[name]!r}")


class SGD(Optimizer):
    """p ← p - lr v,  v ← momentum v + g,  with g + weight_decay p in place of g.

    nesterov: p ← p - lr (g + momentum v), a look ahead along v.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, **options})

    def _update(self, moves):
        for p, g, state, group in moves:
            self._move(p, g.astype(p.dtype, copy=False), state, group)

    def _move(self, p, g, state, group):
        if group["weight_decay"]:
            g = g + group["weight_decay"] * p
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = np.zeros_like(p)
            v = state["momentum_buffer"]
            v *= group["momentum"]
            v += g
            g = g + group["momentum"] * v if group["nesterov"] else v
        p -= group["lr"] * g

    def _check(self, group, known):
        super()._check(group, known)
        if not group["momentum"] >= 0:
            raise ValueError(f"SGD: momentum is 0 or more, not {group['momentum']!r}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("SGD: nesterov needs a momentum above 0")


class AdamW(Optimizer):
    """Steps of about lr in every coordinate, whatever the size of its gradient.

    m ← β₁ m + (1 - β₁) g           running mean of the gradient
    v ← β₂ v + (1 - β₂) g²          running mean of its square
    p ← (1 - lr weight_decay) p - lr m̂ / (√v̂ + ε)
    m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ) at step t, since both means start at 0.

    The decay is decoupled: it acts on p itself, and does not pass through the running means.
    Kingma & Ba, "Adam", 2015; Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019.

    On a GPU one kernel moves all parameters, if the groups differ in nothing but weight_decay; they
    have one count t then.
    """

    # Of all parameters: kernels.gpu.optim.AdamW, and the options and arrays that it was made with.
    _kernel = _made_with = None

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        options = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **options})

    def step(self) -> None:
        if self._by_kernel():
            for p, state in zip(self._parameters(), self.state, strict=True):
                if p.grad is not None:
                    _check_together(p, state)
            gradients = [None if p.grad is None else p.grad.data for p in self._parameters()]
            self.step_on_device(gradients, self.param_groups[0]["lr"])
        else:
            self._leave_kernel()
            super().step()

    def step_on_device(self, gradients, lr, max_norm=None, loss_scale=None, guarded=False):
        """The step of all parameters by one kernel: nothing waits for the device.

        gradients   an array or None for each parameter
        lr          a number, or a float32 array on the device with one element
        The others, and what is returned, are as in kernels.gpu.optim.AdamW.step. Raises ValueError
        where there is no such kernel.
        """
        return self.device_kernel().step(
            gradients, lr, max_norm=max_norm, loss_scale=loss_scale, guarded=guarded
        )

    def device_kernel(self):
        """The kernel of step_on_device, with the state so far."""
        if not self._by_kernel():
            raise ValueError(
                "AdamW: no kernel moves these parameters: they are on the CPU, kernels are off, or "
                "groups differ in more than weight_decay; use step()"
            )
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        options = decays, *(self.param_groups[0][name] for name in ("betas", "eps"))
        arrays = [p.data for p in self._parameters()]
        same = self._made_with is not None and self._made_with[0] == options
        same = same and all(a is b for a, b in zip(arrays, self._made_with[1]))
        if self._kernel is None or not same:
            self._leave_kernel()
            self._kernel, self._made_with = self._made_kernel(*options), (options, arrays)
        return self._kernel

    def _leave_kernel(self):
        """The state is all in `state` again, and the kernel no more."""
        self._count_steps()
        self._kernel = self._made_with = None

    def _count_steps(self):
        if self._kernel is not None:
            step = int(self._kernel.steps)
            for state in self.state:
                state["step"] = step

    def state_dict(self) -> dict:
        self._count_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._kernel = self._made_with = None  # made anew from this state

    def _by_kernel(self):
        first = self.param_groups[0]
        alike = all(group[k] == first[k] for group in self.param_groups for k in _SHARED)
        return alike and kernels_for(self._parameters()) is not None

    def _made_kernel(self, decays, betas, eps):
        """The kernel, which owns the state's arrays from now on, with what is in them."""
        parameters = self._parameters()
        kernel = kernels_for(parameters).AdamW(
            [p.data for p in parameters], weight_decay=decays, betas=betas, eps=eps
        )
        own = {"exp_avg": kernel.exp_avg, "exp_avg_sq": kernel.exp_avg_sq, "master": kernel.masters}
        for i, (p, state) in enumerate(zip(parameters, self.state, strict=True)):
            for name, arrays in own.items():
                if name in state:
                    arrays[i][...] = state[name]
                if name != "master" or is_narrow(p.data):
                    state[name] = arrays[i]
        kernel.steps[...] = max(state.get("step", 0) for state in self.state)
        return kernel

    def _update(self, moves):
        """In blocks, each on its own: whoever does them, the numbers are the same."""
        blocks, small = [], {}
        for p, g, state, group in moves:
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = np.zeros_like(p), np.zeros_like(p)
            arrays = p, g, state["exp_avg"], state["exp_avg_sq"]
            alike = state["step"], id(group), p.dtype, g.dtype
            if p.size <= _SMALL:
                small.setdefault(alike, (group, []))[1].append(arrays)
            else:
                blocks += [(_adamw, block, state["step"], group) for block in _blocks(*arrays)]
        for (step, *_), (group, together) in small.items():
            blocks.append((_adamw_of_small, together, step, group))
        share_elements(lambda block: block[0](*block[1:]), blocks, [p for p, *_ in moves], _PASSES)

    def _check(self, group, known):
        super()._check(group, known)
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamW: betas are two numbers in [0, 1), not {group['betas']!r}")
        if not group["eps"] >= 0:
            raise ValueError(f"AdamW: eps is 0 or more, not {group['eps']!r}")


def _adamw(arrays, t, group):
    """AdamW's lines on one block of p, g, m, v, in place, with a single temporary.

    With c = √(1 - β₂ᵗ), the step lr m̂ / (√v̂ + ε) is (lr c / (1 - β₁ᵗ)) m / (√v + c ε): two passes
    over the block instead of four.
    """
    p, g, m, v = arrays
    g = g.astype(p.dtype, copy=False)
    lr, (beta1, beta2) = group["lr"], group["betas"]
    c = math.sqrt(1 - beta2**t)
    if group["weight_decay"]:
        p *= 1 - lr * group["weight_decay"]
    work = g - m
    work *= 1 - beta1
    m += work  # β₁ m + (1 - β₁) g
    np.multiply(g, g, out=work)
    work *= 1 - beta2
    v *= beta2
    v += work
    np.sqrt(v, out=work)
    work += c * group["eps"]
    np.divide(m, work, out=work)
    work *= lr * c / (1 - beta1**t)
    p -= work


def _adamw_of_small(together, t, group):
    """The same for many small arrays at once: [(p, g, m, v), ...]."""
    joined = [np.concatenate([a.reshape(-1) for a in arrays]) for arrays in zip(*together)]
    _adamw(joined, t, group)
    p, _, m, v = joined
    start = 0
    for to_p, _, to_m, to_v in together:
        end = start + to_p.size
        for to, of_all in ((to_p, p), (to_m, m), (to_v, v)):
            to[...] = of_all[start:end].reshape(to.shape)
        start = end


def _check_together(parameter, state):
    """Raises ValueError if a parameter has moved away from its gradient or its state."""
    where = of(parameter.data)
    for what, a in [("gradient", parameter.grad.data), *_arrays(state)]:
        if of(a) is not where:
            raise ValueError(
                f"a parameter is on {where.name}, its {what} on {of(a).name}: move the model "
                "before the optimizer's first step, or make a new optimizer"
            )


_SHARED = ("lr", "betas", "eps")  # options that one kernel has for all parameters


def _wide_data(parameter, state):
    """The array to move: that of the parameter, or for one of 16 bits its master, a copy in float32
    which remembers the steps that are too small for it.
    """
    if not is_narrow(parameter.data):
        return parameter.data
    if "master" not in state:
        state["master"] = parameter.data.astype(np.float32)
    return state["master"]


def kernels_for(parameters):
    """The module of kernels that can move these parameters, or None: those of a GPU, float32 or
    narrower, where the kernels are not switched off.
    """
    where = {of(p.data) for p in parameters}
    if len(where) != 1 or not all(p.dtype in DTYPES.values() for p in parameters):
        return None
    (where,) = where
    where.make_current()
    return backend.kernel_module(where, "optim")


# --- before the step ------------------------------------------------------------------------------


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scales all gradients together, in place, so that their length is at most max_norm.

    Returns the length before: √Σ g² over all elements of all gradients. If that is nan or infinite,
    the gradients are left as they are, and the caller decides (skip the step, or stop).
    Raises ValueError unless max_norm > 0. Pascanu, Mikolov & Bengio, 2013.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is above 0, not {max_norm!r}")
    parameters = [p for p in _parameters(parameters) if p.grad is not None]
    gradients = [p.grad.data for p in parameters]
    if (kernels := kernels_for(parameters)) is not None:
        norm = float(kernels.global_norm(gradients))
        blocks = gradients
    else:
        blocks = [block for g in gradients for (block,) in _blocks(g)]
        norm = math.sqrt(sum(share_elements(_sum_of_squares, blocks, gradients)))
    scale = max_norm / (norm + 1e-6)
    if scale < 1 and math.isfinite(norm):
        share_elements(lambda block: operator.imul(block, scale), blocks, gradients)
    return norm


def warmup_cosine(
    step: int, total: int, warmup: int, peak: float, initial: float = 0.0, minimum: float = 0.0
) -> float:
    """The learning rate at a step: from `initial` in a line up to `peak`, then a half cosine down.

    step 0 gives `initial`, step `warmup` gives `peak`, step `total` and beyond `minimum`.
    Raises ValueError unless 0 <= warmup <= total and step >= 0. Loshchilov & Hutter, "SGDR", 2017.
    """
    if step < 0 or not 0 <= warmup <= total:
        raise ValueError(
            f"warmup_cosine: step {step}, warmup {warmup}, total {total}; "
            "expected step >= 0 and 0 <= warmup <= total"
        )
    if step < warmup:
        return initial + (peak - initial) * step / warmup
    if step >= total:
        return minimum
    progress = (step - warmup) / (total - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


class LossScale:
    """What a float16 loss is multiplied by before backward, so that small gradients are not lost.

    float16 holds nothing below 6e-8. `scale` is halved when a gradient overflows, and that step is
    left out; after `interval` steps without, it is doubled. Micikevicius et al., 2018, section 3.2;
    the numbers are those of PyTorch's GradScaler.
    """

    def __init__(self, scale: float = 2.0**16, interval: int = 2000):
        self.scale, self.interval = scale, interval
        self.good = 0  # steps since the scale has changed
        self.skipped = 0  # steps left out

    def update(self, finite: bool) -> bool:
        """Counts a step whose gradients were finite, or not; returns whether to take it."""
        if not finite:
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
            return False
        self.good += 1
        if self.good == self.interval:
            self.scale, self.good = min(self.scale * 2, 2.0**127), 0
        return True

    def state_dict(self) -> dict:
        """What a restart needs, as JSON can hold it."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        """Continues where state_dict() was called."""
        self.scale, self.good, self.skipped = state["scale"], state["good"], state["skipped"]


def decay_groups(model: Module, weight_decay: float) -> list[dict]:
    """The trainable parameters in groups for an optimizer: matrices decay, vectors do not.

    Biases and the gains of norms have one axis. Pulling them to zero would not make the model any
    smoother, it would only move its outputs.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# --- arrays ---------------------------------------------------------------------------------------


def _blocks(*arrays) -> list[tuple]:
    """Arrays of one shape in pieces of about _BLOCK elements each, or of a row: views."""
    if all(array.flags.c_contiguous for array in arrays):
        arrays = [array.reshape(-1) for array in arrays]
    size, n = arrays[0].size, len(arrays[0])
    if size <= _BLOCK:
        return [tuple(arrays)]
    rows = max(1, _BLOCK * n // size)
    starts = range(0, n, rows)
    return [tuple(array[i : i + rows] for array in arrays) for i in starts]


def share_elements(function, blocks, arrays, passes=1):
    """[function(block) for block in blocks], which are those of `arrays`; shared out among the team
    where that pays: not for few passes over few elements, and not on a GPU.
    """
    large = sum(a.size for a in arrays) * passes > _WORTH_SHARING
    shared = large and all(of(a) is CPU for a in arrays)
    return threads.share(function, blocks) if shared else [*map(function, blocks)]


def _sum_of_squares(block):
    """Of a block, as a Python float: one float32 sum of millions would lose digits."""
    flat = (block.astype(np.float32) if is_narrow(block) else block).reshape(-1)
    return float(np.dot(flat, flat))


def _arrays(state):
    """The (name, array) pairs in the state of a parameter."""
    return [(name, value) for name, value in state.items() if hasattr(value, "dtype")]


def _parameters(tensors):
    """The tensors as a list. Raises TypeError for what is no Tensor."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"parameters are Tensors, not {type(tensor).__name__}; use model.parameters()"
            )
    return tensors
