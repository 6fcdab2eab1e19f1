"""Figures of models on other sets: accuracies as a matrix, and over labelled images a class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from emotion_toolbox.figures import BELOW, BLUE, ORANGE, fit_text, new_figure

UNADAPTED, ADABN = "unadapted", "AdaBN"
OWN, IMAGENET = "source features", "ImageNet features"
Row = Mapping[str, Any]  # of a table; "accuracy" is an Estimate


def plot_matrix(cells: Sequence[Row], sources: Sequence[str], targets: Sequence[str]) -> Figure:
    """Accuracy of each model (row) on each set (column), unadapted and with AdaBN."""
    width, height = 2 * (1.7 * len(targets) + 1.6), 1.1 * len(sources) + 1.6
    fig, [axes] = new_figure(width, height, 1, 2, sharey=True)
    for ax, how in zip(axes, (UNADAPTED, ADABN), strict=True):
        values = np.full((len(sources), len(targets)), np.nan)
        for row in (row for row in cells if row["adaptation"] == how):
            y, x, e = sources.index(row["source"]), targets.index(row["target"]), row["accuracy"]
            values[y, x] = e.value
            text = f"{e.value:.2f}\n{e.low:.2f} to {e.high:.2f}\n{row['images']} images"
            colour = "white" if e.value > 0.6 else "black"
            text += f", {len(row['classes'])} classes"
            ax.text(x, y, text, ha="center", va="center", size=8, color=colour)
        for y, x in np.argwhere(np.isnan(values)):
            ax.text(x, y, "no classes\nshared", ha="center", va="center", size=8)
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        ax.set_xticks(range(len(targets)), [fit_text(name, 1.6, 9) for name in targets], size=9)
        ax.set_yticks(range(len(sources)), [fit_text(n, 1.6, 9, 2) for n in sources], size=9)
        ax.set_title(how, loc="left")
        ax.set_xlabel("judged on")
    axes[0].set_ylabel("trained as")
    return fig


def plot_shots(points: Sequence[Row], cells: Sequence[Row]) -> Figure:
    """Accuracy over labelled images a class, with 95 % intervals as bands.

    A panel for each model and set in `points`; its lines across are the model's in `cells`.
    """
    panels = list(dict.fromkeys((row["source"], row["target"]) for row in points))
    cols = min(3, len(panels))
    rows = -(-len(panels) // cols)
    fig, axes = new_figure(4.2 * cols, 3.2 * rows + 0.6, rows, cols, sharey=True)
    legend: dict[str, Any] = {}
    for ax, panel in zip(axes.flat, panels, strict=False):
        curves, lines = (
            [row for row in table if (row["source"], row["target"]) == panel]
            for table in (points, cells)
        )
        _draw_panel(ax, curves, lines)
        count = f", {len(curves[0]['classes'])} classes"
        ax.set_title(fit_text(" to ".join(panel), 3, 9, 2) + count, loc="left", size=9)
        handles, names = ax.get_legend_handles_labels()
        legend |= zip(names, handles, strict=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    fig.legend([*legend.values()], [*legend], **BELOW)
    return fig


def _draw_panel(ax: Any, points: Sequence[Row], cells: Sequence[Row]) -> None:
    for name, colour, mark in ((OWN, BLUE, "o"), (IMAGENET, ORANGE, "s")):
        curve = [(row["k"], row["accuracy"]) for row in points if row["what"] == name]
        ks = [k for k, _ in curve]
        ax.plot(ks, [e.value for _, e in curve], f"{mark}-", color=colour, label=name)
        ends = [e.low for _, e in curve], [e.high for _, e in curve]
        ax.fill_between(ks, *ends, color=colour, alpha=0.18, lw=0)
    for row in cells:
        style = "--" if row["adaptation"] == UNADAPTED else ":"
        label = f"the model, {row['adaptation']}"
        ax.axhline(row["accuracy"].value, color="0.3", ls=style, lw=1.3, label=label)
    ax.set_xscale("log")
    ticks = sorted({row["k"] for row in points})
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.set_xlabel("labelled images a class")
