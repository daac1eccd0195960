"""Positions: tables, relative biases, rotary embeddings and how they are stretched; heads that
share keys, windows, and rows of several documents.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as TF  # noqa: N812
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import agree
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinygrad_llm import Tensor, data, nn, no_grad
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn.position import halves_from_interleaved, interleaved_from_halves
from tinygrad_llm.random import Generator


def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_sinusoidal_positions():
    table = nn.sinusoidal_positions(50, 8).data
    for pos, k in ((0, 0), (7, 1), (49, 3)):
        angle = pos / 10000 ** (2 * k / 8)
        np.testing.assert_allclose(
            table[pos, 2 * k : 2 * k + 2], [np.sin(angle), np.cos(angle)], rtol=1e-5
        )
    assert nn.sinusoidal_positions(5, 3).shape == (5, 3)


def test_a_relative_bias_depends_on_the_distance():
    bias = nn.RelativePositionBias(max_distance=2, n_heads=3)
    bias.weight.data[...] = np.arange(15).reshape(5, 3)
    y = bias(4, 6).data  # the last 4 of 6 tokens
    assert y.shape == (3, 4, 6)
    for i in range(4):
        for j in range(6):
            row = np.clip(j - (i + 2), -2, 2) + 2
            assert (y[:, i, j] == bias.weight.data[row]).all()
    scores = F.scaled_dot_product_attention(
        *(Tensor(randn(2, 3, 6, 4)) for _ in range(3)), mask=bias(6, 6)
    )
    scores.sum().backward()
    assert bias.weight.grad.shape == (5, 3)


# --- rotary ---------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 11), st.booleans())
@settings(max_examples=30)
def test_scores_depend_on_the_distance_alone(i, j, shift, interleaved):
    rope = nn.RotaryEmbedding(8, 32, interleaved=interleaved)
    q, k = Tensor(randn(1, 8)), Tensor(randn(1, 8, seed=1))

    def score(i, j):
        return (rope(q, i) @ rope(k, j).T).item()

    assert abs(score(i, j) - score(i + shift, j + shift)) < 1e-4


def test_layouts_are_converted():
    """The weights of q and k in the other order of rows, and rope in the other layout: the same."""
    x = Tensor(randn(6, 5))
    w = randn(16, 5)

    def heads(w):
        return (x @ Tensor(w).T).reshape(6, 2, 8).transpose(0, 1)

    halves, other = heads(w), heads(interleaved_from_halves(w, 8))
    assert not np.array_equal(halves.data, other.data)
    a, b = nn.RotaryEmbedding(8, 6)(halves), nn.RotaryEmbedding(8, 6, interleaved=True)(other)
    np.testing.assert_allclose(
        (a @ a.transpose(1, 2)).data, (b @ b.transpose(1, 2)).data, rtol=1e-4, atol=1e-4
    )
    assert np.array_equal(halves_from_interleaved(interleaved_from_halves(w, 8), 8), w)
    parameter = nn.Linear(5, 16).weight
    for convert in (interleaved_from_halves, halves_from_interleaved):
        found = convert(parameter, 8)
        assert type(found) is np.ndarray
        assert np.array_equal(found, convert(parameter.data, 8))
        assert np.array_equal(found, convert(parameter.tolist(), 8))
    with pytest.raises(ValueError, match="weight has 16 rows; expected a multiple of head_dim 7"):
        interleaved_from_halves(w, 7)
    with pytest.raises(ValueError, match="head_dim is a positive integer, not 0"):
        interleaved_from_halves(w, 0)


def test_attention_follows_its_ropes_layout():
    """With q's and k's rows reordered, and rope in the other layout: the same."""
    halves, other = (
        nn.MultiHeadAttention(
            5, 8, 6, 2, rope=nn.RotaryEmbedding(4, 6, interleaved=i), generator=Generator(0)
        )
        for i in (False, True)
    )
    x = Tensor(randn(1, 6, 5))
    assert not np.allclose(halves(x).data, other(x).data, atol=1e-3)
    w = other.qkv.weight.data
    w[:16] = interleaved_from_halves(w[:16], 4)
    np.testing.assert_allclose(halves(x).data, other(x).data, rtol=1e-4, atol=1e-6)


def theirs(rope_type, dim, base, **options):
    """What transformers makes of them."""
    config = SimpleNamespace(
        rope_parameters={"rope_type": rope_type, "rope_theta": base, **options},
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=options["original_max_position_embeddings"],
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu")


def angles(rope):
    """cos and sin of the first position after 0, as angles, and their common length."""
    cos, sin = rope.cos.data[1].astype(float), rope.sin.data[1].astype(float)
    return np.arctan2(sin, cos), np.hypot(cos, sin)


def test_position_interpolation():
    plain = nn.RotaryEmbedding(16, 2048)
    stretched = nn.RotaryEmbedding(16, 8192, scale=4)
    np.testing.assert_allclose(stretched.cos.data[::4], plain.cos.data, atol=1e-6)
    np.testing.assert_allclose(angles(stretched)[0] * 4, angles(plain)[0], rtol=1e-4)


@pytest.mark.parametrize(
    "factor, original, base, dim",
    [(8.0, 8192, 5e5, 128), (4.0, 2048, 1e4, 64), (4.0, 131_072, 1e4, 64)],
)
def test_yarn(factor, original, base, dim):
    yarn = nn.Yarn(factor, original)
    options = {"factor": factor, "original_max_position_embeddings": original}
    speeds, length = theirs("yarn", dim, base, **options)
    found, lengths = angles(nn.RotaryEmbedding(dim, 4, base, yarn=yarn))
    np.testing.assert_allclose(found, speeds.numpy(), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(lengths, length, rtol=1e-6)
    if factor == 8:
        assert yarn.length == pytest.approx(1.2079441541679836)


@given(st.integers(1, 4096), st.sampled_from([4, 16, 64]), st.sampled_from([2.0, 1e4, 5e5]))
@example(4, 16, 1e4)  # even the fastest pair turns less than once
def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(original, dim, base):
    """However short the original context; in between, speeds are in between."""
    speeds = base ** (-np.arange(0, dim, 2) / dim)
    turns = original * speeds / (2 * np.pi)
    found = nn.Yarn(4.0, original).stretch(speeds, base, dim)
    kept, interpolated = turns > 32 * (1 + 1e-9), turns < 1 - 1e-9
    np.testing.assert_allclose(found[kept], speeds[kept], rtol=1e-12)
    np.testing.assert_allclose(found[interpolated], speeds[interpolated] / 4, rtol=1e-12)
    assert (found >= speeds / 4 * (1 - 1e-12)).all() and (found <= speeds).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nn.RotaryEmbedding(7, 4), "dim is 7; expected an even number"),
        (lambda: nn.RotaryEmbedding(8, 4, scale=0), "must be above 0"),
        (lambda: nn.RotaryEmbedding(8, 4)(Tensor(randn(5, 8))), "positions 0 to 4 exceed"),
        (lambda: nn.RotaryEmbedding(8, 4)(Tensor(randn(2, 8)), start=3), "positions 3 to 4 exceed"),
        (lambda: nn.RotaryEmbedding(8, 4)(Tensor(randn(2, 8)), start=-1), "start is -1; expected"),
        (lambda: nn.RotaryEmbedding(8, 4)(Tensor(randn(8))), r"shape \(8,\), expected \(..., T, 8"),
        (lambda: nn.RotaryEmbedding(8, 4)(Tensor(randn(2, 6))), r"shape \(2, 6\), expected"),
        (lambda: nn.RotaryEmbedding(8, 4, base=-1.0), "must be above 0"),
        (lambda: nn.RotaryEmbedding(8, 4, base=np.inf), "above 0, and finite"),
        (lambda: nn.RotaryEmbedding(8, 4, scale=2, yarn=nn.Yarn(2, 4)), "give one of them"),
        (lambda: nn.RotaryEmbedding(8, 4, base=1.0, yarn=nn.Yarn(2, 4)), "base is 1.0; expected"),
        (lambda: nn.RotaryEmbedding(8, 4, base=0.5, yarn=nn.Yarn(2, 4)), "base is 0.5; expected"),
        (lambda: nn.RotaryEmbedding(8, 4, base="a"), "RotaryEmbedding: base is a number, not 'a'"),
        (lambda: nn.RotaryEmbedding(8, 4, scale=None), "scale is a number, not None"),
        (lambda: nn.sinusoidal_positions(8, 4, base="a"), "base is a number, not 'a'"),
        (lambda: nn.Yarn("a", 5), "Yarn: factor is a number, not 'a'"),
        (lambda: nn.Yarn(2.0, 5, fast="a"), "Yarn: fast is a number, not 'a'"),
        (lambda: nn.Yarn(0.5, 8), "factor >= 1"),
        (lambda: nn.Yarn(np.inf, 8), "expected finite numbers"),
        (lambda: nn.Yarn(np.nan, 8), "expected finite numbers"),
        (lambda: nn.Yarn(2.0, 8, fast=np.inf), "expected finite numbers"),
        (lambda: nn.RelativePositionBias(2, 1)(4, 3), "4 queries are not the last of 3 keys"),
        (lambda: F.rope(Tensor(randn(4)), Tensor(randn(2)), Tensor(randn(2))), r"rope: x \(4,\)"),
        (
            lambda: F.rope(Tensor(randn(4, 7)), Tensor(randn(4, 3)), Tensor(randn(4, 3))),
            "an even d",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message) as found:
        call()
    assert "\n" not in str(found.value)


# --- heads that share keys, windows, packed rows --------------------------------------------------


def attention_in_torch(layer, x):
    """The same with PyTorch's own heads, keys repeated and a mask written out."""
    H, K, D = layer.n_heads, layer.n_kv_heads, layer.head_dim
    x, T = torch.tensor(x), x.shape[1]
    weights = [torch.tensor(p.data) for p in (layer.qkv.weight, layer.qkv.bias)]
    q, k, v = TF.linear(x, *weights).split([H * D, K * D, K * D], dim=-1)
    q, k, v = (a.unflatten(-1, (-1, D)).transpose(1, 2) for a in (q, k, v))
    seen = torch.ones(T, T).tril().triu(1 - layer.window).bool()
    y = TF.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    y = y.transpose(1, 2).flatten(2)
    return TF.linear(
        y, torch.tensor(layer.out_proj.weight.data), torch.tensor(layer.out_proj.bias.data)
    )


@given(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]), st.integers(1, 9), st.integers(1, 7))
@settings(max_examples=30)
def test_shared_heads_and_windows(heads, T, window):
    n_heads, n_kv_heads = heads
    options = {"n_kv_heads": n_kv_heads, "window": window, "qkv_bias": True}
    layer = nn.MultiHeadAttention(5, 24, 9, n_heads, **options, generator=Generator(0))
    x = randn(2, T, 5)
    agree(layer(Tensor(x)), attention_in_torch(layer, x), relative=1e-5)


def test_as_many_key_heads_as_heads_is_multi_head_attention():
    a, b = (
        nn.MultiHeadAttention(5, 8, 9, 4, n_kv_heads=n, window=w, generator=Generator(1))
        for n, w in ((None, None), (4, 9))
    )
    x = Tensor(randn(2, 9, 5))
    assert np.array_equal(a(x).data, b(x).data)
    assert repr(a) == repr(b)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_rope_inside_attention(n_kv_heads):
    rope = nn.RotaryEmbedding(4, 9)
    layer = nn.MultiHeadAttention(
        5, 16, 9, 4, n_kv_heads=n_kv_heads, rope=rope, generator=Generator(0)
    )
    x = Tensor(randn(2, 9, 5))
    q, k, v = (layer.qkv(x)[..., part] for part in layer.parts())
    q, k, v = (a.reshape(2, 9, -1, 4).transpose(1, 2) for a in (q, k, v))
    k, v = (Tensor(np.repeat(a.data, 4 // n_kv_heads, axis=1)) for a in (rope(k), v))
    y = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)
    y = layer.out_proj(y.transpose(1, 2).flatten(-2))
    np.testing.assert_allclose(layer(x).data, y.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [9, 3])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_relative_bias_inside_attention(window, n_kv_heads):
    options = {"n_kv_heads": n_kv_heads, "window": window, "generator": Generator(0)}
    layer = nn.MultiHeadAttention(5, 16, 9, 4, **options)
    bias = nn.RelativePositionBias(8, 4)
    x = Tensor(randn(2, 9, 5))
    plain = layer(x).data
    np.testing.assert_allclose(layer(x, bias(9, 9)).data, plain, atol=1e-6)  # a bias of zeros
    bias.weight.data[:] = np.where(np.arange(17) == 8, 0, -1e9)[:, None]  # only the token itself
    alone = nn.MultiHeadAttention(
        5, 16, 9, 4, **{**options, "window": 1, "generator": Generator(0)}
    )
    np.testing.assert_allclose(layer(x, bias(9, 9)).data, alone(x).data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"),
        ({"window": 0}, "window is a positive integer"),
        ({"window": 3, "causal": False}, "a window needs causal=True"),
        ({"rope": nn.RotaryEmbedding(8, 9)}, "rope has dim 8 .* expected 2, which is d_out / n_h"),
        ({"rope": nn.RotaryEmbedding(2, 8)}, "context_length 8; expected 2, .* and at least 9"),
    ],
)
def test_bad_heads_windows_and_ropes(options, message):
    with pytest.raises(ValueError, match=message):
        nn.MultiHeadAttention(8, 8, 9, 4, **options)


def test_what_is_no_rope_and_no_yarn():
    with pytest.raises(TypeError, match="rope is a RotaryEmbedding, not a int"):
        nn.MultiHeadAttention(8, 8, 9, 4, rope=4)
    with pytest.raises(TypeError, match=r"yarn is a Yarn\(factor, original\), not 4"):
        nn.RotaryEmbedding(8, 4, yarn=4)


def test_packed_documents_have_the_loss_that_they_have_alone():
    cfg = GPTConfig(11, 12, 8, 2, 2, drop_rate=0.0)
    model = GPT(cfg, Generator(0))
    documents = [np.array(d) for d in ([1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 1])]
    packed = data.pack(documents, max_length=10)  # 4 + 1 + 3 inputs, two places of padding
    (batch,) = data.DataLoader(packed)
    with no_grad():
        alone = [(model.loss(d[None, :-1], d[None, 1:]).item(), len(d) - 1) for d in documents]
        together = model.loss(*batch).item()
        mixed = model.loss(*batch[:2]).item()
    expected = sum(loss * n for loss, n in alone) / sum(n for _, n in alone)
    assert together == pytest.approx(expected, rel=1e-5)
    assert mixed != pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="segments are int32 of shape"):
        model.loss(*batch[:2], batch[2][:, :3])
