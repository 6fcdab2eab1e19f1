"""What is each ingredient worth? Train without each in turn, over several seeds, and compare."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.device import seed_everything
from emotion_toolbox.errors import ConfigError
from emotion_toolbox.figures import BLUE, new_figure, save_figure
from emotion_toolbox.files import write_text
from emotion_toolbox.measures import Estimate, Predictions
from emotion_toolbox.paired import pack_hits, resample_mean, unpack_hits
from emotion_toolbox.report import figure_note, make_run_folder, software_versions
from emotion_toolbox.settings import settings_hash
from emotion_transfer.commands.attribute_heads import (
    WEIGHT,
    add_attribute_options,
    add_attributes,
    attributes_of,
    fit_model,
)
from emotion_transfer.commands.train import (
    add_settings,
    answer,
    choose_settings,
    make_model,
    open_data,
    settings_of,
)
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.schedule import cycle_bounds

Change = dict[str, Any]
WHOLE = "the recipe"
NO_COLOUR = dict.fromkeys(("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"), 0.0)
EXAMPLE = """example: python -m emotion_transfer ablate --set DATA_ROOT=data/processed/pictures
Stopped, it goes on where it was: every run that is done is kept."""


def default(*names: str) -> Change:
    """What the defaults say of these settings."""
    known = {f.name: f.default for f in dataclasses.fields(EnhancedConfig)}
    return {name: known[name] for name in names}


def opposite(cfg: EnhancedConfig, without: Change, included: Change) -> tuple[Change, bool]:
    """What takes an ingredient out of `cfg`, and True; where it is not in, what adds it, False."""
    inside = any(getattr(cfg, name) != value for name, value in without.items())
    return (without if inside else included), inside


def ingredients(cfg: EnhancedConfig) -> dict[str, tuple[Change, bool]]:
    """By name: the settings with the ingredient out, or in where `cfg` has it not; and if it has.

    What cannot be told apart in this recipe is left out: restarts where nothing thaws later, two
    rates where everything moves at one.
    """
    alike = cfg.START == "probe" and cfg.HEAD != "progressive"
    single = "linear" if cfg.HEAD == "progressive" else cfg.HEAD
    last = "linear" if cfg.HEAD == "multilevel" else cfg.HEAD
    wait = {"WARMUP_EPOCHS": min(3, cfg.EPOCHS // 4), "THAW_EPOCHS": None}
    pairs: dict[str, tuple[Change, Change]] = {
        "start from the probe": ({"START": "random"}, {"START": "probe"}),
        "progressive head": ({"HEAD": single}, {"HEAD": "progressive"}),
        "multi-level features": ({"HEAD": last}, {"HEAD": "multilevel"}),
        "mixing": ({"MIX_PROB": 0.0}, default("MIX_PROB")),
        "label smoothing": ({"LABEL_SMOOTHING": 0.0}, default("LABEL_SMOOTHING")),
        "class weights": ({"BALANCE": "none"}, {"BALANCE": "weights"}),
        "weight averaging": ({"EMA_DECAY": 0.0}, default("EMA_DECAY")),
        "staged thawing": ({"WARMUP_EPOCHS": 0, "THAW_EPOCHS": (0, 0)}, wait),
        "frozen BatchNorm": ({"BACKBONE_BATCHNORM": "train"}, {"BACKBONE_BATCHNORM": "frozen"}),
        "colour": (NO_COLOUR, default(*NO_COLOUR)),
        "erasing": ({"ERASE_PROB": 0.0}, default("ERASE_PROB")),
        "test-time augmentation": ({"TTA": False}, {"TTA": True}),
    }
    if not alike:
        pairs["two learning rates"] = {"LR_HEAD": cfg.LR_BACKBONE}, default("LR_HEAD")
    if len(cycle_bounds(dataclasses.replace(cfg, RESTARTS=True))) > 1:
        pairs["restarts"] = {"RESTARTS": False}, {"RESTARTS": True}
    if attributes := getattr(cfg, "ATTRIBUTES", ()):
        pairs["attribute heads"] = {"ATTRIBUTES": ()}, {"ATTRIBUTES": attributes}
    return {name: opposite(cfg, *pair) for name, pair in pairs.items()}


def train_once(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], folder: Path, scratch: Path,
    split: str,
) -> dict[bool, Predictions]:  # fmt: skip
    """What a network trained as `cfg` says answers to `split`, without and with mirror images.

    The probe is shared in `folder`; the run's own files are in `scratch`, and gone at the end.
    """
    seed_everything(cfg.SEED)
    model = make_model(cfg, datasets, folder)
    result = fit_model(cfg, model, datasets, scratch / "checkpoints")
    views = [dataclasses.replace(cfg, TTA=tta) for tta in (False, True)]
    found = {c.TTA: answer(c, model, datasets[split], result.amp) for c in views}
    shutil.rmtree(scratch)
    return found


def run_all(
    cfg: EnhancedConfig, names: Sequence[str], seeds: int, datasets: Mapping[str, EmotionDataset],
    folder: Path, split: str,
) -> pd.DataFrame:  # fmt: skip
    """The record of every run, a row each: seed, variant, hits; made where it is not in `folder`.

    One seed of all variants comes before the next seed, so that what is there can be compared.
    """
    known, rows = ingredients(cfg), []
    for seed in range(cfg.SEED, cfg.SEED + seeds):
        for name in (WHOLE, *names):
            change = known[name][0] if name in known else {}
            trained = name if change.keys() - {"TTA"} else WHOLE  # mirrored, it is the same network
            slug = f"{split}-{trained.replace(' ', '-')}-{seed}"
            file = folder / f"{slug}.json"
            varied = dataclasses.replace(cfg, SEED=seed, **change)
            key = "-".join([settings_hash(varied), *(d.fingerprint() for d in datasets.values())])
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if kept.get("key") != key:  # not there, or of other settings in a folder with a name
                print(f"--- seed {seed}: {describe(name, known) if name in known else name}")
                found = train_once(varied, datasets, folder, folder / slug, split)
                hits = {str(tta): pack_hits(p.predicted == p.labels) for tta, p in found.items()}
                kept = {"key": key, "images": len(datasets[split]), "hits": hits}
                write_text(file, json.dumps(kept))
            right = kept["hits"][str(change.get("TTA", cfg.TTA))]
            rows.append({"seed": seed, "variant": name, "hits": unpack_hits(right, kept["images"])})
    return pd.DataFrame(rows)


def describe(name: str, known: Mapping[str, tuple[Change, bool]]) -> str:
    """The variant in words."""
    change, inside = known[name]
    settings = ", ".join(f"{key}={value}" for key, value in change.items())
    return f"{'without' if inside else 'with'} {name} ({settings})"


def worth(runs: pd.DataFrame, known: Mapping[str, tuple[Change, bool]]) -> dict[str, Estimate]:
    """Accuracy with each ingredient less that without it, paired, with a 95 % interval."""
    by_name = {n: np.stack(list(g["hits"])).astype(float) for n, g in runs.groupby("variant")}
    whole, found = by_name.pop(WHOLE), {}
    for name in runs["variant"].drop_duplicates().drop(0):
        sign = 1 if known[name][1] else -1
        found[name] = resample_mean(sign * (whole - by_name[name]))
    return found


def plot_worth(found: Mapping[str, Estimate], known: Mapping[str, tuple[Change, bool]]) -> Figure:
    """What each ingredient is worth, in points, with its interval; hollow: not in the recipe."""
    fig, [[ax]] = new_figure(8, 1.4 + 0.34 * len(found))
    for row, (name, e) in enumerate(found.items()):
        ax.plot([100 * e.low, 100 * e.high], [row, row], "|-", color=BLUE, lw=2, ms=10)
        face = BLUE if known[name][1] else "white"
        ax.plot(100 * e.value, row, "o", color=BLUE, ms=6, mfc=face)
    ax.axvline(0, color="0.5", lw=1)
    ax.set_yticks(range(len(found)), [*found])
    ax.invert_yaxis()
    ax.set_xlabel("accuracy with it, less without it, in points (hollow: not in the recipe)")
    return fig


def worth_table(
    found: Mapping[str, Estimate], known: Mapping[str, tuple[Change, bool]]
) -> pd.DataFrame:
    """A row an ingredient: whether the recipe has it, and what it is worth in points."""
    return pd.DataFrame({
        "ingredient": list(found),
        "in the recipe": ["yes" if known[name][1] else "no" for name in found],
        "worth, points": [format(Estimate(*(100 * v for v in (e.value, e.low, e.high))), "+.1f")
                          for e in found.values()],
    })  # fmt: skip


def ablate(
    settings: Change, seeds: int, only: Sequence[str], split: str, attributes: Sequence[str] = (),
    weight: float = WEIGHT,
) -> Path:  # fmt: skip
    """Run what is not there yet, print the table, and return the folder that has it all."""
    cfg, listed = choose_settings(settings)
    cfg = add_attributes(cfg, attributes, weight, listed)
    known = ingredients(cfg)
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"no ingredient {unknown[0]!r} here; there are {', '.join(known)}")
    run_dir = make_run_folder(cfg, listed)
    folder = run_dir / "ablation"
    folder.mkdir(exist_ok=True)
    print(folder, flush=True)
    _, datasets = open_data(cfg, listed)
    runs = run_all(cfg, list(only or known), seeds, datasets, folder, split)
    found = worth(runs, known)
    accuracy = resample_mean(np.stack(list(runs.loc[runs["variant"] == WHOLE, "hits"])))
    table = worth_table(found, known)
    write_text(folder / "ablation.csv", table.to_csv(index=False))
    write_text(folder / "ablation.json", json.dumps({
        "dataset": listed.name, "split": split, "images": len(datasets[split]), "seeds": seeds,
        "accuracy": accuracy.to_json(), "settings": dataclasses.asdict(cfg),
        "worth": {name: e.to_json() | {"included": known[name][1]} for name, e in found.items()},
        "versions": software_versions(),
    }, indent=1) + "\n")  # fmt: skip
    note = figure_note(listed.synthetic, cfg.MODEL_NAME, cfg.DEBUG)
    save_figure(plot_worth(found, known), folder, "ablation", note=note)
    print(f"{WHOLE}: accuracy {accuracy} on the {split} images, {seeds} seeds")
    print(table.to_string(index=False))
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer ablate",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, from SEED on")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some ingredients")
    parser.add_argument(
        "--split", choices=("val", "test"), default="val",
        help="images to judge by; what was chosen by the test images cannot be tested any more",
    )  # fmt: skip
    add_settings(parser)
    add_attribute_options(parser)
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give 1 or more")
    print(ablate(settings_of(args), args.seeds, args.only, args.split, *attributes_of(args)))
    return 0
