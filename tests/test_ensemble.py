"""Models that answer together, views of a picture, and answers that are not given."""

import csv
import dataclasses
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from test_predict import FACTS, NAMES
from torchvision.transforms import functional as tv

from emotion_toolbox import ensembles
from emotion_toolbox.ensembles import risk_coverage, threshold_for
from emotion_toolbox.errors import ExportError
from emotion_toolbox.export import export_model, load_export, predict_files
from emotion_transfer import __main__ as program
from emotion_transfer.commands import ensemble as command
from emotion_transfer.commands import predict as module
from emotion_transfer.config import cache_size, make_config
from emotion_transfer.model import build_model

ORDER = (2, 0, 1)  # of the classes in the second export


def write_export(folder, seed, size=32, names=NAMES):
    cfg = make_config({
        "MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": size, "HEAD": "linear", "SEED": seed,
        "WEIGHTS": None,
    })  # fmt: skip
    model = build_model(cfg, len(names)).eval()
    with torch.no_grad():
        model.head["output"].weight.mul_(3)  # answers that differ
    return export_model(folder, model, names, dataclasses.asdict(cfg), cache_size(cfg), FACTS)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Two exports of the same classes: other sizes, and the classes in another order."""
    folder = tmp_path_factory.mktemp("exports")
    first = write_export(folder / "one" / "export", 1)
    second = write_export(folder / "two" / "export", 2, 48, tuple(NAMES[i] for i in ORDER))
    return [first, second]


@pytest.fixture(autouse=True)
def no_limit(monkeypatch):
    monkeypatch.setattr(module, "limit_memory", lambda more: None)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60 + i)).save(tmp_path / f"{i}.png")
    return sorted(tmp_path.glob("*.png"))


def alone(folder, paths):
    """What one export says, its classes in the order of NAMES."""
    exported = load_export(folder, module.network_of)
    found = predict_files(exported, paths)
    return found[:, [exported.classes.index(name) for name in NAMES]]


def both(exports):
    return [text for folder in exports for text in ("--model", str(folder))]


def test_an_answer_is_the_mean_of_the_members(exports, pictures, tmp_path, capsys):
    table = tmp_path / "answers.csv"
    assert program.main(["predict", *both(exports), "--csv", str(table), *map(str, pictures)]) == 0
    rows = list(csv.DictReader(table.open()))
    found = np.array([[float(row[name]) for name in NAMES] for row in rows])
    wanted = np.mean([alone(folder, pictures) for folder in exports], axis=0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert [row["predicted"] for row in rows] == [NAMES[i] for i in wanted.argmax(1)]
    assert "sure" not in rows[0]


@pytest.mark.parametrize("views", ensembles.VIEWS)
def test_views_are_torchvisions(exports, pictures, views):
    exported = load_export(exports[0], module.network_of)
    [square] = ensembles.prepare_picture(pictures[0], [(exported.resize, exported.fit)])
    image = torch.from_numpy(square.copy()).permute(2, 0, 1).float() / 255
    image = tv.normalize(image, exported.spec.mean, exported.spec.std)[None]
    side = exported.image_size
    windows = list(tv.five_crop(image, side)) if views == "crops" else [tv.center_crop(image, side)]
    seen = windows + [tv.hflip(one) for one in windows] if views != "none" else windows
    with torch.no_grad():
        shares = torch.stack([exported.model(one).double().softmax(1) for one in seen]).mean(0)
    powered = shares.numpy() ** (1 / exported.temperature)
    found = ensembles.predict_views(exported, [square], views)
    np.testing.assert_allclose(found, powered / powered.sum(), atol=1e-6)
    as_it_says = ensembles.predict_views(replace(exported, tta=True), [square], None)
    flipped = ensembles.predict_views(exported, [square], "flip")
    np.testing.assert_array_equal(as_it_says, flipped)


def test_each_picture_is_decoded_once_a_size(exports, pictures, monkeypatch, capsys):
    decoded = []
    real = ensembles.decode_image
    monkeypatch.setattr(
        ensembles, "decode_image", lambda *args: decoded.append(args[1:]) or real(*args)
    )
    assert program.main(["predict", *both(exports), str(pictures[0])]) == 0
    assert sorted(side for side, _ in decoded) == [37, 55]
    third = write_export(pictures[0].parent / "three", 3)
    decoded.clear()
    models = ["--model", str(exports[0]), "--model", str(third)]
    assert program.main(["predict", *models, str(pictures[0])]) == 0
    assert decoded == [(37, "crop")]


def test_members_that_do_not_belong_together_are_refused(exports, pictures, tmp_path, capsys):
    other = write_export(tmp_path / "other", 1, names=("calm", "joy", "grief"))
    assert program.main(["predict", *both([exports[0], other]), str(pictures[0])]) == 1
    error = capsys.readouterr().err
    assert f"{other} knows the classes calm, joy, grief" in error and "needs the same" in error
    assert program.main(["predict", *both([exports[0], exports[0]]), str(pictures[0])]) == 1
    assert "named twice" in capsys.readouterr().err


# --- the comparison -----------------------------------------------------------------------------


def test_the_comparison_has_the_figures_of_the_answers(exports, tiny_root, tmp_path, capsys):
    out = tmp_path / "figures.json"
    asked = ["ensemble", *both(exports), "--data", str(tiny_root), "--json", str(out)]
    assert program.main(asked) == 0
    said = capsys.readouterr().out
    assert "together less" in said and "McNemar" in said
    result = json.loads(out.read_text())
    rows = pd.DataFrame(result["rows"]).set_index(["model", "views"])
    assert set(rows.index) == {
        (name, views) for name in ("one", "two", "together") for views in ensembles.VIEWS
    }
    split, _ = command.open_split(tiny_root, "test", NAMES)
    paths = [split.path(i) for i in range(len(split))]
    truth = [NAMES.index(name) for name in pd.read_csv(tiny_root / "test.csv")["label"]]
    shares = {
        name: alone(folder, paths) for name, folder in zip(("one", "two"), exports, strict=True)
    }
    shares["together"] = (shares["one"] + shares["two"]) / 2
    tta = load_export(exports[0], module.network_of).tta
    for name, p in shares.items():
        row = rows.loc[(name, "flip" if tta else "none")]
        assert row["accuracy"]["value"] == pytest.approx(accuracy_score(truth, p.argmax(1)))
        wanted = f1_score(truth, p.argmax(1), average="macro", labels=range(3), zero_division=0)
        assert row["macro_f1"]["value"] == pytest.approx(wanted)
        assert row["images_per_second"] > 0
    speeds = rows["images_per_second"].unstack()["none"]
    assert 1 / speeds["together"] == pytest.approx(1 / speeds["one"] + 1 / speeds["two"])


def test_the_best_member_is_that_of_the_validation_images():
    labels = np.array([0, 1, 1, 0])
    good = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    vague = np.array([[0.6, 0.4], [0.4, 0.6], [0.4, 0.6], [0.6, 0.4]])
    answers = command.Answers(labels, {"flip": [1 - good, vague, good]})
    assert command.best_member(answers, "flip") == 2
    test = command.test_together(answers, 0, "flip")
    assert test.difference.value == pytest.approx(1)


def test_data_of_other_classes_and_bad_images(exports, tiny_root, tmp_path, capsys):
    other = write_export(tmp_path / "other", 1, names=("calm", "joy", "grief"))
    asked = ["ensemble", "--model", str(other), "--data", str(tiny_root)]
    assert program.main(asked) == 1
    assert "has the classes calm, joy, rage" in capsys.readouterr().err
    split, _ = command.open_split(tiny_root, "test", NAMES)
    split.path(0).write_bytes(b"no picture")
    assert program.main(["ensemble", "--model", str(exports[0]), "--data", str(tiny_root)]) == 0
    assert f"{split.path(0)}: " in capsys.readouterr().err


# --- answers that are not given -----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.4, 0.5, 0.7, 0.9, 1.0]), min_size=1, max_size=30),
    st.floats(0.01, 1),
)
def test_a_threshold_is_the_highest_that_covers_enough(confidence, coverage):
    values = np.array(confidence)
    chosen = threshold_for(values, coverage)
    assert (values >= chosen).mean() >= coverage - 1e-9
    higher = values[values > chosen]
    assert len(higher) == 0 or (values >= higher.min()).mean() < coverage


def test_risk_and_coverage_are_those_of_a_direct_sum():
    rng = np.random.default_rng(1)
    p, labels = rng.dirichlet(np.ones(3), 40), rng.integers(0, 3, 40)
    curve = risk_coverage(labels, p)
    wrong = p.argmax(1) != labels
    for _, row in curve.iterrows():
        some = p.max(1) >= row["threshold"]
        assert row["coverage"] == pytest.approx(some.mean())
        assert row["risk"] == pytest.approx(wrong[some].mean())
    assert curve["risk"].iloc[-1] == pytest.approx(wrong.mean())


def test_the_order_of_equally_sure_answers_does_not_count():
    p = np.full((4, 2), 0.5) + [[0.2, -0.2]]
    first = risk_coverage(np.array([0, 0, 1, 1]), p)
    second = risk_coverage(np.array([1, 0, 1, 0]), p)
    pd.testing.assert_frame_equal(first, second)
    assert first["risk"].tolist() == [0.5] * 4


def test_a_chosen_threshold_is_in_the_export_and_predict_says_not_sure(
    exports, tiny_root, pictures, tmp_path, capsys
):
    folder = write_export(tmp_path / "run" / "export", 5)
    before = alone(folder, pictures)
    asked = ["threshold", "--model", str(folder.parent), "--data", str(tiny_root)]
    assert program.main([*asked, "--coverage", "0.5"]) == 0
    said = capsys.readouterr().out
    chosen = json.loads((folder / "config.json").read_text())["threshold"]
    assert f"not sure below {chosen:.3f}" in said and "images answered" in said
    split, _ = command.open_split(tiny_root, "val", NAMES)
    confidence = alone(folder, [split.path(i) for i in range(len(split))]).max(1)
    assert (confidence >= chosen - 1e-6).sum() >= len(split) / 2
    assert (folder / "risk_coverage.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(alone(folder, pictures), before)

    sure = before.max(1) >= chosen
    model = ["predict", "--model", str(folder)]
    asked = {"": sure, "--threshold=0": [True] * 5, "--threshold=1": [False] * 5}
    for more, wanted in asked.items():
        assert program.main([*model, *filter(None, [more]), *map(str, pictures)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert ["not sure (" not in line for line in lines] == list(wanted)
    assert program.main([*model, "--json", str(pictures[0])]) == 0
    assert json.loads(capsys.readouterr().out)["sure"] == sure[0]
    table = tmp_path / "t.csv"
    assert program.main([*model, "--csv", str(table), *map(str, pictures)]) == 0
    assert [row["sure"] for row in csv.DictReader(table.open())] == [str(s) for s in sure]
    # a member's threshold does not hold for an ensemble
    assert program.main([*model, "--model", str(exports[0]), *map(str, pictures)]) == 0
    assert "not sure" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["0", "1.5", "nan"])
def test_an_impossible_coverage_is_refused(exports, tiny_root, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        program.main(["threshold", "--model", str(exports[0]), "--data", str(tiny_root),
                      "--coverage", wrong])  # fmt: skip
    assert stop.value.code == 2
    assert "give a share above 0" in capsys.readouterr().err


def test_a_threshold_that_cannot_be_is_refused(pictures, tmp_path):
    folder = write_export(tmp_path / "export", 1)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "threshold": "high"}))
    with pytest.raises(ExportError, match="threshold in .* must be from 0 to 1"):
        module.threshold_of(folder)
