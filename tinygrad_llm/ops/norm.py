"""Normalisations over the last axis."""

from . import op

_EPSILONS = [{}, {"eps": 0.1}]


@op("(n),(n),(n)->(n)", fixed="w b", examples=_EPSILONS)
class layer_norm:
    """x̂ = (x - μ) / √(var + ε),  y = x̂ ⊙ w + b,  var the biased variance (Ba, Kiros & Hinton,
    2016)

    r = 1/√(var + ε).  μ and var depend on every x_j: ∂x̂_i/∂x_j = r (δ_ij - 1/n - x̂_i x̂_j / n).
    Times u_i, summed over i.  The engine adds up w̄ and b̄ over the batch:
    x̂ = (x - μ) ⊙ r
    u = g ⊙ w
    x̄ = r ⊙ (u - mean(u) - x̂ ⊙ mean(u ⊙ x̂))
    w̄ = g ⊙ x̂
    b̄ = g"""

    def forward(xp, x, w, b, *, eps=1e-5):
        mu = xp.mean(x, axis=-1, keepdims=True)  # (..., 1)
        r = 1 / xp.sqrt(xp.mean((x - mu) ** 2, axis=-1, keepdims=True) + eps)  # (..., 1)
        return (x - mu) * r * w + b, (mu, r)

    def vjp(xp, g, y, x, w, b, *, eps=1e-5, saved):
        mu, r = saved
        x_hat = (x - mu) * r
        u = g * w
        x_bar = r * (
            u
            - xp.mean(u, axis=-1, keepdims=True)
            - x_hat * xp.mean(u * x_hat, axis=-1, keepdims=True)
        )
        return x_bar, g * x_hat, g


@op("(n),(n)->(n)", fixed="w", examples=_EPSILONS)
class rms_norm:
    """x̂ = x / √(mean(x²) + ε),  y = x̂ ⊙ w (Zhang & Sennrich, 2019)

    r = 1/√(mean(x²) + ε):  ∂x̂_i/∂x_j = r (δ_ij - x̂_i x̂_j / n).  Times u_i, summed over i.
    The engine adds up w̄ over the batch:
    x̂ = x ⊙ r
    u = g ⊙ w
    x̄ = r ⊙ (u - x̂ ⊙ mean(u ⊙ x̂))
    w̄ = g ⊙ x̂"""

    def forward(xp, x, w, *, eps=1e-5):
        r = 1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)  # (..., 1)
        return x * r * w, r

    def vjp(xp, g, y, x, w, *, eps=1e-5, saved):
        r = saved
        x_hat = x * r
        u = g * w
        return r * (u - x_hat * xp.mean(u * x_hat, axis=-1, keepdims=True)), g * x_hat
