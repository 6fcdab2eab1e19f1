"""When should a model say "not sure"? Choose by validation images, judge by test images."""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from emotion_toolbox.ensembles import risk_coverage, threshold_for
from emotion_toolbox.figures import BLUE, GREEN, RED, new_figure, save_figure
from emotion_toolbox.files import write_text
from emotion_toolbox.measures import Floats, Labels
from emotion_toolbox.paired import resample_mean
from emotion_toolbox.report import figure_note
from emotion_transfer.commands.ensemble import answer_split, open_split
from emotion_transfer.commands.predict import load_ensemble


def plot_risk_coverage(curves: dict[str, pd.DataFrame], threshold: float) -> Figure:
    """Share of wrong answers by the share of images that are answered; a dot at `threshold`."""
    fig, [[ax]] = new_figure(6, 4)
    for (name, curve), colour in zip(curves.items(), (GREEN, BLUE), strict=True):
        area = curve["risk"].mean()
        ax.plot(
            curve["coverage"], 100 * curve["risk"], color=colour, label=f"{name}, AURC {area:.3f}"
        )
        answered = curve[curve["threshold"] >= threshold]
        if len(answered):
            last = answered.iloc[-1]
            ax.plot(last["coverage"], 100 * last["risk"], "o", color=RED, ms=7)
    ax.plot([], [], "o", color=RED, label=f"sure from {threshold:.0%}")
    ax.set(xlabel="share of images that are answered", ylabel="wrong answers among them, %")
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def describe(labels: Labels, probabilities: Floats, threshold: float) -> str:
    """What `threshold` means on the images of `labels` [N], with 95 % intervals."""
    sure = probabilities.max(axis=1) >= threshold
    right = (probabilities.argmax(axis=1) == labels).astype(float)
    answered = resample_mean(sure[None].astype(float))
    said = f"{answered:.1%} of {len(labels)} images answered"
    if not sure.any():
        return said
    return (
        f"{said}, {resample_mean(right[sure][None]):.1%} of these right; {right.mean():.1%} of all"
    )


def main(arguments: list[str] | None = None) -> int:
    """Choose, write it into the export, draw the curve."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer threshold",
        description=__doc__,
        epilog="example: python -m emotion_transfer threshold --model outputs/RUN_NAME "
        "--data data/processed/pictures --coverage 0.8",
    )
    add = parser.add_argument
    add("--model", type=Path, help="an export, or a run that has one (default: the newest)")
    add("--data", type=Path, required=True, help="DATA_ROOT, with the three CSV files")
    add("--coverage", type=float, default=0.8, help="share of images to be answered (default 0.8)")
    add("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    args = parser.parse_args(arguments)
    if not 0 < args.coverage <= 1:
        parser.error(f"--coverage {args.coverage:g}: give a share above 0, at most 1")
    ensemble, (folder,) = load_ensemble(args.model and [args.model], args.device)
    [member] = ensemble.members
    views = "flip" if member.tta else "none"
    found = {}
    for split in ("val", "test"):
        opened = open_split(args.data, split, ensemble.classes)
        answers = answer_split(ensemble, *opened, [views])
        found[split] = answers.labels, answers.shares[views][0]
    threshold = threshold_for(np.asarray(found["val"][1].max(axis=1)), args.coverage)
    file = folder / "config.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps({**about, "threshold": threshold}, indent=2) + "\n")
    curves = {split: risk_coverage(*given) for split, given in found.items()}
    note = figure_note(member.synthetic, about["model"], debug=False)
    save_figure(plot_risk_coverage(curves, threshold), folder, "risk_coverage", note=note)
    print(f"not sure below {threshold:.3f}, which is now in {file}")
    for split, given in found.items():
        print(f"{split}: {describe(*given, threshold)}")
    print(folder / "risk_coverage.png")
    return 0
