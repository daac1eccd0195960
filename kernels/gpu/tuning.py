"""Which tile sizes a kernel runs with.

A configuration is a dict of compile-time constants plus num_warps and num_stages, ready for
`launch(..., **configuration)`. Where it comes from, in this order:

1. `using(kernel=configuration)`, for tests and benchmarks;
2. a search: inside `searching()`, or with TINYGRAD_LLM_AUTOTUNE=1, each candidate is timed on the
   arguments at hand, and the fastest is kept on disk;
3. the table on disk: `TINYGRAD_LLM_TUNING`, or ~/.cache/tinygrad_llm/tuning/DEVICE.json;
4. the table that is shipped: tuned/DEVICE.json beside this file;
5. the kernel's default for the chip.

A table is JSON: {"device": ..., "triton": ...,
                  "kernels": {kernel: {key: {"config": {...}, "ms": t}}}}.
"""

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

import triton

from . import driver

SHIPPED = Path(__file__).parent / "tuned"
_forced = {}
_tables = {}
_searching = os.environ.get("TINYGRAD_LLM_AUTOTUNE") == "1"
_choices = None


@contextlib.contextmanager
def using(**configurations):
    """Inside, the named kernels run with these configurations, whatever the tables say."""
    before = _forced.copy()
    _forced.update(configurations)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def searching():
    """Inside, a kernel that meets a key without an entry times its candidates first."""
    global _searching
    before, _searching = _searching, True
    try:
        yield
    finally:
        _searching = before


@contextlib.contextmanager
def recording():
    """Gives a list that fills with (kernel, key, default, candidates) whenever one is chosen."""
    global _choices
    before, _choices = _choices, []
    try:
        yield _choices
    finally:
        _choices = before


def configuration(kernel, key, default, candidates=None, run=None):
    """The configuration for `kernel`, a name.

    key         a tuple of what the best choice depends on: dtypes, rounded shapes
    default     the configuration if nothing is known
    candidates  a function that lists what a search tries
    run         run(configuration) launches the kernel, for a search
    """
    if _choices is not None:
        _choices.append((kernel, key, default, candidates() if candidates else [default]))
    if kernel in _forced:
        return _forced[kernel]
    if driver.INTERPRETED or driver.compiles():
        return default
    entries = _table()["kernels"].setdefault(kernel, {})
    if not (entries or _searching):
        return default
    key = " ".join(map(str, key))
    known = key in entries and entries[key]["config"].keys() == default.keys()  # of this version
    if not known and _searching and candidates and run:
        entries[key] = _fastest(candidates(), run)
        _store(_table())
        known = True
    return entries[key]["config"] if known else default


def _fastest(candidates, run):
    """Each candidate in turns, several times. Left out are those that the GPU cannot hold, and
    those on which the compiler fails.
    """
    times, failed = {}, None
    for i, candidate in enumerate(candidates):
        try:
            run(candidate)  # compiles
            times[i] = []
        except Exception as error:  # Triton's compiler and assembler have several of their own
            failed = error
    if not times:
        reason = str(failed).partition("\n")[0]
        raise RuntimeError(f"none of the candidates runs on this GPU: {reason}") from failed
    for _ in range(7):
        for i, found in times.items():
            found.append(driver.milliseconds(lambda i=i: run(candidates[i])))
    medians = {i: sorted(found)[len(found) // 2] for i, found in times.items()}
    best = min(medians, key=medians.get)
    return {"config": candidates[best], "ms": round(medians[best], 5)}


def start_afresh():
    """Forgets the tables of the device at hand: a search then fills a new one."""
    _table()["kernels"].clear()


# --- tables ---------------------------------------------------------------------------------------


def path():
    """The file of the table on disk for the device at hand."""
    folder = os.environ.get("TINYGRAD_LLM_TUNING") or "~/.cache/tinygrad_llm/tuning"
    return Path(folder).expanduser() / f"{_device()}.json"


def _device():
    return _file_name(driver.device_name())


@functools.cache
def _file_name(device):
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _table():
    device = _device()
    if device not in _tables:
        table = {"device": driver.device_name(), "triton": triton.__version__, "kernels": {}}
        for file in (SHIPPED / f"{device}.json", path()):
            for kernel, entries in _read(file).items():
                table["kernels"].setdefault(kernel, {}).update(entries)
        _tables[device] = table
    return _tables[device]


def _read(file):
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["kernels"]
        sound = all(
            value is None or isinstance(value, int)
            for entries in found.values()
            for entry in entries.values()
            for value in entry["config"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{file} is not a table of configurations: delete it")
    return found


def _store(table):
    """Whole or not at all: the table that was there stays until the new one is complete. Where it
    cannot be written, what was found is used, with a warning, and found again next time.
    """
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(table, new, indent=1, sort_keys=True)
        os.replace(new.name, file)
    except OSError as error:
        warnings.warn(f"{file} cannot be written ({error}); set TINYGRAD_LLM_TUNING", stacklevel=2)
