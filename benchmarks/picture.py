"""A picture of a race of training steps: who takes how long, and where ours spends the time."""

from pathlib import Path

COLOURS = {"ours": "#1b7f4d", "torch": "#b9b9b9", "compiled": "#8a8a8a"}


def draw(data: dict, title: str, path: Path) -> Path:
    """A PNG. Each setting has a row: left, a bar for the step of each; right, ours by phase, with
    a mark where the floor is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image  # which comes with matplotlib

    from .train import NAMES

    figure, axes = plt.subplots(
        len(data), 2, figsize=(11, 2.6 * len(data) + 0.4), layout="constrained", squeeze=False
    )
    for (left, right), (name, found) in zip(axes, data.items(), strict=True):
        _steps(left, name, found, {key: NAMES[key] for key in NAMES if key in found})
        _phases(right, found)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(32)  # colours: a third of the bytes
    few.save(path, optimize=True)
    return path


def _steps(axes, name, found, names):
    seconds = [found[key]["seconds"]["median"] for key in names]
    bars = axes.barh(list(names.values()), seconds, color=[COLOURS[key] for key in names])
    labels = [
        f"{s:.3g} s" + (f", ratio {found['ratios'][key]['median']:.2f}" if key != "ours" else "")
        for key, s in zip(names, seconds)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set(title=f"{name}: a training step", xlim=(0, 1.4 * max(seconds)))
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()


def _phases(axes, found):
    rows = found["floor"]
    total = sum(row["ours"] for row in rows)
    places = range(len(rows))
    axes.barh(places, [100 * row["ours"] / total for row in rows], color=COLOURS["ours"])
    least = [100 * row["floor"] / total for row in rows]
    axes.plot(least, places, "k|", markersize=10, markeredgewidth=2, label="floor")
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set_title("ours by phase")
    axes.set_xlabel("% of the step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="lower right")
    axes.invert_yaxis()
