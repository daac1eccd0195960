"""Every op obeys every law: the library's own, and one that a test file adds through @op alone. And
the laws are laws: each is broken by some op, and none accuses what is right.
"""

import itertools
import re

import numpy as np
import pytest
import test_ops
from oracles import holds

from tinygrad_llm import Tensor, backend
from tinygrad_llm.check import LAWS, Call, LawError, arguments, gradcheck, laws
from tinygrad_llm.check.mutants import MUTANTS
from tinygrad_llm.check.rounding import Disturbed, spread
from tinygrad_llm.ops import TABLE, op

OPS = list(TABLE.values())
EVERY_LAW = {law.name for law in LAWS}
OF_KERNELS = {"kernel", "large", "fresh"}


@pytest.mark.parametrize("law", [law for op in OPS for law in laws(op)], ids=str)
def test_every_op_obeys_every_law(law):
    law()


def test_a_kernel_is_tried_by_every_law_that_its_op_is_tried_by():
    for name in backend.CPU.kernels:
        trials = laws(TABLE[name])
        maths = {trial.law.name for trial in trials if not trial.on_kernel}
        kernel = {trial.law.name for trial in trials if trial.on_kernel}
        assert maths | {"kernel", "fresh"} <= kernel <= maths | OF_KERNELS


@pytest.mark.parametrize("op", [op for op in OPS if not op.sample], ids=lambda op: op.name)
def test_every_attribute_of_an_op_is_varied(op):
    """Else a vjp could ignore it, and no law would notice."""
    assert {name for example in op.examples for name in example} == set(op.attributes)


SEEDS = itertools.count()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_right_op_is_never_accused(op):
    """More than 2,000 gradchecks in all, each with its own arguments and its own directions."""

    def law(case):
        f, xs = Call(op, backend.MATHS, tuple(case[0]), case[1]).function()
        gradcheck(f, *xs, directions=1, seed=next(SEEDS))

    holds(law, arguments(op), examples=2000 // len(OPS) + 1)


# --- an op of one's own ---------------------------------------------------------------------------


@pytest.fixture
def new_ops():
    """Takes the ops that a test registers out of the table again."""
    known = set(TABLE)
    yield
    for name in set(TABLE) - known:
        del TABLE[name]


def test_an_op_added_through_op_alone_is_covered_by_every_law(new_ops):
    @op("(n),(n)->()", b="positive")
    class weighted_square:
        """y = Σ_i b_i x_i²

        x̄ = 2 g ⊙ b ⊙ x
        b̄ = g ⊙ x²"""

        def forward(xp, x, b):
            return xp.sum(b * x * x, axis=-1)

        def vjp(xp, g, y, x, b):
            g = xp.expand_dims(g, axis=-1)
            return 2 * g * b * x, g * x * x

    trials = laws(weighted_square)
    assert {trial.law.name for trial in trials} == EVERY_LAW - OF_KERNELS
    for law in trials:
        assert law() < (1e-6 if law.law.name == "dtype" else 1e-12)  # float32 against float64
    test_ops.test_vjp_agrees_with_pytorchs_autograd_over_the_ops_own_lines(weighted_square)
    test_ops.test_forward_and_vjp_keep_to_the_array_api_standard(weighted_square)
    with pytest.raises(LookupError, match="weighted_square"):
        test_ops.pytorchs_own(weighted_square)


def test_a_wrong_op_is_named_with_the_law_the_element_and_the_smallest_arguments(new_ops):
    @op("(n)->(n)")
    class wrong:
        """y = x², with a gradient that forgets the first element of each row"""

        def forward(xp, x):
            return x * x

        def vjp(xp, g, y, x):
            return (xp.where(xp.arange(x.shape[-1]) == 0, 0.0, 2 * g * x),)

    derivative = next(law for law in laws(wrong) if law.law.name == "derivative")
    with pytest.raises(LawError) as error:
        derivative()
    assert re.fullmatch(
        r"wrong breaks the law 'derivative': wrong gradient of input 0, shape \(1,\), at element "
        r"\(0,\): backward gives 0, a complex step gives \S+ \(for one random cotangent\) "
        r"\[tried with x \(1,\)\]",
        str(error.value),
    )


def test_sizes_that_are_numbers_in_a_signature(new_ops):
    @op("(3),(3)->(3)")
    class cross:
        """y = a × b"""

        def forward(xp, a, b):
            return xp.roll(a, -1, -1) * xp.roll(b, 1, -1) - xp.roll(a, 1, -1) * xp.roll(b, -1, -1)

        def vjp(xp, g, y, a, b):
            return cross.forward(xp, b, g), cross.forward(xp, g, a)

    chosen = [law for law in laws(cross) if law.law.name in ("derivative", "shape", "broadcast")]
    assert len(chosen) == 3 and all(law() < 1e-12 for law in chosen)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"signature": "foo"}, "is not like"),
        ({"signature": "(n)->(n),(n)"}, "is not like"),
        ({"signature": "(n),(n)->(n)"}, "does not fit its 1 arrays"),
        ({"signature": "(n)->(n)", "fixed": "w"}, "has no array 'w'; its arrays: x"),
        ({"signature": "(n)->(n)", "z": "positive"}, "has no array 'z'"),
        ({"signature": "(n)->(n)", "x": "negative"}, "domain 'negative' of x"),
        ({"signature": "(n)->(n)", "examples": {"q": 1}}, "examples is a list of dictionaries"),
    ],
)
def test_op_refuses_what_it_does_not_understand(arguments, message):
    with pytest.raises(ValueError, match=f"^op forgets_a_factor.*{message}"):
        op(**arguments)(forgets_a_factor)


def test_op_without_parentheses():
    with pytest.raises(TypeError, match=r"write @op\(...\) before class forgets_a_factor"):
        op(forgets_a_factor)


def test_what_is_no_op_has_no_laws():
    with pytest.raises(TypeError, match="not 'softmax'"):
        laws("softmax")
    with pytest.raises(ValueError, match="examples is 1 or more"):
        laws(OPS[0], examples=0)


# --- each law is broken by some op ----------------------------------------------------------------


class forgets_a_factor:
    """derivative"""

    def forward(xp, x):
        return x * x

    def vjp(xp, g, y, x):
        return (g * x,)


class gives_the_kink_to_the_wrong_side:
    """ties"""

    def forward(xp, x):
        return xp.where(x <= 0, 0, x)

    def vjp(xp, g, y, x):
        return (xp.where(x < 0, 0.0, g),)


class detaches_on_the_tape:
    """second"""

    def forward(xp, x):
        return xp.sin(x)

    def vjp(xp, g, y, x):
        return (g * xp.cos(x.detach() if isinstance(x, Tensor) else x),)


class clips_the_gradient:
    """linear"""

    def forward(xp, x):
        return x + 0

    def vjp(xp, g, y, x):
        return (xp.clip(g, -1.0, 1.0),)


class divides_by_its_own_gradient:
    """zero"""

    def forward(xp, x):
        return x + 0

    def vjp(xp, g, y, x):
        return (g * g / g,)


class counts_its_elements:
    """broadcast"""

    def forward(xp, x, b):
        return x * b * x.size

    def vjp(xp, g, y, x, b):
        return g * b * x.size, g * x * x.size


class adds_an_axis:
    """shape"""

    def forward(xp, x):
        return xp.expand_dims(x, axis=0)

    def vjp(xp, g, y, x):
        return (xp.reshape(g, x.shape),)


class looks_at_the_whole_batch:
    """empty"""

    def forward(xp, x):
        return x + 0 * xp.max(x)

    def vjp(xp, g, y, x):
        return (g,)


class reads_memory_in_order:
    """layout"""

    def forward(xp, x):
        return x + 0

    def vjp(xp, g, y, x):
        return (xp.reshape(g.ravel("K"), x.shape) if isinstance(g, np.ndarray) else g,)


class overflows:
    """magnitudes"""

    def forward(xp, x):
        return xp.log(1 + xp.exp(x))

    def vjp(xp, g, y, x):
        return (g * xp.sigmoid(x),)


class promotes:
    """dtype"""

    def forward(xp, x):
        return x + 0

    def vjp(xp, g, y, x):
        return (g * np.ones(g.shape),)


class writes_into_g:
    """pure"""

    def forward(xp, x):
        return 2 * x

    def vjp(xp, g, y, x):
        g *= 2
        return (g,)


class saves_something_rounded:
    """tape"""

    def forward(xp, x):
        return xp.exp(x), x if isinstance(x, Tensor) else x.astype(np.float32)

    def vjp(xp, g, y, x, *, saved):
        return (g * xp.exp(saved),)


BROKEN = [
    forgets_a_factor,
    gives_the_kink_to_the_wrong_side,
    detaches_on_the_tape,
    clips_the_gradient,
    divides_by_its_own_gradient,
    counts_its_elements,
    adds_an_axis,
    looks_at_the_whole_batch,
    reads_memory_in_order,
    overflows,
    promotes,
    writes_into_g,
    saves_something_rounded,
]


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_each_law_is_broken_by_an_op(cls, new_ops):
    arrays = cls.vjp.__code__.co_varnames[3 : cls.vjp.__code__.co_argcount]
    broken = op(",".join(["()"] * len(arrays)) + "->()")(cls)
    law = next(law for law in laws(broken) if law.law.name == cls.__doc__)
    with pytest.raises(LawError, match=f"^{cls.__name__} breaks the law '{cls.__doc__}': "):
        law()


def test_no_law_is_unbreakable():
    assert {cls.__doc__ for cls in BROKEN} == EVERY_LAW - OF_KERNELS - {"sharing"}


@pytest.mark.parametrize("name", sorted(OF_KERNELS | {"sharing"}))
def test_the_laws_of_kernels_and_of_the_engine_find_bugs_by_themselves(name):
    assert any(is_found(mutant, name) for mutant in MUTANTS if mutant.where[:6] == WHERE[name])


WHERE = {"kernel": "kernel", "large": "kernel", "fresh": "kernel", "sharing": "tensor"}


def is_found(mutant, name):
    """Whether the law of this name finds the mutant, without the others."""
    with mutant.planted() as subjects:
        for op, reading in subjects:
            for law in laws(op, reading, examples=8, shrink=False):
                if law.law.name == name:
                    try:
                        law()
                    except LawError:
                        return True
    return False


# --- stochastic arithmetic ------------------------------------------------------------------------


def test_the_spread_is_about_the_rounding_that_really_happens():
    rng = np.random.default_rng(0)
    for cancelled in (1.0, 1e6, 1e12):
        a, b = rng.standard_normal((2, 50))

        def difference(arrays, large=cancelled):
            return [((arrays[0] + large) - arrays[1]) - large]

        bound = spread(difference, [a, b])[0].max()
        error = np.abs(difference([a, b])[0] - (a - b)).max()
        assert error <= 20 * bound
        assert bound < 1e-15 * (10 + 10 * cancelled)


def test_disturbed_numbers_may_be_written_to_in_place():
    x = np.ones(3).view(Disturbed)
    assert np.exp(x, out=x) is x
    x += 1
    np.testing.assert_allclose(np.asarray(x), np.e + 1, rtol=1e-8)
    assert (np.asarray(x + 1) != np.e + 2).any()
