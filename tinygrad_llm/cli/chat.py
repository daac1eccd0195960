"""`tinygrad-llm chat`: a conversation with a trained model, line by line."""

import contextlib
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import load_tokenizer
from ..finetune import TEMPLATES, ChatTemplate, saved_template, template_mismatch
from ..generate import Decoder, stream, stream_text
from ..gpt import GPT
from ..tokenizer import END_OF_TEXT, Tokenizer
from .device import DeviceName, Dtype, DtypeName, Kernels, enough_memory
from .errors import UserError, user_input
from .generate import (
    LESS,
    MinP,
    Model,
    Penalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    opened,
    sampling,
    utf8,
    write,
)
from .screen import interruptible

COMMANDS = {"/reset": "forgets what was said", "/quit": "ends, as Ctrl-D does"}

TemplateName = StrEnum("TemplateName", ["plain", *TEMPLATES])
Turn = tuple[str, str]  # what the user said, and what the model replied


def chat(
    model: Model,
    template: Annotated[
        TemplateName | None,
        typer.Option(
            help="How a conversation is written down.", show_default="the model's own, or plain"
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The system prompt, in place of the template's."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 200,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: DeviceName = None,
    dtype: DtypeName = Dtype.float32,
    kernels: Kernels = "auto",
) -> int:
    """Talk with a trained model: a line is a message. /reset forgets what was said, /quit or Ctrl-D
    ends, Ctrl-C ends a reply.
    """
    with user_input():
        gpt, where = opened(model, 1, device, dtype, kernels)
        tokenizer = load_tokenizer(model, gpt)
        options = sampling(
            tokenizer, seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        stream(gpt, [0], 0, **options)  # refuses what is out of range
        style, warning = _chosen(template, model)
        if system is not None:
            system = utf8(system, "--system")
        conversation = Conversation(gpt, tokenizer, style, max_tokens, options, system)
    if warning:
        _say(warning)
    sys.stdin.reconfigure(errors="surrogateescape")  # what is wrong in a line is said of that line
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() a history)
        write(f"template: {style.name}\n")
        write("".join(f"{name} {what}\n" for name, what in COMMANDS.items()))
    for line in _lines("> " if terminal else ""):
        if line == "/quit":
            break
        if line == "/reset":
            conversation.turns = []
        elif line.startswith("/"):
            _say(f"there is no {line.split()[0]}: type {' or '.join(COMMANDS)}, or a message")
        elif line:
            with enough_memory(where, LESS):
                _answer(conversation, line)
    return 0


class PlainTemplate:
    """How a conversation becomes the text that a model without a template of its own continues: as
    a play is printed. It has what the chat needs of a finetune.ChatTemplate, under the same names.

        User: Hello
        Assistant: Hi!
        User: How are you?
        Assistant:

    stop    what ends a reply, besides <|endoftext|>: the user's next turn
    """

    name = "plain"
    stop = ("\nUser:",)

    def ids(
        self, tokenizer: Tokenizer, turns: list[Turn], message: str, system: str | None = None
    ) -> list[int]:
        """The token ids of the turns so far and a message that wants a reply. Nothing that was
        said counts as a special token. Raises ValueError for a system prompt.
        """
        if system is not None:
            raise ValueError(
                "the template plain has no system prompt: leave --system out, or choose another "
                f"--template ({', '.join(TEMPLATES)})"
            )
        before = "".join(f"User: {asked}\nAssistant: {said}\n" for asked, said in turns)
        return list(tokenizer.encode_ordinary(f"{before}User: {message}\nAssistant:"))

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The id of <|endoftext|>, if there is one."""
        return [i for name, i in tokenizer.special_tokens.items() if name == END_OF_TEXT]

    def extract(self, generated: str) -> str:
        """The reply alone."""
        return generated.strip()


Template = PlainTemplate | ChatTemplate
_BY_NAME = {template.name: template for template in (PlainTemplate(), *TEMPLATES.values())}


def _chosen(name: str | None, model: Path) -> tuple[Template, str | None]:
    """The template of this name or, without one, the model's own; a warning if they differ.

    Raises ValueError if the model's own is needed and is none of ours.
    """
    try:
        saved = saved_template(model)
    except ValueError as error:
        if name is None:
            raise ValueError(f"{error} (--template NAME)") from error
        return _BY_NAME[name], None  # as that error advises: nothing to compare it with
    own = saved or _BY_NAME["plain"]
    asked = own if name is None else _BY_NAME[name]
    return asked, None if asked is own else template_mismatch(asked, saved)


class Conversation:
    """A model, and what was said: `turns`, of which the oldest go when the context is full.

    Raises ValueError for a tokenizer that lacks special tokens of the template, and for a system
    prompt that the template has no place for or that leaves none for a message.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        template: Template,
        max_tokens: int,
        options: dict[str, Any],
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.template, self.system = model, tokenizer, template, system
        self.max_tokens = max_tokens
        self.options = {**options, "stop_id": template.stop_ids(tokenizer)}
        self.decoder = Decoder(model)  # what was said before is not computed again
        self.turns: list[Turn] = []
        empty = len(template.ids(tokenizer, [], "", system))
        if empty > self._room:
            raise ValueError(
                f"the template {template.name} makes {empty:,} tokens of an empty message and "
                f"{self._room:,} fit beside a reply: give a shorter --system or fewer --max-tokens"
            )

    def reply(self, message: str) -> Iterator[str]:
        """The pieces of the reply as they come. Raises ValueError for a message that is too long
        or an option out of range.
        """
        ids = self._fitting(message)
        longest = min(self.max_tokens, self.model.cfg.context_length - len(ids))
        new_ids = stream(self.model, ids, longest, **self.options, decoder=self.decoder)
        return stream_text(new_ids, self.tokenizer, self.template.stop)

    @property
    def _room(self) -> int:
        """Tokens of the context that a reply does not need: it gets up to max_tokens, but no more
        than half of the context.
        """
        most = self.model.cfg.context_length
        return most - min(self.max_tokens, most // 2)

    def _fitting(self, message: str) -> list[int]:
        """The ids of the conversation, as many turns as leave room for a reply."""
        for first in range(len(self.turns) + 1):
            ids = self.template.ids(self.tokenizer, self.turns[first:], message, self.system)
            if len(ids) <= self._room:
                self.turns = self.turns[first:]
                return ids
        raise ValueError(
            f"this message makes {len(ids):,} tokens and {self._room:,} fit beside a reply: "
            "shorten it"
        )


def _lines(prompt: str) -> Iterator[str]:
    """What the user types, until Ctrl-D."""
    while True:
        try:
            with user_input():
                line = input(prompt)
        except EOFError:
            if prompt:
                write("\n")
            return
        try:
            with user_input():
                line = utf8(line, "this line").strip()
        except UserError as error:
            _say(str(error))
        else:
            yield line


def _answer(conversation: Conversation, message: str) -> None:
    """Shows the reply while it comes, and remembers it; Ctrl-C ends it."""
    try:
        with user_input():
            pieces = conversation.reply(message)
    except UserError as error:
        _say(str(error))
        return
    said = ""
    with contextlib.suppress(KeyboardInterrupt), interruptible() as go_on:
        for piece in pieces:
            piece = piece if said else piece.lstrip()
            said += piece
            write(piece)
            go_on()
    write("\n")
    conversation.turns.append((message, conversation.template.extract(said)))


def _say(what: str) -> None:
    print(what, file=sys.stderr)
