"""Figures of data, training and evaluation: every function takes data and returns a `Figure`.

None touches the state of `pyplot`. Names are drawn as they are: ``$`` starts no formula, and
characters that the usual font lacks come from another installed one.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import cycle
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
from matplotlib.ticker import MaxNLocator
from PIL import Image

from emotion_toolbox.emotions import MIKELS_CLASSES
from emotion_toolbox.files import write_atomically
from emotion_toolbox.measures import Estimate

Picture = npt.NDArray[np.uint8]  # [H, W, 3]
Pictures = Sequence[Picture | None] | Picture
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
                text.set_fontfamily(find_fonts(text.get_text(), tuple(text.get_fontfamily()))[0])
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
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


@lru_cache(maxsize=1024)
def find_fonts(text: str, families: tuple[str, ...] = ()) -> tuple[list[str], set[str]]:
    """`families` (else the usual) and what they lack for `text`; the characters no font has."""
    chosen = list(families or FontProperties().get_family())
    missing = {ord(c) for c in text if not c.isspace()}
    others = sorted({f.name for f in fontManager.ttflist}, key=lambda f: ("Sans" not in f, f))
    for family in [*chosen, *others]:
        if missing and (found := missing & _characters(family)):
            chosen += [family] if family not in chosen else []
            missing -= found
    return chosen, {chr(c) for c in missing}


@cache
def _characters(family: str) -> frozenset[int]:
    files = [font.fname for font in fontManager.ttflist if font.name == family]
    try:
        font = get_font((files or [findfont(FontProperties(family=[family]))])[0])
    except (OSError, RuntimeError):  # pictures in colour, say
        return frozenset()
    boxes = "Color" in family or "Last" in family  # nothing, or one box for all
    return frozenset(() if boxes else font.get_charmap())


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

    A single line loses its middle, since names often differ only at the end; more keep their
    breaks. ``$`` is escaped, and what no font can draw is given by its code.
    """
    text = "".join(ascii(c)[1:-1] if c in find_fonts(text)[1] else c for c in text)
    em = 1.0 if any(c > "\u2e80" for c in text) else 0.6  # Chinese, Japanese and Korean are wide
    width = max(5, int(inches * 72 / (size * em)))
    if lines == 1:
        flat, tail = " ".join(text.split()), (width - 1) // 2
        fitted = [flat if len(flat) <= width else f"{flat[: width - 1 - tail]}…{flat[-tail:]}"]
    else:
        fitted = [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
        if len(fitted) > lines:
            fitted = [*fitted[: lines - 1], fitted[lines - 1][: width - 1].rstrip() + "…"]
    return "\n".join(fitted).replace("$", r"\$")


def class_colours(classes: Names) -> dict[str, str]:
    """One hex colour per class: fixed for Mikels' emotions, a seaborn palette for any others."""
    if set(classes) <= set(MIKELS_CLASSES):
        return {name: EMOTION_COLOURS[name] for name in classes}
    palette = sns.color_palette("colorblind" if len(classes) <= 10 else "husl", len(classes))
    return dict(zip(classes, palette.as_hex(), strict=True))


def mark_synthetic(fig: Figure, note: str = "SYNTHETIC SAMPLE") -> None:
    """Say `note` in a strip above `fig`, in place of any before it."""
    for text in [text for text in fig.texts if text.get_gid() == "mark"]:
        text.remove()
    mark = fig.text(1, 1 + 0.08 / fig.get_figheight(), note, size=8, weight="bold", ha="right")
    mark.set(gid="mark", bbox={"facecolor": "#FFD54F", "edgecolor": "none", "pad": 2.5})


def save_figure(fig: Figure, folder: Path, name: str, *, note: str = "") -> Figure:
    """Write `fig`, under `note` if any, whole to ``folder/name.png`` (150 dpi), and return it."""
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} must be a plain file name without a folder")
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
        total = int(column.sum())
        bars = ax.barh(range(len(classes)), column, color=list(class_colours(classes).values()))
        labels = [f"{n:,}  ({n / max(total, 1):.1%})" for n in column]
        ax.bar_label(bars, labels=labels, padding=3, size=8)
        ratio = f"largest to smallest: {column.max() / max(column.min(), 1):,.1f}"
        balance = ratio if column.min() else f"classes without images: {(column == 0).sum()}"
        ax.set_title(f"{split}: {total:,} images\n{balance}", size=10, loc="left")
        ax.set(xlim=(0, 1.75 * max(column.max(), 1)), xticks=[])
        _name_rows(ax, class_labels(tuple(classes)))
    return fig


def plot_image_grid(
    images: Pictures, titles: Names, columns: int = 8, title: str = "", frames: Names = ()
) -> Figure:
    """Images (uint8, [H, W, 3]; None leaves a gap) in rows of `columns`, each under its title.

    `title` stands over the whole grid, `frames` are colours. ValueError: no image, other forms.
    """
    for i, image in enumerate(images):
        if image is not None and (image.dtype != np.uint8 or image.shape[2:] != (3,)):
            raise ValueError(f"image {i} is {image.dtype} {image.shape}; give uint8 [H, W, 3]")
    if not (shapes := [image.shape for image in images if image is not None]):
        raise ValueError("there are no images to show")
    columns = min(columns, len(images))
    cell = min(1.7 * max(1.0, *(w / h for h, w, _ in shapes)), 10.4 / columns)  # in inches
    tall = cell * min(2.0, max(h / w for h, w, _ in shapes))
    names = ["\n".join(fit_text(line, cell, 8) for line in title.splitlines()) for title in titles]
    head = 0.06 + 0.14 * max(name.count("\n") + bool(name) for name in names)
    heading = fit_text(title, max(5.0, 1.1 * cell * columns), 12, lines=4)
    top, step = 0.23 * (heading.count("\n") + bool(heading)), head + tall + 0.06
    width, height = (cell + 0.1) * columns, top + step * -(-len(images) // columns)
    fig = NotebookFigure(figsize=(width, height))
    fig.suptitle(heading, x=0, y=1, ha="left", va="top", size=12)
    frames = frames or ["none"] * len(images)
    for i, (image, name, frame) in enumerate(zip(images, names, frames, strict=True)):
        if image is not None:
            x, y = (cell + 0.1) * (i % columns), height - top - head - tall - step * (i // columns)
            ax = fig.add_axes((x / width, y / height, cell / width, tall / height), anchor="N")
            ax.imshow(image)
            ax.set(xticks=[], yticks=[])
            ax.set_title(name, size=8, pad=4)
            ax.spines[:].set(color=frame, linewidth=2.5)
    return fig


def plot_rows(rows: Mapping[str, Pictures], title: str = "") -> Figure:
    """One labelled row of images (uint8, [H, W, 3]) per key; rows may differ in length."""
    columns, first = max(8, 0, *map(len, rows.values())), 0
    cells = [image for row in rows.values() for image in [*row, *[None] * (columns - len(row))]]
    fig = plot_image_grid(cells, [""] * len(cells), columns, title)
    for label, row in rows.items():
        name = fit_text(label, 1.3, 9, lines=4)
        fig.axes[first].set_ylabel(name, rotation=0, ha="right", va="center", size=9)
        first += len(row)
    return fig


def _draw_curve(ax: Any, values: Any, label: str, colour: Any) -> None:
    """A line through what was measured; dots, too, where few points might draw no line."""
    known = values.dropna()
    ax.plot(known, marker="." if len(known) <= 20 else "", label=label, color=colour)


def _draw_rates(ax: Any, table: pd.DataFrame, edges: Sequence[float]) -> None:
    """Rates as steps between `edges` on a log scale; the backbone's frozen epochs are shaded."""
    for name, colour in (("head", ORANGE), ("backbone", BLUE)):
        rates = table[f"lr_{name}"].where(table[f"lr_{name}"] > 0)  # a log scale has no zero
        ax.stairs(rates, edges, baseline=None, color=colour, label=name, lw=1.8)
    frozen = int(rates.notna().to_numpy().argmax()) if rates.notna().any() else len(rates)
    if frozen:
        ax.axvspan(edges[0], edges[frozen], color=BLUE, alpha=0.1, lw=0, label="backbone frozen")
    ax.set_yscale("log")


def _finish_panel(ax: Any, title: str, end: float, thaws: Thaws = (), best: Any = None) -> Any:
    """Name `ax` and mark events up to epoch `end` in it; the lines that do, for a legend."""
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(fontsize=8)
    styles = zip((thaw for thaw in thaws if thaw[0] < end), cycle((":", "--", "-.")), strict=False)
    marks = [ax.axvline(when, color="0.35", ls=style, lw=1, label=f"after epoch {when:g}: {what}")
             for (when, what), style in styles]  # fmt: skip
    if best is not None:
        marks += [ax.axvline(best, color=RED, alpha=0.5, zorder=1, label=f"best epoch: {best:g}")]
    ax.set_title(title, size=10, loc="left")
    ax.set(xlabel="epochs done", xlim=(0, 1.01 * end))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    return marks


def plot_schedule(
    rates: Callable[[int, int], tuple[float, float]], epochs: int, steps: int, thaws: Thaws = (),
    mix_off: float | None = None,
) -> Figure:  # fmt: skip
    """Learning rates of head and backbone (NaN: frozen), `rates` of an epoch and one of its
    `steps`; what thaws when; and after how many epochs mixing ends."""
    places = [(e, s) for e in range(epochs) for s in range(0, steps, max(1, steps // 20))]
    table = pd.DataFrame([rates(*p) for p in places], columns=["lr_head", "lr_backbone"])
    fig, [[ax]] = new_figure(10, 3.8)
    if mix_off is not None and mix_off < epochs:
        ax.axvspan(mix_off, epochs, color="0.9", label=f"no mixing after epoch {mix_off:g}")
    _draw_rates(ax, table, [*(epoch + step / steps for epoch, step in places), epochs])
    fig.legend(handles=_finish_panel(ax, "Learning rates", epochs, thaws), **BELOW)
    return fig


def plot_history(history: pd.DataFrame, *, best_epoch: float, thaws: Thaws = ()) -> Figure:
    """Six panels of a run: loss, accuracy, macro F1, gap, learning rates, speed.

    `history` has a row an epoch, counted from 1, with the columns read below (val_ema_* only where
    there are averages); its rates are the highest of each epoch. NaN: frozen, or not measured.
    """
    fig, axes = new_figure(11, 6, 2, 3)
    loss, accuracy, f1, gap, rates, speed = axes.flat
    table = history.assign(clean=history["train_clean_accuracy"] - history["gap"])
    table.index = pd.Index(table["epoch"])
    scores = ((accuracy, "accuracy"), (f1, "macro_f1"))
    for ax, column, label, colour in (
        *((loss, "train_loss", "training", ORANGE), (loss, "val_loss", "validation", BLUE)),
        *((ax, f"val_{score}", "current weights", BLUE) for ax, score in scores),
        *((ax, f"val_ema_{score}", "averaged (EMA)", GREEN) for ax, score in scores),
        *((gap, "train_clean_accuracy", "training", ORANGE), (gap, "clean", "validation", BLUE)),
        (speed, "images_per_second", "training", ORANGE),
    ):
        if column in table or "ema" not in column:
            _draw_curve(ax, table[column], label, colour)
    known = table.dropna(subset="gap")
    size = f"at the end {known['gap'].iloc[-1]:+.3f}" if len(known) else "not measured"
    band = (known["clean"], known["train_clean_accuracy"])
    gap.fill_between(known.index, *band, color="0.85", label=f"gap, {size}")
    _draw_rates(rates, table, [table.index[0] - 1, *table.index])
    speed.set_ylim(0, 1.1 * speed.get_ylim()[1])
    facts = f"{table['seconds'].sum() / 60:,.1f} min, peak {table['memory_mb'].max() / 1024:.1f} GB"
    titles = ["Loss", "Validation accuracy", "Validation macro F1", "Accuracy on clean images"]
    titles += ["Highest learning rate of each epoch", f"Images per second ({facts})"]
    for ax, title in zip(axes.flat, titles, strict=True):
        marks = _finish_panel(ax, title, table.index[-1], thaws, best_epoch)
    fig.legend(handles=marks, **BELOW)
    return fig


def plot_curves(curves: Mapping[str, Any], title: str) -> Figure:
    """One line a run: what `title` says, such as *validation accuracy*, after every epoch [E]."""
    fig, [[ax]] = new_figure(6.5, 3.4)
    for (name, values), colour in zip(curves.items(), cycle(OKABE_ITO[::-1]), strict=False):
        line = pd.Series(np.asarray(values), index=range(1, len(values) + 1))
        legend = fit_text(f"best {line.max():.3f}: {name.replace('_', ' ')}", 3.5, 8)
        _draw_curve(ax, line, legend, colour)
    _finish_panel(ax, title, max(map(len, curves.values())))
    return fig


def plot_stages(table: pd.DataFrame, picture: Picture) -> Figure:
    """The network from left to right: `picture`, stages of the backbone, head, class scores.

    `table`, of `stage_table`: stage, parameters, share, trains_from (epoch from 1; None: never). A
    block is as high as the root of its parameters; its colour says when it trains.
    """
    starts, end = table["trains_from"].astype(float), len(table)
    colours = dict(zip(np.unique(starts.dropna()), (ORANGE, SKY, BLUE, GREEN, PINK), strict=False))
    height = 0.08 + 0.92 * np.sqrt(table["parameters"] / table["parameters"].max())
    fig, [[ax]] = new_figure(2 + end, 2.4)
    ax.imshow(picture, extent=(-1.4, -0.6, -0.4, 0.4))
    ax.bar(range(end), height, 0.7, -height / 2, color=[colours.get(e, "0.8") for e in starts])
    ax.barh(np.linspace(-0.3, 0.3, 5), (0.1, 0.15, 0.6, 0.08, 0.2), 0.1, end - 0.3, color="0.4")
    texts = [f"{fit_text(str(row.stage), 0.95, 8, 2)}\n{row.parameters:,}\n{row.share:.1%}"
             for row in table.itertuples()]  # fmt: skip
    for i, text in enumerate(["image\nparameters:\nshare:", *texts, "class scores"], -1):
        ax.text(i, -0.56, text, ha="center", va="top", size=8)
    for i in range(-1, end):
        ax.annotate("", (i + 0.64, 0), (i + 0.36, 0), arrowprops={"arrowstyle": "->"})
    ax.set_axis_off()
    ax.set(xlim=(-1.5, end + 0.5), ylim=(-1, 0.52))
    handles = [Patch(color=c, label=f"trains from epoch {e:g}") for e, c in colours.items()]
    handles += [Patch(color="0.8", label="never trains")] * bool(starts.isna().any())
    fig.legend(handles=handles, **BELOW)
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


def plot_gradcam(images: Picture, maps: npt.NDArray[Any], titles: Names) -> Figure:
    """Images (uint8, [N, H, W, 3]), each beside its overlay with a heat map ([N, h, w], 0 to 1)."""
    if images.shape[0] != len(maps) or not ((maps >= 0) & (maps <= 1)).all():
        raise ValueError(f"give {len(images)} maps between 0 and 1, without NaN, not {maps.shape}")
    size, inferno = images.shape[2:0:-1], sns.color_palette("inferno", as_cmap=True)
    smooth = [Image.fromarray(m.astype(np.float32)).resize(size, 2) for m in maps]  # bilinear
    heat = np.stack([np.asarray(m) for m in smooth]).clip(0, 1)
    opacity = 0.75 * heat[..., None]  # so that the image is seen through the hottest region too
    overlay = (1 - opacity) * images + opacity * 255 * inferno(heat)[..., :3]
    gap = np.full((*images.shape[:2], max(1, images.shape[2] // 32), 3), 255)
    pairs = np.concatenate([images, gap, overlay.round()], axis=2).astype(np.uint8)
    coarse = f"in a map of only {maps.shape[1]} x {maps.shape[2]} cells"
    title = f"Left: the image. Right: what argued for the answer (bright yellow), {coarse}"
    return plot_image_grid(list(pairs), titles, 4, title)


def plot_confusion(confusion: npt.ArrayLike, classes: Names) -> Figure:
    """A confusion matrix [C, C] (rows true, columns predicted): counts, coloured by their share of
    the row, so that classes of different size compare; on the diagonal that is the recall."""
    count, many = len(classes), len(classes) > 10
    cells = np.asarray(confusion).reshape(count, count)
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    names = [fit_text(name, 1.3, 9) for name in class_labels(tuple(classes))]
    text = np.array([["" if many and not n else f"{n:,}" for n in row] for row in cells])
    side = (0.3 if many else 0.55) * count  # inches
    room = 72 * side / count / (0.75 * max(2, *map(len, text.flat)))
    fig, [[ax]] = new_figure(side + 3.4, side + 2.2)
    bar, size = {"label": "share of the true class", "shrink": 0.6}, {"size": min(10.0, room)}
    sns.heatmap(share, annot=text, fmt="", annot_kws=size, cmap="Blues", vmin=0, vmax=1,
                linewidths=0.5, square=True, cbar_kws=bar, xticklabels=False,
                yticklabels=False, ax=ax)  # fmt: skip
    middles = np.arange(count) + 0.5
    ax.set_xticks(middles, names, rotation=90, size=9)
    ax.set_yticks(middles, names, rotation=0, size=9)
    ax.set(xlabel="predicted", ylabel="true")
    return fig


def plot_reliability(table: pd.DataFrame, ece: float | Estimate) -> Figure:
    """Accuracy against confidence, from ``reliability_table``, and how often each confidence is."""
    fig, axes = new_figure(6.5, 5.6, 2, 1, sharex=True, height_ratios=(3, 1))
    top, histogram = axes.flat
    centre, few = (table["lower"] + table["upper"]) / 2, table["count"] < 10
    bars = {"width": table["upper"] - table["lower"], "color": SKY, "edgecolor": "white"}
    right, sure = table["accuracy"], table["confidence"]
    top.bar(centre, right.mask(few), label="accuracy of the bin", **bars)
    top.bar(centre, right.where(few), alpha=0.3, label="the same, fewer than 10 images", **bars)
    top.plot([0, 1], [0, 1], "--", color="0.35", label="perfect calibration")
    top.vlines(sure, right, sure, color=RED, lw=2.5, label="gap to the mean confidence")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.set_title(f"Expected calibration error {ece:.3f}", loc="left")
    histogram.bar(centre, table["count"], **{**bars, "color": "0.6"})
    histogram.set(xlabel="confidence", ylabel="images")
    fig.legend(**BELOW | {"ncols": 2})
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
    metrics: Mapping[str, Mapping[str, Estimate]], published: Mapping[str, float] | None = None,
    metric: str = "accuracy",
) -> Figure:  # fmt: skip
    """`metric` of each model (points, 95 % intervals) over published values (diamonds) of it."""
    results = {name.replace("_", " "): found[metric] for name, found in metrics.items()}
    published = published or {}
    names, ours, theirs = [*results, *published], range(len(results)), [*published.values()]
    fig, [[ax]] = new_figure(9, 1.2 + 0.36 * len(names))
    for row, e in zip(ours, results.values(), strict=True):
        ax.plot([e.low, e.high], [row, row], "|-", color=BLUE, lw=2, ms=11, mew=1.5)
    values, label = [e.value for e in results.values()], "measured here, with its 95 % interval"
    ax.plot(values, ours, "o", color=BLUE, ms=5, label=label)
    style = {"color": RED, "ms": 8, "mfc": "white", "label": "published (tested elsewhere)"}
    if theirs:
        ax.plot(theirs, range(len(results), len(names)), "D", **style)
    for row, text in enumerate([*map(str, results.values()), *(f"{v:.3f}" for v in theirs)]):
        ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", size=9)
    _name_rows(ax, names, lines=2)
    ax.margins(x=0.08)
    ax.set_xlabel(metric.replace("_", " ").replace("f1", "F1"))
    fig.legend(**BELOW)
    return fig
