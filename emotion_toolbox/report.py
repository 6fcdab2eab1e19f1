"""The run in numbers and in words: its folder, summary.json, predictions as CSV, a closing text."""

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.errors import ConfigError
from emotion_toolbox.files import resolve_path, write_text
from emotion_toolbox.keeper import FitResult
from emotion_toolbox.measures import TEMPERATURES, Estimate, Predictions
from emotion_toolbox.settings import settings_hash
from emotion_toolbox.tables import MIKELS_CLASSES, EmotionData

VERSIONS = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn", "pillow")
# test accuracy on EmoSet-8, by others: Yang et al., ICCV 2023, tables 3 to 5, unless noted
PUBLISHED_EMOSET = {
    "AlexNet": 0.6780, "VGG-16": 0.7227, "DenseNet-121": 0.7232, "ResNet-50": 0.7404,
    "MDAN": 0.7575, "WSCNet": 0.7632, "PDANet": 0.7695, "StyleNet": 0.7711, "Stimuli-aware": 0.7840,
    "ResNet-50, SGD (To Err Like Human 2024; split not stated)": 0.763,
    "ResNet-101, SGD (To Err Like Human 2024; split not stated)": 0.769,
    "ResNet50 (EmotionSpaces; on validation)": 0.7674,
    "ViT-B/16 (EmotionSpaces; on validation)": 0.7820,
}  # fmt: skip


def make_run_folder(settings: Any, data: EmotionData) -> Path:
    """Create and return the folder of the run with these `settings`.

    Its name is ``RUN_NAME``, or that of data and network with a hash of the settings and of the
    data's names and labels. Raises ``ConfigError`` if it cannot be written.
    """
    name, root = settings.RUN_NAME, settings.OUTPUT_ROOT
    if name == "auto":
        facts = [settings_hash(settings), *(split.fingerprint() for split in data.splits.values())]
        digest = hashlib.sha256("".join(facts).encode()).hexdigest()[:8]
        source = "sample" if data.synthetic else data.root.name
        name = re.sub(r"[^\w.-]+", "_", f"{source}-{settings.MODEL_NAME}-{digest}")
    folder: Path = resolve_path(root) / name
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_ROOT={root!r}: {folder} cannot be written ({error}); choose another folder"
        ) from error
    return folder


def figure_note(synthetic: bool, model: str, debug: bool) -> str:
    """What every figure of the run must say of itself; "" where there is nothing to beware of."""
    marks = ["DEBUG"] * debug + [f"SYNTHETIC SAMPLE, {model}"] * synthetic
    return " | ".join(marks)


def write_predictions(path: Path, dataset: EmotionDataset, predictions: Predictions) -> None:
    """Write a CSV with a row an image: path, label, predicted, confidence, p_<class> of each."""
    names, probabilities = np.array(dataset.classes, dtype=object), predictions.probabilities
    table = pd.DataFrame({"path": list(dataset.split.files), "label": names[predictions.labels]})
    table["predicted"], table["confidence"] = names[predictions.predicted], probabilities.max(1)
    table[[f"p_{name}" for name in dataset.classes]] = probabilities
    write_text(path, table.to_csv(index=False, float_format="%.6f"))


def comparison_table(
    metrics: Mapping[str, Mapping[str, Estimate]], tests: Mapping[str, Any]
) -> pd.DataFrame:
    """One row a model: intervals, and from ``PairedTest`` the difference from ours."""
    rows = {}
    for name, found in metrics.items():
        row = {"accuracy": f"{found['accuracy']:.3f}", "macro F1": f"{found['macro_f1']:.3f}"}
        if name in tests:
            row["ours is better by"] = f"{tests[name].difference:+.3f}"
            row["p (McNemar)"] = f"{tests[name].p_value:.2g}"
        rows[name.replace("_", " ")] = row
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("model")


def published_accuracies(classes: Sequence[str], *, synthetic: bool) -> dict[str, float]:
    """Published EmoSet-8 accuracies, where the data are EmoSet's."""
    return {} if synthetic or set(classes) != set(MIKELS_CLASSES) else PUBLISHED_EMOSET


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: version(name) for name in VERSIONS}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def summarise_run(
    settings: Mapping[str, Any], data: EmotionData, datasets: Mapping[str, EmotionDataset],
    result: FitResult, metrics: Mapping[str, Mapping[str, Estimate]], tests: Mapping[str, Any],
    temperature: float, uncalibrated: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, Any]:  # fmt: skip
    """The run's figures, ready for JSON; `metrics` of "val", "test" and each baseline.

    `uncalibrated` are those of the two splits without the `temperature`.
    """
    before = {s: {m: e[m].to_json() for m in ("ece", "nll")} for s, e in uncalibrated.items()}
    gaps = dict(zip(result.history["epoch"], result.history["gap"], strict=True))
    figures = {name: {m: e.to_json() for m, e in found.items()} for name, found in metrics.items()}
    return {
        "dataset": data.name,
        "synthetic": data.synthetic,
        "debug": settings["DEBUG"],
        "model": settings["MODEL_NAME"],
        "weights": Path(settings["INIT_FROM"] or settings["WEIGHTS"] or "none").name,
        "classes": list(data.classes),
        "epochs": int(result.history["epoch"].max()),
        "best_epoch": result.best_epoch,
        "best_source": result.best_source,
        "finished": result.finished,
        "metrics": {split: figures[split] for split in ("val", "test")},
        "temperature": temperature,
        "uncalibrated": before,
        "baselines": {name: figures[name] for name in tests},
        "paired_tests": {name: asdict(test) for name, test in tests.items()},
        "train_val_gap": float(gaps[result.best_epoch]),
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "device": result.device,
        "precision": result.amp,
        "seed": settings["SEED"],
        "image_size": settings["IMG_SIZE"],
        "images": {name: len(dataset) for name, dataset in datasets.items()},
        "versions": software_versions(),
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON."""
    write_text(path, json.dumps(summary, indent=2) + "\n")


def describe_difference(name: str, difference: Mapping[str, float]) -> str:
    """One sentence on how our accuracy differs from that of baseline `name`."""
    value, low, high = (100 * difference[k] for k in ("value", "low", "high"))
    if low <= 0 <= high:
        interval = f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
        return f"It does not differ clearly from the {name}: {interval}."
    verdict = "better" if low > 0 else "**worse**"
    interval = f"95 % interval of the difference {low:+.1f} to {high:+.1f}"
    return f"It is {verdict} than the {name} by {abs(value):.1f} points ({interval})."


def describe_temperature(temperature: float, before: Any, after: Any) -> str:
    """What dividing the scores by it did, from the metrics of the test split in the summary."""
    ece, nll = (f"{before[m]['value']:.3f} to {after[m]['value']:.3f}" for m in ("ece", "nll"))
    text = f"A temperature of {temperature:.2f} takes the test ECE from {ece}, the NLL from {nll}."
    if temperature in TEMPERATURES:
        return f"{text} It is the end of its range, as where every validation answer is right."
    return text


def closing_text(summary: Mapping[str, Any], folder: Path) -> str:
    """The run summed up in Markdown, from its own numbers."""
    lines = []
    if summary["debug"]:
        lines.append("> **DEBUG run.** Two batches of everything; no figure here means anything.\n")
    if summary["synthetic"]:
        lines.append(
            "> **Synthetic sample.** These figures show that everything works. They say nothing "
            "about emotions in photographs.\n"
        )
    accuracy, f1 = summary["metrics"]["test"]["accuracy"], summary["metrics"]["test"]["macro_f1"]
    lines.append(
        f"**{summary['model']}** on **{summary['dataset']}** reaches a test accuracy of "
        f"**{accuracy['value']:.1%}** (95 % interval {accuracy['low']:.1%} to "
        f"{accuracy['high']:.1%}) and a macro F1 of {f1['value']:.3f} ({f1['low']:.3f} to "
        f"{f1['high']:.3f}) on {summary['images']['test']} images."
    )
    for name, found in summary["paired_tests"].items():
        shown = f"{name.replace('_', ' ')} baseline"
        lines.append(f"- {describe_difference(shown, found['difference'])}")
    before, after = summary["uncalibrated"]["test"], summary["metrics"]["test"]
    lines.append("\n" + describe_temperature(summary["temperature"], before, after))
    source = "averaged (EMA)" if summary["best_source"] == "ema" else "raw"
    lines.append(
        f"\nThe best epoch was {summary['best_epoch']} of {summary['epochs']}, with the {source} "
        f"weights; its train-validation gap was {100 * summary['train_val_gap']:+.1f} points. "
        f"Training took {summary['seconds'] / 60:.1f} minutes on {summary['device']} at "
        f"{summary['images_per_second']:.0f} images/s. Everything is in `{folder}`."
    )
    return "\n".join(lines)
