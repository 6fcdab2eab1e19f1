"""The audit: look-alikes, contradictions, gaps and flat images."""

from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from emotion_toolbox import audit as audit_module
from emotion_toolbox.audit import audit_data, close_pairs, look_alikes, look_at
from emotion_toolbox.batches import EmotionDataset, open_datasets
from emotion_toolbox.tables import load_splits
from emotion_transfer.commands.prepare import main as prepare_command

BITS = 4
Datasets = dict[str, EmotionDataset]


def scene(seed: int, size: int = 96) -> Image.Image:
    """A picture of coarse random shapes, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(rng.integers(0, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, size, 2).tolist()
        w, h = rng.integers(10, 50, 2).tolist()
        draw.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


@pytest.fixture
def audited(tmp_path: Path) -> Datasets:
    """Unrelated scenes, and: scene 0 brightened in test under another label, a flat image."""
    images = {
        "train": [(scene(i), "calm") for i in range(6)] + [(scene(i), "wild") for i in range(6, 9)],
        "val": [(scene(20), "calm"), (Image.new("RGB", (96, 96), "navy"), "wild")],
        "test": [(scene(30), "calm"), (scene(0).point(lambda v: min(255, v + 12)), "wild")],
    }
    for split, rows in images.items():
        lines = ["path,label"]
        for number, (image, label) in enumerate(rows):
            (tmp_path / split).mkdir(exist_ok=True)
            image.save(tmp_path / split / f"{number}.jpg", quality=85)
            lines.append(f"{split}/{number}.jpg,{label}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return open_datasets(load_splits(tmp_path), 73, cache_dir=str(tmp_path / "cache"))[1]


def test_hashes_are_those_of_imagehash(audited: Datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    train = audited["train"]
    monkeypatch.setattr(audit_module, "BATCH", 4)
    hashes = look_at("train", train)["hash"]
    for position in range(len(train)):
        pixels = train.pixels[np.array([position])][0]
        assert f"{int(hashes[position]):016x}" == str(imagehash.phash(Image.fromarray(pixels)))


def test_close_pairs_equal_a_plain_double_loop() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    hashes[7], hashes[50] = hashes[3], hashes[41] ^ np.uint64(0b1011)
    expected = {
        (i, j, (int(hashes[i]) ^ int(hashes[j])).bit_count())
        for i in range(60)
        for j in range(i + 1, 60)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 20
    }
    for chunk in (1, 7, 60, 100):
        assert set(map(tuple, close_pairs(hashes, 20, chunk).tolist())) == expected
    assert {(3, 7, 0), (41, 50, 3)} <= expected


def test_one_picture_many_times_over_does_not_fill_the_memory(
    audited: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "MOST_PAIRS", 1000)
    hashes = np.full(400, 12345, dtype=np.uint64)
    pairs = close_pairs(hashes, 4, chunk=2)
    assert 1000 < len(pairs) < 1000 + 2 * 400
    monkeypatch.setattr(audit_module, "MOST_PAIRS", 0)
    assert "there are more" in "\n".join(audit_data(audited, BITS)[1])


def test_finds_the_planted_copy_and_the_flat_image_and_nothing_else(
    audited: Datasets,
) -> None:
    pairs, findings = audit_data(audited, BITS)
    (pair,) = pairs.to_dict("records")
    assert (pair["split_a"], pair["split_b"]) == ("train", "test")
    assert (pair["file_a"], pair["file_b"]) == ("train/0.jpg", "test/1.jpg")
    assert (pair["row_a"], pair["row_b"]) == (2, 3)
    text = "\n".join(findings)
    assert "train/0.jpg (train row 2, calm) and test/1.jpg (test row 3, wild)" in text
    assert "1 pairs of look-alikes stand in two splits" in text
    assert "1 pairs of look-alikes have different labels" in text
    assert "1 images have hardly any contrast, such as val/1.jpg (val row 3)" in text


def test_pictures_of_a_pair_are_its_images(
    audited: Datasets,
) -> None:
    pictures, titles = look_alikes(audited, audit_data(audited, BITS)[0])
    assert titles == ["train row 2\ncalm", "test row 3\nwild"]
    np.testing.assert_array_equal(pictures[1], audited["test"].pixels[np.array([1])][0])


def test_few_validation_images_are_named(audited: Datasets) -> None:
    """By six images, every epoch may be the best."""
    assert any("val has 2 images of 2 classes" in line for line in audit_data(audited, BITS)[1])


def test_a_clean_set_says_so(audited: Datasets) -> None:
    pairs, findings = audit_data({"train": audited["train"]}, BITS)
    assert pairs.empty and findings == ["- nothing suspicious was found"]


def test_the_command_reports_leaks_and_damage_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, first in (("train", 0), ("val", 10), ("test", 20)):
        lines = ["path,label"]
        for i in range(4):
            name = f"{split}_{i}.png"
            scene(first + i).save(tmp_path / name)
            lines.append(f"{name},{'calm' if i % 2 else 'wild'}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "test_1.png").write_bytes((tmp_path / "train_3.png").read_bytes())
    (tmp_path / "val_0.png").write_bytes(b"no image")
    monkeypatch.setattr("emotion_toolbox.files.project_root", lambda start=None: tmp_path)
    assert prepare_command(["--audit", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "val.csv row 2 (val_0.png)" in out
    assert "identical: test.csv row 3 (test_1.png) and train.csv row 5 (train_3.png)" in out
    kept = tmp_path / "outputs" / f"audit-{tmp_path.name}"
    assert len(pd.read_csv(kept / "look_alikes.csv")) == 1
    assert Image.open(kept / "look_alikes.png").size[0] > 200
    with pytest.raises(SystemExit):
        prepare_command([])
