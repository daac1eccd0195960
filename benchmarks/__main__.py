"""The command line, from the repository's root:

    python -m benchmarks ops | train | techniques | lora | generate | shakespeare | spam | verdict |
                         tokenizer | load | gradcheck | kernels

Each command sets the number of threads first and imports the rest afterwards: see machine.py.
"""

import os
import sys
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import machine
from .measure import Method
from .report import RESULTS, Result

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Threads = Annotated[int, typer.Option(min=1, help="Threads of ours and of PyTorch.")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that each alternative gets.")]
Save = Annotated[bool, typer.Option("--save", help="Write JSON and Markdown into --results.")]
Results = Annotated[Path, typer.Option(metavar="DIR", help="Where --save writes.")]
Size = StrEnum("Size", ["tiny", "small", "gpt2"])
Text = StrEnum("Text", ["tiny", "gpt2"])
Chip = StrEnum("Chip", ["80", "86", "89", "90", "100", "120"])
Model = StrEnum(
    "Model",
    [("tiny", "tiny"), ("nano", "nanogpt-cpu"), ("default", "default-job"), ("gpt2", "gpt2")],
)
Where = StrEnum("Where", ["cpu", "cuda", "interpret"])
Place = Annotated[Where, typer.Option(metavar="cpu|cuda", help="Where both compute.")]
Minutes = Annotated[float, typer.Option(min=0.0, help="On a GPU: what is not done by then is not.")]


@app.callback()
def about():
    """Speed and quality in figures. A ratio above 1 means that ours is faster than PyTorch."""


@app.command()
def ops(
    size: Annotated[list[Size], typer.Option(help="Shapes; may be repeated.")] = [  # noqa: B006
        Size.small,
        Size.gpt2,
    ],
    rounds: Rounds = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long a turn lasts, about.")] = 0.03,
    length: Annotated[int, typer.Option(min=1, help="Ops in a chain on the tape.")] = 1000,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """The tape's cost for each op, and the ops of a GPT one by one."""
    description = prepare(threads, True, save, results)
    method = Method.for_threads(threads, rounds, seconds)
    from .ops import measure_size
    from .tape import measure_tape, note

    sizes = [s.value for s in size]
    data, tables, notes = {}, [], [RATIO_NOTE]
    say("measuring the tape")
    data["tape"], chain = measure_tape(method, length)
    tables.append(chain)
    notes.append(note(data["tape"]))
    for name in sizes:
        say(f"measuring the ops of {name}")
        data[name], more = measure_size(name, method)
        tables += more
    settings = {"rounds": rounds, "length": length, "sizes": ", ".join(sizes)}
    finish(Result("ops", settings, data, tables, notes), description, save, results)


@app.command()
def train(
    model: Annotated[
        list[Model] | None,
        typer.Option(help="Models; may be repeated. Without: all but tiny; on a GPU: gpt2."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of each; 9, of gpt2 5, on a GPU 3.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps in a turn, about: 10, of gpt2 1; on a GPU in a block: 5."),
    ] = None,
    check: Annotated[
        int | None,
        typer.Option(min=1, help="Losses that must agree first: 10, of gpt2 2, on a GPU 20."),
    ] = None,
    device: Place = Where.cpu,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Rows of gpt2; may be repeated. On the CPU they share 1,024 tokens; without: 4 "
            "and 1. On a GPU each has 1,024; without: 8, 16, 32 and 64.",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="On the CPU: race torch.compile, too.")
    ] = True,
    vocab: Annotated[int, typer.Option(min=2, help="On a GPU: 50304, or GPT-2's 50257.")] = 50304,
    profile: Annotated[
        bool, typer.Option("--profile", help="On a GPU: only which kernels a step spends time in.")
    ] = False,
    peak: Annotated[
        float | None, typer.Option(min=1, help="On a GPU: its TFLOP/s in bfloat16, for the MFU.")
    ] = None,
    minutes: Minutes = 9,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """Whole training steps of ours and of PyTorch, side by side, and where ours spends the time."""
    if profile and device is not Where.cuda:
        fail("--profile needs --device cuda")
    if device is not Where.cpu:
        if model not in (None, [Model.gpt2], [Model.tiny]):
            fail("on a GPU --model is gpt2")
        size, counts = (model or [Model.gpt2])[0].value, (rounds or 3, steps or 5, check or 20)
        batches = batch or [8, 16, 32, 64]
        return train_on_gpu(
            device.value, size, counts, batches, vocab, profile, peak, minutes, save, results
        )
    models = model or [Model.nano, Model.default, Model.gpt2]
    if batch and Model.gpt2 not in models:
        fail("--batch is for --model gpt2; the other models have one of their own")
    check_torch()
    description = prepare(threads, False, save, results)  # PyTorch is in other processes
    check_kernels()
    from . import train as job
    from .worker import WorkerError

    try:
        settings = job.settings([m.value for m in models], batch)
    except ValueError as error:
        fail(str(error))
    data, tables, notes = {}, [], [RATIO_NOTE, TRAIN_NOTE]
    for name, (setting, amount) in settings.items():
        say(f"measuring {name}")
        amount = job.Amount(*(n or d for n, d in zip((rounds, steps, check), amount)))
        try:
            data[name], more, notes_on_it = job.measure_setting(
                name, setting, amount, threads, compiled
            )
        except (ValueError, WorkerError) as error:
            fail(f"{name}: {error}", code=1)
        tables += more
        notes += notes_on_it
    result = Result("train", {"models": ", ".join(data)}, data, tables, notes)
    finish(result, description, save, results)
    if save:
        from .picture import draw

        path = draw(data, machine.sentence(description), result.path(results, description, ".png"))
        print(f"saved {path}")


def train_on_gpu(device, size, counts, batches, vocab, profile, peak, minutes, save, results):
    """The same of GPT-2 on a GPU; exits with 1 if ours computes something else, or cannot."""
    started = time.monotonic()
    description = prepare_gpu(device, save, results)
    from . import gpu
    from . import train_gpu as job

    rounds, steps, check = counts
    config, real = job.config(size, vocab), device == "cuda"
    arena = job.Arena(device, config, started + 60 * minutes, compiled=real)
    settings = {"model": size, "vocabulary": vocab, "rounds": rounds, "steps": steps}
    settings |= gpu.versions()
    try:
        description |= arena["ours"].call("about")
        if profile:
            data = job.profile(arena, batches, steps, say)
            tables = [job.profile_table(name, found) for name, found in data.items()]
            result = Result("train --profile", settings, data, tables, width=140)
            return finish(result, description, save, results)
        say("comparing losses")
        small = {**config, **job.SMALL} if real else config
        data = {"losses": job.attempt(job.compare_losses, arena, min(batches), check)}
        race = {"rounds": rounds, "steps": steps, "seconds": 1.0 if real else 0.0}
        data["races"] = job.race_all(arena, batches, say, **race)
        data["left"] = sorted(set(batches) - {found["batch"] for found in data["races"]})
        say("comparing float32 with the CPU's")
        rows = 8 if real else 1
        data["float32"] = job.attempt(job.compare_devices, arena, small, rows, check // 2)
        data["races"] += job.race_extras(arena, data["races"], say, **race)
    except gpu.WorkerError as error:
        fail(str(error), code=1)
    finally:
        arena.close()
    data["flops_per_token"] = flops = job.flops_per_token(config)
    tables = job.tables(data["races"], flops, gpu.Ceilings.of(description["gpu"], peak))
    notes = job.notes(data, time.monotonic() - started)
    finish(Result("train", settings, data, tables, notes, width=140), description, save, results)
    if failed := job.failures(data):
        fail("; ".join(failed), code=1)


@app.command()
def generate(
    size: Annotated[Text, typer.Option(help="The model; its weights are random.")] = Text.gpt2,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows; may be repeated: 1 and 8, on a GPU 1 and 64."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    new: Annotated[
        int | None, typer.Option(min=2, help="Tokens that each prompt gets: 64, on a GPU 256.")
    ] = None,
    rounds: Rounds = 5,
    device: Place = Where.cpu,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.01, help="On a GPU: its memory's TB/s.")
    ] = None,
    minutes: Minutes = 9,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """Generation with a cache of keys and values, ours and transformers', side by side."""
    if device is not Where.cpu:
        task = batch or [1, 64], prompt, new or 256
        return generate_on_gpu(
            device.value, size.value, *task, rounds, bandwidth, minutes, save, results
        )
    batch, new = batch or [1, 8], new or 64
    description, method = prepare(threads, True, save, results), Method.for_threads(threads, rounds)
    if not machine.installed("transformers"):
        fail("this needs transformers to compare with: pip install -e '.[test]'")
    check_kernels()
    from tinygrad_llm.random import Generator

    from .generate import Task, config, measure_task, models

    if prompt + new > (context := config(size.value).context_length):
        fail(
            f"--prompt {prompt} and --new {new} exceed {size.value}'s context of {context} tokens: "
            "choose fewer"
        )
    say("making the models")
    pair = models(size.value, Generator(0))
    data, tables = {}, []
    for rows in batch:
        say(f"measuring batch {rows}")
        try:
            data[f"batch {rows}"], more = measure_task(*pair, Task(rows, prompt, new), method)
        except ValueError as error:
            fail(str(error), code=1)
        tables += more
    settings = {"model": size.value, "prompt": prompt, "new": new, "rounds": rounds}
    settings |= {"transformers": machine.installed("transformers")}
    notes = [GENERATE_NOTE, RATIO_NOTE.replace("PyTorch", "transformers")]
    finish(Result("generate", settings, data, tables, notes), description, save, results)


def generate_on_gpu(device, size, batches, prompt, new, rounds, bandwidth, minutes, save, results):
    """The same on a GPU, in float32 and bfloat16; exits with 1 if ours writes something else."""
    started = time.monotonic()
    description = prepare_gpu(device, save, results)
    from . import generate_gpu as job
    from . import gpu

    players = job.Players(device, size, started + 60 * minutes)
    settings = {"model": size, "prompt": prompt, "new": new, "rounds": rounds} | gpu.versions()
    try:
        description |= players["ours"].call("about")
        ceilings = gpu.Ceilings.of(description["gpu"], terabytes=bandwidth)
        tasks = [
            job.Task(rows, prompt, new, dtype) for dtype in job.DTYPES for rows in sorted(batches)
        ]
        data = {"tasks": job.measure_all(players, tasks, rounds, say)}
    except gpu.WorkerError as error:
        fail(str(error), code=1)
    finally:
        players.close()
    tables = [job.table(found, ceilings) for found in data["tasks"]]
    notes = job.notes(data["tasks"], time.monotonic() - started)
    finish(Result("generate", settings, data, tables, notes, width=140), description, save, results)
    if failed := job.failures(data["tasks"]):
        fail("; ".join(failed), code=1)


GENERATE_NOTE = (
    "weights: their bytes over the time of a step, in which each is read once. The bound: what "
    "this machine's memory gives in the same run, to the head's product, which reads its matrix "
    "once, or to a dot product of 256 MiB with itself, whichever is faster."
)


@app.command()
def techniques(
    size: Annotated[Text, typer.Option(help="Shapes.")] = Text.gpt2,
    rounds: Rounds = 9,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """What each technique of docs/speed.md gains: the same result without it and with it."""
    description, method = (
        prepare(threads, False, save, results),
        Method.for_threads(threads, rounds),
    )
    from .techniques import NOTE, measure

    try:
        data, table = measure(size.value, method, threads)
    except ValueError as error:
        fail(str(error), code=1)
    settings = {"size": size.value, "rounds": rounds}
    finish(Result("techniques", settings, data, [table], [NOTE]), description, save, results)


@app.command()
def shakespeare(
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, with seeds 0, 1, ...")] = 1,
    eval_batches: Annotated[int, typer.Option(min=1, help="Batches of validation text.")] = 200,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """nanoGPT's CPU setting on tiny Shakespeare: the validation loss after 2,000 steps."""
    description = prepare(threads, False, save, results)
    from . import shakespeare as job

    try:
        text = job.read(os.environ.get("TINYGRAD_LLM_DATA"))
    except FileNotFoundError as error:
        fail(str(error))
    runs, clock = [], Method.for_threads(threads, rounds=1).clock
    for seed in range(seeds):
        runs.append(job.measure_seed(text, steps, seed, eval_batches, threads, clock, say))
    worst = max(run["validation_loss"] for run in runs)
    note = f"Worst validation loss: {worst:.4f}; the target is {job.TARGET}, nanoGPT reports 1.88."
    settings = {"steps": steps, "seeds": seeds, "eval_batches": eval_batches}
    result = Result("shakespeare", settings, {"runs": runs}, [job.table(runs, steps)], [note])
    finish(result, description, save, results)


@app.command()
def spam(
    steps: Annotated[int, typer.Option(min=1, help="Of pretraining.")] = 800,
    epochs: Annotated[int, typer.Option(min=1, help="Of fine-tuning.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind, seeds 0, 1, ...")] = 3,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """A small GPT learns what spam is: accuracy, time and memory, with LoRA and without."""
    description = prepare(threads, False, save, results)
    from . import spam as job

    try:
        data = job.read(os.environ.get("TINYGRAD_LLM_DATA"))
    except FileNotFoundError as error:
        fail(str(error))
    with tempfile.TemporaryDirectory() as folder:
        say("pretraining")
        seconds, runs = job.pretrain(Path(folder), ["--steps", str(steps)], threads), []
        for seed in range(seeds):
            for kind in job.KINDS:
                say(f"{kind}, seed {seed}")
                runs.append(job.tune(Path(folder), kind, data, epochs, seed, threads))
    worst = min(run["accuracy"] for run in runs if run["kind"] == "all weights")
    trains = [f"{run['kind']}: {run['trains']}." for run in runs[: len(job.KINDS)]]
    notes = [
        f"Worst accuracy with all weights: {worst:.2%}; the target is {job.TARGET:.0%}.",
        "New texts: those of the test that are not also in the training part. In all: the whole "
        "command, with Python's start, saving and testing. Medians over the seeds.",
        *trains,
    ]
    settings = {"steps": steps, "epochs": epochs, "seeds": seeds}
    data = {"pretraining_seconds": seconds, "runs": runs}
    result = Result("spam", settings, data, [job.table(runs, seconds, epochs)], notes)
    finish(result, description, save, results)


@app.command()
def verdict(
    size: Annotated[Text, typer.Option(help="The model.")] = Text.gpt2,
    epochs: Annotated[int, typer.Option(min=1, help="Times through the text.")] = 10,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """The book's run: GPT-2 124M on a short story. Exit code 1 if the losses are not low enough."""
    description = prepare(threads, False, save, results)
    from . import verdict as job

    try:
        tokenizer, text = job.read()
    except (OSError, ValueError) as error:
        fail(str(error))
    clock = Method.for_threads(threads, rounds=1).clock
    data = job.measure_run(tokenizer, text, size.value, epochs, clock, say)
    settings = {"model": size.value, "epochs": epochs}
    result = Result("verdict", settings, data, [job.table(data)], [job.note(data)])
    finish(result, description, save, results)
    if not data["reached"]:
        fail("the losses are not as low as they should be", code=1)


@app.command()
def tokenizer(
    merges: Annotated[int, typer.Option(min=1, help="What BPE learns.")] = 5000,
    characters: Annotated[
        int | None, typer.Option(min=1, help="Of each corpus, no more than these.")
    ] = None,
    rounds: Rounds = 5,
    threads: Threads = 1,
    save: Save = False,
    results: Results = RESULTS,
):
    """Training BPE on two corpora, and encoding through ours and by tiktoken itself."""
    description = prepare(threads, False, save, results)
    method = Method.for_threads(threads, rounds)
    from . import tokenizer as job

    notes = [job.NOTE]
    known = job.read_gpt2(notes)
    texts = {name: text[:characters] for name, text in job.read_corpora(notes).items()}
    try:
        data, tables = job.measure(texts, merges, known, method, say)
    except ValueError as error:
        fail(str(error), code=1)
    versions = {name: machine.installed(name) or "none" for name in ("tiktoken", "tokenizers")}
    settings = {"merges": merges, "rounds": rounds, **versions}
    finish(Result("tokenizer", settings, data, tables, notes), description, save, results)


@app.command()
def gradcheck(
    op: Annotated[
        list[str] | None, typer.Option(help="Ops; may be repeated. Without: every op.")
    ] = None,
    cases: Annotated[int, typer.Option(min=2, help="Arguments to try each op with.")] = 16,
    threads: Threads = 1,
    save: Save = False,
    results: Results = RESULTS,
):
    """Which planted bugs PyTorch's gradient checker finds, and which ones ours finds."""
    description = prepare(threads, True, save, results)
    clock = Method.for_threads(threads, rounds=1).clock
    from .gradcheck import TABLE, measure_bugs, measure_sizes

    if unknown := sorted(set(op or ()) - set(TABLE)):
        fail(f"no op named {', '.join(unknown)}")
    data, tables, notes = measure_bugs(op or list(TABLE), cases, clock, say)
    say("checking large arrays")
    data["large arrays"], more = measure_sizes(clock)
    settings = {"ops": ", ".join(op or ["all"]), "cases": cases}
    finish(Result("gradcheck", settings, data, [*tables, more], notes), description, save, results)


@app.command()
def lora(
    model: Annotated[list[Size], typer.Option(help="Models; may be repeated.")] = [  # noqa: B006
        Size.small,
        Size.gpt2,
    ],
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    rounds: Rounds = 5,
    threads: Threads = 2,
    save: Save = False,
    results: Results = RESULTS,
):
    """LoRA against training all weights: what trains, a step's time, peak memory (Linux only)."""
    if not sys.platform.startswith("linux"):
        fail("this reads the memory of processes from /proc, which only Linux has")
    description, method = (
        prepare(threads, False, save, results),
        Method.for_threads(threads, rounds),
    )
    from .lora import NOTE, measure_setting

    data, tables, names = {}, [], [m.value for m in model]
    for name in names:
        say(f"measuring {name}")
        try:
            data[name], table = measure_setting(name, rank, method, threads)
        except ValueError as error:
            fail(str(error), code=1)
        tables.append(table)
    settings = {"models": ", ".join(names), "rank": rank, "rounds": rounds}
    finish(Result("lora", settings, data, tables, [NOTE]), description, save, results)


@app.command()
def load(
    size: Annotated[str, typer.Option(help="gpt2, gpt2-medium, ...: weights are random.")] = "gpt2",
    rounds: Rounds = 9,
    threads: Threads = 1,
    save: Save = False,
    results: Results = RESULTS,
):
    """Loading a model beside reading its file's bytes, the memory that it takes, and saving."""
    description = prepare(threads, False, save, results)
    from tinygrad_llm.gpt import SIZES

    from .loading import measure_size

    if size not in SIZES:
        fail(f"no size {size}; choose one of {', '.join(SIZES)}")
    data, table, note = measure_size(size, rounds, threads)
    settings = {"size": size, "rounds": rounds}
    finish(Result("load", settings, data, [table], [note]), description, save, results)


@app.command()
def kernels(
    only: Annotated[
        list[str] | None, typer.Option(help="Workloads with this in their name; may be repeated.")
    ] = None,
    rounds: Rounds = 5,
    minutes: Annotated[float, typer.Option(min=0.0, help="What has not begun by then is not.")] = 9,
    tests: Annotated[bool, typer.Option(help="Run the GPU's tests first.")] = True,
    tune: Annotated[bool, typer.Option(help="Search tile sizes; --save ships them.")] = False,
    compile_only: Annotated[
        bool, typer.Option("--compile", help="Compile and inspect all of it, without a GPU.")
    ] = False,
    chip: Annotated[
        list[Chip] | None,
        typer.Option(help="With --compile; may be repeated. Without: 80, 90 and 100."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="With --compile: every candidate for every chip.")
    ] = False,
    variants: Annotated[
        bool, typer.Option(help="With --compile: options of the kernels that are not raced, too.")
    ] = True,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --compile; 2 if not said otherwise.")
    ] = None,
    expected: Annotated[
        Path | None,
        typer.Option("--roofline", metavar="PNG", help="Draw what an H200's data sheet allows."),
    ] = None,
    save: Save = False,
    results: Results = RESULTS,
):
    """The GPU kernels: raced against PyTorch on a GPU, or compiled and inspected without one."""
    started = time.monotonic()
    if expected and (compile_only or tune or save):
        fail("--roofline draws what a data sheet allows: it goes with no other option")
    if compile_only and tune:
        fail("--tune needs a GPU, --compile does without: choose one of them")
    if not compile_only and (chip or every or processes or not variants):
        fail("--chip, --all, --no-variants and --processes go with --compile")
    if expected:
        return draw_roofline(expected)
    check_folder(save, results)
    check_triton()
    if compile_only:
        return compile_kernels(only, chip, every, variants, processes or 2, save, results)
    from .kernels import race
    from .kernels.workloads import catalogue

    workloads = matching(catalogue(), only, "workload")
    gpu = race_ready()
    description = machine.describe(threads=1) | {"gpu": gpu.name}
    method = race.OnDevice(rounds, seconds=0.02, gpu=gpu)
    data, notes, failed = {}, [], []
    if tests:
        say("running the GPU's tests")
        data["tests"] = race.run_tests()
        failed = [name for name, found in data["tests"].items() if not found["passed"]]
        notes += [f"{name}: {found['said']}" for name, found in data["tests"].items()]
    if tune:
        race.tune(workloads, gpu, say, afresh=not only, ship=save)
    data["roofline"] = race.measure_roofline(gpu, method)
    deadline = started + 60 * minutes
    data["kernels"] = race.run_all(workloads, gpu, method, data["roofline"], deadline, say)
    failed += [result["name"] for result in data["kernels"] if result["problem"]]
    notes = race.notes(data["kernels"], data["roofline"], time.monotonic() - started) + notes
    settings = {"rounds": rounds, "only": ", ".join(only or ["all"])} | race.versions()
    tables = [race.table(data["kernels"])]
    result = Result("kernels", settings, data, tables, notes, width=180)
    finish(result, description, save, results)
    if save:
        from .kernels.picture import draw

        title = f"{gpu.name}, {', '.join(f'{k} {v}' for k, v in race.versions().items())}"
        path = result.path(results, description, ".png")
        print(f"saved {draw(data['kernels'], data['roofline'], title, path)}")
    if failed:
        fail(f"failed: {', '.join(failed)}", code=1)


def draw_roofline(path: Path) -> None:
    """A picture of what to expect, without a GPU."""
    from .kernels.picture import draw_expected

    if path.is_dir() or not path.suffix:
        fail(f"{path} is not the name of a picture; give a path such as roofline.png")
    try:
        draw_expected(path)
    except (OSError, ValueError) as error:  # no such folder, no such kind of picture
        fail(f"{path}: {error}; give a path such as roofline.png")
    print(f"saved {path}")


def check_triton():
    """That it is there, new enough, and can be imported to compile."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported: not yet
    found = machine.installed("triton")
    hint = "pip install -e '.[test]'"
    if not found:
        fail(f"this needs Triton: {hint}")
    if tuple(map(int, found.split(".")[:2])) < (3, 6):
        fail(f"this needs Triton 3.6 or newer, not {found}: {hint}")
    try:
        import triton  # noqa: F401
    except Exception as error:
        fail(f"Triton {found} cannot be imported ({error}): {hint}")


def race_ready():
    """The GPU or, without one, a line that says what is missing."""
    hint = "`python -m benchmarks kernels --compile` works without"
    if not machine.installed("torch"):
        fail(f"this needs PyTorch to compare with and an NVIDIA GPU; {hint}")
    import torch

    if not torch.cuda.is_available():
        fail(f"this needs an NVIDIA GPU and a PyTorch with CUDA; {hint}")
    from .kernels.race import Gpu

    return Gpu(torch)


def matching(found, only, what):
    """Those with one of these texts in their names."""
    chosen = [x for x in found if not only or any(text in x.name for text in only)]
    return chosen or fail(f"no {what} has {' or '.join(map(repr, only))} in its name")


def compile_kernels(only, chip, every, variants, processes, save, results):
    """The gate: exits with 1 if a kernel is not what it should be."""
    from .kernels import gate
    from .kernels.chips import DEFAULT

    started = time.monotonic()
    workloads = matching(gate.covered(variants, every or bool(only)), only, "workload")
    chips = [int(c) for c in chip or DEFAULT]
    tasks = gate.plan(workloads, chips, every, turns=not only)
    found = gate.compile_all(tasks, processes, say)
    failures = gate.failures(found)
    summary = (
        f"{len(found)} kernels for sm_{', sm_'.join(map(str, chips))} "
        f"in {time.monotonic() - started:.0f} s; {len(failures)} problems."
    )
    settings = {"triton": machine.installed("triton"), "candidates": "all" if every else "some"}
    data = {"kernels": gate.data(found)}
    result = Result("kernels --compile", settings, data, gate.tables(found), [summary], width=220)
    finish(result, machine.describe(threads=1), save, results)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


RATIO_NOTE = (
    "ratio: PyTorch's time / ours, above 1 ours is faster; the median over the rounds and, in "
    "parentheses, the quartiles. best: the same of the fastest tenth of the calls."
)


TRAIN_NOTE = (
    "peak memory: of a process of its own for each, less what it had before there was a model; its "
    "ratio is PyTorch's over ours. floor: the operations of the matrix products at the speed of a "
    "large one, and the bytes of all else, each array read or written once, at that of a large "
    "copy; small arrays stay in caches, and can be faster. Ours by phase: under the profiler, the "
    "mean over the threads."
)


def prepare(threads: int, peer: bool, save: bool, results: Path) -> dict:
    """Threads first, then the machine's description, before there is any load of our own."""
    check_folder(save, results)
    if peer:
        check_torch()
    machine.limit_threads(threads, torch=peer)
    return machine.describe(threads)


def check_kernels() -> None:
    """Whether TINYGRAD_LLM_KERNELS asks for something that there is."""
    from tinygrad_llm import backend

    try:
        _ = backend.current.reading
    except ValueError as error:
        fail(str(error))


def check_torch() -> None:
    if not machine.installed("torch"):
        fail("this needs PyTorch to compare with: pip install -e '.[test]'")


def prepare_gpu(device: str, save: bool, results: Path) -> dict:
    """The machine's description, if both can compute there; one line if not."""
    check_folder(save, results)
    if device == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    from .gpu import why_not

    machine.limit_threads(1)
    if reason := why_not(device):
        fail(reason)
    return machine.describe(threads=1)


def check_folder(save: bool, folder: Path) -> None:
    """Before hours of work, not after: whether the results can be written."""
    if save:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            fail(f"{folder} cannot be written to ({error.strerror}): choose another --results")


def finish(result: Result, description: dict, save: bool, folder: Path) -> None:
    """Shows, and saves if asked to."""
    result.notes += filter(None, [machine.warning(description)])
    result.show(description)
    if save:
        paths = result.save(folder, description)
        print("saved " + ", ".join(map(str, paths)))


def say(message: str) -> None:
    """What is going on, apart from the results. No live display: that would take time, too."""
    print(message, file=sys.stderr)


def fail(message: str, code: int = 2) -> None:
    """One line, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
