"""What is compiled and raced: kernels at the shapes of GPT-2 124M and its larger kin.

A workload takes arrays of any kind: tensors on a GPU for the race, Abstract ones for the compile
gate, tensors of the host for the interpreter. So what is inspected is what is raced. Nothing here
imports PyTorch: the functions that need it get it as their first argument.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


@dataclass(frozen=True)
class Input:
    """An array to come: normal numbers times `scale`, or integers from `low` to below - 1."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    scale: float = 1.0
    low: int = 0
    below: int | None = None

    def abstract(self):
        from tinygrad_llm.kernels.gpu.arrays import Abstract

        return Abstract(self.shape, self.dtype)

    def tensor(self, torch, device, generator):
        dtype = getattr(torch, self.dtype)
        if self.below is not None:
            options = {"generator": generator, "device": device, "dtype": dtype}
            return torch.randint(self.low, self.below, self.shape, **options)
        drawn = torch.randn(self.shape, generator=generator, device=device, dtype=torch.float32)
        return drawn.mul_(self.scale).to(dtype)

    @property
    def bytes(self):
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Workload:
    """One race.

    name            what is done, and the shape
    inputs          what it is done to
    ours            ours(*arrays) -> call; call() launches kernels and returns the outputs
    truth           truth(torch, outputs, *tensors) -> what the outputs should be, computed by
                    PyTorch's separate ops; `outputs` matter only where chance is at work
    peers           PyTorch's ways, by name: peer(torch, *tensors) -> call
    flops           floating-point operations that have to be done, for those limited by them
    bytes           the least that is read and written; None: all inputs and all outputs
    tensor_cores    whether it claims the chip's newest tensor cores, for the gate
    tma             whether it claims the copy engine, from Hopper on
    target          the ratio to the best of PyTorch that is aimed at
    part            cuts inputs and outputs alike to what is compared, if not everything
    raced           whether it is more than the gate's
    group           the kernels it belongs to, one of GROUPS: the catalogue says it
    """

    name: str
    inputs: tuple[Input, ...]
    ours: Callable
    truth: Callable
    peers: dict[str, Callable]
    flops: float = 0
    bytes: int | None = None
    tensor_cores: bool = False
    tma: bool = False
    target: float = 1.0
    part: Callable = field(default=lambda x: x)
    raced: bool = True
    group: str = ""

    @property
    def dtype(self):
        return self.inputs[0].dtype


# --- how the two sides are called -----------------------------------------------------------------


def kernel(where: str):
    """A kernel by "module.name"."""
    module, name = where.split(".")
    return getattr(import_module(f"tinygrad_llm.kernels.gpu.{module}"), name)


def our_forward(where, attributes):
    def prepare(*arrays):
        ours = kernel(where)
        return lambda: _several(ours.forward(*arrays, **attributes)[0])

    return prepare


def our_backward(where, attributes, wrt, outputs=1):
    """The gradients of the inputs `wrt`; the last arrays are those of the outputs."""

    def prepare(*arrays):
        inputs, g = arrays[:-outputs], arrays[-outputs:]
        ours, g = kernel(where), g if outputs > 1 else g[0]
        y, saved = ours.forward(*inputs, **attributes)
        needs = tuple(i in wrt for i in range(len(inputs)))

        def call():
            found = ours.vjp(g, y, *inputs, saved=saved, needs=needs, **attributes)
            return tuple(found[i] for i in wrt)

        return call

    return prepare


def their_forward(theirs, compiled=False):
    """theirs(torch, *tensors) -> y, as it is or through torch.compile."""

    def prepare(torch, *tensors):
        run = _bound(torch, theirs, compiled)

        def call():
            with torch.no_grad():
                return _several(run(*tensors))

        return call

    return prepare


def their_backward(theirs, wrt, outputs=1, compiled=False):
    """Only the way back: the graph is made once and kept."""

    def prepare(torch, *tensors):
        inputs, g = _leaves(tensors[:-outputs], wrt), tensors[-outputs:]
        y = _several(_bound(torch, theirs, compiled)(*inputs))
        g = [a.to(b.dtype) for a, b in zip(g, y)]
        wanted = [inputs[i] for i in wrt]
        return lambda: torch.autograd.grad(y, wanted, g, retain_graph=True)

    return prepare


def their_round(theirs, wrt, compiled=False):
    """Forward and backward, for a loss: the loss and the gradients."""

    def prepare(torch, *tensors):
        inputs = _leaves(tensors, wrt)
        run, wanted = _bound(torch, theirs, compiled), [inputs[i] for i in wrt]

        def call():
            y = run(*inputs)
            return (y.detach(), *torch.autograd.grad(y, wanted))

        return call

    return prepare


def truth_of(prepare):
    """What a peer computes, as a Workload's `truth`."""
    return lambda torch, outputs, *tensors: prepare(torch, *tensors)()


def _several(y):
    return tuple(y) if isinstance(y, tuple) else (y,)


def _leaves(tensors, wrt):
    return [x.detach().requires_grad_(i in wrt) for i, x in enumerate(tensors)]


def _bound(torch, theirs, compiled):
    def run(*tensors):
        return theirs(torch, *tensors)

    return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run


def _ways(race, theirs, *rest, compiled):
    """Eager PyTorch and, where there is something to fuse, torch.compile."""
    found = {"eager": race(theirs, *rest)}
    return found | ({"torch.compile": race(theirs, *rest, compiled=True)} if compiled else {})


def forward(name, where, inputs, theirs, *, attributes=None, compiled=True, **rest):
    """The race forward. `rest`: fields of Workload."""
    return Workload(
        name,
        inputs,
        our_forward(where, attributes or {}),
        truth_of(their_forward(theirs)),
        _ways(their_forward, theirs, compiled=compiled),
        **rest,
    )


def backward(name, where, inputs, theirs, *, g, wrt, attributes=None, compiled=True, **rest):
    """The race backward: from the gradients g of the outputs to those of the inputs `wrt`."""
    return Workload(
        name,
        (*inputs, *g),
        our_backward(where, attributes or {}, wrt, len(g)),
        truth_of(their_backward(theirs, wrt, len(g))),
        _ways(their_backward, theirs, wrt, len(g), compiled=compiled),
        **rest,
    )


def both(name, where, inputs, theirs, *, g, wrt, **rest):
    """Forward and backward of what moves bytes."""
    return [
        forward(f"{name} forward", where, inputs, theirs, **rest),
        backward(f"{name} backward", where, inputs, theirs, g=g, wrt=wrt, **rest),
    ]


# --- the catalogue --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    squares     the sides of square matrix products
    rows        tokens of a batch
    width       channels of the model
    vocabulary  rows of the embedding
    times       lengths of sequences; times_full: those that are raced without the mask, too
    channels    of all heads of attention together
    caches      of decode: sequences, heads, heads of keys, keys, their length
    layers, context    of the model whose parameters AdamW moves
    """

    squares: tuple[int, ...] = (4096, 8192)
    rows: int = 16384
    width: int = 768
    vocabulary: int = 50304
    times: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    times_full: tuple[int, ...] = (1024, 4096, 16384)
    channels: int = 2048
    caches: tuple[tuple, ...] = ((64, 12, 12, 1024, 64), (16, 32, 8, 8192, 128))
    layers: int = 12
    context: int = 1024


TINY = Sizes(
    squares=(48,),
    rows=24,
    width=32,
    vocabulary=80,
    times=(12,),
    times_full=(12,),
    channels=2,
    caches=((2, 2, 2, 9, 16), (2, 4, 2, 20, 16)),
    layers=1,
    context=8,
)


def catalogue(sizes=None, groups=None) -> list[Workload]:
    """Every workload, or those of some groups."""
    sizes = sizes or Sizes()
    return [
        replace(workload, group=group)
        for group in groups or GROUPS
        for make in _GROUPS[group]
        for workload in make(sizes)
    ]


def matmul(sizes):
    for n in sizes.squares:
        yield forward(
            f"matmul {n}³",
            "linear.matmul",
            (Input((n, n)), Input((n, n))),
            lambda torch, a, b: a @ b,
            compiled=False,
            flops=2 * n**3,
            **_MATRIX,
        )


_MATRIX = {"tensor_cores": True, "tma": True}


def linear(sizes):
    """The layers of GPT-2, what follows each of them fused into it."""
    c, v = sizes.width, sizes.vocabulary
    yield from _linear(sizes.rows, c, 3 * c, "bias")
    yield from _linear(sizes.rows, c, c, "bias+residual")
    yield from _linear(sizes.rows, c, 4 * c, "bias+gelu")
    yield from _linear(sizes.rows, 4 * c, c, "bias+residual")
    yield from _linear(sizes.rows, c, v, "")


def _linear(n, k, m, fused):
    x, w, y = Input((n, k)), Input((m, k), scale=k**-0.5), Input((n, m))
    inputs = (x, w) + ((Input((m,)),) if fused else ()) + ((y,) if "residual" in fused else ())
    activation = "gelu_tanh" if "gelu" in fused else None

    def theirs(torch, x, w, b=None, residual=None):
        y = torch.nn.functional.linear(x, w, b)
        y = torch.nn.functional.gelu(y, approximate="tanh") if activation else y
        return y if residual is None else y + residual

    name, where = f"linear {n} x {k} -> {m} {fused}".strip(), "linear.linear"
    options = {"attributes": {"activation": activation}, "flops": 2 * n * k * m, **_MATRIX}
    more = {"compiled": True, "target": 1.15} if "+" in fused else {"compiled": False}
    yield forward(f"{name} forward", where, inputs, theirs, **more, **options)
    options |= {"g": (y,), "compiled": activation is not None}
    yield backward(f"{name}, gradient of x", where, inputs, theirs, wrt=(0,), **options)
    of, wrt = ("gradients of w and b", (1, 2)) if fused else ("gradient of w", (1,))
    yield backward(f"{name}, {of}", where, inputs, theirs, wrt=wrt, **options)


def mlp(sizes):
    """GPT-2's two layers and the residual."""
    n, c = sizes.rows, sizes.width
    up, down = (Input(shape, scale=shape[1] ** -0.5) for shape in ((4 * c, c), (c, 4 * c)))
    inputs = (Input((n, c)), up, Input((4 * c,)), down, Input((c,)), Input((n, c)))

    def theirs(torch, x, up, b, down, c, residual):
        h = torch.nn.functional.gelu(torch.nn.functional.linear(x, up, b), approximate="tanh")
        return torch.nn.functional.linear(h, down, c) + residual

    options = {"target": 1.15, **_MATRIX}
    name, where, flops = f"mlp {n} x {c}", "linear.mlp", 2 * n * 8 * c * c
    yield forward(f"{name} forward", where, inputs, theirs, flops=flops, **options)
    yield backward(
        f"{name} backward",
        where,
        inputs,
        theirs,
        g=(Input((n, c)),),
        wrt=(0, 1, 2, 3, 4),
        flops=2 * flops,
        **options,
    )


def lora(sizes):
    n, c, r = sizes.rows, sizes.width, 16
    inputs = (
        Input((n, c)), Input((c, c), scale=c**-0.5), Input((r, c), scale=c**-0.5), Input((c, r)),
    )  # fmt: skip

    def theirs(torch, x, w, A, B):
        return x @ w.T + 2.0 * (x @ A.T) @ B.T

    flops = 2 * n * c * (c + 2 * r)
    options = {"attributes": {"scale": 2.0}, **_MATRIX}
    name, where = f"lora {n} x {c} -> {c}, rank {r}", "lora.lora"
    yield forward(f"{name} forward", where, inputs, theirs, flops=flops, **options)
    yield backward(
        f"{name} backward, w frozen",
        where,
        inputs,
        theirs,
        g=(Input((n, c)),),
        wrt=(0, 2, 3),
        flops=flops + 4 * n * c * r,
        **options,
    )


def norm(sizes):
    for n, c in ((2 * sizes.rows, sizes.width), (sizes.rows, 4096)):
        x, w = Input((n, c)), Input((c,))
        layer = lambda torch, x, w, b: torch.nn.functional.layer_norm(x, w.shape, w, b)  # noqa: E731
        rms = lambda torch, x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5)  # noqa: E731
        shape = f"{n} x {c}"
        options = {"g": (x,), "wrt": (0, 1, 2)}
        yield from both(f"layer_norm {shape}", "norm.layer_norm", (x, w, w), layer, **options)
        options = {"g": (x,), "wrt": (0, 1)}
        yield from both(f"rms_norm {shape}", "norm.rms_norm", (x, w), rms, **options)

    def add_layer(torch, x, residual, w, b):
        s = x + residual
        return s, torch.nn.functional.layer_norm(s, w.shape, w, b)

    n, c = 2 * sizes.rows, sizes.width
    x, w = Input((n, c)), Input((c,))
    options = {"g": (x, x), "wrt": (0, 2, 3)}
    inputs = (x, x, w, w)
    yield from both(
        f"add+layer_norm {n} x {c}", "norm.add_layer_norm", inputs, add_layer, **options
    )


def softmax(sizes):
    x = Input((sizes.rows, 4096), scale=2.0)
    yield from both(
        f"softmax {x.shape[0]} x {x.shape[1]}",
        "reduce.softmax",
        (x,),
        lambda torch, x: torch.softmax(x, -1),
        g=(x,),
        wrt=(0,),
    )


def cross_entropy(sizes):
    n, v = sizes.rows, sizes.vocabulary
    x, t, where = Input((n, v), scale=3.0), Input((n,), "int64", below=v), "loss.cross_entropy"
    theirs = lambda torch, x, t: torch.nn.functional.cross_entropy(x, t)  # noqa: E731
    g = (Input((), "float32"),)
    yield from both(f"cross_entropy {n} x {v}", where, (x, t), theirs, g=g, wrt=(0,))

    def in_place(x, t):
        x = x.clone() if hasattr(x, "clone") else x  # the race's own has to stay what it was

        def call():
            y, saved = kernel(where).forward(x, t, in_place=True)
            options = {"in_place": True, "saved": saved, "needs": (True, False)}
            return y, kernel(where).vjp(1.0, y, x, t, **options)[0]

        return call

    yield Workload(
        f"cross_entropy {n} x {v} forward and backward in place",
        (x, t),
        in_place,
        truth_of(their_round(theirs, (0,))),
        _ways(their_round, theirs, (0,), compiled=True),
    )


def linear_cross_entropy(sizes):
    n, c, v = sizes.rows, sizes.width, sizes.vocabulary
    inputs = (Input((n, c)), Input((v, c), scale=c**-0.5), Input((n,), "int64", below=v))

    def ours(*arrays):
        chunked = kernel("loss.linear_cross_entropy")
        g = 1.0

        def call():
            y, saved = chunked.forward(*arrays)
            h_bar, w_bar, _ = chunked.vjp(g, y, *arrays, saved=saved, needs=(True, True, False))
            return y, h_bar, w_bar

        return call

    def theirs(torch, h, w, t):
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w), t)

    yield Workload(
        f"linear_cross_entropy {n} x {c} -> {v} forward and backward",
        inputs,
        ours,
        truth_of(their_round(theirs, (0, 1))),
        _ways(their_round, theirs, (0, 1), compiled=True),
        flops=6 * n * c * v,
        tensor_cores=True,
    )


def attention_64(sizes):
    """Heads of 64, as in GPT-2."""
    yield from _attention(sizes, 64)


def attention_128(sizes):
    """Heads of 128, as in larger models."""
    yield from _attention(sizes, 128)


def _attention(sizes, d):
    """Always the same number of tokens, and 2048 channels: short sequences in large batches."""
    for T in sizes.times:
        shape = (max(1, sizes.rows // T), max(2, sizes.channels // d), T, d)
        for causal in (True, False) if T in sizes.times_full else (True,):
            yield from _attention_at(shape, causal)


def decode(sizes):
    """A new token of each sequence, its cache full: GPT-2's heads, and heads that share keys."""
    for B, H, H_k, n, d in sizes.caches:
        q, k = Input((B, H, 1, d)), Input((B, H_k, n, d))
        full = Input((B,), "int32", low=n, below=n + 1)

        def theirs(torch, q, k, v, lengths):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1) @ v

        yield Workload(
            f"decode {B} x {H} x {n} x {d}{f', {H_k} heads of keys' if H_k < H else ''}",
            (q, k, k, full),
            our_forward("decode.decode", {}),
            truth_of(their_forward(theirs)),
            {b: their_forward(_sdpa(b, causal=False)) for b in _BACKENDS},
        )


def _attention_at(shape, causal):
    B, H, T, d = shape
    q, where, attributes = Input(shape), "attention.attention", {"causal": causal}

    def theirs(torch, q, k, v):  # the truth: separate ops
        S = q @ k.transpose(-2, -1) * d**-0.5
        if causal:
            S = S.masked_fill(torch.ones(T, T, device=q.device).triu(1) > 0, float("-inf"))
        return torch.softmax(S, -1) @ v

    flops = 4 * B * H * T * T * d / (2 if causal else 1)
    name = f"attention {B} x {H} x {T} x {d}{' causal' if causal else ''}"
    options = {"part": _corners, "tensor_cores": True}
    forward_peers = {b: their_forward(_sdpa(b, causal)) for b in _BACKENDS}
    backward_peers = {b: their_backward(_sdpa(b, causal), (0, 1, 2)) for b in _BACKENDS}
    yield Workload(
        f"{name} forward",
        (q, q, q),
        our_forward(where, attributes),
        truth_of(their_forward(theirs)),
        forward_peers,
        flops=flops,
        **options,
    )
    yield Workload(
        f"{name} backward",
        (q, q, q, q),
        our_backward(where, attributes, (0, 1, 2)),
        truth_of(their_backward(theirs, (0, 1, 2))),
        backward_peers,
        flops=2.5 * flops,
        **options,
    )


_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cuDNN": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
}


def _sdpa(backend, causal):
    """PyTorch's attention by one backend, or an error."""

    def theirs(torch, q, k, v, *_):
        from torch.nn import attention, functional

        options = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
        with attention.sdpa_kernel(getattr(attention.SDPBackend, _BACKENDS[backend])):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    return theirs


def _corners(x):
    """The first and the last head of the first and the last sequence: each stands for itself."""
    B, H = x.shape[:2]
    return x[:: max(B - 1, 1), :: max(H - 1, 1)]


def activations(sizes):
    """Forward and backward of a feed-forward's activations."""
    n, c = sizes.rows, 4 * sizes.width
    x = Input((n, c))
    functions = {
        "gelu_tanh": lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"),
        "gelu": lambda torch, x: torch.nn.functional.gelu(x),
        "silu": lambda torch, x: torch.nn.functional.silu(x),
    }
    for name, theirs in functions.items():
        where = f"elementwise.{name}"
        yield from both(f"{name} {n} x {c}", where, (x,), theirs, g=(x,), wrt=(0,))
    yield from both(
        f"silu_multiply {n} x {c}",
        "elementwise.silu_multiply",
        (x, x),
        lambda torch, a, b: torch.nn.functional.silu(a) * b,
        g=(x, x)[:1],
        wrt=(0, 1),
    )


def dropout(sizes):
    n, c, p = sizes.rows, 4 * sizes.width, 0.1

    def truth(torch, outputs, x):
        """What was kept is up to chance, but not how many, nor what becomes of them."""
        (y,) = outputs
        kept = y != 0
        share, n = kept.float().mean().item(), kept.numel()
        if abs(share - (1 - p)) > 6 * (p * (1 - p) / n) ** 0.5:
            raise ValueError(f"dropout keeps {share:.4f} of the elements; expected {1 - p}")
        return (torch.where(kept, x / (1 - p), 0.0),)

    theirs = lambda torch, x: torch.nn.functional.dropout(x, p)  # noqa: E731
    yield Workload(
        f"dropout {n} x {c} forward",
        (Input((n, c)),),
        our_forward("elementwise.seeded_dropout", {"p": p, "seed": 1}),
        truth,
        _ways(their_forward, theirs, compiled=True),
    )


def rope(sizes):
    T, d = min(1024, sizes.rows), 64
    B, H = max(1, sizes.rows // T), max(1, sizes.width // d)
    x, table = Input((B, H, T, d)), Input((T, d // 2), "float32")  # any numbers do for cos and sin

    def theirs(torch, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    name, where = f"rope {B} x {H} x {T} x {d}", "position.rope"
    yield from both(name, where, (x, table, table), theirs, g=(x,), wrt=(0,))


def embedding(sizes):
    n, c, v = sizes.rows, sizes.width, sizes.vocabulary
    w, t, g = Input((v, c)), Input((n,), "int64", below=v), Input((n, c))
    theirs = lambda torch, w, t: torch.nn.functional.embedding(t, w)  # noqa: E731
    name, where, moved = f"embedding {n} of {v} x {c}", "shape.embedding", 2 * g.bytes + t.bytes
    options = {"compiled": False}
    yield forward(f"{name} forward", where, (w, t), theirs, bytes=moved, **options)
    moved = g.bytes + t.bytes + w.bytes  # what is not looked up is written, too: zeros
    options |= {"g": (g,), "wrt": (0,), "bytes": moved}
    yield backward(f"{name} backward", where, (w, t), theirs, **options)


def adamw(sizes):
    """A step of all 148 tensors of GPT-2 124M, in float32."""
    c, v, T = sizes.width, sizes.vocabulary, sizes.context
    layer = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,), (c,), (c,), (4 * c, c), (4 * c,)]
    shapes = [(v, c), (T, c), *sizes.layers * [*layer, (c, 4 * c), (c,)], (c,), (c,)]
    count = len(shapes)
    parameters = [Input(shape, "float32", scale=0.02) for shape in shapes]
    gradients = [Input(shape, "float32", scale=0.01) for shape in shapes]
    lr, decay, betas, eps = 1e-3, 0.1, (0.9, 0.95), 1e-8

    def ours(*arrays):
        mine = [x.clone() if hasattr(x, "clone") else x for x in arrays[:count]]
        optimizer = kernel("optim.AdamW")(mine, weight_decay=decay, betas=betas, eps=eps)

        def call():
            optimizer.step(list(arrays[count:]), lr, 1)
            return tuple(mine)

        return call

    def truth(torch, outputs, *arrays):
        """One step, by hand: m̂ = g, v̂ = g²."""
        pairs = zip(arrays[:count], arrays[count:])
        return tuple(p * (1 - lr * decay) - lr * g / (g.abs() + eps) for p, g in pairs)

    def peer(**options):
        def prepare(torch, *arrays):
            mine = [torch.nn.Parameter(x.clone()) for x in arrays[:count]]
            for p, g in zip(mine, arrays[count:]):
                p.grad = g
            optimizer = torch.optim.AdamW(mine, lr, betas, eps, decay, **options)

            def call():
                optimizer.step()
                return tuple(p.detach() for p in mine)

            return call

        return prepare

    yield Workload(
        f"AdamW, {count} tensors of GPT-2",
        (*parameters, *gradients),
        ours,
        truth,
        {"fused": peer(fused=True), "foreach": peer(foreach=True)},
        bytes=7 * sum(p.bytes for p in parameters),  # p, g, m, v are read; p, m, v are written
    )


# What is compiled by one process, after the other: kernels that share their candidates.
_GROUPS = {
    "attention 128": (attention_128,),
    "attention 64": (attention_64,),
    "linear": (linear, mlp, lora, matmul),
    "loss": (cross_entropy, linear_cross_entropy),
    "norm": (norm,),
    "reduce": (softmax,),
    "decode": (decode,),
    "elementwise": (activations, dropout),
    "position": (rope,),
    "shape": (embedding,),
    "optim": (adamw,),
}
GROUPS = tuple(_GROUPS)
