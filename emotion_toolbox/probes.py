"""Asking a network: its answers, its features, a linear probe on them, and Grad-CAM."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm.auto import tqdm

from emotion_toolbox.backbones import BackboneSpec, make_backbone, pooled_features
from emotion_toolbox.batches import EmotionDataset, batch_slices, fetch_ahead
from emotion_toolbox.device import choose_device, eval_mode, precision
from emotion_toolbox.keeper import keep_result
from emotion_toolbox.measures import Predictions
from emotion_toolbox.pixels import prepare_images

SCORING = {"macro_f1": "f1_macro", "accuracy": "accuracy", "loss": "neg_log_loss"}
STRENGTHS, FOLDS, USUAL_STRENGTH = (1e-4, 1e-3, 1e-2, 1e-1), 5, 1e-3  # C of the regression
ENOUGH = 5000  # images to choose C by
Floats = npt.NDArray[np.float32]


@torch.no_grad()
def predict(
    model: nn.Module, dataset: EmotionDataset, *, size: int, batch_size: int, amp: str = "off",
    positions: npt.NDArray[np.int64] | None = None, progress: str = "", tta: bool = False,
) -> Predictions:  # fmt: skip
    """What `model` says of the centre crops of `dataset` (or its `positions`), each once, in order.

    With `tta` (test-time augmentation), the mean over an image and its mirror image. `progress`
    labels a bar.
    """
    device, labels, scores = next(model.parameters()).device, [], []
    spec: BackboneSpec = model.spec  # type: ignore[assignment]
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


@torch.no_grad()
def extract_features(
    backbone: nn.Module, dataset: EmotionDataset, spec: BackboneSpec, size: int, batch_size: int
) -> npt.NDArray[np.float32]:
    """``pooled_features`` [N, F] of the centre crops of all images, at `size` pixels."""
    device, features = next(backbone.parameters()).device, []
    slices = batch_slices(np.arange(len(dataset)), batch_size)
    batches, label = fetch_ahead(dataset, slices, device), f"features {dataset.split.name}"
    for batch in tqdm(batches, label, len(slices), leave=False, unit="batch"):
        images = prepare_images(batch.images, size, spec.mean, spec.std)
        features.append(pooled_features(backbone, spec, images).float().cpu().numpy())
    return np.concatenate(features)


def choose_strength(
    features: Floats, labels: npt.NDArray[np.int64], monitor: str
) -> tuple[float, str]:
    """The C of logistic regression on `features` [N, F] by cross-validation, and how it was found.

    `monitor` is "macro_f1", "accuracy" or "loss". A class with a single image leaves no fold.
    """
    some = np.linspace(0, len(labels) - 1, min(len(labels), ENOUGH)).round().astype(int)
    counts = np.unique(labels[some], return_counts=True)[1]
    folds = min(FOLDS, int(counts.min()))
    if folds < 2 or len(counts) < 2:
        return USUAL_STRENGTH, "too few images a class to choose it"
    search = GridSearchCV(
        LogisticRegression(max_iter=500, tol=1e-3), {"C": STRENGTHS}, cv=folds, refit=False,
        scoring=SCORING[monitor],
    )  # fmt: skip
    best = search.fit(features[some], labels[some]).best_params_
    return float(best["C"]), f"the best of {len(STRENGTHS)} in {folds}-fold cross-validation"


def fit_probe(
    features: Floats, labels: npt.NDArray[np.int64], classes: int, monitor: str
) -> tuple[Floats, Floats, str]:
    """Logistic regression on standardised `features` [N, F] as one linear layer.

    Returns its weight [C, F], its bias [C], and a note on the regularisation. A class without an
    image gets no weights and the lowest bias.
    """
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    strength, how = choose_strength(scaled, labels, monitor)
    known = np.unique(labels)
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, -30.0)
    bias[known] = 0.0
    if len(known) > 1:
        probe = LogisticRegression(C=strength, max_iter=2000).fit(scaled, labels)
        rows, shift = probe.coef_, probe.intercept_
        if len(known) == 2:  # one row says how much more the second class is meant
            rows, shift = (np.stack([-part[0], part[0]]) / 2 for part in (rows, shift))
        weight[known] = rows / scaler.scale_
        bias[known] = shift - weight[known] @ scaler.mean_
    return weight.astype(np.float32), bias.astype(np.float32), f"C = {strength:g}, {how}"


def linear_probe(
    datasets: Mapping[str, EmotionDataset], folder: Path, network: tuple[str, str | None, int, int],
    spec: BackboneSpec, monitor: str, batch_size: int, device: str,
) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
    """Logistic regression on a frozen backbone's features: one linear layer, kept in `folder`.

    `network`: name, weights, seed of random weights, and side of the images in pixels. Returns
    weight [C, F], bias [C], a note, and the probabilities [N, C] of the test images.
    """
    name, weights, seed, size = network

    def fit() -> dict[str, Any]:
        torch.manual_seed(seed)
        backbone = make_backbone(name, weights, size).to(choose_device(device)).eval()
        train = datasets["train"]
        asked = spec, size, batch_size
        seen, test = (extract_features(backbone, datasets[s], *asked) for s in ("train", "test"))
        weight, bias, note = fit_probe(seen, train.split.labels, len(train.classes), monitor)
        found = {"weight": weight, "bias": bias, "note": f"logistic regression, {note}"}
        return {**found, "probabilities": softmax((test @ weight.T + bias).astype(float), axis=1)}

    key = repr((network, spec.levels, monitor, [data.fingerprint() for data in datasets.values()]))
    return keep_result(folder / "probe.npz", key, fit)


def grad_cam(
    model: nn.Module, layer: nn.Module, images: Tensor, classes: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Maps [B, h, w], 0 to 1, of what at `layer` speaks for `classes` [B] in images [B, 3, H, W].

    Grad-CAM (Selvaraju et al. 2017).
    """
    device = next(model.parameters()).device
    asked, wanted = images.detach().to(device).requires_grad_(), torch.as_tensor(classes).to(device)
    with eval_mode(model), torch.enable_grad():
        maps = LayerGradCam(model, layer).attribute(asked, wanted, relu_attributions=True)
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3]:  # tokens, or channels last
        print("no Grad-CAM: the last stage of this network gives no map of channels")
        maps = torch.zeros(len(images), 1, 2, 2)
    heat = maps.detach()[:, 0].float()
    highest = heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)  # all 0 where nothing does
    return np.asarray((heat / highest).clamp(0, 1).cpu().numpy())
