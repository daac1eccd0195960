"""Tensors in safetensors files, the one format that this library reads and writes.

Such a file is eight bytes with the length of the header, the header in JSON (each tensor's dtype,
shape and place), and the numbers. The safetensors library judges whether a file is whole. Numbers
are read and written a piece at a time: a tensor need not be in memory twice.
"""

import io
import json
import math
import os
import reprlib
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {  # by the names that headers have for them
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool,
}  # fmt: skip
DTYPES = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT_DTYPES = {name: DTYPES[name] for name in ("F32", "F16", "BF16", "F64")}
PIECE = 2**20  # bytes of a tensor that are read at a time: they stay in the processor's cache
BLOCK = 16  # rows that are transposed at a time: as float32, what they write are whole cache lines

Found = TypeVar("Found")


class OpenFile(io.FileIO):
    """A file that stays the same one when another takes its name. Closes itself when let go.

    Raises ValueError for what is no regular file: opening a pipe would wait for who writes to it.
    """

    def __init__(self, path: Path):
        if not stat.S_ISREG(os.stat(str(path)).st_mode):
            raise ValueError(f"{path} is no regular file: expected one, or a link to one")
        super().__init__(str(path))
        self._lock = threading.Lock()

    def __del__(self):
        self.close()

    def fill(self, out: np.ndarray, start: int) -> None:
        """Reads bytes from `start` on into a contiguous array. Raises ValueError if it ends."""
        rest = memoryview(out.reshape(-1).view(np.uint8))
        with self._lock:
            self.seek(start)
            while rest:  # systems read some 2 GB at most
                n = self.readinto(rest)
                if n == 0:
                    raise ValueError(f"{self.name} was cut short while it was read: read it again")
                rest = rest[n:]

    def has_its_name(self) -> bool:
        """Whether its path still leads to it, and not to a newer file or to none."""
        try:
            return os.path.samestat(os.fstat(self.fileno()), os.stat(self.name))
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Its rows are read from there when asked for: stored[3:5]"""

    file: OpenFile
    name: str  # as the header has it
    kind: str  # its dtype, as the header calls it: "F32", "I64", ...
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    @property
    def path(self) -> Path:
        return Path(self.file.name)

    @property
    def dtype(self) -> np.dtype:
        """Raises KeyError for a kind that NumPy does not have, such as float8."""
        return DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        part = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.fill(part, start)
        return part

    def fill(self, out: np.ndarray, row: int) -> None:
        """Reads rows from this one on into a contiguous array of its dtype."""
        self.file.fill(out, self.start + row * math.prod(self.shape[1:]) * self.dtype.itemsize)


# --- reading --------------------------------------------------------------------------------------


def while_unreplaced(path: Path, read: Callable[[OpenFile], Found]) -> Found:
    """read(the open file), again if the path leads to another one by then: whatever else was read
    by name may be of either time.
    """
    while True:
        file = OpenFile(path)
        try:
            found = read(file)
        except (OSError, ValueError):
            if file.has_its_name():
                raise
        else:
            if file.has_its_name():
                return found


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors that a safetensors file holds, none of them read, and the file's metadata.

    They are of one file, even if another takes its name. Raises ValueError if it is damaged,
    OSError if it cannot be read.
    """
    return while_unreplaced(path, _read_header)


def _read_header(file):
    try:
        with safe_open(file.name, framework="np"):  # checks the header and the file's length
            pass
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=_once)
    except (SafetensorError, ValueError) as error:
        file.seek(0)
        if file.read(4) in PICKLE_STARTS:
            raise ValueError(
                f"{file.name} {PICKLE}: rename it to pytorch_model.bin, {CONVERT}"
            ) from None
        raise ValueError(
            f"{file.name} is no whole safetensors file ({line(error)}): it is cut short or "
            "damaged, get it again"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        start, _ = entry["data_offsets"]
        tensors[name] = StoredTensor(
            file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + start
        )
    return tensors, metadata


def read_tensor(tensor: StoredTensor, dtype: np.dtype, transposed: bool = False) -> np.ndarray:
    """A stored tensor, or a stored matrix's transpose, as an array of this dtype."""
    with np.errstate(over="ignore"):  # what float16 cannot hold is inf, and found in the logits
        return _read(tensor, dtype, transposed)


def _read(tensor, dtype, transposed):
    out = np.empty(tensor.shape[::-1] if transposed else tensor.shape, dtype)
    for rows in pieces(tensor):
        if not transposed and dtype == tensor.dtype:
            tensor.fill(out[rows], rows.start)
        elif not transposed:
            out[rows] = tensor[rows]
        else:
            part = tensor[rows]
            for i in range(0, len(part), BLOCK):
                block = part[i : i + BLOCK].astype(dtype, copy=False)  # (n, columns)
                out[:, rows.start + i : rows.start + i + len(block)] = block.T
    return out


def pieces(tensor: StoredTensor | np.ndarray) -> Iterator[slice]:
    """Its rows, in slices of about PIECE bytes."""
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, PIECE // max(1, row))
    for start in range(0, tensor.shape[0], step):
        yield slice(start, min(start + step, tensor.shape[0]))


# --- writing --------------------------------------------------------------------------------------


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, StoredTensor | np.ndarray],
    dtype: np.dtype,
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file, all tensors in one dtype.

    The library's own writer wants every tensor in memory as the file will have it; this one casts
    and transposes a piece at a time. Raises ValueError for numbers too large for the dtype.
    """
    header = make_header({name: (dtype, t.shape) for name, t in tensors.items()}, metadata)
    file.write(len(header).to_bytes(8, "little") + header)
    for name, tensor in tensors.items():
        for rows in pieces(tensor):
            file.write(_cast(name, tensor[rows], dtype).view(np.uint8))


def make_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """What stands before the numbers: where each tensor, of this dtype and shape, begins and ends.

    The numbers stand in the same order. Spaces at the end align them to eight bytes.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        place = {"shape": list(shape), "data_offsets": [start, end]}
        header[name] = {"dtype": DTYPE_NAMES[dtype], **place}
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def _cast(name, part, dtype):
    """The piece in this dtype, contiguous."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(part, dtype)
    if part.dtype != dtype and (np.isinf(cast) & np.isfinite(part)).any():
        raise ValueError(
            f"{name} has numbers up to {np.abs(part).max():.3g}, too large for {dtype}: "
            "choose bfloat16 or float32"
        )
    return cast


# --- what errors say ------------------------------------------------------------------------------

PICKLE = "is a pickle, which can run any code when opened"
PICKLE_STARTS = (b"PK\3\4", b"\x80\2\x8a\n")  # of what torch.save writes, and wrote before 1.6
CONVERT = "load the model with transformers and use save_pretrained to convert it"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def line(error: Exception) -> str:
    """An error's text in one line of a bearable length, without a file's control characters."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 600 else text[:600] + "..."


def shown(value: Any) -> str:
    """What a file holds in place of what was expected, whatever it is: in one short line."""
    return _short.repr(value)


def few(names: Iterable[str], most: int = 6) -> str:
    """Some names in one line."""
    names = list(names)
    some = [n if n.isprintable() and len(n) < 100 else shown(n) for n in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(some) + more


def _once(pairs):
    """A JSON object, of which no name may stand there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{few(name for name in found if counts[name] > 1)} is there twice")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError if it is damaged, or has a name twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # UTF-8, JSON, or nested without end
        raise ValueError(f"{path} is no valid JSON: {line(error)}") from None
