"""`tinygrad-llm finetune`: a model that can write learns a task."""

import typer

from .classify import classify
from .instruct import instruct

finetune = typer.Typer(
    help="Teach a trained model a task: to classify texts, or to follow instructions."
)
finetune.command()(classify)
finetune.command()(instruct)
