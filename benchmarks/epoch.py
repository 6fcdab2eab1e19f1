"""Part "epoch": whole epochs, from files or cache to the last step."""

import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import Row, cores, interleave, make_row, synchronise
from benchmarks.peers import UsualNotebook
from benchmarks.pictures import cached_dataset, make_files, make_split, repeat_files
from benchmarks.plan import SOURCES, Plan
from benchmarks.settings import bench_config
from emotion_transfer import engine
from emotion_transfer.cache import cache_size
from emotion_transfer.engine import Progress, Saver, Trainer, begin_epoch, make_trainer, train_epoch
from emotion_transfer.loader import (
    Batch,
    EmotionDataset,
    batch_slices,
    fetch_ahead,
    make_loader,
    training_order,
)
from emotion_transfer.model import build_model
from emotion_transfer.seeding import set_deterministic

SOURCE = "500x375"
BatchSource = Callable[[Any, torch.device], Generator[Batch, None, None]]


class WaitMeter:
    """How long the device has nothing to do because its next batch has not come."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        """A point on the device's own time line, or on ours where the CPU is the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, batches: Iterable[Batch]) -> Generator[Batch, None, None]:
        """Yield `batches`; on a GPU, one mark follows the last step, the other the next batch."""
        iterator = iter(batches)
        while True:
            before = self.mark()
            batch = next(iterator, None)
            if batch is None:
                return
            self.marks.append((before, self.mark()))
            yield batch

    def seconds(self) -> float:
        """The sum over all batches but the first, which every epoch has to wait for."""
        synchronise(self.device)
        pairs = self.marks[1:]
        if self.cuda:
            return sum(a.elapsed_time(b) for a, b in pairs) / 1000
        return sum(b - a for a, b in pairs)


@contextmanager
def batches_from(source: BatchSource) -> Generator[None, None, None]:
    """Let the engine take its batches from `source` instead of ``fetch_ahead``."""
    with mock.patch.object(engine, "fetch_ahead", source):
        yield


class NoSaving(Saver):
    """A saver that is never due."""

    def __init__(self) -> None:
        pass

    def due(self) -> bool:
        return False


class OurEpochs:
    """The engine's own epochs, from the cache or from batches that lie on the device already."""

    def __init__(self, trainer: Trainer, dataset: EmotionDataset) -> None:
        self.trainer, self.dataset = trainer, dataset
        self.saver = NoSaving()
        self.epochs = {"cache": 0, "resident": 0}  # so that both see the same epochs
        self.waits: list[float] = []
        cfg = trainer.cfg
        slices = batch_slices(training_order(cfg, dataset.split.labels, 0), cfg.BATCH_SIZE)
        kept = make_loader(dataset, slices[:8], pin=False)  # used in turn, to save memory
        self.resident = list(fetch_ahead(kept, trainer.device))

    def _epoch(self, kind: str) -> float:
        progress = Progress(epoch=self.epochs[kind])
        self.epochs[kind] += 1
        self.trainer.meter.zero_()
        synchronise(self.trainer.device)
        start = time.perf_counter()
        train_epoch(self.trainer, self.dataset, progress, self.saver, threading.Event())
        synchronise(self.trainer.device)
        return progress.step * self.trainer.cfg.BATCH_SIZE / (time.perf_counter() - start)

    def from_cache(self) -> float:
        """Images a second of a whole epoch, first batch included; notes the share of waiting."""
        meter = WaitMeter(self.trainer.device)
        start = time.perf_counter()
        with batches_from(lambda loader, device: meter.watch(fetch_ahead(loader, device))):
            rate = self._epoch("cache")
        self.waits.append(100 * meter.seconds() / (time.perf_counter() - start))
        return rate

    def from_device(self) -> float:
        """Images a second of the same epoch where batches lie on the device."""

        def source(loader: Any, device: torch.device) -> Generator[Batch, None, None]:
            for step in range(len(loader)):
                yield self.resident[step % len(self.resident)]

        with batches_from(source):
            return self._epoch("resident")


def make_usual(
    plan: Plan, device: torch.device, source: Path, work: Path
) -> dict[str, UsualNotebook]:
    """The usual notebook as it ships, and with a worker on every core."""
    usual = repeat_files(work / "usual", source, plan.usual_images)
    split, cfg = make_split(usual), bench_config(plan, device)
    counts = {"usual notebook, 4 workers": 4, "usual notebook, a worker a core": cores()}
    return {
        name: UsualNotebook(cfg, split, plan.usual_batch, workers, device)
        for name, workers in counts.items()
    }


def run(plan: Plan, device: torch.device, work: Path) -> dict[str, Any]:
    """Measure epochs of ours from the cache and on resident tensors, and of the usual notebook."""
    set_deterministic(False)
    source = make_files(work / SOURCE, SOURCES[SOURCE], plan.files)
    cfg = bench_config(plan, device)
    split = make_split(repeat_files(work / "epoch", source, plan.epoch_steps * plan.epoch_batch))
    dataset = cached_dataset(split, work / "cache-epoch", cache_size(cfg), cores())
    usual = make_usual(plan, device, source, work)
    trainer = make_trainer(cfg, build_model(cfg, len(dataset.classes)), dataset)
    begin_epoch(trainer, 0)
    ours = OurEpochs(trainer, dataset)
    paths: dict[str, Callable[[], float]] = {
        "ours, from the cache": ours.from_cache,
        "ours, on resident tensors": ours.from_device,
        **{name: notebook.epoch for name, notebook in usual.items()},
    }
    found = interleave(paths, plan.repeats, "epoch")
    for notebook in usual.values():
        notebook.close()
    rows: list[Row] = [make_row({"epoch": n}, "images/s", rates) for n, rates in found.items()]
    rows.append(make_row({"epoch": "ours, device waits for data"}, "%", ours.waits[1:]))
    return {"rows": rows, "precision": trainer.amp, "batch": cfg.BATCH_SIZE}
