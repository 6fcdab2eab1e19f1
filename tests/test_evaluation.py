"""Predictions against a plain loop, their figures against scikit-learn."""

import copy
import csv

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from small_run import install_small_network, memory_datasets, small_config
from torch.optim.swa_utils import AveragedModel

from emotion_transfer.engine import clean_subset
from emotion_transfer.evaluation import (
    Predictions,
    predict,
    prediction_table,
    write_predictions,
)
from emotion_transfer.model import build_model, set_training_mode


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


@pytest.fixture
def cfg(tmp_path):
    return small_config(tmp_path, BATCH_SIZE=10)  # 12 validation images: the last batch is ragged


@pytest.fixture
def model(cfg):
    model = build_model(cfg, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the answers differ
    return model


def plain_loop(cfg, model, dataset) -> np.ndarray:
    """Probabilities image by image: centre crop, normalise, softmax."""
    model, answers = copy.deepcopy(model).eval(), []
    spec, size = model.spec, cfg.IMG_SIZE
    for index in range(len(dataset)):
        pixels = dataset[index].images.double() / 255
        first = (pixels.shape[1] - size) // 2
        pixels = pixels[:, first : first + size, first : first + size]
        mean, std = (torch.tensor(v).double()[:, None, None] for v in (spec.mean, spec.std))
        with torch.no_grad():
            scores = model(((pixels - mean) / std).float()[None])
        answers.append(scores.double().softmax(1)[0].numpy())
    return np.stack(answers)


def test_every_image_is_counted_once_and_in_order(cfg, model):
    for name, dataset in memory_datasets(size=36).items():
        found = predict(cfg, model, dataset)
        np.testing.assert_array_equal(found.labels, dataset.split.labels)
        np.testing.assert_allclose(found.probabilities, plain_loop(cfg, model, dataset), atol=1e-5)
        assert len(found.labels) == len(dataset), name
        assert found.probabilities.dtype == np.float64


def test_the_figures_are_scikit_learns(cfg, model):
    dataset = memory_datasets()["train"]
    dataset.split.labels[:4] = 1
    found = predict(cfg, model, dataset)
    assert found.accuracy == accuracy_score(found.labels, found.predicted)
    assert found.macro_f1 == f1_score(found.labels, found.predicted, average="macro")
    expected = log_loss(found.labels, found.probabilities, labels=range(3))
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_a_class_that_does_not_occur_counts_as_zero():
    """The figure must not rise because a class is missing from the answers."""
    labels = np.array([0, 0, 1, 1])
    found = Predictions(labels, np.eye(4)[[0, 0, 1, 1]], 0.0)
    assert found.accuracy == 1 and found.macro_f1 == pytest.approx(0.5)


@pytest.mark.parametrize("positions", [[0], [11, 3, 7], list(range(12))[::-1]])
def test_a_choice_of_positions(cfg, model, positions):
    dataset = memory_datasets()["val"]
    whole = predict(cfg, model, dataset)
    part = predict(cfg, model, dataset, positions=np.array(positions))
    np.testing.assert_array_equal(part.labels, whole.labels[positions])
    np.testing.assert_allclose(part.probabilities, whole.probabilities[positions], atol=1e-6)


def test_debug_looks_at_two_batches(tmp_path, model):
    cfg = small_config(tmp_path, DEBUG=True)
    dataset = memory_datasets()["train"]
    assert len(predict(cfg, model, dataset).labels) == 8
    assert len(predict(cfg, model, dataset, positions=np.arange(3)).labels) == 3


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_evaluation_leaves_no_trace(cfg, model, amp):
    set_training_mode(cfg, model, 1)  # some stages train, some do not
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    predict(cfg, model, memory_datasets()["val"], amp=amp)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_half_precision_is_close(cfg, model):
    dataset = memory_datasets()["val"]
    full, half = (predict(cfg, model, dataset, amp=amp) for amp in ("off", "bf16"))
    np.testing.assert_allclose(half.probabilities, full.probabilities, atol=0.05)
    np.testing.assert_allclose(half.probabilities.sum(1), 1, atol=1e-12)


def test_averaged_weights_are_evaluated_as_a_model_of_their_own(cfg, model):
    average = AveragedModel(model, use_buffers=True)
    with torch.no_grad():
        model.head.output.bias += 5 * torch.eye(3)[0]
    dataset = memory_datasets()["val"]
    assert predict(cfg, average, dataset).loss != predict(cfg, model, dataset).loss
    assert predict(cfg, average, dataset).loss == predict(cfg, average.module, dataset).loss


def test_the_clean_subset_is_fixed_and_spread_evenly():
    datasets = memory_datasets(counts={"train": 40, "val": 7, "test": 2})
    found = clean_subset(datasets["train"], datasets["val"])
    assert len(found) == 21 == len(set(found.tolist())) and found.dtype == np.int64
    assert (found[0], found[-1]) == (0, 119) and set(np.diff(found)) <= {5, 6, 7}
    np.testing.assert_array_equal(found, clean_subset(datasets["train"], datasets["val"]))
    more = clean_subset(datasets["val"], datasets["train"])  # never more than there are
    np.testing.assert_array_equal(more, np.arange(21))


def test_the_table_of_predictions(cfg, model, tmp_path):
    dataset = memory_datasets()["test"]
    dataset.classes = ('calm, "very"', "joy", "ragé")
    dataset.split.files[2] = "odd, name\n'x'.png"
    found = predict(cfg, model, dataset)
    table = prediction_table(dataset, found)
    assert list(table) == [
        "path", "label", "predicted", "confidence", *(f"p_{name}" for name in dataset.classes),
    ]  # fmt: skip
    file = tmp_path / "deep/predictions.csv"
    write_predictions(file, table)
    read = pd.read_csv(file)
    assert read["path"].tolist() == list(dataset.split.files)
    assert read["label"].tolist() == [dataset.classes[i] for i in dataset.split.labels]
    assert read["predicted"].tolist() == [dataset.classes[i] for i in found.predicted]
    columns = read[[f"p_{name}" for name in dataset.classes]].to_numpy()
    np.testing.assert_allclose(columns, found.probabilities, atol=5e-7)
    np.testing.assert_allclose(read["confidence"], columns.max(1), atol=1e-6)
    with file.open(newline="", encoding="utf-8") as rows:
        assert len(list(csv.reader(rows))) == 1 + len(dataset)


def test_the_table_of_a_debug_run_is_shorter(tmp_path, model):
    cfg, dataset = small_config(tmp_path, DEBUG=True), memory_datasets()["test"]
    table = prediction_table(dataset, predict(cfg, model, dataset))
    assert table["path"].tolist() == list(dataset.split.files)[:8]
