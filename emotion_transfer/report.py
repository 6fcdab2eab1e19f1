"""The run in numbers and in words: summary.json, predictions as CSV, a closing text."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from emotion_transfer.baselines import Comparison
from emotion_transfer.checkpoint import write_atomically
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.data import EmotionData
from emotion_transfer.engine import FitResult
from emotion_transfer.metrics import Estimate

# %% [markdown]
# #### What is written down
#
# `summary.json` is for programs: other scripts compare runs by it, so every figure in it was
# measured in this run, and the versions of everything involved stand beside them.


# %%
def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    names = ("torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn", "pillow")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def estimates_to_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """Every estimate as value, low and high."""
    return {name: estimate.to_json() for name, estimate in estimates.items()}


# %% [markdown]
# These are its keys. Every metric stands with the two ends of its interval.


# %%
def summarise_run(
    cfg: EnhancedConfig,
    data: EmotionData,
    result: FitResult,
    metrics: Mapping[str, Mapping[str, Estimate]],
    comparison: Comparison,
) -> dict[str, Any]:
    """The run's figures, ready for JSON."""
    gaps = dict(zip(result.history["epoch"], result.history["gap"], strict=True))
    baselines = {
        name: estimates_to_json(found)
        for name, found in comparison.metrics.items()
        if name in comparison.tests
    }
    return {
        "dataset": data.name,
        "synthetic": data.synthetic,
        "debug": cfg.DEBUG,
        "model": cfg.MODEL_NAME,
        "weights": cfg.INIT_FROM or cfg.WEIGHTS or "none",
        "classes": list(data.classes),
        "epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "best_source": result.best_source,
        "finished": result.finished,
        "metrics": {split: estimates_to_json(found) for split, found in metrics.items()},
        "baselines": baselines,
        "paired_tests": {name: test.to_json() for name, test in comparison.tests.items()},
        "train_val_gap": float(gaps[result.best_epoch]),
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "device": result.device,
        "precision": result.amp,
        "seed": cfg.SEED,
        "image_size": cfg.IMG_SIZE,
        "images": {name: len(split) for name, split in data.splits.items()},
        "versions": software_versions(),
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON; figures that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(summary), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


# %% [markdown]
# And for people, the same figures as sentences. They are written from the numbers: a model that
# failed to beat a baseline reads so.


# %%
def describe_difference(name: str, difference: Mapping[str, float]) -> str:
    """One sentence on how our accuracy differs from that of baseline `name`."""
    value, low, high = (100 * difference[k] for k in ("value", "low", "high"))
    size = f"by {abs(value):.1f} points (95 % interval of the difference {low:+.1f} to {high:+.1f})"
    if low > 0:
        return f"It is better than the {name} {size}."
    if high < 0:
        return f"It is **worse** than the {name} {size}."
    interval = f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
    return f"It does not differ clearly from the {name}: {interval}."


def closing_text(summary: Mapping[str, Any], folder: Path) -> str:
    """The run summed up in Markdown, from its own numbers."""
    test = summary["metrics"]["test"]
    lines = []
    if summary.get("debug"):
        lines.append("> **DEBUG run.** Two batches of everything; no figure here means anything.\n")
    if summary["synthetic"]:
        lines.append("> **Synthetic sample.** These figures show that everything works. They say "
                     "nothing about emotions in photographs.\n")  # fmt: skip
    accuracy, f1 = test["accuracy"], test["macro_f1"]
    lines.append(
        f"**{summary['model']}** on **{summary['dataset']}** reaches a test accuracy of "
        f"**{accuracy['value']:.1%}** (95 % interval {accuracy['low']:.1%} to "
        f"{accuracy['high']:.1%}) and a macro F1 of {f1['value']:.3f} ({f1['low']:.3f} to "
        f"{f1['high']:.3f}) on {summary['images']['test']} images."
    )
    for name, found in summary["paired_tests"].items():
        difference = found["difference"]
        lines.append(f"- {describe_difference(name.replace('_', ' ') + ' baseline', difference)}")
    source = "averaged (EMA)" if summary["best_source"] == "ema" else "raw"
    lines.append(
        f"\nThe best epoch was {summary['best_epoch']} of {summary['epochs']}, with the {source} "
        f"weights; its train-validation gap was {100 * summary['train_val_gap']:+.1f} points. "
        f"Training took {summary['seconds'] / 60:.1f} minutes on {summary['device']} at "
        f"{summary['images_per_second']:.0f} images/s. Everything is in `{folder}`."
    )
    return "\n".join(lines)
