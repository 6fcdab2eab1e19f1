"""Kill runs at random instants, damage their files, feed them rubbish: ``make torture``.

Every training run happens in a forked child, so that a kill costs no new start of PyTorch, and goes
on with another number of workers, with or without the cache. Writes
``benchmarks/results/torture.json``; its ``summary`` counts what was tried and what survived:
``bit_identical`` are the kills whose run then ended in the very state of one never killed.

On a GPU: ``make torture TORTURE="--device cuda --amp bf16"``, with deterministic algorithms.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.measure import synchronise
from benchmarks.results import describe_machine
from emotion_toolbox.batches import Batch, EmotionDataset
from emotion_toolbox.draws import draw_uniforms, step_seed
from emotion_toolbox.errors import CheckpointError
from emotion_toolbox.keeper import (
    Keeper,
    Progress,
    list_checkpoints,
    load_newest,
    load_verified,
)
from emotion_toolbox.report import software_versions
from emotion_toolbox.sample import load_data
from emotion_transfer.augment import AUGMENT_DRAWS, draw_augmentation
from emotion_transfer.commands.train import open_data
from emotion_transfer.config import EnhancedConfig, make_config
from emotion_transfer.engine import Trainer, begin_epoch, fit, train_step
from emotion_transfer.mixing import draw_mixing
from emotion_transfer.model import build_model

RESULTS = Path(__file__).parent / "results"
TIMINGS = {"images_per_second", "seconds", "memory_mb"}
CLASSES = ("red", "green", "blue")


def draw_images(root: Path, train: int = 20, other: int = 6) -> Path:
    """A data set of noisy pictures in three colours, in the form of the data contract."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", other), ("test", other)):
        lines = ["path,label"]
        for number, label in enumerate(CLASSES):
            for i in range(count):
                pixels = rng.integers(0, 160, (48, 56, 3), dtype=np.uint8)
                pixels[..., number] += 60
                file = root / split / f"{label}_{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
                lines.append(f"{split}/{file.name},{label}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


@dataclass(frozen=True)
class Where:
    """What the runs train on."""

    device: str = "cpu"
    amp: str = "off"

    @property
    def results(self) -> Path:
        plain = self == Where()
        return RESULTS / f"torture{'' if plain else f'-{self.device}-{self.amp}'}.json"


def settings(where: Where, data: Path, folder: Path, model: str, every: float) -> EnhancedConfig:
    """A short run with every thaw, mixing, averaging and augmentation in it."""
    return make_config({
        "DATASET": "files", "DATA_ROOT": str(data), "OUTPUT_ROOT": str(folder),
        "CACHE_DIR": str(folder / "cache"), "RUN_NAME": "run", "MODEL_NAME": model,
        "WEIGHTS": "DEFAULT" if model == "efficientnet_lite0" else None, "IMG_SIZE": 32,
        "BATCH_SIZE": 8, "EPOCHS": 4, "WARMUP_EPOCHS": 1, "THAW_EPOCHS": [1, 2],
        "MIX_OFF_EPOCHS": 1, "CHECKPOINT_EVERY": every, "NUM_WORKERS": 1,
        "DEVICE": where.device, "AMP": where.amp, "DETERMINISTIC": where.device != "cpu",
    })  # fmt: skip


def load_datasets(cfg: EnhancedConfig) -> dict[str, EmotionDataset]:
    """The three splits, decoded and cached as `cfg` says."""
    return open_data(cfg, load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT))[1]


def run_once(cfg: EnhancedConfig) -> None:
    """Cache, train and validate as `cfg` says, or go on where a killed run was."""
    torch.set_num_threads(1)
    datasets = load_datasets(cfg)
    fit(cfg, build_model(cfg, len(CLASSES)), datasets, checkpoints_of(cfg))


def checkpoints_of(cfg: EnhancedConfig) -> Path:
    return Path(cfg.OUTPUT_ROOT) / "run" / "checkpoints"


def in_child(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a forked child whose output goes to `log`; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            work()
            status = 0
        except BaseException as error:  # the parent reads the log
            print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(status)


def final_state(cfg: EnhancedConfig) -> dict[str, Any]:
    """The last checkpoint and best weights of a finished run, without timings."""
    state = load_verified(list_checkpoints(checkpoints_of(cfg))[0])
    best = load_verified(checkpoints_of(cfg) / state["best_file"])
    history = [{k: v for k, v in row.items() if k not in TIMINGS} for row in state["history"]]
    kept = ("model", "ema", "optimizer", "scaler", "best_score", "best_epoch", "best_source")
    return {**{k: state[k] for k in kept}, "history": history, "best": best["model"]}


def identical(a: Any, b: Any) -> bool:
    """Whether two nested states agree to the last bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b or (a != a and b != b))


def kill_until_done(
    cfg: EnhancedConfig, span: float, rng: random.Random, log: Path
) -> tuple[int, bool]:
    """Run `cfg`, killing it at instants up to `span` seconds in, until it ends by itself.

    Returns the number of kills, and whether it ended well.
    """
    kills = 0
    while True:
        changed: dict[str, Any] = {"NUM_WORKERS": rng.randrange(4), "CACHE": rng.random() < 0.7}
        pid = in_child(partial(run_once, dataclasses.replace(cfg, **changed)), log)
        deadline = time.monotonic() + rng.uniform(0.02, span)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                break
            time.sleep(0.002)
        if os.WIFEXITED(status):
            return kills, os.WEXITSTATUS(status) == 0
        kills += 1


def torture_kills(
    where: Where, work: Path, model: str, wanted: int, every: float, rng: random.Random
) -> dict[str, Any]:
    """At least `wanted` kills over as many runs of `model` as that takes."""
    data = draw_images(work / "data")
    reference = settings(where, data, work / f"{model}-reference", model, 1e9)
    begun = time.monotonic()
    pid = in_child(lambda: run_once(reference), work / "reference.log")
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError((work / "reference.log").read_text())
    seconds = time.monotonic() - begun
    expected = final_state(reference)
    result: dict[str, Any] = {
        "model": model, "kills": 0, "runs": 0, "lost": 0, "bit_identical": 0, "seconds": seconds,
    }  # fmt: skip
    while result["kills"] < wanted:
        folder = work / f"{model}-victim-{result['runs']}"
        cfg = settings(where, data, folder, model, every)
        folder.mkdir()
        result["runs"] += 1
        kills, survived = kill_until_done(cfg, 0.8 * seconds, rng, folder / "log")
        result["kills"] += kills
        if survived:
            result["bit_identical"] += kills * identical(final_state(cfg), expected)
        else:
            result["lost"] += 1
            print((folder / "log").read_text()[-2000:])
        print(result, flush=True)
        shutil.rmtree(folder)
    return result


def torture_files(where: Where, work: Path, rng: random.Random) -> dict[str, int]:
    """Cut and flip every kept checkpoint in turn: the one before it must be used, or an error."""
    data = draw_images(work / "data")
    cfg = settings(where, data, work / "damage", "efficientnet_lite0", 0.0)
    pid = in_child(lambda: run_once(cfg), work / "damage.log")
    os.waitpid(pid, 0)
    folder = checkpoints_of(cfg)
    kept = list_checkpoints(folder)
    damaged = right = 0
    for index, victim in enumerate(kept):
        whole = victim.read_bytes()
        spoilt = [whole[: rng.randrange(len(whole))] for _ in range(5)] + [b""]
        for _ in range(10):
            position = rng.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[position] ^= 1 << rng.randrange(8)
            spoilt.append(bytes(flipped))
        for content in spoilt:
            damaged += 1
            copy = work / "copy"
            shutil.copytree(folder, copy)
            (copy / victim.name).write_bytes(content)
            expected = next((p for p in kept if p != victim), None)
            wanted = load_verified(kept[0] if index else expected) if expected else None
            try:
                with contextlib.redirect_stdout(None):
                    found = load_newest(copy)
                right += identical(found, wanted)
            except CheckpointError:
                right += wanted is None
            shutil.rmtree(copy)
    return {"checkpoints_damaged": damaged, "fallbacks_right": right}


def measure_overhead(where: Where, work: Path) -> dict[str, float]:
    """What exactness and checkpoints cost a ResNet50 run, in per cent of its time."""
    data = draw_images(work / "data")
    cfg = make_config({
        "DATASET": "files", "DATA_ROOT": str(data), "OUTPUT_ROOT": str(work / "overhead"),
        "CACHE_DIR": str(work / "cache"), "WEIGHTS": None, "IMG_SIZE": 96, "BATCH_SIZE": 32,
        "EPOCHS": 2, "WARMUP_EPOCHS": 0, "BALANCE": "none",
        "DEVICE": where.device, "AMP": where.amp,
    })  # fmt: skip
    datasets = load_datasets(cfg)
    trainer = Trainer(cfg, build_model(cfg, len(CLASSES)), datasets["train"])
    begin_epoch(trainer, 0)
    found = datasets["train"].batch(range(32))
    batch = Batch(*(tensor.to(trainer.device) for tensor in found))

    def seeding() -> None:
        torch.manual_seed(step_seed(cfg.SEED, 0, 0))
        draw_augmentation(cfg, draw_uniforms(cfg.SEED, 0, 0, 32, AUGMENT_DRAWS))
        draw_mixing(cfg, 0, 0, 32)

    def step_done() -> None:
        train_step(trainer, batch, 0, 0, 1)
        synchronise(trainer.device)

    step = median_seconds(step_done, 7)
    drawing = median_seconds(seeding, 50)
    folder = checkpoints_of(cfg)
    keeper = Keeper(folder, cfg.CHECKPOINT_EVERY, keep=1)
    keeper.begin(cfg, trainer.model, datasets)
    gc.collect()
    saving = median_seconds(lambda: keeper.save(trainer, Progress()), 5)
    seed_share = 100 * drawing / step
    save_share = 100 * saving / EnhancedConfig().CHECKPOINT_EVERY
    return {
        "step_seconds": step, "seeding_seconds": drawing, "seeding_percent": seed_share,
        "checkpoint_mb": list_checkpoints(folder)[0].stat().st_size / 1e6,
        "checkpoint_seconds": saving, "checkpoint_percent": save_share,
        "overhead_percent": seed_share + save_share,
    }  # fmt: skip


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work` after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class CorpusCounter:
    """A pytest plugin that counts the malformed images and tables of the tests, and failures."""

    def __init__(self) -> None:
        self.counts = {"bad_images": 0, "bad_tables": 0, "errors_without_a_name": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        self.counts["bad_images"] += "bad_image" in report.keywords
        self.counts["bad_tables"] += "bad_table" in report.keywords
        self.counts["errors_without_a_name"] += report.failed


def torture_inputs() -> dict[str, int]:
    """Run the tests that feed malformed images, tables, label maps and settings."""
    counter = CorpusCounter()
    pytest.main(["-q", "-m", "bad_image or bad_table", "tests"], plugins=[counter])
    return counter.counts


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at least so many (default 200)")
    parser.add_argument(
        "--large", type=int, default=25, help="of them, for each of ResNet50 and B0"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"))
    parser.add_argument("--out", type=Path, help="default: under benchmarks/results")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run all parts and write the JSON; 1 if anything was lost, wrong or unnamed."""
    args = make_parser().parse_args(arguments)
    rng, where = random.Random(args.seed), Where(args.device, args.amp)
    begun = time.monotonic()
    plan = [("efficientnet_lite0", args.kills - 2 * args.large, 0.0)]
    plan += [(model, args.large, 2.0) for model in ("efficientnet_b0", "resnet50")]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        runs = [torture_kills(where, work, name, n, t, rng) for name, n, t in plan if n > 0]
        files = torture_files(where, work, rng)
        # The forked children must find a process without threads, so what uses them comes last.
        overhead = measure_overhead(where, work)
    inputs = torture_inputs()
    summary = {
        "kills": sum(run["kills"] for run in runs),
        "runs": sum(run["runs"] for run in runs),
        "runs_lost": sum(run["lost"] for run in runs),
        "bit_identical": sum(run["bit_identical"] for run in runs),
        **files,
        **inputs,
        "overhead_percent": overhead["overhead_percent"],
    }
    report = {
        "summary": summary, "runs": runs, "overhead": overhead,
        "device": where.device, "amp": where.amp,
        "machine": describe_machine(torch.device(where.device)) | {"load": os.getloadavg()},
        "versions": software_versions(), "seconds": time.monotonic() - begun,
    }  # fmt: skip
    file = args.out or where.results
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    whole = summary["bit_identical"] == summary["kills"] and not summary["runs_lost"]
    right = summary["fallbacks_right"] == summary["checkpoints_damaged"]
    return int(not (whole and right and not summary["errors_without_a_name"]))


if __name__ == "__main__":
    raise SystemExit(main())
