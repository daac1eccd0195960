"""Mutants: our own ops, kernels and engine with one mistake in each, to be found by the laws.

A law that no mistake can break proves nothing. So here are the classic mistakes of backward passes,
one for each way of going wrong that we could think of, as changes of our source text: they make a
table that can be read from the top. verdict(mutant) plants a mutant, tries the laws on it, and
tells which one finds it. GENERIC are mistakes that can be made in any op, also in yours.

A mutant is planted in a copy, and TABLE, the readings and the kernels stay as they are. Only the
engine's are planted in the engine itself, for as long as the trials last: leave it alone meanwhile.
"""

import contextlib
import copy
import functools
import inspect
import linecache
import textwrap
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .. import backend
from ..ops import TABLE
from ..tensor import Tensor
from .cases import has_gradient
from .lawbook import laws
from .trial import LawError

_ENGINE = {"tensor": inspect.getmodule(Tensor), "backend": backend}
_ENGINE_OPS = (  # which between them use all of the engine; in the order that finds bugs soonest
    "add", "getitem", "maximum", "relu", "cast", "max", "linear", "layer_norm", "attention",
    "embedding", "where", "matmul", "sum", "reshape", "broadcast_to", "concat",
)  # fmt: skip
_TYPOS = (NameError, AttributeError, SyntaxError)

# --- mutants --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One mistake, made in the text of one function.

    name    what is wrong
    where   the function: "softmax.vjp" an op's, "kernel softmax.vjp" a kernel's (for both, also a
            function of their file which they call), "tensor._sum_down" the engine's
    old     this text, which occurs exactly once in the function's source,
    new     becomes this
    """

    name: str
    where: str
    old: str
    new: str

    def __str__(self):
        return f"{self.where}: {self.name}"

    @property
    def subject(self):
        """The op's name, or "engine"."""
        first = self.where.removeprefix("kernel ").partition(".")[0]
        return "engine" if first in _ENGINE else first

    def planted(self):
        """A context manager for [(op, reading)], on which the laws are to be tried inside."""
        if self.subject == "engine":
            return self._in_the_engine()
        return self._in_a_kernel() if self.where.startswith("kernel ") else self._in_an_op()

    @contextlib.contextmanager
    def _in_an_op(self):
        op, function = copy.copy(TABLE[self.subject]), self.where.partition(".")[2]
        if function in ("forward", "vjp"):
            setattr(op, function, self.rewritten(getattr(op, function)))
        else:
            helper = {function: self.rewritten(op.vjp.__globals__[function])}
            op.vjp = _with_globals(op.vjp, helper)
            op.forward = op.forward if op.primitive else _with_globals(op.forward, helper)
        with forgotten(op):
            yield [(op, backend.MATHS)]

    @contextlib.contextmanager
    def _in_a_kernel(self):
        kernel, function = backend.CPU.kernels[self.subject], self.where.partition(".")[2]
        own = {k: f.__func__ for k, f in vars(kernel).items() if isinstance(f, staticmethod)}
        if function in own:
            wrong = {function: self.rewritten(own[function])}
        else:
            helper = {function: self.rewritten(kernel.vjp.__globals__[function])}
            wrong = {name: _with_globals(f, helper) for name, f in own.items()}
        wrong = type(self.subject, (kernel,), {k: staticmethod(f) for k, f in wrong.items()})
        kernels = backend.CPU.kernels | {self.subject: wrong}
        yield [(TABLE[self.subject], backend.Reading(backend.CPU.space, kernels))]

    @contextlib.contextmanager
    def _in_the_engine(self):
        """The function keeps its identity, and whoever has imported it runs the other code."""
        module, *path = self.where.split(".")
        function = inspect.unwrap(functools.reduce(getattr, path, _ENGINE[module]))
        right, wrong = function.__code__, inspect.unwrap(self.rewritten(function)).__code__
        vars(_ENGINE["tensor"].tape).clear()  # it keeps the functions that it has made
        try:
            function.__code__ = wrong
            yield [(TABLE[name], None) for name in _ENGINE_OPS]
        finally:
            function.__code__ = right
            vars(_ENGINE["tensor"].tape).clear()

    def rewritten(self, function):
        """The function as its source would have it, with `new` in place of `old`."""
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(
                f"mutant '{self}' expects {self.old!r} once in the source, where it occurs "
                f"{source.count(self.old)} times: the code has changed, so the mutant must follow"
            )
        source, file = source.replace(self.old, self.new), f"<mutant {self}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        found = {}
        exec(compile(source, file, "exec"), inspect.unwrap(function).__globals__, found)
        wrong = found[function.__name__]
        return wrong.__func__ if isinstance(wrong, staticmethod) else wrong


def _with_globals(function, changed):
    """A copy of the function that finds other things under some names."""
    scope = function.__globals__ | changed
    copied = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


@contextlib.contextmanager
def forgotten(op):
    """Takes a copied op out of the readings afterwards."""
    try:
        yield
    finally:
        for reading in (backend.MATHS, backend.CPU, backend.COMPLEX):
            reading.pop(op, None)


# --- mistakes for any op --------------------------------------------------------------------------


@dataclass(frozen=True)
class Generic:
    """One mistake that does not depend on the op: `spoil` makes a wrong gradient of a right one."""

    name: str
    where: str
    array: int
    spoil: Callable

    __str__ = Mutant.__str__
    subject = Mutant.subject

    @contextlib.contextmanager
    def planted(self):
        """As Mutant.planted."""
        op = copy.copy(TABLE[self.subject])
        right = op.vjp

        @functools.wraps(right)
        def wrong(xp, g, *arrays, **keywords):
            found = list(right(xp, g, *arrays, **keywords))
            found[self.array] = self.spoil(found[self.array], g)
            return tuple(found)

        op.vjp = wrong
        with forgotten(op):
            yield [(op, backend.MATHS)]


def _without_the_last(d, g):
    kept = np.ones(d.shape, np.float32)
    kept.reshape(-1)[-1:] = 0
    return d * kept


def _after_doubling_g(d, g):
    if isinstance(g, np.ndarray):
        g *= 2
    return d


def _rounded(d, g):
    return d.astype(np.float32).astype(d.dtype) if isinstance(d, np.ndarray) else d


def _detached(d, g):
    return d.detach() if isinstance(d, Tensor) else d


GENERIC = {
    "the gradient of {} is zero": lambda d, g: d * 0,
    "the gradient of {} is too large by a billionth": lambda d, g: d * (1 + 1e-9),
    "the last element of the gradient of {} is not written": _without_the_last,
    "the gradient of {} passes through float32": _rounded,
    "the gradient of {} has no derivative of its own": _detached,
    "the gradient of {} is lost in rounding": lambda d, g: (d + 1e30) - 1e30,
    "g is doubled in place": _after_doubling_g,
}


def generic(op):
    """GENERIC for each array of the op that has a gradient."""
    found = {}
    for i, array in enumerate(op.arrays):
        for name, spoil in GENERIC.items() if has_gradient(op, array) else ():
            name = name.format(array)
            found.setdefault(name, Generic(name, f"{op.name}.vjp", i, spoil))
    return list(found.values())


# --- trying them ----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What became of a mutant: the law that found it, and what that said; None if none did."""

    mutant: Mutant | Generic
    law: str | None
    reason: str | None
    seconds: float


def mutants(names=None):
    """All mutants, made by hand or generic. names: only those of these ops, or of the "engine"."""
    wanted = {*TABLE, "engine"} if names is None else set(names)
    unknown = sorted(wanted - {*TABLE, "engine"})
    if unknown:
        raise ValueError(f"no op named {', '.join(unknown)}")
    found = [*MUTANTS, *(mutant for op in TABLE.values() for mutant in generic(op))]
    return [mutant for mutant in found if mutant.subject in wanted]


def verdict(mutant, examples=16, seed=0):
    """Tries law after law on a mutant, each on some examples, until one finds it. ValueError if it
    is not found out but merely does not run.
    """
    start = time.perf_counter()
    law = reason = None
    with mutant.planted() as subjects:
        trials = (
            trial
            for op, reading in subjects
            for trial in laws(op, reading, examples=examples, seed=seed, shrink=False)
        )
        for trial in trials:
            try:
                trial()
            except LawError as error:
                if isinstance(error.cause, _TYPOS):
                    raise ValueError(f"mutant '{mutant}' does not run") from error.cause
                law, reason = trial.law.name, str(error)
                break
    return Verdict(mutant, law, reason, time.perf_counter() - start)


# --- the classic mistakes -------------------------------------------------------------------------

# function: (what is wrong, this text, becomes this)

_ATTENTION = {
    "attention.forward": (
        (
            "the softmax sees hidden keys, too",
            "xp.softmax(xp.where(seen, S, lowest))",
            "xp.softmax(S)",
        ),
        (
            "a query that sees no key sees all",
            "xp.where(seen, xp.softmax(xp.where(seen, S, lowest)), 0.0)",
            "xp.softmax(xp.where(seen, S, lowest))",
        ),
        ("P is saved after dropout instead of before", "v, P", "v, D * P"),
    ),
    "attention.vjp": (
        ("softmax's sum is missing", " - xp.sum(g * y, axis=-1, keepdims=True)", ""),
        ("v̄ forgets dropout", "xp.matrix_transpose(D * P)", "xp.matrix_transpose(P)"),
        ("P̄ forgets dropout", "D * (g @", "(g @"),
        ("k̄ is not scaled", "k_bar = scale * (", "k_bar = ("),
        ("S̄ is not transposed for k̄", "xp.matrix_transpose(S_bar) @ q", "S_bar @ q"),
        ("the bias is scaled like the scores", "None, S_bar, None", "None, scale * S_bar, None"),
    ),
}

_ELEMENTWISE = {
    "add.vjp": (
        ("b̄ has the sign of a subtraction", "g, g\n", "g, -g\n"),
        ("a and b share g between them", "return g, g", "return g / 2, g / 2"),
    ),
    "subtract.vjp": (("b̄ has the sign of an addition", "-g", "g"),),
    "multiply.vjp": (
        ("ā and b̄ are exchanged", "g * b, g * a", "g * a, g * b"),
        ("y is taken for b", "g * b", "g * y"),
    ),
    "divide.vjp": (
        ("b̄ has the wrong sign", "-a_bar * y", "a_bar * y"),
        ("b̄ is not divided by b", "-a_bar * y", "-g * y"),
    ),
    "negative.vjp": (("the sign is lost", "-g", "g"),),
    "power.vjp": (
        ("the exponent is not lowered", "x**k", "x**exponent"),
        ("the exponent does not come down as a factor", "exponent * g", "g"),
    ),
    "pow.vjp": (
        ("the logarithm of y, not of x", "x > 0, x, 1.0", "x > 0, y, 1.0"),
        ("p̄ forgets y", "g * y * xp.log", "g * xp.log"),
        ("the exponent is not lowered", "g * p * x**k", "g * p * y"),
    ),
    "exp.vjp": (("x is taken for y", "g * y", "g * x"),),
    "log.vjp": (("y is taken for x", "g / x", "g / y"),),
    "log1p.vjp": (("the 1 is forgotten", "(1 + x)", "x"),),
    "sqrt.vjp": (
        ("x is taken for y", "2 * y", "2 * x"),
        ("the 2 is forgotten", "2 * y", "y"),
        (
            "second derivatives take y for a constant",
            "2 * y",
            "2 * getattr(y, 'detach', lambda: y)()",
        ),
    ),
    "sin.vjp": (("y is taken for x", "xp.cos(x)", "xp.cos(y)"),),
    "cos.vjp": (("the sign is lost", "-g", "g"),),
    "erfc.forward": (
        ("negative x are not reflected", "xp.where(x < 0, 2 - tail, tail)", "tail"),
        ("one coefficient of 26 is left out", "for c in _ERFC", "for c in _ERFC[1:]"),
    ),
    "erfc.vjp": (
        ("π for √π", "math.sqrt(math.pi)", "math.pi"),
        ("another Gaussian: e^(-x²/2)", "-x * x", "-x * x / 2"),
    ),
    "tanh.vjp": (
        ("x is taken for y", "y * y", "x * x"),
        ("y is not squared", "1 - y * y", "1 - y"),
    ),
    "sigmoid.forward": (
        (
            "e^x overflows",
            "xp.where(x < 0, x, -x))  # e^-|x| never overflows\n"
            "    return xp.where(x < 0, e, 1.0) / (1 + e)",
            "x)\n    return e / (1 + e)",
        ),
    ),
    "sigmoid.vjp": (("x is taken for y", "(1 - y)", "(1 - x)"),),
    "relu.vjp": (
        ("the kink counts as positive", "x <= 0", "x < 0"),
        ("the sign of g decides, not that of x", "x <= 0", "g <= 0"),
        ("a float64 zero makes everything float64", "0.0, g", "xp.zeros(()), g"),
    ),
    "silu.vjp": (
        ("the product rule's second term is missing", "(s + y * (1 - s))", "s"),
        ("x is taken for y", "y * (1", "x * (1"),
        (
            "second derivatives take σ for a constant",
            "sigmoid(x)",
            "sigmoid(getattr(x, 'detach', lambda: x)())",
        ),
    ),
    "gelu.vjp": (
        ("√π for √(2π)", "2 * math.pi", "math.pi"),
        ("the product rule forgets x", "x * phi", "phi"),
        ("erf's 1/√2 is forgotten", "-x / math.sqrt(2)", "-x"),
    ),
    "gelu_tanh.vjp": (
        ("0.0447 for 0.044715", "(x + 0.044715", "(x + 0.0447"),
        ("the 3 of x³ does not come down", "3 * 0.044715", "0.044715"),
        ("tanh is not squared", "1 - t * t", "1 - t"),
    ),
    "where.vjp": (
        ("b gets g everywhere", "xp.where(c, 0.0, g)", "g"),
        ("the sides are exchanged", "xp.where(c, g, 0.0)", "xp.where(c, 0.0, g)"),
        ("a float64 zero makes everything float64", "g, 0.0", "g, xp.zeros(())"),
    ),
    "maximum.vjp": (("at a tie both get all of g", "g / 2", "g"),),
    "minimum.vjp": (
        (
            "the larger one gets g",
            "a < b, g, tie), xp.where(a > b",
            "a > b, g, tie), xp.where(a < b",
        ),
        ("at a tie both get all of g", "g / 2", "g"),
    ),
    "abs.vjp": (("the slope at 0 is -1", "xp.where(x < 0, -g, 0.0)", "-g"),),
    "clip.vjp": (
        ("what lies on the lower bound gets nothing", "x < low", "x <= low"),
        ("a bound of 0 counts as none", "low is None", "not low"),
        ("g passes above the upper bound", "xp.where(x > high, 0.0, u)", "u"),
    ),
    "dropout.vjp": (("g is not dropped", "keep * g", "g"),),
    "cast.vjp": (("rounds to float32 on the way", "(g,)", "(xp.astype(g, xp.float32),)"),),
}

_LINEAR = {
    "matmul.vjp": (
        ("b̄ is transposed", "xp.matrix_transpose(a) @ g", "xp.matrix_transpose(g) @ a"),
        ("b is not transposed", "xp.matrix_transpose(b)", "b"),
    ),
    "linear.vjp": (
        ("b̄ is a mean over the rows", "x_rows, g", "x_rows, g / n"),
        (
            "w̄ is transposed",
            "xp.matrix_transpose(g_rows) @ x_rows",
            "xp.matrix_transpose(x_rows) @ g_rows",
        ),
    ),
}

_LOSS = {
    "cross_entropy.forward": (
        ("the integer count makes the loss float64", "xp.astype(K, x.dtype)", "K"),
        (
            "e^x overflows",
            "xp.logsumexp(x, keepdims=True)",
            "xp.log(xp.sum(xp.exp(x), axis=-1, keepdims=True))",
        ),
    ),
    "cross_entropy.vjp": (
        ("the one-hot matrix is missing", "P - xp.astype(H, x.dtype)", "P"),
        ("ignored rows get a gradient", "xp.where(K, ", "xp.where(K == K, "),
        ("ignored rows count in the mean", "g / N", "g / x.shape[0]"),
        ("the mean is taken for a sum", "g / N", "g"),
        ("the logits are shifted in place", "P = xp.exp(x - L)", "x -= L\n    P = xp.exp(x)"),
        (
            "second derivatives take L for a constant",
            "exp(x - L)",
            "exp(x - getattr(L, 'detach', lambda: L)())",
        ),
    ),
    "binary_cross_entropy.vjp": (
        ("the sign is wrong", "(p - t)", "(t - p)"),
        ("the mean is taken for a sum", "g / n", "g"),
        ("the denominator is forgotten", " / xp.maximum(p * (1 - p), 1e-12)", ""),
    ),
    "binary_cross_entropy_with_logits.forward": (
        (
            "e^x overflows",
            "xp.where(x < 0, 0.0, x) + xp.log1p(xp.exp(minus_abs))",
            "xp.log1p(xp.exp(x))",
        ),
    ),
    "binary_cross_entropy_with_logits.vjp": (("x for σ(x)", "xp.sigmoid(x) - t", "x - t"),),
    "mse_loss.vjp": (
        ("the 2 is forgotten", "2 / n", "1 / n"),
        ("t̄ has the sign of x̄", "-x_bar", "x_bar"),
    ),
}

_NORM = {
    "layer_norm.forward": (
        ("ε is added to √var, not to var", "keepdims=True) + eps)", "keepdims=True)) + eps"),
        ("μ is saved for the first row alone", "(mu, r)", "(mu[:1], r)"),
    ),
    "layer_norm.vjp": (
        ("μ counts as a constant", "- xp.mean(u, axis=-1, keepdims=True)", ""),
        ("var counts as a constant", "- x_hat * xp.mean(u * x_hat, axis=-1, keepdims=True)", ""),
        ("the weights are forgotten", "u = g * w", "u = g"),
        ("x̄ is not scaled by r", "r * (", "("),
        ("w̄ is that of x, not of x̂", "g * x_hat", "g * x"),
    ),
    "rms_norm.vjp": (
        ("r counts as a constant", " - x_hat * xp.mean(u * x_hat, axis=-1, keepdims=True)", ""),
        ("a mean over everything", "axis=-1, keepdims=True", "keepdims=True"),
        ("g is multiplied in place", "u = g * w", "u = g\n    u *= w"),
    ),
}

_REDUCE = {
    "sum.vjp": (
        ("keepdims=False is forgotten", "y.shape if keepdims else _kept(x.shape, axis)", "y.shape"),
        ("the mean is taken for the sum", "(g, x.shape)", "(g / len(x), x.shape)"),
    ),
    "sum._kept": (("negative axes are not counted from the end", "i % len(shape)", "i"),),
    "mean.vjp": (
        (
            "n counts the last axis alone",
            "math.prod(x.shape) / (math.prod(y.shape) or 1)",
            "x.shape[-1]",
        ),
        ("the sum is taken for the mean", "g / n", "g"),
    ),
    "max.vjp": (
        ("each of several largest gets all", " / xp.sum(C, axis=axis, keepdims=True)", ""),
        ("only the largest of all gets anything", "xp.reshape(y, shape)", "xp.max(y)"),
    ),
    "min.vjp": (
        ("equals are counted over all axes", "xp.sum(C, axis=axis, keepdims=True)", "xp.sum(C)"),
        (
            "a count of booleans makes everything float64",
            "xp.astype(x == xp.reshape(y, shape), x.dtype)",
            "x == xp.reshape(y, shape)",
        ),
    ),
    "logsumexp.forward": (
        (
            "e^x overflows",
            "m = xp.max(x, axis=axis, keepdims=True)",
            "m = 0.0 * xp.max(x, axis=axis, keepdims=True)",
        ),
    ),
    "logsumexp.vjp": (("e^x is not normalised", "x - xp.reshape(y, shape)", "x"),),
    "softmax.forward": (("e^x overflows", "x - xp.max(x, axis=axis, keepdims=True)", "x"),),
    "softmax.vjp": (
        ("the sum is missing", " - xp.sum(g * y, axis=axis, keepdims=True)", ""),
        ("the sum forgets y", "xp.sum(g * y,", "xp.sum(g,"),
        ("the sum is over the last axis, whatever axis is", "axis=axis,", "axis=-1,"),
        (
            "second derivatives take y for a constant",
            "(y * (",
            "(getattr(y, 'detach', lambda: y)() * (",
        ),
    ),
    "log_softmax.forward": (("e^x overflows", "x - xp.max(x, axis=axis, keepdims=True)", "x"),),
    "log_softmax.vjp": (
        ("Σ(g) is missing", "xp.exp(y) * xp.sum(g, axis=axis, keepdims=True)", "xp.exp(y)"),
        ("log P is taken for P", "xp.exp(y)", "y"),
    ),
}

_SHAPE = {
    "reshape.vjp": (
        (
            "the elements come back column by column",
            "xp.reshape(g, x.shape)",
            "xp.permute_dims(xp.reshape(g, x.shape[::-1]), (2, 1, 0))",
        ),
    ),
    "permute_dims._inverse": (
        ("the permutation is not inverted", "inverse[axis] = i", "inverse[i] = axis"),
    ),
    "matrix_transpose.vjp": (
        ("reshaped instead of transposed", "xp.matrix_transpose(g)", "xp.reshape(g, x.shape)"),
    ),
    "expand_dims.vjp": (("the new axis is left to broadcasting", "xp.reshape(g, x.shape)", "g"),),
    "squeeze.vjp": (
        (
            "the elements come back column by column",
            "xp.reshape(g",
            "xp.reshape(xp.matrix_transpose(g)",
        ),
    ),
    "broadcast_to.vjp": (
        ("a mean over the copies", "(g,)", "(g * math.prod(x.shape) / (math.prod(y.shape) or 1),)"),
    ),
    "tril.vjp": (
        ("k is forgotten", "g, k=k", "g"),
        ("the diagonal is left out", "k=k", "k=k - 1"),
    ),
    "triu.vjp": (
        ("the lower triangle", "xp.triu", "xp.tril"),
        ("k counts downwards", "k=k", "k=-k"),
    ),
    "getitem.vjp": (("every row gets the first row's", "xp.put(g,", "xp.put(g[:1],"),),
    "put.vjp": (("the rows come back upside down", "g[key]", "xp.flip(g[key], axis=0)"),),
    "concat.vjp": (
        ("all arrays get the first piece", "slice(i, j)", "slice(0, j - i)"),
        ("each piece lacks its last column", "slice(i, j)", "slice(i, j - 1)"),
        ("a negative axis is not counted from the end", "axis % len(y.shape)", "axis"),
    ),
    "stack.vjp": (("all arrays get the first slice", ", i, ...", ", 0, ..."),),
    "embedding.vjp": (
        (
            "a word that comes twice is written, not added",
            "xp.scatter_add(g, t, rows=w.shape[0])",
            "xp.put(g, key=(t,), shape=w.shape)",
        ),
        (
            "the first row gets nothing: taken for padding",
            "xp.scatter_add(g, t",
            "xp.scatter_add(g * (t != 0)[..., None], t",
        ),
    ),
    "scatter_add.vjp": (
        ("the row below", "xp.embedding(g, t)", "xp.embedding(g, (t + 1) % rows)"),
    ),
    "gather.vjp": (
        (
            "all goes where the first index points",
            "scatter(g, t,",
            "scatter(g, t[..., :1] + 0 * t,",
        ),
        ("indices that repeat are averaged", "xp.scatter(g, t,", "xp.scatter(g / t.shape[-1], t,"),
    ),
    "rope.vjp": (
        ("turned further, not back", "-sin", "sin"),
        ("turned in the other layout", "interleaved=interleaved)", "interleaved=not interleaved)"),
    ),
    "scatter.vjp": (("counted from the end", "xp.gather(g, t)", "xp.gather(g, size - 1 - t)"),),
}

_KERNELS = {
    "kernel attention._hide": (("the mask starts at the first key", "n - block :", ":block"),),
    "kernel attention._dropped": (
        (
            "dropout changes the saved E",
            "E * D[h][..., i, :n]",
            "np.multiply(E, D[h][..., i, :n], out=E)",
        ),
    ),
    "kernel attention.forward": (("large scores overflow", "_are_moderate(s)", "True"),),
    "kernel attention.vjp": (
        ("softmax's sum is missing", "np.vecdot(gi, y[h][..., i, :] * scale)[..., None]", "0"),
        ("the saved E is overwritten", "S_bar *= E", "S_bar = np.multiply(E, S_bar, out=E)"),
        (
            "each block of queries replaces k̄ of the last",
            "k_bar[h][..., :n, :] +=",
            "k_bar[h][..., :n, :] =",
        ),
        (
            "E that is computed again is not scaled",
            "_scaled_transpose(k[h], scale)",
            "_scaled_transpose(k[h], 1)",
        ),
        ("S̄ is not scaled throughout", "y[h][..., i, :] * scale", "y[h][..., i, :]"),
    ),
    "kernel attention.accepts": (("a mask is accepted and ignored", "M is True and ", ""),),
    "kernel gelu_tanh.vjp": (
        ("only the first block is computed", "in_cache(x.size)", "in_cache(x.size)[:1]"),
        ("0.0447 for 0.044715", "d *= 3 * 0.044715", "d *= 3 * 0.0447"),
        ("the saved tanh is overwritten", "d += ti\n        d += 1", "ti += 1\n        d += ti"),
        ("the memory's order, not the elements'", "flat(g)", "g.ravel('K')"),
    ),
    "kernel linear.weight_gradients": (
        ("b̄ is a mean over the rows", "np.matmul(ones,", "np.matmul(ones / len(g),"),
        ("w̄ is that of |x|", "np.matmul(g[:, j].T, x,", "np.matmul(g[:, j].T, abs(x),"),
    ),
    "kernel cross_entropy.forward": (
        ("ignored rows count in the mean", "type(len(rows))", "type(len(t))"),
    ),
    "kernel cross_entropy._exponentials": (
        ("large logits overflow", "subtract(x, m, out=E)", "copyto(E, x)"),
    ),
    "kernel cross_entropy.vjp": (
        ("the saved P is overwritten", "P * share_of_each", "np.multiply(P, share_of_each, out=P)"),
        ("ignored rows get a gradient", "len(rows) < len(t)", "False"),
    ),
    "kernel layer_norm.forward": (("b is not added", "c += b", "pass"),),
    "kernel layer_norm.vjp": (
        ("μ counts as a constant", "c += (gi @ w_mean)[:, None]", "pass"),
        ("w̄ is that of c, not of x̂", "ri[:, 0] @ u", "np.ones(len(u), u.dtype) @ u"),
        ("x is centred in place", "rows[i] - mu[i]", "np.subtract(rows[i], mu[i], out=rows[i])"),
        ("g is multiplied in place", "w, out=u)", "w, out=g[i])"),
    ),
    "kernel rms_norm.vjp": (
        (
            "the weights are forgotten in the mean",
            "(u @ w_mean)[:, None]",
            "(u @ np.full(n, 1 / n, u.dtype))[:, None]",
        ),
        ("w̄ is that of x, not of x̂", "ri[:, 0] @ u", "np.ones(len(u), u.dtype) @ u"),
    ),
    "kernel softmax.forward": (("e^x overflows", "is_moderate(rows[i])", "True"),),
    "kernel softmax.vjp": (
        ("the sum is missing", "np.vecdot(g[i], y[i])[:, None]", "0"),
        ("the result is overwritten", "out=x_bar[i])", "out=g[i])"),
    ),
    "kernel getitem.vjp": (("writes where it should add", "+= g", "= g"),),
    "kernel embedding._add_rows": (
        ("a word that comes twice counts once", "np.add.at(y, t, x)", "y[t] += x"),
        ("a long row is written, not added", "y[i] += row", "y[i] = row"),
        ("what was there before is lost", "y += (np", "y[:] = (np"),
    ),
    "kernel scatter_add.vjp": (("the row above", "np.take(g, t,", "np.take(g, t - 1,"),),
    "kernel gather._add_along_last": (
        ("all rows are added into the first", "(first + t)", "(0 * first + t)"),
    ),
    "kernel scatter.vjp": (("the column on the left", "(g, t,", "(g, t - 1,"),),
}

_IN_THE_ENGINE = {
    "tensor._sum_down": (
        ("a mean over the copies", "xp.sum(", "xp.mean("),
        (
            "only the first of the copies counts",
            "xp.sum(g, axis=repeated, keepdims=True)",
            "g[tuple(slice(1 if i in repeated else None) for i in range(len(g.shape)))]",
        ),
        ("axes of length 1 are left as they are", "if n == 1 and", "if False and"),
    ),
    "tensor._fit": (
        (
            "broadcasting is undone only for new axes",
            "if g.shape != x.shape",
            "if len(g.shape) > len(x.shape)",
        ),
        ("a gradient keeps the dtype of the output", "else g.astype(x.dtype)", "else g"),
    ),
    "tensor._own": (("a borrowed array is not copied", "gradient.copy()", "gradient"),),
    "tensor._walk": (
        (
            "the second contribution replaces the first",
            "arrived[j] = arrived[j] + g",
            "arrived[j] = g",
        ),
        ("the third contribution is lost", "arrived[j] += g", "pass"),
        (
            "adds in place to an array that others hold",
            "arrived[j] = arrived[j] + g",
            "arrived[j] += g",
        ),
        (
            "borrowed arrays count as its own",
            "arrived[j] = g\n                    if fresh:",
            "arrived[j] = g\n                    if not create_graph:",
        ),
        ("the oldest comes first", "queue, (-x._age", "queue, (x._age"),
        ("functions that add are not called", "g(arrived[j])", "pass"),
        (
            "functions that add start from zero again",
            "_own(arrived.get(j), x.data)",
            "_own(None, x.data)",
        ),
    ),
    "tensor._seed": (
        (
            "every gradient starts as ones",
            "array.astype(root.dtype, copy=False)",
            "np.ones_like(array)",
        ),
    ),
    "tensor._vjp": (
        ("only Tensors of the graph count as asked for", "x.requires_grad and (", "x._node and ("),
    ),
    "tensor._vjp_on_the_tape": (
        (
            "what was saved is a constant for second derivatives",
            "op.forward(xp, *inputs, **attributes)[1]",
            "node[3]",
        ),
        (
            "y is a constant for second derivatives",
            "gradient, tensor,",
            "gradient, tensor.detach(),",
        ),
    ),
    "tensor.Tape._applied": (
        (
            "nothing is recorded",
            "apply(op, *arrays",
            "apply(op, *[a.data if isinstance(a, Tensor) else a for a in arrays]",
        ),
    ),
    "tensor.apply": (
        ("a kernel's refusal is ignored", "implementation = backend.MATHS[op]", "pass"),
        (
            "only the last Tensor decides about recording",
            "recorded or a.requires_grad",
            "a.requires_grad",
        ),
    ),
    "backend.ComplexStep._extremum": (("equal maxima are not averaged", " / count", ""),),
    "backend.ComplexStep.__array_ufunc__": (
        (
            "comparisons look at the complex step, too",
            "a.real for a in arrays",
            "a for a in arrays",
        ),
    ),
}

MUTANTS = tuple(
    Mutant(name, where, old, new)
    for part in (
        _ATTENTION, _ELEMENTWISE, _LINEAR, _LOSS, _NORM, _REDUCE, _SHAPE, _KERNELS, _IN_THE_ENGINE,
    )
    for where, mistakes in part.items()
    for name, old, new in mistakes
)  # fmt: skip
