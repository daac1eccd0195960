"""AdamW and the clipping of gradients, for all parameters of a model at once.

A model has hundreds of small arrays, and a launch for each would cost more than the arithmetic. So
the arrays of one dtype are cut into pieces of BLOCK elements, and one launch has a program for each
piece. Which array it belongs to, and where that lies, it reads from a table on the device:

    whose, which   of each piece: the number of its array, and which of the array's pieces it is
    addresses      of each array: parameter, master copy, moments; and of its gradient, 0 if none
    sizes, decays  of each array: its elements, its weight decay

The lines are those of optim.py, and nothing of a step waits for the device: the learning rate, the
number of the step, the factor of clipping, the loss scale and whether there is an update at all are
in its memory. A step whose gradients lie where they lay the last time uploads nothing if `lr` is on
the device and `step` is, or is left to the optimizer: so it can be part of a CUDA graph. As that
goes on reading the tables of its capture, steps in and out of it share their gradients' arrays.
"""

import math
import numbers
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import triton
import triton.language as tl

from . import driver, tuning
from .arguments import contiguous, flag, integer, not_empty, number, same, writable
from .arrays import DTYPES, FLOATS, array, cdiv, next_power_of_2
from .driver import launch

_STEPS = ("int64", "int32", "float32")

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _piece(pieces, sizes, BLOCK: tl.constexpr):
    """(number of the array, first element of this program's piece, elements in the array)."""
    whose = tl.load(pieces + 2 * tl.program_id(0))
    which = tl.load(pieces + 2 * tl.program_id(0) + 1)
    return whose, which.to(tl.int64) * BLOCK, tl.load(sizes + whose)


@triton.jit
def _at(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer; ALIGNED if all are multiples of 16, which Triton cannot know."""
    pointer = address.to(tl.pointer_type(DTYPE), bitcast=True)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _squares(
    pieces, sizes, gradients, partials, G: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """partials: Σ g² of each piece."""
    whose, start, size = _piece(pieces, sizes, BLOCK)
    address = tl.load(gradients + whose)
    total = 0.0
    if address != 0:
        i = start + tl.arange(0, BLOCK)
        g = _at(address, G, ALIGNED) + i
        if start + BLOCK <= size:
            total = _sum_of_squares(tl.load(g))
        else:
            total = _sum_of_squares(tl.load(g, mask=i < size, other=0.0))
    tl.store(partials + tl.program_id(0), total)


@triton.jit
def _sum_of_squares(g):
    g = g.to(tl.float32)
    return tl.sum(g * g)


@triton.jit
def _norm(partials, norm, count, BLOCK: tl.constexpr):
    """√Σ partials, by one program: the same bits each time."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(total)).to(tl.float32))


@triton.jit
def _scalars(
    lr, step, steps, norm, loss_scale, scalars, max_norm,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, EPS: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """What is the same for all elements: lr, the factor of the gradients, with c = √(1 - β₂ᵗ) the
    factors c ε and lr c / (1 - β₁ᵗ), and 1 if there is an update, 0 if not. With a loss scale,
    norm becomes that of the gradients without it. If there is an update, steps becomes its number.
    """
    lr = tl.load(lr).to(tl.float64)
    count = tl.load(steps) + 1 if step is None else tl.load(step).to(tl.int64)
    t = count.to(tl.float64)
    factor = 1.0
    moves = 1.0
    if norm is not None:
        length = tl.load(norm)
        if loss_scale is not None:
            factor = 1.0 / tl.load(loss_scale)
            length *= factor
            tl.store(norm, length)
        scale = max_norm / (length + 1e-6)
        factor *= tl.where((scale < 1.0) & (length < float("inf")), scale, 1.0)
        if GUARDED:
            moves = tl.where(length < float("inf"), 1.0, 0.0)
    tl.store(scalars + 4, moves)
    tl.store(steps, count, mask=moves != 0.0)
    c = tl.sqrt(1.0 - tl.exp(LOG_BETA2 * t))
    tl.store(scalars, lr.to(tl.float32))
    tl.store(scalars + 1, factor)
    tl.store(scalars + 2, (c * EPS).to(tl.float32))
    tl.store(scalars + 3, (lr * c / (1.0 - tl.exp(LOG_BETA1 * t))).to(tl.float32))


@triton.jit
def _adamw(
    pieces, sizes, decays, parameters, masters, means, squares, gradients, scalars,
    P: tl.constexpr, G: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of the parameters of one dtype."""
    whose, start, size = _piece(pieces, sizes, BLOCK)
    address = tl.load(gradients + whose)
    if (address != 0) & (tl.load(scalars + 4) != 0.0):
        i = start + tl.arange(0, BLOCK)
        g = _at(address, G, ALIGNED) + i
        p = _at(tl.load(parameters + whose), P, ALIGNED) + i
        master = _at(tl.load(masters + whose), tl.float32, ALIGNED) + i
        m = _at(tl.load(means + whose), tl.float32, ALIGNED) + i
        v = _at(tl.load(squares + whose), tl.float32, ALIGNED) + i
        keep = 1.0 - tl.load(scalars) * tl.load(decays + whose)
        if start + BLOCK <= size:  # without a mask, whose end is no multiple of anything
            _update(p, master, g, m, v, keep, scalars, None, BETA1, BETA2, MASTERS)
        else:
            _update(p, master, g, m, v, keep, scalars, i < size, BETA1, BETA2, MASTERS)


@triton.jit
def _update(
    p, master, g, m, v, keep, scalars, mask,
    BETA1: tl.constexpr, BETA2: tl.constexpr, MASTERS: tl.constexpr,
):  # fmt: skip
    """AdamW's lines, in float32."""
    factor, c_eps, lr_c = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    g_i = tl.load(g, mask=mask).to(tl.float32) * factor
    p_i = tl.load(master, mask=mask) * keep  # (1 - lr weight_decay) p
    m_i, v_i = tl.load(m, mask=mask), tl.load(v, mask=mask)
    m_i += (g_i - m_i) * (1 - BETA1)  # β₁ m + (1 - β₁) g
    v_i = v_i * BETA2 + g_i * g_i * (1 - BETA2)
    p_i -= m_i / (tl.sqrt(v_i) + c_eps) * lr_c
    tl.store(m, m_i, mask=mask)
    tl.store(v, v_i, mask=mask)
    tl.store(master, p_i, mask=mask)
    if MASTERS:
        tl.store(p, p_i.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _rescale(norm, scale, good, skipped, growth, backoff, interval):
    """The next loss scale, of what the last one led to: see LossScale."""
    moved, count, old = tl.load(norm) < float("inf"), tl.load(good) + 1, tl.load(scale)
    due = count >= interval
    new = tl.where(moved, tl.where(due, old * growth, old), old * backoff)
    tl.store(scale, tl.where(new < float("inf"), new, old))
    tl.store(good, tl.where(moved & (count < interval), count, 0))
    tl.store(skipped, tl.load(skipped) + tl.where(moved, 0, 1))


@triton.jit
def _widen(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < size).to(tl.float32), mask=i < size)


# --- arrays of one dtype --------------------------------------------------------------------------


class _Pieces:
    """Arrays of one dtype, cut up for one launch over all of them."""

    def __init__(self, arrays):
        self.config = tuning.configuration("adamw", (), {"BLOCK": 1024, "num_warps": 4})
        sizes = np.array([a.size for a in arrays])
        counts = -(-sizes // self.config["BLOCK"])
        whose = np.repeat(np.arange(len(arrays)), counts)
        which = np.arange(len(whose)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.count, self.like = len(whose), arrays[0]
        self.table = self.like.upload(np.stack([whose, which], axis=1).astype(np.int32))
        self.sizes = self.like.upload(sizes.astype(np.int64))

    def addresses(self, arrays):
        """(their addresses on the device, whether all are multiples of 16)."""
        found = np.array([0 if a is None else a.address for a in arrays], np.int64)
        return self.like.upload(found), not (found % 16).any()


class _Gradients:
    """Where the gradients of some parameters lie: to be made anew if they lie elsewhere."""

    def __init__(self, pieces, arrays):
        self.pieces, self.places = pieces, _places(arrays)
        self.addresses, self.aligned = pieces.addresses(arrays)
        self.dtype = next((a.dtype for a in arrays if a is not None), "float32")


def _places(arrays):
    return [None if a is None else (a.address, a.dtype) for a in arrays]


def _norm_of(groups, partials, norm):
    """norm ← √Σ g² over all gradients of all groups."""
    first = 0
    for group in groups:
        pieces = group.pieces
        part = partials[first : first + pieces.count]
        launch(
            _squares, (pieces.count,), pieces.table, pieces.sizes, group.addresses, part,
            G=_triton_dtype(group.dtype), ALIGNED=group.aligned, **pieces.config,
        )  # fmt: skip
        first += pieces.count
    block = min(4096, next_power_of_2(first))
    launch(_norm, (1,), partials, norm, first, BLOCK=block, num_warps=8)
    return norm


# --- for users ------------------------------------------------------------------------------------


def global_norm(gradients):
    """√Σ g² over all elements of all gradients, as one float32 number on the device.

    gradients   a list of float32, float16 and bfloat16 arrays, contiguous; None is skipped
    """
    named = _listed(gradients, "gradients").items()
    found = [_contiguous(array(g, name), name) for name, g in named if g is not None]
    if not found:
        raise ValueError("gradients has no arrays; expected at least one")
    driver.follow(found)
    alike = [[found[i] for i in members] for members in _by_dtype(found)]
    groups = [_Gradients(_Pieces(some), some) for some in alike]
    partials = found[0].empty((sum(group.pieces.count for group in groups),), "float32")
    return _norm_of(groups, partials, found[0].empty((), "float32")).data


class LossScale:
    """What the loss is multiplied by, so that gradients of float16 do not underflow; AdamW.step
    divides them by it and finds the next one, by the rule of PyTorch's GradScaler: after a norm
    that is not finite it is multiplied by `backoff`, and after `interval` others in a row by
    `growth`, unless that would be infinite.

    like    an array on the device where the state shall lie: `scale`, float32 (); `good`, int32 (),
            the steps since its last change; `skipped`, int64 (), the steps that were no update.
            All three may be written to between steps
    init    the first scale, from 2⁻¹²⁶ to 2¹²⁷; growth > 1; 0 < backoff < 1; interval from 1 on
    """

    def __init__(self, like, *, init=2.0**16, growth=2.0, backoff=0.5, interval=2000):
        like = array(like, "like", tuple(DTYPES))
        fits = lambda x: 2.0**-126 <= x <= 2.0**127  # noqa: E731
        init = number(init, "init", fits, "a number from 2⁻¹²⁶ to 2¹²⁷")
        fits = lambda x: 1 < x < math.inf  # noqa: E731
        self._rule = (
            number(growth, "growth", fits, "a number above 1"),
            number(backoff, "backoff", lambda x: 0 < x < 1, "a number between 0 and 1"),
            integer(interval, "interval", 1, 2**31 - 1),
        )
        self._scale = like.upload(np.full((), init, np.float32))
        self._good = like.upload(np.zeros((), np.int32))
        self._skipped = like.upload(np.zeros((), np.int64))

    scale = property(lambda self: self._scale.data)
    good = property(lambda self: self._good.data)
    skipped = property(lambda self: self._skipped.data)

    def _update(self, norm):
        state = self._scale, self._good, self._skipped
        launch(_rescale, (1,), norm, *state, *self._rule, num_warps=1)


class AdamW:
    """p ← (1 - lr weight_decay) p - lr m̂ / (√v̂ + ε), for all parameters: see optim.AdamW.

    parameters      arrays of float32, float16 or bfloat16, contiguous: `step` WRITES TO THEM
    weight_decay    a number, or one for each parameter
    betas, eps      as there

    What a restart needs is in three lists of arrays of float32, one for each parameter, which may
    be written to between steps: `exp_avg`, `exp_avg_sq`, and `masters`: parameters of 16 bits lose
    small steps when they are rounded, so they have a copy in float32, which is what moves. That of
    a float32 parameter is the parameter itself. Whoever writes to a parameter of 16 bits writes to
    its master too. And `steps`, int64 (), is the number of the last update, 0 before the first.
    """

    def __init__(self, parameters, *, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8):
        named = _listed(parameters, "parameters")
        found = [_contiguous(array(p, name), name) for name, p in named.items()]
        if not found:
            raise ValueError("there are no parameters to train")
        driver.follow(found)
        for name, p in zip(named, found):
            writable(p, name)
        _apart(found)
        decays, self.betas, self.eps = _checked_options(weight_decay, betas, eps, len(found))
        self._parameters = found
        self._means = [p.zeros(p.shape, "float32") for p in found]
        self._squares = [p.zeros(p.shape, "float32") for p in found]
        self._masters = [p if p.dtype == "float32" else _widened(p) for p in found]
        self._groups = [_Group(self, some, decays) for some in _by_dtype(found)]
        pieces = sum(group.pieces.count for group in self._groups)
        self._partials, self._norm, self._scalars = (
            found[0].empty(shape, "float32") for shape in ((pieces,), (), (5,))
        )
        self._steps = found[0].zeros((), "int64")

    exp_avg = property(lambda self: [a.data for a in self._means])
    exp_avg_sq = property(lambda self: [a.data for a in self._squares])
    masters = property(lambda self: [a.data for a in self._masters])
    steps = property(lambda self: self._steps.data)

    def step(
        self, gradients, lr, step=None, max_norm=None, *, loss_scale=None, guarded=False
    ):  # fmt: skip
        """Moves the parameters; returns the norm of all gradients, on the device: with max_norm,
        loss_scale or guarded, else None. The next step overwrites it.

        gradients   one for each parameter, of its shape, contiguous; those of a dtype's parameters
                    all have that dtype, or all float32. None leaves a parameter alone
        lr, step    numbers, or arrays on the device with one element (lr float32); step counts
                    from 1, for all parameters together. None: it is steps + 1
        max_norm    if the norm of all gradients together is more, they are scaled down to it, on
                    the way, not in their arrays. A norm that is NaN or infinite scales nothing, as
                    in optim.clip_grad_norm_, and the caller decides; None clips nothing
        loss_scale  a LossScale: the gradients are those of the loss times its scale. They are
                    divided by it on the way, the norm is that of the true ones, and it is brought
                    up to date. It implies guarded
        guarded     True: if the norm is NaN or infinite, nothing moves, and steps stays
        """
        if max_norm is not None:
            number(max_norm, "max_norm", lambda norm: norm > 0, "a number above 0, or None")
        if not (loss_scale is None or isinstance(loss_scale, LossScale)):
            raise TypeError(f"loss_scale is {loss_scale!r}; expected a LossScale or None")
        scale = None if loss_scale is None else loss_scale._scale
        guarded, found = flag(guarded, "guarded") or scale is not None, self._checked(gradients)
        driver.follow([*self._parameters, scale])
        lr = self._number(lr, "lr", ("float32",), 0)
        step = None if step is None else self._number(step, "step", _STEPS, 1)
        norm = None
        for group in self._groups:
            group.take([found[i] for i in group.members])
        if guarded or max_norm is not None:
            groups = [group.gradients for group in self._groups]
            norm = _norm_of(groups, self._partials, self._norm)
        beta1, beta2 = (math.log(beta) if beta else -math.inf for beta in self.betas)
        launch(
            _scalars, (1,), lr, step, self._steps, norm, scale, self._scalars,
            math.inf if max_norm is None else float(max_norm),
            LOG_BETA1=beta1, LOG_BETA2=beta2, EPS=self.eps, GUARDED=guarded, num_warps=1,
        )  # fmt: skip
        for group in self._groups:
            group.step(self._scalars, self.betas)
        if scale is not None:
            loss_scale._update(norm)
        return norm and norm.data

    def _checked(self, gradients):
        gradients = list(_listed(gradients, "gradients").values())
        if len(gradients) != len(self._parameters):
            raise ValueError(f"{len(gradients)} gradients for {len(self._parameters)} parameters")
        found = []
        for i, (g, p) in enumerate(zip(gradients, self._parameters, strict=True)):
            if g is not None:
                name = f"gradients[{i}]"
                dtypes = ("float32",) if p.dtype == "float32" else (p.dtype, "float32")
                g = _contiguous(array(g, name, dtypes), name)
                same("shape", **{f"parameters[{i}]": p, name: g})
            found.append(g)
        driver.follow([*self._parameters, *found])
        for group in self._groups:
            if len({found[i].dtype for i in group.members if found[i] is not None}) > 1:
                raise TypeError(f"gradients of {group.dtype} parameters differ in dtype")
        return found

    def _number(self, x, name, dtypes, least):
        """x on the device: lr from 0 on, or a step, an integer from 1 on."""
        if isinstance(x, numbers.Number):
            fits = lambda x: least <= x < 2.0**63 and (least == 0 or x == int(x))  # noqa: E731
            x = number(x, name, fits, "0 or more" if least == 0 else "an integer from 1 on")
            return self._norm.upload(np.array([x], dtypes[0]))
        x = array(x, name, dtypes)
        if x.size != 1:
            raise ValueError(f"{name} has shape {x.shape}; expected one element")
        return x


class _Group:
    """The parameters of one dtype: their tables, and the launch that moves them."""

    def __init__(self, optimizer, members, decays):
        o, self.members = optimizer, members
        self.dtype = o._parameters[members[0]].dtype
        self.pieces = _Pieces([o._parameters[i] for i in members])
        self.decays = self.pieces.like.upload(np.array([decays[i] for i in members], np.float32))
        lists = (o._parameters, o._masters, o._means, o._squares)
        tables = [self.pieces.addresses([some[i] for i in members]) for some in lists]
        self.addresses = [addresses for addresses, _ in tables]
        self.aligned = all(aligned for _, aligned in tables)
        self.gradients = None

    def take(self, arrays):
        if self.gradients is None or self.gradients.places != _places(arrays):
            self.gradients = _Gradients(self.pieces, arrays)

    def step(self, scalars, betas):
        pieces, gradients = self.pieces, self.gradients
        launch(
            _adamw, (pieces.count,), pieces.table, pieces.sizes, self.decays, *self.addresses,
            gradients.addresses, scalars, P=_triton_dtype(self.dtype),
            G=_triton_dtype(gradients.dtype), BETA1=betas[0], BETA2=betas[1],
            MASTERS=self.dtype != "float32", ALIGNED=self.aligned and gradients.aligned,
            **pieces.config,
        )  # fmt: skip


# --- what they share ------------------------------------------------------------------------------


def _listed(arrays, name):
    """The arrays by their names: of a list, a generator, but not the rows of one array."""
    if hasattr(arrays, "shape") or not isinstance(arrays, Iterable):
        raise TypeError(f"{name} is a {type(arrays).__name__}; expected a list of arrays")
    return {f"{name}[{i}]": x for i, x in enumerate(arrays)}


def _contiguous(x, name):
    """The array, if its elements lie one after the other."""
    not_empty(**{name: x})
    contiguous(x, name)
    return x


def _apart(parameters):
    """ValueError if two of them, contiguous as they are, share memory."""
    places = sorted((p.address, p.address + p.size * p.dtype.itemsize) for p in parameters)
    if any(end > start for (_, end), (start, _) in pairwise(places)) and not driver.compiles():
        raise ValueError("two parameters share memory: list each once")


def _by_dtype(arrays):
    """Their indices, those of one dtype together."""
    alike = [[i for i, a in enumerate(arrays) if a.dtype == dtype] for dtype in FLOATS]
    return [members for members in alike if members]


def _checked_options(weight_decay, betas, eps, count):
    """(weight decay of each parameter, betas, eps)."""
    decays = weight_decay if isinstance(weight_decay, list | tuple) else [weight_decay] * count
    if len(decays) != count:
        raise ValueError(
            f"weight_decay has {len(decays)} numbers; expected one for each of {count}"
        )
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; expected two numbers in [0, 1)")
    decays = [
        number(decay, "weight_decay", lambda x: 0 <= x < math.inf, "0 or more") for decay in decays
    ]
    betas = [number(beta, "betas", lambda x: 0 <= x < 1, "two numbers in [0, 1)") for beta in betas]
    return decays, tuple(betas), number(eps, "eps", lambda x: 0 <= x < math.inf, "0 or more")


def _widened(p):
    """A copy in float32."""
    wide = p.empty(p.shape, "float32")
    launch(_widen, (cdiv(p.size, 2048),), p, wide, p.size, BLOCK=2048, num_warps=4)
    return wide


def _triton_dtype(name):
    return getattr(tl, name)
