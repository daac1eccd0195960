"""`tinygrad-llm judge`: another model says how good responses are, from 0 to 100."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..finetune.judge import RESPONSE, RUBRIC, Endpoint, Verdict, read_entries, summary
from ..finetune.judge import judge as judge_entries
from .errors import user_input, utf8_expected
from .screen import Screen

SHOWN = 5  # entries that failed


def judge(
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Entries as a JSON list, or in *.jsonl one a line."),
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="The judge, as its server knows it.")],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="An OpenAI-compatible API; without: Ollama's.")
    ] = "http://localhost:11434/v1",
    rubric: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text: what deserves which number.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of the scores; those that are there are kept."),
    ] = None,
    response_key: Annotated[
        str, typer.Option(metavar="KEY", help="Under which an entry has what is judged.")
    ] = RESPONSE,
    workers: Annotated[int, typer.Option(min=1, help="Entries judged at the same time.")] = 1,
    attempts: Annotated[
        int, typer.Option(min=1, help="Times that an entry is asked until a reply has a number.")
    ] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120,
    seed: Annotated[int, typer.Option(help="Of the judge's random numbers.")] = 123,
    key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The environment variable that holds the API key."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print errors and the file's path only.")
    ] = False,
) -> int:
    """Let another model score responses from 0 to 100, against reference answers.

    An entry has the texts instruction, input (or none), output and model_response. The same command
    again goes on with a stopped run, and asks once more about entries that failed. The exit code is
    1 if entries have no score in the end.
    """
    screen = Screen(quiet)
    with user_input():
        entries = read_entries(data, response_key)
        criteria = RUBRIC if rubric is None else _text(rubric)
        server = Endpoint(endpoint, model, _key(key_env), seed=seed, timeout=timeout)
        out = out or data.with_suffix(".scores.jsonl")
        screen.say(f"{model} at {server.url} judges {len(entries):,} entries: {out}")
        try:
            with screen.progress("judging") as show:
                verdicts = judge_entries(
                    entries,
                    server,
                    out,
                    rubric=criteria,
                    response_key=response_key,
                    attempts=attempts,
                    workers=workers,
                    progress=_Progress(screen, show, len(entries)),
                )
        except KeyboardInterrupt:
            kept = "what was scored is kept, and the same command goes on from there"
            print(f"stopped; {kept}: {out}", file=sys.stderr)
            return 130
    _show(screen, verdicts, entries, response_key)
    screen.result(out)
    return int(any(verdict.score is None for verdict in verdicts))


class _Progress:
    """Shows how far it is: a bar, or about ten lines where there is none."""

    def __init__(self, screen: Screen, show: Callable[..., None], total: int):
        self.screen, self.show, self.total = screen, show, total
        self.first, self.done, self.failed, self.sum = True, 0, 0, 0

    def __call__(self, verdicts: list[Verdict]) -> None:
        new = verdicts[self.done :]
        self.done += len(new)
        self.failed += sum(verdict.score is None for verdict in new)
        self.sum += sum(verdict.score or 0 for verdict in new)
        scored = self.done - self.failed
        mean = f"mean {self.sum / scored:.2f}  " if scored else ""
        text = f"{self.done:,}/{self.total:,}  {mean}{self.failed:,} failed"
        self.show(self.done, self.total, text)
        if self.first:
            self.first = False
            if new:
                self.screen.say(f"{self.done:,} of them have been judged before")
        elif self.done % max(1, self.total // 10) == 0 or self.done == self.total:
            self.screen.line(text)


def _show(screen: Screen, verdicts: list[Verdict], entries: list[dict], response_key: str) -> None:
    """Mean and median, the worst responses, and those without a score."""
    found = summary(verdicts)
    mean = f"  mean {found.mean:.2f}  median {found.median:g}" if found.scored else ""
    screen.say(f"\n{found.scored:,} scored{mean}  {found.failed:,} failed")
    if found.worst:
        table = Table(title="the lowest scores", title_justify="left")
        table.add_column("entry", justify="right")
        table.add_column("score", justify="right")
        for name in ("instruction", "expected", "response"):
            table.add_column(name)
        for verdict in found.worst:
            entry = entries[verdict.entry - 1]
            texts = (_short(entry[key]) for key in ("instruction", "output", response_key))
            table.add_row(str(verdict.entry), str(verdict.score), *map(Text, texts))
        screen.console.print(table)
    failed = [verdict for verdict in verdicts if verdict.score is None]
    for verdict in failed[:SHOWN]:
        said = f", which was {_short(verdict.reply)!r}" if verdict.reply is not None else ""
        screen.say(f"entry {verdict.entry} failed: {verdict.failure}{said}")
    if len(failed) > SHOWN:
        screen.say(f"... and {len(failed) - SHOWN:,} more")


def _short(text: str) -> str:
    """Its beginning, in one line."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(file: Path) -> str:
    with utf8_expected(f"--rubric {file}"):
        return file.read_text(encoding="utf-8-sig")


def _key(variable: str | None) -> str | None:
    """The API key in an environment variable."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(
            f"--key-env {variable}: no such environment variable is set, or it is empty"
        )
    return os.environ[variable]
