"""Prompt styles: how a question and its answer become the text that a model is trained on.

A model answers in the style that it was trained with, and in another one badly. So the style is
saved beside the model, as the `chat_template` that transformers and what stands on it know.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import find_model
from ..data.files import NewFile, atomic_write, remove, together
from ..gpt import GPT
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..tokenizer.base import split_at
from ..tokenizer.files import CONFIG, read_json, read_text

JINJA = "chat_template.jinja"  # where newer versions of transformers write it
OTHER_STYLE = "replies may make no sense"

Turn = tuple[str, str]  # what the user said, and what the model replied
Piece = tuple[str, bool]  # a text, and whether it is the template's own: special tokens count then


@dataclass(frozen=True)
class ChatTemplate:
    """One prompt style. A conversation is: system, user, assistant, between, user, assistant, ...

    system, user, assistant     what stands before and after what each of them says
    default_system      what the system says if nothing else is given
    input_separator     between an instruction and its input, which the user says together
    between             before every turn but the first
    learns_header       with the loss on responses only, whether what stands before the assistant's
                        words is a part of the response, as in the book, or of the prompt
    end                 the special token that ends a response
    stop                texts that end a reply, too: the user's next turn
    special_tokens      the names that a tokenizer must know as such
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str]
    default_system: str = ""
    input_separator: str = "\n"
    between: str = ""
    learns_header: bool = False
    end: str = END_OF_TEXT
    stop: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)

    # --- texts ---

    def content(self, instruction: str, input: str = "") -> str:
        """What the user says: an instruction and, if there is one, what it is about."""
        return instruction + (self.input_separator + input if input else "")

    def prompt(self, instruction: str, input: str = "") -> str:
        """All before the assistant's part: of Alpaca and Phi-3 the book's `format_input`."""
        turn, *_ = self._chunks([], self.content(instruction, input))
        return _joined([turn])

    def text(self, instruction: str, input: str, output: str) -> str:
        """The prompt and the response to it. What the model is trained on has <|endoftext|> after
        it, which `collate` adds.
        """
        return self.chat([(self.content(instruction, input), output)])

    def chat(
        self, turns: Iterable[Turn], message: str | None = None, system: str | None = None
    ) -> str:
        """The text of several turns, and of a message that wants a reply, if there is one:
        transformers' apply_chat_template gives the same.
        """
        return _joined(self._chunks(turns, message, system))

    def extract(self, generated: str, prompt: str = "") -> str:
        """The response alone, of what a model has written: without the prompt, the header that
        Alpaca and Phi-3 begin with, what comes after the response, and white space around it.
        """
        text = generated.removeprefix(prompt).strip()
        text = text.removeprefix(self.assistant[0].strip())
        ends = [text.find(end) for end in (END_OF_TEXT, self.end, *self.stop)]
        return text[: min((end for end in ends if end >= 0), default=None)].strip()

    # --- ids ---

    def ids(
        self,
        tokenizer: Tokenizer,
        turns: Iterable[Turn],
        message: str,
        system: str | None = None,
    ) -> list[int]:
        """The ids of the turns so far and a message, up to where the reply begins.

        Nothing that was said counts as a special token. Raises ValueError if the tokenizer lacks a
        special token of the template.
        """
        chunks = self._encoded(tokenizer, self._chunks(turns, message, system))
        return [token_id for chunk in chunks for token_id in chunk]

    def encode(
        self, tokenizer: Tokenizer, instruction: str, input: str, output: str
    ) -> tuple[list[int], int]:
        """The ids of `text`, and how many of them are the prompt that response_only leaves out.

        A prompt's ids are the same in training and when a reply is wanted: no token is made of its
        end and the response's beginning. Raises as `ids`.
        """
        turn = self.content(instruction, input), output
        prompt, header, response = self._encoded(tokenizer, self._chunks([turn]))
        n_prompt = len(prompt) if self.learns_header else len(prompt) + len(header)
        return prompt + header + response, n_prompt

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids that end a reply: generate's stop_id. Raises as `ids`."""
        self._check(tokenizer)
        return sorted({tokenizer.token_to_id(name) for name in (END_OF_TEXT, self.end)})

    def add_tokens(self, tokenizer: Tokenizer, model: GPT) -> None:
        """The tokenizer learns the special tokens that it lacks, and the model has rows for them.
        These are new parameters: make the optimizer afterwards.
        """
        tokenizer.add_tokens(self.special_tokens)
        model.resize_token_embeddings(max(model.cfg.vocab_size, tokenizer.vocab_size))

    def _chunks(
        self, turns: Iterable[Turn], message: str | None = None, system: str | None = None
    ) -> Iterator[list[Piece]]:
        """User's part, header, reply; and so on: each is encoded for itself."""
        system = self.default_system if system is None else system
        before = _framed(self.system, system) if system else []
        for asked, said in turns:
            yield [*before, *_framed(self.user, asked)]
            header, *reply = _framed(self.assistant, said)
            yield [header]
            yield reply
            before = [(self.between, True)]
        if message is not None:
            yield [*before, *_framed(self.user, message)]
            yield [(self.assistant[0], True)]

    def _encoded(self, tokenizer: Tokenizer, chunks: Iterable[list[Piece]]) -> Iterator[list[int]]:
        self._check(tokenizer)
        for pieces in chunks:
            ids, plain = [], ""
            for text, is_ours in pieces:
                parts = split_at(self.special_tokens, text) if is_ours else [(text, False)]
                for part, is_special in parts:
                    if is_special:
                        ids += [*tokenizer.encode_ordinary(plain), tokenizer.special_tokens[part]]
                    plain = "" if is_special else plain + part
            yield ids + list(tokenizer.encode_ordinary(plain))

    def _check(self, tokenizer: Tokenizer) -> None:
        lacking = [name for name in self.special_tokens if name not in tokenizer.special_tokens]
        if lacking:
            raise ValueError(
                f"the template {self.name} needs the special tokens {', '.join(lacking)}, which "
                "the tokenizer lacks: template.add_tokens(tokenizer, model) adds them, before the "
                "model is trained"
            )

    # --- transformers ---

    @property
    def jinja(self) -> str:
        """The same for transformers: a chat_template. Messages have the roles user and assistant in
        turn; the first may be of the role system. The text is the same; but transformers encodes it
        as a whole, so that there special tokens count in what was said, too.
        """
        (s0, s1), (u0, u1), (a0, a1), between, default = map(
            _literal, (self.system, self.user, self.assistant, self.between, self.default_system)
        )
        return "".join(
            [
                "{%- set system, turns = " + default + ", messages -%}",
                "{%- if messages[0]['role'] == 'system' -%}",
                "{%- set system, turns = messages[0]['content'], messages[1:] -%}",
                "{%- endif -%}",
                "{%- if system -%}{{ " + f"{s0} + system + {s1}" + " }}{%- endif -%}",
                "{%- for message in turns -%}",
                "{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}",
                "{{ raise_exception('roles are user, assistant, user, ... in turn') }}",
                "{%- elif message['role'] == 'user' -%}",
                "{%- if not loop.first -%}{{ " + between + " }}{%- endif -%}",
                "{{ " + f"{u0} + message['content'] + {u1}" + " }}",
                "{%- else -%}",
                "{{ " + f"{a0} + message['content'] + {a1}" + " }}",
                "{%- endif -%}{%- endfor -%}",
                "{%- if add_generation_prompt -%}{{ " + a0 + " }}{%- endif -%}",
            ]
        )


ALPACA = ChatTemplate(  # Taori et al., "Stanford Alpaca", 2023
    name="alpaca",
    user=("### Instruction:\n", ""),
    assistant=("\n\n### Response:\n", ""),
    system=("", "\n\n"),
    default_system="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    input_separator="\n\n### Input:\n",
    between="\n\n",
    learns_header=True,
    stop=("### Instruction:",),
)
# As in the book, whose GPT-2 reads <|user|> as plain text; Microsoft's Phi-3 has tokens for it.
PHI3 = ChatTemplate(
    name="phi3",
    user=("<|user|>\n", ""),
    assistant=("\n<|assistant|>:\n", ""),
    system=("<|system|>\n", "\n"),
    between="\n",
    learns_header=True,
    stop=("<|user|>",),
)
CHATML = ChatTemplate(  # OpenAI's "Chat Markup Language", 2023
    name="chatml",
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    end="<|im_end|>",
    special_tokens=(END_OF_TEXT, "<|im_start|>", "<|im_end|>"),
)
TEMPLATES = {template.name: template for template in (ALPACA, PHI3, CHATML)}


def get_template(name: str) -> ChatTemplate:
    """The template of this name: alpaca, phi3 or chatml. Raises ValueError for another."""
    if name not in TEMPLATES:
        raise ValueError(f"there is no template {name!r}: expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def save_template(directory: str | Path, template: ChatTemplate) -> None:
    """Adds the template to the tokenizer's files in a model's directory. Saving the tokenizer again
    drops it. In one `data.files.together` block with save_model, both are replaced at once.

    Raises ValueError if there is no tokenizer_config.json, OSError if it cannot be written.
    """
    path = Path(directory) / CONFIG
    with together() as changes:
        written = [c for c in changes if isinstance(c, NewFile) and c.path == path]
        config = _pending(written[-1]) if written else read_json(path)
        data = json.dumps({**config, "chat_template": template.jinja}, indent=1).encode()
        remove(path.with_name(JINJA))  # it would count for more
        if not written:
            with atomic_write(path) as file:
                file.write(data)
            return
        written[-1].file.seek(0)
        written[-1].file.truncate()
        written[-1].file.write(data)
        written[-1].write_through()


def saved_template(name_or_dir: str | Path) -> ChatTemplate | None:
    """The template that was saved with a model; None if it has none.

    Raises ValueError for one that is not of this library, or a damaged file.
    """
    directory = find_model(name_or_dir)
    path = directory / JINJA
    if path.exists():
        found = read_text(path, "a chat template")
    else:
        path = directory / CONFIG
        found = read_json(path).get("chat_template") if path.exists() else None
    if found is None:
        return None
    for template in TEMPLATES.values():
        if found == template.jinja:
            return template
    raise ValueError(
        f"{path} has a chat template that is none of {', '.join(TEMPLATES)}: choose one of them "
        "by name, if the model was trained with it"
    )


def template_mismatch(asked: ChatTemplate, saved: ChatTemplate | None) -> str | None:
    """A warning in one line if a model is to be used with another template than its own."""
    if saved is None:
        return f"this model was not trained with a template, {asked.name} is asked: {OTHER_STYLE}"
    if asked.name != saved.name:
        return (
            f"this model was trained with the template {saved.name}, {asked.name} is asked: "
            + OTHER_STYLE
        )
    return None


def _pending(new: NewFile) -> dict:
    """What a file will hold that has not yet taken its place."""
    new.file.seek(0)
    return json.loads(new.file.read())


def _framed(frame: tuple[str, str], said: str) -> list[Piece]:
    return [(frame[0], True), (said, False), (frame[1], True)]


def _joined(chunks: Iterable[list[Piece]]) -> str:
    return "".join(text for pieces in chunks for text, _ in pieces)


def _literal(text: str | tuple[str, str]) -> str | list[str]:
    """As Jinja spells a text, or each of two."""
    return json.dumps(text) if isinstance(text, str) else [json.dumps(part) for part in text]
