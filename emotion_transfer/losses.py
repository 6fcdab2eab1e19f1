"""The loss: cross-entropy that stays right under class weights, smoothing and mixing."""

# %% [markdown]
# Three things are asked of the loss at once: rare classes should count more (*class weights*), the
# target should not be absolute certainty (*label smoothing*,
# [Szegedy et al. 2016](https://arxiv.org/abs/1512.00567)), and mixed images have two labels.
# PyTorch's `CrossEntropyLoss` accepts all three, but its meaning shifts between them: with hard
# labels it divides by the sum of the weights, with soft ones by the number of images, and its class
# weights also reweight the smoothing
# ([issue 104776](https://github.com/pytorch/pytorch/issues/104776)). Ours has one formula. With $q$
# the smoothed one-hot target of a class and $w$ that class's weight, an image mixed from classes
# $a$ and $b$ with share $\lambda$ costs
#
# $$\lambda\, w_a H(q_a, p) + (1-\lambda)\, w_b H(q_b, p),$$
#
# and a batch costs the mean over its images. The weights average 1 over the training images, so
# switching them on does not change the learning rate by stealth.

# %%
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


def class_weights(labels: npt.NDArray[np.int64], classes: int) -> Tensor:
    """Weights [C] inverse to class frequency, with mean 1 over the images; 0 for absent classes."""
    counts = torch.from_numpy(np.bincount(labels, minlength=classes))
    fair = len(labels) / (counts > 0).sum()  # images a class, were all as frequent
    return torch.where(counts > 0, fair / counts, 0.0).float()


class SoftTargetLoss(nn.Module):
    """Class-weighted, smoothed cross-entropy of scores [B, C] for targets [B, C] that sum to 1."""

    def __init__(self, weight: Tensor, smoothing: float) -> None:
        super().__init__()
        self.weight, self.smoothing = nn.Buffer(weight), smoothing

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        log_p = scores.float().log_softmax(dim=1)
        # H(q_c, p) for every class c: its own log-probability, and the mean of all for smoothing
        costs = -torch.lerp(log_p, log_p.mean(dim=1, keepdim=True), self.smoothing)
        return (targets * self.weight * costs).sum(dim=1).mean()
