"""How much memory a GPT takes: for training and for generation, on the CPU and on a GPU."""

from dataclasses import replace
from typing import Any

from .. import backend
from ..device import Device
from ..gpt import GPTConfig
from ..parallel import LARGE
from ..precision import dtype as dtype_named

UNITS = ("B", "KiB", "MiB", "GiB")
QUERIES = 64  # that attention's kernel takes at a time of a short context,
SHORT = 128  # which is one up to which it keeps probabilities
CHUNK = 2**30  # bytes of logits that a GPU keeps at a time, in at least as many rows:
CHUNK_ROWS = 2048


def check_memory(where: Device, needed: int, what_to_change: str) -> None:
    """Raises ValueError for what does not fit into the device's memory."""
    known = where.memory()
    for name in ("free", "total"):
        if known.get(name, needed) < needed:
            raise ValueError(
                f"this needs about {in_bytes(needed)}, and {where.name} has "
                f"{in_bytes(known[name])}{' that are free' * (name == 'free')}: {what_to_change}"
            )


def training_bytes(
    cfg: GPTConfig,
    options: dict[str, Any],
    where: Device,
    numbers: tuple[int, int] | None = None,
) -> int:
    """Bytes that training takes at its peak, about: weights, gradients, AdamW's state, and what
    the forward pass keeps.

    options     those of `train`
    numbers     how many numbers train and how many there are; None: all of a GPT's
    """
    on_gpu = where.name != "cpu" and backend.current.reading.off is not None  # with its kernels
    size = dtype_named(options["dtype"]).itemsize
    trained, everything = numbers or (cfg.num_parameters(),) * 2
    states = size * everything + _state_bytes(cfg, options, on_gpu, size) * trained
    tokens = options["batch_size"] * cfg.context_length
    block, ends = _kept(cfg, kept_on_gpu if on_gpu else kept_numbers)
    head = tokens * ends * size + _logits_bytes(cfg, tokens, on_gpu, size)
    if not options["recompute"]:
        return states + tokens * cfg.n_layers * block * size + head
    inputs = tokens * cfg.n_layers * cfg.emb_dim * size  # of all blocks, and one in full
    return states + inputs + max(head, tokens * block * size)


def _state_bytes(cfg, options, on_gpu, size):
    """Of each parameter that trains: gradients, AdamW's two means, the float32 copy of 16 bits."""
    dropout = any(map(cfg.dropout, ("emb", "attn", "shortcut")))
    whole = on_gpu or dropout or cfg.num_parameters() > LARGE
    shares = 1 if whole else min(options["threads"], options["batch_size"])
    gradients = shares * (size if on_gpu else 4)
    if options["accumulate"] > 1:
        gradients += 4  # their sum
    return gradients + 2 * 4 + (4 if size < 4 else 0)


def _logits_bytes(cfg, tokens, on_gpu, size):
    """What the output head needs beside what is kept."""
    if not on_gpu:  # of 16 bits, the gradient in both dtypes, and a float32 copy
        return 0 if size == 4 else tokens * cfg.vocab_size * (size + 8)
    row = cfg.vocab_size * size
    chunk = min(tokens, max(CHUNK_ROWS, CHUNK // row))
    return chunk * row + 4 * cfg.vocab_size * cfg.emb_dim  # and the head's gradient


def _kept(cfg, numbers):
    """(numbers of one block, of all that is no block) that are kept of each token."""
    one, two = (numbers(replace(cfg, n_layers=n)) for n in (1, 2))
    return two - one, 2 * one - two


def kept_on_gpu(cfg: GPTConfig) -> int:
    """Numbers that a forward pass with the GPU's kernels keeps of each token, but for its logits.

    In a block, in units of the width C: two norms (2), q, k and v (3), what attention gives (1) and
    its projection (1), the feed-forward layer before and after GELU (8) and its projection (1), two
    sums (2). A few numbers of each norm, and one of each head.
    """
    C = cfg.emb_dim
    block = 18 * C + cfg.n_heads + 6
    if cfg.dropout("shortcut"):
        block += 2 * C  # two products; masks are drawn again
    return cfg.n_layers * block + (4 if cfg.dropout("emb") else 3) * C


def kept_numbers(cfg: GPTConfig) -> int:
    """Numbers that a forward pass keeps of each token of a full context, for the backward pass.

    In a block, in units of the width C: two norms (2), q, k and v (3), what attention gives and its
    projection (2), the feed-forward layer's 4 C after GELU and its derivative there (8), and the
    layer's projection (1), two sums (2). Three numbers of each norm, one
    of each head; and of short contexts each head's probabilities, half of which a causal mask
    leaves out. The logits, once.
    """
    C, T, H = cfg.emb_dim, cfg.context_length, cfg.n_heads
    of_attention = H * ((T + min(T, QUERIES)) // 2 + 1) if T <= SHORT else H
    block = 18 * C + 6 + of_attention
    if cfg.dropout("shortcut"):
        block += 4 * C  # two masks, two products
    if cfg.dropout("attn"):
        block += H * T  # a mask
    ends = 3 * C + 3 + (2 * C if cfg.dropout("emb") else 0) + cfg.vocab_size
    return cfg.n_layers * block + ends


def generation_bytes(cfg: GPTConfig, rows: int, dtype: str) -> int:
    """Bytes of the weights, and of the keys and values of `rows` texts as long as can be."""
    numbers = cfg.num_parameters() + rows * cfg.context_length * 2 * cfg.n_layers * cfg.emb_dim
    return dtype_named(dtype).itemsize * numbers


def in_bytes(n: int) -> str:
    """In the largest unit of which it has one: 96 B, 1.50 KiB."""
    unit = min(len(UNITS) - 1, max(0, n.bit_length() - 1) // 10)
    return f"{n / 2 ** (10 * unit):.{2 if unit else 0}f} {UNITS[unit]}"
