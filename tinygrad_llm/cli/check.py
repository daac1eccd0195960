"""`tinygrad-llm check`: every op by every law, or how many planted bugs the laws find."""

import difflib
import os
import runpy
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Annotated

import typer
from rich.cells import set_cell_size
from rich.text import Text

from ..backend import TABLE
from .errors import UserError
from .screen import Screen, interruptible

PIPED_WIDTH = 160  # columns: enough for all the laws side by side
BROKEN, SURVIVED, DOES_NOT_APPLY = "FAIL", "SURVIVED", "·"
STYLES = {BROKEN: "bold red", SURVIVED: "bold red", DOES_NOT_APPLY: "dim", "0": "dim"}


def check(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OP|FILE.py", help="Ops, or files with ops of your own. Without: every op."
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Arguments to draw for each law.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other arguments.")] = 0,
    mutants: Annotated[
        bool,
        typer.Option("--mutants", help="Plant bugs, in the engine, too: do the laws find each?"),
    ] = False,
) -> int:
    """Check that backward is the derivative of forward, and all else that an op must obey.

    Exit code 1 if an op breaks a law, or if a planted bug is not found.
    """
    names = _chosen(what or [], ["engine"] if mutants else [])
    with _no_notes_here():
        if mutants:
            return _score_mutants(names if what else None, examples, seed, Screen(quiet=False))
        return _check_laws(names, examples, seed, Screen(quiet=False))


@contextmanager
def _no_notes_here() -> Iterator[None]:
    """Inside, Hypothesis leaves no folder .hypothesis in the current directory."""
    from hypothesis.configuration import set_hypothesis_home_dir  # slow to import: only here

    with tempfile.TemporaryDirectory() as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


# --- which ops ------------------------------------------------------------------------------------


def _chosen(arguments: list[str], besides: list[str]) -> list[str]:
    """The names of the ops that the user means; `besides` are names that are no op's."""
    own = {a: _registered_by(Path(a)) for a in dict.fromkeys(arguments) if a.endswith(".py")}
    names = [name for a in arguments for name in own.get(a) or [_known(a, besides)]]
    return list(dict.fromkeys(names)) or list(TABLE)


def _known(name: str, besides: list[str]) -> str:
    if name in TABLE or name in besides:
        return name
    close = difflib.get_close_matches(name, TABLE)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the ops are {', '.join(TABLE)}"
    raise UserError(f"there is no op {name!r}: {hint}")


def _registered_by(path: Path) -> list[str]:
    """Runs a file of the user's; the names of the ops that it registers."""
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}: check the path")
    before = set(TABLE)
    sys.path.insert(0, str(path.parent.absolute()))  # it may import its neighbours
    try:
        runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(_located(error, str(path))) from error
    names = [name for name in TABLE if name not in before]
    if not names:
        raise UserError(f"{path} registers no op: write @op before a class in it")
    return names


def _located(error: BaseException, path: str) -> str:
    """FILE line N: what is wrong there."""
    steps = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in steps if frame.f_code.co_filename == path]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, message = [error.lineno], error.msg
    place = f"{path} line {lines[-1]}" if lines else path
    return f"{place}: {type(error).__name__}: {message}"


# --- the laws -------------------------------------------------------------------------------------


def _check_laws(names: list[str], examples: int, seed: int, screen: Screen) -> int:
    """Tries every law that applies, prints the table, and returns the exit code."""
    from ..check import LAWS, laws

    trials = [t for name in names for t in laws(TABLE[name], examples=examples, seed=seed)]
    rows = {}
    for trial in trials:
        rows.setdefault(trial.op.name + " kernel" * trial.on_kernel, []).append(trial)
    shown = [law for law in LAWS if any(trial.law is law for trial in trials)]
    table = Table(screen, list(rows), [law.name for law in shown])
    start, done, failures = time.monotonic(), 0, []
    with interruptible() as go_on, screen.progress("checking") as show:
        for name, tried in rows.items():
            show(done, len(trials), f"{done}/{len(trials)}  {name}")
            cells, broken = _results(tried, go_on)
            table.add(name, cells)
            failures += broken
            done += len(tried)
        show(done, done)
    table.finish()
    screen.say(f"\nworst relative errors; 0: exact; {DOES_NOT_APPLY}: does not apply\n")
    _print_legend(screen, {law.name: law for law in shown})
    if failures:
        screen.console.print("\n" + "\n".join(failures), style="red")
    counts = ", ".join([_count(names, "op"), _count(shown, "law"), _count(trials, "trial")])
    verdict = f"{len(failures)} broken" if failures else "all hold"
    screen.say(f"\n{counts}, {verdict}: {time.monotonic() - start:.1f} s")
    return 1 if failures else 0


def _results(trials: list, go_on: Callable) -> tuple[dict[str, str], list[str]]:
    """(column -> cell, what is said about the laws that are broken) for the trials of one row."""
    from ..check import LawError

    cells, broken = {}, []
    start = time.monotonic()
    for trial in trials:
        try:
            cells[trial.law.name] = f"{trial():.0g}".replace("e-0", "e-")
        except LawError as error:
            cells[trial.law.name] = BROKEN
            broken.append(" ".join(str(error).split()))
        go_on()
    cells["time"] = f"{time.monotonic() - start:.1f}s"
    return cells, broken


class Table:
    """Ops by laws. Rows are printed as they come. What is too wide for the screen comes in blocks
    of columns; all blocks after the first have to wait for the last row.
    """

    def __init__(self, screen: Screen, names: list[str], laws: list[str]):
        self.screen, self.rows = screen, []
        width = _width(screen)
        self.name_width = min(max(map(len, names)), width // 4)
        self.widths = {column: 1 + max(len(column), 5) for column in ["time", *laws]}
        self.blocks, left = [], 0
        for column, wide in self.widths.items():
            if not self.blocks or wide > left:
                self.blocks.append([])
                left = width - self.name_width
            self.blocks[-1].append(column)
            left -= wide
        self._print_head(self.blocks[0])

    def add(self, name: str, cells: dict[str, str]) -> None:
        self.rows.append((name, cells))
        self._print_row(name, cells, self.blocks[0])

    def finish(self) -> None:
        for block in self.blocks[1:]:
            self.screen.say("")
            self._print_head(block)
            for name, cells in self.rows:
                self._print_row(name, cells, block)

    def _print_head(self, block: list[str]) -> None:
        line = "".join(f"{column:>{self.widths[column]}}" for column in block)
        self.screen.console.print(" " * self.name_width + line, style="bold")

    def _print_row(self, name: str, cells: dict[str, str], block: list[str]) -> None:
        gap = "\n" + " " * self.name_width if len(name) > self.name_width else ""
        line = Text(f"{name:<{self.name_width}}{gap}")  # a long name has a line of its own
        for column in block:
            cell = cells.get(column, DOES_NOT_APPLY)
            line.append(f"{cell:>{self.widths[column]}}", STYLES.get(cell))
        self.screen.console.print(line)


# --- planted bugs ---------------------------------------------------------------------------------


def _score_mutants(names: list[str] | None, examples: int, seed: int, screen: Screen) -> int:
    """Plants one bug after the other, prints which law finds it, and returns the exit code."""
    from ..check import LAWS
    from ..check.mutants import mutants, verdict

    planted = mutants(names)
    if not planted:
        raise UserError(f"no bugs are planted in {', '.join(names)}: leave --mutants out")
    rows = _bug_rows(planted, one_by_one=names is not None)
    print_row = _bug_printer(screen, rows)
    start, done, kills, survivors = time.monotonic(), 0, Counter(), []
    with interruptible() as go_on, screen.progress("planting") as show:
        for where, name, bugs in rows:
            show(done, len(planted), f"{done}/{len(planted)}  {where}")
            found = [verdict(mutant, examples=examples, seed=seed).law for mutant in bugs]
            go_on()
            print_row(where, name, SURVIVED if None in found else ", ".join(dict.fromkeys(found)))
            kills.update(found)
            survivors += [mutant for mutant, law in zip(bugs, found) if law is None]
            done += len(bugs)
        show(done, done)
    screen.say("\nbugs killed by each law\n")
    killers = [law for law in LAWS if kills[law.name]]
    _print_legend(screen, {f"{kills[law.name]:3} {law.name}": law for law in killers})
    if survivors:
        lines = [f"{SURVIVED}: {mutant.where}: {mutant.name}" for mutant in survivors]
        screen.console.print("\n" + "\n".join(lines), style=STYLES[SURVIVED])
    killed = f"{len(planted) - len(survivors)} of {_count(planted, 'planted bug')} killed"
    screen.say(f"\n{killed}: {time.monotonic() - start:.1f} s")
    return 1 if survivors else 0


def _bug_rows(planted: list, one_by_one: bool) -> list[tuple[str, str, list]]:
    """[(where, what is wrong, bugs)]. The mistakes that are made in each and every op are hundreds:
    unless all are to be seen one by one, those of an op share a row.
    """
    from ..check.mutants import Generic

    rows = []
    for _, group in groupby(
        planted, lambda m: m if one_by_one or not isinstance(m, Generic) else m.where
    ):
        first, *more = bugs = list(group)
        name = f"{len(bugs)} mistakes that any op can have" if more else first.name
        rows.append((first.where, name, bugs))
    return rows


def _bug_printer(screen: Screen, rows: list) -> Callable[[str, str, str], None]:
    """Prints the head of the table of bugs; gives a function that prints a row."""
    longest_where, longest_name = (max(len(row[i]) for row in rows) for i in (0, 1))
    left = _width(screen) - longest_where - len("    ")
    law_width = max(left - longest_name, len("magnitudes"))
    name_width = min(longest_name, max(left - law_width, 20))

    def print_row(where: str, name: str, law: str) -> None:
        parts = [where], textwrap.wrap(name, name_width), textwrap.wrap(law, law_width)
        for w, n, k in zip_longest(*parts, fillvalue=""):
            line = f"{w:<{longest_where}}  {set_cell_size(n, name_width)}  {k}"
            screen.console.print(line.rstrip(), style=STYLES.get(law))

    print_row("where", "what is wrong", "killed by")
    return print_row


# --- on the screen --------------------------------------------------------------------------------


def _width(screen: Screen) -> int:
    told = screen.live or "COLUMNS" in os.environ
    return screen.console.width if told else PIPED_WIDTH


def _print_legend(screen: Screen, laws: dict) -> None:
    """What each law says: one line, or more where the screen is narrow."""
    indent = " " * (max(map(len, laws), default=0) + 2)
    width = max(_width(screen), 2 * len(indent))
    for head, law in laws.items():
        head = f"{head:<{len(indent)}}"
        statement = law.statement.splitlines()[0]
        screen.say(textwrap.fill(statement, width, initial_indent=head, subsequent_indent=indent))


def _count(things: list, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"
