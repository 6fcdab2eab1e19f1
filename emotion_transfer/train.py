"""Train without the notebook: ``python -m emotion_transfer.train --set NAME=VALUE ...``.

The same functions in the same order as the notebook's cells, without its pictures.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from emotion_transfer.baselines import compare_models, run_baseline
from emotion_transfer.cache import check_images
from emotion_transfer.checkpoint import CheckpointError
from emotion_transfer.config import ConfigError, EnhancedConfig, make_config, parse_setting
from emotion_transfer.data import QUICK_PROFILE, DataError, load_data, uses_sample
from emotion_transfer.engine import fit
from emotion_transfer.evaluation import predict, prediction_table, write_predictions
from emotion_transfer.export import export_model
from emotion_transfer.loader import make_datasets
from emotion_transfer.metrics import evaluate_predictions
from emotion_transfer.model import WeightsError, build_model, choose_backbone, load_initial_weights
from emotion_transfer.precision import choose_device
from emotion_transfer.report import closing_text, summarise_run, write_summary
from emotion_transfer.runs import make_run_folder
from emotion_transfer.seeding import seed_everything

NAMED_ERRORS = (
    ConfigError, DataError, WeightsError, CheckpointError, FloatingPointError, MemoryError,
)  # fmt: skip


def settings_from(arguments: list[str]) -> EnhancedConfig:
    """The configuration for ``NAME=VALUE`` arguments; raises ``ConfigError``."""
    overrides: dict[str, Any] = dict(map(parse_setting, arguments))
    cfg = make_config(overrides)
    return make_config(overrides, QUICK_PROFILE) if uses_sample(cfg) else cfg


def train(cfg: EnhancedConfig) -> Path:
    """Train, evaluate, compare and export as `cfg` says, and return the run's folder."""
    choose_device(cfg)  # a device that is not there should not cost a pass over the images
    data = load_data(cfg)
    run_dir = make_run_folder(cfg, data)
    print(run_dir)
    checked = check_images(cfg, data)
    data, classes = checked.data, checked.data.classes
    seed_everything(cfg.SEED)
    datasets = make_datasets(cfg, checked)
    cfg = choose_backbone(cfg, synthetic=data.synthetic, run_dir=run_dir)
    model = load_initial_weights(cfg, build_model(cfg, len(classes)), classes, run_dir)
    result = fit(cfg, model, datasets, run_dir / "checkpoints")
    found = {name: predict(cfg, model, datasets[name], amp=result.amp) for name in ("val", "test")}
    metrics = {
        name: evaluate_predictions(
            p.labels, p.probabilities, classes, resamples=cfg.BOOTSTRAP, seed=cfg.SEED
        )
        for name, p in found.items()
    }
    table = prediction_table(datasets["test"], found["test"])
    write_predictions(run_dir / "predictions_test.csv", table)
    baselines = [run_baseline(name, cfg, datasets, run_dir / "baselines") for name in cfg.BASELINES]
    comparison = compare_models(cfg, found["test"], baselines, classes)
    summary = summarise_run(cfg, data, result, metrics, comparison)
    write_summary(run_dir / "summary.json", summary)
    export_model(run_dir / "export", cfg, model, classes, summary)
    print(comparison.table().to_string())
    print(closing_text(summary, run_dir))
    return run_dir


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and train; 1 with one message where it cannot go on."""
    parser = argparse.ArgumentParser(prog="python -m emotion_transfer.train", description=__doc__)
    settings = "fields of EnhancedConfig, e.g. --set MODEL_NAME=efficientnet_b0 EPOCHS=10"
    add = parser.add_argument
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=settings)
    args = parser.parse_args(arguments)
    try:
        train(settings_from(args.set))
    except (*NAMED_ERRORS, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(stopped or "stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
