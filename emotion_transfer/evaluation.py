"""What a model says of a split, and where in an image it looks."""

# %% [markdown]
# Evaluation uses the centre crop and no augmentation, and counts every image exactly once, in
# order.

# %%
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam
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
    """Run `model` over the images of `dataset` (or those at `positions`), in order.

    `progress` labels a bar.
    """
    device, spec = next(model.parameters()).device, model.spec
    order = np.arange(len(dataset)) if positions is None else positions
    slices = batch_slices(order, batch_size)
    labels, scores = [], []
    bar = tqdm(total=len(slices), desc=progress, unit="batch", leave=False, disable=not progress)
    with eval_mode(model), bar:
        for batch in fetch_ahead(dataset, slices, device):
            images = prepare_images(batch.images, size, spec.mean, spec.std)
            with precision(device, amp):
                scores.append(model(images).float())
            labels.append(batch.labels)
            bar.update()
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
    """Maps [B, h, w] in 0..1, a cell a place of `layer`, for normalised images [B, 3, H, W].

    A map is all zero where nothing in the image speaks for its class, of `classes` [B].
    """
    wanted = torch.as_tensor(classes, device=images.device)
    with eval_mode(model), torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(
            images.detach().requires_grad_(), wanted, relu_attributions=True
        )
    maps = maps.detach()[:, 0]
    highest = maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    heat: npt.NDArray[np.float32] = (maps / highest).clamp(0, 1).float().cpu().numpy()
    return heat
