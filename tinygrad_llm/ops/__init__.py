"""The truth: every operation, written once, as mathematics.

An op is a class with a `forward` and a `vjp` (vector-Jacobian product, the backward pass). Both
take the array namespace `xp` first, so the same lines compute on NumPy, on a GPU, on complex
numbers (for checking) and on the tape's own Tensors (for second derivatives). Nothing is imported
here but the standard library: whoever reads an op passes `xp` in. docs/architecture.md shows how to
add one.
"""

import inspect
import re

TABLE = {}  # name -> Op: every op of the library, in the order of definition


class Op:
    """One operation: what it is called, what it takes, and its two functions.

    forward(xp, *arrays, **attributes) -> y, or (y, saved) if `saves`
    vjp(xp, g, y, *arrays, **attributes[, saved]) -> one gradient (or None) for each array

    `g` has y's shape. A gradient may come back in the *broadcast* shape of its array: the engine
    sums it down. `saved` is whatever `forward` kept; where it was not kept, the engine
    computes it again.
    """

    def __init__(self, cls, signature, fixed, domains, examples):
        parameters = list(inspect.signature(cls.vjp).parameters.values())[3:]  # after xp, g, y
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        arrays = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if not cls.__doc__:
            raise TypeError(f"op {cls.__name__} needs a docstring: its formula and its derivation")
        _check_options(cls, [p.name for p in arrays], signature, fixed.split(), domains, examples)
        self.name = cls.__name__
        self.doc = inspect.cleandoc(cls.__doc__)
        self.signature = signature
        self.arrays = tuple(p.name for p in arrays)
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in arrays)
        self.attributes = tuple(p.name for p in keywords if p.name != "saved")
        self.saves = any(p.name == "saved" for p in keywords)
        self.primitive = "forward" not in cls.__dict__
        self.forward = _array_api_function(self) if self.primitive else cls.__dict__["forward"]
        self.vjp = cls.__dict__["vjp"]
        self.fixed = tuple(fixed.split())
        self.domains = domains
        self.examples = examples or ({},)
        self.sample = cls.__dict__.get("sample")

    def __repr__(self):
        return f"<op {self.name} {self.signature}>"

    def bind(self, args, keywords):
        """Splits the arguments of a call: positionals beyond the arrays are attributes."""
        if self.variadic:
            arrays = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
            return arrays, keywords
        surplus = args[len(self.arrays) :]
        return args[: len(self.arrays)], {**dict(zip(self.attributes, surplus)), **keywords}


_DOMAINS = ("positive", "unit", "bool", "target", "constant")


def _check_options(cls, arrays, signature, fixed, domains, examples):
    """Raises ValueError where @op was given something that it would not understand."""
    name = cls.__name__
    array = r"\((\w+(,\w+)*)?\)"
    if signature and not re.fullmatch(rf"{array}(,{array})*->{array}", signature.replace(" ", "")):
        raise ValueError(f"op {name}: signature {signature!r} is not like '(n,k),(k)->(n)'")
    if signature and signature.count("(") - 1 != len(arrays):
        raise ValueError(
            f"op {name}: signature {signature!r} does not fit its {len(arrays)} arrays"
        )
    unknown = [a for a in (*fixed, *domains) if a not in arrays]
    if unknown:
        raise ValueError(f"op {name} has no array {unknown[0]!r}; its arrays: {', '.join(arrays)}")
    for array, domain in domains.items():
        if domain not in _DOMAINS and not re.fullmatch(r"index \w+", str(domain)):
            known = ", ".join(_DOMAINS)
            raise ValueError(f"op {name}: domain {domain!r} of {array}: not {known}, 'index n'")
    if not all(isinstance(example, dict) for example in examples or ()):
        raise ValueError(f"op {name}: examples is a list of dictionaries, not {examples!r}")


def _array_api_function(op):
    """The forward of a primitive op: the array API's function of the same name."""

    def forward(xp, *arrays, **attributes):
        function = getattr(xp, op.name)
        return (
            function(list(arrays), **attributes) if op.variadic else function(*arrays, **attributes)
        )

    return forward


def op(signature="", *, fixed="", examples=None, **domains):
    """Registers a class as an op under its own name, and returns the Op.

    signature   NumPy gufunc signature of the arrays' core dimensions, "(n),(n)->()"; for readers
                and for whoever draws inputs. Empty where the language of gufuncs cannot say it:
                then the class has `sample(rng) -> (shapes, attributes)`.
    fixed       names of arrays that have no batch dimensions (weights).
    examples    attributes to try the op with, as dictionaries.
    domains     what an array holds, where that is not "any real number": "positive" or "unit"
                (between 0 and 1); and for arrays without a gradient: "bool", "index v" (integers
                below core dimension v), "target" (between 0 and 1) or "constant" (anything).
    """

    if isinstance(signature, type):
        raise TypeError(f"write @op(...) before class {signature.__name__}, with parentheses")

    def register(cls):
        if cls.__name__ in TABLE:
            raise ValueError(f"an op named {cls.__name__!r} exists already; choose another name")
        return TABLE.setdefault(cls.__name__, Op(cls, signature, fixed, domains, examples))

    return register


# Registers every op, by importing the files that hold them.
from . import attention, elementwise, linear, loss, norm, position, reduce, shape  # noqa: E402, F401
