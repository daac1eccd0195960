"""What rounding amounts to: arithmetic in which every result is off by a random rounding.

A tolerance that knows only the result cannot know of large terms that cancelled on the way to it.
Run the same lines a few times with every intermediate result disturbed in its last digit, and the
spread of the results is the error that cannot be helped (stochastic arithmetic, Vignes 1974).
"""

import numpy as np

from .. import backend

_EPS = np.finfo(np.float64).eps
_RUNS = 8
_EXACT = {
    np.maximum, np.minimum, np.fmax, np.fmin, np.negative, np.positive, np.absolute, np.fabs,
    np.sign, np.copysign, np.floor, np.ceil, np.rint, np.trunc, np.conjugate,
}  # fmt: skip

# Disturbances are this many roundings large, and the spread is divided by it. What grows in
# proportion is rounding; where a branch flips (a tie that is no longer one), the jump is not taken
# for rounding.
AMPLIFIED = 2.0**20


class Disturbed(np.ndarray):
    """float64 numbers; what a ufunc computes from them is multiplied by 1 + 2²⁰ ε N(0, 1)."""

    rng = np.random.default_rng(0)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **keywords):
        if out is not None:
            keywords["out"] = tuple(np.asarray(o) for o in out)
        result = getattr(ufunc, method)(*[np.asarray(a) for a in inputs], **keywords)
        if not _is_float64(result):
            return result
        if ufunc not in _EXACT:
            size = AMPLIFIED * _EPS
            factor = 1 + size * self.rng.standard_normal(np.shape(result))
            result = np.multiply(result, factor, out=keywords.get("out", (None,))[0])
        return np.asarray(result).view(Disturbed) if out is None else out[0]

    def __array_function__(self, function, types, args, keywords):
        """where, concatenate, ... would give plain arrays, and all that follows would be exact."""
        return _disturbed(super().__array_function__(function, types, args, keywords))


def spread(compute, arrays):
    """How far each element of each array of the list compute(arrays) moves when everything computed
    from `arrays` is off by a rounding: the largest absolute differences over 8 runs, as a list of
    arrays. The ops' own lines are run, no kernels.
    """
    with backend.using(backend.MATHS), np.errstate(all="ignore"):
        Disturbed.rng = np.random.default_rng(0)  # whatever ran before, the same result
        here = [np.asarray(a) for a in compute(arrays)]
        found = [np.zeros(a.shape) for a in here]
        for _ in range(_RUNS):
            moved = compute([_disturbed(a) for a in arrays])
            gaps = [np.abs(np.asarray(m) - a) for m, a in zip(moved, here)]
            found = [np.fmax(f, gap) for f, gap in zip(found, gaps)]
    return [f / AMPLIFIED for f in found]


def _disturbed(a):
    return np.asarray(a).view(Disturbed) if _is_float64(a) else a


def _is_float64(a):
    return isinstance(a, np.ndarray | np.generic) and a.dtype == np.float64
