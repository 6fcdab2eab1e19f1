"""The arithmetic of pixels, for whole batches and without ever waiting for the device."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale_image

BLUR_RADIUS = 3  # the kernel is 7 x 7
CPU_CHUNK = 2  # images a thread

Channels = Sequence[float]  # one value each for red, green and blue
Factor = Tensor | None  # [B], one value for each image; None leaves the adjustment out
Floats = npt.NDArray[np.float64]
ColourJitter = Callable[[Tensor, Factor, Factor, Factor, Factor], Tensor]


def check_uniforms(uniforms: Floats, columns: int) -> None:
    """Raise ``ValueError`` for uniforms of another shape than [B, `columns`]."""
    if uniforms.ndim != 2 or uniforms.shape[1] != columns:
        raise ValueError(f"uniforms of shape {uniforms.shape} should be (B, {columns})")


def check_pixels(images: Tensor, size: int, planned: int | None = None) -> None:
    """Raise ``ValueError`` unless `images` are uint8 [B, 3, S, S], S >= `size`, B == `planned`."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or images.dtype != torch.uint8:
        raise ValueError(f"images of shape {shape}, {images.dtype} should be uint8 [B, 3, S, S]")
    if shape[2] < size:
        raise ValueError(
            f"images of {shape[2]} pixels cannot give {size}: raise CACHE_SIZE or lower IMG_SIZE"
        )
    if planned not in (None, len(images)):
        raise ValueError(f"{planned} augmentations do not fit {len(images)} images")


def send_to(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; later work there waits for the copy, this program does not."""
    return values.to(device, non_blocking=True)


def chunks(images: Tensor) -> Iterator[slice]:
    """Slices that cover a batch: on a CPU a few images each, so that they stay in its cache."""
    count = len(images)
    step = CPU_CHUNK * torch.get_num_threads() if images.device.type == "cpu" else max(count, 1)
    return (slice(first, first + step) for first in range(0, count, step))


def colour_factors(colour: Tensor, device: torch.device) -> list[Factor]:
    """The columns of `colour` [B, 4], which is on the CPU, for ``jitter_colours`` on `device`.

    A column that would change no image (factors of 1, shifts of 0) becomes None.
    """
    idle = (colour == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(dim=0).tolist()
    columns = send_to(colour, device).unbind(1)
    return [None if same else column for same, column in zip(idle, columns, strict=True)]


def jitter_colours(
    images: Tensor, brightness: Factor, contrast: Factor, saturation: Factor, hue: Factor
) -> Tensor:
    """Adjust float RGB images [B, 3, H, W] in [0, 1], in the order of the arguments.

    The functions that torchvision's ``adjust_brightness``, ``adjust_contrast``,
    ``adjust_saturation`` and ``adjust_hue`` compute, with factors of its own for every image.
    """
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp_(0, 1)
    if contrast is not None:  # away from the image's mean grey, or towards it
        factor = contrast[:, None, None, None]
        mean = rgb_to_grayscale_image(images.mean(dim=(2, 3), keepdim=True))
        images = (images * factor).add_((1 - factor) * mean).clamp_(0, 1)
    if saturation is not None:  # away from each pixel's own grey, or towards it
        grey = rgb_to_grayscale_image(images)
        images = torch.lerp(grey, images, saturation[:, None, None, None]).clamp_(0, 1)
    return images if hue is None else shift_hue(images, hue)


def shift_hue(images: Tensor, hue: Tensor) -> Tensor:
    """Turn the hue of RGB images [B, 3, H, W] in [0, 1] by `hue` [B], a share of the circle.

    By cases, as HSV is defined, it would be the slowest augmentation of all. But let the circle be
    six units long, with red at 0: over the place on it the red channel is a trapezium, at the
    pixel's highest value for one unit on either side of red, falling over the second, at the lowest
    in the third. So red tells how far from red the pixel is where it falls; ``green - blue`` tells
    it where red is flat, and on which side. On the way back each channel reads its own trapezium
    between the same lowest and highest value, for turning keeps both.
    """
    red, green, blue = images.unbind(1)
    low = images.amin(1)
    chroma = images.amax(1).sub_(low)
    scale = chroma.clamp_min(1e-12)  # a grey pixel has no hue, and any will do
    tilt = (green - blue).div_(scale)
    height = (red - low).div_(scale)
    # the distance from red: |tilt|, 2 - height, 3 - |tilt| where red is highest, between, lowest
    distance = 2 - torch.addcmul(height, 2 * height - 1, 1 - tilt.abs())
    place = torch.copysign(distance, tilt).add_(6 * hue[:, None, None])
    place = torch.sub(place, torch.floor(place / 6), alpha=6)
    shares = ((place - 3).abs_().sub_(1), 2 - (place - 2).abs_(), 2 - (place - 4).abs_())
    return torch.stack([torch.addcmul(low, chroma, s.clamp_(0, 1)) for s in shares], dim=1)


def blur_images(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur images [N, 3, H, W] by 7 x 7 Gaussians of `sigma` [N] pixels, reflected at the edges.

    A weighted mean over the neighbours, first along the rows, then along the columns.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weights = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), dim=1)  # [N, 7]
    margin = (BLUR_RADIUS, BLUR_RADIUS)
    for dim, pad in ((3, (*margin, 0, 0)), (2, (0, 0, *margin))):
        padded, length = F.pad(images, pad, mode="reflect"), images.shape[dim]
        images = torch.zeros_like(images)
        for i, weight in enumerate(weights.unbind(1)):
            images.addcmul_(padded.narrow(dim, i, length), weight[:, None, None, None])
    return images


def blur_some(images: Tensor, sigma: Tensor) -> None:
    """Blur `images` [B, 3, H, W] by `sigma` [B] (on the CPU) in place; one with 0 costs nothing."""
    chosen = sigma.nonzero().flatten()
    if len(chosen):
        rows = send_to(chosen, images.device)
        widths = send_to(sigma[chosen], images.device)
        images.index_copy_(0, rows, blur_images(images.index_select(0, rows), widths))


def erase_boxes(images: Tensor, boxes: Tensor) -> None:
    """Set the `boxes` [B, 4] (left, top, right, bottom; on the CPU) of `images` to 0, in place."""
    for image, (left, top, right, bottom) in zip(images, boxes.tolist(), strict=True):
        if left < right:
            image[:, top:bottom, left:right] = 0


def channel_constants(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """`mean` and `std` as tensors [3, 1, 1] on `device`."""
    both = send_to(torch.tensor([list(mean), list(std)], dtype=torch.float32), device)
    return both[0, :, None, None], both[1, :, None, None]


def prepare_images(images: Tensor, size: int, mean: Channels, std: Channels) -> Tensor:
    """Centre-crop and normalise uint8 images [B, 3, S, S]: float32 [B, 3, size, size].

    The result is channels_last. Raises ``ValueError`` for other shapes.
    """
    check_pixels(images, size)
    centre, spread = channel_constants(mean, std, images.device)
    first = round((images.shape[2] - size) / 2)  # as torchvision's center_crop rounds
    pixels = images[:, :, first : first + size, first : first + size].float()
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return pixels.div_(255).sub_(centre).div_(spread)


def denormalise(images: Tensor, mean: Channels, std: Channels) -> npt.NDArray[np.uint8]:
    """The pictures uint8 [B, H, W, 3] behind normalised images [B, 3, H, W]."""
    centre, spread = channel_constants(mean, std, images.device)
    pixels = (images.detach().float() * spread + centre).mul_(255).round_().clamp_(0, 255)
    return np.asarray(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy(), dtype=np.uint8)


def between(limits: tuple[float, float], uniform: Floats) -> Floats:
    """Numbers between two limits from `uniform` ones in [0, 1)."""
    return limits[0] + uniform * (limits[1] - limits[0])


def crop_sizes(scale: tuple[float, float], stretch: float, area: Floats, ratio: Floats) -> Floats:
    """Widths and heights [2, B] of crops, as shares of a square's side, from uniforms [B, tries].

    As torchvision's ``RandomResizedCrop``: areas in `scale`, aspect ratios from 1 / `stretch` to
    `stretch`; the first try that fits, or else all of the image.
    """
    side, root = np.sqrt(between(scale, area)), stretch ** (ratio - 0.5)
    sizes = np.stack((side * root, side / root))  # [2, B, tries]
    fits = np.all(sizes <= 1, axis=0)
    first = np.take_along_axis(sizes, fits.argmax(axis=1)[None, :, None], axis=2)[..., 0]
    return np.where(np.any(fits, axis=1), first, 1.0)


def random_boxes(
    size: int, areas: tuple[float, float], ratios: tuple[float, float], area: Floats,
    ratio: Floats, x: Floats, y: Floats,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """Boxes [B, 4] (left, top, right, bottom) in a square of `size` pixels, from uniforms [B].

    As torchvision's ``RandomErasing``: a share of the square in `areas`, heights to widths in
    `ratios`.
    """
    shares, tall = between(areas, area), ratios[0] * (ratios[1] / ratios[0]) ** ratio
    sides = np.rint(size * np.sqrt([shares / tall, shares * tall]))  # width, height [2, B]
    corner = np.floor([x, y] * (size - sides + 1))
    return np.concatenate((corner, corner + sides)).T.astype(np.int64)
