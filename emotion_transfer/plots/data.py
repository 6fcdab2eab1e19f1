"""Figures of the data: how many images a class has, and what they look like."""

# %% [markdown]
# #### Looking at the data
#
# Two questions come before any training: *how many* images does each class have, and *what do they
# look like*? The first decides whether classes must be weighted; the second catches what no check
# can, such as images under the wrong label.

# %%
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from emotion_transfer.plots.style import (
    class_colours,
    fit_text,
    ink_on,
    new_figure,
    set_figure_title,
)

# %% [markdown]
# The splits differ in size, so each has its own scale, and the shares are what to compare: they
# should agree. A largest class ten times the smallest calls for class weights.


# %%
def plot_class_distribution(counts: pd.DataFrame) -> Figure:
    """Images per class (rows of `counts`) in every split (columns), each split to its own scale.

    Raises:
        ValueError: if there is nothing to plot, or a count is negative or missing.
    """
    if counts.empty or not (counts >= 0).all(axis=None):
        raise ValueError("counts needs a row a class, a column a split, and no negative or missing")
    classes = [str(name) for name in counts.index]
    colours = list(class_colours(classes).values())
    width = max(10.0, 3.2 * counts.shape[1])
    fig, axes = new_figure(width, 1.3 + 0.27 * len(classes), 1, counts.shape[1], sharey=True)
    for ax, (split, column) in zip(axes.flat, counts.items(), strict=True):
        total = int(column.sum())
        labels = [f"{n:,}  ({n / max(total, 1):.1%})" for n in column]
        bars = ax.barh(range(len(classes)), column, color=colours)
        ax.bar_label(bars, labels=labels, padding=3, size=8)
        ax.set(xlim=(0, 1.75 * max(column.max(), 1)), xticks=[])
        ax.set_title(f"{split}: {total:,} images\n{_imbalance(column)}", size=10, loc="left")
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(classes)), [fit_text(name, 2, 10) for name in classes])
    axes[0, 0].set_ylim(len(classes) - 0.5, -0.5)
    return fig


# %%
def _imbalance(column: "pd.Series[Any]") -> str:
    empty = int((column == 0).sum())
    if empty:
        return f"{empty} class{'es' * (empty > 1)} without images"
    ratio = column.max() / column.min()
    return f"largest to smallest: {ratio:,.{0 if ratio >= 10 else 1}f}"


# %% [markdown]
# Images are shown in a grid, each under its title. A class's colour stands behind the title rather
# than in its letters, where yellow could not be read.


# %%
def plot_image_grid(
    images: Sequence[npt.NDArray[np.uint8]],
    titles: Sequence[str],
    columns: int = 8,
    title: str | None = None,
    title_colours: Sequence[str] | None = None,
) -> Figure:
    """Images (uint8, [H, W, 3]) in rows of `columns`, each under its title.

    `title` stands over the whole grid; `title_colours` (one an image) go behind the titles.

    Raises:
        ValueError: without images, for one of another form, or if the lengths disagree.
    """
    _check_grid_images(images)
    if len(titles) != len(images) or len(title_colours or images) != len(images):
        raise ValueError(f"{len(images)} images need as many titles and colours")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cell, tallest = _grid_cell(images, columns)
    names = [fit_text(name, cell, 8, lines=4) for name in titles]
    title_lines = max(name.count("\n") + 1 for name in names)
    height = rows * (tallest + 0.14 * title_lines + 0.12) + 0.4 * bool(title)
    fig, axes = new_figure(max(4.0, cell * columns), height, rows, columns)
    for i, ax in enumerate(axes.flat):
        ax.set_axis_off()
        ax.set_anchor("N")  # all that is left over lies below the image, where _trim_grid finds it
        if i < len(images):
            ax.imshow(images[i])
            heading = ax.set_title(names[i], size=8, pad=4)
            if title_colours is not None:
                heading.set_color(ink_on(title_colours[i]))
                heading.set_bbox({"facecolor": title_colours[i], "edgecolor": "none", "pad": 1.5})
    if title:
        set_figure_title(fig, title)
    _trim_grid(fig)
    return fig


# %% [markdown]
# How much room the texts need is known only once they are laid out; what is then left above and
# below the images is taken off the figure.


# %%
GRID_PAD = 0.05  # inches below each row, which the layout asks for once nothing is left over


def _trim_grid(fig: Figure) -> None:
    """Lower `fig` by the height that the images of its grid leave empty."""
    fig.draw_without_rendering()
    spare: dict[int, float] = {}
    for ax in fig.axes:
        place = ax.get_subplotspec()
        if ax.images and place is not None:
            empty = ax.get_position(original=True).height - ax.get_position().height
            row = place.rowspan.start
            spare[row] = min(empty, spare.get(row, empty))
    height = fig.get_figheight()
    fig.set_figheight(height - sum(max(0.0, height * share - GRID_PAD) for share in spare.values()))


# %%
def _grid_cell(images: Sequence[npt.NDArray[np.uint8]], columns: int) -> tuple[float, float]:
    """Width of a column of the grid and height of its tallest image, in inches."""
    shapes = [image.shape[0] / image.shape[1] for image in images]
    cell = min(1.25 / min(1.0, max(shapes)), 10 / columns)
    return cell, min(max(shapes), 2.0) * cell


# %%
def _check_grid_images(images: Sequence[npt.NDArray[np.uint8]]) -> None:
    if len(images) == 0:
        raise ValueError("there are no images to show")
    for i, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image {i} is {image.dtype} {image.shape}; give uint8 [H, W, 3]")


# %% [markdown]
# To see what an augmentation does, put its outcomes in one row: one image, drawn several times.


# %%
def plot_rows(
    rows: Mapping[str, Sequence[npt.NDArray[np.uint8]]], title: str | None = None
) -> Figure:
    """One labelled row of images (uint8, [H, W, 3]) per key; rows may differ in length.

    Raises:
        ValueError: without rows or images, or for an image of another form.
    """
    if not rows:
        raise ValueError("there are no rows to show")
    for images in rows.values():
        _check_grid_images(images)
    columns = max(len(images) for images in rows.values())
    cell = min(1.25, 8.6 / columns)
    width = max(4.0, 1.4 + cell * columns)
    height = (cell + 0.06) * len(rows) + 0.4 * bool(title) + 0.1
    fig, axes = new_figure(width, height, len(rows), columns)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for i, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if i < len(images):
                ax.imshow(images[i])
        name = fit_text(label, 1.2, 9, lines=4)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", size=9)
    if title:
        set_figure_title(fig, title)
    return fig
