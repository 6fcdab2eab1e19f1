"""Training in several processes, as ``torchrun`` starts them: each has its share of every batch.

The engine stays what it is. A trainer that takes the process's share of each batch, and a keeper
of which only the first process's writes, go into ``fit`` in place of the usual ones. All processes
hold the same network and see the same figures, so they decide alike.
"""

import contextlib
import gc
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from emotion_toolbox.backbones import batch_norms
from emotion_toolbox.batches import Batch, EmotionDataset
from emotion_toolbox.device import Meter, choose_amp, choose_device
from emotion_toolbox.draws import draw_uniforms, step_seed
from emotion_toolbox.errors import ConfigError, Stopped
from emotion_toolbox.keeper import Keeper, OnEpoch, Progress, Resumable
from emotion_toolbox.measures import Predictions
from emotion_transfer.augment import AUGMENT_DRAWS, apply_augmentation, draw_augmentation
from emotion_transfer.config import EnhancedConfig, train_size
from emotion_transfer.engine import Augment, Trainer, backward
from emotion_transfer.mixing import Mixing, draw_mixing, mix_images, mix_targets, mixing_active
from emotion_transfer.model import EmotionClassifier

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # a large cache takes the first process that long at the most
BEST = ("best_score", "best_loss", "best_epoch", "best_source", "best_file")  # of a Progress
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what torchrun and SLURM send


# --- the processes ------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process; 0, the first, writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many there are, on all machines together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did; all but the first are silent.

    Raises ``ConfigError`` for a `device` that is not in every machine, or not for every process,
    and ``ConnectionError`` where another process has ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    with contextlib.ExitStack() as stack:
        if os.environ["RANK"] != "0":
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, number, size = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(new_name(store, number, size), store)  # type: ignore[attr-defined]
        dist.init_process_group(kinds, store=store, rank=number, world_size=size, timeout=PATIENCE)
        stack.callback(dist.destroy_process_group)
        try:
            take_device(device)
            print(f"{processes()} processes", flush=True)
            yield
        except RuntimeError as error:
            if not any(text in str(error) for text in ("closed by peer", "reset by peer")):
                raise
            if rank():
                sys.exit(1)  # the first one says it
            raise ConnectionError(
                "another process has ended, see there; the same command goes on from the last "
                "checkpoint"
            ) from error


def new_name(store: Any, number: int, size: int) -> str:
    """A name on which these `size` processes agree, and none that torchrun has ended knew.

    Its store outlives a restart, and with it the addresses of processes that are no more. Counting
    restarts will not do: each machine counts its own.
    """
    own = uuid.uuid4().hex
    if number:
        store.set(f"hello/{number}", own)
        name = str(store.get(f"name/{own}").decode())  # waits for it
        store.set(f"met/{name}/{number}", "")
        return name
    waiting = set(range(1, size))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"hello/{other}"]):  # maybe that of one that is no more
                store.set(f"name/{store.get(f'hello/{other}').decode()}", own)
                if store.check([f"met/{own}/{other}"]):
                    waiting.remove(other)
        time.sleep(0.02)
    return own


def take_device(wanted: str) -> None:
    """Take this process's own GPU, or the CPU; what is wrong with it the first process raises."""
    fault = None
    if wanted not in ("auto", "cpu", "cuda"):
        fault = f"DEVICE={wanted!r}: under torchrun it must be auto, cpu or cuda (one a process)"
    else:
        try:
            local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if choose_device(wanted).type == "cuda":
                if local < found:
                    torch.cuda.set_device(local)
                else:
                    fault = f"a machine has {found} GPUs; torchrun --nproc-per-node {found}"
        except ConfigError as error:
            fault = str(error)
    faults: list[str | None] = [None] * processes()
    dist.all_gather_object(faults, fault)
    if any(faults):
        if rank() == 0:
            raise ConfigError(next(filter(None, faults)))
        wait_for_all()


def in_turn(make: Callable[[], T]) -> T:
    """What `make` gives in every process: in the first, then in one a machine, then in all others.

    What it keeps in files is so made once, and found by those that share the disk.
    """
    if not dist.is_initialized():
        return make()
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for _ in range(turn):
        wait_for_all()
    made = make()
    for _ in range(turn, 3):
        wait_for_all()
    return made


def wait_for_all() -> None:
    """Return when all processes have come here."""
    anywhere([False])


def from_first(value: T) -> T:
    """The first process's `value`, in all of them."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Of each flag whether it is set in any process."""
    found = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def check_share(batch_size: int, parts: int) -> None:
    """Raise ``ConfigError`` where a batch does not split evenly over the processes."""
    pieces = processes() * parts
    if batch_size % pieces or batch_size // pieces < 2:
        accumulate = f", ACCUMULATE={parts}" if parts > 1 else ""
        raise ConfigError(
            f"BATCH_SIZE={batch_size}{accumulate}: it is that of all {processes()} processes "
            f"together, and must be a multiple of {pieces}, at least {2 * pieces}"
        )


# --- a share of a batch -------------------------------------------------------------------------


class Share(EmotionDataset):
    """A dataset whose batches hold the pixels of this process's share, and all positions."""

    def __init__(self, whole: EmotionDataset) -> None:
        super().__init__(whole.split, whole.classes, whole.pixels, whole.digest)
        self.whole = whole

    def batch(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Of the images at `positions` those of this process; the positions are those of all."""
        rows = np.asarray(positions, dtype=np.int64)
        images, labels, _ = self.whole.batch(np.split(rows, processes())[rank()])
        return Batch(images, labels, torch.from_numpy(rows))


def rows_needed(mixing: Mixing, own: range) -> npt.NDArray[np.int64]:
    """The rows of a batch that the `own` ones need: these, then partners from other shares."""
    partners = mixing.partner[own.start : own.stop][mixing.lam[own.start : own.stop] < 1].numpy()
    others = np.setdiff1d(partners, np.asarray(own))
    return np.concatenate([np.asarray(own), others]).astype(np.int64)


def mixing_of(mixing: Mixing, rows: npt.NDArray[np.int64]) -> Mixing:
    """`mixing` for the batch that `rows` of the whole one make; a partner not in it is not read."""
    place = {int(row): i for i, row in enumerate(rows)}
    partner = [place.get(int(p), i) for i, p in enumerate(mixing.partner[rows])]
    return Mixing(torch.tensor(partner), mixing.lam[rows], mixing.box[rows])


class SharedMeter(Meter):
    """Counts the images of all processes."""

    def add(self, step: int, loss: Tensor, right: Tensor, images: int, finite: Tensor) -> None:
        """Count a step, of which `images` were this process's."""
        super().add(step, loss, right, images * processes(), finite)


class SharedTrainer(Trainer):
    """A trainer that has one of the equal shares of each batch.

    Gradients are averaged by ``DistributedDataParallel``. BatchNorm that trains takes its
    statistics from all shares on GPUs; on CPUs, where PyTorch cannot, from its own, and the running
    ones are averaged.
    """

    train: Share

    def __init__(
        self, cfg: EnhancedConfig, model: EmotionClassifier, train: EmotionDataset,
        amp: str | None = None, augment: Augment | None = None,
    ) -> None:  # fmt: skip
        device = choose_device(cfg.DEVICE)
        model.to(device)
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        if amp is None:
            model.requires_grad_(True)
            measure = rank() == 0 and not cfg.DETERMINISTIC
            amp = from_first(choose_amp(cfg.AMP, model, train_size(cfg), measure=measure))
        super().__init__(cfg, model, train, amp, augment or self.augment_share)
        self.meter, self.backward = SharedMeter(self.device), self.backward_share
        self.train, self.predict_part = Share(train), self.predict
        self.predict = partial(self.predict_all)
        self.ddp: tuple[Any, Any] | None = None  # for what, and the wrapper

    def augment_share(
        self, trainer: Trainer, batch: Batch, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """The rows of this process of what ``augment_batch`` makes of the whole batch.

        Partners for mixing that lie in another's share are read and augmented here, too.
        """
        cfg, spec, count = self.cfg, self.model.spec, len(batch.labels)
        first, size = step * cfg.BATCH_SIZE, len(batch.positions)
        torch.manual_seed(step_seed(cfg.SEED, epoch, step) + rank())  # each drops out others
        own = range(rank() * count, (rank() + 1) * count)
        rows, images, labels = np.asarray(own), batch.images, batch.labels
        mixing = draw_mixing(cfg, epoch, first, size) if mixing_active(cfg, epoch) else None
        if mixing is not None:
            rows = rows_needed(mixing, own)
            partners = self.train.whole.batch(batch.positions.numpy()[rows[count:]])
            images = torch.cat([images, partners.images.to(images.device)])
            labels = torch.cat([labels, partners.labels.to(labels.device)])
        uniforms = draw_uniforms(cfg.SEED, epoch, first, size, AUGMENT_DRAWS)[rows]
        asked = train_size(cfg), spec.mean, spec.std, self.jitter
        images = apply_augmentation(images, draw_augmentation(cfg, uniforms), *asked)
        targets = F.one_hot(labels, len(self.loss.weight)).to(images.dtype)
        if mixing is not None:
            part = mixing_of(mixing, rows)
            images, targets = mix_images(images, part)[:count], mix_targets(targets, part)[:count]
        return images, targets

    def backward_share(
        self, trainer: Trainer, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``backward`` for the whole batch: its gradients, loss and right answers."""
        network = self.network
        self.network = self.wrapped()
        try:
            losses, right = backward(self, images, targets)
        finally:
            self.network = network
        sums = torch.stack([losses, right])
        dist.all_reduce(sums)
        self.average_statistics()
        return sums[0], sums[1]

    def wrapped(self) -> Any:
        """The network with averaged gradients; made anew when others train than before."""
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        made_for = self.network, trains
        if self.ddp is None or self.ddp[0] != made_for:
            self.ddp = None  # its hooks go before there are new ones
            gc.collect()
            own = [torch.cuda.current_device()] if self.device.type == "cuda" else None
            network = DistributedDataParallel(self.network, own, broadcast_buffers=False)
            self.ddp = made_for, network
        return self.ddp[1]

    @torch.no_grad()
    def average_statistics(self) -> None:
        """The running statistics of the layers that train: the mean over the processes."""
        if self.device.type == "cuda":  # SyncBatchNorm has done it
            return
        layers = [layer for layer in batch_norms(self.model) if layer.training]
        moving = [t for layer in layers for t in layer.buffers() if t.is_floating_point()]
        if moving:
            flat = torch.cat([t.flatten() for t in moving])
            dist.all_reduce(flat)
            parts = torch.split(flat / processes(), [t.numel() for t in moving])
            for old, new in zip(moving, parts, strict=True):
                old.copy_(new.view_as(old))

    def predict_all(
        self, model: EmotionClassifier, dataset: EmotionDataset, *,
        positions: npt.NDArray[np.int64] | None = None, progress: str = "",
    ) -> Predictions:  # fmt: skip
        """As ``predict``, each image by one process."""
        asked = np.arange(len(dataset)) if positions is None else positions
        mine = asked[rank() :: processes()]
        whole = dataset.whole if isinstance(dataset, Share) else dataset
        part = None
        if len(mine):
            part = self.predict_part(model, whole, positions=mine, progress=progress)
        parts: list[Predictions | None] = [None] * processes()
        dist.all_gather_object(parts, part)
        return join_predictions(parts, len(asked))


def join_predictions(parts: Sequence[Predictions | None], images: int) -> Predictions:
    """The answers to so many `images`, of which each of n parts has every n-th; None has none."""
    given = [(i, part) for i, part in enumerate(parts) if part is not None]
    labels = np.empty(images, np.int64)
    probabilities = np.empty((images, given[0][1].probabilities.shape[1]))
    for i, part in given:
        labels[i :: len(parts)], probabilities[i :: len(parts)] = part.labels, part.probabilities
    loss = math.fsum(part.loss * len(part.labels) for _, part in given) / images
    return Predictions(labels, probabilities, loss)


# --- keeping the run ----------------------------------------------------------------------------


@dataclass
class SharedKeeper(Keeper):
    """A keeper that writes in the first process only; what that finds and decides holds for all."""

    model: nn.Module | None = field(default=None, init=False)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """As ``Keeper.lock``; a request to stop may reach any process, and more than once."""
        with super().lock() if rank() == 0 else contextlib.nullcontext():
            previous = [signal.signal(s, lambda *_: self.asked.set()) for s in SIGNALS]
            try:
                yield
            finally:
                for number, handler in zip(SIGNALS, previous, strict=True):
                    signal.signal(number, handler)

    def begin(
        self, settings: Any, model: nn.Module, datasets: Mapping[str, EmotionDataset]
    ) -> dict[str, Any] | None:
        """The newest checkpoint as the first process has read it."""
        self.model = model
        return from_first(super().begin(settings, model, datasets) if rank() == 0 else None)

    def _due(self, step: int) -> bool:
        due = super()._due(step) and rank() == 0  # clocks differ
        stop, due = anywhere([self.asked.is_set(), due])
        if stop:
            self.asked.set()
        return due or stop

    def save(self, training: Resumable, progress: Progress) -> None:
        """Write a checkpoint in the first process; all stop if one was asked to."""
        if anywhere([self.asked.is_set()])[0]:
            self.asked.set()
        if rank() == 0:
            super().save(training, progress)
        elif self.asked.is_set() and not progress.finished:
            raise Stopped

    def save_best(
        self, progress: Progress, score: float, answers: Predictions, payload: Mapping[str, Any]
    ) -> None:
        """Keep the weights in the first process, and note in all what it has noted."""
        if rank() == 0:
            super().save_best(progress, score, answers, payload)
        for name, value in from_first({n: getattr(progress, n) for n in BEST}).items():
            setattr(progress, name, value)

    def load_best(self, progress: Progress) -> dict[str, Any]:
        """The best model; in other processes, which train no more, the model as it is."""
        if rank() == 0:
            return super().load_best(progress)
        assert self.model is not None
        return {"model": self.model.state_dict()}


def engine_parts(
    on_epoch: OnEpoch | None = None,
) -> tuple[Callable[..., Trainer], Callable[..., Keeper]]:
    """What ``fit`` is to make, for one process or several: a trainer, and a keeper that reports."""
    shared = dist.is_initialized()
    trainer, keeper = (SharedTrainer, SharedKeeper) if shared else (Trainer, Keeper)
    return trainer, partial(keeper, on_epoch=on_epoch)
