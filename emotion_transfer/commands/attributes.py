"""Where does a model fail? Its accuracy by the attributes of the pictures, with intervals."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from emotion_toolbox.attributes import Attribute, read_attributes
from emotion_toolbox.cache import DecodedPixels
from emotion_toolbox.ensembles import make_ensemble
from emotion_toolbox.errors import ConfigError, DataError, ImageError
from emotion_toolbox.export import load_export
from emotion_toolbox.figures import BELOW, BLUE, fit_text, new_figure, save_figure
from emotion_toolbox.files import absolute, count_threads, resolve_path, write_text
from emotion_toolbox.measures import Estimate, Labels
from emotion_toolbox.report import figure_note
from emotion_toolbox.sample import load_data
from emotion_toolbox.subgroups import (
    FEW,
    accuracy_by_group,
    group_images,
    holm,
    permutation_test,
)
from emotion_toolbox.tables import SPLITS, Split, csv_text, load_splits
from emotion_transfer.commands.predict import answers, find_export, network_of

EXAMPLE = """examples:
  python -m emotion_transfer attributes                     the test images of the newest run
  python -m emotion_transfer attributes --run outputs/RUN_NAME --columns scene_type brightness
  python -m emotion_transfer attributes --model EXPORT --data data/processed/pictures --split val

Attributes are the columns of the CSV beside path and label; brightness and colorfulness are
measured where it has none. What differs by chance alone is told apart by a permutation test."""
PREDICTIONS = "predictions_test.csv"
SIDE = 128  # pixels; enough to measure light and colours
SHOWN = 15  # values of a column that are printed and drawn, those with the lowest accuracy
LEVEL = 0.05  # a larger p is no evidence
DOT = "accuracy, 95 % interval (grey: chance would do)"


@dataclass(frozen=True)
class Answers:
    """What a model said of the images of `split`: the numbers of the classes [N] it chose."""

    split: Split
    predicted: Labels
    classes: tuple[str, ...]
    fit: str  # how its images are made square
    dataset: str
    note: str  # what a figure must say


def newest_run() -> Path:
    """The run under ``outputs`` whose predictions were written last."""
    files = resolve_path("outputs").glob(f"*/{PREDICTIONS}")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise ConfigError(
            f"no run under {resolve_path('outputs')} has a {PREDICTIONS}; finish one, or name "
            "one: --run"
        )
    return newest.parent


def read_json(file: Path, *names: str) -> list[Any]:
    """Some values of a file of a run; raises ``DataError`` if it is not there or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [content[name] for name in names]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read ({error}); --run takes the folder of a run that is done"
        ) from error


def read_predictions(file: Path) -> pd.DataFrame:
    """path, label and predicted of every image, as ``write_predictions`` wrote them."""
    wanted = ["path", "label", "predicted"]
    try:
        table = pd.read_csv(
            file, usecols=wanted, dtype=str, keep_default_na=False,
            encoding_errors="surrogateescape",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DataError(
            f"{file} is missing: the run is not done; start it again with the same settings"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); make the run anew") from error
    return table[wanted]


def answers_of_run(run: Path, root: Path | None) -> Answers:
    """What a run answered to its test images, whose table is in `root` (None: where it was).

    Raises ``DataError`` for a run that is not done, and images or labels that are others now.
    """
    file = run / PREDICTIONS
    said = read_predictions(file)
    fit, *place = read_json(run / "config.json", "FIT", "DATASET", "DATA_ROOT", "IMAGES_ROOT")
    facts = read_json(run / "summary.json", "synthetic", "model", "debug")
    data = load_data("files", str(root)) if root else load_data(*place)
    split, classes = data.splits["test"], pd.Index(data.classes)
    rows = pd.Index(split.files).get_indexer(pd.Index(said["path"]))
    if (other := rows < 0).any():
        raise DataError(
            f"{file} has {other.sum()} images that are not in {split.csv}, first "
            f"{said['path'][other].iloc[0]}; give the folder of the run's own data: --data"
        )
    split, predicted = split.select(rows), classes.get_indexer(pd.Index(said["predicted"]))
    same = (classes.get_indexer(pd.Index(said["label"])) == split.labels) & (predicted >= 0)
    if not same.all():
        i = int(same.argmin())
        raise DataError(
            f"{split.where(i)} has another label, or other classes, than in {file}: "
            f"{said['label'][i]!r}, answered {said['predicted'][i]!r}; train anew on these data"
        )
    predicted = predicted.astype(np.int64)
    return Answers(split, predicted, data.classes, fit, data.name, figure_note(*facts))


def answers_of_export(folder: Path, root: Path, name: str) -> Answers:
    """What the export in `folder` answers to the split `name` of the data in `root`.

    Images that cannot be used are named and left out.
    """
    exported, data = load_export(folder, network_of), load_splits(root)
    if set(exported.classes) != set(data.classes):
        raise DataError(
            f"{root} has the classes {', '.join(data.classes)}, and {folder} knows "
            f"{', '.join(exported.classes)}; give data of the same classes"
        )
    split, number = data.splits[name], [data.classes.index(c) for c in exported.classes]
    paths = [str(split.path(i)) for i in range(len(split))]
    good, predicted = [], []
    found = answers(make_ensemble([exported], [folder]), paths)
    for i, (path, p) in enumerate(tqdm(found, "predicting", len(paths), unit="image", leave=False)):
        if isinstance(p, ImageError):
            tqdm.write(f"left out: {path}: {p}", file=sys.stderr)
        else:
            good.append(i)
            predicted.append(number[int(p.argmax())])
    if not good:
        raise DataError(f"none of the images of {split.csv} can be used; is --data right?")
    note = figure_note(exported.synthetic or data.synthetic, str(exported.model.name), False)
    split = split.select(np.array(good))
    return Answers(
        split, np.array(predicted, np.int64), data.classes, exported.fit, data.name, note
    )


@dataclass(frozen=True)
class Column:
    """The rows of one attribute, as ``accuracy_by_group`` gives them, and its tests.

    `p` is of "all groups are equally accurate", `p_within` of the same among images of one class;
    both are adjusted for the number of columns (Holm). NaN: nothing to compare.
    """

    name: str
    numeric: bool
    rows: pd.DataFrame
    p: float
    p_within: float

    def shown(self) -> pd.DataFrame:
        """The SHOWN least accurate rows, least first; those of numbers in their order."""
        least = self.rows.sort_values("accuracy", kind="stable").head(SHOWN)
        return least.sort_index() if self.numeric else least

    def hidden(self) -> str:
        """What is to be said of the other rows."""
        more = len(self.rows) - len(self.shown())
        return f"{more} with a higher accuracy not shown" if more else ""

    def verdict(self) -> str:
        """What the tests say, in a line."""
        if math.isnan(self.p):
            return f"nothing to compare ({FEW} images make a value)"
        differs = "differs" if self.p < LEVEL else "no evidence of a difference"
        inside = "" if math.isnan(self.p_within) else f"; within classes {written(self.p_within)}"
        return f"{differs}, {written(self.p)}{inside}"


def written(p: float) -> str:
    """A p-value in words."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def compare_groups(said: Answers, attributes: Mapping[str, Attribute]) -> list[Column]:
    """The accuracy by value of each attribute, and whether it differs."""
    labels, hits = said.split.labels, said.split.labels == said.predicted
    groups = {name: group_images(one) for name, one in attributes.items()}
    p, within = (
        holm(permutation_test(hits, list(groups.values()), strata))
        for strata in (np.zeros_like(labels), labels)
    )
    return [
        Column(
            name, attributes[name].numbers is not None,
            accuracy_by_group(labels, said.predicted, found, len(said.classes)), *tests,
        )
        for (name, found), *tests in zip(groups.items(), p, within, strict=True)
    ]  # fmt: skip


def estimates(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """A value and its interval in each row, from these three columns; "" where it is NaN."""
    values = rows[list(names)].to_numpy(float).tolist()
    return ["" if math.isnan(row[0]) else str(Estimate(*row)) for row in values]


def printed(column: Column) -> str:
    """A column for a terminal."""
    rows = column.shown()
    text = pd.DataFrame({
        column.name: rows["value"], "images": rows["images"],
        "accuracy": estimates(rows, ("accuracy", "low", "high")),
        "by class": rows["expected"].map("{:.3f}".format),
        "macro F1": estimates(rows, ("macro_f1", "macro_f1_low", "macro_f1_high")),
    })  # fmt: skip
    lines = [f"{column.name}: {column.verdict()}", text.to_string(index=False), column.hidden()]
    return "\n".join(filter(None, lines))


def draw_panel(ax: Any, column: Column, overall: float) -> None:
    """The dots and intervals of one column; grey where chance would do."""
    rows, colour = column.shown(), BLUE if column.p < LEVEL else "0.6"
    places = range(len(rows))
    ax.axvline(overall, color="0.5", lw=1, ls="--", label="all images")
    ax.plot([rows["low"], rows["high"]], [places, places], "|-", color=colour, lw=2, ms=9, mew=1.5)
    style = {"color": "black", "mfc": "none", "ms": 5}
    ax.plot(rows["expected"], places, "D", label="what the classes alone would give", **style)
    ax.plot(rows["accuracy"], places, "o", color=colour, ms=6, label=DOT)
    pairs = zip(rows["value"], rows["images"], strict=True)
    ax.set_yticks(places, [f"{fit_text(name, 1.8, 9)}  ({n:,})" for name, n in pairs], size=9)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelbottom=True, labelsize=8)
    ax.grid(axis="x", alpha=0.3)
    said = f"{column.verdict()}\n{column.hidden()}".strip()
    ax.set_title(f"{fit_text(column.name, 4, 10)}: {said}", size=9, loc="left")


def plot_columns(columns: Sequence[Column], overall: float) -> Figure:
    """Accuracy by value with its interval, a panel a column; the dashed line is `overall`."""
    wide = 1 if len(columns) < 3 else 2
    counts = [len(column.shown()) for column in columns]
    heights = [0.9 + 0.26 * max(counts[i : i + wide]) for i in range(0, len(counts), wide)]
    fig, axes = new_figure(
        6.5 * wide, 0.4 + sum(heights), len(heights), wide, sharex=True, height_ratios=heights
    )
    for ax, column in zip(axes.flat, columns, strict=False):
        draw_panel(ax, column, overall)
    for ax in axes.flat[len(columns) :]:
        ax.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, **{**BELOW, "ncols": 3, "fontsize": 9})
    return fig


def to_json(column: Column) -> dict[str, Any]:
    """A column ready for ``json.dumps``, with null for NaN."""
    tests = {"p": column.p, "p_within": column.p_within}
    return {
        "name": column.name, "numeric": column.numeric,
        **{name: None if math.isnan(p) else p for name, p in tests.items()},
        "values": json.loads(column.rows.to_json(orient="records", double_precision=12)),
    }  # fmt: skip


def report(said: Answers, names: Sequence[str], folder: Path) -> Path:
    """Write attributes.csv, .json and .png into `folder`, and print what they say."""
    pixels = DecodedPixels(said.split, SIDE, count_threads(None), said.fit)
    columns = compare_groups(said, read_attributes(said.split, pixels, names))
    overall = float((said.predicted == said.split.labels).mean())
    tables = {c.name: c.rows for c in columns}
    table = pd.concat(tables, names=["column", None]).reset_index("column")
    found = {
        "dataset": said.dataset, "split": said.split.name, "note": said.note,
        "images": len(said.split), "accuracy": overall, "columns": [to_json(c) for c in columns],
    }  # fmt: skip
    write_text(folder / "attributes.csv", csv_text(table))
    write_text(folder / "attributes.json", json.dumps(found, indent=1) + "\n")
    drawn = [column for column in columns if len(column.rows) > 1] or columns
    save_figure(plot_columns(drawn, overall), folder, "attributes", note=said.note)
    mark = f", {said.note}" if said.note else ""
    print(f"{said.dataset}, {said.split.name}{mark}: {overall:.3f} of {len(said.split):,} images")
    print(*map(printed, columns), sep="\n\n")
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and report."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer attributes",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, metavar="FOLDER", help="default: the newest")
    which.add_argument("--model", type=Path, metavar="FOLDER", help="an export, to answer --data")
    where = "folder of the CSV files; of a run, if they have moved"
    parser.add_argument("--data", type=Path, metavar="DATA_ROOT", help=where)
    parser.add_argument("--split", choices=SPLITS, help="with --model (default: test)")
    what = "some columns; default: all, and brightness and colorfulness"
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help=what)
    args = parser.parse_args(arguments)
    if args.model is None:
        if args.split not in (None, "test"):
            parser.error("a run has predictions of its test images; for others give --model")
        run = newest_run() if args.run is None else absolute(args.run)
        said = answers_of_run(run, args.data and absolute(args.data))
        folder = run / "attributes"
    else:
        if args.data is None:
            parser.error("--model needs --data")
        root, split, export = absolute(args.data), args.split or "test", find_export(args.model)
        said = answers_of_export(absolute(export), root, split)
        folder = absolute(export).parent / f"attributes-{root.name}-{split}"
    print(report(said, args.columns, folder))
    return 0
