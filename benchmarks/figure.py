"""The measurements as one figure."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Row
from benchmarks.results import Results

OURS, THEIRS = "#1b6ca8", "#b8b8b8"
SHIPS = "ours, as it ships"


def draw_bars(axes: Axes, names: Sequence[str], rows: Sequence[Row], title: str) -> None:
    """Horizontal bars of the medians, with a whisker from the lowest to the highest repeat."""
    medians = [row["median"] for row in rows]
    spread = [
        [row["median"] - min(row["repeats"]) for row in rows],
        [max(row["repeats"]) - row["median"] for row in rows],
    ]
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    axes.barh(range(len(names)), medians, xerr=spread, color=colours, ecolor="#444444")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, loc="left")
    for place, row in enumerate(rows):
        shown = f" {row['median']:,.0f}" if row["median"] >= 1000 else f" {row['median']:.3g}"
        axes.annotate(shown, (max(row["repeats"]), place), va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def draw_results(results: Results) -> Figure:
    """Input path (logarithmic), step, epoch, and cost against size; what was not measured lacks."""
    parts = results["parts"]
    figure = Figure(figsize=(14, 9), layout="constrained")
    grid = figure.subplots(2, 2)
    if "input" in parts:
        rows = [r for r in parts["input"]["rows"] if r["source"] == "500x375"]
        draw_bars(grid[0, 0], [r["path"] for r in rows], rows, "Input path, 500x375, images/s")
        grid[0, 0].set_xscale("log")
    if "step" in parts:
        eager = [r for r in parts["step"]["rows"] if not r["compiled"]]
        fastest = max(eager, key=lambda row: row["median"] if row["step"] == SHIPS else 0)
        rows = [r for r in eager if r["precision"] == fastest["precision"]]
        title = f"Step alone, {rows[0]['precision']}, eager, images/s"
        draw_bars(grid[0, 1], [r["step"] for r in rows], rows, title)
    if "epoch" in parts:
        rows = [r for r in parts["epoch"]["rows"] if r["unit"] == "images/s"]
        draw_bars(grid[1, 0], [r["epoch"] for r in rows], rows, "Whole epoch, images/s")
    if "size" in parts:
        draw_size(grid[1, 1], parts["size"]["rows"])
    machine = results["machine"]
    figure.suptitle(machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores")
    return figure


def draw_size(axes: Axes, rows: Sequence[Row]) -> None:
    """Time to read an image, and peak anonymous memory, against the size of the set."""
    memory = axes.twinx()
    for what, target, colour in (
        ("read in random order", axes, OURS),
        ("peak RssAnon, reading", memory, "#c05020"),
    ):
        chosen = [r for r in rows if r["what"] == what]
        images, medians = ([r[key] for r in chosen] for key in ("images", "median"))
        target.plot(images, medians, "o-", color=colour)
        target.set_ylabel(f"{what}, {chosen[0]['unit']}", color=colour)
        target.set_ylim(0, 1.3 * max(medians))
    axes.set_xlabel("images in the set")
    axes.set_title("Cost against size", loc="left")


def save_figure(file: Path, results: Results) -> None:
    """Write the figure as PNG."""
    draw_results(results).savefig(file, dpi=110)
