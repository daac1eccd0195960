"""Linear layers and what follows them, made of products of matrices: see product.py."""

import math
from dataclasses import replace

from .arguments import (
    flag,
    inner_contiguous,
    kept,
    needed,
    not_empty,
    one_of,
    rows,
    same,
    shaped,
    writable,
)
from .arrays import array
from .elementwise import ACTIVATIONS
from .matrices import batch_of, broadcast, matrix, row_matrix, rows_merged
from .product import AS_IT_IS, Finish, add_up, multiply

KERNELS = ("matmul", "linear")
FUSED = ("mlp",)
PRECISIONS = ("ieee", "tf32", "tf32x3")


# --- the ops --------------------------------------------------------------------------------------


class matmul:
    """y = a b, of the last two axes: (..., n, k) (..., k, m) -> (..., n, m); the others broadcast.

    One of the last two axes of a and of b has to be contiguous; which one does not matter.

    precision    of float32: "ieee", "tf32" or "tf32x3"
    out          an array for y; its last axis is contiguous
    accumulate   y is added to what is in `out`
    """

    @staticmethod
    def forward(a, b, *, precision="ieee", out=None, accumulate=False):
        a, b = _operands(a, b, precision)
        batch = batch_of(a, b)
        shape = (*batch, a.shape[-2], b.shape[-1])
        accumulate = flag(accumulate, "accumulate")
        if out is None and accumulate:
            raise ValueError("accumulate adds to `out`, which is not given")
        y = a.array.empty(shape) if out is None else _out(out, shape, a, b)
        to = matrix(y, "out")
        a, b = broadcast(a, batch), broadcast(b, batch)
        multiply(a, b, to, Finish(accumulate=accumulate), precision=precision)
        return y.data, ()

    @staticmethod
    def vjp(g, y, a, b, *, saved, needs, precision="ieee", out=None, accumulate=False, into=None):
        """Gradients of a and b, added to those of the tuple `into` that are arrays."""
        wanted, (a, b) = needed(needs, 2), _operands(a, b, precision)
        g = array(g, "g")
        same("dtype", a=a.array, g=g)
        shaped(g, "g", (*batch_of(a, b), a.shape[-2], b.shape[-1]))
        g = matrix(g, "g")
        into = targets(into, needs, g.array, a=a.array, b=b.array)
        a_bar = b_bar = None
        if wanted[0]:  # ā = g bᵀ
            a_bar = _summed(g, b.T, a.array, into[0], precision)
        if wanted[1]:  # b̄ = aᵀ g
            b_bar = _summed(a.T, g, b.array, into[1], precision)
        return (a_bar, b_bar)[: len(needs)]


def _out(out, shape, a, b):
    """The array for a b."""
    out = array(out, "out")
    shaped(out, "out", shape)
    inner_contiguous(out=out)
    writable(out, "out", a=a.array, b=b.array)
    return out


def _operands(a, b, precision):
    one_of(precision, "precision", PRECISIONS)
    a, b = array(a, "a"), array(b, "b")
    same("dtype", a=a, b=b)
    a, b = matrix(a, "a"), matrix(b, "b")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"a has {a.shape[-1]} columns and b {b.shape[-2]} rows; expected the same number"
        )
    return a, b


def _summed(p, q, x, into, precision):
    """The gradient of x: p q, added up over the axes along which x was repeated."""
    found, accumulate = (x.empty(x.shape), False) if into is None else (into, True)
    batch = batch_of(p, q)
    finish = Finish(accumulate=accumulate)
    p, q = broadcast(p, batch), broadcast(q, batch)
    own = (1,) * (len(batch) + 2 - x.ndim) + x.shape[:-2]
    repeated = [i for i, length in enumerate(batch) if own[i] < length]
    if not repeated:
        to = broadcast(matrix(found, "into"), batch)
        multiply(p, q, to, finish, precision=precision)
    elif math.prod(own) == 1 and (tall := rows_merged(p.T, q)):  # pᵀ and q one below the other
        to = row_matrix(found, "into")
        multiply(tall[0].T, tall[1], to, finish, precision=precision)
    else:  # each product by itself, then their sum
        order = [*repeated, *(i for i in range(len(batch) + 2) if i not in repeated)]
        shape = (*batch, *x.shape[-2:])
        partials = found.empty([shape[i] for i in order], "float32")
        parts = matrix(partials, "partials").axes(*(order.index(i) for i in range(len(shape))))
        multiply(p, q, parts, precision=precision)
        count = math.prod(batch[i] for i in repeated)
        add_up(partials, count, row_matrix(found, "into"), finish)
    return found.data


class linear:
    """y = activation(x wᵀ + b) + residual,  w: (out, in), as PyTorch stores it: in one kernel.

    x (..., k), w (m, k), b (m,), residual (..., m) -> (..., m); the rows of x and of residual are
    evenly spaced. Saved: with an activation, its argument u.

    activation   None, "relu", "silu", "gelu" or "gelu_tanh"
    precision    of float32: "ieee", "tf32" or "tf32x3"
    """

    @staticmethod
    def forward(x, w, b=None, residual=None, *, activation=None, precision="ieee"):
        x, w, b = _linear_arguments(x, w, b, activation, precision)
        residual = _residual(residual, x, w)
        y = x.empty(product_shape(x, w))
        pre = y.empty(y.shape) if activation else None
        finish = Finish(b, activation, pre and row_matrix(pre, "pre"), residual=residual)
        apply_weight(x, w, y, finish, precision=precision)
        return y.data, (pre.data,) if activation else ()

    @staticmethod
    def vjp(
        g, y, x, w, b=None, residual=None, *, saved, needs, activation=None, precision="ieee",
        into=None,
    ):  # fmt: skip
        """The gradients of as many of x, w, b, residual as `needs` has entries. That of residual is
        g itself; the others are added to the arrays of the tuple `into`, which has as many entries.
        """
        x, w, b = _linear_arguments(x, w, b, activation, precision)
        needs_x, needs_w, needs_b, needs_residual = needed(needs, 4)
        pre = kept(saved, u=(product_shape(x, w), x.dtype)) if activation else kept(saved)
        u_bar = output_gradient(g, x, w)
        x_into, w_into, b_into, _ = targets(into, needs, u_bar, x=x, w=w, b=b, residual=None)
        if activation and (needs_x or needs_w or needs_b):
            u_bar = _activation_gradient(u_bar, *pre, activation)
        x_bar = input_gradient(u_bar, w, x, precision, x_into) if needs_x else None
        w_bar, b_bar = weight_gradients(u_bar, x, w, b, precision, needs_w, needs_b, w_into, b_into)
        return (x_bar, w_bar, b_bar, g if needs_residual else None)[: len(needs)]


class mlp:
    """y = activation(x upᵀ + b) downᵀ + c (+ residual), in two kernels; for gradients in four.

    x (..., k), up (h, k), b (h,), down (m, h), c (m,), residual (..., m) -> (..., m)
    Saved: u = x upᵀ + b and activation(u). Backward, activation'(u) is applied where ū is made.

    activation   "gelu_tanh", "gelu", "silu" or "relu"
    precision    of float32: "ieee", "tf32" or "tf32x3"
    """

    @staticmethod
    def forward(
        x, up, b, down, c, residual=None, *, activation="gelu_tanh", precision="ieee"
    ):  # fmt: skip
        x, up, b, down, c = _mlp_arguments(x, up, b, down, c, activation, precision)
        residual = _residual(residual, x, down)
        u, h = (x.empty(product_shape(x, up)) for _ in range(2))
        y = x.empty(product_shape(x, down))
        apply_weight(x, up, h, Finish(b, activation, row_matrix(u, "u")), precision=precision)
        apply_weight(h, down, y, Finish(c, residual=residual), precision=precision)
        return y.data, (u.data, h.data)

    @staticmethod
    def vjp(
        g, y, x, up, b, down, c, residual=None, *, saved, needs, activation="gelu_tanh",
        precision="ieee", into=None,
    ):  # fmt: skip
        """The gradients of as many arguments as `needs` has entries, as linear.vjp gives them."""
        x, up, b, down, c = _mlp_arguments(x, up, b, down, c, activation, precision)
        needs_x, needs_up, needs_b, needs_down, needs_c, needs_residual = needed(needs, 6)
        hidden = product_shape(x, up), x.dtype
        u, h = kept(saved, u=hidden, h=hidden)
        y_bar = output_gradient(g, x, down)
        x_into, up_into, b_into, down_into, c_into, _ = targets(
            into, needs, y_bar, x=x, up=up, b=b, down=down, c=c, residual=None
        )
        down_bar, c_bar = weight_gradients(
            y_bar, h, down, c, precision, needs_down, needs_c, down_into, c_into
        )
        x_bar = up_bar = b_bar = None
        if needs_x or needs_up or needs_b:  # ū = (ȳ down) ⊙ activation'(u)
            through = Finish(activation=activation, slope=row_matrix(u, "u"))
            u_bar = array(input_gradient(y_bar, down, u, precision, finish=through), "ū")
            x_bar = input_gradient(u_bar, up, x, precision, x_into) if needs_x else None
            up_bar, b_bar = weight_gradients(
                u_bar, x, up, b, precision, needs_up, needs_b, up_into, b_into
            )
        given = g if needs_residual else None
        return (x_bar, up_bar, b_bar, down_bar, c_bar, given)[: len(needs)]


# --- the parts of a layer with a weight -----------------------------------------------------------


def apply_weight(x, w, y, finish, *, more=None, precision="ieee"):
    """y = finish(x wᵀ), rows of Arrays."""
    a, b, to = row_matrix(x, "x"), matrix(w, "w").T, row_matrix(y, "y")
    multiply(a, b, to, finish, more=more, precision=precision)


def input_gradient(u_bar, w, x, precision, into=None, finish=AS_IT_IS, more=None):
    """x̄ = finish(ū w), in the shape of x."""
    x_bar = x.empty(x.shape) if into is None else into
    finish = replace(finish, accumulate=into is not None)
    to = row_matrix(x_bar, "x̄")
    multiply(row_matrix(u_bar, "ū"), matrix(w, "w"), to, finish, more=more, precision=precision)
    return x_bar.data


def weight_gradients(
    u_bar, x, w, b, precision, needs_w, needs_b=False, w_into=None, b_into=None
):  # fmt: skip
    """w̄ = ūᵀ x and b̄ = ūᵀ 1, of which one reading of ū gives both."""
    needs_b = needs_b and b is not None
    if not (needs_w or needs_b):
        return None, None
    a, x = row_matrix(u_bar, "ū").T, row_matrix(x, "x")
    sums = b_bar = None
    if needs_b:
        b_bar = b.empty(b.shape) if b_into is None else b_into
        sums = (b_bar, b_into is not None)
    if needs_w:
        w_bar = w.empty(w.shape) if w_into is None else w_into
        to = row_matrix(w_bar, "w̄")
    else:  # only the sums are wanted: with one column of x, and what comes out is thrown away
        w_bar, x = None, replace(x, shape=(x.shape[0], 1))
        to = row_matrix(w.empty((w.shape[0], 1)), "w̄")
    accumulate = needs_w and w_into is not None
    multiply(a, x, to, Finish(accumulate=accumulate), sums=sums, precision=precision)
    return w_bar and w_bar.data, b_bar and b_bar.data


def _activation_gradient(g, u, activation):
    """ū = g ⊙ activation'(u)."""
    (u_bar,) = ACTIVATIONS[activation].vjp(g, None, u, saved=(), needs=(True,))
    return array(u_bar, "ū")


# --- what arguments have to be --------------------------------------------------------------------


def weight(w, name, b, b_name, x, k):
    """(w, b) as Arrays, for rows of x with k elements: w (m, k), b (m,) or None."""
    w = array(w, name, ndim=2)
    shaped(w, name, (w.shape[0], k))
    same("dtype", x=x, **{name: w})
    not_empty(x=x, **{name: w})
    matrix(w, name)
    if b is None:
        return w, None
    b = array(b, b_name, ndim=1)
    shaped(b, b_name, w.shape[:1])
    inner_contiguous(**{b_name: b})
    same("dtype", x=x, **{b_name: b})
    return w, b


def _linear_arguments(x, w, b, activation, precision):
    one_of(activation, "activation", (None, *ACTIVATIONS))
    one_of(precision, "precision", PRECISIONS)
    x = evenly(x, "x")
    return x, *weight(w, "w", b, "b", x, x.shape[-1])


def _mlp_arguments(x, up, b, down, c, activation, precision):
    one_of(activation, "activation", ACTIVATIONS)
    one_of(precision, "precision", PRECISIONS)
    x = evenly(x, "x")
    up, b = weight(up, "up", b, "b", x, x.shape[-1])
    return x, up, b, *weight(down, "down", c, "c", x, up.shape[0])


def evenly(x, name):
    """x as an Array, its rows evenly spaced."""
    x = array(x, name)
    if x.ndim == 0:
        raise ValueError(f"{name} has no axes; expected at least 1")
    row_matrix(x, name)
    return x


def _residual(residual, x, w):
    """As a Matrix, or None."""
    if residual is None:
        return None
    residual = array(residual, "residual")
    shaped(residual, "residual", product_shape(x, w))
    same("dtype", x=x, residual=residual)
    return row_matrix(residual, "residual")


def product_shape(x, w):
    """The shape of x wᵀ."""
    return (*x.shape[:-1], w.shape[0])


def output_gradient(g, x, w):
    """g as an Array, of the shape of x wᵀ."""
    g = array(g, "g")
    same("dtype", x=x, g=g)
    shaped(g, "g", product_shape(x, w))
    rows(g, "g")
    return g


def targets(into, needs, g, **arguments):
    """The arrays that gradients are added to: an Array or None for each of the arguments.

    into     None, or a tuple of arrays and None, with one entry for each of `needs`. An array has
             its argument's shape, evenly spaced rows, and any of the dtypes: float32 for gradients
             that add up over many steps. The same array may be given twice, for tied weights.
    """
    found = [None] * len(arguments)
    if into is None:
        return found
    if not isinstance(into, tuple | list) or len(into) != len(needs):
        raise ValueError(f"into is {into!r}; expected a tuple of {len(needs)} arrays and None")
    for i, (target, (name, x)) in enumerate(zip(into, arguments.items())):
        if target is None:
            continue
        if x is None:
            raise ValueError(f"into has an array for {name}, whose gradient is not made here")
        found[i] = array(target, f"into's {name}")
        shaped(found[i], f"into's {name}", x.shape)
        rows(found[i], f"into's {name}")
        others = {
            f"into's {other}": y
            for other, y in zip(arguments, found[:i])
            if y and y.address != found[i].address
        }
        writable(found[i], f"into's {name}", g=g, **arguments, **others)
    return found
