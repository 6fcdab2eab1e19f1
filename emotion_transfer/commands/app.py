"""Show what a model says of pictures, and which part of them argues for it, on a page."""

import argparse
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import getproxies

import numpy as np
import torch

from emotion_toolbox.decoding import MAX_IMAGE_PIXELS, decode_image, read_image_bytes
from emotion_toolbox.errors import ConfigError, DataError, ImageError
from emotion_toolbox.extras import need
from emotion_toolbox.export import ExportedModel, load_export, predict_squares, top_classes
from emotion_toolbox.figures import Picture, overlay_heat
from emotion_toolbox.pixels import Floats, prepare_images
from emotion_toolbox.prepare import list_files
from emotion_toolbox.probes import grad_cam
from emotion_toolbox.sample import paint_picture
from emotion_toolbox.tables import MIKELS_CLASSES
from emotion_transfer.commands.predict import (
    DECODING_MEMORY,
    find_export,
    limit_memory,
    network_of,
)

EXAMPLE = """examples:
  python -m emotion_transfer app                           the newest run
  python -m emotion_transfer app --model outputs/RUN_NAME --examples holiday/

The page is served to this machine alone, and needs no connection. Ctrl-C ends it, and the pictures
that it was given are deleted."""
MAX_UPLOAD = 64 * 2**20  # bytes
SHOWN_SIDE = 448  # pixels, at least, of a picture under its map
SHOWN_CLASSES = 8
EXAMPLES = 8
HEIGHT = 360  # of a picture on the page, in pixels
BEGIN = (
    f"Drop or paste a picture, of {MAX_UPLOAD / 2**20:.0f} MiB and "
    f"{MAX_IMAGE_PIXELS / 1e6:.0f} megapixels at most."
)
CSS = """
.html-container { padding: 0 !important }
mark:not(:empty) { background: #FFD54F; color: black; padding: 2px 6px; border-radius: 4px;
                   display: inline-block }
[role=alert] { border-left: 4px solid #D55E00; padding-left: 8px; display: inline-block }
"""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


class Answer(NamedTuple):
    """What the page shows: a message and a caption in HTML, probabilities, and a picture."""

    message: str
    ranked: dict[str, float] | None
    overlay: Picture | None
    caption: str


def need_gradio() -> Any:
    """The package, told to send and keep nothing; ``ConfigError`` where it is not installed."""
    direct = [*filter(None, [getproxies().get("no")]), "127.0.0.1", "localhost", "0.0.0.0"]
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_RUN_HISTORY": "False", "no_proxy": ",".join(direct),
    }  # fmt: skip
    return need("gradio", "app")


def explain(exported: ExportedModel, data: bytes) -> tuple[Floats, Picture, str]:
    """What `exported` says of an image file's bytes, and why.

    Returns the class probabilities [C], the square that the network sees, enlarged, under the heat
    map of Grad-CAM for the most probable class (uint8 [S, S, 3]), and the size of that map, "4 x
    4". Raises ``ImageError`` for bytes that are no usable image.
    """
    square = decode_image(data, exported.resize, exported.fit)
    shares = predict_squares(exported, [square])[0]
    images = torch.from_numpy(np.stack([square])).permute(0, 3, 1, 2)
    inputs = prepare_images(images, exported.image_size, exported.spec.mean, exported.spec.std)
    last = list(exported.spec.stages.values())[-1][-1]  # that still knows where things are
    layer = exported.model.get_submodule(f"backbone.{last}")
    heat = grad_cam(exported.model, layer, inputs, shares.argmax(keepdims=True))
    times = -(-SHOWN_SIDE // exported.image_size)
    large = decode_image(data, times * exported.resize, exported.fit)
    first = times * round((exported.resize - exported.image_size) / 2)
    inside = slice(first, first + times * exported.image_size)
    overlay = overlay_heat(large[None, inside, inside], heat)[0]
    return shares, overlay, f"{heat.shape[1]} x {heat.shape[2]}"


def answer(exported: ExportedModel, given: Mapping[str, Any] | None) -> Answer:
    """What the page shows of an uploaded file.

    `given` has the file's `path` and the name that it had, `orig_name`; None: it was taken away.
    """
    if given is None:
        return Answer(BEGIN, None, None, "")
    path = Path(given["path"])
    try:
        shares, overlay, cells = explain(exported, read_image_bytes(path))
    except ImageError as error:
        name, reason = escape(given.get("orig_name") or path.name), escape(str(error))
        problem = f"<span role='alert'><b>{name} cannot be used:</b> {reason}</span>"
        return Answer(problem, None, None, "")
    ranked = dict(top_classes(shares, exported.classes, SHOWN_CLASSES))
    caption = (
        f"Bright is what argued for <b>{escape(next(iter(ranked)))}</b> (Grad-CAM, in a map of "
        f"only {cells} cells). What is not shown here, the network did not see."
    )
    return Answer(BEGIN, ranked, overlay, caption)


def example_files(exported: ExportedModel, given: Path | None, folder: Path) -> list[Path]:
    """Pictures to try, in `folder`: copies of some in `given`; None: drawn, for the sample.

    Raises ``DataError`` if `given` holds no images.
    """
    files = []
    if given is not None:
        images = list_files(given)[0]
        step = max(1, len(images) // EXAMPLES)  # spread, for classes lie side by side
        for number, image in enumerate(images[::step][:EXAMPLES]):
            files.append(folder / str(number) / image.name)
            files[-1].parent.mkdir(parents=True)
            shutil.copyfile(image, files[-1])
        if not files:
            raise DataError(f"--examples {given}: no images there")
    elif exported.synthetic:
        folder.mkdir(parents=True)
        for number, label in enumerate(MIKELS_CLASSES):
            files.append(folder / f"{label}.png")
            paint_picture(label, (number, 1), SHOWN_SIDE).save(files[-1])
    return files


def texts(exported: ExportedModel) -> tuple[str, str, str]:
    """The page's title, a warning, if any, and what must be known of its answers."""
    notes = (
        "Probabilities are calibrated: where pictures are like those of the training, about 70 % "
        "of the answers given at 70 % are right."
    )
    title, warning = "What does this picture show?", ""
    if set(exported.classes) <= set(MIKELS_CLASSES):
        title = "Which emotion does this picture evoke?"
        notes += " The model judges pictures, not people: it says nothing of what somebody feels."
    if exported.synthetic:
        warning = "Trained on the synthetic sample: what it says of photographs means nothing."
    return title, warning, notes


def make_page(gr: Any, exported: ExportedModel, examples: Sequence[Path]) -> Any:
    """The page, as Gradio's blocks."""
    title, warning, notes = texts(exported)
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{title}</h1><mark>{warning}</mark>")
        message = gr.HTML(BEGIN)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label="Picture", sources=["upload", "clipboard"], height=HEIGHT,
                    buttons=["fullscreen"],
                )  # fmt: skip
                if examples:
                    gr.Examples([[str(file)] for file in examples], picture)
            with gr.Column():
                ranked = gr.Label(label="Probability", num_top_classes=SHOWN_CLASSES)
            with gr.Column():
                overlay = gr.Image(
                    label="What argued for it", interactive=False, height=HEIGHT, format="png",
                    buttons=["fullscreen", "download"],
                )  # fmt: skip
                caption = gr.HTML(padding=False)
        gr.HTML(f"<small>{notes}</small>")

        def show(given: dict[str, Any] | None) -> dict[Any, Any]:
            found = answer(exported, given)
            shown = dict(zip((message, ranked, overlay, caption), found, strict=True))
            if given is None:
                del shown[message]  # it may say why the picture was taken away
            elif found.ranked is None:
                shown[picture] = None
            return shown

        outputs = [picture, message, ranked, overlay, caption]
        # without preprocessing: the file as it came, for Gradio's decoder is another
        picture.change(show, picture, outputs, preprocess=False, api_visibility="private")
    return page


@contextlib.contextmanager
def served(exported: ExportedModel, examples: Path | None, host: str, port: int) -> Iterator[str]:
    """The page's address while it is served; what was uploaded is deleted at the end."""
    gr = need_gradio()
    with tempfile.TemporaryDirectory(prefix="emotion-transfer-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        page = make_page(gr, exported, example_files(exported, examples, Path(scratch, "examples")))
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, max_file_size=MAX_UPLOAD, share=False,
                prevent_thread_lock=True, quiet=True, ssr_mode=False, footer_links=[],
                theme=gr.themes.Soft(**FONTS), css=CSS, allowed_paths=[f"{scratch}/examples"],
            )  # fmt: skip
            yield address
        finally:
            page.close(verbose=False)


def check_port(host: str, port: int) -> None:
    """Raise ``ConfigError`` where no server can listen."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        number = error.errno or 0  # negative where the name of the host is at fault
        reason = os.strerror(number) if number > 0 else str(error.strerror).partition(" (")[0]
        raise ConfigError(f"{host}, port {port}: {reason}; give another: --port NUMBER") from error


def port_number(text: str) -> int:
    """A number from 1 to 65535; raises ``ValueError``."""
    if not 1 <= (number := int(text)) <= 65535:
        raise ValueError
    return number


def main(arguments: list[str] | None = None, memory: int | None = DECODING_MEMORY) -> int:
    """Serve the page until Ctrl-C.

    The model once loaded, this process may take so many bytes of `memory`; None: any amount.
    """
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer app",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "an export or a run that has one (default: the newest under outputs/)"
    parser.add_argument("--model", type=Path, metavar="FOLDER", help=where)
    few = f"pictures to try, {EXAMPLES} at most (default: drawn ones, for a model of the sample)"
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help=few)
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; 0.0.0.0: any")
    parser.add_argument("--port", type=port_number, default=7860, help="default 7860")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    args = parser.parse_args(arguments)
    need_gradio()
    check_port(args.host, args.port)
    exported = load_export(find_export(args.model), network_of, args.device)
    if memory is not None:
        limit_memory(memory)
    with (
        contextlib.suppress(KeyboardInterrupt),
        served(exported, args.examples, args.host, args.port) as address,
    ):
        print(f"{address} (Ctrl-C ends it)", flush=True)
        while True:  # a lock would not hear Ctrl-C on Windows
            time.sleep(3600)
    return 0
