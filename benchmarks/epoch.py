"""Part "epoch": whole epochs, from files or cache to the last step."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, cores, interleave, make_row, synchronise
from benchmarks.peers import UsualNotebook
from benchmarks.pictures import cached_dataset, make_files, make_split, repeat_files
from benchmarks.plan import SOURCES, Plan
from benchmarks.settings import bench_config
from emotion_toolbox.batches import (
    Batch,
    EmotionDataset,
    batch_slices,
    fetch_ahead,
    training_order,
)
from emotion_toolbox.cache import Positions
from emotion_toolbox.device import set_deterministic
from emotion_toolbox.keeper import Keeper, Progress
from emotion_transfer.config import cache_size
from emotion_transfer.engine import Trainer, begin_epoch, train_step
from emotion_transfer.model import build_model

SOURCE = "500x375"
BatchSource = Callable[[Sequence[Positions]], Generator[Batch, None, None]]


class WaitMeter:
    """How long the device has nothing to do because its next batch has not come."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        """A point on the device's own time line, or on ours where the CPU is the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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
            return float(sum(a.elapsed_time(b) for a, b in pairs)) / 1000
        return float(sum(b - a for a, b in pairs))


class OurEpochs:
    """The engine's own epochs, from the cache or from batches that lie on the device already."""

    def __init__(self, trainer: Trainer, dataset: EmotionDataset, folder: Path) -> None:
        self.trainer, self.dataset = trainer, dataset
        self.keeper = Keeper(folder, math.inf)  # which never finds a checkpoint due
        self.epochs = {"cache": 0, "resident": 0}  # so that both see the same epochs
        self.waits: list[float] = []
        kept = self._slices(0)[:8]  # used in turn, to save memory
        self.resident = list(fetch_ahead(dataset, kept, trainer.device))

    def _slices(self, epoch: int) -> list[Positions]:
        size, labels = self.trainer.cfg.BATCH_SIZE, self.dataset.split.labels
        order = training_order(labels, size, seed=self.trainer.cfg.SEED, epoch=epoch)
        return batch_slices(order, size)

    def _epoch(self, kind: str, source: BatchSource) -> float:
        progress = Progress(epoch=self.epochs[kind])
        self.epochs[kind] += 1
        self.trainer.meter.sums.zero_()
        synchronise(self.trainer.device)
        start = time.perf_counter()
        slices = self._slices(progress.epoch)
        with closing(source(slices)) as batches:
            begin_epoch(self.trainer, progress.epoch)
            for step, batch in self.keeper.watch(self.trainer, batches, len(slices), progress):
                train_step(self.trainer, batch, progress.epoch, step, len(slices))
        synchronise(self.trainer.device)
        return progress.step * self.trainer.cfg.BATCH_SIZE / (time.perf_counter() - start)

    def from_cache(self) -> float:
        """Images a second of a whole epoch, first batch included; notes the share of waiting."""
        meter, device = WaitMeter(self.trainer.device), self.trainer.device
        start = time.perf_counter()
        rate = self._epoch("cache", lambda s: meter.watch(fetch_ahead(self.dataset, s, device)))
        self.waits.append(100 * meter.seconds() / (time.perf_counter() - start))
        return rate

    def from_device(self) -> float:
        """Images a second of the same epoch where batches lie on the device."""

        def source(slices: Sequence[Positions]) -> Generator[Batch, None, None]:
            for step in range(len(slices)):
                yield self.resident[step % len(self.resident)]

        return self._epoch("resident", source)


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
    trainer = Trainer(cfg, build_model(cfg, len(dataset.classes)), dataset)
    ours = OurEpochs(trainer, dataset, work / "checkpoints")
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
