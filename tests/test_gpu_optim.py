"""The kernels of kernels/gpu/optim.py, beside tinygrad_llm.optim in float64."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import EPS, Mutant, close, device, dtypes, host, normal, rounded
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import arrays, optim, tuning

from tinygrad_llm import Tensor
from tinygrad_llm import optim as reference

shapes = st.sampled_from([(1,), (15,), (16,), (3, 7), (40,), (2, 3, 8)])


def small_pieces():
    return tuning.using(adamw={"BLOCK": 16, "num_warps": 4})


def some(draw, shape, dtype, scale=1.0):
    """An array on the device that begins at a multiple of 16 bytes, or one element further on."""
    wide = np.empty((*shape[:-1], shape[-1]), harness.NUMPY[dtype])
    skip = draw(st.integers(0, 1)) if len(shape) == 1 else 0
    memory = np.empty(wide.size + skip, wide.dtype)[skip:].reshape(shape)
    memory[...] = rounded(normal(draw, *shape, scale=scale), dtype)
    return device(memory)


def wide(x):
    return host(x).astype(np.float64)


# --- against the reference ------------------------------------------------------------------------


def adamw(gpu, draw):
    n = draw(st.integers(1, 4))
    kinds = [draw(dtypes) for _ in range(n)]
    narrow = draw(st.booleans())  # gradients of the parameter's dtype, or all of float32
    parameters = [some(draw, draw(shapes), kind) for kind in kinds]
    decays = [draw(st.sampled_from([0.0, 0.1, 0.3])) for _ in kinds]
    betas = draw(st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.8, 0.0)]))
    options = {"betas": betas, "eps": draw(st.sampled_from([1e-8, 0.1]))}
    max_norm, skipped = draw(st.sampled_from([None, 0.5, 1e6])), draw(st.integers(-1, n - 1))

    tensors = [Tensor(wide(p), requires_grad=True) for p in parameters]
    groups = [{"params": [t], "weight_decay": d} for t, d in zip(tensors, decays)]
    slow, kept = reference.AdamW(groups, lr=1.0, **options), []
    with small_pieces():
        fast = gpu.AdamW(parameters, weight_decay=decays, **options)
        for step in range(1, 4):
            lr = 0.1 / step
            g = [some(draw, p.shape, k if narrow else "float32") for p, k in zip(parameters, kinds)]
            kept.append(g)  # so that the next ones lie elsewhere
            g = [None if i == skipped and n > 1 else g_i for i, g_i in enumerate(g)]
            for tensor, g_i, group in zip(tensors, g, slow.param_groups):
                tensor.grad = None if g_i is None else Tensor(wide(g_i))
                group["lr"] = lr
            norm = fast.step(g, *numbers(draw, lr, step), max_norm=max_norm)
            if max_norm is not None:
                expected = reference.clip_grad_norm_(tensors, max_norm)
                close(norm, (np.asarray(expected), EPS["float32"] * np.asarray(expected)))
            slow.step()
    for p, master, tensor, mean, square, state in zip(
        parameters, fast.masters, tensors, fast.exp_avg, fast.exp_avg_sq, slow.state
    ):
        unit = EPS["float32"] * (np.abs(tensor.data) + 1)
        close(master, (tensor.data, unit))
        assert np.array_equal(wide(p), wide(rounded(host(master), host(p).dtype.name)))
        for actual, name in ((mean, "exp_avg"), (square, "exp_avg_sq")):
            value = state.get(name, np.zeros(actual.shape))
            close(actual, (value, EPS["float32"] * (np.abs(value) + np.abs(value).max())))


def numbers(draw, lr, step):
    """As numbers, or on the device, or of the step none, as the optimizer counts, too."""
    if draw(st.booleans()):
        return (device(np.full((), lr, np.float32)),)
    if draw(st.booleans()):
        return lr, step
    kind = draw(st.sampled_from([np.int32, np.int64, np.float32]))
    return device(np.full((), lr, np.float32)), device(np.full(1, step, kind))


class Plain:
    """AdamW and GradScaler in NumPy, in float64: arrays p, m, v, and `steps`, `good`, `skipped`."""

    def __init__(self, parameters, scale, growth, backoff, interval):
        self.p, self.rule = [wide(p) for p in parameters], (growth, backoff, interval)
        self.m, self.v = ([np.zeros(p.shape) for p in self.p] for _ in "mv")
        self.scale, self.steps, self.good, self.skipped = np.float32(scale), 0, 0, 0

    def step(self, gradients, lr, max_norm, decay, beta1=0.9, beta2=0.999, eps=1e-8):
        growth, backoff, interval = self.rule
        gradients = [g / self.scale for g in gradients]
        norm = np.sqrt(sum(np.sum(g * g) for g in gradients))
        if not np.isfinite(norm):
            self.scale, self.good = self.scale * np.float32(backoff), 0
            self.skipped += 1
            return norm
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        self.steps += 1
        for p, m, v, g in zip(self.p, self.m, self.v, gradients):
            m[...] = beta1 * m + (1 - beta1) * clip * g
            v[...] = beta2 * v + (1 - beta2) * (clip * g) ** 2
            m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
            p[...] = p * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
        self.good += 1
        if self.good == interval:
            self.scale, self.good = self.scale * np.float32(growth), 0
        return norm


def scaled(gpu, draw):
    """Many steps with a loss scale, or guarded without one, some of them with NaN or infinity."""
    kinds = [draw(dtypes) for _ in range(draw(st.integers(1, 2)))]
    parameters = [some(draw, draw(shapes), kind) for kind in kinds]
    guarded = draw(st.booleans())  # without a scale, which is then 1
    rule = (1.0, 0.5, 99) if guarded else (draw(st.sampled_from([2.0, 3.0])), 0.25, 2)
    growth, backoff, interval = (1.0, 1.0, 99) if guarded else rule
    max_norm = draw(st.sampled_from([None, 0.5, 1e6]))
    slow = Plain(parameters, 1.0 if guarded else 64.0, growth, backoff, interval)
    with small_pieces():
        fast, scale = gpu.AdamW(parameters, weight_decay=0.1), None
        if not guarded:
            options = {"growth": growth, "backoff": backoff, "interval": interval}
            scale = gpu.LossScale(parameters[0], init=64.0, **options)
        for _ in range(6):
            lr, bad = (
                draw(st.sampled_from([0.1, 0.01])),
                draw(st.sampled_from([None] * 4 + BAD_ONES)),
            )
            g = [some(draw, p.shape, k, float(slow.scale)) for p, k in zip(parameters, kinds)]
            if bad is not None:
                g[draw(st.integers(0, len(g) - 1))].reshape(-1)[-1] = bad
            before = bits(fast)
            lr_there = device(np.full(1, lr, np.float32))
            norm = fast.step(g, lr_there, max_norm=max_norm, loss_scale=scale, guarded=guarded)
            with np.errstate(all="ignore"):
                expected = slow.step([wide(g_i) for g_i in g], lr, max_norm, decay=0.1)
            np.testing.assert_allclose(host(norm), expected, rtol=1e-6)
            if bad is not None:
                assert bits(fast) == before, "a step without an update changes something"
            assert host(fast.steps) == slow.steps
            if scale is not None:
                found = [host(x)[()] for x in (scale.scale, scale.good, scale.skipped)]
                assert found == [slow.scale, slow.good, slow.skipped]
    for i, p in enumerate(parameters):
        for actual, value in (
            (fast.masters[i], slow.p[i]),
            (fast.exp_avg[i], slow.m[i]),
            (fast.exp_avg_sq[i], slow.v[i]),
        ):
            np.testing.assert_allclose(host(actual), value, rtol=1e-5, atol=1e-6)
        assert np.array_equal(wide(p), wide(rounded(host(fast.masters[i]), kinds[i])))


BAD_ONES = [np.nan, np.inf, -np.inf]


def bits(optimizer):
    """All that a step changes."""
    lists = optimizer.masters, optimizer.exp_avg, optimizer.exp_avg_sq, [optimizer.steps]
    parameters = [p.data for p in optimizer._parameters]
    return [host(x).tobytes() for some in (*lists, parameters) for x in some]


def global_norm(gpu, draw):
    arrays = [some(draw, draw(shapes), draw(dtypes)) for _ in range(draw(st.integers(1, 4)))]
    expected = np.sqrt(sum(np.sum(wide(a) ** 2) for a in arrays))
    with small_pieces():
        found = gpu.global_norm([None, *arrays])
    close(found, (expected, EPS["float32"] * expected))


CHECKS = [adamw, global_norm]
MUTANTS = [
    Mutant("ε is not multiplied by c", "c * EPS", "c * 0.0 + EPS"),
    Mutant("m starts at 0: not mended", "(1.0 - tl.exp(LOG_BETA1 * t))", "1.0"),
    Mutant("v starts at 0: not mended", "tl.sqrt(1.0 - tl.exp(LOG_BETA2 * t))", "(t / t)"),
    Mutant("the decay has no lr", "tl.load(scalars) * tl.load(decays", "tl.load(decays"),
    Mutant("the first one's decay for all", "tl.load(decays + whose)", "tl.load(decays)"),
    Mutant("the decay is L2", "(tl.float32) * factor", "(tl.float32) * factor + 1.0 - keep"),
    Mutant("m has no memory", "(g_i - m_i) * (1 - BETA1)", "(g_i - m_i)"),
    Mutant("β₁ in place of β₂", "g_i * g_i * (1 - BETA2)", "g_i * g_i * (1 - BETA1)"),
    Mutant("v is a mean of |g|", "g_i * g_i * (1 - BETA2)", "tl.abs(g_i) * (1 - BETA2)"),
    Mutant("small gradients are made larger", "(scale < 1.0) & ", ""),
    Mutant("gradients are not clipped", "(tl.float32) * factor", "(tl.float32)"),
    Mutant("the norm is squared", "tl.sqrt(tl.sum(total))", "tl.sum(total)"),
    Mutant(
        "the norm is the last dtype's",
        "partials[first : first + pieces.count]",
        "partials[: pieces.count]",
    ),
    Mutant("the norm leaves out the tail", "mask=i < size, other=0.0))", "mask=i < 0, other=0.0))"),
    Mutant(
        "the copy in float32 is not used", "tl.load(master, mask=mask)", "tl.load(p, mask=mask)"
    ),
    Mutant("the last element stays", "i < size, BETA1", "i < size - 1, BETA1"),
    Mutant("v is not kept", "    tl.store(v, v_i, mask=mask)\n", ""),
    Mutant(
        "the gradients of the first step",
        "if self.gradients is None or self.gradients.places != _places(arrays):",
        "if self.gradients is None:",
    ),
]
MUTANTS_OF_SCALES = [
    Mutant("the norm is that of the scaled gradients", "length *= factor", "length *= 1.0"),
    Mutant("the norm is handed out as it was", "            tl.store(norm, length)\n", ""),
    Mutant("the loss scale stays in", "factor *= tl.where", "factor = tl.where"),
    Mutant("NaN moves", "tl.where(length < float", "tl.where(length != float"),
    Mutant("what is not finite moves", " & (tl.load(scalars + 4) != 0.0)", ""),
    Mutant("steps without an update count", "mask=moves != 0.0", "mask=moves >= 0.0"),
    Mutant("steps start at 0", "tl.load(steps) + 1 if", "tl.load(steps) if"),
    Mutant("the scale grows a step late", "due = count >= interval", "due = count > interval"),
    Mutant(
        "the scale grows after a skip", "tl.where(moved, tl.where(due", "tl.where(due, tl.where(due"
    ),
    Mutant("growth does not start the count anew", "moved & (count < interval)", "moved"),
    Mutant("skips do not start the count anew", "moved & (count < interval)", "count < interval"),
    Mutant("skips are not counted", "tl.where(moved, 0, 1)", "tl.where(moved, 0, 0)"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_reference(check):
    harness.run(check, optim, examples=20)


def test_many_steps_agree_with_numpy():
    harness.run(scaled, optim, examples=10)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    assert harness.killed(optim, mutant, CHECKS, tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS_OF_SCALES, ids=str)
def test_mutants_of_scales_are_killed(mutant, tmp_path):
    assert harness.killed(optim, mutant, [scaled], tmp_path)


# --- at the edges ---------------------------------------------------------------------------------


def test_the_sizes_that_are_shipped():
    p = device(np.ones((3, 1000), np.float32))
    fast = optim.AdamW([p], weight_decay=0)
    norm = fast.step([device(np.full((3, 1000), 2, np.float32))], 0.5, 1, max_norm=1e9)
    assert np.isclose(host(norm), np.sqrt(12000))
    assert np.allclose(host(p), 0.5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_scales_nothing(bad):
    p, g = np.zeros(4, np.float32), np.array([bad, 30, 30, 30], np.float32)
    there = device(p.copy())
    tensor = Tensor(p, requires_grad=True)
    tensor.grad = Tensor(g.copy())
    with np.errstate(all="ignore"):
        norm = optim.AdamW([there]).step([device(g)], 1e-3, 1, max_norm=1.0)
        reference.clip_grad_norm_([tensor], 1.0)
        reference.AdamW([tensor]).step()
    assert np.array_equal(host(norm), np.float32(bad), equal_nan=True)
    assert np.allclose(host(there), tensor.data, equal_nan=True, rtol=1e-6)


def test_without_gradients_nothing_moves():
    p = device(np.ones(4, np.float32))
    assert optim.AdamW([p]).step([None], 0.1, 1) is None
    assert np.array_equal(host(p), np.ones(4))


def test_gradients_that_stay_where_they_are_need_no_new_table():
    p, g = device(np.ones(4, np.float32)), device(np.ones(4, np.float32))
    fast = optim.AdamW([p])
    fast.step([g], 0.1, 1)
    first = fast._groups[0].gradients
    fast.step([g], 0.1, 2)
    assert fast._groups[0].gradients is first


def test_a_step_within_a_graph_uploads_nothing(monkeypatch):
    """All that is uploaded is uploaded before, or at the first step with gradients there."""
    uploads, upload = [], arrays.Array.upload
    monkeypatch.setattr(arrays.Array, "upload", lambda *a: uploads.append(a) or upload(*a))
    p = [device(rounded(np.ones(40), kind)) for kind in ("float16", "float32")]
    g, lr = [device(host(x).copy()) for x in p], device(np.full(1, 0.1, np.float32))
    fast, scale = optim.AdamW(p, weight_decay=[0.1, 0.0]), optim.LossScale(lr)
    step = lambda g: fast.step(g, lr, max_norm=1.0, loss_scale=scale)  # noqa: E731
    step(g)
    uploads.clear()
    for _ in range(3):
        step(g)
    assert not uploads
    step([device(host(x).copy()) for x in g])
    assert len(uploads) == 2, "where they lie, for each dtype"
    assert host(fast.steps) == 5


def test_without_anything_new_a_step_is_what_it_was():
    """Whoever counts, and whether what is not finite is looked for: the same bits."""
    rng, found = np.random.default_rng(0), []
    start = rng.standard_normal(40)
    gradients = [rng.standard_normal(40).astype(np.float32) for _ in range(4)]
    for counted, guarded in ((True, False), (False, False), (False, True)):
        fast = optim.AdamW([device(rounded(start, "bfloat16"))])
        for step, g in enumerate(gradients, 1):
            fast.step([device(g.copy())], 0.1, step if counted else None, 1.0, guarded=guarded)
        found.append(bits(fast))
    assert found[0] == found[1] == found[2]


def test_the_loss_scale_follows_pytorchs_rule():
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    p = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([p])
    ours = optim.LossScale(x := device(np.zeros(1, np.float32)), init=2.0**20, interval=3)
    fast, rng = optim.AdamW([x]), np.random.default_rng(0)
    for _ in range(30):
        scale, bad = theirs.scale(torch.ones(1)).item(), rng.choice([0, 0, 0, np.inf, np.nan])
        assert host(ours.scale) == scale
        p.grad = torch.full((1,), scale + bad)
        theirs.step(sgd)
        theirs.update()
        fast.step([device(np.full(1, scale + bad, np.float32))], 0.1, loss_scale=ours)
        assert host(ours.good) == theirs.state_dict()["_growth_tracker"]
    assert host(ours.skipped) + host(fast.steps) == 30 and 0 < host(ours.skipped) < 30


def test_the_loss_scale_stays_finite():
    p = device(np.zeros(1, np.float32))
    scale = optim.LossScale(p, init=2.0**127, interval=1)
    optim.AdamW([p]).step([device(np.zeros(1, np.float32))], 0.1, loss_scale=scale)
    assert host(scale.scale) == 2.0**127 and host(scale.good) == 0


def test_a_restart_continues():
    rng = np.random.default_rng(0)
    start = rounded(rng.standard_normal(20), "bfloat16")
    gradients = [device(rounded(rng.standard_normal(20), "bfloat16")) for _ in range(4)]
    one, other = device(start.copy()), device(start.copy())
    whole, before = optim.AdamW([one]), optim.AdamW([other])
    for step, g in enumerate(gradients, 1):
        whole.step([g], 0.01, step)
        if step == 3:
            after = optim.AdamW([other])
            for name in ("exp_avg", "exp_avg_sq", "masters"):
                getattr(after, name)[0][...] = getattr(before, name)[0]
            before = after
        before.step([g], 0.01, step)
    assert np.array_equal(host(one), host(other))


P, H = np.ones((2, 3), np.float32), np.ones((2, 3), np.float16)


def made(parameters, **options):
    return optim.AdamW(
        [device(p.copy()) if p.flags.c_contiguous else p for p in parameters], **options
    )


def step(parameters, gradients, lr=0.1, step=1, **options):
    gradients = [g if g is None else device(g) for g in gradients]
    made(parameters).step(gradients, lr, step, **options)


def scale(**options):
    return optim.LossScale(device(P), **options)


BAD = [
    (lambda: made([]), ValueError, "there are no parameters"),
    (lambda: made([P.astype(np.float64)]), TypeError, "parameters[0] has dtype float64"),
    (
        lambda: optim.AdamW([device(P.T)]),
        ValueError,
        "parameters[0] has strides (1, 3); expected a",
    ),
    (lambda: optim.AdamW([same := device(P.copy()), same]), ValueError, "share memory"),
    (lambda: made([P[:0]]), ValueError, "parameters[0] has shape (0, 3); expected at least one"),
    (lambda: made([P], weight_decay=[0, 1]), ValueError, "weight_decay has 2 numbers"),
    (lambda: made([P], weight_decay=-1), ValueError, "weight_decay is -1; expected 0 or more"),
    (lambda: made([P], betas=(0.9, 1)), ValueError, "betas is 1; expected two numbers in"),
    (lambda: made([P], eps=-1), ValueError, "eps is -1; expected 0 or more"),
    (lambda: step([P], []), ValueError, "0 gradients for 1 parameters"),
    (lambda: step([P], [H]), TypeError, "gradients[0] has dtype float16; expected float32"),
    (
        lambda: step([P], [P[:1]]),
        ValueError,
        "gradients[0] has shape (1, 3); expected (2, 3), as p",
    ),
    (lambda: step([P], [np.ones((3, 2), "f").T]), ValueError, "gradients[0] has strides (1, 2)"),
    (lambda: step([H, H], [H, P]), TypeError, "gradients of float16 parameters differ in dtype"),
    (lambda: step([P], [P], lr=-1), ValueError, "lr is -1; expected 0 or more"),
    (lambda: step([P], [P], lr=np.nan), ValueError, "lr is nan; expected 0 or more"),
    (lambda: step([P], [P], step=0), ValueError, "step is 0; expected an integer from 1"),
    (lambda: step([P], [P], step=device(np.ones(2))), TypeError, "step has dtype float64"),
    (lambda: step([P], [P], lr=device(P)), ValueError, "lr has shape (2, 3); expected one element"),
    (lambda: step([P], [P], max_norm=0), ValueError, "max_norm is 0; expected a number above 0"),
    (lambda: step([P], [P], guarded=1), TypeError, "guarded is 1; expected True or False"),
    (lambda: step([P], [P], loss_scale=2.0), TypeError, "loss_scale is 2.0; expected a LossScale"),
    (lambda: scale(init=0), ValueError, "init is 0; expected a number from 2"),
    (lambda: scale(init=np.nan), ValueError, "init is nan; expected a number from 2"),
    (lambda: scale(growth=1), ValueError, "growth is 1; expected a number above 1"),
    (lambda: scale(backoff=1), ValueError, "backoff is 1; expected a number between 0 and 1"),
    (lambda: scale(interval=0), ValueError, "interval is 0; expected an integer from 1"),
    (lambda: scale(interval=2.0), TypeError, "interval is 2.0; expected an integer from 1"),
    (lambda: optim.LossScale(7), TypeError, "like is a int; expected an array"),
    (lambda: optim.global_norm([None]), ValueError, "gradients has no arrays"),
    (lambda: optim.global_norm([device(P.T)]), ValueError, "gradients[0] has strides (1, 3)"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_refused_in_one_line(call, error, message):
    with pytest.raises(error) as found:
        call()
    assert message in str(found.value)
    assert "\n" not in str(found.value)
