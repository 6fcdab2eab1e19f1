"""Figures of data, training and evaluation: every function takes data and returns a `Figure`.

None touches the state of `pyplot`. Names are drawn as they are: ``$`` starts no formula, and
characters that the usual font lacks come from another installed one.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Patch
from matplotlib.text import Text
from scipy.ndimage import zoom

from emotion_toolbox.files import write_atomically
from emotion_toolbox.measures import Estimate, RangeTest
from emotion_toolbox.tables import MIKELS_CLASSES

Picture = npt.NDArray[np.uint8]  # [H, W, 3]
Pictures = Sequence[Picture] | Picture
Names = Sequence[str]
Thaws = Sequence[tuple[float, str]]  # (number of epochs before it, what thaws)

# Okabe and Ito (2008): apart for readers with a colour-vision deficiency, too.
OKABE_ITO = ["#F0E442", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000", "#0072B2"]
YELLOW, SKY, GREEN, ORANGE, RED, PINK, BLACK, BLUE = OKABE_ITO
EMOTION_COLOURS = dict(zip(MIKELS_CLASSES, OKABE_ITO, strict=True))
BELOW: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself, whole, in fonts that have its characters."""

    def draw(self, renderer: Any) -> None:
        for text in self.findobj(Text):
            if isinstance(text, Text) and not text.get_text().isascii():
                text.set_fontfamily(find_fonts(text.get_text())[0])
        super().draw(renderer)

    def savefig(self, *args: Any, **options: Any) -> None:
        super().savefig(*args, **{"bbox_inches": "tight", "pad_inches": 0.08, **options})

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def new_figure(
    width: float, height: float, rows: int = 1, cols: int = 1, **subplots: Any
) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure of `width` x `height` inches and its axes [rows, cols]; see ``Figure.subplots``."""
    fig = NotebookFigure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, cols, squeeze=False, **subplots)
    sns.despine(fig)
    return fig, axes


@lru_cache(maxsize=1024)
def find_fonts(text: str) -> tuple[list[str], set[str]]:
    """The usual fonts, then others for what they lack of `text`; the characters that none has."""
    chosen, missing = list(FontProperties().get_family()), set("".join(text.split()))
    others = sorted(fontManager.get_font_names(), key=lambda name: ("Sans" not in name, name))
    for family in [*chosen, *others]:
        if missing and (found := missing & _characters(family)):
            chosen.append(family)
            missing -= found
    return list(dict.fromkeys(chosen)), missing


@cache
def _characters(family: str) -> frozenset[str]:
    if "Color" in family or "Last Resort" in family:  # not drawn, or one box for all
        return frozenset()
    files = {font.name: font.fname for font in fontManager.ttflist}
    try:
        font = get_font(files.get(family) or findfont(FontProperties(family=[family])))
    except (OSError, RuntimeError):  # removed, or in a form that cannot be read
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))


@cache
def class_labels(classes: tuple[str, ...]) -> list[str]:
    """Names as figures can show them: *class 3*, said once, where no font has the characters."""
    lost = {i: name for i, name in enumerate(classes) if find_fonts(name)[1]}
    if lost:
        legend = "; ".join(f"class {i} is {name}" for i, name in lost.items())
        text = f"No font here has some names (install one, such as Noto Sans CJK). Below, {legend}"
        warnings.warn(text, stacklevel=3)
    return [f"class {i}" if i in lost else name for i, name in enumerate(classes)]


def fit_text(text: str, inches: float, size: float, lines: int = 1) -> str:
    """`text` in at most `lines` lines of `inches` at font size `size`, the rest replaced by …

    A single line loses its middle, since names often differ only at the end. ``$`` is escaped, and
    what no font can draw is given by its code.
    """
    lost = find_fonts(text)[1]
    text = " ".join("".join(ascii(c)[1:-1] if c in lost else c for c in text).split())
    em = 1.0 if any(c > "\u2e80" for c in text) else 0.6  # Chinese, Japanese and Korean are wide
    width = max(5, int(inches * 72 / (size * em)))
    if lines > 1:
        text = textwrap.fill(text, width, max_lines=lines, placeholder="…")
    elif len(text) > width:
        tail = (width - 1) // 2
        text = f"{text[: width - 1 - tail]}…{text[-tail:]}"
    return text.replace("$", r"\$")


def class_colours(classes: Names) -> dict[str, str]:
    """One hex colour per class: fixed for Mikels' emotions, a seaborn palette for any others."""
    if set(classes) <= set(MIKELS_CLASSES):
        return {name: EMOTION_COLOURS[name] for name in classes}
    palette = sns.color_palette("colorblind" if len(classes) <= 10 else "husl", len(classes))
    return dict(zip(classes, palette.as_hex(), strict=True))


def mark_synthetic(fig: Figure, note: str) -> None:
    """Say `note` in a strip above `fig`."""
    strip = {"facecolor": "#FFD54F", "edgecolor": "none", "pad": 2.5}
    above = 1 + 0.08 / fig.get_figheight()
    fig.text(1, above, note, size=8, weight="bold", ha="right", bbox=strip)


def save_figure(fig: Figure, folder: Path, name: str, *, note: str = "") -> Figure:
    """Write `fig`, under `note` if any, whole to ``folder/name.png`` (150 dpi), and return it."""
    if note:
        mark_synthetic(fig, note)
    write_atomically(folder / f"{name}.png", lambda file: fig.savefig(file, format="png", dpi=150))
    return fig


def _name_rows(ax: Any, names: Names, lines: int = 1) -> None:
    """Names to the left of the rows of a horizontal chart, the first on top."""
    ax.set_yticks(range(len(names)), [fit_text(name, 2.8, 9, lines) for name in names], size=9)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)


def plot_class_distribution(counts: pd.DataFrame) -> Figure:
    """Images per class (rows of `counts`) in every split (columns), each split to its own scale."""
    classes, width = counts.index.astype(str).tolist(), max(10.0, 3.2 * counts.shape[1])
    fig, axes = new_figure(width, 0.9 + 0.27 * len(classes), 1, counts.shape[1], sharey=True)
    for ax, (split, column) in zip(axes.flat, counts.items(), strict=True):
        total, most = column.sum(), column.max()
        bars = ax.barh(range(len(classes)), column, color=list(class_colours(classes).values()))
        labels = [f"{n:,}  ({n / total:.1%})" for n in column]
        ax.bar_label(bars, labels=labels, padding=3, size=8)
        least = f"{column.min():,} to " if column.min() < most else ""
        ax.set_title(f"{split}: {total:,} images\n{least}{most:,} of a class", size=10, loc="left")
        ax.set(xlim=(0, 1.75 * most), xticks=[])
        _name_rows(ax, class_labels(tuple(classes)))
    return fig


def plot_image_grid(
    images: Pictures, titles: Names, columns: int = 8, title: str = "", frames: Names = (),
    inches: float = 1.7,
) -> Figure:  # fmt: skip
    """Images (uint8, [H, W, 3]) in rows of `columns`, each under its title, at most `inches` high
    and shaped as the first. `title` stands over the whole grid; `frames` are colours."""
    columns = min(columns, len(images))
    rows, ratio = -(-len(images) // columns), images[0].shape[1] / images[0].shape[0]
    cell = min(inches * ratio, 10.4 / columns)  # this and the rest in inches
    names = ["\n".join(fit_text(line, cell, 8) for line in name.splitlines()) for name in titles]
    heading = fit_text(title, max(5.0, cell * columns), 12, lines=4)
    tall, top = cell / ratio, 0.23 * len(heading.splitlines())
    head = 0.12 + 0.14 * max(len(name.splitlines()) for name in names)
    width, height = (cell + 0.1) * columns, top + (head + tall) * rows
    fig = NotebookFigure(figsize=(width, height))
    fig.subplots_adjust(0, 0, 1, 1 - (top + head) / height, 0.1 / cell, head / tall)
    fig.suptitle(heading, x=0, y=1, ha="left", va="top", size=12)
    frames = frames or ["none"] * len(images)
    for i, (image, name, frame) in enumerate(zip(images, names, frames, strict=True), 1):
        ax = fig.add_subplot(rows, columns, i, xticks=[], yticks=[])
        ax.imshow(image)
        ax.set_title(name, size=8, pad=4)
        ax.spines[:].set(color=frame, linewidth=2.5)
    return fig


def plot_rows(rows: Mapping[str, Pictures], title: str = "") -> Figure:
    """One labelled row of images (uint8, [H, W, 3]) per key, each row of the same length."""
    images = [image for row in rows.values() for image in row]
    columns = len(images) // len(rows)
    fig = plot_image_grid(images, [""] * len(images), columns, title, inches=1.3)
    for label, ax in zip(rows, fig.axes[::columns], strict=True):
        ax.set_ylabel(fit_text(label, 1.3, 9, lines=4), rotation=0, ha="right", va="center", size=9)
    return fig


def _finish_panel(ax: Any, title: str, end: float, thaws: Thaws = ()) -> list[Any]:
    """Name `ax` and mark the thaws up to epoch `end` in it; the lines that do, for a legend."""
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(fontsize=8)
    ax.set_title(title, size=10, loc="left")
    ax.set(xlabel="epochs done", xlim=(0, 1.01 * end))
    ax.locator_params(axis="x", nbins=8, integer=True, min_n_ticks=1)
    ax.grid(alpha=0.3)
    events = zip(thaws, (":", "--"), strict=False)
    return [
        ax.axvline(when, color="0.35", ls=style, lw=1, label=f"after epoch {when:g}: {what}")
        for (when, what), style in events
        if when < end
    ]


def plot_schedule(
    rates: Callable[[int, int], tuple[float, float]], epochs: int, steps: int, thaws: Thaws,
    mix_off: float,
) -> Figure:  # fmt: skip
    """Learning rates of head and backbone (NaN: frozen), `rates` of an epoch and one of its
    `steps`; what thaws when; and after how many epochs mixing ends."""
    places = [(e, s) for e in range(epochs) for s in range(0, steps, max(1, steps // 20))]
    edges = [*(epoch + step / steps for epoch, step in places), epochs]
    table = pd.DataFrame([rates(*place) for place in places], columns=["head", "backbone"])
    table = table.where(table > 0)  # a log scale has no zero
    fig, [[ax]] = new_figure(10, 3.8)
    ax.set_yscale("log")
    if mix_off < epochs:
        ax.axvspan(mix_off, epochs, color="0.9", label=f"no mixing after epoch {mix_off:g}")
    ax.stairs(table["head"], edges, baseline=None, color=ORANGE, label="head", lw=1.8)
    ax.stairs(table["backbone"], edges, baseline=None, color=BLUE, label="backbone", lw=1.8)
    if frozen := int(table["backbone"].isna().cumprod().sum()):  # places before it has a rate
        ax.axvspan(0, edges[frozen], color=BLUE, alpha=0.1, lw=0, label="backbone frozen")
    fig.legend(handles=_finish_panel(ax, "Learning rates", epochs, thaws), **BELOW)
    return fig


def plot_range_tests(tests: Mapping[str, RangeTest]) -> Figure:
    """A panel a range test, by the name of its setting: how the loss changes with the rate."""
    fig, axes = new_figure(5.6 * len(tests), 3.6, 1, len(tests))
    for ax, (name, (table, given, suggested)) in zip(axes.flat, tests.items(), strict=True):
        each = table["loss"] - table["still"]
        ax.plot(table["rate"], each, ".", color="0.7", label="a step")
        ax.plot(table["rate"], table["change"], color=BLUE, lw=1.8, label="smoothed")
        for rate, colour, what in ((given, RED, "as it is set"), (suggested, GREEN, "suggested")):
            if rate:  # a log scale has no zero
                ax.axvline(rate, color=colour, ls="--", lw=1.8, label=f"{rate:.2g}, {what}")
        depth = max(0.01, -1.1 * each.min())  # where the loss explodes it may leave the picture
        labels = {"xlabel": f"{name} (log scale)", "ylabel": "loss, less that at rate 0"}
        ax.set(xscale="log", ylim=(-depth, depth), **labels)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper left")
    return fig


def plot_history(history: pd.DataFrame, *, best_epoch: float, thaws: Thaws = ()) -> Figure:
    """Three panels of a run: loss, accuracy with the gap to training, and macro F1.

    `history` has a row an epoch, 0 being the start; val_ema_* only where there are averages.
    """
    table = history.set_index("epoch")
    clean = table["train_clean_accuracy"]
    table["reached"] = clean - table["gap"]  # by the better of current and averaged weights
    ema = "averaged (EMA)"
    colours = {"training": ORANGE, "validation": BLUE, "current weights": BLUE, ema: GREEN}
    panels = {
        "Loss": {"train_loss": "training", "val_loss": "validation"},
        "Accuracy on clean images": {"train_clean_accuracy": "training", "reached": "validation"},
        "Validation macro F1": {"val_macro_f1": "current weights", "val_ema_macro_f1": ema},
    }
    fig, axes = new_figure(12, 3.6, 1, 3)
    gap = f"gap, at the end {table['gap'].iloc[-1]:+.3f}"
    axes[0, 1].fill_between(table.index, table["reached"], clean, color="0.85", label=gap)
    for ax, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for column, label in curves.items():
            if column in table:
                ax.plot(table[column], ".-", label=label, color=colours[label])
        marks = _finish_panel(ax, title, table.index[-1], thaws)
        best = f"best epoch: {best_epoch:g}"
        marks += [ax.axvline(best_epoch, color=RED, alpha=0.5, zorder=1, label=best)]
    fig.legend(handles=marks, **BELOW)
    return fig


def plot_curves(curves: Mapping[str, Any], title: str) -> Figure:
    """One line a run: what `title` says, such as an accuracy, at the start and after each epoch."""
    fig, [[ax]] = new_figure(6.5, 3.4)
    for (name, values), colour in zip(curves.items(), OKABE_ITO[::-1], strict=False):
        label = fit_text(f"best {max(values):.3f}: {name.replace('_', ' ')}", 3.5, 8)
        ax.plot(values, ".-", label=label, color=colour)
    _finish_panel(ax, title, max(map(len, curves.values())) - 1)
    return fig


def plot_stages(table: pd.DataFrame, picture: Picture) -> Figure:
    """The network from left to right: `picture`, stages of the backbone, head, class scores.

    `table`, of `stage_table`: stage, parameters, share, trains_from (epoch from 1; None: never). A
    block is as high as the root of its parameters; its colour says when it trains.
    """
    begins = table["trains_from"].map("trains from epoch {}".format, na_action="ignore")
    begins = begins.fillna("never trains")
    legend = begins[::-1].unique()  # the last stage trains first
    colours = dict(zip(legend, (ORANGE, SKY, BLUE), strict=False)) | {"never trains": "0.8"}
    height = 0.08 + 0.92 * np.sqrt(table["parameters"] / table["parameters"].max())
    end = len(table)
    fig, [[ax]] = new_figure(2 + end, 2.4)
    ax.imshow(picture, extent=(-1.4, -0.6, -0.4, 0.4))
    ax.bar(range(end), height, 0.7, -height / 2, color=begins.map(colours))
    ax.barh(np.linspace(-0.3, 0.3, 5), (0.1, 0.15, 0.6, 0.08, 0.2), 0.1, end - 0.3, color="0.4")
    texts = [f"{fit_text(str(row.stage), 0.95, 8, 2)}\n{row.parameters:,}\n{row.share:.1%}"
             for row in table.itertuples()]  # fmt: skip
    for i, text in enumerate(["image\nparameters:\nshare:", *texts, "class scores"], -1):
        ax.text(i, -0.56, text, ha="center", va="top", size=8)
    for i in range(-1, end):
        ax.annotate("", (i + 0.64, 0), (i + 0.36, 0), arrowprops={"arrowstyle": "->"})
    ax.set_axis_off()
    ax.set(xlim=(-1.5, end + 0.5), ylim=(-1, 0.52))
    fig.legend(handles=[Patch(color=colours[label], label=label) for label in legend], **BELOW)
    return fig


def plot_guesses(pictures: Pictures, truth: Any, before: Any, after: Any, classes: Names) -> Figure:
    """Pictures (uint8, [H, W, 3]), true classes [N], the answers before and after [N, C]."""
    names, titles, frames = class_labels(tuple(classes)), [], []
    for label, *guesses in zip(truth, np.asarray(before), np.asarray(after), strict=True):
        old, new = (f"{names[p.argmax()]} {p.max():.0%}" for p in guesses)
        titles.append(f"{names[label]}\nbefore: {old}\nafter: {new}")
        frames.append(GREEN if guesses[1].argmax() == label else RED)
    title = "True class, and the answers before and after (green frame: right)"
    return plot_image_grid(pictures, titles, 4, title, frames)


def plot_mistakes(
    images: Pictures, true: Any, predicted: Any, confidence: Any, classes: Names
) -> Figure:
    """Images (uint8, [H, W, 3]), if any, under *true → predicted, confidence* (indices [N])."""
    if not len(images):
        return plot_image_grid([np.full((1, 25, 3), 255, np.uint8)], ["No mistakes to show."])
    names, colours = class_labels(tuple(classes)), list(class_colours(classes).values())
    rows = list(zip(true, predicted, confidence, strict=True))
    titles = [f"{names[t]}\n→ {names[p]} {c:.0%}" for t, p, c in rows]
    title = "Mistakes: true class → the model's answer and its confidence"
    return plot_image_grid(images, titles, 8, title, [colours[t] for t, _, _ in rows])


def overlay_heat(images: Picture, maps: npt.NDArray[Any]) -> Picture:
    """Images (uint8, [N, H, W, 3]) under their heat maps ([N, h, w], 0 to 1), uint8."""
    factors = (1, images.shape[1] / maps.shape[1], images.shape[2] / maps.shape[2])
    heat = zoom(maps, factors, order=1, mode="nearest", grid_mode=True)  # bilinear
    opacity = 0.75 * heat[..., None]  # so that the image is seen through the hottest region too
    colours = 255 * sns.color_palette("inferno", as_cmap=True)(heat)[..., :3]
    return np.asarray(((1 - opacity) * images + opacity * colours).round(), dtype=np.uint8)


def plot_gradcam(images: Picture, maps: npt.NDArray[Any], titles: Names) -> Figure:
    """Images (uint8, [N, H, W, 3]), each beside its overlay with a heat map ([N, h, w], 0 to 1)."""
    gap = np.full_like(images[:, :, : max(1, images.shape[2] // 32)], 255)
    pairs = np.concatenate([images, gap, overlay_heat(images, maps)], axis=2)
    coarse = f"in a map of only {maps.shape[1]} x {maps.shape[2]} cells"
    title = f"Left: the image. Right: what argued for the answer (bright yellow), {coarse}"
    return plot_image_grid(pairs, titles, 4, title)


def plot_confusion(confusion: npt.ArrayLike, classes: Names) -> Figure:
    """A confusion matrix [C, C] (rows true, columns predicted): counts, coloured by their share of
    the row, so that classes of different size compare; on the diagonal that is the recall."""
    cells, many = np.asarray(confusion).reshape(len(classes), len(classes)), len(classes) > 10
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    text = np.array([["" if many and not n else f"{n:,}" for n in row] for row in cells])
    side = 0.3 if many else 0.55  # of a cell, in inches
    room = 72 * side / (0.75 * max(2, *map(len, text.flat)))
    names = [fit_text(name, 1.3, 9) for name in class_labels(tuple(classes))]
    fig, [[ax]] = new_figure(side * len(classes) + 3.4, side * len(classes) + 2.2)
    sns.heatmap(share, annot=text, fmt="", annot_kws={"size": min(10, room)}, cmap="Blues", vmin=0,
                vmax=1, linewidths=0.5, square=True, xticklabels=False, yticklabels=False, ax=ax,
                cbar_kws={"label": "share of the true class", "shrink": 0.6})  # fmt: skip
    middles = np.arange(len(classes)) + 0.5  # seaborn would measure names without their fonts
    ax.set_xticks(middles, names, rotation=90, size=9)
    ax.set_yticks(middles, names, size=9)
    ax.set(xlabel="predicted", ylabel="true")
    return fig


def plot_reliability(
    tables: Sequence[pd.DataFrame], metrics: Sequence[Mapping[str, Estimate]], temperature: float
) -> Figure:
    """Accuracy against confidence and how often each is, before and after the `temperature`.

    From two of ``reliability_table`` and of ``evaluate_predictions``, before and after.
    """
    fig, axes = new_figure(11, 5.8, 2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    titles = "before", f"divided by T = {temperature:.2f}"
    for (top, histogram), table, said, title in zip(axes.T, tables, metrics, titles, strict=True):
        centre, few = (table["lower"] + table["upper"]) / 2, table["count"] < 10
        bars = {"width": table["upper"] - table["lower"], "color": SKY, "edgecolor": "white"}
        right, sure = table["accuracy"], table["confidence"]
        top.bar(centre, right.mask(few), label="accuracy of the bin", **bars)
        top.bar(centre, right.where(few), alpha=0.3, label="the same, fewer than 10 images", **bars)
        top.plot([0, 1], [0, 1], "--", color="0.35", label="perfect calibration")
        top.vlines(sure, right, sure, color=RED, lw=2.5, label="gap to the mean confidence")
        top.set_title(f"ECE {said['ece']:.3f}\nNLL {said['nll']:.3f}", loc="left")
        top.set_title(title, loc="right")
        histogram.bar(centre, table["count"], **{**bars, "color": "0.6"})
        histogram.set_xlabel("confidence")
    axes[0, 0].set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes[1, 0].set_ylabel("images")
    fig.legend(*top.get_legend_handles_labels(), **BELOW)
    return fig


def plot_per_class(table: pd.DataFrame) -> Figure:
    """F1 (bars), precision and recall (marks) of each class, from ``per_class_table``."""
    classes, rows = table.index.astype(str).tolist(), np.arange(len(table))
    fig, [[ax]] = new_figure(9, 1.5 + 0.33 * len(classes))
    ax.barh(rows, table["f1"], color=list(class_colours(classes).values()), alpha=0.75)
    style = {"ls": "", "markersize": 7, "markeredgecolor": "black"}
    # One above the other, so that equal values do not hide each other.
    ax.plot(table["precision"], rows - 0.19, ">", color="white", label="precision", **style)
    ax.plot(table["recall"], rows + 0.19, "o", color="0.45", label="recall", **style)
    names = zip(class_labels(tuple(classes)), table["support"], strict=True)
    _name_rows(ax, [f"{name} ({images:,.0f})" for name, images in names])
    ax.set(xlim=(0, 1.02), xlabel="score")
    ax.set_title("Score of each class (number of images)", loc="left")
    fig.legend(handles=[Patch(color="0.7", label="F1"), *ax.get_lines()], **BELOW)
    return fig


def plot_comparison(
    metrics: Mapping[str, Mapping[str, Estimate]], published: Mapping[str, float]
) -> Figure:
    """Accuracy of each model (points, 95 % intervals) over published accuracies (diamonds)."""
    results = [found["accuracy"] for found in metrics.values()]
    names = [*(name.replace("_", " ") for name in metrics), *published]
    ours, theirs = range(len(results)), range(len(results), len(names))
    fig, [[ax]] = new_figure(9, 1.2 + 0.36 * len(names))
    ends = [e.low for e in results], [e.high for e in results]
    ax.plot(ends, [ours, ours], "|-", color=BLUE, lw=2, ms=11, mew=1.5)
    values, label = [e.value for e in results], "measured here, with its 95 % interval"
    ax.plot(values, ours, "o", color=BLUE, ms=5, label=label)
    if published:
        style = {"color": RED, "ms": 8, "mfc": "white", "label": "published (tested elsewhere)"}
        ax.plot([*published.values()], theirs, "D", **style)
    for row, text in enumerate([*map(str, results), *(f"{v:.3f}" for v in published.values())]):
        ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", size=9)
    _name_rows(ax, names, lines=2)
    ax.margins(x=0.08)
    ax.set_xlabel("accuracy")
    fig.legend(**BELOW)
    return fig
