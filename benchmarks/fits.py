"""What a cut to a square costs: ``python -m benchmarks.fits --data DIR --group theme``.

For each FIT, the accuracy of a linear probe on the features of the frozen EfficientNet-Lite0, in
five-fold cross-validation on the training and validation images; the test images are not looked
at. DIR is a folder written by ``python -m emotion_transfer prepare``. Images with the same value in
the column `--group` of its tables stay in one fold.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.results import describe_machine, describe_versions
from emotion_toolbox.backbones import BACKBONES, PACKAGED, make_backbone
from emotion_toolbox.batches import open_datasets
from emotion_toolbox.decoding import FITS
from emotion_toolbox.device import choose_device
from emotion_toolbox.probes import STRENGTHS, extract_features
from emotion_toolbox.sample import load_data


def probe_accuracies(root: Path, group: str | None, size: int, work: Path) -> dict[str, float]:
    """The cross-validated accuracy of each FIT, at the strength that is best for it."""
    listed = load_data("files", str(root), None)
    backbone, found = make_backbone(*PACKAGED).eval(), {}
    for fit in FITS:
        _, datasets = open_datasets(listed, round(size * 8 / 7), fit, cache_dir=str(work))
        seen = [datasets[name] for name in ("train", "val")]
        asked = replace(BACKBONES[PACKAGED[0]], levels={}), size, 32
        features = np.concatenate([extract_features(backbone, data, *asked) for data in seen])
        labels = np.concatenate([data.split.labels for data in seen])
        groups = np.arange(len(labels))
        if group:
            rows = [pd.read_csv(d.split.csv)[group].to_numpy()[d.split.rows - 2] for d in seen]
            groups = np.unique(np.concatenate(rows), return_inverse=True)[1]
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
        scores = [
            cross_val_score(
                make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500, tol=1e-3)),
                features, labels, groups=groups, cv=folds,
            ).mean()
            for c in STRENGTHS
        ]  # fmt: skip
        found[fit] = round(float(max(scores)), 4)
        print(f"{root.name}, {fit}: {found[fit]:.3f}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and add the result to the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DATA_ROOT")
    parser.add_argument("--name", help="of the data in the result (default: its folder's)")
    parser.add_argument("--group", help="a column of the tables")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fits.json"))
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        found = probe_accuracies(args.data, args.group, args.size, Path(work))
    before: dict[str, Any] = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    summary = {**before.get("summary", {}), args.name or args.data.name: found}
    about = {"machine": describe_machine(choose_device("cpu")), "versions": describe_versions()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"size": args.size, "summary": summary, **about}, indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
