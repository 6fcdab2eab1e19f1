"""Keeping a run: checkpoints whole or absent and verified, a lock, a stop that saves, a resume."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import GradScaler
from tqdm.auto import tqdm

from emotion_toolbox.backbones import refuse_nonfinite
from emotion_toolbox.batches import Batch, EmotionDataset
from emotion_toolbox.device import AMP_NAMES, Meter, check_gradients, device_name
from emotion_toolbox.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    Stopped,
    WeightsError,
)
from emotion_toolbox.files import resolve_path, write_atomically, write_text
from emotion_toolbox.settings import changed_settings, settings_to_json

T = TypeVar("T")

# name: position, the beginning of its best model's SHA-256 (or zeros), that of its own
CHECKPOINT_NAME = re.compile(r"epoch(\d+)-step(\d+)-best([0-9a-f]{8})-([0-9a-f]{16})\.pt")
OLD_NAME = re.compile(r"epoch\d+-step\d+-[0-9a-f]{16}\.pt")
BEST_NAME = re.compile(r"best-epoch\d+-([0-9a-f]{16})\.pt")
CHECKPOINT_KEYS = {"epoch", "step", "best_file", "best_score", "finished", "model", "optimizer"}


@dataclass
class Progress:
    """Where a run is: plain values only, so that it can be stored as it is."""

    epoch: int = 0
    step: int = 0  # within the epoch; the number of steps done
    best_score: float = -math.inf
    best_loss: float = math.inf  # of that epoch; decides between equal scores
    best_epoch: int = -1
    best_source: str = "raw"  # or "ema"
    best_file: str | None = None
    waiting: int = 0  # epochs without a better score since everything trains
    bad_streak: int = 0  # non-finite steps in a row
    seconds: float = 0.0  # training time so far
    epoch_seconds: float = 0.0
    finished: str = ""  # why the run ended, once it has
    history: list[dict[str, Any]] = field(default_factory=list)

    def end_epoch(
        self, figures: Mapping[str, Any], images: int, epochs: int, patience: int | None
    ) -> None:
        """Add the epoch's `figures` to the history and go to the next of `epochs`, or end the run.

        Without a better epoch for `patience` epochs it ends early; None: not counted yet.
        """
        seconds, better = self.epoch_seconds, self.best_epoch == self.epoch
        speed = {"seconds": seconds, "images_per_second": images / max(seconds, 1e-9)}
        self.history.append({"epoch": self.epoch + 1, **figures, **speed})
        self.waiting = 0 if better else self.waiting + (patience is not None)
        self.seconds += seconds
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        if self.epoch == epochs:
            self.finished = "all epochs done"
        elif patience is not None and self.waiting >= patience:
            self.finished = f"stopped early: nothing better for {patience} epochs"

    def result(self, amp: str, device: str) -> "FitResult":
        """The run summed up."""
        history = pd.DataFrame(self.history)
        images = float((history["images_per_second"] * history["seconds"]).sum())
        return FitResult(
            history, self.best_epoch + 1, self.best_source, self.best_score, amp, device,
            self.seconds, images / max(self.seconds, 1e-9), self.finished,
        )  # fmt: skip


@dataclass(frozen=True)
class FitResult:
    """The outcome of a run; the best weights are in the model that was trained."""

    history: pd.DataFrame  # one row an epoch
    best_epoch: int  # from 1
    best_source: str  # "raw" or "ema"
    best_score: float
    amp: str
    device: str
    seconds: float
    images_per_second: float
    finished: str  # why it ended


def highest_rates(rates: Callable[[int], tuple[float, float]], steps: int) -> dict[str, float]:
    """The highest learning rates of an epoch, from those of head and backbone at each step."""
    heads, backbones = zip(*map(rates, range(steps)), strict=True)
    return {"lr_head": max(heads), "lr_backbone": max(backbones)}


def epoch_line(row: Mapping[str, Any], epochs: int, best: bool) -> str:
    """An epoch in one line of at most 80 characters; `best` marks it."""
    ema = row.get("val_ema_macro_f1")
    average = f" (average {ema:.3f})" if ema is not None else ""
    skipped = f" {row['skipped_steps']} skipped" if row["skipped_steps"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}, val {row['val_loss']:.3f}, "
        f"F1 {row['val_macro_f1']:.3f}{average}, gap {row['gap']:+.2f}"
        f"{' *' if best else ''}{skipped}"
    )


# --- one file -----------------------------------------------------------------------------------


def save_with_digest(folder: Path, stem: str, payload: Mapping[str, Any]) -> Path:
    """Write `payload` as ``<stem>-<SHA-256>.pt`` into `folder`; raises ``OSError`` if it cannot."""
    buffer = io.BytesIO()
    torch.save(dict(payload), buffer)
    content = buffer.getbuffer()
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    write_atomically(path, lambda file: file.write(content))
    return path


def load_verified(path: Path) -> dict[str, Any]:
    """Read a file of ``save_with_digest`` to the CPU; no code in it is run.

    Raises:
        CheckpointError: if its bytes do not match its name, or it holds anything but tensors and
            plain values.
        OSError: if it is there but cannot be read (no permission, say): that is no damage.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest()[:16] != path.stem[-16:]:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    try:
        payload: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # a hostile pickle may raise anything
        raise CheckpointError(f"{path} holds more than tensors and plain values") from error
    return payload


# --- the files of a run -------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; raises ``OSError`` if it cannot be read."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = [(match, folder / name) for name in names if (match := CHECKPOINT_NAME.fullmatch(name))]
    found.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2])), reverse=True)
    return [path for _, path in found]


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest sound checkpoint in `folder`, or None where there is none at all.

    One whose best model is damaged is passed over like a damaged one, while another is left.

    Raises:
        CheckpointError: if there are checkpoints and none can be used.
    """
    refused: list[Path] = []
    spare: tuple[int, dict[str, Any]] | None = None  # sound but for its best model
    for path in list_checkpoints(folder):
        payload = None
        try:
            payload = load_state(path)
            if payload["best_file"]:
                load_verified(folder / payload["best_file"])
        except CheckpointError as error:
            print(f"{error}; trying the checkpoint before it")
            if payload is not None and spare is None:
                spare = len(refused), payload
            refused.append(path)
            continue
        set_aside(refused)
        return payload
    if spare is not None:
        set_aside(refused[: spare[0]])
        return forget_best(folder, spare[1])
    if refused:
        raise CheckpointError(
            f"all {len(refused)} checkpoints in {folder} are damaged; delete it to start anew"
        )
    if folder.is_dir() and (old := [n for n in os.listdir(folder) if OLD_NAME.fullmatch(n)]):
        raise CheckpointError(
            f"{folder / max(old)} was written by an older version, which this one does not read; "
            "finish that run with it, or choose another RUN_NAME"
        )
    return None


def load_state(path: Path) -> dict[str, Any]:
    """A verified checkpoint; raises ``CheckpointError`` also for other content under its name."""
    payload = load_verified(path)
    if not isinstance(payload, dict) or not payload.keys() >= CHECKPOINT_KEYS:
        raise CheckpointError(f"{path} holds something else than a checkpoint")
    return payload


def set_aside(paths: Sequence[Path]) -> None:
    """Rename checkpoints that cannot be used, so that they count among the last no more."""
    for path in paths:
        path.rename(path.with_suffix(".damaged"))


def forget_best(folder: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """`payload` as that of a run without a best model; raises ``CheckpointError`` if it is over."""
    if payload["finished"]:
        raise CheckpointError(
            f"the run in {folder} is complete but its best model {payload['best_file']} is "
            "damaged; delete the folder to train anew"
        )
    print("no best model is left; training goes on, and the best of the epochs to come counts")
    return {**payload, "best_file": None, "best_score": -math.inf}


def save_checkpoint(folder: Path, payload: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint for the position in `payload`, then remove what it makes superfluous.

    Those are checkpoints beyond the last `keep`, and best models that none of them refers to.
    """
    best = payload["best_file"]
    needs = best.rpartition("-")[2][:8] if best else "0" * 8
    stem = f"epoch{payload['epoch']:03d}-step{payload['step']:06d}-best{needs}"
    path = save_with_digest(folder, stem, payload)
    found = list_checkpoints(folder)
    for old in found[keep:]:
        old.unlink(missing_ok=True)
    needed = {match[3] for p in found[:keep] if (match := CHECKPOINT_NAME.fullmatch(p.name))}
    for file in folder.glob("best-*.pt"):
        if (match := BEST_NAME.fullmatch(file.name)) and match[1][:8] not in needed:
            file.unlink(missing_ok=True)
    return path


# --- a run --------------------------------------------------------------------------------------


class Resumable:
    """What a keeper must know of whatever trains; its state is tensors and plain values."""

    model: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    train: EmotionDataset
    meter: Meter
    device: torch.device
    amp: str

    def _parts(self) -> dict[str, Any]:
        average = {} if self.average is None else {"ema": self.average}
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, **average}

    def state_dict(self) -> dict[str, Any]:
        """The whole state."""
        states = {name: part.state_dict() for name, part in self._parts().items()}
        return {**states, "meter": self.meter.sums, "amp": self.amp}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that ``state_dict`` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.meter.sums.copy_(state["meter"])


class Keeper:
    """Keeps the run whose checkpoints lie in `folder`.

    Args:
        every: seconds between two checkpoints inside an epoch; `steps` likewise, or None.
        keep: how many are kept.
        on_error: "stop" the run where the disk refuses a checkpoint, or "continue" without it.
        bad_steps: so many steps in a row that are not finite end the run.
    """

    def __init__(
        self, folder: Path, every: float, steps: int | None = None, keep: int = 2,
        on_error: str = "stop", bad_steps: int = 10,
    ) -> None:  # fmt: skip
        self.folder, self.every, self.steps = folder, every, steps
        self.keep, self.on_error, self.bad_steps = keep, on_error, bad_steps
        self.last, self.done = time.monotonic(), 0
        self.asked = threading.Event()  # to stop
        self.identity: dict[str, Any] = {}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out, and make Ctrl-C or the stop button wait for a step to end.

        Raises:
            ConfigError: where another process is training.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0), deferred_interrupt(self.asked):
                leftovers = [*self.folder.glob(".*.tmp"), *self.folder.parent.glob(".*.[0-9]*.tmp")]
                for leftover in leftovers:
                    leftover.unlink()
                yield
        except Timeout as error:
            raise ConfigError(
                f"another process is training in {self.folder}; wait for it, or choose another "
                "RUN_NAME"
            ) from error

    def begin(self, settings: Any, datasets: Mapping[str, EmotionDataset]) -> dict[str, Any] | None:
        """The newest sound checkpoint of this run, None where it is new.

        Whose run it is stands from now on in every checkpoint and, for people, in ``config.json``.

        Raises:
            ConfigError: if the folder holds a run with other settings, classes or images.
            CheckpointError: if its checkpoints are all damaged.
        """
        saved = load_newest(self.folder)
        if saved is not None:
            refuse_other_run(changed_settings(settings, saved["config"]), saved, datasets)
        text = settings_to_json(settings)
        classes = list(datasets["train"].classes)
        data = {name: datasets[name].fingerprint() for name in ("train", "val")}
        self.identity = {"config": json.loads(text), "classes": classes, "data": data}
        self._write(lambda: write_text(self.folder.parent / "config.json", text + "\n"))
        return saved

    def resume(self, training: Resumable, saved: Mapping[str, Any] | None) -> Progress:
        """Bring `training` to the state `saved`, or save that of a new run; says which."""
        print(f"{device_name(training.device)}, {AMP_NAMES[training.amp]}", end="; ")
        progress = Progress()
        if saved is not None:
            training.load_state_dict(saved)
            names = (f.name for f in dataclasses.fields(Progress))
            progress = Progress(**{name: saved[name] for name in names})
            if progress.finished:
                print(f"this run is complete ({progress.finished}); its best weights are loaded")
            else:
                print(f"resuming at epoch {progress.epoch + 1}, step {progress.step + 1}")
        else:  # keeps the measured precision, and finds a full disk before it costs an hour
            print("a new run")
            self.save(training, progress)
        return progress

    def watch(
        self, training: Resumable, batches: Iterable[Batch], steps: int, progress: Progress
    ) -> Iterator[tuple[int, Batch]]:
        """Yield number and batch of each step of an epoch; after each, report, and save when due.

        Raises:
            Stopped: after saving, if that was asked for.
            DivergedError: after too many non-finite steps in a row.
        """
        first, begun = progress.step, time.perf_counter() - progress.epoch_seconds
        unread: list[tuple[int, npt.NDArray[np.int64]]] = []
        every, meter = len(training.meter.finite), training.meter
        label = f"epoch {progress.epoch + 1}"
        with tqdm(total=steps, initial=first, desc=label, unit="step", leave=False) as bar:
            for step, batch in enumerate(batches, start=first):
                yield step, batch
                if step == first:
                    check_gradients(training.model)
                unread.append((step, batch.positions.numpy()))
                progress.step, stopping = step + 1, self.asked.is_set()
                saving = self.due() or stopping
                if progress.step % every == 0 or progress.step == steps or saving:
                    self._report(meter.finite.tolist(), unread, training.train, progress)
                    bar.set_postfix(loss=f"{meter.read().loss:.3f}")
                progress.epoch_seconds = time.perf_counter() - begun
                saved = saving and self.save(training, progress)
                bar.update()
                if stopping:  # asked for later, the next step or the epoch's end sees to it
                    raise stop_message(saved)

    def end_epoch(self, training: Resumable, progress: Progress, epochs: int) -> None:
        """Save and report the epoch that `progress` has just left; raises ``Stopped`` if asked."""
        saved = self.save(training, progress)
        best = progress.best_epoch == progress.epoch - 1
        print(epoch_line(progress.history[-1], epochs, best), flush=True)
        if self.asked.is_set() and not progress.finished:
            raise stop_message(saved)

    def due(self) -> bool:
        """Whether a checkpoint is due; asked once a step."""
        self.done += 1
        enough = self.steps is not None and self.done >= self.steps
        return enough or time.monotonic() - self.last >= self.every

    def save(self, training: Resumable, progress: Progress) -> bool:
        """Write a checkpoint and, for people, its history; whether the checkpoint was written.

        Raises:
            CheckpointError: if it was not, and the run is to stop then.
        """
        self.last, self.done = time.monotonic(), 0
        state = {**dataclasses.asdict(progress), **self.identity, **training.state_dict()}
        saved = self._write(lambda: save_checkpoint(self.folder, state, self.keep))
        table = self.folder.parent / "history.csv"
        try:
            if saved and progress.history:
                write_text(table, pd.DataFrame(progress.history).to_csv(index=False))
        except OSError as error:  # the checkpoint holds the same
            tqdm.write(f"WARNING: {table} could not be written ({error})")
        return bool(saved)

    def save_best(
        self, progress: Progress, score: float, loss: float, payload: Mapping[str, Any]
    ) -> None:
        """Keep the weights of `payload` if they are the best so far, and note it in `progress`."""
        better = (score, -loss) > (progress.best_score, -progress.best_loss)
        if better or progress.best_file is None:
            stem = f"best-epoch{progress.epoch:03d}"
            payload = {**payload, "epoch": progress.epoch}
            if path := self._write(lambda: save_with_digest(self.folder, stem, payload)):
                progress.best_score, progress.best_loss = score, loss
                progress.best_epoch, progress.best_file = progress.epoch, path.name
                progress.best_source = payload["source"]

    def load_best(self, progress: Progress) -> dict[str, Any]:
        """The best model; raises ``CheckpointError`` where none could be kept."""
        if progress.best_file is None:
            raise CheckpointError(
                f"no best model could be kept in {self.folder}; free some disk space"
            )
        return load_verified(self.folder / progress.best_file)

    def _write(self, write: Callable[[], T]) -> T | None:
        try:
            return write()
        except OSError as error:
            free = ""
            with contextlib.suppress(OSError):  # the disk itself may be gone
                free = f"; {shutil.disk_usage(self.folder).free / 1e6:.0f} MB free"
            message = (
                f"the checkpoint could not be written to {self.folder} ({error}{free}); the one "
                "before it is untouched. Free some space, or set OUTPUT_ROOT to another disk"
            )
            if self.on_error == "stop":
                raise CheckpointError(message) from error
            tqdm.write(f"WARNING: {message}. Training goes on, as ON_SAVE_ERROR says")
            return None

    def _report(
        self, flags: Sequence[bool], unread: list[tuple[int, npt.NDArray[np.int64]]],
        train: EmotionDataset, progress: Progress,
    ) -> None:  # fmt: skip
        """Name the unread steps that were not finite; raises ``DivergedError`` after too many."""
        for step, positions in unread:
            progress.bad_streak = 0 if flags[step % len(flags)] else progress.bad_streak + 1
            if progress.bad_streak == 0:
                continue
            files = [train.split.files[i] for i in positions]
            shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if files[4:] else "")
            message = (
                f"epoch {progress.epoch + 1}, step {step + 1}: loss or gradients not finite "
                f"({shown})"
            )
            if progress.bad_streak >= self.bad_steps:
                raise DivergedError(
                    f"{message}; {progress.bad_streak} such steps in a row. The last good "
                    "checkpoint is kept. Lower LR_HEAD and LR_BACKBONE or GRAD_CLIP in a new run, "
                    "or set AMP='off'"
                )
            tqdm.write(f"WARNING: {message}; the step is skipped")
        unread.clear()


def stop_message(saved: bool) -> Stopped:
    """What ends a run that was asked to stop, with how to go on."""
    if saved:
        return Stopped("stopped and saved; run this cell again to go on from here")
    return Stopped(
        "stopped, but not saved; free some disk space and run this cell again: it goes on from the "
        "last checkpoint"
    )


@contextlib.contextmanager
def deferred_interrupt(asked: threading.Event) -> Iterator[None]:
    """Let Ctrl-C or Jupyter's stop button set `asked`; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def refuse_other_run(
    changed: Sequence[str], saved: Mapping[str, Any], datasets: Mapping[str, EmotionDataset]
) -> None:
    """Raise ``ConfigError`` if settings have `changed`, or `saved` is of other classes or images.

    Neither the old nor the new settings would explain the result.
    """
    lines = list(changed)
    classes = list(datasets["train"].classes)
    if classes != saved["classes"]:
        lines.append(f"  classes: {saved['classes']} before, {classes} now")
    for name, fingerprint in saved["data"].items():
        if datasets[name].fingerprint() != fingerprint:
            csv = datasets[name].split.csv
            lines.append(f"  the images or the labels in {csv} have changed")
    if lines:
        raise ConfigError(
            "this run was begun with other settings:\n" + "\n".join(lines) + "\n"
            "Set them back to resume it, or choose another RUN_NAME to begin a new run (with "
            "INIT_FROM to start from these weights)"
        )


def load_initial_weights(
    model: nn.Module, init_from: str | None, classes: Sequence[str], run_dir: Path
) -> None:
    """Load the export folder or best model `init_from` into `model`; None changes nothing.

    Nor is the file needed where `run_dir` holds checkpoints, for then the run goes on from those.

    Raises:
        WeightsError: if it cannot be read, or is of other classes or another network.
    """
    if init_from is None or list_checkpoints(run_dir / "checkpoints"):
        return
    path, begin = resolve_path(init_from), f"INIT_FROM={init_from!r}"
    try:
        if path.is_dir():
            state = load_file(path / "model.safetensors")
            about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        elif re.search(r"-[0-9a-f]{16}$", path.stem):
            about = load_verified(path)
            state = about["model"]
        else:
            about = torch.load(path, map_location="cpu", weights_only=True)
            state = about["model"]
        names = list(about["classes"])
    except Exception as error:  # an unpickler may raise anything on a damaged file
        why = type(error).__name__  # torch's own text would advise to run what the file holds
        raise WeightsError(
            f"{begin} is neither a sound export folder nor a sound best-*.pt ({why})"
        ) from error
    if names != list(classes):
        raise WeightsError(f"{begin} has the classes {names}, not {list(classes)}")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise WeightsError(f"{begin} does not fit: {first}") from error
    refuse_nonfinite(model, begin)


def keep_result(
    file: Path, key: str, make: Callable[[], dict[str, Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The arrays (or numbers, texts) that `make` gives for `key`, kept in `file` for next time."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                return {name: kept[name] for name in kept.files}
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive may raise anything
        print(f"{file} is damaged ({error}); it is made again")
    found = {"key": key, **make()}
    write_atomically(file, lambda target: np.savez(target, **found))
    return {name: np.asarray(value) for name, value in found.items()}
