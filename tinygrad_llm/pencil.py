"""Pencil: reads the source of an op's vjp and writes it down as mathematics.

The last lines of every op's docstring are exactly what is written here, and tests/test_pencil.py
holds it: the formula that a reader sees is the code that runs. The notation:

- x̄ is x's gradient. a ⊙ b multiplies elements; a b, side by side, is a matrix product, or a number
  times what follows. Side by side binds tightest, then ⊙, then a single /, then + and -.
- Σ, mean, max and min of one array run along the op's axis, or along the last where it has none;
  Σ_all over everything. [x = y] is 1 where x = y and 0 elsewhere. x_i is the i-th of xs.
- Shapes and dtypes are not shown: x̄ always has x's own. So reshape, broadcast_to and astype leave
  no trace; of an op that does nothing else, the gradient is x̄ = g.
- What comes from numbers and shapes alone, and what forward saved, has a name but no line: the
  prose above the formulas says what it is.
- `a if name is None else b` is b, the general case.
- A letter means one thing, and x̄ what is returned for x. So a name is given one value; the same in
  another shape is no other value.

What has no notation is refused: NotationError names the op and the line.
"""

import ast
import inspect
import itertools
import textwrap
import unicodedata
from pathlib import Path
from typing import NamedTuple

from .ops import TABLE

GREEK = dict(
    alpha="α", beta="β", gamma="γ", delta="δ", eps="ε", eta="η", theta="θ", kappa="κ", mu="μ",
    nu="ν", xi="ξ", pi="π", rho="ρ", sigma="σ", tau="τ", phi="φ", chi="χ", psi="ψ", omega="ω",
    Gamma="Γ", Delta="Δ", Theta="Θ", Phi="Φ", Psi="Ψ", Omega="Ω",
)  # fmt: skip
MARKS = {"bar": "\u0304", "hat": "\u0302"}  # they combine with the letter in front
FUNCTIONS = {"sigmoid": "σ", "maximum": "max", "minimum": "min"}
REDUCTIONS = {"sum": "Σ", "mean": "mean", "max": "max", "min": "min"}
CONSTANTS = {"pi": "π", "inf": "∞"}
INVISIBLE = {"astype", "reshape", "broadcast_to"}
SHAPES = {"shape", "rows", "size", "keepdims"}  # arguments by these names say shapes
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

# How tightly a piece of text holds together, from the loosest to the tightest.
COMPARISON, OR, AND, SUM, QUOTIENT, PRODUCT, BESIDE, POWER, ATOM = range(9)
BINARY = {  # the symbol; how tight the whole is; how tight its left and its right side must be
    ast.Add: ("+", SUM, SUM, QUOTIENT),
    ast.Sub: ("-", SUM, SUM, QUOTIENT),
    ast.Div: ("/", QUOTIENT, PRODUCT, POWER),
    ast.BitAnd: ("∧", AND, AND, SUM),
    ast.BitOr: ("∨", OR, OR, AND),
    ast.Eq: ("=", COMPARISON, OR, OR),
    ast.NotEq: ("≠", COMPARISON, OR, OR),
    ast.Lt: ("<", COMPARISON, OR, OR),
    ast.LtE: ("≤", COMPARISON, OR, OR),
    ast.Gt: (">", COMPARISON, OR, OR),
    ast.GtE: ("≥", COMPARISON, OR, OR),
}


class NotationError(ValueError):
    """The pencil has no notation for this."""


class Piece(NamedTuple):
    """A part of a formula."""

    text: str
    level: int

    def at(self, level):
        """The text, in parentheses if it holds together less tightly than `level`."""
        return self.text if self.level >= level else f"({self.text})"


def formula(op, vjp=None):
    """The lines that op's vjp computes; or those of another function in the place of its vjp."""
    return _Pencil(op, vjp or op.vjp).lines()


class _Pencil(ast.NodeVisitor):
    """Writes one vjp: visiting an expression gives its Piece."""

    def __init__(self, op, vjp):
        self.op, self.vjp = op, vjp
        tree = ast.parse(textwrap.dedent(inspect.getsource(vjp))).body[0]
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
            self.refuse(tree, "a vjp is written with def, and not decorated")
        for node in ast.walk(tree):
            match node:
                case ast.NamedExpr() | ast.keyword(None):  # (x := u), **arguments
                    self.refuse(node)
        *self.statements, self.last = _GeneralCase().visit(tree).body
        self.xs = tree.args.vararg.arg if tree.args.vararg else ""
        self.x = self.xs.removesuffix("s")  # each of them
        names = [a.arg for a in (*tree.args.args, tree.args.vararg) if a]
        if names[:3] != ["xp", "g", "y"]:
            self.refuse(tree.args, "a vjp takes xp, g and y first")
        self.arrays = {*names[1:], self.x, "saved"}  # names of what is not a number
        real = [x for x in names[1:] if op.domains.get(x) in (None, "positive", "unit")]
        self.dtypes = {f"{x}.dtype" for x in real}
        self.gradients = self.returned(names[3:])
        self.letters = {}  # of every name that has a value
        for name in {*names, *(a.arg for a in tree.args.kwonlyargs), "saved"}:
            self.define(tree.args, name, _letter(name))

    def refuse(self, node, why="the pencil has no notation for this"):
        line = self.vjp.__code__.co_firstlineno + getattr(node, "lineno", 1) - 1
        place = f"{Path(self.vjp.__code__.co_filename).name}, line {line}"
        raise NotationError(f"op {self.op.name}, {place}: {why}: {ast.unparse(node)}")

    generic_visit = refuse

    # --- the lines --------------------------------------------------------------------------------

    def lines(self):
        lines = [line for node in self.statements for line in self.assignment(node)]
        for letter, gradient in self.gradients.items():
            if ast.unparse(gradient) != "None":
                text = self.visit(self.each(gradient)).at(OR)
                lines += [f"{letter} = {text}"] if text != letter else []  # its line stands already
        return lines

    def returned(self, arrays):
        """{x̄: the expression returned for x}."""
        match self.last:
            case ast.Return(ast.Call(ast.Name("tuple"), [ast.GeneratorExp() as gradient])):
                if arrays == [self.xs]:
                    return {_letter(f"{self.x}_bar") + "_i": gradient}
            case ast.Return(ast.Tuple(gradients)):
                if len(gradients) == len(arrays) and not self.xs:
                    return {_letter(f"{x}_bar"): e for x, e in zip(arrays, gradients)}
        self.refuse(self.last, "a vjp ends by returning a tuple, one gradient for each array")

    def each(self, gradient):
        """What is inside of `... for x in xs`, whose x is written x_i; another gradient as is."""
        match gradient:
            case ast.GeneratorExp(inside, [ast.comprehension(ast.Name(x), ast.Name(xs), [])]):
                numbers = xs in self.letters and xs not in self.arrays
                if self.xs and xs == f"{x}s" and (numbers or xs == self.xs):
                    self.define(gradient, x, _letter(x) + "_i")
                    return inside
                self.refuse(gradient, "x_i is the i-th of xs, which are the arrays or numbers")
        return gradient

    def assignment(self, node):
        """The line for an assignment, if it needs one; what it names gets a letter."""
        if not isinstance(node, ast.Assign) or len(node.targets) > 1:
            self.refuse(node)
        [target], value = node.targets, node.value
        names = [ast.unparse(part) for part in getattr(target, "elts", [target])]
        inside, number = ast.unparse(self.bare(value)), self.numeric(value)
        silent = number or inside == "saved"
        if not all(map(str.isidentifier, names)) or not (silent or isinstance(target, ast.Name)):
            self.refuse(node)
        if names == [inside]:  # the same in another shape
            return []
        if self.letters.keys() & names:
            self.refuse(node, "a name is given one value")
        self.arrays |= set() if number else set(names)
        if isinstance(target, ast.Name) and inside in self.letters and inside != "saved":
            self.letters[target.id] = self.letters[inside]  # another name for it
            return []
        text = None if silent else self.visit(value).at(OR)
        letters = [self.define(node, name, _letter(name)) for name in names]
        return [] if silent else [f"{letters[0]} = {text}"]

    def define(self, node, name, letter):
        """Gives a name its letter, which must mean nothing else yet."""
        if letter in self.gradients and ast.unparse(self.bare(self.gradients[letter])) != name:
            self.refuse(node, f"{letter} is another gradient than {name}")
        if letter in ("π", "σ", *self.letters.values()):
            self.refuse(node, f"{letter} would mean two things")
        self.letters[name] = letter
        return letter

    # --- what a part of the source is -------------------------------------------------------------

    def numeric(self, node):
        """Whether this is computed from numbers, shapes and dtypes alone."""
        match node:
            case ast.Name(name):
                return name not in self.arrays
            case ast.Attribute(attr="shape" | "dtype") | ast.Call(ast.Name("len")):
                return True
            case ast.Call(ast.Attribute(ast.Name("xp"))):
                return False
            case ast.ListComp(part, [ast.comprehension(ast.Name(self.x), ast.Name(self.xs), [])]):
                return self.numeric(part)
        return all(map(self.numeric, ast.iter_child_nodes(node)))

    def bare(self, node):
        """The expression inside of what changes its shape, or its dtype to that of real numbers."""
        match node:
            case ast.Call(ast.Attribute(ast.Name("xp"), name), [array, to]):
                cast = name == "astype" and ast.unparse(to) in self.dtypes
                if cast or name in ("reshape", "broadcast_to"):
                    return self.bare(array)
        return node

    def function(self, node):
        """The name of the function that is called."""
        match node:
            case ast.Call(ast.Attribute(ast.Name("math" | "xp"), name)) if name not in INVISIBLE:
                return name
            case ast.Call(ast.Name(name), _, []) if self.numeric(node):  # not mathematics of arrays
                name = name.lstrip("_")
                if name not in (*TABLE, *self.letters.values()):  # nor anything else's name
                    return name
        self.refuse(node)

    # --- expressions ------------------------------------------------------------------------------

    def visit_Name(self, node):
        if node.id not in self.letters:  # a constant of the op's file
            self.define(node, node.id, _letter(node.id.lstrip("_")))
        return Piece(self.letters[node.id], ATOM)

    def visit_Constant(self, node):
        if type(node.value) not in (int, float):
            self.refuse(node)
        return Piece(repr(node.value).removesuffix(".0"), ATOM)

    def visit_Attribute(self, node):
        match node:
            case ast.Attribute(ast.Name("math" | "xp"), name) if name in CONSTANTS:
                return Piece(CONSTANTS[name], ATOM)
        self.refuse(node)

    def visit_Subscript(self, node):
        return Piece(f"{self.visit(node.value).at(ATOM)}[{self.visit(node.slice).text}]", ATOM)

    def visit_UnaryOp(self, node):
        opposite = _opposite(node) or self.refuse(node)
        return Piece("-" + self.visit(opposite).at(QUOTIENT), SUM)

    def visit_BinOp(self, node):
        match node.op:
            case _ if _opposite(node):
                return self.visit_UnaryOp(node)
            case ast.Mult():
                return self.product(_factors(node))
            case ast.MatMult():
                return _beside(self.visit(node.left), self.visit(node.right))
            case ast.Pow():
                return _power(self.visit(node.left), self.visit(node.right))
        return self.binary(node, node.left, node.op, node.right)

    def visit_Compare(self, node):
        return self.binary(node, node.left, node.ops[0], *node.comparators)

    def binary(self, node, left, op, right, *chained):
        if chained or type(op) not in BINARY:
            self.refuse(node)
        symbol, level, left_level, right_level = BINARY[type(op)]
        left, right = self.visit(left).at(left_level), self.visit(right).at(right_level)
        return Piece(f"{left} {symbol} {right}", level)

    def product(self, factors):
        """Numbers stand beside what they multiply; between arrays stands ⊙."""
        whole, number = self.visit(factors[0]), self.numeric(factors[0])
        for factor in factors[1:]:
            if number:
                whole = _beside(whole, self.visit(factor))
            else:
                right = self.visit(factor).at(BESIDE)
                whole = Piece(f"{whole.at(PRODUCT)} ⊙ {right}", PRODUCT)
            number = number and self.numeric(factor)
        return whole

    def visit_Call(self, node):
        if (inside := self.bare(node)) is not node:
            piece = self.visit(inside)
            return Piece(f"[{piece.text}]", ATOM) if piece.level <= AND else piece  # 1 or 0
        name = self.function(node)
        match name, node.args:
            case _ if name in REDUCTIONS:
                return self.reduction(node, REDUCTIONS[name])
            case "matrix_transpose", [array]:
                return Piece(self.visit(array).at(ATOM) + "ᵀ", POWER)
            case "sqrt", [number]:
                return Piece("√" + self.visit(number).at(ATOM), POWER)
        shown = [self.visit(a).text for a in node.args]
        for keyword in node.keywords:
            if keyword.arg not in SHAPES:
                text = self.visit(keyword.value).text
                shown.append(text if text == keyword.arg else f"{keyword.arg}={text}")
        return Piece(f"{FUNCTIONS.get(name, name)}({', '.join(shown)})", ATOM)

    def reduction(self, node, symbol):
        """Over everything, or along an axis, which goes without saying where it is the op's own."""
        keywords = {k.arg: k.value for k in node.keywords if k.arg != "keepdims"}
        if len(node.args) != 1 or keywords.keys() - {"axis"}:
            self.refuse(node)
        inside = self.visit(node.args[0]).text
        if not keywords:
            return Piece(f"{symbol}_all({inside})", ATOM)
        axis = self.visit(keywords["axis"]).text
        own = "axis" if "axis" in self.op.attributes else "-1"
        return Piece(f"{symbol}({inside}{'' if axis == own else f', axis={axis}'})", ATOM)


class _GeneralCase(ast.NodeTransformer):
    """Makes `a if name is None else b` into b."""

    def visit_IfExp(self, node):
        self.generic_visit(node)
        match node.test:
            case ast.Compare(ast.Name(), [ast.Is()], [ast.Constant(None)]):
                return node.orelse
        return node


def _letter(name):
    """A Python name as mathematics writes it: x_bar as x̄, mu as μ, Phi as Φ."""
    base, _, mark = name.rpartition("_")
    if base and mark in MARKS:
        return unicodedata.normalize("NFC", _letter(base) + MARKS[mark])
    return GREEK.get(name, name)


def _opposite(node):
    """What stands behind a leading minus, or None: -x y is read as -(x y), the same as (-x) y."""
    match node:
        case ast.UnaryOp(ast.USub(), operand):
            return operand
        case ast.BinOp(left, ast.Mult() | ast.Div() | ast.MatMult()) if _opposite(left):
            return ast.BinOp(_opposite(left), node.op, node.right)


def _factors(node):
    """a * b * c as [a, b, c], where x * x has become x ** 2."""
    factors = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors.insert(0, node.right)
        node = node.left
    powers = []
    for _, equal in itertools.groupby([node, *factors], ast.dump):
        first, *more = equal
        if more and isinstance(first, ast.Name):
            powers.append(ast.BinOp(first, ast.Pow(), ast.Constant(1 + len(more))))
        else:
            powers += [first, *more]
    return powers


def _beside(left, right):
    """scale g; with a dot where digits would run together, and 2π without a space."""
    left, right = left.at(BESIDE), right.at(BESIDE)
    between = " · " if right[0].isdecimal() else "" if left.isdecimal() and right == "π" else " "
    return Piece(left + between + right, BESIDE)


def _power(base, exponent):
    base, exponent = base.at(ATOM), exponent.at(ATOM)
    raised = exponent.translate(SUPERSCRIPTS) if exponent.isdecimal() else f"^{exponent}"
    return Piece(base + raised, POWER)
