"""Which planted bugs does a gradient checker find? PyTorch's gradcheck, slow and fast, and ours, on
the same wrong ops at the same inputs; and how often each of them accuses a right one.

There is no second implementation: PyTorch is given our op as a torch.autograd.Function, whose
forward and backward are the op's own lines, read with PyTorch as their array namespace.
"""

import copy
import functools
import itertools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import array_api_compat.torch
import hypothesis
import numpy as np
import torch
from hypothesis import Phase

from tinygrad_llm import backend
from tinygrad_llm.check import Call, LawError, arguments, gradcheck, laws
from tinygrad_llm.check.mutants import MUTANTS, Mutant, forgotten, verdict
from tinygrad_llm.ops import TABLE

from .report import Table, duration

_TORCH = backend.Space(array_api_compat.torch)
_TOO_BIG = 4096  # elements of the inputs: slow mode calls the function twice for each of them
_MARKS = {True: "✓", False: "✗", None: "too big"}


# --- the checkers ---------------------------------------------------------------------------------


def in_torch(call: Call) -> tuple[Callable, list[torch.Tensor]]:
    """(f, xs): the call as a function of torch.Tensors, with the op's own vjp as its backward."""
    op, free = call.op, call.free
    arrays = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in call.arrays]

    def given(xs):
        return (dict(enumerate(arrays)) | dict(zip(free, xs))).values()

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *xs):
            y = op.forward(_TORCH, *given(xs), **call.attributes)
            y, ctx.extra = (y[0], {"saved": y[1]}) if op.saves else (y, {})
            ctx.xs, ctx.y = xs, y
            return y.clone()  # it may be an input, or a view of one

        @staticmethod
        def backward(ctx, g):
            found = op.vjp(_TORCH, g, ctx.y, *given(ctx.xs), **call.attributes, **ctx.extra)
            return tuple(found[i].sum_to_size(x.shape) for i, x in zip(free, ctx.xs))

    return Function.apply, [arrays[i].requires_grad_() for i in free]


def _torch_accuses(call, fast_mode):
    if not fast_mode and sum(call.arrays[i].size for i in call.free) > _TOO_BIG:
        return None
    f, xs = in_torch(call)
    try:
        with warnings.catch_warnings(action="ignore"):
            return not torch.autograd.gradcheck(f, xs, fast_mode=fast_mode, raise_exception=False)
    except Exception:
        return True  # whoever runs it will notice


def _ours_accuses(call):
    f, xs = call.function()
    try:
        with backend.using(backend.MATHS):
            gradcheck(f, *xs)
    except Exception:
        return True
    return False


CHECKERS = {
    "PyTorch slow": functools.partial(_torch_accuses, fast_mode=False),
    "PyTorch fast": functools.partial(_torch_accuses, fast_mode=True),
    "our gradcheck": _ours_accuses,
}


# --- what they are tried on -----------------------------------------------------------------------


def cases(op, count: int) -> list[tuple[bool, Call]]:
    """Calls of the op: (whether at ties and kinks, call), by turns."""
    both = [[(ties, call) for call in _drawn(op, ties, (count + 1) // 2)] for ties in (False, True)]
    return [one for pair in zip(*both) for one in pair][:count]


def _drawn(op, ties, count):
    """Calls that differ in their attributes and in which optional arrays are there, as they can."""
    found = []

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=10 * count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(arguments(op, ties=ties, max_side=3))
    def collect(case):
        call = Call(op, backend.MATHS, tuple(case[0]), case[1])
        if all(np.size(a) for a in call.arrays) and _torch_can(call):
            found.append(call)

    collect()
    found.sort(key=lambda call: sum(map(np.size, call.arrays)), reverse=True)
    kinds = {}
    for call in found:
        kinds.setdefault(_kind(call), []).append(call)
    by_turns = [call for turn in itertools.zip_longest(*kinds.values()) for call in turn if call]
    return list(itertools.islice(itertools.cycle(by_turns), count))


def _kind(call):
    return str(call.attributes), *(isinstance(a, np.ndarray) for a in call.arrays)


def _torch_can(call):
    """PyTorch has no negative steps in slices."""
    keys = call.attributes.get("key", ())
    return not any(isinstance(k, slice) and (k.step or 1) < 0 for k in keys)


@dataclass
class Accused:
    """What the checkers say of the right op, case by case, and how long they take."""

    verdicts: dict[str, list[bool]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def right_op(calls, clock) -> Accused:
    result = Accused()
    for name, accuses in CHECKERS.items():
        said, seconds = [], []
        for _, call in calls:
            start = clock()
            said.append(bool(accuses(call)))
            seconds.append(clock() - start)
        result.verdicts[name], result.seconds[name] = said, seconds
    return result


def caught(mutant: Mutant, calls, right: Accused) -> dict[str, bool]:
    """Whether each checker accuses the wrong op in a case in which it spares the right one."""
    with mutant.planted() as [(op, reading)]:
        wrong = [Call(op, reading, call.arrays, call.attributes) for _, call in calls]
        return {
            name: any(
                not alarm and bool(accuses(_fresh(call)))
                for alarm, call in zip(right.verdicts[name], wrong)
            )
            for name, accuses in CHECKERS.items()
        }


def _fresh(call):
    """The call with arrays of its own: some mutants write to them."""
    return call.on(np.array(a) if isinstance(a, np.ndarray) else a for a in call.arrays)


# --- the benchmark --------------------------------------------------------------------------------


def measure_bugs(names: list[str], count: int, clock, say) -> tuple[dict, list[Table], list[str]]:
    """Tries every checker on every bug that is planted by hand in the ops of these names."""
    bugs, alarms, seconds = [], [], {name: [] for name in [*CHECKERS, "all laws"]}
    for name in names:
        say(f"checking {name}")
        calls = cases(TABLE[name], count)
        right = right_op(calls, clock)
        start = clock()
        accused_by_laws = _broken(TABLE[name], count)
        seconds["all laws"].append((clock() - start) / count)
        for checker, times in right.seconds.items():
            seconds[checker] += times
        alarms.append({"op": name, **_alarms(calls, right), "all laws": accused_by_laws})
        for mutant in _planted_in(name):
            law = verdict(mutant, examples=count).law
            found = {**caught(mutant, calls, right), "all laws": law is not None}
            bugs.append({"where": mutant.where, "bug": mutant.name, "law": law, "found": found})
    data = {
        "bugs": bugs,
        "false_alarms": alarms,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
    }
    return data, [_table_of_bugs(bugs), _summary(data)], _notes(data, count)


def _planted_in(name):
    """The bugs planted by hand in the op's own lines, not in its kernel."""
    return [m for m in MUTANTS if m.subject == name and not m.where.startswith("kernel ")]


def _broken(op, count):
    """The laws that the right op is said to break."""
    found = []
    for trial in laws(op, backend.MATHS, examples=count, shrink=False):
        try:
            trial()
        except LawError:
            found.append(trial.law.name)
    return found


def _alarms(calls, right):
    """In how many smooth cases, and in how many with ties, each checker accuses the right op."""
    return {
        name: {
            kind: sum(said for said, (ties, _) in zip(verdicts, calls) if ties is with_ties)
            for kind, with_ties in (("smooth", False), ("ties", True))
        }
        for name, verdicts in right.verdicts.items()
    }


def _table_of_bugs(bugs):
    columns = ["bug", "slow", "fast", "ours", "laws", "by the law"]
    table = Table(
        "Planted bugs: PyTorch's gradcheck slow and fast, our gradcheck, all laws", columns
    )
    for bug in bugs:
        marks = [_MARKS[found] for found in bug["found"].values()]
        table.rows.append([f"{bug['where']}: {bug['bug']}", *marks, bug["law"] or ""])
    return table


def _summary(data):
    """Totals: bugs of both kinds, right ops that are accused, and the time of a check."""
    checkers = [*CHECKERS, "all laws"]
    other = [bug for bug in data["bugs"] if bug["law"] not in (None, "derivative", "ties")]
    first = [bug for bug in data["bugs"] if bug not in other]
    table = Table("In sum", ["", *checkers])
    for title, bugs in (("wrong derivatives found", first), ("other bugs found", other)):
        scores = [sum(bug["found"][name] for bug in bugs) for name in checkers]
        table.rows.append([title, *(f"{score} of {len(bugs)}" for score in scores)])
    for title, kind in (("right ops accused", "smooth"), ("the same at kinks and ties", "ties")):
        scores = [sum(op[name][kind] > 0 for op in data["false_alarms"]) for name in CHECKERS]
        laws = sum(
            any((law == "ties") == (kind == "ties") for law in op["all laws"])
            for op in data["false_alarms"]
        )
        count = len(data["false_alarms"])
        table.rows.append([title, *(f"{score} of {count}" for score in [*scores, laws])])
    table.rows.append(["time for a case", *(duration(data["seconds"][name]) for name in checkers)])
    return table


def _notes(data, count):
    return [
        "Which bugs count as wrong derivatives is decided by the law that finds them, and the laws "
        "were made until they found all of these bugs: the last column is no news, the others are.",
        f"Each checker gets {count} cases of each op, half of them at kinks and ties; each law "
        "draws as many of its own. A bug is found if the wrong op is accused in a case in which "
        "the right op is not.",
        "Other bugs: wrong second derivatives (PyTorch has gradgradcheck for them, not run here), "
        "overflow, dtypes, arrays written in place. A gradient checker is not made to find them.",
        "time for a case: the median over the right ops; for the laws, all of them together.",
    ]


# --- large arrays ---------------------------------------------------------------------------------


def _with_zeros(name, key):
    """The op with a vjp that leaves zeros in the first gradient."""
    op = copy.copy(TABLE[name])
    right = op.vjp

    @functools.wraps(right)
    def vjp(xp, g, *arrays, **keywords):
        first, *others = right(xp, g, *arrays, **keywords)
        kept = np.ones(first.shape)
        kept[key] = 0
        return first * xp.asarray(kept), *others

    op.vjp = vjp
    return op


def _gelu_with_0447():
    """The planted bug whose wrong digits are the last ones."""
    (mutant,) = [m for m in MUTANTS if m.where == "gelu_tanh.vjp" and "0.0447" in m.name]
    with mutant.planted() as [(op, _)]:
        return op


def measure_sizes(clock) -> tuple[list[dict], Table]:
    """The same for a few bugs in large arrays."""
    rng = np.random.default_rng(0)
    x, logits = rng.standard_normal(10_000), rng.standard_normal((32, 2048))
    square, targets = {"exponent": 2}, rng.integers(0, 2048, 32)
    bugs = {
        "x², n = 10,000: all zero": (_with_zeros("power", ...), [x], square),
        "x², n = 10,000: one element zero": (_with_zeros("power", 37), [x], square),
        "cross_entropy, 32 x 2048: the last 17 columns zero": (
            _with_zeros("cross_entropy", np.s_[:, -17:]),
            [logits, targets],
            {},
        ),
        "gelu_tanh, n = 40: 0.0447 for 0.044715": (_gelu_with_0447(), [x[:40]], {}),
    }
    table, rows = Table("Bugs in large arrays", ["bug", *CHECKERS]), []
    for bug, (op, arrays, attributes) in bugs.items():
        call = Call(op, backend.MATHS, tuple(arrays), attributes)
        found, cells = {}, []
        with forgotten(op):
            for name, accuses in CHECKERS.items():
                start = clock()
                found[name] = accuses(_fresh(call))
                time = f" {duration(clock() - start)}" if found[name] is not None else ""
                cells.append(_MARKS[found[name]] + time)
        table.rows.append([bug, *cells])
        rows.append({"bug": bug, "found": found})
    return rows, table
