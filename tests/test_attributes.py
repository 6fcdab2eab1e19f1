"""Accuracy by attributes: how cells are read, the arithmetic, the tests, and the command."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from emotion_toolbox import sample
from emotion_toolbox.attributes import (
    Attribute,
    drawn_attributes,
    make_attribute,
    measure_pictures,
    read_attributes,
    split_cell,
)
from emotion_toolbox.cache import DecodedPixels
from emotion_toolbox.decoding import decode_image, read_image_bytes
from emotion_toolbox.errors import DataError
from emotion_toolbox.export import export_model, load_export, predict_squares
from emotion_toolbox.subgroups import (
    MISSING,
    accuracy_by_group,
    group_images,
    holm,
    permutation_test,
)
from emotion_toolbox.tables import load_splits
from emotion_transfer import __main__ as program
from emotion_transfer.commands.predict import network_of
from emotion_transfer.config import cache_size, make_config
from emotion_transfer.model import build_model

FACTS = {
    "synthetic": False, "dataset": "tiny", "weights": "none", "epochs": 1, "temperature": 1.0,
    "metrics": {"test": {}},
}  # fmt: skip


def numeric(values) -> Attribute:
    return make_attribute("size", ["" if v is None else str(v) for v in values])


# --- cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("forest", ("forest",)),
        ("dog|cat| dog ", ("dog", "cat")),
        ("dog;cat", ("dog", "cat")),
        ('["dog", "a  cat"]', ("dog", "a cat")),
        ("[sic]", ("[sic]",)),
        ("", ()),
        ("  ", ()),
        ("nan", ()),
        ("dog||?", ("dog",)),
        ("[]", ()),
    ],
)
def test_a_cell_has_one_value_several_or_none(text, values):
    assert split_cell(text) == values


def test_numbers_are_numbers_only_where_all_are():
    found = make_attribute("x", ["0.1", "", "2"])
    assert found.numbers is not None
    np.testing.assert_array_equal(found.numbers, [0.1, np.nan, 2])
    for texts in (["0.1", "dark"], ["1|2", "3"], ["", ""], ["inf", "1"]):
        assert make_attribute("x", texts).numbers is None


# --- groups -------------------------------------------------------------------------------------


def test_groups_pool_what_is_rare_and_show_what_is_missing():
    texts = ["a"] * 30 + ["b"] * 20 + ["c"] * 19 + ["d"] + [""] * 3
    groups = group_images(make_attribute("x", texts))
    assert {name: int(group.sum()) for name, group in groups.items()} == {
        "a": 30, "b": 20, "other (2 values)": 20, MISSING: 3,
    }  # fmt: skip
    assert groups["b"].nonzero()[0].tolist() == list(range(30, 50))
    assert "other (1 value)" in group_images(make_attribute("x", texts[:69]))


def test_an_image_counts_for_each_of_its_values():
    groups = group_images(make_attribute("x", ["a|b", "b", "c|d", "", "a"]), few=2)
    assert {name: group.nonzero()[0].tolist() for name, group in groups.items()} == {
        "a": [0, 4], "b": [0, 1], "other (2 values)": [2], MISSING: [3],
    }  # fmt: skip


def test_few_numbers_are_kept_and_many_are_binned_by_quantiles():
    steps = np.repeat(np.arange(11) / 10, 20)
    assert list(group_images(numeric(steps))) == [f"{x:g}" for x in np.arange(11) / 10]
    assert list(group_images(numeric([10, 9, 100] * 20))) == ["9", "10", "100"]

    values = np.random.default_rng(0).permutation(1000) / 7
    groups = group_images(numeric([*values, None]))
    assert groups.pop(MISSING).sum() == 1
    expected = pd.qcut(values, 5, labels=False)
    for number, (name, group) in enumerate(groups.items()):
        low, high = map(float, name.split(" to "))
        inside = values[group[:-1]]
        assert low - 0.5 <= inside.min() and inside.max() <= high + 0.5
        assert abs(int(group.sum()) - int((expected == number).sum())) <= 20


def test_numbers_too_alike_for_bins_are_one_group():
    values = [1.0] * 500 + list(1 + np.arange(20) / 1e9) + [5.0]
    assert sum(group.sum() for group in group_images(numeric(values), 1).values()) == len(values)


# --- accuracy -----------------------------------------------------------------------------------


@pytest.fixture
def judged():
    """Labels and answers of 3 classes for 400 images, and a column of 4 values."""
    rng = np.random.default_rng(3)
    labels, values = rng.integers(0, 3, 400), rng.integers(0, 4, 400)
    right = rng.random(400) < 0.5 + 0.1 * values
    predicted = np.where(right, labels, (labels + 1) % 3)
    return labels, predicted, values


def test_accuracy_by_value_is_that_of_a_groupby(judged):
    labels, predicted, values = judged
    groups = group_images(make_attribute("x", [f"v{v}" for v in values]))
    found = accuracy_by_group(labels, predicted, groups, 3).set_index("value")
    frame = pd.DataFrame({"x": values, "label": labels, "right": labels == predicted})
    frame["expected"] = frame.groupby("label")["right"].transform("mean")
    for value, rows in frame.groupby("x"):
        row = found.loc[f"v{value}"]
        assert row["images"] == len(rows)
        assert row["accuracy"] == pytest.approx(rows["right"].mean())
        assert row["expected"] == pytest.approx(rows["expected"].mean())
        assert row["low"] < row["accuracy"] < row["high"]
        assert row["macro_f1_low"] < row["macro_f1"] < row["macro_f1_high"]


def test_macro_f1_is_scikit_learns_and_absent_without_enough_images_of_a_class(judged):
    from sklearn.metrics import f1_score

    labels, predicted, values = judged
    groups = {"all": np.ones(400, bool), "two classes": labels != 2, "few": np.arange(400) < 9}
    found = accuracy_by_group(labels, predicted, groups, 3).set_index("value")["macro_f1"]
    assert found["all"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert math.isnan(found["two classes"]) and math.isnan(found["few"])


def test_the_interval_is_wilsons_and_covers():
    z, n = stats.norm.ppf(0.975), 25
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        predicted = (rng.random(n) < 0.9).astype(int)
        (row,) = accuracy_by_group(np.ones(n, int), predicted, {"x": np.ones(n, bool)}, 2).to_dict(
            "records"
        )
        p = predicted.mean()
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert (row["low"], row["high"]) == pytest.approx((centre - half, centre + half))
        covered += row["low"] <= 0.9 <= row["high"]
    assert covered / 200 > 0.9


# --- chance -------------------------------------------------------------------------------------


def test_p_is_close_to_that_of_a_chi_squared_test():
    rng = np.random.default_rng(2)
    values = rng.integers(0, 4, (5, 1000))
    hits = rng.random(1000) < 0.7
    columns = [{str(v): row == v for v in range(4)} for row in values]
    found = permutation_test(hits, columns, np.zeros(1000, int), times=5000)
    for p, row in zip(found, values, strict=True):
        theory = stats.chi2_contingency(pd.crosstab(row, hits)).pvalue
        assert p == pytest.approx(theory, abs=0.03)


def test_chance_alone_is_no_finding_and_a_difference_is():
    rng, low = np.random.default_rng(0), 0
    everything = np.zeros(200, int)
    for _ in range(60):
        values = rng.integers(0, 4, 200)
        groups = {str(v): values == v for v in range(4)}
        (p,) = permutation_test(rng.random(200) < 0.7, [groups], everything, times=400)
        low += p < 0.05
    assert low <= 9  # 3 expected; more than 9 has a probability below 0.1 %
    hard = np.arange(200) < 50
    both = [{"hard": hard, "easy": ~hard}, {"all": np.ones(200, bool)}]
    p, one = permutation_test(rng.random(200) < np.where(hard, 0.3, 0.8), both, everything)
    assert p < 0.001 and math.isnan(one)


def test_what_the_classes_explain_is_no_finding_within_them():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 300)
    indoors = rng.random(600) < np.where(labels == 0, 0.9, 0.1)
    hits = rng.random(600) < np.where(labels == 0, 0.5, 0.9)
    groups = [{"in": indoors, "out": ~indoors}]
    (plain,) = permutation_test(hits, groups, np.zeros_like(labels))
    (within,) = permutation_test(hits, groups, labels)
    assert plain < 0.001 and within > 0.05


def test_where_all_is_right_there_is_nothing_to_test():
    half = np.arange(40) < 20
    (p,) = permutation_test(np.ones(40, bool), [{"a": half, "b": ~half}], np.zeros(40, int))
    assert math.isnan(p)


def test_holm_by_hand_and_as_statsmodels():
    nan = float("nan")
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, nan, 0.9, 0.001])[::2] == pytest.approx([1.0, 1.0])
    assert holm([0.5, nan, 0.9, 0.001])[3] == pytest.approx(0.003)
    assert math.isnan(holm([nan, 0.2])[0]) and holm([nan, 0.2])[1] == 0.2
    tests = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(12) ** 3
    assert holm(p) == pytest.approx(tests.multipletests(p, method="holm")[1])


# --- what pictures tell -------------------------------------------------------------------------


def test_brightness_is_luma_and_colourfulness_that_of_hasler_and_suesstrunk():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    for picture, (light, colour) in zip(pictures, measure_pictures(pictures), strict=True):
        grey = np.asarray(Image.fromarray(picture).convert("L"))
        assert light == pytest.approx(grey.mean() / 255, abs=0.003)
        r, g, b = (picture[..., i].astype(float).ravel() for i in range(3))
        rg, yb = r - g, 0.5 * (r + g) - b
        m = math.sqrt(rg.var() + yb.var()) + 0.3 * math.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
        assert colour == pytest.approx(m / 109)
    grey = np.full((1, 4, 4, 3), 51, np.uint8)
    assert measure_pictures(grey)[0] == pytest.approx([0.2, 0])


def test_what_is_told_of_a_drawn_picture_is_what_was_drawn(monkeypatch):
    seen, blend = [], Image.blend
    monkeypatch.setattr(
        sample.Image, "blend", lambda a, b, share: seen.append(share) or blend(a, b, share)
    )
    paint = sample.paint_class
    monkeypatch.setattr(
        sample, "paint_class", lambda name, *rest: seen.append(name) or paint(name, *rest)
    )
    for label, *key in [("awe", 7, 0, 1, 3), ("fear", 7, 2, 6, 0), ("sadness", 1, 1, 7, 5)]:
        seen.clear()
        sample.paint_picture(label, key, 40)
        first, second, share, *_ = seen  # enhancing blends, too
        assert first == label and drawn_attributes(label, key) == (second, str(share))


def test_columns_travel_with_their_images_and_light_is_measured(tiny_root):
    table = pd.read_csv(tiny_root / "test.csv")
    table["size"] = [f"s{i}" for i in range(len(table))]
    table.to_csv(tiny_root / "test.csv", index=False)
    split = load_splits(tiny_root).splits["test"].select(np.array([7, 2]))
    found = read_attributes(split, DecodedPixels(split, 32, 1))
    assert list(found) == ["size", "brightness", "colorfulness"]
    assert found["size"].cells == [("s7",), ("s2",)]
    square = decode_image(read_image_bytes(split.path(1)), 32)
    assert found["brightness"].numbers[1] == pytest.approx(measure_pictures(square[None])[0, 0])
    assert list(read_attributes(split, DecodedPixels(split, 32, 1), ["size"])) == ["size"]
    with pytest.raises(DataError, match=r"test\.csv has no attribute 'mood'; there are: size, br"):
        read_attributes(split, DecodedPixels(split, 32, 1), ["mood"])


def test_the_drawn_sample_has_attributes_of_its_own(tmp_path):
    root = sample.draw_sample(tmp_path / "s", counts={"train": 1, "val": 1, "test": 1}, size=32)
    split = load_splits(root).splits["test"]
    found = read_attributes(split, DecodedPixels(split, 32, 1))
    assert list(found) == ["second_class", "second_share", "brightness", "colorfulness"]
    shares = found["second_share"].numbers
    assert len(shares) == 8 and ((shares >= 0) & (shares < 0.45)).all()
    for i, (second,) in enumerate(found["second_class"].cells):
        assert second != split.files[i].split("/")[1]


# --- the command --------------------------------------------------------------------------------


def command(*arguments) -> int:
    return program.main(["attributes", *map(str, arguments)])


@pytest.fixture
def run(tiny_root, tmp_path):
    """A run that is done on data with two columns, with hand-made answers; 12 test images."""
    for split in ("train", "val", "test"):
        table = pd.read_csv(tiny_root / f"{split}.csv")
        table["scene"] = ["beach" if i % 2 else "" for i in range(len(table))]
        table["light"] = [i % 3 / 10 for i in range(len(table))]
        table.to_csv(tiny_root / f"{split}.csv", index=False)
    folder = tmp_path / "outputs" / "mine"
    folder.mkdir(parents=True)
    cfg = make_config({"DATA_ROOT": str(tiny_root)})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    facts = {"synthetic": True, "model": "small", "debug": False}
    (folder / "summary.json").write_text(json.dumps(facts))
    said = table[["path", "label"]].assign(confidence=0.5)
    said["predicted"] = said["label"].where(np.arange(12) % 4 != 0, "calm")
    said.iloc[::-1].to_csv(folder / "predictions_test.csv", index=False)
    return folder


def test_the_command_writes_what_it_prints(run, capsys):
    assert command("--run", run) == 0
    out = capsys.readouterr().out
    said = pd.read_csv(run / "predictions_test.csv").iloc[::-1].reset_index()
    right = (said["label"] == said["predicted"]).to_numpy()
    found = json.loads((run / "attributes" / "attributes.json").read_text(encoding="utf-8"))
    assert found["accuracy"] == pytest.approx(right.mean()) and found["images"] == 12
    assert found["note"] == "SYNTHETIC SAMPLE, small" and found["note"] in out
    assert [c["name"] for c in found["columns"]] == [
        "scene", "light", "brightness", "colorfulness",
    ]  # fmt: skip
    table = pd.read_csv(run / "attributes" / "attributes.csv")
    scene = table[table["column"] == "scene"].set_index("value")
    assert scene.loc[MISSING, "accuracy"] == pytest.approx(right[::2].mean())
    assert scene.loc["other (1 value)", "accuracy"] == pytest.approx(right[1::2].mean())
    assert "scene: no evidence of a difference" in out and "other (3 values)" in out
    with Image.open(run / "attributes" / "attributes.png") as picture:
        assert min(picture.size) > 300
    names = {p.name for p in (run / "attributes").iterdir()}
    assert names == {"attributes.csv", "attributes.json", "attributes.png"}


def test_the_newest_run_and_chosen_columns(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    assert command("--columns", "scene") == 0
    assert set(pd.read_csv(run / "attributes" / "attributes.csv")["column"]) == {"scene"}


def test_data_that_moved(run, tiny_root, capsys):
    moved = tiny_root.rename(tiny_root.with_name("moved"))
    assert command("--run", run) == 1
    assert "lacks train.csv" in capsys.readouterr().err
    assert command("--run", run, "--data", moved) == 0


def test_an_export_answers_itself(run, tiny_root, tmp_path, capsys):
    cfg = make_config({"MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": 32, "HEAD": "linear"})
    names, model = ("rage", "calm", "joy"), build_model(cfg, 3)
    export = tmp_path / "other" / "export"
    export_model(export, model, names, dataclasses.asdict(cfg), cache_size(cfg), FACTS)
    (tiny_root / "val" / "joy_001.jpg").write_bytes(b"no image")
    assert command("--model", export.parent, "--data", tiny_root, "--split", "val") == 0
    said = capsys.readouterr()
    assert "left out: " in said.err and "joy_001.jpg" in said.err
    split = load_splits(tiny_root).splits["val"]
    good, exported = [i for i in range(12) if i != 1], load_export(export, network_of)
    squares = [decode_image(read_image_bytes(split.path(i)), exported.resize) for i in good]
    answers = np.array(names)[predict_squares(exported, squares).argmax(1)]
    truth = np.array(["calm", "joy", "rage"])[split.labels[good]]
    (file,) = tmp_path.glob("other/attributes-tiny-val/attributes.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["images"], found["split"]) == (11, "val")
    assert found["accuracy"] == pytest.approx((answers == truth).mean())


def damage_missing(run, root):
    (run / "predictions_test.csv").unlink()


def damage_columns(run, root):
    (run / "predictions_test.csv").write_text("path,label\na,b\n")


def damage_summary(run, root):
    (run / "summary.json").write_text("{")


def damage_settings(run, root):
    (run / "config.json").write_text("{}")


def damage_images(run, root):
    text = (run / "predictions_test.csv").read_text()
    (run / "predictions_test.csv").write_text(text.replace("calm_009", "calm_909"))


def damage_labels(run, root):
    text = (root / "test.csv").read_text()
    (root / "test.csv").write_text(text.replace("calm_000.jpg,calm", "calm_000.jpg,joy"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_missing, "predictions_test.csv is missing: the run is not done"),
        (damage_columns, "predictions_test.csv cannot be read"),
        (damage_summary, "summary.json cannot be read"),
        (damage_settings, "config.json cannot be read ('FIT')"),
        (damage_images, "has 1 images that are not in"),
        (damage_labels, "test.csv row 2 (test/calm_000.jpg) has another label"),
    ],
)
def test_a_run_that_does_not_fit_is_an_error_and_nothing_is_written(
    run, tiny_root, capsys, damage, said
):
    damage(run, tiny_root)
    assert command("--run", run) == 1
    assert said in capsys.readouterr().err
    assert not (run / "attributes").exists()


def test_the_command_names_what_is_wrong(run, tiny_root, tmp_path, monkeypatch, capsys):
    assert command("--run", run, "--columns", "mood") == 1
    assert "has no attribute 'mood'; there are: scene, light" in capsys.readouterr().err
    monkeypatch.chdir(tiny_root)
    assert command() == 1
    assert "finish one, or name one: --run" in capsys.readouterr().err
    for wrong in (
        ("--run", run, "--split", "val"),
        ("--model", run),
        ("--run", run, "--model", run),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(*wrong)
        assert stopped.value.code == 2
    capsys.readouterr()
    cfg = make_config({"MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": 32, "HEAD": "linear"})
    export, model = tmp_path / "two" / "export", build_model(cfg, 2)
    export_model(export, model, ("calm", "glee"), dataclasses.asdict(cfg), cache_size(cfg), FACTS)
    assert command("--model", export, "--data", tiny_root) == 1
    assert "knows calm, glee; give data of the same classes" in capsys.readouterr().err
    assert not list(tmp_path.glob("two/attributes*"))
