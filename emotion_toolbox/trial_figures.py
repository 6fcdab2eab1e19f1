"""Figures of a search: its course, what mattered, and which values went with which scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from emotion_toolbox.figures import BLUE, ORANGE, fit_text, new_figure
from emotion_toolbox.trials import Space

GREY = "0.6"


def split_states(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The complete and the pruned trials that have a finite score."""
    scored = table[np.isfinite(table["score"].astype(float))]
    return scored[scored["state"] == "complete"], scored[scored["state"] == "pruned"]


def plot_trials(table: pd.DataFrame, score: str) -> Figure:
    """Every trial's `score` in order, and the best so far; of a pruned one, its last."""
    complete, pruned = split_states(table)
    fig, [[ax]] = new_figure(7.5, 3.8)
    ax.plot(pruned["trial"], pruned["score"], "x", color=GREY, label=f"pruned ({len(pruned)})")
    ax.plot(
        complete["trial"], complete["score"], "o", color=BLUE, label=f"complete ({len(complete)})"
    )
    best = complete.set_index("trial")["score"].astype(float).cummax()
    ax.step([*best.index, table["trial"].max()], [*best, *best.tail(1)], where="post",
            color=ORANGE, lw=1.8, zorder=1, label="best so far")  # fmt: skip
    starts = table["start"].dropna().unique()
    if len(starts) == 1:  # the probe, say
        ax.axhline(starts[0], color="0.35", ls=":", label="before training")
    ax.set(xlabel="trial", ylabel=score)
    ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return fig


def plot_importances(shares: Mapping[str, float]) -> Figure:
    """The share of the differences between scores that each setting explains, as bars."""
    names, values = list(shares), list(shares.values())
    fig, [[ax]] = new_figure(7, 1.2 + 0.36 * len(names))
    ax.set_axisbelow(True)
    bars = ax.barh(range(len(names)), values, color=BLUE, height=0.65)
    ax.bar_label(bars, [f"{value:.0%}" for value in values], padding=4, fontsize=9)
    ax.set_yticks(range(len(names)), names, size=9)
    ax.set(xlabel="importance", xlim=(0, 1.12 * max(values)))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    return fig


def heights(values: Sequence[Any], space: Space) -> npt.NDArray[np.float64]:
    """Where values stand on an axis of `space`, 0 to 1."""
    if space.choices:
        names = list(space.choices)
        return np.array([(names.index(name) + 0.5) / len(names) for name in values])
    scale = np.log if space.log else np.asarray
    low, high, at = (scale(part) for part in (space.low, space.high, np.array(values, dtype=float)))
    return np.asarray((at - low) / (high - low))


def marks(space: Space) -> dict[str, float]:
    """Labels along an axis of `space`, with their heights."""
    if space.choices:
        return dict(zip(space.choices, heights(list(space.choices), space), strict=True))
    spread = (np.geomspace if space.log else np.linspace)(space.low, space.high, 4)
    values = (spread.round() if space.whole else spread).tolist()
    return dict(zip([f"{v:.2g}" for v in values], heights(values, space).tolist(), strict=True))


def plot_parallel(table: pd.DataFrame, spaces: Mapping[str, Space], score: str) -> Figure:
    """A line a trial through its values on one axis a setting, coloured by its `score`.

    Pruned trials are grey behind the complete ones, and the best is the widest line.
    """
    complete, pruned = split_states(table)
    complete = complete.sort_values("score")
    scores = complete["score"].astype(float)
    colours = ScalarMappable(Normalize(scores.min(), scores.max()), "viridis_r")
    fig, [[ax]] = new_figure(max(5.0, 1.55 * len(spaces) + 1.6), 4.4)
    places = range(len(spaces))

    def draw(rows: pd.DataFrame, **style: Any) -> None:
        at = [heights(rows[name].tolist(), space) for name, space in spaces.items()]
        ax.plot(places, np.array(at), **style)

    draw(pruned, color=GREY, lw=0.8, alpha=0.5)
    for number, (value, colour) in enumerate(
        zip(scores, colours.to_rgba(scores.to_numpy()), strict=True), start=1
    ):
        last = number == len(scores)
        draw(complete.iloc[[number - 1]], color=colour, lw=3.2 if last else 1.3, label=f"{value}")
    for place, space in zip(places, spaces.values(), strict=True):
        ax.axvline(place, color="0.25", lw=1, zorder=3)
        for text, height in marks(space).items():
            ax.annotate(fit_text(text, 1.0, 8), (place, height), (4, 0), textcoords="offset points",
                        size=8, va="center", zorder=4,
                        bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip
    ax.set_xticks(places, list(spaces), size=8)
    ax.set(yticks=[], ylim=(-0.03, 1.03), xlim=(-0.15, len(spaces) - 1 + 0.6))
    ax.tick_params(axis="x", length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    fig.colorbar(colours, ax=ax, label=score, pad=0.01)
    return fig
