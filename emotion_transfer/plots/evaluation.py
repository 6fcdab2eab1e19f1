"""Figures of the evaluation: confusions, calibration, mistakes, attention and comparisons."""

# %% [markdown]
# #### Which classes are mistaken for which
#
# The confusion matrix has a row for every true class and a column for every answer; what is off the
# diagonal went wrong. The counts on the left depend on how many images a class has; on the right
# every row is divided by its sum, so the diagonal there is each class's recall.

# %%
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from emotion_transfer.metrics import Estimate
from emotion_transfer.plots.data import plot_image_grid
from emotion_transfer.plots.style import class_colours, fit_text, new_figure


# %%
def plot_confusion(confusion: npt.ArrayLike, classes: Sequence[str]) -> Figure:
    """A confusion matrix [C, C] (rows true, columns predicted) as counts and as shares of each row.

    Raises:
        ValueError: if the matrix is not C x C.
    """
    cells = np.asarray(confusion)
    if cells.shape != (len(classes), len(classes)):
        raise ValueError(f"a {cells.shape} confusion matrix does not fit {len(classes)} classes")
    totals = cells.sum(axis=1, keepdims=True)
    share = 100 * np.divide(cells, totals, out=np.full(cells.shape, np.nan), where=totals > 0)
    many = len(classes) > 10
    width, height = (13, 7) if many else (10, min(5.6, 3 + 0.34 * len(classes)))
    fig, axes = new_figure(width, height, 1, 2, sharey=True)
    _draw_matrix(axes[0, 0], cells.astype(float), classes)
    _draw_matrix(axes[0, 1], share, classes)
    axes[0, 0].set_title("Images", loc="left")
    axes[0, 1].set_title("Per cent of the true class", loc="left")
    axes[0, 0].set_ylabel("true")
    return fig


# %%
def _draw_matrix(ax: Any, values: npt.NDArray[np.float64], classes: Sequence[str]) -> None:
    """A heat map, its numbers as large as the cells allow; zeros are left out if there are many."""
    count = len(classes)
    blank = 0.5 if count > 10 else -1.0
    text = [["" if not v >= blank else f"{v:.0f}" for v in row] for row in values]
    longest = max(2, *(len(entry) for row in text for entry in row))
    cell = 72 * (5.0 if count > 10 else 3.6) / count  # points
    names = [fit_text(name, 1.3, 9) for name in classes]
    sns.heatmap(
        pd.DataFrame(values, index=names, columns=names),
        annot=np.array(text),
        fmt="",
        annot_kws={"size": min(10.0, cell / (0.75 * longest))},
        cmap="Blues",
        vmin=0,
        linewidths=0.5,
        cbar=False,
        xticklabels=True,
        yticklabels=True,
        ax=ax,
    )
    ax.set_xlabel("predicted")
    ax.tick_params(axis="x", rotation=90 if count > 2 else 0, labelsize=9)
    ax.tick_params(axis="y", rotation=0, labelsize=9, length=0)


# %% [markdown]
# #### Is its confidence deserved?
#
# Where the bars reach the diagonal, the model is as sure as it should be. Bars below it mean
# overconfidence, bars above it the opposite, which mixing and label smoothing often cause. Pale
# bars stand on fewer than ten images and say little.


# %%
def plot_reliability(table: pd.DataFrame, ece: float | Estimate) -> Figure:
    """Accuracy against confidence, from ``reliability_table``, and a histogram of confidence."""
    fig, axes = new_figure(6.5, 5.6, 2, 1, sharex=True, height_ratios=(3, 1))
    reliability, histogram = axes.flat
    centre, width = (table["lower"] + table["upper"]) / 2, table["upper"] - table["lower"]
    bars = {"width": width, "color": "#56B4E9", "edgecolor": "white"}
    few = table["count"] < 10
    accuracy = table["accuracy"]
    reliability.bar(centre, accuracy.mask(few), label="accuracy of the bin", **bars)
    reliability.bar(centre, accuracy.where(few), alpha=0.3, **bars)
    reliability.plot([0, 1], [0, 1], "--", color="0.35", label="perfect calibration")
    ends = (table["confidence"], accuracy, table["confidence"])
    reliability.vlines(*ends, color="#D55E00", lw=2.5, label="gap to the mean confidence")
    reliability.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    reliability.set_title(f"Expected calibration error {ece:.3f}", loc="left")
    histogram.bar(centre, table["count"], **{**bars, "color": "0.6"})
    histogram.set(xlabel="confidence", ylabel="images")
    fig.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return fig


# %% [markdown]
# #### Every class by itself
#
# An average hides the class that fails. The bar is F1; the two marks show *how* a class fails: low
# precision means that its name is given too freely, low recall that its images go unrecognised.


# %%
def plot_per_class(table: pd.DataFrame) -> Figure:
    """F1 (bars), precision and recall (marks) of each class, from ``per_class_table``."""
    classes = [str(name) for name in table.index]
    rows = np.arange(len(classes))
    fig, axes = new_figure(9, 1.5 + 0.33 * len(classes))
    ax = axes[0, 0]
    ax.barh(rows, table["f1"], color=list(class_colours(classes).values()), alpha=0.75)
    marks = {"linestyle": "", "markersize": 7, "markeredgecolor": "black"}
    above, below = rows - 0.19, rows + 0.19  # so that equal values do not hide each other
    ax.plot(table["precision"], above, marker=">", color="white", label="precision", **marks)
    ax.plot(table["recall"], below, marker="o", color="0.45", label="recall", **marks)
    support = table["support"].astype(int)
    names = [f"{fit_text(name, 2, 10)} ({n:,})" for name, n in zip(classes, support, strict=True)]
    ax.set_yticks(rows, names)
    ax.set(xlim=(0, 1.02), ylim=(len(classes) - 0.5, -0.5), xlabel="score")
    ax.set_title("Score of each class (number of images)", loc="left")
    ax.grid(axis="x", alpha=0.3)
    handles = [Patch(color="0.7", label="F1"), *ax.get_lines()]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return fig


# %% [markdown]
# #### The most confident mistakes
#
# They are the most instructive images of the whole test set. Some show what the model has not
# understood; in others the *label* is debatable, for what an image evokes is not the same for all.


# %%
def plot_mistakes(
    images: Sequence[npt.NDArray[np.uint8]],
    true: npt.ArrayLike,
    predicted: npt.ArrayLike,
    confidence: npt.ArrayLike,
    classes: Sequence[str],
) -> Figure:
    """Images (uint8, [H, W, 3]) under *true → predicted, confidence*, coloured by the true class.

    `true` and `predicted` are indices into `classes`. Without images the figure says so.

    Raises:
        ValueError: if the lengths disagree.
    """
    if len(images) == 0:
        fig, axes = new_figure(6, 1.2)
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0.5, 0.5, "No mistakes to show.", ha="center", va="center", size=12)
        return fig
    columns = [np.asarray(column).tolist() for column in (true, predicted, confidence)]
    rows = list(zip(*columns, strict=True))
    colours = class_colours(classes)
    return plot_image_grid(
        images,
        [f"{classes[t]}\n→ {classes[p]} {c:.0%}" for t, p, c in rows],
        title="Mistakes: true class → the model's answer and its confidence",
        title_colours=[colours[classes[t]] for t, _, _ in rows],
    )


# %% [markdown]
# #### Where the model looks
#
# Each image stands beside itself under a heat map: bright yellow regions argued for the answer, and
# where nothing did, the image shows through. A model that is right for the wrong reason, such as a
# watermark, gives itself away here.

# %%
HEAT_OPACITY = 0.75  # of the hottest region, so that the image is still seen through it


def plot_gradcam(
    images: npt.NDArray[np.uint8], heatmaps: npt.NDArray[np.floating[Any]], titles: Sequence[str]
) -> Figure:
    """Images (uint8, [N, H, W, 3]), each beside its overlay with a heat map ([N, H, W], 0 to 1).

    Raises:
        ValueError: if the shapes disagree or a heat map leaves 0 to 1.
    """
    if images.shape[:3] != heatmaps.shape:
        raise ValueError(f"images {images.shape} and heatmaps {heatmaps.shape} do not fit")
    if not ((heatmaps >= 0) & (heatmaps <= 1)).all():
        raise ValueError("heatmaps must lie between 0 and 1, without NaN")
    heat = np.asarray(heatmaps, dtype=float)
    opacity = HEAT_OPACITY * heat[..., None]
    colour = 255 * colormaps["inferno"](heat)[..., :3]
    overlay = ((1 - opacity) * images + opacity * colour).round().astype(np.uint8)
    gap = np.full((*images.shape[:2], max(1, images.shape[2] // 32), 3), 255, dtype=np.uint8)
    pairs = np.concatenate([images, gap, overlay], axis=2)
    title = "Left: the image. Right: what argued for the answer (bright yellow)"
    fig = plot_image_grid(list(pairs), titles, columns=4, title=title)
    _add_heat_bar(fig)
    return fig


# %% [markdown]
# The colour bar fades as the overlay does, over white in place of an image.


# %%
def _add_heat_bar(fig: Figure) -> None:
    """A colour bar below the grid, in room of its own."""
    colours = colormaps["inferno"](np.linspace(0, 1, 256))
    opacity = HEAT_OPACITY * np.linspace(0, 1, 256)[:, None]
    faded = ListedColormap((1 - opacity) + opacity * colours)
    strip, length, width = 0.6, 2.5, fig.get_figwidth()  # inches
    height = fig.get_figheight() + strip
    fig.set_figheight(height)
    layout = fig.get_layout_engine()
    if layout is not None:
        layout.set(rect=(0, strip / height, 1, 1 - strip / height))  # type: ignore[call-arg]
    place = ((width - length) / 2 / width, 0.42 / height, length / width, 0.12 / height)
    ax = fig.add_axes(place)
    ax.set_in_layout(False)
    bar = fig.colorbar(
        ScalarMappable(cmap=faded), cax=ax, orientation="horizontal", ticks=[0, 0.5, 1]
    )
    ax.tick_params(labelsize=8, pad=2)
    bar.set_label("heat: low → high", size=8, labelpad=1)


# %% [markdown]
# #### Against the baselines, and against others
#
# A point with its 95 % interval for everything that was measured here. Published figures, where
# given, are drawn differently on purpose: they come from other training, often from another split,
# and without an interval.

# %%
MEASURED_COLOUR, PUBLISHED_COLOUR = "#0072B2", "#D55E00"


def plot_comparison(
    results: Mapping[str, Estimate],
    published: Mapping[str, float] | None = None,
    metric: str = "accuracy",
) -> Figure:
    """Measured results (points with 95 % intervals) over published values (diamonds) of `metric`.

    Raises:
        ValueError: if there is nothing to compare.
    """
    others = dict(published or {})
    names = [*results, *others]
    if not names:
        raise ValueError("there are no results to compare")
    fig, axes = new_figure(9, 1.5 + 0.36 * len(names))
    ax = axes[0, 0]
    mine = np.arange(len(results))
    if results:
        value, low, high = np.array([(e.value, e.low, e.high) for e in results.values()]).T
        ax.hlines(mine, low, high, color=MEASURED_COLOUR, lw=2, label="95 % interval")
        for end in (low, high):
            ax.plot(end, mine, "|", color=MEASURED_COLOUR, markersize=11, markeredgewidth=1.5)
        ax.plot(value, mine, "o", color=MEASURED_COLOUR, markersize=5, label="measured here")
    if others:
        theirs = len(results) + np.arange(len(others))
        marks = {"markersize": 8, "markerfacecolor": "white", "markeredgecolor": PUBLISHED_COLOUR}
        label = "published (trained and tested elsewhere)"
        ax.plot(list(others.values()), theirs, "D", linestyle="", label=label, **marks)
    _label_comparison(
        ax, names, [*map(str, results.values()), *(f"{v:.3f}" for v in others.values())]
    )
    ax.set_xlabel(metric.replace("_", " ").replace("f1", "F1"))
    fig.legend(loc="outside lower center", ncols=3, frameon=False)
    return fig


# %%
def _label_comparison(ax: Any, names: Sequence[str], figures: Sequence[str]) -> None:
    """Names to the left of the rows, their figures to the right, and room at both ends."""
    ax.set_yticks(range(len(names)), [fit_text(name, 2.6, 10, lines=2) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    for row, text in enumerate(figures):
        ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", size=9)
    ax.margins(x=0.08)
    ax.grid(axis="x", alpha=0.3)
