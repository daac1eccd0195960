"""The corpora that the chapters use, by name: downloaded once, each checked by its hash."""

import hashlib
import logging
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tinygrad_llm.data.files import atomic_write

FOLDER = "TINYGRAD_LLM_DATA"  # an environment variable: a folder that is looked in first
BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main"


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from: a file, or the file `member` of a zip archive."""

    about: str
    file: str
    sha256: str
    url: str
    member: str | None = None


SOURCES = {
    "the-verdict": Source(
        about="a short story by Edith Wharton, 1908 (public domain)",
        file="the-verdict.txt",
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        url=f"{BOOK}/ch02/01_main-chapter-code/the-verdict.txt",
    ),
    "tiny-shakespeare": Source(
        about="1.1 MB of Shakespeare's plays (public domain)",
        file="tinyshakespeare.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        "input.txt",
    ),
    "sms-spam": Source(
        about="5,574 text messages, spam or ham (Almeida, Gómez Hidalgo, Yamakami, 2011)",
        file="sms-spam-collection.tsv",
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        member="SMSSpamCollection",
    ),
    "instruction-data": Source(
        about="1,100 instructions with answers (Sebastian Raschka, Apache 2.0)",
        file="instruction-data.json",
        sha256="7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        url=f"{BOOK}/ch07/01_main-chapter-code/instruction-data.json",
    ),
}


def corpus_path(name: str) -> Path:
    """The file of a named corpus: the-verdict, tiny-shakespeare, sms-spam or instruction-data.

    Looked for in the folder that the environment variable TINYGRAD_LLM_DATA names, then in the
    user's cache; downloaded into the cache if it is in neither.

    Raises ValueError for an unknown name, if TINYGRAD_LLM_DATA names no folder, and for a file or
    download with another hash, which is not used, or kept; ConnectionError if it cannot be
    downloaded.
    """
    if name not in SOURCES:
        raise ValueError(f"there is no corpus {name!r}: expected one of {', '.join(SOURCES)}")
    path = find_corpus(name) or _cache() / SOURCES[name].file
    return checked(path, SOURCES[name]) if path.exists() else _downloaded(name, path)


def find_corpus(name: str) -> Path | None:
    """Where the corpus already lies on this machine, unchecked; None if it must be downloaded.

    Raises ValueError if TINYGRAD_LLM_DATA names no folder.
    """
    folder = os.environ.get(FOLDER)
    if folder and not Path(folder).is_dir():
        raise ValueError(f"{FOLDER} names no folder: {folder!r}; make it, correct or unset it")
    folders = [Path(folder)] if folder else []
    paths = [folder / SOURCES[name].file for folder in [*folders, _cache()]]
    return next((path for path in paths if path.exists()), None)


def _cache() -> Path:
    import pooch  # slow to import, as what it imports is

    return pooch.os_cache("tinygrad_llm")


def checked(path: Path, source: Source) -> Path:
    """The path itself. Raises ValueError if the file has another hash, OSError if it is none."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{path} is not the file expected: its SHA-256 is {found}, not {source.sha256}; "
            f"delete or replace it, its source is {source.url}"
        )
    return path


def _downloaded(name: str, path: Path) -> Path:
    """Downloads the corpus to `path`, where nothing appears before its hash is right."""
    source = SOURCES[name]
    try:
        with TemporaryDirectory() as folder:
            content, wrong = _content(_fetched(source.url, Path(folder)), source)
    except OSError as error:  # what `requests` raises, too
        said = str(error).partition(" for url")[0]
        reason = said if 0 < len(said) < 60 else type(error).__name__  # not a page of nested errors
        raise ConnectionError(
            f"{name} cannot be downloaded from {source.url} ({reason}): check the network, or put "
            f"{source.file} into {path.parent} or a folder that {FOLDER} names"
        ) from None
    if wrong:
        raise ValueError(
            f"the download of {name} from {source.url} was not kept: {wrong}; try again later, or "
            f"put the right file at {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
    return path


def _fetched(url: str, folder: Path) -> Path:
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)  # what it is doing is ours to say
    return Path(pooch.retrieve(url, known_hash=None, fname="download", path=folder))


def _content(path: Path, source: Source) -> tuple[bytes, str]:
    """The corpus in what was downloaded, and what is wrong with it, if anything."""
    if source.member is None:
        content = path.read_bytes()
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(source.member)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            return b"", "it is no zip archive, or a damaged one"
        except KeyError:
            return b"", f"it is a zip archive without {source.member}"
    found = hashlib.sha256(content).hexdigest()
    right = found == source.sha256
    return content, "" if right else f"its SHA-256 is {found}, not {source.sha256}"
