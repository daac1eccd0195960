"""Optimizers, clipping and the schedule against PyTorch, the book's numbers, and by hand."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import nn, optim
from tinygrad_llm.nn import Parameter
from tinygrad_llm.optim import SGD, AdamW, clip_grad_norm_, decay_groups, warmup_cosine
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.threads import team

SHAPES = [(7, 5), (11,), (), (2, 3, 4)]
BOTH = [SGD, AdamW]


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its threads and NumPy's would wait for each other
    return torch


def parameters(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [Parameter(np.asarray(rng.normal(size=shape), dtype)) for shape in SHAPES]


def give_gradients(params, rng, scale=1.0):
    for p in params:
        p.grad = Tensor(np.asarray(rng.normal(0, scale, p.shape), p.dtype))


def twins(torch, params):
    return [torch.nn.Parameter(torch.tensor(p.data)) for p in params]


# --- against PyTorch ------------------------------------------------------------------------------

CASES = [
    ("AdamW", {"lr": 1e-2}),
    ("AdamW", {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.0}),
    ("SGD", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_a_hundred_steps_are_pytorchs(torch, name, options, dtype, tolerance):
    ours = parameters(dtype)
    theirs = twins(torch, ours)
    mine = getattr(optim, name)(ours, **options)
    reference = getattr(torch.optim, name)(theirs, **options)
    rng = np.random.default_rng(1)
    for step in range(100):
        give_gradients(ours, rng, scale=0.1 + step % 3)
        for p, q in zip(ours, theirs):
            q.grad = torch.tensor(p.grad.data)
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs):
        assert p.dtype == dtype
        assert np.abs(p.data - q.detach().numpy()).max() <= tolerance * np.abs(p.data).max()


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_is_pytorchs(scale, max_norm):
    torch = pytest.importorskip("torch")
    ours = parameters()
    give_gradients(ours, np.random.default_rng(2), scale)
    theirs = twins(torch, ours)
    for p, q in zip(ours, theirs):
        q.grad = torch.tensor(p.grad.data)
    norm = clip_grad_norm_(ours, max_norm)
    assert isinstance(norm, float)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-6)
    for p, q in zip(ours, theirs):
        assert np.allclose(p.grad.data, q.grad.numpy(), rtol=1e-6, atol=0)


# --- by hand --------------------------------------------------------------------------------------


def test_first_step_of_adamw_is_lr_whatever_the_gradient():
    p = Parameter([1.0, 1.0, 1.0])
    p.grad = Tensor([1e-3, -5.0, 1e4])
    AdamW([p], lr=0.1, weight_decay=0.0).step()
    assert np.allclose(p.data, [0.9, 1.1, 0.9], atol=1e-5)


def test_decay_is_decoupled_from_the_gradient():
    p = Parameter([2.0])
    p.grad = Tensor([0.0])
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    assert np.allclose(p.data, [2.0 * (1 - 0.1 * 0.5)])


@pytest.mark.parametrize("optimizer", BOTH)
def test_parameters_without_a_gradient_are_left_alone(optimizer):
    used, unused = Parameter([1.0]), Parameter([1.0])
    used.grad = Tensor([1.0])
    opt = optimizer([used, unused], lr=0.1, weight_decay=0.1)
    opt.step()
    assert used.data[0] < 1 and unused.data[0] == 1
    assert opt.state[0]["step"] == 1 and opt.state[1] == {}
    opt.zero_grad()
    assert used.grad is None


@pytest.mark.parametrize("optimizer", BOTH)
def test_data_stays_where_it_is_and_gradients_are_not_changed(optimizer):
    p = Parameter(np.ones((3, 4), np.float32))
    array, p.grad = p.data, Tensor(np.full((3, 4), 0.5, np.float32))
    optimizer([p], lr=0.1).step()
    assert p.data is array and (array < 1).all()
    assert (p.grad.data == 0.5).all()


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]])
def test_any_layout_and_size_of_block(layout, monkeypatch):
    def trained(arrange, block):
        monkeypatch.setattr(optim, "_BLOCK", block)
        rng = np.random.default_rng(0)
        p = Parameter(arrange(rng.normal(size=(10, 6))))
        opt = AdamW([p], lr=0.1)
        for _ in range(3):
            p.grad = Tensor(arrange(rng.normal(size=(10, 6))))
            opt.step()
        return p.data, clip_grad_norm_([p], 1.0)

    expected, norm = trained(np.ascontiguousarray, 1000)
    for block in (1, 7, 13):
        found, found_norm = trained(layout, block)
        assert np.array_equal(found, expected)
        assert found_norm == pytest.approx(norm)


def test_half_precision_parameters_keep_wide_state():
    p = Parameter(np.ones(3, np.float16))
    p.grad = Tensor(np.full(3, 500.0, np.float16))  # its square is no float16
    assert clip_grad_norm_([p], 1e9) == pytest.approx(500 * math.sqrt(3))
    opt = AdamW([p], lr=0.25, weight_decay=0.0)
    opt.step()
    assert p.dtype == np.float16 and np.allclose(p.data, 0.75)
    assert opt.state[0]["exp_avg_sq"].dtype == np.float32


def test_clipping_leaves_small_gradients_and_what_is_not_finite():
    p, q = Parameter([0.0, 0.0]), Parameter([0.0])
    p.grad = Tensor([3.0, 4.0])
    assert clip_grad_norm_([p, q], 10.0) == 5.0
    assert p.grad.tolist() == [3.0, 4.0] and q.grad is None
    assert clip_grad_norm_((t for t in (p, q)), 1.0) == 5.0  # any iterable
    assert np.allclose(p.grad.data, [0.6, 0.8])
    for bad in (math.inf, math.nan):
        p.grad = Tensor([bad, 4.0])
        assert not math.isfinite(clip_grad_norm_([p], 1.0))
        assert p.grad.data[1] == 4.0
    assert clip_grad_norm_([q], 1.0) == 0.0


def test_the_books_gradient_of_norm_five():
    p = Parameter(np.zeros((2, 2), np.float32))
    p.grad = Tensor([[1.0, 2.0], [2.0, 4.0]])
    assert clip_grad_norm_(p, 1.0) == 5.0
    assert np.allclose(p.grad.data, np.array([[1, 2], [2, 4]]) / 5)


# --- on several threads ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_threads_and_joined_arrays_change_no_bit(dtype, monkeypatch):
    """Small arrays are joined, large ones cut into blocks: alone, each moves to the same bits."""
    monkeypatch.setattr(optim, "_BLOCK", 16)
    monkeypatch.setattr(optim, "_WORTH_SHARING", 0)

    def trained(threads, small):
        monkeypatch.setattr(optim, "_SMALL", small)
        params = parameters(dtype) + parameters(dtype, seed=1)
        groups = [
            {"params": params[::2], "weight_decay": 0.1},
            {"params": params[1::2], "weight_decay": 0.0, "betas": (0.5, 0.5)},
        ]
        opt, norms = AdamW(groups, lr=0.1), []
        for step in range(4):
            give_gradients(params, np.random.default_rng(step))
            if step == 1:
                params[0].grad = params[5].grad = None  # from here on, counts of steps differ
            with team(threads):
                norms.append(clip_grad_norm_(params, 1.0))
                opt.step()
        return norms, [p.data for p in params], [s["exp_avg_sq"] for s in opt.state]

    norms, data, squares = trained(threads=1, small=0)
    for threads, small in [(1, 100), (3, 0), (3, 12)]:
        again = trained(threads, small)
        assert again[0] == norms
        assert all(map(np.array_equal, again[1], data))
        assert all(map(np.array_equal, again[2], squares))


# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-4), (1, 0.000466667), (27, 0.01), (81, 0.005005), (134, 1.2113e-05), (135, 1e-5)],
)
def test_the_books_learning_rates(step, expected):
    lr = warmup_cosine(step, total=135, warmup=27, peak=0.01, initial=1e-4, minimum=1e-5)
    assert lr == pytest.approx(expected, rel=1e-4)


@given(st.integers(1, 50), st.data())
def test_schedule_rises_then_falls(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    lrs = [warmup_cosine(s, total, warmup, peak=1.0, minimum=0.1) for s in range(total + 3)]
    assert lrs[: warmup + 1] == sorted(lrs[: warmup + 1])
    assert lrs[warmup:] == sorted(lrs[warmup:], reverse=True)
    assert lrs[total] == lrs[-1] == 0.1
    assert lrs[warmup] == max(lrs) == 1.0


# --- groups ---------------------------------------------------------------------------------------


def test_groups_have_their_own_options():
    fast, slow = Parameter([1.0]), Parameter([1.0])
    fast.grad, slow.grad = Tensor([1.0]), Tensor([1.0])
    opt = SGD([{"params": [fast], "lr": 0.5}, {"params": [slow]}], lr=0.1)
    opt.step()
    assert np.allclose([fast.data[0], slow.data[0]], [0.5, 0.9])
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert np.allclose([fast.data[0], slow.data[0]], [0.5, 0.9])


def test_only_matrices_decay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    decayed, others = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(5, 4), (3, 4)]
    assert [p.shape for p in others["params"]] == [(4,), (4,), (3,)]
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    assert [len(g["params"]) for g in decay_groups(model, 0.1)] == [1, 1]
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert len(AdamW(decay_groups(model, 0.1)).param_groups) == 2


# --- restart --------------------------------------------------------------------------------------


def through_a_file(state_dict):
    """Numbers and names through JSON, arrays copied: what a checkpoint does."""
    arrays = [
        {k: v.copy() for k, v in s.items() if isinstance(v, np.ndarray)}
        for s in state_dict["state"]
    ]
    rest = [
        {k: v for k, v in s.items() if not isinstance(v, np.ndarray)} for s in state_dict["state"]
    ]
    rest, groups = json.loads(json.dumps([rest, state_dict["param_groups"]]))
    state = [{**numbers, **some} for numbers, some in zip(rest, arrays)]
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize(
    ("optimizer", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {"betas": (0.8, 0.9)})]
)
def test_resuming_equals_never_having_stopped(optimizer, options):
    def run(params, opt, steps):
        for step in steps:
            give_gradients(params, np.random.default_rng(step))
            params[1].grad = None if step == 0 else params[1].grad  # steps differ by parameter
            opt.step()

    whole = parameters()
    run(whole, optimizer(whole, lr=0.05, **options), range(8))

    first = parameters()
    opt = optimizer(first, lr=0.05, **options)
    run(first, opt, range(5))
    saved = through_a_file(opt.state_dict())
    second = [Parameter(p.data.copy()) for p in first]
    again = optimizer(second, lr=99.0, **options)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 0.05
    run(second, again, range(5, 8))
    for p, q in zip(whole, second):
        assert np.array_equal(p.data, q.data)


def test_loading_copies_and_a_wrong_state_changes_nothing():
    params = parameters()
    opt = AdamW(params)
    give_gradients(params, np.random.default_rng(0))
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert opt.state[0]["exp_avg"] is not saved["state"][0]["exp_avg"]
    assert opt.param_groups[0]["params"][0] is params[0]

    wrong = copy.deepcopy(saved)
    wrong["state"][0]["exp_avg"] = np.zeros((5, 7))
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter 0 has shape \(5, 7\), expected \(7, 5"
    ):
        opt.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"saved groups .*4.* here .*1.*; build the same"):
        AdamW(params[:1]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"betas.*here.*momentum"):
        SGD(params).load_state_dict(saved)
    assert opt.state[0]["step"] == 1


# --- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW([]), "AdamW has no parameters"),
        (lambda p: AdamW([{"params": []}]), "AdamW has no parameters"),
        (lambda p: AdamW([p, p]), "AdamW: a parameter comes twice"),
        (lambda p: AdamW([p], lr=-1), "AdamW: lr is 0 or more, not -1"),
        (lambda p: AdamW([p], lr=math.nan), "AdamW: lr is 0 or more, not nan"),
        (lambda p: AdamW([p], betas=(0.9, 1.0)), "betas are two numbers in"),
        (lambda p: AdamW([p], eps=-1e-8), "eps is 0 or more"),
        (lambda p: AdamW([p], weight_decay=-0.1), "weight_decay is 0 or more"),
        (lambda p: AdamW([{"params": [p], "momentum": 1}]), r"unknown options \['momentum'\]"),
        (lambda p: SGD([p], momentum=-0.5), "momentum is 0 or more"),
        (lambda p: SGD([p], nesterov=True), "nesterov needs a momentum"),
        (lambda p: clip_grad_norm_([p], 0.0), "max_norm is above 0, not 0.0"),
        (lambda p: warmup_cosine(-1, 10, 2, 1.0), "step -1"),
        (lambda p: warmup_cosine(0, 10, 11, 1.0), "expected .* warmup <= total"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make(Parameter([1.0]))


def test_only_tensors_are_trained():
    with pytest.raises(TypeError, match=r"not ndarray; use model.parameters\(\)"):
        SGD([np.zeros(3)])
    with pytest.raises(TypeError, match=r"not str; use model.parameters\(\)"):
        SGD(nn.Linear(2, 2).state_dict())
