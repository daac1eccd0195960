"""What the compile gate adds to what is raced: the options of the kernels that change their machine
code, each forward and backward, with the tile sizes that run by default. None of it is raced.

Options are combined, as the most that has to be kept in registers is where it fails first.
"""

from collections.abc import Callable
from dataclasses import replace

from .workloads import Input, Workload, kernel, our_backward, our_forward

HEADS = (64, 80, 128, 256)  # how wide; 80 is no power of two
ATTENTION = (  # what is asked of attention, and dtype and precision
    ({"segments": True}, "bfloat16"),
    ({"window": 256, "shared": 4}, "bfloat16"),
    ({"dropout": 0.1, "segments": True, "window": 256, "shared": 4}, "bfloat16"),
    ({"dropout": 0.1, "word": True}, "bfloat16"),
    ({"dropout": 0.1, "causal": False}, "float16"),
    ({"window": 256, "shared": 4}, "float32"),
    ({"dropout": 0.1, "shared": 4}, "float32 tf32"),
    ({"segments": True}, "float32 tf32x3"),
)
LINEAR = (  # rows, columns of x and of y, what follows, dtype and precision
    (4096, 768, 3072, "gelu", "float16"),
    (4096, 768, 3072, "gelu", "float32"),
    (4096, 768, 3072, "gelu", "float32 tf32"),
    (4096, 768, 3072, "gelu", "float32 tf32x3"),
    (4096, 1001, 1003, "gelu_tanh", "bfloat16"),  # rows that no copy engine takes
    (4096, 1001, 1003, "silu", "float32 tf32x3"),
    (4096, 768, 3001, "gelu", "bfloat16"),  # outputs that none does
    (4096, 768, 3001, "silu", "float32 tf32x3"),
    (4096, 768, 3001, None, "float32"),
    (300, 768, 768, "silu", "bfloat16"),
    (300, 1001, 1003, None, "bfloat16"),
    (8, 768, 768, None, "bfloat16"),
    (8, 1001, 1003, None, "float16"),
    (8, 768, 3072, None, "float32"),
)
WIDTHS = (768, 8192, 12288, 40000)  # of rows: few, one, or a part of one in registers
DTYPES = ("bfloat16", "float32")
_WORD = Input((), "int64", below=2**32)  # of a seed on the device


def variants(every: bool = False) -> list[Workload]:
    """What is not raced; unless it is every one that is wanted, each of attention's options for
    half of the widths.
    """
    groups = {
        name: make(every) if name == "attention" else make() for name, make in _GROUPS.items()
    }
    return [
        replace(workload, group=f"variants of {group}")
        for group, workloads in groups.items()
        for workload in workloads
    ]


def _variant(name: str, inputs, ours: Callable, **rest) -> Workload:
    return Workload(name, tuple(inputs), ours, None, {}, raced=False, **rest)


def _both_ways(name, where, inputs, g=None, wrt=None, **attributes):
    """Forward and then backward; g: the gradients of the outputs, if not one like the first input;
    wrt: which inputs have gradients, if not all.
    """
    g = g or inputs[:1]
    wrt = range(len(inputs)) if wrt is None else wrt
    return _variant(name, (*inputs, *g), our_backward(where, attributes, wrt, len(g)))


def _type(text):
    """("float32", "tf32") of "float32 tf32"."""
    dtype, _, precision = text.partition(" ")
    return dtype, precision or "ieee"


# --- attention ------------------------------------------------------------------------------------


def _attention(every):
    for i, (options, text) in enumerate(ATTENTION):
        for d in HEADS if every else HEADS[i % 2 :: 2]:
            dtype, precision = _type(text)
            yield _attention_with(d, dtype, precision=precision, **options)


def _attention_with(d, dtype, *, segments=False, shared=1, word=False, causal=True, **attributes):
    """shared: so many heads of queries use the same keys; word: the seed is on the device."""
    T, attributes = 2048, {"causal": causal, **attributes}
    q, k, given = Input((4, 8, T, d), dtype), Input((4, 8 // shared, T, d), dtype), {}
    if segments:
        given["segments"] = Input((4, T), "int32", below=3)
    if word:
        given["seed"] = _WORD

    def ours(q, k, v, g, *more):
        options = attributes | dict(zip(given, more))
        return our_backward("attention.attention", options, (0, 1, 2))(q, k, v, g)

    said = {"segments": segments, "shared": shared, "word": word, **attributes}
    name = f"attention of {d} in {dtype}, {_said(said)}"
    return _variant(name, (q, k, k, q, *given.values()), ours, tensor_cores=dtype != "float32")


def _self_attention():
    for H, H_k, d, options in (
        (12, None, 64, {}),
        (32, 8, 128, {"window": 256}),
        (12, None, 64, {"dropout": 0.1, "seed": 1, "precision": "tf32"}),
    ):
        dtype = "float32" if "precision" in options else "bfloat16"
        y, qkv = Input((4, 2048, H * d), dtype), Input((4, 2048, (H + 2 * (H_k or H)) * d), dtype)
        heads = {"heads": H, "kv_heads": H_k}
        name, where = f"self_attention of {d} in {dtype}", "attention.self_attention"
        yield _both_ways(
            f"{name}, {_said(heads | options)}", where, (qkv,), (y,), **heads, **options
        )


def _said(options):
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _decode():
    for B, H, H_k, T, n, d, text, window in (
        (1, 32, 8, 1, 131072, 128, "bfloat16", None),
        (1, 32, 8, 8, 131072, 80, "float16", 4096),
        (8, 32, 1, 4, 4096, 256, "bfloat16", 512),
        (1, 32, 8, 1, 131072, 128, "float32", None),
        (4, 12, 12, 1, 1024, 64, "float32 tf32", None),
        (4, 32, 8, 8, 4096, 256, "float32 tf32x3", 512),
    ):
        dtype, precision = _type(text)
        q, k = Input((B, H, T, d), dtype), Input((B, H_k, n, d), dtype)
        lengths = Input((B,), "int32", low=n, below=n + 1)
        attributes = {"window": window, "precision": precision}
        name = f"decode {B} x {H} / {H_k} x {T} of {n} x {d} in {text}, window {window}"
        yield _variant(name, (q, k, k, lengths), our_forward("decode.decode", attributes))
    for B, H, T, n, d, dtype in (
        (64, 12, 1, 1024, 64, "bfloat16"),
        (2, 8, 500, 4096, 80, "float32"),
    ):
        k, cache, lengths = (
            Input((B, H, T, d), dtype),
            Input((B, H, n, d), dtype),
            Input((B,), "int32", below=n),
        )
        name = f"append {B} x {H} x {T} to {n} x {d} in {dtype}"
        inputs = k, k, cache, cache, lengths
        yield _variant(name, inputs, our_forward("decode.append", {}))


# --- products -------------------------------------------------------------------------------------


def _linear():
    for i, (n, k, m, activation, text) in enumerate(LINEAR):
        dtype, precision = _type(text)
        x, w, b, y = (Input(shape, dtype) for shape in ((n, k), (m, k), (m,), (n, m)))
        attributes = {"activation": activation, "precision": precision}
        into = "float32" if i % 2 else None  # gradients that are added to what is there
        name = f"linear {n} x {k} -> {m} {activation} in {text}, into {into}"
        ours = _linear_with(into, attributes)
        yield _variant(name, (x, w, b, y, y), ours, tensor_cores=dtype != "float32")


def _linear_with(into, attributes):
    def prepare(x, w, b, residual, g):
        ours, inputs = kernel("linear.linear"), (x, w, b, residual)

        def call():
            y, saved = ours.forward(*inputs, **attributes)
            targets = into and (*(type(a)(a.shape, into) for a in (x, w, b)), None)
            options = {"saved": saved, "needs": (True,) * 4, "into": targets}
            return ours.vjp(g, y, *inputs, **options, **attributes)

        return call

    return prepare


def _products():
    for n, k, text in ((4096, 768, "float16"), (4096, 1001, "bfloat16"), (512, 96, "float32 tf32")):
        dtype, precision = _type(text)
        x, w, v, b, c = (Input(s, dtype) for s in ((n, k), (k, k), (k, k), (k,), (k,)))
        inputs, options = (x, w, b, v, c, x), {"activation": "silu", "precision": precision}
        yield _both_ways(f"mlp {n} x {k} in {text}", "linear.mlp", inputs, **options)
        r = 8 if k % 8 == 0 else 12
        down, up = Input((r, k), dtype), Input((k, r), dtype)
        inputs, name = (x, w, down, up, b), f"lora {n} x {k}, rank {r} in {text}"
        yield _both_ways(name, "lora.lora", inputs, precision=precision)
        a, b = Input((4, 6, 512, k), dtype), Input((6, k, 200), dtype)
        name, g = f"matmul {n} x {k}, a batch in {text}", (Input((4, 6, 512, 200), dtype),)
        yield _both_ways(name, "linear.matmul", (a, b), g, precision=precision)


# --- rows -----------------------------------------------------------------------------------------


def _norm():
    for n in WIDTHS:
        x, w = Input((4096, n), "float32"), Input((n,), "float32")
        yield _both_ways(f"layer_norm of {n} in float32", "norm.layer_norm", (x, w, w))
        x, w = Input((4096, n)), Input((n,))
        yield _both_ways(f"add+rms_norm of {n}", "norm.add_rms_norm", (x, x, w), (x, x))


def _softmax():
    for n in WIDTHS:
        x, g = Input((4096, n), "float32"), Input((4096,))
        yield _both_ways(f"softmax of {n} in float32", "reduce.softmax", (x,))
        yield _both_ways(f"logsumexp of {n}", "reduce.logsumexp", (Input((4096, n)),), (g,))


def _loss():
    g = (Input((), "float32"),)
    for v in (65, 2048, 50257):
        for dtype, in_place in zip(DTYPES, (False, True) if v % 2 else (True, False)):
            x, t = Input((4096, v), dtype), Input((4096,), "int64", below=v)
            name, options = f"cross_entropy of {v} in {dtype}", {"in_place": in_place}
            name += ", in place" if in_place else ""
            yield _both_ways(name, "loss.cross_entropy", (x, t), g, wrt=(0,), **options)
    for dtype in ("float32", "float16"):
        h, w = Input((4096, 768), dtype), Input((50257, 768), dtype)
        inputs = h, w, Input((4096,), "int64", below=50257)
        name = f"linear_cross_entropy in {dtype}"
        yield _both_ways(name, "loss.linear_cross_entropy", inputs, g, wrt=(0, 1))


# --- the rest -------------------------------------------------------------------------------------


def _others():
    for dtype, n in (("float32", 3072), ("float16", 3001)):
        x, name = Input((4096, n), dtype), f"4096 x {n} in {dtype}"
        yield _both_ways(f"gelu {name}", "elementwise.gelu", (x,))
        yield _both_ways(f"silu_multiply {name}", "elementwise.silu_multiply", (x, x), (x,))
        yield _both_ways(f"dropout {name}", "elementwise.seeded_dropout", (x,), p=0.1, seed=1)
        yield _variant(f"dropout {name}, its seed on the device", (x, _WORD), _dropout)
        w, t = Input((5000, n), dtype), Input((4096,), "int64", below=5000)
        yield _both_ways(f"embedding {name}", "shape.embedding", (w, t), (x,), wrt=(0,))
    for dtype, d in (("float32", 128), ("bfloat16", 80)):
        x, table = Input((4, 8, 1024, d), dtype), Input((1024, d // 2), "float32")
        name, inputs = f"rope of {d} in {dtype}, interleaved", (x, table, table)
        yield _both_ways(name, "position.rope", inputs, (x,), wrt=(0,), interleaved=True)
    for dtype in DTYPES:
        some = Input((768, 768), dtype), Input((3001,), dtype)
        yield _variant(f"AdamW in {dtype}, gradients clipped", some * 2, _adamw)

    some = Input((768, 768), "float16"), Input((3001,), "float16")
    inputs = *some, *some, Input((), "float32")
    yield _variant("AdamW in float16, with a loss scale, captured", inputs, _captured_adamw)


def _dropout(x, word):
    options = {"p": 0.1, "seed": word, "seed_offset": 3}
    return our_forward("elementwise.seeded_dropout", options)(x)


def _adamw(*arrays):
    optimizer = kernel("optim.AdamW")(list(arrays[:2]))
    return lambda: optimizer.step(list(arrays[2:]), 1e-3, 1, max_norm=1.0)


def _captured_adamw(*arrays):
    *arrays, lr = arrays
    optimizer, scale = kernel("optim.AdamW")(arrays[:2]), kernel("optim.LossScale")(lr)
    return lambda: optimizer.step(arrays[2:], lr, max_norm=1.0, loss_scale=scale)


_GROUPS = {
    "attention": _attention,
    "self_attention": _self_attention,
    "decode": _decode,
    "linear": _linear,
    "products": _products,
    "norm": _norm,
    "softmax": _softmax,
    "loss": _loss,
    "others": _others,
}
