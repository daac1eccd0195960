"""The book's first training run: GPT-2 124M learns a short story, the-verdict, in ten epochs. Its
author asks for a training loss below 1 and a validation loss below 7.
"""

from collections.abc import Callable

import numpy as np

from tinygrad_llm import random
from tinygrad_llm.data import DataLoader, corpus_path, create_dataloader, read_corpus
from tinygrad_llm.generate import evaluating, generate
from tinygrad_llm.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW
from tinygrad_llm.tokenizer import Tokenizer, gpt2

from .measure import Spread
from .report import Table, duration

TARGET = {"train_loss": 1.0, "val_loss": 7.0}  # nats for a token, after the last evaluation
BOOK = {  # step: the losses that the book prints, of a run on an Apple GPU
    0: (9.817, 9.924),
    5: (8.066, 8.332),
    10: (6.619, 7.042),
    20: (5.524, 6.508),
    40: (3.879, 6.130),
    60: (2.104, 6.133),
    85: (0.569, 6.373),
}
SIZES = {"tiny": {"emb_dim": 16, "n_heads": 2, "n_layers": 1}, "gpt2": {}}  # tiny: that it runs
SEED, CONTEXT, BATCH = 123, 256, 2
EVAL_INTERVAL, EVAL_BATCHES = 5, 5
START = "Every effort moves you"


def read() -> tuple[Tokenizer, str]:
    """What it trains on. Raises ConnectionError, ValueError: what is missing, and what to do."""
    return gpt2(), read_corpus(corpus_path("the-verdict"))


def loaders(tokenizer: Tokenizer, text: str) -> tuple[DataLoader, DataLoader]:
    """Batches (2, 256) of the first 90 % of the characters, shuffled, and of the rest."""
    split = int(0.9 * len(text))
    train, val = (tokenizer.encode_array(part) for part in (text[:split], text[split:]))
    options = {"batch_size": BATCH, "max_length": CONTEXT, "stride": CONTEXT}
    return (
        create_dataloader(train, **options, shuffle=True, drop_last=True),
        create_dataloader(val, **options, shuffle=False, drop_last=False),
    )


def measure_run(
    tokenizer: Tokenizer,
    text: str,
    size: str,
    epochs: int,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> dict:
    """Trains; returns the losses every five steps, a sample after each epoch, and the times."""
    train_loader, val_loader = loaders(tokenizer, text)
    random.manual_seed(SEED)  # draws the weights, then the batches' order and the dropout masks
    cfg = GPTConfig(context_length=CONTEXT, drop_rate=0.1, tie_weights=False, **SIZES[size])
    model = GPT(cfg, init="torch")
    optimizer = AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    prompt = tokenizer.encode(START)
    step, tokens, started = -1, 0, clock()
    log, samples, seconds = [], [], []
    for epoch in range(1, epochs + 1):
        for ids, targets in train_loader:
            start = clock()
            optimizer.zero_grad()
            model.loss(ids, targets).backward()
            optimizer.step()
            seconds.append(clock() - start)
            step, tokens = step + 1, tokens + ids.size
            if step % EVAL_INTERVAL == 0:
                train, val = mean_loss(model, train_loader), mean_loss(model, val_loader)
                say(f"Ep {epoch} (Step {step:06}): Train loss {train:.3f}, Val loss {val:.3f}")
                at = {"epoch": epoch, "step": step, "tokens": tokens}
                log.append({**at, "train_loss": train, "val_loss": val})
        ids = generate(model, prompt, 50, temperature=0)[0]
        samples.append(tokenizer.decode(ids).replace("\n", " "))
        say(samples[-1])
    return {
        "log": log,
        "samples": samples,
        "target": TARGET,
        "reached": all(log[-1][name] < limit for name, limit in TARGET.items()),
        "seconds": clock() - started,
        "step_seconds": vars(Spread.of(seconds)),
    }


def mean_loss(model: GPT, loader: DataLoader, batches: int = EVAL_BATCHES) -> float:
    """Over the loader's first batches, at most so many, without dropout."""
    with evaluating(model):
        losses = [model.loss(*batch).item() for batch, _ in zip(loader, range(batches))]
    return float(np.mean(losses))


def table(result: dict) -> Table:
    """One row for each evaluation, beside what the book prints."""
    columns = ["step", "epoch", "tokens", "training loss", "validation loss", "the book's"]
    rows = []
    for at in result["log"]:
        losses = [f"{at[name]:.3f}" for name in ("train_loss", "val_loss")]
        book = " / ".join(f"{loss:.3f}" for loss in BOOK.get(at["step"], ()))
        rows.append([f"{at['step']}", f"{at['epoch']}", f"{at['tokens']:,}", *losses, book])
    return Table("GPT-2 124M learns the-verdict", columns, rows)


def note(result: dict) -> str:
    """Whether the losses are where the author wants them, and how long it took."""
    bar = "reached" if result["reached"] else "not reached"
    s = Spread(**result["step_seconds"])
    return (
        f"Training loss below {TARGET['train_loss']:g} and validation loss below "
        f"{TARGET['val_loss']:g}: {bar}. A step takes {duration(s.median)} "
        f"({duration(s.low)} - {duration(s.high)}), all of it {result['seconds'] / 60:.1f} "
        "minutes, evaluation and samples included."
    )
