"""Ops that act on each element by itself: the Jacobian is diagonal, and x̄ = g · dy/dx.

Broadcasting is undone by the engine, once for all ops: each vjp speaks of the broadcast shape.
"""

import math

from . import op

# --- arithmetic -----------------------------------------------------------------------------------


@op("(),()->()")
class add:
    """y = a + b

    ∂y/∂a = ∂y/∂b = 1:
    ā = g
    b̄ = g"""

    def vjp(xp, g, y, a, b):
        return g, g


@op("(),()->()")
class subtract:
    """y = a - b

    ∂y/∂a = 1, ∂y/∂b = -1:
    ā = g
    b̄ = -g"""

    def vjp(xp, g, y, a, b):
        return g, -g


@op("(),()->()")
class multiply:
    """y = a ⊙ b

    ∂y/∂a = b, ∂y/∂b = a:
    ā = g ⊙ b
    b̄ = g ⊙ a"""

    def vjp(xp, g, y, a, b):
        return g * b, g * a


@op("(),()->()", b="positive")
class divide:
    """y = a / b

    ∂y/∂a = 1/b, ∂y/∂b = -a/b² = -y/b:
    ā = g / b
    b̄ = -ā ⊙ y"""

    def vjp(xp, g, y, a, b):
        a_bar = g / b
        return a_bar, -a_bar * y


@op("()->()")
class negative:
    """y = -x

    x̄ = -g"""

    def vjp(xp, g, y, x):
        return (-g,)


@op("()->()", x="positive", examples=[{"exponent": e} for e in (2, 3, 1, 0, -1, 0.5, -1.5)])
class power:
    """y = x^exponent, a number

    dy/dx = exponent x^k,  k = exponent - 1.  For exponent 0, k is 0 too: x = 0 must not give NaN.
    x̄ = exponent g ⊙ x^k"""

    def forward(xp, x, *, exponent):
        return x**exponent

    def vjp(xp, g, y, x, *, exponent):
        k = exponent - 1 if exponent else 0
        return (exponent * g * x**k,)


@op("(),()->()", x="positive")
class pow:
    """y = x^p, both arrays, x > 0

    x^p = e^(p log x), so ∂y/∂x = p x^(p-1) and ∂y/∂p = y log x.  At x = 0, where x^-1 and log x
    are infinite, ∂y/∂x is 0 if p = 0, and 0 is returned for ∂y/∂p:
    k = where(p = 0, 0, p - 1)
    x̄ = g ⊙ p ⊙ x^k
    p̄ = g ⊙ y ⊙ log(where(x > 0, x, 1))"""

    def vjp(xp, g, y, x, p):
        k = xp.where(p == 0, 0.0, p - 1)  # 0 · x^-1 would be NaN at x = 0
        return g * p * x**k, g * y * xp.log(xp.where(x > 0, x, 1.0))


# --- exponentials ---------------------------------------------------------------------------------


@op("()->()")
class exp:
    """y = e^x

    dy/dx = e^x = y:
    x̄ = g ⊙ y"""

    def vjp(xp, g, y, x):
        return (g * y,)


@op("()->()", x="positive")
class log:
    """y = log x

    x̄ = g / x"""

    def vjp(xp, g, y, x):
        return (g / x,)


@op("()->()", x="positive")
class log1p:
    """y = log(1 + x), accurate for small x

    x̄ = g / (1 + x)"""

    def vjp(xp, g, y, x):
        return (g / (1 + x),)


@op("()->()", x="positive")
class sqrt:
    """y = √x

    y² = x, so 2y dy = dx:
    x̄ = g / (2 y)"""

    def vjp(xp, g, y, x):
        return (g / (2 * y),)


@op("()->()")
class sin:
    """y = sin x

    x̄ = g ⊙ cos(x)"""

    def vjp(xp, g, y, x):
        return (g * xp.cos(x),)


@op("()->()")
class cos:
    """y = cos x

    x̄ = -g ⊙ sin(x)"""

    def vjp(xp, g, y, x):
        return (-g * xp.sin(x),)


# log(erfc(z) / t) + z² as a polynomial in s = 2t - 1, where t = 2/(2 + z), z >= 0. It is the
# Chebyshev interpolant at 26 points, computed in 40 digits; the relative error of erfc is about z²
# roundings. fmt: off
_ERFC = (
    -1.1141466421901909e-09,
    -1.2776506237493277e-08,
    3.675878538183882e-08,
    7.746001345360312e-08,
    -3.086559820402206e-07,
    -4.1484920834124593e-08,
    1.3137199073509803e-06,
    -1.4094127307024207e-06,
    -2.994294118363313e-06,
    8.662494482986981e-06,
    1.6080205095439494e-07,
    -3.023780825572967e-05,
    3.1737328155349395e-05,
    7.141808767204543e-05,
    -0.00017430116360991256,
    -9.373894209180262e-05,
    0.0006736785371369921,
    -0.00014624628859718252,
    -0.0023458124784660516,
    0.0017589335075480397,
    0.00882493855611383,
    -0.00987268936410846,
    -0.046895610231160824,
    0.047343306841863754,
    0.6726432239776567,
    -0.6717940840566922,
)
# fmt: on


@op("()->()")
class erfc:
    """y = erfc x = 2/√π ∫_x^∞ e^(-s²) ds,  the complementary error function; erf x = 1 - erfc x

    The integral's lower limit moves, so dy/dx is minus the integrand there:
    x̄ = -(2 / √π) g ⊙ exp(-x²)"""

    def forward(xp, x):
        z = xp.where(x < 0, -x, x)
        t = 2 / (2 + z)
        s, p = 2 * t - 1, 0.0 * t
        for c in _ERFC:
            p = p * s + c
        tail = t * xp.exp(p - z * z)  # erfc(z), with a small *relative* error however large z is
        return xp.where(x < 0, 2 - tail, tail)

    def vjp(xp, g, y, x):
        return (-2 / math.sqrt(math.pi) * g * xp.exp(-x * x),)


# --- activations ----------------------------------------------------------------------------------


@op("()->()")
class tanh:
    """y = tanh x = (e^x - e^-x) / (e^x + e^-x)

    dy/dx = 1 - tanh² x:
    x̄ = g ⊙ (1 - y²)"""

    def vjp(xp, g, y, x):
        return (g * (1 - y * y),)


@op("()->()")
class sigmoid:
    """y = σ(x) = 1 / (1 + e^-x), and the same as e^x / (1 + e^x), which is used for x < 0

    dy/dx = e^-x / (1 + e^-x)² = σ(x) (1 - σ(x)):
    x̄ = g ⊙ y ⊙ (1 - y)"""

    def forward(xp, x):
        e = xp.exp(xp.where(x < 0, x, -x))  # e^-|x| never overflows
        return xp.where(x < 0, e, 1.0) / (1 + e)

    def vjp(xp, g, y, x):
        return (g * y * (1 - y),)


@op("()->()")
class relu:
    """y = x if x > 0 else 0

    dy/dx = 1 for x > 0 and 0 for x < 0; at the kink 0 is chosen, as everyone does:
    x̄ = where(x ≤ 0, 0, g)"""

    def forward(xp, x):
        return xp.where(x <= 0, 0, x)  # not x > 0: NaN must stay NaN

    def vjp(xp, g, y, x):
        return (xp.where(x <= 0, 0.0, g),)


@op("()->()")
class silu:
    """y = x σ(x), also called swish

    dy/dx = σ + x σ (1 - σ) = σ + y (1 - σ):
    s = σ(x)
    x̄ = g ⊙ (s + y ⊙ (1 - s))"""

    def forward(xp, x):
        return x * xp.sigmoid(x)

    def vjp(xp, g, y, x):
        s = xp.sigmoid(x)
        return (g * (s + y * (1 - s)),)


@op("()->()")
class gelu:
    """y = x Φ(x),  Φ(x) = erfc(-x/√2) / 2 the normal distribution function (Hendrycks & Gimpel,
    2016)

    Φ' = φ(x) = e^(-x²/2) / √(2π), so dy/dx = Φ(x) + x φ(x):
    Φ = erfc(-x / √2) / 2
    φ = exp(-x² / 2) / √(2π)
    x̄ = g ⊙ (Φ + x ⊙ φ)"""

    def forward(xp, x):
        return x * xp.erfc(-x / math.sqrt(2)) / 2

    def vjp(xp, g, y, x):
        Phi = xp.erfc(-x / math.sqrt(2)) / 2
        phi = xp.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return (g * (Phi + x * phi),)


@op("()->()")
class gelu_tanh:
    """y = x/2 (1 + tanh u),  u = √(2/π) (x + 0.044715 x³): GPT-2's approximation of gelu

    dy/dx = (1 + tanh u)/2 + x/2 (1 - tanh² u) du/dx:
    t = tanh(√(2 / π) (x + 0.044715 x³))
    du = √(2 / π) (1 + 3 · 0.044715 x²)
    x̄ = g ⊙ (1 + t + x ⊙ (1 - t²) ⊙ du) / 2"""

    def forward(xp, x):
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return x * (1 + xp.tanh(u)) / 2

    def vjp(xp, g, y, x):
        t = xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        return (g * (1 + t + x * (1 - t * t) * du) / 2,)


# --- choosing -------------------------------------------------------------------------------------


@op("(),(),()->()", c="bool")
class where:
    """y = a where c, else b

    Each element of g belongs to the side that was chosen:
    ā = where(c, g, 0)
    b̄ = where(c, 0, g)"""

    def vjp(xp, g, y, c, a, b):
        return None, xp.where(c, g, 0.0), xp.where(c, 0.0, g)


@op("(),()->()")
class maximum:
    """y = max(a, b)

    The larger one gets g; where they are equal, each gets half:
    tie = where(a = b, g / 2, 0)
    ā = where(a > b, g, tie)
    b̄ = where(a < b, g, tie)"""

    def vjp(xp, g, y, a, b):
        tie = xp.where(a == b, g / 2, 0.0)
        return xp.where(a > b, g, tie), xp.where(a < b, g, tie)


@op("(),()->()")
class minimum:
    """y = min(a, b)

    The smaller one gets g; where they are equal, each gets half:
    tie = where(a = b, g / 2, 0)
    ā = where(a < b, g, tie)
    b̄ = where(a > b, g, tie)"""

    def vjp(xp, g, y, a, b):
        tie = xp.where(a == b, g / 2, 0.0)
        return xp.where(a < b, g, tie), xp.where(a > b, g, tie)


@op("()->()")
class abs:
    """y = |x|

    dy/dx is the sign of x; at the kink 0 is chosen:
    x̄ = where(x > 0, g, where(x < 0, -g, 0))"""

    def forward(xp, x):
        return xp.where(x == 0, 0, xp.where(x < 0, -x, x))

    def vjp(xp, g, y, x):
        return (xp.where(x > 0, g, xp.where(x < 0, -g, 0.0)),)


@op("()->()", examples=[{"low": -0.5, "high": 0.5}, {"low": 0.0}, {"high": 0.0}])
class clip:
    """y = x, but no less than low and no more than high, where these are given

    Where x is outside, y does not depend on it (at a bound it still does):
    u = where(x < low, 0, g)
    x̄ = where(x > high, 0, u)"""

    def forward(xp, x, *, low=None, high=None):
        y = x if low is None else xp.where(x < low, low, x)
        return y if high is None else xp.where(y > high, high, y)

    def vjp(xp, g, y, x, *, low=None, high=None):
        u = g if low is None else xp.where(x < low, 0.0, g)
        return (u if high is None else xp.where(x > high, 0.0, u),)


@op("(),()->()", keep="constant")
class dropout:
    """y = keep ⊙ x,  keep = 1/(1-p) with probability 1-p, else 0, drawn by the caller

    E[y] = x. The same elements are dropped on the way back:
    x̄ = keep ⊙ g"""

    def forward(xp, x, keep):
        return keep * x

    def vjp(xp, g, y, x, keep):
        return keep * g, None


@op("()->()", examples=[{"dtype": "float64"}])
class cast:
    """y = x in another dtype

    The identity, up to rounding; the engine brings every gradient into the dtype of its array:
    x̄ = g"""

    def forward(xp, x, *, dtype):
        return xp.astype(x, getattr(xp, dtype))

    def vjp(xp, g, y, x, *, dtype):
        return (g,)
