"""An export made in a second, of a network with random weights that tells pictures apart."""

import dataclasses

import torch

from emotion_toolbox import backbones
from emotion_toolbox.export import export_model, load_export
from emotion_transfer.commands.predict import network_of
from emotion_transfer.config import make_config
from emotion_transfer.model import build_model

CLASSES = ["calm", "joy", "rage"]
SIDE, SIZE = 46, 40


def make_export(folder, name="efficientnet_lite0", **settings):
    """An export whose answers differ from picture to picture, though its head is random."""
    cfg = make_config({"MODEL_NAME": name, "WEIGHTS": None, "IMG_SIZE": SIZE, **settings})
    model, noise = build_model(cfg, len(CLASSES)), torch.randn(16, 3, SIZE, SIZE)
    for layer in backbones.batch_norms(model):
        layer.momentum = 1.0 if cfg.WEIGHTS is None else 0.0
    with torch.no_grad():
        model.train()(noise)  # statistics with which features differ
        last = [m for m in model.head.modules() if isinstance(m, torch.nn.Linear)][-1]
        if not last.weight.any():  # a reduction beside the probe begins there
            torch.nn.init.normal_(last.weight)
        last.weight.div_(model.eval()(noise).std())
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    facts = {
        "temperature": 1.7, "synthetic": False, "dataset": "pictures", "epochs": 1,
        "weights": "none", "metrics": {"val": {}, "test": {"accuracy": estimate}},
    }  # fmt: skip
    export_model(folder, model, CLASSES, dataclasses.asdict(cfg), SIDE, facts)
    return load_export(folder, network_of)
