"""The synthetic sample: its form, its determinism, its task, and whose folders it leaves alone."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emotion_toolbox import sample
from emotion_toolbox.errors import DataError
from emotion_toolbox.sample import EMOSET_BALANCE, SAMPLE_COUNTS, draw_sample, paint_picture
from emotion_toolbox.tables import MIKELS_CLASSES

FEW = {"train": 3, "val": 1, "test": 2}


def everything(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_sample(tmp_path_factory.mktemp("drawn") / "sample", counts=FEW, size=48)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_sample(tmp_path_factory.mktemp("drawn") / "sample", size=64)


def test_it_has_the_form_of_a_real_data_set(small: Path) -> None:
    assert json.loads((small / "label_map.json").read_text()) == {
        name: i for i, name in enumerate(MIKELS_CLASSES)
    }
    paths = []
    for split in ("train", "val", "test"):
        table = pd.read_csv(small / f"{split}.csv")
        assert list(table.columns) == ["path", "label"]
        assert set(table["label"]) == set(MIKELS_CLASSES)
        paths += table["path"].tolist()
    assert len(set(paths)) == len(paths)
    on_disk = {p.relative_to(small).as_posix() for p in small.rglob("*.jpg")}
    assert on_disk == set(paths)


def test_stats_say_that_it_is_synthetic_and_count_what_is_there(small: Path) -> None:
    stats = json.loads((small / "stats.json").read_text())
    assert stats["synthetic"] is True
    assert "synthetic" in stats["source"]
    for split in ("train", "val", "test"):
        counted = pd.read_csv(small / f"{split}.csv")["label"].value_counts().to_dict()
        assert stats["counts"][split] == counted


def test_images_are_rgb_jpegs_of_both_orientations_about_the_size_asked_for(small: Path) -> None:
    images = [Image.open(p) for p in small.rglob("*.jpg")]
    assert {(image.format, image.mode) for image in images} == {("JPEG", "RGB")}
    assert any(image.width > image.height for image in images)
    assert any(image.width < image.height for image in images)
    assert all(43 <= min(image.size) <= 53 for image in images)


def test_training_is_as_uneven_as_emoset_and_the_rest_is_even(full: Path) -> None:
    counts = json.loads((full / "stats.json").read_text())["counts"]
    train = np.array([counts["train"][name] for name in MIKELS_CLASSES])
    assert train.sum() == 480
    np.testing.assert_allclose(train / 60, EMOSET_BALANCE, atol=0.01)
    assert set(counts["val"].values()) == {15}
    assert set(counts["test"].values()) == {30}


def test_two_drawings_are_byte_identical(small: Path, tmp_path: Path) -> None:
    again = draw_sample(tmp_path / "again", counts=FEW, size=48)
    assert everything(again) == everything(small)


def test_a_picture_depends_on_its_key_alone(small: Path, tmp_path: Path) -> None:
    more = draw_sample(tmp_path / "more", counts={**FEW, "train": 4}, size=48)
    before, after = everything(small), everything(more)
    shared = [name for name in before if name.endswith(".jpg")]
    assert all(before[name] == after[name] for name in shared)
    other = draw_sample(tmp_path / "other", counts=FEW, size=48, seed=8)
    assert all(before[name] != everything(other)[name] for name in shared)


def test_a_complete_sample_is_not_drawn_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "paint_picture", lambda *_: pytest.fail("drawn again"))
    assert draw_sample(small, counts=FEW, size=48) == small


@pytest.mark.parametrize("lost", ["train/awe/awe_0000.jpg", "val.csv", "label_map.json"])
def test_a_damaged_sample_is_drawn_again(small: Path, tmp_path: Path, lost: str) -> None:
    root = draw_sample(tmp_path / "sample", counts=FEW, size=48)
    (root / lost).unlink()
    draw_sample(root, counts=FEW, size=48)
    assert everything(root) == everything(small)


def test_another_recipe_or_version_replaces_the_old_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = draw_sample(tmp_path / "sample", counts=FEW, size=48)
    draw_sample(root, counts={**FEW, "train": 1}, size=48)
    assert len(pd.read_csv(root / "train.csv")) == 8
    before = (root / "stats.json").read_text()
    monkeypatch.setattr(sample, "SAMPLE_VERSION", sample.SAMPLE_VERSION + 1)
    draw_sample(root, counts={**FEW, "train": 1}, size=48)
    assert (root / "stats.json").read_text() != before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["sample"]


def test_an_interrupted_drawing_leaves_nothing_that_looks_complete(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def paint_five(*args: object) -> Image.Image:
        nonlocal drawn
        drawn += 1
        if drawn > 5:
            raise KeyboardInterrupt
        return Image.new("RGB", (20, 20))

    monkeypatch.setattr(sample, "paint_picture", paint_five)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / "sample", counts=FEW, size=48)
    monkeypatch.undo()
    assert not (tmp_path / "sample").exists()
    assert everything(draw_sample(tmp_path / "sample", counts=FEW, size=48)) == everything(small)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["sample"]


def test_a_killed_drawing_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    code = "import sys, pathlib; from emotion_toolbox.sample import draw_sample; "
    code += "draw_sample(pathlib.Path(sys.argv[1]))"
    root = tmp_path / "sample"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        cwd=Path(sample.__file__).parents[1],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert any(tmp_path.rglob("*.jpg"))
    assert not root.exists()
    assert (draw_sample(root, counts=FEW, size=48) / "train.csv").is_file()


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    (root / "train.csv").write_text("path,label\n")
    (root / "stats.json").write_text('{"synthetic": false}')
    before = everything(root)
    with pytest.raises(DataError, match="mine holds something else"):
        draw_sample(root, counts=FEW, size=48)
    assert everything(root) == before


def test_a_folder_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="start Jupyter in a folder where you may write"):
        draw_sample(tmp_path / "file" / "sample", counts=FEW, size=48)


def test_a_sample_in_a_folder_without_write_permission_is_used(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert draw_sample(small, counts=FEW, size=48) == small
    with pytest.raises(DataError, match="Permission denied; start Jupyter in"):
        draw_sample(small.with_name("other"), counts=FEW, size=48)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    assert (draw_sample(tmp_path / "sample", counts=FEW, size=48) / "train.csv").is_file()


def test_several_at_once_give_one_complete_sample(small: Path, tmp_path: Path) -> None:
    root, errors = tmp_path / "sample", []

    def draw() -> None:
        try:
            draw_sample(root, counts=FEW, size=48)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert everything(root) == everything(small)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["sample"]


def test_every_class_has_a_painter() -> None:
    assert tuple(sample.CLASSES) == MIKELS_CLASSES
    pictures = {paint_picture(name, (1,), 48).tobytes() for name in MIKELS_CLASSES}
    assert len(pictures) == len(MIKELS_CLASSES)


def colour_statistics(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        rgb = np.asarray(image, np.float64) / 255
        hsv = np.asarray(image.convert("HSV"), np.float64) / 255
    turn = 2 * np.pi * hsv[..., 0]
    hue = [(np.cos(turn) * hsv[..., 1]).mean(), (np.sin(turn) * hsv[..., 1]).mean()]
    parts = [rgb.mean((0, 1)), rgb.std((0, 1)), hsv[..., 1:].mean((0, 1)), hsv[..., 1:].std((0, 1))]
    return np.concatenate([*parts, hue])


def test_colours_alone_go_half_of_the_way(full: Path) -> None:
    """Learnable far above chance (0.125) without shapes, and far from solved."""
    features, labels = {}, {}
    for split in SAMPLE_COUNTS:
        table = pd.read_csv(full / f"{split}.csv")
        features[split] = np.stack([colour_statistics(full / path) for path in table["path"]])
        labels[split] = table["label"].to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    model.fit(features["train"], labels["train"])
    assert 0.4 < model.score(features["test"], labels["test"]) < 0.72


def test_pleasant_pictures_tend_to_be_brighter(full: Path) -> None:
    light = pd.Series(
        {str(p): np.asarray(Image.open(p).convert("L")).mean() for p in full.rglob("train/*/*.jpg")}
    )
    label = light.index.to_series().map(lambda p: Path(p).parent.name)
    means = light.groupby(label).mean()
    assert means[list(MIKELS_CLASSES[:4])].mean() > 1.2 * means[list(MIKELS_CLASSES[4:])].mean()
