"""Gradient truth: is a backward pass the derivative of its forward pass?

gradcheck(f, *inputs)   any function of Tensors, at these inputs
laws(op)                an op, by every law in LAWS, over arguments drawn from its signature
arguments(op)           these arguments, as a Hypothesis strategy, for laws of your own

docs/gradient-checking.md explains the method.
"""

from .cases import Call, arguments
from .gradient import gradcheck
from .lawbook import LAWS, laws
from .point import GradientError, MeasurementError
from .trial import Law, LawError, Trial

__all__ = [
    "LAWS",
    "Call",
    "GradientError",
    "Law",
    "LawError",
    "MeasurementError",
    "Trial",
    "arguments",
    "gradcheck",
    "laws",
]
