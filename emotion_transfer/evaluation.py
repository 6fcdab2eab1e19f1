"""What a model says of a split: probabilities for every image, once each and in order."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from emotion_transfer.augment import prepare_images
from emotion_transfer.checkpoint import write_atomically
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.loader import EmotionDataset, batch_slices, fetch_ahead, make_loader
from emotion_transfer.model import EmotionClassifier
from emotion_transfer.precision import precision

# %% [markdown]
# #### Evaluation
#
# Evaluation uses the centre crop, no augmentation and the uncompiled network, and counts every
# image exactly once.


# %%
@dataclass(frozen=True)
class Predictions:
    """What a model says of a split: `labels` int64 [N], `probabilities` float64 [N, C]."""

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    loss: float  # mean unweighted cross-entropy

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """The most probable class of every image, int64 [N]."""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.labels).mean())

    @property
    def macro_f1(self) -> float:
        classes = range(self.probabilities.shape[1])
        score = f1_score(
            self.labels, self.predicted, labels=classes, average="macro", zero_division=0
        )
        return float(score)


# %% [markdown]
# `predict` walks over a split in order. It leaves the model in the mode in which it found it.


# %%
@torch.no_grad()
def predict(
    cfg: EnhancedConfig,
    model: EmotionClassifier | AveragedModel,
    dataset: EmotionDataset,
    *,
    amp: str = "off",
    positions: npt.NDArray[np.int64] | None = None,
    progress: str = "",
) -> Predictions:
    """Run `model` over `dataset` (or its `positions`), in order; `progress` labels a bar."""
    parameter = next(model.parameters())
    inner = model.module if isinstance(model, AveragedModel) else model
    assert isinstance(inner, EmotionClassifier)
    spec = inner.spec
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    order = np.arange(len(dataset)) if positions is None else positions
    batches = batch_slices(order, cfg.BATCH_SIZE)[: 2 if cfg.DEBUG else None]
    loader = make_loader(dataset, batches, pin=parameter.device.type == "cuda")
    labels, scores = [], []
    bar = tqdm(total=len(batches), desc=progress, unit="batch", leave=False, disable=not progress)
    with bar:
        for batch in fetch_ahead(loader, parameter.device):
            images = prepare_images(batch.images, cfg.IMG_SIZE, spec.mean, spec.std)
            with precision(parameter.device, amp):
                scores.append(model(images).float())
            labels.append(batch.labels)
            bar.update()
    for module, mode in was_training:
        module.training = mode
    logits, truth = torch.cat(scores).cpu().double(), torch.cat(labels).cpu()
    loss = float(F.cross_entropy(logits, truth))
    return Predictions(truth.numpy(), logits.softmax(1).numpy(), loss)


# %% [markdown]
# The test predictions go into a CSV, one row an image with the probability of every class, so that
# any other metric can be computed later without the network.


# %%
def prediction_table(dataset: EmotionDataset, predictions: Predictions) -> pd.DataFrame:
    """One row an image: path, label, predicted, confidence, and p_<class> for every class."""
    classes = dataset.classes
    table = pd.DataFrame({
        "path": list(dataset.split.files)[: len(predictions.labels)],
        "label": [classes[i] for i in predictions.labels],
        "predicted": [classes[i] for i in predictions.predicted],
        "confidence": predictions.probabilities.max(1),
    })  # fmt: skip
    for number, name in enumerate(classes):
        table[f"p_{name}"] = predictions.probabilities[:, number]
    return table


def write_predictions(path: Path, table: pd.DataFrame) -> None:
    """Write a table of predictions as CSV."""
    text = table.to_csv(index=False, float_format="%.6f")
    write_atomically(path, lambda file: file.write(text.encode()))
