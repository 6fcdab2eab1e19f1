"""All settings of a run in one frozen object, which every function that needs it is passed."""

# %% [markdown]
# Every choice of a run is a field of `EnhancedConfig`. It is *frozen*: nothing changes it once
# training has begun, so what is recorded is what really ran. Functions get it as an argument and
# never read it as a global, which is why each can be tried by itself. What is *neutral* cannot
# change what is learnt: a run that was stopped may go on with another value of it.

# %%
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emotion_toolbox.settings import check_fit, check_values, make_settings, neutral, setting

DATASETS = ("auto", "files", "sample")  # auto: the files where there are any
MONITORS, HEADS = ("macro_f1", "accuracy", "loss"), ("progressive", "linear", "multilevel")
COMPARED = ("majority", "linear_probe", "from_scratch", "plain_finetune")


# %%
@dataclass(frozen=True)
class EnhancedConfig:
    # What to train on
    DATASET: str = neutral("auto", "your files in DATA_ROOT, or the sample", choices=DATASETS)
    DATA_ROOT: str = neutral("data/processed/EmoSet_splits", "folder of the three CSV files")
    IMAGES_ROOT: str | None = neutral(None, "where their paths start; None: at DATA_ROOT")
    ALLOW_DUPLICATES: bool = neutral(False, "go on where splits share an image")
    NEAR_DUPLICATE_BITS: int | None = neutral(4, "of 64 may differ; None: no audit", low=0, high=32)
    MAX_BAD_FRACTION: float = neutral(0.01, "share of unusable images to go on with", low=0, high=1)
    FIT: str = setting("crop", "for images that are not square", choices=("crop", "pad", "squash"))
    BALANCE: str = setting("weights", "helps rare classes", choices=("weights", "sampler", "none"))
    # What to train, and for how long
    MODEL_NAME: str = setting("resnet50", "the pretrained network: torchvision's, or timm:NAME")
    WEIGHTS: str | None = setting("DEFAULT", "a torchvision name, a file, or None: random numbers")
    IMG_SIZE: int = setting(224, "side of what the network sees, in pixels", low=32, high=1024)
    TRAIN_SIZE: int | None = setting(None, "side in training; None: the same", low=32, high=1024)
    BATCH_SIZE: int = setting(32, "images in a training step", low=2, high=65536)
    EPOCHS: int = setting(40, "passes over the training images", low=1, high=10000)
    SEED: int = setting(42, "all that is random follows from it", low=0, high=2**32 - 1)
    RUN_NAME: str = neutral("auto", "folder; auto: data, network and a hash", plain_name=True)
    OUTPUT_ROOT: str = neutral("outputs", "where the folders of runs are")
    INIT_FROM: str | None = setting(None, "export or best-*.pt of a run, to begin with its weights")
    # Optimisation and regularisation
    START: str = setting("random", "what the new head begins as", choices=("random", "probe"))
    LR_BACKBONE: float = setting(3e-5, "learning rate of the pretrained layers", low=0, high=10)
    LR_HEAD: float = setting(3e-3, "learning rate of the new head", low=1e-12, high=10)
    MIN_LR: float = setting(1e-6, "where each cycle of the learning rates ends", low=0, high=1)
    WEIGHT_DECAY: float = setting(1e-4, "how strongly weights are drawn to zero", low=0, high=10)
    WARMUP_EPOCHS: int = setting(3, "epochs in which the head trains alone", low=0, high=10000)
    THAW_EPOCHS: tuple[int, int] | None = setting(None, "last stages, then all", low=0, high=10000)
    RESTARTS: bool = setting(True, "each thaw begins the cosine of the rates anew")
    GRAD_CLIP: float = setting(1.0, "largest norm of the gradients", low=1e-6, high=10**6)
    ACCUMULATE: int = setting(1, "parts of a batch, in turn; saves memory", low=1, high=1024)
    PATIENCE: int = setting(8, "epochs without a better one before it stops", low=1, high=10000)
    MONITOR: str = setting("macro_f1", "what chooses the best epoch", choices=MONITORS)
    DROPOUT: float = setting(0.4, "share of the head's inputs set to zero", low=0, high=0.95)
    LABEL_SMOOTHING: float = setting(0.1, "share of a target spread over all", low=0, high=0.9)
    MIXUP_ALPHA: float = setting(0.2, "how evenly MixUp blends; 0: never", low=0, high=100)
    CUTMIX_ALPHA: float = setting(1.0, "how evenly CutMix cuts; 0: never", low=0, high=100)
    MIX_PROB: float = setting(0.5, "share of images that are mixed", low=0, high=1)
    MIX_OFF_EPOCHS: int = setting(3, "last epochs, without mixing", low=0, high=10000)
    EMA_DECAY: float = setting(0.999, "of the weights' average; 0: none", low=0, high=0.999999)
    BACKBONE_BATCHNORM: str = setting("frozen", "running statistics", choices=("frozen", "train"))
    HEAD: str = setting("progressive", "layers on the backbone", choices=HEADS)
    CROP_SCALE: tuple[float, float] = setting((0.6, 1.0), "least, most area kept", low=0.01, high=1)
    FLIP_PROB: float = setting(0.5, "share of images that are mirrored", low=0, high=1)
    ROTATION: float = setting(10.0, "most degrees to either side", low=0, high=180)
    BRIGHTNESS: float = setting(0.2, "largest change, as a share", low=0, high=1)
    CONTRAST: float = setting(0.2, "largest change, as a share", low=0, high=1)
    SATURATION: float = setting(0.2, "largest change, as a share", low=0, high=1)
    HUE: float = setting(0.02, "largest turn of the colour circle", low=0, high=0.5)
    BLUR_PROB: float = setting(0.1, "share of images that are blurred", low=0, high=1)
    ERASE_PROB: float = setting(0.25, "share of images that lose a rectangle", low=0, high=1)
    # Speed, and never losing a run
    DEVICE: str = setting("auto", "auto, cuda, cuda:1, mps or cpu")
    AMP: str = setting("auto", "precision of arithmetic", choices=("auto", "bf16", "fp16", "off"))
    COMPILE: bool = setting(False, "torch.compile: slow to start, faster on a GPU")
    DETERMINISTIC: bool = setting(False, "the same bits again on a GPU, more slowly")
    CACHE: bool = neutral(True, "decode each image only once, into a file")
    CACHE_DIR: str = neutral("cache", "where the decoded images are")
    CACHE_SIZE: int | None = setting(None, "side in pixels; None: 8/7 IMG_SIZE", low=32, high=2048)
    NUM_WORKERS: int | None = neutral(None, "threads to decode; None: one a core", low=0, high=1024)
    CHECKPOINT_EVERY: float = neutral(600.0, "seconds between two checkpoints", low=0, high=10**9)
    CHECKPOINT_STEPS: int | None = neutral(None, "steps between two, if sooner", low=1, high=10**9)
    CHECKPOINT_KEEP: int = neutral(2, "how many of them are kept", low=1, high=1000)
    ON_SAVE_ERROR: str = neutral("stop", "where a disk is full", choices=("stop", "continue"))
    MAX_BAD_STEPS: int = neutral(10, "steps not finite, in a row, that end it", low=1, high=100_000)
    # Evaluation
    TTA: bool = neutral(True, "answer for an image and its mirror image, averaged")
    BASELINES: tuple[str, ...] = neutral(COMPARED, "what ours is compared with", choices=COMPARED)
    BOOTSTRAP: int = neutral(2000, "resamples behind each interval", low=100, high=10**6)
    DEBUG: bool = setting(False, "two batches of everything, with anomaly detection")

    def __post_init__(self) -> None:
        check_values(self)
        check_fit(self.BATCH_SIZE, self.ACCUMULATE, self.IMG_SIZE, self.TRAIN_SIZE, self.CACHE_SIZE)


# %% [markdown]
# A wrong value must stop a run before it costs a night, so all are checked (`check_values??`).
# Some values follow from others: the side of the images that are kept, a little larger than the
# network sees, and the epochs at which frozen layers begin to train.


# %%
def cache_size(cfg: EnhancedConfig) -> int:
    """Side of the squares that are kept: 8/7 of what the network sees, as 256 is of 224."""
    return cfg.CACHE_SIZE or round(cfg.IMG_SIZE * 8 / 7)


def train_size(cfg: EnhancedConfig) -> int:
    """Side of what the network sees in training; smaller than IMG_SIZE it is faster."""
    return cfg.TRAIN_SIZE or cfg.IMG_SIZE


def thaw_epochs(cfg: EnhancedConfig) -> tuple[int, int]:
    """Epochs (counted from 0) at which the last stages, then all layers, start to train."""
    if cfg.THAW_EPOCHS is not None:
        return cfg.THAW_EPOCHS
    first = cfg.WARMUP_EPOCHS
    return first, first + max(0 if first == 0 else 1, round(cfg.EPOCHS / 4) - first)


# %% [markdown]
# `make_config` takes the defaults, then a profile, then what you ask for, which always wins; a
# misspelt name is answered with the nearest right ones. The sample has a quick profile. Small sets
# have one too: where a few hundred pictures are all there is, training begins as the linear probe,
# a head of a single layer on several stages; all of the network moves from the first epoch on,
# slowly; nothing is mixed or smoothed; and it sees pictures a little smaller than it is judged on,
# for what is cropped at random looks larger
# ([Touvron et al. 2019](https://arxiv.org/abs/1906.06423)).

# %%
QUICK_PROFILE = {"EPOCHS": 8, "WARMUP_EPOCHS": 2, "MIX_OFF_EPOCHS": 2, "IMG_SIZE": 96,
                 "LR_BACKBONE": 3e-4}  # fmt: skip
SMALL_SET = 2000  # training images; the defaults are for EmoSet, which has 94,000
SMALL_PROFILE = {"EPOCHS": 12, "START": "probe", "HEAD": "multilevel", "LR_BACKBONE": 2e-4,
                 "WARMUP_EPOCHS": 0, "THAW_EPOCHS": (0, 0), "MIX_PROB": 0.0,
                 "LABEL_SMOOTHING": 0.0}  # fmt: skip


def profile_for(images: int, size: int, *, synthetic: bool) -> dict[str, Any]:
    """What the defaults become for a set with so many training images, evaluated at `size`."""
    small = {**SMALL_PROFILE, "TRAIN_SIZE": max(32, round(size * 7 / 8))}
    return QUICK_PROFILE if synthetic else small if images < SMALL_SET else {}


def make_config(overrides: Any = None, profile: Mapping[str, Any] | None = None) -> EnhancedConfig:
    """The settings of a run; raises ``ConfigError`` for an unknown name or impossible value."""
    base = dict(profile or {})
    if isinstance(overrides, Mapping) and "DATA_ROOT" in overrides:
        base["DATASET"] = "files"  # a folder asked for is used, even where it is the default
    return make_settings(EnhancedConfig, overrides, base)
