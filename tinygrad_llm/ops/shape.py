"""Ops that move elements without changing them: their Jacobians are 0/1 matrices, and each vjp is
the transposed move. Where elements are dropped, the way back fills in zeros; where they are
repeated, it adds up.
"""

import itertools
import math

from . import op


def _shape(rng, ndim=3):
    return tuple(int(n) for n in rng.integers(0, 5, size=ndim))


@op()
class reshape:
    """y = x with another shape, elements in the same (row-major) order

    The same elements in x's shape:
    x̄ = g"""

    def vjp(xp, g, y, x, *, shape):
        return (xp.reshape(g, x.shape),)

    def sample(rng):
        shape = _shape(rng)
        return [shape], {"shape": (shape[0] * shape[1], shape[2])}


def _inverse(axes):
    """The permutation that undoes `axes`."""
    inverse = [0] * len(axes)
    for i, axis in enumerate(axes):
        inverse[axis] = i
    return tuple(inverse)


@op()
class permute_dims:
    """y = x with its axes reordered: axis i of y is axis axes[i] of x

    So axis axes[i] of x̄ is axis i of g:
    x̄ = permute_dims(g, inverse(axes))"""

    def vjp(xp, g, y, x, *, axes):
        return (xp.permute_dims(g, _inverse(axes)),)

    def sample(rng):
        return [_shape(rng)], {"axes": tuple(int(i) for i in rng.permutation(3))}


@op("(m,n)->(n,m)")
class matrix_transpose:
    """y = xᵀ, of the last two axes

    x̄ = gᵀ"""

    def vjp(xp, g, y, x):
        return (xp.matrix_transpose(g),)


@op("()->()", examples=[{"axis": 0}, {"axis": -1}])
class expand_dims:
    """y = x with a new axis of length 1

    The same elements in x's shape:
    x̄ = g"""

    def vjp(xp, g, y, x, *, axis):
        return (xp.reshape(g, x.shape),)


@op()
class squeeze:
    """y = x without an axis (or axes) of length 1

    The same elements in x's shape:
    x̄ = g"""

    def vjp(xp, g, y, x, *, axis):
        return (xp.reshape(g, x.shape),)

    def sample(rng):
        n, m = _shape(rng, 2)
        return [(n, 1, m)], {"axis": 1}


@op()
class broadcast_to:
    """y = x repeated along axes of length 1, and along new axes in front

    Every copy of an element gives its gradient; the engine adds them up over the repeated axes:
    x̄ = g"""

    def vjp(xp, g, y, x, *, shape):
        return (g,)

    def sample(rng):
        n, m, k = _shape(rng)
        return [(n, 1)], {"shape": (k, n, m)}


@op("(m,n)->(m,n)", examples=[{"k": k} for k in (0, 1, -2)])
class tril:
    """y = x with zeros above the k-th diagonal

    x̄ = tril(g, k)"""

    def vjp(xp, g, y, x, *, k=0):
        return (xp.tril(g, k=k),)


@op("(m,n)->(m,n)", examples=[{"k": k} for k in (0, 1, -2)])
class triu:
    """y = x with zeros below the k-th diagonal

    x̄ = triu(g, k)"""

    def vjp(xp, g, y, x, *, k=0):
        return (xp.triu(g, k=k),)


# --- taking apart, and its adjoint ----------------------------------------------------------------


@op()
class getitem:
    """y = x[key], key made of integers, slices, None and ... (each element is taken at most once)

    g where the elements were taken, zeros elsewhere:
    x̄ = put(g, key)"""

    def forward(xp, x, *, key):
        return x[key]

    def vjp(xp, g, y, x, *, key):
        return (xp.put(g, key=key, shape=x.shape),)

    def sample(rng):
        keys = [
            (0,),
            (slice(None, None, 2),),
            (..., slice(3, None, -2)),
            (1, None, slice(1, 3), -1),
        ]
        return [(2, 3, 4)], {"key": keys[rng.integers(len(keys))]}


@op()
class put:
    """y = zeros, then y[key] = x: the adjoint of getitem

    x̄ = g[key]"""

    def forward(xp, x, *, key, shape):
        y = xp.zeros(shape, dtype=x.dtype)
        y[key] = x  # the one place where an op writes: into its own fresh zeros
        return y

    def vjp(xp, g, y, x, *, key, shape):
        return (g[key],)

    def sample(rng):
        return [(2, 3)], {"key": (slice(1, 3), ..., 2), "shape": (4, 3, 5)}


# --- putting together -----------------------------------------------------------------------------


@op()
class concat:
    """y = the arrays, one after the other along an axis

    part_i is where x_i went:
    x̄_i = g[part_i]"""

    def vjp(xp, g, y, *xs, axis=0):
        in_front = (slice(None),) * (axis % len(y.shape))
        bounds = itertools.accumulate([x.shape[axis] for x in xs], initial=0)
        parts = [(*in_front, slice(i, j), ...) for i, j in itertools.pairwise(bounds)]
        return tuple(g[part] for part in parts)

    def sample(rng):
        n, m, k = _shape(rng)
        return [(n, m), (n, k), (n, 1)], {"axis": -1}


@op()
class stack:
    """y = the arrays side by side, along a new axis

    part_i is the i-th index along that axis, where x_i went:
    x̄_i = g[part_i]"""

    def vjp(xp, g, y, *xs, axis=0):
        in_front = (slice(None),) * (axis % len(y.shape))
        parts = [(*in_front, i, ...) for i in range(len(xs))]
        return tuple(g[part] for part in parts)

    def sample(rng):
        shape = _shape(rng, 2)
        return [shape, shape, shape], {"axis": int(rng.integers(-3, 3))}


# --- looking up, and its adjoint ------------------------------------------------------------------


@op("(v,c),(n)->(n,c)", fixed="w", t="index v")
class embedding:
    """y_i = w[t_i]: row t_i of the table; the same as onehot(t) w

    The vjp of a matmul by H = onehot(t) is Hᵀ g: row v of w̄ adds up every g_i with t_i = v:
    w̄ = scatter_add(g, t)"""

    def forward(xp, w, t):
        rows = xp.take(w, xp.reshape(t, (-1,)), axis=0)  # (N, C)
        return xp.reshape(rows, t.shape + w.shape[1:])

    def vjp(xp, g, y, w, t):
        return xp.scatter_add(g, t, rows=w.shape[0]), None


@op(t="index rows")
class scatter_add:
    """y_v = Σ_i [t_i = v] x_i  =  onehot(t)ᵀ x: the adjoint of embedding

    x̄ = embedding(g, t)"""

    def forward(xp, x, t, *, rows):
        n = math.prod(t.shape)
        H = xp.expand_dims(xp.arange(rows), axis=1) == xp.reshape(t, (1, n))  # (rows, N)
        return xp.astype(H, x.dtype) @ xp.reshape(x, (n, x.shape[-1]))

    def vjp(xp, g, y, x, t, *, rows):
        return xp.embedding(g, t), None

    def sample(rng):
        b, n, c = _shape(rng)
        return [(b, n, c), (b, n)], {"rows": 3}


@op("(n),(m)->(m)", t="index n")
class gather:
    """y_j = x[t_j] along the last axis, with t's own row for every row of x

    x̄ = scatter(g, t)"""

    def forward(xp, x, t):
        H = xp.expand_dims(t, axis=-1) == xp.arange(x.shape[-1])  # (..., m, n)
        return xp.sum(xp.where(H, xp.expand_dims(x, axis=-2), 0), axis=-1)

    def vjp(xp, g, y, x, t):
        return xp.scatter(g, t, size=x.shape[-1]), None


@op(t="index size")
class scatter:
    """y_v = Σ_j [t_j = v] x_j along the last axis: the adjoint of gather

    x̄ = gather(g, t)"""

    def forward(xp, x, t, *, size):
        H = xp.expand_dims(t, axis=-1) == xp.arange(size)  # (..., m, n)
        return xp.sum(xp.where(H, xp.expand_dims(x, axis=-1), 0), axis=-2)

    def vjp(xp, g, y, x, t, *, size):
        return xp.gather(g, t), None

    def sample(rng):
        shape = _shape(rng)
        return [shape, shape], {"size": 3}
