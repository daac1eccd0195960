"""Writing files so that a reader never sees half of one.

The new content goes to a temporary file beside the target, which then takes the target's name.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends, or leaves it alone on an error.

    Raises OSError if the folder is missing or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the bytes are on the disk before the name points to them
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
