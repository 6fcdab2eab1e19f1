"""What a model says of a split, and where in an image it looks."""

# %% [markdown]
# Evaluation uses the centre crop and no augmentation, and counts every image exactly once, in
# order.

# %%
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn
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


# %% [markdown]
# **Grad-CAM** ([Selvaraju et al. 2017](https://arxiv.org/abs/1610.02391)) asks how much each
# channel of the last convolutional layer, which still knows *where* things are, speaks for a class,
# by the gradient, and adds the channels up with these weights. Captum, PyTorch's library for such
# questions, does the work.


# %%
def grad_cam(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Maps [B, h, w] in 0..1 of what speaks for `classes` [B] in images [B, 3, H, W]."""
    asked, wanted = images.detach().requires_grad_(), torch.as_tensor(classes).to(images.device)
    with eval_mode(model), torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(asked, wanted, relu_attributions=True)
    heat = maps.detach()[:, 0].float()
    highest = heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)  # all 0 where nothing does
    return np.asarray((heat / highest).clamp(0, 1).cpu().numpy())
