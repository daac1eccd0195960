"""Where a token stands: rotary position embeddings."""

import triton
import triton.language as tl

from .arguments import flag, inner_contiguous, integer, needed, not_empty, shaped
from .arrays import array, cdiv, next_power_of_2
from .driver import launch
from .tuning import configuration

FUSED = ()


@triton.jit(do_not_specialize=["start"])
def _rope(
    x, cos, sin, y, stride_xb, stride_xh, stride_xt, stride_cos, stride_sin, H, T, d, start,
    BACKWARDS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, TIMES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """HEADS heads at TIMES times, (HEADS, TIMES, D/2) pairs: cos and sin are read once for them."""
    p = tl.program_id(0)
    groups, spans = tl.cdiv(H, HEADS), tl.cdiv(T, TIMES)
    h = (p // spans % groups) * HEADS + tl.arange(0, HEADS)[:, None, None]
    t = (p % spans) * TIMES + tl.arange(0, TIMES)[None, :, None]
    k = tl.arange(0, D // 2)[None, None, :]  # the pair
    b = (p // spans // groups).to(tl.int64)
    inside = (h < H) & (t < T)
    known = (t < T) & (k < d // 2)
    c = tl.load(cos + (start + t).to(tl.int64) * stride_cos + k, mask=known, other=0.0)
    s = tl.load(sin + (start + t).to(tl.int64) * stride_sin + k, mask=known, other=0.0)
    if BACKWARDS:
        s = -s
    x += b * stride_xb + h.to(tl.int64) * stride_xh + t.to(tl.int64) * stride_xt
    y += ((b * H + h) * T + t) * d
    if INTERLEAVED:
        i = tl.arange(0, D)[None, None, :]
        x_i = tl.load(x + i, mask=inside & (i < d), other=0.0).to(tl.float32)
        x_1, x_2 = tl.split(tl.reshape(x_i, [HEADS, TIMES, D // 2, 2]))
        y_i = tl.join(x_1 * c - x_2 * s, x_2 * c + x_1 * s)
        y_i = tl.reshape(y_i, [HEADS, TIMES, D])
        tl.store(y + i, y_i.to(y.dtype.element_ty), mask=inside & (i < d))
    else:
        inside = inside & (k < d // 2)
        x_1 = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(x + d // 2 + k, mask=inside, other=0.0).to(tl.float32)
        y_1, y_2 = x_1 * c - x_2 * s, x_2 * c + x_1 * s
        tl.store(y + k, y_1.to(y.dtype.element_ty), mask=inside)
        tl.store(y + d // 2 + k, y_2.to(y.dtype.element_ty), mask=inside)


class rope:
    """Turns each pair (x_1, x_2) of a head's numbers by an angle θ that grows with the time t
    (Su et al., 2021)

        y_1 = cos θ x_1 - sin θ x_2
        y_2 = sin θ x_1 + cos θ x_2
        x̄   = g turned by -θ

    x (B, H, T, d) with a contiguous last axis and any other strides; y and x̄ are C-contiguous.
    cos, sin (times, d/2) in float32: row `start` is the one of x[:, :, 0], as with a cache of
    earlier keys. The pairs are (x_k, x_{k + d/2}) or, if interleaved, (x_{2k}, x_{2k+1}). cos and
    sin are constants. Nothing is saved.
    """

    @staticmethod
    def forward(x, cos, sin, *, start=0, interleaved=False):
        return _turned(x, "x", cos, sin, start, interleaved, BACKWARDS=False), ()

    @staticmethod
    def vjp(g, y, x, cos, sin, *, start=0, interleaved=False, saved, needs):
        if not needed(needs, 3)[0]:
            return (None, None, None)[: len(needs)]
        g = array(g, "g")
        shaped(g, "g", array(x, "x").shape)
        x_bar = _turned(g, "g", cos, sin, start, interleaved, BACKWARDS=True)
        return (x_bar, None, None)[: len(needs)]


def _turned(x, name, cos, sin, start, interleaved, BACKWARDS):
    x = array(x, name, ndim=4)
    not_empty(**{name: x})
    inner_contiguous(**{name: x})
    start, interleaved = integer(start, "start", 0), flag(interleaved, "interleaved")
    cos, sin = _tables(cos, sin, start, x)
    B, H, T, d = x.shape
    y = x.empty(x.shape)

    def run(config):
        groups, spans = cdiv(H, config["HEADS"]), cdiv(T, config["TIMES"])
        strides = *x.strides[:3], cos.strides[0], sin.strides[0]
        arguments = x, cos, sin, y, *strides, H, T, d, start
        options = {"BACKWARDS": BACKWARDS, "INTERLEAVED": interleaved, **config}
        launch(_rope, (B * groups * spans,), *arguments, **options)

    key = x.dtype, next_power_of_2(d), next_power_of_2(H), interleaved
    default, candidates = _tiles(H, T, d)
    run(configuration("rope", key, default, lambda: candidates, run))
    return y.data


def _tables(cos, sin, start, x):
    cos, sin = (array(a, name, ("float32",), ndim=2) for a, name in ((cos, "cos"), (sin, "sin")))
    T, d = x.shape[2:]
    if d % 2:
        raise ValueError(f"x has {d} numbers for each head; expected an even number")
    if cos.shape[0] < start + T:
        raise ValueError(
            f"cos has {cos.shape[0]} rows; expected at least {start + T}, start + T: make longer "
            "tables"
        )
    shaped(cos, "cos", (cos.shape[0], d // 2))
    shaped(sin, "sin", cos.shape)
    inner_contiguous(cos=cos, sin=sin)
    return cos, sin


def _tiles(H, T, d):
    """(default, candidates): 16 pairs for each thread, of four heads if there are as many."""
    D = next_power_of_2(d)
    found = []
    for heads, pairs in ((4, 2048), (4, 1024), (8, 2048), (2, 1024), (1, 1024), (16, 4096)):
        HEADS = min(heads, next_power_of_2(H))
        TIMES = min(max(1, 2 * pairs // (HEADS * D)), next_power_of_2(T))
        found.append({"HEADS": HEADS, "TIMES": TIMES, "D": D, "num_warps": 4})
    return found[0], found
