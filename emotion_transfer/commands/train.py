"""Train without the notebook: the same functions as its cells, in the same order, no pictures."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emotion_toolbox.backbones import choose_backbone
from emotion_toolbox.batches import EmotionDataset, open_datasets
from emotion_toolbox.cache import DecodedData
from emotion_toolbox.device import choose_device, seed_everything
from emotion_toolbox.export import export_model
from emotion_toolbox.keeper import FitResult, load_initial_weights
from emotion_toolbox.measures import Predictions
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
from emotion_transfer.baselines import run_baseline
from emotion_transfer.commands.settings import parse_setting
from emotion_transfer.config import QUICK_PROFILE, EnhancedConfig, cache_size, make_config
from emotion_transfer.engine import fit
from emotion_transfer.evaluation import predict
from emotion_transfer.intervals import evaluate_predictions, paired_test
from emotion_transfer.model import EmotionClassifier, build_model


def open_data(
    cfg: EnhancedConfig, listed: EmotionData
) -> tuple[DecodedData, dict[str, EmotionDataset]]:
    """The datasets as `cfg` asks for them."""
    return open_datasets(
        listed, cache_size(cfg), cache_dir=cfg.CACHE_DIR if cfg.CACHE else None,
        threads=cfg.NUM_WORKERS, max_bad_fraction=cfg.MAX_BAD_FRACTION,
        allow_duplicates=cfg.ALLOW_DUPLICATES, most=2 * cfg.BATCH_SIZE if cfg.DEBUG else None,
    )  # fmt: skip


def choose_settings(settings: dict[str, Any]) -> tuple[EnhancedConfig, EmotionData]:
    """The whole configuration of a run, and the data on which a part of it depends."""
    cfg = make_config(settings)
    choose_device(cfg.DEVICE)  # one that is not there should not cost a pass over the images
    listed = load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT)
    if listed.synthetic:
        cfg = make_config(settings, QUICK_PROFILE)
    network, weights = choose_backbone(cfg.MODEL_NAME, cfg.WEIGHTS, synthetic=listed.synthetic)
    return dataclasses.replace(cfg, MODEL_NAME=network, WEIGHTS=weights), listed


def train_model(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], run_dir: Path
) -> tuple[EmotionClassifier, FitResult]:
    """The model with its best weights, trained or taken up again in `run_dir`."""
    seed_everything(cfg.SEED)
    classes = datasets["train"].classes
    model = build_model(cfg, len(classes))
    load_initial_weights(model, cfg.INIT_FROM, classes, run_dir)
    return model, fit(cfg, model, datasets, run_dir / "checkpoints")


def answer(
    cfg: EnhancedConfig, model: EmotionClassifier, data: EmotionDataset, amp: str
) -> Predictions:
    """What the trained `model` answers to `data`."""
    return predict(model, data, size=cfg.IMG_SIZE, batch_size=cfg.BATCH_SIZE, amp=amp)


def train(settings: dict[str, Any]) -> Path:
    """Train, evaluate, compare and export as `settings` say; returns the run's folder."""
    cfg, listed = choose_settings(settings)
    run_dir = make_run_folder(cfg, listed)
    print(run_dir, flush=True)
    decoded, datasets = open_data(cfg, listed)
    data, classes = decoded.data, decoded.data.classes
    model, result = train_model(cfg, datasets, run_dir)
    found = {split: answer(cfg, model, datasets[split], result.amp) for split in ("val", "test")}
    drawn: dict[str, Any] = {"resamples": cfg.BOOTSTRAP, "seed": cfg.SEED}
    metrics = {
        split: evaluate_predictions(p.labels, p.probabilities, classes, **drawn)
        for split, p in found.items()
    }
    test = found["test"]
    write_predictions(run_dir / "predictions_test.csv", datasets["test"], test)
    compared, tests = {}, {}
    for name in cfg.BASELINES:
        p = run_baseline(name, cfg, datasets, run_dir / "baselines")["probabilities"]
        compared[name] = evaluate_predictions(test.labels, p, classes, **drawn)
        tests[name] = paired_test(test.labels, test.predicted, p.argmax(1), **drawn)
    compared["this notebook"] = metrics["test"]
    recorded = dataclasses.asdict(cfg)
    summary = summarise_run(recorded, data, datasets, result, metrics | compared, tests)
    write_summary(run_dir / "summary.json", summary)
    export_model(run_dir / "export", model, classes, recorded, cache_size(cfg), summary)
    print(comparison_table(compared, tests).to_string())
    print(closing_text(summary, run_dir))
    return run_dir


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer train",
        description=__doc__,
        epilog="example: python -m emotion_transfer train --set DATA_ROOT=data/processed/pictures "
        "EPOCHS=20. The same settings resume the same run.",
    )
    meaning = "settings of this run; `python -m emotion_transfer settings` lists them"
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=meaning
    )
    args = parser.parse_args(arguments)
    train(dict(parse_setting(EnhancedConfig, text) for text in args.set))
    return 0
