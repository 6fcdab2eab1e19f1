"""Write an export as one ONNX file: decoded pictures in, calibrated probabilities out."""

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from emotion_toolbox.cache import DecodedPixels
from emotion_toolbox.errors import ExportError
from emotion_toolbox.extras import need
from emotion_toolbox.export import ExportedModel, load_export, predict_squares
from emotion_toolbox.files import absolute, count_threads, write_atomically
from emotion_toolbox.pixels import channel_constants
from emotion_toolbox.tables import load_splits
from emotion_transfer.commands.predict import find_export, network_of

EXAMPLE = """examples:
  python -m emotion_transfer onnx                          the newest run, into its export folder
  python -m emotion_transfer onnx --model outputs/RUN_NAME --output emotions.onnx
  python -m emotion_transfer onnx --int8 data/processed/pictures

The network's input is uint8 [images, side, side, 3], RGB: pictures made square and resized as
`python -m emotion_transfer predict` does. Their side, how they are made square, and the classes
stand in the file's metadata."""
INPUT, OUTPUT = "pictures", "probabilities"
CALIBRATION = 200  # training images by which the ranges for int8 are chosen
TOLERANCE = 1e-4  # of a probability; what ONNX Runtime may differ from PyTorch
Squares = npt.NDArray[np.uint8]  # [N, S, S, 3]


class AnsweringModel(nn.Module):
    """Decoded pictures, uint8 [N, S, S, 3], to probabilities [N, C]: all that `predict` does."""

    mean: Tensor
    std: Tensor

    def __init__(self, exported: ExportedModel) -> None:
        super().__init__()
        self.network, self.tta = exported.model, exported.tta
        self.size, self.temperature = exported.image_size, exported.temperature
        self.first = round((exported.resize - self.size) / 2)
        mean, std = channel_constants(exported.spec.mean, exported.spec.std, torch.device("cpu"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pictures: Tensor) -> Tensor:
        inside = slice(self.first, self.first + self.size)
        images = pictures.permute(0, 3, 1, 2)[:, :, inside, inside].float()
        images = (images / 255 - self.mean) / self.std
        shares = self.network(images).softmax(1)
        if self.tta:
            shares = (shares + self.network(images.flip(3)).softmax(1)) / 2
        calibrated: Tensor = (shares.log() / self.temperature).softmax(1)
        return calibrated


def export_onnx(exported: ExportedModel, file: Path) -> Path:
    """Write `exported`, which is on the CPU, to `file` and compare it with PyTorch.

    Raises ``ConfigError`` if a package is missing, and ``ExportError`` if a probability differs by
    more than TOLERANCE.
    """
    onnx = need("onnx", "onnx")
    need("onnxscript", "onnx")
    example = torch.zeros(2, exported.resize, exported.resize, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            AnsweringModel(exported).eval(), (example,), dynamo=True, verbose=False,
            input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("images")}},
        )  # fmt: skip
    model = program.model_proto
    about = {
        "classes": json.dumps(exported.classes, ensure_ascii=False), "side": str(exported.resize),
        "fit": exported.fit, "synthetic": str(exported.synthetic).lower(),
    }  # fmt: skip
    onnx.helper.set_model_props(model, about)
    content = model.SerializeToString()
    noise = np.random.default_rng(0).integers(0, 256, (3, *example.shape[1:]), dtype=np.uint8)
    worst = float(np.abs(run_onnx(content, noise) - predict_squares(exported, list(noise))).max())
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{file} would answer otherwise than PyTorch, by {worst:.2g}; not written"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda target: target.write(content))
    return file


def open_onnx(network: Path | bytes, threads: int = 0) -> Any:
    """A session of ONNX Runtime for a file or its content, on the CPU; 0 `threads`: one a core."""
    runtime = need("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads
    source = network if isinstance(network, bytes) else str(network)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_onnx(network: Path | bytes, squares: Squares) -> npt.NDArray[np.float32]:
    """Probabilities [N, C] of decoded pictures, by ONNX Runtime."""
    return np.asarray(open_onnx(network).run([OUTPUT], {INPUT: np.ascontiguousarray(squares)})[0])


def calibration_squares(exported: ExportedModel, root: Path) -> Squares:
    """Training pictures of the data in `root`, spread; ``DataError`` where one is bad."""
    train = load_splits(root).splits["train"]
    some = np.linspace(0, len(train) - 1, min(len(train), CALIBRATION)).round().astype(np.int64)
    return DecodedPixels(train, exported.resize, count_threads(None), exported.fit)[some]


def quantize(file: Path, squares: Squares, target: Path) -> Path:
    """Write the network in `file` with int8 weights and activations to `target`.

    Static, a scale a channel, with the ranges that `squares` show ("post-training quantisation",
    Jacob et al. 2018, arXiv 1712.05877). The answer itself stays in float32.
    """
    tools = need("onnxruntime.quantization", "onnx")
    prepare = need("onnxruntime.quantization.shape_inference", "onnx").quant_pre_process

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[Squares] = iter(np.array_split(squares, -(-len(squares) // 8)))

        def get_next(self) -> dict[str, Squares] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as scratch:
        ready, made = (Path(scratch) / name for name in ("ready.onnx", "made.onnx"))
        prepare(str(file), str(ready), skip_symbolic_shape=True)
        tools.quantize_static(
            str(ready), str(made), Reader(), per_channel=True,
            quant_format=tools.QuantFormat.QDQ, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )  # fmt: skip
        write_atomically(target, lambda file: file.write(made.read_bytes()))
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer onnx",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "an export or a run that has one (default: the newest under outputs/)"
    parser.add_argument("--model", type=Path, metavar="FOLDER", help=where)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside the export")
    small = "write a second file too, in int8, with the ranges that training pictures there show"
    parser.add_argument("--int8", type=Path, metavar="DATA_ROOT", help=small)
    args = parser.parse_args(arguments)
    folder = find_export(args.model)
    exported = load_export(folder, network_of)
    squares = None if args.int8 is None else calibration_squares(exported, absolute(args.int8))
    file = export_onnx(exported, absolute(args.output or folder / "model.onnx"))
    print(file)
    if squares is not None:
        print(quantize(file, squares, file.with_suffix(".int8.onnx")))
    return 0
