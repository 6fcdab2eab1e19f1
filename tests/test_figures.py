"""What the figures show, and that all of their text can be read."""

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.axis import Axis
from matplotlib.cbook import is_math_text
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from PIL import Image

from emotion_toolbox import figures
from emotion_toolbox.figures import (
    EMOTION_COLOURS,
    class_colours,
    class_labels,
    fit_text,
    mark_synthetic,
    new_figure,
    plot_class_distribution,
    plot_comparison,
    plot_confusion,
    plot_curves,
    plot_gradcam,
    plot_guesses,
    plot_history,
    plot_image_grid,
    plot_mistakes,
    plot_per_class,
    plot_range_tests,
    plot_reliability,
    plot_rows,
    plot_schedule,
    plot_stages,
    save_figure,
)
from emotion_toolbox.measures import Estimate, RangeTest, per_class_table, reliability_table
from emotion_toolbox.tables import MIKELS_CLASSES

pytestmark = pytest.mark.filterwarnings("error")  # a layout that fails only warns

CLASSES = {
    2: ["cat", "a rather long class name that goes on and on"],
    8: list(MIKELS_CLASSES),
    25: [f"class_{i}_with_quite_a_long_name_{i}" for i in range(25)],
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
    """No text lies on another (none is cut off: a figure is saved with all that it draws)."""
    texts, boxes = zip(*drawn_texts(fig), strict=True)
    low, high = (np.array([getattr(box, end) for box in boxes]) for end in ("min", "max"))
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    pairs = np.argwhere(np.triu((shared > 1).all(axis=2), k=1))
    assert not len(pairs), f"overlapping: {[(texts[i], texts[j]) for i, j in pairs]}"


def axes_of(fig: Figure) -> list[Any]:
    return list(fig.axes)


def legend_of(fig: Figure) -> list[str]:
    return [text.get_text() for legend in fig.legends for text in legend.get_texts()]


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.get_lines()}


def steps(ax: Any) -> dict[str, Any]:
    """The values and edges of the lines that are drawn as steps."""
    return {
        patch.get_label(): patch.get_data() for patch in ax.patches if isinstance(patch, StepPatch)
    }


def spans(ax: Any) -> dict[str, tuple[float, float]]:
    """First and last epoch of the shaded bands."""
    bands = [patch for patch in ax.patches if not isinstance(patch, StepPatch)]
    return {b.get_label(): (b.get_x(), b.get_x() + b.get_width()) for b in bands}


def events(ax: Any) -> list[float]:
    """Where the upright lines stand."""
    found = [line for line in ax.get_lines() if "after epoch" in line.get_label()]
    found += [line for line in ax.get_lines() if "best epoch" in line.get_label()]
    return [float(line.get_xdata()[0]) for line in found]


def panel_legend(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


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
            "lr_backbone": np.where(epoch <= 3, np.nan, 3e-5 / epoch),
            "images_per_second": 2400.0 + epoch,
            "seconds": 60.0,
            "memory_mb": 11264.0,
        }
    )
    return table.assign(gap=table["train_clean_accuracy"] - table["val_accuracy"])


def rates(epoch: int, step: int) -> tuple[float, float]:
    """Three cosines from 3e-3 to 1e-6 in cycles of ten epochs of 20 steps; no backbone at first."""
    head = 3e-3 * (1 + np.cos((epoch + step / 20) % 10 / 10 * np.pi)) / 2 + 1e-6
    return head, np.nan if epoch < 3 else head / 100


def stages(epochs: list[float | None]) -> pd.DataFrame:
    parameters = np.array([9_536, 215_808, 14_964_736, 2_640_000])
    table = {"stage": ["stem", "layer1", "layer4", "head"], "parameters": parameters}
    share = parameters / parameters.sum()
    return pd.DataFrame({**table, "share": share, "trains_from": pd.Series(epochs, dtype=object)})


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
    said = {"ece": Estimate(0.05, 0.04, 0.06), "nll": Estimate(1.234, 1.1, 1.432)}
    return plot_reliability([reliability_table(*answers(len(names)))] * 2, [said] * 2, 1.25)


def per_class_figure(names: list[str]) -> Figure:
    labels, p = answers(len(names))
    return plot_per_class(per_class_table(labels, p.argmax(axis=1), names))


def mistakes_figure(names: list[str]) -> Figure:
    n = len(names)
    true = [i % n for i in range(12)]
    return plot_mistakes([picture()] * 12, true, [(i + 1) % n for i in true], [0.93] * 12, names)


def grid_figure(names: list[str]) -> Figure:
    colours = list(class_colours(names).values())
    return plot_image_grid([picture()] * len(names), names, title="Images", frames=colours)


def guesses_figure(names: list[str]) -> Figure:
    truth, p = answers(len(names), 6)
    return plot_guesses([picture()] * 6, truth, p[::-1], p, names)


def measured(**found: Estimate) -> dict[str, dict[str, Estimate]]:
    return {name: {"accuracy": estimate} for name, estimate in found.items()}


FIGURES = [
    *by_classes(distribution_figure),
    *by_classes(confusion_figure),
    *by_classes(reliability_figure),
    *by_classes(per_class_figure),
    *by_classes(mistakes_figure),
    *by_classes(grid_figure),
    *by_classes(guesses_figure),
    *[
        pytest.param(
            lambda n=n: plot_history(history(n), best_epoch=min(n, 31), thaws=THAWS),
            id=f"history-{n}",
        )
        for n in (1, 4, 40)
    ],
    pytest.param(lambda: plot_schedule(rates, 40, 20, THAWS, 37), id="schedule"),
    pytest.param(lambda: plot_range_tests(range_tests(3e-3, 1e-3)), id="range-tests"),
    pytest.param(lambda: plot_range_tests(range_tests(0.0, None)), id="range-tests-zero"),
    pytest.param(lambda: plot_stages(stages([11, 11, 4, 1]), picture()), id="stages"),
    pytest.param(lambda: plot_stages(stages([None, None, 4, 1]), picture()), id="never"),
    pytest.param(lambda: plot_curves({"ours": [0.3, 0.5], "b": [0.1]}, "accuracy"), id="curves"),
    pytest.param(
        lambda: plot_rows(
            {"a": [picture()] * 8, "a long label, wrapped": [picture()] * 8}, "Title"
        ),
        id="rows",
    ),
    pytest.param(
        lambda: plot_gradcam(
            np.stack([picture()] * 5), np.zeros((5, 3, 3)), ["true contentment, 93% awe"] * 5
        ),
        id="gradcam",
    ),
    pytest.param(
        lambda: plot_comparison(
            measured(ours=Estimate(0.76, 0.757, 0.769), majority=Estimate(0.13, 0.12, 0.14)),
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
    mark_synthetic(fig, "DEBUG | SYNTHETIC SAMPLE, efficientnet_lite0")
    assert_readable(fig)
    mark = next(text for text in fig.texts if "SYNTHETIC" in text.get_text()).get_window_extent()
    assert not any(mark.overlaps(ax.get_window_extent()) for ax in fig.axes)
    whole = fig.get_tightbbox().padded(0.02)  # inches; what is saved
    assert whole.contains(*(mark.min / fig.dpi))
    assert whole.contains(*(mark.max / fig.dpi))


# --- style -------------------------------------------------------------------------------------


def test_a_notebook_shows_the_figure_without_pyplot_or_a_backend(tmp_path: Path) -> None:
    """In a fresh interpreter, as a kernel that never imported pyplot."""
    script = (
        "from IPython.core.formatters import DisplayFormatter\n"
        "from emotion_toolbox.figures import new_figure\n"
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
    plot_history(history(4), best_epoch=2)
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
    for n in (2, 8, 10, 11, 25):
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


def test_title_of_a_grid_is_at_the_left_and_wraps() -> None:
    fig = plot_image_grid(
        [picture()], ["one"], title="a title that is too long for one picture, by far, and goes on"
    )
    (title,) = fig.findobj(lambda text: isinstance(text, Text) and text.get_text()[:7] == "a title")
    assert isinstance(title, Text)
    assert title.get_text().count("\n") >= 1
    assert title.get_window_extent().x0 == pytest.approx(0, abs=2)


LITERAL = ["a $x^2$ b$", r"\frac\$", "under_score", "_hidden", "<b>&amp;", "{x}%s"]


@pytest.mark.parametrize("make", [
    distribution_figure, confusion_figure, per_class_figure, mistakes_figure, grid_figure,
    guesses_figure, lambda names: plot_rows({name: [picture()] for name in names}),
    lambda names: plot_curves({name: [0.1, 0.2] for name in names}, "accuracy"),
])  # fmt: skip
def test_names_stay_literal(make: Callable[[list[str]], Figure]) -> None:
    """Nothing is typeset as a formula, and every character of every name is drawn."""
    found = [text for text, _ in drawn_texts(make(LITERAL))]
    assert not any(map(is_math_text, found))
    drawn = " ".join(found).replace(r"\$", "$")
    kept = ["".join(name.split("_")) for name in LITERAL]  # runs are named with spaces
    for name, bare in zip(LITERAL, kept, strict=True):
        assert name in drawn or bare in drawn.replace(" ", "") or guesses_figure is make, name


def build_font(folder: Path, name: str, characters: str) -> Path:
    """A font of squares for `characters` alone."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, names = pen.glyph(), [f"glyph{i}" for i in range(len(characters))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *names])
    font.setupCharacterMap({ord(c): glyph for c, glyph in zip(characters, names, strict=True)})
    font.setupGlyf(dict.fromkeys([".notdef", *names], square))
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": name, "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(folder / f"{name}.ttf")
    return folder / f"{name}.ttf"


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], None]]:
    """A function that installs a font of that name with those characters, for this test."""
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))

    def forget() -> None:
        for function in (figures.find_fonts, figures._characters, figures.class_labels):
            function.cache_clear()

    def add(name: str, characters: str) -> None:
        fontManager.addfont(build_font(tmp_path, name, characters))
        forget()

    forget()
    yield add
    forget()


@pytest.mark.parametrize("make", [
    distribution_figure, confusion_figure, per_class_figure, mistakes_figure, grid_figure,
    guesses_figure,
])  # fmt: skip
def test_a_font_that_has_the_characters_is_found(
    make: Callable[[list[str]], Figure], install: Callable[[str, str], None], tmp_path: Path
) -> None:
    install("Zwei", "\U000f0001")
    install("Eins Sans", "\U000f0000")
    names = ["\U000f0000a", "b\U000f0001", "\U000f0001\U000f0000", "plain"]
    fig = save_figure(make(names), tmp_path, "figure")  # a glyph that is missing would warn
    shown = {text.get_text(): text for text in fig.findobj(Text) if "\U000f0001" in text.get_text()}
    assert shown
    for text, drawn in shown.items():
        families = drawn.get_fontfamily()
        assert "Zwei" in families
        assert ("Eins Sans" in families) == ("\U000f0000" in text)


def test_names_that_no_font_has_are_numbered_and_said_once(
    install: Callable[[str, str], None], tmp_path: Path
) -> None:
    install("Eins", "\U000f0000")
    names = ["\U000f0000", "calm", "\U000f0777", "\U000f0000\U000f0778"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shown = [make(names) for make in (confusion_figure, mistakes_figure, per_class_figure)]
        shown += [distribution_figure(names), guesses_figure(names)]
        for i, fig in enumerate(shown):
            save_figure(fig, tmp_path, str(i))
        save_figure(plot_rows({"\U000f0777\x07": [picture()]}, "\U000f0778"), tmp_path, "rows")
    (warning,) = said
    assert "class 2 is \U000f0777; class 3 is \U000f0000\U000f0778" in str(warning.message)
    assert "install" in str(warning.message)
    labels = [label.get_text() for label in shown[0].axes[0].get_yticklabels()]
    assert labels == ["\U000f0000", "calm", "class 2", "class 3"]
    assert shown[1].axes[1].get_title() == "calm\n→ class 2 93%"
    assert class_labels(tuple(names)) == labels
    assert (
        fit_text("\U000f0777 and \x07", 3, 9) == r"\U000f0777 and \x07"
    )  # outside of names: the code


def amber(file: Path) -> Any:
    with Image.open(file) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (np.abs(pixels - (255, 213, 79)).max(axis=2) < 8).sum()


def test_save_figure_says_the_note_and_nothing_without_one(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "figures"
    for name, note in (("real", ""), ("drawn", "SYNTHETIC SAMPLE, resnet50"), ("two", "DEBUG")):
        fig = plot_class_distribution(counts(["a", "b"]))
        assert save_figure(fig, folder, name, note=note) is fig
        assert (amber(folder / f"{name}.png") > 1000) == bool(note)
        assert [text.get_text() for text in fig.texts] == [note] * bool(note)
    assert sorted(path.name for path in folder.iterdir()) == ["drawn.png", "real.png", "two.png"]
    with Image.open(folder / "drawn.png") as drawn, Image.open(folder / "real.png") as real:
        assert drawn.height > real.height  # the strip has room of its own


def test_the_note_is_whole_however_narrow_the_figure(tmp_path: Path) -> None:
    fig, _ = new_figure(2, 2)
    save_figure(fig, tmp_path, "narrow", note="DEBUG | SYNTHETIC SAMPLE, efficientnet_lite0 " * 2)
    with Image.open(tmp_path / "narrow.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    strip = (np.abs(pixels - (255, 213, 79)).max(axis=2) < 8).any(axis=0)
    assert not strip[0] and not strip[-1] and image.width > 4 * 150


def test_saving_again_replaces_the_file_and_looks_the_same(tmp_path: Path) -> None:
    fig = plot_comparison(measured(ours=Estimate(0.5, 0.4, 0.6)), {})
    save_figure(fig, tmp_path, "twice", note="SYNTHETIC")
    first = np.asarray(Image.open(tmp_path / "twice.png")).astype(int)
    save_figure(fig, tmp_path, "twice", note="SYNTHETIC")
    again = np.asarray(Image.open(tmp_path / "twice.png")).astype(int)
    assert np.abs(again - first).mean() < 1  # of 255: a layout moves by a hair when done again


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"old")
    fig, axes = new_figure(3, 2)
    axes[0, 0].set_title(r"$\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(fig, tmp_path, "figure")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert (tmp_path / "figure.png").read_bytes() == b"old"


# --- data --------------------------------------------------------------------------------------


def test_class_distribution_shows_every_count_and_share() -> None:
    table = pd.DataFrame({"train": [300, 100], "val": [5, 0]}, index=["fear", "awe"])
    fig = plot_class_distribution(table)
    train, val = axes_of(fig)
    assert [bar.get_width() for bar in train.patches] == [300, 100]
    assert [text.get_text() for text in train.texts] == ["300  (75.0%)", "100  (25.0%)"]
    assert train.get_title(loc="left") == "train: 400 images\n100 to 300 of a class"
    assert val.get_title(loc="left") == "val: 5 images\n0 to 5 of a class"
    assert [label.get_text() for label in train.get_yticklabels()] == ["fear", "awe"]
    assert train.yaxis_inverted()
    colours = [bar.get_facecolor()[:3] for bar in train.patches]
    assert colours == [to_rgb(EMOTION_COLOURS["fear"]), to_rgb(EMOTION_COLOURS["awe"])]


def test_image_grid_puts_each_image_under_its_title() -> None:
    images = [picture(value=i) for i in range(10)]
    fig = plot_image_grid(images, [f"no {i}" for i in range(10)], columns=4, title="Ten")
    shown = [ax for ax in axes_of(fig) if ax.images]
    assert len(shown) == 10
    for i, ax in enumerate(shown):
        np.testing.assert_array_equal(ax.images[0].get_array(), images[i])
        assert ax.get_title() == f"no {i}"
    assert fig.get_suptitle() == "Ten"
    left, top = np.array([ax.get_window_extent().min for ax in shown]).T.round()
    assert len(set(left)) == 4 and len(set(top)) == 3  # columns and rows
    assert (np.diff(top.reshape(-1)[[0, 4, 8]]) < 0).all()
    coloured = plot_image_grid(images[:2], ["a", "b"], frames=["#000000", "#F0E442"])
    frames = [ax.spines["left"].get_edgecolor()[:3] for ax in axes_of(coloured)]
    assert frames == [to_rgb("#000000"), to_rgb("#F0E442")]


@pytest.mark.parametrize("count", [1, 3, 12, 40])
def test_no_empty_strip_around_the_pictures(count: int, tmp_path: Path) -> None:
    true = [i % 8 for i in range(count)]
    answer = [(i + 1) % 8 for i in true]
    images = [picture(64, 64)] * count
    fig = plot_mistakes(images, true, answer, [0.93] * count, MIKELS_CLASSES)
    cam = plot_gradcam(np.stack(images), np.zeros((count, 3, 3)), ["a"] * count)
    for figure in (fig, cam):
        save_figure(figure, tmp_path, "grid")
        with Image.open(tmp_path / "grid.png") as image:
            ink = np.asarray(image.convert("L")) < 250
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        margins = [rows[0], ink.shape[0] - 1 - rows[-1], columns[0]]
        assert max(margins) < 0.2 * 150
        assert np.diff(rows).max() < 0.3 * 150  # nor between them


def test_image_grid_wants_as_many_titles_and_frames_as_images() -> None:
    with pytest.raises(ValueError, match=r"zip\(\)"):
        plot_image_grid([picture()] * 2, ["one"])
    with pytest.raises(ValueError, match=r"zip\(\)"):
        plot_image_grid([picture()] * 2, ["one", "two"], frames=["red"])


def test_rows_are_labelled() -> None:
    fig = plot_rows({"original": [picture()] * 2, "flipped": [picture(value=9)] * 2})
    places = [ax.get_window_extent() for ax in axes_of(fig)]
    assert places[0].y0 == places[1].y0 > places[2].y0 == places[3].y0
    assert places[0].x0 == places[2].x0 < places[1].x0 == places[3].x0
    assert [ax.get_ylabel() for ax in axes_of(fig)] == ["original", "", "flipped", ""]
    np.testing.assert_array_equal(axes_of(fig)[3].images[0].get_array(), picture(value=9))


# --- training ----------------------------------------------------------------------------------


def test_schedule_shows_rates_thaws_and_the_end_of_mixing() -> None:
    fig = plot_schedule(rates, 40, 20, THAWS, 37)
    (ax,) = axes_of(fig)
    assert (ax.get_xlabel(), ax.get_title(loc="left")) == ("epochs done", "Learning rates")
    assert ax.get_yscale() == "log"
    assert spans(ax) == {"no mixing after epoch 37": (37, 40), "backbone frozen": (0, 3)}
    assert legend_of(fig) == ["after epoch 3: last stages thaw", "after epoch 10: all layers thaw"]
    assert events(ax) == [3, 10]
    every = np.array([rates(epoch, step) for epoch in range(40) for step in range(20)])
    for column, name in enumerate(("head", "backbone")):
        np.testing.assert_array_equal(steps(ax)[name].values, every[:, column])  # NaN: no line
        np.testing.assert_allclose(steps(ax)[name].edges, np.arange(801) / 20)
    assert legend_of(plot_schedule(rates, 40, 20, (), 40)) == []


@pytest.mark.parametrize(("epochs", "count"), [(1, 1), (3, 1), (3, 7), (40, 20), (2, 1000)])
def test_schedule_ends_with_its_last_epoch_and_ticks_whole_ones(epochs: int, count: int) -> None:
    thaws = [(epochs + 1.0, "too late")]
    fig = plot_schedule(lambda epoch, step: (1e-3, 1e-5), epochs, count, thaws, epochs + 1)
    (ax,) = axes_of(fig)
    assert ax.get_xlim() == pytest.approx((0, epochs), rel=0.02)
    assert steps(ax)["head"].edges[[0, -1]].tolist() == [0, epochs]
    assert len(steps(ax)["head"].values) <= 21 * epochs  # a long schedule stays a small figure
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    assert "too late" not in " ".join(legend_of(fig))
    assert spans(ax) == {}


@pytest.mark.parametrize("rate", [(1e-3, np.nan), (1e-3, 0.0), (0.0, 0.0)])
def test_schedule_of_a_run_that_never_trains_the_backbone(rate: tuple[float, float]) -> None:
    fig = plot_schedule(lambda epoch, step: rate, 4, 10, (), 4)
    assert_readable(fig)
    assert spans(axes_of(fig)[0]) == {"backbone frozen": (0, 4)}


def range_tests(given: float, suggested: float | None) -> dict[str, Any]:
    """Two tests: one whose loss falls and explodes, and one that ended after a single step."""
    rates = np.geomspace(1e-5, 1, 60)
    loss = 2 - np.exp(-(np.log(rates / 1e-2) ** 2) / 8) + (rates > 0.3) * 30
    table = pd.DataFrame({"rate": rates, "loss": loss, "still": 2.0, "change": loss - 2})
    short = RangeTest(table.iloc[:1], given, None)
    return {"LR_HEAD": RangeTest(table, given, suggested), "LR_BACKBONE": short}


def test_range_tests_show_the_change_of_the_loss_and_both_rates() -> None:
    tests = range_tests(3e-3, 1e-3)
    fig = plot_range_tests(tests)
    (head, _), table = axes_of(fig), tests["LR_HEAD"].table
    assert head.get_xscale() == "log" and head.get_xlabel().startswith("LR_HEAD")
    drawn = lines(head)
    for label, values in (("a step", table["loss"] - 2), ("smoothed", table["change"])):
        np.testing.assert_array_equal(drawn[label].get_xdata(), table["rate"])
        np.testing.assert_array_equal(drawn[label].get_ydata(), values)
    assert drawn["0.003, as it is set"].get_xdata() == [3e-3, 3e-3]
    assert drawn["0.001, suggested"].get_xdata() == [1e-3, 1e-3]
    assert head.get_ylim() == pytest.approx((-1.1, 1.1), rel=0.05)  # the explosion leaves it
    assert set(lines(axes_of(plot_range_tests(range_tests(0.0, None)))[0])) == {
        "a step",
        "smoothed",
    }


def test_history_draws_all_curves() -> None:
    table = history(40)
    fig = plot_history(table, best_epoch=31, thaws=THAWS)
    loss, gap, f1 = axes_of(fig)
    for ax, drawn in (
        (loss, {"training": "train_loss", "validation": "val_loss"}),
        (gap, {"training": "train_clean_accuracy", "validation": "val_accuracy"}),
        (f1, {"current weights": "val_macro_f1", "averaged (EMA)": "val_ema_macro_f1"}),
    ):
        for label, column in drawn.items():
            np.testing.assert_allclose(lines(ax)[label].get_ydata(), table[column])
            np.testing.assert_array_equal(lines(ax)[label].get_xdata(), table["epoch"])
    assert [ax.get_xlabel() for ax in axes_of(fig)] == ["epochs done"] * 3
    assert [events(ax) for ax in axes_of(fig)] == [[3, 10, 31]] * 3
    assert legend_of(fig) == [
        "after epoch 3: last stages thaw",
        "after epoch 10: all layers thaw",
        "best epoch: 31",
    ]
    assert f"gap, at the end {table['gap'].iloc[-1]:+.3f}" in panel_legend(gap)


def test_history_of_one_epoch_shows_points_and_no_thaw_to_come() -> None:
    fig = plot_history(history(1), best_epoch=1, thaws=THAWS)
    for ax in axes_of(fig):
        assert [line.get_marker() for line in ax.get_lines()][:2] == [".", "."]
    assert legend_of(fig) == ["best epoch: 1"]
    assert axes_of(fig)[0].get_xlim() == pytest.approx((0, 1), abs=0.02)


def test_history_without_averages() -> None:
    table = history(6).drop(columns="val_ema_macro_f1")
    fig = plot_history(table, best_epoch=0)
    assert_readable(fig)
    assert not any("averaged (EMA)" in lines(ax) for ax in axes_of(fig))


def test_curves_begin_before_the_first_epoch_and_name_their_best() -> None:
    ours = pd.Series([0.3, 0.61, 0.6])  # numbered from 0, as a column of the history is
    fig = plot_curves({"this notebook": ours, "from_scratch": np.array([0.1, 0.2])}, "accuracy")
    (ax,) = axes_of(fig)
    assert [line.get_xdata().tolist() for line in ax.get_lines()] == [[0, 1, 2], [0, 1]]
    assert [line.get_ydata().tolist() for line in ax.get_lines()] == [[0.3, 0.61, 0.6], [0.1, 0.2]]
    assert panel_legend(ax) == ["best 0.610: this notebook", "best 0.200: from scratch"]
    assert ax.get_title(loc="left") == "accuracy"


def test_stages_show_order_size_and_when_each_trains() -> None:
    table = stages([None, 11, 4, 1])
    fig = plot_stages(table, picture(value=9))
    (ax,) = axes_of(fig)
    np.testing.assert_array_equal(ax.images[0].get_array(), picture(value=9))
    blocks = ax.containers[0].patches
    heights = np.array([block.get_height() for block in blocks])
    assert np.argsort(heights).tolist() == np.argsort(table["parameters"]).tolist()
    texts = [text for text in ax.texts if text.get_text()]
    assert texts[1].get_text() == "stem\n9,536\n0.1%"
    order = [text.get_text().splitlines()[0] for text in texts]
    assert order == ["image", "stem", "layer1", "layer4", "head", "class scores"]
    places = [text.get_position()[0] for text in texts]
    assert places == sorted(places)
    assert [block.get_x() + block.get_width() / 2 for block in blocks] == pytest.approx(
        places[1:-1]
    )
    legend = {
        text.get_text(): to_rgb(patch.get_facecolor())
        for text, patch in zip(
            fig.legends[0].get_texts(), fig.legends[0].get_patches(), strict=True
        )
    }
    names = ["trains from epoch 1", "trains from epoch 4", "trains from epoch 11", "never trains"]
    assert list(legend) == names
    assert len(set(legend.values())) == 4
    drawn = [to_rgb(block.get_facecolor()) for block in blocks]
    assert drawn == [legend[name] for name in names[::-1]]


# --- evaluation --------------------------------------------------------------------------------


def test_confusion_shows_counts_coloured_by_their_share_of_the_true_class() -> None:
    fig = plot_confusion([[30, 10, 0], [0, 500, 1500], [0, 0, 0]], ["a", "b", "never seen"])
    matrix, bar = axes_of(fig)
    assert [t.get_text() for t in matrix.texts] == [
        "30",
        "10",
        "0",
        "0",
        "500",
        "1,500",
        "0",
        "0",
        "0",
    ]
    shares = np.asarray(matrix.collections[0].get_array()).reshape(3, 3)
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [0, 0.25, 0.75], [0, 0, 0]])
    assert matrix.collections[0].get_clim() == (0, 1)
    assert bar.get_ylabel() == "share of the true class"
    assert [t.get_text() for t in matrix.get_yticklabels()] == ["a", "b", "never seen"]
    assert [t.get_text() for t in matrix.get_xticklabels()] == ["a", "b", "never seen"]
    assert (matrix.get_ylabel(), matrix.get_xlabel()) == ("true", "predicted")
    with pytest.raises(ValueError):
        plot_confusion([[1, 2, 3], [3, 4, 5]], ["a", "b", "c"])


@pytest.mark.parametrize("classes", CLASSES)
def test_numbers_of_the_confusion_fit_into_their_cells(classes: int) -> None:
    fig = plot_confusion(confusion(CLASSES[classes], scale=99), CLASSES[classes])
    fig.draw_without_rendering()
    matrix, _ = axes_of(fig)
    cell = matrix.get_window_extent().width / classes
    assert max(text.get_window_extent().width for text in matrix.texts) <= cell
    assert min(text.get_fontsize() for text in matrix.texts) >= 4


def test_reliability_draws_the_table() -> None:
    p = np.array([[0.9, 0.1]] * 40 + [[0.3, 0.7]] * 5)
    labels = np.array([0] * 30 + [1] * 10 + [1] * 3 + [0] * 2)
    tables = [reliability_table(labels, probabilities) for probabilities in (p[::-1], p)]
    said = [{"ece": Estimate(e, 0, 1), "nll": Estimate(1 + e, 0, 2)} for e in (0.5, 0.1234)]
    fig = plot_reliability(tables, said, 1.2)
    before, upper, other, lower = axes_of(fig)
    assert before.get_title(loc="left").startswith("ECE 0.500 [0.000, 1.000]\nNLL 1.500")
    assert upper.get_title(loc="left").startswith("ECE 0.123 [0.000, 1.000]\nNLL 1.123")
    titles = [ax.get_title(loc="right") for ax in (before, upper)]
    assert titles == ["before", "divided by T = 1.20"]
    wrong = [bar.get_height() for bar in before.patches if bar.get_height() > 0]
    assert wrong == pytest.approx([27 / 40])
    heights = [bar.get_height() for bar in upper.patches]
    assert heights[13] == pytest.approx(0.75)  # 40 images
    assert heights[15 + 10] == pytest.approx(0.6)  # 5 images: pale, and the legend says why
    assert upper.patches[25].get_alpha() == 0.3
    assert np.isfinite(heights).sum() == 2
    counts_of = {i: bar.get_height() for i, bar in enumerate(lower.patches) if bar.get_height()}
    assert counts_of == {10: 5, 13: 40}
    assert (other.get_xlabel(), other.get_ylabel()) == ("confidence", "images")
    assert upper.get_legend() is None  # it would cover bars
    assert set(legend_of(fig)) == {
        "accuracy of the bin",
        "the same, fewer than 10 images",
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
    frame = axes_of(fig)[1].spines["left"].get_edgecolor()
    assert frame[:3] == to_rgb(EMOTION_COLOURS["fear"])
    as_arrays = plot_mistakes(
        [picture()], np.array([0]), np.array([1]), np.array([0.9], np.float32), MIKELS_CLASSES
    )
    assert axes_of(as_arrays)[0].get_title() == "amusement\n→ awe 90%"
    nothing = plot_mistakes([], [], [], [], MIKELS_CLASSES)
    assert [text for text, _ in drawn_texts(nothing)] == ["No mistakes to show."]
    with pytest.raises(ValueError, match=r"zip\(\)"):
        plot_mistakes([picture()] * 2, [0, 6], [1], [0.9, 0.5], MIKELS_CLASSES)


def test_a_long_name_never_hides_the_confidence() -> None:
    names = CLASSES[25]
    (title,) = (ax.get_title() for ax in plot_mistakes([picture()], [3], [24], [0.87], names).axes)
    assert title.startswith("class_3") and title.endswith("24 87%")


def test_guesses_show_both_answers_and_frame_the_right_ones() -> None:
    before = np.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]])
    after = np.array([[0.9, 0.05, 0.05], [0.1, 0.2, 0.7]])
    fig = plot_guesses([picture(), picture()], [0, 1], before, after, ["a", "b", "c"])
    titles = [ax.get_title() for ax in axes_of(fig)]
    assert titles == ["a\nbefore: b 50%\nafter: a 90%", "b\nbefore: a 40%\nafter: c 70%"]
    right, wrong = (ax.spines["left"].get_edgecolor() for ax in axes_of(fig))
    assert right[1] > right[0] and wrong[0] > wrong[1]  # greener, redder
    assert "green" in fig.get_suptitle()
    with pytest.raises(ValueError, match=r"zip\(\)"):
        plot_guesses([picture()] * 2, [0, 1], before[:1], after, ["a", "b", "c"])


def test_gradcam_sets_each_image_beside_its_overlay() -> None:
    images = np.stack([picture(32, 32, value) for value in (0, 100, 200)])
    heat = np.zeros((3, 4, 2), dtype=np.float32)
    heat[:, :2] = 1
    fig = plot_gradcam(images, heat, ["a", "b", "c"])
    assert [ax.get_title() for ax in axes_of(fig)] == ["a", "b", "c"]
    assert "bright" in fig.get_suptitle()
    assert "4 x 2 cells" in fig.get_suptitle()
    for i, ax in enumerate(axes_of(fig)):
        shown = np.asarray(ax.images[0].get_array())
        assert shown.shape == (32, 65, 3)
        np.testing.assert_array_equal(shown[:, :32], images[i])
        overlay = shown[:, 33:].astype(int)
        assert overlay[:12].sum() > overlay[20:].sum()  # bright where the heat is
        np.testing.assert_array_equal(overlay[20:], images[i][20:])  # the image where it is not


def test_comparison_tells_measured_from_published() -> None:
    found = measured(ours=Estimate(0.76, 0.75, 0.77), linear_probe=Estimate(0.65, 0.64, 0.66))
    fig = plot_comparison(found, {"a paper": 0.74})
    (ax,) = axes_of(fig)
    ours = lines(ax)["measured here, with its 95 % interval"]
    theirs = lines(ax)["published (tested elsewhere)"]
    assert list(ours.get_xdata()) == [0.76, 0.65]
    assert list(theirs.get_xdata()) == [0.74]
    assert ours.get_marker() != theirs.get_marker()
    intervals = [line.get_xdata() for line in ax.get_lines() if line.get_label().startswith("_")]
    assert [list(ends) for ends in intervals] == [[0.75, 0.77], [0.64, 0.66]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ours", "linear probe", "a paper"]
    assert [text.get_text() for text in ax.texts] == [
        "0.760 [0.750, 0.770]",
        "0.650 [0.640, 0.660]",
        "0.740",
    ]
    assert ax.get_xlabel() == "accuracy"
    assert legend_of(fig) == [ours.get_label(), theirs.get_label()]
    assert legend_of(plot_comparison(found, {})) == [ours.get_label()]


def test_an_interval_that_misses_its_value_or_has_no_width_is_drawn() -> None:
    found = measured(missed=Estimate(0.01, 0.012, 0.02), perfect=Estimate(1, 1, 1))
    assert_readable(plot_comparison(found, {}))
