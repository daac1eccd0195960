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
