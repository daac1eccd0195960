"""What the user can put right, said in one line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a user's share of it, a file


class UserError(Exception):
    """Something that the user can put right: becomes one line on stderr and exit code 2."""


@contextmanager
def user_input(saved: bool = True) -> Iterator[None]:
    """Inside, the library works on what the user typed or stored: what it refuses is theirs.

    saved   whether there is something from before that a full disk has not harmed
    """
    try:
        yield
    except (ValueError, IndexError, OSError) as error:
        raise UserError(described(error, saved)) from error


def described(error: Exception, saved: bool = True) -> str:
    """What is wrong, and what the user can do about it."""
    short_write = " requested and " in str(error)  # what NumPy says when a file is cut short
    if isinstance(error, OSError) and (error.errno in FULL or short_write):
        if not saved:
            return (
                "No space left to write, and nothing was saved yet: free some and run the same "
                "command again"
            )
        return "No space left to write: free some and try again; what was saved before is kept"
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror}; give a path that can be read and written"
    return str(error)


@contextmanager
def utf8_expected(what: str) -> Iterator[None]:
    """Inside, bytes that the user typed are decoded. Raises ValueError that says which are none."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8 at byte offset {error.start}: if it is text, convert it first, "
            "for example with: iconv -f LATIN1 -t UTF-8"
        ) from None


# Wrong options, as click calls them; newer versions of Typer have a copy of click of their own.
UsageError = typer.BadParameter.__base__
