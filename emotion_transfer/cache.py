"""Decode every image once: a uint8 memory map a split, with an index that notices changes."""

import csv
import dataclasses
import errno
import hashlib
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
    DECODER_VERSION,
    SPLITS,
    DataError,
    EmotionData,
    ImageError,
    Split,
    decode_image,
    read_image_bytes,
    refuse_untaught_classes,
)

# %% [markdown]
# #### Decode once, train for forty epochs
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
CHUNK_IMAGES, CHUNK_BYTES = 256, 2**26  # decoded together; the smaller of the two


@dataclass(frozen=True)
class IndexRow:
    """What is known of one source file: `reason` is empty for a usable image."""

    position: int
    file: str
    size: int
    mtime_ns: int
    hash: str  # of the file
    crc: int  # of the pixels
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


# %% [markdown]
# Copying a data set changes every date and no content. So where a file's date or name differs from
# what is known of it, its hash decides whether it is decoded again. A bad one is tried every time:
# its disk may be back, or a decoder installed.

# %%
ScannedImage = tuple[IndexRow, npt.NDArray[np.uint8] | None]


def scan_image(
    split: Split, position: int, side: int, known: IndexRow | None = None
) -> ScannedImage:
    """Read, hash and decode one image; a bad one comes back black, with its reason.

    If it has the content of `known`, there is nothing to decode, and its pixels are None.
    """
    path = split.path(position)
    row = IndexRow(position, split.files[position], *file_stamp(path), "", 0, "")
    try:
        data = read_image_bytes(path)
        row = dataclasses.replace(row, hash=content_hash(data))
        if known and not known.reason and known.hash == row.hash:
            return dataclasses.replace(row, crc=known.crc), None
        pixels = decode_image(data, side)
        return dataclasses.replace(row, crc=zlib.crc32(pixels.tobytes())), pixels
    except ImageError as error:
        black = np.zeros((side, side, 3), np.uint8)
        return dataclasses.replace(row, reason=" ".join(str(error).split()) or "unusable"), black


# %% [markdown]
# The index is a journal: rows are only ever appended, and only after their pixels are safely on
# disk. Kill the process at any instant and the next run goes on with the first image that is not
# in it. A line that was cut off by the kill ends in no line break, and does not count.


# %%
def read_index(file: Path, count: int) -> dict[int, IndexRow]:
    """The newest row of each position below `count`; damaged lines are passed over, and said."""
    rows: dict[int, IndexRow] = {}
    if not file.exists():
        return rows
    with file.open("rb+") as journal:
        data = journal.read()
        whole = data[: data.rfind(b"\n") + 1]
        journal.truncate(len(whole))  # so that nothing is appended to half a line
    damaged = 0
    for line in whole.decode(errors="replace").split("\n")[:-1]:
        try:
            position, name, size, mtime_ns, digest, crc, reason = next(csv.reader([line]))
            row = IndexRow(int(position), name, int(size), int(mtime_ns), digest, int(crc), reason)
        except (ValueError, csv.Error, StopIteration):
            damaged += 1
            continue
        if 0 <= row.position < count:
            rows[row.position] = row
    if damaged:
        print(f"{file} has {damaged} damaged lines; their images are read again")
    return rows


# %%
def stale_positions(split: Split, index: Mapping[int, IndexRow]) -> list[int]:
    """Positions without a row, with a bad image, or whose file is not the one their row is of."""
    return [
        i
        for i, file in enumerate(split.files)
        if (row := index.get(i)) is None
        or row.reason
        or (row.file, row.size, row.mtime_ns) != (file, *file_stamp(split.path(i)))
    ]


# %% [markdown]
# A thread pool decodes (Pillow releases Python's lock while it works, and threads need nothing
# pickled, so this runs the same on every system). Two chunks are in flight while a third is
# written.


# %%
def scan_chunks(
    split: Split,
    positions: Sequence[int],
    side: int,
    index: Mapping[int, IndexRow],
    threads: int,
) -> Iterator[list[ScannedImage]]:
    """Yield scanned images in order, ``CHUNK_IMAGES`` or ``CHUNK_BYTES`` at a time."""
    step = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (side * side * 3)))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    pending: deque[list[Future[ScannedImage]]] = deque()
    try:
        for start in range(0, len(positions), step):
            part = positions[start : start + step]
            pending.append([pool.submit(scan_image, split, p, side, index.get(p)) for p in part])
            if len(pending) > 2:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted pass ends now


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
def check_room(stores: Sequence[ImageStore]) -> None:
    """Raise ``DataError`` if the arrays that are still to be made do not fit on the disk."""
    need = sum(
        max(0, int(np.prod(store.shape)) - store.array_file.stat().st_size)
        if store.array_file.is_file()
        else int(np.prod(store.shape))
        for store in stores
    )
    folder = stores[0].folder
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if need > free:
        raise DataError(
            f"the image cache needs {need / 1e9:.2f} GB more in {folder}, where "
            f"{free / 1e9:.2f} GB are free; {cache_advice(stores[0])}"
        )


def cache_advice(store: ImageStore) -> str:
    """What to do where the cache cannot be kept."""
    return (
        f"set CACHE_DIR to a disk with room, lower CACHE_SIZE ({store.side}), or set CACHE=False "
        "to decode anew in every epoch"
    )


def reserve_array(store: ImageStore) -> None:
    """Create the array file with all its room taken; raises ``DataError`` if it lacks room."""
    check_room([store])
    store.array_file.unlink(missing_ok=True)
    array = np.lib.format.open_memmap(store.array_file, "w+", np.uint8, store.shape)
    del array
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with store.array_file.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, store.array_file.stat().st_size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            store.array_file.unlink(missing_ok=True)
            raise  # else the file system cannot reserve, and the room was checked


# %% [markdown]
# A cache that is not what it should be is named and built again: a file of the wrong shape, one
# that is no array, or one whose pixels do not match the checksums in the index. To compare all
# checksums would mean to read all images, so a spread of them is compared at every start.


# %%
CHECKSUM_SPREAD = 32  # images compared with their checksums at every start


def array_fault(store: ImageStore, index: Mapping[int, IndexRow]) -> str | None:
    """Why the array file cannot be used, judged by its form and a spread of its checksums."""
    try:
        array = store.pixels()
    except (ValueError, OSError, EOFError) as error:
        return f"cannot be read: {error}"
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
        return "is no plain array"
    if array.shape != store.shape or array.dtype != np.uint8:
        return f"holds {array.shape} {array.dtype} where {store.shape} uint8 is due"
    if array.offset + array.nbytes != store.array_file.stat().st_size:
        return "has bytes after its end"
    good = [row for row in index.values() if not row.reason]
    for row in good[:: max(1, len(good) // CHECKSUM_SPREAD)]:
        if zlib.crc32(array[row.position].tobytes()) != row.crc:
            return f"does not match its checksum at {row.file}"
    return None


# %% [markdown]
# Writing in the right order is what makes a kill harmless. Where pixels are about to be replaced,
# the index says first that they do not count; then come the pixels, then their rows, and each step
# waits for the disk.


# %%
def append_rows(store: ImageStore, rows: Sequence[IndexRow]) -> None:
    """Add `rows` to the index and wait until the disk has them."""
    with store.index_file.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(map(dataclasses.astuple, rows))
        file.flush()
        os.fsync(file.fileno())


def write_pixels(
    store: ImageStore, images: Sequence[ScannedImage], index: Mapping[int, IndexRow]
) -> None:
    """Put decoded `images` into the array, after their rows in `index` have been revoked."""
    old = [index[row.position] for row, _ in images if row.position in index]
    if old:
        append_rows(store, [dataclasses.replace(row, reason="not decoded yet") for row in old])
    each = store.side * store.side * 3
    header = store.array_file.stat().st_size - len(store.split) * each
    with store.array_file.open("r+b") as file:
        for row, image in images:
            if image is not None:
                file.seek(header + row.position * each)
                file.write(image.tobytes())
        file.flush()
        os.fsync(file.fileno())


# %% [markdown]
# Another run may be reading the array at this moment, with labels of its own. So before pixels that
# are in use are replaced, the array moves to a new file; who has the old one open keeps it.


# %%
def detach_array(store: ImageStore) -> None:
    """Put a copy in the place of the array file; raises ``OSError`` if it lacks room."""
    copy = store.array_file.with_suffix(".copy")
    try:
        shutil.copyfile(store.array_file, copy)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(copy, store.array_file)
    finally:
        copy.unlink(missing_ok=True)


# %%
def update_images(
    store: ImageStore, positions: Sequence[int], index: dict[int, IndexRow], threads: int
) -> None:
    """Scan `positions` and bring the array, the index file and `index` up to date."""
    label = f"{'decoding' if store.keep_pixels else 'checking'} {store.split.name}"
    shared = store.keep_pixels
    with tqdm(total=len(positions), desc=label, unit="img") as bar:
        for chunk in scan_chunks(store.split, positions, store.side, index, threads):
            changed = [(row, image) for row, image in chunk if index.get(row.position) != row]
            decoded = [(row, image) for row, image in changed if image is not None]
            if shared and any(in_use(index.get(row.position)) for row, _ in decoded):
                detach_array(store)
                shared = False
            if store.keep_pixels and decoded:
                write_pixels(store, decoded, index)
            if changed:
                append_rows(store, [row for row, _ in changed])
            index.update({row.position: row for row, _ in changed})
            bar.update(len(chunk))


def in_use(row: IndexRow | None) -> bool:
    """Whether the pixels that `row` is about may be part of a running training."""
    return row is not None and not row.reason


# %%
def build_store(store: ImageStore, threads: int) -> list[IndexRow]:
    """Bring `store` up to date, decoding only new and changed images; the row of every image.

    Safe to call from two processes at once: the second waits and finds the work done.

    Raises:
        DataError: where the disk has too little room, or cannot be written.
    """
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{store.index_file}.lock"):
            index = read_index(store.index_file, len(store.split))
            if store.keep_pixels and (fault := array_fault(store, index)):
                if store.array_file.exists():
                    print(f"{store.array_file} {fault}; it is built again")
                store.index_file.unlink(missing_ok=True)
                index = {}
                reserve_array(store)
            stale = stale_positions(store.split, index)
            if stale:
                update_images(store, stale, index, threads)
            return [index[i] for i in range(len(store.split))]
    except OSError as error:
        raise DataError(
            f"the image cache in {store.folder} cannot be written: {error}; {cache_advice(store)}"
        ) from error


# %% [markdown]
# #### The integrity report
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
    name = f"{data.root.name}-{cache_size(cfg)}px-v{DECODER_VERSION}-{key}"
    return resolve_path(cfg.CACHE_DIR) / name


# %%
@dataclass(frozen=True)
class CheckedData:
    """`data` without its unusable images; the `stores` of all images and the `kept` positions."""

    data: EmotionData
    stores: dict[str, ImageStore]
    kept: dict[str, npt.NDArray[np.int64]]
    digests: dict[str, str]  # of the content of the usable images of each split, in order
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
    stores = {n: ImageStore(data.splits[n], folder, cache_size(cfg), cfg.CACHE) for n in SPLITS}
    if cfg.CACHE:
        check_room(list(stores.values()))
    kept, splits, digests = {}, {}, {}
    bad: list[dict[str, Any]] = []
    hashes: list[pd.DataFrame] = []
    for name, store in stores.items():
        split, rows = store.split, build_store(store, worker_count(cfg))
        kept[name] = np.flatnonzero([not row.reason for row in rows])
        splits[name] = split.select(kept[name])
        bad += [
            {"split": name, "row": int(line), "file": row.file, "reason": row.reason}
            for row, line in zip(rows, split.rows, strict=True)
            if row.reason
        ]
        usable = [rows[i].hash for i in kept[name]]
        digests[name] = content_hash("".join(usable).encode())
        hashes.append(
            pd.DataFrame({"split": name, "row": splits[name].rows, "file": splits[name].files,
                          "hash": usable})
        )  # fmt: skip
    bad_table = pd.DataFrame(bad, columns=["split", "row", "file", "reason"])
    refuse_bad_images(cfg, data, bad_table)
    refuse_untaught_classes(splits["train"], data.classes)
    repeated = repeated_images(pd.concat(hashes, ignore_index=True))
    refuse_leaks(cfg, data, repeated)
    checked = dataclasses.replace(data, splits=splits)
    return CheckedData(checked, stores, kept, digests, bad_table, repeated, folder)


# %% [markdown]
# A few bad images among thousands are normal. Many are a sign of a wrong `IMAGES_ROOT` or a broken
# download, and training on what is left would hide it.


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


# %% [markdown]
# Files are compared by a hash of their bytes, so a copy under another name is found too.


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
