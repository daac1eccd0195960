"""The competitor: the same GPT in PyTorch, as a PyTorch user would write it for speed.

Parameters have the names and shapes of tinygrad_llm's, so that weights are copied in one line.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name for it)
from torch import nn

from .contestant import MAX_NORM, OPTIONS, Contestant
from .measure import Method

if TYPE_CHECKING:
    from tinygrad_llm.gpt import GPTConfig


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.emb_dim, 3 * cfg.emb_dim, bias=cfg.qkv_bias)
        self.out_proj = nn.Linear(cfg.emb_dim, cfg.emb_dim)

    def forward(self, x, cache=None, positions=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=-1)  # 3 of (B, T, C)
        q, k, v = (a.view(B, T, self.n_heads, -1).transpose(1, 2) for a in (q, k, v))
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            k, v = cache.put(positions, k, v)  # (B, H, length, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.up = nn.Linear(cfg.emb_dim, 4 * cfg.emb_dim)
        self.down = nn.Linear(4 * cfg.emb_dim, cfg.emb_dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.emb_dim)
        self.att = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.emb_dim)
        self.ff = FeedForward(cfg)

    def forward(self, x, *cached):
        x = x + self.att(self.norm1(x), *cached)
        return x + self.ff(self.norm2(x))


class TorchGPT(nn.Module):
    """ids (B, T) -> logits (B, T, V); the head is the table of token embeddings. No dropout."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.pos_emb = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = nn.LayerNorm(cfg.emb_dim)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tok_emb(ids) + self.pos_emb(positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.tok_emb.weight)

    def loss(self, ids, targets):
        logits = self(ids)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class _Cache(nn.Module):
    """Keys and values of a block. They are buffers: their addresses stay, as a CUDA graph needs."""

    def __init__(self, shape, like):
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.register_buffer("v", torch.zeros_like(self.k))

    def put(self, positions, k, v):
        self.k[:, :, positions] = k
        self.v[:, :, positions] = v
        return self.k, self.v


class Greedy(nn.Module):
    """Greedy text with a static cache: what a step does is always of the same shapes, so that
    torch.compile can make a CUDA graph of it.

    batch, length   rows, and the most tokens that a row gets, its prompt included
    mode            of torch.compile; None: eager
    """

    def __init__(self, model: TorchGPT, batch: int, length: int, mode: str | None):
        super().__init__()
        self.model, weight = model, model.tok_emb.weight
        heads = model.blocks[0].att.n_heads
        shape = batch, heads, length, weight.shape[1] // heads
        self.caches = nn.ModuleList(_Cache(shape, weight) for _ in model.blocks)
        self.register_buffer("places", torch.arange(length, device=weight.device))
        self._step = self.forward
        if mode is not None:
            self._step = torch.compile(self.forward, mode=mode, dynamic=False)

    def forward(self, ids, positions):
        """The tokens that follow ids (B, T), which stand at positions (T,) -> (B, 1)."""
        m = self.model
        mask = self.places <= positions[:, None]  # (T, length)
        x = m.tok_emb(ids) + m.pos_emb(positions)
        for block, cache in zip(m.blocks, self.caches, strict=True):
            x = block(x, cache, positions, mask)
        return F.linear(m.final_norm(x[:, -1:]), m.tok_emb.weight).argmax(-1)

    @torch.no_grad()
    def generate(self, ids, new: int):
        """ids (B, T) -> (B, T + new)."""
        T, text = ids.shape[1], [ids]
        text.append(self(ids, self.places[:T]))
        position = self.places[T : T + 1].clone()
        for _ in range(new - 1):
            # Cloned: the next launch of the graph writes over what this one has given.
            text.append(self._step(text[-1], position).clone())
            position += 1
        return torch.cat(text, 1)


def same_model(model) -> TorchGPT:
    """A TorchGPT with copies of the weights of a tinygrad_llm GPT that ties its head."""
    ours = model.state_dict()
    with torch.no_grad():
        peer = TorchGPT(model.cfg)
        peer.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in ours.items()})
    return peer


class Training(Contestant):
    """PyTorch's side of the race of training steps on the CPU: the fused AdamW.

    cfg         the numbers of a GPTConfig
    batch       ids and targets, (B, T) each
    compiled    whether torch.compile makes the loss and its gradient
    """

    def __init__(self, cfg: dict, batch, compiled: bool, threads: int, method: Method):
        torch.set_num_threads(threads)
        self.cfg, self.compiled = cfg, compiled
        self.batch = [torch.from_numpy(a) for a in batch]
        _warm_up(compiled)
        super().__init__(method)

    def load(self, weights: str) -> None:
        """Makes the model, with the weights of a file of safetensors."""
        from safetensors.torch import load_file

        self.model = TorchGPT(SimpleNamespace(**self.cfg))
        self.model.load_state_dict(load_file(weights))
        self.loss = self.model.loss
        if self.compiled:
            self.loss = torch.compile(self.loss, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIONS)

    def step(self) -> float:
        with self.phase("gradients"):
            self.optimizer.zero_grad()
            loss = self.loss(*self.batch)
            loss.backward()
            found = loss.item()
        with self.phase("clip"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        with self.phase("optimizer"):
            self.optimizer.step()
        return found


def _warm_up(compiled):
    """A small step, so that what PyTorch loads when it is first used is there, and does not count
    as the model's. Raises what torch.compile cannot do without, such as a C++ compiler.
    """
    x = nn.Parameter(torch.ones(8, 8))
    product = torch.compile(lambda a, b: (a @ b).exp(), dynamic=False) if compiled else torch.matmul
    product(x, x.tanh()).sum().backward()
    torch.optim.AdamW([x], fused=True).step()
