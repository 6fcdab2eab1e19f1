"""The command line that predicts: good images, hostile files, no traceback."""

import csv
import dataclasses
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from emotion_toolbox.export import export_model, load_export, predict_files
from emotion_transfer import __main__ as program
from emotion_transfer.commands import predict as module
from emotion_transfer.config import cache_size, make_config
from emotion_transfer.model import build_model

FACTS = {
    "synthetic": True, "dataset": "synthetic sample", "weights": "none", "epochs": 1,
    "temperature": 1.5, "metrics": {"test": {}},
}  # fmt: skip
ROOT = Path(__file__).parents[1]
NAMES = ("calm", "joy", "rage")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    cfg = make_config({"MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": 32, "HEAD": "linear"})
    folder = tmp_path_factory.mktemp("run") / "export"
    model, settings = build_model(cfg, 3), dataclasses.asdict(cfg)
    return export_model(folder, model, NAMES, settings, cache_size(cfg), FACTS)


def main(arguments: list[str]) -> int:
    """As ``python -m emotion_transfer predict``, without a limit of memory for all the tests."""
    return program.main(["predict", *arguments])


@pytest.fixture(autouse=True)
def no_limit(monkeypatch):
    monkeypatch.setattr(module, "limit_memory", lambda more: None)


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.jpg")
    return tmp_path / "good.jpg"


def give_list(monkeypatch, data: bytes) -> None:
    """Put `data` on standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def asked_for(out: str) -> list[str]:
    """The paths that were answered."""
    return [line.rpartition(": ")[0] for line in out.splitlines()]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and ends."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def bomb(path: Path) -> None:
    """225 million pixels in some kilobytes."""
    Image.new("1", (15000, 15000)).save(path, optimize=True)


def test_an_image_and_its_classes(export, image, capsys):
    assert main(["--model", str(export), str(image)]) == 0
    said = capsys.readouterr()
    expected = predict_files(load_export(export, module.network_of), [image])[0]
    order = np.argsort(-expected)
    shown = ", ".join(f"{NAMES[i]} {expected[i]:.1%}" for i in order)
    assert said.out == f"{image}: {shown}\n" and said.err == ""


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_the_fit_of_the_training_is_that_of_the_answers(export, image, tmp_path, capsys, fit):
    folder = shutil.copytree(export, tmp_path / "export")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "fit": fit}))
    assert main(["--model", str(folder), "--json", str(image)]) == 0
    found = dict(json.loads(capsys.readouterr().out)["top"])
    side = about["resize"]
    with Image.open(image) as picture:
        square = ImageOps.pad(picture, (side, side), color=(124, 116, 104))
        squashed = picture.resize((side, side))
    (squashed if fit == "squash" else square).save(tmp_path / "square.png")
    expected = predict_files(load_export(export, module.network_of), [tmp_path / "square.png"])[0]
    assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=5e-4)
    cropped = predict_files(load_export(export, module.network_of), [image])[0]
    assert np.abs(cropped - expected).max() > 1e-3


def test_json_for_programs(export, image, capsys):
    assert main(["--model", str(export), "--json", "--top", "2", str(image), str(image)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0]["image"] == str(image)
    assert len(lines[0]["top"]) == 2 and {name for name, _ in lines[0]["top"]} <= set(NAMES)


@pytest.mark.parametrize("size", [(50_000, 2), (3, 50_000), (1, 1)])
def test_a_strip_is_an_image(export, tmp_path, capsys, size):
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    assert main(["--model", str(export), str(tmp_path / "strip.png")]) == 0
    assert "strip.png: " in capsys.readouterr().out


def hostile_files(folder: Path, good: bytes) -> dict[Path, str]:
    """Files that are no usable image, and a word that must be said of each."""
    contents = {
        "empty.jpg": (b"", "zero bytes"),
        "cut.jpg": (good[: len(good) // 2], "truncated"),
        "text.png": (b"<svg onload='alert(1)'/>", "image"),
        "huge.png": (png_header(200_000, 200_000), "truncated"),
        "header.png": (png_header(10, 10), ""),
        "archive.jpg": (b"PK\x03\x04" + bytes(500), "image"),
    }
    wrong = {}
    for name, (content, word) in contents.items():
        (folder / name).write_bytes(content)
        wrong[folder / name] = word
    bomb(folder / "bomb.png")
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    wrong |= {
        folder / "bomb.png": "pixels",
        folder / "folder.jpg": "not a regular file",
        folder / "absent.jpg": "missing",
        folder / "loop.jpg": "",
        Path("/dev/zero"): "not a regular file",
    }
    if hasattr(os, "mkfifo"):  # opening one would wait for ever
        os.mkfifo(folder / "pipe.jpg")
        wrong[folder / "pipe.jpg"] = "not a regular file"
    return wrong


def test_hostile_files_are_named_and_the_good_ones_answered(export, image, tmp_path, capsys):
    wrong = hostile_files(tmp_path, image.read_bytes())
    arguments = [str(image), *map(str, wrong), str(image)]
    assert main(["--model", str(export), *arguments]) == 1
    said = capsys.readouterr()
    assert said.out.count("good.jpg: ") == 2 and len(said.out.splitlines()) == 2
    wrong = {path: word for path, word in wrong.items() if not path.is_dir()}  # looked through
    errors = {line.partition(": ")[0]: line.partition(": ")[2] for line in said.err.splitlines()}
    assert errors.keys() == {str(path) for path in wrong}
    for path, word in wrong.items():
        assert word.lower() in errors[str(path)].lower() and errors[str(path)], path


def test_folders_wildcards_and_lists(export, image, tmp_path, capsys, monkeypatch):
    below = tmp_path / "deep" / "er"
    below.mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", ".hidden.jpg", "notes.txt"):
        shutil.copy(image, below / name)
    (below / "@eaDir").mkdir()
    shutil.copy(image, below / "@eaDir" / "thumb.jpg")
    found = [below / "a.PNG", below / "b.jpg"]
    model = ["--model", str(export)]
    give_list(monkeypatch, f"{found[0]}\n\n{found[1]}\n".encode())
    for asked in ([str(tmp_path / "deep")], [str(below / "[ab].*")], ["-"]):
        assert main([*model, *asked]) == 0
        assert asked_for(capsys.readouterr().out) == [str(path) for path in found]


def test_what_lies_beside_the_images_is_left_out_and_counted(export, image, tmp_path, capsys):
    folder = tmp_path / "f"
    (folder / "__MACOSX").mkdir(parents=True)
    for name in ("1.jpg", "._1.jpg", "__MACOSX/3.jpg", "notes.txt", "more.txt", "a.xyz"):
        shutil.copy(image, folder / name)
    model = ["--model", str(export)]
    assert main([*model, str(folder)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("left out: ") and said.err.count("\n") == 1
    parts = said.err.removeprefix("left out: ").rstrip().split(", ")
    assert sorted(parts) == ["1 *.xyz", "2 *.txt", "2 hidden or of a system"]
    assert asked_for(said.out) == [str(folder / "1.jpg")]
    assert main([*model, f"{folder}/**/*.jpg"]) == 0
    said = capsys.readouterr()
    assert said.err == "left out: 1 hidden or of a system\n"
    assert asked_for(said.out) == [str(folder / "1.jpg")]
    assert main([*model, f"{folder}/__MACOSX/*.jpg"]) == 0  # where it was asked for
    assert asked_for(capsys.readouterr().out) == [str(folder / "__MACOSX/3.jpg")]
    assert main([*model, f"{folder}/*.gif"]) == 1
    assert f"{folder}/*.gif: missing" in capsys.readouterr().err


LISTS = {
    "BOM": "\ufeff{a}\n{b}\n",
    "quotes": "\"{a}\"\r\n'{b}'\r\n",
    "spaces": "  {a}\t\n {b}",
    "a folder": "{folder}\n",
    "NUL": "{a}\0{b}\0",
}


@pytest.mark.parametrize("form", LISTS)
def test_a_list_as_programs_write_it(export, image, tmp_path, capsys, monkeypatch, form):
    folder = tmp_path / "two"
    names = {"folder": folder, "a": folder / "a b.jpg", "b": folder / "b'.jpg"}
    folder.mkdir()
    shutil.copy(image, names["a"])
    shutil.copy(image, names["b"])
    give_list(monkeypatch, LISTS[form].format(**names).encode())
    assert main(["--model", str(export), "-"]) == 0
    assert asked_for(capsys.readouterr().out) == [str(names["a"]), str(names["b"])]


def test_a_name_is_taken_as_it_is_where_there_is_such_a_file(export, image, tmp_path, monkeypatch):
    odd = [tmp_path / name for name in ('"quoted".jpg', " spaced.jpg", "new\nline.jpg")]
    for path in odd:
        shutil.copy(image, path)
    assert module.read_list(f"{odd[0]}\n".encode()) == [str(odd[0])]
    monkeypatch.chdir(tmp_path)
    assert module.read_list(b" spaced.jpg\n") == [" spaced.jpg"]
    assert module.read_list(os.fsencode(odd[2]) + b"\0") == [str(odd[2])]
    assert module.read_list(b"") == module.read_list(b"\n \n") == []


def test_bad_images_stop_nothing_in_any_batch(export, image, tmp_path, capsys, monkeypatch):
    """Every image has the answer that it has alone, in order, and a bad one a line."""
    monkeypatch.setattr(module, "BATCH_PIXELS", 3 * 32**2)
    good = [image]
    for number in range(7):
        pixels = np.random.default_rng(number + 1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        good.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(good[-1])
    bad = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "n" * 300, "e.jpg")]
    asked = [*bad[:3], *map(str, good[:5]), bad[3], *map(str, good[5:]), bad[4]]
    assert main(["--model", str(export), "--json", "--top", "3", *asked]) == 1
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [line.partition(": ")[0] for line in said.err.splitlines()] == bad
    assert [answer["image"] for answer in answers] == list(map(str, good))
    loaded = load_export(export, module.network_of)
    for path, answer in zip(good, answers, strict=True):
        found, alone = dict(answer["top"]), predict_files(loaded, [path])[0]
        assert [found[name] for name in NAMES] == pytest.approx(alone.tolist(), abs=1e-5)


def test_a_bar_is_shown_on_a_terminal_only(export, image, capsys, monkeypatch):
    arguments = ["--model", str(export), *[str(image)] * module.BAR_FROM]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "predicting: 100%" in said.err and len(said.out.splitlines()) == module.BAR_FROM


def test_a_table_of_all_classes(export, image, tmp_path, capsys):
    table = tmp_path / "answers.csv"
    assert main(["--model", str(export), "--csv", str(table), str(image), "absent.jpg"]) == 1
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    expected = predict_files(load_export(export, module.network_of), [image])[0]
    assert [row["path"] for row in rows] == [str(image)]
    assert [float(rows[0][name]) for name in NAMES] == pytest.approx(expected.tolist())
    assert rows[0]["predicted"] == NAMES[expected.argmax()]
    assert "1 images, 1 unusable" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_refused_first(export, image, tmp_path, capsys):
    (tmp_path / "pipe").mkdir()
    for table in (tmp_path / "absent/x.csv", image / "x.csv", tmp_path / "pipe"):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(export), "--csv", str(table), str(image)])
        said = capsys.readouterr()
        assert stopped.value.code == 2 and f"{table} cannot be written" in said.err
    assert not (tmp_path / "absent").exists()


def test_a_run_that_fails_leaves_the_table_as_it_was(export, image, tmp_path, monkeypatch):
    table, link = tmp_path / "answers.csv", tmp_path / "link.csv"
    arguments = ["--model", str(export), "--csv", str(link), str(image)]
    link.symlink_to(table)
    with monkeypatch.context() as patch:
        patch.setattr(module, "top_classes", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
        assert not table.exists()
        table.write_text("old")
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert table.read_text() == "old" and {p.suffix for p in tmp_path.iterdir()} == {".csv", ".jpg"}
    assert main(arguments) == 0
    assert link.is_symlink() and table.read_text().startswith("path,predicted,calm,joy,rage\n")


def test_the_folder_of_a_run_leads_to_its_export(export, image, capsys):
    assert main(["--model", str(export.parent), str(image)]) == 0
    assert main(["--model", str(image.parent), str(image)]) == 1
    assert "give the folder of an export" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["https", "HTTP", "file", "s3", "git+ssh"])
def test_an_address_is_refused_as_such(export, capsys, monkeypatch, start):
    address = f"{start}:///example.org//a.jpg?b=[1]"
    give_list(monkeypatch, address.encode())
    for asked in (address, "-"):
        assert main(["--model", str(export), asked]) == 1
        said = f"{address}: an address; download the picture and give the file\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "arguments", [["--device", "cuda:77"], ["--device", "toaster"], ["--model", "absent"]]
)
def test_what_is_not_there_is_one_message(export, image, capsys, arguments):
    assert main(["--model", str(export), *arguments, str(image)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert arguments[1] in said.err


@pytest.mark.parametrize("arguments", [[], ["--top", "0", "x.jpg"], ["--top", "many", "x.jpg"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_newest_export_is_the_default(export, image, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "resolve_path", lambda path: tmp_path / path)
    assert main([str(image)]) == 1
    assert "no export under" in capsys.readouterr().err
    for number, name in enumerate(("newer", "older")):
        folder = tmp_path / "outputs" / name / "export"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"")
        os.utime(folder / "model.safetensors", (1e9 - number, 1e9 - number))
    newest = tmp_path / "outputs/newer/export"
    assert module.find_export(None) == newest
    shutil.copytree(export, newest, dirs_exist_ok=True)
    assert main([str(image)]) == 0
    said = capsys.readouterr()
    assert f"newest export, {newest}, trained on the synthetic sample" in said.err
    assert said.out.startswith(f"{image}: ")


def tile_bomb(path: Path, side: int = 40_960) -> None:
    """A TIFF of 8 x 8 pixels in a tile of 6.7 GB, which compresses to some megabytes."""
    count = side * side * 4
    part = zlib.compressobj(1, wbits=-15)
    zeros = part.compress(bytes(2**24)) + part.flush(zlib.Z_FULL_FLUSH)
    adler = (count % 65521) << 16 | 1
    tile = b"\x78\x01" + zeros * (count // 2**24) + b"\x03\x00" + struct.pack(">I", adler)
    entries = [
        (256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 4, 8 + 2 + 12 * 11 + 4), (259, 3, 1, 8),
        (262, 3, 1, 2), (277, 3, 1, 4), (322, 4, 1, side), (323, 4, 1, side),
        (324, 4, 1, 8 + 2 + 12 * 11 + 4 + 8), (325, 4, 1, len(tile)), (338, 3, 1, 2),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    path.write_bytes(header + table + bytes(4) + struct.pack("<4H", 8, 8, 8, 8) + tile)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_file_that_asks_for_too_much_memory_is_refused(export, image, tmp_path):
    tile_bomb(tmp_path / "tile.tif")
    assert (tmp_path / "tile.tif").stat().st_size < 40e6
    command = [sys.executable, "-m", "emotion_transfer", "predict", "--model", str(export)]
    files = [str(tmp_path / "tile.tif"), str(image)]
    done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{files[0]}: " in done.stderr and done.stdout.startswith(f"{image}: ")


@pytest.mark.slow
def test_as_a_program(export, image, tmp_path):
    """Exit status and streams of the real thing, with a name that is no text."""
    odd = os.fsencode(tmp_path) + b"/\xff\xfe odd.jpg"
    with open(odd, "wb") as file:
        file.write(image.read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    environment.pop("LC_ALL", None)
    command = [sys.executable, "-m", "emotion_transfer", "predict", "--model", str(export)]
    done = subprocess.run([*command, str(image), odd], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"good.jpg: " in done.stdout and b"\\xff\\xfe odd.jpg: " in done.stdout
    done = subprocess.run([*command, odd, "/dev/zero"], capture_output=True, env=environment)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == b"/dev/zero: not a regular file"
