"""``prepare``: EmoSet folders, class folders and CSVs become the notebook's data folder."""

import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_run import listed

from emotion_toolbox import sources
from emotion_toolbox.errors import DataError
from emotion_toolbox.files import project_root
from emotion_toolbox.prepare import prepare_folder
from emotion_toolbox.sample import draw_sample
from emotion_toolbox.tables import MIKELS_CLASSES
from emotion_transfer.commands import prepare as command
from emotion_transfer.config import make_config

NUMBERS = iter(range(10**9))


def prepare(source: Path, output: Path, *options: str | Path) -> dict[str, Any]:
    """What stats.json says after the command with these options; its errors are raised."""
    words = [source, "--output", output, *options]
    written = command.prepare(command.make_parser().parse_args([str(word) for word in words]))
    assert written == output
    stats: dict[str, Any] = json.loads((output / "stats.json").read_text(encoding="utf-8"))
    return stats


def draw(path: Path, size: tuple[int, int] = (12, 9)) -> Path:
    """A small image that no other one equals."""
    number = next(NUMBERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (number % 256, number // 256 % 256, number // 65536))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(path)
    return path


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {
        split: pd.read_csv(folder / f"{split}.csv", dtype=str, keep_default_na=False)
        for split in ("train", "val", "test")
    }


def everything(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def emoset(root: Path, fields: int, each: int = 2) -> Path:
    """A folder in the official form, `each` images a class and split; rows have 3 or 4 fields."""
    names = list(MIKELS_CLASSES)
    info = {"emotion": {"label2idx": {name: i for i, name in enumerate(names)}}}
    root.mkdir(parents=True)
    (root / "info.json").write_text(json.dumps(info))
    number = 0
    for split in ("train", "val", "test"):
        rows = []
        for label in sorted(names):
            for _ in range(each):
                stem = f"{label}_{number:05d}"
                image, note = f"image/{label}/{stem}.jpg", f"annotation/{label}/{stem}.json"
                draw(root / image)
                (root / note).parent.mkdir(parents=True, exist_ok=True)
                content = {"image_id": stem, "emotion": label, "brightness": 0.4}
                content |= {"colorfulness": 0.7, "scene": "beach", "object": ["Ball", "Dog"]}
                (root / note).write_text(json.dumps(content))
                rows.append([label, *([stem] if fields == 4 else []), image, note])
                number += 1
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    """Replace the JSON in `file` by what `edit` makes of it."""
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


def class_tree(root: Path, **numbers: int) -> Path:
    """`root/<class>/<i>.png`; a double underscore in a name stands for a slash."""
    for name, number in numbers.items():
        for i in range(number):
            draw(root / name.replace("__", "/") / f"{i:03d}.png")
    return root


# --- the official folder ------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [3, 4])
def test_emoset_keeps_splits_order_and_attributes(tmp_path: Path, fields: int) -> None:
    root = emoset(tmp_path / "EmoSet-118K", fields)
    stats = prepare(root, tmp_path / "out")
    for split, table in tables(tmp_path / "out").items():
        official = json.loads((root / f"{split}.json").read_text())
        assert table["path"].tolist() == [row[-2] for row in official]
        assert table["label"].tolist() == [row[0] for row in official]
        extra = ["brightness", "colorfulness", "scene_type", "object"]
        assert (table[extra] == ["0.4", "0.7", "beach", "Ball|Dog"]).all(axis=None)
        assert (table[["facial_expression", "human_action"]] == "").all(axis=None)
    assert list(json.loads((tmp_path / "out/label_map.json").read_text())) == list(MIKELS_CLASSES)
    assert stats["images_root"] == root.as_posix()
    assert stats["counts"]["val"] == dict.fromkeys(MIKELS_CLASSES, 2)


def test_emoset_rows_may_name_the_annotation_first(tmp_path: Path) -> None:
    root = emoset(tmp_path / "e", 3)
    change(root / "val.json", lambda rows: [[a, c, b] for a, b, c in rows])
    prepare(root, tmp_path / "out")
    assert tables(tmp_path / "out")["val"]["path"].str.endswith(".jpg").all()


def test_the_notebook_reads_what_was_written(tmp_path: Path) -> None:
    root = emoset(tmp_path / "e", 3)
    stats = prepare(root, tmp_path / "out")
    assert stats["images_root"] != "."
    data = listed(make_config({"DATA_ROOT": str(tmp_path / "out")}))
    assert data.classes == MIKELS_CLASSES
    assert not data.synthetic
    assert all(split.path(i).is_file() for split in data.splits.values() for i in range(len(split)))


EMOSET_FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("no info", lambda r: (r / "info.json").unlink(), r"lacks info\.json.*JingyuanYY/EmoSet"),
    ("no split", lambda r: (r / "val.json").unlink(), r"lacks val\.json"),
    (
        "short row",
        lambda r: change(r / "train.json", lambda rows: [*rows[:4], rows[4][:2], *rows[5:]]),
        r"train\.json row 5 should be three texts",
    ),
    (
        "long row",
        lambda r: change(r / "test.json", lambda rows: [[*rows[0], "x", "y"], *rows[1:]]),
        r"test\.json row 1 should be",
    ),
    (
        "number in a row",
        lambda r: change(r / "test.json", lambda rows: [[rows[0][0], 7, rows[0][2]]]),
        r"test\.json row 1 should be",
    ),
    (
        "unknown label",
        lambda r: change(r / "val.json", lambda rows: [rows[0], ["joy", *rows[1][1:]]]),
        r"val\.json row 2 has the unknown label 'joy'; info\.json knows amusement",
    ),
    (
        "no image named",
        lambda r: change(r / "val.json", lambda rows: [[rows[0][0], "a", "b.json"]]),
        r"val\.json row 1 should name one image",
    ),
    (
        "image listed twice",
        lambda r: change(r / "val.json", lambda rows: [rows[0], rows[1], rows[0]]),
        r"val\.json row 3 lists image/\S+ again, after \S+val\.json row 1",
    ),
    ("empty split", lambda r: (r / "test.json").write_text("[]"), r"test\.json must hold"),
    ("cut off", lambda r: (r / "test.json").write_text("[["), r"test\.json cannot be read as JSON"),
    ("bad info", lambda r: (r / "info.json").write_text("{}"), r"info\.json has no usable"),
    (
        "missing annotation",
        lambda r: shutil.rmtree(r / "annotation/awe"),
        r"train\.json row 5: .*awe_00004\.json is missing.*--no-attributes",
    ),
    (
        "missing image",
        lambda r: shutil.rmtree(r / "image/awe"),
        r"train\.json row 5: the image .*awe_00004\.jpg is missing \(6 of 48 are\).*--skip-missing",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(d, m) for _, d, m in EMOSET_FAULTS],
    ids=[n for n, _, _ in EMOSET_FAULTS],
)
def test_emoset_faults_name_file_row_and_fix(
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = emoset(tmp_path / "e", 3)
    damage(root)
    with pytest.raises(DataError, match=message):
        prepare(root, tmp_path / "out")
    assert command.main([str(root), "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"e"}


def test_annotations_can_be_left_out(tmp_path: Path) -> None:
    root = emoset(tmp_path / "e", 4)
    shutil.rmtree(root / "annotation")
    prepare(root, tmp_path / "out", "--no-attributes")
    assert list(tables(tmp_path / "out")["train"].columns) == ["path", "label"]


def test_missing_images_can_be_left_out(tmp_path: Path) -> None:
    root = emoset(tmp_path / "e", 3)
    lost = sorted((root / "image/awe").iterdir())[0]
    lost.unlink()
    stats = prepare(root, tmp_path / "out", "--skip-missing")
    assert stats["left_out_missing"] == 1
    assert stats["counts"]["train"]["awe"] == 1
    assert lost.name not in tables(tmp_path / "out")["train"]["path"].str.cat()


@pytest.mark.parametrize("given", [".", "EmoSet-118K/image"])
def test_a_folder_just_off_emoset_points_to_it(tmp_path: Path, given: str) -> None:
    root = emoset(tmp_path / "EmoSet-118K", 3)
    with pytest.raises(DataError, match=f"give {root}$"):
        prepare(tmp_path / given, tmp_path / "out")


# --- class folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_class_folders_are_taken_as_they_are(tmp_path: Path, val: str) -> None:
    root = class_tree(tmp_path / "set", train__cat=3, train__dog=2, test__cat=1, test__dog=1)
    draw(root / val / "cat" / "deeper" / "x.JPG")
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/.cache").mkdir()
    stats = prepare(root, tmp_path / "out")
    assert stats["counts"]["train"] == {"cat": 3, "dog": 2}
    assert tables(tmp_path / "out")["val"].to_numpy().tolist() == [
        [f"{val}/cat/deeper/x.JPG", "cat"]
    ]


def test_unsplit_folders_are_split_by_label_without_leak_or_loss(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", cat=100, dog=60, eel=40)
    stats = prepare(root, tmp_path / "out", "--seed", "3")
    found = tables(tmp_path / "out")
    counts = {s: table["label"].value_counts().to_dict() for s, table in found.items()}
    assert counts == {
        "train": {"cat": 75, "dog": 41, "eel": 26},
        "val": {"cat": 10, "dog": 10, "eel": 8},  # ten rather than 5 %, but at most a fifth
        "test": {"cat": 15, "dog": 9, "eel": 6},
    }
    paths = pd.concat(found.values())["path"]
    assert sorted(paths) == sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    assert stats["split"] == "30 test and 28 val taken from 200 images by label, seed 3"


def test_large_classes_are_split_like_emoset(tmp_path: Path) -> None:
    stats = prepare(class_tree(tmp_path / "set", cat=300, dog=260), tmp_path / "out")
    assert stats["counts"] == {
        "train": {"cat": 240, "dog": 208},
        "val": {"cat": 15, "dog": 13},
        "test": {"cat": 45, "dog": 39},
    }


def test_every_class_is_in_every_split(tmp_path: Path) -> None:
    stats = prepare(class_tree(tmp_path / "set", cat=30, dog=12, eel=3), tmp_path / "out")
    assert [stats["counts"][split]["eel"] for split in ("train", "val", "test")] == [1, 1, 1]
    assert [stats["counts"][split]["dog"] for split in ("train", "val", "test")] == [8, 2, 2]


@pytest.mark.parametrize("shares", ["70 10 20", "7 1 2"])
def test_given_shares_are_kept_to(tmp_path: Path, shares: str) -> None:
    root = class_tree(tmp_path / "set", cat=40, dog=20)
    stats = prepare(root, tmp_path / "out", "--split", *shares.split())
    assert stats["counts"] == {
        "train": {"cat": 28, "dog": 14}, "val": {"cat": 4, "dog": 2}, "test": {"cat": 8, "dog": 4}
    }  # fmt: skip


def test_the_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", cat=30, dog=30)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(root, tmp_path / name, "--seed", str(seed))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert everything(tmp_path / "a")["test.csv"] != everything(tmp_path / "c")["test.csv"]


def test_identical_images_stay_in_one_split(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", cat=40, dog=40)
    for original in sorted((root / "cat").iterdir()):
        shutil.copyfile(original, original.with_name(f"copy-{original.name}"))
    rng = np.random.default_rng(0)  # the same long start and length, another end
    big = Image.fromarray(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    for i in range(20):
        big.putpixel((89, 89), (i, 0, 0))
        big.save(root / "dog" / f"big{i}.bmp")
    stats = prepare(root, tmp_path / "out", "--seed", "5")
    where = {p: s for s, table in tables(tmp_path / "out").items() for p in table["path"]}
    originals = [p for p in where if p.startswith("cat/") and "copy" not in p]
    assert all(where[p] == where[p.replace("cat/", "cat/copy-")] for p in originals)
    assert {where[p] for p in originals} == {"train", "val", "test"}
    assert stats["split"].endswith("40 identical copies kept with their twins")


def test_val_is_taken_out_of_training_where_only_it_lacks(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", train__cat=51, train__dog=34, test__cat=5, test__dog=5)
    stats = prepare(root, tmp_path / "out")
    assert stats["counts"] == {
        "train": {"cat": 41, "dog": 27}, "val": {"cat": 10, "dog": 7}, "test": {"cat": 5, "dog": 5}
    }  # fmt: skip
    assert stats["split"].startswith("17 val taken from 85 training images by label")
    assert tables(tmp_path / "out")["test"]["path"].str.startswith("test/").all()
    stats = prepare(root, tmp_path / "shares", "--split", "80", "5", "15")
    assert stats["counts"]["val"] == {"cat": 3, "dog": 2}  # 5 of the 85 that are not test


def test_test_is_taken_out_of_training_where_only_it_lacks(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", train__a=19, train__b=38, val__a=1, val__b=1)
    stats = prepare(root, tmp_path / "out")
    assert stats["counts"] == {
        "train": {"a": 16, "b": 32}, "val": {"a": 1, "b": 1}, "test": {"a": 3, "b": 6}
    }  # fmt: skip
    assert tables(tmp_path / "out")["test"]["path"].str.startswith("train/").all()
    how = "fewer to train on, and figures that are not those of an official test"
    assert stats["split"] == f"9 test taken from 57 training images by label, seed 42; {how}"


def test_test_and_val_are_taken_out_of_training_where_both_lack(tmp_path: Path) -> None:
    stats = prepare(class_tree(tmp_path / "set", train__a=40, train__b=40), tmp_path / "out")
    assert stats["counts"]["val"] == {"a": 8, "b": 8}
    assert stats["split"] == "12 test and 16 val taken from 80 images by label, seed 42"


def test_two_folders_of_one_split_are_both_read(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", train__a=2, train__b=2, val__a=1, valid__b=1, test__a=1)
    prepare(root, tmp_path / "out")
    val = tables(tmp_path / "out")["val"].to_numpy().tolist()
    assert val == [["val/a/000.png", "a"], ["valid/b/000.png", "b"]]


def test_splits_that_are_given_can_be_made_anew(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", train__a=20, train__b=20, val__a=10, test__b=10)
    given = prepare(root, tmp_path / "given")
    assert given["split"] == "as given by the source"
    assert given["counts"]["val"] == {"a": 10, "b": 0}
    anew = prepare(root, tmp_path / "anew", "--resplit")
    assert anew["counts"]["val"] == {"a": 6, "b": 6}
    assert {path.split("/")[0] for path in tables(tmp_path / "anew")["train"]["path"]} == {
        "train", "val", "test"
    }  # fmt: skip


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = class_tree(tmp_path / "set", train__a=2, train__b=2, val__a=1, test__b=1, unsorted__x=3)
    for name in ("train/a/one.txt", "train/b/two.TXT", "LICENSE", ".DS_Store"):
        (root / name).write_text("no image")
    stats = prepare(root, tmp_path / "out")
    left_out = {".DS_Store": 1, "*.txt": 2, "without suffix": 1, "in unsorted/": 3}
    assert stats["left_out"] == left_out
    line = "left out: 2 *.txt, 1 .DS_Store, 3 in unsorted/, 1 without suffix\n"
    assert line in capsys.readouterr().out


LITTER = (
    *("#snapshot", "@Recently-Snapshot", "@tmp", "RECYCLER", "Network Trash Folder", ".cache"),
    *("Temporary Items", "__pycache__", "__MACOSX"),
)


def test_what_systems_leave_behind_is_no_class(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", happy=9, **{"#sad": 9})
    for name in LITTER:
        draw(root / name / "x.png")
    for name in ("ehthumbs.db", "Icon\r", "Thumbs.db"):
        (root / "happy" / name).touch()
    draw(root / "happy/@somebody.jpg")
    stats = prepare(root, tmp_path / "out")
    assert stats["classes"] == ["#sad", "happy"]
    assert {k: sum(c[k] for c in stats["counts"].values()) for k in stats["classes"]} == {
        "#sad": 9, "happy": 10
    }  # fmt: skip
    found = ("Icon", "ehthumbs.db", "Thumbs.db", *LITTER)
    assert stats["left_out"] == dict.fromkeys(sorted(found), 1) | {}


@pytest.mark.parametrize("content", [[], ["Thumbs.db"], ["@eaDir/a.jpg"], ["a.foo", "sub/b.foo"]])
@pytest.mark.parametrize("place", ["eel", "train/eel", "val/eel"])
def test_a_class_without_a_usable_image_is_named(
    tmp_path: Path, place: str, content: list[str]
) -> None:
    split = "train__" if "/" in place else ""
    root = class_tree(tmp_path / "set", **{f"{split}cat": 9, f"{split}dog": 9})
    if split:
        class_tree(root, val__cat=1, val__dog=1, test__cat=1, test__dog=1)
    (root / place).mkdir()
    for name in content:
        (root / place / name).parent.mkdir(exist_ok=True)
        (root / place / name).touch()
    with pytest.raises(DataError, match=f"{place} has no image that can be read") as caught:
        prepare(root, tmp_path / "out")
    assert ("2 *.foo" in str(caught.value)) == ("a.foo" in content)


AMBIGUOUS = [
    {"batch1__angry": 9, "batch1__happy": 9, "batch2__angry": 9},
    {"batch1__angry": 9, "batch1__happy": 9, "batch2__angry": 9, "batch2__happy": 9},
    {"angry": 9, "happy": 9, "batch2__angry": 9},
]
CLEAR = [
    {"cats__images": 9, "dogs__images": 9},
    {"cats__cats": 9, "dogs__dogs": 9},
    {"set__cats__old": 9, "set__cats__new": 9, "set__dogs": 9},
]


@pytest.mark.parametrize("numbers", AMBIGUOUS)
def test_folders_that_may_be_classes_or_batches_are_refused(
    tmp_path: Path, numbers: dict[str, int]
) -> None:
    with pytest.raises(DataError, match="batch2 has no images of its own, and angry.* in it"):
        prepare(class_tree(tmp_path / "set", **numbers), tmp_path / "out")


@pytest.mark.parametrize("numbers", CLEAR)
def test_folders_in_a_class_are_no_classes(tmp_path: Path, numbers: dict[str, int]) -> None:
    stats = prepare(class_tree(tmp_path / "set", **numbers), tmp_path / "out")
    assert stats["classes"] == ["cats", "dogs"]


def test_links_that_lead_round_end(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", cat=9, dog=9)
    for place in (root / "round", root / "cat" / "round"):
        place.symlink_to(root)
    assert sum(prepare(root, tmp_path / "out")["counts"]["train"].values()) == 12


def test_a_dead_link_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_tree(tmp_path / "set", cat=9, dog=9)
    (root / "cat/x.jpg").symlink_to(tmp_path / "not mounted")
    with pytest.raises(DataError, match=r"cat/x\.jpg is a link to nothing .1 of 19 are.; restore"):
        prepare(root, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"cat/x\.jpg: No such file .*; restore or delete it"):
        prepare_folder("set")
    assert sum(prepare(root, tmp_path / "out", "--skip-missing")["counts"]["train"].values()) == 12


def test_the_notebook_prepares_a_folder_again_at_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    class_tree(tmp_path / "pets", cat=9, dog=9)
    written = prepare_folder("pets")
    assert written == tmp_path / "data/processed/pets"
    before = everything(written)
    assert prepare_folder("pets") == written and everything(written) == before
    class_tree(tmp_path / "pets", eel=9)
    with pytest.raises(DataError, match="another data set already.*in a notebook overwrite=True"):
        prepare_folder("pets")
    assert everything(written) == before
    prepare_folder("pets", overwrite=True)
    assert "eel" in json.loads((written / "label_map.json").read_text())


def test_class_order(tmp_path: Path) -> None:
    prepare(class_tree(tmp_path / "e", **dict.fromkeys(sorted(MIKELS_CLASSES), 20)), tmp_path / "a")
    prepare(class_tree(tmp_path / "o", zebra=20, ape=20), tmp_path / "b")
    orders = [list(json.loads((tmp_path / n / "label_map.json").read_text())) for n in "ab"]
    assert orders == [list(MIKELS_CLASSES), ["ape", "zebra"]]


FOLDER_FAULTS: list[tuple[str, dict[str, int], str | None, str]] = [
    ("empty", {}, None, r"fewer than two classes to train on \(none; .*\); give the folder"),
    ("one class", {"cat": 5}, None, r"fewer than two classes to train on \(cat; "),
    ("loose image", {"cat": 2, "dog": 2}, "x.jpg", r"x\.jpg lies in no class folder"),
    ("loose in a split", {"train__a": 2, "test__a": 1}, "train/x.png", r"x\.png lies in no class"),
    (
        "stray folder",
        {"train__a": 1, "more__a": 1},
        None,
        r"more/a/\S+ lies.*beside the splits",
    ),
    ("no train", {"val__a": 9, "test__b": 9}, None, r"train on \(none; .*--resplit"),
    ("new label", {"train__a": 1, "train__b": 1, "val__c": 1}, None, "unknown label 'c'"),
    ("tiny class", {"a": 50, "b": 2}, None, "has 2 images of b, .*too few to be in train and test"),
    (
        "tiny class in training",
        {"train__a": 9, "train__b": 1, "test__a": 1},
        None,
        "has 1 images of b, copies aside, too few to be in train and val; add",
    ),
]


@pytest.mark.parametrize(
    ("numbers", "extra", "message"),
    [fault[1:] for fault in FOLDER_FAULTS],
    ids=[fault[0] for fault in FOLDER_FAULTS],
)
def test_folder_faults(
    tmp_path: Path, numbers: dict[str, int], extra: str | None, message: str
) -> None:
    root = class_tree(tmp_path / "set", **numbers)
    root.mkdir(exist_ok=True)
    if extra:
        draw(root / extra)
    with pytest.raises(DataError, match=message) as caught:
        prepare(root, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_notebooks_form_is_named_as_such(tmp_path: Path) -> None:
    root = draw_sample(tmp_path / "s", counts={"train": 1, "val": 1, "test": 1}, size=24)
    with pytest.raises(DataError, match="in the notebook's form already; set DATA_ROOT"):
        prepare(root, tmp_path / "out")
    (root / "val.csv").unlink()  # now its split/class folders serve as a source
    stats = prepare(root, tmp_path / "out")
    assert stats["counts"]["val"] == dict.fromkeys(MIKELS_CLASSES, 1)


def test_what_is_neither_folder_nor_csv(tmp_path: Path) -> None:
    for name in ("e.rar", "e.xls"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="neither a folder nor a table .*nor an archive"):
            prepare(tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="--images-root is for a table"):
        prepare(tmp_path, tmp_path / "out", "--images-root", tmp_path)


# --- a CSV --------------------------------------------------------------------------------------


def csv_set(root: Path, text: str) -> Path:
    """A CSV at root/list.csv, and each .png it names, if relative, in root."""
    root.mkdir(exist_ok=True)
    for word in text.replace("\n", ",").split(","):
        if word.endswith(".png") and not Path(word).is_absolute():
            draw(root / word.replace("\\", "/"))
    (root / "list.csv").write_text(text, encoding="utf-8")
    return root / "list.csv"


@pytest.mark.parametrize("path", ["path", "image_path", "filepath", "file"])
@pytest.mark.parametrize("label", ["label", "emotion", "class"])
def test_csv_columns_and_splits(tmp_path: Path, path: str, label: str) -> None:
    lines = [f"{path},rater,{label},split", "a.png,1,NA,train", "b.png,,1,Train"]
    lines += ["sub\\c.png,3,NA,validation", "d.png,4,1,test"]
    with pytest.warns(UserWarning, match=r"the label 'NA' \(2 images\) may stand for none"):
        prepare(csv_set(tmp_path / "in", "\n".join(lines)), tmp_path / "out")
    found = tables(tmp_path / "out")
    assert list(found["train"].columns) == ["path", "label", "rater"]
    assert found["train"].to_numpy().tolist() == [["a.png", "NA", "1"], ["b.png", "1", ""]]
    assert found["val"].to_numpy().tolist() == [["sub/c.png", "NA", "3"]]
    assert list(json.loads((tmp_path / "out/label_map.json").read_text())) == ["1", "NA"]


def test_csv_without_split_is_split_here(tmp_path: Path) -> None:
    rows = [f"{name}{i}.png,{name}" for name in ("x", "y") for i in range(40)]
    prepare(csv_set(tmp_path / "in", "\n".join(["path,label", *rows])), tmp_path / "out")
    found = tables(tmp_path / "out")
    assert [len(found[s]) for s in ("train", "val", "test")] == [52, 16, 12]
    assert found["test"]["label"].value_counts().to_dict() == {"x": 6, "y": 6}


SPLIT_COLUMNS = [
    ("phase", ["train", "validate", "test"], ["train", "val", "test"]),
    ("stage", ["Train", "eval", "test"], ["train", "val", "test"]),
    ("data_split", ["training", "dev", "holdout"], ["train", "val", "test"]),
    ("anything", ["train", "evaluation", "test"], ["train", "val", "test"]),
    ("anything", ["seg_train", "seg_val", "seg_test"], ["train", "val", "test"]),
    ("is_train", ["1", "0", "1"], ["train", "test", "train"]),
    ("train", ["True", "true", "False"], ["train", "train", "test"]),
    ("is_test", ["no", "yes", "no"], ["train", "test", "train"]),
    ("is_valid", ["False", "True", "False"], ["train", "val", "train"]),
    ("is_train,is_val", ["1,0", "0,1", "0,0"], ["train", "val", "test"]),
    ("is_train,is_val,is_test", ["1,0,0", "0,1,0", "0,0,1"], ["train", "val", "test"]),
]


@pytest.mark.parametrize(("column", "values", "splits"), SPLIT_COLUMNS)
def test_a_split_that_a_column_gives_is_kept(
    tmp_path: Path, column: str, values: list[str], splits: list[str]
) -> None:
    rows = [f"{i}{label}.png,{label},{values[i % 3]}" for i in range(60) for label in "xy"]
    prepare(csv_set(tmp_path / "in", "\n".join([f"path,label,{column}", *rows])), tmp_path / "out")
    found = tables(tmp_path / "out")
    assert list(found["train"].columns) == ["path", "label"]
    where = {path: split for split, table in found.items() for path in table["path"]}
    for i in range(60):
        given = splits[i % 3]  # what lacks is taken out of train
        assert where[f"{i}x.png"] == given or (
            given == "train" and where[f"{i}x.png"] not in splits
        )


@pytest.mark.parametrize(
    ("column", "values", "fault"),
    [
        ("data_split", ["train", "", "test", "val"], "row 3 has the split '' in the column"),
        ("notes", ["train", "test", "nice", "val"], "row 4 has the split 'nice' in the column"),
        ("is_train,is_test", ["1,0", "1,1", "0,1", "0,1"], "row 3 is in train and test, by is_"),
        ("train,val,test", ["1,0,0", "0,0,0", "0,0,1", "0,1,0"], "row 3 is in no split, by"),
    ],
)
def test_a_split_of_some_rows_only_is_refused(
    tmp_path: Path, column: str, values: list[str], fault: str
) -> None:
    rows = [f"{i}.png,{'xy'[i % 2]},{value}" for i, value in enumerate(values)]
    source = csv_set(tmp_path / "in", "\n".join([f"path,label,{column}", *rows]))
    with pytest.raises(DataError, match=rf"list\.csv {fault}"):
        prepare(source, tmp_path / "out")


def test_columns_that_only_mention_a_split_are_kept(tmp_path: Path) -> None:
    text = ["a train and a test", "a dog", "", "test drive", "train", "1"]
    rows = [f"{i}.png,{'xy'[i % 2]},{text[i % 6]},{i % 2}" for i in range(60)]
    source = csv_set(tmp_path / "in", "\n".join(["path,label,caption,valid", *rows]))
    prepare(source, tmp_path / "out")
    assert list(tables(tmp_path / "out")["val"].columns) == ["path", "label", "caption", "valid"]


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def test_paths_in_another_spelling_are_found(tmp_path: Path) -> None:
    rows = [f"{NFD}/{i}.png,x,t" for i in range(9)] + [f" b/{i}.png ,y,t" for i in range(9)]
    for i in range(9):
        draw(tmp_path / "in" / NFC / f"{i}.png")
        draw(tmp_path / "in" / "b" / f"{i}.png")
    (tmp_path / "in/list.csv").write_text("\n".join(["path,label,by", *rows]), encoding="utf-8")
    stats = prepare(tmp_path / "in/list.csv", tmp_path / "out", "--skip-missing")
    assert stats["left_out_missing"] == 0
    paths = pd.concat(tables(tmp_path / "out").values())["path"]
    assert {path.split("/")[0] for path in paths} == {NFC, "b"}


def test_what_is_said_of_a_missing_image(tmp_path: Path) -> None:
    source = csv_set(tmp_path / "in", "path,label\na0.png,x\nb.png,y\n")
    (tmp_path / "in/a0.png").rename(tmp_path / "in/A0.PNG")
    with pytest.raises(DataError, match=r"a0\.png is missing, while A0\.PNG is there \(1 of 2 are"):
        prepare(source, tmp_path / "out")
    source.write_text("path,label\nhttps://x.org/a.jpg,x\nb.png,y\n")
    with pytest.raises(
        DataError, match=r"row 2 has an address for a path; .* https://x\.org/a\.jpg"
    ):
        prepare(source, tmp_path / "out")


def test_classes_that_lose_all_images_of_a_split_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{s}{c}.png,{c},{s}" for s in ("train", "val", "test") for c in "xyz"]
    source = csv_set(tmp_path / "in", "\n".join(["path,label,split", *rows]))
    for name in ("valx", "testy"):
        (source.parent / f"{name}.png").unlink()
    stats = prepare(source, tmp_path / "out", "--skip-missing")
    assert stats["emptied"] == ["test/y", "val/x"]
    assert "warning: --skip-missing leaves no image of test/y, val/x\n" in capsys.readouterr().out
    for name in ("valy", "valz"):
        (source.parent / f"{name}.png").rename(source.parent / f"{name}.gone")
    with pytest.raises(DataError, match="no image of test/y, val/x, val/y, val/z; restore some"):
        prepare(source, tmp_path / "out2", "--skip-missing")  # and none is taken from train
    for name in ("valy", "valz"):
        (source.parent / f"{name}.gone").rename(source.parent / f"{name}.png")
    (source.parent / "trainz.png").unlink()
    with pytest.raises(DataError, match="no image of test/y, train/z, val/x; restore some"):
        prepare(source, tmp_path / "out2", "--skip-missing")


def rows_of_all_splits(base: str = "") -> list[dict[str, Any]]:
    """Six rows, two a split."""
    return [
        {"file_name": f"{base}{s}{c}.png", "label": c, "split": s, "age": 3, "by": None}
        for s in ("train", "val", "test") for c in "xy"
    ]  # fmt: skip


def test_json_lines(tmp_path: Path) -> None:
    rows = rows_of_all_splits()
    for row in rows:
        draw(tmp_path / "in" / row["file_name"])
    text = "\n\n".join(json.dumps(row) for row in rows)
    for name in ("list.jsonl", "metadata.jsonl"):
        (tmp_path / "in" / name).write_text(text)
    prepare(tmp_path / "in/list.jsonl", tmp_path / "a")
    prepare(tmp_path / "in", tmp_path / "b")
    assert tables(tmp_path / "a")["val"].to_numpy().tolist() == [
        ["valx.png", "x", "3", ""], ["valy.png", "y", "3", ""]
    ]  # fmt: skip
    assert everything(tmp_path / "a")["test.csv"] == everything(tmp_path / "b")["test.csv"]
    for bad, fault in (("[1]", r"row 3 is not a JSON object"), ("{", "row 3 is not a JSON object")):
        (tmp_path / "in/list.jsonl").write_text(f"{json.dumps(rows[0])}\n\n{bad}\n")
        with pytest.raises(DataError, match=rf"list\.jsonl {fault}"):
            prepare(tmp_path / "in/list.jsonl", tmp_path / "out")
    (tmp_path / "in/list.jsonl").write_text('{"file_name": "a.png", "label": null}')
    with pytest.raises(DataError, match=r"list\.jsonl row 1 has an empty label"):
        prepare(tmp_path / "in/list.jsonl", tmp_path / "out")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_in_the_folder_of_each_split(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "set"
    for split in ("train", "validation", "test"):
        rows = [{"file_name": f"{c}.png", "label": c} for c in "xy"]
        for row in rows:
            draw(root / split / row["file_name"])
        table = pd.DataFrame(rows)
        file = root / split / f"metadata.{kind}"
        if kind == "csv":
            table.to_csv(file, index=False)
        else:
            table.to_json(file, orient="records", lines=True)
    stats = prepare(root, tmp_path / "out")
    assert stats["images_root"] == root.as_posix()
    val = tables(tmp_path / "out")["val"].to_numpy().tolist()
    assert val == [["validation/x.png", "x"], ["validation/y.png", "y"]]


def test_parquet_with_images_as_hugging_face_writes_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {"label": {"names": ["joy", "calm"], "_type": "ClassLabel"}}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    pictures = []
    for split in ("train", "validation", "test"):
        rows = []
        for number in range(2):
            pictures.append(draw(tmp_path / f"{split}{number}.png").read_bytes())
            rows.append({"image": {"bytes": pictures[-1], "path": "x.png"}, "label": number})
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(note)
        (tmp_path / "set/data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / f"set/data/{split}-00000-of-00001.parquet")
    stats = prepare(tmp_path / "set", tmp_path / "out")
    found = tables(tmp_path / "out")
    assert [found[s]["label"].tolist() for s in found] == [["joy", "calm"]] * 3
    paths = [path for table in found.values() for path in table["path"]]
    assert [(tmp_path / "out" / path).read_bytes() for path in paths] == pictures
    assert stats["images_root"] == "." and paths[0].endswith(".png")
    rows = [{"path": "a.png", "label": "x"}, {"path": "b.png", "label": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"list\.parquet row 2 has an empty label"):
        prepare(tmp_path / "list.parquet", tmp_path / "out2")


def test_parquet_without_pyarrow_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "list.parquet").touch()
    with pytest.raises(DataError, match="needs pyarrow: pip install pyarrow"):
        prepare(tmp_path / "list.parquet", tmp_path / "out")


# --- archives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "xztar"])
def test_archives_are_read_as_folders(tmp_path: Path, kind: str) -> None:
    root = class_tree(tmp_path / "in/pets", cat=9, dog=9)
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), kind, tmp_path / "in"))
    stats = prepare(archive, tmp_path / "out")
    reference = prepare(root, tmp_path / "reference")
    assert stats["counts"] == reference["counts"]
    assert stats["source"] == f"class folders: {archive}" and stats["images_root"] == "."
    for path in tables(tmp_path / "out")["test"]["path"]:
        assert (tmp_path / "out" / path).read_bytes() == (
            (root / path.removeprefix("images/pets/")).read_bytes()
        )
    with pytest.raises(DataError, match="holds another data set already"):
        prepare(archive, tmp_path / "out", "--seed", "1")
    assert command.default_output(archive).name == "pets"


def test_an_archive_of_an_official_folder_and_what_is_said_of_its_rows(tmp_path: Path) -> None:
    root = emoset(tmp_path / "in/EmoSet-118K", 3)
    archive = Path(shutil.make_archive(str(tmp_path / "EmoSet-118K"), "zip", tmp_path / "in"))
    stats = prepare(archive, tmp_path / "out")
    assert stats["classes"] == list(MIKELS_CLASSES)
    shutil.rmtree(root / "image/awe")
    archive = Path(shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "in"))
    with pytest.raises(DataError, match=r"b\.zip/EmoSet-118K/train\.json row 5: the image"):
        prepare(archive, tmp_path / "out2")


def tar_with(file: Path, entry: tarfile.TarInfo, data: bytes = b"") -> Path:
    entry.size = len(data)
    with tarfile.open(file, "w") as packed:
        packed.addfile(entry, io.BytesIO(data))
    return file


def zip_with(file: Path, name: str, data: bytes = b"", mode: int = 0) -> Path:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return file


def linked_tar(file: Path, kind: bytes) -> Path:
    entry = tarfile.TarInfo("cat/x.jpg")
    entry.type, entry.linkname = kind, "/etc/passwd"
    return tar_with(file, entry)


def locked_zip(file: Path) -> Path:
    """A .zip whose file says that it needs a password."""
    zip_with(file, "cat/x.jpg", b"x")
    data = bytearray(file.read_bytes())
    for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(start) + offset] |= 1
    file.write_bytes(data)
    return file


def cut_zip(file: Path) -> Path:
    zip_with(file, "cat/x.jpg", os.urandom(5000))
    file.write_bytes(file.read_bytes()[:3000])
    return file


def damaged_tar(file: Path) -> Path:
    tar_with(file, tarfile.TarInfo("cat/x.jpg"), os.urandom(5000))
    packed = gzip.compress(file.read_bytes())
    file.write_bytes(packed[:3000])
    return file


def test_what_is_said_of_a_damaged_image_in_an_archive(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "in", cat=9, dog=9)
    (root / "cat/bad.jpg").write_bytes(b"no image")
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), "zip", root))
    (said,) = prepare(archive, tmp_path / "out")["unreadable"]["first"]
    assert said == "cat/bad.jpg: UnidentifiedImageError: cannot identify image file 'bad.jpg'"


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "up.zip": (lambda f: zip_with(f, "../x.jpg"), "'../x.jpg' leads out of its folder"),
    "root.zip": (lambda f: zip_with(f, "/x.jpg"), "leads out"),
    "drive.zip": (lambda f: zip_with(f, "C:\\x.jpg"), "leads out"),
    "back.zip": (lambda f: zip_with(f, "a\\..\\..\\x.jpg"), "leads out"),
    "link.zip": (lambda f: zip_with(f, "cat/x.jpg", b"/etc", 0o120777), "is a link or a device"),
    "locked.zip": (locked_zip, "'cat/x.jpg' needs a password; unpack it first"),
    "bomb.zip": (lambda f: zip_with(f, "x.jpg", bytes(10**6)), "as a decompression bomb would"),
    "cut.zip": (cut_zip, "cannot be unpacked .*; is it whole"),
    "up.tar": (lambda f: tar_with(f, tarfile.TarInfo("a/../../x")), "leads out"),
    "root.tar": (lambda f: tar_with(f, tarfile.TarInfo("/x.jpg")), "leads out"),
    "link.tar": (lambda f: linked_tar(f, tarfile.SYMTYPE), "is a link or a device"),
    "hard.tar": (lambda f: linked_tar(f, tarfile.LNKTYPE), "is a link or a device"),
    "device.tar": (lambda f: linked_tar(f, tarfile.CHRTYPE), "is a link or a device"),
    "pipe.tar": (lambda f: linked_tar(f, tarfile.FIFOTYPE), "is a link or a device"),
    "cut.tar.gz": (damaged_tar, "cannot be unpacked .*; is it whole"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SMALL", 10**5)
    make, message = HOSTILE[name]
    (tmp_path / "in").mkdir()
    archive = make(tmp_path / "in" / name)
    with pytest.raises(DataError, match=message) as caught:
        prepare(archive, tmp_path / "out")
    assert str(archive) in str(caught.value)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["in", f"in/{name}"]


def test_a_killed_unpacking_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "in", cat=9, dog=9)
    for i in range(3000):
        (root / f"cat/{i}.txt").write_text("x")
    archive = Path(shutil.make_archive(str(tmp_path / "pets"), "gztar", root))
    words = [sys.executable, "-m", "emotion_transfer", "prepare", str(archive), "--output", "out"]
    where = {**os.environ, "PYTHONPATH": str(project_root(Path(command.__file__)))}
    child = subprocess.Popen(words, cwd=tmp_path, env=where)
    while child.poll() is None and not list(tmp_path.glob(".prepare-*/images/*")):
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert not (tmp_path / "out").exists()
    prepare(archive, tmp_path / "out")


def test_csv_paths_may_start_elsewhere_or_be_absolute(tmp_path: Path) -> None:
    images = class_tree(tmp_path / "pictures", x=3, y=3)
    kinds = ["train", "val", "test"]
    relative = [f"{c}/00{i}.png,{c},{kinds[i]}" for c in "xy" for i in range(3)]
    (tmp_path / "r.csv").write_text("\n".join(["path,label,split", *relative]))
    (tmp_path / "a.csv").write_text(
        "\n".join(["path,label,split", *(f"{images}/{row}" for row in relative)])
    )
    (tmp_path / "lists").mkdir()
    shutil.move(tmp_path / "a.csv", tmp_path / "lists/a.csv")
    one = prepare(tmp_path / "r.csv", tmp_path / "o1", "--images-root", images)
    two = prepare(tmp_path / "lists/a.csv", tmp_path / "o2")
    assert one["images_root"] == two["images_root"] == images.as_posix()
    assert everything(tmp_path / "o1")["val.csv"] == everything(tmp_path / "o2")["val.csv"]


CSV_FAULTS = [
    ("path,mood\na.png,x\n", "has no column label or emotion or .*; it has: path, mood"),
    ("name,label\na.png,x\n", "has no column path or image_path"),
    ("path,label\n", "lists no image"),
    ("", r"list\.csv is empty; its first line should be: path,label"),
    ("path,label\na.png,x\nb.png,\n", r"list\.csv row 3 has an empty label"),
    ("path,label\na.png,x\n ,y\n", r"list\.csv row 3 has an empty path"),
    ("path,label\na.png,x\nb.png,y\n./a.png,x\n", r"row 4 lists a\.png again, after \S+ row 2"),
    (
        "path,label,split\na.png,x,train\nb.png,y,later\n",
        r"row 3 has the split 'later' in.*; write",
    ),
    ("path,label,split\na.png,x,train\nb.png,x,test\n", r"fewer than two classes .*\(x; .*; give"),
    (
        "path,label,split\na.png,x,train\nb.png,y,train\nc.png,z,val\nd.png,x,test\n",
        r"row 4 has the unknown label 'z'.*known: x, y",
    ),
    (
        "path,label,split\na.png,x,train\nb.png,y,train\nc.jpg,x,val\nd.png,x,test\n",
        r"list\.csv row 4: the image \S+c\.jpg is missing \(1 of 4 are\)",
    ),
]


@pytest.mark.parametrize(("text", "message"), CSV_FAULTS)
def test_csv_faults_name_the_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(csv_set(tmp_path / "in", text), tmp_path / "out")


def test_a_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("path,label\na.png,fröhlich\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"l\.csv row 2 is not UTF-8 .*; save it as CSV UTF-8"):
        prepare(tmp_path / "l.csv", tmp_path / "out")


def test_fer2013_becomes_pictures(tmp_path: Path) -> None:
    lines, greys = ["emotion,pixels,Usage"], {}
    for i, usage in enumerate(("Training", "Training", "PublicTest", "PrivateTest")):
        grey = np.random.default_rng(i).integers(0, 256, (48, 48), dtype=np.uint8)
        label = (0, 3, 3, 0)[i]
        greys[usage, label] = grey
        lines.append(f"{label},{' '.join(map(str, grey.ravel()))},{usage}")
    (tmp_path / "fer2013.csv").write_text("\n".join(lines))
    stats = prepare(tmp_path / "fer2013.csv", tmp_path / "out")
    found = tables(tmp_path / "out")
    assert found["train"]["label"].tolist() == ["angry", "happy"]
    for split, usage, label in (("val", "PublicTest", 3), ("test", "PrivateTest", 0)):
        (path,) = found[split]["path"]
        with Image.open(tmp_path / "out" / path) as image:
            np.testing.assert_array_equal(np.asarray(image), greys[usage, label])
    assert stats["images_root"] == "."
    before = everything(tmp_path / "out")
    prepare(tmp_path / "fer2013.csv", tmp_path / "out")  # the same again
    assert everything(tmp_path / "out") == before
    whole, no_face = "1 " * 48 * 48, "is no emotion 0 to 6 with 48 x 48 pixels"
    faults = {
        f"7,{whole},Training": no_face,
        f"-1,{whole},Training": no_face,
        f"0,{whole[2:]},Training": no_face,
        f"0,{whole}": no_face,  # and no usage
        f"0,{whole},Later": "has the split 'Later'",
    }
    for row, message in faults.items():
        (tmp_path / "fer2013.csv").write_text("\n".join([*lines, row]))
        with pytest.raises(DataError, match=rf"fer2013\.csv row 6 {message}"):
            prepare(tmp_path / "fer2013.csv", tmp_path / "out2")
    (tmp_path / "faces.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    with pytest.raises(DataError, match="has 2 images of angry, .*too few"):  # no usage: split here
        prepare(tmp_path / "faces.csv", tmp_path / "out2")
    names = {"fer2013.csv", "faces.csv", "out"}
    assert {path.name for path in tmp_path.iterdir()} == names  # nothing beside the table


# --- images and output --------------------------------------------------------------------------


def test_reference_is_relative_where_the_output_lies_above(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set" / "raw", cat=30, dog=30)
    for output, prefix in ((tmp_path / "set", "raw/"), (root, "")):
        stats = prepare(root, output)
        assert stats["images_root"] == "."
        table = tables(output)["train"]
        assert table["path"].str.startswith(prefix + ("cat/", "dog/")[0]).any()
        assert all((output / path).is_file() for path in table["path"])
    assert len(list(root.rglob("*.png"))) == 60


@pytest.mark.parametrize("images", ["copy", "link"])
def test_images_can_be_brought_along(tmp_path: Path, images: str) -> None:
    root = class_tree(tmp_path / "set", cat=30, dog=30)
    stats = prepare(root, tmp_path / "out", "--images", images)
    assert stats["images_root"] == "."
    for table in tables(tmp_path / "out").values():
        for path in table["path"]:
            brought = tmp_path / "out" / path
            assert brought.is_symlink() == (images == "link")
            assert brought.read_bytes() == (root / path.removeprefix("images/")).read_bytes()
    (tmp_path / "out/images/stale.png").write_text("of an earlier set")
    with pytest.raises(DataError, match="images exists; add --overwrite to replace it"):
        prepare(root, tmp_path / "out", "--images", images)
    assert (tmp_path / "out/images/stale.png").is_file()
    assert prepare(root, tmp_path / "out", "--images", images, "--overwrite") == stats
    assert not (tmp_path / "out/images/stale.png").exists()
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 60
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "images", "label_map.json", "stats.json", "test.csv", "train.csv", "val.csv"
    ]  # fmt: skip


def test_images_are_not_copied_into_or_over_themselves(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", cat=30, dog=30)
    for output in (root, root / "out", tmp_path):
        with pytest.raises(DataError, match="lie in one another"):
            prepare(root, output, "--images", "copy")
    class_tree(tmp_path / "out" / "images", cat=1)
    with pytest.raises(DataError, match="images exists; add --overwrite"):
        prepare(root, tmp_path / "out", "--images", "link")
    assert (tmp_path / "out/images/cat/000.png").is_file()


def test_copies_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_tree(tmp_path / "set", cat=30, dog=30)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="0.0 GB are free"):
        prepare(root, tmp_path / "out", "--images", "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_another_set_is_only_replaced_when_asked(tmp_path: Path) -> None:
    one = class_tree(tmp_path / "one", cat=30, dog=30)
    two = class_tree(tmp_path / "two", ape=30, bee=30)
    out = tmp_path / "out"
    prepare(one, out)
    (out / "notes.txt").write_text("mine")
    before = everything(out)
    prepare(one, out)  # the same again
    assert everything(out) == before
    with pytest.raises(DataError, match=r"holds another data set already \(label_map.*--overwrite"):
        prepare(two, out)
    assert everything(out) == before
    prepare(two, out, "--overwrite")
    assert list(json.loads((out / "label_map.json").read_text())) == ["ape", "bee"]
    assert (out / "notes.txt").read_text() == "mine"
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".prepare")]


def test_an_output_that_is_linked_to_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.symlink_to(disk)
    replace = Path.replace

    def replace_on_one_disk(self: Path, target: Path) -> Path:
        if len({path.resolve().is_relative_to(disk) for path in (self, target)}) > 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_on_one_disk)
    prepare(class_tree(tmp_path / "set", cat=30, dog=30), out)
    assert out.is_symlink()
    assert (disk / "train.csv").is_file()


def test_an_interrupted_overwrite_never_leaves_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(class_tree(tmp_path / "one", cat=30, dog=30), out)
    replace, calls = Path.replace, []

    def fail_third(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_third)
    with pytest.raises(OSError, match="disk is gone"):
        prepare(class_tree(tmp_path / "two", ape=30, bee=30), out, "--overwrite")
    with pytest.raises(DataError, match=r"lacks train\.csv"):
        listed(make_config({"DATA_ROOT": str(out)}))


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="is a file; give a folder"):
        prepare(class_tree(tmp_path / "set", cat=30, dog=30), tmp_path / "out")


def test_stats_describe_the_images(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", train__a=2, train__b=1, val__a=1, test__a=1)
    draw(root / "train/a/large.jpg", (64, 48))
    (root / "train/b/broken.jpg").write_bytes(b"not an image")
    stats = prepare(root, tmp_path / "out")
    assert stats["image_sizes"] == {
        "images": 6,
        "width": {"min": 12, "median": 12.0, "max": 64},
        "height": {"min": 9, "median": 9.0, "max": 48},
    }
    assert stats["unreadable"]["images"] == 1
    assert "broken.jpg: UnidentifiedImageError" in stats["unreadable"]["first"][0]
    assert "train/b/broken.jpg" in tables(tmp_path / "out")["train"]["path"].tolist()
    assert stats["synthetic"] is False
    assert stats["source"] == f"class folders: {root}"
    assert "image_sizes" not in prepare(root, tmp_path / "fast", "--no-sizes")


# --- the command line ---------------------------------------------------------------------------


def overrides(printed: str) -> Any:
    """What the command says for the notebook's parameters cell."""
    (line,) = [line for line in printed.splitlines() if "OVERRIDES = " in line]
    return json.loads(line.split("OVERRIDES = ")[1])


@pytest.mark.parametrize("kind", ["folder", "emoset", "table"])
def test_the_set_is_written_into_the_project_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    home = tmp_path / "project"
    (home / "work").mkdir(parents=True)
    (home / "create_enhanced_notebook.py").write_text("")
    monkeypatch.chdir(home / "work")
    if kind == "emoset":
        source, name = emoset(home / "work/e", 3), "EmoSet_splits"
    elif kind == "folder":
        source, name = class_tree(home / "work/pets", cat=9, dog=9), "pets"
    else:
        rows = [f"{label}{i}.png,{label}" for label in "xy" for i in range(9)]
        source, name = csv_set(home / "work/in", "\n".join(["path,label", *rows])), "list"
    given = source.relative_to(home / "work").as_posix()
    assert command.main([given]) == 0
    assert overrides(capsys.readouterr().out) == {"DATA_ROOT": f"data/processed/{name}"}
    assert len(listed(make_config({"DATA_ROOT": f"data/processed/{name}"})).splits) == 3
    assert command.main([given, "--output", str(tmp_path / "out")]) == 0
    assert overrides(capsys.readouterr().out) == {"DATA_ROOT": (tmp_path / "out").as_posix()}


def test_the_command_prints_the_line_for_the_notebook(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "set", cat=30, dog=30)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "emotion_transfer",
            "prepare",
            str(root),
            "--output",
            "out",
            "--seed",
            "4",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(project_root(Path(command.__file__)))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert overrides(done.stdout) == {"DATA_ROOT": "out"}
    assert "seed 4" in done.stdout
    assert (tmp_path / "out/train.csv").is_file()


@pytest.mark.parametrize(
    "wrong",
    [["--split", "1", "0", "1"], ["--split", "nan", "1", "1"], ["--seed", "-1"], ["--images", "x"]],
)
def test_impossible_options_are_usage_errors(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path), *wrong])
    assert stopped.value.code == 2
