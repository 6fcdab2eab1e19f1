"""Look for learning rates of head and backbone by a short range test on training images."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.device import seed_everything
from emotion_toolbox.figures import plot_range_tests, save_figure
from emotion_toolbox.files import write_text
from emotion_toolbox.measures import Estimate
from emotion_toolbox.paired import resample_mean
from emotion_toolbox.report import figure_note, make_run_folder
from emotion_toolbox.settings import settings_hash
from emotion_transfer.commands.ablate import train_once
from emotion_transfer.commands.train import (
    add_settings,
    choose_settings,
    make_model,
    open_data,
    settings_of,
)
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.finder import find_rates
from emotion_transfer.model import thaw_level

AUTO_RATES, AUTO_EPOCHS = (3e-5, 1e-4, 3e-4), 2  # tried for LR_BACKBONE="auto"


class Tried(NamedTuple):
    """A short run at one rate of the backbone."""

    rate: float
    score: float  # by MONITOR on the validation images; larger is better
    behind: Estimate  # accuracy of the best run less that of this one


def compare_rates(
    settings: EnhancedConfig, datasets: Mapping[str, EmotionDataset], folder: Path,
    rates: Sequence[float], epochs: int,
) -> list[Tried]:  # fmt: skip
    """Short runs at some values of LR_BACKBONE, the best first; all of the network trains.

    They are made in `folder`, and nothing of them is left there. Raises ``ConfigError`` for a rate
    or number of epochs that no run can have.
    """
    found = []
    whole: dict[str, Any] = {"WARMUP_EPOCHS": 0, "THAW_EPOCHS": (0, 0), "EPOCHS": epochs}
    tried = [dataclasses.replace(settings, LR_BACKBONE=rate, **whole) for rate in rates]
    for cfg in tried:
        print(f"--- LR_BACKBONE={cfg.LR_BACKBONE:g}", flush=True)
        scratch = folder / f"tried-{settings_hash(cfg)}"  # a run that was stopped goes on there
        answers = train_once(cfg, datasets, folder, scratch, "val")[cfg.TTA]
        hits = (answers.predicted == answers.labels).astype(float)
        found.append((answers.score(cfg.MONITOR), hits, cfg.LR_BACKBONE))
    found.sort(key=lambda run: run[0], reverse=True)
    best = found[0][1]
    return [Tried(rate, score, resample_mean((best - hits)[None])) for score, hits, rate in found]


def describe_rates(tried: Sequence[Tried], monitor: str) -> str:
    """What ``compare_rates`` found, in a line a rate."""
    lines = [
        f"LR_BACKBONE={tried[0].rate:g} won with a validation {monitor} of {tried[0].score:.3f}"
    ]
    for rate, score, behind in tried[1:]:
        told = "" if behind.low > 0 else ": chance alone may do that"
        lines.append(f"  before {rate:g} with {score:.3f}, by {behind:.3f} of accuracy{told}")
    return "\n".join(lines)


def choose_rate(settings: Mapping[str, Any]) -> float:
    """The LR_BACKBONE that short runs under the other `settings` prefer; says by how much.

    It is kept in a run's folder, so that a run that is taken up again gets the same one.
    """
    cfg, listed = choose_settings({n: v for n, v in settings.items() if n != "LR_BACKBONE"})
    folder = make_run_folder(dataclasses.replace(cfg, RUN_NAME="auto"), listed)
    file = folder / "rates.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    else:
        tried = compare_rates(cfg, open_data(cfg, listed)[1], folder, AUTO_RATES, AUTO_EPOCHS)
        found = {"LR_BACKBONE": tried[0].rate, "why": describe_rates(tried, cfg.MONITOR)}
        write_text(file, json.dumps(found, indent=1) + "\n")
    print(f"{found['why']}\n(kept in {file})", flush=True)
    return float(found["LR_BACKBONE"])


def suggest(settings: dict[str, Any], rates: Sequence[float] = (), epochs: int = 2) -> Path:
    """Print what both range tests say under these `settings`; returns the picture's file.

    With `rates`, short runs at each of them too.
    """
    cfg, listed = choose_settings(settings)
    run_dir = make_run_folder(cfg, listed)
    print(run_dir, flush=True)
    _, datasets = open_data(cfg, listed)
    seed_everything(cfg.SEED)
    found = find_rates(cfg, make_model(cfg, datasets, run_dir), datasets["train"])
    if thaw_level(cfg, cfg.EPOCHS - 1) == 0:
        print("LR_BACKBONE: the backbone never thaws in this run, so only the head was tested")
    if rates:
        print(describe_rates(compare_rates(cfg, datasets, run_dir, rates, epochs), cfg.MONITOR))
    print("To use a suggestion, set it: nothing has been changed.")
    note = figure_note(listed.synthetic, cfg.MODEL_NAME, cfg.DEBUG)
    save_figure(plot_range_tests(found), run_dir / "figures", "range_tests", note=note)
    return run_dir / "figures" / "range_tests.png"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and test."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer lr",
        description=__doc__,
        epilog="example: python -m emotion_transfer lr --set DATA_ROOT=data/processed/pictures",
    )
    parser.add_argument(
        "--runs", type=float, nargs="+", default=[], metavar="RATE",
        help="train shortly at each of these LR_BACKBONE too, and compare on validation images",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=2, help="of each such run (default: 2)")
    add_settings(parser)
    args = parser.parse_args(arguments)
    print(suggest(settings_of(args), args.runs, args.epochs))
    return 0
