"""Records of a run for TensorBoard and MLflow, beside the files that it writes anyway."""

import io
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.errors import ConfigError
from emotion_toolbox.extras import need
from emotion_toolbox.figures import (
    GREEN,
    RED,
    Names,
    Picture,
    Pictures,
    plot_confusion,
    plot_image_grid,
)
from emotion_toolbox.files import write_text
from emotion_toolbox.keeper import OnEpoch
from emotion_toolbox.measures import Predictions

EXPERIMENT = "emotion-transfer"  # in MLflow
EXAMPLES = 8  # validation images whose answers are shown
GROUP = re.compile(r"^(train_clean|train|val_ema|val|lr)_")


class Tracker(Protocol):
    """What another kind of record must offer.

    After a kill an epoch may come again, or several of them: then the later one counts, or both
    are the same, but a step must not be in the record twice.
    """

    def log_epoch(
        self, epoch: int, scalars: Mapping[str, float], figures: Mapping[str, Figure]
    ) -> None:
        """Record a finished epoch; 0 is the start."""

    def log_end(
        self, epoch: int, settings: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Record the settings and the final `metrics` of a run that ended with `epoch`."""


MakeTracker = Callable[[Path, Mapping[str, Any]], Tracker]  # of a run's folder and settings


def figure_pixels(figure: Figure) -> Picture:
    """A figure as it is saved, uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return np.asarray(Image.open(buffer).convert("RGB"))


# --- TensorBoard --------------------------------------------------------------------------------


class TensorBoardTracker:
    """Event files in the folder ``tensorboard`` of a run."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self.folder = run_dir / "tensorboard"
        self.writer: Any = None

    def _open(self, step: int) -> Any:
        """The writer; opened first, it takes back what an earlier one recorded from `step` on."""
        if self.writer is None:
            make = need("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self.writer = make(str(self.folder), purge_step=step)
        return self.writer

    def log_epoch(
        self, epoch: int, scalars: Mapping[str, float], figures: Mapping[str, Figure]
    ) -> None:
        writer = self._open(epoch)
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, epoch)
        for tag, figure in figures.items():
            writer.add_image(tag, figure_pixels(figure), epoch, dataformats="HWC")
        writer.flush()

    def log_end(
        self, epoch: int, settings: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        last = epoch + 1  # a step of its own, which a run that is called again writes anew
        writer = self._open(last)
        shown = {n: v if type(v) in (int, float) else str(v) for n, v in settings.items()}
        summary = need("torch.utils.tensorboard.summary", "tensorboard")
        for part in summary.hparams(shown, dict(metrics)):
            writer.file_writer.add_summary(part, last)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, last)
        writer.close()


# --- MLflow -------------------------------------------------------------------------------------


class MLflowTracker:
    """A run in MLflow's store: the one of MLFLOW_TRACKING_URI, or a database beside the runs.

    Which run it is stands in the file ``mlflow-run`` of the run's folder.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        mlflow, self.entities = need("mlflow", "mlflow"), need("mlflow.entities", "mlflow")
        root = run_dir.parent
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{root / 'mlflow.db'}"
        artifacts = None if given else root / "mlflow-artifacts"
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            self.run = self._find(run_dir / "mlflow-run")
            self.run = self.run or self._begin(run_dir, settings, artifacts)
            known = self.client.get_metric_history(self.run, "val/loss")
        except mlflow.exceptions.MlflowException as error:
            said = f"MLflow at {uri}: {error}"
            raise ConfigError(f"{said}; set MLFLOW_TRACKING_URI, or leave out --logger") from error
        self.recorded = {metric.step for metric in known}

    def _find(self, file: Path) -> str | None:
        """The run that `file` names, if MLflow still has it."""
        if not file.exists():
            return None
        run: str = file.read_text(encoding="utf-8").strip()
        try:
            if self.client.get_run(run).info.lifecycle_stage == "active":
                self.client.update_run(run, status="RUNNING")
                return run
        except need("mlflow.exceptions", "mlflow").MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        print(f"MLflow has no run {run} any more; another is begun")
        return None

    def _begin(self, run_dir: Path, settings: Mapping[str, Any], artifacts: Path | None) -> str:
        """A new run, with its settings."""
        known = self.client.get_experiment_by_name(EXPERIMENT)
        place = None if artifacts is None else artifacts.as_uri()
        experiment = known.experiment_id if known else self.client.create_experiment(
            EXPERIMENT, artifact_location=place
        )  # fmt: skip
        run: str = self.client.create_run(experiment, run_name=run_dir.name).info.run_id
        write_text(run_dir / "mlflow-run", run)
        param = self.entities.Param
        self.client.log_batch(run, params=[param(n, str(v)) for n, v in settings.items()])
        return run

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        metrics = [self.entities.Metric(n, v, now, step) for n, v in scalars.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def log_epoch(
        self, epoch: int, scalars: Mapping[str, float], figures: Mapping[str, Figure]
    ) -> None:
        if epoch in self.recorded:
            return
        for tag, figure in figures.items():
            self.client.log_figure(self.run, figure, f"{tag}/{epoch:04d}.png")
        self._log(scalars, epoch)

    def log_end(
        self, epoch: int, settings: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        if not self.client.get_metric_history(self.run, next(iter(metrics))):
            self._log(metrics, epoch)
        self.client.set_terminated(self.run)


# --- what is recorded ---------------------------------------------------------------------------

TRACKERS: dict[str, MakeTracker] = {"tensorboard": TensorBoardTracker, "mlflow": MLflowTracker}


def find_tracker(name: str) -> MakeTracker:
    """What makes a tracker, by its name; raises ``ConfigError`` if its package is missing."""
    need({"tensorboard": "torch.utils.tensorboard"}.get(name, name), name)
    return TRACKERS[name]


def epoch_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an epoch's row in the history, grouped: ``val_loss`` is ``val/loss``."""
    figures = {name: float(value) for name, value in row.items() if name != "epoch"}
    return {
        GROUP.sub(r"\1/", name) if GROUP.match(name) else f"run/{name}": value
        for name, value in figures.items()
    }


def plot_examples(pictures: Pictures, answers: Predictions, classes: Names) -> Figure:
    """Some validation images, [H, W, 3] each, with their `answers`; a wrong one is framed red."""
    rows = zip(answers.labels, answers.predicted, answers.probabilities.max(1), strict=True)
    titles = [
        f"{classes[said]} {share:.0%}" + ("" if said == true else f"\nis {classes[true]}")
        for true, said, share in rows
    ]
    frames = [GREEN if good else RED for good in answers.labels == answers.predicted]
    return plot_image_grid(pictures, titles, columns=4, frames=frames)


def epoch_recorder(tracker: Tracker, val: EmotionDataset) -> OnEpoch:
    """What records each epoch: its figures, and how the images of `val` are answered."""
    some = np.linspace(0, len(val) - 1, min(EXAMPLES, len(val))).round().astype(np.int64)
    pictures = val.pictures(some)

    def record(row: Mapping[str, Any], answers: Predictions) -> None:
        few = Predictions(answers.labels[some], answers.probabilities[some], answers.loss)
        every = range(len(val.classes))
        confusion = confusion_matrix(answers.labels, answers.predicted, labels=every)
        figures = {
            "val/confusion": plot_confusion(confusion, val.classes),
            "val/examples": plot_examples(pictures, few, val.classes),
        }
        tracker.log_epoch(row["epoch"], epoch_scalars(row), figures)

    return record


def final_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a run's summary, by split and name."""
    return {
        f"final/{split}_{name}": estimate["value"]
        for split, found in summary["metrics"].items()
        for name, estimate in found.items()
    }
