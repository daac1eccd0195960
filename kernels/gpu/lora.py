"""A linear layer with a low-rank update: the update is a second, short loop of the same kernel.

x wᵀ + h Bᵀ with h = s x Aᵀ is one product of [x h] and [w B]ᵀ. The kernel adds both into the same
tile: y is written once, and the extra loop over the rank costs r/k of the main one. Done after the
loop at one go, all of a tile's h and B would have to be in shared memory, which is full at r = 256.
The gradient of x has the same form.
"""

import math

from .arguments import kept, needed, number, one_of, shaped
from .arrays import array
from .linear import (
    PRECISIONS,
    apply_weight,
    evenly,
    input_gradient,
    output_gradient,
    product_shape,
    targets,
    weight,
    weight_gradients,
)
from .matrices import matrix, row_matrix
from .product import Finish

FUSED = ("lora",)


class lora:
    """y = x wᵀ + scale (x Aᵀ) Bᵀ + b

    x (..., k), w (m, k), A (r, k), B (m, r), b (m,) -> (..., m). Saved: h = scale x Aᵀ.
    With h̄ = scale g B:

        x̄ = g w + h̄ A,   w̄ = gᵀ x,   Ā = h̄ᵀ x,   B̄ = gᵀ h,   b̄ = Σ g over the rows
    """

    @staticmethod
    def forward(x, w, A, B, b=None, *, scale=1.0, precision="ieee"):
        x, w, A, B, b, scale = _arguments(x, w, A, B, b, scale, precision)
        h, y = x.empty(product_shape(x, A)), x.empty(product_shape(x, w))
        apply_weight(x, A, h, Finish(alpha=scale), precision=precision)
        more = row_matrix(h, "h"), matrix(B, "B").T
        apply_weight(x, w, y, Finish(b), more=more, precision=precision)
        return y.data, (h.data,)

    @staticmethod
    def vjp(
        g, y, x, w, A, B, b=None, *, saved, needs, scale=1.0, precision="ieee", into=None
    ):  # fmt: skip
        """The gradients of as many arguments as `needs` has entries; w is frozen where it says
        False. They are added to the arrays of the tuple `into`, which has as many entries.
        """
        x, w, A, B, b, scale = _arguments(x, w, A, B, b, scale, precision)
        needs_x, needs_w, needs_A, needs_B, needs_b = needed(needs, 5)
        g, (h,) = output_gradient(g, x, w), kept(saved, h=(product_shape(x, A), x.dtype))
        x_into, w_into, A_into, B_into, b_into = targets(into, needs, g, x=x, w=w, A=A, B=B, b=b)
        x_bar = A_bar = None
        if needs_x or needs_A:
            h_bar = array(input_gradient(g, B, h, precision, finish=Finish(alpha=scale)), "h̄")
        if needs_x:
            more = row_matrix(h_bar, "h̄"), matrix(A, "A")
            x_bar = input_gradient(g, w, x, precision, x_into, more=more)
        if needs_A:
            A_bar, _ = weight_gradients(h_bar, x, A, None, precision, True, w_into=A_into)
        w_bar, b_bar = weight_gradients(g, x, w, b, precision, needs_w, needs_b, w_into, b_into)
        B_bar, _ = weight_gradients(g, h, B, None, precision, needs_B, w_into=B_into)
        return (x_bar, w_bar, A_bar, B_bar, b_bar)[: len(needs)]


def _arguments(x, w, A, B, b, scale, precision):
    scale = number(scale, "scale", math.isfinite, "a finite number")
    one_of(precision, "precision", PRECISIONS)
    x = evenly(x, "x")
    w, b = weight(w, "w", b, "b", x, x.shape[-1])
    A, _ = weight(A, "A", None, None, x, x.shape[-1])
    B, _ = weight(B, "B", None, None, x, A.shape[0])
    shaped(B, "B", (w.shape[0], A.shape[0]))
    return x, w, A, B, b, scale
