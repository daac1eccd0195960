"""Results for people (Rich tables, Markdown) and for programs (JSON)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from . import machine as machines

RESULTS = Path(__file__).with_name("results")


@dataclass
class Table:
    """Rows of text under a title; the first column is what the row is about."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"

    def show(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


@dataclass
class Result:
    """What a command found.

    command     its name
    settings    what it was asked for
    data        all numbers, as JSON can hold them; times in seconds
    tables      the same for reading
    notes       sentences below the tables
    width       characters of a line, where the output is no terminal
    """

    command: str
    settings: dict
    data: dict
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    width: int = 120

    def show(self, machine: dict) -> None:
        console = Console(width=None if Console().is_terminal else self.width)
        console.print(machines.sentence(machine), style="dim", highlight=False)
        for table in self.tables:
            table.show(console)
        for note in self.notes:
            console.print(note, highlight=False)

    def save(self, folder: Path, machine: dict) -> list[Path]:
        """Writes COMMAND-CPU-N-threads.json and .md (COMMAND-GPU.json and .md) into a folder;
        returns their paths.
        """
        content = {
            "command": self.command,
            "machine": machine,
            "settings": self.settings,
            "results": self.data,
        }
        files = {".json": json.dumps(content, indent=1) + "\n", ".md": self._markdown(machine)}
        paths = [self.path(folder, machine, ending) for ending in files]
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths

    def path(self, folder: Path, machine: dict, ending: str) -> Path:
        """The file of that kind; its folder is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        threads = "" if machine.get("gpu") else f"-{machine['threads']}-threads"
        command = self.command.replace(" --", "-")
        return folder / f"{command}-{machines.slug(machine)}{threads}{ending}"

    def _markdown(self, machine):
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [
            f"## python -m benchmarks {self.command}\n",
            f"{machines.sentence(machine)}. Settings: {settings}.\n",
            *(table.markdown() for table in self.tables),
            *(note + "\n" for note in self.notes),
        ]
        return "\n".join(parts)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if abs(seconds) < limit:
            return (
                f"{seconds * factor:.3g} {unit}"
                if abs(seconds * factor) < 100
                else (f"{seconds * factor:.0f} {unit}")
            )
    return f"{seconds:.3g} s"
