"""Files that are whole or absent, paths that start at the project, and work in threads."""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm.auto import tqdm

from emotion_toolbox.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears as `path` only when complete and on disk.

    Raises ``OSError`` if the disk is full, say; a previous `path` is then still as it was.
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


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as ``write_atomically`` does."""
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system lets one open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: here) with this project, else `start`."""
    here = (start or Path.cwd()).resolve()
    marker = "create_enhanced_notebook.py"
    return next((folder for folder in (here, *here.parents) if (folder / marker).is_file()), here)


def resolve_path(path: str | Path) -> Path:
    """`path` from ``project_root()``, ``~`` expanded; ``ConfigError`` for a user's unknown home."""
    try:
        return project_root() / Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path!r}: {error}; give the whole path") from error


def absolute(path: Path) -> Path:
    """`path` from the root, with ``~`` expanded and symbolic links left as they are."""
    return Path(os.path.abspath(path.expanduser()))


def count_threads(wanted: int | None) -> int:
    """Threads for decoding: as many as `wanted`, or one for each core this process may use."""
    if wanted is not None:
        return max(1, wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[T], R], items: Sequence[T], title: str = "") -> list[R]:
    """`function` of every item, in order, from a pool of threads; with a bar for long work."""
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        results = pool.map(function, items)
        hidden = None if title and len(items) > 1000 else True  # None: shown on a terminal only
        return list(tqdm(results, title, len(items), unit="image", disable=hidden))


def put_in_force(file: Path, namespace: dict[str, Any]) -> None:
    """Load this package again after `file` of it was edited, also where `namespace` imported it.

    Raises what an edit that fails raises; then `file` is deleted, and what was in force stays.
    """
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    importlib.invalidate_caches()
    names = [key for key in sys.modules if key.partition(".")[0] == file.parent.name]
    old = {key: sys.modules.pop(key) for key in names}
    try:
        new = {key: vars(importlib.import_module(key)) for key in names}
    except BaseException:
        sys.modules.update(old)
        file.unlink()
        raise
    for key in names:
        before, now = vars(old[key]), new[key]
        both = before.keys() & now.keys() & namespace.keys()
        namespace.update({each: now[each] for each in both if namespace[each] is before[each]})
