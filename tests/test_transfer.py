"""Models on other sets: which classes are alike, new statistics, few labels, and the matrix."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_run import SMALL_SPEC, install_small_network, memory_datasets, small_config

from emotion_toolbox import adaptation
from emotion_toolbox.adaptation import adapt_statistics, draw_shots, probe_shots, usable_shots
from emotion_toolbox.backbones import batch_norms
from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.errors import ConfigError
from emotion_toolbox.export import export_model, load_export, predict_files
from emotion_toolbox.mapping import map_classes, merge_probabilities, parse_pairs, pole_of
from emotion_toolbox.pixels import prepare_images
from emotion_toolbox.probes import STRENGTHS, USUAL_STRENGTH
from emotion_toolbox.tables import MIKELS_CLASSES, POSITIVE_EMOTIONS, load_splits
from emotion_transfer import __main__ as program
from emotion_transfer.commands import transfer
from emotion_transfer.commands.predict import network_of
from emotion_transfer.config import cache_size
from emotion_transfer.model import build_model

VALENCES = ("negative", "neutral", "positive")
FACTS = {
    "synthetic": False, "dataset": "pictures", "weights": "none", "epochs": 1, "temperature": 1.5,
    "metrics": {"test": {}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


def make_export(folder, classes, seed=0, head="linear"):
    """An untrained network whose answers differ from picture to picture."""
    cfg = small_config(folder, HEAD=head, START="random", SEED=seed)
    model, noise = build_model(cfg, len(classes)), torch.randn(32, 3, 32, 32)
    for layer in batch_norms(model):
        layer.momentum = 1.0
    with torch.no_grad():
        model.train()(noise)
        last = [m for m in model.head.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight.mul_(4 / model.eval()(noise).std())
    export_model(folder, model, classes, dataclasses.asdict(cfg), cache_size(cfg), FACTS)
    return folder


def relabel(root, names, folder):
    """A copy of a data set in `folder` whose classes have other `names`."""
    shutil.copytree(root, folder)
    for split in ("train", "val", "test"):
        table = pd.read_csv(folder / f"{split}.csv")
        table.assign(label=table["label"].map(names)).to_csv(folder / f"{split}.csv", index=False)
    (folder / "label_map.json").unlink()
    return folder


def run(tmp_path, models, data, *more):
    options = "WEIGHTS=None", "DEVICE=cpu", "BOOTSTRAP=100", f"CACHE_DIR={tmp_path / 'cache'}"
    asked = ["--model", *map(str, models), "--data", *map(str, data), *more]
    return program.main(
        ["transfer", *asked, "--set", *options, f"OUTPUT_ROOT={tmp_path / 'outputs'}"]
    )


def results(tmp_path):
    (file,) = (tmp_path / "outputs").glob("*/transfer.json")
    return json.loads(file.read_text(encoding="utf-8"))


# --- which classes are alike --------------------------------------------------------------------


def test_classes_are_alike_by_name_whatever_their_case():
    found = map_classes(["Fear", "joy", "blue_sky", "rage"], ["joy", "Blue Sky", "FEAR", "awe"])
    assert found.how == "name"
    assert found.names == ("joy", "Blue Sky", "FEAR")
    assert found.source.tolist() == [2, 0, 1, -1]
    assert found.target.tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize("both", [(MIKELS_CLASSES, VALENCES), (VALENCES, MIKELS_CLASSES)])
def test_emotions_and_valences_are_alike_by_polarity(both):
    found = map_classes(*both)
    assert found.how == "polarity" and set(found.names) == {"positive", "negative"}
    for names, numbers in zip(both, (found.source, found.target), strict=True):
        for name, number in zip(names, numbers, strict=True):
            expected = name if names is VALENCES else (
                "positive" if name in POSITIVE_EMOTIONS else "negative"
            )  # fmt: skip
            assert number == (-1 if name == "neutral" else found.names.index(expected))


def test_emotions_of_two_models_are_alike_by_polarity_where_names_do_not_suffice():
    found = map_classes(MIKELS_CLASSES, ["happy", "angry", "surprise"])
    assert (found.how, found.names) == ("polarity", ("positive", "negative"))
    assert found.target.tolist() == [0, 1, -1]
    assert map_classes(["fear", "awe"], ["fear", "joy"]).how == "polarity"  # one name is too few
    assert {pole_of(n) for n in MIKELS_CLASSES} == {"positive", "negative"}


@pytest.mark.parametrize(
    "both", [(["dress", "hat"], VALENCES), (["dress", "hat"], ["hat", "fork"])]
)
def test_a_single_class_or_none_is_not_enough(both):
    assert map_classes(*both) is None


def test_classes_are_alike_by_hand_first():
    asked = ["calm", "joy", "rage", "fear"], ["low", "high", "fear"]
    pairs = [("calm", "low"), ("HIGH", "joy"), ("rage", "high")]  # either way round
    found = map_classes(*asked, pairs)
    assert (found.how, found.names) == ("hand", ("low", "high"))
    assert found.source.tolist() == [0, 1, 1, -1]
    assert found.target.tolist() == [0, 1, -1]


def test_pairs_that_meet_are_one_class():
    found = map_classes("abcd", "wxyz", [("a", "w"), ("b", "x"), ("a", "x"), ("c", "y")])
    assert found.source.tolist() == [0, 0, 1, -1]
    assert found.target.tolist() == [0, 0, 1, -1]
    assert found.names == ("w + x", "y")


def test_merged_probabilities_are_sums_and_leave_out_the_rest():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 6)
    merged = merge_probabilities(p, np.array([1, -1, 0, 1]), 2)
    pairs = np.stack([p[:, 2], p[:, 0] + p[:, 3]], axis=1)
    np.testing.assert_allclose(merged, pairs / (1 - p[:, [1]]))


@pytest.mark.parametrize(
    ("text", "said"),
    [("joy", "--map joy: write CLASS=CLASS"), ("joy=luck", "no class 'luck'; one has joy; two")],
)
def test_a_wrong_pair_is_named(text, said):
    known = {"one": ["joy"], "two": ["positive"]}
    with pytest.raises(ConfigError, match=said):
        parse_pairs([text], known)
    assert parse_pairs(["Joy = positive,", "positive=joy"], known) == [
        ("Joy", "positive"),
        ("positive", "joy"),
    ]


# --- statistics ---------------------------------------------------------------------------------


def seen(data, size=32):
    batch = data.batch(np.arange(len(data)))
    return prepare_images(batch.images, size, SMALL_SPEC.mean, SMALL_SPEC.std)


def moments(values):
    """Mean and variance of each channel in float64, by NumPy."""
    columns = values.detach().double().transpose(0, 1).flatten(1).numpy()
    return columns.mean(1), columns.var(1)


def assert_holds(layer, values):
    mean, variance = moments(values)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-4, atol=1e-6)


@pytest.fixture
def network(tmp_path):
    return load_export(make_export(tmp_path / "e", VALENCES, head="progressive"), network_of).model


def test_statistics_are_those_of_the_features(network):
    """Every layer, where one batch holds all images; the convolutions in float64."""
    data = memory_datasets()["train"]
    adapted = adapt_statistics(network, data, SMALL_SPEC, 32)
    parts = copy.deepcopy(adapted.backbone).double()
    first = parts.conv1(seen(data).double())
    assert_holds(adapted.backbone.bn1, first)
    second = parts.conv2(torch.relu(parts.bn1.train()(first)))
    assert_holds(adapted.backbone.bn2, second)
    features = torch.relu(parts.bn2.train()(second)).mean((2, 3))
    assert_holds(adapted.head["reduction"][1], adapted.head["reduction"][0].double()(features))


def test_batches_are_pooled_exactly(network, monkeypatch):
    data = memory_datasets()["train"]
    monkeypatch.setattr(adaptation, "STATISTICS_BATCH", 5)  # 24 images: batches of 5 and 4
    adapted = adapt_statistics(network, data, SMALL_SPEC, 32)
    assert_holds(adapted.backbone.bn1, network.backbone.conv1(seen(data)))


def test_no_weight_moves_nor_does_the_model_given(network):
    before = copy.deepcopy(network.state_dict())
    data = memory_datasets()["train"]
    adapted, again = (adapt_statistics(network, data, SMALL_SPEC, 32) for _ in range(2))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        new = adapted.state_dict()[name]
        torch.testing.assert_close(new, again.state_dict()[name], rtol=0, atol=0)  # no dropout
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(new, value, rtol=0, atol=0)
    assert not any(module.training for module in adapted.modules())


def test_labels_play_no_part(network):
    data = memory_datasets()["train"]
    other = dataclasses.replace(data.split, labels=data.split.labels[::-1].copy())
    mixed = EmotionDataset(other, data.classes, data.pixels)
    found = [adapt_statistics(network, d, SMALL_SPEC, 32).state_dict() for d in (data, mixed)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- a few labels -------------------------------------------------------------------------------


def test_draws_are_balanced_nested_and_repeatable():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [20, 9, 30]))
    drawn = draw_shots(labels, 9, seed=3)
    for k in (1, 4, 9):
        shots = draw_shots(labels, k, seed=3)
        np.testing.assert_array_equal(shots, drawn[:, :k])  # of fewer images, none but these
        assert len(np.unique(shots)) == 3 * k
        assert np.bincount(labels[shots.ravel()]).tolist() == [k, k, k]
        assert (labels[shots] == [[0], [1], [2]]).all()
    assert not np.array_equal(drawn, draw_shots(labels, 9, seed=4))
    assert usable_shots([20, 5, 9, 5, 10], labels) == [5, 9]


@pytest.mark.parametrize("k", [1, 4])
def test_the_probe_is_that_of_scikit_learn(k):
    rng = np.random.default_rng(k)
    labels = np.arange(30) % 3
    centres = rng.normal(size=(3, 40))
    features, test = (
        (centres[labels] + rng.normal(size=(30, 40))).astype(np.float32) for _ in range(2)
    )
    shots = draw_shots(labels, k, seed=0)
    found = probe_shots(features, labels, shots, test, "accuracy")
    chosen = shots.ravel()

    def pipeline(strength):
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))

    known = features[chosen], labels[chosen]
    strengths = [USUAL_STRENGTH] if k == 1 else STRENGTHS
    differences = [
        np.abs(pipeline(c).fit(*known).predict_proba(test) - found).max() for c in strengths
    ]
    assert min(differences) < 1e-3
    assert accuracy_score(labels, found.argmax(1)) > 0.6


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def feelings(tiny_root, tmp_path):
    """Two more sets of the same pictures: some of Mikels' emotions, and valences."""
    names = {"calm": "contentment", "joy": "awe", "rage": "fear"}
    valence = {"calm": "neutral", "joy": "positive", "rage": "negative"}
    return relabel(tiny_root, names, tmp_path / "feelings"), relabel(
        tiny_root, valence, tmp_path / "valences"
    )


def expected_answers(folder, root, merge):
    """True and predicted class of every test image that counts, from the files, one by one."""
    exported, test = load_export(folder, network_of), load_splits(root).splits["test"]
    classes, truth, answers = load_splits(root).classes, [], []
    for i in range(len(test)):
        label = merge.get(classes[test.labels[i]])
        if label is not None:
            (p,) = predict_files(exported, [test.path(i)])
            shares = {}
            for name, share in zip(exported.classes, p, strict=True):
                if name in merge:
                    shares[merge[name]] = shares.get(merge[name], 0) + share
            truth.append(label)
            answers.append(max(shares, key=shares.get))
    return truth, answers


def test_the_matrix_is_what_scikit_learn_says_of_the_files(tmp_path, tiny_root, feelings, capsys):
    models = [
        make_export(tmp_path / "mikels" / "export", ("fear", "awe", "contentment", "anger"), 1),
        make_export(tmp_path / "three" / "export", VALENCES, 2),
    ]
    assert run(tmp_path, models, feelings, "--shots") == 0
    found, same = results(tmp_path), {name: name for name in ("fear", "awe", "contentment")}
    poles = {"fear": "negative", "anger": "negative", "negative": "negative"}
    poles |= dict.fromkeys(("awe", "contentment", "positive"), "positive")
    own = {name: name for name in VALENCES}
    cases = {
        ("mikels", "feelings"): (models[0], "name", same),
        ("mikels", "valences"): (models[0], "polarity", poles),
        ("three", "feelings"): (models[1], "polarity", poles),
        ("three", "valences"): (models[1], "name", own),
    }
    rows = {
        (r["source"], r["target"]): r for r in found["matrix"] if r["adaptation"] == "unadapted"
    }
    assert rows.keys() == cases.keys()
    for pair, (model, how, merge) in cases.items():
        row = rows[pair]
        truth, answers = expected_answers(model, tmp_path / pair[1], merge)
        assert (row["classes_by"], row["images"]) == (how, len(truth))
        assert row["accuracy"]["value"] == pytest.approx(accuracy_score(truth, answers))
        macro = f1_score(truth, answers, average="macro", labels=row["classes"], zero_division=0)
        assert row["macro_f1"]["value"] == pytest.approx(macro)
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    assert rows["mikels", "valences"]["images"] == 8  # without the neutral ones
    table = pd.read_csv(next((tmp_path / "outputs").glob("*/matrix.csv")))
    assert len(table) == 8 and table["adaptation"].unique().tolist() == ["unadapted", "AdaBN"]
    assert found["curves"] == []
    assert "do not share" not in capsys.readouterr().out


def test_adabn_answers_with_statistics_of_the_training_images(tmp_path, tiny_root):
    model = make_export(tmp_path / "one", ("rage", "calm", "joy"), 3, head="progressive")
    assert run(tmp_path, [model], [tiny_root], "--shots") == 0
    rows = {row["adaptation"]: row for row in results(tmp_path)["matrix"]}
    exported = load_export(model, network_of)
    datasets = transfer.open_datasets(
        load_splits(tiny_root), exported.resize, cache_dir=None, threads=1
    )[1]
    adapted = adapt_statistics(exported.model, datasets["train"], exported.spec, 32)
    other = dataclasses.replace(exported, model=adapted)
    test = load_splits(tiny_root).splits["test"]
    p = predict_files(other, [test.path(i) for i in range(len(test))])
    names = [exported.classes[i] for i in p.argmax(1)]
    truth = [datasets["test"].classes[i] for i in test.labels]
    assert rows["AdaBN"]["accuracy"]["value"] == pytest.approx(accuracy_score(truth, names))
    difference = rows["AdaBN"]["accuracy"]["value"] - rows["unadapted"]["accuracy"]["value"]
    assert rows["AdaBN"]["gain"]["value"] == pytest.approx(difference)


def test_curves_are_paired_and_repeatable(tmp_path, tiny_root, capsys):
    model = make_export(tmp_path / "one", ("rage", "calm", "joy"), 3)
    asked = "--shots", "1", "4", "9", "--seeds", "2"
    assert run(tmp_path, [model], [tiny_root], *asked) == 0
    found = results(tmp_path)
    assert "tiny: a class has 8 training images; more cannot be drawn" in capsys.readouterr().out
    value = {(row["what"], row["k"]): row["accuracy"]["value"] for row in found["curves"]}
    assert {k for _, k in value} == {1, 4}
    unadapted = found["matrix"][0]["accuracy"]["value"]
    for k in (1, 4):
        own, other = value["source features", k], value["ImageNet features", k]
        assert value["source features less ImageNet features", k] == pytest.approx(own - other)
        assert value["source features less unadapted", k] == pytest.approx(own - unadapted)
    assert {(row["seeds"], row["images"]) for row in found["curves"]} == {(2, 12)}
    folder = next((tmp_path / "outputs").glob("transfer-*"))
    assert {f.name for f in (folder / "figures").iterdir()} == {"matrix.png", "curves.png"}
    shutil.rmtree(tmp_path / "outputs")
    assert run(tmp_path, [model], [tiny_root], *asked) == 0
    assert results(tmp_path) == found


def test_sets_without_a_shared_class_have_curves_and_a_line_that_helps(tmp_path, tiny_root, capsys):
    model = make_export(tmp_path / "clothes", ("dress", "hat"), 3)
    assert run(tmp_path, [model], [tiny_root], "--shots") == 1
    said = capsys.readouterr()
    assert "clothes and tiny do not share two classes (clothes has dress, hat; tiny has calm" in (
        said.out
    )
    assert "--map dress=calm,..." in said.out and "--shots is empty" in said.err
    assert not (tmp_path / "outputs").exists()

    assert run(tmp_path, [model], [tiny_root], "--shots", "2", "--seeds", "2") == 0
    found = results(tmp_path)
    assert found["matrix"] == []
    assert {row["what"] for row in found["curves"]} == {
        "source features", "ImageNet features", "source features less ImageNet features",
    }  # fmt: skip
    assert not list((tmp_path / "outputs").glob("*/figures/matrix.png"))

    shutil.rmtree(tmp_path / "outputs")
    by_hand = "--map", "dress=calm,hat=joy", "hat=rage"
    assert run(tmp_path, [model], [tiny_root], "--shots", *by_hand) == 0
    row = results(tmp_path)["matrix"][0]
    assert (row["classes_by"], row["images"], row["classes"]) == ("hand", 12, ["calm", "hat"])


def test_a_set_without_a_picture_to_judge_by_is_named(tmp_path, tiny_root, capsys):
    model = make_export(tmp_path / "clothes", ("dress", "hat", "fork"), 3)
    table = pd.read_csv(tiny_root / "test.csv")
    table[table["label"] == "rage"].to_csv(tiny_root / "test.csv", index=False)
    assert run(tmp_path, [model], [tiny_root], "--map", "dress=calm,hat=joy") == 1
    assert "test.csv has no image of calm, joy, which is what clothes" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_sets_of_one_name_are_told_apart(tmp_path, tiny_root):
    model = make_export(tmp_path / "one", ("rage", "calm", "joy"))
    other = shutil.copytree(tiny_root, tmp_path / "other" / "tiny")
    assert run(tmp_path, [model], [tiny_root, other], "--shots") == 0
    assert {row["target"] for row in results(tmp_path)["matrix"]} == {str(tiny_root), str(other)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": ["nowhere"]}, "nowhere: give the folder of an export"),
        ({"--data": ["nowhere"]}, "nowhere lacks train.csv"),
        ({"--map": ["joy=luck"]}, "--map joy=luck: no class 'luck'; one has rage, calm, joy; the"),
        ({"--shots": ["0"]}, "--shots and --seeds: give 1 or more"),
        ({"--set": ["EPOCHS=3"]}, "EPOCHS changes nothing here; --set can change RUN_NAME"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, tiny_root, capsys, monkeypatch, change, said):
    model = make_export(tmp_path / "one", ("rage", "calm", "joy"))
    monkeypatch.chdir(tmp_path)
    asked = {"--model": [str(model)], "--data": [str(tiny_root)], **change}
    assert program.main(["transfer", *(t for o, v in asked.items() for t in (o, *v))]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert {path.name for path in Path.cwd().iterdir()} == {"tiny", "one"}
