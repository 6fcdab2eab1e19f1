"""The ONNX file: the answers of `predict` from any number of pictures, alone, and in int8."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image, ImageOps
from small_export import CLASSES, SIDE, make_export

from benchmarks import deploy
from emotion_toolbox.errors import ConfigError, ExportError
from emotion_toolbox.export import predict_squares
from emotion_toolbox.sample import paint_picture
from emotion_toolbox.tables import MIKELS_CLASSES
from emotion_transfer import __main__ as program
from emotion_transfer.commands import onnx as command

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def drawn(count, seed=0):
    """Pictures as the sample has them."""
    names = [MIKELS_CLASSES[i % 8] for i in range(count)]
    pictures = [paint_picture(name, (seed, i), SIDE) for i, name in enumerate(names)]
    return np.stack([ImageOps.fit(picture, (SIDE, SIDE)) for picture in pictures])


def squares(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "tta"), [("resnet50", True), ("efficientnet_b0", True), ("efficientnet_lite0", False)]
)
def test_probabilities_are_those_of_pytorch(tmp_path, name, tta):
    exported = make_export(tmp_path / "export", name, TTA=tta)
    file = command.export_onnx(exported, tmp_path / "model.onnx")
    for count in (1, 2, 5):
        pictures = squares(count, seed=count)
        expected = predict_squares(exported, list(pictures))
        np.testing.assert_allclose(command.run_onnx(file, pictures), expected, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 0.1  # not one answer for all, which would prove little


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    exported = make_export(folder / "export", WEIGHTS="DEFAULT", HEAD="multilevel")
    return exported, command.export_onnx(exported, folder / "model.onnx")


def test_the_file_answers_alone_as_predict_does(written, tmp_path, capsys):
    """In a process that cannot import the packages, from a picture on the disk."""
    exported, file = written
    (tmp_path / "alone").mkdir()
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(
        picture
    )
    code = f"""
        import json, sys
        sys.modules["emotion_transfer"] = sys.modules["emotion_toolbox"] = None
        import numpy as np, onnxruntime as ort
        from PIL import Image, ImageOps
        session = ort.InferenceSession({str(file)!r}, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        assert about["fit"] == "crop"
        image = ImageOps.exif_transpose(Image.open({str(picture)!r})).convert("RGB")
        square = ImageOps.fit(image, (int(about["side"]),) * 2, Image.BICUBIC)
        answer = session.run(None, {{"pictures": np.asarray(square)[None]}})[0][0]
        print(json.dumps(dict(zip(json.loads(about["classes"]), answer.tolist()))))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path / "alone", check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    alone = json.loads(found.stdout)
    asked = ["predict", "--model", str(file.parent / "export"), "--json", str(picture)]
    assert program.main(asked) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert len(top) == len(CLASSES)
    assert dict(top) == pytest.approx(alone, abs=1e-3)


def test_int8_is_smaller_and_answers_alike(written, tmp_path):
    exported, file = written
    small = command.quantize(file, drawn(32), tmp_path / "small.onnx")
    assert small.stat().st_size < 0.6 * file.stat().st_size
    pictures = drawn(16, seed=9)
    answers = command.run_onnx(small, pictures)
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)
    full = predict_squares(exported, list(pictures))
    assert np.abs(answers - full).mean() < 0.1


def test_the_command_writes_beside_the_export(written, tiny_root, capsys):
    exported, file = written
    folder = file.parent / "export"
    asked = ["onnx", "--model", str(folder), "--int8", str(tiny_root)]
    assert program.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(folder / "model.onnx"), str(folder / "model.int8.onnx")]


def test_a_missing_package_is_named(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = r'^onnxscript is not installed; pip install -e "\.\[onnx\]"$'
    with pytest.raises(ConfigError, match=said):
        command.export_onnx(written[0], tmp_path / "model.onnx")


def test_other_answers_are_not_written(written, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "predict_squares", lambda exported, squares: 0.5)
    (tmp_path / "model.onnx").write_bytes(b"an earlier one")
    with pytest.raises(ExportError, match="otherwise than PyTorch"):
        command.export_onnx(written[0], tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"an earlier one"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--model", "nowhere"], "--model nowhere: give the folder of an export"),
        (["--int8", "nowhere"], "nowhere lacks train.csv"),
    ],
)
def test_the_command_names_what_is_wrong(written, asked, said, capsys):
    folder = [] if "--model" in asked else ["--model", str(written[1].parent / "export")]
    assert program.main(["onnx", *folder, *asked]) == 1
    assert said in capsys.readouterr().err


def test_deployment_is_measured(written, tiny_root, tmp_path):
    out = tmp_path / "deploy.json"
    asked = ["--model", str(written[1].parent / "export"), "--data", str(tiny_root)]
    assert deploy.main([*asked, "--repeats", "2", "--seconds", "0.01", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    summary, times = result["summary"], result["seconds_an_image"]
    assert summary["onnx_max_probability_difference"]["value"] < 1e-3
    ratios = np.divide(times["1"]["int8"], times["1"]["torch"])
    assert summary["int8_latency_vs_torch"]["value"] == pytest.approx(np.median(ratios))
    accuracy = result["accuracy"]
    difference = summary["int8_accuracy_difference"]
    assert difference["value"] == pytest.approx(accuracy["int8"] - accuracy["torch"])
    assert difference["low"] <= difference["value"] <= difference["high"]
