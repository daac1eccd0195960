"""Instruction tuning: questions with answers as batches to learn from, and a model's own answers.

An entry is a dict of texts, as in the book's data: "instruction", "input", which may be empty, and
"output"; a "model_response" may be added to it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from operator import index as as_int
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..data import Packed, pack, read_corpus
from ..data.files import atomic_write
from ..data.packing import IGNORED, PADDING
from ..data.tokens import as_tokens
from ..data.windows import Batch, at_least_one
from ..generate import evaluating, generate
from ..gpt import GPT
from ..nn import segment_positions
from ..tokenizer import Tokenizer
from .templates import ChatTemplate

GPT2_END = 50256  # the id of <|endoftext|> in GPT-2's vocabulary
RESPONSE = "model_response"
ASKED = ("instruction", "input", "output")

Entry = dict[str, Any]


# --- files ----------------------------------------------------------------------------------------


def read_entries(path: str | Path) -> list[Entry]:
    """The entries of a JSON file with a list of them or, if its name ends in .jsonl, with one in
    each line. An "input" that is left out is ""; other keys stay.

    Raises ValueError, which names the file and the entry or line, for what is no entry: no JSON,
    no object, a text that is missing, none, or empty where it must not be; and as read_corpus does
    for a file that is missing, empty or not in UTF-8.
    """
    path = Path(path)
    text = read_corpus(path)
    if path.suffix.lower() == ".jsonl":
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1)]
        found = [(where, _parsed(line, where)) for where, line in lines if line.strip()]
    else:
        entries = _parsed(text, str(path))
        if not isinstance(entries, list):
            raise ValueError(
                f"{path} holds {kind_of(entries)}: expected a list of entries, "
                '[{"instruction": ..., "input": ..., "output": ...}, ...], or a .jsonl file'
            )
        found = [(f"{path}, entry {i}", entry) for i, entry in enumerate(entries, start=1)]
    if not found:
        raise ValueError(f"{path} holds no entry: expected at least one")
    for where, entry in found:
        _check_characters(entry, where)
    return [_checked(entry, where) for where, entry in found]


def write_entries(path: str | Path, entries: Iterable[Entry]) -> None:
    """Replaces a file by these entries, in the format that read_entries finds by its name."""
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    else:
        text = json.dumps(list(entries), ensure_ascii=False, indent=4) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def split_entries(
    entries: Sequence[Entry], train: float = 0.85, test: float = 0.1
) -> tuple[Sequence[Entry], Sequence[Entry], Sequence[Entry]]:
    """The parts to train with, test with and validate with (the rest), in the book's order.

    Raises ValueError for fractions that leave no rest, or a part without an entry.
    """
    if not (train > 0 and test > 0 and train + test < 1):
        raise ValueError(f"train and test are fractions that leave a rest, not {train} and {test}")
    first, second = int(len(entries) * train), int(len(entries) * test)
    parts = entries[:first], entries[first : first + second], entries[first + second :]
    if not all(map(len, parts)):
        sizes = ", ".join(str(len(part)) for part in parts)
        raise ValueError(
            f"{len(entries)} entries make parts of {sizes} to train, test and validate with: each "
            "needs one at least"
        )
    return parts


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(
            f"{where} is not valid JSON ({line}column {error.colno}: {error.msg})"
        ) from None
    except (ValueError, RecursionError):  # thousands of digits or of brackets
        raise ValueError(
            f"{where} is not JSON that Python can read: a number or the nesting has no end"
        ) from None


def _checked(entry: Any, where: str) -> Entry:
    """The entry with all its texts. Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {kind_of(entry)}: expected an object with {', '.join(ASKED)}")
    for key in ASKED:
        if key not in entry and key != "input":
            raise ValueError(
                f"{where} has no {key!r}: expected {', '.join(ASKED)}, found {[*entry]}"
            )
    entry = {**entry, "input": entry.get("input", "")}
    for key in ASKED:
        if not isinstance(entry[key], str):
            raise ValueError(f"{where} has {kind_of(entry[key])} as {key!r}: expected a text")
        if key != "input" and not entry[key].strip():
            raise ValueError(f"{where} has an empty {key!r}: write it, or leave the entry out")
    return entry


def _check_characters(entry: Any, where: str) -> None:
    """Raises ValueError for half a surrogate pair: JSON can spell it, a file cannot have it."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half a surrogate pair, which is no character") from None


def kind_of(value: Any) -> str:
    """What JSON calls it."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


# --- batches --------------------------------------------------------------------------------------


def collate(
    batch: Sequence[ArrayLike],
    pad_token_id: int = GPT2_END,
    ignore_index: int = IGNORED,
    allowed_max_length: int | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Batch:
    """Texts (n_i,) of token ids as inputs and targets, both (B, T) int64, T the longest n_i.

    Inputs are filled up with pad_token_id. Targets are the inputs one token later: a text's last
    target is pad_token_id, its end, and what follows is ignore_index, which no loss counts.

    allowed_max_length  T is at most this: longer texts are cut, and lose their end
    prompt_lengths      (B,) how many first tokens of each text are no targets: its prompt

    A pad_token_id inside a text is a token like any other (the book's function, which looks for the
    number, would ignore it). Raises ValueError for no text or an empty one, TypeError for no ids.
    """
    texts = [as_tokens(text) for text in batch]
    if not all(map(len, texts)) or not texts:
        raise ValueError("collate needs texts of at least one token each, and at least one text")
    if allowed_max_length is not None:
        at_least_one("allowed_max_length", allowed_max_length)
    shape = len(texts), max(map(len, texts))  # (B, T)
    inputs, targets = np.full(shape, pad_token_id, np.int64), np.full(shape, ignore_index, np.int64)
    for b, text in enumerate(texts):
        n = len(text)
        inputs[b, :n], targets[b, : n - 1], targets[b, n - 1] = text, text[1:], pad_token_id
        if prompt_lengths is not None:
            targets[b, : max(prompt_lengths[b] - 1, 0)] = ignore_index
    return inputs[:, :allowed_max_length], targets[:, :allowed_max_length]


class Instructions:
    """Entries as a dataset for DataLoader and EpochBatches; `packed()` is another one.

    template        the prompt style, whose special tokens the tokenizer has
    max_length      inputs in a row, at most: the model's context length, or less
    response_only   the loss counts the responses, and not the prompts (the book's exercise 7.2)
    too_long        of entries with more tokens: "truncate" cuts the end off, "drop" leaves them
                    out, "refuse" raises ValueError
    trim            pad a batch only to its own longest text; False: to that of all (a GPU records
                    its steps for one shape)
    first           the number of the first entry, for what an error says

    `texts` are the ids of each entry, without the end that `collate` adds; `prompt_lengths` says
    how many of them are its prompt; `n_too_long` counts the entries that were cut or left out; the
    longest row has `longest` inputs.
    Raises ValueError, which names the entry, for one that is refused, and, with response_only, one
    whose prompt leaves no room for a response; for special tokens that the tokenizer lacks; and if
    no entry is left.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_length: int,
        response_only: bool = False,
        too_long: str = "truncate",
        trim: bool = True,
        first: int = 1,
    ):
        if too_long not in ("truncate", "drop", "refuse"):
            raise ValueError(f'too_long is "truncate", "drop" or "refuse", not {too_long!r}')
        self.max_length = at_least_one("max_length", max_length)
        self.response_only, self.n_too_long = response_only, 0
        self.texts: list[np.ndarray] = []
        prompt_lengths = []
        for number, entry in enumerate(entries, first):
            entry = _checked(entry, f"entry {number}")
            ids, n_prompt = template.encode(tokenizer, *(entry[key] for key in ASKED))
            if len(ids) > max_length:
                self.n_too_long += 1
                if too_long == "drop":
                    continue
                if too_long == "refuse" or (response_only and n_prompt > max_length):
                    prompt = f", {n_prompt:,} of them its prompt" if response_only else ""
                    raise ValueError(
                        f"entry {number} makes {len(ids):,} tokens{prompt}, and a row takes "
                        f'{max_length:,}: shorten it, or leave such entries out (too_long="drop" '
                        "or --too-long drop)"
                    )
            self.texts.append(np.array(ids, np.int32))
            prompt_lengths.append(n_prompt)
        if not self.texts:
            raise ValueError(f"there is no entry of at most {max_length:,} tokens to learn from")
        self.prompt_lengths = np.array(prompt_lengths)  # (N,)
        self.longest = min(self.max_length, max(map(len, self.texts)))
        self._end, self._width = tokenizer.end_of_text, 0 if trim else self.longest

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Batch:
        """Inputs and targets of one entry, each (T,)."""
        inputs, targets = self.batch([as_int(index)])
        return inputs[0], targets[0]

    def batch(self, indices: ArrayLike) -> Batch:
        """Inputs and targets of these entries, as `collate` makes them: each (B, T)."""
        prompts = self.prompt_lengths[indices] if self.response_only else None
        texts = [self.texts[i] for i in indices]
        inputs, targets = collate(texts, self._end, IGNORED, self.max_length, prompts)
        room = ((0, 0), (0, max(self._width - inputs.shape[1], 0)))
        return (
            np.pad(inputs, room, constant_values=self._end),
            np.pad(targets, room, constant_values=IGNORED),
        )

    def packed(self) -> Packed:
        """The same inputs and targets in rows of max_length, several entries in each, as segments:
        little padding, and the loss of the entries one by one (see data.pack).
        """
        ended = [[*text.tolist(), self._end][: self.max_length + 1] for text in self.texts]
        packed = pack(ended, self.max_length, pad_id=self._end)
        if self.response_only:
            prompts = self.prompt_lengths[packed.segments]  # (N, T)
            asked = segment_positions(packed.segments) < prompts - 1
            packed.targets[asked & (packed.segments != PADDING)] = IGNORED
        return packed


def mean_loss(model: GPT, batches: Iterable[tuple[np.ndarray, ...]]) -> float:
    """The loss per target that counts, in nats, over batches (inputs, targets) or (inputs, targets,
    segments), without dropout and gradients. Raises ValueError if no target counts.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for inputs, targets, *segments in batches:
            n = int((targets != IGNORED).sum())
            if n:
                total += model.loss(inputs, targets, *segments).item() * n
                count += n
    if not count:
        raise ValueError("there is no target to compute a loss of: give at least one batch")
    return total / count


# --- responses ------------------------------------------------------------------------------------


def generate_responses(
    model: GPT,
    tokenizer: Tokenizer,
    entries: Sequence[Entry],
    template: ChatTemplate,
    path: str | Path,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> list[Entry]:
    """The entries with what the model says to each as "model_response", also written to `path`.

    The file is replaced as a whole after each batch, so that little is lost if this is interrupted;
    entries that have a response in it, or already, are not asked again, whichever model gave it:
    another model needs another file. `sampling` are options of generate, by default temperature=0,
    the likeliest token. `progress(done, total)` is called after each batch. A response ends where
    the model's context does.

    Raises ValueError for a file of other entries, and, before anything is generated, for an entry
    that leaves no room for a response in the model's context; as read_entries and generate do.
    """
    batch_size, path = at_least_one("batch_size", batch_size), Path(path)
    entries = [dict(_checked(entry, f"entry {i}")) for i, entry in enumerate(entries, start=1)]
    if path.exists():
        _take_responses(entries, path)
    missing = [i for i, entry in enumerate(entries) if not _has_response(entry)]
    prompts = {i: _prompt(entries[i], i + 1, model, tokenizer, template) for i in missing}
    options = {
        "temperature": 0,
        "stop_id": template.stop_ids(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        **sampling,
    }
    write_entries(path, entries)  # if it cannot be written, nothing has been generated in vain
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        ends = [min(len(prompts[i]) + max_new_tokens, model.cfg.context_length) for i in batch]
        most = max(end - len(prompts[i]) for i, end in zip(batch, ends))
        rows = generate(model, [prompts[i] for i in batch], most, **options)
        for i, row, end in zip(batch, rows, ends, strict=True):
            entries[i][RESPONSE] = template.extract(tokenizer.decode(row[len(prompts[i]) : end]))
        write_entries(path, entries)
        if progress:
            progress(len(entries) - len(missing) + start + len(batch), len(entries))
    return entries


def _prompt(entry, number, model, tokenizer, template):
    """The ids that the model continues. Raises ValueError if they fill its context."""
    asked = template.content(entry["instruction"], entry["input"])
    ids = template.ids(tokenizer, [], asked)
    longest = model.cfg.context_length
    if len(ids) >= longest:
        raise ValueError(
            f"entry {number} makes a prompt of {len(ids):,} tokens, and the model sees {longest:,} "
            "with its response: shorten it, or leave it out"
        )
    return ids


def _has_response(entry: Entry) -> bool:
    return isinstance(entry.get(RESPONSE), str)


def _take_responses(entries: list[Entry], path: Path) -> None:
    """Copies the responses that a file has. Raises ValueError if it has other entries."""
    found = read_entries(path)
    if [[e[key] for key in ASKED] for e in found] != [[e[key] for key in ASKED] for e in entries]:
        raise ValueError(
            f"{path} exists and holds other entries: choose another file, or delete it"
        )
    for entry, old in zip(entries, found, strict=True):
        if _has_response(old) and not _has_response(entry):
            entry[RESPONSE] = old[RESPONSE]
