"""`tinygrad-llm chat` as users run it: piped lines, a terminal, Ctrl-C; and what it remembers."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from tinygrad_llm.checkpoint import load_model, load_tokenizer, save_model
from tinygrad_llm.cli.chat import Conversation, PlainTemplate
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


def conversation(directory, **options):
    gpt = load_model(directory)
    tokenizer = load_tokenizer(directory, gpt)
    options = {"max_tokens": 12, "temperature": 0, "vocab_size": tokenizer.vocab_size, **options}
    return Conversation(gpt, tokenizer, PlainTemplate(), options.pop("max_tokens"), options)


GREEDY = ["--temperature", 0, "--max-tokens", 12]


def said(directory, messages, memory=True):
    """The replies, written out with nothing but stream."""
    gpt = load_model(directory)
    tokenizer = load_tokenizer(directory, gpt)
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
    done = run(directory, ["hello"], *options)
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
    chat.wait_for(b"> ")
    for _ in range(10):  # readline misses a signal that comes just before it waits for a key
        chat.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            chat.process.wait(timeout=5)
            break
    assert chat.process.returncode == 130


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
