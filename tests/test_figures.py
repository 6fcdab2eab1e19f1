"""What the figures show, and that all of their text can be read."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from emotion_toolbox.emotions import MIKELS_CLASSES
from emotion_toolbox.figures import (
    EMOTION_COLOURS,
    class_colours,
    fit_text,
    mark_synthetic,
    new_figure,
    plot_class_distribution,
    plot_comparison,
    plot_confusion,
    plot_gradcam,
    plot_history,
    plot_image_grid,
    plot_mistakes,
    plot_per_class,
    plot_reliability,
    plot_rows,
    plot_schedule,
    save_figure,
)
from emotion_toolbox.measures import Estimate, per_class_table, reliability_table

pytestmark = pytest.mark.filterwarnings("error")  # a layout that fails only warns

CLASSES = {
    2: ["cat", "a rather long class name that goes on and on"],
    8: list(MIKELS_CLASSES),
    20: [f"class_{i}_with_quite_a_long_name_{i}" for i in range(20)],
}
THAWS = [(3.0, "last stages thaw"), (10.0, "all layers thaw")]


# --- what a reader would see -------------------------------------------------------------------


def hidden_ticks(axis: Axis) -> Iterator[Text]:
    """Tick labels beyond the limits of an axis, which are never drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
        if not low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)


def drawn_texts(fig: Figure) -> list[tuple[str, Any]]:
    """Every text that is drawn, with its box in pixels."""
    fig.draw_without_rendering()
    hidden: set[Any] = set()
    for ax in fig.axes:
        if ax.axison:
            hidden.update(hidden_ticks(ax.xaxis), hidden_ticks(ax.yaxis))
        else:
            hidden.update(ax.xaxis.findobj(Text), ax.yaxis.findobj(Text))
    texts = [text for text in fig.findobj(Text) if isinstance(text, Text) and text not in hidden]
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in shown]


def assert_readable(fig: Figure) -> None:
    """No text is cut off by the figure's edge, and none lies on another."""
    texts, boxes = zip(*drawn_texts(fig), strict=True)
    low, high = (np.array([getattr(box, end) for box in boxes]) for end in ("min", "max"))
    cut = ((low < -1) | (high > np.array(fig.bbox.size) + 1)).any(axis=1)
    assert not cut.any(), f"cut off: {[texts[i] for i in np.flatnonzero(cut)]}"
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    pairs = np.argwhere(np.triu((shared > 1).all(axis=2), k=1))
    assert not len(pairs), f"overlapping: {[(texts[i], texts[j]) for i, j in pairs]}"


def axes_of(fig: Figure) -> list[Any]:
    return list(fig.axes)


def legend_of(fig: Figure) -> list[str]:
    return [text.get_text() for legend in fig.legends for text in legend.get_texts()]


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.get_lines()}


def picture(height: int = 24, width: int = 24, value: int = 120) -> npt.NDArray[np.uint8]:
    return np.full((height, width, 3), value, dtype=np.uint8)


def answers(classes: int, n: int = 3000) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.5
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def history(epochs: int) -> pd.DataFrame:
    epoch = np.arange(1, epochs + 1)
    rise = 1 - np.exp(-epoch / 8)
    table = pd.DataFrame(
        {
            "epoch": epoch,
            "train_loss": 2 - rise,
            "val_loss": 1.9 - rise,
            "val_accuracy": 0.3 + 0.4 * rise,
            "val_macro_f1": 0.28 + 0.4 * rise,
            "val_ema_accuracy": 0.25 + 0.5 * rise,
            "val_ema_macro_f1": 0.24 + 0.5 * rise,
            "train_clean_accuracy": 0.3 + 0.6 * rise,
            "lr_head": 3e-3 / epoch,
            "lr_backbone": np.where(epoch <= 3, 0.0, 3e-5 / epoch),
            "images_per_second": 2400.0 + epoch,
            "seconds": 60.0,
            "memory_mb": 11264.0,
        }
    )
    return table.assign(gap=table["train_clean_accuracy"] - table["val_accuracy"])


def schedule() -> pd.DataFrame:
    epoch = np.linspace(0, 40, 400, endpoint=False)
    head = 3e-3 * (1 + np.cos(epoch % 10 / 10 * np.pi)) / 2 + 1e-6
    return pd.DataFrame(
        {"epoch": epoch, "lr_head": head, "lr_backbone": np.where(epoch < 3, 0, head / 100)}
    )


def counts(names: list[str]) -> pd.DataFrame:
    train = 100 * np.arange(1, len(names) + 1) ** 2
    return pd.DataFrame({"train": train, "val": train // 10, "test": train // 5}, index=names)


def by_classes(plot: Callable[[list[str]], Figure]) -> list[Any]:
    name = plot.__name__
    return [pytest.param(lambda n=n: plot(CLASSES[n]), id=f"{name}-{n}") for n in CLASSES]


def confusion(names: list[str], scale: int = 1) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return scale * (rng.integers(1, 90, (len(names), len(names))) + np.diag([900] * len(names)))


def distribution_figure(names: list[str]) -> Figure:
    return plot_class_distribution(counts(names))


def confusion_figure(names: list[str]) -> Figure:
    return plot_confusion(confusion(names), names)


def reliability_figure(names: list[str]) -> Figure:
    return plot_reliability(reliability_table(*answers(len(names))), Estimate(0.05, 0.04, 0.06))


def per_class_figure(names: list[str]) -> Figure:
    labels, p = answers(len(names))
    return plot_per_class(per_class_table(labels, p.argmax(axis=1), names))


def mistakes_figure(names: list[str]) -> Figure:
    n = len(names)
    true = [i % n for i in range(12)]
    return plot_mistakes([picture()] * 12, true, [(i + 1) % n for i in true], [0.93] * 12, names)


def grid_figure(names: list[str]) -> Figure:
    colours = list(class_colours(names).values())
    return plot_image_grid([picture()] * len(names), names, title="Images", title_colours=colours)


FIGURES = [
    *by_classes(distribution_figure),
    *by_classes(confusion_figure),
    *by_classes(reliability_figure),
    *by_classes(per_class_figure),
    *by_classes(mistakes_figure),
    *by_classes(grid_figure),
    *[
        pytest.param(
            lambda n=n: plot_history(history(n), best_epoch=min(n, 31), thaws=THAWS),
            id=f"history-{n}",
        )
        for n in (1, 4, 40)
    ],
    pytest.param(lambda: plot_schedule(schedule(), THAWS, 37), id="schedule"),
    pytest.param(
        lambda: plot_rows({"a": [picture()], "a long label, wrapped": [picture()] * 8}, "Title"),
        id="rows",
    ),
    pytest.param(
        lambda: plot_gradcam(
            np.stack([picture()] * 5), np.zeros((5, 24, 24)), ["true contentment, 93% awe"] * 5
        ),
        id="gradcam",
    ),
    pytest.param(
        lambda: plot_comparison(
            {"ours": Estimate(0.76, 0.757, 0.769), "majority": Estimate(0.13, 0.12, 0.14)},
            {"a published network with a long name (Author et al. 2023)": 0.74},
        ),
        id="comparison",
    ),
    pytest.param(
        lambda: plot_image_grid([picture()], ["one"], title="A title far too long for one image"),
        id="single image",
    ),
    pytest.param(
        lambda: plot_image_grid([picture(20, 60), picture(60, 20)], ["wide", "tall"]), id="shapes"
    ),
    pytest.param(lambda: plot_mistakes([], [], [], [], CLASSES[8]), id="no mistakes"),
]


@pytest.mark.parametrize("make", FIGURES)
def test_every_text_can_be_read(make: Callable[[], Figure]) -> None:
    fig = make()
    assert fig.get_figwidth() <= 13
    assert_readable(fig)
    mark_synthetic(fig)
    assert_readable(fig)
    mark = next(text for text in fig.texts if "SYNTHETIC" in text.get_text()).get_window_extent()
    assert not any(mark.overlaps(ax.get_window_extent()) for ax in fig.axes if ax.axison)


# --- style -------------------------------------------------------------------------------------


def test_a_notebook_shows_the_figure_without_pyplot_or_a_backend(tmp_path: Path) -> None:
    """In a fresh interpreter, as a kernel that never imported pyplot."""
    script = (
        "from IPython.core.formatters import DisplayFormatter\n"
        "from emotion_transfer.plots.style import new_figure\n"
        "fig, axes = new_figure(3, 2)\n"
        "axes[0, 0].plot([1, 2])\n"
        "data, _ = DisplayFormatter().format(fig)\n"
        "assert data['image/png'].startswith(b'\\x89PNG'), list(data)\n"
        "import matplotlib.pyplot as plt\n"
        "assert plt.get_fignums() == []\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], check=True)


def test_no_plot_leaves_a_pyplot_figure_or_changes_a_setting() -> None:
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    confusion_figure(CLASSES[8])
    plot_history(history(4))
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


def test_new_figure_shapes_its_axes() -> None:
    fig, axes = new_figure(6, 4, 2, 3, sharex=True)
    assert axes.shape == (2, 3)
    assert fig.get_size_inches().tolist() == [6, 4]
    assert new_figure(3, 2)[1].shape == (1, 1)


def test_emotions_keep_their_colours_and_others_get_distinct_ones() -> None:
    assert class_colours(MIKELS_CLASSES) == {name: EMOTION_COLOURS[name] for name in MIKELS_CLASSES}
    assert class_colours(["fear", "awe"]) == {
        "fear": EMOTION_COLOURS["fear"],
        "awe": EMOTION_COLOURS["awe"],
    }
    for n in (2, 8, 10, 11, 20):
        names = [f"class {i}" for i in range(n)]
        colours = class_colours(names)
        assert list(colours) == names
        assert len(set(colours.values())) == n


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
DEFICIENCIES: dict[str, list[list[float]]] = {
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6728, 0.0471], [-0.0118, 0.0430, 0.969]],
    "tritanopia": [[1.2555, -0.0768, -0.1787], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}


def oklab(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ottosson's OKLab of linear RGB rows."""
    to_lms = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.0883, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]]
    rooted = np.cbrt(np.clip(linear, 0, 1) @ np.transpose(to_lms))
    return np.asarray(rooted @ np.transpose(to_lab))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_emotions_stay_apart_with_a_colour_vision_deficiency(deficiency: str) -> None:
    rgb = np.array([to_rgb(EMOTION_COLOURS[name]) for name in MIKELS_CLASSES])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lab = oklab(linear @ np.transpose(DEFICIENCIES[deficiency]))
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2)]
    assert min(distances) > 0.05  # about 0.02 can just be told apart


def test_ink_has_the_contrast_that_wcag_asks_for() -> None:
    def luminance(colour: str) -> float:
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    palette = [*EMOTION_COLOURS.values(), *class_colours(CLASSES[20]).values(), "#777777"]
    for colour in palette:
        light, dark = sorted([luminance(colour), luminance(ink_on(colour))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_fit_text() -> None:
    assert fit_text("awe", 1, 10) == "awe"
    middle = fit_text("class_10_with_a_long_name_10", 1.5, 10)
    assert middle.startswith("class_1")
    assert middle.endswith("name_10")
    assert len(middle) == 18
    assert fit_text("one two three four five", 1, 10, lines=2) == "one two\nthree four…"
    assert fit_text("costs $5 and $6", 5, 10) == r"costs \$5 and \$6"
    fig = plot_image_grid([picture()], ["$x^$ is no formula"])
    assert_readable(fig)


def test_title_is_at_the_left_and_wraps() -> None:
    fig, _ = new_figure(4, 2)
    set_figure_title(fig, "a title that is a good deal too long for a narrow figure")
    assert fig.get_suptitle().count("\n") >= 1


def test_save_figure_marks_only_the_synthetic(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "figures"
    for name, synthetic in (("real", False), ("drawn", True)):
        fig = plot_class_distribution(counts(CLASSES[8]))
        assert save_figure(fig, folder, name, synthetic=synthetic) is fig
        with Image.open(folder / f"{name}.png") as image:
            assert image.format == "PNG"
            assert image.size == tuple(round(150 * side) for side in fig.get_size_inches())
            corner = np.asarray(image.convert("RGB"))[:45, -230:].reshape(-1, 3)
        amber = (np.abs(corner.astype(int) - (255, 213, 79)).max(axis=1) < 8).mean()
        assert (amber > 0.2) == synthetic
        assert any("SYNTHETIC" in text for text, _ in drawn_texts(fig)) == synthetic
    assert sorted(path.name for path in folder.iterdir()) == ["drawn.png", "real.png"]


def test_saving_again_replaces_the_file_and_marks_once(tmp_path: Path) -> None:
    fig = plot_comparison({"ours": Estimate(0.5, 0.4, 0.6)})
    save_figure(fig, tmp_path, "twice", synthetic=True)
    first = (tmp_path / "twice.png").read_bytes()
    save_figure(fig, tmp_path, "twice", synthetic=True)
    assert sum("SYNTHETIC" in text.get_text() for text in fig.texts) == 1
    assert (tmp_path / "twice.png").read_bytes() == first


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"old")
    fig, axes = new_figure(3, 2)
    axes[0, 0].set_title(r"$\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(fig, tmp_path, "figure", synthetic=False)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert (tmp_path / "figure.png").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["", "../up", "a/b"])
def test_save_figure_wants_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        save_figure(new_figure(3, 2)[0], tmp_path, name, synthetic=False)


# --- data --------------------------------------------------------------------------------------


def test_class_distribution_shows_every_count_and_share() -> None:
    table = pd.DataFrame({"train": [300, 100], "val": [5, 0]}, index=["fear", "awe"])
    fig = plot_class_distribution(table)
    train, val = axes_of(fig)
    assert [bar.get_width() for bar in train.patches] == [300, 100]
    assert [text.get_text() for text in train.texts] == ["300  (75.0%)", "100  (25.0%)"]
    assert train.get_title(loc="left") == "train: 400 images\nlargest to smallest: 3.0"
    assert val.get_title(loc="left") == "val: 5 images\n1 class without images"
    assert [label.get_text() for label in train.get_yticklabels()] == ["fear", "awe"]
    assert train.yaxis_inverted()
    colours = [bar.get_facecolor()[:3] for bar in train.patches]
    assert colours == [to_rgb(EMOTION_COLOURS["fear"]), to_rgb(EMOTION_COLOURS["awe"])]
    with pytest.raises(ValueError, match="negative or missing"):
        plot_class_distribution(table - 200)
    with pytest.raises(ValueError, match="counts needs"):
        plot_class_distribution(table.iloc[:0])


def test_image_grid_puts_each_image_under_its_title() -> None:
    images = [picture(value=i) for i in range(10)]
    fig = plot_image_grid(images, [f"no {i}" for i in range(10)], columns=4, title="Ten")
    shown = [ax for ax in axes_of(fig) if ax.images]
    assert len(shown) == 10
    assert len(fig.axes) == 12
    for i, ax in enumerate(shown):
        np.testing.assert_array_equal(ax.images[0].get_array(), images[i])
        assert ax.get_title() == f"no {i}"
    assert fig.get_suptitle() == "Ten"
    coloured = plot_image_grid(images[:2], ["a", "b"], title_colours=["#000000", "#F0E442"])
    dark, light = (ax.title for ax in axes_of(coloured))
    assert (dark.get_color(), light.get_color()) == ("white", "black")
    patch = light.get_bbox_patch()
    assert patch is not None
    assert patch.get_facecolor()[:3] == to_rgb("#F0E442")


@pytest.mark.parametrize("count", [1, 3, 12, 40])
def test_no_empty_strip_below_the_last_row(count: int) -> None:
    true = [i % 8 for i in range(count)]
    answer = [(i + 1) % 8 for i in true]
    images = [picture(64, 64)] * count
    fig = plot_mistakes(images, true, answer, [0.93] * count, MIKELS_CLASSES)
    cam = plot_gradcam(np.stack(images), np.zeros((count, 64, 64)), ["a"] * count)
    for figure in (fig, cam):
        mark_synthetic(figure)
        figure.draw_without_rendering()
        boxes = [ax.get_tightbbox() for ax in axes_of(figure)]
        lowest = min(box.y0 for box in boxes if box is not None and box.height) / figure.dpi
        assert 0 <= lowest < 0.12  # inches


def test_image_grid_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="no images"):
        plot_image_grid([], [])
    with pytest.raises(ValueError, match="2 images need as many titles"):
        plot_image_grid([picture()] * 2, ["one"])
    with pytest.raises(ValueError, match="2 images need as many titles and colours"):
        plot_image_grid([picture()] * 2, ["one", "two"], title_colours=["red"])
    with pytest.raises(ValueError, match=r"image 1 is float64 \(24, 24, 3\)"):
        plot_image_grid([picture(), picture() / 255], ["one", "two"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"image 0 is uint8 \(3, 24, 24\)"):
        plot_image_grid([picture().transpose(2, 0, 1)], ["one"])


def test_rows_are_labelled_and_may_differ_in_length() -> None:
    fig = plot_rows({"original": [picture()], "flipped": [picture(value=9)] * 3})
    axes = np.array(fig.axes).reshape(2, 3)
    assert [len(ax.images) for ax in axes.flat] == [1, 0, 0, 1, 1, 1]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["original", "flipped"]
    with pytest.raises(ValueError, match="no rows"):
        plot_rows({})
    with pytest.raises(ValueError, match="no images"):
        plot_rows({"empty": []})


# --- training ----------------------------------------------------------------------------------


def test_schedule_shows_rates_thaws_and_the_end_of_mixing() -> None:
    table = schedule()
    fig = plot_schedule(table, THAWS, 37)
    (ax,) = axes_of(fig)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epochs done", "learning rate")
    assert ax.get_yscale() == "log"
    assert ax.get_xlim() == (0, 40)
    (band,) = ax.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (37, 40)
    assert legend_of(fig) == [
        "head",
        "backbone",
        "after epoch 3: last stages thaw",
        "after epoch 10: all layers thaw",
        "after epoch 37: no mixing",
    ]
    np.testing.assert_array_equal(lines(ax)["head"].get_ydata(), table["lr_head"])
    backbone = np.asarray(lines(ax)["backbone"].get_ydata())
    assert np.isnan(backbone[table["epoch"] < 3]).all()  # frozen: no rate, not a rate of zero
    assert (backbone[table["epoch"] >= 3] > 0).all()
    assert legend_of(plot_schedule(table)) == ["head", "backbone"]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (3, 1), (3, 7), (40, 20)])
def test_schedule_ends_with_its_last_epoch_and_ticks_whole_ones(epochs: int, steps: int) -> None:
    epoch = np.arange(epochs * steps) / steps
    table = pd.DataFrame({"epoch": epoch, "lr_head": 1e-3, "lr_backbone": 1e-5})
    fig = plot_schedule(table, [(epochs + 1, "too late")], mix_off=epochs + 1)
    (ax,) = axes_of(fig)
    assert ax.get_xlim() == (0, epochs)
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert "too late" not in " ".join(legend_of(fig))


def test_schedule_of_a_run_that_never_trains_the_backbone() -> None:
    assert_readable(plot_schedule(schedule().assign(lr_backbone=0.0)))
    assert_readable(plot_schedule(schedule().assign(lr_backbone=0.0, lr_head=0.0)))
    with pytest.raises(ValueError, match=r"lacks the columns \['lr_head'\]"):
        plot_schedule(schedule().drop(columns="lr_head"))


def test_history_draws_all_curves() -> None:
    table = history(40)
    fig = plot_history(table, best_epoch=31, thaws=THAWS)
    loss, accuracy, f1, gap, rates, speed = axes_of(fig)
    for ax, drawn in (
        (loss, {"training": "train_loss", "validation": "val_loss"}),
        (accuracy, {"current weights": "val_accuracy", "averaged (EMA)": "val_ema_accuracy"}),
        (f1, {"current weights": "val_macro_f1", "averaged (EMA)": "val_ema_macro_f1"}),
        (gap, {"training": "train_clean_accuracy", "validation": "val_accuracy"}),
        (speed, {"training": "images_per_second"}),
    ):
        for label, column in drawn.items():
            np.testing.assert_allclose(lines(ax)[label].get_ydata(), table[column])
            np.testing.assert_array_equal(lines(ax)[label].get_xdata(), table["epoch"])
    assert {"head", "backbone"} <= set(lines(rates))
    assert rates.get_yscale() == "log"
    assert [ax.get_xlabel() for ax in axes_of(fig)] == ["epoch"] * 6
    assert speed.get_title(loc="left") == "Speed (40.0 min, peak 11.0 GB)"
    assert speed.get_ylim() == (0, pytest.approx(1.1 * 2440))
    events = [line for ax in axes_of(fig) for line in ax.get_lines() if line.get_gid()]
    assert [line.get_xdata()[0] for line in events] == [3, 10, 31] * 6
    assert legend_of(fig) == [
        "after epoch 3: last stages thaw",
        "after epoch 10: all layers thaw",
        "best epoch: 31",
    ]
    last = gap.get_legend().get_texts()[-1].get_text()
    assert last == f"gap, at the end {table['gap'].iloc[-1]:+.3f}"


def test_history_of_one_epoch_shows_points_and_no_thaw_to_come() -> None:
    fig = plot_history(history(1), best_epoch=1, thaws=THAWS)
    assert all(
        line.get_marker() == "." for line in lines(axes_of(fig)[0]).values() if not line.get_gid()
    )
    assert legend_of(fig) == ["best epoch: 1"]
    low, high = axes_of(fig)[0].get_xlim()
    assert (low, high) == (0.5, 1.5)


def test_history_without_what_was_not_measured() -> None:
    table = history(6).drop(
        columns=["val_ema_accuracy", "val_ema_macro_f1", "seconds", "memory_mb"]
    )
    table[["train_clean_accuracy", "gap"]] = np.nan
    fig = plot_history(table)
    assert_readable(fig)
    assert set(lines(axes_of(fig)[1])) == {"current weights"}
    assert [text.get_text() for text in axes_of(fig)[3].texts] == ["not measured"]
    assert axes_of(fig)[5].get_title(loc="left") == "Speed"
    assert fig.legends == []
    sometimes = history(6)
    sometimes.loc[[1, 3], ["train_clean_accuracy", "gap", "val_ema_accuracy"]] = np.nan
    sometimes[["memory_mb", "images_per_second"]] = np.nan
    fig = plot_history(sometimes)
    np.testing.assert_array_equal(lines(axes_of(fig)[3])["training"].get_xdata(), [1, 3, 5, 6])
    assert axes_of(fig)[5].get_title(loc="left") == "Speed (6.0 min)"
    with pytest.raises(ValueError, match=r"lacks the columns \['val_loss'\]"):
        plot_history(history(3).drop(columns="val_loss"))
    with pytest.raises(ValueError, match="no rows"):
        plot_history(history(3).iloc[:0])


# --- evaluation --------------------------------------------------------------------------------


def test_confusion_shows_counts_and_shares_of_the_true_class() -> None:
    fig = plot_confusion([[30, 10, 0], [0, 5, 15], [0, 0, 0]], ["a", "b", "never seen"])
    images, shares = axes_of(fig)
    assert [int(t.get_text()) for t in images.texts] == [30, 10, 0, 0, 5, 15, 0, 0, 0]
    # A class without images has no shares at all.
    assert [int(t.get_text()) for t in shares.texts if t.get_text()] == [75, 25, 0, 0, 25, 75]
    assert [t.get_text() for t in images.get_yticklabels()] == ["a", "b", "never seen"]
    assert [t.get_text() for t in shares.get_xticklabels()] == ["a", "b", "never seen"]
    assert (images.get_ylabel(), images.get_xlabel()) == ("true", "predicted")
    assert (images.get_title(loc="left"), shares.get_title(loc="left")) == (
        "Images",
        "Per cent of the true class",
    )
    with pytest.raises(ValueError, match=r"\(2, 2\) confusion matrix does not fit 3 classes"):
        plot_confusion([[1, 2], [3, 4]], ["a", "b", "c"])


@pytest.mark.parametrize("classes", CLASSES)
def test_numbers_of_the_confusion_fit_into_their_cells(classes: int) -> None:
    fig = plot_confusion(confusion(CLASSES[classes], scale=99), CLASSES[classes])
    fig.draw_without_rendering()
    for ax in axes_of(fig):
        cell = ax.get_window_extent().width / classes
        assert max(text.get_window_extent().width for text in ax.texts) <= cell
        assert min(text.get_fontsize() for text in ax.texts) >= 4.5


def test_reliability_draws_the_table() -> None:
    p = np.array([[0.9, 0.1]] * 40 + [[0.3, 0.7]] * 5)
    table = reliability_table([0] * 30 + [1] * 10 + [1] * 3 + [0] * 2, p, bins=5)
    fig = plot_reliability(table, 0.1234)
    upper, lower = axes_of(fig)
    assert upper.get_title(loc="left") == "Expected calibration error 0.123"
    heights = [bar.get_height() for bar in upper.patches]
    assert heights[4] == pytest.approx(0.75)  # 40 images
    assert heights[5 + 3] == pytest.approx(0.6)  # 5 images: pale
    assert upper.patches[8].get_alpha() == 0.3
    assert np.isfinite(heights).sum() == 2
    assert [bar.get_height() for bar in lower.patches] == [0, 0, 0, 5, 40]
    assert (lower.get_xlabel(), lower.get_ylabel()) == ("confidence", "images")
    assert upper.get_legend() is None  # it would cover bars
    assert set(legend_of(fig)) == {
        "accuracy of the bin",
        "perfect calibration",
        "gap to the mean confidence",
    }


def test_per_class_draws_f1_precision_and_recall() -> None:
    labels, p = answers(8)
    table = per_class_table(labels, p.argmax(axis=1), MIKELS_CLASSES)
    fig = plot_per_class(table)
    (ax,) = axes_of(fig)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], table["f1"])
    np.testing.assert_allclose(lines(ax)["precision"].get_xdata(), table["precision"])
    np.testing.assert_allclose(lines(ax)["recall"].get_xdata(), table["recall"])
    assert ax.get_yticklabels()[0].get_text() == f"amusement ({table['support'].iloc[0]:,})"
    assert legend_of(fig) == ["F1", "precision", "recall"]


def test_mistakes_name_truth_answer_and_confidence() -> None:
    fig = plot_mistakes([picture()] * 2, [0, 6], [1, 7], [0.934, 0.5], MIKELS_CLASSES)
    titles = [ax.get_title() for ax in axes_of(fig)]
    assert titles == ["amusement\n→ awe 93%", "fear\n→ sadness 50%"]
    patch = axes_of(fig)[1].title.get_bbox_patch()
    assert patch is not None
    assert patch.get_facecolor()[:3] == to_rgb(EMOTION_COLOURS["fear"])
    as_arrays = plot_mistakes(
        [picture()], np.array([0]), np.array([1]), np.array([0.9], np.float32), MIKELS_CLASSES
    )
    assert axes_of(as_arrays)[0].get_title() == "amusement\n→ awe 90%"
    nothing = plot_mistakes([], [], [], [], MIKELS_CLASSES)
    assert [text for text, _ in drawn_texts(nothing)] == ["No mistakes to show."]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        plot_mistakes([picture()] * 2, [0, 6], [1], [0.9, 0.5], MIKELS_CLASSES)


def test_gradcam_sets_each_image_beside_its_overlay() -> None:
    images = np.stack([picture(32, 32, value) for value in (0, 100, 200)])
    heat = np.zeros((3, 32, 32), dtype=np.float32)
    heat[:, :16] = 1
    fig = plot_gradcam(images, heat, ["a", "b", "c"])
    *panels, bar = axes_of(fig)
    assert [ax.get_title() for ax in panels] == ["a", "b", "c"]
    assert bar.get_xlim() == (0, 1)
    assert bar.get_xlabel() == "heat: low → high"
    assert "bright" in fig.get_suptitle()
    for i, ax in enumerate(panels):
        shown = np.asarray(ax.images[0].get_array())
        assert shown.shape == (32, 65, 3)
        np.testing.assert_array_equal(shown[:, :32], images[i])
        overlay = shown[:, 33:].astype(int)
        assert overlay[:16].sum() > overlay[16:].sum()  # bright where the heat is
        np.testing.assert_array_equal(overlay[16:], images[i][16:])  # the image where it is not
    with pytest.raises(ValueError, match="do not fit"):
        plot_gradcam(images, heat[:, :8], ["a", "b", "c"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        plot_gradcam(images, 255 * heat, ["a", "b", "c"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        plot_gradcam(images, np.full_like(heat, np.nan), ["a", "b", "c"])


def test_comparison_tells_measured_from_published() -> None:
    results = {"ours": Estimate(0.76, 0.75, 0.77), "linear probe": Estimate(0.65, 0.64, 0.66)}
    fig = plot_comparison(results, {"a paper": 0.74}, "macro_f1")
    (ax,) = axes_of(fig)
    measured = lines(ax)["measured here"]
    published = lines(ax)["published (trained and tested elsewhere)"]
    assert measured.get_xdata().tolist() == [0.76, 0.65]
    assert list(published.get_xdata()) == [0.74]
    assert measured.get_marker() != published.get_marker()
    segments = ax.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[0.75, 0.77], [0.64, 0.66]]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["ours", "linear probe", "a paper"]
    assert [text.get_text() for text in ax.texts] == [
        "0.760 [0.750, 0.770]",
        "0.650 [0.640, 0.660]",
        "0.740",
    ]
    assert ax.get_xlabel() == "macro F1"
    assert legend_of(fig) == [
        "95 % interval",
        "measured here",
        "published (trained and tested elsewhere)",
    ]
    assert legend_of(plot_comparison(results)) == ["95 % interval", "measured here"]
    assert_readable(plot_comparison({}, {"a paper": 0.74}))
    with pytest.raises(ValueError, match="no results"):
        plot_comparison({})


def test_an_interval_that_misses_its_value_or_has_no_width_is_drawn() -> None:
    fig = plot_comparison({"ece": Estimate(0.01, 0.012, 0.02), "perfect": Estimate(1, 1, 1)})
    assert_readable(fig)
