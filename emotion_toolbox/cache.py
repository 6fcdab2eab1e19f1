"""Decode every image once: a uint8 memory map a split, with an index that notices changes.

`<split>.npy` holds the pixels, and the index beside it (`.npz`) says what they were decoded from.
It is written when they are on the disk, and images are only ever added: pixels that it lists never
change. So a killed build goes on from its last index, and a run in training keeps its pixels.
"""

import dataclasses
import errno
import hashlib
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

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
Rows = npt.NDArray[Any]  # of the type ROW
T = TypeVar("T")
R = TypeVar("R")
Decode = Callable[[bytes], Pixels]
SAVE_SECONDS = 60  # between two writings of an index: what a kill may cost
CHECKSUM_SPREAD = 32  # images of an array that are compared with their checksums at every start
ARRAY_HEADER = 128  # bytes of a .npy file before its pixels
# of an image in an array: hashes of its file's name, size and date, and of the file's content
ROW = np.dtype([("stamp", "S32"), ("hash", "S32"), ("crc", np.uint32)])


class PixelSource(Protocol):
    """Decoded images, as an array uint8 [N, S, S, 3] that is indexed by positions, int64 [B]."""

    def __getitem__(self, index: Positions, /) -> Pixels: ...


class ChosenPixels:
    """Some images of another source, by their `positions` there."""

    def __init__(self, source: PixelSource, positions: Positions) -> None:
        self.source, self.positions = source, positions

    def __getitem__(self, index: Positions, /) -> Pixels:
        return self.source[self.positions[index]]


class DecodedPixels:
    """Images decoded when they are needed, in `threads` threads."""

    def __init__(self, split: Split, side: int, threads: int, fit: str = "crop") -> None:
        self.split, self.side, self.fit = split, side, fit
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __getitem__(self, index: Positions, /) -> Pixels:
        return np.stack(list(self.pool.map(self._decode, index.tolist())))

    def _decode(self, position: int) -> Pixels:
        try:
            return decode_image(read_image_bytes(self.split.path(position)), self.side, self.fit)
        except ImageError as error:
            raise DataError(f"{self.split.where(position)} has become unusable: {error}") from error


@dataclasses.dataclass(frozen=True)
class DecodedData:
    """`data` is what is usable of the listed images; `pixels` and `digests` are of its splits."""

    data: EmotionData
    pixels: dict[str, PixelSource]
    digests: dict[str, str]  # of the content of the files
    bad: pd.DataFrame  # columns split, row, file, reason
    repeated: pd.DataFrame  # identical files in several splits: columns split, row, file, hash


def decode_data(
    data: EmotionData, side: int, fit: str = "crop", *, cache_dir: Path | None, threads: int
) -> DecodedData:
    """Decode every image of `data` to `side` x `side` pixels and keep it under `cache_dir`.

    With None for that, check the images only, and decode them again when they are needed. See
    ``decode_image`` for `fit`. Raises ``DataError`` where the disk has too little room, or cannot
    be written.
    """
    splits, pixels, digests, good, bad = {}, {}, {}, [], []
    folder = cache_folder(data, side, cache_dir, fit) if cache_dir else None
    build = partial(cache_images, folder=folder) if folder else check_images
    try:
        if cache_dir:
            refuse_full_disk(cache_dir, missing_bytes(data, side, cache_dir, fit))
        for name, split in data.splits.items():
            pixels[name], hashes, reasons = build(split, side, threads, fit=fit)
            digests[name] = content_hash(b"".join(hashes))
            images = pd.DataFrame({"split": name, "row": split.rows, "file": list(split.files)})
            bad.append(images.loc[list(reasons)].assign(reason=list(reasons.values())))
            usable = images.drop(index=list(reasons))
            good.append(usable.assign(hash=[digest.decode() for digest in hashes]))
            splits[name] = split.select(usable.index.to_numpy())
    except OSError as error:
        raise DataError(
            f"the image cache in {folder} cannot be written: {error}; set CACHE_DIR to a disk with "
            f"room, lower CACHE_SIZE ({side}), or set CACHE=False to decode anew in every epoch"
        ) from error
    files = pd.concat(good)
    repeated = files[files.groupby("hash")["split"].transform("nunique") > 1]
    repeated = repeated.sort_values(["hash", "split", "row"], ignore_index=True)
    left, left_out = dataclasses.replace(data, splits=splits), pd.concat(bad, ignore_index=True)
    return DecodedData(left, pixels, digests, left_out, repeated)


def refuse_bad_images(decoded: DecodedData, max_bad_fraction: float) -> None:
    """Raise ``DataError`` if all of a split or a training class, or too many of all, are bad."""
    splits, bad = decoded.data.splits, decoded.bad
    total = len(bad) + sum(len(split) for split in splits.values())
    shown = "".join(
        f"\n  {splits[str(b.split)].csv} row {b.row}: {b.file}: {b.reason}"
        for b in bad.head(10).itertuples()
    ) + (f"\n  and {len(bad) - 10} more" if len(bad) > 10 else "")
    for split in splits.values():
        if len(split) == 0:
            raise DataError(f"no image of {split.csv} can be used:{shown}")
    if len(bad) > max_bad_fraction * total:
        raise DataError(
            f"{len(bad)} of {total} images cannot be used ({len(bad) / total:.1%}), more than "
            f"MAX_BAD_FRACTION={max_bad_fraction:.1%}. If most are missing, IMAGES_ROOT is "
            f"probably wrong; otherwise repair or remove these rows:{shown}"
        )
    refuse_untaught_classes(splits["train"], decoded.data.classes)


def refuse_leaks(decoded: DecodedData, allow_duplicates: bool) -> None:
    """Raise ``DataError`` for identical images in two splits, unless they are allowed."""
    repeated, splits = decoded.repeated, decoded.data.splits
    if len(repeated) and not allow_duplicates:
        first = repeated[repeated["hash"] == repeated["hash"][0]].drop_duplicates("split")
        places = [f"{splits[str(r.split)].csv} row {r.row} ({r.file})" for r in first.itertuples()]
        raise DataError(
            f"identical images in {' and '.join(places)}; {repeated['hash'].nunique()} images "
            "stand in more than one split. Keep each in one split, or set ALLOW_DUPLICATES=True"
        )


def cache_folder(data: EmotionData, side: int, cache_dir: Path, fit: str = "crop") -> Path:
    """Where the images of `data` are cached; one folder for each set of files, size and fit."""
    roots = "|".join(f"{split.csv}|{split.images_root}" for split in data.splits.values())
    key = hashlib.sha256(roots.encode(errors="surrogateescape")).hexdigest()[:8]
    form = f"{side}px" if fit == "crop" else f"{side}px-{fit}"
    return cache_dir / f"{data.root.name}-{form}-v{DECODER_VERSION}-{key}"


def array_bytes(images: int, side: int) -> int:
    """Length of an array's file before the place of its next image."""
    return ARRAY_HEADER + images * side * side * 3


def missing_bytes(data: EmotionData, side: int, cache_dir: Path, fit: str = "crop") -> int:
    """Room that the arrays of `data` still have to take on the disk, in bytes."""
    folder, need = cache_folder(data, side, cache_dir, fit), 0
    for name, split in data.splits.items():
        file = folder / f"{name}.npy"
        taken = file.stat().st_size if file.exists() else 0
        need += max(0, array_bytes(len(split), side) - taken)
    return need


def refuse_full_disk(folder: Path, need: int) -> None:
    """Raise ``OSError`` if so many bytes are not free where `folder` is or will be."""
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if need > free:
        raise OSError(f"it needs {need / 1e9:.2f} GB more in all, and {free / 1e9:.2f} GB are free")


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


def content_hash(data: bytes) -> str:
    """32 hex digits that tell one content from any other."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_stamp(split: Split, position: int) -> str:
    """A hash of the name, size and date of an image's file."""
    size, date = -1, -1
    with suppress(OSError, ValueError):
        info = os.stat(split.path(position))
        size, date = info.st_size, info.st_mtime_ns
    text = f"{split.files[position]}\n{size}\n{date}"
    return content_hash(text.encode(errors="surrogateescape"))


class Scanned(NamedTuple):
    """What was found of an image: its pixels, or their place in the array, or why it is bad."""

    position: int
    hash: bytes = b""  # of the content
    pixels: Pixels | None = None
    place: int = -1
    reason: str = ""


def scan_image(split: Split, decode: Decode, known: dict[bytes, int], position: int) -> Scanned:
    """Read an image; take its place from those `known` by their hashes, or else decode it."""
    try:
        data = read_image_bytes(split.path(position))
        digest = content_hash(data).encode()
        if (place := known.pop(digest, -1)) >= 0:
            return Scanned(position, digest, place=place)
        return Scanned(position, digest, decode(data))
    except ImageError as error:
        return Scanned(position, reason=" ".join(str(error).split()) or "unusable")


def scan_images(
    split: Split, positions: Sequence[int], known: dict[bytes, int], decode: Decode, threads: int
) -> Generator[Scanned, None, None]:
    """What ``scan_image`` finds at each of the `positions` in turn, from threads, with a bar."""
    bar = tqdm(positions, f"decoding {split.name}", unit="img", disable=not positions)
    scan = partial(scan_image, split, decode, known)
    return work_ahead(scan, bar, threads=threads, depth=4 * threads, name="decode")


def check_images(
    split: Split, side: int, threads: int, fit: str = "crop"
) -> tuple[PixelSource, list[bytes], dict[int, str]]:
    """What ``cache_images`` gives, of images that are decoded again when they are needed."""
    decode = partial(decode_image, size=side, fit=fit)
    with closing(scan_images(split, range(len(split)), {}, decode, threads)) as images:
        found = [image._replace(pixels=None) for image in images]
    reasons = {image.position: image.reason for image in found if image.reason}
    usable = split.select(np.delete(np.arange(len(split)), list(reasons)))
    return DecodedPixels(usable, side, threads, fit), [i.hash for i in found if i.hash], reasons


def cache_images(
    split: Split, side: int, threads: int, folder: Path, fit: str = "crop"
) -> tuple[PixelSource, list[bytes], dict[int, str]]:
    """The usable images of `split`, hashes of their content, and by position why others are bad.

    They are in an array in `folder`, which is for one `side` and `fit`; new and changed ones are
    added. Where the name or date of a file is new, its hash decides: copying a data set changes
    its dates and no content. Safe to call from two processes at once: the second waits and finds
    the work done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, reasons = folder / f"{split.name}.npy", dict[int, str]()
    stamps = np.array([file_stamp(split, i) for i in range(len(split))], "S32")
    with FileLock(file.with_suffix(".lock")):
        rows = sound_rows(file, side, len(split))
        places = find_places(rows, stamps)
        if todo := np.flatnonzero(places < 0).tolist():
            reserve_room(file, array_bytes(len(split), side))
            free = np.setdiff1d(np.arange(len(rows)), places)
            known = dict(zip(rows["hash"][free].tolist(), free.tolist(), strict=True))
            decode = partial(decode_image, size=side, fit=fit)
            with closing(scan_images(split, todo, known, decode, threads)) as images:
                rows, reasons = add_images(file, side, rows, images, stamps)
            places = find_places(rows, stamps)
        pixels = map_pixels(file, side, len(rows))
    kept = places[places >= 0]
    return ChosenPixels(pixels, kept), rows["hash"][kept].tolist(), reasons


def find_places(rows: Rows, stamps: npt.NDArray[np.bytes_]) -> Positions:
    """Where in the array the images with these `stamps` [N] are; -1 for what is not there."""
    return np.asarray(pd.Index(rows["stamp"]).get_indexer(pd.Index(stamps)), np.int64)


def add_images(
    file: Path, side: int, rows: Rows, images: Iterable[Scanned], stamps: npt.NDArray[np.bytes_]
) -> tuple[Rows, dict[int, str]]:
    """Put `images` behind those of `rows` into the array; all rows, and why some are bad."""
    count, reasons, saved = len(rows), dict[int, str](), time.monotonic()
    rows = np.append(rows, np.zeros(len(stamps), ROW))
    with file.open("r+b") as array:
        try:
            for image in images:
                if image.reason:
                    reasons[image.position] = image.reason
                elif image.pixels is None:
                    rows["stamp"][image.place] = stamps[image.position]
                else:
                    data = image.pixels.tobytes()
                    array.seek(array_bytes(count, side))
                    array.write(data)
                    rows[count] = stamps[image.position], image.hash, zlib.crc32(data)
                    count += 1
                if time.monotonic() - saved > SAVE_SECONDS:
                    save_rows(file, side, rows[:count], array)
                    saved = time.monotonic()
        finally:
            save_rows(file, side, rows[:count], array)
    return rows[:count], reasons


def save_rows(file: Path, side: int, rows: Rows, array: BinaryIO) -> None:
    """Write the index of `array`, which is open at `file`, when the disk has the pixels."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), side, side, 3)}
    array.seek(0)
    np.lib.format.write_array_header_1_0(array, header)  # for other programs
    array.flush()
    os.fsync(array.fileno())
    write_atomically(file.with_suffix(".npz"), lambda target: np.savez(target, rows=rows))


def reserve_room(file: Path, size: int) -> None:
    """Take room for `size` bytes, so that a full disk or a quota shows before the work is done."""
    with file.open("ab") as array:
        before = array.tell()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(array.fileno(), 0, size)
        except OSError as error:
            array.truncate(before)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # else the file system cannot reserve


def map_pixels(file: Path, side: int, count: int) -> Pixels:
    """The first `count` images in `file`; raises ``ValueError`` where there are fewer."""
    return np.memmap(file, np.uint8, "r", ARRAY_HEADER, (count, side, side, 3))


def read_rows(file: Path, side: int) -> Rows:
    """The index of the array in `file`; raises ``ValueError``, or what NumPy does, for damage.

    To compare all checksums would mean to read all images, so only a spread is compared.
    """
    with np.load(file.with_suffix(".npz")) as content:  # a zip, which has checksums of its own
        rows: Rows = content["rows"]
    pixels = map_pixels(file, side, len(rows))
    for i in range(0, len(rows), max(1, len(rows) // CHECKSUM_SPREAD)):
        if zlib.crc32(pixels[i].tobytes()) != rows[i]["crc"]:
            raise ValueError(f"image {i} does not match its checksum")
    return rows


def sound_rows(file: Path, side: int, wanted: int) -> Rows:
    """The index of the array in `file`, or an empty one, and no array, where it is of no use.

    That is where it is damaged, or most of it is not of the `wanted` images but of former ones. A
    run that has the array open keeps it.
    """
    try:
        rows = read_rows(file, side)
        if len(rows) <= 2 * wanted:
            return rows
    except FileNotFoundError:  # not begun, or killed before there was an index
        pass
    except Exception as error:  # a damaged file may raise anything
        print(f"{file} is damaged ({error}); it is built again")
    file.with_suffix(".npz").unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    return np.zeros(0, ROW)
