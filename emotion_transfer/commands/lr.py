"""Look for learning rates of head and backbone by a short range test on training images."""

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import trange

from emotion_toolbox.batches import Batch, EmotionDataset, batch_slices, training_order
from emotion_toolbox.device import choose_device, seed_everything, set_deterministic
from emotion_toolbox.errors import DivergedError
from emotion_toolbox.figures import BLUE, GREEN, RED, new_figure, save_figure
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
from emotion_transfer.engine import Trainer, begin_epoch, train_step
from emotion_transfer.model import EmotionClassifier, thaw_level

ENGINE = Trainer, begin_epoch, train_step
Step = Callable[[int, float], float]  # number and rate of a step: the loss before it
FEWEST = 10  # steps behind a suggestion
AUTO_RATES, AUTO_EPOCHS = (3e-5, 1e-4, 3e-4), 2  # tried for LR_BACKBONE="auto"


class RangeTest(NamedTuple):
    """What ``range_test`` measured, the rate as it is set, and the one that is suggested."""

    table: pd.DataFrame
    given: float
    suggested: float | None


def range_test(step: Step, still: Step, low: float, high: float, steps: int) -> pd.DataFrame:
    """A row a step of a learning-rate range test (Smith 2017, arXiv 1506.01186).

    The rate rises exponentially from `low` to `high`. `still` is the same training on the same
    images at rate 0, so neither hard batches nor what else learns bend `change`: the loss less that
    of `still`, smoothed exponentially with bias correction. Ends before a loss that is not finite,
    and where the smoothed one is twice that of `still`. Columns: rate, loss, still, change. Raises
    ``DivergedError`` if the first loss is not finite.
    """
    rows: list[tuple[float, ...]] = []
    for number in trange(steps, desc="range test", leave=False):
        rate = low * (high / low) ** (number / (steps - 1))
        rows.append((rate, step(number, rate), still(number, 0.0)))
        if not np.isfinite(rows[-1]).all():
            rows.pop()
            break
        smooth = pd.DataFrame(rows).ewm(alpha=0.2).mean()
        if smooth[1].iloc[-1] > 2 * smooth[2].iloc[-1]:
            break
    if not rows:
        raise DivergedError("the first loss is not finite: look for NaN in WEIGHTS or INIT_FROM")
    table = pd.DataFrame(rows, columns=["rate", "loss", "still"], dtype=float)
    return table.assign(change=(table["loss"] - table["still"]).ewm(alpha=0.2).mean())


def suggest_rate(table: pd.DataFrame) -> float | None:
    """The rate of a ``range_test`` that brings half of what the best one brings.

    There a smooth curve falls most steeply; a slope is read off noise less surely. None after too
    few steps, or where the loss never falls by 1 %.
    """
    change = table["change"].to_numpy()
    if len(change) < FEWEST or change.min() > -0.01 * table["still"].mean():
        return None
    return float(table["rate"].iloc[(change <= change.min() / 2).argmax()])


def find_rates(
    settings: EnhancedConfig, model: EmotionClassifier, train: EmotionDataset, level: int,
    engine: Sequence[Callable[..., Any]] = ENGINE, steps: int = 60,
) -> dict[str, RangeTest]:  # fmt: skip
    """A ``range_test`` of LR_HEAD, and one of LR_BACKBONE if thaw `level`, the highest, is not 0.

    The head is tested as a run begins, the backbone frozen; the backbone with all thawed that ever
    is, under a head that has trained alone for half as many steps and goes on at LR_HEAD, as after
    a thaw. `engine`: what trains. Works on copies: it leaves no trace.
    Raises ``DivergedError`` where the first loss is not finite, ``DataError`` if no batch is full.
    """
    # Epoch 1: the head alone; 2: the backbone. No rate falls, and nothing is clipped, for the norm
    # of a twin whose backbone has no gradients is another.
    trial = dataclasses.replace(
        settings, EPOCHS=3, THAW_EPOCHS=(2, 4 - level), MIN_LR=1.0, EMA_DECAY=0.0, COMPILE=False,
        MIX_OFF_EPOCHS=3 if settings.MIX_OFF_EPOCHS >= settings.EPOCHS else 0, GRAD_CLIP=1e6,
    )  # fmt: skip
    size, slices = settings.BATCH_SIZE, list[npt.NDArray[np.int64]]()
    which: dict[str, Any] = {"seed": settings.SEED, "balanced": settings.BALANCE == "sampler"}
    while len(slices) < steps:  # a small set again, in another order
        order = training_order(train.split.labels, size, epoch=len(slices), **which)
        slices += batch_slices(order, size)

    def begun(epoch: int) -> Any:
        trainer = engine[0](trial, copy.deepcopy(model), train)
        engine[1](trainer, epoch)
        return trainer

    def step_of(trainer: Any, epoch: int, part: str) -> Step:
        def step(number: int, rate: float) -> float:
            for group in trainer.optimizer.param_groups:
                if group["name"].startswith(part):
                    group["base_lr"] = rate
            batch = Batch(*(t.to(trainer.device) for t in train.batch(slices[number])))
            trainer.meter.sums.zero_()
            engine[2](trainer, batch, epoch, number, steps)
            return float(trainer.meter.read().loss)

        return step

    set_deterministic(settings.DETERMINISTIC)  # as `fit` does, before a GPU is first used
    device = choose_device(settings.DEVICE)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        pair = step_of(begun(1), 1, "head"), step_of(begun(1), 1, "head")
        found = {"LR_HEAD": range_test(*pair, 1e-5, 1.0, steps)}
        if level:
            thawed, still = begun(1), begun(2)
            for number in range(steps // 2):
                step_of(thawed, 1, "head")(number, settings.LR_HEAD)
            engine[1](thawed, 2)
            still.load_state_dict(copy.deepcopy(thawed.state_dict()))
            still.model.backbone.requires_grad_(False)  # which has rate 0
            pair = step_of(thawed, 2, "backbone"), step_of(still, 2, "backbone")
            found["LR_BACKBONE"] = range_test(*pair, 1e-6, 0.1, steps)
    return {n: RangeTest(t, getattr(settings, n), suggest_rate(t)) for n, t in found.items()}


def plot_range_tests(
    tests: Mapping[str, tuple[pd.DataFrame, float, float | None]],
) -> Figure:
    """A panel a ``RangeTest``, by the name of its setting: how the loss changes with the rate."""
    fig, axes = new_figure(5.6 * len(tests), 3.6, 1, len(tests))
    for ax, (name, (table, given, suggested)) in zip(axes.flat, tests.items(), strict=True):
        ax.set_xscale("log")
        each = table["loss"] - table["still"]
        ax.plot(table["rate"], each, ".", color="0.7", label="a step")
        ax.plot(table["rate"], table["change"], color=BLUE, lw=1.8, label="smoothed")
        for rate, colour, what in ((given, RED, "as it is set"), (suggested, GREEN, "suggested")):
            if rate:  # a log scale has no zero
                ax.axvline(rate, color=colour, ls="--", lw=1.8, label=f"{rate:.2g}, {what}")
        depth = max(0.01, -1.1 * each.min())  # where the loss explodes it may leave the picture
        ax.set(xlabel=name, ylabel="loss, less that at rate 0", ylim=(-depth, depth))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper left")
    return fig


def describe(name: str, test: RangeTest) -> str:
    """What a range test found, in one line."""
    if test.suggested is None:
        why = "the loss hardly falls in so few steps; stay below where it rises"
        return f"{name}: {test.given:.2g} is set; no suggestion: {why}"
    return f"{name}: {test.given:.2g} is set, {test.suggested:.2g} suggested"


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
    level, model = thaw_level(cfg, cfg.EPOCHS - 1), make_model(cfg, datasets, run_dir)
    found = find_rates(cfg, model, datasets["train"], level)
    print("\n".join(describe(name, test) for name, test in found.items()))
    if level == 0:
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
