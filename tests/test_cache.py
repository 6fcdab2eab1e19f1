"""The cache: right pixels whatever happens to it, to its sources, or to who fills it."""

import dataclasses
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_run import listed

from emotion_toolbox import cache
from emotion_toolbox.cache import (
    DecodedData,
    cache_folder,
    decode_data,
    missing_bytes,
    refuse_bad_images,
    refuse_leaks,
)
from emotion_toolbox.decoding import decode_image
from emotion_toolbox.errors import DataError
from emotion_toolbox.tables import SPLITS, load_splits

SIDE = 37
TOTAL = 48  # images of the tiny data set


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decoded_files(monkeypatch):
    """The images that are really decoded."""
    found: list[int] = []
    original = cache.decode_image

    def noting(data, size, fit="crop"):
        found.append(len(data))
        return original(data, size, fit)

    monkeypatch.setattr(cache, "decode_image", noting)
    return found


def build(root: Path, place: Path | None, threads: int = 1, fit: str = "crop") -> DecodedData:
    return decode_data(load_splits(root), SIDE, fit, cache_dir=place, threads=threads)


def assert_right(decoded: DecodedData, fit: str = "crop") -> None:
    """Every usable image of every split is what decoding its file gives."""
    for name in SPLITS:
        split = decoded.data.splits[name]
        pixels = decoded.pixels[name][np.arange(len(split))]
        for i in range(len(split)):
            direct = decode_image(split.path(i).read_bytes(), SIDE, fit)
            np.testing.assert_array_equal(pixels[i], direct, err_msg=split.files[i])


def arrays(place: Path) -> list[Path]:
    return sorted(place.rglob("*.npy"))


# --- what is built and kept ----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_the_pixels_are_those_of_the_files(tiny_root, place, threads, keep):
    decoded = build(tiny_root, place if keep else None, threads)
    assert_right(decoded)
    assert decoded.bad.empty and decoded.repeated.empty
    assert len(arrays(place)) == (3 if keep else 0)


def test_nothing_is_decoded_twice(tiny_root, place, decoded_files):
    first = build(tiny_root, place)
    assert len(decoded_files) == TOTAL
    again = build(tiny_root, place)
    assert len(decoded_files) == TOTAL and again.digests == first.digests
    assert_right(again)


def test_the_map_cannot_be_written_to(tiny_root, place):
    for _ in range(2):  # new, and found
        with pytest.raises(ValueError, match="read-only"):
            build(tiny_root, place).pixels["val"].source[0] = 0


def test_a_plain_numpy_program_can_read_the_array(tiny_root, place):
    decoded = build(tiny_root, place)
    array = np.load(next(f for f in arrays(place) if f.name.startswith("train")), mmap_mode="r")
    assert array.shape == (24, SIDE, SIDE, 3) and array.dtype == np.uint8
    np.testing.assert_array_equal(array, decoded.pixels["train"][np.arange(24)])


def test_a_copy_with_new_dates_is_not_decoded_again(tiny_root, place, decoded_files, monkeypatch):
    build(tiny_root, place)
    files = {f: f.stat().st_ino for f in arrays(place)}
    for file in [*tiny_root.rglob("*.jpg"), *tiny_root.rglob("*.png")]:
        os.utime(file, (1e9, 1e9))
    again = build(tiny_root, place)
    assert len(decoded_files) == TOTAL
    assert_right(again)
    assert {f: f.stat().st_ino for f in arrays(place)} == files  # nor are its pixels copied
    monkeypatch.setattr(cache, "read_image_bytes", lambda path: pytest.fail("read again"))
    build(tiny_root, place)


def rewrite(table: Path, change) -> None:
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *change(rows)]) + "\n")


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[::-1], lambda rows: rows[3:-2], lambda rows: [rows[1], rows[0], *rows[2:]]],
    ids=["reversed", "fewer", "two exchanged"],
)
def test_another_table_of_the_same_images_decodes_nothing(
    tiny_root, place, decoded_files, monkeypatch, change
):
    build(tiny_root, place)
    whole = (tiny_root / "train.csv").read_text()
    rewrite(tiny_root / "train.csv", change)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_image_bytes", lambda path: pytest.fail("read again"))
        other = build(tiny_root, place)
    assert_right(other)
    assert len(decoded_files) == TOTAL
    (tiny_root / "train.csv").write_text(whole)
    assert_right(build(tiny_root, place))
    assert len(decoded_files) <= TOTAL + 5  # those that were gone


def test_an_array_that_is_mostly_of_former_images_is_built_again(tiny_root, place):
    data = load_splits(tiny_root)
    few, counts = dataclasses.replace(data.splits["val"], name="train").select(np.arange(5)), []
    for split in (data.splits["train"], few, few):
        pixels, hashes, _ = cache.cache_images(split, SIDE, 1, place)
        direct = [decode_image(split.path(i).read_bytes(), SIDE) for i in range(len(split))]
        np.testing.assert_array_equal(pixels[np.arange(len(split))], direct)
        counts.append(len(np.load(place / "train.npy")))
    assert counts == [24, 5, 5] and len(hashes) == 5


def test_a_file_that_takes_the_content_of_another_leaves_it_its_own(
    tiny_root, place, decoded_files
):
    """Two files of one content, with new dates again and again, are both found again."""
    split = load_splits(tiny_root).splits["train"]
    shutil.copyfile(split.path(1), split.path(0))
    for date in (1e9, 1.1e9, 1.2e9):
        for i in (0, 1):
            os.utime(split.path(i), (date, date))
        assert_right(build(tiny_root, place))
    assert len(decoded_files) <= TOTAL + 2


def test_a_renamed_file_is_not_decoded_again(tiny_root, place, decoded_files):
    build(tiny_root, place)
    old = (tiny_root / "train.csv").read_text().splitlines()[4].split(",")[0]
    (tiny_root / old).rename(tiny_root / "été 日本;'.bin")
    rewrite(tiny_root / "train.csv", lambda rows: [r.replace(old, "été 日本;'.bin") for r in rows])
    assert_right(build(tiny_root, place))
    assert len(decoded_files) == TOTAL


def test_pixels_of_another_decoder_are_left_alone(tiny_root, place, monkeypatch, decoded_files):
    build(tiny_root, place)
    monkeypatch.setattr(cache, "DECODER_VERSION", cache.DECODER_VERSION + 1)
    build(tiny_root, place)
    assert len(decoded_files) == 2 * TOTAL


def test_each_fit_is_cached_by_itself(tiny_root, place, decoded_files):
    """Never mixed: not with what is there, not after a change, and both are found again."""
    data, fits = load_splits(tiny_root), ("crop", "pad", "squash", "pad", "crop")
    for number, fit in enumerate(fits):
        assert (missing_bytes(data, SIDE, place, fit) == 0) == (number >= 3)
        assert_right(build(tiny_root, place, fit=fit), fit)
        assert len(decoded_files) == min(number + 1, 3) * TOTAL
    assert len({cache_folder(data, SIDE, place, fit) for fit in fits}) == 3
    victim = data.splits["val"].path(1)
    Image.new("RGB", (44, 20), "teal").save(victim)
    for fit in ("pad", "crop"):
        assert_right(build(tiny_root, place, fit=fit), fit)
    assert len(decoded_files) == 3 * TOTAL + 2


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_without_a_cache_the_fit_is_kept_too(tiny_root, fit):
    assert_right(build(tiny_root, None, fit=fit), fit)


@pytest.mark.parametrize("keep_date", [True, False])
def test_a_changed_image_is_decoded_anew(tiny_root, place, decoded_files, keep_date):
    before = build(tiny_root, place)
    files = [before.data.splits["val"].path(i) for i in (1, 2)]
    info = files[0].stat()
    shutil.copyfile(files[1], files[0])
    if keep_date:
        os.utime(files[0], ns=(info.st_atime_ns, info.st_mtime_ns))
    after = build(tiny_root, place)
    assert_right(after)
    assert after.digests["val"] != before.digests["val"]
    assert after.digests["train"] == before.digests["train"]
    assert len(decoded_files) <= TOTAL + 1  # its new content was known already


def test_a_run_in_training_keeps_its_pixels(tiny_root, place, decoded_files):
    """Meanwhile another begins, over the same files in another order and with one changed."""
    running = build(tiny_root, place)
    train = running.pixels["train"]
    before = train[np.arange(24)].copy()
    table = tiny_root / "train.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows[::-1]]) + "\n")
    shutil.copyfile(tiny_root / rows[3].split(",")[0], tiny_root / rows[7].split(",")[0])
    other = build(tiny_root, place)
    assert_right(other)
    np.testing.assert_array_equal(train[np.arange(24)], before)
    assert len(decoded_files) <= TOTAL + 1  # the pixels that were there have been copied
    assert len(arrays(place)) == 3  # and the old array is gone from the disk


def test_a_run_keeps_the_pixels_of_an_image_that_breaks_and_comes_back_another(tiny_root, place):
    running = build(tiny_root, place)
    before = running.pixels["val"][np.arange(12)].copy()
    path, good = running.data.splits["val"].path(3), running.data.splits["val"].path(4)
    path.write_bytes(b"broken")
    assert len(build(tiny_root, place).bad) == 1
    shutil.copyfile(good, path)
    os.utime(path, (1e9, 1e9))
    assert_right(build(tiny_root, place))
    np.testing.assert_array_equal(running.pixels["val"][np.arange(12)], before)


def test_sets_in_other_places_and_sizes_have_folders_of_their_own(tiny_root, tmp_path, place):
    other = shutil.copytree(tiny_root, tmp_path / "other" / "tiny")
    data = [load_splits(root) for root in (tiny_root, other)]
    folders = {cache_folder(d, side, place) for d in data for side in (37, 38)}
    assert len(folders) == 4


def test_without_a_cache_nothing_is_written(tiny_root, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert_right(build(tiny_root, None))
    assert set(tmp_path.rglob("*")) == before


# --- bad images and copies -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_bad_images_are_named_and_left_out(tiny_root, place, keep):
    data = load_splits(tiny_root)
    victims = {0: b"no image", 5: b"", 9: None}
    for i, content in victims.items():
        path = data.splits["train"].path(i)
        path.unlink() if content is None else path.write_bytes(content)
    decoded = build(tiny_root, place if keep else None)
    assert_right(decoded)
    assert decoded.bad["row"].tolist() == [2, 7, 11]
    reasons = dict(zip(decoded.bad["row"], decoded.bad["reason"], strict=True))
    assert reasons[7] == "zero bytes" and reasons[11] == "missing" and "not an image" in reasons[2]
    assert len(decoded.data.splits["train"]) == 21
    with pytest.raises(
        DataError, match=r"3 of 48 images .*6\.2%.*MAX_BAD_FRACTION=1\.0%"
    ) as caught:
        refuse_bad_images(decoded, 0.01)
    assert f"{tiny_root / 'train.csv'} row 7: {data.splits['train'].files[5]}: zero bytes" in str(
        caught.value
    )
    refuse_bad_images(decoded, 0.1)


def test_a_bad_image_is_tried_every_time(tiny_root, place):
    path = load_splits(tiny_root).splits["val"].path(3)
    good = path.read_bytes()
    path.write_bytes(b"broken")
    assert len(build(tiny_root, place).bad) == 1
    files = {f: f.stat().st_ino for f in arrays(place)}
    assert len(build(tiny_root, place).bad) == 1
    assert {f: f.stat().st_ino for f in arrays(place)} == files  # the other pixels stay there
    path.write_bytes(good)
    again = build(tiny_root, place)
    assert again.bad.empty
    assert_right(again)


@pytest.mark.parametrize("keep", [True, False])
def test_what_only_could_not_be_read_is_tried_again(tiny_root, place, monkeypatch, keep):
    """A disk that fails for a moment changes no date."""
    read_bytes = Path.read_bytes

    def failing(self):
        if self.name == "joy_001.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        reasons = build(tiny_root, place if keep else None).bad["reason"].tolist()
        assert reasons == ["Input/output error"] * 3
    again = build(tiny_root, place if keep else None)
    assert again.bad.empty
    assert_right(again)


def test_a_split_or_class_without_a_usable_image_is_refused(tiny_root, place):
    data = load_splits(tiny_root)
    for i in range(12):
        data.splits["val"].path(i).write_bytes(b"broken")
    with pytest.raises(DataError, match=rf"no image of {tiny_root / 'val.csv'} can be used"):
        refuse_bad_images(build(tiny_root, place), 1.0)
    for i in np.flatnonzero(data.splits["train"].labels == 1):
        data.splits["train"].path(int(i)).write_bytes(b"broken")
    for i in range(12):
        shutil.copyfile(data.splits["test"].path(i), data.splits["val"].path(i))
    with pytest.raises(DataError, match="no usable image of joy"):
        refuse_bad_images(build(tiny_root, place), 1.0)


def test_one_image_in_two_splits_is_refused_unless_allowed(tiny_root, place):
    data = load_splits(tiny_root)
    pair = data.splits["train"].path(2), data.splits["test"].path(2)
    shutil.copyfile(*pair)
    decoded = build(tiny_root, place)
    assert len(decoded.repeated) == 2
    with pytest.raises(DataError, match=r"test\.csv row 4 .* and .*train\.csv row 4 .*ALLOW_DUP"):
        refuse_leaks(decoded, False)
    refuse_leaks(decoded, True)


# --- damage and full disks -----------------------------------------------------------------------

DAMAGE = {
    "empty": lambda data: b"",
    "short": lambda data: data[: len(data) // 2],
    "long": lambda data: data + b"x",
    "no array": lambda data: b"x" * len(data),
    "zeroed": lambda data: data[:128] + bytes(len(data) - 128),
    "one bit": lambda data: data[: len(data) // 2] + flipped(data) + data[len(data) // 2 + 1 :],
}


def flipped(data: bytes) -> bytes:
    return bytes([data[len(data) // 2] ^ 1])


# arrays of another form, or of the right one with other pixels
EXCHANGES = {
    "another size": lambda array: np.zeros((12, 8, 8, 3), np.uint8),
    "another shape": lambda array: array.transpose(0, 3, 1, 2).copy(),
    "another type": lambda array: array.astype(np.int8),
    "column by column": np.asfortranarray,
    "objects": lambda array: np.array([{}, 1], dtype=object),
    "mirrored": lambda array: array[::-1].copy(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_damaged_cache_is_named_and_built_again(tiny_root, place, capsys, damage, suffix):
    build(tiny_root, place)
    victim = next(f for f in place.rglob(f"*{suffix}") if f.name.startswith("test"))
    victim.write_bytes(DAMAGE[damage](victim.read_bytes()))
    capsys.readouterr()
    again = build(tiny_root, place)
    assert_right(again)
    if damage != "long":  # an array has room after its images, and a zip may have bytes there
        assert f"{victim.with_suffix('.npy')} " in capsys.readouterr().out


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_another_array_under_the_same_name_is_built_again(tiny_root, place, capsys, exchange):
    build(tiny_root, place)
    victim = next(f for f in arrays(place) if f.name.startswith("test"))
    np.save(victim, EXCHANGES[exchange](np.load(victim)))
    assert_right(build(tiny_root, place))
    if exchange != "another type":  # of the same bytes
        assert f"{victim} is damaged" in capsys.readouterr().out


def test_a_deleted_array_or_index_is_built_again(tiny_root, place):
    for suffix in (".npy", ".npz"):
        build(tiny_root, place)
        next(f for f in place.rglob(f"*{suffix}") if f.name.startswith("val")).unlink()
        assert_right(build(tiny_root, place))


def test_a_full_disk_is_named_before_the_work(tiny_root, place, monkeypatch, decoded_files):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"needs 0\.00 GB more in .*CACHE_DIR.*CACHE=False"):
        build(tiny_root, place)
    assert not decoded_files and not arrays(place)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_room_that_cannot_be_had_is_named_before_the_work(
    tiny_root, place, monkeypatch, decoded_files, number
):
    monkeypatch.setattr(os, "posix_fallocate", failing_with(number))
    with pytest.raises(DataError, match=rf"{os.strerror(number)}; set CACHE_DIR .*CACHE=False"):
        build(tiny_root, place)
    assert not decoded_files and not any(f.stat().st_size for f in arrays(place))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_is_used(tiny_root, place, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", failing_with(number), raising=False)
    assert_right(build(tiny_root, place))
    monkeypatch.delattr(os, "posix_fallocate")
    assert_right(build(tiny_root, place / "other"))


def failing_with(number: int):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fills_up_on_the_way_is_named(tiny_root, place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_with(errno.ENOSPC))
        with pytest.raises(DataError, match="No space left on device.*; set CACHE_DIR"):
            build(tiny_root, place)
    assert_right(build(tiny_root, place))


def test_the_room_is_really_taken(tiny_root, place):
    build(tiny_root, place)
    for file in arrays(place):
        info = file.stat()
        assert getattr(info, "st_blocks", info.st_size) * 512 >= info.st_size


def test_the_room_that_is_still_needed(tiny_root, place):
    data = load_splits(tiny_root)
    whole = missing_bytes(data, SIDE, place)
    assert TOTAL * SIDE * SIDE * 3 <= whole <= TOTAL * SIDE * SIDE * 3 + 3 * 200
    build(tiny_root, place)
    assert missing_bytes(data, SIDE, place) == 0


def test_a_folder_that_cannot_be_written_is_named(tiny_root, place):
    place.write_text("a file")
    with pytest.raises(DataError, match=r"image cache in .* cannot be written.*CACHE_DIR"):
        build(tiny_root, place)


# --- killed, crashed, twice ----------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from emotion_toolbox import cache
from emotion_toolbox.tables import load_splits
cache.SAVE_SECONDS = 0
original = cache.decode_image
def slowly(data, size, fit="crop"):
    import time
    time.sleep(0.01)
    return original(data, size, fit)
cache.decode_image = slowly
cache.decode_data(load_splits(Path(sys.argv[1])), 37, cache_dir=Path(sys.argv[2]), threads=2)
"""


def start(root: Path, place: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(root), str(place)]
    here = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL)


def test_a_killed_build_goes_on_where_it_was(tiny_root, place, decoded_files):
    """Killed again and again; what was listed as done is right, and is not done again."""
    for _ in range(4):
        child, deadline = start(tiny_root, place), time.monotonic() + 60
        known = len(arrays(place))
        while len(arrays(place)) <= min(known, 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.12)
        child.send_signal(signal.SIGKILL)
        child.wait()
    decoded = build(tiny_root, place)
    assert_right(decoded)
    assert len(decoded_files) < TOTAL
    assert not list(place.rglob("*.tmp")) or len(list(place.rglob("*.npy"))) == 3


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
@pytest.mark.parametrize("before", ["nothing", "other pictures", "another order"])
def test_a_crash_at_any_file_operation_corrupts_nothing(
    tiny_root, tmp_path, monkeypatch, before, call
):
    """Stop at the first, second, ... of them; then go on, or back to what was there before."""
    clock = itertools.count(step=cache.SAVE_SECONDS / 4)
    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    old = load_splits(tiny_root).splits["val"]
    new = dataclasses.replace(old, images_root=shutil.copytree(tiny_root, tmp_path / "new"))
    if before == "other pictures":
        for i in range(12):
            Image.new("RGB", (50, 50), f"#{i:02d}80{i:02d}").save(new.path(i))
    if before == "another order":
        new = new.select(np.arange(12)[::-1])
    original, died_at, died = getattr(os, call), 0, True
    while died:
        died_at, calls = died_at + 1, itertools.count(1)
        folder = tmp_path / f"crash-{died_at}"
        if before != "nothing":
            cache.cache_images(old, SIDE, 1, folder)

        def dying(*args, calls=calls, died_at=died_at, **options):
            if next(calls) >= died_at:  # a dead process does nothing more
                raise Crash
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, dying)
            try:
                cache.cache_images(new, SIDE, 1, folder)
                died = False
            except Crash:
                pass
        shutil.copytree(folder, tmp_path / f"back-{died_at}")
        for split, place in ((new, folder), (old, tmp_path / f"back-{died_at}")):
            pixels, _, reasons = cache.cache_images(split, SIDE, 1, place)
            direct = [decode_image(split.path(i).read_bytes(), SIDE) for i in range(12)]
            np.testing.assert_array_equal(pixels[np.arange(12)], direct)
            assert not reasons
    assert died_at >= (1 if before == "another order" else 4)  # the other order writes nothing


def test_an_interrupted_build_stops_soon_and_keeps_what_it_has(
    tiny_root, place, monkeypatch, decoded_files
):
    original = cache.decode_image

    def interrupted(data, size, fit="crop"):
        if len(decoded_files) == 15:
            signal.raise_signal(signal.SIGINT)  # it reaches the main thread
            time.sleep(0.2)
        return original(data, size, fit)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tiny_root, place)
    assert len(decoded_files) <= 21  # four ahead, and the one in work
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]
    decoded_files.clear()
    assert_right(build(tiny_root, place))
    assert len(decoded_files) <= TOTAL - 9


def test_many_threads_at_once_decode_once(tiny_root, place, decoded_files):
    with ThreadPoolExecutor(3) as pool:
        for decoded in pool.map(lambda _: build(tiny_root, place), range(3)):
            assert_right(decoded)
    assert len(decoded_files) == TOTAL


def test_two_processes_at_once(tiny_root, place):
    children = [start(tiny_root, place) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert_right(build(tiny_root, place))
    assert len(arrays(place)) == 3


def test_the_settings_lead_here(tiny_config):
    """NUM_WORKERS, CACHE, CACHE_SIZE and FIT of a configuration reach the cache."""
    from emotion_transfer.commands.train import open_data

    for settings in ({"CACHE": True}, {"CACHE": False}, {"CACHE_SIZE": 40, "NUM_WORKERS": 3}):
        cfg = tiny_config(**settings)
        decoded, datasets = open_data(cfg, listed(cfg))
        fresh = isinstance(decoded.pixels["val"], cache.DecodedPixels)
        assert fresh == (settings.get("CACHE") is False)
        assert datasets["val"].pictures([0]).shape[1] == settings.get("CACHE_SIZE", 37)
    pictures = {}
    for fit in ("crop", "pad", "squash"):
        for keep in (True, False):
            cfg = tiny_config(FIT=fit, CACHE=keep)
            train = open_data(cfg, listed(cfg))[1]["train"]
            pictures[fit, keep] = train.pictures(np.arange(len(train)))
        np.testing.assert_array_equal(pictures[fit, True], pictures[fit, False])
    assert len({pixels.tobytes() for pixels in pictures.values()}) == 3
