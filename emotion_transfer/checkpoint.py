"""Checkpoints that survive: written whole or not at all, verified before use."""

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

# %% [markdown]
# #### Files that are whole or absent
#
# A program can be killed between any two instructions, a disk can fill up in the middle of a file,
# and a machine can lose power with data still in its write cache. The order of operations below
# survives all three: write to a temporary file, force it to disk, give it its final name (which
# happens entirely or not at all), force the folder's entry to disk.


# %%
class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears as `path` only when complete and on disk.

    Raises:
        OSError: if the disk is full, say; a previous `path` is then still as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system lets one open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# %% [markdown]
# A checkpoint's name holds its position and the beginning of the SHA-256 of its bytes, as in the
# names of torchvision's weights: `epoch003-step000120-1f2e3d4c5b6a7988.pt`. A file that was cut
# short or whose bits flipped no longer matches its own name.
#
# It holds tensors and plain numbers, texts, lists and dictionaries only, so it can be read with
# `weights_only=True`, which runs no code from the file.

# %%
CHECKPOINT_NAME = re.compile(r"epoch(\d+)-step(\d+)-([0-9a-f]{16})\.pt")
BEST_NAME = re.compile(r"best-epoch(\d+)-([0-9a-f]{16})\.pt")
CHECKPOINT_KEYS = {"epoch", "step", "best_file", "best_score", "finished", "model", "optimizer"}


def save_with_digest(folder: Path, stem: str, payload: dict[str, Any]) -> Path:
    """Write `payload` as ``<stem>-<digest>.pt`` into `folder`; raises ``OSError`` if it cannot."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    content = buffer.getbuffer()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{stem}-{digest}.pt"
    write_atomically(path, lambda file: file.write(content))
    return path


def load_verified(path: Path) -> dict[str, Any]:
    """Read a file of ``save_with_digest`` to the CPU.

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


# %% [markdown]
# A run keeps its last few checkpoints and its best model. If the newest is damaged, it is named
# and the one before it is used: some minutes are trained again, with the same result.


# %%
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


# %% [markdown]
# A run that has lost nothing but its best model goes on and looks for another. One that was
# complete has nothing left to look for.


# %%
def forget_best(folder: Path, payload: dict[str, Any]) -> dict[str, Any]:
    """`payload` as that of a run without a best model; raises ``CheckpointError`` if it is over."""
    if payload["finished"]:
        raise CheckpointError(
            f"the run in {folder} is complete but its best model {payload['best_file']} is "
            "damaged; delete the folder to train anew"
        )
    print("no best model is left; training goes on, and the best of the epochs to come counts")
    return {**payload, "best_file": None, "best_score": -math.inf}


# %% [markdown]
# Old files go once a new one is safe: checkpoints beyond the last few, and best models that none
# of those left refers to.


# %%
def save_checkpoint(folder: Path, payload: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint for the position in `payload`, then remove what it makes superfluous."""
    stem = f"epoch{payload['epoch']:03d}-step{payload['step']:06d}"
    path = save_with_digest(folder, stem, payload)
    found = list_checkpoints(folder)
    for old in found[keep:]:
        old.unlink(missing_ok=True)
    try:
        needed = {payload["best_file"], *(best_of(kept) for kept in found[:keep] if kept != path)}
    except Exception:  # one of them cannot be read now, so nobody knows what it needs
        return path
    for best in folder.glob("best-*.pt"):
        if BEST_NAME.fullmatch(best.name) and best.name not in needed:
            best.unlink(missing_ok=True)
    return path


def best_of(path: Path) -> str | None:
    """The best model that a checkpoint refers to; its tensors are not read."""
    payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    name: str | None = payload["best_file"]
    return name
