"""Looking up and adding up by index, where the maths multiplies by one-hot matrices."""

import numpy as np

KERNELS = ("getitem", "embedding", "scatter_add", "gather", "scatter")

_SMALL = 1 << 18  # elements: a one-hot matrix up to this size is multiplied faster than any loop
_LONG_ROW = 32  # from this length on, adding row by row in Python beats np.add.at


class getitem:
    """y = x[key], key made of integers, slices, None and ...."""

    @staticmethod
    def forward(x, *, key):
        return x[key], None

    @staticmethod
    def vjp(g, y, x, *, key, saved, needs):
        def add_to(total):
            total[key] += g

        return (add_to,)


class embedding:
    """y_i = w[t_i]."""

    @staticmethod
    def forward(w, t):
        return np.take(w, t, axis=0), None

    @staticmethod
    def vjp(g, y, w, t, *, saved, needs):
        return lambda total: _add_rows(total, g, t), None


class scatter_add:
    """y_v = Σ_i [t_i = v] x_i."""

    @staticmethod
    def forward(x, t, *, rows):
        y = np.zeros((rows, x.shape[-1]), x.dtype)
        _add_rows(y, x, t)
        return y, None

    @staticmethod
    def vjp(g, y, x, t, *, rows, saved, needs):
        return np.take(g, t, axis=0), None


class gather:
    """y_j = x[t_j] along the last axis."""

    @staticmethod
    def forward(x, t):
        return np.take_along_axis(x, t, axis=-1), None

    @staticmethod
    def vjp(g, y, x, t, *, saved, needs):
        return _add_along_last(g, t, x.shape[-1]), None

    @staticmethod
    def accepts(x, t):
        return x.shape[:-1] == t.shape[:-1]


class scatter:
    """y_v = Σ_j [t_j = v] x_j along the last axis."""

    @staticmethod
    def forward(x, t, *, size):
        return _add_along_last(x, t, size), None

    @staticmethod
    def vjp(g, y, x, t, *, size, saved, needs):
        return np.take_along_axis(g, t, axis=-1), None

    @staticmethod
    def accepts(x, t, *, size):
        return x.shape == t.shape


def _add_rows(y, x, t):
    """Adds x_i to row t_i of y, in place: y (rows, c), x (..., c), t (...)."""
    c = x.shape[-1]
    x, t = x.reshape(t.size, c), t.reshape(-1)
    if len(y) * t.size <= _SMALL and c >= _LONG_ROW:
        y += (np.arange(len(y))[:, None] == t).astype(x.dtype) @ x  # one-hot, as in the op
    elif c < _LONG_ROW:
        np.add.at(y, t, x)
    else:
        for i, row in zip(t.tolist(), x):
            y[i] += row


def _add_along_last(x, t, size):
    """(..., m), (..., m) -> (..., size): what has the same index is added up."""
    y = np.zeros((*x.shape[:-1], size), x.dtype)
    first = np.arange(y.size // size if size else 0).reshape(*x.shape[:-1], 1) * size
    np.add.at(y.reshape(-1), (first + t).reshape(-1), x.reshape(-1))
    return y
