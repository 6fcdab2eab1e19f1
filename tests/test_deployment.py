"""Exports elsewhere: the programs of docs/deployment.md by themselves, and torch.export."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_export import SIDE, make_export

from benchmarks import deploy
from emotion_toolbox import backbones
from emotion_toolbox.decoding import decode_image
from emotion_toolbox.export import FITTED, predict_squares
from emotion_toolbox.sample import paint_picture
from emotion_transfer import __main__ as program

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SIZE = 41  # its margin in SIDE is no whole number
HEADS = {  # each kind once
    "resnet50": {"HEAD": "linear", "TTA": False},
    "efficientnet_b0": {"HEAD": "progressive"},
    "efficientnet_lite0": {"HEAD": "progressive", "START": "probe"},
}
ALONE = """
import json, os, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # an import of it fails
for folder, source in json.loads(sys.argv[2]).items():
    os.chdir(folder)
    exec(compile(source, folder, "exec"), {"__name__": "__main__"})
"""
OURS = ("emotion_transfer", "emotion_toolbox")


def block(*words):
    """The one program of the page with all of these words."""
    (found,) = (text for text in BLOCKS if all(word in text for word in words))
    return found


def run_alone(programs, *, without=OURS):
    """What programs print, by folder they run in, in a process that cannot import `without`."""
    asked = {str(folder): source for folder, source in programs.items()}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(without), json.dumps(asked)],
        cwd=Path(next(iter(asked))), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


def predicted(folder, capsys):
    """The probabilities that `predict` gives for the folder's picture."""
    asked = ["predict", "--json", "--model", str(folder), str(folder / "picture.png")]
    assert program.main(asked) == 0
    return dict(json.loads(capsys.readouterr().out)["top"])


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By name of the backbone, an export; a drawn picture lies beside each."""
    top = tmp_path_factory.mktemp("exports")
    made = {
        name: make_export(top / name, name, IMG_SIZE=SIZE, **settings)
        for name, settings in HEADS.items()
    }
    for name in made:
        paint_picture("awe", (3, 4), 160).save(top / name / "picture.png")
    return top, made


def test_a_network_of_each_source_is_deployed():
    assert HEADS.keys() <= backbones.BACKBONES.keys()
    assert {name in backbones.LITES for name in HEADS} == {True, False}


def test_the_weights_load_with_torchvision_and_timm_alone(exports, capsys):
    top, _ = exports
    makers = {
        "resnet50": block("torchvision.models.resnet50()"),
        "efficientnet_b0": block("torchvision.models.efficientnet_b0()"),
        "efficientnet_lite0": block("timm.create_model"),
    }
    rest = block("load_state_dict") + block("F.center_crop")
    answers = run_alone({top / name: maker + rest for name, maker in makers.items()})
    assert len(answers) == len(makers)
    for name, answer in zip(makers, answers, strict=True):
        expected = predicted(top / name, capsys)
        assert max(expected.values()) - min(expected.values()) > 0.02
        assert answer == pytest.approx(expected, abs=1e-4), name


def test_what_torch_export_saves_loads_without_the_networks_library(exports, tmp_path, capsys):
    top, _ = exports
    folder = shutil.copytree(top / "efficientnet_lite0", tmp_path / "export")
    whole = block("timm.create_model") + block("load_state_dict") + block("F.center_crop")
    run_alone({folder: whole + block("torch.export.save") + "torch.save(views, 'views.pt')"})
    loading = (
        "import torch\nviews = torch.load('views.pt')\n"
        "network = torch.export.load('model.pt2').module()\n"
        "print([network(some).softmax(1).tolist() for some in (views, views[:1])])"
    )
    ((both, first),) = run_alone({folder: loading}, without=(*OURS, "timm", "torchvision"))
    about = json.loads((folder / "config.json").read_text())
    shares = torch.tensor(both).mean(0) ** (1 / about["temperature"])
    answer = dict(zip(about["classes"], (shares / shares.sum()).tolist(), strict=True))
    assert answer == pytest.approx(predicted(folder, capsys), abs=1e-4)
    assert first[0] == pytest.approx(both[0], abs=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_torch_export_takes_any_number_of_pictures(exports, name):
    model = exports[1][name].model
    images = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    sizes = {0: torch.export.Dim("images")}
    made = torch.export.export(model, (images[:2],), dynamic_shapes=(sizes,)).module()
    for count in (1, 3, 5):
        some = images[:count]
        found, expected = made(some).softmax(1), model(some).softmax(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std(0).max() > 0.01


def test_onnx_runtime_answers_without_pytorch(exports, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    folder = exports[0] / "efficientnet_lite0"
    assert program.main(["onnx", "--model", str(folder)]) == 0
    capsys.readouterr()
    (answer,) = run_alone({folder: block("onnxruntime")}, without=(*OURS, "torch"))
    assert answer == pytest.approx(predicted(folder, capsys), abs=1e-4)


def test_the_page_says_how_pictures_are_made_square():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+)` \|$", PAGE, re.MULTILINE))
    assert rows == FITTED


def test_plain_squares_are_nearly_those_of_the_decoder(exports, tmp_path):
    """From a photograph's size, a JPEG, which the decoder lets libjpeg shrink."""
    exported = exports[1]["efficientnet_lite0"]
    paint_picture("fear", (5, 6), 600).save(tmp_path / "picture.jpg", quality=90)
    square = decode_image((tmp_path / "picture.jpg").read_bytes(), SIDE)
    inside = slice(2, 2 + SIZE)  # of a margin of 5 pixels, as torchvision rounds
    for name, plain in deploy.plain_squares(tmp_path / "picture.jpg", SIDE, SIZE).items():
        assert np.abs(square[inside, inside] - plain.astype(float)).mean() < 4, name
    found = predict_squares(exported, [square])
    changes = deploy.compare_preparations(exported, [tmp_path / "picture.jpg"], found)
    assert changes.keys() == {
        "pillow_probability_difference", "torchvision_probability_difference",
    }  # fmt: skip
    assert all(0 < value[0] < 0.2 for value in changes.values())


def test_the_figures_of_the_page_are_the_committed_ones():
    file = ROOT / "benchmarks" / "results" / "deploy.json"
    tables = deploy.figures_tables(json.loads(file.read_text(encoding="utf-8")))
    assert len(tables) == 2 and all(table in PAGE for table in tables)
