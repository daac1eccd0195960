"""A linear layer with a low-rank update: both products into one array.

As separate ops, the layer's own output and the update's would be kept until backward, each as large
as their sum.
"""

from ._blocks import SIZE, blocks, sum_rows

KERNELS = ()
FUSED = ("lora",)


class lora:
    """y = x wᵀ + scale (x Aᵀ) Bᵀ + b

    x (..., k), w (m, k), A (r, k), B (m, r), b (m,) -> (..., m). Saved: h = scale x Aᵀ.
    With h̄ = scale g B:

        x̄ = g w + h̄ A,   w̄ = gᵀ x,   Ā = h̄ᵀ x,   B̄ = gᵀ h,   b̄ = Σ g over the rows
    """

    @staticmethod
    def forward(x, w, A, B, b=None, *, scale=1.0):
        rows = x.reshape(-1, x.shape[-1])  # (N, k)
        h = rows @ A.T  # (N, r)
        h *= scale
        y = rows @ w.T  # (N, m)
        _add_product(y, h, B.T)
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], len(w)), h

    @staticmethod
    def vjp(g, y, x, w, A, B, b=None, *, saved, needs, scale=1.0):
        rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])  # (N, k), (N, m)
        x_bar = w_bar = A_bar = B_bar = b_bar = None
        if needs[0] or needs[2]:
            h_bar = g_rows @ B  # (N, r)
            h_bar *= scale
        if needs[0]:
            x_bar = g_rows @ w  # (N, k)
            _add_product(x_bar, h_bar, A)
            x_bar = x_bar.reshape(x.shape)
        if needs[1]:
            w_bar = g_rows.T @ rows
        if needs[2]:
            A_bar = h_bar.T @ rows
        if needs[3]:
            B_bar = g_rows.T @ saved
        if needs[4]:
            b_bar = sum_rows(g)
        return x_bar, w_bar, A_bar, B_bar, b_bar

    @staticmethod
    def accepts(x, *others, scale=1.0):
        """One dtype throughout, of 32 bits or more, as for `linear`; something to multiply."""
        same = all(a is None or a.dtype == x.dtype for a in others)
        return same and x.dtype.char in "fd" and x.size > 0


def _add_product(y, a, b):
    """y += a b, some rows at a time: the product is never there as a whole."""
    for part in blocks(len(y), max(1, SIZE // y.shape[1])):
        y[part] += a[part] @ b
