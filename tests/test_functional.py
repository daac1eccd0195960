"""Every function of tinygrad_llm.functional against torch.nn.functional in float64, value and
gradient; dropout by its statistics; and what is said when arguments do not fit."""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as TF  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import agree, rope, to_torch, torch_grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinygrad_llm import Tensor, backend, grad, nn
from tinygrad_llm import functional as F  # noqa: N812
from tinygrad_llm.check.cases import cotangent
from tinygrad_llm.random import Generator, manual_seed


def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def same(ours, theirs, *arrays, relative=1e-10):
    """Fails unless both functions of the arrays have the same value and the same gradients."""
    xs = [Tensor(a, a.dtype.kind == "f") for a in arrays]
    ts = [to_torch(a, a.dtype.kind == "f") for a in arrays]
    y, u = ours(*xs), theirs(*ts)
    agree(y, u, relative)
    if not isinstance(y, Tensor) or not y.requires_grad:
        return
    g = cotangent(y.shape)
    xs, ts = [x for x in xs if x.requires_grad], [t for t in ts if t.requires_grad]
    found = grad(y, xs, g, allow_unused=True)
    for x, d, e in zip(xs, found, torch_grad(u, ts, to_torch(g)), strict=True):
        agree(np.zeros(x.shape) if d is None else d, e, relative)


# --- one line for each function -------------------------------------------------------------------

X = randn(2, 3, 4)
COS, SIN = np.cos(randn(3, 2)), np.sin(randn(3, 2))
HIDDEN = np.arange(4) % 2 == np.ones((3, 1))
P = np.random.default_rng(0).uniform(0.01, 0.99, (2, 3))
LOGITS, TARGETS = randn(6, 5), np.array([0, 4, -100, 2, 2, -100])
ROWS, COLUMNS = randn(2, 6, 5), np.array([[0, 4, 1, 2, 2, 3], [1, -100, 1, 0, -100, 3]])
ID = np.array([[0, 2, 2], [1, 0, 2]])
W = randn(2, 3, 4, seed=9)
ALONG = [np.random.default_rng(i).integers(0, 2, (2, 3, 4)) for i in range(3)]  # by axis
ALONG = [np.concat([a, a], axis=i) for i, a in enumerate(ALONG)]

CASES = {
    "relu": (F.relu, TF.relu, X),
    "silu": (F.silu, TF.silu, X),
    "gelu": (F.gelu, TF.gelu, X),
    "gelu tanh": (lambda x: F.gelu(x, "tanh"), lambda x: TF.gelu(x, approximate="tanh"), X),
    "sigmoid": (F.sigmoid, torch.sigmoid, X),
    "tanh": (F.tanh, torch.tanh, X),
    "rope": (
        lambda x: F.rope(x, Tensor(COS), Tensor(SIN)),
        lambda x: rope(x, to_torch(COS), to_torch(SIN)),
        X,
    ),
    "rope interleaved": (
        lambda x: F.rope(x, Tensor(COS), Tensor(SIN), interleaved=True),
        lambda x: rope(x, to_torch(COS), to_torch(SIN), interleaved=True),
        X,
    ),
    "softmax": (F.softmax, lambda x: TF.softmax(x, -1), X),
    "softmax 0": (lambda x: F.softmax(x, axis=0), lambda x: TF.softmax(x, 0), X),
    "log_softmax": (F.log_softmax, lambda x: TF.log_softmax(x, -1), X),
    "log_softmax 1": (lambda x: F.log_softmax(x, 1), lambda x: TF.log_softmax(x, 1), X),
    "logsumexp": (F.logsumexp, lambda x: torch.logsumexp(x, -1), X),
    "logsumexp keep": (
        lambda x: F.logsumexp(x, axis=(0, 2), keepdims=True),
        lambda x: torch.logsumexp(x, (0, 2), keepdim=True), X),
    "softmax with -inf": (lambda x: F.softmax(x.masked_fill(HIDDEN, -np.inf)),
                          lambda x: TF.softmax(x.masked_fill(to_torch(HIDDEN), -np.inf), -1), X),
    "log_softmax with -inf": (
        lambda x: F.log_softmax(x.masked_fill(HIDDEN, -np.inf))[..., ::2],
        lambda x: TF.log_softmax(x.masked_fill(to_torch(HIDDEN), -np.inf), -1)[..., ::2], X),
    "cross_entropy with -inf": (
        lambda x: F.cross_entropy(x.masked_fill(HIDDEN, -np.inf), [0, 2, -100]),
        lambda x: TF.cross_entropy(
            x.masked_fill(to_torch(HIDDEN), -np.inf), torch.tensor([0, 2, -100])), X[0]),
    "where": (lambda a, b: F.where(a > b, a, b), lambda a, b: torch.where(a > b, a, b), X, X[:1]),
    "where numbers": (lambda a: F.where(a > 0, a, 0.0), lambda a: torch.where(a > 0, a, 0.0), X),
    "maximum": (F.maximum, torch.maximum, X, X[:1]),
    "minimum": (F.minimum, torch.minimum, X[0, 0], X),
    "concat": (lambda *x: F.concat(x), lambda *x: torch.cat(x), X, X[:1], X),
    "concat -1": (lambda *x: F.concat(x, -1), lambda *x: torch.cat(x, -1), X, X[..., :1]),
    "concat 1": (lambda *x: F.concat(x, axis=1), lambda *x: torch.cat(x, 1), X, X[:, :0], X[:, 1:]),
    "concat same": (lambda x: F.concat([x, x, 2 * x]), lambda x: torch.cat([x, x, 2 * x]), X),
    "concat generator": (
        lambda x: F.concat(x[i] for i in range(2)),
        lambda x: torch.cat([x[0], x[1]]), X),
    "stack": (lambda *x: F.stack(x), lambda *x: torch.stack(x), X, X, X),
    "stack 2": (lambda *x: F.stack(x, 2), lambda *x: torch.stack(x, 2), X, X),
    "stack -1": (lambda *x: F.stack(x, -1), lambda *x: torch.stack(x, -1), X, X),
    "gather": (lambda x: F.gather(x, ALONG[2]), lambda x: x.gather(2, to_torch(ALONG[2])), X),
    "gather 1": (lambda x: F.gather(x, ALONG[1], 1), lambda x: x.gather(1, to_torch(ALONG[1])), X),
    "gather -3": (lambda x: F.gather(x, ALONG[0], -3), lambda x: x.gather(0, to_torch(ALONG[0])),
                  X),
    "linear": (F.linear, TF.linear, X, randn(5, 4), randn(5)),
    "linear without bias": (F.linear, TF.linear, X, randn(5, 4)),
    "linear of one row": (F.linear, TF.linear, X[0, 0], randn(5, 4), randn(5)),
    "embedding": (lambda w: F.embedding(ID, w), lambda w: TF.embedding(to_torch(ID), w), W[0]),
    "embedding, wide": (lambda w: F.embedding(ID, w), lambda w: TF.embedding(to_torch(ID), w),
                        randn(3, 64)),
    "layer_norm": (F.layer_norm, lambda x, w, b: TF.layer_norm(x, (4,), w, b), X, *W[0, :2]),
    "layer_norm eps": (lambda x, w, b: F.layer_norm(x, w, b, 0.1),
                       lambda x, w, b: TF.layer_norm(x, (4,), w, b, 0.1), X, *W[0, :2]),
    "rms_norm": (F.rms_norm, lambda x, w: TF.rms_norm(x, (4,), w, 1e-5), X, randn(4)),
    "dropout 0": (lambda x: F.dropout(x, 0.0), lambda x: TF.dropout(x, 0.0), X),
    "dropout 1": (lambda x: F.dropout(x, 1.0), lambda x: TF.dropout(x, 1.0), X),
    "dropout off": (lambda x: F.dropout(x, 0.9, training=False),
                    lambda x: TF.dropout(x, 0.9, training=False), X),
    "nll_loss": (lambda x: F.nll_loss(F.log_softmax(x), TARGETS),
                 lambda x: TF.nll_loss(TF.log_softmax(x, -1), to_torch(TARGETS)), LOGITS),
    "binary_cross_entropy": (lambda p: F.binary_cross_entropy(p, P[::-1]),
                             lambda p: TF.binary_cross_entropy(p, to_torch(P[::-1].copy())), P),
    "binary_cross_entropy_with_logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, P),
        lambda x: TF.binary_cross_entropy_with_logits(x, to_torch(P)), randn(2, 3)),
    "mse_loss": (F.mse_loss, TF.mse_loss, X, randn(2, 3, 4, seed=1)),
    "mse_loss of a number": (F.mse_loss, TF.mse_loss, randn(), randn(seed=1)),
}  # fmt: skip


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_functions_agree_with_pytorchs(case, reading):
    ours, theirs, *arrays = case
    with backend.using(getattr(backend, reading)), np.errstate(all="raise", under="ignore"):
        same(ours, theirs, *arrays)


def test_every_public_function_is_tested_here():
    public = {n for n, f in vars(F).items() if inspect.isfunction(f) and f.__module__ == F.__name__}
    source = inspect.getsource(inspect.getmodule(same))
    missing = {name for name in public if not name.startswith("_") and f"F.{name}" not in source}
    assert not missing


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy_agrees_with_pytorchs(reduction, ignore_index, reading):
    options = {"ignore_index": ignore_index, "reduction": reduction}
    for logits, targets in ((LOGITS, TARGETS), (ROWS, COLUMNS), (LOGITS[0], TARGETS[1])):
        targets = np.where(targets == -100, ignore_index, targets)
        classes_second = np.moveaxis(logits, -1, 1) if logits.ndim == 3 else logits

        def ours(x, targets=targets):
            return F.cross_entropy(x.permute(0, 2, 1) if x.ndim == 3 else x, targets, **options)

        def theirs(x, targets=targets):
            return TF.cross_entropy(x, to_torch(targets), **options)

        with backend.using(getattr(backend, reading)):
            same(ours, theirs, classes_second)


def test_linear_cross_entropy_is_that_of_the_logits():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 4)), rng.standard_normal((7, 4))
    ids = np.array([[0, 6, -100], [2, 2, 5]])

    def theirs(x, w):
        return TF.cross_entropy((x @ w.T).flatten(0, 1), to_torch(ids.ravel()))

    same(lambda x, w: F.linear_cross_entropy(x, w, ids), theirs, x, w)
    with pytest.raises(ValueError, match=r"needs targets of shape \(2, 3\), not \(3,\)"):
        F.linear_cross_entropy(Tensor(x), Tensor(w), ids[0])
    with pytest.raises(IndexError, match="target 7 is out of range"):
        F.linear_cross_entropy(Tensor(x), Tensor(w), np.full((2, 3), 7))


def test_binary_cross_entropy_is_finite_at_0_and_1_as_pytorchs():
    p, t = np.float64([0, 0, 1, 1]), np.float64([0, 1, 0, 1])
    same(lambda p: F.binary_cross_entropy(p, t),
         lambda p: TF.binary_cross_entropy(p, to_torch(t)), p, relative=1e-8)  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_cross_entropy_of_a_certain_error_is_100(dtype):
    for p in (0.0, 1.0):
        with np.errstate(all="raise", under="ignore"):
            loss = F.binary_cross_entropy(Tensor(np.array([p], dtype)), np.array([1 - p], dtype))
        assert loss.item() == 100 and loss.dtype == dtype


def test_binary_cross_entropy_takes_numbers_from_0_to_1_alone():
    for wrong in (1.5, -1e-6, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"probability {wrong} is not between 0 and 1"):
            F.binary_cross_entropy(np.array([0.5, wrong]), np.ones(2))
        with pytest.raises(ValueError, match=f"target {wrong} is not between 0 and 1"):
            F.binary_cross_entropy(np.full(2, 0.5), np.array([1, wrong]))


def test_cross_entropy_of_ignored_rows_alone_is_pytorchs():
    with np.errstate(invalid="ignore"):
        for reduction in ("sum", "none"):
            same(lambda x, r=reduction: F.cross_entropy(x, np.full(6, -100), reduction=r),
                 lambda x, r=reduction: TF.cross_entropy(x, torch.full((6,), -100), reduction=r),
                 LOGITS)  # fmt: skip
        assert np.isnan(F.cross_entropy(Tensor(LOGITS), np.full(6, -100)).item())


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_ids_and_targets_may_be_any_integers(dtype):
    same(lambda x: F.cross_entropy(x, np.array([0, 4, 1, 2, 2, 3], dtype)),
         lambda x: TF.cross_entropy(x, torch.tensor([0, 4, 1, 2, 2, 3])), LOGITS)  # fmt: skip
    same(lambda w: F.embedding(ID.astype(dtype), w), lambda w: TF.embedding(to_torch(ID), w),
         randn(3, 4))  # fmt: skip
    same(lambda w: F.embedding(Tensor(ID.astype(dtype)), w),
         lambda w: TF.embedding(to_torch(ID), w), randn(3, 4))  # fmt: skip


# --- taking apart ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(-3, 2), st.lists(st.integers(0, 5), max_size=4))
def test_split_agrees_with_pytorchs_and_concat_undoes_it(size, axis, cuts):
    x = randn(5, 6, 7)
    sizes = np.diff([0, *sorted(cuts), x.shape[axis]]).tolist()
    for pieces in (size, sizes):
        t = Tensor(x, requires_grad=True)
        found = F.split(t, pieces, axis)
        for a, b in zip(found, torch.split(to_torch(x), pieces, axis), strict=True):
            agree(a, b)
        joined = F.concat(found, axis)
        agree(joined, x)
        agree(grad(joined, t, x)[0], x)


def test_split_takes_arrays_too():
    pieces = F.split(randn(4, 2), 2)
    assert all(isinstance(p, Tensor) for p in pieces)


def test_functions_take_arrays_and_numbers():
    assert F.sigmoid(0.0).item() == 0.5
    agree(F.softmax(X), TF.softmax(to_torch(X), -1))
    agree(F.maximum(X, 0.0), np.maximum(X, 0))
    agree(F.linear(X, W[0]), TF.linear(to_torch(X), to_torch(W[0])))
    agree(F.scaled_dot_product_attention(X, X, X), F.scaled_dot_product_attention(*[Tensor(X)] * 3))
    agree(F.cross_entropy(LOGITS, TARGETS), F.cross_entropy(Tensor(LOGITS), Tensor(TARGETS)))
    agree(F.concat([X, Tensor(X)]), np.concat([X, X]))
    agree(F.mse_loss(X, X + 1), np.float64(1))


@pytest.mark.parametrize(
    "k, v, mask, message",
    [
        ((3, 2, 3, 4), (3, 2, 3, 4), None, "batch axes of q .* and v .* differ"),
        ((2, 2, 3, 4), (3, 1, 3, 4), None, "batch axes of q .* and v .* differ"),
        ((2, 2, 3, 4), (2, 2, 3, 4), (5, 5), r"mask of shape \(5, 5\) does not broadcast"),
    ],
)
def test_attention_says_what_does_not_fit(k, v, mask, message):
    q, k, v = (Tensor(np.ones(shape, np.float32)) for shape in ((2, 2, 3, 4), k, v))
    mask = None if mask is None else np.ones(mask, bool)
    for kernels in ("auto", "off"):
        with backend.using(kernels), pytest.raises(ValueError, match=f"attention: .*{message}"):
            F.scaled_dot_product_attention(q, k, v, mask)


def test_kernels_are_chosen_by_a_reading_or_its_name():
    with backend.using("off"):
        assert backend.current.reading is backend.MATHS
        with backend.using(backend.CPU):
            assert backend.current.reading is backend.CPU
    for wrong, error in ((None, TypeError), ({}, TypeError), ("offf", ValueError)):
        with pytest.raises(error), backend.using(wrong):
            pass


def test_a_number_has_no_channels_for_a_feed_forward_network():
    for kernels in ("auto", "off"):
        with backend.using(kernels), pytest.raises(ValueError, match="do not fit"):
            nn.FeedForward(8)(Tensor(1.0))


def test_gather_keeps_the_dtype_of_integers():
    large = np.array([2**40 + 1, 5])
    for reading in (backend.MATHS, backend.CPU):
        with backend.using(reading):
            agree(F.gather(large, [0, 0]), large[[0, 0]])


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_stated_share(p):
    x = Tensor(np.ones((400, 500), np.float32))
    y = F.dropout(x, p, generator=Generator(1)).data
    share = (y == 0).mean()
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / y.size)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - p), rtol=1e-6)
    assert y.dtype == np.float32
    neighbours = np.mean((y[:, 1:] == 0) & (y[:, :-1] == 0))  # independent of each other
    assert abs(neighbours - p * p) < 6 * np.sqrt(p / y.size)


def test_dropout_repeats_with_the_seed_and_only_then():
    x = Tensor(np.ones(1000))
    one, same_seed, other = (F.dropout(x, generator=Generator(s)).data for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same_seed)
    assert (one != other).any()
    manual_seed(3)
    first, second = F.dropout(x).data, F.dropout(x).data
    assert (first != second).any()
    manual_seed(3)
    np.testing.assert_array_equal(F.dropout(x).data, first)


def test_dropout_drops_the_same_elements_on_the_way_back():
    x = Tensor(randn(50, 4), requires_grad=True)
    y = F.dropout(x, 0.3, generator=Generator(0))
    (d,) = grad(y.sum(), x)
    agree(y, d.data * x.data)


# --- attention ------------------------------------------------------------------------------------


@st.composite
def attention_cases(draw):
    """(q, k, v, mask, bias, causal, scale): heads of k and v may be shared by those of q."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shared = draw(st.sampled_from([heads, 1]))
    d, e, n = (draw(st.integers(1, 4)) for _ in range(3))
    t = n if draw(st.booleans()) else draw(st.integers(1, 4))
    q = rng.standard_normal((batch, heads, t, d))
    k, v = rng.standard_normal((batch, shared, n, d)), rng.standard_normal((batch, shared, n, e))
    shape = draw(st.sampled_from([(t, n), (1, n), (t, 1), (batch, 1, 1, n), (batch, heads, t, n)]))
    kind = draw(st.sampled_from(["none", "causal", "mask", "bias", "bias with -inf"]))
    mask = rng.random(shape) < 0.6 if kind == "mask" else None
    bias = rng.standard_normal(shape) if kind.startswith("bias") else None
    if kind == "bias with -inf":
        bias[..., 1:][rng.random(shape)[..., 1:] < 0.3] = -np.inf
    return q, k, v, mask, bias, kind == "causal", draw(st.sampled_from([None, 0.3]))


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
def test_attention_agrees_with_pytorchs(reading):
    @settings(max_examples=80)
    @given(attention_cases())
    def law(case):
        q, k, v, mask, bias, causal, scale = case
        t, n = q.shape[-2], k.shape[-2]

        def ours(q, k, v, bias=None):
            given_mask = mask if bias is None else bias
            return F.scaled_dot_product_attention(q, k, v, given_mask, 0.0, causal, scale)

        def theirs(q, k, v, bias=None):
            k, v = (a.expand(*q.shape[:2], *a.shape[2:]) for a in (k, v))
            given_mask = bias if mask is None else to_torch(mask)
            if causal:  # PyTorch counts from the first key, we from the last, as a cache needs
                given_mask = torch.ones(t, n, dtype=torch.bool).tril(n - t)
            return TF.scaled_dot_product_attention(q, k, v, given_mask, scale=scale)

        with (
            backend.using(getattr(backend, reading)),
            sdpa_kernel(SDPBackend.MATH),
            np.errstate(all="raise", under="ignore"),
        ):
            same(ours, theirs, q, k, v, *([] if bias is None else [bias]))

    law()


def test_causal_attention_with_as_many_keys_as_queries_is_pytorchs():
    same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
         lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, is_causal=True),
         randn(2, 3, 5, 4), randn(2, 3, 5, 4, seed=1), randn(2, 3, 5, 2, seed=2))  # fmt: skip


NO_KEY = np.array([[True, False, True], [False] * 3, [True] * 3])


@pytest.mark.parametrize("mask", [NO_KEY, np.where(NO_KEY, 0.0, -np.inf)], ids=["bool", "-inf"])
def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient(mask):
    q, k, v = (Tensor(randn(3, 4, seed=i), requires_grad=True) for i in range(3))
    with np.errstate(all="raise", under="ignore"):
        y = F.scaled_dot_product_attention(q, k, v, mask)
        gradients = grad((y * y).sum(), (q, k, v))
    agree(y.data[1], np.zeros(4))
    agree(gradients[0].data[1], np.zeros(4))
    assert all(np.isfinite(d.data).all() for d in gradients)


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_drops_the_same_weights_on_the_way_back(causal, reading):
    q, k = Tensor(randn(2, 6, 4), requires_grad=True), Tensor(randn(2, 6, 4, seed=1))
    eye = Tensor(np.broadcast_to(np.eye(6), (2, 6, 6)).copy(), requires_grad=True)
    with backend.using(getattr(backend, reading)):
        seeded = [Generator(4), Generator(4)]
        weights = F.scaled_dot_product_attention(
            q, k, eye, None, 0.4, causal, generator=seeded[0]
        )  # v = 1: the weights themselves
        plain = F.scaled_dot_product_attention(q, k, eye, is_causal=causal)
        kept = weights.data != 0
        np.testing.assert_allclose(weights.data[kept], plain.data[kept] / 0.6)
        assert 0.3 < kept.sum() / (plain.data != 0).sum() < 0.9
        v = Tensor(randn(2, 6, 3, seed=2), requires_grad=True)
        y = F.scaled_dot_product_attention(q, k, v, None, 0.4, causal, generator=seeded[1])
        agree(y, weights.data @ v.data)
        g = cotangent(y.shape)
        found = grad(y, (q, v), g)
    tq, tv = to_torch(q.data, True), to_torch(v.data, True)
    scores = tq @ to_torch(k.data).mT / 2
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
    u = (scores.softmax(-1) * to_torch(kept / 0.6)) @ tv
    for d, e in zip(found, torch_grad(u, [tq, tv], to_torch(g))):
        agree(d, e)


# --- what does not fit ----------------------------------------------------------------------------

T = Tensor(np.ones((2, 3)))
Q = Tensor(np.ones((2, 4)))
ERRORS = {
    "linear": (lambda: F.linear(T, np.ones((5, 4))), ValueError, r"\(2, 3\).*\(5, 4\)"),
    "linear bias": (lambda: F.linear(T, np.ones((5, 3)), np.ones(4)), ValueError, r"\(4,\)"),
    "embedding range": (lambda: F.embedding([0, 7], T), IndexError, r"7.*0 to 1"),
    "embedding negative": (lambda: F.embedding([-1], T), IndexError, r"-1.*0 to 1"),
    "embedding floats": (lambda: F.embedding([0.5], T), TypeError, r"integers.*float"),
    "layer_norm": (lambda: F.layer_norm(T, np.ones(4), np.ones(4)), ValueError,
                   r"\(2, 3\).*\(4,\)"),
    "rms_norm": (lambda: F.rms_norm(T, np.ones(4)), ValueError, r"\(2, 3\).*\(4,\)"),
    "dropout": (lambda: F.dropout(T, 1.5), ValueError, r"1\.5.*between 0 and 1"),
    "gelu": (lambda: F.gelu(T, "fast"), ValueError, r"'none' or 'tanh'.*'fast'"),
    "gather shapes": (lambda: F.gather(T, [[0]]), ValueError, r"\(2, 3\).*\(1, 1\)"),
    "gather range": (lambda: F.gather(T, [[0], [3]]), IndexError, r"3.*0 to 2"),
    "gather floats": (lambda: F.gather(T, [[0.0], [1.0]]), TypeError, r"integers.*float"),
    "gather axis": (lambda: F.gather(T, ID % 2, axis=2), (ValueError, IndexError), "2"),
    "concat shapes": (lambda: F.concat([T, Q]), ValueError, r"\(2, 3\).*\(2, 4\)"),
    "concat of nothing": (lambda: F.concat([]), ValueError, r"at least one"),
    "stack shapes": (lambda: F.stack([T, Q]), ValueError, r"\(2, 3\).*\(2, 4\)"),
    "stack of nothing": (lambda: F.stack([]), ValueError, r"at least one"),
    "split sizes": (lambda: F.split(T, [1, 1], 1), ValueError, r"\[1, 1\].*3"),
    "split negative": (lambda: F.split(T, [4, -1], 1), ValueError, r"\[4, -1\]"),
    "split 0": (lambda: F.split(T, 0), ValueError, r"at least 1.*0"),
    "attention": (lambda: F.scaled_dot_product_attention(T, Q, Q), ValueError,
                  r"\(2, 3\).*\(2, 4\)"),
    "attention keys": (lambda: F.scaled_dot_product_attention(T, T, np.ones((5, 3))), ValueError,
                       r"\(5, 3\)"),
    "attention mask": (lambda: F.scaled_dot_product_attention(T, T, T, np.ones((3, 3), bool)),
                       ValueError, r"\(3, 3\)"),
    "attention batch": (lambda: F.scaled_dot_product_attention(
        np.ones((2, 1, 3)), np.ones((3, 1, 3)), np.ones((3, 1, 3))), ValueError,
        r"\(2, 1, 3\).*\(3, 1, 3\)"),
    "attention dropout": (lambda: F.scaled_dot_product_attention(T, T, T, dropout_p=-1), ValueError,
                          r"-1.*between 0 and 1"),
    "cross_entropy shapes": (lambda: F.cross_entropy(T, [0]), ValueError, r"\(2, 3\).*\(1,\)"),
    "cross_entropy range": (lambda: F.cross_entropy(T, [0, 3]), IndexError, r"3.*0 to 2"),
    "cross_entropy negative": (lambda: F.cross_entropy(T, [0, -1]), IndexError, r"-1.*0 to 2"),
    "cross_entropy floats": (lambda: F.cross_entropy(T, [0.0, 1.0]), TypeError, r"integers"),
    "cross_entropy reduction": (lambda: F.cross_entropy(T, [0, 1], reduction="avg"), ValueError,
                                r"'mean', 'sum' or 'none'.*'avg'"),
    "nll_loss range": (lambda: F.nll_loss(T, [0, 3]), IndexError, r"3.*0 to 2"),
    "nll_loss shapes": (lambda: F.nll_loss(T, [0]), ValueError, r"\(2, 3\)"),
    "mse_loss": (lambda: F.mse_loss(T, Q), ValueError, r"\(2, 3\).*\(2, 4\)"),
    "binary_cross_entropy": (lambda: F.binary_cross_entropy(T, Q), ValueError,
                             r"\(2, 3\).*\(2, 4\)"),
    "with_logits": (lambda: F.binary_cross_entropy_with_logits(T, Q), ValueError,
                    r"\(2, 3\).*\(2, 4\)"),
    "where": (lambda: F.where(np.ones(4, bool), T, 0.0), ValueError, r"\(4,\).*\(2, 3\)"),
    "maximum": (lambda: F.maximum(T, Q), ValueError, r"\(2, 3\).*\(2, 4\)"),
    "softmax": (lambda: F.softmax(T, axis=2), ValueError, r"\(2, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("reading", ["MATHS", "CPU"])
@pytest.mark.parametrize("f, kind, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_said_in_one_line(f, kind, message, reading):
    with backend.using(getattr(backend, reading)), pytest.raises(kind, match=message) as error:
        f()
    assert "\n" not in str(error.value)


def test_an_unknown_reduction_is_an_error_before_anything_is_computed():
    with pytest.raises(ValueError, match="reduction"):
        F.cross_entropy(Tensor(LOGITS), TARGETS, reduction="median")


def test_masks_of_integers_and_dropout_of_integers_are_refused():
    q = Tensor(np.ones((2, 3)))
    with pytest.raises(TypeError, match="booleans"):
        F.scaled_dot_product_attention(q, q, q, mask=np.ones((2, 2), int))
    with pytest.raises(TypeError, match="floating-point"):
        F.dropout(Tensor([1, 2, 3]), 0.5)
    with pytest.raises(ValueError, match="attention: q"):
        F.scaled_dot_product_attention(q[0], q[0], q[0])


def test_a_power_of_zero_has_pytorchs_gradient():
    x = Tensor(np.array([0.0, 3.0, 0.0]), requires_grad=True)
    p = np.array([0.0, 2.0, 3.0])
    (x**p).sum().backward()
    assert x.grad.tolist() == [0, 6, 0]
