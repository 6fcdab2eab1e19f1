"""Where in an image a network looks."""

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from emotion_toolbox.device import eval_mode


def grad_cam(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Maps [B, h, w] in 0..1 of what speaks for `classes` [B] in images [B, 3, H, W].

    Grad-CAM (Selvaraju et al. 2017) at `layer`, the last that knows where things are.
    """
    asked, wanted = images.detach().requires_grad_(), torch.as_tensor(classes).to(images.device)
    with eval_mode(model), torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(asked, wanted, relu_attributions=True)
    heat = maps.detach()[:, 0].float()
    highest = heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)  # all 0 where nothing does
    return np.asarray((heat / highest).clamp(0, 1).cpu().numpy())
