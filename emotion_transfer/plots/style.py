"""What all figures share: how they are made, their colours, their mark and how they are saved."""

# %% [markdown]
# #### Figures that know how to be shown
#
# Every plotting function below takes data and *returns* a figure; none of them touches the global
# state of `pyplot`. So a figure is shown once, where the cell ends with it, and can be saved or
# tested like any other value. Jupyter draws such a figure only if it can ask it for a picture,
# which is the one thing that `NotebookFigure` adds.

# %%
import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import seaborn as sns
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from emotion_transfer.sample import MIKELS_CLASSES


class NotebookFigure(Figure):
    """A ``Figure`` that a notebook shows without any backend having been chosen."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


# %% [markdown]
# The *constrained* layout measures all text before it places the axes, so that nothing is cut off,
# however long the names of your classes are.


# %%
def new_figure(
    width: float, height: float, rows: int = 1, cols: int = 1, **subplots: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """An empty figure of `width` x `height` inches and its axes [rows, cols].

    `subplots` goes to ``Figure.subplots``, e.g. ``sharey=True``.
    """
    fig = NotebookFigure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, cols, squeeze=False, **subplots)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


# %% [markdown]
# A name too long for its place is wrapped or shortened, never left to run over its neighbour.

# %%
CHARACTER = 0.6  # width of an average character, in font sizes


def fit_text(text: str, inches: float, size: float, lines: int = 1) -> str:
    """`text` in at most `lines` lines of `inches` at font size `size`, the rest replaced by …

    A single line loses its middle, since names often differ only at the end. Line breaks are kept
    where there is more than one; ``$`` is escaped, since class names are not formulas.
    """
    width = max(5, int(inches * 72 / (size * CHARACTER)))
    if lines == 1:
        flat, tail = " ".join(text.split()), (width - 1) // 2
        fitted = [flat if len(flat) <= width else f"{flat[: width - 1 - tail]}…{flat[-tail:]}"]
    else:
        fitted = [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
        if len(fitted) > lines:
            fitted = [*fitted[: lines - 1], fitted[lines - 1][: width - 1].rstrip() + "…"]
    return "\n".join(fitted).replace("$", r"\$")


# %%
def set_figure_title(fig: Figure, text: str) -> None:
    """A title at the top left, wrapped so that it leaves the top right to ``mark_synthetic``."""
    room = fig.get_figwidth() - 1.7
    fig.suptitle(fit_text(text, room, 12, lines=4), x=0.01, ha="left", size=12)


# %% [markdown]
# ##### A colour for every class
#
# The same emotion has the same colour in every figure. The eight colours are those of Okabe and Ito
# (2008), chosen to stay apart for readers with a colour-vision deficiency, and dealt out by custom:
# anger red, sadness blue, fear black, amusement yellow.

# %%
EMOTION_COLOURS = {
    "amusement": "#F0E442",
    "awe": "#56B4E9",
    "contentment": "#009E73",
    "excitement": "#E69F00",
    "anger": "#D55E00",
    "disgust": "#CC79A7",
    "fear": "#000000",
    "sadness": "#0072B2",
}


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """One hex colour per class: fixed for Mikels' emotions, a seaborn palette for any others."""
    if set(classes) <= set(MIKELS_CLASSES):
        return {name: EMOTION_COLOURS[name] for name in classes}
    palette = sns.color_palette("colorblind" if len(classes) <= 10 else "husl", len(classes))
    return {name: to_hex(colour) for name, colour in zip(classes, palette, strict=True)}


# %%
def ink_on(colour: str) -> str:
    """Black or white, whichever has the higher WCAG contrast on `colour`."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(colour)[:3]
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


# %% [markdown]
# ##### Never mistake a drawing for a result
#
# A figure outlives the notebook it was made in. Where the data were the built-in sample, the figure
# itself must say so, in a strip at the top that belongs to nothing else.

# %%
SYNTHETIC_MARK = "synthetic sample"


def mark_synthetic(fig: Figure) -> None:
    """Label `fig` as drawn from the synthetic sample, in a corner that no axes use; once only."""
    if any(text.get_gid() == SYNTHETIC_MARK for text in fig.texts):
        return
    inset, height = 0.08, fig.get_figheight()
    mark = fig.text(1 - inset / fig.get_figwidth(), 1 - inset / height, SYNTHETIC_MARK.upper())
    mark.set(gid=SYNTHETIC_MARK, ha="right", va="top", size=8, weight="bold", color="black")
    mark.set_bbox({"facecolor": "#FFD54F", "edgecolor": "none", "pad": 2.5})
    mark.set_in_layout(False)
    layout = fig.get_layout_engine()
    if layout is not None and not fig.get_suptitle():  # a title makes the room already
        layout.set(rect=(0, 0, 1, 1 - 0.26 / height))  # type: ignore[call-arg]


# %%
def save_figure(fig: Figure, folder: Path, name: str, *, synthetic: bool) -> Figure:
    """Write `fig` to ``folder/name.png`` at 150 dpi and return it, so that the cell shows it.

    The file appears whole or not at all. `synthetic` marks the figure first.

    Raises:
        ValueError: if `name` is not a plain file name.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} must be a plain file name without a folder")
    if synthetic:
        mark_synthetic(fig)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}.partial"
    try:
        fig.savefig(partial, format="png", dpi=150)
        partial.replace(folder / f"{name}.png")
    finally:
        partial.unlink(missing_ok=True)
    return fig
