"""The page: what it answers to good, bad and hostile files, and how it starts, refuses and ends."""

import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from emotion_toolbox.errors import DataError
from emotion_toolbox.export import export_model, load_export, predict_files
from emotion_toolbox.sample import paint_picture
from emotion_toolbox.tables import MIKELS_CLASSES
from emotion_transfer import __main__ as program
from emotion_transfer.commands import app
from emotion_transfer.commands.predict import network_of
from emotion_transfer.config import make_config
from emotion_transfer.model import build_model

ROOT = Path(__file__).parents[1]
SIZE, SIDE = 64, 73
FACTS = {
    "synthetic": True, "dataset": "synthetic sample", "weights": "none", "epochs": 1,
    "temperature": 1.5, "metrics": {"test": {}},
}  # fmt: skip
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="the extra app (Gradio) is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export whose answers depend on the picture: the head adds up some channels."""
    cfg = make_config({"MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": SIZE, "HEAD": "linear"})
    model = build_model(cfg, len(MIKELS_CLASSES))
    torch.nn.init.normal_(model.head["output"].weight, std=0.3)
    target = tmp_path_factory.mktemp("run") / "export"
    return export_model(target, model, MIKELS_CLASSES, dataclasses.asdict(cfg), SIDE, FACTS)


@pytest.fixture(scope="module")
def exported(folder):
    return load_export(folder, network_of)


@pytest.fixture
def image(tmp_path):
    paint_picture("fear", (1, 2), 200).save(tmp_path / "trees & co.png")
    return tmp_path / "trees & co.png"


def given(path):
    """What the page hands over of an uploaded file."""
    return {"path": str(path), "orig_name": path.name}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# --- Answers -------------------------------------------------------------------------------------


def test_the_answer_is_that_of_predict_under_a_map_of_it(exported, image):
    found = app.answer(exported, given(image))
    expected = predict_files(exported, [image])[0]
    assert list(found.ranked) == [MIKELS_CLASSES[i] for i in np.argsort(-expected)]
    assert list(found.ranked.values()) == pytest.approx(sorted(expected, reverse=True))
    assert np.ptp(expected) > 0.05
    assert found.overlay.dtype == np.uint8 and found.message == app.BEGIN
    side = 7 * SIZE  # a multiple of what the network sees, from SHOWN_SIDE on
    assert found.overlay.shape == (side, side, 3)
    assert next(iter(found.ranked)) in found.caption and "2 x 2 cells" in found.caption


def test_the_map_lies_on_what_the_network_sees(exported, image, monkeypatch):
    """Where nothing is hot, the picture is there: enlarged, cropped as the network's input is."""
    monkeypatch.setattr(app, "grad_cam", lambda *asked: np.zeros((1, 2, 2), np.float32))
    overlay = app.answer(exported, given(image)).overlay
    with Image.open(image) as picture:
        pixel, margin = min(picture.size) / SIDE, 4  # of 9 pixels, as torchvision rounds
        left, top = ((side - SIDE * pixel) / 2 + margin * pixel for side in picture.size)
        box = (left, top, left + SIZE * pixel, top + SIZE * pixel)
        expected = picture.resize(overlay.shape[:2], Image.Resampling.BICUBIC, box=box)
    assert np.abs(overlay.astype(float) - np.asarray(expected)).mean() < 1


def test_the_orientation_is_that_of_the_decoder(exported, image, tmp_path):
    with Image.open(image) as picture:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # shown turned by a quarter, clockwise
        picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright, turned = (app.answer(exported, given(p)) for p in (image, tmp_path / "turned.png"))
    assert turned.ranked == pytest.approx(upright.ranked, abs=0.1)
    apart = np.abs(turned.overlay.astype(float) - upright.overlay).mean()
    assert apart < 3 < np.abs(turned.overlay.astype(float) - np.rot90(upright.overlay)).mean()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("<i>.jpg", b"no picture", "<b>&lt;i&gt;.jpg cannot be used:</b> not an image"),
        ("empty.png", b"", "zero bytes"),
        ("cut.png", None, "truncated"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(exported, image, tmp_path, name, content, said):
    bad = tmp_path / name
    bad.write_bytes(image.read_bytes()[:200] if content is None else content)
    found = app.answer(exported, given(bad))
    assert said in found.message and found[1:] == (None, None, "")


def test_too_many_pixels_are_refused(exported, tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    found = app.answer(exported, given(tmp_path / "large.png"))
    assert "10000x10000 pixels; the limit is 89,478,485" in found.message
    assert found.ranked is None


def test_nothing_given_nothing_shown(exported):
    assert app.answer(exported, None) == (app.BEGIN, None, None, "")


def test_what_must_be_known_of_the_answers(exported):
    title, warning, notes = app.texts(exported)
    assert "emotion" in title and "synthetic sample" in warning and "not people" in notes
    title, warning, notes = app.texts(
        dataclasses.replace(exported, classes=("cat", "dog"), synthetic=False)
    )
    assert "emotion" not in title and warning == "" and "people" not in notes


# --- Examples ------------------------------------------------------------------------------------


def test_examples_are_drawn_for_the_sample_only(exported, tmp_path):
    drawn = app.example_files(exported, None, tmp_path / "drawn")
    assert [file.stem for file in drawn] == list(MIKELS_CLASSES)
    assert all(min(Image.open(file).size) > 300 for file in drawn)
    own = dataclasses.replace(exported, synthetic=False)
    assert app.example_files(own, None, tmp_path / "none") == []


def test_examples_of_a_folder_are_spread_over_it(exported, image, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for number in range(2 * app.EXAMPLES):
        shutil.copy(image, source / "deep" / f"{number:02d}.png")
    shutil.copy(image, source / "a.png")
    (source / "notes.txt").write_text("no picture")
    found = app.example_files(exported, source, tmp_path / "copies")
    names = ["a.png", *(f"{number:02d}.png" for number in range(1, 2 * app.EXAMPLES - 2, 2))]
    assert [file.name for file in found] == names
    assert all(file.is_relative_to(tmp_path / "copies") and file.is_file() for file in found)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images there"):
        app.example_files(exported, tmp_path / "empty", tmp_path / "copies")


# --- The command ---------------------------------------------------------------------------------


def test_a_missing_extra_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert program.main(["app", "--model", "nowhere"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said == 'error: gradio is not installed; pip install -e ".[app]"\n'


def test_a_port_in_use_is_one_line_with_the_remedy(folder, monkeypatch, capsys):
    monkeypatch.setattr(app, "need_gradio", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert program.main(["app", "--model", str(folder), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert f"127.0.0.1, port {port}: Address already in use" in said and "--port NUMBER" in said


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_wrong_usage(port, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["app", "--port", port])
    assert stopped.value.code == 2 and "--port" in capsys.readouterr().err


def test_a_missing_export_is_named(monkeypatch, capsys):
    monkeypatch.setattr(app, "need_gradio", lambda: None)
    asked = ["app", "--model", "nowhere", "--port", str(free_port())]
    assert program.main(asked) == 1
    assert "--model nowhere: give the folder of an export" in capsys.readouterr().err


@needs_gradio
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_it_starts_serves_and_ends_quietly(folder, tmp_path):
    """As a program: the address, a page without an address of others, Ctrl-C, no litter."""
    port, scratch = free_port(), tmp_path / "scratch"
    scratch.mkdir()
    asked = ["app", "--model", str(folder), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    environment |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # dead
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    running = subprocess.Popen(
        [sys.executable, "-m", "emotion_transfer", *asked], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert running.stdout.readline() == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        page = direct.open(f"http://127.0.0.1:{port}/").read().decode()
        assert "Which emotion does this picture evoke?" in page
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
        assert list(scratch.glob("emotion-transfer-*/examples/awe.png"))
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    finally:
        running.kill()
    assert (running.returncode, out, err) == (0, "", "")
    assert not list(scratch.glob("emotion-transfer-*"))


# --- In a browser --------------------------------------------------------------------------------


def find_chromium():
    """Chromium's program; the test is skipped where it or its driver is absent."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium; on Debian or Ubuntu: apt-get install chromium")
    return found


@needs_gradio
def test_in_a_browser(exported, image, tmp_path, monkeypatch):
    """Upload, answer, bad file, file over the limit; nothing is asked of another machine."""
    chromium = find_chromium()
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    monkeypatch.setattr(app, "MAX_UPLOAD", 2**20)
    (tmp_path / "notes.jpg").write_text("no picture")
    (tmp_path / "huge.png").write_bytes(image.read_bytes() + bytes(2**20))
    top = next(iter(app.answer(exported, given(image)).ranked))
    asked = []
    with app.served(exported, None, "127.0.0.1", free_port()) as address, \
            driver.sync_playwright() as play:  # fmt: skip
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        chosen = page.locator("input[type=file]").first

        chosen.set_input_files(image)
        driver.expect(page.get_by_test_id("label-output-value")).to_have_text(top)
        driver.expect(page.get_by_text("Bright is what argued for")).to_be_visible()

        chosen.set_input_files(tmp_path / "notes.jpg")
        alert = page.get_by_role("alert")
        driver.expect(alert).to_contain_text("notes.jpg cannot be used: not an image")
        driver.expect(page.get_by_test_id("label-output-value")).to_have_count(0)

        chosen.set_input_files(tmp_path / "huge.png")
        driver.expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible()

        page.locator("button.gallery-item").first.click()
        driver.expect(page.get_by_test_id("label-output-value")).to_be_visible()
        driver.expect(alert).to_have_count(0)
        browser.close()
    others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and others == []
