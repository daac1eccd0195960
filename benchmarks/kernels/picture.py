"""The roofline: how fast each workload runs, under the two ceilings that were measured."""

from pathlib import Path


def draw(results, roofline: dict, title: str, path: Path) -> Path:
    """A PNG with two panels. Left, work limited by arithmetic or close to it: operations per second
    over operations per byte. Right, work that moves bytes: bytes per second.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [r for r in results if not r["problem"]]
    computing = [r for r in done if r["flops"]]
    moving = [r for r in done if not r["flops"]]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(15, max(6, 0.24 * len(moving) + 2)), layout="constrained"
    )
    _roof(left, computing, roofline)
    _bars(right, moving, roofline)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


H200 = {"bandwidth": 4.8e12, "flops": 989e12}  # by its data sheet; bfloat16, not sparse


def _product(n, k, m):
    return 2 * n * k * m, 2 * (n * k + k * m + n * m)


# (operations, bytes) of work on bfloat16: 16,384 tokens, GPT-2's sizes; of attention for one head.
EXAMPLES = {
    "softmax": (5, 4),
    "layer norm": (8, 4),
    "cross-entropy, V = 50,304": (6, 4),
    "decoding, one query": (4 * 1024 * 64, 4 * 1024 * 64),
    "scores in memory, T = 1024": (4 * 1024**2 * 64, 8 * 1024**2),
    "768 x 768 layer": _product(16384, 768, 768),
    "MLP, 768 x 3072": _product(16384, 768, 3072),
    "logits, 768 x 50,304": _product(16384, 768, 50304),
    "4096³": _product(4096, 4096, 4096),
    "attention, T = 1024": (4 * 1024**2 * 64, 8 * 1024 * 64),
    "attention, T = 16,384": (4 * 16384**2 * 64, 8 * 16384 * 64),
}


def draw_expected(path: Path) -> Path:
    """A PNG of what a data sheet allows: EXAMPLES under the roofline of an H200."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def roof(x):
        return min(x * H200["bandwidth"], H200["flops"]) / 1e12

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    reach = [0.5, H200["flops"] / H200["bandwidth"], 20_000]
    axes.plot(reach, list(map(roof, reach)), "k-")
    for i, (name, (flops, moved)) in enumerate(EXAMPLES.items()):
        at = flops / moved
        axes.plot(at, roof(at), "o" if i < 10 else "s", color=f"C{i}", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that has to be moved",
        ylabel="TFLOP/s that the data sheet of an H200 allows",
    )
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _seconds(timing):
    return timing["seconds"]["median"]


def _roof(axes, results, roofline):
    bandwidth, flops = roofline["bandwidth"], roofline["flops"]
    ridge = flops / bandwidth
    at = [r["flops"] / r["bytes"] for r in results]
    low, high = min([*at, ridge]) / 2, max([*at, ridge]) * 2
    axes.plot([low, ridge, high], [low * bandwidth / 1e12, flops / 1e12, flops / 1e12], "k-")
    groups = sorted({r["group"] for r in results})
    for i, group in enumerate(groups):
        mine = [r for r in results if r["group"] == group]
        x = [r["flops"] / r["bytes"] for r in mine]
        ours = [r["flops"] / _seconds(r["ours"]) / 1e12 for r in mine]
        axes.plot(x, ours, "o", color=f"C{i}", label=group)
        raced = [r for r in mine if r["best"]]
        best = [r["flops"] / _seconds(r["peers"][r["best"]]) / 1e12 for r in raced]
        x = [r["flops"] / r["bytes"] for r in raced]
        axes.plot(x, best, "o", color=f"C{i}", markerfacecolor="none")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that has to be moved",
        ylabel="TFLOP/s",
        title="ours (full) and PyTorch's best (hollow) under the measured roofline",
    )
    if groups:
        axes.legend()


def _bars(axes, results, roofline):
    names = [r["name"] for r in results]
    ours = [r["bytes"] / _seconds(r["ours"]) / 1e12 for r in results]
    raced = [(i, r) for i, r in enumerate(results) if r["best"]]
    best = [r["bytes"] / _seconds(r["peers"][r["best"]]) / 1e12 for _, r in raced]
    axes.barh(range(len(names)), ours, color="C0", label="ours")
    axes.plot(best, [i for i, _ in raced], "kd", markerfacecolor="none", label="PyTorch's best")
    axes.axvline(roofline["bandwidth"] / 1e12, color="k", label="measured copy")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="TB/s of the bytes that have to be moved", title="work that moves bytes")
    axes.legend()
