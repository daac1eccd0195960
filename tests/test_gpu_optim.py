"""The kernels of kernels/gpu/optim.py, beside tinygrad_llm.optim in float64."""

import gpu_harness as harness
import numpy as np
import pytest
from gpu_harness import EPS, Mutant, close, device, dtypes, host, normal, rounded
from hypothesis import strategies as st
from tinygrad_llm.kernels.gpu import optim, tuning

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
    """As numbers, or on the device."""
    if draw(st.booleans()):
        return lr, step
    kind = draw(st.sampled_from([np.int32, np.int64, np.float32]))
    return device(np.full((), lr, np.float32)), device(np.full(1, step, kind))


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


@pytest.mark.parametrize("check", CHECKS)
def test_agrees_with_the_reference(check):
    harness.run(check, optim, examples=20)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_killed(mutant, tmp_path):
    assert harness.killed(optim, mutant, CHECKS, tmp_path)


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
    (lambda: optim.global_norm([None]), ValueError, "gradients has no arrays"),
    (lambda: optim.global_norm([device(P.T)]), ValueError, "gradients[0] has strides (1, 3)"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input_is_refused_in_one_line(call, error, message):
    with pytest.raises(error) as found:
        call()
    assert message in str(found.value)
    assert "\n" not in str(found.value)
