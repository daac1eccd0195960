"""`tinygrad-llm chat` as users run it: piped lines, a terminal, Ctrl-C; and what it remembers."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from test_cli import call

from tinygrad_llm.checkpoint import load_model, load_tokenizer, save_model
from tinygrad_llm.cli.chat import Conversation, PlainTemplate, _answer
from tinygrad_llm.finetune import TEMPLATES, save_template
from tinygrad_llm.generate import stream, stream_text
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.random import Generator
from tinygrad_llm.tokenizer import BPETokenizer

COMMAND = [sys.executable, "-m", "tinygrad_llm", "chat"]
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
TEXT = "User: hello there\nAssistant: good day\nUser: and you?\nAssistant: größer, thanks\n" * 4

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that was not trained: what it says makes no sense, but is always the same."""
    return untrained(tmp_path_factory.mktemp("model"), context_length=64)


def untrained(path, context_length):
    tokenizer = BPETokenizer.train(TEXT, 290)
    cfg = GPTConfig(tokenizer.vocab_size, context_length, emb_dim=16, n_heads=2, n_layers=2)
    save_model(GPT(cfg, Generator(0), init="torch"), path, tokenizer)
    return path


def run(directory, lines, *options):
    return subprocess.run(
        [*COMMAND, "--model", str(directory), *map(str, options)],
        input="".join(line + "\n" for line in lines),
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def opened(directory):
    gpt = load_model(directory)
    return gpt, load_tokenizer(directory, gpt)


def conversation(directory, template=None, system=None, **options):
    gpt, tokenizer = opened(directory)
    options = {"max_tokens": 12, "temperature": 0, "vocab_size": tokenizer.vocab_size, **options}
    template, longest = template or PlainTemplate(), options.pop("max_tokens")
    return Conversation(gpt, tokenizer, template, longest, options, system)


GREEDY = ["--temperature", 0, "--max-tokens", 12]


def said(directory, messages, memory=True):
    """The replies, written out with nothing but stream."""
    gpt, tokenizer = opened(directory)
    before, replies = "", []
    for message in messages:
        ids = tokenizer.encode_ordinary(f"{before}User: {message}\nAssistant:")
        assert len(ids) + 12 <= 64
        new = stream(gpt, ids, 12, 0, stop_id=tokenizer.end_of_text)
        replies.append("".join(stream_text(new, tokenizer, "\nUser:")).strip())
        before += f"User: {message}\nAssistant: {replies[-1]}\n" if memory else ""
    return replies


# --- processes ------------------------------------------------------------------------------------


def test_each_line_gets_its_reply_and_what_was_said_counts(directory):
    lines = ["hello", "good day"]
    done = run(directory, lines, *GREEDY)
    replies = said(directory, lines)
    assert replies != said(directory, lines, memory=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.strip() for line in done.stdout.splitlines()] == "\n".join(replies).split("\n")


def test_reset_quit_and_unknown_commands(directory):
    lines = ["hello", "/reset", "", "hello", "/dance now", "/quit", "never read"]
    done = run(directory, lines, *GREEDY)
    (reply,) = said(directory, ["hello"])
    assert done.returncode == 0
    assert [part.strip() for part in done.stdout.splitlines()] == f"{reply}\n{reply}".split("\n")
    assert done.stderr == "there is no /dance: type /reset or /quit, or a message\n"


def test_a_message_that_is_too_long_does_not_end_the_chat(directory):
    done = run(directory, ["no, " * 70, "hello"], *GREEDY)
    assert done.returncode == 0
    assert done.stderr.startswith("this message makes ") and "52 fit beside a reply" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout.strip() == said(directory, ["hello"])[0]


def test_the_same_seed_gives_the_same_chat(directory):
    first, same, other = (run(directory, ["hello"], "--seed", n).stdout for n in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--temperature", "-1"], "temperature must be a number from 0 on"),
        (["--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["--top-k", "999"], "top_k must be at most"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["hello"], "hello"),
        (["--model", "none"], "none does not exist"),
    ],
)
def test_what_is_wrong_ends_it_before_it_begins(directory, options, part):
    done = call("chat", "--model", directory, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tinygrad-llm: ") and done.stderr.count("\n") == 1
    assert part in done.stderr


def test_a_line_that_is_no_text(directory):
    done = subprocess.run(
        [*COMMAND, "--model", str(directory), *map(str, GREEDY)],
        input=b"Gr\xf6\xdfe\nhello\n", capture_output=True,
        env={**ENVIRONMENT, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.startswith(b"this line is not UTF-8 at byte offset 2")
    assert done.stderr.count(b"\n") == 1
    assert done.stdout.decode().strip() == said(directory, ["hello"])[0]


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, directory, *options):
        self.side, end = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "--model", str(directory), *map(str, options)],
            env=ENVIRONMENT, stdin=end, stdout=end, stderr=end, start_new_session=True,
        )  # fmt: skip
        os.close(end)
        self.shown = b""

    def wait_for(self, text):
        """Reads until the text has come; what comes after it is left for the next time."""
        while text not in self.shown:
            if not select.select([self.side], [], [], 30)[0]:
                self.process.kill()
                pytest.fail(f"{text!r} does not come: {self.shown!r}")
            self.shown += os.read(self.side, 65536)
        self.shown = self.shown.partition(text)[2]

    def type(self, text):
        os.write(self.side, text)


def test_ctrl_c_ends_the_reply_and_not_the_chat(tmp_path):
    chat = Terminal(untrained(tmp_path, 8192), *GREEDY[:2], "--max-tokens", 8000)
    chat.wait_for(b"> ")
    chat.type(b"hello\n")
    chat.wait_for(b"hello\r\n")
    chat.wait_for(b":")  # it has begun to reply, for many seconds
    chat.process.send_signal(signal.SIGINT)
    chat.wait_for(b"\r\n> ")
    chat.type(b"/dance\n")
    chat.wait_for(b"there is no /dance")
    chat.wait_for(b"> ")
    chat.type(b"\x04")  # Ctrl-D
    assert chat.process.wait(timeout=30) == 0


def test_ctrl_c_at_the_prompt_ends_the_chat(directory):
    chat = Terminal(directory)
    chat.wait_for(b"template: plain\r\n/reset")
    chat.wait_for(b"> ")
    for _ in range(10):  # readline misses a signal that comes just before it waits for a key
        chat.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            chat.process.wait(timeout=5)
            break
    assert chat.process.returncode == 130


# --- templates ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TEMPLATES)
def taught(request, tmp_path_factory):
    """(directory, template): a model that says what ends a reply after eight tokens."""
    template, directory = TEMPLATES[request.param], tmp_path_factory.mktemp(request.param)
    tokenizer = BPETokenizer.train(TEXT, 290)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 2, "tie_weights": False}
    gpt = GPT(GPTConfig(tokenizer.vocab_size, 512, **shape), Generator(0), init="torch")
    template.add_tokens(tokenizer, gpt)
    *before, ninth = stream(gpt, template.ids(tokenizer, [], "hello"), 9, 0)
    assert ninth not in before
    swapped = [ninth, tokenizer.token_to_id(template.end)]
    gpt.out_head.weight.data[swapped] = gpt.out_head.weight.data[swapped[::-1]]
    save_model(gpt, directory, tokenizer)
    save_template(directory, template)
    return directory, template


def answers(directory, template, messages, system=None):
    """The replies, written out with nothing but the template and stream."""
    gpt, tokenizer = opened(directory)
    turns, lengths = [], []
    for message in messages:
        ids = template.ids(tokenizer, turns, message, system)
        new = list(stream(gpt, ids, 12, 0, stop_id=template.stop_ids(tokenizer)))
        turns.append((message, template.extract(tokenizer.decode(new))))
        lengths.append(len(new))
    return [reply for _, reply in turns], lengths


def printed(replies):
    return [line.strip() for line in "\n".join(replies).split("\n")]


def shown(done):
    return [line.strip() for line in done.stdout.split("\n")[:-1]]


OTHER = {"alpaca": "phi3", "phi3": "alpaca", "chatml": "plain"}
SENSE = "is asked: replies may make no sense\n"


def test_it_speaks_as_the_model_was_trained_to(taught):
    directory, template = taught
    lines = ["hello", "good day"]
    replies, lengths = answers(directory, template, lines)
    assert lengths[0] == 8  # the ninth token ended it
    done = run(directory, lines, *GREEDY)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown(done) == printed(replies)
    assert replies[1] != answers(directory, template, lines[1:])[0][0]  # what was said counts


def test_another_template_with_a_warning(taught):
    directory, template = taught
    other = OTHER[template.name]
    done = run(directory, ["hello"], *GREEDY, "--template", other)
    trained = f"this model was trained with the template {template.name}, {other}"
    assert (done.returncode, done.stderr) == (0, f"{trained} {SENSE}")
    expected, _ = answers(directory, TEMPLATES.get(other, PlainTemplate()), ["hello"])
    assert expected != answers(directory, template, ["hello"])[0]
    assert shown(done) == printed(expected)


def test_its_own_template_and_another_system_prompt(taught):
    """Asked for by name, which is no reason to warn."""
    directory, template = taught
    done = run(directory, ["hello"], *GREEDY, "--template", template.name, "--system", "Be brief.")
    assert (done.returncode, done.stderr) == (0, "")
    expected, _ = answers(directory, template, ["hello"], "Be brief.")
    assert expected != answers(directory, template, ["hello"])[0]
    assert shown(done) == printed(expected)


def test_a_template_for_a_model_that_was_trained_with_none(directory):
    done = run(directory, ["hello"], *GREEDY, "--template", "phi3")
    assert (done.returncode, done.stderr) == (
        0, f"this model was not trained with a template, phi3 {SENSE}"
    )  # fmt: skip
    expected, _ = answers(directory, TEMPLATES["phi3"], ["hello"])
    assert expected != said(directory, ["hello"])
    assert shown(done) == printed(expected)
    done = run(directory, ["hello"], *GREEDY, "--template", "plain")
    assert (done.stdout.strip(), done.stderr) == (said(directory, ["hello"])[0], "")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model with a template that is none of ours."""
    path = untrained(tmp_path_factory.mktemp("foreign"), context_length=64)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages }}"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_template_that_is_none_of_ours_can_be_replaced(foreign):
    done = run(foreign, ["hello"], *GREEDY, "--template", "phi3")
    assert (done.returncode, done.stderr) == (0, "")
    assert shown(done) == printed(answers(foreign, TEMPLATES["phi3"], ["hello"])[0])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["tokenizer_config.json has a chat template that is none of alpaca", "--template"]),
        (["--template", "vicuna"], ["--template", "'vicuna'", "plain", "alpaca", "chatml"]),
        (["--template", "chatml"], ["chatml needs the special tokens <|im_start|>, <|im_end|>"]),
        (["--template", "plain", "--system", "Hi"], ["plain has no system prompt", "--system"]),
        (["--template", "alpaca"], ["125 tokens", "52 fit beside", "--system or", "--max-tokens"]),
        (["--template", "phi3", "--system", "no, " * 70], ["phi3 makes", "a shorter --system"]),
        (["--template", "phi3", "--system", b"Gr\xf6\xdfe"], ["--system is not UTF-8"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_template(directory, foreign, options, parts):
    """One line: no warning comes before it."""
    command = ["chat", "--model", directory if options else foreign, "--max-tokens", 12]
    done = call(*command, *map(os.fsdecode, options))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tinygrad-llm: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_a_system_prompt_stays_when_turns_go(taught):
    directory, template = taught
    talk = conversation(directory, template, "Be brief.")
    talk.turns = [("hello there", "good day")] * 40
    reply = "".join(talk.reply("hello"))
    assert 0 < len(talk.turns) < 40
    ids = template.ids(talk.tokenizer, talk.turns, "hello", "Be brief.")
    assert len(ids) + 12 <= 512
    new = list(stream(talk.model, ids, 12, 0, stop_id=template.stop_ids(talk.tokenizer)))
    assert reply == talk.tokenizer.decode(new)


def test_a_reply_ends_at_the_texts_that_a_template_names(taught):
    directory, template = taught
    talk = conversation(directory, template)
    reply = "".join(talk.reply("hello"))
    talk.template = replace(template, stop=("never", reply[3:5]))
    assert "".join(talk.reply("hello")) == reply.split(reply[3:5])[0]


def test_of_a_reply_the_template_says_what_is_remembered(taught, monkeypatch, capsys):
    directory, template = taught
    talk = conversation(directory, template)
    written = [template.assistant[0], "good ", "day", template.end, "\nmore"]
    monkeypatch.setattr(talk, "reply", lambda message: iter(written))
    _answer(talk, "hello")
    assert talk.turns == [("hello", "good day")]


# --- what it remembers ----------------------------------------------------------------------------


def test_the_oldest_turns_go_when_the_context_is_full(directory):
    talk = conversation(directory)
    talk.turns = [("hello there", "good day")] * 4 + [("and you?", "thanks")]
    "".join(talk.reply("hello"))
    kept = talk.turns
    assert 0 < len(kept) < 5 and kept[-1] == ("and you?", "thanks")
    size = len(talk.template.ids(talk.tokenizer, kept, "hello"))
    assert size + 12 <= 64
    one_more = [("hello there", "good day"), *kept]
    assert len(talk.template.ids(talk.tokenizer, one_more, "hello")) + 12 > 64
    with pytest.raises(ValueError, match="shorten it"):
        talk.reply("no, " * 70)
    assert talk.turns == kept  # what cannot be answered costs nothing


def test_a_reply_ends_before_the_user_would_speak(directory):
    """And at the end of the context, if it is asked for more."""
    talk = conversation(directory, max_tokens=500)
    pieces = list(talk.reply("hello"))
    asked = talk.template.ids(talk.tokenizer, [], "hello")
    assert len(asked) + len(pieces) - 1 == 64  # a piece for each id, and one at the end
    reply = "".join(pieces)
    talk.template.stop = (reply[20:40],)
    assert "".join(talk.reply("hello")) == reply.split(reply[20:40])[0]


def test_special_tokens_in_a_message_are_text(directory):
    talk = conversation(directory)
    ids = talk.template.ids(talk.tokenizer, [("<|endoftext|>", "ok")], "<|endoftext|>")
    assert talk.tokenizer.end_of_text not in ids
    assert talk.tokenizer.decode(ids) == (
        "User: <|endoftext|>\nAssistant: ok\nUser: <|endoftext|>\nAssistant:"
    )


def test_what_was_said_is_not_computed_again(directory, monkeypatch):
    talk, computed = conversation(directory), []
    hidden_states = GPT.hidden_states

    def spy(self, ids, *rest, **keywords):
        computed.append(len(ids[0]))
        return hidden_states(self, ids, *rest, **keywords)

    monkeypatch.setattr(GPT, "hidden_states", spy)
    reply = "".join(talk.reply("hello"))
    first = computed[0]
    talk.turns.append(("hello", reply.strip()))
    computed.clear()
    "".join(talk.reply("and you?"))
    whole = len(talk.template.ids(talk.tokenizer, talk.turns, "and you?"))
    assert computed[0] <= whole - first
