"""Tensors in safetensors files, the one format that this library reads and writes.

Such a file is eight bytes with the length of the header, the header in JSON (each tensor's dtype,
shape and place), and the numbers. The safetensors library judges whether a file is whole. Numbers
are mapped and written a piece at a time: a tensor that is read need not be in memory twice.
"""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
WEIGHT_DTYPES = {
    name: DTYPES[name] for name in ("F32", "F16", "BF16", "F64")
}  # what weights can be
PIECE = 2**24  # bytes of a tensor that are mapped at a time: mapped pages count as memory
BLOCK = 16  # rows that are transposed at a time: as float32, what they write are whole cache lines


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. Its rows are mapped from there when asked for: stored[3:5]"""

    path: Path
    kind: str  # its dtype, as the header calls it: "F32", "I64", ...
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    @property
    def dtype(self) -> np.dtype:
        """Raises KeyError for a kind that NumPy does not have, such as float8."""
        return DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        row = self.shape[1:]
        start, stop, _ = rows.indices(self.shape[0])
        offset = self.start + start * math.prod(row) * self.dtype.itemsize
        mapped = np.memmap(self.path, self.dtype, "r", offset, (stop - start, *row))
        return mapped.view(np.ndarray)  # whose slices cost less


# --- reading --------------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors that a safetensors file holds, none of them read, and the file's metadata.

    Raises ValueError if it is damaged, OSError if it cannot be read.
    """
    try:
        with safe_open(path, framework="np"):  # checks the header, and that the file is as long
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({line(error)}): cut short?"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        start, _ = entry["data_offsets"]
        tensors[name] = StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + length + start
        )
    return tensors, metadata


def copy_tensor(out: np.ndarray, tensor: StoredTensor, transposed: bool = False) -> None:
    """Fills an array, in its dtype, with a stored tensor or with a stored matrix's transpose."""
    for rows in pieces(tensor):
        part = tensor[rows]
        if not transposed:
            out[rows] = part
            continue
        for i in range(0, len(part), BLOCK):
            block = part[i : i + BLOCK].astype(out.dtype, copy=False)  # (n, columns)
            out[:, rows.start + i : rows.start + i + len(block)] = block.T


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

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def line(error: Exception) -> str:
    """An error's text in one line of a bearable length."""
    text = " ".join(str(error).split())
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
