"""Random augmentation: drawn on the CPU as a function of the position, applied in batches."""

# %% [markdown]
# #### Augmentation in two halves
#
# Augmentation shows the network a slightly different image in every epoch, so that it cannot learn
# the images by heart. Every change must leave the *emotion* as it was: we crop gently, turn little
# and hardly touch the hue, because colour carries much of the mood.
#
# The usual way augments one image at a time on the CPU, and starves a fast GPU. Here the work is
# split. *Drawing* makes a few numbers for each image, on the CPU. *Applying* changes the pixels of
# the whole batch at once, wherever they lie. Numbers travel to the device and nothing comes back,
# so neither side waits for the other.

# %%
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from emotion_transfer.config import EnhancedConfig


@dataclass(frozen=True)
class Augmentation:
    """What is done to each of B images; every tensor lies on the CPU."""

    theta: Tensor  # float32 [B, 2, 3], from output to input coordinates, both in [-1, 1]
    brightness: Tensor  # float32 [B], a factor: 1 changes nothing
    contrast: Tensor  # float32 [B], likewise
    saturation: Tensor  # float32 [B], likewise
    hue: Tensor  # float32 [B], a share of the colour circle: 0 changes nothing
    blur_rows: Tensor  # int64 [N], the images that are blurred
    blur_sigma: Tensor  # float32 [N], in pixels of the output
    erase: Tensor  # int64 [B, 4], left, top, right, bottom in pixels of the output; or empty


# %% [markdown]
# Each image owns one row of uniform numbers, whose columns have names. The crop has ten tries of
# two numbers each, because it is drawn as torchvision's `RandomResizedCrop` draws it: area and
# aspect ratio at random, again where the crop would not fit into the image, all of the image where
# ten tries do not.

# %%
AUGMENT_COLUMNS = (
    *("crop_x", "crop_y", "flip", "rotation", "brightness", "contrast", "saturation", "hue"),
    *("blur", "blur_sigma", "erase", "erase_area", "erase_ratio", "erase_x", "erase_y"),
)
CROP_TRIES = 10
AUGMENT_DRAWS = len(AUGMENT_COLUMNS) + 2 * CROP_TRIES

CROP_RATIO = 4 / 3  # aspect ratios from 3:4 to 4:3
BLUR_SIGMA = (0.5, 1.5)  # pixels
BLUR_RADIUS = 3  # the kernel is 7 x 7
ERASE_AREA = (0.02, 0.2)  # share of the image; RandomErasing's 0.33 can hide what an image shows
ERASE_RATIO = (0.3, 3.3)

Floats = npt.NDArray[np.float64]


# %%
def draw_crops(scale: tuple[float, float], area: Floats, ratio: Floats) -> tuple[Floats, Floats]:
    """Widths and heights [B] of random crops, as shares of the side of a square image.

    `area` and `ratio` are uniforms [B, CROP_TRIES]; the first try that fits counts (Szegedy et al.
    2015). Not rounded to whole pixels, because the resampling needs no whole pixels.
    """
    side = np.sqrt(scale[0] + area * (scale[1] - scale[0]))
    stretch = CROP_RATIO ** (ratio - 0.5)  # the square root of the aspect ratio
    width, height = side * stretch, side / stretch
    fits = (width <= 1) & (height <= 1)
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    found = fits.any(axis=1)
    return np.where(found, width[first], 1.0), np.where(found, height[first], 1.0)


# %% [markdown]
# Crop, scaling, mirror image and rotation are all *affine*: together they are one 2 x 3 matrix that
# says where in the stored image each pixel of the output looks. One resampling instead of three is
# faster, and sharper. Where a rotated crop looks beyond its own edge it sees what really lies
# there, not black corners.


# %%
def draw_affine(cfg: EnhancedConfig, named: dict[str, Floats], tries: Floats) -> Floats:
    """Matrices [B, 2, 3] of crop, flip and rotation; `tries` are uniforms [B, 2 * CROP_TRIES]."""
    width, height = draw_crops(cfg.CROP_SCALE, tries[:, :CROP_TRIES], tries[:, CROP_TRIES:])
    mirror = np.where(named["flip"] < cfg.FLIP_PROB, -1.0, 1.0)
    angle = np.deg2rad(cfg.ROTATION) * (2 * named["rotation"] - 1)
    cos, sin = np.cos(angle), np.sin(angle)
    x = (2 * named["crop_x"] - 1) * (1 - width)
    y = (2 * named["crop_y"] - 1) * (1 - height)
    rows = [[width * mirror * cos, -width * mirror * sin, x], [height * sin, height * cos, y]]
    return np.moveaxis(np.array(rows), 2, 0)


# %% [markdown]
# Random erasing hides a rectangle, so that no single detail decides.


# %%
def draw_erase(cfg: EnhancedConfig, named: dict[str, Floats]) -> npt.NDArray[np.int64]:
    """Boxes [B, 4] (left, top, right, bottom) to erase, or empty ones (Zhong et al. 2020)."""
    size = cfg.IMG_SIZE
    area = ERASE_AREA[0] + named["erase_area"] * (ERASE_AREA[1] - ERASE_AREA[0])
    ratio = ERASE_RATIO[0] * (ERASE_RATIO[1] / ERASE_RATIO[0]) ** named["erase_ratio"]
    height = np.rint(size * np.sqrt(area * ratio))
    width = np.rint(size * np.sqrt(area / ratio))
    left = np.floor(named["erase_x"] * (size - width + 1))
    top = np.floor(named["erase_y"] * (size - height + 1))
    boxes = np.stack((left, top, left + width, top + height), axis=1).astype(np.int64)
    return np.where(named["erase"][:, None] < cfg.ERASE_PROB, boxes, 0)


# %% [markdown]
# `draw_augmentation` turns the rows into what is done to the images. A setting of 0 switches its
# part off *exactly*, so what a part is worth can be measured by leaving it out. (For the crop that
# setting is `CROP_SCALE = (1, 1)`: always all of the stored image.)


# %%
def draw_augmentation(cfg: EnhancedConfig, uniforms: Floats) -> Augmentation:
    """What is done to B images: a function of `cfg` and of `uniforms` [B, AUGMENT_DRAWS] alone.

    Row i of the result depends on row i of `uniforms` only. Raises ``ValueError`` for other shapes.
    """
    if uniforms.ndim != 2 or uniforms.shape[1] != AUGMENT_DRAWS:
        raise ValueError(f"uniforms of shape {uniforms.shape} should be (B, {AUGMENT_DRAWS})")
    named = {name: uniforms[:, i] for i, name in enumerate(AUGMENT_COLUMNS)}
    blurred = np.flatnonzero(named["blur"] < cfg.BLUR_PROB)
    sigma = BLUR_SIGMA[0] + named["blur_sigma"][blurred] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
    return Augmentation(
        theta=to_float32(draw_affine(cfg, named, uniforms[:, -2 * CROP_TRIES :])),
        brightness=to_float32(1 + cfg.BRIGHTNESS * (2 * named["brightness"] - 1)),
        contrast=to_float32(1 + cfg.CONTRAST * (2 * named["contrast"] - 1)),
        saturation=to_float32(1 + cfg.SATURATION * (2 * named["saturation"] - 1)),
        hue=to_float32(cfg.HUE * (2 * named["hue"] - 1)),
        blur_rows=torch.from_numpy(blurred.astype(np.int64)),
        blur_sigma=to_float32(sigma),
        erase=torch.from_numpy(draw_erase(cfg, named)),
    )


def to_float32(values: Floats) -> Tensor:
    """A float32 tensor of `values`."""
    return torch.from_numpy(values.astype(np.float32))


# %% [markdown]
# #### Resampling
#
# Now the pixels. Build the grid of places to look at, and let `grid_sample` look there, bilinearly.
# Beyond the edge of the stored image it sees the image reflected. Stored images are about as much
# larger than the output as an average crop is smaller than its image, so hardly anything is shrunk
# and nothing needs antialiasing.


# %%
def resample_images(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """What the maps `theta` [B, 2, 3] see of `images` [B, 3, S, S]: float32 [B, 3, size, size]."""
    steps = torch.arange(size, device=images.device, dtype=torch.float32)
    centres = (2 * steps + 1) / size - 1
    # not affine_grid: that is a matrix product, which TF32 or autocast would round
    down = theta[:, :, 1:2] * centres + theta[:, :, 2:3]  # [B, 2, size]
    across = theta[:, :, 0:1] * centres
    grid = down[:, :, :, None] + across[:, :, None, :]  # [B, 2, size, size]
    return F.grid_sample(
        images.float(),
        grid.permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )


# %% [markdown]
# #### Colour
#
# Brightness is a factor. Contrast moves the pixels away from the image's mean grey or towards it,
# saturation away from or towards each pixel's own grey. These are torchvision's
# `adjust_brightness`, `adjust_contrast` and `adjust_saturation`, with a factor of its own for each
# image.

# %%
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as rounded by torchvision


def mix_grey(images: Tensor) -> Tensor:
    """The grey [B, 1, H, W] of RGB images [B, 3, H, W]."""
    red, green, blue = torch.split(images, 1, dim=1)
    grey = torch.add(GREY_WEIGHTS[0] * red, green, alpha=GREY_WEIGHTS[1])
    return torch.add(grey, blue, alpha=GREY_WEIGHTS[2])


# %%
def jitter_colours(
    images: Tensor,
    brightness: Tensor | None,
    contrast: Tensor | None,
    saturation: Tensor | None,
    hue: Tensor | None,
) -> Tensor:
    """Adjust float RGB images [B, 3, H, W] in [0, 1], in the order of the arguments.

    Each adjustment is one value for each image, [B], or None, which leaves it out.
    """
    if brightness is not None:
        images = (images * brightness[:, None, None, None]).clamp_(0, 1)
    if contrast is not None:
        factor = contrast[:, None, None, None]
        mean = mix_grey(images.mean(dim=(2, 3), keepdim=True))
        images = (images * factor).add_((1 - factor) * mean).clamp_(0, 1)
    if saturation is not None:
        grey = mix_grey(images)
        images = torch.lerp(grey, images, saturation[:, None, None, None]).clamp_(0, 1)
    return images if hue is None else shift_hue(images, hue)


# %% [markdown]
# Shifting the hue means going to HSV, turning the colour circle, and coming back. Done literally,
# pixel by pixel and by cases, it is the slowest augmentation of all. But neither way needs cases.
# Let the circle be six units long, with red at 0. Over the position on it the red channel is a
# trapezium: at the pixel's highest value for one unit on either side of red, falling over the
# second unit, at the lowest value in the third. So red itself tells how far from red the pixel is
# where it falls; `green - blue` tells it where red is flat, and on which side. On the way back each
# channel reads its own trapezium, between the same lowest and highest values as before, because a
# turn of the hue keeps both.


# %%
def shift_hue(images: Tensor, hue: Tensor) -> Tensor:
    """Turn the hue of RGB images [B, 3, H, W] in [0, 1] by `hue` [B], a share of the circle.

    The function that torchvision's ``adjust_hue`` computes, without its selection by sector.
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


# %% [markdown]
# #### Blur and erasing
#
# A Gaussian blur is a weighted mean over the neighbours, first along the rows, then along the
# columns. Only the images that drew a blur pay for one. Erasing writes zeros, which after the
# normalisation are the mean colour.


# %%
def blur_images(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur images [N, 3, H, W] by 7 x 7 Gaussians of `sigma` [N] pixels, reflected at the edges."""
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    weights = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), dim=1)  # [N, 7]
    for dim, margin in (
        (3, (BLUR_RADIUS, BLUR_RADIUS, 0, 0)),
        (2, (0, 0, BLUR_RADIUS, BLUR_RADIUS)),
    ):
        padded, length = F.pad(images, margin, mode="reflect"), images.shape[dim]
        images = torch.zeros_like(images)
        for i, weight in enumerate(weights.unbind(1)):
            images.addcmul_(padded.narrow(dim, i, length), weight[:, None, None, None])
    return images


def erase_boxes(images: Tensor, boxes: Tensor) -> None:
    """Set the `boxes` [B, 4] (left, top, right, bottom; on the CPU) of `images` to 0, in place."""
    for image, (left, top, right, bottom) in zip(images, boxes.tolist(), strict=True):
        if left < right:
            image[:, top:bottom, left:right] = 0


# %% [markdown]
# #### All of it, in order
#
# Two helpers first. One sends numbers to the device without waiting for their arrival. The other
# sends the colour factors, and leaves out an adjustment that would change none of the images.


# %%
def send_to(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; later work there waits for the copy, this program does not."""
    return values.to(device, non_blocking=True)


def colour_factors(augmentation: Augmentation, device: torch.device) -> list[Tensor | None]:
    """Brightness, contrast, saturation and hue on `device`, each None where it changes nothing."""
    factors = (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    neutral = [bool((f == 1).all()) for f in factors] + [not bool(augmentation.hue.any())]
    values = (*factors, augmentation.hue)
    return [None if n else send_to(v, device) for v, n in zip(values, neutral, strict=True)]


# %%
def channel_constants(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`mean` and `std` as tensors [3, 1, 1] on `device`."""
    both = send_to(torch.tensor([list(mean), list(std)], dtype=torch.float32), device)
    return both[0, :, None, None], both[1, :, None, None]


def check_pixels(images: Tensor, size: int) -> None:
    """Raise ``ValueError`` unless `images` are uint8 [B, 3, S, S] with S of `size` or more."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or images.dtype != torch.uint8:
        raise ValueError(f"images of shape {shape}, {images.dtype} should be uint8 [B, 3, S, S]")
    if shape[2] < size:
        raise ValueError(
            f"images of {shape[2]} pixels cannot give {size}: raise CACHE_SIZE or lower IMG_SIZE"
        )


# %% [markdown]
# Blur comes after normalisation here, which changes nothing: both are linear, and the weights of a
# blur add up to 1. On a CPU the batch is worked off a few images at a time, so that they stay in
# the processor's cache from one operation to the next.

# %%
CPU_CHUNK = 2  # images a thread
ColourJitter = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor
]


def apply_augmentation(
    images: Tensor,
    augmentation: Augmentation,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    jitter: ColourJitter = jitter_colours,
) -> Tensor:
    """Augment and normalise uint8 images [B, 3, S, S]: float32 [B, 3, size, size], channels_last.

    Works where `images` lie and never waits for the device. `jitter` may be a compiled
    ``jitter_colours``. Raises ``ValueError`` for other shapes.
    """
    check_pixels(images, size)
    count, device = len(images), images.device
    if len(augmentation.theta) != count:
        raise ValueError(f"{len(augmentation.theta)} augmentations do not fit {count} images")
    centre, spread = channel_constants(mean, std, device)
    theta, colours = send_to(augmentation.theta, device), colour_factors(augmentation, device)
    result = torch.empty((count, 3, size, size), device=device, memory_format=torch.channels_last)
    chunk = CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else max(count, 1)
    for part in (slice(first, first + chunk) for first in range(0, count, chunk)):
        pixels = resample_images(images[part], theta[part], size).div_(255)
        pixels = jitter(pixels, *(None if c is None else c[part] for c in colours))
        result[part] = (pixels - centre).div_(spread)
    if len(augmentation.blur_rows):
        rows, sigma = (
            send_to(augmentation.blur_rows, device),
            send_to(augmentation.blur_sigma, device),
        )
        result.index_copy_(0, rows, blur_images(result.index_select(0, rows), sigma))
    erase_boxes(result, augmentation.erase)
    return result


# %% [markdown]
# #### Without chance
#
# Validation and test images get the centre crop and the normalisation, nothing else. `denormalise`
# goes the other way, to show what the network was shown.


# %%
def prepare_images(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Centre-crop and normalise uint8 images [B, 3, S, S]: float32 [B, 3, size, size].

    The result is channels_last. Raises ``ValueError`` for other shapes.
    """
    check_pixels(images, size)
    centre, spread = channel_constants(mean, std, images.device)
    first = round((images.shape[2] - size) / 2)  # as torchvision's center_crop rounds
    pixels = images[:, :, first : first + size, first : first + size].float()
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return pixels.div_(255).sub_(centre).div_(spread)


def denormalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.uint8]:
    """The pictures uint8 [B, H, W, 3] behind normalised images [B, 3, H, W]."""
    centre, spread = channel_constants(mean, std, images.device)
    pixels = (images.detach().float() * spread + centre).mul_(255).round_().clamp_(0, 255)
    return np.asarray(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy(), dtype=np.uint8)
