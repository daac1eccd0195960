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

    A matmul's gradients. Where x is a batch, gᵀ x adds up over its rows, and the engine adds up b̄:
    x̄ = g w
    w̄ = gᵀ x
    b̄ = g"""

    def forward(xp, x, w, b=0.0):
        return x @ xp.matrix_transpose(w) + b

    def vjp(xp, g, y, x, w, b=0.0):
        n = math.prod(x.shape[:-1])  # rows of the batch
        g_rows = xp.reshape(g, (n, w.shape[0]))
        x_rows = xp.reshape(x, (n, w.shape[1]))
        return g @ w, xp.matrix_transpose(g_rows) @ x_rows, g
