"""Everything random in the library comes from here, so that a seed repeats a run exactly.

The stream is that of PyTorch on a CPU: the same seed gives the same weights, masks and orders, and
so the numbers that are printed in books. It is made of

    words       32 bits each, of the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998)
    uniform     the lowest 24 bits of a word, times 2⁻²⁴; in float64 the lowest 53 bits of two
                words, the first of them the higher, times 2⁻⁵³
    normal      pairs of them from pairs of uniform numbers (Box and Muller, 1958)
    choices     True if a uniform number is below p; an index by an exponential race, or by a
                search in the sums of the probabilities

Where PyTorch is built with Intel's MKL, as on Linux, it draws the masks of one p and the races
otherwise: for these the stream is that of its other builds, macOS among them.
"""

import contextlib
import math
import operator
import threading

import numpy as np

from .tensor import Tensor

_CHUNK = 1 << 20  # numbers at a time: the words they are made of need little memory


class Generator:
    """A stream of random numbers with a seed, and a state that can be saved and restored."""

    def __init__(self, seed=0):
        self.manual_seed(seed)

    def manual_seed(self, seed):
        """Starts the stream again from `seed`, a non-negative integer whose lowest 32 bits count;
        returns the generator.
        """
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"a seed is a non-negative integer, not {seed!r}")
        twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)._bit_generator
        self._numpy = np.random.Generator(twister)
        self._spare = None  # the second normal number of a pair, until it is asked for
        return self

    def get_state(self):
        """The state of the stream, as JSON can hold it."""
        twister = self._numpy.bit_generator.state["state"]
        key = twister["key"].astype("<u4").tobytes().hex()
        return {
            "generator": "MT19937",
            "key": key,
            "pos": int(twister["pos"]),
            "spare": self._spare,
        }

    def set_state(self, state):
        """Continues where get_state() was called. ValueError for what is no state."""
        try:
            key = np.frombuffer(bytes.fromhex(state["key"]), "<u4")
            pos, spare = operator.index(state["pos"]), state["spare"]
            if state["generator"] != "MT19937" or key.shape != (624,) or not 0 <= pos <= 624:
                raise ValueError("not of MT19937")
            if spare is not None and not math.isfinite(spare):
                raise ValueError(f"its spare number is {spare}")
            twister = {"key": key, "pos": pos}
            self._numpy.bit_generator.state = {"bit_generator": "MT19937", "state": twister}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no state of a random generator: {error}") from None
        self._spare = spare

    # --- numbers ----------------------------------------------------------------------------------

    def uniform(self, low, high, shape, dtype=np.float32):
        """Uniform numbers, an array of float32 or float64: low + (high - low) u, u in [0, 1).

        They are below high but for rounding: in float32, 1 + (1 - 2⁻²⁴) is 2.
        """
        dtype, low, high = _float(dtype), _number("low", low), _number("high", high)
        if not 0 <= high - low <= float(np.finfo(dtype).max):
            raise ValueError(f"there are no uniform numbers of {dtype} from {low} to below {high}")
        low, high = dtype.type(low), dtype.type(high)
        # In float64, and rounded once, as by the processor's fused multiply-add.
        width, low = np.float64(high - low), np.float64(low)
        return self._fill(shape, dtype, lambda n: self._uniform(n, dtype) * width + low)

    def normal(self, mean, std, shape, dtype=np.float32):
        """Normal numbers, an array of float32 or float64.

        16 and more are made in blocks of 16 uniform numbers u: r = √(-2 log(1 - u_j)) for the first
        half, the angle 2π u_{j+8} for the second; if the last block is not full, the last 16 are
        drawn again. Fewer are made one by one, each pair of two float64 u, u': with
        r = √(-2 log(1 - u')), r cos 2πu is the number, and r sin 2πu the next one.
        """
        dtype, shape = _float(dtype), _shape(shape)
        mean, std = _number("mean", mean), _number("std", std)
        if not std >= 0:
            raise ValueError(f"a standard deviation is 0 or more, not {std}")
        n = math.prod(shape)
        if n < 16:
            x = np.array([self._one_normal() * std + mean for _ in range(n)], np.float64)
            return x.astype(dtype).reshape(shape)
        x = self._fill((n,), dtype, lambda n: _box_muller(self._uniform(n, dtype)))
        if n % 16:
            x[-16:] = _box_muller(self._uniform(16, dtype))
        return (x * dtype.type(std) + dtype.type(mean)).astype(dtype, copy=False).reshape(shape)

    def bernoulli(self, p, shape):
        """True with probability p, an array of booleans."""
        _check_probabilities(p)
        return self._fill(shape, bool, lambda n: self._uniform(n, np.float64) < p)

    def integers(self, low, high, size):
        """Integers in low..high-1, an array of int64."""
        low, high = operator.index(low), operator.index(high)
        if not low < high:
            raise ValueError(f"there is no integer from {low} to below {high}")
        draw = self.words if high - low < 1 << 28 else self._double_words
        span = np.uint64(high - low)
        return self._fill(size, np.int64, lambda n: (draw(n) % span).astype(np.int64) + low)

    def permutation(self, n):
        """0..n-1 in random order, an array of int64: each place in turn gets one of those left."""
        (n,) = _shape(n)
        order, places = list(range(n)), np.arange(max(n - 1, 0))
        for i, j in enumerate((places + self.words(len(places)) % (n - places)).tolist()):
            order[i], order[j] = order[j], order[i]
        return np.array(order, np.int64)

    def multinomial(self, probabilities, num_samples=None, replacement=False):
        """Indices drawn with the given probabilities, along the last axis: one, (..., n) -> (...),
        or several, (..., n) -> (..., num_samples); an array of int64.

        The largest p_i / q_i win, q_i exponential: a race in which i has the speed p_i. Several
        with replacement: each the first i at which p_0 + ... + p_i, of a sum of 1, reaches a
        uniform number. Raises ValueError for what is no probabilities, up to a factor, and for
        more samples than there are indices to draw.
        """
        p = np.asarray(probabilities)
        total = p.sum(axis=-1, keepdims=True)
        fit = p.ndim and p.dtype.kind == "f" and (p >= 0).all()
        if not fit or not ((total > 0) & (total < np.inf)).all():
            raise ValueError(
                "multinomial draws with floats of 0 and more whose sum is finite, not 0"
            )
        k = 1 if num_samples is None else operator.index(num_samples)
        if k < 1:
            raise ValueError(f"multinomial: num_samples is 1 or more, not {k}")
        if replacement and k > 1:
            return self._with_replacement(p, k)
        if (np.count_nonzero(p, axis=-1) < k).any():
            raise ValueError(
                f"multinomial: {k} samples without replacement need as many probabilities above 0"
            )
        u = self._fill(p.shape, np.float64, lambda n: self._uniform(n, np.float64))
        speeds = p / -np.log1p(-u).astype(p.dtype)
        if num_samples is None:
            return np.argmax(speeds, axis=-1)
        return np.argsort(-speeds, axis=-1, kind="stable")[..., :k]

    def _with_replacement(self, p, k):
        """k indices for each row of p, (..., n) -> (..., k)."""
        sums = np.cumsum(p, axis=-1)
        sums = sums / sums[..., -1:]
        u = self._fill((*p.shape[:-1], k), np.float64, lambda n: self._uniform(n, np.float64))
        rows = zip(sums.reshape(-1, p.shape[-1]), u.reshape(-1, k))
        return np.array([np.searchsorted(s, v) for s, v in rows], np.int64).reshape(u.shape)

    def kernel_seed(self):
        """For a kernel of a GPU that draws by itself, with Philox: the arguments that say what.

        Each call gives another seed: of this stream, or inside `kernel_seeds_from`, of its word.
        """
        if _seeds.word is None:
            return {"seed": int(self.integers(0, 2**62, ()))}
        _seeds.drawn += 1
        return {"seed": _seeds.word, "seed_offset": _seeds.drawn}

    # --- words ------------------------------------------------------------------------------------

    def words(self, n):
        """The next n words, 32 random bits each, as uint32."""
        return self._numpy.integers(0, 1 << 32, n, dtype=np.uint32)

    def _double_words(self, n):
        """64 bits: two words, the first of them the higher."""
        return self._numpy.integers(0, 1 << 64, n, dtype=np.uint64)

    def _uniform(self, n, dtype):
        """In [0, 1), each multiple of 2⁻²⁴ or 2⁻⁵³ equally likely."""
        if dtype == np.float64:
            return (self._double_words(n) & np.uint64(2**53 - 1)) * 2.0**-53
        return ((self.words(n) & np.uint32(2**24 - 1)) * np.float32(2.0**-24)).astype(dtype)

    def _one_normal(self):
        if self._spare is not None:
            x, self._spare = self._spare, None
            return x
        u, v = self._uniform(2, np.float64)
        r, angle = math.sqrt(-2 * math.log1p(-v)), 2 * math.pi * u
        self._spare = r * math.sin(angle)
        return r * math.cos(angle)

    def _fill(self, shape, dtype, draw):
        """An array of what draw(n) gives, a chunk at a time."""
        shape = _shape(shape)
        x = np.empty(math.prod(shape), dtype)
        for start in range(0, len(x), _CHUNK):
            part = x[start : start + _CHUNK]
            part[...] = draw(len(part))
        return x.reshape(shape)


def _box_muller(u):
    """Normal numbers from uniform ones, in blocks of 16; those beyond the last block stay."""
    blocks = u[: len(u) // 16 * 16].reshape(-1, 16)
    r = np.sqrt(-2 * np.log(1 - blocks[:, :8]))
    angle = 2 * np.pi * blocks[:, 8:]
    blocks[:, :8], blocks[:, 8:] = r * np.cos(angle), r * np.sin(angle)
    return u


class _Seeds(threading.local):
    word, drawn = None, 0


_seeds = _Seeds()


@contextlib.contextmanager
def kernel_seeds_from(word, drawn=0):
    """Inside, the seeds of kernels are what will be in `word`, an int64 array () on their device,
    when they run, plus 1, 2, ... in the order in which they are asked for: so that a step which was
    recorded once draws other numbers each time.
    """
    before = _seeds.word, _seeds.drawn
    _seeds.word, _seeds.drawn = word, drawn
    try:
        yield
    finally:
        _seeds.word, _seeds.drawn = before


def kernel_seeds_now():
    """The arguments of kernel_seeds_from that continue from here."""
    return _seeds.word, _seeds.drawn


# --- arguments ------------------------------------------------------------------------------------


def _shape(shape):
    """A tuple of lengths, from a tuple, a list or a single integer."""
    lengths = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not all(isinstance(n, int | np.integer) and n >= 0 for n in lengths):
        raise ValueError(f"a shape is made of integers of 0 and more, not {shape!r}")
    return lengths


def _float(dtype):
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"random numbers are drawn as float32 or float64, not {dtype}")
    return dtype


def _number(name, x):
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is one number, the same for all, not {type(x).__name__}") from None


def _check_probabilities(p):
    p = np.asarray(p)
    wrong = p[~((p >= 0) & (p <= 1))]
    if wrong.size:
        raise ValueError(f"a probability is a number between 0 and 1, not {wrong[0]}")


# --- PyTorch's functions --------------------------------------------------------------------------

default_generator = Generator()


def or_default(generator, integers_only=False):
    """The generator itself; for None the default one.

    Raises TypeError for anything but a Generator. Where only integers are drawn, NumPy's will do,
    too: whatever has integers(low, high, size), high excluded.
    """
    if generator is None:
        return default_generator
    if isinstance(generator, Generator) or (integers_only and hasattr(generator, "integers")):
        return generator
    or_numpys = " or one of NumPy's" if integers_only else ""
    raise TypeError(
        f"a generator is a tinygrad_llm.random.Generator{or_numpys}, or None for the default one, "
        f"not {generator!r}"
    )


def manual_seed(seed):
    """Seeds the default generator, which initialises layers and draws dropout masks."""
    return default_generator.manual_seed(seed)


def rand(*size, generator=None, dtype=np.float32, requires_grad=False):
    """Uniform numbers in [0, 1), a Tensor: rand(2, 3) or rand((2, 3))."""
    return Tensor(or_default(generator).uniform(0.0, 1.0, _flat(size), dtype), requires_grad)


def randn(*size, generator=None, dtype=np.float32, requires_grad=False):
    """Standard normal numbers, a Tensor: randn(2, 3) or randn((2, 3))."""
    return Tensor(or_default(generator).normal(0.0, 1.0, _flat(size), dtype), requires_grad)


def uniform(low, high, size, generator=None, dtype=np.float32):
    """Uniform numbers from low to high, a Tensor; high only by rounding."""
    return Tensor(or_default(generator).uniform(low, high, size, dtype))


def normal(mean, std, size, generator=None, dtype=np.float32):
    """Normal numbers, a Tensor; mean and std are numbers."""
    return Tensor(or_default(generator).normal(mean, std, size, dtype))


def bernoulli(probabilities, generator=None):
    """1.0 with the probability that stands at its place, else 0.0: a Tensor of the same shape and
    dtype.
    """
    p = Tensor(probabilities).data
    _check_probabilities(p)
    u = or_default(generator).uniform(0.0, 1.0, p.shape, p.dtype)
    return Tensor((u < p).astype(p.dtype))


def randint(low, high, size=None, generator=None):
    """Integers in low..high-1, an int64 Tensor; randint(high, size) begins at 0. The size is a
    tuple or list: of two numbers the second one could be either.
    """
    if size is None:
        low, high, size = 0, low, high
    if not isinstance(size, tuple | list):
        raise TypeError(f"randint: the size is a tuple, such as (3,), not {size!r}")
    return Tensor(or_default(generator).integers(low, high, size))


def randperm(n, generator=None):
    """0..n-1 in random order, an int64 Tensor."""
    return Tensor(or_default(generator).permutation(n))


def multinomial(probabilities, num_samples, replacement=False, generator=None):
    """Indices drawn with the given probabilities, an int64 Tensor: (..., n) -> (..., num_samples).

    Without replacement all are different. Raises ValueError as Generator.multinomial does.
    """
    p = Tensor(probabilities).data
    return Tensor(or_default(generator).multinomial(p, num_samples, replacement))


def _flat(size):
    """(2, 3) from f(2, 3) and from f((2, 3))."""
    return size[0] if len(size) == 1 else size
