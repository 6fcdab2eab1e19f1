"""Decode every image once: a uint8 memory map a split, with an index that notices changes."""

import csv
import dataclasses
import hashlib
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from filelock import FileLock
from tqdm.auto import tqdm

from emotion_transfer.config import EnhancedConfig, cache_size, resolve_path
from emotion_transfer.data import (
    SPLITS,
    DataError,
    EmotionData,
    ImageError,
    Split,
    decode_image,
    read_image_bytes,
)

# %% [markdown]
# ### Decode once, train for forty epochs
#
# Decoding a JPEG takes milliseconds; copying decoded pixels takes microseconds. A training run
# shows every image to the network dozens of times, so each is decoded **once**, cut to a square a
# little larger than the network's input, and kept in one large array on disk. Training then reads
# that array through a memory map: the operating system keeps in memory what fits and fetches the
# rest.
#
# The same pass finds every image that cannot be used. What it learnt of each file, its size, its
# date, a hash of its bytes and the reason where it is bad, goes into an index beside the array.

# %%
CHUNK_IMAGES = 256
INDEX_COLUMNS = ("position", "file", "size", "mtime_ns", "hash", "crc", "reason")


@dataclass(frozen=True)
class IndexRow:
    """What is known of one source file: `reason` is empty for a usable image."""

    position: int
    file: str
    size: int
    mtime_ns: int
    hash: str
    crc: int
    reason: str


def file_stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a file; (-1, -1) where there is none."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return info.st_size, info.st_mtime_ns


def content_hash(data: bytes) -> str:
    """32 hex digits that tell one file's content from any other's."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# %%
def scan_image(split: Split, position: int, side: int) -> tuple[IndexRow, npt.NDArray[np.uint8]]:
    """Read, hash and decode one image; a bad one comes back black, with its reason."""
    path = split.path(position)
    row = IndexRow(position, split.files[position], *file_stamp(path), "", 0, "")
    try:
        data = read_image_bytes(path)
        row = dataclasses.replace(row, hash=content_hash(data))
        pixels = decode_image(data, side)
        return dataclasses.replace(row, crc=zlib.crc32(pixels.tobytes())), pixels
    except ImageError as error:
        black = np.zeros((side, side, 3), np.uint8)
        return dataclasses.replace(row, reason=" ".join(str(error).split())), black


# %% [markdown]
# The index is a journal: rows are only ever appended, and only after their pixels are safely on
# disk. Kill the process at any instant and the next run goes on with the first image that is not
# in it.


# %%
def read_index(file: Path, split: Split) -> pd.DataFrame:
    """The newest row of each position whose file is still that of `split`; empty if unreadable."""
    empty = pd.DataFrame(columns=list(INDEX_COLUMNS))
    if not file.exists():
        return empty
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, on_bad_lines="skip")
        table = table[list(INDEX_COLUMNS)]
        numbers = ["position", "size", "mtime_ns", "crc"]
        table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
        table = table.dropna().astype(dict.fromkeys(numbers, "int64"))
    except (ValueError, KeyError, OSError) as error:
        print(f"{file} is damaged ({error}); the cache is built again")
        return empty
    table = table[(table["position"] >= 0) & (table["position"] < len(split))]
    table = table.drop_duplicates("position", keep="last")
    names = np.array(split.files, dtype=object)
    current = names[table["position"].to_numpy()] == table["file"].to_numpy()
    newest: pd.DataFrame = table.loc[current]
    return newest


def stale_positions(split: Split, index: pd.DataFrame) -> list[int]:
    """Positions without a row, or whose file's size or date is no longer what its row says."""
    known = {
        int(p): (int(s), int(m))
        for p, s, m in zip(index["position"], index["size"], index["mtime_ns"], strict=True)
    }
    return [i for i in range(len(split)) if known.get(i) != file_stamp(split.path(i))]


# %% [markdown]
# A thread pool decodes (Pillow releases Python's lock while it works, and threads need nothing
# pickled, so this runs the same on every system). Two chunks are in flight while a third is
# written.


# %%
def scan_chunks(
    split: Split, positions: Sequence[int], side: int, threads: int
) -> Iterator[list[tuple[IndexRow, npt.NDArray[np.uint8]]]]:
    """Yield scanned images in order, at most ``CHUNK_IMAGES`` at a time."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future[tuple[IndexRow, npt.NDArray[np.uint8]]]]] = deque()
        for start in range(0, len(positions), CHUNK_IMAGES):
            part = positions[start : start + CHUNK_IMAGES]
            pending.append([pool.submit(scan_image, split, p, side) for p in part])
            if len(pending) > 2:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]


# %% [markdown]
# An `ImageStore` is where one split's pixels and index lie. The pixels are a plain `.npy` file that
# NumPy opens without this project. The room for it is reserved before the first image is decoded,
# so a full disk shows at once and not after an hour.


# %%
@dataclass(frozen=True)
class ImageStore:
    """Files of one split's decoded images: uint8 [N, side, side, 3], and their index."""

    split: Split
    folder: Path
    side: int
    keep_pixels: bool = True  # False: only check the images, and decode them again when needed

    @property
    def array_file(self) -> Path:
        return self.folder / f"{self.split.name}.npy"

    @property
    def index_file(self) -> Path:
        kind = "index" if self.keep_pixels else "checked"
        return self.folder / f"{self.split.name}.{kind}.csv"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.split), self.side, self.side, 3)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """The memory map, read-only."""
        array: npt.NDArray[np.uint8] = np.load(self.array_file, mmap_mode="r", allow_pickle=False)
        return array


# %%
def reserve_array(store: ImageStore) -> None:
    """Create the array file with all its room taken; raises ``DataError`` if it lacks room."""
    store.array_file.unlink(missing_ok=True)
    need = int(np.prod(store.shape))
    free = shutil.disk_usage(store.folder).free
    message = (
        f"the image cache for {store.split.name} needs {need / 1e9:.2f} GB in {store.folder}, "
        f"where {free / 1e9:.2f} GB are free; set CACHE_DIR to a larger disk, lower CACHE_SIZE "
        f"({store.side}), or set CACHE=False to decode anew in every epoch"
    )
    if need > free:
        raise DataError(message)
    array = np.lib.format.open_memmap(store.array_file, "w+", np.uint8, store.shape)
    del array
    if hasattr(os, "posix_fallocate"):
        try:
            with store.array_file.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, store.array_file.stat().st_size)
        except OSError as error:
            store.array_file.unlink(missing_ok=True)
            raise DataError(f"{message} ({error})") from error


# %% [markdown]
# A cache that is not what it should be is never trusted: a file of the wrong shape, one that is no
# array, or one whose pixels do not match the checksums in the index is named and built again.


# %%
def array_fault(store: ImageStore, index: pd.DataFrame) -> str | None:
    """Why the array file cannot be used, judged by its form and a spread of its checksums."""
    try:
        array = store.pixels()
    except (ValueError, OSError, EOFError) as error:
        return f"cannot be read: {error}"
    if array.shape != store.shape or array.dtype != np.uint8:
        return f"holds {array.shape} {array.dtype} where {store.shape} uint8 is due"
    good = index[index["reason"] == ""]
    good = good.iloc[:: max(1, len(good) // 32)]
    for position, file, crc in zip(good["position"], good["file"], good["crc"], strict=True):
        if zlib.crc32(array[position].tobytes()) != crc:
            return f"does not match its checksum at {file}"
    return None


# %% [markdown]
# Copying a data set changes every date and no content. So where only the date of a file differs,
# its hash decides whether it is decoded again.


# %%
def unchanged_rows(split: Split, index: pd.DataFrame, stale: Sequence[int]) -> list[IndexRow]:
    """Index rows, with today's date, of the `stale` files whose content is still the same."""
    known = index.set_index("position")
    same = []
    for position in known.index.intersection(list(stale)):
        old = known.loc[position]
        size, mtime_ns = file_stamp(split.path(position))
        if size != old["size"] or not old["hash"]:
            continue
        try:
            digest = content_hash(read_image_bytes(split.path(position)))
        except ImageError:
            continue
        if digest == old["hash"]:
            row = IndexRow(int(position), old["file"], size, mtime_ns, digest, int(old["crc"]), "")
            same.append(dataclasses.replace(row, reason=old["reason"]))
    return same


# %%
def append_rows(store: ImageStore, rows: Sequence[IndexRow]) -> None:
    """Add `rows` to the index and wait until the disk has them."""
    new = not store.index_file.exists()
    with store.index_file.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(INDEX_COLUMNS)
        else:
            file.write("\n")  # closes a line that a killed process left unfinished
        writer.writerows(dataclasses.astuple(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())


def write_images(store: ImageStore, positions: Sequence[int], threads: int) -> None:
    """Decode `positions` into the store, pixels first, their index rows after them."""
    header = store.array_file.stat().st_size - int(np.prod(store.shape)) if store.keep_pixels else 0
    each = store.side * store.side * 3
    label = f"decoding {store.split.name}" if store.keep_pixels else f"checking {store.split.name}"
    with tqdm(total=len(positions), desc=label, unit="img") as bar:
        for chunk in scan_chunks(store.split, positions, store.side, threads):
            if store.keep_pixels:
                with store.array_file.open("r+b") as file:
                    for row, image in chunk:
                        file.seek(header + row.position * each)
                        file.write(image.data)
                    file.flush()
                    os.fsync(file.fileno())
            append_rows(store, [row for row, _ in chunk])
            bar.update(len(chunk))


# %%
def build_store(store: ImageStore, threads: int) -> pd.DataFrame:
    """Bring `store` up to date, decoding only new and changed images, and return its index.

    Safe to call from two processes at once: the second waits and finds the work done.

    Raises:
        DataError: where the disk has too little room.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{store.index_file}.lock"):
        index = read_index(store.index_file, store.split)
        if store.keep_pixels and (fault := array_fault(store, index)):
            if store.array_file.exists():
                print(f"{store.array_file} {fault}; it is built again")
            store.index_file.unlink(missing_ok=True)
            index = index.iloc[:0]
            reserve_array(store)
        stale = stale_positions(store.split, index)
        same = unchanged_rows(store.split, index, stale)
        if same:
            append_rows(store, same)
        changed = sorted(set(stale) - {row.position for row in same})
        if changed:
            write_images(store, changed, threads)
        return read_index(store.index_file, store.split) if stale else index


# %% [markdown]
# ### The integrity report
#
# `check_images` runs that pass over the three splits and draws the consequences. Images that cannot
# be used are listed with their row and reason and left out; if they are more than
# `MAX_BAD_FRACTION` of all, something larger is wrong and the run stops. One identical image in two
# splits stops it too, for then the test measures memory instead of skill.


# %%
def worker_count(cfg: EnhancedConfig) -> int:
    """Decoding threads: ``NUM_WORKERS``, or one for each core this process may use."""
    if cfg.NUM_WORKERS is not None:
        return max(1, cfg.NUM_WORKERS)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder(cfg: EnhancedConfig, data: EmotionData) -> Path:
    """Where the images of `data` are cached at this size; one folder for each set of files."""
    roots = "|".join(f"{split.csv}|{split.images_root}" for split in data.splits.values())
    key = hashlib.sha256(roots.encode()).hexdigest()[:8]
    return resolve_path(cfg.CACHE_DIR) / f"{data.root.name}-{cache_size(cfg)}px-{key}"


# %%
@dataclass(frozen=True)
class CheckedData:
    """`data` without its unusable images; the `stores` of all images and the `kept` positions."""

    data: EmotionData
    stores: dict[str, ImageStore]
    kept: dict[str, npt.NDArray[np.int64]]
    bad: pd.DataFrame  # columns split, row, file, reason
    repeated: pd.DataFrame  # identical files in two splits: columns split, row, file, twice each
    folder: Path


def check_images(cfg: EnhancedConfig, data: EmotionData) -> CheckedData:
    """Scan (and, with ``CACHE``, decode and keep) every image of `data`.

    Raises:
        DataError: if too many images are bad, a split or a training class has none left, or one
            image stands in two splits and ``ALLOW_DUPLICATES`` is off.
    """
    folder = cache_folder(cfg, data)
    stores, kept, splits = {}, {}, {}
    bad: list[dict[str, Any]] = []
    hashes: list[pd.DataFrame] = []
    for name in SPLITS:
        split = data.splits[name]
        stores[name] = ImageStore(split, folder, cache_size(cfg), cfg.CACHE)
        index = build_store(stores[name], worker_count(cfg)).sort_values("position")
        reasons = index["reason"].to_numpy()
        kept[name] = np.flatnonzero(reasons == "")
        splits[name] = split.select(kept[name])
        for i in np.flatnonzero(reasons != "").tolist():
            report = {"split": name, "row": split.rows[i], "file": split.files[i]}
            bad.append({**report, "reason": reasons[i]})
        usable = index.iloc[kept[name]]
        hashes.append(
            pd.DataFrame({"split": name, "row": splits[name].rows, "file": splits[name].files,
                          "hash": usable["hash"].to_numpy()})
        )  # fmt: skip
    bad_table = pd.DataFrame(bad, columns=["split", "row", "file", "reason"])
    refuse_bad_images(cfg, data, bad_table)
    repeated = repeated_images(pd.concat(hashes, ignore_index=True))
    refuse_leaks(cfg, data, repeated)
    checked = dataclasses.replace(data, splits=splits)
    return CheckedData(checked, stores, kept, bad_table, repeated, folder)


# %%
def refuse_bad_images(cfg: EnhancedConfig, data: EmotionData, bad: pd.DataFrame) -> None:
    """Raise ``DataError`` if all of a split, or more than ``MAX_BAD_FRACTION`` of all, are bad."""
    total = sum(len(split) for split in data.splits.values())
    lines = [
        f"  {data.splits[str(b.split)].csv} row {b.row}: {b.file}: {b.reason}"
        for b in bad.head(10).itertuples()
    ]
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    for name, split in data.splits.items():
        if (bad["split"] == name).sum() == len(split):
            raise DataError("\n".join([f"no image of {split.csv} can be used:", *lines]))
    if len(bad) > cfg.MAX_BAD_FRACTION * total:
        raise DataError(
            "\n".join([
                f"{len(bad)} of {total} images cannot be used ({len(bad) / total:.1%}), more than "
                f"MAX_BAD_FRACTION={cfg.MAX_BAD_FRACTION:.1%}. If most are missing, IMAGES_ROOT is "
                "probably wrong; otherwise repair or remove these rows:",
                *lines,
            ])
        )  # fmt: skip


# %%
def repeated_images(files: pd.DataFrame) -> pd.DataFrame:
    """Of `files` (columns split, row, file, hash), those whose content stands in several splits."""
    spread = files.groupby("hash")["split"].transform("nunique")
    return files[spread > 1].sort_values(["hash", "split", "row"]).reset_index(drop=True)


def refuse_leaks(cfg: EnhancedConfig, data: EmotionData, repeated: pd.DataFrame) -> None:
    """Raise ``DataError`` for identical images in two splits unless ``ALLOW_DUPLICATES``."""
    if repeated.empty or cfg.ALLOW_DUPLICATES:
        return
    first = repeated[repeated["hash"] == repeated["hash"].iloc[0]].drop_duplicates("split")
    places = [f"{data.splits[str(r.split)].csv} row {r.row} ({r.file})" for r in first.itertuples()]
    raise DataError(
        f"identical images in {' and '.join(places)}; {repeated['hash'].nunique()} images stand in "
        "more than one split. Keep each in one split, or set ALLOW_DUPLICATES=True"
    )
