"""The loss: cross-entropy that stays right under class weights, smoothing and mixing."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# #### A loss that stays right under mixing
#
# Three things are asked of the loss at once: rare classes should count more (*class weights*), the
# target should not be absolute certainty (*label smoothing*), and mixed images have two labels.
# PyTorch's `CrossEntropyLoss` accepts all three, but its meaning shifts between them: with hard
# labels it divides by the sum of the weights, with soft ones by the number of images, and its class
# weights also reweight the smoothing. Ours has one formula. With $q$ the smoothed one-hot target of
# a class and $w$ that class's weight, an image mixed from classes $a$ and $b$ with share $\lambda$
# costs
#
# $$\lambda\, w_a H(q_a, p) + (1-\lambda)\, w_b H(q_b, p),$$
#
# and a batch costs the mean over its images. The weights average 1 over the training images, so
# switching them on does not change the learning rate by stealth.


# %%
def class_weights(labels: npt.NDArray[np.int64], classes: int) -> Tensor:
    """Weights [C] inverse to class frequency, with mean 1 over the images; 0 for absent classes."""
    counts = np.bincount(labels, minlength=classes)
    inverse = np.divide(1.0, counts, out=np.zeros(classes), where=counts > 0)
    return torch.tensor(inverse * len(labels) / (counts > 0).sum(), dtype=torch.float32)


class SoftTargetLoss(nn.Module):
    """Class-weighted, smoothed cross-entropy of scores [B, C] for targets [B, C] that sum to 1."""

    weight: Tensor

    def __init__(self, weight: Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.smoothing = smoothing

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(scores.float(), dim=1)
        # H(q_c, p) for every class c: its own log-probability, and the mean of all for smoothing
        per_class = -(1 - self.smoothing) * log_p - self.smoothing * log_p.mean(1, keepdim=True)
        return (targets * self.weight * per_class).sum(1).mean()
