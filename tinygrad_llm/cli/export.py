"""`tinygrad-llm export`: a checkpoint in another dtype, in one file or in shards."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoint import export_checkpoint
from .device import Dtype
from .errors import user_input


def export(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, or its name on Hugging Face.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DST", help="A new directory.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the new files.")] = Dtype.float32,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Several files of at most so much: 500MB.")
    ] = None,
) -> int:
    """Write a checkpoint's weights in another dtype, with its tokenizer, for transformers, too."""
    with user_input():
        export_checkpoint(source, directory, str(dtype), max_shard_size)
    print(directory)
    return 0
