"""Records for TensorBoard and MLflow, read back with their own readers."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_run import as_arguments, file_datasets, install_small_network, small_config

from emotion_toolbox import tracking
from emotion_toolbox.measures import Predictions
from emotion_transfer import __main__ as program
from emotion_transfer import engine
from emotion_transfer.commands import train as command

GROUPED = {"train_loss": "train/loss", "train_accuracy": "train/accuracy",
           "train_clean_accuracy": "train_clean/accuracy", "gap": "run/gap",
           "val_loss": "val/loss", "val_accuracy": "val/accuracy", "val_macro_f1": "val/macro_f1",
           "val_ema_loss": "val_ema/loss", "val_ema_accuracy": "val_ema/accuracy",
           "val_ema_macro_f1": "val_ema/macro_f1", "lr_head": "lr/head",
           "lr_backbone": "lr/backbone", "skipped_steps": "run/skipped_steps",
           "memory_mb": "run/memory_mb", "seconds": "run/seconds",
           "images_per_second": "run/images_per_second"}  # fmt: skip


@pytest.fixture
def cfg(tiny_root, tmp_path, monkeypatch):
    install_small_network(monkeypatch)
    return small_config(
        tmp_path, EPOCHS=3, THAW_EPOCHS=(0, 1), RUN_NAME="run", BASELINES=("majority",)
    )


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path):
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
        return found.Reload()

    return read


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return pytest.importorskip("mlflow", reason="the extra mlflow is not installed")


def run(cfg, logger: str | None = None) -> int:
    asked = [] if logger is None else ["--logger", logger]
    return program.main(["train", *asked, "--set", *as_arguments(cfg)])


def folder_of(cfg) -> Path:
    return Path(cfg.OUTPUT_ROOT) / cfg.RUN_NAME


def stop_in_step(monkeypatch, number: int) -> None:
    """Press Ctrl-C in a training step."""
    steps, step = [], engine.train_step

    def stopping(*args):
        steps.append(args)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        step(*args)

    monkeypatch.setattr(engine, "train_step", stopping)


def history_of(cfg) -> pd.DataFrame:
    return pd.read_csv(folder_of(cfg) / "history.csv").rename(columns=GROUPED)


def columns_of(history: pd.DataFrame):
    """Each column's epochs and values, where it has some."""
    table = history.set_index("epoch")
    return {name: table[name].dropna() for name in table.columns}


def final_of(cfg) -> dict[str, float]:
    summary = json.loads((folder_of(cfg) / "summary.json").read_text(encoding="utf-8"))
    metrics = summary["metrics"]
    return {
        f"final/{split}_{name}": estimate["value"]
        for split in ("val", "test")
        for name, estimate in metrics[split].items()
    }


# --- the seam -----------------------------------------------------------------------------------


def test_a_listener_hears_of_every_epoch_and_its_answers(cfg):
    heard, datasets = [], file_datasets(cfg)
    listen = lambda row, answers: heard.append((dict(row), answers))  # noqa: E731
    _, result = command.train_model(cfg, datasets, folder_of(cfg), on_epoch=listen)
    assert pd.DataFrame([row for row, _ in heard]).equals(result.history)
    for row, answers in heard:
        assert answers.labels.tolist() == datasets["val"].split.labels.tolist()
        better = max(row["val_macro_f1"], row["val_ema_macro_f1"])
        assert answers.macro_f1 == better
        assert row["gap"] == row["train_clean_accuracy"] - answers.accuracy


def test_what_a_listener_raises_ends_the_run_which_can_go_on(cfg):
    def once(row, answers):
        if row["epoch"] == 2:
            raise RuntimeError("enough")

    datasets = file_datasets(cfg)
    with pytest.raises(RuntimeError, match="enough"):
        command.train_model(cfg, datasets, folder_of(cfg), on_epoch=once)
    _, resumed = command.train_model(cfg, datasets, folder_of(cfg))
    _, whole = command.train_model(cfg, datasets, folder_of(cfg).with_name("whole"))
    timed = ["seconds", "images_per_second", "memory_mb"]
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns=timed), whole.history.drop(columns=timed)
    )


# --- TensorBoard --------------------------------------------------------------------------------


def scalars_of(found, name: str) -> pd.Series:
    events = found.Scalars(name)
    return pd.Series([e.value for e in events], [e.step for e in events])


def check_events(found, cfg) -> None:
    """Scalars are those of the history, every step once, and pictures there for each."""
    history = columns_of(history_of(cfg))
    final = final_of(cfg)
    assert set(found.Tags()["scalars"]) == history.keys() | final.keys()
    for name, expected in history.items():
        recorded = scalars_of(found, name)
        assert recorded.index.tolist() == expected.index.tolist(), name
        assert recorded.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-6), name
    for name, value in final.items():
        (event,) = found.Scalars(name)
        assert event.value == pytest.approx(value, rel=1e-6)
    for name in ("val/confusion", "val/examples"):
        assert [e.step for e in found.Images(name)] == [0, 1, 2, 3]
        assert found.Images(name)[0].encoded_image_string.startswith(b"\x89PNG")


def test_event_files_hold_the_history(cfg, tensorboard):
    assert run(cfg, "tensorboard") == 0
    found = tensorboard(folder_of(cfg) / "tensorboard")
    check_events(found, cfg)
    from tensorboard.plugins.hparams import metadata

    content = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    kept = metadata.parse_session_start_info_plugin_data(content).hparams
    assert kept.keys() == dataclasses.asdict(cfg).keys()
    assert kept["LR_HEAD"].number_value == cfg.LR_HEAD
    assert kept["RESTARTS"].string_value == str(cfg.RESTARTS)
    assert kept["THAW_EPOCHS"].string_value == "(0, 1)"
    content = found.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    metrics = metadata.parse_experiment_plugin_data(content).metric_infos
    assert {m.name.tag for m in metrics} == final_of(cfg).keys()


def test_a_resumed_run_has_every_step_once_in_tensorboard(cfg, tensorboard, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 9)  # in the second epoch of six steps
        assert run(cfg, "tensorboard") == 130
    assert tensorboard(folder_of(cfg) / "tensorboard").Scalars("val/loss")[-1].step == 1
    assert run(cfg, "tensorboard") == 0
    check_events(tensorboard(folder_of(cfg) / "tensorboard"), cfg)
    assert run(cfg, "tensorboard") == 0  # complete already
    check_events(tensorboard(folder_of(cfg) / "tensorboard"), cfg)


def test_an_epoch_told_twice_is_there_once(tensorboard, tmp_path):
    """A run that was killed before it saved, or whose newest checkpoint was damaged."""
    for first in (0, 1):
        tracker = tracking.TensorBoardTracker(tmp_path, {})
        for epoch in range(first, 4 + first):
            tracker.log_epoch(epoch, {"a": 10 * first + epoch}, {})
        tracker.writer.close()
        time.sleep(1.1)  # the names of event files begin with the second
    found = scalars_of(tensorboard(tmp_path / "tensorboard"), "a")
    assert found.to_dict() == {0: 0, 1: 11, 2: 12, 3: 13, 4: 14}


# --- MLflow -------------------------------------------------------------------------------------


def client_of(mlflow, cfg):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{Path(cfg.OUTPUT_ROOT) / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return client, client.search_runs([experiment.experiment_id])


def check_mlflow(mlflow, cfg) -> None:
    client, (found,) = client_of(mlflow, cfg)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params == {n: str(v) for n, v in dataclasses.asdict(cfg).items()}
    for name, expected in columns_of(history_of(cfg)).items():
        events = client.get_metric_history(found.info.run_id, name)
        recorded = {e.step: e.value for e in events}
        assert len(events) == len(recorded)
        assert recorded.keys() == set(expected.index)
        if name not in ("run/seconds", "run/images_per_second", "run/memory_mb"):
            assert recorded == pytest.approx(expected.to_dict())
    for name, value in final_of(cfg).items():
        (event,) = client.get_metric_history(found.info.run_id, name)
        assert event.value == pytest.approx(value)
    pictures = client.list_artifacts(found.info.run_id, "val/confusion")
    assert [Path(p.path).name for p in pictures] == [f"{n:04d}.png" for n in range(4)]


def test_mlflow_goes_on_in_the_same_run(cfg, mlflow, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 9)
        assert run(cfg, "mlflow") == 130
    changed = dataclasses.replace(cfg, CHECKPOINT_KEEP=3)  # the settings it was begun with stay
    assert run(changed, "mlflow") == 0
    check_mlflow(mlflow, cfg)
    assert run(cfg, "mlflow") == 0  # complete already
    check_mlflow(mlflow, cfg)

    (folder_of(cfg) / "mlflow-run").write_text("0123456789abcdef0123456789abcdef", "utf-8")
    assert run(cfg, "mlflow") == 0  # lost, so it has another from then on
    assert "MLflow has no run 0123456789abcdef" in capsys.readouterr().out
    client, runs = client_of(mlflow, cfg)
    assert len(runs) == 2
    assert (folder_of(cfg) / "mlflow-run").read_text("utf-8") == runs[0].info.run_id
    final = final_of(cfg)
    assert runs[0].data.metrics == pytest.approx(final)


def test_a_store_that_cannot_be_reached_is_named(cfg, mlflow, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    assert run(cfg, "mlflow") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "MLflow at nowhere://x: " in err and "leave out --logger" in err
    assert not (folder_of(cfg) / "checkpoints").exists()


# --- what is recorded ---------------------------------------------------------------------------


def test_another_kind_of_record_needs_two_methods(cfg):
    class Listing:
        def __init__(self, run_dir, settings):
            self.events = [("begin", run_dir.name, settings["EPOCHS"])]
            made.append(self)

        def log_epoch(self, epoch, scalars, figures):
            self.events.append((epoch, scalars["val/loss"], sorted(figures)))

        def log_end(self, epoch, settings, metrics):
            self.events.append(("end", epoch, metrics["final/test_accuracy"]))

    made = []
    settings = dataclasses.asdict(cfg)
    command.train({**settings, "DATASET": "files"}, make_tracker=Listing)
    (record,) = made
    begin, *epochs, end = record.events
    assert begin == ("begin", "run", 3)
    losses = history_of(cfg)["val/loss"]
    pictures = ["val/confusion", "val/examples"]
    assert epochs == [(n, pytest.approx(loss), pictures) for n, loss in enumerate(losses)]
    assert end == ("end", 3, pytest.approx(final_of(cfg)["final/test_accuracy"]))


def test_examples_say_answer_share_and_truth():
    answers = Predictions(np.array([0, 1]), np.array([[0.7, 0.3], [0.8, 0.2]]), 0.0)
    pictures = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    figure = tracking.plot_examples(pictures, answers, ["calm", "rage"])
    assert [ax.get_title() for ax in figure.axes] == ["calm 70%", "calm 80%\nis rage"]


def test_nothing_is_recorded_unless_asked_for(cfg, monkeypatch):
    for name in ("tensorboard", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    assert run(dataclasses.replace(cfg, EPOCHS=1)) == 0
    names = {path.name for path in folder_of(cfg).iterdir()}
    assert not names & {"tensorboard", "mlflow-run"}


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_without_the_extra_it_says_what_to_install(cfg, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run(cfg, name) == 1
    err = capsys.readouterr().err
    assert f'{name} is not installed; pip install -e ".[{name}]"' in err and err.count("\n") == 1
    assert not Path(cfg.OUTPUT_ROOT).exists()


def test_an_unknown_logger_is_refused(cfg, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(cfg, "wandb")
    assert stopped.value.code == 2 and "'wandb'" in capsys.readouterr().err
