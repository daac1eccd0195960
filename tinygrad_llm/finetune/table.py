"""Labelled texts: read from a file, balanced, and split into parts to learn, choose and test with.

The random choices are pandas' `sample(random_state=seed)`: the same seed gives the same rows, in
the same order.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import ArrayLike

from ..data.corpus import text_files

DELIMITERS = {".tsv": "\t", ".csv": ","}
TEXT, LABEL = "text", "label"  # what columns are called where nothing else is said
END = "\0"  # a last line that no file has


@dataclass(frozen=True, eq=False)
class Table:
    """N texts, each of one class.

    texts       N strings
    labels      (N,) int64, the place of each text's class in `classes`
    classes     the names of at least two classes
    places      where each text comes from, for error messages: "spam.tsv, line 7"
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    places: tuple[str, ...]

    @classmethod
    def of(
        cls, texts: Sequence[str], labels: Sequence[str], classes: Sequence[str] | None = None
    ) -> "Table":
        """From two lists; classes and errors are as in `read_table`."""
        if len(texts) != len(labels):
            raise ValueError(f"{len(texts)} texts have {len(labels)} labels: expected one for each")
        rows = [(f"row {i}", *row) for i, row in enumerate(zip(texts, labels), start=1)]
        return _table("the table", rows, classes)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: ArrayLike) -> "Table":
        """The table of these rows, in their order; it has the same classes."""
        rows = np.asarray(rows, np.int64)
        texts, places = (
            tuple(many[i] for i in rows.tolist()) for many in (self.texts, self.places)
        )
        return replace(self, texts=texts, labels=self.labels[rows], places=places)

    def counts(self) -> dict[str, int]:
        """How many texts each class has."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist()))


# --- reading --------------------------------------------------------------------------------------


def read_table(
    path: str | os.PathLike,
    text: str | int | None = None,
    label: str | int | None = None,
    header: bool | None = None,
    classes: Sequence[str] | None = None,
    quotes: bool = True,
    encoding: str = "utf-8",
) -> Table:
    """Reads labelled texts from a .tsv, .csv or .jsonl file (one JSON object in each line).

    text, label  the columns: names, or positions from 0; in .jsonl the names of values. By default
                 the columns named "text" and "label", in any case; without them, two columns are
                 the label and the text
    header       whether the first row has the columns' names; None: if names are given, or are the
                 default ones
    classes      all names that labels may have, in the order of their numbers, such as those of a
                 model; None: those in the file, sorted, whole numbers by their value
    quotes       whether "..." is one field, in which lines may end, and "" is a quote
    Empty lines are skipped, and white space around labels.

    Raises FileNotFoundError, and ValueError, which names file and line, for: bytes that are not in
    this encoding, rows of another length than the first, a quote that is never closed, no object,
    an empty text or label, a field longer than csv.field_size_limit(), a label that is none of the
    classes; a file without rows or, unless
    classes are given, of one class only; columns that are not there.
    """
    (path,) = text_files(path)
    if path.suffix.lower() == ".jsonl":
        if isinstance(text, int) or isinstance(label, int) or header:
            raise ValueError(f"{path}: values of .jsonl have names: no positions, no header")
        rows = _json_rows(path, _read(path, encoding), text or TEXT, label or LABEL)
        return _table(path, rows, classes)
    if path.suffix.lower() not in DELIMITERS:
        raise ValueError(f"{path}: expected a file .tsv, .csv or .jsonl")
    delimiter = DELIMITERS[path.suffix.lower()]
    rows = list(_delimited_rows(path, _read(path, encoding), delimiter, quotes))
    if not rows:
        raise ValueError(f"{path} has no rows")
    has_header = _has_header(rows[0][1], text, label, header)
    columns = _columns(rows[0], text, label, has_header)
    rows = [(place, *(fields[column] for column in columns)) for place, fields in rows]
    table = _table(path, rows[1:] if has_header else rows, classes)
    alone = np.count_nonzero(table.labels == table.labels[0]) == 1
    if header is None and not has_header and classes is None and alone:
        place, _, name = rows[0]
        raise ValueError(
            f"{place}: no other row has the label {name!r:.60}: say which column is the label, and "
            "if this row is a header or not"
        )
    return table


def _read(path, encoding):
    data = path.read_bytes()
    try:
        text = data.decode(encoding)
    except LookupError:
        raise ValueError(f"there is no encoding {encoding!r}: utf-8, utf-16, latin-1 ...") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: these bytes are not {encoding}: give the file's encoding, such "
            "as latin-1 or utf-16, or convert it"
        ) from None
    if END in text:
        line = text.count("\n", 0, text.index(END)) + 1
        raise ValueError(f"{path}, line {line}: a zero byte, which no text has: is it utf-16?")
    return text.removeprefix("\ufeff")


def _delimited_rows(path, text, delimiter, quotes):
    """(place, fields) of each row that is not empty; all rows have as many fields."""
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    lines = chain(io.StringIO(text, newline=""), [END])
    reader, width = csv.reader(lines, delimiter=delimiter, quoting=quoting), None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except csv.Error:
            raise ValueError(
                f"{place}: a field has more than {csv.field_size_limit():,} characters: is a quote "
                "opened that is never closed? Then switch quotes off; or cut the text"
            ) from None
        if fields == [END]:
            return
        if fields and fields[-1].endswith(END):
            raise ValueError(
                f"{place}: a quote is opened that is never closed; or switch quotes off"
            )
        if fields and width is None:
            width, first = len(fields), place
        if fields and len(fields) != width:
            raise ValueError(
                f"{place}: the number of fields is {len(fields)}, and in {first} it is {width}: "
                "write a field that has the delimiter in it in quotes"
            )
        if fields:
            yield place, fields


def _json_rows(path, content, *names):
    """(place, text, label) of each line that is not empty."""
    for number, line in enumerate(content.split("\n"), start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no valid JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place} is a JSON {type(row).__name__}: expected an object")
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"{place} has no {missing[0]!r}: it has {', '.join(row) or 'nothing'}")
        text, label = (row[name] for name in names)
        yield place, text, str(label) if type(label) is int else label


def _has_header(fields, text, label, header):
    named = [isinstance(column, str) for column in (text, label)]
    if header is False and any(named):
        raise ValueError("columns have names only in a header: give their positions, from 0 on")
    if header is not None:
        return header
    default = text is label is None
    return any(named) or (default and {TEXT, LABEL} <= {field.strip().lower() for field in fields})


def _columns(first, text, label, has_header):
    """The positions of texts and labels."""
    place, fields = first
    if text is label is None and not has_header and len(fields) != 2:
        raise ValueError(
            f"{place}: the number of fields is {len(fields)}: expected a label and a text, or a "
            f"header with {TEXT} and {LABEL}; or say which columns to take"
        )
    if has_header:
        wanted = TEXT if text is None else text, LABEL if label is None else label
    else:
        wanted = 1 if text is None else text, 0 if label is None else label
    found = [_column(place, fields, column) for column in wanted]
    if found[0] == found[1]:
        raise ValueError(f"{place}: text and label are both column {found[0]}: give two columns")
    return found


def _column(place, fields, wanted):
    if isinstance(wanted, int):
        if not 0 <= wanted < len(fields):
            raise ValueError(
                f"{place}: there is no column {wanted}: expected 0 to {len(fields) - 1}"
            )
        return wanted
    names = [field.strip() for field in fields]
    for same_case in (str, str.lower):  # in any case, if need be
        found = [same_case(name) for name in names]
        if found.count(same_case(wanted)) == 1:
            return found.index(same_case(wanted))
    raise ValueError(f"{place}: not one column is named {wanted!r}: there are {', '.join(fields)}")


def _table(source, rows: Iterable[tuple[str, str, str]], classes) -> Table:
    """The table of (place, text, label)."""
    places, texts, labels = [], [], []
    for place, text, label in rows:
        for what, value in ((TEXT, text), (LABEL, label)):
            if not isinstance(value, str):
                kind = type(value).__name__
                raise ValueError(f"{place}: the {what} is of type {kind}: expected a string")
            if not value.strip():
                raise ValueError(f"{place}: the {what} is empty")
        places.append(place)
        texts.append(text)
        labels.append(label.strip())
    if not texts:
        raise ValueError(f"{source} has no rows")
    if classes is None:
        classes = _sorted(set(labels))
        if len(classes) == 1:
            raise ValueError(
                f"{source}: all labels are {classes[0]!r}: expected two classes or more"
            )
    numbers = {name: number for number, name in enumerate(check_classes(classes))}
    for place, label in zip(places, labels):
        if label not in numbers:
            raise ValueError(f"{place}: unknown label {label!r}: expected {', '.join(numbers)}")
    labels = np.array([numbers[label] for label in labels], np.int64)
    return Table(tuple(texts), labels, tuple(numbers), tuple(places))


def _sorted(names):
    try:
        return sorted(names, key=lambda name: (int(name), name))
    except ValueError:
        return sorted(names)


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The names of classes. Raises ValueError unless they are two different strings or more."""
    names = (classes,) if isinstance(classes, str) else tuple(classes)
    if (
        len(set(names)) != len(names)
        or len(names) < 2
        or not all(isinstance(n, str) for n in names)
    ):
        raise ValueError(f"classes are two different names or more, not {names}")
    return names


# --- choosing rows --------------------------------------------------------------------------------


def undersample(table: Table, seed: int = 123) -> Table:
    """As many texts of each class as the smallest one has: all of that, of the others a sample.

    The classes come one after the other. Raises ValueError for a class without texts.
    """
    counts = table.counts()
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"class {name!r} has no texts: leave it out, or give some")
    least, chosen = min(counts.values()), []
    for number, count in enumerate(counts.values()):
        rows = np.flatnonzero(table.labels == number)
        chosen.append(rows if count == least else rows[_sample(count, least, seed)])
    return table.take(np.concatenate(chosen))


def split(
    table: Table, train: float = 0.7, validation: float = 0.1, seed: int = 123
) -> tuple[Table, Table, Table]:
    """The rows in random order, cut in three: to learn from, to choose with (when to stop, which
    settings), and the rest, to test once what was chosen.

    train and validation are shares of all rows, rounded down. Raises ValueError for shares that
    leave a part without rows.
    """
    if not (train > 0 and validation > 0 and train + validation < 1):
        raise ValueError(
            f"train {train} and validation {validation}: expected shares above 0, and a sum below "
            "1 that leaves some rows to test with"
        )
    order, end = _sample(len(table), len(table), seed), int(train * len(table))
    parts = np.split(order, [end, end + int(validation * len(table))])
    if not all(len(part) for part in parts):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ValueError(f"{len(table)} rows make parts of {sizes}: give more rows or other shares")
    return tuple(table.take(part) for part in parts)


def _sample(n, size, seed):
    """`size` of 0..n-1 in random order, as pandas draws them."""
    return np.random.RandomState(seed).choice(n, size, replace=False)
