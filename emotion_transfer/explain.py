"""Where the network looks: Grad-CAM."""

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor

from emotion_transfer.model import EmotionClassifier

# %% [markdown]
# #### Grad-CAM
#
# The last convolutional layer still knows *where* things are. Grad-CAM (Selvaraju et al., ICCV
# 2017) asks how much each of its channels speaks for a class, by the gradient, and adds the
# channels up with these weights. What remains is a coarse map of the places that made the network
# say what it said. Captum, PyTorch's library for such questions, does the work.


# %%
def grad_cam(
    model: EmotionClassifier, images: Tensor, targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Heat maps [B, H, W] in 0..1 of normalised images [B, 3, H, W] for the classes `targets` [B].

    A map is all zero where nothing in the image speaks for the class.
    """
    device = next(model.parameters()).device
    layer = model.stage_modules()[list(model.spec.stages)[-1]][-1]
    model.eval()
    wanted = torch.as_tensor(targets, device=device)
    with torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(
            images.to(device).detach().requires_grad_(), wanted, relu_attributions=True
        )
    maps = LayerAttribution.interpolate(maps, images.shape[-2:], "bilinear").detach()[:, 0]
    highest = maps.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    heat: npt.NDArray[np.float32] = (maps / highest).clamp(0, 1).float().cpu().numpy()
    return heat
