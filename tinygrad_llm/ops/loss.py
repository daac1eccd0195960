"""Losses: means over the examples. Their targets have no gradient, unless the docstring gives
one.
"""

import math

from . import op

_TINY = 1e-45  # in float32 the smallest number above 0: its log is below -100, and finite


@op("(n,v),(n)->()", fixed="x t", t="index v", examples=[{}, {"ignore_index": -1}])
class cross_entropy:
    """y = -1/N Σ_i log softmax(x_i)[t_i]  over the N rows with t_i ≠ ignore_index

    log softmax(x)_t = x_t - L,  L = logsumexp(x),  ∂L/∂x_j = e^{x_j - L} = P_j,  so a row gives
    P - H,  H = onehot(t);  K is true for the rows that count:
    P = exp(x - L)
    x̄ = (g / N) ⊙ where(K, P - H, 0)"""

    def forward(xp, x, t, *, ignore_index=-100):
        K = xp.expand_dims(t != ignore_index, axis=-1)  # (n, 1)  rows that count
        H = xp.expand_dims(t, axis=-1) == xp.arange(x.shape[-1])  # (n, v)  one-hot
        N = xp.sum(xp.astype(K, x.dtype))  # in x's dtype: an int64 count would promote
        L = xp.logsumexp(x, keepdims=True)  # (n, 1)
        return xp.sum(xp.where(H & K, L - x, 0.0)) / N, (K, H, N, L)

    def vjp(xp, g, y, x, t, *, ignore_index=-100, saved):
        K, H, N, L = saved
        P = xp.exp(x - L)
        return g / N * xp.where(K, P - xp.astype(H, x.dtype), 0.0), None


@op("(n),(n)->()", fixed="p t", p="unit", t="target")
class binary_cross_entropy:
    """y = -1/n Σ_i t_i log p_i + (1 - t_i) log(1 - p_i)

    log never goes below -100, as in PyTorch.
    d/dp: -(t/p - (1 - t)/(1 - p)) = (p - t) / (p (1 - p)), and never divided by 0:
    p̄ = (g / n) ⊙ (p - t) / max(p ⊙ (1 - p), 1e-12)"""

    def forward(xp, p, t):
        log_p = xp.maximum(xp.log(xp.maximum(p, _TINY)), -100.0)
        log_q = xp.maximum(xp.log(xp.maximum(1 - p, _TINY)), -100.0)
        return -xp.mean(t * log_p + (1 - t) * log_q)

    def vjp(xp, g, y, p, t):
        n = math.prod(p.shape)
        return g / n * (p - t) / xp.maximum(p * (1 - p), 1e-12), None


@op("(n),(n)->()", fixed="x t", t="target")
class binary_cross_entropy_with_logits:
    """y = binary_cross_entropy(σ(x), t) = 1/n Σ_i log(1 + e^{x_i}) - t_i x_i, without overflow

    d/dx log(1 + e^x) = σ(x):
    x̄ = (g / n) ⊙ (σ(x) - t)"""

    def forward(xp, x, t):
        minus_abs = xp.where(x < 0, x, -x)
        softplus = xp.where(x < 0, 0.0, x) + xp.log1p(xp.exp(minus_abs))
        return xp.mean(softplus - t * x)

    def vjp(xp, g, y, x, t):
        n = math.prod(x.shape)
        return g / n * (xp.sigmoid(x) - t), None


@op("(n),(n)->()", fixed="x t")
class mse_loss:
    """y = 1/n Σ_i (x_i - t_i)²

    ∂y/∂x_i = 2/n (x_i - t_i) = -∂y/∂t_i:
    x̄ = (2 / n) g ⊙ (x - t)
    t̄ = -x̄"""

    def forward(xp, x, t):
        return xp.mean((x - t) ** 2)

    def vjp(xp, g, y, x, t):
        n = math.prod(x.shape)
        x_bar = 2 / n * g * (x - t)
        return x_bar, -x_bar
