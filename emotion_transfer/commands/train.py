"""Train without the notebook: the same functions as its cells, in the same order, no pictures."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from emotion_toolbox.backbones import choose_backbone
from emotion_toolbox.batches import EmotionDataset, open_datasets
from emotion_toolbox.cache import DecodedData
from emotion_toolbox.device import choose_device, seed_everything
from emotion_toolbox.errors import ConfigError
from emotion_toolbox.export import export_model
from emotion_toolbox.keeper import FitResult, OnEpoch, load_initial_weights
from emotion_toolbox.measures import Predictions, calibrate, fit_temperature, paired_test
from emotion_toolbox.probes import predict
from emotion_toolbox.report import (
    closing_text,
    comparison_table,
    make_run_folder,
    summarise_run,
    write_predictions,
    write_summary,
)
from emotion_toolbox.sample import load_data
from emotion_toolbox.tables import EmotionData
from emotion_toolbox.tracking import (
    TRACKERS,
    MakeTracker,
    epoch_recorder,
    final_metrics,
    find_tracker,
)
from emotion_transfer.baselines import run_baseline
from emotion_transfer.commands.attribute_heads import (
    WEIGHT,
    add_attribute_options,
    add_attributes,
    attributes_of,
    fit_model,
)
from emotion_transfer.commands.distributed import (
    check_share,
    engine_parts,
    in_turn,
    joined,
    rank,
)
from emotion_transfer.commands.settings import parse_setting
from emotion_transfer.config import EnhancedConfig, cache_size, make_config, profile_for
from emotion_transfer.engine import Augment
from emotion_transfer.intervals import evaluate_predictions
from emotion_transfer.model import EmotionClassifier, build_model, find_probe


def open_data(
    cfg: EnhancedConfig, listed: EmotionData
) -> tuple[DecodedData, dict[str, EmotionDataset]]:
    """The datasets as `cfg` asks for them."""
    return open_datasets(
        listed, cache_size(cfg), cfg.FIT, cache_dir=cfg.CACHE_DIR if cfg.CACHE else None,
        threads=cfg.NUM_WORKERS, max_bad_fraction=cfg.MAX_BAD_FRACTION,
        allow_duplicates=cfg.ALLOW_DUPLICATES, most=2 * cfg.BATCH_SIZE if cfg.DEBUG else None,
    )  # fmt: skip


def choose_settings(settings: dict[str, Any]) -> tuple[EnhancedConfig, EmotionData]:
    """The whole configuration of a run, and the data on which a part of it depends.

    ``LR_BACKBONE="auto"`` becomes what short runs prefer.
    """
    if settings.get("LR_BACKBONE") == "auto":
        from emotion_transfer.commands.lr import choose_rate  # which trains as this module does

        settings = {**settings, "LR_BACKBONE": choose_rate(settings)}
    cfg = make_config(settings)
    choose_device(cfg.DEVICE)  # one that is not there should not cost a pass over the images
    listed = load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT)
    images = len(listed.splits["train"])
    profile = profile_for(images, cfg.IMG_SIZE, synthetic=listed.synthetic)
    cfg = make_config(settings, profile)
    check_share(cfg.BATCH_SIZE, cfg.ACCUMULATE)
    network, weights = choose_backbone(cfg.MODEL_NAME, cfg.WEIGHTS, synthetic=listed.synthetic)
    return dataclasses.replace(cfg, MODEL_NAME=network, WEIGHTS=weights), listed


def make_model(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], run_dir: Path
) -> EmotionClassifier:
    """The model as training in `run_dir` begins."""
    classes = datasets["train"].classes
    folder = run_dir / "baselines" / "linear_probe"
    probe = find_probe(cfg, datasets, folder) if cfg.START == "probe" else None
    model = build_model(cfg, len(classes), probe)
    load_initial_weights(model, cfg.INIT_FROM, classes, run_dir)
    return model


def train_model(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], run_dir: Path,
    augment: Augment | None = None, on_epoch: OnEpoch | None = None,
) -> tuple[EmotionClassifier, FitResult]:  # fmt: skip
    """The model with its best weights, trained or taken up again in `run_dir`."""
    seed_everything(cfg.SEED)
    model = in_turn(partial(make_model, cfg, datasets, run_dir))
    folder, parts = run_dir / "checkpoints", engine_parts(on_epoch)
    return model, fit_model(cfg, model, datasets, folder, augment, parts)


def answer(
    cfg: EnhancedConfig, model: EmotionClassifier, data: EmotionDataset, amp: str
) -> Predictions:
    """What the trained `model` answers to `data`."""
    size, tta = cfg.IMG_SIZE, cfg.TTA
    return predict(model, data, size=size, batch_size=cfg.BATCH_SIZE, amp=amp, tta=tta)


def train(
    settings: dict[str, Any], attributes: Sequence[str] = (), weight: float = WEIGHT,
    make_tracker: MakeTracker | None = None,
) -> Path:  # fmt: skip
    """Train, evaluate, compare and export as `settings` say; returns the run's folder.

    With heads for `attributes`, whose loss has this `weight`; only training knows of them. With
    `make_tracker`, the run is recorded there too.
    """
    with joined(settings.get("DEVICE", "auto")):
        cfg, listed = in_turn(partial(choose_settings, settings))
        whole = in_turn(partial(add_attributes, cfg, attributes, weight, listed))
        run_dir = make_run_folder(whole, listed)
        print(run_dir, flush=True)
        decoded, datasets = in_turn(partial(open_data, cfg, listed))
        data, classes, recorded = decoded.data, decoded.data.classes, dataclasses.asdict(cfg)
        tracker = make_tracker(run_dir, recorded) if make_tracker and not rank() else None
        on_epoch = epoch_recorder(tracker, datasets["val"]) if tracker else None
        model, result = train_model(whole, datasets, run_dir, on_epoch=on_epoch)
        if rank():
            return run_dir  # the first process does the rest alone
    found = {split: answer(cfg, model, datasets[split], result.amp) for split in ("val", "test")}
    temperature = fit_temperature(found["val"].labels, found["val"].probabilities)
    calibrated = {split: calibrate(p, temperature) for split, p in found.items()}
    measure = partial(evaluate_predictions, resamples=cfg.BOOTSTRAP, seed=cfg.SEED)
    raw, metrics = (
        {split: measure(p.labels, p.probabilities, classes) for split, p in ps.items()}
        for ps in (found, calibrated)
    )
    test = calibrated["test"]
    write_predictions(run_dir / "predictions_test.csv", datasets["test"], test)
    compared, tests = {}, {}
    for name in cfg.BASELINES:
        p = run_baseline(name, cfg, datasets, run_dir / "baselines")["probabilities"]
        compared[name] = measure(test.labels, p, classes)
        answers = test.labels, test.predicted, p.argmax(1)
        tests[name] = paired_test(*answers, resamples=cfg.BOOTSTRAP, seed=cfg.SEED)
    compared["this notebook"] = metrics["test"]
    summary = summarise_run(
        recorded, data, datasets, result, metrics | compared, tests, temperature, raw
    )
    write_summary(run_dir / "summary.json", summary)
    export_model(run_dir / "export", model, classes, recorded, cache_size(cfg), summary)
    if tracker:
        tracker.log_end(summary["epochs"], recorded, final_metrics(summary))
    print(comparison_table(compared, tests).to_string())
    print(closing_text(summary, run_dir))
    return run_dir


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give a command the option ``--set``."""
    meaning = "settings of this run; `python -m emotion_transfer settings` lists them"
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=meaning
    )
    file = "a JSON file of settings, as a search leaves its best; --set wins over it"
    parser.add_argument("--config", type=Path, metavar="FILE", help=file)


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a JSON file; raises ``ConfigError`` where it holds no possible ones."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(settings, dict):
            raise ValueError("no object")
        make_config(settings)
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        needed = 'give a file of {"NAME": value, ...}, such as the best.json of a search'
        raise ConfigError(f"--config {file}: {needed} ({error})") from error
    return settings


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that ``--config`` and ``--set`` gave."""
    kept = {} if args.config is None else read_settings(args.config)
    return kept | dict(parse_setting(EnhancedConfig, text) for text in args.set)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer train",
        description=__doc__,
        epilog="example: python -m emotion_transfer train --set DATA_ROOT=data/processed/pictures "
        "EPOCHS=20. The same settings resume the same run.",
    )
    add_settings(parser)
    add_attribute_options(parser)
    kinds = "keep a record for TensorBoard or MLflow too, with each epoch's confusion matrix"
    parser.add_argument("--logger", choices=tuple(TRACKERS), help=kinds)
    args = parser.parse_args(arguments)
    make_tracker = find_tracker(args.logger) if args.logger else None
    train(settings_of(args), *attributes_of(args), make_tracker)
    return 0
