"""Figures of the training: the plan for the learning rates, and what came of it."""

# %% [markdown]
# #### Seeing the plan before it runs
#
# The schedule is a function of the epoch alone, so it can be drawn before anything is trained: how
# fast each part learns, when which layers thaw, and when mixing stops.

# %%
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emotion_transfer.plots.style import new_figure

TRAIN_COLOUR, VAL_COLOUR, EMA_COLOUR = "#E69F00", "#0072B2", "#009E73"
EVENT_STYLES = (":", "--", "-.")  # of the lines that mark a thaw


# %%
def plot_schedule(
    schedule: pd.DataFrame,
    thaws: Sequence[tuple[float, str]] = (),
    mix_off: float | None = None,
) -> Figure:
    """Learning rates over the epochs, on a log scale (a rate of 0 is left out).

    Args:
        schedule: columns epoch (at a step's start, fractional, from 0), lr_head, lr_backbone.
        thaws: (number of epochs before it, what thaws) pairs; any after the end is left out.
        mix_off: the number of epochs after which images are no longer mixed.

    Raises:
        ValueError: for a missing column or no rows.
    """
    _require_plot_columns(schedule, "epoch", "lr_head", "lr_backbone")
    fig, axes = new_figure(10, 3.8)
    ax = axes[0, 0]
    _draw_rates(ax, schedule)
    last = math.floor(schedule["epoch"].max()) + 1  # the end of the epoch of the last step
    for i, (epoch, label) in enumerate(thaw for thaw in thaws if thaw[0] < last):
        style = EVENT_STYLES[i % len(EVENT_STYLES)]
        ax.axvline(epoch, color="0.35", linestyle=style, label=f"after epoch {epoch:g}: {label}")
    if mix_off is not None:
        label = f"after epoch {mix_off:g}: no mixing"
        ax.axvspan(min(mix_off, last), last, color="0.9", zorder=0, label=label)
    ax.set(xlim=(0, last), xlabel="epochs done")
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    ax.set_title("Learning rates", loc="left")
    fig.legend(loc="outside lower center", ncols=3, frameon=False)
    return fig


# %%
def _require_plot_columns(table: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(f"the table lacks the columns {missing}; it has {list(table.columns)}")
    if table.empty:
        raise ValueError("the table has no rows: there is no epoch to draw")


# %%
def _draw_rates(ax: Any, table: pd.DataFrame) -> None:
    for column, label, colour in (
        ("lr_head", "head", TRAIN_COLOUR),
        ("lr_backbone", "backbone", VAL_COLOUR),
    ):
        rate = table[column].where(table[column] > 0)  # a log scale has no zero
        ax.plot(table["epoch"], rate, color=colour, label=label, marker=_point_marker(table))
    if (table[["lr_head", "lr_backbone"]] > 0).any(axis=None):
        ax.set_yscale("log")
    ax.set(xlabel="epoch", ylabel="learning rate")
    ax.grid(alpha=0.3)


def _point_marker(table: pd.DataFrame) -> str:
    return "." if len(table) <= 20 else ""  # a single point draws no line


# %% [markdown]
# #### Reading a training run
#
# Six panels, from left to right:
#
# * **Loss**: both curves should fall. The training loss is measured on mixed and augmented images
#   with smoothed labels, so it may well lie *above* the validation loss.
# * **Accuracy** and **macro F1** on the validation images, with the current weights and with their
#   running average (EMA), which is smoother and usually a little better.
# * **Gap**: accuracy on clean training images against validation. A band that widens while the
#   validation curve stands still is overfitting.
# * **Learning rates**, to tell a jump that a restart explains from one that nothing does.
# * **Speed**: a sudden drop at a thaw is expected, any other is worth a look.


# %%
PLOTTED_COLUMNS = (
    *("epoch", "train_loss", "val_loss", "val_accuracy", "val_macro_f1", "train_clean_accuracy"),
    *("gap", "lr_head", "lr_backbone", "images_per_second"),
)


def plot_history(
    history: pd.DataFrame,
    *,
    best_epoch: float | None = None,
    thaws: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Six panels of a run: loss, accuracy, macro F1, gap, learning rates, speed.

    Args:
        history: a row an epoch, counted from 1; ``PLOTTED_COLUMNS``, and where present also
            val_ema_accuracy, val_ema_macro_f1, seconds and memory_mb. NaN: not measured.
        best_epoch: where the best model was found, counted from 1.
        thaws: (number of epochs before it, what thaws) pairs; any still to come is left out.

    Raises:
        ValueError: for a missing column or no rows.
    """
    _require_plot_columns(history, *PLOTTED_COLUMNS)
    fig, axes = new_figure(11, 6, 2, 3)
    loss, accuracy, f1, gap, rates, speed = axes.flat
    _draw_curve(loss, history, "train_loss", "training", TRAIN_COLOUR)
    _draw_curve(loss, history, "val_loss", "validation", VAL_COLOUR)
    for ax, name in ((accuracy, "accuracy"), (f1, "macro_f1")):
        _draw_curve(ax, history, f"val_{name}", "current weights", VAL_COLOUR)
        _draw_curve(ax, history, f"val_ema_{name}", "averaged (EMA)", EMA_COLOUR, linestyle="--")
    _draw_gap(gap, history)
    _draw_rates(rates, history)
    _draw_curve(speed, history, "images_per_second", "training", TRAIN_COLOUR)
    fastest = history["images_per_second"].max()
    speed.set_ylim(0, 1.1 * fastest if fastest > 0 else None)
    titles = ["Loss", "Validation accuracy", "Validation macro F1"]
    titles += ["Accuracy on clean images", "Learning rates", _speed_title(history)]
    labels = ["loss", "accuracy", "macro F1", "accuracy", "learning rate", "images per second"]
    for ax, title, label in zip(axes.flat, titles, labels, strict=True):
        _finish_panel(ax, history, title, label, best_epoch, thaws)
    if events := _event_handles(loss):
        fig.legend(handles=events, loc="outside lower center", ncols=3, frameon=False)
    return fig


# %% [markdown]
# The panels share their axis of epochs and the lines that mark events, which one legend explains.


# %%
def _draw_curve(
    ax: Any, table: pd.DataFrame, column: str, label: str, colour: str, linestyle: str = "-"
) -> None:
    """A line through the epochs at which `column` was measured; nothing if it never was."""
    if column in table.columns and table[column].notna().any():
        known = table[table[column].notna()]
        line = {"color": colour, "linestyle": linestyle, "marker": _point_marker(known)}
        ax.plot(known["epoch"], known[column].astype(float), label=label, **line)


# %%
def _draw_gap(ax: Any, history: pd.DataFrame) -> None:
    known = history[history["train_clean_accuracy"].notna() & history["gap"].notna()]
    if known.empty:
        ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)
        return
    known = known.assign(validation=known["train_clean_accuracy"] - known["gap"])
    _draw_curve(ax, known, "train_clean_accuracy", "training", TRAIN_COLOUR)
    _draw_curve(ax, known, "validation", "validation", VAL_COLOUR)
    ends = (known["epoch"], known["validation"], known["train_clean_accuracy"])
    ax.fill_between(*ends, color="0.85", label=f"gap, at the end {known['gap'].iloc[-1]:+.3f}")


# %%
def _finish_panel(
    ax: Any,
    history: pd.DataFrame,
    title: str,
    label: str,
    best_epoch: float | None,
    thaws: Sequence[tuple[float, str]],
) -> None:
    first, last = history["epoch"].min(), history["epoch"].max()
    if len(ax.get_lines()) > 1:
        ax.legend(fontsize=8)
    shown = [(epoch, text) for epoch, text in thaws if first - 0.5 <= epoch < last]
    for i, (epoch, text) in enumerate(shown):
        style = EVENT_STYLES[i % len(EVENT_STYLES)]
        ax.axvline(
            epoch,
            color="0.35",
            linestyle=style,
            lw=1,
            zorder=1,
            gid=f"after epoch {epoch:g}: {text}",
        )
    if best_epoch is not None:
        best = {"color": "#D55E00", "lw": 2, "alpha": 0.6, "zorder": 1}
        ax.axvline(best_epoch, gid=f"best epoch: {best_epoch:g}", **best)
    ax.set_title(title, size=10, loc="left")
    ax.set(xlabel="epoch", ylabel=label, xlim=(first - 0.5, last + 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)


# %%
def _event_handles(ax: Any) -> list[Any]:
    """The lines of `ax` that mark an event, labelled for the figure's legend."""
    lines = [line for line in ax.get_lines() if line.get_gid()]
    for line in lines:
        line.set_label(line.get_gid())
    return lines


# %%
def _speed_title(history: pd.DataFrame) -> str:
    """Title of the speed panel, with the run's total time and peak memory where they are known."""
    known = {name: history[name].dropna() for name in ("seconds", "memory_mb") if name in history}
    facts = []
    if len(known.get("seconds", ())):
        facts.append(f"{known['seconds'].sum() / 60:,.1f} min")
    if len(known.get("memory_mb", ())):
        facts.append(f"peak {known['memory_mb'].max() / 1024:.1f} GB")
    return f"Speed ({', '.join(facts)})" if facts else "Speed"
