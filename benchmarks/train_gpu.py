"""Training GPT-2 on a GPU: our step, captured as a CUDA graph, against PyTorch eager and compiled,
from the same weights on the same tokens. Each lives in a process of its own and gives back the
memory of a step after its turn, so that each has the whole GPU to itself.
"""

import contextlib
import gc
import json
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from . import gpu
from .report import Table, duration
from .worker import OutOfMemoryError, Worker, WorkerError

LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
SIZES = {
    "tiny": {"emb_dim": 16, "n_layers": 1, "n_heads": 1, "context_length": 8},  # that it runs
    "gpt2": {},
}
SMALL = {"vocab_size": 512, "emb_dim": 128, "n_layers": 4, "n_heads": 4, "context_length": 128}
FLOAT32_LIMIT = 1e-4  # for ten losses of the CPU and of the GPU, relative
TARGETS = {"tokens per second": 520_000, "torch.compile": 1.15}


def config(size: str, vocab: int, **others) -> dict:
    """Of a model, as a dictionary: it is sent to other processes."""
    return {"vocab_size": vocab, "qkv_bias": True, "drop_rate": 0.0, **SIZES[size], **others}


def _model(config):
    """Our GPT on the CPU. Its weights are numbers of bfloat16, so that all start from the same."""
    from tinygrad_llm.gpt import GPT, GPTConfig
    from tinygrad_llm.random import Generator

    model = GPT(GPTConfig.from_name("gpt2", **config), Generator(0))
    return model.to("bfloat16").to("float32")


def token_batches(vocab: int, shape: tuple, count: int):
    """(ids, targets), each (B, T) int64, so often. Small ids are frequent: there is something to
    learn.
    """
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = (vocab * rng.random((shape[0], shape[1] + 1)) ** 4).astype(np.int64)
        yield np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


def flops_per_token(config) -> float:
    """6 N + 12 L C T: forward and backward, as nanoGPT and PaLM count them. N leaves the table of
    positions out, and attention counts as if it were not causal.
    """
    from tinygrad_llm.gpt import GPTConfig

    cfg = GPTConfig.from_name("gpt2", **config)
    n = cfg.num_parameters() - cfg.parameter_counts()["position embeddings"]
    return 6 * n + 12 * cfg.n_layers * cfg.emb_dim * cfg.context_length


# --- who is measured ------------------------------------------------------------------------------


class _Contestant:
    """What ours and PyTorch's have in common. `_start(batch, **options)` gives (step, finish):
    step(ids, targets) launches an update, finish() waits for it and returns its loss.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, config: dict):
        from tinygrad_llm.gpt import GPTConfig

        self.config, self.cfg = config, GPTConfig.from_name("gpt2", **config)
        self.model = self.optimizer = None

    def _trained_on(self, batch, count, **options):
        """(step, finish, batches) of the model, with its first weights unless it has some."""
        if self.model is None:
            self._reset()
        shape = batch, self.cfg.context_length
        pairs = token_batches(self.cfg.vocab_size, shape, count)
        return *self._start(batch, **options), [self._prepared(*pair) for pair in pairs]

    def turn(self, batch: int, steps: int, seconds: float, **options) -> dict:
        """Seconds per step, in blocks of `steps` that end with waiting for the device, and the peak
        of memory.
        """
        try:
            step, finish, given = self._trained_on(batch, 4, **options)

            def run():
                for i in range(steps):
                    step(*given[i % len(given)])

            for _ in range(2):  # which compiles and records, and wakes the clocks
                run()
                finish()
            durations = gpu.blocks(run, finish, seconds, self.clock)
            return {"seconds": [d / steps for d in durations], **self._memory()}
        finally:
            step = finish = run = given = None
            self._release()

    def losses(self, batch: int, steps: int, **options) -> list[float]:
        """From the first weights on, one batch after the other."""
        self.model = None
        try:
            step, finish, given = self._trained_on(batch, steps, **options)
            found = []
            for pair in given:
                step(*pair)
                found.append(finish())
            return found
        finally:
            step = finish = given = None
            self._release()

    def profile(self, batch: int, steps: int, **options) -> dict:
        """Where the time of a step goes: see `traced`."""
        try:
            step, finish, (pair,) = self._trained_on(batch, 1, **options)
            for _ in range(3):
                step(*pair)
            finish()
            return traced(lambda: [step(*pair) for _ in range(steps)], finish, steps)
        finally:
            step = finish = pair = None
            self._release()


class Ours(_Contestant):
    """tinygrad_llm: weights of bfloat16, float32 masters, the Trainer's step."""

    def __init__(self, device: str, config: dict):
        from tinygrad_llm import device as devices

        super().__init__(config)
        self.device = devices.device(device)
        self.device.make_current()

    def _reset(self):
        self.model = self.optimizer = None  # two at a time would count
        self.model, self.optimizer = self._trainable("bfloat16")

    def _trainable(self, dtype, config=None, device=None):
        from tinygrad_llm.optim import AdamW, decay_groups

        model = _model(config or self.config).to(dtype).to(device or self.device)
        return model, AdamW(decay_groups(model, DECAY), lr=LR, betas=BETAS)

    def about(self) -> dict:
        return gpu.about(self.device)

    def _start(self, batch, graph=True):
        self._made = _make_step(self.model, self.optimizer, graph)
        made = self._made
        return lambda *batch: made.start(batch, LR), lambda: made.finish()[0]

    def _prepared(self, ids, targets):
        return ids, targets

    def _memory(self):
        """Bytes of both pools: what they hold is what was needed at the peak, and a little more."""
        held = self._made.memory() or 0
        from tinygrad_llm import backend

        found = {"memory": held, "reserved": held, "no graph": self._made.why_no_graph}
        return {**found, "refused": sorted({op for op, _ in backend.refusals})}

    def _release(self):
        self._made = None
        gc.collect()  # a step and its graph know each other
        gpu.give_back(self.device)

    def float32(self, config: dict, batch: int, steps: int) -> dict:
        """The losses of a float32 model on the CPU and on the device."""
        found = {}
        for where in ("cpu", self.device):
            model, optimizer = self._trainable("float32", config, where)
            step, shape = _make_step(model, optimizer), (batch, model.cfg.context_length)
            losses = found["cpu" if where == "cpu" else "gpu"] = []
            for ids, targets in token_batches(model.cfg.vocab_size, shape, steps):
                step.start((ids, targets), LR)
                losses.append(step.finish()[0])
        model = optimizer = step = None
        self._release()
        return found

    def profile(self, batch: int, steps: int) -> dict:
        try:
            return super().profile(batch, steps)
        except ValueError:  # CUPTI may take a graph for one thing
            return super().profile(batch, steps, graph=False)


def _make_step(model, optimizer, graph=True):
    from tinygrad_llm.parallel import Shards
    from tinygrad_llm.random import Generator
    from tinygrad_llm.step import make_step

    settings = {"accumulate": 1, "max_norm": CLIP, "generator": Generator(0), "shards": Shards(1)}
    return make_step(model, optimizer, graph=graph, **settings)


class Theirs(_Contestant):
    """PyTorch as nanoGPT uses it: float32 weights, autocast to bfloat16, the fused AdamW.

    mode    of torch.compile; None: eager
    """

    def __init__(self, device: str, config: dict, mode: str | None = None):
        import torch

        super().__init__(config)
        self.torch, self.device, self.mode = torch, torch.device(device), mode
        self.attention, self.without = {}, {}  # batch -> the fastest; name -> why it is not

    def _reset(self):
        from .torch_gpt import same_model

        self.model = self.optimizer = self.loss = None  # two at a time would count
        self.model = same_model(_model(self.config)).to(self.device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = self.torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
        self.loss = self.model.loss
        if self.mode is not None:
            self.loss = self.torch.compile(self.loss, mode=self.mode, dynamic=False)

    def _start(self, batch, float32=False):
        torch, context, self.batch = self.torch, contextlib.nullcontext, batch
        if self.device.type == "cuda":
            if not float32:
                context = self._best_attention(batch)
            torch.cuda.reset_peak_memory_stats()
        narrow = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=not float32)

        def step(ids, targets):
            ids, targets = (x.to(self.device, non_blocking=True) for x in (ids, targets))
            with context():
                with narrow():
                    loss = self.loss(ids, targets)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._last = loss.detach()

        return step, lambda: self._last.item()

    def _prepared(self, ids, targets):
        tensors = [self.torch.from_numpy(x) for x in (ids, targets)]
        return [x.pin_memory() for x in tensors] if self.device.type == "cuda" else tensors

    def _best_attention(self, batch):
        """A context with the fastest backend of scaled_dot_product_attention at this size."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        if batch not in self.attention:
            times = {}
            for name, backend in backends.items():
                try:
                    with sdpa_kernel(backend):
                        times[name] = self._attention_seconds(batch)
                except RuntimeError as error:
                    if "out of memory" in str(error).lower():
                        raise
                    self.without[name] = str(error).splitlines()[0][:100]
            if not times:
                raise ValueError(f"no backend of PyTorch's attention works: {self.without}")
            self.attention[batch] = min(times, key=times.get)
            self.torch.cuda.empty_cache()
        return partial(sdpa_kernel, backends[self.attention[batch]])

    def _attention_seconds(self, batch):
        """Forward and backward of one layer's, laid out as in the model."""
        torch, cfg = self.torch, self.cfg
        shape = batch, cfg.context_length, 3 * cfg.emb_dim
        qkv = torch.randn(shape, dtype=torch.bfloat16, device=self.device, requires_grad=True)
        q, k, v = (
            a.view(*shape[:2], cfg.n_heads, -1).transpose(1, 2) for a in qkv.split(cfg.emb_dim, -1)
        )
        gradient = torch.randn_like(q)

        def run():
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), gradient)

        for _ in range(3):
            run()
        return min(gpu.blocks(run, torch.cuda.synchronize, 0.05, self.clock))

    def _memory(self):
        if self.device.type != "cuda":
            return {}
        cuda = self.torch.cuda
        found = {"memory": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
        return found | {"attention": self.attention.get(self.batch), "without": self.without}

    def _release(self):
        self._last = None
        if self.optimizer is not None:  # it may be what there was no room for
            self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()


# --- where the time goes --------------------------------------------------------------------------


def traced(run, synchronize, steps: int) -> dict:
    """What the device did in run(), which is `steps` steps: see by_kernel. CUPTI tells PyTorch's
    profiler, and sees all kernels of the process, CuPy's, Triton's and those in a graph, too.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return by_kernel(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], steps)


def by_kernel(events: list[dict], steps: int) -> dict:
    """{"kernels": [{name, calls, seconds, share}, ...], "idle": seconds, "span": seconds}, each of
    one step, the longest first. idle: nothing ran on the GPU. ValueError if there are no kernels.
    """
    ran = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not ran:
        raise ValueError("the profiler saw no kernels: CUPTI may be refused here")
    seconds, calls = defaultdict(float), defaultdict(int)
    for event in ran:
        seconds[event["name"]] += event["dur"] * 1e-6 / steps
        calls[event["name"]] += 1
    ran.sort(key=lambda event: event["ts"])
    first = end = ran[0]["ts"]
    idle = 0.0
    for event in ran:  # two may overlap
        idle += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    total = sum(seconds.values())
    rows = [
        {"name": n, "calls": calls[n] / steps, "seconds": s, "share": s / total}
        for n, s in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return {
        "kernels": rows,
        "span": (end - first) * 1e-6 / steps,
        "idle": idle * 1e-6 / steps,
    }


def profile_table(who: str, found: dict, most: int = 40) -> Table:
    """The longest, and what is left in a line."""
    columns = ["kernel", "calls", "together", "each", "share"]
    if "problem" in found:
        return Table(f"{who}, batch {found['batch']}: {found['problem']}", columns)
    table = Table(
        f"{who}, batch {found['batch']}: a step by kernel, {duration(found['span'])}, of which "
        f"{duration(found['idle'])} idle",
        columns,
    )
    rows, rest = found["kernels"][:most], found["kernels"][most:]
    if rest:
        total = {key: sum(row[key] for row in rest) for key in ("calls", "seconds", "share")}
        rows = [*rows, {"name": f"{len(rest)} others", **total}]
    for row in rows:
        each = duration(row["seconds"] / row["calls"])
        cells = [f"{row['calls']:g}", duration(row["seconds"]), each, f"{row['share']:.1%}"]
        table.rows.append([row["name"][:60], *cells])
    return table


def profile(arena: "Arena", batches, steps: int, say) -> dict:
    """Ours and torch.compile's step by kernel, at the largest of these batch sizes that fits."""
    data = {}
    for name in ("ours", COMPILED):
        for batch in sorted(batches, reverse=True):
            say(f"profiling {name} at batch {batch}")
            try:
                data[name] = arena[name].call("profile", batch, steps) | {"batch": batch}
            except WorkerError as error:
                data[name] = {"problem": str(error), "batch": batch}
                arena.drop(name)
                if isinstance(error, OutOfMemoryError):
                    continue
            break
    return data


# --- measuring ------------------------------------------------------------------------------------


def attempt(compare, *arguments) -> dict:
    """What it found, or {"problem": why}: the rest can be measured all the same."""
    try:
        return compare(*arguments)
    except WorkerError as error:
        return {"problem": str(error)}


COMPILED = "torch.compile"
EXTRA_MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")


class Arena:
    """Who is measured, each made when first asked for. Nobody works after the deadline.

    compiled    whether torch.compile takes part: it takes too long for a test
    """

    def __init__(self, device: str, config: dict, deadline: float, compiled: bool = True):
        self.device, self.config, self.deadline, self.compiled = device, config, deadline, compiled
        self._workers = {}
        for name in self.names():
            self[name]  # they start side by side

    def __getitem__(self, name: str) -> Worker:
        if name not in self._workers:
            factory, given = Ours, (self.device, self.config)
            if name != "ours":
                where = "cpu" if self.device == "interpret" else self.device
                modes = {"PyTorch eager": None, COMPILED: "default"}
                mode = modes.get(name, name.removeprefix(f"{COMPILED} "))
                factory, given = Theirs, (where, self.config, mode)
            self._workers[name] = Worker(factory, *given, deadline=self.deadline)
        return self._workers[name]

    def names(self) -> list[str]:
        """Of those in every race."""
        return ["ours", "PyTorch eager", *([COMPILED] if self.compiled else [])]

    def drop(self, name: str) -> None:
        """Ends it: its weights leave the GPU."""
        if name in self._workers:
            self._workers.pop(name).close()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def race(arena: Arena, names, batch: int, rounds: int, steps: int, seconds: float) -> dict:
    """Those take turns at this batch size. "ours, launched" is ours without a graph."""
    calls = {}
    for name in names:
        worker, options = arena[name.partition(",")[0]], {}
        if name == "ours, launched":
            options = {"graph": False}
        calls[name] = partial(worker.call, "turn", batch, steps, seconds, **options)
    times, last, problems = gpu.take_turns(calls, rounds)
    for name in problems:
        arena.drop(name.partition(",")[0])  # with all the memory that it may hold yet
    ratios, tokens = gpu.ratios(times), batch * _context(arena.config)
    results = {}
    for name, timing in times.items():
        rate = tokens / timing.median
        results[name] = timing.to_dict() | {"tokens_per_second": rate}
        kept = ("memory", "reserved", "attention", "without", "no graph", "refused")
        results[name] |= {key: last[name][key] for key in kept if last[name].get(key)}
        if name in ratios:
            results[name]["ratio"] = ratios[name].to_dict()
    return {"batch": batch, "results": results, "problems": problems}


def _context(config):
    from tinygrad_llm.gpt import GPTConfig

    return GPTConfig.from_name("gpt2", **config).context_length


def compare_losses(arena: Arena, batch: int, steps: int) -> dict:
    """The loss curves of ours and of PyTorch, and how far each is from PyTorch's in float32."""
    names = ("ours", "PyTorch eager")
    curves = {name: arena[name].call("losses", batch, steps) for name in names}
    truth = arena["PyTorch eager"].call("losses", batch, steps, float32=True)
    apart = {name: gpu.largest_difference(losses, truth) for name, losses in curves.items()}
    to_eager = gpu.largest_difference(curves["ours"], curves["PyTorch eager"])
    limit = max(3 * apart["PyTorch eager"], 1e-3)
    return {
        "batch": batch,
        "curves": curves | {"PyTorch float32": truth},
        "from float32": apart,
        "ours from PyTorch eager": to_eager,
        "limit": limit,
        "agree": apart["ours"] <= limit,
    }


def compare_devices(arena: Arena, config: dict, batch: int, steps: int) -> dict:
    """The losses of a small float32 model on the CPU and on the GPU."""
    losses = arena["ours"].call("float32", config, batch, steps)
    relative = gpu.largest_difference(losses["gpu"], losses["cpu"])
    return losses | {"relative": relative, "agree": relative <= FLOAT32_LIMIT}


def race_all(arena: Arena, batches, say, **settings) -> list[dict]:
    """A race for each batch size, the smallest first; whoever has failed at one is left out of the
    larger ones. settings: those of `race`.
    """
    races, names = [], arena.names()
    for batch in sorted(batches):
        if names and time.monotonic() < arena.deadline:
            say(f"batch {batch}: {', '.join(names)}")
            races.append(race(arena, names, batch, **settings))
            names = [name for name in names if name not in races[-1]["problems"]]
    return races


def race_extras(arena: Arena, races, say, **settings) -> list[dict]:
    """With what time is left, those that would take too long at each batch size."""
    fit = [r["batch"] for r in races if "ours" in r["results"]]
    if not fit:
        return []
    extras = [("ours, launched", fit[0])]
    if arena.compiled:
        extras += [(f"{COMPILED} {m}", at) for m, at in zip(EXTRA_MODES, (fit[0], fit[-1]))]
    found = []
    for name, batch in extras:
        if time.monotonic() < arena.deadline:
            say(f"batch {batch}: {name}")
            found.append(race(arena, ["ours", name], batch, **settings))
            if name.startswith(COMPILED):
                arena.drop(name)
    return found


# --- reporting ------------------------------------------------------------------------------------

COLUMNS = ["a training step", "median", "tokens/s", "MFU", "peak memory", "reserved", "ratio"]


def tables(races, flops: float, ceilings: gpu.Ceilings) -> list[Table]:
    return [_table(found, flops, ceilings) for found in races]


def _table(found, flops, ceilings):
    table = Table(f"batch {found['batch']}", COLUMNS)
    for name, result in found["results"].items():
        rate, ratio = result["tokens_per_second"], result.get("ratio")
        attention = f", {result['attention']} attention" if result.get("attention") else ""
        table.rows.append([
            name + attention,
            duration(result["seconds"]["median"]),
            f"{rate:,.0f}",
            f"{rate * flops / ceilings.flops:.1%}" if ceilings.flops else "",
            *(gpu.gib(result.get(kind, 0)) for kind in ("memory", "reserved")),
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "",
        ])  # fmt: skip
    for name, why in found["problems"].items():
        table.rows.append([name, why[:60], *[""] * (len(COLUMNS) - 2)])
    return table


def notes(data, seconds: float) -> list[str]:
    """What the tables mean, and what was reached."""
    return [
        "ratio: their time / ours, above 1 ours is faster; medians of the rounds, quartiles. MFU: "
        "6 N + 12 L C T operations for a token over what the data sheet allows. memory: PyTorch's "
        "is what it had allocated at most, ours all that its pools hold.",
        *_agreement(data["losses"], data["float32"]),
        *_reached(data["races"]),
        *(f"Batch {batch}: not raced, for want of time or of memory." for batch in data["left"]),
        f"The whole took {seconds:.0f} s.",
    ]


def _agreement(losses, float32):
    """How the losses compare; nothing for what could not be compared."""
    if "problem" not in losses:
        apart = ", ".join(f"{name} {x:.1e}" for name, x in losses["from float32"].items())
        yield (
            f"{len(losses['curves']['ours'])} losses at batch {losses['batch']}, largest relative "
            f"difference from PyTorch in float32: {apart}; {losses['limit']:.1e} is allowed. Ours "
            f"from PyTorch eager: {losses['ours from PyTorch eager']:.1e}."
        )
    if "problem" not in float32:
        yield (
            f"{len(float32['cpu'])} losses of a small model in float32, GPU against CPU: "
            f"{float32['relative']:.1e} relative; {FLOAT32_LIMIT:g} is allowed."
        )


def _reached(races):
    """The targets."""
    ours = [r["results"]["ours"] for r in races if "ours" in r["results"]]
    if not ours:
        return ["Ours was not measured: no target is reached."]
    best = max(result["tokens_per_second"] for result in ours)
    lines = [f"{best:,.0f} tokens/s at best; the target is {TARGETS['tokens per second']:,}."]
    for found in races:
        mine, compiled = (found["results"].get(name) for name in ("ours", COMPILED))
        if mine and compiled:
            less = mine.get("memory", 0) <= compiled.get("memory", 0)
            lines.append(
                f"Batch {found['batch']}: {compiled['ratio']['median']:.2f} times torch.compile "
                f"(the target is {TARGETS[COMPILED]}), {'no' if less else 'MORE'} more memory."
            )
    lines += [f"OURS HAD NO GRAPH: {why}" for why in {r.get("no graph") for r in ours} if why]
    refused = sorted({op for r in ours for op in r.get("refused", ())})
    return lines + [f"NO KERNEL TOOK SOME CALLS OF {op}: see backend.refusals" for op in refused]


def failures(data) -> list[str]:
    """What makes the figures worthless."""
    found = []
    for name, other in (("losses", "PyTorch's"), ("float32", "the CPU's losses")):
        if not data[name].get("agree"):
            problem = data[name].get("problem", "too far apart")
            found.append(f"our {name} beside {other}: {problem}")
    for r in data["races"]:
        why = r["problems"].get("ours", "out of memory")
        if why not in ("out of memory", "out of time"):
            found.append(f"ours at batch {r['batch']}: {why}")
    return found
