"""What the user can put right, said in one line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a user's share of it, a file


class UserError(Exception):
    """Something that the user can put right: becomes one line on stderr and exit code 2."""


@contextmanager
def user_input() -> Iterator[None]:
    """Inside, the library works on what the user typed or stored: what it refuses is theirs."""
    try:
        yield
    except (ValueError, IndexError, OSError) as error:
        raise UserError(described(error)) from error


def described(error: Exception) -> str:
    """What is wrong, and what the user can do about it."""
    short_write = " requested and " in str(error)  # what NumPy says when a file is cut short
    if isinstance(error, OSError) and (error.errno in FULL or short_write):
        return "No space left to write: free some and try again; what was saved before is kept"
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror}; give a path that can be read and written"
    return str(error)


# Wrong options, as click calls them; newer versions of Typer have a copy of click of their own.
UsageError = typer.BadParameter.__base__
