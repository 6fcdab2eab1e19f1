"""Decoding: every good file becomes the right square of RGB, every bad one an ImageError."""

import io
import os
import resource
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import BmpImagePlugin, Image, ImageDraw, ImageOps, features
from torchvision.transforms.v2 import functional as tv

from emotion_toolbox import decoding
from emotion_toolbox.decoding import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    PAD_COLOUR,
    decode_image,
    image_suffixes,
    read_image_bytes,
    readable_formats,
)
from emotion_toolbox.errors import ImageError

Pixels = npt.NDArray[np.uint8]


def smooth(width: int = 120, height: int = 90) -> Pixels:
    """A picture without symmetry, smooth enough for lossy formats: uint8 [height, width, 3]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [x, y, (x * y + np.sin(7 * x) * 0.3) * 0.8 + 0.2]
    picture = np.clip(np.stack(planes, -1) * 255, 0, 255).astype(np.uint8)
    picture[: height // 4, : width // 3] = (230, 40, 20)  # tells the corners apart
    return picture


def encode(image: Image.Image | Pixels, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bicubic_weights(pixels: int, start: float, side: float, size: int) -> npt.NDArray[np.float64]:
    """Keys's antialiased cubic (a = -1/2) of `size` samples in a window: [size, pixels]."""
    scale = side / size
    centres = start + (np.arange(size) + 0.5) * scale
    t = np.abs(np.arange(pixels)[None] + 0.5 - centres[:, None]) / max(scale, 1)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def reference(rgb: npt.NDArray[Any], size: int) -> npt.NDArray[np.float64]:
    """The centre square of [H, W, 3], resampled in float: [size, size, 3]."""
    height, width, _ = rgb.shape
    side = min(height, width)
    rows = bicubic_weights(height, (height - side) / 2, side, size)
    columns = bicubic_weights(width, (width - side) / 2, side, size)
    square = np.einsum(
        "yh,hwc,xw->yxc", rows, np.asarray(rgb, dtype=np.float64), columns, optimize=True
    )
    return np.clip(square, 0, 255)


def assert_close(ours: Pixels, expected: npt.NDArray[Any], mean: float, most: float) -> None:
    """Mean and largest absolute difference are at most `mean` and `most` grey levels.

    At a hard edge Pillow clips between its two passes, which the reference does not.
    """
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    difference = np.abs(ours.astype(float) - expected)
    assert difference.mean() <= mean, difference.mean()
    assert difference.max() <= most, difference.max()


# ------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(64, 64, 64), (64, 64, 32), (90, 60, 30), (60, 90, 30), (91, 60, 37), (60, 91, 37)]
    + [(100, 75, 40), (75, 100, 40), (20, 30, 48), (33, 50, 70), (64, 65, 64), (129, 64, 64)],
)
def test_the_centre_square_to_a_fraction_of_a_pixel(width: int, height: int, size: int) -> None:
    picture = smooth(width, height)
    assert_close(decode_image(encode(picture), size), reference(picture, size), mean=0.6, most=2)


@pytest.mark.parametrize(("width", "height"), [(256, 128), (128, 256), (192, 128), (128, 128)])
def test_torchvision_agrees_where_it_need_not_round(width: int, height: int) -> None:
    picture = smooth(width, height)
    planes = torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)
    resized = tv.resize(planes, [64], tv.InterpolationMode.BICUBIC, antialias=True)
    expected = tv.center_crop(resized, [64, 64]).clamp(0, 255).permute(1, 2, 0).numpy()
    assert_close(decode_image(encode(picture), 64), expected, mean=0.6, most=2)


def test_large_reductions_stay_antialiased() -> None:
    checks = (np.indices((900, 900)).sum(0) % 2 * 255).astype(np.uint8)  # one pixel fine
    ours = decode_image(encode(np.dstack([checks] * 3)), 32)
    assert np.abs(ours.astype(int) - 127.5).max() < 3  # a skipped pixel would be 0 or 255


def test_the_centre_is_kept_and_the_sides_are_not() -> None:
    picture = np.zeros((50, 250, 3), np.uint8)
    picture[:, 100:150] = (10, 200, 30)
    inner = decode_image(encode(picture), 50)[:, 2:-2]
    assert (inner == (10, 200, 30)).all()


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (1030, 1024), (257, 300)])
def test_a_jpeg_decoded_at_a_fraction_of_its_size_is_the_same_picture(
    width: int, height: int, quality: int, options: dict[str, Any]
) -> None:
    raw = encode(smooth(width, height), "JPEG", quality=quality, **options)
    with Image.open(io.BytesIO(raw)) as full:
        expected = reference(np.asarray(full.convert("RGB")), 64)
    assert_close(decode_image(raw, 64), expected, mean=2.0, most=60)


# ------------------------------------------------------------------- images that are not square

SHAPES = [(120, 90), (90, 120), (91, 60), (60, 91), (64, 64), (20, 30), (33, 50), (300, 7), (9, 80)]


def pillow_fit(image: Image.Image, size: int, fit: str) -> Pixels:
    """What Pillow's own functions make of an upright RGB image."""
    square, way = (size, size), Image.Resampling.BICUBIC
    fitted = {
        "crop": lambda: ImageOps.fit(image, square, way),
        "pad": lambda: ImageOps.pad(image, square, way, PAD_COLOUR),
        "squash": lambda: image.resize(square, way),
    }
    return np.asarray(fitted[fit]())


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [32, 37])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_each_fit_is_that_of_pillow(width: int, height: int, size: int, fit: str) -> None:
    picture = Image.fromarray(smooth(width, height))
    ours, expected = decode_image(encode(picture), size, fit), pillow_fit(picture, size, fit)
    # less exact where a long side is first reduced by a whole factor
    assert_close(ours, expected, mean=0.6, most=2 if max(width, height) < 6 * size else 16)


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(120, 90), (90, 121)])
def test_a_picture_is_turned_upright_before_it_is_padded(
    width: int, height: int, orientation: int, fit: str
) -> None:
    """One bar is a pixel wider than the other, and it must be the same one after a turn."""
    stored = Image.fromarray(smooth(width, height))
    exif = stored.getexif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(stored)
    raw = encode(stored, exif=exif)
    assert_close(decode_image(raw, 37, fit), pillow_fit(upright, 37, fit), mean=0.6, most=2)


def test_the_bars_are_the_colour_that_networks_see_as_nothing() -> None:
    from emotion_toolbox.backbones import BACKBONES, IMAGENET_MEAN

    assert tuple(round(255 * mean) for mean in IMAGENET_MEAN) == PAD_COLOUR
    for spec in BACKBONES.values():
        seen = (np.array(PAD_COLOUR) / 255 - spec.mean) / spec.std
        assert np.abs(seen).max() < 0.2
    ours = decode_image(encode(np.full((10, 40), 200, np.uint8)), 40, "pad")  # greyscale too
    assert (ours[:15] == PAD_COLOUR).all() and (ours[25:] == PAD_COLOUR).all()
    assert (ours[15:25] == 200).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white_whatever_the_fit(mode: str, fit: str) -> None:
    picture = Image.fromarray(smooth()).convert(mode)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    ours = decode_image(encode(picture), 32, fit)
    assert_close(ours, pillow_fit(flat, 32, fit), mean=0.8, most=3)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_a_fitted_jpeg_decoded_at_a_fraction_of_its_size_is_the_same_picture(fit: str) -> None:
    raw = encode(smooth(1031, 612), "JPEG", quality=95)
    with Image.open(io.BytesIO(raw)) as full:
        expected = pillow_fit(full.convert("RGB"), 64, fit)
    assert_close(decode_image(raw, 64, fit), expected, mean=2, most=60)


@pytest.mark.parametrize("fit", ["", "Crop", "stretch", None])
def test_an_unknown_fit_is_an_error_and_no_bad_image(fit: Any) -> None:
    with pytest.raises(ValueError, match="crop.*pad.*squash"):
        decode_image(PNG, 32, fit)


# ------------------------------------------------------------------- orientation

# what a viewer does to the stored array, from the TIFF 6.0 specification of each orientation
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def orientation(value: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", sorted(UPRIGHT))
def test_exif_orientation(value: int, kind: str) -> None:
    stored = smooth(96, 64)
    options: dict[str, Any] = {
        "PNG": {},
        "TIFF": {},
        "JPEG": {"quality": 98, "subsampling": 0},
        "WEBP": {"lossless": True},
    }[kind]
    if kind == "TIFF":
        options["tiffinfo"] = {0x0112: value}
    else:
        options["exif"] = orientation(value)
    expected = reference(np.ascontiguousarray(UPRIGHT[value](stored)), 32)
    assert_close(decode_image(encode(stored, kind, **options), 32), expected, mean=1.5, most=15)


def test_a_large_jpeg_is_turned_after_its_quick_decoding() -> None:
    stored = smooth(1200, 800)
    raw = encode(stored, "JPEG", quality=95, exif=orientation(6))
    expected = reference(np.ascontiguousarray(UPRIGHT[6](stored)), 64)
    assert_close(decode_image(raw, 64), expected, mean=2, most=60)


BROKEN_EXIF = {
    "garbage": b"Exif\0\0garbage, garbage",
    "empty": b"Exif\0\0",
    "cut in the header": orientation(6)[:14],
    "cut in the tag": orientation(6)[:20],
    "points nowhere": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "BigTIFF cut short": b"Exif\0\0II\x2b\0" + bytes(20),
    "no such orientation": orientation(9),
    "zero": orientation(0),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("case", BROKEN_EXIF)
def test_broken_exif_data_turns_nothing_and_spoils_nothing(case: str, kind: str) -> None:
    raw = encode(smooth(), kind, exif=BROKEN_EXIF[case])
    np.testing.assert_array_equal(decode_image(raw, 32), decode_image(encode(smooth(), kind), 32))


# ------------------------------------------------------------------- modes


def over_white(rgba: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Alpha compositing over white in float."""
    alpha = rgba[..., 3:] / 255.0
    return np.asarray(rgba[..., :3] * alpha + 255 * (1 - alpha), dtype=np.float64)


def test_palette() -> None:
    indexed = Image.fromarray(smooth()).quantize(32)
    expected = reference(np.asarray(indexed.convert("RGB")), 32)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert_close(decode_image(encode(indexed, kind), 32), expected, mean=0.6, most=3)


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255, 64]), bytes(range(0, 256, 8))])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    indexed = Image.fromarray(smooth()).quantize(32)
    raw = encode(indexed, "PNG", transparency=transparency)
    index = np.asarray(indexed)
    palette = np.asarray(indexed.getpalette(), dtype=np.uint8).reshape(-1, 3)
    alpha = np.full(256, 255, np.uint8)
    if isinstance(transparency, int):
        alpha[transparency] = 0
    else:
        alpha[: len(transparency)] = list(transparency)
    expected = over_white(np.dstack([palette[index], alpha[index]]))
    assert_close(decode_image(raw, 32), reference(expected, 32), mean=0.7, most=7)


def test_transparent_gif() -> None:
    indexed = Image.fromarray(smooth()).quantize(16)
    raw = encode(indexed, "GIF", transparency=2)
    with Image.open(io.BytesIO(raw)) as read:
        expected = over_white(np.asarray(read.convert("RGBA")))
    assert (np.asarray(indexed) == 2).any()
    assert_close(decode_image(raw, 32), reference(expected, 32), mean=0.7, most=7)


def test_rgba_over_white() -> None:
    rgba = np.dstack([smooth(), np.tile(np.linspace(0, 255, 120).astype(np.uint8), (90, 1))])
    for kind in ("PNG", "TIFF"):
        ours = decode_image(encode(rgba, kind), 32)
        assert_close(ours, reference(over_white(rgba), 32), mean=1, most=4)
    webp = decode_image(encode(rgba, "WEBP", lossless=True, exact=True), 32)
    assert_close(webp, reference(over_white(rgba), 32), mean=1, most=4)


def test_what_is_transparent_leaves_no_colour_at_its_edge() -> None:
    rgba = np.zeros((80, 80, 4), np.uint8)
    rgba[..., 0] = 255  # transparent red ...
    rgba[20:60, 20:60] = (0, 0, 255, 255)  # ... around opaque blue
    ours = decode_image(encode(rgba), 31).astype(int)
    assert (ours[..., 0] <= ours[..., 2] + 1).all()  # from blue to white, red is never ahead
    assert_close(ours.astype(np.uint8), reference(over_white(rgba), 31), mean=1, most=4)


def test_grey_with_alpha_over_white() -> None:
    grey = smooth()[..., 2]
    alpha = np.tile(np.linspace(0, 255, 120).astype(np.uint8), (90, 1))
    expected = over_white(np.dstack([grey, grey, grey, alpha]))
    ours = decode_image(encode(Image.merge("LA", [*map(Image.fromarray, (grey, alpha))])), 32)
    assert_close(ours, reference(expected, 32), mean=1, most=4)


@pytest.mark.parametrize("key", [(230, 40, 20), (1, 2, 3)])
def test_rgb_with_a_transparent_colour(key: tuple[int, int, int]) -> None:
    picture = smooth()
    alpha = np.where((picture == key).all(-1), 0, 255)
    ours = decode_image(encode(picture, transparency=key), 31)
    expected = reference(over_white(np.dstack([picture, alpha])), 31)
    assert_close(ours, expected, mean=0.7, most=7)


def test_grey_with_a_transparent_value() -> None:
    grey = np.full((60, 60), 200, np.uint8)
    grey[20:40] = 50
    ours = decode_image(encode(grey, transparency=50), 60)
    assert (ours[24:36] == 255).all() and (ours[:16] == 200).all()


def test_greyscale() -> None:
    grey = smooth()[..., 2]
    for kind in ("PNG", "TIFF", "BMP", "GIF", "PPM"):
        ours = decode_image(encode(grey, kind), 32)
        assert (ours[..., 0] == ours[..., 1]).all() and (ours[..., 0] == ours[..., 2]).all()
        assert_close(ours, reference(np.dstack([grey] * 3), 32), mean=0.6, most=3)
    jpeg = decode_image(encode(grey, "JPEG", quality=97), 32)
    assert_close(jpeg, reference(np.dstack([grey] * 3), 32), mean=1.5, most=12)


def test_one_bit() -> None:
    bits = smooth()[..., 0] > 100
    expected = reference(np.dstack([bits * 255.0] * 3), 32)
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert_close(decode_image(encode(Image.fromarray(bits), kind), 32), expected, 0.7, 7)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bit_greyscale_is_not_white(kind: str) -> None:
    wide = np.round(np.linspace(0, 65535, 90 * 120)).reshape(90, 120).astype(np.uint16)
    ours = decode_image(encode(wide, kind), 32)
    assert_close(ours, reference(np.dstack([wide / 257.0] * 3), 32), mean=1.0, most=3)


def test_16_bit_greyscale_with_a_transparent_value() -> None:
    wide = np.full((40, 40), 0x4000, np.uint16)
    wide[:20] = 0x8000
    ours = decode_image(encode(wide, transparency=0x8000), 40)
    assert (ours[:16] == 255).all() and (ours[24:] == 0x40).all()


def png_16_bit_rgb(wide: npt.NDArray[np.uint16]) -> bytes:
    """A 48-bit PNG, which Pillow cannot write, by hand."""
    height, width, _ = wide.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + b"".join(png_chunk(n, c) for n, c in ((b"IHDR", header), (b"IDAT", zlib.compress(lines))))
        + png_chunk(b"IEND", b"")
    )


def png_chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def test_16_bit_colour() -> None:
    wide = smooth().astype(np.uint16) * 257
    assert_close(decode_image(png_16_bit_rgb(wide), 32), reference(smooth(), 32), mean=0.6, most=3)


def test_integer_pixels_of_mode_i() -> None:
    eight = smooth()[..., 2].astype(np.int32)
    expected = reference(np.dstack([eight] * 3), 32)
    assert_close(decode_image(encode(eight, "TIFF"), 32), expected, mean=0.6, most=3)
    sixteen = decode_image(encode(eight * 257, "TIFF"), 32)
    assert_close(sixteen, expected, mean=0.8, most=3)


@pytest.mark.parametrize("pixels", [np.int32(70_000), np.int32(-1), np.float32(0.5)])
def test_pixels_without_an_agreed_range_are_refused(pixels: np.generic) -> None:
    with pytest.raises(ImageError, match="8- or 16-bit"):
        decode_image(encode(np.full((40, 40), pixels), "TIFF"), 32)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    cmyk = Image.fromarray(smooth()).convert("CMYK")
    raw = encode(cmyk, kind, **({"quality": 97} if kind == "JPEG" else {}))
    with Image.open(io.BytesIO(raw)) as read:
        assert read.mode == "CMYK"
        ink = np.asarray(read).astype(float) / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert_close(decode_image(raw, 32), reference(expected, 32), mean=1.0, most=4)
    assert_close(decode_image(raw, 32), reference(smooth(), 32), mean=3, most=30)


def test_ycbcr_tiff() -> None:
    raw = encode(Image.fromarray(smooth()).convert("YCbCr"), "TIFF")
    assert_close(decode_image(raw, 32), reference(smooth(), 32), mean=1.5, most=6)


def test_an_animated_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (50, 40), c) for c in ("red", "lime", "blue")]
    raw = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(raw, 32) == (255, 0, 0)).all()
    webp = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (decode_image(webp, 32) == (255, 0, 0)).all()
    tiff = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert (decode_image(tiff, 32) == (255, 0, 0)).all()


LOSSY = {"JPEG": 2.5, "WEBP": 3.5, "AVIF": 3.5}  # mean error that the format may make
LOSSY.update(dict.fromkeys(("JPEG2000", "PPM", "BMP", "TIFF"), 0.6))


@pytest.mark.parametrize("kind", LOSSY)
def test_formats(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    ours = decode_image(encode(smooth(), kind), 32)
    assert_close(ours, reference(smooth(), 32), mean=LOSSY[kind], most=60)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "jpeg"])
def test_compressed_tiffs(compression: str) -> None:
    ours = decode_image(encode(smooth(), "TIFF", compression=compression), 32)
    assert_close(ours, reference(smooth(), 32), mean=2.5, most=60)


def test_the_name_does_not_matter_and_the_content_does(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(encode(smooth(), "PNG"))
    ours = decode_image(read_image_bytes(file), 32)
    np.testing.assert_array_equal(ours, decode_image(encode(smooth(), "PNG"), 32))


def test_the_result_is_an_array_of_its_own() -> None:
    ours = decode_image(encode(smooth(64, 64)), 64)
    assert ours.shape == (64, 64, 3) and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, smooth(64, 64))  # no resampling where none is needed


# ------------------------------------------------------------------- memory


def peak_of(work: Callable[[], object]) -> tuple[float, float]:
    """Peak of Python's allocations and growth of the process's peak, both in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        work()
        traced = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return traced / 2**20, grown / 2**10


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(50_000, 2), (2, 50_000)])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_strip_does_not_become_a_giant(mode: str, size: tuple[int, int], fit: str) -> None:
    strip = Image.new("RGB", size, (200, 100, 50))
    raw = encode(strip.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    result: list[Pixels] = []
    traced, grown = peak_of(lambda: result.append(decode_image(raw, 256, fit)))
    # scaled to a short side of 256 it would be 6,400,000 x 256 pixels, about 5 GB
    assert traced < 64 and grown < 64
    if mode != "L":
        seen = result[0][127:129, 127:129] if fit == "pad" else result[0]
        seen = seen[(seen != PAD_COLOUR).any(-1)]
        assert_close(seen, np.full(seen.shape, (200, 100, 50)), mean=4, most=12)
        assert len(seen) == (2 if fit == "pad" else 256**2)


LARGEST = 9459  # its square is just below the limit
STATED_MEMORY = 2.5e9 - MAX_IMAGE_BYTES

MEASURE = """
import re, sys
from pathlib import Path
from emotion_toolbox.decoding import decode_image, read_image_bytes

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
assert decode_image(read_image_bytes(Path(sys.argv[1])), 256, sys.argv[2]).shape == (256, 256, 3)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a process's peak memory")
@pytest.mark.parametrize(
    ("name", "mode", "options", "fit"),
    [
        ("grey16.png", "I;16", {"compress_level": 1}, "crop"),
        ("palette.png", "P", {"compress_level": 1, "transparency": bytes([128] * 256)}, "crop"),
        ("alpha.png", "RGBA", {"compress_level": 1}, "crop"),
        ("alpha.webp", "RGBA", {"lossless": True, "method": 0}, "squash"),
        ("alpha.jp2", "RGBA", {}, "squash"),
        ("integers.tif", "I", {"compression": "tiff_lzw"}, "pad"),
        ("print.tif", "CMYK", {"compression": "tiff_lzw"}, "crop"),
    ],
)
def test_the_largest_image_takes_no_more_memory_than_stated(
    tmp_path: Path, name: str, mode: str, options: dict[str, Any], fit: str
) -> None:
    assert LARGEST**2 <= MAX_IMAGE_PIXELS < (LARGEST + 1) ** 2
    picture = Image.new(mode, (LARGEST, LARGEST))
    if mode == "P":
        picture.putpalette([0] * 768)
    picture.save(tmp_path / name, **options)
    del picture
    command = [sys.executable, "-c", MEASURE, str(tmp_path / name), fit]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert 1e8 < int(done.stdout) < STATED_MEMORY


# ------------------------------------------------------------------- files that are none


def bomb_png(side: int = 60_000) -> bytes:
    header = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    line = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), png_chunk(b"IDAT", line), png_chunk(b"IEND", b"")]
    )


def claims(kind: str, width: int, height: int) -> bytes:
    """A small good file whose header is changed to claim another size."""
    if kind == "GIF":
        raw = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
        struct.pack_into("<2H", raw, 6, width, height)
    elif kind == "BMP":
        raw = bytearray(encode(Image.new("RGB", (8, 8)), "BMP"))
        struct.pack_into("<2i", raw, 18, width, height)
    else:
        raw = bytearray(encode(Image.new("L", (8, 8)), "JPEG"))
        struct.pack_into(">2H", raw, raw.index(b"\xff\xc0") + 5, height, width)
    return bytes(raw)


JPEG = encode(smooth(), "JPEG", quality=90)
PNG = encode(smooth())

MALFORMED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not an image"),
    "one byte": (b"\xff", "not an image"),
    "zero bytes only": (bytes(5000), "not an image"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "not an image"),
    "JSON": (b'{"path": "a.jpg", "label": "joy"}', "not an image"),
    "HTML": (b"<!DOCTYPE html><title>404 Not Found</title>", "not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "not an image"),
    "PDF": (b"%PDF-1.7\n" + bytes(200), "not an image"),
    "PostScript, which runs a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "not an image",
    ),
    "ZIP": (b"PK\x03\x04" + bytes(200), "not an image"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "not an image"),
    "JPEG mark only": (b"\xff\xd8\xff", ""),
    "JPEG without a picture": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9", ""),
    "PNG mark only": (b"\x89PNG\r\n\x1a\n", ""),
    "PNG without pixels": (PNG[: PNG.index(b"IDAT") - 4] + png_chunk(b"IEND", b""), ""),
    "GIF mark only": (b"GIF89a", ""),
    "WebP mark only": (b"RIFF\x10\0\0\0WEBPVP8 ", ""),
    "TIFF mark only": (b"II*\0\x08\0\0\0", ""),
    "BMP mark only": (b"BM" + bytes(20), ""),
    "PPM without pixels": (b"P6 100 100 255\n", "truncated"),
    "PNG bomb": (bomb_png(), "60000x60000|DecompressionBomb"),
    "PNG just too large": (bomb_png(10_001), "10001x10001 pixels"),
    "GIF bomb": (claims("GIF", 65535, 65535), "DecompressionBomb"),
    "BMP bomb": (claims("BMP", 60_000, 60_000), "DecompressionBomb"),
    "JPEG bomb": (claims("JPEG", 60_000, 60_000), "DecompressionBomb"),
    "BMP claims more than it has": (claims("BMP", 800, 600), ""),
    "BMP of no width": (claims("BMP", 0, 8), ""),
    "PNG with a wrong header checksum": (PNG[:29] + b"\0\0\0\0" + PNG[33:], ""),
    "PNG with a flipped pixel bit": (
        PNG[: len(PNG) // 2] + bytes([PNG[len(PNG) // 2] ^ 1]) + PNG[len(PNG) // 2 + 1 :],
        "",
    ),
    "PNG header after garbage": (b"\n" + PNG, "not an image"),
    "two bytes swapped in a JPEG's mark": (b"\xd8\xff" + JPEG[2:], "not an image"),
    "text in a PNG's place of a chunk": (PNG[:33] + b"GET / HTTP/1.1" + PNG[33:], ""),
}


@pytest.mark.bad_image
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_image_errors_with_a_reason(case: str) -> None:
    raw, reason = MALFORMED[case]
    messages = set()
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            decode_image(raw, 32)
        messages.add(str(caught.value))
    assert len(messages) == 1, "a reason that changes, such as an address in memory"
    message = messages.pop()
    assert message.strip() and any(part in message for part in reason.split("|"))


TRUNCATED: dict[str, bytes] = {
    "JPEG": JPEG,
    "progressive JPEG": encode(smooth(), "JPEG", progressive=True),
    "greyscale JPEG": encode(smooth()[..., 0], "JPEG"),
    "PNG": PNG,
    "palette PNG": encode(Image.fromarray(smooth()).quantize(16)),
    "GIF": encode(Image.fromarray(smooth()).quantize(16), "GIF"),
    "BMP": encode(smooth(), "BMP"),
    "TIFF": encode(smooth(), "TIFF"),
    "LZW TIFF": encode(smooth(), "TIFF", compression="tiff_lzw"),
    "WebP": encode(smooth(), "WEBP"),
    "lossless WebP": encode(smooth(), "WEBP", lossless=True),
    "JPEG 2000": encode(smooth(), "JPEG2000"),
    "PPM": encode(smooth(), "PPM"),
}


@pytest.mark.bad_image
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TRUNCATED)
def test_a_truncated_file_is_an_error_unless_all_of_its_pixels_are_there(kind: str) -> None:
    raw = TRUNCATED[kind]
    whole = decode_image(raw, 32)
    ends = [*range(1, len(raw), max(1, len(raw) // 40)), *range(len(raw) - 24, len(raw))]
    refused = 0
    for end in ends:
        try:
            np.testing.assert_array_equal(decode_image(raw[:end], 32), whole)
        except ImageError as error:
            assert str(error)
            refused += 1
        else:
            assert end > len(raw) - 16, f"cut to {end} of {len(raw)} bytes"
    assert refused >= 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "greyscale JPEG", "PNG", "GIF"])
def test_a_download_that_stopped_in_reserved_space(kind: str) -> None:
    raw = TRUNCATED[kind]
    whole = decode_image(raw, 32)
    for end in range(1, len(raw) - 1, max(1, len(raw) // 60)):
        try:
            ours = decode_image(raw[:end] + bytes(len(raw) - end), 32)
        except ImageError:
            continue
        np.testing.assert_array_equal(ours, whole)  # only the mark of the end was lost


def test_zero_bytes_after_a_good_jpeg_are_harmless() -> None:
    np.testing.assert_array_equal(decode_image(JPEG + bytes(1000), 32), decode_image(JPEG, 32))
    tail = b"a film of the moment, as phones add it"
    np.testing.assert_array_equal(decode_image(JPEG + tail, 32), decode_image(JPEG, 32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TRUNCATED)
def test_damaged_bits_raise_nothing_but_image_errors(kind: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        raw = bytearray(TRUNCATED[kind])
        for place in rng.integers(len(raw), size=rng.integers(1, 20)):
            raw[place] = rng.integers(256)
        try:
            ours = decode_image(bytes(raw), 32)
        except ImageError as error:
            assert str(error)
        else:
            assert ours.shape == (32, 32, 3)
            if "PNG" in kind:  # the one format here with checksums
                np.testing.assert_array_equal(ours, decode_image(TRUNCATED[kind], 32))


@pytest.mark.filterwarnings("ignore")
def test_the_limit_in_pixels_is_of_the_header() -> None:
    _, grown = peak_of(lambda: pytest.raises(ImageError, decode_image, bomb_png(10_500), 32))
    assert grown < 64


# ------------------------------------------------------------------- what does not matter


def chunks(raw: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of the chunks of a PNG, in order."""
    found, start = [], 8
    while start < len(raw):
        (length,) = struct.unpack_from(">I", raw, start)
        found.append((raw[start + 4 : start + 8], raw[start + 8 : start + 8 + length]))
        start += 12 + length
    return found


def with_chunk(raw: bytes, chunk: bytes, *, last: bool = False) -> bytes:
    """A PNG with one more chunk: before the pixels, or after them."""
    place = raw.index(b"IEND" if last else b"IDAT") - 4
    return raw[:place] + chunk + raw[place:]


def damaged(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


BULK = np.random.default_rng(5).bytes(1_500_000)
PACKED = zlib.compress(BULK)
BOMB = zlib.compress(bytes(2**28))  # 256 MB in 260 kB
SIDE_CHUNKS = {
    "large profile": (b"iCCP", b"profile\0\0" + PACKED),
    "large text": (b"tEXt", b"Comment\0" + BULK),
    "large packed text": (b"zTXt", b"parameters\0\0" + PACKED),
    "large text of the world": (b"iTXt", b"workflow\0\0\0\0\0" + b"\xc3\xa9" * 10**6),
    "large packed text of the world": (b"iTXt", b"workflow\0\1\0\0\0" + PACKED),
    "large orientation": (b"zTXt", b"Raw profile type exif\0\0" + PACKED),
    "large description": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 1_200_000),
    "large packed description": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + PACKED),
    "a bomb of text": (b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "a bomb of a profile": (b"iCCP", b"profile\0\0" + BOMB),
    "profile of an unknown kind": (b"iCCP", b"profile\0\7" + PACKED[:100]),
    "profile without an end of its name": (b"iCCP", b"profile"),
    "text of an unknown kind": (b"zTXt", b"Raw profile type exif\0\7abc"),
    "short gamma": (b"gAMA", b"\0"),
    "short density": (b"pHYs", b"\0\0"),
    "short colours": (b"cHRM", b""),
    "empty intent": (b"sRGB", b""),
    "animation without frames": (b"acTL", bytes(8)),
    "frame of no size": (b"fcTL", bytes(26)),
    "frame outside": (b"fcTL", struct.pack(">5I2H2B", 0, 999, 999, 5, 5, 1, 1, 0, 0)),
    "of somebody's own": (b"prVt", b"whatever"),
}


@pytest.mark.parametrize("last", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("case", SIDE_CHUNKS)
def test_side_chunks_of_a_png_decide_nothing(case: str, last: bool) -> None:
    expected = decode_image(PNG, 32)
    chunk = png_chunk(*SIDE_CHUNKS[case])
    for raw in (with_chunk(PNG, chunk, last=last), with_chunk(PNG, damaged(chunk), last=last)):
        traced, _ = peak_of(lambda raw=raw: decode_image(raw, 32))
        np.testing.assert_array_equal(decode_image(raw, 32), expected)
        assert traced < 32  # nothing of it is unpacked without a bound


def test_an_animated_png_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (50, 40), c) for c in ("red", "lime", "blue")]
    raw = encode(frames[0], save_all=True, append_images=frames[1:])
    assert b"fdAT" in raw
    assert (decode_image(raw, 32) == (255, 0, 0)).all()


@pytest.mark.bad_image
@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_damage_where_it_matters_names_the_chunk(name: bytes) -> None:
    indexed = Image.fromarray(smooth()).quantize(16)
    raw = encode(indexed, transparency=bytes(range(0, 256, 16)))
    content = dict(chunks(raw))[name]
    place = raw.index(name) + 4 + len(content) // 2
    raw = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
    with pytest.raises(
        ImageError, match=f"^damaged PNG: wrong checksum of its chunk b'{name.decode()}'$"
    ):
        decode_image(raw, 32)


@pytest.mark.bad_image
def test_a_damaged_length_names_the_place() -> None:
    start = PNG.index(b"IDAT") - 4
    raw = PNG[:start] + b"\x7f" + PNG[start + 1 :]
    with pytest.raises(ImageError, match=f"PNG, at byte {start}.*IDAT"):
        decode_image(raw, 32)


@pytest.mark.bad_image
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000"])
def test_a_damaged_header_is_not_called_another_kind_of_file(kind: str) -> None:
    raw = encode(smooth(), kind)
    with pytest.raises(ImageError) as caught:
        decode_image(raw[:16] + b"\xff" * 500, 32)
    assert "not an image" not in str(caught.value)


# ------------------------------------------------------------------- HEIF, and suffixes


def test_every_suffix_is_of_a_format_that_is_read(tmp_path: Path) -> None:
    usual = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    usual |= {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".mpo", ".apng"}
    assert usual <= image_suffixes()
    picture = Image.fromarray(smooth())
    for suffix in sorted(image_suffixes()):
        assert suffix == suffix.lower() and suffix.startswith(".")
        kind = Image.registered_extensions()[suffix]
        if suffix != ".pfm" and (kind != "AVIF" or features.check("avif")):
            (tmp_path / f"a{suffix}").write_bytes(encode(picture, kind))
            ours = decode_image(read_image_bytes(tmp_path / f"a{suffix}"), 32)
            assert_close(ours, reference(smooth(), 32), mean=4, most=90)
    for other in (".eps", ".psd", ".tga", ".ico", ".svg", ".pdf", ".mp4", ".txt", ""):
        assert other not in image_suffixes()


@pytest.fixture
def fresh_formats() -> Iterator[None]:
    """Formats that are looked for anew, and are as they were afterwards."""
    opens, suffixes, kinds = dict(Image.OPEN), dict(Image.EXTENSION), list(Image.ID)
    for function in (readable_formats, image_suffixes):
        function.cache_clear()
    yield
    Image.OPEN.clear()
    Image.OPEN.update(opens)
    Image.ID[:] = kinds
    Image.EXTENSION.clear()
    Image.EXTENSION.update(suffixes)
    for function in (readable_formats, image_suffixes):
        function.cache_clear()


@pytest.mark.bad_image
@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heif_without_its_package_names_the_remedy(
    brand: bytes, fresh_formats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it is an ImportError
    Image.OPEN.pop("HEIF", None)
    raw = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + brand + bytes(300)
    with pytest.raises(ImageError, match="HEIF.*pip install pillow-heif"):
        decode_image(raw, 32)
    assert ".heic" not in image_suffixes()


def test_heif_with_its_package_is_read(fresh_formats: None) -> None:
    pytest.importorskip("pillow_heif")
    assert {".heic", ".heif", ".hif"} <= image_suffixes()
    stored = smooth(96, 64)
    assert_close(decode_image(encode(stored, "HEIF"), 32), reference(stored, 32), mean=4, most=90)
    turned = encode(stored, "HEIF", exif=orientation(6))
    expected = reference(np.ascontiguousarray(UPRIGHT[6](stored)), 32)
    assert_close(decode_image(turned, 32), expected, mean=4, most=90)
    with pytest.raises(ImageError):
        decode_image(turned[: len(turned) // 2], 32)
    if features.check("avif"):  # a brand that both formats use
        for kind in ("HEIF", "AVIF"):
            raw = encode(stored, kind)
            ours = decode_image(raw[:8] + b"mif1" + raw[12:], 32)
            np.testing.assert_array_equal(ours, decode_image(raw, 32))


def test_a_plug_in_for_heif_is_registered_and_used(
    fresh_formats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the package: its format is BMP behind the mark of HEIF."""
    mark = b"\0\0\0\x0cftypheic"

    class Heif(BmpImagePlugin.BmpImageFile):
        format = "HEIF"

        def _open(self) -> None:
            assert self.fp is not None
            self.fp = io.BytesIO(self.fp.read()[len(mark) :])
            super()._open()

    package = types.ModuleType("pillow_heif")

    def register() -> None:
        Image.register_open("HEIF", Heif, lambda prefix: prefix.startswith(mark))
        Image.register_extension("HEIF", ".heic")

    package.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    assert ".heic" in image_suffixes()
    ours = decode_image(mark + encode(smooth(), "BMP"), 32)
    np.testing.assert_array_equal(ours, decode_image(encode(smooth(), "BMP"), 32))


# ------------------------------------------------------------------- paths


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image_bytes(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.jpg", "^missing$")
    refuse(tmp_path, "^not a regular file$")
    (tmp_path / "empty.jpg").touch()
    refuse(tmp_path / "empty.jpg", "^zero bytes$")
    refuse(tmp_path / "empty.jpg" / "below", "Not a directory")
    refuse(tmp_path / ("x" * 300), "too long")
    refuse(tmp_path / "nul\0.jpg", "null byte")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    refuse(tmp_path / "dangling.jpg", "^missing$")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    refuse(tmp_path / "loop.jpg", "symbolic links")


def test_a_link_to_a_good_image_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert read_image_bytes(tmp_path / "link.png") == PNG


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/stdin"])
def test_devices_are_not_read(tmp_path: Path, device: str) -> None:
    if not Path(device).exists() or stat.S_ISREG(Path(device).stat().st_mode):
        pytest.skip(f"{device} is no device here")
    (tmp_path / "device.jpg").symlink_to(device)
    refuse(tmp_path / "device.jpg", "not a regular file")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    thread = threading.Thread(target=refuse, args=(tmp_path / "pipe.jpg", "regular"), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**40)  # a hole: takes no room
    refuse(tmp_path / "huge.jpg", "the limit is")


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(PNG)

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refuse(tmp_path / "a.png", "^Permission denied$")


def test_only_photographs_formats_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("TGA", "ICO", "PCX", "SGI", "DDS", "EPS"):
        with pytest.raises(ImageError, match="not an image"):
            decode_image(encode(smooth(), kind), 32)
    monkeypatch.setattr(decoding, "readable_formats", lambda: ("PNG",))
    assert decode_image(PNG, 32).shape == (32, 32, 3)
    with pytest.raises(ImageError, match="not an image"):
        decode_image(JPEG, 32)


def test_drawing_and_photographs_survive_a_round_trip_through_every_common_mode() -> None:
    """A last look with the eye of a reader: the red corner stays red and on its side."""
    picture = Image.new("RGB", (100, 100), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 30, 30), "red")
    for mode in ("RGB", "RGBA", "P", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        ours = decode_image(encode(picture.convert(mode), kind), 50)
        assert (ours[:12, :12] == (255, 0, 0)).all() and (ours[20:, 20:] == 255).all()
