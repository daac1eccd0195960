"""Everything random in the library comes from here, so that a seed repeats a run exactly."""

import numpy as np

from .tensor import Tensor


class Generator:
    """A stream of random numbers with a seed, and a state that can be saved and restored."""

    def __init__(self, seed=0):
        self.manual_seed(seed)

    def manual_seed(self, seed):
        """Starts the stream again from `seed`, a non-negative integer; returns the generator."""
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"a seed is a non-negative integer, not {seed!r}")
        self._numpy = np.random.Generator(np.random.PCG64(int(seed)))
        return self

    def get_state(self):
        """The state of the stream, as JSON can hold it."""
        return self._numpy.bit_generator.state

    def set_state(self, state):
        """Continues where get_state() was called."""
        try:
            self._numpy.bit_generator.state = state
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no state of a random generator: {error}") from None

    def uniform(self, low, high, shape, dtype=np.float32):
        """Uniform numbers in [low, high), an array."""
        return (low + (high - low) * self._numpy.random(shape, dtype=np.float32)).astype(dtype)

    def normal(self, mean, std, shape, dtype=np.float32):
        """Normal numbers, an array."""
        return (mean + std * self._numpy.standard_normal(shape, dtype=np.float32)).astype(dtype)

    def bernoulli(self, p, shape):
        """True with probability p, an array of booleans."""
        return self._numpy.random(shape, dtype=np.float32) < p

    def integers(self, low, high, size):
        """Integers in low..high-1, an array of int64."""
        return self._numpy.integers(low, high, size)

    def permutation(self, n):
        """0..n-1 in random order, an array of int64."""
        return self._numpy.permutation(n)

    def multinomial(self, probabilities):
        """An index drawn with the given probabilities, along the last axis: (..., n) -> (...)."""
        cumulated = np.cumsum(probabilities, axis=-1, dtype=np.float64)
        u = self._numpy.random(cumulated.shape[:-1]) * cumulated[..., -1]
        return np.sum(cumulated <= u[..., None], axis=-1)


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
