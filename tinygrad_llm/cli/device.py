"""Where a command computes, and with what numbers: options of train, generate and chat."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from .. import backend
from ..device import Device, automatic, device
from .errors import UserError

PANEL = "Computing"
FULL = 2  # what CUDA calls "out of memory": cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY

Dtype = StrEnum("Dtype", ["float32", "bfloat16", "float16"])

DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|NAME",
        show_default="auto",
        help="Where to compute: cpu, cuda, cuda:1, ...; auto takes a GPU if one can be used.",
        rich_help_panel=PANEL,
    ),
]
DtypeName = Annotated[
    Dtype,
    typer.Option("--dtype", help="Of the weights and of what is computed.", rich_help_panel=PANEL),
]
Kernels = Annotated[
    str,
    typer.Option(
        metavar="auto|off|off:NAME,...",
        envvar="TINYGRAD_LLM_KERNELS",
        help="Without kernels, or without some of them: every op by its own lines, slowly.",
        rich_help_panel=PANEL,
    ),
]


def chosen(name: str | None, kernels: str) -> tuple[Device, str]:
    """The device to compute on, and what to say of it; switches kernels off that are not wanted.

    Raises ValueError for a device that cannot be used or kernels that do not exist.
    """
    backend.current.reading = backend.reading(kernels)
    if name not in (None, "auto"):
        found, reason = device(name), None
    else:
        found, reason = automatic()
    found.make_current()
    return found, f"device: {found.title}" + (f" ({reason})" if reason else "")


@contextmanager
def enough_memory(where: Device, what_to_change: str) -> Iterator[None]:
    """Inside, memory may run out, of the machine or of its GPU: a UserError then."""
    try:
        yield
    except Exception as error:
        # What CuPy allocates raises MemoryError, but what CUDA allocates by itself an error of CUDA
        if not isinstance(error, MemoryError) and getattr(error, "status", None) != FULL:
            raise
        raise UserError(f"{where.name} is out of memory: {what_to_change}") from error
