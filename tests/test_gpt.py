"""The GPT against the same model written with PyTorch, and the laws that any GPT obeys."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm import nn, no_grad
from tinygrad_llm.gpt import GPT, SIZES, GPTConfig
from tinygrad_llm.optim import AdamW, clip_grad_norm_, warmup_cosine
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import Tensor

TINY = GPTConfig(
    vocab_size=53, context_length=12, emb_dim=16, n_heads=4, n_layers=3, drop_rate=0.0
)  # fmt: skip
variants = pytest.mark.parametrize("qkv_bias", [False, True])
tying = pytest.mark.parametrize("tie_weights", [False, True])


def build(seed=0, dtype=np.float32, **changes):
    """A small model; biases and gains are moved off 0 and 1, so that their gradients are tested."""
    model = GPT(dataclasses.replace(TINY, **changes), Generator(seed)).to(dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data += rng.normal(0, 0.1, parameter.shape)
    return model


def batch(seed=0, B=2, T=9, V=TINY.vocab_size):
    tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1))
    return tokens[:, :-1], tokens[:, 1:]


# --- against PyTorch ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its threads and NumPy's would wait for each other
    return torch


def torch_weights(torch, model):
    """The parameters as PyTorch leaves, under the same names; a tied head is the same leaf."""
    weights = {
        name: torch.tensor(array, requires_grad=True) for name, array in model.state_dict().items()
    }
    weights.setdefault("out_head.weight", weights["tok_emb.weight"])
    return weights


def torch_loss(torch, w, cfg, ids, targets):
    """Logits and loss of the same GPT in PyTorch's own functions."""
    F = torch.nn.functional
    C = (cfg.emb_dim,)
    ids, targets = torch.tensor(ids), torch.tensor(targets)
    B, T = ids.shape
    x = w["tok_emb.weight"][ids] + w["pos_emb.weight"][:T]
    for i in range(cfg.n_layers):

        def of(name, i=i):
            return w.get(f"blocks.{i}.{name}")

        h = F.layer_norm(x, C, of("norm1.weight"), of("norm1.bias"))
        qkv = F.linear(h, of("att.qkv.weight"), of("att.qkv.bias"))
        q, k, v = qkv.view(B, T, 3, cfg.n_heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h.transpose(1, 2).reshape(B, T, -1)
        x = x + F.linear(h, of("att.out_proj.weight"), of("att.out_proj.bias"))
        h = F.layer_norm(x, C, of("norm2.weight"), of("norm2.bias"))
        h = F.gelu(F.linear(h, of("ff.up.weight"), of("ff.up.bias")), approximate="tanh")
        x = x + F.linear(h, of("ff.down.weight"), of("ff.down.bias"))
    x = F.layer_norm(x, C, w["final_norm.weight"], w["final_norm.bias"])
    logits = F.linear(x, w["out_head.weight"])
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@variants
@tying
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-5)])
def test_logits_loss_and_every_gradient_are_pytorchs(
    torch, qkv_bias, tie_weights, dtype, tolerance
):
    model = build(dtype=dtype, qkv_bias=qkv_bias, tie_weights=tie_weights)
    ids, targets = batch()
    weights = torch_weights(torch, model)
    logits, loss = torch_loss(torch, weights, model.cfg, ids, targets)
    loss.backward()
    ours = model.loss(ids, targets)
    ours.backward()

    def near(mine, theirs, name):
        theirs = theirs.detach().numpy()
        assert mine.dtype == dtype and mine.shape == theirs.shape
        error = np.abs(mine.data - theirs).max() / np.abs(theirs).max()
        assert error < tolerance, (name, error)

    near(model(ids), logits, "logits")
    near(ours, loss, "loss")
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            # Softmax does not see what is added to all scores of a query, so the keys' part is 0:
            # both have rounding errors there, and only the scale of the whole is comparable.
            assert np.abs(parameter.grad.data[TINY.emb_dim : 2 * TINY.emb_dim]).max() < tolerance
        near(parameter.grad, weights[name].grad, name)


@tying
def test_ten_steps_of_training_have_pytorchs_losses(torch, tie_weights):
    model = build(qkv_bias=True, tie_weights=tie_weights)
    weights = torch_weights(torch, model)
    leaves = list({id(w): w for w in weights.values()}.values())
    theirs = torch.optim.AdamW(leaves, weight_decay=0.1)
    ours = AdamW(model.parameters(), weight_decay=0.1)
    for step in range(10):
        ids, targets = batch(seed=step, B=4)
        lr = warmup_cosine(step, total=10, warmup=3, peak=1e-2, initial=1e-3)
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = lr
        _, expected = torch_loss(torch, weights, model.cfg, ids, targets)
        theirs.zero_grad()
        expected.backward()
        loss = model.loss(ids, targets)
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        assert norm > 0.5  # so that clipping does something
        assert clip_grad_norm_(model.parameters(), 0.5) == pytest.approx(norm.item(), rel=1e-4)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours.step()
        theirs.step()


# --- sizes ----------------------------------------------------------------------------------------

# Of the book: without biases on q, k, v; and of OpenAI's GPT-2: with them, tied.
COUNTS = {
    "gpt2": (163_009_536, 124_412_160, 124_439_808),
    "gpt2-medium": (406_212_608, 354_749_440, 354_823_168),
    "gpt2-large": (838_220_800, 773_891_840, 774_030_080),
    "gpt2-xl": (1_637_792_000, 1_557_380_800, 1_557_611_200),
}


@pytest.mark.parametrize("name", SIZES)
def test_known_numbers_of_parameters(name):
    untied, tied, original = COUNTS[name]
    plain = GPTConfig.from_name(name, qkv_bias=False, tie_weights=False)
    assert plain.num_parameters() == untied
    assert dataclasses.replace(plain, tie_weights=True).num_parameters() == tied
    assert GPTConfig.from_name(name).num_parameters() == original


def test_the_smallest_gpt2_has_as_many_as_its_config_says():
    with nn.no_init():  # untouched memory is none
        model = GPT(GPTConfig.from_name("gpt2"))
    assert model.num_parameters() == model.cfg.num_parameters() == 124_439_808
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 7_085_568 + 3 * 768
    assert sum(p.numel() for p in model.blocks[0].ff.parameters()) == 4_722_432


@settings(max_examples=20)
@given(
    st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_built_model_has_as_many_as_its_config_says(V, T, H, D, L, qkv_bias, tied):
    cfg = GPTConfig(V, T, H * D, H, L, qkv_bias=qkv_bias, tie_weights=tied)
    assert GPT(cfg).num_parameters() == cfg.num_parameters()


def test_config_round_trip_and_the_books_dictionary():
    cfg = GPTConfig.from_name("gpt2-large", context_length=256)
    assert cfg.qkv_bias and cfg.tie_weights and cfg.context_length == 256
    assert GPTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    book = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12}
    assert GPTConfig.from_dict({**book, "n_layers": 12, "drop_rate": 0.1}) == GPTConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is a positive integer, not 0"),
        ({"n_layers": 2.0}, "n_layers is a positive integer, not 2.0"),
        ({"n_layers": True}, "n_layers is a positive integer, not True"),
        ({"emb_dim": 8, "n_heads": 3}, "n_heads must divide emb_dim, but 8 / 3 leaves 2"),
        ({"drop_rate": 1.5}, "drop_rate is a number between 0 and 1, not 1.5"),
        ({"drop_rate": math.nan}, "drop_rate is a number between 0 and 1, not nan"),
        ({"qkv_bias": 1}, "qkv_bias is True or False, not 1"),
        ({"emb_dims": 8}, "unknown ['emb_dims']; expected some of vocab_size"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError) as error:
        GPTConfig.from_dict(changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_size():
    with pytest.raises(ValueError, match=r"no size 'gpt3'; expected one of gpt2, gpt2-medium"):
        GPTConfig.from_name("gpt3")


# --- how it starts --------------------------------------------------------------------------------


def test_weights_start_as_gpt2s():
    cfg = GPTConfig(500, 64, 128, 4, n_layers=8, qkv_bias=True, tie_weights=False)
    for name, parameter in GPT(cfg, Generator(1)).named_parameters():
        if name.endswith("bias"):
            assert not parameter.data.any(), name
        elif "norm" in name:
            assert (parameter.data == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "down.weight"))
            std = 0.02 / math.sqrt(16) if residual else 0.02
            assert parameter.data.std() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.data.mean()) < std / 20, name


def test_an_untrained_model_knows_nothing():
    ids, targets = batch(B=8)
    assert GPT(TINY).loss(ids, targets).item() == pytest.approx(math.log(TINY.vocab_size), rel=0.02)


def test_no_init_draws_nothing():
    generator = Generator(3)
    before = generator.get_state()
    with nn.no_init():
        model = GPT(TINY, generator)
    assert generator.get_state() == before
    assert (model.final_norm.weight.data == 1).all()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux counts pages there")
def test_no_init_touches_no_memory():
    """In a process whose memory comes fresh from the system."""
    program = """
from pathlib import Path
from tinygrad_llm import nn
from tinygrad_llm.gpt import GPT, GPTConfig
def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = pages()
with nn.no_init():
    model = GPT(GPTConfig.from_name("gpt2"))
print(pages() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") < 10 * 2**20  # of 498 MB


# --- laws -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 11), st.integers(0, TINY.vocab_size - 1), st.integers(0, 2**32))
def test_later_tokens_never_change_earlier_logits(t, new, seed):
    model = build()
    ids, _ = batch(seed, B=1, T=12)
    changed = ids.copy()
    changed[0, t:] = new
    with no_grad():
        before, after = model(ids).data, model(changed).data
    assert np.array_equal(before[0, :t], after[0, :t])


def test_sequences_of_a_batch_do_not_see_each_other():
    model = build(dtype=np.float64)
    ids, _ = batch(B=5)
    together = model(ids).data
    for row, logits in zip(ids, together, strict=True):
        assert np.allclose(model(row[None]).data[0], logits, rtol=0, atol=1e-13)


def test_order_of_the_tokens_matters():
    model = build()
    assert not np.allclose(model([[1, 2, 3]]).data[0, -1], model([[2, 1, 3]]).data[0, -1])


def test_dropout_only_in_training():
    model = build(drop_rate=0.5)
    ids, targets = batch()
    assert model.loss(ids, targets).item() != model.loss(ids, targets).item()
    model.eval()
    plain = build()
    assert np.array_equal(model(ids).data, plain(ids).data)


def losses_of_a_run(seed, steps=4):
    model = GPT(dataclasses.replace(TINY, drop_rate=0.2), Generator(seed))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(*batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
    assert losses_of_a_run(5) == losses_of_a_run(5) != losses_of_a_run(6)


def test_it_learns_a_sequence_by_heart():
    model = GPT(TINY, Generator(0))
    ids, targets = batch(B=1)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(ids, targets).backward()
        optimizer.step()
    assert np.array_equal(model(ids).data.argmax(-1), targets)


def test_targets_of_minus_100_do_not_count():
    model = build()
    ids, targets = batch(B=1)
    some = np.where(np.arange(targets.shape[1]) < 4, targets, -100)
    first = model.loss(ids[:, :4], targets[:, :4]).item()
    assert model.loss(ids, some).item() == pytest.approx(first, rel=1e-5)


def test_the_loss_is_that_of_the_logits_whatever_the_head():
    """A head that someone has put in has a bias, say."""
    model = build()
    model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, generator=Generator(1))
    model.out_head.bias.data += np.arange(TINY.vocab_size) / 10
    ids, targets = batch()
    expected = F.cross_entropy(model(ids), targets).item()
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=1e-6)


# --- saving and loading ---------------------------------------------------------------------------


def test_tied_weights_are_one_parameter():
    model = build()
    assert model.out_head.weight is model.tok_emb.weight
    assert "out_head.weight" not in model.state_dict()
    assert model.to(np.float64).out_head.weight is model.tok_emb.weight
    ids, targets = batch()
    model.loss(ids, targets).backward()
    used = np.isin(np.arange(TINY.vocab_size), ids)
    assert model.tok_emb.weight.grad.data[~used].any()  # from the head: unused ids have one, too


@variants
@tying
def test_state_dict_round_trip(qkv_bias, tie_weights):
    one = build(1, qkv_bias=qkv_bias, tie_weights=tie_weights)
    two = build(2, qkv_bias=qkv_bias, tie_weights=tie_weights)
    ids, _ = batch()
    assert not np.allclose(one(ids).data, two(ids).data)
    two.load_state_dict(one.state_dict())
    assert np.array_equal(one(ids).data, two(ids).data)
    assert (two.out_head.weight is two.tok_emb.weight) == tie_weights
    two.tok_emb.weight.data[:] = 0
    assert one.tok_emb.weight.data.any()  # they were copied


def test_a_tied_model_takes_its_table_under_either_name_but_not_two_tables():
    tied, untied = build(1), build(2, tie_weights=False)
    state = untied.state_dict()
    with pytest.raises(ValueError, match=r"tok_emb.weight and out_head.weight differ"):
        tied.load_state_dict(state)
    table = state.pop("tok_emb.weight")
    tied.load_state_dict(state)
    assert np.array_equal(tied.tok_emb.weight.data, state["out_head.weight"])
    state["tok_emb.weight"] = table
    state["out_head.weight"] = table.copy()
    tied.load_state_dict(state)
    assert np.array_equal(tied.out_head.weight.data, table)


# --- what it takes --------------------------------------------------------------------------------


def test_ids_may_be_tensors_lists_and_any_integers():
    model = build()
    ids, _ = batch()
    expected = model(ids).data
    for same in (Tensor(ids), ids.tolist(), ids.astype(np.uint16), ids.astype(np.int32)):
        assert np.array_equal(model(same).data, expected)
    assert expected.shape == (2, 9, TINY.vocab_size) and expected.dtype == np.float32


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.zeros(4, int), ValueError, r"shape \(4,\), expected \(B, T\)"),
        (np.zeros((1, 2, 3), int), ValueError, r"shape \(1, 2, 3\), expected \(B, T\)"),
        (np.zeros((2, 0), int), ValueError, r"shape \(2, 0\), expected .* B, T >= 1"),
        (np.zeros((2, 13), int), ValueError, r"\(2, 13\) exceed context_length 12; keep the last"),
        (np.zeros((2, 3)), TypeError, r"ids are integers, not float64; encode"),
        ([[1, 53]], IndexError, r"id 53 is not in 0..52; use the tokenizer"),
        ([[1, -1]], IndexError, r"id -1 is not in 0..52"),
    ],
)
def test_wrong_ids(ids, error, message):
    with pytest.raises(error, match=message):
        build()(ids)


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"needs targets of shape \(2, 9\), not \(2, 8\)"):
        build().loss(batch()[0], np.zeros((2, 8), int))


# --- more tokens ----------------------------------------------------------------------------------


@tying
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_resize_token_embeddings(tie_weights, dtype):
    model = build(dtype=dtype, tie_weights=tie_weights).eval()
    old_rows = model.tok_emb.weight.data.copy()
    ids, _ = batch()
    before = model(ids).data
    model.resize_token_embeddings(2053, Generator(7))

    assert model.cfg.vocab_size == model.tok_emb.num_embeddings == 2053
    assert (model.out_head.weight is model.tok_emb.weight) == tie_weights
    assert model.num_parameters() == model.cfg.num_parameters()
    logits = model(ids).data
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits[..., :53], before, rtol=1e-6, atol=1e-6)
    for layer, old in ((model.tok_emb, old_rows), (model.out_head, None)):
        weight = layer.weight.data
        assert weight.shape == (2053, 16) and weight.dtype == dtype
        assert old is None or np.array_equal(weight[:53], old)
        assert abs(weight[53:].std() - 0.02) < 0.001  # 32,000 draws of N(0, 0.02)
        assert abs(weight[53:].mean()) < 0.001


@tying
def test_a_resized_model_trains_on_its_new_tokens(tie_weights):
    model = build(tie_weights=tie_weights)
    model.resize_token_embeddings(55)
    model.loss(np.array([[53, 54, 0]]), np.array([[54, 0, 53]])).backward()
    for layer in (model.tok_emb, model.out_head):
        assert layer.weight.grad.shape == (55, 16)
        assert np.all(layer.weight.grad.data[53:].any(axis=1))
    GPT(model.cfg).load_state_dict(model.state_dict())


@tying
def test_resized_weights_that_are_not_trained_stay_so(tie_weights):
    model = build(tie_weights=tie_weights)
    model.tok_emb.weight.requires_grad = False
    model.resize_token_embeddings(55)
    assert not model.tok_emb.weight.requires_grad
    assert model.out_head.weight.requires_grad == (not tie_weights)


def test_resizing_to_the_same_or_fewer():
    model = build()
    weight = model.tok_emb.weight
    model.resize_token_embeddings(53)
    assert model.tok_emb.weight is weight
    with pytest.raises(ValueError, match="cannot shrink from 53 to 52 tokens"):
        model.resize_token_embeddings(52)
    with pytest.raises(ValueError, match="vocab_size"):
        model.resize_token_embeddings(54.5)
