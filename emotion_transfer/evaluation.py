"""What a model says of a split."""

# %% [markdown]
# Evaluation uses the centre crop and no augmentation, and counts every image exactly once, in
# order.

# %%
import math

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
    tta: bool = False,
) -> Predictions:  # fmt: skip
    """Run `model` over `dataset` (or its `positions`), in order; `progress` labels a bar.

    With `tta` (test-time augmentation) answers are means over an image and its mirror image."""
    device, spec, labels, scores = next(model.parameters()).device, model.spec, [], []
    slices = batch_slices(np.arange(len(dataset)) if positions is None else positions, batch_size)
    batches = fetch_ahead(dataset, slices, device)
    bar = tqdm(batches, progress, len(slices), unit="batch", leave=False, disable=not progress)
    with eval_mode(model):
        for batch in bar:
            images = prepare_images(batch.images, size, spec.mean, spec.std)
            with precision(device, amp):
                views = [model(view) for view in (images, images.flip(3))[: 1 + tta]]
            scores.append(torch.stack(views).float())
            labels.append(batch.labels)
    each, truth = torch.cat(scores, dim=1).cpu().double().log_softmax(2), torch.cat(labels).cpu()
    answers = each.logsumexp(0) - math.log(len(each))  # of the mean probabilities, [N, C]
    return Predictions(truth.numpy(), answers.exp().numpy(), float(F.nll_loss(answers, truth)))
