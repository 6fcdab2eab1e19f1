"""Decode every image once: a uint8 memory map a split, with an index that notices changes.

`<split>-<id>.npy` holds the pixels, and the index beside it (`.npz`) says what they were decoded
from. It is written when they are on the disk, and pixels that it lists never change: where they
would have to, another array is filled beside it, with what can be copied, and takes over when it is
complete. So a killed build goes on from its last index, and a run in training keeps its pixels.
"""

import dataclasses
import errno
import hashlib
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from filelock import FileLock
from tqdm.auto import tqdm

from emotion_toolbox.decoding import DECODER_VERSION, decode_image, read_image_bytes
from emotion_toolbox.errors import DataError, ImageError
from emotion_toolbox.files import write_atomically
from emotion_toolbox.tables import EmotionData, Split, refuse_untaught_classes

Pixels = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")
CHUNK_IMAGES, CHUNK_BYTES = 256, 2**26  # written together; the smaller of the two
SAVE_SECONDS = 60  # between two writings of an index: what a kill may cost
CHECKSUM_SPREAD = 32  # images of an array that are compared with their checksums at every start
ARRAY_HEADER = 128  # bytes of a .npy file before its pixels
# hashes of a file's name, size and date, and of its content (empty: nothing decoded yet)
ROW = np.dtype([("stamp", "S32"), ("hash", "S32"), ("crc", np.uint32)])


class PixelSource(Protocol):
    """Anything that turns positions, int64 [B], into decoded images, uint8 [B, S, S, 3]."""

    def gather(self, index: Positions) -> Pixels: ...


class MappedPixels:
    """Images from a memory map of all; `kept` are the positions of the usable ones in it."""

    def __init__(self, array: Pixels, kept: Positions) -> None:
        self.array, self.kept = array, kept

    def gather(self, index: Positions) -> Pixels:
        return self.array[self.kept[index]]


class DecodedPixels:
    """Images decoded when they are needed, in `threads` threads."""

    def __init__(self, split: Split, side: int, threads: int) -> None:
        self.split, self.side = split, side
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def gather(self, index: Positions) -> Pixels:
        return np.stack(list(self.pool.map(self._decode, index.tolist())))

    def _decode(self, position: int) -> Pixels:
        try:
            return decode_image(read_image_bytes(self.split.path(position)), self.side)
        except ImageError as error:
            raise DataError(f"{self.split.where(position)} has become unusable: {error}") from error


@dataclasses.dataclass(frozen=True)
class DecodedData:
    """`data` is what is usable of the `listed` images; `pixels` and `digests` are of its splits."""

    data: EmotionData
    listed: EmotionData
    pixels: dict[str, PixelSource]
    digests: dict[str, str]  # of the content of the files
    bad: pd.DataFrame  # columns split, row, file, reason
    repeated: pd.DataFrame  # identical files in several splits: columns split, row, file, hash
    folder: Path | None  # of the cache


def decode_data(
    data: EmotionData, side: int, *, cache_dir: Path | None, threads: int
) -> DecodedData:
    """Decode every image of `data` to `side` x `side` pixels and keep it under `cache_dir`.

    With None for that, check the images only, and decode them again when they are needed.

    Raises:
        DataError: where the disk has too little room, or cannot be written.
    """
    folder = cache_dir and cache_folder(data, side, cache_dir)
    if cache_dir and folder:
        refuse_full_disk(folder, missing_bytes(data, side, cache_dir), side)
    splits, pixels, tables = {}, dict[str, PixelSource](), []
    for name, split in data.splits.items():
        array, reasons = build_array(split, folder, side, threads)
        table = pd.DataFrame({"split": name, "row": split.rows, "file": list(split.files)})
        table["reason"] = [reasons.get(i, "") for i in range(len(split))]
        tables.append(table.assign(hash=array.rows["hash"].astype(str)))
        kept = np.flatnonzero(table["reason"] == "")
        splits[name] = usable = split.select(kept)
        pixels[name] = (
            MappedPixels(array.pixels, kept) if folder else DecodedPixels(usable, side, threads)
        )
    images = pd.concat(tables, ignore_index=True)
    bad = images[images["reason"] != ""].drop(columns="hash")
    good = images[images["reason"] == ""].drop(columns="reason")
    repeated = good[good.groupby("hash")["split"].transform("nunique") > 1]
    return DecodedData(
        dataclasses.replace(data, splits=splits),
        data,
        pixels,
        {n: content_hash("".join(good["hash"][good["split"] == n]).encode()) for n in splits},
        bad.reset_index(drop=True),
        repeated.sort_values(["hash", "split", "row"], ignore_index=True),
        folder,
    )


def refuse_bad_images(decoded: DecodedData, max_bad_fraction: float) -> None:
    """Raise ``DataError`` if all of a split or a training class, or too many of all, are bad."""
    listed, bad = decoded.listed.splits, decoded.bad
    total = sum(len(split) for split in listed.values())
    shown = "".join(
        f"\n  {listed[str(b.split)].csv} row {b.row}: {b.file}: {b.reason}"
        for b in bad.head(10).itertuples()
    ) + (f"\n  and {len(bad) - 10} more" if len(bad) > 10 else "")
    for split in decoded.data.splits.values():
        if len(split) == 0:
            raise DataError(f"no image of {split.csv} can be used:{shown}")
    if len(bad) > max_bad_fraction * total:
        raise DataError(
            f"{len(bad)} of {total} images cannot be used ({len(bad) / total:.1%}), more than "
            f"MAX_BAD_FRACTION={max_bad_fraction:.1%}. If most are missing, IMAGES_ROOT is "
            f"probably wrong; otherwise repair or remove these rows:{shown}"
        )
    refuse_untaught_classes(decoded.data.splits["train"], decoded.data.classes)


def refuse_leaks(decoded: DecodedData, allow_duplicates: bool) -> None:
    """Raise ``DataError`` for identical images in two splits, unless they are allowed."""
    repeated, splits = decoded.repeated, decoded.listed.splits
    if len(repeated) and not allow_duplicates:
        first = repeated[repeated["hash"] == repeated["hash"][0]].drop_duplicates("split")
        places = [f"{splits[str(r.split)].csv} row {r.row} ({r.file})" for r in first.itertuples()]
        raise DataError(
            f"identical images in {' and '.join(places)}; {repeated['hash'].nunique()} images "
            "stand in more than one split. Keep each in one split, or set ALLOW_DUPLICATES=True"
        )


def cache_folder(data: EmotionData, side: int, cache_dir: Path) -> Path:
    """Where the images of `data` are cached at this size; one folder for each set of files."""
    roots = "|".join(f"{split.csv}|{split.images_root}" for split in data.splits.values())
    key = hashlib.sha256(roots.encode(errors="surrogateescape")).hexdigest()[:8]
    return cache_dir / f"{data.root.name}-{side}px-v{DECODER_VERSION}-{key}"


def missing_bytes(data: EmotionData, side: int, cache_dir: Path) -> int:
    """Room that the arrays of `data` still have to take on the disk, in bytes."""
    folder, need = cache_folder(data, side, cache_dir), 0
    for name, split in data.splits.items():
        size = ARRAY_HEADER + len(split) * side * side * 3
        need += 0 if size in [f.stat().st_size for f in folder.glob(f"{name}-*.npy")] else size
    return need


def refuse_full_disk(folder: Path, need: int, side: int) -> None:
    """Raise ``DataError`` if so many bytes are not free where `folder` is or will be."""
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if need > free:
        raise DataError(
            f"the image cache needs {need / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} "
            f"GB are free; {cache_advice(side)}"
        )


def cache_advice(side: int) -> str:
    """What to do where the cache cannot be kept."""
    return (
        f"set CACHE_DIR to a disk with room, lower CACHE_SIZE ({side}), or set CACHE=False to "
        "decode anew in every epoch"
    )


def work_ahead(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, depth: int, name: str
) -> Generator[R, None, None]:
    """Yield `function` of each of `items` in order, from threads that work `depth` items ahead.

    An exception is raised where its result was due; closing the generator ends the threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class DecodedArray(NamedTuple):
    """Decoded images: a ``ROW`` for each, [N], and uint8 [N, side, side, 3], kept in `file`."""

    file: Path | None  # None: only checked
    rows: npt.NDArray[Any]
    pixels: Pixels


class Scanned(NamedTuple):
    """What was found of an image: its ``ROW`` and pixels, or the reason why it is bad."""

    position: int
    row: tuple[bytes, bytes, int] = (b"", b"", 0)
    pixels: Pixels = np.zeros(0, np.uint8)
    reason: str = ""


Known = dict[bytes, tuple[DecodedArray, int]]  # where images lie, by stamp and by hash


def content_hash(data: bytes) -> str:
    """32 hex digits that tell one content from any other."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_stamp(split: Split, position: int) -> bytes:
    """A hash of the name, size and date of an image's file."""
    size, date = -1, -1
    with suppress(OSError, ValueError):
        info = os.stat(split.path(position))
        size, date = info.st_size, info.st_mtime_ns
    text = f"{split.files[position]}\n{size}\n{date}"
    return content_hash(text.encode(errors="surrogateescape")).encode()


def build_array(
    split: Split, folder: Path | None, side: int, threads: int
) -> tuple[DecodedArray, dict[int, str]]:
    """The images of `split`, of which only new and changed ones are decoded, and why some are bad.

    Safe to call from two processes at once: the second waits and finds the work done.
    """
    stamps = np.array([file_stamp(split, i) for i in range(len(split))], "S32")
    shape = len(split), side, side, 3
    if folder is None:
        array = DecodedArray(None, np.zeros(len(split), ROW), np.zeros((0, *shape[1:]), np.uint8))
        return array, fill_array(array, split, stamps, {}, threads) or {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{split.name}.lock"):
            arrays, reasons = open_arrays(folder, split.name, side), None
            fitting = [array for array in arrays if array.pixels.shape == shape]
            matches = [np.count_nonzero(array.rows["stamp"] == stamps) for array in fitting]
            best = fitting[int(np.argmax(matches))] if fitting else None
            known = {} if len(split) in matches else known_images(arrays)
            if best:
                reasons = fill_array(best, split, stamps, known, threads)
            if best is None or reasons is None:
                best = reserve_array(folder / f"{split.name}-{time.time_ns():x}.npy", shape)
                reasons = fill_array(best, split, stamps, known, threads) or {}
            for array in arrays:
                if array is not best:
                    delete_array(array.file)
            return best, reasons
    except OSError as error:
        raise DataError(
            f"the image cache in {folder} cannot be written: {error}; {cache_advice(side)}"
        ) from error


def known_images(arrays: Iterable[DecodedArray]) -> Known:
    """Every image that is in one of the `arrays`."""
    known: Known = {}
    for array in arrays:
        for i in np.flatnonzero(array.rows["hash"] != b"").tolist():
            stamp, digest, _ = array.rows[i].item()
            known[stamp] = known[digest] = array, i
    return known


def fill_array(
    array: DecodedArray, split: Split, stamps: npt.NDArray[Any], known: Known, threads: int
) -> dict[int, str] | None:
    """Scan the images whose stamp differs; why some are bad, which are tried again every time.

    None, as soon as pixels that the index lists would have to change.
    """
    file, rows, side, reasons = array.file, array.rows, array.pixels.shape[1], dict[int, str]()
    todo, saved = np.flatnonzero(rows["stamp"] != stamps).tolist(), time.monotonic()
    step = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (side * side * 3)))
    scan = partial(scan_image, split, side, stamps, known)
    images = work_ahead(scan, todo, threads=threads, depth=2 * step, name="decode")
    bar = tqdm(desc=f"decoding {split.name}", total=len(todo), unit="img", disable=not todo)
    try:
        with closing(images), bar:
            while chunk := list(islice(images, step)):
                reasons.update({image.position: image.reason for image in chunk if image.reason})
                good = [image for image in chunk if not image.reason]
                new = [image for image in good if rows["hash"][image.position] != image.row[1]]
                if file and any(rows["hash"][image.position] for image in new):
                    return None
                if file and new:
                    write_pixels(file, new)
                for image in good:
                    rows[image.position] = image.row
                if file and time.monotonic() - saved > SAVE_SECONDS:
                    save_index(file, rows)
                    saved = time.monotonic()
                bar.update(len(chunk))
    finally:
        if file and todo:
            save_index(file, rows)
    return reasons


def scan_image(
    split: Split, side: int, stamps: npt.NDArray[Any], known: Known, position: int
) -> Scanned:
    """Look for an image among those `known`, else decode it.

    Copying a data set changes its dates and no content: where the date differs, the hash decides.
    """
    stamp = bytes(stamps[position])
    try:
        if (same := known.get(stamp)) is None:
            data = read_image_bytes(split.path(position))
            digest = content_hash(data).encode()
            if (same := known.get(digest)) is None:
                pixels = decode_image(data, side)
                return Scanned(position, (stamp, digest, zlib.crc32(pixels.tobytes())), pixels)
        array, place = same
        _, digest, crc = array.rows[place].item()
        return Scanned(position, (stamp, digest, crc), array.pixels[place])
    except ImageError as error:
        return Scanned(position, reason=" ".join(str(error).split()) or "unusable")


def write_pixels(file: Path, images: Iterable[Scanned]) -> None:
    """Put the pixels of `images` into the array, and wait until the disk has them."""
    with file.open("r+b") as array:
        for image in images:
            array.seek(ARRAY_HEADER + image.position * image.pixels.nbytes)
            array.write(image.pixels.tobytes())
        array.flush()
        os.fsync(array.fileno())


def save_index(file: Path, rows: npt.NDArray[Any]) -> None:
    """Write the index of the array in `file`, whole or not at all."""
    write_atomically(file.with_suffix(".npz"), lambda target: np.savez(target, rows=rows))


def reserve_array(file: Path, shape: tuple[int, int, int, int]) -> DecodedArray:
    """A new array with all its room taken, so that a full disk shows before the work is done."""
    refuse_full_disk(file.parent, int(np.prod(shape)), shape[1])
    np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    save_index(file, np.zeros(shape[0], ROW))
    if hasattr(os, "posix_fallocate"):
        try:
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                delete_array(file)
                raise  # else the file system cannot reserve, and the room was checked
    return open_array(file, shape[1])


def open_array(file: Path, side: int) -> DecodedArray:
    """The array in `file`; raises ``ValueError``, or what NumPy does, for a damaged one.

    To compare all checksums would mean to read all images, so only a spread is compared.
    """
    with np.load(file.with_suffix(".npz")) as index:  # a zip, which has checksums of its own
        rows = index["rows"]
    pixels = np.lib.format.open_memmap(file, mode="r")
    shape, size = (len(rows), side, side, 3), file.stat().st_size
    sound = rows.dtype == ROW and pixels.dtype == np.uint8 and pixels.shape == shape
    if not sound or not pixels.flags.c_contiguous or size != ARRAY_HEADER + pixels.nbytes:
        raise ValueError(f"{pixels.shape} {pixels.dtype} in {size} bytes are no such array")
    listed = np.flatnonzero(rows["hash"] != b"")
    for i in listed[:: max(1, len(listed) // CHECKSUM_SPREAD)]:
        if zlib.crc32(pixels[i].tobytes()) != rows[i]["crc"]:
            raise ValueError(f"image {i} does not match its checksum")
    return DecodedArray(file, rows, pixels)


def open_arrays(folder: Path, name: str, side: int) -> list[DecodedArray]:
    """The sound arrays of the split `name`; one that is not is named and removed."""
    sound = []
    for file in sorted(folder.glob(f"{name}*.npy")):
        try:
            sound.append(open_array(file, side))
        except Exception as error:  # a damaged file may raise anything
            print(f"{file} is damaged ({error}); it is built again")
            delete_array(file)
    return sound


def delete_array(file: Path | None) -> None:
    """Remove an array and its index; where a run has it open, its pixels stay with the run."""
    if file:
        with suppress(OSError):  # Windows keeps an open file; a later build removes it
            file.unlink()
            file.with_suffix(".npz").unlink()
