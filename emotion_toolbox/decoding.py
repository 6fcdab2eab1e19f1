"""Decoding one image, whatever it is, to a square of 8-bit RGB."""

import io
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from emotion_toolbox.errors import ImageError

MAX_IMAGE_BYTES = 256 * 2**20
MAX_IMAGE_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
DECODER_VERSION = 1  # raise it whenever the pixels change: older caches are then left alone
IMAGE_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"),
    "HEIF",  # if a plug-in for it is registered
)


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


def refuse_damage(data: bytes, image: Image.Image) -> None:
    """Raise for damage to the bytes of an opened PNG or JPEG that decoding would not notice."""
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
            again.verify()
    if image.format in ("JPEG", "MPO") and data.endswith(b"\0\0"):
        start = data.rfind(b"\xff\xda")  # the last scan; "\xff\xd9" ends the image
        if data.find(b"\xff\xd9", start) < 0:
            raise ImageError("truncated: it ends in zero bytes instead of the end of the image")


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode; transparency is laid over white.

    Raises:
        ImageError: for pixels that have no agreed range (floating-point, 32-bit integers).
    """
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


def decode_image(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode `data` to its upright, antialiased centre square, uint8 [size, size, 3].

    Raises:
        ImageError: if the bytes are no usable image.
    """
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ImageError(f"{width}x{height} pixels; the limit is {MAX_IMAGE_PIXELS:,}")
            refuse_damage(data, image)
            reduced = image.draft("RGB", (size * 3 // 2, size * 3 // 2))
            image.load()
            # a fraction of 307 pixels ends inside the last pixel: 38.4 of 39
            extent = reduced[1][2:] if reduced else image.size
            square = centre_square(image, extent, size)
            return np.asarray(turn_upright(as_rgb(square), image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of no format that is read here") from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ImageError(f"{type(error).__name__}: {error}") from error


def centre_square(image: Image.Image, extent: tuple[float, float], size: int) -> Image.Image:
    """The largest centred square of the first `extent` pixels, resized to `size` x `size`."""
    if image.mode not in ("RGB", "L", "RGBA", "LA") or "transparency" in image.info:
        image = as_rgb(image)  # what is left can be interpolated, alpha included
    side = min(extent)
    left, top = (extent[0] - side) / 2, (extent[1] - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


UPRIGHT_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(square: Image.Image, source: Image.Image) -> Image.Image:
    """`square` as the EXIF orientation of `source` wants it seen; unreadable EXIF turns nothing.

    ``ImageOps.exif_transpose`` would copy whole images and fail on broken EXIF data.
    """
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the picture itself is good
        return square
    turn = UPRIGHT_TURNS.get(orientation) if isinstance(orientation, int) else None
    return square if turn is None else square.transpose(turn)


def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that are read, lower case, as Pillow registers them."""
    Image.init()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in IMAGE_FORMATS)
