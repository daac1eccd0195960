"""Everything random in the library comes from here, so that a seed repeats a run exactly.

The stream is that of PyTorch on a CPU: the same seed gives the same weights, masks and orders, and
so the numbers that are printed in books. It is made of

    words       32 bits each, of the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998)
    uniform     the lowest 24 bits of a word, times 2⁻²⁴; in float64 the lowest 53 bits of two
                words, the first of them the higher, times 2⁻⁵³
    normal      pairs of them from pairs of uniform numbers (Box and Muller, 1958)
    choices     True if a float64 is below p; an index by an exponential race

Where PyTorch is built with Intel's MKL, as on Linux, it draws masks and indices otherwise: for
these the stream is that of its other builds, macOS among them.
"""

import math

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
            if (
                state["generator"] != "MT19937"
                or key.shape != (624,)
                or not 0 <= state["pos"] <= 624
            ):
                raise ValueError("not of MT19937")
            twister = {"key": key, "pos": int(state["pos"])}
            spare = None if state["spare"] is None else float(state["spare"])
            self._numpy.bit_generator.state = {"bit_generator": "MT19937", "state": twister}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no state of a random generator: {error}") from None
        self._spare = spare

    # --- numbers ----------------------------------------------------------------------------------

    def uniform(self, low, high, shape, dtype=np.float32):
        """Uniform numbers in [low, high), an array."""
        dtype = np.dtype(dtype)
        low, high = dtype.type(low), dtype.type(high)
        # In float64, and rounded once, as by the processor's fused multiply-add.
        width, low = np.float64(high - low), np.float64(low)
        return self._fill(shape, dtype, lambda n: self._uniform(n, dtype) * width + low)

    def normal(self, mean, std, shape, dtype=np.float32):
        """Normal numbers, an array.

        16 and more are made in blocks of 16 uniform numbers u: r = √(-2 log(1 - u_j)) for the first
        half, the angle 2π u_{j+8} for the second; if the last block is not full, the last 16 are
        drawn again. Fewer are made one by one, each pair of two float64 u, u': with
        r = √(-2 log(1 - u')), r cos 2πu is the number, and r sin 2πu the next one.
        """
        dtype, n = np.dtype(dtype), math.prod(shape)
        if n < 16:
            x = np.array([self._one_normal() * std + mean for _ in range(n)], np.float64)
            return x.astype(dtype).reshape(shape)
        x = self._fill((n,), dtype, lambda n: _box_muller(self._uniform(n, dtype)))
        if n % 16:
            x[-16:] = _box_muller(self._uniform(16, dtype))
        return (x * dtype.type(std) + dtype.type(mean)).astype(dtype, copy=False).reshape(shape)

    def bernoulli(self, p, shape):
        """True with probability p, an array of booleans."""
        return self._fill(shape, bool, lambda n: self._uniform(n, np.float64) < p)

    def integers(self, low, high, size):
        """Integers in low..high-1, an array of int64."""
        if not low < high:
            raise ValueError(f"there is no integer from {low} to below {high}")
        draw = self.words if high - low < 1 << 28 else self._double_words
        span = np.uint64(high - low)
        return self._fill(size, np.int64, lambda n: (draw(n) % span).astype(np.int64) + low)

    def permutation(self, n):
        """0..n-1 in random order, an array of int64: each place in turn gets one of those left."""
        order, places = list(range(n)), np.arange(max(n - 1, 0))
        for i, j in enumerate((places + self.words(len(places)) % (n - places)).tolist()):
            order[i], order[j] = order[j], order[i]
        return np.array(order, np.int64)

    def multinomial(self, probabilities):
        """An index drawn with the given probabilities, along the last axis: (..., n) -> (...).

        The largest p_i / q_i wins, q_i exponential: a race in which i has the speed p_i.
        Raises ValueError for what is no probabilities, up to a factor.
        """
        p = np.asarray(probabilities)
        if p.dtype.kind != "f" or not (p >= 0).all() or not 0 < p.sum(axis=-1).min() < np.inf:
            raise ValueError(
                "multinomial draws with floats of 0 and more whose sum is finite, not 0"
            )
        u = self._fill(p.shape, np.float64, lambda n: self._uniform(n, np.float64))
        return np.argmax(p / -np.log1p(-u).astype(p.dtype), axis=-1)

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
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
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


default_generator = Generator()


def manual_seed(seed):
    """Seeds the default generator, which initialises layers and draws dropout masks."""
    return default_generator.manual_seed(seed)


def rand(*shape, requires_grad=False):
    """Uniform numbers in [0, 1), a float32 Tensor."""
    return Tensor(default_generator.uniform(0.0, 1.0, shape), requires_grad)


def randn(*shape, requires_grad=False):
    """Standard normal numbers, a float32 Tensor."""
    return Tensor(default_generator.normal(0.0, 1.0, shape), requires_grad)


def randint(low, high, shape):
    """Integers in low..high-1, an int64 Tensor."""
    return Tensor(default_generator.integers(low, high, shape))


def randperm(n):
    """0..n-1 in random order, an int64 Tensor."""
    return Tensor(default_generator.permutation(n))
