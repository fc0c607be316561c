"""The two figures of the front page, from records in the repository: `python docs/figures/draw_front.py`.

Writes beside itself, light and dark: accuracy.svg from the results of the plain convolutional network, speed.svg from
benchmarks/RESULTS.md, and their numbers, front.csv.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
ACCURACY = HERE.parent / "results" / "vanilla_cnn-fashion" / "results.csv"
SPEED = HERE.parents[1] / "benchmarks" / "RESULTS.md"

LOOKS = {
    "light": {
        "ground": "#ffffff",
        "ink": "#1a1a1a",
        "faint": "#dcdfe3",
        "ours": "#0072B2",
        "second": "#8CC3E3",
        "others": ("#C2410C", "#00805A"),
    },
    "dark": {
        "ground": "#131416",
        "ink": "#e6e6e6",
        "faint": "#3a3f47",
        "ours": "#56B4E9",
        "second": "#2C6F97",
        "others": ("#FF8A3D", "#2FCB9E"),
    },
}
NAMES = {"SAO": "SAO", "LMP-S": "magnitude, layer by layer", "RG-S": "SAO's mask, other weights"}
WORK = {"train": "training step", "infer": "inference"}
RESOLUTION = {"svg.hashsalt": "sao_prune", "font.family": "DejaVu Sans", "font.size": 10.5}


def accuracies() -> dict[str, dict[float, tuple[float, float, float]]]:
    """Mean, least and greatest accuracy (%) over seeds, by method and sparsity."""
    found: dict[str, dict[float, tuple[float, float, float]]] = {}
    with ACCURACY.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = tuple(100 * float(row[f"accuracy_{key}"]) for key in ("mean", "min", "max"))
            found.setdefault(row["method"].partition(",")[0], {})[100 * float(row["sparsity"])] = values
    return found


def ratios() -> dict[str, dict[str, float]]:
    """Speed against the fastest dense form, by kind of work and model: of what is interleaved and tuned."""
    found: dict[str, dict[str, float]] = {work: {} for work in WORK}
    for line in SPEED.read_text(encoding="utf-8").splitlines():
        row = re.match(
            r"\| (train|infer)-(\w+) \| [^|]*% \| dense(?:, channels last)? \|[^|]*\| ([\d.]+)x \|.*; interleaved", line
        )
        if row:
            work, model, ratio = row[1], row[2], float(row[3])
            found[work][model] = min(ratio, found[work].get(model, ratio))
    return found


def draw_accuracy(axes: Axes, look: dict, numbers: dict) -> None:
    (dense,) = numbers["Dense"].values()
    axes.axhspan(dense[1], dense[2], color=look["faint"], alpha=0.5, linewidth=0)
    axes.axhline(dense[0], color=look["ink"], linewidth=1.2)
    sparsities = sorted(numbers["SAO"])
    styles = {
        "SAO": (look["ours"], "-", "o", 2.6),
        "LMP-S": (look["others"][0], (0, (5, 1.5)), "^", 1.8),
        "RG-S": (look["others"][1], (0, (1.5, 1.5)), "s", 1.8),
    }
    at = range(len(sparsities))
    for method, (colour, dashes, marker, width) in styles.items():
        mean, low, high = zip(*(numbers[method][s] for s in sparsities))
        spread = [[max(0.0, m - v) for m, v in zip(mean, low)], [max(0.0, v - m) for m, v in zip(mean, high)]]
        axes.errorbar(at, mean, spread, color=colour, linestyle=dashes, marker=marker, linewidth=width, capsize=3)
    notes = {
        "dense": (0.3, dense[0] + 4.5, look["ink"]),
        NAMES["SAO"]: (2.4, 66, look["ours"]),
        NAMES["LMP-S"]: (1.48, 45, look["others"][0]),
        NAMES["RG-S"]: (1.03, 2.5, look["others"][1]),
    }
    for text, (x, y, colour) in notes.items():
        axes.annotate(text, (x, y), color=colour, fontweight="bold" if text == "SAO" else "normal")
    axes.set(xlabel="zeros in the pruned layers (%)", ylabel="test accuracy (%)", ylim=(0, 92), xlim=(-0.15, 3.3))
    axes.set_xticks(list(at), [f"{s:g}" for s in sparsities])
    axes.grid(True, color=look["faint"], linewidth=0.6)


def draw_speed(axes: Axes, look: dict, numbers: dict[str, dict[str, float]], order: list[str]) -> None:
    for place, (work, models) in zip((-0.21, 0.21), numbers.items()):
        heights = [models[model] for model in order]
        fill = look["ours"] if work == "train" else look["second"]
        bars = axes.barh([index + place for index in range(len(order))], heights, 0.38, color=fill, label=WORK[work])
        axes.bar_label(bars, [f"{height:.1f}x" for height in heights], padding=4, color=look["ink"])
    axes.axvline(1, color=look["ink"], linewidth=1.2)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    axes.set(xlim=(0, 15.5), xlabel="times as fast as the dense model")
    axes.grid(True, axis="x", color=look["faint"], linewidth=0.6)
    axes.legend(loc="lower right", frameon=False, labelcolor=look["ink"])


def finish(figure: Figure, look: dict, path: Path) -> None:
    for axes in figure.axes:
        axes.set_facecolor(look["ground"])
        axes.set_axisbelow(True)
        axes.tick_params(colors=look["ink"], length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(look["faint"])
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(look["ink"])
    figure.savefig(path, facecolor=look["ground"], metadata={"Date": None, "Creator": None})


def main() -> None:
    accuracy, speed = accuracies(), ratios()
    order = sorted(speed["train"], key=speed["train"].__getitem__, reverse=True)
    with rc_context(RESOLUTION):
        for theme, look in LOOKS.items():
            figure = Figure((5.8, 3.5), layout="constrained")
            draw_accuracy(figure.add_subplot(), look, accuracy)
            finish(figure, look, HERE / f"front-accuracy-{theme}.svg")
            figure = Figure((5.8, 3.5), layout="constrained")
            draw_speed(figure.add_subplot(), look, speed, order)
            finish(figure, look, HERE / f"front-speed-{theme}.svg")
    with (HERE / "front.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows())


def rows() -> list[list[str]]:
    """The numbers of both figures."""
    table = [["figure", "series", "at", "value"]]
    for method, points in accuracies().items():
        table += [["accuracy", method, f"{sparsity:g}", f"{mean:.2f}"] for sparsity, (mean, _, _) in points.items()]
    for work, models in ratios().items():
        table += [["speed", work, model, f"{ratio:g}"] for model, ratio in models.items()]
    return table


if __name__ == "__main__":
    main()
