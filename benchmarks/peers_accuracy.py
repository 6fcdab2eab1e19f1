"""Is the recipe better than others'? ``python -m benchmarks.peers_accuracy --data DIR``.

DIR is a folder written by ``python -m emotion_transfer prepare``; ``--name`` is what the summary
calls it. Every arm begins with the same
ImageNet weights of EfficientNet-Lite0, trains on the same images at the same size for as many
epochs, and does the rest by its own defaults (see ``benchmarks/recipes.py``); ours is what
``python -m emotion_transfer train`` would do. Each chooses its weights as it does by default, and
looks at the test images once, at its end.

``seconds`` runs from the files on the disk to the answers for the test images: decoding and, for
ours, filling the cache are in it, imports are not. Runs made with ``--untimed``, while the machine
does other things too, count for accuracy only. Each run has a process of its own. Its record lies
in ``--work`` as soon as it is done, and a run whose record is there, or in the results, is not
repeated; to repeat all, name other ones.

fastai is an extra: ``pip install -e ".[peers]"``; without what it needs for text only,
``pip install --no-deps fastai fastcore "fastprogress<1.1" fasttransform fastdownload
"plum-dispatch<2.10" beartype rich``.
"""

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.paired import Record, is_timed, summarise_arms
from benchmarks.recipes import (
    Answer,
    Task,
    finetune_fastai,
    finetune_keras_like,
    finetune_timm,
)
from benchmarks.results import (
    describe_machine,
    describe_versions,
    load_results,
    machine_slug,
    save_results,
)
from emotion_toolbox.backbones import PACKAGED
from emotion_toolbox.batches import Batch
from emotion_toolbox.device import choose_device
from emotion_toolbox.files import write_text
from emotion_toolbox.paired import pack_hits
from emotion_toolbox.tables import EmotionData, load_splits
from emotion_transfer.baselines import plain_config, run_baseline
from emotion_transfer.commands.train import answer, choose_settings, open_data, train_model
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.engine import Augment, Trainer, augment_batch

Arm = Callable[[Task, Path], Answer]
PLACES = ("DATA_ROOT", "IMAGES_ROOT", "CACHE_DIR", "OUTPUT_ROOT")  # of no interest elsewhere


def noting(task: Task) -> tuple[Augment, list[float]]:
    """The engine's augmentation, and the seconds at which it is asked for an epoch's first batch.

    By then the validation before that epoch is over; the last one's time is that of `fit`'s return.
    """
    seconds: list[float] = []

    def augment(trainer: Trainer, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            seconds.append(task.seconds())
        return augment_batch(trainer, batch, epoch, step)

    return augment, seconds


def chosen_accuracy(history: pd.DataFrame, monitor: str) -> list[float]:
    """Validation accuracy of raw or averaged weights in each epoch, whichever `monitor` prefers."""
    found = []
    for row in history.to_dict("records"):
        kinds = [kind for kind in ("val", "val_ema") if f"{kind}_{monitor}" in row]
        sign = -1 if monitor == "loss" else 1
        best = max(kinds, key=lambda kind: sign * row[f"{kind}_{monitor}"])
        found.append(float(row[f"{best}_accuracy"]))
    return found


def recorded(cfg: EnhancedConfig) -> dict[str, Any]:
    """The settings of `cfg` that say what was done."""
    return {name: value for name, value in vars(cfg).items() if name not in PLACES}


def choose_for(task: Task, folder: Path) -> tuple[EnhancedConfig, EmotionData]:
    """What the command ``train`` chooses for the task, with an empty cache in `folder`."""
    return choose_settings({
        "DATA_ROOT": str(task.root), "CACHE_DIR": str(folder / "cache"),
        "OUTPUT_ROOT": str(folder), "MODEL_NAME": PACKAGED[0], "WEIGHTS": PACKAGED[1],
        "IMG_SIZE": task.size, "EPOCHS": task.epochs, "SEED": task.seed,
    })  # fmt: skip


def train_with(change: Callable[[EnhancedConfig], EnhancedConfig]) -> Arm:
    """An arm that trains as the command ``train`` does, after a `change` of its settings."""

    def train(task: Task, folder: Path) -> Answer:
        chosen, listed = choose_for(task, folder)
        cfg, datasets = change(chosen), open_data(chosen, listed)[1]
        augment, seconds = noting(task)
        model, result = train_model(cfg, datasets, folder / "run", augment)
        seconds.append(task.seconds())
        predicted = answer(cfg, model, datasets["test"], result.amp).predicted
        curve = list(zip(seconds, chosen_accuracy(result.history, cfg.MONITOR), strict=True))
        return Answer(predicted, curve, recorded(cfg))

    return train


def plain(cfg: EnhancedConfig) -> EnhancedConfig:
    """The plain fine-tune that belongs to `cfg`; it looks at no mirror images."""
    return dataclasses.replace(plain_config(cfg), TTA=False)


def probe_on(**head: str) -> Arm:
    """An arm that fits the linear probe, on the features of ours or of another HEAD."""

    def fit(task: Task, folder: Path) -> Answer:
        chosen, listed = choose_for(task, folder)
        cfg = dataclasses.replace(chosen, **head)
        found = run_baseline("linear_probe", cfg, open_data(cfg, listed)[1], folder / "baselines")
        return Answer(found["probabilities"].argmax(1), [], recorded(cfg))

    return fit


ARMS: dict[str, Arm] = {
    "ours": train_with(lambda cfg: cfg),
    "probe": probe_on(),
    "probe_of_last_stage": probe_on(HEAD="linear"),
    "plain_finetune": train_with(plain),
    "fastai": lambda task, folder: finetune_fastai(task),
    "timm": lambda task, folder: finetune_timm(task),
    "keras_like": lambda task, folder: finetune_keras_like(task),
}
PACKAGES = {"fastai": "fastai.vision.all"}  # what an arm needs beyond the project


def why_missing(arm: str) -> str | None:
    """Why an arm cannot run here, None where it can; imports what it needs."""
    try:
        importlib.import_module(PACKAGES.get(arm, "timm"))
    except ImportError as error:
        return f"{error}; pip install -e '.[peers]'"
    return None


def run_arm(arm: str, root: Path, size: int, epochs: int, seed: int, work: Path) -> dict[str, Any]:
    """The record of one run, whose files go with it."""
    if why := why_missing(arm):
        raise ImportError(why)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        task = Task(root, size, epochs, seed)
        found = ARMS[arm](task, Path(scratch))
        seconds = task.seconds()
    test = load_splits(root).splits["test"]
    if len(found.predicted) != len(test):
        raise ValueError(
            f"{arm} answered to {len(found.predicted)} of {len(test)} test images of {root}; "
            "remove those that cannot be decoded from test.csv"
        )
    hits = found.predicted == test.labels
    return {
        "arm": arm, "seed": seed, "size": size, "epochs": epochs,
        "test_accuracy": float(hits.mean()), "test_images": len(test), "correct": pack_hits(hits),
        "seconds": round(seconds, 2), "curve": [[round(s, 2), round(a, 6)] for s, a in found.curve],
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "machine": machine_slug(describe_machine(choose_device())),
        "threads": torch.get_num_threads(), "settings": found.settings,
    }  # fmt: skip


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function` of `args` in a new process: what one arm sets up cannot help or harm the next."""
    # its loaders' workers are to start as in a process that a user started, not by spawning
    usual: dict[str, Any] = {
        "initializer": multiprocessing.set_start_method, "initargs": (None, True)
    }  # fmt: skip
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **usual) as pool:
        return pool.submit(function, *args).result()


def data_key(root: Path) -> str:
    """What changes with the names and labels of the images in `root`."""
    return "-".join(split.fingerprint() for split in load_splits(root).splits.values())


def record_file(arm: str, name: str, size: int, epochs: int, seed: int, work: Path) -> Path:
    """Where the record of one run lies."""
    return work / f"{name}-{size}px-{epochs}-epochs-{arm}-{seed}.json"


def record_run(
    arm: str, name: str, root: Path, size: int, epochs: int, seed: int, work: Path,
    timed: bool = True, start: Callable[..., Any] = in_own_process,
) -> dict[str, Any]:  # fmt: skip
    """The record of a run from `work`, made first where it is not there or of other images."""
    file = record_file(arm, name, size, epochs, seed, work)
    data = data_key(root)
    kept = load_results(file)
    if kept is not None and kept["data"] == data:
        return kept
    made: dict[str, Any] = start(run_arm, arm, root, size, epochs, seed, work)
    made |= {"data": data, "timed": timed}
    write_text(file, json.dumps(made, indent=1) + "\n")
    return made


def restore_records(out: Path, name: str, work: Path) -> None:
    """Put the records of `name` that the results hold into `work`, where they are not."""
    for run in (load_results(out) or {}).get("sets", {}).get(name, {}).get("runs", []):
        file = record_file(run["arm"], name, run["size"], run["epochs"], run["seed"], work)
        if not file.exists():
            write_text(file, json.dumps(run, indent=1) + "\n")


def read_records(name: str, root: Path, size: int, epochs: int, work: Path) -> list[Record]:
    """All runs of a data set that lie in `work`, also those of arms that are not asked for now."""
    files = sorted(work.glob(f"{name}-{size}px-{epochs}-epochs-*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    key = data_key(root)
    return [record for record in found if record["data"] == key]


def merge_set(
    old: Mapping[str, Any] | None, name: str, about: Mapping[str, Any], runs: Sequence[Record]
) -> dict[str, Any]:
    """The file of results with those of the data set `name` new, and of other sets as they were."""
    old = old or {}
    by_arm: dict[str, dict[int, Record]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    return {
        "machine": about["machine"], "versions": about["versions"],
        "summary": {**old.get("summary", {}), name: summarise_arms(by_arm)},
        "sets": {**old.get("sets", {}), name: {**about, "runs": list(runs)}},
    }  # fmt: skip


def as_markdown(results: Mapping[str, Any]) -> str:
    """The summary of a file of results as a Markdown table: a row an arm of each data set."""
    lines = ["| set | recipe | seeds | test accuracy | ours is better by, points | seconds a run |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, summary in results["summary"].items():
        runs = results["sets"][name]["runs"]
        for arm, e in summary["test_accuracy_of_each"].items():
            share = f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
            difference = summary.get(f"minus_{arm}")
            better = (
                ""
                if difference is None
                else "{value:+.1f} [{low:+.1f}, {high:+.1f}]".format(
                    **{key: 100 * value for key, value in difference.items()}
                )
            )
            timed = [run["seconds"] for run in runs if run["arm"] == arm and is_timed(run)]
            seconds = f"{statistics.median(timed):.0f}" if timed else ""
            row = name, arm, summary["seeds"][arm], share, better, seconds
            lines.append("| " + " | ".join(str(cell).replace("_", " ") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def plain_name(text: str) -> str:
    """A name that can be a part of a file's."""
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name, such as clothing10")
    return text


def known_arms(text: str) -> list[str]:
    """Names of arms, separated by commas."""
    if unknown := set(arms := text.split(",")) - ARMS.keys():
        raise argparse.ArgumentTypeError(f"no arm {sorted(unknown)}; there are {', '.join(ARMS)}")
    return arms


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers_accuracy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, required=True, help="DATA_ROOT")
    add("--name", type=plain_name, required=True, help="what the summary calls the data set")
    add("--seeds", type=int, default=3, help="runs of each arm")
    add("--epochs", type=int, default=12)
    add("--size", type=int, default=128, help="side of the images in pixels")
    add("--arms", type=known_arms, default=list(ARMS), help="some of " + ",".join(ARMS))
    add("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    add("--untimed", action="store_true", help="the machine does other things, too")
    add("--work", type=Path, required=True, help="where the record of each run is kept")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, print and write the summary."""
    args = make_parser().parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    restore_records(args.out, args.name, args.work)
    skipped = {arm: why for arm in args.arms if (why := why_missing(arm))}
    for arm, why in skipped.items():
        print(f"{arm} is skipped: {why}", flush=True)
    asked = args.name, args.data, args.size, args.epochs
    for seed in range(args.seeds):
        for arm in (arm for arm in args.arms if arm not in skipped):
            run = record_run(arm, *asked, seed, args.work, not args.untimed)
            accuracy, seconds = run["test_accuracy"], run["seconds"]
            print(f"{arm} {seed}: accuracy {accuracy:.3f}, {seconds:.0f} s", flush=True)
    about = {
        "machine": describe_machine(choose_device()),
        "versions": describe_versions()
        | ({} if why_missing("fastai") else {"fastai": version("fastai")}),
        "size": args.size, "epochs": args.epochs, "skipped": skipped,
    }  # fmt: skip
    result = merge_set(load_results(args.out), args.name, about, read_records(*asked, args.work))
    save_results(args.out, result)
    print(json.dumps(result["summary"][args.name], indent=1))
    print(as_markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
