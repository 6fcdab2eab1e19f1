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
from typing import Any

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
    CheckpointError, ConfigError, DivergedError, Stopped, WeightsError,
)  # fmt: skip
from emotion_toolbox.files import resolve_path, write_atomically, write_text
from emotion_toolbox.measures import Predictions
from emotion_toolbox.settings import changed_settings, settings_hash, settings_to_json

# name: position, the beginning of its best model's SHA-256 (or zeros), that of its own
CHECKPOINT_NAME = re.compile(r"epoch(\d+)-step(\d+)-best[0-9a-f]{8}-[0-9a-f]{16}\.pt")
BEST_NAMES = f"best-epoch*-{16 * '[0-9a-f]'}.pt"  # a pattern for glob
OnEpoch = Callable[[Mapping[str, Any], Predictions], object]  # an epoch's row, answers to val


@dataclass
class Progress:
    """Where a run is: plain values only, so that it can be stored as it is."""

    epoch: int = 0
    step: int = 0  # within the epoch; the number of steps done
    best_score: float = -math.inf
    best_loss: float = math.inf  # of that epoch; decides between equal scores
    best_epoch: int = -1  # that of the start, which comes before epoch 0
    best_source: str = "raw"  # or "ema"
    best_file: str | None = None
    waiting: int = 0  # epochs without a better score since everything trains
    bad_streak: int = 0  # non-finite steps in a row
    epoch_seconds: float = 0.0  # training time, so far
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
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        if self.epoch == epochs:
            self.finished = "all epochs done"
        elif patience is not None and self.waiting >= patience:
            self.finished = f"stopped early: nothing better for {patience} epochs"

    def result(self, amp: str, device: str) -> "FitResult":
        """The run summed up."""
        history = pd.DataFrame(self.history)
        trained = history[history["epoch"] > 0]
        seconds = trained["seconds"].sum()
        speed = np.average(trained["images_per_second"], weights=trained["seconds"])
        return FitResult(
            history, self.best_epoch + 1, self.best_source, self.best_score, amp, device,
            float(seconds), float(speed), self.finished,
        )  # fmt: skip


@dataclass(frozen=True)
class FitResult:
    """The outcome of a run; the best weights are in the model that was trained."""

    history: pd.DataFrame  # one row an epoch; 0 is the start
    best_epoch: int
    best_source: str  # "raw" or "ema"
    best_score: float
    amp: str
    device: str
    seconds: float
    images_per_second: float
    finished: str  # why it ended


def epoch_line(row: Mapping[str, Any], epochs: int, best: bool) -> str:
    """An epoch in one line of at most 80 characters; `best` marks it."""
    ema, loss = row.get("val_ema_macro_f1"), row.get("train_loss")
    average = f" (average {ema:.3f})" if ema is not None else ""
    begin = "start" if loss is None else f"loss {loss:.3f}"
    return (
        f"epoch {row['epoch']}/{epochs}: {begin}, val {row['val_loss']:.3f}, "
        f"F1 {row['val_macro_f1']:.3f}{average}, gap {row['gap']:+.2f}{' *' if best else ''}"
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

    Raises ``CheckpointError`` if its bytes do not match its name or hold more than tensors and
    plain values, ``OSError`` if it is there but cannot be read, which is no damage.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest()[:16] != path.stem[-16:]:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    try:
        return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except MemoryError:
        raise
    except Exception as error:  # a hostile pickle may raise anything
        raise CheckpointError(f"{path} holds more than tensors and plain values") from error


# --- the files of a run -------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; raises ``OSError`` if it cannot be read."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = [match for name in names if (match := CHECKPOINT_NAME.fullmatch(name))]
    found.sort(key=lambda match: (int(match[1]), int(match[2])), reverse=True)
    return [folder / match[0] for match in found]


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest sound checkpoint in `folder`, or None where there is none at all.

    Damaged ones are set aside, so that they count among the last no more; raises
    ``CheckpointError`` if all are.
    """
    found = list_checkpoints(folder)
    for number, path in enumerate(found):
        try:
            saved = load_verified(path)
        except CheckpointError as error:
            print(f"{error}; trying the checkpoint before it")
            continue
        for damaged in found[:number]:
            damaged.rename(damaged.with_suffix(".damaged"))
        return forget_lost_best(folder, saved)
    if found:
        said = f"all {len(found)} checkpoints in {folder} are damaged; delete it to start anew"
        raise CheckpointError(said)
    return None


def forget_lost_best(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """`saved`, without its best model if that is damaged; ``CheckpointError`` if it is complete."""
    try:
        if saved["best_file"]:
            load_verified(folder / saved["best_file"])
        return saved
    except CheckpointError as error:
        if saved["finished"]:
            said = f"{error}, and the run is complete; delete {folder} to train anew"
            raise CheckpointError(said) from error
        print(f"{error}; training goes on, and the best of the epochs to come counts")
        return {**saved, "best_file": None, "best_score": -math.inf}


def save_checkpoint(folder: Path, payload: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint for the position in `payload`, then remove what it makes superfluous.

    Those are checkpoints beyond the last `keep`, and best models that none of them refers to.
    """
    best = payload["best_file"]
    needs = Path(best).stem[-16:-8] if best else "0" * 8
    stem = f"epoch{payload['epoch']:03d}-step{payload['step']:06d}-best{needs}"
    path = save_with_digest(folder, stem, payload)
    found = list_checkpoints(folder)
    for old in found[keep:]:
        old.unlink(missing_ok=True)
    for file in folder.glob(BEST_NAMES):
        if not any(f"-best{file.stem[-16:-8]}-" in kept.name for kept in found[:keep]):
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


@dataclass
class Keeper:
    """Keeps the run whose checkpoints lie in `folder`."""

    folder: Path
    every: float  # seconds between two checkpoints inside an epoch
    steps: int | None = None  # and one after every so many steps of an epoch
    keep: int = 2  # so many checkpoints
    on_error: str = "stop"  # where the disk refuses a checkpoint, or "continue" without it
    bad_steps: int = 10  # so many in a row that are not finite end the run
    on_epoch: OnEpoch | None = None
    last: float = field(default_factory=time.monotonic, init=False)  # when it saved
    asked: threading.Event = field(default_factory=threading.Event, init=False)  # to stop
    identity: dict[str, Any] = field(default_factory=dict, init=False)
    answers: Predictions = field(init=False)  # to the validation images, by the latest weights

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out, and make Ctrl-C or the stop button wait for a step to end.

        Raises ``ConfigError`` where another process is training.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0), deferred_interrupt(self.asked):
                leftovers = [*self.folder.glob(".*.tmp"), *self.folder.parent.glob(".*.[0-9]*.tmp")]
                for leftover in leftovers:
                    leftover.unlink()
                yield
        except Timeout as error:
            busy = f"another process is training in {self.folder}"
            raise ConfigError(f"{busy}; wait for it, or choose another RUN_NAME") from error

    def begin(
        self, settings: Any, model: nn.Module, datasets: Mapping[str, EmotionDataset]
    ) -> dict[str, Any] | None:
        """The newest sound checkpoint of this run, None where it is new.

        Whose run it is stands from now on in every checkpoint and, for people, in ``config.json``.
        Raises ``ConfigError`` if the folder holds a run with other settings, classes or images, or
        the model was made for another; ``CheckpointError`` if its checkpoints are all damaged.
        """
        text = settings_to_json(settings)
        classes = list(datasets["train"].classes)
        data = {name: datasets[name].fingerprint() for name in ("train", "val")}
        self.identity = {"config": json.loads(text), "classes": classes, "data": data}
        saved = load_newest(self.folder)
        if saved is not None:
            changed = changed_settings(settings, saved["config"])
            refuse_other_run(changed, saved, self.identity, datasets, settings.RUN_NAME == "auto")
        refuse_other_model(model, settings, self.folder, new=saved is None)
        with self._writing():
            write_text(self.folder.parent / "config.json", text + "\n")
        return saved

    def resume(self, training: Resumable, saved: Mapping[str, Any] | None) -> Progress:
        """Bring `training` to the state `saved`, or save that of a new run; says which."""
        print(f"{device_name(training.device)}, {AMP_NAMES[training.amp]}", end="; ")
        if saved is None:  # keeps the measured precision, and a full disk shows at once
            print("a new run")
            progress = Progress()
            self.save(training, progress)
            return progress
        training.load_state_dict(saved)
        progress = Progress(**{f.name: saved[f.name] for f in dataclasses.fields(Progress)})
        if progress.finished:
            print(f"this run is complete ({progress.finished}); its best weights are loaded")
        else:
            print(f"resuming at epoch {progress.epoch + 1}, step {progress.step + 1}")
        return progress

    def watch(
        self, training: Resumable, batches: Iterable[Batch], steps: int, progress: Progress
    ) -> Iterator[tuple[int, Batch]]:
        """Yield number and batch of each step of an epoch; after each, report, and save when due.

        Raises ``DivergedError`` after too many non-finite steps in a row, and what ``save`` does.
        """
        first, begun = progress.step, time.perf_counter() - progress.epoch_seconds
        unread: list[tuple[int, npt.NDArray[np.int64]]] = []
        meter, label = training.meter, f"epoch {progress.epoch + 1}"
        with tqdm(batches, label, steps, initial=first, unit="step", leave=False) as bar:
            for step, batch in enumerate(bar, start=first):
                yield step, batch
                if step == first:
                    check_gradients(training.model)
                unread.append((step, batch.positions.numpy()))
                progress.step = step + 1
                saving = self._due(progress.step)
                if saving or progress.step % len(meter.finite) == 0 or progress.step == steps:
                    self._report(meter.finite.tolist(), unread, training.train, progress)
                    bar.set_postfix(loss=f"{meter.read().loss:.3f}")
                progress.epoch_seconds = time.perf_counter() - begun
                if saving:
                    self.save(training, progress)

    def _due(self, step: int) -> bool:
        enough = self.steps is not None and step % self.steps == 0
        return enough or time.monotonic() - self.last >= self.every or self.asked.is_set()

    def report(self, progress: Progress, epochs: int) -> None:
        """Print the latest row of the history and pass it on; once more if killed before a save."""
        row, best = progress.history[-1], progress.best_epoch == progress.epoch - 1
        print(epoch_line(row, epochs, best), flush=True)
        if self.on_epoch is not None:
            self.on_epoch(row, self.answers)

    def end_epoch(self, training: Resumable, progress: Progress, epochs: int) -> None:
        """Report and save the epoch that `progress` has just left; raises ``Stopped`` if asked."""
        self.report(progress, epochs)
        self.save(training, progress)

    def save(self, training: Resumable, progress: Progress) -> None:
        """Write a checkpoint and, for people, its history.

        Raises ``CheckpointError`` if it cannot be written and the run is to stop then, and
        ``Stopped`` if that was asked for and there is more to train.
        """
        saved, self.last = False, time.monotonic()
        state = {**dataclasses.asdict(progress), **self.identity, **training.state_dict()}
        with self._writing():
            save_checkpoint(self.folder, state, self.keep)
            saved = True
        table = self.folder.parent / "history.csv"
        try:
            if saved and progress.history:
                write_text(table, pd.DataFrame(progress.history).to_csv(index=False))
        except OSError as error:  # the checkpoint holds the same
            tqdm.write(f"WARNING: {table} could not be written ({error})")
        if self.asked.is_set() and not progress.finished:
            how = "stopped and saved" if saved else "stopped, but not saved; free some disk space"
            place = "here" if saved else "the last checkpoint"
            raise Stopped(f"{how}; run this cell again to go on from {place}")

    def save_best(
        self, progress: Progress, score: float, answers: Predictions, payload: Mapping[str, Any]
    ) -> None:
        """Keep the weights of `payload` if they are the best so far, and note it in `progress`."""
        self.answers, loss = answers, answers.loss
        better = (score, -loss) > (progress.best_score, -progress.best_loss)
        if better or progress.best_file is None:
            stem = f"best-epoch{progress.epoch:03d}"
            with self._writing():
                file = save_with_digest(self.folder, stem, {**payload, "epoch": progress.epoch})
                progress.best_score, progress.best_loss = score, loss
                progress.best_epoch = progress.epoch if progress.history else -1  # the start
                progress.best_file = file.name
                progress.best_source = payload["source"]

    def load_best(self, progress: Progress) -> dict[str, Any]:
        """The best model; raises ``CheckpointError`` where none could be kept."""
        if progress.best_file is None:
            raise CheckpointError(f"no best model could be kept in {self.folder}; free disk space")
        return load_verified(self.folder / progress.best_file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what to do about a disk that refuses a file, and stop or go on as `on_error` says."""
        try:
            yield
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
            place = f"epoch {progress.epoch + 1}, step {step + 1}"
            message = f"{place}: loss or gradients not finite ({shown})"
            if progress.bad_streak >= self.bad_steps:
                raise DivergedError(
                    f"{message}; {progress.bad_streak} such steps in a row. The last good "
                    "checkpoint is kept. Lower LR_HEAD and LR_BACKBONE or GRAD_CLIP in a new run, "
                    "or set AMP='off'"
                )
            tqdm.write(f"WARNING: {message}; the step is skipped")
        unread.clear()


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
    changed: Sequence[str], saved: Mapping[str, Any], now: Mapping[str, Any],
    datasets: Mapping[str, EmotionDataset], automatic: bool,
) -> None:  # fmt: skip
    """Raise ``ConfigError`` if settings have `changed`, or `saved` is of other classes or images.

    Neither the old nor the new settings would explain the result. Says what to do where the
    folder's name is `automatic`, or was chosen.
    """
    lines = list(changed)
    if now["classes"] != saved["classes"]:
        lines.append(f"  classes: {saved['classes']} before, {now['classes']} now")
    for name, fingerprint in now["data"].items():
        if saved["data"][name] != fingerprint:
            csv = datasets[name].split.csv
            lines.append(f"  the images or the labels in {csv} have changed")
    advice = (
        "Run the cell that makes the run's folder again: these settings have their own"
        if automatic
        else "Set them back to resume it, or choose another RUN_NAME to begin a new run (with "
        "INIT_FROM to start from these weights)"
    )
    if lines:
        raise ConfigError("\n".join(["this run was begun with other settings:", *lines, advice]))


def refuse_other_model(model: nn.Module, settings: Any, folder: Path, *, new: bool) -> None:
    """Raise ``ConfigError`` if `model` was made for other settings, or a `new` run finds it used.

    ``model.made_for`` is the hash of its settings and, once it trains, the folder of its run.
    """
    fits = settings_hash(settings), *(() if new else (str(folder),))
    if getattr(model, "made_for", None) not in (None, *fits):
        raise ConfigError(
            "this model was made for other settings, or has trained in another run; run the cell "
            "that builds it again"
        )
    model.made_for = str(folder)  # type: ignore[assignment]


def load_initial_weights(
    model: nn.Module, init_from: str | None, classes: Sequence[str], run_dir: Path
) -> None:
    """Load the export folder or best model `init_from` into `model`; None changes nothing.

    Nor is the file needed where `run_dir` holds checkpoints, for then the run goes on from those.
    Raises ``WeightsError`` if it cannot be read, or is of other classes or another network.
    """
    if init_from is None or list_checkpoints(run_dir / "checkpoints"):
        return
    path, begin = resolve_path(init_from), f"INIT_FROM={init_from!r}"
    try:
        if path.is_dir():
            about = json.loads((path / "config.json").read_text(encoding="utf-8"))
            about["model"] = load_file(path / "model.safetensors")
        elif re.search(r"-[0-9a-f]{16}$", path.stem):
            about = load_verified(path)
        else:  # renamed, so without a checksum
            about = torch.load(path, map_location="cpu", weights_only=True)
        state, names = about["model"], list(about["classes"])
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
