"""The one frozen configuration every other module is passed."""

# %% [markdown]
# #### One frozen configuration
#
# Every choice of a run is a field of `EnhancedConfig`. It is *frozen*: nothing changes it once
# training has begun, so what `summary.json` records is what really ran. Functions receive it as
# an argument and never read it as a global, which is why each can be tested on its own.

# %%
import ast
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting that does not exist or cannot work; the message lists what would."""


# %% [markdown]
# The fields come in groups. The first two are the ones you will change most: *what to train on* and
# *what to train*.


# %%
@dataclass(frozen=True)
class TaskConfig:
    """The settings that say what is learnt from what, and for how long."""

    # What to train on
    DATASET: str = "auto"  # "auto", "files" (the CSVs under DATA_ROOT) or "sample"
    DATA_ROOT: str = "data/processed/EmoSet_splits"
    IMAGES_ROOT: str | None = None  # None: the same folder as DATA_ROOT
    ALLOW_DUPLICATES: bool = False  # one identical image in two splits: error or warning
    AUDIT: bool = True  # look for near duplicates and other oddities
    NEAR_DUPLICATE_BITS: int = 4  # of 64; how far the hashes of look-alikes may differ
    MAX_BAD_FRACTION: float = 0.01  # the run stops if more images than this are unusable
    BALANCE: str = "weights"  # "weights", "sampler" or "none"

    # What to train, and for how long
    MODEL_NAME: str = "resnet50"
    WEIGHTS: str | None = "DEFAULT"  # a torchvision weights name, a local file, or None
    IMG_SIZE: int = 224
    BATCH_SIZE: int = 32
    EPOCHS: int = 40
    SEED: int = 42
    RUN_NAME: str = "auto"  # "auto": data set, model and a hash of the settings
    OUTPUT_ROOT: str = "outputs"
    INIT_FROM: str | None = None  # a checkpoint or export to start a new run from


# %% [markdown]
# The other groups say *how* it is learnt. Their defaults are those of the recipe that this notebook
# explains; each is met again in its section.


# %%
@dataclass(frozen=True)
class EnhancedConfig(TaskConfig):
    """All settings of one run; immutable, validated, and round-trips through JSON."""

    # Optimisation
    LR_BACKBONE: float = 3e-5
    LR_HEAD: float = 3e-3
    MIN_LR: float = 1e-6  # where every cycle of the learning rates ends
    WEIGHT_DECAY: float = 1e-4
    WARMUP_EPOCHS: int = 3  # epochs in which the head trains alone
    THAW_EPOCHS: tuple[int, int] | None = None  # None: (WARMUP_EPOCHS, a quarter of EPOCHS)
    GRAD_CLIP: float = 1.0  # largest norm of the gradients
    ACCUMULATE: int = 1  # split a batch into this many smaller steps
    PATIENCE: int = 8  # epochs without a better MONITOR, counted once everything trains
    MONITOR: str = "macro_f1"  # or "accuracy", "loss"; chooses the best epoch

    # Regularisation
    DROPOUT: float = 0.4
    LABEL_SMOOTHING: float = 0.1
    MIXUP_ALPHA: float = 0.2
    CUTMIX_ALPHA: float = 1.0
    MIX_PROB: float = 0.5  # share of the images that are mixed at all
    MIX_OFF_EPOCHS: int = 3  # no mixing in the last epochs
    EMA_DECAY: float = 0.999  # 0: no weight averaging
    BACKBONE_BATCHNORM: str = "frozen"  # or "train"
    HEAD: str = "progressive"  # or "linear"

    # Augmentation
    CROP_SCALE: tuple[float, float] = (0.6, 1.0)  # share of the area a crop keeps
    FLIP_PROB: float = 0.5
    ROTATION: float = 10.0  # degrees, drawn from -ROTATION to ROTATION
    BRIGHTNESS: float = 0.2
    CONTRAST: float = 0.2
    SATURATION: float = 0.2
    HUE: float = 0.02  # share of the colour circle
    BLUR_PROB: float = 0.1
    ERASE_PROB: float = 0.25

    # Speed
    DEVICE: str = "auto"  # or "cuda", "cuda:1", "mps", "cpu"
    AMP: str = "auto"  # "auto", "bf16", "fp16" or "off"
    COMPILE: bool = False  # torch.compile: slow to start, faster on a GPU
    DETERMINISTIC: bool = False
    CACHE: bool = True
    CACHE_DIR: str = "cache"
    CACHE_SIZE: int | None = None  # None: 8/7 of IMG_SIZE
    NUM_WORKERS: int | None = None  # decoding threads; None: one a core
    LOG_EVERY: int = 20  # optimisation steps between two readings of the device

    # Never lose a run
    CHECKPOINT_EVERY: float = 600.0  # seconds between checkpoints inside an epoch
    CHECKPOINT_STEPS: int | None = None  # steps between them, if that comes sooner
    CHECKPOINT_KEEP: int = 2
    ON_SAVE_ERROR: str = "stop"  # or "continue": train on without the checkpoint
    MAX_BAD_STEPS: int = 10  # non-finite steps in a row before the run stops

    # Evaluation
    BASELINES: tuple[str, ...] = ("majority", "linear_probe", "plain_finetune")
    BOOTSTRAP: int = 2000
    DEBUG: bool = False  # two batches of everything, with anomaly detection

    def __post_init__(self) -> None:
        validate_config(self)


# %% [markdown]
# A wrong value must stop the run *before* it costs a night. The rules are data, not code: which
# values a field may take, or which range it must lie in. Anything else is refused with the list
# of what is allowed.

# %%
MODELS = ("resnet50", "efficientnet_b0", "efficientnet_lite0")
BASELINE_NAMES = ("majority", "linear_probe", "plain_finetune")
MONITORS = ("macro_f1", "accuracy", "loss")

CHOICES: dict[str, tuple[str, ...]] = {
    "DATASET": ("auto", "files", "sample"),
    "BALANCE": ("weights", "sampler", "none"),
    "MODEL_NAME": MODELS,
    "MONITOR": MONITORS,
    "BACKBONE_BATCHNORM": ("frozen", "train"),
    "HEAD": ("progressive", "linear"),
    "AMP": ("auto", "bf16", "fp16", "off"),
    "ON_SAVE_ERROR": ("stop", "continue"),
}

# field -> (lowest, highest), both allowed
RANGES: dict[str, tuple[float, float]] = {
    "MAX_BAD_FRACTION": (0, 1),
    "NEAR_DUPLICATE_BITS": (0, 32),
    "IMG_SIZE": (32, 1024),
    "BATCH_SIZE": (2, 65536),
    "EPOCHS": (1, 10000),
    "SEED": (0, 2**32 - 1),
    "LR_BACKBONE": (0, 10),
    "LR_HEAD": (1e-12, 10),
    "MIN_LR": (0, 1),
    "WEIGHT_DECAY": (0, 10),
    "WARMUP_EPOCHS": (0, 10000),
    "GRAD_CLIP": (1e-6, 1e6),
    "ACCUMULATE": (1, 1024),
    "PATIENCE": (1, 10000),
    "DROPOUT": (0, 0.95),
    "LABEL_SMOOTHING": (0, 0.9),
    "MIXUP_ALPHA": (0, 100),
    "CUTMIX_ALPHA": (0, 100),
    "MIX_PROB": (0, 1),
    "MIX_OFF_EPOCHS": (0, 10000),
    "EMA_DECAY": (0, 0.999999),
    "FLIP_PROB": (0, 1),
    "ROTATION": (0, 180),
    "BRIGHTNESS": (0, 1),
    "CONTRAST": (0, 1),
    "SATURATION": (0, 1),
    "HUE": (0, 0.5),
    "BLUR_PROB": (0, 1),
    "ERASE_PROB": (0, 1),
    "CACHE_SIZE": (32, 2048),
    "NUM_WORKERS": (0, 1024),
    "LOG_EVERY": (1, 100000),
    "CHECKPOINT_EVERY": (0, 1e9),
    "CHECKPOINT_STEPS": (1, 1_000_000_000),
    "CHECKPOINT_KEEP": (1, 1000),
    "MAX_BAD_STEPS": (1, 100000),
    "BOOTSTRAP": (100, 1_000_000),
}


# %% [markdown]
# `validate_config` applies these rules and a few that tie two settings together: the parts of an
# accumulated batch must be equal, the stages must thaw in order, and the cache must hold images a
# little larger than the network sees.


# %%
def validate_config(cfg: EnhancedConfig) -> None:
    """Raise ``ConfigError`` naming every impossible field of `cfg` and what is allowed."""
    problems = [
        problem for f in dataclasses.fields(cfg) if (problem := _field_problem(cfg, f.name))
    ]
    if problems:
        raise ConfigError("impossible settings:\n  " + "\n  ".join(problems))
    if cfg.BATCH_SIZE % cfg.ACCUMULATE or cfg.BATCH_SIZE // cfg.ACCUMULATE < 2:
        raise ConfigError(
            f"ACCUMULATE={cfg.ACCUMULATE} must split BATCH_SIZE={cfg.BATCH_SIZE} into equal parts "
            "of at least 2 images (the head's BatchNorm needs two)"
        )
    if cfg.THAW_EPOCHS is not None and not 0 <= cfg.THAW_EPOCHS[0] <= cfg.THAW_EPOCHS[1]:
        raise ConfigError(
            f"THAW_EPOCHS={cfg.THAW_EPOCHS}: give the epoch at which the last stages thaw, then "
            "the one at which everything does, e.g. (3, 10)"
        )
    if not 0 < cfg.CROP_SCALE[0] <= cfg.CROP_SCALE[1] <= 1:
        raise ConfigError(
            f"CROP_SCALE={cfg.CROP_SCALE}: give (low, high) with 0 < low <= high <= 1"
        )
    if not cfg.IMG_SIZE <= cache_size(cfg) <= 1.3 * cfg.IMG_SIZE:  # evaluation cuts out IMG_SIZE
        raise ConfigError(
            f"CACHE_SIZE={cfg.CACHE_SIZE} must lie between IMG_SIZE={cfg.IMG_SIZE} and 1.3 times "
            f"that; None gives {default_cache_size(cfg.IMG_SIZE)}"
        )


# %% [markdown]
# One field at a time: is it of the right type, one of the choices, within its range?


# %%
def _field_problem(cfg: EnhancedConfig, name: str) -> str | None:
    value = getattr(cfg, name)
    expected = EnhancedConfig.__dataclass_fields__[name].type
    if not _has_type(value, expected):
        return f"{name}={value!r} should be {_type_name(expected)}"
    if name == "BASELINES":
        unknown = [b for b in value if b not in BASELINE_NAMES]
        return f"BASELINES={value!r}: choose from {', '.join(BASELINE_NAMES)}" if unknown else None
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        return f"{name}={value!r} must be {_type_name(expected)} and not blank"
    if name == "RUN_NAME" and (value in (".", "..") or set(value) & set("/\\:")):
        return f"RUN_NAME={value!r} must be a plain folder name"
    if name in CHOICES and value not in CHOICES[name]:
        return f"{name}={value!r}: choose from {', '.join(CHOICES[name])}"
    if name in RANGES and value is not None:
        low, high = RANGES[name]
        if not low <= value <= high:  # also refuses NaN
            return f"{name}={value!r} must lie between {low:g} and {high:g}"
    return None


# %% [markdown]
# The types are read from the annotations of the class, so they are written down once.


# %%
def _has_type(value: Any, expected: Any) -> bool:
    """Whether `value` fits the annotation of a config field."""
    options: tuple[Any, ...] = getattr(expected, "__args__", ())
    if getattr(expected, "__origin__", None) is tuple:
        if not isinstance(value, tuple):
            return False
        if options[-1] is Ellipsis:
            return all(_has_type(v, options[0]) for v in value)
        return len(value) == len(options) and all(map(_has_type, value, options))
    if options:  # a union such as int | None
        return any(_has_type(value, option) for option in options)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _type_name(expected: Any) -> str:
    """The annotation of a config field in words."""
    options: tuple[Any, ...] = getattr(expected, "__args__", ())
    if getattr(expected, "__origin__", None) is tuple:
        if options[-1] is Ellipsis:
            return f"a list of {_type_name(options[0]).removeprefix('a ')}s"
        return f"a list of {len(options)}, each {_type_name(options[0])}"
    if options:
        return " or ".join(map(_type_name, options))
    names = {str: "a text", int: "a whole number", float: "a number", bool: "True or False"}
    return names.get(expected, "None")


# %% [markdown]
# `make_config` is the only way a configuration is made: the defaults, then a profile (the built-in
# sample uses a quick one), then what you asked for. What you give explicitly always wins, and a
# misspelt name is answered with the nearest right ones.


# %%
def make_config(
    overrides: Mapping[str, Any] | None = None, profile: Mapping[str, Any] | None = None
) -> EnhancedConfig:
    """Build a config from the defaults, then `profile`, then `overrides`.

    Raises:
        ConfigError: for an unknown name or an impossible value.
    """
    names = [f.name for f in dataclasses.fields(EnhancedConfig)]
    values: dict[str, Any] = {}
    for name, value in {**(profile or {}), **(overrides or {})}.items():
        if name not in names:
            close = difflib.get_close_matches(str(name).upper(), names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ConfigError(f"no setting is called {name!r}; {hint}Settings: {', '.join(names)}")
        values[name] = _normalised(value, EnhancedConfig.__dataclass_fields__[name].type)
    if "DATA_ROOT" in values and "DATASET" not in values:
        values["DATASET"] = "files"  # even where it is the default: a folder asked for is used
    return EnhancedConfig(**values)


def _normalised(value: Any, expected: Any) -> Any:
    """Lists as tuples, and 10 as 10.0 where a float is due, so that equal settings hash equally."""
    if isinstance(value, list | tuple):
        kind = getattr(expected, "__args__", (None,))[0]
        return tuple(_normalised(v, kind) for v in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if expected is float and whole and abs(value) < 2**53 else value


# %% [markdown]
# Some values follow from others. They are functions of the configuration, so there is one place
# where each is decided.


# %%
def default_cache_size(img_size: int) -> int:
    """8/7 of the image size, the resize-to-crop ratio of ImageNet evaluation (256 for 224)."""
    return round(img_size * 8 / 7)


def cache_size(cfg: EnhancedConfig) -> int:
    """Side in pixels of the squares kept in the image cache."""
    return cfg.CACHE_SIZE or default_cache_size(cfg.IMG_SIZE)


def thaw_epochs(cfg: EnhancedConfig) -> tuple[int, int]:
    """Epochs (counted from 0) at which the last stages, then all layers, start to train."""
    if cfg.THAW_EPOCHS is not None:
        return cfg.THAW_EPOCHS
    first = cfg.WARMUP_EPOCHS
    return first, first + max(0 if first == 0 else 1, round(cfg.EPOCHS / 4) - first)


# %% [markdown]
# Settings come in two kinds: those that shape what is learnt, and those that only say where files
# are, how often something is reported, or what is too bad to go on with. The first kind gives a run
# its identity, a hash. Where the data lie is of the second kind: what they are is compared image by
# image, so a data set may be moved in the middle of a run.


# %%
# Fields that cannot change what is learnt, so a run may be resumed with other values.
NEUTRAL_FIELDS = frozenset(
    {
        "DATASET", "DATA_ROOT", "IMAGES_ROOT", "ALLOW_DUPLICATES", "MAX_BAD_FRACTION",
        "AUDIT", "NEAR_DUPLICATE_BITS", "RUN_NAME", "OUTPUT_ROOT", "CACHE", "CACHE_DIR",
        "NUM_WORKERS", "LOG_EVERY", "BASELINES", "BOOTSTRAP", "CHECKPOINT_EVERY",
        "CHECKPOINT_STEPS", "CHECKPOINT_KEEP", "ON_SAVE_ERROR", "MAX_BAD_STEPS",
    }
)  # fmt: skip


def config_to_json(cfg: EnhancedConfig) -> str:
    """The configuration as indented JSON with one field a line."""
    return json.dumps(dataclasses.asdict(cfg), indent=2)


def config_from_json(text: str) -> EnhancedConfig:
    """The inverse of ``config_to_json``; raises ``ConfigError`` where a name or value is off."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the settings are not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError('the settings are not a JSON object {"NAME": value, ...}')
    return make_config(values)


def config_hash(cfg: EnhancedConfig) -> str:
    """Eight hex digits that change whenever a setting that shapes the result does."""
    shaping = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NEUTRAL_FIELDS}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]


# %% [markdown]
# Relative paths start at the project's folder, whether Jupyter runs in it or in `notebooks/`. A
# notebook opened alone, in Colab or from a mail, uses the folder it runs in.


# %%
def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: here) with this project, else `start`."""
    here = (start or Path.cwd()).resolve()
    marker = "create_enhanced_notebook.py"
    return next((folder for folder in (here, *here.parents) if (folder / marker).is_file()), here)


def resolve_path(path: str) -> Path:
    """`path` with ``~`` expanded; a relative one starts at ``project_root()``.

    Raises:
        ConfigError: for the home of a user that there is not.
    """
    try:
        return project_root() / Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path!r}: {error}; give the whole path") from error


def parse_setting(text: str) -> tuple[str, Any]:
    """Split ``NAME=VALUE``; the value is read as Python or JSON where the setting is not text.

    Raises:
        ConfigError: if there is no ``=``.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE, such as EPOCHS=10")
    literal = {"true": "True", "false": "False", "null": "None"}.get(value, value)
    try:
        parsed = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value  # plain text, or refused by ``make_config`` with what is allowed
    field = EnhancedConfig.__dataclass_fields__.get(name)
    textual = field is not None and _has_type("", field.type)
    # RUN_NAME=2026 is a name, not a number
    return name, parsed if not textual or parsed is None or isinstance(parsed, str) else value
