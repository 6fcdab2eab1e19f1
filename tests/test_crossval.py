"""Cross-validation: folds that tear nothing apart, pooled answers, and that it goes on."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score
from small_run import CLASSES, as_arguments, install_small_network, memory_datasets, small_config

from emotion_toolbox.clusters import clustered_mean, clustered_metrics
from emotion_toolbox.errors import DataError
from emotion_toolbox.folds import Grouping, group_images, make_folds, refuse_repeats
from emotion_toolbox.subsets import choose_images, join_datasets
from emotion_toolbox.tables import load_splits
from emotion_transfer import __main__ as program
from emotion_transfer.commands import crossval

DRAWS = {"resamples": 2000, "seed": 0}


@pytest.fixture
def cfg(tiny_root, tmp_path, monkeypatch):
    install_small_network(monkeypatch)
    return small_config(tmp_path, EPOCHS=2, THAW_EPOCHS=(0, 1), MIX_OFF_EPOCHS=0)


def add_column(root, value_of, name="scene"):
    """Give the three CSVs a column; `value_of` takes an image's number in its class and its label.

    Images of one class are numbered through the files.
    """
    counted = dict.fromkeys(CLASSES, 0)
    for split in ("train", "val", "test"):
        table = pd.read_csv(root / f"{split}.csv")
        values = []
        for label in table["label"]:
            values.append(value_of(counted[label], label))
            counted[label] += 1
        table.assign(**{name: values}).to_csv(root / f"{split}.csv", index=False)


def run(cfg, *more: str) -> int:
    return program.main(["crossval", *more, "--set", *as_arguments(cfg)])


def results(cfg):
    """Summary, folds and predictions of the only run there is."""
    (file,) = Path(cfg.OUTPUT_ROOT).glob("*/summary.json")
    tables = (pd.read_csv(file.with_name(f"{name}.csv")) for name in ("folds", "predictions"))
    return json.loads(file.read_text(encoding="utf-8")), *tables


# --- folds --------------------------------------------------------------------------------------


@st.composite
def grouped_labels(draw):
    """Labels and groups of some images, which may or may not allow of folds."""
    classes = draw(st.integers(2, 4))
    count = draw(st.integers(3 * classes, 60))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(0, 15), min_size=count, max_size=count))
    return np.array(labels), np.array(groups), classes


@settings(max_examples=60, deadline=None)
@given(grouped_labels(), st.booleans(), st.integers(2, 5), st.floats(0.05, 0.5), st.integers(0, 99))
@pytest.mark.filterwarnings("error")
def test_every_image_is_judged_once_and_no_group_is_split(found, grouped, folds, share, seed):
    labels, groups, classes = found
    numbers = groups if grouped else np.arange(len(labels))
    grouping = Grouping(numbers, [*map(str, range(99))], "scene" if grouped else None)
    asked = labels, grouping, [f"c{i}" for i in range(classes)], folds, share, seed
    try:
        plan = make_folds(*asked)
    except DataError as error:
        assert "--folds" in str(error) or "--group" in str(error)
        assert grouped or np.bincount(labels, minlength=classes).min() < max(folds, 4)
        return
    assert len(plan) == folds
    assert sorted(np.concatenate([fold.test for fold in plan])) == [*range(len(labels))]
    for fold in plan:
        parts = [set(numbers[part]) for part in fold]
        assert all(len(part) for part in fold)
        assert sum(map(len, parts)) == len(set(numbers))  # no group is in two parts
        assert sum(map(len, fold)) == len(labels)
        assert set(labels[fold.train]) == set(range(classes))
    for fold, again in zip(plan, make_folds(*asked), strict=True):
        assert all(map(np.array_equal, fold, again))


def test_classes_keep_their_shares():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    plan = make_folds(labels, Grouping(np.arange(100), [], None), CLASSES, 5, 0.25, 0)
    for fold in plan:
        assert np.bincount(labels[fold.test]).tolist() == [12, 6, 2]
        assert np.bincount(labels[fold.val]).tolist() == [12, 6, 2]
    assert len({fold.val.tobytes() for fold in plan}) == 5


def test_enough_images_never_are_too_few():
    for folds, each in ((2, 4), (3, 3), (5, 5)):
        labels = np.repeat([0, 1], each)
        make_folds(labels, Grouping(np.arange(len(labels)), [], None), "ab", folds, 0.2, 0)


def test_groups_are_those_of_the_column(tiny_root):
    add_column(tiny_root, lambda number, label: f" {label[0]}{number % 4} ")
    splits = list(load_splits(tiny_root).splits.values())
    groups = group_images(splits[:2], "scene")
    rows = [
        row for s in ("train", "val") for row in csv.DictReader((tiny_root / f"{s}.csv").open())
    ]
    assert [groups.names[i] for i in groups.numbers] == [row["scene"].strip() for row in rows]


# --- one data set of several --------------------------------------------------------------------


def test_joined_images_are_those_of_the_parts():
    parts = [*memory_datasets(size=8).values()]
    joined = join_datasets(parts)
    pixels = np.concatenate([part.pixels.array for part in parts])
    labels = np.concatenate([part.split.labels for part in parts])
    order = np.random.default_rng(0).permutation(len(joined))[:20]
    batch = joined.batch(order)
    np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[order])
    np.testing.assert_array_equal(batch.labels.numpy(), labels[order])
    chosen = choose_images(joined, order)
    np.testing.assert_array_equal(chosen.pictures([3, 0]), pixels[order[[3, 0]]])
    assert chosen.split.files == [joined.split.files[i] for i in order]
    assert chosen.fingerprint() != joined.fingerprint()


def test_a_picture_in_two_folds_is_refused():
    data = memory_datasets(size=8)["train"]
    data.pixels.array[7] = data.pixels.array[2]
    plan = make_folds(data.split.labels, Grouping(np.arange(24), [], None), CLASSES, 3, 0.3, 0)
    (of,) = [fold for fold in plan if 2 in fold.test]
    if 7 in of.test:
        data.pixels.array[8] = data.pixels.array[2]
    with pytest.raises(DataError, match="are the same picture, in two folds; remove one"):
        refuse_repeats(data, plan)
    refuse_repeats(data, [plan[0]._replace(test=np.arange(24))])


# --- intervals over groups ----------------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 3, 200), rng.integers(0, 30, 200)
    predicted = np.where(rng.random(200) < 0.6, labels, rng.integers(0, 3, 200))
    found = clustered_metrics(labels, predicted, groups, CLASSES, **DRAWS)
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"].value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["cohen_kappa"].value == pytest.approx(cohen_kappa_score(labels, predicted))
    assert all(e.low <= e.value <= e.high for e in found.values())


def test_an_image_a_group_gives_the_binomial_interval():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 1000)
    predicted = np.where(rng.random(1000) < 0.7, labels, 1 - labels)
    found = clustered_metrics(labels, predicted, np.arange(1000), "ab", **DRAWS)["accuracy"]
    width = 2 * 1.96 * math.sqrt(found.value * (1 - found.value) / 1000)
    assert found.high - found.low == pytest.approx(width, rel=0.08)


def test_images_that_are_right_together_count_once():
    """Groups of 9 that are all right or all wrong are worth a ninth of their images."""
    hits = np.repeat((np.random.default_rng(2).random(200) < 0.6).astype(float), 9)
    together = clustered_mean(hits, np.repeat(np.arange(200), 9), **DRAWS)
    alone = clustered_mean(hits, np.arange(1800), **DRAWS)
    assert together.value == alone.value == pytest.approx(hits.mean())
    assert together.high - together.low == pytest.approx(3 * (alone.high - alone.low), rel=0.1)


# --- the command --------------------------------------------------------------------------------


def test_pooled_answers_are_of_networks_that_never_saw_the_group(cfg, tiny_root, capsys):
    add_column(tiny_root, lambda number, label: f"{label}-{number % 4}")
    assert run(cfg, "--folds", "3", "--group", "scene", "--baselines") == 0
    summary, folds, answers = results(cfg)
    listed = pd.concat(pd.read_csv(tiny_root / f"{s}.csv") for s in ("train", "val"))
    assert answers["path"].tolist() == listed["path"].tolist()
    assert answers["label"].tolist() == listed["label"].tolist()
    assert answers.groupby("group")["fold"].nunique().max() == 1
    hits = answers["predicted"] == answers["label"]
    assert summary["metrics"]["accuracy"]["value"] == pytest.approx(hits.mean())
    macro = f1_score(answers["label"], answers["predicted"], average="macro")
    assert summary["metrics"]["macro_f1"]["value"] == pytest.approx(macro)
    np.testing.assert_allclose(hits.groupby(answers["fold"]).mean(), folds["accuracy"], atol=1e-6)
    assert folds["test_images"].tolist() == answers["fold"].value_counts().sort_index().tolist()
    columns = ["train_images", "val_images", "test_images"]
    assert (folds[columns].sum(axis=1) == len(answers)).all()
    chosen = answers[[f"p_{name}" for name in CLASSES]].to_numpy().argmax(1)
    assert [CLASSES[i] for i in chosen] == answers["predicted"].tolist()

    probe = answers["linear_probe"] == answers["label"]
    assert summary["baselines"]["linear_probe"]["accuracy"]["value"] == pytest.approx(probe.mean())
    lead = summary["lead_over"]["linear_probe"]
    assert lead["value"] == pytest.approx(hits.mean() - probe.mean())
    assert (summary["images"], summary["group"], summary["groups"]) == (36, "scene", 12)
    assert summary["splits"] == ["train", "val"]
    folder = next(Path(cfg.OUTPUT_ROOT).glob("*/summary.json")).parent
    assert folder.name.startswith("crossval-tiny-small-")
    assert not list(folder.rglob("checkpoints"))
    assert {file.name for file in (folder / "figures").iterdir()} == {"folds.png", "confusion.png"}
    said = capsys.readouterr().out
    assert "36 images of train.csv and val.csv in 12 groups of 'scene', each judged by" in said


def test_a_network_learns_from_the_other_folds_alone(cfg, tiny_root, monkeypatch):
    add_column(tiny_root, lambda number, label: f"{label}-{number % 4}")
    learnt, train_fold = [], crossval.train_fold

    def watch(cfg, datasets, folder):
        learnt.append({name: data.split.files for name, data in datasets.items()})
        return train_fold(cfg, datasets, folder)

    monkeypatch.setattr(crossval, "train_fold", watch)
    assert run(cfg, "--folds", "3", "--group", "scene") == 0
    answers = results(cfg)[2].set_index("path")
    for number, files in enumerate(learnt, start=1):
        assert set(files["test"]) == set(answers.index[answers["fold"] == number])
        scenes = [set(answers.loc[files[part], "group"]) for part in ("train", "val", "test")]
        assert len(set.union(*scenes)) == sum(map(len, scenes)) == 12


def test_killed_after_the_second_fold_it_ends_as_an_unbroken_run(cfg, monkeypatch, capsys):
    asked = "--folds", "3", "--baselines"
    assert run(cfg, *asked) == 0
    unbroken = results(cfg)
    shutil.rmtree(cfg.OUTPUT_ROOT)
    train_fold, trained = crossval.train_fold, []

    def killed(cfg, datasets, folder):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(folder.name)
        return train_fold(cfg, datasets, folder)

    monkeypatch.setattr(crossval, "train_fold", killed)
    assert run(cfg, *asked) == 130
    assert not list(Path(cfg.OUTPUT_ROOT).glob("*/*.csv"))  # nothing that looks like a result

    def noted(cfg, datasets, folder):
        trained.append(folder.name)
        return train_fold(cfg, datasets, folder)

    monkeypatch.setattr(crossval, "train_fold", noted)
    assert run(cfg, *asked) == 0
    assert trained == ["fold-1", "fold-2", "fold-3"]
    summary, folds, answers = results(cfg)
    assert summary == unbroken[0]
    pd.testing.assert_frame_equal(answers, unbroken[2])
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(folds.drop(**drop), unbroken[1].drop(**drop))

    capsys.readouterr()
    assert run(cfg, *asked) == 0  # and nothing is left to do
    assert len(trained) == 3


def test_records_of_other_settings_are_made_again(cfg, monkeypatch):
    trained, train_fold = [], crossval.train_fold
    monkeypatch.setattr(crossval, "train_fold", lambda *a: trained.append(1) or train_fold(*a))
    arguments = ["crossval", "--folds", "2", "--set", *as_arguments(cfg), "RUN_NAME=mine"]
    assert program.main(arguments) == 0
    assert program.main([*arguments, "LR_HEAD=0.05"]) == 0
    assert program.main([*arguments, "LR_HEAD=0.05", "TTA=False"]) == 0
    assert len(trained) == 6
    assert {folder.name for folder in Path(cfg.OUTPUT_ROOT).iterdir()} == {"crossval-mine"}


def test_test_images_are_judged_only_where_asked(cfg):
    assert run(cfg, "--folds", "2", "--test") == 0
    summary, _, answers = results(cfg)
    assert summary["splits"] == ["train", "val", "test"]
    assert answers["split"].value_counts().to_dict() == {"train": 24, "val": 12, "test": 12}
    assert "group" not in answers and summary["groups"] is None


@pytest.mark.parametrize(
    ("more", "value_of", "said"),
    [
        (["--folds", "1"], None, "--folds 1: give 2 or more"),
        (["--group", "theme"], None, "train.csv has no column 'theme' to group by; it has: path"),
        (
            ["--folds", "13"],
            None,
            "calm has 12 images, fewer than --folds 13; set --folds 12, or add some",
        ),
        (
            ["--group", "scene"],
            lambda number, label: label[0],
            "all images of calm are in one group of 'scene', 'c', which cannot be both learnt",
        ),
        (
            ["--group", "scene"],
            lambda number, label: number % 4 if label == "joy" else f"{label}{number}",
            "joy has 4 groups of 'scene', fewer than --folds 5; set --folds 4, or add some",
        ),
        (
            ["--group", "scene", "--folds", "2"],
            lambda number, label: number % 2,
            "fold 1 leaves too little of calm to learn from and to choose the epoch by; set",
        ),
        (
            ["--group", "scene"],
            lambda number, label: "" if (number, label) == (9, "joy") else number,
            "has an empty scene; fill it, or group by another column",
        ),
    ],
)
def test_the_command_names_what_is_wrong(cfg, tiny_root, tmp_path, capsys, more, value_of, said):
    if value_of:
        add_column(tiny_root, value_of)
    assert run(cfg, *more) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}


def test_a_rate_chosen_by_images_that_are_judged_is_refused(cfg, capsys):
    assert program.main(["crossval", "--set", *as_arguments(cfg), "LR_BACKBONE=auto"]) == 1
    assert "LR_BACKBONE='auto' is not for crossval" in capsys.readouterr().err


def test_the_same_picture_twice_is_refused_or_allowed(cfg, tiny_root, capsys):
    """Between two splits a run refuses it, too; in one it is harmless there, but not here."""
    for number in range(8):
        shutil.copy(tiny_root / "train/calm_000.jpg", tiny_root / f"train/copy{number}.jpg")
    with (tiny_root / "train.csv").open("a") as table:
        table.writelines(f"train/copy{number}.jpg,calm\n" for number in range(8))
    assert run(cfg, "--folds", "4") == 1
    assert "are the same picture, in two folds" in capsys.readouterr().err
    assert not Path(cfg.OUTPUT_ROOT).exists()
    allowed = small_config(tiny_root.parent, EPOCHS=1, THAW_EPOCHS=(0, 0), ALLOW_DUPLICATES=True)
    assert run(allowed, "--folds", "4") == 0
