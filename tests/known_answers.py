"""The numbers that the book prints, chapter by chapter: Raschka, "Build a Large Language Model
(From Scratch)". Nothing here needs PyTorch: its random stream is that of tinygrad_llm/random.py.

test_book.py runs these tests, where PyTorch cannot be imported, with those of the chapters on
tokens and batches. The 124M model's logits and text are on docs/ch05.md, which it runs, too.
"""

import math
import os
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from texts import verdict

from tinygrad_llm import Tensor, grad, nn, no_grad, optim, random, tensor
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.data import create_dataloader
from tinygrad_llm.generate import Sampler, generate, top_k
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import steps
from tinygrad_llm.tokenizer import gpt2


def printed(actual, expected, digits=4):
    """Fails unless the numbers are those that are printed, to as many digits."""
    actual = actual.data if isinstance(actual, Tensor) else np.asarray(actual)
    expected = np.array(expected)
    assert actual.shape == expected.shape
    right = np.abs(actual.astype(np.float64) - expected) <= 0.500001 * 10.0**-digits + 1e-7
    assert right.all(), f"{actual[~right]} printed as {expected[~right]}"


def count(*modules):
    """How many parameters they have."""
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(autouse=True)
def stream():
    """Each test leaves the default generator as it was."""
    state = random.default_generator.get_state()
    yield
    random.default_generator.set_state(state)


# --- chapter 0 and appendix A: tensors and gradients ----------------------------------------------


def test_a_logistic_regression_by_hand():
    y, x1, w, b = (tensor([value]) for value in (1.0, 1.1, 2.2, 0.0))
    w.requires_grad = b.requires_grad = True
    loss = F.binary_cross_entropy(F.sigmoid(x1 * w + b), y)
    printed(loss, 0.085188, 6)
    dw, db = grad(loss, [w, b])
    printed(dw, [-0.089826], 6)
    printed(db, [-0.081660], 6)
    loss = F.binary_cross_entropy(F.sigmoid(x1 * w + b), y)
    loss.backward()
    printed(w.grad, [-0.0898])
    printed(b.grad, [-0.0817])


def test_tensors_copy_and_from_numpy_shares():
    array = np.arange(8.0).reshape(2, 2, 2)
    copied, shared = tensor(array), Tensor(array)
    array[0, 0, 0] = 999
    assert copied.data[0, 0, 0] == 0 and shared.data[0, 0, 0] == 999
    assert tensor([1, 2]).dtype == np.int64 and tensor([1.0]).dtype == np.float32
    x = tensor([[1, 2, 3], [4, 5, 6]])
    assert np.array_equal((x @ x.T).data, [[14, 32], [32, 77]])


def mlp(*sizes):
    layers = []
    for n, m in pairwise(sizes):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_a_multilayer_perceptron():
    random.manual_seed(123)
    model = mlp(50, 30, 20, 3)
    assert count(model) == 2213 and count(mlp(2, 30, 20, 2)) == 752
    random.manual_seed(123)
    x = random.rand(1, 50)
    with no_grad():
        y = model(x)
    printed(y, [[-0.1262, 0.1080, -0.1792]])
    printed(F.softmax(y, axis=1), [[0.3113, 0.3934, 0.2952]])


def test_the_five_steps_of_backpropagation():
    random.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
    x, y = random.randn(4, 10), tensor([[1.0], [0.0], [1.0], [0.0]])
    optimizer, losses = optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(50):
        loss = F.binary_cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


# --- chapter 3: embeddings ------------------------------------------------------------------------

TABLE = [
    [0.3374, -0.1778, -0.1690],
    [0.9178, 1.5810, 1.3010],
    [1.2753, -0.2010, -0.1606],
    [-0.4015, 0.9666, -1.1481],
    [-1.1589, 0.3255, -0.6315],
    [-2.8400, -0.7849, -1.4096],
]


def test_an_embedding():
    random.manual_seed(123)
    embedding = nn.Embedding(6, 3)
    printed(embedding.weight, TABLE)
    printed(embedding(np.array([2, 3, 5, 1])), [TABLE[i] for i in (2, 3, 5, 1)])


def test_an_embedding_is_one_hot_times_its_table():
    random.manual_seed(123)
    weight = random.randn(4, 5, requires_grad=True)
    ids, g = np.array([2, 3, 1, 2]), random.randn(4, 5)
    looked_up = F.embedding(ids, weight)
    multiplied = Tensor(np.eye(4, dtype=np.float32)[ids]) @ weight
    assert np.array_equal(looked_up.data, multiplied.data)
    (a,), (b,) = grad(looked_up, [weight], g), grad(multiplied, [weight], g)
    np.testing.assert_allclose(a.data, b.data, rtol=1e-6)


def test_positions_are_added():
    random.manual_seed(123)
    tokens, positions = nn.Embedding(50257, 256), nn.Embedding(4, 256)
    ids = np.arange(32).reshape(8, 4)
    assert (tokens(ids) + positions(np.arange(4))).shape == (8, 4, 256)
    printed(tensor([0.5, -0.2, 0.1]) + tensor([0.1, 0.3, -0.1]), [0.6, 0.1, 0.0])


# --- chapter 4: attention -------------------------------------------------------------------------

INPUTS = tensor(
    [
        [0.43, 0.15, 0.89],  # Your
        [0.55, 0.87, 0.66],  # journey
        [0.57, 0.85, 0.64],  # starts
        [0.22, 0.58, 0.33],  # with
        [0.77, 0.25, 0.10],  # one
        [0.05, 0.80, 0.55],  # step
    ]
)
CAUSAL = [
    [-0.4519, 0.2216],
    [-0.5874, 0.0058],
    [-0.6300, -0.0632],
    [-0.5675, -0.0843],
    [-0.5526, -0.0981],
    [-0.5299, -0.1081],
]


def test_the_notes_example_of_attention():
    words = tensor([[0.34, 0.22, 0.54], [0.53, 0.34, 0.98], [0.29, 0.54, 0.93]])
    scores = words[1] @ words.T
    printed(scores, [0.7842, 1.3569, 1.2487])
    weights = F.softmax(scores)
    printed(weights, [0.2291, 0.4063, 0.3646])
    printed(weights @ words, [0.3990, 0.3854, 0.8610])
    printed(steps.SimpleSelfAttention()(words)[1], [0.3990, 0.3854, 0.8610])


def test_attention_without_weights():
    scores = INPUTS @ INPUTS.T
    printed(scores[1], [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865])
    printed(scores[1] / scores[1].sum(), [0.1455, 0.2278, 0.2249, 0.1285, 0.1077, 0.1656])
    weights = F.softmax(scores)
    printed(weights[1], [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581])
    printed(weights.sum(axis=-1), np.ones(6))
    printed(steps.SimpleSelfAttention()(INPUTS)[1], [0.4419, 0.6515, 0.5683])
    naive = np.exp(scores.data) / np.exp(scores.data).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(naive, weights.data, rtol=1e-6)


def test_attention_with_raw_weights():
    random.manual_seed(123)
    attention = steps.SelfAttentionV1(3, 2)
    q, k = INPUTS @ attention.W_query, INPUTS @ attention.W_key
    printed(q[1], [0.4306, 1.4551])
    printed(q[1] @ k[1], 1.8524)
    scores = q[1] @ k.T
    printed(scores, [1.2705, 1.8524, 1.8111, 1.0795, 0.5577, 1.5440])
    weights = F.softmax(scores / math.sqrt(2))
    printed(weights, [0.1500, 0.2264, 0.2199, 0.1311, 0.0906, 0.1820])
    expected = [
        [0.2996, 0.8053],
        [0.3061, 0.8210],
        [0.3058, 0.8203],
        [0.2948, 0.7939],
        [0.2927, 0.7891],
        [0.2990, 0.8040],
    ]
    printed(attention(INPUTS), expected)


def test_attention_with_linear_layers():
    random.manual_seed(789)
    expected = [
        [-0.0739, 0.0713],
        [-0.0748, 0.0703],
        [-0.0749, 0.0702],
        [-0.0760, 0.0685],
        [-0.0763, 0.0679],
        [-0.0754, 0.0693],
    ]
    attention = steps.SelfAttentionV2(3, 2)
    printed(attention(INPUTS), expected)
    raw = steps.SelfAttentionV1(3, 2)  # exercise 3.1: the same weights, transposed
    for name in ("W_query", "W_key", "W_value"):
        getattr(raw, name).data[...] = getattr(attention, name).weight.data.T
    np.testing.assert_allclose(raw(INPUTS).data, attention(INPUTS).data, rtol=1e-5)
    random.manual_seed(123)
    printed(steps.SelfAttentionV2(3, 2)(INPUTS)[::5], [[-0.5337, -0.1051], [-0.5299, -0.1081]])


def test_three_causal_masks():
    random.manual_seed(789)
    attention = steps.SelfAttentionV2(3, 2)
    scores = attention.W_query(INPUTS) @ attention.W_key(INPUTS).T / math.sqrt(2)
    ways = [
        steps.causal_weights_by_renormalising(scores),
        steps.causal_weights_by_filling(scores),
        steps.causal_weights_by_adding(scores),
    ]
    rows = [[1.0], [0.5517, 0.4483], [0.3800, 0.3097, 0.3103], [0.2758, 0.2460, 0.2462, 0.2319]]
    for weights in ways:
        for i, row in enumerate(rows):
            printed(weights[i], row + [0.0] * (5 - i))
        np.testing.assert_allclose(weights.data, ways[0].data, rtol=1e-5)


def test_dropout_on_ones():
    random.manual_seed(123)
    expected = [
        [2, 2, 0, 2, 2, 0],
        [0, 0, 0, 2, 0, 2],
        [2, 2, 2, 2, 0, 2],
        [0, 2, 2, 0, 0, 2],
        [0, 2, 0, 2, 0, 2],
        [0, 2, 2, 2, 2, 0],
    ]
    assert np.array_equal(F.dropout(Tensor(np.ones((6, 6), np.float32)), 0.5).data, expected)


def test_causal_and_multi_head_attention():
    batch = F.stack([INPUTS, INPUTS])
    random.manual_seed(123)
    printed(steps.CausalAttention(3, 2, 6)(batch), [CAUSAL, CAUSAL])
    random.manual_seed(123)
    y = steps.MultiHeadAttentionWrapper(3, 2, 6, n_heads=2)(batch)
    assert y.shape == (2, 6, 4)
    printed(y[1, :, :2], CAUSAL)
    printed(y[0, ::5, 2:], [[0.4772, 0.1063], [0.5077, 0.3493]])
    random.manual_seed(123)
    expected = [
        [0.3190, 0.4858],
        [0.2943, 0.3897],
        [0.2856, 0.3593],
        [0.2693, 0.3873],
        [0.2639, 0.3928],
        [0.2575, 0.4028],
    ]
    printed(nn.MultiHeadAttention(3, 2, 6, n_heads=2)(batch), [expected, expected])
    random.manual_seed(123)
    printed(steps.MultiHeadAttention(3, 2, 6, n_heads=2)(batch), [expected, expected])


def test_products_of_the_last_two_axes():
    a = tensor(
        [
            [
                [
                    [0.2745, 0.6584, 0.2775, 0.8573],
                    [0.8993, 0.0390, 0.9268, 0.7388],
                    [0.7179, 0.7058, 0.9156, 0.4340],
                ],
                [
                    [0.0772, 0.3565, 0.1479, 0.5331],
                    [0.4066, 0.2318, 0.4545, 0.9737],
                    [0.4606, 0.5159, 0.4220, 0.5786],
                ],
            ]
        ]
    )
    y = a @ a.transpose(2, 3)
    printed(y[0, 0, 0], [1.3208, 1.1631, 1.2879])
    printed(y[0, 1, 0], [0.4391, 0.7003, 0.5903])


def test_attention_of_gpt2s_size():
    with nn.no_init():
        attention = nn.MultiHeadAttention(768, 768, 1024, n_heads=12)
    assert count(attention) == 2_360_064


# --- chapter 5: architecture ----------------------------------------------------------------------


def test_layer_norm():
    random.manual_seed(123)
    x = random.randn(2, 5)
    layer = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    y = layer(x)
    printed(y, [[0.2260, 0.3470, 0, 0.2216, 0, 0], [0.2133, 0.2394, 0, 0.5198, 0.3297, 0]])
    mean, var = y.data.mean(axis=-1), y.data.var(axis=-1, ddof=1)
    printed(mean, [0.1324, 0.2170])
    printed(var, [0.0231, 0.0398])
    normalised = (y.data - mean[:, None]) / np.sqrt(var[:, None])
    printed(normalised[0], [0.6159, 1.4126, -0.8719, 0.5872, -0.8719, -0.8719])
    y = nn.LayerNorm(6)(y).data
    printed(y.mean(axis=-1), [0.0, 0.0])
    printed(y.var(axis=-1), [0.9995, 0.9997])  # biased, as in GPT-2; ε is what is missing


def gradient_means(shortcut):
    random.manual_seed(123)
    sizes = [3, 3, 3, 3, 3, 1]
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    x = tensor([[1.0, 0.0, -1.0]])
    for layer in layers:
        y = F.gelu(layer(x), "tanh")
        x = x + y if shortcut and x.shape == y.shape else y
    F.mse_loss(x, tensor([[0.0]])).backward()
    return [np.abs(layer.weight.grad.data).mean() for layer in layers]


def test_gradients_vanish_without_shortcuts():
    without = [0.000201736, 0.00012011, 0.00071520, 0.00139887, 0.00504965]
    np.testing.assert_allclose(gradient_means(False), without, rtol=5e-5)
    shortcut = [0.22169793, 0.20694107, 0.32896996, 0.26657322, 1.32585406]
    np.testing.assert_allclose(gradient_means(True), shortcut, rtol=1e-6)


def test_gelu_has_its_minimum_near_minus_three_quarters():
    x = np.linspace(-3, 3, 6001, dtype=np.float32)
    for form in ("tanh", "none"):
        assert abs(x[F.gelu(tensor(x), form).data.argmin()] + 0.7524) < 0.01


COUNTS = {  # untied, tied, MiB of the untied one in float32; tied with biases on q, k, v
    "gpt2": (163_009_536, 124_412_160, 621.83, 124_439_808),
    "gpt2-medium": (406_212_608, 354_749_440, 1549.58, 354_823_168),
    "gpt2-large": (838_220_800, 773_891_840, 3197.56, 774_030_080),
    "gpt2-xl": (1_637_792_000, 1_557_380_800, 6247.68, 1_557_611_200),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_every_size(name):
    untied, tied, size, biased = COUNTS[name]
    plain = {"qkv_bias": False}
    assert GPTConfig.from_name(name, **plain, tie_weights=False).num_parameters() == untied
    assert GPTConfig.from_name(name, **plain).num_parameters() == tied
    assert GPTConfig.from_name(name).num_parameters() == biased
    assert round(untied * 4 / 2**20, 2) == size


def test_parameters_of_a_block():
    block = nn.TransformerBlock(768, 12, 1024)
    assert count(block.att.qkv) == 3 * 589_824 == 1_769_472 and count(block.att.out_proj) == 590_592
    assert (count(block.ff.up), count(block.ff.down)) == (2_362_368, 2_360_064)
    assert count(block.norm1, block.norm2) == 3_072
    assert count(block.ff) == 4_722_432 and count(block) == 7_085_568
    assert block(Tensor(np.zeros((2, 4, 768), np.float32))).shape == (2, 4, 768)


def test_parameters_of_gpt2():
    with nn.no_init():
        model = GPT(GPTConfig(qkv_bias=False, tie_weights=False))
    assert (count(model.tok_emb), count(model.pos_emb)) == (38_597_376, 786_432)
    assert count(model.tok_emb, model.pos_emb) == 39_383_808
    assert count(model.blocks) == 85_026_816 and count(model.final_norm) == 1_536
    assert count(model.out_head) == 38_597_376 and count(model) == 163_009_536


def test_dropout_rates_of_their_own():
    """Exercise 4.3: of the embeddings, of attention and of the shortcuts."""
    rates = {"drop_rate_emb": 0.0, "drop_rate_attn": 0.3, "drop_rate_shortcut": 0.2}
    model = GPT(GPTConfig(7, 5, 4, 2, 1, drop_rate=0.1, **rates))
    (block,) = model.blocks
    assert (model.drop_emb.p, block.att.dropout, block.drop.p) == (0.0, 0.3, 0.2)
    (block,) = GPT(GPTConfig(7, 5, 4, 2, 1, drop_rate=0.1)).blocks
    assert (block.att.dropout, block.drop.p) == (0.1, 0.1)
    with pytest.raises(ValueError, match="drop_rate_attn is a number between 0 and 1, not 2"):
        GPTConfig(drop_rate_attn=2)


# --- chapter 6 and appendix D: pretraining --------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    """The 124M model with a context of 256, as it starts, without dropout."""
    cfg = GPTConfig(context_length=256, tie_weights=False)
    return GPT(cfg, random.Generator(123), init="torch").eval()


def test_an_untrained_model_is_helpless(untrained):
    inputs = np.array([[16833, 3626, 6100], [40, 1107, 588]])
    targets = np.array([[3626, 6100, 345], [1107, 588, 11311]])
    with no_grad():
        logits = untrained(inputs)
    p = F.softmax(logits).data
    assert p.argmax(axis=-1).tolist() == [[16657, 339, 42826], [49906, 29669, 41751]]
    p = np.take_along_axis(p, targets[..., None], axis=-1)[..., 0]
    chances = [[7.4541e-05, 3.1061e-05, 1.1563e-05], [1.0337e-05, 5.6776e-05, 4.7559e-06]]
    np.testing.assert_allclose(p, chances, rtol=5e-5)
    printed(np.log(p), [[-9.5042, -10.3796, -11.3677], [-11.4798, -9.7764, -12.2561]])
    loss = F.cross_entropy(logits, targets)
    printed(loss, 10.7940)
    assert math.exp(loss.item()) == pytest.approx(48725.82, abs=0.2)


def test_an_untrained_models_losses_of_the_verdict(untrained):
    text = verdict()
    if not os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", "")):
        pytest.skip("set TIKTOKEN_CACHE_DIR to the folder with GPT-2's vocabulary")
    split = int(0.9 * len(text))
    for part, drop_last, batches, expected in (
        (text[:split], True, 9, 10.987583),
        (text[split:], False, 1, 10.981106),
    ):
        tokens, own = gpt2().encode(part), random.Generator(123)
        loader = create_dataloader(tokens, 2, 256, 256, drop_last, drop_last, generator=own)
        with no_grad():
            losses = [untrained.loss(ids, targets).item() for ids, targets in loader]
        assert len(losses) == len(loader) == batches
        assert np.mean(losses) == pytest.approx(expected, abs=2e-6)


LOGITS = np.array([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]], np.float32)


def test_a_thousand_draws_at_three_temperatures():
    for temperature, expected in (
        (1.0, [73, 0, 0, 582, 2, 0, 0, 343, 0]),
        (0.1, [0, 0, 0, 985, 0, 0, 0, 15, 0]),
        (5.0, [165, 75, 42, 239, 71, 46, 32, 227, 103]),
    ):
        draw = Sampler(temperature, generator=random.Generator(123))
        drawn = [int(draw(LOGITS, ids=None)[0]) for _ in range(1000)]
        assert np.bincount(drawn, minlength=9).tolist() == expected
    pizza = F.softmax(tensor(LOGITS / 5)).data[0, 6]
    printed(pizza, 0.0430)


def test_the_three_likeliest():
    p = F.softmax(tensor(top_k(LOGITS, 3)))
    printed(p, [[0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0]])


def test_a_gradient_is_clipped_to_length_one():
    w = tensor(np.zeros((2, 2), np.float32), requires_grad=True)
    w.grad = tensor([[1.0, 2.0], [2.0, 4.0]])
    assert optim.clip_grad_norm_([w], 1.0) == 5.0
    printed(w.grad, [[0.2, 0.4], [0.4, 0.8]])


def test_warm_up_and_cosine():
    steps, warmup = 135, int(0.2 * 135)
    for step, expected in (
        (0, 0.0001),
        (1, 0.000466667),
        (warmup, 0.01),  # the peak itself, which a later repair of the book's code is about
        (81, 0.005005),
        (134, 1.2113e-05),
    ):
        lr = optim.warmup_cosine(step, steps, warmup, peak=0.01, initial=0.0001, minimum=0.00001)
        assert lr == pytest.approx(expected, rel=2e-5)


# --- errors in circulation, which must not come back ----------------------------------------------


def test_a_mask_is_filled_in_not_multiplied():
    """0 · -∞ is NaN: triu(ones) * -inf is no mask."""
    scores = tensor(np.zeros((3, 3), np.float32))
    with np.errstate(invalid="ignore"):
        assert np.isnan(np.triu(np.ones((3, 3)), 1) * -np.inf).any()
    for way in (steps.causal_weights_by_filling, steps.causal_weights_by_adding):
        printed(way(scores)[2], [0.3333, 0.3333, 0.3333])


def test_heads_divide_the_channels():
    with pytest.raises(ValueError, match="n_heads must divide d_out, but 8 / 3 leaves 2"):
        nn.MultiHeadAttention(8, 8, 6, n_heads=3)


class Rows(nn.Module):
    """Row i of the batch has the logits of row i, whatever the ids are."""

    def __init__(self, logits):
        self.logits = np.array(logits, np.float32)  # (B, V)
        self.cfg = SimpleNamespace(context_length=9, vocab_size=self.logits.shape[1])

    def forward(self, ids):
        return Tensor(np.repeat(self.logits[:, None], ids.shape[1], axis=1))


def test_top_k_is_taken_row_by_row():
    """Against the k-th logits as (B,) and not (B, 1), each column would meet another row's."""
    model = Rows([[5, 4, 0], [0, 1, 2], [9, 7, 8]])
    drawn = generate(model, [[0], [0], [0]], 100, top_k=2, generator=random.Generator(0))
    assert [set(row[1:].tolist()) for row in drawn] == [{0, 1}, {1, 2}, {0, 2}]
