"""The image cache: right pixels, no work twice, nothing lost or wrongly trusted after a kill."""

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from emotion_toolbox.batches import make_datasets
from emotion_toolbox.cache import cache_folder
from emotion_toolbox.decoding import decode_image
from emotion_toolbox.errors import DataError
from emotion_toolbox.sample import load_data
from emotion_toolbox.tables import SPLITS, Split
from emotion_transfer import cache as cache_module
from emotion_transfer.config import EnhancedConfig, cache_size

Config = Callable[..., EnhancedConfig]
SIDE = 37  # the cache's side for 32-pixel images
TOTAL = 48  # images of the tiny data set


class Counter:
    """Counts the calls of a function of the cache module, and passes them on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls, self.original = 0, getattr(cache_module, name)
        monkeypatch.setattr(cache_module, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.original(*args)

    def take(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch, "decode_image")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch, "read_image_bytes")


def check(cfg: EnhancedConfig) -> CheckedData:
    return check_images(cfg, load_data(cfg))


def direct(split: Split, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """All images of a split, decoded without any cache."""
    return np.stack([decode_image(split.path(i).read_bytes(), side) for i in range(len(split))])


def assert_right(checked: CheckedData) -> None:
    """Every kept image of every split is what decoding its file gives."""
    for name in SPLITS:
        pixels = checked.stores[name].pixels()[checked.kept[name]]
        np.testing.assert_array_equal(pixels, direct(checked.data.splits[name]))


def touch(path: Path, seconds: float = 5) -> None:
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + int(seconds * 1e9)))


def repaint(path: Path, colour: str = "orange") -> None:
    Image.new("RGB", (50, 50), colour).save(path)
    touch(path)


# ------------------------------------------------------------------- work, and no work


def test_pixels_are_those_of_decoding_directly(tiny_config: Config) -> None:
    checked = check(tiny_config())
    assert_right(checked)
    for name, count in (("train", 24), ("val", 12), ("test", 12)):
        pixels = checked.stores[name].pixels()
        assert pixels.shape == (count, SIDE, SIDE, 3) and pixels.dtype == np.uint8
        assert not pixels.flags.writeable
        np.testing.assert_array_equal(checked.kept[name], np.arange(count))
    assert checked.bad.empty and list(checked.bad.columns) == ["split", "row", "file", "reason"]
    assert checked.repeated.empty
    assert len(np.unique(checked.stores["train"].pixels().reshape(24, -1), axis=0)) == 24


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_neither_threads_nor_chunks_change_anything(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, threads: int, chunk: int
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", chunk)
    assert_right(check(tiny_config(NUM_WORKERS=threads)))


def test_chunks_are_small_where_images_are_large(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 2 * SIDE * SIDE * 3)
    sizes: list[int] = []
    original = cache_module.scan_chunks

    def spy(*args: Any) -> Iterator[Any]:
        for chunk in original(*args):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(cache_module, "scan_chunks", spy)
    assert_right(check(tiny_config()))
    assert set(sizes) == {2}
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 1)
    sizes.clear()
    check(tiny_config(CACHE_SIZE=33))
    assert set(sizes) == {1}


def test_the_second_build_decodes_and_reads_nothing(
    tiny_config: Config, decoded: Counter, read: Counter
) -> None:
    first = check(tiny_config())
    assert decoded.take() == read.take() == TOTAL
    before = {p: p.read_bytes() for p in first.folder.iterdir()}
    assert_right(check(tiny_config()))
    assert decoded.take() == read.take() == 0
    assert {p: p.read_bytes() for p in first.folder.iterdir()} == before


def test_a_changed_file_is_decoded_again_and_no_other(
    tiny_config: Config, tiny_root: Path, decoded: Counter
) -> None:
    first = check(tiny_config())
    split = first.data.splits["val"]
    old = first.stores["val"].pixels().copy()
    decoded.take()
    repaint(split.path(7))
    again = check(tiny_config())
    assert decoded.take() == 1
    assert_right(again)
    unchanged = np.delete(np.arange(12), 7)
    new = again.stores["val"].pixels()
    np.testing.assert_array_equal(new[unchanged], old[unchanged])
    assert (new[7] == (255, 165, 0)).all()


def test_a_touched_file_is_read_once_and_not_decoded(
    tiny_config: Config, decoded: Counter, read: Counter
) -> None:
    data = check(tiny_config()).data
    decoded.take(), read.take()
    for split in data.splits.values():  # as after copying a data set
        for i in range(len(split)):
            touch(split.path(i))
    assert_right(check(tiny_config()))
    assert (decoded.take(), read.take()) == (0, TOTAL)
    assert_right(check(tiny_config()))
    assert (decoded.take(), read.take()) == (0, 0)


def test_the_same_size_and_another_content(tiny_config: Config, decoded: Counter) -> None:
    path = check(tiny_config()).data.splits["train"].path(3)
    raw = path.read_bytes()
    Image.open(path).rotate(180).save(path)
    path.write_bytes(path.read_bytes()[: len(raw)].ljust(len(raw), b"\0"))
    touch(path)
    decoded.take()
    assert len(path.read_bytes()) == len(raw)
    try:
        assert_right(check(tiny_config(MAX_BAD_FRACTION=1.0)))
    finally:
        assert decoded.take() >= 1


def reorder(csv: Path, order: Callable[[list[str]], list[str]]) -> None:
    header, *rows = csv.read_text().splitlines()
    csv.write_text("\n".join([header, *order(rows)]) + "\n")


def test_another_order_in_the_csv(tiny_config: Config, tiny_root: Path, decoded: Counter) -> None:
    check(tiny_config())
    reorder(tiny_root / "train.csv", lambda rows: rows[::-1])
    assert_right(check(tiny_config()))
    reorder(tiny_root / "train.csv", lambda rows: [rows[1], rows[0], *rows[2:]])
    decoded.take()
    assert_right(check(tiny_config()))
    assert decoded.take() == 2


def test_fewer_and_more_rows(
    tiny_config: Config, tiny_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tiny_config())
    full = (tiny_root / "train.csv").read_text()
    reorder(tiny_root / "train.csv", lambda rows: rows[3:-2])
    capsys.readouterr()
    assert_right(check(tiny_config()))
    assert "train.npy holds (24, 37, 37, 3) uint8 where (19, 37, 37, 3)" in capsys.readouterr().out
    (tiny_root / "train.csv").write_text(full)
    assert_right(check(tiny_config()))


def test_a_renamed_file_is_not_decoded_again(
    tiny_config: Config, tiny_root: Path, decoded: Counter
) -> None:
    check(tiny_config())
    csv = tiny_root / "train.csv"
    file = csv.read_text().splitlines()[4].split(",")[0]
    (tiny_root / file).rename(tiny_root / "renamed.bin")
    csv.write_text(csv.read_text().replace(file, "renamed.bin"))
    decoded.take()
    assert_right(check(tiny_config()))
    assert decoded.take() == 0


def test_sizes_and_sources_have_folders_of_their_own(
    tiny_config: Config, tmp_path: Path, tiny_root: Path
) -> None:
    shutil.copytree(tiny_root, tmp_path / "copy" / "tiny")
    configs = [
        tiny_config(),
        tiny_config(CACHE_SIZE=32),
        tiny_config(DATA_ROOT=str(tmp_path / "copy" / "tiny")),
        tiny_config(IMAGES_ROOT=str(tmp_path / "copy" / "tiny")),
    ]
    folders = {cache_folder(cfg, load_data(cfg)) for cfg in configs}
    assert len(folders) == 4
    for cfg in configs:
        checked = check(cfg)
        name = checked.folder.name
        assert name.startswith("tiny-") and f"-{cache_size(cfg)}px-" in name
        pixels = checked.stores["test"].pixels()
        np.testing.assert_array_equal(pixels, direct(checked.data.splits["test"], cache_size(cfg)))


def test_pixels_of_another_decoder_are_left_alone(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, decoded: Counter
) -> None:
    check(tiny_config())
    decoded.take()
    monkeypatch.setattr(cache_module, "DECODER_VERSION", cache_module.DECODER_VERSION + 1)
    check(tiny_config())
    assert decoded.take() == TOTAL


# ------------------------------------------------------------------- damage


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def save_as(array: npt.NDArray[Any], path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def save_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def append_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def to_fortran(path: Path) -> None:
    save_as(np.asfortranarray(np.load(path)), path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut in half": lambda p: os.truncate(p, p.stat().st_size // 2),
    "last byte gone": lambda p: os.truncate(p, p.stat().st_size - 1),
    "cut in the header": lambda p: os.truncate(p, 50),
    "empty": lambda p: os.truncate(p, 0),
    "bytes added": append_bytes,
    "text": lambda p: p.write_text("not an array"),
    "random bytes": lambda p: p.write_bytes(np.random.default_rng(0).bytes(p.stat().st_size)),
    "all zero": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "one bit flipped": flip_bit,
    "another array of the right form": lambda p: save_as(
        np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8), p
    ),
    "a mirrored array": lambda p: save_as(np.load(p)[::-1].copy(), p),
    "another shape": lambda p: save_as(np.zeros((24, 3, SIDE, SIDE), np.uint8), p),
    "another type": lambda p: save_as(np.load(p).astype(np.int8), p),
    "floats": lambda p: save_as(np.load(p).astype(np.float32), p),
    "Fortran order": to_fortran,
    "pickled objects": lambda p: save_as(np.array([{}, 1], dtype=object), p),
    "an archive": save_npz,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_array_is_named_and_built_again(
    tiny_config: Config, decoded: Counter, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    file = check(tiny_config()).stores["train"].array_file
    DAMAGE[case](file)
    decoded.take()
    capsys.readouterr()
    assert_right(check(tiny_config()))
    assert decoded.take() == 24
    out = capsys.readouterr().out
    assert str(file) in out and "it is built again" in out
    check(tiny_config())
    assert decoded.take() == 0 and not capsys.readouterr().out


def test_a_deleted_array_is_built_again(tiny_config: Config, decoded: Counter) -> None:
    checked = check(tiny_config())
    checked.stores["val"].array_file.unlink()
    decoded.take()
    assert_right(check(tiny_config()))
    assert decoded.take() == 12


def replace_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number] = line
    path.write_bytes(b"\n".join(lines))


INDEX_DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "deleted": (lambda p: p.unlink(), 24),
    "empty": (lambda p: os.truncate(p, 0), 24),
    "random bytes": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(4000)), 24),
    "zero bytes": (lambda p: p.write_bytes(bytes(4000)), 24),
    "a picture": (lambda p: Image.new("RGB", (9, 9)).save(p, "PNG"), 24),
    "a line of text": (lambda p: replace_line(p, 5, b"hello"), 1),
    "a blank line": (lambda p: replace_line(p, 5, b""), 1),
    "a line of zero bytes": (lambda p: replace_line(p, 5, bytes(90)), 1),
    "an open quote": (lambda p: replace_line(p, 5, b'5,"a,1,2,3,4,'), 1),
    "not a number": (lambda p: replace_line(p, 5, b"5,a,x,1,h,1,"), 1),
    "a value too few": (lambda p: replace_line(p, 5, b"5,a,1,1,h,1"), 1),
    "no UTF-8": (lambda p: replace_line(p, 5, b"5\xff,\xfe,1,1,h,1,"), 1),
    "a wrong checksum": (lambda p: replace_line(p, 5, b"5,a,1,1,h,1,"), 24),  # or the array is
    "a position too high": (lambda p: replace_line(p, 5, b"99,a,1,1,h,1,"), 1),
    "a negative position": (lambda p: replace_line(p, 5, b"-1,a,1,1,h,1,"), 1),
}


@pytest.mark.parametrize("case", INDEX_DAMAGE)
def test_a_damaged_index_costs_what_it_lost(
    tiny_config: Config, decoded: Counter, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    file = check(tiny_config()).stores["train"].index_file
    damage, lost = INDEX_DAMAGE[case]
    damage(file)
    decoded.take()
    capsys.readouterr()
    assert_right(check(tiny_config()))
    assert decoded.take() == lost
    if lost == 1 and "position" not in case:
        assert f"{file} has 1 damaged line" in capsys.readouterr().out


def test_an_index_cut_at_any_byte_is_completed(tiny_config: Config, decoded: Counter) -> None:
    cfg = tiny_config(MAX_BAD_FRACTION=1.0)
    data = load_data(cfg)
    split = data.splits["val"].select(np.arange(3))
    split.path(2).write_bytes(b"this is no image")  # its row ends in the reason
    store = ImageStore(split, cache_folder(cfg, data), SIDE)
    rows = build_store(store, 1)
    assert [bool(row.reason) for row in rows] == [False, False, True]
    pixels, whole = store.pixels().copy(), store.index_file.read_bytes()
    for end in range(len(whole)):
        store.index_file.write_bytes(whole[:end])
        assert build_store(store, 1) == rows, f"cut after {end} of {len(whole)} bytes"
        np.testing.assert_array_equal(store.pixels(), pixels)
        assert read_index(store.index_file, 3) == dict(enumerate(rows))


def test_a_file_name_may_hold_what_a_csv_must_quote(tiny_config: Config, tiny_root: Path) -> None:
    names = ["a,b.jpg", 'a"b.jpg', "été 日本.jpg", "a;b'c.jpg", " x .jpg", "a\u2028b\x85c.jpg"]
    csv = tiny_root / "val.csv"
    rows = csv.read_text().splitlines()
    for i, name in enumerate(names, start=1):
        old, label = rows[i].split(",")
        (tiny_root / old).rename(tiny_root / name)
        quoted = name.replace('"', '""')
        rows[i] = f'"{quoted}",{label}'
    csv.write_text("\n".join(rows) + "\n")
    checked = check(tiny_config())
    assert_right(checked)
    index = read_index(checked.stores["val"].index_file, 12)
    assert [index[i].file for i in range(6)] == names


# ------------------------------------------------------------------- killed, and at once

PROGRAM = """
    import os, random, signal, sys, time
    from emotion_transfer import cache
    from emotion_transfer.config import make_config
    from emotion_transfer.data import load_data

    cache.CHUNK_IMAGES = 2
    decode, done = cache.decode_image, []

    def slowly(data, side):
        time.sleep(0.005)
        done.append(1)
        return decode(data, side)

    cache.decode_image = slowly

    def work(folder):
        cfg = make_config({"DATASET": "files", "DATA_ROOT": sys.argv[1], "CACHE_DIR": folder,
                           "IMG_SIZE": 32, "NUM_WORKERS": 2})
        cache.check_images(cfg, load_data(cfg))

    def child(folder):
        pid = os.fork()
        if pid == 0:
            work(folder)
            print(f"decoded {len(done)}", flush=True)
            os._exit(0)
        return pid
"""


def run_program(root: Path, folders: list[Path], more: str) -> str:
    """Run `more` after PROGRAM in a process of its own; what it prints."""
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(more)
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), *map(str, folders)],
        cwd=Path(cache_module.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@forks
def test_a_build_killed_again_and_again_ends_as_an_uninterrupted_one(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out = run_program(
        tiny_root,
        [whole, killed],
        """
        def rows():
            return sum(len(open(os.path.join(top, name)).readlines())
                       for top, _, names in os.walk(sys.argv[3])
                       for name in names if name.endswith("index.csv"))

        rng = random.Random(1)
        os.waitpid(child(sys.argv[2]), 0)
        for kill in range(6):
            before, pid = rows(), child(sys.argv[3])
            while kill and rows() == before and not os.waitpid(pid, os.WNOHANG)[0]:
                time.sleep(0.001)  # the first is killed before anything is written, perhaps
            time.sleep(rng.uniform(0, 0.008))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            print("killed with", rows(), "rows", flush=True)
        os.waitpid(child(sys.argv[3]), 0)
        """,
    )
    rows = [int(n) for n in re.findall(r"killed with (\d+) rows", out)]
    work = [int(n) for n in re.findall(r"decoded (\d+)", out)]
    assert len(rows) == 6 and rows == sorted(rows) and 0 < rows[-1] < TOTAL, out
    assert work[0] == TOTAL and work[-1] <= TOTAL - rows[-1], out  # what is done stays done
    one, other = check(tiny_config(CACHE_DIR=str(whole))), check(tiny_config(CACHE_DIR=str(killed)))
    assert_right(other)
    for name in SPLITS:
        files = [c.stores[name].array_file for c in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()
        indices = [read_index(c.stores[name].index_file, TOTAL) for c in (one, other)]
        assert indices[0] == indices[1]


@forks
def test_two_processes_at_once_share_the_work(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    out = run_program(
        tiny_root,
        [tmp_path / "cache"],
        """
        pids = [child(sys.argv[2]) for _ in range(3)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
        """,
    )
    assert sum(int(n) for n in re.findall(r"decoded (\d+)", out)) == TOTAL
    assert_right(check(tiny_config()))


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("before", ["nothing", "other pictures", "another order"])
def test_a_crash_at_any_write_leaves_nothing_wrong(
    tiny_config: Config,
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
) -> None:
    """Stop at the first, second, ... fsync; then go on, or back to what was there before."""
    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 4)
    monkeypatch.setattr(cache_module, "CHECKSUM_SPREAD", 1)  # no luck with the checksums
    old = load_data(tiny_config()).splits["val"]
    shutil.copytree(tiny_root, tmp_path / "new")
    new = dataclasses.replace(old, images_root=tmp_path / "new")
    if before == "other pictures":
        for i in range(12):
            repaint(new.path(i), f"#{i:02d}80{i:02d}")
    if before == "another order":
        new = new.select(np.arange(12)[::-1])
    fsync, died_at, died = os.fsync, 0, True
    while died:
        died_at += 1
        folder, left = tmp_path / f"crash-{died_at}", itertools.count(died_at - 1, -1)
        if before != "nothing":
            build_store(ImageStore(old, folder, SIDE), 1)

        def dying(file: int, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Crash
            fsync(file)

        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(os, "fsync", dying)
            build_store(ImageStore(new, folder, SIDE), 1)
            died = False
        shutil.copytree(folder, tmp_path / f"back-{died_at}")
        for place, split in ((folder, new), (tmp_path / f"back-{died_at}", old)):
            store = ImageStore(split, place, SIDE)
            assert not any(row.reason for row in build_store(store, 1))
            np.testing.assert_array_equal(store.pixels(), direct(split))
    assert died_at > 6  # pixels and rows of three chunks, and more where rows are revoked


def test_an_interrupted_build_stops_soon_and_leaves_no_thread(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def slowly(data: bytes, side: int) -> npt.NDArray[np.uint8]:
        calls.append(1)
        time.sleep(0.01)
        return decode_image(data, side)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "CHUNK_IMAGES", 8)
    monkeypatch.setattr(cache_module, "decode_image", slowly)
    monkeypatch.setattr(cache_module, "append_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(tiny_config())
    assert len(calls) < 16  # the two chunks ahead are given up
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


# ------------------------------------------------------------------- room


def free_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(
        cache_module, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free))
    )


def assert_advice(message: str) -> None:
    for setting in ("CACHE_DIR", "CACHE_SIZE", "CACHE=False"):
        assert setting in message


def test_the_room_for_all_splits_is_checked_before_anything_is_decoded(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: Counter
) -> None:
    need = TOTAL * SIDE * SIDE * 3
    free_room(monkeypatch, need - 1)
    with pytest.raises(DataError, match=r"needs 0\.00 GB more in .*cache") as caught:
        check(tiny_config())
    assert_advice(str(caught.value))
    assert decoded.take() == 0 and not list((tmp_path / "cache").glob("**/*.npy"))
    free_room(monkeypatch, need)
    assert_right(check(tiny_config()))
    free_room(monkeypatch, 0)
    assert_right(check(tiny_config()))  # nothing more is needed
    assert_right_without_cache(tiny_config)


def assert_right_without_cache(tiny_config: Config) -> None:
    assert len(check(tiny_config(CACHE=False)).data.splits["train"]) == 24


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_room_that_cannot_be_reserved(
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: Counter,
    number: int,
) -> None:
    def full(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=re.escape(os.strerror(number))) as caught:
        check(tiny_config())
    assert_advice(str(caught.value))
    assert decoded.take() == 0 and not list((tmp_path / "cache").glob("**/*.npy"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unable(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    assert_right(check(tiny_config()))
    monkeypatch.delattr(os, "posix_fallocate")
    assert_right(check(tiny_config(CACHE_SIZE=37, CACHE_DIR=tiny_config().CACHE_DIR + "2")))


def test_the_room_is_really_taken(tiny_config: Config) -> None:
    store = check(tiny_config()).stores["train"]
    info = store.array_file.stat()
    assert info.st_size == 128 + int(np.prod(store.shape))
    if hasattr(info, "st_blocks"):
        assert info.st_blocks * 512 >= info.st_size


def test_a_disk_that_fills_up_while_decoding(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device") as caught:
            check(tiny_config())
        assert_advice(str(caught.value))
    assert_right(check(tiny_config()))


def test_a_cache_folder_that_cannot_be_made(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache in (True, False):
        with pytest.raises(DataError, match="set CACHE_DIR"):
            check(tiny_config(CACHE_DIR=str(tmp_path / "file"), CACHE=cache))


# ------------------------------------------------------------------- bad images


def spoil(checked_root: Path, split: str, position: int, content: bytes | None) -> str:
    """Replace an image (None: delete it); its path as in the CSV."""
    file = (checked_root / f"{split}.csv").read_text().splitlines()[position + 1].split(",")[0]
    if content is None:
        (checked_root / file).unlink()
    else:
        (checked_root / file).write_bytes(content)
        touch(checked_root / file)
    return file


@pytest.mark.parametrize("cache", [True, False])
def test_bad_images_are_reported_and_left_out(
    tiny_config: Config, tiny_root: Path, cache: bool
) -> None:
    good = (tiny_root / "train/calm_000.jpg").read_bytes()
    expected = [
        ("train", 2, spoil(tiny_root, "train", 0, b""), "zero bytes"),
        ("train", 7, spoil(tiny_root, "train", 5, good[: len(good) // 2]), "truncated"),
        ("val", 13, spoil(tiny_root, "val", 11, None), "missing"),
        ("test", 4, spoil(tiny_root, "test", 2, b"<html>\nnot found"), "not an image"),
    ]
    for _ in range(2):  # the second time from the index
        checked = check(tiny_config(CACHE=cache, MAX_BAD_FRACTION=0.2))
        assert len(checked.bad) == 4
        for (_, row), (split, line, file, reason) in zip(
            checked.bad.iterrows(), expected, strict=True
        ):
            assert (row["split"], row["row"], row["file"]) == (split, line, file)
            assert reason in row["reason"] and "\n" not in row["reason"]
        assert [len(checked.data.splits[s]) for s in SPLITS] == [22, 11, 11]
        np.testing.assert_array_equal(
            checked.kept["train"], [i for i in range(24) if i not in (0, 5)]
        )
        train = checked.data.splits["train"]
        assert train.rows.tolist() == [i + 2 for i in range(24) if i not in (0, 5)]
        assert checked.data.classes == ("calm", "joy", "rage")
        if cache:
            assert_right(checked)


def test_a_repaired_image_is_picked_up(
    tiny_config: Config, tiny_root: Path, tiny_template: Path, decoded: Counter
) -> None:
    cfg = tiny_config(MAX_BAD_FRACTION=0.2)
    good = [spoil(tiny_root, "val", 1, b"broken"), spoil(tiny_root, "val", 2, None)]
    assert len(check(cfg).bad) == 2
    decoded.take()
    for file in good:
        shutil.copy2(tiny_template / file, tiny_root / file)
    checked = check(cfg)
    assert checked.bad.empty and len(checked.data.splits["val"]) == 12
    assert decoded.take() == 2
    assert_right(checked)
    (tiny_root / good[0]).write_bytes(b"broken again")
    assert check(cfg).bad["file"].tolist() == [good[0]]


def test_what_only_could_not_be_read_is_tried_again(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a moment, or a decoder that is installed later, changes no date."""
    cfg = tiny_config(MAX_BAD_FRACTION=0.2)
    read_bytes = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self.name == "joy_001.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        assert check(cfg).bad["reason"].tolist() == ["Input/output error"] * 3
    with monkeypatch.context() as patch:
        patch.setattr("emotion_transfer.data.IMAGE_FORMATS", ("JPEG",))
        assert (
            check(tiny_config(MAX_BAD_FRACTION=1.0, CACHE=False))
            .bad["file"]
            .str.endswith("png")
            .all()
        )
    for cache in (True, False):
        assert check(tiny_config(CACHE=cache)).bad.empty


def test_too_many_bad_images_stop_the_run(tiny_config: Config, tiny_root: Path) -> None:
    files = [spoil(tiny_root, "train", i, b"broken") for i in range(13)]
    allowed = 13 / 48
    assert len(check(tiny_config(MAX_BAD_FRACTION=allowed)).bad) == 13
    with pytest.raises(DataError) as caught:
        check(tiny_config(MAX_BAD_FRACTION=0.25))
    message = str(caught.value)
    assert "13 of 48 images cannot be used (27.1%)" in message and "IMAGES_ROOT" in message
    assert "MAX_BAD_FRACTION=25.0%" in message
    for i in range(10):
        assert f"{tiny_root / 'train.csv'} row {i + 2}: {files[i]}: not an image" in message
    assert files[10] not in message and "and 3 more" in message


def test_the_default_stops_at_more_than_one_in_a_hundred(
    tiny_config: Config, tiny_root: Path
) -> None:
    spoil(tiny_root, "train", 0, None)
    with pytest.raises(DataError, match=r"1 of 48 images cannot be used \(2\.1%\)"):
        check(tiny_config())


def test_a_split_without_a_usable_image_stops_the_run(tiny_config: Config, tiny_root: Path) -> None:
    for i in range(12):
        spoil(tiny_root, "val", i, b"broken")
    with pytest.raises(DataError, match=r"no image of .*val\.csv can be used") as caught:
        check(tiny_config(MAX_BAD_FRACTION=1.0))
    assert "row 2" in str(caught.value)


def test_a_class_without_a_usable_training_image_stops_the_run(
    tiny_config: Config, tiny_root: Path
) -> None:
    for i in range(1, 24, 3):
        spoil(tiny_root, "train", i, b"broken")
    with pytest.raises(DataError, match=r"train\.csv has no usable image of joy"):
        check(tiny_config(MAX_BAD_FRACTION=1.0))


def test_a_wrong_images_root_says_so(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image of .* can be used") as caught:
        check(tiny_config(IMAGES_ROOT=str(tmp_path / "elsewhere")))
    assert "missing" in str(caught.value)


# ------------------------------------------------------------------- leaks


@pytest.mark.parametrize("cache", [True, False])
def test_an_image_in_two_splits(tiny_config: Config, tiny_root: Path, cache: bool) -> None:
    original = (tiny_root / "train/joy_001.jpg").read_bytes()
    leaked = [spoil(tiny_root, "test", 3, original), spoil(tiny_root, "val", 0, original)]
    with pytest.raises(DataError) as caught:
        check(tiny_config(CACHE=cache))
    message = str(caught.value)
    for place in (
        f"{tiny_root / 'train.csv'} row 3 (train/joy_001.jpg)",
        f"{tiny_root / 'test.csv'} row 5 ({leaked[0]})",
        f"{tiny_root / 'val.csv'} row 2 ({leaked[1]})",
    ):
        assert place in message
    assert "1 images stand in more than one split" in message and "ALLOW_DUPLICATES" in message
    checked = check(tiny_config(CACHE=cache, ALLOW_DUPLICATES=True))
    assert checked.repeated["file"].tolist() == [leaked[0], "train/joy_001.jpg", leaked[1]]
    assert checked.repeated["split"].tolist() == ["test", "train", "val"]
    assert [len(checked.data.splits[s]) for s in SPLITS] == [24, 12, 12]


def test_twice_in_one_split_is_no_leak(tiny_config: Config, tiny_root: Path) -> None:
    spoil(tiny_root, "train", 4, (tiny_root / "train/joy_001.jpg").read_bytes())
    assert check(tiny_config()).repeated.empty


def test_bad_images_are_no_leak(tiny_config: Config, tiny_root: Path) -> None:
    for split in SPLITS:
        spoil(tiny_root, split, 0, b"broken")
    checked = check(tiny_config(MAX_BAD_FRACTION=0.5))
    assert checked.repeated.empty and len(checked.bad) == 3


# ------------------------------------------------------------------- without a cache


def test_without_a_cache_the_reports_are_the_same(
    tiny_config: Config, tiny_root: Path, tmp_path: Path, decoded: Counter
) -> None:
    spoil(tiny_root, "train", 3, b"broken")
    spoil(tiny_root, "test", 3, (tiny_root / "val/joy_001.jpg").read_bytes())
    options: dict[str, Any] = {"MAX_BAD_FRACTION": 0.1, "ALLOW_DUPLICATES": True}
    without = check(tiny_config(CACHE=False, **options))
    assert not list((tmp_path / "cache").glob("**/*.npy"))
    decoded.take()
    check(tiny_config(CACHE=False, **options))
    assert decoded.take() == 1  # the bad one, tried again
    cached = check(tiny_config(**options))
    assert without.bad.equals(cached.bad) and without.repeated.equals(cached.repeated)
    for name in SPLITS:
        np.testing.assert_array_equal(without.kept[name], cached.kept[name])
        assert without.data.splits[name].files == cached.data.splits[name].files


# ------------------------------------------------------------------- settings


def test_worker_count(tiny_config: Config) -> None:
    assert worker_count(tiny_config(NUM_WORKERS=5)) == 5
    assert worker_count(tiny_config(NUM_WORKERS=0)) == 1
    assert worker_count(tiny_config(NUM_WORKERS=None)) >= 1


def test_building_from_many_threads_of_one_process(tiny_config: Config, decoded: Counter) -> None:
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: check(tiny_config()), range(3)))
    assert decoded.take() == TOTAL
    for checked in results:
        assert_right(checked)


# ------------------------------------------------------------------------------ another run


@pytest.mark.parametrize("change", ["order", "content"])
def test_a_running_training_keeps_its_pixels(
    tiny_config: Config, tiny_root: Path, change: str
) -> None:
    """Another run may begin meanwhile, over the same files in another order, or over others."""
    cfg = tiny_config()
    running = make_datasets(cfg, check_images(cfg, load_data(cfg)))["train"]
    everything = np.arange(len(running))
    before = running.pixels.gather(everything)
    if change == "order":
        header, *rows = (tiny_root / "train.csv").read_text().splitlines()
        (tiny_root / "train.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    else:
        shutil.copy(running.split.path(0), running.split.path(4))
    other = make_datasets(cfg, check_images(cfg, load_data(cfg)))["train"]
    after = other.pixels.gather(everything)
    np.testing.assert_array_equal(running.pixels.gather(everything), before)
    if change == "order":
        np.testing.assert_array_equal(after, before[::-1])
    else:
        np.testing.assert_array_equal(after[4], before[0])
    assert not list(tiny_root.parent.rglob("*.copy"))
