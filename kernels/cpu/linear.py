"""Matrix products with what surrounds them done in place."""

from ._blocks import sum_rows

KERNELS = ("linear",)


class linear:
    """y = x wᵀ + b: one matrix product over all rows of the batch, the bias added in place."""

    @staticmethod
    def forward(x, w, b=None):
        y = x.reshape(-1, x.shape[-1]) @ w.T  # (N, out)
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], w.shape[0]), None

    @staticmethod
    def vjp(g, y, x, w, b=None, *, saved, needs):
        rows = g.reshape(-1, g.shape[-1])  # (N, out)
        x_bar = (rows @ w).reshape(x.shape) if needs[0] else None
        w_bar = rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        b_bar = sum_rows(g) if len(needs) > 2 and needs[2] else None
        return x_bar, w_bar, b_bar

    @staticmethod
    def accepts(x, w, b=None):
        """Same dtype throughout, so that in-place sums do not lose digits; something to
        multiply.
        """
        same = x.dtype == w.dtype and (b is None or getattr(b, "dtype", None) == x.dtype)
        return same and x.dtype.char in "fd" and x.size > 0 and w.size > 0
