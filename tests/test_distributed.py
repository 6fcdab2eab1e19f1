"""Several processes train what one trains: launched by ``torchrun`` as a user does, on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_run import CLASSES, install_small_network, memory_datasets, small_config

from emotion_toolbox.batches import Batch
from emotion_toolbox.draws import draw_uniforms
from emotion_toolbox.measures import Predictions
from emotion_toolbox.pixels import jitter_colours
from emotion_transfer.augment import AUGMENT_DRAWS, apply_augmentation, draw_augmentation
from emotion_transfer.commands import distributed
from emotion_transfer.mixing import draw_mixing, mix_images

RUNNER = Path(__file__).with_name("shared_runner.py")
SAME = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1",
        "val_ema_loss", "val_ema_accuracy", "train_clean_accuracy", "gap", "lr_head",
        "skipped_steps"]  # fmt: skip
SETTINGS = {"HEAD": "linear", "RUN_NAME": "run", "BASELINES": ("majority",)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the tiny data; 13 validation images do not split evenly."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conftest.TINY_COUNTS, "train", 8)
        patch.setitem(conftest.TINY_COUNTS, "val", 5)
        conftest.write_tiny_data(folder / "tiny")
    return folder


def launch(folder: Path, spec: dict, *options: str, wait: bool = True):
    """Run the script under ``torchrun`` with these `options`, or without where there are none."""
    file = folder / "spec.json"
    file.write_text(json.dumps({"folder": str(folder), **spec}))
    torchrun = ["-m", "torch.distributed.run", *options] if options else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, *torchrun, str(RUNNER), str(file)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if not wait:
        return process
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def folder_for(root: Path, name: str) -> Path:
    """A folder of its own beside the data."""
    folder = root / name
    folder.mkdir()
    (folder / "tiny").symlink_to(root / "tiny")
    return folder


def outcome(folder: Path):
    """The history, the exported weights and the answers to the test images."""
    run = folder / "outputs" / "run"
    weights = load_file(run / "export" / "model.safetensors")
    answers = pd.read_csv(run / "predictions_test.csv").select_dtypes("number")
    return pd.read_csv(run / "history.csv"), weights, answers


def assert_same(found, wanted):
    history, weights, answers = found
    names = [name for name in SAME if name in wanted[0]]
    np.testing.assert_allclose(history[names], wanted[0][names], rtol=2e-3, atol=2e-4)
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(weights[name], tensor, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(answers, wanted[2], rtol=5e-3, atol=5e-4)


@pytest.fixture(scope="module")
def alone(root):
    """The run of one process, with MixUp and CutMix."""
    folder = folder_for(root, "alone")
    code, out, err = launch(folder, {"settings": SETTINGS})
    assert code == 0, err
    assert "processes" not in out
    return outcome(folder)


def test_two_processes_train_what_one_does_and_the_first_speaks_alone(root, alone):
    folder = folder_for(root, "two")
    code, out, err = launch(folder, {"settings": SETTINGS}, "--standalone", "--nproc-per-node", "2")
    assert code == 0, err
    assert_same(outcome(folder), alone)
    assert out.count("epoch 1/4:") == 1 and "2 processes" in out
    # taken up again by one process, it is complete
    code, out, err = launch(folder, {"settings": SETTINGS})
    assert code == 0 and "this run is complete" in out


def test_the_balanced_sampler_and_odd_parts_of_a_batch(root):
    settings = {**SETTINGS, "BALANCE": "sampler", "BATCH_SIZE": 8, "ACCUMULATE": 2, "EPOCHS": 2}
    found = {}
    for name, options in {"a": (), "b": ("--standalone", "--nproc-per-node", "2")}.items():
        folder = folder_for(root, f"sampler-{name}")
        code, _, err = launch(folder, {"settings": settings}, *options)
        assert code == 0, err
        found[name] = outcome(folder)
    assert_same(found["b"], found["a"])


def test_a_killed_process_is_restarted_and_the_run_goes_on(root, alone):
    folder = folder_for(root, "killed")
    spec = {"settings": {**SETTINGS, "CHECKPOINT_STEPS": 2},
            "signal": {"name": "SIGKILL", "rank": 1, "step": 10}}  # fmt: skip
    options = "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"
    code, out, err = launch(folder, spec, *options)
    assert code == 0, err
    assert (folder / "sent").exists()
    assert "resuming at epoch 2, step" in out
    assert_same(outcome(folder), alone)


def test_a_stop_that_reaches_one_process_stops_and_saves_all(root, alone):
    folder = folder_for(root, "stopped")
    spec = {"settings": SETTINGS, "signal": {"name": "SIGTERM", "rank": 1, "step": 9}}
    options = "--standalone", "--nproc-per-node", "2"
    code, out, err = launch(folder, spec, *options)
    assert code != 0 and "stopped and saved" in err
    code, out, err = launch(folder, spec, *options)
    assert code == 0, err
    assert "resuming at epoch 2, step 4" in out
    assert_same(outcome(folder), alone)


def test_two_machines_on_one(root, alone):
    folder = folder_for(root, "nodes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1")  # fmt: skip
    both = [launch(folder, {"settings": SETTINGS}, *options, wait=False) for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert_same(outcome(folder), alone)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"BATCH_SIZE": 5}, "BATCH_SIZE=5: it is that of all 2 processes together"),
        ({"DEVICE": "mps"}, "DEVICE='mps': under torchrun"),
    ],
)
def test_what_is_wrong_is_said_once_and_ends_all(root, request, settings, said):
    folder = folder_for(root, f"wrong-{[*settings][0]}")
    spec = {"settings": {**SETTINGS, **settings}}
    code, _, err = launch(folder, spec, "--standalone", "--nproc-per-node", "2")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0
    assert len(lines) == 1 and said in lines[0]
    assert "commands/train.py" not in err  # torchrun has a traceback of its own
    assert not any(folder.glob("outputs/run/checkpoints/*.pt"))


# --- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_shares_put_together_are_the_whole_batch(monkeypatch, tmp_path, size):
    install_small_network(monkeypatch)
    cfg = small_config(tmp_path, BATCH_SIZE=16, MIX_PROB=0.7, TRAIN_SIZE=32)
    data = memory_datasets()["train"]
    positions = np.random.default_rng(0).permutation(len(data))[:16]
    whole = data.batch(positions)
    uniforms = draw_uniforms(cfg.SEED, 1, 48, 16, AUGMENT_DRAWS)
    mean = std = (0.5, 0.5, 0.5)
    images = apply_augmentation(whole.images, draw_augmentation(cfg, uniforms), 32, mean, std)
    mixing = draw_mixing(cfg, 1, 48, 16)
    wanted = mix_images(images, mixing)
    assert (mixing.lam < 1).sum() > 5

    class Some:
        """What ``augment_share`` reads of a trainer."""

        jitter = staticmethod(jitter_colours)
        loss = type("Loss", (), {"weight": torch.ones(len(CLASSES))})
        model = type("Model", (), {"spec": type("Spec", (), {"mean": mean, "std": std})})

    found, targets = [], []
    monkeypatch.setattr(distributed, "processes", lambda: size)
    for number in range(size):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        some = Some()
        some.cfg, some.train = cfg, distributed.Share(data)
        batch = some.train.batch(positions)
        assert isinstance(batch, Batch) and len(batch.images) == 16 // size
        part = distributed.SharedTrainer.augment_share(some, some, batch, 1, 3)
        found.append(part[0])
        targets.append(part[1])
    torch.testing.assert_close(torch.cat(found), wanted)
    truth = torch.nn.functional.one_hot(whole.labels, len(CLASSES)).float()
    lam = mixing.lam[:, None]
    torch.testing.assert_close(torch.cat(targets), lam * truth + (1 - lam) * truth[mixing.partner])


@pytest.mark.parametrize(("images", "size"), [(7, 3), (2, 3), (1, 4)])
def test_answers_of_the_parts_come_in_the_order_of_the_images(images, size):
    rng = np.random.default_rng(images)
    labels, shares = rng.integers(0, 3, images), rng.dirichlet(np.ones(3), images)
    costs = -np.log(shares[np.arange(images), labels])
    parts = [
        Predictions(labels[i::size], shares[i::size], float(costs[i::size].mean()))
        if i < images
        else None
        for i in range(size)
    ]
    found = distributed.join_predictions(parts, images)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.probabilities, shares)
    assert found.loss == pytest.approx(costs.mean(), rel=1e-12)
