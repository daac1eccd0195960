"""Scaled dot-product attention (Vaswani et al., 2017): each query takes a weighted mean of the
values.
"""

import math

from . import op

_CASES = [{}, {"causal": True}, {"causal": True, "scale": 0.3}]


@op(
    "(t,d),(s,d),(s,e),(t,s),(t,s),(t,s)->(t,e)",
    M="bool",
    D="constant",
    examples=_CASES,
)
class attention:
    """S = scale q kᵀ + B,  P = softmax(S) over the keys that M lets the query see,  y = (D ⊙ P) v

    scale is 1/√d unless given; D is dropout's keep mask / (1 - p), or 1; B is a bias on the scores,
    or 0, and -∞ hides a key. causal: query i of T sees keys j ≤ i + S - T. A query that sees no key
    gets zeros.
    v̄ and the gradient g vᵀ of D ⊙ P are a matmul's.  softmax's vjp is P ⊙ (P̄ - Σ_j P̄_ij P_ij),
    and that sum is Σ(g ⊙ y):
    P̄ = D ⊙ g vᵀ
    S̄ = P ⊙ (P̄ - Σ(g ⊙ y))
    q̄ = scale S̄ k
    k̄ = scale S̄ᵀ q
    v̄ = (D ⊙ P)ᵀ g
    B̄ = S̄"""

    def forward(xp, q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None):
        T, n = q.shape[-2], k.shape[-2]
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        seen = xp.ones((T, n), dtype=xp.bool)
        if causal:
            seen = xp.tril(seen, k=n - T)
        S = scale * (q @ xp.matrix_transpose(k)) + B  # (..., T, n)
        lowest = float(xp.finfo(S.dtype).min)  # not -inf: a query that sees nothing must not be NaN
        seen = seen & M & (S != -math.inf)
        P = xp.where(seen, xp.softmax(xp.where(seen, S, lowest)), 0.0)
        return (D * P) @ v, P

    def vjp(xp, g, y, q, k, v, M=True, B=0.0, D=1.0, *, causal=False, scale=None, saved):
        P = saved
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        P_bar = D * (g @ xp.matrix_transpose(v))
        S_bar = P * (P_bar - xp.sum(g * y, axis=-1, keepdims=True))
        q_bar = scale * (S_bar @ k)
        k_bar = scale * (xp.matrix_transpose(S_bar) @ q)
        v_bar = xp.matrix_transpose(D * P) @ g
        return q_bar, k_bar, v_bar, None, S_bar, None
