"""What a model says of a split."""

# %% [markdown]
# Evaluation uses the centre crop and no augmentation, and counts every image exactly once, in
# order.

# %%
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from emotion_toolbox.batches import EmotionDataset, batch_slices, fetch_ahead
from emotion_toolbox.device import eval_mode, precision
from emotion_toolbox.measures import Predictions
from emotion_toolbox.pixels import prepare_images
from emotion_transfer.model import EmotionClassifier


@torch.no_grad()
def predict(
    model: EmotionClassifier, dataset: EmotionDataset, *, size: int, batch_size: int,
    amp: str = "off", positions: npt.NDArray[np.int64] | None = None, progress: str = "",
) -> Predictions:  # fmt: skip
    """Run `model` over `dataset` (or its `positions`), in order; `progress` labels a bar."""
    device, spec, labels, scores = next(model.parameters()).device, model.spec, [], []
    slices = batch_slices(np.arange(len(dataset)) if positions is None else positions, batch_size)
    batches = fetch_ahead(dataset, slices, device)
    bar = tqdm(batches, progress, len(slices), unit="batch", leave=False, disable=not progress)
    with eval_mode(model):
        for batch in bar:
            images = prepare_images(batch.images, size, spec.mean, spec.std)
            with precision(device, amp):
                scores.append(model(images).float())
            labels.append(batch.labels)
    logits, truth = torch.cat(scores).cpu().double(), torch.cat(labels).cpu()
    loss = float(F.cross_entropy(logits, truth))
    return Predictions(truth.numpy(), logits.softmax(1).numpy(), loss)
