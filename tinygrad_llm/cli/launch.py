"""Training on the command line: from a run that is opened to its last step, or to Ctrl-C."""

import signal
import sys
from collections.abc import Callable

import typer

from .. import backend
from ..device import Device
from ..train import Training, plot_training
from .device import chosen, enough_memory
from .errors import user_input
from .log import summary_writer
from .memory import in_bytes
from .run import PLOT, Run
from .screen import Clock, Screen

SAMPLE_EVERY = 3  # evaluations


def given_options(ctx: typer.Context) -> set[str]:
    """Names of the options on the command line, as opposed to defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source.name == "COMMANDLINE"}


def launch(
    opened: Callable[[Device], Run],
    going_on: bool,
    tensorboard: bool,
    device: str | None,
    kernels: str,
    screen: Screen,
) -> int:
    """Opens a run, new or (going_on) saved, on the device of that name, and trains; returns the
    exit code.
    """
    run = None
    try:
        with user_input(saved=going_on):
            if tensorboard:
                summary_writer()  # before anything else: is there one?
            where, said = chosen(device, kernels)
            with enough_memory(where, "use a smaller model or a smaller --batch-size"):
                run = opened(where)
        screen.say(said)
        return _train(run, screen)
    except KeyboardInterrupt:  # before the first step, or the second one after it
        return _say_stopped(run, going_on)


def _train(run: Run, screen: Screen) -> int:
    """Trains to the end or to Ctrl-C; returns the exit code."""
    trainer, steps = run.trainer, run.trainer.settings.steps
    clock, said = Clock(trainer), False
    less = f"such a run takes about {in_bytes(run.memory)}; in a new one, {run.less}"
    less = f"{less}; what was saved is kept"
    memory, stopped = enough_memory(trainer.update.where, less), StopSignal()
    with memory, stopped as stop, screen.progress("training") as show:
        for report in trainer.run():
            if report.step and not said:
                _say_what_is_slow(trainer, screen)
                said = True
            with user_input():
                run.log.add(report)
            line = clock.line(report)
            show(report.step, steps, line)
            stopping = stop.received
            if report.val_loss is not None or stopping:
                with user_input():
                    run.save()
            if report.val_loss is not None:
                screen.line(line)
                if not screen.quiet and _sample_is_due(trainer) and (sample := run.sample()):
                    screen.say(f"\n{sample}\n")
            if stopping:
                break
        with user_input():
            plot_training(run.directory / PLOT, run.log.reports(), run.loss_of)
            run.log.close()
    if not trainer.finished:
        return _say_interrupted(run)
    _say_done(run, clock, screen)
    with enough_memory(trainer.update.where, less), user_input():
        run.finish(screen)
    screen.result(run.directory)
    return 0


def _sample_is_due(trainer: Training) -> bool:
    """With every third validation loss, and at the end."""
    often = trainer.step > 0 and trainer.step % (SAMPLE_EVERY * trainer.settings.eval_interval) == 0
    return often or trainer.finished


def _say_what_is_slow(trainer: Training, screen: Screen) -> None:
    """What keeps a GPU from its best, after the first step, if anything does."""
    if trainer.update.why_no_graph:
        screen.say(f"steps are launched kernel by kernel: {trainer.update.why_no_graph}")
    for op, why in backend.refusals:
        screen.say(f"{op}: no kernel takes it ({why}); its own lines run in its place")


def _say_done(run: Run, clock: Clock, screen: Screen) -> None:
    trainer = run.trainer
    step, val_loss = trainer.evaluations[-1]
    done = "stopped early" if trainer.out_of_patience else "done"
    screen.say(f"{done}: validation loss {val_loss:.3f} after {step:,} steps, {clock.elapsed()}")
    if (memory := trainer.update.memory()) is not None:
        screen.say(f"peak memory: {in_bytes(memory)} on {trainer.model.device}")
    best, lowest = trainer.best
    if best == step:
        return
    if trainer.settings.patience is not None:
        screen.say(f"the model is that of step {best:,}, with the lowest: {lowest:.3f}")
    else:
        screen.say(f"it was lowest after {best:,}: {lowest:.3f}; --patience keeps that model")


def _say_interrupted(run: Run) -> int:
    done = f"stopped after {run.trainer.step} steps and saved"
    print(f"{done}; go on with: {run.resume_command()}", file=sys.stderr)
    return 130


def _say_stopped(run: Run | None, going_on: bool) -> int:
    done = (
        "stopped, what was saved before is kept" if going_on else "stopped, nothing was saved yet"
    )
    if run:
        done = f"stopped at once; go on from the last checkpoint with: {run.resume_command()}"
    print(done, file=sys.stderr)
    return 130


class StopSignal:
    """In the block, the first Ctrl-C or SIGTERM only sets `received`; a second one interrupts."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True
