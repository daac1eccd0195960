"""Matrix products. For Y = A B, dY = dA B + A dB, and ⟨G, dA B⟩ = ⟨G Bᵀ, dA⟩ gives both
gradients.
"""

import math

from . import op


@op("(n,k),(k,m)->(n,m)")
class matmul:
    """y = a b, of the last two axes; the others broadcast

    ⟨g, da b⟩ = ⟨g bᵀ, da⟩ and ⟨g, a db⟩ = ⟨aᵀ g, db⟩:
    ā = g bᵀ
    b̄ = aᵀ g"""

    def vjp(xp, g, y, a, b):
        return g @ xp.matrix_transpose(b), xp.matrix_transpose(a) @ g


@op("(k),(m,k),(m)->(m)", fixed="w b")
class linear:
    """y = x wᵀ + b,  w: (out, in), as PyTorch stores it

    A matmul's gradients, with every row of the batch adding to w̄ and b̄:
    x̄ = g w
    w̄ = gᵀ x
    b̄ = Σ_rows g"""

    def forward(xp, x, w, b=0.0):
        return x @ xp.matrix_transpose(w) + b

    def vjp(xp, g, y, x, w, b=0.0):
        m, k = w.shape
        n = math.prod(x.shape[:-1])  # rows of the batch
        rows = xp.reshape(g, (n, m))
        w_bar = xp.matrix_transpose(rows) @ xp.reshape(x, (n, k))
        return g @ w, w_bar, xp.sum(rows, axis=0)
