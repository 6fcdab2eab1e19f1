"""Decoding one image, whatever it is, to a square of 8-bit RGB."""

import contextlib
import functools
import importlib
import io
import stat
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from emotion_toolbox.errors import ImageError

MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
DECODER_VERSION = 3  # raise it whenever the pixels change: older caches are then left alone
FITS = ("crop", "pad", "squash")  # what becomes of images that are not square
PAD_COLOUR = (124, 116, 104)  # the mean of ImageNet: normalised, nearly zero in every network
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
PNG_MARK = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow opens; HEIF with the package pillow-heif only."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that are read, lower case, as Pillow registers them."""
    formats = (*readable_formats(), "MPO")  # MPO: a JPEG that holds further pictures
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in formats)


def read_image_bytes(path: Path) -> bytes:
    """The bytes of an image file; raises ``ImageError`` for what is no regular, sane file."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ImageError("not a regular file")
        if info.st_size == 0:
            raise ImageError("zero bytes")
        if info.st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"{info.st_size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError("missing") from error
    except (OSError, ValueError) as error:
        raise ImageError(getattr(error, "strerror", None) or str(error)) from error


def bare_png(data: bytes) -> bytes:
    """A PNG with only what decoding uses: profiles and texts, however large, decide nothing.

    Raises ``ImageError`` for a file that is cut off, or damage in what is used, naming the chunk.
    """
    view, kept, start, name = memoryview(data), [memoryview(PNG_MARK)], len(PNG_MARK), b""
    while name != b"IEND":
        end = start + 12 + int.from_bytes(view[start : start + 4])
        name = data[start + 4 : start + 8]
        if end > len(data):
            raise ImageError(f"truncated or damaged PNG, at byte {start:,} (chunk {ascii(name)})")
        whole = zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])
        if name in PNG_CHUNKS and not whole:
            raise ImageError(f"damaged PNG: wrong checksum of its chunk {ascii(name)}")
        if name in PNG_CHUNKS or (whole and name == b"eXIf"):
            kept.append(view[start:end])
        start = end
    return b"".join(kept)


def refuse_empty_tail(data: bytes) -> None:
    """Raise for a JPEG that ends in zero bytes, which its decoder would take for pixels."""
    start = data.rfind(b"\xff\xda")  # the last scan; "\xff\xd9" ends the image
    if data.endswith(b"\0\0") and data.find(b"\xff\xd9", start) < 0:
        raise ImageError("truncated: it ends in zero bytes instead of the end of the image")


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode, transparency over white; ``ImageError`` for floats, 32-bit numbers."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError("floating-point pixels; save it as 8- or 16-bit")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageError("32-bit pixels; save it as 8- or 16-bit")
        wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
        grey = (values >> 8 if wide else values).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(paper, layered).convert("RGB")
    return image.convert("RGB")


def decode_image(data: bytes, size: int, fit: str = "crop") -> npt.NDArray[np.uint8]:
    """Decode `data` to an upright, antialiased square, uint8 [size, size, 3].

    Of an image that is not square, "crop" keeps the centre square, "pad" all, between bars of
    ``PAD_COLOUR``, and "squash" all, with both sides resized to `size`. Raises ``ImageError`` if
    the bytes are no usable image, ``ValueError`` for another `fit`.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} must be one of {FITS}")
    try:
        source = io.BytesIO(bare_png(data) if data.startswith(PNG_MARK) else data)
        with Image.open(source, formats=readable_formats()) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ImageError(f"{width}x{height} pixels; the limit is {MAX_IMAGE_PIXELS:,}")
            if image.format in ("JPEG", "MPO"):
                refuse_empty_tail(data)
            reduced = image.draft("RGB", (size * 3 // 2, size * 3 // 2))
            image.load()
            # a fraction of 307 pixels ends inside the last pixel: 38.4 of 39
            extent = reduced[1][2:] if reduced else image.size
            upright = turn_upright(as_rgb(fit_image(image, extent, size, fit)), image)
            return np.asarray(ImageOps.pad(upright, (size, size), color=PAD_COLOUR))
    except ImageError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ImageError(reason_of(error, data[:16])) from error


def reason_of(error: Exception, start: bytes) -> str:
    """Why a file that begins with `start` (16 bytes) cannot be decoded, in a line."""
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
        return "HEIF (.heic), which the package pillow-heif reads: pip install pillow-heif"
    if not isinstance(error, UnidentifiedImageError):
        return f"{type(error).__name__}: {error}"
    for name in readable_formats():
        accept = Image.OPEN[name][1]
        if len(start) > 7 and accept is not None and (verdict := accept(start)):
            damage = f"damaged: it begins as {name}, and its header cannot be read"
            return verdict if isinstance(verdict, str) else damage  # text: its codec is missing
    return "not an image, or of no format that is read here"


def fit_image(image: Image.Image, extent: tuple[float, float], size: int, fit: str) -> Image.Image:
    """The first `extent` pixels, resized to `size` x `size`; with "pad", only the long side is."""
    if image.mode not in ("RGB", "L", "RGBA", "LA") or "transparency" in image.info:
        image = as_rgb(image)  # what is left can be interpolated, alpha included
    if fit == "squash" and image.mode in ("RGBA", "LA"):
        # else an older Pillow leaves out the gap, and makes a long strip wide before it is short
        image = image.convert("RGBA").convert("RGBa")
    target, box = (size, size), (0.0, 0.0, *extent)
    if fit == "crop":
        side = min(extent)
        left, top = (extent[0] - side) / 2, (extent[1] - side) / 2
        box = (left, top, left + side, top + side)
    elif fit == "pad":
        width, height = (max(1, round(side / max(extent) * size)) for side in extent)
        target = (width, height)
    return image.resize(target, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def turn_upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` as the EXIF orientation of `source` wants it seen; broken EXIF turns nothing."""
    # of the EXIF data only that is looked at: the rest may be broken
    picture.info.clear()
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation, 1)
        picture.getexif()[ExifTags.Base.Orientation] = orientation
        return ImageOps.exif_transpose(picture)
    except Exception:  # the picture itself is good
        return picture
