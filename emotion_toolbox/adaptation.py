"""Fitting a network to another set of images: statistics without labels, probes with a few."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm.auto import tqdm

from emotion_toolbox.backbones import BackboneSpec, batch_norms
from emotion_toolbox.batches import EmotionDataset, fetch_ahead
from emotion_toolbox.device import eval_mode
from emotion_toolbox.pixels import prepare_images
from emotion_toolbox.probes import choose_strength

Labels = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
Moments = list[tuple[int, Tensor, Tensor]]  # of each batch: values a channel, their mean, variance
M = TypeVar("M", bound=nn.Module)
STATISTICS_BATCH = 128  # images; what a layer sees depends on the batch that the ones before it saw


@torch.no_grad()
def adapt_statistics(model: M, dataset: EmotionDataset, spec: BackboneSpec, size: int) -> M:
    """A copy of `model` whose BatchNorm layers hold mean and variance of `dataset`'s images.

    AdaBN (Li et al. 2016, arXiv 1603.04779): the weights stay, and no label is used. One pass over
    the centre crops at `size` pixels; each layer sees what the layers before it give where they
    normalise by the batch. Dropout is off.
    """
    adapted = copy.deepcopy(model)
    device, layers = next(adapted.parameters()).device, list(batch_norms(adapted))
    moments: defaultdict[nn.Module, Moments] = defaultdict(list)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        moments[layer].append((values.shape[1], mean.cpu().double(), variance.cpu().double()))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    count = len(dataset)
    slices = np.array_split(np.arange(count), -(-count // STATISTICS_BATCH))  # none of them small
    with eval_mode(adapted):
        for layer in layers:
            layer.train()
        bar = tqdm(fetch_ahead(dataset, slices, device), "statistics", len(slices), leave=False)
        for batch in bar:
            adapted(prepare_images(batch.images, size, spec.mean, spec.std))
    for hook in hooks:
        hook.remove()
    for layer, noted in moments.items():
        mean, variance = pool_moments(noted)
        layer.get_buffer("running_mean").copy_(mean)
        layer.get_buffer("running_var").copy_(variance)
    return adapted.eval()


def pool_moments(moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of all values together, from those of the batches."""
    counts, means, variances = zip(*moments, strict=True)
    weight = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
    each = torch.stack(means)
    mean = (weight * each).sum(0)
    return mean, (weight * (torch.stack(variances) + (each - mean) ** 2)).sum(0)


def draw_shots(labels: Labels, most: int, seed: int) -> Positions:
    """Positions [C, most] of `most` random images of each class, int64.

    The first k columns are the draw of k: so with more there are the same ones and others. Raises
    ``ValueError`` where a class has fewer.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:most] for c in range(labels.max() + 1)]
    return np.stack(drawn)


def probe_shots(
    features: Features, labels: Labels, shots: Positions, test: Features, monitor: str
) -> npt.NDArray[np.float64]:
    """Probabilities [N, C] for `test` features [N, F] by logistic regression on the drawn images.

    `shots` [C, k] are positions in `features` and `labels`. The strength is chosen among the drawn
    images by cross-validation; with one of each class it is the usual one (``choose_strength``).
    """
    chosen = shots.ravel()
    scaler = StandardScaler().fit(features[chosen])
    known, unknown = scaler.transform(features[chosen]), scaler.transform(test)
    span = np.linalg.qr(known.T)[0]  # the weights lie in it: so few dimensions, the same answer
    with threadpool_limits(1):  # for so little work, threads cost more than they bring
        strength, _ = choose_strength(known @ span, labels[chosen], monitor)
        probe = LogisticRegression(C=strength, max_iter=2000)
        probe.fit(known @ span, labels[chosen])
    return np.asarray(probe.predict_proba(unknown @ span), dtype=np.float64)


def usable_shots(shots: Sequence[int], labels: Labels) -> list[int]:
    """Those of `shots` for which every class has images enough, in order."""
    return sorted(k for k in set(shots) if k <= np.bincount(labels).min())
