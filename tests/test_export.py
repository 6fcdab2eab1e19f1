"""Exports: the same answers from the files, and nothing trusted before it is checked."""

import ast
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from small_run import CLASSES, file_datasets, install_small_network, small_config

from emotion_toolbox import export
from emotion_toolbox.errors import ConfigError, ExportError, ImageError
from emotion_toolbox.export import predict_files, top_classes
from emotion_toolbox.keeper import load_initial_weights
from emotion_toolbox.measures import calibrate
from emotion_toolbox.probes import predict
from emotion_toolbox.tables import MIKELS_CLASSES
from emotion_transfer.commands.predict import network_of
from emotion_transfer.config import cache_size, make_config
from emotion_transfer.model import build_model

FACTS = {
    "synthetic": False, "dataset": "my photographs", "weights": "DEFAULT", "epochs": 3,
    "temperature": 0.4,
    "metrics": {"test": {"accuracy": {"value": 0.81234, "low": 0.7, "high": 0.9}}},
}  # fmt: skip


def export_model(folder, cfg, model, classes, facts) -> Path:
    settings = dataclasses.asdict(cfg)
    return export.export_model(folder, model, classes, settings, cache_size(cfg), facts)


def load_export(folder, device="cpu"):
    return export.load_export(folder, network_of, device)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


def trained(cfg, classes: int = 3):
    """A model whose every tensor differs from a new one's."""
    model = build_model(cfg, classes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture
def exported(tmp_path):
    cfg = small_config(tmp_path, CACHE_SIZE=36)
    return export_model(tmp_path / "export", cfg, trained(cfg), CLASSES, FACTS)


@pytest.mark.parametrize(
    ("name", "fit"),
    [("small", "crop"), ("small", "pad"), ("small", "squash"), ("efficientnet_lite0", "crop")],
)
def test_the_files_give_the_same_probabilities(tiny_root, tmp_path, name, fit):
    """Against the evaluation that made the reported figures, with their temperature."""
    cfg = small_config(tmp_path, MODEL_NAME=name, FIT=fit, INIT_FROM="some-best.pt")
    model, dataset = trained(cfg), file_datasets(cfg)["test"]
    asked = {"size": cfg.IMG_SIZE, "batch_size": cfg.BATCH_SIZE, "tta": cfg.TTA}
    expected = calibrate(predict(model, dataset, **asked), FACTS["temperature"]).probabilities
    folder = export_model(tmp_path / "export", cfg, model, CLASSES, FACTS)
    loaded = load_export(folder)
    assert loaded.classes == CLASSES and not loaded.model.training
    found = predict_files(loaded, [dataset.split.path(i) for i in range(len(dataset))])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ours = model.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in loaded.model.state_dict().items())
    assert (loaded.image_size, loaded.resize) == (cfg.IMG_SIZE, cache_size(cfg))
    assert loaded.fit == fit


def test_what_travels_with_the_weights(exported):
    about = json.loads((exported / "config.json").read_text())
    assert about["classes"] == list(CLASSES) and about["model"] == "small"
    assert (about["image_size"], about["resize"], about["fit"]) == (32, 36, "crop")
    assert about["mean"] == [0.5, 0.4, 0.6] and about["std"] == [0.2, 0.3, 0.25]
    assert about["temperature"] == 0.4
    assert about["metrics"] == FACTS["metrics"] and about["synthetic"] is False
    assert {p.name for p in exported.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    tensors = load_file(exported / "model.safetensors")
    assert not any("_orig_mod" in name or name.startswith("module.") for name in tensors)
    text = (exported / "model.safetensors").read_bytes()
    assert b"/" not in text[: int.from_bytes(text[:8], "little")]  # no path of this machine
    assert str(exported.parent) not in (exported / "config.json").read_text()


def test_the_model_card(tmp_path, exported):
    card = (exported / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "pytorch" and "small" in header["tags"]
    assert "| accuracy | 0.812 | 0.700 to 0.900 |" in card
    assert "0. `calm`\n1. `joy`\n2. `rage`\n" in card and "synthetic" not in card
    assert "on `my photographs` for 3 epochs at 32 pixels, from ImageNet weights (DEFAULT)." in card
    cfg = small_config(tmp_path)
    facts = {**FACTS, "synthetic": True, "dataset": "synthetic sample"}
    folder = export_model(tmp_path / "sample", cfg, trained(cfg), CLASSES, facts)
    assert "synthetic sample" in (folder / "README.md").read_text().lower()


ODD = ("a_b_c", "<b>x", "$x$", "*s*", "`t`", "[l](u)", "a, b", "``", "x`y", "`", "c\\d", "&lt;",
       "1. e", "👨\u200d👩\u200d👧", "نمی\u200cدانم")  # fmt: skip


def test_names_stay_as_they_are(tmp_path):
    """In the card, by a renderer of Markdown, and when they are read back."""
    cfg, facts = small_config(tmp_path), {**FACTS, "dataset": "my_*data*", "weights": "w_`1`_.pth"}
    folder = export_model(tmp_path / "export", cfg, trained(cfg, len(ODD)), ODD, facts)
    card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    blocks = [token for token in MarkdownIt().parse(card) if token.type == "inline"]
    texts = ["".join(part.content for part in block.children) for block in blocks]
    kinds = {part.type for block in blocks for part in block.children}
    assert tuple(texts[2 : 2 + len(ODD) + 1])[1:] == ODD
    assert texts[0] == "small for the classes of my_*data*"
    assert texts[1].startswith("Trained on my_*data* for 3 epochs")
    assert texts[1].endswith("from the weights in w_`1`_.pth.")
    assert kinds <= {"text", "code_inline", "softbreak"}
    assert load_export(folder).classes == ODD


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\ud800", " ", ""])
def test_a_name_that_cannot_be_read_back_is_not_written(tmp_path, name):
    cfg = small_config(tmp_path)
    with pytest.raises(ExportError, match="control characters"):
        export_model(tmp_path / "export", cfg, trained(cfg), ("calm", name, "rage"), FACTS)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("none", "random weights"),
        ("IMAGENET1K_V2", "ImageNet weights (IMAGENET1K_V2)"),
        ("/home/me/secret/w.pth", "the weights in `w.pth`"),
    ],
)
def test_where_the_weights_came_from_and_no_path(tmp_path, weights, said):
    cfg = small_config(tmp_path, INIT_FROM="/home/me/secret/best-1.pt")
    facts = {**FACTS, "weights": weights}
    settings = {**dataclasses.asdict(cfg), "WEIGHTS": weights}
    folder = export.export_model(tmp_path / "export", trained(cfg), CLASSES, settings, 36, facts)
    assert f", from {said}.\n" in (folder / "README.md").read_text()
    written = (folder / "README.md").read_text() + (folder / "config.json").read_text()
    assert "secret" not in written and str(tmp_path) not in written


def test_the_card_speaks_of_emotion_only_where_the_classes_are_emotions(tmp_path, exported):
    assert "emotion" not in (exported / "README.md").read_text().lower().replace(
        "python -m emotion_transfer", ""
    )
    cfg = small_config(tmp_path)
    folder = export_model(tmp_path / "eight", cfg, trained(cfg, 8), MIKELS_CLASSES, FACTS)
    assert "for the emotion an image evokes" in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "fit", "head"),
    [("efficientnet_b0", None, "crop", "progressive"), ("resnet50", None, "crop", "multilevel"),
     ("efficientnet_lite0", "DEFAULT", "crop", "multilevel")]
    + [("efficientnet_lite0", "DEFAULT", fit, "progressive") for fit in ("crop", "pad", "squash")],
)  # fmt: skip
def test_the_weights_load_without_this_project(tmp_path, name, weights, fit, head):
    """By the lines in the model card, in a process that cannot import it, without a warning."""
    settings = {"MODEL_NAME": name, "IMG_SIZE": 64, "FIT": fit, "WEIGHTS": weights, "HEAD": head}
    cfg = make_config(settings)
    folder = export_model(tmp_path / "export", cfg, build_model(cfg, 3), CLASSES, FACTS)
    picture = Image.linear_gradient("L").rotate(45).convert("RGB").resize((160, 60))
    exif = picture.getexif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side
    picture.save(folder / "picture.jpg", exif=exif)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < (28 if head == "progressive" else 36) and "emotion_" not in code
    assert (
        "BatchNorm1d(640)," in code or head != "progressive"
    )  # what it is printed with is not what every torch takes
    block = "import sys\nsys.modules.update(emotion_transfer=None, emotion_toolbox=None)\n"
    strict = [f"-Werror::{kind}Warning:__main__" for kind in ("Deprecation", "Future", "User")]
    command = [sys.executable, *strict, "-c", block + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = list(ast.literal_eval(done.stdout).values())
    loaded = load_export(folder)
    expected = predict_files(loaded, [folder / "picture.jpg"])[0]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    for other in {"crop", "pad", "squash"} - {fit} if weights else ():  # the test can tell them
        answer = dataclasses.replace(loaded, fit=other)
        wrong = predict_files(answer, [folder / "picture.jpg"])[0]
        assert np.abs(wrong - found).max() > 5e-3


def test_an_export_is_written_over_an_older_one(tmp_path, exported):
    cfg = small_config(tmp_path)
    export_model(exported, cfg, trained(cfg, 2), ("a", "b"), FACTS)
    assert load_export(exported).classes == ("a", "b")
    assert not list(exported.glob(".*"))


def test_a_new_run_can_start_from_an_export(tmp_path, exported):
    cfg = small_config(tmp_path, INIT_FROM=str(exported))
    model = build_model(cfg, 3)
    load_initial_weights(model, cfg.INIT_FROM, CLASSES, tmp_path / "new")
    expected = trained(small_config(tmp_path)).state_dict()
    assert all(torch.equal(expected[k], v) for k, v in model.state_dict().items())


def test_top_classes():
    p = np.array([0.2, 0.5, 0.1, 0.2])
    assert top_classes(p, "abcd", 3) == [("b", 0.5), ("a", 0.2), ("d", 0.2)]  # ties in order
    assert len(top_classes(p, "abcd", 9)) == 4


# --- damaged and hostile exports -----------------------------------------------------------------


class Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_planted_code_is_not_run(exported, tmp_path):
    mark, file = tmp_path / "mark", exported / "model.safetensors"
    file.write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(ExportError, match="no usable export"):
        load_export(exported)
    torch.save({"weights": Planted(mark)}, file)
    with pytest.raises(ExportError, match="no usable export"):
        load_export(exported)
    assert not mark.exists()


def change_tensors(exported: Path, change) -> None:
    tensors = load_file(exported / "model.safetensors")
    change(tensors)
    save_file(tensors, exported / "model.safetensors")


TENSORS = {
    "a missing one": lambda t: t.pop("head.output.bias"),
    "one too many": lambda t: t.update(extra=torch.zeros(1)),
    "another shape": lambda t: t.update({"head.output.bias": torch.zeros(4)}),
    "another name": lambda t: t.update({"module.x": t.pop("head.output.bias")}),
    "nothing": lambda t: t.clear(),
    "NaN": lambda t: t["head.output.bias"].fill_(float("nan")),
    "a negative variance": lambda t: t["backbone.bn1.running_var"].fill_(-1),
    "infinity": lambda t: t["backbone.bn1.running_var"].fill_(float("inf")),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(exported, what):
    change_tensors(exported, TENSORS[what])
    with pytest.raises(ExportError, match=re.escape(str(exported))) as caught:
        load_export(exported)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("place", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_of_weights(exported, place):
    file = exported / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(place * len(content))])
    with pytest.raises(ExportError, match="export"):
        load_export(exported)


def test_a_header_that_claims_too_much(exported):
    file = exported / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ExportError, match="export"):
        load_export(exported)


ABOUT = {
    "no classes": {"classes": None},
    "two alike": {"classes": ["calm", "calm", "joy"]},
    "one": {"classes": ["calm"]},
    "too few": {"classes": ["calm", "joy"]},
    "too many": {"classes": ["a", "b", "c", "d"]},
    "far too many": {"classes": [str(i) for i in range(3_000_000)]},
    "numbers": {"classes": [1, 2, 3]},
    "a blank": {"classes": ["calm", " ", "rage"]},
    "a control sequence": {"classes": ["calm", "\x1b[2J", "rage"]},
    "half a character": {"classes": ["calm", "\ud800", "rage"]},
    "lists": {"classes": [["calm"], ["joy"], ["rage"]]},
    "a text": {"classes": "abc"},
    "an object": {"classes": {"a": 0, "b": 1, "c": 2}},
    "no settings": {"config": None},
    "a list of settings": {"config": [1, 2]},
    "an unknown setting": {"config": {"LEARN": True}},
    "an unknown model": {"config": {"MODEL_NAME": "../../etc/passwd"}},
    "an odd size": {"config": {"MODEL_NAME": "small", "IMG_SIZE": 1e400}},
    "another resize": {"resize": 10**9},
    "an unknown fit": {"fit": "stretch"},
    "a list of fits": {"fit": ["crop"]},
    "no fit": {"fit": None},
    "a nested setting": {"config": {"MODEL_NAME": [["small"]]}},
    "another model": {"config": {"MODEL_NAME": "efficientnet_lite0"}},
    "no temperature": {"temperature": 0},
    "a temperature below zero": {"temperature": -1.5},
    "a temperature out of range": {"temperature": 1e300},
    "an infinite temperature": {"temperature": float("inf")},
    "a temperature that is no number": {"temperature": float("nan")},
    "a text for a temperature": {"temperature": "1.5"},
    "true for a temperature": {"temperature": True},
    "null for a temperature": {"temperature": None},
}


@pytest.mark.parametrize("what", ABOUT)
def test_a_description_that_does_not_fit(exported, what):
    file = exported / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **ABOUT[what]}))
    with pytest.raises(ExportError, match=re.escape(str(exported))):
        load_export(exported)


def test_an_older_export_says_nothing_of_a_fit_and_means_crop(exported):
    file = exported / "config.json"
    about = json.loads(file.read_text())
    del about["fit"], about["config"]["FIT"]
    about["config"]["AUDIT"] = True  # a setting of that time
    file.write_text(json.dumps(about))
    assert load_export(exported).fit == "crop"


def test_an_export_from_before_there_was_a_temperature(exported, tmp_path):
    """It answers with the softmax of what the network gives."""
    file = exported / "config.json"
    about = json.loads(file.read_text())
    Image.linear_gradient("L").save(tmp_path / "picture.png")
    divided = predict_files(load_export(exported), [tmp_path / "picture.png"])
    del about["temperature"]
    file.write_text(json.dumps(about))
    plain = predict_files(load_export(exported), [tmp_path / "picture.png"])
    powers = plain ** (1 / 0.4)
    np.testing.assert_allclose(divided, powers / powers.sum(), rtol=1e-9)


def test_a_wrong_temperature_is_named(exported):
    file = exported / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0}))
    with pytest.raises(ExportError, match="temperature in config.json must be from 0.1 to 10"):
        load_export(exported)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' * 100_000]
)
def test_a_description_that_is_none(exported, text):
    (exported / "config.json").write_bytes(text)
    with pytest.raises(ExportError, match="no usable export"):
        load_export(exported)


def test_a_folder_that_is_no_export(tmp_path, exported):
    for folder in (tmp_path / "absent", tmp_path, exported / "README.md"):
        with pytest.raises(ExportError, match="no usable export"):
            load_export(folder)
    for name in ("config.json", "model.safetensors"):
        content = (exported / name).read_bytes()
        (exported / name).unlink()
        with pytest.raises(ExportError, match=re.escape(name)):
            load_export(exported)
        (exported / name).write_bytes(content)
    assert load_export(exported).classes == CLASSES


def test_a_device_that_is_not_there(exported):
    with pytest.raises(ConfigError, match="DEVICE='cuda:77'"):
        load_export(exported, "cuda:77")


def test_an_image_that_is_none(exported, tmp_path):
    with pytest.raises(ImageError, match="missing"):
        predict_files(load_export(exported), [tmp_path / "absent.jpg"])
