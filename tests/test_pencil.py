"""What the docstrings of the ops show as formulas is what their code computes: the pencil writes it
from the source, and writes it rightly."""

import ast
import contextlib
import copy
import linecache
import re
import unicodedata
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinygrad_llm.ops import TABLE, Op, op
from tinygrad_llm.pencil import NotationError, _Pencil, formula

every_op = pytest.mark.parametrize("op", TABLE.values(), ids=TABLE)


def last_lines(op):
    """As many of the docstring's last lines as the formula has."""
    doc = unicodedata.normalize("NFC", op.doc)
    return doc.splitlines()[-len(formula(op)) :]


def gradient_of(op, name):
    """x̄, or x̄_i for each of the xs."""
    bar = unicodedata.normalize("NFC", name.removesuffix("s" if op.variadic else "") + "\u0304")
    return bar + "_i" if op.variadic else bar


@every_op
def test_the_last_lines_of_every_docstring_are_what_the_vjp_computes(op):
    assert last_lines(op) == formula(op)


@every_op
def test_every_differentiable_argument_has_one_line_and_the_others_none(op):
    written = [line.split(" = ")[0] for line in formula(op)]
    for name in op.arrays:
        wanted = op.domains.get(name) in (None, "positive", "unit")
        assert written.count(gradient_of(op, name)) == wanted


@every_op
def test_no_other_line_of_the_docstring_could_be_taken_for_a_formula(op):
    lines = unicodedata.normalize("NFC", op.doc).splitlines()[: -len(formula(op))]
    gradients = tuple(gradient_of(op, name) + " = " for name in op.arrays)
    assert not [line for line in lines if line.startswith(gradients)]
    assert max(map(len, op.doc.splitlines())) <= 96


@every_op
def test_every_letter_of_a_formula_is_an_argument_or_explained_above_it(op):
    """The pencil gives no line to numbers and to what forward saved, so the prose has to."""

    def letters(text):
        name = r"(?<!\d)[A-Za-zΑ-ω]+[\u0300-\u036f]?(?![a-z_(\u0300-\u036f])"  # and no function's
        return set(re.findall(name, text))

    lines = [unicodedata.normalize("NFD", line) for line in formula(op)]
    prose = unicodedata.normalize("NFD", "\n".join(op.doc.splitlines()[: -len(lines)]))
    known = {"g", "y", "π", "i", *op.arrays, *op.attributes} | letters(prose)
    for line in lines:
        left, right = line.split(" = ", 1)
        assert letters(right) <= known
        known |= letters(left)


# --- notation -------------------------------------------------------------------------------------


def vjp_of(*lines, first="xp, g, y", arguments="x, u, *, n, k"):
    """A vjp made of these lines, whose source can be looked up like that of a file."""
    file = "<vjp>"
    source = f"def vjp({first}, {arguments}):\n" + "".join(f"    {line}\n" for line in lines)
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = {}
    exec(compile(source, file, "exec"), names)
    return names["vjp"]


def op_of(vjp, domains=None):
    """An op that is in no table."""
    return Op(type("some_op", (), {"__doc__": "y", "vjp": vjp}), "", "", domains or {}, None)


def written(*lines, domains=None, **keywords):
    """The formula of an op of this vjp."""
    return formula(op_of(vjp_of(*lines, **keywords), domains))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("g * x", "g ⊙ x"),
        ("2 * g", "2 g"),
        ("n * g * x", "n g ⊙ x"),
        ("g * n", "g ⊙ n"),
        ("n * (g @ x)", "n g x"),
        ("x @ xp.matrix_transpose(g * u)", "x (g ⊙ u)ᵀ"),
        ("(g * x) @ u", "(g ⊙ x) u"),
        ("g * (x * u)", "g ⊙ (x ⊙ u)"),
        ("xp.matrix_transpose(x ** 2)", "(x²)ᵀ"),
        ("g / n * x", "(g / n) ⊙ x"),
        ("g * x / n", "g ⊙ x / n"),
        ("g / (2 * x)", "g / (2 x)"),
        ("g - (x - u)", "g - (x - u)"),
        ("g - x + u", "g - x + u"),
        ("-g * x", "-g ⊙ x"),
        ("-(g + x)", "-(g + x)"),
        ("g * -x", "g ⊙ (-x)"),
        ("-2 / math.sqrt(math.pi) * g", "-(2 / √π) g"),
        ("x * x", "x²"),
        ("-x * x / 2", "-x² / 2"),
        ("2 * x * x * x * u", "2 x³ ⊙ u"),
        ("x ** 2 * x", "x² ⊙ x"),
        ("x ** k", "x^k"),
        ("x ** (k - 1)", "x^(k - 1)"),
        ("x ** -0.5", "x^(-0.5)"),
        ("(1 + x) ** 12", "(1 + x)¹²"),
        ("3 * 0.5 * g", "3 · 0.5 g"),
        ("g / math.sqrt(2 * math.pi)", "g / √(2π)"),
        ("xp.sqrt(x) * xp.sqrt(x + u)", "√x ⊙ √(x + u)"),
        ("xp.exp(-x) + xp.log(u)", "exp(-x) + log(u)"),
        ("g * xp.sigmoid(x)", "g ⊙ σ(x)"),
        ("xp.sum(g * y, axis=-1, keepdims=True)", "Σ(g ⊙ y)"),
        ("xp.sum(g, axis=0)", "Σ(g, axis=0)"),
        ("xp.sum(g) / xp.mean(g, keepdims=True)", "Σ_all(g) / mean_all(g)"),
        ("xp.mean(g, axis=axis, keepdims=True)", "mean(g, axis=axis)"),
        ("xp.max(g, axis=-1) + xp.maximum(g, x)", "max(g) + max(g, x)"),
        ("xp.softmax(g, axis=-1)", "softmax(g, axis=-1)"),
        ("xp.maximum(x, 1e-12)", "max(x, 1e-12)"),
        ("xp.where((x <= 0.0) | (x > n), 0.0, g)", "where((x ≤ 0) ∨ (x > n), 0, g)"),
        ("xp.where((x >= n) & (u != 1), 0.0, g)", "where((x ≥ n) ∧ (u ≠ 1), 0, g)"),
        ("xp.where(((x < y) | (x > u)) & k, 0.0, g)", "where(((x < y) ∨ (x > u)) ∧ k, 0, g)"),
        ("xp.where(x < math.inf, g, y)", "where(x < ∞, g, y)"),
        ("g * xp.astype(x == y, x.dtype)", "g ⊙ [x = y]"),
        ("xp.reshape(xp.astype((x < y) & (x < u), x.dtype), u.shape)", "[(x < y) ∧ (x < u)]"),
        ("x == y", "(x = y)"),
        ("xp.reshape(xp.astype(g, x.dtype), x.shape)", "g"),
        ("xp.broadcast_to(g / n, x.shape)", "g / n"),
        ("xp.tril(g, k=k)", "tril(g, k)"),
        ("xp.scatter(g, u, size=x.shape[-1])", "scatter(g, u)"),
        ("g[k]", "g[k]"),
        ("g if n is None else n * g", "n g"),
        ("_TINY * g", "TINY g"),
        ("_twice(n) * g", "twice(n) g"),
    ],
)  # fmt: skip
def test_notation(expression, text):
    assert written(f"return {expression}, None") == [f"x̄ = {text}"]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["mu = xp.mean(x, axis=-1)", "x_hat = x - mu", "return x_hat, None"],
         ["μ = mean(x)", "x̂ = x - μ", "x̄ = x̂"]),
        (["x_bar = g * u", "return x_bar, -x_bar"], ["x̄ = g ⊙ u", "ū = -x̄"]),
        (["x_bar = g * u", "return xp.reshape(x_bar, x.shape), None"], ["x̄ = g ⊙ u"]),
        (["n = 1 if n is None else n", "return n * g, None"], ["x̄ = n g"]),
        (["m = n + 1", "return m * g, None"], ["x̄ = m g"]),
        (["m, l = x.shape", "c = g / m", "return c, None"], ["c = g / m", "x̄ = c"]),
        (["rows = xp.reshape(g, (-1,))", "return rows * x, None"], ["x̄ = g ⊙ x"]),
        (["g = xp.reshape(g, (-1,))", "return g * x, None"], ["x̄ = g ⊙ x"]),
        (["unused = g * x", "return g, None"], ["unused = g ⊙ x", "x̄ = g"]),
        (["same = x == y", "return xp.where(same, g, 0.0), None"],
         ["same = (x = y)", "x̄ = where(same, g, 0)"]),
    ],
)  # fmt: skip
def test_lines(lines, text):
    assert written(*lines) == text


def test_the_ops_own_axis_goes_without_saying():
    own = written("return xp.sum(x, axis=axis), xp.sum(u, axis=-1)", arguments="x, u, *, axis")
    assert own == ["x̄ = Σ(x)", "ū = Σ(u, axis=-1)"]


def test_what_was_saved_and_what_runs_with_i_have_a_name_but_no_line():
    saved = written("P, r = saved", "return P * r, None", arguments="x, u, *, saved")
    assert saved == ["x̄ = P ⊙ r"]
    lines = "parts = [x.shape for x in xs]", "return tuple(g[part] for part in parts)"
    assert written(*lines, arguments="*xs") == ["x̄_i = g[part_i]"]
    assert written("return tuple(g * x for x in xs)", arguments="*xs") == ["x̄_i = g ⊙ x_i"]


@pytest.mark.parametrize(
    "lines",
    [
        ["x_bar = g * u", "x_bar = x_bar * u", "return x_bar, None"],
        ["t = g * u", "t = 2 * t", "return t, None"],
        ["u = g * u", "return u, None"],
        ["u = xp.reshape(x, u.shape)", "return g * u, None"],
        ["n = n + 1", "return n * g, None"],
        ["n, m = x.shape", "return n * g, None"],
        ["saved = g", "return saved, None"],
        ["t = (x := u)", "return x, t"],
        ["return xp.reshape(g, (n := 2)), n * g"],
    ],
)
def test_a_name_that_gets_a_second_value_is_refused(lines):
    with pytest.raises(NotationError):
        written(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        ["return _g * g, None"],
        ["return _x_bar * g, None"],
        ["return μ * _mu * g, None"],
        ["mu = xp.mean(x, axis=-1)", "return _mu * g, mu"],
        ["c = _mu * g", "mu = c * x", "return mu, None"],
        ["pi = g * x", "return math.pi * pi, None"],
        ["sigma = math.sqrt(n)", "return sigma * (x + u), None"],
        ["x_bar = g * u", "return -x_bar, x_bar"],
        ["x_bar = g * u", "return None, x_bar"],
    ],
)
def test_a_letter_that_would_mean_two_things_is_refused(lines):
    with pytest.raises(NotationError, match=r": .+ (would mean two things|is another gradient)"):
        written(*lines)


@pytest.mark.parametrize(
    ("lines", "arguments"),
    [
        (["return tuple(g * x for x in y)"], "*xs"),
        (["return tuple(g * y for y in xs)"], "*xs"),
        (["return tuple(g * x for x in xs if x)"], "*xs"),
        (["return tuple(g[x] for x in range(3))"], "*xs"),
        (["return tuple(g[part] for part in parts)"], "*xs"),
        (["ys = g * y", "return tuple(g * y for y in ys)"], "*xs"),
        (["ys = xs", "return tuple(g * y for y in ys)"], "*xs"),
        (["parts = [g for x in xs if x[0]]", "return tuple(g[part] for part in parts)"], "*xs"),
        (
            ["parts = [i for i in y.shape if y[i]]", "return tuple(g[part] for part in parts)"],
            "*xs",
        ),
        (["parts = [1, 2]", "return tuple(g[part] for part in parts)"], "x, u"),
        (["parts = [1, 2]", "return (g[part] for part in parts), None"], "x, u"),
        (["return (g,)"], "*xs"),
        (["return tuple(g * x for x in xs)"], "a, *xs"),
    ],
)
def test_x_i_is_the_ith_array_or_the_ith_of_what_is_numbers(lines, arguments):
    with pytest.raises(NotationError):
        written(*lines, arguments=arguments)


def test_only_a_cast_to_the_dtype_of_real_numbers_leaves_no_trace():
    assert written("return xp.astype(g, u.dtype), None") == ["x̄ = g"]
    for domain in ("bool", "index v", "target", "constant"):
        with pytest.raises(NotationError):
            written("return xp.astype(g, u.dtype), None", domains={"u": domain})


@pytest.mark.parametrize("first", ["xp, y, g", "np, g, y", "xp"])
def test_a_vjp_takes_xp_g_and_y_in_this_order(first):
    with pytest.raises(NotationError, match="xp, g and y first"):
        formula(TABLE["exp"], vjp_of("return (g * y,)", first=first, arguments="x"))


def test_to_ask_what_is_a_number_changes_nothing():
    vjp = vjp_of("return tuple(g * x for x in xs)", arguments="*xs")
    pencil = _Pencil(op_of(vjp), vjp)
    before = copy.deepcopy((pencil.arrays, pencil.letters))
    sources = "[x.shape for x in xs]", "[v for v in y]", "[x for x in xs]", "y.shape[0] * 2"
    for source, answer in zip(sources, (True, False, False, True)):
        assert pencil.numeric(ast.parse(source, mode="eval").body) == answer
    assert (pencil.arrays, pencil.letters) == before


@pytest.mark.parametrize(
    "line",
    [
        "return g % x, None",
        "return ~x, None",
        "return (g if n else x), None",
        "return x.T, None",
        "return g / x.shape[0], None",
        "return _helper(g, x), None",
        "return xp.sum(v for v in x), None",
        "return g[..., 0], None",
        "return 0 < x < 1, None",
        "return xp.astype, None",
        "return xp.astype(g, xp.int64), None",
        "return xp.astype(g, n), None",
        "return xp.astype(x == y, xp.int64), None",
        "return xp.reshape(x=g, shape=x.shape), None",
        "return xp.sum(g, -1), None",
        "return xp.mean(g, -1, keepdims=True), None",
        "return xp.max(g, x), None",
        "return xp.sum(g, dtype=x.dtype), None",
        "return xp.sum(g, axis=None), None",
        "return xp.tril(g, k=x.shape[0]), None",
        "return xp.tril(g, **k), None",
        "return _twice(n, k=k) * g, None",
        "return _exp(n) * g, None",
        "return _u(n) * g, None",
        "return max(n, k) * g, None",
        "return g",
        "return (g,)",
        "return tuple([g, None])",
        "return tuple(g for _ in x)",
        "if n: g = x",
        "g += x",
        "g[0] = 0.0",
        "a = b = g",
        "a, b = g, x",
        "for _ in range(n): g = g * x",
        "'a docstring'",
    ],
)
def test_what_has_no_notation_is_refused_by_op_and_line(line):
    lines = ["v = x * y", line, "return a * g, v"]
    with pytest.raises(NotationError, match=r"^op some_op, <vjp>, line 3: .+"):
        written(*lines[: 2 if line.startswith("return") else 3])


def test_a_docstring_that_says_something_else_than_its_code_is_found_out():
    try:

        @op("(),()->()")
        class some_op:  # noqa: N801
            """y = a ⊙ b

            ā = g ⊙ b
            b̄ = g ⊙ a"""

            def vjp(xp, g, y, a, b):  # noqa: N805
                return g * b, g * b

    finally:
        TABLE.pop("some_op", None)
    assert formula(some_op) == ["ā = g ⊙ b", "b̄ = g ⊙ b"]
    assert last_lines(some_op) != formula(some_op)


def test_another_vjp_can_be_written_in_the_place_of_an_ops_own():
    assert formula(TABLE["exp"], vjp_of("return (g / y,)", arguments="x")) == ["x̄ = g / y"]


# --- parentheses ----------------------------------------------------------------------------------


class Reader:
    """Reads a formula as a mathematician does, and more strictly: a single / and no ⊙ behind it,
    a minus only in front. The result is a tree: a letter, a number or (symbol, *operands)."""

    def __init__(self, text):
        text = text.translate({ord(s): f"^{n}" for n, s in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
        self.tokens = [*re.findall(r"\d+|[a-z]+|\S", text), ""]

    @classmethod
    def tree(cls, text):
        reader = cls(text)
        tree = reader.sum()
        reader.expect("")
        return tree

    def take(self, *symbols):
        return self.tokens.pop(0) if self.tokens[0] in symbols else None

    def expect(self, symbol):
        if not self.tokens or self.tokens.pop(0) != symbol:
            raise SyntaxError

    def sum(self):
        tree = ("-", self.quotient()) if self.take("-") else self.quotient()
        while symbol := self.take("+", "-"):
            tree = (symbol, tree, self.quotient())
        return tree

    def quotient(self):
        tree = self.product()
        return ("/", tree, self.power()) if self.take("/") else tree

    def product(self):
        tree = self.beside()
        while self.take("⊙"):
            tree = ("*", tree, self.beside())
        return tree

    def beside(self):
        factors = [self.power()]
        while self.take("·") or re.match("[a-z(]", self.tokens[0]):
            factors.append(self.power())
        return factors[0] if len(factors) == 1 else ("beside", *factors)

    def power(self):
        base = self.atom()
        return ("**", base, self.atom()) if self.take("^") else base

    def atom(self):
        if self.take("("):
            tree = self.sum()
            self.expect(")")
            return tree
        if not self.tokens[0].isalnum():
            raise SyntaxError
        return self.tokens.pop(0)


def matrix(*numbers):
    return np.array([Fraction(n) for n in numbers]).reshape(2, 2)


def beside(a, *more):
    """A matrix product, or a number times what follows."""
    if not more:
        return a
    b = beside(*more)
    return a @ b if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a * b


VALUES = {"n": Fraction(3), "g": matrix(5, 2, -3, 1), "x": matrix(11, 7, 1, -4)}
OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b=None: -a if b is None else a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
    "beside": beside,
}


def value(tree):
    if isinstance(tree, str):
        return VALUES[tree] if tree in VALUES else Fraction(tree)
    return OPERATORS[tree[0]](*map(value, tree[1:]))


def value_of_source(source):
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", source), {"Fraction": Fraction}, VALUES)


def pairs(text):
    """The positions of every ( with its )."""
    open_ones = []
    for i, symbol in enumerate(text):
        if symbol == "(":
            open_ones.append(i)
        elif symbol == ")":
            yield open_ones.pop(), i


def expressions(depth, number=False):
    """Python expressions of matrices, or of numbers, with parentheses around everything."""
    leaf = st.sampled_from(["n", "2", "3"] if number else ["g", "x"])
    if depth == 0:
        return leaf
    same, numbers = expressions(depth - 1, number), expressions(depth - 1, number=True)
    parts = [
        st.tuples(same, st.sampled_from("+-*/" if number else "+-*/@"), same),
        st.tuples(numbers, st.sampled_from("*/"), same),
        st.tuples(same, st.just("**"), st.sampled_from("2n")),
        st.tuples(st.just("-"), same),
    ]
    return st.one_of(leaf, *[part.map(" ".join).map("({})".format) for part in parts])


@settings(max_examples=1000)
@given(expressions(depth=3))
def test_parentheses_are_never_wrong_and_never_too_many(source):
    try:
        expected = value_of_source(source)
    except ZeroDivisionError:
        assume(False)
    text = written(f"return ({source}), None")[0].removeprefix("x̄ = ")
    tree = Reader.tree(text)
    assert np.all(value(tree) == expected)
    for start, end in pairs(text):
        without = text[:start] + text[start + 1 : end] + text[end + 1 :]
        with contextlib.suppress(SyntaxError):
            assert Reader.tree(without) != tree, f"{without} says the same as {text}"
