"""Where a token stands: rotary position embeddings (Su et al., "RoFormer", 2021)."""

from . import op


@op(cos="constant", sin="constant")
class rope:
    """Each pair (a, b) of the numbers of x, turned by an angle: y's pair is
    (a cos - b sin, b cos + a sin)

    x (..., T, d); cos and sin (T, d/2) of the angle of each time and pair. The pairs are
    (x_k, x_{k + d/2}) or, if interleaved, (x_{2k}, x_{2k+1}). A turn's adjoint turns back:
    x̄ = rope(g, cos, -sin, interleaved)"""

    def forward(xp, x, cos, sin, *, interleaved=False):
        half = x.shape[-1] // 2
        if interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x[..., :half], x[..., half:]
        turned = a * cos - b * sin, b * cos + a * sin
        if interleaved:
            return xp.reshape(xp.stack(turned, axis=-1), x.shape)
        return xp.concat(turned, axis=-1)

    def vjp(xp, g, y, x, cos, sin, *, interleaved=False):
        return xp.rope(g, cos, -sin, interleaved=interleaved), None, None

    def sample(rng):
        b, t, h = rng.integers(1, 4, 3).tolist()
        shapes = [(b, t, 2 * h), (t, h), (t, h)]
        return shapes, {"interleaved": bool(rng.integers(2))}
