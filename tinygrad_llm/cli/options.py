"""Options that all commands have that train."""

from pathlib import Path
from typing import Annotated, Any

import typer

DATA, MODEL, TRAINING, RUN = "Data", "Model", "Training", "The run and its directory"


def option(help: str, panel: str, *names: str, **checks: Any) -> Any:
    """An option of a command, in one of the groups of its help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **checks)


Accumulate = Annotated[
    int,
    option("Batches in one step: a large batch in the memory of a small one.", TRAINING, min=1),
]
MinLR = Annotated[
    float | None, option("Learning rate at the end; without: a tenth of --lr.", TRAINING)
]
WeightDecay = Annotated[float, option("Pull of the matrices towards zero.", TRAINING, min=0)]
Patience = Annotated[
    int | None,
    option(
        "Stop after so many validation losses in a row that are no better than the best; the model "
        "that is saved is the best one. First given with --resume, it counts from there on.",
        TRAINING,
        min=1,
    ),
]
Recompute = Annotated[
    bool,
    option(
        "Save memory: compute activations twice instead of keeping them.", TRAINING, "--recompute"
    ),
]
Seed = Annotated[int, option("Repeats a run exactly, with the same --threads.", TRAINING, min=0)]
Threads = Annotated[
    int | None, option("Share out each step; without: one for each core, up to 4.", TRAINING, min=1)
]
Out = Annotated[
    Path | None, option("Where the results go. Without: runs/1, runs/2, ...", RUN, metavar="DIR")
]
ResumeFrom = Annotated[
    str | None,
    option(
        "Go on from an earlier checkpoint than the newest; later ones are renamed, and stay.",
        RUN,
        metavar="step-00000600",
    ),
]
Keep = Annotated[int, option("Checkpoints that are kept, the last ones.", RUN, min=1)]
Tensorboard = Annotated[
    bool, option("Write TensorBoard's events too, with tensorboardX.", RUN, "--tensorboard")
]
Quiet = Annotated[
    bool, option("Print errors and the directory of the results only.", RUN, "--quiet")
]


def resume_option(length: str) -> Any:
    """The option --resume of a command whose option `length` makes a run longer."""
    return option(
        f"Go on with the run in --out; {length} may be raised. Of a run that is done, it writes "
        "what is missing.",
        RUN,
        "--resume",
    )
