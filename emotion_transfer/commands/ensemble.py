"""Do several exports answer better together than each alone, and at what cost?"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from emotion_toolbox.ensembles import VIEWS, Ensemble, measure_speed, member_answers
from emotion_toolbox.errors import DataError, ImageError
from emotion_toolbox.files import resolve_path, write_text
from emotion_toolbox.measures import (
    Estimate,
    Floats,
    Labels,
    PairedTest,
    Predictions,
    log_losses,
    paired_test,
)
from emotion_toolbox.tables import Split, load_splits
from emotion_transfer.commands.predict import in_batches, load_ensemble, table_file
from emotion_transfer.intervals import evaluate_predictions

TOGETHER = "together"
SHOWN = {"accuracy": "accuracy", "macro_f1": "macro F1", "nll": "NLL"}


class Answers(NamedTuple):
    """The labels [N] of a split, and what each member says with some views, [N, C] each."""

    labels: Labels
    shares: dict[str, list[Floats]]  # by views


def open_split(data: Path, split: str, classes: Sequence[str]) -> tuple[Split, Labels]:
    """A split of the folder `data`, and its labels as numbers of `classes`.

    Raises ``DataError`` where the classes are others.
    """
    listed = load_splits(resolve_path(str(data)))
    if set(listed.classes) != set(classes):
        raise DataError(
            f"{data} has the classes {', '.join(listed.classes)}; the exports know "
            f"{', '.join(classes)}"
        )
    number = np.array([classes.index(name) for name in listed.classes])
    return listed.splits[split], number[listed.splits[split].labels]


def answer_split(ensemble: Ensemble, split: Split, labels: Labels, views: Sequence[str]) -> Answers:
    """What each member says of every usable image of `split`, decoded once; others are named."""
    files = [split.path(i) for i in range(len(split))]
    kept: list[bool] = []
    found: dict[str, list[list[Floats]]] = {name: [] for name in views}
    with tqdm(total=len(files), desc=split.name, unit="image", leave=False) as bar:
        for paths, batch in in_batches(ensemble, files):
            for path, one in zip(paths, batch, strict=True):
                kept.append(not isinstance(one, ImageError))
                if isinstance(one, ImageError):
                    tqdm.write(f"{path}: {one}; it is left out", file=sys.stderr)
            pictures = [one for one in batch if not isinstance(one, ImageError)]
            if pictures:
                for name in views:
                    found[name].append(member_answers(replace(ensemble, views=name), pictures))
            bar.update(len(batch))
    if not any(kept):
        raise DataError(f"no image of {split.csv} can be used")
    joined = {
        n: [np.concatenate(m) for m in zip(*parts, strict=True)] for n, parts in found.items()
    }
    return Answers(labels[np.array(kept)], joined)


def compare_members(
    names: Sequence[str], answers: Answers, speeds: dict[str, list[float]], classes: Sequence[str]
) -> pd.DataFrame:
    """A row a member and views, then the ensemble: figures with intervals, and images a second."""
    measure = partial(evaluate_predictions, answers.labels, classes=classes)
    rows = []
    for views, members in answers.shares.items():
        given = dict(zip(names, members, strict=True))
        cost = dict(zip(names, speeds[views], strict=True))
        if len(names) > 1:
            given[TOGETHER] = np.mean(members, axis=0)
            cost[TOGETHER] = 1 / sum(1 / speed for speed in speeds[views])
        for name, shares in given.items():
            found = measure(shares)
            figures = {key: found[key] for key in SHOWN}
            rows.append({"model": name, "views": views, **figures, "images_per_second": cost[name]})
    return pd.DataFrame(rows)


def best_member(answers: Answers, views: str) -> int:
    """The member with the best macro F1; the lower loss, then the earlier one, between equals."""
    scores = []
    for shares in answers.shares[views]:
        loss = float(log_losses(answers.labels, shares).mean())
        scores.append((Predictions(answers.labels, shares, loss).macro_f1, -loss))
    return scores.index(max(scores))


def test_together(answers: Answers, best: int, views: str) -> PairedTest:
    """The ensemble against its member `best` on the same images."""
    members = answers.shares[views]
    together = np.mean(members, axis=0).argmax(1)
    return paired_test(answers.labels, together, members[best].argmax(1))


def as_text(table: pd.DataFrame) -> str:
    """The table for people."""
    shown = table.rename(columns=SHOWN)
    shown["images_per_second"] = shown["images_per_second"].map("{:.0f}".format)
    return shown.rename(columns={"images_per_second": "images/s"}).to_string(index=False)


def as_json(table: pd.DataFrame) -> list[dict[str, object]]:
    """The table for programs."""
    rows = table.to_dict("records")
    return [
        {str(k): v.to_json() if isinstance(v, Estimate) else v for k, v in row.items()}
        for row in rows
    ]


def short_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders of exports apart: that of the run, or else the whole path."""
    names = [(f.resolve().parent if f.name == "export" else f.resolve()).name for f in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison, and write it where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer ensemble",
        description=__doc__,
        epilog="example: python -m emotion_transfer ensemble --model outputs/A --model outputs/B "
        "--data data/processed/pictures",
    )
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, help="an export, or a run with one")
    add("--data", type=Path, required=True, help="DATA_ROOT, with the three CSV files")
    add("--split", choices=("val", "test"), default="test", help="what they are compared on")
    add("--tta", nargs="+", choices=VIEWS, default=VIEWS, help="views to compare (default: all)")
    add("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    add("--json", type=table_file, metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    ensemble, folders = load_ensemble(args.model, args.device)
    names = short_names(folders)
    opened = {s: open_split(args.data, s, ensemble.classes) for s in {"val", args.split}}
    views = "flip" if "flip" in args.tta else args.tta[0]
    answers = answer_split(ensemble, *opened[args.split], args.tta)
    speeds = {v: [measure_speed(one, v) for one in ensemble.members] for v in args.tta}
    table = compare_members(names, answers, speeds, ensemble.classes)
    result = {"split": args.split, "images": len(answers.labels), "rows": as_json(table)}
    print(as_text(table))
    if len(names) > 1:
        best = best_member(answer_split(ensemble, *opened["val"], [views]), views)
        test = test_together(answers, best, views)
        result |= {"best_on_val": names[best], "together_minus_best": test.difference.to_json(),
                   "p_value": test.p_value}  # fmt: skip
        print(
            f"together less {names[best]} (the best one on val), accuracy with views {views!r}: "
            f"{test.difference:+.3f}, p = {test.p_value:.3f} (McNemar)"
        )
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    return 0
