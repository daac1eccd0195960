"""The command `tinygrad-llm`: trains a GPT on a text, continues prompts with it, checks gradients.

What the user can put right ends in one line on stderr and exit code 2, and an interruption in exit
code 130. Any other exception is a bug of ours and shows its traceback.
"""

import logging
import sys

import typer

from .. import backend
from .chat import chat
from .check import check
from .classify import classify
from .data import data
from .errors import UsageError, UserError, described, user_input
from .export import export
from .finetune import finetune
from .generate import generate
from .info import info
from .judge import judge
from .screen import PROGRAM
from .train import train

COMMANDS = [train, generate, chat, classify, judge, info, export, check]  # in the order of --help

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A GPT from first principles: train one on a text, let it write, check its gradients.",
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(finetune, name="finetune")
app.add_typer(data, name="data")


def main() -> None:
    """The command's entry point."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word about its font cache
    sys.stdout.reconfigure(errors="replace")  # for characters that a terminal cannot show
    try:
        with user_input():
            _ = backend.current.reading  # what TINYGRAD_LLM_KERNELS asks for
        exit_code = app(sys.argv[1:] or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except (UserError, FloatingPointError) as error:  # the latter: numbers that are nan or infinite
        exit_code = _fail(str(error))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else PROGRAM
        exit_code = _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except OSError as error:  # standard output cannot be written
        exit_code = _fail(described(error))
    except MemoryError as error:
        exit_code = _fail(f"{error}: use a smaller --batch-size, --context, --dim or --vocab-size")
    except (KeyboardInterrupt, typer.Abort):
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        exit_code = 130
    sys.exit(exit_code)


def _fail(message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2
