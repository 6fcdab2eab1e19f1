"""Several exports that answer as one, views of a picture, and answers that are not given."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from emotion_toolbox.decoding import decode_image, read_image_bytes
from emotion_toolbox.errors import ExportError
from emotion_toolbox.export import ExportedModel, predict_squares
from emotion_toolbox.measures import Floats, Labels, apply_temperature

VIEWS = ("none", "flip", "crops")  # of test-time augmentation
Square = npt.NDArray[np.uint8]
Preparation = tuple[int, str]  # side and fit of the squares that an export takes


@dataclass(frozen=True)
class Ensemble:
    """Exports of the same classes; an answer is the mean of their calibrated probabilities."""

    members: tuple[ExportedModel, ...]
    views: str | None = None  # one of VIEWS; None: as each export says

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the first member."""
        return self.members[0].classes

    @property
    def preparations(self) -> tuple[Preparation, ...]:
        """What each picture must be prepared as, each once."""
        return tuple(dict.fromkeys((one.resize, one.fit) for one in self.members))


def make_ensemble(
    members: Sequence[ExportedModel], folders: Sequence[Path], views: str | None = None
) -> Ensemble:
    """The ensemble of `members`, from these `folders`.

    Raises ``ExportError`` where one has other classes than the first, or is named twice.
    """
    for number, (member, folder) in enumerate(zip(members, folders, strict=True)):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise ExportError(f"{folder} is named twice; it would count twice")
        if set(member.classes) != set(members[0].classes):
            raise ExportError(
                f"{folder} knows the classes {', '.join(member.classes)}, and {folders[0]} knows "
                f"{', '.join(members[0].classes)}; an ensemble needs the same"
            )
    return Ensemble(tuple(members), views)


def prepare_picture(path: Path, preparations: Sequence[Preparation]) -> list[Square]:
    """A picture as a square a preparation; raises ``ImageError``."""
    data = read_image_bytes(path)
    return [decode_image(data, side, fit) for side, fit in preparations]


def predict_views(exported: ExportedModel, squares: Sequence[Square], views: str | None) -> Floats:
    """Class probabilities [N, C] of N squares, the mean over `views` of each (see ``VIEWS``).

    "none": the centre; "flip": and its mirror image; "crops": centre and corners, and the mirror
    images of these (Krizhevsky et al. 2012).
    """
    if views != "crops":
        tta = exported.tta if views is None else views == "flip"
        return predict_squares(replace(exported, tta=tta), squares)
    side, far = exported.image_size, exported.resize - exported.image_size
    middle = round(far / 2)
    corners = [(top, left) for top in (0, far) for left in (0, far)]
    plain = replace(exported, tta=True, temperature=1.0)
    shares = [
        predict_squares(plain, [s[top : top + side, left : left + side] for s in squares])
        for top, left in [(middle, middle), *corners]
    ]
    return apply_temperature(np.mean(shares, axis=0), exported.temperature)


def member_answers(ensemble: Ensemble, pictures: Sequence[Sequence[Square]]) -> list[Floats]:
    """What each member says of N prepared pictures: [N, C], in the order of the ensemble."""
    found = []
    for member in ensemble.members:
        place = ensemble.preparations.index((member.resize, member.fit))
        order = [member.classes.index(name) for name in ensemble.classes]
        squares = [picture[place] for picture in pictures]
        found.append(predict_views(member, squares, ensemble.views)[:, order])
    return found


def predict_together(ensemble: Ensemble, pictures: Sequence[Sequence[Square]]) -> Floats:
    """Class probabilities [N, C] of N prepared pictures."""
    return np.asarray(np.mean(member_answers(ensemble, pictures), axis=0))


def measure_speed(exported: ExportedModel, views: str, images: int = 32, repeats: int = 5) -> float:
    """Images a second that `exported` answers, decoding aside: the median over the repeats."""
    squares = [np.zeros((exported.resize, exported.resize, 3), np.uint8)] * images
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        predict_views(exported, squares, views)
        if next(exported.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return images / median(seconds[1:])  # the first warms up


# --- answers that are not given -----------------------------------------------------------------


def threshold_for(confidence: Floats, coverage: float) -> float:
    """The least confidence at which at least the share `coverage` of images [N] is answered."""
    wanted = max(1, int(np.ceil(round(coverage * len(confidence), 9))))
    return float(np.sort(confidence)[::-1][wanted - 1])


def risk_coverage(labels: Labels, probabilities: Floats) -> pd.DataFrame:
    """How many answers are wrong if only the surest are given (Geifman and El-Yaniv 2017).

    A row for each number of answers, from one to all: coverage, risk (the share of wrong ones among
    them) and threshold. Images of equal confidence share their errors, so that their order does not
    count. The mean of `risk` is the area under the curve (AURC).
    """
    confidence = probabilities.max(axis=1)
    wrong = pd.Series(probabilities.argmax(axis=1) != labels, dtype=float)
    shared = wrong.groupby(confidence).transform("mean").to_numpy()
    order = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(labels) + 1)
    return pd.DataFrame({
        "coverage": count / len(labels),
        "risk": np.cumsum(shared[order]) / count,
        "threshold": confidence[order],
    })  # fmt: skip
