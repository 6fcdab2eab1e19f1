"""Judge models on sets they were not trained on, and adapt them with few labels or none."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm.auto import tqdm

from emotion_toolbox.adaptation import adapt_statistics, draw_shots, probe_shots, usable_shots
from emotion_toolbox.adaptation_figures import (
    ADABN,
    IMAGENET,
    OWN,
    UNADAPTED,
    plot_matrix,
    plot_shots,
)
from emotion_toolbox.backbones import make_backbone
from emotion_toolbox.batches import EmotionDataset, open_datasets
from emotion_toolbox.device import choose_device
from emotion_toolbox.errors import ConfigError, DataError, WeightsUnavailable
from emotion_toolbox.export import ExportedModel, load_export
from emotion_toolbox.figures import save_figure
from emotion_toolbox.files import absolute, write_text
from emotion_toolbox.mapping import (
    ClassMap,
    Pair,
    in_words,
    map_classes,
    merge_probabilities,
    own_classes,
    parse_pairs,
)
from emotion_toolbox.measures import Estimate, apply_temperature, paired_test
from emotion_toolbox.paired import resample_mean
from emotion_toolbox.probes import extract_features, predict
from emotion_toolbox.report import figure_note, make_run_folder, software_versions, write_summary
from emotion_toolbox.subsets import choose_images
from emotion_toolbox.tables import EmotionData, load_splits
from emotion_transfer.commands.predict import find_export, network_of
from emotion_transfer.commands.train import add_settings, settings_of
from emotion_transfer.config import EnhancedConfig, make_config
from emotion_transfer.intervals import evaluate_predictions
from emotion_transfer.model import EmotionClassifier

Floats = npt.NDArray[np.float64]
Hits = npt.NDArray[np.bool_]
SHOTS = (1, 2, 5, 10, 20)
USED = (
    *("RUN_NAME", "OUTPUT_ROOT", "CACHE", "CACHE_DIR", "NUM_WORKERS", "MAX_BAD_FRACTION"),
    *("ALLOW_DUPLICATES", "DEVICE", "BATCH_SIZE", "WEIGHTS", "SEED", "BOOTSTRAP", "MONITOR"),
)  # of the settings; the others are the models'
Rows = list[dict[str, Any]]  # of a table; what is measured is an Estimate
EXAMPLE = """examples:
  python -m emotion_transfer transfer --model outputs/RUN_NAME --data data/processed/pictures
  python -m emotion_transfer transfer --model outputs/ONE outputs/TWO --data data/one data/two
  python -m emotion_transfer transfer --model outputs/RUN_NAME --data data/processed/pictures \\
      --map joy=positive,contentment=positive,fear=negative --shots 1 5 25 --seeds 10

Classes are alike by name; where two sets share none, by polarity, as far as it is known; or as
--map says, CLASS=CLASS, one of a model and one of the data, as many pairs as you like. Only test
images are judged; AdaBN and the labelled images of a class come from the training images."""


@dataclass(frozen=True)
class Source:
    """A trained model, by a name of its own."""

    name: str
    folder: Path
    exported: ExportedModel
    network: EmotionClassifier  # that of `exported`


@dataclass(frozen=True)
class Task:
    """A model and a set that it is judged on; `shared` None: they do not share two classes."""

    source: Source
    target: str
    data: EmotionData
    shared: ClassMap | None

    @property
    def judged(self) -> ClassMap:
        """The classes by which answers count: those shared, or where there are none the set's."""
        return self.shared or own_classes(self.data.classes)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where that is not enough to tell them apart."""
    names = [path.parent.name if path.name == "export" else path.name for path in paths]
    return [n if names.count(n) == 1 else str(p) for n, p in zip(names, paths, strict=True)]


def load_sources(folders: Sequence[Path], device: str) -> list[Source]:
    """The models in `folders`; raises ``ExportError`` where there is none."""
    found = [find_export(absolute(folder)) for folder in dict.fromkeys(folders)]
    sources = []
    for name, folder in zip(distinct_names(found), found, strict=True):
        exported = load_export(folder, network_of, device)
        assert isinstance(exported.model, EmotionClassifier)  # network_of makes nothing else
        sources.append(Source(name, folder, exported, exported.model))
    return sources


def make_tasks(
    sources: Sequence[Source], sets: Mapping[str, EmotionData], pairs: Sequence[Pair]
) -> list[Task]:
    """Every model on every set; says where the two share no class, and how to map some."""
    tasks = []
    for source in sources:
        for name, data in sets.items():
            shared = map_classes(source.exported.classes, data.classes, pairs)
            tasks.append(Task(source, name, data, shared))
            if shared is None:
                theirs = {source.name: source.exported.classes, name: data.classes}
                print(
                    f"{source.name} and {name} do not share two classes ({in_words(theirs)}); say "
                    f"what is alike: --map {source.exported.classes[0]}={data.classes[0]},..."
                )
    return tasks


# --- what a model answers -----------------------------------------------------------------------


def answer(task: Task, network: EmotionClassifier, images: EmotionDataset, batch: int) -> Floats:
    """Probabilities [N, J] of the shared classes for `images`, as the export answers."""
    assert task.shared is not None
    about = task.source.exported
    blank = dataclasses.replace(images.split, labels=np.zeros(len(images), np.int64))
    unlabelled = EmotionDataset(blank, images.classes, images.pixels, images.digest)
    found = predict(network, unlabelled, size=about.image_size, batch_size=batch, tta=about.tta)
    calibrated = apply_temperature(found.probabilities, about.temperature)
    return merge_probabilities(calibrated, task.shared.source, len(task.shared.names))


def judge_model(
    cfg: EnhancedConfig, task: Task, train: EmotionDataset, images: EmotionDataset
) -> tuple[Rows, dict[str, Hits]]:
    """Rows of the matrix, unadapted and with AdaBN, and which of `images` each gets right."""
    if task.shared is None:
        return [], {}
    about, names = task.source.exported, task.shared.names
    asked = about.spec, about.image_size
    networks = {
        UNADAPTED: task.source.network,
        ADABN: adapt_statistics(task.source.network, train, *asked),
    }
    labels = task.shared.target[images.split.labels]
    rows, predicted = [], {}
    for how, network in networks.items():
        found = answer(task, network, images, cfg.BATCH_SIZE)
        draws: dict[str, Any] = {"resamples": cfg.BOOTSTRAP, "seed": cfg.SEED}
        metrics = evaluate_predictions(labels, found, names, **draws)
        predicted[how] = found.argmax(1)
        gain = paired_test(labels, predicted[how], predicted[UNADAPTED], **draws).difference
        rows.append({
            "source": task.source.name, "target": task.target, "adaptation": how,
            "classes_by": task.shared.how, "classes": list(names), "images": len(labels),
            "accuracy": metrics["accuracy"], "macro_f1": metrics["macro_f1"], "gain": gain,
        })  # fmt: skip
    return rows, {how: answers == labels for how, answers in predicted.items()}


# --- a few labelled images ----------------------------------------------------------------------


def shot_networks(cfg: EnhancedConfig, source: Source) -> Iterator[tuple[str, Any]]:
    """The frozen backbones that are compared: the model's own, and that of ImageNet."""
    yield OWN, source.network.backbone
    torch.manual_seed(cfg.SEED)  # for WEIGHTS=None
    try:
        backbone = make_backbone(source.network.name, cfg.WEIGHTS)
    except WeightsUnavailable as error:
        print(f"without {IMAGENET}: {error}")
        return
    yield IMAGENET, backbone.to(choose_device(cfg.DEVICE)).eval()


def run_shots(
    cfg: EnhancedConfig, task: Task, train: EmotionDataset, images: EmotionDataset,
    shots: Sequence[int], seeds: int,
) -> dict[tuple[str, int], Hits]:  # fmt: skip
    """Which of `images` a probe gets right, [seeds, N], by features and images a class.

    A seed draws the same training images for all features, and of those for fewer a class more.
    """
    about, labels, judged = task.source.exported, train.split.labels, task.judged
    draws = [draw_shots(labels, max(shots), seed) for seed in range(cfg.SEED, cfg.SEED + seeds)]
    used = np.unique(draws)  # of a large set only what is drawn is looked at
    drawn = choose_images(train, used)
    truth, hits = judged.target[images.split.labels], {}
    asked = task.source.network.spec, about.image_size, cfg.BATCH_SIZE
    for name, backbone in shot_networks(cfg, task.source):
        known, unknown = (extract_features(backbone, part, *asked) for part in (drawn, images))
        bar = tqdm(shots, f"{task.target}: {name}", unit="k", leave=False)
        for k in bar:
            right = []
            for draw in draws:
                chosen = np.searchsorted(used, draw[:, :k])
                p = probe_shots(known, drawn.split.labels, chosen, unknown, cfg.MONITOR)
                merged = merge_probabilities(p, judged.target, len(judged.names))
                right.append(merged.argmax(1) == truth)
            hits[name, k] = np.stack(right)
    return hits


def curve_points(
    task: Task, hits: Mapping[tuple[str, int], Hits], whole: Mapping[str, Hits]
) -> Rows:
    """Rows of the curves: accuracies, and differences on the same draws and images.

    Intervals are over images and seeds (``resample_mean``).
    """
    rows: Rows = []
    for (name, k), right in hits.items():
        values = {name: right.astype(float)}
        if name == OWN:
            others = {UNADAPTED: whole.get(UNADAPTED), IMAGENET: hits.get((IMAGENET, k))}
            for other, theirs in others.items():
                if theirs is not None:
                    values[f"{OWN} less {other}"] = right.astype(float) - theirs
        for what, value in values.items():
            rows.append({
                "source": task.source.name, "target": task.target, "what": what, "k": k,
                "seeds": value.shape[0], "images": value.shape[1],
                "classes": list(task.judged.names), "accuracy": resample_mean(value),
            })  # fmt: skip
    return rows


def open_task(cfg: EnhancedConfig, task: Task) -> tuple[EmotionDataset, EmotionDataset]:
    """The training images of a task's set, and the test images that count, as its model sees them.

    Raises ``DataError`` where no test image counts, and what ``open_datasets`` does.
    """
    about = task.source.exported
    datasets = open_datasets(
        task.data, about.resize, about.fit, cache_dir=cfg.CACHE_DIR if cfg.CACHE else None,
        threads=cfg.NUM_WORKERS, max_bad_fraction=cfg.MAX_BAD_FRACTION,
        allow_duplicates=cfg.ALLOW_DUPLICATES,
    )[1]  # fmt: skip
    test = datasets["test"]
    counted = np.flatnonzero(task.judged.target[test.split.labels] >= 0)
    if not len(counted):
        names = ", ".join(task.judged.names)
        raise DataError(
            f"{test.split.csv} has no image of {names}, which is what {task.source.name} shares "
            "with it; add some, or map other classes with --map"
        )
    return datasets["train"], choose_images(test, counted)


def run_task(
    cfg: EnhancedConfig, task: Task, train: EmotionDataset, images: EmotionDataset,
    shots: Sequence[int], seeds: int,
) -> tuple[Rows, Rows]:  # fmt: skip
    """Rows of the matrix and of the curves, from `train` images and `images` to judge by."""
    cells, whole = judge_model(cfg, task, train, images)
    usable = usable_shots(shots, train.split.labels)
    if len(usable) < len(set(shots)):
        fewest = np.bincount(train.split.labels).min()
        print(f"{task.target}: a class has {fewest} training images; more cannot be drawn")
    hits = run_shots(cfg, task, train, images, usable, seeds) if usable else {}
    return cells, curve_points(task, hits, whole)


# --- what is written ----------------------------------------------------------------------------


def flat_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`rows` with an estimate as three columns, its value and the ends of its interval."""
    flat = []
    for row in rows:
        new: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, Estimate):
                new |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                new[name] = " | ".join(value) if isinstance(value, list) else value
        flat.append(new)
    return pd.DataFrame(flat)


def result_folder(cfg: EnhancedConfig, tasks: Sequence[Task], asked: str) -> Path:
    """Create and return the folder of these results, transfer-RUN_NAME; auto: with a hash."""
    name = cfg.RUN_NAME
    if name == "auto":
        parts = [f"{task.source.folder} {task.data.root} {task.judged.names}" for task in tasks]
        digest = hashlib.sha256(repr((parts, asked)).encode(errors="surrogateescape"))
        name = digest.hexdigest()[:8]
    return make_run_folder(dataclasses.replace(cfg, RUN_NAME=f"transfer-{name}"), tasks[0].data)


def write_results(
    cfg: EnhancedConfig, tasks: Sequence[Task], cells: Rows, points: Rows, folder: Path
) -> None:
    """Write tables, pictures and all figures as JSON; print the tables."""
    synthetic = any(task.data.synthetic or task.source.exported.synthetic for task in tasks)
    model = ", ".join(dict.fromkeys(task.source.network.name for task in tasks))
    note, figures = figure_note(synthetic, model, False), folder / "figures"
    models = {t.source.name: list(t.source.exported.classes) for t in tasks}
    data = {t.target: list(t.data.classes) for t in tasks}
    if cells:
        save_figure(plot_matrix(cells, [*models], [*data]), figures, "matrix", note=note)
        write_text(folder / "matrix.csv", flat_table(cells).to_csv(index=False))
    if points:
        save_figure(plot_shots(points, cells), figures, "curves", note=note)
        write_text(folder / "curves.csv", flat_table(points).to_csv(index=False))
    rows: dict[str, Any] = {"matrix": cells, "curves": points}
    plain = json.loads(json.dumps(rows, default=lambda estimate: estimate.to_json()))
    write_summary(folder / "transfer.json", {
        "models": models, "data": data, "synthetic": synthetic, **plain,
        "settings": {"SEED": cfg.SEED, "BOOTSTRAP": cfg.BOOTSTRAP, "MONITOR": cfg.MONITOR,
                     "WEIGHTS": cfg.WEIGHTS}, "versions": software_versions(),
    })  # fmt: skip
    print_tables(cells, points)


def print_tables(cells: Rows, points: Rows) -> None:
    """The matrix, a line a model and set; and the curves, a line a number of labelled images."""
    if cells:
        print(pd.DataFrame(cells).drop(columns="classes").to_string(index=False))
    if points:
        keys = ["source", "target", "images", "seeds", "k"]
        table = pd.DataFrame(points).set_index([*keys, "what"])["accuracy"].map(str)
        print(table.unstack("what", fill_value="").reset_index().to_string(index=False))


def transfer(
    settings: Mapping[str, Any], models: Sequence[Path], roots: Sequence[Path],
    alike: Sequence[str], shots: Sequence[int], seeds: int,
) -> Path:  # fmt: skip
    """Judge every model on every set and adapt it; returns the folder with the results."""
    cfg = make_config(settings)
    if others := [name for name in settings if name not in USED]:
        raise ConfigError(f"{others[0]} changes nothing here; --set can change {', '.join(USED)}")
    sources = load_sources(models, cfg.DEVICE)
    folders = [absolute(root) for root in dict.fromkeys(roots)]
    sets = dict(zip(distinct_names(folders), map(load_splits, folders), strict=True))
    known = {source.name: source.exported.classes for source in sources}
    known |= {f"the set {name}": data.classes for name, data in sets.items()}
    tasks = make_tasks(sources, sets, parse_pairs(alike, known))
    if not shots and not any(task.shared for task in tasks):
        raise ConfigError("no model shares classes with a set, and --shots is empty; see above")
    opened = [open_task(cfg, task) for task in tasks]  # what cannot be used shows at once
    cells, points = Rows(), Rows()
    for number, (task, images) in enumerate(zip(tasks, opened, strict=True), start=1):
        print(f"--- {number} of {len(tasks)}: {task.source.name} on {task.target}", flush=True)
        found = run_task(cfg, task, *images, shots, seeds)
        cells += found[0]
        points += found[1]
    folder = result_folder(cfg, tasks, f"{sorted(shots)} {seeds} {cfg.SEED}")
    write_results(cfg, tasks, cells, points, folder)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and judge."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer transfer",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    add = parser.add_argument
    what = "exports, or runs that have one"
    add("--model", **several, type=Path, required=True, metavar="FOLDER", help=what)
    what = "folders with train.csv, val.csv and test.csv"
    add("--data", **several, type=Path, required=True, metavar="DATA_ROOT", help=what)
    add("--map", **several, default=[], metavar="A=B,C=D", help="classes that are alike")
    what = f"labelled images a class (default {' '.join(map(str, SHOTS))}; without a number: none)"
    add("--shots", nargs="*", type=int, default=list(SHOTS), metavar="K", help=what)
    add("--seeds", type=int, default=5, help="draws of these images, from SEED on (default 5)")
    add_settings(parser)
    args = parser.parse_args(arguments)
    if args.seeds < 1 or min(args.shots, default=1) < 1:
        raise ConfigError("--shots and --seeds: give 1 or more")
    asked = args.model, args.data, args.map, args.shots, args.seeds
    print(transfer(settings_of(args), *asked))
    return 0
