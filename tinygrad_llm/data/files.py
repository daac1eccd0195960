"""Writing files so that a reader never sees half of one, and nothing stays of a killed writer.

The new content goes to a file without a name, which the system drops when the process ends. Once
complete, it gets a name beside the target, and then the target's own. Where a system has no files
without names, it has its temporary name from the start. File and folder are written through to the
disk: what has been replaced stays so, also if the power fails.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends, or leaves it alone on an error.

    Raises OSError, which names `path`, if it is a folder, or its folder is missing or cannot be
    written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of a file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    # A part of the name: it may have all of the 255 bytes that a name can have.
    temporary = path.with_name(f".{path.name[-50:]}.{os.getpid()}.tmp")
    try:
        with _without_name(path.parent) or open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
            if isinstance(file.name, int):  # its number: it has no name
                temporary.unlink(missing_ok=True)
                _give_name(file.name, temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the one that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Writes the names of a folder's files to the disk, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _without_name(folder: Path) -> BinaryIO | None:
    """A new file in the folder, without a name; None where the system has no such files."""
    if not hasattr(os, "O_TMPFILE") or not os.path.exists("/proc/self/fd"):
        return None
    try:
        return open(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except OSError:
        return None


def _give_name(number: int, path: Path) -> None:
    """As open(2) says under O_TMPFILE. Python follows the link only where a folder is given."""
    os.link(f"/proc/self/fd/{number}", path, src_dir_fd=number, follow_symlinks=True)
