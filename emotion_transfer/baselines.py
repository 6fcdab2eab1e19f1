"""Baselines trained in the same run, on the same images, and judged by the same test."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm.auto import tqdm

from emotion_transfer.augment import prepare_images
from emotion_transfer.checkpoint import write_atomically
from emotion_transfer.config import NEUTRAL_FIELDS, EnhancedConfig, resolve_path
from emotion_transfer.engine import fit
from emotion_transfer.evaluation import Predictions, predict
from emotion_transfer.loader import EmotionDataset, batch_slices, fetch_ahead, make_loader
from emotion_transfer.metrics import Estimate, PairedTest, evaluate_predictions, paired_test
from emotion_transfer.model import BACKBONES, build_model, make_backbone
from emotion_transfer.precision import choose_device, precision
from emotion_transfer.sample import MIKELS_CLASSES

# %% [markdown]
# #### Three baselines
#
# An accuracy alone says nothing. It must beat what can be had for less:
#
# * **majority**: always answer with the most frequent class; costs nothing;
# * **linear probe**: logistic regression on the features of the *untouched* backbone; costs one
#   pass over the images. A fine-tune that does not beat it has something wrong with it;
# * **plain fine-tune**: the same backbone, everything trained from the first step with one learning
#   rate, and only crops and flips for augmentation. Its rate (1e-4) is not tuned, so on a very
#   short run it may lag for that reason alone.
#
# Each is trained here, in this run. None is a number from somewhere else.


# %%
@dataclass(frozen=True)
class BaselineResult:
    """A baseline's probabilities on the test split [N, C] and what it cost."""

    name: str
    probabilities: npt.NDArray[np.float64]
    seconds: float
    note: str


def majority_baseline(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], folder: Path
) -> tuple[npt.NDArray[np.float64], str]:
    """The class frequencies of the training split as the answer to every image."""
    train, test = datasets["train"], datasets["test"]
    counts = np.bincount(train.split.labels, minlength=len(train.classes))
    answer = np.tile(counts / counts.sum(), (len(test), 1))
    return answer, f"always {train.classes[int(counts.argmax())]}"


# %% [markdown]
# The probe needs each image's features once. They are standardised, and the strength of the
# regression's regularisation is chosen on the validation split, never on the test split.


# %%
@torch.no_grad()
def extract_features(
    cfg: EnhancedConfig,
    backbone: nn.Module,
    dataset: EmotionDataset,
    positions: npt.NDArray[np.int64],
    device: torch.device,
) -> npt.NDArray[np.float32]:
    """Pooled features [N, F] of the centre crops of the images at `positions` [N]."""
    spec = BACKBONES[cfg.MODEL_NAME]
    batches = batch_slices(positions, cfg.BATCH_SIZE)
    loader = make_loader(dataset, batches, pin=device.type == "cuda")
    features = []
    label = f"features {dataset.split.name}"
    for batch in tqdm(fetch_ahead(loader, device), label, len(batches), leave=False, unit="batch"):
        images = prepare_images(batch.images, cfg.IMG_SIZE, spec.mean, spec.std)
        with precision(device, "off"):
            features.append(backbone(images).float().cpu().numpy())
    return np.concatenate(features)


# %% [markdown]
# Nine strengths of regularisation are tried, from very strong to weak.


# %%
def fit_probe(
    train: npt.NDArray[np.float32],
    train_labels: npt.NDArray[np.int64],
    val: npt.NDArray[np.float32],
    val_labels: npt.NDArray[np.int64],
) -> tuple[Pipeline, float]:
    """Standardisation and logistic regression, with the C that is best on the validation split."""
    best: tuple[float, Pipeline, float] | None = None
    for strength in np.logspace(-4, 0, 9):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        probe.fit(train, train_labels)
        score = float(probe.score(val, val_labels))
        if best is None or score > best[0]:
            best = score, probe, float(strength)
    assert best is not None
    return best[1], best[2]


# %% [markdown]
# The probe itself: features of all three splits, one regression, its probabilities for the test
# images. With `DEBUG` it sees two batches of each, taken from all over a split, because a split is
# often sorted by class and a regression needs more than one.


# %%
def probe_positions(cfg: EnhancedConfig, dataset: EmotionDataset) -> npt.NDArray[np.int64]:
    """The images the probe sees: all; with ``DEBUG`` two batches, from all over a sorted split."""
    count = len(dataset)
    if cfg.DEBUG and dataset.split.name == "test":  # the first ones, as in every evaluation
        return np.arange(min(count, 2 * cfg.BATCH_SIZE))
    shown = min(count, 2 * cfg.BATCH_SIZE) if cfg.DEBUG else count
    return np.linspace(0, count - 1, shown).round().astype(np.int64)


def linear_probe_baseline(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], folder: Path
) -> tuple[npt.NDArray[np.float64], str]:
    """Logistic regression on the frozen backbone's features."""
    device = choose_device(cfg)
    torch.manual_seed(cfg.SEED)  # for random weights, where WEIGHTS is None
    backbone = make_backbone(cfg.MODEL_NAME, cfg.WEIGHTS).to(device).eval()
    x, y = {}, {}
    for name, dataset in datasets.items():
        positions = probe_positions(cfg, dataset)
        x[name] = extract_features(cfg, backbone, dataset, positions, device)
        y[name] = dataset.split.labels[positions]
    probe, strength = fit_probe(x["train"], y["train"], x["val"], y["val"])
    answer = np.zeros((len(x["test"]), len(datasets["test"].classes)))
    answer[:, probe.classes_] = probe.predict_proba(x["test"])  # classes without images stay at 0
    return answer, f"logistic regression, C = {strength:.2g}"


# %% [markdown]
# The plain fine-tune runs through the same engine, with class weights, mixing, smoothing,
# averaging, staged thawing, frozen statistics, the head's extra layers and the colour augmentations
# off.


# %%
def plain_config(cfg: EnhancedConfig) -> EnhancedConfig:
    """The settings of the plain fine-tune that belongs to `cfg`."""
    return dataclasses.replace(
        cfg,
        HEAD="linear", LR_HEAD=1e-4, LR_BACKBONE=1e-4,
        WARMUP_EPOCHS=0, THAW_EPOCHS=(0, 0), BACKBONE_BATCHNORM="train", PATIENCE=cfg.EPOCHS,
        MIXUP_ALPHA=0.0, CUTMIX_ALPHA=0.0, MIX_PROB=0.0, LABEL_SMOOTHING=0.0, EMA_DECAY=0.0,
        DROPOUT=0.0, BALANCE="none", ROTATION=0.0, BRIGHTNESS=0.0, CONTRAST=0.0, SATURATION=0.0,
        HUE=0.0, BLUR_PROB=0.0, ERASE_PROB=0.0, INIT_FROM=None,
    )  # fmt: skip


def plain_finetune_baseline(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], folder: Path
) -> tuple[npt.NDArray[np.float64], str]:
    """The usual fine-tune: AdamW at 1e-4 for all layers, cosine, crops and flips only."""
    plain = plain_config(cfg)
    model = build_model(plain, len(datasets["train"].classes))
    result = fit(plain, model, datasets, folder / "plain_finetune" / "checkpoints")
    answer = predict(plain, model, datasets["test"], amp=result.amp, progress="testing")
    return answer.probabilities, f"best epoch {result.best_epoch} of {plain.EPOCHS}"


# %% [markdown]
# A baseline that is done is kept beside the run, and used again as long as neither the settings
# that shape it nor the images have changed.

# %%
BASELINE_MAKERS: dict[
    str,
    Callable[
        [EnhancedConfig, Mapping[str, EmotionDataset], Path], tuple[npt.NDArray[np.float64], str]
    ],
] = {
    "majority": majority_baseline,
    "linear_probe": linear_probe_baseline,
    "plain_finetune": plain_finetune_baseline,
}


def baseline_key(cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset]) -> str:
    """A hash of everything a baseline's answer depends on."""
    plain = dataclasses.asdict(plain_config(cfg))
    facts = {k: v for k, v in plain.items() if k not in NEUTRAL_FIELDS}
    facts |= {name: data.fingerprint() for name, data in datasets.items()}
    facts["classes"] = datasets["train"].classes
    if cfg.WEIGHTS is not None and (file := resolve_path(cfg.WEIGHTS)).is_file():
        facts["weights"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# %% [markdown]
# `run_baseline` reads the kept result, or trains and keeps it.


# %%
def run_baseline(
    name: str, cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], folder: Path
) -> BaselineResult:
    """Train baseline `name`, or read its result from `folder` where it is kept."""
    file, key = folder / f"{name}.npz", baseline_key(cfg, datasets)
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as kept:
                if str(kept["key"]) == key:
                    print(f"{name}: kept from before")
                    seconds = float(kept["seconds"])
                    return BaselineResult(name, kept["probabilities"], seconds, str(kept["note"]))
        except Exception as error:  # a damaged archive may raise anything
            print(f"{file} is damaged ({error}); the baseline is trained again")
    begun = time.perf_counter()
    probabilities, note = BASELINE_MAKERS[name](cfg, datasets, folder)
    seconds = time.perf_counter() - begun
    write_atomically(
        file,
        lambda target: np.savez(
            target, key=key, probabilities=probabilities, seconds=seconds, note=note
        ),
    )
    print(f"{name}: {note}, {seconds:.0f} s")
    return BaselineResult(name, probabilities, seconds, note)


# %% [markdown]
# #### The comparison
#
# Every row of the table is measured on the same test images, so the differences can be tested in
# pairs: only images on which exactly one of two models is right tell them apart.


# %%
@dataclass(frozen=True)
class Comparison:
    """Our model against its baselines: metrics of each, and a paired test against ours."""

    metrics: dict[str, dict[str, Estimate]]
    tests: dict[str, PairedTest]

    def table(self) -> pd.DataFrame:
        """One row a model, ours last: intervals, and the difference from ours."""
        rows = []
        for name, metrics in self.metrics.items():
            test = self.tests.get(name)
            rows.append({
                "model": name.replace("_", " "),
                "accuracy": f"{metrics['accuracy']:.3f}",
                "macro F1": f"{metrics['macro_f1']:.3f}",
                "ours is better by": f"{test.difference:+.3f}" if test else "",
                "p (McNemar)": f"{test.p_value:.2g}" if test else "",
            })  # fmt: skip
        return pd.DataFrame(rows).set_index("model")


def compare_models(
    cfg: EnhancedConfig,
    ours: Predictions,
    baselines: Sequence[BaselineResult],
    classes: Sequence[str],
) -> Comparison:
    """Measure `ours` and every baseline on the test split, and test the differences."""
    metrics, tests = {}, {}
    for baseline in baselines:
        p = baseline.probabilities[: len(ours.labels)]
        metrics[baseline.name] = evaluate_predictions(
            ours.labels, p, classes, resamples=cfg.BOOTSTRAP, seed=cfg.SEED
        )
        tests[baseline.name] = paired_test(
            ours.labels, ours.predicted, p.argmax(1), resamples=cfg.BOOTSTRAP, seed=cfg.SEED
        )
    metrics["this notebook"] = evaluate_predictions(
        ours.labels, ours.probabilities, classes, resamples=cfg.BOOTSTRAP, seed=cfg.SEED
    )
    return Comparison(metrics, tests)


# %% [markdown]
# For EmoSet itself there are published figures, from tables 3 to 5 of the paper (Yang et al., ICCV
# 2023), for its eight classes and its own test split. They were measured by others with other
# code. They are shown, marked as published, only where the classes are these eight; on another
# split than the official one they are a landmark and no comparison.

# %%
PUBLISHED_EMOSET = {
    "AlexNet": 0.6780,
    "VGG-16": 0.7227,
    "ResNet-50": 0.7404,
    "DenseNet-121": 0.7232,
    "MDAN": 0.7575,
    "WSCNet": 0.7632,
    "PDANet": 0.7695,
    "StyleNet": 0.7711,
    "Stimuli-aware": 0.7840,
}


def published_accuracies(classes: Sequence[str], *, synthetic: bool) -> dict[str, float] | None:
    """Published EmoSet-8 test accuracies, or None where the data are not EmoSet's."""
    return None if synthetic or set(classes) != set(MIKELS_CLASSES) else dict(PUBLISHED_EMOSET)
