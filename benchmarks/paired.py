"""Recipes compared over the same test images and several seeds: intervals, ratios, a summary."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emotion_toolbox.paired import Hits, resample_mean, unpack_hits

Record = Mapping[str, Any]  # one run, as benchmarks.peers_accuracy writes it


def is_timed(record: Record) -> bool:
    """Whether the machine did nothing else meanwhile; records that do not say so are timed."""
    return bool(record.get("timed", True))


def hits_of(records: Mapping[int, Record], seeds: Sequence[int]) -> Hits:
    """Hits [seeds, images] of the runs of one arm."""
    found = [unpack_hits(records[s]["correct"], records[s]["test_images"]) for s in seeds]
    return np.stack(found).astype(np.float64)


def first_reaching(curve: Sequence[Sequence[float]], accuracy: float) -> float:
    """Seconds at which a curve of (seconds, accuracy) first is at least `accuracy`; or infinity."""
    return next((seconds for seconds, reached in curve if reached >= accuracy), math.inf)


def time_to_best(ours: Record, theirs: Record) -> float:
    """Time until ours validates as well as theirs ever does, as a share of the time they need."""
    best = max(accuracy for _, accuracy in theirs["curve"])
    return first_reaching(ours["curve"], best) / first_reaching(theirs["curve"], best)


def summarise_arms(runs: Mapping[str, Mapping[int, Record]]) -> dict[str, Any]:
    """What is to be said of one data set, whose `runs` are given by arm and seed.

    Accuracies and differences ("ours minus ...") are fractions with 95 % intervals, those of time
    are ratios: below 1, ours is faster. None where an arm was not run, and for
    ``time_to_plain_best`` where ours never gets there in half of the seeds.
    """

    def minus(arm: str) -> dict[str, float] | None:
        both = sorted(runs.get("ours", {}).keys() & runs.get(arm, {}).keys())
        if not both:
            return None
        return resample_mean(hits_of(runs["ours"], both) - hits_of(runs[arm], both)).to_json()

    each = {
        arm: resample_mean(hits_of(records, sorted(records))).to_json()
        for arm, records in runs.items()
    }
    summary: dict[str, Any] = {
        "seeds": {arm: len(records) for arm, records in runs.items()},
        "test_accuracy": each.get("ours"),
        "test_accuracy_of_each": each,
    }
    others = ("probe", "probe_of_last_stage", "plain_finetune", "fastai", "timm", "keras_like")
    summary |= {f"minus_{arm}": minus(arm) for arm in others}
    ours, plain, fastai = (
        {seed: run for seed, run in runs.get(arm, {}).items() if is_timed(run)}
        for arm in ("ours", "plain_finetune", "fastai")
    )
    ratios = [time_to_best(ours[s], plain[s]) for s in sorted(ours.keys() & plain.keys())]
    middle = statistics.median(ratios) if ratios else math.inf
    summary["time_to_plain_best"] = middle if math.isfinite(middle) else None
    summary["seeds_never_at_plain_best"] = sum(map(math.isinf, ratios)) if ratios else None
    summary["wall_vs_fastai"] = None
    if ours and fastai:
        medians = [statistics.median(r["seconds"] for r in arm.values()) for arm in (ours, fastai)]
        summary["wall_vs_fastai"] = medians[0] / medians[1]
    return summary
