"""Train on folds of the pictures, so that each is judged by a network that never saw it."""

import argparse
import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import confusion_matrix

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.clusters import clustered_mean, clustered_metrics
from emotion_toolbox.errors import ConfigError
from emotion_toolbox.figures import plot_comparison, plot_confusion, save_figure
from emotion_toolbox.files import write_text
from emotion_toolbox.folds import Fold, Grouping, group_images, make_folds, refuse_repeats
from emotion_toolbox.keeper import keep_result
from emotion_toolbox.measures import Estimate, calibrate, fit_temperature
from emotion_toolbox.report import figure_note, make_run_folder, software_versions, write_summary
from emotion_toolbox.settings import settings_hash
from emotion_toolbox.subsets import choose_images, join_datasets
from emotion_toolbox.tables import SPLITS, EmotionData, Split
from emotion_transfer.baselines import run_baseline
from emotion_transfer.commands.train import (
    add_settings,
    answer,
    choose_settings,
    open_data,
    settings_of,
    train_model,
)
from emotion_transfer.config import COMPARED, EnhancedConfig

Answers = dict[str, Any]  # of a fold: probabilities [N, C] of its images, and of training a note
Datasets = dict[str, EmotionDataset]
Measured = Mapping[str, Mapping[str, Estimate]]  # metrics of each network
OURS = "this notebook"
EXAMPLE = """example: python -m emotion_transfer crossval --folds 5 --group theme --baselines \\
  --set DATA_ROOT=data/processed/pictures
The pictures of train.csv and val.csv are judged; test.csv stays untouched. Stopped, it goes on
where it was."""


@dataclass(frozen=True)
class Pool:
    """All images that are judged, the split and group of each, and the folds."""

    data: EmotionDataset
    splits: Sequence[str]  # [N]
    groups: Grouping
    folds: Sequence[Fold]


def plan_folds(
    cfg: EnhancedConfig, splits: Mapping[str, Split], classes: Sequence[str], folds: int,
    column: str | None, judged: Sequence[str],
) -> tuple[Grouping, list[Fold]]:  # fmt: skip
    """The groups and the folds of all images of the `judged` splits, in their order.

    The share of a fold's training images that chooses the epoch is that of val.csv beside
    train.csv.
    """
    chosen = [splits[name] for name in judged]
    groups = group_images(chosen, column)
    labels = np.concatenate([split.labels for split in chosen])
    share = len(splits["val"]) / (len(splits["train"]) + len(splits["val"]))
    return groups, make_folds(labels, groups, classes, folds, share, cfg.SEED)


def open_pool(
    cfg: EnhancedConfig, listed: EmotionData, folds: int, column: str | None, judged: Sequence[str]
) -> Pool:
    """The images of the `judged` splits, decoded once for all folds.

    Raises ``DataError`` for what ``make_folds`` and ``refuse_repeats`` refuse.
    """
    asked = listed.classes, folds, column, judged
    plan_folds(cfg, listed.splits, *asked)  # what is wrong shows before anything is decoded
    datasets = open_data(cfg, listed)[1]
    groups, plan = plan_folds(cfg, {n: data.split for n, data in datasets.items()}, *asked)
    pool = join_datasets([datasets[name] for name in judged])
    if not cfg.ALLOW_DUPLICATES:
        refuse_repeats(pool, plan)
    return Pool(pool, [name for name in judged for _ in datasets[name].split.files], groups, plan)


def fold_folder(cfg: EnhancedConfig, listed: EmotionData, pool: Pool) -> Path:
    """Create and return the folder of these folds, crossval-RUN_NAME; auto: with a hash of all."""
    name = cfg.RUN_NAME
    if name == "auto":
        digest = hashlib.sha256((settings_hash(cfg) + pool.data.fingerprint()).encode())
        for fold in pool.folds:
            digest.update(b"".join(part.tobytes() for part in fold))
        source = "sample" if listed.synthetic else listed.root.name
        name = f"{source}-{cfg.MODEL_NAME}-{digest.hexdigest()[:8]}"
    name = re.sub(r"[^\w.-]+", "_", f"crossval-{name}")
    return make_run_folder(dataclasses.replace(cfg, RUN_NAME=name), listed)


def train_fold(cfg: EnhancedConfig, datasets: Datasets, folder: Path) -> Answers:
    """What a network trained as `cfg` says answers to the images it is judged by, calibrated."""
    model, result = train_model(cfg, datasets, folder)
    val, test = (answer(cfg, model, datasets[split], result.amp) for split in ("val", "test"))
    temperature = fit_temperature(val.labels, val.probabilities)
    return {
        "probabilities": calibrate(test, temperature).probabilities,
        "best_epoch": result.best_epoch,
        "val_accuracy": val.accuracy,
        "temperature": temperature,
        "seconds": result.seconds,
    }


def run_fold(
    cfg: EnhancedConfig, datasets: Datasets, folder: Path, baselines: Sequence[str]
) -> dict[str, Answers]:
    """The answers of our network and of each baseline; made where they are not in `folder` yet."""
    data = [dataset.fingerprint() for dataset in datasets.values()]
    key = "-".join([settings_hash(cfg), f"TTA={cfg.TTA}", *data])
    make = partial(train_fold, cfg, datasets, folder)
    found: dict[str, Answers] = {OURS: keep_result(folder / "answers.npz", key, make)}
    for name in baselines:
        found[name] = run_baseline(name, cfg, datasets, folder / "baselines")
    for checkpoints in list(folder.rglob("checkpoints")):
        shutil.rmtree(checkpoints)
    return found


def run_folds(
    cfg: EnhancedConfig, pool: Pool, folder: Path, baselines: Sequence[str]
) -> list[dict[str, Answers]]:
    """``run_fold`` of each fold of `pool`."""
    found = []
    for number, fold in enumerate(pool.folds, start=1):
        sizes = (
            f"{len(fold.train)} images, {len(fold.val)} choose the epoch, {len(fold.test)} judge"
        )
        print(f"--- fold {number} of {len(pool.folds)}: learning from {sizes}", flush=True)
        datasets = {name: choose_images(pool.data, part) for name, part in fold._asdict().items()}
        found.append(run_fold(cfg, datasets, folder / f"fold-{number}", baselines))
        right = found[-1][OURS]["probabilities"].argmax(1) == datasets["test"].split.labels
        print(f"fold {number}: accuracy {right.mean():.3f}", flush=True)
    return found


def pool_answers(
    folds: Sequence[Fold], answers: Sequence[Mapping[str, Answers]], name: str
) -> npt.NDArray[np.float64]:
    """The probabilities [N, C] that `name` gave every image when it was not learnt from."""
    order = np.concatenate([fold.test for fold in folds])
    pooled: npt.NDArray[np.float64] = np.concatenate([f[name]["probabilities"] for f in answers])
    return pooled[np.argsort(order)]


def fold_table(
    pool: Pool, answers: Sequence[Mapping[str, Answers]], measured: Sequence[Measured]
) -> pd.DataFrame:
    """A row a fold: its images and groups, its training, and its accuracies with intervals."""
    rows = []
    for number, (fold, found) in enumerate(zip(pool.folds, answers, strict=True)):
        row: dict[str, Any] = {"fold": number + 1}
        row |= {f"{name}_images": len(part) for name, part in fold._asdict().items()}
        row["test_groups"] = len(np.unique(pool.groups.numbers[fold.test]))
        row |= {key: np.asarray(found[OURS][key]).item()
                for key in ("best_epoch", "val_accuracy", "temperature", "seconds")}  # fmt: skip
        for name, metrics in measured[number].items():
            start, e = "" if name == OURS else f"{name}_", metrics["accuracy"]
            row |= {f"{start}accuracy": e.value, f"{start}accuracy_low": e.low,
                    f"{start}accuracy_high": e.high,
                    f"{start}macro_f1": metrics["macro_f1"].value}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def prediction_table(pool: Pool, pooled: Mapping[str, Any]) -> pd.DataFrame:
    """A row an image: where it stands, its group and fold, and what was answered."""
    data, names = pool.data, np.array(pool.data.classes, dtype=object)
    fold_of = np.empty(len(data), np.int64)
    for number, fold in enumerate(pool.folds, start=1):
        fold_of[fold.test] = number
    ours = pooled[OURS]
    table = pd.DataFrame({"path": list(data.split.files), "split": pool.splits, "fold": fold_of})
    if pool.groups.column:
        table["group"] = np.array(pool.groups.names, dtype=object)[pool.groups.numbers]
    table["label"], table["predicted"] = names[data.split.labels], names[ours.argmax(1)]
    table["confidence"] = ours.max(1)
    table[[f"p_{name}" for name in data.classes]] = ours
    for name, answered in pooled.items():
        if name != OURS:
            table[name] = names[answered.argmax(1)]
    return table


def measure_all(
    cfg: EnhancedConfig, pool: Pool, pooled: Mapping[str, Any], part: Any = slice(None)
) -> Measured:
    """The metrics of each network's pooled answers on `part` of the images."""
    labels, groups, classes = pool.data.split.labels, pool.groups.numbers, pool.data.classes
    how: dict[str, Any] = {"resamples": cfg.BOOTSTRAP, "seed": cfg.SEED}
    return {
        name: clustered_metrics(labels[part], found[part].argmax(1), groups[part], classes, **how)
        for name, found in pooled.items()
    }


def lead_over_each(
    cfg: EnhancedConfig, pool: Pool, pooled: Mapping[str, Any]
) -> dict[str, Estimate]:
    """Our accuracy less that of each baseline on the same images."""
    labels = pool.data.split.labels
    hits = {name: (found.argmax(1) == labels).astype(float) for name, found in pooled.items()}
    ours, how = hits.pop(OURS), {"resamples": cfg.BOOTSTRAP, "seed": cfg.SEED}
    numbers = pool.groups.numbers
    return {name: clustered_mean(ours - other, numbers, **how) for name, other in hits.items()}


def write_report(
    cfg: EnhancedConfig, listed: EmotionData, pool: Pool,
    answers: Sequence[Mapping[str, Answers]], folder: Path,
) -> None:  # fmt: skip
    """Measure the pooled answers; write and print what came out."""
    pooled = {name: pool_answers(pool.folds, answers, name) for name in answers[0]}
    metrics, lead = measure_all(cfg, pool, pooled), lead_over_each(cfg, pool, pooled)
    by_fold = [measure_all(cfg, pool, pooled, fold.test) for fold in pool.folds]
    table = fold_table(pool, answers, by_fold)
    write_text(folder / "folds.csv", table.to_csv(index=False, float_format="%.6f"))
    predictions = prediction_table(pool, pooled).to_csv(index=False, float_format="%.6f")
    write_text(folder / "predictions.csv", predictions)
    note, figures = figure_note(listed.synthetic, cfg.MODEL_NAME, cfg.DEBUG), folder / "figures"
    rows = {f"fold {n}": found[OURS] for n, found in enumerate(by_fold, start=1)}
    rows |= {f"all folds: {name}": found for name, found in metrics.items()}
    save_figure(plot_comparison(rows, {}), figures, "folds", note=note)
    labels, classes = pool.data.split.labels, pool.data.classes
    confusion = confusion_matrix(labels, pooled[OURS].argmax(1), labels=range(len(classes)))
    save_figure(plot_confusion(confusion, classes), figures, "confusion", note=note)
    figure_of = {
        name: {m: e.to_json() for m, e in found.items()} for name, found in metrics.items()
    }
    column, numbers = pool.groups.column, pool.groups.numbers
    write_summary(folder / "summary.json", {
        "dataset": listed.name, "synthetic": listed.synthetic, "debug": cfg.DEBUG,
        "model": cfg.MODEL_NAME, "classes": list(classes), "images": len(labels),
        "splits": list(dict.fromkeys(pool.splits)), "folds": len(pool.folds), "group": column,
        "groups": len(np.unique(numbers)) if column else None, "metrics": figure_of.pop(OURS),
        "baselines": figure_of, "lead_over": {name: e.to_json() for name, e in lead.items()},
        "fold_accuracies": table["accuracy"].tolist(), "settings": dataclasses.asdict(cfg),
        "versions": software_versions(),
    })  # fmt: skip
    print(closing_lines(pool, metrics, lead, table["accuracy"]))


def closing_lines(
    pool: Pool, metrics: Measured, lead: Mapping[str, Estimate], folds: "pd.Series[float]"
) -> str:
    """The result in a few lines."""
    used = " and ".join(f"{name}.csv" for name in dict.fromkeys(pool.splits))
    units, unseen = "", "it"
    if pool.groups.column:
        count = len(np.unique(pool.groups.numbers))
        units, unseen = f" in {pool.groups.in_words(count)}", "any of its group"
    lines = [f"{len(pool.data)} images of {used}{units}, each judged by a network that never saw "
             f"{unseen}:"]  # fmt: skip
    for name, found in metrics.items():
        scores = f"accuracy {found['accuracy']}, macro F1 {found['macro_f1']}"
        lines.append(f"{name.replace('_', ' ')}: {scores}")
    lines += [f"{OURS} less {name.replace('_', ' ')}: {e:+.3f}" for name, e in lead.items()]
    each = ", ".join(f"{accuracy:.3f}" for accuracy in folds)
    lines.append(f"accuracy of each fold: {each}; standard deviation {folds.std():.3f}")
    return "\n".join(lines)


def crossval(
    settings: dict[str, Any], folds: int, column: str | None, judged: Sequence[str],
    baselines: Sequence[str],
) -> Path:  # fmt: skip
    """Train and judge every fold that is not there yet; returns the folder that has it all."""
    if folds < 2:  # before anything is read
        raise ConfigError(f"--folds {folds}: give 2 or more")
    if settings.get("LR_BACKBONE") == "auto":  # would be chosen by images that are judged here
        raise ConfigError("LR_BACKBONE='auto' is not for crossval; give a number")
    cfg, listed = choose_settings(settings)
    pool = open_pool(cfg, listed, folds, column, judged)
    folder = fold_folder(cfg, listed, pool)
    print(folder, flush=True)
    write_report(cfg, listed, pool, run_folds(cfg, pool, folder, baselines), folder)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer crossval",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folds", type=int, default=5, help="parts of the pictures (default 5)")
    what = "keep pictures together that have the same value in this column of the CSV files"
    parser.add_argument("--group", metavar="COLUMN", help=what)
    what = "judge the pictures of test.csv, too; none are left then to test what is chosen by this"
    parser.add_argument("--test", action="store_true", help=what)
    what = "train these on the same folds (without a name: linear_probe)"
    parser.add_argument("--baselines", nargs="*", choices=COMPARED, metavar="NAME", help=what)
    add_settings(parser)
    args = parser.parse_args(arguments)
    baselines = ["linear_probe"] if args.baselines == [] else args.baselines or []
    judged = SPLITS if args.test else SPLITS[:2]
    print(crossval(settings_of(args), args.folds, args.group, judged, baselines))
    return 0
