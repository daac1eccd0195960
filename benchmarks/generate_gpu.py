"""Generation by GPT-2 on a GPU: ours, against transformers and a plain GPT in PyTorch, both with a
static cache and torch.compile. Each in a process of its own, with the same weights.
"""

import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from . import gpu, machine
from .measure import Ratio, Timing
from .report import Table, duration
from .worker import Worker, WorkerError

DTYPES = ("float32", "bfloat16")
TARGET = 1.5  # times the speed of transformers, for a further token
ALIKE = 0.95  # of the rows, whose greedy float32 texts must be equal: the others had near ties


@dataclass(frozen=True)
class Task:
    """So many prompts of so many tokens, and how many tokens each gets, greedily."""

    batch: int
    prompt: int
    new: int
    dtype: str

    def __str__(self):
        return f"{self.dtype}, batch {self.batch}, {self.prompt} + {self.new} tokens"

    def prompts(self, vocab: int):
        rng = np.random.default_rng(0)
        return rng.integers(0, vocab, (self.batch, self.prompt))


# --- who is measured ------------------------------------------------------------------------------


class _Player:
    """What they have in common. `_generate(task, new)` gives the text (B, T + new) as NumPy."""

    clock = staticmethod(time.perf_counter)

    def text(self, task: Task):
        return self._generate(task, task.new)

    def turn(self, task: Task) -> dict:
        """A text and, beside it, only its first token, which is also the warm-up."""
        found = {}
        self._generate(task, 1)
        for name, new in (("seconds", task.new), ("first", 1)):
            start = self.clock()
            self._generate(task, new)  # its last tokens are on the host: all is done
            found[name] = [self.clock() - start]
        return found


def _model(size):
    from tinygrad_llm.gpt import GPT, GPTConfig
    from tinygrad_llm.random import Generator

    from .generate import SIZES

    return GPT(GPTConfig.from_name("gpt2", **SIZES[size]), Generator(0)).eval()


class Ours(_Player):
    """tinygrad_llm's `generate`."""

    def __init__(self, device: str, size: str):
        from tinygrad_llm import device as devices

        self.device, self._size = devices.device(device), size
        self.device.make_current()
        self._models, self._decoders = {}, {}

    def about(self) -> dict:
        return gpu.about(self.device)

    def sizes(self) -> dict:
        """What is read in a step: numbers of weights, and those of a token's keys and values."""
        model = _model(self._size)
        weights = model.num_parameters() - model.pos_emb.weight.numel()
        return {"weights": weights, "cached": 2 * model.cfg.n_layers * model.cfg.emb_dim}

    def _generate(self, task, new):
        from tinygrad_llm.generate import Decoder, generate

        if task.dtype not in self._models:
            self._models[task.dtype] = _model(self._size).to(self.device).to(task.dtype)
        model = self._models[task.dtype]
        if task not in self._decoders:  # its step is recorded once, as the peers' compile once
            self._decoders[task] = Decoder(model)
        decoder = self._decoders[task]
        decoder.forget()
        prompts = task.prompts(model.cfg.vocab_size)
        return generate(model, prompts, new, temperature=0, decoder=decoder)


class _Torch(_Player):
    """What both peers have in common; compiled on a GPU only."""

    def __init__(self, device: str, size: str):
        import torch

        self.torch, self.device, self._size = torch, torch.device(device), size
        self.mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._models = {}

    def _model(self, dtype):
        if dtype not in self._models:
            made = self._made().to(self.device).to(getattr(self.torch, dtype))
            self._models[dtype] = made.eval()
        return self._models[dtype]

    def _prompts(self, task, vocab):
        return self.torch.from_numpy(task.prompts(vocab)).to(self.device)


class Plain(_Torch):
    """The GPT of torch_gpt.py with its static cache."""

    def _made(self):
        from .torch_gpt import same_model

        self._loops = {}
        return same_model(_model(self._size))

    def _generate(self, task, new):
        from .torch_gpt import Greedy

        model = self._model(task.dtype)
        if task not in self._loops:
            length = task.prompt + task.new
            self._loops[task] = Greedy(model, task.batch, length, self.mode)
        ids = self._prompts(task, model.tok_emb.num_embeddings)
        return self._loops[task].generate(ids, new).cpu().numpy()


class Transformers(_Torch):
    """GPT2LMHeadModel with cache_implementation="static", which compiles its step on a GPU."""

    def _made(self):
        from tinygrad_llm.random import Generator

        from .generate import models

        return models(self._size, Generator(0))[1]

    def _generate(self, task, new):
        from transformers import CompileConfig

        model = self._model(task.dtype)
        ids = self._prompts(task, model.config.vocab_size)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        options |= {"bos_token_id": None, "attention_mask": self.torch.ones_like(ids)}
        if self.mode is not None:
            options["compile_config"] = CompileConfig(mode=self.mode, dynamic=False)
        text = model.generate(ids, max_new_tokens=new, cache_implementation="static", **options)
        return text.cpu().numpy()


PEERS = {"PyTorch, static cache": Plain, "transformers": Transformers}


class Players(dict):
    """name -> Worker of whoever can take part. Nobody works after the deadline."""

    def __init__(self, device: str, size: str, deadline: float):
        where = "cpu" if device == "interpret" else device
        factories = dict(PEERS)
        if not machine.installed("transformers"):
            del factories["transformers"]
        self.missing = [name for name in PEERS if name not in factories]
        self["ours"] = Worker(Ours, device, size, deadline=deadline)
        for name, factory in factories.items():
            self[name] = Worker(factory, where, size, deadline=deadline)

    def close(self) -> None:
        for worker in self.values():
            worker.close()


# --- measuring ------------------------------------------------------------------------------------


def measure_all(players: Players, tasks, rounds: int, say) -> list[dict]:
    sizes = players["ours"].call("sizes")
    return [measure_task(players, task, rounds, sizes, say) for task in tasks]


def measure_task(players, task: Task, rounds: int, sizes: dict, say) -> dict:
    """Texts, then turns."""
    say(f"measuring {task}")
    texts, problems, alike = {}, {}, {}
    for name, player in players.items():
        try:
            texts[name] = player.call("text", task)  # which compiles and records
        except WorkerError as error:
            problems[name] = str(error)
    if "ours" in texts:
        for name, text in texts.items():
            if name != "ours":
                alike[name] = int((text == texts["ours"]).all(axis=1).sum())
    calls = {name: partial(players[name].call, "turn", task) for name in texts}
    wholes, steps, late = _turns(calls, rounds, task)
    size = 4 if task.dtype == "float32" else 2  # bytes
    seen = task.batch * (task.prompt + task.new / 2)  # tokens in the cache, on average
    moved = size * (sizes["weights"] + sizes["cached"] * seen)
    results = {
        name: wholes[name].to_dict()
        | {
            "tokens_per_second": task.batch * task.new / wholes[name].median,
            "step_seconds": steps[name].median,
            "bytes_per_second": moved / steps[name].median,
        }
        for name in wholes
    }
    for name in set(results) - {"ours"} if "ours" in results else ():
        results[name]["ratio"] = Ratio.of(wholes[name], wholes["ours"]).to_dict()
        results[name]["step_ratio"] = Ratio.of(steps[name], steps["ours"]).to_dict()
    return {
        "task": str(task),
        "dtype": task.dtype,
        "batch": task.batch,
        "bytes": moved,
        "results": results,
        "alike": alike,
        "problems": problems | late,
        "missing": players.missing,
    }


def _turns(calls, rounds, task):
    """(name -> a text's Timing, name -> a further token's, name -> why there is none)."""
    firsts = {name: [] for name in calls}

    def keeping(name, call):
        found = call()
        firsts[name].append(found["first"])
        return found

    named = {name: partial(keeping, name, call) for name, call in calls.items()}
    wholes, _, problems = gpu.take_turns(named, rounds)
    steps = {
        name: whole.minus(Timing.of(firsts[name])).per(task.new - 1)
        for name, whole in wholes.items()
    }
    return wholes, steps, problems


# --- reporting ------------------------------------------------------------------------------------


def table(found: dict, ceilings: gpu.Ceilings) -> Table:
    columns = ["greedy", "all", "tokens/s", "a further token", "of the bandwidth", "ratio", "alike"]
    rows = Table(found["task"], columns)
    for name, result in found["results"].items():
        share, ratio = "", result.get("step_ratio")
        if ceilings.bandwidth:
            share = f"{result['bytes_per_second'] / ceilings.bandwidth:.0%}"
        alike = f"{found['alike'][name]} of {found['batch']}" if name in found["alike"] else ""
        rows.rows.append([
            name,
            duration(result["seconds"]["median"]),
            f"{result['tokens_per_second']:,.0f}",
            duration(result["step_seconds"]),
            share,
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
            alike,
        ])  # fmt: skip
    for name, why in found["problems"].items():
        rows.rows.append([name, why[:60], *[""] * (len(columns) - 2)])
    return rows


def notes(tasks, seconds: float) -> list[str]:
    lines = [
        "a further token: all, less the same with a single new token, per token. bandwidth: each "
        "weight read once and the keys and values of the tokens so far, over the time of a further "
        "token, of what the data sheet says. ratio: of a further token, above 1 ours is faster. "
        "alike: rows with the same text as ours; in float32 all of them, but for near ties.",
    ]
    for found in tasks:
        ratio = found["results"].get("transformers", {}).get("step_ratio")
        if ratio:
            lines.append(
                f"{found['task']}: {ratio['median']:.2f} times transformers (the target is "
                f"{TARGET})."
            )
    if tasks and tasks[0]["missing"]:
        lines.append(f"Not installed, and so left out: {', '.join(tasks[0]['missing'])}.")
    return [*lines, f"The whole took {seconds:.0f} s."]


def failures(tasks) -> list[str]:
    """What makes the figures worthless."""
    found = []
    for task in tasks:
        if "ours" in task["problems"]:
            found.append(f"{task['task']}: {task['problems']['ours']}")
        if task["dtype"] == "float32":
            found += [
                f"{task['task']}: {name}'s text is ours in {rows} of {task['batch']} rows only"
                for name, rows in task["alike"].items()
                if rows < ALIKE * task["batch"]
            ]
    return found
