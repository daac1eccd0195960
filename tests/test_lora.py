"""LoRA: the start is PyTorch's, the maths is the definition's, what is frozen costs nothing, and
adapters come, go, take turns and merge."""

import copy
import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from gpu_harness import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import backend, grad, nn, no_grad, random
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import LoRAConfig
from tinygrad_llm.optim import AdamW, decay_groups
from tinygrad_llm.parallel import Shards
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import Tensor, fused

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TARGETS = np.array([[1, 4, 1, 5, 9], [2, 6, 5, 3, 5]])
LORA, LINEAR = backend.CPU.fused["lora"], backend.CPU.kernels["linear"]


def make_gpt(seed=0, **changes):
    sizes = {"vocab_size": 11, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2}
    return GPT(GPTConfig(**{**sizes, "drop_rate": 0.0, **changes}), Generator(seed))


def disturb(model, seed=5):
    """Numbers in B, as after training."""
    generator = Generator(seed)
    for layer in nn.lora_layers(model).values():
        for _, adapter in layer.adapters.named_children():
            shape = adapter.lora_B.shape
            drawn = generator.normal(0, 0.3, shape)
            adapter.lora_B.data[...] = drawn.astype(adapter.lora_B.dtype)
    return model


def logits(model):
    with no_grad():
        return model(IDS).data.copy()


def arrays(model):
    return {name: array.copy() for name, array in model.state_dict().items()}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, n", [(1, 2), (3, 5), (8, 768), (16, 1000), (5, 3072)])
def test_a_is_drawn_as_pytorch_draws_it_and_b_is_zero(rank, n):
    torch = pytest.importorskip("torch")
    torch.manual_seed(123)
    expected = torch.empty(rank, n)
    torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
    model = nn.Sequential(nn.Linear(n, 4))
    nn.apply_lora(model, LoRAConfig(rank, 1, targets="0"), generator=Generator(123))
    adapter = model[0].adapters.default
    np.testing.assert_array_equal(adapter.lora_A.data, expected.numpy())
    assert adapter.lora_B.shape == (4, rank) and not adapter.lora_B.data.any()


def test_at_first_the_model_is_what_it_was():
    model = make_gpt()
    before, names = logits(model), set(model.state_dict())
    nn.apply_lora(model, LoRAConfig(4, 8, targets=".*"))
    np.testing.assert_allclose(logits(model), before, atol=1e-6)
    assert names < set(model.state_dict())  # the weights keep their names


@pytest.mark.parametrize(
    "size, classes, tied, total, expected",
    [  # the book's
        ("gpt2", 2, True, 124_441_346, 2_666_528),
        ("gpt2-medium", None, False, 406_286_336, 7_898_384),
        ("gpt2", None, False, 163_037_184, 3_470_608),
    ],
)
def test_parameter_counts_of_the_book(size, classes, tied, total, expected):
    with nn.no_init():  # memory that nothing writes to
        model = GPT(GPTConfig.from_name(size, tie_weights=tied))
        if classes:
            model.out_head = nn.Linear(model.cfg.emb_dim, classes)
        assert nn.trainable(model) == (total, total)
        config = LoRAConfig(rank=16, alpha=16, targets=".*", split_qkv=True)
        assert nn.apply_lora(model, config) == (expected, total + expected)


def test_split_qkv_is_three_layers_with_adapters():
    """The same draws, outputs and gradients as three Linear layers with an adapter each; with fewer
    heads of keys, too, where the three have different sizes."""
    C, kv, r = 12, 4, 2
    att = nn.MultiHeadAttention(C, C, 8, n_heads=3, n_kv_heads=1, generator=Generator(1))
    nn.apply_lora(att, LoRAConfig(r, 6, targets="qkv", split_qkv=True), generator=Generator(7))
    disturb(att)
    layer, x = att.qkv, Tensor(normal(2, 3, C), requires_grad=True)
    adapter, generator, begin = layer.adapters.default, Generator(7), 0
    y = layer(x)
    g = normal(*y.shape, seed=3)
    x_bar, A_bar, B_bar = grad(y, [x, adapter.lora_A, adapter.lora_B], g)
    sum_x = np.zeros_like(x.data)
    for i, size in enumerate((C, kv, kv)):
        rows, own = slice(begin, begin + size), slice(i * r, (i + 1) * r)
        begin += size
        one = nn.Sequential(nn.Linear(C, size, bias=False))
        one[0].weight.data = layer.weight.data[rows]
        nn.apply_lora(one, LoRAConfig(r, 6, targets="0"), generator=generator)
        its = one[0].adapters.default
        np.testing.assert_array_equal(its.lora_A.data, adapter.lora_A.data[own])
        its.lora_B.data = adapter.lora_B.data[rows]
        z = one(x)
        np.testing.assert_allclose(z.data, y.data[..., rows], atol=1e-5)
        more, A_own, B_own = grad(z, [x, its.lora_A, its.lora_B], g[..., rows])
        sum_x += more.data
        np.testing.assert_allclose(A_own.data, A_bar.data[own], atol=1e-5)
        np.testing.assert_allclose(B_own.data, B_bar.data[rows], atol=1e-5)
    np.testing.assert_allclose(sum_x, x_bar.data, atol=1e-5)


# --- which layers ---------------------------------------------------------------------------------


BLOCKS = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("att.qkv", "att.out_proj")]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["qkv", "out_proj"], BLOCKS),
        (r"blocks\.1\.att\..*", BLOCKS[2:]),
        (["1.att.qkv"], BLOCKS[2:3]),
        ("out_head", ["out_head"]),
        (r".*(qkv|out_proj)", BLOCKS),
        (["att.(qkv|out_proj)"], BLOCKS),
    ],
)
def test_targets_by_name(targets, expected):
    model = make_gpt()
    nn.apply_lora(model, LoRAConfig(2, 2, targets=targets))
    assert list(nn.lora_layers(model)) == expected
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = ("lora_A", "lora_B")
    assert trained == [f"{n}.adapters.default.{ab}" for n in expected for ab in factors]


def test_by_default_the_blocks_layers():
    model = make_gpt()
    nn.apply_lora(model, LoRAConfig(2, 2))
    assert len(nn.lora_layers(model)) == 8 and "out_head" not in nn.lora_layers(model)


def test_a_layer_under_two_names_is_replaced_under_both():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.again = model[0]
    nn.apply_lora(model, LoRAConfig(1, 1, targets=["0"]))
    assert model.again is model[0] and type(model.again) is nn.LoRALinear
    nn.remove_lora(model)
    assert model.again is model[0] and type(model.again) is nn.Linear


# --- the maths ------------------------------------------------------------------------------------


def by_ops(x, w, A, B, b, scale):
    return F.linear(x, w, b) + F.linear(F.linear(x, A), B) * scale


sizes = st.integers(1, 5)


@given(sizes, sizes, sizes, sizes, st.booleans(), st.sampled_from([0.5, -2.0]), st.integers(0, 31))
@settings(max_examples=60)
def test_the_kernel_is_its_definition(n, k, m, r, bias, scale, needs):
    """In float64: outputs, and gradients for each subset of what may want them."""
    shapes = [(2, n, k), (m, k), (r, k), (m, r), (m,)][: 5 if bias else 4]
    wants = [bool(needs >> i & 1) for i in range(len(shapes))]
    inputs = [
        Tensor(normal(*shape, seed=i, dtype=np.float64), want)
        for i, (shape, want) in enumerate(zip(shapes, wants))
    ]
    inputs += [] if bias else [None]
    g, found = normal(2, n, m, seed=9, dtype=np.float64), []
    definition = lambda *xs: by_ops(*xs, scale)  # noqa: E731
    with mock.patch.object(LORA, "forward", wraps=LORA.forward) as kernel:
        for y in (fused("lora", definition, *inputs, scale=scale), definition(*inputs)):
            xs = [x for x, want in zip(inputs, wants) if want]
            found.append([y, *(grad(y, xs, g) if xs else ())])
    assert kernel.call_count == 1
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-12, atol=1e-12)


def test_the_product_is_added_in_pieces(monkeypatch):
    x, w, A, B = (normal(*s, seed=i) for i, s in enumerate([(7, 3), (4, 3), (2, 3), (4, 2)]))
    whole, _ = LORA.forward(x, w, A, B, scale=2.0)
    monkeypatch.setattr(
        sys.modules[LORA.__module__], "SIZE", 9
    )  # two rows at a time, and a last one alone
    pieces, _ = LORA.forward(x, w, A, B, scale=2.0)
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(pieces, x @ w.T + 2 * x @ A.T @ B.T, atol=1e-5)


def test_kernels_that_are_off_are_not_used():
    model = disturb_gpt()
    on = logits(model)
    for choice in ("off", "off:lora"):
        with (
            backend.using(backend.reading(choice)),
            mock.patch.object(LORA, "forward", side_effect=AssertionError),
        ):
            np.testing.assert_allclose(logits(model), on, atol=1e-5)


def disturb_gpt(**changes):
    model = make_gpt(**changes)
    nn.apply_lora(model, LoRAConfig(2, 4), generator=Generator(1))
    return disturb(model)


@pytest.mark.parametrize("split_qkv", [False, True])
def test_a_whole_model_on_a_device(split_qkv):
    """The same losses and gradients where the kernels of a GPU run."""
    found = []
    for where in ("cpu", DEVICE):
        model = make_gpt().to(where)
        config = LoRAConfig(2, 4, targets=".*", split_qkv=split_qkv)
        nn.apply_lora(model, config, generator=Generator(1))
        for layer in nn.lora_layers(model).values():  # the same numbers on both
            b = layer.adapters.default.lora_B
            b.data[...] = Tensor(normal(*b.shape) * 0.3).to(where).data
        backend.refusals.clear()
        loss = model.loss(IDS, TARGETS)
        loss.backward()
        assert not [name for name, _ in backend.refusals if name == "lora"]
        gradients = [p.grad.cpu().data for p in model.parameters() if p.requires_grad]
        found.append([loss.cpu().data, *gradients])
        nn.merge_lora(model)
        with no_grad():
            found[-1].append(model.loss(IDS, TARGETS).cpu().data)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_it_trains_as_the_same_arithmetic_in_pytorch():
    """Ten steps of AdamW with weight decay, split and scaled: the losses agree."""
    torch = pytest.importorskip("torch")
    x, t = normal(6, 5, seed=1), normal(6, 4, seed=2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    nn.apply_lora(model, LoRAConfig(2, 6, targets=["0", "2"], rslora=True))
    weights = {n: torch.tensor(a.copy()) for n, a in model.state_dict().items()}
    trained = [w.requires_grad_() for n, w in weights.items() if "lora" in n]
    ours = AdamW(decay_groups(model, 0.1), lr=0.05)
    theirs = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)

    def layer(x, i):
        w, b = weights[f"{i}.weight"], weights[f"{i}.bias"]
        A, B = (weights[f"{i}.adapters.default.lora_{c}"] for c in "AB")
        return x @ w.T + b + 6 / math.sqrt(2) * (x @ A.T) @ B.T

    for _ in range(10):
        loss = F.mse_loss(model(Tensor(x)), Tensor(t))
        ours.zero_grad()
        loss.backward()
        ours.step()
        expected = ((layer(torch.tanh(layer(torch.tensor(x), 0)), 2) - torch.tensor(t)) ** 2).mean()
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_dropout_is_on_the_adapters_input_alone():
    """In training the mean over many masks is the output without; the base never changes."""
    model = nn.Sequential(nn.Linear(6, 4))
    nn.apply_lora(model, LoRAConfig(2, 2, dropout=0.5, targets="0"), generator=Generator(3))
    x = Tensor(normal(1, 6))
    with no_grad():
        base = model(x).data  # B is zero: no mask matters
        np.testing.assert_allclose(model(x).data, base)
        disturb(model)
        drawn = np.stack([model(x).data for _ in range(4000)])
        whole = model.eval()(x).data
    assert drawn.std(axis=0).min() > 0.01
    np.testing.assert_allclose(drawn.mean(axis=0), whole, atol=0.05)
    assert (np.abs(whole - base) > 1e-3).all()
    with no_grad():
        np.testing.assert_array_equal(model(x).data, whole)


@pytest.mark.parametrize("split_qkv", [False, True])
def test_masks_come_from_the_models_own_stream(split_qkv):
    """So that a saved state repeats them, and recomputation draws them again."""
    found = []
    for recompute in (False, True):
        own = Generator(9)
        model = GPT(make_gpt().cfg, own)
        config = LoRAConfig(2, 2, dropout=0.5, split_qkv=split_qkv)
        nn.apply_lora(model, config, generator=Generator(1))
        disturb(model).recompute = recompute
        own.manual_seed(4)
        before = random.default_generator.get_state()
        loss = model.loss(IDS, TARGETS)
        drawn = own.get_state()
        loss.backward()
        assert random.default_generator.get_state() == before
        own.manual_seed(4)
        assert own.get_state() != drawn
        found.append([loss.data, *(p.grad.data for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_threads_give_the_same_gradients_each_time(dropout):
    found = []
    for _ in range(2):
        model = make_gpt()
        nn.apply_lora(model, LoRAConfig(2, 2, dropout=dropout), generator=Generator(1))
        disturb(model)
        for drop in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            drop.generator = Generator(2) if drop.generator is None else drop.generator
        loss = Shards(2).backward(model, IDS, TARGETS)
        found.append([loss, *(p.grad.data for p in model.parameters() if p.requires_grad)])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


# --- what is frozen costs nothing -----------------------------------------------------------------


def test_gradients_of_frozen_weights_are_never_computed():
    """Of all kernels, those that have parameters are never asked for a frozen one's gradient, and
    nothing below the first adapter is walked."""
    model = disturb_gpt(tie_weights=False)
    frozen = {id(p.data) for p in model.parameters() if not p.requires_grad}
    asked = []

    def watched(kernel):
        def vjp(g, y, *inputs, needs, **attributes):
            asked.extend(
                (kernel.__name__, want) for a, want in zip(inputs, needs) if id(a) in frozen
            )
            found = kernel.vjp(g, y, *inputs, needs=needs, **attributes)
            assert all(x is None for x, a in zip(found, inputs) if id(a) in frozen)
            return found

        return type(kernel.__name__, (kernel,), {"vjp": staticmethod(vjp)})

    kernels, fused_ones = (
        {name: watched(kernel) for name, kernel in those.items()}
        for those in (backend.CPU.kernels, backend.CPU.fused)
    )
    with backend.using(backend.Reading(backend._NUMPY, kernels, fused=fused_ones)):
        model.loss(IDS, TARGETS).backward()
    assert {name for name, _ in asked} == {"lora", "layer_norm", "linear_cross_entropy"}
    assert not any(want for _, want in asked)
    got = [name for name, p in model.named_parameters() if p.grad is not None]
    assert got == [name for name, p in model.named_parameters() if p.requires_grad]


def test_the_backward_pass_is_half_the_multiplications():
    """Counted in the products that are formed: w̄ = gᵀ x is left out."""
    counted = []

    def count(kernel, function):
        def vjp(g, y, x, w, *rest, needs, **attributes):
            counted.append(w.size * (x.size // x.shape[-1]) * sum(needs[:2]))
            return function(g, y, x, w, *rest, needs=needs, **attributes)

        return mock.patch.object(kernel, "vjp", staticmethod(vjp))

    found = []
    for adapt in (False, True):
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30))
        if adapt:
            nn.apply_lora(model, LoRAConfig(1, 1, targets=".*"))
        counted.clear()
        with count(LINEAR, LINEAR.vjp), count(LORA, LORA.vjp):
            reading = backend.Reading(backend._NUMPY, {"linear": LINEAR}, fused={"lora": LORA})
            with backend.using(reading):
                (model(Tensor(normal(4, 30))) * 1.0).sum().backward()
        found.append(sum(counted) / (4 * 900))
    assert found == [5, 2]  # w̄ of three layers and x̄ of two; x̄ of two


def test_the_optimizer_has_state_for_what_trains_alone():
    model = disturb_gpt()
    before = arrays(model)
    optimizer = AdamW(decay_groups(model, 0.1), lr=0.1)
    model.loss(IDS, TARGETS).backward()
    optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(optimizer.state) == len(trained) == 16
    held = sum(s["exp_avg"].size for s in optimizer.state)
    assert held == nn.trainable(model)[0]
    for name, array in arrays(model).items():
        assert np.array_equal(array, before[name]) == (name not in trained), name


MEMORY = """
import sys
import numpy as np
from tinygrad_llm import nn
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW, decay_groups

def held(of):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(of))

before = held("VmRSS")
cfg = GPTConfig(vocab_size=100, context_length=16, emb_dim=512, n_heads=8, n_layers=6, drop_rate=0)
model = GPT(cfg)
if sys.argv[1] == "lora":
    nn.apply_lora(model, nn.LoRAConfig(8, 16))
optimizer = AdamW(decay_groups(model, 0.1))
ids = np.arange(32).reshape(2, 16)
for _ in range(2):
    model.loss(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
print((held("VmHWM") - before) / (4 * cfg.num_parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_little_more_than_the_weights():
    peak = {}
    for kind in ("full", "lora"):
        command = [sys.executable, "-c", MEMORY, kind]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak[kind] = float(done.stdout)
    assert peak["full"] > 3.9  # weights, gradients, two moments
    assert peak["lora"] < 1.7


# --- several adapters -----------------------------------------------------------------------------


def test_adapters_take_turns():
    model = make_gpt().eval()
    found = {None: logits(model)}
    nn.apply_lora(model, LoRAConfig(2, 4), "a", Generator(1))
    disturb(model, 1)
    found["a"] = logits(model)
    nn.apply_lora(model, LoRAConfig(3, 3, targets=["qkv", "out_head"]), "b", Generator(2))
    for layer in nn.lora_layers(model).values():
        if hasattr(layer.adapters, "b"):
            layer.adapters.b.lora_B.data[...] = normal(*layer.adapters.b.lora_B.shape)
    found["b"] = logits(model)
    assert nn.adapter_names(model) == ["a", "b"]
    assert len({array.tobytes() for array in found.values()}) == 3
    for name in ("a", None, "b", "a"):
        nn.set_adapter(model, name)
        np.testing.assert_allclose(logits(model), found[name], atol=1e-6)
        trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == ({name} if name else set())
    nn.remove_lora(model, "b")
    assert type(model.out_head) is nn.Linear and nn.adapter_names(model) == ["a"]
    np.testing.assert_allclose(logits(model), found["a"], atol=1e-6)
    nn.remove_lora(model)
    assert not nn.lora_layers(model) and type(model.blocks[0].ff.up) is nn.Linear
    np.testing.assert_array_equal(logits(model), found[None])
    assert set(model.state_dict()) == set(make_gpt().state_dict())


def test_states_and_copies_have_the_adapters():
    model, other = disturb_gpt(), make_gpt(seed=3)
    nn.apply_lora(other, LoRAConfig(2, 4))
    other.load_state_dict(arrays(model))
    twin, expected = copy.deepcopy(model), logits(model)
    disturb(model, seed=6)
    for each in (other, twin):
        np.testing.assert_array_equal(logits(each), expected)


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_merged_is_equal_and_unmerged_is_the_same_to_the_bit(dtype, split_qkv):
    model = make_gpt().to(dtype).eval()
    config = LoRAConfig(2, 4, targets=".*", split_qkv=split_qkv, rslora=split_qkv)
    nn.apply_lora(model, config, generator=Generator(1))
    disturb(model)
    assert {p.dtype.name for p in model.parameters()} == {dtype}
    before, apart = arrays(model), logits(model).astype(np.float64)
    nn.merge_lora(model)
    nn.merge_lora(model)  # once is enough
    assert {p.dtype.name for p in model.parameters()} == {dtype}
    # 16 bits round each weight, by 2⁻⁹ of it at most
    atol = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.1, "float16": 0.02}[dtype]
    np.testing.assert_allclose(logits(model).astype(np.float64), apart, atol=atol)
    for layer in nn.lora_layers(model).values():
        adapter = layer.adapters.default
        w, A, B = (
            a.data.astype(np.float64)
            for a in (layer._before_merge.weight, adapter.lora_A, adapter.whole_b())
        )
        expected = (w + adapter.scale * B @ A).astype(layer.weight.dtype)
        np.testing.assert_allclose(
            layer.weight.data.astype(np.float64), expected.astype(np.float64), rtol=2**-7, atol=1e-6
        )
    nn.unmerge_lora(model)
    nn.unmerge_lora(model)
    assert all(np.array_equal(a, before[name]) for name, a in arrays(model).items())
    np.testing.assert_array_equal(logits(model).astype(np.float64), apart)


def test_a_tied_head_is_merged_apart_from_the_table():
    model = make_gpt().eval()
    table = model.tok_emb.weight.data.copy()
    nn.apply_lora(model, LoRAConfig(2, 4, targets="out_head"), generator=Generator(1))
    assert model.out_head.weight is model.tok_emb.weight
    apart = logits(disturb(model))
    nn.merge_lora(model)
    np.testing.assert_array_equal(model.tok_emb.weight.data, table)
    np.testing.assert_allclose(logits(model), apart, atol=1e-5)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        nn.unmerge_lora(each)
        assert each.out_head.weight is each.tok_emb.weight
    assert twin.out_head.weight is not model.out_head.weight
    np.testing.assert_array_equal(logits(twin), apart)


def test_a_merged_model_moves_and_unmerges_there():
    model = disturb_gpt().eval()
    nn.merge_lora(model)
    model.to("float64")
    nn.unmerge_lora(model)
    assert {p.dtype.name for p in model.parameters()} == {"float64"}


def test_merged_layers_refuse_to_be_trained():
    model = disturb_gpt()
    nn.merge_lora(model)
    with pytest.raises(RuntimeError, match=r"'default' is merged .*: unmerge_lora.model. first"):
        model.loss(IDS, TARGETS)
    with no_grad():
        model(IDS)
    model.eval()(IDS)
    for change in (
        lambda: nn.set_adapter(model, None),
        lambda: nn.apply_lora(model, LoRAConfig(1, 1), "more"),
    ):
        with pytest.raises(ValueError, match="'default' is merged: unmerge_lora"):
            change()
    nn.unmerge_lora(model.train())
    model.loss(IDS, TARGETS).backward()


def test_what_is_merged_may_stay_for_good(tmp_path):
    model = disturb_gpt().eval()
    apart = logits(model)
    with pytest.raises(ValueError, match=r"has LoRA adapters, .* save_adapter them, or merge_lora"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    nn.merge_lora(model)
    nn.remove_lora(model)
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(logits(GPT.from_pretrained(tmp_path).eval()), apart, atol=1e-5)


def test_a_merged_tied_head_is_saved_untied(tmp_path):
    model = make_gpt().eval()
    nn.apply_lora(model, LoRAConfig(2, 4, targets="out_head"), generator=Generator(1))
    apart = logits(disturb(model))
    nn.merge_lora(model)
    nn.remove_lora(model)
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path).eval()
    assert not loaded.cfg.tie_weights
    np.testing.assert_allclose(logits(loaded), apart, atol=1e-5)
    model.resize_token_embeddings(14)
    np.testing.assert_allclose(logits(model)[..., :11], apart, atol=1e-5)


# --- errors ---------------------------------------------------------------------------------------


BAD = [
    (dict(rank=0), "rank is a positive integer, not 0"),
    (dict(rank=2.5), "rank is a positive integer"),
    (dict(alpha="x"), "alpha is a number, not 'x'"),
    (dict(alpha=math.inf), "alpha is a finite number"),
    (dict(dropout=2), "dropout is a number between 0 and 1"),
    (dict(targets="("), "'\\(' in targets is no regular expression"),
    (dict(targets=[3]), "3 in targets is no regular expression"),
    (dict(targets=None), "targets is a str or a list of them, not None"),
    (dict(targets=iter(["qkv"])), "targets is a str or a list of them"),  # is empty the second time
]


@pytest.mark.parametrize("changes, words", BAD)
def test_bad_settings(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        LoRAConfig(**{"rank": 2, "alpha": 2, **changes})


def test_what_cannot_be_applied_changes_nothing():
    model = disturb_gpt()
    names, before = list(model.state_dict()), logits(model)
    kinds = r"there are blocks\.\*\.att\.qkv, .*, out_head$"
    for config, name, words in [
        (LoRAConfig(1, 1, targets=["qkv", "c_attn"]), "b", rf"matches 'c_attn'; {kinds}"),
        (LoRAConfig(1, 1, targets="qkv"), "b", "no Linear layer matches 'qkv'"),  # not whole
        (LoRAConfig(1, 1, targets=[]), "b", "targets is empty"),
        (LoRAConfig(1, 1), "default", "an adapter 'default' already; .*remove_lora"),
        (LoRAConfig(1, 1), "a.b", "'a.b' is no name"),
        (LoRAConfig(1, 1), "train", "'train' is no name"),
        (LoRAConfig(1, 1), None, "None is no name"),
    ]:
        with pytest.raises(ValueError, match=words):
            nn.apply_lora(model, config, name)
    with pytest.raises(TypeError, match="generator"):
        nn.apply_lora(model, LoRAConfig(1, 1), "b", generator=3)
    with pytest.raises(ValueError, match="no adapter 'b'; there is 'default'"):
        nn.set_adapter(model, "b")
    with pytest.raises(ValueError, match="no adapter 'b' to remove"):
        nn.remove_lora(model, "b")
    with pytest.raises(ValueError, match="out_head has adapters; remove_lora first"):
        nn.apply_lora(model, LoRAConfig(1, 1, targets="out_head"), "head")
        model.resize_token_embeddings(20)
    nn.remove_lora(model, "head")
    nn.set_adapter(model, "default")
    assert list(model.state_dict()) == names
    np.testing.assert_array_equal(logits(model), before)


def test_without_adapters_there_is_nothing_to_do():
    model = make_gpt()
    with pytest.raises(ValueError, match="no adapter 'a'; there is none: apply_lora"):
        nn.set_adapter(model, "a")
    with pytest.raises(ValueError, match="no adapter is active"):
        nn.merge_lora(model)
    nn.unmerge_lora(model)
    nn.remove_lora(model)
    nn.set_adapter(model, None)
    with pytest.raises(ValueError, match="no Linear layer matches 'qkv'; there are none"):
        nn.apply_lora(nn.Sequential(nn.ReLU()), LoRAConfig(1, 1))
