"""Modules keep their parameters in order; layers compute and start as PyTorch's do."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import backend, from_numpy, nn, random, tensor
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.nn import Buffer, Module, ModuleList, Parameter, Sequential, steps
from tinygrad_llm.random import Generator
from tinygrad_llm.tensor import Tensor


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its threads and NumPy's would wait for each other
    return torch


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class Net(Module):
    """Parameters, buffers, lists and sharing, in an order that is not alphabetical."""

    def __init__(self):
        self.scale = Parameter([2.0])
        self.layers = ModuleList([nn.Linear(3, 3), nn.Linear(3, 3, bias=False)])
        self.angles = Buffer([1.0, 2.0])
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.layers[1].weight
        self.first_again = self.layers[0]
        self.steps = 7

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x) * self.scale


NAMES = ["scale", "layers.0.weight", "layers.0.bias", "layers.1.weight"]


# --- Module ---------------------------------------------------------------------------------------


def test_parameters_in_order_of_definition_and_shared_ones_once():
    net = Net()
    assert [name for name, _ in net.named_parameters()] == NAMES
    assert [name for name, _ in net.named_parameters("net")][1] == "net.layers.0.weight"
    assert [name for name, _ in net.named_buffers()] == ["angles"]
    modules = [name for name, _ in net.named_modules()]
    assert modules == ["", "layers", "layers.0", "layers.1", "head"]
    assert [name for name, _ in net.named_children()] == ["layers", "head", "first_again"]
    assert list(net.state_dict()) == [*NAMES, "angles"]


def test_attributes_may_be_replaced_in_place():
    net = Net()
    net.layers[0] = nn.Linear(3, 3, bias=False)
    net.layers[-1] = nn.Linear(3, 3)
    net.first_again = None
    names = [name for name, _ in net.named_parameters()]
    assert names == ["scale", "layers.0.weight", "layers.1.weight", "layers.1.bias", "head.weight"]
    net.head.weight = None
    assert "head.weight" not in net.state_dict()


def test_slips_that_would_leave_weights_untrained():
    net = Net()
    with pytest.raises(
        TypeError, match=r"Net.scale is a Parameter and cannot become a Tensor; wrap"
    ):
        net.scale = net.scale * 2
    with pytest.raises(TypeError, match=r"Net.extra is a list, .* use ModuleList"):
        net.extra = [nn.Linear(2, 2)]
    with pytest.raises(TypeError, match=r"ModuleList holds Modules, not function"):
        ModuleList([np.tanh, lambda x: x][1:])
    with pytest.raises(NotImplementedError, match="ModuleList has no forward"):
        net.layers(1)


def test_train_and_eval_reach_everything():
    net = Net()
    assert net.training and net.layers[1].training
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    net.layers[0].train()
    assert net.first_again.training and not net.training
    assert Net().training  # nothing was changed for others


def test_zero_grad_and_freezing():
    net = Net()
    net.layers.requires_grad_(False)
    net(Tensor(normal(2, 3).astype(np.float32))).sum().backward()
    got = [name for name, p in net.named_parameters() if p.grad is not None]
    assert got == ["scale"]
    net.requires_grad_()
    net.zero_grad()
    net(Tensor(normal(2, 3).astype(np.float32))).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_to_casts_in_place_and_keeps_ties():
    net = Net()
    before = list(net.parameters())
    net(Tensor(normal(2, 3).astype(np.float32))).sum().backward()
    assert net.to(np.float64) is net
    assert all(p is q for p, q in zip(net.parameters(), before, strict=True))
    assert net.head.weight is net.layers[1].weight
    assert {p.dtype for p in before} == {p.grad.dtype for p in before} == {np.dtype("float64")}
    assert net.angles.dtype == np.float64
    assert net(Tensor(normal(2, 3))).dtype == np.float64
    assert net.to("cpu").to("float32").scale.dtype == np.float32
    with pytest.raises(ValueError, match="cuda:7 cannot be used"):
        net.to("cuda:7")
    with pytest.raises(TypeError, match="cannot become int64"):
        net.to(np.int64)


def test_apply_visits_children_first():
    seen = []
    net = Sequential(nn.ReLU(), Sequential(nn.Tanh()))
    assert net.apply(lambda module: seen.append(type(module).__name__)) is net
    assert seen == ["ReLU", "Tanh", "Sequential", "Sequential"]


def test_repr_is_a_tree():
    net = Sequential(nn.Linear(2, 3), Sequential(nn.GELU("tanh"), nn.Dropout(0.2)))
    assert repr(net).splitlines() == [
        "Sequential(",
        "  (0): Linear(2, 3, bias=True)",
        "  (1): Sequential(",
        "    (0): GELU(approximate='tanh')",
        "    (1): Dropout(p=0.2)",
        "  )",
        ")",
    ]


def test_lists():
    some = ModuleList(nn.Linear(2, 2) for _ in range(12))
    assert len(some) == 12 and some[-1] is some[11] and some[2:4] == list(some)[2:4]
    assert [name for name, _ in some.named_children()] == [str(i) for i in range(12)]
    with pytest.raises(IndexError):
        some[12]


def test_a_copy_is_independent():
    net = Net()
    other = copy.deepcopy(net)
    assert other.head.weight is other.layers[1].weight is not net.head.weight
    other.scale.data[:] = 0
    assert net.scale.data[0] == 2


def test_a_copy_with_other_arrays_shares_the_rest():
    net = Net()
    net.head.weight.requires_grad_(False)
    net(Tensor(np.ones((1, 3), np.float32))).sum().backward()
    other = net.copy_with({"scale": np.array([5.0], np.float32)})
    assert other.scale.data[0] == 5 and net.scale.data[0] == 2
    assert other.head.weight is other.layers[1].weight is not net.head.weight
    assert other.first_again is other.layers[0]
    kept = zip(list(net.named_parameters())[1:], list(other.named_parameters())[1:])
    for (name, mine), (same, theirs) in kept:
        assert name == same and mine.data is theirs.data
        assert mine.requires_grad == theirs.requires_grad and theirs.grad is None
    assert other.angles.data is net.angles.data and type(other.angles) is Buffer


# --- state_dict -----------------------------------------------------------------------------------


def test_state_dict_shows_the_data_and_load_copies_in_place():
    one, two = Net(), Net()
    assert one.state_dict()["scale"] is one.scale.data
    arrays = {name: p.data for name, p in two.named_parameters()}
    assert two.load_state_dict(one.state_dict()) is None
    for name, p in two.named_parameters():
        assert p.data is arrays[name]
        assert np.array_equal(p.data, one.state_dict()[name])
    one.scale.data[:] = 5
    assert two.scale.data[0] == 2


def test_load_takes_tensors_and_other_dtypes():
    state = {name: Tensor(a.astype(np.float64)) for name, a in Net().state_dict().items()}
    net = Net()
    net.load_state_dict(state)
    assert net.scale.dtype == np.float32
    assert np.array_equal(net.layers[0].weight.data, state["layers.0.weight"].data)


def test_shared_parameters_may_come_under_any_name():
    net, state = Net(), Net().state_dict()
    state["head.weight"] = state.pop("layers.1.weight")
    state["first_again.bias"] = state.pop("layers.0.bias")
    net.load_state_dict(state)
    assert np.array_equal(net.layers[1].weight.data, state["head.weight"])
    state["layers.1.weight"] = state["head.weight"] + 1
    with pytest.raises(ValueError, match=r"layers.1.weight and head.weight differ, but are tied"):
        net.load_state_dict(state)


def test_what_does_not_fit_is_listed_in_one_line_and_changes_nothing():
    net, state = Net(), Net().state_dict()
    before = copy.deepcopy(net.state_dict())
    state["scale"] = np.full(2, 9.0)
    state["angles"] = np.full(2, 9.0)
    del state["layers.0.bias"]
    state["old.weight"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        net.load_state_dict(state)
    assert str(error.value) == (
        "load_state_dict: missing layers.0.bias; unexpected old.weight; "
        "scale has shape (2,), expected (1,)"
    )
    assert all(np.array_equal(before[name], a) for name, a in net.state_dict().items())
    with pytest.raises(ValueError, match=r"^load_state_dict: scale has shape"):
        net.load_state_dict(state, strict=False)
    del state["scale"]
    net.load_state_dict(state, strict=False)
    assert net.angles.tolist() == [9.0, 9.0]


def test_long_lists_of_names_are_cut():
    some = ModuleList(nn.Linear(1, 1) for _ in range(50))
    with pytest.raises(ValueError, match=r"missing 0.weight, 0.bias, .* and 94 more$"):
        some.load_state_dict({})


# --- layers against PyTorch -----------------------------------------------------------------------

LAYERS = [
    (lambda n: n.Linear(6, 4), (5, 6)),
    (lambda n: n.Linear(6, 4, bias=False), (2, 5, 6)),
    (lambda n: n.LayerNorm(6), (2, 5, 6)),
    (lambda n: n.LayerNorm(6, eps=0.1), (6,)),
    (lambda n: n.RMSNorm(6, eps=1e-5), (2, 5, 6)),
    (lambda n: n.GELU(), (5, 6)),
    (lambda n: n.GELU(approximate="tanh"), (5, 6)),
    (lambda n: n.ReLU(), (5, 6)),
    (lambda n: n.SiLU(), (5, 6)),
    (lambda n: n.Tanh(), (5, 6)),
    (lambda n: n.Sigmoid(), (5, 6)),
    (lambda n: n.Sequential(n.Linear(6, 3), n.ReLU(), n.Linear(3, 2)), (5, 6)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_is_pytorchs_with_the_same_names_and_gradients(torch, make, shape):
    layer = make(nn).to(np.float64)
    theirs = make(torch.nn).double()
    theirs.load_state_dict({k: torch.tensor(v) for k, v in layer.state_dict().items()})
    x = normal(*shape)
    tx = torch.tensor(x, requires_grad=True)
    mx = Tensor(x, requires_grad=True)
    y, ty = layer(mx), theirs(tx)
    assert np.allclose(y.data, ty.detach().numpy(), rtol=0, atol=1e-12)
    g = normal(*y.shape, seed=1)
    y.backward(g)
    ty.backward(torch.tensor(g))
    pairs = [(mx.grad, tx.grad)]
    pairs += [
        (p.grad, dict(theirs.named_parameters())[n].grad) for n, p in layer.named_parameters()
    ]
    for mine, other in pairs:
        assert np.allclose(mine.data, other.numpy(), rtol=0, atol=1e-12)


def test_embedding_is_a_lookup_and_its_gradient_adds_up():
    table = nn.Embedding(6, 3)
    ids = np.array([[2, 3], [5, 3]])
    assert np.array_equal(table(ids).data, table.weight.data[ids])
    table(ids).sum().backward()
    counts = np.bincount(ids.ravel(), minlength=6)
    assert np.array_equal(table.weight.grad.data, np.repeat(counts[:, None], 3, axis=1))
    one_hot = np.eye(6, dtype=np.float32)[ids]
    assert np.allclose(table(ids).data, one_hot @ table.weight.data)


def test_no_ids_have_no_embeddings():
    for nothing in ([], np.zeros(0, np.int64), Tensor([])):
        assert nn.Embedding(3, 2)(nothing).shape == (0, 2)
    with pytest.raises(TypeError, match="takes integers, not float64"):
        nn.Embedding(3, 2)([0.0])


CAUSAL_WEIGHTS = [
    steps.causal_weights_by_renormalising,
    steps.causal_weights_by_filling,
    steps.causal_weights_by_adding,
]


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "float32", "float64"])
@pytest.mark.parametrize("weights", CAUSAL_WEIGHTS)
def test_causal_weights(torch, weights, dtype):
    scores = abs(4 * normal(5, 5)).astype(dtype)
    given = scores.dtype if scores.dtype.kind == "f" else np.float32
    hidden = torch.tensor(scores.astype(float)).masked_fill(
        torch.ones(5, 5).triu(1).bool(), -torch.inf
    )
    found = weights(Tensor(scores))
    assert found.dtype == given
    expected = torch.softmax(hidden, -1).numpy()
    np.testing.assert_allclose(found.data, expected, atol=8 * np.finfo(given).eps)


def test_bce_loss_is_pytorchs(torch):
    p, t = 1 / (1 + np.exp(-normal(5, 1))), normal(5, 1, seed=1) > 0
    ours, theirs = Tensor(p, requires_grad=True), torch.tensor(p, requires_grad=True)
    loss = nn.BCELoss()(ours, t.astype(float))
    expected = torch.nn.BCELoss()(theirs, torch.tensor(t.astype(float)))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(ours.grad.data, theirs.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "int32", "bool"])
def test_tensor_copies_and_from_numpy_shares(torch, dtype):
    array = np.zeros((2, 2, 2), dtype)
    copied, shared = tensor(array), from_numpy(array)
    theirs = torch.tensor(array), torch.from_numpy(array)
    array[0, 0, 0] = 99
    for a, b in zip((copied, shared), theirs, strict=True):
        assert a.dtype == b.numpy().dtype and np.array_equal(a.data, b.numpy())
    shared.data[1] = 1
    assert array[1].all() and not copied.data.any()


@pytest.mark.parametrize("data", [3, 2.5, [1, 2], [1.0, 2], [[True]], [], np.float64(1.5)])
def test_tensor_has_pytorchs_dtypes(torch, data):
    expected = torch.tensor(data).numpy()
    assert tensor(data).dtype == expected.dtype and tensor(data).shape == expected.shape
    with pytest.raises(TypeError, match=r"takes a NumPy array, not \w+; use tensor\(\)"):
        from_numpy(data)


def test_dropout_keeps_the_mean_and_is_off_in_eval():
    drop, x = nn.Dropout(0.4, Generator(0)), Tensor(np.ones((200, 200), np.float32))
    y = drop(x).data
    assert np.unique(y) == pytest.approx([0, 1 / 0.6])
    assert y.mean() == pytest.approx(1, abs=0.02)
    assert drop.eval()(x) is x
    assert nn.Dropout(0.0)(x) is x


def test_how_layers_start():
    layer = nn.Linear(400, 300, generator=Generator(0))
    for p in layer.parameters():
        assert np.abs(p.data).max() <= 0.05
        assert p.data.std() == pytest.approx(0.05 / np.sqrt(3), rel=0.1)
        assert p.dtype == np.float32 and p.requires_grad
    table = nn.Embedding(100, 50, generator=Generator(0)).weight.data
    assert (table.mean(), table.std()) == pytest.approx((0, 1), abs=0.05)
    norm = nn.LayerNorm(3)
    assert norm.weight.tolist() == [1, 1, 1] and norm.bias.tolist() == [0, 0, 0]


def test_reset_parameters_makes_a_new_model():
    """The norms, too; and nothing is drawn for them."""
    cfg = GPTConfig(11, 4, 8, 2, 2, tie_weights=True)
    model, generator = GPT(cfg, Generator(1), init="torch"), Generator(1)
    new = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.data += 1
    model.reset_parameters(generator)
    assert all(np.array_equal(new[name], a) for name, a in model.state_dict().items())
    same = Generator(1)
    GPT(cfg, same, init="torch")
    assert same.get_state() == generator.get_state()


def test_randomness_comes_from_the_generator_or_the_default_one():
    def weights(**keywords):
        net = nn.TransformerBlock(8, 2, 4, dropout=0.5, **keywords)
        y = net(Tensor(np.ones((1, 4, 8), np.float32)))
        return [*net.state_dict().values(), y.data]

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(weights(generator=Generator(1)), weights(generator=Generator(1)))
    assert not same(weights(generator=Generator(1)), weights(generator=Generator(2)))
    random.manual_seed(1)
    first = weights()
    assert same(first, weights(generator=Generator(1)))
    random.manual_seed(1)
    assert same(first, weights())


def test_fused_qkv_starts_as_three_matrices_in_a_row():
    def uniform(generator, rows):
        return generator.uniform(-1 / 2, 1 / 2, (rows, 4))

    att = nn.MultiHeadAttention(4, 6, 5, 2, generator=Generator(3))
    generator = Generator(3)
    three = [uniform(generator, 6) for _ in range(3)]
    assert np.array_equal(att.qkv.weight.data, np.concatenate(three))


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_pytorchs(torch, causal, bias):
    C, T = 12, 5
    att = nn.MultiHeadAttention(C, C, 8, 3, qkv_bias=bias, causal=causal).to(np.float64)
    theirs = torch.nn.MultiheadAttention(C, 3, bias=True, batch_first=True).double()
    state = {k: torch.tensor(v) for k, v in att.state_dict().items()}
    with torch.no_grad():
        theirs.in_proj_weight.copy_(state["qkv.weight"])
        theirs.in_proj_bias.copy_(state.get("qkv.bias", torch.zeros(3 * C)))
        theirs.out_proj.weight.copy_(state["out_proj.weight"])
        theirs.out_proj.bias.copy_(state["out_proj.bias"])
    x = normal(2, T, C)
    tx = torch.tensor(x)
    mask = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1) if causal else None
    expected, _ = theirs(tx, tx, tx, attn_mask=mask, need_weights=False)
    y = att(Tensor(x))
    assert y.shape == (2, T, C)
    assert np.allclose(y.data, expected.detach().numpy(), rtol=0, atol=1e-12)
    assert np.allclose(att(Tensor(x[0])).data, y.data[0], rtol=0, atol=1e-12)  # without a batch


STEPS = [
    lambda: steps.SimpleSelfAttention(),
    lambda: steps.SelfAttentionV1(3, 2),
    lambda: steps.SelfAttentionV2(3, 2),
    lambda: steps.CausalAttention(3, 2, 6),
    lambda: steps.MultiHeadAttentionWrapper(3, 2, 6, 2),
    lambda: steps.MultiHeadAttention(3, 2, 6, 2),
    lambda: nn.MultiHeadAttention(3, 2, 6, 2),
]


@pytest.mark.parametrize("make", STEPS)
def test_every_step_takes_one_sequence_or_a_batch(make):
    step, x = make().to(np.float64), normal(2, 5, 6, 3)
    y = step(Tensor(x)).data
    for b in np.ndindex(2, 5):
        np.testing.assert_allclose(y[b], step(Tensor(x[b])).data, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(..., T, d_in\)"):
        step(Tensor(x[0, 0, 0]))


def test_steps_draw_weights_and_dropout_from_their_generator():
    x, options = normal(2, 5, 3).astype(np.float32), {"dropout": 0.5, "qkv_bias": True}
    g, by_hand = Generator(1), Generator(1)
    attention = steps.CausalAttention(3, 4, 6, **options, generator=g)
    layers = [nn.Linear(3, 4, generator=by_hand) for _ in range(3)]
    q, k, v = (x @ layer.weight.data.T + layer.bias.data for layer in layers)
    scores = q @ k.mT / 2 + np.triu(np.full((5, 5), -np.inf), k=1)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    kept = by_hand.bernoulli(0.5, (2, 5, 5))
    np.testing.assert_allclose(attention(Tensor(x)).data, weights * kept * 2 @ v, atol=1e-6)
    assert g.get_state() == by_hand.get_state()
    attention.eval()
    np.testing.assert_allclose(attention(Tensor(x)).data, weights @ v, atol=1e-6)

    wrapper = steps.MultiHeadAttentionWrapper(3, 4, 6, 2, **options, generator=Generator(2))
    g = Generator(2)
    heads = [steps.CausalAttention(3, 4, 6, **options, generator=g) for _ in range(2)]
    expected = np.concatenate([head(Tensor(x)).data for head in heads], axis=-1)
    assert np.array_equal(wrapper(Tensor(x)).data, expected)

    raw, g = steps.SelfAttentionV1(3, 4, generator=Generator(3)), Generator(3)
    for matrix in (raw.W_query, raw.W_key, raw.W_value):
        assert np.array_equal(matrix.data, g.uniform(0, 1, (3, 4)))
    linear, g = steps.SelfAttentionV2(3, 4, qkv_bias=True, generator=Generator(3)), Generator(3)
    for layer in (linear.W_query, linear.W_key, linear.W_value):
        expected = nn.Linear(3, 4, generator=g)
        assert np.array_equal(layer.weight.data, expected.weight.data)
        assert np.array_equal(layer.bias.data, expected.bias.data)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_heads_by_splitting_are_those_of_the_layer(qkv_bias):
    """The same draws, dropout's among them, and with the same gradients."""
    options, x = {"dropout": 0.5, "qkv_bias": qkv_bias}, normal(2, 5, 3).astype(np.float32)
    step = steps.MultiHeadAttention(3, 8, 6, 4, **options, generator=Generator(4))
    layer = nn.MultiHeadAttention(3, 8, 6, 4, **options, generator=Generator(4))
    for _ in range(2):  # in training, and not
        ours, theirs = step(Tensor(x)), layer(Tensor(x))
        np.testing.assert_allclose(ours.data, theirs.data, rtol=1e-5, atol=1e-6)
        with np.errstate(invalid="raise"):  # nothing is made of -∞
            ours.sum().backward()
        theirs.sum().backward()
        step.eval()
        layer.eval()
    parts = [step.W_query, step.W_key, step.W_value]
    grads = np.concatenate([part.weight.grad.data for part in parts])
    np.testing.assert_allclose(grads, layer.qkv.weight.grad.data, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="n_heads must divide d_out, but 8 / 3 leaves 2"):
        steps.MultiHeadAttention(3, 8, 6, 3)


def test_attention_sees_the_past_only_if_causal():
    x = normal(1, 6, 4).astype(np.float32)
    changed = x.copy()
    changed[0, 4:] += 1
    for causal in (True, False):
        att = nn.MultiHeadAttention(4, 8, 6, 2, causal=causal)
        before, after = att(Tensor(x)).data, att(Tensor(changed)).data
        assert np.array_equal(before[0, :4], after[0, :4]) == causal
        assert before.shape == (1, 6, 8)


@settings(max_examples=30)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    tokens=st.integers(1, 140),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    causal=st.booleans(),
)
def test_all_heads_in_one_kernel_are_the_ops_that_it_stands_for(lead, tokens, heads, width, causal):
    size = heads * width
    att = nn.MultiHeadAttention(size, size, tokens, heads, causal=causal, generator=Generator(0))
    att.to(np.float64)
    x = Tensor(normal(*lead, tokens, size), requires_grad=True)
    arriving = np.broadcast_to(normal(size), x.shape)  # not in one piece
    found = []
    for kernels in ("auto", "off:self_attention"):
        x.grad = None
        att.zero_grad()
        with backend.using(backend.reading(kernels)):
            y = att(x)
            y.backward(arriving)
        found.append([y.data, x.grad.data])
        found[-1] += [p.grad.data for p in att.parameters()]
    assert "self_attention" in backend.CPU.fused
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_what_one_kernel_for_all_heads_cannot_do_is_left_to_the_ops():
    accepts = backend.CPU.fused["self_attention"].accepts
    usual = {"heads": 2, "kv_heads": 2, "causal": True, "window": None, "segments": None}
    usual["dropout"] = 0.0
    qkv = normal(2, 3, 12)
    assert accepts(qkv, **usual) and accepts(qkv.astype(np.float32), **usual)
    assert not accepts(qkv.astype(np.float16), **usual)
    assert not accepts(np.empty((0, 3, 12)), **usual)
    for change in (
        {"kv_heads": 1},
        {"window": 2},
        {"segments": np.zeros((2, 3))},
        {"dropout": 0.1},
    ):
        assert not accepts(qkv, **{**usual, **change})


def test_dropout_of_attention_in_training_only():
    att = nn.MultiHeadAttention(4, 4, 6, 2, dropout=0.5)
    x = Tensor(normal(1, 6, 4).astype(np.float32))
    assert not np.array_equal(att(x).data, att(x).data)
    att.eval()
    assert np.array_equal(att(x).data, att(x).data)


def test_block_is_two_sums():
    block = nn.TransformerBlock(8, 2, 6).to(np.float64)
    x = Tensor(normal(2, 6, 8))
    h = x + block.att(block.norm1(x))
    up = block.ff.up(block.norm2(h))
    expected = h + block.ff.down(F.gelu(up, approximate="tanh"))
    assert up.shape == (2, 6, 32)
    assert np.array_equal(block(x).data, expected.data)


def test_the_books_counts_at_the_size_of_gpt2():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with nn.no_init():
        assert count(nn.MultiHeadAttention(768, 768, 1024, 12)) == 2_360_064
        assert count(nn.FeedForward(768)) == 4_722_432
        assert count(nn.TransformerBlock(768, 12, 1024)) == 7_085_568


# --- what they take -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(0, 3), "Linear: in_features is a positive integer, not 0"),
        (lambda: nn.Linear(3, 2.5), "Linear: out_features is a positive integer, not 2.5"),
        (lambda: nn.Embedding(-1, 3), "Embedding: num_embeddings is a positive integer, not -1"),
        (lambda: nn.LayerNorm(0), "LayerNorm: normalized_shape is a positive integer"),
        (lambda: nn.Dropout(1.1), "Dropout: p is a number between 0 and 1, not 1.1"),
        (lambda: nn.Dropout("much"), "Dropout: p is a number between 0 and 1, not 'much'"),
        (lambda: nn.GELU("erf"), "GELU: approximate is 'none' or 'tanh', not 'erf'"),
        (
            lambda: nn.MultiHeadAttention(8, 8, 4, n_heads=3),
            "MultiHeadAttention: n_heads must divide d_out, but 8 / 3 leaves 2",
        ),
        (lambda: nn.MultiHeadAttention(8, 8, 4, 2, dropout=-1), "dropout is a number between"),
        (lambda: nn.TransformerBlock(8, 2, 0), "context_length is a positive integer, not 0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


GENERATORS = {
    "rand": lambda g: random.rand(2, generator=g),
    "randint": lambda g: random.randint(5, (2,), generator=g),
    "F.dropout": lambda g: F.dropout(Tensor(np.ones(2)), 0.5, generator=g),
    "Linear": lambda g: nn.Linear(2, 3, generator=g),
    "Embedding": lambda g: nn.Embedding(2, 3, generator=g),
    "Dropout": lambda g: nn.Dropout(0.5, generator=g),
    "SelfAttentionV1": lambda g: steps.SelfAttentionV1(2, 3, generator=g),
    "TransformerBlock": lambda g: nn.TransformerBlock(8, 2, 4, generator=g),
}


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_what_is_no_generator(make):
    for wrong in (0, 7, np.random.default_rng(0)):
        with pytest.raises(
            TypeError, match=r"^a generator is a tinygrad_llm\.random\.Generator, or"
        ):
            make(wrong)
    make(None)


def test_inputs_that_do_not_fit():
    for make in STEPS[:-1]:
        with pytest.raises(TypeError, match=r"x is a Tensor, not list: make one with tensor\(x\)"):
            make()([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"x \(2, 5\), weight \(4, 3\)"):
        nn.Linear(3, 4)(Tensor(normal(2, 5)))
    with pytest.raises(ValueError, match=r"7 tokens exceed context_length 6; keep the last 6"):
        nn.MultiHeadAttention(4, 4, 6, 2)(Tensor(normal(1, 7, 4).astype(np.float32)))
