"""Writing files so that a reader never sees half of one, and nothing stays of a killed writer.

The new content goes to a file without a name, which the system drops when the process ends. Once
complete, it gets a name beside the target, and then the target's own. Where a system has no files
without names, it has its temporary name from the start. File and folder are written through to the
disk: what has been replaced stays so, also if the power fails.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class _Current(threading.local):
    changes = None  # those of the `together` block that this thread is in


_current = _Current()


class NewFile:
    """What a file will hold: written through to the disk, then named, then in the old one's place.

    Of these steps only the last cannot run out of space.
    """

    def __init__(self, path: Path):
        self.path = path
        # A part of the name: it may have all of the 255 bytes that a name can have.
        self.temporary = path.with_name(f".{path.name[-50:]}.{os.getpid()}.tmp")
        with self._by_its_users_name():
            self.file = _without_name(path.parent) or open(self.temporary, "w+b")  # noqa: SIM115

    def write_through(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def give_name(self) -> None:
        if isinstance(self.file.name, int):  # its number: it has no name
            with self._by_its_users_name():
                self.temporary.unlink(missing_ok=True)
                _give_name(self.file.name, self.temporary)

    def take_place(self) -> None:
        self.file.close()
        with self._by_its_users_name():
            os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Leaves nothing of it but what has taken its place."""
        with suppress(OSError):  # what the disk had no room for
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def is_new(self) -> bool:
        """Whether the file that it replaces is missing, or holds something else."""
        self.file.seek(0)
        return not self.path.exists() or self.path.read_bytes() != self.file.read()

    @contextmanager
    def _by_its_users_name(self):
        """Errors name the file that the user knows, not the temporary one."""
        try:
            yield
        except OSError as error:
            if error.filename == str(self.temporary):
                error.filename = str(self.path)
            raise


class Removal:
    """Files that will be deleted, in this order, where they exist."""

    def __init__(self, *paths: Path):
        self.paths = paths

    def give_name(self) -> None:
        pass

    def take_place(self) -> None:
        for path in self.paths:
            with suppress(FileNotFoundError):
                path.unlink()
                sync_folder(path.parent)

    discard = give_name


@contextmanager
def together() -> Iterator[list[NewFile | Removal]]:
    """What `atomic_write` and `remove` do inside is done when the block ends, in the same order, or
    not at all if there is an error: by then, all new files are complete on the disk.

    Yields what is to be done so far. A block inside another is a part of it. Each file once.
    """
    if _current.changes is not None:
        yield _current.changes
        return
    changes = _current.changes = []
    try:
        yield changes
        for change in changes:
            change.give_name()
        for change in changes:
            change.take_place()
    finally:
        _current.changes = None
        for change in changes:
            change.discard()


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
    new = NewFile(path)
    try:
        yield new.file
        new.write_through()
    except BaseException:
        new.discard()
        raise
    with together() as changes:
        changes.append(new)


def remove(*paths: Path) -> None:
    """Deletes files, in this order, where they exist."""
    with together() as changes:
        changes.append(Removal(*paths))


def lock(path: Path) -> BinaryIO:
    """A file, made if need be, that this process alone has as long as it is open: the system closes
    it after a kill. It stays where it is.

    Raises BlockingIOError if another process has it. A file system without locks gives it to all.
    """
    file = open(path, "ab")  # noqa: SIM115  its caller closes it
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise BlockingIOError(f"{path} belongs to another process") from None
    except OSError:  # no locks here
        pass
    return file


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
        return open(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    except OSError:
        return None


def _give_name(number: int, path: Path) -> None:
    """As open(2) says under O_TMPFILE. Python follows the link only where a folder is given."""
    os.link(f"/proc/self/fd/{number}", path, src_dir_fd=number, follow_symlinks=True)
